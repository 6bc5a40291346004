"""Epochs: permutations, negatives, pairings, and labels that tell nothing of a partner's label.

Draws are compared with their stated distribution by chi-square, as a deviate of the standard
normal; keys are fixed, so that a test that passes once passes always.
"""

from collections import Counter, defaultdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conet_jax import config as config_lib
from conet_jax.data.assemble import from_arrays
from conet_jax.run.epoch import run_epoch
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.train import ranking, sampling
from conet_jax.train.interactions import _by_device, to_device
from conet_jax.train.state import settled


def chi_square_deviate(observed, expected, lost=1):
    """Standard normal deviate of Pearson's statistic (Wilson and Hilferty)."""
    observed, expected = np.ravel(observed), np.ravel(np.broadcast_to(expected, np.shape(observed)))
    assert expected.min() >= 5
    df = observed.size - lost
    statistic = ((observed - expected) ** 2 / expected).sum()
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df))


def independence_deviate(table):
    """The same of a contingency table against the product of its margins."""
    table = np.asarray(table, float)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    return chi_square_deviate(table, expected, lost=sum(table.shape) - 1)


@partial(jax.jit, static_argnames=("size", "count"))
def permutations(keys, *, size, count):
    """The first ``count`` entries of a permutation a key."""
    return jax.vmap(lambda key: sampling.permute(key, jnp.arange(count), size))(keys)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 10, 31, 100, 1000, 10_007])
def test_permute_is_a_bijection_and_another_key_is_another_one(size):
    entries = np.asarray(
        permutations(jax.random.split(jax.random.key(size), 12), size=size, count=size)
    )
    for row in entries:
        np.testing.assert_array_equal(np.sort(row), np.arange(size))
    if size >= 10:
        assert len(np.unique(entries, axis=0)) == 12
        # Two permutations agree in one place on average.
        assert (entries[0] == entries[1:]).sum(1).max() <= 8
    if size == 100:
        key = jax.random.split(jax.random.key(size), 12)[3]
        one = [int(sampling.permute(key, jnp.int32(i), size)) for i in (0, 41, 99)]
        assert one == entries[3, [0, 41, 99]].tolist()  # a position on its own, without jit


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_of_a_few_are_equally_likely(size):
    entries = np.asarray(
        permutations(jax.random.split(jax.random.key(1), 12_000), size=size, count=size)
    )
    _, counts = np.unique(entries, axis=0, return_counts=True)
    assert len(counts) == np.prod(np.arange(1, size + 1))
    assert abs(chi_square_deviate(counts, counts.mean())) < 4


@pytest.mark.parametrize("size", [7, 50, 1000])
def test_an_element_is_uniform_over_the_places(size):
    keys = jax.random.split(jax.random.key(2), 12_000)
    entries = np.asarray(permutations(keys, size=size, count=3))
    for column in entries.T:
        counts = np.bincount(column, minlength=size)
        assert abs(chi_square_deviate(counts, len(keys) / size)) < 4


