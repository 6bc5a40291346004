"""EASE, embarrassingly shallow autoencoder (Steck 2019): an item-item model in closed form.

Minimises ``|X - X B|^2 + lambda |B|^2`` under ``diag(B) = 0`` for the users x items matrix X of
training pairs: with ``P = (X^T X + lambda I)^-1``, ``B_ij = -P_ij / P_jj`` off the diagonal. The
score of an item is the sum of B over the user's items. Joined, X holds the items of both domains
side by side, and only the target's columns of B are kept.

Time grows with the cube of the number of items and memory with its square: hence ``max_items``.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax.errors import InputError
from conet_jax.models.base import FittedModel, Params, Sizes


class Options(NamedTuple):
    """Structure.

    Attributes:
      joined: whether the source domain's items stand beside the target's.
      ease_regularization: lambda.
      max_items: largest number of items, of both domains if joined, that is tried.
    """

    joined: bool = False
    ease_regularization: float = 100.0
    max_items: int = 20_000


@lru_cache
def build(options: Options) -> FittedModel:
    """Returns the autoencoder as a ``FittedModel`` of pure functions."""
    return FittedModel(
        domains=("target", "source") if options.joined else ("target",),
        inference="cross" if options.joined else "target",
        init=lambda key, sizes: init(key, sizes, options),
        project=lambda params, interactions: project(params, interactions, options),
        scores=scores,
        sweeper=lambda interactions, sizes: sweeper(interactions, sizes, options),
        closed_form=True,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Returns ``target_item`` f32[target items, items], the target's columns of B as rows: zero.

    Raises:
      InputError: there are more than ``max_items`` items.
    """
    del key
    num_items = sizes.target_items + (sizes.source_items if options.joined else 0)
    if num_items > options.max_items:
        raise InputError(
            f"EASE inverts a matrix of items x items, and there are {num_items:,} items: more than "
            f"config.max_items={options.max_items:,}; take another model, or raise the limit if "
            f"{12e-9 * num_items**2:.1f} GB of memory and the time are there"
        )
    return Params({"target_item": jnp.zeros((sizes.target_items, num_items))}, {})


def sweeper(interactions: Any, sizes: Sizes, options: Options) -> Any:
    """Returns the sweep: the whole of the closed form, in float32 on the device."""

    def sweep(params: Params) -> Params:
        num_items = params.tables["target_item"].shape[1]
        pairs = [(interactions["target"], 0)]
        if options.joined:
            pairs.append((interactions["source"], sizes.target_items))
        users = np.concatenate([np.asarray(p.users) for p, _ in pairs])
        items = np.concatenate([np.asarray(p.items) + at for p, at in pairs])
        counts = jnp.asarray(gram(users, items, num_items))
        weights = _closed_form(counts, options.ease_regularization, sizes.target_items)
        return Params({"target_item": weights}, {})

    return sweep


def gram(rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """X^T X of a matrix of ones and zeros: how many rows hold both of two columns.

    Args:
      rows: int[nnz], rows of the ones.
      columns: int[nnz], their columns.
      size: number of columns.

    Returns:
      f32[size, size].

    Example:
      >>> print(gram(np.array([0, 0, 1]), np.array([0, 1, 1]), 2))
      [[1. 1.]
       [1. 2.]]
    """
    counts = np.zeros((size, size), np.float32)
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    for own in np.split(columns[order], starts[1:]):
        counts[np.ix_(own, own)] += 1
    return counts


@partial(jax.jit, static_argnums=2)
def _closed_form(gram: jax.Array, regularization: float, num_targets: int) -> jax.Array:
    # Columns of P for the target's items alone, by two triangular solves.
    size = gram.shape[0]
    diagonal = jnp.arange(size)
    factor = jnp.linalg.cholesky(gram.at[diagonal, diagonal].add(regularization))
    columns = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(size, num_targets))
    own = jnp.arange(num_targets)
    weights = -columns / columns[own, own][None, :]
    return weights.at[own, own].set(0.0).T


def project(params: Params, interactions: Any, options: Options) -> dict[str, Any]:
    """Returns ``item`` (rows of B^T) and each user's items padded to the longest list."""
    target = interactions["target"]
    lists = [_padded(target, 0)]
    if options.joined:
        lists.append(_padded(interactions["source"], target.num_items))
    return {
        "item": params.tables["target_item"],
        "history": jnp.concatenate([items for items, _ in lists], axis=1),
        "mask": jnp.concatenate([mask for _, mask in lists], axis=1),
    }


def _padded(interactions: Any, offset: int) -> tuple[jax.Array, jax.Array]:
    start, stop = interactions.indptr[:-1, None], interactions.indptr[1:, None]
    at = start + jnp.arange(max(1, interactions.max_degree), dtype=jnp.int32)[None, :]
    inside = at < stop
    return interactions.items[jnp.where(inside, at, 0)] + offset, inside.astype(float)


def scores(projected: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Sums of B over the history of users int32[n], for items int32[n, c]: f32[n, c]."""
    history, mask = projected["history"][users], projected["mask"][users]

    def add(total: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        item, weight = slot
        return total + weight[:, None] * projected["item"][items, item[:, None]], None

    total, _ = jax.lax.scan(add, jnp.zeros(items.shape), (history.T, mask.T))
    return total
