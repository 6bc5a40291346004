"""Models against the paper's equations, written out in NumPy float64 with the paper's layout.

Gradients of the transcription are by complex steps, f'(x) = Im f(x + ih) / h: a finite difference
without cancellation, so that they too are good to 1e-10.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import losses, models
from conet_jax.config import default_config
from conet_jax.models import conet, mlp, neighbours, towers, two_towers
from conet_jax.models.base import Batch, Examples, Hyper, Params, Sizes, facing, one_domain
from conet_jax.train.interactions import to_device
from conet_jax.train.step import joint_objective
from conet_jax.variants import VARIANTS

LAYERS = (8, 6, 4, 3)
SIZES = Sizes(users=5, target_items=6, source_items=7)
EXAMPLES = 9
ALPHA, L2 = 0.7, 0.2
UNEQUAL = (8, 5, 7, 4)
CASES = {
    "no_cross": dict(cross_layers=0),
    "one_layer": dict(cross_layers=1),
    "two_layers": dict(cross_layers=2),
    "all_layers": dict(),
    "per_direction": dict(cross_per_direction=True),
    "low_rank": dict(cross_rank=2),
    "low_rank_per_direction": dict(cross_rank=2, cross_per_direction=True, cross_layers=2),
    "random": dict(pairing="random"),
    "skip": dict(cross_skip=1),
    "skip_all": dict(cross_skip=9, cross_per_direction=True, pairing="random"),
    "unequal": dict(source_layers=UNEQUAL),
    "unequal_two_layers": dict(source_layers=UNEQUAL, cross_layers=2, pairing="random"),
    "unequal_skip_low_rank": dict(source_layers=UNEQUAL, cross_skip=1, cross_rank=2),
}


# Eqs. 1-5, 7, 8, for one example at a time; every matrix as in the paper, acting on columns.


def rectifier(x):
    return np.where(x.real > 0, x, 0)


def weights_of(tower):
    """W^1 …, b^1 …, h and its bias of a tower."""
    levels = [tower[f"W_{i}"] for i in range(len(tower) - 1)]
    return (
        [level["kernel"].T for level in levels],
        [level["bias"] for level in levels],
        tower["h"]["kernel"][:, 0],
        tower["h"]["bias"][0],
    )


def matrix_of(connection):
    """H of r x p, or U^T V (footnote 3)."""
    if "H" in connection:
        return connection["H"]["kernel"].T
    return connection["U"]["kernel"].T @ connection["V"]["kernel"].T


def cross_of(dense, to, level):
    """The H to a tower's layer, by the layers that they skip: one serves both ways, or not."""
    found = []
    for skipped in range(level + 1):
        shared, own = (f"{name}_{level}_{skipped}" for name in ("H", f"H_to_{to}"))
        assert not (shared in dense and own in dense)
        if shared in dense or own in dense:
            found.append(matrix_of(dense[shared if shared in dense else own]))
    return found


def pair_logits(dense, app, news, gate):
    """Eqs. 1, 3a, 3b: logits of a pair of merged embeddings (columns), each [user, item]."""
    w_app, b_app, h_app, c_app = weights_of(dense["target"])
    w_news, b_news, h_news, c_news = weights_of(dense["source"])
    apps, newses = [app], [news]  # a^0, a^1, … of each tower
    for level in range(len(w_app)):
        o_app = w_app[level] @ apps[level] + b_app[level]
        o_news = w_news[level] @ newses[level] + b_news[level]
        for skipped, h in enumerate(cross_of(dense, "target", level)):
            o_app = o_app + gate * (h @ newses[level - skipped])
        for skipped, h in enumerate(cross_of(dense, "source", level)):
            o_news = o_news + gate * (h @ apps[level - skipped])
        apps.append(rectifier(o_app))
        newses.append(rectifier(o_news))
    return h_app @ apps[-1] + c_app, h_news @ newses[-1] + c_news


def mean_embedding(table, items):
    return sum(table[i] for i in items) / len(items) if items else 0 * table[0]


