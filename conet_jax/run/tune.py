"""The linear start tunes itself: the constants of implicit ALS, searched on warm validation.

They decide the start, and are not the same on any two data sets (docs/recipe.md). A point is
(regularization / alpha, alpha, weight of the source), each drawn uniformly in its
logarithm: good points lie along a ridge where the ratio hardly changes. The first point is the
config's, the rest spread evenly over ``_RANGES``; then two rounds draw around the best so far, in a
narrower box each. Each round is a halving: all its points get a few sweeps, the better half as many
again. The best few of all go on to the end, and from the best of these a walk along the ridge, in
runs to the end as well: few sweeps are too kind to constants that are too small.

Best is by NDCG on warm validation. Towers on top of the factors see how many pairs an item has, and
take off what the factors make too much of it; so a point of theirs may do so too, by the best of
``_BIASES``. Without that the search stops at constants that are too small for the recipe (books:
.2337 on validation, five seeds, where larger ones have .2380).

Where a recipe has neighbours, the weight of their term at the start is chosen last: of ``_WEIGHTS``
the best with these factors. It is 4 for books and 1 for phones (docs/recipe.md has the table).

Nothing is drawn at random and the config's seed does not enter: runs that differ in it share the
constants.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conet_jax import devices, models
from conet_jax.data.types import Dataset, HeldOut, trained_items, warm
from conet_jax.errors import Diverged
from conet_jax.models import ials, neighbours
from conet_jax.models.base import Sizes
from conet_jax.train import ranking

# regularization / alpha, alpha, weight of the source's squared errors.
_RANGES = np.log([(1.0, 20.0), (5.0, 1000.0), (0.05, 1.0)])
_FIRST = 3 / 8  # share of the points that are spread over the ranges ...
_WIDTHS = (0.5, 0.25)  # ... and of the ranges' widths, those of the boxes of the others
_STRIDE = 1.5  # of the walk: factor on regularization and alpha
_SWEEPS = 3  # of a point; of the better half of a round twice as many
_LAST = 3  # points that go on to the end
_BIASES = (0.0, -0.1, -0.05, -0.02, 0.02, 0.05)  # of log(1 + pairs) beside x^T y / |x|
_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the neighbours' term at the start


class Tuning(NamedTuple):
    """What a search has found.

    Attributes:
      constants: config fields with their values.
      ndcg: of the factorisation with them, NDCG on warm validation at the config's first cut.
      trials: points tried.
      seconds: that the search took.
    """

    constants: dict[str, float]
    ndcg: float
    trials: int
    seconds: float


class _Asked(NamedTuple):
    """All that a search reads of a config.

    Attributes:
      model: its name.
      options: of the factorisation; its constants are the first point.
      trials: points.
      sweeps: of a point that goes on to the end.
      k: the cut of NDCG.
      neighbours: whose weight is chosen; 0 is none.
      inner_weight: of the factors' term, beside that of the neighbours.
    """

    model: str
    options: ials.Options
    trials: int
    sweeps: int
    k: int
    neighbours: int
    inner_weight: float


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
    before = {"neighbour_weight": config.neighbour_weight}  # runs that did not choose it
    names = models.tuned_fields(config)
    return {name: values[name] if name in values else before[name] for name in names}


def resolved(config: ConfigDict, constants: dict[str, float] | None) -> ConfigDict:
    """Returns a config with the constants that its search has found; None changes nothing."""
    if constants is None:
        return config
    config = config.copy_and_resolve_references()
    config.update({"ials_trials": 0, **constants})
    return config


_FOUND: ContextVar[dict[Any, Tuning] | None] = ContextVar("found", default=None)


@contextlib.contextmanager
def searching_once() -> Iterator[None]:
    """Within it a search whose answer is known takes no time: for studies, of many runs.

    Runs ask the same whose data have one hash, and whose configs agree in what the search reads.
    """
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


def search(
    config: ConfigDict, dataset: Dataset, interactions: Any, mesh: jax.sharding.Mesh | None = None
) -> Tuning:
    """Searches for the constants of a config's factorisation; the test split is not read.

    Args:
      config: of a run; its constants are the first of ``ials_trials`` points.
      dataset: the data; its validation items are ranked.
      interactions: its training pairs by domain.
      mesh: the devices, all of which work on one point; None is one.

    Returns:
      The constants, to three digits.
    """
    chosen = "neighbour_weight" in models.tuned_fields(config)
    asked = _Asked(
        config.model,
        models.factorisation(config),
        config.ials_trials,
        config.ials_sweeps,
        config.eval_k[0],
        config.neighbours if chosen else 0,
        config.inner_weight,
    )
    known = _FOUND.get()
    if known is None:
        return _search(asked, dataset, interactions, mesh)
    key = asked, dataset.meta["hash"], mesh
    if key in known:
        return known[key]._replace(seconds=0.0)
    return known.setdefault(key, _search(asked, dataset, interactions, mesh))


def _search(
    asked: _Asked, dataset: Dataset, interactions: Any, mesh: jax.sharding.Mesh | None
) -> Tuning:
    since = time.perf_counter()
    options, trials, sweeps, k = asked.options, asked.trials, asked.sweeps, asked.k
    sizes = Sizes(dataset.num_users, dataset.target.num_items, dataset.source.num_items)
    pairs = ials.matrix(interactions, sizes, joined=options.joined, mesh=mesh)
    drawn = ials.drawn(jax.random.key(0), sizes, options, pairs.mesh)
    listed = _warm_validation(dataset)
    biases = _BIASES if asked.model != "ials" else _BIASES[:1]
    ndcg = _value(dataset, listed, biases, k, pairs.mesh)

    def improved(trial: _Trial, sweeps: int) -> _Trial:
        tables = ials.sweep(pairs, trial.tables, trial.options, sweeps=sweeps)
        return trial._replace(tables=tables, ndcg=ndcg(tables))

    first = np.array(_point(options))
    low, high = _RANGES[: len(first)].T
    few, tried = min(_SWEEPS, sweeps), []
    rounds = _rounds(trials)
    for count, width in rounds:
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
        while half:
            tried.append(improved(half.pop(0), again))
        tried = sorted(tried, key=_ndcg, reverse=True)[:_LAST]
    left = max(0, sweeps - 2 * _SWEEPS)
    best = max((improved(trial, left) for trial in tried), key=_ndcg)
    walk = trials - sum(count for count, _ in rounds)
    for stride in (_STRIDE, 1 / _STRIDE):
        moved = False
        while walk:
            walk -= 1
            point = best.point + np.eye(len(first))[1] * math.log(stride)  # the ratio stays
            new = improved(_Trial(point, _options(point, options), drawn, -math.inf), sweeps)
            if new.ndcg <= best.ndcg:
                break
            best, moved = new, True
        if moved:
            break
    found = best.options.constants()
    if asked.neighbours and best.ndcg > -math.inf:
        given = asked, interactions, sizes, best, listed, pairs.mesh
        found["neighbour_weight"] = _neighbour_weight(*given)
    return Tuning(found, best.ndcg, trials, time.perf_counter() - since)


def _warm_validation(dataset: Dataset) -> HeldOut:
    """The warm validation items among candidates that are warm."""
    valid = dataset.valid
    kept, mask = warm(valid, trained_items(dataset.target))
    return HeldOut(valid.users[kept], valid.items[kept], valid.candidates[kept], mask[kept])


def _value(
    dataset: Dataset, listed: HeldOut, biases: Sequence[float], k: int, mesh: jax.sharding.Mesh
) -> Callable[[dict[str, jax.Array]], float]:
    """Returns the value of tables: NDCG of the warm validation items under the best bias."""
    counts = np.bincount(dataset.target.indices, minlength=dataset.target.num_items)
    of_items = np.outer(np.log1p(counts), biases).astype(np.float32)
    item_biases = devices.spread(of_items, mesh)

    def value(tables: dict[str, jax.Array]) -> float:
        projected = {"user": tables["user"], "item": tables["target_item"]}
        projected["item_biases"] = item_biases
        try:
            # Processes on unlike processors must take the same way.
            return round(max(_ndcgs(_biased, projected, listed, k)), 12)
        except Diverged:
            return -math.inf

    return value


def _ndcgs(
    scores: Callable[..., jax.Array], projected: dict[str, Any], listed: HeldOut, k: int
) -> list[float]:
    """NDCG by each of some scores, see ``ranking.rank_many``."""
    ranked = ranking.rank_many(scores, projected, listed)
    return [ranking.summarize(ranks, k=k)[f"ndcg@{k}"] for ranks in ranked]


def _biased(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Scores under each bias f32[n, biases, c]: what of a user's length is the same for all."""
    x = projected["user"][users]
    x /= jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), jnp.finfo(x.dtype).tiny)
    dots = jnp.einsum("nd,ncd->nc", x, projected["item"][items])
    return dots[:, None] + jnp.moveaxis(projected["item_biases"][items], -1, 1)


