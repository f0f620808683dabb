"""All scores of a table of predictions, with their intervals.

A table is a DataFrame (see cxr/predictions.py) of readable images with known labels.
"""

import math
from functools import partial

import numpy as np
import torch
import torchmetrics.functional.classification as tm
from scipy.special import expit
from scipy.stats import rankdata

from cxr.bootstrap import bca_intervals, draw_scores, logit_t_intervals
from cxr.calibration import finite_logits, fit_logistic
from cxr.errors import Failure
from cxr.predictions import as_arrays, metadata_columns
from cxr.proportions import FEW_PATIENTS, format_interval, wald_interval, wilson_interval
from cxr.weighted import weighted_auroc, weighted_average_precision

SCORES = (
    "accuracy", "f1", "auroc", "average_precision", "sensitivity", "specificity", "ppv", "npv",
    "brier", "ece",
)  # fmt: skip

T_INTERVAL = ("auroc", "average_precision")  # scores with a t interval on the logit scale
BCA_INTERVAL = ("f1", "brier")  # scores with a BCa interval


def score(probs, labels, threshold, names=SCORES):
    """Computes scores with torchmetrics. Returns {name: float}.

    ppv (npv) is None if no image is predicted positive (negative).

    probs: float32 (N,), P(positive); labels: int64 (N,). An image counts as positive if its
    probability is above the threshold, not if it is equal.
    """
    functions = {
        "accuracy": partial(tm.binary_accuracy, threshold=threshold),
        "f1": partial(tm.binary_f1_score, threshold=threshold),
        "auroc": partial(tm.binary_auroc),
        "average_precision": partial(tm.binary_average_precision),
        "sensitivity": partial(tm.binary_recall, threshold=threshold),
        "specificity": partial(tm.binary_specificity, threshold=threshold),
        "ppv": partial(tm.binary_precision, threshold=threshold),
        "npv": partial(tm.binary_negative_predictive_value, threshold=threshold),
        "brier": lambda probs, labels: (probs - labels).square().mean(),  # squared error
        "ece": partial(tm.binary_calibration_error, n_bins=15),  # Guo et al. 2017
    }
    result = {name: float(functions[name](probs, labels)) for name in names}
    # Without a positive (or negative) prediction torchmetrics gives 0, but the score is undefined.
    if "ppv" in result and not (probs > threshold).any():
        result["ppv"] = None
    if "npv" in result and not (probs <= threshold).any():
        result["npv"] = None
    return result


def check_both_classes(predictions, classes):
    """Raises Failure if a class has no readable image. classes: their names."""
    for label, name in enumerate(classes):
        if label not in set(predictions["label"]):
            raise Failure(f"there is no readable {name} image; both classes are needed for scores")


