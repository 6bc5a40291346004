"""Users whose target pairs are taken away: what a model makes of those of the source alone."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from conet_jax.data.types import Dataset, HeldOut, held_out_counts, held_out_parts, thinned
from conet_jax.errors import InputError


def make_cold(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """Takes all target training pairs from some users, and holds out items of these alone.

    ``count`` of the users with a test item are drawn, and as many others with a validation item.
    All their target pairs go from training; test and validation rank the items and the candidates
    that each had there. Epochs and trials are then chosen on cold users as well. What is
    held out of all other users stays out of training, and is not ranked.

    Args:
      dataset: the data.
      count: users to test on.
      seed: of the draw.

    Returns:
      Data with a hash and counts of its own.

    Raises:
      InputError: there are not so many users, or nobody would be left to train on.
    """
    rng = np.random.default_rng(seed)
    with_test, with_valid = np.unique(dataset.test.users), np.unique(dataset.valid.users)
    tested = rng.permutation(with_test)[:count]
    valid = rng.permutation(np.setdiff1d(with_valid, tested))[:count]
    cold = np.concatenate([tested, valid])
    degrees = np.diff(dataset.target.indptr).astype(np.int64)
    keep = ~np.isin(np.arange(dataset.num_users), cold)
    if min(len(tested), len(valid)) < count or not (degrees * keep).any():
        raise InputError(
            f"config.data.cold is {count:,}, but the data have {len(with_test):,} test and "
            f"{len(with_valid):,} validation users: expected so few that as many of either can be "
            "taken, and others are left"
        )
    digest = hash_after(dataset.meta["hash"], {"cold": count, "cold_seed": seed})
    left = thinned(dataset, np.repeat(keep, degrees), digest)
    left = left._replace(valid=_of(dataset.valid, valid), test=_of(dataset.test, tested))
    before = {f"{part}_{what}" for part in ("valid", "test") for what in ("users", "pairs")}
    counts = {name: number for name, number in left.meta["counts"].items() if name not in before}
    counts |= held_out_counts(held_out_parts(left))
    return left._replace(meta=left.meta | {"counts": counts})


def _of(held_out: HeldOut, users: np.ndarray) -> HeldOut:
    return HeldOut(*(values[np.isin(held_out.users, users)] for values in held_out))


def hash_after(digest: str, data: Mapping[str, Any]) -> str:
    """Returns the hash of data as fields of ``config.data`` leave it, from the hash of it all."""
    if cold := data.get("cold", 0):
        digest = _hash(f"{digest} cold {cold} {data.get('cold_seed', 0)}")
    if drop := data.get("drop", 0):
        digest = _hash(f"{digest} drop {drop}")
    return digest


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
