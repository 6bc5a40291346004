"""Recommendations from a trained model: load once, then rank the whole catalogue for any user.

``top_k`` is the pure, compiled core; ``recommend`` goes from raw user ids to a table of raw item
ids. Of items that score the same, the one whose row comes first ranks first: prepared data has its
items in the order of their raw ids as text.

A user who is in the source domain alone has no trained embedding. It is predicted from what the
user has there, by a linear map fitted on the users of both domains (Man et al. 2017, *Cross-domain
recommendation: an embedding and mapping approach*, EMCDR); the model then ranks as for anyone else,
with the user's own source profile. Where each domain has a view of the user of its own
(``out_of_fold``), the source's is solved for from the user's source items, and the target's is
empty.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from conet_jax import models
from conet_jax.data import readers
from conet_jax.data.load import touched_items
from conet_jax.data.types import Dataset, check_indices
from conet_jax.errors import InputError
from conet_jax.models import history, ials, out_of_fold, popularity
from conet_jax.models.base import Model, Params
from conet_jax.run.experiment import Experiment, for_inference
from conet_jax.run.workdir import restore
from conet_jax.studies import crossing
from conet_jax.train import ranking
from conet_jax.train.interactions import Interactions

USERS_AT_ONCE = 64
SOURCE_ITEMS = 3  # that an explanation names for each recommendation
_PAIRS_AT_ONCE = 1 << 13  # whose activations are alive at once; they stay in cache
# Ridge of the map from profiles to users, over the mean square of its inputs. From 1e-3 to 1 it
# changed NDCG by less than .004 on 565 users of movies_books whose books had been taken away.
_RIDGE = 1e-2


class Recommender(NamedTuple):
    """A trained model made ready by ``load``: tables projected, known interactions at hand.

    Attributes:
      model: the model.
      params: its settled parameters.
      interactions: training interactions by domain, as the model was trained on.
      projected: from ``Model.project``, for the users of the data.
      dataset: the data.
      known: (indptr, items): target items of each user in training, validation and test.
      rows: row of each raw user id.
      to_user: f64[dim + 1, dim_user], map from a source profile, and 1, to a user's embedding;
        None where the model has no embeddings of both.
      off: parameters with every H at zero; None where nothing crosses at inference.
      source_views: lists of source items -> f32[lists, dim + 1], the source's view of such users;
        None where users have no views.
    """

    model: Model
    params: Params
    interactions: dict[str, Interactions]
    projected: Any
    dataset: Dataset
    known: tuple[np.ndarray, np.ndarray]
    rows: Mapping[str, int]
    to_user: np.ndarray | None
    off: Params | None
    source_views: Callable[[list[np.ndarray]], np.ndarray] | None = None

    @property
    def ranks_strangers(self) -> bool:
        """Whether it ranks for a user who is in the source domain alone."""
        only_history = "user" not in self.params.tables and self.model.inference == "cross"
        return bool(self.to_user is not None or self.source_views or only_history)


class User(NamedTuple):
    """Whom to recommend to; neither a row nor source items is a user known nowhere.

    Attributes:
      id: raw id.
      row: of the data's users; None for a user who is not among them.
      source: int[n], rows of the user's source items, where there is no ``row``.
    """

    id: str
    row: int | None = None
    source: np.ndarray | None = None

    @property
    def method(self) -> str:
        """What ranks for the user: "model", "source items" (see the module), or "popularity"."""
        if self.row is not None:
            return "model"
        return "popularity" if self.source is None else "source items"


def load(workdir: str | Path) -> Recommender:
    """Loads the best parameters of a run and makes them ready to rank.

    Raises:
      InputError: see ``workdir.restore``.
    """
    experiment, params, _ = restore(workdir)
    return prepare(experiment, params)


def prepare(experiment: Experiment, params: Params) -> Recommender:
    """Projects the tables once and collects what ranking needs.

    Args:
      experiment: a run.
      params: settled parameters.

    Returns:
      The recommender.

    Example:
      >>> from conet_jax.config import default_config
      >>> from conet_jax.data.assemble import from_arrays
      >>> from conet_jax.run.experiment import make_experiment
      >>> from conet_jax.run.start import initial_state
      >>> data = from_arrays([0, 1, 2, 2], [0, 0, 0, 1], [0, 1, 2], [0, 1, 1], candidates=1,
      ...                    num_target_items=4)
      >>> data = data._replace(valid=data.test)  # so small that nobody has a validation item
      >>> experiment = make_experiment(default_config("popularity"), data)
      >>> recommender = prepare(experiment, experiment.sweep(initial_state(experiment)))
      >>> users = find_users(recommender, ["1"])
      >>> print(recommend(recommender, users, k=1, include_seen=True).rows())
      [('1', 1, '0', 3.0, 'model')]
    """
    experiment, params = for_inference(experiment, params)
    dataset, model = experiment.dataset, experiment.model
    off, to_user, source_views = None, None, None
    if model.inference == "cross" and model.uncrossed is not None:
        off, _ = crossing.switched(model, params, experiment.interactions, "off")
    if model.pairing == "views":
        source = experiment.interactions["source"]
        degrees = np.diff(np.asarray(source.indptr))
        counts = np.asarray(params.tables["user"][:, -1])
        source_views = partial(
            out_of_fold.source_views,
            tables=params.tables,
            options=models.options(ials, experiment.config)._replace(joined=True),
            empty=float(counts[0] - np.log1p(degrees[0])),
        )
    else:
        to_user = _map_to_users(params, experiment.interactions)
    return Recommender(
        model,
        params,
        experiment.interactions,
        ranking.project(params, experiment.interactions, model=model),
        dataset,
        touched_items(dataset),
        {user: row for row, user in enumerate(dataset.user_ids)},
        to_user,
        off,
        source_views,
    )


# The compiled core.


@partial(jax.jit, static_argnames=("model", "k"))
def top_k(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    left_out: jax.Array,
    *,
    model: Model,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best of the items for each user, block by block, so that memory is that of a block.

    Args:
      projected: from ``Model.project``.
      users: int32[m].
      items: int32[n], distinct, 0 < n.
      left_out: bool[m, n], the items that a user must not get.
      model: the model.
      k: at most n.

    Returns:
      (items int32[m, k], scores f32[m, k] in descending order, finite bool[m]: whether all scores
      that count are). Of equal scores, the first in ``items`` comes first. Places that are left,
      because fewer than k items count, have the score -inf.

    Example:
      >>> counts = {"item": jnp.array([3.0, 9.0, 5.0, 9.0])}
      >>> counter = popularity.build(popularity.Options())
      >>> seen = jnp.array([[False, True, False, False]])
      >>> items, scores, _ = top_k(
      ...     counts, jnp.zeros(1, int), jnp.arange(4), seen, model=counter, k=2
      ... )
      >>> print(items, scores)
      [[3 2]] [[9. 5.]]
    """
    m, n = left_out.shape
    block = min(n, max(1, _PAIRS_AT_ONCE // m))
    padding = -n % block
    items = jnp.pad(items, (0, padding))
    left_out = jnp.pad(left_out, ((0, 0), (0, padding)), constant_values=True)

    def body(best: Any, first: jax.Array) -> tuple[Any, None]:
        scores, chosen, finite = best
        listed = jax.lax.dynamic_slice_in_dim(items, first, block)
        listed = jnp.broadcast_to(listed[None, :], (m, block))
        out = jax.lax.dynamic_slice_in_dim(left_out, first, block, axis=1)
        found = model.scores(projected, users, listed)
        finite = finite & jnp.all(jnp.isfinite(found) | out, axis=1)
        # Earlier items stand first, and top_k keeps the order of equals.
        found = jnp.concatenate([scores, jnp.where(out, -jnp.inf, found)], axis=1)
        listed = jnp.concatenate([chosen, listed], axis=1)
        scores, at = jax.lax.top_k(found, k)
        return (scores, jnp.take_along_axis(listed, at, axis=1), finite), None

    start = (
        jnp.full((m, k), -jnp.inf),
        jnp.zeros((m, k), items.dtype),
        jnp.ones(m, bool),
    )
    firsts = block * jnp.arange((n + padding) // block, dtype=jnp.int32)
    (scores, chosen, finite), _ = jax.lax.scan(body, start, firsts)
    return chosen, scores, finite


# Raw ids in, raw ids out.


def recommend(
    recommender: Recommender,
    users: Sequence[User],
    *,
    k: int = 10,
    items: np.ndarray | None = None,
    include_seen: bool = False,
    explain: bool = False,
) -> pl.DataFrame:
    """Recommends to users.

    Args:
      recommender: from ``load``.
      users: one or more, from ``find_users``.
      k: items a user; fewer where fewer are left.
      items: int[n], rows of the items to choose from, ascending; by default the whole catalogue.
      include_seen: whether items that the user has in training, validation or test may come again.
      explain: adds the columns of an explanation.

    Returns:
      A row a recommendation: ``user`` and ``item`` (raw ids), ``rank`` from 1, ``probability`` (see
      ``Model.logits``) or, of a model whose scores are no logits, ``score``; ``method`` (see
      ``User``). By popularity there is neither probability nor score: null.

      With ``explain`` also

      - ``score``, before the sigmoid, beside a probability;
      - ``cross_score``, how much of the score comes through the cross connections: the score
        minus what it is with every H at zero;
      - ``source_1``, ``weight_1`` and so on: the source items that weigh most, by how far the
        score falls if the item is taken out of the user's source profile or view. A trained user
        embedding stays; one made from source items is made again without it. Only falls are listed.

      They are null where nothing crosses, or no source profile is read, at inference.

    Raises:
      InputError: a score is not finite, or a row is out of range.
    """
    dataset = recommender.dataset
    if items is None:
        items = np.arange(dataset.target.num_items)
    check_indices("item", items, dataset.target.num_items)
    for user in users:
        if user.row is not None:
            check_indices(f"user {user.id!r}: row", user.row, dataset.num_users)
        elif user.source is not None:
            what = f"user {user.id!r}: source item"
            check_indices(what, user.source, dataset.source.num_items)
    frames = []
    for method in dict.fromkeys(user.method for user in users):
        places = [at for at, user in enumerate(users) if user.method == method]
        for first in range(0, len(places), USERS_AT_ONCE):
            some = places[first : first + USERS_AT_ONCE]
            group = [users[at] for at in some]
            chosen, scores = _rank(recommender, group, items, min(k, len(items)), include_seen)
            frame = _frame(recommender, group, chosen, scores, explain)
            frames.append(frame.with_columns(place=pl.Series(some)[frame["place"]]))
    return pl.concat(frames).sort("place", "rank").drop("place")


def stream(
    recommender: Recommender, users: Iterable[User], **options: Any
) -> Iterator[pl.DataFrame]:
    """``recommend`` for any number of users, a block of them at a time, in their order."""
    users = iter(users)
    while block := list(itertools.islice(users, USERS_AT_ONCE)):
        yield recommend(recommender, block, **options)


def find_users(
    recommender: Recommender,
    ids: Iterable[str],
    *,
    source: Mapping[str, np.ndarray] | None = None,
    fallback: bool = False,
    origin: str = "",
) -> list[User]:
    """Finds out what can rank for each raw user id.

    Args:
      recommender: from ``load``.
      ids: raw user ids.
      source: rows of source items by raw user id, from ``read_source``, for users who are not in
        the data.
      fallback: whether popularity ranks for those for whom nothing else can.
      origin: file that the ids stand in, one a line, for the messages.

    Returns:
      A ``User`` for each id, in their order.

    Raises:
      InputError: without ``fallback``, nothing can rank for a user.
    """
    users = []
    for number, name in enumerate(ids, 1):
        row = recommender.rows.get(name)
        items = None if row is not None or source is None else source.get(name)
        if items is not None and not recommender.ranks_strangers:
            items = None
            why = (
                "is in the source domain alone, and this model learns nothing of users from the "
                "source: expected a user of its data"
            )
        else:
            why = "is in neither domain of the data: expected a user of both, or, with "
            why += "--source=FILE, one with source items that the model knows"
        if row is None and items is None and not fallback:
            where = f"{origin}:{number}: " if origin else ""
            raise InputError(
                f"{where}user {name!r} {why}; --fallback=popularity gives such users the most "
                "popular items"
            )
        users.append(User(name, row, items))
    return users


def read_source(
    recommender: Recommender, path: str, users: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads what users have in the source domain from a raw file, in any format of ``prepare``.

    Args:
      recommender: from ``load``; rows below the least rating that its data were prepared with
        do not count, nor do items that it does not know.
      path: the file.
      users: raw ids of those to read; by default all.

    Returns:
      {raw user id: int[n], rows of source items in ascending order}, for those with one or more.

    Raises:
      InputError: see ``readers.read``.
    """
    dataset = recommender.dataset
    frame = readers.read(path).frame
    if "rating" in frame.collect_schema():
        frame = frame.filter(pl.col("rating") >= dataset.meta["options"].get("min_rating", -np.inf))
    if users is not None:
        frame = frame.filter(pl.col("user").is_in(list(users)))
    known = pl.LazyFrame({"item": pl.Series(dataset.source_item_ids.tolist(), dtype=pl.String)})
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


def text(frame: pl.DataFrame) -> str:
    """A table of ``recommend`` for people to read."""
    lines = []
    width = max(4, frame["item"].str.len_chars().max() or 0)
    name = "probability" if "probability" in frame.columns else "score"
    for row in frame.iter_rows(named=True):
        if row["rank"] == 1:
            how = "" if row["method"] == "model" else f", by {row['method']}"
            lines += [f"user {row['user']}{how}", f"rank  {'item':{width}}  {name:>11}"]
        value = "" if row[name] is None else f"{row[name]:11.4f}"
        lines.append(f"{row['rank']:4d}  {row['item']:{width}}  {value}".rstrip())
        if "cross_score" in row and row["score"] is not None:
            crossing = row["cross_score"]
            parts = [f"score {row['score']:.4f}"]
            parts += [] if crossing is None else [f"crossing {crossing:+.4f}"]
            parts += [
                f"{row[f'source_{at}']} {row[f'weight_{at}']:+.4f}"
                for at in range(1, SOURCE_ITEMS + 1)
                if row[f"source_{at}"] is not None
            ]
            lines.append("      " + ", ".join(parts))
    return "".join(line + "\n" for line in lines)


def _rank(
    recommender: Recommender, group: list[User], items: np.ndarray, k: int, include_seen: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the k best items of users of one method, and their scores, -inf for none."""
    model, projected = recommender.model, recommender.projected
    rows = np.arange(len(group))
    if group[0].method == "model":
        rows = np.array([user.row for user in group])
    elif group[0].method == "source items":
        sources = [user.source for user in group]
        vectors = _vectors(recommender, sources)
        projected = _project(recommender, recommender.params, vectors, None, sources)
    else:
        target = recommender.dataset.target
        model = popularity.build(popularity.Options())
        projected = {"item": np.bincount(target.indices, minlength=target.num_items)}
        projected["item"] = projected["item"].astype(np.float32)
    left_out = np.zeros((1 << (len(group) - 1).bit_length(), len(items)), bool)
    if group[0].method == "model" and not include_seen:
        indptr, known = recommender.known
        for at, row in enumerate(rows):
            own = known[indptr[row] : indptr[row + 1]]
            places = np.searchsorted(items, own)
            places = np.minimum(places, len(items) - 1)
            left_out[at, places[items[places] == own]] = True
    chosen, scores, finite = (
        np.asarray(x)[: len(group)]
        for x in top_k(
            projected,
            np.pad(rows, (0, len(left_out) - len(group))).astype(np.int32),
            items.astype(np.int32),
            left_out,
            model=model,
            k=k,
        )
    )
    if not finite.all():
        raise InputError(
            f"a score of user {group[int(np.argmin(finite))].id!r} is NaN or infinite: the run has "
            "diverged; lower config.learning_rate or set config.clip_norm"
        )
    return chosen, scores


def _frame(
    recommender: Recommender,
    group: list[User],
    chosen: np.ndarray,
    scores: np.ndarray,
    explain: bool,
) -> pl.DataFrame:
    """The table of ``recommend`` for users of one method, ``place`` numbering them."""
    places, ranks = np.nonzero(scores > -np.inf)
    found = scores[places, ranks].astype(np.float64)
    method = group[0].method
    unknown = pl.repeat(None, len(places), dtype=pl.Float64, eager=True)
    values: dict[str, Any] = {"score": unknown if method == "popularity" else pl.Series(found)}
    if recommender.model.logits:
        # In float64: in float32 all logits above 17 would be 1.
        sigmoid = pl.Series(1 / (1 + np.exp(-found)))
        values = {"probability": unknown if method == "popularity" else sigmoid} | (
            values if explain else {}
        )
    ids = recommender.dataset.target_item_ids[chosen[places, ranks]].tolist()
    columns = {
        "place": places,
        "user": pl.Series([group[at].id for at in places], dtype=pl.String),
        "rank": (ranks + 1).astype(np.int32),
        "item": pl.Series(ids, dtype=pl.String),
        **values,
        "method": pl.repeat(method, len(places), dtype=pl.String, eager=True),
    }
    if explain:
        parts = [
            _explanation(recommender, user, chosen[at, scores[at] > -np.inf])
            for at, user in enumerate(group)
        ]
        columns |= {
            name: pl.Series(
                itertools.chain(*(part[name] for part in parts)),
                dtype=pl.String if name.startswith("source") else pl.Float64,
            )
            for name in parts[0]
        }
    return pl.DataFrame(columns)


# Users given by what they have: those without a row, and explanations.


def _explanation(recommender: Recommender, user: User, items: np.ndarray) -> dict[str, list]:
    """Columns of the explanation for one user's recommendations; see ``recommend``."""
    out: dict[str, list] = {"cross_score": [None] * len(items)}
    for at in range(1, SOURCE_ITEMS + 1):
        out |= {f"source_{at}": [None] * len(items), f"weight_{at}": [None] * len(items)}
    if user.method == "popularity" or recommender.model.inference != "cross" or not len(items):
        return out
    dataset, params = recommender.dataset, recommender.params
    own = _row(dataset.source, user.row) if user.source is None else user.source
    lists = [own] + [np.delete(own, at) for at in range(len(own))]
    targets = None
    if user.row is not None:
        targets = [_row(dataset.target, user.row)] * len(lists)
    if user.row is None or "user" not in params.tables:
        vectors = _vectors(recommender, lists)
    else:
        vectors = np.repeat(np.asarray(params.tables["user"][user.row])[None], len(lists), axis=0)
        if recommender.source_views is not None:
            views = recommender.source_views(lists)
            vectors[:, -views.shape[1] :] = views
    scores = _scores(recommender, params, vectors, targets, lists, items)
    if recommender.off is not None:
        first = [None if x is None else x[:1] for x in (vectors, targets, lists)]
        out["cross_score"] = (
            scores[0] - _scores(recommender, recommender.off, *first, items)[0]
        ).tolist()
    falls = scores[0] - scores[1:]  # [source items, items]
    order = np.argsort(-falls, axis=0, kind="stable")[:SOURCE_ITEMS]
    for place, best in enumerate(order, 1):
        for at, source in enumerate(best):
            if falls[source, at] > 0:
                out[f"source_{place}"][at] = dataset.source_item_ids[own[source]]
                out[f"weight_{place}"][at] = falls[source, at]
    return out


def _row(interactions: Any, row: int) -> np.ndarray:
    return interactions.indices[interactions.indptr[row] : interactions.indptr[row + 1]]


_score = jax.jit(
    lambda projected, users, items, *, model: model.scores(projected, users, items),
    static_argnames="model",
)


def _scores(
    recommender: Recommender,
    params: Params,
    vectors: np.ndarray | None,
    targets: list[np.ndarray] | None,
    sources: list[np.ndarray],
    items: np.ndarray,
) -> np.ndarray:
    """Scores f64[lists, items] for users given by their embeddings and lists of items."""
    parts = []
    for first in range(0, len(sources), USERS_AT_ONCE):
        some = slice(first, first + USERS_AT_ONCE)
        given = [None if x is None else x[some] for x in (vectors, targets, sources)]
        projected = _project(recommender, params, *given)
        listed = np.broadcast_to(items.astype(np.int32), (USERS_AT_ONCE, len(items)))
        rows = np.arange(USERS_AT_ONCE, dtype=np.int32)
        found = _score(projected, rows, listed, model=recommender.model)
        parts.append(np.asarray(found, np.float64)[: len(given[2])])
    return np.concatenate(parts)


def _project(
    recommender: Recommender,
    params: Params,
    vectors: np.ndarray | None,
    targets: list[np.ndarray] | None,
    sources: list[np.ndarray],
) -> Any:
    """Projected tables whose users are up to ``USERS_AT_ONCE`` given by embeddings and lists."""
    interactions = {
        "target": _interactions(targets or [], recommender.interactions["target"]),
        "source": _interactions(sources, recommender.interactions["source"]),
    }
    if vectors is not None:
        rows = np.zeros((USERS_AT_ONCE + 1, vectors.shape[1]), np.float32)
        rows[: len(vectors)] = vectors
        params = params._replace(tables={**params.tables, "user": jnp.asarray(rows)})
    return ranking.project(params, interactions, model=recommender.model)


def _interactions(lists: list[np.ndarray], like: Interactions) -> Interactions:
    """Lists of a domain's items as those of ``USERS_AT_ONCE`` users.

    One more takes the padding. Shapes are powers of two, so that few programs are compiled.
    """
    degrees = np.zeros(USERS_AT_ONCE + 1, np.int64)
    degrees[: len(lists)] = [len(items) for items in lists]
    longest = 1 << int(degrees.max(initial=1) - 1).bit_length()
    total = int(degrees.sum())
    degrees[-1] = (1 << total.bit_length()) - total
    items = np.concatenate([*lists, np.zeros(degrees[-1], np.int64)])
    arrays = {
        "users": np.repeat(np.arange(len(degrees)), degrees),
        "items": items,
        "indptr": np.concatenate([[0], np.cumsum(degrees)]),
        "skipped": np.zeros(len(items)),  # for drawing negatives alone
    }
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}
    return like.replace(**arrays, max_degree=longest)


def _profiles(source: Interactions, table: jax.Array, users: int) -> np.ndarray:
    """Inputs f64[users, dim + 1] of the map to users: the source profile, and 1."""
    means = history.mean_of_all(source.items, source.users, table, users)
    return np.pad(np.asarray(means, np.float64), ((0, 0), (0, 1)), constant_values=1.0)


def _map_to_users(params: Params, interactions: dict[str, Interactions]) -> np.ndarray | None:
    """Ridge regression of the users' embeddings on their source profiles (EMCDR's linear map)."""
    if not {"user", "source_item"} <= params.tables.keys():
        return None
    users = np.asarray(params.tables["user"], np.float64)
    x = _profiles(interactions["source"], params.tables["source_item"], len(users))
    scale = np.maximum(np.sqrt(np.mean(x * x, axis=0)), np.finfo(np.float32).tiny)
    x = x / scale
    normal = x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1])
    return np.linalg.solve(normal, x.T @ users) / scale[:, None]


def _vectors(recommender: Recommender, sources: list[np.ndarray]) -> np.ndarray | None:
    """Embeddings of users who have only source items; None of a model without embeddings."""
    if recommender.source_views is not None:
        views = recommender.source_views(sources)
        target = np.zeros_like(views)
        column = np.asarray(recommender.params.tables["user"][:1, views.shape[1] - 1])
        degree = np.diff(np.asarray(recommender.interactions["target"].indptr[:2]))
        target[:, -1] = column - np.log1p(degree)
        return np.concatenate([target, views], axis=1)
    if recommender.to_user is None:
        return None
    table = recommender.params.tables["source_item"]
    parts = []
    for first in range(0, len(sources), USERS_AT_ONCE):
        some = sources[first : first + USERS_AT_ONCE]
        own = _interactions(some, recommender.interactions["source"])
        parts.append(_profiles(own, table, USERS_AT_ONCE + 1)[: len(some)])
    return (np.concatenate(parts) @ recommender.to_user).astype(np.float32)
