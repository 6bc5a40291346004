"""Implicit alternating least squares (Hu, Koren and Volinsky 2008), as batched Cholesky solves.

Minimises ``sum_ui w_i c_ui (r_ui - x_u^T y_i)^2 + lambda (sum_u |x_u|^2 + sum_i |y_i|^2)`` with
confidence ``c = 1 + alpha`` where r = 1 and 1 elsewhere; w is 1, or for two domains joined the
weight of the item's domain. For fixed Y the best x_u is

    ``(Y^T W Y + alpha sum_{i in u} w_i y_i y_i^T + lambda I)^-1 (1 + alpha) sum_{i in u} w_i y_i``

and likewise for Y, where w_i cancels but for lambda / w_i. Linear, seconds to fit, and strong on
sparse data: a model of its own, and a start for the tables of the others.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax.models import factors
from conet_jax.models.base import Model, Params, Sizes

_ENTRIES_A_SOLVE = 1 << 15  # gathered factors at once: 4 MiB at 32 factors
_ROWS_A_SOLVE = 1 << 11  # normal matrices at once: 8 MiB at 32 factors


class Options(NamedTuple):
    """Structure and constants of the objective.

    Attributes:
      layers: half of the first is the number of factors, as the embeddings of a tower.
      joined: whether the source domain's items stand beside the target's.
      ials_regularization: lambda.
      ials_alpha: confidence of an observed pair above that of the others.
      ials_source_weight: w of the source's items, if joined.
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    joined: bool = False
    ials_regularization: float = 1.0
    ials_alpha: float = 10.0
    ials_source_weight: float = 1.0


@lru_cache
def build(options: Options) -> Model:
    """Returns the factorisation as a ``Model``, an epoch of which is a sweep."""
    return Model(
        domains=("target", "source") if options.joined else ("target",),
        pairing=None,
        inference="cross" if options.joined else "target",
        init=lambda key, sizes: init(key, sizes, options),
        project=lambda params, interactions: {
            "user": params.tables["user"],
            "item": params.tables["target_item"],
            "item_bias": jnp.zeros(params.tables["target_item"].shape[0]),
        },
        scores=factors.scores,
        sweeper=lambda interactions, sizes: sweeper(interactions, sizes, options),
        logits=False,
    )


def init(key: jax.Array, sizes: Sizes, options: Options) -> Params:
    """Returns N(0, 0.01^2) for the items; the users are solved for first, and start at zero."""
    dim = options.layers[0] // 2
    rows = {"target_item": sizes.target_items}
    if options.joined:
        rows["source_item"] = sizes.source_items
    items = factors.init(key, sum(rows.values()), dim)
    tables = {"user": jnp.zeros((sizes.users, dim)), "target_item": items[: sizes.target_items]}
    if options.joined:
        tables["source_item"] = items[sizes.target_items :]
    return Params(tables, {})


def sweeper(interactions: Any, sizes: Sizes, options: Options) -> Any:
    """Returns the sweep: solves for all users, then for all items.

    Args:
      interactions: training interactions (``sampling.Interactions``) by domain.
      sizes: rows of the tables.
      options: structure and constants.

    Returns:
      Params -> Params.
    """
    domains = ("target", "source") if options.joined else ("target",)
    counts = dict(target=sizes.target_items, source=sizes.source_items)
    offsets = np.cumsum([0] + [counts[domain] for domain in domains])
    pairs = [interactions[domain] for domain in domains]
    users = np.concatenate([np.asarray(p.users) for p in pairs])
    items = np.concatenate(
        [np.asarray(p.items) + at for p, at in zip(pairs, offsets, strict=False)]
    )
    weights = np.ones(offsets[-1], np.float32)
    weights[sizes.target_items :] = options.ials_source_weight
    by_user = _groups(users, items, sizes.users)
    by_item = _groups(items, users, len(weights))
    one = np.ones(sizes.users, np.float32)
    solve = partial(
        _solve_all, regularization=options.ials_regularization, alpha=options.ials_alpha
    )

    def sweep(params: Params) -> Params:
        tables = params.tables
        y = jnp.concatenate([tables[f"{domain}_item"] for domain in domains])
        x = solve(tables["user"], y, by_user, row_weights=one, column_weights=weights)
        y = solve(y, x, by_item, row_weights=weights, column_weights=one)
        solved = {
            f"{domain}_item": y[offsets[i] : offsets[i + 1]] for i, domain in enumerate(domains)
        }
        return Params({"user": x, **solved}, {})

    return sweep


