"""Baselines and linear references against their papers' formulas, written out in NumPy float64.

Gradients of a transcription are by complex steps, f'(x) = Im f(x + ih) / h: a finite difference
without cancellation, so that they too are good to 1e-10.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import metrics
from conet_jax.config import default_config, validate
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.models import (
    bprmf,
    cmf,
    conet,
    cross_stitch,
    ease,
    factors,
    fm,
    history,
    ials,
    popularity,
    two_towers,
)
from conet_jax.models.base import Batch, Examples, History, Hyper, Params, Sizes
from conet_jax.run import loop
from conet_jax.run.experiment import make_experiment
from conet_jax.run.fit import fit
from conet_jax.run.start import initial_state
from conet_jax.train import ranking, sampling
from conet_jax.train.interactions import to_device
from conet_jax.train.step import joint_objective
from conet_jax.variants import VARIANTS

SIZES = Sizes(users=5, target_items=6, source_items=7)
LAYERS = (6, 4)  # 3 factors
EXAMPLES = 10
SLOTS = 4  # of a history
ALPHA, L2, NEGATIVE_WEIGHT = 0.7, 0.3, 0.4


# What an example costs, one at a time: (loss, squared norms of the rows under l2).


def softplus(x):
    return np.log(1 + np.exp(x))


def cross_entropy(logit, label):
    return label * softplus(-logit) + (1 - label) * softplus(logit)


def norm(*rows):
    return sum((row * row).sum() for row in rows)


def linear(user, item):
    """p^T q + b; the bias is the last of the item's row."""
    return sum(user[k] * item[k] for k in range(len(user))) + item[-1]


def machine(w_0, features, values):
    """Rendle 2012, Eq. 1, by its double sum; a feature's row is [v, w]."""
    score = w_0 + sum(row[-1] * x for row, x in zip(features, values, strict=True))
    for j in range(len(features)):
        for k in range(j + 1, len(features)):
            score += (features[j][:-1] * features[k][:-1]).sum() * values[j] * values[k]
    return score


def costs_of_bprmf(params, batch, hyper):
    users, items = params.tables["user"], params.tables["target_item"]
    costs = []
    for u, i, j in zip(batch.target.users, batch.target.items, batch.target.negatives, strict=True):
        p, liked, other = users[u], items[i], items[j]
        costs.append((softplus(linear(p, other) - linear(p, liked)), norm(p, liked, other)))
    return {"target": costs}


def costs_of_cmf(params, batch, hyper, squared=False):
    costs = {}
    for domain in ("target", "source"):
        examples, costs[domain] = getattr(batch, domain), []
        for u, i, y in zip(examples.users, examples.items, examples.labels, strict=True):
            p, q = params.tables["user"][u], params.tables[f"{domain}_item"][i]
            loss = cross_entropy(linear(p, q), y)
            if squared:
                loss = (1.0 if y == 1 else hyper.negative_weight) * (y - linear(p, q)) ** 2
            costs[domain].append((loss, norm(p, q)))
    return costs


def costs_of_fm(params, batch, hyper):
    tables, costs = params.tables, []
    for n in range(EXAMPLES):
        p = tables["user"][batch.target.users[n]]
        q = tables["target_item"][batch.target.items[n]]
        seen = batch.source_history.items[n][batch.source_history.mask[n] > 0]
        context = [tables["source_item"][i] for i in seen]
        values = [1.0, 1.0] + [1 / len(seen) for _ in seen]
        score = machine(params.dense["bias"], [p, q, *context], values)
        costs.append((cross_entropy(score, batch.target.labels[n]), norm(p, q)))
    return {"target": costs}


CASES = {
    "bprmf": (bprmf.build(bprmf.Options(LAYERS)), costs_of_bprmf),
    "cmf": (cmf.build(cmf.Options(LAYERS)), costs_of_cmf),
    "cmf_squared": (
        cmf.build(cmf.Options(LAYERS, "squared")),
        lambda *args: costs_of_cmf(*args, squared=True),
    ),
    "fm": (fm.build(fm.Options(LAYERS)), costs_of_fm),
}


def objective(costs, batch, hyper):
    """Sum over domains of alpha times the weighted sum of loss + l2 / 2 |rows|^2 (Eq. 7)."""
    alphas = {"target": hyper.target_weight, "source": 1 - hyper.target_weight}
    total = 0
    for domain, pairs in costs.items():
        weights = getattr(batch, domain).weights
        value = sum(w * (c + hyper.l2 / 2 * n) for w, (c, n) in zip(weights, pairs, strict=True))
        total += value if len(costs) == 1 else alphas[domain] * value
    return total


def complex_step_gradient(f, params):
    leaves, tree = jax.tree.flatten(params)
    gradients = []
    for k, leaf in enumerate(leaves):
        gradient = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            moved = np.array(leaf, complex)
            moved[index] += 1e-30j
            value = f(jax.tree.unflatten(tree, [*leaves[:k], moved, *leaves[k + 1 :]]))
            gradient[index] = value.imag / 1e-30
        gradients.append(gradient)
    return jax.tree.unflatten(tree, gradients)


