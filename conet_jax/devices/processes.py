"""Several processes of one run: joined before JAX is used, watched while it runs."""

import atexit
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np

from conet_jax.errors import InputError

HEARTBEAT_SECONDS = 30  # a peer silent for so long is dead, and the other processes end


_START_SECONDS = 300  # for all processes to appear


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    """Joins the processes of a run through ``jax.distributed``, before JAX is used.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: of this one, from 0. With all three None they are taken from the cluster (Slurm,
        Open MPI, Kubernetes, TPU pods), and where its environment tells of none there is one
        process.

    Returns:
      Whether there are several processes.

    Raises:
      InputError: some of the three are missing or do not fit, or the others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if not _in_cluster(os.environ):
            return False
    elif None in given:
        raise InputError(
            "--coordinator, --num_processes and --process_id come together, "
            f"got {coordinator}, {num_processes} and {process_id}"
        )
    elif not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id is {process_id}: expected 0 to {num_processes - 1}, one less than "
            "--num_processes"
        )
    elif not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator is {coordinator!r}: expected HOST:PORT of process 0")
    # It would keep SIGTERM from ending the process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes of this run cannot be joined ({error}): start the same command on "
            "each, with the --coordinator that all reach"
        ) from None
    if jax.process_count() == 1:
        return False
    _watch_this_process()
    return True


# JAX ends a process that hears of a dead peer from its coordinator by abort(), with a stack trace
# and before Python could say anything; so another, small process does.
_WATCH = "import sys; sys.stdin.read() or print('error:', sys.argv[1], file=sys.stderr)"


_watcher: subprocess.Popen | None = None


def _watch_this_process() -> None:
    global _watcher
    message = (
        f"process {jax.process_index()} was killed, or ended by JAX since another process of this "
        f"run died or cannot be reached; {_GO_ON}"
    )
    _watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCH, message], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(_dismiss_watcher)


def _dismiss_watcher() -> None:
    if _watcher is not None:
        _watcher.communicate(b"ended")


_GO_ON = "the same commands again go on from the latest checkpoint"


def _in_cluster(environment: Any) -> bool:
    """Whether the environment is that of one process of several, as ``jax.distributed`` reads it.

    >>> _in_cluster({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node001"})
    True
    >>> _in_cluster({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node001"})
    False
    """
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environment):
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    return (
        int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def is_main() -> bool:
    """Whether this is process 0, which writes result files, logs and progress."""
    return jax.process_index() == 0


def together(function: Callable[[], None]) -> None:
    """Runs a check or a write in process 0 alone; all processes go on, or raise its error.

    Raises:
      InputError: that of process 0.
    """
    if jax.process_count() == 1:
        function()
        return
    from jax.experimental import multihost_utils

    message = np.zeros(1024, np.uint8)
    if is_main():
        try:
            function()
        except InputError as error:
            text = str(error).encode()[: len(message)] or b"?"
            message[: len(text)] = np.frombuffer(text, np.uint8)
    message = np.asarray(multihost_utils.broadcast_one_to_all(message)).astype(np.uint8)
    if message.any():
        raise InputError(message.tobytes().rstrip(b"\0").decode(errors="ignore"))


def agreed(function: Callable[[], Any], like: Any) -> Any:
    """Returns what ``function`` returns in process 0 to all processes, or raises its error.

    Args:
      function: called in process 0 alone.
      like: an array of the shape and type of what it returns.

    Raises:
      InputError: that of process 0.
    """
    found: list[Any] = []
    together(lambda: found.append(function()))
    if jax.process_count() == 1:
        return found[0]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(found[0] if found else like))


class PeerLost(RuntimeError):
    """Another process of the run died or cannot be reached; this one cannot go on."""


@contextmanager
def watch_peers() -> Iterator[None]:
    """Turns the errors that a dead peer causes in JAX's runtime into ``PeerLost``.

    Where a peer's silence is all there is (NCCL waits for ever), ``jax.distributed`` ends the
    process after ``HEARTBEAT_SECONDS``, and at once where it was process 0.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of JAX's runtime, but not of one kind
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        if jax.process_count() == 1 or not _OF_PEERS.search(reason):
            raise
        raise PeerLost(
            f"process {jax.process_index()}: another process of this run died or cannot be reached "
            f"({reason}); {_GO_ON}"
        ) from error


_OF_PEERS = re.compile(
    "gloo|nccl|rccl|mpi|barrier|coordination|heartbeat|unavailable|deadline", re.IGNORECASE
)


def leave(message: object) -> NoReturn:
    """Ends this process with a message and status 1, not waiting for peers that are gone."""
    print("error:", message, file=sys.stderr, flush=True)
    _dismiss_watcher()
    os._exit(1)
