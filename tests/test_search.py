"""The search: its spaces, what it draws, and that the test split is out of its reach."""

import numpy as np
import pytest
from helpers import SMALL, without_seconds
from scipy import stats

from conet_jax import metrics, models
from conet_jax.config import default_config, validate
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.models.base import Model
from conet_jax.run import loop
from conet_jax.run.fit import fit
from conet_jax.studies import search
from conet_jax.train import ranking


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**SMALL)[0]


def config_of(method, **fields):
    config = default_config(method)
    config.update(fields)
    return config


def tiny(method, **fields):
    sizes = dict(layers=(8, 4), cross_layers=0, epochs=2, batch_size=64, ials_trials=0)
    return config_of(method, **(sizes | fields))


def test_every_method_has_a_space():
    assert set(search.SPACES) == set(search.METHODS)


@pytest.mark.parametrize("method", search.METHODS)
def test_draws_are_valid_and_within_the_space(method):
    space = search.SPACES[method]
    drawn = search.trials(method, 30)
    assert drawn[0] == {} and len(drawn) == (30 if space else 1)
    for overrides in drawn:
        validate(config_of(method, **overrides))
    for field, values in space.items():
        assert field in default_config()
        found = [overrides[field] for overrides in drawn[1:]]
        assert len(set(found)) > 1
        if isinstance(values, search.Range):
            assert values.low <= min(found) and max(found) <= values.high
        else:
            assert set(found) == set(values)


@pytest.mark.parametrize("method", search.METHODS)
def test_what_is_trained_by_gradients_may_choose_its_negatives(method):
    trained = isinstance(models.build(config_of(method)), Model)
    # The recommended recipe and what is left of it have four, which is part of the recipe.
    choice = trained and config_of(method).negatives == 1
    assert ("negatives" in search.SPACES[method]) == choice
    assert ("learning_rate" in search.SPACES[method]) == trained


@pytest.mark.parametrize("log", [True, False])
def test_draws_are_uniform_in_their_scale(log, monkeypatch):
    monkeypatch.setitem(search.SPACES, "mlp", {"learning_rate": search.Range(1e-5, 1e-1, log)})
    drawn = np.array([overrides["learning_rate"] for overrides in search.trials("mlp", 501)[1:]])
    place = np.log10(drawn) / 4 + 1.25 if log else (drawn - 1e-5) / (1e-1 - 1e-5)
    assert stats.kstest(place, "uniform").pvalue > 0.01


def test_more_trials_begin_with_the_fewer_and_hang_on_method_and_seed():
    assert search.trials("conet", 5) == search.trials("conet", 9)[:5]
    assert search.trials("conet", 5) != search.trials("mlp_shared", 5)
    assert search.trials("conet", 5) != search.trials("conet", 5, seed=1)
    # Equal in every process and version: a search goes on where another process left it.
    assert search.trials("ease", 2)[1] == {"ease_regularization": 908.0}


def test_any_use_of_the_test_split_raises(data):
    test = search.without_test(data).test
    for use in (
        lambda: test.users,
        lambda: len(test),
        lambda: list(test),
        lambda: test[0],
        lambda: test == data.test,
        lambda: bool(test),
        lambda: np.asarray(test),
        lambda: test._replace(users=1),
    ):
        with pytest.raises(search.SealedError):
            use()


def test_value_of_a_trial_does_not_hang_on_the_test_split(data):
    config = tiny("ials")
    expected = search.evaluate(config, data)
    scrambled = data.test._replace(
        items=data.test.candidates[:, 0], candidates=np.roll(data.test.candidates, 1, axis=0)
    )
    for other in (scrambled, None):
        found = search.evaluate(config, data._replace(test=other))
        assert without_seconds(found) == without_seconds(expected)


@pytest.mark.slow
def test_value_of_a_trial_is_the_validation_of_the_run(data, tmp_path):
    config = tiny("recipe_mlp", epochs=3, patience=1)
    trial = search.evaluate(config, data)
    result = fit(config, tmp_path / "run", dataset=data, quiet=True)
    assert without_seconds(trial) == {
        name: result[name] for name in ("valid", "valid_warm", "best_epoch", "epochs")
    }


def test_search_that_peeks_is_caught(data, monkeypatch):
    def peek(experiment, params, row):
        return ranking.rank_held_out(
            experiment.model, params, experiment.interactions, experiment.dataset.test
        )

    monkeypatch.setattr(loop, "validate", peek)
    with pytest.raises(search.SealedError):
        search.evaluate(tiny("popularity"), data)


def test_data_without_test_users_is_refused_by_a_run_alone(data, tmp_path):
    empty = data.test._replace(users=data.test.users[:0])
    lacking = data._replace(test=empty)
    assert search.evaluate(tiny("popularity"), lacking)["epochs"] == 1
    with pytest.raises(InputError, match="no test users"):
        fit(tiny("popularity"), tmp_path / "run", dataset=lacking)


def test_ease_above_its_limit_is_a_refusal(data):
    with pytest.raises(InputError, match="max_items"):
        search.evaluate(tiny("ease", max_items=100), data)


def test_columns_are_the_metrics_of_every_part_of_validation(monkeypatch):
    metric = metrics.Metric("hit_ratio@5", "HR@5", None, has_cut=False)
    monkeypatch.setattr(metrics, "METRICS", (metrics.METRICS[1], metric))
    monkeypatch.setattr(search, "PARTS", ("valid", "valid_warm"))
    record = {"valid": {"ndcg@9": 0.2, "auc": 0.3}, "valid_warm": {"hit_ratio@5": 0.4}}
    assert search.columns(record, 9) == {
        "ndcg@9": 0.2,
        "hit_ratio@5": None,
        "warm ndcg@9": None,
        "warm hit_ratio@5": 0.4,
    }
    assert set(search.columns({"failed": "no"}, 9).values()) == {None}


def test_best_trial_is_the_first_of_the_best_that_did_not_fail():
    def trial(value):
        return {"valid_warm": {"ndcg@10": value}}

    failed = {"failed": "no"}
    assert search.best_trial([failed, trial(0.1), trial(0.3), trial(0.3)], 10) == 2
    assert search.best_trial([failed, trial(0.0)], 10) == 1
    assert search.best_trial([failed, failed], 10) is None