def random_params(model, seed=0):
    """Parameters of a model's structure, float64, large enough for every term to matter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), SIZES))
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) * 0.7), shapes)


def random_batch(seed=1, cross=1.0):
    """A batch with all that any model reads; two examples a domain and some slots are masked."""
    rng = np.random.default_rng(seed)

    def examples(num_items):
        weights = np.ones(EXAMPLES)
        weights[rng.choice(EXAMPLES, 2, replace=False)] = 0
        items, negatives = rng.integers(0, num_items, (2, EXAMPLES))
        labels = rng.permutation(np.arange(EXAMPLES) % 2).astype(float)
        users = rng.integers(0, SIZES.users, EXAMPLES)
        return Examples(users, items, labels, weights, negatives)

    mask = (np.arange(SLOTS)[None, :] < rng.integers(0, SLOTS + 1, EXAMPLES)[:, None]) * 1.0
    mask[0], mask[1] = 0, 1  # an empty one and a full one
    history = History(rng.integers(0, SIZES.source_items, (EXAMPLES, SLOTS)), mask)
    target, source = examples(SIZES.target_items), examples(SIZES.source_items)
    return Batch(target, source, history, np.asarray(cross), jax.random.key(0))


def on_device(tree):
    """Arrays in JAX's default float type, int32 ids."""

    def move(x):
        if isinstance(x, jax.Array):  # the key
            return x
        x = np.asarray(x)
        return jnp.asarray(x, float if x.dtype.kind == "f" else jnp.int32)

    return jax.tree.map(move, tree)


def hyper_of(l2=L2):
    return Hyper(
        learning_rate=1e-3,
        target_weight=ALPHA,
        l1=0.0,
        l2=l2,
        dropout=0.0,
        negative_weight=NEGATIVE_WEIGHT,
    )


def rows_of(model, params, batch):
    return {name: params.tables[name][ids] for name, ids in model.lookups(batch).items()}


@partial(jax.jit, static_argnames="model")
def value_and_gradient(model, params, batch, hyper):
    """(loss, sums), gradient with respect to dense parameters and whole tables."""

    def f(params):
        rows = rows_of(model, params, batch)
        return joint_objective(model, params.dense, rows, batch, hyper)

    return jax.value_and_grad(f, has_aux=True)(params)


def assert_trees_close(actual, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_formulas(case):
    model, costs_of = CASES[case]
    params, batch, hyper = random_params(model), random_batch(), hyper_of()
    costs = costs_of(params, batch, hyper)
    value = objective(costs, batch, hyper)
    gradient = complex_step_gradient(
        lambda p: objective(costs_of(p, batch, hyper), batch, hyper), params
    )
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient))  # all parts matter
    with jax.enable_x64(True):
        arguments = on_device((params, batch, hyper))
        (ours, aux), ours_gradient = value_and_gradient(model, *arguments)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, value, rtol=1e-10)
        assert_trees_close(ours_gradient, gradient, 1e-10)
        aux = {name: float(value) for name, value in aux.items()}
    assert set(aux) == {f"{d}_{kind}" for d in costs for kind in ("loss", "count")}
    for domain, pairs in costs.items():  # without the penalty
        total = sum(w * c for w, (c, _) in zip(getattr(batch, domain).weights, pairs, strict=True))
        np.testing.assert_allclose(aux[f"{domain}_loss"], total, rtol=1e-10)
        assert aux[f"{domain}_count"] == EXAMPLES - 2


@pytest.mark.parametrize("case", CASES)
def test_gradients_without_any_example_are_zero(case):
    model, _ = CASES[case]
    batch, none = random_batch(), np.zeros(EXAMPLES)
    batch = batch._replace(
        target=batch.target._replace(weights=none), source=batch.source._replace(weights=none)
    )
    arguments = on_device((random_params(model), batch, hyper_of()))
    (value, _), gradient = value_and_gradient(model, *arguments)
    assert value == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


# Users 0 to 4; user 2 has nothing in the source.
TARGET_ITEMS = [[0, 2], [5], [1, 2, 3], [4], [0, 3, 4, 5]]
SOURCE_ITEMS = [[0, 3, 6], [1], [], [2, 3, 4, 5], [0, 1]]


def interactions_of(lists, num_items):
    indptr = np.cumsum([0] + [len(items) for items in lists])
    return to_device(indptr, np.concatenate(lists).astype(int), num_items)


def both_domains():
    return {
        "target": interactions_of(TARGET_ITEMS, SIZES.target_items),
        "source": interactions_of(SOURCE_ITEMS, SIZES.source_items),
    }


def all_scores(model, params, interactions):
    """Scores of all users for all target items, listed in another order for each user."""
    users = np.arange(SIZES.users)
    items = np.stack([np.random.default_rng(u).permutation(SIZES.target_items) for u in users])
    projected = ranking.project(params, interactions, model=model)
    assert projected["item"].shape[0] == SIZES.target_items
    listed = jax.jit(model.scores)(projected, users, items)
    scores = np.zeros(items.shape)
    np.put_along_axis(scores, items, np.asarray(listed), axis=1)
    return scores


