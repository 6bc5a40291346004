"""Collective matrix factorisation (Singh and Gordon 2008): both domains share the user factors.

The score of user u for item i of a domain is p_u^T q_i + b_i, with an item table a domain. The
loss is alpha L_target + (1 - alpha) L_source over observed pairs and sampled negatives, with L the
logistic loss (Eq. 5) or the squared error weighted by 1 for a positive and ``negative_weight`` for
a negative, and l2 / 2 (|p_u|^2 + |q_i|^2) an example.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from conet_jax import losses
from conet_jax.models import factors
from conet_jax.models.base import Batch, Examples, Hyper, Model, Params, Sizes


class Options(NamedTuple):
    """Structure.

    Attributes:
      layers: half of the first is the number of factors, as the embeddings of a tower.
      cmf_loss: "logistic" or "squared".
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    cmf_loss: str = "logistic"


@lru_cache
def build(options: Options) -> Model:
    """Returns the factorisation as a ``Model`` of pure functions."""
    return Model(
        domains=("target", "source"),
        pairing="random",
        inference="target",
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lookups,
        loss=partial(loss, options=options),
        project=lambda params, interactions: factors.project(
            params.tables["user"], params.tables["target_item"]
        ),
        scores=factors.scores,
        logits=options.cmf_loss == "logistic",
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises ``user`` and the two item tables, with the biases as last column."""
    user_key, target_key, source_key = jax.random.split(key, 3)
    dim = options.layers[0] // 2
    tables = {
        "user": factors.init(user_key, sizes.users, dim),
        "target_item": factors.init(target_key, sizes.target_items, dim, bias=True),
        "source_item": factors.init(source_key, sizes.source_items, dim, bias=True),
    }
    return Params(tables, {})


def lookups(batch: Batch) -> dict[str, jax.Array]:
    """Returns {"user": int32[2, n], "target_item": int32[n], "source_item": int32[n]}."""
    return {
        "user": jnp.stack([batch.target.users, batch.source.users]),
        "target_item": batch.target.items,
        "source_item": batch.source.items,
    }


def loss(
    dense: dict,
    rows: dict[str, jax.Array],
    batch: Batch,
    hyper: Hyper,
    options: Options,
    reduction: str = "mean",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the domains' losses; sums without the penalty, and counts."""
    del dense
    value, aux = jnp.zeros(()), {}
    for name, examples, users, alpha in (
        ("target", batch.target, rows["user"][0], hyper.target_weight),
        ("source", batch.source, rows["user"][1], 1 - hyper.target_weight),
    ):
        items = rows[f"{name}_item"]
        each = example_losses(factors.dot(users, items), examples, hyper, options)
        norms = factors.squared_norm(users) + factors.squared_norm(items)
        reduce = partial(losses.reduced, weights=examples.weights)
        value = value + alpha * reduce(each + hyper.l2 / 2 * norms, reduction=reduction)
        aux |= {
            f"{name}_loss": reduce(each, reduction="sum"),
            f"{name}_count": examples.weights.sum(),
        }
    return value, aux


def example_losses(
    logits: jax.Array, examples: Examples, hyper: Hyper, options: Options
) -> jax.Array:
    """Loss of each example f32[n]: nats ("logistic"), or a weighted squared error."""
    if options.cmf_loss == "logistic":
        return losses.binary_cross_entropy(logits, examples.labels, reduction="none")
    weights = jnp.where(examples.labels > 0, 1.0, hyper.negative_weight)
    return weights * jnp.square(examples.labels - logits)
