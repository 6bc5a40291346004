"""Search for hyper-parameters on the validation split: spaces, trials, and the value of a trial.

Every method has a stated space and as many trials as the next, the first of them its variant's
defaults. The test split is out of reach: ``evaluate`` replaces it by an object that raises on any
use.
"""

import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from ml_collections import ConfigDict

from conet_jax import metrics
from conet_jax.data.types import Dataset
from conet_jax.run import loop
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.train import ranking
from conet_jax.variants import PUBLISHED, VARIANTS

METHODS = tuple(name for name in VARIANTS if name not in PUBLISHED)
# EMCDR is implicit ALS of the target for every user with a target pair: it is for config.data.cold.
DEFAULT_METHODS = tuple(name for name in METHODS if not name.startswith("emcdr"))


class Range(NamedTuple):
    """Real values from low to high, uniform or uniform in the logarithm."""

    low: float
    high: float
    log: bool = True


# Of an epoch's row: what is kept of validation; runs are chosen by the warm one.
PARTS = ("valid", "valid_warm")

Space = dict[str, Range | tuple[Any, ...]]  # a range, or choices, by config field

# The paper's ratio and its Sec. 3.4's best; the one field here for which the program compiles anew.
_TRAINED = {"negatives": (1, 4)}
_SCRATCH = {"learning_rate": Range(1e-4, 1e-2), **_TRAINED}
_FACTORS = {**_SCRATCH, "l2": Range(1e-4, 1e-1)}
_TOWERS = {**_SCRATCH, "dropout": Range(0.0, 0.5, log=False)}
_BOTH = {"target_weight": Range(0.5, 0.95, log=False)}
_PENALTY = Range(1e-6, 1e-2)
_CONET = {**_TOWERS, **_BOTH}
# The constants of a factorisation are searched within each run (``run.tune``).
_RECIPE = {"learning_rate": Range(1e-3, 6e-3), "dropout": Range(0.0, 0.3, log=False)}
_RECIPE_BOTH = {**_RECIPE, **_BOTH}
_IALS = {"layers": ((64, 32), (128, 64), (256, 128))}  # 32, 64, 128 factors
_EASE = {"ease_regularization": Range(3.0, 3000.0)}
_EMCDR = {
    **_IALS,
    "ials_regularization": Range(10.0, 1000.0),
    "ials_alpha": Range(5.0, 500.0),
    "map_ridge": Range(1e-3, 1.0),
}
SPACES: dict[str, Space] = {
    "recipe": {**_RECIPE_BOTH, "l1": Range(1e-6, 1e-4)},
    "recipe_conet": _RECIPE_BOTH,
    "recipe_joint_mlp": _RECIPE,
    "recipe_mlp": _RECIPE,
    "conet": _CONET,
    "lasso": {**_CONET, "l1": _PENALTY},
    "mlp": _TOWERS,
    "bprmf": _FACTORS,
    "cmf": {**_FACTORS, **_BOTH},
    "cmf_squared": {**_FACTORS, **_BOTH, "negative_weight": Range(0.1, 1.0)},
    "fm": _FACTORS,
    "mlp_shared": _CONET,
    "cross_stitch": _CONET,
    "pretrain": _TOWERS,
    "dropout": _CONET,
    "l2": {**_CONET, "l2": _PENALTY},
    "low_rank": _CONET,
    "per_direction": _CONET,
    "skip": _CONET,
    "unequal": _CONET,
    "group_lasso": {**_CONET, "l1": _PENALTY},
    "popularity": {},
    "ials": _IALS,
    "ials_joined": _IALS,
    "emcdr": _EMCDR,
    "emcdr_mlp": _EMCDR,
    "lightgcn": {"learning_rate": Range(1e-3, 1e-2), **_TRAINED, "l2": Range(1e-4, 1e-1)},
    "ease": _EASE,
    "ease_joined": _EASE,
    "ease_bridged": {**_EASE, "ease_source_weight": Range(0.02, 1.0)},
}
# Of a variant without an entry: what every model that is trained by gradients has.
SPACES |= {name: _SCRATCH for name in METHODS if name not in SPACES}