@pytest.mark.parametrize("size", [50, 1000])
def test_neighbours_in_a_permutation_are_independent(size):
    """Over keys: the joint distribution of two adjacent entries, in tenths of the range."""
    keys = jax.random.split(jax.random.key(3), 12_000)
    entries = np.asarray(permutations(keys, size=size, count=3))
    expected = np.full((10, 10), (size / 10) ** 2.0)
    expected -= np.eye(10) * size / 10  # never the same element twice
    expected *= len(keys) / expected.sum()
    for first, second in ((0, 1), (1, 2)):
        table = np.zeros((10, 10))
        np.add.at(table, (entries[:, first] * 10 // size, entries[:, second] * 10 // size), 1)
        assert abs(chi_square_deviate(table, expected)) < 4


def test_neighbours_are_uncorrelated_within_one_permutation():
    entries = np.asarray(
        permutations(jax.random.split(jax.random.key(4), 5), size=10_007, count=10_007)
    )
    for row in entries:
        for lag in (1, 2, 100, 101):  # 101 columns of the grid
            assert abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) < 4 / np.sqrt(10_007)
        # Positives and negatives alternate in the list that is permuted.
        parity = row % 2
        table = np.zeros((2, 2))
        np.add.at(table, (parity[:-1], parity[1:]), 1)
        assert abs(independence_deviate(table)) < 4


# Users with none, one, some, and all but one of 8 items.
ITEMS = [[], [0], [7], [2, 3, 6], [0, 1, 2, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]]
NUM_ITEMS = 8


def interactions_of(lists, num_items):
    indptr = np.cumsum([0] + [len(items) for items in lists])
    return to_device(indptr, np.concatenate(lists).astype(int), num_items)


def test_negatives_are_uniform_over_the_items_that_are_not_positives():
    domain = interactions_of(ITEMS, NUM_ITEMS)
    users = np.repeat(np.arange(len(ITEMS)), 8_000)
    drawn = np.asarray(jax.jit(sampling.negatives)(jax.random.key(0), domain, users))
    for user, own in enumerate(ITEMS):
        counts = np.bincount(drawn[users == user], minlength=NUM_ITEMS)
        others = np.setdiff1d(np.arange(NUM_ITEMS), own)
        assert counts[own].sum() == 0 if own else True
        assert counts[others].sum() == 8_000
        if len(others) > 1:
            assert abs(chi_square_deviate(counts[others], 8_000 / len(others))) < 4


def test_negatives_of_a_long_list_are_never_positives():
    rng = np.random.default_rng(0)
    lists = [np.sort(rng.choice(300, n, replace=False)) for n in (299, 298, 150, 1, 256, 255)]
    domain = interactions_of(lists, 300)
    users = np.repeat(np.arange(len(lists)), 5_000)
    drawn = np.asarray(jax.jit(sampling.negatives)(jax.random.key(1), domain, users))
    for user, own in enumerate(lists):
        others = np.setdiff1d(np.arange(300), own)
        assert set(drawn[users == user]) == set(others)


def test_partners_are_uniform_over_the_positives_and_over_the_others():
    domain = interactions_of(ITEMS, NUM_ITEMS)
    users = np.repeat(np.arange(len(ITEMS)), 16_000)
    draw = jax.jit(sampling._partners, static_argnums=4)
    ones = np.ones(len(users))
    partners = jax.tree.map(np.asarray, draw(jax.random.key(0), domain, users, ones, 1))
    for user, own in enumerate(ITEMS):
        for label, items in ((1, own), (0, np.setdiff1d(np.arange(NUM_ITEMS), own))):
            chosen = (partners.users == user) & (partners.labels == label)
            counts = np.bincount(partners.items[chosen], minlength=NUM_ITEMS)
            assert counts[np.asarray(items, int)].sum() == counts.sum() == chosen.sum()
            assert (counts.sum() > 7_000) == (len(items) > 0)
            if len(items) > 1:
                assert abs(chi_square_deviate(counts[items], counts.sum() / len(items))) < 4


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 9])
def test_each_device_has_its_users_with_all_that_is_theirs(devices):
    indptr = np.array([0, 2, 2, 5, 6, 6, 10, 11])
    items = np.array([1, 4, 0, 2, 3, 7, 1, 2, 5, 6, 3])
    users, skipped = np.repeat(np.arange(7), np.diff(indptr)), 100 + np.arange(11)
    parts = _by_device(users, items, indptr, skipped, devices)
    assert all(part.dtype == np.int32 for part in parts)
    rows = -(-7 // devices)
    longest = max(int(np.diff(indptr)[device::devices].sum()) for device in range(devices))
    lengths = longest, longest, rows + 1, longest
    assert [part.shape for part in parts] == [(devices * length,) for length in lengths]
    for device, (own, theirs, starts, theirs_skipped) in enumerate(
        zip(*(part.reshape(devices, -1) for part in parts), strict=True)
    ):
        assert starts[0] == 0
        for row in range(rows):
            there, user = slice(starts[row], starts[row + 1]), device + row * devices
            here = slice(indptr[user], indptr[user + 1]) if user < 7 else slice(0)
            assert own[there].tolist() == [row] * len(items[here])
            assert theirs[there].tolist() == items[here].tolist()
            assert theirs_skipped[there].tolist() == skipped[here].tolist()
        # What is beyond is of a row that no user has.
        assert (own[starts[-1] :] == rows).all()
        assert not theirs[starts[-1] :].any() and not theirs_skipped[starts[-1] :].any()


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1, 4], [1, 0, 1, 2], "user 1 has all 3 items"),
        ([0, 2], [1, 1], "strictly increasing"),
        ([0, 2], [1, 0], "strictly increasing"),
        ([0, 1], [3], "must lie in"),
        ([0, 1], [-1], "must lie in"),
    ],
)
def test_bad_interactions_are_refused(indptr, indices, message):
    with pytest.raises(ValueError, match=message):
        to_device(np.array(indptr), np.array(indices), 3)


