"""What a run takes: its devices, precision, parameters and memory, known before it starts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import sampling, training


def line(task: Any, chunk_steps: int) -> str:
    """Returns the line that a run begins with; the arguments are those of ``memory``."""
    device, n = task.mesh.devices.flat[0], task.mesh.size
    params = jax.eval_shape(task.params, task.abstract_state())
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    towers = f"towers in {task.config.dtype}" if task.config.dtype != "float32" else "float32"
    return (
        f"{f'{n} x ' if n > 1 else ''}{device.platform} ({device.device_kind}), {towers}, "
        f"{count:,} parameters, about {memory(task, chunk_steps) / 2**20:,.0f} MiB of arrays"
        f"{' a device' if n > 1 else ''}"
    )


def memory(task: Any, chunk_steps: int) -> int:
    """Returns the bytes of the arrays of a run on each of its devices, an estimate.

    The training state; a settled copy of the parameters and its projection for the ranker; the
    interactions; the batches of a call of the training program, made beforehand; and the rows of a
    step. Of several devices each has its part of all but dense parameters, and room for all rows
    of a batch, if they were its. On a CPU the process adds its libraries and compilers, half a GiB.

    Args:
      task: the run, an ``experiment.Task``.
      chunk_steps: most steps a call of the training program.
    """
    n, state = task.mesh.size, task.abstract_state()
    params = jax.eval_shape(task.params, state)
    tables = _bytes(state.tables) + 2 * _bytes(params.tables)
    total = _bytes(state) - _bytes(state.tables) + tables // n
    total += sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(task.interactions)
    )
    if task.plan is not None:
        length = max(training.chunk_lengths(task.plan.steps, chunk_steps))
        batch, ids = jax.eval_shape(lambda: _step(task))
        # What is drawn; each row once, and where it is wanted; of several devices what they ask.
        asked = 4 * _bytes(ids) if n > 1 else 0
        total += length * ((_bytes(batch) + 2 * _bytes(ids)) // n + asked)
        # Rows are read and sent; those that are trained come back as gradients and are written.
        kinds = (params.tables,) if task.model.fixed_tables else (state.tables, params.tables)
        total += sum(
            2 * own.size * _bytes_of_row(tables[name])
            for tables in kinds
            for name, own in ids.items()
        )
    return total


def _step(task: Any) -> Any:
    """A step's batch on all devices, and the ids of the rows that it reads."""
    batch = sampling.sample_step(
        task.sampling_key, jnp.int32(0), jnp.int32(0), task.interactions, task.plan
    )
    return batch, task.model.lookups(batch)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_of_row(table: Any) -> int:
    return table.shape[1] * table.dtype.itemsize
