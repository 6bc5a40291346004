"""Hostile input: what loads is what a slow, simple reader finds; all else is a one-line error.

Some hundred generated inputs by default; tens of thousands, new ones each time, with

    python -m pytest -m slow tests/test_hostile.py -s

which ends with how many inputs of each kind were tried, loaded and refused.
"""

import csv
import gzip
import io
import json
import pathlib

import hypothesis
import pytest
import reference_reader as reference
from hypothesis import strategies as st

from conet_jax.data import readers
from conet_jax.errors import InputError

COUNTS: dict[str, list[int]] = {}  # kind -> [tried, loaded]


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print(f"\n{'generated inputs':28}{'tried':>10}{'loaded':>10}{'refused':>10}")
        total = map(sum, zip(*COUNTS.values(), strict=True))
        for kind, (tried, loaded) in [*COUNTS.items(), ("all", total)]:
            print(f"{kind:28}{tried:10,}{loaded:10,}{tried - loaded:10,}")


def sizes(fast: int, full: int):
    """How many inputs a test tries: few and always the same, or many new ones."""
    full = pytest.param(full, marks=pytest.mark.slow, id=f"{full}")
    return pytest.mark.parametrize("size", [pytest.param(fast, id="few"), full])


def generate(size: int, kind: str, strategy: st.SearchStrategy, check) -> None:
    """Calls ``check``, which says whether the input was loaded, with generated inputs."""
    counts = COUNTS.setdefault(kind, [0, 0])

    def counted(value) -> None:
        counts[0] += 1
        counts[1] += check(value)

    settings = hypothesis.settings(
        max_examples=size,
        deadline=None,
        database=None,
        derandomize=size < 1000,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(counted))()


def refusal(call) -> object:
    """The result of a call, or its error, which is one line."""
    try:
        return call()
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return error


def check_table(path: pathlib.Path, data: bytes, format: str, rows: list | None = None) -> bool:
    """Compares our rows with the reference's, and with those that were written if given."""
    path.write_bytes(data)

    def ours() -> list[tuple]:
        found = readers.read(path, format)
        frame = found.frame.collect()
        assert len(frame) == found.rows > 0
        absent = [None] * len(frame)
        return list(
            zip(*(frame[r].to_list() if r in frame else absent for r in ROLES), strict=True)
        )

    try:
        expected = reference.read(data, format)
    except reference.Refused:
        expected = None
    found = refusal(ours)
    if isinstance(found, InputError):
        assert expected is None, f"refused, though it can be read: {found}"
    else:
        assert found == expected
    assert rows is None or expected == rows
    return expected is not None


ROLES = ("user", "item", "rating", "timestamp")
HEADERS = {
    "user": ("user_id", "User", "reviewerID", "uid:token", "user id"),
    "item": ("item_id", "asin", "ISBN", "ProductId", "item_id:token"),
    "rating": ("rating", "Score", "overall", "rating:float"),
    "timestamp": ("timestamp", "unixReviewTime", "Time", "timestamp:float"),
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
]
characters = st.characters(exclude_categories=["Cs"])
plain_ids = st.text(characters, min_size=1, max_size=6) | st.sampled_from(NASTY)
ids = plain_ids.filter(lambda name: name and not set(name) & set("\n\r\0"))
reals = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["5", "4.0", "1369699200", "1.", ".5", "+5", "-0", "1e-400", "1E5"]),
)
numbers = reals | st.sampled_from(NASTY) | st.floats().map(repr)
ENDS = st.sampled_from(["\n", "\r\n"])


