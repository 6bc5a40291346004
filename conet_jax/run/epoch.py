"""One epoch: its chunks of steps, its row of numbers, and where it went wrong."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from conet_jax.errors import Diverged
from conet_jax.models.base import Params
from conet_jax.run import signals
from conet_jax.run.experiment import ROLLBACK, Experiment, State
from conet_jax.run.logs import Console
from conet_jax.train.chunk import chunk_lengths, train_chunk
from conet_jax.train.state import (
    SETTLE_STEP,
    TrainState,
    largest_parameter,
    parameter_names,
    settle_in_place,
)

CHUNK_STEPS = 512  # steps a call of the compiled program: bounds its memory, moves the bar


CHUNK_EXAMPLES = 1 << 22  # the same for large batches


FIRST_STEPS = 5  # of a run, whose losses are told one by one


class Part(NamedTuple):
    """What an epoch that a signal cut short must know beside its state to go on.

    Attributes:
      done: steps done.
      sums: {name: f64[done]} sums and counts of ``joint_objective``.
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


def run_epoch(
    experiment: Experiment,
    state: State,
    epoch: int,
    console: Console | None = None,
    part: Part | None = None,
) -> tuple[State, dict[str, Any]]:
    """Trains one epoch.

    Args:
      experiment: the run.
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
    if experiment.sweep is not None:
        return _run_sweep(experiment, state, epoch)
    plan, rate = experiment.plan, experiment.hyper.learning_rate
    part = part or Part()
    sums = {name: [values] for name, values in part.sums.items()}
    done, began = part.done, time.perf_counter() - part.seconds
    first = int(state.step) - done
    longest = min(CHUNK_STEPS, max(1, CHUNK_EXAMPLES // plan.batch_examples))
    for length in chunk_lengths(plan.steps, longest, done):
        state, chunk = train_chunk(
            state,
            experiment.interactions,
            experiment.sampling_key,
            np.int32(epoch - 1),
            np.int32(done),
            experiment.hyper,
            model=experiment.model,
            plan=plan,
            settings=experiment.settings,
            num_steps=length,
        )
        chunk = {name: np.asarray(value, np.float64) for name, value in chunk.items()}
        check_steps(chunk, first + done, epoch, state)
        if first + done < SETTLE_STEP <= first + done + length:
            state = settle_in_place(state, rate)
        done += length
        for name, value in chunk.items():
            sums.setdefault(name, []).append(value)
        if console is not None:
            loss = chunk["target_loss"].sum() / max(chunk["target_count"].sum(), 1.0)
            console.chunk(epoch=epoch, done=done, steps=length, loss=loss)
        if signum := signals.requested():
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
      sums: {name: f64[steps]} sums and counts of ``joint_objective``.
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


def _run_sweep(experiment: Experiment, params: Params, epoch: int) -> tuple[Params, dict[str, Any]]:
    began = time.perf_counter()
    params = jax.block_until_ready(experiment.sweep(params))
    seconds = time.perf_counter() - began
    rows = sum(len(experiment.interactions[domain].items) for domain in experiment.model.domains)
    return params, {
        "epoch": epoch,
        "step": epoch,
        "train_loss": {},
        "seconds": {"train": seconds},
        "rows_per_second": rows / seconds,
    }


def check_steps(
    chunk: dict[str, np.ndarray], first_step: int, epoch: int, state: TrainState
) -> None:
    """Raises ``Diverged`` at the first step with a loss or gradient that is not finite.

    Args:
      chunk: {name: f64[steps]} of ``chunk.run_steps``.
      first_step: steps done before.
      epoch: from 1.
      state: after the steps, see ``state.Settings.watch``.
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
        parameter = parameter_names(state)[int(chunk[name][at])]
        of = [domain for domain in ("target", "source") if domain in parameter]
        what = f"the gradient of {parameter} ({of[0] if of else 'both domains'})"
    raise diverged(f"{what} is not finite", first_step + at + 1, epoch, state)


def diverged(what: str, step: int, epoch: int, state: State) -> Diverged:
    """Returns the error of a run that is not finite: where, and what to do."""
    name, entry = largest_parameter(state)
    if not isinstance(state, TrainState):  # of a linear model
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
