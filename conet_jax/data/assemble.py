"""From pairs of integers to a data set: what is held out, candidates, counts, hash."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from conet_jax.data import audit, moments, split
from conet_jax.data.core import Pairs, merge, take
from conet_jax.data.types import (
    DOMAINS,
    HELD_OUT,
    KINDS,
    Dataset,
    HeldOut,
    UserItems,
    content_hash,
    held_out_counts,
)
from conet_jax.errors import InputError


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
    source_timestamps: np.ndarray | None = None,
    keep_future: bool = False,
    hold_out: str = "target",
    ratios: Sequence[int] | None = None,
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
      split: ``random``, ``latest`` or ``ratio``, as in ``build``.
      target_timestamps: f64[n], needed for ``latest``.
      source_timestamps: f64[m], needed for ``latest`` without ``keep_future``.
      keep_future: as in ``build``.
      hold_out: as in ``build``.
      ratios: as in ``build``.

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
    times = {"target": target_timestamps, "source": source_timestamps}
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
        own = times[domain] if times[domain] is None else np.asarray(times[domain], np.float64)
        pairs[domain], _ = merge(Pairs(users, items, own))
        ids.append(numbers(num_items))
    options = {"candidates": candidates, "seed": seed}
    options |= split_options(split, keep_future=keep_future, hold_out=hold_out, ratios=ratios)
    return assemble(pairs, tuple(ids), {}, report={}, options=options)


def split_options(
    how: str, *, keep_future: bool, hold_out: str, ratios: Sequence[int] | None
) -> dict:
    """The options of a split as stored: what is as in the first version is not there."""
    options: dict = {"split": how}
    if checked := split.checked_ratios(how, ratios):
        options["ratios"] = list(checked)
    if how == "latest" and not keep_future:
        options["keep_future"] = False
    if hold_out != "target":
        options["hold_out"] = hold_out
    return options


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
    given: dict[str, HeldOut],
    *,
    report: dict,
    options: dict,
    only: tuple[int, int] = (0, 0),
    seen: Pairs | None = None,
) -> Dataset:
    """Chooses what is held out, draws candidates, checks that negatives exist, counts, hashes.

    Args:
      pairs: of each domain.
      ids: raw ids of users, target items and source items.
      given: held-out items that come with the files, by domain.
      report: of the audit, so far.
      options: that the data are made with.
      only: users of the target alone and of the source alone, who come after the others.
      seen: target pairs that are known, and no positives.

    Raises:
      InputError: there is nothing to test on, a user has too few untouched items, or as in
        ``from_split``.
    """
    if options["candidates"] < 1:
        raise InputError(f"candidates={options['candidates']} must be 1 or more")
    num_users, seed = len(ids[0]), options["seed"]
    num_items = {domain: len(ids[1 + at]) for at, domain in enumerate(DOMAINS)}
    num_shared = num_users - sum(only)
    indptr = {domain: _indptr(p.users, num_users) for domain, p in pairs.items()}
    train = {domain: np.ones(len(p.users), bool) for domain, p in pairs.items()}
    chosen = {"target": _choose(pairs, indptr, given, num_items, options, "target")}
    if not (pairs["target"].users[chosen["target"][0]] < num_shared).any():
        raise InputError(
            "no user has a target item from --cutoff on that others had before it, so there is "
            "nothing to test on: take an earlier moment"
            if options["split"] == "time"
            else "no user has two target items or more, so there is nothing to test on: prepare it "
            "from more data or a smaller core"
        )
    if options["split"] == "time":
        for domain, p in pairs.items():
            train[domain] = p.times < options["cutoff"]
        report = report | {"time": {"cutoff": options["cutoff"]}}
    if options["split"] == "latest":
        drop = options.get("keep_future") is False
        train["source"], time = moments.before_held_out(
            *(pairs["target"], pairs["source"], indptr["target"]),
            np.concatenate(chosen["target"]),
            drop=drop,
        )
        report = report | {"time": time}
    if options.get("hold_out") == "both":
        chosen["source"] = _choose(pairs, indptr, given, num_items, options, "source")
        if report.get("time", {}).get("future_dropped"):  # some of that is held out here
            chosen["source"] = tuple(at[~train["source"][at]] for at in chosen["source"])
    alone = np.zeros(0, np.int64)  # test items of users of the target alone
    for domain, at in chosen.items():
        of_shared = [pairs[domain].users[part] < num_shared for part in at]
        if domain == "target":
            alone = at[0][~of_shared[0]]
            train[domain][alone] = False
        chosen[domain] = tuple(part[shared] for part, shared in zip(at, of_shared, strict=True))
        for part in chosen[domain]:
            train[domain][part] = False
    interactions = {
        domain: _interactions(take(p, train[domain]), num_users, num_items[domain])
        for domain, p in pairs.items()
    }
    if options["split"] in ("latest", "time"):
        for domain, rows in train.items():
            held = sum(map(len, chosen.get(domain, ()))) + (len(alone) if domain == "target" else 0)
            left_out = int((~rows).sum()) - held
            report = report | {domain: report.get(domain, {}) | {"left_out_by_time": left_out}}

    touched = dict(pairs)  # whose items are no candidates
    if seen is not None and options.get("seen_are_candidates") is False:
        both = [np.concatenate(two) for two in zip(pairs["target"][:2], seen[:2], strict=True)]
        touched["target"], _ = merge(Pairs(*both, None))

    def draw(domain: str, at: np.ndarray, purpose: str) -> HeldOut:
        users, p = pairs[domain].users[at], touched[domain]
        size, count, rows = num_items[domain], options["candidates"], _indptr(p.users, num_users)
        _check_room(ids[0][users], size - np.diff(rows)[users], size, count, domain)
        rng = split.generator(seed, purpose)
        drawn = split.draw_candidates(rows, p.items, size, users, count, rng)
        return held_out_of(users, pairs[domain].items[at], drawn, np.ones(drawn.shape, bool))

    parts = {}
    for domain, (test, valid) in chosen.items():
        mark, words = ("", "") if domain == "target" else ("_source", "source ")
        parts[f"valid{mark}"] = draw(domain, valid, f"{words}validation candidates")
        parts[f"test{mark}"] = (
            given[domain] if domain in given else draw(domain, test, f"{words}test candidates")
        )
    if options.get("users") == "all":
        parts["test_target_only"] = draw("target", alone, "target-only test candidates")
    made = from_split(interactions, parts, ids, report=report, options=options, only=only)
    if seen is None or not len(seen.users):
        return made
    made = made._replace(seen=_interactions(seen, num_users, num_items["target"]))
    made.meta["audit"]["seen"] = len(seen.users)
    return made._replace(meta=made.meta | {"hash": content_hash(made)})


def _choose(
    pairs: dict[str, Pairs],
    indptr: dict[str, np.ndarray],
    given: dict[str, HeldOut],
    num_items: dict[str, int],
    options: dict,
    domain: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(test, valid): positions int64[n] of a domain's held-out pairs, ascending."""
    p, rows, how, seed = pairs[domain], indptr[domain], options["split"], options["seed"]
    purpose = "held out" if domain == "target" else "held out of the source"
    if domain in given:
        keys = p.users * num_items[domain] + p.items
        wanted = given[domain].users.astype(np.int64) * num_items[domain] + given[domain].items
        test_at = np.full(len(rows) - 1, -1)
        test_at[given[domain].users] = np.searchsorted(keys, wanted)
        found = test_at, split.one_more(rows, test_at, seed=seed, purpose=purpose)
    elif how == "ratio":
        return split.by_ratios(rows, ratios=options["ratios"], seed=seed, purpose=purpose)
    elif how == "time":
        found = split.first_later(rows, p.times, cutoff=options["cutoff"], seed=seed)
    else:
        how = "random" if how == "given" else how  # the other domain's are
        found = split.leave_one_out(rows, split=how, seed=seed, timestamps=p.times, purpose=purpose)
    return tuple(at[at >= 0] for at in found)


