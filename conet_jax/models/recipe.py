"""The recommended recipe: a CoNet on out-of-fold factors, learning what a linear model misses.

Tables are factors of implicit ALS that have not seen the pair at hand (``out_of_fold``), and are
not trained. A *view* of a user is the vector that the user's items in some domains give. Both
towers see the same pair: the target tower with the view from both domains, the source tower with
the view from the source alone. A logit is that of a tower plus ``w^T (view * item)``, w learned:
the linear model's own term, and ``v^T s``: what the item's neighbours say (``neighbours``).

Nothing is learned from, or won by, items without training pairs. An example whose item has no pair
outside of its fold has weight 0: its count would tell its label. At inference such items rank below
all others.

Dense parameters: those of ``conet.CoNet``, ``w_target`` and ``w_source``, ``v_target`` and
``v_source``.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax.errors import InputError
from conet_jax.models import (
    conet,
    diagnostics,
    ials,
    neighbours,
    out_of_fold,
    towers,
    two_towers,
)
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes, cross_entropies
from conet_jax.models.conet import CoNet
from conet_jax.models.towers import merge

DOMAINS = ("target", "source")
VIEWS = (DOMAINS, ("source",))  # of the target tower, of the source tower
COLD = -1e9  # logit of an item without training pairs: below all others


class Options(NamedTuple):
    """Structure and start: ``conet.CoNet``, ``out_of_fold.fit`` and ``ials`` say what each is.

    Attributes:
      inner_weight: start of every entry of w, and factor on the dot product among the features.
      output_bias: start of the towers' output bias.
      output_scale: factor on the towers' output weights at the start, under "he".
      neighbours: of an item in each domain; 0 is none.
      neighbour_weight: start of v, for the item's own domain.
    """

    layers: tuple[int, ...] = (128, 64, 32, 16)
    cross_layers: int = 3
    cross_per_direction: bool = False
    cross_rank: int = 0
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
    def module(self) -> CoNet:
        """The towers of this structure."""
        fields = self._asdict()
        return CoNet(**{name: fields[name] for name in fields.keys() & CoNet.__annotations__})

    @property
    def factorisation(self) -> ials.Options:
        """What the tables are made by: factors of both domains."""
        return factorisation(self, joined=True)


def factorisation(options: Any, *, joined: bool) -> ials.Options:
    """Returns the ``ials.Options`` of a recipe's options."""
    constants = options.ials_regularization, options.ials_alpha, options.ials_source_weight
    return ials.Options(options.layers, joined, *constants)


def check(config: Any) -> None:
    """Raises ``InputError`` where fields of the config do not fit the recipe."""
    conet.check(config)
    if config.inference != "cross":
        raise InputError(
            "config.inference is 'target' with config.model=recipe, whose target tower is trained "
            "with the source's: expected cross"
        )
    if config.source_layers or config.cross_skip:
        raise InputError(
            "config.source_layers and config.cross_skip are not for config.model=recipe, whose "
            "towers see one pair: expected () and 0"
        )


@lru_cache
def build(options: Options) -> Model:
    """Returns the recipe as a ``Model`` of pure functions."""
    return Model(
        domains=("target", "source"),
        pairing="views",
        inference="cross",
        init=partial(init, options=options),
        lookups=partial(lookups, options=options),
        losses=partial(example_losses, options=options),
        weights=warm_weights,
        penalty=two_towers.penalty,
        project=partial(project, options=options),
        scores=partial(scores, options=options),
        linear=linear,
        source_face=tuple(
            partial(face, options=options, domain="source") for face in (project, scores)
        ),
        diagnostics=partial(diagnose, options=options),
        l1_mask=two_towers.crossing,
        uncrossed=two_towers.uncrossed if options.cross_layers else None,
        start=partial(start, options=options),
        fixed_tables=True,
        folds=options.folds,
        copies=partial(copies, options=options),
    )


