"""A data set is what slow, simple loops over the raw rows say it is."""

import itertools

import hypothesis
import numpy as np
import polars as pl
import pytest
from hypothesis import strategies as st

from conet_jax.data import build, readers, twins
from conet_jax.data.assemble import from_arrays
from conet_jax.data.ncf import Given
from conet_jax.data.types import Dataset, HeldOut, arrays, content_hash
from conet_jax.errors import InputError


def rows(triples, ratings=None, times=None, given=None, name="raw") -> readers.DomainRows:
    columns = {"user": [str(u) for u, _ in triples], "item": [str(i) for _, i in triples]}
    schema = {"user": pl.String, "item": pl.String}
    for role, values in (("rating", ratings), ("timestamp", times)):
        if values is not None:
            columns[role], schema[role] = [float(v) for v in values], pl.Float64
    frame = pl.LazyFrame(columns, schema=schema)
    return readers.DomainRows(name, frame, len(triples), given)


def all_pairs(data: Dataset, domain: str) -> set:
    """The raw (user, item) pairs of a domain, held-out ones too."""
    ids = getattr(data, f"{domain}_item_ids")
    csr = getattr(data, domain)
    users = np.repeat(np.arange(data.num_users), np.diff(csr.indptr))
    pairs = list(zip(users, csr.indices, strict=True))
    if domain == "target":
        for held in (data.valid, data.test):
            pairs += list(zip(held.users, held.items, strict=True))
    named = [(data.user_ids[u], ids[i]) for u, i in pairs]
    assert len(named) == len(set(named))
    return set(named)


def simple_core(target: set, source: set, min_user: int, min_item: int) -> tuple[set, set]:
    """The core by the dullest means: remove one thing at a time until nothing changes."""
    domains = [set(target), set(source)]
    while True:
        for domain, at in itertools.product(domains, (0, 1)):
            least = min_user if at == 0 else min_item
            names = sorted({pair[at] for pair in domain})
            weak = next((x for x in names if sum(p[at] == x for p in domain) < least), None)
            if weak is not None:
                domain -= {pair for pair in domain if pair[at] == weak}
                break
        else:
            lone = {u for u, _ in domains[0]} ^ {u for u, _ in domains[1]}
            for domain in domains:  # who has every item has no negative
                size = len({i for _, i in domain})
                lone |= {u for u, _ in domain if sum(v == u for v, _ in domain) == size}
            if not lone:
                return domains[0], domains[1]
            for domain in domains:
                domain -= {pair for pair in domain if pair[0] in lone}


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.1, 0.3, 0.5])
)
def test_core_is_that_of_a_simple_loop(seed, min_user, min_item, density):
    rng = np.random.default_rng(seed)
    pairs = []
    for size in (9, 7):
        users, items = np.nonzero(rng.random((10, size)) < density)
        pairs.append({(f"u{u}", f"i{i}") for u, i in zip(users, items, strict=True)})
    want = simple_core(*pairs, min_user, min_item)
    options = {"min_user_items": min_user, "min_item_users": min_item, "candidates": 1}
    try:
        data = build.build(*(rows(sorted(p)) for p in pairs), **options)
    except InputError as error:
        text = str(error)
        if "core is empty" in text or "no shared users" in text:
            assert not want[0]
        elif "nothing to test on" in text:
            assert max(sum(p[0] == u for p in want[0]) for u, _ in want[0]) < 2
        else:
            assert "every item" in text and not want[0]
        return
    assert (all_pairs(data, "target"), all_pairs(data, "source")) == want
    for name, pool in zip(("target", "source"), want, strict=True):
        assert data.user_ids.tolist() == sorted({u for u, _ in pool})
        assert getattr(data, f"{name}_item_ids").tolist() == sorted({i for _, i in pool})
        report = data.meta["audit"][name]
        dropped = sum(n for key, n in report.items() if key != "rows")
        assert report["rows"] - dropped == len(pool)


