"""All scores of a table of predictions, with intervals."""

import math
from functools import partial

import numpy as np
import scipy.stats
import torch
import torchmetrics.functional.classification as tm
from scipy.special import expit, logit

from cxr.bootstrap import bootstrap_patients, logit_t_intervals
from cxr.calibration import fit_logistic
from cxr.errors import Failure
from cxr.folders import CLASSES
from cxr.proportions import PROPORTIONS, format_interval, wald_interval, wilson_interval

SCORES = ("accuracy", "f1", "auroc", "average_precision", "sensitivity", "specificity")
SCORES += ("ppv", "npv", "brier", "ece")


def score(probs, labels, threshold, names=SCORES):
    """{name: float, or None where a denominator is 0}.

    probs: float32 (N,), P(PNEUMONIA); labels: int64 (N,). An image counts as PNEUMONIA above the
    threshold, not at it. brier: mean squared error of the probability; ece: expected calibration
    error, 15 bins of equal width (Guo et al. 2017).
    """
    import torchmetrics.functional.classification as tm

    fast = {"validate_args": False}  # the bootstrap asks thousands of times
    at = {"threshold": threshold, **fast}
    functions = {
        "accuracy": partial(tm.binary_accuracy, **at),
        "f1": partial(tm.binary_f1_score, **at),
        "auroc": partial(tm.binary_auroc, **fast),
        "average_precision": partial(tm.binary_average_precision, **fast),
        "sensitivity": partial(tm.binary_recall, **at),
        "specificity": partial(tm.binary_specificity, **at),
        "ppv": partial(tm.binary_precision, **at),
        "npv": partial(tm.binary_negative_predictive_value, **at),
        "brier": lambda probs, labels: (probs - labels).square().mean(),
        "ece": partial(tm.binary_calibration_error, n_bins=15, **fast),
    }
    empty = {"ppv": not (probs > threshold).any(), "npv": not (probs <= threshold).any()}
    return {
        name: None if empty.get(name) else float(functions[name](probs, labels)) for name in names
    }


# in a patient's name: (class, key, in words)
SUBGROUPS = {
    "_bacteria": (1, "bacteria", "bacterial pneumonia"),
    "_virus": (1, "virus", "viral pneumonia"),
    "IM-": (0, "IM", "films named IM-"),
    "NORMAL2-IM-": (0, "NORMAL2-IM", "films named NORMAL2-IM-"),
}


