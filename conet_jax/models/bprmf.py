"""Matrix factorisation by Bayesian personalised ranking (Rendle et al. 2009), target domain alone.

The score of user u for item i is p_u^T q_i + b_i. For each observed pair (u, i) a sampled item j
of u gives the loss -log(sigmoid(score_ui - score_uj)) + l2 / 2 (|p_u|^2 + |q_i|^2 + |q_j|^2).
"""

from functools import lru_cache
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
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)


@lru_cache
def build(options: Options) -> Model:
    """Returns the factorisation as a ``Model`` of pure functions."""
    return Model(
        domains=("target",),
        pairing="pairs",
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lookups,
        losses=example_losses,
        penalties=penalties,
        project=lambda params, interactions: factors.project(
            params.tables["user"], params.tables["target_item"]
        ),
        scores=factors.scores,
        linear=factors.linear,
        logits=False,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises ``user`` f32[users, dim] and ``target_item`` f32[items, dim + 1], bias last."""
    user_key, item_key = jax.random.split(key)
    dim = options.layers[0] // 2
    tables = {
        "user": factors.init(user_key, sizes.users, dim),
        "target_item": factors.init(item_key, sizes.target_items, dim, bias=True),
    }
    return Params(tables, {})


def lookups(batch: Batch) -> dict[str, jax.Array]:
    """Returns {"user": int32[n], "target_item": int32[2, n]}, positives and negatives."""
    target = batch.target
    return {
        "user": target.users,
        "target_item": jnp.stack([target.items, target.negatives]),
    }


def example_losses(
    dense: dict, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper
) -> dict[str, jax.Array]:
    """Returns BPR-Opt of each pair, without its penalty."""
    del dense, batch, hyper
    users, (positive, negative) = rows["user"], rows["target_item"]
    margins = factors.dot(users, positive), factors.dot(users, negative)
    return {"target": losses.bpr_loss(*margins, reduction="none")}


def penalties(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper
) -> dict[str, jax.Array]:
    """Returns l2 / 2 times the squared norm of the rows that a pair reads."""
    del dense, batch
    norms = sum(map(factors.squared_norm, (rows["user"], *rows["target_item"])))
    return {"target": hyper.l2 / 2 * norms}