def some(users=30, target_items=40, source_items=20, seed=0, degree=6, source_degree=None):
    rng = np.random.default_rng(seed)
    source_degree = source_degree or degree
    sides = ((target_items, degree), (source_items, source_degree))
    return tuple(
        [(u, i) for u in range(users) for i in rng.choice(n, min(d, n - 1), replace=False)]
        for n, d in sides
    )


def test_splits_and_candidates_hold_what_they_promise():
    target, source = some()
    data = build.build(rows(target), rows(source), candidates=20)
    touched = {}
    for u, i in target:
        touched.setdefault(str(u), set()).add(str(i))
    for held in (data.valid, data.test):
        assert isinstance(held, HeldOut) and held.mask.all()
        assert held.candidates.shape == (30, 20) and held.candidates.dtype == np.int32
        for u, item, row in zip(held.users, held.items, held.candidates, strict=True):
            mine = touched[data.user_ids[u]]
            ids = data.target_item_ids
            assert ids[item] in mine and not mine & set(ids[row]) and len(set(row)) == 20
            train = data.target.indices[data.target.indptr[u] : data.target.indptr[u + 1]]
            assert item not in train and len(train) == len(mine) - 2
    assert not set(zip(data.valid.users, data.valid.items, strict=True)) & set(
        zip(data.test.users, data.test.items, strict=True)
    )
    assert (data.valid.candidates != data.test.candidates).any()


def test_rating_threshold_and_duplicates_and_audit():
    pairs = [("a", 1), ("a", 1), ("a", 2), ("b", 1), ("b", 3), ("c", 3), ("a", 4)]
    ratings = [5, 4, 3.9, 4, 4, 5, 4]
    data = build.build(
        rows(pairs, ratings), rows([("a", 1), ("b", 1), ("b", 2), ("a", 3)]), candidates=1
    )
    assert all_pairs(data, "target") == {("a", "1"), ("b", "1"), ("b", "3"), ("a", "4")}
    report = data.meta["audit"]["target"]
    assert report["rows"] == 7 and report["below_min_rating"] == 1
    assert report["user_not_shared"] == 1 and report["rated_again"] == 1
    assert data.meta["audit"]["users_without_valid"] == 2
    assert data.meta["audit"]["users_without_test"] == 0


def test_duplicates_keep_the_latest_time():
    pairs = [("a", 1), ("a", 2), ("a", 3), ("a", 1), ("b", 4)]
    data = build.build(
        rows(pairs, times=[1, 2, 3, 9, 0]),
        rows([("a", 1), ("b", 2)]),
        split="latest",
        keep_future=True,
        candidates=1,
    )
    assert data.target_item_ids[data.test.items].tolist() == ["1"]
    assert data.target_item_ids[data.valid.items].tolist() == ["3"]


