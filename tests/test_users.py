"""All users of both domains, and held-out items of both: who is kept, and what is held out."""

import collections

import hypothesis
import numpy as np
import pytest
from helpers import tiny
from hypothesis import strategies as st
from test_dataset import all_pairs, counts, given_style, rows, simple_twins, some
from test_time import adds_up, held_times, prepared, timed, training_times

from conet_jax.data import build, recbole, store
from conet_jax.data.assemble import from_arrays
from conet_jax.data.load import touched_items
from conet_jax.data.types import (
    HELD_OUT,
    Dataset,
    arrays,
    content_hash,
    held_out_parts,
    trained_items,
)
from conet_jax.errors import InputError
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state

EXAMPLE = (
    [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 5), ("t", 1), ("t", 4), ("u", 2)],
    [("a", 6), ("a", 7), ("b", 7), ("b", 8), ("s", 8), ("s", 9)],
)


def pairs_of(data: Dataset, domain: str) -> set:
    """The raw pairs of a domain, held-out ones of every part too."""
    ids = getattr(data, f"{domain}_item_ids")
    csr = getattr(data, domain)
    users = np.repeat(np.arange(data.num_users), np.diff(csr.indptr))
    pairs = list(zip(users.tolist(), csr.indices.tolist(), strict=True))
    for part, held in held_out_parts(data).items():
        if part.endswith("source") == (domain == "source"):
            pairs += list(zip(held.users.tolist(), held.items.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    return {(data.user_ids[u], ids[i]) for u, i in pairs}


def test_all_users_of_a_small_example_are_counted_by_hand():
    data = build.build(*map(rows, EXAMPLE), candidates=1, users="all")
    assert data.user_ids.tolist() == ["a", "b", "t", "u", "s"]  # both, target alone, source alone
    assert (data.num_shared, data.num_target_only, data.num_source_only) == (2, 2, 1)
    assert counts(data) == (5, 5, 9, 4, 6)
    assert data.test.users.tolist() == [0, 1] and data.valid.users.tolist() == [0, 1]
    assert data.test_target_only.users.tolist() == [2]  # u has one item
    assert np.diff(data.target.indptr).tolist() == [1, 1, 1, 1, 0]
    assert np.diff(data.source.indptr).tolist() == [2, 2, 0, 0, 2]
    audit = data.meta["audit"]
    assert audit["users"] == {"shared": 2, "target_only": 2, "source_only": 1}
    assert audit["users_shared"] == {"users": 2, "target": 6, "source": 4}
    assert audit["cold"]["test_target_only"]["pairs"] == 1
    adds_up(data)
    shared = build.build(*map(rows, EXAMPLE), candidates=1)
    assert counts(shared)[::2] == (2, 6, 4) and shared.num_shared == shared.num_users == 2
    assert shared.meta["audit"]["users"] == audit["users"]
    assert shared.test_target_only is None
    assert [shared.meta["audit"][d]["user_not_shared"] for d in ("target", "source")] == [3, 2]


def core_alone(pairs: set, min_user: int, min_item: int) -> set:
    """The core of one domain, one removal at a time."""
    pairs = set(pairs)
    while True:
        for at, least in ((0, min_user), (1, min_item)):
            names = sorted({pair[at] for pair in pairs})
            weak = next((x for x in names if sum(p[at] == x for p in pairs) < least), None)
            if weak is not None:
                pairs = {pair for pair in pairs if pair[at] != weak}
                break
        else:
            return pairs


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_core_of_all_users_is_that_of_each_domain_alone(seed, min_user, min_item):
    rng = np.random.default_rng(seed)
    domains = []
    for size in (12, 9):
        found = np.argwhere(rng.random((16, size)) < rng.uniform(0.1, 0.5))
        domains.append({(f"u{u:02}", f"i{i:02}") for u, i in found if rng.random() < 0.8})
    want = [core_alone(pairs, min_user, min_item) for pairs in domains]
    for pairs in want:  # whoever has everything is left out, and then others may be
        each = collections.Counter(user for user, _ in pairs)
        items = {item for _, item in pairs}
        hypothesis.assume(not pairs or max(each.values()) < len(items))
    options = {"min_user_items": min_user, "min_item_users": min_item, "candidates": 1}
    try:
        data = build.build(*(rows(sorted(p)) for p in domains), users="all", **options)
    except InputError as error:
        users = [{u for u, _ in pairs} for pairs in want]
        if "core is empty" in str(error) or "no shared users" in str(error):
            assert not users[0] & users[1]
        else:
            hypothesis.assume(False)  # nothing to test on
        return
    assert [pairs_of(data, domain) for domain in ("target", "source")] == want
    target, source = ({u for u, _ in pairs} for pairs in want)
    kinds = [sorted(target & source), sorted(target - source), sorted(source - target)]
    assert data.user_ids.tolist() == sum(kinds, [])
    assert [data.num_shared, data.num_target_only, data.num_source_only] == list(map(len, kinds))
    assert (data.test.users < data.num_shared).all() and (data.valid.users < data.num_shared).all()
    alone = data.test_target_only.users
    assert ((alone >= data.num_shared) & (alone < data.num_users - data.num_source_only)).all()
    adds_up(data)
    try:  # what the audit says of the other choice is what it makes
        other = build.build(*(rows(sorted(p)) for p in domains), **options).meta["counts"]
    except InputError:
        return
    assert data.meta["audit"]["users_shared"] == {
        "users": other["users"],
        "target": other["target_interactions"],
        "source": other["source_interactions"],
    }


def partly_shared(seed: int = 0) -> list[list[tuple]]:
    """Rows (user, item, time) of 40 users of both domains, 20 and 15 of one alone."""
    target, source = timed(seed, users=75)
    return [
        [row for row in target if row[0] < 60],
        [row for row in source if row[0] < 40 or row[0] >= 60],
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"split": "latest"}, {"split": "time", "cutoff": "0.5"}, {"drop_twins": True}],
    ids=["random", "latest", "time", "twins"],
)
def test_all_users_have_disjoint_parts_and_untouched_candidates(options):
    domains = partly_shared()
    data = prepared(domains, users="all", hold_out="both", candidates=5, **options)
    touched = [{(str(u), str(i)) for u, i, _ in own} for own in domains]
    assert len(held_out_parts(data)) == 5
    for part, held in held_out_parts(data).items():
        source = part.endswith("source")
        ids = data.source_item_ids if source else data.target_item_ids
        assert len(held.users) > 3 and held.candidates.shape == (len(held.users), 5)
        for user, item, row in zip(held.users, held.items, held.candidates, strict=True):
            name = data.user_ids[user]
            assert (name, ids[item]) in touched[source]
            assert not {(name, ids[other]) for other in row} & touched[source]
    for domain, own in zip(("target", "source"), touched, strict=True):
        assert pairs_of(data, domain) <= own
    indptr, items = touched_items(data)
    mine = {
        (data.user_ids[user], data.target_item_ids[item])
        for user in range(data.num_users)
        for item in items[indptr[user] : indptr[user + 1]]
    }
    assert mine == pairs_of(data, "target")
    if "drop_twins" not in options:
        adds_up(data)