def logits_of(params, batch):
    """Logits of a batch, example by example."""
    p, q_app, q_news = (params.tables[n] for n in ("user", "target_item", "source_item"))
    ids = (x for e in (batch.target, batch.source) for x in (e.users, e.items))
    pairs = [
        pair_logits(
            params.dense,
            np.concatenate([p[u], q_app[i]]),
            np.concatenate([p[v], q_news[j]]),
            batch.cross,
        )
        for u, i, v, j in zip(*ids, strict=True)
    ]
    return tuple(np.array(each) for each in zip(*pairs, strict=True))


def cross_entropies(logits, labels):
    """Eq. 5, example by example."""
    r_hat, rest = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits))  # 1 - r_hat would cancel
    return -(labels * np.log(r_hat) + (1 - labels) * np.log(rest))


def joint(params, batch, alpha=ALPHA, l2=L2):
    """Eq. 7 with footnote 11's penalty on the H, and the domains' losses (Eq. 5).

    The penalty stands against the mean loss per example: once for each of the longer domain.
    """
    sums = [
        sum(w * x for w, x in zip(e.weights, cross_entropies(z, e.labels), strict=True))
        for e, z in zip((batch.target, batch.source), logits_of(params, batch), strict=True)
    ]
    squares = sum(
        (leaf**2).sum()
        for name, part in params.dense.items()
        if name not in ("target", "source")
        for leaf in jax.tree.leaves(part)
    )
    examples = max(batch.target.weights.sum(), batch.source.weights.sum())
    penalty = batch.cross * examples * l2 / 2 * squares
    return alpha * sums[0] + (1 - alpha) * sums[1] + penalty, sums


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
    """Parameters of a model's structure, float64, large enough for every term to matter.

    Tables of ids, those of neighbours, are not drawn: they are of ``both_domains``.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: build.init(jax.random.key(0), SIZES))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.7, shapes)
    of = [d for d in ("target", "source") if f"{d}_neighbours" in params.tables]
    if not of:
        return params
    domains = ("target", "source")[: params.dense["v_target"].shape[0]]
    size = params.tables["user_items"].shape[1] // (2 * len(domains))
    near = neighbours.fit(both_domains(), SIZES, domains, size, of)
    near = {name: np.asarray(table, float) for name, table in near.items()}
    return params._replace(tables=params.tables | near)


def random_batch(pairing, seed=1, cross=1.0):
    """Examples of which three of the target and four of the source have no weight."""
    rng = np.random.default_rng(seed)

    def examples(num_items, without):
        labels = (np.arange(EXAMPLES) % 2).astype(float)
        weights = np.ones(EXAMPLES)
        weights[rng.choice(EXAMPLES, without, replace=False)] = 0
        users = rng.integers(0, SIZES.users, EXAMPLES)
        return Examples(
            users, rng.integers(0, num_items, EXAMPLES), rng.permutation(labels), weights
        )

    target, source = examples(SIZES.target_items, 3), examples(SIZES.source_items, 4)
    if pairing == "same_user":
        source = source._replace(users=target.users)
    return Batch(target, source, None, np.asarray(cross), jax.random.key(0))


def on_device(tree):
    """Arrays in JAX's default float type, int32 ids."""

    def move(x):
        if isinstance(x, jax.Array):  # the key
            return x
        x = np.asarray(x)
        return jnp.asarray(x, float if x.dtype.kind == "f" else jnp.int32)

    return jax.tree.map(move, tree)


def hyper(alpha=ALPHA, dropout=0.0, l2=0.0):
    return Hyper(*map(jnp.asarray, (1e-3, alpha, 0.0, dropout, l2)))


def rows_of(model, params, batch):
    return {name: params.tables[name][ids] for name, ids in model.lookups(batch).items()}


def value_and_gradient(model, params, batch, **values):
    """(loss, sums), gradient with respect to dense parameters and whole tables."""

    def f(params):
        rows = rows_of(model, params, batch)
        return joint_objective(model, params.dense, rows, batch, hyper(**values))

    return jax.value_and_grad(f, has_aux=True)(params)


def assert_trees_close(actual, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance
        ),
        actual,
        expected,
    )


