"""Runs with a folder of their own, as launch/train.py makes them, tested once."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax.data.types import Dataset, warm_users
from conet_jax.errors import InputError
from conet_jax.run import jax_settings
from conet_jax.run.fit import fit
from conet_jax.run.workdir import read_ranks, read_result
from conet_jax.studies import runner, statistics
from conet_jax.studies.runner import Record


def read(run: runner.Run) -> Record | None:
    """Returns the result of a run in a folder of its own that is done, else None.

    Raises:
      InputError: it is the result of another config or other data.
    """
    if not run.path.exists():
        return None
    try:
        result = read_result(run.path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{run.path} cannot be read as a run's result ({error}); take it away, and it is made "
            "again"
        ) from None
    differing = config_lib.differences(result["config"], run.config)
    if result["dataset"]["hash"] != run.digest:
        differing.append("the data is other data")
    differing += jax_settings.differences(result.get("jax_settings", {}))
    if differing:
        raise InputError(
            f"{run.path.parent} holds a run of another config: {'; '.join(differing)}. Take "
            "another --workdir, or take that folder away"
        )
    # Under other epochs or patience it is the same run, to go on with.
    done = all(result["config"].get(name) == run.config[name] for name in ("epochs", "patience"))
    return result if done else None


def _fit(run: runner.Run, dataset: Dataset) -> None:
    print(run.command, flush=True)
    fit(run.config, run.path.parent, dataset=dataset, quiet=True)


FULL = runner.Kind("full", _fit, read=read)


def plan(config: ConfigDict, dataset: Dataset, folder: Path, command: str) -> runner.Run:
    """Returns the run of a folder and the launch/train.py command that makes it."""
    digest = dataset.meta["hash"]
    return runner.Run(
        config, digest, runner.key(config, digest, FULL), folder / "result.json", command
    )


def test_ndcg(run: runner.Run, dataset: Dataset, users: np.ndarray) -> np.ndarray:
    """Returns the warm test NDCG of some users, f64[users], a mean where a user has several items.

    Args:
      run: a full run.
      dataset: its data.
      users: of ``warm_users``, of this and maybe other data sets, so that runs can be compared.

    Raises:
      InputError: the run's ranks cannot be read, or are of other users.
    """
    path = run.path.with_name("ranks.npz")
    try:
        found, ranks = read_ranks(path, "test_warm")
        if not np.array_equal(np.unique(found), warm_users(dataset)):
            raise ValueError("it is not of the data's test users")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as the ranks of this study's data ({error}); take "
            f"{path.parent} away, and it is made again"
        ) from None
    ndcg = statistics.ndcg_by_user(found, ranks, run.config.eval_k[0])
    return ndcg[np.isin(np.unique(found), users)]
