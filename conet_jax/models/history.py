"""A user's history in a domain as one vector: the mean of the embeddings of its items."""

import jax
import jax.numpy as jnp

from conet_jax import devices

_BLOCK = 1 << 14


def mean_of_all(items: jax.Array, users: jax.Array, table: jax.Array, num_users: int) -> jax.Array:
    """Mean embedding of each user's items, zero for a user without any.

    Args:
      items: int32[nnz], items of the interactions.
      users: int32[nnz], their users, sorted; on several devices a device's own, as it counts them.
      table: f32[num_items, dim].
      num_users: rows of the result.

    Returns:
      f32[num_users, dim].

    Example:
      >>> table = jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> print(mean_of_all(jnp.array([0, 1]), jnp.array([0, 0]), table, 2))
      [[2. 1.]
       [0. 0.]]
    """
    # In blocks, so that no array has a row an interaction.
    padding = -items.shape[0] % _BLOCK
    blocks = [
        jnp.pad(x, (0, padding), constant_values=fill).reshape(-1, _BLOCK)
        for x, fill in ((items, 0), (users, num_users))
    ]

    def add(sums: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        items, users = block
        rows = devices.read(table, items)
        return sums.at[users].add(rows, mode="drop", indices_are_sorted=True), None

    sums, _ = jax.lax.scan(add, jnp.zeros((num_users, table.shape[1]), table.dtype), tuple(blocks))
    return sums / jnp.maximum(sizes(users, num_users), 1.0)[:, None]


def sizes(users: jax.Array, num_users: int) -> jax.Array:
    """Interactions of each user, f32[num_users], from their sorted ``users`` int32[nnz]."""
    ones = jnp.ones(users.shape)
    return jax.ops.segment_sum(ones, users, num_users, indices_are_sorted=True)
