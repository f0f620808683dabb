"""Compares two models by their predictions for the same images."""

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, permutation_test

from cxr.bootstrap import draw_scores, t_intervals
from cxr.errors import Failure
from cxr.predictions import as_arrays
from cxr.scores import measure_scores, score, scores_of_sums, summed_columns
from cxr.weighted import weighted_auroc

COMPARED = ("accuracy", "f1", "auroc")


def match_predictions(other, files, labels, path):
    """Returns the rows of `other` in the order of `files`; Failure if images or labels differ."""
    different = sorted(set(files) ^ set(other["file"]))
    if different:
        raise Failure(
            f"{path}: expected predictions for the same {len(files)} images; not in both "
            f"tables: {len(different)}, for example {different[0]}"
        )
    matched = pd.DataFrame({"file": files}).merge(other, on="file", validate="1:1")
    is_different = matched["label"].to_numpy(np.int64) != np.asarray(labels)
    if is_different.any():
        raise Failure(f"{path}: {files[is_different.argmax()]} has another label in this table")
    return matched


def compare(predictions, other, threshold, other_threshold, seed):
    """Compares two tables of the same images, in the same order, each at its own threshold.

    Returns the comparison for metrics.json; a difference is this model minus the other one.
    """
    probs, labels, patients = as_arrays(predictions)
    other_probs, _, _ = as_arrays(other)
    truth = torch.from_numpy(labels)
    mine = score(torch.from_numpy(probs), truth, threshold, COMPARED)
    theirs = score(torch.from_numpy(other_probs), truth, other_threshold, COMPARED)
    values = [mine[name] - theirs[name] for name in COMPARED]

    def differences(weights):
        mine = compared_scores(probs, labels, threshold, weights)
        return mine - compared_scores(other_probs, labels, other_threshold, weights)

    samples = draw_scores(labels, patients, differences, seed)
    intervals = t_intervals(values, samples, labels, patients)
    other_metrics = measure_scores(other, other_threshold, seed)
    correct = (probs > threshold) == labels
    other_correct = (other_probs > other_threshold) == labels
    return {
        "other": {name: other_metrics[name] for name in COMPARED},
        "difference": dict(zip(COMPARED, intervals, strict=True)),
        "right_only_here": int((correct & ~other_correct).sum()),
        "right_only_there": int((other_correct & ~correct).sum()),
    } | paired_sign_test(correct, other_correct, patients, seed)


def compared_scores(probs, labels, threshold, weights):
    """Returns the scores in COMPARED of bootstrap samples, float64 (samples, 3)."""
    scores = scores_of_sums(weights @ summed_columns(probs, labels, threshold))
    scores["auroc"] = weighted_auroc(probs, labels, weights)
    return np.column_stack([scores[name] for name in COMPARED])


def paired_sign_test(correct, other_correct, patients, seed):
    """Tests whether two models are equally often correct. Returns {p_value, test}.

    correct, other_correct: bool (n,); patients: (n,).
    """
    # A patient counts once: images that only this model gets right, minus those of the other.
    _, patient = np.unique(patients, return_inverse=True)
    net = np.bincount(patient, correct.astype(float) - other_correct)
    net = net[net != 0]
    if len(net) == 0:
        return {"p_value": 1.0, "test": "no patient differs"}
    if np.abs(net).max() == 1:
        p = binomtest(int((net > 0).sum()), len(net)).pvalue
        return {"p_value": float(p), "test": "McNemar's exact test"}
    # McNemar's test needs differences of 1. For larger ones, flip the signs at random.
    test = permutation_test((net,), np.sum, permutation_type="samples", n_resamples=9999, rng=seed)
    name = "permutation test with the net difference of each patient"
    return {"p_value": float(test.pvalue), "test": name}
