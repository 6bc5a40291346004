"""Implicit alternating least squares (Hu, Koren and Volinsky 2008), by conjugate gradients.

Minimises ``sum_ui w_i c_ui (r_ui - x_u^T y_i)^2 + lambda (sum_u |x_u|^2 + sum_i |y_i|^2)`` with
confidence ``c = 1 + alpha k`` where r = 1 and 1 elsewhere; k is 1, or the weight of the pair where
the data have weights, of mean 1; w is 1, or for two domains joined the weight of the item's domain.
For fixed Y the best x_u solves

    ``(Y^T W Y + alpha sum_{i in u} k_i w_i y_i y_i^T + lambda I) x = sum_{i in u} (1 + alpha k_i)
    w_i y_i``

and likewise for Y, where w_i cancels but for lambda / w_i. A half of a sweep takes a few steps of
conjugate gradients towards it from where the rows are (Takács, Pilászy and Tikk 2011): a third of
the time of solving for them, and after the usual number of sweeps as near to the optimum.

Linear, seconds to fit, and strong on sparse data: a model of its own, and a start for the tables of
the others.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax.models import factors
from conet_jax.models.base import FittedModel, Params, Sizes
from conet_jax.models.conjugate_gradients import conjugate_gradients

_CHUNK = 8  # pairs of a row that are read together
_PAIRS_AT_ONCE = 1 << 13  # gathered factors at once: 2 MiB at 64 factors, which stay in a cache
_STEPS = 3  # of conjugate gradients a half sweep
_TO_THE_END = 200  # steps at most where a row is solved for


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

    @property
    def factorisation(self) -> "Options":
        """These: the models that start from a factorisation have one by the same name."""
        return self

    def constants(self) -> dict[str, float]:
        """Returns the constants by config field; without a source its weight is none."""
        names = ["ials_regularization", "ials_alpha", *["ials_source_weight"] * self.joined]
        return {name: float(getattr(self, name)) for name in names}


class Pairs(NamedTuple):
    """Users int32[nnz] and items int32[nnz] of some interactions, and f32[nnz] their weights k."""

    users: np.ndarray
    items: np.ndarray
    weights: np.ndarray | None = None


@lru_cache
def build(options: Options) -> FittedModel:
    """Returns the factorisation as a ``FittedModel``, an epoch of which is a sweep."""
    return FittedModel(
        domains=("target", "source") if options.joined else ("target",),
        inference="cross" if options.joined else "target",
        init=lambda key, sizes: init(key, sizes, options),
        project=project,
        scores=factors.scores,
        linear=factors.linear,
        sweeper=lambda interactions, sizes: sweeper(interactions, sizes, options),
    )


def project(params: Params, interactions: Any) -> dict[str, jax.Array]:
    """Returns the factors of users and target items; there are no biases."""
    del interactions
    user, item = params.tables["user"], params.tables["target_item"]
    return {"user": user, "item": item, "item_bias": jnp.zeros(len(item))}


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


class Blocks(NamedTuple):
    """The rows of one side of the matrix with their pairs, in blocks of equal shape.

    A row's pairs stand in whole chunks of ``_CHUNK``, all of them in one block.

    Attributes:
      rows: int32[b, r], ids of a block's rows; out of range in padding.
      owners: int32[b, c], which of the block's rows a chunk is of.
      columns: int32[b, c, _CHUNK], the pairs' columns.
      pairs: int32[b, c, _CHUNK], the pairs' numbers; -1 in padding.
      weights: f32[b, c, _CHUNK], the pairs' k; None is 1 for each.
    """

    rows: jax.Array
    owners: jax.Array
    columns: jax.Array
    pairs: jax.Array
    weights: jax.Array | None


class Matrix(NamedTuple):
    """Training pairs as both halves of a sweep read them; those of the source follow the target's.

    Attributes:
      by_user: the users' rows.
      by_item: the items' rows, the source's after the target's.
      num_pairs: of both domains.
      domains: ("target",) or ("target", "source").
      counts: items of each domain.
    """

    by_user: Blocks
    by_item: Blocks
    num_pairs: int
    domains: tuple[str, ...]
    counts: tuple[int, ...]

    def weights(self, options: Options, domains: Any = ("target", "source")) -> np.ndarray:
        """Weight of each item, f32[items]; 0 where the domain is none of ``domains``."""
        of = {"target": 1.0, "source": options.ials_source_weight}
        each = [of[d] if d in domains else 0.0 for d in self.domains]
        return np.repeat(np.float32(each), self.counts)

    def all_kept(self) -> np.ndarray:
        """No pair left out, bool[pairs]."""
        return np.ones(self.num_pairs, bool)

    def stacked(self, tables: dict[str, jax.Array]) -> jax.Array:
        """The items' factors of all domains, f32[items, dim]."""
        return jnp.concatenate([tables[f"{domain}_item"] for domain in self.domains])


