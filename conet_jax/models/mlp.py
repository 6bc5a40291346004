"""The base network alone (Sec. 2.2; He et al. 2017): one tower on the target domain."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax

from conet_jax import losses
from conet_jax.models import conet, towers
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes


class Options(NamedTuple):
    """Structure: widths, inner product, initialiser, dropout, dtype (see ``conet.Options``)."""

    layers: tuple[int, ...] = (64, 32, 16, 8)
    inner_product: bool = False
    inner_weight: float = 1.0
    second_weight: float = 0.0
    output_bias: float = 0.0
    output_scale: float = 1.0
    initializer: str = "he"
    dropout: bool = False
    dtype: str = "float32"


@lru_cache
def build(options: Options) -> Model:
    """Returns the MLP as a ``Model`` of pure functions."""
    return Model(
        domains=("target",),
        pairing=None,
        inference="target",
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lookups,
        loss=partial(loss, options=options),
        project=lambda params, interactions: project(params),
        scores=partial(towers.score_target, dtype=options.dtype),
        diagnostics=partial(diagnostics, options=options),
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises ``user`` and ``target_item`` tables, N(0, 0.01^2), and the tower."""
    user_key, item_key, tower_key = jax.random.split(key, 3)
    weights = conet.inner_weights(options)
    dim = options.layers[0] // 2 * max(1, len(weights))
    tables = {
        "user": towers.gaussian(user_key, (sizes.users, dim)),
        "target_item": towers.gaussian(item_key, (sizes.target_items, dim)),
    }
    tower = towers.init_tower(
        tower_key,
        options.layers,
        initializer=options.initializer,
        output_scale=options.output_scale,
        inner_weights=weights,
        output_bias=options.output_bias,
    )
    return Params(tables, {"target": tower})


def lookups(batch: Batch) -> dict[str, jax.Array]:
    """Returns {"user": int32[n], "target_item": int32[n]}."""
    return {"user": batch.target.users, "target_item": batch.target.items}


def forward(tower: Any, merged: jax.Array, dtype: str = "float32") -> jax.Array:
    """Eq. 1: f32[..., p] -> logits f32[...]; ``dtype`` is that of the hidden activations."""
    x = towers.activations(merged, dtype)
    for level in range(towers.depth(tower)):
        x = jax.nn.relu(towers.affine(tower[f"layer_{level + 1}"], x))
    return towers.output_logits(tower, x)


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, options: Options, rate: jax.Array | None
) -> jax.Array:
    """Logits f32[n] of a batch; ``rate`` None is no dropout."""
    users, items = rows["user"], rows["target_item"]
    merged = towers.merge(users, items, options.layers[0] // 2)
    if rate is not None:
        merged = towers.dropout(batch.key, merged, rate)
    tower = dense["target"]
    return forward(tower, merged, options.dtype) + towers.inner_logits(tower, users, items)


def loss(
    dense: Any,
    rows: dict[str, jax.Array],
    batch: Batch,
    hyper: Hyper,
    options: Options,
    reduction: str = "mean",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 5 over the examples, and its sum and count (see ``Model.loss``)."""
    rate = hyper.dropout if options.dropout else None
    logits = batch_logits(dense, rows, batch, options, rate)
    labels, weights = batch.target.labels, batch.target.weights
    value = losses.binary_cross_entropy(logits, labels, weights=weights, reduction=reduction)
    total = losses.binary_cross_entropy(logits, labels, weights=weights)
    return value, {"target_loss": total, "target_count": weights.sum()}


def diagnostics(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, options: Options
) -> dict[str, jax.Array]:
    """Returns ``logit_spread/target``, largest minus smallest logit of the batch."""
    logits = batch_logits(dense, rows, batch, options, None)
    return {"logit_spread/target": towers.logit_spread(logits, batch.target.weights)}


def project(params: Params) -> dict[str, Any]:
    """Sends each table through the first layer once, see ``conet.project``."""
    tower = params.dense["target"]
    return towers.project_target(tower, params.tables["user"], params.tables["target_item"])
