"""Every method of a table on one data set: searched, then trained with several seeds, then tested.

``runner`` does both, and what stands in the workdir is all there is to go on from:
``METHOD/results``, a record a trial, and ``METHOD/seed_S`` (with less data
``METHOD/drop_K/seed_S``), the runs of the best trial's config, as launch/train.py makes them. The
same call again goes on where it was; calls with other methods may share the workdir, also at the
same time.
"""

import contextlib
import difflib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import models
from conet_jax.data.load import check_users, load_dataset
from conet_jax.data.types import Dataset, warm_users
from conet_jax.errors import InputError
from conet_jax.files import make_folder, make_report_folder, write_text
from conet_jax.published import Figure
from conet_jax.run import lock
from conet_jax.run.tune import searching_once
from conet_jax.studies import full_run, markdown, runner, search, tables
from conet_jax.studies.points import command, described
from conet_jax.studies.runner import Record

# A longer run is the same run gone on, but a longer trial may be another choice.
_FREE = tuple(name for name in config_lib.FREE_FIELDS if name not in ("epochs", "patience"))


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
      published: figures of others (``published.Figure``) for rows of their own.
    """

    file: str
    get_config: Callable[[str], ConfigDict]
    given: dict[str, Any]
    workdir: Path
    seeds: int = 5
    trials: int = 8
    keep_checkpoints: bool = True
    published: tuple[Figure, ...] = ()

    def config(self, method: str, **fields: Any) -> ConfigDict:
        """Returns the config of a method under fields by dotted name."""
        config = self.get_config(method)
        config.update_from_flattened_dict({**self.given, **fields})
        config_lib.validate(config)
        return config

    def command(self, methods: Sequence[str]) -> str:
        """Returns the command that makes the table of these methods."""
        last = [f"--workdir={self.workdir}", f"--seeds={self.seeds}", f"--trials={self.trials}"]
        if set(methods) != set(search.DEFAULT_METHODS):
            last.append(f"--methods={','.join(methods)}")
        return command("table2", self.file, self.given, *last)


@searching_once()
def run(
    study: Study,
    methods: Sequence[str] = search.DEFAULT_METHODS,
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
                if study.trials == 1:  # nothing is to be chosen
                    try_defaults(study, method, datasets[0])
                fields = chosen(study, method, tune(study, method, datasets[0]))
                for drop in (0, *(drops if method in drop_methods else ())):
                    if fields is not None:
                        train(study, method, fields, datasets[drop], drop)
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
        k=study.config("recipe").eval_k[0],
        command=study.command(list(done)),
        published=() if study.config("recipe").data.get("cold", 0) else study.published,
    )
    text = markdown.page(report)
    _publish(study.workdir / "table2.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _publish(study.workdir / "table2.md", text)
    print(text)
    if failures:
        raise InputError("; ".join(failures))
    return report


def _check(study: Study, methods: list[str], drops: Sequence[int]) -> dict[int, Dataset]:
    """Says what is wrong before the long part; returns the data by number dropped from a user."""
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
        check_trials(study, method, datasets[0])
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


def trials(study: Study, method: str, dataset: Dataset) -> list[runner.Run]:
    """Returns the trials of a method; two of the same config are one run."""
    return [
        runner.plan(study.config(method, **fields), dataset, study.workdir / method)
        for fields in search.trials(method, study.trials)
    ]


def check_trials(study: Study, method: str, dataset: Dataset) -> None:
    """Checks that the trials which a method has are of this study, or of more trials of it.

    Raises:
      InputError: a record cannot be read, or is of other data or another config.
    """
    found = sorted((study.workdir / method / "results").glob("*.json"))
    planned = {run.path for run in trials(study, method, dataset)} if found else ()
    searched = (*_FREE, *search.SPACES[method])
    for path in found:
        record = runner.read(runner.Run(study.config(method), "", "", path))
        if path in planned:
            continue
        try:
            differing = config_lib.differences(
                record["config"], study.config(method), free=searched
            )
            if record["dataset_hash"] != dataset.meta["hash"]:
                hashes = record["dataset_hash"], dataset.meta["hash"]
                differing = ["the data's hash is {:.12}… there and {:.12}… here".format(*hashes)]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a trial ({error!r}); take it away, and it is made again"
            ) from None
        if differing:
            raise InputError(
                f"the trial in {path} is of another search: {'; '.join(differing)}. Take another "
                "--workdir, or the same config and data"
            )


def tune(study: Study, method: str, dataset: Dataset) -> list[Record]:
    """Runs the trials of a method that are not done yet.

    Returns:
      The record of each trial; of one that failed ``failed``, the reason, in place of ``valid``.
    """
    planned = trials(study, method, dataset)
    fields = search.trials(method, study.trials)
    numbers = {run.key: number for number, run in reversed(list(enumerate(planned)))}

    def done(run: runner.Run, record: Record) -> None:
        number = numbers[run.key]
        outcome = _outcome(record, run.config.eval_k[0])
        place = f"{method} trial {number + 1}/{len(planned)}"
        print(f"{place}: {outcome}  {described(fields[number])}", flush=True)

    outcome = runner.run(planned, study.workdir / method, runner.Datasets(dataset), done=done)
    records = outcome.complete()
    return [records[run.key] for run in planned]


def try_defaults(study: Study, method: str, dataset: Dataset) -> None:
    """Makes the first trial, of a method's defaults, if it is not done: by its run of seed 0.

    With one trial, nothing is trained twice so. A run that fails is no trial: ``tune`` makes it.
    """
    study = study._replace(seeds=1, trials=1)
    (trial,) = trials(study, method, dataset)
    if runner.read(trial) is not None:
        return
    since = time.monotonic()
    with contextlib.suppress(InputError):
        train(study, method, {}, dataset)
        (run,) = runs(study, method, {}, dataset)
        result = full_run.read(run)
        record = {name: result[name] for name in (*search.PARTS, "best_epoch", "epochs")}
        # The seconds of a result are those of its epochs, without what came before them.
        runner.write(trial, {**record, "seconds": round(time.monotonic() - since, 3)})


def _outcome(record: Record, k: int) -> str:
    if "failed" in record:
        return f"failed ({record['failed']})"
    return (
        f"warm valid ndcg@{k} {search.value_of(record, k):.4f}  epoch {record['best_epoch']} of "
        f"{record['epochs']}  {record['seconds']:.1f} s"
    )


# The runs.


def runs(
    study: Study, method: str, fields: dict[str, Any], dataset: Dataset, drop: int = 0
) -> list[runner.Run]:
    """Returns the runs of a method by seed; a closed form, which has no seed, has one."""
    closed_form = models.build(study.config(method, **fields)).closed_form
    found = []
    for seed in range(1 if closed_form else study.seeds):
        changed = {**fields, "seed": seed, **_drop(drop)}
        folder = study.workdir / method
        folder = (folder / f"drop_{drop}" if drop else folder) / f"seed_{seed}"
        file = f"{study.file}:{method}"
        line = command("train", file, {**study.given, **changed}, f"--workdir={folder}")
        found.append(full_run.plan(study.config(method, **changed), dataset, folder, line))
    return found


def train(
    study: Study, method: str, fields: dict[str, Any], dataset: Dataset, drop: int = 0
) -> None:
    """Trains a method with every seed, and tests each run once.

    Args:
      study: the table.
      method: the method.
      fields: config fields of the trial that was chosen.
      dataset: the data.
      drop: number of training interactions that it lacks of each user.

    Raises:
      InputError: as ``fit.fit``.
    """
    planned = runs(study, method, fields, dataset, drop)

    def done(run: runner.Run, result: Record) -> None:
        place = "/".join(run.path.parent.relative_to(study.workdir / method).parts)
        print(f"{method} {place}: {_outcome(result, run.config.eval_k[0])}", flush=True)

    folder = study.workdir / method
    runner.run(planned, folder, runner.Datasets(dataset), full_run.FULL, done=done).complete()
    for run in planned:
        write_text(run.path.parent / "command.txt", run.command + "\n")
        if not study.keep_checkpoints:
            shutil.rmtree(run.path.parent / "checkpoints", ignore_errors=True)


def chosen(study: Study, method: str, records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the config fields of a method's best trial, None if all failed."""
    best = search.best_trial(records, study.config(method).eval_k[0])
    return None if best is None else search.trials(method, study.trials)[best]


def collect(study: Study, method: str, datasets: dict[int, Dataset]) -> tables.Method | None:
    """Reads the trials and runs of a method, None if they are not all done.

    Args:
      study: the table.
      method: the method.
      datasets: the data by number of interactions dropped.

    Returns:
      What the tables need, without those numbers of dropped interactions whose runs are not done.

    Raises:
      InputError: runs are of another config or other data.
    """
    if not (study.workdir / method / "results").exists():
        return None
    records = [runner.read(run) for run in trials(study, method, datasets[0])]
    if None in records:
        return None
    best = search.best_trial(records, study.config(method).eval_k[0])
    fields = search.trials(method, study.trials)
    done = tables.Method(records, fields, best, {})
    if best is not None:
        users = warm_users(*datasets.values())
        for drop, dataset in datasets.items():
            planned = runs(study, method, fields[best], dataset, drop)
            results = [full_run.read(run) for run in planned]
            if all(results):
                ndcg = np.mean([full_run.test_ndcg(run, dataset, users) for run in planned], axis=0)
                done.runs[drop] = tables.Runs(results, ndcg, [run.command for run in planned])
        if 0 not in done.runs:
            return None
    return done
