"""What models of factors share: a score is a user's vector times an item's, plus an item's bias.

An item table may hold its bias as the last column, so that a row is one read and one write.
"""

from typing import Any

import jax
import jax.numpy as jnp

from conet_jax.models.towers import gaussian


def init(key: jax.Array, rows: int, dim: int, *, bias: bool = False) -> jax.Array:
    """Draws a table f32[rows, dim] from N(0, 0.01^2), with a last column of zeros for a bias."""
    table = gaussian(key, (rows, dim))
    return jnp.pad(table, ((0, 0), (0, 1))) if bias else table


def split_bias(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (vectors f32[..., dim], biases f32[...]) of rows f32[..., dim + 1]."""
    return table[..., :-1], table[..., -1]


def dot(users: jax.Array, items: jax.Array) -> jax.Array:
    """Returns p_u^T q_i + b_i for users f32[..., dim] and items f32[..., dim + 1]: f32[...].

    Example:
      >>> print(dot(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0, 0.5])))
      11.5
    """
    vectors, biases = split_bias(items)
    return jnp.sum(users * vectors, axis=-1) + biases


def squared_norm(rows: jax.Array) -> jax.Array:
    """Returns the squared Euclidean norm of each row, f32[..., dim] -> f32[...]."""
    return jnp.sum(jnp.square(rows), axis=-1)


def project(users: jax.Array, items: jax.Array) -> dict[str, jax.Array]:
    """Tables for ``scores``: users f32[users, dim], items f32[items, dim + 1], bias last."""
    vectors, biases = split_bias(items)
    return {"user": users, "item": vectors, "item_bias": biases}


def scores(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Scores f32[n, c] of users int32[n] for items int32[n, c]."""
    pairs = projected["user"][users], projected["item"][items]
    return jnp.einsum("nd,ncd->nc", *pairs) + projected["item_bias"][items]


def linear(projected: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Returns f32[users, dim + 1] and f32[items, dim + 1], whose product is ``scores``."""
    users, items = projected["user"], projected["item"]
    one = jnp.ones((len(users), 1), users.dtype)
    biases = projected["item_bias"][:, None]
    return jnp.concatenate([users, one], 1), jnp.concatenate([items, biases], 1)
