"""Steps of an epoch in one compiled program, on all devices; many runs in one program."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from conet_jax import devices
from conet_jax.devices.axis import SAME
from conet_jax.models.base import Batch, Hyper, Model, Params
from conet_jax.train import sampling
from conet_jax.train.interactions import Interactions
from conet_jax.train.state import PARAMS, Settings, TrainState, state_specs
from conet_jax.train.step import plan_rows, train_step, wanted_rows


def run_steps(
    state: TrainState,
    interactions: dict[str, Interactions],
    key: jax.Array,
    epoch: jax.Array,
    first_step: jax.Array,
    hyper: Hyper,
    *,
    model: Model,
    plan: sampling.Plan,
    settings: Settings,
    num_steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs steps ``first_step`` … ``first_step + num_steps - 1`` of an epoch in one ``lax.scan``.

    Args:
      state: state before.
      interactions: training positives by domain.
      key: the run's PRNG key; everything random is folded from (key, epoch, step).
      epoch: int32[], from 0.
      first_step: int32[], within the epoch.
      hyper: real-valued hyper-parameters, traced.
      model: the model.
      plan: the epoch's layout.
      settings: static choices.
      num_steps: length of the scan.

    Returns:
      (state after, {name: f32[num_steps]} sums of ``train_step``).
    """
    num_rows = {name: packed.shape[0] for name, packed in state.tables.items()}
    steps = first_step + jnp.arange(num_steps, dtype=jnp.int32)
    batches = jax.vmap(lambda s: sampling.sample_step(key, epoch, s, interactions, plan))(steps)
    wanted = jax.vmap(lambda batch: wanted_rows(model, batch, num_rows))(batches)
    graph = None if model.graph is None else model.graph(interactions)  # once, not every step

    def run(state: TrainState, *, all_fit: bool) -> Any:
        plan_each = jax.vmap(
            lambda rows: plan_rows(rows, num_rows, all_fit=all_fit), axis_size=num_steps
        )  # there may be no table
        rows_read = plan_each(wanted)

        def body(state: TrainState, step: tuple[Batch, dict[str, devices.Route]]) -> Any:
            batch, rows_read = step
            batch = batch._replace(graph=graph)
            return train_step(state, batch, rows_read, hyper, model=model, settings=settings)

        return jax.lax.scan(body, state, (batches, rows_read))

    if devices.size() == 1:
        return run(state, all_fit=True)
    fits = devices.fits(list(wanted.values()))
    return jax.lax.cond(fits, partial(run, all_fit=True), partial(run, all_fit=False), state)


