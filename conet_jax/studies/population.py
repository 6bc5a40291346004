"""A population: runs that differ in ``Hyper`` and seed alone, trained side by side in one program.

Each member is validated after every epoch and stops by its own patience, as ``loop.train``
does with a run; the test split is not read. With a folder the population is saved after each epoch,
and the same call goes on where it was.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conet_jax import models
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.models.base import Hyper, Model
from conet_jax.run import loop, signals
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.epoch import CHUNK_STEPS, CutShort, Part, check_steps, epoch_row
from conet_jax.run.experiment import Experiment, make_experiment
from conet_jax.run.logs import saved_line
from conet_jax.run.loop import Progress
from conet_jax.run.start import initial_state
from conet_jax.studies import search
from conet_jax.train.chunk import chunk_lengths, train_population
from conet_jax.train.state import SETTLE_STEP, TrainState

Record = dict[str, Any]

# Fields that a program does not hang on: names, and when a member stops.
_NAMES = ("name", "variant", "on_nonfinite", "epochs", "patience")
_STEPS = 4 * CHUNK_STEPS  # of all members a call: bounds the memory of their batches
# Steps of members that are over, an epoch, for which a program without them is compiled, once they
# are half: a compilation takes as long as some 20,000 steps, so two epochs make up for it.
_WORTH = 10_000


class Member(NamedTuple):
    """A run of a population: its progress, and the numbers of its best epoch (see ``train``)."""

    progress: Progress = Progress()
    record: Record = {}


def program(config: ConfigDict) -> str:
    """Returns what configs must agree in to be members of one population.

    Everything but names, the seed, when it stops and the fields of ``Hyper``; of dropout, which
    adds draws to the program, whether there is any. And the seed where tables do not change, which
    members then share: each seed then has its own start, and searches its constants.
    """
    fields = config.to_dict() | dict.fromkeys(("seed", *_NAMES, *Hyper._fields))
    if getattr(models.build(config), "fixed_tables", False):
        fields["seed"] = config.seed
    return json.dumps(fields | {"dropout": config.dropout > 0}, sort_keys=True)


def train(
    configs: Sequence[ConfigDict],
    dataset: Dataset,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Trains a population to the end of its last member.

    Args:
      configs: of the members, equal in ``program``.
      dataset: the data; its test split is not read.
      folder: of its checkpoints, of no use once this has returned.
      say: told a line an epoch.

    Returns:
      For each member ``valid`` (metrics of the best epoch), ``train_loss`` (of that epoch),
      ``first_losses``, ``history`` (of every epoch, see ``epoch_numbers``), ``best_epoch``,
      ``epochs``, ``seconds`` (its share of the population's); of one that diverged ``failed``, the
      reason.

    Raises:
      InputError: the config does not fit the data.
      OSError: the disk is full, or the folder has gone.
      signals.Interrupted: a signal asked to stop, and the population is saved.
    """
    config = configs[0].copy_and_resolve_references()
    config.devices = 1  # a population is one program of one device
    experiment = make_experiment(config, search.without_test(dataset))
    experiments = [experiment.member(config) for config in configs]
    members, slots, states, part = _restore(experiments, folder) or (
        [Member() for _ in experiments],
        list(range(len(experiments))),
        start(experiments),
        Part(),
    )
    checkpoints = Checkpoints(folder / str(len(slots)))

    def save(number: int, states: TrainState, **more: Any) -> None:
        stored = [[member.progress.to_json(), member.record] for member in members]
        checkpoints.save_latest(number, states, {"members": stored, "slots": slots, **more})

    try:
        with signals.deferred():
            while True:
                done = max(member.progress.epoch for member in members)
                states, epoch = _epoch([experiments[i] for i in slots], states, done, part)
                part = Part()
                for at, (i, sums) in enumerate(zip(slots, epoch.sums, strict=True)):
                    if not _over(experiments[i], members[i]):
                        state = _take(states, at)
                        members[i] = _validated(experiments[i], members[i], state, sums, epoch)
                left = [i for i in slots if not _over(experiments[i], members[i])]
                say(_line(configs[0], members, left, epoch))
                if not left:
                    break
                size = len(slots)
                gone = size - len(left)
                if 2 * gone >= size and gone * experiment.plan.steps >= _WORTH:
                    states = _take(states, np.array([slots.index(i) for i in left]))
                    slots = left
                    checkpoints.close()
                    checkpoints = Checkpoints(folder / str(len(slots)))
                save(epoch.number, states)
                if len(slots) < size:
                    shutil.rmtree(folder / str(size))
                if signum := signals.requested():
                    raise signals.Interrupted(signum, saved_line(folder, epoch.number))
    except CutShort as cut:
        save(done + 1, cut.state, part=cut.part.to_json())
        where = saved_line(folder, done, cut.part.done)
        raise signals.Interrupted(cut.signum, where) from None
    finally:
        checkpoints.close()
    return [
        member.record
        if "failed" in member.record
        else member.record
        | {
            "best_epoch": member.progress.best_epoch,
            "epochs": member.progress.epoch,
            "seconds": round(member.progress.seconds, 3),
        }
        for member in members
    ]


