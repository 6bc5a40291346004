r"""Adam for embedding tables: the result of dense ``optax.adam`` at the cost of the rows read.

In Adam a row without a gradient still moves, by its decaying momentum, so skipping it ("lazy" Adam)
changes the results. But that movement depends on the row's own state alone, so it can be made up
for when the row is next read. A row with moments m and v after step l, not read until step l + k,
has moved by

    ``- sum_{j=1..k} A_j m / (B_j s + eps)``,  ``s = sqrt(v)``,
    ``A_j = lr(l+j) b1^j / (1 - b1^(l+j))``,  ``B_j = sqrt(b2^j / (1 - b2^(l+j)))``.

The weights A_j die off quickly while B_j hardly changes. So with S the sum of the A_j, mu the mean
of B_j under the weights A_j / S, c_n the central moments of B_j / mu, and r = mu s / (mu s + eps),
the sum is, to 4th order,

    ``m S / (mu s + eps) (1 + c_2 r^2 - c_3 r^3 + c_4 r^4)``.

S, mu and c_n depend on (l, k) alone. For k without end they are tabulated over l on the host, in
float64; those of the first k terms are the table's entry at l less that at l + k, decayed. In the
first few hundred steps, where B_j does change, the sum itself is taken.

A table is packed as one array [p | m | v | last] of shape [rows, 3 dim + 1], where ``last`` is the
step of the row as an integer in the bits of a float: one gather reads all of a row, one scatter
writes it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Truncation error, relative to the movement, up to which the closed form is used: float32's own.
_TOLERANCE = 1e-7


class RowAdam(NamedTuple):
    """Pure functions of a packed table, in the manner of an optax transformation.

    ``step`` is the number of Adam steps done so far, i32[], below 2^31; ``learning_rate`` is f32[]
    and may be traced; with a schedule it multiplies the schedule (give 1.0).

    Attributes:
      init: (table f32[rows, dim]) -> packed f32[rows, 3 dim + 1], at step 0.
      read: (packed, ids i32[n], step, learning_rate) -> rows f32[n, 3 dim], the [p | m | v] of
        these rows as after ``step`` dense steps. An id out of range reads some row.
      write: (packed, ids i32[n], rows f32[n, 3 dim], grads f32[n, dim], step, learning_rate) ->
        packed after step ``step + 1``, with the rows from ``read``. The ids within range must be
        distinct; those out of range, negative ones too, are dropped.
      settle: (packed, step, learning_rate) -> table f32[rows, dim], all rows as of ``step``.
      settle_packed: (packed, step, learning_rate) -> packed, all rows brought to ``step``.
      closed_from: the first step whose rows are brought up to date in closed form. Rows last
        written before it cost a sum over up to `num_terms` steps when they are next read: call
        ``settle_packed`` once at this step, and no read needs it any more. Results do not depend
        on it, but for rounding.
    """

    init: Callable[..., jax.Array]
    read: Callable[..., jax.Array]
    write: Callable[..., jax.Array]
    settle: Callable[..., jax.Array]
    settle_packed: Callable[..., jax.Array]
    closed_from: int


def _infinite_sums(terms: np.ndarray, decay: float) -> np.ndarray:
    """``sum_{j>=0} decay^j terms[l + j]`` for every l; the terms stay as the last one."""
    sums, number = terms, 1
    while decay**number > 1e-20:  # each pass doubles the number of terms in every sum
        later = np.minimum(np.arange(len(terms)) + number, len(terms) - 1)
        sums, number = sums + decay**number * sums[later], 2 * number
    return sums


class _Tables(NamedTuple):
    """What depends on a row's last step l alone, float64[l] for l = 0, …, to a constant end."""

    step_size: np.ndarray  # lr(l+1) / (1 - b1^(l+1)), for the direct sum and a plain step
    root_scale: np.ndarray  # 1 / sqrt(1 - b2^(l+1))
    total: np.ndarray  # S for k without end
    log_mean: np.ndarray  # log mu, likewise
    moments: np.ndarray  # [l, 3]: c_2, c_3, c_4, likewise
    closed: np.ndarray  # bool: the closed form is good enough


