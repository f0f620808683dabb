"""cxr/proportions.py: intervals of proportions, and predictive values at other prevalences."""

import json

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from cxr.proportions import (
    complement,
    difference_interval,
    effective_sample_size,
    few_patients_warnings,
    format_probability,
    predictive_values,
    ratio_interval,
    wilson_interval,
)


def share(k, n):
    """Returns the interval of k correct of n images, each of another patient."""
    return wilson_interval(np.arange(n) < k, range(n))


def values(interval):
    return [interval[key] for key in ("value", "low", "high")]


def test_likelihood_ratio_and_predictive_values_equal_the_published_example():
    sensitivity, specificity = share(46, 50), share(37, 50)
    ratio = ratio_interval(sensitivity, complement(specificity))
    assert values(ratio) == pytest.approx([3.54, 2.20, 5.69], abs=0.25)
    metrics = {"sensitivity": sensitivity, "specificity": specificity}
    tenth, half = predictive_values(metrics, (0.1, 0.5))
    assert [tenth["prevalence"], half["prevalence"]] == [0.1, 0.5]
    assert half["ppv"]["value"] == pytest.approx(46 / 59)
    assert half["npv"]["value"] == pytest.approx(37 / 41)
    assert values(tenth["ppv"]) == pytest.approx([0.282, 0.197, 0.387], abs=0.02)


@pytest.mark.parametrize(
    ("k", "n", "k_other", "n_other", "published"),
    [  # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10
        (56, 70, 48, 80, [0.0524, 0.3339]),
        (9, 10, 3, 10, [0.1705, 0.8090]),
        (10, 10, 0, 20, [0.6791, 1.0]),
    ],
)
def test_a_difference_equals_the_published_example(k, n, k_other, n_other, published):
    difference = difference_interval(share(k, n), share(k_other, n_other))
    assert values(difference)[1:] == pytest.approx(published, abs=1e-4)
    expected = confint_proportions_2indep(k, n, k_other, n_other, method="newcomb", compare="diff")
    assert values(difference) == pytest.approx([k / n - k_other / n_other, *expected], abs=1e-8)


def test_a_difference_without_value_or_interval_has_none():
    nothing = {"value": None, "low": None, "high": None}
    assert difference_interval(share(5, 10), nothing) == nothing
    without = {"value": 0.25, "low": None, "high": None}
    assert difference_interval(without, share(5, 10)) == without | {"value": -0.25}


@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.9, 0.7), (0.98, 0.95), (0.7, 0.99)])
def test_intervals_of_predictive_values_contain_the_true_value(sensitivity, specificity):
    rng, n, prevalence = np.random.default_rng(0), 60, 0.05
    odds = prevalence / (1 - prevalence)
    truth = {"ppv": 1 / (1 + (1 - specificity) / sensitivity / odds)}
    truth["npv"] = 1 / (1 + odds * (1 - sensitivity) / specificity)
    hits = dict.fromkeys(truth, 0)
    for _ in range(600):
        shares = (share(rng.binomial(n, p), n) for p in (sensitivity, specificity))
        metrics = dict(zip(("sensitivity", "specificity"), shares, strict=True))
        (row,) = predictive_values(metrics, [prevalence])
        for name, value in truth.items():
            hits[name] += row[name]["low"] <= value <= row[name]["high"]
    assert min(hits.values()) / 600 > 0.9, hits


@pytest.mark.parametrize(
    ("k_sensitivity", "k_specificity", "undefined"),
    [(50, 50, []), (0, 0, []), (0, 50, ["ppv"]), (50, 0, ["npv"])],
)
def test_shares_of_0_and_1_give_limits_or_nothing(k_sensitivity, k_specificity, undefined):
    metrics = {"sensitivity": share(k_sensitivity, 50), "specificity": share(k_specificity, 50)}
    rows = predictive_values(metrics, (0.01, 0.05, 0.1, 0.2, 0.5))
    for row in rows:
        assert [name for name in ("ppv", "npv") if row[name]["value"] is None] == undefined
        for name in {"ppv", "npv"} - {*undefined}:
            value, low, high = values(row[name])
            assert -1e-9 <= low <= value <= high <= 1 + 1e-9
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (1, "with 1 patient, an accuracy of 1.00 has the interval 0.21 to 1.00"),
        (4, "with 4 patients, an accuracy of 1.00 has the interval 0.51 to 1.00"),
        (9, "with 9 patients, an accuracy of 1.00 has the interval 0.70 to 1.00"),
    ],
)
def test_the_warning_of_few_patients_gives_the_interval_of_a_perfect_result(n, words):
    for split, meaning in (("test", "no conclusion"), ("val", "threshold then depend on chance")):
        (warning,) = few_patients_warnings(split, {"NORMAL": 60, "PNEUMONIA": n})
        assert warning.startswith(
            f"few patients in {split}/ (60 NORMAL and {n} PNEUMONIA): {words}"
        )
        assert meaning in warning and warning.endswith("(train.py --folds 5, make cv)")
    assert few_patients_warnings("test", {"NORMAL": 60, "PNEUMONIA": 10}) == []


@pytest.mark.parametrize("p", [0.8, 0.95])
def test_the_wilson_interval_of_correlated_images_contains_the_true_share(p):
    rng, hits, hits_by_image, runs = np.random.default_rng(0), 0, 0, 600
    for _ in range(runs):
        of_patient = rng.normal(size=(50, 1)) * 0.75**0.5
        z = of_patient + rng.normal(size=(50, 3)) * 0.25**0.5  # three correlated images per patient
        correct = (z < scipy.stats.norm.ppf(p)).ravel()
        interval = wilson_interval(correct, np.repeat(np.arange(50), 3))
        hits += interval["low"] <= p <= interval["high"]
        interval = wilson_interval(correct, np.arange(150))
        hits_by_image += interval["low"] <= p <= interval["high"]
    assert 0.91 < hits / runs < 0.985 and hits_by_image < hits
    interval = wilson_interval(np.ones(60), np.repeat(np.arange(20), 3))  # it counts patients
    assert interval["low"] == pytest.approx(share(20, 20)["low"])


@pytest.mark.parametrize("seed", range(5))
def test_the_wilson_interval_agrees_with_statsmodels(seed):
    rng = np.random.default_rng(seed)
    for n in rng.integers(1, 500, 20):
        for k in (0, rng.integers(0, n + 1), n):
            low, high = proportion_confint(k, n, method="wilson")
            assert values(share(k, n)) == pytest.approx([k / n, low, high], abs=1e-8)
        correct, patients = rng.random(n) < rng.random(), rng.integers(n // 3 + 1, size=n)
        n_effective = effective_sample_size(correct, patients)
        low, high = proportion_confint(correct.mean() * n_effective, n_effective, method="wilson")
        expected = [correct.mean(), low, high]
        assert values(wilson_interval(correct, patients)) == pytest.approx(expected, abs=1e-8)


def test_a_probability_is_never_shown_as_0_or_1():
    values = 0, 0.0004, 0.0006, 0.9994, 0.9996, 1
    shown = ["<0.001", "<0.001", "0.001", "0.999", ">0.999", ">0.999"]
    assert [*map(format_probability, values)] == shown
