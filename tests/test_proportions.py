"""cxr/proportions.py: intervals of shares, and predictive values elsewhere."""

import json

import numpy as np
import pytest
import scipy.stats

from cxr.proportions import (
    PREVALENCES,
    complement,
    predictive_values,
    ratio_interval,
    wilson_interval,
)


def share(k, n):
    return wilson_interval(np.arange(n) < k, range(n))


def test_a_result_elsewhere_is_that_of_the_literature():
    sensitivity, specificity = share(46, 50), share(37, 50)
    positive = ratio_interval(sensitivity, complement(specificity))
    assert [positive[key] for key in ("value", "low", "high")] == pytest.approx(
        [3.54, 2.20, 5.69], abs=0.25
    )
    metrics = {"sensitivity": sensitivity, "specificity": specificity}
    found = {each["prevalence"]: each for each in predictive_values(metrics, (0.1, 0.5))}
    assert found[0.5]["ppv"]["value"] == pytest.approx(46 / 59)
    assert found[0.5]["npv"]["value"] == pytest.approx(37 / 41)
    ppv = found[0.1]["ppv"]
    assert [ppv[key] for key in ("value", "low", "high")] == pytest.approx(
        [0.282, 0.197, 0.387], abs=0.02
    )


def test_intervals_elsewhere_hold_the_truth_also_where_nothing_is_wrong():
    rng, n, prevalence = np.random.default_rng(0), 60, 0.05
    for sensitivity, specificity in ((0.9, 0.7), (0.98, 0.95), (0.7, 0.99)):
        odds = prevalence / (1 - prevalence)
        ppv = 1 / (1 + (1 - specificity) / sensitivity / odds)
        npv = 1 / (1 + odds * (1 - sensitivity) / specificity)
        hits = np.zeros(2)
        for _ in range(600):
            shares = (share(rng.binomial(n, p), n) for p in (sensitivity, specificity))
            metrics = dict(zip(("sensitivity", "specificity"), shares, strict=True))
            (found,) = predictive_values(metrics, [prevalence])
            for i, (name, truth) in enumerate((("ppv", ppv), ("npv", npv))):
                hits[i] += found[name]["low"] <= truth <= found[name]["high"]
        assert (hits / 600 > 0.9).all(), (sensitivity, specificity, hits)


@pytest.mark.parametrize(("right", "wrong"), [(50, 50), (0, 0), (0, 50), (50, 0)])
def test_shares_of_0_and_1_give_limits_or_are_undefined(right, wrong):
    metrics = {"sensitivity": share(right, 50), "specificity": share(wrong, 50)}
    for each in predictive_values(metrics, PREVALENCES):
        for name in ("ppv", "npv"):
            low, value, high = (each[name][key] for key in ("low", "value", "high"))
            if value is not None:
                assert -1e-9 <= low <= value <= high <= 1 + 1e-9
    json.dumps(predictive_values(metrics, [0.1]), allow_nan=False)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (5, 7), (50, 60), (60, 60)])
def test_wilson_s_interval_is_scipy_s_at_one_image_a_patient(k, n):
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    found = share(k, n)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=1e-9)


def test_wilson_s_interval_counts_patients_where_their_images_are_alike():
    rng, hits, plain, runs = np.random.default_rng(0), 0, 0, 600
    for p in (0.8, 0.95):
        hits = plain = 0
        for _ in range(runs):
            own = rng.normal(size=(50, 1)) * 0.75**0.5
            z = own + rng.normal(size=(50, 3)) * 0.25**0.5  # three images a patient, alike
            right = (z < scipy.stats.norm.ppf(p)).ravel()
            found = wilson_interval(right, np.repeat(np.arange(50), 3))
            hits += found["low"] <= p <= found["high"]
            found = wilson_interval(right, np.arange(150))
            plain += found["low"] <= p <= found["high"]
        assert 0.91 < hits / runs < 0.985 and plain / runs < hits / runs
    whole = wilson_interval(np.ones(60), np.repeat(np.arange(20), 3))
    assert whole["low"] == pytest.approx(share(20, 20)["low"])
