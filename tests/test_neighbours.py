"""Item neighbours against sums over users' lists, written out pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_out_of_fold import SIZES, random_pairs

from conet_jax.errors import InputError
from conet_jax.models import neighbours
from conet_jax.models.base import Sizes

BOTH = ("target", "source")
CHANCE = 2.0  # c of the module's formula
ALL = 64  # neighbours: more than there are items of a domain


@pytest.fixture(scope="module")
def interactions():
    return {"target": random_pairs(40, 60, 5, 0), "source": random_pairs(40, 50, 4, 1)}


def lists_of(interactions):
    """Items of each user as sets, by domain."""
    lists = {domain: [set() for _ in range(SIZES.users)] for domain in interactions}
    for domain, own in interactions.items():
        for user, item in zip(np.asarray(own.users), np.asarray(own.items), strict=True):
            lists[domain][user].add(int(item))
    return lists


def cosines(lists, user, item, of, domain):
    """s_d(u, i) of the module's docstring, by sets."""
    readers = {d: lambda j, d=d: {u for u in range(SIZES.users) if j in lists[d][u]} for d in BOTH}
    own, total = readers[of](item), 0.0
    for other in lists[domain][user] - ({item} if domain == of else set()):
        theirs = readers[domain](other)
        total += len(own & theirs) / np.sqrt((len(own) + CHANCE) * (len(theirs) + CHANCE))
    return total


@pytest.mark.parametrize("of", BOTH)
def test_sums_are_the_cosines_as_if_the_pair_were_not_observed(interactions, of):
    tables = neighbours.fit(interactions, SIZES, BOTH, ALL, BOTH)
    lists, num_items = lists_of(interactions), getattr(SIZES, f"{of}_items")
    pairs = [(u, i) for u in range(0, SIZES.users, 5) for i in range(num_items)]
    users, items = np.array(pairs).T
    labels = np.array([float(i in lists[of][u]) for u, i in pairs])
    assert labels.sum() > 20
    rows = tables["user_items"][users], tables[f"{of}_neighbours"][items]
    found = neighbours.sums(*map(jnp.asarray, (*rows, labels.astype(np.float32))), ALL)
    expected = np.zeros((len(pairs), 2))
    for row, (u, i) in zip(expected, pairs, strict=True):
        without = {d: [set(own) for own in per_user] for d, per_user in lists.items()}
        without[of][u].discard(i)  # the data as they would be without the pair
        row[:] = [cosines(without, u, i, of, d) for d in BOTH]
    assert (expected > 0).mean() > 0.2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("domains", [BOTH, ("target",)])
