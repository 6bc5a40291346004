"""Recommendations from a trained model: load once, then rank the whole catalogue for any user.

``recommend`` goes from users to a table of raw item ids. Of items that score the same, the one
whose row comes first ranks first: prepared data has its items in the order of their raw ids as
text. An item without training pairs in the target is not listed, unless it is asked for.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from conet_jax.data.prepare import positives_of
from conet_jax.data.types import check_indices
from conet_jax.errors import InputError
from conet_jax.models.base import FittedModel
from conet_jax.serve import shortlist
from conet_jax.serve.explain import items_of
from conet_jax.serve.newcomers import USERS_AT_ONCE
from conet_jax.serve.rank import left_out, rank
from conet_jax.serve.recommender import Recommender, User, load, prepare
from conet_jax.serve.table import table, text

__all__ = [
    "Recommender",
    "User",
    "find_items",
    "find_users",
    "for_many",
    "load",
    "prepare",
    "read_items_of",
    "recommend",
    "stream",
    "text",
    "users_of_data",
    "with_shortlist",
]

# More than cores, since they wait now and then; each has two arrays of 64 users and all items.
_THREADS = min(8, 2 + (os.cpu_count() or 1))
# So many that few of a part's users have a longer shortlist than they need.
_USERS_A_TABLE = 64 * USERS_AT_ONCE


def recommend(
    recommender: Recommender,
    users: Sequence[User],
    *,
    k: int = 10,
    items: np.ndarray | None = None,
    include_seen: bool = False,
    include_cold: bool = False,
    explain: bool = False,
) -> pl.DataFrame:
    """Recommends to users.

    Args:
      recommender: from ``load``.
      users: from ``find_users``.
      k: items a user; fewer where fewer are left, and no row where none is.
      items: int[n], rows of the items to choose from, ascending; by default the whole catalogue.
      include_seen: whether items that the user has may come again: in training, validation or test,
        or in what was given with the request.
      include_cold: whether items without training pairs in the target may be listed.
      explain: adds the columns of an explanation.

    Returns:
      A row a recommendation: ``user`` and ``item`` (raw ids), ``rank`` from 1, ``probability`` (see
      ``Model.logits``) or, of a model whose scores are no logits, ``score``; ``method`` (see
      ``User``). By popularity there is neither probability nor score: null.

      With ``explain`` also ``score``, before the sigmoid, beside a probability, and the columns of
      ``explain.columns``.

    Raises:
      InputError: a score is not finite, a row is out of range, or the model has no score for an
        item without training pairs and is asked for one.

    Example:
      >>> from conet_jax.config import default_config
      >>> from conet_jax.data.assemble import from_arrays
      >>> from conet_jax.run.experiment import make_experiment
      >>> from conet_jax.run.start import initial_state
      >>> users, source = np.repeat(range(9), 2), np.arange(9) % 2
      >>> data = from_arrays(users, [0, 1, 0, 2, 1, 2] * 3, range(9), source, candidates=1)
      >>> data = data._replace(valid=data.test)  # so small that nobody has a validation item
      >>> experiment = make_experiment(default_config("popularity"), data)
      >>> recommender = prepare(experiment, experiment.sweep(initial_state(experiment)))
      >>> users = find_users(recommender, ["1"])
      >>> print(recommend(recommender, users, k=1, include_seen=True).rows())
      [('1', 1, '2', 5.0, 'model')]
    """
    short = recommender.shortlist
    if short is not None and (include_seen or include_cold or items is not None or k > short.k):
        short = None
    dataset = recommender.dataset
    items = short.rows if short is not None else _listable(recommender, items, include_cold)
    for user in users:
        if user.row is not None:
            check_indices(f"user {user.id!r}: row", user.row, dataset.num_users)
            continue
        for domain in ("source", "target"):
            rows = getattr(user, domain)
            if rows is not None:
                num_items = getattr(dataset, domain).num_items
                check_indices(f"user {user.id!r}: {domain} item", rows, num_items)
    ways, frames = _ways(users, short) if len(items) else [], []
    kinds = dict.fromkeys(ways)
    for method, listed in kinds:
        places = [at for at, way in enumerate(ways) if way == (method, listed)]
        group = [users[at] for at in places]
        given = items, min(k, len(items)), include_seen, short if listed else None
        chosen, scores = _rank(recommender, group, *given)
        frames.append(table(recommender, method, group, chosen, scores, explain))
        if len(kinds) > 1:
            frames[-1] = frames[-1].with_columns(place=pl.Series(places)[frames[-1]["place"]])
    if not frames:
        frames.append(table(recommender, "model", [], *np.empty((2, 0, 0)), explain))
    # One kind is in order already: sorting takes a tenth of one user's list.
    frame = frames[0] if len(frames) == 1 else pl.concat(frames).sort("place", "rank")
    frame.drop_in_place("place")
    return frame


def stream(
    recommender: Recommender,
    users: Iterable[User],
    *,
    k: int = 10,
    items: np.ndarray | None = None,
    include_seen: bool = False,
    include_cold: bool = False,
    explain: bool = False,
) -> Iterator[pl.DataFrame]:
    """``recommend`` for any number of users, a block of them at a time, in their order.

    Args:
      recommender: see ``recommend``.
      users: see ``recommend``.
      k: see ``recommend``.
      items: see ``recommend``.
      include_seen: see ``recommend``.
      include_cold: see ``recommend``.
      explain: see ``recommend``.

    Yields:
      Tables of ``recommend``, one at least.
    """
    users = list(users)
    for first in range(0, max(len(users), 1), _USERS_A_TABLE):
        yield recommend(
            recommender,
            users[first : first + _USERS_A_TABLE],
            k=k,
            items=items,
            include_seen=include_seen,
            include_cold=include_cold,
            explain=explain,
        )


def _ways(users: Sequence[User], short: shortlist.Shortlist | None) -> list[tuple[str, bool]]:
    """Of each user the method, and whether a shortlist is ranked."""
    rows = np.array([-1 if user.row is None else user.row for user in users], int)
    listed = np.zeros(len(users), bool)
    if short is not None:
        listed = (rows >= 0) & (short.lengths(rows) < len(short.rows))
    return [(user.method, bool(own)) for user, own in zip(users, listed, strict=True)]


def _rank(
    recommender: Recommender,
    group: list[User],
    items: np.ndarray,
    k: int,
    include_seen: bool,
    short: shortlist.Shortlist | None,
) -> tuple[np.ndarray, np.ndarray]:
    """``rank`` of a group of any size."""
    lengths = np.zeros(len(group), int)
    if short is not None:
        lengths = short.lengths(np.array([user.row for user in group]))
    order = np.argsort(-lengths, kind="stable")  # those of one length beside each other
    parts = np.split(order, range(USERS_AT_ONCE, len(group), USERS_AT_ONCE))

    def of(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        some = [group[at] for at in part]
        return rank(recommender, some, items, k, include_seen, short, int(lengths[part[0]]))

    if short is None or len(parts) == 1:  # what ranks everything takes all cores itself
        ranked = list(map(of, parts))
    else:  # NumPy makes shortlists, mostly on one core each
        with ThreadPoolExecutor(_THREADS) as pool:
            ranked = list(pool.map(of, parts))
    back = np.argsort(order)
    chosen, scores = (np.concatenate(each)[back] for each in zip(*ranked, strict=True))
    return chosen, scores


def with_shortlist(
    recommender: Recommender, k: int = 10, *, rows: np.ndarray | None = None
) -> Recommender:
    """Returns a recommender that ranks a shortlist for users of the data: see ``shortlist``.

    Lists are far quicker then. It ranks everything where the model has no linear part, or where a
    shortlist would not save half of the work.

    Args:
      recommender: from ``load``.
      k: items a list may have; of longer ones everything is ranked.
      rows: int[n], users of the data to draw from; by default all that the model has learnt from.
        What is promised is so of them.
    """
    model, (items,) = recommender.model, np.nonzero(recommender.warm)
    rows = np.flatnonzero(recommender.learnt) if rows is None else np.unique(rows)
    if model.linear is None or not len(items):
        return recommender
    vectors, factors = map(np.asarray, model.linear(recommender.projected))
    sums = recommender.sums
    if sums is not None and len(items) < len(factors):
        sums = sums.among(items)
    columns = np.ascontiguousarray(factors[items].T)
    short = shortlist.Shortlist(vectors, columns, sums, items, min(k, len(items)))
    drawn = np.random.default_rng(0).permutation(rows)[: shortlist.USERS]
    place_of, places = np.zeros(len(recommender.warm), int), []
    place_of[items] = np.arange(len(items))
    for first in range(0, len(drawn), USERS_AT_ONCE):
        some = drawn[first : first + USERS_AT_ONCE]
        group = [User(recommender.dataset.user_ids[row], int(row)) for row in some]
        chosen, scores = rank(recommender, group, items, short.k, False)
        linear, _ = short.scores(some)
        linear[left_out(recommender, group, items)] = -np.inf
        theirs = np.take_along_axis(linear, place_of[chosen], axis=1)
        worst = np.where(scores > -np.inf, theirs, np.inf).min(axis=1)
        places += (linear >= worst[:, None]).sum(axis=1).tolist()
    return recommender._replace(shortlist=short.measured(drawn, np.array(places, int)))


def for_many(
    recommender: Recommender,
    users: Sequence[User],
    *,
    k: int = 10,
    items: np.ndarray | None = None,
    include_seen: bool = False,
    include_cold: bool = False,
) -> Recommender:
    """``with_shortlist`` where there are so many users that drawing some of them pays.

    Args:
      recommender: from ``load``.
      users: whom lists are to be made for.
      k: see ``recommend``; a shortlist is for a request that leaves the rest as it is.
      items: see ``recommend``.
      include_seen: see ``recommend``.
      include_cold: see ``recommend``.
    """
    rows = np.unique([user.row for user in users if user.row is not None])
    if len(rows) < 4 * shortlist.USERS or include_seen or include_cold or items is not None:
        return recommender
    return with_shortlist(recommender, k, rows=rows)


def _listable(recommender: Recommender, items: np.ndarray | None, include_cold: bool) -> np.ndarray:
    """Rows of the items that may be listed, ascending."""
    num_items, model = recommender.dataset.target.num_items, recommender.model
    items = np.arange(num_items) if items is None else np.asarray(items)
    check_indices("item", items, num_items)
    if not include_cold:
        return items[recommender.warm[items]]
    if model.fixed_tables or isinstance(model, FittedModel):
        raise InputError(
            "--include_cold: this model knows nothing of an item without training pairs; leave it "
            "out, or take one whose item embeddings are trained by gradients, such as :conet"
        )
    return items


def find_users(
    recommender: Recommender,
    ids: Iterable[str],
    *,
    source: Mapping[str, np.ndarray] | None = None,
    target: Mapping[str, np.ndarray] | None = None,
    fallback: bool = False,
    origin: str = "",
) -> list[User]:
    """Finds out what can rank for each raw user id.

    Args:
      recommender: from ``load``.
      ids: raw user ids.
      source: rows of source items by raw user id, from ``read_items_of``, for users who are not in
        the data.
      target: rows of target items, likewise.
      fallback: whether popularity ranks for those for whom nothing else can.
      origin: file that the ids stand in, one a line, for the messages.

    Returns:
      A ``User`` for each id, in their order.

    Raises:
      InputError: without ``fallback``, nothing can rank for a user.
    """
    read, users = _domains_read(recommender), []
    for number, name in enumerate(ids, 1):
        row = recommender.rows.get(name)
        if row is not None and recommender.learnt[row]:
            users.append(User(name, row))
            continue
        given = {"source": (source or {}).get(name), "target": (target or {}).get(name)}
        if row is not None and given["source"] is None:
            given["source"] = items_of(User(name, row), "source", recommender)
        used = {domain: rows if domain in read else None for domain, rows in given.items()}
        unread = [domain for domain, rows in given.items() if rows is not None]
        if used["source"] is None and used["target"] is None and not fallback:
            where = f"{origin}:{number}: " if origin else ""
            raise InputError(
                f"{where}user {name!r} {_why(unread, read)}; --fallback=popularity gives such "
                "users the most popular items"
            )
        users.append(User(name, None, **used))
    return users


def users_of_data(recommender: Recommender) -> list[str]:
    """Raw ids of the users of the data for whom more than popularity can rank, in their order."""
    found = recommender.learnt
    if "source" in _domains_read(recommender):
        found = found | (np.diff(recommender.dataset.source.indptr) > 0)
    return recommender.dataset.user_ids[found].tolist()


def _domains_read(recommender: Recommender) -> tuple[str, ...]:
    """Domains whose items tell the model of users that it has not learnt from."""
    return () if recommender.newcomers is None else recommender.newcomers.domains


def _why(unread: list[str], read: tuple[str, ...]) -> str:
    """Why nothing can rank for a user of whom items of some domains are given."""
    if unread:
        others = f", or one with items of the {' or '.join(read)}" if read else ""
        return (
            f"is known by items of the {' and '.join(unread)} alone, of which this model learns "
            f"nothing of users: expected a user of its data{others}"
        )
    return (
        "is in neither domain of the data: expected a user of both, or, with --source=FILE or "
        "--items_of=FILE, one with items that the model knows"
    )


def read_items_of(
    recommender: Recommender, domain: str, path: str, users: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads what users have in a domain from a raw file, as the data's own file was read.

    Args:
      recommender: from ``load``; items that it does not know do not count.
      domain: "target" or "source".
      path: the file.
      users: raw ids of those to read; by default all.

    Returns:
      {raw user id: int[n], rows of items in ascending order}, for those with one or more.

    Raises:
      InputError: see ``prepare.positives_of``.
    """
    dataset = recommender.dataset
    frame = positives_of(dataset.meta, domain, path)
    if users is not None:
        frame = frame.filter(pl.col("user").is_in(list(users)))
    ids = getattr(dataset, f"{domain}_item_ids")
    known = pl.LazyFrame({"item": pl.Series(ids.tolist(), dtype=pl.String)})
    listed = (
        frame.select("user", "item")
        .join(known.with_row_index("row"), on="item")
        .group_by("user")
        .agg(pl.col("row").unique().sort())
        .sort("user")
        .collect(engine="streaming")
    )
    return {user: np.array(rows) for user, rows in listed.iter_rows()}


def find_items(recommender: Recommender, ids: Iterable[str]) -> np.ndarray:
    """Rows of the items whose raw ids are given, ascending; ids that are unknown are left out."""
    return np.flatnonzero(np.isin(recommender.dataset.target_item_ids, list(ids)))
