"""Leave-one-out and candidates against slow, simple truths and chi-square."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from conet_jax.data import split
from conet_jax.errors import InputError


def chi_square_is_plausible(counts: np.ndarray) -> bool:
    """Whether counts of equally likely outcomes are within 5 sigma of a chi-square's mean."""
    expected = counts.sum() / counts.size
    assert expected >= 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    dof = counts.size - 1
    return abs(statistic - dof) < 5 * math.sqrt(2 * dof) + 5


def indptr_of(degrees) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(degrees)])


def test_users_with_few_items_give_no_test_or_no_validation_item():
    for how in ("random", "latest"):
        indptr = indptr_of([1, 2, 3, 0, 7])
        test, valid = split.leave_one_out(
            indptr, split=how, seed=0, timestamps=np.arange(13, dtype=float)
        )
        assert (test >= 0).tolist() == [False, True, True, False, True]
        assert (valid >= 0).tolist() == [False, False, True, False, True]
        for user in (1, 2, 4):
            assert indptr[user] <= test[user] < indptr[user + 1]
        for user in (2, 4):
            assert indptr[user] <= valid[user] < indptr[user + 1]
            assert valid[user] != test[user]


def test_random_split_is_uniform_over_pairs_of_items():
    degree, users = 4, 6000
    test, valid = split.leave_one_out(indptr_of([degree] * users), split="random", seed=3)
    starts = np.arange(users) * degree
    counts = np.zeros((degree, degree))
    np.add.at(counts, (test - starts, valid - starts), 1)
    assert not counts.diagonal().any()
    assert chi_square_is_plausible(counts[~np.eye(degree, dtype=bool)])


def test_given_test_items_leave_a_uniform_choice_for_validation():
    degree, users = 5, 5000
    starts = np.arange(users) * degree
    valid = split.one_more(indptr_of([degree] * users), starts + 2, seed=0) - starts
    counts = np.bincount(valid, minlength=degree)
    assert counts[2] == 0
    assert chi_square_is_plausible(np.delete(counts, 2))
    valid = split.one_more(indptr_of([2, 3, 3]), np.array([0, 4, -1]), seed=0)
    assert valid[0] == -1 and valid[1] in (2, 3) and valid[2] in (5, 6, 7)


def test_draws_are_those_that_prepared_data_was_made_by():
    # Another purpose, order or bound of the draws would give everybody another test set.
    degrees = np.array([1, 2, 3, 5, 1, 4, 3, 7])
    indptr = indptr_of(degrees)
    for seed in range(3):

        def generator(seed=seed):
            return np.random.Generator(np.random.PCG64([seed, *b"held out"]))

        rng = generator()
        first = rng.integers(0, degrees)
        second = rng.integers(0, [1, 1, 2, 4, 1, 3, 2, 6])
        second += second >= first
        test, valid = split.leave_one_out(indptr, split="random", seed=seed)
        assert test.tolist() == np.where(degrees > 1, indptr[:-1] + first, -1).tolist()
        assert valid.tolist() == np.where(degrees > 2, indptr[:-1] + second, -1).tolist()
        given = indptr[:-1] + [0, 1, 0, 4, 0, 2, 1, 3]
        draw = generator().integers(0, [1, 1, 2, 4, 1, 3, 2, 6])
        draw += draw >= given - indptr[:-1]
        valid = split.one_more(indptr, given, seed=seed)
        assert valid.tolist() == np.where(degrees > 2, indptr[:-1] + draw, -1).tolist()


def test_test_item_that_stands_first_of_all_is_not_chosen_for_validation():
    found = [int(split.one_more(np.array([0, 3]), np.array([0]), seed=s)[0]) for s in range(60)]
    assert set(found) == {1, 2}


@pytest.mark.parametrize("users", [0, 2])
def test_users_without_items_have_no_held_out_items(users):
    indptr = np.zeros(users + 1, int)
    for how in ("random", "latest"):
        test, valid = split.leave_one_out(indptr, split=how, seed=0, timestamps=np.empty(0))
        assert test.tolist() == valid.tolist() == [-1] * users


def test_latest_takes_last_and_last_but_one():
    times = np.array([5.0, 9, 1, 2, 3, 4, 7, 3])
    test, valid = split.leave_one_out(
        indptr_of([3, 3, 2]), split="latest", seed=0, timestamps=times
    )
    assert test.tolist() == [1, 5, 6]
    assert valid.tolist() == [0, 4, -1]


