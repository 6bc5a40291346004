"""What devices exchange in a step, read off the text of the compiled program."""

import math
import re
from typing import Any

import jax
import numpy as np

from conet_jax import devices
from conet_jax.run.experiment import Experiment, interactions_on
from conet_jax.train import sampling
from conet_jax.train.chunk import chunk_program

_COLLECTIVE = re.compile(
    r"= (.+?) (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def compile_steps(experiment: Experiment, state: Any, num_steps: int) -> Any:
    """Compiles a chunk of steps; call it with ``chunk_arguments``."""
    return chunk_program.lower(
        *chunk_arguments(experiment, state),
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=num_steps,
        mesh=experiment.mesh,
    ).compile()


def chunk_arguments(experiment: Experiment, state: Any) -> tuple[Any, ...]:
    """Returns the arguments of a chunk of the first epoch from its first step."""
    start = np.int32(0)
    return state, experiment.interactions, experiment.sampling_key, start, start, experiment.hyper


def traffic(experiment: Experiment, compiled: Any, *, num_steps: int = 1) -> dict[str, Any]:
    """Reads off a compiled chunk of steps what its devices exchange in a step.

    Returns:
      ``collectives`` and ``usual``: see above; ``batch_rows`` (of the table that a batch reads
      most of), ``rows_a_device`` (of these), ``capacity`` (rows of the exchange's buffer on a
      device), ``row_width``, ``dense_bytes``.
    """
    everything, usual = collectives(compiled.as_text(), num_steps)
    state, start = experiment.abstract_state(), np.int32(0)
    interactions = interactions_on(experiment.dataset, devices.one_device())

    def ids() -> Any:
        key = jax.random.key(0)
        batch = sampling.sample_step(key, start, start, interactions, experiment.plan)
        return experiment.model.lookups(batch)

    n, rows = experiment.mesh.size, max(x.size for x in jax.eval_shape(ids).values())
    each = -(-rows // n)
    return {
        "collectives": everything,
        "usual": usual,
        "batch_rows": n * each,
        "rows_a_device": each,
        "capacity": n * devices.capacity(each, n),
        "row_width": max(
            x.shape[1] for x in jax.eval_shape(experiment.params, state).tables.values()
        ),
        "dense_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.dense)),
    }


def collectives(
    program: str, num_steps: int = 1
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Reads what devices exchange in a step off the text of a compiled chunk of steps.

    Args:
      program: HLO.
      num_steps: steps of its loop, for all of which what stands outside of the loop is.

    Returns:
      ([(operation, bytes of its result on a device), …] of all, and of those that run where rows
      fit their usual room, see ``devices.capacity``).
    """
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def of(name: str, share: float, first_branch: int) -> list[tuple[str, float]]:
        found = []
        for line in bodies[name]:
            operation = _COLLECTIVE.search(line)
            if operation:
                found.append((operation[2], share * _bytes(operation[1])))
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            called = branches[1].split(",")[first_branch:] if branches else []
            ways = re.search(r"true_computation=(\S+?), false_computation=([^,\s]+)", line)
            if ways:
                called = [ways[2], ways[1]][first_branch:]
            called += re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
            for callee in called:
                found += of(callee.strip(" %,"), share, first_branch)
            for callee in re.findall(r"body=%?([\w.-]+)", line):
                found += of(callee, 1.0, first_branch)
        return found

    return of(entry, 1 / num_steps, 0), of(entry, 1 / num_steps, 1)


def _bytes(shape: str) -> int:
    """Bytes of the arrays in a shape of HLO.

    >>> _bytes("(f32[8,4]{1,0}, s32[], pred[3])")
    135
    """
    return sum(
        int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for bits, dims in _ARRAY.findall(shape)
    )
