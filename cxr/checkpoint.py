"""Reads state dicts safely and writes ours."""

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

from cxr.errors import FULL, Failure, warn
from cxr.files import atomic_write, hash_file, write_json

RESNET50_SHA256 = "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"
DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


def load_weights(args):
    """The state dict that --weights names, None for random; and the file that it is from."""
    if args.weights == "random":
        warn("--weights random: nothing is pretrained, the result says nothing about this method")
        return None, None
    path = imagenet_file(args.arch) if args.weights == "imagenet" else Path(args.weights)
    if not path.is_file():
        raise Failure(f"--weights {path}: no such file; expected imagenet, random or a state dict")
    return read_state_dict(path), path


def imagenet_file(arch):
    """The ImageNet weights of `arch` in torch's cache, downloaded if absent, their hash checked."""
    try:
        url = get_model_weights(arch).DEFAULT.url
    except (ValueError, AttributeError):
        unknown = f"--arch {arch}: torchvision knows no ImageNet weights for it"
        raise Failure(f"{unknown}; use --weights FILE") from None
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    by_hand = f"or download {url} elsewhere, put it at {path}, or name it with --weights FILE"
    # the file's name ends in the first 8 digits of its SHA-256
    sha256 = RESNET50_SHA256 if arch == "resnet50" else path.stem.rpartition("-")[2]
    if not path.exists():
        print(f"Downloading {url} to {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds: a server that stalls would hang for ever
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, sys.stderr.isatty())
        except DOWNLOAD_ERRORS as error:
            status = 4 if isinstance(error, OSError) and error.errno in FULL else 2
            failed = f"cannot download the ImageNet weights ({error})"
            raise Failure(f"{failed}: try again, {by_hand}", status) from None
        finally:
            socket.setdefaulttimeout(timeout)
    if not hash_file(path).startswith(sha256):
        raise Failure(
            f"{path}: its SHA-256 is not that of the published file; delete it, {by_hand}"
        )
    return path


def read_state_dict(path):
    """{name: tensor}, the state dict in a file. Data, never code; a damaged file is a Failure."""
    path = Path(path)
    if not path.is_file():
        raise Failure(f"{path}: no such file, expected a checkpoint")
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > 10 * size:
                    raise Failure(f"{path}: a bomb, it unpacks to more than 10 times its size")
                if broken := archive.testzip():  # torch.load does not check the CRCs
                    raise Failure(f"{path}: not a readable checkpoint, {broken} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = find_state_dict(torch.load(path, "cpu", weights_only=True), path)
        for key, value in state.items():
            if value.numel() * value.element_size() > size:
                raise Failure(f"{path}: {key} is larger than the file")
            negative = key.endswith("running_var") and value.min() < 0
            if negative or value.is_complex() or not value.float().isfinite().all():
                raise Failure(
                    f"{path}: {key} has impossible values (not finite, or a negative variance)"
                )
    except (MemoryError, PermissionError, Failure):
        raise
    except Exception as error:  # the unpickler raises whatever the bytes make it stumble over
        # not torch's own text: that recommends to run the code in the file
        expected = f"{path}: not a readable checkpoint, expected a state dict"
        reason = f"{type(error).__name__}: it is damaged, or holds more than tensors"
        with open(path, "rb") as file:
            if file.read(10)[8:] == b'{"':
                convert = f"torch.save(safetensors.torch.load_file({path.name!r}), 'weights.pth')"
                raise Failure(f"{path}: a safetensors file; in Python: {convert}") from error
        raise Failure(f"{expected} ({reason}); torch.save(model.state_dict(), FILE)") from error
    # torchvision's oldest DenseNet files name norm1 "norm.1"; its own loader renames them likewise
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")
    return {old.sub(r"\1\2", key): value for key, value in state.items()}


def find_state_dict(checkpoint, path):
    """The one dict of tensors in a checkpoint: itself, or its "state_dict", "model" or the like."""

    def is_state(x):
        return isinstance(x, dict) and x and all(isinstance(v, torch.Tensor) for v in x.values())

    if is_state(checkpoint):
        return checkpoint
    found = [key for key, value in checkpoint.items() if is_state(value)]
    if len(found) > 1:
        keep = f"torch.save(checkpoint[{found[0]!r}], FILE)"
        raise Failure(f"{path}: holds several state dicts ({', '.join(found)}); keep one: {keep}")
    if not found:
        raise TypeError("no dict of tensors")
    return checkpoint[found[0]]


def strip_prefix(state, network, source):
    """The state dict without what stands before every name of the network there.

    That is "module." of DataParallel, "_orig_mod." of torch.compile, "backbone." or "model.".
    """
    own = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    ends = [key.removesuffix(own[0]) for key in state if f".{key}".endswith(f".{own[0]}")]
    found = [prefix for prefix in ends if all(prefix + name in state for name in own)]
    if len(found) > 1:
        several = ", ".join(f"{prefix}{own[0]}" for prefix in found)
        raise Failure(f"{source}: holds several such networks ({several}); keep one of them")
    return {key.removeprefix(found[0] if found else ""): value for key, value in state.items()}


def save_checkpoint(path, backbone, head, about):
    """model.pth, a plain float32 state dict of the whole network, and model.json about it."""
    state = backbone.network.state_dict()
    state[f"{backbone.head_name}.weight"] = head.weight.detach().clone()
    state[f"{backbone.head_name}.bias"] = head.bias.detach().clone()
    buffer = io.BytesIO()  # torch's own error on a full disk does not name it
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
    write_json(path.with_suffix(".json"), about | {"sha256": hash_file(path)})
