"""Platt scaling and the threshold, fitted on val/."""

import argparse
import contextlib

import numpy as np
import torch
from torch import nn

from cxr.errors import warn


def fit_logistic(x, labels, offset, clusters):
    """(coefficients (k,), their standard errors): logistic regression of labels (n,) on x (n, k).

    offset: (n,), added to the logit. The errors are the sandwich's, images clustered by patient.
    """
    data = torch.as_tensor(x), torch.as_tensor(labels).double(), torch.as_tensor(offset)
    beta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    precise = {"tolerance_grad": 1e-9, "tolerance_change": 1e-12, "max_iter": 300}
    optimizer = torch.optim.LBFGS([beta], line_search_fn="strong_wolfe", **precise)

    def closure():
        optimizer.zero_grad()
        logits = data[0] @ beta + data[2]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, data[1], reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    beta = beta.detach().numpy()
    p = torch.sigmoid(torch.as_tensor(x @ beta + offset)).numpy()
    bread = np.linalg.pinv((x * (p * (1 - p))[:, None]).T @ x)
    _, patient = np.unique(clusters, return_inverse=True)
    gradients = np.zeros((patient.max() + 1, x.shape[1]))
    np.add.at(gradients, patient, x * (labels - p)[:, None])
    c = len(gradients)
    variance = bread @ (gradients.T @ gradients) @ bread * c / max(c - 1, 1)
    return beta, np.sqrt(np.diag(variance))


def calibrate(logits, labels):
    """(slope, intercept): sigmoid(slope * logit + intercept) is the calibrated probability.

    Platt scaling (1999): logistic regression of the validation labels on their logits, towards his
    targets (n+ + 1)/(n+ + 2) and 1/(n- + 2), which keep it finite where the logits separate the
    classes. An intercept is needed because pos_weight trains for equal shares of the classes.
    """
    n_positive, n = labels.sum().item(), len(labels)
    targets = np.where(labels > 0.5, (n_positive + 1) / (n_positive + 2), 1 / (n - n_positive + 2))
    x = np.column_stack([logits, np.ones(n)]).astype(np.float64)
    slope, intercept = map(float, fit_logistic(x, targets, 0, range(n))[0])
    if slope <= 0:
        warn("not calibrated: the positive images of val/ do not score higher than the others")
        return 1.0, 0.0
    return slope, intercept


def fit_threshold(rule, probs, labels):
    """The probability above which an image counts as PNEUMONIA, by a rule on the validation set.

    A number is itself. youden: the largest sensitivity + specificity - 1 (Youden 1950).
    sensitivity=S: the highest threshold that finds at least the share S of the PNEUMONIA images.
    Between two scores, the middle is taken.
    """
    if isinstance(rule, float):
        return rule
    scores = probs.unique()
    middles = (scores[1:] + scores[:-1]) / 2
    middles = torch.where(middles < scores[1:], middles, scores[:-1])  # of neighbours in float32
    cuts = torch.cat([scores[:1] / 2, middles])
    above = probs[None] > cuts[:, None]
    sensitivity = above[:, labels > 0.5].double().mean(1)
    if rule == "youden":
        false_alarms = above[:, labels < 0.5].double().mean(1)
        return cuts[(sensitivity - false_alarms).argmax()].item()
    return cuts[sensitivity >= float(rule.partition("=")[2])].max().item()


def threshold_rule(text):
    """argparse type of --threshold: a float in [0, 1], "youden" or "sensitivity=S"."""
    if text == "youden":
        return text
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(text.removeprefix("sensitivity="))) <= 1:
            return text if text.startswith("sensitivity=") else share
    expected = "expected a number from 0 to 1, youden or sensitivity=0.95"
    raise argparse.ArgumentTypeError(f"{expected}, found {text}")
