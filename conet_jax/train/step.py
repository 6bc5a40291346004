"""One step: Adam on the joint loss of a batch (Eq. 7).

The model's code does not know how its tables are updated: a step reads the rows of its batch
brought up to date, differentiates the loss with respect to them, and writes them back
(``row_adam``); the dense parameters take the L1-augmented Adam of ``optimizers``.

``train_step`` is a function of one device on the axis of ``devices``: each device has its part of
the batch and of the tables' rows, and gradients and losses are summed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from conet_jax import devices, losses, optimizers
from conet_jax.models.base import Batch, Hyper, Model
from conet_jax.train.state import Settings, TrainState, dense_optimizer


def wanted_rows(model: Model, batch: Batch, num_rows: dict[str, int]) -> dict[str, devices.Wanted]:
    """Merges the duplicate ids that a step reads of each table.

    Fixed tables of one device get no gradients, and are read as the ids stand.
    """
    if model.fixed_tables and devices.size() == 1:
        return {name: devices.as_they_are(ids) for name, ids in model.lookups(batch).items()}
    return {name: devices.group(ids, num_rows[name]) for name, ids in model.lookups(batch).items()}


def plan_rows(
    wanted: dict[str, devices.Wanted], num_rows: dict[str, int], *, all_fit: bool = True
) -> dict[str, devices.Route]:
    """Plans the reads and writes of a step; without ``all_fit`` with room for the worst case."""
    plans = {}
    for name, rows in wanted.items():
        count = rows.rows.shape[0]
        room = devices.capacity(count) if all_fit else count
        plans[name] = devices.route(rows, num_rows[name], room)
    return plans


def joint_objective(
    model: Model, dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The joint loss of a batch (Eq. 7): alpha L_target + (1 - alpha) L_source, each a sum (Eq. 5).

    Args:
      model: the model; of one domain its loss alone.
      dense: dense parameters.
      rows: embedding rows in the shapes of ``Model.lookups`` with the dimension appended.
      batch: examples.
      hyper: target weight alpha, and what the model reads.

    Returns:
      (f32[], with penalties; {name: f32[]}: ``<domain>_loss``, summed over examples in nats and
      without penalties, and ``<domain>_count``, the examples).
    """
    alpha = {"target": hyper.target_weight, "source": 1.0 - hyper.target_weight}
    each = model.losses(dense, rows, batch, hyper)
    penalised = model.penalties(dense, rows, batch, hyper) if model.penalties else {}
    weights = model.weights(rows, batch) if model.weights else {}
    value, sums = jnp.zeros(()), {}
    for domain in model.domains:
        weight = weights.get(domain, getattr(batch, domain).weights)
        loss = losses.reduced(each[domain], weights=weight)
        sums |= {f"{domain}_loss": loss, f"{domain}_count": weight.sum()}
        if domain in penalised:
            loss = losses.reduced(each[domain] + penalised[domain], weights=weight)
        value = value + (alpha[domain] * loss if len(model.domains) > 1 else loss)
    if model.penalty is not None:
        # Like lambda, against the mean loss per example; each device bears an equal share.
        counts = devices.pmean([sums[f"{domain}_count"] for domain in model.domains])
        value = value + batch.cross * model.penalty(dense, hyper) * jnp.max(jnp.stack(counts))
    return value, sums


def train_step(
    state: TrainState,
    batch: Batch,
    rows_read: dict[str, devices.Route],
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
      (state after, sums and counts of ``joint_objective`` at the parameters before). Under
      ``settings.watch`` a step whose losses or gradients are not finite is not taken: the state
      after is the state before, its ``step`` too; and the sums have ``bad_gradient`` i32[], the
      place in ``parameter_names`` of the first parameter whose gradient is not finite, else -1.
    """
    rate = hyper.learning_rate
    rows = {
        name: state.adam.read(state.tables[name], way.unique, state.step, rate)
        for name, way in rows_read.items()
    }

    def objective(dense: Any, values: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        looked_up = {name: devices.arranged(values[name], way) for name, way in rows_read.items()}
        value, sums = joint_objective(model, dense, looked_up, batch, hyper)
        return settings.loss_scale * value, sums

    values = {
        name: devices.send(state.adam.values(row), rows_read[name]) for name, row in rows.items()
    }
    (_, sums), (dense_grads, row_grads) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(state.dense, values)
    probes = {} if state.fixed_tables or not settings.watch else _probe(row_grads, settings)
    sums, dense_grads, probes = devices.psum((sums, dense_grads, probes))
    row_grads = {
        name: devices.send_back(grads, rows_read[name]) for name, grads in row_grads.items()
    }
    # lambda of Eq. 8 weighs the norm against the mean loss per example: in a sum it counts once for
    # each example. Where nothing crosses there is no penalty.
    counted = [count for name, count in sums.items() if name.endswith("_count")]
    l1 = hyper.l1 * batch.cross * jnp.max(jnp.stack(counted))
    optimizer = dense_optimizer(model, settings, rate, l1)
    updates, opt_state = optimizer.update(dense_grads, state.opt_state, state.dense)
    dense = optax.apply_updates(state.dense, updates)
    if settings.clip_norm:
        clip = optimizers.clip_by_variable_norm(settings.clip_norm, axis_name=devices.axis_name())
        row_grads, _ = clip.update(row_grads, clip.init(row_grads))
    step = state.step + 1
    unique = {name: way.unique for name, way in rows_read.items()}
    if settings.watch:
        probes = jax.tree.leaves((probes, _probe(dense_grads, settings)))
        sound = jnp.isfinite(jnp.stack(probes))
        taken = sound.all() & jnp.isfinite(jnp.stack(jax.tree.leaves(sums))).all()
        step, dense, opt_state = jax.tree.map(
            partial(jnp.where, taken),
            (step, dense, opt_state),
            (state.step, state.dense, state.opt_state),
        )
        for name, ids in unique.items():  # those out of range are not written
            unique[name] = jnp.where(taken, ids, state.tables[name].shape[0])
        first = jnp.where(sound.all(), -1, jnp.argmin(sound))
        sums |= {"bad_gradient": first.astype(jnp.int32)}
    tables = {
        name: state.adam.write(
            state.tables[name], ids, rows[name], row_grads[name], state.step, rate
        )
        for name, ids in unique.items()
    }
    after = state.replace(step=step, tables=tables, dense=dense, opt_state=opt_state)
    return after, sums


def _probe(grads: Any, settings: Settings) -> Any:
    """Of each gradient a number that is finite if its entries, and their squares in Adam, are."""
    if settings.clip_norm:  # which makes large entries small
        return jax.tree.map(lambda g: jnp.sum(0 * g), grads)
    # The square of a sum over n devices is at most n times the sum of the squares.
    return jax.tree.map(lambda g: devices.size() * jnp.sum(jnp.square(g)), grads)