def matrix(interactions: Any, sizes: Sizes, *, joined: bool) -> Matrix:
    """Lays the pairs out for the sweeps: once for every fit of the same data.

    Args:
      interactions: training interactions (``interactions.Interactions`` or ``Pairs``) by domain.
      sizes: rows of the tables.
      joined: whether the source's pairs count.
    """
    domains = ("target", "source") if joined else ("target",)
    counts = (sizes.target_items, sizes.source_items)[: len(domains)]
    offsets = np.cumsum([0, *counts])
    pairs = [interactions[domain] for domain in domains]
    users = np.concatenate([np.asarray(p.users) for p in pairs])
    items = [np.asarray(p.items) + at for p, at in zip(pairs, offsets[:-1], strict=True)]
    items, weights = np.concatenate(items), None
    if any(p.weights is not None for p in pairs):
        own = (np.ones(len(p.users)) if p.weights is None else p.weights for p in pairs)
        weights = np.concatenate([np.asarray(each, np.float32) for each in own])
    by_user = _blocks(users, items, sizes.users, weights)
    by_item = _blocks(items, users, offsets[-1], weights)
    return Matrix(by_user, by_item, len(users), domains, counts)


def sweeper(interactions: Any, sizes: Sizes, options: Options) -> Any:
    """Returns the sweep, Params -> Params: improves all users, then all items."""
    pairs = cache(lambda: matrix(interactions, sizes, joined=options.joined))  # when first needed
    return lambda params: Params(sweep(pairs(), params.tables, options), {})


def sweep(
    pairs: Matrix,
    tables: dict[str, jax.Array],
    options: Options,
    kept: np.ndarray | None = None,
    *,
    sweeps: int = 1,
) -> dict[str, jax.Array]:
    """Improves all users, then all items, by some steps of conjugate gradients each.

    Args:
      pairs: from ``matrix``.
      tables: ``user`` and the items' tables.
      options: structure and constants.
      kept: bool[pairs], the pairs that there are; by default all.
      sweeps: how often.

    Returns:
      The tables; zero for users and items without pairs.
    """
    x, y = tables["user"], pairs.stacked(tables)
    weights, one = pairs.weights(options), np.ones(len(x), np.float32)
    kept = pairs.all_kept() if kept is None else kept
    constants = _constants(options, y)
    for _ in range(sweeps):
        x = _improve(x, y, pairs.by_user, kept, weights, one, *constants, _STEPS)
        y = _improve(y, x, pairs.by_item, kept, one, weights, *constants, _STEPS)
    items = jnp.split(y, np.cumsum(pairs.counts)[:-1])
    return {"user": x} | {
        f"{domain}_item": own for domain, own in zip(pairs.domains, items, strict=True)
    }


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
    pairs = matrix(interactions, sizes, joined=options.joined)
    tables = init(jax.random.key(seed), sizes, options).tables if start is None else start
    return sweep(pairs, tables, options, sweeps=sweeps)


def users_of(
    pairs: Matrix,
    tables: dict[str, jax.Array],
    options: Options,
    domains: tuple[str, ...],
    kept: np.ndarray | None = None,
) -> jax.Array:
    """Solves for the users from their pairs in some domains alone, with the items as they are.

    Args:
      pairs: from ``matrix``.
      tables: the factorisation's.
      options: of the factorisation.
      domains: those whose pairs count.
      kept: bool[pairs], the pairs that there are; by default all.

    Returns:
      f32[users, dim], zero for users without such pairs.
    """
    x, y = tables["user"], pairs.stacked(tables)
    weights, one = pairs.weights(options, domains), np.ones(len(x), np.float32)
    kept = pairs.all_kept() if kept is None else kept
    constants = _constants(options, y)
    return _improve(x, y, pairs.by_user, kept, weights, one, *constants, _TO_THE_END)


