r"""Adam with an L1 penalty, as optax transformations (for CoNet's lasso, Eq. 8).

Two ways to train under ``weight * sum |p|``: `add_l1` adds its subgradient to the gradient, which
is what the paper does and which leaves no exact zero; `proximal_l1` takes the proximal step in
Adam's own metric, which does. `l1_adam` composes either with Adam and with the clipping of CoNet's
published code. Learning rate and weights may be traced scalars: build the transformation inside
the step that is jitted or vmapped; the structure of its state does not depend on their values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

METHODS = ("subgradient", "proximal", "group")

Mask = Any | Callable[[optax.Params], Any] | None


def add_l1(weight: ArrayLike, mask: Mask = None) -> optax.GradientTransformation:
    r"""Adds the subgradient of an L1 penalty to the gradients (CoNet, Eq. 8).

    ``g <- g + weight * sign(p)``, with ``sign(0) = 0``.

    Args:
      weight: f32[], lambda; it may be traced.
      mask: pytree of bools with the structure of the parameters or a prefix of it, or a function
        from parameters to one: the penalised leaves. None is all of them.

    Returns:
      A transformation that needs the parameters in ``update``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"h": jnp.array([2.0, -3.0, 0.0]), "w": jnp.array([2.0])}
      >>> optimizer = add_l1(0.5, mask={"h": True, "w": False})
      >>> zeros = optax.tree.zeros_like(params)
      >>> updates, _ = optimizer.update(zeros, optimizer.init(params), params)
      >>> print(updates["h"], updates["w"])
      [ 0.5 -0.5  0. ] [0.]
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("add_l1 needs the parameters: update(updates, state, params)")
        updates = jax.tree.map(
            lambda g, p: (g + weight * jnp.sign(p)).astype(jnp.result_type(g)), updates, params
        )
        return updates, state

    transformation = optax.GradientTransformation(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)


def _adam_state(state: optax.OptState) -> optax.ScaleByAdamState:
    """The state of the one Adam somewhere inside an optimiser's state."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise ValueError(f"proximal_l1 wraps an optimiser with one Adam, found {len(found)}")
    return found[0]


def _shrink_rows(rows: jax.Array, scale: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Returns argmin_x sum_j scale_j (x_j - rows_j)^2 / 2 + threshold |x|_2 for each row."""
    scaled = scale * rows
    norm = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    alive = norm > threshold
    # The norm r of the solution has |scaled / (scale r + threshold)| = 1; Newton's method on the
    # inverse of that norm, which is concave in r, comes from the left, in one step if all scales
    # are equal, to 1e-11 if they span six decades.
    radius = (norm - threshold) / scale.max(axis=-1, keepdims=True)
    radius = jnp.where(alive, radius, 1.0)
    for _ in range(6):
        both = scale * radius + threshold
        square = jnp.square(scaled / both)
        h = square.sum(axis=-1, keepdims=True)
        h = jnp.where(alive, h, 1.0)
        slope = (square * scale / both).sum(axis=-1, keepdims=True)
        radius = radius + (h**1.5 - h) / jnp.where(alive, slope, 1.0)
    return jnp.where(alive, rows * (scale * radius / (scale * radius + threshold)), 0)


