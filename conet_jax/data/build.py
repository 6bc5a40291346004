"""Two domains with shared users as arrays: filter, K-core, ids.

Strings become integers as early as possible; everything after that works on NumPy arrays of
(user, item) pairs, sorted by user and then item (``assemble``).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from conet_jax.data import left_out, moments, ratings
from conet_jax.data.assemble import assemble, held_out_of, objects, split_options
from conet_jax.data.core import Pairs, reduce, renumber, take
from conet_jax.data.ncf import Given
from conet_jax.data.ratings import Rated
from conet_jax.data.readers import DomainRows
from conet_jax.data.split import checked_ratios
from conet_jax.data.twins import find_twins, share_in_source
from conet_jax.data.types import DOMAINS, Dataset, HeldOut
from conet_jax.errors import InputError


def build(
    target: DomainRows,
    source: DomainRows,
    *,
    min_rating: float | None = None,
    target_min_rating: float | None = None,
    source_min_rating: float | None = None,
    min_user_items: int | None = None,
    min_item_users: int | None = None,
    max_user_items: int | None = None,
    split: str | None = None,
    candidates: int = 99,
    seed: int = 0,
    drop_twins: bool = False,
    twin_jaccard: float = 0.5,
    twin_users: int = 2,
    keep_future: bool = False,
    cutoff: str | None = None,
    hold_out: str = "target",
    users: str = "shared",
    seen_are_candidates: bool = True,
    ratios: Sequence[int] | None = None,
) -> Dataset:
    """Builds one data set from the rows of two domains.

    In this order: users of both domains with a rating at or above the threshold (or any row, where
    there are no ratings), the latest rating of each pair, the threshold, the K-core of both domains
    and the shared users, ids in sorted order, test and validation items, candidates. NCF-style
    input takes no part in threshold, core and split: its own test items and candidates are kept.

    Args:
      target: the domain to recommend in.
      source: the domain to learn from.
      min_rating: least rating of a positive; 4 by default, or 1 for feedback of yes or no.
      target_min_rating: the same for the target alone.
      source_min_rating: the same for the source alone.
      min_user_items: a user with fewer items in either domain is removed; 1 by default.
      min_item_users: an item with fewer users is removed; 1 by default.
      max_user_items: a user with more items in either domain, liked or not, is removed; all stay
        by default. One who likes every item is removed in any case: there is no negative.
      split: ``random`` (the default) or ``latest``, see ``split.leave_one_out``, or ``time``:
        users, items and the core are those of the rows before ``cutoff``, see
        ``split.first_later`` for the others; or ``ratio``, which holds out several items of a user,
        see ``split.by_ratios``.
      candidates: negatives drawn for each held-out item.
      seed: of all draws.
      drop_twins: remove the source item of each pair of twins, after the core: the target and its
        test set stay as they are.
      twin_jaccard: Jaccard index from which two items are twins, see ``twins.find_twins``.
      twin_users: users that twins share at least.
      keep_future: under ``latest``, keep a user's source rows from the time of the first held-out
        item on.
      cutoff: the moment of ``time``, see ``moments.cutoff``.
      hold_out: ``both`` holds out source items too, of users of both domains.
      users: ``shared``, those of both domains, or ``all``; then the core is over each domain's own
        users, and those of the target alone have test items of their own.
      seen_are_candidates: whether a target pair below the threshold may be a candidate.
      ratios: of training, validation and test items, whole numbers, under ``ratio``; 8, 1, 1 by
        default.

    Returns:
      The data set, the same for the same rows in any order.

    Raises:
      InputError: nothing is left after a filter (the message says which), times are missing for
        ``latest``, or a user has no possible negative.
    """
    rows = {"target": target, "source": source}
    ncf = target.given is not None or source.given is not None
    core = {"min_user_items": min_user_items, "min_item_users": min_item_users}
    _check_given(rows, core)
    _check_given({"target": target}, {"split": split})
    least, split = {name: count or 1 for name, count in core.items()}, split or "random"
    own = {"target": target_min_rating, "source": source_min_rating}
    rated = {
        domain: ratings.rate(rows[domain], min_rating if own[domain] is None else own[domain])
        for domain in DOMAINS
    }
    reports: dict = {domain: rated[domain].report for domain in DOMAINS}
    _check_options(rows, split, keep_future, cutoff, users)
    checked_ratios(split, ratios)
    shared, alone = _users(rated, reports, users)
    if not len(shared):
        liked = [f"{r.least:g} or more in {rows[d].name}" for d, r in rated.items() if r.least]
        raise InputError(
            f"no shared users: no user id occurs in both {target.name} and {source.name}"
            + (f" with a rating of {' and '.join(liked)} (--min_rating)" if liked else "")
            + "; the ids of a user must be spelled alike in both files"
        )
    known = pl.concat([shared, *alone]).sort()
    given = {"target": target.given, "source": source.given}
    # Items that occur in the candidates alone belong to the catalogue, too.
    coded = {
        d: ratings.code(rated[d], known, given[d] if d == "target" or hold_out == "both" else None)
        for d in DOMAINS
    }
    pairs, seen = {d: c.positives for d, c in coded.items()}, coded["target"].seen
    item_ids = {d: c.items for d, c in coded.items()}
    if max_user_items is not None:
        gone = left_out.beyond(coded, len(known), max_user_items)
        pairs = left_out.without(pairs, gone, reports, "too_many_items")
    if ncf:
        pairs, seen, known = left_out.without_full(pairs, seen, known, item_ids, reports)
    for domain in DOMAINS:
        if given[domain] is not None:
            given[domain], masked = _code_given(
                given[domain], known, item_ids[domain], pairs[domain]
            )
            reports[domain]["positives_among_negatives"] = masked
    options: dict = {"candidates": candidates, "seed": seed, "drop_twins": drop_twins}
    only = (0, 0)
    if not ncf:
        later = None
        if split == "time":
            options["cutoff"] = moments.cutoff(cutoff, pairs["target"].times)
            later = {d: take(p, p.times >= options["cutoff"]) for d, p in pairs.items()}
            pairs = {d: take(p, p.times < options["cutoff"]) for d, p in pairs.items()}
        pairs, reduced = left_out.reduce_further(
            pairs, len(known), reports, users=users, later=later, **least
        )
        if len(reduced.users) == sum(reduced.only):
            full = sum(report.get("has_every_item", 0) for report in reports.values())
            raise InputError(
                "no user is left: those who were have every item of a domain, so that no negative "
                "is possible; add items, or take larger files"
                if full
                else "the core is empty: no users are left with "
                + " and ".join(f"--{name}={count}" for name, count in least.items())
                + f" ({len(shared)} users are shared before it); lower them"
                + (", or take a later --cutoff" if split == "time" else "")
            )
        if users == "all":
            options["users"] = "all"
            other = reduce(pairs, len(known), users="shared", **least)
            reports["users_shared"] = {"users": len(other.users)}
            reports["users_shared"] |= {d: len(p.users) for d, p in other.pairs.items()}
        for domain in DOMAINS:
            reports[domain] |= reduced.dropped[domain]
            item_ids[domain] = item_ids[domain].gather(reduced.items[domain])
        seen = renumber(seen, reduced.users, reduced.items["target"])
        known, pairs, only = known.gather(reduced.users), reduced.pairs, reduced.only
        options |= {
            "min_rating": ratings.MIN_RATING if min_rating is None else float(min_rating),
            **least,
        }
    num_shared = len(known) - sum(only)
    twins, reports["twins"] = _find_twins(pairs, item_ids, num_shared, twin_jaccard, twin_users)
    if drop_twins:
        options |= {"twin_jaccard": twin_jaccard, "twin_users": twin_users}
        pairs, item_ids = _without_twins(pairs, item_ids, twins, reports["twins"])
        twins = twins[:0]
    for domain, found in rated.items():
        if found.least not in (None, options.get("min_rating")):
            options[f"{domain}_min_rating"] = found.least
    if max_user_items is not None:
        options["max_user_items"] = max_user_items
    if not seen_are_candidates:
        options["seen_are_candidates"] = False
    split = split if target.given is None else "given"
    options |= split_options(split, keep_future=keep_future, hold_out=hold_out, ratios=ratios)
    made = assemble(
        pairs,
        (objects(known), *(objects(item_ids[domain]) for domain in DOMAINS)),
        {d: g for d, g in given.items() if g is not None and (d == "target" or hold_out == "both")},
        report=reports,
        options=options,
        only=only,
        seen=seen,
    )
    for part in ("valid", "test"):
        share = share_in_source(getattr(made, part), twins, made.source)
        made.meta["audit"]["twins"][f"{part}_in_source"] = share
    return made


def _check_given(rows: dict[str, DomainRows], asked: dict) -> None:
    """Refuses what has no meaning where test items are given."""
    named = [name for name, value in asked.items() if value is not None]
    for own in rows.values():
        if own.given is not None and named:
            raise InputError(
                f"{own.name}: brings its own test items and users: leave out "
                f"--{named[-1]}={asked[named[-1]]}"
            )


def _check_options(
    rows: dict[str, DomainRows],
    split: str,
    keep_future: bool,
    cutoff: str | None,
    users: str,
) -> None:
    """Refuses, before the long part, what the files cannot give."""
    _check_given(rows, {"users": users if users != "shared" else None})
    if (split == "time") != (cutoff is not None):
        raise InputError("--split=time and --cutoff=DATE go together: give both, or neither")
    if keep_future and split != "latest":
        raise InputError("--keep_future is for --split=latest: leave it out")
    need = {"latest": DOMAINS[:1] if keep_future else DOMAINS, "time": DOMAINS}.get(split, ())
    for domain in need:
        if "timestamp" in rows[domain].frame.collect_schema():
            continue
        more = " (or --keep_future)" if (split, domain) == ("latest", "source") else ""
        raise InputError(
            f"{rows[domain].name}: --split={split} needs timestamps; use --split=random{more}"
        )


def _users(
    rated: dict[str, Rated], reports: dict[str, dict], users: str
) -> tuple[pl.Series, list[pl.Series]]:
    """Sorted ids of the users of both domains, and of each domain alone if all are wanted."""
    by_size = sorted(DOMAINS, key=lambda domain: rated[domain].num_positives)
    small, large = (rated[domain].positives.select("user") for domain in by_size)
    # Only the smaller domain's users are ever held; the larger one streams past them.
    held = small.unique().collect(engine="streaming")
    both = large.join(held.lazy(), on="user", how="semi").unique().collect(engine="streaming")
    shared, alone, counts = both["user"].sort(), [], {"shared": len(both)}
    for domain in DOMAINS:
        frame = rated[domain].positives.select("user")
        if users == "all":
            ids = frame.join(both.lazy(), on="user", how="anti").unique()
            alone.append(ids.collect(engine="streaming")["user"].sort())
            counts[f"{domain}_only"] = len(alone[-1])
        else:
            # By hashes of 64 bits: half the time and memory of the ids, and never off in practice.
            number = frame.select(pl.col("user").hash().n_unique())
            found = number.collect(engine="streaming").item()
            counts[f"{domain}_only"] = found - len(both)
    reports["users"] = counts
    return shared, alone


def _find_twins(
    pairs: dict[str, Pairs],
    item_ids: dict[str, pl.Series],
    num_shared: int,
    jaccard: float,
    min_users: int,
) -> tuple[np.ndarray, dict]:
    """The twins, by the users of both domains, and what the audit says of them."""
    shared = {domain: take(p, p.users < num_shared) for domain, p in pairs.items()}
    twins = find_twins(*shared["target"][:2], *shared["source"][:2], jaccard, min_users)
    report: dict = {"jaccard": jaccard, "min_users": min_users, "pairs": len(twins)}
    for column, domain in enumerate(DOMAINS):
        is_twin = np.zeros(len(item_ids[domain]), bool)
        is_twin[twins[:, column]] = True
        report[f"{domain}_share"] = float(is_twin[pairs[domain].items].mean())
    return twins, report | {"dropped_source_interactions": 0}


def _without_twins(
    pairs: dict[str, Pairs], item_ids: dict[str, pl.Series], twins: np.ndarray, report: dict
) -> tuple[dict[str, Pairs], dict[str, pl.Series]]:
    """Removes the source item of each pair of twins."""
    source = pairs["source"]
    items = np.setdiff1d(source.items, twins[:, 1])
    left = renumber(source, np.arange(1 + source.users.max(initial=-1)), items)
    if not len(left.users):
        raise InputError(
            "no source item is left after --drop_twins: leave it out, or raise --twin_jaccard"
        )
    report["dropped_source_interactions"] = len(source.users) - len(left.users)
    return pairs | {"source": left}, item_ids | {"source": item_ids["source"].gather(items)}


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
