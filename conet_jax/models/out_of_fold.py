"""Out-of-fold factors: what a linear model says of a pair that it has not seen.

Factors that were fitted on a pair know its answer: on training pairs implicit ALS scores four times
what it scores on held-out ones (books), and a network that learns on top of such scores learns to
trust them. So the training pairs are parted into folds, the factorisation is fitted again without
each fold (a few sweeps from the whole fit), and a training example reads the factors that were
fitted without its pair; inference reads those of all pairs. The tables are not trained further:
what the towers learn is how far to trust them.

A *view* of a user is the vector that the user's items in some domains alone give, with the items'
factors of both domains joined.

Tables: row ``id * (folds + 1) + fold`` is that of a user or item without the fold, ``fold ==
folds`` of all pairs; on several devices those of an id are on one (``row_ids``). A user's row is
its views side by side, each ``dim`` factors and a count; an item's row its factors and a count.
Counts are log(1 + training pairs), less their mean.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from conet_jax import devices
from conet_jax.devices import SPLIT
from conet_jax.models import ials
from conet_jax.models.base import Sizes

FEATURES = 5  # of ``features``


def is_warm(items: jax.Array) -> jax.Array:
    """Whether items have a pair in the factorisation, bool[...], from their rows f32[..., dim + 1].

    Factors of an item without pairs are zero. The pair of an observed example is in its own fold:
    there an item without pairs in the other folds tells that the example is observed.
    """
    return jnp.any(items[..., :-1] != 0, axis=-1)


def row_ids(ids: jax.Array, folds_of: jax.Array | None, folds: int) -> jax.Array:
    """Rows int32[n] of users or items, each without the fold of its example.

    Args:
      ids: int32[n].
      folds_of: int32[n], the folds of the examples; None reads the rows of all pairs.
      folds: number of folds.
    """
    # Row r of the axis is row r // n of device r % n: here that of the id.
    n = devices.size()
    rows = ids // n * (folds + 1) + (folds if folds_of is None else folds_of)
    return rows * n + ids % n


def of_all_pairs(table: jax.Array, folds: int) -> jax.Array:
    """Rows of a table for inference, f32[rows (folds + 1), k] -> f32[rows, k]."""
    return table[folds :: folds + 1]


def views(users: jax.Array, dim: int) -> list[jax.Array]:
    """Splits rows of users f32[..., v (dim + 1)] into views f32[..., dim + 1]."""
    return jnp.split(users, users.shape[-1] // (dim + 1), axis=-1)


def features(view: jax.Array, item: jax.Array, scale: float) -> jax.Array:
    """What the linear model says of a pair, and of how much it rests on.

    Args:
      view: f32[..., dim + 1], a view of the user.
      item: f32[..., dim + 1].
      scale: factor on the inner product.

    Returns:
      f32[..., 5]: scale x^T y, |x|, |y|, and the two counts.
    """
    x, y = view[..., :-1], item[..., :-1]
    dot = scale * jnp.sum(x * y, axis=-1)
    each = [dot, _norm(x), _norm(y), view[..., -1], item[..., -1]]
    return jnp.stack(each, axis=-1)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))


def user_part(view: jax.Array) -> jax.Array:
    """What of ``tower_input`` comes from the user alone, f32[..., dim + 1] -> f32[..., 2 dim + 5].

    With ``item_part`` it adds up to ``tower_input`` but for the inner product, so that at
    inference each user and item goes through the first transition once.
    """
    x = view[..., :-1]
    none = jnp.zeros_like(x[..., 0])
    return jnp.concatenate(
        [x, jnp.zeros_like(x), jnp.stack([none, _norm(x), none, view[..., -1], none], axis=-1)],
        axis=-1,
    )


def item_part(item: jax.Array) -> jax.Array:
    """What of ``tower_input`` comes from the item alone, see ``user_part``."""
    y = item[..., :-1]
    none = jnp.zeros_like(y[..., 0])
    return jnp.concatenate(
        [jnp.zeros_like(y), y, jnp.stack([none, none, _norm(y), none, item[..., -1]], axis=-1)],
        axis=-1,
    )


def fit(
    interactions: Any,
    sizes: Sizes,
    options: ials.Options,
    *,
    folds: int,
    views: Sequence[tuple[str, ...]],
    sweeps: int = 15,
    fold_sweeps: int = 4,
    seed: int = 0,
    known: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """Factorises all training pairs and, from there, those without each fold.

    Pair number r of a domain, in the order of users and items, is in fold ``r % folds``, so that
    each user's pairs are spread over the folds.

    Args:
      interactions: training pairs (``interactions.Interactions`` or ``ials.Pairs``) by domain.
      sizes: rows of the tables.
      options: of the factorisation.
      folds: number of folds; 0 fits all pairs alone, and training then reads what has seen them.
      views: of a user, each from its pairs in some domains.
      sweeps: passes over users and items of all pairs.
      fold_sweeps: passes for each fold.
      seed: of the start.
      known: of each table the rows whose factors start at what an earlier run has for them.
      mesh: the devices, over which rows are split; None is one.

    Returns:
      ``user``, ``target_item`` and, if joined, ``source_item``, see the module's docstring, on the
      devices. Rows of padding are those of an id without pairs.
    """
    pairs = ials.matrix(interactions, sizes, joined=options.joined, mesh=mesh)
    drawn = ials.drawn(jax.random.key(seed), sizes, options, pairs.mesh, known)
    whole = ials.sweep(pairs, drawn, options, sweeps=sweeps)
    del drawn  # tables are large
    blocks = []
    for fold in [*range(folds), None]:
        without = None if fold is None else ials.Fold(fold, folds)
        again = 0 if fold is None else fold_sweeps
        factors = ials.sweep(pairs, whole, options, without, sweeps=again)
        counts = ials.counts_of_items(pairs, factors, without)
        block = {name: [(factors[name], count)] for name, count in counts.items()}
        block["user"] = [
            (
                ials.users_of(pairs, factors, options, view, without),
                ials.counts_of_users(pairs, factors, view, without),
            )
            for view in views
        ]
        blocks.append(block)
    rows = {"user": sizes.users, "target_item": sizes.target_items}
    rows["source_item"] = sizes.source_items
    return {
        name: _stacked([block.pop(name) for block in blocks], rows=rows[name], mesh=pairs.mesh)
        for name in whole
    }


@partial(jax.jit, static_argnames=("rows", "mesh"))
def _stacked(
    blocks: list[list[tuple[jax.Array, jax.Array]]], *, rows: int, mesh: jax.sharding.Mesh
) -> jax.Array:
    """Interleaves the folds' rows [factors, count, …]; the mean count is that of all pairs."""

    def stack(blocks: list[list[tuple[jax.Array, jax.Array]]]) -> jax.Array:
        means = [devices.psum(jnp.log1p(count).sum()) / rows for _, count in blocks[-1]]
        each = [
            jnp.concatenate(
                [
                    part
                    for (vectors, count), mean in zip(block, means, strict=True)
                    for part in (vectors, (jnp.log1p(count) - mean)[:, None])
                ],
                axis=1,
            )
            for block in blocks
        ]
        # In float32, whatever it was fitted in: a rounding does not part items that are alike.
        return jnp.stack(each, axis=1).reshape(-1, each[0].shape[1]).astype(jnp.float32)

    return devices.mapped(stack, mesh, (SPLIT,), SPLIT)(blocks)
