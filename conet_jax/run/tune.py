"""The linear start tunes itself: the constants of implicit ALS, searched on warm validation.

They decide the start, and are not the same on any two data sets (docs/recipe.md, "The search"). A
point is (regularization / alpha, alpha, weight of the source), each drawn uniformly in its
logarithm: good points lie along a ridge where the ratio hardly changes. The first point is the
config's, the rest spread evenly over ``_RANGES``; then three rounds draw around the best so far, in
narrower and narrower boxes. Each round is a halving: all its points get a few sweeps, the better
half as many again. The best few of all go on to the end, and the best of these is taken.

Nothing is drawn at random and the config's seed does not enter: runs that differ in it share the
constants.
"""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from conet_jax import models
from conet_jax.data.types import Dataset, trained_items
from conet_jax.errors import Diverged
from conet_jax.models import ials
from conet_jax.models.base import Params, Sizes
from conet_jax.train import ranking

# regularization / alpha, alpha, weight of the source's squared errors.
_RANGES = np.log([(1.0, 20.0), (5.0, 1000.0), (0.05, 1.0)])
_FIRST = 3 / 8  # share of the points that are spread over the ranges ...
_WIDTHS = (0.5, 0.33, 0.2)  # ... and of the ranges' widths, those of the boxes of the others
_SWEEPS = 3  # of a point; of the better half of a round twice as many
_LAST = 4  # points that go on to the end


class Tuning(NamedTuple):
    """What a search has found.

    Attributes:
      constants: config fields with their values.
      ndcg: of the factorisation with them, NDCG on warm validation at the config's cut.
      trials: points tried.
      seconds: that the search took.
    """

    constants: dict[str, float]
    ndcg: float
    trials: int
    seconds: float


class _Trial(NamedTuple):
    """A point after some sweeps."""

    point: np.ndarray  # f64[2 or 3], logarithms
    options: ials.Options
    tables: dict[str, jax.Array]
    ndcg: float


def is_due(config: ConfigDict) -> bool:
    """Whether a config's model has a factorisation whose constants are to be searched."""
    return bool(config.ials_trials) and factorised(config)


def factorised(config: ConfigDict) -> bool:
    """Whether a config's model is a factorisation, or starts from one."""
    return models.factorisation(config) is not None


def constants(config: ConfigDict, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the constants of a config's factorisation from values of more.

    Raises:
      LookupError: one is missing.
    """
    return {name: values[name] for name in models.factorisation(config).constants()}


def resolved(config: ConfigDict, constants: dict[str, float] | None) -> ConfigDict:
    """Returns a config with the constants that its search has found; None changes nothing."""
    if constants is None:
        return config
    config = config.copy_and_resolve_references()
    config.update({"ials_trials": 0, **constants})
    return config


def search(config: ConfigDict, dataset: Dataset, interactions: Any) -> Tuning:
    """Searches for the constants of a config's factorisation; the test split is not read.

    Args:
      config: of a run; its constants are the first of ``ials_trials`` points.
      dataset: the data; its validation items are ranked.
      interactions: its training interactions by domain, on one device.

    Returns:
      The constants, to three digits.
    """
    since = time.perf_counter()
    options, k = models.factorisation(config), config.eval_k
    trials, sweeps = config.ials_trials, config.ials_sweeps
    sizes = Sizes(dataset.num_users, dataset.target.num_items, dataset.source.num_items)
    pairs = ials.matrix(interactions, sizes, joined=options.joined)
    drawn = ials.init(jax.random.key(0), sizes, options).tables
    model, trained = ials.build(options), trained_items(dataset.target)

    def improved(trial: _Trial, sweeps: int) -> _Trial:
        tables = ials.sweep(pairs, trial.tables, trial.options, sweeps=sweeps)
        try:
            _, warm = ranking.rank_twice(
                model, Params(tables, {}), interactions, dataset.valid, trained
            )
        except Diverged:
            return trial._replace(tables=tables, ndcg=-math.inf)
        row = {"valid_warm": ranking.summarize(warm.ranks, k=k)}
        return trial._replace(tables=tables, ndcg=ranking.chosen_by(row, k))

    first = np.array(_point(options))
    low, high = _RANGES[: len(first)].T
    few, tried = min(_SWEEPS, sweeps), []
    for count, width in _rounds(trials):
        if not tried:
            points = [first, *_spread(count - 1, low, high)]
        else:
            around = max(tried, key=_ndcg).point + np.outer((-0.5, 0.5), width * (high - low))
            points = _spread(count, *np.clip(around, low, high))
        half: list[_Trial] = []
        for point in points:
            new = improved(_Trial(point, _options(point, options), drawn, -math.inf), few)
            # The worst goes at once: at no time are there more tables than are needed.
            half = sorted([*half, new], key=_ndcg, reverse=True)[: -(-len(points) // 2)]
        again = min(2 * _SWEEPS, sweeps) - few
        tried += [improved(trial, again) for trial in half]
        tried = sorted(tried, key=_ndcg, reverse=True)[:_LAST]
    left = max(0, sweeps - 2 * _SWEEPS)
    best = max((improved(trial, left) for trial in tried), key=_ndcg)
    return Tuning(
        best.options.constants(),
        best.ndcg,
        trials,
        time.perf_counter() - since,
    )


def rounded(value: float) -> float:
    """Returns a constant as it is typed and printed.

    >>> rounded(422.76)
    423.0
    """
    return float(f"{value:.3g}")


def _ndcg(trial: _Trial) -> float:
    return trial.ndcg


def _rounds(trials: int) -> Iterator[tuple[int, float]]:
    """Yields the points and the width of each round, those without points left out."""
    first = min(trials, math.ceil(_FIRST * trials))
    rest = np.array_split(np.arange(trials - first), len(_WIDTHS))
    for count, width in zip([first, *map(len, rest)], (1.0, *_WIDTHS), strict=True):
        if count:
            yield count, width


def _spread(count: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns points f64[count, d] that are spread evenly over a box.

    Those of an additive recurrence: n times the powers of 1 / g, modulo 1, where g > 1 solves
    g^(d + 1) = g + 1 (the golden ratio for d = 1).
    """
    d, g = len(low), 2.0
    for _ in range(64):
        g = (1 + g) ** (1 / (d + 1))
    n = np.arange(1, count + 1)[:, None]
    return low + (high - low) * ((0.5 + n * g ** -np.arange(1.0, d + 1)) % 1)


def _point(options: ials.Options) -> list[float]:
    ratio = options.ials_regularization / options.ials_alpha
    weight = [options.ials_source_weight] if options.joined else []
    return [math.log(value) for value in (ratio, options.ials_alpha, *weight)]


def _options(point: np.ndarray, options: ials.Options) -> ials.Options:
    """Returns the options at a point, to three digits: as they are typed and printed."""
    ratio, alpha, *weight = np.exp(point)
    values = map(rounded, (ratio * alpha, alpha, *weight))
    return options._replace(**dict(zip(options.constants(), values, strict=True)))
