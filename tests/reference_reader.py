"""What the readers should find, by the dullest means: no Polars, no csv module, all in memory.

Written from the docstring of ``conet_jax.data.readers``; ``Refused`` stands for ``InputError``.
"""

import gzip
import json
import re
import zlib

from conet_jax.data.readers import _SPELLINGS

# the table of names, not code

NUMBER = re.compile(rb"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
SEPARATORS = "\t,;|"
ORDERS = {
    "amazon_2014": ("user", "item", "rating", "timestamp"),
    "amazon_2018": ("item", "user", "rating", "timestamp"),
    "tsv": ("user", "item", "rating", "timestamp"),
}


class Refused(Exception):
    pass


def require(condition: bool) -> None:
    if not condition:
        raise Refused


def lines_of(data: bytes, sampled: bool = True) -> list[str]:
    """Lines without their ends."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise Refused from None
    if data[:3] == b"\xef\xbb\xbf":
        data = data[3:]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused from None
    lines = [line[:-1] if line[-1:] == "\r" else line for line in text.split("\n")]
    require(len(lines[0].encode()) < (1 << 18) or not sampled)
    for line in lines:
        require("\r" not in line and "\0" not in line and len(line.encode()) < (16 << 20))
    return lines


def split_quoted(text: str, separator: str, strict: bool = True) -> list[list[str]]:
    """RFC 4180, by the character; a line end in quotes is part of the field."""
    rows, row, field, state = [], [], "", "start"
    for mark in text:
        if state == "start" and mark == '"':
            state = "quoted"
        elif state == "quoted" and mark == '"':
            state = "closed"
        elif state == "quoted":
            field += mark
        elif state == "closed" and mark == '"':
            field, state = field + '"', "quoted"
        elif mark in (separator, "\n"):
            blank = mark == "\n" and not row and state == "start"  # "" in quotes is none
            row, field, state = [] if blank else [*row, field], "", "start"
            if mark == "\n":
                rows, row = [*rows, row], []
        else:
            require(state != "closed" or not strict)
            field, state = field + mark, "plain"
        require(len(field) <= 131_072 or not strict)
    require(state != "quoted" or not strict)
    if row or field or state != "start":
        rows.append([*row, field])
    return rows


def roles_of(names: list[str]) -> dict[str, int]:
    plain = [name.split(":")[0].lower() for name in names]
    plain = ["".join(c for c in name if c not in "_-" and not c.isspace()) for name in plain]
    found = {}
    for role, spellings in _SPELLINGS.items():
        known = [name for name in spellings if name in plain]
        if known:
            found[role] = plain.index(known[0])
    if "user" in found and "item" in found:
        found["twice"] = any(plain.count(plain[at]) > 1 for at in found.values())
    return found


def read(data: bytes, format: str = "auto") -> list[tuple]:
    """(user, item, rating, timestamp) of every row, None where the file has no such column."""
    lines = lines_of(data)
    require(any(line.strip() for line in lines))
    first = next(line for line in lines if line)
    if format == "amazon_json" or (format == "auto" and first.lstrip().startswith("{")):
        rows = json_rows(lines, first)
    else:
        rows = text_rows(lines, format)
    require(len(rows) > 0)
    return rows


def json_rows(lines: list[str], first: str) -> list[tuple]:
    def parse(line: str) -> dict:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise Refused from None
        require(type(record) is dict)
        return record

    names = list(parse(first))
    places = roles_of(names)
    require("user" in places and "item" in places)
    keys = [names[places[role]] if role in places else None for role in _SPELLINGS]
    rows = []
    for line in lines:
        if line.strip():
            record = parse(line)
            user, item = (record.get(key) for key in keys[:2])
            for name in (user, item):
                require(type(name) in (str, int))
            numbers = [record.get(key) if key else "absent" for key in keys[2:]]
            for value in numbers:
                require(type(value) in (str, int, float))
            numbers = [None if value == "absent" else str(value) for value in numbers]
            rows.append(row_of(str(user), str(item), *numbers))
    return rows


def text_rows(lines: list[str], format: str) -> list[tuple]:
    at = next(n for n, line in enumerate(lines) if line)
    tabs = "\t" in lines[at] if format == "auto" else format == "tsv"
    header, separator = None, "\t" if tabs else ","
    for mark in reversed(SEPARATORS):
        names = (split_quoted(lines[at], mark, strict=False) or [[]])[0]
        if {"user", "item"} <= roles_of(names).keys():
            header, separator = names, mark
    if header is not None:
        at = next((n for n, line in enumerate(lines) if n > at and line), None)
        require(at is not None)
    body = lines[at:]
    sample = [line for line in body if line][:1000]
    if format == "auto":
        format = guess(header, separator, sample)
    if format in ("named", "recbole"):
        require(header is not None)
        places, count = roles_of(header), len(header)
        require(not places.pop("twice"))
    else:
        require(separator == ("\t" if format == "tsv" else ","))
        count = len(sample[0].split(separator))
        if count > 2 and sample[0].endswith(separator):
            count -= 1
        require((2 if format == "tsv" else 3) <= count <= 4)
        places = {role: n for n, role in enumerate(ORDERS[format]) if n < count}
    if format == "named":
        records = split_quoted("\n".join(body), separator)
        width = len(records[0]) if records else 0
        records = [row for row in records if row]
    else:
        records = [line.split(separator) for line in body if line]
        width = len(records[0])
    require(max(places.values()) < width)
    rows = []
    for record in records:
        require(max(map(len, record)) <= 131_072)
        require(not any(record[count:]))
        values = [record[n] if n < len(record) else "" for n in places.values()]
        named = dict(zip(places, values, strict=True))
        rows.append(row_of(*(named.get(role) for role in _SPELLINGS)))
    return rows


def guess(header: list[str] | None, separator: str, sample: list[str]) -> str:
    if header is not None:
        types = [name.strip().rpartition(":")[2] for name in header if ":" in name]
        known = {"token", "float", "token_seq", "float_seq"}
        return "recbole" if len(types) == len(header) and set(types) <= known else "named"
    if separator == "\t":
        return "tsv"
    rows = [line.split(",") + [""] for line in sample]
    for format, (user, item) in (("amazon_2014", (0, 1)), ("amazon_2018", (1, 0))):
        users = sum(re.fullmatch("A[0-9A-Z]{9,}", row[user]) is not None for row in rows)
        items = sum(
            re.fullmatch("B[0-9A-Z]{9}|[0-9]{1,9}[0-9X]", row[item]) is not None for row in rows
        )
        if min(users, items) > 0.8 * len(rows):
            return format
    raise Refused


def row_of(user: str, item: str, rating: str | None, time: str | None) -> tuple:
    for name in (user, item):
        require(bool(name) and not set(name) & set("\n\r\0"))
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise Refused from None
    return (user, item, *(None if x is None else number_of(x) for x in (rating, time)))


def number_of(text: str) -> float:
    require(NUMBER.fullmatch(text.encode("utf-8", "replace")) is not None)
    value = float(text)
    require(value - value == 0)
    return value


def read_ncf(train: bytes, test: bytes, negative: bytes) -> tuple[list[tuple], dict]:
    """(user, item) of train and then test; {test user: (item, negatives)} in the test's order."""
    rows = [[row[:2] for row in read(data, "tsv")] for data in (train, test)]
    require(len({user for user, _ in rows[1]}) == len(rows[1]))
    tests, lists = dict(rows[1]), {}
    lines = lines_of(negative)
    require(any(line.strip() for line in lines))
    for line in lines:
        if line:
            pair, *items = (line[:-1] if line.endswith("\t") else line).split("\t")
            require(pair[:1] == "(" and pair[-1:] == ")" and bool(items) and all(items))
            user, comma, item = pair[1:-1].partition(",")
            require(bool(user) and user in tests and user not in lists)
            require(tests[user] == item.lstrip())
            lists[user] = items
    require(lists.keys() == tests.keys())
    return rows[0] + rows[1], {user: (item, lists[user]) for user, item in rows[1]}


def read_ids(data: bytes) -> list[str]:
    lines = lines_of(data, sampled=False)
    while lines and not lines[-1]:
        lines.pop()
    require(bool(lines) and all(lines))
    return lines
