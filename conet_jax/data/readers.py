"""Raw files of one domain -> lazily scanned (user, item[, rating][, timestamp]) rows.

Every column is read as text, so that leading zeros of ids survive, and numbers are cast
afterwards. Two ways lead to the same rows. Polars scans text tables lazily, in constant memory,
after one check of the whole file that it holds nothing that parsers disagree on: no quote, no stray
carriage return, no blank line, nothing wrong. Any other file, and JSON lines, whose keys may be
given twice and whose numbers may be ids, is read once in Python, a line at a time, which
finds the line at fault or holds the columns in memory.

What counts, in every format: lines end in LF or CR LF; text is UTF-8, with or without a byte order
mark; an id is text without line ends and NUL, taken as it stands, white space too; numbers are
decimal and finite; a line of nothing at all is skipped; a line is at most 16 MiB long, the field of
a table 131,072 characters; of equal keys in a JSON object the last counts. Quotes mean something in
files with named columns alone, where a quoted field may hold separators, doubled quotes and, in
columns that are not read, line ends.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import math
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import polars as pl

from conet_jax import files
from conet_jax.errors import InputError

FORMATS = (
    "auto",
    "amazon_2014",
    "amazon_2018",
    "amazon_json",
    "named",
    "tsv",
    "recbole",
    "ncf",
)

# Spellings of column names, in order of preference, after lower-casing and without "_", "-", " ".
_SPELLINGS = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "memberid"),
    "item": (
        *("itemid", "item", "iid", "asin", "parentasin", "productid", "product", "movieid"),
        *("bookid", "musicid", "songid", "trackid", "newsid", "appid", "isbn", "goodsid"),
    ),
    "rating": ("rating", "ratings", "overall", "score", "stars", "starrating", "rate"),
    "timestamp": ("timestamp", "unixreviewtime", "time", "ts", "unixtime"),
}
_AMAZON_ORDER = {
    "amazon_2014": {"user": 0, "item": 1, "rating": 2, "timestamp": 3},
    "amazon_2018": {"item": 0, "user": 1, "rating": 2, "timestamp": 3},
}
_IDS = ("user", "item")
_TSV_ORDER = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
_AMAZON_USER = re.compile(r"A[0-9A-Z]{9,}")
_AMAZON_ITEM = re.compile(r"B[0-9A-Z]{9}|[0-9]{1,9}[0-9X]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NCF_PAIR = re.compile(r"\(([^,]+),\s*(.+)\)")
_NCF_FILES = (
    ("train.txt", "test.txt", "test_neg.txt"),
    (".train.rating", ".test.rating", ".test.negative"),
)
_SAMPLE_BYTES = 1 << 18  # some thousand lines: enough to tell 2014 from 2018
_LINE_BYTES = 16 << 20
_FIELD = csv.field_size_limit()
_BATCH = 1 << 16  # rows that Python hands to Polars at a time
_UNREADABLE = (OSError, EOFError, zlib.error)
# "x" and one of these begin a zlib stream, which Polars would unpack, or begin an id.
_ZLIB = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")


class Given(NamedTuple):
    """Test items and their negatives as an NCF-style data set lists them, row = test user."""

    users: list[str]
    items: list[str]
    negatives: list[list[str]]


class DomainRows(NamedTuple):
    """One domain's checked input.

    ``frame`` has String columns ``user`` and ``item`` (never empty) and, where the file has them,
    finite Float64 columns ``rating`` and ``timestamp``; ``rows`` is its length; ``given`` is set
    for NCF-style input alone, whose frame is train followed by test.
    """

    name: str
    frame: pl.LazyFrame
    rows: int
    given: Given | None = None


class _Layout(NamedTuple):
    """Where the four columns stand: positions in a text table, keys in JSON lines."""

    columns: dict[str, int] | dict[str, str]
    separator: str = ","
    quote: str | None = None
    skip: int = 0  # lines before the first row
    width: int = 0  # fields of a row
    named: int = 0  # fields that may hold something; the others come from trailing separators

    @property
    def is_json(self) -> bool:
        return self.width == 0

    @property
    def roles(self) -> list[str]:
        """Those that are there: user, item, rating, timestamp."""
        return [role for role in _SPELLINGS if role in self.columns]


def read(path: str | os.PathLike, format: str = "auto") -> DomainRows:
    r"""Opens one domain's file (or NCF-style folder or prefix) and checks all of it.

    Args:
      path: a file, plain or gzip (told by its first bytes); for NCF-style data a folder with
        ``train.txt``, ``test.txt`` and ``test_neg.txt``, or the prefix ``X`` of
        ``X.train.rating``, ``X.test.rating`` and ``X.test.negative``.
      format: one of ``FORMATS``; ``auto`` finds out from the content.

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
    name = os.fspath(path)
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if format == "ncf" or os.path.isdir(name) or os.path.isfile(name + _NCF_FILES[1][0]):
        if format not in ("auto", "ncf"):
            raise InputError(f"{name}: --format={format} needs a file; only ncf reads a folder")
        return _read_ncf(name)
    frame, rows = _read_table(name, format)
    return DomainRows(name, frame, rows)


