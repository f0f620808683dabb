"""Confidence intervals of proportions, such as accuracy and sensitivity.

Everywhere in this project, a value with its 95 % interval is a dict {value, low, high}. low and
high are None if there is no interval.
"""

import math
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # 1.96: a 95 % interval is value ± Z standard errors
PROPORTIONS = ("accuracy", "sensitivity", "specificity", "ppv", "npv")
PREVALENCES = (0.01, 0.05, 0.1, 0.2, 0.5)  # for which predictive values are reported
FEW_PATIENTS = 10  # of a class; with 10, an accuracy of 1.00 has the interval 0.72 to 1.00


def wilson_interval(correct, patients):
    """Computes the share of True in `correct` and its 95 % Wilson score interval.

    correct: bool (n,), or float (n,) between 0 and 1; patients: (n,), any names or numbers.
    All three values are None if n is 0. Source: Wilson (1927), Rao and Scott (1992).
    """
    correct = np.asarray(correct, np.float64)
    if len(correct) == 0:
        return {"value": None, "low": None, "high": None}
    p = correct.mean()
    n = effective_sample_size(correct, patients)  # images of one patient are correlated
    z2 = Z**2 / n
    middle = p + z2 / 2
    margin = np.sqrt(z2 * p * (1 - p) + z2**2 / 4)
    low, high = (middle - margin) / (1 + z2), (middle + margin) / (1 + z2)
    # Rounding must not exclude p itself if p is 0 or 1.
    return {"value": float(p), "low": float(min(low, p)), "high": float(max(high, p))}


def value_of_few(n_patients):
    """Returns a sentence about the interval that a perfect result has with so few patients."""
    low = wilson_interval(np.ones(n_patients), np.arange(n_patients))["low"]
    patients = "1 patient" if n_patients == 1 else f"{n_patients} patients"
    return f"with {patients}, an accuracy of 1.00 has the interval {low:.2f} to 1.00"


def few_patients_warnings(split, n_patients):
    """Returns a warning if a class has fewer than FEW_PATIENTS patients in a split.

    n_patients: {class: number of patients}, all at least 1.
    """
    fewest = min(n_patients.values())
    if fewest >= FEW_PATIENTS:
        return []
    counts = " and ".join(f"{n} {name}" for name, n in n_patients.items())
    meaning = "That allows no conclusion about the model"
    if split == "val":
        meaning = "Epoch, calibration and threshold then depend on chance"
    return [
        f"few patients in {split}/ ({counts}): {value_of_few(fewest)}. {meaning}. Collect more, or "
        "report the cross-validated result as well (train.py --folds 5, make cv)"
    ]


def effective_sample_size(correct, patients):
    """Returns how many independent images carry as much information as these correlated ones."""
    n, p = len(correct), correct.mean()
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    residual_sums = np.bincount(patient, correct - p)  # one for each patient
    n_patients = len(residual_sums)
    variance = p * (1 - p) / n  # if all images were independent
    if variance > 0 and 1 < n_patients < n:
        correction = n_patients / (n_patients - 1)
        clustered_variance = correction * np.square(residual_sums).sum() / n**2
        # n divided by the design effect of the clustering.
        return n / max(1, clustered_variance / variance)
    return n_patients


def accuracy_intervals(predictions, labels, xrays):
    """Computes accuracy, sensitivity and specificity, as {name: {value, low, high}}.

    predictions: bool (N,), or (n_repeats, N) if each image was predicted several times; labels:
    float32 (N,). On val/ it is no test result: val/ chose epoch and threshold.
    """
    is_correct = (predictions == (labels > 0.5)).double()
    # An image counts once, with its share of correct repeats.
    correct = is_correct.reshape(-1, len(labels)).mean(0).numpy()
    patients = np.array([xray.patient or str(xray.path) for xray in xrays])
    labels = labels.numpy()
    return {
        "accuracy": wilson_interval(correct, patients),
        "sensitivity": wilson_interval(correct[labels > 0.5], patients[labels > 0.5]),
        "specificity": wilson_interval(correct[labels < 0.5], patients[labels < 0.5]),
    }


