"""Factorisation machine on the merged domains (Rendle 2012; cross-domain: Loni et al. 2014).

The features of an example are its user, its target item, and the user's items of the source
domain as context, each of value 1 / (their number). With x the features,

    ``y = w_0 + sum_j w_j x_j + 1/2 (|sum_j v_j x_j|^2 - sum_j x_j^2 |v_j|^2)``,

the second-order term in time linear in the number of features. Logistic loss (Eq. 5) on the
target's examples and l2 / 2 |row|^2 for the user and the item of each.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax.models import factors, history
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes, cross_entropies


class Options(NamedTuple):
    """Structure.

    Attributes:
      layers: half of the first is the number of factors, as the embeddings of a tower.
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)


@lru_cache
def build(options: Options) -> Model:
    """Returns the machine as a ``Model`` of pure functions."""
    return Model(
        domains=("target",),
        pairing="context",
        inference="cross",
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lookups,
        losses=example_losses,
        penalties=penalties,
        project=project,
        scores=scores,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises a table of rows [v_j, w_j] for each kind of feature, and w_0."""
    keys = jax.random.split(key, 3)
    rows = {
        "user": sizes.users,
        "target_item": sizes.target_items,
        "source_item": sizes.source_items,
    }
    tables = {
        name: factors.init(k, n, options.layers[0] // 2, bias=True)
        for k, (name, n) in zip(keys, rows.items(), strict=True)
    }
    return Params(tables, {"bias": jnp.zeros(())})


def lookups(batch: Batch) -> dict[str, jax.Array]:
    """Returns {"user": int32[n], "target_item": int32[n], "source_item": int32[n, length]}."""
    return {
        "user": batch.target.users,
        "target_item": batch.target.items,
        "source_item": batch.source_history.items,
    }


def second_order(vectors: jax.Array, values: jax.Array) -> jax.Array:
    """Sum over pairs j < k of v_j^T v_k x_j x_k, in linear time.

    Args:
      vectors: f32[..., features, dim], the v_j.
      values: f32[..., features], the x_j.

    Returns:
      f32[...].

    Example:
      >>> vectors = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
      >>> print(second_order(vectors, jnp.array([1.0, 1.0, 0.5])))  # 2 + 0 + 1.5
      3.5
    """
    scaled = vectors * values[..., None]
    return 0.5 * (
        factors.squared_norm(scaled.sum(axis=-2)) - factors.squared_norm(scaled).sum(axis=-1)
    )


def logits(dense: Any, rows: dict[str, jax.Array], mask: jax.Array) -> jax.Array:
    """Logits f32[n] of examples; ``mask`` f32[n, length] says which source items there are."""
    context = mask / jnp.maximum(mask.sum(axis=1), 1.0)[:, None]
    ones = jnp.ones_like(context[:, :2])
    features = [rows["user"][:, None], rows["target_item"][:, None], rows["source_item"]]
    vectors, weights = factors.split_bias(jnp.concatenate(features, axis=1))
    values = jnp.concatenate([ones, context], axis=1)
    return dense["bias"] + jnp.sum(weights * values, axis=1) + second_order(vectors, values)


def example_losses(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper
) -> dict[str, jax.Array]:
    """Returns the logistic loss of each example."""
    del hyper
    return cross_entropies({"target": logits(dense, rows, batch.source_history.mask)}, batch)


def penalties(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper
) -> dict[str, jax.Array]:
    """Returns l2 / 2 times the squared norm of the rows of the user and the item."""
    del dense, batch
    norms = factors.squared_norm(rows["user"]) + factors.squared_norm(rows["target_item"])
    return {"target": hyper.l2 / 2 * norms}


def project(params: Params, interactions: Any) -> dict[str, jax.Array]:
    """Sums of each user's features, so that a candidate costs one inner product.

    With s_u the sum of the user's vector and context, the score of item i is
    c_u + w_i + s_u^T v_i, c_u being all that does not hang on the item.
    """
    tables, source = params.tables, interactions["source"]
    num_users = tables["user"].shape[0]
    users, user_weights = factors.split_bias(tables["user"])
    items, item_weights = factors.split_bias(tables["target_item"])
    vectors, _ = factors.split_bias(tables["source_item"])
    listed = jnp.concatenate(
        [tables["source_item"], factors.squared_norm(vectors)[:, None]], axis=1
    )
    means = history.mean_of_all(source.items, source.users, listed, num_users)
    context, context_weights, norms = means[:, :-2], means[:, -2], means[:, -1]
    counts = jnp.maximum(history.sizes(source.users, num_users), 1.0)
    pairs = jnp.sum(users * context, axis=1) + 0.5 * (
        factors.squared_norm(context) - norms / counts
    )
    return {
        "user": users + context,
        "user_bias": params.dense["bias"] + user_weights + context_weights + pairs,
        "item": items,
        "item_bias": item_weights,
    }


def scores(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Logits f32[n, c] of users int32[n] for items int32[n, c]."""
    return projected["user_bias"][users][:, None] + factors.scores(projected, users, items)
