"""Two domains with shared users as arrays: filter, K-core, ids.

Strings become integers as early as possible; everything after that works on NumPy arrays of
(user, item) pairs, sorted by user and then item (``assemble``).
"""

import numpy as np
import polars as pl

from conet_jax.data.assemble import Pairs, assemble, held_out_of, merge, objects, take
from conet_jax.data.readers import DomainRows, Given
from conet_jax.data.twins import find_twins, share_in_source
from conet_jax.data.types import DOMAINS, Dataset, HeldOut
from conet_jax.errors import InputError


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
    twin_jaccard: float = 0.5,
    twin_users: int = 2,
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
      twin_jaccard: Jaccard index from which two items are twins, see ``twins.find_twins``.
      twin_users: users that twins share at least.

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
    twins, reports["twins"] = _find_twins(pairs, item_ids, twin_jaccard, twin_users, drop_twins)
    options = {"candidates": candidates, "seed": seed, "drop_twins": drop_twins}
    if drop_twins:
        options |= {"twin_jaccard": twin_jaccard, "twin_users": twin_users}
    options["split"] = split if target.given is None else "given"
    if not ncf:
        options |= {"min_rating": min_rating, "min_user_items": min_user_items}
        options["min_item_users"] = min_item_users
    made = assemble(
        pairs,
        (objects(shared), *(objects(item_ids[domain]) for domain in DOMAINS)),
        given["target"],
        report=reports,
        options=options,
    )
    for part in ("valid", "test"):
        share = share_in_source(getattr(made, part), twins, made.source)
        made.meta["audit"]["twins"][f"{part}_in_source"] = share
    return made


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
) -> tuple[Pairs, pl.Series]:
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
    pairs = Pairs(
        rows["row"].to_numpy().astype(np.int64),
        items.collect()["column"].to_numpy().astype(np.int64),
        times,
    )
    report["user_not_shared"] = report["rows"] - report["below_min_rating"] - len(rows)
    merged, report["duplicates_merged"] = merge(pairs)
    return merged, ids


def _apply_core(
    pairs: dict[str, Pairs],
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
            pairs[domain] = take(p, enough[p.items])
            reports[domain]["item_core"] += len(p.users) - len(pairs[domain].users)
        for p in pairs.values():
            users_left &= np.bincount(p.users, minlength=num_users) >= max(min_user_items, 1)
        for domain, p in pairs.items():
            pairs[domain] = take(p, users_left[p.users])
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
    pairs: dict[str, Pairs], item_ids: dict[str, pl.Series], keep_users: np.ndarray
) -> None:
    """Renumbers users and items, in place, without gaps and in the same order."""
    new_user = np.cumsum(keep_users) - 1
    for domain, p in pairs.items():
        pairs[domain] = p._replace(users=new_user[p.users])
        _compact_items(pairs, item_ids, domain)


def _compact_items(pairs: dict[str, Pairs], item_ids: dict[str, pl.Series], domain: str) -> None:
    keep = np.bincount(pairs[domain].items, minlength=len(item_ids[domain])) > 0
    pairs[domain] = pairs[domain]._replace(items=(np.cumsum(keep) - 1)[pairs[domain].items])
    item_ids[domain] = item_ids[domain].filter(pl.Series(keep))


def _find_twins(
    pairs: dict[str, Pairs],
    item_ids: dict[str, pl.Series],
    jaccard: float,
    min_users: int,
    drop: bool,
) -> tuple[np.ndarray, dict]:
    """The twins that are left, none if they are dropped from the pairs, and what the audit says."""
    twins = find_twins(*pairs["target"][:2], *pairs["source"][:2], jaccard, min_users)
    report: dict = {"jaccard": jaccard, "min_users": min_users, "pairs": len(twins)}
    on_twin = {}
    for column, domain in enumerate(DOMAINS):
        is_twin = np.zeros(len(item_ids[domain]), bool)
        is_twin[twins[:, column]] = True
        on_twin[domain] = is_twin[pairs[domain].items]
        report[f"{domain}_share"] = float(on_twin[domain].mean())
    report["dropped_source_interactions"] = 0
    if drop and len(twins):
        report["dropped_source_interactions"] = int(on_twin["source"].sum())
        pairs["source"] = take(pairs["source"], ~on_twin["source"])
        if not len(pairs["source"].users):
            raise InputError(
                "no source item is left after --drop_twins: leave it out, or raise --twin_jaccard"
            )
        _compact_items(pairs, item_ids, "source")
        twins = twins[:0]
    return twins, report


def _code_given(
    given: Given, users: pl.Series, item_ids: pl.Series, pairs: Pairs
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
    heldout = held_out_of(held, items, np.maximum(candidates, 0), mask)
    return heldout, int(positive.sum())
