"""Collective matrix factorisation (Singh and Gordon 2008): both domains share the user factors.

The score of user u for item i of a domain is p_u^T q_i + b_i, with an item table a domain. The
loss is alpha L_target + (1 - alpha) L_source over observed pairs and sampled negatives, with L the
logistic loss (Eq. 5) or the squared error weighted by 1 for a positive and ``negative_weight`` for
a negative, and l2 / 2 (|p_u|^2 + |q_i|^2) an example.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax import losses
from conet_jax.models import factors
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes


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
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lookups,
        losses=partial(example_losses, options=options),
        penalties=penalties,
        project=lambda params, interactions: factors.project(
            params.tables["user"], params.tables["target_item"]
        ),
        scores=factors.scores,
        linear=factors.linear,
        source_face=(_project_source, factors.scores),
        logits=options.cmf_loss == "logistic",
    )


def _project_source(params: Params, interactions: Any) -> dict[str, jax.Array]:
    del interactions
    return factors.project(params.tables["user"], params.tables["source_item"])


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


def example_losses(
    dense: dict, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper, options: Options
) -> dict[str, jax.Array]:
    """Returns the loss of each example by domain: nats, or a weighted squared error."""
    del dense
    found = {}
    for at, (domain, examples) in enumerate((("target", batch.target), ("source", batch.source))):
        logits = factors.dot(rows["user"][at], rows[f"{domain}_item"])
        if options.cmf_loss == "logistic":
            each = losses.binary_cross_entropy(logits, examples.labels, reduction="none")
        else:
            weights = jnp.where(examples.labels > 0, 1.0, hyper.negative_weight)
            each = weights * jnp.square(examples.labels - logits)
        found[domain] = each
    return found


def penalties(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper
) -> dict[str, jax.Array]:
    """Returns l2 / 2 times the squared norm of the rows that an example reads, by domain."""
    del dense, batch
    return {
        domain: hyper.l2
        / 2
        * (factors.squared_norm(rows["user"][at]) + factors.squared_norm(rows[f"{domain}_item"]))
        for at, domain in enumerate(("target", "source"))
    }
