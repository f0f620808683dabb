"""Calibration (Platt scaling) and the threshold. Both are fitted on val/."""

import argparse
import contextlib

import numpy as np
import torch
from torch import nn

from cxr.errors import number_meant, warn


def fit_logistic(x, labels, offset, patients):
    """Fits a logistic regression by maximum likelihood.

    x: float64 (n, k); labels: (n,), between 0 and 1; offset: number or (n,), added to the logits;
    patients: (n,). Returns (coefficients (k,), their standard errors (k,)).
    """
    x_tensor, labels_tensor = torch.as_tensor(x), torch.as_tensor(labels).double()
    offset_tensor = torch.as_tensor(offset)
    beta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    options = {"tolerance_grad": 1e-9, "tolerance_change": 1e-12, "max_iter": 300}
    optimizer = torch.optim.LBFGS([beta], line_search_fn="strong_wolfe", **options)
    loss_function = nn.BCEWithLogitsLoss(reduction="sum")

    def closure():
        optimizer.zero_grad()
        loss = loss_function(x_tensor @ beta + offset_tensor, labels_tensor)
        loss.backward()
        return loss

    optimizer.step(closure)
    beta = beta.detach().numpy()
    probs = torch.sigmoid(torch.as_tensor(x @ beta + offset)).numpy()
    return beta, sandwich_errors(x, labels, probs, patients)


def sandwich_errors(x, labels, probs, patients):
    """Returns the sandwich estimator's standard errors of logistic coefficients, by patient."""
    # The variance is H⁻¹ G H⁻¹: H is the Hessian, and G the sum over patients of the outer product
    # of the patient's gradient.
    inverse_hessian = np.linalg.pinv((x * (probs * (1 - probs))[:, None]).T @ x)
    _, patient = np.unique(patients, return_inverse=True)
    n_patients = patient.max() + 1
    gradients = np.zeros((n_patients, x.shape[1]))
    np.add.at(gradients, patient, x * (labels - probs)[:, None])
    outer = gradients.T @ gradients
    correction = max(n_patients - 1, 1)
    variance = inverse_hessian @ outer @ inverse_hessian * n_patients / correction
    return np.sqrt(np.diag(variance))


def platt_targets(labels):
    """Returns what the probabilities of Platt scaling are fitted to, float64 (n,).

    labels: (n,), 0 or 1, of torch or numpy. Source: Platt (1999).
    """
    n_positive = int(labels.sum())
    # Targets other than 0 and 1 keep the result finite if the logits separate the classes.
    positive_target = (n_positive + 1) / (n_positive + 2)
    negative_target = 1 / (len(labels) - n_positive + 2)
    return np.where(labels > 0.5, positive_target, negative_target)


def finite_logits(probs):
    """Returns the logits of probabilities, float32 (n,), as float64, finite also for 0 and 1."""
    # A float32 of 1 has no finite logit. 1 - 2**-25 is the lowest number that rounds to it.
    probs = np.clip(probs.astype(np.float64), 1e-12, 1 - 2.0**-25)
    return np.log(probs / (1 - probs))


def calibrate(logits, labels):
    """Fits (slope, intercept): sigmoid(slope * logit + intercept) is the calibrated probability.

    logits, labels: float32 (M,). Returns (1, 0), with a warning, if the slope is not positive.
    Source: Platt scaling (1999), a logistic regression of the validation labels on their logits.
    """
    n = len(labels)
    # The intercept corrects pos_weight, which trains for equally frequent classes.
    x = np.column_stack([logits, np.ones(n)]).astype(np.float64)
    coefficients, _ = fit_logistic(x, platt_targets(labels), offset=0, patients=range(n))
    slope, intercept = coefficients.tolist()
    if slope <= 0:
        reason = "positive validation images do not have higher scores than the others"
        advice = "Look at the images in val/ and at their labels"
        warn(f"the probabilities are not calibrated, because {reason}. {advice}")
        return 1.0, 0.0
    return slope, intercept


def fit_threshold(rule, probs, labels):
    """Chooses the probability above which an image counts as positive, on the validation set.

    rule: a number (returned as it is), "youden" (maximises sensitivity + specificity, Youden
    1950), or "sensitivity=S" (the highest threshold with a sensitivity of at least S).
    probs, labels: float32 (N,); label 1 is the positive class.
    """
    if isinstance(rule, float):
        return rule
    thresholds = candidate_thresholds(probs)
    predictions = probs[None] > thresholds[:, None]  # one row for each threshold
    sensitivity = predictions[:, labels == 1].double().mean(1)
    if rule == "youden":
        false_positive_rate = predictions[:, labels == 0].double().mean(1)
        best = (sensitivity - false_positive_rate).argmax()
        return thresholds[best].item()
    wanted = float(rule.removeprefix("sensitivity="))
    return thresholds[sensitivity >= wanted].max().item()


def candidate_thresholds(probs):
    """Returns half of the lowest probability, and one threshold between each two neighbours."""
    values = probs.unique()  # sorted
    lower, upper = values[:-1], values[1:]
    middle = (lower + upper) / 2
    # Two neighbouring float32 numbers have no number between them: take the lower one.
    middle = torch.where(middle < upper, middle, lower)
    return torch.cat([values[:1] / 2, middle])


def threshold_rule(text):
    """The argparse type of --threshold: a number from 0 to 1, "youden" or "sensitivity=S"."""
    if text == "youden":
        return text
    with contextlib.suppress(ValueError):
        value = float(text.removeprefix("sensitivity="))
        if 0 <= value <= 1:
            return text if text.startswith("sensitivity=") else value
    expected = "a number from 0 to 1, youden or sensitivity=0.95"
    prefix = "sensitivity=" if text.startswith("sensitivity=") else ""
    meant = number_meant(text.removeprefix(prefix)).replace("mean ", f"mean {prefix}")
    raise argparse.ArgumentTypeError(f"expected {expected}, found {text}{meant}")
