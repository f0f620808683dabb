"""Errors that the user can mend, shown as one line."""

import contextlib
import errno
import os
import sys


class Failure(Exception):
    """What the user can mend, printed as one line. status: 2 input, 3 not finite, 4 resources."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled wherever Ctrl-C is."""


def rank_and_world():
    """(rank, number of processes) of torchrun, else (0, 1): a stray RANK must not drop images."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def progress(message):
    """Prints at once; files come before the screen, so that nobody has to read on, as by `head`."""
    with contextlib.suppress(BrokenPipeError):
        print(message, flush=True)


def warn(message):
    if rank_and_world()[0] == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # of a disk, or of what a file may take of it
RESOURCES = *FULL, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE


def is_system_error(error):
    """Whether reading failed for want of memory, of permission, of what the system has."""
    scarce = isinstance(error, OSError) and error.errno in RESOURCES
    return scarce or isinstance(error, MemoryError | PermissionError)


SHOWN = 5  # lines of one kind
