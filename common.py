"""What split_val.py, train.py and evaluate.py share: the image list, decoding and views, the device, the frozen
network, the feature pass with its store on disk, checkpoints, scores and the handling of errors.

torch is imported inside the functions that need it: it takes seconds, and `--help`, a typo or splitting a folder
need none of it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import PIL.Image

CLASSES = ("NORMAL", "PNEUMONIA")  # class 1, PNEUMONIA, is the positive one
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# others Pillow may hand to programs of their own, as PostScript
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIZE = 224  # pixels, height and width of what the network sees
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
MAX_PIXELS = 50_000_000  # larger pictures are decompression bombs, not radiographs (those reach about 20 million)
SPLIT_FILE = "split_val.json"  # in the data folder: what split_val.py moved, and every image's hash


# ---------------------------------------------------------------- command line, errors, files


class Failure(Exception):
    """What the user can mend, printed as one line. status: 2 input, 3 not finite, 4 resources."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, or of what a file may take of it


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled wherever Ctrl-C is."""


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and the default behind every help text."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def at_least(kind, low, below=float("inf")):
    """An argparse type: a `kind` (int or float) of `low` or more and less than `below`."""

    def convert(text):
        number = kind(text)
        if not low <= number < below:
            limit = f" and below {below:g}" if below < float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected a number of at least {low}{limit}, found {text}")
        return number

    convert.__name__ = kind.__name__
    return convert


FLAGS = {
    "--data-dir": dict(type=Path, default=Path("data/chestxrays"), metavar="DIR", help="folder of train/, val/, test/"),
    "--checkpoint": dict(type=Path, default=Path("model.pth"), metavar="FILE", help="the trained network"),
    "--results-dir": dict(type=Path, default=Path("results"), metavar="DIR", help="folder for tables and pictures"),
    "--device": dict(default="auto", metavar="NAME", help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps"),
    "--batch-size": dict(
        type=at_least(int, 1, below=100_000), default=32, metavar="N", help="images the network sees at a time"
    ),
    "--workers": dict(
        type=at_least(int, -1),
        default=-1,
        metavar="N",
        help="processes that decode images (0 = none, -1 = chosen by the number of images and cores)",
    ),
    "--cache-dir": dict(
        type=Path, default=Path(".cache/features"), metavar="DIR", help="folder that keeps computed features"
    ),
    "--no-cache": dict(action="store_true", help="neither read nor keep computed features"),
    "--skip-bad": dict(action="store_true", help="leave unreadable images out, and list them, instead of stopping"),
    "--seed": dict(type=at_least(int, 0, below=2**32), default=0, metavar="N", help="seed of every random choice"),
    "--debug": dict(action="store_true", help="show the traceback of an error"),
}


def add_flags(parser, *names):
    """Adds the flags that mean the same in every script."""
    for name in (*names, "--debug"):
        parser.add_argument(name, **FLAGS[name])


def warn(message):
    if rank_and_world()[0] == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


stops = []  # when and how this run was asked to stop: (time, KeyboardInterrupt)


def ignore_signals():
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)  # not SIG_IGN: Python complains where a signal is pending already


def raise_if_stopped():
    """Called once a batch or an epoch: an interrupt that hits a fork, a __del__ or an import may be swallowed there."""
    if stops:
        raise stops[-1][1]


@contextlib.contextmanager
def stoppable():
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; another one within 3 s is ignored: the orderly end goes on."""

    def stop(number, _):
        if not stops or time.monotonic() > stops[-1][0] + 3:
            sys.unraisablehook = lambda _: None  # a fork, or a DataLoader's __del__, would complain
            stops.append((time.monotonic(), Terminated() if number == signal.SIGTERM else KeyboardInterrupt()))
            raise stops[-1][1]

    stops.clear()
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.suppress(ValueError):  # only the main thread may set a handler
        for each in before:
            signal.signal(each, stop)
    yield
    atexit.register(ignore_signals)  # the work is done
    for each, handler in before.items():
        if not stops and signal.getsignal(each) is stop:
            signal.signal(each, handler)


def run(command, args):
    """Calls command(args) and returns the exit status; an error is one line on stderr (--debug: and a traceback)."""
    if rank_and_world()[0]:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text in the terminal's encoding
        with contextlib.suppress(AttributeError):  # a notebook's own stream
            stream.reconfigure(errors="backslashreplace")
    written.clear()
    with stoppable():
        try:
            return command(args) or 0
        except (Exception, KeyboardInterrupt) as error:
            status, message = describe_error(error, args)
            if message is None:
                raise
            if args.debug:
                traceback.print_exc()
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
            return status


