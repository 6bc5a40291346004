"""Checkpoints by Orbax: the latest state to resume from, and the best parameters.

``latest/`` holds the training state as it is, rows not settled: settling on the way would change
last bits, and a resumed run would no longer be the run. ``best/`` holds settled parameters. Both
are kept by their own policy, so neither can push the other out.

Tables are saved in the order of their ids, whatever the number of devices (``parallel.in_order``),
with rows of zeros at their end where that number asks for them; restoring cuts or adds such rows.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from conet_jax.errors import InputError

logging.set_verbosity(logging.ERROR)  # Orbax reports every step of every save


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
        """Returns the epoch of the newest state, or None."""
        return self._latest.latest_step()

    def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns (state, progress) of the newest state; ``like`` has its shapes and devices."""
        restored = _restore(
            self._latest, self._latest.latest_step(), state=like, progress=ocp.args.JsonRestore()
        )
        return restored["state"], restored["progress"]

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
    if epoch in manager.all_steps():
        manager.delete(epoch)  # a resumed run comes by the same epoch again
    manager.save(epoch, args=ocp.args.Composite(**items), force=True)
    manager.wait_until_finished()


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
