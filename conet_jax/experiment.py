"""A run: train, validate each epoch, stop early, test once on the best, and write it all down.

``fit`` is the one stateful function of the package. What it leaves in the workdir:
``config.json``, ``metrics.jsonl`` (a row an epoch), ``checkpoints/``, ``ranks.npz`` (of every
held-out item at the end), ``result.json``, ``result.md``. The same call again goes on from the
latest checkpoint and ends with the same ``result.json``, bit for bit in every field but
``seconds``.
"""

import ctypes
import hashlib
import inspect
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import conet_jax
from conet_jax import config as config_lib
from conet_jax import (
    evaluation,
    files,
    footprint,
    interruption,
    models,
    ownership,
    parallel,
    sampling,
    training,
)
from conet_jax.checkpoints import Checkpoints
from conet_jax.data.dataset import Dataset
from conet_jax.errors import Diverged, InputError
from conet_jax.metric_writers import (
    Console,
    MetricsFile,
    TensorBoard,
    load_tensorboardx,
    make_folder,
    write_arrays,
    write_json,
    write_text,
)
from conet_jax.models import crossfit, ials
from conet_jax.models.base import Hyper, Model, Params, Sizes

CHUNK_STEPS = 512  # steps a call of the compiled program: bounds its memory, moves the bar
CHUNK_EXAMPLES = 1 << 22  # the same for large batches
ROLLBACK = 0.5  # factor on the learning rate of each, under config.on_nonfinite=rollback
MAX_ROLLBACKS = 5  # of a run: down to a thirty-second of the learning rate
FIRST_STEPS = 5  # of a run, whose losses are told one by one
LN2 = math.log(2.0)
_MAPPINGS_ALLOWED = Path("/proc/sys/vm/max_map_count")
DEAD_MARGIN = 1e-3  # nats; a tower that predicts 1/2 everywhere stays at ln 2
VERSIONED = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "polars")


State = training.TrainState | Params  # Params of a model that is not trained by gradients


class Task(NamedTuple):
    """A config made concrete on a data set: what every launcher needs to compute anything."""

    config: ConfigDict
    dataset: Dataset
    model: Model
    interactions: dict[str, sampling.Interactions]
    plan: sampling.Plan | None  # None for a model that is not trained by gradients
    settings: training.Settings
    hyper: Hyper
    key: jax.Array
    sweep: Callable[[Params], Params] | None  # an epoch of such a model
    mesh: jax.sharding.Mesh  # the devices, see parallel; one for such a model

    @property
    def sizes(self) -> Sizes:
        """Rows of the tables."""
        return _sizes(self.dataset)

    def init(self) -> State:
        """Returns the state before the first step, from the config's seed."""
        return self._state(self._start())

    def abstract_state(self) -> State:
        """Returns shapes and dtypes of the state, computing nothing."""
        return jax.eval_shape(lambda: self._state(self.model.init(self.key, self.sizes)))

    def params(self, state: State) -> Params:
        """Returns a copy of the parameters, every row brought to the current step."""
        if self.sweep is not None:
            return state
        return training.settled(state, self.hyper.learning_rate)

    def to_save(self, state: State) -> State:
        """Returns a state or parameters as they are saved, whatever the number of devices."""
        copies = self.model.copies
        return _with_tables(state, parallel.in_order(state.tables, mesh=self.mesh, copies=copies))

    def from_saved(self, saved: State) -> State:
        """Returns what ``to_save`` was given."""
        plain = self.abstract_state().tables
        num_rows = tuple((name, table.shape[0]) for name, table in plain.items())
        tables = parallel.interleaved(
            saved.tables, num_rows=num_rows, mesh=self.mesh, copies=self.model.copies
        )
        return _with_tables(saved, tables)

    def saved_like(self, abstract: State) -> State:
        """Returns shapes, dtypes and devices of ``to_save`` of plain arrays."""
        like = parallel.ordered_like(abstract, self.mesh, parallel.SAME)
        tables = parallel.ordered_like(
            abstract.tables, self.mesh, parallel.SPLIT, self.model.copies
        )
        return _with_tables(like, tables)

    def member(self, config: ConfigDict) -> "Task":
        """Returns this task under a config that differs in fields of ``Hyper`` and seed alone."""
        return self._replace(config=config, hyper=_hyper(config), key=jax.random.key(config.seed))

    def slower(self, rollbacks: int) -> "Task":
        """Returns this task with the learning rate in force after so many rollbacks."""
        if not rollbacks:
            return self
        rate = self.hyper.learning_rate * ROLLBACK**rollbacks
        return self._replace(hyper=self.hyper._replace(learning_rate=rate))

    def resumable(self, state: State) -> Any:
        """Returns what of the state a run must save to go on: nothing of a closed form."""
        return {"step": jnp.int32(1)} if self.model.closed_form else self.to_save(state)

    def resume(self, checkpoints: Checkpoints) -> tuple[State | None, dict[str, Any]]:
        """Returns the latest (state, progress); no state of a closed form, which is done."""
        if self.model.closed_form:
            return None, checkpoints.restore_latest(_CLOSED_FORM)[1]
        saved, progress = checkpoints.restore_latest(self.saved_like(self.abstract_state()))
        return self.from_saved(saved), progress

    def best(self, checkpoints: Checkpoints, epoch: int) -> Params:
        """Returns the parameters saved as best at ``epoch``."""
        abstract = jax.eval_shape(self.params, self.abstract_state())
        return self.from_saved(checkpoints.restore_best(epoch, self.saved_like(abstract)))

    def _state(self, params: Params) -> State:
        if self.sweep is not None:
            return params
        return training.init_state(self.model, params, self.settings)

    def _start(self) -> Params:
        """The parameters of ``Model.init``, or of a warm start."""
        config = self.config
        key = jax.random.fold_in(self.key, 0)
        params = training.init_params(self.model, key, self.sizes, self.mesh)
        if config.warm_start in ("ials", "crossfit"):
            joined = config.joined or "source" in self.model.domains
            options = models.options(ials, config)._replace(joined=joined)
            interactions = interactions_on(self.dataset, parallel.one_device())
            given = (interactions, self.sizes, options)
            common = {"sweeps": config.ials_sweeps, "seed": config.seed}
            if config.warm_start == "ials":
                fitted = ials.fit(*given, **common)
            else:
                fitted = crossfit.fit(
                    *given,
                    **common,
                    folds=config.folds,
                    fold_sweeps=config.fold_sweeps,
                    by_domain="source" in self.model.domains,
                )
            tables = {
                name: parallel.spread(
                    np.asarray(fitted[name], like.dtype), self.mesh, self.model.copies
                )
                for name, like in params.tables.items()
            }
            params = params._replace(tables=tables)
        if config.warm_start == "pretrain":
            tables = {**params.tables, "user": self._pretrain()}
            params = params._replace(tables=tables)
        return params

    def _pretrain(self) -> jax.Array:
        """User embeddings of an MLP trained on the source domain (footnote 10)."""
        config, data = self.config, {"target": self.interactions["source"]}
        mlp = models.MODELS["mlp"]
        model = mlp.build(models.options(mlp, config))
        sizes = Sizes(self.sizes.users, self.sizes.source_items, 0)
        params = training.init_params(model, jax.random.fold_in(self.key, 2), sizes, self.mesh)
        task = self._replace(
            model=model,
            interactions=data,
            plan=_plan(config, model, data),
            key=jax.random.fold_in(self.key, 3),
        )
        state = task._state(params)
        for epoch in range(1, config.pretrain_epochs + 1):
            state, _ = run_epoch(task, state, epoch)
        return task.params(state).tables["user"]

    @property
    def sampling_key(self) -> jax.Array:
        """Key of everything random in training."""
        return jax.random.fold_in(self.key, 1)


