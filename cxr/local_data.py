"""How much a few images of another hospital would help: the intercept is fitted again on them.

The slope stays, so the order of the probabilities and the AUROC stay the same.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from cxr.calibration import finite_logits, platt_targets

SIZES = (20, 50, 100)  # local images
DRAWS = 200  # random choices of the local images, for each size


def measure_local_data(probs, labels, patients, threshold, seed):
    """Fits the intercept on some images of a source, and scores the other images.

    probs: float32 (n,); labels: int (n,), of both classes; patients: (n,), any names. The local
    images are all images of randomly drawn patients. Returns {unchanged: {accuracy, brier},
    with_local: [{k, accuracy, brier}, ...], left_out: [k, ...]}. With local images, a score is
    {mean, low, high}; low and high are the 5th and 95th percentile of the draws. A k is left out if
    less than half of the images could remain.
    """
    _, numbers, n_images = np.unique(patients, return_inverse=True, return_counts=True)
    most_drawn = {k: k + n_images.max() - 1 for k in SIZES}  # the last patient counts as a whole
    used = [k for k in SIZES if most_drawn[k] <= len(labels) / 2]
    rng, rows = np.random.default_rng(seed), []
    for k in used:
        draws = [draw_patients(numbers, n_images, k, rng) for _ in range(DRAWS)]
        scores = [score_with_local(probs, labels, is_local, threshold) for is_local in draws]
        accuracy, brier = map(summarise_draws, np.transpose(scores))
        rows.append({"k": k, "accuracy": accuracy, "brier": brier})
    accuracy, brier = accuracy_and_brier(probs, labels, threshold)
    return {
        "unchanged": {"accuracy": accuracy, "brier": brier},
        "with_local": rows,
        "left_out": [k for k in SIZES if k not in used],
    }


def draw_patients(numbers, n_images, k, rng):
    """Draws patients until they have k images. Returns which images are theirs, bool (n,).

    numbers: int (n,), the patient of each image; n_images: of each patient, int (n_patients,).
    """
    order = rng.permutation(len(n_images))
    n_drawn = np.searchsorted(n_images[order].cumsum(), k) + 1
    return np.isin(numbers, order[:n_drawn])


def score_with_local(probs, labels, is_local, threshold):
    """Fits the intercept on the local images. Returns (accuracy, brier) of all other images."""
    logits = finite_logits(probs)
    shift = fit_intercept(logits[is_local], labels[is_local])
    shifted = expit(logits[~is_local] + shift)
    return accuracy_and_brier(shifted, labels[~is_local], threshold)


def fit_intercept(logits, labels):
    """Fits a logistic regression with the offset `logits`, and returns its only coefficient.

    It is finite even if all labels are equal, because it is fitted to the targets of Platt scaling.
    """
    wanted = platt_targets(labels).sum()
    # The likelihood is highest where the sum of the probabilities is that of the targets.
    return brentq(lambda shift: expit(logits + shift).sum() - wanted, -100, 100)


def accuracy_and_brier(probs, labels, threshold):
    """Returns (accuracy, Brier score) of probabilities, as two floats."""
    accuracy = np.mean((probs > threshold) == (labels == 1))
    return float(accuracy), float(np.square(probs - labels).mean())


def summarise_draws(scores):
    """Returns {mean, low, high} of the scores of all draws; low, high: 5th and 95th percentile."""
    low, high = np.quantile(scores, (0.05, 0.95))
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high)}
