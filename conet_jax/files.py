"""Files that somebody else may have written or altered: opened and parsed within limits.

Whatever is wrong with a file ends in ``OSError`` or ``ValueError``, never in a hang (a named pipe
without a writer), a crash of the parser, or code that a file brought along (pickle).
"""

import io
import json
import os
import stat
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

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
