"""Raw files of one domain -> lazily scanned (user, item[, rating][, timestamp]) rows.

Every column is scanned as text, so that leading zeros of ids survive, and numbers are cast
afterwards. ``read`` checks the whole file once, in constant memory; only a file that looks wrong is
read a second time, slowly and in Python, to find the line that is at fault.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import polars as pl

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
_TSV_ORDER = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}
_AMAZON_USER = re.compile(r"A[0-9A-Z]{9,}")
_AMAZON_ITEM = re.compile(r"B[0-9A-Z]{9}|[0-9]{1,9}[0-9X]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NCF_PAIR = re.compile(r"\(([^,]+),\s*(.+)\)")
_NCF_FILES = (
    ("train.txt", "test.txt", "test_neg.txt"),
    (".train.rating", ".test.rating", ".test.negative"),
)
_SAMPLE_BYTES = 1 << 18  # some thousand lines: enough to tell 2014 from 2018


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


def read(path: str | os.PathLike, format: str = "auto") -> DomainRows:
    r"""Opens one domain's file (or NCF-style folder or prefix) and checks all of it.

    Args:
      path: a file, plain or gzip (told by its first bytes); for NCF-style data a folder with
        ``train.txt``, ``test.txt`` and ``test_neg.txt``, or the prefix ``X`` of
        ``X.train.rating``, ``X.test.rating`` and ``X.test.negative``.
      format: one of ``FORMATS``; ``auto`` finds out from the content.

    Returns:
      The rows, to be scanned lazily; nothing but counts is held in memory (NCF lists excepted).

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
        raise InputError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if format == "ncf" or os.path.isdir(name) or os.path.isfile(name + _NCF_FILES[1][0]):
        if format not in ("auto", "ncf"):
            raise InputError(f"{name}: --format={format} needs a file; only ncf reads a folder")
        return _read_ncf(name)
    frame, rows = _read_table(name, format)
    return DomainRows(name, frame, rows)


