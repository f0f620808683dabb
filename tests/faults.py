"""Faults for the tests: damaged bytes, hostile files, odd folders, and processes to kill."""

import builtins
import contextlib
import io
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import struct
import sys
import tarfile
import time
import zlib
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import cxr.bootstrap
import evaluate  # noqa: F401  so that a forked process has imported everything
import train  # noqa: F401

CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")  # all that change a folder


def damage(rng, data):
    """Damages bytes at random. Returns (a description of the damage, the changed bytes)."""
    while True:
        at, changed = rng.randrange(len(data)), bytearray(data)
        kind = rng.choice(("flip", "random", "zero", "truncate", "splice"))
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "random":
            changed[at : at + 16] = rng.randbytes(len(changed[at : at + 16]))
        elif kind == "zero":
            length = len(changed[at : at + rng.choice((16, 512, 4096))])
            changed[at : at + length] = bytes(length)
        elif kind == "truncate":
            del changed[at:]
        else:
            length, source = rng.choice((8, 64, 512)), rng.randrange(len(data))
            changed[at : at + length] = data[source : source + length]
        if changed != data:
            return f"{kind} at {at} of {len(data)}", bytes(changed)


def files(folder):
    """Returns {relative path: content} of all files, except those a killed process left behind.

    The remembered hashes are left out, too: which of them are written depends on the time.
    """
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".tmp"]
    paths = [path for path in paths if path.name != "hashes.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def listing(folder):
    """Returns {path: mode, target of a link, content and time} of everything below `folder`.

    The remembered hashes are left out, because a run that ends with an error may write some.
    """
    entries = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name == "hashes.json":
            continue
        state = path.lstat()
        entries[str(path)] = state.st_mode, os.readlink(path) if path.is_symlink() else None
        if stat.S_ISREG(state.st_mode):
            entries[str(path)] += path.read_bytes(), state.st_mtime_ns
    return entries


@contextlib.contextmanager
def within(seconds):
    """Raises AssertionError if the block takes longer, for example because it hangs."""

    def on_alarm(*_):
        raise AssertionError(f"not finished within {seconds} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def columns(table):
    """Returns the first 5 columns of a predictions.csv, those that need no model.json."""
    return [line.split(b",")[:5] for line in table.splitlines()]


def fail_at(patch, number, fault, calls=CALLS, after=False):
    """Raises `fault` (None: exits) before or after system call `number`; returns their counter."""
    counter = itertools.count()

    def failing(call):
        def wrapper(*args, **options):
            if next(counter) != number:
                return call(*args, **options)
            if after:
                with contextlib.suppress(OSError):
                    call(*args, **options)
            if fault is None:
                os._exit(9)
            raise fault

        return wrapper

    for name in calls:
        patch(os, name, failing(getattr(os, name)))
    return counter


def fork(function, *args):
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(function(*args)))
    child.start()
    return child


def fresh_copy(source, folder):
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


class Steps:
    """Counts how often a file below `folder` is opened for writing, written, synced or renamed.

    At step k the process is killed (number: SIGKILL), or an OSError with this number is raised;
    half of the bytes of a write are then written. patch: setattr, or that of monkeypatch.
    """

    def __init__(self, patch, folder, k=0, number=signal.SIGKILL):
        self.k, self.number, self.count, self.path = k, number, 0, ""
        steps, true_open, true_fsync, true_replace = self, builtins.open, os.fsync, os.replace

        class Raw(io.FileIO):
            def write(self, block):
                half = bytes(block)[: len(block) // 2]
                steps.step(self.name, lambda: super(Raw, self).write(half))
                return super().write(block)

        def open_(path, mode="r", *args, **options):
            is_ours = str(path).startswith(str(folder)) and "opener" not in options  # of tempfile
            if not is_ours or not set(mode) & set("wax"):
                return true_open(path, mode, *args, **options)
            steps.step(path)
            file = io.BufferedWriter(Raw(path, mode.replace("b", "")))
            return file if "b" in mode else io.TextIOWrapper(file, **options)

        def fsync(file):
            if not stat.S_ISDIR(os.fstat(file).st_mode):  # syncing a folder may fail
                steps.step(os.readlink(f"/proc/self/fd/{file}"))
            true_fsync(file)

        def replace(*paths):
            steps.step(paths[0])
            true_replace(*paths)

        patch(builtins, "open", open_)
        patch(io, "open", open_)  # used by pathlib
        patch(os, "fsync", fsync)
        patch(os, "replace", replace)

    def step(self, path, before=lambda: None):
        self.count += 1
        if self.count == self.k:
            self.path = str(path)  # of the file with the error
            before()
            if self.number == signal.SIGKILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.number, os.strerror(self.number))


def plain(patch):
    """Makes the scripts write the same bytes in every run, with few bootstrap samples."""
    patch(Figure, "savefig", lambda figure, file, **_: file.write(b"a picture"))
    patch(cxr.bootstrap, "DRAWS", 9)
    patch(time, "strftime", lambda *_: "today")


def start(log, script, argv, prepare=None, *args):
    """Starts a process, in its own session, that calls prepare(*args) and then runs a script.

    It prints to the file `log`. A server that has imported everything forks it, in 10 ms.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "faults"])
    process = context.Process(target=work, args=(log, script, argv, prepare, *args))
    process.start()
    return process


def work(log, script, argv, prepare, *args):
    """Runs in the new process: see start."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    multiprocessing.set_start_method("fork", force=True)  # of the processes that decode images
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.argv = [f"{script}.py"]
    plain(setattr)
    if prepare:
        prepare(*args)
    sys.exit(import_module(script).main(argv))


def die_at_step(folder, k):
    Steps(setattr, folder, k)


def limit_files(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def slow_down():
    """Makes the pass through the network slow, and prints "in the pass" during it."""
    normalize = common.NORMALIZE

    def slow(pixels):
        print("in the pass")
        time.sleep(0.05)
        return normalize(pixels)

    common.NORMALIZE = slow


def use_terminal(name):
    """Prints to a terminal, which becomes the controlling terminal of this process."""
    os.open(name, os.O_RDWR)
    sys.stdout, sys.stderr = (open(name, "w", buffering=1) for _ in range(2))


def ignore_hangup():
    """Does what nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def wait_for(text, log, seconds=60):
    deadline = time.time() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.time() < deadline, f"no {text!r} in {log.read_text() if log.exists() else log}"
        time.sleep(0.01)


def wait_for_end(session, seconds=8):
    deadline = time.time() + seconds
    while living(session):
        assert time.time() < deadline, f"{living(session)} are alive"
        time.sleep(0.02)


def living(session):
    """Returns the ids of the processes of a session, except those that ended (zombies)."""
    ids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, leader = path.read_text().rpartition(")")[2].split()[:4]
            if int(leader) == session and state != "Z":
                ids.append(path.parent.name)
    return ids


class Touch:
    """Creates a file when it is unpickled: the proof that code in a checkpoint was executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def hostile(path):
    """Returns {name: content} of checkpoints that create the file `path` if they are unpickled."""
    touch, tar = Touch(path), io.BytesIO()
    code = b"cos\nsystem\n(S'touch %s'\ntR." % str(path).encode()
    with tarfile.open(fileobj=tar, mode="w") as archive:  # torch's oldest format
        for name in ("sys_info", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(code)
            archive.addfile(info, io.BytesIO(code))
    return {
        "zip": saved(touch),
        "inside a state dict": saved({"fc.weight": torch.zeros(1, 8), "fc.bias": touch}),
        "legacy": saved(touch, _use_new_zipfile_serialization=False),
        "plain pickle": pickle.dumps(touch),
        "protocol 0": code,
        "tar": tar.getvalue(),
    }


def absurd(state):
    """Returns {name: object to save} of checkpoints that do not fit the network of this state."""
    conv, bias = state["conv.weight"], state["fc.bias"]
    return {
        "nan": state | {"fc.weight": state["fc.weight"] * float("nan")},
        "inf in float32": state | {"fc.bias": bias.double() + 1e300},
        "negative variance": state | {"bn.running_var": state["bn.running_var"] - 100},
        "missing key": {key: value for key, value in state.items() if key != "bn.bias"},
        "extra key": state | {"conv.bias": torch.zeros(8)},
        "two networks": {f"{at}.{k}": v for k, v in state.items() for at in ("query", "key")},
        "another shape": state | {"conv.weight": torch.zeros(8, 3, 3, 3)},
        "1000 outputs": state | {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)},
        "no head": {key: value for key, value in state.items() if key[:2] != "fc"},
        "two state dicts": {"state_dict": state, "ema": state, "epoch": 3},
        "a list": [1, 2],
        "an empty dict": {},
        "numbers as keys": {0: conv},
        "a string as value": state | {"fc.bias": "0"},
        "larger than the file": state | {"conv.weight": torch.zeros(1).expand(10**6, 10**6)},
        "complex numbers": state | {"conv.weight": conv + 1j},
        "a sparse tensor": state | {"conv.weight": conv.to_sparse()},
        "a meta tensor": state | {"conv.weight": conv.to("meta")},
    }


def encoded(image, form="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(mode="L", size=(90, 90), form="png", **options):
    """Returns the content of an image file with noise."""
    pixels = np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8)
    kinds = {"I;16": np.uint16, "F": np.float32}
    image = Image.fromarray(pixels.astype(kinds.get(mode, np.uint8)))
    return encoded(image if mode in kinds else image.convert(mode), form, **options)


def black(size, mode="1", form="png", colour=0):
    return encoded(Image.new(mode, size, colour), form)


def png_of_16_bits(colour_type, channels):
    """Returns a PNG with 16 bits per channel. colour_type: 2 for RGB, 4 for grey and alpha."""
    row = np.repeat(np.arange(256, dtype=">u2") * 16, channels).tobytes()
    lines = 256 * (b"\0" + row)
    header = struct.pack(">IIBBBBB", 256, 256, 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(lines), b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


DISC = Image.radial_gradient("L")
IN_ALPHA = encoded(Image.merge("LA", (Image.new("L", DISC.size), DISC)))
TWO_PAGES = encoded(DISC, "tiff", save_all=True, append_images=[DISC])
# name: (file name, content or target of a link, words of the reason)
BAD_IMAGES = {
    "empty": ("x.jpeg", b"", "the file is empty"),
    "web page": ("x.jpeg", b" <!DOCTYPE html><p>Sign in", "a web page"),
    "LFS pointer": ("x.jpeg", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    "text": ("x.png", b"PNG it is not", "not an image"),
    "GIF": ("x.png", picture(form="gif"), "not an image"),
    "one byte short": ("x.jpeg", picture(form="jpeg")[:-1], "truncated"),
    "half a JPEG": ("x.jpeg", picture(form="jpeg", size=(300, 300))[:9000], "truncated"),
    "half a PNG": ("x.png", picture()[:4000], "truncated"),
    "two colours": ("x.png", picture("1"), "two colours"),
    "bomb": ("x.png", black((9000, 9000)), "9000x9000 pixels, expected at most"),
    "larger bomb": ("x.png", black((14000, 14000)), "pixels"),
    "thread": ("x.png", picture(size=(3000, 1)), "3000x1 pixels, which is not the shape"),
    "one grey level": ("x.png", black((90, 90), "L"), "the same grey level"),
    "picture in the alpha channel": ("x.png", IN_ALPHA, "the same grey level"),
    "several pages": ("x.tiff", TWO_PAGES, "2 pictures in one file"),
    "16 bits in colour": ("x.png", png_of_16_bits(2, 3), "16 bits per channel"),
    "16 bits and alpha": ("x.png", png_of_16_bits(4, 2), "16 bits per channel"),
    "not finite": ("x.tiff", black((90, 90), "F", "tiff", float("nan")), "not finite"),
    "dangling link": ("x.jpeg", "nowhere", "No such file"),
    "link to itself": ("x.jpeg", "x.jpeg", "symbolic links"),
}


def put(path, content):
    """Writes a file, or a link if content is a str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)


def first(split, name="NORMAL"):
    return sorted((split / name).iterdir())[0]


def add_all_that_may_be(split):
    """Adds files that do not count, and images of all kinds. Returns the number of images."""
    normal, image = split / "NORMAL", first(split)
    for folder in (split, normal, split / "PNEUMONIA"):
        for name in (".DS_Store", "Thumbs.db", "x.jpeg.part", "._x.jpeg", ".x.png", "notes.txt"):
            put(folder / name, b"junk")
    for name in (".ipynb_checkpoints/x.jpeg", "more/x.jpeg", "folder.jpeg/x.jpeg"):
        put(normal / name, first(split, "PNEUMONIA").read_bytes())
    os.mkfifo(normal / "pipe.jpeg")
    put(normal / "device.jpeg", "/dev/zero")
    pictures = {
        "16 bits.png": picture("I;16"),
        "floats.tiff": picture("F", form="tiff"),
        "palette.png": picture("P"),
        "alpha.png": picture("RGBA"),
        "grey and alpha.png": picture("LA"),
        "colour.webp": picture("RGB", form="webp"),
        "large.jpeg": picture(size=(700, 500), form="jpeg"),
        "two pixels.png": picture(size=(2, 1)),
        "ä b\n'\".PNG": picture(),
        os.fsdecode(b"x\xff.png"): picture(),
        "twin.jpeg": image.read_bytes(),
        "link.jpeg": str(image),
    }
    for name, content in pictures.items():
        put(normal / name, content)
    return len(pictures)


def renamed(old, new):
    return lambda split: (split / old).rename(split / new)


def link(name, split):
    """Replaces a class folder, or the split itself (name: ""), by a link to it."""
    away = (split / name).rename(split.parent / f"{split.name}-away")
    (split / name).symlink_to(away)


def remove(name, instead, split):
    """Removes a class folder or the split; `instead`: empty, the content of a file, or a link."""
    shutil.rmtree(split / name)
    if instead == "empty":
        (split / name).mkdir()
    elif instead is not None:
        put(split / name, instead)


def copied(source, target):
    return lambda split: put(split / target, first(split, source).read_bytes())


def only_gifs(split):
    for path in (split / "NORMAL").iterdir():
        path.rename(path.with_suffix(".gif"))


# name: (the change of the folder of a split, words of the message)
BAD_FOLDERS = {
    "an archive's leftovers": (copied("NORMAL", "__MACOSX/._x.jpeg"), "__MACOSX: expected only"),
    "a hidden folder": (copied("NORMAL", ".cache/x.jpeg"), ".cache: expected only"),
    "a third class": (copied("NORMAL", "COVID/x.jpeg"), "COVID: expected only"),
    "lower case": (renamed("NORMAL", "normal"), "the folders PNEUMONIA and normal"),
    "another word": (renamed("NORMAL", "ZNORMAL"), "the folders PNEUMONIA and ZNORMAL"),
    "misspelled": (renamed("PNEUMONIA", "PNEUMONA"), "the folders NORMAL and PNEUMONA"),
    "a space": (renamed("PNEUMONIA", "PNEUMONIA "), "PNEUMONIA : expected only"),
    "a class missing": (partial(remove, "NORMAL", None), "NORMAL: no such folder"),
    "a class that is a file": (partial(remove, "NORMAL", b""), "NORMAL: no such folder"),
    "a class empty": (partial(remove, "NORMAL", "empty"), "an empty folder"),
    "a class linked to the other": (partial(remove, "NORMAL", "PNEUMONIA"), "NORMAL: found a link"),
    "a class that links to itself": (partial(remove, "NORMAL", "NORMAL"), "NORMAL: no such folder"),
    "a class without images": (only_gifs, "only .gif"),
    "a linked class": (partial(link, "NORMAL"), "NORMAL: found a link"),
    "a linked split": (partial(link, ""), "NORMAL: found a link"),
    "a split missing": (partial(remove, "", None), "no such folder"),
    "a split that is a file": (partial(remove, "", b""), "no such folder"),
    "an image in both classes": (copied("PNEUMONIA", "NORMAL/x.jpeg"), "the same file"),
}