def read_ids(path: str | os.PathLike) -> list[str]:
    """Reads ids from a text file, one a line; blank lines at its end do not count.

    Raises:
      InputError: the file is missing, not text, or has no or an empty line.
    """
    name = os.fspath(path)
    with _readable(name), _open(name) as file:
        ids = [_bare(line) for line in _decoded(name, file)]
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
    with _readable(name), _open(name) as file:
        lines = (_bare(line).split("\t") for line in _decoded(name, file))
        header = next(lines, [])
        if any(header.count(column) != 1 for column in names):
            raise InputError(
                f"{name}:1: expected tab-separated columns {' and '.join(names)}, each once; found "
                f"{' '.join(header)!r:.80}"
            )
        places = [header.index(column) for column in names]
        for number, fields in enumerate(lines, 2):
            values = [fields[at] for at in places] if len(fields) == len(header) else []
            if not all(values) or not values:
                raise InputError(
                    f"{name}:{number}: expected {len(header)} fields separated by tabs, none empty "
                    f"among {' and '.join(names)}; found {fields!r:.60}"
                )
            yield number, values


def _read_table(name: str, format: str) -> tuple[pl.LazyFrame, int]:
    lines = _sample(name)
    layout = _find_layout(name, lines, format)
    rows = None if layout.is_json else _plain_rows(name, layout)
    if rows is not None:
        numbers = (pl.col(role).cast(pl.Float64) for role in layout.roles[2:])
        return _scan(name, layout).select("user", "item", *numbers), rows
    kinds = {role: pl.String if role in _IDS else pl.Float64 for role in layout.roles}
    with _readable(name):
        found = _rows(name, layout)
        batches = iter(lambda: list(itertools.islice(found, _BATCH)), [])
        frames = [pl.DataFrame(batch, schema=kinds, orient="row") for batch in batches]
    frame = pl.concat(frames)
    return frame.lazy(), len(frame)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; check the path") from None
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name}: cannot be read: {reason}; expected a text file, plain or gzip"
        ) from None


def _open(name: str) -> io.BufferedIOBase:
    with files.open_regular(name) as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(name) if zipped else open(name, "rb")


def _sample(name: str) -> list[str]:
    """The first lines of a text file, without the byte order mark and line ends."""
    with _readable(name), _open(name) as file:
        text = file.read(_SAMPLE_BYTES)
    if len(text) == _SAMPLE_BYTES:  # the last line may be cut in two
        text = text[: text.rfind(b"\n") + 1]
        if not text:
            raise InputError(
                f"{name}:1: the line is longer than {_SAMPLE_BYTES:,} bytes: expected text whose "
                "first lines are shorter"
            )
    lines = [_bare(line) for line in _decoded(name, io.BytesIO(text))]
    if not any(line.strip() for line in lines):
        raise InputError(f"{name}: the file is empty: expected an interaction a line")
    return lines


