"""Lists for everyone: a shortlist by an inner product, then the model's own scores of it.

A score is an inner product of user and item, and what the towers add to it: over all users nearly a
matrix of low rank. So what they add for any item is predicted from what they add for a few *anchor*
items, by ridge regression over some users:

    s(u, i) ~ x_u^T y_i + sum_a W_ai (s(u, a) - x_u^T y_a - b_a) + c_i

which is again an inner product for each pair, and is cut to ``RANK`` dimensions. Items stand in
groups of ``GROUP``; the groups with the largest predictions are the shortlist, which the model
scores.

A list that reaches into the second half of its shortlist is not trusted, and made by scoring every
item. How many groups there must be so that the others are right is measured on ``CALIBRATED`` other
users, for whom every item is scored: of each, how long a shortlist must be, at least, for its list
to be the exact one or not trusted, at this length and all above. The largest of these lengths is
taken, or a larger one that costs less. Of n + 1 users drawn alike a given one needs the longest
with a probability of 1 / (n + 1), so at least 99.9% of the lists are expected to be the exact ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from conet_jax.models.base import Model
from conet_jax.serve.lists import PAIRS_AT_ONCE

FITTED = 384  # users that the regression is fitted on
CALIBRATED = 999
ANCHORS = 120
RANK = 96
GROUP = 4  # items that are scored together, where the best of them may be listed
LENGTHS = (64, 128, 256, 512)  # of shortlists, in groups
_RIDGE = 1e-2  # over the mean square of what is added at the anchors
_NEVER = -1e30  # prediction of what must not be listed
_USERS_AT_ONCE = 64


@flax.struct.dataclass
class Shortlist:
    """How to find the items that are worth scoring; made by ``fit``.

    Attributes:
      items: int32[n], rows of the items, ascending; the last is repeated to fill a group.
      weights: f32[rank, n]; a user's vector times these is the prediction.
      basis: f32[width, rank], from [x_u, what is added at the anchors, 1] to the user's vector.
      anchors: int32[a], rows of the anchors.
      anchor_factors: f32[d, a], the y_a.
      anchor_biases: f32[a], the b_a.
      count: items that are not repeated.
      groups: of a shortlist.
    """

    items: jax.Array
    weights: jax.Array
    basis: jax.Array
    anchors: jax.Array
    anchor_factors: jax.Array
    anchor_biases: jax.Array
    count: int = flax.struct.field(pytree_node=False)
    groups: int = flax.struct.field(pytree_node=False)


def inner_product(
    projected: Any, users: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """The model's own inner product, if it has one: that of factors, or the recipe's second term.

    Args:
      projected: from ``Model.project``.
      users: int32[n].

    Returns:
      (x f32[n, d], y f32[items, d], b f32[items]).
    """
    if "item_factors" in projected:
        views, factors = projected["user_view"][users], projected["item_factors"]
        weights = projected["w"] if "w" in projected else projected["dense"]["w_target"]
        views = views if views.ndim == 2 else views[:, 0]
        return views * weights[None, :], factors, jnp.zeros(len(factors))
    if "item_bias" in projected:
        return projected["user"][users], projected["item"], projected["item_bias"]
    return None


def fit(
    model: Model,
    projected: Any,
    users: np.ndarray,
    items: np.ndarray,
    seen: np.ndarray,
    *,
    k: int,
) -> Shortlist | None:
    """Fits the prediction on some users, and measures on the others how long it must be.

    Args:
      model: with an inner product.
      projected: from ``Model.project``.
      users: int32[more than FITTED], drawn at random from those to be served.
      items: int32[n], rows of the items that may be listed, ascending.
      seen: int32[users, t], places in ``items`` that a user must not get; padding is n or more.
      k: length of the lists, at most n.

    Returns:
      The shortlist; None where it would not save three quarters of the scores.
    """
    listed = np.pad(items, (0, -len(items) % GROUP), mode="edge").astype(np.int32)
    x, y, b = (np.asarray(part, np.float64) for part in inner_product(projected, users[:FITTED]))
    y, b = y[listed], b[listed]
    scores = _by_blocks(partial(_all_scores, projected, listed, model), users[:FITTED])
    added = scores - (x @ y.T + b)
    columns = np.random.default_rng(0).permutation(len(items))[: 1 << 12]
    anchors = np.sort(columns[_pivots(added[:, columns], min(ANCHORS, len(columns)))])
    inputs = np.pad(added[:, anchors], ((0, 0), (0, 1)), constant_values=1.0)
    ridge = _RIDGE * len(inputs) * max(np.mean(np.square(inputs[:, :-1])), 1e-12)
    learnt = np.linalg.solve(inputs.T @ inputs + ridge * np.eye(inputs.shape[1]), inputs.T @ added)
    weights = np.vstack([y.T, learnt])
    weights[-1] += b
    basis, weights = _compressed(np.concatenate([x, inputs], axis=1), weights)
    short = Shortlist(
        items=jnp.asarray(listed),
        weights=jnp.asarray(weights, jnp.float32),
        basis=jnp.asarray(basis, jnp.float32),
        anchors=jnp.asarray(listed[anchors]),
        anchor_factors=jnp.asarray(y[anchors].T, jnp.float32),
        anchor_biases=jnp.asarray(b[anchors], jnp.float32),
        count=len(items),
        groups=max(LENGTHS),
    )
    trials = _by_blocks(
        lambda some, own: _trials(
            projected, short, some, own, model=model, k=k, lengths=tuple(LENGTHS)
        ),
        users[FITTED:],
        seen[FITTED:],
    )
    groups = _length(trials, tuple(LENGTHS), len(items))
    return None if groups is None else short.replace(groups=groups)


def _by_blocks(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Calls a function with rows of arrays, ``_USERS_AT_ONCE`` at a time; joins what it returns."""
    parts, count = [], len(arrays[0])
    for at in range(0, count, _USERS_AT_ONCE):
        some = [x[at : at + _USERS_AT_ONCE] for x in arrays]
        padding = _USERS_AT_ONCE - len(some[0])
        some = [np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in some]
        parts.append(np.asarray(function(*(x.astype(np.int32) for x in some))))
    return np.concatenate(parts)[:count]


