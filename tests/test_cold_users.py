"""Users whose target pairs are taken away, against sets of pairs in plain Python."""

import json

import numpy as np
import pytest
from helpers import MEDIUM, tiny
from ml_collections import ConfigDict

from conet_jax.config import default_config, differences
from conet_jax.data import store, synthetic
from conet_jax.data.cold_users import make_cold
from conet_jax.data.load import load_dataset
from conet_jax.run.fit import fit
from conet_jax.run.workdir import restore

COLD = 15


@pytest.fixture(scope="module")
def whole():
    return synthetic.dataset(**MEDIUM)[0]


@pytest.fixture(scope="module")
def cold(whole):
    return make_cold(whole, COLD)


def pairs(interactions):
    users = np.repeat(np.arange(len(interactions.indptr) - 1), np.diff(interactions.indptr))
    return set(zip(users.tolist(), interactions.indices.tolist(), strict=True))


def test_cold_users_have_no_target_pair_and_all_others_theirs(whole, cold):
    gone = {*cold.test.users.tolist(), *cold.valid.users.tolist()}
    assert len(gone) == 2 * COLD  # nobody is in both
    assert pairs(cold.target) == {(u, i) for u, i in pairs(whole.target) if u not in gone}
    assert pairs(cold.source) == pairs(whole.source)
    counts = [data.meta["counts"]["target_interactions"] for data in (whole, cold)]
    assert counts[0] - counts[1] == len(whole.target.indices) - len(cold.target.indices) > COLD


def test_weights_go_with_their_pairs(whole, cold):
    weights = np.arange(1.0, 1 + len(whole.target.indices), dtype=np.float32)
    weighted = make_cold(whole._replace(target=whole.target._replace(weights=weights)), COLD)
    gone = [*cold.test.users, *cold.valid.users]
    users = np.repeat(np.arange(whole.num_users), np.diff(whole.target.indptr))
    np.testing.assert_array_equal(weighted.target.weights, weights[~np.isin(users, gone)])


@pytest.mark.parametrize("part", ["valid", "test"])
def test_cold_users_keep_their_held_out_item_and_its_candidates(whole, cold, part):
    found, all_of_them = getattr(cold, part), getattr(whole, part)
    assert len(found.users) == COLD and (np.diff(found.users) > 0).all()
    for at, user in enumerate(found.users):
        there = int(np.flatnonzero(all_of_them.users == user)[0])
        for own, others in zip(found[1:], all_of_them[1:], strict=True):
            np.testing.assert_array_equal(own[at], others[there])


def test_the_seed_draws_the_users(whole, cold):
    again, other = make_cold(whole, COLD), make_cold(whole, COLD, seed=1)
    assert again.meta["hash"] == cold.meta["hash"]
    np.testing.assert_array_equal(again.test.users, cold.test.users)
    assert set(other.test.users) != set(cold.test.users)
    assert len({whole.meta["hash"], cold.meta["hash"], other.meta["hash"]}) == 3


def test_a_config_stored_before_there_were_such_fields_is_the_same_config():
    config = default_config("recipe")
    stored = json.loads(config.to_json())
    for name in ("cold", "cold_seed"):
        del stored["data"][name]
    for name in ("graph_layers", "map_hidden", "map_ridge", "ease_source_weight"):
        del stored[name]
    assert differences(stored, config) == differences(stored, ConfigDict(stored)) == []
    config.data.cold = 9
    assert differences(stored, config) == ["config.data.cold is 0 there and 9 here"]


def test_a_run_on_cold_users_finds_its_data_again(whole, tmp_path):
    store.save(whole, tmp_path / "data")
    config = tiny("emcdr", epochs=2)
    config.data.dir, config.data.cold, config.data.cold_seed = str(tmp_path / "data"), COLD, 3
    loaded = load_dataset(config)
    assert loaded.meta["hash"] == make_cold(whole, COLD, 3).meta["hash"]
    result = fit(config, tmp_path / "run", quiet=True)
    assert result["test"]["users"] == COLD
    experiment, _, _ = restore(tmp_path / "run")
    np.testing.assert_array_equal(experiment.dataset.test.users, loaded.test.users)
    config.data.drop = 1  # of the users that are left
    both = load_dataset(config)
    assert len(both.target.indices) < len(loaded.target.indices)
    assert both.meta["hash"] != loaded.meta["hash"]
