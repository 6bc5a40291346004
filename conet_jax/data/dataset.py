"""Two domains with shared users as arrays: filter, K-core, ids, leave-one-out, candidates.

Strings become integers as early as possible; everything after that works on NumPy arrays of
(user, item) pairs, sorted by user and then item.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np
import polars as pl

from conet_jax.data import audit, split
from conet_jax.data.readers import DomainRows, Given
from conet_jax.errors import InputError

DOMAINS = ("target", "source")


class Interactions(NamedTuple):
    """Training positives of one domain, CSR by user."""

    indptr: np.ndarray  # int32[num_users + 1]
    indices: np.ndarray  # int32[nnz], strictly increasing within a user
    num_items: int


class HeldOut(NamedTuple):
    """Leave-one-out: one item a user against its candidates."""

    users: np.ndarray  # int32[n], strictly increasing
    items: np.ndarray  # int32[n], the held-out positive
    candidates: np.ndarray  # int32[n, c], negatives
    mask: np.ndarray  # bool[n, c], False where a candidate does not count


class Dataset(NamedTuple):
    """One prepared pair of domains; ``meta`` has keys counts, audit, options and hash."""

    target: Interactions  # training positives only: test and validation items are removed
    source: Interactions  # all source interactions
    valid: HeldOut
    test: HeldOut
    user_ids: np.ndarray  # object[num_users] of str: the raw id of each row
    target_item_ids: np.ndarray
    source_item_ids: np.ndarray
    meta: dict

    @property
    def num_users(self) -> int:
        """Users shared by the two domains."""
        return len(self.user_ids)


def check_indices(what: str, indices: np.ndarray, size: int) -> None:
    """Raises ``InputError`` unless all are in [0, size): a device would read another row silently.

    Example:
      >>> check_indices("item", np.array([0, 7]), 5)
      Traceback (most recent call last):
      ...
      conet_jax.errors.InputError: item 7 is out of range: expected 0 to 4
    """
    indices = np.asarray(indices)
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        wrong = indices[(indices < 0) | (indices >= size)].flat[0]
        raise InputError(f"{what} {wrong} is out of range: expected 0 to {size - 1}")


class _Pairs(NamedTuple):
    """Distinct pairs of one domain, sorted by user, then item."""

    users: np.ndarray  # int64[n]
    items: np.ndarray  # int64[n]
    times: np.ndarray | None  # f64[n]


def build(
    target: DomainRows,
    source: DomainRows,
    *,
    min_rating: float = 4.0,
    min_user_items: int = 1,
    min_item_users: int = 1,
    split: str = "random",
    candidates: int = 99,
    seed: int = 0,
    drop_twins: bool = False,
    twin_jaccard: float = 0.9,
) -> Dataset:
    """Builds one data set from the rows of two domains.

    In this order: ratings at or above the threshold (all rows where there is none), users of both
    domains, duplicates merged (the latest time is kept), the K-core of both domains and the shared
    users, ids in sorted order, test and validation items, candidates. NCF-style input takes no
    part in threshold, core and split: its own test items and candidates are kept.

    Args:
      target: the domain to recommend in.
      source: the domain to learn from.
      min_rating: least rating of a positive.
      min_user_items: a user with fewer items in either domain is removed.
      min_item_users: an item with fewer users is removed.
      split: ``random`` or ``latest``, see ``split.leave_one_out``.
      candidates: negatives drawn for each held-out item.
      seed: of all draws.
      drop_twins: remove the source item of each pair of twins, after the core: the target and its
        test set stay as they are.
      twin_jaccard: see ``audit.find_twins``.

    Returns:
      The data set, the same for the same rows in any order.

    Raises:
      InputError: nothing is left after a filter (the message says which), times are missing for
        ``latest``, or a user has no possible negative.
    """
    ncf = target.given is not None or source.given is not None
    positives, reports = {}, {}
    for domain, rows in zip(DOMAINS, (target, source), strict=True):
        positives[domain], reports[domain] = _positives(rows, min_rating)
    if split == "latest" and not target.given:  # said before the long part, not after it
        if "timestamp" not in positives["target"].collect_schema():
            raise InputError(f"{target.name}: --split=latest needs timestamps; use --split=random")
    shared = _shared_users(positives, reports)
    if not len(shared):
        raise InputError(
            f"no shared users: no user id occurs in both {target.name} and {source.name}"
            + ("" if ncf else f" with a rating of {min_rating:g} or more (--min_rating)")
            + "; the ids of a user must be spelled alike in both files"
        )
    given = {"target": target.given, "source": source.given}
    pairs, item_ids = {}, {}
    for domain in DOMAINS:
        # Items that occur in the target's candidates alone belong to the catalogue, too.
        listed = given[domain] if domain == "target" else None
        pairs[domain], item_ids[domain] = _coded(positives[domain], shared, listed, reports[domain])
        if given[domain] is not None:
            given[domain], masked = _code_given(
                given[domain], shared, item_ids[domain], pairs[domain]
            )
            reports[domain]["positives_among_negatives"] = masked
    if not ncf:
        keep = _apply_core(pairs, reports, len(shared), min_user_items, min_item_users)
        shared = shared.filter(pl.Series(keep))
        _compact(pairs, item_ids, keep)
    twins = _find_twins(pairs, item_ids, twin_jaccard, drop_twins)
    options = {"candidates": candidates, "seed": seed}
    options |= {"drop_twins": drop_twins, "twin_jaccard": twin_jaccard}
    options["split"] = split if target.given is None else "given"
    if not ncf:
        options |= {"min_rating": min_rating, "min_user_items": min_user_items}
        options["min_item_users"] = min_item_users
    return _assemble(
        pairs,
        (_objects(shared), *(_objects(item_ids[domain]) for domain in DOMAINS)),
        given["target"],
        report={**reports, "twins": twins},
        options=options,
    )


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
    pairs, ids = {}, [_numbers(num_users)]
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
        pairs[domain], _ = _merge(_Pairs(users, items, times))
        ids.append(_numbers(num_items))
    options = {"candidates": candidates, "seed": seed, "split": split}
    return _assemble(pairs, tuple(ids), None, report={}, options=options)


# Strings to integers.


def _positives(rows: DomainRows, min_rating: float) -> tuple[pl.LazyFrame, dict]:
    frame, report = rows.frame, {"rows": rows.rows, "below_min_rating": 0}
    columns = frame.collect_schema().names()
    if "rating" in columns and rows.given is None:
        liked = pl.col("rating") >= min_rating
        kept = frame.select(liked.sum()).collect(engine="streaming").item()
        report["below_min_rating"] = rows.rows - kept
        if not kept:
            raise InputError(
                f"{rows.name}: no rating is {min_rating:g} or more; lower --min_rating"
            )
        frame = frame.filter(liked)
    return frame.select("user", "item", *({"timestamp"} & set(columns))), report


def _shared_users(positives: dict[str, pl.LazyFrame], reports: dict[str, dict]) -> pl.Series:
    """Sorted ids of the users of both domains."""
    by_size = sorted(DOMAINS, key=lambda d: reports[d]["rows"] - reports[d]["below_min_rating"])
    small, large = (positives[domain].select("user") for domain in by_size)
    # Only the smaller domain's users are ever held; the larger one streams past them.
    small = small.unique().collect(engine="streaming")
    shared = large.join(small.lazy(), on="user", how="semi").unique().collect(engine="streaming")
    return shared["user"].sort()


def _coded(
    frame: pl.LazyFrame, shared: pl.Series, listed: Given | None, report: dict
) -> tuple[_Pairs, pl.Series]:
    """Rows of the shared users as pairs of indices, and the sorted item ids."""
    users = pl.LazyFrame({"user": shared}).with_row_index("row")
    rows = frame.join(users, on="user", how="inner").drop("user").collect(engine="streaming")
    ids = rows["item"].unique().sort()
    if listed is not None:
        kept = set(shared.to_list())
        lists = zip(listed.users, listed.negatives, strict=True)
        more = {item for user, items in lists if user in kept for item in items}
        ids = pl.concat([ids, pl.Series("item", sorted(more), pl.String)]).unique().sort()
    items = (
        rows.lazy()
        .select("item")
        .join(
            pl.LazyFrame({"item": ids}).with_row_index("column"),
            on="item",
            how="left",
            maintain_order="left",
        )
    )
    times = rows["timestamp"].to_numpy() if "timestamp" in rows.columns else None
    pairs = _Pairs(
        rows["row"].to_numpy().astype(np.int64),
        items.collect()["column"].to_numpy().astype(np.int64),
        times,
    )
    report["user_not_shared"] = report["rows"] - report["below_min_rating"] - len(rows)
    merged, report["duplicates_merged"] = _merge(pairs)
    return merged, ids


def _merge(pairs: _Pairs) -> tuple[_Pairs, int]:
    """Sorts the pairs, keeps the latest of equal ones, and says how many went."""
    keys = (pairs.items, pairs.users)
    if pairs.times is not None:
        keys = (pairs.times, *keys)
    pairs = _take(pairs, np.lexsort(keys))
    last = np.ones(len(pairs.users), bool)
    last[:-1] = (np.diff(pairs.users) != 0) | (np.diff(pairs.items) != 0)
    return _take(pairs, last), int((~last).sum())


def _take(pairs: _Pairs, which: np.ndarray) -> _Pairs:
    return _Pairs(*(None if column is None else column[which] for column in pairs))


# Filters.


def _apply_core(
    pairs: dict[str, _Pairs],
    reports: dict[str, dict],
    num_users: int,
    min_user_items: int,
    min_item_users: int,
) -> np.ndarray:
    """Reduces the pairs to the K-core in place; returns bool[num_users], the users left.

    Removing never saves anyone, so the fixed point does not depend on the order of removal.
    """
    users_left = np.ones(num_users, bool)
    for report in reports.values():
        report |= {"item_core": 0, "user_core": 0}
    while True:
        before = sum(len(p.users) for p in pairs.values())
        for domain, p in pairs.items():
            enough = np.bincount(p.items) >= min_item_users if len(p.items) else np.ones(0, bool)
            pairs[domain] = _take(p, enough[p.items])
            reports[domain]["item_core"] += len(p.users) - len(pairs[domain].users)
        for p in pairs.values():
            users_left &= np.bincount(p.users, minlength=num_users) >= max(min_user_items, 1)
        for domain, p in pairs.items():
            pairs[domain] = _take(p, users_left[p.users])
            reports[domain]["user_core"] += len(p.users) - len(pairs[domain].users)
        if not users_left.any():
            raise InputError(
                f"the core is empty: no users are left with --min_user_items={min_user_items} and "
                f"--min_item_users={min_item_users} ({num_users} users are shared before it); "
                "lower them"
            )
        if sum(len(p.users) for p in pairs.values()) == before:
            return users_left


def _compact(
    pairs: dict[str, _Pairs], item_ids: dict[str, pl.Series], keep_users: np.ndarray
) -> None:
    """Renumbers users and items, in place, without gaps and in the same order."""
    new_user = np.cumsum(keep_users) - 1
    for domain, p in pairs.items():
        pairs[domain] = p._replace(users=new_user[p.users])
        _compact_items(pairs, item_ids, domain)


def _compact_items(pairs: dict[str, _Pairs], item_ids: dict[str, pl.Series], domain: str) -> None:
    keep = np.bincount(pairs[domain].items, minlength=len(item_ids[domain])) > 0
    pairs[domain] = pairs[domain]._replace(items=(np.cumsum(keep) - 1)[pairs[domain].items])
    item_ids[domain] = item_ids[domain].filter(pl.Series(keep))


def _find_twins(
    pairs: dict[str, _Pairs], item_ids: dict[str, pl.Series], jaccard: float, drop: bool
) -> dict:
    twins = audit.find_twins(*pairs["target"][:2], *pairs["source"][:2], jaccard)
    report: dict = {"pairs": len(twins)}
    on_twin = {}
    for column, domain in enumerate(DOMAINS):
        is_twin = np.zeros(len(item_ids[domain]), bool)
        is_twin[twins[:, column]] = True
        on_twin[domain] = is_twin[pairs[domain].items]
        report[f"{domain}_share"] = float(on_twin[domain].mean())
    report["dropped_source_interactions"] = 0
    if drop and len(twins):
        report["dropped_source_interactions"] = int(on_twin["source"].sum())
        pairs["source"] = _take(pairs["source"], ~on_twin["source"])
        if not len(pairs["source"].users):
            raise InputError(
                "no source item is left after --drop_twins: leave it out, or raise --twin_jaccard"
            )
        _compact_items(pairs, item_ids, "source")
    return report


# NCF-style test lists.


def _code_given(
    given: Given, users: pl.Series, item_ids: pl.Series, pairs: _Pairs
) -> tuple[HeldOut, int]:
    """The lists of the shared users as indices, and how many candidates are positives.

    A candidate that is a positive of its user, in whatever split, is masked.
    """
    user_code = {user: at for at, user in enumerate(users.to_list())}
    item_code = {item: at for at, item in enumerate(item_ids.to_list())}
    rows = sorted((user_code[user], at) for at, user in enumerate(given.users) if user in user_code)
    held = np.array([user for user, _ in rows], np.int64)
    items = np.array([item_code[given.items[at]] for _, at in rows], np.int64)
    candidates = np.full((len(rows), max((len(n) for n in given.negatives), default=0)), -1)
    for row, (_, at) in enumerate(rows):
        codes = [item_code.get(item, -1) for item in given.negatives[at]]
        candidates[row, : len(codes)] = codes
    known = candidates >= 0
    keys = pairs.users * len(item_ids) + pairs.items
    positive = known & np.isin(held[:, None] * len(item_ids) + candidates, keys)
    mask = known & ~positive
    if not mask.any(axis=1).all():
        user = users[int(held[int(np.argmin(mask.any(axis=1)))])]
        raise InputError(
            f"user {user!r} has no negative left in the given test candidates: none are listed, or "
            "all are positives of the user; remove the user's line or add candidates"
        )
    heldout = _held_out(held, items, np.maximum(candidates, 0), mask)
    return heldout, int(positive.sum())


def _held_out(
    users: np.ndarray, items: np.ndarray, candidates: np.ndarray, mask: np.ndarray
) -> HeldOut:
    return HeldOut(
        *(np.ascontiguousarray(x, np.int32) for x in (users, items, candidates)),
        np.ascontiguousarray(mask, bool),
    )


# Pairs to the data set.


def _assemble(
    pairs: dict[str, _Pairs],
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
        "target": _interactions(_take(target, train), num_users, sizes["target"]),
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
        return _held_out(users, target.items[at[users]], drawn, np.ones(drawn.shape, bool))

    test = given if given is not None else draw(test_at, "test candidates")
    valid = draw(valid_at, "validation candidates")
    return from_split(interactions, valid, test, ids, report=report, options=options)


def from_split(
    interactions: dict[str, Interactions],
    valid: HeldOut,
    test: HeldOut,
    ids: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    report: dict,
    options: dict,
) -> Dataset:
    """Puts together what is split already: checks that negatives exist, counts, hashes.

    Args:
      interactions: training positives by domain.
      valid: validation items.
      test: test items.
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
    counts = count(interactions, valid, test)
    trained = np.zeros(interactions["target"].num_items, bool)
    trained[interactions["target"].indices] = True
    report = report | {
        "users_without_test": num_users - len(test.users),
        "users_without_valid": num_users - len(valid.users),
        "test_items_not_in_training": int((~trained[test.items]).sum()),
        "valid_items_not_in_training": int((~trained[valid.items]).sum()),
    }
    dataset = Dataset(
        **interactions,
        valid=valid,
        test=test,
        user_ids=user_ids,
        target_item_ids=ids[1],
        source_item_ids=ids[2],
        meta={"counts": counts, "audit": report, "options": options},
    )
    return dataset._replace(meta=dataset.meta | {"hash": content_hash(dataset)})


