"""Every method of a table on one data set: searched, then trained with several seeds, then tested.

What stands in the workdir is all there is to go on from: ``METHOD/trials.jsonl``, a line a trial,
and ``METHOD/seed_S`` (with less data ``METHOD/drop_K/seed_S``), the runs of the best trial's
config, as launch/train.py makes them. The same call again goes on where it was; calls with other
methods may share the workdir, also at the same time.
"""

import difflib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import files, metrics, models
from conet_jax.data.load import check_users, load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import make_folder, make_report_folder, write_text
from conet_jax.run import lock
from conet_jax.run.fit import fit
from conet_jax.run.workdir import read_ranks, read_result
from conet_jax.studies import search, statistics, tables

# A longer run is the same run gone on, but a longer trial may be another choice.
_FREE = tuple(field for field in config_lib.FREE_FIELDS if field != "epochs")


class Study(NamedTuple):
    """What a table is made from.

    Attributes:
      file: config file, configs/NAME.py.
      get_config: its function of that name.
      given: config fields of the command line by dotted name; they hold for every method, a
        trial's own fields before them.
      workdir: folder of all that is written.
      seeds: runs a method, of seeds 0, 1, ….
      trials: trials a method.
      keep_checkpoints: whether a run's checkpoints stay once it has its result.
    """

    file: str
    get_config: Callable[[str], ConfigDict]
    given: dict[str, Any]
    workdir: Path
    seeds: int = 5
    trials: int = 8
    keep_checkpoints: bool = True

    def config(self, method: str, **fields: Any) -> ConfigDict:
        """Returns the config of a method under fields by dotted name."""
        config = self.get_config(method)
        config.update_from_flattened_dict({**self.given, **fields})
        config_lib.validate(config)
        return config

    def command(self, methods: Sequence[str]) -> str:
        """Returns the command that makes the table of these methods."""
        last = [f"--workdir={self.workdir}", f"--seeds={self.seeds}", f"--trials={self.trials}"]
        if set(methods) != set(search.METHODS):
            last.append(f"--methods={','.join(methods)}")
        return command("table2", self.file, self.given, *last)


class Run(NamedTuple):
    """One run of a study: where it stands, its config, and the launch/train.py command of it."""

    workdir: Path
    config: ConfigDict
    command: str


def command(name: str, file: str, fields: dict[str, Any], *flags: str) -> str:
    """Returns the command line of a launcher under a config file and fields by dotted name.

    >>> command("train", "configs/demo.py:lasso", {"l1": 1e-05}, "--workdir=a run")
    "python launch/train.py --config=configs/demo.py:lasso --config.l1=1e-05 '--workdir=a run'"
    """
    fields = [f"--config.{field}={value}" for field, value in fields.items()]
    return shlex.join(["python", f"launch/{name}.py", f"--config={file}", *fields, *flags])