def measure_scores(predictions, threshold, seed):
    """Computes all scores with their 95 % intervals. Returns {name: {value, low, high}}.

    Both classes must have images. Raises Failure if a score is not finite.
    """
    probs, labels, patients = as_arrays(predictions)
    tensors = torch.from_numpy(probs), torch.from_numpy(labels)
    values = score(*tensors, threshold)
    if not all(value is None or math.isfinite(value) for value in values.values()):
        raise Failure(f"a score is not finite: {values}", 3)
    metrics = {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
    metrics |= measure_proportions(probs, labels, patients, threshold)

    columns = summed_columns(probs, labels, threshold)

    def bca_scores(sums):
        return np.column_stack([scores_of_sums(sums)[name] for name in BCA_INTERVAL])

    def statistic(weights):
        auroc = weighted_auroc(probs, labels, weights)
        average_precision = weighted_average_precision(probs, labels, weights)
        return np.column_stack([auroc, average_precision, bca_scores(weights @ columns)])

    samples = draw_scores(labels, patients, statistic, seed)
    t_samples, bca_samples = np.split(samples, [len(T_INTERVAL)], axis=1)
    t_values = [values[name] for name in T_INTERVAL]
    intervals = logit_t_intervals(t_values, t_samples, labels, patients)
    metrics |= dict(zip(T_INTERVAL, intervals, strict=True))
    bca_values = [values[name] for name in BCA_INTERVAL]
    intervals = bca_intervals(bca_values, bca_samples, labels, patients, columns, bca_scores)
    return metrics | dict(zip(BCA_INTERVAL, intervals, strict=True))


def measure_proportions(probs, labels, patients, threshold):
    """Computes the scores that are proportions, with Wilson's interval."""
    is_positive = probs > np.float32(threshold)  # as torchmetrics compares
    correct = is_positive == (labels == 1)
    rows = {
        "accuracy": np.full(len(labels), True),
        "sensitivity": labels == 1,
        "specificity": labels == 0,
        "ppv": is_positive,
        "npv": ~is_positive,
    }
    return {name: wilson_interval(correct[mask], patients[mask]) for name, mask in rows.items()}


def count_outcomes(predictions, threshold):
    """Returns the confusion matrix as a dict {tp, fp, tn, fn}."""
    probs, labels, _ = as_arrays(predictions)
    probs, labels = torch.from_numpy(probs), torch.from_numpy(labels)
    tn, fp, fn, tp = tm.binary_confusion_matrix(probs, labels, threshold).ravel().tolist()
    return {"tp": tp, "fp": fp, "tn": tn, "fn": fn}


def measure_subgroups(predictions, threshold, seed):
    """Computes sensitivity, specificity and AUROC for subgroups of patients.

    Returns {key: {group, metric, column, n, patients, value, low, high}}; n: images. A score is
    left out if its images are missing, for example the specificity of a subgroup without negative
    images.
    """
    result = {}
    for column, value in subgroup_values(predictions):
        group = f"{column} {value}"
        subgroup = predictions[predictions[column] == value]
        for metric in ("sensitivity", "specificity", "auroc"):
            key = f"{group}, {metric}"
            row = measure_subgroup(subgroup, group, metric, threshold, seed)
            result[key] = row and row | {"column": column}
    return {key: row for key, row in result.items() if row is not None}


def measure_subgroup(subgroup, group, metric, threshold, seed):
    """Computes one score of a subgroup; None if the images that it needs are missing."""
    needed = {"sensitivity": {1}, "specificity": {0}, "auroc": {0, 1}}[metric]
    subgroup = subgroup[subgroup["label"].isin(needed)]
    probs, labels, patients = as_arrays(subgroup)
    if set(labels) != needed:
        return None

    if metric == "auroc":
        interval = measure_auroc(probs, labels, patients, seed)
    else:
        interval = wilson_interval((probs > threshold) == labels, patients)
    row = {"group": group, "metric": metric, "n": len(labels), "patients": len(set(patients))}
    return row | interval


def measure_auroc(probs, labels, patients, seed):
    """Computes the AUROC with its interval, {value, low, high}. Both classes must have images."""

    def auroc(weights):
        return weighted_auroc(probs, labels, weights)[:, None]

    samples = draw_scores(labels, patients, auroc, seed)
    return logit_t_intervals(aurocs(probs[None], labels), samples, labels, patients)[0]


def subgroup_values(predictions):
    """Yields (column, value) for the columns of metadata.csv that have 2 to 10 values."""
    for column in metadata_columns(predictions):
        values = sorted(set(predictions[column]) - {""})
        if 2 <= len(values) <= 10:
            for value in values:
                yield column, value


def measure_calibration(predictions, model):
    """Measures how well the probabilities are calibrated, for metrics.json.

    intercept: the shift of the logits that makes the mean probability right. slope: the factor of
    the logits; below 1 if the probabilities are too extreme. with, without: after and before Platt
    scaling. model: slope and intercept of Platt scaling, if known. Source: Cox 1958; Van Calster
    et al. 2019.
    """
    probs, labels, patients = as_arrays(predictions)
    logits = finite_logits(probs)
    ones = np.ones(len(labels))
    shift, shift_error = fit_logistic(ones[:, None], labels, logits, patients)
    line, line_error = fit_logistic(np.column_stack([logits, ones]), labels, 0, patients)
    slope_interval = wald_interval(line[0], line_error[0])
    positive, negative = logits[labels == 1], logits[labels == 0]
    if positive.min() >= negative.max() or positive.max() <= negative.min():
        slope_interval = wald_interval(math.nan, math.nan)  # any slope fits separated classes

    # Platt scaling multiplied the logits by the slope and added the intercept. Undo this.
    platt_slope, platt_intercept = model.get("slope") or 1.0, model.get("intercept") or 0.0
    uncalibrated = expit((logits - platt_intercept) / platt_slope).astype(np.float32)
    return {
        "intercept": wald_interval(shift[0], shift_error[0]),
        "slope": slope_interval,
        "with": score_calibration(probs, labels),
        "without": score_calibration(uncalibrated, labels),
        "platt": {"slope": platt_slope, "intercept": platt_intercept},
    }


def is_measured(calibration):
    """Returns False if no slope, and so no intercept, describes the probabilities."""
    return calibration["slope"]["value"] is not None


def score_calibration(probs, labels):
    """Returns {ece, brier} of the probabilities; they do not depend on a threshold."""
    return score(torch.from_numpy(probs), torch.from_numpy(labels), 0.5, ("ece", "brier"))


def calibration_bins(probs, labels, patients):
    """Yields (mean probability, share of positive images, n) for each of ten bins with images.

    The share is a dict {value, low, high}.
    """
    bins = np.minimum((probs * 10).astype(int), 9)
    for number in np.unique(bins):
        in_bin = bins == number
        share = wilson_interval(labels[in_bin], patients[in_bin])
        yield float(probs[in_bin].mean()), share, int(in_bin.sum())


def aurocs(scores, labels):
    """Computes the AUROC of each row of scores (k, n), float (k,). labels: int (n,)."""
    n_positive = labels.sum()
    n_pairs = n_positive * (len(labels) - n_positive)
    # The AUROC is the statistic U of Mann and Whitney, divided by the number of pairs.
    rank_sums = rankdata(scores, axis=1)[:, labels == 1].sum(1)
    return (rank_sums - n_positive * (n_positive + 1) / 2) / n_pairs


def summed_columns(probs, labels, threshold):
    """Returns what accuracy, F1 and Brier score are computed from, if summed: float64 (N, 4)."""
    is_positive = probs > np.float32(threshold)  # as torchmetrics compares
    true_positive = is_positive & (labels == 1)
    wrong = is_positive != (labels == 1)
    squared_error = np.square(probs - labels)
    return np.column_stack([np.ones(len(labels)), true_positive, wrong, squared_error])


def scores_of_sums(sums):
    """Computes {accuracy, f1, brier}, each (samples,).

    sums: of summed_columns over the images of each sample, float64 (samples, 4).
    """
    n, true_positives, n_wrong, squared_errors = sums.T
    f1 = 2 * true_positives / np.maximum(2 * true_positives + n_wrong, 1)  # 0 instead of 0 / 0
    return {"accuracy": 1 - n_wrong / n, "f1": f1, "brier": squared_errors / n}


def below_chance(auroc, n_patients):
    """Returns a warning if the AUROC's interval is below 0.5.

    n_patients: {class: number of patients}.
    """
    highest = auroc["high"]
    if highest is None:  # the AUROC is the same in all bootstrap samples; of few patients by chance
        highest = 1 if min(n_patients.values()) < FEW_PATIENTS else auroc["value"]
    if highest >= 0.5:
        return []
    what = f"the AUROC is {format_interval(auroc)}, below chance (0.5)"
    swapped = "the class folders, or the names of --classes (make: CLASSES), are swapped"
    return [f"{what}. Look at images of each class, and find out whether {swapped}"]
