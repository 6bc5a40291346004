"""Models against the paper's equations, written out in NumPy float64 with the paper's layout.

Gradients of the transcription are by complex steps, f'(x) = Im f(x + ih) / h: a finite difference
without cancellation, so that they too are good to 1e-10.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import losses
from conet_jax.models import conet, mlp, towers
from conet_jax.models.base import Batch, Examples, Hyper, Params, Profile, Sizes
from conet_jax.train import sampling
from conet_jax.train.interactions import to_device

LAYERS = (8, 6, 4, 3)
SIZES = Sizes(users=5, target_items=6, source_items=7)
EXAMPLES = 9
ALPHA = 0.7
CASES = {
    "no_cross": dict(cross_layers=0),
    "one_layer": dict(cross_layers=1),
    "two_layers": dict(cross_layers=2),
    "all_layers": dict(),
    "per_direction": dict(cross_per_direction=True),
    "low_rank": dict(cross_rank=2),
    "low_rank_per_direction": dict(cross_rank=2, cross_per_direction=True, cross_layers=2),
    "inner_product": dict(inner_product=True),
    "random": dict(pairing="random", inner_product=True),
    "profile": dict(pairing="profile"),
    "profile_all_options": dict(
        pairing="profile",
        inner_product=True,
        cross_rank=1,
        cross_per_direction=True,
    ),
}


# Nearly all of the time here is compilation.
pytestmark = pytest.mark.usefixtures("quick_compilation")


# Eqs. 1-5, 7, 8, for one example at a time; every matrix as in the paper, acting on columns.


def rectifier(x):
    return np.where(x.real > 0, x, 0)


def weights_of(tower):
    """W^1 …, b^1 …, h, its bias and the inner-product weights of a tower."""
    levels = [tower[f"layer_{i + 1}"] for i in range(len(LAYERS) - 1)]
    return (
        [level["kernel"].T for level in levels],
        [level["bias"] for level in levels],
        tower["output"]["kernel"][:, 0],
        tower["output"]["bias"][0],
        tower.get("inner"),
    )


def cross_of(dense, level):
    """H^l of (news to app, app to news), r x p; None above the crossed layers."""
    layer = dense["cross"].get(f"layer_{level + 1}")
    if layer is None:
        return None, None
    full = {
        name: part["h"].T if "h" in part else part["u"].T @ part["v"]
        for name, part in layer.items()
    }
    return (full["both"],) * 2 if "both" in full else (full["to_target"], full["to_source"])


def pair_logits(dense, app, news, gate):
    """Eqs. 1, 3a, 3b: logits of a pair of merged embeddings (columns), each [user, item]."""
    w_app, b_app, h_app, c_app, _ = weights_of(dense["target"])
    w_news, b_news, h_news, c_news, _ = weights_of(dense["source"])
    inner = []
    for domain, a in (("target", app), ("source", news)):
        d = len(a) // 2
        v = dense[domain].get("inner")
        inner.append(0.0 if v is None else sum(v[k] * a[k] * a[d + k] for k in range(d)))
    for level in range(len(LAYERS) - 1):
        o_app = w_app[level] @ app + b_app[level]
        o_news = w_news[level] @ news + b_news[level]
        to_app, to_news = cross_of(dense, level)
        if to_app is not None:
            o_app, o_news = o_app + gate * (to_app @ news), o_news + gate * (to_news @ app)
        app, news = rectifier(o_app), rectifier(o_news)
    return h_app @ app + c_app + inner[0], h_news @ news + c_news + inner[1]


def mean_embedding(table, items, mask):
    rows = [table[i] for i, m in zip(items, mask, strict=True) if m]
    return sum(rows) / len(rows) if rows else 0 * table[0]


def logits_of(params, batch, pairing):
    """Logits of a batch, example by example."""
    p, q_app, q_news = (params.tables[n] for n in ("user", "target_item", "source_item"))
    app, news = [], []
    for n in range(EXAMPLES):
        u, i = batch.target.users[n], batch.target.items[n]
        v, j = batch.source.users[n], batch.source.items[n]
        own = np.concatenate([p[u], q_app[i]]), np.concatenate([p[v], q_news[j]])
        if pairing != "profile":
            logits = pair_logits(params.dense, *own, batch.cross)
        else:
            seen = mean_embedding(
                q_news, batch.source_profile.items[n], batch.source_profile.mask[n]
            )
            read = mean_embedding(
                q_app, batch.target_profile.items[n], batch.target_profile.mask[n]
            )
            logits = (
                pair_logits(params.dense, own[0], np.concatenate([p[u], seen]), batch.cross)[0],
                pair_logits(params.dense, np.concatenate([p[v], read]), own[1], batch.cross)[1],
            )
        app.append(logits[0])
        news.append(logits[1])
    return np.array(app), np.array(news)


def cross_entropies(logits, labels):
    """Eq. 5, example by example."""
    r_hat, rest = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits))  # 1 - r_hat would cancel
    return -(labels * np.log(r_hat) + (1 - labels) * np.log(rest))


def joint(params, batch, pairing, alpha=ALPHA):
    """Eq. 7 of the mean losses, and the domains' summed losses."""
    sums = [
        sum(w * x for w, x in zip(e.weights, cross_entropies(z, e.labels), strict=True))
        for e, z in zip(
            (batch.target, batch.source), logits_of(params, batch, pairing), strict=True
        )
    ]
    counts = batch.target.weights.sum(), batch.source.weights.sum()
    return alpha * sums[0] / counts[0] + (1 - alpha) * sums[1] / counts[1], sums