def describe_error(error, args):
    """(exit status, one line) of an error; (None, None) for a bug, which deserves its traceback."""
    if stops and not isinstance(error, Failure | KeyboardInterrupt):
        error = stops[-1][1]  # what Ctrl-C cuts short, an import say, may fail in ways of its own
    text = " ".join(str(error).split())
    if isinstance(error, Failure):
        return error.status, text
    if isinstance(error, KeyboardInterrupt):
        kept = f"written before: {', '.join(written)}" if written else "every file is as it was"
        if not vars(args).get("no_cache", True):
            kept += f"; features computed so far are kept in {args.cache_dir}"
        return (143 if isinstance(error, Terminated) else 130), text or f"interrupted; {kept}"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        flags = [
            f"--{name.replace('_', '-')} (now {vars(args)[name]})" for name in ("batch_size", "views") if name in args
        ]
        return 4, f"memory is full: lower {' or '.join(flags)}, or use --device cpu ({text[:120]})"
    if "DataLoader" in text:
        return 4, f"a process that decodes images died or hung: try --workers 0 ({text[:120]})"
    if isinstance(error, OSError):
        full, denied = error.errno in FULL, error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        text = f"{error.filename or 'the output'}: {error.strerror or text}"
        flags = [f"--{name.replace('_', '-')}" for name in ("checkpoint", "results_dir", "cache_dir") if name in args]
        if (full or denied) and flags:
            remedy = "free some space" if full else "change its permissions"
            text += f"; {remedy}, or write elsewhere with {', '.join(flags)}"
        text += f" (written before: {', '.join(written)})" if written else ""
        return 4 if full or error.errno in (errno.EIO, errno.EAGAIN, errno.EMFILE) else 2, text
    return None, None


written = []  # paths of the files that this run has replaced so far


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """A new file that takes the place of `path` when it is whole and on disk; after an error path is as it was.

    Where `path` is a link, the file that it points to is replaced; a device or a folder is a Failure.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    if path.exists() and not path.is_file():
        raise Failure(f"{path}: expected a file to write, found a folder or a device")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        with contextlib.suppress(OSError, ValueError):
            try:
                os.kill(int(old.name.split(".")[-2]), 0)
            except ProcessLookupError:
                old.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"newline": "", "encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        written.append(str(path))
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(*folders):
    """Puts the folders' lists of names on disk, so that a power cut cannot undo what was renamed in them."""
    for folder in filter(Path.is_dir, folders):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_json(path, content):
    """Writes a dict as JSON, with a checksum: a digit that changes on the disk leaves JSON that looks right."""
    with replacing(path, "w") as file:
        json.dump({"checksum": checksum(content)} | content, file, indent=1, allow_nan=False)
        file.write("\n")


def fits(value, kind):
    """Whether a JSON value is of a kind: a type, [kind] for a list or {str: kind} for an object of such values."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(each, kind[str]) for each in value.values())
    return isinstance(value, kind)


def read_json(path, keys, others=None):
    """The JSON object at path (None where there is no file), its checksum checked and taken out.

    keys: {name: kind, see fits} that it must have; others: that it may have. A file with `keys` alone needs no
    checksum: it may be written by hand.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for key, kind in ((others or {}) | keys).items():
            if (key in keys or key in content) and not fits(content[key], kind):
                raise ValueError(f"{key} is not what it should be")
        stored = content.pop("checksum", None)
        if stored != checksum(content) and (stored is not None or content.keys() - keys.keys()):
            raise ValueError("its checksum is missing or differs")
        return content
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Failure(f"{path}: not the file that this project writes ({error!r:.80}); delete or restore it") from None


# ---------------------------------------------------------------- images


class Image(NamedTuple):
    path: Path
    label: int  # index into CLASSES
    digest: str  # SHA-256 of the file in hex; "" where it cannot be read


