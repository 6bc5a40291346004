"""The k best items of each user: the pure, compiled core of ``recommend``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from conet_jax.models.base import Model

PAIRS_AT_ONCE = 1 << 13  # whose activations are alive at once; they stay in cache


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
      >>> from conet_jax.models import popularity
      >>> counter = popularity.build(popularity.Options())
      >>> seen = jnp.array([[False, True, False, False]])
      >>> items, scores, _ = top_k(
      ...     counts, jnp.zeros(1, int), jnp.arange(4), seen, model=counter, k=2
      ... )
      >>> print(items, scores)
      [[3 2]] [[9. 5.]]
    """
    m, n = left_out.shape
    block = min(n, max(1, PAIRS_AT_ONCE // m))
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
