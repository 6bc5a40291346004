"""Synthetic data with the counts of the paper's Table 1, and the experiments on it."""

from functools import cache
from typing import Any

from ml_collections import ConfigDict

from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.data.types import Dataset
from conet_jax.run.experiment import Experiment, make_experiment

# Table 1: users, target items and interactions, source items and interactions.
SCALES = {
    "amazon": (80_763, 93_799, 1_323_101, 35_896, 963_373),
    "mobile": (23_111, 14_348, 1_164_394, 29_921, 617_146),
    "small": (3_000, 2_000, 30_000, 2_000, 60_000),
}


@cache
def dataset(scale: str) -> Dataset:
    """Returns the data set of a key of ``SCALES``."""
    users, target_items, target_pairs, source_items, source_pairs = SCALES[scale]
    return synthetic.dataset(
        num_users=users,
        num_target_items=target_items,
        num_source_items=source_items,
        target_interactions=target_pairs,
        source_interactions=source_pairs,
        seed=0,
    )[0]


def experiment_on(dataset: Dataset, variant: str = "conet", **fields: Any) -> Experiment:
    """Returns the experiment of a variant on one device, unless the fields say otherwise."""
    config = default_config(variant)
    config.update({"devices": 1, **fields})
    return make_experiment(config, dataset)


def recipe_of_amazon() -> ConfigDict:
    """Returns the recipe with the layers of configs/amazon.py."""
    config = default_config("recipe")
    config.layers = (64, 32, 16, 8)  # as in configs/amazon.py
    return config
