"""Where a run's numbers go: metrics.jsonl for programs, the console and TensorBoard for people."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TextIO

import numpy as np
import polars as pl

from conet_jax.config import flatten
from conet_jax.errors import InputError
from conet_jax.files import parse_json


def make_folder(path: Path) -> None:
    """Makes a folder for results where it is absent.

    Raises:
      InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror}; see to it, or name another"
        ) from None


def make_report_folder(path: Path) -> None:
    """``make_folder`` for what is made of many runs: not in the folder of a run or of data.

    Raises:
      InputError: it cannot be made, or is such a folder.
    """
    for name, what in (("config.json", "a run"), ("dataset.json", "prepared data")):
        if (path / name).exists():
            raise InputError(f"{path} holds {what} ({name}): take another --workdir")
    make_folder(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside ``path`` and renames it, so that no reader finds half a file."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text beside ``path``, flushes it to disk and renames it."""
    write_with(path, lambda file: file.write(text.encode("utf-8")))


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes arrays as .npz beside ``path``, flushes them to disk and renames the file."""
    write_with(path, lambda file: np.savez(file, **arrays))


def append_line(path: Path, value: Any) -> None:
    """Adds a JSON object as the last line of a file, which no reader finds half of.

    All of it is written anew: a thousand lines take milliseconds.
    """
    before = path.read_bytes() if path.exists() else b""
    line = json.dumps(value, allow_nan=False) + "\n"
    write_with(path, lambda file: file.writelines((before, line.encode("utf-8"))))


FRAME_SUFFIXES = (".csv", ".jsonl", ".parquet")


def check_frames_path(path: Path) -> None:
    """Raises ``InputError`` where ``write_frames`` would not know the format."""
    if path.suffix not in FRAME_SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {', '.join(FRAME_SUFFIXES)}")


def write_frames(path: Path, frames: Iterable[pl.DataFrame]) -> None:
    """Writes tables of one schema, one after another, to one file beside ``path``, and renames it.

    No more than one of them is in memory at once.

    Args:
      path: the file; its suffix, one of ``FRAME_SUFFIXES``, is the format.
      frames: one or more.

    Raises:
      InputError: the suffix is another, or the file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "out.jsonl"
      ...     write_frames(path, [pl.DataFrame({"a": [1]}), pl.DataFrame({"a": [2]})])
      ...     print(path.read_text().split())
      ['{"a":1}', '{"a":2}']
    """
    check_frames_path(path)

    def rows(file: BinaryIO) -> None:
        for number, frame in enumerate(frames):
            if path.suffix == ".jsonl":
                frame.write_ndjson(file)
            else:
                frame.write_csv(file, include_header=not number)

    def parquet(file: BinaryIO) -> None:
        # A Parquet file ends in an index of the whole: the parts wait on disk, not in memory.
        folder = path.with_name(f".{path.name}.parts")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            for number, frame in enumerate(frames):
                frame.write_parquet(folder / f"{number:08}.parquet")
            pl.scan_parquet(folder / "*.parquet").sink_parquet(file)
        finally:
            shutil.rmtree(folder)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_with(path, parquet if path.suffix == ".parquet" else rows)
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror}; see to it, or name another"
        ) from None


def write_with(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Lets ``write`` fill a file beside ``path``, flushes it to disk and renames it."""
    beside = path.with_name(f".{path.name}.tmp")  # one name: a killed run leaves one at most
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_names(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """Flushes the renaming of a file, too; not every system lets folders be opened."""
    if sys.platform != "win32":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class MetricsFile:
    """metrics.jsonl: one JSON object an epoch, in order, without gaps.

    Args:
      path: the file.
      epochs: rows of later epochs are dropped: a run that resumes after epoch ``epochs`` comes by
        them again.
    """

    def __init__(self, path: Path, *, epochs: int) -> None:
        self._path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = parse_json(line)
                    epoch = int(row["epoch"])
                except (ValueError, LookupError, TypeError, OverflowError):  # of a killed run
                    break
                if epoch <= epochs:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        """Appends one row and flushes it to disk.

        Raises:
          OSError: the file has gone, or there is no room.
        """
        self._path.stat()
        append_line(self._path, row)


def load_tensorboardx() -> ModuleType:
    """Returns ``tensorboardX``.

    Raises:
      InputError: it is not installed.
    """
    try:
        import tensorboardX
    except ImportError:
        raise InputError(
            'event files need tensorboardX: pip install "conet-jax[tensorboard]"'
        ) from None
    return tensorboardX


class TensorBoard:
    """Event files of the numbers of metrics.jsonl, a scalar each under its path: train_loss/target.

    Args:
      folder: of the event files, for ``tensorboard --logdir``.
      epochs: epochs done; TensorBoard forgets those of later epochs, which are come by again.
    """

    def __init__(self, folder: Path, *, epochs: int) -> None:
        # Files are named by the second: without a suffix, a run that goes on within one would
        # overwrite the file before.
        self._writer = load_tensorboardx().SummaryWriter(
            str(folder), purge_step=epochs + 1, filename_suffix=f".{epochs}"
        )

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row and flushes it to disk; ``epoch`` is the step."""
        for name, value in flatten(row).items():
            if name != "epoch" and not isinstance(value, list):
                tag = name.replace(".", "/").replace("@", "_")  # TensorBoard allows no @
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Console:
    """Progress for people: a bar on a terminal, one plain line an epoch elsewhere."""

    def __init__(self, *, epochs: int, steps: int, rows_a_step: int, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._epochs, self._steps, self._rows = epochs, steps, rows_a_step
        self._bar = self._task = None
        if self._out.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} rows/s"),
                TimeRemainingColumn(),
                console=RichConsole(file=self._out),
                transient=True,
            )
            self._task = self._bar.add_task("", total=epochs * steps, loss="-", rate="-")
            self._bar.start()
        self._since = time.perf_counter()

    def chunk(self, *, epoch: int, done: int, steps: int, loss: float) -> None:
        """Moves the bar: ``done`` steps of ``epoch`` (from 1) are done, ``steps`` of them new."""
        now = time.perf_counter()
        rate = f"{self._rows * steps / max(now - self._since, 1e-9):,.0f}"
        self._since = now
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=(epoch - 1) * self._steps + done,
                description=f"epoch {epoch}/{self._epochs}",
                loss=f"{loss:.4f}",
                rate=rate,
            )

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
