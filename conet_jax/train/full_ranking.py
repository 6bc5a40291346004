"""The whole catalogue, block by block: ranks without drawn candidates, and the best items."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices
from conet_jax.data.types import HeldOut, check_indices
from conet_jax.devices import SAME, SPLIT
from conet_jax.models import neighbours
from conet_jax.models.base import Model, Params
from conet_jax.train.interactions import Interactions
from conet_jax.train.ranking import (
    Ranks,
    check_finite,
    check_held_out,
    count_above,
    project,
    specs_of,
    tables_of,
)


def _over_blocks(
    take: Callable[..., Any],
    carry: Any,
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    touched: jax.Array,
    listed_items: jax.Array,
    sums: jax.Array | None,
    *,
    model: Model,
    block: int,
) -> Any:
    """Scores the catalogue for a device's users, block by block of items in ascending order.

    Args:
      take: (carry, scores f32[m, 1 + width], mask bool[m, width], ids i32[width]) -> carry, told
        of each block: the scores of ``items`` and of the block's, which of these count, who they
        are.
      carry: before the first block.
      projected: this device's part.
      users: i32[m], this device's.
      items: i32[m], an item of each, scored beside each block by the same program: equal is equal.
      touched: i32[m, t], items that do not count for their user.
      listed_items: bool[items], those that count at all.
      sums: f32[m, items], what each score has beside the model's (``neighbours.apart``), on one
        device; None is nothing.
      model: the model.
      block: items a block.

    Returns:
      The carry after the last block.
    """
    m, n, tables = users.shape[0], devices.size(), tables_of("item", projected)
    num_rows = tables["item"].shape[0]
    each = min(-(-block // n), num_rows)
    width = n * each
    own = {**projected, **devices.read(tables, items)}
    rows = jnp.arange(m, dtype=jnp.int32)
    if n > 1:
        own |= devices.read(tables_of("user", projected), users)
        users = rows
    listed = jnp.broadcast_to(m + jnp.arange(width, dtype=jnp.int32)[None, :], (m, width))
    listed = jnp.concatenate([rows[:, None], listed], axis=1)

    def body(carry: Any, first: jax.Array) -> tuple[Any, None]:
        start = jnp.minimum(first, num_rows - each)  # the last block reaches back
        ids = n * start + jnp.arange(width, dtype=jnp.int32)
        new = (ids >= n * first) & (ids < listed_items.size)
        new = new & listed_items[jnp.minimum(ids, listed_items.size - 1)]
        here = touched - n * start
        inside = jnp.where((here >= 0) & (here < width), here, width)
        mask = jnp.broadcast_to(new, (m, width))
        at = jnp.broadcast_to(rows[:, None], inside.shape), inside
        mask = mask.at[at].set(False, mode="drop")
        beside = {
            name: jnp.concatenate([own[name], devices.block(table, start, each)])
            for name, table in tables.items()
        }
        scores = model.scores({**own, **beside}, users, listed)
        if sums is not None:
            of_block = jax.lax.dynamic_slice_in_dim(sums, start, each, axis=1)
            scores += jnp.concatenate([sums[rows, items][:, None], of_block], axis=1)
        return take(carry, scores, mask, ids), None

    firsts = each * jnp.arange(-(-num_rows // each), dtype=jnp.int32)
    return jax.lax.scan(body, carry, firsts)[0]


@partial(jax.jit, static_argnames=("model", "block", "mesh"))
def _rank_full(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    touched: jax.Array,
    sums: jax.Array | None,
    listed_items: jax.Array,
    *,
    model: Model,
    block: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ranks ``items`` [m] of ``users`` [m] against ``listed_items`` but ``touched`` [m, t]."""

    def rank_part(
        projected: Any,
        users: jax.Array,
        items: jax.Array,
        touched: jax.Array,
        sums: Any,
        listed_items: Any,
    ) -> Any:
        def count(ranks: Any, scores: jax.Array, mask: jax.Array, ids: jax.Array) -> Any:
            above, tied, finite = jax.vmap(count_above)(scores, mask)
            return ranks[0] + above, ranks[1] + tied, ranks[2] & finite

        m = users.shape[0]
        start = (jnp.zeros(m, jnp.int32), jnp.zeros(m, jnp.int32), jnp.ones(m, bool))
        given = projected, users, items, touched, listed_items, sums
        return devices.all_gather(_over_blocks(count, start, *given, model=model, block=block))

    specs = (specs_of(projected), SPLIT, SPLIT, SPLIT, SPLIT, SAME)
    return devices.mapped(rank_part, mesh, specs, SAME)(
        projected, users, items, touched, sums, listed_items
    )