@pytest.mark.parametrize("case", ["bprmf", "cmf", "cmf_squared"])
def test_scores_of_factors_are_inner_products_and_biases(case):
    model, _ = CASES[case]
    params = random_params(model)
    expected = [
        [linear(user, item) for item in params.tables["target_item"]]
        for user in params.tables["user"]
    ]
    with jax.enable_x64(True):
        scores = all_scores(model, on_device(params), {})
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)


def test_scores_of_the_machine_are_its_double_sum_over_user_item_and_context():
    model, _ = CASES["fm"]
    params = random_params(model)
    expected = np.zeros((SIZES.users, SIZES.target_items))
    for u, seen in enumerate(SOURCE_ITEMS):
        context = [params.tables["source_item"][i] for i in seen]
        for i, item in enumerate(params.tables["target_item"]):
            features = [params.tables["user"][u], item, *context]
            values = [1.0, 1.0] + [1 / len(seen) for _ in seen]
            expected[u, i] = machine(params.dense["bias"], features, values)
    with jax.enable_x64(True):
        scores = all_scores(model, on_device(params), both_domains())
    np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-10)


def test_scores_of_the_machine_are_its_training_logits_with_whole_histories():
    model, _ = CASES["fm"]
    interactions = both_domains()
    plan = sampling.plan_epoch(
        interactions, domains=model.domains, pairing=model.pairing, batch_size=40
    )
    sample = jax.jit(lambda key: sampling.sample_step(key, 0, 0, interactions, plan))
    with jax.enable_x64(True):
        params, batch = on_device(random_params(model)), sample(jax.random.key(0))
        assert set(np.asarray(batch.target.users)) == set(range(SIZES.users))
        rows = rows_of(model, params, batch)
        trained = jax.jit(fm.logits)(params.dense, rows, batch.source_history.mask)
        projected = ranking.project(params, interactions, model=model)
        scores = jax.jit(model.scores)(projected, batch.target.users, batch.target.items[:, None])
        np.testing.assert_allclose(scores[:, 0], trained, rtol=1e-12, atol=1e-12)


def test_second_order_is_the_double_sum_over_pairs_of_features():
    rng = np.random.default_rng(0)
    vectors, values = rng.normal(size=(2, 4, 7, 3)), rng.normal(size=(2, 4, 7))
    values[0, 1] = 0  # nothing there
    values[1, 2, 1:] = 0  # a single feature has no pair
    expected = np.zeros((2, 4))
    for j in range(7):
        for k in range(j + 1, 7):
            products = (vectors[..., j, :] * vectors[..., k, :]).sum(-1)
            expected += products * values[..., j] * values[..., k]
    with jax.enable_x64(True):
        ours = jax.jit(fm.second_order)(vectors, values)
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_factors_start_small_with_biases_of_zero():
    table = np.asarray(factors.init(jax.random.key(0), 4000, 5, bias=True))
    assert table.shape == (4000, 6)
    assert not table[:, -1].any()
    assert abs(table[:, :-1].std() / 0.01 - 1) < 5 / np.sqrt(2 * 20_000)
    assert factors.init(jax.random.key(0), 4, 5).shape == (4, 5)


def test_mean_of_all_is_the_mean_of_each_users_items_over_many_blocks():
    rng = np.random.default_rng(0)
    users = np.sort(rng.choice([0, 1, 3, 4], 2 * history._BLOCK + 5))  # nothing of user 2
    items, table = rng.integers(0, 9, len(users)), rng.normal(size=(9, 3))
    expected = [table[items[users == u]].mean(0) if u != 2 else np.zeros(3) for u in range(5)]
    with jax.enable_x64(True):
        mean_of_all = jax.jit(history.mean_of_all, static_argnums=3)
        means = mean_of_all(*on_device((items, users, table)), 5)
        sizes = history.sizes(jnp.asarray(users), 5)
    np.testing.assert_allclose(means, expected, rtol=1e-10)
    np.testing.assert_array_equal(sizes, np.bincount(users, minlength=5))


# iALS


def random_domains(seed=0, users=40, target=23, source=17):
    """Domains in which some users and some items have nothing, others much."""
    rng = np.random.default_rng(seed)

    def lists(num_items, least):
        degrees = rng.integers(least, 13, users)
        degrees[[4, 20]] = 0
        used = np.setdiff1d(np.arange(num_items), [1, num_items - 1])
        return [np.sort(rng.choice(used, n, replace=False)) for n in degrees]

    domains = {
        "target": interactions_of(lists(target, 1), target),
        "source": interactions_of(lists(source, 0), source),
    }
    return domains, Sizes(users, target, source)


def matrix_of(interactions, domains, num_users):
    """The users x items matrix of 0 and 1, domains side by side."""
    parts = []
    for domain in domains:
        part = np.zeros((num_users, interactions[domain].num_items))
        part[interactions[domain].users, interactions[domain].items] = 1
        parts.append(part)
    return np.concatenate(parts, axis=1)


LAMBDA, CONFIDENCE, SOURCE_WEIGHT = 0.75, 3.0, 0.25  # exact in float32


