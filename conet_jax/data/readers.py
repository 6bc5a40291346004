"""Raw files of one domain -> lazily scanned (user, item[, rating][, timestamp][, weight]) rows.

Every column is read as text, so that leading zeros of ids survive, and numbers are cast
afterwards. Two ways lead to the same rows. Polars scans text tables and Parquet files lazily, in
constant memory, after one check of the whole file that it holds nothing that parsers disagree on:
no quote, no stray carriage return, no blank line, nothing wrong. Any other file is read once in
Python, a row at a time, which finds the row at fault or holds the columns in memory.

What counts, in every format: lines end in LF or CR LF; text is UTF-8, with or without a byte order
mark, or UTF-16 with one; an id is text without line ends and NUL, taken as it stands, white space
too; a row whose id is missing (``values.is_missing``) is left out and counted; numbers are decimal
and finite; times are numbers or dates; a line of nothing at all is skipped; a line is at most 16
MiB long, the field of a table 131,072 characters; of equal keys in a JSON object the last counts.
Quotes mean something in files with named columns, and where all users or all items stand in quotes;
there a quoted field may hold separators, doubled quotes and, in columns that are not read, line
ends.
"""

import atexit
import codecs
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import polars as pl

from conet_jax.data import columns, formats, frames, layout, lines, ncf, values
from conet_jax.data.layout import Asked
from conet_jax.data.rows import DomainRows, checked, counts_of, described, in_seconds
from conet_jax.errors import InputError

FORMATS = formats.FORMATS
_MARKS = r"[\r\x00\x1c-\x1f]"  # what splits lines, or is white space, for Python or Polars alone


def read(
    source: str | os.PathLike | Any,
    format: str = "auto",
    *,
    times_needed: bool = True,
    **asked: Any,
) -> DomainRows:
    r"""Opens one domain's file (or NCF-style folder or prefix) and checks all of it.

    Args:
      source: a file, plain or packed (told by its first bytes), or ``-`` for standard input; for
        NCF-style data a folder with ``train.txt``, ``test.txt`` and ``test_neg.txt``, or the prefix
        ``X`` of ``X.train.rating``, ``X.test.rating`` and ``X.test.negative``; or a table in
        memory, see ``frames.as_polars``.
      format: one of ``FORMATS``; ``auto`` finds out from the content.
      times_needed: whether a time that cannot be read is an error; otherwise the whole column is
        then left out, which a note says.
      **asked: the other fields of ``layout.Asked``.

    Returns:
      The rows, to be scanned lazily. Of a plain text table nothing but counts is held in memory,
      of other files the columns that are read.

    Raises:
      InputError: the file is missing, unreadable, empty or of no known format, or holds a bad
        line; the message names file, line and value.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
      ...     _ = file.write("user_id,item_id,rating\nann,007,5\n")
      ...     file.flush()
      ...     print(read(file.name).frame.collect().rows())
      [('ann', '007', 5.0)]
    """
    options = Asked(format, **asked)
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    times_needed = times_needed or options.time_column not in ("", columns.NONE)
    if not isinstance(source, str | os.PathLike):
        return _read_frame("the table", frames.as_polars(source), options, times_needed)
    name = os.fspath(source)
    if name == "-":
        name = _spooled()
    if format == "ncf" or os.path.isdir(name) or ncf.is_prefix(name):
        if format not in ("auto", "ncf"):
            raise InputError(f"{name}: --format={format} needs a file; only ncf reads a folder")
        return _read_ncf(name, options)
    if format == "parquet" or (format == "auto" and formats.kind_of(name) == "parquet"):
        with formats.readable(name):
            return _read_frame(name, frames.scan_parquet(name), options, times_needed)
    return _read_text(name, layout.find(name, options), options, times_needed)


def read_ids(path: str | os.PathLike) -> list[str]:
    """Reads ids from a text file, one a line; blank lines at its end do not count.

    Raises:
      InputError: the file is missing, not text, or has no or an empty line.
    """
    name = os.fspath(path)
    with formats.readable(name), formats.opened(name) as file:
        ids = [line for _, line in lines.strictly(name, file)]
    while ids and not ids[-1]:
        ids.pop()
    if not ids:
        raise InputError(f"{name}: the file is empty: expected an id a line")
    if "" in ids:
        raise InputError(f"{name}:{ids.index('') + 1}: an empty line; expected an id a line")
    return ids


def read_columns(path: str | os.PathLike, *names: str) -> Iterator[tuple[int, list[str]]]:
    """Reads a tab-separated file with a header, strictly: every row has a value for every column.

    Args:
      path: the file.
      names: columns of the header.

    Yields:
      The number of each line, and its values.

    Raises:
      InputError: the file is missing, not text, or a row or column is not as expected.
    """
    name = os.fspath(path)
    with formats.readable(name), formats.opened(name) as file:
        rows = ((number, line.split("\t")) for number, line in lines.strictly(name, file))
        _, header = next(rows, (1, []))
        if any(header.count(column) != 1 for column in names):
            raise InputError(
                f"{name}:1: expected tab-separated columns {' and '.join(names)}, each once; found "
                f"{' '.join(header)!r:.80}"
            )
        places = [header.index(column) for column in names]
        for number, fields in rows:
            found = [fields[at] for at in places] if len(fields) == len(header) else []
            if not all(found) or not found:
                raise InputError(
                    f"{name}:{number}: expected {len(header)} fields separated by tabs, none empty "
                    f"among {' and '.join(names)}; found {fields!r:.60}"
                )
            yield number, found


