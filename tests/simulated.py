"""Scores of simulated models, and what scikit-learn makes of scores."""

import math

import numpy as np
import sklearn.metrics
import torch
from scipy.special import expit

from cxr.patients import patient_from_name
from cxr.predictions import Table
from cxr.scores import SCORES, score


def table_of(files, labels, probs):
    probs = np.asarray(probs, np.float32)
    patients, unlike = [patient_from_name(file) for file in files], np.ones_like(probs)
    about, errors = [{} for _ in files], [""] * len(labels)
    return Table(list(files), np.asarray(labels), probs, errors, unlike, patients, about)


def simulate(rng, normal, pneumonia, each=1, apart=2.09, models=1, odds=None):
    """Tables of so many patients a class with `each` images, correlation 0.75, AUROC 0.93.

    The probabilities are calibrated for these odds. Models see the same patients with other noise.
    """
    labels = np.repeat(np.repeat([0, 1], [normal, pneumonia]), each)
    person = np.repeat(rng.normal(0, 1, normal + pneumonia), each)
    shift = math.log(odds or pneumonia / normal)
    names = [f"{('IM-', 'person')[label]}{i // each:06d}-{i}.png" for i, label in enumerate(labels)]
    names = [name if name[0] == "I" else name.replace("-", "_virus_") for name in names]
    for _ in range(models):
        own = np.repeat(rng.normal(0, 1, normal + pneumonia), each)
        x = math.sqrt(0.5) * person + 0.5 * own + 0.5 * rng.normal(0, 1, len(labels))
        logits = apart * (x + apart * (labels - 0.5)) + shift
        yield table_of(names, labels, expit(logits))


def calibration_error(labels, probs):
    edges, total = torch.linspace(0, 1, 16).numpy(), 0.0  # to the bit: some scores lie on an edge
    for low, high in zip(edges, np.append(edges[1:], np.inf), strict=True):
        inside = (probs >= low) & (probs < high)
        if inside.any():
            gap = labels[inside].mean() - probs[inside].astype(float).mean()
            total += inside.mean() * abs(gap)
    return total


def by_scikit_learn(labels, probs, threshold):
    found, m = probs > np.float32(threshold), sklearn.metrics
    return {
        "accuracy": m.accuracy_score(labels, found),
        "f1": m.f1_score(labels, found, zero_division=0),
        "auroc": m.roc_auc_score(labels, probs),
        "average_precision": m.average_precision_score(labels, probs),
        "sensitivity": m.recall_score(labels, found),
        "specificity": m.recall_score(labels, found, pos_label=0),
        "ppv": m.precision_score(labels, found) if found.any() else None,
        "npv": m.precision_score(labels, found, pos_label=0) if not found.all() else None,
        "brier": np.mean((probs.astype(float) - labels) ** 2),
        "ece": calibration_error(labels, probs),
    }


def quick_score(probs, labels, threshold, names=SCORES):
    """common.score of the bootstrap's draws in numpy: ten times as quick, for simulations."""
    if len(names) > 2:
        return score(probs, labels, threshold, names)
    order, found = np.argsort(-probs.numpy()), probs.numpy() > np.float32(threshold)
    p, y = probs.numpy()[order], labels.numpy()[order]
    last = np.append(p[1:] != p[:-1], True)  # of equal scores
    tp, n = np.cumsum(y)[last], np.arange(1, len(y) + 1)[last]
    fp, hits = n - tp, found[order] & (y == 1)
    area = (np.diff(fp, prepend=0) * (tp + np.append(0, tp[:-1]))).sum() / 2
    scores = {"f1": 2 * hits.sum() / max(1, found.sum() + tp[-1]), "auroc": area / tp[-1] / fp[-1]}
    scores["average_precision"] = (np.diff(tp, prepend=0) * tp / n).sum() / tp[-1]
    scores["brier"] = np.square(p - y).mean()
    return {name: float(scores[name]) for name in names}
