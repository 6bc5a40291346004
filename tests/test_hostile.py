"""Hostile input: what loads is what a slow, simple reader finds; all else is a one-line error.

Some hundred generated inputs by default; tens of thousands, new ones each time, with

    python -m pytest -m slow tests/test_hostile.py

which ends with how many inputs of each kind were tried, loaded and refused.
"""

import bz2
import contextlib
import csv
import datetime as dt
import gzip
import io
import itertools
import json
import lzma
import math
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import zipfile
from functools import partial

import hypothesis
import numpy as np
import pytest
import reference_reader as reference
from absl import flags
from hypothesis import strategies as st
from ml_collections import config_flags
from test_launch import ROOT, assert_one_line_error, launch

from conet_jax import cli, files
from conet_jax.config import default_config, flatten
from conet_jax.data import readers, recbole, store, types
from conet_jax.data.assemble import from_arrays
from conet_jax.data.types import content_hash
from conet_jax.errors import InputError
from conet_jax.run.fit import fit
from conet_jax.run.logs import MetricsFile
from conet_jax.run.workdir import stored_config
from conet_jax.studies import compare, points, runner, search, table2

COUNTS: dict[str, list[int]] = {}  # kind -> [tried, loaded]


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print(f"\n{'generated inputs':28}{'tried':>10}{'loaded':>10}{'refused':>10}")
        total = [sum(counts[at] for counts in COUNTS.values()) for at in (0, 1)]
        for kind, (tried, loaded) in [*COUNTS.items(), ("all", total)]:
            print(f"{kind:28}{tried:10,}{loaded:10,}{tried - loaded:10,}")


def sizes(fast: int, full: int):
    """How many inputs a test tries: few and always the same, or many new ones."""
    full = pytest.param(full, marks=pytest.mark.slow, id=f"{full}")
    return pytest.mark.parametrize("size", [pytest.param(fast, id="few"), full])


def generate(size: int, kind: str, strategy: st.SearchStrategy, check) -> None:
    """Calls ``check``, which says of each input whether it was loaded, with generated ones."""
    counts = COUNTS.setdefault(kind, [0, 0])

    def counted(value) -> None:
        loaded = check(value)
        counts[0] += len(loaded)
        counts[1] += sum(loaded)

    settings = hypothesis.settings(
        max_examples=size,
        deadline=None,
        database=None,
        derandomize=size < 100,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[phase for phase in hypothesis.Phase if size < 100 or phase.name == "generate"],
    )
    settings(hypothesis.given(strategy)(counted))()


def refusal(call) -> object:
    """The result of a call, or its error, which is one line."""
    try:
        return call()
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return error


def check_table(
    path: pathlib.Path, data: bytes, format: str, rows: list | None = None, *, weight: str = ""
) -> bool:
    """Compares our rows with the reference's, and with those that were written if given."""
    path.write_bytes(data)
    roles = (*ROLES, "weight") if weight else ROLES

    def ours() -> list[tuple]:
        found = readers.read(path, format, weight_column=weight)
        frame = found.frame.collect()
        assert len(frame) == found.rows > 0
        assert found.left_out["bad_rows"] == 0
        absent = [None] * len(frame)
        return list(
            zip(*(frame[r].to_list() if r in frame else absent for r in roles), strict=True)
        )

    try:
        expected = reference.read(data, format, weight)
    except reference.Refused:
        expected = None
    found = refusal(ours)
    if isinstance(found, InputError):
        assert expected is None, f"refused, though it can be read: {found}"
    else:
        assert same_rows(found, expected)
    assert rows is None or same_rows(expected, rows)
    return expected is not None


def same_rows(found: list[tuple] | None, expected: list[tuple] | None) -> bool:
    """Whether rows are equal, but for the last bit of a time that was divided."""
    if found is None or expected is None or len(found) != len(expected):
        return found is expected
    return all(
        one[:3] + one[4:] == two[:3] + two[4:]
        and (one[3] == two[3] or math.isclose(one[3] or 0, two[3] or 0, rel_tol=1e-15))
        for one, two in zip(found, expected, strict=True)
    )


