"""Step, exchange and memory of 1, 2, 4, 8 devices; one against plain ``jit`` and ``pmap``.

On a CPU the devices are those that JAX makes of it: they share its cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import data
from benchmarks.report import Report
from benchmarks.steps import epoch_runner
from benchmarks.traffic import chunk_arguments, compile_steps, traffic
from conet_jax import devices
from conet_jax.data.types import Dataset
from conet_jax.run.epoch import CHUNK_STEPS
from conet_jax.run.experiment import Experiment, interactions_on
from conet_jax.run.start import initial_state
from conet_jax.train import sampling
from conet_jax.train.chunk import run_steps
from conet_jax.train.state import init_params, init_state, settle_in_place

DEVICES = (1, 2, 4, 8)
SCALING_STEPS = 20  # the same on several devices, which share the cores of this machine
SCALING = (
    ("conet", 16_384),
    ("recipe", 16_384),
)  # variants and examples a domain, worth many devices


def measure(report: Report, scale: str) -> None:
    """Times and reads off what the module says."""
    dataset = data.dataset(scale)
    for variant, batch in SCALING:
        for n in (n for n in DEVICES if n <= jax.device_count()):
            _scale(report, dataset, variant, batch, n)
    experiment = data.experiment_on(dataset)
    count = min(CHUNK_STEPS, experiment.plan.steps)
    static = dict(
        model=experiment.model, plan=experiment.plan, settings=experiment.settings, num_steps=count
    )
    plain = jax.jit(partial(run_steps, **static), donate_argnums=0)
    seconds = report.time(
        {
            "scaling_step_mapped": (epoch_runner(experiment, count), count),
            "scaling_step_plain_jit": (epoch_runner(experiment, count, plain), count),
            "scaling_step_pmap": (_pmap_runner(experiment, count, static), count),
        }
    )
    cpu_seconds = {row["name"]: row["cpu_seconds"] for row in report.results}
    for other in ("plain_jit", "pmap"):
        for kind, of in (("", seconds), ("_cpu", cpu_seconds)):
            ratio = of["scaling_step_mapped"] / of[f"scaling_step_{other}"]
            report.ratios[f"scaling_mapped_over_{other}{kind}"] = ratio


def _pmap_runner(
    experiment: Experiment, num_steps: int, static: dict[str, Any]
) -> Callable[[], None]:
    """``_epoch_runner`` on one device under ``jax.pmap``, whose arrays have an axis of devices."""
    program = jax.pmap(
        partial(run_steps, **static),
        axis_name=devices.AXIS,
        in_axes=(0, 0, None, None, None, None),
        devices=list(experiment.mesh.devices.flat),
        donate_argnums=0,
    )
    state, interactions = jax.tree.map(
        lambda x: x[None], (initial_state(experiment), experiment.interactions)
    )
    start = np.int32(0)
    arguments = interactions, experiment.sampling_key, start, start, experiment.hyper
    state = jax.tree.map(lambda x: x[0], program(state, *arguments)[0])
    state = settle_in_place(state, experiment.hyper.learning_rate)
    holder = [jax.tree.map(lambda x: x[None], state)]

    def once() -> None:
        holder[0], _ = jax.block_until_ready(program(holder[0], *arguments))

    return once


def _scale(report: Report, dataset: Dataset, variant: str, batch: int, n: int) -> None:
    """One variant and batch size on n devices."""
    experiment = data.experiment_on(dataset, variant, devices=n, batch_size=batch // 2, negatives=1)
    count = min(SCALING_STEPS, experiment.plan.steps)
    # What the recipe's tables hold does not matter, and to fit them takes long.
    params = init_params(experiment.model, experiment.key, experiment.sizes, experiment.mesh)
    state = init_state(experiment.model, params, experiment.settings)
    compiled = compile_steps(experiment, state, count)
    name = f"scaling_{variant}_batch_{batch}_devices_{n}"
    moved = traffic(experiment, compiled, num_steps=count)
    report.rates |= {
        f"{name}_bytes_exchanged": sum(size for _, size in moved["usual"]),
        f"{name}_bytes_of_largest": max((size for _, size in moved["usual"]), default=0.0),
        f"{name}_bytes_of_tables": _held(state.tables),
        f"{name}_bytes_of_interactions": _held(experiment.interactions),
        f"{name}_bytes_of_temporaries": compiled.memory_analysis().temp_size_in_bytes,
        f"{name}_busiest_over_mean": _busiest_over_mean(experiment),
    }
    holder = [compiled(*chunk_arguments(experiment, state))[0]]
    holder[0] = settle_in_place(holder[0], experiment.hyper.learning_rate)

    def once() -> None:
        holder[0] = jax.block_until_ready(compiled(*chunk_arguments(experiment, holder[0])))[0]

    report.time({f"{name}_step": (once, count)})


def _held(tree: Any) -> int:
    """Bytes on the first device."""
    shards = [x.addressable_shards[0] for x in jax.tree.leaves(tree)]
    return sum(shard.data.nbytes for shard in shards)


def _busiest_over_mean(experiment: Experiment) -> float:
    """Distinct rows that the busiest device reads and writes in a step, over the mean device's."""
    interactions = interactions_on(experiment.dataset, devices.one_device())
    n, start = experiment.mesh.size, np.int32(0)
    batch = sampling.sample_step(jax.random.key(0), start, start, interactions, experiment.plan)
    rows = sum(
        np.bincount(np.unique(np.asarray(ids)) // experiment.model.copies % n, minlength=n)
        for ids in experiment.model.lookups(batch).values()
    )
    return float(rows.max() / rows.mean())
