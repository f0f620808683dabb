"""Bootstrap intervals of scores that are no proportions. Patients are drawn, not images."""

import math
import warnings

import numpy as np
import scipy.stats
from scipy.special import expit, logit

from cxr.proportions import wald_interval

DRAWS = 2000  # bootstrap samples

# How the intervals of a report are computed, for metrics.json and the page.
INTERVALS = (
    "All intervals are 95 % intervals. "
    "{proportions}: Wilson's interval, with the effective sample size if patients have several "
    "images. "
    "{t_interval}: Student's t interval on the logit scale; the standard error "
    "comes from {draws} bootstrap samples of patients, drawn within each class, with seed {seed}. "
    "{bca_interval}: BCa interval of the same samples. "
    "Differences between two scores: the difference ± 1.96 standard errors of paired samples. "
    "Intercept and slope of the calibration: Wald interval, with images clustered by patient. "
    "Predictive values at another prevalence: from the likelihood ratios, whose intervals are "
    "computed with MOVER from Wilson's intervals."
)


def bootstrap_patients(labels, patients, statistic, seed, method):
    """Draws patients with replacement within each class, and computes statistic(rows) each time.

    labels: int (N,), 0 or 1; patients: (N,), any names. statistic: function that takes a list of
    row numbers and returns k scores. method: of scipy.stats.bootstrap ("percentile" or "BCa").
    Returns SciPy's result, and the number of patients in the smaller class.
    """
    rows_by_class = [group_rows(labels, patients, label) for label in (0, 1)]

    def statistic_of_patients(*drawn_by_class):
        # Images of one patient are correlated: drawn one by one, they give too narrow intervals.
        rows = []
        for drawn, rows_of_patient in zip(drawn_by_class, rows_by_class, strict=True):
            for patient in drawn:
                rows += rows_of_patient[patient]
        return statistic(rows)

    # SciPy needs at least two patients per class: a single one is listed twice.
    numbers = [np.arange(max(2, len(rows))) % len(rows) for rows in rows_by_class]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Scores that are the same in all samples give nan, which the callers handle.
        warnings.simplefilter("ignore")
        options = {"n_resamples": DRAWS, "method": method, "rng": seed, "vectorized": False}
        result = scipy.stats.bootstrap(numbers, statistic_of_patients, **options)
    return result, min(len(rows) for rows in rows_by_class)


def group_rows(labels, patients, label):
    """Returns the rows of each patient's images with this label, as a list of lists."""
    rows_of = {}
    for row, patient in enumerate(patients):
        if labels[row] == label:
            rows_of.setdefault(patient, []).append(row)
    return list(rows_of.values())


def logit_t_intervals(labels, patients, statistic, seed):
    """Computes 95 % intervals of scores between 0 and 1, such as the AUROC.

    Method: Student's t interval on the logit scale, with the standard error of the bootstrap.
    Returns k dicts {value, low, high}; low and high are None if all bootstrap samples are equal.
    """
    # In simulations with few patients (20 % positive, three images each), percentile and BCa
    # intervals contained the true AUROC in 89 % of the runs; this interval did in 96 %.
    # "percentile" has no effect here: only the standard error is used.
    samples, n_smaller_class = bootstrap_patients(labels, patients, statistic, seed, "percentile")
    degrees_of_freedom = max(n_smaller_class - 1, 1)
    t = scipy.stats.t.ppf(0.975, degrees_of_freedom)
    intervals = []
    scores = statistic(range(len(labels)))
    for score, standard_error in zip(scores, samples.standard_error, strict=True):
        interval = {"value": float(score), "low": None, "high": None}
        if standard_error > 1e-6:
            # The bootstrap of few patients underestimates the standard error by this factor.
            correction = math.sqrt(n_smaller_class / degrees_of_freedom)
            logit_error = standard_error * (correction / (score * (1 - score)))  # delta method
            margin = t * logit_error
            interval["low"] = float(expit(logit(score) - margin))
            interval["high"] = float(expit(logit(score) + margin))
        intervals.append(interval)
    return intervals


def paired_differences(labels, patients, differences, seed):
    """Computes 95 % intervals of differences between scores of the same images.

    differences: function that takes row numbers and returns k differences.
    Returns k dicts {value, low, high}: difference ± 1.96 standard errors of the bootstrap.
    """
    samples, _ = bootstrap_patients(labels, patients, differences, seed, "percentile")
    pairs = zip(differences(range(len(labels))), samples.standard_error, strict=True)
    return [wald_interval(value, standard_error) for value, standard_error in pairs]
