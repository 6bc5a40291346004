"""CoNet (Eqs. 1-4): two towers that share users and exchange hidden activations through H^l.

Tables: ``user`` (P, shared), ``target_item`` and ``source_item`` (Q of each domain). Dense
parameters: one tower a domain (W^l, b^l, output h) and, under ``cross``, the H^l of the lowest
``cross_layers`` transitions.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax import devices, losses
from conet_jax.models import history, out_of_fold, towers
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes

DIRECTIONS = ("to_target", "to_source")
# [[a_tt, a_ts], [a_st, a_ss]]; Misra et al. 2016, Sec. 5.1, find 0.9 for the own task's best.
STITCH_START = ((0.9, 0.1), (0.1, 0.9))


class Options(NamedTuple):
    """Structure of a CoNet: what changes shapes or the program, not real-valued knobs.

    Attributes:
      layers: tower widths; the first is the merged embedding, twice the embedding dimension.
      cross_layers: number of crossed transitions, counted from the lowest; 0 is no transfer.
      cross_per_direction: an H^l for each direction instead of a shared one (footnote 1).
      cross_rank: rank of H^l = U^T V (footnote 3); 0 is a full matrix.
      cross_unit: "matrix", the H^l, or "stitch", the scalars of ``cross_stitch``.
      inner_product: a second logit term w^T (p_u * q_i), w learned, one weight a dimension, so
        that the towers learn what the linear model misses.
      inner_weight: start of every entry of w.
      output_bias: start of the output's bias with an inner product.
      output_scale: factor on the towers' output weights at the start, under "he".
      initializer: "gaussian" or "he" for the towers; tables and H^l are N(0, 0.01^2) in both.
      dropout: whether ``Hyper.dropout`` is applied to the merged embeddings in training.
      pairing: "random", "same_user", "profile" or "views".
      inference: "target" (tower alone) or "cross" (with the user's source profile, or view).
      folds: of the fixed, cross-fitted tables (``out_of_fold``) under "views".
      dtype: "float32", or "bfloat16" for the towers' hidden activations and their products.
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    cross_layers: int = 3
    cross_per_direction: bool = False
    cross_rank: int = 0
    cross_unit: str = "matrix"
    inner_product: bool = False
    inner_weight: float = 1.0
    output_bias: float = 0.0
    output_scale: float = 1.0
    initializer: str = "he"
    dropout: bool = False
    pairing: str = "same_user"
    inference: str = "cross"
    folds: int = 0
    dtype: str = "float32"


@lru_cache
def build(options: Options) -> Model:
    """Returns CoNet as a ``Model`` of pure functions, the same object for the same options."""
    return Model(
        domains=("target", "source"),
        pairing=options.pairing,
        inference=options.inference,
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lambda batch: lookups(batch, options),
        loss=partial(loss, options=options),
        project=lambda params, interactions: project(params, interactions, options),
        scores=lambda projected, users, items: scores(projected, users, items, options),
        diagnostics=lambda dense, rows, batch: diagnostics(dense, rows, batch, options),
        l1_mask=l1_mask,
        fixed_tables=options.pairing == "views",
        copies=options.folds + 1 if options.pairing == "views" else 1,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Initialises tables, towers and H^l.

    Args:
      key: PRNG key.
      sizes: rows of the tables.
      options: structure.

    Returns:
      ``Params``; the embedding dimension is half of the first layer. Under "views" the tables are
      zero, in the shapes of ``out_of_fold``, which fits them.
    """
    keys = dict(
        zip(
            ("user", "target_item", "source_item", "target", "source", "cross"),
            jax.random.split(key, 6),
            strict=True,
        )
    )
    dim = options.layers[0] // 2
    rows = {
        "user": sizes.users,
        "target_item": sizes.target_items,
        "source_item": sizes.source_items,
    }
    features = 0
    if options.pairing == "views":
        features = out_of_fold.FEATURES
        tables = {
            name: jnp.zeros((n * (options.folds + 1), (dim + 1) * (1 + (name == "user"))))
            for name, n in rows.items()
        }
    else:
        tables = {name: towers.gaussian(keys[name], (n, dim)) for name, n in rows.items()}
    dense: dict[str, Any] = {
        domain: towers.init_tower(
            keys[domain],
            options.layers,
            initializer=options.initializer,
            output_scale=options.output_scale,
            features=features,
            inner_weight=options.inner_weight if options.inner_product else None,
            output_bias=options.output_bias,
        )
        for domain in ("target", "source")
    }
    dense["cross"] = {}
    for level in range(options.cross_layers):
        shape = dense["target"][f"layer_{level + 1}"]["kernel"].shape
        key = jax.random.fold_in(keys["cross"], level)
        if options.cross_unit == "stitch":
            cross = {"stitch": jnp.array(STITCH_START)}
        elif options.cross_per_direction:
            cross = {
                direction: _init_cross(jax.random.fold_in(key, i), shape, options.cross_rank)
                for i, direction in enumerate(DIRECTIONS)
            }
        else:
            cross = {"both": _init_cross(key, shape, options.cross_rank)}
        dense["cross"][f"layer_{level + 1}"] = cross
    return Params(tables, dense)


def _init_cross(key: jax.Array, shape: tuple[int, int], rank: int) -> dict[str, jax.Array]:
    if not rank:
        return {"h": towers.gaussian(key, shape)}
    u_key, v_key = jax.random.split(key)
    # U^T V has entries of standard deviation 0.01 at any rank, as the full matrix has.
    std = (towers.GAUSSIAN_STD / rank**0.5) ** 0.5
    return {
        "u": std * jax.random.normal(u_key, (rank, shape[1])),
        "v": std * jax.random.normal(v_key, (rank, shape[0])),
    }


def cross_matrices(dense: Any, level: int) -> tuple[jax.Array, jax.Array] | None:
    """Returns (H to the target, H to the source) of transition ``level``, or None if not crossed.

    Each is f32[in, out], the transpose of the paper's H^l: activations are row vectors.
    """
    layer = dense["cross"].get(f"layer_{level + 1}")
    if layer is None:
        return None
    if "stitch" in layer:
        a, name = layer["stitch"], f"layer_{level + 1}"
        return (
            a[0, 1] * dense["target"][name]["kernel"],
            a[1, 0] * dense["source"][name]["kernel"],
        )

    def full(h: dict[str, jax.Array]) -> jax.Array:
        return h["h"] if "h" in h else h["v"].T @ h["u"]

    return tuple(full(layer.get(direction, layer.get("both"))) for direction in DIRECTIONS)


def transition(
    dense: Any, level: int, both: jax.Array, cross: jax.Array | float = 1.0
) -> jax.Array:
    """One transition of both towers before the rectifier (Eq. 3a, 3b), as one product.

    ``[a_t, a_s] [[W_t, H_ts], [H_st, W_s]] + [b_t, b_s]``, so that the target receives
    ``a_t W_t + a_s H_st + b_t``; above the crossed layers there is no H.

    Args:
      dense: dense parameters.
      level: l, from 0.
      both: f32[..., 2 p], a^l of the target tower and, beside it, of the source tower.
      cross: factor on the H^l, 0 where nothing crosses.

    Returns:
      f32[..., 2 r], both pre-activations side by side.
    """
    name = f"layer_{level + 1}"
    target, source = dense["target"][name], dense["source"][name]
    matrices = cross_matrices(dense, level)
    if matrices is None:
        own, other = jnp.split(both, 2, axis=-1)
        return jnp.concatenate([towers.affine(target, own), towers.affine(source, other)], axis=-1)
    to_target, to_source = (cross * h for h in matrices)
    own = [target["kernel"], source["kernel"]]
    if "stitch" in dense["cross"][name]:
        # Where nothing crosses the tower is a plain one.
        kept = jnp.diagonal(dense["cross"][name]["stitch"])
        own = [(1 + cross * (k - 1)) * w for k, w in zip(kept, own, strict=True)]
    block = jnp.block([[own[0], to_source], [to_target, own[1]]])
    return towers.affine(
        {"kernel": block, "bias": jnp.concatenate([target["bias"], source["bias"]])}, both
    )


def forward(
    dense: Any,
    target: jax.Array,
    source: jax.Array,
    *,
    cross: jax.Array | float = 1.0,
    dtype: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """Both towers from the merged embeddings to the logits (Eqs. 1-4).

    Args:
      dense: dense parameters.
      target: f32[..., p], [p_u, q_i] of the target domain.
      source: f32[..., p], [p_v, q_j] of the source domain.
      cross: factor on the cross terms of Eq. 3.
      dtype: of the hidden activations, see ``Options``.

    Returns:
      (target logits, source logits), f32[...] each.
    """
    both = towers.activations(jnp.concatenate((target, source), axis=-1), dtype)
    for level in range(towers.depth(dense["target"])):
        both = jax.nn.relu(transition(dense, level, both, cross))
    target, source = jnp.split(both, 2, axis=-1)
    return (
        towers.output_logits(dense["target"], target),
        towers.output_logits(dense["source"], source),
    )


def lookups(batch: Batch, options: Options) -> dict[str, jax.Array]:
    """Returns the ids that a step reads: {"user": int32[k, n], …_item: int32[n] or [n, 1 + L]}.

    ``user`` has the target's users and, unless the pairs share their user, the source's. Item ids
    are the examples' in column 0 and, with profiles, those of the profiles after it. Under "views"
    ``user`` is int32[2, n] and an item's table int32[n], each without the example's fold.
    """
    target, source = batch.target, batch.source
    if options.pairing == "views":
        rows = {
            name: out_of_fold.row_ids(ids, examples.folds, options.folds)
            for name, ids, examples in (
                ("target_user", target.users, target),
                ("source_user", source.users, source),
                ("target_item", target.items, target),
                ("source_item", source.items, source),
            )
        }
        users = jnp.stack([rows.pop("target_user"), rows.pop("source_user")])
        return {"user": users, **rows}
    users = [target.users] if options.pairing == "same_user" else [target.users, source.users]
    ids = {"user": jnp.stack(users)}
    for name, examples, profile in (
        ("target_item", target, batch.target_profile),
        ("source_item", source, batch.source_profile),
    ):
        columns = [examples.items[:, None]]
        if profile is not None:
            columns.append(profile.items)
        ids[name] = jnp.concatenate(columns, axis=1)
    return ids


class _Input(NamedTuple):
    """Both towers' inputs in a forward pass: merged embeddings, and features beside them."""

    merged: tuple[jax.Array, jax.Array]
    features: tuple[jax.Array, jax.Array] | None = None

    def joined(self) -> tuple[jax.Array, jax.Array]:
        """Returns (target's input, source's input)."""
        if self.features is None:
            return self.merged
        pairs = zip(self.merged, self.features, strict=True)
        return tuple(jnp.concatenate(pair, axis=-1) for pair in pairs)


def _inputs(rows: dict[str, jax.Array], batch: Batch, options: Options) -> list[_Input]:
    """What goes into the towers, a forward pass after the other."""
    users = rows["user"]
    if options.pairing == "views":
        return [
            _seen(users[0], rows["target_item"], options),
            _seen(users[1], rows["source_item"], options),
        ]
    target_users, source_users = users[0], users[-1]
    target_items, source_items = rows["target_item"][:, 0], rows["source_item"][:, 0]
    merge = towers.merge
    if options.pairing != "profile":
        return [_Input((merge(target_users, target_items), merge(source_users, source_items)))]
    source_profile = history.mean_of_batch(rows["source_item"][:, 1:], batch.source_profile)
    target_profile = history.mean_of_batch(rows["target_item"][:, 1:], batch.target_profile)
    return [
        _Input((merge(target_users, target_items), merge(target_users, source_profile))),
        _Input((merge(source_users, target_profile), merge(source_users, source_items))),
    ]


def _seen(users: jax.Array, items: jax.Array, options: Options) -> _Input:
    """A pair as both towers see it, each with its domain's view of the user."""
    views = out_of_fold.views(users, options.layers[0] // 2)
    return _Input(
        tuple(towers.merge(view[..., :-1], items[..., :-1]) for view in views),
        tuple(out_of_fold.features(view, items, options.inner_weight) for view in views),
    )


def _inner_rows(
    rows: dict[str, jax.Array], options: Options
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(users, items) f32[n, dim] of each domain's inner product."""
    users = rows["user"]
    if options.pairing == "views":
        dim = options.layers[0] // 2
        return tuple(
            (out_of_fold.views(users[i], dim)[i][..., :-1], rows[f"{domain}_item"][..., :-1])
            for i, domain in enumerate(("target", "source"))
        )
    return (users[0], rows["target_item"][:, 0]), (users[-1], rows["source_item"][:, 0])


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, options: Options, rate: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns (target logits, source logits) f32[n] of a batch; ``rate`` None is no dropout."""
    inputs = _inputs(rows, batch, options)
    if rate is not None:
        keys = iter(jax.random.split(batch.key, 2 * len(inputs)))
        inputs = [
            each._replace(merged=tuple(towers.dropout(next(keys), x, rate) for x in each.merged))
            for each in inputs
        ]
    logits = [
        forward(dense, *each.joined(), cross=batch.cross, dtype=options.dtype) for each in inputs
    ]
    # Dropout is for the towers: the inner product sees its rows whole.
    target, source = _inner_rows(rows, options)
    return (
        logits[0][0] + towers.inner_logits(dense["target"], *target),
        logits[-1][1] + towers.inner_logits(dense["source"], *source),
    )


def loss(
    dense: Any,
    rows: dict[str, jax.Array],
    batch: Batch,
    hyper: Hyper,
    options: Options,
    reduction: str = "mean",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The joint loss (Eq. 7) of a batch.

    Args:
      dense: dense parameters.
      rows: embedding rows in the shapes of ``lookups`` with the dimension appended.
      batch: examples.
      hyper: target weight, l2 (on the H^l) and dropout rate are read.
      options: structure.
      reduction: "mean" over each domain's examples, or "sum".

    Returns:
      (f32[], sums and counts by domain), see ``Model.loss``.
    """
    rate = hyper.dropout if options.dropout else None
    target_logits, source_logits = batch_logits(dense, rows, batch, options, rate)
    target, source = batch.target, batch.source
    value = losses.joint_loss(
        target_logits,
        target.labels,
        source_logits,
        source.labels,
        target_weight=hyper.target_weight,
        target_weights=target.weights,
        source_weights=source.weights,
        reduction=reduction,
    )
    # Each device bears an equal share of the penalty.
    counts = jnp.maximum(*devices.pmean((target.weights.sum(), source.weights.sum())))
    squares = sum(jnp.sum(jnp.square(h)) for h in jax.tree.leaves(dense["cross"]))
    # Like l1, l2 weighs the norm against the mean loss per example, and only where H is in use.
    squares = batch.cross * squares * (counts if reduction == "sum" else 1.0)
    value = value + hyper.l2 / 2 * squares
    aux = {}
    for name, logits, examples in (
        ("target", target_logits, target),
        ("source", source_logits, source),
    ):
        aux[f"{name}_loss"] = losses.binary_cross_entropy(
            logits, examples.labels, weights=examples.weights
        )
        aux[f"{name}_count"] = examples.weights.sum()
    return value, aux


def project(params: Params, interactions: Any, options: Options) -> dict[str, Any]:
    """Sends each table through the first transition once (Eq. 3 is linear in [user, item]).

    Args:
      params: settled parameters.
      interactions: training interactions (``Interactions``) by domain; the source's are
        read under ``inference: cross``, where the source input of user u is [p_u, mean of u's
        source items].
      options: structure.

    Returns:
      Under "target" see ``towers.project_target``. Under "cross" ``user`` f32[users, 2 r] and
      ``item`` f32[target items, 2 r], whose sum is the first pre-activation of both towers side
      by side; tables of the inner product; ``dense``. Under "views" inner products are inputs too:
      ``dots`` f32[2, 2 r] is what one of each view adds to that sum, ``user_view``
      f32[users, 2, dim] and ``item_factors`` f32[target items, dim] are what they are of.
    """
    tables, dense = params
    user, item = tables["user"], tables["target_item"]
    if options.pairing == "views":
        return _project_views(dense, user, item, options)
    if options.inference == "target":
        return towers.project_target(dense["target"], user, item)
    inner = towers.project_inner(dense["target"], user, item)
    source = interactions["source"]
    profile = history.mean_of_all(source.items, source.users, tables["source_item"], user.shape[0])
    none = jnp.zeros_like(user)
    by_user = transition(dense, 0, jnp.concatenate([user, none, user, profile], axis=-1))
    none = jnp.zeros_like(item)
    by_item = transition(
        _without_bias(dense), 0, jnp.concatenate([none, item, none, none], axis=-1)
    )
    return {
        "user": by_user,
        "item": by_item,
        "dense": dense,
        **inner,
    }


def _project_views(
    dense: Any, user: jax.Array, item: jax.Array, options: Options
) -> dict[str, Any]:
    dim = options.layers[0] // 2
    views = out_of_fold.views(out_of_fold.of_all_pairs(user, options.folds), dim)
    item = out_of_fold.of_all_pairs(item, options.folds)
    vectors = [view[:, :-1] for view in views]
    linear = _without_bias(dense)
    width = 2 * dim + out_of_fold.FEATURES
    one_each = jnp.eye(2)[:, :, None] * (jnp.arange(width) == 2 * dim)[None, None, :]
    return {
        "user": transition(
            dense, 0, jnp.concatenate([*map(out_of_fold.user_part, views)], axis=-1)
        ),
        "item": transition(linear, 0, jnp.tile(out_of_fold.item_part(item), (1, 2))),
        "dots": transition(linear, 0, one_each.reshape(2, 2 * width)),
        "user_view": jnp.stack(vectors, axis=1),
        "item_factors": item[:, :-1],
        "dense": dense,
        **towers.project_inner(dense["target"], vectors[0], item[:, :-1]),
    }


def _without_bias(dense: Any) -> Any:
    # The first biases ride on the user's part of a pre-activation, once.
    def strip(tower: Any) -> Any:
        layer = tower["layer_1"]
        return {**tower, "layer_1": {**layer, "bias": jnp.zeros_like(layer["bias"])}}

    return {**dense, "target": strip(dense["target"]), "source": strip(dense["source"])}


def scores(
    projected: dict[str, Any], users: jax.Array, items: jax.Array, options: Options
) -> jax.Array:
    """Target logits of each user for its items: the forward pass of ``loss`` from layer 1 on.

    Args:
      projected: from ``project``.
      users: int32[n].
      items: int32[n, c].
      options: structure.

    Returns:
      f32[n, c].
    """
    if options.inference == "target":
        return towers.score_target(projected, users, items, options.dtype)
    dense = projected["dense"]
    both = projected["user"][users][:, None, :] + projected["item"][items]
    if options.pairing == "views":
        pairs = projected["user_view"][users], projected["item_factors"][items]
        dots = options.inner_weight * jnp.einsum("nvd,ncd->ncv", *pairs)
        both = both + dots @ projected["dots"]
    both = towers.activations(jax.nn.relu(both), options.dtype)
    for level in range(1, towers.depth(dense["target"])):
        both = jax.nn.relu(transition(dense, level, both))
    target, _ = jnp.split(both, 2, axis=-1)
    return towers.output_logits(dense["target"], target) + towers.score_inner(
        projected, users, items
    )


def diagnostics(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, options: Options
) -> dict[str, jax.Array]:
    """What the cross connections carry, for each crossed layer and direction.

    Args:
      dense: dense parameters.
      rows: as in ``loss``.
      batch: a batch of examples.
      options: structure.

    Returns:
      For layer l: ``h_mean_abs/layer_l`` (mean absolute entry of H^l), ``h_zeros/layer_l``
      (fraction of exact zeros), ``cross_ratio/<domain>/layer_l``: norm(H a_other) / norm(W a_own)
      over the batch, 0 where W a_own is. With an H for each direction the first two end in
      ``/to_target`` or ``/to_source``.
      And ``logit_spread/<domain>``, largest minus smallest logit: 0 of a dead tower.
    """
    logits = batch_logits(dense, rows, batch, options, None)
    out = {
        "logit_spread/target": towers.logit_spread(logits[0], batch.target.weights),
        "logit_spread/source": towers.logit_spread(logits[1], batch.source.weights),
    }
    target, source = _inputs(rows, batch, options)[0].joined()
    for level in range(options.cross_layers):
        name = f"layer_{level + 1}"
        matrices = cross_matrices(dense, level)
        directions = DIRECTIONS if options.cross_per_direction else DIRECTIONS[:1]
        for direction, h in zip(directions, matrices, strict=False):
            suffix = f"{name}/{direction}" if options.cross_per_direction else name
            out[f"h_mean_abs/{suffix}"] = jnp.abs(h).mean()
            out[f"h_zeros/{suffix}"] = (h == 0).mean()
        for domain, h, own, other in (
            ("target", matrices[0], target, source),
            ("source", matrices[1], source, target),
        ):
            crossed = jnp.linalg.norm(other @ h)
            kept = jnp.linalg.norm(own @ dense[domain][name]["kernel"])
            if "stitch" in dense["cross"][name]:
                at = int(domain == "source")
                kept = kept * jnp.abs(dense["cross"][name]["stitch"][at, at])
            out[f"cross_ratio/{domain}/{name}"] = jnp.where(kept > 0, crossed / kept, 0.0)
        both = jnp.concatenate([target, source], axis=-1)
        target, source = jnp.split(jax.nn.relu(transition(dense, level, both)), 2, axis=-1)
    return out


def l1_mask(dense: Any) -> Any:
    """Returns the pytree of bools that is True on the H^l (on U and V if low-rank)."""
    return {
        name: jax.tree.map(lambda _, cross=name == "cross": cross, part)
        for name, part in dense.items()
    }
