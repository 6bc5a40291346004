"""Files as people have them: the same rows in any shape give the same data, or words that help.

Two small domains are made here and written in each shape; ``expected`` counts by plain loops what
must come of them. Every check ends in the audit: rows read = kept + each reason.
"""

import bz2
import datetime as dt
import gzip
import io
import itertools
import json
import lzma
import pathlib
import zipfile

import hypothesis
import numpy as np
import polars as pl
import pytest
from hypothesis import strategies as st
from test_prepare import prepare as command

from conet_jax.config import default_config
from conet_jax.data import readers, recbole, store
from conet_jax.data.load import known_items
from conet_jax.data.prepare import columns_read, overlooked, positives_of, prepare
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.run.experiment import make_experiment
from conet_jax.serve import recommend
from conet_jax.serve.recommender import prepare as make_recommender

NAMES = ("user_id", "item_id", "rating", "timestamp")
Rows = list[tuple]


def made(mark: str, seed: int) -> Rows:
    """30 users of both domains and 8 of one alone; 6 of 25 items each, ratings 1 to 5."""
    rng = np.random.default_rng(seed)
    users = [f"u{n:02}" for n in range(30)] + [f"{mark.lower()}{n:02}" for n in range(8)]
    rows = [
        (user, f"{mark}{item:02}", int(rng.integers(1, 6)), 1_500_000_000 + int(rng.integers(1e7)))
        for user in users
        for item in rng.choice(25, 6, replace=False)
    ]
    return [rows[at] for at in rng.permutation(len(rows))]


BOOKS, MOVIES = made("T", 0), made("S", 1)


def liked(rows: Rows, least: float = 4) -> set[tuple]:
    """Pairs whose last rating by time, then by place, is high enough."""
    last = {}
    for row in sorted(rows, key=lambda row: row[3] if len(row) > 3 else 0):
        last[row[:2]] = row[2] if len(row) > 2 else least
    return {pair for pair, rating in last.items() if rating >= least}


def expected(books: Rows, movies: Rows, least: float = 4) -> tuple[set, set]:
    pairs = [liked(rows, least) for rows in (books, movies)]
    shared = set.intersection(*({user for user, _ in own} for own in pairs))
    return tuple({pair for pair in own if pair[0] in shared} for own in pairs)


def pairs_of(data: Dataset, domain: str) -> set[tuple]:
    ids, rows = getattr(data, f"{domain}_item_ids"), getattr(data, domain)
    users = np.repeat(np.arange(data.num_users), np.diff(rows.indptr))
    parts = [(users, rows.indices)]
    if domain == "target":
        parts += [(held.users, held.items) for held in (data.valid, data.test)]
    return {(data.user_ids[u], ids[i]) for us, js in parts for u, i in zip(us, js, strict=True)}


def adds_up(data: Dataset) -> bool:
    """Rows read = kept + each reason, in both domains."""
    for domain in ("target", "source"):
        report = dict(data.meta["audit"][domain])
        rows = report.pop("rows")
        report.pop("positives_among_negatives", None)
        if domain == "source":
            report["twins"] = data.meta["audit"]["twins"]["dropped_source_interactions"]
        assert min(report.values()) >= 0
        if rows != data.meta["counts"][f"{domain}_interactions"] + sum(report.values()):
            return False
    return True


def check(target, source, *, want=None, rows=None, **options) -> Dataset:
    """Prepares, and compares the pairs with those that are wanted, and the audit with the rows."""
    data = prepare(target, source, **{"candidates": 3} | options)
    want = expected(BOOKS, MOVIES) if want is None else want
    assert (pairs_of(data, "target"), pairs_of(data, "source")) == want
    assert adds_up(data)
    rows = (len(BOOKS), len(MOVIES)) if rows is None else rows
    assert tuple(data.meta["audit"][d]["rows"] for d in ("target", "source")) == rows
    return data