def ratio_interval(top, bottom):
    """Computes the ratio of two independent proportions, each {value, low, high}.

    high is infinite if the denominator may be 0; the value is nan if both are 0. Method: MOVER, the
    method of variance estimates recovery (Donner and Zou 2012).
    """
    a, b = top["value"], bottom["value"]

    def terms(a_limit, b_limit):
        x = a_limit * (2 * a - a_limit)
        y = b_limit * (2 * b - b_limit)
        return x, y, a * b + math.sqrt(max((a * b) ** 2 - x * y, 0))

    x, _, root = terms(top["low"], bottom["high"])
    low = x / root if root else 0.0
    _, y, root = terms(top["high"], bottom["low"])
    high = root / y if y > 0 else math.inf
    value = math.inf if a else math.nan
    if b:
        value = a / b
    return {"value": value, "low": low, "high": high}


def difference_interval(score, other):
    """Computes score - other for two scores of different patients, each {value, low, high}.

    All three are None if a value is None, low and high if a score has no interval. Method: MOVER
    (Zou and Donner 2008). For two proportions it is method 10 of Newcombe (1998).
    """
    if score["value"] is None or other["value"] is None:
        return {"value": None, "low": None, "high": None}
    value = score["value"] - other["value"]
    if score["low"] is None or other["low"] is None:
        return {"value": value, "low": None, "high": None}
    below = math.hypot(score["value"] - score["low"], other["high"] - other["value"])
    above = math.hypot(score["high"] - score["value"], other["value"] - other["low"])
    return {"value": value, "low": value - below, "high": value + above}


def complement(share):
    """Returns 1 - share for a share with its interval, a dict {value, low, high}."""
    return {"value": 1 - share["value"], "low": 1 - share["high"], "high": 1 - share["low"]}


def predictive_values(metrics, prevalences):
    """Computes PPV and NPV for other shares of positive images, as [{prevalence, ppv, npv}].

    metrics: {sensitivity, specificity}, each {value, low, high}.
    """
    sensitivity, specificity = metrics["sensitivity"], metrics["specificity"]
    positive_ratio = ratio_interval(sensitivity, complement(specificity))
    negative_ratio = ratio_interval(complement(sensitivity), specificity)
    result = []
    for prevalence in sorted(set(prevalences)):
        odds = prevalence / (1 - prevalence)
        ppv = probability_after(odds, positive_ratio)
        npv = complement(probability_after(odds, negative_ratio))
        result.append({"prevalence": prevalence, "ppv": nan_to_none(ppv), "npv": nan_to_none(npv)})
    return result


def probability_after(odds, likelihood_ratio):
    """Returns the probability after a test, as {value, low, high}. odds: before the test."""
    # The odds before the test, times the likelihood ratio, are the odds after it.
    return {key: 1 - 1 / (1 + odds * ratio) for key, ratio in likelihood_ratio.items()}


def nan_to_none(interval):
    """Replaces nan by None, because JSON has no nan."""
    return {key: None if math.isnan(value) else value for key, value in interval.items()}


def wald_interval(value, standard_error, quantile=Z):
    """Returns value ± 1.96 (or `quantile`) standard errors as a dict {value, low, high}.

    All three are None if value or standard error is not finite. low and high are None if the
    standard error is 0 although the value is not 0.
    """
    if not math.isfinite(value) or not math.isfinite(standard_error):
        return {"value": None, "low": None, "high": None}
    if standard_error < 1e-9 and abs(value) > 1e-9:  # the bootstrap could not estimate it
        return {"value": float(value), "low": None, "high": None}
    low, high = value - quantile * standard_error, value + quantile * standard_error
    return {"value": float(value), "low": float(low), "high": float(high)}


def format_interval(metric):
    """Formats {value, low, high} as text, for example "0.810 (0.721 to 0.875)"."""
    if metric["value"] is None:
        return "undefined"
    value = format_number(metric["value"])
    if metric["low"] is None:
        return value
    return f"{value} ({format_number(metric['low'])} to {format_number(metric['high'])})"


def format_number(value):
    """Formats a number with three decimals. A small positive number is never shown as 0."""
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def format_probability(value):
    """Formats a probability with three decimals. It is never shown as 0 or 1."""
    return ">0.999" if value >= 0.9995 else "<0.001" if value < 0.0005 else f"{value:.3f}"