def count(
    interactions: dict[str, Interactions], valid: HeldOut, test: HeldOut
) -> dict[str, int | float]:
    """Numbers of users, items and interactions, held-out ones included, and densities."""
    num_users = len(interactions["target"].indptr) - 1
    counts: dict[str, int | float] = {"users": num_users}
    held_out = {"target": len(valid.users) + len(test.users), "source": 0}
    for domain, rows in interactions.items():
        number = len(rows.indices) + held_out[domain]
        counts[f"{domain}_items"] = rows.num_items
        counts[f"{domain}_interactions"] = number
        counts[f"{domain}_density"] = number / (num_users * rows.num_items)
    return counts | {"valid_users": len(valid.users), "test_users": len(test.users)}


def _indptr(users: np.ndarray, num_users: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))])


def _interactions(pairs: _Pairs, num_users: int, num_items: int) -> Interactions:
    indptr = _indptr(pairs.users, num_users)
    return Interactions(indptr.astype(np.int32), pairs.items.astype(np.int32), num_items)


def _objects(ids: pl.Series) -> np.ndarray:
    return np.array(ids.to_list(), dtype=object)


def _numbers(count: int) -> np.ndarray:
    return np.array([str(n) for n in range(count)], dtype=object)


def arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    """The arrays of a data set by name, in a fixed order, ids as UTF-8 bytes and offsets."""
    named = {}
    for domain in DOMAINS:
        rows = getattr(dataset, domain)
        named |= {f"{domain}_indptr": rows.indptr, f"{domain}_indices": rows.indices}
    for part in ("valid", "test"):
        for field, values in getattr(dataset, part)._asdict().items():
            named[f"{part}_{field}"] = values
    for name in ("user_ids", "target_item_ids", "source_item_ids"):
        # Item ids cannot hold lone surrogates when read from files; from elsewhere they may.
        encoded = [text.encode("utf-8", "surrogatepass") for text in getattr(dataset, name)]
        named[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        lengths = np.array([len(text) for text in encoded], np.int64)
        named[f"{name}_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return named


def content_hash(dataset: Dataset) -> str:
    """SHA-256 over arrays, ids and options: equal for equal content, however it is stored."""
    digest = hashlib.sha256(json.dumps(dataset.meta["options"], sort_keys=True).encode())
    for name, values in arrays(dataset).items():
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
