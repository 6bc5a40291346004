"""Metrics of several held-out items a user, against NumPy that sorts whole lists."""

import json
from itertools import permutations

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import launch, tiny
from scipy import stats
from test_evaluation import TABLE, table

from conet_jax import metrics
from conet_jax.data import store
from conet_jax.data.assemble import from_arrays
from conet_jax.data.load import touched_items
from conet_jax.data.types import HeldOut
from conet_jax.run.fit import fit
from conet_jax.run.workdir import read_ranks, restore
from conet_jax.studies import compare, statistics
from conet_jax.studies.evidence import ndcg_of
from conet_jax.train import full_ranking, list_metrics
from conet_jax.train.ranking import Ranks

USERS, ITEMS = 30, 80
NAMES = ("recall", "precision", "hit_ratio", "ndcg", "mrr")


def ratio_data(**options):
    rng = np.random.default_rng(5)
    flat = []
    for size in (ITEMS, 40):
        lists = [rng.choice(size, rng.integers(3, 30), replace=False) for _ in range(USERS)]
        flat += [np.repeat(np.arange(USERS), list(map(len, lists))), np.concatenate(lists)]
    sizes = {"num_target_items": ITEMS, "num_source_items": 40}
    return from_arrays(*flat, **sizes, candidates=12, split="ratio", ratios=(5, 2, 3), **options)


def of_order(order, wanted, k):
    """The metrics of one user's list, best first."""
    places = [place for place, item in enumerate(order, 1) if item in wanted]
    first = [place for place in places if place <= k]
    ideal = sum(1 / np.log2(1 + place) for place in range(1, min(k, len(wanted)) + 1))
    return [
        len(first) / len(wanted),
        len(first) / k,
        float(bool(first)),
        sum(1 / np.log2(1 + place) for place in first) / ideal,
        1 / first[0] if first else 0.0,
    ]


def sorting(scores, users, items, known, k, listed=None):
    """Means over users; ``known`` has the items of each user that are not in the list."""
    found = []
    for user in np.unique(users):
        wanted = set(items[users == user].tolist())
        left = [i for i in range(scores.shape[1]) if i not in known[user]]
        left = [i for i in left if listed is None or listed[i]]
        assert wanted <= set(left)
        found.append(of_order(sorted(left, key=lambda i: -scores[user, i]), wanted, k))
    return dict(zip(NAMES, np.mean(found, axis=0), strict=True))


def assert_agree(found, expected, k):
    for name in NAMES:
        np.testing.assert_allclose(found[f"{name}@{k}"], expected[name], rtol=1e-12, err_msg=name)


def known_items(data, parts):
    """Items of each user in training and the parts named, as sets."""
    csr = data.target
    known = [
        set(csr.indices[a:b].tolist()) for a, b in zip(csr.indptr, csr.indptr[1:], strict=False)
    ]
    for part in parts:
        held = getattr(data, part)
        for user, item in zip(held.users, held.items, strict=True):
            known[user].add(int(item))
    return known


@pytest.mark.parametrize("k", [1, 3, 10, 70])
@pytest.mark.parametrize(("part", "others"), [("test", ("valid",)), ("valid", ())])
def test_full_ranking_of_several_items_is_the_one_that_sorts_whole_lists(part, others, k):
    data = ratio_data()
    held = getattr(data, part)
    assert (np.diff(held.users) == 0).sum() > 20
    scores = np.random.default_rng(1).permutation(USERS * ITEMS).reshape(USERS, ITEMS)
    ranks = full_ranking.rank_full(
        *(TABLE, table(scores), None, held, touched_items(data, others)), users_at_once=7, block=11
    )
    known = known_items(data, others)
    assert ranks.candidates.tolist() == [ITEMS - 1 - len(known[user]) for user in held.users]
    expected = sorting(scores, held.users, held.items, known, k)
    found = list_metrics.summarize(held.users, ranks, k=k)
    assert_agree(found, expected, k)
    assert (found["users"], found["pairs"]) == (len(set(held.users.tolist())), len(held.users))


def test_full_ranking_of_some_items_lists_these_alone():
    data = ratio_data()
    listed = np.random.default_rng(2).random(ITEMS) < 0.7
    kept = listed[data.test.items]
    held = HeldOut(*(x[kept] for x in data.test))
    scores = np.random.default_rng(3).permutation(USERS * ITEMS).reshape(USERS, ITEMS)
    known = known_items(data, ("valid",))
    ranks = full_ranking.rank_full(
        TABLE, table(scores), None, held, touched_items(data, ("valid",)), listed, block=16
    )
    left = [sum(listed[i] for i in range(ITEMS) if i not in known[u]) - 1 for u in held.users]
    assert ranks.candidates.tolist() == left
    expected = sorting(scores, held.users, held.items, known, 5, listed)
    assert_agree(list_metrics.summarize(held.users, ranks, k=5), expected, 5)


def counts(scores, wanted):
    """Ranks of some items of one list, counted one by one."""
    others = [[s for i, s in enumerate(scores) if i != item] for item in wanted]
    found = [
        (sum(s > scores[item] for s in rest), sum(s == scores[item] for s in rest), len(rest))
        for item, rest in zip(wanted, others, strict=True)
    ]
    return Ranks(*np.array(found).T)


