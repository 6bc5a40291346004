"""Which items of a user are held out, and against which candidates they are ranked.

Rows of one domain are given as a CSR pair (``indptr``, ``items``), items strictly increasing within
a user. Randomness is NumPy's PCG64, seeded by (seed, purpose), so that no draw depends on another.
"""

from collections.abc import Sequence

import numpy as np

from conet_jax.errors import InputError


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A random generator of its own for each purpose of one seed."""
    return np.random.Generator(np.random.PCG64([seed, *purpose.encode()]))


def leave_one_out(
    indptr: np.ndarray,
    *,
    split: str,
    seed: int,
    timestamps: np.ndarray | None = None,
    purpose: str = "held out",
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses a test item for each user with two items or more, a validation item from three on.

    Args:
      indptr: int[num_users + 1], CSR row pointers.
      split: ``random`` (uniform over the user's items) or ``latest`` (the latest item is the test
        item, the one before it the validation item; equal times in an order drawn from the seed).
      seed: of the random draws.
      timestamps: f64[nnz], needed by ``latest``.
      purpose: of the draws, which differ from those of another purpose.

    Returns:
      (test, valid): int64[num_users] positions into the CSR data, -1 where there is none.

    Raises:
      InputError: ``latest`` without timestamps, or an unknown split.

    Example:
      >>> times = np.array([7.0, 9.0, 8.0, 1.0])  # of a user with three items, and one with one
      >>> test, valid = leave_one_out(np.array([0, 3, 4]), split="latest", seed=0, timestamps=times)
      >>> print(test, valid)
      [ 1 -1] [ 2 -1]
    """
    starts, degree = np.asarray(indptr[:-1], np.int64), np.diff(indptr).astype(np.int64)
    if split == "random":
        rng = generator(seed, purpose)
        first = rng.integers(0, np.maximum(degree, 1))
        second = rng.integers(0, np.maximum(degree - 1, 1))
        second += second >= first
        test, valid = starts + first, starts + second
    elif split == "latest":
        if timestamps is None:
            raise InputError("--split=latest needs timestamps; use --split=random")
        order = _by_time(indptr, timestamps, seed)
        ends = starts + degree
        test = order[np.maximum(ends - 1, 0)] if len(order) else ends
        valid = order[np.maximum(ends - 2, 0)] if len(order) else ends
    else:
        raise InputError(f"unknown split {split!r}: expected random or latest")
    return np.where(degree >= 2, test, -1), np.where(degree >= 3, valid, -1)


def _by_time(indptr: np.ndarray, timestamps: np.ndarray, seed: int) -> np.ndarray:
    """Positions by user and time, equal times in an order drawn from the seed."""
    users = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    drawn = generator(seed, "equal times").random(len(users))
    return np.lexsort((drawn, timestamps, users))


def users_with_ties(indptr: np.ndarray, timestamps: np.ndarray) -> int:
    """The users whose latest item, or the one before it, the seed chooses among equal times.

    Example:
      >>> users_with_ties(np.array([0, 3, 5]), np.array([1.0, 2, 2, 3, 4]))
      1
    """
    starts, ends = np.asarray(indptr[:-1], np.int64), np.asarray(indptr[1:], np.int64)
    users = np.repeat(np.arange(len(starts)), ends - starts)
    times = np.append(np.asarray(timestamps)[np.lexsort((timestamps, users))], np.nan)

    def equal(back: int) -> np.ndarray:
        """Whether an item and the one before it, counted from the latest, are of one time."""
        there = ends - back > starts
        late, early = (np.where(there, ends - at, -1) for at in (back, back + 1))
        return times[late] == times[early]

    return int((equal(1) | equal(2)).sum())