_CLOSED_FORM = {"step": jax.ShapeDtypeStruct((), np.int32)}


def _with_tables(values: State, tables: dict[str, Any]) -> State:
    if isinstance(values, Params):
        return values._replace(tables=tables)
    return values.replace(tables=tables)


def load_dataset(config: ConfigDict) -> Dataset:
    """Loads the prepared data of a config, or makes its synthetic data; less ``config.data.drop``.

    Raises:
      InputError: there is no prepared data; the message is the command that makes it.
    """
    dataset, count = _whole_dataset(config), config.data.get("drop", 0)
    return drop_interactions(dataset, count) if count else dataset


def drop_interactions(dataset: Dataset, count: int) -> Dataset:
    """Removes training interactions of the target at random, ``count`` from each user.

    At least one is left to a user who has any; what is held out stays as it is. Those that go with
    a smaller count go with a larger one, too.

    Args:
      dataset: the data.
      count: interactions to remove from each user.

    Returns:
      Data with a hash and counts of its own.
    """
    target = dataset.target
    degrees = np.diff(target.indptr)
    users = np.repeat(np.arange(dataset.num_users), degrees)
    shuffled = np.lexsort((np.random.default_rng(0).random(len(users)), users))
    gone = np.minimum(count, np.maximum(degrees - 1, 0))
    keep = np.ones(len(users), bool)
    keep[shuffled[np.arange(len(users)) - target.indptr[users] < gone[users]]] = False
    indptr = np.concatenate([[0], np.cumsum(degrees - gone)]).astype(target.indptr.dtype)
    target = target._replace(indptr=indptr, indices=target.indices[keep])
    counts = dict(dataset.meta["counts"])
    counts["target_interactions"] -= int(gone.sum())
    counts["target_density"] = counts["target_interactions"] / (
        dataset.num_users * target.num_items
    )
    digest = hashlib.sha256(f"{dataset.meta['hash']} drop {count}".encode()).hexdigest()
    return dataset._replace(target=target, meta=dataset.meta | {"counts": counts, "hash": digest})


def _whole_dataset(config: ConfigDict) -> Dataset:
    if "synthetic" in config.data:
        from conet_jax.data import synthetic

        given = config.data.synthetic.to_dict()
        known = dict(inspect.signature(synthetic.generate).parameters)
        known |= {"candidates": inspect.signature(synthetic.dataset).parameters["candidates"]}
        for name in [*given, *known]:
            kind = known[name].annotation if name in known else None
            if name in given or known[name].default is inspect.Parameter.empty:
                if type(given.get(name)) not in ((int, float) if kind is float else (kind,)):
                    raise InputError(
                        f"config.data.synthetic.{name} is {given.get(name)!r}: expected "
                        + (f"a number, {kind.__name__}" if kind else f"one of {', '.join(known)}")
                    )
        return synthetic.dataset(**given)[0]
    from conet_jax.data import store

    directory = Path(config.data.dir)
    if not (directory / "dataset.json").exists():
        raise InputError(
            f"no prepared data in {directory}; make it with: "
            f"{config.data.get('prepare') or _PREPARE} --out={directory}"
            " (or name another folder by --config.data.dir)"
        )
    return store.load(directory)


