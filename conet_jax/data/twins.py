"""Twins: items of the two domains that are one product under two ids.

A held-out pair of the target then also stands in the source, and a nearest-neighbour scorer looks
it up. Two items are twins if at least three users are shared and the Jaccard index of their sets
of users reaches a threshold.
"""

import numpy as np

MIN_SHARED_USERS = 3
_CHUNK = 1 << 24  # pairs looked at together: some hundred MiB


def find_twins(
    target_users: np.ndarray,
    target_items: np.ndarray,
    source_users: np.ndarray,
    source_items: np.ndarray,
    jaccard: float,
) -> np.ndarray:
    """All pairs (target item, source item) of twins, exactly.

    A prefix-filter join: with the users in any fixed order, sets x and y of Jaccard index >= t
    share one of the first |x| - ceil(t |x|) + 1 users of x and of the first
    |y| - ceil(t |y|) + 1 of y. Rare users first keeps the pairs to be verified few.

    Args:
      target_users: int[n], with ``target_items`` the distinct pairs of the target.
      target_items: int[n].
      source_users: int[m], with ``source_items`` the distinct pairs of the source.
      source_items: int[m].
      jaccard: the threshold t, in (0, 1].

    Returns:
      int64[pairs, 2], sorted.

    Example:
      >>> users, items = np.array([0, 1, 2, 2]), np.array([0, 0, 0, 1])
      >>> print(find_twins(users, items, users, 5 + items, 1.0))  # with 3 users or more
      [[0 5]]
    """
    num_users = 1 + max(target_users.max(initial=-1), source_users.max(initial=-1))
    activity = np.bincount(target_users, minlength=num_users) + np.bincount(
        source_users, minlength=num_users
    )
    rank = np.empty(num_users, np.int64)
    rank[np.argsort(activity, kind="stable")] = np.arange(num_users)
    target = _by_item(rank[target_users], target_items)
    source = _by_item(rank[source_users], source_items)
    left_users, left_items = _prefixes(*target, jaccard)
    right_users, right_items = _prefixes(*source, jaccard)
    low = np.searchsorted(right_users, left_users, side="left")
    count = np.searchsorted(right_users, left_users, side="right") - low
    span = np.int64(source[0].size)  # number of source items + 1: pairs as one number
    found = []
    for part in _chunks(count):
        at = np.repeat(low[part], count[part]) + _ranges(count[part])
        x, y = np.repeat(left_items[part], count[part]), right_items[at]
        sizes = np.diff(target[0])[x], np.diff(source[0])[y]
        # Sets of too unequal size cannot reach the threshold.
        alike = np.minimum(*sizes) >= jaccard * np.maximum(*sizes) * (1 - 1e-12)
        found.append(np.unique(x[alike] * span + y[alike]))
    pairs = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    pairs = np.stack([pairs // span, pairs % span], axis=1)
    return pairs[_verified(pairs, target, source, num_users, jaccard)]


def _by_item(ranks: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CSR by item, users as their ranks, rare first."""
    order = np.lexsort((ranks, items))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(items))]).astype(np.int64)
    return indptr, ranks[order]


def _prefixes(
    indptr: np.ndarray, ranks: np.ndarray, jaccard: float
) -> tuple[np.ndarray, np.ndarray]:
    """(user rank, item) for the prefix of every item with enough users, sorted by user."""
    size = np.diff(indptr)
    length = size - np.ceil(jaccard * size * (1 - 1e-12)).astype(np.int64) + 1
    length = np.where(size >= MIN_SHARED_USERS, np.minimum(length, size), 0)
    items = np.repeat(np.arange(len(size)), length)
    users = ranks[np.repeat(indptr[:-1], length) + _ranges(length)]
    order = np.argsort(users, kind="stable")
    return users[order], items[order]


def _verified(
    pairs: np.ndarray,
    target: tuple[np.ndarray, np.ndarray],
    source: tuple[np.ndarray, np.ndarray],
    num_users: int,
    jaccard: float,
) -> np.ndarray:
    sizes = np.diff(target[0])[pairs[:, 0]], np.diff(source[0])[pairs[:, 1]]
    owner = np.repeat(np.arange(len(source[0]) - 1), np.diff(source[0]))
    keys = owner * num_users + source[1]  # sorted: by item, users in rank order
    shared = np.zeros(len(pairs), np.int64)
    for part in _chunks(sizes[0]):
        length = sizes[0][part]
        users = target[1][np.repeat(target[0][pairs[part, 0]], length) + _ranges(length)]
        wanted = np.repeat(pairs[part, 1], length) * num_users + users
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        which = np.repeat(np.arange(len(length)), length)
        shared[part] = np.bincount(which[keys[at] == wanted], minlength=len(length))
    union = sizes[0] + sizes[1] - shared
    return (shared >= MIN_SHARED_USERS) & (shared / np.maximum(union, 1) >= jaccard)


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
