"""What the tests of faults share: damaged bytes, hostile files, odd folders, processes to kill."""

import builtins
import contextlib
import io
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
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import cxr.bootstrap
import evaluate  # noqa: F401  the processes start with all of it imported
import train  # noqa: F401

# ---------------------------------------------------------------- damage


def damage(rng, data):
    """(what was done, the bytes after it), another content than before."""
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
    """{relative path: content} of the files, without what a killed process left behind."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def listing(folder):
    """{path: what stands there}: all that a user could find changed."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        state = path.lstat()
        found[str(path)] = state.st_mode, os.readlink(path) if path.is_symlink() else None
        if stat.S_ISREG(state.st_mode):
            found[str(path)] += path.read_bytes(), state.st_mtime_ns
    return found


@contextlib.contextmanager
def within(seconds):
    """An AssertionError where the body takes longer: a hang is a fault, too."""

    def late(*_):
        raise AssertionError(f"not finished within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def columns(table):
    """The first 4 columns of a predictions.csv: all that a model without model.json gives."""
    return [line.split(b",")[:4] for line in table.splitlines()]


class Steps:
    """Counts how often a file below `folder` is opened to write, written, synced and renamed.

    The k-th time, in the middle of a write, comes SIGKILL or the OSError of that number first.
    patch: setattr, or monkeypatch's.
    """

    def __init__(self, patch, folder, k=0, number=signal.SIGKILL):
        self.k, self.number, self.count = k, number, 0
        steps, true_open, true_fsync, true_replace = self, builtins.open, os.fsync, os.replace

        class Raw(io.FileIO):
            def write(self, block):
                half = bytes(block)[: len(block) // 2]
                steps.step(lambda: super(Raw, self).write(half))
                return super().write(block)

        def open_(path, mode="r", *args, **options):
            ours = str(path).startswith(str(folder)) and "opener" not in options  # tempfile's
            if not ours or not set(mode) & set("wax"):
                return true_open(path, mode, *args, **options)
            steps.step()
            file = io.BufferedWriter(Raw(path, mode.replace("b", "")))
            return file if "b" in mode else io.TextIOWrapper(file, **options)

        def fsync(file):
            if not stat.S_ISDIR(os.fstat(file).st_mode):  # that one may fail
                steps.step()
            true_fsync(file)

        def replace(*paths):
            steps.step()
            true_replace(*paths)

        patch(builtins, "open", open_)
        patch(io, "open", open_)  # of pathlib
        patch(os, "fsync", fsync)
        patch(os, "replace", replace)

    def step(self, before=lambda: None):
        self.count += 1
        if self.count == self.k:
            before()
            if self.number == signal.SIGKILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.number, os.strerror(self.number))


# ---------------------------------------------------------------- processes


def plain(patch):
    """Scripts that write the same bytes each time, without long statistics and drawing."""
    patch(Figure, "savefig", lambda figure, file, **_: file.write(b"a picture"))
    patch(cxr.bootstrap, "DRAWS", 9)
    patch(time, "strftime", lambda *_: "today")


def start(log, script, argv, prepare=None, *args):
    """A process of its own session that calls prepare(*args) and runs a script; output in `log`.

    A server forks it that has imported everything: that takes 10 ms.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "faults"])
    process = context.Process(target=work, args=(log, script, argv, prepare, *args))
    process.start()
    return process


def work(log, script, argv, prepare, *args):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    multiprocessing.set_start_method("fork", force=True)  # of its own decoding processes
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
    normalize = common.NORMALIZE

    def slow(pixels):
        print("in the pass")
        time.sleep(0.05)
        return normalize(pixels)

    common.NORMALIZE = slow


def wait_for(text, log, seconds=60):
    deadline = time.time() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.time() < deadline, f"no {text!r} in {log.read_text() if log.exists() else log}"
        time.sleep(0.01)


def wait_for_end(session, seconds=8):
    """Until no process of the session is alive."""
    deadline = time.time() + seconds
    while living(session):
        assert time.time() < deadline, f"{living(session)} live on"
        time.sleep(0.02)


def living(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, leader = path.read_text().rpartition(")")[2].split()[:4]
            if int(leader) == session and state != "Z":
                found.append(path.parent.name)
    return found


# ---------------------------------------------------------------- checkpoints


class Touch:
    """Unpickled, it makes a file: the proof that code of a checkpoint was run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def hostile(path):
    """{name: content} of files that make `path` if anything unpickles them carelessly."""
    touch, tar = Touch(path), io.BytesIO()
    code = b"cos\nsystem\n(S'touch %s'\ntR." % str(path).encode()
    with tarfile.open(fileobj=tar, mode="w") as archive:  # the oldest format
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
    """{name: what to save} of things that are no checkpoint of the network with this state."""
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


# ---------------------------------------------------------------- images and folders


def picture(mode="L", size=(90, 90), form="png", **options):
    """The content of a picture file of noise."""
    pixels, buffer = np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8), io.BytesIO()
    kinds = {"I;16": np.uint16, "F": np.float32}
    image = Image.fromarray(pixels.astype(kinds.get(mode, np.uint8)))
    (image if mode in kinds else image.convert(mode)).save(buffer, form, **options)
    return buffer.getvalue()


