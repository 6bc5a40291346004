"""The ranker: one held-out item among its candidates, for all users in one program.

Scores are logits: a float32 sigmoid makes all above 17 equal. A rank under ties is the pair
(above, tied), the numbers of candidates scored strictly higher and equal; ``metrics`` takes the
expectation under a random order of the tied.

On several devices (``devices``) each ranks its part of the users, and fetches the rows that these
and their candidates need from the devices that hold them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices, metrics
from conet_jax.data.types import HeldOut, check_indices, warm
from conet_jax.devices.axis import SAME, SPLIT
from conet_jax.errors import Diverged
from conet_jax.models.base import Model, Params
from conet_jax.train.interactions import Interactions
from conet_jax.train.state import PARAMS

_SCORES_A_CHUNK = 1 << 15  # pairs whose activations are alive at once; a few MiB


class Ranks(NamedTuple):
    """Ranks of n held-out items.

    Attributes:
      above: int32[n], candidates scored strictly higher.
      tied: int32[n], candidates scored equal.
      candidates: int32[n], candidates that count.
    """

    above: np.ndarray
    tied: np.ndarray
    candidates: np.ndarray


def count_above(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ranks one item among its candidates.

    Args:
      scores: f32[1 + c], the held-out item's first.
      mask: bool[c], False where a candidate does not count.

    Returns:
      (above int32[], tied int32[], finite bool[]: whether all scores that count are).

    Example:
      >>> above, tied, finite = count_above(jnp.array([2.0, 3.0, 2.0, 9.0]),
      ...                                   jnp.array([True, True, False]))
      >>> int(above), int(tied), bool(finite)
      (1, 1, True)
    """
    own, others = scores[0], scores[1:]
    above = jnp.sum((others > own) & mask, dtype=jnp.int32)
    tied = jnp.sum((others == own) & mask, dtype=jnp.int32)
    return above, tied, jnp.isfinite(own) & jnp.all(jnp.isfinite(others) | ~mask)


@partial(jax.jit, static_argnames=("model", "chunk", "mesh"))
def _rank_all(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    masks: jax.Array,
    *,
    model: Model,
    chunk: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def rank(args: tuple[jax.Array, jax.Array, jax.Array], *, projected: Any) -> Any:
        users, items, masks = args
        if devices.size() > 1:
            projected = _fetch(projected, users, items)
            users = jnp.arange(users.size, dtype=jnp.int32)
            items = jnp.arange(items.size, dtype=jnp.int32).reshape(items.shape)
        counted = jax.vmap(jax.vmap(count_above, in_axes=(None, 0)))
        return counted(model.scores(projected, users, items), masks)

    def rank_part(projected: Any, *arguments: jax.Array) -> Any:
        split = tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in arguments)
        ranked = jax.lax.map(partial(rank, projected=projected), split)
        return devices.all_gather(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), ranked))

    specs = (_specs(projected), SPLIT, SPLIT, SPLIT)
    return devices.mapped(rank_part, mesh, specs, SAME)(projected, users, items, masks)


def _of(kind: str, projected: dict[str, Any]) -> dict[str, Any]:
    """The projected tables with a row for each "user" or "item"."""
    return {name: table for name, table in projected.items() if name.startswith(kind)}


def _specs(projected: dict[str, Any]) -> dict[str, Any]:
    split = {**_of("user", projected), **_of("item", projected)}
    return {name: SPLIT if name in split else SAME for name in projected}


