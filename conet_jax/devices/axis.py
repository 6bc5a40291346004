"""The device axis: which devices there are, and what is split over them.

Functions that run on a device ask ``size()``; outside of ``mapped`` that is 1, so the same code is
a program of one device, and can be ``vmap``ped over runs.

The mapping is ``jit(shard_map)`` over one named axis. ``jax.pmap`` has been a layer over the same
two since JAX 0.8 and nothing else since 0.9.2 (docs.jax.dev/en/latest/migrate_pmap.html), "the old
way" by its own docstring: it wants a leading axis of devices on each array and gives each process
its own part of the result, which Orbax could not save as one array. ``examples/pmap.py`` runs the
same training step under ``jax.pmap``.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conet_jax.errors import InputError

AXIS = "devices"


SPLIT, SAME = P(AXIS), P()  # along the leading axis; on every device


@lru_cache
def mesh(devices: int = 0) -> Mesh:
    """Returns the axis over some devices, as many of each process.

    Args:
      devices: how many, over all processes; 0 is all.

    Raises:
      InputError: there are fewer, or they do not divide by the processes.
    """
    processes, psum = jax.process_count(), jax.device_count()
    if devices > psum or devices % processes:
        raise InputError(
            f"config.devices is {devices}: expected 0 (all), or a number up to the {psum} devices "
            f"here that divides by the number of processes, {processes}"
        )
    each = (devices or psum) // processes
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


def size() -> int:
    """Returns the number of devices that this code runs on together, 1 outside of ``mapped``."""
    try:
        return jax.lax.axis_size(AXIS)
    except NameError:
        return 1


def axis_name() -> str | None:
    """Returns the name of the axis for libraries that ask for one; None on one device."""
    return AXIS if size() > 1 else None


def psum(tree: Any) -> Any:
    """Sums each array over the devices."""
    return jax.lax.psum(tree, AXIS) if size() > 1 else tree


def pmean(tree: Any) -> Any:
    """Averages each array over the devices."""
    return jax.lax.pmean(tree, AXIS) if size() > 1 else tree


def all_gather(tree: Any) -> Any:
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
