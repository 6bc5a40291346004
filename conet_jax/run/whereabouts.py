"""Where a run's prepared data are: written down with the run, found again if either has moved."""

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conet_jax import files
from conet_jax.data.cold_users import hash_after
from conet_jax.data.load import PREPARE
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError

_JSON = "dataset.json"


def of(workdir: str | Path, config: ConfigDict, dataset: Dataset) -> dict[str, str]:
    """Returns what config.json keeps of the data's place; nothing of data that are in no folder.

    Args:
      workdir: of the run.
      config: of the run.
      dataset: its data.

    Returns:
      ``folder``, absolute; ``from_run``, the same from the workdir on; ``prepared_by``, the command
      that made the data, without ``--out``, where they say so.
    """
    folder = os.path.abspath(config.data.get("dir", ""))
    if "synthetic" in config.data or not config.data.dir or not _is_data(folder):
        return {}
    found = {"folder": folder, "from_run": os.path.relpath(folder, os.path.abspath(workdir))}
    command = dataset.meta.get("prepared_by")
    return found | ({"prepared_by": command} if isinstance(command, str) else {})


def find(
    workdir: str | Path,
    config: dict[str, Any],
    place: dict[str, str],
    digest: str,
    given: str | Path | None = None,
) -> str | None:
    """Returns the folder of a run's data.

    Looked for where they were, then where they would be had both moved together, then next to the
    run and in it, then from the working folder. Of several, those whose hash is the run's.

    Args:
      workdir: of the run.
      config: its stored config.
      place: from ``of``.
      digest: hash of its data.
      given: the folder that the user says it is, the only one to look in; None for none.

    Returns:
      The folder; None if the config makes its data.

    Raises:
      InputError: there are no prepared data in any of these, or a folder is given for data that the
        config makes.
    """
    if "synthetic" in config["data"]:
        if given is not None:
            raise InputError(f"--data={given} is given, but {workdir} makes its data: leave it out")
        return None
    workdir, named = Path(workdir), config["data"]["dir"]
    first = str(given or place.get("folder") or named or "DIR")
    looked = [
        first,
        os.path.normpath(workdir / place.get("from_run", ".")),
        *(str(folder / Path(first).name) for folder in (workdir.absolute().parent, workdir)),
        named,
    ]
    found = [folder for folder in (looked if given is None else [first]) if _is_data(folder)]
    if not found and first == "DIR":
        raise InputError(
            f"the data of {workdir} were in memory, in no folder: give them again by data=, or "
            "name a folder that they were saved in by --data=DIR"
        )
    if not found:
        raise InputError(
            f"the data of {workdir} are not in {first}{', nor next to the run' * (given is None)}: "
            "name their folder by --data=DIR, or make them again: "
            f"{command(config, place)} --out={first}"
        )
    data = config["data"]
    return next((folder for folder in found if _hash(folder, data) == digest), found[0])


def command(config: dict[str, Any], place: dict[str, str]) -> str:
    """Returns the command that made a run's data, or the config's, without ``--out``."""
    return place.get("prepared_by") or config["data"].get("prepare") or PREPARE


def _is_data(folder: str | Path) -> bool:
    return (Path(folder) / _JSON).is_file()


def _hash(folder: str, data: dict[str, Any]) -> str | None:
    try:
        return hash_after(files.read_json(Path(folder) / _JSON)["hash"], data)
    except (OSError, ValueError, LookupError, TypeError):
        return None  # damaged: who loads it says so
