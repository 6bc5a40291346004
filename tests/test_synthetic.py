import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conet_jax.data import synthetic
from conet_jax.errors import InputError

SIZES = dict(
    num_users=400,
    num_target_items=200,
    num_source_items=250,
    target_interactions=2_401,
    source_interactions=8_003,
)
PAPER = dict(  # Table 1, Amazon
    num_users=80_763,
    num_target_items=93_799,
    num_source_items=35_896,
    target_interactions=1_323_101,
    source_interactions=963_373,
)


def matrix(users, items, num_users, num_items):
    """Dense 0/1 interactions, f64[num_users, num_items]."""
    out = np.zeros((num_users, num_items))
    out[users, items] = 1
    return out


def check_domain(users, items, num_users, num_items, interactions, least):
    assert users.dtype == items.dtype == np.int32
    assert len(users) == len(items) == interactions
    keys = users.astype(np.int64) * num_items + items
    assert (np.diff(keys) > 0).all()  # sorted by (user, item), no duplicates
    assert 0 <= items.min() and items.max() < num_items
    counts = np.bincount(users, minlength=num_users)
    assert len(counts) == num_users
    assert least <= counts.min() and counts.max() <= num_items // 2


def check_sizes(domains, sizes):
    users, target, source = (sizes[f"num_{k}"] for k in ("users", "target_items", "source_items"))
    check_domain(*domains[:2], users, target, sizes["target_interactions"], least=3)
    check_domain(*domains[2:4], users, source, sizes["source_interactions"], least=1)


def ndcg(scores):
    """NDCG@10 with the held-out item in column 0, ties in its disfavour."""
    rank = (scores[:, 1:] >= scores[:, :1]).sum(1)
    return np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()


def leave_one_out(domains, num_users, num_items, seed=0):
    """A random held-out item of each user and 99 others, and the rest of the interactions."""
    rng = np.random.default_rng(seed)
    full = matrix(*domains[:2], num_users, num_items)
    held_out = np.where(full, rng.random(full.shape), -1).argmax(1)
    candidates = np.where(full, 2, rng.random(full.shape)).argsort(1)[:, :99]
    full[np.arange(num_users), held_out] = 0
    return np.c_[held_out, candidates], full


def test_totals_are_exact_and_pairs_are_distinct_and_sorted():
    check_sizes(synthetic.generate(seed=0, **SIZES), SIZES)


def test_totals_are_exact_where_picks_are_proposed():
    sizes = dict(SIZES, num_target_items=20_000, num_source_items=30_000)
    check_sizes(synthetic.generate(seed=0, **sizes), sizes)


def test_extreme_densities_fit():
    sizes = dict(SIZES, num_users=20, target_interactions=20 * 100, source_interactions=20)
    domains = synthetic.generate(seed=0, **sizes)
    assert (np.bincount(domains.target_users) == 100).all()
    assert (np.bincount(domains.source_users) == 1).all()


def test_same_seed_gives_same_arrays_and_another_seed_others():
    one, same = (synthetic.generate(seed=3, **SIZES) for _ in range(2))
    for a, b in zip(one[:4] + one[4] + one[5], same[:4] + same[4] + same[5], strict=True):
        np.testing.assert_array_equal(a, b)
    other = synthetic.generate(seed=4, **SIZES)
    assert (one.target_items != other.target_items).mean() > 0.5


def test_target_does_not_depend_on_transfer():
    one, other = (synthetic.generate(seed=3, transfer=t, **SIZES) for t in (0.0, 0.7))
    np.testing.assert_array_equal(one.target_items, other.target_items)
    assert (one.source_items != other.source_items).mean() > 0.5


@pytest.mark.parametrize("transfer", [0.0, 0.6, 1.0])
def test_transfer_is_the_correlation_of_the_domains_user_factors(transfer):
    sizes = dict(SIZES, num_users=3_000, target_interactions=9_000)
    domains = synthetic.generate(seed=0, transfer=transfer, dim=8, **sizes)
    cosine = (domains.target_truth.user_factors * domains.source_truth.user_factors).sum(1)
    # Lengths cost a little: E[cosine] of Gaussian vectors is below their correlation.
    assert transfer - 0.06 < cosine.mean() < transfer + 0.02


def similarity(users, items, num_users, num_items):
    """Cosine of all pairs of users, after the items' means are taken out."""
    seen = matrix(users, items, num_users, num_items)
    seen = (seen - seen.mean(0)) / np.sqrt(seen.mean(0) + 1 / num_users)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    return (seen @ seen.T)[np.triu_indices(num_users, 1)]


def test_source_neighbours_are_target_neighbours_only_with_transfer():
    correlation = {}
    for transfer in (0.0, 0.5, 1.0):
        domains = synthetic.generate(seed=1, transfer=transfer, **SIZES)
        correlation[transfer] = np.corrcoef(
            similarity(*domains[:2], 400, 200), similarity(*domains[2:4], 400, 250)
        )[0, 1]
    assert abs(correlation[0.0]) < 0.015
    assert correlation[0.5] > 0.02
    assert correlation[1.0] > 0.1 > correlation[0.5]


