"""Compares two models on the same images."""

import numpy as np
import scipy.stats
import torch

from cxr.bootstrap import paired_differences
from cxr.errors import Failure
from cxr.scores import measure_scores, score

COMPARED = ("accuracy", "f1", "auroc")


def compare(table, other, threshold, other_threshold, path, seed):
    """What metrics.json says about the difference of two tables of the same images.

    path: of the other one, for errors.
    """
    if odd := sorted(set(table.files) ^ set(other.files)):
        expected = f"expected the same {len(table.files)} images"
        raise Failure(f"{path}: {expected}, {len(odd)} are in one only, as {odd[0]}")
    row = {file: i for i, file in enumerate(other.files)}
    order = [row[file] for file in table.files]
    if (odd := table.labels != other.labels[order]).any():
        raise Failure(f"{path}: {table.files[odd.argmax()]} has another label there")
    other = table._replace(probs=other.probs[order])
    labels, mine, theirs = map(torch.from_numpy, (table.labels, table.probs, other.probs))

    def differences(rows):
        here = score(mine[rows], labels[rows], threshold, COMPARED)
        there = score(theirs[rows], labels[rows], other_threshold, COMPARED)
        return [here[name] - there[name] for name in COMPARED]

    right_here = (table.probs > threshold) == table.labels
    right_there = (other.probs > other_threshold) == table.labels
    found = paired_differences(table, differences, seed)
    metrics, _ = measure_scores(other, other_threshold, seed)
    return {
        "other": {name: metrics[name] for name in COMPARED},
        "difference": dict(zip(COMPARED, found, strict=True)),
        "right_only_here": int((right_here & ~right_there).sum()),
        "right_only_there": int((right_there & ~right_here).sum()),
    } | paired_sign_test(right_here, right_there, table.clusters(), seed)


def paired_sign_test(right_here, right_there, clusters, seed):
    """{p_value, test} that one model is right as often as the other, of bool (n,).

    Each patient counts once, with the net number of images that are right only here. Where that is
    1 or -1 at most, flipping the signs is McNemar's exact test.
    """
    _, patient = np.unique(clusters, return_inverse=True)
    net = np.bincount(patient, right_here.astype(float) - right_there)
    net = net[net != 0]
    if len(net) == 0:
        return {"p_value": 1.0, "test": "no patient differs"}
    if np.abs(net).max() == 1:
        p = scipy.stats.binomtest(int((net > 0).sum()), len(net)).pvalue
        return {"p_value": float(p), "test": "McNemar's exact test"}
    flips = {"permutation_type": "samples", "n_resamples": 9999, "rng": seed}
    found = scipy.stats.permutation_test((net,), np.sum, **flips)
    return {"p_value": float(found.pvalue), "test": "sign flips of the patients' net differences"}
