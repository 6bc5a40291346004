"""The base network (Sec. 2.2): initialisers and the plain feedforward tower."""

from typing import Any

import jax
import jax.numpy as jnp

GAUSSIAN_STD = 0.01  # Sec. 3.1: "Parameters are randomly initialized from Gaussian N(0, 0.01^2)"


def gaussian(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws from N(0, 0.01^2), the paper's initialiser (Sec. 3.1).

    Args:
      key: PRNG key.
      shape: shape of the parameter.

    Returns:
      float[shape] in JAX's default float type.
    """
    return GAUSSIAN_STD * jax.random.normal(key, shape)


def init_tower(
    key: jax.Array,
    layers: tuple[int, ...],
    *,
    initializer: str,
    output_scale: float = 1.0,
    inner_weights: tuple[float, ...] = (),
    output_bias: float = 0.0,
) -> dict[str, Any]:
    """Initialises W^l, b^l of every transition and the output h of Sec. 2.2.

    Args:
      key: PRNG key.
      layers: widths, (64, 32, 16, 8) in the paper; the first is the merged embedding.
      initializer: "gaussian" (the paper: N(0, 0.01^2), biases too) or "he" (He et al. 2015:
        N(0, 2 / fan_in), output N(0, 1 / fan_in), biases zero).
      output_scale: factor on the output weights under "he".
      inner_weights: start of w in the second logit term w^T (p_u * q_i), a number for each
        embedding dimension's worth of factors; none is no such term.
      output_bias: start of the output's bias with an inner product, else as ``initializer`` says.

    Returns:
      {"layer_1": {"kernel": f32[in, out], "bias": f32[out]}, …, "output": {…}}; activations are
      row vectors, so a kernel is the transpose of the paper's W^l.
    """
    shapes = list(zip(layers[:-1], layers[1:], strict=True)) + [(layers[-1], 1)]
    names = [f"layer_{i + 1}" for i in range(len(shapes) - 1)] + ["output"]
    params = {}
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        if initializer == "gaussian":
            kernel, bias = gaussian(kernel_key, shape), gaussian(bias_key, shape[1:])
        else:
            std = (2.0 / shape[0]) ** 0.5 if name != "output" else output_scale / shape[0] ** 0.5
            kernel, bias = std * jax.random.normal(kernel_key, shape), jnp.zeros(shape[1:])
        params[name] = {"kernel": kernel, "bias": bias}
    if inner_weights:
        params["inner"] = jnp.repeat(jnp.array(inner_weights, float), layers[0] // 2)
        params["output"]["bias"] = jnp.full((1,), output_bias)
    return params


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns x W + b for x f32[..., in]: f32[..., out]."""
    y = x @ layer["kernel"]
    return y + jnp.broadcast_to(layer["bias"], y.shape)


def output_logits(tower: dict[str, Any], z: jax.Array) -> jax.Array:
    """Returns h^T z + bias (Sec. 2.2) before the sigmoid, for z f32[..., p]: f32[...]."""
    return affine(tower["output"], z)[..., 0]


def merge(users: jax.Array, items: jax.Array, dim: int) -> jax.Array:
    """Returns x_ui = [P^T x_u, Q^T x_i], the merged embedding (Eq. 1), of the first factors.

    Args:
      users: f32[..., factors].
      items: f32[..., factors].
      dim: factors that a tower sees; any others are for the inner product alone.

    Returns:
      f32[..., 2 dim].

    Example:
      >>> print(merge(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), 1))
      [1. 3.]
    """
    return jnp.concatenate([users[..., :dim], items[..., :dim]], axis=-1)


def dropout(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes entries of x with probability ``rate`` (traced) and scales the rest up."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def inner_logits(tower: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Second logit term w^T (p_u * q_i) of rows f32[..., factors], zeros without one: f32[...]."""
    if "inner" not in tower:
        return jnp.zeros(users.shape[:-1], users.dtype)
    return (users * items) @ tower["inner"]


def project_inner(tower: dict[str, Any], users: jax.Array, items: jax.Array) -> dict[str, Any]:
    """Tables for ``score_inner``; empty where the tower has no inner product."""
    if "inner" not in tower:
        return {}
    return {"user_inner": users * tower["inner"][None, :], "item_inner": items}


def score_inner(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Inner-product term f32[n, c] of users int32[n] for items int32[n, c]."""
    if "user_inner" not in projected:
        return jnp.zeros(items.shape)
    pairs = projected["user_inner"][users], projected["item_inner"][items]
    return jnp.einsum("nd,ncd->nc", *pairs)


def project_target(tower: dict[str, Any], users: jax.Array, items: jax.Array) -> dict[str, Any]:
    """Sends both tables of the target through its first layer, linear in [user, item], once.

    Args:
      tower: the target tower.
      users: f32[users, factors], of which the tower sees as many as its first layer is made for.
      items: f32[items, factors].

    Returns:
      ``user`` f32[users, r] and ``item`` f32[items, r], whose sum is the pre-activation of layer
      1; tables of the inner product; the ``tower``.
    """
    layer = tower["layer_1"]
    dim = layer["kernel"].shape[0] // 2
    by_user = users[:, :dim] @ layer["kernel"][:dim]
    return {
        "user": by_user + jnp.broadcast_to(layer["bias"], by_user.shape),
        "item": items[:, :dim] @ layer["kernel"][dim:],
        "tower": tower,
        **project_inner(tower, users, items),
    }


def score_target(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Logits f32[n, c] of the target tower for users int32[n] and items int32[n, c]."""
    tower = projected["tower"]
    x = jax.nn.relu(projected["user"][users][:, None, :] + projected["item"][items])
    for level in range(1, depth(tower)):
        x = jax.nn.relu(affine(tower[f"layer_{level + 1}"], x))
    return output_logits(tower, x) + score_inner(projected, users, items)


def logit_spread(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Largest minus smallest of the logits f32[n] whose weight is not 0: 0 of a dead tower."""
    counted = weights > 0
    return jnp.max(logits, where=counted, initial=-jnp.inf) - jnp.min(
        logits, where=counted, initial=jnp.inf
    )


def depth(tower: dict[str, Any]) -> int:
    """Number of hidden transitions of a tower."""
    return sum(name.startswith("layer_") for name in tower)
