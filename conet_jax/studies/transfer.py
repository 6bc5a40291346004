"""Does a source help a target? Searches, trains and compares within a budget of time.

What stands in the workdir is all there is to go on from: ``METHOD/results`` and ``METHOD/seed_S``
as ``table2`` has them, ``METHOD/defaults`` (the run of the first trial, where another was better),
``recipe_other/seed_S`` (the control: the recipe trained with the source of another user),
``plan.json`` (what was decided by the clock: numbers of trials and seeds) and ``clock.json``
(seconds of all calls). Killed at any moment, the same call goes on and, where the
budget does not end it, comes to the same report but for times.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import models
from conet_jax.data.load import check_users, load_dataset
from conet_jax.data.types import Dataset, UserItems
from conet_jax.errors import InputError
from conet_jax.files import make_folder, make_report_folder, write_json
from conet_jax.run import lock
from conet_jax.run.tune import searching_once
from conet_jax.run.workdir import stored_config
from conet_jax.studies import full_run, runner, table2, verdict
from conet_jax.studies.clock import Clock, stored
from conet_jax.studies.evidence import (
    ALONE,
    CONTROL,
    JOINED,
    RECIPE,
    Runs,
    baseline_of,
    compare,
    cut,
    ndcg_of,
)
from conet_jax.studies.runner import Record

METHODS = (RECIPE, *ALONE[1:], JOINED, "lasso", ALONE[0])  # in the order of their work
LATE = ("lasso",)  # of no weight in the verdict: more than one seed only after all others
MAX_TRIALS, MAX_SEEDS = 8, 10
_SEARCH_SHARE = 0.45  # of the budget, at most, before the runs that are compared
_LAST_SHARE = 0.92  # of the budget after which no run is begun: the report takes the rest


class Question(NamedTuple):
    """What is asked.

    Attributes:
      file: config file, configs/NAME.py.
      get_config: its function of that name.
      given: config fields of the command line by dotted name, ``data.dir`` among them.
      workdir: folder of all that is written.
      names: of the domains, for people: {"target": "books", "source": "movies"}.
      budget: seconds of all calls together.
      show_names: whether users are shown by their raw ids.
    """

    file: str
    get_config: Callable[[str], ConfigDict]
    given: dict[str, Any]
    workdir: Path
    names: dict[str, str]
    budget: float
    show_names: bool = False

    def study(self, *, trials: int = 1, seeds: int = 1) -> table2.Study:
        """Returns the ``table2.Study`` that does the work."""
        return table2.Study(
            self.file, self.get_config, self.given, self.workdir, seeds=seeds, trials=trials
        )


def other_source(dataset: Dataset) -> Dataset:
    """Returns the data with each shared user's source interactions given to another.

    All that the source tells but for whose it is stays as it was. No user keeps their own, where
    there are two or more. Has a hash of its own.
    """
    shared, source = dataset.num_shared, dataset.source
    order = np.random.default_rng(0).permutation(shared)
    giver = np.arange(dataset.num_users)
    giver[order] = np.roll(order, 1)
    degrees = np.diff(source.indptr)[giver]
    indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(source.indptr.dtype)
    places = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - source.indptr[giver], degrees)
    weights = None if source.weights is None else source.weights[places]
    swapped = UserItems(indptr, source.indices[places], source.num_items, weights)
    digest = hashlib.sha256(f"{dataset.meta['hash']} other source".encode()).hexdigest()
    return dataset._replace(source=swapped, meta=dataset.meta | {"hash": digest})


class Work:
    """The study of a question: its data, its clock, and what its plan.json has decided.

    Args:
      question: what is asked.
      dataset: its data.
    """

    def __init__(self, question: Question, dataset: Dataset) -> None:
        self.question, self.dataset = question, dataset
        self.clock = Clock(question.workdir / "clock.json", question.budget)
        self.other = other_source(dataset)
        self.failures: dict[str, str] = {}
        self._records: dict[str, list[Record]] = {}
        self._plan = question.workdir / "plan.json"
        self.trials, self.searched, self.ended_at = 1, False, 0.0
        if self._plan.exists():
            self.trials = stored(self._plan, "trials", (int,))
            self.searched = stored(self._plan, "searched", (bool,))
            self.ended_at = stored(self._plan, "ended_at", (int, float))

    def _decide(self, **decided: Any) -> None:
        for name, value in decided.items():
            setattr(self, name, value)
        write_json(
            self._plan,
            {"trials": self.trials, "searched": self.searched, "ended_at": self.ended_at},
        )

    def tune(self) -> None:
        """Searches every method with equally many trials: 1, 2, 4, 8, as the budget allows.

        The first trial is a run of seed 0, so that a budget for no more trains nothing twice.
        """
        for method in METHODS:
            self.clock.say(f"{method}: seed 0, by its defaults")
            make_folder(self.question.workdir / method)
            table2.try_defaults(self.question.study(), method, self.dataset)
            self.clock.keep()
        while True:
            study = self.question.study(trials=self.trials)
            cost = 0.0
            for method in METHODS:
                if self.trials > 1:
                    self.clock.say(f"{method}: {self.trials} of at most {MAX_TRIALS} trials")
                try:
                    self._records[method] = table2.tune(study, method, self.dataset)
                except InputError as error:  # more than the memory, mostly
                    self._records[method] = [{"failed": str(error)}]
                    self.clock.say(f"{method} is left out: {error}")
                cost += float(np.mean([r.get("seconds", 0.0) for r in self._records[method]]))
                self.clock.keep()
            # Twice as many trials are as many more.
            more = self.clock.fits(self.trials * cost, _SEARCH_SHARE)
            if self.searched or self.trials >= MAX_TRIALS or not more:
                self._decide(searched=True)
                break
            self._decide(trials=2 * self.trials)
        for method in METHODS:
            self._set_defaults_aside(method)

    def _set_defaults_aside(self, method: str) -> None:
        """Moves the run of the defaults, done or not, to METHOD/defaults if another is chosen."""
        (run,) = table2.runs(self.question.study(), method, {}, self.dataset)
        folder = run.path.parent
        if not self.fields(method) or not (folder / "config.json").exists():
            return
        if not config_lib.differences(stored_config(folder)[0], run.config):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            os.replace(folder, folder.with_name("defaults"))

    def train(self) -> dict[str, Runs]:
        """Trains the chosen configs, a seed at a time, until it is settled or the budget ends."""
        seeds = 0
        done: dict[str, Runs] = {}
        first = [name for name in (*METHODS, CONTROL) if name not in LATE]
        while seeds < MAX_SEEDS and not (seeds >= verdict.SEEDS and self._settled(done)):
            names = [RECIPE, CONTROL, baseline_of(done)] if seeds >= verdict.SEEDS else first
            if seeds and not self._has_time(names, seeds, done):
                break
            seeds += 1
            for name in [*METHODS, CONTROL] if seeds == 1 else names:
                self._train_one(name, seeds)
            done = {n: found for n in (*METHODS, CONTROL) if (found := self.runs(n, seeds))}
            if RECIPE not in done:
                raise InputError(f"the recipe could not be trained: {self.failures[RECIPE]}")
        for name in [name for name in LATE if name in done]:
            for more in range(1, min(verdict.SEEDS, MAX_SEEDS)):
                if self._has_time([name], more, done):
                    self._train_one(name, more + 1)
            done[name] = self.runs(name, verdict.SEEDS) or done[name]
        return done

    def _has_time(self, names: Sequence[str], seeds: int, done: dict[str, Runs]) -> bool:
        """Whether one more seed of some methods is there already, or fits into the budget."""
        if self._is_made(names, seeds, done):
            return True
        cost = sum(done[name].results[-1]["seconds"] for name in names if name in done)
        if self.ended_at < self.clock.budget and self.clock.fits(cost, _LAST_SHARE):
            return True
        self._decide(ended_at=self.clock.budget)
        return False

    def _settled(self, done: dict[str, Runs]) -> bool:
        if CONTROL not in done:
            return True  # it failed, and no more seeds are of help
        main = compare(done[RECIPE], done[baseline_of(done)])
        return main.narrow and compare(done[RECIPE], done[CONTROL]).narrow

    def _is_made(self, names: list[str], seeds: int, done: dict[str, Runs]) -> bool:
        """Whether the runs of one more seed stand there already."""
        return all(
            len(self._planned(name, seeds + 1)) <= seeds
            or full_run.read(self._planned(name, seeds + 1)[-1]) is not None
            for name in names
            if name in done
        )

    def _train_one(self, name: str, seeds: int) -> None:
        planned = [] if name in self.failures else self._planned(name, seeds)
        if not planned or full_run.read(planned[-1]) is not None:
            return
        self.clock.say(f"{name}: seed {seeds - 1}")
        try:
            if name == CONTROL:
                datasets = runner.Datasets(self.other)
                folder = self.question.workdir / CONTROL
                runner.run(planned, folder, datasets, full_run.FULL).complete()
            else:
                study = self.question.study(trials=self.trials, seeds=seeds)
                table2.train(study, name, self.fields(name), self.dataset)
        except InputError as error:  # diverged, or more than the memory
            self.failures[name] = str(error)
            self.clock.say(f"{name} is left out: {error}")
        for run in planned:  # those of the recipe are read again, and the first is for use
            if name != RECIPE and run.path.parent.name != "seed_0":
                shutil.rmtree(run.path.parent / "checkpoints", ignore_errors=True)
        self.clock.keep()

    def _planned(self, name: str, seeds: int) -> list[runner.Run]:
        method = RECIPE if name == CONTROL else name
        fields = self.fields(method)
        if fields is None:
            self.failures[name] = self._records[method][0].get("failed", "every trial failed")
            return []
        study = self.question.study(trials=self.trials, seeds=seeds)
        if name != CONTROL:
            return table2.runs(study, method, fields, self.dataset)
        folder = self.question.workdir / CONTROL
        return [
            full_run.plan(
                study.config(RECIPE, **fields, seed=seed),
                self.other,
                folder / f"seed_{seed}",
                "the recipe, trained with the source of another user",
            )
            for seed in range(seeds)
        ]

    def fields(self, method: str) -> dict[str, Any] | None:
        """Returns the config fields of a method's best trial, None if all failed."""
        study = self.question.study(trials=self.trials)
        return table2.chosen(study, method, self._records[method])

    def runs(self, name: str, seeds: int) -> Runs | None:
        """Reads the finished runs of a method's first seeds, None if there is none."""
        if name in self.failures:
            return None
        planned = self._planned(name, seeds)
        results = [full_run.read(run) for run in planned]
        results = results[: results.index(None)] if None in results else results
        if not results:
            return None
        k = cut(results[0]["test_warm"])
        splits = [
            split for split in ("test_warm", "test", "test_target_only_warm") if split in results[0]
        ]
        ndcg = {
            split: np.stack([ndcg_of(run.path.with_name("ranks.npz"), split, k) for run in planned])
            for planned in [planned[: len(results)]]
            for split in splits
        }
        method = RECIPE if name == CONTROL else name
        config = planned[0].config
        return Runs(
            results,
            ndcg,
            bool(models.build(config).closed_form),
            [run.path.parent for run in planned[: len(results)]],
            planned[0].command,
            self.fields(method) or {},
            len(self._records[method]),
        )