def run(
    study: Study,
    methods: Sequence[str] = search.METHODS,
    drops: Sequence[int] = (),
    drop_methods: Sequence[str] = (),
) -> dict[str, Any]:
    """Does what is left to do and writes table2.json and table2.md of all methods that are done.

    Args:
      study: the table.
      methods: methods to search and train; one whose run fails is reported and left out.
      drops: numbers of training interactions to remove from each user of the target.
      drop_methods: the methods that are then trained again, with what was chosen on all data.

    Returns:
      The contents of table2.json.

    Raises:
      InputError: SciPy is missing; there is no such method; config or data cannot be used; the
        workdir holds trials or runs of another config or other data; or a run failed.
    """
    if not methods:
        raise InputError(f"no method is named: the methods are {', '.join(search.METHODS)}")
    datasets = _check(study, [*methods, *drop_methods], drops)
    failures = []
    for method in methods:
        try:
            make_folder(study.workdir / method)
            with lock.owned(study.workdir / method):
                rows = tune(study, method, datasets[0])
                for drop in (0, *(drops if method in drop_methods else ())):
                    train(study, method, rows, datasets[drop], drop)
        except InputError as error:
            failures.append(f"{method}: {error}")
            print("error:", failures[-1], flush=True)
    done = {method: collect(study, method, datasets) for method in search.METHODS}
    done = {method: found for method, found in done.items() if found is not None}
    report = tables.report(
        study.config("recipe").name,
        datasets,
        done,
        seeds=study.seeds,
        trials=study.trials,
        k=study.config("recipe").eval_k,
        command=study.command(list(done)),
    )
    text = tables.markdown(report)
    _publish(study.workdir / "table2.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _publish(study.workdir / "table2.md", text)
    print(text)
    if failures:
        raise InputError("; ".join(failures))
    return report


def _check(study: Study, methods: list[str], drops: Sequence[int]) -> dict[int, Dataset]:
    """Says what is wrong before the long part; returns the data by number dropped from a user."""
    statistics.scipy_stats()
    for name in methods:
        if name not in search.METHODS:
            near = difflib.get_close_matches(name, search.METHODS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(
                f"unknown method {name!r}{hint}: the methods are {', '.join(search.METHODS)}"
            )
    names = (path.name.removeprefix("drop_") for path in study.workdir.glob("*/drop_*"))
    present = [int(name) for name in names if name.isdigit()]  # of an earlier call
    datasets = {
        drop: load_dataset(study.config("recipe", **_drop(drop)))
        for drop in sorted({0, *drops, *present})
    }
    for split in ("valid", "test"):
        check_users(datasets[0], split)
    for method in search.METHODS:
        read_trials(study, method, datasets[0])
    make_report_folder(study.workdir)
    return datasets


def _publish(path: Path, text: str) -> None:
    # Several processes may write the tables at the same time.
    own = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    write_text(own, text)
    os.replace(own, path)


def _drop(drop: int) -> dict[str, int]:
    return {"data.drop": drop} if drop else {}


# The search.


def read_trials(study: Study, method: str, dataset: Dataset) -> list[dict[str, Any]]:
    """Reads the trials of a method that are done, none if there are none.

    Raises:
      InputError: the file cannot be read, or a trial is of other data, overrides or config.
    """
    path = study.workdir / method / "trials.jsonl"
    if not path.exists():
        return []
    try:
        with files.open_regular(path) as file:
            rows = [files.parse_json(line) for line in file]
        planned = search.trials(method, len(rows))
        for number, (row, overrides) in enumerate(zip(rows, planned, strict=True)):
            differing = config_lib.differences(
                row["config"], study.config(method, **overrides), free=_FREE
            )
            if row["overrides"] != overrides:
                differing = [f"overrides are {row['overrides']} there and {overrides} here"]
            if row["dataset_hash"] != dataset.meta["hash"]:
                hashes = row["dataset_hash"], dataset.meta["hash"]
                differing = ["the data's hash is {:.12}… there and {:.12}… here".format(*hashes)]
            if differing:
                raise InputError(
                    f"trial {number} in {path} is of another search: {'; '.join(differing)}. Take "
                    "another --workdir, or the same config and data"
                )
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as trials ({error}); take it away, and they are made again"
        ) from None
    return rows


def tune(study: Study, method: str, dataset: Dataset) -> list[dict[str, Any]]:
    """Runs the trials of a method that are not done yet.

    Returns:
      All trials; one that failed has ``failed``, the reason, in place of ``valid``.
    """
    path = study.workdir / method / "trials.jsonl"
    rows, planned = read_trials(study, method, dataset), search.trials(method, study.trials)
    for number in range(len(rows), len(planned)):
        overrides = planned[number]
        config = study.config(method, **overrides)
        row = {"overrides": overrides}
        try:
            row |= search.evaluate(config, dataset)
        except InputError as error:  # too many items for EASE, or a loss that is not finite
            row |= {"failed": str(error)}
        row |= {"dataset_hash": dataset.meta["hash"], "config": json.loads(config.to_json())}
        rows.append(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        print(f"{method} trial {number + 1}/{len(planned)}: {_outcome(row, config)}", flush=True)
    return rows[: len(planned)]


def _outcome(row: dict[str, Any], config: ConfigDict) -> str:
    fields = " ".join(f"{name}={value}" for name, value in row["overrides"].items()) or "defaults"
    if "failed" in row:
        return f"failed ({row['failed']})  {fields}"
    return (
        f"valid ndcg@{config.eval_k} {row['valid'][f'ndcg@{config.eval_k}']:.4f}  epoch "
        f"{row['best_epoch']} of {row['epochs']}  {row['seconds']:.1f} s  {fields}"
    )


# The runs.


def runs(study: Study, method: str, overrides: dict[str, Any], drop: int = 0) -> list[Run]:
    """Returns the runs of a method by seed; a closed form, which has no seed, has one."""
    closed_form = models.build(study.config(method, **overrides)).closed_form
    found = []
    for seed in range(1 if closed_form else study.seeds):
        fields = {**overrides, "seed": seed, **_drop(drop)}
        folder = study.workdir / method
        folder = (folder / f"drop_{drop}" if drop else folder) / f"seed_{seed}"
        line = command(
            "train", f"{study.file}:{method}", {**study.given, **fields}, f"--workdir={folder}"
        )
        found.append(Run(folder, study.config(method, **fields), line))
    return found


def finished(run: Run, dataset: Dataset) -> dict[str, Any] | None:
    """Returns the result of a run that is done, else None.

    Raises:
      InputError: it is the result of another config or other data.
    """
    path = run.workdir / "result.json"
    if not path.exists():
        return None
    try:
        result = read_result(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a run's result ({error}); take it away, and it is made again"
        ) from None
    differing = config_lib.differences(result["config"], run.config)
    if result["dataset"]["hash"] != dataset.meta["hash"]:
        differing.append("the data is other data")
    if differing:
        raise InputError(
            f"{run.workdir} holds a run of another config: {'; '.join(differing)}. Take another "
            "--workdir, or take that folder away"
        )
    return result if result["config"]["epochs"] == run.config.epochs else None


def train(
    study: Study, method: str, trials: list[dict[str, Any]], dataset: Dataset, drop: int
) -> None:
    """Trains the config of the best trial with every seed, and tests each run once.

    Raises:
      InputError: as ``fit.fit``.
    """
    best = search.best_trial(trials, study.config(method).eval_k)
    if best is None:
        return
    for run in runs(study, method, trials[best]["overrides"], drop):
        if finished(run, dataset) is None:
            print(run.command, flush=True)
            result = fit(run.config, run.workdir, dataset=dataset, quiet=True)
            name = f"ndcg@{run.config.eval_k}"
            print(
                f"{method} {'/'.join(run.workdir.relative_to(study.workdir / method).parts)}: "
                f"valid {name} {result['valid'][name]:.4f}  epoch {result['best_epoch']} of "
                f"{result['epochs']}  {result['seconds']:.1f} s",
                flush=True,
            )
        write_text(run.workdir / "command.txt", run.command + "\n")
        if not study.keep_checkpoints:
            shutil.rmtree(run.workdir / "checkpoints", ignore_errors=True)


def collect(study: Study, method: str, datasets: dict[int, Dataset]) -> tables.Method | None:
    """Reads the trials and runs of a method, None if they are not all done.

    Args:
      study: the table.
      method: the method.
      datasets: the data by number of interactions dropped.

    Returns:
      What the tables need, without those numbers of dropped interactions whose runs are not done.

    Raises:
      InputError: trials or runs are of another config or other data.
    """
    trials = read_trials(study, method, datasets[0])[: study.trials]
    if len(trials) < len(search.trials(method, study.trials)):
        return None
    best = search.best_trial(trials, study.config(method).eval_k)
    done = tables.Method(trials, best, {})
    if best is not None:
        for drop, dataset in datasets.items():
            planned = runs(study, method, trials[best]["overrides"], drop)
            results = [finished(run, dataset) for run in planned]
            if all(results):
                ndcg = np.mean([_per_user(run, dataset) for run in planned], axis=0)
                done.runs[drop] = tables.Runs(results, ndcg, [run.command for run in planned])
        if 0 not in done.runs:
            return None
    return done


def _per_user(run: Run, dataset: Dataset) -> np.ndarray:
    """Test NDCG of each test user."""
    path = run.workdir / "ranks.npz"
    try:
        users, ranks = read_ranks(path, "test")
        if not np.array_equal(users, dataset.test.users):
            raise ValueError("it is not of the data's test users")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as the ranks of this study's data ({error}); take "
            f"{run.workdir} away, and it is made again"
        ) from None
    return metrics.ndcg(ranks.above, ranks.tied, k=run.config.eval_k)