@pytest.mark.parametrize("seed", range(12))
def test_ties_count_by_the_mean_over_all_orders(seed):
    rng = np.random.default_rng(seed)
    size = 7
    scores = rng.integers(0, 1 + seed % 4, size).tolist()
    wanted = rng.choice(size, 1 + seed % 5, replace=False).tolist()
    orders = [
        order
        for order in permutations(range(size))
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:], strict=False))
    ]
    ranks = counts(scores, wanted)
    for k in (1, 2, 4, 9):
        expected = np.mean([of_order(order, wanted, k) for order in orders], axis=0)
        found = list_metrics.summarize(np.zeros(len(wanted), int), ranks, k=k)
        assert_agree(found, dict(zip(NAMES, expected, strict=True)), k)


def test_ranks_of_tied_items_of_a_user_are_counted_in_one_list():
    data, held = ratio_data(), ratio_data().test
    scores = np.random.default_rng(4).integers(0, 5, (USERS, ITEMS))
    known = known_items(data, ("valid",))
    ranks = full_ranking.rank_full(
        TABLE, table(scores), None, held, touched_items(data, ("valid",)), block=13
    )
    for at, (user, item) in enumerate(zip(held.users, held.items, strict=True)):
        left = [i for i in range(ITEMS) if i not in known[user] and i != item]
        assert ranks.above[at] == sum(scores[user, i] > scores[user, item] for i in left)
        assert ranks.tied[at] == sum(scores[user, i] == scores[user, item] for i in left)


def test_one_item_a_user_has_the_metrics_of_one_item():
    rng = np.random.default_rng(0)
    above, tied = rng.integers(0, 30, 50), rng.integers(0, 9, 50)
    ranks = Ranks(above, tied, np.full(50, 99))
    found = list_metrics.summarize(np.arange(50), ranks, k=[10, 3])
    for k in (10, 3):
        one = metrics.summarize(*ranks, k=k)
        for name in ("hit_ratio", "ndcg", "mrr"):
            np.testing.assert_allclose(found[f"{name}@{k}"], one[f"{name}@{k}"], rtol=1e-12)
        np.testing.assert_allclose(found[f"recall@{k}"], one[f"hit_ratio@{k}"], rtol=1e-12)
        np.testing.assert_allclose(found[f"precision@{k}"], one[f"hit_ratio@{k}"] / k, rtol=1e-12)
    assert found["users"] == 50 and "pairs" not in found


# Runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two runs on data split by ratio, and the data."""
    folder, data = tmp_path_factory.mktemp("runs"), ratio_data()
    store.save(data, folder / "data")
    for name in ("popularity", "ials"):
        config = tiny(name, layers=(8, 4), epochs=2, eval_k=(5, 3))
        config.data.dir = str(folder / "data")
        fit(config, folder / name, dataset=data, quiet=True)
    return folder, data


def test_a_result_counts_users_and_pairs(runs):
    folder, data = runs
    result = json.loads((folder / "ials" / "result.json").read_text())
    for part in ("test", "valid"):
        held = getattr(data, part)
        assert result[part]["users"] == len(np.unique(held.users))
        assert result[part]["pairs"] == len(held.users)
    held = data.test
    cell = f"| test | {len(np.unique(held.users))} ({len(held.users)} items) |"
    assert cell in (folder / "ials" / "result.md").read_text()
    assert result["lists"]["users"] == len(np.unique(data.test.users))
    rows = (folder / "ials" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["valid"]["pairs"] == len(data.valid.users)


def test_tests_are_over_users_and_not_over_their_items(runs):
    folder, _ = runs
    values = []
    for name in ("popularity", "ials"):
        users, ranks = read_ranks(folder / name / "ranks.npz", "test_warm")
        ndcg = metrics.ndcg(ranks.above, ranks.tied, k=5)
        values.append([ndcg[users == user].mean() for user in sorted(set(users.tolist()))])
        found = ndcg_of(folder / name / "ranks.npz", "test_warm", 5)
        np.testing.assert_allclose(found, values[-1], rtol=1e-12)
        np.testing.assert_array_equal(statistics.by_user(np.arange(len(ndcg)), ndcg), ndcg)
    text = compare.report([folder / "popularity", folder / "ials"])
    assert f"{len(values[0])} users, {len(users)} items." in text
    p = stats.ttest_rel(values[1], values[0]).pvalue
    gain = 100 * (np.mean(values[1]) / np.mean(values[0]) - 1)
    assert f"| {gain:+.2f}% | {p:.4f} |" in text


@pytest.mark.slow
@pytest.mark.parametrize("part", ["test", "valid"])
def test_evaluate_ranks_whole_lists_of_data_split_by_ratio(runs, part):
    folder, data = runs
    done = launch("evaluate", f"--workdir={folder / 'ials'}", "--full_ranking", f"--split={part}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    experiment, params, _ = restore(folder / "ials")
    model = experiment.model
    everything = jnp.broadcast_to(jnp.arange(ITEMS), (USERS, ITEMS))
    projected = model.project(params, experiment.interactions)
    scores = np.asarray(model.scores(projected, jnp.arange(USERS), everything))
    held, trained = getattr(data, part), experiment.trained_items()
    known = known_items(data, ("valid",) if part == "test" else ())
    for k in (5, 3):
        for name, kept, listed in (
            (part, np.ones(len(held.users), bool), None),
            (f"{part}_warm", trained[held.items], trained),
        ):
            expected = sorting(scores, held.users[kept], held.items[kept], known, k, listed)
            assert_agree(found[name], expected, k)
