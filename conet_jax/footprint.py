"""What a run takes: its device, precision, parameters and memory, known before it starts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import sampling, training


def line(task: Any, chunk_steps: int) -> str:
    """Returns the line that a run begins with; the arguments are those of ``memory``."""
    device = jax.devices()[0]
    params = jax.eval_shape(task.params, task.abstract_state())
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    towers = f"towers in {task.config.dtype}" if task.config.dtype != "float32" else "float32"
    return (
        f"{device.platform} ({device.device_kind}), {towers}, {count:,} parameters, about "
        f"{memory(task, chunk_steps) / 2**20:,.0f} MiB of arrays"
    )


def memory(task: Any, chunk_steps: int) -> int:
    """Returns the bytes of the arrays of a run on its device, an estimate.

    The training state; a settled copy of the parameters and its projection for the ranker; the
    interactions; and the batches of a call of the training program, made beforehand. On a CPU the
    process adds its libraries and compilers, half a GiB.

    Args:
      task: the run, an ``experiment.Task``.
      chunk_steps: most steps a call of the training program.
    """
    state = task.abstract_state()
    total = _bytes(state) + 2 * _bytes(jax.eval_shape(task.params, state))
    total += _bytes(task.interactions)
    if task.plan is not None:
        length = max(training.chunk_lengths(task.plan.steps, chunk_steps))
        # Twice: what is drawn, and what is sorted to find the duplicates in it.
        total += 2 * length * _bytes(jax.eval_shape(lambda: _step(task)))
    return total


def _step(task: Any) -> Any:
    """A step's batch, and the rows that it reads: each once, and where each is wanted."""
    batch = sampling.sample_step(
        task.sampling_key, jnp.int32(0), jnp.int32(0), task.interactions, task.plan
    )
    return batch, task.model.lookups(batch), task.model.lookups(batch)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