def list_images(folder):
    """Paths of the image files directly inside `folder`, sorted by name; hidden files do not count."""
    entries = os.scandir(folder)
    # a link to nothing counts, to be reported; a pipe, a device or a link to one does not
    names = sorted(entry.name for entry in entries if entry.is_file() or not os.path.exists(entry))
    return [Path(folder, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]


def list_split(data_dir, split):
    """[(path, label)] of data_dir/split, by class and name. Anything but the two class folders is a Failure."""
    root = Path(data_dir, split)
    if not root.is_dir():
        hint = "run split_val.py first" if split == "val" else "see --data-dir"
        raise Failure(f"{root}: no such folder, expected {root}/{CLASSES[0]} and {root}/{CLASSES[1]} ({hint})")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for name in folders:
        if name not in CLASSES:
            raise Failure(
                f"{root / name}: expected only the folders {' and '.join(CLASSES)}, spelled so; rename or move it"
            )
    images = []
    for label, name in enumerate(CLASSES):
        folder = root / name
        if name not in folders:
            raise Failure(f"{folder}: no such folder, expected the {name} images of {split} in it")
        if root.is_symlink() or folder.is_symlink():
            raise Failure(f"{folder}: expected a folder, found a link; link the whole data folder instead (--data-dir)")
        paths = list_images(folder)
        if not paths:
            other = sorted({entry.suffix or entry.name for entry in folder.iterdir() if entry.name[0] != "."})
            found = f"only {', '.join(other[:5])}" if other else "an empty folder"
            raise Failure(f"{folder}: expected images ({' '.join(sorted(SUFFIXES))}), found {found}")
        images += [(path, label) for path in paths]
    return images


def hash_file(path):
    """SHA-256 of a file's content in hex, "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return ""


def read_split(data_dir, *splits):
    """{split: [Image]}, checked: no image of two classes or two splits, none changed since split_val.py hashed it."""
    listed = [(split, path, label) for split in splits for path, label in list_split(data_dir, split)]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(hash_file, [path for _, path, _ in listed]))
    record = read_json(Path(data_dir, SPLIT_FILE), {"sha256": {str: str}, "state": str}) or {"sha256": {}}
    if record.get("state", "done") != "done":
        raise Failure(f"{data_dir}: a split was interrupted; run split_val.py again, which completes it")
    found, seen, gone, moved = {split: [] for split in splits}, {}, [], []
    classes = {digest: Path(file).parent.name for file, digest in record["sha256"].items()}
    for file, digest in record["sha256"].items():
        path, asked = Path(data_dir, file), file.partition("/")[0] in splits
        if asked and not os.path.lexists(path):
            gone.append(path)
        elif "train" in splits and not asked and path.exists():
            seen[digest] = path  # what is trained on must not stand in test/; evaluate.py warns of it
    if gone:
        warn(f"{gone[0]}: gone since {SPLIT_FILE} recorded it ({len(gone)} such images)")
    for (split, path, label), digest in zip(listed, digests, strict=True):
        file = path.relative_to(data_dir).as_posix()
        if digest and record["sha256"].get(file, digest) != digest:
            raise Failure(
                f"{path}: its content changed since {SPLIT_FILE} recorded it; restore it, or split_val.py --undo"
            )
        if file not in record["sha256"] and classes.get(digest, CLASSES[label]) != CLASSES[label]:
            moved.append(f"{path}: {SPLIT_FILE} recorded this image as {classes[digest]}")
        twin = seen.setdefault(digest, path)
        # the same damage, an empty file say, is no twin: the pass will report it
        if digest and twin.parent != path.parent and not isinstance(read_or_explain(load_image, path), str):
            raise Failure(f"{path}: the same image as {twin}; remove one of them")
        found[split].append(Image(path, label, digest))
    if moved:
        raise Failure(f"{moved[0]}; move it back, or split_val.py --undo and split again")
    return found


PATIENT = re.compile(r"(person\d+)_(bacteria|virus)_\d+|((?:NORMAL2-)?IM-\d+)-\d+")


def patient_of(name, cautious=False):
    """The patient that an image's name tells, None where it tells none.

    In personN_bacteria_M.jpeg N counts the patients of one etiology, so the patient is (N, etiology); the cautious
    key is N alone: it can only merge two patients, never separate one.
    """
    match = PATIENT.match(name)
    if not match:
        return None
    person, etiology, study = match.groups()
    return study or (person if cautious else f"{person}_{etiology}")


def patient_key(path):
    """What keeps the images of a patient together: the cautious key, or the image's own path where there is none."""
    # with the folder: the same file name may stand in both classes
    return patient_of(path.name, cautious=True) or f"{path.parent.name}/{path.name}"


def load_image(path) -> PIL.Image.Image:
    """The image at `path`, upright, 8 bit, of at least SIZE x SIZE pixels wherever the file has them.

    path: a path, or a file opened in binary mode.
    Mode L for grey files, else RGB: make_view is 1.7 times as fast on one channel, with the same result.
    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled DCT), never below what the resize needs.
    16-bit and float greyscale is windowed by its own minimum and maximum. Alpha is dropped.
    Raises OSError or ValueError with the reason, without the path.
    """
    import numpy as np
    from PIL import Image as Pillow
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; damaged pixels raise, and MAX_PIXELS stops the bombs
        with Pillow.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            if max(image.size) > 20 * min(image.size):  # the resize would make it huge
                raise ValueError(f"{image.width}x{image.height} pixels, no radiograph's shape")
            image.draft(None, (SIZE, SIZE))
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            if image.mode[0] in "IF":
                pixels = np.array(image, dtype=np.float32)
                low, high = pixels.min(), pixels.max()
                if not np.isfinite(high - low):
                    raise ValueError("pixels that are not finite")
                pixels -= low  # in place: such files are large
                pixels *= 255 / max(high - low, 1e-6)
                return Pillow.fromarray(pixels.round(out=pixels).astype(np.uint8))
            if image.mode == "1":
                raise ValueError("a picture of two colours, expected grey levels")
            return image if image.mode in ("L", "RGB") else image.convert("RGB")


def make_view(image, number, digest):
    """View `number` of an image, RGB, SIZE x SIZE. Edit this function for other augmentation.

    Keep all of it in here: the feature store notices changes of this function and of load_image, not of what they call.
    0 is the image, 1 its mirror image; from 2 on a small change of pose and exposure, mirrored half of the time,
    drawn from the image's SHA-256 `digest` and the number: the same on every run, machine and in any order.
    """
    import torchvision.transforms.functional as F

    image = F.center_crop(F.resize(image, SIZE), SIZE)
    if number < 2:
        return (F.hflip(image) if number else image).convert("RGB")
    draw = hashlib.sha256(f"{digest} {number}".encode()).digest()
    u = [int.from_bytes(draw[4 * i : 4 * i + 4], "big") / 2**31 - 1 for i in range(7)]  # uniform in [-1, 1)
    shift = [round(0.05 * SIZE * u[1]), round(0.05 * SIZE * u[2])]
    image = F.adjust_contrast(F.adjust_brightness(image, 1 + 0.2 * u[4]), 1 + 0.35 * u[5])
    image = F.affine(image, 10 * u[0], shift, 1 + 0.1 * u[3], 0.0, F.InterpolationMode.BILINEAR)
    return (F.hflip(image) if u[6] < 0 else image).convert("RGB")


def read_or_explain(function, path):
    """function(path) of an image, or why the image cannot be read, as text."""
    try:
        return function(path)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        return explain_unreadable(path, error)


def explain_unreadable(path, error):
    """Why an image could not be read, in a few words."""
    try:
        if Path(path).stat().st_size == 0:
            return "the file is empty"
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError as failed:
        return failed.strerror or str(failed)
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the image (git lfs pull)"
    if start[:5].lower() in (b"<!doc", b"<html"):
        return "a web page, not an image"
    if "cannot identify" in str(error):
        return "no image, or of an unknown format"
    return " ".join(str(error).split())[:150] or type(error).__name__


# ---------------------------------------------------------------- device and network


def pick_device(name):
    """(torch.device, dtype of the feature pass) for --device, printed. An absent device is a Failure."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda":
        name += f":{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise Failure(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "mps": int(mps), "cuda": torch.cuda.device_count() if cuda else 0}[kind]
    if int(index or 0) >= count:
        raise Failure(f"--device {name}: no such device here ({count} found); use --device auto or cpu")
    device, dtype = torch.device(name), torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif device.type == "cpu":
        native = torch.cpu.get_capabilities()
        dtype = torch.bfloat16 if any(native.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32
    print(f"Device: {name} ({str(dtype).removeprefix('torch.')})")
    return device, dtype


def new_network(arch, device):
    """torchvision's classifier `arch` without its last Linear, and that Linear's (name, width)."""
    import difflib

    import torch
    from torch import nn
    from torchvision.models import get_model, get_model_builder, list_models

    try:
        if re.match(
            r"torchvision\.models\.(detection|optical_flow|segmentation|video)", get_model_builder(arch).__module__
        ):
            raise ValueError
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = get_model(arch, weights=None)
    except ValueError:
        close = difflib.get_close_matches(arch, list_models(), 3) or ["resnet50", "densenet121", "efficientnet_b0"]
        raise Failure(f"--arch {arch}: torchvision has no such classifier; perhaps {', '.join(close)}?") from None
    name, last = [(name, module) for name, module in network.named_modules() if not any(module.children())][-1]
    if not isinstance(last, nn.Linear):
        raise Failure(f"--arch {arch}: expected a classifier that ends in a Linear, found {type(last).__name__}")
    network.set_submodule(name, nn.Identity())
    return network, name, last.in_features


def build_network(arch, state=None, source=None):
    """The frozen network: (network from images to features, name of its last Linear, width, that Linear's tensors).

    state: {name: tensor} of the whole network, read from `source`; None draws random weights from a seed of their
    own. Frozen means, here and only here: no gradients, and eval mode, so that BatchNorm neither uses nor updates
    batch statistics. The one trainable layer is not part of it.
    """
    import torch

    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, head, width = new_network(arch, "cpu")
        tensors = {}
    else:
        network, head, width = new_network(arch, "meta")  # no time is spent on drawing weights
        tensors = {key: state[key] for key in (f"{head}.weight", f"{head}.bias") if key in state}
        body = {key: state[key] for key in state if key not in tensors}
        try:
            network.load_state_dict(body, assign=True)
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split("\n\t", 1)[-1].split())
            raise Failure(f"{source}: not the weights of a {arch}: {reason:.160}") from None
    network.float().eval().requires_grad_(False)
    return network, head, width, tensors


def read_state(path):
    """The state dict in a checkpoint file: {name: tensor}. Data, never code; a damaged or absurd file is a Failure."""
    import zipfile

    import torch

    path = Path(path)
    if not path.is_file():
        raise Failure(f"{path}: no such file, expected a checkpoint")
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > size:
                    raise Failure(f"{path}: a bomb, it unpacks to more than its own size")
                if broken := archive.testzip():  # torch.load itself does not check the CRCs
                    raise Failure(f"{path}: not a readable checkpoint, {broken} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, "cpu", weights_only=True)
        state = {key: value.detach() for key, value in state.items()}
        for key, value in state.items():
            if value.numel() * value.element_size() > size:
                raise Failure(f"{path}: {key} is larger than the file")
            negative = key.endswith("running_var") and value.min() < 0
            if negative or value.is_complex() or not value.float().isfinite().all():
                raise Failure(f"{path}: {key} has impossible values (complex, not finite, or a negative variance)")
    except Exception as error:  # the unpickler raises whatever the bytes make it stumble over
        if isinstance(error, MemoryError | Failure | PermissionError):
            raise
        # not torch's own text: that recommends to run the code in the file
        reason = f"{type(error).__name__}: it is damaged, or holds more than tensors"
        raise Failure(f"{path}: not a readable checkpoint, expected a state dict ({reason})") from error
    # torchvision's oldest DenseNet files name norm1 "norm.1"; its own loader renames them likewise
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): value for key, value in state.items()}


# ---------------------------------------------------------------- features


def hash_network(network):
    """SHA-256 over the modules of `network`, with their settings, and every parameter and buffer, in hex."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


class FeatureStore:
    """Features on disk, by image content and view: files of fixed-size records, each with its CRC.

    A process appends to a file of its own and never changes what is written, so that any number of processes, on
    several machines too, fill one folder, and a kill loses at most the record being written. The folder's name holds
    what else a feature depends on: the weights, the preprocessing and the precision.
    """

    def __init__(self, cache_dir, network, width, dtype):
        import numpy as np
        import PIL
        import torchvision

        self.record = np.dtype([("key", "V36"), ("vector", "<f4", (width,)), ("crc", "<u4")])
        code = "".join(map(inspect.getsource, (load_image, make_view)))
        versions = f"{PIL.__version__} {torchvision.__version__}"
        depends_on = f"{hash_network(network)} {code} {SIZE} {MEAN} {STD} {versions} {dtype}"
        self.folder = Path(cache_dir, hashlib.sha256(depends_on.encode()).hexdigest()[:24])
        self.file = None

    @staticmethod
    def key(digest, view):
        return bytes.fromhex(digest) + view.to_bytes(4, "little")

    def load(self, wanted, features):
        """Fills features[row, view] for each {key: [(row, view)]} found, taking it out of `wanted`."""
        import numpy as np
        import torch

        damaged, size = 0, self.record.itemsize
        for path in sorted(self.folder.glob("*.features")):
            try:
                file = open(path, "rb")
            except OSError as error:
                warn(f"{path}: passed over ({error.strerror})")
                continue
            with file:
                while len(block := file.read(256 * size)) >= size:
                    whole = len(block) // size  # the last record may still be in writing
                    records = np.frombuffer(block, self.record, whole)
                    for i, (key, crc) in enumerate(zip(records["key"], records["crc"], strict=True)):
                        if zlib.crc32(memoryview(block)[i * size : (i + 1) * size - 4]) != crc:
                            damaged += 1
                        else:
                            for row, view in wanted.pop(key.tobytes(), ()):
                                features[row, view] = torch.from_numpy(records["vector"][i].copy())
        if damaged and wanted:
            warn(f"{self.folder}: {damaged} damaged records, computed again where needed")

    def append(self, keys, vectors):
        import numpy as np

        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}.features", "ab", 0)
        records = np.empty(len(keys), self.record)
        records["key"] = np.array([np.void(key) for key in keys])
        records["vector"] = vectors.numpy()
        for i in range(len(keys)):
            records["crc"][i] = zlib.crc32(records[i : i + 1].tobytes()[:-4])
        try:
            self.file.write(records.tobytes())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from None

    def close(self):
        if self.file:
            self.file.close()


class Views:
    """Dataset of (job's index, uint8 array (views, SIZE, SIZE, 3)), or (index, reason) where an image is unreadable.

    A job is (path, digest, view numbers): an image is read and decoded once for all its views. Arrays, not tensors:
    tensors would travel through shared memory, of which containers have little.
    """

    def __init__(self, jobs):
        self.jobs = jobs

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, index):
        import numpy as np

        def draw(path):
            content = Path(path).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:  # or the store would keep it under another image's hash
                raise ValueError("its content changed during this run")
            image = load_image(io.BytesIO(content))
            return np.stack([np.asarray(make_view(image, number, digest)) for number in numbers])

        path, digest, numbers = self.jobs[index]
        return index, read_or_explain(draw, path)


