"""The base network (Sec. 2.2): initialisers and the plain feedforward tower."""

from typing import Any

import jax
import jax.numpy as jnp

from conet_jax import devices

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
    features: int = 0,
    inner_weight: float | None = None,
    output_bias: float = 0.0,
) -> dict[str, Any]:
    """Initialises W^l, b^l of every transition and the output h of Sec. 2.2.

    Args:
      key: PRNG key.
      layers: widths, (64, 32, 16, 8) in the paper; the first is the merged embedding.
      initializer: "gaussian" (the paper: N(0, 0.01^2), biases too) or "he" (He et al. 2015:
        N(0, 2 / fan_in), output N(0, 1 / fan_in), biases zero).
      output_scale: factor on the output weights under "he".
      features: inputs beside the merged embedding (see ``out_of_fold.features``).
      inner_weight: start of every entry of w in the second logit term w^T (p_u * q_i); None is no
        such term.
      output_bias: start of the output's bias with an inner product, else as ``initializer`` says.

    Returns:
      {"layer_1": {"kernel": f32[in, out], "bias": f32[out]}, …, "output": {…}}; activations are
      row vectors, so a kernel is the transpose of the paper's W^l.
    """
    widths = (layers[0] + features, *layers[1:])
    shapes = [*zip(widths[:-1], widths[1:], strict=True), (widths[-1], 1)]
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
    if inner_weight is not None:
        params["inner"] = jnp.full((layers[0] // 2,), inner_weight, float)
        params["output"]["bias"] = jnp.full((1,), output_bias, float)
    return params


def activations(x: jax.Array, dtype: str) -> jax.Array:
    """Returns x in the precision of a tower, "bfloat16", or as it is: "float32"."""
    return x if dtype == "float32" else x.astype(dtype)


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns x W + b for x float[..., in], in the precision of x: float[..., out]."""
    y = x @ layer["kernel"].astype(x.dtype)
    return y + jnp.broadcast_to(layer["bias"].astype(x.dtype), y.shape)


def output_logits(tower: dict[str, Any], z: jax.Array) -> jax.Array:
    """Returns h^T z + bias (Sec. 2.2) before the sigmoid, for z float[..., p]: f32[...].

    In the precision of h, whatever that of z: logits of few bits would tie.
    """
    return affine(tower["output"], z.astype(tower["output"]["kernel"].dtype))[..., 0]


def merge(users: jax.Array, items: jax.Array) -> jax.Array:
    """Returns x_ui = [P^T x_u, Q^T x_i], the merged embedding (Eq. 1): f32[..., 2 dim]."""
    return jnp.concatenate([users, items], axis=-1)


def dropout(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes entries of x with probability ``rate`` (traced) and scales the rest up."""
    keep = devices.draw(lambda x: jax.random.bernoulli(key, 1.0 - rate, x.shape), x)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def inner_logits(tower: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Second logit term w^T (p_u * q_i) of rows f32[..., dim], zeros without one: f32[...]."""
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
      users: f32[users, dim].
      items: f32[items, dim].

    Returns:
      ``user`` f32[users, r] and ``item`` f32[items, r], whose sum is the pre-activation of layer
      1; tables of the inner product; the ``tower``.
    """
    layer = tower["layer_1"]
    dim = layer["kernel"].shape[0] // 2
    by_user = users @ layer["kernel"][:dim]
    return {
        "user": by_user + jnp.broadcast_to(layer["bias"], by_user.shape),
        "item": items @ layer["kernel"][dim:],
        "tower": tower,
        **project_inner(tower, users, items),
    }


def score_target(
    projected: dict[str, Any],
    users: jax.Array,
    items: jax.Array,
    dtype: str = "float32",
    beside: jax.Array | float = 0.0,
) -> jax.Array:
    """Logits f32[n, c] of the target tower for users int32[n] and items int32[n, c].

    ``beside`` f32[n, c, r] is added to the first pre-activation: what is no sum over the two.
    """
    tower = projected["tower"]
    x = jax.nn.relu(projected["user"][users][:, None, :] + projected["item"][items] + beside)
    x = activations(x, dtype)
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
