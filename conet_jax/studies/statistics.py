"""Whether two models differ: paired tests over users, who are the same for both."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from conet_jax import metrics

_DRAWS_A_CHUNK = 1 << 22  # 48 MB: an index and a difference each
_ROUNDING = 1e-14  # of a difference of two metrics in [0, 1]


class Bootstrap(NamedTuple):
    """A difference of means over users.

    Attributes:
      mean: the difference.
      low: lower end of the 95% interval.
      high: upper end.
      p: two-sided p of no difference.
    """

    mean: float
    low: float
    high: float
    p: float


def spread_of(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Mean and sample standard deviation, None of a single value.

    >>> spread_of([1.0, 2.0, 3.0])
    {'mean': 2.0, 'std': 1.0}
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def by_user(users: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means over the held-out items of each user, f64[users], so that users are what is tested.

    Args:
      users: int[n], increasing, the user of each value.
      values: f64[n].

    Example:
      >>> by_user(np.array([2, 5, 5]), np.array([0.5, 0.0, 1.0])).tolist()
      [0.5, 0.5]
    """
    _, starts, counts = np.unique(users, return_index=True, return_counts=True)
    return np.add.reduceat(values, starts) / counts if len(starts) else values


def ndcg_by_user(users: np.ndarray, ranks: Any, k: int) -> np.ndarray:
    """Returns the NDCG of each user, f64[users in ascending order], from ``ranking.Ranks``.

    That of a user with several held-out items is their mean.
    """
    return by_user(users, metrics.ndcg(ranks.above, ranks.tied, k=k))


def paired_t_test(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Two-sided p of Student's paired t-test: P(|t| at least as large) with no difference.

    Args:
      ours: f64[users], a metric of each user under one model.
      theirs: f64[users], the same users under another.

    Returns:
      p in [0, 1]; 1 where no user differs.

    Raises:
      ValueError: the arrays are not of one length of at least 2.

    Example:
      >>> print(f"{paired_t_test([0.5, 0.6, 0.9], [0.4, 0.4, 0.6]):.4f}")
      0.0742
      >>> paired_t_test([0.5, 0.6], [0.5, 0.6])
      1.0
    """
    difference = _difference(ours, theirs)
    if np.ptp(difference) < _ROUNDING:  # of no variance, where SciPy gives NaN or warns
        return float(abs(difference[0]) < _ROUNDING)
    from scipy import stats  # half a second, where nothing else needs it

    return float(stats.ttest_rel(ours, theirs).pvalue)


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> Bootstrap:
    """Percentile bootstrap of the difference of means: users are drawn with replacement.

    With d the means of the resamples, the interval is from the 2.5th to the 97.5th percentile of d,
    and ``p = min(1, 2 min(1 + #(d <= 0), 1 + #(d >= 0)) / (1 + resamples))``, which is never 0.

    Args:
      ours: f64[users], a metric of each user under one model.
      theirs: f64[users], the same users under another.
      resamples: number of resamples.
      seed: of the draws.

    Returns:
      ``Bootstrap``.

    Raises:
      ValueError: the arrays are not of one length of at least 2.

    Example:
      >>> paired_bootstrap([0.5, 0.6], [0.5, 0.6])
      Bootstrap(mean=0.0, low=0.0, high=0.0, p=1.0)
    """
    difference = _difference(ours, theirs)
    means = resampled_means(difference, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.025, 0.975])
    beyond = 1 + min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * beyond / (1 + resamples))
    return Bootstrap(float(difference.mean()), float(low), float(high), float(p))


def resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means f64[resamples, …] of values f64[users, …] of users drawn with replacement."""
    users, means = len(values), np.empty((resamples, *values.shape[1:]))
    at_once = max(1, _DRAWS_A_CHUNK // values.size)
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = rng.integers(0, users, (rows, users), dtype=np.int32)
        means[first : first + rows] = values[drawn].mean(axis=1)
    return means


def _difference(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape or len(ours) < 2:
        raise ValueError(
            f"expected the same two users or more in both, got {ours.shape} and {theirs.shape}"
        )
    return ours - theirs