@pytest.fixture
def put(tmp_path):
    """Writes a file, and names it."""

    def write(name: str, data: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def table(rows: Rows, header=NAMES, separator: str = ",", end: str = "\n") -> str:
    lines = ([header] if header else []) + list(rows)
    return "".join(separator.join(map(str, line)) + end for line in lines)


def objects(rows: Rows, names=NAMES) -> list[dict]:
    return [dict(zip(names, row, strict=False)) for row in rows]


def json_lines(rows: Rows, names=NAMES) -> str:
    return "".join(json.dumps(row) + "\n" for row in objects(rows, names))


def cut(rows: Rows, width: int) -> Rows:
    return [row[:width] for row in rows]


# Columns.


@pytest.mark.parametrize(
    "names",
    [
        ("user_id", "item_id", "book_rating", "timestamp"),
        ("User-ID", "ISBN", "Book-Rating", "Date"),
        ("review/userId", "product/productId", "review/score", "review/time"),
        ("review/profileName", "beer/beerId", "review/overall", "review/time"),
        ("uid", "artistID", "stars", "ts"),
        ("username", "recipe_id", "User Rating", "date_added"),
        ("CustomerID", "ASIN", "ratingValue", "unixReviewTime"),
        ("member", "book", "my stars", "created_at"),
        ("userId", "movieId", "evaluation", "datetime"),
    ],
    ids=lambda names: names[2],
)
@pytest.mark.parametrize("shape", ["csv", "semicolons", "tsv", "jsonl", "array", "parquet"])
def test_a_rating_counts_under_any_name(put, names, shape):
    paths = [written(put, f"{n}.{shape}", rows, names) for n, rows in enumerate((BOOKS, MOVIES))]
    data = check(*paths)
    assert data.meta["reading"]["target"]["columns"] == dict(
        zip(("user", "item", "rating", "timestamp"), names, strict=True)
    )
    assert overlooked(data.meta) == []


def written(put, name: str, rows: Rows, names=NAMES) -> str:
    """A file in the shape that its suffix says."""
    shape = name.rpartition(".")[2]
    if shape == "parquet":
        path = put(name, b"")
        pl.DataFrame(objects(rows, names)).write_parquet(path)
        return path
    if shape == "array":
        return put(name, json.dumps(objects(rows, names), indent=1))
    if shape == "jsonl":
        return put(name, json_lines(rows, names))
    if shape == "python":
        return put(name, "".join(f"{row}\n" for row in objects(rows, names)))
    if shape == "quoted":
        return put(name, table([[f'"{x}"' for x in row] for row in [names, *rows]], None))
    if shape == "recbole":
        kinds = [*("token", "token", "float", "float")][: len(names)]
        typed = [f"{name}:{kind}" for name, kind in zip(names, kinds, strict=True)]
        return put(name, table(rows, typed, "\t"))
    if shape == "colons":
        return put(name, table(rows, names, "::"))
    return put(name, table(rows, names, {"tsv": "\t", "semicolons": ";"}.get(shape, ",")))


@pytest.mark.parametrize(
    "name", ["click", "label", "like", "is_liked", "is_recommended", "Clicked"]
)
@pytest.mark.parametrize("words", [(0, 1), ("false", "true"), ("0.0", "1.0"), ("False", "True")])
def test_zeros_of_yes_and_no_are_no_positives(put, name, words):
    rows = [[(u, i, words[r >= 4], t) for u, i, r, t in own] for own in (BOOKS, MOVIES)]
    paths = [put(f"{n}.csv", table(own, (*NAMES[:2], name, "ts"))) for n, own in enumerate(rows)]
    data = check(*paths)
    assert data.meta["options"]["target_min_rating"] == 1
    assert data.meta["audit"]["seen"] > 0


def test_what_looks_like_a_rating_and_is_not_read_is_warned_of(put):
    books = [(*row[:2], "4.1", 1, "x") for row in BOOKS]
    header = (*NAMES[:2], "average_rating", "verified", "title")
    want = expected(cut(BOOKS, 2), MOVIES)
    data = check(put("b", table(books, header)), put("m", table(MOVIES)), want=want)
    (line,) = overlooked(data.meta)
    assert "every row counts as a positive, though 'average_rating', 'verified' may be" in line
    assert "--target_rating_column=average_rating reads it" in line
    silent = check(put("b", table(books, header)), put("m", table(MOVIES)), want=want,
                   target_rating_column="none")  # fmt: skip
    assert overlooked(silent.meta) == []
    text = "\n".join(columns_read(data.meta, {"target": "b", "source": "m"}))
    assert (
        "target b: user 'user_id', item 'item_id', no rating, no time; left out: 'average" in text
    )


@pytest.mark.parametrize("name", ["x", "how much", "valor"])
def test_marks_from_0_to_10_are_warned_of_whatever_their_name(put, name):
    paths = put("b", table(BOOKS, (*NAMES[:2], name, "ts"))), put("m", table(MOVIES))
    data = check(*paths, want=expected(cut(BOOKS, 2), MOVIES))
    assert f"every row counts as a positive, though {name!r} may be" in overlooked(data.meta)[0]
    check(*paths, target_rating_column=name)


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (("user_id", "item_id", "x", "t"), {"min_rating": 4}, "no rating is read .left out: x, t"),
        (
            ("user_id", "item_id", "x", "t"),
            {"target_min_rating": 4},
            "--min_rating=4 is given, but",
        ),
        (("user_id", "item_id", "book_rating", "film_rating"), {}, "2 columns could be the rating"),
        (
            ("user_id", "track_id", "rating", "thing_id"),
            {"item_column": "no"},
            "is none of the col",
        ),
        (("name", "thing", "rating", "t"), {}, "no column is known to be the user: found 'name'"),
        (("user_id", "thing", "rating", "x"), {}, "no column is known to be the item: found 'user"),
        (("user_id", "artist_id", "hotel_id", "x"), {}, "2 columns could be the item: 'artist_id'"),
        (("user_id", "item_id", "rating", "rating"), {}, "2 columns could be the rating"),
    ],
)
def test_a_column_that_is_not_known_is_asked_for(put, header, options, message):
    books = [(u, i, r, t % 7) for u, i, r, t in BOOKS]
    with pytest.raises(InputError, match=message):
        prepare(put("b", table(books, header)), put("m", table(MOVIES)), candidates=3, **options)


def test_columns_can_be_named_or_numbered(put):
    odd = [(r, "x", i, t, u) for u, i, r, t in BOOKS]
    asked = {"user": "e", "item": "c", "rating": "a", "time": "d"}
    asked = {f"target_{role}_column": name for role, name in asked.items()}
    movies = put("m", table(MOVIES))
    check(put("named", table(odd, "abcde")), movies, **asked)
    asked = {name: str("abcde".index(column) + 1) for name, column in asked.items()}
    check(put("bare", table(odd, None)), movies, **asked)
    check(put("bare", table(odd, None, "~")), movies, **asked, target_separator="~")
    with pytest.raises(InputError, match="expected a number from 1 to 5"):
        check(put("bare", table(odd, None)), movies, **asked | {"target_user_column": "6"})
    with pytest.raises(InputError, match="--item_column is missing: without a header"):
        check(put("bare", table(odd, None)), movies, target_user_column="1")


