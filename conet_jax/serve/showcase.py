"""What a report shows of two trained models: the source items that weigh most, and some lists."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from conet_jax.data.types import Dataset, trained_items, warm, warm_users
from conet_jax.serve.explain import SOURCE_ITEMS
from conet_jax.serve.recommend import Recommender, User, load, recommend

SAMPLE = 200  # users whose lists are explained
USERS = 10  # shown
ITEMS = 15  # source items listed
_K = 10  # items of a list
_HISTORY = 12  # items of a user that are shown, of each domain


def showcase(ours: Path, theirs: Path | None, *, show_names: bool = False) -> dict[str, Any]:
    """Returns the source items that weigh most, and lists with and without the source.

    Args:
      ours: folder of a run that knows the source.
      theirs: of one that does not; None for popularity, whose lists are nobody's own.
      show_names: whether users are called by their raw ids; else "user 1", ….

    Returns:
      ``of`` (users of the sample), ``items`` (rows of source item, weight, users) and ``examples``.
    """
    recommender = load(ours)
    dataset = recommender.dataset
    rng = np.random.default_rng(0)
    known = warm_users(dataset)
    sample = np.sort(rng.choice(known, min(SAMPLE, len(known)), replace=False))
    explained = recommend(recommender, _users(dataset, sample), k=_K, explain=True)
    chosen = rng.choice(known, min(USERS, len(known)), replace=False)
    others = None if theirs is None else load(theirs)
    return {
        "of": len(sample),
        "items": _weights(explained),
        "examples": [
            _example(number, row, recommender, others, show_names)
            for number, row in enumerate(chosen.tolist(), 1)
        ],
    }


def _users(dataset: Dataset, rows: np.ndarray) -> list[User]:
    return [User(dataset.user_ids[row], int(row)) for row in rows]


def _weights(explained: pl.DataFrame) -> list[dict[str, Any]]:
    """Source items by the sum of what they add to the scores of the lists."""
    weights: dict[str, float] = defaultdict(float)
    users: dict[str, set[str]] = defaultdict(set)
    for row in explained.iter_rows(named=True):
        for at in range(1, SOURCE_ITEMS + 1):
            if (item := row[f"source_{at}"]) is not None:
                weights[item] += row[f"weight_{at}"]
                users[item].add(row["user"])
    total = sum(weights.values())
    order = sorted(weights, key=lambda item: (-weights[item], item))[:ITEMS]
    return [
        {"item": item, "share": weights[item] / total, "users": len(users[item])} for item in order
    ]


def _example(
    number: int, row: int, ours: Recommender, theirs: Recommender | None, show_names: bool
) -> dict[str, Any]:
    dataset = ours.dataset
    test = dataset.test
    is_warm, _ = warm(test, trained_items(dataset.target))
    held_out = int(test.items[np.flatnonzero((test.users == row) & is_warm)[0]])  # of several, one
    name = dataset.target_item_ids[held_out]
    found: dict[str, Any] = {
        "user": str(dataset.user_ids[row]) if show_names else f"user {number}",
        "held_out": name,
    }
    for domain in ("target", "source"):
        pairs = getattr(dataset, domain)
        items = pairs.indices[pairs.indptr[row] : pairs.indptr[row + 1]]
        ids = getattr(dataset, f"{domain}_item_ids")[items].tolist()
        found[domain] = {"count": len(ids), "items": ids[:_HISTORY]}
    for key, recommender in (("with", ours), ("without", theirs)):
        found[key] = None if recommender is None else _list(recommender, row, held_out)
    return found


def _list(recommender: Recommender, row: int, held_out: int) -> list[str]:
    """The best items among those that the user does not have in training."""
    dataset = recommender.dataset
    own = dataset.target.indices[dataset.target.indptr[row] : dataset.target.indptr[row + 1]]
    items = np.setdiff1d(np.arange(dataset.target.num_items), own)
    # What is held out may come: it is what the list is looked at for.
    frame = recommend(
        recommender, _users(dataset, np.array([row])), k=_K, items=items, include_seen=True
    )
    return frame["item"].to_list()