def copies(table: str, options: Any) -> int:
    """Rows of a table for each user or item."""
    return options.folds + 1 if table in ("user", "target_item", "source_item") else 1


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises the towers; the tables are zero: ``start`` fits them."""
    dim = options.layers[0] // 2
    rows = {
        "user": sizes.users,
        "target_item": sizes.target_items,
        "source_item": sizes.source_items,
    }
    tables = {
        name: jnp.zeros((count * (options.folds + 1), (dim + 1) * (1 + (name == "user"))))
        for name, count in rows.items()
    }
    tables |= neighbours.init(sizes, DOMAINS, options.neighbours, DOMAINS)
    seen = jnp.zeros((1, 2 * dim + out_of_fold.FEATURES))
    dense = dict(options.module.init(key, seen, seen)["params"])
    for domain, view in zip(DOMAINS, VIEWS, strict=True):
        dense[f"w_{domain}"] = jnp.full((dim,), options.inner_weight, float)
        if options.neighbours:
            dense[f"v_{domain}"] = neighbours.weights(domain, view, options.neighbour_weight)
    return Params(tables, dense)


def start(
    interactions: Any,
    sizes: Sizes,
    seed: int,
    known: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    options: Any,
    views: Sequence[tuple[str, ...]] = VIEWS,
    of: Sequence[str] = DOMAINS,
) -> dict[str, Any]:
    """Fits the tables: factors of all training pairs, those without each fold, and neighbours.

    Args:
      interactions: training pairs by domain.
      sizes: rows of the tables.
      seed: of the factors.
      known: see ``Model.start``.
      mesh: likewise.
      options: of the recipe, or of ``recipe_mlp``.
      views: of a user; the first is that of all domains.
      of: domains of the items that have neighbours.
    """
    near = neighbours.fit(interactions, sizes, views[0], options.neighbours, of, mesh)
    return near | out_of_fold.fit(
        interactions,
        sizes,
        options.factorisation,
        folds=options.folds,
        views=views,
        sweeps=options.ials_sweeps,
        fold_sweeps=options.fold_sweeps,
        seed=seed,
        known=known,
        mesh=mesh,
    )


def lookups(batch: Batch, options: Options) -> dict[str, jax.Array]:
    """Returns {"user": int32[2, n], "target_item": int32[n], "source_item": int32[n]}.

    Each row without the fold of its example; and what ``neighbours`` reads.
    """

    def rows(ids: jax.Array, folds: jax.Array) -> jax.Array:
        return out_of_fold.row_ids(ids, folds, options.folds)

    target, source = batch.target, batch.source
    near = neighbours.lookups(target, source) if options.neighbours else {}
    return near | {
        "user": jnp.stack([rows(target.users, target.folds), rows(source.users, source.folds)]),
        "target_item": rows(target.items, target.folds),
        "source_item": rows(source.items, source.folds),
    }


class _Seen(NamedTuple):
    """A pair as both towers see it, each with its domain's view of the user.

    Attributes:
      merged: [view, item] f32[n, 2 dim] of each tower.
      features: f32[n, 5] of each tower, see ``out_of_fold.features``.
      factors: (view, item) f32[n, dim] of the linear term, of the example's own domain.
    """

    merged: conet.Pair
    features: conet.Pair
    factors: tuple[jax.Array, jax.Array]

    def inputs(self) -> list[jax.Array]:
        """The inputs of the target tower and of the source tower."""
        both = zip(self.merged, self.features, strict=True)
        return [jnp.concatenate(parts, axis=-1) for parts in both]


def _seen(rows: dict[str, jax.Array], domain: str, options: Options) -> _Seen:
    """The examples of a domain."""
    at = ("target", "source").index(domain)
    items = rows[f"{domain}_item"]
    views = out_of_fold.views(rows["user"][at], options.layers[0] // 2)
    return _Seen(
        tuple(merge(view[..., :-1], items[..., :-1]) for view in views),
        tuple(out_of_fold.features(view, items, options.inner_weight) for view in views),
        (views[at][..., :-1], items[..., :-1]),
    )


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, rate: jax.Array | None, options: Options
) -> dict[str, jax.Array]:
    """Returns the logits f32[n] of a batch's examples by domain; ``rate`` None is no dropout."""
    keys = iter(() if rate is None else jax.random.split(batch.key, 4))
    logits = {}
    for at, domain in enumerate(("target", "source")):
        seen = _seen(rows, domain, options)
        if rate is not None:  # dropout is for the towers: the linear term sees its rows whole
            merged = tuple(towers.dropout(next(keys), x, rate) for x in seen.merged)
            seen = seen._replace(merged=merged)
        both = options.module.apply({"params": dense}, *seen.inputs(), batch.cross)
        view, item = seen.factors
        logits[domain] = both[at] + (view * item) @ dense[f"w_{domain}"]
        if options.neighbours:
            near = rows["user_items"][at], rows[f"{domain}_neighbours"]
            labels = getattr(batch, domain).labels
            logits[domain] += neighbours.term(
                dense[f"v_{domain}"], *near, labels, options.neighbours
            )
    return logits


