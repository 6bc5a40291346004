"""A run that goes on with new data: what it takes over from an earlier run, by id.

Rows of users and items that both data sets have are taken over, and all dense parameters. Factors
of implicit ALS, a recipe's too, are then fitted on the new data from there, which solves for new
users and items on the way; in the tables of other models these start as drawn. The constants of the
factorisation stay: the towers know its scale. Optimiser and epochs begin anew.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from conet_jax.errors import InputError
from conet_jax.run import tune
from conet_jax.run.experiment import Experiment, for_inference
from conet_jax.run.workdir import restore

_IDS = {
    "user": "user_ids",
    "target_item": "target_item_ids",
    "source_item": "source_item_ids",
    "source_user": "user_ids",  # of emcdr
}


class Rows(NamedTuple):
    """What is known of a table: ``values`` f32[n, width] of its rows ``ids`` int[n]."""

    ids: np.ndarray
    values: np.ndarray

    def into(self, table: Any) -> np.ndarray:
        """Returns a table f32[rows, width or less] with these rows in their place."""
        table = np.array(table)
        table[self.ids] = self.values[:, : table.shape[1]]
        return table


class Earlier(NamedTuple):
    """What is taken over.

    Attributes:
      tables: of each table the rows that are known, those of factors from all pairs.
      dense: parameters.
      constants: of the factorisation, None of a model without.
      record: for result.json: the run, its data, and how many rows were known.
    """

    tables: dict[str, Rows]
    dense: Any
    constants: dict[str, float] | None
    record: dict[str, Any]


def load(workdir: str | Path, experiment: Experiment) -> Earlier:
    """Reads what an experiment can take over from a run.

    Args:
      workdir: the run's folder; its data must be where it says.
      experiment: of the new data.

    Raises:
      InputError: no such run, or its model has other parameters.
    """
    if experiment.model.closed_form:
        raise InputError(
            f"--start_from={workdir}: config.model={experiment.config.model} has a closed form, "
            "so there is nothing to start from"
        )
    if experiment.model.graph is not None:
        raise InputError(
            f"--start_from={workdir}: config.model={experiment.config.model} learns all users and "
            "items of one graph at once, so it does not go on with other data: train it anew"
        )
    there, params, progress = restore(workdir)
    _check(workdir, there, experiment)
    old, params = for_inference(there, params)
    tables = {}
    for name, table in params.tables.items():
        if name not in _IDS:
            continue  # neighbours are found anew
        before, now = (getattr(data, _IDS[name]) for data in (old.dataset, experiment.dataset))
        row_of = {id: row for row, id in enumerate(before)}
        rows = np.fromiter((row_of.get(id, -1) for id in now), np.int64, len(now))
        ids = np.flatnonzero(rows >= 0)
        tables[name] = Rows(ids, np.asarray(table)[rows[ids]])
    constants = None
    if tune.factorised(old.config):
        constants = tune.constants(old.config, old.config)
    record = {
        "workdir": str(Path(workdir).resolve()),
        "dataset_hash": old.dataset.meta["hash"],
        "best_epoch": progress["best_epoch"],
        "known": {name: len(rows.ids) for name, rows in tables.items()},
    }
    return Earlier(tables, params.dense, constants, record)


def _check(workdir: str | Path, there: Experiment, here: Experiment) -> None:
    """Checks that the parameters are those of the same model."""
    if there.config.model != here.config.model:
        raise InputError(
            f"--start_from={workdir} is a run of config.model={there.config.model}: expected "
            f"config.model={here.config.model}"
        )

    def shapes(experiment: Experiment) -> dict[str, tuple[int, ...]]:
        params = jax.eval_shape(experiment.params, experiment.abstract_state())
        widths = {f"tables/{name}": table.shape[1:] for name, table in params.tables.items()}
        leaves = jax.tree.leaves_with_path(params.dense)
        return widths | {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    old, new = shapes(there), shapes(here)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise InputError(
                f"--start_from={workdir} is a run whose {name} is {old.get(name)} where "
                f"{new.get(name)} is expected: give the fields that it was trained with"
            )