def rank_full(
    model: Model,
    params: Params,
    interactions: dict[str, Interactions],
    held_out: HeldOut,
    touched: tuple[np.ndarray, np.ndarray],
    trained: np.ndarray | None = None,
    *,
    users_at_once: int = 64,
    block: int = 64,
) -> Ranks:
    """Ranks every held-out item against all items that its user has not touched.

    With ``trained`` the catalogue is that of the items with a training pair (give such held-out
    items alone, see ``types.warm``).

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for histories.
      held_out: n users and their items; its candidates are not read.
      touched: (indptr int[users + 1], items int[nnz]), target items of each user that are not
        ranked against. Those of all splits leave none of the user's own, as drawn candidates do;
        without the user's test items, one of these is ranked against the others, too.
      trained: bool[items], the items to rank against; None is all.
      users_at_once: users in a chunk on each device.
      block: items a block; the activations of users_at_once x block pairs exist at once on a
        device, and stay in a cache of a CPU. Of a model with neighbours, on one device, there are
        also users_at_once x items sums.

    Returns:
      ``Ranks``.

    Raises:
      Diverged: a score is NaN or infinite.
      InputError: a user or item is out of range.
    """
    projected = project(params, interactions, model=model)
    mesh = devices.mesh_of(projected)
    # Rows of several devices are padded.
    num_items = interactions["target"].num_items if mesh.size > 1 else len(projected["item"])
    check_held_out(held_out, interactions, projected, num_items)
    indptr, indices = touched
    check_indices("touched item", indices, num_items)
    trained = np.ones(num_items, bool) if trained is None else trained
    given = devices.put(trained, mesh, SAME)
    projected, sums = _apart(projected, mesh)
    parts = []
    for count, users, items, own in _chunks(
        held_out.users,
        held_out.items,
        touched,
        users_at_once * mesh.size,
        num_items + block * mesh.size,
    ):
        arguments = devices.put((users, items, own, sums(users)), mesh, SPLIT)
        ranked = _rank_full(projected, *arguments, given, model=model, block=block, mesh=mesh)
        parts.append([np.asarray(x)[:count] for x in ranked])
    above, tied, finite = (np.concatenate(column) for column in zip(*parts, strict=True))
    check_finite(finite, held_out.users)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    degrees = np.bincount(rows[trained[indices]], minlength=len(indptr) - 1)
    own = held_out.users.astype(np.int64) * num_items + held_out.items
    itself = trained[held_out.items] & ~np.isin(own, rows * num_items + indices)
    others = trained.sum() - degrees[held_out.users] - itself
    return Ranks(above, tied, others.astype(np.int32))


def _apart(projected: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Callable[..., Any]]:
    """``neighbours.apart`` on one device; the second is users int[n] -> f32[n, items] or None."""
    sums = None
    if mesh.size == 1:
        projected, sums = neighbours.apart(projected)
    return projected, (lambda users: None) if sums is None else sums.of