class _Epoch(NamedTuple):
    number: int
    step: int  # at its end
    sums: list[dict[str, np.ndarray]]  # a dict of f64[steps] a slot
    seconds: float  # a slot's share


def start(experiments: list[Experiment]) -> TrainState:
    """Initial states; a start that no field of ``Hyper`` enters is made once a seed."""
    found: dict[Any, TrainState] = {}
    states = []
    for experiment in experiments:
        hyper = tuple(map(float, experiment.hyper)) if experiment.config.pretrain_epochs else ()
        key = (experiment.config.seed, hyper)
        if key not in found:
            found[key] = initial_state(experiment)
        states.append(found[key])
    own, tables = zip(*map(_apart, states), strict=True)
    return _joint(stack(own), tables[0])


def stack(trees: Sequence[Any]) -> Any:
    """Returns pytrees of members as one, with a leading axis of members."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _apart(states: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """What is a member's own, and the tables that all share (see ``chunk.member_axes``)."""
    if not states.fixed_tables:
        return states, {}
    return states.replace(tables={}), states.tables


def _joint(states: TrainState, tables: dict[str, jax.Array]) -> TrainState:
    return states.replace(tables=tables) if states.fixed_tables else states


@partial(jax.jit, donate_argnums=0)
def _settle(states: TrainState, rates: jax.Array) -> TrainState:
    """``state.settle_in_place`` of every member."""
    settle = jax.vmap(states.adam.settle_packed)
    tables = {name: settle(packed, states.step, rates) for name, packed in states.tables.items()}
    return states.replace(tables=tables)


def _take(states: TrainState, at: Any) -> TrainState:
    own, tables = _apart(states)
    return _joint(_rows(own, at), tables)


@jax.jit
def _rows(tree: Any, at: Any) -> Any:
    return jax.tree.map(lambda x: x[at], tree)


def _epoch(
    experiments: list[Experiment], states: TrainState, before: int, part: Part
) -> tuple[TrainState, _Epoch]:
    experiment, began = experiments[0], time.perf_counter() - part.seconds
    keys = jnp.stack([experiment.sampling_key for experiment in experiments])
    if len({experiment.config.seed for experiment in experiments}) == 1:
        keys = keys[0]
    hypers = stack([experiment.hyper for experiment in experiments])
    chunks, done = [part.sums] if part.done else [], part.done
    first = int(states.step[0]) - done
    longest = max(1, _STEPS // len(experiments))
    for length in chunk_lengths(experiment.plan.steps, longest, done):
        states, chunk = train_population(
            states,
            experiment.interactions,
            keys,
            jnp.int32(before),
            jnp.int32(done),
            hypers,
            model=experiment.model,
            plan=experiment.plan,
            settings=experiment.settings,
            num_steps=length,
        )
        chunks.append(jax.tree.map(lambda x: np.asarray(x, np.float64), chunk))
        if first + done < SETTLE_STEP <= first + done + length and not states.fixed_tables:
            states = _settle(states, hypers.learning_rate)
        done += length
        if signum := signals.requested():
            raise CutShort(signum, states, Part(done, _joined(chunks), time.perf_counter() - began))
    steps = _joined(chunks)
    sums = [{name: values[at] for name, values in steps.items()} for at in range(len(experiments))]
    share = (time.perf_counter() - began) / len(experiments)
    return states, _Epoch(before + 1, first + done, sums, share)


def _joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([c[name] for c in chunks], axis=1) for name in chunks[0]}