def train_chunk(
    state: TrainState, interactions: dict[str, Interactions], *args: Any, **static: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """``run_steps`` compiled, on all devices of the state, which is donated: updated in place."""
    return chunk_program(state, interactions, *args, **static, mesh=devices.mesh_of(state))


@partial(
    jax.jit, static_argnames=("model", "plan", "settings", "num_steps", "mesh"), donate_argnums=0
)
def chunk_program(
    state: TrainState,
    interactions: dict[str, Interactions],
    key: jax.Array,
    epoch: jax.Array,
    first_step: jax.Array,
    hyper: Hyper,
    *,
    mesh: jax.sharding.Mesh,
    **static: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """What ``train_chunk`` runs: ``run_steps`` mapped over the axis ``mesh``."""
    specs = {domain: own.specs() for domain, own in interactions.items()}
    on_devices = state_specs(state.fixed_tables)
    in_specs = (on_devices, specs, SAME, SAME, SAME, SAME)
    run = devices.mapped(partial(run_steps, **static), mesh, in_specs, (on_devices, SAME))
    return run(state, interactions, key, epoch, first_step, hyper)


@partial(jax.jit, static_argnames=("model", "plan", "settings", "num_steps"), donate_argnums=0)
def train_population(
    states: TrainState,
    interactions: dict[str, Interactions],
    keys: jax.Array,
    epoch: jax.Array,
    first_step: jax.Array,
    hypers: Hyper,
    *,
    model: Model,
    plan: sampling.Plan,
    settings: Settings,
    num_steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """``train_chunk`` for a population of runs in one program: ``vmap`` over seeds and ``Hyper``.

    What members share is there, and computed, once: fixed tables, and of members of one seed the
    batches and what is read for them.

    Args:
      states: states before, each leaf but fixed tables with a leading axis of members; donated.
      interactions: training positives by domain, shared.
      keys: PRNG keys [members], or the one of all.
      epoch: int32[], shared.
      first_step: int32[], shared.
      hypers: each field f32[members].
      model: the model.
      plan: the epoch's layout.
      settings: static choices.
      num_steps: length of the scan.

    Returns:
      (states after, {name: f32[members, num_steps]}); a member is the run that it would be alone.
    """

    def member(state: TrainState, key: jax.Array, hyper: Hyper) -> Any:
        return run_steps(
            state,
            interactions,
            key,
            epoch,
            first_step,
            hyper,
            model=model,
            plan=plan,
            settings=settings,
            num_steps=num_steps,
        )

    axes = member_axes(states)
    in_axes = axes, 0 if keys.ndim else None, 0
    return jax.vmap(member, in_axes=in_axes, out_axes=(axes, 0))(states, keys, hypers)


def member_axes(states: TrainState) -> TrainState:
    """Returns the axis of members of each part of the states of a population, as ``vmap`` has it.

    Fixed tables have none: members that differ in ``Hyper`` alone have the same.
    """
    tables = None if states.fixed_tables else 0
    return states.replace(step=0, tables=tables, dense=0, opt_state=0)


def chunk_lengths(steps: int, longest: int, done: int = 0) -> list[int]:
    """Splits an epoch of ``steps`` into chunks of at most ``longest``, equal where it can be.

    Each distinct length is a compilation, so an even split is looked for before a remainder. Of an
    epoch of which ``done`` steps are done those chunks are left out.

    >>> chunk_lengths(1000, 400)
    [250, 250, 250, 250]
    >>> chunk_lengths(7, 5)
    [5, 2]
    >>> chunk_lengths(7, 5, done=5)
    [2]
    """
    if done:
        lengths = chunk_lengths(steps, longest)
        before = [sum(lengths[:at]) for at in range(len(lengths) + 1)]
        if done in before:
            return lengths[before.index(done) :]
        steps -= done  # in other chunks, by another version: what is left is split anew
    for length in range(min(longest, steps), max(1, longest // 2), -1):
        if steps % length == 0:
            return [length] * (steps // length)
    length = min(longest, steps)
    return [length] * (steps // length) + ([steps % length] if steps % length else [])


def diagnose(
    params: Params, interactions: dict[str, Interactions], *args: Any, **static: Any
) -> dict[str, jax.Array]:
    """Returns ``Model.diagnostics`` on the last batch of an epoch, in which both domains meet."""
    return _diagnose(params, interactions, *args, **static, mesh=devices.mesh_of(params))


@partial(jax.jit, static_argnames=("model", "plan", "mesh"))
def _diagnose(
    params: Params,
    interactions: dict[str, Interactions],
    key: jax.Array,
    epoch: jax.Array,
    *,
    model: Model,
    plan: sampling.Plan,
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
    def run(params: Params, interactions: Any, key: jax.Array, epoch: jax.Array) -> Any:
        step = jnp.int32(plan.steps - 1)
        batch = sampling.sample_step(key, epoch, step, interactions, plan)
        parts = {name: value for name, value in batch._asdict().items() if name not in _OF_A_STEP}
        # Norms are over the batch: every device has all of it.
        joined = jax.tree.map(lambda x: x[: plan.batch_examples], devices.all_gather(parts))
        batch = batch._replace(**joined)
        rows = {
            name: devices.read_everywhere(params.tables[name], ids)
            for name, ids in model.lookups(batch).items()
        }
        return model.diagnostics(params.dense, rows, batch)

    specs = {domain: own.specs() for domain, own in interactions.items()}
    mapped = devices.mapped(run, mesh, (PARAMS, specs, SAME, SAME), SAME)
    return mapped(params, interactions, key, epoch)


_OF_A_STEP = ("cross", "key")
