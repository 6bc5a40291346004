"""Losses on logits: cross-entropy (CoNet, Eq. 5), joint loss (Eq. 7), lasso (Eq. 8), BPR.

Plain functions of arrays that can be lifted into any JAX project. The last axis holds the
examples, any axes before it are a batch of independent losses. Values are in nats. All of them
work under ``jit``, ``vmap`` and ``grad``, and their gradients are finite for every finite logit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

REDUCTIONS = ("sum", "mean", "none")


def _float(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _reduce(
    loss: Callable[[jax.Array], jax.Array],
    scores: jax.Array,
    weights: ArrayLike | None,
    reduction: str,
) -> jax.Array:
    """Applies ``loss`` to the scores, weighs it, and reduces it over the last axis."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if scores.ndim == 0:
        raise ValueError("the last axis holds the examples, but the scores are a scalar")
    if weights is None:
        losses = loss(scores)
        if reduction == "none":
            return losses
        total = jnp.asarray(scores.shape[-1], losses.dtype)
    else:
        weights = jnp.asarray(weights, dtype=scores.dtype)
        try:
            weights = jnp.broadcast_to(weights, scores.shape)
        except ValueError as error:
            raise ValueError(
                f"weights of shape {weights.shape} do not broadcast to {scores.shape}"
            ) from error
        # Masked scores are replaced before the loss, not only after it: 0 * inf is NaN, in the
        # loss as in its gradient.
        losses = weights * loss(jnp.where(weights == 0, 0, scores))
        if reduction == "none":
            return losses
        total = jnp.sum(weights, axis=-1)
    value = jnp.sum(losses, axis=-1)
    if reduction == "sum":
        return value
    return jnp.where(total == 0, 0, value / jnp.where(total == 0, 1, total))


def reduced(
    losses: ArrayLike, *, weights: ArrayLike | None = None, reduction: str = "sum"
) -> jax.Array:
    r"""Weighs losses of examples and reduces them over the last axis, as all losses here do.

    ``sum_i w_i l_i``, divided by ``sum_i w_i`` for the mean (0 if nothing counts).

    Args:
      losses: f32[..., n].
      weights: f32, broadcastable to [..., n]; 0 masks an example out, even where its loss is not
        finite. None is weight 1 for all.
      reduction: "sum", "mean" or "none".

    Returns:
      f32[...], or f32[..., n] if reduction is "none".

    Raises:
      ValueError: a scalar, weights that do not broadcast, or an unknown reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = jnp.array([1.0, 2.0, jnp.inf])
      >>> print(reduced(losses, weights=jnp.array([1.0, 1.0, 0.0]), reduction="mean"))
      1.5
    """
    return _reduce(lambda values: values, _float(losses), weights, reduction)


def binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    reduction: str = "sum",
) -> jax.Array:
    r"""Cross-entropy of binary labels, from logits (CoNet, Eq. 5).

    ``-sum_i w_i [y_i log(sigmoid(s_i)) + (1 - y_i) log(1 - sigmoid(s_i))]`` in nats: summed over
    the examples as in the paper, or averaged over their total weight. Computed as
    ``y softplus(-s) + (1 - y) softplus(s)``, which loses no digits of small losses and gradients.

    Args:
      logits: f32[..., n], scores before the sigmoid.
      labels: f32[..., n], 1 for an observed pair, 0 for a sampled negative; values between are
        soft labels. Integers and booleans are converted.
      weights: f32, broadcastable to [..., n]. An example of weight 0 is masked out, whatever its
        logit. None is weight 1 for all.
      reduction: "sum" over the last axis, "mean" (the sum divided by the total weight of the last
        axis; 0 if that is 0), or "none" (the weighted loss of each example).

    Returns:
      f32[...], or f32[..., n] if reduction is "none".

    Raises:
      ValueError: logits and labels differ in shape or are scalars, weights do not broadcast to
        them, or the reduction is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.array([0.0, 2.0, -1.0])
      >>> labels = jnp.array([1.0, 1.0, 0.0])
      >>> print(round(float(binary_cross_entropy(logits, labels)), 4))
      1.1333
      >>> grads = jax.grad(binary_cross_entropy)(logits, labels)  # sigmoid(logits) - labels
      >>> print([round(g, 4) for g in grads.tolist()])
      [-0.5, -0.1192, 0.2689]
    """
    logits = _float(logits)
    labels = jnp.asarray(labels, dtype=logits.dtype)
    if logits.shape != labels.shape:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} differ in shape")

    def loss(scores: jax.Array) -> jax.Array:
        return labels * jax.nn.softplus(-scores) + (1 - labels) * jax.nn.softplus(scores)

    return _reduce(loss, logits, weights, reduction)


