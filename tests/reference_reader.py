"""What the readers should find, by the dullest means: no Polars, no csv module, all in memory.

Written from the docstrings of ``conet_jax.data``'s ``readers``, ``layout``, ``columns`` and
``values``, whose tables of words it shares; ``Refused`` stands for ``InputError``.
"""

import ast
import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib

from conet_jax.data import columns, values

NUMBER = re.compile(rb"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
SEPARATORS = ("\t", ",", ";", "|", "::")
ROLES = ("user", "item", "rating", "timestamp")
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


def unpacked(data: bytes) -> bytes:
    try:
        if data[:2] == b"\x1f\x8b":
            return gzip.decompress(data)
        if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", data):
            return bz2.decompress(data)
        if data[:6] == b"\xfd7zXZ\0":
            return lzma.decompress(data)
        if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                names = [name for name in file.namelist() if name[-1:] != "/"]
                names = [name for name in names if not name.startswith("__MACOSX/")]
                require(len(names) == 1 and names[0] != "[Content_Types].xml")
                return file.read(names[0])
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile):
        raise Refused from None
    except (NotImplementedError, RuntimeError, ValueError):
        raise Refused from None
    return data


def text_of(data: bytes) -> str:
    data = unpacked(data)
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = data.decode("utf-16")
            return text[1:] if text[:1] == "\ufeff" else text  # a second mark: that of UTF-8
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused from None


def lines_of(data: bytes, sampled: bool = True) -> list[str]:
    """Lines without their ends."""
    text = text_of(data)
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


def fields_of(line: str, separator: str) -> list[str]:
    if separator == "::" or any(len(field) > 131_072 for field in line.split(separator)):
        return line.split(separator)
    return (split_quoted(line, separator, strict=False) or [[]])[0]


# Names of columns.


def words_of(name: str) -> list[str]:
    for kind in ("token", "float", "token_seq", "float_seq"):
        name = re.sub(rf":{kind}\s*$", "", name)
    found, before = [""], ""
    for mark in name:
        camel = mark in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" and re.match("[a-z0-9]", before)
        if not mark.isalnum() and not re.match(r"[^\W_]", mark) or camel:
            found.append("")
        found[-1] += mark if re.match(r"[^\W_]", mark) else ""
        before = mark
    return [word for text in found for word in re.findall(r"[^\W_]+", text.lower())]


def rank(role: str, name: str) -> tuple | None:
    words = words_of(name)
    ends = ("", "id", "ids", "key", "code", "no", "number", "isbn")
    for front in range(len(words)):
        if not set(words[:front]) <= {*columns._PEOPLE, *columns._THINGS, "review", "rating"}:
            return None
        rest = "".join(words[front:])
        if rest in columns.SPELLINGS[role]:
            return front, columns.SPELLINGS[role].index(rest)
        if role == "item" and rest in [a + b for a in columns._THINGS for b in ends]:
            return front, 999
    return None


def best(role: str, names: list[str], taken=()) -> list[int]:
    ranks = [(rank(role, name), at) for at, name in enumerate(names) if at not in taken]
    ranks = [(found, at) for found, at in ranks if found is not None]
    return [at for found, at in ranks if found == min(ranks)[0]]


def names_both(names: list[str]) -> bool:
    return bool(best("user", names) and best("item", names))


def plain(name: str) -> str:
    return "".join(words_of(name))


def rating_like(names: list[str], taken, samples: list[list[str]]) -> tuple[list[int], bool]:
    number = re.compile(r"\s*[+-]?([0-9]+[.,]?[0-9]*|true|false)\s*", re.I)
    numeric = [
        at
        for at in range(len(names))
        if at not in taken and samples[at] and all(number.fullmatch(x) for x in samples[at])
    ]
    found = []
    for at in numeric:
        words = set(words_of(names[at]))
        if words & columns._RATING_WORDS and not words & columns._NOT_OF_THE_ROW:
            found.append(at)
    if found:
        return found, False
    for label in columns.LABELS:
        for at in numeric:
            if plain(names[at]) in (label, "is" + label):
                return [at], True
    return [], False


