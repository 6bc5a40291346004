"""Where a table's rows live, and what crosses the wire.

Tables are split by rows, interleaved: of n devices, device r % n holds row r as its row r // n, so
that neither a range of popular ids nor one user's neighbours end on one device. An array of such a
table is that of device 0, then that of device 1, …; with one device it is the plain table, and
everything below is the identity. Where an id has several rows (``copies``) they are beside each
other on one device, and row r, as the axis counts, is still row r // n of device r % n. Dense
parameters are on every device. A step exchanges the ids, rows and row gradients of its batch, each
row once for every device that reads it, and dense gradients: nothing as long as a table.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conet_jax.devices import axis
from conet_jax.row_adam import merge_ids

Copies = Callable[[str], int]


def ask(answer: Callable[..., jax.Array], rows: jax.Array, *arguments: jax.Array) -> jax.Array:
    """Has each question answered where its row is: small questions and answers, no tables.

    Args:
      answer: (i32[m] rows as the device that holds them counts, *arguments) -> [m, ...].
      rows: i32[part], global.
      *arguments: [part, ...], the rest of each question.

    Returns:
      [part, ...].
    """
    n = axis.size()
    if n == 1:
        return answer(rows, *arguments)
    rows, *arguments = axis.all_gather((rows, *arguments))
    mine = rows % n == jax.lax.axis_index(axis.AXIS)
    answers = answer(jnp.where(mine, rows // n, 0), *arguments)
    answers = jnp.where(mine.reshape(-1, *[1] * (answers.ndim - 1)), answers, 0)
    return jax.lax.psum_scatter(answers, axis.AXIS, tiled=True)


class Wanted(NamedTuple):
    """Distinct rows that a device reads, sorted by the device that holds them.

    Attributes:
      rows: i32[m], as their device counts; anything where ``device`` is n.
      device: i32[m], which holds each; n in the places that duplicates left.
      place: i32[m], among those of the same device.
      inverse: i32, which of them each id is, in the shape of the ids.
      most: i32[], rows wanted of one device at most.
    """

    rows: jax.Array
    device: jax.Array
    place: jax.Array
    inverse: jax.Array
    most: jax.Array


def group(ids: jax.Array, num_rows: int) -> Wanted:
    """Merges the duplicates of a device's ids and sorts them by the device that holds the row.

    Args:
      ids: i32[...], m global rows.
      num_rows: rows of the table on each device.
    """
    n, flat = axis.size(), ids.reshape(-1)
    keys, inverse = merge_ids(flat if n == 1 else flat % n * num_rows + flat // n, n * num_rows)
    device = keys // num_rows
    counts = jnp.zeros(n, jnp.int32).at[device].add(1, mode="drop")
    first = jnp.cumsum(counts) - counts
    place = jnp.cumsum(device < n, dtype=jnp.int32) - 1 - first[jnp.minimum(device, n - 1)]
    rows = keys if n == 1 else keys % num_rows
    return Wanted(rows, device, place, inverse.reshape(ids.shape), counts.max())


def as_they_are(ids: jax.Array) -> Wanted:
    """The rows of one device in the shape of their ids, with no thought of duplicates."""
    return Wanted(ids, None, None, None, None)


def capacity(count: int, n: int | None = None) -> int:
    """Rows that one of n devices asks of another at most, of the ``count`` that it reads.

    The mean of an even spread, four standard deviations, and eight. Where ids are spread so badly
    that this does not hold (``fits``), ``count`` is taken, which always does.
    """
    each = count / (n or axis.size())
    return min(count, int(np.ceil(each + 4 * each**0.5)) + 8)


def fits(wanted: Sequence[Wanted]) -> jax.Array:
    """Whether all that is wanted, on whatever device, is within the ``capacity``: bool[]."""
    each = [jnp.all(w.most <= capacity(w.rows.shape[-1])) for w in wanted]
    return jax.lax.pmin(jnp.all(jnp.stack(each)).astype(jnp.int32), axis.AXIS) > 0


class Route(NamedTuple):
    """How rows of a table come to those who read them, and gradients back.

    Attributes:
      unique: i32[r], distinct rows of this device that any device reads; out of range, no row.
      inverse: i32, place of each id of this device among the rows that come, in their shape; None
        where they come in it.
      asked: i32[r], which of ``unique`` goes to each place of the others' rows; None on one
        device, where they are the rows that come.
    """

    unique: jax.Array
    inverse: jax.Array
    asked: jax.Array | None


def route(wanted: Wanted, num_rows: int, room: int) -> Route:
    """Tells each device which of its rows the others want.

    Args:
      wanted: from ``group``.
      num_rows: rows of the table on each device.
      room: rows that can be asked of one device: ``capacity``, or all.
    """
    n = axis.size()
    if n == 1:
        return Route(wanted.rows, wanted.inverse, None)
    slot = jnp.where(wanted.device < n, wanted.device * room + wanted.place, n * room)
    sent = jnp.full(n * room, num_rows, jnp.int32).at[slot].set(wanted.rows, mode="drop")
    unique, asked = merge_ids(_swap(sent), num_rows)
    return Route(unique, slot[wanted.inverse], asked)


def _swap(x: jax.Array) -> jax.Array:
    """Sends the k-th of n equal parts to device k."""
    parts = x.reshape(axis.size(), -1, *x.shape[1:])
    return jax.lax.all_to_all(parts, axis.AXIS, 0, 0).reshape(x.shape)


def send(rows: jax.Array, route: Route) -> jax.Array:
    """Sends the rows f[r, dim] of ``route.unique`` to those who read them: f[r, dim]."""
    return rows if route.asked is None else _swap(rows[route.asked])


def arranged(rows: jax.Array, route: Route) -> jax.Array:
    """Puts the rows that ``send`` gave in the places of the ids, in their shape."""
    return rows if route.inverse is None else rows[route.inverse]


def send_back(grads: jax.Array, route: Route) -> jax.Array:
    """Sums gradients f[r, dim] of what ``send`` gave where the rows are: f[r, dim]."""
    if route.asked is None:
        return grads
    return jnp.zeros_like(grads).at[route.asked].add(_swap(grads))


def read(tables: Any, ids: jax.Array) -> Any:
    """Returns the rows [..., dim] of global ids i32[...], of each of some tables split alike."""
    if axis.size() == 1:
        return jax.tree.map(lambda table: table[ids], tables)
    num_rows = jax.tree.leaves(tables)[0].shape[0]
    wanted = group(ids, num_rows)

    def fetch(room: int) -> Any:
        way = route(wanted, num_rows, room)
        rows = jnp.minimum(way.unique, num_rows - 1)
        return jax.tree.map(lambda table: send(table[rows], way)[way.inverse], tables)

    return jax.lax.cond(fits([wanted]), lambda: fetch(capacity(ids.size)), lambda: fetch(ids.size))


def read_everywhere(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows f[..., dim] of global ids that are the same on all devices."""
    n = axis.size()
    if n == 1:
        return table[ids]
    mine = ids % n == jax.lax.axis_index(axis.AXIS)
    return axis.psum(jnp.where(mine[..., None], table[ids // n], 0))


def block(table: jax.Array, first: jax.Array, length: int) -> jax.Array:
    """Returns the global rows from n ``first`` to n (``first + length``), on every device.

    Args:
      table: [rows, ...], this device's part.
      first: i32[], row of each part, of which ``length`` from there on are within it.
      length: rows of each part.
    """
    rows = jax.lax.dynamic_slice_in_dim(table, first, length)
    if axis.size() == 1:
        return rows
    rows = jax.lax.all_gather(rows, axis.AXIS)
    return jnp.swapaxes(rows, 0, 1).reshape(-1, *table.shape[1:])


def _local_rows(num_rows: int, n: int) -> tuple[int, int]:
    """Rows on each device as the axis has them, and an n-th of those in the order of ids."""
    rows = -(-num_rows // n)
    return rows, -(-rows // n)


def _ordered_rows(num_rows: int, n: int) -> int:
    return n * n * _local_rows(num_rows, n)[1]


def _by_id(table: Any, copies: int) -> Any:
    return table.reshape(-1, copies, *table.shape[1:])


def _by_row(table: Any) -> Any:
    return table.reshape(-1, *table.shape[2:])


def once(table: str) -> int:
    """``copies`` of tables with one row an id: rows of each id, by the table's name."""
    del table
    return 1


def padded(tables: dict[str, Any], mesh: Mesh, copies: Copies = once) -> dict[str, Any]:
    """Pads plain tables by rows of zeros to the length of ``in_order``."""

    def pad(name: str, table: jax.Array) -> jax.Array:
        rows = copies(name) * _ordered_rows(len(table) // copies(name), mesh.size)
        return jnp.pad(table, [(0, rows - len(table))] + [(0, 0)] * (table.ndim - 1))

    return tables if mesh.size == 1 else {name: pad(name, x) for name, x in tables.items()}


def ordered_like(tree: Any, mesh: Mesh, spec: P, copies: int = 1) -> Any:
    """Returns shapes, dtypes and devices of plain arrays as ``in_order`` has them if ``SPLIT``."""

    def like(x: Any) -> jax.ShapeDtypeStruct:
        shape = x.shape
        if spec == axis.SPLIT and mesh.size > 1:
            shape = (copies * _ordered_rows(shape[0] // copies, mesh.size), *shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(like, tree)


@partial(jax.jit, static_argnames=("mesh", "copies"))
def in_order(tables: dict[str, Any], *, mesh: Mesh, copies: Copies = once) -> dict[str, Any]:
    """Returns tables in the order of their ids, padded by rows of zeros, each device a range."""
    n = mesh.size
    if n == 1:
        return tables

    def move(name: str, table: jax.Array) -> jax.Array:
        table = _by_id(table, copies(name))
        part = -(-table.shape[0] // n)
        padding = [(0, n * part - table.shape[0])] + [(0, 0)] * (table.ndim - 1)
        ranges = _swap(jnp.pad(table, padding)).reshape(n, part, *table.shape[1:])
        return _by_row(jnp.swapaxes(ranges, 0, 1).reshape(n * part, *table.shape[1:]))

    def move_all(tables: dict[str, Any]) -> dict[str, Any]:
        return {name: jax.tree.map(partial(move, name), x) for name, x in tables.items()}

    return axis.mapped(move_all, mesh, (axis.SPLIT,), axis.SPLIT)(tables)


@partial(jax.jit, static_argnames=("num_rows", "mesh", "copies"))
def interleaved(
    tables: dict[str, jax.Array], *, num_rows: Any, mesh: Mesh, copies: Copies = once
) -> dict[str, jax.Array]:
    """The inverse of ``in_order``; ``num_rows`` is (name, rows) of each table without padding."""
    n = mesh.size
    if n == 1:
        return tables
    counts = dict(num_rows)

    def move(name: str, table: jax.Array) -> jax.Array:
        table = _by_id(table, copies(name))
        rows, part = _local_rows(counts[name] // copies(name), n)
        parts = jnp.swapaxes(table.reshape(part, n, *table.shape[1:]), 0, 1)
        return _by_row(_swap(parts.reshape(n * part, *table.shape[1:]))[:rows])

    def move_all(tables: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: move(name, table) for name, table in tables.items()}

    return axis.mapped(move_all, mesh, (axis.SPLIT,), axis.SPLIT)(tables)


def made(
    make: Callable[[jax.Array], dict[str, jax.Array]],
    key: jax.Array,
    mesh: Mesh,
    copies: Copies = once,
) -> dict[str, jax.Array]:
    """Makes plain tables from a key, on devices none of which ever has a whole one."""
    if mesh.size == 1:
        return make(key)
    key, shapes = axis.put(key, mesh, axis.SAME), jax.eval_shape(make, key)
    num_rows = tuple((name, table.shape[0]) for name, table in shapes.items())
    split = NamedSharding(mesh, axis.SPLIT)
    tables = jax.jit(lambda key: padded(make(key), mesh, copies), out_shardings=split)(key)
    return interleaved(tables, num_rows=num_rows, mesh=mesh, copies=copies)


def spread(table: Any, mesh: Mesh, copies: int = 1) -> jax.Array:
    """Puts a plain table on the axis, its rows interleaved, padded by rows of zeros."""
    n = mesh.size
    if n == 1:
        return jnp.asarray(table)
    table = _by_id(np.asarray(table), copies)
    rows = _local_rows(len(table), n)[0]

    def part(index: tuple[slice, ...]) -> np.ndarray:
        own = table[(index[0].start or 0) // (rows * copies) :: n]
        return _by_row(np.pad(own, [(0, rows - len(own))] + [(0, 0)] * (table.ndim - 1)))

    shape = (n * rows * copies, *table.shape[2:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, axis.SPLIT), part)


def from_parts(part: Callable[[int], Any], mesh: Mesh) -> Any:
    """Puts on each device what ``part`` returns for its number: arrays of equal shapes.

    It is called for the devices of this process alone.
    """
    if mesh.size == 1:
        return jax.tree.map(jnp.asarray, part(0))
    parts = [  # one at a time: not all are on the host at once
        jax.device_put(part(d), device)
        for d, device in enumerate(mesh.devices)
        if device.process_index == jax.process_index()
    ]

    def joined(*parts: jax.Array) -> jax.Array:
        shape = (mesh.size * len(parts[0]), *parts[0].shape[1:])
        sharding = NamedSharding(mesh, axis.SPLIT)
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return jax.tree.map(joined, *parts)
