"""The state of a run: packed tables, dense parameters, moments; made, settled, looked into."""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from conet_jax import devices, optimizers
from conet_jax.devices.axis import SAME, SPLIT
from conet_jax.models.base import Model, Params, Sizes
from conet_jax.row_adam import RowAdam, fixed, row_adam

TABLE_ADAM = row_adam()


FIXED_TABLES = fixed()


# Rows last written before this step are brought up to date by a sum, later ones by the closed form
# (row_adam): settling every row once, here, ends the need for the sum.
SETTLE_STEP = TABLE_ADAM.closed_from


@flax.struct.dataclass
class TrainState:
    """State of a run.

    Attributes:
      step: int32[], Adam steps done.
      tables: {name: f32[rows, 3 dim + 1]}, packed for ``row_adam``, or f32[rows, dim] if
        fixed; on several devices split by rows as ``devices`` says, all else is on each.
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
        return FIXED_TABLES if self.fixed_tables else TABLE_ADAM


def state_specs(fixed_tables: bool) -> TrainState:
    """Returns what ``devices.mapped`` must know of each part of a state."""
    return TrainState(
        step=SAME, tables=SPLIT, dense=SAME, opt_state=SAME, fixed_tables=fixed_tables
    )


PARAMS = Params(tables=SPLIT, dense=SAME)


class Settings(NamedTuple):
    """Static choices of the optimisation (docs/paper.md).

    Attributes:
      l1_method: "subgradient", "proximal" or "group", see ``optimizers.l1_adam``.
      clip_norm: largest gradient norm of each variable (a table's over the rows of the batch); 0
        is no clipping.
      loss_scale: factor on the loss of a step, not on the penalty.
      watch: whether each step looks at its gradients, see ``train_step``; some 5% of a small step.
    """

    l1_method: str = "subgradient"
    clip_norm: float = 0.0
    loss_scale: float = 1.0
    watch: bool = False


def dense_optimizer(
    model: Model, settings: Settings, learning_rate: jax.Array | float, l1: jax.Array | float
) -> optax.GradientTransformation:
    """Returns the L1-augmented Adam of the dense parameters."""
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
    tables = devices.made(lambda key: model.init(key, sizes).tables, key, mesh, model.copies)
    same = jax.sharding.NamedSharding(mesh, PARAMS.dense)
    dense = jax.jit(lambda key: model.init(key, sizes).dense, out_shardings=same)(key)
    return Params(tables, dense)


def init_state(model: Model, params: Params, settings: Settings) -> TrainState:
    """Returns the state before the first step."""
    mesh = devices.mesh_of(params)
    return _init_state(params, model=model, settings=settings, mesh=mesh)


@partial(jax.jit, static_argnames=("model", "settings", "mesh"))
def _init_state(
    params: Params, *, model: Model, settings: Settings, mesh: jax.sharding.Mesh
) -> TrainState:
    adam = FIXED_TABLES if model.fixed_tables else TABLE_ADAM

    def make(params: Params) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            tables={name: adam.init(table) for name, table in params.tables.items()},
            dense=params.dense,
            opt_state=dense_optimizer(model, settings, 0.0, 0.0).init(params.dense),
            fixed_tables=model.fixed_tables,
        )

    return devices.mapped(make, mesh, (PARAMS,), state_specs(model.fixed_tables))(params)


def settled(state: TrainState, learning_rate: jax.Array) -> Params:
    """Returns a copy of the parameters with every row brought to the current step."""
    return _settled(state, learning_rate, mesh=devices.mesh_of(state))


@partial(jax.jit, static_argnames="mesh")
def _settled(state: TrainState, learning_rate: jax.Array, *, mesh: jax.sharding.Mesh) -> Params:
    def settle(state: TrainState, learning_rate: jax.Array) -> Params:
        tables = {
            name: state.adam.settle(packed, state.step, learning_rate)
            for name, packed in state.tables.items()
        }
        return Params(tables, state.dense)

    specs = state_specs(state.fixed_tables)
    return devices.mapped(settle, mesh, (specs, SAME), PARAMS)(state, learning_rate)


def settle_in_place(state: TrainState, learning_rate: jax.Array) -> TrainState:
    """Brings every row of the state to the current step (see ``SETTLE_STEP``)."""
    return _settle_in_place(state, learning_rate, mesh=devices.mesh_of(state))


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

    specs = state_specs(state.fixed_tables)
    return devices.mapped(settle, mesh, (specs, SAME), specs)(state, learning_rate)


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
