"""Detects images that are unlike the training images, one by one and as a group."""

import math

import torch

SHIFT = 0.4  # standard deviations: a group with a larger shift comes from another source
NOVELTY_P = 0.001  # p-value below which too many images are unlike the training images
MIN_GROUP = 20  # images that are needed to measure a shift


def rms_distance(z):
    """Returns the distance of images to the training images, float32 (N,); usually about 1.

    z: features (N, width), standardised with mean and standard deviation of the training images.
    """
    return z.square().mean(1).sqrt()


def describe_features(mean, std, val_features):
    """Describes the training features, for model.json; measure_novelty uses this description.

    mean, std: float32 (width,), of the training images; val_features: float32 (M, width),
    standardised with them.
    """
    limit = rms_distance(val_features).quantile(0.99).item()
    return {"mean": numbers_as_text(mean), "std": numbers_as_text(std), "limit": limit}


def numbers_as_text(tensor):
    """Writes the numbers of a tensor into one line; JSON would need one line for each number."""
    return " ".join(f"{x:.4g}" for x in tensor.tolist())


def text_as_numbers(text):
    """Reads what numbers_as_text wrote. Returns float32 (n,)."""
    return torch.tensor([float(x) for x in text.split()])


def measure_novelty(features, training):
    """Measures how unlike the training images each image is, and all of them as a group.

    features: float32 (N, width); training: the result of describe_features.
    Returns (novelty float32 (N,), the group's values for metrics.json). novelty > 1: the image is
    farther from the training images than 99 % of the validation images are. shift
    (None for fewer than 20 images): sqrt(mean over features of (mean of the group)² - 1/N); 1/N is
    the value expected by chance.
    Of a single image, this detects photographs, noise and blur; of a group, also negatives and
    another framing. A network with random weights detects little more than images of noise.
    """
    import scipy.stats  # slow to import; train.py does not need it

    z = (features - text_as_numbers(training["mean"])) / text_as_numbers(training["std"])
    novelty = rms_distance(z) / training["limit"]
    n, over = len(novelty), int((novelty > 1).sum())
    p = float(scipy.stats.binomtest(over, n, 0.01, alternative="greater").pvalue)
    shift = None
    if n >= MIN_GROUP:
        chance = 1 / n  # expected square of a feature's mean over n images
        shift = math.sqrt(max(z.mean(0).square().mean().item() - chance, 0))
    is_other_source = p < NOVELTY_P or (shift is not None and shift >= SHIFT)
    return novelty, {"n": n, "over": over, "p": p, "shift": shift, "elsewhere": is_other_source}


def novelty_warnings(group):
    """Returns a warning if a group (of measure_novelty, or None) comes from another source."""
    if group is None or not group["elsewhere"]:
        return []
    text = (
        f"{group['over']} of {group['n']} images differ strongly from the training images "
        "(expected: 1 in 100)"
    )
    if group["shift"] is not None:
        text += f", and all together are shifted by {group['shift']:.2f} standard deviations"
    return [
        f"{text}. They seem to come from another source (another device, other framing, or "
        "negatives?). The probabilities and the threshold may not hold for them. Train on images "
        "of that source"
    ]
