"""Recommendations against a brute-force ranking in NumPy; newcomers, explanations, files."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import DEMO, as_if_trained, assert_one_line_error, launch, slow
from test_evaluation import TABLE

from conet_jax.config import default_config
from conet_jax.data import readers, synthetic
from conet_jax.data.types import HeldOut
from conet_jax.errors import InputError
from conet_jax.files import FRAME_SUFFIXES, write_frames
from conet_jax.models.base import Params
from conet_jax.run import lists
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.serve import newcomers, recommend
from conet_jax.serve.lists import top_k
from conet_jax.studies import crossing
from conet_jax.train.interactions import to_device

USERS, ITEMS, SOURCE_ITEMS = 80, 150, 70
ITEM_IDS = [f"t{n:03}" for n in range(ITEMS)]  # of the target


@pytest.fixture(scope="module")
def data():
    made = synthetic.dataset(
        num_users=USERS,
        num_target_items=ITEMS,
        num_source_items=SOURCE_ITEMS,
        target_interactions=500,
        source_interactions=700,
        seed=0,
    )[0]
    names = [np.array([f"{letter}{n:03}" for n in range(size)], object)
             for letter, size in (("u", USERS), ("t", ITEMS), ("s", SOURCE_ITEMS))]  # fmt: skip
    ids = dict(zip(("user_ids", "target_item_ids", "source_item_ids"), names, strict=True))
    return made._replace(**ids)


_MADE = {}


def trained(data, variant):
    """An experiment, and parameters that are as good as trained: nothing is zero or tied."""
    config = default_config(variant)
    config.ials_trials = 0
    if config.model in ("conet", "mlp", "bprmf", "cmf", "fm", "ials"):
        config.layers = (8, 6, 4)
    if config.model == "cross_stitch":
        config.layers = (8, 8, 8)
    config.cross_layers = min(config.cross_layers, 2)
    experiment = make_experiment(config, data)
    state = initial_state(experiment)
    if experiment.sweep is not None:
        return experiment, experiment.sweep(state)
    return experiment, as_if_trained(experiment.params(state))


def made(data, variant="conet", kind="shared users"):
    """A recommender from ``trained``."""
    if (variant, kind) not in _MADE:
        _MADE[variant, kind] = recommend.prepare(*trained(data, variant))
    return _MADE[variant, kind]


def row_of(pairs, row):
    return pairs.indices[pairs.indptr[row] : pairs.indptr[row + 1]]


def cold(data):
    """Items without training pairs, which no list has."""
    return set(np.setdiff1d(np.arange(ITEMS), data.target.indices).tolist())


def brute_force(scores, left_out, k, items=None):
    """The k best by a stable sort of all scores: of equals the smaller row comes first."""
    items = range(scores.shape[1]) if items is None else items
    lists = []
    for row, out in zip(scores, left_out, strict=True):
        kept = [item for item in items if item not in out]
        lists.append(sorted(kept, key=lambda item: (-row[item], item))[:k])
    return lists


def all_scores(recommender):
    listed = jnp.broadcast_to(jnp.arange(ITEMS), (USERS, ITEMS))
    scores = recommender.model.scores(recommender.projected, jnp.arange(USERS), listed)
    beside = 0 if recommender.sums is None else recommender.sums.of(np.arange(USERS))
    return np.asarray(scores) + beside


def seen(data):
    """Items that each user has in some split."""
    sets = [set(row_of(data.target, row).tolist()) for row in range(USERS)]
    for held_out in (data.valid, data.test):
        for user, item in zip(held_out.users, held_out.items, strict=True):
            sets[user].add(int(item))
    return sets


def left_out(data):
    """What a user is not to get: what it has, and what has no training pairs."""
    return [own | cold(data) for own in seen(data)]


def lists_of(frame, ids):
    rows = {name: row for row, name in enumerate(ids)}
    return [
        [rows[item] for item in group["item"]]
        for (_,), group in frame.group_by(["user"], maintain_order=True)
    ]


@pytest.mark.parametrize("levels", [4, 10**6], ids=["many_ties", "no_ties"])
@pytest.mark.parametrize("at_once", [1 << 4, 1 << 9, 1 << 13])
def test_top_lists_are_those_of_a_stable_sort(levels, at_once, monkeypatch):
    monkeypatch.setattr("conet_jax.serve.lists.PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    size = 100 + at_once.bit_length()  # another shape, so that the program is compiled anew
    scores = rng.integers(0, levels, (8, size)).astype(np.float32) - levels / 2
    left_out = rng.random((8, size)) < 0.3
    left_out[0, 4:] = True  # fewer items than places
    params = Params({"scores": jnp.asarray(scores)}, {})
    rows = np.arange(8, dtype=np.int32)
    items = np.arange(size, dtype=np.int32)
    chosen, found, finite = top_k(
        TABLE.project(params, None), rows, items, left_out, model=TABLE, k=20
    )
    expected = brute_force(scores, [set(np.flatnonzero(x)) for x in left_out], 20)
    for row in range(8):
        count = len(expected[row])
        assert np.asarray(chosen)[row, :count].tolist() == expected[row]
        assert found[row, :count].tolist() == scores[row, expected[row]].tolist()
        assert np.isneginf(found[row, count:]).all()
    assert bool(finite.all())


def test_scores_that_are_not_finite_are_told_unless_left_out():
    scores = np.zeros((2, 5), np.float32)
    scores[:, 2] = np.nan
    left_out = np.zeros((2, 5), bool)
    left_out[1, 2] = True
    params = Params({"scores": jnp.asarray(scores)}, {})
    _, _, finite = top_k(
        TABLE.project(params, None), np.arange(2), np.arange(5), left_out, model=TABLE, k=2
    )
    assert finite.tolist() == [False, True]


@pytest.mark.parametrize("variant", ["conet", "ials_joined", slow("fm"), slow("mlp")])
def test_all_users_get_the_brute_force_lists_without_what_they_have(data, variant):
    recommender = made(data, variant)
    users = recommend.find_users(recommender, data.user_ids)
    frame = pl.concat(recommend.stream(recommender, users, k=7))
    scores = all_scores(recommender)
    assert lists_of(frame, data.target_item_ids) == brute_force(scores, left_out(data), 7)
    assert frame["user"].unique(maintain_order=True).to_list() == list(data.user_ids)
    assert frame["rank"].to_list() == [*range(1, 8)] * USERS
    assert frame["method"].unique().to_list() == ["model"]
    flat = np.take_along_axis(scores, np.array(lists_of(frame, data.target_item_ids)), 1).ravel()
    if recommender.model.logits:
        expected = 1 / (1 + np.exp(-flat.astype(np.float64)))
        np.testing.assert_allclose(frame["probability"], expected, rtol=1e-5)
    else:
        np.testing.assert_allclose(frame["score"], flat, rtol=1e-5)
        assert "probability" not in frame.columns


@pytest.mark.parametrize(
    "variant", ["recipe", "ials_joined", "ease", "popularity", *map(slow, ("conet", "fm", "cmf"))]
)
def test_lists_of_a_result_are_those_that_are_recommended(data, variant, monkeypatch):
    monkeypatch.setattr(lists, "USERS", 30)
    experiment, params = trained(data, variant)
    found = lists.measure(experiment, params)
    rows = lists.sample(data.test.users)
    recommender = recommend.prepare(experiment, params)
    users = recommend.find_users(recommender, [data.user_ids[row] for row in rows])
    frame = recommend.recommend(recommender, users, k=10)
    pairs = {item: int((data.target.indices == at).sum()) for at, item in enumerate(ITEM_IDS)}
    listed = [pairs[item] for item in frame["item"]]
    owned = [pairs[ITEM_IDS[item]] for row in rows for item in row_of(data.target, row)]
    assert found == {
        "users": 30,
        "k": 10,
        "coverage": frame["item"].n_unique() / (ITEMS - len(cold(data))),
        "popularity": pytest.approx(np.mean(listed)),
        "pair_popularity": pytest.approx(np.mean(owned)),
        "once_share": pytest.approx(np.mean(np.array(listed) == 1)),
    }
    assert len(frame) == 300


def test_seen_items_come_again_where_asked_and_lists_choose_from_what_is_given(data):
    recommender = made(data)
    scores = all_scores(recommender)
    users = recommend.find_users(recommender, data.user_ids[:5])
    frame = recommend.recommend(recommender, users, k=ITEMS, include_seen=True)
    everything = brute_force(scores[:5], [cold(data)] * 5, ITEMS)
    assert lists_of(frame, data.target_item_ids) == everything
    few = recommend.find_items(recommender, ["t007", "t003", "t100", "unknown"])
    assert few.tolist() == [3, 7, 100]
    frame = recommend.recommend(recommender, users, items=few)
    assert lists_of(frame, data.target_item_ids) == brute_force(
        scores[:5], left_out(data)[:5], 10, few.tolist()
    )


def test_a_user_for_whom_nothing_is_left_has_no_row_and_disturbs_nobody(data):
    recommender = made(data)
    own = row_of(data.target, 5)
    users = recommend.find_users(recommender, ["u005", "new"], source={"new": np.array([2])})
    frame = recommend.recommend(recommender, users, items=own)
    assert frame["user"].unique().to_list() == ["new"] and len(frame) == len(own)
    nothing = recommend.recommend(recommender, users[:1], items=own, explain=True)
    assert len(nothing) == 0 and recommend.text(nothing) == ""


def test_users_of_all_kinds_keep_their_order(data):
    recommender = made(data)
    source = {"new": np.array([1, 5, 9])}
    ids = ["u003", "nobody", "new", "u001"]
    users = recommend.find_users(recommender, ids, source=source, fallback=True)
    frame = recommend.recommend(recommender, users, k=2)
    assert frame["user"].to_list() == [name for name in ids for _ in range(2)]
    assert frame["method"].to_list()[::2] == ["model", "popularity", "source items", "model"]
    popular = np.bincount(data.target.indices, minlength=ITEMS)
    best = sorted(range(ITEMS), key=lambda item: (-popular[item], item))[:2]
    assert frame["item"].to_list()[2:4] == data.target_item_ids[best].tolist()
    assert frame["probability"].null_count() == 2


def test_unknown_users_are_an_error_that_says_what_helps(data):
    recommender = made(data)
    with pytest.raises(InputError, match="user 'nobody' is in neither domain.*--fallback"):
        recommend.find_users(recommender, ["u001", "nobody"])
    source = {"new": np.array([1])}
    for variant in ("popularity", "ials"):
        with pytest.raises(InputError, match="users.txt:2: user 'new' is known by items of the so"):
            recommend.find_users(
                made(data, variant), ["u001", "new"], source=source, origin="users.txt"
            )
    with pytest.raises(InputError, match="target alone.*or one with items of the source"):
        recommend.find_users(recommender, ["new"], target=source)


@pytest.mark.parametrize("variant", ["conet", "cross_stitch", slow("cmf"), slow("fm")])
def test_embedding_of_a_newcomer_is_ridge_regression_on_source_profiles(data, variant):
    recommender = made(data, variant)
    table = np.asarray(recommender.params.tables["source_item"], np.float64)
    users = np.asarray(recommender.params.tables["user"], np.float64)

    def profile(items):
        return np.append(table[items].mean(0), 1.0)

    x = np.stack([profile(row_of(data.source, row)) for row in range(USERS)])
    # Ridge as ordinary least squares with rows of its own, each input scaled to mean square 1.
    scale = np.sqrt((x**2).mean(0))
    ridge = np.sqrt(0.01 * USERS) * np.eye(x.shape[1])
    solution = np.linalg.lstsq(
        np.concatenate([x / scale, ridge]),
        np.concatenate([users, np.zeros((len(ridge), users.shape[1]))]),
        rcond=None,
    )[0]
    items = np.array([3, 8, 60])
    expected = profile(items) / scale @ solution
    found = recommender.newcomers.embed({"target": [[]], "source": [items]})["user"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_newcomer_with_a_trained_user_s_embedding_and_source_items_gets_that_user_s_list(data):
    recommender = made(data)
    users = [recommend.User(f"new{row}", None, row_of(data.source, row)) for row in (4, 9)]
    own = np.asarray(recommender.params.tables["user"])[[4, 9]]
    known = newcomers.Newcomers(("source",), lambda lists: {"user": own})
    recommender = recommender._replace(newcomers=known)
    frame = recommend.recommend(recommender, users, k=5)
    assert lists_of(frame, data.target_item_ids) == brute_force(
        all_scores(recommender)[[4, 9]], [cold(data)] * 2, 5
    )
    assert frame["method"].unique().to_list() == ["source items"]


def test_ease_ranks_for_a_newcomer_by_the_rows_of_its_source_items(data):
    recommender = made(data, "ease_joined")
    items = np.array([3, 8, 60])
    frame = recommend.recommend(recommender, [recommend.User("new", None, items)], k=5)
    weights = np.asarray(recommender.params.tables["target_item"])
    expected = weights[:, ITEMS + items].sum(1)
    assert lists_of(frame, data.target_item_ids) == brute_force(expected[None], [cold(data)], 5)


@pytest.mark.slow
def test_newcomers_are_served_better_by_their_source_items_than_by_popularity():
    """Shared taste: users whose target items the model never saw."""
    made_of, scores_of = synthetic.dataset(
        num_users=1000, num_target_items=200, num_source_items=200,
        target_interactions=8_000, source_interactions=20_000, dim=3, noise=0.1, seed=0,
    )  # fmt: skip
    config = default_config("ials_joined")
    config.ials_trials = 0
    experiment = make_experiment(config, made_of)
    params = initial_state(experiment)
    for _ in range(5):
        params = experiment.sweep(params)
    recommender = recommend.prepare(experiment, params)
    # The taste of the data's own users is known; their source items alone are handed over.
    unknown = [recommend.User(f"new{row}", None, row_of(made_of.source, row)) for row in range(300)]
    listed = np.broadcast_to(np.arange(200), (300, 200))
    truth = np.asarray(scores_of(np.arange(300), listed))
    places = np.argsort(np.argsort(-truth, axis=1), axis=1)

    def mean_place(users):
        frame = pl.concat(recommend.stream(recommender, users, k=10))
        chosen = np.array(lists_of(frame, made_of.target_item_ids))
        return np.take_along_axis(places, chosen, 1).mean()

    nobody = [recommend.User(user.id) for user in unknown]
    assert mean_place(unknown) < 0.8 * mean_place(nobody)


def leave_one_out(recommender, data, row, items):
    """Scores with each source item of a user taken out of the data, by ``Model.project`` anew."""
    indptr, indices = data.source.indptr, data.source.indices
    out = []
    for at in range(indptr[row], indptr[row + 1]):
        shorter = indptr - (np.arange(len(indptr)) > row)
        source = to_device(shorter, np.delete(indices, at), SOURCE_ITEMS)
        interactions = {**recommender.interactions, "source": source}
        projected = recommender.model.project(recommender.params, interactions)
        out.append(recommender.model.scores(projected, jnp.array([row]), items[None])[0])
    return np.array(out)


@pytest.mark.parametrize("variant", ["conet", slow("fm")])
def test_explanation_is_the_fall_of_the_score_without_each_source_item(data, variant):
    recommender = made(data, variant)
    user = recommend.find_users(recommender, ["u005"])
    frame = recommend.recommend(recommender, user, k=4, explain=True)
    items = np.array(lists_of(frame, data.target_item_ids)[0])
    falls = all_scores(recommender)[5, items] - leave_one_out(recommender, data, 5, items)
    own = row_of(data.source, 5)
    for at, row in enumerate(frame.iter_rows(named=True)):
        order = [source for source in np.argsort(-falls[:, at]) if falls[source, at] > 1e-5][:3]
        for place, source in enumerate(order, 1):
            assert row[f"source_{place}"] == data.source_item_ids[own[source]]
            assert row[f"weight_{place}"] == pytest.approx(falls[source, at], abs=1e-5)
    np.testing.assert_allclose(
        frame["score"], all_scores(recommender)[5, items], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("variant", ["conet", "cross_stitch"])
def test_cross_score_is_what_is_lost_with_the_crossing_off(data, variant):
    recommender = made(data, variant)
    frame = recommend.recommend(
        recommender, recommend.find_users(recommender, data.user_ids[:3]), k=4, explain=True
    )
    off = crossing.switched(recommender.model, *recommender[1:3], "off")
    alone = recommender._replace(projected=recommender.model.project(*off))
    chosen = np.array(lists_of(frame, data.target_item_ids))
    rows = np.arange(3)[:, None]
    expected = (all_scores(recommender) - all_scores(alone))[rows, chosen]
    np.testing.assert_allclose(frame["cross_score"], expected.ravel(), rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("variant", ["popularity", slow("mlp")])
def test_models_without_a_source_profile_have_nothing_to_explain(data, variant):
    recommender = made(data, variant)
    frame = recommend.recommend(
        recommender, recommend.find_users(recommender, ["u000"]), explain=True
    )
    assert frame["cross_score"].null_count() == frame["source_1"].null_count() == len(frame)


def test_newcomers_are_explained_by_what_their_embedding_is_made_from(data):
    recommender = made(data, "ials_joined")
    items = np.array([3, 8, 60])
    frame = recommend.recommend(
        recommender, [recommend.User("new", None, items)], k=3, explain=True
    )
    chosen = np.array(lists_of(frame, data.target_item_ids)[0])
    without_each = [items, items[[1, 2]], items[[0, 2]], items[[0, 1]]]
    vectors = recommender.newcomers.embed({"target": [items[:0]] * 4, "source": without_each})
    scores = vectors["user"] @ np.asarray(recommender.params.tables["target_item"])[chosen].T
    falls = scores[0] - scores[1:]
    best = falls.argmax(0)
    weight = falls.max(0)
    assert (weight > 0).any()
    for at, row in enumerate(frame.iter_rows(named=True)):
        if weight[at] > 1e-5:
            assert row["source_1"] == data.source_item_ids[items[best[at]]]
            assert row["weight_1"] == pytest.approx(weight[at], abs=1e-4)


# Items without training pairs; users given by their items, and users of one domain alone.


@pytest.mark.parametrize("variant", ["conet", "ials", "ials_joined", "popularity", "ease_joined"])
def test_no_list_has_an_item_without_training_pairs(data, variant):
    recommender, names = made(data, variant), data.target_item_ids
    users = recommend.find_users(recommender, [*data.user_ids, "nobody"], fallback=True)
    frame = recommend.recommend(recommender, users, k=ITEMS, include_seen=True)
    without = sorted(cold(data))
    assert without and set(frame["item"]) == set(np.delete(names, without))
    frame = recommend.recommend(recommender, users[:2], items=np.array(without))
    assert len(frame) == 0 and frame.columns[:3] == ["user", "rank", "item"]


def test_a_model_that_can_score_an_item_without_training_pairs_lists_it_where_asked(data):
    recommender = made(data)
    users = recommend.find_users(recommender, data.user_ids)
    frame = pl.concat(recommend.stream(recommender, users, k=7, include_cold=True))
    expected = brute_force(all_scores(recommender), seen(data), 7)
    assert lists_of(frame, data.target_item_ids) == expected
    for variant in ("ials", "ease_joined", "popularity"):
        with pytest.raises(InputError, match="--include_cold: this model knows nothing"):
            recommend.recommend(made(data, variant), users[:1], include_cold=True)


@pytest.mark.parametrize("variant", ["ials", "ials_joined"])
def test_factors_of_a_newcomer_are_the_least_squares_solution_for_its_items(data, variant):
    recommender = made(data, variant)
    config = default_config(variant)
    config.ials_trials = 0
    given = {"target": np.array([3, 8, 60]), "source": np.array([1, 50])}
    inputs, answers = [], []
    weights = {"target": 1.0, "source": config.ials_source_weight}
    for domain in recommender.newcomers.domains:
        y = np.asarray(recommender.params.tables[f"{domain}_item"], np.float64)
        has = np.isin(np.arange(len(y)), given[domain])
        root = np.sqrt(weights[domain] * np.where(has, 1 + config.ials_alpha, 1.0))
        inputs.append(root[:, None] * y)
        answers.append(root * has)
    ridge = np.sqrt(config.ials_regularization) * np.eye(y.shape[1])
    expected = np.linalg.lstsq(
        np.concatenate([*inputs, ridge]),
        np.concatenate([*answers, np.zeros(len(ridge))]),
        rcond=None,
    )[0]
    lists = {domain: [items] for domain, items in given.items()}
    found = recommender.newcomers.embed(lists)["user"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    user = recommend.find_users(
        recommender, ["new"], target={"new": given["target"]}, source={"new": given["source"]}
    )
    frame = recommend.recommend(recommender, user, k=9)
    scores = np.asarray(recommender.params.tables["target_item"]) @ found
    without = cold(data) | set(given["target"].tolist())
    assert lists_of(frame, data.target_item_ids) == brute_force(scores[None], [without], 9)
    assert frame["method"].unique().to_list() == ["items"]
    again = recommend.recommend(recommender, user, k=ITEMS, include_seen=True)
    assert set(data.target_item_ids[given["target"]]) <= set(again["item"])


def test_ease_ranks_for_a_newcomer_by_the_rows_of_its_items_of_both_domains(data):
    recommender = made(data, "ease_joined")
    source, target = np.array([3, 8, 60]), np.array([2, 7])
    user = recommend.User("new", None, source, target)
    frame = recommend.recommend(recommender, [user], k=5)
    weights = np.asarray(recommender.params.tables["target_item"])
    expected = weights[:, ITEMS + source].sum(1) + weights[:, target].sum(1)
    without = cold(data) | {2, 7}
    assert lists_of(frame, data.target_item_ids) == brute_force(expected[None], [without], 5)


@pytest.fixture(scope="module")
def all_users(data):
    """Data in which u003 has no source pairs and u004 no target pairs."""
    domains = {}
    for domain, gone in (("source", 3), ("target", 4)):
        pairs = getattr(data, domain)
        degrees = np.diff(pairs.indptr)
        kept = np.delete(pairs.indices, np.s_[pairs.indptr[gone] : pairs.indptr[gone + 1]])
        degrees[gone] = 0
        indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32)
        domains[domain] = pairs._replace(indptr=indptr, indices=kept)
    held_out = {
        split: HeldOut(*(x[getattr(data, split).users != 4] for x in getattr(data, split)))
        for split in ("valid", "test")
    }
    return data._replace(**domains, **held_out)


@pytest.mark.parametrize("variant", ["conet", "ials", "ials_joined", slow("fm")])
def test_users_of_one_domain_get_lists_from_a_model_that_has_learnt_from_them(all_users, variant):
    recommender = made(all_users, variant, kind="all users")
    frame = recommend.recommend(recommender, recommend.find_users(recommender, ["u003"]), k=5)
    expected = brute_force(all_scores(recommender)[3:4], [left_out(all_users)[3]], 5)
    assert lists_of(frame, all_users.target_item_ids) == expected
    names = recommend.users_of_data(recommender)
    assert names == [user for user in all_users.user_ids if (user, variant) != ("u004", "ials")]
    if variant == "ials":  # which knows nothing of the source
        with pytest.raises(InputError, match="user 'u004'"):
            recommend.find_users(recommender, ["u004"])
        users = recommend.find_users(recommender, ["u004"], fallback=True)
        assert users[0].method == "popularity"
    else:
        users = recommend.find_users(recommender, ["u004"])
        # A factorisation machine has no embedding of the user, but reads the source items.
        assert users[0].method == ("source items" if variant == "fm" else "model")
        assert len(recommend.recommend(recommender, users)) == 10


def test_the_map_from_source_profiles_is_fitted_on_users_of_both_domains(all_users):
    recommender = made(all_users, "conet", kind="all users")
    source = [row_of(all_users.source, row) for row in range(USERS)]
    params, own = recommender.params, recommender.interactions
    table = params.tables["user"]
    # Whatever the two users of one domain are, the map is the same.
    moved = params._replace(tables={**params.tables, "user": table.at[jnp.array([3, 4])].add(9.0)})
    lists = {"target": [[]] * USERS, "source": source}
    found, expected = (newcomers.mapped(x, own)(lists) for x in (moved, params))
    np.testing.assert_array_equal(found, expected)


def test_lists_of_ids_are_read_line_by_line(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes("\ufeffa\r\n007\r\né, b\r\n\r\n".encode())
    assert readers.read_ids(path) == ["a", "007", "é, b"]
    path.write_text("a\n\nb\n")
    with pytest.raises(InputError, match="ids.txt:2: an empty line"):
        readers.read_ids(path)
    with pytest.raises(InputError, match="nowhere"):
        readers.read_ids(tmp_path / "nowhere")


def test_source_interactions_are_read_as_prepare_reads_them(data, tmp_path):
    recommender = made(data)
    recommender.dataset.meta["options"]["min_rating"] = 4.0
    path = tmp_path / "source.csv"
    path.write_text(
        "user_id,item_id,rating\nnew,s005,5\nnew,s001,4\nnew,s002,3\nnew,s005,4\nnew,other,5\n"
        "newer,s007,5\nnobody,other,5\n"
    )
    found = recommend.read_items_of(recommender, "source", path)
    assert {user: rows.tolist() for user, rows in found.items()} == {"new": [1, 5], "newer": [7]}
    assert list(recommend.read_items_of(recommender, "source", path, ["newer"])) == ["newer"]
    del recommender.dataset.meta["options"]["min_rating"]


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    done = launch("train", f"{DEMO}:conet", f"--workdir={workdir}", "--config.epochs=1")
    assert done.returncode == 0, done.stderr
    return workdir


def test_all_users_are_written_to_a_file(run, tmp_path):
    out = tmp_path / "out.parquet"
    done = launch("recommend", f"--workdir={run}", "--all", "--k=3", f"--out={out}")
    assert done.returncode == 0 and "3,000 users" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    frame = pl.read_parquet(out)
    recommender = recommend.load(run)
    users = recommend.find_users(recommender, list(recommender.rows)[:70])
    expected = pl.concat(recommend.stream(recommender, users, k=3))
    assert len(frame) == 3 * 3_000
    names = ["user", "rank", "item", "method"]
    assert frame.head(210).select(names).equals(expected.select(names))
    np.testing.assert_allclose(frame["probability"][:210], expected["probability"], rtol=1e-4)


def test_users_without_a_list_are_counted_on_stderr(run, tmp_path):
    recommender = recommend.load(run)
    target, names = recommender.dataset.target, recommender.dataset.target_item_ids
    item = int(np.bincount(target.indices).argmax())
    (tmp_path / "items").write_text(f"{names[item]}\n")
    indptr, items = recommender.touched
    having = int((items == item).sum())
    assert 0 < having < len(indptr) - 1
    out = tmp_path / "out.csv"
    done = launch("recommend", f"--workdir={run}", "--all", f"--items={tmp_path / 'items'}",
                  f"--out={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"{having:,} of 3,000 users have nothing to recommend: no item is left for them and they "
        "are not listed"
    ]
    assert len(pl.read_csv(out)) == 3_000 - having


def test_users_known_by_target_items_alone_are_listed_by_them(tmp_path):
    workdir = tmp_path / "run"
    done = launch("train", f"{DEMO}:ials", f"--workdir={workdir}", "--config.epochs=2")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "items_of.csv"
    file.write_text("user_id,item_id\nnew,3\nnew,17\n12,3\nempty,nowhere\n")
    command = ["recommend", f"--workdir={workdir}", "--user=new", "--user=12", "--k=2"]
    done = launch(*command, f"--items_of={file}")
    assert done.returncode == 0, done.stderr
    assert "user new, by items\n" in done.stdout and "user 12\n" in done.stdout
    assert "1 are in the run's data" in done.stderr
    done = launch(*command, f"--items_of={file}", "--user=empty")
    assert_one_line_error(done, "user 'empty' is in neither domain", "--items_of=FILE")


@pytest.mark.parametrize("suffix", FRAME_SUFFIXES)
def test_tables_come_back_whole_from_every_format(suffix, tmp_path):
    parts = [pl.DataFrame({"user": ["007", 'a,"b'], "score": [0.1 + at, None]}) for at in range(3)]
    write_frames(tmp_path / f"out{suffix}", parts)
    read = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}[suffix]
    options = {"schema_overrides": {"user": str}} if suffix == ".csv" else {}
    assert read(tmp_path / f"out{suffix}", **options).equals(pl.concat(parts))
    assert len(list(tmp_path.iterdir())) == 1


def test_recommend_prints_lists_for_people(run, tmp_path):
    source = tmp_path / "source.csv"
    source.write_text("user_id,item_id\nnew,3\nnew,17\n")
    done = launch("recommend", f"--workdir={run}", "--user=12", "--user=new", "--user=nobody",
                  f"--source={source}", "--fallback=popularity", "--k=2", "--explain")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("user")] == [
        "user 12", "user new, by source items", "user nobody, by popularity"
    ]  # fmt: skip
    assert "probability" in lines[1] and "crossing" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ["expected one of --user=ID, --users=FILE and --all", "none"]),
        (["--all", "--user=1"], ["--user and --all"]),
        (["--all", "--out=x.xlsx"], ["x.xlsx", ".parquet"]),
        (["--user=nobody"], ["user 'nobody'", "--source=FILE", "--fallback=popularity"]),
        (["--users=nowhere.txt"], ["nowhere.txt"]),
        (["--user=1", "--out=/proc/nowhere/x.csv"], ["/proc/nowhere"]),
    ],
)
def test_bad_requests_are_one_line(run, arguments, fragments):
    assert_one_line_error(launch("recommend", f"--workdir={run}", *arguments), *fragments)


def test_nothing_is_left_of_a_file_whose_making_failed(tmp_path):
    def frames():
        yield pl.DataFrame({"a": [1]})
        raise RuntimeError("no more")

    for suffix in FRAME_SUFFIXES:
        (tmp_path / f"out{suffix}").write_text("before")
        with pytest.raises(RuntimeError, match="no more"):
            write_frames(tmp_path / f"out{suffix}", frames())
        assert (tmp_path / f"out{suffix}").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def of_views(data):
    """The recommended recipe: fitted factors, and towers in which everything is felt."""
    config = default_config("recipe")
    config.ials_trials = 0
    config.update(dict(layers=(8, 6, 4), cross_layers=2, ials_sweeps=3, fold_sweeps=1, folds=2))
    experiment = make_experiment(config, data)
    params = experiment.params(initial_state(experiment))
    dense = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), params.dense
    )
    return experiment, params, recommend.prepare(experiment, params._replace(dense=dense))


def test_views_made_from_a_user_s_items_are_those_of_the_fit(data, of_views):
    experiment, params, recommender = of_views
    views = recommender.newcomers.embed(
        {d: [row_of(getattr(data, d), u) for u in range(USERS)] for d in ("target", "source")}
    )
    fitted = np.asarray(params.tables["user"]).reshape(USERS, 3, 10)[:, 2]
    np.testing.assert_allclose(views["user"], fitted, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(views["user_items"], params.tables["user_items"])
    # Scores for inference are those of the model with all its folds.
    users, items = jnp.arange(USERS), jnp.broadcast_to(jnp.arange(7), (USERS, 7))
    own = params._replace(dense=recommender.params.dense)
    scores = experiment.model.scores(
        experiment.model.project(own, experiment.interactions), users, items
    )
    np.testing.assert_allclose(all_scores(recommender)[:, :7], scores, rtol=1e-6, atol=1e-6)


def test_views_explain_by_the_source_items_and_rank_for_newcomers(data, of_views):
    _, _, recommender = of_views
    items = row_of(data.source, 5)
    frame = recommend.recommend(
        recommender, recommend.find_users(recommender, ["u005"]), k=4, explain=True
    )
    chosen = np.array(lists_of(frame, data.target_item_ids)[0])
    lists = [items, *(np.delete(items, at) for at in range(len(items)))]
    both = {"target": [row_of(data.target, 5)] * len(lists), "source": lists}
    rows = recommender.newcomers.embed(both)
    tables = recommender.params.tables | {name: jnp.asarray(own) for name, own in rows.items()}
    projected = recommender.model.project(
        recommender.params._replace(tables=tables), recommender.interactions
    )
    listed = jnp.broadcast_to(jnp.asarray(chosen), (len(lists), len(chosen)))
    scores = np.asarray(recommender.model.scores(projected, jnp.arange(len(lists)), listed))
    falls = scores[0] - scores[1:]
    assert np.abs(frame["cross_score"].to_numpy()).max() > 1e-4
    for at, row in enumerate(frame.iter_rows(named=True)):
        if falls[:, at].max() > 1e-4:
            assert row["weight_1"] == pytest.approx(falls[:, at].max(), abs=1e-4)
    newcomer = recommend.recommend(recommender, [recommend.User("new", None, items)], k=3)
    assert len(newcomer) == 3 and newcomer["probability"].null_count() == 0


@pytest.mark.parametrize("given", ["target", "source"])
def test_newcomer_of_one_domain_has_the_view_of_what_is_given_and_an_empty_one(
    data, of_views, given
):
    _, _, recommender = of_views
    own = {domain: row_of(getattr(data, domain), 5) for domain in ("target", "source")}
    lists = {domain: [x if domain == given else x[:0]] for domain, x in own.items()}
    of_both, of_source = recommender.newcomers.embed(lists)["user"][0].reshape(2, 5)
    fitted = np.asarray(recommender.params.tables["user"])[5].reshape(2, 5)
    degrees = {d: np.diff(getattr(data, d).indptr) for d in own}
    if given == "source":  # the view from the source is that of the user who has the same items
        np.testing.assert_allclose(of_source, fitted[1], rtol=1e-3, atol=1e-4)
    else:
        mean = np.log1p(degrees["source"]).mean()
        np.testing.assert_allclose(of_source, [0, 0, 0, 0, -mean], rtol=1e-5)
    count = np.log1p(len(own[given])) - np.log1p(degrees["target"] + degrees["source"]).mean()
    assert of_both[-1] == pytest.approx(count, abs=1e-5) and np.abs(of_both[:4]).max() > 0
    user = recommend.User("new", None, **{given: own[given]})
    assert len(recommend.recommend(recommender, [user], k=3, explain=True)) == 3


def test_one_tower_on_factors_of_the_target_ranks_for_newcomers_by_target_items(data):
    config = default_config("recipe_mlp")
    config.ials_trials = 0
    config.update(dict(layers=(8, 6, 4), ials_sweeps=3, fold_sweeps=1, folds=2))
    experiment = make_experiment(config, data)
    params = experiment.params(initial_state(experiment))
    recommender = recommend.prepare(experiment, params)
    lists = {"target": [row_of(data.target, u) for u in range(USERS)], "source": [[]] * USERS}
    found, fitted = recommender.newcomers.embed(lists), recommender.params.tables
    np.testing.assert_allclose(found["user"], fitted["user"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found["user_items"], fitted["user_items"])
    with pytest.raises(InputError, match="--include_cold"):
        recommend.recommend(recommender, [], include_cold=True)