def _read_table(name: str, format: str) -> tuple[pl.LazyFrame, int]:
    lines = _sample(name)
    layout = _find_layout(name, lines, format)
    raw = _scan(name, layout)
    bad, blank = _faults(layout)
    try:
        rows, blanks, bads = (
            raw.select(pl.len(), blank.sum().alias("blank"), (bad & ~blank).sum().alias("bad"))
            .collect(engine="streaming")
            .row(0)
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        _raise_first_fault(name, layout)
        raise InputError(f"{name}: cannot be read: {error}") from error
    if bads or blanks:  # a blank line is harmless, but a row of separators alone looks the same
        _raise_first_fault(name, layout)
    if bads:
        row = raw.filter(bad & ~blank).head(1).collect().row(0)
        raise InputError(f"{name}: bad row {row}")
    if rows == blanks:
        raise InputError(f"{name}: no rows")
    frame = raw.filter(~blank).select(
        *(pl.col(role) for role in ("user", "item")),
        *(
            pl.col(role).cast(pl.Float64, strict=False)
            for role in ("rating", "timestamp")
            if role in layout.columns
        ),
    )
    return frame, rows - blanks


def _open(name: str) -> io.BufferedReader:
    with open(name, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(name, "rb") if zipped else open(name, "rb")


def _sample(name: str) -> list[str]:
    """The first lines of a text file, without the byte order mark and line ends."""
    try:
        with _open(name) as file:
            text = file.read(_SAMPLE_BYTES)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except (OSError, EOFError) as error:
        raise InputError(f"{name}: cannot be read: {error}") from error
    if len(text) == _SAMPLE_BYTES:  # the last line may be cut in two
        text = text[: text.rfind(b"\n") + 1] or text
    try:
        lines = text.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        lines = []
        for number, line in enumerate(text.split(b"\n"), 1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise InputError(f"{name}:{number}: not UTF-8 text: {line[:60]!r}") from None
    lines = [line.removesuffix("\r") for line in lines]
    if not any(line.strip() for line in lines):
        raise InputError(f"{name}: the file is empty")
    if text.startswith(b"\xef\xbb\xbf") and lines[0].startswith("{"):
        raise InputError(f"{name}: JSON lines must not begin with a byte order mark; remove it")
    return lines


def _find_layout(name: str, lines: list[str], format: str) -> _Layout:
    skip = next(n for n, line in enumerate(lines) if line.strip())
    first = lines[skip]
    if format == "amazon_json" or (format == "auto" and first.lstrip().startswith("{")):
        return _json_layout(name, first, skip + 1)
    header = None
    for separator in "\t,;|":
        fields = next(csv.reader([first], delimiter=separator))
        if "user" in _roles(fields) and "item" in _roles(fields):
            header = fields
            break
    else:
        separator = "\t" if "\t" in first else ","
    if header is not None:
        skip = next((n for n in range(skip + 1, len(lines)) if lines[n].strip()), None)
        if skip is None:
            raise InputError(f"{name}: a header, but no rows")
    sample = [line for line in lines[skip:] if line.strip()][:1000]
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
        raise InputError(f"{name}:{skip + 1}: no {missing[0]} in row {sample[0][:80]!r}")
    return _Layout(columns, separator, quote, skip, width, named)


def _json_layout(name: str, first: str, number: int) -> _Layout:
    try:
        record = json.loads(first)
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


def _roles(names: list[str]) -> dict[str, int]:
    """Which position holds the user, the item, the rating, the timestamp."""
    plain = [re.sub(r"[\s_-]", "", name.split(":")[0]).lower() for name in names]
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


def _scan(name: str, layout: _Layout) -> pl.LazyFrame:
    if layout.is_json:
        raw = pl.scan_ndjson(name, schema={key: pl.String for key in layout.columns.values()})
        return raw.rename({key: role for role, key in layout.columns.items()})
    names = {at: role for role, at in layout.columns.items()}
    return pl.scan_csv(
        name,
        has_header=False,
        skip_lines=layout.skip,
        separator=layout.separator,
        quote_char=layout.quote,
        schema={names.get(at, f"field_{at}"): pl.String for at in range(layout.width)},
    )


def _faults(layout: _Layout) -> tuple[pl.Expr, pl.Expr]:
    """Two conditions on the text columns: the row is bad, the row is blank."""
    bad = [pl.col(role).is_null() | (pl.col(role) == "") for role in ("user", "item")]
    for role in ("rating", "timestamp"):
        if role in layout.columns:
            number = pl.col(role).cast(pl.Float64, strict=False)
            bad.append(~number.is_finite().fill_null(False))
    fields = list(layout.columns)
    if not layout.is_json:
        places = set(layout.columns.values())
        others = [at for at in range(layout.width) if at not in places]
        bad += [pl.col(f"field_{at}").is_not_null() for at in others if at >= layout.named]
        fields += [f"field_{at}" for at in others]
    if layout.quote:  # an opening quote that nothing closes swallows the lines that follow
        bad += [pl.col(role).str.contains("\n", literal=True) for role in ("user", "item")]
    return pl.any_horizontal(bad), pl.all_horizontal(pl.col(f).is_null() for f in fields)


def _raise_first_fault(name: str, layout: _Layout) -> None:
    """Looks through the file line by line; returns if nothing is wrong."""
    try:
        with _open(name) as file:
            if layout.is_json:
                _check_json(name, layout, file)
            else:
                _check_text(name, layout, file)
    except (OSError, EOFError) as error:
        raise InputError(f"{name}: cannot be read: {error}") from error


def _decoded(name: str, file: io.BufferedReader) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{name}:{number}: not UTF-8 text: {line[:60]!r}") from None


def _check_text(name: str, layout: _Layout, file: io.BufferedReader) -> None:
    for number, fields in _records(name, layout, file):
        where = f"{name}:{number}"
        if not fields or fields == [""]:
            continue
        if any(fields[layout.named :]) or len(fields) > layout.width:
            raise InputError(f"{where}: {len(fields)} fields where {layout.named} are expected")
        _check_row(
            where,
            {role: fields[at] if at < len(fields) else None for role, at in layout.columns.items()},
        )


def _records(
    name: str, layout: _Layout, file: io.BufferedReader
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a text table, each with the number of its first line."""
    lines = itertools.islice(_decoded(name, file), layout.skip, None)
    if not layout.quote:
        for number, line in enumerate(lines, layout.skip + 1):
            yield number, line.rstrip("\r\n").split(layout.separator)
        return
    reader = csv.reader(lines, delimiter=layout.separator, quotechar=layout.quote)
    while True:
        number = layout.skip + reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = f"{name}:{number}: a quote is opened and not closed, or a stray line end"
            raise InputError(f"{message} ({error})") from error
        yield number, fields


def _check_json(name: str, layout: _Layout, file: io.BufferedReader) -> None:
    for number, line in enumerate(_decoded(name, file), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error}): {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object; found {line[:60]!r}")
        row = {role: record.get(key) for role, key in layout.columns.items()}
        _check_row(where, {r: None if v is None else str(v) for r, v in row.items()})


def _check_row(where: str, row: dict[str, str | None]) -> None:
    for role in ("user", "item"):
        value = row[role]
        if not value:
            raise InputError(f"{where}: the {role} id is missing")
        if "\n" in value:
            raise InputError(f"{where}: a quote is opened and not closed: {value[:40]!r}")
    for role in ("rating", "timestamp"):
        if role in row:
            value = row[role]
            if value is None or value == "":
                raise InputError(f"{where}: the {role} is missing")
            if not (_NUMBER.fullmatch(value) and math.isfinite(float(value))):
                raise InputError(f"{where}: bad {role} {value!r}: expected a finite number")


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
        raise InputError(f"{test}: user {repeated['user'][0]!r} has more than one test item")
    lists = _read_negatives(negative, dict(zip(users, items, strict=True)))
    lacking = next((user for user in users if user not in lists), None)
    if lacking is not None:
        raise InputError(f"{negative}: no line for user {lacking!r} of {test}")
    frame = pl.concat([part.select("user", "item") for part, _ in frames])
    given = Given(users, items, [lists[user] for user in users])
    return DomainRows(name, frame, sum(rows for _, rows in frames), given)


def _read_negatives(name: str, tests: dict[str, str]) -> dict[str, list[str]]:
    _sample(name)  # missing, empty and undecodable files are reported alike
    lists: dict[str, list[str]] = {}
    with contextlib.closing(_open(name)) as file:
        for number, line in enumerate(_decoded(name, file), 1):
            if not line.strip():
                continue
            pair, *items = line.rstrip("\r\n").removesuffix("\t").split("\t")
            found = _NCF_PAIR.fullmatch(pair)
            if found is None or not items or not all(items):
                _bad_negatives(name, number, f"expected '(user, item)' and items; {line[:60]!r}")
            user, item = found.groups()
            if tests.get(user) != item:
                _bad_negatives(name, number, f"{pair} is not in the test file")
            if user in lists:
                _bad_negatives(name, number, f"a second line for user {user!r}")
            lists[user] = items
    return lists


def _bad_negatives(name: str, number: int, what: str) -> NoReturn:
    raise InputError(f"{name}:{number}: {what}")
