"""Why an item was recommended: what comes through the crossing, and the source items that weigh.

A source item's weight is how far the score falls if the item is taken out of the user's source
history or view. A trained user embedding stays as it is; a newcomer's is made again without the
item. Only falls are listed.
"""

import jax
import numpy as np

from conet_jax.models.base import Params
from conet_jax.serve import newcomers
from conet_jax.serve.newcomers import USERS_AT_ONCE, Lists, Rows
from conet_jax.serve.recommender import Recommender, User

SOURCE_ITEMS = 3  # that an explanation names for each recommendation


def columns(recommender: Recommender, user: User, items: np.ndarray) -> dict[str, list]:
    """Columns of the explanation of one user's recommendations.

    Args:
      recommender: from ``recommender.load``.
      user: of any method.
      items: int[n], rows of the items that were recommended.

    Returns:
      ``cross_score``, how much of each score comes through the cross connections: the score minus
      what it is with every H at zero; ``source_1``, ``weight_1`` and so on. None where nothing
      crosses, or no source history is read, at inference.
    """
    out: dict[str, list] = {"cross_score": [None] * len(items)}
    for at in range(1, SOURCE_ITEMS + 1):
        out |= {f"source_{at}": [None] * len(items), f"weight_{at}": [None] * len(items)}
    if user.method == "popularity" or recommender.model.inference != "cross" or not len(items):
        return out
    dataset = recommender.dataset
    own = items_of(user, "source", recommender)
    lists = [own, *(np.delete(own, at) for at in range(len(own)))]
    both = {"target": [items_of(user, "target", recommender)] * len(lists), "source": lists}
    rows = _rows(recommender, user, both)
    scores = _scores(recommender, recommender.params, rows, both, items)
    if recommender.uncrossed is not None:
        first = {domain: some[:1] for domain, some in both.items()}
        given = None if rows is None else {name: own[:1] for name, own in rows.items()}
        alone = _scores(recommender, recommender.uncrossed, given, first, items)
        out["cross_score"] = (scores[0] - alone[0]).tolist()
    falls = scores[0] - scores[1:]  # [source items, items]
    order = np.argsort(-falls, axis=0, kind="stable")[:SOURCE_ITEMS]
    for place, best in enumerate(order, 1):
        for at, source in enumerate(best):
            if falls[source, at] > 0:
                out[f"source_{place}"][at] = dataset.source_item_ids[own[source]]
                out[f"weight_{place}"][at] = falls[source, at]
    return out


def items_of(user: User, domain: str, recommender: Recommender) -> np.ndarray:
    """Rows int[n] of the items that a user has in a domain: in training, or as given."""
    if user.row is None:
        given = getattr(user, domain)
        return np.empty(0, np.int64) if given is None else given
    pairs = getattr(recommender.dataset, domain)
    return pairs.indices[pairs.indptr[user.row] : pairs.indptr[user.row + 1]]


def _rows(recommender: Recommender, user: User, lists: Lists) -> Rows | None:
    """The user's rows of its tables with each of the lists; None without such a table."""
    params, embed = recommender.params, getattr(recommender.newcomers, "embed", None)
    if "user" not in params.tables:
        return None
    if user.row is None or recommender.model.pairing == "views":  # views are what the lists make
        return embed(lists)
    own = np.asarray(params.tables["user"][user.row])[None]
    return {"user": np.repeat(own, len(lists["source"]), axis=0)}


_score = jax.jit(
    lambda projected, users, items, *, model: model.scores(projected, users, items),
    static_argnames="model",
)


def _scores(
    recommender: Recommender,
    params: Params,
    rows: Rows | None,
    lists: Lists,
    items: np.ndarray,
) -> np.ndarray:
    """Scores f64[lists, items] for users given by their rows and lists of items."""
    parts = []
    for first in range(0, len(lists["source"]), USERS_AT_ONCE):
        some = slice(first, first + USERS_AT_ONCE)
        block = {domain: own[some] for domain, own in lists.items()}
        projected = newcomers.project(
            recommender.model,
            params,
            recommender.interactions,
            block,
            None if rows is None else {name: own[some] for name, own in rows.items()},
        )
        listed = np.broadcast_to(items.astype(np.int32), (USERS_AT_ONCE, len(items)))
        users = np.arange(USERS_AT_ONCE, dtype=np.int32)
        found = _score(projected, users, listed, model=recommender.model)
        parts.append(np.asarray(found, np.float64)[: len(block["source"])])
    return np.concatenate(parts)
