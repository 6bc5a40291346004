"""What a model of two towers that share users is made of, whatever its towers exchange.

For a module with the interface of ``conet.CoNet``: the tables and what a step reads of them, the
loss of each example, and scores with what can be computed once for each user and item.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conet_jax.models import diagnostics, history, towers
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes, cross_entropies
from conet_jax.models.towers import Tower, merge

OTHER = {"target": "source", "source": "target"}


def model_of(options: Any, module: nn.Module) -> Model:
    """Returns the model of a module of two towers that share users, such as ``CoNet``."""
    return Model(
        domains=("target", "source"),
        pairing=options.pairing,
        inference=options.inference,
        init=partial(init, options=options, module=module),
        lookups=partial(lookups, options=options),
        losses=partial(example_losses, options=options, module=module),
        penalty=penalty,
        project=partial(project, options=options, module=module),
        scores=partial(scores, options=options, module=module),
        source_face=tuple(
            partial(face, options=options, module=module, domain="source")
            for face in (project, scores)
        ),
        shared_users=options.cross_layers > 0,
        diagnostics=partial(diagnose, options=options, module=module, uncrossed=uncrossed),
        l1_mask=crossing,
        uncrossed=uncrossed if options.cross_layers else None,
    )


def init(key: jax.Array, sizes: Sizes, options: Any, module: nn.Module) -> Params:
    """Initialises tables, N(0, 0.01^2), and towers; embeddings are half as wide as layer 0."""
    keys = jax.random.split(key, 4)
    dim = options.layers[0] // 2
    tables = {
        "user": towers.gaussian(keys[0], (sizes.users, dim)),
        "target_item": towers.gaussian(keys[1], (sizes.target_items, dim)),
        "source_item": towers.gaussian(keys[2], (sizes.source_items, dim)),
    }
    merged = jnp.zeros((1, 2 * dim))
    return Params(tables, module.init(keys[3], merged, merged)["params"])


def lookups(batch: Batch, options: Any) -> dict[str, jax.Array]:
    """Returns {"user": int32[k, n], "target_item": int32[n], "source_item": int32[n]}.

    ``user`` has the target's users and, unless the pairs share their user, the source's.
    """
    users = [batch.target.users]
    if options.pairing != "same_user":
        users.append(batch.source.users)
    items = {"target_item": batch.target.items, "source_item": batch.source.items}
    return {"user": jnp.stack(users), **items}


def inputs(
    rows: dict[str, jax.Array], batch: Batch, rate: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns x_ui and x_vj of a batch, f32[n, p] each; ``rate`` None is no dropout."""
    users = rows["user"]
    merged = merge(users[0], rows["target_item"]), merge(users[-1], rows["source_item"])
    if rate is None:
        return merged
    keys = jax.random.split(batch.key)
    return tuple(towers.dropout(key, x, rate) for key, x in zip(keys, merged, strict=True))


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, rate: Any, module: nn.Module
) -> dict[str, jax.Array]:
    """Returns the logits f32[n] of a batch's examples by domain."""
    both = module.apply({"params": dense}, *inputs(rows, batch, rate), batch.cross)
    return dict(zip(("target", "source"), both, strict=True))


def example_losses(
    dense: Any,
    rows: dict[str, jax.Array],
    batch: Batch,
    hyper: Hyper,
    options: Any,
    module: nn.Module,
) -> dict[str, jax.Array]:
    """Returns the loss of each example by domain (Eq. 5)."""
    rate = hyper.dropout if options.dropout else None
    return cross_entropies(batch_logits(dense, rows, batch, rate, module), batch)


def penalty(dense: Any, hyper: Hyper) -> jax.Array:
    """Returns l2 / 2 times the squared norm of what crosses (footnote 11)."""
    crosses = zip(jax.tree.leaves(dense), jax.tree.leaves(crossing(dense)), strict=True)
    return hyper.l2 / 2 * sum(jnp.sum(jnp.square(h)) for h, is_h in crosses if is_h)


def crossing(dense: Any) -> Any:
    """Returns the pytree of bools that is True on the H^l (on U and V if low-rank)."""
    return {
        name: jax.tree.map(lambda _, name=name: name.startswith("H_"), part)
        for name, part in dense.items()
    }


def uncrossed(dense: Any) -> Any:
    """Returns the dense parameters with every H^l at zero: two separate towers."""
    return jax.tree.map(lambda h, is_h: jnp.zeros_like(h) if is_h else h, dense, crossing(dense))


