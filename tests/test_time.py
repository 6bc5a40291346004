"""Splits by time: nothing that is trained on comes after what is held out."""

import numpy as np
import pytest
from test_dataset import rows

from conet_jax.data import build, moments
from conet_jax.data.assemble import from_arrays
from conet_jax.data.types import Dataset, HeldOut, arrays
from conet_jax.errors import InputError

DAY = 86_400


def timed(seed: int = 0, users: int = 40, items: int = 30, moments: int = 12) -> list[list[tuple]]:
    """Two domains of rows (user, item, time), with few moments and so many equal ones."""
    rng = np.random.default_rng(seed)
    return [
        [
            (user, int(item), float(rng.integers(moments)))
            for user in range(users)
            for item in rng.choice(items, rng.integers(1, 8), replace=False)
        ]
        for _ in range(2)
    ]


def prepared(domains: list[list[tuple]], **options) -> Dataset:
    made = [rows([row[:2] for row in own], times=[row[2] for row in own]) for own in domains]
    return build.build(*made, **{"candidates": 11} | options)


def training_times(data: Dataset, domain: str, domains: list[list[tuple]]) -> list[list[float]]:
    """Times of each user's training pairs."""
    known = {(str(u), str(i)): t for u, i, t in domains[domain == "source"]}
    csr, ids = getattr(data, domain), getattr(data, f"{domain}_item_ids")
    return [
        [known[user, ids[i]] for i in csr.indices[csr.indptr[at] : csr.indptr[at + 1]]]
        for at, user in enumerate(data.user_ids)
    ]


def held_times(data: Dataset, part: str, domains: list[list[tuple]]) -> dict[int, float]:
    held: HeldOut = getattr(data, part)
    source = part.endswith("source")
    known = {(str(u), str(i)): t for u, i, t in domains[source]}
    ids = data.source_item_ids if source else data.target_item_ids
    return {
        int(u): known[data.user_ids[u], ids[i]] for u, i in zip(held.users, held.items, strict=True)
    }


