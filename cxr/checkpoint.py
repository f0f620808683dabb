"""Reads state dicts safely, finds pretrained weights, and writes our checkpoint."""

import http.client
import io
import re
import socket
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torchvision.models import get_model_weights

from cxr.errors import DISK_FULL, Failure, as_typed, warn
from cxr.files import atomic_write, hash_file, write_json

RESNET50_SHA256 = "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"

TIMEOUT = 20  # seconds without an answer until a download is given up
MAX_UNPACKING = 10  # a zip file that unpacks to more than 10 times its size is a bomb


def load_weights(args):
    """Returns (state dict, its file) for --weights, or (None, None) for random weights."""
    if args.weights == "random":
        asked = as_typed("--weights", "WEIGHTS", "random")
        warn(
            f"{asked}: the network is not pretrained, so the scores are only for a demo. For a "
            "result, use --weights imagenet (make: WEIGHTS=imagenet)"
        )
        return None, None
    path = imagenet_file(args.arch) if args.weights == "imagenet" else Path(args.weights)
    if not path.is_file():
        asked = as_typed("--weights", "WEIGHTS", path)
        raise Failure(
            f"{asked}: no such file; expected imagenet, random or the file of a state dict"
        )
    return read_state_dict(path), path


def imagenet_file(arch):
    """Returns the file of torchvision's ImageNet weights. Downloads it if it is missing.

    Raises Failure if its SHA-256 is not the published one.
    """
    try:
        url = get_model_weights(arch).DEFAULT.url
    except (ValueError, AttributeError):
        asked = as_typed("--arch", "ARCH", arch)
        message = f"{asked}: torchvision has no ImageNet weights for it"
        raise Failure(f"{message}; use --weights FILE (make: WEIGHTS=FILE)") from None
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    # The names of torchvision's files end in the first 8 digits of their SHA-256.
    sha256 = RESNET50_SHA256 if arch == "resnet50" else path.stem.rpartition("-")[2]
    advice = (
        f"or download {url} elsewhere, and copy it to {path} or use --weights FILE "
        "(make: WEIGHTS=FILE)"
    )
    if not path.exists():
        download(url, path, sha256, advice)
    if not hash_file(path).startswith(sha256):
        raise Failure(f"{path}: its SHA-256 is not the published one; delete the file, {advice}")
    return path


