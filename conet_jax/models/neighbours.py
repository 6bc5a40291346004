"""Item neighbours: what items that the same users have say of a pair, beside its factors.

A few dozen factors keep what many users share, and lose that the three readers of one book all have
this other one. For a user u with items I_d in a domain d

    ``s_d(u, i) = sum_{j in I_d, j != i} n_ij / sqrt((n_i + c) (n_j + c))``

with n_ij users of both items, n_i of item i, and c against chance: the cosines of i to what the
user has (Sarwar et al. 2001, *Item-based collaborative filtering*). As in Koren 2008,
*Factorization meets the neighborhood*, a logit is that of the factors plus ``v^T s``, v learned.

Nothing may be learned from a sum that knows the answer: of an observed pair (u, i), u itself is one
of the n_ij for all its other items. There n_ij - 1 and n_i - 1 stand for n_ij and n_i, which gives
the sum as it would be without the pair.

Of an item the ``size`` nearest of each domain are kept, of a user the ``size`` items of each domain
with the fewest users, in tables of floats:

- ``user_items`` f32[users, domains 2 size]: for each domain ids and 1 / sqrt(n_j + c);
- ``target_neighbours``, ``source_neighbours`` f32[items, domains 2 size + 1]: for each domain ids
  and n_ij, and at last n_i.

An id is the item's row, those of the source after the target's, and ``_NOBODY`` where there are
fewer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from conet_jax import devices
from conet_jax.errors import InputError
from conet_jax.models.base import Examples, Sizes

_OTHER = 0.2  # of the start of v: that of the other domain, where the item's own is 1
_CHANCE = 2.0  # c
_NOBODY = 1 << 24  # above it floats do not hold every whole number
_PAIRS_AT_ONCE = 1 << 23  # pairs of items with a user in common, among which the nearest are chosen


def init(
    sizes: Sizes, domains: Sequence[str], size: int, of: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns the tables that ``fit`` makes, zero."""
    if not size:
        return {}
    width, rows = 2 * size * len(domains), _counts(sizes)
    items = {f"{domain}_neighbours": jnp.zeros((rows[domain], width + 1)) for domain in of}
    return {"user_items": jnp.zeros((sizes.users, width)), **items}


def weights(domain: str, view: Sequence[str], own: float) -> jax.Array:
    """Returns v of a domain's items at the start, f32[domains of the view]; ``own`` is its own."""
    return jnp.array([own if d == domain else _OTHER * own for d in view], float)


