"""What split_val.py, train.py and evaluate.py share: transforms, images and patients, the frozen
network and its features, scores, and what every command line needs."""

import contextlib
import copy
import difflib
import hashlib
import inspect
import os
import re
import signal
import sys
import time
from datetime import timedelta
from importlib import metadata
from typing import NamedTuple

import cxr.decode  # first: it says what to do where a package is missing

# isort: split
import PIL.Image
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.transforms import v2
from tqdm import tqdm

from cxr.cache import Cache
from cxr.checkpoint import strip_prefix
from cxr.decode import apply_window, decode, explain_unreadable
from cxr.errors import SHOWN, Failure, is_system_error, progress, rank_and_world, warn

# ---------------------------------------------------------------- transforms

SIZE = 224  # pixels, height and width of what the network sees
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]

# The whole film: a centre crop would take the apices and the bases off one that is not square.
PREPARE = v2.Resize((SIZE, SIZE))

# Random changes of pose and exposure. Edit it as you like: the cache notices.
AUGMENT = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(
            degrees=10,
            translate=(0.05, 0.05),
            scale=(0.9, 1.1),
            interpolation=v2.InterpolationMode.BILINEAR,
        ),
        v2.ColorJitter(brightness=0.2, contrast=0.35),
    ]
)

# On the device, a batch at a time: uint8 (N, 1, SIZE, SIZE) to float32 (N, 3, SIZE, SIZE).
# Where a network's published weights want another mean and deviation, it gets them.
NORMALIZE = v2.Compose([v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def make_view(image, number, digest):
    """View `number` of a prepared image (PIL, mode L): itself, its mirror image, from 2 on AUGMENT.

    AUGMENT is drawn from the image's SHA-256 `digest` and the number, so that a view is the same on
    every machine, in every run and in any order: that makes its features worth keeping.
    """
    if number < 2:
        return v2.functional.horizontal_flip(image) if number else image
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(digest[:15], 16) + number)
        return AUGMENT(image)


# ---------------------------------------------------------------- images and patients


def load_image(source, window):
    """The radiograph as the network sees it: PIL, mode L, SIZE x SIZE; raises as decode."""
    return apply_window(PREPARE(decode(source, SIZE).grey), window)


# ---------------------------------------------------------------- network


def pick_device(name):
    """(torch.device, fast dtype for training views) for --device; an absent one is a Failure."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if auto := name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda":
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        name += f":{os.environ['LOCAL_RANK'] if under_torchrun else 0}"  # a GPU for each process
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise Failure(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    count = int(mps) if name == "mps" else torch.cuda.device_count() if name != "cpu" else 1
    if (device.index or 0) >= count:
        found = f"no such device here ({count} found)"
        raise Failure(f"--device {name}: {found}; use --device auto or cpu")
    if error := try_device(name):
        if not auto:
            raise Failure(f"--device {name}: cannot be used ({error}); use --device auto or cpu", 4)
        warn(f"{device.type} cannot be used ({error}): going on with the CPU")
        name, device = "cpu", torch.device("cpu")
    dtype = torch.float32
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # it would round what is scored to 10 bits
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if bf16 else torch.float16
    elif device.type == "cpu":
        native = torch.cpu.get_capabilities()
        if any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            dtype = torch.bfloat16
    print(f"Device: {name}")
    return device, dtype


def try_device(name):
    """Why a small convolution fails there, "" where it works: a GPU may be too old, or taken."""
    try:
        x = torch.ones(1, 1, 4, 4, device=name)
        nn.functional.conv2d(x, x).cpu()
    except RuntimeError as error:
        return " ".join(str(error).split())[:120]
    return ""


class Backbone(NamedTuple):
    network: nn.Module  # images float32 (N, 3, SIZE, SIZE) to features float32 (N, width), frozen
    head_name: str  # of the last Linear, which the network does without
    width: int
    weight: torch.Tensor | None  # of the last Linear in the checkpoint, None without one
    bias: torch.Tensor | None
    normalize: v2.Compose  # as its published weights want it


def build_backbone(arch, state=None, source=None):
    """torchvision's classifier `arch`, frozen, without its last Linear.

    state: {name: tensor} of the whole network, read from `source`; None draws random weights,
    always the same. Frozen means, here and only here: no gradients, and eval mode, so that
    BatchNorm neither uses nor updates batch statistics.
    """
    module = get_model_builder(arch).__module__ if arch in list_models() else None
    if not module or re.search(r"models\.(detection|optical|quantiz|segment|video)", module):
        close = difflib.get_close_matches(arch, list_models(), 3) or ["resnet50", "densenet121"]
        raise Failure(f"--arch {arch}: no classifier of torchvision; perhaps {', '.join(close)}?")
    with torch.random.fork_rng(devices=[]), torch.device("meta" if state else "cpu"):
        torch.manual_seed(0)
        network = get_model(arch, weights=None)
    name, last = list(network.named_modules())[-1]
    if not isinstance(last, nn.Linear):
        found = type(last).__name__
        raise Failure(f"--arch {arch}: expected a network that ends in a Linear, found {found}")
    network.set_submodule(name, nn.Identity())
    if hasattr(network, "transform_input"):
        network.transform_input = True  # from ImageNet's normalisation to these weights' own
    weight = bias = None
    if state:
        state = strip_prefix(state, network, source)
        weight, bias = state.pop(f"{name}.weight", None), state.pop(f"{name}.bias", None)
        own, parts = network.state_dict(), {part for part, _ in network.named_children()}
        parts.discard(name.split(".")[0])  # any other head, and what is no part of the network
        state = {k: v for k, v in state.items() if k in own or k.split(".")[0] in parts}
        try:
            network.load_state_dict(state, assign=True)
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split("\n\t", 1)[-1].split())
            raise Failure(f"{source}: not the weights of a {arch}: {reason:.160}") from None
    network.float().eval().requires_grad_(False)
    return Backbone(network, name, last.in_features, weight, bias, normalize_for(arch))


def normalize_for(arch):
    """NORMALIZE with the mean and deviation that the published weights of `arch` want."""
    try:
        preset = get_model_weights(arch).DEFAULT.transforms()
        if (*preset.mean, *preset.std) == (*MEAN, *STD):
            return NORMALIZE
        return v2.Compose([*NORMALIZE.transforms[:-1], v2.Normalize(preset.mean, preset.std)])
    except (ValueError, AttributeError):  # there are none
        return NORMALIZE


# ---------------------------------------------------------------- features


class Views(Dataset):
    """Item i: (i, uint8 (n_views, 1, SIZE, SIZE), ""), image i in its first views, decoded once.

    An image that cannot be read comes as (i, zeros, the reason).
    """

    def __init__(self, images, n_views, window):
        self.images, self.n_views, self.window = images, n_views, window

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        path, digest = self.images[i].path, self.images[i].sha256
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError("its content changed during this run")
            image = load_image(content, self.window)
            views = (make_view(image, n, digest) for n in range(self.n_views))
            return i, torch.stack([v2.functional.pil_to_tensor(view) for view in views]), ""
        except Exception as error:  # damaged files make decoders raise nearly anything
            if is_system_error(error):
                raise
            zeros = torch.zeros(self.n_views, 1, SIZE, SIZE, dtype=torch.uint8)
            return i, zeros, explain_unreadable(path, error)


def cache_key(backbone, window, dtype, compiled):
    """What the features of an image depend on, apart from the image, as a hash."""
    digest = hashlib.sha256()
    for name, tensor in backbone.network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).numpy().data)
    depends_on = [backbone.network, PREPARE, AUGMENT, backbone.normalize]
    depends_on += [getattr(backbone.network, "transform_input", False), window, dtype, compiled]
    depends_on += map(inspect.getsource, (cxr.decode, load_image, make_view))
    depends_on += [torchvision.__version__, PIL.__version__, metadata.version("pydicom")]
    digest.update("\n".join(map(str, depends_on)).encode())
    probe = PIL.Image.radial_gradient("L").resize((SIZE, SIZE))
    for number in range(8):  # what AUGMENT does may not show in its name
        digest.update(make_view(probe, number, "0" * 64).tobytes())
    return digest.hexdigest()[:24]


def extract_features(backbone, images, n_views, window, device, dtype, args, compiled=False):
    """The first n_views views of each image through the frozen network, computed in `dtype`.

    Returns (features float32 (N, n_views, width) on the CPU, {row: reason} of unreadable images).
    What is in the cache is not computed again. Under torchrun each rank computes a share into the
    cache; rank 0 goes on with what all of them wrote, and the others end.
    """
    rank, world = rank_and_world()
    if args.no_cache and world > 1:
        raise Failure("--no-cache: torchrun's processes share --cache-dir; leave --no-cache out")
    cache = None
    if not args.no_cache:
        cache = Cache(args.cache_dir, cache_key(backbone, window, dtype, compiled))
    features = torch.zeros(len(images), n_views, backbone.width)

    def compute(rows):
        if cache:
            rows = cache.fill(features, images, rows)
        views = Views([images[row] for row in rows], n_views, window)
        return run_network(backbone, views, rows, features, cache, device, dtype, args, compiled)

    bad = compute(range(rank, len(images), world))
    if world > 1:
        wait_for_all_ranks()
        bad = {} if rank else compute(range(len(images)))  # left is what no rank could read
    return features, bad


@torch.inference_mode()
def run_network(backbone, views, rows, features, cache, device, dtype, args, compiled):
    """Fills features[rows] with what the network makes of `views`; returns {row: why unreadable}.

    Every batch has one shape, the last one is filled up with black pictures: a vector then does not
    depend on how many others came with it.
    """
    bad, start = {}, time.perf_counter()
    if not rows:
        return bad
    # 16 is the fastest on the CPUs measured
    batch_size = min(args.batch_size, 16) if device.type == "cpu" else args.batch_size
    workers = count_workers(args.workers, len(rows), device)
    loader = DataLoader(
        views,
        batch_size=max(1, batch_size // views.n_views),
        pin_memory=device.type == "cuda",
        num_workers=workers,
        worker_init_fn=leave_ctrl_c_to_main,
        timeout=120 if workers else 0,  # seconds until one that hangs is given up
        prefetch_factor=4 if workers else None,
    )
    bar = tqdm(total=len(rows) * views.n_views, unit=" views", disable=None)  # on a terminal only
    done, told = 0, start
    try:
        network = prepare_network(backbone.network, device, dtype, compiled)
        for indexes, pictures, reasons in start_workers(loader):
            vectors = []
            for batch in pictures.flatten(0, 1).split(batch_size):
                filling = batch.new_zeros(batch_size - len(batch), *batch.shape[1:])
                pixels = torch.cat([batch, filling]).to(device, non_blocking=loader.pin_memory)
                pixels = backbone.normalize(pixels).to(dtype, memory_format=torch.channels_last)
                vectors.append(network(pixels).float().cpu()[: len(batch)])
            vectors = torch.cat(vectors).unflatten(0, pictures.shape[:2])
            if not vectors.isfinite().all():
                raise Failure(f"the network's output is not finite in {dtype}; use --device cpu", 3)
            for index, vector, reason in zip(indexes.tolist(), vectors, reasons, strict=True):
                row = rows[index]
                features[row] = vector
                if reason:
                    bad[row] = reason
                elif cache:
                    cache.save(views.images[index], vector)
            bar.update(count := vectors.shape[:2].numel())
            done += count
            if bar.disable and time.perf_counter() > told + LOG_EVERY:
                told = time.perf_counter()
                left = (told - start) * (bar.total - done) / done
                progress(f"Features: {done} of {bar.total} views, {left:.0f} s left")
    except RuntimeError as error:  # memory, a dead or hung worker, an operator the device lacks
        reason = " ".join(str(error).split())[:200]
        remedy = "try a smaller --batch-size, --workers 0 or --device cpu"
        raise Failure(f"computing features failed ({reason}); {remedy}", 4) from error
    finally:
        bar.close()
    seconds, count = time.perf_counter() - start, len(rows) * views.n_views
    precision = str(dtype).removeprefix("torch.")
    speed = f"{count} views in {seconds:.1f} s, {count / seconds:.0f} a second ({precision})"
    progress(f"Features: {len(rows)} images computed, {speed}")
    return bad


def start_workers(loader):
    """iter(loader), with a Failure where the system has no processes, semaphores or memory left."""
    try:
        return iter(loader)
    except OSError as error:
        failed = f"the processes that decode images cannot start ({error})"
        raise Failure(f"{failed}; use --workers 0", 4) from error


def prepare_network(network, device, dtype, compiled):
    """A copy for the pass: in `dtype`, channels_last, BatchNorm folded into the convolutions."""
    with contextlib.suppress(Exception):  # what fx cannot trace keeps its BatchNorm
        network = fuse(network)
    network = copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last)
    return torch.compile(network, options={"freezing": True}) if compiled else network


def count_workers(workers, n_images, device):
    """Processes that decode, for --workers. Few images are decoded sooner than processes start.

    Where the network needs both of two cores, they get in its way: 9.7 ms a view, without 8.9.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores) if n_images >= 200 and (device.type != "cpu" or cores > 2) else 0


