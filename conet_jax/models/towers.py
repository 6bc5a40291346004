"""The base network (Sec. 2.2): a tower on the merged embedding of a user and an item."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conet_jax import devices

GAUSSIAN_STD = 0.01  # Sec. 3.1: "Parameters are randomly initialized from Gaussian N(0, 0.01^2)"


def gaussian(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws from N(0, 0.01^2), the paper's initialiser (Sec. 3.1): float[shape]."""
    return GAUSSIAN_STD * jax.random.normal(key, shape)


def merge(users: jax.Array, items: jax.Array) -> jax.Array:
    """Returns x_ui = [P^T x_u, Q^T x_i], the merged embedding (Eq. 1): f32[..., 2 dim]."""
    return jnp.concatenate([users, items], axis=-1)


class Tower(nn.Module):
    """Hidden layers and output of one domain: x_ui -> z_ui -> logit (Eq. 1).

    Activations are row vectors, so a kernel is the transpose of the paper's W^l.

    Attributes:
      layers: widths, (64, 32, 16, 8) in the paper; the first is the merged embedding.
      initializer: "gaussian" (the paper: N(0, 0.01^2), biases too) or "he" (He et al. 2015:
        N(0, 2 / fan_in), output N(0, 1 / fan_in), biases zero).
      output_scale: factor on the output weights under "he".
      output_bias: start of the output's bias; None is as ``initializer`` says.
      dtype: "float32", or "bfloat16" for the hidden activations and their products.
    """

    layers: tuple[int, ...]
    initializer: str = "he"
    output_scale: float = 1.0
    output_bias: float | None = None
    dtype: str = "float32"

    def setup(self) -> None:
        """Makes W^l, b^l of every transition and the output h."""
        paper = self.initializer == "gaussian"
        normal = nn.initializers.normal(GAUSSIAN_STD)
        he = nn.initializers.variance_scaling
        bias = normal if paper else nn.initializers.zeros
        self.W = [
            nn.Dense(
                width,
                kernel_init=normal if paper else he(2.0, "fan_in", "normal"),
                bias_init=bias,
                **precision(self.dtype),
            )
            for width in self.layers[1:]
        ]
        if self.output_bias is not None:
            bias = nn.initializers.constant(self.output_bias)
        self.h = nn.Dense(
            1,
            kernel_init=normal if paper else he(self.output_scale**2, "fan_in", "normal"),
            bias_init=bias,
            param_dtype=float,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Eq. 1: f32[..., p] -> logits f32[...]."""
        return self.upper(x, 0)

    def upper(self, x: jax.Array, level: int) -> jax.Array:
        """Eq. 1 from layer ``level`` on."""
        if self.dtype != "float32":  # of an activation that was computed elsewhere, too
            x = x.astype(self.dtype)
        for W in self.W[level:]:
            x = nn.relu(W(x))
        return self.output(x)

    def output(self, z: jax.Array) -> jax.Array:
        """h^T z + bias (Sec. 2.2), before the sigmoid: f32[..., p] -> f32[...].

        In the parameters' precision, whatever that of z: logits of few bits would tie.
        """
        return self.h(z.astype(jnp.result_type(float)))[..., 0]


def precision(dtype: str) -> dict[str, Any]:
    """Returns ``dtype`` and ``param_dtype`` of a layer whose activations are in ``dtype``."""
    # None computes in the precision of parameters and activations, float64 in tests.
    return {"dtype": None if dtype == "float32" else dtype, "param_dtype": float}


def dropout(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes entries of x with probability ``rate`` (traced) and scales the rest up."""
    keep = devices.draw(lambda x: jax.random.bernoulli(key, 1.0 - rate, x.shape), x)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def project_tower(tower: Any, users: jax.Array, items: jax.Array) -> dict[str, Any]:
    """Sends both tables through the first layer, which is linear in [user, item], once.

    Args:
      tower: its parameters.
      users: f32[users, dim].
      items: f32[items, dim].

    Returns:
      ``user`` f32[users, r] and ``item`` f32[items, r], whose sum is the pre-activation of layer
      1; the ``tower``.
    """
    layer, dim = tower["W_0"], users.shape[1]
    by_user = users @ layer["kernel"][:dim]
    return {
        "user": by_user + jnp.broadcast_to(layer["bias"], by_user.shape),
        "item": items @ layer["kernel"][dim:],
        "tower": tower,
    }


def score_tower(
    module: Tower,
    projected: dict[str, Any],
    users: jax.Array,
    items: jax.Array,
    beside: jax.Array | float = 0.0,
) -> jax.Array:
    """Logits f32[n, c] of a tower for users int32[n] and items int32[n, c].

    ``beside`` f32[n, c, r] is added to the first pre-activation: what is no sum over the two.
    """
    x = nn.relu(projected["user"][users][:, None, :] + projected["item"][items] + beside)
    return module.apply({"params": projected["tower"]}, x, 1, method=Tower.upper)


def logit_spread(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Largest minus smallest of the logits f32[n] whose weight is not 0: 0 of a dead tower."""
    counted = weights > 0
    return jnp.max(logits, where=counted, initial=-jnp.inf) - jnp.min(
        logits, where=counted, initial=jnp.inf
    )