def connections(dense):
    """What of dense parameters is not a tower's."""
    return {name: part for name, part in dense.items() if name not in ("target", "source")}


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_are_those_of_the_equations(case):
    options = options_of(case)
    model = conet.build(options)
    params, batch = random_params(model), random_batch(options.pairing)
    value, sums = joint(params, batch)
    gradient = complex_step_gradient(lambda p: joint(p, batch)[0], params)
    logits = dict(zip(("target", "source"), logits_of(params, batch), strict=True))
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient))  # all parts matter
    for x64, tolerance in ((True, 1e-10), (False, 1e-5)):
        with jax.enable_x64(x64):
            p, b = on_device(params), on_device(batch)
            (ours, aux), ours_gradient = value_and_gradient(model, p, b, l2=L2)
            assert ours.dtype == (np.float64 if x64 else np.float32)
            np.testing.assert_allclose(ours, value, rtol=tolerance)
            assert_trees_close(
                (aux["target_loss"], aux["source_loss"]), tuple(sums), tolerance * 10
            )
            assert (aux["target_count"], aux["source_count"]) == (EXAMPLES - 3, EXAMPLES - 4)
            assert_trees_close(ours_gradient, gradient, tolerance * 10)  # of a sum
            rows = rows_of(model, p, b)
            ours_logits = two_towers.batch_logits(p.dense, rows, b, None, options.module)
            assert_trees_close(ours_logits, logits, tolerance)


@pytest.mark.parametrize("case", ["random", "all_layers", "skip_all", "unequal"])
def test_nothing_crosses_where_the_gate_is_shut(case):
    options = options_of(case)
    model = conet.build(options)
    params, batch = random_params(model), random_batch(options.pairing, cross=0.0)
    other = jax.tree.map(lambda h: h + 1.0, connections(params.dense))
    value, _ = joint(params, batch)
    with jax.enable_x64(True):
        for dense in (params.dense, params.dense | other):
            p, b = on_device(params._replace(dense=dense)), on_device(batch)
            (ours, _), gradient = value_and_gradient(model, p, b, l2=L2)
            np.testing.assert_allclose(ours, value, rtol=1e-12)
            assert all(not g.any() for g in jax.tree.leaves(connections(gradient.dense)))


@pytest.mark.parametrize("crossed", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "case", ["two_layers", "all_layers", "per_direction", "low_rank", "unequal_two_layers"]
)
def test_one_product_is_equation_three_as_written(case, crossed):
    options = options_of(case)
    module, params = options.module, random_params(conet.build(options))
    rng, levels = np.random.default_rng(2), len(LAYERS) - 1

    def as_written(module, level, target, source):
        none = [None] * level
        return (
            module.target.W[level](target)
            + crossed * module.delta("target", level, [*none, source]),
            module.source.W[level](source)
            + crossed * module.delta("source", level, [*none, target]),
        )

    with jax.enable_x64(True):
        variables = {"params": on_device(params.dense)}
        for level in range(options.cross_layers):
            widths = LAYERS[level], (options.source_layers or LAYERS)[level]
            inputs = [jnp.asarray(rng.normal(size=(4, width))) for width in widths]
            one = module.apply(variables, level, *inputs, crossed, method=module.one_product)
            four = module.apply(variables, level, *inputs, method=as_written)
            assert_trees_close(one, four, 1e-12)
            layers = [[None] * level + [x] for x in inputs]
            taken = module.apply(variables, level, *layers, crossed, method=module.transition)
            assert_trees_close(taken, one, 0)  # the fused product is what the model takes
            for at, domain in enumerate(("target", "source")):
                tower = params.dense[domain][f"W_{level}"]
                (h,) = cross_of(params.dense, domain, level)
                own, other = np.asarray(inputs[at]), np.asarray(inputs[1 - at])
                expected = own @ tower["kernel"] + tower["bias"] + crossed * other @ h.T
                np.testing.assert_allclose(one[at], expected, rtol=1e-10, atol=1e-12)
        for level in range(options.cross_layers, levels):
            widths = LAYERS[level], (options.source_layers or LAYERS)[level]
            inputs = [jnp.asarray(rng.normal(size=(4, width))) for width in widths]
            layers = [[None] * level + [x] for x in inputs]
            alone = module.apply(variables, level, *layers, crossed, method=module.transition)
            for found, x, domain in zip(alone, inputs, ("target", "source"), strict=True):
                tower = params.dense[domain][f"W_{level}"]
                expected = np.asarray(x) @ tower["kernel"] + tower["bias"]
                np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


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
    cross_off = conet.build(conet.Options(layers=LAYERS, cross_layers=0))
    single = mlp.build(mlp.Options(layers=LAYERS))
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