def proximal_l1(
    inner: optax.GradientTransformation,
    weight: ArrayLike,
    learning_rate: ArrayLike | optax.Schedule,
    *,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mask: Mask = None,
    groups: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Follows an Adam step by the proximal step of an L1 penalty, in Adam's own metric.

    With p' the parameters after the step of ``inner`` and ``v_hat`` its bias-corrected second
    moment, ``p <- sign(p') max(|p'| - threshold, 0)`` with
    ``threshold = learning_rate * weight / (sqrt(v_hat) + eps)``. Adam moves along the gradient by
    ``learning_rate / (sqrt(v_hat) + eps)``, so this is the penalty's step at the same length, and
    the fixed points are those of the lasso. A plain ``learning_rate * weight`` is not that.
    Parameters become exactly 0.

    With ``groups`` the penalty is the group lasso, ``weight * sum_g sqrt(n) |p_g|_2`` over the rows
    g of each array (its last axis, n entries), which vanish whole: with
    ``s = sqrt(v_hat) + eps`` and ``t = learning_rate * weight * sqrt(n)``,
    ``p_g <- argmin_x sum_j s_j (x_j - p'_gj)^2 / 2 + t |x|_2``, which is 0 where
    ``|s * p'_g|_2 <= t`` and else ``s_j p'_gj |x|_2 / (s_j |x|_2 + t)``.

    Args:
      inner: an optimiser that contains one ``optax.scale_by_adam``, not masked, and that gives
        final updates (learning rate and sign included), for instance ``optax.adam``.
      weight: f32[], lambda; it may be traced.
      learning_rate: f32[] or schedule, the same as in ``inner``; it may be traced.
      b2: the same as in ``inner``.
      eps: the same as in ``inner``.
      mask: as in `add_l1`: the penalised leaves; the others get the update of ``inner``.
      groups: whether rows are penalised instead of entries.

    Returns:
      A transformation with the state of ``inner``, which needs the parameters in ``update``.

    Raises:
      ValueError: in ``update``: no parameters, or not exactly one Adam in the state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = proximal_l1(optax.adam(0.1), 0.01, 0.1)
      >>> params = jnp.array([1.0, 0.1001])
      >>> updates, _ = optimizer.update(
      ...     jnp.array([1.0, 1.0]), optimizer.init(params), params)
      >>> print([round(p, 4) for p in optax.apply_updates(params, updates).tolist()])
      [0.899, 0.0]
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("proximal_l1 needs the parameters: update(updates, state, params)")
        updates, state = inner.update(updates, state, params, **extra_args)
        adam = _adam_state(state)
        rate = learning_rate(adam.count - 1) if callable(learning_rate) else learning_rate
        second_moment = optax.tree.bias_correction(adam.nu, b2, adam.count)
        penalised = mask(params) if callable(mask) else True if mask is None else mask
        penalised = jax.tree.map(  # a prefix becomes a full tree
            lambda m, subtree: jax.tree.map(lambda _: m, subtree), penalised, params
        )

        def shrink(m, u, p, v):
            if not m:
                return u
            moved = p + u
            if groups:
                threshold = rate * weight * p.shape[-1] ** 0.5
                return (_shrink_rows(moved, jnp.sqrt(v) + eps, threshold) - p).astype(u.dtype)
            threshold = rate * weight / (jnp.sqrt(v) + eps)
            shrunk = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0)
            # p + (0 - p) is exactly 0, so zeros survive apply_updates.
            return (shrunk - p).astype(u.dtype)

        return jax.tree.map(shrink, penalised, updates, params, second_moment), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def clip_by_variable_norm(
    max_norm: ArrayLike, axis_name: str | None = None
) -> optax.GradientTransformation:
    r"""Clips each leaf to an L2 norm by itself, as ``tf.clip_by_norm`` on each variable.

    ``g <- g * max_norm / max(norm(g), max_norm)`` for each leaf; ``optax.clip_by_global_norm``
    takes one norm over all leaves instead.

    Args:
      max_norm: f32[], above 0; it may be traced.
      axis_name: a mapped axis over which the leaves are split: the norm is over all parts.

    Returns:
      A stateless transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> clip = clip_by_variable_norm(1.0)
      >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4])}
      >>> clipped, _ = clip.update(grads, clip.init(grads))
      >>> print(clipped["a"], clipped["b"])
      [0.6 0.8] [0.3 0.4]
    """

    def clip(g: jax.Array) -> jax.Array:
        g = jnp.asarray(g)
        # Scaled by the largest entry, so that the squares do not overflow.
        largest = jnp.max(jnp.abs(g), initial=0)
        if axis_name is not None:
            largest = jax.lax.pmax(largest, axis_name)
        scale = jnp.where(largest > 0, largest, 1)
        squares = jnp.sum(jnp.square(g / scale))
        if axis_name is not None:
            squares = jax.lax.psum(squares, axis_name)
        norm = scale * jnp.sqrt(squares)
        return jnp.where(norm > max_norm, g * (max_norm / norm), g).astype(g.dtype)

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(init, update)


def l1_adam(
    learning_rate: ArrayLike | optax.Schedule,
    *,
    l1: ArrayLike = 0.0,
    method: str = "subgradient",
    mask: Mask = None,
    clip_norm: ArrayLike | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    r"""Adam under an L1 penalty on some leaves (CoNet-lasso: Eq. 8 on the H^l).

    "subgradient" is the paper's way: `add_l1`, then clipping, then Adam; "proximal" is clipping,
    then Adam, then the step of `proximal_l1`; "group" the same with its group lasso.
    The penalty is in the unit of the loss whose gradients are given: for a loss summed over n
    examples, ``l1 = n * lambda``.

    Args:
      learning_rate: f32[] or schedule; it may be traced.
      l1: f32[], lambda in the unit of the loss; it may be traced. 0 is plain Adam, with a state
        of the same structure.
      method: "subgradient", "proximal" or "group".
      mask: as in `add_l1`: the penalised leaves.
      clip_norm: f32[], bound on the norm of each leaf's gradient (`clip_by_variable_norm`), or
        None for no clipping.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Returns:
      A transformation that needs the parameters in ``update``.

    Raises:
      ValueError: the method is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> optimizer = l1_adam(0.01, l1=0.1, method="proximal")
      >>> params = jnp.array([1.0, 0.005])
      >>> state = optimizer.init(params)
      >>> for _ in range(20):
      ...     updates, state = optimizer.update(params - jnp.array([1.0, 0.05]), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params[1])
      0.0
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    clip = [] if clip_norm is None else [clip_by_variable_norm(clip_norm)]
    adam = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.scale_by_learning_rate(learning_rate)]
    if method == "subgradient":
        return optax.chain(add_l1(l1, mask), *clip, *adam)
    return proximal_l1(
        optax.chain(*clip, *adam),
        l1,
        learning_rate,
        b2=b2,
        eps=eps,
        mask=mask,
        groups=method == "group",
    )
