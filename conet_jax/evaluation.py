"""The ranker: one held-out item among its candidates, for all users in one program.

Scores are logits: a float32 sigmoid makes all above 17 equal. A rank under ties is the pair
(above, tied), the numbers of candidates scored strictly higher and equal; ``metrics`` takes the
expectation under a random order of the tied.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import metrics
from conet_jax.data.dataset import HeldOut
from conet_jax.errors import InputError
from conet_jax.models.base import Model, Params
from conet_jax.sampling import Interactions

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


@partial(jax.jit, static_argnames=("model", "chunk"))
def _rank_all(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    mask: jax.Array,
    *,
    model: Model,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def rank(args: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        users, items, mask = args
        return jax.vmap(count_above)(model.scores(projected, users, items), mask)

    split = [x.reshape(-1, chunk, *x.shape[1:]) for x in (users, items, mask)]
    return jax.tree.map(lambda x: x.reshape(-1), jax.lax.map(rank, tuple(split)))


project = jax.jit(
    lambda params, interactions, *, model: model.project(params, interactions),
    static_argnames="model",
)


def rank_held_out(
    model: Model, params: Params, interactions: dict[str, Interactions], held_out: HeldOut
) -> Ranks:
    """Ranks every held-out item among its candidates.

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for profiles.
      held_out: n users, their items and candidates.

    Returns:
      ``Ranks``.

    Raises:
      InputError: a score is NaN or infinite.
    """
    return rank_projected(model, project(params, interactions, model=model), held_out)


def rank_projected(model: Model, projected: Any, held_out: HeldOut) -> Ranks:
    """``rank_held_out`` from tables that went through ``project`` before."""
    arguments, chunk = _ranker_arguments(held_out)
    above, tied, finite = _rank_all(projected, *arguments, model=model, chunk=chunk)
    count = len(held_out.users)
    _check_finite(np.asarray(finite)[:count], held_out.users)
    return Ranks(
        np.asarray(above)[:count], np.asarray(tied)[:count], held_out.mask.sum(1, dtype=np.int32)
    )


def ranker_memory(model: Model, projected: Any, held_out: HeldOut) -> int:
    """Returns the bytes of temporaries of the ranker compiled for these users."""
    arguments, chunk = _ranker_arguments(held_out)
    lowered = _rank_all.lower(projected, *arguments, model=model, chunk=chunk)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def _ranker_arguments(held_out: HeldOut) -> tuple[tuple[np.ndarray, ...], int]:
    """Users, listed items and mask padded to whole chunks, and a chunk's users."""
    listed = np.concatenate([held_out.items[:, None], held_out.candidates], axis=1)
    chunk = max(1, min(len(listed), _SCORES_A_CHUNK // listed.shape[1]))
    padding = -len(listed) % chunk

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))

    return tuple(pad(x) for x in (held_out.users, listed, held_out.mask)), chunk


def _check_finite(finite: np.ndarray, users: np.ndarray) -> None:
    if not finite.all():
        user = int(users[int(np.argmin(finite))])
        raise InputError(
            f"{int((~finite).sum())} of {len(finite)} users have a NaN or infinite score (first: "
            f"user row {user}): the run has diverged; lower config.learning_rate or set "
            "config.clip_norm"
        )


def rank_scores(scores: np.ndarray, mask: np.ndarray) -> Ranks:
    """Ranks from scores made elsewhere (an oracle, popularity, another library).

    Args:
      scores: float[n, 1 + c], the held-out item's first.
      mask: bool[n, c].

    Returns:
      ``Ranks``, computed in the scores' own precision.

    Raises:
      InputError: a score that counts is NaN or infinite.

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


@partial(jax.jit, static_argnames=("model", "block"))
def _rank_full(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    touched: jax.Array,
    num_items: jax.Array,
    *,
    model: Model,
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ranks ``items`` [m] of ``users`` [m] against all but ``touched`` [m, t], block by block."""
    m = users.shape[0]
    rows = jnp.arange(m, dtype=jnp.int32)[:, None]

    def body(carry: Any, first: jax.Array) -> tuple[Any, None]:
        ids = first + jnp.arange(block, dtype=jnp.int32)
        inside = jnp.where((touched >= first) & (touched < first + block), touched - first, block)
        mask = jnp.broadcast_to(ids < num_items, (m, block))
        mask = mask.at[jnp.broadcast_to(rows, inside.shape), inside].set(False, mode="drop")
        listed = jnp.broadcast_to(jnp.minimum(ids, num_items - 1)[None, :], (m, block))
        # The held-out item is scored beside each block, by the same program: equal is equal.
        scores = model.scores(projected, users, jnp.concatenate([items[:, None], listed], axis=1))
        above, tied, finite = jax.vmap(count_above)(scores, mask)
        return (carry[0] + above, carry[1] + tied, carry[2] & finite), None

    start = (jnp.zeros(m, jnp.int32), jnp.zeros(m, jnp.int32), jnp.ones(m, bool))
    blocks = -(-projected["item"].shape[0] // block)
    result, _ = jax.lax.scan(body, start, block * jnp.arange(blocks, dtype=jnp.int32))
    return result


def rank_full(
    model: Model,
    params: Params,
    interactions: dict[str, Interactions],
    held_out: HeldOut,
    touched: tuple[np.ndarray, np.ndarray],
    *,
    users_at_once: int = 64,
    block: int = 512,
) -> Ranks:
    """Ranks every held-out item against all items that its user has not touched in any split.

    Args:
      model: the model.
      params: settled parameters.
      interactions: training interactions by domain, for profiles.
      held_out: n users and their items; its candidates are not read.
      touched: (indptr int[users + 1], items int[nnz]), target items of each user in all splits.
      users_at_once: users a chunk.
      block: items a block; no more than users_at_once x block scores exist at once.

    Returns:
      ``Ranks``.

    Raises:
      InputError: a score is NaN or infinite.
    """
    projected = project(params, interactions, model=model)
    num_items = projected["item"].shape[0]
    indptr, indices = touched
    width = int(np.diff(indptr)[held_out.users].max(initial=1))
    width = 1 << (width - 1).bit_length()
    parts = []
    for first in range(0, len(held_out.users), users_at_once):
        users = held_out.users[first : first + users_at_once]
        items = held_out.items[first : first + users_at_once]
        rows = np.full((users_at_once, width), num_items + block, np.int32)
        for row, user in enumerate(users):
            own = indices[indptr[user] : indptr[user + 1]]
            rows[row, : len(own)] = own
        padding = (0, users_at_once - len(users))
        ranked = _rank_full(
            projected,
            np.pad(users, padding),
            np.pad(items, padding),
            rows,
            np.int32(num_items),
            model=model,
            block=block,
        )
        parts.append([np.asarray(x)[: len(users)] for x in ranked])
    above, tied, finite = (np.concatenate(column) for column in zip(*parts, strict=True))
    _check_finite(finite, held_out.users)
    degrees = np.diff(indptr)[held_out.users].astype(np.int32)
    return Ranks(above, tied, num_items - degrees)


def summarize(ranks: Ranks, *, k: int) -> dict[str, float]:
    """Means over users in float64 on the host, see ``metrics.summarize``."""
    return metrics.summarize(ranks.above, ranks.tied, ranks.candidates, k=k)
