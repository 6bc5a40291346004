"""How the rows of a text file are laid out: separator, header, quotes, places of the columns."""

import io
from typing import NamedTuple

from conet_jax.data import columns, first_lines, formats, lines, values
from conet_jax.errors import InputError

SEPARATORS = {"tab": "\t", r"\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
_GUESSED = ("\t", ",", ";", "|", "::")
_SAMPLE_ROWS = 1000
_AMAZON_ORDER = {
    "amazon_2014": {"user": 0, "item": 1, "rating": 2, "timestamp": 3},
    "amazon_2018": {"item": 0, "user": 1, "rating": 2, "timestamp": 3},
}
_ORDER = {"user": 0, "item": 1, "rating": 2, "timestamp": 3}


class Asked(NamedTuple):
    """How a file is to be read, where that is not left to its content.

    Attributes:
      format: one of ``formats.FORMATS``.
      user_column: name of the column, or its number from 1 where there is no header; this and the
        next are found by their names where empty, and ``none`` is no such column.
      item_column: likewise.
      rating_column: likewise.
      time_column: likewise.
      weight_column: likewise, but never without being asked for.
      separator: text between the fields, or a name of ``SEPARATORS``; found where empty.
      header: ``yes``, ``no`` or ``auto``.
      skip_bad_rows: whether rows that cannot be read are left out and counted.
    """

    format: str = "auto"
    user_column: str = ""
    item_column: str = ""
    rating_column: str = ""
    time_column: str = ""
    weight_column: str = ""
    separator: str = ""
    header: str = "auto"
    skip_bad_rows: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are asked for, by role."""
        asked = {role: getattr(self, f"{columns.ASKED_AS[role]}_column") for role in columns.ROLES}
        return {role: name for role, name in asked.items() if name}


class Layout(NamedTuple):
    """Where the columns stand.

    Attributes:
      columns: by role, positions in a table, keys in JSON.
      names: of all columns as far as they are known.
      kind: ``text``, ``json`` (an object a line) or ``array`` (of objects).
      separator: between the fields of a table.
      quote: what wraps fields, if anything.
      skip: lines before the first row.
      width: fields of a row.
      named: fields that may hold something; the others come from trailing separators.
      reading: how numbers and times are written.
      label: whether the rating is yes or no, see ``columns.LABELS``.
      notes: what the user should know.
      overlooked: columns without a role that look like a rating.
      watched: whether a rating may come yet, in an object that has more keys than the first ones.
    """

    columns: dict[str, int] | dict[str, str]
    names: tuple[str, ...] = ()
    kind: str = "text"
    separator: str = ","
    quote: str | None = None
    skip: int = 0
    width: int = 0
    named: int = 0
    reading: values.Reading = values.Reading()
    label: bool = False
    notes: tuple[str, ...] = ()
    overlooked: tuple[str, ...] = ()
    watched: bool = False

    @property
    def roles(self) -> list[str]:
        """Those that are there, in the order of ``columns.ROLES``."""
        return [role for role in columns.ROLES if role in self.columns]


def find(name: str, asked: Asked) -> Layout:
    """Finds out how a text file is laid out, from its first lines.

    Raises:
      InputError: it is empty or of no known layout, or not as asked.
    """
    if asked.format in ("auto", "json", "amazon_json") and formats.is_array(name):
        return _of_objects(name, lines.array_of(name, some=_SAMPLE_ROWS), asked, "array")
    found = _sample(name)
    skip = next((n for n, line in enumerate(found) if line), 0)
    if asked.format in ("json", "amazon_json") or (
        asked.format == "auto" and found[skip].lstrip().startswith("{")
    ):
        rows = [(number, lines.object_of(line)) for number, line in enumerate(found, 1) if line]
        return _of_objects(name, rows[:_SAMPLE_ROWS], asked, "json")
    return _of_table(name, found, skip, asked)


def of_names(
    name: str, names: list[str], sample: list[list[str]], asked: Asked, **fields: object
) -> Layout:
    """The layout of what has names of columns: the keys or positions of the roles, and notes."""
    found = columns.find(name, names, asked.columns, sample)
    notes = list(found.notes)
    overlooked = columns.overlooked(names, found.places, sample)
    if asked.rating_column == columns.NONE:
        overlooked = []
    dates = sample[found.places["timestamp"]] if "timestamp" in found.places else []
    comma = fields.get("separator", ",") != ","
    reading = values.Reading(comma, found.label, values.day_first(dates))
    return Layout(
        found.places,
        tuple(names),
        reading=reading,
        label=found.label,
        notes=tuple(notes),
        overlooked=tuple(overlooked),
        **fields,
    )


def _sample(name: str) -> list[str | None]:
    """The first lines of a text file, without byte order mark and line ends; None if no text."""
    with formats.readable(name), formats.opened(name) as file:
        text = file.read(formats.SAMPLE_BYTES)
    if len(text) == formats.SAMPLE_BYTES:  # the last line may be cut in two
        text = text[: text.rfind(b"\n") + 1]
        if not text:
            raise InputError(
                f"{name}:1: the line is longer than {formats.SAMPLE_BYTES:,} bytes: expected text "
                "whose first lines are shorter"
            )
    found: list[str | None] = []
    bad = []
    for number, line in lines.decoded(name, io.BytesIO(text)):
        if isinstance(line, ValueError):
            bad.append((number, line, any(found)))
        found.append(None if isinstance(line, ValueError) else lines.bare(line))
    # All depends on the first line; a later one may be left out, if there are others.
    if bad and (not bad[0][2] or sum(map(bool, found)) < 2):
        raise InputError(f"{name}:{bad[0][0]}: {bad[0][1]}")
    if not any(line and line.strip() for line in found):
        raise InputError(f"{name}: the file is empty: expected an interaction a line")
    return found


def _of_objects(name: str, rows: list, asked: Asked, kind: str) -> Layout:
    """Keys are taken from many objects: not every object has every key."""
    records = [(number, row) for number, row in rows if isinstance(row, dict)]
    if not records:
        number, row = rows[0] if rows else (1, "[]")
        raise InputError(
            f"{name}:{number}: expected a JSON object with a user and an item on every line; "
            f"found {str(row)[:80]!r}"
        )
    names = list(dict.fromkeys(key for _, record in records for key in record))
    sample = [
        [str(record[key]) for _, record in records if record.get(key) is not None] for key in names
    ]
    found = of_names(f"{name}:{records[0][0]}", names, sample, asked, kind=kind)
    keys = {role: names[at] for role, at in found.columns.items()}
    return found._replace(columns=keys, watched="rating" not in keys | asked.columns)


def _of_table(name: str, sample: list[str | None], skip: int, asked: Asked) -> Layout:
    first, format = sample[skip], asked.format
    given = SEPARATORS.get(asked.separator, asked.separator)
    header, notes = None, []
    for separator in (given,) if given else _GUESSED:
        fields = first_lines.fields(first, separator)
        if asked.header != "no" and columns.names_both(fields):
            header = fields
            break
    else:
        separator = given or first_lines.separator(first, format)
        fields = first_lines.fields(first, separator)
        rest = [first_lines.fields(line, separator) for line in sample[skip + 1 :] if line][
            :_SAMPLE_ROWS
        ]
        by_name = any(
            not name.isdecimal() and name != columns.NONE for name in asked.columns.values()
        )
        if asked.header == "yes" or (
            asked.header == "auto" and (by_name or first_lines.is_header(fields, rest))
        ):
            header = fields
    if header is not None:
        skip = next((n for n in range(skip + 1, len(sample)) if sample[n] != ""), None)
        if skip is None:
            raise InputError(f"{name}: a header, but no rows: expected an interaction a line")
    rows = [line for line in sample[skip:] if line][:_SAMPLE_ROWS]
    numbers = {role: at for role, at in asked.columns.items() if at != columns.NONE}
    if format == "auto":
        format = first_lines.guess(name, header, separator, rows, bool(numbers))
    elif format in ("named", "recbole") and header is None:
        raise InputError(
            f"{name}:1: --format={format} needs a header line that names the user and the item, "
            f"as in user_id,item_id,rating,timestamp; found {first[:80]!r}"
        )
    if format in ("named", "recbole"):
        assert header is not None
        return _named(name, header, first, separator, rows, skip, format, asked)
    quote = '"' if len(separator) == 1 and first_lines.is_wrapped(rows, separator) else None
    split = [
        first_lines.fields(line, separator) if quote else line.split(separator) for line in rows
    ]
    width = len(split[0])
    trailing = width > 2 and split[0][-1] == ""
    named = width - trailing
    if numbers:
        places = _numbered(name, numbers, named)
    else:
        places = dict(_ORDER if format == "tsv" else _AMAZON_ORDER[format])
        least, wanted = (2, given or "\t") if format == "tsv" else (3, ",")
        wanted = separator if asked.format == "auto" else wanted
        if separator != wanted or not least <= named <= 4:
            raise InputError(
                f"{name}:{skip + 1}: --format={format} expects {least} to 4 fields separated by "
                f"{_said(wanted)}; found {split[0] and rows[0][:80]!r}"
            )
        places = {
            role: at for role, at in places.items() if at < named and role not in asked.columns
        }
        if header is not None:
            notes.append("the names in its header do not count: --format says which column is what")
    times = places.get("timestamp", width)
    dates = [row[times] for row in split if times < len(row)]
    return Layout(
        places,
        tuple(
            header
            if header is not None and len(header) >= named
            else (f"column {at + 1}" for at in range(named))
        ),
        separator=separator,
        quote=quote,
        skip=skip,
        width=width,
        named=named,
        reading=values.Reading(separator != ",", day_first=values.day_first(dates)),
        notes=tuple(notes),
    )


def _named(
    name: str,
    header: list[str],
    first: str,
    separator: str,
    rows: list[str],
    skip: int,
    format: str,
    asked: Asked,
) -> Layout:
    """The layout of a table whose header names its columns."""
    quote = '"' if format == "named" and len(separator) == 1 else None
    split = [line.split(separator) for line in rows]
    if quote:
        split = first_lines.quoted(rows, separator) or split
    width = max(len(split[0]), len(header))
    if first.startswith('"') and all(len(row) == len(header) + 1 for row in split):
        # R writes no name above the names of its rows.
        header, width = ["row name", *header], len(header) + 1
    sample = [[row[at] for row in split if at < len(row)] for at in range(len(header))]
    asked_for, notes = asked, ()
    if len(header) == 2 and separator == "\t" and not asked.columns:
        known = [_knows(role, header) for role in ("user", "item")]
        if known == [False, False]:
            asked_for = asked._replace(user_column=header[0], item_column=header[1])
            notes = ("its header names no user and no item: they are taken in this order",)
    found = of_names(
        f"{name}:1",
        header,
        sample,
        asked_for,
        separator=separator,
        quote=quote,
        skip=skip,
        width=width,
        named=len(header),
    )
    return found._replace(notes=(*notes, *found.notes))


def _knows(role: str, header: list[str]) -> bool:
    return bool(columns.candidates(role, header))


def _numbered(name: str, asked: dict[str, str], count: int) -> dict[str, int]:
    places = {}
    for role, number in asked.items():
        if not number.isdecimal() or not 1 <= int(number) <= count:
            raise InputError(
                f"{name}:1: --{columns.ASKED_AS[role]}_column={number}: expected a number from 1 "
                f"to {count}, as the file has no header"
            )
        places[role] = int(number) - 1
    for role in ("user", "item"):
        if role not in places:
            raise InputError(
                f"{name}:1: --{role}_column is missing: without a header expected the numbers of "
                "both the user's and the item's column"
            )
    return {role: places[role] for role in columns.ROLES if role in places}


def _said(separator: str) -> str:
    return {"\t": "tabs", ",": "commas"}.get(separator, repr(separator))
