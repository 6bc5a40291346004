"""Metrics against brute force over all orders of the tied, then extremes and array types."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from conet_jax import metrics

METRICS = {
    "hit_ratio": (metrics.hit_ratio, lambda rank, k: float(rank <= k)),
    "ndcg": (metrics.ndcg, lambda rank, k: 1 / np.log2(rank + 1) if rank <= k else 0.0),
    "mrr": (metrics.mrr, lambda rank, k: 1 / rank if rank <= k else 0.0),
    "mrr_published": (
        metrics.mrr_published,
        lambda rank, k: 1 / rank if rank <= k else 1 / (k + 1),
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_its_mean_over_all_orders_of_the_tied(name):
    metric, of_rank = METRICS[name]
    scores = [3.0, 1.0, 2.0, 2.0, 2.0, 0.0]  # the held-out item comes first, whatever its score
    for held_out, k in itertools.product([3.0, 2.0, 1.0, -1.0], [1, 2, 3, 10]):
        values = []
        for order in itertools.permutations(range(len(scores) + 1)):
            listed = [([held_out, *scores][i], i) for i in order]
            ranked = sorted(listed, key=lambda pair: -pair[0])  # stable: ties as listed
            values.append(of_rank(1 + [i for _, i in ranked].index(0), k))
        above = sum(score > held_out for score in scores)
        tied = sum(score == held_out for score in scores)
        np.testing.assert_allclose(metric(above, tied, k=k), np.mean(values), atol=1e-12)


def test_auc_is_the_share_of_pairs_won():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (20, 12))
    held_out = rng.integers(0, 5, 20)
    above = (scores > held_out[:, None]).sum(1)
    tied = (scores == held_out[:, None]).sum(1)
    below = (scores < held_out[:, None]).sum(1)
    np.testing.assert_allclose(metrics.auc(above, tied, 12), (below + tied / 2) / 12, atol=1e-15)


def test_auc_takes_the_number_of_candidates_of_each_user():
    np.testing.assert_array_equal(metrics.auc([1, 1], [0, 0], [2, 4]), [0.5, 0.75])
    assert np.isnan(metrics.auc(0, 0, 0))


def test_constant_scorer_has_chance_hit_ratio():
    users = 80_763
    summary = metrics.summarize(np.zeros(users, int), np.full(users, 99), 99, k=10)
    assert abs(summary["hit_ratio@10"] - 0.1) < 1e-12
    assert abs(summary["auc"] - 0.5) < 1e-12
    places = np.arange(1, 11)
    assert abs(summary["ndcg@10"] - np.sum(1 / np.log2(places + 1)) / 100) < 1e-12
    assert abs(summary["mrr@10"] - np.sum(1 / places) / 100) < 1e-12
    assert summary["users"] == users


def test_published_mrr_counts_a_miss_one_over_k_plus_one():
    np.testing.assert_allclose(
        metrics.mrr_published([0, 9, 10, 98], 0, k=10), [1, 0.1, 1 / 11, 1 / 11]
    )
    np.testing.assert_allclose(metrics.mrr([0, 9, 10, 98], 0, k=10), [1, 0.1, 0, 0])


@hypothesis.given(above=st.integers(0, 10**6), tied=st.integers(0, 10**6), k=st.integers(1, 200))
@hypothesis.settings(deadline=None, max_examples=100)
def test_metrics_are_ordered_and_within_zero_and_one(above, tied, k):
    hit, gain, mean = (f(above, tied, k=k) for f in (metrics.hit_ratio, metrics.ndcg, metrics.mrr))
    assert 0 <= mean <= gain + 1e-12 <= hit + 2e-12 <= 1 + 2e-12
    assert mean <= metrics.mrr_published(above, tied, k=k) <= 1 + 1e-12
    assert 0 <= metrics.auc(above, tied, above + tied + 1) <= 1


def test_numpy_gives_float64_and_jax_gives_jax():
    above, tied = np.array([0, 3, 12], np.int32), np.array([0, 2, 9], np.int32)
    functions = [lambda a, t, f=f: f(a, t, k=10) for f, _ in METRICS.values()]
    functions.append(lambda a, t: metrics.auc(a, t, 99))
    for function in functions:
        on_host = function(above, tied)
        assert isinstance(on_host, np.ndarray)
        assert on_host.dtype == np.float64
        on_device = function(jnp.asarray(above), jnp.asarray(tied))
        assert isinstance(on_device, jax.Array)
        assert on_device.dtype == jnp.float32
        np.testing.assert_allclose(on_device, on_host, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(function)(above, tied), on_host, rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(function)(above, tied), on_host, rtol=1e-5)


def test_summary_is_the_mean_of_each_metric():
    above, tied = np.array([0, 4, 50]), np.array([0, 1, 0])
    candidates = np.array([99, 90, 60])
    summary = metrics.summarize(jnp.asarray(above), jnp.asarray(tied), candidates, k=5)
    assert list(summary) == [
        "hit_ratio@5",
        "ndcg@5",
        "mrr@5",
        "mrr_published@5",
        "auc",
        "users",
    ]
    assert all(type(value) is float for name, value in summary.items() if name != "users")
    assert type(summary["users"]) is int
    for name, (metric, _) in METRICS.items():
        assert summary[f"{name}@5"] == np.mean(metric(above, tied, k=5))
    assert summary["auc"] == np.mean(metrics.auc(above, tied, candidates))


def test_summary_at_several_cuts_is_that_at_each():
    counts = np.array([0, 4, 50]), np.array([0, 1, 0]), np.array([99, 90, 60])
    summary = metrics.summarize(*counts, k=(10, 5, 20))
    each = [metrics.summarize(*counts, k=k) for k in (10, 5, 20)]
    assert summary == each[0] | each[1] | each[2] and len(summary) == 3 * 4 + 2
    assert list(summary)[:5] == ["hit_ratio@10", "ndcg@10", "mrr@10", "mrr_published@10", "auc"]
    for k in ((10, 0), (10, 2.5), 2.5):
        with pytest.raises(ValueError, match="cut k"):
            metrics.summarize(*counts, k=k)


def test_lists_are_counted_one_by_one():
    rng = np.random.default_rng(0)
    popularity = rng.integers(0, 4, 50)
    warm = np.flatnonzero(popularity)
    lists = np.array([rng.permutation(warm)[:5] for _ in range(6)])
    lists[2, 3:] = lists[4] = -1  # shorter, and empty
    owned = rng.choice(warm, 40)
    listed = [int(item) for row in lists for item in row if item >= 0]
    assert len(set(listed)) < len(listed) == 6 * 5 - 2 - 5
    assert metrics.summarize_lists(lists, popularity, owned) == {
        "coverage": len(set(listed)) / sum(1 for count in popularity if count),
        "popularity": pytest.approx(sum(popularity[i] for i in listed) / len(listed)),
        "pair_popularity": pytest.approx(sum(popularity[i] for i in owned) / 40),
        "once_share": pytest.approx(sum(popularity[i] == 1 for i in listed) / len(listed)),
    }


def test_lists_that_are_empty_have_no_means_and_cold_items_are_refused():
    nothing = np.full((2, 3), -1)
    found = metrics.summarize_lists(nothing, np.array([1, 0]), np.array([], int))
    assert found == {
        "coverage": 0.0,
        "popularity": None,
        "pair_popularity": None,
        "once_share": None,
    }
    for lists, popularity in ((np.array([[1]]), [3, 0]), (nothing, [0, 0])):
        with pytest.raises(ValueError, match="with a training pair"):
            metrics.summarize_lists(lists, np.array(popularity), np.array([0]))


def test_wrong_input_is_refused():
    for k in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="cut k"):
            metrics.ndcg(0, 0, k=k)
    with pytest.raises(ValueError, match="must be integers"):
        metrics.hit_ratio(np.array([0.5]), np.array([0]), k=10)
    with pytest.raises(ValueError, match="^there is no user"):
        metrics.summarize([], [], [], k=10)
    with pytest.raises(ValueError, match="user 1 has 60 candidates above and 40 tied of 99"):
        metrics.summarize([0, 60], [0, 40], 99, k=10)
    with pytest.raises(ValueError, match="user 1 has 0 candidates above and -1 tied of 5"):
        metrics.summarize([0, 0], [0, -1], 5, k=10)
    with pytest.raises(ValueError, match="user 0 has 0 candidates above and 0 tied of 0"):
        metrics.summarize([0], [0], 0, k=10)
    with pytest.raises(ValueError, match="user 0 has -1"):
        metrics.summarize([-1], [0], 99, k=10)


def test_one_candidate_is_enough():
    summary = metrics.summarize([0, 1, 0], [0, 0, 1], 1, k=1)
    assert summary["auc"] == 0.5 and summary["hit_ratio@1"] == 0.5 and summary["users"] == 3
