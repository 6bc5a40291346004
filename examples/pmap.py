"""The training step of conet_jax under ``jax.pmap``, against the product's own mapping.

python examples/pmap.py

``run_steps`` is a function of one device with a named axis; ``train_chunk`` maps it by
``jit(shard_map)``, and here ``jax.pmap`` does, on the same two devices with the same arrays: each
device has its part of the batch and of the tables' rows, gradients and losses are summed.
"""

import os

# Two devices, made of the CPU; before jax is imported. Float64, in which rounding is no excuse.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_ENABLE_X64"] = "1"

from functools import partial
from typing import Any

import jax
import numpy as np

from conet_jax import devices
from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.train.chunk import run_steps, train_chunk

STEPS = 20


def by_device(tree: Any, specs: Any) -> Any:
    """Arrays as ``pmap`` wants them: what is split gets a leading axis of devices."""

    def part(x: jax.Array, spec: Any) -> Any:
        x = np.asarray(x)
        split = spec == devices.SPLIT
        return x.reshape(2, len(x) // 2, *x.shape[1:]) if split else np.stack([x, x])

    return jax.tree.map(part, tree, specs)


def specs_of(tree: Any) -> Any:
    """How each array of a pytree lies on the devices."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


config = default_config("conet")
config.update(layers=(8, 4), cross_layers=1, batch_size=32, devices=2)
data = synthetic.dataset(
    num_users=200,
    num_target_items=150,
    num_source_items=160,
    target_interactions=1_500,
    source_interactions=2_500,
    seed=0,
)[0]
experiment = make_experiment(config, data)
static = dict(
    model=experiment.model,
    plan=experiment.plan,
    settings=experiment.settings,
    num_steps=STEPS,
)
start = np.int32(0)
arguments = (experiment.sampling_key, start, start, experiment.hyper)

state, interactions = initial_state(experiment), experiment.interactions
specs = specs_of(state)
program = jax.pmap(
    partial(run_steps, **static), axis_name=devices.AXIS, in_axes=(0, 0, None, None, None, None)
)
theirs, their_sums = program(
    by_device(state, specs), by_device(interactions, specs_of(interactions)), *arguments
)
ours, our_sums = train_chunk(state, interactions, *arguments, **static)

pairs = zip(
    jax.tree.leaves((by_device(ours, specs), our_sums)),
    jax.tree.leaves((theirs, jax.tree.map(lambda x: x[0], their_sums))),
    strict=True,
)
largest = max(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in pairs)
first, last = (float(our_sums["target_loss"][at] / our_sums["target_count"][at]) for at in (0, -1))
print(
    f"{STEPS} steps on {len(jax.devices())} devices, loss {first:.4f} to {last:.4f}: "
    f"largest difference between pmap and train_chunk {largest:.1e}"
)
