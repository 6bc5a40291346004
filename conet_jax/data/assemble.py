"""From pairs of integers to a data set: leave-one-out, candidates, counts, hash."""

from typing import NamedTuple

import numpy as np
import polars as pl

from conet_jax.data import audit, split
from conet_jax.data.types import DOMAINS, HELD_OUT, Dataset, HeldOut, UserItems, content_hash
from conet_jax.errors import InputError


class Pairs(NamedTuple):
    """Distinct pairs of one domain, sorted by user, then item."""

    users: np.ndarray  # int64[n]
    items: np.ndarray  # int64[n]
    times: np.ndarray | None  # f64[n]


def from_arrays(
    target_users: np.ndarray,
    target_items: np.ndarray,
    source_users: np.ndarray,
    source_items: np.ndarray,
    *,
    num_users: int | None = None,
    num_target_items: int | None = None,
    num_source_items: int | None = None,
    candidates: int = 99,
    seed: int = 0,
    split: str = "random",
    target_timestamps: np.ndarray | None = None,
) -> Dataset:
    """Builds a data set from integer pairs, without filters; raw ids are the decimal numbers.

    Args:
      target_users: int[n], each of 0 .. num_users - 1 at least once.
      target_items: int[n].
      source_users: int[m], likewise.
      source_items: int[m].
      num_users: users; one more than the largest index by default.
      num_target_items: likewise.
      num_source_items: likewise.
      candidates: as in ``build``.
      seed: as in ``build``.
      split: as in ``build``.
      target_timestamps: f64[n], needed for ``latest``.

    Returns:
      The data set; of pairs given twice the latest counts.

    Raises:
      InputError: an index is out of range, a user is missing from a domain, or as in ``build``.
    """
    raw = {"target": (target_users, target_items), "source": (source_users, source_items)}
    sizes = {"target": num_target_items, "source": num_source_items}
    raw = {d: (np.asarray(u, np.int64), np.asarray(i, np.int64)) for d, (u, i) in raw.items()}
    if num_users is None:
        num_users = 1 + max(int(u.max(initial=-1)) for u, _ in raw.values())
    pairs, ids = {}, [numbers(num_users)]
    for domain, (users, items) in raw.items():
        num_items = sizes[domain]
        if num_items is None:
            num_items = 1 + int(items.max(initial=-1))
        for what, values, size in (("user", users, num_users), ("item", items, num_items)):
            if len(values) and not 0 <= values.min() <= values.max() < size:
                raise InputError(f"{domain}: {what} index out of range 0 .. {size - 1}")
        if not np.bincount(users, minlength=num_users).all():
            raise InputError(
                f"{domain}: not every user of 0 .. {num_users - 1} occurs: expected each in both "
                "domains"
            )
        times = None
        if domain == "target" and target_timestamps is not None:
            times = np.asarray(target_timestamps, np.float64)
        pairs[domain], _ = merge(Pairs(users, items, times))
        ids.append(numbers(num_items))
    options = {"candidates": candidates, "seed": seed, "split": split}
    return assemble(pairs, tuple(ids), None, report={}, options=options)


def merge(pairs: Pairs) -> tuple[Pairs, int]:
    """Sorts the pairs, keeps the latest of equal ones, and says how many went."""
    keys = (pairs.items, pairs.users)
    if pairs.times is not None:
        keys = (pairs.times, *keys)
    pairs = take(pairs, np.lexsort(keys))
    last = np.ones(len(pairs.users), bool)
    last[:-1] = (np.diff(pairs.users) != 0) | (np.diff(pairs.items) != 0)
    return take(pairs, last), int((~last).sum())


def take(pairs: Pairs, which: np.ndarray) -> Pairs:
    """Returns some of the pairs."""
    return Pairs(*(None if column is None else column[which] for column in pairs))


def held_out_of(
    users: np.ndarray, items: np.ndarray, candidates: np.ndarray, mask: np.ndarray
) -> HeldOut:
    """Returns ``HeldOut`` in its dtypes."""
    return HeldOut(
        *(np.ascontiguousarray(x, np.int32) for x in (users, items, candidates)),
        np.ascontiguousarray(mask, bool),
    )