def project(
    params: Params, interactions: Any, options: Any, module: nn.Module, domain: str = "target"
) -> dict[str, jax.Array]:
    """Sends each table through the first transition once: Eq. 3 is linear in [user, item].

    Args:
      params: settled parameters.
      interactions: training interactions by domain; those of the other domain are read under
        ``inference: cross``: its tower gets [p_u, mean of the user's items there].
      options: structure.
      module: the towers.
      domain: whose items are to be scored.

    Returns:
      Under "target" see ``towers.project_tower``. Under "cross" ``user`` f32[users, r] and ``item``
      f32[items, r], whose sum is the first pre-activation of both towers, the target's before the
      source's; ``dense``. Where connections skip layers the input is needed above, too: ``user``
      and ``item`` are then embeddings and ``user_history`` is that mean.
    """
    tables, dense = params
    user, item = tables["user"], tables[f"{domain}_item"]
    if options.inference == "target":
        return towers.project_tower(dense[domain], user, item)
    other = OTHER[domain]
    pairs = interactions[other]
    means = history.mean_of_all(pairs.items, pairs.users, tables[f"{other}_item"], user.shape[0])
    if getattr(options, "cross_skip", 0):
        return {"user": user, "user_history": means, "item": item, "dense": dense}
    none = jnp.zeros_like(user)
    by_user = {domain: merge(user, none), other: merge(user, means)}
    none = jnp.zeros_like(item)
    by_item = {domain: merge(none, item), other: merge(none, none)}
    return {
        "user": first_layer(module, dense, by_user["target"], by_user["source"]),
        "item": first_layer(module, without_bias(dense), by_item["target"], by_item["source"]),
        "dense": dense,
    }


def first_layer(module: nn.Module, dense: Any, target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns the first pre-activations of both towers side by side, f32[..., r]."""
    both = module.apply({"params": dense}, 0, [target], [source], method=type(module).transition)
    return jnp.concatenate(both, axis=-1)


def without_bias(dense: Any) -> Any:
    """Drops the first biases: they ride on the user's part of a pre-activation, once."""

    def strip(tower: Any) -> Any:
        layer = tower["W_0"]
        return {**tower, "W_0": {**layer, "bias": jnp.zeros_like(layer["bias"])}}

    return {**dense, "target": strip(dense["target"]), "source": strip(dense["source"])}


def scores(
    projected: dict[str, Any],
    users: jax.Array,
    items: jax.Array,
    options: Any,
    module: nn.Module,
    domain: str = "target",
) -> jax.Array:
    """Logits of each user for its items: the forward pass, from layer 1 on where it can.

    Args:
      projected: from ``project``.
      users: int32[n].
      items: int32[n, c].
      options: structure.
      module: the towers.
      domain: that of the items.

    Returns:
      f32[n, c].
    """
    at = ("target", "source").index(domain)
    if options.inference == "target":
        layers = (options.layers, getattr(options, "source_layers", ()) or options.layers)[at]
        return towers.score_tower(Tower(layers, dtype=options.dtype), projected, users, items)
    variables = {"params": projected["dense"]}
    if "user_history" in projected:
        item = projected["item"][items]

        def beside(table: jax.Array) -> jax.Array:
            return jnp.broadcast_to(table[users][:, None, :], item.shape)

        user, means = beside(projected["user"]), beside(projected["user_history"])
        inputs = [merge(user, item), merge(user, means)]
        return module.apply(variables, *(inputs if domain == "target" else inputs[::-1]))[at]
    both = nn.relu(projected["user"][users][:, None, :] + projected["item"][items])
    target, source = jnp.split(both, [options.layers[1]], axis=-1)
    # The input, layer 0, is used up.
    known = [None, target], [None, source]
    return module.apply(variables, *known, method=type(module).upper)[at]


def diagnose(
    dense: Any,
    rows: dict[str, jax.Array],
    batch: Batch,
    options: Any,
    module: nn.Module,
    uncrossed: Any,
) -> dict[str, jax.Array]:
    """Returns ``diagnostics.of_towers`` and ``diagnostics.of_crossing`` of a batch."""
    logits = batch_logits(dense, rows, batch, None, module)
    given = dense, uncrossed(dense), *inputs(rows, batch, None)
    return diagnostics.of_towers(logits, batch) | diagnostics.of_crossing(
        module, *given, cross_layers=options.cross_layers
    )