@pytest.mark.parametrize(
    "header",
    [("userID", "artistID"), ("user", "thing"), ("person", "object"), ("uid", "x"), ("u", "i_id")],
)
@pytest.mark.parametrize("numeric", [False, True])
def test_the_header_of_two_columns_is_no_row(put, header, numeric):
    sides = []
    for rows in (BOOKS, MOVIES):
        sides.append([(str(int(u[1:]) + 100 * ord(u[0])), i[1:]) if numeric else (u, i)
                      for u, i, *_ in rows])  # fmt: skip
    paths = [put(f"{n}", table(rows, header, "\t")) for n, rows in enumerate(sides)]
    check(*paths, want=expected(*sides))


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_quotes_that_r_writes_are_taken_off(put, separator, header, names):
    if separator == "," and not header or names and not header:
        return  # commas without names tell no order; R's names of rows come with a header
    paths = []
    for n, rows in enumerate((BOOKS, MOVIES)):
        lines = [(f'"{u}"', f'"{i}"', r, t) for u, i, r, t in rows]
        if names:
            lines = [(f'"{n}"', *line) for n, line in enumerate(lines, 1)]
        paths.append(put(f"{n}", table(lines, header and [f'"{x}"' for x in NAMES], separator)))
    check(*paths)


@pytest.mark.parametrize("shape", ["jsonl", "array"])
def test_keys_are_taken_from_many_objects(put, shape):
    rows = objects(BOOKS)
    del rows[0]["timestamp"], rows[0]["rating"], rows[1]["timestamp"]
    rows[2] = {"note": None, **rows[2]}
    text = (
        json.dumps(rows, indent=1)
        if shape == "array"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    books, movies = put("b", text), put("m", table(MOVIES))
    with pytest.raises(InputError, match=r"b:[12]: the rating is missing"):
        prepare(books, movies, candidates=3)
    kept = BOOKS[1:]
    data = check(
        books, movies, skip_bad_rows=True, rows=(len(BOOKS), len(MOVIES)),
        want=expected(kept, MOVIES),
    )  # fmt: skip
    assert data.meta["audit"]["target"]["bad_rows"] == 1
    assert "its times are left out" in data.meta["reading"]["target"]["notes"][0]


def test_a_rating_that_comes_late_is_not_overlooked(put):
    rows = [{"user": u, "item": i} for u, i, *_ in BOOKS] * 5
    text = "".join(
        json.dumps(row) + "\n" for row in [*rows, {"user": "a", "item": "b", "stars": 1}]
    )
    with pytest.raises(InputError, match=f"b:{len(rows) + 1}: the key 'stars' first stands here"):
        prepare(put("b", text), put("m", table(MOVIES)))
    readers.read(put("b", text), rating_column="none")


@pytest.mark.parametrize("shape", ["csv", "jsonl", "parquet"])
def test_of_two_ids_of_a_product_the_parent_is_read(put, shape):
    names = ("user_id", "asin", "parent_asin", "rating", "timestamp")
    sides = [[(u, f"{i}-{n % 3}", i, r, t) for n, (u, i, r, t) in enumerate(rows)]
             for rows in (BOOKS, MOVIES)]  # fmt: skip
    paths = [written(put, f"{n}.{shape}", rows, names) for n, rows in enumerate(sides)]
    data = check(*paths)
    assert "the product is read" in data.meta["reading"]["target"]["notes"][0]


# Ratings.


@pytest.mark.parametrize("with_times", [True, False])
@pytest.mark.parametrize("later", [1, 5])
@pytest.mark.parametrize("place", ["after", "before", "between"])
def test_of_a_pair_rated_again_the_latest_counts(put, place, later, with_times):
    again = [(u, i, later, t + 10**8) for u, i, _, t in BOOKS[::3]]
    if place == "after":
        rows = BOOKS + again
    elif place == "before":
        rows = again + BOOKS
    else:
        rows = BOOKS[::-1] + again[::2] + BOOKS[:0] + again[1::2]
    rows = rows if with_times else cut(rows, 3)
    data = check(
        put("b", table(rows, NAMES[: len(rows[0])])),
        put("m", table(MOVIES)),
        rows=(len(rows), len(MOVIES)),
        want=expected(rows, MOVIES),
    )
    users = {row[0] for row in rows if row[0][0] == "u"}
    assert 0 < data.meta["audit"]["target"]["rated_again"] <= len(again)
    if len(users) == data.num_users:
        assert data.meta["audit"]["target"]["rated_again"] == sum(x[0] in users for x in again)


def test_of_equal_times_the_last_line_counts(put):
    rows = [(u, i, r, 7) for u, i, r, _ in BOOKS] + [(u, i, 6 - r, 7) for u, i, r, _ in BOOKS[:60]]
    check(put("b", table(rows)), put("m", table(MOVIES)), rows=(len(rows), len(MOVIES)),
          want=expected(rows, MOVIES))  # fmt: skip


def test_pairs_below_the_threshold_are_seen_and_no_candidates_by_the_flag(put):
    paths = put("b", table(BOOKS)), put("m", table(MOVIES))
    data = check(*paths)
    shared = set(data.user_ids)
    below = {row[:2] for row in BOOKS if row[2] < 4 and row[0] in shared}
    below = {pair for pair in below if pair[1] in set(data.target_item_ids)}
    users = np.repeat(np.arange(data.num_users), np.diff(data.seen.indptr))
    ids = data.user_ids[users], data.target_item_ids[data.seen.indices]
    assert set(zip(*ids, strict=True)) == below and data.meta["audit"]["seen"] == len(below)
    indptr, items = known_items(data)
    for user in range(data.num_users):
        own = data.target_item_ids[items[indptr[user] : indptr[user + 1]]]
        wanted = {i for u, i in pairs_of(data, "target") | below if u == data.user_ids[user]}
        assert set(own) == wanted and len(own) == len(wanted)
    strict = check(*paths, seen_are_candidates=False)
    for part, found in itertools.product(("valid", "test"), (data, strict)):
        held = getattr(found, part)
        drawn = {
            (found.user_ids[u], found.target_item_ids[i])
            for u, row in zip(held.users, held.candidates, strict=True)
            for i in row
        }
        assert bool(drawn & below) == (found is data)


def test_thresholds_by_domain(put):
    paths = put("b", table(BOOKS)), put("m", table(MOVIES))
    pairs = [liked(BOOKS, 2), liked(MOVIES, 5)]
    shared = set.intersection(*({user for user, _ in own} for own in pairs))
    want = tuple({pair for pair in own if pair[0] in shared} for own in pairs)
    data = check(*paths, want=want, min_rating=5, target_min_rating=2)
    assert data.meta["options"]["min_rating"] == 5
    assert data.meta["options"]["target_min_rating"] == 2


def ncf(folder: pathlib.Path) -> str:
    folder.mkdir()
    lists: dict[str, list] = {}
    for user, item, rating, _ in BOOKS:
        lists.setdefault(user, []).append((item, rating))
    train, test, negative = [], [], []
    for user, own in lists.items():
        (item, rating), *others = own
        test.append(f"{user}\t{item}\t{rating}\n")
        train += [f"{user}\t{i}\t{r}\n" for i, r in others]
        rest = [f"T{n:02}" for n in range(25) if f"T{n:02}" not in dict(own)]
        negative.append(f"({user}, {item})\t" + "\t".join(rest[:9]) + "\n")
    for name, lines in (("train", train), ("test", test), ("test_neg", negative)):
        (folder / f"{name}.txt").write_text("".join(lines))
    return str(folder)


def test_given_test_items_beside_a_rated_source(put, tmp_path):
    target, source = ncf(tmp_path / "ncf"), put("m", table(MOVIES))
    for least, options in ((4, {}), (2, {"source_min_rating": 2})):
        pairs = [{row[:2] for row in BOOKS}, liked(MOVIES, least)]
        shared = set.intersection(*({user for user, _ in own} for own in pairs))
        want = tuple({pair for pair in own if pair[0] in shared} for own in pairs)
        data = check(target, source, want=want, **options)
        assert data.meta["options"]["source_min_rating"] == least
        assert data.meta["audit"]["source"]["below_min_rating"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"min_rating": 3},
        {"target_min_rating": 3},
        {"min_user_items": 2},
        {"min_item_users": 2},
        {"split": "random"},
        {"split": "latest"},
        {"users": "all"},
        {"target_user_column": "x"},
        {"target_separator": "tab"},
        {"target_header": "yes"},
    ],
    ids=str,
)
def test_given_test_items_refuse_what_has_no_meaning(put, tmp_path, options):
    with pytest.raises(InputError, match="given|brings its own|are fixed"):
        prepare(ncf(tmp_path / "ncf"), put("m", table(MOVIES)), candidates=3, **options)


