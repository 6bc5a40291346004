"""What a user has rated below the threshold is no sampled negative, where that is asked for."""

import jax
import numpy as np
import pytest
from helpers import SMALL, tiny

from conet_jax.config import differences
from conet_jax.data import synthetic
from conet_jax.data.types import Dataset, UserItems, content_hash
from conet_jax.errors import InputError
from conet_jax.run.experiment import make_experiment
from conet_jax.train import sampling
from conet_jax.train.interactions import to_device


def with_seen(data: Dataset, each: int = 60) -> Dataset:
    """Some items of each user, none liked, as rated below the threshold."""
    rng, lists = np.random.default_rng(0), []
    for user in range(data.num_users):
        own = data.target.indices[data.target.indptr[user] : data.target.indptr[user + 1]]
        held = [h.items[h.users == user] for h in (data.valid, data.test)]
        free = np.setdiff1d(np.arange(data.target.num_items), np.concatenate([own, *held]))
        lists.append(np.sort(rng.choice(free, each, replace=False)))
    indptr = (np.arange(data.num_users + 1) * each).astype(np.int32)
    seen = UserItems(indptr, np.concatenate(lists).astype(np.int32), data.target.num_items)
    made = data._replace(seen=seen)
    return made._replace(meta=made.meta | {"hash": content_hash(made)})


@pytest.fixture(scope="module")
def data():
    return with_seen(synthetic.dataset(**SMALL)[0])


def drawn(experiment):
    """(users, items) of all negatives of an epoch of the target, and its batches' source items."""
    users, items, sources = [], [], []
    sample = jax.jit(sampling.sample_step, static_argnums=4)
    for step in range(experiment.plan.steps):
        batch = sample(jax.random.key(0), 0, step, experiment.interactions, experiment.plan)
        target = batch.target
        if target.negatives is None:
            negative = np.asarray(target.labels) == 0
            items.append(np.asarray(target.items)[negative])
        else:
            negative = np.ones(len(target.users), bool)
            items.append(np.asarray(target.negatives))
        users.append(np.asarray(target.users)[negative])
        if batch.source is not None:
            sources.append(np.asarray(batch.source.items))
    return np.concatenate(users), np.concatenate(items), sources


def keys_of(rows: UserItems):
    users = np.repeat(np.arange(len(rows.indptr) - 1), np.diff(rows.indptr))
    return users * rows.num_items + rows.indices


@pytest.mark.parametrize(
    ("variant", "fields"),
    [("lasso", {}), ("lasso", {"pairing": "random"}), ("bprmf", {}), ("recipe", {"folds": 3})],
)
def test_no_negative_is_among_what_a_user_rated_low(variant, fields, data):
    all_sources = []
    for avoid in (False, True):
        config = tiny(variant, negatives=4, negatives_avoid_seen=avoid, **fields)
        users, items, sources = drawn(make_experiment(config, data))
        keys = users * data.target.num_items + items
        assert not np.isin(keys, keys_of(data.target)).any()
        share = np.isin(keys, keys_of(data.seen)).mean()
        # 60 of 130 items less some six: about half.
        assert share == 0 if avoid else 0.4 < share < 0.6
        # Held-out items can be negatives: nothing is known of them.
        held = data.test.users * data.target.num_items + data.test.items
        assert np.isin(keys, held).any()
        all_sources.append(sources)
    for one, two in zip(*all_sources, strict=True):
        np.testing.assert_array_equal(one, two)  # the source's draws are what they were


def test_negatives_are_uniform_over_what_is_left():
    indptr, items = np.array([0, 2, 3, 4]), np.array([1, 4, 0, 2])
    avoided = np.array([0, 2, 2, 6]), np.array([0, 2, 0, 1, 3, 4])
    made = to_device(indptr, items, 6, avoided=avoided)
    users = np.repeat(np.arange(3), 3000)
    found = np.asarray(sampling.negatives(jax.random.key(0), made.taken, users))
    for user, left in enumerate(([3, 5], [1, 2, 3, 4, 5], [5])):
        counts = np.bincount(found[users == user], minlength=6)
        want = np.zeros(6)
        want[left] = 3000 / len(left)
        assert (np.abs(counts - want) <= 5 * np.sqrt(want)).all()


def test_a_user_who_has_rated_everything_keeps_the_low_ones_as_negatives():
    made = to_device(np.array([0, 2]), np.array([1, 2]), 3, avoided=([0, 1], np.array([0])))
    found = sampling.negatives(jax.random.key(0), made.taken, np.zeros(50, int))
    assert set(found.tolist()) == {0}


def test_it_is_refused_where_it_would_do_nothing(data):
    plain = synthetic.dataset(**SMALL)[0]
    with pytest.raises(InputError, match="no target pairs below a threshold"):
        make_experiment(tiny(negatives_avoid_seen=True), plain)
    with pytest.raises(InputError, match="config.model=ials samples no negatives"):
        make_experiment(tiny("ials", negatives_avoid_seen=True), data)


def test_runs_of_before_go_on(data):
    config = tiny()
    stored = {name: x for name, x in config.to_dict().items() if name != "negatives_avoid_seen"}
    assert differences(stored, config) == []
    config.negatives_avoid_seen = True
    assert "negatives_avoid_seen is False there and True here" in differences(stored, config)[0]
