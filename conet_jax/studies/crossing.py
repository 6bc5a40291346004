"""What the cross connections of a trained CoNet do at inference: on, off, or fed by another user.

The same parameters are ranked three times: as trained ("on"); with every H^l at zero ("off"), so
that the target tower is alone; and with each user given the source profile of another ("other"),
which keeps all that the connections know but for the user at hand.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import metrics
from conet_jax.errors import InputError
from conet_jax.models.base import Model, Params
from conet_jax.run.workdir import restore, stored_config
from conet_jax.studies import compare
from conet_jax.train.interactions import Interactions, to_device
from conet_jax.train.ranking import Ranked, rank_twice

WAYS = ("on", "off", "other")


def common_config(workdirs: Sequence[str]) -> dict[str, Any]:
    """Returns the config of runs, which is that of the first.

    Raises:
      InputError: they are not of one config and data, a seed each, or a folder holds no run.
    """
    if "" in workdirs:
        raise InputError(f"{','.join(workdirs)!r} names an empty folder: expected DIR,DIR")
    first, digest = stored_config(workdirs[0])
    seeds: dict[int, str] = {}
    for workdir in workdirs:
        config, found = stored_config(workdir)
        if found != digest:
            raise InputError(f"{workdir} is on other data than {workdirs[0]}: expected runs on one")
        differing = config_lib.differences(first, ConfigDict(config), free=(*compare.NAMES, "seed"))
        if differing:
            raise InputError(
                f"{workdir} is of another config than {workdirs[0]}: {'; '.join(differing)}; "
                "expected runs that differ in the seed alone"
            )
        if config["seed"] in seeds:
            raise InputError(
                f"{seeds[config['seed']]} and {workdir} have one seed: name one of them"
            )
        seeds[config["seed"]] = workdir
    return first


def switched(
    model: Model, params: Params, interactions: dict[str, Interactions], way: str
) -> tuple[Params, dict[str, Interactions]]:
    """Returns parameters and interactions under which the crossing is on, off or another's.

    Args:
      model: a model of two towers.
      params: its settled parameters.
      interactions: training interactions by domain.
      way: "on", "off" or "other".

    Returns:
      (params, interactions) for ``ranking.rank_held_out``.

    Raises:
      InputError: the model has no cross connections.
    """
    if model.uncrossed is None:
        raise InputError(
            "the model has no cross connections to switch: expected a run of a CoNet with "
            "config.cross_layers of 1 or more"
        )
    if way == "off":
        params = params._replace(dense=model.uncrossed(params.dense))
    if way == "other" and model.pairing == "views":
        users = interactions["source"].num_users
        user = _shifted_views(params.tables["user"], users)
        params = params._replace(tables={**params.tables, "user": user})
    elif way == "other":
        interactions = {**interactions, "source": _shifted(interactions["source"])}
    return params, interactions


def _shifted_views(table: jax.Array, users: int) -> jax.Array:
    """Gives each user the source's view of the next one, in every fold."""
    rows = table.reshape(users, -1, table.shape[-1])
    target, source = jnp.split(rows, 2, axis=-1)
    joined = jnp.concatenate([target, jnp.roll(source, -1, axis=0)], axis=-1)
    return joined.reshape(table.shape)


def _shifted(interactions: Interactions) -> Interactions:
    """Gives each user the interactions of the next one, and the last those of the first."""
    indptr, items = np.asarray(interactions.indptr), np.asarray(interactions.items)
    degrees, weights = np.roll(np.diff(indptr), -1), interactions.weights
    return to_device(
        np.concatenate([[0], np.cumsum(degrees)]),
        np.roll(items, -int(indptr[1])),
        interactions.num_items,
        weights=None if weights is None else np.roll(np.asarray(weights), -int(indptr[1])),
    )


def ranked(
    folders: Sequence[str | Path], *, split: str = "test", data: str | None = None
) -> Iterator[tuple[Params, dict[str, tuple[Ranked, Ranked]]]]:
    """Ranks the held-out items of trained runs in each of ``WAYS``.

    Args:
      folders: of the runs.
      split: "test" or "valid".
      data: folder of their data; by default where they were, or next to the run.

    Yields:
      Of each run (its parameters, by way what ``ranking.rank_twice`` returns).
    """
    for folder in folders:
        experiment, params, _ = restore(folder, data=data)
        model, interactions = experiment.model, experiment.interactions
        given = getattr(experiment.dataset, split), experiment.trained_items()
        yield (
            params,
            {
                way: rank_twice(model, *switched(model, params, interactions, way), *given)
                for way in WAYS
            },
        )


def report(rows: dict[str, list[dict[str, Any]]], ndcg: dict[str, np.ndarray], k: int) -> str:
    """Returns a Markdown table of the three ways.

    Args:
      rows: metrics of each run, by way.
      ndcg: f64[users], NDCG of each user averaged over the runs, by way.
      k: the cut.

    Returns:
      A row a way: means over runs, and against "on" the difference and the p of a paired t-test.
    """
    from conet_jax.studies import statistics
    from conet_jax.studies.markdown import table

    shown = metrics.in_tables()
    head = ["crossing", *(metric.heading(k) for metric in shown), "NDCG against on", "p"]
    cells = []
    for way, runs in rows.items():
        means = [np.mean([run[metric.key(k)] for run in runs]) for metric in shown]
        gain, p = "", ""
        if way != "on":
            gain = f"{100 * (ndcg[way].mean() / ndcg['on'].mean() - 1):+.2f}%"
            p = f"{statistics.paired_t_test(ndcg[way], ndcg['on']):.2g}"
        cells.append([way, *(f"{mean:.4f}" for mean in means), gain, p])
    return "\n".join(table(head, cells)) + "\n"