def example_losses(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, hyper: Hyper, options: Options
) -> dict[str, jax.Array]:
    """Returns the loss of each example by domain (Eq. 5)."""
    rate = hyper.dropout if options.dropout else None
    return cross_entropies(batch_logits(dense, rows, batch, rate, options), batch)


def warm_weights(rows: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Returns the weights f32[n] by domain, 0 where the item has no pair outside of the fold."""
    return {
        domain: getattr(batch, domain).weights * out_of_fold.is_warm(rows[f"{domain}_item"])
        for domain in ("target", "source")
        if getattr(batch, domain) is not None
    }


def project(
    params: Params, interactions: Any, options: Options, domain: str = "target"
) -> dict[str, jax.Array]:
    """Sends each table through the first transition once, which is linear but for dot products.

    Returns:
      ``user`` f32[users, r] and ``item`` f32[items, r] of the domain, whose sum is the first
      pre-activation of both towers but for the dot products; ``dots`` f32[2, r], what one of each
      view adds; ``user_view`` f32[users, 2, dim] and ``item_factors`` f32[items, dim], what they
      are of; ``item_warm`` bool[items]; ``dense``; and what ``neighbours.scores`` reads.
    """
    dense, dim = params.dense, options.layers[0] // 2
    user, item = (
        out_of_fold.of_all_pairs(params.tables[name], options.folds)
        for name in ("user", f"{domain}_item")
    )
    views = out_of_fold.views(user, dim)
    width = 2 * dim + out_of_fold.FEATURES
    one, none = jnp.zeros((1, width)).at[0, 2 * dim].set(1), jnp.zeros((1, width))
    item_input = out_of_fold.item_part(item)
    first = partial(two_towers.first_layer, options.module)
    linear = two_towers.without_bias(dense)
    near = {}
    if options.neighbours:
        num_ids = sum(interactions[d].num_items for d in DOMAINS)
        given = dense[f"v_{domain}"], num_ids, options.neighbours, DOMAINS, domain
        near = neighbours.project(params.tables, *given)
    return near | {
        "user": first(dense, *map(out_of_fold.user_part, views)),
        "item": first(linear, item_input, item_input),
        "dots": first(linear, jnp.concatenate([one, none]), jnp.concatenate([none, one])),
        "user_view": jnp.stack([view[:, :-1] for view in views], axis=1),
        "item_factors": item[:, :-1],
        "item_warm": out_of_fold.is_warm(item),
        "dense": dense,
    }


def scores(
    projected: dict[str, Any],
    users: jax.Array,
    items: jax.Array,
    options: Options,
    domain: str = "target",
) -> jax.Array:
    """Logits f32[n, c] of users int32[n] for items int32[n, c] of a domain, from layer 1 on."""
    dense, at = projected["dense"], ("target", "source").index(domain)
    views, factors = projected["user_view"][users], projected["item_factors"][items]
    dots = options.inner_weight * jnp.einsum("nvd,ncd->ncv", views, factors)
    both = projected["user"][users][:, None, :] + projected["item"][items]
    both = jax.nn.relu(both + dots @ projected["dots"])
    target, source = jnp.split(both, [options.layers[1]], axis=-1)
    logits = options.module.apply(
        {"params": dense}, [None, target], [None, source], method=CoNet.upper
    )[at]
    weighed = views[:, at] * dense[f"w_{domain}"][None, :]
    logits = logits + jnp.einsum("nd,ncd->nc", weighed, factors)
    logits = logits + neighbours.scores(projected, users, items)
    return jnp.where(projected["item_warm"][items], logits, COLD)


def linear(projected: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """What of ``scores`` of the target is w^T (view * item): f32[users, dim], f32[items, dim]."""
    w = projected["dense"]["w_target"]
    return projected["user_view"][:, 0] * w[None, :], projected["item_factors"]


def diagnose(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, options: Options
) -> dict[str, jax.Array]:
    """Returns ``diagnostics.of_towers`` of a batch and ``of_crossing`` of its target examples."""
    logits = batch_logits(dense, rows, batch, None, options)
    given = dense, two_towers.uncrossed(dense), *_seen(rows, "target", options).inputs()
    return diagnostics.of_towers(logits, batch) | diagnostics.of_crossing(
        options.module, *given, cross_layers=options.cross_layers
    )