def leave_ctrl_c_to_main(_):
    """In a worker: the main process alone answers Ctrl-C, ends its workers, and speaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")  # a thread of multiprocessing would print a traceback


def wait_for_all_ranks():
    """Returns when every rank has computed its share."""
    try:
        if not dist.is_initialized():
            # days: one rank may have much more to do
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()
    except RuntimeError as error:
        reason = f"another process failed ({error})"
        raise Failure(f"{reason}; what was computed is kept, run it again", 4) from None


def end_other_ranks():
    """Rank 0 goes on alone: what is left to do takes a second."""
    if rank_and_world()[0]:
        raise SystemExit(0)


LOG_EVERY = 30  # seconds between two lines on the pass in a log file


def drop_unreadable(images, bad, skip_bad):
    """The rows to keep, after naming unreadable images; without skip_bad one is a Failure."""
    lines = [f"{images[row].path}: {reason}" for row, reason in sorted(bad.items())]
    if lines and not skip_bad:
        for line in lines[1:SHOWN]:
            print(line, file=sys.stderr)
        check = "" if images[0].label is None else "; split_val.py --check lists all"
        more = f" (and {len(lines) - 1} more{check})" if lines[1:] else ""
        raise Failure(
            f"{lines[0]}{more}; repair or remove it, or leave such images out with --skip-bad"
        )
    for line in lines[:SHOWN]:
        warn(f"left out: {line}")
    if lines[SHOWN:]:
        warn(f"left out: {len(lines)} images in all; split_val.py --check lists them")
    return [row for row in range(len(images)) if row not in bad]