def _find_layout(name: str, lines: list[str], format: str) -> _Layout:
    skip = next((n for n, line in enumerate(lines) if line), 0)
    first = lines[skip]
    if format == "amazon_json" or (format == "auto" and first.lstrip().startswith("{")):
        return _json_layout(name, first, skip + 1)
    header = None
    for separator in "\t,;|":
        fields = _fields(first, separator)
        if "user" in _roles(fields) and "item" in _roles(fields):
            header = fields
            break
    else:
        tabs = "\t" in first if format == "auto" else format == "tsv"
        separator = "\t" if tabs else ","
    if header is not None:
        skip = next((n for n in range(skip + 1, len(lines)) if lines[n]), None)
        if skip is None:
            raise InputError(f"{name}: a header, but no rows: expected an interaction a line")
    sample = [line for line in lines[skip:] if line][:1000]
    known = ("named", "recbole") if header else ("amazon_2014", "amazon_2018", "tsv")
    if format == "auto":
        format = _guess(name, header, separator, sample)
    elif format in ("named", "recbole") and format not in known:
        raise InputError(
            f"{name}:1: --format={format} needs a header line that names the user and the item, "
            f"as in user_id,item_id,rating,timestamp; found {first[:80]!r}"
        )
    quote = '"' if format == "named" else None
    width = sample[0].count(separator) + 1
    if quote:
        with contextlib.suppress(csv.Error):  # the check of all rows will say what is wrong
            width = len(next(csv.reader(sample, delimiter=separator)))
    if format in ("named", "recbole"):
        assert header is not None
        columns, named = _roles(header), len(header)
        for role, at in columns.items():
            if _plain(header).count(_plain(header)[at]) > 1:
                raise InputError(
                    f"{name}:1: two columns are called {header[at]!r}: expected one {role} column"
                )
    else:
        columns = _TSV_ORDER if format == "tsv" else _AMAZON_ORDER[format]
        trailing = width > 2 and sample[0].endswith(separator)
        named = width - trailing
        least, wanted = (2, "\t") if format == "tsv" else (3, ",")
        if separator != wanted or not least <= named <= 4:
            raise InputError(
                f"{name}:{skip + 1}: --format={format} expects {least} to 4 fields separated by "
                f"{'tabs' if wanted == chr(9) else 'commas'}; found {sample[0][:80]!r}"
            )
        columns = {role: at for role, at in columns.items() if at < named}
    missing = [role for role, at in columns.items() if at >= width]
    if missing:
        raise InputError(
            f"{name}:{skip + 1}: no {missing[0]} in row {sample[0][:80]!r}: "
            "expected as many fields as "
            "the header has"
        )
    return _Layout(columns, separator, quote, skip, width, named)


def _json_layout(name: str, first: str, number: int) -> _Layout:
    try:
        record = files.parse_json(first)
        keys = list(record) if isinstance(record, dict) else []
    except ValueError:
        keys = []
    places = _roles(keys)
    if "user" not in places or "item" not in places:
        raise InputError(
            f"{name}:{number}: expected a JSON object with reviewerID and asin on every line; "
            f"found {first[:80]!r}"
        )
    return _Layout({role: keys[at] for role, at in places.items()})


def _fields(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator))
    except csv.Error:  # a field of more than 131,072 characters, which names no column
        return line.split(separator)


def _plain(names: list[str]) -> list[str]:
    return [re.sub(r"[\s_-]", "", name.split(":")[0]).lower() for name in names]


def _roles(names: list[str]) -> dict[str, int]:
    """Which position holds the user, the item, the rating, the timestamp."""
    plain = _plain(names)
    return {
        role: plain.index(found)
        for role, spellings in _SPELLINGS.items()
        if (found := next((s for s in spellings if s in plain), None)) is not None
    }


def _guess(name: str, header: list[str] | None, separator: str, sample: list[str]) -> str:
    if header is not None:
        typed = all(re.search(r":(token|float)(_seq)?$", field.strip()) for field in header)
        return "recbole" if typed else "named"
    if separator == "\t":
        return "tsv"
    rows = [line.split(",") for line in sample]

    def share(column: int, pattern: re.Pattern) -> float:
        return sum(len(r) > column and bool(pattern.fullmatch(r[column])) for r in rows) / len(rows)

    for format, (user, item) in {"amazon_2014": (0, 1), "amazon_2018": (1, 0)}.items():
        if share(user, _AMAZON_USER) > 0.8 and share(item, _AMAZON_ITEM) > 0.8:
            return format
    raise InputError(
        f"{name}: the content does not tell which column is the user: give --format=amazon_2014 "
        "(user,item,rating,timestamp) or --format=amazon_2018 (item,user,rating,timestamp), or "
        f"add a header line such as user_id,item_id,rating; first row {sample[0][:80]!r}"
    )


# Plain text tables, by Polars.


