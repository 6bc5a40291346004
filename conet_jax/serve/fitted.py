"""For Python and notebooks: fit a model on data, load it again, recommend.

What the launchers do with files, with objects: ``conet_jax.fit``, ``conet_jax.load``. The folder of
a run is the same, so that a model that was fitted in a notebook can be served by a command.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from conet_jax import config as config_lib
from conet_jax.data import store
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.run import fit as run_fit
from conet_jax.run.workdir import read_result
from conet_jax.serve import recommend as serving


class Fitted(NamedTuple):
    """A trained model.

    Attributes:
      workdir: folder of its run.
      recommender: the model made ready to rank.
      result: what result.json holds, the metrics among it; empty of a run that is not at its end.
    """

    workdir: Path
    recommender: serving.Recommender
    result: dict[str, Any]

    def __repr__(self) -> str:
        """A line; of all arrays a notebook would print millions."""
        return f"Fitted({str(self.workdir)!r}, {len(self.recommender.rows):,} users)"

    def recommend(
        self,
        users: Iterable[Any] | None = None,
        k: int = 10,
        *,
        source: Mapping[Any, Iterable[Any]] | None = None,
        target: Mapping[Any, Iterable[Any]] | None = None,
        items: Iterable[Any] | None = None,
        fallback: bool = False,
        include_seen: bool = False,
        include_cold: bool = False,
        explain: bool = False,
        exact: bool = False,
    ) -> pl.DataFrame:
        """Recommends to users of the data, and to others by what they have.

        Args:
          users: raw ids; by default all for whom more than popularity can rank.
          k: items a user.
          source: source items by user, raw ids, of users who are not in the data.
          target: target items, likewise.
          items: raw ids of those to choose from; by default the whole catalogue.
          fallback: whether popularity ranks for those for whom nothing else can.
          include_seen: see ``serve.recommend.recommend``.
          include_cold: likewise.
          explain: likewise.
          exact: rank everything for thousands of users, too. By default a shortlist is ranked for
            so many; how long it must be is measured at each call. See ``serve.shortlist``.

        Returns:
          A row a recommendation: ``user``, ``item``, ``rank`` from 1, ``probability`` or
          ``score``, ``method``; see ``serve.recommend.recommend``.

        Raises:
          InputError: nothing can rank for a user, or none of the items is known.
        """
        given = {}
        for domain, lists in (("source", source), ("target", target)):
            ids = getattr(self.recommender.dataset, f"{domain}_item_ids")
            rows = {name: row for row, name in enumerate(ids)} if lists else {}
            found = {
                str(user): np.array(sorted({rows[i] for i in _names(own) if i in rows}), np.int64)
                for user, own in (lists or {}).items()
            }
            given[domain] = {user: own for user, own in found.items() if len(own)}
        if users is None:
            names = serving.users_of_data(self.recommender)
            names = [*dict.fromkeys([*names, *given["source"], *given["target"]])]
        else:
            names = _names(users)
        chosen = None
        if items is not None:
            chosen = serving.find_items(self.recommender, _names(items))
            if not len(chosen):
                raise InputError("none of the items is known: expected raw ids of target items")
        found = serving.find_users(self.recommender, names, **given, fallback=fallback)
        asked = {
            "k": k,
            "items": chosen,
            "include_seen": include_seen,
            "include_cold": include_cold,
        }
        recommender = self.recommender
        if not exact:
            recommender = serving.for_many(recommender, found, **asked)
        return serving.recommend(recommender, found, **asked, explain=explain)


def fit(
    data: Dataset | str | Path,
    workdir: str | Path,
    variant: str = "recipe",
    *,
    quiet: bool = False,
    start_from: str | Path | None = None,
    **fields: Any,
) -> Fitted:
    """Trains a model, or goes on with a run that was interrupted.

    Args:
      data: from ``conet_jax.prepare``, or the folder of prepared data.
      workdir: folder of the run, made if absent.
      variant: one of ``variants.VARIANTS``.
      quiet: print nothing.
      start_from: folder of an earlier run to start from, see ``run.earlier``.
      **fields: of the config, see ``config.FIELDS``, where they are to differ.

    Returns:
      The model; its best epoch is chosen on validation.

    Raises:
      InputError: a field is unknown or does not fit, or as in ``run.fit.fit``.
    """
    config = config_lib.default_config(variant)
    for name, value in fields.items():
        try:
            config[name] = value
        except TypeError:
            field = config_lib.FIELDS[name]
            raise InputError(f"config.{name} is {value!r}: expected {field.expected}") from None
    dataset = data
    if isinstance(data, str | Path):
        dataset, config.data.dir = store.load(data), str(data)
    run_fit.fit(config, workdir, dataset=dataset, quiet=quiet, start_from=start_from)
    return load(workdir, data=dataset)


def load(workdir: str | Path, *, data: Dataset | str | Path | None = None) -> Fitted:
    """Loads the best parameters of a run.

    Args:
      workdir: folder of the run.
      data: its data, or their folder; by default where they were, or next to the run.

    Raises:
      InputError: see ``run.workdir.restore``.
    """
    path = Path(workdir)
    recommender = serving.load(path, data=data)
    try:
        result = read_result(path / "result.json")
    except (OSError, ValueError):
        result = {}
    return Fitted(path, recommender, result)


def _names(ids: Iterable[Any]) -> list[str]:
    """Raw ids as the data have them: numbers as text, one id alone as a list of it."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        ids = [ids]
    return [str(name) for name in ids]