def _constants(options: Options, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Regularisation and alpha, traced: other values are no other program."""
    constants = options.ials_regularization, options.ials_alpha
    return tuple(jnp.asarray(value, like.dtype) for value in constants)


def _blocks(
    rows: np.ndarray, columns: np.ndarray, num_rows: int, weights: np.ndarray | None
) -> Blocks:
    """Packs rows and their pairs in the order of the rows."""
    order = np.argsort(rows, kind="stable")
    degrees = np.bincount(rows, minlength=num_rows)
    starts = np.cumsum(degrees) - degrees
    ids = np.flatnonzero(degrees)
    chunks = -(-degrees[ids] // _CHUNK)
    ends = np.cumsum(chunks)
    # A power of two that holds the longest row, and not much more than there is.
    size = max(chunks.max(initial=1), min(_PAIRS_AT_ONCE // _CHUNK, chunks.sum()))
    size = 1 << (int(size) - 1).bit_length()
    firsts = [0]
    while firsts[-1] < len(ids):
        before = ends[firsts[-1]] - chunks[firsts[-1]]
        firsts.append(int(np.searchsorted(ends, before + size, side="right")))
    bounds = list(zip(firsts[:-1], firsts[1:], strict=True))
    most = max((last - first for first, last in bounds), default=1)
    packed = Blocks(
        np.full((len(bounds), most), num_rows, np.int32),
        np.full((len(bounds), size), most - 1, np.int32),
        np.zeros((len(bounds), size, _CHUNK), np.int32),
        np.full((len(bounds), size, _CHUNK), -1, np.int32),
        None if weights is None else np.ones((len(bounds), size, _CHUNK), np.float32),
    )
    for block, (first, last) in enumerate(bounds):
        own, each = ids[first:last], chunks[first:last]
        owners = np.repeat(np.arange(last - first), each)
        slots = np.arange(len(owners)) - np.repeat(np.cumsum(each) - each, each)
        slots = slots[:, None] * _CHUNK + np.arange(_CHUNK)
        filled = slots < degrees[own][owners][:, None]
        pairs = order[np.where(filled, starts[own][owners][:, None] + slots, 0)]
        packed.rows[block, : last - first] = own
        packed.owners[block, : len(owners)] = owners
        packed.columns[block, : len(owners)] = np.where(filled, columns[pairs], 0)
        packed.pairs[block, : len(owners)] = np.where(filled, pairs, -1)
        if weights is not None:
            packed.weights[block, : len(owners)] = weights[pairs]
    return jax.tree.map(jnp.asarray, packed)  # to the device once, not each sweep


@jax.jit
def _improve(
    x: jax.Array,
    y: jax.Array,
    blocks: Blocks,
    kept: jax.Array,
    column_weights: jax.Array,
    row_weights: jax.Array,
    regularization: jax.Array,
    alpha: jax.Array,
    steps: int,
) -> jax.Array:
    """Conjugate gradients for the rows x of the normal equations; zero for rows without pairs."""
    gram = y.T @ (y * column_weights[:, None])

    def solve(out: jax.Array, block: Blocks) -> tuple[jax.Array, None]:
        rows, owners, columns, pairs, k = block
        own = y[columns]  # [c, _CHUNK, dim]
        weights = jnp.where((pairs >= 0) & kept[pairs], column_weights[columns], 0.0)
        ridge = regularization / row_weights.at[rows].get(mode="fill", fill_value=1.0)

        def total(of_chunks: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(of_chunks, owners, len(rows), indices_are_sorted=True)

        def normal(p: jax.Array) -> jax.Array:
            dots = jnp.einsum("cwd,cd->cw", own, p[owners])
            dots = dots if k is None else k * dots
            observed = total(jnp.einsum("cw,cwd->cd", weights * dots, own))
            return p @ gram + ridge[:, None] * p + alpha * observed

        if k is None:
            right = (1 + alpha) * total(jnp.einsum("cw,cwd->cd", weights, own))
        else:
            right = total(jnp.einsum("cw,cwd->cd", weights * (1 + alpha * k), own))
        any_pair = total(weights.max(axis=1)) > 0
        start = x.at[rows].get(mode="fill", fill_value=0.0) * any_pair[:, None]
        solved = conjugate_gradients(normal, right, start, steps)
        return out.at[rows].set(solved, mode="drop"), None

    return jax.lax.scan(solve, jnp.zeros_like(x), blocks)[0]
