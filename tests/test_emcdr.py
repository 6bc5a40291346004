"""EMCDR against factorisation and maps written out in NumPy float64."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_baselines import interactions_of

from conet_jax.config import default_config
from conet_jax.models import emcdr
from conet_jax.models.base import Sizes
from conet_jax.serve import newcomers
from conet_jax.train import ranking

USERS, ITEMS = 30, {"target": 12, "source": 15}
SIZES = Sizes(USERS, *ITEMS.values())
LAYERS, DIM, RIDGE, LAMBDA, ALPHA = (6, 4), 3, 0.05, 2.0, 8.0
NO_TARGET, NO_SOURCE, NOTHING = [3, 7], [5], 9


def lists_of(domain, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, USERS)
    counts[[*(NO_TARGET if domain == "target" else NO_SOURCE), NOTHING]] = 0
    return [np.sort(rng.choice(ITEMS[domain], count, replace=False)) for count in counts]


LISTS = {domain: lists_of(domain, seed) for seed, domain in enumerate(ITEMS)}


def fitted(sweeps, hidden=0):
    """Parameters before the last sweep and after it, in float64, and the model."""
    model = emcdr.build(emcdr.Options(LAYERS, LAMBDA, ALPHA, hidden, RIDGE))
    with jax.enable_x64(True):
        interactions = {d: interactions_of(LISTS[d], ITEMS[d]) for d in ITEMS}
        sweep = model.sweeper(interactions, SIZES)
        params = before = model.init(jax.random.key(0), SIZES)
        for _ in range(sweeps):
            before, params = params, sweep(params)
        projected = ranking.project(params, interactions, model=model)
        users, items = np.arange(USERS), np.tile(np.arange(ITEMS["target"]), (USERS, 1))
        scores = np.asarray(model.scores(projected, users, items))
        return *jax.tree.map(np.asarray, (before, params)), scores


def solved(lists, others):
    """Hu, Koren and Volinsky 2008, Eq. 4, for each row of ones at ``lists``."""
    out = np.zeros((len(lists), DIM))
    for row, own in zip(out, lists, strict=True):
        confidence = np.ones(len(others))
        confidence[own] += ALPHA
        preference = np.zeros(len(others))
        preference[own] = 1
        left = others.T @ (confidence[:, None] * others) + LAMBDA * np.eye(DIM)
        row[:] = np.linalg.solve(left, others.T @ (confidence * preference))
    return out


def transposed(lists, count):
    return [[u for u, own in enumerate(lists) if i in own] for i in range(count)]


def shared():
    return [u for u in range(USERS) if len(LISTS["target"][u]) and len(LISTS["source"][u])]


def scaled(x):
    rms = np.sqrt((x[shared()] ** 2).mean())
    return x / rms, rms


def assert_each_domain_is_factorised_by_itself(params):
    """At the end of many sweeps each side is the best there is for the other."""
    tables = params.tables
    for domain, user, item in (
        ("target", "user", "target_item"),
        ("source", "source_user", "source_item"),
    ):
        own = [u for u in range(USERS) if len(LISTS[domain][u])]
        users = solved(LISTS[domain], tables[item])
        np.testing.assert_allclose(tables[user][own], users[own], rtol=1e-5, atol=1e-6)
        alone = np.where(np.isin(np.arange(USERS), own)[:, None], tables[user], 0)
        items = solved(transposed(LISTS[domain], ITEMS[domain]), alone)
        np.testing.assert_allclose(tables[item], items, rtol=1e-5, atol=1e-6)


def test_linear_map_is_the_ridge_regression_of_factors_on_factors():
    _, params, scores = fitted(sweeps=400)
    assert_each_domain_is_factorised_by_itself(params)
    tables, both = params.tables, shared()
    x, _ = scaled(tables["source_user"])
    y, back = scaled(solved(LISTS["target"], tables["target_item"]))
    ones = np.concatenate([x, np.ones((USERS, 1))], axis=1)
    penalty = len(both) * RIDGE * np.diag([1] * DIM + [0])
    to_target = np.linalg.solve(ones[both].T @ ones[both] + penalty, ones[both].T @ y[both])
    expected = back * ones @ to_target
    np.testing.assert_allclose(tables["user"][NO_TARGET], expected[NO_TARGET], rtol=1e-4, atol=1e-6)
    assert not tables["user"][NOTHING].any() and np.abs(expected[NO_TARGET]).max() > 0.05
    np.testing.assert_allclose(scores, tables["user"] @ tables["target_item"].T, rtol=1e-10)
    of_domain = [u for u in range(USERS) if len(LISTS["target"][u])]
    own = solved(LISTS["target"], tables["target_item"])
    np.testing.assert_allclose(tables["user"][of_domain], own[of_domain], rtol=1e-5, atol=1e-6)


def test_network_is_full_batch_adam_on_its_squared_error():
    before, params, _ = fitted(sweeps=3, hidden=5)
    both = shared()
    x, _ = scaled(params.tables["source_user"])
    y, back = scaled(params.tables["user"])
    x, y = x[both], y[both]
    w = {name: np.array(value) for name, value in before.dense.items() if name != "scales"}
    first, second = ({name: np.zeros_like(v) for name, v in w.items()} for _ in range(2))
    for t in range(1, emcdr._STEPS + 1):
        hidden = np.tanh(x @ w["W_0"] + w["b_0"])
        error = 2 / len(both) * (hidden @ w["W_1"] + w["b_1"] - y)
        inner = (error @ w["W_1"].T) * (1 - hidden**2)
        gradient = {
            "W_0": x.T @ inner + 2 * RIDGE * w["W_0"],
            "b_0": inner.sum(0),
            "W_1": hidden.T @ error + 2 * RIDGE * w["W_1"],
            "b_1": error.sum(0),
        }
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            step = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            w[name] = w[name] - emcdr._RATE * step
    for name, value in w.items():
        np.testing.assert_allclose(params.dense[name], value, rtol=1e-6, atol=1e-8)
    own = scaled(params.tables["source_user"])[0][NO_TARGET]
    expected = back * (np.tanh(own @ w["W_0"] + w["b_0"]) @ w["W_1"] + w["b_1"])
    np.testing.assert_allclose(params.tables["user"][NO_TARGET], expected, rtol=1e-5)


@pytest.mark.parametrize("hidden", [0, 5])
def test_target_pairs_of_a_user_without_any_are_not_needed(hidden):
    _, params, scores = fitted(sweeps=2, hidden=hidden)
    assert np.ptp(scores[NO_TARGET], axis=1).min() > 0  # ranked by what they have in the source
    assert not scores[NOTHING].any()
    assert np.isfinite(params.tables["user"]).all()


def test_newcomers_with_the_source_items_of_a_user_get_that_users_row():
    _, params, _ = fitted(sweeps=400)
    config = default_config("emcdr")
    config.update(layers=LAYERS, ials_regularization=LAMBDA, ials_alpha=ALPHA, map_ridge=RIDGE)
    experiment = SimpleNamespace(config=config, model=emcdr.build(emcdr.Options()))
    found = newcomers.of(experiment, jax.tree.map(np.float32, params))
    assert found.domains == ("source",)
    rows = found.embed({"source": [LISTS["source"][u] for u in NO_TARGET], "target": [[], []]})
    np.testing.assert_allclose(rows["user"], params.tables["user"][NO_TARGET], rtol=1e-3, atol=1e-5)