def test_scores_are_v_times_the_sums_of_pairs_that_are_not_observed(interactions, domains):
    size = 3
    tables = neighbours.fit(interactions, SIZES, domains, size, ("target",))
    v = jnp.asarray(np.random.default_rng(0).normal(size=len(domains)), jnp.float32)
    num_ids = 60 + 50 * (len(domains) == 2)
    projected = neighbours.project(tables, v, num_ids, size, domains)
    assert (len(projected["user_ids"]), len(projected["item_ids"])) == (40, 60)
    users, items = jnp.arange(40), jnp.asarray(np.random.default_rng(1).integers(0, 60, (40, 7)))
    found = neighbours.scores(projected, users, items)
    each = jnp.repeat(users, 7), items.reshape(-1)
    rows = tables["user_items"][each[0]], tables["target_neighbours"][each[1]]
    expected = neighbours.term(v, *rows, jnp.zeros(280), size)
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_a_view_of_the_source_alone_reads_its_sum_alone(interactions):
    tables = neighbours.fit(interactions, SIZES, BOTH, 4, BOTH)
    users, items = jnp.arange(40), jnp.arange(40)
    given = tables["user_items"], tables["source_neighbours"][:40]
    v = jnp.asarray([2.0])
    expected = 2.0 * neighbours.sums(*given, jnp.zeros(40), 4)[:, 1]
    np.testing.assert_allclose(neighbours.term(v, *given, jnp.zeros(40), 4), expected)
    projected = neighbours.project(tables, v, 110, 4, BOTH, "source")
    found = neighbours.scores(projected, users, items[:, None])[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_nearest_are_kept_and_of_users_the_rarest_items(interactions):
    size = 2
    tables = neighbours.fit(interactions, SIZES, BOTH, size, ("target",))
    lists = lists_of(interactions)
    has = {
        d: np.array([[float(i in own) for i in range(n)] for own in lists[d]])
        for d, n in zip(BOTH, SIZES[1:], strict=True)
    }
    first = {"target": 0, "source": SIZES.target_items}
    for at, domain in enumerate(BOTH):
        degrees = has[domain].sum(axis=0)
        common = has["target"].T @ has[domain]
        if domain == "target":
            np.fill_diagonal(common, 0)
        closeness = common / np.sqrt(degrees + CHANCE)
        for rows, values, score in (
            (tables["target_neighbours"], common, closeness),
            (tables["user_items"], (degrees + CHANCE) ** -0.5 * has[domain],
             (degrees + CHANCE) ** -0.5 * has[domain]),
        ):  # fmt: skip
            ids, kept = np.moveaxis(rows[:, : 4 * size].reshape(len(rows), 2, 2, size)[:, at], 1, 0)
            for row in range(len(rows)):
                order = sorted(
                    np.flatnonzero(score[row] > 0), key=lambda j: (-np.float32(score[row, j]), j)
                )
                best = order[:size]
                there = kept[row] > 0
                assert (ids[row][there] - first[domain]).tolist() == [float(j) for j in best]
                np.testing.assert_allclose(kept[row][there], values[row][best], rtol=1e-6)
    np.testing.assert_array_equal(tables["target_neighbours"][:, -1], has["target"].sum(axis=0))


def test_blocks_of_items_change_nothing(interactions, monkeypatch):
    whole = neighbours.fit(interactions, SIZES, BOTH, 4, BOTH)
    monkeypatch.setattr(neighbours, "_PAIRS_AT_ONCE", 7)  # about an item at once
    parts = neighbours.fit(interactions, SIZES, BOTH, 4, BOTH)
    for name, table in whole.items():
        np.testing.assert_array_equal(parts[name], table)


def test_rows_of_a_list_are_those_of_a_user_with_it(interactions):
    tables = neighbours.fit(interactions, SIZES, BOTH, 4, BOTH)
    lists = {
        d: [np.array(sorted(own), int) for own in per_user]
        for d, per_user in lists_of(interactions).items()
    }
    rows = neighbours.of_lists(tables, BOTH)(lists, 4)
    np.testing.assert_array_equal(rows["user_items"], tables["user_items"])


def test_none_are_asked_for(interactions):
    assert neighbours.fit(interactions, SIZES, BOTH, 0, BOTH) == {}
    assert neighbours.init(SIZES, BOTH, 0, BOTH) == {}


def test_tables_have_the_shapes_of_init(interactions):
    drawn = neighbours.init(SIZES, BOTH, 4, BOTH)
    tables = neighbours.fit(interactions, SIZES, BOTH, 4, BOTH)
    assert {n: (t.shape, t.dtype) for n, t in tables.items()} == {
        n: (t.shape, t.dtype) for n, t in drawn.items()
    }


def test_more_items_than_floats_hold_are_refused():
    with pytest.raises(InputError, match="16,777,216"):
        neighbours.fit({}, Sizes(1, 1 << 24, 0), BOTH, 4, BOTH)


@pytest.mark.parametrize("v", [(2.0, 0.4), (0.0, 1.5), (0.0, 0.0)])
def test_sums_of_all_items_are_the_scores_of_each(interactions, v):
    tables = neighbours.fit(interactions, SIZES, BOTH, 3, ("target",))
    projected = neighbours.project(tables, jnp.asarray(v), 110, 3, BOTH)
    rest, sums = neighbours.apart(projected | {"user": 0, "item": 1})
    assert rest == {"user": 0, "item": 1}
    users = np.array([7, 0, 7, 39])
    items = jnp.broadcast_to(jnp.arange(60), (4, 60))
    expected = neighbours.scores(projected, jnp.asarray(users), items)
    assert (np.ptp(expected) > 0.01) == any(v)
    np.testing.assert_allclose(sums.of(users), expected, rtol=1e-5, atol=1e-6)


def test_of_a_model_without_neighbours_nothing_is_apart():
    projected = {"user": jnp.ones((2, 3))}
    assert neighbours.apart(projected) == (projected, None)
    assert float(neighbours.scores(projected, jnp.arange(2), jnp.zeros((2, 5), int))) == 0
