"""The folder of a run: made and claimed, read back."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import files
from conet_jax.data.load import load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import make_folder, write_json
from conet_jax.models.base import Params
from conet_jax.run import jax_settings, lock, tune, whereabouts
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.experiment import Experiment, untuned
from conet_jax.train.ranking import Ranks


def make_workdir(workdir: Path) -> None:
    """Makes the workdir, or checks that it is empty or a run's."""
    if workdir.is_dir() and not (workdir / "config.json").exists():
        ours = (".config.json.tmp", lock.LOCK)  # of a run that was killed at once
        if not all(path.name.startswith(ours) for path in workdir.iterdir()):
            raise InputError(f"{workdir} is not empty and holds no run; take another --workdir")
    make_folder(workdir)


def claim_workdir(
    workdir: Path, config: ConfigDict, dataset: Dataset, start_from: str | Path | None = None
) -> None:
    """Writes config.json, or checks that the workdir is of this config and data."""
    path = workdir / "config.json"
    digest = dataset.meta["hash"]
    if path.exists():
        stored, stored_digest, found, settings, _ = _stored(workdir)
        differing = config_lib.differences(stored, config)
        ours = str(Path(start_from).resolve()) if start_from else "drawn parameters"
        theirs = found.get("started_from", {}).get("workdir", "drawn parameters")
        if ours != theirs:
            differing.append(f"it started from {theirs}, and this run from {ours}")
        # A run that never came to its first checkpoint has nothing to lose.
        started = any((workdir / "checkpoints" / "latest").glob("[0-9]*"))
        if differing and started:
            raise InputError(
                f"{workdir} holds a run of another config: {'; '.join(differing)}. Take another "
                "--workdir, or the same fields"
            )
        if started and (differing := jax_settings.differences(settings)):
            raise InputError(
                f"{workdir} holds a run under other settings of JAX, which change its numbers: "
                f"{'; '.join(differing)}. Set them as there, or take another --workdir"
            )
        if stored_digest != digest and started:
            raise InputError(
                f"{workdir} holds a run on other data: its hash is {stored_digest[:12]}…, that of "
                f"the data here {digest[:12]}…. Take another --workdir"
            )
        return
    try:
        write_config(workdir, config, dataset)
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir}: {error.strerror}; take another --workdir"
        ) from None


def write_config(
    workdir: Path, config: ConfigDict, dataset: Dataset, found: dict[str, Any] | None = None
) -> None:
    """Writes config.json: the config as given, and what was found for its start (``_FOUND``)."""
    path, place = workdir / "config.json", whereabouts.of(workdir, config, dataset)
    if not place and path.exists():  # it goes on with data that were found by what is written there
        place = _stored(workdir).place
    more = {
        "dataset_hash": dataset.meta["hash"],
        "dataset_place": place,
        "jax_settings": jax_settings.current(),
    }
    write_json(path, json.loads(config.to_json()) | more | (found or {}))


def _train(workdir: str | Path) -> str:
    return f"train it: python launch/train.py --config=configs/NAME.py --workdir={workdir}"


def stored_config(workdir: str | Path) -> tuple[dict[str, Any], str]:
    """Returns (config, hash of the data) of a run.

    Raises:
      InputError: the folder holds no run, or its config.json cannot be read.
    """
    return _stored(workdir)[:2]


def stored_start(workdir: Path, config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """Returns what was found for a run's start under this config and on these data."""
    stored, digest, found, *_ = _stored(workdir)
    same = digest == dataset.meta["hash"] and not config_lib.differences(stored, config)
    return found if same else {}


# Beside the config: constants that a search has found; the earlier run that this one started from.
_FOUND = ("tuned", "started_from")


class _Stored(NamedTuple):
    """What config.json holds; an older one has neither settings of JAX nor the data's place."""

    config: dict[str, Any]
    digest: str  # of the data
    found: dict[str, Any]  # for the start
    settings: dict[str, Any]
    place: dict[str, str]


def _stored(workdir: str | Path) -> _Stored:
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise InputError(f"{workdir} holds no run (no config.json); {_train(workdir)}")
    try:
        stored = files.read_json(path)
        digest = stored.pop("dataset_hash")
        settings, place = stored.pop("jax_settings", {}), stored.pop("dataset_place", {})
        if not (isinstance(digest, str) and isinstance(settings, dict)):
            raise TypeError("dataset_hash or jax_settings is of another type")
        if not all(isinstance(text, str) for text in place.values()):
            raise TypeError("dataset_place is of another type")
        found = {name: stored.pop(name) for name in _FOUND if name in stored}
        stored = config_lib.completed(stored)
        config = ConfigDict(stored)
        config_lib.validate(config)
        if "tuned" in found:
            config_lib.validate(tune.resolved(config, tune.constants(config, found["tuned"])))
        if not isinstance(found.get("started_from", {}).get("workdir", ""), str):
            raise TypeError("started_from names no folder")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a run's config ({error}); take another --workdir"
        ) from None
    return _Stored(stored, digest, found, settings, place)


