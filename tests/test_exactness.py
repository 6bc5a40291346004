"""CoNet trained with row_adam and with dense optax.adam: the same run, at the size of the demo."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.models.base import Params
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.train import ranking, sampling
from conet_jax.train.chunk import train_chunk, train_population
from conet_jax.train.state import settled
from conet_jax.train.step import joint_objective

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(
        num_users=3000,
        num_target_items=1000,
        num_source_items=1200,
        target_interactions=40_000,
        source_interactions=60_000,
        seed=0,
    )[0]


def task_of(data):
    return make_experiment(default_config("conet"), data)


def dense_run(experiment, num_steps):
    """The first steps of epoch 0 by optax.adam over all parameters: (params, target losses)."""
    adam = optax.adam(experiment.hyper.learning_rate)

    def step(carry, at):
        params, state = carry
        batch = sampling.sample_step(
            experiment.sampling_key, jnp.int32(0), at, experiment.interactions, experiment.plan
        )

        def loss(params):
            rows = {n: params.tables[n][ids] for n, ids in experiment.model.lookups(batch).items()}
            return joint_objective(experiment.model, params.dense, rows, batch, experiment.hyper)

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), sums

    params = settled(initial_state(experiment), experiment.hyper.learning_rate)
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, steps))
    (params, _), sums = run((Params(*params), adam.init(params)))
    return params, sums


def row_run(experiment, num_steps):
    state, sums = train_chunk(
        initial_state(experiment),
        experiment.interactions,
        experiment.sampling_key,
        jnp.int32(0),
        jnp.int32(0),
        experiment.hyper,
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=num_steps,
    )
    return settled(state, experiment.hyper.learning_rate), sums


def test_a_thousand_steps_in_float64_have_the_losses_of_dense_adam(data):
    with jax.enable_x64(True):
        experiment = task_of(data)
        _, expected = dense_run(experiment, 1000)
        _, found = row_run(experiment, 1000)
    assert found["target_loss"].dtype == np.float64
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_a_float32_epoch_has_the_loss_and_ranking_of_dense_adam(data):
    experiment = task_of(data)
    results = []
    for run in (dense_run, row_run):
        params, sums = run(experiment, experiment.plan.steps)
        ranks = ranking.rank_held_out(experiment.model, params, experiment.interactions, data.valid)
        loss = float(np.sum(sums["target_loss"]) / np.sum(sums["target_count"]))
        results.append((loss, ranking.summarize(ranks, k=10)["ndcg@10"]))
    (dense_loss, dense_ndcg), (row_loss, row_ndcg) = results
    assert row_loss == pytest.approx(dense_loss, rel=1e-3)
    assert row_ndcg == pytest.approx(dense_ndcg, abs=0.005)
    assert dense_loss < 0.68  # it learns


def test_a_member_of_a_population_has_the_losses_of_its_single_run(data):
    """In float32, over the first 100 steps, eight seeds with learning rates and weights apart.

    Adam amplifies rounding: at learning rates of 1e-2 a few losses differ by 1e-3.
    """
    experiments = []
    for seed in range(8):
        config = default_config("lasso")
        config.update(seed=seed, learning_rate=1.5e-4 * (1 + seed), target_weight=0.1 + 0.1 * seed)
        experiments.append(make_experiment(config, data))
    static = dict(
        model=experiments[0].model, plan=experiments[0].plan, settings=experiments[0].settings
    )
    start = (jnp.int32(0), jnp.int32(0))
    alone = [
        train_chunk(
            initial_state(experiment),
            experiment.interactions,
            experiment.sampling_key,
            *start,
            experiment.hyper,
            **static,
            num_steps=100,
        )[1]
        for experiment in experiments
    ]
    states, keys, hypers = (
        jax.tree.map(lambda *x: jnp.stack(x), *parts)
        for parts in (
            [initial_state(experiment) for experiment in experiments],
            [experiment.sampling_key for experiment in experiments],
            [experiment.hyper for experiment in experiments],
        )
    )
    _, together = train_population(
        states, experiments[0].interactions, keys, *start, hypers, **static, num_steps=100
    )
    for name in ("target_loss", "source_loss"):
        single = np.stack([np.asarray(sums[name]) for sums in alone])
        np.testing.assert_allclose(together[name], single, rtol=1e-5)
        assert np.ptp(single[:, -1]) > 0.1  # the members differ