_PREPARE = "python launch/prepare.py --target=FILE --source=FILE"


def make_task(config: ConfigDict, dataset: Dataset) -> Task:
    """Checks a config against a data set and builds model, interactions and plan.

    Does not look at the test split: a search must do without it.

    Raises:
      InputError: the config is invalid, or the data set has no validation users.
    """
    config_lib.validate(config)
    check_users(dataset, "valid")
    _forget_programs()
    model = models.build(config)
    mesh = parallel.mesh(config.devices)
    if model.sweeper is not None:
        if jax.process_count() > 1:
            raise InputError(
                f"config.model is {config.model!r}, which is fitted on one device: expected one "
                "process"
            )
        mesh = parallel.one_device()
    interactions = interactions_on(dataset, mesh)
    plan, sweep = None, None
    if model.sweeper is not None:
        sweep = model.sweeper(interactions, _sizes(dataset))
    else:
        try:
            plan = _plan(config, model, interactions)
        except ValueError as error:
            raise InputError(str(error)) from None
    settings = training.Settings(
        config.reduction, config.l1_method, float(config.clip_norm), float(config.loss_scale)
    )
    hyper, key = parallel.put((_hyper(config), jax.random.key(config.seed)), mesh, parallel.SAME)
    return Task(config, dataset, model, interactions, plan, settings, hyper, key, sweep, mesh)


def interactions_on(dataset: Dataset, mesh: jax.sharding.Mesh) -> dict[str, sampling.Interactions]:
    """Puts the training interactions of both domains on devices."""
    return {
        domain: sampling.to_device(data.indptr, data.indices, data.num_items, mesh)
        for domain, data in (("target", dataset.target), ("source", dataset.source))
    }


def _hyper(config: ConfigDict) -> Hyper:
    return Hyper(*(jnp.asarray(float(config[name])) for name in Hyper._fields))


def _sizes(dataset: Dataset) -> Sizes:
    return Sizes(dataset.num_users, dataset.target.num_items, dataset.source.num_items)


def check_users(dataset: Dataset, split: str) -> None:
    """Raises ``InputError`` where a split, "valid" or "test", has no users."""
    if not len(getattr(dataset, split).users):
        raise InputError(
            f"the data set has no {split} users: a user needs three target items to give a "
            "test and a validation item; prepare it from more data or a smaller core"
        )


def _plan(config: ConfigDict, model: Model, interactions: dict[str, Any]) -> sampling.Plan:
    return sampling.plan_epoch(
        interactions,
        domains=model.domains,
        pairing=model.pairing,
        negatives=config.negatives,
        batch_size=config.batch_size,
        surplus=config.surplus,
        profile_length=config.profile_length,
        folds=config.folds if config.warm_start == "crossfit" else 0,
    )


def fit(
    config: ConfigDict,
    workdir: str | Path,
    *,
    dataset: Dataset | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
) -> dict:
    """Trains, or goes on training, and returns the contents of ``result.json``.

    Args:
      config: see ``config.default_config``.
      workdir: folder of the run, made if absent.
      dataset: the data; by default that of ``load_dataset``.
      quiet: print nothing.
      tensorboard: write event files to WORKDIR/tensorboard, too.

    Returns:
      The result.

    Raises:
      InputError: bad config or data, a workdir of another run or in use by another process, a loss
        that is not finite.
      OSError: the disk is full, or the workdir has gone; what was saved before is as it was.
      parallel.PeerLost: another process of the run died.
      interruption.Interrupted: a signal asked to stop, and the run is saved.
    """
    workdir = Path(workdir)
    if tensorboard:
        load_tensorboardx()  # or say at once that it is not there
    if dataset is None:
        config_lib.validate(config)
        dataset = load_dataset(config)
    task = make_task(config, dataset)
    check_users(dataset, "test")
    parallel.together(lambda: _make_workdir(workdir))
    with ownership.owned(workdir):
        parallel.together(lambda: _claim(workdir, config, dataset))
        checkpoints = Checkpoints(workdir / "checkpoints")
        out = io.StringIO() if quiet or not parallel.is_main() else None
        try:
            with parallel.watch_peers():
                return _fit(task, workdir, checkpoints, out, tensorboard)
        finally:
            # Closing waits for all processes.
            if not isinstance(sys.exception(), parallel.PeerLost):
                checkpoints.close()


def _make_workdir(workdir: Path) -> None:
    """Makes the workdir, or checks that it is empty or a run's."""
    if workdir.is_dir() and not (workdir / "config.json").exists():
        ours = (".config.json.tmp", ownership.LOCK)  # of a run that was killed at once
        if not all(path.name.startswith(ours) for path in workdir.iterdir()):
            raise InputError(f"{workdir} is not empty and holds no run; take another --workdir")
    make_folder(workdir)


