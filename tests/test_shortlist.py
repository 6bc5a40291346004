"""Lists by shortlists against the lists of all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.serve import rank, recommend, shortlist
from conet_jax.serve.lists import top_k

pytestmark = pytest.mark.usefixtures("quick_compilation")

USERS, ITEMS = 150, 400


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(
        num_users=USERS,
        num_target_items=ITEMS,
        num_source_items=70,
        target_interactions=1_500,
        source_interactions=900,
        seed=0,
    )[0]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shortlists of 8 to 16 of 87 groups, fitted and measured on a third of the users each."""
    for name, value in (("FITTED", 50), ("CALIBRATED", 50), ("ANCHORS", 12)):
        monkeypatch.setattr(shortlist, name, value)
    monkeypatch.setattr(shortlist, "LENGTHS", (8, 12, 16))


_MADE = {}


def made(data, variant):
    if variant not in _MADE:
        config = default_config(variant)
        config.update(layers=(8, 6, 4))
        if "ials_sweeps" in config:
            config.update(ials_sweeps=3, folds=0)
        config.cross_layers = min(config.cross_layers, 2)
        experiment = make_experiment(config, data)
        state = initial_state(experiment)
        if experiment.sweep is not None:
            params = experiment.sweep(state)
        else:
            params = experiment.params(state)
            # Towers that add something, but less than the inner product: as where they are trained.
            dense = jax.tree.map(
                lambda x: x + 0.005 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params.dense
            )
            params = params._replace(dense=dense)
        _MADE[variant] = recommend.prepare(experiment, params)
    return _MADE[variant]


def fitted(recommender, k=5):
    items = np.flatnonzero(recommender.warm)
    users = np.random.default_rng(0).permutation(USERS)[:100].astype(np.int32)
    seen = np.full((100, 1), len(items))
    short = shortlist.fit(recommender.model, recommender.projected, users, items, seen, k=k)
    return short, items, users


def exact(recommender, users, items, k=5):
    left_out = np.zeros((len(users), len(items)), bool)
    found = top_k(
        recommender.projected, users, items.astype(np.int32), left_out,
        model=recommender.model, k=k,
    )  # fmt: skip
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize("variant", ["recipe", "recipe_mlp", "ials_joined"])
def test_trusted_lists_are_those_of_all_scores_for_the_users_that_length_was_measured_on(
    data, variant
):
    recommender = made(data, variant)
    short, items, drawn = fitted(recommender)
    users = np.arange(USERS, dtype=np.int32)
    none = np.full((USERS, 1), len(items), np.int32)
    chosen, scores, finite, trusted = (
        np.asarray(x)
        for x in shortlist.best_of(
            recommender.projected, short, users, none, model=recommender.model, k=5
        )
    )
    expected, best, _ = exact(recommender, users, items)
    same = (chosen == expected).all(axis=1)
    assert finite.all() and trusted.mean() > 0.5
    assert (same | ~trusted)[drawn[50:]].all() and (same | ~trusted).mean() > 0.95
    np.testing.assert_allclose(scores[same], best[same], rtol=1e-5, atol=1e-5)


