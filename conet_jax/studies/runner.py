"""One runner under every study: trains the runs that have no result yet, and reads them all.

A run is a config with its seed, and has a key, a hash of all that it depends on. Its record is a
JSON file, written by rename: FOLDER/results/KEY.json, or the result.json of a folder of its own.
Runs that differ in real-valued fields (``models.base.Hyper``) and seed alone are trained side by
side as one population, whose checkpoints stand in FOLDER/populations/; the others follow one
another. Processes can share both. An interrupted call goes on where it was, since what stands in
the folder is all there is to go on from.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import conet_jax
from conet_jax import files, models
from conet_jax.data.load import load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import make_folder, write_json
from conet_jax.models.base import Model
from conet_jax.run import jax_settings
from conet_jax.run.experiment import check_cuts
from conet_jax.studies import population, search

Record = dict[str, Any]
Say = Callable[[str], None]

# Fields that do not change a result; the data counts by its hash.
_NAMES = ("name", "variant", "data", "on_nonfinite")


class Run(NamedTuple):
    """One run of a study.

    Attributes:
      config: with its seed.
      digest: hash of the data.
      key: hash of all that the run depends on.
      path: of the JSON that it leaves.
      command: of launch/train.py, for a run with a folder of its own.
    """

    config: ConfigDict
    digest: str
    key: str
    path: Path
    command: str = ""


def _numbers(record: Record) -> list[Any]:
    """All that is to be a number in a record of the validation split."""
    history = record.get("history", [])
    found = [record["best_epoch"], record["epochs"]]
    for part in (record, *history):
        found += [part["seconds"], *(x for name in search.PARTS for x in part[name].values())]
    for row in history:
        found += [row["epoch"], row["train_loss"]]
    return [*found, *record.get("first_losses", {}).get("target", [])]


def read(run: Run, numbers: Callable[[Record], list[Any]] = _numbers) -> Record | None:
    """Returns the record of a run, None if it has none yet.

    Args:
      run: of the study.
      numbers: returns all that is to be a number in a record of that kind, for who computes on.

    Raises:
      InputError: the file is not such a record.
    """
    if not os.path.lexists(run.path):
        return None
    try:
        record = files.read_json(run.path)
        if type(record.get("failed", "")) is not str:
            raise TypeError("failed is no text")
        found = [] if "failed" in record else numbers(record)
        if not all(type(value) in (int, float) for value in found):
            raise TypeError("a number is something else")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{run.path} cannot be read as the result of a run ({error!r}); take it away, and the "
            "run is done again"
        ) from None
    return record


def write(run: Run, record: Record) -> None:
    """Writes the record of a run."""
    config = json.loads(run.config.to_json())
    write_json(run.path, {**record, "config": config, "dataset_hash": run.digest})


class Kind(NamedTuple):
    """What is recorded of a run. Functions of modules, so that other processes find them.

    Attributes:
      name: part of the key.
      single: (run, data) -> its record; None where it has written the file itself.
      population: (configs, data, folder of checkpoints, say) -> records of runs of one program;
        None to train each alone.
      read: returns the record that a run has left, None if it is still to do.
    """

    name: str
    single: Callable[[Run, Dataset], Record | None]
    population: Callable[[Sequence[ConfigDict], Dataset, Path, Say], list[Record]] | None = None
    read: Callable[[Run], Record | None] = read


def _validate_one(run: Run, dataset: Dataset) -> Record:
    try:
        return search.evaluate(run.config, dataset)
    except InputError as error:  # too many items for EASE, or a loss that is not finite
        return {"failed": str(error)}


def _validate_several(
    configs: Sequence[ConfigDict], dataset: Dataset, folder: Path, say: Say
) -> list[Record]:
    try:
        return population.train(configs, dataset, folder, say)
    except InputError as error:  # the config does not fit the data
        return [{"failed": str(error)} for _ in configs]


# The metrics of the validation split; the test split is sealed, and a failure is a result.
VALIDATION = Kind("validation", _validate_one, _validate_several)


def key(config: ConfigDict, digest: str, kind: Kind = VALIDATION) -> str:
    """Returns the hash of all that a record depends on.

    Config, data (its hash), kind, version, and settings of JAX that are not the usual ones.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in _NAMES}
    content = [kind.name, fields, digest, conet_jax.__version__]
    if settings := jax_settings.unusual():
        content.append(settings)
    content = json.dumps(content, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def plan(config: ConfigDict, dataset: Dataset, folder: Path, kind: Kind = VALIDATION) -> Run:
    """Returns a run that leaves its record in ``folder``/results."""
    check_cuts(config, dataset.valid)
    digest = dataset.meta["hash"]
    name = key(config, digest, kind)
    return Run(config, digest, name, folder / "results" / f"{name}.json")


class Datasets:
    """Data sets by ``config.data``, each loaded once.

    Args:
      given: the data of every config, whatever it says; by default what it says.
    """

    def __init__(self, given: Dataset | None = None) -> None:
        self.given = given
        self._loaded: dict[str, Dataset] = {}

    def of(self, config: ConfigDict) -> Dataset:
        """Returns the data of a config."""
        if self.given is not None:
            return self.given
        fields = json.dumps(config.data.to_dict(), sort_keys=True)
        if fields not in self._loaded:
            self._loaded[fields] = load_dataset(config)
        return self._loaded[fields]


class Unit(NamedTuple):
    """Runs that are trained together, and the folder of their checkpoints, None of a single one."""

    runs: list[Run]
    folder: Path | None


def units(runs: Sequence[Run], folder: Path, kind: Kind, *, members: int = 32) -> list[Unit]:
    """Returns what is left to train: populations begun before, then new ones and single runs.

    Raises:
      InputError: a record, or the list of a population's runs, cannot be read.
    """
    by_key = {run.key: run for run in runs}
    missing = [key for key, run in by_key.items() if kind.read(run) is None]
    found = []
    for path in sorted((folder / "populations").glob("*/members.json")):
        keys = _read_members(path)
        if all((folder / "results" / f"{key}.json").exists() for key in keys):
            shutil.rmtree(path.parent)  # killed after the last result
        elif not set(keys) <= by_key.keys():
            continue
        elif len({population.program(by_key[key].config) for key in keys}) > 1:
            shutil.rmtree(path.parent)  # another version's, which had them in one program
        else:
            found.append(Unit([by_key[key] for key in keys], path.parent))
            missing = [key for key in missing if key not in keys]
    groups: dict[str, list[str]] = {}
    for key in missing:
        config = by_key[key].config
        trained = isinstance(models.build(config), Model)
        if trained and kind.population is not None:
            groups.setdefault(population.program(config), []).append(key)
        else:
            found.append(Unit([by_key[key]], None))
    for keys in groups.values():
        for share in np.array_split(keys, -(-len(keys) // members)):
            digest = hashlib.sha256(" ".join(share).encode()).hexdigest()[:16]
            found.append(Unit([by_key[str(key)] for key in share], folder / "populations" / digest))
    return found


def _read_members(path: Path) -> list[str]:
    try:
        keys = files.read_json(path)
        if not (type(keys) is list and all(type(key) is str for key in keys)):
            raise ValueError("no list of keys")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a population's runs ({error}); take {path.parent} away, "
            "and they are trained again"
        ) from None
    return keys


def work(unit: Unit, kind: Kind, datasets: Datasets, name: str) -> None:
    """Trains the runs of a unit and writes their records."""

    def say(line: str) -> None:
        print(f"{name}: {line}", flush=True)

    dataset = datasets.of(unit.runs[0].config)
    if unit.folder is None:
        records = [kind.single(run, dataset) for run in unit.runs]
    else:
        unit.folder.mkdir(parents=True, exist_ok=True)
        write_json(unit.folder / "members.json", [run.key for run in unit.runs])
        configs = [run.config for run in unit.runs]
        records = kind.population(configs, dataset, unit.folder, say)
    for run, record in zip(unit.runs, records, strict=True):
        if record is not None:
            write(run, record)
    if unit.folder is not None:
        shutil.rmtree(unit.folder, ignore_errors=True)


def _work_apart(unit: Unit, kind: Kind, name: str) -> None:
    """``work`` in a process of its own, which ends with its parent."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    work(unit, kind, Datasets(), name)


class Outcome(NamedTuple):
    """What a call has come to.

    Attributes:
      records: by key.
      unfinished: by key, why a run ended without a record: out of memory, mostly.
    """

    records: dict[str, Record]
    unfinished: dict[str, str]

    def complete(self, cure: str = "") -> dict[str, Record]:
        """Returns the records.

        Raises:
          InputError: a run has none; ends in ``cure``.
        """
        if self.unfinished:
            raise InputError(
                f"{len(self.unfinished)} runs ended without a result "
                f"({next(iter(self.unfinished.values()))}): the same command tries them again{cure}"
            )
        return self.records


def _train(
    todo: Sequence[Unit], kind: Kind, datasets: Datasets, jobs: int, done: Callable
) -> dict[str, str]:
    """Trains what is left; returns why a run has no record, by key."""
    named = [(f"{number}/{len(todo)}", unit) for number, unit in enumerate(todo, 1)]
    errors: list[tuple[Unit, BaseException]] = []

    def tell(unit: Unit) -> None:
        for run in unit.runs:
            done(run, kind.read(run))

    if jobs == 1 or len(todo) < 2 or datasets.given is not None:
        for name, unit in named:
            try:
                work(unit, kind, datasets, name)
                tell(unit)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:  # of memory, mostly
                errors.append((unit, error))
    else:
        # Not forked: JAX has threads by now.
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(jobs, context) as pool:
            pending = {pool.submit(_work_apart, unit, kind, name): unit for name, unit in named}
            for future in futures.as_completed(pending):
                if future.exception() is None:
                    tell(pending[future])
        errors = [(unit, future.exception()) for future, unit in pending.items()]
        errors = [(unit, error) for unit, error in errors if error is not None]
    return {
        run.key: f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for unit, error in errors
        for run in unit.runs
    }


def run(
    runs: Sequence[Run],
    folder: Path,
    datasets: Datasets,
    kind: Kind = VALIDATION,
    *,
    members: int = 32,
    jobs: int = 1,
    begin: Callable[[list[Unit]], None] = lambda todo: None,
    done: Callable[[Run, Record], None] = lambda run, record: None,
) -> Outcome:
    """Trains the runs that have no record yet, and reads those of all.

    Args:
      runs: of a study, of one kind.
      folder: of the study, owned by this process (``run.lock``).
      datasets: their data.
      kind: what is recorded.
      members: most runs of a population: bounds its memory.
      jobs: processes that share populations and single runs.
      begin: told what is left to do.
      done: told of each run once it has its record, in the order in which they end.

    Returns:
      ``Outcome``.

    Raises:
      InputError: a file cannot be read or written, or a run of such a kind failed.
    """
    make_folder(folder / "results")
    todo = units(runs, folder, kind, members=members)
    begin(todo)
    unfinished = _train(todo, kind, datasets, jobs, done)
    records = {run.key: kind.read(run) for run in runs if run.key not in unfinished}
    return Outcome(records, unfinished)
