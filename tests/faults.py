"""What the tests of faults share: a tiny network, damaged bytes, a hostile pickle, and processes that start at once."""

import atexit
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from torchvision.models._api import register_model  # as a package with models of its own does

ROOT = Path(__file__).resolve().parent.parent


class TinyFaults(torch.nn.Module):
    """A classifier of 0.1 ms, with BatchNorm and global average pooling as the large ones have them."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 9, stride=8, bias=False)
        self.bn = torch.nn.BatchNorm2d(8)
        self.act = torch.nn.ReLU()
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.act(self.bn(self.conv(x)))), 1))


@register_model()
def tiny_faults(*, weights=None, **config):
    return TinyFaults(**config)


# ---------------------------------------------------------------- damage


def damage(rng, data, start=0, stop=None):
    """(what was done, the bytes after it), another content than before. start, stop: where the damage may begin."""
    stop = len(data) if stop is None else stop
    while True:
        kind, at, changed = rng.choice(KINDS), rng.randrange(start, stop), bytearray(data)
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "random":
            changed[at : at + 16] = rng.randbytes(len(changed[at : at + 16]))
        elif kind == "zero":
            length = len(changed[at : at + rng.choice((16, 64, 512, 4096))])
            changed[at : at + length] = bytes(length)
        elif kind == "truncate":
            del changed[at:]
        else:
            length, source = rng.choice((8, 64, 512)), rng.randrange(len(data))
            changed[at : at + length] = data[source : source + length]  # changes the length near the end, too
        if changed != data:
            return f"{kind} at {at} of {len(data)}", bytes(changed)


KINDS = ("flip", "random", "zero", "truncate", "splice")


class Touch:
    """Unpickled, it makes a file: the proof that code of a checkpoint was run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


def listing(folder):
    """{path: what stands there} of everything under `folder`: times of folders aside, all that a user could miss."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        elif path.is_file():
            state = path.stat()
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest(), state.st_mode, state.st_mtime_ns
        else:
            found[str(path)] = path.stat().st_mode
    return found


class Memory:
    """Megabytes that this process has needed at its peak beyond what it had at the start."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the earlier peak
        self.start = self.read("VmRSS")

    def read(self, name):
        return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024

    def more(self):
        return self.read("VmHWM") - self.start


@contextlib.contextmanager
def within(seconds):
    """An AssertionError where the body takes longer: a hang is a fault, too."""

    def late(*_):
        raise AssertionError(f"not finished within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- processes


def session_of(pid):
    """The living processes of the session that `pid` leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_ready(pid, timeout=60):
    """Waits until the process answers SIGTERM itself: from there on a signal gets one line."""
    deadline = time.time() + timeout
    while time.time() < deadline:
        caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)
    raise AssertionError(f"{pid} does not answer signals after {timeout} s")


class Zygote:
    """Starts scripts in 10 ms: a process that has imported everything forks for each of them."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        code = "import faults; faults.serve()"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, argv, log):
        """The pid of a session that runs `script` ("train" or "module:function"), stdout and stderr in `log`."""
        return self.ask(script=script, argv=[str(part) for part in argv], log=str(log))

    def wait(self, pid):
        """The exit status, negative for the signal that killed it."""
        return self.ask(wait=pid)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def serve():
    for name in ("evaluate", "train", "split_val", "matplotlib.backends.backend_agg", "torchmetrics.functional"):
        __import__(name)
    gc.freeze()
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            os.setsid()
            log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for number in (1, 2):
                os.dup2(log, number)
            sys.stdin = open(os.devnull)
            module, _, function = request["script"].partition(":")
            sys.argv = [f"{module}.py", *request["argv"]]
            status = 1
            try:
                status = getattr(__import__(module), function or "main")(request["argv"])
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(status)  # to take torch down would take a second
        print(json.dumps(answer), flush=True)
    os._exit(0)


def end_slowly(argv):
    """A script that needs a second to end, as one that saves a model does."""
    import argparse

    import common

    def command(args):
        try:
            time.sleep(60)
        finally:
            time.sleep(1)
            print("ended in order")

    return common.run(command, argparse.Namespace(debug=False))


def swallow(argv):
    """A script in which a library swallows a first interrupt, and makes an error of its own of the second."""
    import argparse
    import contextlib

    import common

    class Deleted:
        def __del__(self):
            time.sleep(60)  # where Python swallows every exception, with a traceback

    def command(args):
        Deleted()
        with contextlib.suppress(KeyboardInterrupt):
            common.raise_if_stopped()
            print("not stopped")
        try:
            time.sleep(60)
        except BaseException:
            raise AttributeError("half an import") from None

    return common.run(command, argparse.Namespace(debug=False))


def slow_images(argv):
    """train.py with images that take a second to decode."""
    import common
    import train

    true = common.load_image
    common.load_image = lambda path: (time.sleep(1), true(path))[1]
    common.FeatureStore.__init__ = lambda *_: None
    return train.main(argv)


def small_files(argv):
    """train.py where no file may grow beyond 6 kB."""
    import train

    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    return train.main(argv)


def save_for_ever(argv):
    """Writes model.pth, model.json, history.csv, predictions.csv and a picture again and again, until it is killed."""
    import numpy as np

    import common
    import evaluate
    import train

    folder, rng = Path(argv[0]), random.Random(0)
    network, head, width, _ = common.build_network("resnet18")
    for number in range(10**6):
        weight = torch.full((width,), float(number))
        trained = train.Trained(weight, float(number), number, 0.1, 0.9, [(1, 0.1, 0.9, 0.1, 0.9, 1e-3)])
        train.save_checkpoint(folder / "model.pth", network, head, trained, {"arch": "resnet18", "epoch": number})
        train.write_history(folder / "results" / "history.csv", [(number, *trained.history[0][1:])] * 2)
        table = evaluate.Table([f"{i}.png" for i in range(200)], [i % 2 for i in range(200)], None, [""] * 200)
        probs = np.full(200, rng.random(), np.float32)
        evaluate.write_predictions(folder / "results" / "predictions.csv", table._replace(probs=probs), 0.5)
        common.write_json(folder / "results" / "metrics.json", {"n": number, "text": "x" * 5000})
        train.draw_curves(folder / "results" / "curves.png", trained.history, 1)
