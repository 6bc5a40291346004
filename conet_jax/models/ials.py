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

On several devices rows are split as those of all tables are (``devices``), each device improves its
own, and what it reads of the other side comes a block of pairs at a time (Mehta et al. 2021, *ALX:
Large Scale Matrix Factorization on TPUs*); only Gram matrices are summed over the devices.
"""

from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices
from conet_jax.devices import SAME, SPLIT
from conet_jax.models import factors
from conet_jax.models.base import FittedModel, Params, Sizes
from conet_jax.models.conjugate_gradients import conjugate_gradients

_CHUNK = 8  # pairs of a row that are read together
_PAIRS_AT_ONCE = 1 << 11  # gathered factors at once: .5 MiB at 64 factors, in a core's own cache
_PAIRS_SENT = 1 << 13  # the same where they come from other devices, and each block is a message
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


def drawn(
    key: jax.Array, sizes: Sizes, options: Options, mesh: jax.sharding.Mesh, known: Any = None
) -> dict[str, jax.Array]:
    """Returns the tables of ``init`` on devices, with the rows in place that are known.

    Args:
      key: of the draw.
      sizes: rows of the tables.
      options: structure.
      mesh: the devices.
      known: of some tables the rows that an earlier run has (``run.earlier.Rows``).
    """

    def tables(key: jax.Array) -> dict[str, jax.Array]:
        return init(key, sizes, options).tables

    if not known:
        return devices.made(tables, key, mesh)
    # A user's first view is that of all domains, its first columns are the factors.
    plain = {
        name: known[name].into(table) if name in known else table
        for name, table in tables(key).items()
    }
    return {name: devices.spread(table, mesh) for name, table in plain.items()}


class Fold(NamedTuple):
    """A part of the pairs: number r of a domain, in the order given, is in fold ``r % of``."""

    number: int
    of: int


_NONE = Fold(-1, 1)


class Blocks(NamedTuple):
    """A device's rows of one side of the matrix with their pairs, in blocks of equal shape.

    A row's pairs stand in whole chunks of ``_CHUNK``, all of them in one block.

    Attributes:
      rows: int32[b, r], a block's rows as their device counts; out of range in padding.
      owners: int32[b, c], which of the block's rows a chunk is of.
      columns: int32[b, c, _CHUNK], the pairs' columns.
      pairs: int32[b, c, _CHUNK], the pairs' numbers, each domain's from 0; -1 in padding.
      weights: f32[b, c, _CHUNK], the pairs' k; None is 1 for each.
    """

    rows: jax.Array
    owners: jax.Array
    columns: jax.Array
    pairs: jax.Array
    weights: jax.Array | None


class Matrix(NamedTuple):
    """Training pairs as both halves of a sweep read them, on the devices of ``mesh``.

    Items of both domains are rows and columns of one matrix: a device's own of the source follow
    its own of the target.

    Attributes:
      by_user: the users' rows.
      by_item: the items' rows.
      domains: ("target",) or ("target", "source").
      mesh: the devices.
    """

    by_user: Blocks
    by_item: Blocks
    domains: tuple[str, ...]
    mesh: jax.sharding.Mesh

    def weights(self, options: Options) -> list[float]:
        """Of each domain its w."""
        of = {"target": 1.0, "source": options.ials_source_weight}
        return [of[domain] for domain in self.domains]

    def items(self, tables: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        """The items' factors by domain."""
        return tuple(tables[f"{domain}_item"] for domain in self.domains)