def test_order_of_rows_does_not_matter_and_seeds_do():
    target, source = some()
    first = build.build(rows(target), rows(source), candidates=9)
    again = build.build(rows(target[::-1]), rows(source[::-1]), candidates=9)
    other = build.build(rows(target), rows(source), candidates=9, seed=1)
    assert first.meta == again.meta
    for one, two in zip(arrays(first).values(), arrays(again).values(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.test.items != other.test.items).any()
    assert first.meta["hash"] != other.meta["hash"]


def test_hash_sees_every_array_id_and_option():
    data = build.build(*map(rows, some()), candidates=9)
    seen = {data.meta["hash"]}
    for domain in ("target", "source"):
        csr = getattr(data, domain)
        seen.add(content_hash(data._replace(**{domain: csr._replace(indices=csr.indptr)})))
    for part, field in itertools.product(("valid", "test"), HeldOut._fields):
        held = getattr(data, part)
        values = getattr(held, field).copy()
        values.flat[-1] = ~values.flat[-1]
        seen.add(content_hash(data._replace(**{part: held._replace(**{field: values})})))
    for name in ("user_ids", "target_item_ids", "source_item_ids"):
        ids = getattr(data, name).copy()
        ids[0], ids[1] = ids[0] + ids[1][:1], ids[1][1:]  # the same bytes, cut elsewhere
        seen.add(content_hash(data._replace(**{name: ids})))
    options = data.meta["options"] | {"min_rating": 3.0}
    seen.add(content_hash(data._replace(meta=data.meta | {"options": options})))
    assert len(seen) == 1 + 2 + 8 + 3 + 1


def test_data_made_as_before_keep_the_hash_that_they_had():
    # Published figures name their data by hash: if it changes here, it changes for everybody.
    target, source = some(degree=4, source_degree=3)
    source = source + [(u, 1000 + i) for u, i in target if i < 5]
    made = build.build(rows(target), rows(source), candidates=9)
    assert made.meta["hash"].startswith("c97f3d73f9f4")
    strict = {"drop_twins": True, "twin_jaccard": 0.9, "twin_users": 3}
    made = build.build(rows(target), rows(source), candidates=9, **strict)
    assert made.meta["hash"].startswith("6ae0ede88b82")
    made = build.build(rows(target), rows(source), candidates=9, drop_twins=True)
    assert made.meta["options"]["twin_users"] == 2


def test_leading_zeros_are_other_ids():
    target = [("01", "007"), ("01", "7"), ("1", "07"), ("1", "x")]
    data = build.build(rows(target), rows([("01", "0"), ("1", "00")]), candidates=1)
    assert data.user_ids.tolist() == ["01", "1"]
    assert data.target_item_ids.tolist() == ["007", "07", "7", "x"]


@pytest.mark.parametrize(
    ("target", "source", "options", "message"),
    [
        ([("a", 1)], [("b", 1)], {}, "no shared users: .*left.* and .*right.*spelled alike"),
        ([("a", 1)], [("a", 1)], {"min_user_items": 2}, "core is empty: .*--min_user_items=2"),
        ([("a", 1), ("a", 2)], [("a", 1)], {"min_item_users": 2}, "core is empty.*min_item_users"),
        ([("a", 1), ("b", 2)], [("a", 1), ("b", 2)], {}, "nothing to test on"),
        (
            [("a", 1), ("a", 2), ("b", 3)],
            [("a", 1), ("b", 2)],
            {"candidates": 2},
            "user 'a' has 1 untouched target items.*--candidates=1 or less",
        ),
        (
            [("a", 1), ("a", 2), ("b", 3)],
            [("a", 1), ("b", 2), ("b", 1)],
            {"candidates": 1},
            "no user is left: those who were have every item",
        ),
        (
            [("a", 1), ("a", 2), ("b", 3), ("b", 4)],
            [("a", 1), ("b", 2)],
            {"candidates": 1, "split": "latest"},
            "--split=latest needs timestamps",
        ),
    ],
)
def test_input_without_a_usable_data_set_is_refused(target, source, options, message):
    with pytest.raises(InputError, match=message):
        build.build(rows(target, name="left"), rows(source, name="right"), **options)


def test_threshold_that_nothing_reaches_is_named():
    with pytest.raises(InputError, match="left: no rating is 4 or more"):
        build.build(rows([("a", 1)], [3], name="left"), rows([("a", 1)]))


def given_style():
    target = rows(
        [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 4), ("c", 9), ("a", 5), ("b", 6)],
        given=Given(["b", "a", "c"], ["6", "5", "9"], [["7", "4"], ["6", "8", "1"], ["1", "2"]]),
    )
    source = rows(
        [("a", "x"), ("b", "x"), ("b", "y"), ("a", "z")],
        given=Given(["b", "a"], ["y", "z"], [["z", "y", "x"], ["y", "q"]]),
    )
    return target, source


