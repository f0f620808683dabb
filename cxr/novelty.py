"""Detects images unlike the training images."""

import math

import scipy.stats
import torch


def rms_distance(z):
    """float32 (N,): how far features (N, width), standardised as those of training, are from them.

    The root mean square over the features: about 1 for a training image.
    """
    return z.square().mean(1).sqrt()


def describe_features(mean, std, val_features):
    """For model.json: by which evaluate.py tells an image that is unlike those of training.

    mean, std: float32 (width,), of the training images; val_features: (M, width), standardised.
    """

    def in_a_line(values):
        return " ".join(f"{x:.4g}" for x in values.tolist())

    return {
        "mean": in_a_line(mean),
        "std": in_a_line(std),
        "limit": rms_distance(val_features).quantile(0.99).item(),
    }


SHIFT, NOVELTY_P = 0.4, 0.001  # from where a group of images is said to come from elsewhere


def measure_novelty(features, training):
    """(how unlike the training images each image is, float32 (N,), what metrics.json says of all).

    features: float32 (N, width); training: what model.json says of the training features. Above 1
    is farther away than 99 % of the validation images. shift: by how many deviations a feature of
    the group is off, the root mean square over the features, less what chance gives n images.
    Photographs, noise and blur are told, negatives and other framings as a group; with random
    weights only gross cases.
    """
    mean, std = (torch.tensor([float(x) for x in training[k].split()]) for k in ("mean", "std"))
    z = (features - mean) / std
    unlike = rms_distance(z) / training["limit"]
    n, over = len(unlike), int((unlike > 1).sum())
    square = z.mean(0).square().mean().item()
    shift = math.sqrt(max(square - 1 / n, 0)) if n >= 20 else None
    p = scipy.stats.binomtest(over, n, 0.01, alternative="greater").pvalue
    elsewhere = bool(p < NOVELTY_P or (shift or 0) >= SHIFT)
    return unlike, {"n": n, "over": over, "p": float(p), "shift": shift, "elsewhere": elsewhere}


def novelty_warnings(group):
    if not group or not group["elsewhere"]:
        return []
    shift = "" if group["shift"] is None else f", and all are shifted by {group['shift']:.2f}"
    return [
        f"{group['over']} of {group['n']} images are unlike those of training (1 in 100 expected)"
        f"{shift}: these images come from elsewhere (another machine, another framing, negatives): "
        "threshold and probabilities may not hold for them; train on images of that source"
    ]
