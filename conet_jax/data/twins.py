"""Twins: items of the two domains that are one product under two ids.

A held-out pair of the target then also stands in the source, and a nearest-neighbour scorer looks
it up. Two items are twins if they share enough users and the Jaccard index of their sets of users
reaches a threshold.
"""

import numpy as np

from conet_jax.data.types import HeldOut, UserItems

_CHUNK = 1 << 21  # pairs of items looked at together: some hundred MiB


def find_twins(
    target_users: np.ndarray,
    target_items: np.ndarray,
    source_users: np.ndarray,
    source_items: np.ndarray,
    jaccard: float,
    min_users: int,
) -> np.ndarray:
    """All pairs (target item, source item) of twins, exactly.

    Each target item meets the source items of each of its users: how often a pair of items meets
    is the number of users that they share. Pairs of too unequal sizes are left out before they are
    counted. Time and memory grow with the sum over users of (target items) x (source items).

    Args:
      target_users: int[n], with ``target_items`` the distinct pairs of the target.
      target_items: int[n].
      source_users: int[m], with ``source_items`` the distinct pairs of the source.
      source_items: int[m].
      jaccard: the threshold t, in (0, 1].
      min_users: the number m of users that twins share at least, from 1.

    Returns:
      int64[pairs, 2], sorted.

    Example:
      >>> users, items = np.array([0, 1, 2, 2]), np.array([0, 0, 0, 1])
      >>> print(find_twins(users, items, users, 5 + items, 1.0, 2))  # item 1 has one user
      [[0 5]]
    """
    sizes = np.bincount(target_items), np.bincount(source_items)
    num_users = 1 + max(target_users.max(initial=-1), source_users.max(initial=-1))
    order = np.argsort(target_items, kind="stable")
    left_users, left_items = target_users[order], target_items[order]
    right = source_items[np.argsort(source_users, kind="stable")]
    count = np.bincount(source_users, minlength=num_users)
    start = np.concatenate([[0], np.cumsum(count)])
    count = count[left_users]
    ends = np.cumsum(sizes[0])  # where the pairs of each target item end
    work = np.diff(np.concatenate([[0], np.cumsum(count)])[np.concatenate([[0], ends])])
    span = np.int64(len(sizes[1]))  # number of source items: a pair of items as one number
    found = [np.empty((0, 2), np.int64)]
    for items in _chunks(work):
        rows = slice(ends[items.start] - sizes[0][items.start], ends[items.stop - 1])
        x = np.repeat(left_items[rows], count[rows])
        y = right[np.repeat(start[left_users[rows]], count[rows]) + _ranges(count[rows])]
        small, large = np.minimum(sizes[0][x], sizes[1][y]), np.maximum(sizes[0][x], sizes[1][y])
        alike = (small >= min_users) & (small >= jaccard * large * (1 - 1e-12))
        keys, shared = np.unique(x[alike] * span + y[alike], return_counts=True)
        pairs = np.stack([keys // span, keys % span], axis=1)
        union = sizes[0][pairs[:, 0]] + sizes[1][pairs[:, 1]] - shared
        found.append(pairs[(shared >= min_users) & (shared / union >= jaccard)])
    return np.concatenate(found)


def share_in_source(held: HeldOut, twins: np.ndarray, source: UserItems) -> float:
    """Share of held-out target pairs of which a twin is among the user's source items.

    Args:
      held: held-out pairs of the target.
      twins: int[pairs, 2] from ``find_twins``.
      source: the source's training pairs.

    Returns:
      In [0, 1]; 0 where nothing is held out.
    """
    if not len(held.users):
        return 0.0
    keys = np.repeat(np.arange(len(source.indptr) - 1), np.diff(source.indptr))
    keys = keys * source.num_items + source.indices  # sorted
    low = np.searchsorted(twins[:, 0], held.items, side="left")
    count = np.searchsorted(twins[:, 0], held.items, side="right") - low
    owner = np.repeat(np.arange(len(count)), count)
    twin = twins[np.repeat(low, count) + _ranges(count), 1]
    wanted = held.users[owner].astype(np.int64) * source.num_items + twin
    has = np.append(keys, -1)[np.searchsorted(keys, wanted)] == wanted
    return len(np.unique(owner[has])) / len(held.users)


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0 .. l-1 for each l, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _chunks(sizes: np.ndarray) -> list[slice]:
    """Consecutive slices whose sizes add up to about ``_CHUNK`` each."""
    total = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        before = total[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(total, before + _CHUNK, "right"))))
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
