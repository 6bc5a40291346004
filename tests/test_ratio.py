"""Several held-out items a user: hand counts, sets of pairs in plain Python, no leaks."""

from collections import Counter
from fractions import Fraction
from math import floor

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_dataset import rows
from test_split import chi_square_is_plausible, indptr_of

from conet_jax.data import build, recbole, split, store
from conet_jax.data.assemble import from_arrays
from conet_jax.data.cold_users import make_cold
from conet_jax.data.load import drop_interactions, touched_items
from conet_jax.data.types import Dataset, arrays, content_hash, held_out_parts, warm_users

DEGREES = {"target": [1, 2, 3, 5, 9, 10, 11, 19, 20, 30] * 3, "source": [4, 12] * 15}


def pairs_of(degrees, num_items, seed=0, first_user=0):
    rng = np.random.default_rng(seed)
    return [
        (first_user + user, int(item))
        for user, degree in enumerate(degrees)
        for item in rng.choice(num_items, degree, replace=False)
    ]


def prepared(*, only=(), **options) -> Dataset:
    """Of both domains' raw pairs; ``only`` has degrees of users of the target alone."""
    target = pairs_of(DEGREES["target"], 150) + pairs_of(only, 150, 2, first_user=500)
    source = pairs_of(DEGREES["source"], 60, 1)
    if only:
        source += pairs_of([6, 6], 60, 3, first_user=700)  # and of the source alone
    return build.build(rows(target), rows(source), **{"split": "ratio", "candidates": 20} | options)


def by_user(data: Dataset, part: str) -> list[set[int]]:
    """Items of each user in training ("target" or "source"), or in a held-out part."""
    found = [set() for _ in range(data.num_users)]
    own = getattr(data, part)
    if part in ("target", "source"):
        users, items = np.repeat(np.arange(data.num_users), np.diff(own.indptr)), own.indices
    else:
        users, items = own.users, own.items
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        assert item not in found[user]
        found[user].add(item)
    return found


def sizes_by_hand(degree, ratios):
    """The rule in exact fractions, one user at a time."""
    valid, test = (floor(Fraction(ratio, sum(ratios)) * degree) for ratio in ratios[1:])
    train = degree - valid - test
    if not test and train > 1:
        test, train = 1, train - 1
    if not valid and train > 1:
        valid, train = 1, train - 1
    return [train, valid, test]


@pytest.mark.parametrize(
    ("ratios", "degree", "expected"),
    [
        ((8, 1, 1), 0, [0, 0, 0]),
        ((8, 1, 1), 1, [1, 0, 0]),
        ((8, 1, 1), 2, [1, 0, 1]),
        ((8, 1, 1), 3, [1, 1, 1]),
        ((8, 1, 1), 9, [7, 1, 1]),
        ((8, 1, 1), 10, [8, 1, 1]),
        ((8, 1, 1), 29, [25, 2, 2]),
        ((8, 1, 1), 30, [24, 3, 3]),
        ((6, 2, 2), 7, [5, 1, 1]),
        ((7, 1, 2), 9, [7, 1, 1]),
        ((7, 1, 2), 10, [7, 1, 2]),
        ((1, 1, 98), 3, [1, 0, 2]),  # nothing is left for validation
        ((80, 10, 10), 30, [24, 3, 3]),
    ],
)
def test_parts_have_the_sizes_counted_by_hand(ratios, degree, expected):
    assert split.sizes_by_ratio(np.array([degree]), ratios)[:, 0].tolist() == expected


@hypothesis.given(
    ratios=st.tuples(*[st.integers(1, 40)] * 3), degrees=st.lists(st.integers(0, 300), max_size=30)
)
def test_parts_have_the_sizes_of_exact_fractions_and_all_train(ratios, degrees):
    found = split.sizes_by_ratio(np.array(degrees, int), ratios).T.tolist()
    assert found == [sizes_by_hand(degree, ratios) for degree in degrees]
    assert all(train >= 1 for (train, _, _), degree in zip(found, degrees, strict=True) if degree)