def complex_step_gradient(f, params):
    leaves, tree = jax.tree.flatten(params)
    gradients = []
    for k, leaf in enumerate(leaves):
        gradient = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            moved = leaf.astype(complex)
            moved[index] += 1e-30j
            value = f(jax.tree.unflatten(tree, [*leaves[:k], moved, *leaves[k + 1 :]]))
            gradient[index] = value.imag / 1e-30
        gradients.append(gradient)
    return jax.tree.unflatten(tree, gradients)


def options_of(case):
    return conet.Options(layers=LAYERS, **CASES[case])


def random_params(build, seed=0):
    """Parameters of a model's structure, float64, large enough for every term to matter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: build.init(jax.random.key(0), SIZES))
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.7, shapes)


def random_batch(pairing, seed=1, cross=1.0):
    rng = np.random.default_rng(seed)

    def examples(num_items):
        labels = (np.arange(EXAMPLES) % 2).astype(float)
        weights = np.ones(EXAMPLES)
        weights[rng.choice(EXAMPLES, 3, replace=False)] = 0
        users = rng.integers(0, SIZES.users, EXAMPLES)
        return Examples(
            users, rng.integers(0, num_items, EXAMPLES), rng.permutation(labels), weights
        )

    def profile(num_items):
        mask = (np.arange(4)[None, :] < rng.integers(0, 5, EXAMPLES)[:, None]).astype(float)
        mask[0], mask[1] = 0, 1  # an empty one and a full one
        return Profile(rng.integers(0, num_items, (EXAMPLES, 4)), mask)

    target, source = examples(SIZES.target_items), examples(SIZES.source_items)
    profiles = None, None
    if pairing == "same_user":
        source = source._replace(users=target.users)
    if pairing == "profile":
        profiles = profile(SIZES.source_items), profile(SIZES.target_items)
    return Batch(target, source, *profiles, np.asarray(cross), jax.random.key(0))


def on_device(tree):
    """Arrays in JAX's default float type, int32 ids."""

    def move(x):
        if isinstance(x, jax.Array):  # the key
            return x
        x = np.asarray(x)
        return jnp.asarray(x, float if x.dtype.kind == "f" else jnp.int32)

    return jax.tree.map(move, tree)


def hyper(alpha=ALPHA, dropout=0.0):
    return Hyper(*map(jnp.asarray, (1e-3, alpha, 0.0, dropout)))


def value_and_gradient(model, params, batch, **values):
    """(loss, sums), gradient with respect to dense parameters and whole tables."""

    def f(params):
        rows = {name: params.tables[name][ids] for name, ids in model.lookups(batch).items()}
        return model.loss(params.dense, rows, batch, hyper(**values))

    return jax.value_and_grad(f, has_aux=True)(params)


