"""Epoch after epoch: train, validate, keep count of the best, stop early, roll back."""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from conet_jax.errors import Diverged
from conet_jax.models.base import Params
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.epoch import CutShort, Part, diverged, run_epoch
from conet_jax.run.experiment import ROLLBACK, Experiment, State
from conet_jax.run.logs import Console
from conet_jax.run.start import initial_state
from conet_jax.train import ranking
from conet_jax.train.chunk import diagnose
from conet_jax.train.state import not_finite, settle_in_place

MAX_ROLLBACKS = 5  # of a run: down to a thirty-second of the learning rate


LN2 = math.log(2.0)


DEAD_MARGIN = 1e-3  # nats; a tower that predicts 1/2 everywhere stays at ln 2


class Progress(NamedTuple):
    """What a run must know beside its state to go on."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_value: float = -math.inf  # warm validation NDCG
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

    def stopped(self, experiment: Experiment) -> bool:
        """Whether the run is over: its last epoch, or patience at an end."""
        waited = self.epoch - self.best_epoch
        last = 1 if experiment.model.closed_form else experiment.config.epochs
        return self.epoch >= last or waited >= experiment.config.patience


def stored_progress(value: dict[str, Any]) -> tuple[Progress, Part | None]:
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
    experiment: Experiment,
    state: State,
    progress: Progress | None = None,
    console: Console | None = None,
    part: Part | None = None,
) -> Iterator[Epoch]:
    """Trains and validates epoch by epoch until the last, or until patience runs out.

    Args:
      experiment: the run.
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
    while not progress.stopped(experiment):
        state, row = run_epoch(experiment, state, progress.epoch + 1, console, part)
        part = None
        end = end_epoch(experiment, state, row, progress, started)
        progress = end.progress
        yield end
        del end


def end_epoch(
    experiment: Experiment, state: State, row: dict[str, Any], progress: Progress, started: float
) -> Epoch:
    """Validates the state after an epoch and keeps count of the best.

    Args:
      experiment: the run.
      state: state after the epoch.
      row: of ``run_epoch``; validation, diagnostics and times are added.
      progress: before the epoch.
      started: ``time.perf_counter()`` at the start of the run, less what it took before.

    Returns:
      The ``Epoch``.

    Raises:
      Diverged: a parameter, score or diagnostic is not finite.
    """
    params = experiment.params(state)
    since = time.perf_counter()
    if name := not_finite(state):
        raise diverged(f"{name} is not finite", row["step"], row["epoch"], state)
    try:
        warnings = validate(experiment, params, row)
    except Diverged as error:
        raise diverged(error.what, row["step"], row["epoch"], state) from None
    now = time.perf_counter()
    row["seconds"] |= {"validation": now - since, "total": now - started}
    value = ranking.chosen_by(row, experiment.config.eval_k[0])
    better = value > progress.best_value
    if better:
        progress = progress._replace(best_epoch=row["epoch"], best_value=value)
    progress = progress._replace(epoch=row["epoch"], seconds=row["seconds"]["total"])
    return Epoch(progress, state, params, row, better, warnings)


def train_on(
    experiment: Experiment,
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
            for end in train(experiment.slower(progress.rollbacks), state, progress, console, part):
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
            if experiment.plan is None:
                raise
            failed, rollbacks = error, progress.rollbacks
        console.line(f"warning: {failed.what}; once more from the last checkpoint, to say why")
        state, progress, part = _last(experiment, checkpoints)
        watched = experiment.slower(rollbacks)
        watched = watched._replace(settings=experiment.settings._replace(watch=True))
        try:
            next(train(watched, state, progress._replace(rollbacks=rollbacks), part=part))
        except CutShort as cut:
            raise CutShort(cut.signum) from None
        except Diverged as error:
            failed = error
        if experiment.config.on_nonfinite != "rollback":
            raise failed
        if rollbacks == MAX_ROLLBACKS:
            raise Diverged(
                f"{failed.what}, after {MAX_ROLLBACKS} rollbacks",
                "start anew in another --workdir with a much smaller config.learning_rate",
            )
        rollbacks, reason = rollbacks + 1, failed.what
        state, progress, part = _last(experiment, checkpoints)
        progress = progress._replace(rollbacks=rollbacks)
        rate = experiment.config.learning_rate * ROLLBACK**rollbacks
        back.append({"reason": reason, "learning_rate": rate})
        console.line(
            f"warning: {reason}; back to the end of epoch {progress.epoch}, and on with a "
            f"learning rate of {rate:g} (rollback {rollbacks} of {MAX_ROLLBACKS})"
        )


def _last(experiment: Experiment, checkpoints: Checkpoints) -> tuple[State, Progress, Part | None]:
    """The last checkpoint, or the start, with every row brought to its step."""
    if checkpoints.latest_epoch() is None:
        return initial_state(experiment), Progress(), None
    state, stored = experiment.resume(checkpoints)
    progress, part = stored_progress(stored)
    # Rows that were not read of late still move: at the rate of their time.
    rate = experiment.slower(progress.rollbacks).hyper.learning_rate
    return settle_in_place(state, rate), progress, part


def validate(experiment: Experiment, params: Params, row: dict[str, Any]) -> list[str]:
    """Adds validation metrics and diagnostics to ``row``; returns warnings of dead towers."""
    config = experiment.config
    everything, warm = ranking.rank_twice(
        experiment.model,
        params,
        experiment.interactions,
        experiment.dataset.valid,
        experiment.trained_items(),
    )
    row["valid"] = everything.summarize(k=config.eval_k)
    row["valid_warm"] = warm.summarize(k=config.eval_k)
    ranks = everything.ranks
    diagnostics = {}
    if experiment.plan is not None:
        diagnostics = diagnose(
            params,
            experiment.interactions,
            experiment.sampling_key,
            np.int32(row["epoch"] - 1),
            model=experiment.model,
            plan=experiment.plan,
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
            cause = "all its scores are tied" if tied else "its loss is about ln 2"
            cure = (
                "config.initializer=he"
                if config.initializer == "gaussian"
                else "a smaller config.learning_rate or another config.seed"
            )
            warnings.append(f"the {domain} tower is dead: {cause}; it may need {cure}")
    return warnings