def fast_copy(network, device, dtype):
    """A copy of the network for the pass: precision dtype, channels_last, BatchNorm folded into the convolutions."""
    import copy

    import torch
    from torch.fx.experimental.optimization import fuse

    try:
        network = fuse(network)
    except Exception:  # fx cannot trace every network; the others keep their BatchNorm, with the same result
        return copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last)
    network = network.to(device, dtype, memory_format=torch.channels_last)
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        # operators without a public name: used where they are found and give what torch's own give, NaN included
        with contextlib.suppress(Exception), torch.inference_mode():
            noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
            noise = noise.to(dtype, memory_format=torch.channels_last)
            fused = fuse_convolutions(copy.deepcopy(network))
            expected, found = network(noise).float(), fused(noise).float()
            if torch.allclose(found, expected, rtol=0, atol=0.05 * expected.abs().max().item()):
                return fused
    return network


def onednn_convolution(conv):
    """The convolution as one call of oneDNN: module(x), module(x, relu=True), or relu(module(x) + add_to) into add_to.

    The operators are those that torch.compile uses on a CPU; torch has no public name for them.
    """
    import torch

    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.settings, self.shape = (conv.padding, conv.stride, conv.dilation, conv.groups), None

        def forward(self, x, add_to=None, relu=False):
            if self.shape != x.shape:  # the best layout of the weights depends on it
                self.shape, weight = x.shape, conv.weight.to_mkldnn()
                self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.settings, list(x.shape))
            given = (x, self.weight, conv.bias, *self.settings)
            if add_to is None:
                return torch.ops.mkldnn._convolution_pointwise(*given, "relu" if relu else "none", [], "")
            return torch.ops.mkldnn._convolution_pointwise_.binary(add_to, *given, "add", 1.0, "relu", [], "")

    return Convolution()


