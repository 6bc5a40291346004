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
writes it. Carry packed tables through a ``lax.scan`` and donate them: then nothing is copied, and a
step costs the same however long the tables are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


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
      closed_from: the first step whose rows are brought up to date in closed form (242 for the
        default constants). Rows last written before it cost a sum over up to some 170 steps when
        they are next read: call ``settle_packed`` once at this step, and no read needs it any
        more. Results do not depend on that, but for rounding. 2^31 - 1 if there is no such step.
      values: rows f32[n, 3 dim] from ``read`` -> their [p], f32[n, dim].
    """

    init: Callable[..., jax.Array]
    read: Callable[..., jax.Array]
    write: Callable[..., jax.Array]
    settle: Callable[..., jax.Array]
    settle_packed: Callable[..., jax.Array]
    closed_from: int
    values: Callable[[jax.Array], jax.Array]


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
    moments: np.ndarray  # [3, l]: c_2, c_3, c_4, likewise
    closed: np.ndarray  # bool: the closed form is good enough

    def columns(self, dtype: Any) -> np.ndarray:
        """All that one row needs, [l, 8]; total and log_mean each as the sum of two floats."""
        high = [self.total.astype(dtype), self.log_mean.astype(dtype)]
        low = [self.total - high[0], self.log_mean - high[1]]
        return np.stack(
            [*high, *low, *self.moments, self.closed], axis=-1, dtype=dtype, casting="unsafe"
        )


def _tables(rates: np.ndarray, b1: float, b2: float, tolerance: float) -> _Tables:
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
    # The 5th moment is the first term left out.
    closed = np.abs(central[5]) < tolerance
    return _Tables(step_size, root_scale, total, np.log(mean), np.stack(central[2:5]), closed)


def _unpack_last(packed: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(packed[:, -1], _integer(packed.dtype))


def _pack(parts: Sequence[jax.Array], last: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(last.astype(_integer(parts[0].dtype)), parts[0].dtype)
    return jnp.concatenate([*parts, jnp.broadcast_to(bits, (parts[0].shape[0], 1))], axis=-1)


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
    tolerance: float = 1e-7,
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
      tolerance: truncation error of the closed form, relative to the movement of an unread row, up
        to which it is used. The default is float32's own rounding. In float64 it leaves errors of
        some 1e-6 learning rates; 0 takes the sum always, exact to rounding, and slow.

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
    tables = _tables(np.pad(rates, (0, end - len(rates)), mode="edge"), b1, b2, tolerance)
    log_b1, log_b2 = float(np.log(max(b1, 1e-300))), float(np.log(b2))

    def coefficients(last: jax.Array, step: jax.Array, dtype: Any) -> list[jax.Array]:
        """S, mu, c_2, c_3, c_4 of the steps from ``last`` to ``step``, and where they are exact."""
        columns = jnp.asarray(tables.columns(dtype))
        then, now = columns[jnp.minimum(last, end - 1)], columns[jnp.minimum(step, end - 1)]
        total, log_mean, total_low, log_mean_low, c2, c3, c4, closed = jnp.moveaxis(then, -1, 0)
        total_now, log_mean_now, total_now_low, log_mean_now_low, d2, d3, d4, _ = now
        # Differences of two floats each, so that close entries cancel no digits.
        total_gain = (total_now - total) + (total_now_low - total_low)
        log_mean_gain = (log_mean_now - log_mean) + (log_mean_now_low - log_mean_low)
        # The first k terms are all terms from l on less those from l + k on, which weigh b1^k as
        # much and have their B scaled by b2^(k/2): `ratio` is that to the first k terms' weight,
        # `shift` the relative distance of the means.
        k = (step - last).astype(dtype)
        decay = jnp.exp(log_b1 * k)
        weight = -jnp.expm1(log_b1 * k) * total - decay * total_gain
        ratio = decay * total_now / jnp.where(weight > 0, weight, 1)
        shift = jnp.expm1(0.5 * log_b2 * k + log_mean_gain)
        scale = 1 + shift
        d2, d3, d4 = d2 * scale**2, d3 * scale**3, d4 * scale**4
        # Moments of the first k terms about the mean of all terms, then about their own.
        e1 = -ratio * shift
        e2 = c2 + ratio * (c2 - (d2 + shift**2))
        e3 = c3 + ratio * (c3 - (d3 + 3 * shift * d2 + shift**3))
        e4 = c4 + ratio * (c4 - (d4 + 4 * shift * d3 + 6 * shift**2 * d2 + shift**4))
        c2 = (e2 - e1**2) / (1 + e1) ** 2
        c3 = (e3 - 3 * e1 * e2 + 2 * e1**3) / (1 + e1) ** 3
        c4 = (e4 - 4 * e1 * e3 + 6 * e1**2 * e2 - 3 * e1**4) / (1 + e1) ** 4
        return [weight, (1 + e1) * jnp.exp(log_mean), c2, c3, c4, closed > 0]

    def add_terms(
        total: jax.Array, s: jax.Array, last: jax.Array, num_terms: jax.Array
    ) -> jax.Array:
        """Adds the first terms of the sum itself, in as many rounds as any row needs."""
        step_size = jnp.asarray(tables.step_size.astype(s.dtype))
        root_scale = jnp.asarray(tables.root_scale.astype(s.dtype))

        def add_term(j: jax.Array, total: jax.Array) -> jax.Array:
            power, index = j.astype(s.dtype), jnp.minimum(last + j - 1, end - 1)
            a = jnp.exp(log_b1 * power) * step_size[index]
            b = jnp.exp(0.5 * log_b2 * power) * root_scale[index]
            return total + jnp.where(j <= num_terms, a, 0)[:, None] / (b[:, None] * s + eps)

        rounds = jnp.max(num_terms, initial=0)
        return jax.lax.fori_loop(jnp.ones_like(rounds), rounds + 1, add_term, total)

    def catch_up(
        rows: jax.Array, last: jax.Array, step: ArrayLike, learning_rate: ArrayLike
    ) -> list[jax.Array]:
        """p, m and v, f[n, dim] each, as of ``step``, of rows f[n, 3 dim] as of step ``last``."""
        dtype, dim = rows.dtype, rows.shape[-1] // 3
        p, m, v = rows[:, :dim], rows[:, dim : 2 * dim], rows[:, 2 * dim :]
        step = jnp.asarray(step, last.dtype)
        k = step - last
        *series, closed = coefficients(last, step, dtype)
        weight, mean, c2, c3, c4 = (x[:, None] for x in series)
        s = jnp.sqrt(v)
        inverse = 1 / (mean * s + eps)
        r = mean * s * inverse
        total = weight * inverse * (1 + r**2 * (c2 - r * (c3 - r * c4)))
        # Terms beyond `most` are below rounding. A row of step 0 was never written: m = 0.
        most = int(np.ceil(np.log(jnp.finfo(dtype).eps / 8) / log_b1))
        num_terms = jnp.where(closed | (last == 0), 0, jnp.minimum(k, most))
        total = add_terms(jnp.where((num_terms > 0)[:, None], 0, total), s, last, num_terms)
        k_float = k.astype(dtype)[:, None]
        late = [
            p - jnp.asarray(learning_rate, dtype) * m * total,
            jnp.exp(log_b1 * k_float) * m,
            jnp.exp(log_b2 * k_float) * v,
        ]
        # Row by row and part by part, so that XLA drops the parts nobody reads.
        return [jnp.where(k[:, None] > 0, x, y) for x, y in zip(late, (p, m, v), strict=True)]

    def init(table: ArrayLike) -> jax.Array:
        table = jnp.asarray(table)
        if table.ndim != 2 or table.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"a table is float32 or float64 [rows, dim], got {table.dtype} {table.shape}"
            )
        return jnp.pad(table, ((0, 0), (0, 2 * table.shape[1] + 1)))

    def read(
        packed: jax.Array, ids: ArrayLike, step: ArrayLike, learning_rate: ArrayLike
    ) -> jax.Array:
        ids = jnp.clip(jnp.asarray(ids), 0, packed.shape[0] - 1)
        rows = packed.at[ids].get(mode="promise_in_bounds")
        parts = catch_up(rows[:, :-1], _unpack_last(rows), step, learning_rate)
        return jnp.concatenate(parts, axis=-1)

    def write(
        packed: jax.Array,
        ids: ArrayLike,
        rows: jax.Array,
        grads: jax.Array,
        step: ArrayLike,
        learning_rate: ArrayLike,
    ) -> jax.Array:
        dtype, dim, ids = packed.dtype, grads.shape[-1], jnp.asarray(ids)
        p, m, v = rows[:, :dim], rows[:, dim : 2 * dim], rows[:, 2 * dim :]
        now = jnp.minimum(jnp.asarray(step), end - 1)
        step_size = jnp.asarray(tables.step_size.astype(dtype))[now]
        root_scale = jnp.asarray(tables.root_scale.astype(dtype))[now]
        grads = jnp.asarray(grads, dtype)
        m = b1 * m + (1 - b1) * grads
        v = b2 * v + (1 - b2) * jnp.square(grads)
        step_size = step_size * jnp.asarray(learning_rate, dtype)
        p = p - step_size * m / (root_scale * jnp.sqrt(v) + eps)
        new_rows = _pack([p, m, v], jnp.asarray(step) + 1)
        # Those out of range are made distinct, so that all are, as the scatter is told.
        num_rows = packed.shape[0]
        spare = num_rows + jnp.arange(ids.shape[0], dtype=ids.dtype)
        ids = jnp.where((ids >= 0) & (ids < num_rows), ids, spare)
        return packed.at[ids].set(new_rows, mode="drop", unique_indices=True)

    def settle_packed(packed: jax.Array, step: ArrayLike, learning_rate: ArrayLike) -> jax.Array:
        parts = catch_up(packed[:, :-1], _unpack_last(packed), step, learning_rate)
        return _pack(parts, jnp.asarray(step))

    def settle(packed: jax.Array, step: ArrayLike, learning_rate: ArrayLike) -> jax.Array:
        return catch_up(packed[:, :-1], _unpack_last(packed), step, learning_rate)[0]

    closed_from = int(np.argmax(tables.closed)) if tables.closed.any() else np.iinfo(np.int32).max
    return RowAdam(
        init, read, write, settle, settle_packed, closed_from, lambda r: r[:, : r.shape[-1] // 3]
    )


def fixed() -> RowAdam:
    """Returns a `RowAdam` that trains nothing: packed rows are the table's own, and stay."""
    return RowAdam(
        init=jnp.asarray,
        read=lambda packed, ids, step, learning_rate: packed.at[ids].get(mode="clip"),
        write=lambda packed, ids, rows, grads, step, learning_rate: packed,
        settle=lambda packed, step, learning_rate: packed,
        settle_packed=lambda packed, step, learning_rate: packed,
        closed_from=np.iinfo(np.int32).max,
        values=lambda rows: rows,
    )


