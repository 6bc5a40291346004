"""SIGTERM, SIGHUP, Ctrl-C: training saves what it has between two calls of its program, and ends.

Launchers call ``install``; without it, as in a notebook, signals do what they always do. While a
run can save itself (``deferred``) the first signal is a request that training asks for with
``requested``; at any other time, and the second, it raises ``Interrupted``. A call into compiled
code can keep Python from noticing: after ``GRACE_SECONDS`` a thread ends the process, and the run
goes on from the checkpoint before. All files are written beside their place, so any moment will do.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

GRACE_SECONDS = 8.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_pending = 0  # the signal that was asked to stop by
_deferred = 0  # how many runs, one in another, can save themselves
_ended = False  # whether the user has been told
_of_terminal: list[int] = []  # stdout, 1, and stderr, 2, where they were a terminal at the start


class Interrupted(KeyboardInterrupt):
    """The process is to end because of a signal; launchers exit with status 128 + ``signum``."""

    def __init__(self, signum: int, after: str = "") -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}: {after}" if after else f"stopped by {name}")
        self.signum = signum


def install() -> None:
    """Handles these signals until the process ends; to be called by its main thread.

    SIGHUP stays ignored where it is: under ``nohup``.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for signum in _SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _handle)
    _of_terminal[:] = [number for number in (1, 2) if os.isatty(number)]
    threading.Thread(target=_end_in_time, args=(receiver,), daemon=True).start()


def _handle(signum: int, _frame: object) -> None:
    global _pending
    if signum == signal.SIGHUP:  # the terminal has gone; to write to it would be an error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in _of_terminal:
            os.dup2(nowhere, number)
        os.close(nowhere)
    if _pending or not _deferred:
        raise Interrupted(signum)
    _pending = signum
    _say(f"{signal.Signals(signum).name}: saving; once more to stop at once")


def _end_in_time(receiver: int) -> None:
    while True:
        signum = os.read(receiver, 1)[0]
        if signum in _SIGNALS:
            break
    threading.Event().wait(GRACE_SECONDS)
    if not _ended:
        name = signal.Signals(signum).name
        _say(f"stopped by {name} in a long call; the same command goes on from what it had saved")
    os._exit(128 + signum)


def end(error: KeyboardInterrupt) -> NoReturn:
    """Says what stopped the process and exits; should that take long, the thread does."""
    global _ended
    _say(str(error) or "stopped by SIGINT")
    _ended = True
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # one more would be an error in an exit handler
    sys.exit(128 + getattr(error, "signum", signal.SIGINT))


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it
        os.write(2, f"{text}\n".encode())  # print may have been interrupted by the signal


@contextmanager
def deferred() -> Iterator[None]:
    """While a run asks ``requested``; raises ``Interrupted`` at the end for a signal not seen."""
    global _deferred
    _deferred += 1
    try:
        yield
        if signum := requested():
            raise Interrupted(signum)
    finally:
        _deferred -= 1


def requested() -> int:
    """Returns the signal that a run is to stop by, 0 for none; all its processes the same."""
    import jax

    if not _deferred or jax.process_count() == 1:
        return _pending
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(_pending).max())
