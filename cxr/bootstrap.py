"""Bootstrap intervals of other scores, drawn by patient."""

import math
import warnings

import numpy as np
import scipy.stats
from scipy.special import expit, logit

from cxr.proportions import wald_interval

DRAWS = 2000  # of the bootstrap
INTERVALS = (
    "95 %. Of {proportions}: Wilson's, with the effective sample size where patients have several "
    "images. Of auroc and average_precision: Student's t on the logit, with the deviation of "
    "{draws} bootstrap samples of patients within each class, seed {seed}. Of f1 and brier: BCa of "
    "these samples. Of differences: 1.96 deviations of paired samples. Of the calibration's "
    "intercept and slope: Wald's, the images clustered by patient. Of predictive values at another "
    "prevalence: from the likelihood ratios, whose limits are MOVER's on Wilson's."
)


def bootstrap_patients(table, statistic, seed, method):
    """(scipy's bootstrap of statistic(rows) -> (k,), the number of patients of the smaller class).

    Patients are drawn with all their images, as many of each class as there are. Images of one
    patient are alike: drawn one by one they would give too narrow an interval.
    """
    patients = [{}, {}]
    for row, (label, patient) in enumerate(zip(table.labels, table.clusters(), strict=True)):
        patients[label].setdefault(patient, []).append(row)
    rows_of = [list(rows.values()) for rows in patients]

    def of_patients(*drawn):
        rows = []
        for units, patients in zip(drawn, rows_of, strict=True):
            rows += [row for i in units for row in patients[i]]
        return statistic(rows)

    units = [np.arange(max(2, len(rows))) % len(rows) for rows in rows_of]  # scipy wants two
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of scores without spread, which give nan
        found = scipy.stats.bootstrap(
            units, of_patients, vectorized=False, n_resamples=DRAWS, method=method, rng=seed
        )
    return found, min(map(len, rows_of))


def logit_t_intervals(table, statistic, seed):
    """[{value, low, high}] of statistic(rows) -> (k,) in (0, 1): Student's t on the logit.

    Its deviation is the bootstrap's. Percentiles, BCa's too, hold an AUROC of few patients too
    rarely: 89 % where 95 are wanted, 20 % PNEUMONIA and three images a patient; this holds 96.
    """
    (drawn, m), found = bootstrap_patients(table, statistic, seed, "percentile"), []
    for value, sd in zip(statistic(range(len(table.files))), drawn.standard_error, strict=True):
        found.append({"value": float(value), "low": None, "high": None})
        if sd > 1e-6:  # else all draws are alike
            sd *= math.sqrt(m / max(m - 1, 1)) / (value * (1 - value))
            reach = scipy.stats.t.ppf(0.975, max(m - 1, 1)) * sd
            low, high = expit(logit(value) - reach), expit(logit(value) + reach)
            found[-1] |= {"low": float(low), "high": float(high)}
    return found


def paired_differences(table, differences, seed):
    """[{value, low, high}] of differences(rows) -> (k,), of scores on the same drawn patients."""
    drawn, _ = bootstrap_patients(table, differences, seed, "percentile")
    values = differences(range(len(table.files)))
    return [wald_interval(*each) for each in zip(values, drawn.standard_error, strict=True)]