def download(url, path, sha256, advice):
    """Downloads a file. Raises Failure with the advice if this fails. sha256: or its beginning."""
    print(f"Downloading {url} to {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # otherwise a server that stops answering blocks forever
    try:
        torch.hub.download_url_to_file(url, str(path), sha256, sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        message = f"cannot download the ImageNet weights ({error}): try again, {advice}"
        status = 4 if getattr(error, "errno", None) in DISK_FULL else 2
        raise Failure(message, status) from None
    finally:
        socket.setdefaulttimeout(default_timeout)


def read_state_dict(path):
    """Reads {name: tensor} from a checkpoint, without executing code in the file.

    It is a file of torch.save, or a safetensors file, as timm and the Hugging Face hub use them.
    Raises Failure if the file is damaged, or if a tensor is impossible in a trained network.
    """
    path = Path(path)
    if not path.is_file():
        advice = (
            "run train.py (make train) first, or name one with --checkpoint FILE (make: MODEL=FILE)"
        )
        raise Failure(f"{path}: no such file, expected a checkpoint; {advice}")
    try:
        if is_safetensors(path):
            checkpoint = load_safetensors(path)
        else:
            check_zip(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = find_state_dict(checkpoint, path)
        check_tensors(state, path)
    except (MemoryError, PermissionError, Failure):
        raise
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise unreadable_failure(path, error) from error
    # Torchvision's DenseNet files write "norm.1" for "norm1"; its own loader renames them too.
    old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")
    return {old_name.sub(r"\1\2", key): value for key, value in state.items()}


def is_safetensors(path):
    """Returns True if a file is, or should be, a safetensors file: by its suffix or content."""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"  # JSON after a length of 8 bytes


def load_safetensors(path):
    """Reads {name: tensor} from a safetensors file. Raises Failure if it is damaged."""
    try:
        from safetensors import SafetensorError  # not in requirements.txt, because few need it
        from safetensors.torch import load
    except ImportError:
        command = ".venv/bin/pip install safetensors"
        message = f"{path}: a safetensors file, which needs one more package: {command}"
        raise Failure(message) from None
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise Failure(f"{path}: not a readable safetensors file ({error})") from None


def check_zip(path):
    """Raises Failure if a zip file is a bomb, or if a CRC is wrong (torch.load checks neither)."""
    if not zipfile.is_zipfile(path):  # checkpoints of torch < 1.6 are no zip files
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MAX_UNPACKING * path.stat().st_size:
            size = f"more than {MAX_UNPACKING} times its size"
            raise Failure(f"{path}: not a readable checkpoint, it unpacks to {size}")
        damaged = archive.testzip()
        if damaged:
            raise Failure(f"{path}: not a readable checkpoint, {damaged} is damaged")


def check_tensors(state, path):
    """Raises Failure if a tensor is impossible in a trained network."""
    file_size = path.stat().st_size
    for key, value in state.items():
        if value.numel() * value.element_size() > file_size:
            raise Failure(f"{path}: {key} is larger than the file")
        is_negative_variance = key.endswith("running_var") and value.min() < 0
        if is_negative_variance or value.is_complex() or not value.float().isfinite().all():
            reason = "impossible values (not finite, complex, or a negative variance)"
            raise Failure(f"{path}: {key} has {reason}")


def unreadable_failure(path, error):
    """Returns the Failure for a file that torch.load cannot read."""
    # torch's own message is not shown, because it recommends executing the code in the file.
    reason = f"{type(error).__name__}: the file is damaged, or holds Python objects"
    save = "save one with torch.save(model.state_dict(), FILE)"
    return Failure(f"{path}: not a readable checkpoint, expected a state dict ({reason}); {save}")


def find_state_dict(checkpoint, path):
    """Returns the checkpoint if it is a dict of tensors, otherwise its only value that is one.

    Raises Failure if there are several, TypeError if there is none.
    """

    def is_state_dict(value):
        is_dict = isinstance(value, dict) and len(value) > 0
        return is_dict and all(isinstance(tensor, torch.Tensor) for tensor in value.values())

    if is_state_dict(checkpoint):
        return checkpoint
    keys = [key for key, value in checkpoint.items() if is_state_dict(value)]
    if len(keys) > 1:
        keep = f"torch.save(checkpoint[{keys[0]!r}], FILE)"
        raise Failure(f"{path}: holds several state dicts ({', '.join(keys)}); keep one: {keep}")
    if not keys:
        raise TypeError("no dict of tensors")
    return checkpoint[keys[0]]


def strip_prefix(state, network, source):
    """Removes the prefix from the names of `network` in a state dict, for example "module."

    source: the file, for messages. Raises Failure if several prefixes fit.
    """
    # For example "module." (DataParallel), "_orig_mod." (torch.compile), "backbone." or "model.".
    names = [n for n in network.state_dict() if not n.endswith("num_batches_tracked")]
    first = names[0]
    prefixes = []
    for key in state:
        if key == first or key.endswith(f".{first}"):
            prefix = key.removesuffix(first)
            if all(prefix + name in state for name in names):
                prefixes.append(prefix)
    if len(prefixes) > 1:
        several = ", ".join(f"{prefix}{first}" for prefix in prefixes)
        raise Failure(f"{source}: holds several such networks ({several}); keep one of them")
    if not prefixes:
        return dict(state)
    return {key.removeprefix(prefixes[0]): value for key, value in state.items()}


def save_checkpoint(path, backbone, head, description):
    """Writes model.pth, a plain float32 state dict of the whole network, and model.json.

    description: the content of model.json, without the SHA-256 of model.pth. Returns all of it.
    """
    state = backbone.network.state_dict()
    state[f"{backbone.head_name}.weight"] = head.weight.detach().clone()
    state[f"{backbone.head_name}.bias"] = head.bias.detach().clone()
    # Saved in memory first, because the error of torch.save does not say that a disk is full.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
    content = description | {"sha256": hash_file(path)}
    write_json(path.with_suffix(".json"), content)
    return content