def _fetch(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> dict[str, Any]:
    """The projected tables with the rows of these users and items alone, in their order."""
    return {
        **projected,
        **devices.read(_of("user", projected), users.reshape(-1)),
        **devices.read(_of("item", projected), items.reshape(-1)),
    }


def project(params: Params, interactions: Any, *, model: Model) -> Any:
    """Returns ``Model.project``, compiled, on all devices of the parameters."""
    return _project(params, interactions, model=model, mesh=devices.mesh_of(params))


@partial(jax.jit, static_argnames=("model", "mesh"))
def _project(params: Params, interactions: Any, *, model: Model, mesh: jax.sharding.Mesh) -> Any:
    if mesh.size == 1:
        return model.project(params, interactions)
    specs = {domain: own.specs() for domain, own in interactions.items()}
    projected = jax.eval_shape(model.project, params, interactions)
    return devices.mapped(model.project, mesh, (PARAMS, specs), _specs(projected))(
        params, interactions
    )


def rank_held_out(
    model: Model, params: Params, interactions: dict[str, Interactions], held_out: HeldOut
) -> Ranks:
    """Ranks every held-out item among its candidates.

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for histories.
      held_out: n users, their items and candidates.

    Returns:
      ``Ranks``.

    Raises:
      Diverged: a score is NaN or infinite.
      InputError: a user or item is out of range.
    """
    projected = project(params, interactions, model=model)
    own = interactions["target"].num_items if interactions else None
    _check_held_out(held_out, interactions, projected, own)
    return rank_projected(model, projected, held_out)


class Ranked(NamedTuple):
    """Ranks of the held-out items of ``users`` int32[n]."""

    users: np.ndarray
    ranks: Ranks


def rank_twice(
    model: Model,
    params: Params,
    interactions: dict[str, Interactions],
    held_out: HeldOut,
    trained: np.ndarray,
) -> tuple[Ranked, Ranked]:
    """``rank_held_out`` of all held-out items as they are given, and of the warm ones, at once.

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for histories.
      held_out: n users, their items and candidates.
      trained: bool[items], whether an item has a training pair.

    Returns:
      (all n; those with a training pair, among candidates with one: see ``types.warm``).

    Raises:
      Diverged: a score is NaN or infinite.
      InputError: a user or item is out of range.
    """
    projected = project(params, interactions, model=model)
    _check_held_out(held_out, interactions, projected, len(trained))
    kept, mask = warm(held_out, trained)
    everything, warm_ranks = _ranked(model, projected, held_out, [held_out.mask, mask])
    return (
        Ranked(held_out.users, everything),
        Ranked(held_out.users[kept], Ranks(*(x[kept] for x in warm_ranks))),
    )


def _check_held_out(
    held_out: HeldOut,
    interactions: dict[str, Interactions] | None,
    projected: dict[str, Any],
    num_items: int | None = None,
) -> None:
    num_users = min(map(len, _of("user", projected).values()), default=2**31)
    num_items = len(projected["item"]) if num_items is None else num_items
    if interactions and "target" in interactions:  # tables on several devices are padded
        num_users = interactions["target"].num_users
    check_indices("user", held_out.users, num_users)
    check_indices("held-out item", held_out.items, num_items)
    check_indices("candidate", held_out.candidates, num_items)


def rank_projected(model: Model, projected: Any, held_out: HeldOut) -> Ranks:
    """``rank_held_out`` from tables that went through ``project``; indices are not checked."""
    return _ranked(model, projected, held_out, [held_out.mask])[0]


def _ranked(
    model: Model, projected: Any, held_out: HeldOut, masks: list[np.ndarray]
) -> list[Ranks]:
    """Ranks under each mask bool[n, c] of the candidates."""
    mesh = devices.mesh_of(projected)
    arguments, chunk = _ranker_arguments(held_out, masks, mesh)
    above, tied, finite = _rank_all(projected, *arguments, model=model, chunk=chunk, mesh=mesh)
    count = len(held_out.users)
    _check_finite(np.asarray(finite)[:count].all(axis=1), held_out.users)
    above, tied = np.asarray(above)[:count], np.asarray(tied)[:count]
    return [
        Ranks(above[:, at], tied[:, at], mask.sum(1, dtype=np.int32))
        for at, mask in enumerate(masks)
    ]


def ranker_memory(model: Model, projected: Any, held_out: HeldOut) -> int:
    """Returns the bytes of temporaries of the ranker compiled for these users."""
    mesh = devices.mesh_of(projected)
    arguments, chunk = _ranker_arguments(held_out, [held_out.mask], mesh)
    lowered = _rank_all.lower(projected, *arguments, model=model, chunk=chunk, mesh=mesh)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def _ranker_arguments(
    held_out: HeldOut, masks: list[np.ndarray], mesh: jax.sharding.Mesh
) -> tuple[tuple[np.ndarray, ...], int]:
    """Users, listed items and masks [n, masks, c], in whole chunks a device; a chunk's users."""
    listed = np.concatenate([held_out.items[:, None], held_out.candidates], axis=1)
    chunk = max(1, min(-(-len(listed) // mesh.size), _SCORES_A_CHUNK // listed.shape[1]))
    padding = -len(listed) % (chunk * mesh.size)

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))

    arguments = tuple(pad(x) for x in (held_out.users, listed, np.stack(masks, axis=1)))
    return devices.put(arguments, mesh, SPLIT), chunk


def _check_finite(finite: np.ndarray, users: np.ndarray) -> None:
    if not finite.all():
        user = int(users[int(np.argmin(finite))])
        raise Diverged(
            f"{int((~finite).sum())} of {len(finite)} users have a NaN or infinite score (first: "
            f"user row {user})"
        )


def rank_scores(scores: np.ndarray, mask: np.ndarray) -> Ranks:
    """Ranks from scores made elsewhere (an oracle, popularity, another library).

    Args:
      scores: float[n, 1 + c], the held-out item's first.
      mask: bool[n, c].

    Returns:
      ``Ranks``, computed in the scores' own precision.

    Raises:
      Diverged: a score that counts is NaN or infinite.

    Example:
      >>> ranks = rank_scores(np.array([[2.0, 3.0, 2.0]]), np.ones((1, 2), bool))
      >>> print(ranks.above, ranks.tied, summarize(ranks, k=2)["hit_ratio@2"])
      [1] [1] 0.5
    """
    own, others = scores[:, :1], scores[:, 1:]
    finite = np.isfinite(own[:, 0]) & (np.isfinite(others) | ~mask).all(1)
    _check_finite(finite, np.arange(len(scores)))
    above = ((others > own) & mask).sum(1, dtype=np.int32)
    tied = ((others == own) & mask).sum(1, dtype=np.int32)
    return Ranks(above, tied, mask.sum(1, dtype=np.int32))


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
        m, n, tables = users.shape[0], devices.size(), _of("item", projected)
        num_rows = tables["item"].shape[0]
        each = min(-(-block // n), num_rows)
        width = n * each
        own = {**projected, **devices.read(tables, items)}
        rows = jnp.arange(m, dtype=jnp.int32)
        if n > 1:
            own |= devices.read(_of("user", projected), users)
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

    specs = (_specs(projected), SPLIT, SPLIT, SPLIT, SAME)
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
    _check_held_out(held_out, interactions, projected, num_items)
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
    _check_finite(finite, held_out.users)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    degrees = np.bincount(rows[trained[indices]], minlength=len(indptr) - 1)
    return Ranks(above, tied, (trained.sum() - degrees[held_out.users]).astype(np.int32))


def summarize(ranks: Ranks, *, k: int) -> dict[str, float]:
    """Means over users in float64 on the host, see ``metrics.summarize``."""
    return metrics.summarize(ranks.above, ranks.tied, ranks.candidates, k=k)


def chosen_by(row: dict[str, Any], k: int) -> float:
    """Returns what epochs, trials and runs are chosen by: NDCG@k on the warm validation items.

    Args:
      row: with ``valid_warm``: of metrics.jsonl, of a trial, or a result.
      k: the cut.
    """
    return row["valid_warm"][f"ndcg@{k}"]