# Rows that are left out.


@pytest.mark.parametrize(
    "word", ["NULL", "null", "None", "nan", "NaN", "N/A", "n/a", "", " ", "\t ", "<NA>", " NULL "]
)
@pytest.mark.parametrize("shape", ["csv", "semicolons", "jsonl", "array", "parquet"])
def test_missing_ids_are_left_out_and_counted(put, shape, word):
    rows = [(word if n % 7 == 3 else u, word if n % 7 == 5 else i, r, t)
            for n, (u, i, r, t) in enumerate(BOOKS)]  # fmt: skip
    left = [row for row in BOOKS if row in rows]
    paths = written(put, f"b.{shape}", rows), put("m", table(MOVIES))
    data = check(*paths, want=expected(left, MOVIES))
    assert data.meta["audit"]["target"]["missing_id"] == len(rows) - len(left)
    assert word not in data.user_ids and word not in data.target_item_ids
    with pytest.raises(InputError, match="no row is left .* without an id"):
        prepare(written(put, f"b.{shape}", [(word, *row[1:]) for row in rows]), paths[1])


@pytest.mark.parametrize("shape", ["jsonl", "array", "parquet"])
def test_null_as_an_id_is_left_out_and_counted(put, shape):
    rows = [(None if n % 7 == 3 else u, i, r, t) for n, (u, i, r, t) in enumerate(BOOKS)]
    data = check(written(put, f"b.{shape}", rows), put("m", table(MOVIES)),
                 want=expected([row for row in rows if row[0]], MOVIES))  # fmt: skip
    assert data.meta["audit"]["target"]["missing_id"] == sum(row[0] is None for row in rows)


BAD = {
    "too many fields": b"u00,T00,5,1,Stories, Vol. 2\n",
    "a word for a rating": b"u00,T00,five,1,x\n",
    "no rating": b"u00,T00,,1,x\n",
    "not UTF-8": b"u00,T\xe900,5,1,x\n",
    "a quote that is not closed": b'u00,T00,5,1,"x\n',
    "text after a quote": b'u00,"T00"x,5,1,x\n',
    "a NUL": b"u00,T00\0,5,1,x\n",
    "too few fields": b"u00\n",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [1, 100, -1])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_bad_rows_are_refused_or_left_out_and_counted(put, kind, at, pack):
    lines = table([(*row, "x") for row in BOOKS], (*NAMES, "title")).encode().splitlines(True)
    at = len(lines) if at < 0 else at
    text = b"".join(lines[:at]) + 2 * BAD[kind] + b"".join(lines[at:])
    books, movies = put("b.csv", pack(text)), put("m", table(MOVIES))
    with pytest.raises(
        InputError, match=rf"b.csv:{at + 1}: .*--skip_bad_rows leaves such rows out"
    ):
        prepare(books, movies)
    data = check(books, movies, skip_bad_rows=True, rows=(len(BOOKS) + 2, len(MOVIES)))
    assert data.meta["audit"]["target"]["bad_rows"] == 2


