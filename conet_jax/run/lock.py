"""One owner of a folder: a lock that a process holds, and that the system frees when it ends.

It is ``flock`` on FOLDER/.lock, which stays there and says who has it or had it. Over NFS Linux
makes a lock of the server of it; a file system without locks gets a warning, and no owner.
"""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import jax

from conet_jax.devices import processes
from conet_jax.errors import InputError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK = ".lock"  # of process 0; of process i of a run .lock.i


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Owns a folder, which exists, for all processes of this run.

    Raises:
      InputError: another process has it, or a file cannot be made in it.
    """
    with ExitStack() as held:

        def take() -> None:
            held.callback(_lock(folder / LOCK).close)
            # A process of an earlier run may outlive its process 0 for some seconds.
            for path in folder.glob(f"{LOCK}.*"):
                _lock(path).close()

        processes.together(take)
        if not processes.is_main():
            held.callback(_lock(folder / f"{LOCK}.{jax.process_index()}").close)
        yield


def _lock(path: Path) -> BinaryIO:
    """Opens a file and locks it until it is closed."""
    try:
        file = open(path, "a+b")  # NFS asks for a file that can be written  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent}: {error.strerror}; take another --workdir"
        ) from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        file.flush()
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise InputError(
            f"{path.parent} is in use by {owner}: wait until it has ended, or take another "
            "--workdir"
        ) from None
    except OSError as error:
        print(
            f"warning: {path.parent} cannot be locked ({error.strerror}): see to it that no other "
            "process writes to it",
            file=sys.stderr,
        )
    return file
