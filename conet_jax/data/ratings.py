"""Rows of a domain as numbered pairs: which are positives, and which are seen and not liked."""

from typing import NamedTuple

import numpy as np
import polars as pl

from conet_jax.data.core import Pairs, take
from conet_jax.data.ncf import Given
from conet_jax.data.readers import DomainRows
from conet_jax.errors import InputError

MIN_RATING = 4.0


class Rated(NamedTuple):
    """The rows of a domain with the threshold set.

    Attributes:
      frame: user, item, ``low`` (whether the rating is below the threshold) where there are
        ratings, timestamp where there are times, and weight where there are weights.
      least: the threshold, None without ratings.
      report: counts of rows for the audit, so far.
    """

    frame: pl.LazyFrame
    least: float | None
    report: dict[str, int]

    @property
    def positives(self) -> pl.LazyFrame:
        """Rows at or above the threshold."""
        return self.frame if self.least is None else self.frame.filter(~pl.col("low"))

    @property
    def num_positives(self) -> int:
        """Their number."""
        away = ("missing_id", "bad_rows", "below_min_rating")
        return self.report["rows"] - sum(self.report.get(reason, 0) for reason in away)


class Coded(NamedTuple):
    """Pairs of some users as numbers.

    Attributes:
      positives: distinct pairs at or above the threshold, sorted by user, then item.
      seen: distinct pairs below it, of items that have a positive.
      items: sorted ids of the items.
    """

    positives: Pairs
    seen: Pairs
    items: pl.Series


def rate(rows: DomainRows, min_rating: float | None) -> Rated:
    """Sets the least rating of a positive.

    Args:
      rows: of a domain.
      min_rating: what was asked for; None is 4, or 1 for feedback of yes or no.

    Raises:
      InputError: it was asked for where no rating is read, or no rating reaches it.
    """
    frame = rows.frame
    known = frame.collect_schema().names()
    report = {"rows": rows.rows + sum(rows.left_out.values())}
    report |= {reason: count for reason, count in rows.left_out.items() if count}
    report["below_min_rating"] = 0
    columns = [name for name in ("timestamp", "weight") if name in known]
    if "rating" not in known or rows.given is not None:
        if min_rating is not None:
            why = (
                "its test items are given, so that all rows are positives"
                if rows.given is not None
                else f"no rating is read (left out: {', '.join(rows.unused) or 'no column'})"
            )
            raise InputError(
                f"{rows.name}: --min_rating={min_rating:g} is given, but {why}; name the column by "
                "--rating_column, or give --target_min_rating or --source_min_rating alone"
            )
        return Rated(frame.select("user", "item", *columns), None, report)
    least = (1.0 if rows.label else MIN_RATING) if min_rating is None else float(min_rating)
    low = pl.col("rating") < least
    below, largest = (
        frame.select(below=low.sum(), largest=pl.col("rating").max())
        .collect(engine="streaming")
        .row(0)
    )
    if below == rows.rows:
        raise InputError(
            f"{rows.name}: no rating is {least:g} or more, the largest is {largest:g}; lower "
            "--min_rating, or --rating_column=none makes every row a positive"
        )
    report["below_min_rating"] = below
    return Rated(frame.select("user", "item", *columns, low=low), least, report)


def code(rated: Rated, users: pl.Series, listed: Given | None) -> Coded:
    """Turns ids into numbers; of a pair rated again the latest counts, without times the last.

    The weights of all its rows add up.

    Adds to the report: rows of other users, and rows of pairs that come again later.

    Args:
      rated: a domain.
      users: ids of the users to keep; their places are their numbers.
      listed: test items and candidates that belong to the catalogue too.
    """
    report = rated.report
    numbered = pl.LazyFrame({"user": users}).with_row_index("row")
    rows = (
        rated.frame.join(numbered, on="user", how="inner", maintain_order="left")
        .drop("user")
        .collect(engine="streaming")
    )
    low = np.zeros(len(rows), bool)
    if rated.least is not None:
        low = rows["low"].to_numpy()
        report["user_not_shared"] = rated.num_positives - int((~low).sum())
    else:
        report["user_not_shared"] = rated.num_positives - len(rows)
    ids = rows["item"].unique().sort()
    pairs = Pairs(
        rows["row"].to_numpy().astype(np.int64),
        _places(rows["item"], ids),
        rows["timestamp"].to_numpy() if "timestamp" in rows.columns else None,
    )
    last = last_of_each(pairs)
    sums = sums_of_each(pairs, rows["weight"].to_numpy()) if "weight" in rows.columns else None
    pairs, left_low = take(pairs, last)._replace(weights=sums), low[last]
    again = "duplicates_merged" if rated.least is None else "rated_again"
    report[again] = len(rows) - len(last)
    report["below_min_rating"] -= int(low.sum()) - int(left_low.sum())
    positives, seen = take(pairs, ~left_low), take(pairs, left_low)
    liked = ids.gather(np.unique(positives.items))
    if listed is not None:
        kept = set(users.to_list())
        lists = zip(listed.users, listed.negatives, strict=True)
        more = {item for user, items in lists if user in kept for item in items}
        liked = pl.concat([liked, pl.Series("item", sorted(more), pl.String)]).unique().sort()
    places = _places(ids, liked)
    positives = positives._replace(items=places[positives.items])
    seen = seen._replace(items=places[seen.items], weights=None)
    return Coded(positives, take(seen, seen.items >= 0), liked)


def last_of_each(pairs: Pairs) -> np.ndarray:
    """Returns the places of the latest row of each pair, in the order of pairs.

    Of equal times, and without times, the row that comes last is the latest.

    Example:
      >>> pairs = Pairs(np.array([0, 0, 0]), np.array([7, 3, 7]), np.array([9.0, 5.0, 8.0]))
      >>> print(last_of_each(pairs), last_of_each(pairs._replace(times=None)))
      [1 0] [1 2]
    """
    keys = pairs.users * (1 + pairs.items.max(initial=0)) + pairs.items
    if pairs.times is None:
        order = np.argsort(keys, kind="stable")
    else:
        order = np.lexsort((pairs.times, keys))  # stable too
    last = np.ones(len(order), bool)
    last[:-1] = np.diff(keys[order]) != 0
    return order[last]


def sums_of_each(pairs: Pairs, values: np.ndarray) -> np.ndarray:
    """Returns the sum of the values f64[n] of each pair's rows, in the order of pairs.

    Example:
      >>> pairs = Pairs(np.array([0, 0, 0]), np.array([7, 3, 7]), None)
      >>> print(sums_of_each(pairs, np.array([1.0, 2.0, 4.0])))
      [2. 5.]
    """
    keys = pairs.users * (1 + pairs.items.max(initial=0)) + pairs.items
    order = np.lexsort((values, keys))  # by size: a sum does not depend on the order of the rows
    keys, values = keys[order], values[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    return np.add.reduceat(values, firsts) if len(keys) else values


def _places(values: pl.Series, ids: pl.Series) -> np.ndarray:
    """Places int64[n] of values in a list of ids, -1 where they are not in it."""
    numbered = pl.LazyFrame({"value": ids}).with_row_index("place")
    found = pl.LazyFrame({"value": values}).join(
        numbered, on="value", how="left", maintain_order="left"
    )
    return found.select(pl.col("place").cast(pl.Int64).fill_null(-1)).collect()["place"].to_numpy()
