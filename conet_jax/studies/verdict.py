"""Does a source help a target, and whom: from each user's metric to a sentence with an interval.

Pure functions of arrays f64[seeds, users]: a metric of the same users under each of two methods. A
*gain* is the ratio of two means over users and seeds, less 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from conet_jax.studies import tables
from conet_jax.studies.statistics import resampled_means

SEEDS = 3  # fewest of a trained method before anything is said of it
SMALL = 0.05  # a relative gain that, could it be there unseen, leaves the question open
NARROW = 0.02  # half the width of an interval, relative, that is narrow enough
_USERS_SHARE = 0.85  # of the width that users make: more seeds could not do much about the rest
GROUP_USERS = 50  # fewest of a group of which the sentence speaks
# Quantiles of the normal distribution: 97.5% (an interval of 95%) and 80% (the power asked for).
_Z_INTERVAL, _Z_POWER = 1.959964, 0.841621


class Gain(NamedTuple):
    """How much better one method is than another, over users and seeds.

    Attributes:
      gain: ratio of the means less 1, None where the other's mean is 0.
      low: lower end of the 95% interval, None likewise.
      high: upper end.
      difference: of the means, in the metric's unit.
      half: half the width of the interval, relative.
      users_half: the same if the seeds did not matter.
      detectable: the true gain of which the interval would be above 0 in four of five such studies.
      users: number of users.
      seeds: fewest runs of a method whose result depends on the seed, None if neither's does.
    """

    gain: float | None
    low: float | None
    high: float | None
    difference: float
    half: float
    users_half: float
    detectable: float | None
    users: int
    seeds: int | None

    @property
    def narrow(self) -> bool:
        """Whether more seeds are not worth their time."""
        enough = self.seeds is None or self.seeds >= SEEDS
        return enough and (self.half <= NARROW or self.users_half >= _USERS_SHARE * self.half)


def gain(
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    fixed: tuple[bool, bool] = (False, False),
    resamples: int = 4000,
    seed: int = 0,
) -> Gain:
    """The gain of one method over another, with a paired bootstrap over users and seeds.

    Users are drawn with replacement, the same for both methods. To each mean of a method with S > 1
    seeds is added ``t s / sqrt(S)``: s the standard deviation of its seeds' means, t drawn from
    Student's distribution of S - 1 degrees of freedom. Two or three seeds give wide intervals so.

    Args:
      ours: f64[seeds, users].
      theirs: f64[seeds', users], the same users.
      fixed: whether the result of each does not depend on the seed.
      resamples: of the bootstrap.
      seed: of the draws.

    Returns:
      ``Gain``; of one seed its interval is over users alone.

    Raises:
      ValueError: the users are not the same, or fewer than two.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> base = rng.uniform(size=(3, 500))
      >>> found = gain(1.2 * base, base)
      >>> print(f"{found.gain:.3f} {found.low < 0.2 < found.high} {found.seeds}")
      0.200 True 3
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"expected [seeds, users] of the same users: {ours.shape}, {theirs.shape}")
    users = ours.shape[1]
    if users < 2:
        raise ValueError(f"expected two users or more, got {users}")
    rng = np.random.default_rng(seed)
    both = np.stack([ours.mean(axis=0), theirs.mean(axis=0)], axis=1)
    means = resampled_means(both, resamples, rng)
    noise = np.stack(
        [
            _seed_noise(values, is_fixed, resamples, rng)
            for values, is_fixed in zip((ours, theirs), fixed, strict=True)
        ],
        axis=1,
    )
    runs = [len(x) for x, is_fixed in zip((ours, theirs), fixed, strict=True) if not is_fixed]
    mean, base = both.mean(axis=0)
    difference, seeds = float(mean - base), min(runs) if runs else None
    if base <= 0:
        return Gain(None, None, None, difference, np.inf, np.inf, None, users, seeds)
    low, high = _interval(means + noise)
    users_low, users_high = _interval(means)
    half = (high - low) / 2
    return Gain(
        gain=float(mean / base - 1),
        low=low,
        high=high,
        difference=difference,
        half=half,
        users_half=(users_high - users_low) / 2,
        detectable=(1 + _Z_POWER / _Z_INTERVAL) * half,
        users=users,
        seeds=seeds,
    )