def test_every_item_is_as_likely_held_out_as_another():
    degree, users = 6, 6000
    test, valid = split.by_ratios(indptr_of([degree] * users), ratios=(3, 1, 2), seed=3)
    assert (len(test), len(valid)) == (2 * users, users)
    first, second = (test % degree).reshape(users, 2).T
    of_pairs = np.zeros((degree, degree, degree))
    np.add.at(of_pairs, (first, second, valid % degree), 1)
    possible = [  # all choices of two test items and a validation item
        of_pairs[a, b, c]
        for a in range(degree)
        for b in range(a + 1, degree)
        for c in range(degree)
        if c not in (a, b)
    ]
    assert sum(possible) == users
    assert chi_square_is_plausible(np.array(possible))


@pytest.mark.parametrize("hold_out", ["target", "both"])
@pytest.mark.parametrize("only", [(), (1, 2, 10, 30)])
@pytest.mark.parametrize("ratios", [None, (5, 2, 3)])
def test_no_pair_is_in_two_parts_and_no_candidate_is_the_users(hold_out, only, ratios):
    users = {"users": "all"} if only else {}
    data = prepared(only=only, hold_out=hold_out, ratios=ratios, **users)
    assert data.meta["options"]["ratios"] == list(ratios or (8, 1, 1))
    raw = {"target": pairs_of(DEGREES["target"], 150), "source": pairs_of(DEGREES["source"], 60, 1)}
    if only:
        raw["target"] += pairs_of(only, 150, 2, first_user=500)
        raw["source"] += pairs_of([6, 6], 60, 3, first_user=700)
    for domain, mark in (("target", ""), ("source", "_source")):
        parts = {p: by_user(data, p + mark) for p in ("valid", "test") if hasattr(data, p + mark)
                 and getattr(data, p + mark) is not None}  # fmt: skip
        if domain == "target" and only:
            parts["test_target_only"] = by_user(data, "test_target_only")
        training = by_user(data, domain)
        ids = getattr(data, f"{domain}_item_ids")
        whole = [
            [*own, *(i for p in parts.values() for i in p[u])] for u, own in enumerate(training)
        ]
        assert all(len(set(own)) == len(own) for own in whole)  # no pair stands in two parts
        known = {(data.user_ids[user], ids[item]) for user, own in enumerate(whole) for item in own}
        assert known == {(str(user), str(item)) for user, item in raw[domain]}
        degrees = Counter(str(user) for user, _ in raw[domain])
        for user, name in enumerate(data.user_ids):
            train, valid, test = sizes_by_hand(degrees[name], ratios or (8, 1, 1))
            kind = (
                int(name) // 500 + int(name) // 700
            )  # 0 of both, 1 of the target, 2 of the source
            expected = {
                ("target", 0): {"": train, "valid": valid, "test": test},
                ("target", 1): {"": train + valid, "test_target_only": test},
                ("source", 0): {"": train, "valid": valid, "test": test},
            }.get((domain, kind), {"": degrees[name]})
            if domain == "source" and hold_out == "target":
                expected = {"": degrees[name]}
            assert len(training[user]) == expected[""]
            for part, own in parts.items():
                assert len(own[user]) == expected.get(part, 0)
        for part in parts:
            held = getattr(data, part + mark if part in ("valid", "test") else part)
            for user, listed in zip(held.users, held.candidates, strict=True):
                assert len(set(listed.tolist())) == 20
                assert not set(listed.tolist()) & set(whole[user])


def test_pairs_of_a_user_have_candidates_of_their_own():
    data = prepared()
    twice = np.flatnonzero(np.diff(data.test.users) == 0)
    assert len(twice) > 5
    assert (data.test.candidates[twice] != data.test.candidates[twice + 1]).any(axis=1).all()