def assert_trees_close(actual, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance
        ),
        actual,
        expected,
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_are_those_of_the_equations(case):
    options = options_of(case)
    model = conet.build(options)
    params, batch = random_params(model), random_batch(options.pairing)
    value, sums = joint(params, batch, options.pairing)
    gradient = complex_step_gradient(lambda p: joint(p, batch, options.pairing)[0], params)
    logits = logits_of(params, batch, options.pairing)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient))  # all parts matter
    for x64, tolerance in ((True, 1e-10), (False, 1e-5)):
        with jax.enable_x64(x64):
            p, b = on_device(params), on_device(batch)
            (ours, aux), ours_gradient = value_and_gradient(model, p, b)
            assert ours.dtype == (np.float64 if x64 else np.float32)
            np.testing.assert_allclose(ours, value, rtol=tolerance)
            assert_trees_close(
                (aux["target_loss"], aux["source_loss"]), tuple(sums), tolerance * 10
            )
            assert aux["target_count"] == aux["source_count"] == EXAMPLES - 3
            assert_trees_close(ours_gradient, gradient, tolerance)
            rows = {name: p.tables[name][ids] for name, ids in model.lookups(b).items()}
            ours_logits = conet.batch_logits(p.dense, rows, b, options, None)
            assert_trees_close(ours_logits, logits, tolerance)


@pytest.mark.parametrize("pairing", ("random", "same_user", "profile"))
def test_nothing_crosses_where_the_gate_is_shut(pairing):
    model = conet.build(conet.Options(layers=LAYERS, pairing=pairing))
    params, batch = random_params(model), random_batch(pairing, cross=0.0)
    other = jax.tree.map(lambda h: h + 1.0, params.dense["cross"])
    value, _ = joint(params, batch, pairing)
    with jax.enable_x64(True):
        for dense in (params.dense, params.dense | {"cross": other}):
            p, b = on_device(params._replace(dense=dense)), on_device(batch)
            (ours, _), gradient = value_and_gradient(model, p, b)
            np.testing.assert_allclose(ours, value, rtol=1e-12)
            assert all(not g.any() for g in jax.tree.leaves(gradient.dense["cross"]))


def test_cross_off_is_two_mlps_that_share_users():
    cross_off = conet.build(conet.Options(layers=LAYERS, cross_layers=0, pairing="random"))
    single = mlp.build(mlp.Options(layers=LAYERS))
    params, batch = random_params(cross_off), random_batch("random")
    with jax.enable_x64(True):
        params, batch = on_device(params), on_device(batch)
        (value, aux), gradient = value_and_gradient(cross_off, params, batch)
        values, gradients = {}, {}
        for domain in ("target", "source"):
            own = Params(
                {"user": params.tables["user"], "target_item": params.tables[f"{domain}_item"]},
                {"target": params.dense[domain]},
            )
            examples = batch._replace(target=getattr(batch, domain), source=None)
            (values[domain], own_aux), gradients[domain] = value_and_gradient(single, own, examples)
            assert_trees_close(aux[f"{domain}_loss"], own_aux["target_loss"], 1e-12)
        expected = ALPHA * values["target"] + (1 - ALPHA) * values["source"]
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        users = {d: g.tables["user"] for d, g in gradients.items()}
        shared = ALPHA * users["target"] + (1 - ALPHA) * users["source"]
        assert_trees_close(gradient.tables["user"], shared, 1e-12)
        for domain, share in (("target", ALPHA), ("source", 1 - ALPHA)):
            own = jax.tree.map(lambda g, share=share: share * g, gradients[domain])
            assert_trees_close(gradient.dense[domain], own.dense["target"], 1e-12)
            assert_trees_close(gradient.tables[f"{domain}_item"], own.tables["target_item"], 1e-12)


def test_target_weight_one_with_cross_off_is_the_mlp():
    cross_off = conet.build(conet.Options(layers=LAYERS, cross_layers=0, inner_product=True))
    single = mlp.build(mlp.Options(layers=LAYERS, inner_product=True))
    params, batch = random_params(cross_off), random_batch("same_user")
    with jax.enable_x64(True):
        params, batch = on_device(params), on_device(batch)
        (value, aux), gradient = value_and_gradient(cross_off, params, batch, alpha=1.0)
        tables = {name: params.tables[name] for name in ("user", "target_item")}
        own = Params(tables, {"target": params.dense["target"]})
        (expected, own_aux), own_gradient = value_and_gradient(single, own, batch)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        assert_trees_close({name: aux[name] for name in own_aux}, own_aux, 1e-14)
        assert_trees_close(gradient.dense["target"], own_gradient.dense["target"], 1e-14)
        for name in tables:
            assert_trees_close(gradient.tables[name], own_gradient.tables[name], 1e-14)
        rest = gradient.dense["source"], gradient.tables["source_item"]
        assert all(not g.any() for g in jax.tree.leaves(rest))