def _tables(rates: np.ndarray, b1: float, b2: float) -> _Tables:
    t = np.arange(1, len(rates) + 1)
    step_size, root_scale = rates / (1 - b1**t), 1 / np.sqrt(1 - b2**t)
    # raw[n] = sum_{j>=1} A_j B_j^n: A_1 and B_1 are read off the arrays above, and what follows is
    # b1 b2^(n/2) times the same sum one step on.
    raw = [
        _infinite_sums(b1 * step_size * (np.sqrt(b2) * root_scale) ** n, b1 * b2 ** (n / 2))
        for n in range(6)
    ]
    total = raw[0]
    weight = np.where(total > 0, total, 1)
    mean = np.where(total > 0, raw[1] / weight, np.sqrt(b2) * root_scale)
    scaled = [np.where(total > 0, raw[n] / weight / mean**n, 1) for n in range(6)]
    central = [
        sum((-1) ** (n - i) * math.comb(n, i) * scaled[i] for i in range(n + 1)) for n in range(6)
    ]
    # The 5th moment is the first term left out; with fewer than all terms it is smaller.
    closed = np.abs(central[5]) < _TOLERANCE
    return _Tables(
        step_size, root_scale, total, np.log(mean), np.stack(central[2:5], axis=-1), closed
    )


