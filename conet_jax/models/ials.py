"""Implicit alternating least squares (Hu, Koren and Volinsky 2008), as batched Cholesky solves.

Minimises ``sum_ui w_i c_ui (r_ui - x_u^T y_i)^2 + lambda (sum_u |x_u|^2 + sum_i |y_i|^2)`` with
confidence ``c = 1 + alpha`` where r = 1 and 1 elsewhere; w is 1, or for two domains joined the
weight of the item's domain. For fixed Y the best x_u is

    ``(Y^T W Y + alpha sum_{i in u} w_i y_i y_i^T + lambda I)^-1 (1 + alpha) sum_{i in u} w_i y_i``

and likewise for Y, where w_i cancels but for lambda / w_i. Linear, seconds to fit, and strong on
sparse data: a model of its own, and a start for the tables of the others.
"""

import itertools
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax.models import factors
from conet_jax.models.base import FittedModel, Params, Sizes

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


class Pairs(NamedTuple):
    """Users int32[nnz] and items int32[nnz] of some interactions."""

    users: np.ndarray
    items: np.ndarray


@lru_cache
def build(options: Options) -> FittedModel:
    """Returns the factorisation as a ``FittedModel``, an epoch of which is a sweep."""
    return FittedModel(
        domains=("target", "source") if options.joined else ("target",),
        inference="cross" if options.joined else "target",
        init=lambda key, sizes: init(key, sizes, options),
        project=lambda params, interactions: {
            "user": params.tables["user"],
            "item": params.tables["target_item"],
            "item_bias": jnp.zeros(params.tables["target_item"].shape[0]),
        },
        scores=factors.scores,
        sweeper=lambda interactions, sizes: sweeper(interactions, sizes, options),
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
      interactions: training interactions (``interactions.Interactions``) by domain.
      sizes: rows of the tables.
      options: structure and constants.

    Returns:
      Params -> Params.
    """
    domains, offsets, weights = _columns(sizes, options)
    users, items = _listed(interactions, domains, offsets)
    one = np.ones(sizes.users, np.float32)
    by_user, by_item = _groups(users, items, one), _groups(items, users, weights)
    solve = partial(
        _solve_all, regularization=options.ials_regularization, alpha=options.ials_alpha
    )

    def sweep(params: Params) -> Params:
        tables = params.tables
        y = jnp.concatenate([tables[f"{domain}_item"] for domain in domains])
        x = solve(tables["user"], y, by_user, column_weights=weights)
        y = solve(y, x, by_item, column_weights=one)
        solved = {
            f"{domain}_item": y[offsets[i] : offsets[i + 1]] for i, domain in enumerate(domains)
        }
        return Params({"user": x, **solved}, {})

    return sweep


def fit(
    interactions: Any,
    sizes: Sizes,
    options: Options,
    *,
    sweeps: int = 15,
    seed: int = 0,
    start: dict[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Factorises in a fixed number of sweeps.

    Args:
      interactions: training interactions by domain (``interactions.Interactions`` or ``Pairs``).
      sizes: rows of the tables.
      options: structure and constants.
      sweeps: passes over users and items.
      seed: of the start.
      start: tables to go on from; by default those of ``init``.

    Returns:
      ``user`` and the items' tables; zero for users and items without pairs.
    """
    params = init(jax.random.key(seed), sizes, options) if start is None else Params(start, {})
    sweep = sweeper(interactions, sizes, options)
    for _ in range(sweeps):
        params = sweep(params)
    return params.tables


def users_of(
    interactions: Any,
    sizes: Sizes,
    options: Options,
    tables: dict[str, jax.Array],
    domains: tuple[str, ...],
) -> jax.Array:
    """Solves for the users from their pairs in some domains alone, with the items as they are.

    Args:
      interactions: pairs by domain, as in ``fit``.
      sizes: rows of the tables.
      options: of the factorisation.
      tables: its items.
      domains: those whose pairs count.

    Returns:
      f32[users, dim], zero for users without such pairs.
    """
    fitted, offsets, weights = _columns(sizes, options)
    at = dict(zip(fitted, offsets, strict=False))
    users, items = _listed(interactions, domains, [at[domain] for domain in domains])
    for i, domain in enumerate(fitted):
        if domain not in domains:
            weights[offsets[i] : offsets[i + 1]] = 0.0
    y = jnp.concatenate([tables[f"{domain}_item"] for domain in fitted])
    return _solve_all(
        jnp.zeros((sizes.users, y.shape[1])),
        y,
        _groups(users, items, np.ones(sizes.users, np.float32)),
        column_weights=weights,
        regularization=options.ials_regularization,
        alpha=options.ials_alpha,
    )


def _columns(sizes: Sizes, options: Options) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Domains of the matrix, where the columns of each begin, and the weight of each column."""
    counts = {"target": sizes.target_items}
    if options.joined:
        counts["source"] = sizes.source_items
    offsets = np.cumsum([0, *counts.values()])
    weights = np.ones(offsets[-1], np.float32)
    weights[sizes.target_items :] = options.ials_source_weight
    return tuple(counts), offsets, weights


def _listed(interactions: Any, domains: Any, offsets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Users and columns of the pairs of some domains, whose columns begin at ``offsets``."""
    pairs = [interactions[domain] for domain in domains]
    users = np.concatenate([np.asarray(p.users) for p in pairs])
    columns = [np.asarray(p.items) + at for p, at in zip(pairs, offsets, strict=False)]
    return users, np.concatenate(columns)


class _Group(NamedTuple):
    """Rows of one weight and of similar length: ids [n], columns [n, l] and which of them count."""

    weight: float
    ids: np.ndarray
    listed: np.ndarray
    mask: np.ndarray


def _groups(rows: np.ndarray, columns: np.ndarray, row_weights: np.ndarray) -> list[_Group]:
    """Rows of similar length padded together.

    Lengths are powers of two and the number of rows of a group depends on the length alone, so
    there are few shapes to compile. Padding rows have an id out of range.
    """
    num_rows = len(row_weights)
    order = np.argsort(rows, kind="stable")
    columns = np.asarray(columns)[order]
    degrees = np.bincount(rows, minlength=num_rows)
    starts = np.concatenate([[0], np.cumsum(degrees)])
    widths = 1 << np.ceil(np.log2(np.maximum(degrees, 1))).astype(int)
    groups = []
    for weight, width in itertools.product(np.unique(row_weights), np.unique(widths[degrees > 0])):
        members = np.flatnonzero((widths == width) & (degrees > 0) & (row_weights == weight))
        if not len(members):
            continue
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
                _Group(
                    float(weight),
                    np.pad(ids, (0, padding), constant_values=num_rows).astype(np.int32),
                    np.pad(listed, ((0, padding), (0, 0))).astype(np.int32),
                    np.pad(mask, ((0, padding), (0, 0))),
                )
            )
    return groups