def _claim(workdir: Path, config: ConfigDict, dataset: Dataset) -> None:
    """Writes config.json, or checks that the workdir is of this config and data."""
    path = workdir / "config.json"
    digest = dataset.meta["hash"]
    if path.exists():
        stored, stored_digest = stored_config(workdir)
        differing = config_lib.differences(stored, config)
        # A run that never came to its first checkpoint has nothing to lose.
        started = any((workdir / "checkpoints" / "latest").glob("[0-9]*"))
        if differing and started:
            raise InputError(
                f"{workdir} holds a run of another config: {'; '.join(differing)}. Take another "
                "--workdir, or the same fields"
            )
        if stored_digest != digest and started:
            raise InputError(
                f"{workdir} holds a run on other data: its hash is {stored_digest[:12]}…, that of "
                f"the data here {digest[:12]}…. Take another --workdir"
            )
        return
    try:
        _write_config(workdir, config, dataset)
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir}: {error.strerror}; take another --workdir"
        ) from None


def _write_config(workdir: Path, config: ConfigDict, dataset: Dataset) -> None:
    stored = {**json.loads(config.to_json()), "dataset_hash": dataset.meta["hash"]}
    write_json(workdir / "config.json", stored)


def _train(workdir: str | Path) -> str:
    return f"train it: python launch/train.py --config=configs/NAME.py --workdir={workdir}"


