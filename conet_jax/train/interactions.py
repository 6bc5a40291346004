"""Training positives on the device: who has what, and what is not theirs."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices


@flax.struct.dataclass
class Interactions:
    """One domain's training positives on the device, sorted by user, then item.

    On several devices each holds those of its users, numbered as it numbers them, one device's
    arrays after the other's and padded to equal lengths.

    Attributes:
      users: int32[nnz]; of padding, out of range.
      items: int32[nnz].
      indptr: int32[users + 1], a user's interactions are ``indptr[u]:indptr[u + 1]``.
      skipped: int32[nnz], p_k - k for the k-th positive p_k of its user: the number of
        non-positives below it.
      starts: int32[users + 1], on several devices the ``indptr`` of all users, on each; else None.
      num_items: items of the domain.
      max_degree: interactions of the most active user.
      count: interactions of all users.
      weights: f32[nnz], above 0, of mean 1 over the data's; None is 1 for each.
      taken: these and what else is no negative, see ``to_device``; None is these alone.
    """

    users: jax.Array
    items: jax.Array
    indptr: jax.Array
    skipped: jax.Array
    starts: jax.Array | None
    num_items: int = flax.struct.field(pytree_node=False)
    max_degree: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False)
    weights: jax.Array | None = None
    taken: "Interactions | None" = None

    @property
    def num_users(self) -> int:
        """Users of the data, of all devices."""
        return (self.indptr if self.starts is None else self.starts).shape[0] - 1

    def specs(self) -> "Interactions":
        """Returns what ``devices.mapped`` must know of each array."""
        starts = None if self.starts is None else devices.SAME
        weights = None if self.weights is None else devices.SPLIT
        return self.replace(
            **dict.fromkeys(("users", "items", "indptr", "skipped"), devices.SPLIT),
            starts=starts,
            weights=weights,
            taken=None if self.taken is None else self.taken.specs(),
        )


def to_device(
    indptr: np.ndarray,
    indices: np.ndarray,
    num_items: int,
    mesh: jax.sharding.Mesh | None = None,
    *,
    weights: np.ndarray | None = None,
    avoided: tuple[np.ndarray, np.ndarray] | None = None,
) -> Interactions:
    """Puts CSR interactions on the device, or on several by user.

    Args:
      indptr: int32[users + 1].
      indices: int32[nnz], strictly increasing within a user.
      num_items: items of the domain.
      mesh: the devices, see ``devices``; None is one.
      weights: f32[nnz], above 0; they are divided by their mean.
      avoided: CSR (indptr, indices) of pairs that are no negatives either; those of a user who
        would have no negative left do not count.

    Returns:
      ``Interactions``.

    Raises:
      ValueError: items out of range or not increasing, or a user with every item, for whom no
        negative exists.
    """
    indptr, indices = np.asarray(indptr, np.int64), np.asarray(indices, np.int64)
    degrees = np.diff(indptr)
    users = np.repeat(np.arange(len(degrees)), degrees)
    if len(indices) and (indices.min() < 0 or indices.max() >= num_items):
        raise ValueError(f"items must lie in [0, {num_items})")
    if (np.diff(users * num_items + indices) <= 0).any():
        raise ValueError("items must be strictly increasing within a user")
    if degrees.max(initial=0) >= num_items:
        user = int(degrees.argmax())
        raise ValueError(f"user {user} has all {num_items} items: there is no negative to draw")
    skipped = indices - (np.arange(len(indices)) - indptr[users])
    arrays, starts = (users, indices, indptr, skipped), None
    if weights is not None and len(weights):
        weights = relative(weights)
    if mesh is not None and mesh.size > 1:
        if weights is not None:
            weights = devices.put(_parted(weights, users, mesh.size), mesh, devices.SPLIT)
        arrays = devices.put(_by_device(*arrays, mesh.size), mesh, devices.SPLIT)
        starts = devices.put(indptr.astype(np.int32), mesh, devices.SAME)
    return Interactions(
        *(jnp.asarray(x, jnp.int32) for x in arrays),
        starts=starts,
        num_items=int(num_items),
        max_degree=int(degrees.max(initial=0)),
        count=len(indices),
        weights=None if weights is None else jnp.asarray(weights),
        taken=None if avoided is None else _taken(indptr, indices, *avoided, num_items, mesh),
    )


_LEAST_WEIGHT = 1e-30


def relative(weights: np.ndarray) -> np.ndarray:
    """Returns weights over their mean, f32[n]."""
    weights = np.asarray(weights, np.float64)
    # The ratio of the least to the largest may be below float32.
    return np.maximum(weights / weights.mean(), _LEAST_WEIGHT).astype(np.float32)


def _taken(
    indptr: np.ndarray,
    indices: np.ndarray,
    avoided_indptr: np.ndarray,
    avoided: np.ndarray,
    num_items: int,
    mesh: jax.sharding.Mesh | None,
) -> Interactions:
    """Positives and what is avoided, where a negative is left."""
    degrees, more = np.diff(indptr), np.diff(avoided_indptr)
    users = [np.repeat(np.arange(len(count)), count) for count in (degrees, more)]
    left = (degrees + more < num_items)[users[1]]
    keys = np.concatenate(
        [users[0] * num_items + indices, (users[1] * num_items + avoided.astype(np.int64))[left]]
    )
    keys = np.unique(keys)
    starts = np.searchsorted(keys, np.arange(len(indptr)) * num_items)
    return to_device(starts, keys % num_items, num_items, mesh)


def _parted(values: np.ndarray, users: np.ndarray, n: int, padding: int = 0) -> np.ndarray:
    """The values of each of n devices, padded to equal lengths, one device's after the other's."""
    longest = int(np.bincount(users % n, minlength=n).max(initial=0))
    parts = (values[users % n == device] for device in range(n))
    each = [np.pad(own, (0, longest - len(own)), constant_values=padding) for own in parts]
    return np.concatenate(each)


def _by_device(
    users: np.ndarray, items: np.ndarray, indptr: np.ndarray, skipped: np.ndarray, n: int
) -> tuple[np.ndarray, ...]:
    """The arrays of each of n devices, of which device u % n holds user u as its user u // n."""
    rows = -(-(len(indptr) - 1) // n)
    pointers = []
    for device in range(n):
        degrees = np.diff(indptr)[device::n]
        degrees = np.pad(degrees, (0, rows - len(degrees)))
        pointers.append(np.concatenate([[0], np.cumsum(degrees)]))
    arrays = (
        _parted(users // n, users, n, padding=rows),
        _parted(items, users, n),
        np.concatenate(pointers),
        _parted(skipped, users, n),
    )
    return tuple(x.astype(np.int32) for x in arrays)


def lists_of(interactions: Interactions, users: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the positives of each user begin in the list of all, and how many they are."""
    starts = interactions.indptr if interactions.starts is None else interactions.starts
    start = starts[users]
    return start, starts[users + 1] - start


def positives_at(interactions: Interactions, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Users and items at some rows of the list of all."""
    if interactions.starts is None:
        return interactions.users[rows], interactions.items[rows]
    users = jnp.searchsorted(interactions.starts, rows, side="right").astype(jnp.int32) - 1
    return users, positive_at(interactions, users, rows - interactions.starts[users])


def weights_at(interactions: Interactions, rows: jax.Array) -> jax.Array:
    """Weights f32[n] at some rows of the list of all; for data that have weights."""
    if interactions.starts is None:
        return interactions.weights[rows]
    users = jnp.searchsorted(interactions.starts, rows, side="right").astype(jnp.int32) - 1
    return weight_at(interactions, users, rows - interactions.starts[users])


def weight_at(interactions: Interactions, users: jax.Array, place: jax.Array) -> jax.Array:
    """The weight of each user's positive at a place [n] of its list."""

    def answer(users: jax.Array, place: jax.Array) -> jax.Array:
        return interactions.weights[interactions.indptr[users] + place]

    return devices.ask(answer, users, place)


def positive_at(interactions: Interactions, users: jax.Array, place: jax.Array) -> jax.Array:
    """The positive of each user at a place [n, ...] of its list."""

    def answer(users: jax.Array, place: jax.Array) -> jax.Array:
        start = interactions.indptr[users].reshape(-1, *[1] * (place.ndim - 1))
        return interactions.items[start + place]

    return devices.ask(answer, users, place)


def past_positives(interactions: Interactions, users: jax.Array, rank: jax.Array) -> jax.Array:
    """The ``rank``-th item, from 0, that is not a positive of the user."""

    def answer(users: jax.Array, rank: jax.Array) -> jax.Array:
        start, high = interactions.indptr[users], interactions.indptr[users + 1]
        low = start
        for _ in range(int(interactions.max_degree).bit_length()):
            middle = (low + high) // 2
            below = (low < high) & (interactions.skipped[middle] <= rank)
            low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
            high = jnp.maximum(low, high)
        return rank + (low - start)

    return devices.ask(answer, users, rank)
