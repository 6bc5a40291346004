"""What a model would recommend to a sample of the test users, as numbers of the whole list."""

from typing import Any

import numpy as np

from conet_jax import metrics
from conet_jax.data.load import known_items
from conet_jax.models.base import Params
from conet_jax.run.experiment import Experiment
from conet_jax.train import full_ranking

USERS = 1_000  # a coverage is of so many lists: of more it is larger
_SEED = 0  # not the run's: all runs on some data have lists of the same users


def measure(experiment: Experiment, params: Params) -> dict[str, Any]:
    """Returns ``users``, ``k`` (the first of ``eval_k``) and what ``metrics.summarize_lists`` says.

    The lists are those of ``recommend``: the k best of all items with a training pair that their
    user does not have.

    Args:
      experiment: the run.
      params: settled parameters.

    Raises:
      Diverged: a score is NaN or infinite.
    """
    dataset, k = experiment.dataset, experiment.config.eval_k[0]
    users = sample(np.unique(dataset.test.users))
    listed = full_ranking.best_items(
        experiment.model,
        params,
        experiment.interactions,
        users,
        known_items(dataset),
        experiment.trained_items(),
        k=k,
    )
    target = dataset.target
    popularity = np.bincount(target.indices, minlength=target.num_items)
    rows = np.repeat(np.arange(dataset.num_users), np.diff(target.indptr))
    owned = target.indices[np.isin(rows, users)]
    return {
        "users": len(users),
        "k": k,
        **metrics.summarize_lists(listed, popularity, owned),
    }


def sample(users: np.ndarray) -> np.ndarray:
    """Returns ``USERS`` of the users int[n], drawn without replacement and ascending, or all."""
    if len(users) > USERS:
        users = np.random.default_rng(_SEED).choice(users, USERS, replace=False)
    return np.sort(users)