def fuse_convolutions(network):
    """The traced network itself, changed: a convolution, and the addition and ReLU behind it, are one call of oneDNN.

    What torch.compile takes half a minute for: a ResNet-50 needs a sixth less time, in bfloat16 and in float32.
    """
    import operator

    from torch import nn

    graph, ours = network.graph, set()  # ours: the nodes that call a convolution of oneDNN
    place = {node: number for number, node in enumerate(graph.nodes)}

    def may_add(out, other, add):
        """Whether the convolution `out` may write the sum into `other`: nothing needs either of them afterwards."""
        alone = out is not other and not out.kwargs and all(len(node.users) == 1 for node in (out, *out.args))
        return alone and all(user is add or (user in ours and place[user] < place[add]) for user in other.users)

    for node in list(place):
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            network.set_submodule(node.target, onednn_convolution(module))
            ours.add(node)
        if not isinstance(module, nn.ReLU) or len(node.all_input_nodes[0].users) > 1:
            continue
        before, fused, dead = node.all_input_nodes[0], None, [node]
        if before in ours:
            before.kwargs, fused = {"relu": True}, before
        elif before.target in (operator.add, operator.iadd):
            for out, other in (before.args, before.args[::-1]):
                if fused is None and {out, other} <= ours and may_add(out, other, before):
                    with graph.inserting_before(node):
                        fused = graph.call_module(out.target, (*out.args, other), {"relu": True})
                    place[fused], dead = place[node], [node, before, out]
                    ours.add(fused)
        if fused is not None:
            node.replace_all_uses_with(fused)
            for old in dead:
                graph.erase_node(old)
    network.recompile()
    return network


