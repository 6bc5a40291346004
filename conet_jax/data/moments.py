"""Time: the moment that divides what a model may learn from what it is tested on."""

import datetime

import numpy as np

from conet_jax.data.core import Pairs
from conet_jax.data.split import users_with_ties
from conet_jax.errors import InputError

_MILLISECONDS = 1e11  # as seconds, the year 5138: times from there on count milliseconds


def cutoff(given: str, times: np.ndarray) -> float:
    """The moment that ``--cutoff`` names, in the unit of the times.

    Args:
      given: a date or date and time as ISO 8601 writes it (UTC where no offset is given), a share
        above 0 and below 1 (a quantile of the times), or a time as the files have it.
      times: f64[n], of the target's interactions.

    Raises:
      InputError: it is none of these, or no interaction is before it, or none after, or there is
        none at all.

    Example:
      >>> cutoff("0.75", np.arange(5.0)), cutoff("1970-01-02", np.array([0.0, 1e6]))
      (3.0, 86400.0)
    """
    if not len(times):
        raise InputError(
            f"--cutoff={given}: no target interactions are left to part by it: expected some "
            "before and some after; ask less of users and ratings"
        )
    try:
        moment = float(given)
        if 0 < moment < 1:
            moment = float(np.quantile(times, moment))
    except ValueError:
        try:
            date = datetime.datetime.fromisoformat(given)
        except ValueError:
            raise InputError(
                f"--cutoff={given}: expected a date as 2014-07-01, a share of the target's "
                "interactions above 0 and below 1, or a time as the files have it"
            ) from None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        moment = date.timestamp() * (1e3 if np.median(times) >= _MILLISECONDS else 1)
    before = int((times < moment).sum())
    if not 0 < before < len(times):
        raise InputError(
            f"--cutoff={given}: {before:,} of {len(times):,} target interactions come before it: "
            f"expected some before and some after; their times go from {in_words(times.min())} to "
            f"{in_words(times.max())}"
        )
    return moment


def in_words(time: float) -> str:
    """A time as a number, and as a date where it can be one of seconds or milliseconds.

    Example:
      >>> in_words(1.4e9), in_words(17.0)
      ('1400000000 (2014-05-13)', '17')
    """
    seconds = time / 1e3 if time >= _MILLISECONDS else time
    if not 1e8 <= seconds < _MILLISECONDS / 2:  # from 1973 on; smaller ones count something else
        return f"{time:.15g}"
    date = datetime.datetime.fromtimestamp(seconds, datetime.UTC).date()
    return f"{time:.15g} ({date})"


def before_held_out(
    target: Pairs,
    source: Pairs,
    indptr: np.ndarray,
    held: np.ndarray,
    *,
    drop: bool,
) -> tuple[np.ndarray, dict[str, int | bool]]:
    """The source rows that a model may learn from when users' latest target items are held out.

    A row at the time of its user's first held-out item, or after it, tells what was not known then.
    Where all times are equal there is no after, and every row stays.

    Args:
      target: pairs with times.
      source: pairs, with times if some are to be dropped.
      indptr: int[num_users + 1], row pointers of the target.
      held: int[n], positions of what is held out among the target's pairs.
      drop: whether later rows are left out, or only counted.

    Returns:
      bool[source pairs], True where a row stays, and what the audit says: ``users_with_ties``, see
      ``split.users_with_ties``; ``future_rows``, at or after that time; ``future_dropped``, whether
      these are left out; ``one_moment``, whether all times are equal; ``users_without_source``, who
      have none of their rows left.

    Raises:
      InputError: times are missing, or no row would be left.
    """
    report: dict[str, int | bool] = {"users_with_ties": users_with_ties(indptr, target.times)}
    keep = np.ones(len(source.users), bool)
    if source.times is None:
        if drop:
            raise InputError(
                "--split=latest leaves out what the source saw after the held-out item, and the "
                "source has no timestamps: use --keep_future, or --split=random"
            )
        return keep, report
    moment = np.full(len(indptr) - 1, np.inf)
    np.minimum.at(moment, target.users[held], target.times[held])
    keep = source.times < moment[source.users]
    one = _is_one_moment(target.times, source.times)
    drop = drop and not one
    report |= {"future_rows": int((~keep).sum()), "future_dropped": drop, "one_moment": one}
    if not drop:
        return np.ones_like(keep), report
    if not keep.any():
        raise InputError(
            "no source row comes before its user's held-out target items (of equal times, broken "
            f"by the seed, for {report['users_with_ties']:,} users): use --keep_future, or "
            "--split=random"
        )
    without = len(np.unique(source.users)) - len(np.unique(source.users[keep]))
    return keep, report | {"users_without_source": without}


def _is_one_moment(*times: np.ndarray) -> bool:
    values = np.concatenate(times)
    return not len(values) or bool((values == values[0]).all())