def _chunks(
    users: np.ndarray,
    items: np.ndarray | None,
    touched: tuple[np.ndarray, np.ndarray],
    size: int,
    nothing: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Users of a chunk, then the chunk padded to ``size``: users, items, touched items [size, t].

    ``nothing`` stands in ``touched`` where a user has fewer; an item is among its own.
    """
    indptr, indices = touched
    width = int(np.diff(indptr)[users].max(initial=1)) + (items is not None)
    width = 1 << (width - 1).bit_length()  # so that few shapes are compiled
    for first in range(0, len(users), size):
        some = users[first : first + size]
        rows = np.full((size, width), nothing, np.int32)
        for row, user in enumerate(some):
            own = indices[indptr[user] : indptr[user + 1]]
            rows[row, : len(own)] = own
        ranked = np.zeros_like(some) if items is None else items[first : first + size]
        if items is not None:
            rows[: len(some), -1] = ranked
        padding = (0, size - len(some))
        yield len(some), np.pad(some, padding), np.pad(ranked, padding), rows


class Best(NamedTuple):
    """The k best items of m users among those seen so far.

    Attributes:
      items: int32[m, k].
      scores: f32[m, k], descending; -inf where fewer than k have been seen.
      finite: bool[m], whether all scores that count are.
    """

    items: jax.Array
    scores: jax.Array
    finite: jax.Array


def nothing_yet(m: int, k: int) -> Best:
    """Returns the ``Best`` of m users before any item."""
    return Best(jnp.zeros((m, k), jnp.int32), jnp.full((m, k), -jnp.inf), jnp.ones(m, bool))


def keep_best(best: Best, scores: jax.Array, mask: jax.Array, items: jax.Array) -> Best:
    """Returns the best of before and of a block, earlier ones first where scores are equal.

    Args:
      best: of the blocks before.
      scores: f32[m, width], of the block's items.
      mask: bool[m, width], which of them count.
      items: int32[m, width], who they are.
    """
    finite = best.finite & jnp.all(jnp.isfinite(scores) | ~mask, axis=1)
    # Earlier items stand first, and top_k keeps the order of equals.
    found = jnp.concatenate([best.scores, jnp.where(mask, scores, -jnp.inf)], axis=1)
    listed = jnp.concatenate([best.items, items], axis=1)
    found, at = jax.lax.top_k(found, best.items.shape[1])
    return Best(jnp.take_along_axis(listed, at, axis=1), found, finite)


@partial(jax.jit, static_argnames=("model", "k", "block", "mesh"))
def _best(
    projected: Any,
    users: jax.Array,
    touched: jax.Array,
    sums: jax.Array | None,
    listed_items: jax.Array,
    *,
    model: Model,
    k: int,
    block: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """The k best of ``listed_items`` but ``touched`` [m, t] for ``users`` [m], -1 for none."""

    def best_part(
        projected: Any, users: jax.Array, touched: jax.Array, sums: Any, listed_items: Any
    ) -> Any:
        def take(best: Best, scores: jax.Array, mask: jax.Array, ids: jax.Array) -> Best:
            return keep_best(best, scores[:, 1:], mask, jnp.broadcast_to(ids, mask.shape))

        m = users.shape[0]
        anything = jnp.zeros(m, jnp.int32)
        given = projected, users, anything, touched, listed_items, sums
        best = _over_blocks(take, nothing_yet(m, k), *given, model=model, block=block)
        chosen = jnp.where(best.scores == -jnp.inf, -1, best.items)
        return devices.all_gather((chosen, best.finite))

    specs = (specs_of(projected), SPLIT, SPLIT, SPLIT, SAME)
    return devices.mapped(best_part, mesh, specs, SAME)(
        projected, users, touched, sums, listed_items
    )


def best_items(
    model: Model,
    params: Params,
    interactions: dict[str, Interactions],
    users: np.ndarray,
    touched: tuple[np.ndarray, np.ndarray],
    trained: np.ndarray,
    *,
    k: int,
    users_at_once: int = 64,
    block: int = 64,
) -> np.ndarray:
    """The k best items of each user, of those with a training pair that the user has not touched.

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for histories.
      users: int[n].
      touched: (indptr int[users + 1], items int[nnz]), target items that a user must not get.
      trained: bool[items], the items to choose from.
      k: items a user.
      users_at_once: users in a chunk on each device.
      block: items a block; see ``rank_full``.

    Returns:
      int32[n, k], best first; of equal scores, the first item comes first. Where fewer than k are
      left, -1 stands in the other places.

    Raises:
      Diverged: a score is NaN or infinite.
      InputError: a user or item is out of range.
    """
    projected = project(params, interactions, model=model)
    mesh = devices.mesh_of(projected)
    num_items = len(trained)
    check_indices("user", users, len(touched[0]) - 1)
    check_indices("touched item", touched[1], num_items)
    given = devices.put(trained, mesh, SAME)
    size, nothing = users_at_once * mesh.size, num_items + block * mesh.size
    projected, sums = _apart(projected, mesh)
    parts = []
    for count, some, _, own in _chunks(users, None, touched, size, nothing):
        arguments = devices.put((some, own, sums(some)), mesh, SPLIT)
        best, finite = _best(projected, *arguments, given, model=model, k=k, block=block, mesh=mesh)
        parts.append((np.asarray(best)[:count], np.asarray(finite)[:count]))
    best, finite = (np.concatenate(column) for column in zip(*parts, strict=True))
    check_finite(finite, users)
    return best