# Users 0 to 4; user 2 has nothing in the source.
SOURCE_ITEMS = [[0, 3, 6], [1], [], [2, 3, 4, 5], [0, 1]]


def source_interactions():
    indptr = np.cumsum([0] + [len(items) for items in SOURCE_ITEMS])
    return to_device(indptr, np.concatenate(SOURCE_ITEMS), SIZES.source_items)


@pytest.mark.parametrize("inner", [{}, dict(inner_product=True)])
@pytest.mark.parametrize("inference", ["target", "cross"])
@pytest.mark.parametrize("cross_layers", [0, 3])
def test_scores_are_the_forward_pass_of_the_loss(inference, cross_layers, inner):
    model = conet.build(
        conet.Options(
            layers=LAYERS,
            cross_layers=cross_layers,
            cross_per_direction=True,
            inference=inference,
            **inner,
        )
    )
    params = random_params(model)
    users = np.arange(SIZES.users)
    items = np.stack([np.random.default_rng(u).permutation(SIZES.target_items) for u in users])
    expected = np.zeros(items.shape)
    for u in users:
        seen = mean_embedding(
            params.tables["source_item"], SOURCE_ITEMS[u], [True] * len(SOURCE_ITEMS[u])
        )
        news = np.concatenate([params.tables["user"][u], seen])
        for c, i in enumerate(items[u]):
            app = np.concatenate([params.tables["user"][u], params.tables["target_item"][i]])
            gate = float(inference == "cross")
            expected[u, c] = pair_logits(params.dense, app, news, gate)[0]
    with jax.enable_x64(True):
        projected = model.project(on_device(params), {"source": source_interactions()})
        scores = model.scores(projected, jnp.asarray(users), jnp.asarray(items))
        np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-10)


def test_scores_under_cross_are_the_training_logits_of_the_profile_pairing():
    """The profile of training, as ``sampling`` makes it, is the profile of inference."""
    options = conet.Options(layers=LAYERS, pairing="profile", inference="cross")
    model = conet.build(options)
    source = source_interactions()
    target = to_device(np.array([0, 2, 4, 5, 7, 8]), np.array([0, 1, 2, 3, 4, 1, 5, 0]), 6)
    interactions = {"target": target, "source": source}
    plan = sampling.plan_epoch(
        interactions, domains=model.domains, pairing="profile", batch_size=12
    )
    with jax.enable_x64(True):
        params = on_device(random_params(model))
        sample = jax.jit(lambda key: sampling.sample_step(key, 0, 0, interactions, plan))
        batch = sample(jax.random.key(0))
        assert set(np.asarray(batch.target.users)) == set(range(5))
        rows = {name: params.tables[name][ids] for name, ids in model.lookups(batch).items()}
        trained, _ = conet.batch_logits(params.dense, rows, batch, options, None)
        projected = model.project(params, interactions)
        scores = model.scores(projected, batch.target.users, batch.target.items[:, None])
        np.testing.assert_allclose(scores[:, 0], trained, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [{}, dict(inner_product=True)])
