"""Shortlists against ranking everything, and their length against what was measured."""

import jax
import numpy as np
import pytest
from helpers import slow
from test_recommend import ITEMS, USERS, data, lists_of, trained  # noqa: F401  (a fixture)

from conet_jax.errors import InputError
from conet_jax.serve import recommend, shortlist
from conet_jax.serve.shortlist import Shortlist


def of_vectors(users, items, **fields):
    given = np.asarray(users, np.float32), np.asarray(items, np.float32)
    return Shortlist(*given, None, np.arange(items.shape[1]) * 2 + 1, 10)._replace(**fields)


@pytest.mark.parametrize("size", [1, 7, 32, 200, 1_000])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_by_the_linear_part_are_among_those_chosen(size, ties):
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(9, 4)), rng.normal(size=(4, 1_000))
    if ties:
        users, items = users.round(), items.round()
    out = rng.random((9, 1_000)) < 0.2
    out[3] = True
    out[4, 5:] = True
    short = of_vectors(users, items, size=size)
    listed, beside, padding = short.choose(np.arange(9), np.nonzero(out))
    scores = users.astype(np.float32) @ items.astype(np.float32)
    for row in range(9):
        chosen = (listed[row, ~padding[row]] - 1) // 2
        assert (np.diff(chosen) > 0).all() and not out[row, chosen].any()
        kept = np.flatnonzero(~out[row])
        bound = np.sort(scores[row, kept])[::-1][: min(size, len(kept))].min(initial=np.inf)
        missing = np.setdiff1d(kept[scores[row, kept] > bound], chosen)
        assert len(missing) == 0 and len(chosen) >= min(size, len(kept))
    assert listed.shape == (9, size) and not beside.any()


def test_length_is_twice_that_of_least_work_for_a_sixth_and_the_floor_leaves_nobody_out():
    norms = np.array([3.0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    short = of_vectors(norms[:, None], np.zeros((1, 10_000)))
    drawn = np.arange(12)
    places = np.array([100, 90, 9_000, 20, 30, 40, 50, 60, 70, 80, 90, 100])
    found = short.measured(drawn, places)
    # 128 items are enough for the first two; of the other ten one is beyond twice as many.
    assert (found.size, found.drawn, found.floor) == (256, 10, pytest.approx(0.2))
    assert found.serves(drawn).tolist() == [True, False, False] + [True] * 9
    # For the first two 128 + 10,000 / 2 is less than 8,192.
    found = short.measured(drawn, np.where(drawn == 1, 8_000, places))
    assert (found.size, found.floor) == (256, pytest.approx(0.2))
    found = short.measured(drawn, np.full(12, 5))
    assert found.serves(drawn).all() and (found.size, found.floor) == (64, 0)
    # Half of the users would have everything ranked, or half of the items be: not worth it.
    assert short.measured(drawn, np.where(drawn % 11 < 7, 9_000, 5)) is None
    assert short.measured(drawn, np.full(12, 6_000)) is None


def test_of_further_users_as_few_as_promised_have_other_lists():
    """By 120 users drawn, 100 of them for the floor, 1 in 101 of the others may be missed."""
    rng = np.random.default_rng(0)
    norms = rng.random(3_000)
    places = (5 / norms**2 * rng.lognormal(0, 0.3, 3_000)).astype(int)
    short = of_vectors(norms[:, None], np.zeros((1, 50_000)))
    missed = []
    for _ in range(300):
        order = rng.permutation(3_000)
        found = short.measured(order[:120], places[order[:120]])
        others = order[120:]
        missed.append(np.mean(found.serves(others) & (places[others] > found.size)))
    assert 0 < np.mean(missed) < 1 / 101


@pytest.mark.parametrize("k", [1, 3, 64, 90])
def test_it_is_never_shorter_than_a_list(k):
    short = of_vectors(np.ones((4, 1)), np.zeros((1, 1_000)))._replace(k=k)
    assert short.measured(np.arange(4), np.full(4, k)).size >= k


@pytest.mark.parametrize(
    "variant", ["recipe", "ials_joined", *map(slow, ("recipe_mlp", "bprmf", "cmf", "lightgcn"))]
)
def test_lists_of_a_shortlist_are_those_of_ranking_everything(data, variant, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shortlist, "_LEAST", 8)
    experiment, params = trained(data, variant)
    for tower in {"target", "source"} & params.dense.keys():  # less than the linear part
        params.dense[tower]["h"] = jax.tree.map(lambda x: 0.02 * x, params.dense[tower]["h"])
    exact = recommend.prepare(experiment, params)
    users = recommend.find_users(exact, data.user_ids)
    quick = recommend.with_shortlist(exact, 5)
    assert quick.shortlist.size < ITEMS / 2 and quick.shortlist.drawn == USERS - 14
    assert quick.shortlist.serves(np.arange(USERS)).mean() > 0.5
    expected, found = (recommend.recommend(r, users, k=5) for r in (exact, quick))
    assert lists_of(found, data.target_item_ids) == lists_of(expected, data.target_item_ids)
    column = "probability" if exact.model.logits else "score"
    np.testing.assert_allclose(found[column], expected[column], rtol=1e-5)
    # Of half of the users everything is ranked, and others are among them.
    norms = np.linalg.norm(quick.shortlist.users, axis=1)
    half = quick.shortlist._replace(floor=float(np.median(norms)))
    asked = [*data.user_ids[:40], "nobody", *data.user_ids[:60]]
    users = recommend.find_users(exact, asked, fallback=True)
    expected, found = (
        recommend.recommend(exact._replace(shortlist=short), users, k=5) for short in (None, half)
    )
    assert found.drop(column).equals(expected.drop(column))
    # Whoever asks for more than it was measured on has everything ranked.
    for more in ({"k": 6}, {"include_seen": True}, {"items": np.arange(0, ITEMS, 2)}):
        asked = {"k": 5} | more
        expected, found = (recommend.recommend(r, users, **asked) for r in (exact, quick))
        assert found.equals(expected)


def test_without_a_linear_part_everything_is_ranked(data):  # noqa: F811
    recommender = recommend.prepare(*trained(data, "popularity"))
    assert recommend.with_shortlist(recommender) is recommender


def test_for_many_users_it_is_made_and_says_what_was_measured(data, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shortlist, "_LEAST", 8)
    monkeypatch.setattr(shortlist, "USERS", 20)
    exact = recommend.prepare(*trained(data, "ials_joined"))
    users = recommend.find_users(exact, data.user_ids)
    assert recommend.for_many(exact, users[:79], k=5) is exact
    made = recommend.for_many(exact, users, k=5).shortlist
    assert str(made).startswith(f"of {len(made.rows)} items the 16 best by the linear part")
    assert "on 16 users drawn" in str(made) and "at least 94.12% of lists" in str(made)


def test_a_run_that_diverged_is_told_of_a_user_by_its_id(data):  # noqa: F811
    experiment, params = trained(data, "ials_joined")
    params.tables["user"] = params.tables["user"] * np.nan
    with pytest.raises(InputError, match="a score of user 'u0.*NaN or infinite"):
        recommend.with_shortlist(recommend.prepare(experiment, params), 5)
