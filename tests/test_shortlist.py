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
    short = of_vectors(users, items)
    listed, beside, padding = short.choose(np.arange(9), np.nonzero(out), size)
    scores = users.astype(np.float32) @ items.astype(np.float32)
    for row in range(9):
        chosen = (listed[row, ~padding[row]] - 1) // 2
        assert (np.diff(chosen) > 0).all() and not out[row, chosen].any()
        kept = np.flatnonzero(~out[row])
        bound = np.sort(scores[row, kept])[::-1][: min(size, len(kept))].min(initial=np.inf)
        missing = np.setdiff1d(kept[scores[row, kept] > bound], chosen)
        assert len(missing) == 0 and len(chosen) >= min(size, len(kept))
    assert listed.shape == (9, size) and not beside.any()


def test_length_goes_with_the_norm_and_nobody_drawn_is_missed():
    norms = np.array([4.0, 0.5, 0.01, 2.0, 1.0, 8.0])
    short = of_vectors(norms[:, None], np.zeros((1, 10_000)))
    places = np.array([100, 900, 9_000, 90, 30, 10])
    found = short.measured(np.arange(6), places)
    # 900 at a norm of .5, so 112.5 at 4, where it is rounded up to 128, and 225 at 2.
    assert found.lengths(np.arange(6)).tolist() == [128, 1024, 10_000, 256, 512, 64]
    assert (found.lengths(np.arange(6)) >= places).all() and found.drawn == 6
    # A place that is a power of two is not rounded away.
    for place in (64, 512):
        found = short.measured(np.arange(6), np.array([place, 1, 1, 1, 1, 1]))
        assert found.lengths(np.arange(1)).tolist() == [place]
    # All users, or all but one, would have more than half of the items ranked.
    assert short.measured(np.arange(6), np.full(6, 6_000)) is None
    # A vector of zeros says nothing of any item.
    nothing = of_vectors(np.zeros((3, 1)), np.zeros((1, 100)))._replace(drawn=1, reach=5.0)
    assert nothing.lengths(np.arange(3)).tolist() == [100] * 3
    assert short.measured(np.arange(0), np.arange(0)) is None


def test_of_further_users_as_few_as_promised_have_other_lists():
    """By 100 users drawn, 1 in 101 of the others may be missed."""
    rng = np.random.default_rng(0)
    norms = rng.random(3_000)
    places = np.minimum(300 / norms * rng.lognormal(0, 0.5, 3_000), 50_000).astype(int)
    short = of_vectors(norms[:, None], np.zeros((1, 50_000)))
    missed = []
    for _ in range(300):
        order = rng.permutation(3_000)
        found = short.measured(order[:100], places[order[:100]])
        others = order[100:]
        missed.append(np.mean(found.lengths(others) < places[others]))
    assert 0 < np.mean(missed) < 1 / 101


@pytest.mark.parametrize("k", [1, 3, 64, 90])
def test_it_is_never_shorter_than_a_list(k):
    short = of_vectors(np.ones((4, 1)), np.zeros((1, 1_000)))._replace(k=k)
    assert (short.measured(np.arange(4), np.full(4, k)).lengths(np.arange(4)) >= k).all()


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
    lengths = quick.shortlist.lengths(np.arange(USERS))
    assert (lengths < ITEMS).mean() > 0.5 and quick.shortlist.drawn == USERS
    expected, found = (recommend.recommend(r, users, k=5) for r in (exact, quick))
    assert lists_of(found, data.target_item_ids) == lists_of(expected, data.target_item_ids)
    column = "probability" if exact.model.logits else "score"
    np.testing.assert_allclose(found[column], expected[column], rtol=1e-5)
    # Of half of the users everything is ranked, and others are among them.
    norms = np.linalg.norm(quick.shortlist.users, axis=1)
    half = quick.shortlist._replace(reach=32 * float(np.median(norms)))
    assert 0.4 < (half.lengths(np.arange(USERS)) <= 32).mean() < 0.6
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
    assert str(made).startswith(f"of {len(made.rows)} items the best by the linear part")
    assert "on 20 users drawn" in str(made) and "at least 95.24% of lists" in str(made)


def test_a_run_that_diverged_is_told_of_a_user_by_its_id(data):  # noqa: F811
    experiment, params = trained(data, "ials_joined")
    params.tables["user"] = params.tables["user"] * np.nan
    with pytest.raises(InputError, match="a score of user 'u0.*NaN or infinite"):
        recommend.with_shortlist(recommend.prepare(experiment, params), 5)