def measure_scores(table, threshold, seed):
    """({name: {value, low, high}}, counts) of all scores; a Failure where a class is missing."""
    for label, name in enumerate(CLASSES):
        if label not in table.labels:
            raise Failure(f"no readable {name} image: expected both classes to score")
    probs, labels = torch.from_numpy(table.probs), torch.from_numpy(table.labels)
    values = score(probs, labels, threshold)
    if not all(math.isfinite(value) for value in values.values() if value is not None):
        raise Failure(f"a score is not finite: {values}", 3)
    tn, fp, fn, tp = tm.binary_confusion_matrix(probs, labels, threshold).ravel().tolist()
    metrics = {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
    positive, patients = table.probs > np.float32(threshold), np.array(table.clusters())
    right = positive == (table.labels == 1)
    sides = right | True, table.labels == 1, table.labels == 0, positive, ~positive
    for name, side in zip(PROPORTIONS, sides, strict=True):
        metrics[name] |= wilson_interval(right[side], patients[side])

    def statistic_of(*names):
        return lambda rows: [*score(probs[rows], labels[rows], threshold, names).values()]

    smooth = "auroc", "average_precision"
    for name, each in zip(
        smooth, logit_t_intervals(table, statistic_of(*smooth), seed), strict=True
    ):
        metrics[name] = each
    drawn, _ = bootstrap_patients(table, statistic_of("f1", "brier"), seed, "BCa")
    for name, low, high in zip(("f1", "brier"), *drawn.confidence_interval, strict=True):
        if math.isfinite(low + high) and low < high:  # else all draws are alike
            metrics[name] |= {"low": float(low), "high": float(high)}
    return metrics, {"tp": tp, "fp": fp, "tn": tn, "fn": fn}


def measure_subgroups(table, names, threshold, seed):
    """{name: {group, metric, n, value, low, high}} by names, and by the columns of metadata.csv.

    names: of the patients, as the files tell them, "" where they do not: the etiologies and series
    of the reference data. Columns: those of 2 to 10 values.
    """
    positive, parts = table.labels == 1, {}
    for part, (label, key, group) in SUBGROUPS.items():
        inside = np.array([name.startswith(part) or name.endswith(part) for name in names])
        parts[key] = group, ("specificity", "sensitivity")[label], inside & (positive == label)
    for column in dict.fromkeys(key for about in table.about for key in about):
        values = np.array([about.get(column, "") for about in table.about])
        known = sorted(set(values) - {""})
        for value in known if 2 <= len(known) <= 10 else ():
            group, inside = f"{column} {value}", values == value
            parts[f"{group}, sensitivity"] = group, "sensitivity", inside & positive
            parts[f"{group}, specificity"] = group, "specificity", inside & ~positive
            parts[f"{group}, auroc"] = group, "auroc", inside
    found = {}
    for name, (group, metric, inside) in parts.items():
        part = table.select(np.flatnonzero(inside))
        if metric == "auroc" and len(set(part.labels)) == 2:

            def auroc(rows, part=part):
                return aurocs(part.probs[None, rows], part.labels[rows])

            (interval_of,) = logit_t_intervals(part, auroc, seed)
        elif metric != "auroc" and part.files:
            right = (part.probs > threshold) == part.labels
            interval_of = wilson_interval(right, part.clusters())
        else:
            continue
        found[name] = {"group": group, "metric": metric, "n": len(part.files)} | interval_of
    return found


def measure_calibration(table, model):
    """What metrics.json says about calibration; model: what it says about the model.

    intercept: calibration in the large, the shift of the logits that makes the mean probability
    right, 0 if it is; slope: their factor, 1 if right, below 1 where scores are too extreme (Cox
    1958; Van Calster et al. 2019). ece and brier with Platt's slope and intercept and, undone on
    the logits, without them.
    """
    labels, clusters = table.labels, table.clusters()
    # a float32 of 1.0 may have been 1 - 2**-25
    logits = logit(np.clip(table.probs.astype(np.float64), 1e-12, 1 - 2.0**-25))
    ones = np.ones(len(labels))
    shift, shift_error = fit_logistic(ones[:, None], labels, logits, clusters)
    line, line_error = fit_logistic(np.column_stack([logits, ones]), labels, 0, clusters)
    found = {
        "intercept": wald_interval(shift[0], shift_error[0]),
        "slope": wald_interval(line[0], line_error[0]),
    }
    positive, negative = logits[labels == 1], logits[labels == 0]
    if positive.min() >= negative.max() or positive.max() <= negative.min():
        found["slope"] = wald_interval(
            math.nan, math.nan
        )  # separated, or all alike: any slope fits
    slope, intercept = model.get("slope") or 1.0, model.get("intercept") or 0.0
    before = expit((logits - intercept) / slope).astype(np.float32)
    for name, probs in (("with", table.probs), ("without", before)):
        scores = score(torch.from_numpy(probs), torch.from_numpy(labels), 0.5)
        found[name] = {"ece": scores["ece"], "brier": scores["brier"]}
    return found | {"platt": {"slope": slope, "intercept": intercept}}


def aurocs(scores, labels):
    """float (k,): the AUROC of each row of scores (k, n), by Mann and Whitney's ranks."""
    n_positive = labels.sum()
    above = scipy.stats.rankdata(scores, axis=1)[:, labels == 1].sum(1)
    pairs = n_positive * (len(labels) - n_positive)
    return (above - n_positive * (n_positive + 1) / 2) / pairs


def below_chance(auroc):
    """A warning where the scores are worse than a coin, which no honest mistake makes them."""
    if (auroc["value"] if auroc["high"] is None else auroc["high"]) >= 0.5:
        return []
    return [f"AUROC {format_interval(auroc)} is far below chance: are the class folders swapped?"]
