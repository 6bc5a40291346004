"""The recipe against its equations in NumPy, and what its training moves and its crossing knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_out_of_fold import DIM, FOLDS, OPTIONS, SIZES, random_pairs

from conet_jax.config import default_config, validate
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.models import neighbours, out_of_fold, recipe, recipe_mlp
from conet_jax.models.base import facing
from conet_jax.run.epoch import run_epoch
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.studies import crossing
from conet_jax.train import sampling
from conet_jax.train.chunk import chunk_program
from conet_jax.train.state import TABLE_ADAM

LAYERS = (2 * DIM, 6, 5)
NEAR = 3  # neighbours


@pytest.fixture(scope="module")
def interactions():
    return {"target": random_pairs(40, 60, 5, 0), "source": random_pairs(40, 50, 4, 1)}


@pytest.fixture(scope="module")
def tables(interactions):
    options = {"folds": FOLDS, "sweeps": 3, "fold_sweeps": 2, "views": recipe.VIEWS, "seed": 1}
    near = neighbours.fit(interactions, SIZES, recipe.DOMAINS, NEAR, recipe.DOMAINS)
    tables = near | out_of_fold.fit(interactions, SIZES, OPTIONS, **options)
    return {name: jnp.asarray(table) for name, table in tables.items()}


def options_of(**fields):
    given = dict(cross_layers=2, folds=FOLDS, inner_weight=2.0, neighbours=NEAR) | fields
    return recipe.Options(LAYERS, **given)


def random_params(model, tables, seed=0):
    """Random dense parameters on given tables, which must be of the model's shapes."""
    params = model.init(jax.random.key(seed), SIZES)
    rng = np.random.default_rng(seed)
    dense = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params.dense)
    assert {name: table.shape for name, table in params.tables.items()} == {
        name: tables[name].shape for name in params.tables
    }
    return params._replace(tables={name: tables[name] for name in params.tables}, dense=dense)


def matrix_of(dense, to, level):
    """H as it acts on rows; shared by the directions or not; of full rank or U^T V."""
    shared = f"H_{level}_0"
    part = dense[shared] if shared in dense else dense[f"H_to_{to}_{level}_0"]
    return part["H"]["kernel"] if "H" in part else part["V"]["kernel"] @ part["U"]["kernel"]


def written_out(params, view_rows, item_row, domain="target"):
    """A domain's logit of one pair, in NumPy: Eqs. 3a, 3b on both views, and the linear term."""
    dense = jax.tree.map(lambda x: np.asarray(x, np.float64), params.dense)
    y, of_item = item_row[:DIM], item_row[DIM]
    inputs = []
    for row in view_rows:
        x, of_user = row[:DIM], row[DIM]
        norms = [np.linalg.norm(x), np.linalg.norm(y)]
        inputs.append(np.concatenate([x, y, [2.0 * x @ y, *norms, of_user, of_item]]))
    app, news = inputs
    for level in (0, 1):
        target, source = dense["target"][f"W_{level}"], dense["source"][f"W_{level}"]
        to_app, to_news = (matrix_of(dense, to, level) for to in ("target", "source"))
        app, news = (
            np.maximum(app @ target["kernel"] + news @ to_app + target["bias"], 0),
            np.maximum(news @ source["kernel"] + app @ to_news + source["bias"], 0),
        )
    out, at = dense[domain]["h"], ("target", "source").index(domain)
    linear = np.sum(dense[f"w_{domain}"] * view_rows[at][:DIM] * y)
    return (app, news)[at] @ out["kernel"][:, 0] + out["bias"][0] + linear


def beside(params, users, items, labels=None, domain="target"):
    """v^T s of pairs [n], whose sums tests/test_neighbours.py holds to their formula."""
    labels = jnp.zeros(len(users)) if labels is None else labels
    rows = params.tables["user_items"][users], params.tables[f"{domain}_neighbours"][items]
    return np.asarray(neighbours.term(params.dense[f"v_{domain}"], *rows, labels, NEAR))


def cold_below(logits, items, interactions):
    """Logits, and for items without a training pair, of which nothing is known, a constant."""
    return np.where(np.isin(items, interactions.items), logits, recipe.COLD)


OPTION_CASES = [{}, dict(cross_per_direction=True), dict(cross_rank=2)]