def test_given_test_items_and_candidates_are_kept_and_positives_masked():
    data = build.build(*given_style(), candidates=1)
    ids = data.target_item_ids
    assert data.user_ids.tolist() == ["a", "b"]  # c is not in the source
    assert ids.tolist() == ["1", "2", "3", "4", "5", "6", "7", "8"]  # 9 was c's, 7 and 8 listed
    assert ids[data.test.items].tolist() == ["5", "6"]
    assert ids[data.test.candidates[0]].tolist() == ["6", "8", "1"]
    assert ids[data.test.candidates[1, :2]].tolist() == ["7", "4"]
    assert data.test.mask.tolist() == [[True, True, False], [True, False, False]]
    assert data.meta["audit"]["target"]["positives_among_negatives"] == 2
    assert data.meta["audit"]["source"]["positives_among_negatives"] == 2
    assert data.source.indices.tolist() == [0, 2, 0, 1]  # train and test
    assert data.source_item_ids.tolist() == ["x", "y", "z"]
    # Both users have three items or more with the given one, so each has a validation item.
    assert data.valid.users.tolist() == [0, 1]
    assert set(ids[data.valid.items]) <= {"1", "2", "3", "4"}
    assert len(data.target.indices) == 7 - 2 - 2
    assert data.meta["options"]["split"] == "given"
    assert "min_user_items" not in data.meta["options"]


def test_given_target_beside_a_source_with_ratings():
    target, _ = given_style()
    source = rows([("a", 1), ("b", 2), ("b", 3), ("c", 1)], ratings=[5, 4, 3, 1])
    data = build.build(target, source, candidates=1)
    assert all_pairs(data, "source") == {("a", "1"), ("b", "2")}


