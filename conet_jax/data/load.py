"""The data set of a config: loaded or made, thinned, checked."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from conet_jax.data.cold_users import hash_after, make_cold
from conet_jax.data.types import HELD_OUT, Dataset, held_out_parts, thinned, trained_items, warm
from conet_jax.errors import InputError


def load_dataset(config: ConfigDict) -> Dataset:
    """Loads the prepared data of a config, or makes its synthetic data.

    Less what ``config.data.cold`` and ``config.data.drop`` take away.

    Raises:
      InputError: there is no prepared data; the message is the command that makes it. Or it has too
        few users for ``config.data.cold``.
    """
    dataset, data = _whole_dataset(config), config.data
    if data.get("cold", 0):
        dataset = make_cold(dataset, data.cold, data.get("cold_seed", 0))
    return drop_interactions(dataset, data.drop) if data.get("drop", 0) else dataset


def drop_interactions(dataset: Dataset, count: int) -> Dataset:
    """Removes training interactions of the target at random, ``count`` from each user.

    At least one is left to a user who has any; what is held out stays as it is. Those that go with
    a smaller count go with a larger one, too.

    Args:
      dataset: the data.
      count: interactions to remove from each user.

    Returns:
      Data with a hash and counts of its own.
    """
    target = dataset.target
    degrees = np.diff(target.indptr)
    users = np.repeat(np.arange(dataset.num_users), degrees)
    shuffled = np.lexsort((np.random.default_rng(0).random(len(users)), users))
    gone = np.minimum(count, np.maximum(degrees - 1, 0))
    keep = np.ones(len(users), bool)
    keep[shuffled[np.arange(len(users)) - target.indptr[users] < gone[users]]] = False
    return thinned(dataset, keep, hash_after(dataset.meta["hash"], {"drop": count}))


def _whole_dataset(config: ConfigDict) -> Dataset:
    if "synthetic" in config.data:
        from conet_jax.data import synthetic

        given = config.data.synthetic.to_dict()
        known = dict(inspect.signature(synthetic.generate).parameters)
        known |= {"candidates": inspect.signature(synthetic.dataset).parameters["candidates"]}
        for name in [*given, *known]:
            kind = known[name].annotation if name in known else None
            if name in given or known[name].default is inspect.Parameter.empty:
                if type(given.get(name)) not in ((int, float) if kind is float else (kind,)):
                    raise InputError(
                        f"config.data.synthetic.{name} is {given.get(name)!r}: expected "
                        + (f"a number, {kind.__name__}" if kind else f"one of {', '.join(known)}")
                    )
        return synthetic.dataset(**given)[0]
    from conet_jax.data import store

    directory = Path(config.data.dir)
    if not (directory / "dataset.json").exists():
        raise InputError(
            f"no prepared data in {directory}; make it with: "
            f"{config.data.get('prepare') or PREPARE} --out={directory}"
            " (or name another folder by --config.data.dir=DIR)"
        )
    return store.load(directory)


PREPARE = "python launch/prepare.py --target=FILE --source=FILE"


def check_users(dataset: Dataset, split: str) -> None:
    """Checks that a split, "valid" or "test", has users whose items can be ranked.

    Raises:
      InputError: there is none, or none whose held-out item has a training pair.
    """
    held_out = getattr(dataset, split)
    if not len(held_out.users):
        raise InputError(
            f"the data set has no {split} users: a user needs three target items to give a "
            "test and a validation item; prepare it from more data or a smaller core"
        )
    if not warm(held_out, trained_items(dataset.target))[0].any():
        raise InputError(
            f"no {split} item has a training pair, so nobody could be recommended it: prepare the "
            "data with --min_item_users=3 or more"
        )


def known_items(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """``touched_items``, and what a user has rated below the threshold: never recommended."""
    indptr, items = touched_items(dataset)
    if dataset.seen is None:
        return indptr, items
    both = [(indptr, items), (dataset.seen.indptr, dataset.seen.indices)]
    users = np.concatenate([np.repeat(np.arange(dataset.num_users), np.diff(p)) for p, _ in both])
    items = np.concatenate([own for _, own in both])
    order = np.lexsort((items, users))
    return np.searchsorted(users[order], np.arange(dataset.num_users + 1)), items[order]


def touched_items(
    dataset: Dataset, parts: Sequence[str] = tuple(HELD_OUT)
) -> tuple[np.ndarray, np.ndarray]:
    """Target items of each user in training and the held-out parts, all by default.

    As CSR (indptr, indices sorted within a user).
    """
    target = dataset.target
    users = np.repeat(np.arange(dataset.num_users), np.diff(target.indptr))
    held = held_out_parts(dataset)
    held = [h for part, h in held.items() if HELD_OUT[part] == "target" and part in parts]
    users = np.concatenate([users, *(h.users for h in held)])
    items = np.concatenate([target.indices, *(h.items for h in held)])
    order = np.lexsort((items, users))
    indptr = np.searchsorted(users[order], np.arange(dataset.num_users + 1))
    return indptr, items[order]
