"""LightGCN (He et al. 2020): embeddings propagated over the target's graph of users and items.

With ``R`` the users x items matrix of training pairs and ``A = D_u^-1/2 R D_i^-1/2`` (a pair counts
one over the root of the pairs of its user and of its item), a layer is, Eq. 3,

    ``E_u^(k+1) = A E_i^(k)``, ``E_i^(k+1) = A^T E_u^(k)``,

an embedding is the mean of layers 0 … K (Eq. 4), and a score the inner product of a user's with an
item's (Eq. 6). For each observed pair (u, i) a sampled item j of u gives the loss -log(sigmoid(
score_ui - score_uj)) + l2 / 2 (|e_u|^2 + |e_i|^2 + |e_j|^2), the e those of layer 0 (Eq. 15).

Every step reads and changes every embedding. So they are dense parameters and no tables, and the
variant's steps are of many pairs. The gradient is exact: propagation is a symmetric linear map of
all embeddings, so it carries their gradient back as it carries them.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conet_jax import losses
from conet_jax.models import factors
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes

_STD = 0.1  # of the start, as in the authors' code


class Options(NamedTuple):
    """Structure.

    Attributes:
      layers: half of the first is the dimension of the embeddings, as those of a tower.
      graph_layers: K, layers of the propagation; 0 is matrix factorisation without biases.
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    graph_layers: int = 3


class Graph(NamedTuple):
    """The target's training pairs in both orders, and what a user or an item is weighed by.

    Attributes:
      users: int32[nnz], sorted.
      items: int32[nnz], of these.
      item_users: int32[nnz], the users in the order of ``sorted_items``.
      sorted_items: int32[nnz].
      user_scale: f32[users], one over the root of a user's pairs, 0 for none.
      item_scale: f32[items], likewise.
    """

    users: jax.Array
    items: jax.Array
    item_users: jax.Array
    sorted_items: jax.Array
    user_scale: jax.Array
    item_scale: jax.Array


Embeddings = dict[str, jax.Array]  # user: f32[users, dim], item: f32[items, dim]


@lru_cache
def build(options: Options) -> Model:
    """Returns the network as a ``Model`` of pure functions."""
    return Model(
        domains=("target",),
        pairing="pairs",
        init=lambda key, sizes: init(key, sizes, options),
        lookups=lambda batch: {},
        graph=graph,
        losses=partial(example_losses, options=options),
        penalties=penalties,
        project=lambda params, interactions: project(params, interactions, options),
        scores=factors.scores,
        linear=factors.linear,
        logits=False,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Draws the embeddings of layer 0 from N(0, 0.1^2)."""
    user_key, item_key = jax.random.split(key)
    dim = options.layers[0] // 2
    user = _STD * jax.random.normal(user_key, (sizes.users, dim))
    return Params(
        {}, {"user": user, "item": _STD * jax.random.normal(item_key, (sizes.target_items, dim))}
    )


def graph(interactions: Any) -> Graph:
    """Returns the graph of the target's training interactions (``interactions.Interactions``)."""
    pairs = interactions["target"]
    order = jnp.argsort(pairs.items, stable=True)
    sorted_items = pairs.items[order]
    degrees = jnp.diff(pairs.indptr)
    item_degrees = jnp.bincount(pairs.items, length=pairs.num_items)
    scales = (_root(degrees), _root(item_degrees))
    return Graph(pairs.users, pairs.items, pairs.users[order], sorted_items, *scales)


def _root(degrees: jax.Array) -> jax.Array:
    """One over the root, 0 for 0."""
    return jnp.where(degrees > 0, jnp.maximum(degrees, 1).astype(float) ** -0.5, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def propagate(embeddings: Embeddings, pairs: Graph, layers: int) -> Embeddings:
    """The mean of layers 0 … K: (I + M + … + M^K) E / (K + 1), M the symmetric [[0, A], [A^T, 0]].

    Args:
      embeddings: of layer 0.
      pairs: the graph.
      layers: K.

    Returns:
      Embeddings of the same shapes.
    """
    layer, total = embeddings, embeddings
    for _ in range(layers):
        layer = _layer(layer, pairs)
        total = jax.tree.map(jnp.add, total, layer)
    return jax.tree.map(lambda x: x / (layers + 1), total)


def _layer(embeddings: Embeddings, pairs: Graph) -> Embeddings:
    user = embeddings["user"] * pairs.user_scale[:, None]
    item = embeddings["item"] * pairs.item_scale[:, None]
    from_items = _sums(item[pairs.items], pairs.users, len(user))
    from_users = _sums(user[pairs.item_users], pairs.sorted_items, len(item))
    return {
        "user": from_items * pairs.user_scale[:, None],
        "item": from_users * pairs.item_scale[:, None],
    }


def _sums(rows: jax.Array, owners: jax.Array, count: int) -> jax.Array:
    return jax.ops.segment_sum(rows, owners, count, indices_are_sorted=True)


def _forward(embeddings: Embeddings, pairs: Graph, layers: int) -> tuple[Embeddings, Graph]:
    return propagate(embeddings, pairs, layers), pairs


def _backward(layers: int, pairs: Graph, gradient: Embeddings) -> tuple[Embeddings, None]:
    return propagate(gradient, pairs, layers), None


propagate.defvjp(_forward, _backward)


def example_losses(
    dense: Embeddings, rows: dict, batch: Batch, hyper: Hyper, options: Options
) -> dict[str, jax.Array]:
    """Returns BPR-Opt of each pair, without its penalty."""
    del rows, hyper
    user, liked, other = _read(propagate(dense, batch.graph, options.graph_layers), batch)
    margins = jnp.sum(user * liked, axis=-1), jnp.sum(user * other, axis=-1)
    return {"target": losses.bpr_loss(*margins, reduction="none")}


def _read(embeddings: Embeddings, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The embeddings of the user, the item and the sampled item of each pair."""
    target, (user, item) = batch.target, (embeddings["user"], embeddings["item"])
    return user[target.users], item[target.items], item[target.negatives]


def penalties(dense: Embeddings, rows: dict, batch: Batch, hyper: Hyper) -> dict[str, jax.Array]:
    """Returns l2 / 2 times the squared norm of a pair's three embeddings of layer 0."""
    del rows
    return {"target": hyper.l2 / 2 * sum(map(factors.squared_norm, _read(dense, batch)))}


def project(params: Params, interactions: Any, options: Options) -> dict[str, jax.Array]:
    """Returns the propagated embeddings; there are no biases."""
    found = propagate(params.dense, graph(interactions), options.graph_layers)
    return {**found, "item_bias": jnp.zeros(len(found["item"]))}