def test_all_users_under_latest_train_on_no_later_source_row():
    domains = partly_shared()
    data = prepared(domains, users="all", split="latest")
    first = held_times(data, "test", domains) | held_times(data, "valid", domains)
    for user, own in enumerate(training_times(data, "source", domains)):
        assert all(time < first.get(user, np.inf) for time in own)
    alone = held_times(data, "test_target_only", domains)
    for user, own in enumerate(training_times(data, "target", domains)):
        assert user not in alone or max(own) <= alone[user]


def test_twins_are_found_by_the_users_of_both_domains():
    target, source = some(degree=4, source_degree=3)
    source = source + [(u, 1000 + i) for u, i in target if i < 5]
    more = [(u, i % 40) for u in range(100, 200) for i in range(u, u + 4)]  # of the target alone
    one = build.build(rows(target), rows(source), candidates=9)
    all_ = build.build(rows(target + more), rows(source), candidates=9, users="all")
    twins = len(simple_twins(set(target), set(source), 0.5))
    assert one.meta["audit"]["twins"]["pairs"] == all_.meta["audit"]["twins"]["pairs"] == twins > 0


def test_source_held_out_too_leaves_the_target_as_it_is():
    target, source = some()
    one = build.build(rows(target), rows(source), candidates=9)
    both = build.build(rows(target), rows(source), candidates=9, hold_out="both")
    mine, theirs = arrays(both), arrays(one)
    for name, values in theirs.items():
        if not name.startswith("source_ind"):
            np.testing.assert_array_equal(mine[name], values)
    assert one.meta["hash"] != both.meta["hash"] and both.meta["options"]["hold_out"] == "both"
    assert pairs_of(both, "source") == all_pairs(one, "source")
    assert both.valid_source.users.tolist() == both.test_source.users.tolist() == list(range(30))
    assert len(both.source.indices) == len(source) - 60
    assert (both.test_source.items[:, None] != both.test_source.candidates).all()


def test_given_source_test_items_are_kept_when_both_are_held_out():
    data = build.build(*given_style(), candidates=1, hold_out="both")
    ids = data.source_item_ids
    assert ids[data.test_source.items].tolist() == ["z", "y"]
    assert data.test_source.mask.tolist() == [[True, True, False], [True, False, False]]
    assert "q" in ids  # listed among the candidates alone
    assert data.valid_source.users.tolist() == []  # two items each
    assert data.test.items.tolist() == build.build(*given_style(), candidates=1).test.items.tolist()