def test_weights_and_penalties_of_a_model_enter_the_joint_objective_as_eq_7_says():
    """A model with both, written out: alpha sum w (loss + penalty) and the sums without them."""
    plain = conet.build(conet.Options(layers=LAYERS, pairing="random"))

    def weights(rows, batch):
        return {"target": batch.target.weights * (1 + rows["target_item"][:, 0] ** 2)}

    def penalties(dense, rows, batch, hyper):
        return {"source": hyper.l2 * (rows["source_item"] ** 2).sum(axis=1)}

    model = plain._replace(weights=weights, penalties=penalties, penalty=None)
    params, batch = random_params(model), random_batch("random")

    def objective(params):
        app, news = logits_of(params, batch)
        app = cross_entropies(app, batch.target.labels)
        news = cross_entropies(news, batch.source.labels)
        weight = batch.target.weights * (
            1 + params.tables["target_item"][batch.target.items, 0] ** 2
        )
        penalty = L2 * (params.tables["source_item"][batch.source.items] ** 2).sum(axis=1)
        own = (weight * app).sum(), (batch.source.weights * news).sum()
        penalised = (batch.source.weights * (news + penalty)).sum()
        return ALPHA * own[0] + (1 - ALPHA) * penalised, (*own, weight.sum())

    value, (target, source, count) = objective(params)
    gradient = complex_step_gradient(lambda p: objective(p)[0], params)
    with jax.enable_x64(True):
        (ours, aux), ours_gradient = value_and_gradient(
            model, on_device(params), on_device(batch), l2=L2
        )
        np.testing.assert_allclose(ours, value, rtol=1e-12)
        assert_trees_close(ours_gradient, gradient, 1e-10)
        found = [aux[name] for name in ("target_loss", "source_loss", "target_count")]
        np.testing.assert_allclose(found, (target, source, count), rtol=1e-12)
        assert aux["source_count"] == batch.source.weights.sum()


# Users 0 to 4; user 2 has nothing in the source, user 1 nothing in the target.
ITEMS = {
    "target": [[0, 2], [], [1, 2, 3], [4], [0, 3, 5]],
    "source": [[0, 3, 6], [1], [], [2, 3, 4, 5], [0, 1]],
}


def both_domains():
    return {
        domain: to_device(
            np.cumsum([0] + [len(items) for items in lists]),
            np.concatenate(lists).astype(int),
            getattr(SIZES, f"{domain}_items"),
        )
        for domain, lists in ITEMS.items()
    }


@pytest.mark.parametrize("domain", ["target", "source"])
@pytest.mark.parametrize("inference", ["target", "cross"])
@pytest.mark.parametrize(
    "case", ["no_cross", "two_layers", "per_direction", "low_rank", "skip", "unequal",
             "unequal_skip_low_rank"],
)  # fmt: skip
def test_scores_are_the_equations_with_the_mean_of_the_user_s_items_of_the_other_domain(
    case, inference, domain
):
    model = facing(conet.build(options_of(case)._replace(inference=inference)), domain)
    params = random_params(model)
    at, other = {"target": (0, "source"), "source": (1, "target")}[domain]
    users, num_items = np.arange(SIZES.users), getattr(SIZES, f"{domain}_items")
    items = np.stack([np.random.default_rng(u).permutation(num_items) for u in users])
    expected = np.zeros(items.shape)
    for u in users:
        seen = mean_embedding(params.tables[f"{other}_item"], ITEMS[other][u])
        beside = np.concatenate([params.tables["user"][u], seen])
        for c, i in enumerate(items[u]):
            own = np.concatenate([params.tables["user"][u], params.tables[f"{domain}_item"][i]])
            pair = (own, beside) if domain == "target" else (beside, own)
            gate = float(inference == "cross")
            expected[u, c] = pair_logits(params.dense, *pair, gate)[at]
    with jax.enable_x64(True):
        projected = model.project(on_device(params), both_domains())
        assert projected["item"].shape[0] == num_items
        scores = model.scores(projected, jnp.asarray(users), jnp.asarray(items))
        np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-10)


