"""Conjugate gradients (Hestenes and Stiefel 1952), for many systems of equations at once."""

from typing import Any

import jax
import jax.numpy as jnp

_TOLERANCE = 84  # residual at the end, in roundings of the right-hand side: 1e-5 in f32


def conjugate_gradients(normal: Any, right: jax.Array, x: jax.Array, steps: int) -> jax.Array:
    """Solves ``normal(x) = right`` for every row at once, in so many steps or to ``_TOLERANCE``.

    Args:
      normal: f32[n, dim] -> f32[n, dim], a positive definite matrix times each row.
      right: f32[n, dim].
      x: f32[n, dim], where to begin.
      steps: at most.

    Returns:
      f32[n, dim].

    Example:
      >>> x = conjugate_gradients(lambda p: 2 * p, jnp.array([[4.0, 6.0]]), jnp.zeros((1, 2)), 9)
      >>> print(x)
      [[2. 3.]]
    """

    def square(v: jax.Array) -> jax.Array:
        return jnp.sum(v * v, axis=1, keepdims=True)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    enough = (_TOLERANCE * jnp.finfo(right.dtype).eps) ** 2 * square(right)

    def left(state: tuple[Any, ...]) -> jax.Array:
        return (state[0] < steps) & jnp.any(state[4] > enough)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        done, x, residual, p, squared = state
        product = normal(p)
        length = ratio(squared, jnp.sum(p * product, axis=1, keepdims=True))
        x, residual = x + length * p, residual - length * product
        now = square(residual)
        return done + 1, x, residual, residual + ratio(now, squared) * p, now

    residual = right - normal(x)
    return jax.lax.while_loop(left, step, (0, x, residual, residual, square(residual)))[1]