def trials(method: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draws what a search tries.

    Args:
      method: a key of ``SPACES``.
      count: number of trials; a larger one begins with those of a smaller.
      seed: of the draws.

    Returns:
      Overrides of config fields, those of the first trial empty; one trial if there is nothing to
      choose.

    Example:
      >>> trials("ease", 2)[0], trials("popularity", 2)
      ({}, [{}])
    """
    space = SPACES[method]
    if not space:
        return [{}]
    return [{}, *draws(space, count - 1, [seed, zlib.crc32(method.encode())])]


def draws(space: Space, count: int, seed: int | Sequence[int]) -> list[dict[str, Any]]:
    """Draws overrides of config fields from a space; a larger count begins with a smaller's.

    Example:
      >>> draws({"l1": Range(1e-6, 1e-4), "negatives": (1, 4)}, 2, seed=0)
      [{'l1': 1.88e-05, 'negatives': 4}, {'l1': 1.21e-06, 'negatives': 1}]
    """
    rng = np.random.default_rng(seed)
    return [{field: _draw(rng, values) for field, values in space.items()} for _ in range(count)]


def _draw(rng: np.random.Generator, values: Range | tuple[Any, ...]) -> Any:
    if not isinstance(values, Range):
        return values[rng.integers(len(values))]
    if values.log:
        drawn = np.exp(rng.uniform(np.log(values.low), np.log(values.high)))
    else:
        drawn = rng.uniform(values.low, values.high)
    # Short enough to be typed in a command, and the same number there.
    return min(max(float(f"{drawn:.3g}"), values.low), values.high)


class SealedError(RuntimeError):
    """The test split was used where only validation may be: a bug of ours, not of the input."""


class _NoTestSplit:
    """Stands for the test split in a search."""

    def _refuse(self, *args: Any) -> NoReturn:
        raise SealedError("a search must not look at the test split")

    __getattribute__ = __iter__ = __len__ = __getitem__ = __bool__ = __array__ = _refuse
    __eq__ = __hash__ = _refuse


def without_test(dataset: Dataset) -> Dataset:
    """Returns the data with a test split that raises ``SealedError`` on any use."""
    return dataset._replace(test=_NoTestSplit())


def validation_of(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what an epoch's row says of validation: every part by its name."""
    return {name: row[name] for name in PARTS if name in row}


def evaluate(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """Trains without writing files, and values the run on validation alone.

    Args:
      config: of the run.
      dataset: the data; its test split is not read.

    Returns:
      ``valid`` (metrics of the best epoch), ``best_epoch``, ``epochs``, ``seconds``.

    Raises:
      InputError: the config does not fit the data, EASE has too many items, or the run diverged.
    """
    since = time.perf_counter()
    experiment = make_experiment(config, without_test(dataset))
    found: dict[str, Any] = {}
    for end in loop.train(experiment, initial_state(experiment)):
        if end.better:
            found = validation_of(end.row)
        found |= {"best_epoch": end.progress.best_epoch, "epochs": end.progress.epoch}
        del end
    return {**found, "seconds": round(time.perf_counter() - since, 3)}


def columns(record: dict[str, Any], k: int) -> dict[str, float | None]:
    """Returns a column for each of ``metrics.METRICS`` on validation, None where there is none.

    Args:
      record: of a run or an epoch; one that failed has no ``valid``.
      k: the cut.

    Example:
      >>> columns({"valid": {"ndcg@10": 0.25}}, 10)["ndcg@10"]
      0.25
    """
    return {
        f"{part.removeprefix('valid')} {metric.key(k)}".strip(" _"): record.get(part, {}).get(
            metric.key(k)
        )
        for part in PARTS
        for metric in metrics.METRICS
    }


def value_of(record: dict[str, Any], k: int) -> float | None:
    """Returns the number by which trials, points and epochs are chosen: warm validation NDCG.

    Args:
      record: of a run or an epoch; one that failed has no ``valid_warm``.
      k: the cut of NDCG.

    Example:
      >>> value_of({"valid_warm": {"ndcg@10": 0.25}}, 10), value_of({"failed": "diverged"}, 10)
      (0.25, None)
    """
    return ranking.chosen_by(record, k) if "valid_warm" in record else None


def best_trial(trials: Sequence[dict[str, Any]], k: int) -> int | None:
    """Returns the index of the best by ``value_of``, of equals the first.

    Args:
      trials: records of their runs.
      k: the cut of NDCG.

    Returns:
      The index, None if all trials failed.
    """
    values = [value_of(trial, k) for trial in trials]
    best = max(range(len(values)), key=lambda at: -1.0 if values[at] is None else values[at])
    return None if values[best] is None else best