def merge_ids(ids: ArrayLike, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Merges a batch's duplicate ids, with static shapes, by sorting.

    Args:
      ids: i32[n], each in 0, …, num_rows; num_rows itself stands for no row.
      num_rows: rows of the table.

    Returns:
      unique_ids: i32[n], each distinct id once, and num_rows (out of range: `RowAdam.write` drops
        it) in the other places.
      inverse: i32[n], ``unique_ids[inverse[i]] == ids[i]``: the rows of the batch are
        ``read(packed, unique_ids, …)[inverse]``, and the gradient with respect to what was read
        adds up over duplicates.

    Example:
      >>> import jax.numpy as jnp
      >>> unique_ids, inverse = merge_ids(jnp.array([7, 2, 7]), 10)
      >>> print(unique_ids, inverse)
      [ 2  7 10] [1 0 1]
    """
    ids = jnp.asarray(ids)
    n = ids.shape[0]
    place = jnp.arange(n, dtype=ids.dtype)
    if (num_rows + 1) * n < 2**32:  # id and place in one key: three times as fast on a CPU
        keys = jnp.sort(ids.astype(jnp.uint32) * n + place.astype(jnp.uint32))
        ordered, order = (keys // n).astype(ids.dtype), (keys % n).astype(ids.dtype)
    else:
        ordered, order = jax.lax.sort((ids, place), num_keys=1)
    first = jnp.concatenate([jnp.ones(min(n, 1), bool), ordered[1:] != ordered[:-1]])
    head = jax.lax.cummax(jnp.where(first, place, 0))
    inverse = jnp.zeros_like(ids).at[order].set(head, unique_indices=True)
    return jnp.where(first, ordered, num_rows), inverse