ROLES = ("user", "item", "rating", "timestamp")
HEADERS = {
    "user": ("user_id", "User", "reviewerID", "uid:token", "user id", "review/userId"),
    "item": ("item_id", "asin", "ISBN", "ProductId", "item_id:token", "artistID", "beer/beerId"),
    "rating": ("rating", "Score", "overall", "rating:float", "Book-Rating", "review/score"),
    "timestamp": ("timestamp", "unixReviewTime", "Time", "timestamp:float", "review_date"),
}
NASTY = [
    *("", " ", "\t", ",", ";", "|", '"', '""', "'", "\\", "\\n", "\r", "\n", "\r\n", "\0", "\x1a"),
    *("\ufeff", "\u2028", "\x85", "\x0b", "\x1c", "é", "日本", "😀", "\u202e", "a\u0301", "٣"),
    *("NaN", "nan", "inf", "-inf", "Infinity", "null", "None", "true", "#", "//", "{", "}", "[]"),
    *(
        "1e308",
        "1e309",
        "-1e309",
        "1e-400",
        "0x10",
        "1_0",
        "1,5",
        "+5",
        "-0",
        ".5",
        "5.",
        ".",
        "5e",
    ),
    *("9007199254740993", "123456789012345678901234567890", "-62135596800", "253402300800e9"),
    *("0.1000000000000000055511151231257827", "2.2250738585072011e-308", "00", "007", "x^", "PK"),
    *("A39HTATAQ9V7YF", "B00007M0CP", "user_id", "=1+1", "(0, 20)", "\\u0000", "\\ud800"),
    *("::", "NULL", "N/A", "<NA>", "4,5", "2017-08-07", "7/8/2017", "1502144324000", "artistID"),
]
characters = st.characters(exclude_categories=["Cs"])
plain_ids = st.text(characters, min_size=1, max_size=6) | st.sampled_from(NASTY)
# Without a byte order mark: where the file begins with the id, that would be one.
ids = plain_ids.filter(lambda name: name and not set(name) & set("\n\r\0\ufeff"))
reals = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["5", "4.0", "1369699200", "1.", ".5", "+5", "-0", "1e-400", "1E5"]),
)
times = reals | st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1)).map(str)
numbers = reals | st.sampled_from(NASTY) | st.floats().map(repr) | times
ENDS = st.sampled_from(["\n", "\r\n"])
SEPARATORS = ("\t", ",", ";", "|", "::")


def good_rows(ids: st.SearchStrategy, reals: st.SearchStrategy, times: st.SearchStrategy):
    """Rows of which one has ids, and others may have none."""
    row = st.tuples(ids, ids, reals, times)
    return st.lists(row, min_size=1, max_size=8).filter(lambda rows: any(map(has_ids, rows)))


def has_ids(row: tuple) -> bool:
    return not any(reference.missing(name) for name in row[:2])


def expected_rows(rows: list[tuple], columns: int) -> list[tuple]:
    """What a reader of the first so many columns makes of rows, in seconds since 1970."""
    kept = []
    for user, item, *rest in filter(has_ids, rows):
        values = [number_or_date(value) for value in rest[: columns - 2]]
        kept.append([str(user), str(item), *values, *[None] * (4 - columns)])
    latest = max((row[3] for row in kept), default=0) if columns > 3 else 0
    unit = next((n for least, n in ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3)) if latest >= least), 1)
    return [(*row[:3], row[3] if row[3] is None else row[3] / unit) for row in kept]


def number_or_date(text) -> float:
    try:
        return float(text)
    except ValueError:
        return (dt.datetime.fromisoformat(text) - dt.datetime(1970, 1, 1)).total_seconds()


@st.composite
def tables(draw, good: bool):
    """(bytes, format, rows or None): a text table; if good, one that has to be read."""
    format = draw(
        st.sampled_from(["named", "tsv", "amazon_2014", "amazon_2018", "recbole", "auto"])
    )
    separator = {"tsv": "\t", "recbole": "\t"}.get(format, ",")
    if format in ("named", "auto"):
        separator = draw(st.sampled_from(SEPARATORS))
    named = format in ("named", "recbole") or separator == ","  # auto without names: not by commas
    optional = draw(st.sampled_from([ROLES, ROLES[:3], ROLES[:2]]))
    if format.startswith("amazon"):
        named = False
        optional = optional if len(optional) > 2 else ROLES[:3]
    quoting = named and format != "recbole" and separator != "::"
    clean = ids if quoting else ids.filter(lambda name: not set(separator) & set(name))
    columns = [clean, clean, reals, times] if good else [plain_ids, plain_ids, numbers, numbers]
    rows = draw(good_rows(*columns[1:]) if good else st.lists(st.tuples(*columns), min_size=1))
    if not any(name.strip() for row in rows for name in row[:2]):
        rows = [("a", "b", "1", "1"), *rows]  # a file of white space alone is an empty one
    order = list(optional)
    if format == "amazon_2018":
        order[:2] = "item", "user"
    extra = draw(st.integers(0, 2)) if quoting else 0
    if named:
        order = draw(st.permutations(order + ["x", "y"][:extra]))
    texts = [[dict(zip(ROLES, row, strict=True)).get(role, "z") for role in order] for row in rows]
    end = draw(ENDS)
    if named:
        names = [draw(st.sampled_from(HEADERS.get(role, (f"note {role}",)))) for role in order]
        if format == "recbole":
            names = [f"{role}:{'token' if role in ROLES[:2] else 'float'}" for role in order]
        texts = [names, *texts]
    if quoting:
        out = io.StringIO()
        style = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        csv.writer(out, delimiter=separator, lineterminator=end, quoting=style).writerows(texts)
        text = out.getvalue()
    else:
        wrap = good and not named and separator != "::" and draw(st.booleans())
        if wrap:  # as R writes text
            texts = [
                [
                    '"' + x.replace('"', '""') + '"' if role in ROLES[:2] else x
                    for role, x in zip(order, line, strict=True)
                ]
                for line in texts
            ]
        trailing = separator if draw(st.booleans()) and len(order) > 2 else ""
        text = end.join(separator.join(line) + trailing for line in texts)
        text += end if draw(st.booleans()) else ""
        if good and not named:  # what could be a header, or quoted, is not plainly a table
            lines = [line for line in text.split(end) if line]
            fields = [reference.fields_of(line, separator) for line in lines]
            hypothesis.assume(not reference.is_header(fields[0], fields[1:]))
            hypothesis.assume(not any(reference.names_both(fields[0]) for _ in fields))
            hypothesis.assume(wrap or not reference.is_wrapped(lines, separator))
            marks = [mark for mark in ("\t", ",", "::", ";", "|") if mark in lines[0]]
            hypothesis.assume(format != "auto" or (marks[0] == separator and text[0] not in "{[ "))
    blank = draw(st.sampled_from(["", "", end, 2 * end]))
    data = ((blank + text) if not text.startswith('"') else text).encode("utf-8", "replace")
    if draw(st.booleans()):
        data = b"\xef\xbb\xbf" + data
    return data, format, expected_rows(rows, len(optional)) if good else None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | plain_ids,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_ids, inner, max_size=3),
    max_leaves=4,
)