def _solve_all(
    x: jax.Array,
    y: jax.Array,
    groups: list[_Group],
    *,
    column_weights: np.ndarray,
    regularization: float,
    alpha: float,
) -> jax.Array:
    # Rows without pairs, which no group holds, have their optimum at zero.
    x = jnp.zeros_like(x)
    gram = y.T @ (y * column_weights[:, None])
    of_none = {}  # by the weight of a row: the normal matrix of a row without pairs, times y
    for weight, ids, listed, mask in groups:
        weights = np.where(mask, column_weights[listed], 0)
        ridge = regularization / weight
        if 2 * listed.shape[1] <= y.shape[1]:
            if weight not in of_none:
                of_none[weight] = _of_none(gram, y, ridge)
            x = _solve_few(x, y, of_none[weight], ids, listed, weights, alpha)
        else:
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
    ridge: float,
    alpha: float,
) -> jax.Array:
    own = y[listed]
    weighted = own * weights[:, :, None]
    normal = gram[None] + alpha * jnp.einsum("nlf,nlg->nfg", weighted, own)
    normal = normal + ridge * jnp.eye(y.shape[1])[None]
    right = (1 + alpha) * weighted.sum(axis=1)
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(normal), True), right[:, :, None])
    return x.at[ids].set(solved[:, :, 0], mode="drop")


@jax.jit
def _of_none(gram: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    normal = gram + ridge * jnp.eye(y.shape[1])
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(normal), True), y.T).T


@partial(jax.jit, donate_argnums=0)
def _solve_few(
    x: jax.Array,
    y: jax.Array,
    of_none: jax.Array,
    ids: jax.Array,
    listed: jax.Array,
    weights: jax.Array,
    alpha: float,
) -> jax.Array:
    """``_solve`` for rows of few pairs, by a system as large as the pairs, not the factors.

    With N the normal matrix of a row without pairs and D = alpha diag(w), of a row's items Y,
    ``(N + Y^T D Y)^-1 Y^T = N^-1 Y^T (D^-1 + Y N^-1 Y^T)^-1 D^-1`` (Woodbury).
    """
    own, solved = y[listed], of_none[listed]
    used, weights = weights > 0, weights.astype(y.dtype)
    system = jnp.einsum("nlf,nmf->nlm", own, solved)
    system = jnp.where(used[:, :, None] & used[:, None, :], system, 0)
    diagonal = jnp.where(used, 1 / (alpha * jnp.where(used, weights, 1)), 1)
    system = system + diagonal[:, :, None] * jnp.eye(listed.shape[1])[None]
    right = jnp.where(used, (1 + alpha) / alpha, 0)
    shares = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), right[:, :, None])
    return x.at[ids].set(jnp.einsum("nlf,nl->nf", solved, shares[:, :, 0]), mode="drop")
