"""EASE with the source as a bridge: target items regressed on the items of both domains.

Ridge regression in closed form without a weight from an item to itself (Steck 2019), over the users
of the target, with a ridge a domain: lambda for the target's items and lambda / w for the source's,
which for w < 1 trusts the source less. (``ease`` joined has one ridge for all, and predicts the
source's items too.) With Y and S the target's and the source's pairs of these users, and

    ``C = (I + w / lambda S S^T)^-1``, ``P = (Y^T C Y + lambda I)^-1``,

the weights between target items are ``-P_ij / P_jj`` off the diagonal, and those from source items
``w / lambda S^T C Y P / P_jj``: users are compared by what they have in the source, and that is the
bridge. It is solved where it is small, and the joined matrix of all items is never made:

- by items: C over the users of both domains, P over the target's items;
- by users, if there are fewer of them: with ``M = (Y Y^T + w S S^T + lambda I)^-1`` and
  ``h_j = Y_j^T M Y_j``, the score of a user u of the target for an item j that it does not have is
  ``-lambda (M Y)_uj / (1 - h_j)``, and of a user without target pairs
  ``w S_u S^T M Y_j / (1 - h_j)``. They are the same scores.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax.errors import InputError
from conet_jax.models import ease
from conet_jax.models.base import FittedModel, Params, Sizes


class Options(NamedTuple):
    """Structure.

    Attributes:
      ease_regularization: lambda.
      ease_source_weight: w.
      max_items: largest system, of target items or users, whichever are fewer, that is solved.
    """

    ease_regularization: float = 100.0
    ease_source_weight: float = 0.2
    max_items: int = 20_000


@lru_cache
def build(options: Options) -> FittedModel:
    """Returns the regression as a ``FittedModel`` of pure functions."""
    return FittedModel(
        domains=("target", "source"),
        inference="cross",
        init=lambda key, sizes: init(key, sizes, options),
        project=project,
        scores=scores,
        sweeper=lambda interactions, sizes: sweeper(interactions, sizes, options),
        closed_form=True,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Returns ``target_item`` of zeros: f32[target items, users], or [target items, all items].

    Raises:
      InputError: there are more than ``max_items`` users and target items.
    """
    del key
    if (smaller := min(sizes.users, sizes.target_items)) > options.max_items:
        raise InputError(
            f"ease_bridged inverts a matrix of users or of target items, and there are {smaller:,} "
            f"of either at least: more than config.max_items={options.max_items:,}; take another "
            f"model, or raise the limit if {12e-9 * smaller**2:.1f} GB of memory and the time are "
            "there"
        )
    by_users = sizes.users <= sizes.target_items
    columns = sizes.users if by_users else sizes.target_items + sizes.source_items
    return Params({"target_item": jnp.zeros((sizes.target_items, columns))}, {})


def sweeper(interactions: Any, sizes: Sizes, options: Options) -> Any:
    """Returns the sweep: the whole of the closed form, in float32 on the device."""
    solve = _by_users if sizes.users <= sizes.target_items else _by_items

    def sweep(params: Params) -> Params:
        del params
        pairs = {d: _pairs(interactions[d]) for d in ("target", "source")}
        ridge, weight = options.ease_regularization, options.ease_source_weight
        return Params({"target_item": solve(pairs, sizes, ridge, weight)}, {})

    return sweep


_Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # users and items by domain


def _pairs(interactions: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(interactions.users), np.asarray(interactions.items)


def _dense(users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    matrix = np.zeros(shape, np.float32)
    matrix[users, items] = 1
    return jnp.asarray(matrix)


def _by_users(pairs: _Pairs, sizes: Sizes, ridge: float, weight: float) -> jax.Array:
    """The scores of all users, f32[target items, users]."""
    (users, items), (source_users, source_items) = pairs["target"], pairs["source"]
    trained = np.zeros(sizes.users, bool)
    trained[users] = True
    rows = np.cumsum(trained) - 1  # of the users of the target among themselves
    shared = weight * ease.gram(source_items, source_users, sizes.users)
    kernel = shared[np.ix_(trained, trained)]
    kernel += ease.gram(items, rows[users], len(kernel))
    own = _dense(rows[users], items, (len(kernel), sizes.target_items))
    solved = _solve(jnp.asarray(kernel), ridge, own)
    solved = solved / (1.0 - jnp.sum(own * solved, axis=0))[None, :]
    out = jnp.zeros((sizes.users, sizes.target_items))
    out = out.at[np.flatnonzero(trained)].set(-ridge * solved)
    others = np.flatnonzero(~trained)
    return out.at[others].set(jnp.asarray(shared[np.ix_(others, trained)]) @ solved).T


def _by_items(pairs: _Pairs, sizes: Sizes, ridge: float, weight: float) -> jax.Array:
    """The weights from all items, f32[target items, target and source items]."""
    (users, items), (source_users, source_items) = pairs["target"], pairs["source"]
    shared = np.intersect1d(users, source_users)
    row = np.full(sizes.users, -1)
    row[shared] = np.arange(len(shared))
    both, read = row[users] >= 0, row[source_users] >= 0
    source_rows, source_items = row[source_users[read]], source_items[read]
    kernel = weight / ridge * ease.gram(source_items, source_rows, len(shared))
    own = _dense(row[users[both]], items[both], (len(shared), sizes.target_items))
    bridged = _solve(jnp.asarray(kernel), 1.0, own)  # C Y
    system = jnp.asarray(ease.gram(users, items, sizes.target_items)) + own.T @ (bridged - own)
    inverse = _solve(system, ridge, jnp.eye(sizes.target_items))
    at = jnp.arange(sizes.target_items)
    inverse = inverse / inverse[at, at][None, :]
    through = np.asarray(bridged @ inverse)
    weights = np.zeros((sizes.target_items + sizes.source_items, sizes.target_items), np.float32)
    weights[: sizes.target_items] = -np.asarray(inverse)
    np.fill_diagonal(weights, 0.0)
    order = np.argsort(source_items, kind="stable")
    found, starts = np.unique(source_items[order], return_index=True)
    for item, own_rows in zip(found, np.split(source_rows[order], starts[1:]), strict=True):
        weights[sizes.target_items + item] = weight / ridge * through[own_rows].sum(axis=0)
    return jnp.asarray(weights.T)


@jax.jit
def _solve(system: jax.Array, ridge: jax.Array | float, right: jax.Array) -> jax.Array:
    """(system + ridge I)^-1 right, of a positive semi-definite system."""
    diagonal = jnp.arange(len(system))
    factor = jnp.linalg.cholesky(system.at[diagonal, diagonal].add(ridge))
    return jax.scipy.linalg.cho_solve((factor, True), right)


def project(params: Params, interactions: Any) -> dict[str, Any]:
    """Returns ``item``, the table, and by items each user's items as ``ease`` has them."""
    table = params.tables["target_item"]
    if interactions["target"].num_users <= len(table):
        return {"item": table}
    return ease.project(params, interactions, ease.Options(joined=True))


def scores(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Scores of users int32[n] for items int32[n, c]: f32[n, c]."""
    if "history" in projected:
        return ease.scores(projected, users, items)
    return projected["item"][items, users[:, None]]
