"""Cross-fitted factors: what an example may read, and that training and inference agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax.config import default_config, validate
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.models import conet, ials, mlp, out_of_fold
from conet_jax.models.base import Sizes
from conet_jax.run.epoch import run_epoch
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.studies import crossing
from conet_jax.train import sampling
from conet_jax.train.chunk import chunk_program
from conet_jax.train.interactions import to_device
from conet_jax.train.state import TABLE_ADAM

FOLDS, DIM = 3, 4
SIZES = Sizes(40, 60, 50)
OPTIONS = ials.Options((2 * DIM,), True, 1.0, 10.0, 0.5)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_pairs(users, items, each, seed):
    """Each user with items drawn uniformly: nothing to be learnt."""
    rng = np.random.default_rng(seed)
    lists = [np.sort(rng.choice(items, each, replace=False)) for _ in range(users)]
    indptr = np.arange(users + 1) * each
    return to_device(indptr, np.concatenate(lists), items)


@pytest.fixture(scope="module")
def interactions():
    return {"target": random_pairs(40, 60, 5, 0), "source": random_pairs(40, 50, 4, 1)}


@pytest.fixture(scope="module")
def tables(interactions):
    options = {"folds": FOLDS, "sweeps": 3, "fold_sweeps": 2, "by_domain": True, "seed": 1}
    return out_of_fold.fit(interactions, SIZES, OPTIONS, **options)


def without(interactions, fold):
    """Pairs by domain that are not in a fold."""
    kept = {}
    for domain, own in interactions.items():
        keep = np.arange(len(own.items)) % FOLDS != fold
        kept[domain] = ials.Pairs(np.asarray(own.users)[keep], np.asarray(own.items)[keep])
    return kept


@pytest.mark.parametrize("fold", [0, 2, FOLDS])
def test_rows_of_a_fold_are_the_factors_and_counts_without_it(interactions, tables, fold):
    kept = without(interactions, fold)
    factors = ials.fit(interactions, SIZES, OPTIONS, sweeps=3, seed=1)
    if fold < FOLDS:
        factors = ials.fit(kept, SIZES, OPTIONS, sweeps=2, start=factors)
    for domain in ("target", "source"):
        table = np.asarray(tables[f"{domain}_item"]).reshape(-1, FOLDS + 1, DIM + 1)
        np.testing.assert_allclose(table[:, fold, :DIM], factors[f"{domain}_item"], rtol=1e-6)
        counts = np.log1p(np.bincount(kept[domain].items, minlength=len(table)))
        everything = np.log1p(np.bincount(interactions[domain].items, minlength=len(table)))
        np.testing.assert_allclose(table[:, fold, DIM], counts - everything.mean(), rtol=1e-5)
    # A view is the minimiser of the user's squared errors over one domain's items.
    users = np.asarray(tables["user"]).reshape(-1, FOLDS + 1, 2, DIM + 1)[:, fold]
    for i, (domain, weight) in enumerate((("target", 1.0), ("source", 0.5))):
        y = np.asarray(factors[f"{domain}_item"], np.float64)
        for user in range(SIZES.users):
            own = kept[domain].items[kept[domain].users == user]
            normal = weight * (y.T @ y + 10 * y[own].T @ y[own]) + np.eye(DIM)
            best = np.linalg.solve(normal, 11 * weight * y[own].sum(0))
            np.testing.assert_allclose(users[user, i, :DIM], best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairing", ["views", None])
def test_examples_know_the_fold_of_their_pair(interactions, pairing):
    domains = ("target", "source") if pairing else ("target",)
    plan = sampling.plan_epoch(
        interactions, domains=domains, pairing=pairing, negatives=2, batch_size=64, folds=FOLDS
    )
    batch = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan)
    for domain in domains:
        own, examples = interactions[domain], getattr(batch, domain)
        place = {
            pair: row
            for row, pair in enumerate(zip(own.users.tolist(), own.items.tolist(), strict=True))
        }
        folds = np.asarray(examples.folds)
        assert set(folds) == set(range(FOLDS))
        seen = zip(examples.users.tolist(), examples.items.tolist(), strict=True)
        for pair, label, fold in zip(seen, examples.labels, folds, strict=True):
            assert (pair in place) == bool(label)
            if label:
                assert fold == place[pair] % FOLDS


def auc(scores, labels):
    above = scores[labels > 0][:, None] - scores[labels == 0][None, :]
    return (above > 0).mean() + (above == 0).mean() / 2


@pytest.mark.parametrize(("folds", "low", "high"), [(FOLDS, 0.3, 0.6), (0, 0.9, 1.0)])
def test_factors_say_nothing_of_a_pair_that_they_were_fitted_without(
    interactions, folds, low, high
):
    fitted = out_of_fold.fit(
        interactions, SIZES, OPTIONS, folds=folds, sweeps=8, fold_sweeps=8, by_domain=False
    )
    plan = sampling.plan_epoch(
        interactions, domains=("target",), pairing=None, batch_size=200, folds=folds
    )
    target = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan).target
    rows = {
        name: fitted[name][out_of_fold.row_ids(ids, target.folds, folds)]
        for name, ids in (("user", target.users), ("target_item", target.items))
    }
    dots = out_of_fold.features(rows["user"], rows["target_item"], 1.0)[:, 0]
    # Without the pair an item has one user less and scores a little lower, never higher.
    assert low <= auc(np.asarray(dots), np.asarray(target.labels)) <= high


def view_model(**options):
    return conet.build(
        conet.Options(
            layers=(2 * DIM, 6, 5), cross_layers=2, pairing="views", folds=FOLDS,
            inner_product=True, inner_weight=2.0, **options,
        )
    )  # fmt: skip


def random_params(model, tables, seed=0):
    params = model.init(jax.random.key(seed), SIZES)
    rng = np.random.default_rng(seed)
    dense = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params.dense)
    assert {name: table.shape for name, table in params.tables.items()} == {
        name: tables[name].shape for name in params.tables
    }
    return params._replace(tables={name: tables[name] for name in params.tables}, dense=dense)


def written_out(params, view_rows, item_row):
    """Target logit of one pair, in NumPy: Eqs. 3a, 3b on both views, and the inner product."""
    dense = jax.tree.map(lambda x: np.asarray(x, np.float64), params.dense)
    y, of_item = item_row[:DIM], item_row[DIM]
    inputs = []
    for row in view_rows:
        x, of_user = row[:DIM], row[DIM]
        norms = [np.linalg.norm(x), np.linalg.norm(y)]
        inputs.append(np.concatenate([x, y, [2.0 * x @ y, *norms, of_user, of_item]]))
    app, news = inputs
    for level in ("layer_1", "layer_2"):
        h = dense["cross"][level]["both"]["h"]
        target, source = dense["target"][level], dense["source"][level]
        app, news = (
            np.maximum(app @ target["kernel"] + news @ h + target["bias"], 0),
            np.maximum(news @ source["kernel"] + app @ h + source["bias"], 0),
        )
    out = dense["target"]["output"]
    inner = np.sum(dense["target"]["inner"] * view_rows[0][:DIM] * y)
    return app @ out["kernel"][:, 0] + out["bias"][0] + inner


def test_scores_are_the_equations_on_the_rows_of_all_pairs(tables):
    model = view_model()
    params = random_params(model, tables)
    items = np.stack([np.random.default_rng(u).permutation(60)[:7] for u in range(40)])
    scores = model.scores(model.project(params, {}), jnp.arange(40), jnp.asarray(items))
    users = np.asarray(tables["user"], np.float64).reshape(40, FOLDS + 1, 2, DIM + 1)[:, FOLDS]
    rows = np.asarray(tables["target_item"], np.float64).reshape(60, FOLDS + 1, -1)[:, FOLDS]
    expected = [[written_out(params, users[u], rows[i]) for i in items[u]] for u in range(40)]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conet", "mlp"])
def test_training_logits_without_folds_are_the_scores(interactions, tables, name):
    if name == "conet":
        model, own = view_model(), tables
        options = conet.Options((2 * DIM, 6, 5), 2, pairing="views", folds=FOLDS)._replace(
            inner_product=True, inner_weight=2.0
        )
    else:
        options = mlp.Options((2 * DIM, 6, 5), True, 2.0, warm_start="crossfit", folds=FOLDS)
        model = mlp.build(options)
        own = {**tables, "user": tables["user"][:, : DIM + 1]}
    params = random_params(model, own)
    plan = sampling.plan_epoch(
        interactions, domains=model.domains, pairing=model.pairing, batch_size=16
    )
    batch = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan)
    assert batch.target.folds is None  # so that rows are those of all pairs
    rows = {key: params.tables[key][ids] for key, ids in model.lookups(batch).items()}
    module = {"conet": conet, "mlp": mlp}[name]
    logits = module.batch_logits(params.dense, rows, batch, options, None)
    projected = model.project(params, interactions)
    scores = model.scores(projected, batch.target.users, batch.target.items[:, None])[:, 0]
    np.testing.assert_allclose(
        scores, logits[0] if name == "conet" else logits, rtol=1e-4, atol=1e-4
    )


# Runs.


def small(variant, **fields):
    config = default_config(variant)
    config.update(
        dict(name="small", layers=(8, 6, 4), cross_layers=min(config.cross_layers, 2), epochs=2)
        | dict(ials_sweeps=2, fold_sweeps=1, folds=3, batch_size=64, **fields)
    )
    data = synthetic.dataset(
        num_users=60, num_target_items=130, num_source_items=120, target_interactions=420,
        source_interactions=500, seed=0,
    )[0]  # fmt: skip
    return make_experiment(config, data)


@pytest.mark.parametrize("variant", ["", "ours_mlp", "ours_mlp_joined"])
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
    experiment = small("")
    params = experiment.params(initial_state(experiment))
    wave = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), params.dense
    )
    params = params._replace(dense=wave)
    users, items = jnp.arange(60), jnp.broadcast_to(jnp.arange(130), (60, 130))

    def scores(params):
        return np.asarray(
            experiment.model.scores(experiment.model.project(params, {}), users, items)
        )

    switched = {
        way: crossing.switched(params, experiment.interactions, way, pairing="views")[0]
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
        ("", dict(pairing="same_user"), "pairing=views and warm_start=crossfit go together"),
        ("conet", dict(pairing="views"), "pairing=views and warm_start=crossfit go together"),
        ("", dict(inference="target"), "config.inference is 'target' with config.pairing=views"),
        ("", dict(folds=1), "config.folds is 1: expected 0, or a whole number from 2"),
        ("cross_stitch", dict(warm_start="crossfit"), "expected conet or mlp"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(variant, fields, expected):
    config = default_config(variant)
    config.update(fields)
    with pytest.raises(InputError, match=expected):
        validate(config)
