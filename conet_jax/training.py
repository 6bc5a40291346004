"""Training as pure functions: state, step, and a chunk of an epoch in one compiled program.

The model's code does not know how its tables are updated: a step reads the rows of its batch
brought up to date, differentiates the loss with respect to them, and writes them back
(``row_adam``); the dense parameters take the L1-augmented Adam of ``optimizers``.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from conet_jax import optimizers, sampling
from conet_jax.models.base import Batch, Hyper, Model, Params
from conet_jax.row_adam import RowAdam, fixed, merge_ids, row_adam

TABLE_ADAM = row_adam()
_FIXED = fixed()
# Rows last written before this step are brought up to date by a sum, later ones by the closed form
# (row_adam): settling every row once, here, ends the need for the sum.
SETTLE_STEP = TABLE_ADAM.closed_from


@flax.struct.dataclass
class TrainState:
    """State of a run.

    Attributes:
      step: int32[], Adam steps done.
      tables: {name: f32[rows, 3 dim + 1]}, packed for ``row_adam``; f32[rows, dim] if fixed.
      dense: dense parameters.
      opt_state: optax state of the dense parameters.
      fixed_tables: whether the tables stay as they are, see ``Model``.
    """

    step: jax.Array
    tables: dict[str, jax.Array]
    dense: Any
    opt_state: Any
    fixed_tables: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def adam(self) -> RowAdam:
        """What trains the tables."""
        return _FIXED if self.fixed_tables else TABLE_ADAM


class Settings(NamedTuple):
    """Static choices of the optimisation (``design.md``'s table).

    Attributes:
      reduction: "sum" or "mean" of the examples' losses in a step.
      l1_method: "subgradient", "proximal" or "group", see ``optimizers.l1_adam``.
      clip_norm: largest gradient norm of each variable (a table's over the rows of the batch); 0
        is no clipping.
      loss_scale: factor on the loss of a step, not on the penalty.
    """

    reduction: str = "sum"
    l1_method: str = "subgradient"
    clip_norm: float = 0.0
    loss_scale: float = 1.0


def _dense_optimizer(
    model: Model, settings: Settings, learning_rate: jax.Array | float, l1: jax.Array | float
) -> optax.GradientTransformation:
    return optimizers.l1_adam(
        learning_rate,
        l1=l1,
        method=settings.l1_method,
        mask=model.l1_mask,
        clip_norm=settings.clip_norm or None,
    )


def init_state(model: Model, params: Params, settings: Settings) -> TrainState:
    """Returns the state before the first step."""
    adam = _FIXED if model.fixed_tables else TABLE_ADAM
    return TrainState(
        step=jnp.int32(0),
        tables={name: adam.init(table) for name, table in params.tables.items()},
        dense=params.dense,
        opt_state=_dense_optimizer(model, settings, 0.0, 0.0).init(params.dense),
        fixed_tables=model.fixed_tables,
    )


@jax.jit
def settled(state: TrainState, learning_rate: jax.Array) -> Params:
    """Returns a copy of the parameters with every row brought to the current step."""
    tables = {
        name: state.adam.settle(packed, state.step, learning_rate)
        for name, packed in state.tables.items()
    }
    return Params(tables, state.dense)


@partial(jax.jit, donate_argnums=0)
def settle_in_place(state: TrainState, learning_rate: jax.Array) -> TrainState:
    """Brings every row of the state to the current step (see ``SETTLE_STEP``)."""
    tables = {
        name: state.adam.settle_packed(packed, state.step, learning_rate)
        for name, packed in state.tables.items()
    }
    return state.replace(tables=tables)


class RowPlan(NamedTuple):
    """Ids of one table in a step with duplicates merged, see ``row_adam.merge_ids``."""

    unique: jax.Array
    inverse: jax.Array


def plan_rows(model: Model, batch: Batch, num_rows: dict[str, int]) -> dict[str, RowPlan]:
    """Merges the duplicate ids of a step; ``inverse`` has the shapes of ``model.lookups``."""
    plans = {}
    for name, ids in model.lookups(batch).items():
        unique, inverse = merge_ids(ids.reshape(-1), num_rows[name])
        plans[name] = RowPlan(unique, inverse.reshape(ids.shape))
    return plans


def train_step(
    state: TrainState,
    batch: Batch,
    rows_read: dict[str, RowPlan],
    hyper: Hyper,
    *,
    model: Model,
    settings: Settings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of Adam on the joint loss of a batch.

    Args:
      state: state before.
      batch: examples.
      rows_read: from ``plan_rows``.
      hyper: real-valued hyper-parameters.
      model: the model.
      settings: static choices.

    Returns:
      (state after, sums and counts of ``Model.loss`` at the parameters before).
    """
    rate = hyper.learning_rate
    rows = {
        name: state.adam.read(state.tables[name], plan.unique, state.step, rate)
        for name, plan in rows_read.items()
    }

    def objective(dense: Any, values: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        looked_up = {name: values[name][plan.inverse] for name, plan in rows_read.items()}
        value, sums = model.loss(dense, looked_up, batch, hyper, reduction=settings.reduction)
        return settings.loss_scale * value, sums

    values = {name: state.adam.values(row) for name, row in rows.items()}
    (_, sums), (dense_grads, row_grads) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(state.dense, values)

    # l1 weighs the norm against the mean loss per example: beside a sum it counts once an example.
    # Where nothing crosses there is no penalty.
    l1 = hyper.l1 * batch.cross
    if settings.reduction == "sum":
        counts = [count for name, count in sums.items() if name.endswith("_count")]
        l1 = l1 * jnp.max(jnp.stack(counts))
    optimizer = _dense_optimizer(model, settings, rate, l1)
    updates, opt_state = optimizer.update(dense_grads, state.opt_state, state.dense)
    dense = optax.apply_updates(state.dense, updates)
    if settings.clip_norm:
        clip = optimizers.clip_by_variable_norm(settings.clip_norm)
        row_grads, _ = clip.update(row_grads, clip.init(row_grads))
    tables = {
        name: state.adam.write(
            state.tables[name], plan.unique, rows[name], row_grads[name], state.step, rate
        )
        for name, plan in rows_read.items()
    }
    after = state.replace(step=state.step + 1, tables=tables, dense=dense, opt_state=opt_state)
    return after, sums


def run_steps(
    state: TrainState,
    interactions: dict[str, sampling.Interactions],
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
      (state after, {name: f32[num_steps]} sums and counts of ``Model.loss``).
    """
    num_rows = {name: packed.shape[0] for name, packed in state.tables.items()}
    steps = first_step + jnp.arange(num_steps, dtype=jnp.int32)
    batches = jax.vmap(lambda s: sampling.sample_step(key, epoch, s, interactions, plan))(steps)
    rows_read = jax.vmap(lambda batch: plan_rows(model, batch, num_rows))(batches)

    def body(state: TrainState, step: tuple[Batch, dict[str, RowPlan]]) -> Any:
        return train_step(state, *step, hyper, model=model, settings=settings)

    return jax.lax.scan(body, state, (batches, rows_read))


train_chunk = jax.jit(
    run_steps, static_argnames=("model", "plan", "settings", "num_steps"), donate_argnums=0
)
"""``run_steps`` compiled, with the state donated: tables are updated in place."""


@partial(jax.jit, static_argnames=("model", "plan", "settings", "num_steps"), donate_argnums=0)
def train_population(
    states: TrainState,
    interactions: dict[str, sampling.Interactions],
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

    Args:
      states: states before, each leaf with a leading axis of members; donated.
      interactions: training positives by domain, shared.
      keys: PRNG keys [members].
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

    return jax.vmap(member)(states, keys, hypers)


def chunk_lengths(steps: int, longest: int) -> list[int]:
    """Splits an epoch of ``steps`` into chunks of at most ``longest``, equal where it can be.

    Each distinct length is a compilation, so an even split is looked for before a remainder.

    >>> chunk_lengths(1000, 400)
    [250, 250, 250, 250]
    >>> chunk_lengths(7, 5)
    [5, 2]
    """
    for length in range(min(longest, steps), max(1, longest // 2), -1):
        if steps % length == 0:
            return [length] * (steps // length)
    length = min(longest, steps)
    return [length] * (steps // length) + ([steps % length] if steps % length else [])


@partial(jax.jit, static_argnames=("model", "plan"))
def diagnose(
    params: Params,
    interactions: dict[str, sampling.Interactions],
    key: jax.Array,
    epoch: jax.Array,
    *,
    model: Model,
    plan: sampling.Plan,
) -> dict[str, jax.Array]:
    """Returns ``Model.diagnostics`` on the last batch of an epoch, in which both domains meet."""
    step = jnp.int32(plan.steps - 1)
    batch = sampling.sample_step(key, epoch, step, interactions, plan)
    rows = {name: params.tables[name][ids] for name, ids in model.lookups(batch).items()}
    return model.diagnostics(params.dense, rows, batch)
