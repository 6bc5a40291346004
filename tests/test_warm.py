"""No gain that users would not have: warm metrics, and models that profit from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import metrics
from conet_jax.config import default_config
from conet_jax.data.assemble import from_arrays
from conet_jax.data.types import HeldOut, trained_items, warm
from conet_jax.models import out_of_fold, recipe
from conet_jax.models.base import Batch, Examples, Model, Params
from conet_jax.run import loop
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.train import ranking

# A "model" whose logits are a table: the tests say what each score is.
TABLE = Model(
    domains=("target",),
    pairing=None,
    init=None,
    lookups=None,
    losses=None,
    project=lambda params, interactions: {"item": params.tables["scores"].T},
    scores=lambda projected, users, items: projected["item"].T[users[:, None], items],
)


def random_held_out(users=50, items=40, candidates=12, seed=0):
    rng = np.random.default_rng(seed)
    listed = np.stack([rng.permutation(items)[: 1 + candidates] for _ in range(users)])
    mask = rng.random((users, candidates)) < 0.8
    mask[:, 0] = True
    return HeldOut(np.arange(users), listed[:, 0], listed[:, 1:], mask)


def test_warm_ranks_are_those_of_lists_without_cold_items():
    rng = np.random.default_rng(1)
    held_out, trained = random_held_out(), rng.random(40) < 0.6
    scores = rng.integers(0, 5, (50, 40)).astype(np.float32)  # with ties
    params = Params({"scores": jnp.asarray(scores)}, {})
    everything, of_warm = ranking.rank_twice(TABLE, params, {}, held_out, trained)
    plain = ranking.rank_held_out(TABLE, params, {}, held_out)
    assert all(map(np.array_equal, everything.ranks, plain))
    rows = []
    for user in range(50):
        item, row = held_out.items[user], scores[user]
        others = held_out.candidates[user][held_out.mask[user]]
        others = others[trained[others]]
        if trained[item] and len(others):
            above, tied = (row[others] > row[item]).sum(), (row[others] == row[item]).sum()
            rows.append((user, above, tied, len(others)))
    expected = np.array(rows).T
    assert 10 < len(rows) < 45
    np.testing.assert_array_equal(np.stack([of_warm.users, *of_warm.ranks]), expected)


def test_a_user_without_warm_candidates_is_left_out():
    held_out = HeldOut(np.arange(2), np.array([0, 0]), np.array([[1], [2]]), np.ones((2, 1), bool))
    kept, mask = warm(held_out, np.array([True, True, False]))
    assert kept.tolist() == [True, False] and mask.tolist() == [[True], [False]]


def without_signal(seed=0, users=1500, pairs=4, items=3000, candidates=99):
    """Users and items drawn at random; the catalogue has what somebody has, as a catalogue does."""
    rng = np.random.default_rng(seed)

    def domain(items):
        listed = np.concatenate([rng.permutation(items)[:pairs] for _ in range(users)])
        return np.repeat(np.arange(users), pairs), np.unique(listed, return_inverse=True)[1]

    return from_arrays(*domain(items), *domain(items // 2), candidates=candidates, seed=seed)


def hit_ratios(variant, data, **fields):
    """HR@10 of the test items of a run that is chosen by validation: warm, and of cold items."""
    config = default_config(variant)
    config.ials_trials = 0
    config.update(dict(layers=(16, 8, 4), epochs=6, patience=6, batch_size=256, ials_sweeps=5))
    config.cross_layers = min(config.cross_layers, 2)
    config.update(fields)
    experiment = make_experiment(config, data)
    best = None
    for end in loop.train(experiment, initial_state(experiment)):
        if end.better:
            best = jax.tree.map(jnp.copy, end.params)
    given = experiment.model, best, experiment.interactions, data.test
    everything, of_warm = ranking.rank_twice(*given, experiment.trained_items)
    cold = ~experiment.trained_items[data.test.items]
    ranks = everything.ranks
    of_cold = metrics.hit_ratio(ranks.above[cold], ranks.tied[cold], k=10)
    chance = 10 / (of_warm.ranks.candidates + 1)
    of_warm = metrics.hit_ratio(of_warm.ranks.above, of_warm.ranks.tied, k=10)
    return of_warm, np.minimum(chance, 1.0), of_cold


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    ["recipe", "recipe_joint_mlp", "recipe_mlp", "lasso", "mlp", "ials_joined", "popularity"],
)
def test_without_a_signal_no_method_beats_chance_or_profits_from_cold_items(variant):
    data = without_signal()
    trained = trained_items(data.target)
    assert (~trained[data.test.items]).mean() > 0.2 > (~trained).mean()  # coldness tells the label
    of_warm, chance, of_cold = hit_ratios(variant, data)
    deviation = np.sqrt((chance * (1 - chance)).mean() / len(of_warm))
    assert abs(of_warm.mean() - chance.mean()) < 4 * deviation
    popular = hit_ratios("popularity", data)[2]
    assert of_cold.mean() <= popular.mean() + 4 * np.sqrt(0.1 * 0.9 / len(of_cold))


def test_recipe_learns_nothing_from_an_example_whose_item_is_in_no_other_fold():
    rows = {
        "target_item": jnp.array([[0.0, 0.0, -1.0], [0.5, 0.0, -1.0]]),
        "source_item": jnp.array([[0.1, 0.2, 3.0], [0.0, 0.0, 3.0]]),
    }
    ones = jnp.ones(2)
    examples = Examples(None, None, ones, jnp.array([1.0, 0.5]))
    batch = Batch(examples, examples, None, ones[0], None)
    weights = recipe.warm_weights(rows, batch)
    assert weights["target"].tolist() == [0.0, 0.5] and weights["source"].tolist() == [1.0, 0.0]


def test_recipe_ranks_items_without_training_pairs_below_all_others():
    data = without_signal(users=60, items=90, candidates=20)
    config = default_config("recipe")
    config.ials_trials = 0
    config.update(dict(layers=(8, 6, 4), cross_layers=2, ials_sweeps=2, fold_sweeps=1, folds=2))
    experiment = make_experiment(config, data)
    params = experiment.params(initial_state(experiment))
    projected = experiment.model.project(params, experiment.interactions)
    trained = trained_items(data.target)
    assert np.array_equal(projected["item_warm"], trained) and not trained.all()
    items = jnp.broadcast_to(jnp.arange(len(trained)), (60, len(trained)))
    scores = np.asarray(experiment.model.scores(projected, jnp.arange(60), items))
    assert scores[:, trained].min() > scores[:, ~trained].max()


def test_factors_are_zero_just_where_an_item_has_no_pair():
    items = jnp.array([[0.0, 0.0, 1.0], [0.0, 1e-20, 0.0]])
    assert out_of_fold.is_warm(items).tolist() == [False, True]
