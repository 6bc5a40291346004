"""Standard streams that are closed, whose reader goes away, or that write ASCII alone."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GONE = 141  # exit status where the reader of the output has gone: 128 and the number of SIGPIPE


def prepare() -> None:
    """Makes standard streams usable: closed ones lead nowhere, what cannot be encoded is escaped.

    A file that is opened later would else take the place of a closed stream, and be written over.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _lead_nowhere(number)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not so of a notebook's
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def while_read() -> Iterator[None]:
    """Ends the process with status ``GONE``, without a word, once nobody reads its output.

    Raises:
      OSError: what was printed cannot be written, for another reason.
    """
    try:
        yield
    finally:  # here, since an error at exit would be a traceback
        ending = sys.exception()
        broken = isinstance(ending, BrokenPipeError)  # by print, if not by another pipe
        found = [error for number in (1, 2) if (error := _flush(number, look=broken))]
        well = ending is None or (isinstance(ending, SystemExit) and not ending.code)
        if found and (well or broken):
            if isinstance(found[0], BrokenPipeError):
                sys.exit(GONE)
            raise found[0]


def _flush(number: int, *, look: bool) -> OSError | None:
    """Writes out stdout, 1, or stderr, 2; where it cannot, it goes nowhere, and returns why.

    Args:
      number: of the stream.
      look: whether a pipe that nobody reads is an error even if nothing is left to be written.
    """
    try:
        (sys.stdout, sys.stderr)[number - 1].flush()
        poll = select.poll()
        poll.register(number, 0)
        if look and any(event & select.POLLERR for _, event in poll.poll(0)):
            raise BrokenPipeError
    except OSError as error:
        _lead_nowhere(number)
        return error
    return None


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(nowhere, number)
        os.close(nowhere)
