"""The L1-augmented Adam against its formulas, optax, and ISTA in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conet_jax import optimizers


def _run(optimizer, params, grad, steps):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(grad(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]


def _lasso(seed=0, examples=256, dim=64, weight=0.15):
    """A lasso problem and its optimum: (gradient of the smooth part, objective, weights)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, dim))
    true = np.concatenate([rng.normal(size=6), np.zeros(dim - 6)])
    y = x @ true + 0.5 * rng.normal(size=examples)

    def objective(w):
        w = np.asarray(w, np.float64)
        return 0.5 * np.mean((x @ w - y) ** 2) + weight * np.abs(w).sum()

    length = 1 / np.linalg.eigvalsh(x.T @ x / examples)[-1]
    w = np.zeros(dim)
    for _ in range(3000):  # ISTA
        w = w - length * x.T @ (x @ w - y) / examples
        w = np.sign(w) * np.maximum(np.abs(w) - length * weight, 0)
    gram, moment = jnp.asarray(x.T @ x / examples), jnp.asarray(x.T @ y / examples)
    return lambda p: gram @ p - moment, objective, w, weight


def test_proximal_step_reaches_the_lasso_optimum_with_true_zeros():
    grad, objective, optimum, weight = _lasso()
    start = 0.1 * jax.random.normal(jax.random.key(0), (64,))
    proximal = optimizers.l1_adam(1e-2, l1=weight, method="proximal")
    subgradient = optimizers.l1_adam(1e-2, l1=weight, method="subgradient")
    sparse, dense = (_run(opt, start, grad, 2000) for opt in (proximal, subgradient))
    assert (optimum == 0).sum() > 50
    np.testing.assert_array_equal(sparse == 0, optimum == 0)
    assert objective(sparse) - objective(optimum) < 1e-6
    assert (dense == 0).sum() == 0
    assert objective(dense) - objective(optimum) > 1e-3


def test_threshold_is_in_the_metric_of_adam():
    params = jnp.array([1.0, -0.5, 0.02])
    grads = [jnp.array([0.3, -2.0, 1e-4]), jnp.array([-0.1, 0.5, 2e-4])]
    learning_rate, weight, b1, b2, eps = 0.05, 0.2, 0.8, 0.99, 1e-6
    inner = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    optimizer = optimizers.proximal_l1(inner, weight, learning_rate, b2=b2, eps=eps)
    state = optimizer.init(params)
    p, m, v = np.asarray(params, np.float64), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        root = np.sqrt(v / (1 - b2**t)) + eps
        p = p - learning_rate * m / (1 - b1**t) / root
        p = np.sign(p) * np.maximum(np.abs(p) - learning_rate * weight / root, 0)
        np.testing.assert_allclose(params, p, rtol=2e-5)