def _plain_rows(name: str, layout: _Layout) -> int | None:
    """Rows of a table in which each line is a good row to any parser, None of another file."""
    raw = _scan(name, layout)
    fields = pl.col(raw.collect_schema().names())
    odd = [fields.str.contains(f"[\r\0{layout.quote or ''}]"), fields.str.len_bytes() > _FIELD]
    odd += [pl.col(role).fill_null("") == "" for role in _IDS]
    for role in layout.roles[2:]:
        text = pl.col(role).fill_null("")
        odd += [~text.str.contains(f"^(?:{_NUMBER.pattern})$")]
        odd += [~text.cast(pl.Float64, strict=False).is_finite().fill_null(False)]
    odd += [pl.col(f"field_{at}").is_not_null() for at in range(layout.named, layout.width)]
    try:
        with _open(name) as file:
            if file.read(2) in _ZLIB:
                return None
            file.seek(0)
            *skipped, first = (file.readline(_LINE_BYTES) for _ in range(layout.skip + 1))
            if skipped and first.startswith(codecs.BOM_UTF8):
                return None  # Polars drops the mark there too, though it is part of an id
        rows, any_odd = (
            raw.select(pl.len(), pl.any_horizontal(odd).any()).collect(engine="streaming").row(0)
        )
    except (pl.exceptions.PolarsError, *_UNREADABLE):
        return None  # reading in Python will say what is wrong
    return None if any_odd else rows


def _scan(name: str, layout: _Layout) -> pl.LazyFrame:
    names = {at: role for role, at in layout.columns.items()}
    return pl.scan_csv(
        name,
        has_header=False,
        skip_lines=layout.skip,
        separator=layout.separator,
        quote_char=None,
        glob=False,
        schema={names.get(at, f"field_{at}"): pl.String for at in range(layout.width)},
    )


# All else, a line at a time.


def _decoded(name: str, file: io.BufferedIOBase) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
        if len(line) == _LINE_BYTES:
            raise InputError(
                f"{name}:{number}: the line is longer than {_LINE_BYTES >> 20} MiB: expected one "
                "interaction a line"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(
                f"{name}:{number}: not UTF-8 text: {line[:60]!r}; save the file as UTF-8"
            ) from None
        if "\0" in text or "\r" in _bare(text):
            raise InputError(
                f"{name}:{number}: a NUL character, or a stray line end within the line: "
                f"{text[:60]!r}; expected text whose lines end in LF or CR LF"
            )
        yield text


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _rows(name: str, layout: _Layout) -> Iterator[tuple[str | float, ...]]:
    """Checked rows, in the order of ``layout.roles``."""
    with _open(name) as file:
        if layout.is_json:
            records = _json_records(name, layout, file)
        elif layout.quote:
            records = _quoted_records(name, layout, file)
        else:
            records = _split_records(name, layout, file)
        for number, (user, item, *numbers) in records:
            try:
                ids = _id("user", user), _id("item", item)
                yield *ids, *map(_real, layout.roles[2:], numbers)
            except ValueError as error:
                raise InputError(f"{name}:{number}: {error}") from None


Records = Iterator[tuple[int, list[Any]]]


def _split_records(name: str, layout: _Layout, file: io.BufferedIOBase) -> Records:
    lines = itertools.islice(_decoded(name, file), layout.skip, None)
    for number, line in enumerate(lines, layout.skip + 1):
        line = _bare(line)
        if line:
            yield number, _picked(name, number, layout, line.split(layout.separator))


def _quoted_records(name: str, layout: _Layout, file: io.BufferedIOBase) -> Records:
    """Rows with the numbers of their first lines."""
    lines = itertools.islice(_decoded(name, file), layout.skip, None)
    reader = csv.reader(lines, delimiter=layout.separator, quotechar=layout.quote, strict=True)
    while True:
        number = layout.skip + reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{name}:{number}: a quote is opened and not closed, or text follows it ({error}); "
                "a quote within a quoted field is written twice"
            ) from None
        if not fields:
            continue
        values = _picked(name, number, layout, fields)
        for value in values[:2]:
            if value and "\n" in value:
                raise InputError(
                    f"{name}:{number}: a quote is opened and not closed: {value[:40]!r}; an id "
                    "holds no line end"
                )
        yield number, values


def _picked(name: str, number: int, layout: _Layout, fields: list[str]) -> list[str | None]:
    if any(fields[layout.named :]):  # the others come from trailing separators
        raise InputError(
            f"{name}:{number}: {len(fields)} fields where {layout.named} are expected, as in the "
            "first row"
        )
    if any(len(field) > _FIELD for field in fields):
        raise InputError(f"{name}:{number}: a field of more than {_FIELD:,} characters: shorten it")
    places = (layout.columns[role] for role in layout.roles)
    return [fields[at] if at < len(fields) else None for at in places]