def load_for(config: ConfigDict, workdir: Path) -> Dataset:
    """Loads a config's data; where there are none, those of the run in the workdir, if any.

    Raises:
      InputError: as ``load_dataset``.
    """
    if "synthetic" not in config.data and not (Path(config.data.dir) / "dataset.json").exists():
        if (workdir / "config.json").exists():
            stored = _stored(workdir)
            config = config.copy_and_resolve_references()
            config.data.dir = whereabouts.find(workdir, stored.config, stored.place, stored.digest)
    return load_dataset(config)


def restore(
    workdir: str | Path, *, devices: int = 1, data: Dataset | str | Path | None = None
) -> tuple[Experiment, Params, dict[str, Any]]:
    """Loads a run's config, data and best parameters.

    Args:
      workdir: folder of a run with at least one epoch.
      devices: to load it on, see ``config.devices``; on one, tables are plain arrays.
      data: the run's data, or their folder; by default where they were, or next to the run.

    Returns:
      (experiment, best parameters, {"best_epoch": …}).

    Raises:
      InputError: the folder holds no run, no checkpoint, or its data is gone or altered.
    """
    workdir = Path(workdir)
    stored, digest, found, _, place = _stored(workdir)
    config = ConfigDict(stored | {"devices": devices})
    given = data is not None and not isinstance(data, str | Path)
    if given:
        dataset = data
    else:
        if folder := whereabouts.find(workdir, stored, place, digest, data):
            config.data.dir = folder
        dataset = load_dataset(config)
    if dataset.meta["hash"] != digest:
        hashes = f"hash {dataset.meta['hash'][:12]}… instead of {digest[:12]}…"
        if given:
            raise InputError(
                f"the data given are not those of {workdir}: {hashes}; give those that it was "
                "fitted on"
            )
        raise InputError(
            f"the data in {config.data.dir} is not that of {workdir}: {hashes}; name another "
            "folder by --data=DIR, or prepare it as it was: "
            f"{whereabouts.command(stored, place)} --out={config.data.dir}"
        )
    experiment = untuned(config, dataset)
    if "tuned" in found:
        experiment = experiment.tuned(tune.constants(config, found["tuned"]))
    searching = tune.is_due(config) and "tuned" not in found
    if searching or not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir} holds no checkpoint yet; {_train(workdir)}")
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        if checkpoints.latest_epoch() is None:
            raise InputError(f"{workdir} holds no checkpoint yet; {_train(workdir)}")
        _, progress = experiment.resume(checkpoints)
        if not progress["best_epoch"]:  # stopped in its first epoch
            raise InputError(f"{workdir} holds no checkpoint yet; {_train(workdir)}")
        return experiment, experiment.best(checkpoints, progress["best_epoch"]), progress
    finally:
        checkpoints.close()


def read_result(path: Path) -> dict[str, Any]:
    """Returns the contents of a run's result.json.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or no result.
    """
    result = files.read_json(path)
    try:
        numbers = [result[name] for name in ("epochs", "best_epoch", "parameters", "seconds")]
        numbers += [
            x
            for split in ("test", "test_warm", "valid", "valid_warm")
            for x in result[split].values()
        ]
        if not all(type(x) in (int, float) for x in numbers):
            raise TypeError("a number is something else")
        given = result["dataset"]["hash"], result["config"], result.get("jax_settings", {})
        if tuple(map(type, given)) != (str, dict, dict):
            raise TypeError("a field is of another type")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no result of a run: {error!r}") from None
    return result


def read_ranks(path: Path, split: str) -> tuple[np.ndarray, Ranks]:
    """Returns users and ranks of a split from a run's ranks.npz.

    Splits are "test", "valid", and "test_warm", "valid_warm".

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or the arrays are no ranks.
    """
    users, *arrays = files.read_arrays(path, [f"{split}_{x}" for x in ("users", *Ranks._fields)])
    for values in (users, *arrays):
        if values.ndim != 1 or len(values) != len(users) or values.dtype.kind not in "iu":
            raise ValueError("arrays of another shape or type than ranks have")
    above, tied, candidates = (values.astype(np.int64) for values in arrays)
    if not ((above >= 0) & (tied >= 0) & (above + tied <= candidates)).all():
        raise ValueError("a rank beyond the candidates")
    return users, Ranks(*arrays)