@st.composite
def json_lines(draw, good: bool):
    keys = [draw(st.sampled_from(HEADERS[role])).split(":")[0] for role in ROLES]
    keys = keys[: draw(st.integers(2, 4))]
    reference_ids = ids | st.integers()
    reference_ids |= st.sampled_from([None, "NULL", ""]) if good else st.nothing()
    real = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | reals
    columns = [reference_ids, reference_ids, real, real | times]
    lines, rows = [], []
    for at in range(draw(st.integers(1, 6))):
        values = [draw(column if good else column | json_values) for column in columns]
        if good and not at and not has_ids(values):
            values[:2] = "a", "b"
        fields = list(zip(keys, values, strict=False))
        if draw(st.booleans()):
            fields.append(("note", draw(json_values)))
        if not good and draw(st.integers(0, 5)) == 0:
            fields.append(draw(st.sampled_from(fields)))
        fields = draw(st.permutations(fields)) if not good or lines else fields
        ascii = draw(st.booleans())
        parts = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=ascii)}" for k, v in fields)
        lines.append("{" + ", ".join(parts) + "}")
        rows.append(tuple(values))
    format = draw(st.sampled_from(["amazon_json", "json", "auto"]))
    end = draw(ENDS)
    text = "[" + f",{end}".join(lines) + "]" if draw(st.booleans()) else end.join(lines)
    data = text.encode("utf-8", "surrogatepass")
    return data, format, expected_rows(rows, len(keys)) if good else None


def packed(draw, data: bytes) -> bytes:
    cut = draw(st.integers(0, len(data)))
    kind = draw(
        st.sampled_from(["plain"] * 6 + ["one", "two", "zeros", "bz2", "xz", "zip", "wide"])
    )
    if kind == "plain":
        return data
    if kind == "two":
        return gzip.compress(data[:cut], 1) + gzip.compress(data[cut:], 1)
    if kind == "bz2":
        return bz2.compress(data, 1)
    if kind == "xz":
        return lzma.compress(data, preset=0)
    if kind == "zip":
        return zip_of({"books.csv": data})
    if kind == "wide":
        return wide(data, draw(st.sampled_from(["utf-16-le", "utf-16-be"])))
    return gzip.compress(data, 1) + b"\0" * (8 if kind == "zeros" else 0)


def zip_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def wide(data: bytes, encoding: str) -> bytes:
    """UTF-16 with its mark, as some tables are saved."""
    text = data.decode("utf-8-sig", "replace")
    return ("\ufeff" + text).encode(encoding)


@st.composite
def good_files(draw):
    data, format, rows = draw(tables(True) | json_lines(True))
    return packed(draw, data), format, rows


def damage(data: bytes, rng: random.Random) -> bytes:
    """A copy with bytes flipped, cut out, doubled, put in, or its end gone; now and then zipped."""
    if rng.random() < 0.2:
        pack = rng.choice([gzip.compress, bz2.compress, lzma.compress, lambda x: zip_of({"a": x})])
        data = pack(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        at = rng.randint(0, len(data))
        to = at + rng.randint(1, 20)
        what = rng.choice(["flip", "cut", "double", "put", "put", "end"])
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randint(0, 7)]) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + data[to:]
        elif what == "double":
            data = data[:to] + data[at:]
        elif what == "put":
            put = rng.choice([rng.choice(NASTY).encode(), rng.randbytes(2), rng.choice(LETTERS)])
            data = data[:at] + put + data[at:]
        elif what == "end":
            data = data[:at]
    return data


LETTERS = [bytes([n]) for n in range(32, 127)]
COPIES = 8  # damaged copies of each generated file: a file takes longer to generate than to read


