"""Popularity: every user gets the items that most users of the target domain have. A floor."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax.models.base import FittedModel, Params, Sizes


class Options(NamedTuple):
    """There is nothing to choose."""


@lru_cache
def build(options: Options) -> FittedModel:
    """Returns the counter as a ``FittedModel`` of pure functions."""
    del options
    return FittedModel(
        domains=("target",),
        init=init,
        project=lambda params, interactions: {"item": params.tables["target_item"][:, 0]},
        scores=scores,
        sweeper=sweeper,
        closed_form=True,
    )


def init(key: jax.Array, sizes: Sizes) -> Params:
    """Returns ``target_item`` f32[items, 1], all zero."""
    del key
    return Params({"target_item": jnp.zeros((sizes.target_items, 1))}, {})


def sweeper(interactions: Any, sizes: Sizes) -> Any:
    """Returns the sweep: counts of training interactions, f32[items, 1]."""
    items = interactions["target"].items

    def sweep(params: Params) -> Params:
        del params
        counts = jnp.bincount(items, length=sizes.target_items).astype(float)
        return Params({"target_item": counts[:, None]}, {})

    return sweep


def scores(projected: dict[str, jax.Array], users: jax.Array, items: jax.Array) -> jax.Array:
    """Counts f32[n, c] of items int32[n, c]."""
    del users
    return projected["item"][items]