def forward_views(network, loader, size, device, dtype, unreadable):
    """Yields ([(job's index, position of the view in it)], float32 (n, width) on the CPU), batch by batch.

    Every batch has `size` images, the last one filled up with black ones: a vector then does not depend on how many
    others came with it. On CUDA two batches wait in the device's queue while the next one is gathered; each result is
    copied behind its batch, and an event tells that it has arrived. unreadable: receives {job's index: reason}.
    """
    import torch

    cuda = device.type == "cuda"  # elsewhere a copy that does not block may still read memory that is free again
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=device).view(3, 1, 1) * 255
    images, places, running = [], [], []

    def forward(images):
        batch = torch.stack(images + [torch.zeros_like(images[0])] * (size - len(images))).permute(0, 3, 1, 2)
        batch = batch.float().sub_(mean).div_(std).to(dtype, memory_format=torch.channels_last)
        vectors = network(batch).float().to("cpu", non_blocking=cuda)
        return vectors, torch.cuda.current_stream(device).record_event() if cuda else None

    def fetch():
        where, (vectors, arrived) = running.pop(0)
        if arrived:
            arrived.synchronize()
        return where, vectors[: len(where)]

    for index, pixels in loader:
        raise_if_stopped()
        if isinstance(pixels, str):
            unreadable[index] = pixels
            continue
        pixels = torch.from_numpy(pixels)
        pixels = pixels.pin_memory() if cuda else pixels
        images += pixels.to(device, non_blocking=cuda)
        places += [(index, i) for i in range(len(pixels))]
        while len(places) >= size:
            running.append((places[:size], forward(images[:size])))
            images, places = images[size:], places[size:]
            if len(running) > 2 * cuda:
                yield fetch()
    if places:
        running.append((places, forward(images)))
    while running:
        yield fetch()


def extract_features(network, width, images, views, args, device, dtype):
    """Features of the first views[i] views of images[i], read from the store or computed and kept there.

    Returns (features float32 (N, max(views), width) on the CPU, undefined beyond views[i]; {row: reason} of the
    unreadable images). The one pass that serves training, validation, test and new images. Under torchrun each rank
    computes a share into the store, and rank 0 goes on with all of them while the others end.
    """
    import torch

    if args.no_cache and rank_and_world()[1] > 1:
        raise Failure("--no-cache: torchrun's processes share their features through --cache-dir; leave --no-cache out")
    features = torch.zeros(len(images), max(views), width)
    wanted, paths, reasons = {}, {}, {}  # by content: the same image twice is computed once
    for row, (image, count) in enumerate(zip(images, views, strict=True)):
        if not image.digest:
            reasons[image.digest] = "the file cannot be opened"
            continue
        paths[image.digest] = image.path
        for view in range(count):
            wanted.setdefault(FeatureStore.key(image.digest, view), []).append((row, view))
    store = None if args.no_cache else FeatureStore(args.cache_dir, network, width, dtype)
    total = len(wanted)
    if store:
        store.load(wanted, features)
    if wanted:
        if store:
            require_space(store.folder, len(wanted) * store.record.itemsize, "--cache-dir, or compute with --no-cache")
            print(f"Features: {total - len(wanted)} of {total} are in {args.cache_dir}", flush=True)
        reasons |= compute_features(network, wanted, paths, features, store, args, device, dtype)
    if rank_and_world()[1] > 1:
        reasons = share_reasons(store, reasons)
        store.load(wanted, features)
    bad = {row: reasons[image.digest] for row, image in enumerate(images) if image.digest in reasons}
    lost = [images[row] for rows in wanted.values() for row, _ in rows if row not in bad]
    if lost:
        raise Failure(f"{args.cache_dir}: expected the features of all ranks, {len(lost)} are missing; run it again", 4)
    return features, bad