def best_rows(r, fixed, weights):
    """For each row of r the minimiser of sum w c (r - x^T y)^2 + lambda |x|^2 (Hu et al. 2008)."""
    rows = []
    for own, w in zip(r, weights, strict=True):
        c = w * (1 + CONFIDENCE * own)
        normal = fixed.T @ np.diag(c) @ fixed + LAMBDA * np.eye(fixed.shape[1])
        rows.append(np.linalg.solve(normal, fixed.T @ (c * own)))
    return np.stack(rows)


def ials_objective(r, x, y, weights):
    errors = weights * (1 + CONFIDENCE * r) * (r - x @ y.T) ** 2
    return errors.sum() + LAMBDA * ((x**2).sum() + (y**2).sum())


def items_of(params):
    """All items' factors, domains one above the other."""
    names = [name for name in ("target_item", "source_item") if name in params.tables]
    return np.concatenate([params.tables[name] for name in names])


@pytest.mark.parametrize("at_once", [None, 16])  # pairs of a block, of which there are several
@pytest.mark.parametrize("joined", [False, True])
def test_each_half_of_a_sweep_solves_the_normal_equations(monkeypatch, joined, at_once):
    """With as many steps as it takes."""
    monkeypatch.setattr(ials, "_STEPS", ials._TO_THE_END)
    if at_once:
        monkeypatch.setattr(ials, "_PAIRS_AT_ONCE", at_once)
    interactions, sizes = random_domains()
    options = ials.Options((8, 4), joined, LAMBDA, CONFIDENCE, SOURCE_WEIGHT)
    model = ials.build(options)
    r = matrix_of(interactions, ("target", "source") if joined else ("target",), sizes.users)
    weights = np.ones_like(r)
    weights[:, sizes.target_items :] = SOURCE_WEIGHT
    with jax.enable_x64(True):
        params = model.init(jax.random.key(0), sizes)
        sweep = model.sweeper(interactions, sizes)
        for _ in range(4):
            before, params = items_of(params), sweep(params)
            x, y = np.asarray(params.tables["user"]), items_of(params)
            np.testing.assert_allclose(x, best_rows(r, before, weights), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(y, best_rows(r.T, x, weights.T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at_once", [None, 16])
@pytest.mark.parametrize("joined", [False, True])
def test_each_half_of_a_sweep_lowers_the_objective(monkeypatch, joined, at_once):
    if at_once:
        monkeypatch.setattr(ials, "_PAIRS_AT_ONCE", at_once)
    interactions, sizes = random_domains()
    options = ials.Options((8, 4), joined, LAMBDA, CONFIDENCE, SOURCE_WEIGHT)
    model = ials.build(options)
    domains = ("target", "source") if joined else ("target",)
    r = matrix_of(interactions, domains, sizes.users)
    weights = np.ones_like(r)
    weights[:, sizes.target_items :] = SOURCE_WEIGHT
    with jax.enable_x64(True):
        pairs = ials.matrix(interactions, sizes, joined=joined)
        assert (len(pairs.by_user.rows) > 1) == bool(at_once)
        params = model.init(jax.random.key(0), sizes)
        start, sweep = items_of(params), model.sweeper(interactions, sizes)
        values = []
        for _ in range(15):
            before, params = items_of(params), sweep(params)
            x, y = np.asarray(params.tables["user"]), items_of(params)
            values += [ials_objective(r, x, before, weights), ials_objective(r, x, y, weights)]
        fitted = ials.fit(interactions, sizes, options, sweeps=15)
        # With the items as they are, users are solved for to the end.
        solved = ials.users_of(pairs, params.tables, options, domains)
    np.testing.assert_allclose(solved, best_rows(r, y, weights), rtol=1e-9, atol=1e-12)
    assert (np.diff(values) < 0).all()
    for name, table in params.tables.items():
        np.testing.assert_array_equal(fitted[name], table)
    # As near to the optimum as with every half solved for.
    for _ in range(15):
        exact_x = best_rows(r, start, weights)
        start = best_rows(r.T, exact_x, weights.T)
    assert values[-1] <= 1.001 * ials_objective(r, exact_x, start, weights)
    without = r.sum(1) == 0, r.sum(0) == 0
    assert without[0].any() and without[1].any()
    assert not x[without[0]].any() and not y[without[1]].any()
    assert x[~without[0]].any(1).all() and y[~without[1]].any(1).all()


def test_many_sweeps_reach_a_point_where_the_gradient_is_zero():
    interactions, sizes = random_domains()
    options = ials.Options((8, 4), True, LAMBDA, CONFIDENCE, SOURCE_WEIGHT)
    r = matrix_of(interactions, ("target", "source"), sizes.users)
    weights = np.ones_like(r)
    weights[:, sizes.target_items :] = SOURCE_WEIGHT
    with jax.enable_x64(True):
        tables = ials.fit(interactions, sizes, options, sweeps=400)
    x, y = np.asarray(tables["user"]), items_of(Params(tables, {}))
    residual = weights * (1 + CONFIDENCE * r) * (x @ y.T - r)
    assert np.abs(residual @ y).max() > 0.1
    np.testing.assert_allclose(residual @ y + LAMBDA * x, 0, atol=1e-5)
    np.testing.assert_allclose(residual.T @ x + LAMBDA * y, 0, atol=1e-5)


def test_scores_of_ials_are_inner_products_with_target_items():
    model = ials.build(ials.Options(LAYERS, joined=True))
    params = random_params(model)
    expected = params.tables["user"] @ params.tables["target_item"].T
    with jax.enable_x64(True):
        scores = all_scores(model, on_device(params), both_domains())
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)


# EASE and popularity


@pytest.mark.parametrize("joined", [False, True])
def test_ease_is_its_closed_form_and_scores_are_the_users_rows_of_xb(joined):
    interactions = both_domains()
    model = ease.build(ease.Options(joined, ease_regularization=1.5))
    x = matrix_of(interactions, model.domains, SIZES.users)
    p = np.linalg.inv(x.T @ x + 1.5 * np.eye(x.shape[1]))
    b = np.eye(len(p)) - p @ np.diag(1 / np.diag(p))  # Steck 2019, Eq. 8
    for j in range(len(p)):  # which is, for each item, a ridge regression on the others
        others = np.delete(x, j, axis=1)
        gram = others.T @ others + 1.5 * np.eye(len(p) - 1)
        ridge = np.linalg.solve(gram, others.T @ x[:, j])
        np.testing.assert_allclose(np.delete(b[:, j], j), ridge, atol=1e-12)
    params = model.sweeper(interactions, SIZES)(model.init(jax.random.key(0), SIZES))
    ours = np.asarray(params.tables["target_item"]).T  # the columns of the target's items
    np.testing.assert_allclose(ours, b[:, : SIZES.target_items], rtol=1e-4, atol=1e-6)
    assert not ours[np.arange(SIZES.target_items), np.arange(SIZES.target_items)].any()
    scores = all_scores(model, params, interactions)
    np.testing.assert_allclose(scores, (x @ b)[:, : SIZES.target_items], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("joined", "fits"), [(False, 6), (True, 13)])
def test_ease_refuses_more_items_than_the_limit(joined, fits):
    options = ease.Options(joined, max_items=fits)
    assert ease.init(jax.random.key(0), SIZES, options).tables["target_item"].shape == (6, fits)
    message = rf"{fits} items: more than config\.max_items={fits - 1}; take another model"
    with pytest.raises(InputError, match=message):
        ease.init(jax.random.key(0), SIZES, options._replace(max_items=fits - 1))


def test_popularity_counts_the_users_of_each_target_item():
    model = popularity.build(popularity.Options())
    interactions = both_domains()
    params = model.sweeper(interactions, SIZES)(model.init(jax.random.key(0), SIZES))
    counts = [sum(i in own for own in TARGET_ITEMS) for i in range(SIZES.target_items)]
    assert len(set(counts)) > 1
    scores = all_scores(model, params, interactions)
    np.testing.assert_array_equal(scores, [counts] * SIZES.users)


# Cross-stitch

WIDTHS = (6, 6, 6, 6)
CROSSED = 2


def stitched_logits(dense, target, source, crossed=CROSSED):
    """Misra et al. 2016, Eq. 1, before each of the lowest transitions of two towers."""
    for level in range(len(WIDTHS) - 1):
        if level < crossed:
            (tt, ts), (st, ss) = dense[f"unit_{level}"]
            target, source = tt * target + ts * source, st * target + ss * source
        target, source = (
            np.maximum(x @ tower["kernel"] + tower["bias"], 0)
            for x, tower in (
                (target, dense["target"][f"W_{level}"]),
                (source, dense["source"][f"W_{level}"]),
            )
        )
    return [
        (x @ dense[domain]["h"]["kernel"] + dense[domain]["h"]["bias"])[:, 0]
        for domain, x in (("target", target), ("source", source))
    ]


def merged(params, batch, domain):
    examples = getattr(batch, domain)
    tables = params.tables["user"], params.tables[f"{domain}_item"]
    return np.concatenate([tables[0][examples.users], tables[1][examples.items]], axis=1)


def stitch(pairing="random"):
    options = cross_stitch.Options(WIDTHS, cross_layers=CROSSED, pairing=pairing)
    module = cross_stitch.CrossStitch(WIDTHS, CROSSED)
    return cross_stitch.build(options), module, random_params(cross_stitch.build(options), seed=1)


def units_of(dense):
    return {name: part for name, part in dense.items() if name.startswith("unit_")}


@pytest.mark.parametrize("case", ["stitched", "shut", "identity"])
def test_cross_stitch_logits_are_those_of_misra(case):
    model, module, params = stitch()
    batch = random_batch(cross=0.0 if case == "shut" else 1.0)
    if case == "identity":
        for unit in units_of(params.dense).values():
            unit[:] = np.eye(2)
    inputs = merged(params, batch, "target"), merged(params, batch, "source")
    crossed = CROSSED if case == "stitched" else 0  # else two towers apart
    expected = stitched_logits(params.dense, *inputs, crossed)
    assert np.ptp(expected, axis=1).min() > 0.1
    with jax.enable_x64(True):
        p, b = on_device((params, batch))
        logits = jax.jit(
            lambda p, b: two_towers.batch_logits(p.dense, rows_of(model, p, b), b, None, module)
        )(p, b)
        # There is no l2 on the units.
        (value, _), gradient = value_and_gradient(model, p, b, on_device(hyper_of()))
    found = [logits[domain] for domain in ("target", "source")]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    costs = {
        domain: [(cross_entropy(*pair), 0) for pair in zip(logits, examples.labels, strict=True)]
        for domain, logits, examples in zip(
            ("target", "source"), expected, (batch.target, batch.source), strict=True
        )
    }
    np.testing.assert_allclose(value, objective(costs, batch, hyper_of()), rtol=1e-10)
    learned = [np.abs(g).max() > 1e-3 for g in units_of(gradient.dense).values()]
    assert learned == [case != "shut"] * CROSSED


def test_cross_stitch_scores_take_the_mean_of_the_source_items_as_source_input():
    model, _, params = stitch()
    tables = params.tables
    users, items = (x.ravel() for x in np.mgrid[: SIZES.users, : SIZES.target_items])
    means = np.stack(
        [
            tables["source_item"][seen].mean(0) if seen else np.zeros(WIDTHS[0] // 2)
            for seen in SOURCE_ITEMS
        ]
    )
    target = np.concatenate([tables["user"][users], tables["target_item"][items]], axis=1)
    source = np.concatenate([tables["user"][users], means[users]], axis=1)
    expected = stitched_logits(params.dense, target, source)[0]
    with jax.enable_x64(True):
        scores = all_scores(model, on_device(params), both_domains())
    np.testing.assert_allclose(scores.ravel(), expected, rtol=1e-10, atol=1e-10)


def test_cross_stitch_starts_at_nine_tenths_of_the_own_tower():
    model, _, _ = stitch()
    dense = model.init(jax.random.key(0), SIZES).dense
    assert set(units_of(dense)) == {"unit_0", "unit_1"}
    for unit in units_of(dense).values():
        np.testing.assert_array_equal(unit, np.float32([[0.9, 0.1], [0.1, 0.9]]))


def test_cross_stitch_uncrossed_keeps_the_own_share_alone():
    model, _, params = stitch()
    off = model.uncrossed(params.dense)
    for name, unit in units_of(params.dense).items():
        np.testing.assert_allclose(off[name], unit * np.eye(2), rtol=1e-6)
    assert not any(jax.tree.leaves(model.l1_mask(params.dense)))
    batch = random_batch()
    inputs = merged(params, batch, "target"), merged(params, batch, "source")
    with jax.enable_x64(True):
        p, b = on_device((params._replace(dense=off), batch))
        rows = rows_of(model, p, b)
        found = two_towers.batch_logits(
            p.dense, rows, b, None, cross_stitch.CrossStitch(WIDTHS, CROSSED)
        )
    alone = {name: unit * np.eye(2) for name, unit in units_of(params.dense).items()}
    expected = stitched_logits(params.dense | alone, *inputs)
    np.testing.assert_allclose(found["target"], expected[0], rtol=1e-6)


def test_cross_stitch_diagnostics_are_the_ratios_of_its_two_terms():
    model, _, params = stitch()
    batch = random_batch()
    target, source = merged(params, batch, "target"), merged(params, batch, "source")
    (tt, ts), (st, ss) = params.dense["unit_0"]
    expected = {}
    for domain, kept, crossed in (
        ("target", tt * target, ts * source),
        ("source", ss * source, st * target),
    ):
        kernel = params.dense[domain]["W_0"]["kernel"]
        ratio = np.linalg.norm(crossed @ kernel) / np.linalg.norm(kept @ kernel)
        expected[f"cross_ratio/{domain}/layer_1"] = ratio
    with jax.enable_x64(True):
        p, b = on_device((params, batch))
        found = jax.jit(lambda p, b: model.diagnostics(p.dense, rows_of(model, p, b), b))(p, b)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10)


def test_cross_stitch_of_unequal_widths_is_refused():
    config = default_config("cross_stitch")
    config.name = "widths"
    validate(config)
    config.layers = (64, 32, 32, 32)
    with pytest.raises(InputError, match=r"config\.layers is \(64, 32, 32, 32\): .*equal widths"):
        validate(config)


# The ridge on the H^l


@pytest.mark.parametrize("cross_rank", [0, 2])
def test_l2_weighs_the_squares_of_the_cross_connections_against_a_mean_loss(cross_rank):
    options = conet.Options((6, 4, 3), cross_layers=2, cross_rank=cross_rank, pairing="random")
    model = conet.build(options)
    params, batch = random_params(model), random_batch()
    batch = batch._replace(source=batch.source._replace(weights=np.arange(EXAMPLES) < 5.0))
    crosses = {name: part for name, part in params.dense.items() if name.startswith("H_")}
    squares = sum((h**2).sum() for h in jax.tree.leaves(crosses))
    examples = EXAMPLES - 2  # of the longer domain
    with jax.enable_x64(True):
        p, b = on_device((params, batch))
        (value, aux), gradient = value_and_gradient(model, p, b, on_device(hyper_of()))
        (plain, plain_aux), plain_gradient = value_and_gradient(
            model, p, b, on_device(hyper_of(0.0))
        )
        np.testing.assert_allclose(value - plain, examples * L2 / 2 * squares, rtol=1e-10)
        assert_trees_close(aux, plain_aux, 0)
        pull = jax.tree.map(lambda h: examples * L2 * h, crosses)
        change = jax.tree.map(jnp.subtract, gradient, plain_gradient)
        assert_trees_close({name: change.dense[name] for name in crosses}, pull, 1e-10)
        rest = [change.tables] + [change.dense[domain] for domain in ("target", "source")]
        assert_trees_close(rest, jax.tree.map(np.zeros_like, rest), 1e-12)


# Runs


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(
        num_users=60,
        num_target_items=130,
        num_source_items=90,
        target_interactions=450,
        source_interactions=700,
        seed=0,
    )[0]


def tiny(variant, **fields):
    config = default_config(variant)
    config.ials_trials = 0
    config.name = "tiny"
    config.layers = (8, 8, 8) if variant == "cross_stitch" else (8, 6, 4)
    config.source_layers = (8, 7, 5) if config.source_layers else ()
    config.cross_layers = min(config.cross_layers, 2)
    config.cross_rank = min(config.cross_rank, 2)
    config.epochs = 2
    config.pretrain_epochs = min(config.pretrain_epochs, 1)
    config.ials_sweeps = 2
    config.batch_size = 128
    config.update(fields)
    return config


def without_seconds(result):
    return {name: value for name, value in result.items() if name != "seconds"}


def rows_in(workdir):
    """The rows of metrics.jsonl but for what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: row[name] for name in ("epoch", "step", "train_loss", "valid", "diagnostics")}
        for row in rows
    ]


QUICK = ("bprmf", "ials", "ease", "popularity")


@pytest.mark.parametrize(
    "variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_every_variant_runs_and_its_ranks_give_its_result(data, tmp_path, variant):
    workdir = tmp_path / "run"
    result = fit(tiny(variant), workdir, dataset=data)
    files = {path.name for path in workdir.iterdir() if path.name != ".lock"}
    assert files == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "ranks.npz",
        "result.json",
        "result.md",
    }
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "config.json").read_text())["variant"] == variant
    epochs = 1 if variant.startswith(("ease", "popularity")) else 2
    rows = rows_in(workdir)
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    assert result["epochs"] == epochs and 1 <= result["best_epoch"] <= epochs
    assert result["valid"] == rows[result["best_epoch"] - 1]["valid"]
    with np.load(workdir / "ranks.npz") as ranks:
        assert len(ranks.files) == 16
        trained = np.bincount(data.target.indices, minlength=data.target.num_items) > 0
        for split in ("test", "valid"):
            held_out = getattr(data, split)
            of_warm = held_out.mask & trained[held_out.candidates]
            kept = trained[held_out.items] & of_warm.any(1)
            for part, users, candidates in (
                (split, held_out.users, held_out.mask.sum(1)),
                (f"{split}_warm", held_out.users[kept], of_warm.sum(1)[kept]),
            ):
                np.testing.assert_array_equal(ranks[f"{part}_users"], users)
                np.testing.assert_array_equal(ranks[f"{part}_candidates"], candidates)
                counts = [ranks[f"{part}_{name}"] for name in ("above", "tied", "candidates")]
                assert metrics.summarize(*counts, k=(10, 5, 20)) == result[part]
                label, found = part.replace("_", ", "), result[part]
                shown = f"| {label} | {found['users']} | {found['hit_ratio@10']:.4f} |"
                assert shown in (workdir / "result.md").read_text()


def test_ranks_of_popularity_are_those_of_counting(data, tmp_path):
    fit(tiny("popularity"), tmp_path / "run", dataset=data)
    counts = np.bincount(data.target.indices, minlength=data.target.num_items)
    with np.load(tmp_path / "run" / "ranks.npz") as ranks:
        for split in ("test", "valid"):
            held_out = getattr(data, split)
            own, others = counts[held_out.items][:, None], counts[held_out.candidates]
            above, tied = ((x & held_out.mask).sum(1) for x in (others > own, others == own))
            assert above.any() and tied.any()
            np.testing.assert_array_equal(ranks[f"{split}_above"], above)
            np.testing.assert_array_equal(ranks[f"{split}_tied"], tied)


@pytest.mark.parametrize("variant", ["ease_joined", "popularity"])
def test_finished_closed_form_called_again_gives_the_same_result(data, tmp_path, variant):
    result = fit(tiny(variant), tmp_path / "run", dataset=data)
    rows = rows_in(tmp_path / "run")
    # There is no second epoch to do, however many are asked for.
    again = fit(tiny(variant, epochs=9), tmp_path / "run", dataset=data)
    assert result["epochs"] == again["epochs"] == len(rows) == 1
    assert again.pop("config") == result.pop("config") | {"epochs": 9}
    assert without_seconds(again) == without_seconds(result)
    assert rows_in(tmp_path / "run") == rows


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run of iALS over four sweeps: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("ials") / "whole"
    return workdir, fit(tiny("ials_joined", epochs=4), workdir, dataset=data)


@pytest.mark.slow
def test_interrupted_ials_resumes_to_the_uninterrupted_run(whole, data, tmp_path):
    workdir, result = whole
    first = fit(tiny("ials_joined", epochs=2), tmp_path / "parts", dataset=data)
    assert first["epochs"] == 2
    parts = fit(tiny("ials_joined", epochs=4), tmp_path / "parts", dataset=data)
    assert without_seconds(parts) == without_seconds(result)
    rows = rows_in(workdir)
    assert rows == rows_in(tmp_path / "parts") and len(rows) == 4
    assert rows[3]["valid"] != rows[1]["valid"]  # the second half changes something
    with np.load(workdir / "ranks.npz") as one, np.load(tmp_path / "parts" / "ranks.npz") as other:
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])


def test_epochs_of_train_are_those_of_the_run(whole, data):
    workdir, result = whole
    experiment = make_experiment(tiny("ials_joined", epochs=4), data)
    epochs = list(loop.train(experiment, initial_state(experiment)))
    values = [epoch.row["valid"] for epoch in epochs]
    assert values == [row["valid"] for row in rows_in(workdir)]
    assert [epoch.progress.epoch for epoch in epochs] == [1, 2, 3, 4]
    best = int(np.argmax([value["ndcg@10"] for value in values]))
    assert epochs[-1].progress.best_epoch == result["best_epoch"] == best + 1
    assert epochs[best].better and result["valid"] == values[best]


@pytest.mark.slow
def test_group_lasso_run_empties_whole_rows_of_the_cross_connections(data):
    experiment = make_experiment(tiny("group_lasso", l1=1e-4), data)
    *_, last = loop.train(experiment, initial_state(experiment))
    crosses = [part for name, part in last.params.dense.items() if name.startswith("H_")]
    assert len(crosses) == 2
    for part in crosses:
        kept = np.asarray(part["H"]["kernel"]) != 0  # a row: from one activation to all of the next
        rows = kept.any(1)
        np.testing.assert_array_equal(kept, np.broadcast_to(rows[:, None], kept.shape))
        assert rows.any() and not rows.all()


def test_ease_of_too_many_items_is_refused_before_it_runs(data, tmp_path):
    with pytest.raises(InputError, match=r"130 items: more than config\.max_items=100"):
        fit(tiny("ease", max_items=100), tmp_path / "run", dataset=data)


def started(config, data):
    """The parameters before the first step."""
    experiment = make_experiment(config, data)
    return experiment.params(initial_state(experiment))


@pytest.mark.parametrize("variant", ["recipe", "recipe_mlp", "recipe_joint_mlp"])
def test_recipe_starts_from_the_factorisation_of_its_domains(data, variant):
    config = tiny(variant, folds=0, ials_regularization=1.0, ials_alpha=10.0)
    params = started(config, data)
    experiment = make_experiment(config, data)
    joined = variant != "recipe_mlp"
    options = ials.Options((8,), joined, 1.0, 10.0, 0.2)
    tables = ials.fit(experiment.interactions, experiment.sizes, options, sweeps=2)
    assert ("source_item" in params.tables) == (variant == "recipe")
    for name in params.tables.keys() & {"target_item", "source_item"}:  # the last is a count
        np.testing.assert_allclose(params.tables[name][:, :-1], tables[name], rtol=1e-6)
    init = jax.jit(experiment.model.init, static_argnums=1)
    drawn = init(jax.random.fold_in(experiment.key, 0), experiment.sizes)
    jax.tree.map(np.testing.assert_array_equal, params.dense, drawn.dense)


@pytest.mark.slow
def test_pretraining_changes_the_users_alone_by_the_source_alone(data):
    config = tiny("pretrain")
    warm, cold = started(config, data), started(tiny("pretrain", pretrain_epochs=0), data)
    assert (warm.tables["user"] != cold.tables["user"]).all()
    np.testing.assert_array_equal(warm.tables["target_item"], cold.tables["target_item"])
    jax.tree.map(np.testing.assert_array_equal, warm.dense, cold.dense)

    target, source = data.target, data.source
    moved = {  # the same numbers of interactions, of the items in the other order
        "target": (target._replace(indices=_mirrored(target)), source),
        "source": (target, source._replace(indices=_mirrored(source))),
    }
    for domain, (other_target, other_source) in moved.items():
        other = started(config, data._replace(target=other_target, source=other_source))
        same = (other.tables["user"] == warm.tables["user"]).all()
        assert same == (domain == "target")


def _mirrored(interactions):
    """Item i becomes the last but i, in increasing order within a user."""
    parts = np.split(interactions.num_items - 1 - interactions.indices, interactions.indptr[1:-1])
    return np.concatenate([np.sort(part) for part in parts])