def with_copies(check):
    """Tries a file and damaged copies of it; the seed of the damage is generated, too."""

    def check_all(value) -> list[bool]:
        (data, format, rows), seed = value
        rng = random.Random(seed)
        found = [check(data, format, rows)]
        for _ in range(COPIES):
            found.append(check(damage(data, rng), rng.choice(["auto", format]), None))
        return found

    return check_all


def seeded(files: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(files, st.integers(0, 2**32))


soup = st.lists(st.sampled_from([*NASTY, "\n", ",", "\t", "a", "b", "1"]), max_size=40).map("".join)


@st.composite
def soups(draw):
    """Lines of tokens under a header or none, the separators mostly those of the header."""
    head, separator = draw(
        st.sampled_from(
            [
                ("", "\t"),
                ("user\titem\trating\n", "\t"),
                ("user_id,item_id\n", ","),
                ("user;rating;item\n", ";"),
                ('"user"|"item"\n', "|"),
                ('{"user":"a","item":"b"}\n', ","),
                ("userID::artistID\n", "::"),
                ("", "::"),
                ("", ";"),
            ]
        )
    )
    token = st.sampled_from(["a", "b", "1", "2.5", "é"]) | st.sampled_from(NASTY)
    width = draw(st.integers(2, 4))
    lines = draw(st.lists(st.lists(token, min_size=width, max_size=width), max_size=4))
    text = head + draw(ENDS).join(separator.join(line) for line in lines)
    other = draw(st.sampled_from([None, None, None, "soup", "bytes"]))
    if other:
        text = draw(soup.map(str.encode) if other == "soup" else st.binary(max_size=200))
        return text, draw(st.sampled_from(readers.FORMATS[:-1])), None
    return text.encode(), draw(st.sampled_from(["auto", "auto", *readers.FORMATS[:-1]])), None


@sizes(25, 3_000)
def test_well_formed_files_are_read_as_they_were_written(size, tmp_path):
    def check(file) -> list[bool]:
        return [check_table(tmp_path / "file", *file)]

    generate(size, "well-formed tables and JSON", good_files(), check)


@st.composite
def weighed(draw, good: bool):
    """(bytes, format, rows or None): a table with a header, or objects, with a column of plays."""
    names = [
        "user_id",
        "item_id",
        "plays",
        *draw(st.sampled_from([[], ["rating"], ["stars", "x"]])),
    ]
    counts = st.one_of(
        st.integers(1, 10**6).map(str),
        st.floats(1e-30, 1e30).map(repr),
        st.sampled_from(["1e30", "1e-30", "+5", ".5", "007"]),
    )
    if not good:
        counts = counts | st.sampled_from([*NASTY, "0", "-1", "1e31", "1e-31", "1,5"])
    name = st.sampled_from(["a", "b", "é", "NULL", "7"])
    row = st.tuples(name, name, counts, st.sampled_from(["1", "4.5"]), st.just("z"))
    rows = draw(st.lists(row, min_size=1, max_size=6).filter(lambda rows: any(map(has_ids, rows))))
    separator = draw(st.sampled_from(SEPARATORS))
    end = draw(ENDS)
    if draw(st.booleans()):
        order = draw(st.permutations(range(len(names))))
        texts = [[line[at] for at in order] for line in [names, *rows]]
        text = end.join(separator.join(line) for line in texts)
    else:
        objects = [dict(zip(names, row, strict=False)) for row in rows]
        text = end.join(json.dumps(each) for each in objects)
    kept = None
    if good:
        rated = float if len(names) > 3 else lambda _: None
        kept = [(u, i, rated(r), None, float(k)) for u, i, k, r, _ in filter(has_ids, rows)]
    return text.encode("utf-8", "replace"), "auto", kept


@pytest.mark.parametrize("good", [True, False], ids=["good", "nasty"])
@sizes(25, 700)
def test_weights_are_read_or_refused_as_by_the_reference(size, good, tmp_path):
    check = partial(check_table, tmp_path / "file", weight="plays")
    generate(size, "a column of weights", seeded(weighed(good)), with_copies(check))


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("well-formed, damaged", tables(True) | json_lines(True)),
        ("nasty values", tables(False) | json_lines(False)),
        ("tokens and random bytes", soups()),
    ],
    ids=["damaged", "nasty", "soup"],
)
@sizes(4, 2_000)
def test_files_are_read_or_refused_as_by_the_reference(size, kind, files, tmp_path):
    generate(size, kind, seeded(files), with_copies(partial(check_table, tmp_path / "file")))


# Lists: NCF-style folders, ids.


@st.composite
def ncf_folders(draw):
    names = st.text(st.sampled_from("ab1é ,()"), min_size=1, max_size=3)
    users = names.filter(lambda name: "," not in name and name.strip() == name)
    items = names.filter(lambda name: name.strip() == name)
    tests = draw(st.dictionaries(users, items, min_size=1, max_size=4))
    pairs = draw(st.lists(st.tuples(users, items), min_size=1, max_size=5))
    lists = {user: draw(st.lists(items, min_size=1, max_size=4)) for user in tests}
    texts = [
        "".join(f"{user}\t{item}\t1\n" for user, item in pairs),
        "".join(f"{user}\t{item}\t1\n" for user, item in tests.items()),
        "".join(f"({user}, {tests[user]})\t" + "\t".join(x) + "\n" for user, x in lists.items()),
    ]
    return [text.encode() for text in texts], draw(st.integers(0, 2**32))


