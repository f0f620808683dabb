"""The command line flags that all scripts share, and how a script ends."""

import argparse
import contextlib
import os
import signal
import stat
import sys
import traceback
from pathlib import Path

from cxr import errors
from cxr.errors import Failure, Terminated, interrupt_exit_code, number_meant, rank_and_world
from cxr.folders import CLASSES, is_class_name
from cxr.make_all import own_part


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the default behind every help text, and the script's docstring unchanged."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises Failure after an error and shows the flags in groups."""

    def __init__(self, script, description):
        super().__init__(prog=script, description=description, formatter_class=Formatter)

    def groups(self, *titles):
        """Adds one group of flags for each title, and returns them in this order."""
        return [self.add_argument_group(title) for title in titles]

    def parse_args(self, argv=None, namespace=None):
        argv = own_part(sys.argv[1:] if argv is None else argv, self.prog)
        args = super().parse_args(argv, namespace)
        if args.classes and args.classes[0] == args.classes[1]:
            self.error(f"--classes: expected two different names, found {args.classes[0]} twice")
        return args

    def error(self, message):
        raise Failure(f"{message} (see {self.prog} --help; variables of make: make help)")


def number(kind, low, high=float("inf"), percent=0.01):
    """Returns an argparse type: an int or a float (`kind`) from low to high.

    percent: the value that 1 % has, for the answer to a text like 3%.
    """
    limit = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
    expected = f"a whole number {limit}" if kind is int else f"a number {limit}"

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value != float("inf"):
                return value
        meant = number_meant(text, kind, low, high, percent)
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text}{meant}")

    return convert


def class_name(text):
    """The argparse type of --classes."""
    if not is_class_name(text):
        expected = "the name of a folder without spaces at its ends, line breaks or - in front"
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
    return text


def sizes(text):
    """The argparse type of --sizes: different numbers of images, the smallest first."""
    with contextlib.suppress(ValueError):
        numbers = sorted({int(word) for word in text.split(",")})
        if len(numbers) >= 2 and numbers[0] >= 1:
            return numbers
    expected = "two or more different numbers of images, such as 25,50,100,200"
    raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")


# fmt: off
FLAGS = {
    "--data-dir": dict(type=Path, default="data/chestxrays", metavar="DIR",
        help="data folder, which contains train/, val/ and test/"),
    "--classes": dict(nargs=2, type=class_name, default=CLASSES, metavar=("NEGATIVE", "POSITIVE"),
        help="names of the two class folders; the second one is the disease, the positive class"),
    "--checkpoint": dict(type=Path, default="model.pth", metavar="FILE",
        help="file of the trained network; its .json has the same name"),
    "--results-dir": dict(type=Path, default=Path("results"), metavar="DIR",
        help="folder for the report, tables and pictures"),
    "--device": dict(default="auto", metavar="NAME",
        help="auto (CUDA if there is a GPU, then MPS, then CPU), cpu, cuda, cuda:N or mps"),
    "--feature-batch-size": dict(type=number(int, 0, 100_000), default=0, metavar="N",
        help="views per batch in the frozen network (0 = 256 on CUDA, 32 on MPS, 16 on the CPU)"),
    "--workers": dict(type=number(int, -1, 1000), default=-1, metavar="N",
        help="processes that decode images (0 = decode in the main process, -1 = chosen from the "
             "number of images and of cores)"),
    "--seed": dict(type=number(int, 0, 2**32 - 1), default=0, metavar="N",
        help="seed of random choices"),
    "--cache-dir": dict(type=Path, default=".cache/features", metavar="DIR",
        help="folder that keeps the computed features"),
    "--no-cache": dict(action="store_true",
        help="compute all features again, and keep none of them"),
    "--skip-bad": dict(action="store_true",
        help="leave out images that cannot be read, and list them, instead of stopping"),
    "--debug": dict(action="store_true", help="show the Python traceback of an error"),
}
# fmt: on


def add_flags(group, *names):
    """Adds flags that mean the same in every script."""
    for name in names:
        group.add_argument(name, **FLAGS[name])


def add_network_flags(data, output, machine):
    """Adds the shared flags of the scripts that use the network: all except --seed."""
    add_flags(data, "--data-dir", "--skip-bad")
    add_flags(output, "--checkpoint", "--results-dir", "--cache-dir", "--no-cache")
    add_flags(machine, "--device", "--feature-batch-size", "--workers", "--debug")


def call(command, parse_args, flags):
    """Runs command(parse_args(flags)) for a notebook or another program, and returns its result.

    flags: a list of any objects whose str() is a flag or its value. An error for which `run` prints
    a line raises Failure with this line (Ctrl-C: KeyboardInterrupt). But a Failure that has a
    result is not raised, and its result is returned.
    """
    args = parse_args([str(flag) for flag in flags])
    try:
        return command(args)
    except Failure as failure:
        if failure.result is None:
            raise
        return failure.result
    except (MemoryError, OSError) as error:
        status, message = describe_error(error, args)
        raise Failure(message, status) from error


def run(command, parse_args, argv, script):
    """Runs command(parse_args(argv)) as a script and returns the exit code.

    argv: the command line, None for that of this process. Prints an error as one line on stderr
    that begins with `script`, the name of the script.
    """
    if rank_and_world()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # under torchrun, only rank 0 prints
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # the streams of a notebook have no reconfigure
            stream.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8
    previous_handlers = handle_signals()
    args = argparse.Namespace(debug=False)  # until the flags are known
    try:
        args = parse_args(argv)
        command(args)
        sys.stdout.flush()
        return 0
    except (Failure, KeyboardInterrupt, MemoryError, OSError) as error:
        status, message = describe_error(error, args)
        if isinstance(error, BrokenPipeError):
            # Python would fail again when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.debug:
            traceback.print_exc()
        one_line = " ".join(message.split())
        print(f"{script}: {one_line}", file=sys.stderr, flush=True)
        return status
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def handle_signals():
    """Handles SIGTERM, and SIGHUP unless it is ignored (nohup). Returns the previous handlers."""
    handlers = {signal.SIGTERM: on_sigterm}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = on_sighup
    with contextlib.suppress(ValueError):  # only the main thread may set a signal handler
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}
    return {}


def on_sighup(*_):
    """Ends the run like SIGTERM. This is the signal handler for SIGHUP, a lost connection."""
    # The terminal is gone, so that each further line would be an error.
    for stream in (sys.stdout, sys.stderr):
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # isatty() is False by now
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    on_sigterm()


def on_sigterm(*_):
    """Raises Terminated. This is the signal handler for SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        # torch's own handler would raise an error when its workers end by SIGTERM as well. SIG_DFL
        # instead of a function would print a traceback if a worker has ended already.
        signal.signal(signal.SIGCHLD, lambda *_: None)
    raise Terminated


def describe_error(error, args):
    """Returns (exit code, message) of an error that is not a bug."""
    if isinstance(error, Failure):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return interrupt_exit_code(error), str(error) or errors.INTERRUPTED
    if isinstance(error, MemoryError):
        if "feature_batch_size" not in args:
            return 4, "the memory is full"
        smaller = "a smaller --feature-batch-size (make: FEATURE_BATCH_SIZE=8)"
        return 4, f"the memory is full; use {smaller} or --workers 0 (make: WORKERS=0)"
    if isinstance(error, BrokenPipeError):
        return 4, "the output was cut off (for example by `head`); each written file is complete"
    message = f"{error.filename or 'a file'}: {error.strerror or error}"
    if error.errno in errors.DISK_FULL:
        message += "; free some disk space, or write to another place"
    return 4 if error.errno in errors.RESOURCES else 2, message