@pytest.mark.parametrize("domain", ["target", "source"])
@pytest.mark.parametrize("fields", OPTION_CASES)
def test_scores_are_the_equations_on_the_rows_of_all_pairs(interactions, tables, fields, domain):
    model = facing(recipe.build(options_of(**fields)), domain)
    params = random_params(model, tables)
    items = np.stack([np.random.default_rng(u).permutation(50)[:7] for u in range(40)])
    projected = model.project(params, interactions)
    scores = model.scores(projected, jnp.arange(40), jnp.asarray(items))
    users = np.asarray(tables["user"], np.float64).reshape(40, FOLDS + 1, 2, DIM + 1)[:, FOLDS]
    table = np.asarray(tables[f"{domain}_item"], np.float64)
    rows = table.reshape(-1, FOLDS + 1, DIM + 1)[:, FOLDS]
    expected = [
        [written_out(params, users[u], rows[i], domain) for i in items[u]] for u in range(40)
    ]
    near = beside(params, np.repeat(np.arange(40), 7), items.reshape(-1), domain=domain)
    assert np.ptp(near) > 0.1
    expected = cold_below(expected + near.reshape(40, 7), items, interactions[domain])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", OPTION_CASES)
def test_training_logits_are_the_equations_on_the_rows_without_the_example_s_fold(
    interactions, tables, fields
):
    options = options_of(**fields)
    model = recipe.build(options)
    params = random_params(model, tables)
    plan = sampling.plan_epoch(
        interactions, domains=model.domains, pairing="views", batch_size=16, folds=FOLDS
    )
    batch = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan)
    assert set(np.asarray(batch.target.folds)) == set(range(FOLDS))
    rows = {key: params.tables[key][ids] for key, ids in model.lookups(batch).items()}
    logits = recipe.batch_logits(params.dense, rows, batch, None, options)
    users = np.asarray(tables["user"], np.float64).reshape(40, FOLDS + 1, 2, DIM + 1)
    for domain in ("target", "source"):
        items = np.asarray(tables[f"{domain}_item"], np.float64).reshape(-1, FOLDS + 1, DIM + 1)
        examples = getattr(batch, domain)
        expected = [
            written_out(params, users[user, fold], items[item, fold], domain)
            for user, item, fold in zip(
                *map(np.asarray, (examples.users, examples.items, examples.folds)), strict=True
            )
        ]
        near = beside(params, examples.users, examples.items, examples.labels, domain)
        assert np.ptp(near) > 0.1
        np.testing.assert_allclose(logits[domain], expected + near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["recipe", "recipe_mlp"])
def test_training_logits_without_folds_are_the_scores(interactions, tables, name):
    module, own, options = recipe, tables, options_of()
    if name == "recipe_mlp":
        near = neighbours.fit(interactions, SIZES, ("target",), NEAR, ("target",))
        near = {name: jnp.asarray(table) for name, table in near.items()}
        module, own = recipe_mlp, {**tables, **near, "user": tables["user"][:, : DIM + 1]}
        options = recipe_mlp.Options(LAYERS, inner_weight=2.0, folds=FOLDS, neighbours=NEAR)
    model = module.build(options)
    params = random_params(model, own)
    plan = sampling.plan_epoch(
        interactions, domains=model.domains, pairing=model.pairing, batch_size=16
    )
    batch = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan)
    assert batch.target.folds is None  # so that rows are those of all pairs
    unlabelled = batch.target._replace(labels=jnp.zeros_like(batch.target.labels))
    batch = batch._replace(target=unlabelled)  # so that neighbours are those of all pairs
    rows = {key: params.tables[key][ids] for key, ids in model.lookups(batch).items()}
    logits = module.batch_logits(params.dense, rows, batch, None, options)["target"]
    projected = model.project(params, interactions)
    scores = model.scores(projected, batch.target.users, batch.target.items[:, None])[:, 0]
    expected = cold_below(logits, batch.target.items, interactions["target"])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_towers_start_near_the_linear_model():
    """The stated start: w and the output's bias constant, output weights a tenth of He's."""
    options = recipe.Options((256, 128, 64), cross_layers=2, folds=2, output_scale=0.1)
    dense = recipe.build(options).init(jax.random.key(0), SIZES).dense
    outputs = []
    for domain in ("target", "source"):
        np.testing.assert_array_equal(dense[f"w_{domain}"], np.full(128, 5.0, np.float32))
        np.testing.assert_array_equal(dense[domain]["h"]["bias"], np.float32([-2.5]))
        outputs.append(np.asarray(dense[domain]["h"]["kernel"]))
        assert dense[domain]["W_0"]["kernel"].shape == (256 + out_of_fold.FEATURES, 128)
    spread = np.std(outputs) / (0.1 * 64**-0.5)
    assert abs(spread - 1) < 5 / np.sqrt(2 * 128)


