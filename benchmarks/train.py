"""A training step: row-wise Adam against dense Adam, larger tables, bfloat16, whole epochs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import data
from benchmarks.report import Report
from benchmarks.steps import epoch_runner
from conet_jax import devices
from conet_jax.data.types import Dataset
from conet_jax.models.base import Params
from conet_jax.run.experiment import Experiment
from conet_jax.run.start import initial_state
from conet_jax.train import sampling
from conet_jax.train.state import TrainState, settle_in_place, settled
from conet_jax.train.step import joint_objective, plan_rows, train_step, wanted_rows

STEPS = 500  # of our optimiser a timed run
DENSE_STEPS = 50  # of the dense one, which is slower by far


def measure(report: Report, scale: str) -> None:
    """Times steps on batches made beforehand, and steps as in an epoch."""
    dataset = data.dataset(scale)
    for pairing, suffix in (("random", ""), ("same_user", "_same_user")):
        experiment = data.experiment_on(dataset, pairing=pairing)
        count = min(STEPS, experiment.plan.steps)
        dense_count = min(DENSE_STEPS, count)
        steps = _make_steps(experiment, count)
        few = jax.tree.map(lambda x, n=dense_count: x[:n], steps)
        kinds = ("row", "dense", "row_tables_x4", "row_bfloat16")
        names = [f"train_step_{kind}{suffix}" for kind in kinds]
        half = data.experiment_on(dataset, pairing=pairing, dtype="bfloat16")
        epoch = f"train_epoch_step{suffix}"
        seconds = report.time(
            {
                names[0]: (_row_runner(experiment, steps), count),
                names[1]: (_dense_runner(experiment, few), dense_count),
                names[2]: (_row_runner(experiment, steps, times=4), count),
                names[3]: (_row_runner(half, steps), count),
                epoch: (epoch_runner(experiment, count), count),
            }
        )
        row = seconds[names[0]]
        report.ratios[f"train_step_dense_over_row{suffix}"] = seconds[names[1]] / row
        report.ratios[f"train_step_tables_x4{suffix}"] = seconds[names[2]] / row
        report.ratios[f"train_step_bfloat16{suffix}"] = seconds[names[3]] / row
        report.ratios[f"epoch_over_steps{suffix}"] = seconds[epoch] / row
        rows = 2 * experiment.plan.batch_examples
        report.rates[f"train_rows_per_second{suffix}"] = rows / seconds[epoch]
    if jax.devices()[0].platform != "cpu":
        _train_large_batches(report, dataset)


def _train_large_batches(report: Report, dataset: Dataset) -> None:
    """Batches of 1,024 to 1 M examples, against the roofline measured on this device."""
    bandwidth, matrix = _roofline(report)
    for batch in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
        experiment = data.experiment_on(dataset, pairing="same_user", batch_size=batch // 2)
        count = max(1, min(20, experiment.plan.steps))
        name = f"train_epoch_step_batch_{batch}"
        seconds = report.time({name: (epoch_runner(experiment, count), count)})[name]
        state = experiment.abstract_state()
        # A row is read and written once, packed; the towers' arithmetic is forward and backward.
        width = sum(3 * 4 * (table.shape[1]) for table in state.tables.values())
        weights = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.dense))
        ideal = max(2 * batch * width / bandwidth, 3 * 2 * batch * weights / matrix)
        report.rates[f"train_rows_per_second_batch_{batch}"] = 2 * batch / seconds
        report.ratios[f"roofline_over_step_batch_{batch}"] = ideal / seconds


def _roofline(report: Report) -> tuple[float, float]:
    """Measured memory bandwidth (bytes/s) and float32 matrix rate (operations/s)."""
    block = jnp.ones((1 << 28,), jnp.float32)
    square = jnp.ones((8192, 8192), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    multiply = jax.jit(lambda x: x @ x)
    seconds = report.time(
        {
            "roofline_copy_bytes": (lambda: add(block).block_until_ready(), 2.0 * block.nbytes),
            "roofline_matrix_operations": (
                lambda: multiply(square).block_until_ready(),
                2.0 * 8192**3,
            ),
        }
    )
    return 1 / seconds["roofline_copy_bytes"], 1 / seconds["roofline_matrix_operations"]


def _make_steps(experiment: Experiment, num_steps: int) -> tuple[Any, dict[str, devices.Route]]:
    """Batches and row plans of an epoch's first steps, made beforehand."""
    sizes = {name: len(table) for name, table in experiment.abstract_state().tables.items()}

    @jax.jit
    def make() -> Any:
        batches = jax.vmap(
            lambda step: sampling.sample_step(
                experiment.sampling_key,
                jnp.int32(0),
                step,
                experiment.interactions,
                experiment.plan,
            )
        )(jnp.arange(num_steps, dtype=jnp.int32))
        wanted = jax.vmap(lambda b: wanted_rows(experiment.model, b, sizes))(batches)
        return batches, jax.vmap(lambda rows: plan_rows(rows, sizes))(wanted)

    return jax.block_until_ready(make())


def _row_runner(experiment: Experiment, steps: Any, *, times: int = 1) -> Callable[[], None]:
    """Our step over given batches, on tables ``times`` as long as the data needs."""

    @jax.jit
    def longer() -> TrainState:
        state = initial_state(experiment)
        tables = {name: jnp.tile(table, (times, 1)) for name, table in state.tables.items()}
        return state.replace(tables=tables)

    def scan(state: TrainState, steps: Any) -> TrainState:
        def body(state: TrainState, step: Any) -> Any:
            return train_step(
                state, *step, experiment.hyper, model=experiment.model, settings=experiment.settings
            )

        return jax.lax.scan(body, state, steps)[0]

    compiled = jax.jit(scan, donate_argnums=0)
    holder = [compiled(longer(), steps)]
    holder[0] = settle_in_place(holder[0], experiment.hyper.learning_rate)

    def once() -> None:
        holder[0] = jax.block_until_ready(compiled(holder[0], steps))

    return once


def _dense_runner(experiment: Experiment, steps: Any) -> Callable[[], None]:
    """Dense ``optax.adam`` over all parameters: the same batches, scan and donation."""
    optimizer = optax.adam(experiment.hyper.learning_rate)
    batches = steps[0]

    def step(carry: tuple[Params, Any], batch: Any) -> Any:
        params, opt_state = carry

        def objective(params: Params) -> jax.Array:
            ids = experiment.model.lookups(batch)
            rows = {name: params.tables[name][index] for name, index in ids.items()}
            given = experiment.model, params.dense, rows, batch, experiment.hyper
            return joint_objective(*given)[0]

        updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    compiled = jax.jit(lambda carry, b: jax.lax.scan(step, carry, b)[0], donate_argnums=0)
    params = settled(initial_state(experiment), experiment.hyper.learning_rate)
    holder = [(params, optimizer.init(params))]

    def once() -> None:
        holder[0] = jax.block_until_ready(compiled(holder[0], batches))

    return once
