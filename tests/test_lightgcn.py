"""LightGCN against the dense matrix of its paper, in NumPy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from test_baselines import (
    L2,
    SIZES,
    TARGET_ITEMS,
    all_scores,
    assert_trees_close,
    both_domains,
    complex_step_gradient,
    hyper_of,
    on_device,
    random_batch,
    random_params,
    softplus,
)

from conet_jax.models import lightgcn
from conet_jax.train import sampling
from conet_jax.train.chunk import train_chunk, train_population
from conet_jax.train.interactions import to_device
from conet_jax.train.state import Settings, init_state
from conet_jax.train.step import joint_objective

DEPTH = 3
MODEL = lightgcn.build(lightgcn.Options((6, 4), DEPTH))


def dense_propagation(lists, depth=DEPTH):
    """sum_k M^k / (K + 1) of M = D^-1/2 A D^-1/2 (Eqs. 7 and 8 of He et al. 2020)."""
    users, items = SIZES.users, SIZES.target_items
    adjacency = np.zeros((users + items, users + items))
    for u, own in enumerate(lists):
        for i in own:
            adjacency[u, users + i] = adjacency[users + i, u] = 1
    degrees = adjacency.sum(1)
    root = np.where(degrees > 0, 1 / np.sqrt(np.maximum(degrees, 1)), 0)
    m = np.diag(root) @ adjacency @ np.diag(root)
    return sum(np.linalg.matrix_power(m, k) for k in range(depth + 1)) / (depth + 1)


PROPAGATION = dense_propagation(TARGET_ITEMS)


def propagated(dense, propagation=PROPAGATION):
    both = propagation @ np.concatenate([dense["user"], dense["item"]])
    return both[: SIZES.users], both[SIZES.users :]


def objective(dense, batch, l2):
    """Sum of w (BPR + l2 / 2 |e|^2), e the embeddings before propagation (Eq. 15)."""
    users, items = propagated(dense)
    total = 0
    for u, i, j, w in zip(batch.users, batch.items, batch.negatives, batch.weights, strict=True):
        margin = (users[u] * (items[i] - items[j])).sum()
        rows = dense["user"][u], dense["item"][i], dense["item"][j]
        total += w * (softplus(-margin) + l2 / 2 * sum((row * row).sum() for row in rows))
    return total


def test_scores_are_products_of_the_mean_of_the_dense_layers():
    params = random_params(MODEL)
    users, items = propagated(params.dense)
    with jax.enable_x64(True):
        scores = all_scores(MODEL, on_device(params), both_domains())
    np.testing.assert_allclose(scores, users @ items.T, rtol=1e-12, atol=1e-12)
    assert np.abs(PROPAGATION - np.diag(np.diag(PROPAGATION))).max() > 0.1


def test_without_layers_it_is_a_factorisation():
    model = lightgcn.build(lightgcn.Options((6, 4), 0))
    params = random_params(model)
    with jax.enable_x64(True):
        scores = all_scores(model, on_device(params), both_domains())
    expected = params.dense["user"] @ params.dense["item"].T
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)


def test_users_and_items_without_pairs_keep_their_share_of_layer_zero():
    lists = [[0, 2], [], [1, 2]]
    indptr = np.cumsum([0] + [len(own) for own in lists])
    graph = lightgcn.graph({"target": to_device(indptr, np.concatenate(lists).astype(int), 5)})
    dense = {"user": jnp.ones((3, 2)), "item": 2 * jnp.ones((5, 2))}
    found = lightgcn.propagate(dense, graph, DEPTH)
    np.testing.assert_allclose(found["user"][1], 1 / (DEPTH + 1))
    np.testing.assert_allclose(found["item"][3:], 2 / (DEPTH + 1))


def test_loss_and_gradient_are_those_of_the_dense_matrix():
    params, batch, hyper = random_params(MODEL), random_batch(), hyper_of()
    value = objective(params.dense, batch.target, hyper.l2)
    gradient = complex_step_gradient(lambda d: objective(d, batch.target, hyper.l2), params.dense)
    with jax.enable_x64(True):
        p, b, h = on_device((params, batch, hyper))
        b = b._replace(graph=lightgcn.graph(both_domains()))

        @jax.jit
        def loss(dense):
            return joint_objective(MODEL, dense, {}, b, h)

        (ours, sums), ours_gradient = jax.value_and_grad(loss, has_aux=True)(p.dense)
        np.testing.assert_allclose(ours, value, rtol=1e-12)
        assert_trees_close(ours_gradient, gradient, 1e-10)
        plain = objective(params.dense, batch.target, 0.0)  # what is told is without the penalty
        np.testing.assert_allclose(sums["target_loss"], plain, rtol=1e-12)
    assert all(np.abs(g).max() > 1e-2 for g in gradient.values())


def test_steps_are_dense_adam_through_the_whole_graph():
    steps, rate = 4, 0.05
    with jax.enable_x64(True):
        interactions, key = both_domains(), jax.random.key(3)
        plan = sampling.plan_epoch(
            interactions, domains=MODEL.domains, pairing=MODEL.pairing, batch_size=4
        )
        params, hyper = on_device((random_params(MODEL), hyper_of()))
        hyper = hyper._replace(learning_rate=jnp.asarray(rate))
        state = init_state(MODEL, params, Settings())
        at = jnp.int32(0)
        start = jax.tree.map(np.asarray, params.dense)
        state, sums = train_chunk(
            state,
            interactions,
            key,
            at,
            at,
            hyper,
            model=MODEL,
            plan=plan,
            settings=Settings(),
            num_steps=min(steps, plan.steps),
        )
        sample = jax.jit(partial(sampling.sample_step, interactions=interactions, plan=plan))
        batches = [
            jax.tree.map(np.asarray, sample(key, at, jnp.int32(step)).target)
            for step in range(min(steps, plan.steps))
        ]
        found = jax.tree.map(np.asarray, (state.dense, sums["target_loss"]))
    dense, losses = {k: np.array(x) for k, x in start.items()}, []
    first = {k: np.zeros_like(x) for k, x in dense.items()}
    second = {k: np.zeros_like(x) for k, x in dense.items()}
    for t, batch in enumerate(batches, 1):
        losses.append(objective(dense, batch, 0.0))
        gradient = complex_step_gradient(lambda d, b=batch: objective(d, b, L2), dense)
        for k, g in gradient.items():
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.999 * second[k] + 0.001 * g * g
            m, v = first[k] / (1 - 0.9**t), second[k] / (1 - 0.999**t)
            dense[k] = dense[k] - rate * m / (np.sqrt(v) + 1e-8)
    assert len(batches) > 2
    np.testing.assert_allclose(found[1], losses, rtol=1e-9)
    assert_trees_close(found[0], dense, 1e-8)


def test_a_population_on_one_graph_is_its_single_runs():
    with jax.enable_x64(True):
        interactions = both_domains()
        plan = sampling.plan_epoch(
            interactions, domains=MODEL.domains, pairing=MODEL.pairing, batch_size=8
        )
        static = dict(model=MODEL, plan=plan, settings=Settings(), num_steps=plan.steps)
        at, keys = jnp.int32(0), jax.random.split(jax.random.key(1), 2)
        hypers = [on_device(hyper_of(l2)._replace(learning_rate=0.05)) for l2 in (0.0, L2)]
        hypers = [jax.tree.map(jnp.asarray, hyper) for hyper in hypers]
        params = [on_device(random_params(MODEL, seed)) for seed in range(2)]
        states = [init_state(MODEL, own, Settings()) for own in params]
        together, _ = train_population(
            jax.tree.map(lambda *x: jnp.stack(x), *states),
            interactions,
            keys,
            at,
            at,
            jax.tree.map(lambda *x: jnp.stack(x), *hypers),
            **static,
        )
        for member, (state, hyper) in enumerate(zip(states, hypers, strict=True)):
            alone, _ = train_chunk(state, interactions, keys[member], at, at, hyper, **static)
            own = jax.tree.map(lambda x, at=member: x[at], together.dense)
            assert_trees_close(own, alone.dense, 1e-10)
        assert np.abs(own["user"] - params[1].dense["user"]).max() > 0.01  # it was trained