def _spooled() -> str:
    """Standard input as a file, since it is read more than once; it goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="conet_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = os.path.join(folder, "standard input")
    with open(name, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return name


# Text.


def _read_text(name: str, found: layout.Layout, asked: Asked, times_needed: bool) -> DomainRows:
    rows = _plain_text(name, found)
    if rows is None:
        with formats.readable(name):
            records = lines.records(name, found)
            rows = checked(name, "", records, found, asked, times_needed)
    return described(rows, found, asked)


def _plain_text(name: str, found: layout.Layout) -> DomainRows | None:
    """A table in which each line is a good row to any parser, None of another file."""
    if found.kind != "text" or len(found.separator.encode()) > 1 or not formats.scannable(name):
        return None
    raw = _scan(name, found)
    fields = pl.col(raw.collect_schema().names())
    odd = [fields.str.contains(_MARKS), fields.str.len_bytes() > lines.FIELD]
    if found.quote:
        odd += [fields.str.contains('"', literal=True)]
    odd += [pl.col(role).fill_null("") == "" for role in ("user", "item")]
    form = values.NUMBER
    if found.reading.decimal_comma:
        form += f"|{values.DECIMAL_COMMA}"
    for role in found.roles[2:]:
        text = pl.col(role).fill_null("")
        odd += [~text.str.contains(f"^(?:{form})$"), ~frames.is_good(role, _number(text))]
    odd += [pl.col(f"field_{at}").is_not_null() for at in range(found.named, found.width)]
    missing = frames.missing_id()
    times = pl.col("timestamp") if "timestamp" in found.roles else pl.lit("0")
    try:
        with formats.opened(name) as file:
            *skipped, first = (file.readline(formats.LINE_BYTES) for _ in range(found.skip + 1))
            if skipped and first.startswith(codecs.BOM_UTF8):
                return None  # Polars drops the mark there too, though it is part of an id
        rows, gone, any_odd, largest = (
            raw.select(
                rows=pl.len(),
                gone=missing.sum(),
                odd=pl.any_horizontal(odd).any(),
                largest=_number(times).filter(~missing).max(),
            )
            .collect(engine="streaming")
            .row(0)
        )
    except formats.UNREADABLE:
        return None  # reading in Python will say what is wrong
    if any_odd or rows == gone:
        return None
    frame = raw.filter(~missing) if gone else raw
    frame = frame.select("user", "item", *(_number(pl.col(role)) for role in found.roles[2:]))
    return in_seconds(DomainRows(name, frame, rows - gone, left_out=counts_of(gone, 0)), largest)


def _number(text: pl.Expr) -> pl.Expr:
    return text.str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)


def _scan(name: str, found: layout.Layout) -> pl.LazyFrame:
    names = {at: role for role, at in found.columns.items()}
    return pl.scan_csv(
        name,
        has_header=False,
        skip_lines=found.skip,
        separator=found.separator,
        quote_char=None,
        glob=False,
        schema={names.get(at, f"field_{at}"): pl.String for at in range(found.width)},
    )


# Tables with types.


def _read_frame(name: str, frame: pl.LazyFrame, asked: Asked, times_needed: bool) -> DomainRows:
    if asked.separator or asked.header != "auto" or asked.format not in ("auto", "parquet"):
        raise InputError(
            f"{name}: --separator, --header and --format={asked.format} are for text files: leave "
            "them out, as a table with named columns has none of them"
        )
    schema = frame.collect_schema()
    some = frame.head(1000).collect()
    sample = [
        [str(x) for x in some[column].to_list() if x is not None]
        if not schema[column].is_nested()
        else []
        for column in some.columns
    ]
    found = layout.of_names(name, schema.names(), sample, asked)
    picked = frame.select(
        pl.col(schema.names()[found.columns[role]]).alias(role) for role in found.roles
    )
    rows = frames.plain(picked)
    if rows is not None:
        made = DomainRows(name, rows.frame, rows.count, left_out=counts_of(rows.missing, 0))
        return described(in_seconds(made, rows.largest_time), found, asked)
    records = enumerate(map(list, frames.iterate(picked)), 1)
    return described(checked(name, "row ", records, found, asked, times_needed), found, asked)


# NCF-style data.


def _read_ncf(name: str, asked: Asked) -> DomainRows:
    if asked._replace(skip_bad_rows=False, format="auto") != Asked():
        raise InputError(
            f"{name}: the columns of NCF-style data are fixed: leave out --separator, --header and "
            "the names of columns"
        )
    paths = ncf.paths(name)
    tsv = Asked("tsv", header="no", skip_bad_rows=asked.skip_bad_rows)
    train, test = (_read_text(path, layout.find(path, tsv), tsv, False) for path in paths[:2])
    given = ncf.given(paths[1], test.frame.select("user", "item").collect(), paths[2])
    frame = pl.concat([part.frame.select("user", "item") for part in (train, test)])
    left_out = {key: train.left_out[key] + test.left_out[key] for key in train.left_out}
    note = "test items and their candidates are given: all rows are positives"
    return DomainRows(
        name,
        frame,
        train.rows + test.rows,
        given,
        left_out,
        {"user": "column 1", "item": "column 2"},
        notes=(note,),
        asked=asked,
    )