def stored_config(workdir: str | Path) -> tuple[dict[str, Any], str]:
    """Returns (config, hash of the data) of a run.

    Raises:
      InputError: the folder holds no run, or its config.json cannot be read.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise InputError(f"{workdir} holds no run (no config.json); {_train(workdir)}")
    try:
        stored = files.read_json(path)
        digest = stored.pop("dataset_hash")
        if not isinstance(digest, str):
            raise TypeError("dataset_hash is of another type")
        stored = config_lib.completed(stored)
        config_lib.validate(ConfigDict(stored))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a run's config ({error}); take another --workdir"
        ) from None
    return stored, digest


class Progress(NamedTuple):
    """What a run must know beside its state to go on."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_value: float = -math.inf  # validation NDCG
    seconds: float = 0.0
    rollbacks: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns what ``from_json`` reads."""
        return {**self._asdict(), "best_value": self.best_value if self.best_epoch else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Progress":
        """Returns the progress that was stored."""
        best = -math.inf if value["best_value"] is None else value["best_value"]
        return cls(**{**value, "best_value": best})

    def stopped(self, task: Task) -> bool:
        """Whether the run is over: its last epoch, or patience at an end."""
        waited = self.epoch - self.best_epoch
        last = 1 if task.model.closed_form else task.config.epochs
        return self.epoch >= last or waited >= task.config.patience


class Part(NamedTuple):
    """What an epoch that a signal cut short must know beside its state to go on.

    Attributes:
      done: steps done.
      sums: {name: f64[done]} sums and counts of ``Model.loss``.
      seconds: of training.
    """

    done: int = 0
    sums: dict[str, np.ndarray] = {}
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns what ``from_json`` reads."""
        return {**self._asdict(), "sums": {name: x.tolist() for name, x in self.sums.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        """Returns the part that was stored, bit for bit."""
        sums = {name: np.array(x, np.float64) for name, x in value["sums"].items()}
        return cls(**{**value, "sums": sums})


class CutShort(Exception):
    """A signal has asked training to stop in the midst of an epoch.

    Without a state the last checkpoint is what to go on from.
    """

    def __init__(self, signum: int, state: Any = None, part: Part | None = None) -> None:
        self.signum, self.state, self.part = signum, state, part or Part()


def _stored(value: dict[str, Any]) -> tuple[Progress, Part | None]:
    """Returns what stands beside the state in a checkpoint."""
    part = Part.from_json(value["part"]) if "part" in value else None
    return Progress.from_json({k: v for k, v in value.items() if k != "part"}), part


class Epoch(NamedTuple):
    """The end of an epoch.

    Attributes:
      progress: of the run, this epoch included.
      state: state after; the next epoch takes its buffers.
      params: settled parameters.
      row: row of metrics.jsonl.
      better: whether its validation NDCG is the best so far.
      warnings: of dead towers.
    """

    progress: Progress
    state: State
    params: Params
    row: dict[str, Any]
    better: bool
    warnings: list[str]


def train(
    task: Task,
    state: State,
    progress: Progress | None = None,
    console: Console | None = None,
    part: Part | None = None,
) -> Iterator[Epoch]:
    """Trains and validates epoch by epoch until the last, or until patience runs out.

    Args:
      task: the run.
      state: state to go on from; its buffers are donated.
      progress: of the run so far; by default none.
      console: told of every chunk.
      part: of the first epoch to come, that is done already.

    Yields:
      An ``Epoch`` each. Test items are not looked at.

    Raises:
      InputError: the run has diverged.
      CutShort: see ``run_epoch``.
    """
    progress = progress or Progress()
    started = time.perf_counter() - progress.seconds - (part.seconds if part else 0.0)
    while not progress.stopped(task):
        state, row = run_epoch(task, state, progress.epoch + 1, console, part)
        part = None
        end = end_epoch(task, state, row, progress, started)
        progress = end.progress
        yield end
        del end


def end_epoch(
    task: Task, state: State, row: dict[str, Any], progress: Progress, started: float
) -> Epoch:
    """Validates the state after an epoch and keeps count of the best.

    Args:
      task: the run.
      state: state after the epoch.
      row: of ``run_epoch``; validation, diagnostics and times are added.
      progress: before the epoch.
      started: ``time.perf_counter()`` at the start of the run, less what it took before.

    Returns:
      The ``Epoch``.

    Raises:
      Diverged: a parameter, score or diagnostic is not finite.
    """
    params = task.params(state)
    since = time.perf_counter()
    if name := training.not_finite(state):
        raise _diverged(f"{name} is not finite", row["step"], row["epoch"], state)
    try:
        row["valid"], warnings = _validate(task, params, row)
    except Diverged as error:
        raise _diverged(error.what, row["step"], row["epoch"], state) from None
    now = time.perf_counter()
    row["seconds"] |= {"validation": now - since, "total": now - started}
    value = row["valid"][f"ndcg@{task.config.eval_k}"]
    better = value > progress.best_value
    if better:
        progress = progress._replace(best_epoch=row["epoch"], best_value=value)
    progress = progress._replace(epoch=row["epoch"], seconds=row["seconds"]["total"])
    return Epoch(progress, state, params, row, better, warnings)


def _fit(
    task: Task, workdir: Path, checkpoints: Checkpoints, out: TextIO | None, tensorboard: bool
) -> dict:
    config = task.config
    progress, state, part = Progress(), None, None

    def say(text: str) -> None:
        print(text, file=out, flush=True)  # there is no bar yet

    say(_headline(task, workdir))
    say(footprint.line(task, CHUNK_STEPS))
    if checkpoints.latest_epoch() is not None:
        state, stored = task.resume(checkpoints)
        progress, part = _stored(stored)
        if config.epochs < progress.epoch:
            raise InputError(
                f"config.epochs is {config.epochs}, but the run in {workdir} has done "
                f"{progress.epoch}; give as many or more to go on"
            )
        checkpoints.forget_after(progress.epoch)
    else:
        if config.warm_start:
            say(_start_line(config))
        state = task.init()
    metrics_file, board = None, None
    if parallel.is_main():
        _write_config(workdir, config, task.dataset)
        metrics_file = MetricsFile(workdir / "metrics.jsonl", epochs=progress.epoch)
        if tensorboard:
            board = TensorBoard(workdir / "tensorboard", epochs=progress.epoch)
    steps, rows_a_step = 1, 1
    if task.plan is not None:
        steps, rows_a_step = task.plan.steps, task.plan.batch_examples * len(task.plan.domains)
    console = Console(epochs=config.epochs, steps=steps, rows_a_step=rows_a_step, out=out)
    try:
        if progress.epoch or part is not None:
            steps_done = f" and {part.done:,} steps" if part is not None else ""
            console.line(f"resuming after epoch {progress.epoch}{steps_done}")
        with interruption.deferred():
            for end in _train_on(task, state, progress, console, checkpoints, part):
                progress = end.progress
                if end.better:
                    checkpoints.save_best(progress.epoch, task.to_save(end.params))
                if metrics_file is not None:
                    metrics_file.append(end.row)
                if board is not None:
                    board.append(end.row)
                saved = task.resumable(end.state)
                checkpoints.save_latest(progress.epoch, saved, progress.to_json())
                console.line(_epoch_line(end.row, f"ndcg@{config.eval_k}", end.better))
                for warning in end.warnings:
                    console.line(f"warning: {warning}")
                del end, saved
                _return_memory()
                if signum := interruption.requested():
                    raise interruption.Interrupted(signum, saved_line(workdir, progress.epoch))
        result, ranks = _finish(task, progress, checkpoints)
    except CutShort as cut:
        if cut.state is not None:
            stored = {**progress.to_json(), "part": cut.part.to_json()}
            checkpoints.save_latest(progress.epoch + 1, task.to_save(cut.state), stored)
        where = saved_line(workdir, progress.epoch, cut.part.done)
        raise interruption.Interrupted(cut.signum, where) from None
    finally:
        console.close()
        if board is not None:
            board.close()
    if parallel.is_main():
        write_arrays(workdir / "ranks.npz", **ranks)
        write_text(workdir / "result.md", result_markdown(result))
        write_json(workdir / "result.json", result)
    print(result_markdown(result), file=out)
    return result


def _train_on(
    task: Task,
    state: State,
    progress: Progress,
    console: Console,
    checkpoints: Checkpoints,
    part: Part | None,
) -> Iterator[Epoch]:
    """``train``; under ``on_nonfinite=rollback`` a run that diverges goes back to its checkpoint.

    It diverges where a loss is not finite, or all else at the end of an epoch, which costs a step
    nothing. The epoch is then run once more, watched, to name the first step and its cause. What
    follows from there is a function of the checkpoint alone: a run that is killed on the way
    diverges again, and goes back again, to the same result.
    """
    back: list[dict[str, Any]] = []
    while True:
        try:
            for end in train(task.slower(progress.rollbacks), state, progress, console, part):
                if back:
                    end.row["rollbacks"], back = back, []
                progress = end.progress
                yield end
                del end
            return
        except CutShort as cut:
            if back:  # a run that goes on from the checkpoint goes back again
                raise CutShort(cut.signum) from None
            raise
        except Diverged as error:
            if task.plan is None:
                raise
            failed, rollbacks = error, progress.rollbacks
        console.line(f"warning: {failed.what}; once more from the last checkpoint, to say why")
        state, progress, part = _last(task, checkpoints)
        watched = task.slower(rollbacks)
        watched = watched._replace(settings=task.settings._replace(watch=True))
        try:
            next(train(watched, state, progress._replace(rollbacks=rollbacks), part=part))
        except CutShort as cut:
            raise CutShort(cut.signum) from None
        except Diverged as error:
            failed = error
        if task.config.on_nonfinite != "rollback":
            raise failed
        if rollbacks == MAX_ROLLBACKS:
            raise Diverged(
                f"{failed.what}, after {MAX_ROLLBACKS} rollbacks",
                "start anew in another --workdir with a much smaller config.learning_rate",
            )
        rollbacks, reason = rollbacks + 1, failed.what
        state, progress, part = _last(task, checkpoints)
        progress = progress._replace(rollbacks=rollbacks)
        rate = task.config.learning_rate * ROLLBACK**rollbacks
        back.append({"reason": reason, "learning_rate": rate})
        console.line(
            f"warning: {reason}; back to the end of epoch {progress.epoch}, and on with a "
            f"learning rate of {rate:g} (rollback {rollbacks} of {MAX_ROLLBACKS})"
        )


def _last(task: Task, checkpoints: Checkpoints) -> tuple[State, Progress, Part | None]:
    """The last checkpoint, or the start, with every row brought to its step."""
    if checkpoints.latest_epoch() is None:
        return task.init(), Progress(), None
    state, stored = task.resume(checkpoints)
    progress, part = _stored(stored)
    # Rows that were not read of late still move: at the rate of their time.
    rate = task.slower(progress.rollbacks).hyper.learning_rate
    return training.settle_in_place(state, rate), progress, part


def saved_line(folder: Path, epoch: int, steps: int = 0) -> str:
    """Returns what a run that a signal has stopped says."""
    more = f" and {steps:,} steps" if steps else ""
    return f"saved after epoch {epoch}{more} in {folder}; the same command goes on from there"


def _forget_programs() -> None:
    """Drops compiled programs when half of the memory mappings that Linux allows are taken.

    A program takes hundreds of them and is kept for its next use: some forty runs of different
    shapes in one process would end at "LLVM ERROR: Unable to allocate section memory".
    """
    try:
        allowed = int(_MAPPINGS_ALLOWED.read_text())
        taken = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return  # not Linux
    if taken > allowed // 2:
        jax.clear_caches()


def _return_memory() -> None:
    """Hands freed memory back to the system, where the C library (glibc) can.

    Saving and validating free some 100 MB an epoch at the paper's scale, which malloc would keep in
    its arenas: over twelve epochs that was a third of the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def run_epoch(
    task: Task,
    state: State,
    epoch: int,
    console: Console | None = None,
    part: Part | None = None,
) -> tuple[State, dict[str, Any]]:
    """Trains one epoch.

    Args:
      task: the run.
      state: state before; its buffers are donated.
      epoch: from 1.
      console: told of every chunk.
      part: of the epoch, that is done already.

    Returns:
      (state after, the epoch's row of metrics.jsonl so far: ``epoch``, ``step``, ``train_loss``
      by domain in nats per example, ``seconds``, ``rows_per_second``, and for the first epoch
      ``first_losses``, those of its first steps).

    Raises:
      Diverged: a loss or gradient of a step is not finite.
      CutShort: a signal has asked to stop; with the state and the part of the epoch that is done.
    """
    if task.sweep is not None:
        return _run_sweep(task, state, epoch)
    plan, rate = task.plan, task.hyper.learning_rate
    part = part or Part()
    sums = {name: [values] for name, values in part.sums.items()}
    done, began = part.done, time.perf_counter() - part.seconds
    first = int(state.step) - done
    longest = min(CHUNK_STEPS, max(1, CHUNK_EXAMPLES // plan.batch_examples))
    for length in training.chunk_lengths(plan.steps, longest, done):
        state, chunk = training.train_chunk(
            state,
            task.interactions,
            task.sampling_key,
            np.int32(epoch - 1),
            np.int32(done),
            task.hyper,
            model=task.model,
            plan=plan,
            settings=task.settings,
            num_steps=length,
        )
        chunk = {name: np.asarray(value, np.float64) for name, value in chunk.items()}
        check_steps(chunk, first + done, epoch, state)
        if first + done < training.SETTLE_STEP <= first + done + length:
            state = training.settle_in_place(state, rate)
        done += length
        for name, value in chunk.items():
            sums.setdefault(name, []).append(value)
        if console is not None:
            loss = chunk["target_loss"].sum() / max(chunk["target_count"].sum(), 1.0)
            console.chunk(epoch=epoch, done=done, steps=length, loss=loss)
        if signum := interruption.requested():
            steps = {name: np.concatenate(parts) for name, parts in sums.items()}
            raise CutShort(signum, state, Part(done, steps, time.perf_counter() - began))
    seconds = time.perf_counter() - began
    steps = {name: np.concatenate(parts) for name, parts in sums.items()}
    return state, epoch_row(epoch, first + done, steps, seconds)


def epoch_row(epoch: int, step: int, sums: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
    """Returns what ``run_epoch`` does of an epoch.

    Args:
      epoch: from 1.
      step: steps done at its end.
      sums: {name: f64[steps]} sums and counts of ``Model.loss``.
      seconds: of training.
    """
    domains = [domain for domain in ("target", "source") if f"{domain}_loss" in sums]
    losses = {domain: (sums[f"{domain}_loss"], sums[f"{domain}_count"]) for domain in domains}
    row = {
        "epoch": epoch,
        "step": step,
        "train_loss": {name: float(x.sum() / n.sum()) for name, (x, n) in losses.items()},
        "seconds": {"train": seconds},
        "rows_per_second": float(sum(n.sum() for _, n in losses.values()) / seconds),
    }
    if epoch == 1:
        # Before rounding has been amplified: by these two runs can be told to be the same.
        row["first_losses"] = {
            name: (x / np.maximum(n, 1.0))[:FIRST_STEPS].tolist() for name, (x, n) in losses.items()
        }
    return row


def _run_sweep(task: Task, params: Params, epoch: int) -> tuple[Params, dict[str, Any]]:
    began = time.perf_counter()
    params = jax.block_until_ready(task.sweep(params))
    seconds = time.perf_counter() - began
    rows = sum(len(task.interactions[domain].items) for domain in task.model.domains)
    return params, {
        "epoch": epoch,
        "step": epoch,
        "train_loss": {},
        "seconds": {"train": seconds},
        "rows_per_second": rows / seconds,
    }


def check_steps(
    chunk: dict[str, np.ndarray], first_step: int, epoch: int, state: training.TrainState
) -> None:
    """Raises ``Diverged`` at the first step with a loss or gradient that is not finite.

    Args:
      chunk: {name: f64[steps]} of ``training.run_steps``.
      first_step: steps done before.
      epoch: from 1.
      state: after the steps, see ``training.Settings.watch``.
    """
    found = []
    for name, values in chunk.items():
        bad = values >= 0 if name == "bad_gradient" else ~np.isfinite(values)
        if bad.any():
            found.append((int(np.argmax(bad)), name == "bad_gradient", name))
    if not found:
        return
    at, of_gradient, name = min(found)
    what = f"the {name.removesuffix('_loss')} loss"
    if of_gradient:
        parameter = training.parameter_names(state)[int(chunk[name][at])]
        of = [domain for domain in ("target", "source") if domain in parameter]
        what = f"the gradient of {parameter} ({of[0] if of else 'both domains'})"
    raise _diverged(f"{what} is not finite", first_step + at + 1, epoch, state)


def _diverged(what: str, step: int, epoch: int, state: State) -> Diverged:
    name, entry = training.largest_parameter(state)
    if not isinstance(state, training.TrainState):  # of a linear model
        cure = "give a larger config.ials_regularization or config.ease_regularization"
        return Diverged(
            f"{what}; the largest parameter is {name}, with an entry of {entry:.3g}", cure
        )
    return Diverged(
        f"{what} at step {step} (epoch {epoch}; the largest parameter is {name}, with an entry of "
        f"{entry:.3g}), and nothing of this epoch was saved",
        "start anew in another --workdir with a smaller config.learning_rate or with "
        "config.clip_norm, or give the same command with --config.on_nonfinite=rollback, which "
        f"goes back to the last checkpoint and on with {ROLLBACK:g} times the learning rate",
    )


def _validate(task: Task, params: Params, row: dict[str, Any]) -> tuple[dict, list[str]]:
    """Ranks the validation items, adds diagnostics to ``row``, and looks for dead towers."""
    config = task.config
    ranks = evaluation.rank_held_out(task.model, params, task.interactions, task.dataset.valid)
    diagnostics = {}
    if task.plan is not None:
        diagnostics = training.diagnose(
            params,
            task.interactions,
            task.sampling_key,
            np.int32(row["epoch"] - 1),
            model=task.model,
            plan=task.plan,
        )
    row["diagnostics"] = {name: float(value) for name, value in diagnostics.items()}
    for name, value in row["diagnostics"].items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value}")
    warnings = []
    weight = {"target": config.target_weight, "source": 1.0 - config.target_weight}
    for domain, loss in row["train_loss"].items():
        if f"logit_spread/{domain}" not in row["diagnostics"]:
            continue  # not a tower: factors start at ln 2 and may learn slowly
        tied = row["diagnostics"][f"logit_spread/{domain}"] == 0.0
        if domain == "target":
            tied = tied or bool((ranks.tied == ranks.candidates).all())
        if weight[domain] > 0 and (abs(loss - LN2) < DEAD_MARGIN or tied):
            cause = "all its scores are tied" if tied else f"its loss is {loss:.4f}, about ln 2"
            cure = (
                "config.initializer=he and config.reduction=sum"
                if config.initializer == "gaussian" or config.reduction == "mean"
                else "a smaller config.learning_rate or another config.seed"
            )
            warnings.append(f"the {domain} tower is dead: {cause}; it may need {cure}")
    return evaluation.summarize(ranks, k=config.eval_k), warnings


def _finish(
    task: Task, progress: Progress, checkpoints: Checkpoints
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Evaluates the best checkpoint, on test for the first and only time: (result, ranks)."""
    config, dataset = task.config, task.dataset
    params = task.best(checkpoints, progress.best_epoch)
    metrics, arrays = {}, {}
    for split in ("test", "valid"):
        held_out = getattr(dataset, split)
        ranks = evaluation.rank_held_out(task.model, params, task.interactions, held_out)
        metrics[split] = evaluation.summarize(ranks, k=config.eval_k)
        arrays |= {f"{split}_users": held_out.users}
        arrays |= {f"{split}_{name}": value for name, value in ranks._asdict().items()}
    plain = jax.eval_shape(task.params, task.abstract_state())
    result = {
        **metrics,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "seed": config.seed,
        "config": json.loads(config.to_json()),
        "dataset": {"hash": dataset.meta["hash"], **dataset.meta["counts"]},
        **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(plain)),
        "seconds": round(progress.seconds, 3),
        "versions": versions(),
    }
    return result, arrays


def versions() -> dict[str, str]:
    """Returns the versions of everything that a result depends on, and the device's kind."""
    return {
        "conet_jax": conet_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONED},
        "device": jax.devices()[0].device_kind,
    }