def fit(
    interactions: Any,
    sizes: Sizes,
    domains: Sequence[str],
    size: int,
    of: Sequence[str],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """Finds the neighbours in the training pairs: each process those of its devices' rows.

    Args:
      interactions: training pairs (``interactions.Interactions`` or ``ials.Pairs``) by domain.
      sizes: rows of the tables.
      domains: those that neighbours are looked for in.
      size: neighbours of an item in each domain; 0 makes no tables.
      of: domains of the items whose neighbours they are.
      mesh: the devices, over which rows are split; None is one.

    Returns:
      The tables, see the module's docstring.

    Raises:
      InputError: there are more items than ids.
    """
    if not size:
        return {}
    counts = _counts(sizes)
    total = sum(counts[domain] for domain in domains)
    if total >= _NOBODY:
        raise InputError(
            f"config.neighbours is {size}, and there are {total:,} items: expected fewer than "
            f"{_NOBODY:,}, or config.neighbours=0"
        )
    lists = {
        domain: sparse.csr_matrix(
            (
                np.ones(len(interactions[domain].users), np.float32),
                (np.asarray(interactions[domain].users), np.asarray(interactions[domain].items)),
            ),
            shape=(sizes.users, counts[domain]),
        )
        for domain in domains
    }
    degrees = {
        domain: np.bincount(own.indices, minlength=own.shape[1]) for domain, own in lists.items()
    }
    mesh = devices.one_device() if mesh is None else mesh
    by_item = {domain: lists[domain].T.tocsr() for domain in of}
    rows = {"user_items": sizes.users} | {f"{domain}_neighbours": counts[domain] for domain in of}

    def of_device(d: int) -> dict[str, np.ndarray]:
        users = {domain: own[d :: mesh.size] for domain, own in lists.items()}
        tables = {"user_items": users_of(users, degrees, size)}
        for domain in of:
            items = np.arange(d, counts[domain], mesh.size)
            near = [
                _neighbours(
                    by_item[domain][items],
                    lists[other],
                    degrees[other],
                    size,
                    items if other == domain else None,
                )
                for other in domains
            ]
            near = [_moved(own, first) for own, first in zip(near, _firsts(lists), strict=True)]
            tables[f"{domain}_neighbours"] = np.concatenate(
                [*near, degrees[domain][items, None]], axis=1, dtype=np.float32
            )
        return {
            name: np.pad(table, [(0, -(-rows[name] // mesh.size) - len(table)), (0, 0)])
            for name, table in tables.items()
        }

    return devices.from_parts(of_device, mesh)


def users_of(
    lists: dict[str, sparse.csr_matrix], degrees: dict[str, np.ndarray], size: int
) -> np.ndarray:
    """Rows f32[users, domains 2 size] of ``user_items``.

    Args:
      lists: of each domain users' items, ones [users, items].
      degrees: of each domain int[items], the training pairs of its items.
      size: items of a user in each domain.
    """
    weights = {domain: (own + _CHANCE) ** -0.5 for domain, own in degrees.items()}
    parts = []
    for (domain, own), first in zip(lists.items(), _firsts(lists), strict=True):
        weighed = own.multiply(weights[domain]).tocsr().astype(np.float32)
        parts.append(_moved(_largest(weighed, np.ones(own.shape[1]), size), first))
    return np.concatenate(parts, axis=1)


def of_lists(
    tables: dict[str, Any], domains: Sequence[str]
) -> Callable[[dict[str, list[np.ndarray]], int], dict[str, np.ndarray]]:
    """Returns what makes rows of the tables of users from lists of their items, by domain."""
    names = {domain: f"{domain}_neighbours" for domain in domains}
    degrees = {  # whole numbers, so that weights are rounded as in ``fit``
        domain: np.asarray(tables[name])[:, -1].astype(int)
        for domain, name in names.items()
        if name in tables
    }

    def rows(lists: dict[str, list[np.ndarray]], size: int) -> dict[str, np.ndarray]:
        if not size:
            return {}
        pairs = {}
        for domain, own in degrees.items():
            ends = np.cumsum([0, *map(len, lists[domain])])
            items = np.concatenate([np.empty(0, int), *lists[domain]])
            given = np.ones(len(items), np.float32), items, ends
            pairs[domain] = sparse.csr_matrix(given, shape=(len(ends) - 1, len(own)))
        return {"user_items": users_of(pairs, degrees, size)}

    return rows


def _neighbours(
    by_item: sparse.csr_matrix,
    others: sparse.csr_matrix,
    degrees: np.ndarray,
    size: int,
    themselves: np.ndarray | None,
) -> np.ndarray:
    """Those of some items f32[items, 2 size] among the items of others.

    Args:
      by_item: users of the items, ones [items, users].
      others: [users, others].
      degrees: int[others].
      size: most neighbours.
      themselves: int[items], which of the others the items are; None if they are none of them.
    """
    weights = (degrees + _CHANCE) ** -0.5
    # Pairs of items, counting each user that they have in common: so many at once.
    work = np.cumsum(by_item @ np.diff(others.indptr).astype(np.int64))
    blocks, first = [], 0
    while first < len(work):
        done = work[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(work, done + _PAIRS_AT_ONCE, side="right")))
        common = (by_item[first:last] @ others).tocsr()
        if themselves is not None:  # no item is its own neighbour
            common.data[themselves[first:last][_rows(common)] == common.indices] = 0
        blocks.append(_largest(common, weights, size))
        first = last
    return np.concatenate(blocks) if blocks else np.zeros((0, 2 * size), np.float32)


def _rows(matrix: sparse.csr_matrix) -> np.ndarray:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _counts(sizes: Sizes) -> dict[str, int]:
    """Items of each domain."""
    return {"target": sizes.target_items, "source": sizes.source_items}


def _firsts(lists: dict[str, sparse.csr_matrix]) -> list[int]:
    """The first id of each domain."""
    return [0, *np.cumsum([own.shape[1] for own in lists.values()])[:-1].tolist()]


def _moved(rows: np.ndarray, first: int) -> np.ndarray:
    """Makes ids of rows f32[n, 2 size] of columns."""
    ids = rows[:, : rows.shape[1] // 2]
    ids[ids != _NOBODY] += first
    return rows


def _largest(matrix: sparse.csr_matrix, weights: np.ndarray, size: int) -> np.ndarray:
    """Columns and entries f32[rows, 2 size] of the largest entries times the column's weight.

    Of equal ones the first columns. Entries of 0 are none.
    """
    matrix.eliminate_zeros()
    matrix.sort_indices()
    rows = _rows(matrix)
    values = (matrix.data * weights[matrix.indices]).astype(np.float32)
    # Positive floats are in the order of their bits: one key for row and value.
    keys = (rows.astype(np.uint64) << np.uint64(32)) | (~values.view(np.uint32)).astype(np.uint64)
    order = np.argsort(keys, kind="stable")
    places = np.arange(len(rows)) - matrix.indptr[rows]
    kept = places < size
    out = np.zeros((matrix.shape[0], 2, size), np.float32)
    out[:, 0] = _NOBODY
    out[rows[kept], 0, places[kept]] = matrix.indices[order][kept]
    out[rows[kept], 1, places[kept]] = matrix.data[order][kept]
    return out.reshape(len(out), -1)


def sums(users: jax.Array, items: jax.Array, labels: jax.Array, size: int) -> jax.Array:
    """The sums s_d of pairs, as they would be if no pair were observed.

    Args:
      users: f32[n, domains 2 size], rows of ``user_items``.
      items: f32[n, domains 2 size + 1], rows of the items' neighbours.
      labels: f32[n], 1 of observed pairs.
      size: neighbours of each domain.

    Returns:
      f32[n, domains], through which no gradient flows.
    """
    users, items = jax.lax.stop_gradient((users, items))
    near, degrees = items[:, :-1], items[:, -1]
    own_ids, own_weights = _split(users, size)
    ids, common = _split(near, size)

    def match(at: int, found: jax.Array) -> jax.Array:  # one of the user's items at a time
        same = ids == own_ids[:, :, at, None]
        return found + jnp.where(same, own_weights[:, :, at, None], 0.0)

    matched = jax.lax.fori_loop(0, size, match, jnp.zeros_like(ids), unroll=4)
    left = jnp.maximum(common - labels[:, None, None], 0.0)
    total = jnp.sum(matched * left, axis=-1)
    return total / jnp.sqrt(jnp.maximum(degrees - labels, 0.0) + _CHANCE)[:, None]


def _split(rows: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Ids and values f32[n, domains, size] of rows f32[n, domains 2 size]."""
    both = rows.reshape(len(rows), -1, 2, size)
    return both[:, :, 0], both[:, :, 1]


def term(v: jax.Array, *of_pairs: Any) -> jax.Array:
    """``v^T s`` f32[n] of the last domains, as many as v has entries; arguments are of ``sums``."""
    return sums(*of_pairs)[:, -len(v) :] @ v


def lookups(target: Examples, source: Examples | None) -> dict[str, jax.Array]:
    """Rows that ``sums`` reads: of users int32[domains of examples, n], of items int32[n]."""
    examples = {"target": target} | ({} if source is None else {"source": source})
    users = jnp.stack([own.users for own in examples.values()])
    items = {f"{domain}_neighbours": own.items for domain, own in examples.items()}
    return {"user_items": users, **items}


def project(
    tables: dict[str, jax.Array],
    v: jax.Array,
    num_ids: int,
    size: int,
    domains: Sequence[str],
    domain: str = "target",
) -> dict[str, jax.Array]:
    """What ``scores`` of a domain's items reads; ``num_ids`` are the items of all domains.

    Returns:
      ``user_ids`` int32[users, domains size] and ``user_weights`` f32 of that shape, as in
      ``user_items``; ``item_ids`` int32[items, domains size], the neighbours, and ``item_weights``,
      v_d n_ij / sqrt(n_i + c); ``places`` f32[ids], zero.
    """
    near, degrees = tables[f"{domain}_neighbours"][:, :-1], tables[f"{domain}_neighbours"][:, -1]
    ids, common = _split(near, size)
    of_domain = jnp.zeros(ids.shape[1], v.dtype).at[-len(v) :].set(v)
    values = common * of_domain[None, :, None] / jnp.sqrt(degrees + _CHANCE)[:, None, None]
    own, weights = _split(tables["user_items"], size)
    return {
        "user_ids": own.reshape(len(own), -1).astype(jnp.int32),
        "user_weights": weights.reshape(len(own), -1),
        "item_ids": ids.reshape(len(ids), -1).astype(jnp.int32),
        "item_weights": values.reshape(len(ids), -1),
        "places": jnp.zeros(num_ids),
    }


def scores(projected: dict[str, jax.Array], users: jax.Array, items: jax.Array) -> jax.Array:
    """Returns ``v^T s`` f32[n, c] of users int32[n] and items int32[n, c] that they do not have.

    Zero where ``projected`` is not, or no more (``apart``), of a model with neighbours. Each user's
    items are laid out over all ids, so that a neighbour is looked up by its id; one user after the
    other, since that is much room.
    """
    if "item_ids" not in projected:
        return jnp.zeros(())

    def of_user(at: jax.Array, out: jax.Array) -> jax.Array:
        ids, weights = projected["user_ids"][users[at]], projected["user_weights"][users[at]]
        places = projected["places"].at[ids].set(weights, mode="drop")
        near, values = projected["item_ids"][items[at]], projected["item_weights"][items[at]]
        found = places.at[near].get(mode="fill", fill_value=0.0)
        return out.at[at].set(jnp.sum(found * values, axis=1))

    return jax.lax.fori_loop(0, users.shape[0], of_user, jnp.zeros(items.shape))


class Sums(NamedTuple):
    """``v^T s`` of users and all items at once: a product of sparse matrices, on the host.

    A user has few items, and these are neighbours of few: far fewer than all items have neighbours.

    Attributes:
      ids: int32[users, domains size], of ``project``.
      weights: f32[users, domains size], likewise.
      by_neighbour: [ids, items], ``item_weights`` of ``project`` by the neighbours' ids.
    """

    ids: np.ndarray
    weights: np.ndarray
    by_neighbour: sparse.csr_matrix

    def of(self, users: np.ndarray) -> np.ndarray:
        """The sums f32[n, items] of users int[n] and items that they do not have."""
        ids = self.ids[users]
        ends = np.cumsum([0, *(ids != _NOBODY).sum(axis=1)])
        given = self.weights[users][ids != _NOBODY], ids[ids != _NOBODY], ends
        own = sparse.csr_matrix(given, shape=(len(users), self.by_neighbour.shape[0]))
        return (own @ self.by_neighbour).toarray()

    def among(self, items: np.ndarray) -> "Sums":
        """Those of items int[n] alone."""
        return self._replace(by_neighbour=self.by_neighbour[:, items])


def apart(
    projected: dict[str, Any], of_items: Sums | None = None
) -> tuple[dict[str, Any], Sums | None]:
    """Takes the neighbours out of projected tables.

    Args:
      projected: from ``Model.project``.
      of_items: of other users and the same items, if at hand.

    Returns:
      (the other tables, with which ``Model.scores`` is what it was less ``Sums.of``; the ``Sums``,
      None of a model without neighbours).
    """
    if "item_ids" not in projected:
        return projected, None
    names = {"user_ids", "user_weights", "item_ids", "item_weights", "places"}
    rest = {name: table for name, table in projected.items() if name not in names}
    own = np.asarray(projected["user_ids"]), np.asarray(projected["user_weights"])
    if of_items is not None:
        return rest, Sums(*own, of_items.by_neighbour)
    ids, weights = np.asarray(projected["item_ids"]), np.asarray(projected["item_weights"])
    kept = (ids != _NOBODY) & (weights != 0)
    columns = np.broadcast_to(np.arange(len(ids), dtype=np.int32)[:, None], ids.shape)
    by_neighbour = sparse.csr_matrix(
        (weights[kept], (ids[kept], columns[kept])),
        shape=(len(projected["places"]), len(ids)),
    )
    return rest, Sums(*own, by_neighbour)