def assemble(
    pairs: dict[str, Pairs],
    ids: tuple[np.ndarray, np.ndarray, np.ndarray],
    given: HeldOut | None,
    *,
    report: dict,
    options: dict,
) -> Dataset:
    """Splits the target, draws candidates, checks that negatives exist, counts, hashes."""
    if options["candidates"] < 1:
        raise InputError(f"candidates={options['candidates']} must be 1 or more")
    user_ids, num_users, seed = ids[0], len(ids[0]), options["seed"]
    sizes = {domain: len(ids[1 + at]) for at, domain in enumerate(DOMAINS)}
    target = pairs["target"]
    indptr = _indptr(target.users, num_users)
    if given is None:
        test_at, valid_at = split.leave_one_out(
            indptr, split=options["split"], seed=seed, timestamps=target.times
        )
    else:
        keys = target.users * sizes["target"] + target.items
        wanted = given.users.astype(np.int64) * sizes["target"] + given.items
        test_at = np.full(num_users, -1)
        test_at[given.users] = np.searchsorted(keys, wanted)
        valid_at = split.one_more(indptr, test_at, seed=seed)
    if not (test_at >= 0).any():
        raise InputError(
            "no user has two target items or more, so there is nothing to test on: prepare it from "
            "more data or a smaller core"
        )
    train = np.ones(len(target.users), bool)
    train[test_at[test_at >= 0]] = False
    train[valid_at[valid_at >= 0]] = False
    interactions = {
        "target": _interactions(take(target, train), num_users, sizes["target"]),
        "source": _interactions(pairs["source"], num_users, sizes["source"]),
    }

    def draw(at: np.ndarray, purpose: str) -> HeldOut:
        users = np.flatnonzero(at >= 0)
        count = options["candidates"]
        room = sizes["target"] - np.diff(indptr)[users]
        if len(users) and room.min() < count:
            worst = int(room.argmin())
            if room[worst] < 1:
                raise InputError(
                    f"user {user_ids[users[worst]]!r} has all {sizes['target']} target items: no "
                    "untouched one is left to rank the held-out one against; take the user out"
                )
            raise InputError(
                f"user {user_ids[users[worst]]!r} has {room[worst]} untouched target items, fewer "
                f"than the {count} candidates wanted: --candidates={room[worst]} or less "
                "would do"
            )
        rng = split.generator(seed, purpose)
        drawn = split.draw_candidates(indptr, target.items, sizes["target"], users, count, rng)
        return held_out_of(users, target.items[at[users]], drawn, np.ones(drawn.shape, bool))

    test = given if given is not None else draw(test_at, "test candidates")
    parts = {"valid": draw(valid_at, "validation candidates"), "test": test}
    return from_split(interactions, parts, ids, report=report, options=options)


def from_split(
    interactions: dict[str, UserItems],
    parts: dict[str, HeldOut],
    ids: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    report: dict,
    options: dict,
) -> Dataset:
    """Puts together what is split already: checks that negatives exist, counts, hashes.

    Args:
      interactions: training positives by domain.
      parts: held-out items, by the names of ``types.HELD_OUT``; ``valid`` and ``test`` at least.
      ids: raw ids of users, target items and source items.
      report: of the audit, so far.
      options: that the data were made with.

    Raises:
      InputError: a user has no possible negative.
    """
    user_ids, num_users = ids[0], len(ids[0])
    for domain, rows in interactions.items():
        full = np.flatnonzero(np.diff(rows.indptr) >= rows.num_items)
        if len(full):
            raise InputError(
                f"user {user_ids[full[0]]!r} has all {rows.num_items} items of the {domain} as "
                "training positives, so no negative is possible: leave the user out or add items"
            )
    counts = count(interactions, parts)
    report = report | {"cold": audit.coldness_of(parts, interactions)}
    for part in ("test", "valid"):
        report[f"users_without_{part}"] = num_users - len(parts[part].users)
    dataset = Dataset(
        **interactions,
        **parts,
        user_ids=user_ids,
        target_item_ids=ids[1],
        source_item_ids=ids[2],
        meta={"counts": counts, "audit": report, "options": options},
    )
    return dataset._replace(meta=dataset.meta | {"hash": content_hash(dataset)})


def count(interactions: dict[str, UserItems], parts: dict[str, HeldOut]) -> dict[str, int | float]:
    """Numbers of users, items and interactions, held-out ones included, and densities."""
    num_users = len(interactions["target"].indptr) - 1
    counts: dict[str, int | float] = {"users": num_users}
    for domain, rows in interactions.items():
        held_out = sum(len(parts[part].users) for part in parts if HELD_OUT[part] == domain)
        number = len(rows.indices) + held_out
        counts[f"{domain}_items"] = rows.num_items
        counts[f"{domain}_interactions"] = number
        counts[f"{domain}_density"] = number / (num_users * rows.num_items)
    return counts | {f"{part}_users": len(held.users) for part, held in parts.items()}


def _indptr(users: np.ndarray, num_users: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))])


def _interactions(pairs: Pairs, num_users: int, num_items: int) -> UserItems:
    indptr = _indptr(pairs.users, num_users)
    return UserItems(indptr.astype(np.int32), pairs.items.astype(np.int32), num_items)


def objects(ids: pl.Series) -> np.ndarray:
    """Returns ids as Python strings."""
    return np.array(ids.to_list(), dtype=object)


def numbers(count: int) -> np.ndarray:
    """Returns 0 … count - 1 as ids."""
    return np.array([str(n) for n in range(count)], dtype=object)
