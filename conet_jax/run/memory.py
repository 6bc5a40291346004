"""What a run takes: its devices, precision, parameters and memory, known before it starts."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax.train import sampling
from conet_jax.train.chunk import chunk_lengths


def line(experiment: Any, chunk_steps: int) -> str:
    """Returns the line that a run begins with; the arguments are those of ``memory``."""
    device, n = experiment.mesh.devices.flat[0], experiment.mesh.size
    dtype = experiment.config.dtype
    params = jax.eval_shape(experiment.params, experiment.abstract_state())
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    towers = dtype if dtype == "float32" else f"towers in {dtype}"
    return (
        f"{f'{n} x ' if n > 1 else ''}{device.platform} ({device.device_kind}), {towers}, "
        f"{count:,} parameters, about {memory(experiment, chunk_steps) / 2**20:,.0f} MiB of arrays"
        f"{' a device' if n > 1 else ''}"
    )


def memory(experiment: Any, chunk_steps: int) -> int:
    """Returns the bytes of the arrays of a run on each of its devices, an estimate.

    The training state; a settled copy of the parameters and its projection for the ranker; the
    interactions; the batches of a call of the training program, made beforehand; and the rows of a
    step. Of several devices each has its part of all but dense parameters, and room for all rows
    of a batch, if they were its. On a CPU the process adds its libraries and compilers, half a GiB.

    Args:
      experiment: the run, an ``experiment.Experiment``.
      chunk_steps: most steps a call of the training program.
    """
    n, state = experiment.mesh.size, experiment.abstract_state()
    params = jax.eval_shape(experiment.params, state)
    tables = _bytes(state.tables) + 2 * _bytes(params.tables)
    total = _bytes(state) - _bytes(state.tables) + tables // n
    total += sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(experiment.interactions)
    )
    if experiment.plan is not None:
        length = max(chunk_lengths(experiment.plan.steps, chunk_steps))
        batch, ids = jax.eval_shape(lambda: _step(experiment))
        # What is drawn; each row once, and where it is wanted; of several devices what they ask.
        asked = 4 * _bytes(ids) if n > 1 else 0
        total += length * ((_bytes(batch) + 2 * _bytes(ids)) // n + asked)
        # Rows are read and sent; those that are trained come back as gradients and are written.
        kinds = (params.tables,) if experiment.model.fixed_tables else (state.tables, params.tables)
        total += sum(
            2 * own.size * _bytes_of_row(tables[name])
            for tables in kinds
            for name, own in ids.items()
        )
    return total


def _step(experiment: Any) -> Any:
    """A step's batch on all devices, and the ids of the rows that it reads."""
    batch = sampling.sample_step(
        experiment.sampling_key,
        jnp.int32(0),
        jnp.int32(0),
        experiment.interactions,
        experiment.plan,
    )
    return batch, experiment.model.lookups(batch)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_of_row(table: Any) -> int:
    return table.shape[1] * table.dtype.itemsize


_MAPPINGS_ALLOWED = Path("/proc/sys/vm/max_map_count")


def forget_programs() -> None:
    """Drops compiled programs when half of the memory mappings that Linux allows are taken.

    A program takes hundreds of them and is kept for its next use: some forty runs of different
    shapes in one process would end at "LLVM ERROR: Unable to allocate section memory".
    """
    try:
        allowed = int(_MAPPINGS_ALLOWED.read_text())
        taken = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return  # not Linux
    if taken > allowed // 2:
        jax.clear_caches()


def return_memory() -> None:
    """Hands freed memory back to the system, where the C library (glibc) can.

    Saving and validating free some 100 MB an epoch at the paper's scale, which malloc would keep in
    its arenas: over twelve epochs that was a third of the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
