"""Predictions of simulated models, and scores computed with other packages than ours."""

import math

import numpy as np
import pandas as pd
import sklearn.metrics
import torch
from scipy.special import expit

from cxr.patients import patient_from_name


def table_of(files, labels, probs):
    """Returns a table of predictions, as in cxr/predictions.py."""
    return pd.DataFrame(
        {
            "file": files,
            "label": labels,
            "probability": np.asarray(probs, np.float32),
            "error": "",
            "unlike": np.float32(1),
            "patient": [patient_from_name(file) or "" for file in files],
        }
    )


def simulate(rng, normal, pneumonia, each=1, apart=2.09, models=1, odds=None):
    """Yields a table for each of several models, with an AUROC of 0.93, for the same patients.

    normal, pneumonia: patients of each class; each: images per patient, with a correlation of 0.75.
    odds: the prevalence for which the probabilities are calibrated.
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
    """Computes the expected calibration error with 15 bins."""
    edges, total = torch.linspace(0, 1, 16).numpy(), 0.0  # torch's edges: some probs lie on one
    for low, high in zip(edges, np.append(edges[1:], np.inf), strict=True):
        inside = (probs >= low) & (probs < high)
        if inside.any():
            gap = labels[inside].mean() - probs[inside].astype(float).mean()
            total += inside.mean() * abs(gap)
    return total


def by_scikit_learn(labels, probs, threshold):
    """Computes all scores of cxr/scores.py with scikit-learn."""
    positive, m = probs > np.float32(threshold), sklearn.metrics
    return {
        "accuracy": m.accuracy_score(labels, positive),
        "f1": m.f1_score(labels, positive, zero_division=0),
        "auroc": m.roc_auc_score(labels, probs),
        "average_precision": m.average_precision_score(labels, probs),
        "sensitivity": m.recall_score(labels, positive),
        "specificity": m.recall_score(labels, positive, pos_label=0),
        "ppv": m.precision_score(labels, positive) if positive.any() else None,
        "npv": m.precision_score(labels, positive, pos_label=0) if not positive.all() else None,
        "brier": np.mean((probs.astype(float) - labels) ** 2),
        "ece": calibration_error(labels, probs),
    }
