"""The ranker against one that sorts, written out in NumPy, ties and masks and all."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import models
from conet_jax.config import default_config
from conet_jax.data.assemble import from_arrays
from conet_jax.data.load import touched_items
from conet_jax.data.types import HeldOut
from conet_jax.errors import InputError
from conet_jax.models.base import Model, Params, Sizes
from conet_jax.run import lists
from conet_jax.train import full_ranking, ranking
from conet_jax.train.interactions import to_device

# A "model" whose logits are a table: the tests say what each score is.
TABLE = Model(
    domains=("target",),
    pairing=None,
    inference="target",
    init=None,
    lookups=None,
    losses=None,
    project=lambda params, source: {"item": params.tables["scores"].T},
    scores=lambda projected, users, items: projected["item"].T[users[:, None], items],
    diagnostics=None,
    l1_mask=None,
)


def table(scores):
    return Params({"scores": jnp.asarray(scores, jnp.float32)}, {})


def random_held_out(num_users, num_items, candidates, seed=0):
    rng = np.random.default_rng(seed)
    listed = np.stack([rng.permutation(num_items)[: 1 + candidates] for _ in range(num_users)])
    listed = listed.astype(np.int32)
    mask = rng.random((num_users, candidates)) < 0.8
    mask[:, 0] = True  # at least one candidate
    return HeldOut(np.arange(num_users, dtype=np.int32), listed[:, 0], listed[:, 1:], mask)


def sorted_places(own, others):
    """First and last place (from 1) of ``own`` in the descending list of all scores."""
    ordered = sorted([own, *others], reverse=True)
    places = [place for place, score in enumerate(ordered, 1) if score == own]
    return places[0], places[-1]


def sort_based_summary(lists, k):
    """Means over users of the metrics, averaged over all places that ties allow."""
    totals = {name: [] for name in ("hit_ratio", "ndcg", "mrr", "mrr_published", "auc")}
    for own, others in lists:
        first, last = sorted_places(own, others)
        rows = []
        for place in range(first, last + 1):
            hit = place <= k
            rows.append(
                (
                    float(hit),
                    1 / np.log2(place + 1) if hit else 0.0,
                    1 / place if hit else 0.0,
                    1 / place if hit else 1 / (k + 1),
                    (len(others) + 1 - place) / len(others),
                )
            )
        for name, value in zip(totals, np.mean(rows, axis=0), strict=True):
            totals[name].append(value)
    means = {f"{name}@{k}": np.mean(values) for name, values in totals.items() if name != "auc"}
    return means | {"auc": np.mean(totals["auc"]), "users": len(lists)}


def assert_summaries_agree(ranks, lists, k):
    found, expected = ranking.summarize(ranks, k=k), sort_based_summary(lists, k)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def lists_of(scores, held_out):
    """(held-out item's score, scores of the candidates that count) of each user."""
    return [
        (scores[user, item], scores[user, candidates[mask]].tolist())
        for user, item, candidates, mask in zip(*held_out, strict=True)
    ]


@pytest.mark.parametrize("levels", [3, 20, 10**6], ids=["many_ties", "some_ties", "no_ties"])
def test_ranker_is_the_one_that_sorts(levels):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, levels, (57, 40)).astype(np.float32) - levels / 2
    held_out = random_held_out(57, 40, 20)
    lists = lists_of(scores, held_out)
    ranks = ranking.rank_held_out(TABLE, table(scores), None, held_out)
    places = np.array([sorted_places(*row) for row in lists])
    np.testing.assert_array_equal(ranks.above, places[:, 0] - 1)
    np.testing.assert_array_equal(ranks.tied, places[:, 1] - places[:, 0])
    np.testing.assert_array_equal(ranks.candidates, [len(others) for _, others in lists])
    for k in (1, 5, 10):
        assert_summaries_agree(ranks, lists, k)
    listed = np.concatenate([held_out.items[:, None], held_out.candidates], axis=1)
    elsewhere = ranking.rank_scores(np.take_along_axis(scores, listed, 1), held_out.mask)
    for ours, theirs in zip(ranks, elsewhere, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_metrics_under_ties_are_means_over_all_orders_of_the_list():
    """A list in each of its 720 orders, sorted stably: where the held-out item ends."""
    scores = [1.0, 2.0, 1.0, 1.0, 0.0, 1.0]  # the held-out item's first
    hits, gains, reciprocals = [], [], []
    for order in permutations(range(6)):
        listed = sorted(order, key=lambda i: -scores[i])
        place = listed.index(0) + 1
        hits.append(place <= 3)
        gains.append((place <= 3) / np.log2(place + 1))
        reciprocals.append((place <= 3) / place)
    ranks = ranking.rank_scores(np.array([scores]), np.ones((1, 5), bool))
    found = ranking.summarize(ranks, k=3)
    assert found["hit_ratio@3"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert found["ndcg@3"] == pytest.approx(np.mean(gains), abs=1e-12)
    assert found["mrr@3"] == pytest.approx(np.mean(reciprocals), abs=1e-12)


def test_constant_scorer_has_chance_hit_ratio():
    held_out = random_held_out(1_203, 120, 99)._replace(mask=np.ones((1_203, 99), bool))
    ranks = ranking.rank_held_out(TABLE, table(np.full((1_203, 120), 0.3)), None, held_out)
    found = ranking.summarize(ranks, k=10)
    assert found["hit_ratio@10"] == pytest.approx(0.1, abs=1e-12)
    assert found["auc"] == pytest.approx(0.5, abs=1e-12)
    ndcg = sum(1 / np.log2(place + 1) for place in range(1, 11)) / 100
    assert found["ndcg@10"] == pytest.approx(ndcg, abs=1e-12)
    assert found["users"] == 1_203


def small_model(name="conet", **fields):
    config = default_config(name)
    config.update(layers=(8, 4), **fields)
    if name == "conet" and "cross_layers" not in fields:
        config.cross_layers = 1
    return models.build(config)


def random_params(model, sizes, seed=0):
    """Parameters large enough for the logits to differ between all items."""
    params = jax.jit(lambda key: model.init(key, sizes))(jax.random.key(seed))
    return Params({n: t * 50 for n, t in params.tables.items()}, params.dense)


def both_domains(sizes, seed=1):
    """A single pair of the target, and for each user a few items of the source, or none."""
    num_users, num_items = sizes.users, sizes.source_items
    rng = np.random.default_rng(seed)
    lists = [
        np.sort(rng.choice(num_items, rng.integers(0, 4), replace=False)) for _ in range(num_users)
    ]
    indptr = np.cumsum([0] + [len(items) for items in lists])
    one = np.minimum(np.arange(num_users + 1), 1)
    return {
        "target": to_device(one, np.array([0]), sizes.target_items),
        "source": to_device(indptr, np.concatenate(lists), num_items),
    }


@pytest.mark.parametrize("inference", ["target", "cross"])
def test_a_dead_network_has_chance_hit_ratio(inference):
    """All parameters zero, as good as the published initialisation: every logit is tied."""
    model = small_model(inference=inference)
    sizes = Sizes(50, 120, 30)
    params = jax.tree.map(jnp.zeros_like, random_params(model, sizes))
    held_out = random_held_out(50, 120, 99)._replace(mask=np.ones((50, 99), bool))
    ranks = ranking.rank_held_out(model, params, both_domains(sizes), held_out)
    assert ranking.summarize(ranks, k=10)["hit_ratio@10"] == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("name", ["conet", "mlp"])
def test_ranks_are_those_of_the_models_scores(name):
    model = small_model(name)
    sizes = Sizes(33, 60, 30)
    params, interactions = random_params(model, sizes), both_domains(sizes)
    held_out = random_held_out(33, 60, 20)
    ranks = ranking.rank_held_out(model, params, interactions, held_out)
    everything = jnp.broadcast_to(jnp.arange(60), (33, 60))
    scores = np.asarray(
        model.scores(model.project(params, interactions), jnp.arange(33), everything)
    )
    assert np.median([len(np.unique(row)) for row in scores]) > 30
    assert_summaries_agree(ranks, lists_of(scores, held_out), 10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["own", "candidate"])
def test_scores_that_are_not_finite_are_an_error_not_a_rank(bad, place):
    held_out = random_held_out(9, 40, 20)
    scores = np.random.default_rng(0).normal(size=(9, 40))
    user = 5
    counted = held_out.candidates[user][held_out.mask[user]]
    scores[user, held_out.items[user] if place == "own" else counted[-1]] = bad
    with pytest.raises(InputError, match="1 of 9 users .* user row 5"):
        ranking.rank_held_out(TABLE, table(scores), None, held_out)
    listed = np.concatenate([held_out.items[:, None], held_out.candidates], axis=1)
    with pytest.raises(InputError, match="NaN or infinite"):
        ranking.rank_scores(np.take_along_axis(scores, listed, 1), held_out.mask)
    touched = np.arange(10), held_out.items
    with pytest.raises(InputError, match="NaN or infinite"):
        full_ranking.rank_full(TABLE, table(scores), None, held_out, touched, block=16)


def test_a_masked_score_need_not_be_finite():
    held_out = random_held_out(9, 40, 20)
    scores = np.random.default_rng(0).normal(size=(9, 40))
    for user in range(9):
        scores[user, held_out.candidates[user][~held_out.mask[user]]] = np.nan
    ranks = ranking.rank_held_out(TABLE, table(scores), None, held_out)
    assert_summaries_agree(ranks, lists_of(scores, held_out), 10)


def test_logits_that_a_sigmoid_would_tie_are_told_apart():
    assert jax.nn.sigmoid(jnp.float32(20)) == jax.nn.sigmoid(jnp.float32(30)) == 1
    scores = np.array([[20.0, 30.0, 10.0], [30.0, 20.0, 10.0]])
    held_out = HeldOut(
        np.arange(2), np.zeros(2, int), np.tile([1, 2], (2, 1)), np.ones((2, 2), bool)
    )
    ranks = ranking.rank_held_out(TABLE, table(scores), None, held_out)
    assert ranks.above.tolist() == [1, 0] and ranks.tied.tolist() == [0, 0]


@pytest.mark.parametrize("num_users", [1, 6, 7, 8, 20])
def test_chunks_that_do_not_fit_are_padded(num_users, monkeypatch):
    monkeypatch.setattr(ranking, "_SCORES_A_CHUNK", 7 * 21)
    scores = np.random.default_rng(0).integers(0, 9, (num_users, 40)).astype(np.float32)
    held_out = random_held_out(num_users, 40, 20)
    ranks = ranking.rank_held_out(TABLE, table(scores), None, held_out)
    assert len(ranks.above) == num_users
    assert_summaries_agree(ranks, lists_of(scores, held_out), 10)


def test_no_more_scores_exist_at_once_than_a_chunk_holds():
    largest = []

    def scores(projected, users, items):
        largest.append(items.size)  # seen when traced
        return TABLE.scores(projected, users, items)

    model = TABLE._replace(scores=scores)
    held_out = random_held_out(5_000, 120, 99)
    values = np.random.default_rng(0).normal(size=(5_000, 120))
    ranking.rank_held_out(model, table(values), None, held_out)
    assert 0 < max(largest) <= ranking._SCORES_A_CHUNK < held_out.candidates.size
    largest.clear()
    touched = np.arange(5_001), held_out.items
    few = held_out._replace(**{n: x[:130] for n, x in held_out._asdict().items()})
    full_ranking.rank_full(model, table(values), None, few, touched, users_at_once=64, block=32)
    assert 0 < max(largest) <= 64 * (32 + 1)


def small_dataset():
    rng = np.random.default_rng(0)
    target = [rng.choice(40, rng.integers(1, 12), replace=False) for _ in range(23)]
    source = [rng.choice(30, rng.integers(1, 9), replace=False) for _ in range(23)]
    flat = [
        x
        for lists in (target, source)
        for x in (np.repeat(np.arange(23), [len(items) for items in lists]), np.concatenate(lists))
    ]
    data = from_arrays(*flat, num_target_items=40, num_source_items=30, candidates=9)
    return data, [set(map(int, items)) for items in target]


def test_touched_items_are_those_of_all_splits():
    data, expected = small_dataset()
    indptr, indices = touched_items(data)
    assert len(indptr) == 24 and (len(data.test.users), len(data.valid.users)) != (23, 23)
    found = [indices[a:b].tolist() for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
    assert found == [sorted(items) for items in expected]


@pytest.mark.parametrize("split", ["test", "valid"])
@pytest.mark.parametrize(
    ("users_at_once", "block"), [(5, 7), (64, 512), (23, 40), (1, 39), (4, 41)]
)
def test_full_ranking_is_the_one_that_sorts_all_untouched_items(split, users_at_once, block):
    data, own = small_dataset()
    held_out = getattr(data, split)
    scores = np.random.default_rng(1).integers(0, 12, (23, 40)).astype(np.float32)
    ranks = full_ranking.rank_full(
        TABLE,
        table(scores),
        None,
        held_out,
        touched_items(data),
        users_at_once=users_at_once,
        block=block,
    )
    lists = [
        (scores[user, item], [scores[user, i] for i in range(40) if i not in own[user]])
        for user, item in zip(held_out.users, held_out.items, strict=True)
    ]
    np.testing.assert_array_equal(ranks.candidates, [len(others) for _, others in lists])
    assert_summaries_agree(ranks, lists, 10)


def test_full_ranking_by_the_network_is_the_one_that_sorts():
    data, own = small_dataset()
    model = small_model()
    sizes = Sizes(23, 40, 30)
    params, interactions = random_params(model, sizes), both_domains(sizes)
    ranks = full_ranking.rank_full(
        model, params, interactions, data.test, touched_items(data), users_at_once=6, block=11
    )
    everything = jnp.broadcast_to(jnp.arange(40), (23, 40))
    scores = np.asarray(
        model.scores(model.project(params, interactions), jnp.arange(23), everything)
    )
    lists = [
        (scores[user, item], [scores[user, i] for i in range(40) if i not in own[user]])
        for user, item in zip(data.test.users, data.test.items, strict=True)
    ]
    assert_summaries_agree(ranks, lists, 10)


def best_by_sorting(scores, own, trained, k):
    """The k best items of a user; of equals the first comes first, -1 where none is left."""
    left = [item for item in range(len(scores)) if trained[item] and item not in own]
    best = sorted(left, key=lambda item: (-scores[item], item))[:k]
    return best + [-1] * (k - len(best))


@pytest.mark.parametrize(
    ("users_at_once", "block", "k"), [(5, 7, 4), (64, 512, 10), (23, 40, 40), (1, 39, 1), (4, 3, 9)]
)
def test_best_items_are_those_that_sorting_puts_first(users_at_once, block, k):
    data, own = small_dataset()
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 12, (23, 40)).astype(np.float32)
    trained = rng.random(40) < 0.7
    users = np.array([22, 3, 4, 17, 9, 0, 1])
    found = full_ranking.best_items(
        TABLE,
        table(np.where(trained, scores, np.nan)),  # what is not listed need not be finite
        None,
        users,
        touched_items(data),
        trained,
        k=k,
        users_at_once=users_at_once,
        block=block,
    )
    expected = [best_by_sorting(scores[user], own[user], trained, k) for user in users]
    np.testing.assert_array_equal(found, expected)
    assert (found == -1).any() == (k == 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_best_items_of_scores_that_are_not_finite_are_an_error(bad):
    data, own = small_dataset()
    scores = np.random.default_rng(1).normal(size=(23, 40))
    scores[3, next(item for item in range(40) if item not in own[3])] = bad
    touched, trained = touched_items(data), np.ones(40, bool)
    given = TABLE, table(scores), None
    with pytest.raises(InputError, match="1 of 2 users .* user row 3"):
        full_ranking.best_items(*given, np.array([1, 3]), touched, trained, k=2, block=16)
    with pytest.raises(InputError, match="user 23 is out of range"):
        full_ranking.best_items(*given, np.array([23]), touched, trained, k=2)


def test_no_more_scores_of_lists_exist_at_once_than_a_block_holds():
    largest = []

    def scores(projected, users, items):
        largest.append(items.size)  # seen when traced
        return TABLE.scores(projected, users, items)

    values = np.random.default_rng(0).normal(size=(300, 120))
    touched = np.arange(301), np.zeros(300, int)
    given = TABLE._replace(scores=scores), table(values), None
    users = np.arange(300)
    full_ranking.best_items(*given, users, touched, np.ones(120, bool), k=10, block=32)
    assert 0 < max(largest) <= 64 * (32 + 1)


def test_sample_of_users_is_all_or_a_thousand_and_always_the_same():
    users = np.arange(5_000)[::-1] * 2
    few = lists.sample(users)
    assert len(set(few)) == 1_000 == len(few) and (np.diff(few) > 0).all()
    assert set(few) < set(users) and np.array_equal(few, lists.sample(users))
    np.testing.assert_array_equal(lists.sample(users[:999]), np.sort(users[:999]))