def joint_loss(
    target_logits: ArrayLike,
    target_labels: ArrayLike,
    source_logits: ArrayLike,
    source_labels: ArrayLike,
    *,
    target_weight: ArrayLike,
    target_weights: ArrayLike | None = None,
    source_weights: ArrayLike | None = None,
    reduction: str = "sum",
) -> jax.Array:
    r"""Weighted sum of the two domains' cross-entropies (CoNet, Eq. 7).

    ``alpha CE_target + (1 - alpha) CE_source``, each term Eq. 5 in nats: summed over its examples
    as in the paper, or averaged. The two domains may have different numbers of examples.

    Args:
      target_logits: f32[..., n_target], scores before the sigmoid.
      target_labels: f32[..., n_target], 1 for an observed pair, 0 for a sampled negative.
      source_logits: f32[..., n_source].
      source_labels: f32[..., n_source].
      target_weight: f32[] or f32[...], alpha in [0, 1]; it may be traced. With 1 there is no
        transfer.
      target_weights: f32, broadcastable to [..., n_target], weights of the target's examples.
      source_weights: f32, broadcastable to [..., n_source].
      reduction: "sum" or "mean", for each domain apart.

    Returns:
      f32[...].

    Raises:
      ValueError: logits and labels of a domain differ in shape, weights do not broadcast to them,
        or the reduction is neither "sum" nor "mean".

    Example:
      >>> import jax.numpy as jnp
      >>> loss = joint_loss(
      ...     jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.zeros(3), jnp.array([1.0, 0.0, 0.0]),
      ...     target_weight=0.8, reduction="mean")
      >>> print(round(float(loss), 4))  # ln 2
      0.6931
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    target = binary_cross_entropy(
        target_logits, target_labels, weights=target_weights, reduction=reduction
    )
    source = binary_cross_entropy(
        source_logits, source_labels, weights=source_weights, reduction=reduction
    )
    return target_weight * target + (1 - target_weight) * source


def l1_penalty(matrices: Any, *, weight: ArrayLike = 1.0) -> jax.Array:
    r"""Lasso penalty on the cross connections (CoNet, Eq. 8).

    ``lambda sum_l sum_ij |h^l_ij|``, a sum over all entries of all arrays. Its gradient is
    ``lambda sign(h)``, 0 at 0: a weight that is zero is not pushed off it. (JAX differentiates
    ``abs`` at 0 to 1.)

    Args:
      matrices: pytree of f32 arrays of any shapes, the H^l; may be empty.
      weight: f32[], lambda; it may be traced.

    Returns:
      f32[].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> h = [jnp.array([[1.0, -2.0]]), jnp.array([0.0])]
      >>> print(round(float(l1_penalty(h, weight=0.1)), 4))
      0.3
      >>> print([g.tolist() for g in jax.grad(l1_penalty)(h)])
      [[[1.0, -1.0]], [0.0]]
    """
    # x sign(x) with the sign held constant is |x| with the derivative sign(x).
    leaves = [_float(leaf) for leaf in jax.tree.leaves(matrices)]
    norms = [jnp.sum(leaf * jax.lax.stop_gradient(jnp.sign(leaf))) for leaf in leaves]
    return weight * sum(norms, start=jnp.zeros(()))


def bpr_loss(
    positive_logits: ArrayLike,
    negative_logits: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    reduction: str = "sum",
) -> jax.Array:
    r"""Bayesian personalised ranking: a positive should score above its negative.

    ``-sum_i w_i log(sigmoid(s_i^+ - s_i^-))`` in nats (Rendle et al., UAI 2009, BPR-Opt without
    its regulariser), summed or averaged over pairs.

    Args:
      positive_logits: f32[..., n], score of the observed item of each pair.
      negative_logits: f32[..., n], score of the sampled item of each pair.
      weights: f32, broadcastable to [..., n]; 0 masks a pair out. None is weight 1 for all.
      reduction: "sum", "mean" or "none", as in `binary_cross_entropy`.

    Returns:
      f32[...], or f32[..., n] if reduction is "none".

    Raises:
      ValueError: the two differ in shape or are scalars, weights do not broadcast to them, or the
        reduction is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = bpr_loss(jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0]), reduction="none")
      >>> print([round(value, 4) for value in loss.tolist()])
      [0.3133, 0.6931]
    """
    positive_logits, negative_logits = _float(positive_logits), _float(negative_logits)
    if positive_logits.shape != negative_logits.shape:
        raise ValueError(
            f"positive_logits {positive_logits.shape} and negative_logits "
            f"{negative_logits.shape} differ in shape"
        )
    margins = positive_logits - negative_logits
    return _reduce(lambda margin: jax.nn.softplus(-margin), margins, weights, reduction)
