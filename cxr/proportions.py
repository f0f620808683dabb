"""Confidence intervals of proportions."""

import math
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie between -Z and Z deviations


def wilson_interval(right, patients):
    """{value, low, high} of the mean of `right`: Wilson's score interval, 95 %; None for no image.

    right: bool (n,), or float in [0, 1]; patients: (n,), whose images are alike. Where a patient
    has several, n is the effective sample size: n over how many times larger the variance by
    patients is than that of n independent images. Wilson (1927); Rao and Scott (1992).
    """
    n, right = len(right), np.asarray(right, np.float64)
    if n == 0:
        return {"value": None, "low": None, "high": None}
    p = right.mean()
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    residuals, variance = np.bincount(patient, right - p), p * (1 - p) / n
    clusters = len(residuals)
    if variance > 0 and 1 < clusters < n:
        by_patients = clusters / (clusters - 1) * np.square(residuals).sum() / n**2
        n /= max(1, by_patients / variance)
    elif clusters < n:
        n = clusters
    z = Z**2 / n
    middle, reach = p + z / 2, np.sqrt(z * p * (1 - p) + z**2 / 4)
    low, high = (middle - reach) / (1 + z), (middle + reach) / (1 + z)
    return {"value": float(p), "low": float(min(low, p)), "high": float(max(high, p))}


def accuracy_intervals(positive, labels, images):
    """{accuracy, sensitivity, specificity: {value, low, high}} of predictions (..., N).

    Several of an image, those of repeats, count as their mean. On val no test result: it stopped
    the training, and chose the threshold where a rule did.
    """
    right = (positive == (labels > 0.5)).double().reshape(-1, len(labels)).mean(0).numpy()
    patients, y = np.array([i.patient or str(i.path) for i in images]), labels.numpy()
    sides = {"accuracy": y >= 0, "sensitivity": y > 0.5, "specificity": y < 0.5}
    return {name: wilson_interval(right[side], patients[side]) for name, side in sides.items()}


PROPORTIONS = ("accuracy", "sensitivity", "specificity", "ppv", "npv")
PREVALENCES = 0.01, 0.05, 0.1, 0.2, 0.5


def ratio_interval(top, bottom):
    """{value, low, high} of the ratio of two independent proportions, {value, low, high} each.

    MOVER: the method of variance estimates recovery (Donner and Zou 2012). Infinite where the
    bottom may be 0, nan where both are.
    """
    a, b = top["value"], bottom["value"]

    def root(x, y):
        x, y = x * (2 * a - x), y * (2 * b - y)
        return x, y, a * b + math.sqrt(max((a * b) ** 2 - x * y, 0))

    x, _, large = root(top["low"], bottom["high"])
    low = x / large if large else 0.0
    _, y, large = root(top["high"], bottom["low"])
    high = large / y if y > 0 else math.inf
    value = a / b if b else math.inf if a else math.nan
    return {"value": value, "low": low, "high": high}


def complement(share):
    """1 - a share, {value, low, high}."""
    others = {"value": "value", "low": "high", "high": "low"}
    return {key: 1 - share[other] for key, other in others.items()}


def predictive_values(metrics, prevalences):
    """[{prevalence, ppv, npv}] where other shares of the images are PNEUMONIA.

    The odds before the test times the likelihood ratio are the odds after it.
    """
    sensitivity, specificity = metrics["sensitivity"], metrics["specificity"]
    positive = ratio_interval(sensitivity, complement(specificity))
    negative = ratio_interval(complement(sensitivity), specificity)
    found = []
    for prevalence in sorted(set(prevalences)):
        before = prevalence / (1 - prevalence)
        ppv = {key: 1 - 1 / (1 + before * value) for key, value in positive.items()}
        npv = complement({key: 1 - 1 / (1 + before * value) for key, value in negative.items()})
        found.append({"prevalence": prevalence, "ppv": ppv, "npv": npv})
        for each in (ppv, npv):
            each |= {key: None for key, value in each.items() if math.isnan(value)}
    return found


def wald_interval(value, error):
    """{value, low, high}: 1.96 standard errors to each side; None for what is not finite, or not
    known: an error of 0 about a difference."""
    if not math.isfinite(value + error):
        return {"value": None, "low": None, "high": None}
    if error < 1e-9 < abs(value):
        return {"value": float(value), "low": None, "high": None}
    low, high = value - Z * error, value + Z * error
    return {"value": float(value), "low": float(low), "high": float(high)}


def format_interval(metric):
    """A value with its interval, as text."""

    def shown(value):
        return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"

    if metric["value"] is None:
        return "undefined"
    if metric["low"] is None:
        return shown(metric["value"])
    return f"{shown(metric['value'])} ({shown(metric['low'])} to {shown(metric['high'])})"