def test_trust_is_that_the_list_ends_in_the_first_half_of_the_groups(data):
    recommender = made(data, "recipe")
    short, items, drawn = fitted(recommender)
    x, y, b = map(np.asarray, shortlist.inner_product(recommender.projected, drawn))
    anchors = np.asarray(short.anchors)
    listed = jnp.broadcast_to(anchors, (100, len(anchors)))
    scores = np.asarray(recommender.model.scores(recommender.projected, drawn, listed))
    added = scores - (x @ y[anchors].T + b[anchors])
    vectors = np.concatenate([x, added, np.ones((100, 1))], axis=1)
    predicted = (vectors @ np.asarray(short.basis) @ np.asarray(short.weights))[:, : len(items)]
    none = np.full((100, 1), len(items), np.int32)
    for length in (16, 32):
        chosen, _, _, trusted = shortlist.best_of(
            recommender.projected, short.replace(groups=length), drawn, none,
            model=recommender.model, k=5,
        )  # fmt: skip
        expected = []
        for row, own in zip(predicted, np.asarray(chosen), strict=True):
            groups = np.array([row[at : at + 4].max() for at in range(0, len(items), 4)])
            places = np.argsort(np.argsort(-groups))[np.searchsorted(items, own) // 4]
            assert places.max() < length
            expected.append(places.max() < length / 2)
        assert (np.asarray(trusted) == expected).mean() > 0.98  # but for rounding
        assert 0 < np.mean(expected) <= 1


def test_length_is_the_cheapest_at_which_and_above_no_trusted_list_is_wrong():
    exact = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    trusted = np.array([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    trials, lengths = np.stack([exact, trusted], axis=2), (1, 2, 4, 8)
    # At 2 the first is wrong and trusted; below it is not trusted, but what is above counts.
    assert shortlist._length(trials, lengths, 1_000) == 4
    trusted[0] = 0, 0, 0, 1
    trials = np.stack([exact, trusted], axis=2)
    assert shortlist._length(trials, lengths, 1_000) == 8  # a third of 1,000 scores costs more
    assert shortlist._length(trials, lengths, 100) is None
    exact[2, 3] = False
    assert shortlist._length(np.stack([exact, trusted], axis=2), lengths, 1_000) is None


def test_prediction_is_the_ridge_regression_on_what_is_added_at_the_anchors(data, monkeypatch):
    """With as many dimensions as there are inputs, so that nothing is cut."""
    monkeypatch.setattr(shortlist, "RANK", 1000)
    recommender = made(data, "recipe")
    short, items, drawn = fitted(recommender)
    first = drawn[:50]
    x, y, b = map(np.asarray, shortlist.inner_product(recommender.projected, first))
    listed = jnp.broadcast_to(jnp.asarray(items), (50, len(items)))
    scores = np.asarray(recommender.model.scores(recommender.projected, first, listed))
    added = scores - (x @ y[items].T + b[items])
    inputs = np.pad(added[:, np.searchsorted(items, short.anchors)], ((0, 0), (0, 1)))
    inputs[:, -1] = 1
    # Ridge as least squares with rows of its own.
    ridge = np.sqrt(0.01 * 50 * np.mean(inputs[:, :-1] ** 2)) * np.eye(13)
    learnt = np.linalg.lstsq(
        np.concatenate([inputs, ridge]), np.concatenate([added, np.zeros((13, len(items)))]),
        rcond=None,
    )[0]  # fmt: skip
    expected = x @ y[items].T + b[items] + inputs @ learnt
    vectors = np.concatenate([x, inputs], axis=1) @ np.asarray(short.basis, np.float64)
    found = vectors @ np.asarray(short.weights, np.float64)
    np.testing.assert_allclose(found[:, : len(items)], expected, rtol=1e-3, atol=1e-3)


def test_items_of_equal_scores_are_in_the_order_of_their_rows(data):
    recommender = made(data, "ials_joined")
    twice = {
        name: jnp.repeat(x[::2], 2, axis=0) if name.startswith("item") else x
        for name, x in recommender.projected.items()
    }
    recommender = recommender._replace(projected=twice)
    short, items, _ = fitted(recommender)
    users = np.arange(USERS, dtype=np.int32)
    none = np.full((USERS, 1), len(items), np.int32)
    chosen, scores, _, trusted = (
        np.asarray(x)
        for x in shortlist.best_of(twice, short, users, none, model=recommender.model, k=5)
    )
    expected, best, _ = exact(recommender, users, items)
    np.testing.assert_array_equal(chosen[trusted], expected[trusted])
    assert (best[:, :-1] == best[:, 1:]).any()


def test_many_users_get_the_exact_lists_without_what_they_have_or_what_is_cold(data, monkeypatch):
    recommender = made(data, "recipe")
    users = recommend.find_users(recommender, data.user_ids)
    monkeypatch.setattr(shortlist, "FITTED", 20)
    monkeypatch.setattr(shortlist, "CALIBRATED", 17)  # so that 150 users are many
    calls, best_of = [], shortlist.best_of
    monkeypatch.setattr(shortlist, "best_of", lambda *a, **b: calls.append(0) or best_of(*a, **b))
    frame = pl.concat(recommend.stream(recommender, users, k=4))
    assert len(calls) == 3
    expected = pl.concat(recommend.stream(recommender, users, k=4, exact=True))
    assert len(calls) == 3
    names = ["user", "rank", "method"]
    assert frame.select(names).equals(expected.select(names))
    same = (frame["item"] == expected["item"]).to_numpy().reshape(USERS, 4).all(axis=1)
    assert same.mean() > 0.9
    # Nothing of a user's own, and nothing cold, in whatever list.
    pairs = set(zip(frame["user"], frame["item"], strict=True))
    indptr, items = recommender.touched
    own = np.repeat(np.arange(USERS), np.diff(indptr))
    assert not pairs & {(str(u), str(i)) for u, i in zip(own, items, strict=True)}
    assert not {str(item) for item in np.flatnonzero(~recommender.warm)} & set(frame["item"])


def test_without_an_inner_product_or_many_users_there_is_no_shortlist(data):
    users = [recommend.User(str(row), row) for row in range(USERS)]
    for variant in ("popularity", "recipe"):
        recommender = made(data, variant)
        items = np.flatnonzero(recommender.warm)
        assert rank.shortlist_for(recommender, users, items, 5, False) is None
