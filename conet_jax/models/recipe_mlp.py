"""The recipe with one tower: on out-of-fold factors of the target domain, or of both joined.

What the crossing of ``recipe`` is to be measured against: without the source domain, and
(``joined``) with one vector of a user from both domains. Dense parameters: ``target``, a
``towers.Tower``, ``w_target`` and ``v_target``.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax.models import diagnostics, ials, mlp, neighbours, out_of_fold, recipe, towers
from conet_jax.models.base import (
    Batch,
    Hyper,
    Model,
    Params,
    Sizes,
    cross_entropies,
)
from conet_jax.models.towers import Tower, merge


class Options(NamedTuple):
    """Structure and start, see ``recipe.Options``; ``joined`` factorises both domains."""

    layers: tuple[int, ...] = (128, 64, 32, 16)
    joined: bool = False
    initializer: str = "he"
    inner_weight: float = 5.0
    output_bias: float = -2.5
    output_scale: float = 0.1
    dropout: bool = False
    dtype: str = "float32"
    folds: int = 5
    fold_sweeps: int = 4
    ials_sweeps: int = 15
    ials_regularization: float = 200.0
    ials_alpha: float = 50.0
    ials_source_weight: float = 0.2
    neighbours: int = 32
    neighbour_weight: float = 2.0

    @property
    def module(self) -> Tower:
        """The tower of this structure."""
        output = self.output_scale, self.output_bias
        return Tower(self.layers, self.initializer, *output, self.dtype)

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that the tables are made from."""
        return ("target", "source") if self.joined else ("target",)

    @property
    def factorisation(self) -> ials.Options:
        """What the tables are made by."""
        return recipe.factorisation(self, joined=self.joined)


check = mlp.check


@lru_cache
def build(options: Options) -> Model:
    """Returns the model of pure functions."""
    return Model(
        domains=("target",),
        pairing=None,
        init=partial(init, options=options),
        lookups=partial(lookups, options=options),
        losses=partial(example_losses, options=options),
        weights=recipe.warm_weights,
        project=partial(project, options=options),
        scores=partial(scores, options=options),
        linear=linear,
        diagnostics=lambda dense, rows, batch: diagnostics.of_towers(
            batch_logits(dense, rows, batch, None, options), batch
        ),
        start=partial(recipe.start, options=options, views=(options.domains,), of=("target",)),
        fixed_tables=True,
        folds=options.folds,
        copies=partial(recipe.copies, options=options),
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises the tower; the tables are zero: ``recipe.start`` fits them."""
    dim, copies = options.layers[0] // 2, options.folds + 1
    tables = {
        "user": jnp.zeros((sizes.users * copies, dim + 1)),
        "target_item": jnp.zeros((sizes.target_items * copies, dim + 1)),
    }
    tables |= neighbours.init(sizes, options.domains, options.neighbours, ("target",))
    seen = jnp.zeros((1, 2 * dim + out_of_fold.FEATURES))
    dense = {"target": options.module.init(key, seen)["params"]}
    dense["w_target"] = jnp.full((dim,), options.inner_weight, float)
    if options.neighbours:
        dense["v_target"] = neighbours.weights("target", options.domains, options.neighbour_weight)
    return Params(tables, dense)


def lookups(batch: Batch, options: Options) -> dict[str, jax.Array]:
    """Returns {"user": int32[n], "target_item": int32[n]}, without the folds of the examples.

    And what ``neighbours`` reads.
    """
    target = batch.target
    near = neighbours.lookups(target, None) if options.neighbours else {}
    return near | {
        name: out_of_fold.row_ids(ids, target.folds, options.folds)
        for name, ids in (("user", target.users), ("target_item", target.items))
    }


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, rate: jax.Array | None, options: Options
) -> dict[str, jax.Array]:
    """Returns the logits f32[n] of a batch; ``rate`` None is no dropout."""
    users, items = rows["user"], rows["target_item"]
    features = out_of_fold.features(users, items, options.inner_weight)
    users, items = users[..., :-1], items[..., :-1]
    merged = merge(users, items)
    if rate is not None:
        merged = towers.dropout(batch.key, merged, rate)
    seen = jnp.concatenate([merged, features], axis=-1)
    tower = options.module.apply({"params": dense["target"]}, seen)
    logits = tower + (users * items) @ dense["w_target"]
    if options.neighbours:
        near = rows["user_items"][0], rows["target_neighbours"], batch.target.labels
        logits = logits + neighbours.term(dense["v_target"], *near, options.neighbours)
    return {"target": logits}


def example_losses(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper, options: Options
) -> dict[str, jax.Array]:
    """Returns the loss of each example (Eq. 5)."""
    rate = hyper.dropout if options.dropout else None
    return cross_entropies(batch_logits(dense, rows, batch, rate, options), batch)


def project(params: Params, interactions: Any, options: Options) -> dict[str, Any]:
    """Sends each table through the first layer once, see ``recipe.project``."""
    user, item = (
        out_of_fold.of_all_pairs(params.tables[name], options.folds)
        for name in ("user", "target_item")
    )
    tower, vectors = params.dense["target"], (user[:, :-1], item[:, :-1])
    layer = tower["W_0"]
    by_user = out_of_fold.user_part(user) @ layer["kernel"]
    near = {}
    if options.neighbours:
        num_ids = sum(interactions[d].num_items for d in options.domains)
        given = params.dense["v_target"], num_ids, options.neighbours, options.domains
        near = neighbours.project(params.tables, *given)
    return near | {
        "user": by_user + jnp.broadcast_to(layer["bias"], by_user.shape),
        "item": out_of_fold.item_part(item) @ layer["kernel"],
        "dots": layer["kernel"][2 * vectors[0].shape[1]],
        "user_view": vectors[0],
        "item_factors": vectors[1],
        "item_warm": out_of_fold.is_warm(item),
        "tower": tower,
        "w": params.dense["w_target"],
    }


def scores(
    projected: dict[str, Any], users: jax.Array, items: jax.Array, options: Options
) -> jax.Array:
    """Logits f32[n, c] of users int32[n] for items int32[n, c]."""
    views, factors = projected["user_view"][users], projected["item_factors"][items]
    dots = options.inner_weight * jnp.einsum("nd,ncd->nc", views, factors)
    beside = dots[:, :, None] * projected["dots"][None, None, :]
    logits = towers.score_tower(options.module, projected, users, items, beside)
    logits = logits + jnp.einsum("nd,ncd->nc", views * projected["w"][None, :], factors)
    logits = logits + neighbours.scores(projected, users, items)
    return jnp.where(projected["item_warm"][items], logits, recipe.COLD)


def linear(projected: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """What of ``scores`` is w^T (view * item): f32[users, dim] and f32[items, dim]."""
    return projected["user_view"] * projected["w"][None, :], projected["item_factors"]