def _json_records(name: str, layout: _Layout, file: io.BufferedIOBase) -> Records:
    keys = [layout.columns[role] for role in layout.roles]
    for number, line in enumerate(_decoded(name, file), 1):
        if line.isspace():
            continue
        try:
            record = files.parse_json(_bare(line))
        except ValueError as error:
            raise InputError(
                f"{name}:{number}: not JSON ({error}): {line[:60]!r}; expected one object a line"
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                f"{name}:{number}: expected a JSON object on every line; found {line[:60]!r}"
            )
        yield number, [record.get(key) for key in keys]


def _id(role: str, value: Any) -> str:
    if value is None or value == "":
        raise ValueError(f"the {role} id is missing: expected one in every row")
    if type(value) is int:
        return str(value)
    if type(value) is not str:
        raise ValueError(f"bad {role} id {value!r:.60}: expected text or a whole number")
    if "\n" in value or "\r" in value or "\0" in value:
        raise ValueError(f"bad {role} id {value!r:.60}: expected no line end and no NUL in it")
    if not value.isascii() and any("\ud800" <= mark <= "\udfff" for mark in value):
        raise ValueError(
            f"bad {role} id {value!r:.60}: half of a UTF-16 surrogate pair, which is no text"
        )
    return value


def _real(role: str, value: Any) -> float:
    if value is None or value == "":
        raise ValueError(f"the {role} is missing: expected a number in every row")
    if type(value) in (int, float):
        value = str(value)
    if type(value) is not str or not _NUMBER.fullmatch(value) or math.isinf(float(value)):
        raise ValueError(f"bad {role} {value!r:.60}: expected a finite number")
    return float(value)


# NCF-style data: train, test, and the negatives of each test item.


def _read_ncf(name: str) -> DomainRows:
    if os.path.isdir(name):
        train, test, negative = (os.path.join(name, file) for file in _NCF_FILES[0])
    else:
        train, test, negative = (name + suffix for suffix in _NCF_FILES[1])
    for file in (train, test, negative):
        if not os.path.isfile(file):
            raise InputError(
                f"{file}: no such file; NCF-style data is a folder with train.txt, test.txt and "
                "test_neg.txt, or the prefix X of X.train.rating, X.test.rating, X.test.negative"
            )
    frames = [_read_table(file, "tsv") for file in (train, test)]
    tests = frames[1][0].select("user", "item").collect()
    users, items = tests["user"].to_list(), tests["item"].to_list()
    repeated = tests.filter(pl.col("user").is_duplicated())
    if len(repeated):
        raise InputError(
            f"{test}: user {repeated['user'][0]!r} has more than one test item: expected one"
        )
    lists = _read_negatives(negative, dict(zip(users, items, strict=True)))
    lacking = next((user for user in users if user not in lists), None)
    if lacking is not None:
        raise InputError(f"{negative}: no line for user {lacking!r} of {test}: expected one")
    frame = pl.concat([part.select("user", "item") for part, _ in frames])
    given = Given(users, items, [lists[user] for user in users])
    return DomainRows(name, frame, sum(rows for _, rows in frames), given)


def _read_negatives(name: str, tests: dict[str, str]) -> dict[str, list[str]]:
    _sample(name)  # missing, empty and undecodable files are reported alike
    lists: dict[str, list[str]] = {}
    with _readable(name), _open(name) as file:
        for number, line in enumerate(_decoded(name, file), 1):
            if not _bare(line):
                continue
            pair, *items = _bare(line).removesuffix("\t").split("\t")
            found = _NCF_PAIR.fullmatch(pair)
            if found is None or not items or not all(items):
                _bad_negatives(name, number, f"expected '(user, item)' and items; {line[:60]!r}")
            user, item = found.groups()
            if tests.get(user) != item:
                _bad_negatives(name, number, f"{pair} is not in the test file: expected its pairs")
            if user in lists:
                _bad_negatives(name, number, f"a second line for user {user!r}: expected one")
            lists[user] = items
    return lists


def _bad_negatives(name: str, number: int, what: str) -> NoReturn:
    raise InputError(f"{name}:{number}: {what}")