def test_mlp_scores_and_loss_are_those_of_the_equations(inner):
    model = mlp.build(mlp.Options(layers=LAYERS, **inner))
    params, batch = random_params(model), random_batch("same_user")._replace(source=None)
    two = {"target": params.dense["target"], "source": params.dense["target"], "cross": {}}

    def logit(u, i):
        app = np.concatenate([params.tables["user"][u], params.tables["target_item"][i]])
        return pair_logits(two, app, app, 0.0)[0]

    target = batch.target
    logits = np.array([logit(*pair) for pair in zip(target.users, target.items, strict=True)])
    total = (target.weights * cross_entropies(logits, target.labels)).sum()
    with jax.enable_x64(True):
        p, b = on_device(params), on_device(batch)
        (value, aux), _ = value_and_gradient(model, p, b)
        np.testing.assert_allclose(value, total / target.weights.sum(), rtol=1e-12)
        np.testing.assert_allclose(aux["target_loss"], total, rtol=1e-12)
        items = jnp.arange(SIZES.target_items)[None, :].repeat(SIZES.users, axis=0)
        scores = model.scores(model.project(p, {}), jnp.arange(SIZES.users), items)
        expected = [[logit(u, i) for i in range(SIZES.target_items)] for u in range(SIZES.users)]
        np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["no_cross", "two_layers", "per_direction", "low_rank"])
def test_l1_mask_marks_exactly_the_cross_matrices(case):
    model = conet.build(options_of(case))
    params = random_params(model)
    mask = model.l1_mask(params.dense)
    jax.tree.map(lambda m, x: None, mask, params.dense)  # the same structure
    assert jax.tree.leaves(mask["cross"]) == [True] * len(jax.tree.leaves(params.dense["cross"]))
    assert not any(jax.tree.leaves([mask["target"], mask["source"]]))
    if case == "no_cross":
        assert not any(jax.tree.leaves(mask))
        return
    # Eq. 8 over what is marked; with a full H that is the sum over all entries of the H^l.
    marked = jax.tree.map(lambda m, x: np.abs(x).sum() if m else 0.0, mask, params.dense)
    with jax.enable_x64(True):
        penalty = losses.l1_penalty(on_device(params.dense["cross"]), weight=0.3)
        np.testing.assert_allclose(penalty, 0.3 * sum(jax.tree.leaves(marked)), rtol=1e-12)
    if case == "two_layers":
        entries = sum(abs(h) for level in (0, 1) for h in cross_of(params.dense, level)[0].flat)
        np.testing.assert_allclose(penalty, 0.3 * entries, rtol=1e-12)


def test_mlp_has_nothing_under_the_lasso():
    model = mlp.build(mlp.Options(layers=LAYERS))
    assert not any(jax.tree.leaves(model.l1_mask(random_params(model).dense)))


def assert_std(x, std):
    """Within 5 standard errors, of mean and of standard deviation."""
    x = np.asarray(x, np.float64)
    assert abs(x.mean()) < 5 * std / np.sqrt(x.size)
    assert abs(x.std() / std - 1) < 5 / np.sqrt(2 * x.size)


@pytest.mark.parametrize(("initializer", "cross_rank"), [("he", 3), ("gaussian", 0)])
def test_initialisers_have_the_stated_standard_deviation(initializer, cross_rank):
    layers = (256, 128, 64)
    options = conet.Options(
        layers=layers, cross_layers=2, initializer=initializer, cross_rank=cross_rank
    )
    params = jax.jit(lambda key: conet.init(key, Sizes(100, 110, 120), options))(jax.random.key(3))
    assert {n: t.shape for n, t in params.tables.items()} == {
        "user": (100, 128),
        "target_item": (110, 128),
        "source_item": (120, 128),
    }
    for table in params.tables.values():
        assert_std(table, 0.01)
    for level, (fan_in, fan_out) in enumerate(zip(layers[:-1], layers[1:], strict=True)):
        for domain in ("target", "source"):
            layer = params.dense[domain][f"layer_{level + 1}"]
            assert layer["kernel"].shape == (fan_in, fan_out)
            assert_std(layer["kernel"], np.sqrt(2 / fan_in) if initializer == "he" else 0.01)
            if initializer == "he":
                assert not layer["bias"].any()
            else:
                assert_std(layer["bias"], 0.01)
        h = np.asarray(conet.cross_matrices(params.dense, level)[0])
        assert h.shape == (fan_in, fan_out)
        if cross_rank:  # entries that share a row of U or V are dependent
            assert abs(h.std() / 0.01 - 1) < 0.25
            assert np.linalg.matrix_rank(h) == cross_rank
        else:
            assert_std(h, 0.01)
    output = [params.dense[domain]["output"]["kernel"] for domain in ("target", "source")]
    assert_std(np.stack(output), 64**-0.5 if initializer == "he" else 0.01)