def compute_features(network, wanted, paths, features, store, args, device, dtype):
    """Computes this process's share of the `wanted` features into `features` and the store, taking it out of `wanted`.

    Returns {digest: reason} of the images that cannot be read.
    """
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    numbers = {}
    for key in wanted:
        numbers.setdefault(key[:32].hex(), []).append(int.from_bytes(key[32:], "little"))
    rank, world = rank_and_world()
    mine = set(list(paths)[rank::world])  # of all images: what others have stored meanwhile must not shift the shares
    jobs = [(paths[digest], digest, views) for digest, views in numbers.items() if digest in mine]
    loader = DataLoader(Views(jobs), **loader_settings(args.workers, len(jobs), device))
    size = min(args.batch_size, 16) if device.type == "cpu" else args.batch_size  # 16: the fastest on the CPUs measured
    unreadable, start, count = {}, time.perf_counter(), sum(len(views) for _, _, views in jobs)
    with torch.inference_mode(), tqdm(total=count, unit="img", disable=True if rank else None) as bar:
        network = fast_copy(network, device, dtype)
        for where, vectors in forward_views(network, watched(loader), size, device, dtype, unreadable):
            if not vectors.isfinite().all():
                raise Failure(f"the network's output is not finite in {dtype}; use --device cpu", 3)
            keys = [FeatureStore.key(jobs[index][1], jobs[index][2][i]) for index, i in where]
            if store:
                store.append(keys, vectors)
            for key, vector in zip(keys, vectors, strict=True):
                for row, view in wanted.pop(key):
                    features[row, view] = vector
            bar.update(len(keys))
    seconds, count = time.perf_counter() - start, count - sum(len(jobs[index][2]) for index in unreadable)
    print(f"Features: {count} computed in {seconds:.1f} s, {count / seconds:.0f} images/s", flush=True)
    return {jobs[index][1]: reason for index, reason in unreadable.items()}


def rank_and_world():
    """(this process's rank, number of processes) under torchrun, else (0, 1): a stray RANK must not drop images."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def share_reasons(store, reasons):
    """Waits for every rank's share of the pass; returns all ranks' {digest: reason} to rank 0 and ends the others."""
    import datetime

    import torch.distributed as dist

    store.close()  # a network file system shows others a file that is closed
    for each in (signal.SIGINT, signal.SIGTERM):  # torchrun sends it to the others when one died
        signal.signal(each, signal.SIG_DFL)  # no handler of Python's runs below
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # one rank may have much more to do
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, reasons)
        dist.destroy_process_group()
    except RuntimeError as error:
        raise Failure(
            f"a process that computes features died ({error}); what it computed is kept, run it again", 4
        ) from None
    if rank_and_world()[0]:
        raise SystemExit(0)
    return {digest: reason for share in shares for digest, reason in share.items()}


def loader_settings(workers, jobs, device):
    """DataLoader's arguments. Few images are decoded sooner than processes start.

    Where the network itself needs the CPU and there are two cores, processes only get in its way: with two of them the
    pass took 9.7 ms a view, with none 8.9 (medians of five).
    """
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(8, cores) if jobs >= 200 and (device.type != "cpu" or cores > 2) else 0
    # tuple: as they are; the default would make tensors of the arrays
    settings = {"batch_size": None, "collate_fn": tuple, "num_workers": workers, "worker_init_fn": begin_worker}
    return settings | ({"prefetch_factor": 4} if workers else {})


PATIENCE = 100  # seconds that a worker may take: two minutes in all, with the start of the processes


def watched(loader):
    """The loader's items. A worker that hangs is a Failure; DataLoader's timeout misses one that is handing over."""

    def give_up(*_):
        sys.unraisablehook = lambda _: None  # DataLoader's __del__ would complain
        for worker in multiprocessing.active_children():
            worker.kill()  # one that is stopped would not answer SIGTERM
        raise Failure("a process that decodes images hung: try --workers 0", 4)

    items, before = iter(loader), None
    with contextlib.suppress(ValueError):  # only the main thread may set a handler
        before = signal.signal(signal.SIGALRM, give_up) if loader.num_workers else None
    try:
        while True:
            signal.alarm(PATIENCE if before is not None else 0)
            item = next(items, None)
            signal.alarm(0)
            if item is None:
                return
            yield item
    finally:
        signal.alarm(0)
        if before is not None:
            signal.signal(signal.SIGALRM, before)


def begin_worker(_):
    """In a decoding process: the main process alone answers Ctrl-C and SIGTERM, and then ends its workers.

    If the main process is killed, its workers would wait for ever to hand over their images; a thread ends them.
    """

    def end_with(parent):
        while os.getppid() == parent and multiprocessing.parent_process().is_alive():  # a fork server stays the parent
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def require_space(folder, size, alternative):
    """A Failure unless `size` bytes are free where `folder` is, or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < size:
        raise Failure(f"{folder}: {size:,} bytes needed, {free:,} free; free some, or use {alternative}", 4)