def claim(question: Question, dataset: Dataset) -> None:
    """Makes the workdir, or checks that it is of this question.

    Raises:
      InputError: it is of other data or another config.
    """
    path = question.workdir / "question.json"
    # The data's folder, too: runs are read again, each with the data where it was.
    given = {name: str(value) for name, value in sorted(question.given.items())}
    asked = {"data": dataset.meta["hash"], "config": question.file, "given": given}
    if path.exists():
        for name, value in asked.items():
            there = stored(path, name, (str, dict))
            if there != value:
                raise InputError(
                    f"{question.workdir} holds a study of another question: its {name} is {there} "
                    f"there and {value} here. Take another --workdir"
                )
        return
    make_report_folder(question.workdir)
    write_json(path, asked)


@searching_once()
def run(
    question: Question, report: Callable[["Work", dict[str, Runs]], dict[str, Any]]
) -> dict[str, Any]:
    """Does what is left to do and returns the report.

    Args:
      question: what is asked.
      report: makes the contents of report.json from the finished work.

    Raises:
      InputError: config or data cannot be used, the workdir is of another question, or the recipe
        or all that it is compared with failed.
    """
    configs = {method: question.study().config(method) for method in METHODS}  # or it says why not
    dataset = load_dataset(configs[RECIPE])
    for split in ("valid", "test"):
        check_users(dataset, split)
    claim(question, dataset)
    with lock.owned(question.workdir):
        work = Work(question, dataset)
        work.tune()
        done = work.train()
        work.clock.say("report: what carries the gain, and examples")
        found = report(work, done)
        work.clock.keep()
    return found


def prepare(workdir: Path, **options: Any) -> None:
    """Prepares the data of two files in WORKDIR/data, if that is not done.

    Args:
      workdir: of the study.
      **options: ``target`` and ``source``, the files, and others of ``data.prepare.prepare``.

    Raises:
      InputError: the data there are of other files or options, or as ``data.prepare.prepare``.
    """
    from conet_jax.data import prepare, store

    path = workdir / "prepared.json"
    if path.exists():
        for name, value in options.items():
            there = stored(path, name, (type(value),))
            if there != value:
                raise InputError(
                    f"{workdir} holds a study of other data: --{name}={there} there and {value} "
                    "here. Take another --workdir"
                )
        if (workdir / "data" / "dataset.json").exists():
            return
    make_report_folder(workdir)
    store.check_writable(workdir / "data")
    prepare.prepare(**options, out=workdir / "data")
    write_json(path, options)