def test_oracle_beats_popularity_and_popularity_beats_chance():
    domains = synthetic.generate(seed=0, **SIZES)
    candidates, train = leave_one_out(domains, 400, 200)
    chance = (1 / np.log2(np.arange(10) + 2)).sum() / 100
    oracle = ndcg(synthetic.true_scores(domains, np.arange(400), candidates))
    popularity = ndcg(train.sum(0)[candidates] + 1e-6 * np.random.default_rng(0).random((400, 100)))
    assert oracle > popularity + 0.1 > chance + 0.2


def test_source_improves_a_factorisation_only_with_transfer():
    gain = {}
    for transfer in (0.0, 1.0):
        domains = synthetic.generate(seed=0, transfer=transfer, **SIZES)
        candidates, train = leave_one_out(domains, 400, 200)
        quality = []
        for seen in (train, np.c_[train, matrix(*domains[2:4], 400, 250)]):
            weight = np.sqrt(seen.sum(0) + 1)
            u, s, v = np.linalg.svd(seen / weight, full_matrices=False)
            scores = ((u[:, :8] * s[:8]) @ v[:8] * weight)[:, :200]
            quality.append(ndcg(np.take_along_axis(scores, candidates, 1)))
        gain[transfer] = quality[1] - quality[0]
    assert gain[1.0] > 0.02 > 0 > gain[0.0]


@pytest.mark.parametrize("never", [0, 5_000], ids=["gumbel", "proposals"])
def test_picks_follow_the_true_intensity(never):
    """Two picks of 20,000 alike users; items never picked make proposals the cheaper way."""
    rng = np.random.default_rng(0)
    tickets = rng.integers(1, 50, size=12)
    truth = synthetic.Truth(
        user_factors=np.tile([0.6, 0.0, 0.8], (20_000, 1)),
        item_factors=synthetic._unit(rng.standard_normal((12 + never, 3))) / 0.7,
        log_popularity=np.r_[np.log(tickets / tickets.sum()), np.full(never, -np.inf)],
    )
    lottery = np.repeat(np.arange(12, dtype=np.int32), tickets)
    _, items = synthetic._pick(rng, np.full(20_000, 2), truth, lottery)
    share = np.exp(truth.item_factors[:12] @ truth.user_factors[0]) * tickets
    share /= share.sum()
    # Item i is picked first, or second after another item j.
    after = share[:, None] * share / (1 - share)
    expected = share + after.sum(1) - np.diag(after)
    picked = np.bincount(items, minlength=12) / 20_000
    np.testing.assert_allclose(picked, expected, atol=4.5 * np.sqrt(0.25 / 20_000))


def test_true_scores_are_the_log_intensity():
    domains = synthetic.generate(seed=0, noise=0.5, **SIZES)
    user, item, log_popularity = domains.target_truth
    expected = user[7] @ item[11] + log_popularity[11]
    np.testing.assert_allclose(np.linalg.norm(item, axis=1), 2.0)
    assert synthetic.true_scores(domains, [3, 7], [[1, 2], [11, 4]])[1, 0] == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(transfer=1.5), "transfer must be in [0, 1], got 1.5"),
        (dict(noise=0.0), "noise must be at least 0.001, got 0.0"),
        (dict(noise=float("nan")), "noise must be"),
        (dict(target_interactions=399), "from 400 (one a user) to 40000"),
        (dict(source_interactions=50_001), "source_interactions must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InputError) as error:
        synthetic.generate(seed=0, **(SIZES | change))
    assert message in str(error.value)


def test_dataset_keeps_pairs_and_ids_and_its_oracle_ranks_the_test_items():
    data, oracle = synthetic.dataset(seed=5, candidates=99, **SIZES)
    domains = synthetic.generate(seed=5, **SIZES)
    pairs = matrix(
        np.repeat(np.arange(400), np.diff(data.target.indptr)), data.target.indices, 400, 200
    )
    popularity = pairs.sum(0)
    for held_out in (data.valid, data.test):
        pairs[held_out.users, held_out.items] += 1
    np.testing.assert_array_equal(pairs, matrix(*domains[:2], 400, 200))
    np.testing.assert_array_equal(data.source.indices, domains.source_items)
    items = np.c_[data.test.items, data.test.candidates]
    scores = oracle(data.test.users, items)
    np.testing.assert_array_equal(scores, synthetic.true_scores(domains, data.test.users, items))
    assert ndcg(scores) > ndcg(popularity[items]) + 0.1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_paper_sizes_take_seconds_and_little_memory():
    """Table 1's sizes within 60 s and 700 MB in a process of its own (measured: 8 s, 230 MB)."""
    program = (  # not ru_maxrss, which the child of a large process begins with
        "import pathlib, time; from conet_jax.data.synthetic import generate\n"
        f"start = time.time(); domains = generate(seed=0, **{PAPER!r})\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "peak = status.split('VmHWM:')[1].split()[0]\n"
        "print(len(domains.target_users), len(domains.source_users), time.time() - start, peak)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    target, source, seconds, kilobytes = run.stdout.split()
    assert (int(target), int(source)) == (1_323_101, 963_373)
    assert float(seconds) < 60
    assert int(kilobytes) < 700_000