def test_users_with_few_source_items_give_no_source_test_item():
    target = [(u, i) for u in range(4) for i in range(3)] + [(9, 5), (9, 6)]
    source = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 3), (9, 4)]
    data = build.build(rows(target), rows(source), candidates=1, hold_out="both")
    assert data.user_ids[data.test_source.users].tolist() == ["1", "2"]
    assert data.user_ids[data.valid_source.users].tolist() == ["2"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return prepared(partly_shared(), users="all", hold_out="both", candidates=5)


def test_all_parts_come_back_from_disk(data, tmp_path):
    store.save(data, tmp_path / "store")
    recbole.save(data, tmp_path / "recbole")
    for back in (store.load(tmp_path / "store"), recbole.load(tmp_path / "recbole")):
        assert back.meta == data.meta and content_hash(back) == data.meta["hash"]
        assert back.num_target_only == data.num_target_only > 0
        for name, values in arrays(data).items():
            np.testing.assert_array_equal(arrays(back)[name], values)


@pytest.mark.parametrize("part", ["test_source", "test_target_only"])
def test_part_that_is_gone_is_found(data, tmp_path, part):
    store.save(data, tmp_path / "out")
    (tmp_path / "out" / f"{part}_mask.npy").unlink()
    with pytest.raises(InputError, match=f"{part}_mask.npy: the file is missing"):
        store.load(tmp_path / "out")
    for file in (tmp_path / "out").glob(f"{part}_*.npy"):
        file.unlink()
    with pytest.raises(InputError, match="differs from the arrays|does not match its hash"):
        store.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_users": 3}, "do not add up to the users"),
        ({"source_only_users": -1}, "do not add up to the users"),
        ({"shared_users": "40"}, "do not add up to the users"),
        ({"target_only_users": 21, "source_only_users": 14}, "not counted in"),
        ({"shared_users": 39, "target_only_users": 21}, "interactions of users in a domain"),
        ({"target_only_users": 19, "shared_users": 41}, "another kind than expected"),
    ],
)
def test_altered_counts_of_users_are_found(data, tmp_path, change, message):
    kinds = [data.meta["counts"][f"{kind}_users"] for kind in ("shared", "target_only")]
    assert kinds == [40, 20] and data.num_source_only == 15
    altered = data._replace(meta=data.meta | {"counts": data.meta["counts"] | change})
    store.save(altered, tmp_path / "out")
    with pytest.raises(InputError, match=message):
        store.load(tmp_path / "out")


def test_arrays_can_hold_out_both():
    users, items = np.repeat(np.arange(5), 4), np.tile([0, 2, 4, 6], 5)
    made = from_arrays(
        users, items, users, items, candidates=1, num_target_items=9, hold_out="both"
    )
    assert len(made.test_source.users) == len(made.valid_source.users) == 5
    assert made.meta["counts"]["source_interactions"] == 20


@pytest.mark.parametrize(
    "part", ["valid", "test", "valid_source", "test_source", "test_target_only"]
)
def test_held_out_pair_of_anyone_is_in_no_factor(part):
    """An item whose one pair is held out has no factors; its user's pairs are those in training."""
    domains = [list(own) for own in partly_shared()]
    data = prepared(domains, users="all", hold_out="both", candidates=5)
    held, domain = getattr(data, part), HELD_OUT[part]
    alone = np.flatnonzero(~trained_items(getattr(data, domain))[held.items])
    # An item of its own for the first held-out pair: no fold, sweep or view may know it.
    user, item = int(held.users[0]), getattr(data, domain).num_items
    rows = getattr(data, domain)._replace(num_items=item + 1)
    items = held.items.copy()
    items[0] = item
    data = data._replace(
        **{domain: rows, part: held._replace(items=items)},
        **{f"{domain}_item_ids": np.append(getattr(data, f"{domain}_item_ids"), "own")},
    )
    config = tiny("recipe", layers=(8, 4), folds=3, ials_sweeps=3, fold_sweeps=1, ials_trials=4)
    experiment = make_experiment(config, data)
    tables = experiment.params(initial_state(experiment)).tables
    known = np.asarray(tables[f"{domain}_item"]).reshape(item + 1, 4, -1)
    assert not known[item, :, :-1].any()  # the last column is the count, less its mean
    assert (known[item, :, -1] == known[:, :, -1].min(axis=0)).all()
    for other in held.items[alone]:
        assert not known[other, :, :-1].any()
    name = str(data.user_ids[user])
    rows = [row for row in domains[("target", "source").index(domain)] if str(row[0]) == name]
    held_of = [own for p, own in held_out_parts(data).items() if HELD_OUT[p] == domain]
    left_out = sum(int((own.users == user).sum()) for own in held_of)
    assert np.diff(getattr(data, domain).indptr)[user] == len(rows) - left_out < len(rows)