def require_writable(*paths):
    """A Failure unless files can be written at `paths`; makes their folders."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise Failure(f"{path}: expected a file to write, found a folder or a device")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            error.filename = str(path.parent)  # not that of the trial
            raise


def without_bad(images, bad, skip):
    """The rows to keep, after every unreadable image has been named; without `skip` any one is a Failure."""
    lines = [f"{images[row].path}: {reason}" for row, reason in sorted(bad.items())]
    if lines and not skip:
        for line in lines[1:]:
            print(line, file=sys.stderr)
        more = f" (and {len(lines) - 1} more, above)" if lines[1:] else ""
        raise Failure(f"{lines[0]}{more}; repair or remove unreadable images, or leave them out with --skip-bad")
    for line in lines:
        warn(f"left out: {line}")
    return [row for row in range(len(images)) if row not in bad]


# ---------------------------------------------------------------- scores


def score(probs, labels, threshold):
    """{name: float, or None where a denominator is 0} of probs float (N,), P(PNEUMONIA), against labels int (N,).

    An image counts as PNEUMONIA above the threshold, not at it. Brier: mean squared error of the probability;
    ece: expected calibration error, 15 bins of equal width (Guo et al. 2017).
    """
    import torchmetrics.functional.classification as tm

    n_positive = int((probs > threshold).sum())
    values = {
        "accuracy": tm.binary_accuracy(probs, labels, threshold),
        "f1": tm.binary_f1_score(probs, labels, threshold),
        "auroc": tm.binary_auroc(probs, labels),
        "average_precision": tm.binary_average_precision(probs, labels),
        "sensitivity": tm.binary_recall(probs, labels, threshold),
        "specificity": tm.binary_specificity(probs, labels, threshold),
        "ppv": tm.binary_precision(probs, labels, threshold) if n_positive else None,
        "npv": tm.binary_negative_predictive_value(probs, labels, threshold) if n_positive < len(probs) else None,
        "brier": (probs - labels).square().mean(),
        "ece": tm.binary_calibration_error(probs, labels, n_bins=15),
    }
    return {name: None if value is None else float(value) for name, value in values.items()}


# ---------------------------------------------------------------- one-number rules


def image_numbers(path):
    """{name: float} of what a rule without any network could go by, see look_closely; raises what load_image raises."""
    return look_closely(path)[0]


def look_closely(path):
    """({name: float}, the grey image, {"sizes", "modes", "formats": its own}); raises what load_image raises.

    file size: bytes; width, height: pixels of the file; mode: bits a pixel (8 grey, 24 RGB); JPEG quality: 1 to 100 as
    libjpeg counts, from the quantisation table (exact from 20 to 99), 0 for other formats. Of the grey levels, 0 to
    255: mean, (standard) deviation, and sharpness, the mean absolute difference of vertical neighbours.
    """
    import numpy as np
    from PIL import Image as Pillow
    from PIL import ImageMode

    with Pillow.open(path, formats=FORMATS) as image:
        (width, height), mode = image.size, ImageMode.getmode(image.mode)
        kinds = {"sizes": f"{width}x{height}", "modes": image.mode, "formats": image.format}
        tables = getattr(image, "quantization", None)
    quality = 0
    if tables:
        scale = 100 * sum(tables[min(tables)]) / 3685  # 3685: the sum of libjpeg's luminance table at quality 50
        quality = min(100, max(1, round(100 - scale / 2 if scale <= 100 else 5000 / scale)))
    image = load_image(path).convert("L")
    grey = np.asarray(image, dtype=np.float32)
    numbers = {
        "file size": float(os.path.getsize(path)),
        "width": float(width),
        "height": float(height),
        "mode": 8.0 * int(mode.typestr[-1]) * len(mode.bands),
        "JPEG quality": float(quality),
        "mean": float(grey.mean()),
        "deviation": float(grey.std()),
        "sharpness": float(np.abs(np.diff(grey, axis=0)).mean()) if len(grey) > 1 else 0.0,
    }
    return numbers, image, kinds


def fit_rule(values, labels):
    """(cut, sign): the threshold and direction with the best accuracy on values float (N,), labels 0/1 (N,).

    See apply_rule. The cut lies midway between neighbouring values, or 1 below all of them; of equally accurate rules
    the one with the lowest cut and, there, sign +1.
    """
    import numpy as np

    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels)
    levels = np.unique(values)
    cuts = np.append(levels[0] - 1, levels[:-1] + np.diff(levels) / 2)
    below = [np.searchsorted(np.sort(values[labels == label]), cuts, "right") for label in (0, 1)]
    right = below[0] + (labels == 1).sum() - below[1]  # images that sign +1 gets right
    best = int(np.argmax(np.maximum(right, len(values) - right)))
    return float(cuts[best]), 1 if 2 * right[best] >= len(values) else -1


def apply_rule(rule, values):
    """bool (N,), True for PNEUMONIA: values float (N,) above the cut where sign is +1, at or below it where -1."""
    import numpy as np

    cut, sign = rule
    return (np.asarray(values) > cut) == (sign > 0)