def _neighbour_weight(
    asked: _Asked,
    interactions: Any,
    sizes: Sizes,
    best: _Trial,
    listed: HeldOut,
    mesh: jax.sharding.Mesh,
) -> float:
    """The best of ``_WEIGHTS`` for the term of the neighbours beside that of a trial's factors."""
    domains = ("target", "source") if best.options.joined else ("target",)
    near = neighbours.fit(interactions, sizes, domains, asked.neighbours, ("target",), mesh)
    v = np.asarray(neighbours.weights("target", domains, 1.0))
    num_ids = sizes.target_items + sizes.source_items * best.options.joined
    options = {"num_ids": num_ids, "size": asked.neighbours, "domains": domains}
    project = partial(neighbours.project, **options)
    specs = ranking.specs_of(jax.eval_shape(project, near, v))
    projected = {
        **jax.jit(devices.mapped(project, mesh, (devices.SPLIT, devices.SAME), specs))(near, v),
        "user": best.tables["user"] * asked.inner_weight,
        "item": best.tables["target_item"],
    }
    values = _ndcgs(_with_neighbours, projected, listed, asked.k)
    return _WEIGHTS[int(np.argmax(values))]


def _with_neighbours(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Scores under each weight f32[n, weights, c]."""
    vectors = projected["user"][users], projected["item"][items]
    sums = neighbours.scores(projected, users, items)
    weighed = jnp.array(_WEIGHTS)[None, :, None] * sums[:, None]
    return jnp.einsum("nd,ncd->nc", *vectors)[:, None] + weighed


def rounded(value: float) -> float:
    """Returns a constant as it is typed and printed.

    >>> rounded(422.76)
    423.0
    """
    return float(f"{value:.3g}")


def _ndcg(trial: _Trial) -> float:
    return trial.ndcg


def _rounds(trials: int) -> list[tuple[int, float]]:
    """Returns the points and the width of each round with any; what is left is for the walk."""
    first = min(trials, math.ceil(_FIRST * trials))
    each = (trials - first) // (len(_WIDTHS) + 1)
    rounds = [(first, 1.0), *((each, width) for width in _WIDTHS)]
    return [(count, width) for count, width in rounds if count]


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
