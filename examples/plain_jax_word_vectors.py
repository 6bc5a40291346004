"""Our optimiser for tables in a model that is not CoNet: skip-gram word vectors in plain JAX.

python examples/plain_jax_word_vectors.py

A table of 100,000 words, of which a step reads 64: ``row_adam`` gives what dense Adam gives, to
rounding, and touches those rows alone.
"""

import jax
import jax.numpy as jnp
import optax

from conet_jax.losses import binary_cross_entropy
from conet_jax.row_adam import merge_ids, row_adam

WORDS, DIM, BATCH, STEPS, RATE = 100_000, 8, 32, 60, 0.1
adam = row_adam()


def batch(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids int32[2, n] of words and contexts, and labels f32[n]: they meet if of one parity."""
    ids = jax.random.randint(jax.random.fold_in(jax.random.key(0), i), (2, BATCH), 0, WORDS)
    ids = ids // jnp.where(jnp.arange(BATCH) % 2, 1, 1000)  # half are frequent words
    return ids, (ids[0] % 2 == ids[1] % 2).astype(float)


def loss(rows: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of p_w^T p_c, rows f32[2, n, dim]."""
    return binary_cross_entropy(jnp.sum(rows[0] * rows[1], axis=-1), labels)


def sparse_step(table: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reads the batch's rows up to date, differentiates with respect to them, writes them."""
    ids, labels = batch(i)
    unique, inverse = merge_ids(ids.reshape(-1), WORDS)
    rows = adam.read(table, unique, i, RATE)
    value, grads = jax.value_and_grad(lambda r: loss(r[inverse].reshape(2, BATCH, DIM), labels))(
        rows[:, :DIM]
    )
    return adam.write(table, unique, rows, grads, i, RATE), value


def dense_step(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
    """The same by optax.adam over the whole table."""
    table, state = carry
    ids, labels = batch(i)
    value, grads = jax.value_and_grad(lambda t: loss(t[ids], labels))(table)
    updates, state = optax.adam(RATE).update(grads, state)
    return (optax.apply_updates(table, updates), state), value


start = 0.1 * jax.random.normal(jax.random.key(1), (WORDS, DIM))
steps = jnp.arange(STEPS, dtype=jnp.int32)
packed, losses = jax.jit(lambda t: jax.lax.scan(sparse_step, t, steps))(adam.init(start))
ours = adam.settle(packed, STEPS, RATE)
(theirs, _), _ = jax.jit(lambda t: jax.lax.scan(dense_step, (t, optax.adam(RATE).init(t)), steps))(
    start
)
print(f"loss {losses[:10].mean():.2f} at the start, {losses[-10:].mean():.2f} at the end")
moved, apart = jnp.abs(theirs - start).max(), jnp.abs(ours - theirs).max()
print(f"rows moved by up to {moved:.2f}; largest difference from dense Adam {apart:.1e}")