@pytest.mark.parametrize("line", ["{", '{"user_id": "u00"', "[1]", '"x"', "x", '{"rating": "x"}'])
def test_bad_json_lines_are_refused_or_left_out_and_counted(put, line):
    bad = line.replace('{"rating"', '{"user_id": "a", "item_id": "b", "timestamp": 1, "rating"')
    lines = json_lines(BOOKS).splitlines(True)
    books = put("b.jsonl", "".join([*lines[:9], bad + "\n", *lines[9:]]))
    movies = put("m", table(MOVIES))
    with pytest.raises(InputError, match="b.jsonl:10: "):
        prepare(books, movies)
    data = check(books, movies, skip_bad_rows=True, rows=(len(BOOKS) + 1, len(MOVIES)))
    assert data.meta["audit"]["target"]["bad_rows"] == 1


@pytest.mark.parametrize("ratings", [[5], [4, 5]])
@pytest.mark.parametrize("domains", ["target", "source", "both"])
def test_a_user_with_every_item_is_left_out_and_counted(put, domains, ratings):
    sides = []
    for name, rows in (("target", BOOKS), ("source", MOVIES)):
        items = sorted({i for _, i, *_ in rows})
        if domains not in (name, "both"):
            items = items[:2]
        bot = [("bot", i, ratings[n % len(ratings)], n) for n, i in enumerate(items)]
        sides.append(rows + bot)
    paths = [put(f"{n}", table(rows)) for n, rows in enumerate(sides)]
    data = check(*paths, rows=tuple(map(len, sides)), want=expected(BOOKS, MOVIES))
    for domain, rows, own in zip(("target", "source"), sides, (BOOKS, MOVIES), strict=True):
        assert data.meta["audit"][domain]["has_every_item"] == len(rows) - len(own)


def test_users_with_too_many_items_are_left_out_and_counted(put):
    items = sorted({i for _, i, *_ in BOOKS})[:20]
    bot = [("bot", i, 1 + n % 5, n) for n, i in enumerate(items)]
    movies = MOVIES + [("bot", "S00", 5, 0)]
    paths = put("b", table(BOOKS + bot)), put("m", table(movies))
    rows = len(BOOKS) + 20, len(movies)
    check(*paths, rows=rows, want=expected(BOOKS + bot, movies))
    data = check(*paths, rows=rows, max_user_items=19)
    liked_ones = sum(row[2] >= 4 for row in bot)
    assert data.meta["audit"]["target"]["too_many_items"] == liked_ones
    assert data.meta["audit"]["source"]["too_many_items"] == 1
    assert data.meta["options"]["max_user_items"] == 19
    with pytest.raises(InputError, match="no users are left|no user is left"):
        prepare(*paths, max_user_items=1)


# Formats.