@st.composite
def tables(draw, good: bool):
    """(bytes, format, rows or None): a text table; if good, one that has to be read."""
    format = draw(st.sampled_from(["named", "tsv", "amazon_2014", "amazon_2018", "recbole"]))
    separator = {"tsv": "\t", "recbole": "\t"}.get(format, ",")
    if format == "named":
        separator = draw(st.sampled_from("\t,;|"))
    optional = draw(st.sampled_from([ROLES, ROLES[:3], ROLES[:2]]))
    if format.startswith("amazon") and len(optional) == 2:
        optional = ROLES[:3]
    quoting = format == "named"
    clean = ids if quoting else ids.filter(lambda name: separator not in name)
    rows = draw(
        st.lists(
            st.tuples(*[clean if good else plain_ids] * 2, *[reals if good else numbers] * 2),
            min_size=1,
            max_size=8,
        )
    )
    order = list(optional)
    if format == "amazon_2018":
        order[:2] = "item", "user"
    extra = draw(st.integers(0, 2)) if format == "named" else 0
    if format in ("named", "recbole"):
        order = draw(st.permutations(order + ["x", "y"][:extra]))
    texts = [[dict(zip(ROLES, row, strict=True)).get(role, "z") for role in order] for row in rows]
    if format in ("named", "recbole"):
        names = [draw(st.sampled_from(HEADERS.get(role, (f"note {role}",)))) for role in order]
        if format == "recbole":
            names = [f"{role}:{'token' if role in ROLES[:2] else 'float'}" for role in order]
    end = draw(ENDS)
    if quoting:
        out = io.StringIO()
        style = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=style)
        writer.writerows([names, *texts])
        text = out.getvalue()
    else:
        if format == "recbole":
            texts = [names, *texts]
        trailing = separator if draw(st.booleans()) and len(order) > 2 else ""
        text = end.join(separator.join(line) + trailing for line in texts)
        text += end if draw(st.booleans()) else ""
    blank = draw(st.sampled_from(["", "", end, 2 * end]))
    data = ((blank + text) if not text.startswith('"') else text).encode("utf-8", "replace")
    if draw(st.booleans()):
        data = b"\xef\xbb\xbf" + data
    if not good:
        return data, format, None
    absent = len(optional)
    expected = [
        (u, i, *(float(x) if at < absent else None for at, x in enumerate((r, t), 2)))
        for u, i, r, t in rows
    ]
    return data, format, expected


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
    real = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | reals
    columns = [reference_ids, reference_ids, real, real]
    lines, rows = [], []
    for _ in range(draw(st.integers(1, 6))):
        values = [draw(column if good else column | json_values) for column in columns]
        fields = list(zip(keys, values, strict=False))
        if draw(st.booleans()):
            fields.append(("note", draw(json_values)))
        if not good and draw(st.integers(0, 5)) == 0:
            fields.append(draw(st.sampled_from(fields)))
        fields = draw(st.permutations(fields)) if not good or lines else fields
        ascii = draw(st.booleans())
        parts = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=ascii)}" for k, v in fields)
        lines.append("{" + ", ".join(parts) + "}")
        if good:
            reals_ = [float(x) for x in values[2 : len(keys)]]
            rows.append((*map(str, values[:2]), *reals_, *[None] * (4 - len(keys))))
    data = draw(ENDS).join(lines).encode("utf-8", "surrogatepass")
    return data, "amazon_json", rows if good else None


def zipped(draw, data: bytes) -> bytes:
    cut = draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(["plain", "plain", "one", "two", "zeros"]))
    if kind == "plain":
        return data
    if kind == "two":
        return gzip.compress(data[:cut], 1) + gzip.compress(data[cut:], 1)
    return gzip.compress(data, 1) + b"\0" * (8 if kind == "zeros" else 0)


@st.composite
def good_files(draw):
    data, format, rows = draw(tables(True) | json_lines(True))
    return zipped(draw, data), format, rows


@st.composite
def damaged(draw, files):
    """A file with bytes flipped, cut out, doubled, put in, or its end gone."""
    data, format, *_ = draw(files)
    data = bytearray(zipped(draw, data))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(1, 20)))
        what = draw(st.sampled_from(["flip", "cut", "double", "put", "end"]))
        if what == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:to]
        elif what == "double":
            data[at:at] = data[at:to]
        elif what == "put":
            put = draw(st.sampled_from(NASTY).map(str.encode) | st.binary(max_size=3))
            data[at:at] = put
        elif what == "end":
            del data[at:]
    return bytes(data), draw(st.sampled_from(["auto", format])), None


tokens = st.sampled_from([*NASTY, "\n", "\n", ",", "\t", "a", "b", "1", "5"])
soup = st.lists(tokens, max_size=40).map("".join)
heads = st.sampled_from(
    ["", "user_id,item_id,rating\n", "user\titem\n", '"user","item"\n', '{"user":"a","item":"b"}\n']
)
formats = st.sampled_from(readers.FORMATS[:-1])
soups = st.tuples(
    st.builds(lambda head, text: (head + text).encode(), heads, soup) | st.binary(max_size=200),
    formats,
    st.none(),
)


@sizes(60, 12_000)
def test_well_formed_files_are_read_as_they_were_written(size, tmp_path):
    check = lambda file: check_table(tmp_path / "file", *file)  # noqa: E731
    generate(size, "well-formed tables and JSON", good_files(), check)


@sizes(60, 12_000)
def test_tables_of_nasty_values_are_read_or_refused_as_by_the_reference(size, tmp_path):
    check = lambda file: check_table(tmp_path / "file", *file)  # noqa: E731
    generate(size, "nasty values", tables(False) | json_lines(False), check)


@sizes(60, 12_000)
def test_damaged_files_are_read_or_refused_as_by_the_reference(size, tmp_path):
    check = lambda file: check_table(tmp_path / "file", *file)  # noqa: E731
    generate(size, "damaged files", damaged(tables(True) | json_lines(True)), check)


@sizes(60, 12_000)
def test_soup_is_read_or_refused_as_by_the_reference(size, tmp_path):
    check = lambda file: check_table(tmp_path / "file", *file)  # noqa: E731
    generate(size, "tokens and random bytes", soups, check)
