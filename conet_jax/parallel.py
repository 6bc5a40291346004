"""The device axis: which devices there are, where a table's rows live, what crosses the wire.

Tables are split by rows, interleaved: of n devices, device r % n holds row r as its row r // n, so
that neither a range of popular ids nor one user's neighbours end on one device. An array of such a
table is that of device 0, then that of device 1, …; with one device it is the plain table, and
everything below is the identity. Where an id has several rows (``copies``) they are beside each
other on one device, and row r, as the axis counts, is still row r // n of device r % n. Dense
parameters are on every device. A step exchanges the ids, rows and row gradients of its batch, each
row once for every device that reads it, and dense gradients: nothing as long as a table.

Functions that run on a device ask ``size()``; outside of ``mapped`` that is 1, so the same code is
a program of one device, and can be ``vmap``ped over runs.

The mapping is ``jit(shard_map)`` over one named axis. ``jax.pmap`` has been a layer over the same
two since JAX 0.8 and nothing else since 0.9.2 (docs.jax.dev/en/latest/migrate_pmap.html), "the old
way" by its own docstring: it wants a leading axis of devices on each array and gives each process
its own part of the result, which Orbax could not save as one array.
"""

import atexit
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conet_jax.errors import InputError
from conet_jax.row_adam import merge_ids

AXIS = "devices"
SPLIT, SAME = P(AXIS), P()  # along the leading axis; on every device
HEARTBEAT_SECONDS = 30  # a peer silent for so long is dead, and the other processes end
_START_SECONDS = 300  # for all processes to appear


