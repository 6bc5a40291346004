"""Out-of-fold factors: what they are fitted without, and what an example may read."""

import jax
import numpy as np
import pytest

from conet_jax.models import ials, out_of_fold
from conet_jax.models.base import Sizes
from conet_jax.train import sampling
from conet_jax.train.interactions import to_device

FOLDS, DIM = 3, 4
SIZES = Sizes(40, 60, 50)
OPTIONS = ials.Options((2 * DIM,), True, 1.0, 10.0, 0.5)
VIEWS = (("target",), ("source",), ("target", "source"))


def random_pairs(users, items, each, seed):
    """Each user with items drawn uniformly: nothing to be learnt."""
    rng = np.random.default_rng(seed)
    lists = [np.sort(rng.choice(items, each, replace=False)) for _ in range(users)]
    indptr = np.arange(users + 1) * each
    return to_device(indptr, np.concatenate(lists), items)


@pytest.fixture(scope="module")
def interactions():
    return {"target": random_pairs(40, 60, 5, 0), "source": random_pairs(40, 50, 4, 1)}


@pytest.fixture(scope="module")
def tables(interactions):
    options = {"folds": FOLDS, "sweeps": 3, "fold_sweeps": 2, "views": VIEWS, "seed": 1}
    return out_of_fold.fit(interactions, SIZES, OPTIONS, **options)


def without(interactions, fold):
    """Pairs by domain that are not in a fold."""
    kept = {}
    for domain, own in interactions.items():
        keep = np.arange(len(own.items)) % FOLDS != fold
        kept[domain] = ials.Pairs(np.asarray(own.users)[keep], np.asarray(own.items)[keep])
    return kept


@pytest.mark.parametrize("fold", [0, 2, FOLDS])
def test_rows_of_a_fold_are_the_factors_and_counts_without_it(interactions, tables, fold):
    kept = without(interactions, fold)
    factors = ials.fit(interactions, SIZES, OPTIONS, sweeps=3, seed=1)
    if fold < FOLDS:
        factors = ials.fit(kept, SIZES, OPTIONS, sweeps=2, start=factors)
    for domain in ("target", "source"):
        table = np.asarray(tables[f"{domain}_item"]).reshape(-1, FOLDS + 1, DIM + 1)
        np.testing.assert_allclose(table[:, fold, :DIM], factors[f"{domain}_item"], rtol=1e-6)
        counts = np.log1p(np.bincount(kept[domain].items, minlength=len(table)))
        everything = np.log1p(np.bincount(interactions[domain].items, minlength=len(table)))
        np.testing.assert_allclose(table[:, fold, DIM], counts - everything.mean(), rtol=1e-5)
    # A view is the minimiser of the user's squared errors over the items of its domains.
    users = np.asarray(tables["user"]).reshape(-1, FOLDS + 1, len(VIEWS), DIM + 1)[:, fold]
    for i, view in enumerate(VIEWS):
        for user in range(SIZES.users):
            normal, right = np.eye(DIM), np.zeros(DIM)
            for domain in view:
                weight = {"target": 1.0, "source": 0.5}[domain]
                y = np.asarray(factors[f"{domain}_item"], np.float64)
                own = kept[domain].items[kept[domain].users == user]
                normal = normal + weight * (y.T @ y + 10 * y[own].T @ y[own])
                right = right + 11 * weight * y[own].sum(0)
            best = np.linalg.solve(normal, right)
            np.testing.assert_allclose(users[user, i, :DIM], best, rtol=1e-3, atol=1e-4)
        degrees = [
            sum(np.bincount(pairs[domain].users, minlength=SIZES.users) for domain in view)
            for pairs in (kept, interactions)
        ]
        counts = np.log1p(degrees[0]) - np.log1p(degrees[1]).mean()
        np.testing.assert_allclose(users[:, i, DIM], counts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairing", ["views", None])
def test_examples_know_the_fold_of_their_pair(interactions, pairing):
    domains = ("target", "source") if pairing else ("target",)
    plan = sampling.plan_epoch(
        interactions, domains=domains, pairing=pairing, negatives=2, batch_size=64, folds=FOLDS
    )
    batch = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan)
    for domain in domains:
        own, examples = interactions[domain], getattr(batch, domain)
        place = {
            pair: row
            for row, pair in enumerate(zip(own.users.tolist(), own.items.tolist(), strict=True))
        }
        folds = np.asarray(examples.folds)
        assert set(folds) == set(range(FOLDS))
        seen = zip(examples.users.tolist(), examples.items.tolist(), strict=True)
        for pair, label, fold in zip(seen, examples.labels, folds, strict=True):
            assert (pair in place) == bool(label)
            if label:
                assert fold == place[pair] % FOLDS


def auc(scores, labels):
    above = scores[labels > 0][:, None] - scores[labels == 0][None, :]
    return (above > 0).mean() + (above == 0).mean() / 2


@pytest.mark.parametrize(("folds", "low", "high"), [(FOLDS, 0.3, 0.6), (0, 0.9, 1.0)])
def test_factors_say_nothing_of_a_pair_that_they_were_fitted_without(
    interactions, folds, low, high
):
    fitted = out_of_fold.fit(
        interactions, SIZES, OPTIONS, folds=folds, sweeps=8, fold_sweeps=8, views=VIEWS[2:]
    )
    plan = sampling.plan_epoch(
        interactions, domains=("target",), pairing=None, batch_size=200, folds=folds
    )
    target = sampling.sample_step(jax.random.key(0), 0, 0, interactions, plan).target
    rows = {
        name: fitted[name][out_of_fold.row_ids(ids, target.folds, folds)]
        for name, ids in (("user", target.users), ("target_item", target.items))
    }
    dots = out_of_fold.features(rows["user"], rows["target_item"], 1.0)[:, 0]
    # Without the pair an item has one user less and scores a little lower, never higher.
    assert low <= auc(np.asarray(dots), np.asarray(target.labels)) <= high