def check_ncf(folder: pathlib.Path, files: list[bytes], good: bool) -> bool:
    for name, data in zip(("train.txt", "test.txt", "test_neg.txt"), files, strict=True):
        (folder / name).write_bytes(data)
    try:
        expected = reference.read_ncf(*files)
    except reference.Refused:
        expected = None
        assert not good
    found = refusal(lambda: readers.read(folder))
    if isinstance(found, InputError):
        assert expected is None, f"refused, though it can be read: {found}"
        return False
    given = found.given
    lists = dict(zip(given.users, zip(given.items, given.negatives, strict=True), strict=True))
    assert (found.frame.collect().rows(), lists) == expected
    assert list(lists) == list(expected[1])
    return True


@sizes(4, 400)
def test_ncf_folders_are_read_or_refused_as_by_the_reference(size, tmp_path):
    def check(value) -> list[bool]:
        files, seed = value
        rng = random.Random(seed)
        found = [check_ncf(tmp_path, files, good=True)]
        for _ in range(COPIES):
            copies, at = list(files), rng.randrange(3)
            copies[at] = damage(copies[at], rng)
            found.append(check_ncf(tmp_path, copies, good=False))
        return found

    generate(size, "NCF folders, damaged", ncf_folders(), check)


id_files = st.builds(
    lambda names, end, bom: (bom + (end.join(names) + end).encode(), "", None),
    st.lists(ids, min_size=1, max_size=6),
    ENDS,
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)


@sizes(4, 600)
def test_files_of_ids_are_read_or_refused_as_by_the_reference(size, tmp_path):
    def check(data: bytes, format: str, rows: None) -> bool:
        (tmp_path / "ids").write_bytes(data)
        try:
            expected = reference.read_ids(data)
        except reference.Refused:
            expected = None
        found = refusal(lambda: readers.read_ids(tmp_path / "ids"))
        assert (None if isinstance(found, InputError) else found) == expected
        return expected is not None

    generate(size, "files of ids", seeded(id_files | soups()), with_copies(check))


# Folders that were written here and altered since.


@pytest.fixture(scope="module")
def data():
    pairs = [(user, item) for user in range(12) for item in range(15) if (user + item) % 3 == 0]
    users, items = map(np.array, zip(*pairs, strict=True))
    return from_arrays(users, items, users, items, candidates=2)


@st.composite
def alterations(draw, names: list[str]):
    """The name of a file, and a function of its bytes."""
    name = draw(st.sampled_from(names))
    if name.endswith(".json") and draw(st.booleans()):
        steps = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
        return name, partial(altered_json, steps=steps, value=draw(json_values))
    if name.endswith(".npz") and draw(st.booleans()):
        return name, partial(altered_arrays, at=draw(st.integers(0, 7)), to=draw(arrays))
    kind = draw(st.sampled_from(["flip", "put", "end", "all"]))
    where = draw(st.floats(0, 1))
    byte = draw(st.integers(1, 255))
    put = draw(st.binary(max_size=4) | st.sampled_from(NASTY).map(str.encode))
    return name, partial(altered_bytes, kind=kind, where=where, byte=byte, put=put)


arrays = st.sampled_from(
    [
        np.zeros(3),
        np.arange(12) - 5,
        np.zeros((2, 2), np.int32),
        np.array(["a"]),
        np.array([None, {}], object),
        np.array(7),
        np.full(12, 2**31 - 1),
        np.array([], np.int64),
    ]
)


def altered_json(data: bytes, steps: list[int], value) -> bytes:
    """Goes down into an object or array, and replaces what is there."""
    place = root = json.loads(data)
    for step in steps:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = keys[step % len(keys)]
        parent, place = place, place[key]
        if not isinstance(place, dict | list) or not place:
            break
    parent[key] = value
    return json.dumps(root).encode("utf-8", "surrogatepass")


def altered_arrays(data: bytes, at: int, to: np.ndarray) -> bytes:
    with np.load(io.BytesIO(data)) as stored:
        named = dict(stored)
    named[sorted(named)[at % len(named)]] = to
    out = io.BytesIO()
    np.savez(out, **named)
    return out.getvalue()


def altered_bytes(data: bytes, kind: str, where: float, byte: int, put: bytes) -> bytes:
    at = int(where * len(data))
    if kind == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :]
    if kind == "all":
        return put
    return data[:at] + (put + data[at:] if kind == "put" else b"")


def check_altered(folder: pathlib.Path, load, same, alteration) -> list[bool]:
    """Alters one file, loads, and puts the file back."""
    name, change = alteration
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(change(before))
    try:
        found = refusal(load)
    finally:
        (folder / name).write_bytes(before)
    if not isinstance(found, InputError):
        same(found)
    return [not isinstance(found, InputError)]


