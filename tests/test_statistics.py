"""Paired tests against SciPy and written-out formulas, and where they degenerate."""

import numpy as np
import pytest
from scipy import stats

from conet_jax.studies import statistics


def pairs(users=300, effect=0.02, seed=0):
    rng = np.random.default_rng(seed)
    theirs = rng.random(users)
    return theirs + rng.normal(effect, 0.2, users), theirs


def test_t_test_is_that_of_scipy_and_of_the_formula():
    ours, theirs = pairs()
    p = statistics.paired_t_test(ours, theirs)
    assert p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-12)
    difference = ours - theirs
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))
    assert p == pytest.approx(2 * stats.t.sf(abs(t), len(difference) - 1), rel=1e-9)
    assert statistics.paired_t_test(theirs, ours) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.1, 0.0), (1e-16, 1.0)])
def test_differences_without_variance_have_a_p_and_no_warning(shift, p):
    ours, _ = pairs()
    assert statistics.paired_t_test(ours + shift, ours) == p


def test_equal_models_have_an_interval_of_zero_and_p_one():
    ours, _ = pairs()
    assert statistics.paired_bootstrap(ours, ours) == (0.0, 0.0, 0.0, 1.0)


def test_bootstrap_is_that_of_a_plain_loop_in_any_chunks(monkeypatch):
    ours, theirs = pairs(users=31)
    found = statistics.paired_bootstrap(ours, theirs, resamples=200, seed=3)
    rng, means = np.random.default_rng(3), []
    for _ in range(200):
        drawn = rng.integers(0, 31, 31, dtype=np.int32)
        means.append(np.mean(ours[drawn]) - np.mean(theirs[drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    below = sum(mean <= 0 for mean in means)
    p = min(1, 2 * min(1 + below, 1 + 200 - below) / 201)
    expected = (ours.mean() - theirs.mean(), low, high, p)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    monkeypatch.setattr(statistics, "_DRAWS_A_CHUNK", 31 * 7)
    assert statistics.paired_bootstrap(ours, theirs, resamples=200, seed=3) == found


def test_bootstrap_agrees_with_normal_theory():
    ours, theirs = pairs(users=2000, effect=0.01)
    found = statistics.paired_bootstrap(ours, theirs)
    error = (ours - theirs).std() / np.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.p == pytest.approx(statistics.paired_t_test(ours, theirs), abs=0.01)
    assert found == statistics.paired_bootstrap(ours, theirs)


def test_bootstrap_p_is_never_zero():
    ours, theirs = pairs(effect=1.0)
    assert statistics.paired_bootstrap(ours, theirs, resamples=99).p == 2 / 100


@pytest.mark.parametrize("shapes", [(1, 1), (3, 4), ((2, 2), (2, 2))])
def test_other_shapes_are_refused(shapes):
    ours, theirs = (np.zeros(shape) for shape in shapes)
    for test in (statistics.paired_t_test, statistics.paired_bootstrap):
        with pytest.raises(ValueError, match="the same two users or more"):
            test(ours, theirs)
