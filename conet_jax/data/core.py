"""Filters on pairs of integers: the K-core, and numbers without gaps."""

from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Distinct pairs of one domain, sorted by user, then item."""

    users: np.ndarray  # int64[n]
    items: np.ndarray  # int64[n]
    times: np.ndarray | None  # f64[n]
    weights: np.ndarray | None = None  # f64[n], above 0


def take(pairs: Pairs, which: np.ndarray) -> Pairs:
    """Returns some of the pairs."""
    return Pairs(*(None if column is None else column[which] for column in pairs))


def merge(pairs: Pairs) -> tuple[Pairs, int]:
    """Sorts the pairs, keeps the latest of equal ones, and says how many went."""
    keys = (pairs.items, pairs.users)
    if pairs.times is not None:
        keys = (pairs.times, *keys)
    pairs = take(pairs, np.lexsort(keys))
    last = np.ones(len(pairs.users), bool)
    last[:-1] = (np.diff(pairs.users) != 0) | (np.diff(pairs.items) != 0)
    return take(pairs, last), int((~last).sum())


def k_core(
    pairs: dict[str, Pairs], num_users: int, *, min_user_items: int, min_item_users: int
) -> tuple[dict[str, Pairs], dict[str, dict[str, int]]]:
    """The largest part in which each item has enough users, and each user enough items.

    A user must have them in each of the domains given. Removing never saves anyone, so the fixed
    point does not depend on the order of removal.

    Args:
      pairs: of one domain, or of more whose users go together.
      num_users: one more than the largest user.
      min_user_items: least items of a user in each domain; at least 1 counts.
      min_item_users: least users of an item.

    Returns:
      The pairs that are left, and by domain how many went with an item, and how many with a user.

    Example:
      >>> pairs = Pairs(np.array([0, 0, 1]), np.array([0, 1, 1]), None)
      >>> left, dropped = k_core({"target": pairs}, 2, min_user_items=1, min_item_users=2)
      >>> print(left["target"].users, left["target"].items, dropped)
      [0 1] [1 1] {'target': {'item_core': 1, 'user_core': 0}}
    """
    pairs = dict(pairs)
    dropped = {domain: {"item_core": 0, "user_core": 0} for domain in pairs}
    users_left = np.ones(num_users, bool)
    while True:
        before = sum(len(p.users) for p in pairs.values())
        for domain, p in pairs.items():
            enough = np.bincount(p.items) >= min_item_users if len(p.items) else np.ones(0, bool)
            pairs[domain] = take(p, enough[p.items])
            dropped[domain]["item_core"] += len(p.users) - len(pairs[domain].users)
        for p in pairs.values():
            users_left &= np.bincount(p.users, minlength=num_users) >= max(min_user_items, 1)
        for domain, p in pairs.items():
            pairs[domain] = take(p, users_left[p.users])
            dropped[domain]["user_core"] += len(p.users) - len(pairs[domain].users)
        if sum(len(p.users) for p in pairs.values()) == before:
            return pairs, dropped


def users_by_kind(pairs: dict[str, Pairs], num_users: int) -> list[np.ndarray]:
    """Users of both domains, of the target alone and of the source alone, each in order."""
    target, source = (
        np.bincount(pairs[domain].users, minlength=num_users) > 0 for domain in ("target", "source")
    )
    kinds = (target & source, target & ~source, source & ~target)
    return [np.flatnonzero(kind) for kind in kinds]


def renumber(pairs: Pairs, users: np.ndarray, items: np.ndarray) -> Pairs:
    """Numbers users and items by their places in two lists; pairs of others are left out.

    Args:
      pairs: of one domain.
      users: int[n], the users wanted, in the order wanted.
      items: int[m], the items wanted, in the order wanted.
    """
    columns = []
    for values, wanted in ((pairs.users, users), (pairs.items, items)):
        size = 1 + max(values.max(initial=-1), wanted.max(initial=-1))
        places = np.full(size, -1, np.int64)
        places[wanted] = np.arange(len(wanted))
        columns.append(places[values])
    pairs = pairs._replace(users=columns[0], items=columns[1])
    pairs = take(pairs, (pairs.users >= 0) & (pairs.items >= 0))
    order = np.diff(pairs.users * len(items) + pairs.items)
    return pairs if (order > 0).all() else take(pairs, np.lexsort((pairs.items, pairs.users)))


def _joined(one: Pairs, two: Pairs) -> Pairs:
    both = zip(one, two, strict=True)
    return Pairs(*(None if a is None else np.concatenate([a, b]) for a, b in both))


class Reduced(NamedTuple):
    """What filters leave, renumbered, and which users and items of before these are."""

    pairs: dict[str, Pairs]
    users: np.ndarray  # int64[num_users]: of both domains, of the target alone, of the source alone
    items: dict[str, np.ndarray]
    only: tuple[int, int]  # users of the target alone, of the source alone
    dropped: dict[str, dict[str, int]]  # pairs, by domain and reason


def reduce(
    pairs: dict[str, Pairs],
    num_users: int,
    *,
    users: str,
    min_user_items: int,
    min_item_users: int,
    later: dict[str, Pairs] | None = None,
) -> Reduced:
    """The K-core, without gaps, and the later pairs of its users and items.

    Args:
      pairs: of the two domains.
      num_users: one more than the largest user.
      users: ``shared``, users that have enough items in both domains; ``all``, each domain's own.
      min_user_items: see ``k_core``.
      min_item_users: see ``k_core``.
      later: pairs that decide nothing, and are kept where user and item are.

    Returns:
      ``Reduced``; without any user where nothing is left.
    """
    groups = [pairs] if users == "shared" else [{domain: p} for domain, p in pairs.items()]
    left, dropped = {}, {}
    for group in groups:
        found = k_core(
            group, num_users, min_user_items=min_user_items, min_item_users=min_item_users
        )
        left |= found[0]
        dropped |= found[1]
    kinds = users_by_kind(left, num_users)
    order, items = np.concatenate(kinds), {}
    for domain, p in left.items():
        items[domain] = np.flatnonzero(np.bincount(p.items))
        if later:
            p = _joined(p, later[domain])
        left[domain] = renumber(p, order, items[domain])
        if later:
            unknown = len(p.users) - len(left[domain].users)
            dropped[domain]["later_unknown"] = unknown
    return Reduced(left, order, items, (len(kinds[1]), len(kinds[2])), dropped)
