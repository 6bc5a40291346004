"""What the first lines of a table tell: separator, header, quotes, and the order of columns."""

import contextlib
import csv
import re

from conet_jax.data import columns, values
from conet_jax.errors import InputError

_AMAZON_USER = re.compile(r"A[0-9A-Z]{9,}")
_AMAZON_ITEM = re.compile(r"B[0-9A-Z]{9}|[0-9]{1,9}[0-9X]")
_IS_NUMBER = re.compile(values.NUMBER).fullmatch


def fields(line: str, separator: str) -> list[str]:
    """Returns the fields of a line, without quotes around them."""
    if len(separator) > 1:
        return line.split(separator)
    return (quoted([line], separator) or [line.split(separator)])[0]


def quoted(rows: list[str], separator: str) -> list[list[str]]:
    """Rows up to the first that is wrong: the check of all rows will say what is."""
    found: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # as a field of more than 131,072 characters
        found.extend(csv.reader(rows, delimiter=separator))
    return found


def separator(first: str, format: str) -> str:
    """The separator of a file without a known header."""
    if format in ("tsv", "amazon_2014", "amazon_2018"):
        return "\t" if format == "tsv" else ","
    return next((mark for mark in ("\t", ",", "::", ";", "|") if mark in first), ",")


def is_header(fields: list[str], rows: list[list[str]]) -> bool:
    """Whether a first line that does not name both the user and the item is still no row."""
    named = [field.strip() for field in fields]
    if len(named) < 2 or not rows or any(map(values.is_missing, named)):
        return False
    if any(map(_IS_NUMBER, named)) or len(set(named)) < len(named):
        return False
    below = [[row[at] for row in rows if at < len(row)] for at in range(len(fields))]
    if any(field in column for field, column in zip(fields, below, strict=True)):
        return False
    if any(columns.is_name(field) for field in fields):
        return True
    if any(column and all(map(_IS_NUMBER, column)) for column in below):
        return True
    plain = not any(re.search("[0-9]", field) for field in fields)
    return plain and any(
        len(column) > 2 and all(re.search("[0-9]", value) for value in column) for column in below
    )


def is_wrapped(rows: list[str], separator: str) -> bool:
    """Whether all users, or all items, stand in quotes."""
    for at in (0, 1):
        fields = [line.split(separator) for line in rows]
        values = [row[at] for row in fields if at < len(row)]
        if values and all(len(x) > 1 and x[0] == x[-1] == '"' for x in values):
            return True
    return False


def guess(
    name: str, header: list[str] | None, separator: str, sample: list[str], numbered: bool
) -> str:
    """Returns the format of a table, by its header or its first rows.

    Args:
      name: of the file, for messages.
      header: the names of its columns, if it has them.
      separator: between its fields.
      sample: its first rows.
      numbered: whether the numbers of its columns are given.

    Raises:
      InputError: it cannot be told.
    """
    if header is not None:
        typed = all(re.search(r":(token|float)(_seq)?$", field.strip()) for field in header)
        return "recbole" if typed else "named"
    if separator != "," or numbered:
        return "tsv"
    rows = [line.split(",") for line in sample]

    def share(column: int, pattern: re.Pattern) -> float:
        return sum(len(r) > column and bool(pattern.fullmatch(r[column])) for r in rows) / len(rows)

    for format, (user, item) in {"amazon_2014": (0, 1), "amazon_2018": (1, 0)}.items():
        if share(user, _AMAZON_USER) > 0.8 and share(item, _AMAZON_ITEM) > 0.8:
            return format
    amazon = (
        "--format=amazon_2014 (user,item,rating,timestamp) or --format=amazon_2018 "
        "(item,user,rating,timestamp), or "
    )
    raise InputError(
        f"{name}: the content does not tell which column is the user: give "
        + (amazon if 3 <= len(rows[0]) <= 4 else "")
        + "--user_column=1 --item_column=2, or add a header line such as user_id,item_id,rating; "
        f"first row {sample[0][:80]!r}"
    )
