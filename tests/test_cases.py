"""Kinds of files from bug reports: small cases beside the clone, and further shapes made here.

``../shared/cases`` has a README that says what is right. ``test_front_door`` tries the kinds that
are not here: ratings under other names, two columns, pairs rated again, missing ids, dates,
separators, bad rows, users who have everything.
"""

import datetime as dt
import gzip
import json
import pathlib

import numpy as np
import pytest
from test_front_door import (
    BOOKS,
    MOVIES,
    NAMES,
    adds_up,
    check,
    expected,
    liked,
    ncf,
    objects,
    pairs_of,
    put,  # noqa: F401
    table,
    written,
)

from conet_jax.data.prepare import prepare
from conet_jax.errors import InputError

RIGHT = (120, 676, 821)
REFUSED = "--skip_bad_rows leaves such rows out"
CASES = [
    ("books.csv", "movies.csv", {}, RIGHT),
    ("books.csv", "movies.csv", {"min_rating": 1}, (120, 891, 1099)),
    ("books_book_rating.csv", "movies_movie_rating.csv", {}, RIGHT),
    ("books_first_without_rating.jsonl", "movies.csv", {}, f"jsonl:1: .*{REFUSED}"),
    (
        *(f"{name}_first_without_rating.jsonl" for name in ("books", "movies")),
        {"skip_bad_rows": True},
        RIGHT,
    ),
    ("books_two_columns.tsv", "movies_two_columns.tsv", {}, (120, 891, 1099)),
    ("books_rated_again.csv", "movies_rated_again.csv", {}, (120, 556, 821)),
    ("books_null_user.csv", "movies_null_user.csv", {}, (120, 632, 757)),
    ("ncf", "movies.csv", {}, (120, 891, 821)),
    ("ncf", "movies.csv", {"source_min_rating": 3}, (120, 891, 969)),
    ("ncf", "movies.csv", {"min_rating": 3}, "--min_rating=3 is given, but its test items are"),
    ("ncf", "movies.csv", {"min_item_users": 2}, "leave out --min_item_users=2"),
    ("books_dates.csv", "movies_dates.csv", {}, RIGHT),
    ("books_double_colon.dat", "movies_double_colon.dat", {}, RIGHT),
    ("books.parquet", "movies.parquet", {}, RIGHT),
    ("books_array.json", "movies_array.json", {}, RIGHT),
    ("books_bad_rows.csv", "movies_bad_rows.csv", {}, f"bad_rows.csv:702: .*{REFUSED}"),
    ("books_bad_rows.csv", "movies_bad_rows.csv", {"skip_bad_rows": True}, (120, 676, 820)),
    ("books_bot.csv", "movies_bot.csv", {}, RIGHT),
]


@pytest.fixture(scope="module")
def cases(data_dir) -> pathlib.Path:
    folder = data_dir.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.mark.parametrize(("target", "source", "options", "right"), CASES, ids=str)
def test_cases_give_what_is_right(cases, target, source, options, right):
    def made():
        return prepare(str(cases / target), str(cases / source), candidates=20, **options)

    if isinstance(right, str):
        with pytest.raises(InputError, match=right):
            made()
        return
    data = made()
    counts = data.meta["counts"]
    assert tuple(counts[n] for n in ("users", "target_interactions", "source_interactions")) == (
        right
    )
    assert counts["target_items"] == 60 and adds_up(data)
    words = {"", "null", "user_id", "user", "item_id", "thing"}
    for ids in (data.user_ids, data.target_item_ids, data.source_item_ids):
        assert not words & {name.strip().lower() for name in ids}


def test_cases_in_time(cases):
    day = [str(cases / f"{name}_one_day.csv") for name in ("books", "movies")]
    time = prepare(*day, candidates=20, split="latest").meta["audit"]["time"]
    assert time["one_moment"] and time["users_with_ties"] == 120
    target = str(cases / "future_target.csv")
    sources = [str(cases / f"future_source{end}.csv") for end in ("", "_before")]
    one, two = (prepare(target, s, candidates=20, split="latest") for s in sources)
    assert pairs_of(one, "source") == pairs_of(two, "source")
    np.testing.assert_array_equal(one.target.indices, two.target.indices)


# An object without an optional key, first.


@pytest.mark.parametrize("shape", ["lines", "array", "array in one line", "Python", "gzip"])
@pytest.mark.parametrize("without", [("rating",), ("timestamp",), ("rating", "timestamp")])
@pytest.mark.parametrize("first", [1, 3])
def test_the_first_objects_lack_a_key(put, shape, without, first):  # noqa: F811
    rows = objects(BOOKS)
    for row in rows[:first]:
        for key in without:
            del row[key]
    lines = "".join((repr(row) if shape == "Python" else json.dumps(row)) + "\n" for row in rows)
    text = {"array": json.dumps(rows, indent=2), "array in one line": json.dumps(rows)}.get(
        shape, lines
    )
    data = gzip.compress(text.encode()) if shape == "gzip" else text
    books, movies = put("b", data), put("m", table(MOVIES))
    if without == ("timestamp",):
        found = check(books, movies)
        assert "its times are left out" in found.meta["reading"]["target"]["notes"][0]
        return
    with pytest.raises(InputError, match=rf"b:[12]: the rating is missing.*{REFUSED}"):
        prepare(books, movies, candidates=3)
    left = BOOKS[first:]
    found = check(books, movies, skip_bad_rows=True, rows=(len(BOOKS), len(MOVIES)),
                  want=expected(left, MOVIES))  # fmt: skip
    assert found.meta["audit"]["target"]["bad_rows"] == first


