"""Training as pure functions: state, step, and a chunk of an epoch in one compiled program.

The model's code does not know how its tables are updated: a step reads the rows of its batch
brought up to date, differentiates the loss with respect to them, and writes them back
(``row_adam``); the dense parameters take the L1-augmented Adam of ``optimizers``.

``run_steps`` and ``train_step`` are functions of one device on the axis of ``parallel``: each
device has its part of the batch and of the tables' rows, and gradients and losses are summed.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from conet_jax import optimizers, parallel, sampling
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes
from conet_jax.parallel import SAME, SPLIT
from conet_jax.row_adam import RowAdam, fixed, row_adam

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
      tables: {name: f32[rows, 3 dim + 1]}, packed for ``row_adam``, or f32[rows, dim] if
        fixed; on several devices split by rows as ``parallel`` says, all else is on each.
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


def _specs(fixed_tables: bool) -> TrainState:
    return TrainState(
        step=SAME, tables=SPLIT, dense=SAME, opt_state=SAME, fixed_tables=fixed_tables
    )


PARAMS = Params(tables=SPLIT, dense=SAME)


class Settings(NamedTuple):
    """Static choices of the optimisation (``design.md``'s table).

    Attributes:
      reduction: "sum" or "mean" of the examples' losses in a step.
      l1_method: "subgradient", "proximal" or "group", see ``optimizers.l1_adam``.
      clip_norm: largest gradient norm of each variable (a table's over the rows of the batch); 0
        is no clipping.
      loss_scale: factor on the loss of a step, not on the penalty.
      watch: whether each step looks at its gradients, see ``train_step``; some 5% of a small step.
    """

    reduction: str = "sum"
    l1_method: str = "subgradient"
    clip_norm: float = 0.0
    loss_scale: float = 1.0
    watch: bool = False


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


def init_params(model: Model, key: jax.Array, sizes: Sizes, mesh: jax.sharding.Mesh) -> Params:
    """Returns ``Model.init`` on the devices of ``mesh``, none of which ever has a whole table."""
    if mesh.size == 1:
        # An error of its own, not one of jit's: a model may refuse the sizes.
        return jax.jit(model.init, static_argnums=1)(key, sizes)
    num_rows = tuple(
        (name, table.shape[0])
        for name, table in jax.eval_shape(lambda: model.init(key, sizes)).tables.items()
    )

    def make(key: jax.Array) -> Params:
        params = model.init(key, sizes)
        return Params(parallel.padded(params.tables, mesh, model.copies), params.dense)

    specs = Params(*(jax.sharding.NamedSharding(mesh, spec) for spec in PARAMS))
    params = jax.jit(make, out_shardings=specs)(key)
    tables = parallel.interleaved(params.tables, num_rows=num_rows, mesh=mesh, copies=model.copies)
    return params._replace(tables=tables)


def init_state(model: Model, params: Params, settings: Settings) -> TrainState:
    """Returns the state before the first step."""
    mesh = parallel.mesh_of(params)
    return _init_state(params, model=model, settings=settings, mesh=mesh)


@partial(jax.jit, static_argnames=("model", "settings", "mesh"))
def _init_state(
    params: Params, *, model: Model, settings: Settings, mesh: jax.sharding.Mesh
) -> TrainState:
    adam = _FIXED if model.fixed_tables else TABLE_ADAM

    def make(params: Params) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            tables={name: adam.init(table) for name, table in params.tables.items()},
            dense=params.dense,
            opt_state=_dense_optimizer(model, settings, 0.0, 0.0).init(params.dense),
            fixed_tables=model.fixed_tables,
        )

    return parallel.mapped(make, mesh, (PARAMS,), _specs(model.fixed_tables))(params)


def settled(state: TrainState, learning_rate: jax.Array) -> Params:
    """Returns a copy of the parameters with every row brought to the current step."""
    return _settled(state, learning_rate, mesh=parallel.mesh_of(state))


@partial(jax.jit, static_argnames="mesh")
def _settled(state: TrainState, learning_rate: jax.Array, *, mesh: jax.sharding.Mesh) -> Params:
    def settle(state: TrainState, learning_rate: jax.Array) -> Params:
        tables = {
            name: state.adam.settle(packed, state.step, learning_rate)
            for name, packed in state.tables.items()
        }
        return Params(tables, state.dense)

    specs = _specs(state.fixed_tables)
    return parallel.mapped(settle, mesh, (specs, SAME), PARAMS)(state, learning_rate)


def settle_in_place(state: TrainState, learning_rate: jax.Array) -> TrainState:
    """Brings every row of the state to the current step (see ``SETTLE_STEP``)."""
    return _settle_in_place(state, learning_rate, mesh=parallel.mesh_of(state))


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _settle_in_place(
    state: TrainState, learning_rate: jax.Array, *, mesh: jax.sharding.Mesh
) -> TrainState:
    def settle(state: TrainState, learning_rate: jax.Array) -> TrainState:
        tables = {
            name: state.adam.settle_packed(packed, state.step, learning_rate)
            for name, packed in state.tables.items()
        }
        return state.replace(tables=tables)

    specs = _specs(state.fixed_tables)
    return parallel.mapped(settle, mesh, (specs, SAME), specs)(state, learning_rate)


def wanted_rows(model: Model, batch: Batch, num_rows: dict[str, int]) -> dict[str, parallel.Wanted]:
    """Merges the duplicate ids that a step reads of each table."""
    return {name: parallel.group(ids, num_rows[name]) for name, ids in model.lookups(batch).items()}


def plan_rows(
    wanted: dict[str, parallel.Wanted], num_rows: dict[str, int], *, all_fit: bool = True
) -> dict[str, parallel.Route]:
    """Plans the reads and writes of a step; without ``all_fit`` with room for the worst case."""
    plans = {}
    for name, rows in wanted.items():
        count = rows.rows.shape[0]
        room = parallel.capacity(count) if all_fit else count
        plans[name] = parallel.route(rows, num_rows[name], room)
    return plans


def train_step(
    state: TrainState,
    batch: Batch,
    rows_read: dict[str, parallel.Route],
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
      (state after, sums and counts of ``Model.loss`` at the parameters before). Under
      ``settings.watch`` a step whose losses or gradients are not finite is not taken: the state
      after is the state before, its ``step`` too; and the sums have ``bad_gradient`` i32[], the
      place in ``parameter_names`` of the first parameter whose gradient is not finite, else -1.
    """
    rate = hyper.learning_rate
    rows = {
        name: state.adam.read(state.tables[name], way.unique, state.step, rate)
        for name, way in rows_read.items()
    }
    examples, counts = batch, None
    if settings.reduction == "mean":
        examples, counts = _averaged(batch)

    def objective(dense: Any, values: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        looked_up = {name: values[name][way.inverse] for name, way in rows_read.items()}
        value, sums = model.loss(dense, looked_up, examples, hyper, reduction="sum")
        return settings.loss_scale * value, sums

    values = {
        name: parallel.send(state.adam.values(row), rows_read[name]) for name, row in rows.items()
    }
    (_, sums), (dense_grads, row_grads) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(state.dense, values)
    probes = {} if state.fixed_tables or not settings.watch else _probe(row_grads, settings)
    sums, dense_grads, probes = parallel.total((sums, dense_grads, probes))
    row_grads = {
        name: parallel.send_back(grads, rows_read[name]) for name, grads in row_grads.items()
    }
    if counts is not None:
        for domain, count in counts.items():
            sums |= {f"{domain}_loss": count * sums[f"{domain}_loss"], f"{domain}_count": count}

    # l1 weighs the norm against the mean loss per example: beside a sum it counts once an example.
    # Where nothing crosses there is no penalty.
    l1 = hyper.l1 * batch.cross
    if settings.reduction == "sum":
        counted = [count for name, count in sums.items() if name.endswith("_count")]
        l1 = l1 * jnp.max(jnp.stack(counted))
    optimizer = _dense_optimizer(model, settings, rate, l1)
    updates, opt_state = optimizer.update(dense_grads, state.opt_state, state.dense)
    dense = optax.apply_updates(state.dense, updates)
    if settings.clip_norm:
        clip = optimizers.clip_by_variable_norm(settings.clip_norm, axis_name=parallel.axis_name())
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
    return jax.tree.map(lambda g: parallel.size() * jnp.sum(jnp.square(g)), grads)


def parameter_names(state: TrainState) -> list[str]:
    """Returns the names of the parameters that are trained, such as ``tables/user``."""
    return _names(Params({} if state.fixed_tables else state.tables, state.dense))


def _names(params: Params) -> list[str]:
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


@jax.jit
def _largest(params: Params) -> list[jax.Array]:
    return [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(params)]


def largest_parameter(state: TrainState | Params) -> tuple[str, float]:
    """Returns the name of the parameter with the largest absolute entry, and that entry.

    One with an entry that is NaN or infinite comes before all others.
    """
    if isinstance(state, TrainState):
        tables = {name: state.adam.values(packed) for name, packed in state.tables.items()}
        state = Params(tables, state.dense)
    values = [float(x) for x in _largest(state)]
    at = max(range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
    return _names(state)[at], values[at]


def not_finite(state: TrainState | Params) -> str | None:
    """Returns the name of the first parameter that is, or has moments that are, not finite."""
    tree = state
    if isinstance(state, TrainState):  # packed tables have their moments with them
        tree = {"tables": state.tables, "dense": state.dense, "moments": state.opt_state}
    for (path, _), finite in zip(jax.tree.leaves_with_path(tree), _finite(tree), strict=True):
        if not finite:
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


@jax.jit
def _finite(tree: Any) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]


def _averaged(batch: Batch) -> tuple[Batch, dict[str, jax.Array]]:
    """Weights under which a sum over all devices is the mean, and each domain's examples."""
    counts = {}
    for domain in ("target", "source"):
        examples = getattr(batch, domain)
        if examples is not None:
            count = parallel.total(examples.weights.sum())
            weights = examples.weights / jnp.where(count > 0, count, 1.0)
            batch = batch._replace(**{domain: examples._replace(weights=weights)})
            counts[domain] = count
    return batch, counts


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
      (state after, {name: f32[num_steps]} sums of ``train_step``).
    """
    num_rows = {name: packed.shape[0] for name, packed in state.tables.items()}
    steps = first_step + jnp.arange(num_steps, dtype=jnp.int32)
    batches = jax.vmap(lambda s: sampling.sample_step(key, epoch, s, interactions, plan))(steps)
    wanted = jax.vmap(lambda batch: wanted_rows(model, batch, num_rows))(batches)

    def run(state: TrainState, *, all_fit: bool) -> Any:
        rows_read = jax.vmap(lambda rows: plan_rows(rows, num_rows, all_fit=all_fit))(wanted)

        def body(state: TrainState, step: tuple[Batch, dict[str, parallel.Route]]) -> Any:
            return train_step(state, *step, hyper, model=model, settings=settings)

        return jax.lax.scan(body, state, (batches, rows_read))

    if parallel.size() == 1:
        return run(state, all_fit=True)
    fits = parallel.fits(list(wanted.values()))
    return jax.lax.cond(fits, partial(run, all_fit=True), partial(run, all_fit=False), state)


def train_chunk(
    state: TrainState, interactions: dict[str, sampling.Interactions], *args: Any, **static: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """``run_steps`` compiled, on all devices of the state, which is donated: updated in place."""
    return chunk_program(state, interactions, *args, **static, mesh=parallel.mesh_of(state))


@partial(
    jax.jit, static_argnames=("model", "plan", "settings", "num_steps", "mesh"), donate_argnums=0
)
def chunk_program(
    state: TrainState,
    interactions: dict[str, sampling.Interactions],
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
    state_specs = _specs(state.fixed_tables)
    in_specs = (state_specs, specs, SAME, SAME, SAME, SAME)
    run = parallel.mapped(partial(run_steps, **static), mesh, in_specs, (state_specs, SAME))
    return run(state, interactions, key, epoch, first_step, hyper)


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
    params: Params, interactions: dict[str, sampling.Interactions], *args: Any, **static: Any
) -> dict[str, jax.Array]:
    """Returns ``Model.diagnostics`` on the last batch of an epoch, in which both domains meet."""
    return _diagnose(params, interactions, *args, **static, mesh=parallel.mesh_of(params))


@partial(jax.jit, static_argnames=("model", "plan", "mesh"))
def _diagnose(
    params: Params,
    interactions: dict[str, sampling.Interactions],
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
        joined = jax.tree.map(lambda x: x[: plan.batch_examples], parallel.whole(parts))
        batch = batch._replace(**joined)
        rows = {
            name: parallel.read_everywhere(params.tables[name], ids)
            for name, ids in model.lookups(batch).items()
        }
        return model.diagnostics(params.dense, rows, batch)

    specs = {domain: own.specs() for domain, own in interactions.items()}
    mapped = parallel.mapped(run, mesh, (PARAMS, specs, SAME, SAME), SAME)
    return mapped(params, interactions, key, epoch)


_OF_A_STEP = ("cross", "key")
