"""The flags that all scripts share, and exit codes."""

import argparse
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

from cxr.errors import FULL, RESOURCES, Failure, Terminated, rank_and_world


def run(command, args, script):
    """The exit status of command(args); an error is one line, with --debug its traceback, too.

    script: whose name the line begins with; sys.argv has another in a notebook.
    """
    if rank_and_world()[0]:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text in their encoding
        with contextlib.suppress(AttributeError):  # a notebook's own stream
            stream.reconfigure(errors="backslashreplace")
    before = None
    with contextlib.suppress(ValueError):  # only the main thread may set a handler
        before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        command(args)
        sys.stdout.flush()
        return 0
    except (Failure, KeyboardInterrupt, MemoryError, OSError) as error:
        status, message = describe_error(error, args)
        if args.debug:
            traceback.print_exc()
        line = f"{script}: {' '.join(message.split())}"
        print(line, file=sys.stderr, flush=True)
        return status
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def describe_error(error, args):
    """(exit status, message) of an error that is no bug."""
    if isinstance(error, Failure):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        kept = "interrupted; every file is whole, the old one or the new one"
        return 143 if isinstance(error, Terminated) else 130, str(error) or kept
    if isinstance(error, MemoryError):
        remedy = "; try a smaller --batch-size or fewer --workers" if "batch_size" in args else ""
        return 4, f"memory is full{remedy}"
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 4, "nobody reads the screen any more, as after `head`; each file written is whole"
    message = f"{error.filename or 'a file'}: {error.strerror or error}"
    if error.errno in FULL:
        message += "; free some space, or write elsewhere"
    return 4 if error.errno in RESOURCES else 2, message


def on_sigterm(*_):
    if hasattr(signal, "SIGCHLD"):  # torch's handler would raise where workers end by SIGTERM, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Terminated


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default behind every help text, and the docstring as it is."""


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def __init__(self, script, doc):
        super().__init__(prog=script, description=doc, formatter_class=Formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(kind, low, high=float("inf")):
    """An argparse type: a `kind` (int or float) from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            limit = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected a number {limit}, found {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


# fmt: off
FLAGS = {
    "--data-dir": dict(type=Path, default="data/chestxrays", metavar="DIR",
                       help="folder of train/, val/, test/"),
    "--checkpoint": dict(type=Path, default="model.pth", metavar="FILE",
                         help="the trained network"),
    "--results-dir": dict(type=Path, default=Path("results"), metavar="DIR",
                          help="folder for tables and pictures"),
    "--device": dict(default="auto", metavar="NAME",
                     help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps"),
    "--batch-size": dict(type=number(int, 1, 100_000), default=32, metavar="N",
                         help="views at once in the network (CPU: at most 16), images in training"),
    "--workers": dict(type=number(int, -1, 1000), default=-1, metavar="N",
                      help="processes that decode images (0 = none, -1 = by images and cores)"),
    "--seed": dict(type=number(int, 0, 2**32 - 1), default=0, metavar="N",
                   help="seed of every random choice"),
    "--cache-dir": dict(type=Path, default=".cache/features", metavar="DIR",
                        help="folder that keeps features"),
    "--no-cache": dict(action="store_true", help="neither read nor keep features"),
    "--skip-bad": dict(action="store_true",
                       help="leave unreadable images out, and list them, instead of stopping"),
    "--debug": dict(action="store_true", help="show the traceback of an error"),
}
# fmt: on
RUN_FLAGS = tuple(FLAGS)[:-1]  # all of them, for a script with a network


def add_flags(parser, *names):
    """Adds the flags that mean the same in every script."""
    for name in (*names, "--debug"):
        parser.add_argument(name, **FLAGS[name])