TOWERS = ("conet", "recipe", "recipe_mlp", "mlp", "cross_stitch")


def small_config(variant):
    config = default_config(variant)
    config.ials_trials = 0
    # Wider than LAYERS, so that some of the last layer is alive.
    config.layers = (8, 8, 8, 8) if config.model == "cross_stitch" else (8, 12, 10, 8)
    config.source_layers = (8, 9, 11, 7) if config.source_layers else ()
    config.folds = 3
    return config


def variants_of_towers():
    """A variant for each model that differs, with either inference where there are both."""
    found = {}
    for variant in VARIANTS:
        config = small_config(variant)
        if config.model in TOWERS:
            found.setdefault(models.build(config), variant)
            if config.model in ("conet", "cross_stitch"):
                config.inference = "cross" if config.inference == "target" else "target"
                found.setdefault(models.build(config), f"{variant}, inference {config.inference}")
    return {name: model for model, name in found.items()}


TOWER_VARIANTS = variants_of_towers()
KEY = jax.random.key(0)  # of dropout, at a rate of 0


@pytest.mark.parametrize("name", TOWER_VARIANTS)
def test_scores_are_the_logits_whose_losses_training_minimises(name):
    """Of every variant: the forward pass of ``losses``, on rows of all pairs, undone.

    Of a CoNet the source input is then the mean of the user's source items, or nothing crosses.
    """
    model = TOWER_VARIANTS[name]
    params = random_params(model)
    users, items = (x.ravel() for x in np.mgrid[: SIZES.users, : SIZES.target_items])
    ones = np.ones(users.shape)
    target = Examples(users, items, 0 * ones, ones)  # none is observed, as at inference
    source = target._replace(items=0 * items)
    batch = Batch(target, source, None, np.asarray(float(model.inference == "cross")), KEY)
    if len(model.domains) == 1:
        batch = batch._replace(source=None)
    with jax.enable_x64(True):
        p, b = on_device(params), on_device(batch)
        rows = rows_of(model, p, b)
        if model.domains == ("target", "source") and not model.start:
            means = np.stack(
                [mean_embedding(params.tables["source_item"], own) for own in ITEMS["source"]]
            )
            rows["source_item"] = jnp.asarray(means[users])
        each = np.asarray(model.losses(p.dense, rows, b, hyper())["target"])
        logits = np.log(np.expm1(each))  # the inverse of log(1 + exp(logit))
        projected = model.project(p, both_domains())
        listed = jnp.asarray(items.reshape(SIZES.users, -1))
        scores = model.scores(projected, jnp.arange(SIZES.users), listed)
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(np.ravel(scores), logits, rtol=1e-9, atol=1e-9)


def test_mlp_scores_and_loss_are_those_of_the_equations():
    model = mlp.build(mlp.Options(layers=LAYERS))
    params, batch = random_params(model), random_batch("same_user")._replace(source=None)
    two = {"target": params.dense["target"], "source": params.dense["target"]}

    def logit(u, i):
        app = np.concatenate([params.tables["user"][u], params.tables["target_item"][i]])
        return pair_logits(two, app, app, 0.0)[0]

    target = batch.target
    logits = np.array([logit(*pair) for pair in zip(target.users, target.items, strict=True)])
    total = (target.weights * cross_entropies(logits, target.labels)).sum()
    with jax.enable_x64(True):
        p, b = on_device(params), on_device(batch)
        (value, aux), _ = value_and_gradient(model, p, b)
        np.testing.assert_allclose(value, total, rtol=1e-12)
        np.testing.assert_allclose(aux["target_loss"], total, rtol=1e-12)
        items = jnp.arange(SIZES.target_items)[None, :].repeat(SIZES.users, axis=0)
        scores = model.scores(model.project(p, {}), jnp.arange(SIZES.users), items)
        expected = [[logit(u, i) for i in range(SIZES.target_items)] for u in range(SIZES.users)]
        np.testing.assert_allclose(scores, expected, rtol=1e-10, atol=1e-10)