def places_of(
    names: list[str], samples: list[list[str]], weight: str
) -> tuple[dict[str, int], bool]:
    """Columns by role, and whether the rating is yes or no."""
    places, label = {}, False
    if weight:
        named = [at for at, name in enumerate(names) if name == weight]
        named = named or [at for at, name in enumerate(names) if plain(name) == plain(weight)]
        require(len(named) == 1)
        places["weight"] = named[0]
    for role in ROLES:
        found = best(role, names, places.values())
        if role == "rating" and not found:
            found, label = rating_like(names, places.values(), samples)
        if role in ("user", "item") and not found and len(names) == 2:
            known = "item" if role == "user" else "user"
            at = [places[known]] if known in places else best(known, names)
            if len(at) == 1:
                name = names[1 - at[0]]
                other = rank("rating", name) or rank("timestamp", name)
                other = other or plain(name) in columns.LABELS
                other = other or set(words_of(name)) & columns._RATING_WORDS
                found = [] if other else [1 - at[0]]
        require(len(found) < 2)
        if found:
            places[role] = found[0]
    require({"user", "item"} <= places.keys())
    return places, label


# Files.


def read(data: bytes, format: str = "auto", weight: str = "") -> list[tuple]:
    """(user, item, rating, timestamp) of every row, None where the file has no such column.

    With the name of a column of weights, the weight comes last.
    """
    require(format != "parquet")
    plain_bytes = unpacked(data)
    if plain_bytes[:2] in (b"\xff\xfe", b"\xfe\xff"):
        plain_bytes = text_of(data).encode()
    json_format = format in ("auto", "json", "amazon_json")
    head = plain_bytes.removeprefix(b"\xef\xbb\xbf")[: (1 << 12)]
    if json_format and re.match(rb"\s*\[\s*(\{|\]\s*$)", head):
        rows = array_rows(text_of(data), weight)
    else:
        lines = lines_of(data)
        require(any(line.strip() for line in lines))
        first = next(line for line in lines if line)
        if format in ("json", "amazon_json") or (
            format == "auto" and first.lstrip().startswith("{")
        ):
            rows = json_rows([parsed(line) for line in lines if line.strip()], weight)
        else:
            rows = text_rows(lines, format, weight)
    rows = [row for row in rows if row is not None]
    require(len(rows) > 0)
    largest = max((row[3] for row in rows if row[3] is not None), default=0)
    unit = 1e9 if largest >= 1e17 else 1e6 if largest >= 1e14 else 1e3 if largest >= 1e11 else 1
    return [(*row[:3], None if row[3] is None else row[3] / unit, *row[4:]) for row in rows]