def for_inference(task: Task, params: Params) -> tuple[Task, Params]:
    """Returns the same model with a row a user or item: of ``crossfit``, the rows of all pairs."""
    if not task.model.fixed_tables:
        return task, params
    config = task.config.copy_and_resolve_references()
    config.folds = 0
    tables = {
        name: crossfit.of_all_pairs(table, task.config.folds)
        for name, table in params.tables.items()
    }
    task = task._replace(config=config, model=models.build(config))
    return task, params._replace(tables=tables)


def restore(workdir: str | Path, *, devices: int = 1) -> tuple[Task, Params, dict[str, Any]]:
    """Loads a run's config, data and best parameters.

    Args:
      workdir: folder of a run with at least one epoch.
      devices: to load it on, see ``config.devices``; on one, tables are plain arrays.

    Returns:
      (task, best parameters, {"best_epoch": …}).

    Raises:
      InputError: the folder holds no run, no checkpoint, or its data is gone or altered.
    """
    workdir = Path(workdir)
    stored, digest = stored_config(workdir)
    config = ConfigDict(stored | {"devices": devices})
    dataset = load_dataset(config)
    if dataset.meta["hash"] != digest:
        raise InputError(
            f"the data in {config.data.dir} is not that of {workdir}: hash "
            f"{dataset.meta['hash'][:12]}… instead of {digest[:12]}…; prepare it as it was: "
            f"{config.data.get('prepare') or _PREPARE} --out={config.data.dir}"
        )
    task = make_task(config, dataset)
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir} holds no checkpoint yet; {_train(workdir)}")
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        if checkpoints.latest_epoch() is None:
            raise InputError(f"{workdir} holds no checkpoint yet; {_train(workdir)}")
        _, progress = task.resume(checkpoints)
        if not progress["best_epoch"]:  # stopped in its first epoch
            raise InputError(f"{workdir} holds no checkpoint yet; {_train(workdir)}")
        return task, task.best(checkpoints, progress["best_epoch"]), progress
    finally:
        checkpoints.close()