class PairTower(nn.Module):
    """The MLP as a stranger would write it, for ``one_domain``."""

    @nn.compact
    def __call__(self, user, item):
        return towers.Tower(LAYERS, name="target")(towers.merge(user, item))


def test_a_model_of_a_module_has_the_losses_and_scores_of_the_mlp_s_fast_path():
    simple, fast = one_domain(PairTower(), LAYERS[0] // 2), mlp.build(mlp.Options(layers=LAYERS))
    params, batch = random_params(fast), random_batch("same_user")._replace(source=None)
    drawn = simple.init(jax.random.key(0), SIZES)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
    items = np.stack([np.random.default_rng(u).permutation(SIZES.target_items)[:4]
                      for u in range(3)])  # fmt: skip
    with jax.enable_x64(True):
        p, b = on_device(params), on_device(batch)
        expected, found = (value_and_gradient(model, p, b) for model in (fast, simple))
        assert_trees_close(found, expected, 1e-12)
        users, listed = jnp.array([4, 0, 2]), jnp.asarray(items)
        quick, slow = (m.scores(m.project(p, {}), users, listed) for m in (fast, simple))
        assert np.ptp(quick) > 0.1
        np.testing.assert_allclose(slow, quick, rtol=1e-10, atol=1e-12)


def test_a_model_of_a_module_starts_with_the_deviation_that_is_asked_for():
    params = one_domain(PairTower(), 64, std=0.5).init(jax.random.key(0), Sizes(100, 110, 0))
    assert {n: t.shape for n, t in params.tables.items()} == {
        "user": (100, 64),
        "target_item": (110, 64),
    }
    for table in params.tables.values():
        assert_std(table, 0.5)


@pytest.mark.parametrize(
    "case", ["no_cross", "two_layers", "per_direction", "low_rank", "skip", "unequal"]
)
def test_l1_mask_marks_exactly_the_cross_matrices(case):
    model = conet.build(options_of(case))
    params = random_params(model)
    mask = model.l1_mask(params.dense)
    jax.tree.map(lambda m, x: None, mask, params.dense)  # the same structure
    crossing = connections(params.dense)
    assert jax.tree.leaves(connections(mask)) == [True] * len(jax.tree.leaves(crossing))
    assert not any(jax.tree.leaves([mask["target"], mask["source"]]))
    if case == "no_cross":
        assert not any(jax.tree.leaves(mask)) and model.uncrossed is None
        return
    off = model.uncrossed(params.dense)
    assert not any(h.any() for h in jax.tree.leaves(connections(off)))
    for domain in ("target", "source"):
        jax.tree.map(np.testing.assert_array_equal, off[domain], params.dense[domain])
    # Eq. 8 over what is marked; with a full H that is the sum over all entries of the H^l.
    marked = jax.tree.map(lambda m, x: np.abs(x).sum() if m else 0.0, mask, params.dense)
    with jax.enable_x64(True):
        penalty = losses.l1_penalty(on_device(crossing), weight=0.3)
        np.testing.assert_allclose(penalty, 0.3 * sum(jax.tree.leaves(marked)), rtol=1e-12)
    if case in ("two_layers", "skip"):
        matrices = [h for level in range(3) for h in cross_of(params.dense, "target", level)]
        assert len(matrices) == {"two_layers": 2, "skip": 1 + 2 + 2}[case]
        entries = sum(np.abs(h).sum() for h in matrices)
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
    model = conet.build(options)
    params = jax.jit(lambda key: model.init(key, Sizes(100, 110, 120)))(jax.random.key(3))
    assert {n: t.shape for n, t in params.tables.items()} == {
        "user": (100, 128),
        "target_item": (110, 128),
        "source_item": (120, 128),
    }
    for table in params.tables.values():
        assert_std(table, 0.01)
    for level, (fan_in, fan_out) in enumerate(zip(layers[:-1], layers[1:], strict=True)):
        for domain in ("target", "source"):
            layer = params.dense[domain][f"W_{level}"]
            assert layer["kernel"].shape == (fan_in, fan_out)
            assert_std(layer["kernel"], np.sqrt(2 / fan_in) if initializer == "he" else 0.01)
            if initializer == "he":
                assert not layer["bias"].any()
            else:
                assert_std(layer["bias"], 0.01)
        (h,) = cross_of(jax.tree.map(np.asarray, params.dense), "target", level)
        assert h.shape == (fan_out, fan_in)
        if cross_rank:  # entries that share a row of U or V are dependent
            assert abs(h.std() / 0.01 - 1) < 0.25
            assert np.linalg.matrix_rank(h) == cross_rank
        else:
            assert_std(h, 0.01)
    output = [params.dense[domain]["h"]["kernel"] for domain in ("target", "source")]
    assert_std(np.stack(output), 64**-0.5 if initializer == "he" else 0.01)


@pytest.mark.parametrize("options", [{}, dict(cross_skip=1, source_layers=UNEQUAL)])
def test_no_two_parameters_start_alike(options):
    model = conet.build(conet.Options(layers=LAYERS, initializer="gaussian", **options))
    params = jax.jit(lambda key: model.init(key, SIZES))(jax.random.key(0))
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    assert len(np.unique(values)) > 0.999 * len(values)


@pytest.mark.parametrize("case", ["all_layers", "unequal_skip_low_rank", "random"])
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
        counts = ALPHA * batch.target.weights.sum() + (1 - ALPHA) * batch.source.weights.sum()
        np.testing.assert_allclose(value, counts * np.log(2), rtol=1e-6)
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


@pytest.mark.parametrize("case", ["random", "per_direction", "unequal_skip_low_rank"])
def test_diagnostics_are_what_the_cross_connections_carry(case):
    options = options_of(case)._replace(pairing="random")
    model = conet.build(options)
    params, batch = random_params(model), random_batch("random")
    each_way = case != "random"
    if not options.cross_rank:
        name = "H_to_target_0_0" if each_way else "H_0_0"
        params.dense[name]["H"]["kernel"][:2, :3] = 0.0
    (w_app, b_app, *_), (w_news, b_news, *_) = (
        weights_of(params.dense[domain]) for domain in ("target", "source")
    )
    app = np.c_[
        params.tables["user"][batch.target.users], params.tables["target_item"][batch.target.items]
    ].T
    news = np.c_[
        params.tables["user"][batch.source.users], params.tables["source_item"][batch.source.items]
    ].T
    apps, newses, expected = [app], [news], {}
    for level in range(3):
        crossed = {}
        for to, others in (("target", newses), ("source", apps)):
            crossed[to] = 0.0
            for skipped, h in enumerate(cross_of(params.dense, to, level)):
                crossed[to] = crossed[to] + h @ others[level - skipped]
                suffix = f"layer_{level + 1}" + (f"/to_{to}" if each_way else "")
                suffix += f"/skips_{skipped}" if skipped else ""
                expected[f"h_mean_abs/{suffix}"] = np.abs(h).mean()
                expected[f"h_zeros/{suffix}"] = (h == 0).mean()
        own = {"target": w_app[level] @ apps[level], "source": w_news[level] @ newses[level]}
        for domain in ("target", "source"):
            ratio = np.sqrt((crossed[domain] ** 2).sum() / (own[domain] ** 2).sum())
            expected[f"cross_ratio/{domain}/layer_{level + 1}"] = ratio
        apps.append(rectifier(own["target"] + b_app[level][:, None] + crossed["target"]))
        newses.append(rectifier(own["source"] + b_news[level][:, None] + crossed["source"]))
    for domain, logits in zip(("target", "source"), logits_of(params, batch), strict=True):
        counted = logits[getattr(batch, domain).weights > 0]
        expected[f"logit_spread/{domain}"] = counted.max() - counted.min()
    with jax.enable_x64(True):
        params, batch = on_device(params), on_device(batch)
        found = model.diagnostics(params.dense, rows_of(model, params, batch), batch)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-10, err_msg=key)