def parsed(line: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        require(re.match(r"\s*\{\s*u?'", line) is not None)
        try:
            record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise Refused from None
    require(type(record) is dict)
    return record


def array_rows(text: str, weight: str) -> list[tuple | None]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused from None
    require(all(type(record) is dict for record in records))
    return json_rows(records, weight)


def json_rows(records: list[dict], weight: str) -> list[tuple | None]:
    names = list(dict.fromkeys(key for record in records for key in record))
    samples = [[str(r[name]) for r in records if r.get(name) is not None] for name in names]
    require(bool(names))
    places, label = places_of(names, samples, weight)
    rows = []
    for record in records:
        named = {role: record.get(names[at]) for role, at in places.items()}
        rows.append(row_of(named, label, days_first(samples, places), comma=False))
    return rows


def text_rows(lines: list[str], format: str, weight: str) -> list[tuple | None]:
    at = next(n for n, line in enumerate(lines) if line)
    first = lines[at]
    header, separator = None, None
    for mark in SEPARATORS:
        if header is None and names_both(fields_of(first, mark)):
            header, separator = fields_of(first, mark), mark
    if header is None:
        if format in ("tsv", "amazon_2014", "amazon_2018"):
            separator = "\t" if format == "tsv" else ","
        else:
            known = [mark for mark in ("\t", ",", "::", ";", "|") if mark in first]
            separator = known[0] if known else ","
        below = [fields_of(line, separator) for line in lines[at + 1 :] if line]
        if weight or is_header(fields_of(first, separator), below):
            header = fields_of(first, separator)
    if header is not None:
        at = next((n for n, line in enumerate(lines) if n > at and line), None)
        require(at is not None)
    body = lines[at:]
    sample = [line for line in body if line][:1000]
    given = format
    if format == "auto":
        format = guess(header, separator, sample)
    if format in ("named", "recbole"):
        require(header is not None)
        return named_rows(header, first, separator, body, sample, format, weight)
    wrapped = separator != "::" and is_wrapped(sample, separator)
    split = [fields_of(x, separator) if wrapped else x.split(separator) for x in sample]
    count = width = len(split[0])
    if count > 2 and split[0][-1] == "":
        count -= 1
    if given != "auto":
        require(separator == ("\t" if format == "tsv" else ","))
    require((2 if format == "tsv" else 3) <= count <= 4)
    places = {role: n for n, role in enumerate(ORDERS[format]) if n < count}
    samples = [[row[n] for row in split if n < len(row)] for n in range(width)]
    if wrapped:
        records = [row for row in split_quoted("\n".join(body), separator) if row]
        require(not any("\n" in x for row in records for x in row[:2]))
    else:
        records = [line.split(separator) for line in body if line]
    return records_of(records, places, count, separator, False, days_first(samples, places))


def named_rows(header, first, separator, body, sample, format, weight) -> list[tuple | None]:
    quoted = format == "named" and separator != "::"
    split = [line.split(separator) for line in sample]
    if quoted:
        split = split_quoted("\n".join(sample), separator, strict=False)
    if quoted and any(len(x) > 131_072 for row in split for x in row):
        bad = next(n for n, row in enumerate(split) if any(len(x) > 131_072 for x in row))
        split = split[:bad] or [line.split(separator) for line in sample]
    if first.startswith('"') and all(len(row) == len(header) + 1 for row in split):
        header = ["row name", *header]
    samples = [[row[n] for row in split if n < len(row)] for n in range(len(header))]
    unnamed = not weight and not any(best(r, header) for r in ROLES[:2])
    if len(header) == 2 and separator == "\t" and unnamed:
        places, label = {"user": 0, "item": 1}, False
    else:
        places, label = places_of(header, samples, weight)
    if quoted:
        records = [row for row in split_quoted("\n".join(body), separator) if row]
    else:
        records = [line.split(separator) for line in body if line]
    return records_of(records, places, len(header), separator, label, days_first(samples, places))


def records_of(records, places, count, separator, label, day_first) -> list[tuple | None]:
    rows = []
    for record in records:
        require(max(map(len, record)) <= 131_072)
        require(not any(record[count:]))
        require(max(places["user"], places["item"]) < len(record))
        require(not any("\n" in record[places[role]] for role in ("user", "item")))
        named = {r: record[n] if n < len(record) else None for r, n in places.items()}
        rows.append(row_of(named, label, day_first, comma=separator != ","))
    return rows


def is_header(fields: list[str], below: list[list[str]]) -> bool:
    names = [field.strip() for field in fields]
    if len(names) < 2 or not below or len(set(names)) < len(names):
        return False
    if any(missing(name) or is_number(name) for name in names):
        return False
    columns_below = [[row[n] for row in below if n < len(row)] for n in range(len(fields))]
    if any(field in values for field, values in zip(fields, columns_below, strict=True)):
        return False
    for field in fields:
        if re.search(r"[_ -](id|ID|Id)$|[a-z]I[dD]$", field.strip()):
            return True
        ranks = [rank(role, field) for role in ROLES]
        if any(found is not None and found[1] != 999 for found in ranks):
            return True
    if any(values and all(map(is_number, values)) for values in columns_below):
        return True
    if any(mark in "0123456789" for field in fields for mark in field):
        return False
    digits = [[any(m in "0123456789" for m in x) for x in values] for values in columns_below]
    return any(len(found) > 2 and all(found) for found in digits)


def is_wrapped(sample: list[str], separator: str) -> bool:
    for at in (0, 1):
        found = [line.split(separator)[at] for line in sample if line.count(separator) >= at]
        if found and all(len(x) > 1 and x[0] == '"' and x[-1] == '"' for x in found):
            return True
    return False


def guess(header: list[str] | None, separator: str, sample: list[str]) -> str:
    if header is not None:
        types = [name.strip().rpartition(":")[2] for name in header if ":" in name]
        known = {"token", "float", "token_seq", "float_seq"}
        return "recbole" if len(types) == len(header) and set(types) <= known else "named"
    if separator != ",":
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


# Values.


def missing(value) -> bool:
    if type(value) is float:
        return value != value
    return value is None or (type(value) is str and value.strip().lower() in values.MISSING)


def row_of(named: dict, label: bool, day_first: bool, comma: bool) -> tuple | None:
    """A row in the order of ROLES, None of one without an id."""
    if missing(named["user"]) or missing(named["item"]):
        return None
    ids = []
    for role in ("user", "item"):
        name = named[role]
        if type(name) is float:
            require(name == name // 1 and abs(name) != float("inf"))
            name = int(name)
        require(type(name) in (str, int))
        name = str(name)
        require(not set(name) & set("\n\r\0"))
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise Refused from None
        ids.append(name)
    rating = time = None
    if "rating" in named:
        rating = named["rating"]
        if label and str(rating).strip().lower() in ("true", "false"):
            rating = float(str(rating).strip().lower() == "true")
        else:
            rating = number_of(rating, comma)
    if "timestamp" in named:
        time = named["timestamp"]
        require(not missing(time))
        decimal = comma and type(time) is str and re.fullmatch("[+-]?[0-9]+,[0-9]+", time)
        if type(time) is str and not is_number(time) and not decimal:
            try:
                time = values.time_of(time, values.Reading(day_first=day_first))
            except ValueError:
                raise Refused from None

        else:
            time = number_of(time, comma)
    if "weight" not in named:
        return (*ids, rating, time)
    weight = number_of(named["weight"], comma)
    require(1e-30 <= weight <= 1e30)
    return (*ids, rating, time, weight)


def days_first(samples: list[list[str]], places: dict[str, int]) -> bool:
    return "timestamp" in places and values.day_first(samples[places["timestamp"]])


def is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.encode("utf-8", "replace")) is not None


def number_of(value, comma: bool) -> float:
    require(type(value) in (str, int, float) and not missing(value))
    text = str(value)
    if comma and re.fullmatch("[+-]?[0-9]+,[0-9]+", text):
        text = text.replace(",", ".")
    require(is_number(text))
    found = float(text)
    require(found - found == 0)
    return found


def read_ncf(train: bytes, test: bytes, negative: bytes) -> tuple[list[tuple], dict]:
    """(user, item) of train and then test; {test user: (item, negatives)} in the test's order."""
    rows = [[row[:2] for row in ncf_rows(data)] for data in (train, test)]
    require(len({user for user, _ in rows[1]}) == len(rows[1]))
    tests, lists = dict(rows[1]), {}
    lines = lines_of(negative, sampled=False)
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


def ncf_rows(data: bytes) -> list[tuple]:
    """A table without a header, whatever its first line says."""
    lines = lines_of(data)
    require(any(line.strip() for line in lines))
    body = [line for line in lines if line]
    width = len(body[0].split("\t"))
    wrapped = is_wrapped(body, "\t")
    if wrapped:
        width = len(fields_of(body[0], "\t"))
    last = fields_of(body[0], "\t")[-1] if wrapped else body[0].split("\t")[-1]
    count = width - (width > 2 and last == "")
    require(2 <= count <= 4)
    records = [line.split("\t") for line in body]
    if wrapped:
        records = [row for row in split_quoted("\n".join(lines), "\t") if row]
    places = {role: n for n, role in enumerate(ROLES) if n < count and role != "timestamp"}
    rows = records_of(records, places, count, "\t", False, False)
    rows = [row for row in rows if row is not None]
    require(len(rows) > 0)
    return rows


def read_ids(data: bytes) -> list[str]:
    lines = lines_of(data, sampled=False)
    while lines and not lines[-1]:
        lines.pop()
    require(bool(lines) and all(lines))
    return lines
