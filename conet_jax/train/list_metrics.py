"""Metrics of users with several held-out items, from where each item stands in the whole list.

The list of a user is the catalogue without what the user has in training (and in validation, for
test): all held-out items of the user stand in one list, and each item's counts (``Ranks``) have the
others among its candidates. Tied items are in random order, and every metric is its expectation.
"""

from collections.abc import Sequence

import numpy as np

from conet_jax import metrics
from conet_jax.data.types import users_and_pairs
from conet_jax.train.ranking import Ranks


def summarize(users: np.ndarray, ranks: Ranks, *, k: int | Sequence[int]) -> dict[str, float | int]:
    """Means over users of recall, precision, HR, NDCG and MRR at each cut.

    Of a user with n held-out items, h of them among the first k: recall is h / n, precision h / k,
    HR whether h > 0, MRR one over the place of the first of them (0 where h = 0), and NDCG the sum
    of 1 / log2(place + 1) over the h, divided by that of min(k, n) items in the first places.

    Args:
      users: int[n], increasing, the user of each held-out item.
      ranks: of the held-out items.
      k: the cut, or several.

    Returns:
      The means, named as ``recall@10``, ``users``, and ``pairs`` where these are more.

    Raises:
      ValueError: there is no user, or as in ``metrics.hit_ratio``.

    Example:
      >>> ranks = Ranks(np.array([0, 2, 9]), np.zeros(3, int), np.full(3, 20))
      >>> found = summarize(np.array([4, 4, 7]), ranks, k=2)  # of user 4 one item is first
      >>> found["recall@2"], found["precision@2"], found["hit_ratio@2"], found["mrr@2"]
      (0.25, 0.25, 0.5, 0.5)
    """
    if not len(users):
        raise ValueError("there is no user to average over")
    means: dict[str, float | int] = {}
    for cut in np.atleast_1d(k).tolist():
        means |= {f"{name}@{cut}": float(x.mean()) for name, x in of_users(users, ranks, cut)}
    return means | users_and_pairs(users)


def of_users(users: np.ndarray, ranks: Ranks, k: int) -> list[tuple[str, np.ndarray]]:
    """Returns names and values f64[distinct users] of the metrics at the cut k."""
    _, starts, counts = np.unique(users, return_index=True, return_counts=True)
    hits = np.add.reduceat(metrics.hit_ratio(ranks.above, ranks.tied, k=k), starts)
    gains = np.add.reduceat(metrics.ndcg(ranks.above, ranks.tied, k=k), starts)
    ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))[np.minimum(counts, k) - 1]
    hit, mrr = _first_hit(ranks, starts, counts, k)
    return [
        ("recall", hits / counts),
        ("precision", hits / k),
        ("hit_ratio", hit),
        ("ndcg", gains / ideal),
        ("mrr", mrr),
    ]


def _first_hit(
    ranks: Ranks, starts: np.ndarray, counts: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each user's first held-out item: P(place <= k), and the expectation of 1 / place there.

    It is among those r with the fewest items above them, a. They are tied with each other, in a run
    of m items. Where none of them was among the first j of the run, the next is one of them with
    probability r / (m - j).
    """
    above = np.asarray(ranks.above, np.int64)
    a = np.minimum.reduceat(above, starts)
    foremost = above == np.repeat(a, counts)
    r = np.add.reduceat(foremost.astype(np.int64), starts)
    m = 1 + np.maximum.reduceat(np.where(foremost, ranks.tied, 0).astype(np.int64), starts)
    none_yet = np.ones(len(starts))
    hit, mrr = np.zeros(len(starts)), np.zeros(len(starts))
    for j in range(k):
        place = a + j + 1
        here = none_yet * np.minimum(r / np.maximum(m - j, 1), 1)
        hit += np.where(place <= k, here, 0)
        mrr += np.where(place <= k, here / place, 0)
        none_yet -= here
    return hit, mrr