def test_no_two_parameters_start_alike():
    model = conet.build(conet.Options(layers=LAYERS, initializer="gaussian"))
    params = jax.jit(lambda key: model.init(key, SIZES))(jax.random.key(0))
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    assert len(np.unique(values)) > 0.999 * len(values)


@pytest.mark.parametrize("case", ["all_layers", "profile_all_options", "random"])
@pytest.mark.parametrize("zeros", ["parameters", "weights"])
def test_gradients_at_zeros_are_finite(case, zeros):
    options = options_of(case)
    model = conet.build(options)
    params, batch = random_params(model), random_batch(options.pairing)
    if zeros == "parameters":
        params = jax.tree.map(np.zeros_like, params)
    else:
        none = np.zeros(EXAMPLES)
        batch = batch._replace(
            target=batch.target._replace(weights=none), source=batch.source._replace(weights=none)
        )
    (value, _), gradient = value_and_gradient(model, on_device(params), on_device(batch))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    if zeros == "parameters":
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    else:
        assert value == 0 and all(not g.any() for g in jax.tree.leaves(gradient))


def test_dropout_is_off_at_rate_zero_and_keeps_the_mean():
    on = conet.build(conet.Options(layers=LAYERS, dropout=True))
    off = conet.build(conet.Options(layers=LAYERS))
    params, batch = on_device(random_params(on)), on_device(random_batch("same_user"))
    (kept, _), _ = value_and_gradient(on, params, batch)
    (plain, _), _ = value_and_gradient(off, params, batch)
    (dropped, _), _ = value_and_gradient(on, params, batch, dropout=0.5)
    np.testing.assert_allclose(kept, plain, rtol=1e-6)
    assert abs(dropped - plain) > 1e-3
    x = np.asarray(towers.dropout(jax.random.key(0), jnp.ones(40_000), 0.25))
    assert set(np.unique(x.round(5))) == {0.0, np.float32(1 / 0.75).round(5)}
    assert abs(x.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / len(x))


@pytest.mark.parametrize("per_direction", [False, True])
def test_diagnostics_are_what_the_cross_connections_carry(per_direction):
    options = conet.Options(layers=LAYERS, cross_per_direction=per_direction, pairing="random")
    model = conet.build(options)
    params, batch = random_params(model), random_batch("random")
    name = "to_target" if per_direction else "both"
    params.dense["cross"]["layer_1"][name]["h"][:2, :3] = 0.0
    (w_app, b_app, *_), (w_news, b_news, *_) = (
        weights_of(params.dense[domain]) for domain in ("target", "source")
    )
    app = np.c_[
        params.tables["user"][batch.target.users], params.tables["target_item"][batch.target.items]
    ].T
    news = np.c_[
        params.tables["user"][batch.source.users], params.tables["source_item"][batch.source.items]
    ].T
    expected = {}
    for level in range(3):
        to_app, to_news = cross_of(params.dense, level)
        for direction, h in (("/to_target", to_app), ("/to_source", to_news)):
            suffix = f"layer_{level + 1}" + (direction if per_direction else "")
            expected[f"h_mean_abs/{suffix}"] = np.abs(h).mean()
            expected[f"h_zeros/{suffix}"] = (h == 0).mean()
        for domain, h, w, own, other in (
            ("target", to_app, w_app, app, news),
            ("source", to_news, w_news, news, app),
        ):
            ratio = np.sqrt(((h @ other) ** 2).sum() / ((w[level] @ own) ** 2).sum())
            expected[f"cross_ratio/{domain}/layer_{level + 1}"] = ratio
        app, news = (
            rectifier(w_app[level] @ app + b_app[level][:, None] + to_app @ news),
            rectifier(w_news[level] @ news + b_news[level][:, None] + to_news @ app),
        )
    for domain, logits in zip(
        ("target", "source"), logits_of(params, batch, "random"), strict=True
    ):
        counted = logits[getattr(batch, domain).weights > 0]
        expected[f"logit_spread/{domain}"] = counted.max() - counted.min()
    with jax.enable_x64(True):
        params, batch = on_device(params), on_device(batch)
        rows = {name: params.tables[name][ids] for name, ids in model.lookups(batch).items()}
        found = model.diagnostics(params.dense, rows, batch)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-10, err_msg=key)
