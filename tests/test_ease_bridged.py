"""The bridged EASE against the ridge regressions that it is, one item at a time, in NumPy."""

import jax
import numpy as np
import pytest
from test_baselines import interactions_of

from conet_jax.models import ease_bridged
from conet_jax.models.base import Sizes

RIDGE, WEIGHT = 1.5, 0.3
OPTIONS = ease_bridged.Options(RIDGE, WEIGHT)
MODEL = ease_bridged.build(OPTIONS)
# More users than target items, and fewer.
CASES = {"by items": Sizes(12, 6, 7), "by users": Sizes(5, 6, 7)}


def domains(sizes, seed=0):
    """Users of both domains, of the target alone (0), of the source alone (1), of neither (2)."""
    rng = np.random.default_rng(seed)

    def lists(num_items, without):
        counts = rng.integers(2, 4, sizes.users)
        counts[list(without)] = 0
        return [np.sort(rng.choice(num_items - 1, count, replace=False)) for count in counts]

    target = lists(sizes.target_items, (1, 2))
    source = lists(sizes.source_items, (0, 2))
    return {
        "target": interactions_of(target, sizes.target_items),
        "source": interactions_of(source, sizes.source_items),
    }


def matrix(interactions, users):
    x = np.zeros((users, interactions.num_items))
    x[np.asarray(interactions.users), np.asarray(interactions.items)] = 1
    return x


def expected_scores(interactions, sizes):
    """For each item the ridge regression on all others of both domains, over the target's users."""
    y, s = (matrix(interactions[d], sizes.users) for d in ("target", "source"))
    x = np.concatenate([y, s], axis=1)
    ridges = np.repeat([RIDGE, RIDGE / WEIGHT], [sizes.target_items, sizes.source_items])
    rows = y.any(1)
    out = np.zeros(y.shape)
    for j in range(sizes.target_items):
        others = np.delete(np.arange(x.shape[1]), j)
        a = x[rows][:, others]
        b = np.linalg.solve(a.T @ a + np.diag(ridges[others]), a.T @ y[rows, j])
        out[:, j] = x[:, others] @ b
    return out, y


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_a_ridge_regression_for_each_item(case):
    sizes = CASES[case]
    interactions = domains(sizes)
    expected, y = expected_scores(interactions, sizes)
    params = MODEL.sweeper(interactions, sizes)(MODEL.init(jax.random.key(0), sizes))
    drawn = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), sizes))
    assert params.tables["target_item"].shape == drawn.tables["target_item"].shape
    scores = scores_of(params, interactions, sizes)
    # By users the score of what a user has is another one, and nobody asks for it.
    asked = y == 0 if case == "by users" else np.ones(y.shape, bool)
    np.testing.assert_allclose(scores[asked], expected[asked], rtol=1e-4, atol=1e-6)
    assert np.abs(expected[1]).max() > 0.01  # the source alone gives scores
    assert not scores[2].any()


def scores_of(params, interactions, sizes):
    users, items = np.arange(sizes.users), np.arange(sizes.target_items)
    projected = MODEL.project(params, interactions)
    return np.asarray(MODEL.scores(projected, users, np.tile(items, (sizes.users, 1))))