# A small pair of domains: 12 users, 37 and 11 positives.


def two_domains(swap=False):
    rng = np.random.default_rng(0)
    long = [rng.choice(20, n, replace=False) for n in [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 1]]
    short = [rng.choice(15, n, replace=False) for n in [1, 0, 2, 0, 1, 3, 0, 1, 0, 2, 0, 1]]
    domains = [interactions_of([np.sort(x) for x in d], n) for d, n in ((long, 20), (short, 15))]
    return dict(zip(("target", "source"), domains[::-1] if swap else domains, strict=True))


def plan_of(interactions, pairing, *, negatives=2, batch_size=4, **kwargs):
    domains = ("target",) if pairing in sampling.ONE_DOMAIN else ("target", "source")
    return sampling.plan_epoch(
        interactions,
        domains=domains,
        pairing=pairing,
        negatives=negatives,
        batch_size=batch_size,
        **kwargs,
    )


@partial(jax.jit, static_argnames="plan")
def steps_of(key, epochs, interactions, plan):
    """All steps of some epochs: leading axes [epochs, steps]."""
    steps = jnp.arange(plan.steps)
    one = lambda e, s: sampling.sample_step(key, e, s, interactions, plan)  # noqa: E731
    return jax.vmap(lambda e: jax.vmap(lambda s: one(e, s))(steps))(epochs)


def epoch_of(interactions, plan, epoch=0, seed=0):
    batches = steps_of(jax.random.key(seed), jnp.array([epoch]), interactions, plan)
    key = jax.random.key_data(batches.key)
    return jax.tree.map(lambda x: np.asarray(x)[0], batches._replace(key=key))


def flat(examples):
    """(user, item, label) of the examples that count, in order."""
    keep = examples.weights.ravel() > 0
    assert set(examples.weights.ravel()) <= {0.0, 1.0}
    return np.stack([x.ravel()[keep].astype(int) for x in examples[:3]], axis=1)


def pairs_of(domain):
    return list(zip(np.asarray(domain.users), np.asarray(domain.items), strict=True))


def check_one_pass(rows, domain, negatives):
    """Every positive once, and so many negatives of its user."""
    positive = rows[rows[:, 2] == 1]
    assert sorted(map(tuple, positive[:, :2])) == sorted(pairs_of(domain))
    negative = rows[rows[:, 2] == 0]
    assert len(rows) == len(positive) * (1 + negatives)
    assert Counter(negative[:, 0]) == {u: negatives * n for u, n in Counter(positive[:, 0]).items()}
    assert not {tuple(row) for row in negative[:, :2]} & set(pairs_of(domain))


