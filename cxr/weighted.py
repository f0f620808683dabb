"""AUROC and average precision of bootstrap samples, which are given as weights of the images.

Weights: float64 (samples, N), how often a sample contains each image (see cxr/bootstrap.py).
"""

import numpy as np


def weighted_auroc(scores, labels, weights, strata=None):
    """Computes the AUROC of bootstrap samples, float64 (samples,).

    scores: (N,), higher for positive images; labels: int (N,), 0 or 1; strata: (N,), any names:
    only pairs of images in the same stratum count (None: all pairs). A sample without any pair
    gives nan.
    """
    strata = np.zeros(len(labels)) if strata is None else strata
    wins = n_pairs = 0
    for stratum in np.unique(strata):
        rows = strata == stratum
        positive = np.flatnonzero(rows & (labels == 1))
        negative = np.flatnonzero(rows & (labels == 0))
        negative_scores, weight_below = cumulate(scores, weights, negative)
        n_lower = np.searchsorted(negative_scores, scores[positive], "left")
        n_not_higher = np.searchsorted(negative_scores, scores[positive], "right")
        # A positive image wins against each negative one with a lower score; a tie is half a win.
        won = weight_below.take(n_lower, axis=1) + weight_below.take(n_not_higher, axis=1)
        positive_weights = weights.take(positive, axis=1)
        wins = wins + np.einsum("sn,sn->s", positive_weights, won)
        n_pairs = n_pairs + positive_weights.sum(1) * weight_below[:, -1]
    with np.errstate(invalid="ignore"):
        return wins / (2 * n_pairs)


def weighted_average_precision(scores, labels, weights):
    """Computes the average precision of bootstrap samples; arguments as for weighted_auroc."""
    positive = np.flatnonzero(labels == 1)
    # Each score of a positive image is a threshold. Images with this or a higher score are found.
    found = []
    for rows in (positive, np.flatnonzero(labels == 0)):
        sorted_scores, weight_before = cumulate(-scores, weights, rows)
        n_found = np.searchsorted(sorted_scores, -scores[positive], "right")
        found.append(weight_before.take(n_found, axis=1))
    true, false = found
    precision = true / np.maximum(true + false, 1)  # the weight is 0 if nothing is found
    positive_weights = weights.take(positive, axis=1)
    return np.einsum("sn,sn->s", positive_weights, precision) / positive_weights.sum(1)


def cumulate(scores, weights, rows):
    """Sorts the images of these rows by their scores.

    Returns (sorted scores (n,), the total weight of the images before each place (samples, n + 1)).
    """
    order = rows[np.argsort(scores[rows])]
    totals = np.zeros((len(weights), len(order) + 1))
    np.cumsum(weights.take(order, axis=1), axis=1, out=totals[:, 1:])
    return scores[order], totals