def test_equal_times_are_in_a_random_order_of_the_seed():
    users, degree = 4000, 4
    indptr, starts = indptr_of([degree] * users), np.arange(users) * degree
    times = np.tile([1.0, 2, 2, 2], users)
    counts = np.zeros((degree, degree))
    test, valid = split.leave_one_out(indptr, split="latest", seed=5, timestamps=times)
    np.add.at(counts, (test - starts, valid - starts), 1)
    assert not counts[0].any() and not counts[:, 0].any() and not counts.diagonal().any()
    assert chi_square_is_plausible(counts[1:, 1:][~np.eye(3, dtype=bool)])
    again, _ = split.leave_one_out(indptr, split="latest", seed=5, timestamps=times)
    other, _ = split.leave_one_out(indptr, split="latest", seed=6, timestamps=times)
    assert (again == test).all() and (other != test).any()


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=6))
def test_users_with_ties_are_those_whom_the_seed_could_change(lists):
    times = np.array([t for own in lists for t in own], float)
    count = 0
    for own in lists:
        ranked = sorted(own, reverse=True)
        count += len(own) >= 2 and (
            ranked[0] == ranked[1] or (len(own) >= 3 and ranked[1] == ranked[2])
        )
    assert split.users_with_ties(indptr_of([len(own) for own in lists]), times) == count


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=6), st.integers(0, 9)
)
def test_first_later_items_are_those_of_a_loop(lists, cutoff):
    times = np.array([t for own in lists for t in own], float)
    indptr = indptr_of([len(own) for own in lists])
    test, valid = split.first_later(indptr, times, cutoff=cutoff, seed=0)
    for user, own in enumerate(lists):
        later = sorted(t for t in own if t >= cutoff)
        assert (test[user] >= 0) == (len(later) >= 1)
        assert (valid[user] >= 0) == (len(later) >= 2)
        if len(later) == 1:
            assert times[test[user]] == later[0]
        elif later:
            assert [times[valid[user]], times[test[user]]] == later[:2]
            assert indptr[user] <= valid[user] != test[user] < indptr[user + 1]


def test_latest_needs_times():
    with pytest.raises(InputError, match="^--split=latest needs timestamps"):
        split.leave_one_out(indptr_of([3]), split="latest", seed=0)
    with pytest.raises(InputError, match="^unknown split 'last': expected random or latest$"):
        split.leave_one_out(indptr_of([3]), split="last", seed=0)


def test_draws_depend_on_seed_and_purpose():
    draw = [split.generator(*key).integers(0, 2**40) for key in [(0, "a"), (0, "b"), (1, "a")]]
    assert len(set(draw)) == 3
    assert draw[0] == split.generator(0, "a").integers(0, 2**40)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_candidates_are_distinct_untouched_items(data):
    num_items = data.draw(st.integers(1, 12))
    touched = data.draw(
        st.lists(st.sets(st.integers(0, num_items - 1), max_size=num_items - 1), min_size=1)
    )
    users = data.draw(st.sets(st.integers(0, len(touched) - 1)))
    users = np.array(sorted(users), np.int64)
    room = min((num_items - len(touched[u]) for u in users), default=num_items)
    count = data.draw(st.integers(1, room))
    indptr = indptr_of([len(t) for t in touched])
    items = np.array([item for t in touched for item in sorted(t)], np.int64)
    rng = split.generator(data.draw(st.integers(0, 5)), "test")
    drawn = split.draw_candidates(indptr, items, num_items, users, count, rng)
    assert drawn.shape == (len(users), count) and drawn.dtype == np.int32
    for user, row in zip(users, drawn.tolist(), strict=True):
        assert len(set(row)) == count
        assert set(row) <= set(range(num_items)) - touched[user]


def test_candidates_are_uniform_over_sets_of_untouched_items():
    num_items, touched, users, count = 8, np.array([0, 3, 7]), 8000, 2
    indptr = np.arange(users + 1) * len(touched)
    drawn = split.draw_candidates(
        indptr, np.tile(touched, users), num_items, np.arange(users), count, split.generator(0, "t")
    )
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(sets) == math.comb(5, 2)
    assert chi_square_is_plausible(counts)


def test_candidates_take_everything_that_is_left():
    drawn = split.draw_candidates(
        np.array([0, 2, 3]),
        np.array([1, 4, 0]),
        6,
        np.array([0]),
        4,
        split.generator(0, "t"),
    )
    assert drawn.tolist() == [[0, 2, 3, 5]]
    with pytest.raises(ValueError, match="^a user has too few untouched items$"):
        split.draw_candidates(
            np.array([0, 2]), np.array([1, 4]), 6, np.array([0]), 5, split.generator(0, "t")
        )


def test_candidates_of_a_user_far_down_a_long_list_are_untouched():
    # Row times items is beyond 32 bits, as the row numbers of prepared data are not.
    rows, num_items = 50_000, 100_000
    indptr = np.zeros(rows + 1, np.int32)
    indptr[-1] = num_items - 3
    items = np.delete(np.arange(num_items, dtype=np.int32), [5, 60_000, 99_999])
    users = np.array([rows - 1], np.int32)
    rng = split.generator(0, "t")
    drawn = split.draw_candidates(indptr, items, num_items, users, 3, rng)
    assert drawn.tolist() == [[5, 60_000, 99_999]]