def _validated(
    experiment: Experiment,
    member: Member,
    state: TrainState,
    sums: dict[str, np.ndarray],
    epoch: _Epoch,
) -> Member:
    """A member after an epoch: what ``loop.train`` does at the end of one."""
    started = time.perf_counter() - member.progress.seconds - epoch.seconds
    steps = len(next(iter(sums.values())))
    try:
        check_steps(sums, epoch.step - steps, epoch.number, state)
        row = epoch_row(epoch.number, epoch.step, sums, epoch.seconds)
        end = loop.end_epoch(experiment, state, row, member.progress, started)
    except InputError as error:  # diverged
        return member._replace(record={"failed": str(error)})
    numbers = epoch_numbers(experiment.model, end)
    record = {**member.record, "history": [*member.record.get("history", []), numbers]}
    if end.better:
        record |= {**search.validation_of(row), "train_loss": row["train_loss"]}
    if "first_losses" in row:
        record["first_losses"] = row["first_losses"]
    return Member(end.progress, record)


def epoch_numbers(model: Model, end: loop.Epoch) -> Record:
    """Returns what is kept of every epoch.

    Args:
      model: of the run.
      end: of the epoch.

    Returns:
      ``epoch``, ``train_loss`` (target, nats per example), ``valid``, ``seconds`` of training, and
      of the entries under the lasso (of U and V if H is of low rank) the share of exact zeros
      ``h_zeros`` and the mean absolute value ``h_mean_abs``, None where nothing crosses.
    """
    dense = end.params.dense
    mask = jax.tree.leaves(model.l1_mask(dense))
    masked = zip(jax.tree.leaves(dense), mask, strict=True)
    crossing = [np.ravel(leaf) for leaf, penalised in masked if penalised]
    h = np.abs(np.concatenate(crossing)) if crossing else None
    return {
        "epoch": end.progress.epoch,
        "train_loss": end.row["train_loss"]["target"],
        **search.validation_of(end.row),
        "seconds": end.row["seconds"]["train"],
        "h_zeros": None if h is None else float((h == 0).mean()),
        "h_mean_abs": None if h is None else float(h.mean()),
    }


def _over(experiment: Experiment, member: Member) -> bool:
    return "failed" in member.record or member.progress.stopped(experiment)


def _line(config: ConfigDict, members: list[Member], left: list[int], epoch: _Epoch) -> str:
    name = f"ndcg@{config.eval_k[0]}"
    values = [search.value_of(member.record, config.eval_k[0]) for member in members]
    best = max((value for value in values if value is not None), default=None)
    best = "-" if best is None else f"{best:.4f}"
    return (
        f"epoch {epoch.number:3d}  {len(left)} of {len(members)} runs go on  best valid {name} "
        f"{best}  {len(epoch.sums) * epoch.seconds:.1f} s"
    )


def _restore(
    experiments: list[Experiment], folder: Path
) -> tuple[list[Member], list[int], TrainState, Part] | None:
    """What was saved last: of the fewest members, since the finished only ever leave."""
    for size in sorted(int(path.name) for path in folder.glob("[0-9]*")):
        checkpoints = Checkpoints(folder / str(size))
        try:
            if checkpoints.latest_epoch() is None:
                continue
            own, tables = _apart(experiments[0].abstract_state())
            like = jax.tree.map(
                lambda x, size=size: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), own
            )
            states, stored = checkpoints.restore_latest(_joint(like, tables))
        except InputError as error:  # none is whole: what it held is trained again
            print(f"warning: {error}", file=sys.stderr)
            shutil.rmtree(folder / str(size))
            continue
        finally:
            checkpoints.close()
        members = [
            Member(Progress.from_json(progress), record) for progress, record in stored["members"]
        ]
        part = Part.from_json(stored["part"]) if "part" in stored else Part()
        return members, stored["slots"], states, part
    return None
