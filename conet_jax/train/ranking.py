"""The ranker: one held-out item among its candidates, for all users in one program.

Scores are logits: a float32 sigmoid makes all above 17 equal. A rank under ties is the pair
(above, tied), the numbers of candidates scored strictly higher and equal; ``metrics`` takes the
expectation under a random order of the tied.

On several devices (``devices``) each ranks its part of the users, and fetches the rows that these
and their candidates need from the devices that hold them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices, metrics
from conet_jax.data.types import HeldOut, check_indices, users_and_pairs, warm
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


@partial(jax.jit, static_argnames=("scores", "chunk", "mesh"))
def _rank_all(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    masks: jax.Array,
    *,
    scores: Callable[..., jax.Array],
    chunk: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def rank(args: tuple[jax.Array, jax.Array, jax.Array], *, projected: Any) -> Any:
        users, items, masks = args
        if devices.size() > 1:
            projected = _fetch(projected, users, items)
            users = jnp.arange(users.size, dtype=jnp.int32)
            items = jnp.arange(items.size, dtype=jnp.int32).reshape(items.shape)
        scored = scores(projected, users, items)
        # Of many scores, all under one mask; of one, under many.
        one_mask = scored.ndim > items.ndim
        counted = jax.vmap(jax.vmap(count_above, in_axes=(0, None) if one_mask else (None, 0)))
        return counted(scored, masks[:, 0] if one_mask else masks)

    def rank_part(projected: Any, *arguments: jax.Array) -> Any:
        split = tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in arguments)
        ranked = jax.lax.map(partial(rank, projected=projected), split)
        return devices.all_gather(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), ranked))

    specs = (specs_of(projected), SPLIT, SPLIT, SPLIT)
    return devices.mapped(rank_part, mesh, specs, SAME)(projected, users, items, masks)


def tables_of(kind: str, projected: dict[str, Any]) -> dict[str, Any]:
    """The projected tables with a row for each "user" or "item"."""
    return {name: table for name, table in projected.items() if name.startswith(kind)}


def specs_of(projected: dict[str, Any]) -> dict[str, Any]:
    """What ``devices.mapped`` must know of each projected table."""
    split = {**tables_of("user", projected), **tables_of("item", projected)}
    return {name: SPLIT if name in split else SAME for name in projected}


def _fetch(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> dict[str, Any]:
    """The projected tables with the rows of these users and items alone, in their order."""
    return {
        **projected,
        **devices.read(tables_of("user", projected), users.reshape(-1)),
        **devices.read(tables_of("item", projected), items.reshape(-1)),
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
    return devices.mapped(model.project, mesh, (PARAMS, specs), specs_of(projected))(
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
    check_held_out(held_out, interactions, projected, own)
    return rank_projected(model, projected, held_out)


class Ranked(NamedTuple):
    """Ranks of the held-out items of ``users`` int32[n], a user for each."""

    users: np.ndarray
    ranks: Ranks

    def summarize(self, *, k: int | Sequence[int]) -> dict[str, float]:
        """Means over the items, see ``metrics.summarize``, and how many users they are of."""
        return summarize(self.ranks, k=k) | users_and_pairs(self.users)


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
    check_held_out(held_out, interactions, projected, len(trained))
    kept, mask = warm(held_out, trained)
    everything, warm_ranks = _ranked(model.scores, projected, held_out, [held_out.mask, mask])
    return (
        Ranked(held_out.users, everything),
        Ranked(held_out.users[kept], Ranks(*(x[kept] for x in warm_ranks))),
    )


def check_held_out(
    held_out: HeldOut,
    interactions: dict[str, Interactions] | None,
    projected: dict[str, Any],
    num_items: int | None = None,
) -> None:
    """Raises ``InputError`` where a user or item is out of range."""
    num_users = min(map(len, tables_of("user", projected).values()), default=2**31)
    num_items = len(projected["item"]) if num_items is None else num_items
    if interactions and "target" in interactions:  # tables on several devices are padded
        num_users = interactions["target"].num_users
    check_indices("user", held_out.users, num_users)
    check_indices("held-out item", held_out.items, num_items)
    check_indices("candidate", held_out.candidates, num_items)


def rank_projected(model: Model, projected: Any, held_out: HeldOut) -> Ranks:
    """``rank_held_out`` from tables that went through ``project``; indices are not checked."""
    return _ranked(model.scores, projected, held_out, [held_out.mask])[0]


def rank_many(scores: Callable[..., jax.Array], projected: Any, held_out: HeldOut) -> list[Ranks]:
    """Ranks by several scores at once.

    Args:
      scores: as ``Model.scores``, but f32[n, s, c]; the same function has the same program.
      projected: what it reads, by the names that ``Model.project`` has.
      held_out: n users, their items and candidates; indices are not checked.

    Returns:
      The ranks under each of the s scores.

    Raises:
      Diverged: a score is NaN or infinite.
    """
    return _ranked(scores, projected, held_out, [held_out.mask])


def _ranked(
    scores: Callable[..., jax.Array], projected: Any, held_out: HeldOut, masks: list[np.ndarray]
) -> list[Ranks]:
    """Ranks under each mask bool[n, c] of the candidates, or under one by each of the scores."""
    mesh = devices.mesh_of(projected)
    arguments, chunk = _ranker_arguments(held_out, masks, mesh)
    above, tied, finite = _rank_all(projected, *arguments, scores=scores, chunk=chunk, mesh=mesh)
    count = len(held_out.users)
    check_finite(np.asarray(finite)[:count].all(axis=1), held_out.users)
    above, tied = np.asarray(above)[:count], np.asarray(tied)[:count]
    counted = [mask.sum(1, dtype=np.int32) for mask in masks]
    counted = counted * (above.shape[1] // len(masks))  # one mask is that of each of the scores
    return [Ranks(above[:, at], tied[:, at], candidates) for at, candidates in enumerate(counted)]


def ranker_memory(model: Model, projected: Any, held_out: HeldOut) -> int:
    """Returns the bytes of temporaries of the ranker compiled for these users."""
    mesh = devices.mesh_of(projected)
    arguments, chunk = _ranker_arguments(held_out, [held_out.mask], mesh)
    given = {"scores": model.scores, "chunk": chunk, "mesh": mesh}
    lowered = _rank_all.lower(projected, *arguments, **given)
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


def check_finite(finite: np.ndarray, users: np.ndarray) -> None:
    """Raises ``Diverged`` unless the scores of all users are finite."""
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
    check_finite(finite, np.arange(len(scores)))
    above = ((others > own) & mask).sum(1, dtype=np.int32)
    tied = ((others == own) & mask).sum(1, dtype=np.int32)
    return Ranks(above, tied, mask.sum(1, dtype=np.int32))


def summarize(ranks: Ranks, *, k: int | Sequence[int]) -> dict[str, float]:
    """Means over users in float64 on the host, see ``metrics.summarize``."""
    return metrics.summarize(ranks.above, ranks.tied, ranks.candidates, k=k)


def chosen_by(row: dict[str, Any], k: int) -> float:
    """Returns what epochs, trials and runs are chosen by: NDCG@k on the warm validation items.

    Args:
      row: with ``valid_warm``: of metrics.jsonl, of a trial, or a result.
      k: the cut.
    """
    return row["valid_warm"][f"ndcg@{k}"]
