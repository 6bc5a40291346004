"""The base network alone (Sec. 2.2; He et al. 2017): one tower on the target domain."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax.errors import InputError
from conet_jax.models import diagnostics, towers
from conet_jax.models.base import (
    Batch,
    Hyper,
    Model,
    Params,
    Sizes,
    cross_entropies,
    pair_lookups,
)
from conet_jax.models.towers import Tower, merge


class Options(NamedTuple):
    """Structure, see ``towers.Tower``; ``dropout`` says whether there is any."""

    layers: tuple[int, ...] = (64, 32, 16, 8)
    initializer: str = "he"
    dropout: bool = False
    dtype: str = "float32"


def check(config: Any) -> None:
    """Raises ``InputError`` where fields of the config do not fit one tower."""
    if config.cross_layers or config.inference == "cross":
        raise InputError(
            f"config.model is {config.model!r}, which has one tower: set config.cross_layers=0 and "
            "config.inference=target, or take the variant :mlp"
        )


@lru_cache
def build(options: Options) -> Model:
    """Returns the MLP as a ``Model`` of pure functions."""
    module = Tower(options.layers, options.initializer, dtype=options.dtype)
    return Model(
        domains=("target",),
        pairing=None,
        init=partial(init, module=module),
        lookups=pair_lookups,
        losses=partial(example_losses, options=options, module=module),
        project=lambda params, interactions: towers.project_tower(
            params.dense["target"], params.tables["user"], params.tables["target_item"]
        ),
        scores=partial(towers.score_tower, module),
        diagnostics=lambda dense, rows, batch: diagnostics.of_towers(
            batch_logits(dense, rows, batch, None, module), batch
        ),
    )


def init(key: jax.Array, sizes: Sizes, module: Tower) -> Params:
    """Initialises ``user`` and ``target_item`` tables, N(0, 0.01^2), and the tower."""
    user_key, item_key, tower_key = jax.random.split(key, 3)
    dim = module.layers[0] // 2
    tables = {
        "user": towers.gaussian(user_key, (sizes.users, dim)),
        "target_item": towers.gaussian(item_key, (sizes.target_items, dim)),
    }
    tower = module.init(tower_key, jnp.zeros((1, 2 * dim)))["params"]
    return Params(tables, {"target": tower})


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, rate: jax.Array | None, module: Tower
) -> dict[str, jax.Array]:
    """Returns the logits f32[n] of a batch; ``rate`` None is no dropout."""
    merged = merge(rows["user"], rows["target_item"])
    if rate is not None:
        merged = towers.dropout(batch.key, merged, rate)
    return {"target": module.apply({"params": dense["target"]}, merged)}


def example_losses(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper, options: Any, module: Tower
) -> dict[str, jax.Array]:
    """Returns the loss of each example (Eq. 5)."""
    rate = hyper.dropout if options.dropout else None
    return cross_entropies(batch_logits(dense, rows, batch, rate, module), batch)