def contents(made) -> tuple:
    """All of a data set that results depend on."""
    named = types.arrays(made)
    meta = {key: value for key, value in made.meta.items() if key != "audit"}
    return {name: values.tolist() for name, values in named.items()}, meta


@sizes(25, 2_000)
def test_altered_prepared_data_is_the_same_data_or_refused(size, data, tmp_path):
    folder = tmp_path / "prepared"
    store.save(data, folder)
    names = sorted(os.listdir(folder))

    def same(found) -> None:
        assert contents(found) == contents(data)

    check = partial(check_altered, folder, lambda: store.load(folder), same)
    generate(size, "prepared data, altered", alterations(names), check)


@sizes(25, 1_000)
def test_altered_recbole_files_are_the_rows_that_stand_there_or_refused(size, data, tmp_path):
    folder = tmp_path / "recbole"
    recbole.save(data, folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def pairs(name: str) -> set:
        lines = reference.lines_of((folder / name).read_bytes(), sampled=False)
        rows = [tuple(line.split("\t")) for line in lines if line][1:]
        assert len(rows) == len(set(rows))
        return set(rows)

    def check(alteration) -> list[bool]:
        wanted = {}

        def load():
            found = recbole.load(folder)
            for name in ("target/target.train", "source/source"):  # while it is altered
                wanted[name.split("/")[0]] = pairs(f"{name}.inter")
            return found

        def same(found) -> None:
            for domain, rows in wanted.items():
                kept = getattr(found, domain)
                users = np.repeat(np.arange(found.num_users), np.diff(kept.indptr))
                names = getattr(found, f"{domain}_item_ids")[kept.indices]
                assert set(zip(found.user_ids[users], names, strict=True)) == rows
            assert found.meta["hash"] == content_hash(found)

        return check_altered(folder, load, same, alteration)

    generate(size, "RecBole's files, altered", alterations(names), check)
    assert recbole.load(folder).meta["hash"] == data.meta["hash"]


def config_of(variant):
    """The config of a variant, with a cut-off that fits ``data``: items are ranked among three."""
    config = default_config(variant)
    config.eval_k = (1,)
    return config


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """A run, and what sweeps, studies and figures keep, in one folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = config_of("popularity")
    fit(config, folder, dataset=data, quiet=True)
    result = json.loads((folder / "result.json").read_text())
    stored = {"dataset_hash": data.meta["hash"], "config": result["config"]}
    trial = {**search.evaluate(config, data), **stored}
    (folder / "popularity" / "results").mkdir(parents=True)
    (folder / "popularity" / "results" / "k.json").write_text(json.dumps(trial))
    valid = trial["valid"]
    epoch = {"epoch": 1, "train_loss": 0.5, "valid": valid, "seconds": 1.0, "h_zeros": 0.5}
    losses = {"first_losses": {"target": [0.7, 0.6]}, "history": [epoch]}
    (folder / "record.json").write_text(json.dumps(trial | losses))
    (folder / "populations" / "p").mkdir(parents=True)
    (folder / "populations" / "p" / "members.json").write_text('["k"]')
    return folder


READ_BACK = {
    "config.json": lambda folder, data: stored_config(folder),
    "result.json": lambda folder, data: compare.read(folder, "test"),
    "ranks.npz": lambda folder, data: compare.read(folder, "valid"),
    "metrics.jsonl": lambda folder, data: MetricsFile(folder / "metrics.jsonl", epochs=9),
    "popularity/results/k.json": lambda folder, data: table2.check_trials(
        table2.Study("demo.py", config_of, {}, folder), "popularity", data
    ),
    "record.json": lambda folder, data: runner.read(
        runner.Run(default_config(), "", "", folder / "record.json")
    ),
    "populations/p/members.json": lambda folder, data: runner.units([], folder, runner.VALIDATION),
}


@sizes(40, 3_000)
def test_altered_state_files_are_read_or_refused(size, data, workdir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)

    def check(alteration) -> list[bool]:
        (folder / "populations" / "p").mkdir(parents=True, exist_ok=True)
        members = folder / "populations" / "p" / "members.json"
        members.write_bytes((workdir / "populations" / "p" / "members.json").read_bytes())

        def load() -> bool:
            READ_BACK[alteration[0]](folder, data)
            members.parent.mkdir(parents=True, exist_ok=True)
            return True

        return check_altered(folder, load, lambda found: None, alteration)

    generate(size, "files of a workdir, altered", alterations(list(READ_BACK)), check)


# What is typed: config fields, grids and spaces.

FIELDS = sorted(set(flatten(default_config().to_dict())) - {"seed", "variant", "name", "eval_k"})
texts = st.one_of(
    soup.filter(lambda text: "\0" not in text),
    st.text(characters, max_size=8),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(["true", "(64, 32)", "[]", "(" * 300, "(1,)" * 300, "{}", "log(1,inf)"]),
    st.builds("log({},{})".format, numbers, numbers),
    st.builds("uniform({},{})".format, numbers, numbers),
    st.lists(numbers, min_size=1, max_size=3).map(",".join),
)


@pytest.mark.filterwarnings("ignore:the load_module")  # how ml_collections loads a config file
@sizes(25, 1_500)
def test_typed_config_fields_are_set_or_refused(size, tmp_path, monkeypatch):
    path = tmp_path / "config.py"
    path.write_text("from conet_jax.config import default_config as get_config\n")

    def check(fields: list[tuple[str, str]]) -> list[bool]:
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
        argv = ["x", f"--config={path}", *(f"--config.{name}={text}" for name, text in fields)]
        said = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stderr(said):
            patch.setattr(cli.flags, "FLAGS", values)
            patch.setattr(sys, "argv", argv)
            try:
                cli._parse(argv, arguments=False)
                config = cli.config_of(holder)
            except InputError as error:
                assert len(str(error).splitlines()) == 1
                return [False]
            except SystemExit as stop:
                lines = said.getvalue().splitlines()
                assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
                return [False]
        assert len({name for name, _ in fields}) == len(fields)  # a flag given twice is refused
        for name, text in fields:
            value, kind = flatten(config.to_dict())[name], type(flatten(DEFAULTS)[name])
            assert type(value) is kind
            if kind in (int, float):
                assert value == (int(text, 0) if "x" in text else kind(text))
        return [True]

    field = st.sampled_from(FIELDS) | st.text("abc._", min_size=1, max_size=9)
    generate(size, "config fields", st.lists(st.tuples(field, texts), max_size=2), check)


DEFAULTS = default_config().to_dict()


@sizes(25, 1_500)
def test_grids_and_spaces_are_parsed_or_refused(size):
    config = default_config()

    def check(given: list[tuple[str, str]]) -> list[bool]:
        typed = [f"config.{name}={text}" for name, text in given]
        grid = refusal(lambda: points.parse_grid(typed, config))
        space = refusal(lambda: points.parse_space(typed, config))
        for values in [] if isinstance(space, InputError) else space.values():
            if isinstance(values, search.Range):
                assert math.isfinite(values.low) and values.low < values.high < math.inf
        if isinstance(grid, InputError):
            return [False]
        for point in grid:
            for name, value in point.items():
                assert type(value) is type(config_value(name)), (name, value)
        assert len({name for name, _ in given}) == len(given)
        return [True]

    def config_value(name: str):
        value = flatten(DEFAULTS)[name]
        return tuple(value) if isinstance(value, list) else value

    one = st.tuples(st.sampled_from(FIELDS), texts)
    generate(size, "grids and spaces", st.lists(one, min_size=1, max_size=2), check)


GRIDS = {
    "l1": st.lists(st.floats(0, 1e3), min_size=1, max_size=3, unique=True),
    "negatives": st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True),
    "layers": st.lists(
        st.tuples(st.integers(2, 64), st.integers(1, 9)), min_size=1, max_size=2, unique=True
    ),
    "cross_per_direction": st.just([True, False]),
    "pairing": st.just(["random", "same_user"]),
}


@sizes(20, 200)
def test_a_well_formed_grid_is_every_combination(size):
    def check(given: dict[str, list]) -> list[bool]:
        typed = [f"config.{name}={','.join(map(str, values))}" for name, values in given.items()]
        combinations = itertools.product(*given.values())
        expected = [dict(zip(given, values, strict=True)) for values in combinations]
        assert points.parse_grid(typed, default_config()) == expected
        return [True]

    wanted = st.fixed_dictionaries({}, optional=GRIDS).filter(len)
    generate(size, "well-formed grids", wanted, check)


# What is no file.


@pytest.fixture
def alarm():
    """A reader that waits for ever is an error."""

    def ring(*_):
        raise TimeoutError("waited for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put_fifo(path: pathlib.Path) -> None:
    os.mkfifo(path)


def put_loop(path: pathlib.Path) -> None:
    path.symlink_to(path)


def put_dangling(path: pathlib.Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def put_device(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


def put_folder(path: pathlib.Path) -> None:
    path.mkdir()


def put_empty(path: pathlib.Path) -> None:
    path.touch()


def put_zeros(path: pathlib.Path) -> None:
    path.write_bytes(bytes(1 << 20))


PUTS = [put_fifo, put_loop, put_dangling, put_device, put_folder, put_empty, put_zeros]


@pytest.mark.parametrize("put", PUTS)
def test_what_is_no_file_is_refused_at_once(put, data, workdir, tmp_path, alarm):
    put(tmp_path / "odd")
    for format in readers.FORMATS:
        with pytest.raises(InputError, match="odd"):
            readers.read(tmp_path / "odd", format)
    with pytest.raises(InputError, match="odd"):
        readers.read_ids(tmp_path / "odd")
    store.save(data, tmp_path / "prepared")
    recbole.save(data, tmp_path / "recbole")
    shutil.copytree(workdir, tmp_path / "run")
    cases = [
        (tmp_path / "prepared", name, store.load) for name in os.listdir(tmp_path / "prepared")
    ]
    found = (tmp_path / "recbole").rglob("*")
    names = [str(p.relative_to(tmp_path / "recbole")) for p in found if p.is_file()]
    cases += [(tmp_path / "recbole", name, recbole.load) for name in names]
    for name, load in READ_BACK.items():
        lines = name.endswith(".jsonl")  # which may be missing or empty
        unseen = put in (put_loop, put_dangling) and "populations" in name  # by glob
        if not (lines or unseen):
            cases.append((tmp_path / "run", name, lambda folder, load=load: load(folder, data)))
    for folder, name, load in cases:
        (folder / name).rename(tmp_path / "kept")
        put(folder / name)
        assert isinstance(refusal(lambda: load(folder)), InputError), name  # noqa: B023
        (folder / name).rmdir() if put is put_folder else (folder / name).unlink()
        (tmp_path / "kept").rename(folder / name)


def test_a_symbolic_link_to_a_file_is_the_file(tmp_path):
    (tmp_path / "file").write_text("user,item\na,b\n")
    (tmp_path / "link").symlink_to("file")
    assert readers.read(tmp_path / "link").frame.collect().rows() == [("a", "b")]


@pytest.mark.parametrize(
    "size", [150_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1 << 20, 1 << 25))]
)
def test_long_lines_are_read_or_refused(size, tmp_path):
    long = b"a" * size
    tables = [b"%s\tb\n", b"b\tc\n%s\tb\n", b"user\titem\nb\t%s\n", b"user,item\n%s\n"]
    tables += [b'user,item\n"b",c\nd,%s\n', b'user,item\nb,"%s"\n', b'user,item\nb,c\n"%s']
    for text in {150_000: tables[1:4], 1 << 25: tables[:2]}.get(size, tables):
        check_table(tmp_path / "file", text % long, "auto")
    for text in (b'{"user": "%s", "item": "b"}', b'{"user": "b", "item": "c", "x": "%s"}'):
        data = b'{"user": "b", "item": "c"}\n' + text % long
        assert check_table(tmp_path / "file", data, "auto") == (size < 16 << 20)


def test_bombs_are_refused_in_little_memory(tmp_path):
    """A gigabyte that gzip packs into one megabyte, JSON nested a million deep."""
    with gzip.open(tmp_path / "zeros", "wb", 1) as file:
        for _ in range(1 << 6):
            file.write(bytes(1 << 20))
    with pytest.raises(InputError, match="longer than"):
        readers.read(tmp_path / "zeros")
    (tmp_path / "deep").write_text('{"user": ' + "[" * 10**6)
    with pytest.raises(InputError):
        readers.read(tmp_path / "deep", "amazon_json")
    (tmp_path / "config.json").write_text("[" * 10**6)
    with pytest.raises(InputError, match="nested too deeply"):
        stored_config(tmp_path)
    np.savez_compressed(tmp_path / "ranks.npz", test_users=np.zeros(10))
    with pytest.raises(ValueError, match="compressed"):
        files.read_arrays(tmp_path / "ranks.npz", ["test_users"])


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_no_pickle_is_ever_loaded(kind, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    evil = np.array([Evil()], object)
    path = tmp_path / f"x.{kind}"
    np.save(path, evil, allow_pickle=True) if kind == "npy" else np.savez(path, x=evil)
    with pytest.raises(ValueError):
        files.read_array(path) if kind == "npy" else files.read_arrays(path, ["x"])
    assert not (tmp_path / "owned").exists()


def test_no_module_loads_pickle_or_other_code():
    """Arrays are read by ``files`` alone; nothing here unpickles, evaluates or imports data."""
    banned = ("pickle", "np.load(", "numpy.load(", "eval(", "exec(", "yaml", "marshal", "shelve")
    for path in (*ROOT.glob("conet_jax/**/*.py"), *ROOT.glob("launch/*.py")):
        text = re.sub(r"[\w.]*(jax\.|compile_time_)eval\w*\(|\w+_eval\(", "", path.read_text())
        code = "\n".join(
            line.partition("#")[0] for line in text.splitlines() if "allow_pickle=False" not in line
        )
        code = re.sub(r'""".*?"""', "", code, flags=re.S)
        for word in banned:
            assert not re.search(rf"(?<![\w.]){re.escape(word)}", code), (path.name, word)


@pytest.mark.slow
@pytest.mark.parametrize("put", [put_fifo, put_device, put_empty, put_zeros])
def test_commands_end_in_one_line_and_status_two(put, data, workdir, tmp_path):
    put(tmp_path / "odd")
    odd, out = tmp_path / "odd", tmp_path / "out"
    good = tmp_path / "good.csv"
    good.write_text("user,item\na,b\n")
    assert_one_line_error(launch("prepare", f"--target={good}", f"--source={odd}", f"--out={out}"))
    assert not out.exists()
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    put(tmp_path / "run" / "config.json")
    assert_one_line_error(launch("evaluate", f"--workdir={tmp_path / 'run'}"), "config.json")