def test_counts_are_of_users_and_of_pairs():
    data = prepared()
    # Of 1, 2, 3, 5, 9, 10, 11, 19, 20 and 30 items; validation has none of two.
    test, valid = [0, 1, 1, 1, 1, 1, 1, 1, 2, 3], [0, 0, 1, 1, 1, 1, 1, 1, 2, 3]
    counts, audit = data.meta["counts"], data.meta["audit"]
    assert (counts["test_users"], counts["test_pairs"]) == (3 * 9, 3 * sum(test))
    assert (counts["valid_users"], counts["valid_pairs"]) == (3 * 8, 3 * sum(valid))
    assert counts["target_interactions"] == sum(DEGREES["target"])
    assert len(data.target.indices) == sum(DEGREES["target"]) - 3 * (sum(test) + sum(valid))
    assert (audit["users_without_test"], audit["users_without_valid"]) == (3, 6)
    assert audit["cold"]["test"]["pairs"] == 3 * sum(test)


def test_seed_decides_and_the_source_is_as_under_random():
    one, again, other = prepared(), prepared(), prepared(seed=1)
    assert one.meta == again.meta
    for name, values in arrays(one).items():
        np.testing.assert_array_equal(values, arrays(again)[name])
    assert by_user(one, "test") != by_user(other, "test")
    assert by_user(prepared(candidates=21), "test") == by_user(one, "test")
    random = prepared(split="random")
    for field in ("indptr", "indices"):
        np.testing.assert_array_equal(getattr(one.source, field), getattr(random.source, field))
    assert not any(name.endswith("_pairs") for name in random.meta["counts"])


@pytest.mark.parametrize("hold_out", ["target", "both"])
def test_data_come_back_from_disk_and_from_recbole_s_files(tmp_path, hold_out):
    data = prepared(hold_out=hold_out)
    store.save(data, tmp_path / "data")
    recbole.save(data, tmp_path / "recbole")
    # Where the lines stand in another order, too.
    file = tmp_path / "recbole" / "target" / "target.test.inter"
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([head, *reversed(lines)]) + "\n")
    for back in (store.load(tmp_path / "data"), recbole.load(tmp_path / "recbole")):
        assert back.meta["counts"] == data.meta["counts"]
        assert content_hash(back) == data.meta["hash"] == back.meta["hash"]


def test_cold_users_keep_all_their_held_out_items():
    data = prepared()
    cold = make_cold(data, 6)
    for part in ("test", "valid"):
        whole, left = by_user(data, part), by_user(cold, part)
        chosen = [user for user, own in enumerate(left) if own]
        assert len(chosen) == 6 and all(left[user] == whole[user] for user in chosen)
        assert not any(by_user(cold, "target")[user] for user in chosen)
        held, counts = getattr(cold, part), cold.meta["counts"]
        assert counts[f"{part}_users"] == 6
        assert counts.get(f"{part}_pairs", 6) == len(held.users)


def test_dropped_pairs_leave_what_is_held_out():
    data = prepared()
    left = drop_interactions(data, 2)
    for part in held_out_parts(data):
        for own, other in zip(getattr(left, part), getattr(data, part), strict=True):
            np.testing.assert_array_equal(own, other)
    assert left.meta["counts"]["test_pairs"] == data.meta["counts"]["test_pairs"]


def test_a_user_is_warm_once():
    data = prepared()
    trained = set(data.target.indices.tolist())
    expected = [u for u, own in enumerate(by_user(data, "test")) if own & trained]
    assert warm_users(data).tolist() == expected


def test_touched_items_are_those_of_all_parts():
    data = prepared()
    indptr, items = touched_items(data)
    for user, degree in enumerate(np.diff(indptr)):
        assert (
            degree
            == Counter(u for u, _ in pairs_of(DEGREES["target"], 150))[int(data.user_ids[user])]
        )
        assert (np.diff(items[indptr[user] : indptr[user + 1]]) > 0).all()


def test_arrays_are_split_likewise():
    users = np.repeat(np.arange(4), 20)
    target = np.tile(np.arange(20), 4) + 5 * users
    data = from_arrays(users, target, users, target, candidates=5, split="ratio", ratios=(2, 1, 1))
    assert (
        np.bincount(data.test.users).tolist() == np.bincount(data.valid.users).tolist() == [5] * 4
    )
