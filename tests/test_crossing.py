"""Switching the crossing of a trained CoNet: what changes and what must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.studies import crossing


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(
        num_users=40,
        num_target_items=120,
        num_source_items=60,
        target_interactions=250,
        source_interactions=300,
        seed=0,
    )[0]


def task_of(data, variant="conet", **fields):
    config = default_config(variant)
    config.ials_trials = 0
    config.update(dict(layers=(8, 6, 4), cross_layers=2) | fields)
    return make_experiment(config, data)


def scores_of(experiment, params, interactions):
    everything = jnp.broadcast_to(jnp.arange(120), (40, 120))
    projected = experiment.model.project(params, interactions)
    return np.asarray(experiment.model.scores(projected, jnp.arange(40), everything))


def trained(experiment):
    """Parameters with a crossing that is felt."""
    params = experiment.params(initial_state(experiment))
    return jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)


@pytest.mark.parametrize("fields", [{}, dict(cross_skip=1), dict(source_layers=(8, 7, 5))])
def test_off_is_the_target_tower_alone(data, fields):
    experiment = task_of(data, **fields)
    alone = task_of(data, inference="target", **fields)
    params = trained(experiment)
    off = scores_of(
        experiment, *crossing.switched(experiment.model, params, experiment.interactions, "off")
    )
    np.testing.assert_allclose(
        off, scores_of(alone, params, alone.interactions), rtol=1e-5, atol=1e-5
    )
    on = scores_of(
        experiment, *crossing.switched(experiment.model, params, experiment.interactions, "on")
    )
    assert np.abs(on - off).max() > 0.1


def test_other_gives_each_user_the_source_items_of_the_next(data):
    experiment = task_of(data)
    _, interactions = crossing.switched(
        experiment.model,
        experiment.params(initial_state(experiment)),
        experiment.interactions,
        "other",
    )
    assert interactions["target"] is experiment.interactions["target"]

    def lists(domain):
        bounds = np.asarray(domain.indptr)
        return [
            np.asarray(domain.items)[a:b].tolist()
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]

    before, after = lists(experiment.interactions["source"]), lists(interactions["source"])
    assert after == before[1:] + before[:1]
    params = trained(experiment)
    on = scores_of(experiment, params, experiment.interactions)
    assert np.abs(scores_of(experiment, params, interactions) - on).max() > 1e-3


def test_a_model_without_crossing_is_refused(data):
    experiment = task_of(data, "mlp", cross_layers=0)
    with pytest.raises(InputError, match="no cross connections"):
        crossing.switched(
            experiment.model,
            experiment.params(initial_state(experiment)),
            experiment.interactions,
            "off",
        )


def test_the_table_has_the_means_and_a_paired_test():
    ndcg = {"on": np.array([0.5, 0.6, 0.9]), "off": np.array([0.4, 0.4, 0.6])}
    rows = {
        way: [{"hit_ratio@5": 1.0, "ndcg@5": float(values.mean()), "mrr@5": 0.25}]
        for way, values in ndcg.items()
    }
    text = crossing.report(rows, ndcg, 5)
    assert "| on | 1.0000 | 0.6667 | 0.2500 |  |  |" in text
    assert "| off | 1.0000 | 0.4667 | 0.2500 | -30.00% | 0.074 |" in text