@pytest.mark.parametrize("pairing", [None, "context", "same_user", "random", "views"])
def test_each_positive_occurs_once_an_epoch_with_its_negatives(pairing):
    interactions = two_domains()
    plan = plan_of(interactions, pairing)
    assert plan.steps == -(-37 * 3 // 12)
    batches = epoch_of(interactions, plan)
    assert (batches.cross == (pairing not in sampling.ONE_DOMAIN)).all()
    rows = flat(batches.target)
    check_one_pass(rows, interactions["target"], 2)
    assert rows[:, 2].tolist() != sorted(rows[:, 2])  # shuffled
    assert batches.target.weights.ravel()[: len(rows)].all()  # padding stands at the end
    other = flat(epoch_of(interactions, plan, epoch=1).target)
    check_one_pass(other, interactions["target"], 2)
    assert (rows != other).any(axis=1).mean() > 0.5
    assert (rows[:, 1] != other[:, 1]).any()


def test_an_epoch_of_the_same_users_is_as_long_as_the_target_however_long_the_source():
    interactions = two_domains(swap=True)
    plan = plan_of(interactions, "same_user")
    assert plan.steps == -(-11 * 3 // 12) < plan_of(interactions, "random").steps
    check_one_pass(flat(epoch_of(interactions, plan).target), interactions["target"], 2)


@pytest.mark.parametrize("pairing", [None, "views"])
def test_an_example_and_its_negatives_are_in_the_fold_of_the_positive(pairing):
    interactions = two_domains()
    batches = epoch_of(interactions, plan_of(interactions, pairing, folds=3))
    for domain in ("target", "source") if pairing else ("target",):
        examples = getattr(batches, domain)
        number = {pair: at for at, pair in enumerate(pairs_of(interactions[domain]))}
        folds = examples.folds.ravel()[examples.weights.ravel() > 0]
        rows = [(*row, fold) for row, fold in zip(flat(examples).tolist(), folds, strict=True)]
        assert all(fold == number[user, item] % 3 for user, item, label, fold in rows if label)
        if domain == "source":  # the shorter, whose last repetition is cut off
            continue
        of_positives = Counter((user, fold) for user, _, label, fold in rows if label)
        of_negatives = Counter((user, fold) for user, _, label, fold in rows if not label)
        assert of_negatives == {key: 2 * count for key, count in of_positives.items()}


def test_an_epoch_beyond_int32_is_refused():
    with pytest.raises(ValueError, match="111,000,000,037 examples is .*: negatives is 3000000000"):
        plan_of(two_domains(), None, negatives=3_000_000_000)


@pytest.mark.parametrize(
    ("pairing", "swap", "batch_size"),
    [("random", False, 4), ("random", False, 20), ("views", True, 4), ("random", True, 20)],
)
def test_the_shorter_domain_is_repeated_in_new_permutations(pairing, swap, batch_size):
    interactions = two_domains(swap)
    plan = plan_of(interactions, pairing, batch_size=batch_size)
    batches = epoch_of(interactions, plan)
    long, short = ("source", "target") if swap else ("target", "source")
    rows = {domain: flat(getattr(batches, domain)) for domain in (long, short)}
    assert len(rows[long]) == len(rows[short]) == 37 * 3
    check_one_pass(rows[long], interactions[long], 2)
    passes = [rows[short][i : i + 33] for i in range(0, 99, 33)]
    for one in passes:
        check_one_pass(one, interactions[short], 2)
    orders = [[tuple(row) for row in one if row[2]] for one in passes]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    rest = [tuple(row[:2]) for row in rows[short][99:] if row[2]]
    assert len(set(rest)) == len(rest)  # the begin of a fourth


@pytest.mark.parametrize(
    ("pairing", "swap"), [("random", False), ("random", True), ("views", False)]
)
def test_surplus_alone_comes_first_and_does_not_cross(pairing, swap):
    interactions = two_domains(swap)
    plan = plan_of(interactions, pairing, surplus="alone")
    batches = epoch_of(interactions, plan)
    long, short = ("source", "target") if swap else ("target", "source")
    assert plan.steps == 10  # 111 and 33 examples in batches of 12
    np.testing.assert_array_equal(batches.cross, [0] * 7 + [1] * 3)
    np.testing.assert_array_equal(getattr(batches, short).weights.sum(1), [0] * 7 + [12, 12, 9])
    np.testing.assert_array_equal(getattr(batches, long).weights.sum(1), [12] * 9 + [3])
    for domain in (long, short):
        check_one_pass(flat(getattr(batches, domain)), interactions[domain], 2)


def test_equal_domains_have_no_surplus():
    interactions = two_domains()
    interactions["source"] = interactions["target"]
    plan = plan_of(interactions, "random", surplus="alone")
    batches = epoch_of(interactions, plan)
    assert batches.cross.all()
    for domain in ("target", "source"):
        check_one_pass(flat(getattr(batches, domain)), interactions[domain], 2)


@pytest.mark.parametrize("pairing", [*sampling.ONE_DOMAIN, *sampling.PAIRINGS])
def test_a_step_depends_on_key_epoch_and_step_alone(pairing):
    interactions = two_domains()
    plan = plan_of(interactions, pairing)
    whole = epoch_of(interactions, plan, epoch=3)
    sample = jax.jit(lambda *a: sampling.sample_step(*a, interactions, plan))
    for step in (0, 7, 9):
        batch = sample(jax.random.key(0), 3, step)
        batch = batch._replace(key=jax.random.key_data(batch.key))
        jax.tree.map(lambda a, b, s=step: np.testing.assert_array_equal(a, b[s]), batch, whole)
    other = epoch_of(interactions, plan, epoch=3, seed=1)
    assert (other.target.users != whole.target.users).mean() > 0.5
    keys = np.concatenate([whole.key, epoch_of(interactions, plan, epoch=4).key])
    assert len(np.unique(keys, axis=0)) == len(keys)  # dropout is new in every step


@pytest.mark.parametrize("negatives", [1, 3])
def test_partners_are_of_the_same_user_and_positive_as_often_as_examples(negatives):
    interactions = two_domains()
    plan = plan_of(interactions, "same_user", negatives=negatives)
    batches = steps_of(jax.random.key(0), jnp.arange(80), interactions, plan)
    target, source = batches.target, batches.source
    np.testing.assert_array_equal(source.users, target.users)
    np.testing.assert_array_equal(source.weights, target.weights)
    positives = set(pairs_of(interactions["source"]))
    rows = flat(jax.tree.map(np.asarray, source))
    held = defaultdict(int)
    for user, item, label in rows:
        assert ((user, item) in positives) == label
        held[user] += label
    without = {u for u in range(12) if u not in {u for u, _ in positives}}
    assert without and not any(held[u] for u in without)
    of_others = rows[~np.isin(rows[:, 0], list(without))]
    share = 1 / (1 + negatives)
    error = np.sqrt(share * (1 - share) / len(of_others))
    assert abs(of_others[:, 2].mean() - share) < 4 * error


def many_users(seed, users=60, items=40):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, users)
    return interactions_of([np.sort(rng.choice(items, n, replace=False)) for n in sizes], items)


@pytest.mark.parametrize(
    ("pairing", "surplus", "negatives"),
    [
        ("random", "repeat", 1),
        ("same_user", "repeat", 1),
        ("same_user", "repeat", 3),
        ("random", "alone", 3),
    ],
)
def test_label_of_a_partner_is_independent_of_the_label_of_the_example(pairing, surplus, negatives):
    interactions = {"target": many_users(0), "source": many_users(1)}
    plan = plan_of(interactions, pairing, negatives=negatives, surplus=surplus)
    batches = steps_of(jax.random.key(5), jnp.arange(40), interactions, plan)
    target, source = (np.asarray(x).ravel() for x in (batches.target.labels, batches.source.labels))
    both = (np.asarray(batches.target.weights * batches.source.weights) > 0).ravel()
    assert both.sum() > 10_000
    table = np.zeros((2, 2))
    np.add.at(table, (target[both].astype(int), source[both].astype(int)), 1)
    assert abs(independence_deviate(table)) < 4
    np.testing.assert_allclose(table[1].sum() / table.sum(), 1 / (1 + negatives), atol=0.02)
    np.testing.assert_allclose(table[:, 1].sum() / table.sum(), 1 / (1 + negatives), atol=0.02)


@pytest.mark.parametrize("swap", [False, True])
def test_histories_are_the_training_items_in_the_source(swap):
    interactions = two_domains(swap)
    plan = plan_of(interactions, "context", history_length=3)
    batches = steps_of(jax.random.key(0), jnp.arange(200), interactions, plan)
    users = np.asarray(batches.target.users).reshape(-1)
    mask = np.asarray(batches.source_history.mask).reshape(len(users), -1)
    items = np.asarray(batches.source_history.items).reshape(len(users), -1)
    assert mask.shape[1] == 3 and items.min() >= 0
    assert items.max() < interactions["source"].num_items
    seen, own = Counter(), defaultdict(set)
    for u, i in pairs_of(interactions["source"]):
        own[u].add(i)
    for user, row, keep in zip(users, items, mask > 0, strict=True):
        listed = row[keep].tolist()
        assert len(set(listed)) == len(listed) == min(3, len(own[user]))
        assert set(listed) <= own[user]
        seen.update((user, i) for i in listed)
        if not own[user]:
            seen["empty"] += 1
    assert (seen["empty"] > 0) == (not swap)
    if not swap:
        return
    # Of a long history every item is as likely as another.
    user = 5
    count = (users == user).sum()
    assert count > 500
    counts = [seen[user, i] for i in own[user]]
    assert len(counts) == 6 and sum(counts) == 3 * count
    for found in counts:
        assert abs(found / count - 0.5) < 4 * np.sqrt(0.25 / count)


@pytest.mark.parametrize("negatives", [1, 3])
def test_under_pairs_each_positive_meets_so_many_negatives_of_its_user(negatives):
    interactions = two_domains()
    plan = plan_of(interactions, "pairs", negatives=negatives)
    assert plan.batch_examples == 4 * negatives
    assert plan.lengths == (37 * negatives,) and plan.steps == 10  # 37 positives, four a step
    orders = []
    for epoch in (0, 1):
        batches = epoch_of(interactions, plan, epoch=epoch)
        assert batches.source is None and batches.source_history is None
        assert not batches.cross.any()
        target = batches.target
        rows = flat(target)
        assert (target.labels == 1).all() and target.weights.ravel()[: len(rows)].all()
        counts = Counter(map(tuple, rows[:, :2]))
        assert counts == {pair: negatives for pair in pairs_of(interactions["target"])}
        drawn = np.stack([target.users, target.negatives], axis=-1).reshape(-1, 2)
        assert not set(map(tuple, drawn)) & set(pairs_of(interactions["target"]))
        assert drawn[:, 1].min() >= 0 and drawn[:, 1].max() < 20
        orders.append(rows[:, :2])
    assert (orders[0] != orders[1]).any(axis=1).mean() > 0.5  # shuffled anew
    assert orders[0][:, 0].tolist() != sorted(orders[0][:, 0])


def test_under_pairs_negatives_are_uniform_and_independent_of_the_positive():
    interactions = {"target": interactions_of(ITEMS, NUM_ITEMS)}
    plan = plan_of(interactions, "pairs")
    epochs = 600
    batches = steps_of(jax.random.key(0), jnp.arange(epochs), interactions, plan)
    target = jax.tree.map(lambda x: np.asarray(x).ravel(), batches.target)
    for user, own in enumerate(ITEMS):
        of_user = (target.users == user) & (target.weights > 0)
        table = np.zeros((NUM_ITEMS, NUM_ITEMS))
        np.add.at(table, (target.items[of_user], target.negatives[of_user]), 1)
        others = np.setdiff1d(np.arange(NUM_ITEMS), own)
        assert (table.sum(1)[own] == 2 * epochs).all() if own else table.sum() == 0
        cells = table[np.ix_(own, others)] if own else np.zeros(0)
        assert cells.sum() == table.sum() == 2 * epochs * len(own)
        if own and len(others) > 1:
            # The margin of the positives is fixed.
            deviate = chi_square_deviate(cells, 2 * epochs / len(others), lost=len(own))
            assert abs(deviate) < 4


def test_context_is_the_history_of_the_targets_users_in_the_source():
    interactions = two_domains()
    own = defaultdict(set)
    for user, item in pairs_of(interactions["source"]):
        own[user].add(item)
    for length in (2, 32):  # the longest history has 3
        plan = plan_of(interactions, "context", history_length=length)
        batches = epoch_of(interactions, plan)
        assert batches.source is None
        history, users = batches.source_history, batches.target.users
        assert history.items.shape == (*users.shape, min(length, 3)) == history.mask.shape
        seen = defaultdict(set)
        for user, items, mask in zip(
            users.ravel(),
            history.items.reshape(users.size, -1),
            history.mask.reshape(users.size, -1),
            strict=True,
        ):
            listed = items[mask > 0].tolist()
            assert len(set(listed)) == len(listed) == min(length, len(own[user]))
            assert set(listed) <= own[user]
            seen[user].update(listed)
        assert seen == own and min(map(len, seen.values())) == 0
    plain = plan_of(interactions, None)
    one, other = epoch_of(interactions, plain).target, batches.target
    jax.tree.map(np.testing.assert_array_equal, one, other)  # with the examples of one domain


# The leak: the target's items are drawn at random, and the source is easy to learn (half of its
# items are nobody's). If the label of a partner told the label of the example, the source tower
# would tell the target's labels.

USERS, TARGET_ITEMS, SOURCE_ITEMS = 120, 110, 40
MARGIN = 0.08  # nats; seeds differ by 0.05, aligned labels gain 0.2
AUC_ERROR = 0.29 / np.sqrt(2 * USERS)  # of a mean of 2 * USERS uniform ranks


def unrelated_domains():
    rng = np.random.default_rng(0)
    target = [rng.choice(TARGET_ITEMS, 7, replace=False) for _ in range(USERS)]
    source = [rng.choice(20, 8, replace=False) for _ in range(USERS)]
    users = np.arange(USERS)
    return from_arrays(
        users.repeat(7),
        np.concatenate(target),
        users.repeat(8),
        np.concatenate(source),
        num_users=USERS,
        num_target_items=TARGET_ITEMS,
        num_source_items=SOURCE_ITEMS,
    )


def train_unrelated(pairing, cross_layers):
    """(training losses of the last epoch, held-out AUC over both splits)."""
    config = config_lib.default_config("conet")
    config.update(
        dict(pairing=pairing, cross_layers=cross_layers, layers=(16, 8)),
        batch_size=20,
        learning_rate=0.01,
        target_weight=0.5,
    )
    experiment = make_experiment(config, unrelated_domains())
    # A model of its own, so that no program compiled before is taken for this one.
    experiment = experiment._replace(
        model=experiment.model._replace(init=partial(experiment.model.init))
    )
    state = jax.jit(lambda: initial_state(experiment))()
    for epoch in range(1, 8):
        state, row = run_epoch(experiment, state, epoch)
    params = settled(state, experiment.hyper.learning_rate)
    aucs = [
        ranking.summarize(
            ranking.rank_held_out(experiment.model, params, experiment.interactions, held_out),
            k=10,
        )["auc"]
        for held_out in (experiment.dataset.valid, experiment.dataset.test)
    ]
    return row["train_loss"], np.mean(aucs)


def align_labels(monkeypatch, pairing):
    """Breaks sampling on purpose: positives meet positives, negatives negatives."""
    sample_step = sampling.sample_step

    def aligned(key, epoch, step, interactions, plan):
        batch = sample_step(key, epoch, step, interactions, plan)
        users, labels = batch.source.users, batch.target.labels
        source = interactions["source"]
        first, second = jax.random.split(jax.random.fold_in(key, step))
        start, stop = source.indptr[users], source.indptr[users + 1]
        positive = source.items[jax.random.randint(first, users.shape, start, stop)]
        items = jnp.where(labels > 0, positive, sampling.negatives(second, source, users))
        return batch._replace(source=batch.source._replace(items=items, labels=labels))

    monkeypatch.setattr(sampling, "sample_step", aligned)


@pytest.fixture(scope="module")
def loss_without_crossing():
    return train_unrelated("random", 0)[0]["target"]


@pytest.mark.parametrize("pairing", ["random", "same_user"])
def test_crossing_with_an_unrelated_domain_tells_nothing_of_labels(pairing, loss_without_crossing):
    train_loss, auc = train_unrelated(pairing, 1)
    assert train_loss["source"] < 0.55  # there is something that could leak
    assert train_loss["target"] > loss_without_crossing - MARGIN
    assert abs(auc - 0.5) < 4 * AUC_ERROR


# Under "views" the partner of a pair is the pair itself, seen by factors that do not know its label
# (tests/test_out_of_fold.py).
@pytest.mark.parametrize(
    "pairing",
    [
        p if p == "same_user" else pytest.param(p, marks=pytest.mark.slow)
        for p in sampling.PAIRINGS
        if p != "views"
    ],
)
def test_the_leak_test_finds_aligned_labels(monkeypatch, pairing, loss_without_crossing):
    align_labels(monkeypatch, pairing)
    train_loss, auc = train_unrelated(pairing, 1)
    assert train_loss["target"] < loss_without_crossing - 1.5 * MARGIN
    assert abs(auc - 0.5) < 4 * AUC_ERROR  # and it is of no use