# Runs.


def small(variant, **fields):
    config = default_config(variant)
    config.ials_trials = 0
    config.update(
        dict(name="small", layers=(8, 6, 4), cross_layers=min(config.cross_layers, 2), epochs=2)
        | dict(ials_sweeps=2, fold_sweeps=1, folds=3, batch_size=64, **fields)
    )
    data = synthetic.dataset(
        num_users=60, num_target_items=130, num_source_items=120, target_interactions=420,
        source_interactions=500, seed=0,
    )[0]  # fmt: skip
    return make_experiment(config, data)


@pytest.mark.parametrize("variant", ["recipe", "recipe_mlp", "recipe_joint_mlp"])
def test_training_moves_the_towers_and_leaves_the_tables(variant):
    experiment = small(variant)
    state = initial_state(experiment)
    before = jax.tree.map(np.array, experiment.params(state))
    state, row = run_epoch(experiment, state, 1)
    programs = chunk_program._cache_size()
    state, _ = run_epoch(experiment, state, 2)
    assert chunk_program._cache_size() == programs  # nothing is compiled again
    after = experiment.params(state)
    jax.tree.map(np.testing.assert_array_equal, before.tables, after.tables)
    moved = jax.tree.map(lambda a, b: (np.asarray(a) != b).any(), after.dense, before.dense)
    assert all(jax.tree.leaves(moved))
    assert row["step"] == experiment.plan.steps
    assert TABLE_ADAM.init(jnp.ones((2, 3))).shape == (2, 10)  # trained tables are packed


def test_switching_the_crossing_of_views():
    experiment = small("recipe")
    params = experiment.params(initial_state(experiment))
    wave = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), params.dense
    )
    params = params._replace(dense=wave)
    users, items = jnp.arange(60), jnp.broadcast_to(jnp.arange(130), (60, 130))

    def scores(params):
        return np.asarray(
            experiment.model.scores(
                experiment.model.project(params, experiment.interactions), users, items
            )
        )

    switched = {
        way: crossing.switched(experiment.model, params, experiment.interactions, way)[0]
        for way in crossing.WAYS
    }
    np.testing.assert_array_equal(scores(switched["on"]), scores(params))
    # Off, the source's view counts for nothing.
    table = params.tables["user"]
    blind = table.at[:, table.shape[1] // 2 :].set(0.0)
    off = switched["off"]
    unseen = off._replace(tables={**off.tables, "user": blind})
    np.testing.assert_allclose(scores(off), scores(unseen), rtol=1e-6)
    assert np.abs(scores(off) - scores(params)).max() > 1e-3
    # Another's: the target's view stays and the source's is that of the next user.
    rows = np.asarray(switched["other"].tables["user"]).reshape(60, 4, 2, 5)
    own = np.asarray(table).reshape(60, 4, 2, 5)
    np.testing.assert_array_equal(rows[:, :, 0], own[:, :, 0])
    np.testing.assert_array_equal(rows[:, :, 1], np.roll(own[:, :, 1], -1, axis=0))


@pytest.mark.parametrize(
    ("variant", "fields", "expected"),
    [
        ("recipe", dict(inference="target"), "config.inference is 'target' with config.model=reci"),
        ("recipe", dict(folds=1), "config.folds is 1: expected 0, or a whole number from 2"),
        ("recipe", dict(cross_skip=1), "config.cross_skip are not for config.model=recipe"),
        ("recipe", dict(source_layers=(128, 9, 9, 9)), "config.source_layers and .* not for confi"),
        ("recipe", dict(cross_layers=4), "config.cross_layers is 4: .* only 3 transitions"),
        ("recipe", dict(pretrain_epochs=1), "config.pretrain_epochs is 1: expected 0"),
        ("recipe_mlp", dict(cross_layers=1), "which has one tower: set config.cross_layers=0"),
    ],
)
def test_fields_that_do_not_fit_the_recipe_are_refused(variant, fields, expected):
    config = default_config(variant)
    config.ials_trials = 0
    config.update(fields)
    with pytest.raises(InputError, match=expected):
        validate(config)
