"""Transforms, device, the frozen network, and the pass from images to features.

train.py and evaluate.py share this file. Everything else that the scripts share is in the
package cxr/; its table of contents is in cxr/__init__.py.
"""

import contextlib
import copy
import difflib
import hashlib
import inspect
import os
import re
import sys
import time
from datetime import timedelta
from importlib import metadata
from typing import NamedTuple

import cxr.needs_torch  # before torch, because it explains what to do if a package is missing

# isort: split
import PIL.Image
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils.data import Dataset
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.transforms import v2

import cxr.decode
from cxr.cache import Cache, allocate
from cxr.checkpoint import strip_prefix
from cxr.decode import SIZE, apply_window, decode, explain_unreadable
from cxr.errors import (
    LIST_ALL,
    SHOWN,
    Failure,
    as_typed,
    is_system_error,
    progress,
    rank_and_world,
    show_progress,
    warn,
)
from cxr.finetune import describe_size
from cxr.loader import load_batches
from cxr.machine import count_cores

# ---------------------------------------------------------------- transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]

# The whole image is resized, because a centre crop could cut off parts of the lungs.
PREPARE = v2.Resize((SIZE, SIZE))

# Random changes of pose and exposure. If you edit them, the features are computed again.
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

# On the device, for a whole batch: uint8 (N, 1, SIZE, SIZE) to float32 (N, 3, SIZE, SIZE).
NORMALIZE = v2.Compose([v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def load_image(source, window):
    """Loads an X-ray, resizes it and applies the window. Returns PIL, mode L, SIZE x SIZE.

    source: a path, or a file's content as bytes; window: see apply_window. Raises as decode does.
    """
    return apply_window(PREPARE(decode(source, SIZE).grey), window)


def make_view(image, number, sha256):
    """Returns view `number` of an image (PIL, mode L).

    View 0 is the image, view 1 its mirror image. From view 2 on, AUGMENT changes the image.
    """
    if number == 0:
        return image
    if number == 1:
        return v2.functional.horizontal_flip(image)
    # The seed depends only on the image and the number, so a view is the same in every run.
    # torch.manual_seed would also seed every GPU, which takes a fifth of the time of a view.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(sha256[:15], 16) + number)  # 60 bits of the hash
        return AUGMENT(image)


# ---------------------------------------------------------------- device


def pick_device(name):
    """Returns the torch.device for --device, and the fast dtype of its hardware.

    Raises Failure if the device is missing, or if it was asked for and cannot be used.
    """
    is_auto = name == "auto"
    if is_auto:
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    if name == "cuda":
        # Under torchrun, each process uses another GPU.
        is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        name = f"cuda:{os.environ['LOCAL_RANK']}" if is_torchrun else "cuda:0"
    check_device_exists(name)
    reason = try_device(name)
    if reason:
        if not is_auto:
            asked = as_typed("--device", "DEVICE", name)
            raise Failure(f"{asked}: cannot be used ({reason}); use auto or cpu", 4)
        warn(
            f"{name} cannot be used ({reason}), so the CPU is used. For the GPU, update its "
            "driver or PyTorch"
        )
        name = "cpu"
    device = torch.device(name)
    torch.set_num_threads(min(torch.get_num_threads(), count_cores()))
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # otherwise float32 is rounded to 10 bits
    print(f"Device: {name}")
    return device, fast_dtype(device)


@contextlib.contextmanager
def one_thread():
    """Lets torch use one thread of this process."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def check_device_exists(name):
    """Raises Failure if `name` is not cpu, mps or cuda:N, or if there is no such device."""
    asked = as_typed("--device", "DEVICE", name)
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise Failure(f"{asked}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    n_mps = int(torch.backends.mps.is_available())
    counts = {"cpu": 1, "mps": n_mps, "cuda": torch.cuda.device_count()}
    count = counts[device.type]
    if (device.index or 0) >= count:
        raise Failure(f"{asked}: no such device ({count} found); use auto or cpu")


def try_device(name):
    """Runs a small convolution on a device. Returns the error as text, "" if it works."""
    try:
        x = torch.ones(1, 1, 4, 4, device=name)
        nn.functional.conv2d(x, x).cpu()
    except RuntimeError as error:  # the GPU is too old for this torch, or in use by others
        return " ".join(str(error).split())[:120]
    return ""


def fast_dtype(device):
    """Returns bfloat16 if the hardware has it (not on MPS), else float16 on CUDA, else float32."""
    if device.type == "mps":
        return torch.float32
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


# ---------------------------------------------------------------- network


OTHER_TASKS = r"models\.(detection|optical|quantiz|segment|video)"  # modules without classifiers


class Backbone(NamedTuple):
    """The frozen network without its last Linear layer."""

    network: nn.Module  # images float32 (N, 3, SIZE, SIZE) to features float32 (N, width)
    head_name: str  # name of the last Linear layer, for example fc
    width: int  # features of an image
    weight: torch.Tensor | None  # of the last Linear layer; None if the checkpoint has none
    bias: torch.Tensor | None
    normalize: v2.Compose  # with the mean and standard deviation of the published weights


def build_backbone(arch, state=None, source=None):
    """Builds torchvision's classifier `arch` without its last Linear layer, and freezes it.

    state: state dict of the whole network, read from the file `source`; None for random weights,
    which are the same in every run. Raises Failure if arch or state do not fit.
    """
    asked = as_typed("--arch", "ARCH", arch)
    if arch not in list_models() or re.search(OTHER_TASKS, get_model_builder(arch).__module__):
        similar = difflib.get_close_matches(arch, list_models(), 3) or ["resnet50", "densenet121"]
        similar = ", ".join(similar)
        raise Failure(f"{asked}: not a classifier of torchvision; did you mean {similar}?")
    # The meta device draws no random weights: the state dict replaces them anyway.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if state else "cpu"):
        torch.manual_seed(0)
        network = get_model(arch, weights=None)
    head_name, head = list(network.named_modules())[-1]
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise Failure(f"{asked}: its last layer must be a Linear layer, but is {kind}")
    network.set_submodule(head_name, nn.Identity())
    if hasattr(network, "transform_input"):
        network.transform_input = True  # googlenet, inception_v3: their weights need it
    weight = bias = None
    if state:
        state = strip_prefix(state, network, source)
        weight = state.pop(f"{head_name}.weight", None)
        bias = state.pop(f"{head_name}.bias", None)
        load_backbone_state(network, state, head_name, arch, source)
    # Frozen: no gradients, BatchNorm never uses batch statistics, and only the head is optimized.
    network.float().eval().requires_grad_(False)
    return Backbone(network, head_name, head.in_features, weight, bias, normalize_for(arch))


def load_backbone_state(network, state, head_name, arch, source):
    """Loads a state dict into a network without head. Raises Failure if it does not fit."""
    # Another head, and parts that the network does not have, are ignored.
    own_names = network.state_dict()
    parts = {name for name, _ in network.named_children()} - {head_name.split(".")[0]}
    state = {k: v for k, v in state.items() if k in own_names or k.split(".")[0] in parts}
    try:
        network.load_state_dict(state, assign=True)
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise Failure(f"{source}: not the weights of {arch}: {reason:.160}") from None


def normalize_for(arch):
    """Returns NORMALIZE with the mean and standard deviation of the published weights of `arch`."""
    try:
        preset = get_model_weights(arch).DEFAULT.transforms()
        mean, std = tuple(preset.mean), tuple(preset.std)
    except (ValueError, AttributeError):  # there are no published weights
        return NORMALIZE
    if (mean, std) == (MEAN, STD):
        return NORMALIZE
    return v2.Compose([*NORMALIZE.transforms[:-1], v2.Normalize(preset.mean, preset.std)])


def prepare_network(network, device, dtype, compiled, fused=True):
    """Returns a fast copy of the network in channels_last.

    fused: folds BatchNorm into the convolutions.
    """
    if fused:
        with contextlib.suppress(Exception):  # a network that fx cannot trace keeps its BatchNorm
            network = fuse(network)
    network = copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network, options={"freezing": True})
    return network


# ---------------------------------------------------------------- features

BATCH_SIZES = {"cuda": 256, "mps": 32, "cpu": 16}  # views: the fastest that were measured


class Views(Dataset):
    """The first views of images: item i is (i, uint8 (n_views, 1, SIZE, SIZE), reason).

    reason: why image i cannot be read (then all its pixels are 0), "" if it can.
    """

    def __init__(self, xrays, n_views, window):
        self.xrays, self.n_views, self.window = xrays, n_views, window
        self.item_bytes = n_views * SIZE * SIZE

    def __len__(self):
        return len(self.xrays)

    def __getitem__(self, i):
        xray = self.xrays[i]
        try:
            content = xray.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != xray.sha256:
                raise ValueError("its content changed during this run")
            image = load_image(content, self.window)
            views = [make_view(image, number, xray.sha256) for number in range(self.n_views)]
            return i, torch.stack([v2.functional.pil_to_tensor(view) for view in views]), ""
        except Exception as error:  # damaged files make decoders raise nearly anything
            if is_system_error(error):
                raise
            zeros = torch.zeros(self.n_views, 1, SIZE, SIZE, dtype=torch.uint8)
            return i, zeros, explain_unreadable(xray.path, error)


def extract_features(
    backbone, xrays, args, *, n_views, window, device, dtype, compiled=False, on_image=None
):
    """Computes the features of the first views of each image, or loads them from the cache.

    Returns (features (N, n_views, width) in `dtype` on the CPU, the N readable Xrays, {path:
    reason} of the unreadable ones). Without --skip-bad, raises Failure if an image with a label is
    unreadable.
    on_image: function that is called with (Xray, view 0 as uint8 (SIZE, SIZE)) for each image that
    is decoded here. Images in the cache are not decoded.
    """
    rank, world = rank_and_world()
    batch_size = args.feature_batch_size or BATCH_SIZES[device.type]
    cache = None
    if not args.no_cache:
        cache = Cache(args.cache_dir, cache_key(backbone, window, dtype, compiled, batch_size))
    elif world > 1:
        raise Failure("--no-cache: the processes of torchrun need the cache; leave --no-cache out")
    features = allocate((len(xrays), n_views, backbone.width), dtype, args.cache_dir)

    def compute(rows):
        """Fills features[rows]. Returns {path: reason} of unreadable images."""
        missing = cache.load(features, xrays, rows) if cache else rows
        views = Views([xrays[row] for row in missing], n_views, window)
        unreadable = {}
        options = (batch_size, args.workers, device, dtype)
        passed = run_network(backbone, views, *options, compiled=compiled, on_image=on_image)
        for i, vectors, reason in passed:
            xray = views.xrays[i]
            if reason:
                unreadable[xray.path] = reason
                continue
            features[missing[i]] = vectors
            if cache:
                cache.save(xray, vectors)
        return unreadable

    # Each process of torchrun computes its share into the cache. Rank 0 then loads all of it.
    unreadable = compute(range(rank, len(xrays), world))
    if world > 1:
        wait_for_all_ranks()
        unreadable = compute(range(len(xrays))) if rank == 0 else {}
    report_unreadable(unreadable, xrays, args.skip_bad)
    if not unreadable:
        return features, xrays, unreadable
    kept = [row for row, xray in enumerate(xrays) if xray.path not in unreadable]
    for new_row, row in enumerate(kept):  # without a second copy of all features
        features[new_row] = features[row]
    return features[: len(kept)], [xrays[row] for row in kept], unreadable


def extract_activations(backbone, part, xrays, args, *, n_views, device, dtype):
    """Computes the activations of the first views of each image. They are not cached.

    part: the FrozenPart of the network. Returns (N, n_views, ...) in `dtype` on the CPU. Raises
    Failure if an image cannot be read.
    """
    with torch.inference_mode():
        shape = (len(xrays), n_views, *part(torch.zeros(1, 3, SIZE, SIZE)).shape[1:])
    progress(f"Activations: {describe_size(shape, dtype)}")
    activations = allocate(shape, dtype, args.cache_dir)
    batch_size = args.feature_batch_size or BATCH_SIZES[device.type]
    views = Views(xrays, n_views, args.window)
    options = (batch_size, args.workers, device, dtype)
    # A fused network is traced, and then the hook at the cut is not called.
    cut = backbone._replace(network=part)
    for i, values, reason in run_network(cut, views, *options, fused=False, title="Activations"):
        if reason:
            raise Failure(f"{xrays[i].path}: {reason}")
        activations[i] = values
    return activations


def cache_key(backbone, window, dtype, compiled, batch_size):
    """Returns a hash of all that the features depend on, except the image."""
    digest = hashlib.sha256()
    for name, tensor in backbone.network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).numpy().data)
    transform_input = getattr(backbone.network, "transform_input", False)
    depends_on = [backbone.network, PREPARE, AUGMENT, backbone.normalize, transform_input]
    depends_on += [window, dtype, compiled, batch_size]
    depends_on += [inspect.getsource(code) for code in (cxr.decode, load_image, make_view)]
    depends_on += [torchvision.__version__, PIL.__version__, metadata.version("pydicom")]
    digest.update("\n".join(map(str, depends_on)).encode())
    # The text of AUGMENT does not show everything, for example the body of a lambda.
    test_image = PIL.Image.radial_gradient("L").resize((SIZE, SIZE))
    for number in range(8):
        digest.update(make_view(test_image, number, "0" * 64).tobytes())
    return digest.hexdigest()[:24]


@torch.inference_mode()
def run_network(
    backbone,
    views,
    batch_size,
    workers,
    device,
    dtype,
    *,
    compiled=False,
    fused=True,
    title="Features",
    on_image=None,
):
    """Yields (i, features (n_views, width) in `dtype` on the CPU, reason) for each item of `views`.

    batch_size: views per batch; workers: of --workers; compiled, fused: see prepare_network; title:
    what is computed; on_image: as in extract_features. reason: why the image could not be read, ""
    if it could. Raises Failure if the device or a worker process fails.
    """
    if len(views) == 0:
        return
    total = len(views) * views.n_views
    bar, start = show_progress(title, total, " views"), time.perf_counter()
    # Beside a GPU, this process only handles small tensors. With several threads, those that are
    # idle would take the cores from the worker processes.
    threads = contextlib.nullcontext() if device.type == "cpu" else one_thread()
    try:
        with threads:
            network = prepare_network(backbone.network, device, dtype, compiled, fused)
            images_per_batch = max(1, batch_size // views.n_views)
            batches = load_batches(views, images_per_batch, workers, device)
            if on_image:
                batches = with_calls(batches, views, on_image)
            computed = compute_batches(
                network, backbone.normalize, batches, batch_size, device, dtype
            )
            for indexes, copied, reasons in computed:
                vectors = copied.wait()
                if not vectors.isfinite().all():
                    message = f"the output of the network is not finite in {dtype}"
                    raise Failure(f"{message}; use --device cpu (make: DEVICE=cpu)", 3)
                yield from zip(indexes.tolist(), vectors, reasons, strict=True)
                bar.update(vectors.shape[:2].numel())
    except RuntimeError as error:  # memory, a dead or hung worker, an operator the device lacks
        reason = " ".join(str(error).split())[:200]
        advice = (
            "use a smaller --feature-batch-size (make: FEATURE_BATCH_SIZE=8), --workers 0 (make: "
            "WORKERS=0) or --device cpu (make: DEVICE=cpu)"
        )
        raise Failure(f"computing {title.lower()} failed ({reason}); {advice}", 4) from error
    finally:
        bar.close()
    seconds = time.perf_counter() - start
    speed = f"{total / seconds:.0f} views per second ({str(dtype).removeprefix('torch.')})"
    progress(f"{title}: computed {len(views)} images, {total} views in {seconds:.1f} s, {speed}")


def with_calls(batches, views, on_image):
    """Yields the batches, after a call of on_image(Xray, view 0) for each readable image."""
    for indexes, pixels, reasons in batches:
        for i, image, reason in zip(indexes.tolist(), pixels, reasons, strict=True):
            if not reason:
                on_image(views.xrays[i], image[0, 0].numpy())
        yield indexes, pixels, reasons


def compute_batches(network, normalize, batches, batch_size, device, dtype):
    """Yields (indexes, CopyToCpu of the features (n, n_views, width), reasons) for each batch.

    batches: yields (indexes, uint8 (n, n_views, 1, SIZE, SIZE), reasons).
    """
    previous = None  # one batch behind: a GPU computes the next batch while this one is used
    for indexes, pixels, reasons in batches:
        vectors = []
        for views in pixels.flatten(0, 1).split(batch_size):
            inputs = views.to(device, non_blocking=device.type == "cuda")
            # All batches have one shape, because the last bits of the features depend on it.
            padding = inputs.new_zeros(batch_size - len(views), *views.shape[1:])
            inputs = normalize(torch.cat([inputs, padding]))
            inputs = inputs.to(dtype, memory_format=torch.channels_last)
            vectors.append(network(inputs)[: len(views)])
        vectors = torch.cat(vectors).unflatten(0, pixels.shape[:2])
        if previous:
            yield previous
        previous = indexes, CopyToCpu(vectors), reasons
    yield previous


class CopyToCpu:
    """A copy of a tensor to the CPU. With CUDA, it begins without waiting for the GPU."""

    def __init__(self, tensor):
        self.tensor = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self.event = None
        if tensor.is_cuda:
            self.event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self):
        """Waits until the copy is complete, and returns it."""
        if self.event:
            self.event.synchronize()
        return self.tensor


def wait_for_all_ranks():
    """Waits until all processes of torchrun have computed their share."""
    try:
        if not dist.is_initialized():
            # The timeout is long because one rank may have much more to do than the others.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()
    except RuntimeError as error:
        message = f"another process failed ({error}); run it again: finished features are kept"
        raise Failure(message, 4) from None


def end_other_ranks():
    """Ends this process of torchrun unless it is rank 0, which does the rest alone."""
    if rank_and_world()[0] > 0:
        raise SystemExit(0)


def report_unreadable(unreadable, xrays, skip_bad):
    """Names the images with a label that could not be read. Without --skip-bad, raises Failure.

    New images have no label: evaluate.py names those that are unreadable in its table. unreadable:
    {path: reason}; xrays: all images of the pass.
    """
    labelled = [xray for xray in xrays if xray.label is not None]
    lines = [f"{x.path}: {unreadable[x.path]}" for x in labelled if x.path in unreadable]
    if not lines:
        return
    advice = f"; split_val.py {LIST_ALL}"
    if not skip_bad:
        for line in lines[1:SHOWN]:  # the Failure names the first one
            print(line, file=sys.stderr)
        message = lines[0]
        if len(lines) > 1:
            message += f" (and {len(lines) - 1} more{advice})"
        skip = "leave such images out with --skip-bad (make: ARGS=--skip-bad)"
        raise Failure(f"{message}; repair or remove it, or {skip}")
    for line in lines[:SHOWN]:
        warn(f"left out: {line}; repair it or remove it")
    if len(lines) > SHOWN:
        warn(f"left out: {len(lines)} images in all{advice}")