def _pivots(matrix: np.ndarray, count: int) -> np.ndarray:
    """Columns that span a matrix best, one after another (QR with column pivoting)."""
    rest, chosen = matrix.copy(), []
    for _ in range(count):
        norms = np.square(rest).sum(axis=0)
        norms[chosen] = -1
        chosen.append(int(norms.argmax()))
        direction = rest[:, chosen[-1]] / np.sqrt(max(norms.max(), 1e-300))
        rest -= np.outer(direction, direction @ rest)
    return np.array(chosen)


def _compressed(vectors: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The basis [width, rank] and weights [rank, n] whose product errs least over the vectors."""
    covariance = vectors.T @ vectors / len(vectors)
    covariance += 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    root = np.linalg.cholesky(covariance).T
    scaled = root @ weights
    _, directions = np.linalg.eigh(scaled @ scaled.T)
    directions = directions[:, ::-1][:, :RANK]
    return np.linalg.solve(root, directions), directions.T @ scaled


@partial(jax.jit, static_argnums=2)
def _all_scores(projected: Any, items: jax.Array, model: Model, users: jax.Array) -> jax.Array:
    """Scores f32[users, items] of the model, block by block."""
    block = max(1, PAIRS_AT_ONCE // len(users))
    padded = jnp.pad(items, (0, -len(items) % block)).reshape(-1, block)

    def score(listed: jax.Array) -> jax.Array:
        listed = jnp.broadcast_to(listed[None, :], (len(users), block))
        return model.scores(projected, users, listed)

    return jnp.moveaxis(jax.lax.map(score, padded), 0, 1).reshape(len(users), -1)[:, : len(items)]


def _predictions(
    projected: Any, short: Shortlist, users: jax.Array, seen: jax.Array, model: Model
) -> jax.Array:
    """Predicted scores f32[users, n], ``_NEVER`` of what must not be listed."""
    x, _, _ = inner_product(projected, users)
    listed = jnp.broadcast_to(short.anchors[None, :], (len(users), len(short.anchors)))
    own = x @ short.anchor_factors + short.anchor_biases[None, :]
    added = model.scores(projected, users, listed) - own
    vectors = jnp.concatenate([x, added, jnp.ones((len(users), 1))], axis=1) @ short.basis
    predicted = (vectors @ short.weights).at[:, short.count :].set(_NEVER)
    rows = jnp.broadcast_to(jnp.arange(len(users))[:, None], seen.shape)
    return predicted.at[rows, seen].set(_NEVER, mode="drop")


def _largest(predicted: jax.Array) -> jax.Array:
    """The largest prediction of each group, f32[users, n / GROUP]."""
    return predicted.reshape(len(predicted), -1, GROUP).max(axis=-1)


def _reach(values: jax.Array, of_list: jax.Array, best: jax.Array) -> jax.Array:
    """Groups, in the order of their predictions, up to the last that holds an item of the list.

    Args:
      values: f32[users, g], predictions of the groups.
      of_list: f32[users, k], those of the groups that the list's items are in.
      best: f32[users, k], scores of the list, -inf where there is no further item.

    Returns:
      int32[users]; more than g where the list is not full though there are items left.
    """
    last = jnp.min(jnp.where(best > -jnp.inf, of_list, jnp.inf), axis=1)
    reach = jnp.sum(values >= last[:, None], axis=1)
    short = (best[:, -1] == -jnp.inf) & (values[:, -1] > _NEVER)
    return jnp.where(short, values.shape[1] + 1, reach)


@partial(jax.jit, static_argnames=("model", "k", "lengths"))
def _trials(
    projected: Any,
    short: Shortlist,
    users: jax.Array,
    seen: jax.Array,
    *,
    model: Model,
    k: int,
    lengths: tuple[int, ...],
) -> jax.Array:
    """Whether a list is exact, and trusted, bool[users, lengths, 2], at each length in groups."""
    predicted = _predictions(projected, short, users, seen, model)
    scores = _all_scores(projected, short.items, model, users)
    scores = jnp.where(predicted > _NEVER, scores, -jnp.inf)
    largest = _largest(predicted)
    values = jax.lax.top_k(largest, min(max(lengths), largest.shape[1]))[0]
    best, at = jax.lax.top_k(scores, k)
    out = []
    for length in lengths:
        own = values[:, : min(length, values.shape[1])]
        inside = jnp.repeat(largest >= own[:, -1:], GROUP, axis=1)
        found, places = jax.lax.top_k(jnp.where(inside, scores, -jnp.inf), k)
        same = jnp.all((places == at) | (best == -jnp.inf), axis=1)
        reach = _reach(own, jnp.take_along_axis(largest, places // GROUP, axis=1), found)
        out.append(jnp.stack([same, 2 * reach <= length], axis=1))
    return jnp.stack(out, axis=1)


def _length(trials: np.ndarray, lengths: tuple[int, ...], num_items: int) -> int | None:
    """The length, in groups, that costs least of those that are long enough for every user."""
    exact, trusted = trials[:, :, 0], trials[:, :, 1]
    right = (exact | ~trusted).all(axis=0)
    right = np.logical_and.accumulate(right[::-1])[::-1]  # at this length and all above
    costs = GROUP * np.array(lengths) + (~trusted).mean(axis=0) * num_items
    costs = np.where(right, costs, np.inf)
    return lengths[int(costs.argmin())] if costs.min() < num_items / 4 else None


@partial(jax.jit, static_argnames=("model", "k"))
def best_of(
    projected: Any, short: Shortlist, users: jax.Array, seen: jax.Array, *, model: Model, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The k best items of each user's shortlist.

    Args:
      projected: from ``Model.project``.
      short: from ``fit``.
      users: int32[m].
      seen: int32[m, t], places in ``short.items`` that a user must not get; padding is beyond.
      model: the model.
      k: at most the items of a shortlist.

    Returns:
      (items int32[m, k], scores f32[m, k], finite bool[m]), see ``lists.top_k``, and whether each
      list is trusted, bool[m].
    """
    m = len(users)
    predicted = _predictions(projected, short, users, seen, model)
    largest = _largest(predicted)
    values, groups = jax.lax.top_k(largest, min(short.groups, largest.shape[1]))
    # Ascending, so that of equal scores the first in ``items`` comes first.
    groups = jnp.sort(groups, axis=1)
    places = (GROUP * groups[:, :, None] + jnp.arange(GROUP)[None, None, :]).reshape(m, -1)
    listed = short.items[places]
    rows = max(1, PAIRS_AT_ONCE // listed.shape[1])
    blocks = tuple(
        jnp.pad(x, [(0, -m % rows)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, rows, *x.shape[1:])
        for x in (users, listed)
    )
    scores = jax.lax.map(lambda block: model.scores(projected, *block), blocks)
    scores = scores.reshape(-1, listed.shape[1])[:m]
    left_out = jnp.take_along_axis(predicted, places, axis=1) <= _NEVER
    finite = jnp.all(jnp.isfinite(scores) | left_out, axis=1)
    best, at = jax.lax.top_k(jnp.where(left_out, -jnp.inf, scores), k)
    of_list = jnp.take_along_axis(largest, jnp.take_along_axis(places, at, axis=1) // GROUP, axis=1)
    trusted = 2 * _reach(values, of_list, best) <= short.groups
    return jnp.take_along_axis(listed, at, axis=1), best, finite, trusted