def _unpack_last(packed: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(packed[..., -1], _integer(packed.dtype))


def _pack(rows: jax.Array, last: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(last.astype(_integer(rows.dtype)), rows.dtype)
    bits = jnp.broadcast_to(bits, rows.shape[:-1])
    return jnp.concatenate([rows, bits[..., None]], axis=-1)


def _integer(dtype: Any) -> Any:
    """The integer type with as many bits: a float32 counter would stop at 2^24."""
    return {4: jnp.int32, 8: jnp.int64}[jnp.dtype(dtype).itemsize]


def row_adam(
    schedule: Callable[[ArrayLike], ArrayLike] | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    num_steps: int | None = None,
) -> RowAdam:
    r"""Adam (Kingma and Ba, 2015) for tables of which each step reads a few rows.

    The results are those of ``optax.adam(learning_rate, b1, b2, eps)`` over the whole table, to
    rounding, with the gradient of an unread row 0.

    Args:
      schedule: learning rate of step t = 1, 2, … as ``schedule(t - 1)``, as in optax; evaluated
        here, on the host. None is a constant rate, given (traced if need be) to each function.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in (0, 1). The closed form is fast where b1 forgets within a
        few tens of steps and b2 within a thousand or so; elsewhere the sum is taken.
      eps: added to the root of the second moment.
      num_steps: with a schedule: for how many steps it is tabulated (some 40 bytes each). After
        them the learning rate stays as it was.

    Returns:
      A `RowAdam`.

    Raises:
      ValueError: b1, b2, eps or num_steps is out of range, or a schedule lacks num_steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adam = row_adam()
      >>> packed = adam.init(jnp.ones((5, 2)))
      >>> @jax.jit
      ... def train_step(packed, ids, step):
      ...     unique, inverse = merge_ids(ids, packed.shape[0])
      ...     rows = adam.read(packed, unique, step, 0.1)
      ...     def loss(p):  # of the examples, one an id
      ...         return jnp.sum(p[inverse] ** 2)
      ...     grads = jax.grad(loss)(rows[:, :2])
      ...     return adam.write(packed, unique, rows, grads, step, 0.1)
      >>> for step in range(3):
      ...     packed = train_step(packed, jnp.array([1, 3, 1]), step)
      >>> print([round(p, 4) for p in adam.settle(packed, 3, 0.1)[:, 0].tolist()])
      [1.0, 0.7016, 1.0, 0.7016, 1.0]
    """
    if not 0 <= b1 < 1 or not 0 < b2 < 1 or not eps > 0:
        raise ValueError(f"need 0 <= b1 < 1, 0 < b2 < 1, eps > 0; got {b1}, {b2}, {eps}")
    if schedule is None:
        rates = np.ones(1)
    elif num_steps is None or num_steps < 1:
        raise ValueError(f"a schedule needs num_steps of at least 1, got {num_steps}")
    else:
        with jax.ensure_compile_time_eval():
            rates = np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)), np.float64)
    # To where the bias corrections are 1 and the schedule is over, so that the end is constant.
    end = max(len(rates), int(np.ceil(np.log(1e-17) / np.log(max(b1, b2)))))
    tables = _tables(np.pad(rates, (0, end - len(rates)), mode="edge"), b1, b2)
    log_b1, log_b2 = float(np.log(max(b1, 1e-300))), float(np.log(b2))

    def catch_up(rows: jax.Array, last: jax.Array, step: ArrayLike, learning_rate: ArrayLike):
        """Rows [..., 3 dim] of step ``last`` as of ``step``."""
        dtype, dim = rows.dtype, rows.shape[-1] // 3
        p, m, v = rows[..., :dim], rows[..., dim : 2 * dim], rows[..., 2 * dim :]
        step = jnp.asarray(step, last.dtype)
        k = step - last
        steps = k.astype(dtype)
        s = jnp.sqrt(v)

        def at(table: np.ndarray, index: jax.Array) -> jax.Array:
            return jnp.asarray(table.astype(dtype))[jnp.minimum(index, end - 1)]

        def gain(table: np.ndarray) -> jax.Array:
            """Difference of a table's entries, of two floats each, so that it cancels no digits."""
            low = table - table.astype(dtype)
            return (at(table, step) - at(table, last)) + (at(low, step) - at(low, last))

        # The first k terms are all terms from l on less those from l + k on, which weigh b1^k as
        # much and have their B scaled by b2^(k/2), that is, shifted by a relative `shift`.
        decay = jnp.exp(log_b1 * steps)
        weight = -jnp.expm1(log_b1 * steps) * at(tables.total, last) - decay * gain(tables.total)
        tail = decay * at(tables.total, step)
        tail = tail / jnp.where(weight > 0, weight, 1)
        shift = jnp.expm1(0.5 * log_b2 * steps + gain(tables.log_mean))
        c2, c3, c4 = jnp.moveaxis(at(tables.moments, last), -1, 0)
        d2, d3, d4 = jnp.moveaxis(at(tables.moments, step), -1, 0)
        d2, d3, d4 = d2 * (1 + shift) ** 2, d3 * (1 + shift) ** 3, d4 * (1 + shift) ** 4
        # Moments of the first k terms about the mean of all, then about their own.
        e1 = -tail * shift
        e2 = c2 + tail * (c2 - (d2 + shift**2))
        e3 = c3 + tail * (c3 - (d3 + 3 * shift * d2 + shift**3))
        e4 = c4 + tail * (c4 - (d4 + 4 * shift * d3 + 6 * shift**2 * d2 + shift**4))
        c2 = e2 - e1**2
        c3 = e3 - 3 * e1 * e2 + 2 * e1**3
        c4 = e4 - 4 * e1 * e3 + 6 * e1**2 * e2 - 3 * e1**4
        mean = (1 + e1) * jnp.exp(at(tables.log_mean, last))
        c2, c3, c4 = c2 / (1 + e1) ** 2, c3 / (1 + e1) ** 3, c4 / (1 + e1) ** 4
        scaled = mean[..., None] * s
        r = scaled / (scaled + eps)
        series = 1 + r**2 * (c2[..., None] - r * (c3[..., None] - r * c4[..., None]))
        closed_form = weight[..., None] / (scaled + eps) * series

        # Early rows: the sum itself, of as many terms as any row here needs; mostly none.
        num_terms = int(np.ceil(np.log(jnp.finfo(dtype).eps / 8) / log_b1))
        terms = jnp.where(at(tables.closed, last) > 0, 0, jnp.minimum(k, num_terms))
        terms = jnp.where(jnp.any(m != 0, axis=-1), terms, 0)

        def add_term(j: jax.Array, total: jax.Array) -> jax.Array:
            powers = j.astype(dtype)
            a = jnp.exp(log_b1 * powers) * at(tables.step_size, last + j - 1)
            b = jnp.exp(0.5 * log_b2 * powers) * at(tables.root_scale, last + j - 1)
            a = jnp.where(j <= terms, a, 0)
            return total + a[..., None] / (b[..., None] * s + eps)

        direct = jax.lax.fori_loop(
            jnp.ones((), k.dtype), jnp.max(terms, initial=0) + 1, add_term, jnp.zeros_like(p)
        )
        moved = m * jnp.where(terms[..., None] > 0, direct, closed_form)
        late = jnp.concatenate(
            [
                p - jnp.asarray(learning_rate, dtype) * moved,
                decay[..., None] * m,
                jnp.exp(log_b2 * steps)[..., None] * v,
            ],
            axis=-1,
        )
        return jnp.where(k[..., None] > 0, late, rows)

    def init(table: ArrayLike) -> jax.Array:
        table = jnp.asarray(table)
        if table.ndim != 2 or table.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"a table is float32 or float64 [rows, dim], got {table.dtype} {table.shape}"
            )
        return jnp.pad(table, ((0, 0), (0, 2 * table.shape[1] + 1)))

    def read(
        packed: jax.Array, ids: ArrayLike, step: ArrayLike, learning_rate: ArrayLike = 1.0
    ) -> jax.Array:
        ids = jnp.clip(jnp.asarray(ids), 0, packed.shape[0] - 1)
        read_rows = packed.at[ids].get(mode="promise_in_bounds")
        return catch_up(read_rows[:, :-1], _unpack_last(read_rows), step, learning_rate)

    def write(
        packed: jax.Array,
        ids: ArrayLike,
        rows: jax.Array,
        grads: jax.Array,
        step: ArrayLike,
        learning_rate: ArrayLike = 1.0,
    ) -> jax.Array:
        dtype, dim, ids = packed.dtype, grads.shape[-1], jnp.asarray(ids)
        p, m, v = rows[:, :dim], rows[:, dim : 2 * dim], rows[:, 2 * dim :]
        now = jnp.minimum(jnp.asarray(step), end - 1)
        step_size = jnp.asarray(tables.step_size.astype(dtype))[now]
        root_scale = jnp.asarray(tables.root_scale.astype(dtype))[now]
        m = b1 * m + (1 - b1) * grads
        v = b2 * v + (1 - b2) * jnp.square(grads)
        step_size = step_size * jnp.asarray(learning_rate, dtype)
        p = p - step_size * m / (root_scale * jnp.sqrt(v) + eps)
        new_rows = _pack(jnp.concatenate([p, m, v], axis=-1), jnp.asarray(step) + 1)
        # Those out of range are made distinct, so that all are, as the scatter is told.
        num_rows = packed.shape[0]
        spare = num_rows + jnp.arange(ids.shape[0], dtype=ids.dtype)
        ids = jnp.where((ids >= 0) & (ids < num_rows), ids, spare)
        return packed.at[ids].set(new_rows, mode="drop", unique_indices=True)

    def settle_packed(
        packed: jax.Array, step: ArrayLike, learning_rate: ArrayLike = 1.0
    ) -> jax.Array:
        rows = catch_up(packed[:, :-1], _unpack_last(packed), step, learning_rate)
        return _pack(rows, jnp.asarray(step))

    def settle(packed: jax.Array, step: ArrayLike, learning_rate: ArrayLike = 1.0) -> jax.Array:
        rows = catch_up(packed[:, :-1], _unpack_last(packed), step, learning_rate)
        return rows[:, : rows.shape[-1] // 3]

    closed_from = int(np.argmax(tables.closed)) if tables.closed.any() else np.iinfo(np.int32).max
    return RowAdam(init, read, write, settle, settle_packed, closed_from)


def merge_ids(ids: ArrayLike, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Merges a batch's duplicate ids, with static shapes.

    Args:
      ids: i32[n], rows of a table.
      num_rows: rows of the table.

    Returns:
      unique_ids: i32[n], each distinct id once, in the place where it first occurs, and num_rows
        (out of range: `RowAdam.write` drops it) in the others.
      inverse: i32[n], ``unique_ids[inverse[i]] == ids[i]``: the rows of the batch are
        ``read(packed, unique_ids, …)[inverse]``, and the gradient with respect to what was read
        adds up over duplicates.

    Example:
      >>> import jax.numpy as jnp
      >>> unique_ids, inverse = merge_ids(jnp.array([7, 2, 7]), 10)
      >>> print(unique_ids, inverse)
      [ 7  2 10] [0 1 0]
    """
    ids = jnp.asarray(ids)
    place = jnp.arange(ids.shape[0], dtype=ids.dtype)
    same = ids[:, None] == ids[None, :]
    inverse = jnp.argmax(same, axis=1).astype(ids.dtype)
    return jnp.where(inverse == place, ids, num_rows), inverse
