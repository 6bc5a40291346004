"""A trained model made ready to rank, and whom it can rank for."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conet_jax.data.load import known_items
from conet_jax.data.types import Dataset
from conet_jax.models import neighbours
from conet_jax.models.base import Model, Params
from conet_jax.run.experiment import Experiment, for_inference
from conet_jax.run.workdir import restore
from conet_jax.serve import newcomers
from conet_jax.serve.shortlist import Shortlist
from conet_jax.studies import crossing
from conet_jax.train import ranking
from conet_jax.train.interactions import Interactions


class Recommender(NamedTuple):
    """A trained model made ready by ``load``: tables projected, known interactions at hand.

    Attributes:
      model: the model.
      params: its settled parameters.
      interactions: training interactions by domain, as the model was trained on.
      projected: from ``Model.project``, for the users of the data, less the neighbours.
      sums: what all scores have beside those of the model on ``projected``; None is nothing.
      dataset: the data.
      touched: (indptr, items): target items of each user in training, validation and test, and
        those rated below the threshold.
      warm: bool[target items], those with a training pair.
      rows: row of each raw user id.
      learnt: bool[users], those from whose pairs the model has learnt.
      newcomers: what it makes of users who have no row; None where it can make nothing of them.
      uncrossed: parameters with every H at zero; None where nothing crosses at inference.
      shortlist: what is ranked for users of the data; None is everything.
    """

    model: Model
    params: Params
    interactions: dict[str, Interactions]
    projected: Any
    sums: neighbours.Sums | None
    dataset: Dataset
    touched: tuple[np.ndarray, np.ndarray]
    warm: np.ndarray
    rows: dict[str, int]
    learnt: np.ndarray
    newcomers: newcomers.Newcomers | None
    uncrossed: Params | None
    shortlist: Shortlist | None = None


class User(NamedTuple):
    """Whom to recommend to; with neither a row nor items, a user of whom nothing is known.

    Attributes:
      id: raw id.
      row: of the data's users; None for a user who is not among them.
      source: int[n], rows of the user's source items, where there is no ``row``.
      target: int[n], rows of the user's target items, where there is no ``row``.
    """

    id: str
    row: int | None = None
    source: np.ndarray | None = None
    target: np.ndarray | None = None

    @property
    def method(self) -> str:
        """What ranks for the user: "model", "items", "source items" or "popularity".

        "items" is the model from the target items that were given with the request, and the source
        items if there are any; "source items" is the model from those alone.
        """
        if self.row is not None:
            return "model"
        if self.target is not None:
            return "items"
        return "popularity" if self.source is None else "source items"


def load(workdir: str | Path, *, data: Dataset | str | Path | None = None) -> Recommender:
    """Loads the best parameters of a run and makes them ready to rank.

    Args:
      workdir: folder of the run.
      data: its data, or their folder; by default where they were, or next to the run.

    Raises:
      InputError: see ``workdir.restore``.
    """
    experiment, params, _ = restore(workdir, data=data)
    return prepare(experiment, params)


def prepare(experiment: Experiment, params: Params) -> Recommender:
    """Projects the tables once and collects what ranking needs.

    Args:
      experiment: a run, on one device.
      params: settled parameters.

    Returns:
      The recommender.

    Example:
      >>> from conet_jax.config import default_config
      >>> from conet_jax.data.assemble import from_arrays
      >>> from conet_jax.run.experiment import make_experiment
      >>> users, source = np.repeat(range(9), 2), np.arange(9) % 2
      >>> data = from_arrays(users, [0, 1, 0, 2, 1, 2] * 3, range(9), source, candidates=1)
      >>> data = data._replace(valid=data.test)  # so small that nobody has a validation item
      >>> experiment = make_experiment(default_config("popularity"), data)
      >>> recommender = prepare(experiment, experiment.sweep(experiment.state_of(
      ...     experiment.model.init(None, experiment.sizes))))
      >>> print(recommender.warm)
      [ True  True  True]
    """
    experiment, params = for_inference(experiment, params)
    dataset, model, interactions = experiment.dataset, experiment.model, experiment.interactions
    uncrossed = None
    if model.inference == "cross" and model.uncrossed is not None:
        uncrossed, _ = crossing.switched(model, params, interactions, "off")
    learnt = np.diff(dataset.target.indptr) > 0
    if "source" in model.domains or experiment.config.joined:
        learnt |= np.diff(dataset.source.indptr) > 0
    projected, sums = neighbours.apart(ranking.project(params, interactions, model=model))
    return Recommender(
        model=model,
        params=params,
        interactions=interactions,
        projected=projected,
        sums=sums,
        dataset=dataset,
        touched=known_items(dataset),
        warm=np.bincount(dataset.target.indices, minlength=dataset.target.num_items) > 0,
        rows={user: row for row, user in enumerate(dataset.user_ids)},
        learnt=learnt,
        newcomers=newcomers.of(experiment, params),
        uncrossed=uncrossed,
    )
