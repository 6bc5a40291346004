"""Runs of one program against one alone: steps of eight, and 27 recipes from start to end."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data
from benchmarks.report import Report
from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.run import loop
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.studies import population
from conet_jax.train.chunk import chunk_program, train_chunk, train_population
from conet_jax.train.state import SETTLE_STEP, settle_in_place


def measure(report: Report, scale: str) -> None:
    """Times small runs, of whatever scale the rest is."""
    del scale
    dataset = synthetic.dataset(
        num_users=3_000,
        num_target_items=300,
        num_source_items=400,
        target_interactions=15_000,
        source_interactions=90_000,
        dim=3,
        noise=0.15,
        seed=0,
    )[0]
    members = 8
    experiment = data.experiment_on(dataset)
    experiments = [data.experiment_on(dataset, seed=seed) for seed in range(members)]
    steps = experiment.plan.steps

    def states() -> Any:
        return jax.block_until_ready(population.stack([initial_state(t) for t in experiments]))

    keys = jnp.stack([t.sampling_key for t in experiments])
    hypers = population.stack([t.hyper for t in experiments])
    static = dict(
        model=experiment.model, plan=experiment.plan, settings=experiment.settings, num_steps=steps
    )

    def eight(compiled: Any, state: Any, epoch: int = 0) -> Any:
        out = compiled(state, experiment.interactions, keys, jnp.int32(epoch), jnp.int32(0), hypers)
        return jax.block_until_ready(out)[0]

    def one(compiled: Any, state: Any, epoch: int = 0) -> Any:
        arguments = (
            experiment.interactions,
            experiment.sampling_key,
            jnp.int32(epoch),
            jnp.int32(0),
        )
        return jax.block_until_ready(compiled(state, *arguments, experiment.hyper))[0]

    def compile_program(lower: Any, state: Any, key: Any, hyper: Any) -> Any:
        arguments = (state, experiment.interactions, key, jnp.int32(0), jnp.int32(0), hyper)
        return lower(*arguments, **static).compile()

    compile_seconds, programs = {}, {}
    one_program = partial(chunk_program.lower, mesh=experiment.mesh)
    for name, lower, state, key, hyper in (
        ("one", one_program, initial_state(experiment), experiment.sampling_key, experiment.hyper),
        ("eight", train_population.lower, states(), keys, hypers),
    ):
        began = time.perf_counter()
        programs[name] = compile_program(lower, state, key, hyper)
        compile_seconds[name] = time.perf_counter() - began
    rate = experiment.hyper.learning_rate
    holder = {"one": initial_state(experiment), "eight": states()}
    settle = jax.jit(jax.vmap(settle_in_place, in_axes=(0, None)))
    warm = -(-SETTLE_STEP // steps)
    for epoch in range(warm):
        holder["one"] = one(programs["one"], holder["one"], epoch)
        holder["eight"] = eight(programs["eight"], holder["eight"], epoch)
    holder["one"] = settle_in_place(holder["one"], rate)
    holder["eight"] = settle(holder["eight"], rate)

    def run_one() -> None:
        holder["one"] = one(programs["one"], holder["one"])

    def run_eight() -> None:
        holder["eight"] = eight(programs["eight"], holder["eight"])

    seconds = report.time(
        {"population_step_1": (run_one, steps), "population_step_8": (run_eight, steps)}
    )
    ratio = seconds["population_step_8"] / seconds["population_step_1"]
    report.ratios["population_8_over_1"] = ratio
    # A run of the demo is its compilation and some twenty epochs.
    epochs = 20
    whole = {
        name: compile_seconds[name] + epochs * steps * seconds[f"population_step_{count}"]
        for name, count in (("one", 1), ("eight", 8))
    }
    report.ratios["population_8_over_1_with_compilation"] = whole["eight"] / whole["one"]
    _recipes(report)


def _recipes(report: Report) -> None:
    """A sweep of 27 learning rates of a recipe, beside one of its runs: search, start, training.

    Both compiled, two epochs each, and none is tested. And a step of all beside one of a run.
    """
    members, steps = 27, 10
    dataset = synthetic.dataset(
        num_users=1_000,
        num_target_items=300,
        num_source_items=400,
        target_interactions=5_000,
        source_interactions=20_000,
        seed=0,
    )[0]
    config = default_config("recipe")
    config.update({"devices": 1, "epochs": 2, "patience": 99})
    configs = []
    for rate in np.geomspace(1e-4, 1e-2, members):
        configs.append(config.copy_and_resolve_references())
        configs[-1].learning_rate = float(rate)

    def alone() -> None:
        experiment = make_experiment(config, dataset)
        list(loop.train(experiment, initial_state(experiment)))

    def together() -> None:
        with tempfile.TemporaryDirectory() as folder:
            population.train(configs, dataset, Path(folder))

    seconds = report.time({"recipe": (alone, 1), "recipes_27": (together, members)})
    report.ratios["population_recipe_27_over_27_runs"] = seconds["recipes_27"] / seconds["recipe"]
    experiment = make_experiment(configs[0], dataset)
    experiments = [experiment.member(config) for config in configs]
    holder = {"one": initial_state(experiment), "all": population.start(experiments)}
    hypers = {"one": experiment.hyper, "all": population.stack([x.hyper for x in experiments])}

    def run(which: str, train: Any) -> None:
        given = experiment.interactions, experiment.sampling_key, jnp.int32(0), jnp.int32(0)
        static = {"plan": experiment.plan, "settings": experiment.settings, "num_steps": steps}
        state, sums = train(holder[which], *given, hypers[which], model=experiment.model, **static)
        holder[which] = state
        jax.block_until_ready(sums)

    seconds = report.time(
        {
            "recipe_step": (partial(run, "one", train_chunk), steps),
            "recipe_step_27": (partial(run, "all", train_population), steps * members),
        }
    )
    ratio = seconds["recipe_step_27"] / seconds["recipe_step"]
    report.ratios["population_recipe_step_27_over_27"] = ratio
