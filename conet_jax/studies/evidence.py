"""Finished runs of the methods that a transfer study compares, and what they are compared by."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conet_jax.errors import InputError
from conet_jax.run.workdir import read_ranks
from conet_jax.studies import statistics, verdict
from conet_jax.studies.runner import Record

RECIPE, CONTROL, JOINED = "recipe", "recipe_other", "ials_joined"
ALONE = ("popularity", "ials", "recipe_mlp")  # methods that know the target alone


def cut(row: dict[str, Any]) -> int:
    """Returns the first cut K of a row of metrics.

    >>> cut({"hit_ratio@5": 0.5, "ndcg@5": 0.25})
    5
    """
    return int(next(name for name in row if name.startswith("ndcg@")).partition("@")[2])


class Runs(NamedTuple):
    """Finished runs of a method.

    Attributes:
      results: contents of each result.json.
      ndcg: by split ("test_warm", "test"; "test_target_only_warm" where there is one), f64[seeds,
        users].
      fixed: whether the seed makes no difference.
      folders: of the runs.
      command: of launch/train.py, for the first.
      fields: config fields that the search chose.
      trials: of the search, how many.
    """

    results: list[Record]
    ndcg: dict[str, np.ndarray]
    fixed: bool
    folders: list[Path]
    command: str
    fields: dict[str, Any]
    trials: int

    @property
    def valid(self) -> float:
        """Mean warm validation NDCG."""
        rows = [result["valid_warm"] for result in self.results]
        return float(np.mean([row[f"ndcg@{cut(row)}"] for row in rows]))

    def first(self, seeds: int) -> "Runs":
        """Returns the runs of the first seeds alone."""
        ndcg = {split: values[:seeds] for split, values in self.ndcg.items()}
        return self._replace(results=self.results[:seeds], ndcg=ndcg, folders=self.folders[:seeds])


def compare(ours: Runs, theirs: Runs, split: str = "test_warm") -> verdict.Gain:
    """Returns the gain of one method's runs over another's."""
    fixed = (ours.fixed, theirs.fixed)
    return verdict.gain(ours.ndcg[split], theirs.ndcg[split], fixed=fixed)


def baseline_of(done: dict[str, Runs]) -> str:
    """Returns the best on validation of the methods that know the target alone.

    By the seeds that all have, so that more seeds of one change nothing.

    Raises:
      InputError: none of them has a run.
    """
    values = {name: done[name].first(verdict.SEEDS).valid for name in ALONE if name in done}
    if not values:
        raise InputError(f"none of {', '.join(ALONE)} could be trained: see the lines above")
    return max(values, key=values.get)


def ndcg_of(path: Path, split: str, k: int) -> np.ndarray:
    """Reads the NDCG of each user of a split, f64[users], from a run's ranks.npz.

    That of a user with several held-out items is their mean.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        users, ranks = read_ranks(path, split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as the ranks of a run ({error}); take {path.parent} away, and "
            "it is made again"
        ) from None
    return statistics.ndcg_by_user(users, ranks, k)
