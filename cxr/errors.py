"""Errors that the user can fix, warnings, progress lines and progress bars.

A script that fails prints one line on stderr, and its exit code says why: 2 the user's input, 3 a
number that is not finite, 4 resources (disk, memory, device), 130 Ctrl-C, 143 SIGTERM.
`cxr.cli.run` prints the line.
"""

import contextlib
import errno
import os
import re
import shlex
import sys

from tqdm import tqdm

LIST_ALL = "--check --json check.json (make check ARGS='--json check.json') lists all"
UNDO = "split_val.py --undo (make split ARGS=--undo)"
UNDO_TEST = "split_val.py --undo test (make split ARGS='--undo test')"
SHOWN = 5  # lines shown of one kind of message
INTERRUPTED = "interrupted; each output file is complete: either the old or the new version"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: larger than a file may be
RESOURCES = (*DISK_FULL, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


class Failure(Exception):
    """An error that is not a bug. Its message says what was expected, found, and what to do.

    status: the exit code of the script; result: what was made in spite of the error. A script then
    ends with the exit code, and a function for notebooks (`cxr.cli.call`) returns the result.
    """

    def __init__(self, message, status=2, result=None):
        super().__init__(message)
        self.status = status
        self.result = result


class Terminated(KeyboardInterrupt):
    """SIGTERM. It is a KeyboardInterrupt, so code that handles Ctrl-C handles SIGTERM as well."""


def interrupt_exit_code(error):
    """Returns the exit code for a KeyboardInterrupt: 143 for SIGTERM, 130 for Ctrl-C."""
    return 143 if isinstance(error, Terminated) else 130


def is_system_error(error):
    """Returns True if reading failed for another reason than damage, for example full memory."""
    if isinstance(error, OSError) and error.errno in RESOURCES:
        return True
    return isinstance(error, MemoryError | PermissionError)


def rank_and_world():
    """Returns (rank, number of processes) under torchrun, otherwise (0, 1)."""
    # RANK alone is not enough: other programs set it, and then images would be left out.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def as_typed(flag, variable, value):
    """Returns a flag as a user types it, "--flag VALUE (make: VARIABLE=VALUE)", for messages."""
    value = shlex.quote(str(value))
    return f"{flag} {value} (make: {variable}={value})"


def number_meant(text, kind=float, low=0, high=1, percent=0.01):
    """Returns "; did you mean 0.001?" for a text like "0,001" or "3%", otherwise "".

    kind: int or float, from low to high; percent: the value that 1 % has.
    """
    plain, factor = text.strip(), 1
    if kind is int:
        plain = re.sub(r",(?=\d{3}\b)", "", plain)  # 1,000
    elif plain.endswith("%"):
        plain, factor = plain[:-1], percent
    plain = plain.replace(",", ".")
    with contextlib.suppress(ValueError):
        value = float(plain) * factor
        if plain != text and low <= value <= high and value == kind(value):
            return f"; did you mean {value:.10g}?"
    return ""


def either(words):
    """Joins words for a sentence: "a, b or c"."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def progress(message):
    """Prints a line at once."""
    # After `| head`, or when the terminal was closed: a progress line must not end the work.
    with contextlib.suppress(OSError):
        print(message, flush=True)


def show_progress(title, total, unit):
    """Returns a tqdm bar with the time left. In a log file, it is one line every 30 seconds.

    unit: what is counted, with a space in front: " views".
    """
    is_terminal = sys.stderr.isatty()
    interval = 0.1 if is_terminal else 30
    return tqdm(
        desc=title,
        total=total,
        unit=unit,
        mininterval=interval,
        miniters=1,  # otherwise tqdm chooses a number, and prints more often than that
        delay=0 if is_terminal else interval,  # a short task prints nothing into a log file
        ascii=None if is_terminal else True,  # None: tqdm looks at the encoding
        disable=rank_and_world()[0] > 0,
    )


def warn(message):
    """Prints a warning on stderr, under torchrun only once."""
    if rank_and_world()[0] == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