def zip_of(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("folder/", b"")
        for name, data in members.items():
            file.writestr(f"folder/{name}", data)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    """A zstd frame of raw blocks, by its specification (RFC 8878)."""
    blocks = [data[at : at + 60_000] for at in range(0, len(data), 60_000)] or [b""]
    out = b"\x28\xb5\x2f\xfd" + b"\xa0" + len(data).to_bytes(4, "little")
    for n, block in enumerate(blocks):
        out += ((n == len(blocks) - 1) | len(block) << 3).to_bytes(3, "little") + block
    return out


PACKS = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda data: zip_of(books=data),
    "zstd": zstd,
    "utf-16-le": lambda data: b"\xff\xfe" + data.decode().encode("utf-16-le"),
    "utf-16-be": lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "zip of utf-16": lambda data: zip_of(x=data.decode().encode("utf-16")),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shape", ["csv", "tsv", "jsonl", "array", "quoted"])
def test_packed_files_are_read_whatever_their_name(put, pack, shape):
    paths = []
    for n, rows in enumerate((BOOKS, MOVIES)):
        path = pathlib.Path(written(put, f"{n}.{shape}", rows))
        text = path.read_bytes()
        if shape == "quoted":
            text = text.replace(b"\n", b',"a, ""b"""\n').replace(b',"a, ""b"""', b",title", 1)
        path.write_bytes(PACKS[pack](text))
        paths.append(str(path))
    check(*paths)


@pytest.mark.parametrize("separator", ["::", "\t", ";", "|"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("header", [False, True])
def test_separators_with_and_without_a_header(put, separator, header, width):
    sides = cut(BOOKS, width), cut(MOVIES, width)
    texts = [table(rows, header and NAMES[:width], separator) for rows in sides]
    check(*(put(f"{n}", text) for n, text in enumerate(texts)), want=expected(*sides))


@pytest.mark.parametrize("asked", ["space", " ", "~~", "€"])
def test_a_separator_can_be_given(put, asked):
    texts = [table(rows, None, {"space": " "}.get(asked, asked)) for rows in (BOOKS, MOVIES)]
    check(*(put(f"{n}", text) for n, text in enumerate(texts)), separator=asked)


@pytest.mark.parametrize(
    "names",
    [
        ("user_id", "business_id", "stars", "date"),  # Yelp
        ("user_id", "book_id", "rating", "date_added"),  # Goodreads
        ("username", "product_id", "recommended", "date"),  # Steam
        ("reviewerID", "asin", "overall", "unixReviewTime"),  # Amazon, 2014 and 2018
    ],
    ids=["Yelp", "Goodreads", "Steam", "Amazon"],
)
@pytest.mark.parametrize("python", [False, True])
def test_objects_of_known_data_sets(put, names, python):
    forms = {
        "date": "%Y-%m-%d %H:%M:%S",
        "date_added": "%a %b %d %H:%M:%S %z %Y",
    }
    texts = []
    for rows in (BOOKS, MOVIES):
        lines = []
        for user, item, rating, time in rows:
            when = dt.datetime.fromtimestamp(time, dt.UTC)
            values = [user, item, rating, when.strftime(forms.get(names[3], "%s"))]
            values[2] = rating >= 4 if names[2] == "recommended" else rating
            row = {"review_id": "r", **dict(zip(names, values, strict=True)), "text": 'it\'s "so"'}
            lines.append((repr(row) if python else json.dumps(row)) + "\n")
        texts.append("".join(lines))
    data = check(*(put(f"{n}", text) for n, text in enumerate(texts)), split="latest",
                 keep_future=True)  # fmt: skip
    assert data.meta["reading"]["target"]["columns"]["timestamp"] == names[3]


FORMS = {
    "ISO": "%Y-%m-%d",
    "ISO with a time": "%Y-%m-%dT%H:%M:%SZ",
    "ISO with a zone": "%Y-%m-%d %H:%M:%S+02:00",
    "slashes, year first": "%Y/%m/%d %H:%M",
    "day first": "%d/%m/%Y",
    "month first": "%m/%d/%Y %H:%M:%S",
    "dots": "%d.%m.%Y",
    "dashes": "%d-%m-%Y %H:%M",
    "a month in words": "%B %d, %Y",
    "a short month": "%d %b %Y",
    "Amazon's": "%m %d, %Y",
    "Goodreads'": "%a %b %d %H:%M:%S %z %Y",
    "e-mail's": "%a, %d %b %Y %H:%M:%S +0000",
    "half days": "%m/%d/%Y %I:%M %p",
    "ms": None,
    "µs": None,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["semicolons", "jsonl", "parquet"])
def test_times_in_the_common_forms_are_the_times(put, form, shape):
    def rewritten(rows: Rows) -> tuple[Rows, list[float]]:
        out, times = [], []
        for n, (user, item, rating, _) in enumerate(rows):
            when = dt.datetime(2017, 1 + n % 12, 1 + n % 28, n % 24, n % 60, n % 60, tzinfo=dt.UTC)
            text = when.strftime(FORMS[form] or "")
            factor = {"ms": 10**3, "µs": 10**6}.get(form)
            if factor:
                text = int(when.timestamp()) * factor
            parts = FORMS[form] or "%H%M%S"
            kept = when.replace(
                hour=when.hour if "%H" in parts or "%I" in parts else 0,
                minute=when.minute if "%M" in parts else 0,
                second=when.second if "%S" in parts else 0,
            )
            shift = 7200 if form == "ISO with a zone" else 0
            out.append((user, item, rating, text))
            times.append(kept.timestamp() - shift)
        return out, times

    books, times = rewritten(BOOKS)
    path = written(put, f"b.{shape}", books, (*NAMES[:3], "date"))
    assert readers.read(path).frame.collect()["timestamp"].to_list() == times
    movies = written(put, f"m.{shape}", rewritten(MOVIES)[0], (*NAMES[:3], "date"))
    check(path, movies, split="latest", keep_future=True)


def test_typed_dates_and_numbers_of_parquet(put):
    frame = pl.DataFrame(objects(BOOKS))
    when = pl.from_epoch("timestamp", time_unit="s")
    for kind in (pl.Datetime("us"), pl.Datetime("ms", "UTC"), pl.Int32, pl.UInt64, pl.Float64):
        column = (
            when.cast(pl.Datetime("us")) if isinstance(kind, pl.Datetime) else pl.col("timestamp")
        )
        if isinstance(kind, pl.Datetime) and kind.time_zone:
            column = when.dt.replace_time_zone("UTC")
        path = put("b.parquet", b"")
        frame.with_columns(
            column.alias("timestamp"),
            pl.col("rating").cast(pl.Decimal(4, 1)),
            pl.col("user_id").cast(pl.Categorical),
        ).write_parquet(path)
        found = readers.read(path).frame.collect()
        assert found["timestamp"].to_list() == [float(row[3]) for row in BOOKS], kind
        check(path, put("m", table(MOVIES)))


def test_times_that_cannot_be_read_matter_only_where_they_are_needed(put):
    rows = [(u, i, r, "long ago" if n == 40 else t) for n, (u, i, r, t) in enumerate(BOOKS)]
    books, movies = put("b", table(rows)), put("m", table(MOVIES))
    data = check(books, movies)
    assert "b:42: bad timestamp 'long ago'" in data.meta["reading"]["target"]["notes"][0]
    for options in ({"split": "latest"}, {"time_column": "timestamp"}):
        with pytest.raises(InputError, match="b:42: bad timestamp 'long ago'"):
            prepare(books, movies, candidates=3, **options)
    check(books, movies, time_column="none")


@pytest.mark.parametrize("separator", [";", "\t", "|", "::"])
@pytest.mark.parametrize("quoted", [False, True])
def test_decimal_commas(put, separator, quoted):
    mark = '"' if quoted and separator != "::" else ""
    texts = [
        table([(u, i, f"{mark}{r - 1},5{mark}", t) for u, i, r, t in rows], NAMES, separator)
        for rows in (BOOKS, MOVIES)
    ]
    paths = [put(f"{n}", text) for n, text in enumerate(texts)]
    check(*paths, min_rating=3.5)
    with pytest.raises(InputError, match="bad rating '1,5'"):  # between commas it may be thousands
        readers.read(put("x", 'user,item,rating\na,b,"1,5"\n'))


@pytest.mark.parametrize("data", ["csv", "gzip", "jsonl", "parquet"])
def test_a_file_from_standard_input(put, tmp_path, data):
    text = {"csv": table(BOOKS), "jsonl": json_lines(BOOKS)}.get(data, table(BOOKS)).encode()
    if data == "parquet":
        text = pathlib.Path(written(put, "b.parquet", BOOKS)).read_bytes()
    text = gzip.compress(text) if data == "gzip" else text
    movies = put("m", table(MOVIES))
    done = command(target="-", source=movies, out=tmp_path / "out", candidates=11, stdin=text)
    assert done.returncode == 0, done.stderr
    want = expected(BOOKS, MOVIES)
    row = next(x for x in done.stdout.splitlines() if x.startswith("this data set")).split()
    assert (int(row[5]), int(row[8])) == tuple(map(len, want))
    done = command(target="-", source="-", out=tmp_path / "out", stdin=text)
    assert done.returncode == 2 and "both files are -" in done.stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zip_of(a=b"x", b=b"y"), "a zip archive of 2 files .folder/a, folder/b.: expected one"),
        (zip_of(), "a zip archive of 0 files"),
        (zip_of(**{"x": b"user,item\na,b\n"})[:60], "cannot be read: File is not a zip file"),
        (b"ARROW1\0\0" + bytes(99), "is a Feather .Arrow. file: save it as CSV or Parquet"),
        (b"\x89HDF\r\n" + bytes(99), "is an HDF5 file"),
        (b"SQLite format 3\0" + bytes(99), "is an SQLite database"),
        (b"\x80\x04\x95" + bytes(99), "is stored Python objects"),
        (bytes(257) + b"ustar\0" + bytes(300), "is a tar archive: unpack it"),
        (b"PAR1" + bytes(99) + b"PAR1", "cannot be read: "),
        (lzma.compress(b"user,item\na,b\n" * 99)[:-30], "cannot be read: Compressed file ended"),
        (bz2.compress(b"user,item\na,b\n" * 99)[:-30], "cannot be read: Compressed file ended"),
        (
            b"\xff\xfe" + "user,item\na,b\n".encode("utf-16-le") + b"x",
            "not the text that its first",
        ),
        ("user,item\na,é\n".encode("latin-1"), "b:2: not UTF-8 text: .*save the file as UTF-8"),
        (b'[{"user": "a", "item": "b"}', "b:1: not JSON .expected , or ] after an object"),
        (b'[{"user": "a", "item": "b"}] x', "text follows the JSON array"),
    ],
    ids=lambda x: str(x)[:20] if isinstance(x, str) else "",
)
def test_what_cannot_be_read_is_said_as_it_is(put, data, message):
    with pytest.raises(InputError, match=message) as error:
        readers.read(put("b", data))
    if "UTF-8" not in message:
        assert "not UTF-8" not in str(error.value)