def _seed_noise(
    values: np.ndarray, is_fixed: bool, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    seeds = len(values)
    if is_fixed or seeds < 2:
        return np.zeros(resamples)
    scale = values.mean(axis=1).std(ddof=1) / np.sqrt(seeds)
    return scale * rng.standard_t(seeds - 1, resamples)


def _interval(means: np.ndarray) -> tuple[float, float]:
    ratios = means[:, 0] / np.maximum(means[:, 1], 1e-12) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


class Verdict(NamedTuple):
    """What is concluded.

    Attributes:
      outcome: "helps", "not its content", "hurts", "none" or "unsettled".
      reasons: what could not be settled, and why, in words.
    """

    outcome: str
    reasons: list[str]


def decide(main: Gain, control: Gain | None) -> Verdict:
    """Concludes from two gains, and never says "helps" of what the seeds or users may explain.

    Args:
      main: of the recipe with the source over the best method that knows the target alone.
      control: of the recipe over itself trained with another user's source, None if not trained.

    Returns:
      The verdict. "helps" takes both intervals above 0; the first alone is "not its content",
      unless the second is too wide to tell, which is "unsettled". "none" takes an interval with 0
      that is narrow enough to have shown a gain of ``SMALL``.
    """
    reasons = []
    if main.gain is None:
        return Verdict("unsettled", ["no method that knows the target alone ranks any item well"])
    for what, found in (("the comparison", main), ("the control", control)):
        if found is not None and found.seeds is not None and found.seeds < SEEDS:
            reasons.append(
                f"{what} has {_count(found.seeds, 'seed')}, and needs {SEEDS}: how much the seed "
                "matters is not known"
            )
    if main.low > 0:
        if control is None or control.gain is None:
            reasons.append("the control, another user's source, was not trained")
        if reasons:
            return Verdict("unsettled", reasons)
        if control.low > 0:
            return Verdict("helps", [])
        if control.high >= main.gain:
            reasons.append(
                "the control's interval is too wide to tell whether another user's source does as "
                "well"
            )
            return Verdict("unsettled", reasons)
        return Verdict("not its content", [])
    if reasons:
        return Verdict("unsettled", reasons)
    if main.high < 0:
        return Verdict("hurts", [])
    if main.detectable > SMALL:
        reasons.append(
            f"with {main.users:,} users only a gain of {percent(main.detectable)} or more would "
            "have been seen"
        )
        return Verdict("unsettled", reasons)
    return Verdict("none", [])


def groups(
    ours: np.ndarray,
    theirs: np.ndarray,
    degrees: np.ndarray,
    first: Sequence[int],
    *,
    fixed: tuple[bool, bool] = (False, False),
) -> list[dict[str, Any]]:
    """The gain by a user's number of interactions.

    Args:
      ours: f64[seeds, users].
      theirs: f64[seeds', users].
      degrees: int[users].
      first: the least number of each group, rising from 0; see ``tables.cold``.
      fixed: see ``gain``.

    Returns:
      For each group of two users or more ``interactions`` ("3-4"), ``users``, ``ours`` and
      ``theirs`` (means), ``gain`` (a ``Gain`` as a dictionary).
    """
    rows = []
    for name, inside in tables.grouped(degrees, first):
        if inside.sum() < 2:
            continue
        part = gain(ours[:, inside], theirs[:, inside], fixed=fixed, resamples=2000)
        rows.append(
            {
                "interactions": name,
                "users": int(inside.sum()),
                "ours": float(ours[:, inside].mean()),
                "theirs": float(theirs[:, inside].mean()),
                "gain": as_json(part),
            }
        )
    return rows


def by_target(ours: np.ndarray, theirs: np.ndarray, degrees: np.ndarray, **options: Any) -> list:
    """``groups`` by target interactions."""
    return groups(ours, theirs, degrees, tables.TARGET_GROUPS, **options)


def by_source(ours: np.ndarray, theirs: np.ndarray, degrees: np.ndarray, **options: Any) -> list:
    """``groups`` by source interactions."""
    return groups(ours, theirs, degrees, tables.SOURCE_GROUPS, **options)


def whom(rows: list[dict[str, Any]], what: str) -> str:
    """Returns for whom a gain is largest and from where on it is not clear; "" if nowhere is.

    It is largest for a group whose interval is above the gain of all groups together.

    Args:
      rows: from ``groups``, in rising order.
      what: name of the domain, "books" say.

    Example:
      >>> row = lambda name, low, mid: {"interactions": name, "users": 900,
      ...                               "ours": 0.2 * (1 + mid), "theirs": 0.2,
      ...                               "gain": {"gain": mid, "low": low, "high": 2 * mid}}
      >>> whom([row("1", 0.1, 0.2), row("2-4", 0.02, 0.05), row("5+", -0.1, 0.01)], "books")
      'most for users with 1 training item in books; little or nothing from 5 on'
    """
    rows = [row for row in rows if row["users"] >= GROUP_USERS and row["gain"]["gain"] is not None]
    clear = [row for row in rows if row["gain"]["low"] > 0]
    if len(rows) < 2 or not clear:
        return ""
    best = max(clear, key=lambda row: row["gain"]["gain"])
    ours, theirs = (sum(row["users"] * row[name] for row in rows) for name in ("ours", "theirs"))
    parts = []
    if best["gain"]["low"] > ours / theirs - 1:
        noun = "item" if best["interactions"] == "1" else "items"
        parts.append(
            f"most for users with {_range(best['interactions'])} training {noun} in {what}"
        )
    last = rows.index(clear[-1])
    if last + 1 < len(rows):
        start = rows[last + 1]["interactions"].rstrip("+").partition("-")[0]
        # A wide interval with 0 in it is no sign that there is nothing.
        little = all(row["gain"]["high"] < best["gain"]["gain"] / 2 for row in rows[last + 1 :])
        word = "little or nothing" if little else "not clear"
        users = f"from {start} on" if parts else f"for users with {start} or more in {what}"
        parts.append(f"{word} {users}")
    return "; ".join(parts)


def _range(name: str) -> str:
    if name.endswith("+"):
        return f"{name[:-1]} or more"
    return name.replace("-", " to ")


def as_json(found: Gain | None) -> dict[str, Any] | None:
    """Returns a gain as JSON has it: infinite widths are None."""
    if found is None:
        return None
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in found._asdict().items()
    }


def percent(value: float, *, sign: bool = False) -> str:
    """Returns a share as a person reads it: two digits that count, one decimal below ten.

    >>> percent(0.1234, sign=True), percent(0.0123), percent(-0.5, sign=True)
    ('+12%', '1.2%', '-50%')
    """
    number = 100 * value
    text = f"{number:+.1f}" if sign else f"{number:.1f}"
    if abs(number) >= 9.95:
        text = f"{number:+.0f}" if sign else f"{number:.0f}"
    return text + "%"


def interval(found: Gain | dict[str, Any]) -> str:
    """Returns a gain with its interval.

    >>> interval({"gain": 0.12, "low": 0.09, "high": 0.15})
    '+12% [9.0, 15]'
    """
    row = found if isinstance(found, dict) else found._asdict()
    if row["gain"] is None:
        return "-"
    ends = ", ".join(percent(row[end])[:-1] for end in ("low", "high"))
    return f"{percent(row['gain'], sign=True)} [{ends}]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
