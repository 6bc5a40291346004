"""The folder of a run: made and claimed, read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import files
from conet_jax.data.load import PREPARE, load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import make_folder, write_json
from conet_jax.models.base import Params
from conet_jax.run import jax_settings, lock
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.experiment import Experiment, make_experiment
from conet_jax.train.ranking import Ranks


def make_workdir(workdir: Path) -> None:
    """Makes the workdir, or checks that it is empty or a run's."""
    if workdir.is_dir() and not (workdir / "config.json").exists():
        ours = (".config.json.tmp", lock.LOCK)  # of a run that was killed at once
        if not all(path.name.startswith(ours) for path in workdir.iterdir()):
            raise InputError(f"{workdir} is not empty and holds no run; take another --workdir")
    make_folder(workdir)


def claim_workdir(workdir: Path, config: ConfigDict, dataset: Dataset) -> None:
    """Writes config.json, or checks that the workdir is of this config and data."""
    path = workdir / "config.json"
    digest = dataset.meta["hash"]
    if path.exists():
        stored, stored_digest, settings = _stored(workdir)
        differing = config_lib.differences(stored, config)
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


def write_config(workdir: Path, config: ConfigDict, dataset: Dataset) -> None:
    """Writes config.json."""
    more = {"dataset_hash": dataset.meta["hash"], "jax_settings": jax_settings.current()}
    write_json(workdir / "config.json", json.loads(config.to_json()) | more)


def _train(workdir: str | Path) -> str:
    return f"train it: python launch/train.py --config=configs/NAME.py --workdir={workdir}"


def stored_config(workdir: str | Path) -> tuple[dict[str, Any], str]:
    """Returns (config, hash of the data) of a run.

    Raises:
      InputError: the folder holds no run, or its config.json cannot be read.
    """
    return _stored(workdir)[:2]


def _stored(workdir: str | Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """``stored_config``, and the settings of JAX, none of a run that was before they were kept."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise InputError(f"{workdir} holds no run (no config.json); {_train(workdir)}")
    try:
        stored = files.read_json(path)
        digest = stored.pop("dataset_hash")
        settings = stored.pop("jax_settings", {})
        if not (isinstance(digest, str) and isinstance(settings, dict)):
            raise TypeError("dataset_hash or jax_settings is of another type")
        stored = config_lib.completed(stored)
        config_lib.validate(ConfigDict(stored))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a run's config ({error}); take another --workdir"
        ) from None
    return stored, digest, settings


def restore(workdir: str | Path, *, devices: int = 1) -> tuple[Experiment, Params, dict[str, Any]]:
    """Loads a run's config, data and best parameters.

    Args:
      workdir: folder of a run with at least one epoch.
      devices: to load it on, see ``config.devices``; on one, tables are plain arrays.

    Returns:
      (experiment, best parameters, {"best_epoch": …}).

    Raises:
      InputError: the folder holds no run, no checkpoint, or its data is gone or altered.
    """
    workdir = Path(workdir)
    stored, digest = stored_config(workdir)
    config = ConfigDict(stored | {"devices": devices})
    dataset = load_dataset(config)
    if dataset.meta["hash"] != digest:
        raise InputError(
            f"the data in {config.data.dir} is not that of {workdir}: hash "
            f"{dataset.meta['hash'][:12]}… instead of {digest[:12]}…; prepare it as it was: "
            f"{config.data.get('prepare') or PREPARE} --out={config.data.dir}"
        )
    experiment = make_experiment(config, dataset)
    if not (workdir / "checkpoints").is_dir():
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
