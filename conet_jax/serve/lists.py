"""The k best items of each user: the pure, compiled core of ``recommend``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from conet_jax.models.base import Model
from conet_jax.train.full_ranking import Best, keep_best, nothing_yet

PAIRS_AT_ONCE = 1 << 12  # whose activations are alive at once; they stay in cache


@partial(jax.jit, static_argnames=("model", "k"))
def top_k(
    projected: Any,
    users: jax.Array,
    items: jax.Array,
    left_out: jax.Array,
    sums: jax.Array | None = None,
    *,
    model: Model,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best of the items for each user, block by block: activations are those of a block.

    Args:
      projected: from ``Model.project``.
      users: int32[m].
      items: int32[n], distinct, 0 < n; or int32[m, n], others for each user.
      left_out: bool[m, n], the items that a user must not get.
      sums: f32[m, n], what each score has beside the model's; None is nothing.
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
    items = jnp.atleast_2d(items.astype(jnp.int32))
    sums = jnp.zeros((1, n)) if sums is None else sums
    items, sums = (jnp.pad(x, ((0, 0), (0, padding))) for x in (items, sums))
    left_out = jnp.pad(left_out, ((0, 0), (0, padding)), constant_values=True)

    def body(best: Best, first: jax.Array) -> tuple[Best, None]:
        given = (items, sums, left_out)
        of_block = (jax.lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in given)
        listed, beside, out = (jnp.broadcast_to(x, (m, block)) for x in of_block)
        found = model.scores(projected, users, listed) + beside
        return keep_best(best, found, ~out, listed), None

    firsts = block * jnp.arange((n + padding) // block, dtype=jnp.int32)
    best, _ = jax.lax.scan(body, nothing_yet(m, k), firsts)
    return best.items, best.scores, best.finite