def simple_twins(target: set, source: set, jaccard: float, least: int = 2) -> list:
    def users_of(pairs):
        return {i: {u for u, j in pairs if j == i} for _, i in pairs}

    return sorted(
        (x, y)
        for x, a in users_of(target).items()
        for y, b in users_of(source).items()
        if len(a & b) >= least and len(a & b) / len(a | b) >= jaccard
    )


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("jaccard", [0.2, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_twins_are_those_of_brute_force(jaccard, least):
    found_any = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        base = rng.random((14, 25)) < rng.uniform(0.15, 0.6)
        flip = rng.random(base.shape) < 0.04  # near-twins at every distance
        sets = [
            {(int(u), int(i)) for i, u in np.argwhere(domain)}
            for domain in (base, (base ^ flip)[rng.permutation(14)])
        ]
        arrays = [np.array(sorted(s)).T for s in sets]
        found = twins.find_twins(*arrays[0], *arrays[1], jaccard, least)
        want = simple_twins(*sets, jaccard, least)
        assert [tuple(pair) for pair in found.tolist()] == want
        found_any += len(want)
    assert found_any


def test_twins_in_small_chunks_are_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    pairs = np.argwhere(rng.random((40, 12)) < 0.4).T
    whole = twins.find_twins(*pairs, *pairs, 0.4, 3)
    monkeypatch.setattr(twins, "_CHUNK", 3)
    np.testing.assert_array_equal(twins.find_twins(*pairs, *pairs, 0.4, 3), whole)
    assert len(whole) >= 12


def test_dropping_twins_leaves_the_target_as_it_is():
    target, source = some(degree=4, source_degree=3)
    source = source + [(u, 1000 + i) for u, i in target if i < 5]  # five items listed twice
    kept = build.build(rows(target), rows(source), candidates=9)
    dropped = build.build(rows(target), rows(source), candidates=9, drop_twins=True)
    twins = simple_twins(set(target), set(source), 0.5)
    assert {y for _, y in twins} >= set(range(1000, 1005))
    report = kept.meta["audit"]["twins"]
    assert report["pairs"] == len(twins)
    for domain, pairs, at in (("target", target, 0), ("source", source, 1)):
        on = sum(item in {pair[at] for pair in twins} for _, item in pairs)
        assert report[f"{domain}_share"] == on / len(pairs)
    mine = {}  # source items by user
    for user, item in source:
        mine.setdefault(user, set()).add(item)
    for part in ("valid", "test"):
        held = getattr(kept, part)
        named = zip(kept.user_ids[held.users], kept.target_item_ids[held.items], strict=True)
        has = [any((int(i), y) in twins for y in mine[int(u)]) for u, i in named]
        assert report[f"{part}_in_source"] == np.mean(has) > 0
        assert dropped.meta["audit"]["twins"][f"{part}_in_source"] == 0
    for one, two in zip(kept.test + kept.valid, dropped.test + dropped.valid, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(kept.target.indices, dropped.target.indices)
    gone = {str(y) for _, y in twins}
    assert set(dropped.source_item_ids) == set(kept.source_item_ids) - gone
    assert all_pairs(dropped, "source") == {
        p for p in all_pairs(kept, "source") if p[1] not in gone
    }


def test_from_arrays_is_build_on_the_same_pairs():
    target, source = ([(u + 10, i + 100) for u, i in side] for side in some())
    built = build.build(rows(target), rows(source), candidates=9, seed=4)
    index = [
        {name: at for at, name in enumerate(ids.tolist())}
        for ids in (built.user_ids, built.target_item_ids, built.source_item_ids)
    ]
    made = from_arrays(
        [index[0][str(u)] for u, _ in target],
        [index[1][str(i)] for _, i in target],
        [index[0][str(u)] for u, _ in source],
        [index[2][str(i)] for _, i in source],
        num_users=30,
        num_target_items=built.target.num_items,
        num_source_items=built.source.num_items,
        candidates=9,
        seed=4,
    )
    for part in ("target", "source", "valid", "test"):
        for one, two in zip(getattr(built, part), getattr(made, part), strict=True):
            np.testing.assert_array_equal(one, two)
    assert made.meta["counts"] == built.meta["counts"]
    assert made.user_ids.tolist() == [str(u) for u in range(30)]


def test_from_arrays_checks_its_indices():
    good = {"candidates": 1}
    with pytest.raises(InputError, match="target: item index out of range 0 .. 2"):
        from_arrays([0, 0], [1, 3], [0], [0], num_target_items=3, **good)
    with pytest.raises(InputError, match="source: not every user of 0 .. 1 occurs"):
        from_arrays([0, 1], [1, 2], [0, 0], [0, 1], **good)
    with pytest.raises(InputError, match="target: user index out of range"):
        from_arrays([-1, 0], [1, 2], [0], [0], num_users=1, **good)


def counts(data: Dataset) -> tuple:
    keys = ("users", "target_items", "target_interactions", "source_items", "source_interactions")
    return tuple(data.meta["counts"][key] for key in keys)


def test_books_from_movies_has_the_known_core(data_dir):
    folder = data_dir / "amazon-movies-books"
    data = build.build(
        readers.read(folder / "books.csv"),
        readers.read(folder / "movies.csv"),
        min_item_users=3,
        min_user_items=2,
    )
    assert counts(data) == (5797, 4968, 26881, 5468, 45780)
    assert data.num_users == 5797
    csr = data.target
    assert csr.indptr.dtype == csr.indices.dtype == np.int32
    assert csr.indptr[-1] == 26881 - len(data.test.users) - len(data.valid.users)


def test_douban_books_from_music_has_the_known_core(data_dir):
    folder = data_dir / "douban-books-music"
    domains = [readers.read(folder / name) for name in ("books.dat", "music.dat")]
    data = build.build(*domains, min_item_users=3, min_user_items=2)
    assert counts(data) == (1271, 5884, 54042, 5158, 48600)
    data = build.build(*domains)
    assert counts(data) == (1510, 6673, 59926, 5497, 50522)


def test_cell_from_electronics_has_the_known_positives_and_twins(data_dir):
    folder = data_dir / "amazon-cell-electronics"
    domains = [readers.read(folder / name) for name in ("cell", "electronics")]
    data = build.build(*domains, twin_jaccard=0.9, twin_users=3)
    assert counts(data) == (3325, 18462, 53732, 39463, 118879)
    report = data.meta["audit"]
    assert report["target"]["positives_among_negatives"] == 22
    assert report["source"]["positives_among_negatives"] == 7
    assert round(100 * report["twins"]["target_share"], 1) == 7.5
    assert round(100 * report["twins"]["source_share"], 1) == 3.4
    assert data.test.candidates.shape == (3325, 99)
    assert (~data.test.mask).sum() == 22
    assert len(data.source.indices) == 118879
    tests = [line.split("\t")[:2] for line in (folder / "cell/test.txt").read_text().splitlines()]
    found = zip(data.user_ids[data.test.users], data.target_item_ids[data.test.items], strict=True)
    assert dict(found) == dict(tests)