def matrix(
    interactions: Any, sizes: Sizes, *, joined: bool, mesh: jax.sharding.Mesh | None = None
) -> Matrix:
    """Lays the pairs out for the sweeps: once for every fit of the same data.

    Args:
      interactions: training interactions (``interactions.Interactions`` or ``Pairs``) by domain.
      sizes: rows of the tables.
      joined: whether the source's pairs count.
      mesh: the devices; None is one.
    """
    domains = ("target", "source") if joined else ("target",)
    mesh = devices.one_device() if mesh is None else mesh
    each = [-(-count // mesh.size) for count in (sizes.target_items, sizes.source_items)]
    offsets = mesh.size * np.cumsum([0, *each[: len(domains)]])
    pairs = [interactions[domain] for domain in domains]
    users = np.concatenate([np.asarray(p.users) for p in pairs])
    items = [np.asarray(p.items) + np.int32(o) for p, o in zip(pairs, offsets[:-1], strict=True)]
    items, weights = np.concatenate(items), None
    numbers = np.concatenate([np.arange(len(p.users), dtype=np.int32) for p in pairs])
    if any(p.weights is not None for p in pairs):
        own = (np.ones(len(p.users)) if p.weights is None else p.weights for p in pairs)
        weights = np.concatenate([np.asarray(k, np.float32) for k in own])
    by_user = _blocks(users, items, numbers, sizes.users, weights, mesh)
    by_item = _blocks(items, users, numbers, offsets[-1], weights, mesh)
    return Matrix(by_user, by_item, domains, mesh)


def sweeper(interactions: Any, sizes: Sizes, options: Options) -> Any:
    """Returns the sweep, Params -> Params: improves all users, then all items."""
    pairs = cache(lambda: matrix(interactions, sizes, joined=options.joined))  # when first needed
    return lambda params: Params(sweep(pairs(), params.tables, options), {})


def sweep(
    pairs: Matrix,
    tables: dict[str, jax.Array],
    options: Options,
    without: Fold | None = None,
    *,
    sweeps: int = 1,
) -> dict[str, jax.Array]:
    """Improves all users, then all items, by some steps of conjugate gradients each.

    Args:
      pairs: from ``matrix``.
      tables: ``user`` and the items' tables, on the devices of the pairs.
      options: structure and constants.
      without: the pairs that are left out; by default none.
      sweeps: how often.

    Returns:
      The tables; zero for users and items without pairs.
    """
    x, y, w = (tables["user"],), pairs.items(tables), pairs.weights(options)
    given = options.ials_regularization, options.ials_alpha, _STEPS, *(without or _NONE)
    for _ in range(sweeps):
        x = _improve(x, y, pairs.by_user, [1.0], w, *given, mesh=pairs.mesh)
        y = _improve(y, x, pairs.by_item, w, [1.0], *given, mesh=pairs.mesh)
    items = {f"{domain}_item": own for domain, own in zip(pairs.domains, y, strict=True)}
    return {"user": x[0], **items}


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
    without: Fold | None = None,
) -> jax.Array:
    """Solves for the users from their pairs in some domains alone, with the items as they are.

    Args:
      pairs: from ``matrix``.
      tables: the factorisation's.
      options: of the factorisation.
      domains: those whose pairs count.
      without: the pairs that are left out; by default none.

    Returns:
      f32[users, dim], zero for users without such pairs.
    """
    of_domains = zip(pairs.weights(options), pairs.domains, strict=True)
    w = [w * (domain in domains) for w, domain in of_domains]
    given = options.ials_regularization, options.ials_alpha, _TO_THE_END, *(without or _NONE)
    x, y = (tables["user"],), pairs.items(tables)
    return _improve(x, y, pairs.by_user, [1.0], w, *given, mesh=pairs.mesh)[0]


def counts_of_users(
    pairs: Matrix,
    tables: dict[str, jax.Array],
    domains: tuple[str, ...],
    without: Fold | None = None,
) -> jax.Array:
    """Pairs of each user in some domains, f32[users]; arguments are of ``users_of``."""
    x, y = (tables["user"],), pairs.items(tables)
    counted = [float(domain in domains) for domain in pairs.domains]
    return _count(x, y, pairs.by_user, counted, *(without or _NONE), mesh=pairs.mesh)[0]


def counts_of_items(
    pairs: Matrix, tables: dict[str, jax.Array], without: Fold | None = None
) -> dict[str, jax.Array]:
    """Pairs of each item, f32[items] by table; arguments are of ``users_of``."""
    x, y = (tables["user"],), pairs.items(tables)
    counts = _count(y, x, pairs.by_item, [1.0], *(without or _NONE), mesh=pairs.mesh)
    return {f"{domain}_item": own for domain, own in zip(pairs.domains, counts, strict=True)}


def _blocks(
    rows: np.ndarray,
    columns: np.ndarray,
    numbers: np.ndarray,
    num_rows: int,
    weights: np.ndarray | None,
    mesh: jax.sharding.Mesh,
) -> Blocks:
    """Packs rows and their pairs in the order of the rows, each device its own."""
    n = mesh.size
    counts = np.bincount(rows, minlength=-(-num_rows // n) * n)
    degrees = [counts[d::n] for d in range(n)]
    ids = [np.flatnonzero(own) for own in degrees]
    chunks = [-(-own[having] // _CHUNK) for own, having in zip(degrees, ids, strict=True)]
    # A power of two that holds the longest row, and not much more than there is.
    longest = max(own.max(initial=1) for own in chunks)
    at_once = _PAIRS_AT_ONCE if n == 1 else _PAIRS_SENT
    size = max(longest, min(at_once // _CHUNK, max(own.sum() for own in chunks)))
    size = 1 << (int(size) - 1).bit_length()
    bounds = [_bounds(own, size) for own in chunks]
    most = max((last - first for own in bounds for first, last in own), default=1)
    shape = max(map(len, bounds)), size

    def of_device(d: int) -> Blocks:
        packed = Blocks(
            np.full((shape[0], most), len(degrees[d]), np.int32),
            np.full(shape, most - 1, np.int32),
            np.zeros((*shape, _CHUNK), np.int32),
            np.full((*shape, _CHUNK), -1, np.int32),
            None if weights is None else np.ones((*shape, _CHUNK), np.float32),
        )
        at = np.flatnonzero(rows % n == d)
        order = at[np.argsort(rows[at] // n, kind="stable")]
        starts = np.cumsum(degrees[d]) - degrees[d]
        for block, (first, last) in enumerate(bounds[d]):
            own, each = ids[d][first:last], chunks[d][first:last]
            owners = np.repeat(np.arange(last - first), each)
            slots = np.arange(len(owners)) - np.repeat(np.cumsum(each) - each, each)
            slots = slots[:, None] * _CHUNK + np.arange(_CHUNK)
            filled = slots < degrees[d][own][owners][:, None]
            pairs = order[np.where(filled, starts[own][owners][:, None] + slots, 0)]
            packed.rows[block, : last - first] = own
            packed.owners[block, : len(owners)] = owners
            packed.columns[block, : len(owners)] = np.where(filled, columns[pairs], 0)
            packed.pairs[block, : len(owners)] = np.where(filled, numbers[pairs], -1)
            if weights is not None:
                packed.weights[block, : len(owners)] = weights[pairs]
        return packed

    return devices.from_parts(of_device, mesh)  # once, not each sweep


def _bounds(chunks: np.ndarray, size: int) -> list[tuple[int, int]]:
    """First and last row of each block, of rows of so many chunks, ``size`` of them a block."""
    ends, firsts = np.cumsum(chunks), [0]
    while firsts[-1] < len(chunks):
        before = ends[firsts[-1]] - chunks[firsts[-1]]
        firsts.append(int(np.searchsorted(ends, before + size, side="right")))
    return list(zip(firsts[:-1], firsts[1:], strict=True))


def _kept(pairs: jax.Array, fold: jax.Array, folds: jax.Array) -> jax.Array:
    """Which pairs of a block there are."""
    return (pairs >= 0) & (pairs % folds != fold)


def _of_columns(each: jax.Array, tables: tuple[jax.Array, ...], columns: jax.Array) -> jax.Array:
    """What ``each`` f32[tables] says of the table that a column is in."""
    if len(tables) == 1:
        return each[0]
    return jnp.where(columns < len(tables[0]) * devices.size(), each[0], each[1])


def _of_rows(each: jax.Array, tables: tuple[jax.Array, ...]) -> jax.Array:
    """What ``each`` f32[tables] says of the table that a row of this device is in, f32[rows]."""
    return jnp.concatenate([jnp.full(len(x), each[at]) for at, x in enumerate(tables)])


def _parted(rows: jax.Array, tables: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """A device's rows of all tables, by table."""
    return tuple(jnp.split(rows, np.cumsum([len(table) for table in tables])[:-1]))


@partial(jax.jit, static_argnames="mesh")
def _improve(
    x: tuple[jax.Array, ...],
    y: tuple[jax.Array, ...],
    blocks: Blocks,
    row_weights: jax.Array,
    column_weights: jax.Array,
    *given: jax.Array,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, ...]:
    """Conjugate gradients for the rows x of the normal equations; zero for rows without pairs.

    Args:
      x: the tables of the rows.
      y: those of the columns.
      blocks: the rows' pairs.
      row_weights: w of each of the rows' tables.
      column_weights: likewise.
      *given: regularization, alpha, steps, and the ``Fold`` that is left out: traced, since other
        values are no other program.
      mesh: the devices.
    """
    weights = jnp.asarray(row_weights, x[0].dtype), jnp.asarray(column_weights, x[0].dtype)
    given = tuple(jnp.asarray(value, x[0].dtype) for value in given[:2]) + given[2:]
    arguments = x, y, blocks, *weights, *given
    if mesh.size == 1:  # mapped over one device it takes a sixth longer
        return _improve_part(*arguments)
    specs = SPLIT, SPLIT, SPLIT, *[SAME] * (len(weights) + len(given))
    return devices.mapped(_improve_part, mesh, specs, SPLIT)(*arguments)


def _improve_part(
    x: tuple[jax.Array, ...],
    y: tuple[jax.Array, ...],
    blocks: Blocks,
    row_weights: jax.Array,
    column_weights: jax.Array,
    regularization: jax.Array,
    alpha: jax.Array,
    steps: jax.Array,
    fold: jax.Array,
    folds: jax.Array,
) -> tuple[jax.Array, ...]:
    """``_improve`` on a device."""
    before, columns_of = jnp.concatenate(x), jnp.concatenate(y)
    weighed = columns_of * _of_rows(column_weights, y)[:, None]
    gram = devices.psum(columns_of.T @ weighed)
    own_weights = _of_rows(row_weights, x)

    def solve(out: jax.Array, block: Blocks) -> tuple[jax.Array, None]:
        rows, owners, columns, pairs, k = block
        own = devices.read(columns_of, columns)  # [c, _CHUNK, dim]
        weights = _of_columns(column_weights, y, columns)
        weights = jnp.where(_kept(pairs, fold, folds), weights, 0.0)
        ridge = regularization / own_weights.at[rows].get(mode="fill", fill_value=1.0)

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
        start = before.at[rows].get(mode="fill", fill_value=0.0) * any_pair[:, None]
        solved = conjugate_gradients(normal, right, start, steps)
        return out.at[rows].set(solved, mode="drop"), None

    return _parted(jax.lax.scan(solve, jnp.zeros_like(before), blocks)[0], x)


@partial(jax.jit, static_argnames="mesh")
def _count(
    x: tuple[jax.Array, ...],
    y: tuple[jax.Array, ...],
    blocks: Blocks,
    counted: jax.Array,
    fold: jax.Array,
    folds: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, ...]:
    """Pairs of each row of the tables x whose columns are in tables that are ``counted``."""

    def count(x: Any, y: Any, blocks: Blocks, counted: Any, fold: Any, folds: Any) -> Any:
        def add(out: jax.Array, block: Blocks) -> tuple[jax.Array, None]:
            of_pairs = _of_columns(counted, y, block.columns) * _kept(block.pairs, fold, folds)
            total = jax.ops.segment_sum(of_pairs.sum(axis=1), block.owners, len(block.rows))
            return out.at[block.rows].set(total, mode="drop"), None

        return _parted(jax.lax.scan(add, jnp.zeros(sum(map(len, x))), blocks)[0], x)

    specs = SPLIT, SPLIT, SPLIT, SAME, SAME, SAME
    given = x, y, blocks, jnp.asarray(counted, float), fold, folds
    return devices.mapped(count, mesh, specs, SPLIT)(*given)