def adds_up(data: Dataset) -> None:
    for domain in ("target", "source"):
        report = data.meta["audit"][domain]
        gone = sum(number for key, number in report.items() if key != "rows")
        assert report["rows"] - gone == data.meta["counts"][f"{domain}_interactions"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hold_out", ["target", "both"])
def test_latest_split_trains_on_no_source_row_from_the_held_out_item_on(seed, hold_out):
    domains = timed(seed)
    data = prepared(domains, split="latest", hold_out=hold_out)
    test, valid = (held_times(data, part, domains) for part in ("test", "valid"))
    first = {user: valid.get(user, time) for user, time in test.items()}
    kept = training_times(data, "source", domains)
    left_out = 0
    for user, name in enumerate(data.user_ids):
        before = [t for u, _, t in domains[1] if str(u) == name and t < first.get(user, np.inf)]
        assert sorted(kept[user]) == sorted(before)
        left_out += sum(str(u) == name for u, _, _ in domains[1]) - len(before)
    time = data.meta["audit"]["time"]
    assert time["future_rows"] == left_out > 0
    assert time["users_without_source"] == sum(not own for own in kept)
    adds_up(data)
    if hold_out == "both":  # what is held out of the source comes after all that is trained on
        learnt = training_times(data, "target", domains)
        later, sooner = (held_times(data, f"{p}_source", domains) for p in ("test", "valid"))
        assert len(later) > 5 and set(sooner) <= set(later) <= set(first)
        for user, moment in later.items():
            assert sooner.get(user, moment) <= moment
            assert max(learnt[user]) <= first[user] <= sooner.get(user, moment)


def test_future_is_kept_on_demand_with_the_hash_of_before():
    domains = timed()
    data = prepared(domains, split="latest", keep_future=True)
    assert len(data.source.indices) == data.meta["counts"]["source_interactions"]
    assert data.meta["audit"]["time"]["future_rows"] > 0
    assert "keep_future" not in data.meta["options"]
    assert prepared(domains, split="latest").meta["options"]["keep_future"] is False
    adds_up(data)


def joined_ease(data: Dataset) -> float:
    """Mean reciprocal rank of the test items by EASE over the items of both domains."""
    width = data.target.num_items
    x = np.zeros((data.num_users, width + data.source.num_items))
    for rows_, at in ((data.target, 0), (data.source, width)):
        x[np.repeat(np.arange(data.num_users), np.diff(rows_.indptr)), rows_.indices + at] = 1
    inverse = np.linalg.inv(x.T @ x + 10 * np.eye(x.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    scores = x[data.test.users] @ weights
    own = np.take_along_axis(scores, data.test.items[:, None].astype(int), 1)
    others = np.take_along_axis(scores, data.test.candidates.astype(int), 1)
    return float((1 / (1 + (others > own).sum(1))).mean())


def test_film_bought_after_its_book_helps_only_where_the_future_is_kept():
    # Books at random; the film of a book is bought the day after it, and nothing else is to learn.
    rng = np.random.default_rng(0)
    books, films, films_before = [], [], []
    for user in range(300):
        times = np.sort(rng.choice(1000, 6, replace=False)) * 2.0 * DAY
        for item, time in zip(rng.choice(60, 6, replace=False), times, strict=True):
            books.append((user, int(item), time))
            films.append((user, int(item), time + DAY))
            if time < times[-2]:
                films_before.append(films[-1])
        films_before.append((user, 99, times[0]))  # so that the catalogues are the same
        films.append(films_before[-1])
    after, before = (
        prepared([books, source], split="latest", candidates=50) for source in (films, films_before)
    )
    assert joined_ease(after) <= joined_ease(before) + 1e-9
    kept = prepared([books, films], split="latest", candidates=50, keep_future=True)
    assert joined_ease(kept) > joined_ease(after) + 0.2  # which the test would see


def test_where_all_times_are_equal_nothing_is_left_out_and_all_users_are_told_of():
    domains = [[(u, i, 1.5e9) for u, i, _ in own] for own in timed()]
    one, two = (prepared(domains, split="latest", seed=seed) for seed in (0, 1))
    time = one.meta["audit"]["time"]
    assert time["users_with_ties"] == len(one.test.users) and time["one_moment"]
    assert not time["future_dropped"]
    assert len(one.source.indices) == one.meta["counts"]["source_interactions"]
    assert (one.test.items != two.test.items).any()


def test_source_that_is_all_later_is_refused_with_the_flag_that_helps():
    target, source = timed()
    later = [(u, i, t + 100) for u, i, t in source if u < 38]
    # Users with one target item have no held-out one, and so nothing is later for them.
    many = {u for u, _, _ in target if sum(x == u for x, _, _ in target) > 1}
    later = [row for row in later if row[0] in many]
    with pytest.raises(InputError, match="no source row comes before .* use --keep_future"):
        prepared([target, later], split="latest")


@pytest.mark.parametrize("cutoff", ["0.6", "7"])
@pytest.mark.parametrize("options", [{}, {"min_item_users": 3, "min_user_items": 2}])
@pytest.mark.parametrize("hold_out", ["target", "both"])
def test_time_split_trains_on_nothing_from_the_cutoff_on(cutoff, options, hold_out):
    domains = timed(users=80)
    options = options | {"split": "time", "cutoff": cutoff, "hold_out": hold_out}
    data = prepared(domains, candidates=5, **options)
    moment = data.meta["options"]["cutoff"]
    if cutoff == "7":
        assert moment == 7
    for domain in ("target", "source"):
        learnt = training_times(data, domain, domains)
        assert max(map(max, learnt)) < moment and min(map(len, learnt)) >= 1
        known = getattr(data, f"{domain}_item_ids")[np.unique(getattr(data, domain).indices)]
        assert known.tolist() == getattr(data, f"{domain}_item_ids").tolist()  # none is cold
        if domain == "source" and hold_out == "target":
            continue
        end = "" if domain == "target" else "_source"
        test, valid = (held_times(data, f"{p}{end}", domains) for p in ("test", "valid"))
        assert len(test) > len(valid) > 0
        for user, name in enumerate(data.user_ids):
            later = sorted(
                t
                for u, i, t in domains[domain == "source"]
                if str(u) == name and str(i) in known and t >= moment
            )
            assert [x[user] for x in (valid, test) if user in x] == later[:2]
    adds_up(data)


def test_time_split_decides_users_and_items_by_what_came_before():
    # User b has a source row only after the moment, item 9 is taken only after it.
    target = [("a", 1, 1), ("a", 2, 6), ("a", 9, 6), ("b", 1, 1), ("b", 2, 7)]
    target += [("c", 2, 1), ("c", 3, 2), ("d", 7, 1)]
    source = [("a", 1, 1), ("b", 1, 8), ("c", 2, 2), ("c", 1, 9), ("d", 7, 1)]
    data = prepared([target, source], split="time", cutoff="5", candidates=1)
    assert data.user_ids.tolist() == ["a", "c", "d"]
    assert data.target_item_ids.tolist() == ["1", "2", "3", "7"]
    assert data.test.users.tolist() == [0]
    assert data.target_item_ids[data.test.items].tolist() == ["2"]
    report = data.meta["audit"]
    assert report["target"]["later_unknown"] == 2  # a's 9, b's 2
    assert report["source"]["left_out_by_time"] == 1 and report["source"]["later_unknown"] == 1
    assert report["target"]["user_core"] == 1
    adds_up(data)


def test_cutoff_is_a_date_a_share_or_a_time():
    times = np.array([1.3e9, 1.35e9, 1.4e9, 1.45e9])
    assert moments.cutoff("2013-01-01", times) == 1356998400
    assert moments.cutoff("2013-01-01", times * 1e3) == 1356998400e3
    assert moments.cutoff("2013-01-01T02:00+02:00", times) == 1356998400
    assert moments.cutoff("1.36e9", times) == 1.36e9
    assert moments.cutoff("0.5", times) == np.median(times)
    for bad in ("2030-01-01", "5", "yesterday", "nan", "0", "1"):
        with pytest.raises(InputError, match=f"^--cutoff={bad}: "):
            moments.cutoff(bad, times)
    for given in ("0.5", "2013-01-01", "7"):
        with pytest.raises(InputError, match=f"^--cutoff={given}: no target interactions"):
            moments.cutoff(given, times[:0])


def test_same_rows_in_another_order_give_the_same_data():
    domains = timed()
    for options in ({"split": "latest"}, {"split": "time", "cutoff": "0.5"}):
        one = prepared(domains, **options)
        two = prepared([own[::-1] for own in domains], **options)
        for a, b in zip(arrays(one).values(), arrays(two).values(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_arrays_take_times_of_both_domains():
    users, items = np.repeat(np.arange(6), 3), np.tile([0, 2, 4], 6)
    times = np.tile([1.0, 2.0, 3.0], 6)
    options = {"candidates": 1, "split": "latest", "num_target_items": 6, "num_source_items": 6}
    data = from_arrays(
        *(users, items, users, items),
        target_timestamps=times,
        source_timestamps=times + 0.5,
        **options,
    )
    assert data.test.items.tolist() == [4] * 6 and data.valid.items.tolist() == [2] * 6
    assert data.source.indices.tolist() == [0] * 6
    with pytest.raises(InputError, match="source has no timestamps: use --keep_future"):
        from_arrays(users, items, users, items, target_timestamps=times, **options)