def fit(
    interactions: Any, sizes: Sizes, options: Options, *, sweeps: int = 15, seed: int = 0
) -> dict[str, jax.Array]:
    """Factorises in a fixed number of sweeps.

    Args:
      interactions: training interactions (``sampling.Interactions``) by domain.
      sizes: rows of the tables.
      options: structure and constants.
      sweeps: passes over users and items.
      seed: of the start.

    Returns:
      ``user`` and the items' tables; zero for users and items without pairs.
    """
    params = init(jax.random.key(seed), sizes, options)
    sweep = sweeper(interactions, sizes, options)
    for _ in range(sweeps):
        params = sweep(params)
    return params.tables


def _groups(rows: np.ndarray, columns: np.ndarray, num_rows: int) -> list[tuple[np.ndarray, ...]]:
    """Rows of similar length padded together: [(row ids [n], columns [n, l], mask [n, l]), …].

    Lengths are powers of two and the number of rows of a group depends on the length alone, so
    there are few shapes to compile. Padding rows have an id out of range.
    """
    order = np.argsort(rows, kind="stable")
    columns = np.asarray(columns)[order]
    degrees = np.bincount(rows, minlength=num_rows)
    starts = np.concatenate([[0], np.cumsum(degrees)])
    widths = 1 << np.ceil(np.log2(np.maximum(degrees, 1))).astype(int)
    groups = []
    for width in np.unique(widths[degrees > 0]):
        members = np.flatnonzero((widths == width) & (degrees > 0))
        # Few shapes to compile, and few padding rows: a power of two, and memory within bounds.
        at_once = min(_ROWS_A_SOLVE, max(1, _ENTRIES_A_SOLVE // width))
        at_once = min(at_once, 1 << (len(members) - 1).bit_length())
        for first in range(0, len(members), at_once):
            ids = members[first : first + at_once]
            slots = np.arange(width)[None, :]
            mask = slots < degrees[ids][:, None]
            listed = columns[np.where(mask, starts[ids][:, None] + slots, 0)]
            padding = at_once - len(ids)
            groups.append(
                (
                    np.pad(ids, (0, padding), constant_values=num_rows).astype(np.int32),
                    np.pad(listed, ((0, padding), (0, 0))).astype(np.int32),
                    np.pad(mask, ((0, padding), (0, 0))),
                )
            )
    return groups


def _solve_all(
    x: jax.Array,
    y: jax.Array,
    groups: list[tuple[np.ndarray, ...]],
    *,
    row_weights: np.ndarray,
    column_weights: np.ndarray,
    regularization: float,
    alpha: float,
) -> jax.Array:
    # Rows without pairs, which no group holds, have their optimum at zero.
    x = jnp.zeros_like(x)
    gram = y.T @ (y * column_weights[:, None])
    for ids, listed, mask in groups:
        ridge = regularization / row_weights[np.minimum(ids, len(row_weights) - 1)]
        weights = np.where(mask, column_weights[listed], 0)
        x = _solve(x, y, gram, ids, listed, weights, ridge, alpha)
    return x


@partial(jax.jit, donate_argnums=0)
def _solve(
    x: jax.Array,
    y: jax.Array,
    gram: jax.Array,
    ids: jax.Array,
    listed: jax.Array,
    weights: jax.Array,
    ridge: jax.Array,
    alpha: float,
) -> jax.Array:
    own = y[listed]
    weighted = own * weights[:, :, None]
    normal = gram[None] + alpha * jnp.einsum("nlf,nlg->nfg", weighted, own)
    normal = normal + ridge[:, None, None] * jnp.eye(y.shape[1])[None]
    right = (1 + alpha) * weighted.sum(axis=1)
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(normal), True), right[:, :, None])
    return x.at[ids].set(solved[:, :, 0], mode="drop")
