"""Cuts a network before a module, so that the part behind the cut can be trained.

The part before the cut is frozen. What it computes for an image, the activations, never changes,
just like features. So they are computed once, and the tail, the part behind the cut, is trained on
them. train.py has the loop.
"""

import copy
import math
from itertools import islice

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models import VisionTransformer

from cxr.decode import SIZE
from cxr.errors import Failure, as_typed

TAIL_LR, HEAD_LR = 1e-4, 1e-3  # the highest learning rates of the cycle
WEIGHT_DECAY = 0.05
TAIL_BATCH = 32  # images that pass through the tail at once: all of val/ may not fit into memory
N_NAMES = 5  # names of modules in a message

# ---------------------------------------------------------------- the cut


class CutReached(Exception):
    """Ends the pass through a network at the cut. Its argument is the activations."""


def stop_at_cut(module, inputs):
    """Ends the pass before this module. This is a forward pre-hook."""
    raise CutReached(inputs[0])


class FrozenPart(nn.Module):
    """The part of a network before the module `name`: images to activations."""

    def __init__(self, network, name):
        super().__init__()
        self.network = copy.deepcopy(network)
        self.network.get_submodule(name).register_forward_pre_hook(stop_at_cut)

    def forward(self, images):
        try:
            self.network(images)
        except CutReached as cut:
            return cut.args[0]
        raise RuntimeError("the network does not call the module at the cut")


class EncoderTail(nn.Module):
    """The last part of a vision transformer. Its modules have the same names as in the network."""

    def __init__(self, network):
        super().__init__()
        self.encoder, self.heads = network.encoder, network.heads
        self.encoder.pos_embedding = None  # it belongs to the frozen part

    def forward(self, tokens):
        tokens = self.encoder.ln(self.encoder.layers(tokens))
        return self.heads(tokens[:, 0])  # of the class token


def copy_tail(network, name):
    """Returns a trainable copy of a network without the modules before `name`, in eval mode.

    The copy computes features from activations. Its weights have the same names as in the network.
    Raises ValueError or AttributeError if the network has no module of this name.
    """
    tail = copy.deepcopy(network)
    parent = tail
    for part in name.split("."):
        children = [child for child, _ in parent.named_children()]
        for child in children[: children.index(part)]:
            setattr(parent, child, nn.Identity())
        parent = getattr(parent, part)
    tail.transform_input = False  # googlenet, inception_v3: they would change the activations
    if isinstance(tail, VisionTransformer):
        tail = EncoderTail(tail)
    return tail.eval().requires_grad_(True)


def can_cut(network, name, images):
    """Returns True if the tail has weights, and computes the features of these images."""
    try:
        with torch.no_grad():
            tail = copy_tail(network, name)
            features, expected = tail(FrozenPart(network, name)(images)), network(images)
    except Exception:  # a tail that does not fit, or a wrong name, raises nearly anything
        return False
    has_weights = len(list(tail.parameters())) > 0
    tolerance = 1e-4 * expected.abs().max().item()
    is_equal = features.shape == expected.shape and torch.allclose(
        features, expected, rtol=1e-3, atol=tolerance
    )
    return has_weights and is_equal


def check_cut(network, name):
    """Raises Failure if the network cannot be cut before the module `name`."""
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    if can_cut(network, name, images):
        return
    # The names with the fewest dots first, and of those the last modules first.
    modules = [other for other, module in network.named_modules() if list(module.parameters())]
    candidates = sorted(filter(None, modules[::-1]), key=lambda other: other.count("."))
    usable = list(islice((c for c in candidates if can_cut(network, c, images)), N_NAMES))
    asked = as_typed("--unfreeze", "UNFREEZE", name)
    expected = f"expected for example {', '.join(usable)}" if usable else "nor at any other one"
    is_module = name in dict(network.named_modules())
    problem = "the network cannot be cut before this module" if is_module else "no such module"
    raise Failure(f"{asked}: {problem}; {expected}")


# ---------------------------------------------------------------- the training


class Tail(nn.Module):
    """Computes features, float32 (N, width) on the CPU, from activations on a device."""

    def __init__(self, network, device):
        """network: of copy_tail."""
        super().__init__()
        # A training on two CPU cores is a quarter faster in channels_last.
        self.network = network.to(device, memory_format=torch.channels_last)
        self.device = device

    def forward(self, activations):
        """activations: float, also of 16 bits (N, ...), on the CPU."""
        features = []
        for part in activations.split(TAIL_BATCH):
            # A copy, because the first module may change its input in place.
            part = part.to(self.device, torch.float32, copy=True)
            features.append(self.network(part).cpu())
        return torch.cat(features)


def make_optimizer(tail, head, n_steps):
    """Returns AdamW for tail and head. Its learning rates follow one cycle of n_steps batches."""
    groups = [{"params": tail.parameters()}, {"params": head.parameters()}]
    optimizer = AdamW(groups, weight_decay=WEIGHT_DECAY)
    cycle = OneCycleLR(optimizer, [TAIL_LR, HEAD_LR], total_steps=n_steps)
    optimizer.register_step_post_hook(lambda *_: cycle.step())  # once for each batch
    return optimizer


def join_parts(network, tail):
    """Returns a frozen copy of the network with the weights of its trained Tail."""
    joined = copy.deepcopy(network)
    joined.load_state_dict(tail.network.state_dict(), strict=False)  # the frozen part stays
    return joined


def describe_size(shape, dtype):
    """Returns the size of activations in words: "1,600 views of 112x14x14: 70 MB".

    shape: (n_images, n_views, ...).
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    n_views, of = shape[0] * shape[1], "x".join(map(str, shape[2:]))
    return f"{n_views:,} views of {of}: {n_bytes / 1e6:,.0f} MB"
