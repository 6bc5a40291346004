"""EMCDR, embedding and mapping (Man et al. 2017): users without target pairs through the source.

Each domain is factorised by itself, here by implicit ALS (``ials``). On the users with pairs in
both a map f from their source factors to their target factors is fitted, by the least squares

    ``mean_u |f(x_u) - y_u|^2 + ridge |W|^2``

of factors divided by their root mean square: linear, with a bias, in closed form; or with a hidden
layer of tanh by full-batch Adam, W all its weights. A user of the target keeps the target factors;
one of the source alone has f of the source factors.

An epoch is a sweep of both factorisations, and then the map.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conet_jax.errors import InputError
from conet_jax.models import factors, ials
from conet_jax.models.base import FittedModel, Params, Sizes

_STEPS = 50  # of Adam an epoch, from the map of the last
_RATE = 1e-2


class Options(NamedTuple):
    """Structure and constants.

    Attributes:
      layers: half of the first is the number of factors.
      ials_regularization: lambda of both factorisations.
      ials_alpha: confidence of an observed pair above that of the others, in both.
      map_hidden: units of the map's hidden layer; 0 is a linear map.
      map_ridge: ridge of the map.
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    ials_regularization: float = 1.0
    ials_alpha: float = 10.0
    map_hidden: int = 0
    map_ridge: float = 0.01

    @property
    def alone(self) -> ials.Options:
        """Of the factorisation of either domain."""
        return ials.Options(self.layers, False, self.ials_regularization, self.ials_alpha)


@lru_cache
def build(options: Options) -> FittedModel:
    """Returns the model as a ``FittedModel``."""
    return FittedModel(
        domains=("target", "source"),
        inference="cross",
        init=lambda key, sizes: init(key, sizes, options),
        project=ials.project,
        scores=factors.scores,
        linear=factors.linear,
        sweeper=lambda interactions, sizes: sweeper(interactions, sizes, options),
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Returns the start of both factorisations, and the map's weights."""
    target_key, source_key, map_key = jax.random.split(key, 3)
    target = ials.init(target_key, sizes, options.alone).tables
    source = ials.init(source_key, _of_source(sizes), options.alone).tables
    tables = {**target, "source_user": source["user"], "source_item": source["target_item"]}
    widths = (options.layers[0] // 2,) * 2
    if options.map_hidden:
        widths = (widths[0], options.map_hidden, widths[1])
    weights = {}
    for at, (rows, columns) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        drawn = jax.random.normal(jax.random.fold_in(map_key, at), (rows, columns))
        weights |= {f"W_{at}": drawn / rows**0.5, f"b_{at}": jnp.zeros(columns)}
    return Params(tables, {**weights, "scales": jnp.ones(2)})


def _of_source(sizes: Sizes) -> Sizes:
    return Sizes(sizes.users, sizes.source_items, 0)


def sweeper(interactions: Any, sizes: Sizes, options: Options) -> Any:
    """Returns the sweep, Params -> Params.

    Raises:
      InputError: no user has pairs in both domains.
    """
    alone = options.alone
    target = cache(lambda: ials.matrix(interactions, sizes, joined=False))
    source = cache(
        lambda: ials.matrix({"target": interactions["source"]}, _of_source(sizes), joined=False)
    )
    has = {d: jnp.diff(interactions[d].indptr) > 0 for d in ("target", "source")}
    both = np.flatnonzero(has["target"] & has["source"])
    if not len(both):
        raise InputError(
            "config.model=emcdr learns its map on users with training pairs in both domains, and "
            "there are none: expected some; take another model, or a smaller config.data.cold"
        )

    def sweep(params: Params) -> Params:
        tables = params.tables
        own = {name: tables[name] for name in ("user", "target_item")}
        own = ials.sweep(target(), own, alone)
        other = {"user": tables["source_user"], "target_item": tables["source_item"]}
        other = ials.sweep(source(), other, alone)
        fit = _fit_network if options.map_hidden else _fit_linear
        dense = fit(params.dense, other["user"][both], own["user"][both], options.map_ridge)
        mapped = jnp.where(has["source"][:, None], mapping(dense, other["user"]), 0.0)
        user = jnp.where(has["target"][:, None], own["user"], mapped)
        source_tables = {"source_user": other["user"], "source_item": other["target_item"]}
        return Params({**own, "user": user, **source_tables}, dense)

    return sweep


def mapping(dense: dict[str, jax.Array], source: jax.Array) -> jax.Array:
    """Target factors f(x) of source factors, f32[n, dim] -> f32[n, dim]."""
    scale_in, scale_out = dense["scales"]
    return scale_out * _forward(dense, source / scale_in)


def _forward(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x @ weights["W_0"] + weights["b_0"][None, :]
    if "W_1" in weights:
        x = jnp.tanh(x) @ weights["W_1"] + weights["b_1"][None, :]
    return x


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries over their root mean square, and that; 1 where all are zero."""
    scale = jnp.sqrt(jnp.sum(x * x) / x.size)
    scale = jnp.where(scale > 0, scale, 1.0)
    return x / scale, scale


@jax.jit
def _fit_linear(
    dense: dict[str, jax.Array], x: jax.Array, y: jax.Array, ridge: jax.Array
) -> dict[str, jax.Array]:
    """The linear map of rows x to rows y, in closed form; the bias is not penalised."""
    del dense
    (x, scale_in), (y, scale_out) = _scaled(x), _scaled(y)
    mean_in, mean_out = x.mean(0), y.mean(0)
    x, y = x - mean_in[None, :], y - mean_out[None, :]
    system = x.T @ x / len(x) + ridge * jnp.eye(x.shape[1])
    weights = jnp.linalg.solve(system, x.T @ y / len(x))
    bias = mean_out - mean_in @ weights
    return {"W_0": weights, "b_0": bias, "scales": jnp.stack([scale_in, scale_out])}


@jax.jit
def _fit_network(
    dense: dict[str, jax.Array], x: jax.Array, y: jax.Array, ridge: jax.Array
) -> dict[str, jax.Array]:
    """Steps of Adam on the map with a hidden layer, from where it is."""
    (x, scale_in), (y, scale_out) = _scaled(x), _scaled(y)
    adam = optax.adam(_RATE)

    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        squares = sum(jnp.sum(weights[name] ** 2) for name in ("W_0", "W_1"))
        return jnp.sum((_forward(weights, x) - y) ** 2) / len(x) + ridge * squares

    def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        weights, moments = state
        updates, moments = adam.update(jax.grad(loss)(weights), moments)
        return (optax.apply_updates(weights, updates), moments), None

    weights = {name: value for name, value in dense.items() if name != "scales"}
    (weights, _), _ = jax.lax.scan(step, (weights, adam.init(weights)), length=_STEPS)
    return {**weights, "scales": jnp.stack([scale_in, scale_out])}