def black(size, mode="1", form="png", colour=0):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form)
    return buffer.getvalue()


def hidden():
    """A black picture whose alpha channel is the radiograph."""
    image, buffer = Image.new("LA", (256, 256)), io.BytesIO()
    image.putalpha(Image.radial_gradient("L"))
    image.save(buffer, "png")
    return buffer.getvalue()


def pages():
    buffer, page = io.BytesIO(), Image.radial_gradient("L")
    page.save(buffer, "tiff", save_all=True, append_images=[page])
    return buffer.getvalue()


def png_of_16_bits(colour_type, size=256):
    """A PNG of 16 bits a channel (2: RGB, 4: grey and alpha), which Pillow cannot write."""
    channels = {2: 3, 4: 2}[colour_type]
    pixels = np.tile(np.arange(size, dtype=">u2")[None, :, None] * 16, (size, 1, channels))
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", size, size, 16, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


# name: (the file's name, its content or what it is a link to, why it cannot be read)
BAD_IMAGES = {
    "empty": ("x.jpeg", b"", "the file is empty"),
    "web page": ("x.jpeg", b" <!DOCTYPE html><p>Sign in", "a web page"),
    "LFS pointer": ("x.jpeg", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    "text": ("x.png", b"PNG it is not", "no image"),
    "GIF": ("x.png", picture(form="gif"), "no image"),
    "one byte short": ("x.jpeg", picture(form="jpeg")[:-1], "truncated"),
    "half a JPEG": ("x.jpeg", picture(form="jpeg", size=(300, 300))[:9000], "truncated"),
    "half a PNG": ("x.png", picture()[:4000], "truncated"),
    "two colours": ("x.png", picture("1"), "two colours"),
    "bomb": ("x.png", black((9000, 9000)), "pixels, more than"),
    "larger bomb": ("x.png", black((14000, 14000)), "pixels"),
    "thread": ("x.png", picture(size=(3000, 1)), "no radiograph's shape"),
    "one grey level": ("x.png", black((90, 90), "L"), "one single grey level"),
    "picture in the alpha channel": ("x.png", hidden(), "one single grey level"),
    "several pages": ("x.tiff", pages(), "2 pictures in one file"),
    "16 bits in colour": ("x.png", png_of_16_bits(2), "16 bits a channel"),
    "16 bits and alpha": ("x.png", png_of_16_bits(4), "16 bits a channel"),
    "not finite": ("x.tiff", black((90, 90), "F", "tiff", float("nan")), "not finite"),
    "dangling link": ("x.jpeg", "nowhere", "No such file"),
    "link to itself": ("x.jpeg", "x.jpeg", "symbolic links"),
}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)


def first(split, name="NORMAL"):
    return sorted((split / name).iterdir())[0]


def add_all_that_may_be(split):
    """Files that do not count, and images of all kinds; returns how many images these are."""
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


def linked(name):
    """The folder `name` of a split, or the split itself, is a link to where it lies."""

    def change(split):
        away = (split / name).rename(split.parent / f"{split.name}-away")
        (split / name).symlink_to(away)

    return change


def without(name, instead=None):
    """A split with the folder `name` gone; a file, link or empty folder may be there instead."""

    def change(split):
        shutil.rmtree(split / name)
        if instead == "empty":
            (split / name).mkdir()
        elif instead is not None:
            put(split / name, instead)

    return change


def copied(source, target):
    """A split with a copy of the first image of the class `source`."""
    return lambda split: put(split / target, first(split, source).read_bytes())


def only_gifs(split):
    for path in (split / "NORMAL").iterdir():
        path.rename(path.with_suffix(".gif"))


# name: (what is done to the folder of a split, what is said)
BAD_FOLDERS = {
    "an archive's leftovers": (copied("NORMAL", "__MACOSX/._x.jpeg"), "__MACOSX: expected only"),
    "a hidden folder": (copied("NORMAL", ".cache/x.jpeg"), ".cache: expected only"),
    "a third class": (copied("NORMAL", "COVID/x.jpeg"), "COVID: expected only"),
    "lower case": (renamed("NORMAL", "normal"), "normal: expected only"),
    "another word": (renamed("NORMAL", "ZNORMAL"), "ZNORMAL: expected only"),
    "misspelled": (renamed("PNEUMONIA", "PNEUMONA"), "PNEUMONA: expected only"),
    "a space": (renamed("PNEUMONIA", "PNEUMONIA "), "PNEUMONIA : expected only"),
    "a class missing": (without("NORMAL"), "NORMAL: no such folder"),
    "a class that is a file": (without("NORMAL", b""), "NORMAL: no such folder"),
    "a class empty": (without("NORMAL", "empty"), "an empty folder"),
    "a class linked to the other": (without("NORMAL", "PNEUMONIA"), "found a link"),
    "a class that links to itself": (without("NORMAL", "NORMAL"), "NORMAL: no such folder"),
    "a class without images": (only_gifs, "only .gif"),
    "a linked class": (linked("NORMAL"), "found a link"),
    "a linked split": (linked(""), "found a link"),
    "a split missing": (without(""), "no such folder"),
    "a split that is a file": (without("", b""), "no such folder"),
    "an image in both classes": (copied("PNEUMONIA", "NORMAL/x.jpeg"), "the same file"),
}