def _group_lasso(seed=0, examples=256, rows=32, columns=6, weight=0.1):
    """A group lasso on rows and its optimum: (gradient of the smooth part, objective, weights)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, rows))
    true = np.concatenate([rng.normal(size=(5, columns)), np.zeros((rows - 5, columns))])
    y = x @ true + 0.5 * rng.normal(size=(examples, columns))
    penalty = weight * np.sqrt(columns)

    def objective(w):
        w = np.asarray(w, np.float64)
        return 0.5 * ((x @ w - y) ** 2).sum() / examples + penalty * np.linalg.norm(w, axis=1).sum()

    length = 1 / np.linalg.eigvalsh(x.T @ x / examples)[-1]
    w = np.zeros((rows, columns))
    for _ in range(3000):  # proximal gradient
        w = w - length * x.T @ (x @ w - y) / examples
        norms = np.linalg.norm(w, axis=1, keepdims=True)
        w = w * np.maximum(1 - length * penalty / np.maximum(norms, 1e-30), 0)
    gram, moment = jnp.asarray(x.T @ x / examples), jnp.asarray(x.T @ y / examples)
    return lambda p: gram @ p - moment, objective, w, weight


def test_group_step_reaches_the_group_lasso_optimum_with_whole_rows_of_zeros():
    grad, objective, optimum, weight = _group_lasso()
    start = 0.1 * jax.random.normal(jax.random.key(0), optimum.shape)
    found = _run(optimizers.l1_adam(1e-2, l1=weight, method="group"), start, grad, 3000)
    empty = (optimum == 0).all(1)
    assert 20 < empty.sum() < 32
    np.testing.assert_array_equal((found == 0).all(1), empty)
    assert (found[~empty] != 0).all()  # entries of a kept row are not thinned out
    assert objective(found) - objective(optimum) < 1e-6
    np.testing.assert_allclose(found, optimum, atol=1e-4)


def test_group_step_minimises_the_penalised_distance_in_the_metric_of_adam():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 40, 5)) * 10.0 ** rng.integers(-3, 1, (2, 40, 1))
    grads = rng.normal(size=(3, 2, 40, 5)) * 10.0 ** rng.integers(-3, 1, (2, 40, 5))
    start[0, 0] = grads[:, 0, 0] = 0  # a row that never moved
    learning_rate, weight, b1, b2, eps = 0.05, 0.2, 0.8, 0.99, 1e-6
    t = learning_rate * weight * np.sqrt(5)
    inner = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    optimizer = optimizers.proximal_l1(inner, weight, learning_rate, b2=b2, eps=eps, groups=True)
    with jax.enable_x64(True):
        params = jnp.asarray(start)
        state = optimizer.init(params)
        m = v = 0.0
        for step, g in enumerate(grads, start=1):
            before = np.asarray(params)
            updates, state = optimizer.update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            s = np.sqrt(v / (1 - b2**step)) + eps
            moved = before - learning_rate * m / (1 - b1**step) / s
            # Zero is a subgradient of sum s (x - moved)^2 / 2 + t |x|, which is convex, at x alone.
            x = np.asarray(params)
            norms = np.linalg.norm(x, axis=-1)
            empty = norms == 0
            pull = np.linalg.norm(s * moved, axis=-1)
            assert 5 < empty.sum() < 75
            assert (pull[empty] <= t).all() and (pull[~empty] > t).all()
            slope = s * (x - moved) + t * x / np.where(empty, 1, norms)[..., None]
            np.testing.assert_allclose(slope[~empty], 0, atol=1e-9 * t)


def test_group_step_with_equal_moments_in_a_row_shrinks_its_norm():
    p = np.array([[3.0, -4.0], [0.06, 0.08], [0.3, 0.4]])
    g = np.array([[0.5, -0.5], [2.0, 2.0], [0.1, 0.1]])
    learning_rate, weight = 0.1, 0.3
    moved = p - learning_rate * np.sign(g)  # Adam's first step
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    threshold = learning_rate * weight * np.sqrt(2) / np.abs(g[:, :1])
    expected = moved * np.maximum(1 - threshold / norms, 0)
    assert (expected == 0).all(1).tolist() == [False, False, True]
    with jax.enable_x64(True):
        params = jnp.asarray(p)
        inner = optax.adam(learning_rate, eps=1e-12)
        optimizer = optimizers.proximal_l1(inner, weight, learning_rate, eps=1e-12, groups=True)
        updates, _ = optimizer.update(jnp.asarray(g), optimizer.init(params), params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, expected, rtol=1e-9)


@pytest.mark.parametrize("method", optimizers.METHODS)
def test_without_penalty_and_clipping_it_is_adam(method):
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
    schedule = optax.linear_schedule(1e-1, 1e-3, 20)
    for learning_rate in (1e-2, schedule):
        ours, theirs = (
            _run(opt, params, lambda p: jax.tree.map(jnp.sin, p), 30)
            for opt in (
                optimizers.l1_adam(learning_rate, method=method, b1=0.8, b2=0.9),
                optax.adam(learning_rate, b1=0.8, b2=0.9),
            )
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), ours, theirs)


def test_proximal_follows_a_schedule():
    grad, objective, optimum, weight = _lasso()
    schedule = optax.cosine_decay_schedule(1e-2, 1500)
    optimizer = optimizers.l1_adam(schedule, l1=weight, method="proximal")
    params = _run(optimizer, jnp.zeros(64), grad, 1500)
    assert objective(params) - objective(optimum) < 1e-6


@pytest.mark.parametrize("method", optimizers.METHODS)
@pytest.mark.parametrize(
    "mask",
    [
        {"h": True, "w": {"kernel": False, "bias": False}},
        {"h": True, "w": False},  # a prefix
        lambda params: {"h": True, "w": jax.tree.map(lambda _: False, params["w"])},
    ],
)
def test_mask_confines_the_penalty(method, mask):
    params = {"h": jnp.array([0.5, -0.01]), "w": {"kernel": jnp.ones(2), "bias": jnp.zeros(1)}}
    grad = lambda p: jax.tree.map(lambda x: jnp.cos(3 * x), p)  # noqa: E731
    plain = _run(optax.adam(1e-2), params, grad, 10)
    masked = _run(optimizers.l1_adam(1e-2, l1=0.5, method=method, mask=mask), params, grad, 10)
    jax.tree.map(np.testing.assert_array_equal, masked["w"], plain["w"])
    assert (masked["h"] != plain["h"]).any()


def test_add_l1_adds_the_subgradient_zero_at_zero():
    params = jnp.array([2.0, -3.0, 0.0, -0.0])
    updates, _ = optimizers.add_l1(0.5).update(jnp.ones(4), optax.EmptyState(), params)
    np.testing.assert_array_equal(updates, [1.5, 0.5, 1.0, 1.0])


def test_clip_bounds_each_leaf_by_itself():
    rng = np.random.default_rng(0)
    grads = {"large": rng.normal(size=(5, 4)) * 10, "small": rng.normal(size=3) * 0.1}
    clipped, _ = optimizers.clip_by_variable_norm(2.0).update(grads, optax.EmptyState())
    for name, g in grads.items():
        expected = g * 2.0 / max(np.linalg.norm(g), 2.0)  # tf.clip_by_norm
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-6)


def test_clip_survives_zero_huge_and_empty_gradients():
    grads = [jnp.zeros(3), jnp.full(4, 1e30), jnp.full(4, 1e-30), jnp.zeros((0, 2))]
    clipped, _ = optimizers.clip_by_variable_norm(2.0).update(grads, optax.EmptyState())
    for g, expected in zip(clipped, [0, 1, 1e-30, 0], strict=True):
        np.testing.assert_allclose(g, np.full(g.shape, expected), rtol=1e-6)


def test_penalty_is_clipped_with_the_gradient():
    params, grads = jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0])
    optimizer = optimizers.l1_adam(1.0, l1=30.0, clip_norm=1.0, eps=1.0)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optimizers._adam_state(state).mu, 0.1 * np.sqrt([0.5, 0.5]))
    del updates


@pytest.mark.parametrize("method", optimizers.METHODS)
def test_hyper_parameters_can_be_traced_and_vmapped(method):
    params = jnp.array([1.0, -0.3, 0.001])

    def train(learning_rate, l1, clip_norm):
        optimizer = optimizers.l1_adam(learning_rate, l1=l1, method=method, clip_norm=clip_norm)
        return _run(optimizer, params, jnp.sin, 20)

    grid = jnp.array([[1e-2, 0.0, 1.0], [1e-3, 0.1, 0.5], [1e-1, 0.01, 10.0]])
    population = jax.jit(jax.vmap(train))(*grid.T)
    for member, point in zip(population, grid, strict=True):
        np.testing.assert_allclose(member, train(*point), rtol=1e-5, atol=1e-7)


def test_state_does_not_depend_on_values():
    params = {"h": jnp.ones(2)}
    for method in optimizers.METHODS:
        structures = {
            jax.tree.structure(optimizers.l1_adam(1e-3, l1=l1, method=method).init(params))
            for l1 in (0.0, 0.1, jnp.float32(0.1))
        }
        assert len(structures) == 1


@pytest.mark.parametrize("method", ["proximal", "group"])
def test_zeros_stay_exact_through_apply_updates(method):
    params = jnp.array([0.1, 1e-3, -7e-8])
    optimizer = optimizers.l1_adam(1e-2, l1=100.0, method=method)
    updates, _ = optimizer.update(jnp.full(3, 1e-3), optimizer.init(params), params)
    assert (optax.apply_updates(params, updates) == 0).all()


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="method must be one of"):
        optimizers.l1_adam(1e-3, method="lasso")
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="add_l1 needs the parameters"):
        optimizers.add_l1(0.1).update(x, optax.EmptyState())
    with pytest.raises(ValueError, match="proximal_l1 needs the parameters"):
        optimizer = optimizers.proximal_l1(optax.adam(1e-3), 0.1, 1e-3)
        optimizer.update(x, optimizer.init(x))
    with pytest.raises(ValueError, match="one Adam, found 0"):
        optimizer = optimizers.proximal_l1(optax.sgd(1e-3), 0.1, 1e-3)
        optimizer.update(x, optimizer.init(x), x)
