"""The ranker against the whole catalogue, block by block: no candidates are drawn."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices
from conet_jax.data.types import HeldOut, check_indices
from conet_jax.devices import SAME, SPLIT
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


@partial(jax.jit, static_argnames=("model", "block", "mesh"))
def _rank_full(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    touched: jax.Array,
    listed_items: jax.Array,
    *,
    model: Model,
    block: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ranks ``items`` [m] of ``users`` [m] against ``listed_items`` but ``touched`` [m, t]."""

    def rank_part(
        projected: Any, users: jax.Array, items: jax.Array, touched: jax.Array, listed_items: Any
    ) -> Any:
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
            # The held-out item is scored beside each block, by the same program: equal is equal.
            beside = {
                name: jnp.concatenate([own[name], devices.block(table, start, each)])
                for name, table in tables.items()
            }
            scores = model.scores({**own, **beside}, users, listed)
            above, tied, finite = jax.vmap(count_above)(scores, mask)
            return (carry[0] + above, carry[1] + tied, carry[2] & finite), None

        start = (jnp.zeros(m, jnp.int32), jnp.zeros(m, jnp.int32), jnp.ones(m, bool))
        firsts = each * jnp.arange(-(-num_rows // each), dtype=jnp.int32)
        return devices.all_gather(jax.lax.scan(body, start, firsts)[0])

    specs = (specs_of(projected), SPLIT, SPLIT, SPLIT, SAME)
    return devices.mapped(rank_part, mesh, specs, SAME)(
        projected, users, items, touched, listed_items
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
    block: int = 512,
) -> Ranks:
    """Ranks every held-out item against all items that its user has not touched in any split.

    With ``trained`` the catalogue is that of the items with a training pair (give such held-out
    items alone, see ``types.warm``).

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for histories.
      held_out: n users and their items; its candidates are not read.
      touched: (indptr int[users + 1], items int[nnz]), target items of each user in all splits.
      trained: bool[items], the items to rank against; None is all.
      users_at_once: users in a chunk on each device.
      block: items a block; no more than users_at_once x block scores exist at once on a device.

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
    width = int(np.diff(indptr)[held_out.users].max(initial=1))
    width = 1 << (width - 1).bit_length()
    at_once = users_at_once * mesh.size
    parts = []
    for first in range(0, len(held_out.users), at_once):
        users = held_out.users[first : first + at_once]
        items = held_out.items[first : first + at_once]
        rows = np.full((at_once, width), num_items + block * mesh.size, np.int32)
        for row, user in enumerate(users):
            own = indices[indptr[user] : indptr[user + 1]]
            rows[row, : len(own)] = own
        padding = (0, at_once - len(users))
        arguments = np.pad(users, padding), np.pad(items, padding), rows
        ranked = _rank_full(
            projected,
            *devices.put(arguments, mesh, SPLIT),
            devices.put(trained, mesh, SAME),
            model=model,
            block=block,
            mesh=mesh,
        )
        parts.append([np.asarray(x)[: len(users)] for x in ranked])
    above, tied, finite = (np.concatenate(column) for column in zip(*parts, strict=True))
    check_finite(finite, held_out.users)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    degrees = np.bincount(rows[trained[indices]], minlength=len(indptr) - 1)
    return Ranks(above, tied, (trained.sum() - degrees[held_out.users]).astype(np.int32))
