"""Losses against their formulas in NumPy float64, then masks, extremes, batches and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import losses


def _numpy_binary_cross_entropy(logits, labels, weights=1.0):
    """Eq. 5, one example at a time."""
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return -weights * (labels * np.log(p) + (1 - labels) * np.log(1 - p))


def _batch(shape, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, shape)
    labels = rng.integers(0, 2, shape).astype(np.float64)
    weights = rng.uniform(0.1, 2, shape)
    return logits, labels, weights


def _finite_differences(f, x, step=1e-5):
    grads = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        grads[index] = (f(up) - f(down)) / (2 * step)
    return grads


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-5), (True, 1e-10)])
def test_binary_cross_entropy_is_equation_5(shape, x64, tolerance):
    logits, labels, weights = _batch(shape)
    each = _numpy_binary_cross_entropy(logits, labels, weights)
    expected = {
        "none": each,
        "sum": each.sum(-1),
        "mean": each.sum(-1) / weights.sum(-1),
    }
    with jax.enable_x64(x64):
        for reduction, value in expected.items():
            loss = losses.binary_cross_entropy(
                jnp.asarray(logits, float), labels, weights=weights, reduction=reduction
            )
            assert loss.dtype == (jnp.float64 if x64 else jnp.float32)
            np.testing.assert_allclose(loss, value, rtol=tolerance)


def test_gradients_agree_with_finite_differences_of_numpy():
    logits, labels, weights = _batch((5,))
    source_logits, source_labels, _ = _batch((3,), seed=1)
    with jax.enable_x64(True):
        grads = jax.grad(losses.joint_loss, argnums=(0, 2))(
            logits, labels, source_logits, source_labels, target_weight=0.7, target_weights=weights
        )
    target = _finite_differences(
        lambda x: 0.7 * _numpy_binary_cross_entropy(x, labels, weights).sum(), logits
    )
    source = _finite_differences(
        lambda x: 0.3 * _numpy_binary_cross_entropy(x, source_labels).sum(), source_logits
    )
    np.testing.assert_allclose(grads[0], target, atol=1e-9)
    np.testing.assert_allclose(grads[1], source, atol=1e-9)


def test_gradient_is_sigmoid_less_label_also_where_it_is_tiny():
    logits = jnp.array([0.0, 20.0, -20.0, 60.0])
    labels = jnp.array([1.0, 1.0, 0.0, 1.0])
    grads = jax.grad(losses.binary_cross_entropy)(logits, labels)
    expected = [-0.5, -1 / (1 + np.exp(20.0)), 1 / (1 + np.exp(20.0)), -np.exp(-60.0)]
    np.testing.assert_allclose(grads, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 17.0, 1e4, 1e30])
def test_losses_and_gradients_are_finite_for_extreme_logits(scale):
    logits = scale * jnp.array([1.0, 1.0, -1.0, -1.0])
    labels = jnp.array([1.0, 0.0, 1.0, 0.0])
    for reduction in ("sum", "mean"):
        for loss in (
            lambda x, r=reduction: losses.binary_cross_entropy(x, labels, reduction=r),
            lambda x, r=reduction: losses.bpr_loss(x, -x, reduction=r),
            lambda x, r=reduction: losses.joint_loss(
                x, labels, -x, labels, target_weight=0.5, reduction=r
            ),
        ):
            value, grads = jax.value_and_grad(loss)(logits)
            assert np.isfinite(value)
            assert np.isfinite(grads).all()


@pytest.mark.parametrize("masked", [1e30, np.inf, -np.inf, np.nan])
def test_masked_example_changes_neither_loss_nor_gradient(masked):
    logits, labels, weights = jnp.array([0.3, masked]), jnp.array([1.0, 0.0]), jnp.array([1.0, 0])
    for reduction in ("sum", "mean"):
        value, grads = jax.value_and_grad(losses.binary_cross_entropy)(
            logits, labels, weights=weights, reduction=reduction
        )
        alone = losses.binary_cross_entropy(logits[:1], labels[:1], reduction=reduction)
        assert value == alone
        assert grads[1] == 0
        assert np.isfinite(grads).all()
        assert np.isfinite(losses.bpr_loss(logits, labels, weights=weights, reduction=reduction))


def test_mean_over_no_weight_is_zero_with_zero_gradient():
    value, grads = jax.value_and_grad(losses.binary_cross_entropy)(
        jnp.ones(3), jnp.ones(3), weights=jnp.zeros(3), reduction="mean"
    )
    assert value == 0
    assert (grads == 0).all()
    grads = jax.grad(
        lambda weights: losses.reduced(jnp.ones(3), weights=weights, reduction="mean")
    )(jnp.zeros(3))
    assert (grads == 0).all()


def test_weights_broadcast_over_batch_axes():
    logits, labels, _ = _batch((2, 5))
    row = np.array([1.0, 0.0, 2.0, 1.0, 0.5])
    for weights in (row, row[:1], 2.0, np.ones((2, 1))):
        full = np.broadcast_to(weights, (2, 5))
        for reduction in ("sum", "mean", "none"):
            np.testing.assert_allclose(
                losses.binary_cross_entropy(logits, labels, weights=weights, reduction=reduction),
                losses.binary_cross_entropy(logits, labels, weights=full, reduction=reduction),
            )


def test_leading_axes_are_independent_losses_under_vmap_and_jit():
    logits, labels, weights = (jnp.asarray(x, jnp.float32) for x in _batch((4, 6)))
    for reduction in ("sum", "mean", "none"):

        def loss(x, y, w, reduction=reduction):
            return losses.binary_cross_entropy(x, y, weights=w, reduction=reduction)

        batch = loss(logits, labels, weights)
        np.testing.assert_allclose(jax.vmap(loss)(logits, labels, weights), batch, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(loss)(logits, labels, weights), batch, rtol=1e-6)


def test_integer_and_boolean_labels_are_converted():
    logits = jnp.array([0.5, -2.0])
    expected = losses.binary_cross_entropy(logits, jnp.array([1.0, 0.0]))
    assert losses.binary_cross_entropy(logits, np.array([1, 0])) == expected
    assert losses.binary_cross_entropy(logits, np.array([True, False])) == expected


def test_integer_logits_keep_soft_labels():
    loss = losses.binary_cross_entropy(np.array([1, -2]), np.array([0.5, 0.25]))
    expected = _numpy_binary_cross_entropy(np.array([1, -2]), np.array([0.5, 0.25])).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_joint_loss_is_equation_7_for_domains_of_different_size():
    logits, labels, _ = _batch((8,))
    source_logits, source_labels, weights = _batch((3,), seed=1)
    target = _numpy_binary_cross_entropy(logits, labels)
    source = _numpy_binary_cross_entropy(source_logits, source_labels, weights)

    @jax.jit
    def loss(target_weight, reduction_weights):
        kwargs = dict(target_weight=target_weight, source_weights=reduction_weights)
        arrays = (logits, labels, source_logits, source_labels)
        return [losses.joint_loss(*arrays, **kwargs, reduction=r) for r in ("sum", "mean")]

    for alpha in (0.0, 0.3, 1.0):
        summed, mean = loss(alpha, weights)
        np.testing.assert_allclose(
            summed, alpha * target.sum() + (1 - alpha) * source.sum(), rtol=1e-5
        )
        np.testing.assert_allclose(
            mean,
            alpha * target.mean() + (1 - alpha) * source.sum() / weights.sum(),
            rtol=1e-5,
        )


def test_target_weight_of_one_gives_the_source_no_gradient():
    x, y = jnp.ones(3), jnp.zeros(3)
    grads = jax.grad(losses.joint_loss, argnums=2)(x, y, x, y, target_weight=1.0)
    assert (grads == 0).all()


def test_target_weights_can_be_a_population():
    x, y = jnp.arange(3.0), jnp.zeros(3)
    alphas = jnp.array([0.0, 0.5, 1.0])
    population = jax.vmap(lambda a: losses.joint_loss(x, y, -x, y, target_weight=a))(alphas)
    single = [losses.joint_loss(x, y, -x, y, target_weight=a) for a in alphas]
    np.testing.assert_allclose(population, single, rtol=1e-6)


def test_l1_penalty_is_equation_8_with_gradient_zero_at_zero():
    rng = np.random.default_rng(0)
    h = {"low": rng.normal(size=(4, 8)), "high": [rng.normal(size=(2, 4)), np.zeros(3)]}
    h["low"][0] = 0
    value, grads = jax.value_and_grad(losses.l1_penalty)(h, weight=0.1)
    expected = 0.1 * sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(h))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(h), strict=True):
        np.testing.assert_allclose(grad, 0.1 * np.sign(leaf), rtol=1e-6)


def test_l1_penalty_of_no_matrices_is_zero():
    assert isinstance(losses.l1_penalty({}), jax.Array) and losses.l1_penalty({}) == 0
    assert losses.l1_penalty([jnp.zeros((0, 3))], weight=2.0) == 0


def test_bpr_loss_is_its_formula():
    positive, _, weights = _batch((2, 9))
    negative, _, _ = _batch((2, 9), seed=1)
    each = -weights * np.log(1 / (1 + np.exp(-(positive - negative))))
    for reduction, expected in {
        "none": each,
        "sum": each.sum(-1),
        "mean": each.sum(-1) / weights.sum(-1),
    }.items():
        loss = losses.bpr_loss(positive, negative, weights=weights, reduction=reduction)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    by_default = losses.bpr_loss(positive, negative, weights=weights)
    np.testing.assert_allclose(by_default, each.sum(-1), rtol=1e-4)


def test_reduced_is_the_weighted_sum_or_mean_of_losses():
    values, _, weights = _batch((2, 9))
    each = {"weighted": weights * values, "plain": values}
    for name, total in (("weighted", weights.sum(-1)), ("plain", 9)):
        kwargs = {"weights": weights} if name == "weighted" else {}
        for reduction, expected in {
            "none": each[name],
            "sum": each[name].sum(-1),
            "mean": each[name].sum(-1) / total,
        }.items():
            with jax.enable_x64(True):
                found = losses.reduced(values, **kwargs, reduction=reduction)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert losses.reduced(np.array([1, 2])) == 3  # integers are converted, and summed by default


@pytest.mark.parametrize("masked", [np.inf, -np.inf, np.nan])
def test_reduced_leaves_out_what_has_no_weight_whatever_it_is(masked):
    values, weights = jnp.array([2.0, masked, 4.0]), jnp.array([1.0, 0.0, 3.0])
    for reduction, expected, gradient in (
        ("sum", 14.0, [1.0, 0.0, 3.0]),
        ("mean", 3.5, [0.25, 0.0, 0.75]),
    ):
        value, grads = jax.value_and_grad(losses.reduced)(
            values, weights=weights, reduction=reduction
        )
        assert value == expected
        np.testing.assert_array_equal(grads, gradient)
    none = losses.reduced(values, weights=weights, reduction="none")
    np.testing.assert_array_equal(none, [2.0, 0.0, 12.0])
    assert losses.reduced(values, weights=jnp.zeros(3), reduction="mean") == 0


def test_wrong_input_is_refused():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match=r"\(3,\) and labels \(2,\) differ"):
        losses.binary_cross_entropy(x, x[:2])
    with pytest.raises(ValueError, match="differ in shape"):
        losses.bpr_loss(x, x[:, None])
    with pytest.raises(ValueError, match="do not broadcast"):
        losses.binary_cross_entropy(x, x, weights=x[:2])
    with pytest.raises(ValueError, match="do not broadcast"):  # would enlarge the batch
        losses.binary_cross_entropy(x, x, weights=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="reduction must be one of"):
        losses.binary_cross_entropy(x, x, reduction="average")
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        losses.joint_loss(x, x, x, x, target_weight=0.5, reduction="none")
    with pytest.raises(ValueError, match="^the last axis holds"):
        losses.binary_cross_entropy(1.0, 1.0)
    with pytest.raises(ValueError, match="scalar"):
        losses.reduced(1.0)
    with pytest.raises(ValueError, match="do not broadcast"):
        losses.reduced(x, weights=x[:2])
    with pytest.raises(ValueError, match="reduction must be one of"):
        losses.reduced(x, reduction="average")