def _check_room(
    user_ids: np.ndarray, room: np.ndarray, num_items: int, count: int, domain: str
) -> None:
    """Raises ``InputError`` where a user has fewer untouched items than candidates wanted."""
    if not len(room) or room.min() >= count:
        return
    worst = int(room.argmin())
    if room[worst] < 1:
        raise InputError(
            f"user {user_ids[worst]!r} has all {num_items} {domain} items: no untouched one is "
            "left to rank the held-out one against; take the user out"
        )
    raise InputError(
        f"user {user_ids[worst]!r} has {room[worst]} untouched {domain} items, fewer than the "
        f"{count} candidates wanted: --candidates={room[worst]} or less would do, "
        "or --max_user_items=N, which leaves users with more items out"
    )


def from_split(
    interactions: dict[str, UserItems],
    parts: dict[str, HeldOut],
    ids: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    report: dict,
    options: dict,
    only: tuple[int, int] = (0, 0),
) -> Dataset:
    """Puts together what is split already: checks that negatives exist, counts, hashes.

    Args:
      interactions: training positives by domain.
      parts: held-out items, by the names of ``types.HELD_OUT``; ``valid`` and ``test`` at least.
      ids: raw ids of users, target items and source items.
      report: of the audit, so far.
      options: that the data were made with.
      only: users of the target alone and of the source alone.

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
    if options.get("users") == "all":
        num_shared = num_users - sum(only)
        counts |= dict(zip(KINDS, (num_shared, *only), strict=True))
    report = report | {"cold": audit.coldness_of(parts, interactions)}
    for part in ("test", "valid"):
        report[f"users_without_{part}"] = num_users - sum(only) - counts[f"{part}_users"]
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
    return counts | held_out_counts(parts)


def _indptr(users: np.ndarray, num_users: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))])


def _interactions(pairs: Pairs, num_users: int, num_items: int) -> UserItems:
    indptr = _indptr(pairs.users, num_users)
    weights = None if pairs.weights is None else pairs.weights.astype(np.float32)
    return UserItems(indptr.astype(np.int32), pairs.items.astype(np.int32), num_items, weights)


def objects(ids: pl.Series) -> np.ndarray:
    """Returns ids as Python strings."""
    return np.array(ids.to_list(), dtype=object)


def numbers(count: int) -> np.ndarray:
    """Returns 0 … count - 1 as ids."""
    return np.array([str(n) for n in range(count)], dtype=object)
