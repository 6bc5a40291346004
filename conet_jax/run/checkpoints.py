"""Checkpoints by Orbax: the latest state to resume from, and the best parameters.

``latest/`` holds the training state as it is, rows not settled: settling on the way would change
last bits, and a resumed run would no longer be the run. ``best/`` holds settled parameters. Both
are kept by their own policy, so neither can push the other out.

Beside what Orbax writes stands ``hashes.json``, the SHA-256 of each of its files: Orbax itself does
not notice a flipped bit of an array. A checkpoint that is not as it was written is passed over for
the one before, with a warning.

Tables are saved in the order of their ids, whatever the number of devices (``devices.in_order``),
with rows of zeros at their end where that number asks for them; restoring cuts or adds such rows.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from conet_jax.devices import processes
from conet_jax.errors import InputError
from conet_jax.files import write_json

# Orbax reports every step of every save, and each error with a traceback before it raises it.
logging.set_verbosity(logging.FATAL)

# TensorStore (0.1.86) never frees the keys of JSON that it makes Python of. For its log alone Orbax
# asks it with each save how many bytes it has written: 20 kB a save, seen in tests/soak.py. What is
# left, 200 bytes an array and save, is of ``KvStore.Spec.to_json``, which Orbax needs.
with contextlib.suppress(ImportError):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0


class Checkpoints:
    """Latest and best checkpoints under one folder.

    Args:
      directory: made if absent.
    """

    def __init__(self, directory: str | Path) -> None:
        root = Path(directory).absolute()
        # Two each: a crash while one is written leaves the other.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._latest = ocp.CheckpointManager(root / "latest", options=options)
        self._best = ocp.CheckpointManager(root / "best", options=options)

    def save_latest(self, epoch: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves the state after ``epoch`` epochs and what else a run must know to go on."""
        _save(self._latest, epoch, state=ocp.args.StandardSave(state), progress=progress)

    def save_best(self, epoch: int, params: Any) -> None:
        """Saves settled parameters of the best epoch so far."""
        _save(self._best, epoch, params=ocp.args.StandardSave(params))

    def forget_after(self, epoch: int) -> None:
        """Deletes best parameters of later epochs, which a run that resumes comes by again."""
        for step in self._best.all_steps():
            if step > epoch:
                self._best.delete(step)

    def latest_epoch(self) -> int | None:
        """Returns the epoch of the newest state, as it was written or not, or None."""
        return self._latest.latest_step()

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns (state, progress) of the newest state that is as it was written.

        Args:
          like: has the state's shapes and devices.

        Raises:
          InputError: none is, or it is of another config.
        """
        epoch = int(processes.agreed(lambda: np.int32(self._newest()), np.int32(0)))
        restored = _restore(self._latest, epoch, state=like, progress=ocp.args.JsonRestore())
        return restored["state"], restored["progress"]

    def _newest(self) -> int:
        """The newest epoch whose state, and the best parameters that it counts on, are intact."""
        passed_over = []
        for epoch in sorted(self._latest.all_steps(), reverse=True):
            folder = Path(self._latest.directory) / str(epoch)
            reason = problem(folder)
            best = 0 if reason else _best_epoch(folder)
            if best:
                folder = Path(self._best.directory) / str(best)
                reason = problem(folder)
            if not reason:
                for line in passed_over:
                    print(f"warning: {line}; taking that of epoch {epoch}", file=sys.stderr)
                return epoch
            passed_over.append(f"the checkpoint in {folder} is damaged ({reason})")
        raise InputError(
            f"{passed_over[0]}, and no earlier one is whole: train anew in another --workdir"
        )

    def restore_best(self, epoch: int, like: Any) -> Any:
        """Returns the parameters saved as best at ``epoch``."""
        return _restore(self._best, epoch, params=like)["params"]

    def close(self) -> None:
        """Closes both managers."""
        self._latest.close()
        self._best.close()


def _save(manager: ocp.CheckpointManager, epoch: int, **items: Any) -> None:
    if "progress" in items:
        items["progress"] = ocp.args.JsonSave(items["progress"])
    _check_room(manager.directory, items)
    try:
        if epoch in manager.all_steps():
            manager.delete(epoch)  # a resumed run comes by the same epoch again
        manager.save(epoch, args=ocp.args.Composite(**items), force=True)
        manager.wait_until_finished()
        if processes.is_main():
            folder = Path(manager.directory) / str(epoch)
            write_json(folder / _HASHES, _hashes(folder))
    except Exception as error:  # TensorStore has the system's errors as ValueError and others
        number = getattr(error, "errno", None)
        if number is None:
            number = next((n for n in _OF_DISKS if os.strerror(n) in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(manager.directory)) from error


_HASHES = "hashes.json"
_METADATA_BYTES = 1 << 17  # about what Orbax writes beside the arrays


def _check_room(folder: Any, items: dict[str, Any]) -> None:
    """Raises ``OSError`` before Orbax fails half way, whose threads print tracebacks then."""
    arrays = [item.item for item in items.values() if isinstance(item, ocp.args.StandardSave)]
    needed = _METADATA_BYTES + sum(array.nbytes for array in jax.tree.leaves(arrays))
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed // jax.process_count():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


_OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ENOENT,
)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by path of all files of a checkpoint."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name not in (_HASHES, f".{_HASHES}.tmp"):
            with open(path, "rb") as file:
                name = path.relative_to(folder).as_posix()
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _best_epoch(folder: Path) -> int:
    """Epoch of the best parameters that a state counts on, 0 for none or what cannot be read."""
    try:
        return json.loads((folder / "progress" / "metadata").read_text("utf-8"))["best_epoch"]
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def problem(folder: Path) -> str:
    """Returns how a checkpoint differs from what was written, nothing if it does not.

    One without hashes is of an earlier version if no other beside it has any; else its process was
    killed before they were written.
    """
    path = folder / _HASHES
    try:
        if not path.exists():
            sealed = any(folder.parent.glob(f"*/{_HASHES}"))
            return f"{_HASHES} is missing" if sealed or not folder.is_dir() else ""
        written, found = json.loads(path.read_text("utf-8")), _hashes(folder)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    if not isinstance(written, dict):
        return f"{_HASHES} is not as it was written"
    for name, digest in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not as it was written"
    return ""


def _restore(manager: ocp.CheckpointManager, epoch: int, **items: Any) -> Any:
    try:
        stored = manager.item_metadata(epoch)
        for name, like in items.items():
            if name != "progress":
                like = jax.tree.map(_abstract, like)
                _check_widths(like, stored[name])
                items[name] = ocp.args.StandardRestore(like, strict=False)
        return manager.restore(epoch, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises many kinds for missing, altered and unlike files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise InputError(
            f"the checkpoint in {manager.directory / str(epoch)} is damaged, or of another config "
            f"({type(error).__name__}: {reason}); take it away to go on from an earlier one, or "
            "train anew in another --workdir"
        ) from None


def _check_widths(like: Any, stored: Any) -> None:
    """Raises ``ValueError`` where more than the number of rows differs."""
    ours, theirs = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
        for leaves in map(jax.tree.leaves_with_path, (like, stored))
    )
    for name, shape in ours.items():
        if name in theirs and tuple(shape[1:]) != tuple(theirs[name][1:]):
            raise ValueError(f"{name} is {theirs[name]}, where {shape} was expected")


def _abstract(like: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
