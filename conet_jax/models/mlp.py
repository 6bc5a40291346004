"""The base network alone (Sec. 2.2; He et al. 2017): one tower on the target domain."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax import losses
from conet_jax.models import out_of_fold, towers
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes


class Options(NamedTuple):
    """Structure: widths, inner product, initialiser, start, dtype, … (see ``conet.Options``)."""

    layers: tuple[int, ...] = (64, 32, 16, 8)
    inner_product: bool = False
    inner_weight: float = 1.0
    output_bias: float = 0.0
    output_scale: float = 1.0
    initializer: str = "he"
    dropout: bool = False
    warm_start: str = ""
    folds: int = 0
    dtype: str = "float32"

    @property
    def crossfit(self) -> bool:
        """Whether the tables are fixed and cross-fitted, see ``out_of_fold``."""
        return self.warm_start == "crossfit"


@lru_cache
def build(options: Options) -> Model:
    """Returns the MLP as a ``Model`` of pure functions."""
    return Model(
        domains=("target",),
        pairing=None,
        inference="target",
        init=lambda key, sizes: init(key, sizes, options),
        lookups=partial(lookups, options=options),
        loss=partial(loss, options=options),
        project=lambda params, interactions: project(params, options),
        scores=partial(scores, options=options),
        diagnostics=partial(diagnostics, options=options),
        fixed_tables=options.crossfit,
        copies=options.folds + 1 if options.crossfit else 1,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises ``user`` and ``target_item`` tables, N(0, 0.01^2), and the tower."""
    user_key, item_key, tower_key = jax.random.split(key, 3)
    dim = options.layers[0] // 2
    if options.crossfit:  # zero, in the shapes of ``out_of_fold``, which fits them
        copies = options.folds + 1
        tables = {
            "user": jnp.zeros((sizes.users * copies, dim + 1)),
            "target_item": jnp.zeros((sizes.target_items * copies, dim + 1)),
        }
    else:
        tables = {
            "user": towers.gaussian(user_key, (sizes.users, dim)),
            "target_item": towers.gaussian(item_key, (sizes.target_items, dim)),
        }
    tower = towers.init_tower(
        tower_key,
        options.layers,
        initializer=options.initializer,
        output_scale=options.output_scale,
        features=out_of_fold.FEATURES if options.crossfit else 0,
        inner_weight=options.inner_weight if options.inner_product else None,
        output_bias=options.output_bias,
    )
    return Params(tables, {"target": tower})


def lookups(batch: Batch, options: Options) -> dict[str, jax.Array]:
    """Returns {"user": int32[n], "target_item": int32[n]}."""
    target = batch.target
    ids = {"user": target.users, "target_item": target.items}
    if options.crossfit:
        ids = {
            name: out_of_fold.row_ids(own, target.folds, options.folds) for name, own in ids.items()
        }
    return ids


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
    beside = []
    if options.crossfit:
        beside = [out_of_fold.features(users, items, options.inner_weight)]
        users, items = users[..., :-1], items[..., :-1]
    merged = towers.merge(users, items)
    if rate is not None:
        merged = towers.dropout(batch.key, merged, rate)
    tower = dense["target"]
    inputs = jnp.concatenate([merged, *beside], axis=-1)
    return forward(tower, inputs, options.dtype) + towers.inner_logits(tower, users, items)


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


def project(params: Params, options: Options) -> dict[str, Any]:
    """Sends each table through the first layer once, see ``conet.project``."""
    tower, user = params.dense["target"], params.tables["user"]
    item = params.tables["target_item"]
    if not options.crossfit:
        return towers.project_target(tower, user, item)
    user, item = (out_of_fold.of_all_pairs(table, options.folds) for table in (user, item))
    layer, vectors = tower["layer_1"], (user[:, :-1], item[:, :-1])
    return {
        "user": towers.affine(layer, out_of_fold.user_part(user)),
        "item": out_of_fold.item_part(item) @ layer["kernel"],
        "dots": layer["kernel"][2 * vectors[0].shape[1]],
        "user_view": vectors[0],
        "item_factors": vectors[1],
        "tower": tower,
        **towers.project_inner(tower, *vectors),
    }


def scores(
    projected: dict[str, Any], users: jax.Array, items: jax.Array, options: Options
) -> jax.Array:
    """Logits f32[n, c] of users int32[n] for items int32[n, c]."""
    if not options.crossfit:
        return towers.score_target(projected, users, items, options.dtype)
    pairs = projected["user_view"][users], projected["item_factors"][items]
    dots = options.inner_weight * jnp.einsum("nd,ncd->nc", *pairs)
    beside = dots[:, :, None] * projected["dots"][None, None, :]
    return towers.score_target(projected, users, items, options.dtype, beside)