# Processes.


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    """Joins the processes of a run through ``jax.distributed``, before JAX is used.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: of this one, from 0. With all three None they are taken from the cluster (Slurm,
        Open MPI, Kubernetes, TPU pods), and where its environment tells of none there is one
        process.

    Returns:
      Whether there are several processes.

    Raises:
      InputError: some of the three are missing or do not fit, or the others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if not _in_cluster(os.environ):
            return False
    elif None in given:
        raise InputError(
            "--coordinator, --num_processes and --process_id come together, "
            f"got {coordinator}, {num_processes} and {process_id}"
        )
    elif not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id is {process_id}: expected 0 to {num_processes - 1}, one less than "
            "--num_processes"
        )
    elif not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator is {coordinator!r}: expected HOST:PORT of process 0")
    # It would keep SIGTERM from ending the process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes of this run cannot be joined ({error}): start the same command on "
            "each, with the --coordinator that all reach"
        ) from None
    if jax.process_count() == 1:
        return False
    _watch_this_process()
    return True


# JAX ends a process that hears of a dead peer from its coordinator by abort(), with a stack trace
# and before Python could say anything; so another, small process does.
_WATCH = "import sys; sys.stdin.read() or print('error:', sys.argv[1], file=sys.stderr)"
_watcher: subprocess.Popen | None = None


def _watch_this_process() -> None:
    global _watcher
    message = (
        f"process {jax.process_index()} was killed, or ended by JAX since another process of this "
        f"run died or cannot be reached; {_GO_ON}"
    )
    _watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCH, message], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(_dismiss_watcher)


def _dismiss_watcher() -> None:
    if _watcher is not None:
        _watcher.communicate(b"ended")


_GO_ON = "the same commands again go on from the latest checkpoint"


def _in_cluster(environment: Any) -> bool:
    """Whether the environment is that of one process of several, as ``jax.distributed`` reads it.

    >>> _in_cluster({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node001"})
    True
    >>> _in_cluster({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node001"})
    False
    """
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environment):
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    return (
        int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def is_main() -> bool:
    """Whether this is process 0, which writes result files, logs and progress."""
    return jax.process_index() == 0


def together(function: Callable[[], None]) -> None:
    """Runs a check or a write in process 0 alone; all processes go on, or raise its error.

    Raises:
      InputError: that of process 0.
    """
    if jax.process_count() == 1:
        function()
        return
    from jax.experimental import multihost_utils

    message = np.zeros(1024, np.uint8)
    if is_main():
        try:
            function()
        except InputError as error:
            text = str(error).encode()[: len(message)] or b"?"
            message[: len(text)] = np.frombuffer(text, np.uint8)
    message = np.asarray(multihost_utils.broadcast_one_to_all(message)).astype(np.uint8)
    if message.any():
        raise InputError(message.tobytes().rstrip(b"\0").decode(errors="ignore"))


def agreed(function: Callable[[], int]) -> int:
    """Returns what ``function`` returns in process 0 to all processes, or raises its error.

    Raises:
      InputError: that of process 0.
    """
    found: list[int] = []
    together(lambda: found.append(function()))
    if jax.process_count() == 1:
        return found[0]
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(found[0] if found else 0)))


class PeerLost(RuntimeError):
    """Another process of the run died or cannot be reached; this one cannot go on."""


@contextmanager
def watch_peers() -> Iterator[None]:
    """Turns the errors that a dead peer causes in JAX's runtime into ``PeerLost``.

    Where a peer's silence is all there is (NCCL waits for ever), ``jax.distributed`` ends the
    process after ``HEARTBEAT_SECONDS``, and at once where it was process 0.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of JAX's runtime, but not of one kind
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        if jax.process_count() == 1 or not _OF_PEERS.search(reason):
            raise
        raise PeerLost(
            f"process {jax.process_index()}: another process of this run died or cannot be reached "
            f"({reason}); {_GO_ON}"
        ) from error


_OF_PEERS = re.compile(
    "gloo|nccl|rccl|mpi|barrier|coordination|heartbeat|unavailable|deadline", re.IGNORECASE
)


def leave(message: object) -> NoReturn:
    """Ends this process with a message and status 1, not waiting for peers that are gone."""
    print("error:", message, file=sys.stderr, flush=True)
    _dismiss_watcher()
    os._exit(1)


# Devices and arrays on them.


@lru_cache
def mesh(devices: int = 0) -> Mesh:
    """Returns the axis over some devices, as many of each process.

    Args:
      devices: how many, over all processes; 0 is all.

    Raises:
      InputError: there are fewer, or they do not divide by the processes.
    """
    processes, total = jax.process_count(), jax.device_count()
    if devices > total or devices % processes:
        raise InputError(
            f"config.devices is {devices}: expected 0 (all), or a number up to the {total} devices "
            f"here that divides by the number of processes, {processes}"
        )
    each = (devices or total) // processes
    chosen = [d for i in range(processes) for d in jax.local_devices(process_index=i)[:each]]
    return Mesh(np.array(chosen), (AXIS,))


@lru_cache
def one_device() -> Mesh:
    """Returns the axis over this process's first device."""
    return Mesh(np.array(jax.local_devices()[:1]), (AXIS,))


def mesh_of(tree: Any) -> Mesh:
    """Returns the axis that a pytree of arrays is on; that of one device for plain arrays."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.core.Tracer):
            continue
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and AXIS in sharding.mesh.axis_names:
            return sharding.mesh
    return one_device()


def mapped(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """Maps a function of one device over the axis; call it under ``jax.jit``.

    Args:
      function: sees its device's part of what is ``SPLIT``, and all of what is the ``SAME``.
      mesh: the axis.
      in_specs: prefix of the arguments: ``SPLIT`` or ``SAME``.
      out_specs: prefix of the results. What is declared the ``SAME`` must be.
    """
    # Without replication checks gradients of what is the SAME stay those of each device: summed
    # by `total`, and not once more by JAX.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def put(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Puts arrays that every process holds on the axis: ``SPLIT`` in equal parts, or the ``SAME``.

    On one device they stay as they are.
    """
    if mesh.size == 1:
        return tree
    sharding = NamedSharding(mesh, spec)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(place, tree)


# On a device.


def size() -> int:
    """Returns the number of devices that this code runs on together, 1 outside of ``mapped``."""
    try:
        return jax.lax.axis_size(AXIS)
    except NameError:
        return 1


def axis_name() -> str | None:
    """Returns the name of the axis for libraries that ask for one; None on one device."""
    return AXIS if size() > 1 else None


def total(tree: Any) -> Any:
    """Sums each array over the devices."""
    return jax.lax.psum(tree, AXIS) if size() > 1 else tree


def mean(tree: Any) -> Any:
    """Averages each array over the devices."""
    return jax.lax.pmean(tree, AXIS) if size() > 1 else tree


def whole(tree: Any) -> Any:
    """Joins the devices' parts of each array along its leading axis, on every device."""
    if size() == 1:
        return tree
    return jax.lax.all_gather(tree, AXIS, tiled=True)


def places(count: int) -> jax.Array:
    """Returns the places i32[ceil(count / n)] of a batch that are this device's.

    Where the batch does not divide, those from ``count`` on are padding.
    """
    each = -(-count // size())
    here = jnp.arange(each, dtype=jnp.int32)
    return here if size() == 1 else jax.lax.axis_index(AXIS) * each + here


def draw(sample: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """Draws, for a device's part of a batch, what one device would draw for it.

    Args:
      sample: draws for a whole batch, entry by entry, from parameters of ``like``'s shape; JAX's
        random bits of an entry depend on the key and its place alone.
      like: [part, ...], this device's parameters.

    Returns:
      [part, ...].
    """
    n = size()
    if n == 1:
        return sample(like)
    drawn = sample(jnp.tile(like, (n,) + (1,) * (like.ndim - 1)))
    return jax.lax.dynamic_slice_in_dim(
        drawn, jax.lax.axis_index(AXIS) * like.shape[0], like.shape[0]
    )


def ask(answer: Callable[..., jax.Array], rows: jax.Array, *arguments: jax.Array) -> jax.Array:
    """Has each question answered where its row is: small questions and answers, no tables.

    Args:
      answer: (i32[m] rows as the device that holds them counts, *arguments) -> [m, ...].
      rows: i32[part], global.
      *arguments: [part, ...], the rest of each question.

    Returns:
      [part, ...].
    """
    n = size()
    if n == 1:
        return answer(rows, *arguments)
    rows, *arguments = whole((rows, *arguments))
    mine = rows % n == jax.lax.axis_index(AXIS)
    answers = answer(jnp.where(mine, rows // n, 0), *arguments)
    answers = jnp.where(mine.reshape(-1, *[1] * (answers.ndim - 1)), answers, 0)
    return jax.lax.psum_scatter(answers, AXIS, tiled=True)


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
    n, flat = size(), ids.reshape(-1)
    keys, inverse = merge_ids(flat if n == 1 else flat % n * num_rows + flat // n, n * num_rows)
    device = keys // num_rows
    counts = jnp.zeros(n, jnp.int32).at[device].add(1, mode="drop")
    first = jnp.cumsum(counts) - counts
    place = jnp.cumsum(device < n, dtype=jnp.int32) - 1 - first[jnp.minimum(device, n - 1)]
    rows = keys if n == 1 else keys % num_rows
    return Wanted(rows, device, place, inverse.reshape(ids.shape), counts.max())


def capacity(count: int, n: int | None = None) -> int:
    """Rows that one of n devices asks of another at most, of the ``count`` that it reads.

    The mean of an even spread, four standard deviations, and eight. Where ids are spread so badly
    that this does not hold (``fits``), ``count`` is taken, which always does.
    """
    each = count / (n or size())
    return min(count, int(np.ceil(each + 4 * each**0.5)) + 8)


def fits(wanted: Sequence[Wanted]) -> jax.Array:
    """Whether all that is wanted, on whatever device, is within the ``capacity``: bool[]."""
    each = [jnp.all(w.most <= capacity(w.rows.shape[-1])) for w in wanted]
    return jax.lax.pmin(jnp.all(jnp.stack(each)).astype(jnp.int32), AXIS) > 0


class Route(NamedTuple):
    """How rows of a table come to those who read them, and gradients back.

    Attributes:
      unique: i32[r], distinct rows of this device that any device reads; out of range, no row.
      inverse: i32, place of each id of this device among the rows that come, in their shape.
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
    n = size()
    if n == 1:
        return Route(wanted.rows, wanted.inverse, None)
    slot = jnp.where(wanted.device < n, wanted.device * room + wanted.place, n * room)
    sent = jnp.full(n * room, num_rows, jnp.int32).at[slot].set(wanted.rows, mode="drop")
    unique, asked = merge_ids(_swap(sent), num_rows)
    return Route(unique, slot[wanted.inverse], asked)


def _swap(x: jax.Array) -> jax.Array:
    """Sends the k-th of n equal parts to device k."""
    parts = x.reshape(size(), -1, *x.shape[1:])
    return jax.lax.all_to_all(parts, AXIS, 0, 0).reshape(x.shape)


def send(rows: jax.Array, route: Route) -> jax.Array:
    """Sends the rows f[r, dim] of ``route.unique`` to those who read them: f[r, dim]."""
    return rows if route.asked is None else _swap(rows[route.asked])


def send_back(grads: jax.Array, route: Route) -> jax.Array:
    """Sums gradients f[r, dim] of what ``send`` gave where the rows are: f[r, dim]."""
    if route.asked is None:
        return grads
    return jnp.zeros_like(grads).at[route.asked].add(_swap(grads))


def read(tables: Any, ids: jax.Array) -> Any:
    """Returns the rows [..., dim] of global ids i32[...], of each of some tables split alike."""
    if size() == 1:
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
    n = size()
    if n == 1:
        return table[ids]
    mine = ids % n == jax.lax.axis_index(AXIS)
    return total(jnp.where(mine[..., None], table[ids // n], 0))


def block(table: jax.Array, first: jax.Array, length: int) -> jax.Array:
    """Returns the global rows from n ``first`` to n (``first + length``), on every device.

    Args:
      table: [rows, ...], this device's part.
      first: i32[], row of each part, of which ``length`` from there on are within it.
      length: rows of each part.
    """
    rows = jax.lax.dynamic_slice_in_dim(table, first, length)
    if size() == 1:
        return rows
    rows = jax.lax.all_gather(rows, AXIS)
    return jnp.swapaxes(rows, 0, 1).reshape(-1, *table.shape[1:])


# Whole tables: made, saved and read back in the order of their ids, each device a range of them.


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


def padded(tables: Any, mesh: Mesh, copies: int = 1) -> Any:
    """Pads plain tables by rows of zeros to the length of ``in_order``."""

    def pad(table: jax.Array) -> jax.Array:
        more = copies * _ordered_rows(len(table) // copies, mesh.size) - len(table)
        return jnp.pad(table, [(0, more)] + [(0, 0)] * (table.ndim - 1))

    return tables if mesh.size == 1 else jax.tree.map(pad, tables)


def ordered_like(tree: Any, mesh: Mesh, spec: P, copies: int = 1) -> Any:
    """Returns shapes, dtypes and devices of plain arrays as ``in_order`` has them if ``SPLIT``."""

    def like(x: Any) -> jax.ShapeDtypeStruct:
        shape = x.shape
        if spec == SPLIT and mesh.size > 1:
            shape = (copies * _ordered_rows(shape[0] // copies, mesh.size), *shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(like, tree)


@partial(jax.jit, static_argnames=("mesh", "copies"))
def in_order(tables: Any, *, mesh: Mesh, copies: int = 1) -> Any:
    """Returns tables in the order of their ids, padded by rows of zeros, each device a range."""
    n = mesh.size
    if n == 1:
        return tables

    def move(table: jax.Array) -> jax.Array:
        table = _by_id(table, copies)
        part = -(-table.shape[0] // n)
        padding = [(0, n * part - table.shape[0])] + [(0, 0)] * (table.ndim - 1)
        ranges = _swap(jnp.pad(table, padding)).reshape(n, part, *table.shape[1:])
        return _by_row(jnp.swapaxes(ranges, 0, 1).reshape(n * part, *table.shape[1:]))

    return mapped(lambda t: jax.tree.map(move, t), mesh, (SPLIT,), SPLIT)(tables)


@partial(jax.jit, static_argnames=("num_rows", "mesh", "copies"))
def interleaved(tables: dict[str, jax.Array], *, num_rows: Any, mesh: Mesh, copies: int = 1) -> Any:
    """The inverse of ``in_order``; ``num_rows`` is (name, rows) of each table without padding."""
    n = mesh.size
    if n == 1:
        return tables
    counts = dict(num_rows)

    def move(name: str, table: jax.Array) -> jax.Array:
        table = _by_id(table, copies)
        rows, part = _local_rows(counts[name] // copies, n)
        parts = jnp.swapaxes(table.reshape(part, n, *table.shape[1:]), 0, 1)
        return _by_row(_swap(parts.reshape(n * part, *table.shape[1:]))[:rows])

    def move_all(tables: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: move(name, table) for name, table in tables.items()}

    return mapped(move_all, mesh, (SPLIT,), SPLIT)(tables)


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
    return jax.make_array_from_callback(shape, NamedSharding(mesh, SPLIT), part)
