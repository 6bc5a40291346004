"""Safe reads and writes.

What is read may have been written or altered by somebody else. Whatever is wrong with a file ends
in ``OSError`` or ``ValueError``, never in a hang (a named pipe without a writer), a crash of the
parser, or code that a file brought along (pickle).

What is written stands beside its place until it is whole, and is then renamed: no reader finds half
a file, and a crash leaves the one before.
"""

import csv
import io
import json
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from conet_jax.errors import InputError

if TYPE_CHECKING:
    import polars

JSON_BYTES = 64 << 20  # far beyond anything that is written here


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """Opens a file for reading bytes, if it is one.

    Raises:
      OSError: it is missing, unreadable or no regular file; opening a named pipe would wait.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise OSError("the name holds a NUL character")
    mode = os.stat(name).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open() says what a folder is
        raise OSError("it is a pipe or a device: expected a regular file, so copy it to one")
    return open(name, "rb")


def parse_json(text: str | bytes) -> Any:
    """Returns ``json.loads(text)``.

    Raises:
      ValueError: it is not JSON, or nested more deeply than Python's parser can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | os.PathLike) -> Any:
    """Returns the contents of a JSON file of at most 64 MiB.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not JSON in UTF-8, or too large.
    """
    with open_regular(path) as file:
        data = file.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise ValueError(f"larger than {JSON_BYTES >> 20} MiB")
    return parse_json(data.decode("utf-8"))


def read_array(path: str | os.PathLike) -> np.ndarray:
    """Returns the array of an .npy file; an array of objects, which is pickle, is refused.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no array of plain numbers, or damaged.
    """
    with open_regular(path) as file:
        return _array(file)


def read_arrays(path: str | os.PathLike, names: Sequence[str]) -> list[np.ndarray]:
    """Returns named arrays of an .npz file as ``numpy.savez`` writes it, without compression.

    Raises:
      OSError: the file cannot be read.
      ValueError: an array is missing or damaged, or compressed: what few bytes can become then has
        no bound.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as members:
                found = []
                for name in names:
                    info = members.getinfo(f"{name}.npy")
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"{name} is compressed: expected what numpy.savez writes")
                    with members.open(info) as member:
                        found.append(_array(member))
                return found
        except (OSError, ValueError):
            raise
        except Exception as error:  # BadZipFile, KeyError, NotImplementedError, RuntimeError, ...
            raise ValueError(str(error) or type(error).__name__) from None


def _array(file: Any) -> np.ndarray:
    try:
        values = np.lib.format.read_array(file, allow_pickle=False)
        rest = file.read(1)  # to the end: in an .npz that is where the checksum is compared
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged header can raise nearly anything, MemoryError included
        raise ValueError(str(error) or type(error).__name__) from None
    if rest:
        raise ValueError("bytes after the end of the array")
    return values


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


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows of the same columns as CSV, their names first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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


def write_frames(path: Path, frames: Iterable["polars.DataFrame"]) -> None:
    """Writes tables of one schema, one after another, to one file beside ``path``, and renames it.

    No more than one of them is in memory at once.

    Args:
      path: the file; its suffix, one of ``FRAME_SUFFIXES``, is the format.
      frames: one or more.

    Raises:
      InputError: the suffix is another, or the file cannot be written.

    Example:
      >>> import tempfile
      >>> import polars as pl
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
            import polars  # with so many processes that write no frame, worth its wait only here

            polars.scan_parquet(folder / "*.parquet").sink_parquet(file)
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