def first_later(
    indptr: np.ndarray, timestamps: np.ndarray, *, cutoff: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses what is held out of the items that a user took from a moment on.

    A user's first later item is the test item; where there are two, the first is the validation
    item and the second the test item. So every test item comes after all training pairs, and after
    its user's validation item.

    Args:
      indptr: int[num_users + 1], CSR row pointers.
      timestamps: f64[nnz].
      cutoff: the moment, in the unit of the timestamps.
      seed: of the order of equal times.

    Returns:
      (test, valid): int64[num_users] positions into the CSR data, -1 where there is none.

    Example:
      >>> times = np.array([1.0, 7.0, 9.0, 2.0, 8.0])
      >>> test, valid = first_later(np.array([0, 3, 5]), times, cutoff=5.0, seed=0)
      >>> print(test, valid)
      [2 4] [ 1 -1]
    """
    order = _by_time(indptr, timestamps, seed)
    ends = np.asarray(indptr[1:], np.int64)
    later = np.concatenate([[0], np.cumsum(timestamps >= cutoff)])
    later = later[indptr[1:]] - later[indptr[:-1]]
    padded = np.append(order, -1)
    first = np.where(later >= 1, padded[np.where(later >= 1, ends - later, -1)], -1)
    second = np.where(later >= 2, padded[np.where(later >= 2, ends - later + 1, -1)], -1)
    return np.where(later >= 2, second, first), np.where(later >= 2, first, -1)


def one_more(
    indptr: np.ndarray, test: np.ndarray, *, seed: int, purpose: str = "held out"
) -> np.ndarray:
    """Chooses a validation item where the test items are given: uniformly, never the test item.

    Args:
      indptr: int[num_users + 1], CSR row pointers.
      test: int[num_users], positions of the test items in the CSR data, -1 where there is none.
      seed: of the draws.
      purpose: of the draws.

    Returns:
      int64[num_users] positions, -1 for users with fewer than three items.
    """
    starts, degree = np.asarray(indptr[:-1], np.int64), np.diff(indptr).astype(np.int64)
    has_test = test >= 0
    draw = generator(seed, purpose).integers(0, np.maximum(degree - has_test, 1))
    draw += has_test & (draw >= test - starts)
    return np.where(degree >= 3, starts + draw, -1)


RATIOS = (8, 1, 1)  # of training, validation and test items, where none are asked for
_LARGEST_RATIO = 1_000_000  # so that a ratio times a number of items is an int64


def checked_ratios(split: str, ratios: Sequence[int | str] | None) -> tuple[int, ...] | None:
    """The ratios of training, validation and test items, None under another split than ``ratio``.

    Args:
      split: its name.
      ratios: three whole numbers, ``RATIOS`` if None.

    Raises:
      InputError: they are something else, or given with another split.

    Example:
      >>> checked_ratios("ratio", ["6", "2", "2"]), checked_ratios("random", None)
      ((6, 2, 2), None)
    """
    if split != "ratio":
        if ratios is not None:
            raise InputError("--ratios is for --split=ratio: leave it out, or give both")
        return None
    texts = [str(ratio) for ratio in (RATIOS if ratios is None else ratios)]
    whole = [int(text) for text in texts if text.isascii() and text.isdigit() and len(text) < 9]
    if len(texts) != 3 or len(whole) != 3 or not 1 <= min(whole) <= max(whole) <= _LARGEST_RATIO:
        raise InputError(
            f"--ratios={','.join(texts)}: expected three whole numbers from 1 to "
            f"{_LARGEST_RATIO:,}, of training, validation and test items, as 8,1,1"
        )
    return tuple(whole)


def sizes_by_ratio(degrees: np.ndarray, ratios: Sequence[int]) -> np.ndarray:
    """How many of a user's items go to training, validation and test: int64[3, users].

    With a : b : c of n items, validation has floor(b n / (a + b + c)), test floor(c n / (a + b +
    c)), and training the rest. Where that is none, test gets one of the training items, and then
    validation, as long as two or more are there. So training keeps one in any case; a user with two
    items gives a test item, one with three a validation item too, as under leave-one-out. RecBole
    rounds in the same way.

    Example:
      >>> sizes_by_ratio(np.array([1, 2, 3, 10, 19, 20]), (8, 1, 1)).T.tolist()
      [[1, 0, 0], [1, 0, 1], [1, 1, 1], [8, 1, 1], [17, 1, 1], [16, 2, 2]]
    """
    degrees = np.asarray(degrees, np.int64)
    _, valid, test = (degrees * ratio // sum(ratios) for ratio in ratios)
    train = degrees - valid - test
    for part in (test, valid):
        more = (part == 0) & (train >= 2)
        part += more
        train -= more
    return np.stack([train, valid, test])


def by_ratios(
    indptr: np.ndarray, *, ratios: Sequence[int], seed: int, purpose: str = "held out"
) -> tuple[np.ndarray, np.ndarray]:
    """Parts each user's items at random into training, validation and test.

    Args:
      indptr: int[num_users + 1], CSR row pointers.
      ratios: of training, validation and test items, see ``sizes_by_ratio``.
      seed: of the draws.
      purpose: of the draws.

    Returns:
      (test, valid): int64[n] positions into the CSR data, ascending.

    Example:
      >>> test, valid = by_ratios(np.array([0, 10, 12]), ratios=(6, 2, 2), seed=0)
      >>> (test < 10).sum(), (test >= 10).sum(), len(valid), len({*test, *valid})
      (np.int64(2), np.int64(1), 2, 5)
    """
    degrees = np.diff(indptr).astype(np.int64)
    users = np.repeat(np.arange(len(degrees)), degrees)
    order = np.lexsort((generator(seed, purpose).random(len(users)), users))
    place = np.arange(len(users)) - np.asarray(indptr, np.int64)[users]  # of those in order
    train, valid, _ = sizes_by_ratio(degrees, ratios)[:, users]
    is_test, is_train = place >= train + valid, place < train
    return np.sort(order[is_test]), np.sort(order[~is_test & ~is_train])


def draw_candidates(
    indptr: np.ndarray,
    items: np.ndarray,
    num_items: int,
    users: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws ``count`` distinct items that a user has not touched, uniformly over such sets.

    Floyd's algorithm, over all users at once, draws ranks among the ``num_items - d`` untouched
    items; with a user's touched items p_0 < p_1 < ..., the item of rank r is r plus the number of
    touched items with p_k - k <= r. No rejection, and exact for a user with ``count`` left.

    Args:
      indptr: int[num_users + 1], CSR row pointers of the touched items.
      items: int[nnz], strictly increasing within a user.
      num_items: items of the domain.
      users: int[n], whose candidates are wanted, a user once or more; each must have ``count``
        untouched items.
      count: candidates a user.
      rng: where the draws come from.

    Returns:
      int32[n, count], increasing within a row.

    Raises:
      ValueError: a user has fewer than ``count`` untouched items.

    Example:
      >>> indptr, items = np.array([0, 2]), np.array([1, 3])
      >>> draw_candidates(indptr, items, 5, np.array([0]), 3, np.random.default_rng(0))
      array([[0, 2, 4]], dtype=int32)
    """
    degree = np.diff(indptr)[users]
    room = (num_items - degree).astype(np.int64)
    if len(users) and room.min() < count:
        raise ValueError("a user has too few untouched items")
    ranks = np.empty((count, len(users)), np.int32)
    for k in range(count):
        top = room - count + k
        draw = rng.integers(0, top + 1)
        taken = (ranks[:k] == draw).any(axis=0)
        ranks[k] = np.where(taken, top, draw)
    ranks = np.sort(ranks.T, axis=1).astype(np.int64)
    row = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    starts = np.asarray(indptr, np.int64)[:-1]
    keys = row * (num_items + 1) + (items - (np.arange(len(items)) - starts[row]))
    wanted = np.asarray(users, np.int64)[:, None]
    passed = np.searchsorted(keys, wanted * (num_items + 1) + ranks, side="right")
    return (ranks + passed - starts[wanted]).astype(np.int32)
