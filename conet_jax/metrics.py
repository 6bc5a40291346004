r"""Ranking metrics of one held-out item among candidates, with ties by expectation.

A rank under ties is a pair of counts: ``above``, the candidates that score strictly higher than the
held-out item, and ``tied``, those that score the same (the item itself is counted in neither). The
item's place r is then uniform on above + 1, …, above + tied + 1, and every metric here is its
expected value over that. So a constant scorer gets what chance gives, and the order in which the
candidates are listed does not matter.

All functions work elementwise on users. NumPy arrays, lists and numbers give NumPy float64; JAX
arrays give JAX arrays, also under ``jit`` and ``vmap``.

``METRICS`` lists what is reported: one entry there, and every file, table and plot shows it.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Array = np.ndarray | jax.Array


def _arrays(*counts: ArrayLike) -> tuple[ModuleType, Any, list[Any]]:
    """The array module of the counts (NumPy unless one is a JAX array), its float, the counts."""
    xp: Any = jnp if any(isinstance(count, jax.Array) for count in counts) else np
    arrays = [xp.asarray(count) for count in counts]
    for array in arrays:
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"counts of candidates must be integers, got {array.dtype}")
    return xp, np.float64 if xp is np else jnp.result_type(float), arrays


def _expected_gain(above: ArrayLike, tied: ArrayLike, gains: np.ndarray) -> Array:
    """Mean over the possible places r of ``gains[r - 1]``, which is 0 beyond its end."""
    xp, dtype, (above, tied) = _arrays(above, tied)
    k = len(gains)
    # With sums[r] the gain of places 1 to r, a run of tied places is a difference of two sums.
    sums = xp.asarray(np.concatenate([[0.0], np.cumsum(gains)]), dtype=dtype)
    first, last = xp.clip(above, 0, k), xp.clip(above + tied + 1, 0, k)
    return (sums[last] - sums[first]) / (tied + 1).astype(dtype)


def _check_cut(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"the cut k must be an integer of at least 1, got {k!r}")
    return int(k)


def hit_ratio(above: ArrayLike, tied: ArrayLike, *, k: int) -> Array:
    """HR@k: the probability that the held-out item is among the first k.

    ``min(max(k - above, 0), tied + 1) / (tied + 1)``.

    Args:
      above: i32[...], candidates that score strictly higher than the held-out item.
      tied: i32[...], candidates that score the same.
      k: the cut, at least 1; not traced.

    Returns:
      f64[...] for NumPy input, f32[...] (f64 under x64) for JAX input; in [0, 1].

    Raises:
      ValueError: k is below 1 or not an integer, or the counts are not integers.

    Example:
      >>> print(hit_ratio([0, 9, 10, 0], [0, 0, 0, 99], k=10).tolist())
      [1.0, 1.0, 0.0, 0.1]
    """
    return _expected_gain(above, tied, np.ones(_check_cut(k)))


def ndcg(above: ArrayLike, tied: ArrayLike, *, k: int) -> Array:
    """NDCG@k of one relevant item: the expectation of 1 / log2(r + 1), 0 beyond place k.

    Args:
      above: i32[...], candidates that score strictly higher than the held-out item.
      tied: i32[...], candidates that score the same.
      k: the cut, at least 1; not traced.

    Returns:
      f64[...] for NumPy input, f32[...] (f64 under x64) for JAX input; in [0, 1].

    Raises:
      ValueError: k is below 1 or not an integer, or the counts are not integers.

    Example:
      >>> print(ndcg([0, 1, 2, 10], [0, 0, 0, 0], k=10).round(3).tolist())
      [1.0, 0.631, 0.5, 0.0]
    """
    return _expected_gain(above, tied, 1 / np.log2(np.arange(2, _check_cut(k) + 2)))


def mrr(above: ArrayLike, tied: ArrayLike, *, k: int) -> Array:
    """MRR@k: the expectation of 1 / r, 0 beyond place k.

    Args:
      above: i32[...], candidates that score strictly higher than the held-out item.
      tied: i32[...], candidates that score the same.
      k: the cut, at least 1; not traced.

    Returns:
      f64[...] for NumPy input, f32[...] (f64 under x64) for JAX input; in [0, 1].

    Raises:
      ValueError: k is below 1 or not an integer, or the counts are not integers.

    Example:
      >>> print(mrr([0, 1, 0, 10], [0, 0, 1, 0], k=10).tolist())
      [1.0, 0.5, 0.75, 0.0]
    """
    return _expected_gain(above, tied, 1 / np.arange(1, _check_cut(k) + 1))


def mrr_published(above: ArrayLike, tied: ArrayLike, *, k: int) -> Array:
    """MRR@k as CoNet's published code computes it: a miss counts 1 / (k + 1), not 0.

    ``mrr + (1 - hit_ratio) / (k + 1)``. For comparison with the paper's Table 2 only.

    Args:
      above: i32[...], candidates that score strictly higher than the held-out item.
      tied: i32[...], candidates that score the same.
      k: the cut, at least 1; not traced.

    Returns:
      f64[...] for NumPy input, f32[...] (f64 under x64) for JAX input; in [1 / (k + 1), 1].

    Raises:
      ValueError: k is below 1 or not an integer, or the counts are not integers.

    Example:
      >>> print(mrr_published([0, 10], [0, 0], k=9).tolist())
      [1.0, 0.1]
    """
    return mrr(above, tied, k=k) + (1 - hit_ratio(above, tied, k=k)) / (k + 1)


def auc(above: ArrayLike, tied: ArrayLike, num_candidates: ArrayLike) -> Array:
    """AUC: the probability that the held-out item scores above a random candidate.

    ``(num_candidates - above - tied / 2) / num_candidates``: a tie counts one half.

    Args:
      above: i32[...], candidates that score strictly higher than the held-out item.
      tied: i32[...], candidates that score the same.
      num_candidates: i32, broadcastable with the counts: the number of candidates of each user,
        without the held-out item and without masked candidates.

    Returns:
      f64[...] for NumPy input, f32[...] (f64 under x64) for JAX input; in [0, 1], and NaN where
      there is no candidate.

    Raises:
      ValueError: the counts are not integers.

    Example:
      >>> print(auc([0, 99, 0, 49], [0, 0, 99, 1], 99).tolist())
      [1.0, 0.0, 0.5, 0.5]
    """
    xp, dtype, (above, tied, num_candidates) = _arrays(above, tied, num_candidates)
    won = 2 * (num_candidates - above) - tied  # in half candidates, so that it is exact
    total = 2 * num_candidates
    ratio = won.astype(dtype) / xp.maximum(total, 1).astype(dtype)
    return xp.where(total > 0, ratio, np.nan)


class Metric(NamedTuple):
    """A metric that is reported.

    Attributes:
      name: in files; with the cut k appended, as in ``ndcg@10``, if it has one.
      label: in tables and plots; with the cut k appended, too.
      function: (above, tied, candidates, k) -> f64[users]; k is the cut of the whole report.
      has_cut: whether it is of the cut k. A metric of a cut of its own has that in its name and
        label: ``Metric("ndcg@5", "NDCG@5", lambda a, t, c, k: ndcg(a, t, k=5), has_cut=False)``.
      higher_is_better: whether it is.
      in_tables: whether tables and plots show it, beside files.
    """

    name: str
    label: str
    function: Callable[[ArrayLike, ArrayLike, ArrayLike, int], Array]
    has_cut: bool = True
    higher_is_better: bool = True
    in_tables: bool = True

    def key(self, k: int) -> str:
        """Returns its name in files, ``ndcg@10``."""
        return f"{self.name}@{k}" if self.has_cut else self.name

    def heading(self, k: int) -> str:
        """Returns its name in tables and plots, ``NDCG@10``."""
        return f"{self.label}@{k}" if self.has_cut else self.label


METRICS = (
    Metric("hit_ratio", "HR", lambda above, tied, _, k: hit_ratio(above, tied, k=k)),
    Metric("ndcg", "NDCG", lambda above, tied, _, k: ndcg(above, tied, k=k)),
    Metric("mrr", "MRR", lambda above, tied, _, k: mrr(above, tied, k=k)),
    Metric(
        "mrr_published",
        "MRR as published",
        lambda above, tied, _, k: mrr_published(above, tied, k=k),
        in_tables=False,
    ),
    Metric(
        "auc",
        "AUC",
        lambda above, tied, candidates, _: auc(above, tied, candidates),
        has_cut=False,
        in_tables=False,
    ),
)


def in_tables() -> list[Metric]:
    """Returns the metrics that tables and plots show.

    >>> [metric.heading(10) for metric in in_tables()]
    ['HR@10', 'NDCG@10', 'MRR@10']
    """
    return [metric for metric in METRICS if metric.in_tables]


def summarize(
    above: ArrayLike, tied: ArrayLike, num_candidates: ArrayLike, *, k: int | Sequence[int]
) -> dict[str, float | int]:
    """Means over users of all metrics, in float64 on the host.

    Args:
      above: i32[users], candidates that score strictly higher than each user's held-out item.
      tied: i32[users], candidates that score the same.
      num_candidates: i32[users] or a number, candidates of each user (at least 1).
      k: the cut of HR, NDCG and MRR, at least 1, or several.

    Returns:
      A mean for each of ``METRICS`` at each cut under its ``key``, "ndcg@10" for one, and "users",
      the number of users, an int.

    Raises:
      ValueError: there is no user, the counts are negative, they exceed the candidates, a user has
        no candidate, or k is below 1.

    Example:
      >>> metrics = summarize([0, 0], [99, 99], 99, k=10)  # a constant scorer
      >>> print(round(metrics["hit_ratio@10"], 12), metrics["auc"], metrics["users"])
      0.1 0.5 2
    """
    above, tied, num_candidates = np.broadcast_arrays(
        *(np.asarray(count) for count in (above, tied, num_candidates))
    )
    if above.size == 0:
        raise ValueError("there is no user to average over")
    wrong = (above < 0) | (tied < 0) | (num_candidates < 1) | (above > num_candidates - tied)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"user {i} has {above.flat[i]} candidates above and {tied.flat[i]} tied "
            f"of {num_candidates.flat[i]}"
        )
    means = {
        metric.key(cut): float(np.mean(metric.function(above, tied, num_candidates, cut)))
        for cut in np.atleast_1d(k).tolist()
        for metric in METRICS
    }
    return means | {"users": int(above.size)}


def summarize_lists(
    lists: np.ndarray, popularity: np.ndarray, owned: np.ndarray
) -> dict[str, float | None]:
    """What recommended lists are made of: how much of the catalogue, and how popular it is.

    A model may rank well and yet give everybody the same few items.

    Args:
      lists: int[users, k], recommended items; -1 where a list is shorter.
      popularity: int[items], training pairs of each item.
      owned: int[n], items of the users' own training pairs, to compare with.

    Returns:
      ``coverage``, the share of the items with a training pair that stand in some list;
      ``popularity``, the mean number of training pairs of a listed item; ``pair_popularity``, that
      of an item in ``owned``; ``once_share``, the share of listed items with exactly one training
      pair. An item counts as often as it is listed, but once for ``coverage``. The mean of nothing
      is None.

    Raises:
      ValueError: no item has a training pair, or a listed item has none.

    Example:
      >>> lists, popularity = np.array([[0, 1], [0, -1]]), np.array([4, 1, 1, 2])
      >>> summarize_lists(lists, popularity, owned=np.array([0, 3]))["coverage"]
      0.5
    """
    listed = lists[lists >= 0]
    if not (popularity > 0).any() or not (popularity[listed] > 0).all():
        raise ValueError("lists are of items with a training pair, and one of these has none")

    def mean(values: np.ndarray) -> float | None:
        return float(np.mean(values)) if values.size else None

    return {
        "coverage": len(np.unique(listed)) / int((popularity > 0).sum()),
        "popularity": mean(popularity[listed]),
        "pair_popularity": mean(popularity[owned]),
        "once_share": mean(popularity[listed] == 1),
    }
