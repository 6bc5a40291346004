"""Text a line at a time in Python: which finds the line at fault, and goes on after it.

A record is the number of its line and its values by role; a ``ValueError`` in their place says what
is wrong with the row.
"""

import ast
import codecs
import collections
import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from conet_jax import files
from conet_jax.data import columns, formats
from conet_jax.errors import InputError

if TYPE_CHECKING:
    from conet_jax.data.layout import Layout

FIELD = csv.field_size_limit()
_ARRAY_BYTES = 2 << 30
_SPACE = re.compile(r"[ \t\n\r]*")

Record = tuple[int, list[Any] | ValueError]


def decoded(name: str, file: io.BufferedIOBase) -> Iterator[tuple[int, str | ValueError]]:
    """Yields the number of each line, from 1, and its text with its end."""
    for number, line in enumerate(iter(lambda: file.readline(formats.LINE_BYTES), b""), 1):
        if len(line) == formats.LINE_BYTES:
            raise InputError(
                f"{name}:{number}: the line is longer than {formats.LINE_BYTES >> 20} MiB: "
                "expected one interaction a line"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield number, ValueError(f"not UTF-8 text: {line[:60]!r}; save the file as UTF-8")
            continue
        if "\0" in text or "\r" in bare(text):
            yield (
                number,
                ValueError(
                    "a NUL character, or a stray line end within the line: "
                    f"{text[:60]!r}; expected text whose lines end in LF or CR LF"
                ),
            )
        else:
            yield number, text


def strictly(name: str, file: io.BufferedIOBase) -> Iterator[tuple[int, str]]:
    """``decoded`` without line ends, and without patience.

    Raises:
      InputError: a line is no text.
    """
    for number, line in decoded(name, file):
        if isinstance(line, ValueError):
            raise InputError(f"{name}:{number}: {line}")
        yield number, bare(line)


def bare(line: str) -> str:
    """Returns a line without its end."""
    return line.removesuffix("\n").removesuffix("\r")


def records(name: str, layout: "Layout") -> Iterator[Record]:
    """Yields the records of a file.

    Raises:
      InputError: the file as a whole cannot be read any further.
    """
    if layout.kind == "array":
        yield from _of_objects(name, array_of(name), layout)
        return
    with formats.opened(name) as file:
        found = itertools.islice(decoded(name, file), layout.skip, None)
        if layout.kind == "json":
            whole = ((n, line) for n, line in found if isinstance(line, ValueError) or line.strip())
            yield from _of_objects(name, ((n, object_of(line)) for n, line in whole), layout)
        elif layout.quote:
            yield from _quoted(found, layout)
        else:
            yield from _split(found, layout)


def _split(found: Iterator[tuple[int, str | ValueError]], layout: "Layout") -> Iterator[Record]:
    for number, line in found:
        if isinstance(line, ValueError):
            yield number, line
        elif bare(line):
            yield number, _picked(layout, bare(line).split(layout.separator))


def _quoted(found: Iterator[tuple[int, str | ValueError]], layout: "Layout") -> Iterator[Record]:
    """Rows with the numbers of their first lines; after a bad one, from its second line on."""
    waiting: collections.deque = collections.deque()
    taken: list[tuple[int, str | ValueError]] = []

    def feed() -> Iterator[str]:
        while (entry := waiting.popleft() if waiting else next(found, None)) is not None:
            taken.append(entry)
            if isinstance(entry[1], ValueError):
                raise entry[1]
            yield entry[1]

    def parser() -> Iterator[list[str]]:
        return csv.reader(feed(), delimiter=layout.separator, quotechar=layout.quote, strict=True)

    rows = parser()
    while True:
        taken.clear()
        try:
            fields = next(rows)
            values = _picked(layout, fields) if fields else []
            if isinstance(values, list) and any("\n" in (value or "") for value in values[:2]):
                values = ValueError(
                    f"a quote is opened and not closed: {values[:2]!r:.50}; an id holds no line end"
                )
        except StopIteration:
            return
        except csv.Error as error:
            values = ValueError(
                f"a quote is opened and not closed, or text follows it ({error}); a quote within a "
                "quoted field is written twice"
            )
        except ValueError as error:  # a line that is no text
            values = error if len(taken) == 1 else ValueError(f"a quote is not closed: {error}")
        number = taken[0][0]
        if isinstance(values, ValueError):
            waiting.extendleft(reversed(taken[1:]))
            rows = parser()
        if values:
            yield number, values


def _picked(layout: "Layout", fields: list[str]) -> list[str | None] | ValueError:
    if any(fields[layout.named :]):  # the others come from trailing separators
        return ValueError(
            f"{len(fields)} fields where {layout.named} are expected, as in the first row"
        )
    if any(len(field) > FIELD for field in fields):
        return ValueError(f"a field of more than {FIELD:,} characters: shorten it")
    places = [layout.columns[role] for role in layout.roles]
    if max(places[:2]) >= len(fields):
        missing = layout.roles[0] if places[0] >= len(fields) else layout.roles[1]
        return ValueError(f"the {missing} id is missing: {len(fields)} of {layout.named} fields")
    return [fields[at] if at < len(fields) else None for at in places]


# JSON.


def object_of(line: str | ValueError) -> dict | ValueError:
    """Returns the object of a line: JSON, or the Python that older data sets are written in."""
    if isinstance(line, ValueError):
        return line
    text = bare(line)
    try:
        try:
            record = files.parse_json(text)
        except ValueError:
            if not re.match(r"\s*\{\s*u?'", text):
                raise
            with warnings.catch_warnings():  # of escapes in their texts
                warnings.simplefilter("ignore")
                record = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        return ValueError(f"not JSON ({reason}): {text[:60]!r}; expected one object a line")
    if not isinstance(record, dict):
        return ValueError(f"expected a JSON object on every line; found {text[:60]!r}")
    return record


def array_of(name: str, some: int | None = None) -> Iterator[tuple[int, dict | ValueError]] | list:
    """Yields the objects of a file that is one JSON array, with the lines on which they begin.

    Args:
      name: the file.
      some: how many to return, as a list; what follows them is not looked at.

    Raises:
      InputError: it is no JSON, or too large.
    """
    found = _array(name)
    return found if some is None else list(itertools.islice(found, some))


def _array(name: str) -> Iterator[tuple[int, dict | ValueError]]:
    with formats.opened(name) as file:
        data = file.read(_ARRAY_BYTES + 1)
    if len(data) > _ARRAY_BYTES:
        raise InputError(f"{name}: a JSON array of more than 2 GiB: expected an object a line")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{number}: not UTF-8 text; save the file as UTF-8") from None
    del data
    decoder = json.JSONDecoder()
    at, number, counted, first = text.index("[") + 1, 1, 0, True
    while True:
        at = _SPACE.match(text, at).end()
        number, counted = number + text.count("\n", counted, at), at
        mark = text[at : at + 1]
        if mark == "]":
            break
        try:
            if not first:
                if mark != ",":
                    raise ValueError("expected , or ] after an object")
                at = _SPACE.match(text, at + 1).end()
                number, counted = number + text.count("\n", counted, at), at
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise InputError(
                f"{name}:{number}: not JSON ({reason}): {text[at : at + 60]!r}; expected one array "
                "of objects"
            ) from None
        first = False
        if not isinstance(record, dict):
            record = ValueError(f"expected a JSON object; found {record!r:.60}")
        yield number, record
    if text[at + 1 :].strip(" \t\n\r"):
        raise InputError(f"{name}:{number}: text follows the JSON array: expected one array alone")


def _of_objects(
    name: str, found: Iterator[tuple[int, dict | ValueError]], layout: "Layout"
) -> Iterator[Record]:
    keys = [layout.columns[role] for role in layout.roles]
    known = set(layout.names)
    for number, record in found:
        if isinstance(record, ValueError):
            yield number, record
            continue
        for key in record.keys() - known:
            known.add(key)
            if layout.watched and columns.candidates("rating", [key]):
                raise InputError(
                    f"{name}:{number}: the key {key!r} first stands here: expected it among the "
                    "first objects, by which the columns are known; --rating_column=none leaves it"
                )
        yield number, [record.get(key) for key in keys]