# Times that are all equal.


@pytest.mark.parametrize("moment", [0, 1_500_000_000, 1_500_000_000_000, "2017-07-14", "7/14/2017"])
@pytest.mark.parametrize("shape", ["csv", "jsonl", "parquet"])
def test_where_all_times_are_equal_the_seed_chooses_and_that_is_said(put, moment, shape):  # noqa: F811
    sides = [[(*row[:3], moment) for row in rows] for rows in (BOOKS, MOVIES)]
    paths = [written(put, f"{n}.{shape}", rows) for n, rows in enumerate(sides)]
    one, two = (check(*paths, split="latest", seed=seed) for seed in (0, 1))
    time = one.meta["audit"]["time"]
    assert time["one_moment"] and time["users_with_ties"] == len(one.test.users) > 0
    assert (one.test.items != two.test.items).any()


# What a user does after the held-out item.


@pytest.mark.parametrize("shape", ["csv", "jsonl", "parquet", "colons"])
@pytest.mark.parametrize("form", ["seconds", "milliseconds", "ISO", "days"])
def test_what_comes_later_tells_nothing(put, shape, form):  # noqa: F811
    """A film that is bought the day after its book, and nothing else in common."""
    rng, books, films = np.random.default_rng(0), [], []
    for user in range(60):
        for n, item in enumerate(rng.choice(25, 5, replace=False)):
            when = 1_500_000_000 + 86_400 * (10 * n + int(rng.integers(5)))
            books.append((f"u{user}", f"b{item}", 5, when))
            films.append((f"u{user}", f"f{item}", 5, when + 86_400))
        films.append((f"u{user}", f"f{25 + user % 5}", 5, 1_400_000_000))
    last = {}
    for user, _, _, when in books:
        last[user] = max(when, last.get(user, 0))
    before = [row for row in films if row[3] <= last[row[0]]]
    assert len(before) < len(films)

    def as_written(rows):
        found = []
        for *row, when in rows:
            moment = dt.datetime.fromtimestamp(when, dt.UTC)
            text = {"seconds": when, "milliseconds": 1000 * when, "ISO": moment.isoformat()}
            found.append((*row, text.get(form, moment.strftime("%d.%m.%Y"))))
        return found

    target, *sources = (
        written(put, f"{name}.{shape}", as_written(rows))
        for name, rows in (("books", books), ("films", films), ("before", before))
    )
    one, two = (prepare(target, s, candidates=5, split="latest") for s in sources)
    assert pairs_of(one, "source") == pairs_of(two, "source")
    assert one.meta["audit"]["time"]["future_rows"] > two.meta["audit"]["time"]["future_rows"]
    assert adds_up(one) and adds_up(two)
    kept = prepare(target, sources[0], candidates=5, split="latest", keep_future=True)
    assert pairs_of(kept, "source") > pairs_of(one, "source")


# Test items that are given, beside a rated source.


def as_prefix(folder: pathlib.Path) -> str:
    names = {"train": "train.rating", "test": "test.rating", "test_neg": "test.negative"}
    for old, new in names.items():
        (folder / f"{old}.txt").rename(folder / f"books.{new}")
    return str(folder / "books")


def as_two_columns(folder: pathlib.Path) -> str:
    for name in ("train", "test"):
        lines = (folder / f"{name}.txt").read_text().splitlines()
        text = "".join("\t".join(line.split("\t")[:2]) + "\n" for line in lines)
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def as_windows(folder: pathlib.Path) -> str:
    for path in folder.glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return str(folder)


def as_blank_lines(folder: pathlib.Path) -> str:
    for path in folder.glob("*.txt"):
        path.write_text(path.read_text() + "\n\n")
    return str(folder)


@pytest.mark.parametrize("shape", [str, as_prefix, as_two_columns, as_windows, as_blank_lines])
@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "colons"])
def test_given_test_items_in_their_shapes(put, tmp_path, shape, source):  # noqa: F811
    folder = tmp_path / "given"
    ncf(folder)
    pairs = [{row[:2] for row in BOOKS}, liked(MOVIES, 2)]
    shared = set.intersection(*({user for user, _ in own} for own in pairs))
    want = tuple({pair for pair in own if pair[0] in shared} for own in pairs)
    movies = written(put, f"m.{source}", MOVIES, NAMES)
    data = check(shape(folder), movies, want=want, source_min_rating=2)
    assert data.meta["options"]["source_min_rating"] == 2
    assert data.meta["audit"]["source"]["below_min_rating"] > 0
