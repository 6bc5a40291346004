"""Tables with types: data frames, arrays and Parquet files, as rows of text and numbers."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl

from conet_jax import files
from conet_jax.data import values
from conet_jax.errors import InputError

_COLUMNS = ("user", "item", "rating", "timestamp")


class Plain(NamedTuple):
    """A table that needs no look at each row; see ``readers.DomainRows``."""

    frame: pl.LazyFrame
    count: int
    missing: int
    largest_time: float | None


def as_polars(table: Any) -> pl.LazyFrame:
    """Returns a table in memory as a Polars frame.

    Args:
      table: a Polars or pandas frame, a mapping of names to columns, or an array of two to four
        columns: user, item, rating, timestamp.

    Raises:
      InputError: it is none of these.

    Example:
      >>> as_polars([["ann", "x"], ["bob", "y"]]).collect().rows()
      [('ann', 'x'), ('bob', 'y')]
    """
    if isinstance(table, pl.LazyFrame):
        return table
    if isinstance(table, pl.DataFrame):
        return table.lazy()
    try:
        if isinstance(table, Mapping):
            return pl.DataFrame({str(name): column for name, column in table.items()}).lazy()
        if hasattr(table, "columns") and hasattr(table, "to_numpy"):  # pandas, without pyarrow
            return pl.DataFrame({str(name): _column(table[name]) for name in table.columns}).lazy()
        rows = [list(row) for row in table]
        width = {len(row) for row in rows}
        if len(width) == 1 and 2 <= min(width) <= 4:
            named = zip(_COLUMNS, zip(*rows, strict=True), strict=False)
            return pl.DataFrame({name: [_item(x) for x in column] for name, column in named}).lazy()
    except (TypeError, ValueError, *_POLARS) as error:
        raise InputError(
            f"the table cannot be read: {str(error).partition(chr(10))[0]}; {_EXPECTED}"
        ) from None
    raise InputError(f"the table is {type(table).__name__}: {_EXPECTED}")


_POLARS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
_EXPECTED = (
    "expected a Polars or pandas frame, a dictionary of columns, or rows of user, item, rating, "
    "timestamp"
)


def scan_parquet(name: str) -> pl.LazyFrame:
    """Opens a Parquet file."""
    with files.open_regular(name):
        return pl.scan_parquet(name, glob=False)


def plain(frame: pl.LazyFrame) -> Plain | None:
    """Checks all of a table whose columns are named by role; None if a row needs a closer look."""
    kinds = frame.collect_schema()
    numbers = [role for role in kinds.names() if role not in ("user", "item")]
    ids = [kinds[role] for role in ("user", "item")]
    if not all(kind == pl.String or kind.is_integer() for kind in ids):
        return None
    if not all(kinds[role].is_numeric() for role in numbers):
        return None
    frame = frame.with_columns(
        pl.col("user", "item").cast(pl.String), *(pl.col(role).cast(pl.Float64) for role in numbers)
    )
    text = pl.col("user", "item")
    missing = pl.col("user").is_null() | pl.col("item").is_null() | missing_id()
    odd = [text.str.contains(r"[\n\r\x00\x1c-\x1f]").fill_null(False)]
    odd += [~is_good(role, pl.col(role)) for role in numbers]
    largest = pl.col("timestamp").filter(~missing).max() if "timestamp" in numbers else pl.lit(None)
    found = frame.select(
        count=pl.len(),
        missing=missing.sum(),
        odd=(pl.any_horizontal(odd) & ~missing).any(),
        largest=largest,
    )
    count, gone, any_odd, largest_time = found.collect(engine="streaming").row(0)
    if any_odd or count == gone:
        return None
    return Plain(frame.filter(~missing) if gone else frame, count - gone, gone, largest_time)


def is_good(role: str, number: pl.Expr) -> pl.Expr:
    """Whether a number may stand in the column of a role: it is finite, a weight above 0."""
    good = number.is_between(*values.WEIGHTS) if role == "weight" else number.is_finite()
    return good.fill_null(False)


def missing_id() -> pl.Expr:
    """Whether the text of a row's user or item is that of a missing value, see ``values``."""
    found = []
    for role in ("user", "item"):
        text = pl.col(role).fill_null("")
        # Few are so short or begin with white space: the others need no closer look.
        short = pl.when((text.str.len_bytes() < 10) | text.str.contains(r"^\s")).then(text)
        word = short.str.strip_chars().str.to_lowercase()
        found.append(word.is_in(sorted(values.MISSING)).fill_null(False))
    return pl.any_horizontal(found)


def iterate(frame: pl.LazyFrame) -> Iterator[tuple]:
    """Yields the rows of a table as Python's values."""
    kinds = frame.collect_schema()
    text = [name for name, kind in kinds.items() if kind in (pl.Categorical, pl.Enum)]
    exact = [name for name, kind in kinds.items() if kind.is_decimal()]
    frame = frame.with_columns(pl.col(text).cast(pl.String), pl.col(exact).cast(pl.Float64))
    return frame.collect().iter_rows()


def _column(values_: Any) -> pl.Series:
    """A pandas column; of one of objects, each value by its own type."""
    array = values_.to_numpy()
    if array.dtype.kind in "OUST":
        return pl.Series([None if x is None or x != x else _item(x) for x in array], strict=False)
    return pl.Series(array)


def _item(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