def test_a_workbook_is_no_zip_of_a_table(put):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("[Content_Types].xml", "x")
        file.writestr("xl/workbook.xml", "x")
    with pytest.raises(InputError, match="Excel workbook or another document: save it as CSV"):
        readers.read(put("b.xlsx", out.getvalue()))


# Tables in memory.


@pytest.mark.parametrize("kind", ["polars", "lazy", "columns", "rows", "array"])
def test_tables_in_memory(kind):
    def table_of(rows: Rows):
        if kind == "rows":
            return [list(row) for row in rows]
        if kind == "array":
            return np.array(rows)  # of text
        columns = {name: [row[n] for row in rows] for n, name in enumerate(NAMES)}
        if kind == "columns":
            return {name: np.array(column) for name, column in columns.items()}
        return pl.DataFrame(columns) if kind == "polars" else pl.LazyFrame(columns)

    data = check(table_of(BOOKS), table_of(MOVIES))
    assert list(data.meta["reading"]["target"]["columns"]) == [
        "user",
        "item",
        "rating",
        "timestamp",
    ]


def test_pandas_frames():
    pandas = pytest.importorskip("pandas")
    frames = [pandas.DataFrame(objects(rows)) for rows in (BOOKS, MOVIES)]
    check(*frames)
    gaps = frames[0].copy()
    gaps["user_id"] = [float(u[1:]) if u[0] == "u" else None for u in gaps["user_id"]]
    movies = frames[1].assign(user_id=[int(u[1:]) + 99 * (u[0] != "u") for u in frames[1].user_id])
    numbered = [(str(int(u[1:])), *row) for u, *row in BOOKS if u[0] == "u"]
    others = [(str(int(u[1:]) + 99 * (u[0] != "u")), *row) for u, *row in MOVIES]
    check(gaps, movies, want=expected(numbered, others))
    dated = frames[0].assign(timestamp=pandas.to_datetime(frames[0].timestamp, unit="s"))
    assert readers.read(dated).frame.collect()["timestamp"].to_list() == [row[3] for row in BOOKS]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (7, "the table is int: expected|the table cannot be read"),
        ({"user": [1, 2], "item": [1]}, "the table cannot be read"),
        ([[1], [2]], "the table is list: expected a Polars or pandas frame"),
        ({"user": [1, 2], "item": [1, 2], "rating": [1, None]}, "row 2: the rating is missing"),
        ({"user": [1.5], "item": [1]}, "row 1: bad user id 1.5"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(table, message):
    with pytest.raises(InputError, match=message):
        readers.read(table)


def test_options_are_known_by_name():
    with pytest.raises(InputError, match="unknown option 'min_ratings'; did you mean min_rating"):
        prepare(BOOKS, MOVIES, min_ratings=3)


def test_the_package_has_prepare_without_loading_it():
    import conet_jax

    assert conet_jax.prepare is prepare and "prepare" in dir(conet_jax)
    with pytest.raises(AttributeError, match="has no attribute 'prepares'"):
        _ = conet_jax.prepares


# The audit, in every format.

users = st.sampled_from(["a", "b", "c", "d", "e", "NULL", "", "f"])
items = st.sampled_from(["1", "2", "3", "4", "5", "N/A", "6"])
ratings = st.sampled_from(["1", "3", "4", "5", "five", "", "2.5"])
any_rows = st.lists(st.tuples(users, items, ratings, st.sampled_from(["1", "2", "3"])),
                    min_size=12, max_size=60)  # fmt: skip
TEXTS = ("csv", "tsv", "semicolons", "colons", "quoted", "recbole", "jsonl", "python", "array")
SHAPES = (*TEXTS, "parquet", "frame")


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    any_rows,
    any_rows,
    st.sampled_from(SHAPES),
    st.sampled_from(SHAPES),
    st.sampled_from(["plain", *PACKS]),
    st.fixed_dictionaries(
        {"skip_bad_rows": st.just(True), "candidates": st.just(1)},
        optional={
            "min_rating": st.sampled_from([2, 3, 5]),
            "source_min_rating": st.just(1),
            "min_item_users": st.just(2),
            "max_user_items": st.sampled_from([3, 5]),
            "split": st.sampled_from(["latest", "random"]),
            "drop_twins": st.just(True),
            "users": st.just("all"),
            "seen_are_candidates": st.just(False),
            "rating_column": st.just("none"),
            "hold_out": st.just("both"),
            "cutoff": st.sampled_from(["0.5", "0.8"]),
            "weight_column": st.just("timestamp"),
        },
    ),
)
def test_the_audit_adds_up(tmp_path_factory, books, movies, one, two, pack, options):
    folder = tmp_path_factory.mktemp("files")

    def put(name: str, data) -> str:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(folder / name)

    paths = [
        pl.DataFrame(objects(rows)) if shape == "frame" else written(put, f"{name}.{shape}", rows)
        for name, shape, rows in (("b", one, books), ("m", two, movies))
    ]
    if "cutoff" in options:
        options = {key: x for key, x in options.items() if key != "weight_column"}
        options["split"] = "time"
    if "weight_column" in options:
        options = {key: x for key, x in options.items() if key != "split"}
    if pack != "plain" and one in TEXTS:
        path = pathlib.Path(paths[0])
        path.write_bytes(PACKS[pack](path.read_bytes()))
    if options.get("rating_column"):
        options = {k: v for k, v in options.items() if "min_rating" not in k}
    try:
        data = prepare(*paths, **options)
    except InputError:
        hypothesis.event("refused")
        return
    hypothesis.event("prepared")
    assert adds_up(data)
    for domain, rows in (("target", books), ("source", movies)):
        report = data.meta["audit"][domain]
        assert report["rows"] == len(rows)
        missing = [not {"", "NULL", "N/A"} & set(row[:2]) for row in rows]
        bad = [row[2] in ("five", "") and "rating_column" not in options for row in rows]
        assert report.get("missing_id", 0) == missing.count(False)
        assert report.get("bad_rows", 0) == sum(x and y for x, y in zip(missing, bad, strict=True))