def _headline(task: Task, workdir: Path) -> str:
    counts = task.dataset.meta["counts"]
    steps = f", {task.plan.steps:,} steps an epoch" if task.plan is not None else ""
    return (
        f"{task.config.name}{':' if task.config.variant else ''}{task.config.variant}: "
        f"{counts['users']:,} users, "
        f"{counts['target_interactions']:,} target and {counts['source_interactions']:,} source "
        f"interactions{steps}; writing to {workdir}"
    )


def _start_line(config: ConfigDict) -> str:
    if config.warm_start == "pretrain":
        return f"start: an MLP on the source, {config.pretrain_epochs} epochs"
    folds = config.folds if config.warm_start == "crossfit" else 0
    without = f", then {config.fold_sweeps} without each of {folds} folds" if folds else ""
    return f"start: a factorisation, {config.ials_sweeps} sweeps{without}"


def _epoch_line(row: dict[str, Any], metric: str, better: bool) -> str:
    losses = ", ".join(f"{domain} {loss:.4f}" for domain, loss in row["train_loss"].items())
    value = f"{row['valid'][metric]:.4f}" + (" *" if better else "  ")
    rate = f"{row['rows_per_second']:,.0f} rows/s"
    losses = f"train loss: {losses}  " if losses else ""
    return f"epoch {row['epoch']:3d}  {losses}valid {metric} {value}  {rate}"


def result_markdown(result: dict[str, Any]) -> str:
    """Returns a result as a small Markdown page."""
    names = [name for name in result["test"] if name != "users"]
    lines = [
        f"# {result['config']['name']} {result['config']['variant']}".rstrip(),
        "",
        "| split | users | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for split in ("test", "valid"):
        values = result[split]
        cells = [f"{values['users']:,}"] + [f"{values[name]:.4f}" for name in names]
        lines.append(f"| {split} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Best epoch {result['best_epoch']} of {result['epochs']} by validation, seed "
        f"{result['seed']}, {result['parameters']:,} parameters, {result['seconds']:,.1f} s; data "
        f"{result['dataset']['hash'][:12]}.",
        "",
    ]
    return "\n".join(lines)


def touched_items(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Target items of each user in all splits, as CSR (indptr, indices sorted within a user)."""
    target = dataset.target
    users = np.repeat(np.arange(dataset.num_users), np.diff(target.indptr))
    users = np.concatenate([users, dataset.valid.users, dataset.test.users])
    items = np.concatenate([target.indices, dataset.valid.items, dataset.test.items])
    order = np.lexsort((items, users))
    indptr = np.searchsorted(users[order], np.arange(dataset.num_users + 1))
    return indptr, items[order]
