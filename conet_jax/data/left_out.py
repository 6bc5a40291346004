"""Users who are left out as a whole: those with too many items, or with every one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from conet_jax.data.core import Pairs, Reduced, reduce, renumber, take
from conet_jax.data.ratings import Coded
from conet_jax.errors import InputError


def beyond(coded: Mapping[str, Coded], num_users: int, most: int) -> np.ndarray:
    """Returns the users with more than so many items in a domain, liked or not."""
    counts = [
        np.bincount(np.concatenate([c.positives.users, c.seen.users]), minlength=num_users)
        for c in coded.values()
    ]
    return np.flatnonzero(np.max(counts, axis=0) > most)


def reduce_further(
    pairs: dict[str, Pairs],
    num_users: int,
    reports: dict[str, dict],
    *,
    later: dict[str, Pairs] | None,
    **options: Any,
) -> tuple[dict[str, Pairs], Reduced]:
    """``core.reduce`` without users who have every item that is left; also the pairs before it."""
    while True:
        reduced = reduce(pairs, num_users, later=later, **options)
        full = [_full(p, len(reduced.items[d])) for d, p in reduced.pairs.items()]
        gone = reduced.users[np.unique(np.concatenate(full))]
        if not len(gone):
            return pairs, reduced
        pairs = without(pairs, gone, reports, "has_every_item")
        if later:
            later = without(later, gone, reports, "has_every_item")


def without_full(
    pairs: dict[str, Pairs],
    seen: Pairs,
    known: pl.Series,
    item_ids: dict[str, pl.Series],
    reports: dict[str, dict],
) -> tuple[dict[str, Pairs], Pairs, pl.Series]:
    """Given test items: no core, but no user without items in a domain, or with all of them."""
    full = [_full(p, len(item_ids[domain])) for domain, p in pairs.items()]
    pairs = without(pairs, np.unique(np.concatenate(full)), reports, "has_every_item")
    empty = [np.bincount(p.users, minlength=len(known)) == 0 for p in pairs.values()]
    pairs = without(pairs, np.flatnonzero(np.any(empty, 0)), reports, "user_not_shared")
    users = np.unique(pairs["target"].users)
    if not len(users):
        raise InputError("no user is left: expected users with some of the items of both domains")
    items = {domain: np.arange(len(ids)) for domain, ids in item_ids.items()}
    pairs = {domain: renumber(p, users, items[domain]) for domain, p in pairs.items()}
    return pairs, renumber(seen, users, items["target"]), known.gather(users)


def _full(pairs: Pairs, num_items: int) -> np.ndarray:
    """Users who have every item."""
    return np.flatnonzero(np.bincount(pairs.users) >= max(num_items, 1))


def without(
    pairs: dict[str, Pairs], users: np.ndarray, reports: dict[str, dict], reason: str
) -> dict[str, Pairs]:
    """Leaves users out of both domains, and counts their pairs."""
    left = {domain: take(p, ~np.isin(p.users, users)) for domain, p in pairs.items()}
    for domain, p in pairs.items():
        gone = len(p.users) - len(left[domain].users)
        if gone or reason in reports[domain]:
            reports[domain][reason] = reports[domain].get(reason, 0) + gone
    return left