def test_what_is_seen_survives_the_disk_and_recboles_files(put, tmp_path):
    data = check(put("b", table(BOOKS)), put("m", table(MOVIES)))
    assert data.seen is not None
    store.save(data, tmp_path / "prepared")
    recbole.save(data, tmp_path / "recbole")
    for found in (store.load(tmp_path / "prepared"), recbole.load(tmp_path / "recbole")):
        assert found.meta == data.meta
        for one, two in zip(found.seen, data.seen, strict=True):
            np.testing.assert_array_equal(one, two)


def test_no_list_recommends_what_was_seen_and_not_liked(put):
    data = check(put("b", table(BOOKS)), put("m", table(MOVIES)))
    experiment = make_experiment(default_config("popularity"), data)
    start = experiment.state_of(experiment.model.init(None, experiment.sizes))
    recommender = make_recommender(experiment, experiment.sweep(start))
    everyone = recommend.find_users(recommender, data.user_ids)
    lists = recommend.recommend(recommender, everyone, k=25).select("user", "item").rows()
    shared = set(data.user_ids)
    rated = {row[:2] for row in BOOKS if row[0] in shared}
    assert lists and not rated & set(lists)
    again = recommend.recommend(recommender, everyone, k=25, include_seen=True)
    assert rated & set(again.select("user", "item").rows())


def test_a_later_file_of_the_source_is_read_as_prepare_read_it(put):
    names = ("who", "what", "how", "when")
    asked = {"source_user_column": "who", "source_item_column": "what"}
    asked |= {"source_rating_column": "how", "source_time_column": "when", "source_min_rating": 2}
    pairs = [liked(BOOKS), liked(MOVIES, 2)]
    shared = set.intersection(*({user for user, _ in own} for own in pairs))
    want = tuple({pair for pair in own if pair[0] in shared} for own in pairs)
    data = check(put("b", table(BOOKS)), put("m", table(MOVIES, names, ";")), want=want, **asked)
    later = MOVIES[::2] + [(u, i, 1, t + 9) for u, i, _, t in MOVIES[::6]]
    path = put("later", table(later, names, ";"))
    found = positives_of(data.meta, "source", path).collect().rows()
    assert set(found) == liked(later, 2) and len(found) == len(set(found))
    with pytest.raises(InputError, match="--user_column=who is none of the columns"):
        positives_of(data.meta, "source", put("other", table(MOVIES)))
