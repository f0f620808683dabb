"""cxr/local_data.py: how much an intercept that is fitted on local images would help."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit, logit

from cxr.calibration import platt_targets
from cxr.local_data import DRAWS, SIZES, fit_intercept, measure_local_data


def simulate_source(n, shift=-2.0, each=1, seed=0):
    """Returns (probs, labels, patients), calibrated except for the intercept."""
    rng = np.random.default_rng(seed)
    logits = np.repeat(rng.normal(0, 2, n // each), each)
    labels = np.repeat(rng.random(n // each) < expit(logits[::each]), each).astype(int)
    return expit(logits + shift).astype(np.float32), labels, np.arange(n) // each


@pytest.mark.parametrize("n_positive", [0, 1, 12, 20])
def test_the_intercept_is_that_of_statsmodels(n_positive):
    logits = np.random.default_rng(n_positive).normal(1, 3, 20)
    labels = (np.arange(20) < n_positive).astype(int)
    targets = platt_targets(labels)
    model = sm.GLM(targets, np.ones(20), offset=logits, family=sm.families.Binomial())
    assert fit_intercept(logits, labels) == pytest.approx(model.fit().params[0], abs=1e-5)


def test_local_images_correct_an_intercept_that_is_wrong():
    result = measure_local_data(*simulate_source(400), 0.5, 0)
    unchanged, rows = result["unchanged"], result["with_local"]
    assert [row["k"] for row in rows] == [*SIZES] and result["left_out"] == []
    probs, labels, _ = simulate_source(400)
    assert unchanged["accuracy"] == pytest.approx(np.mean((probs > 0.5) == labels))
    assert unchanged["brier"] == pytest.approx(np.mean((probs - labels) ** 2))
    right = expit(logit(probs.astype(float)) + 2)
    best = np.mean((right - labels) ** 2)
    for row in rows:
        assert row["accuracy"]["mean"] > unchanged["accuracy"] + 0.05
        assert best - 0.002 < row["brier"]["mean"] < best + 0.02 < unchanged["brier"]
        for score in ("accuracy", "brier"):
            assert row[score]["low"] < row[score]["mean"] < row[score]["high"]
    spreads = [row["brier"]["high"] - row["brier"]["low"] for row in rows]
    assert spreads[0] > spreads[1] > 0  # more local images, less chance


def test_the_percentiles_are_those_of_draws_by_hand():
    probs, labels, patients = simulate_source(60, seed=3)
    row = measure_local_data(probs, labels, patients, 0.4, 7)["with_local"][0]
    rng, accuracies = np.random.default_rng(11), []
    logits = logit(probs.astype(float))
    for _ in range(20 * DRAWS):
        drawn = rng.permutation(60)
        local, rest = drawn[:20], drawn[20:]
        shift = fit_intercept(logits[local], labels[local])
        accuracies.append(np.mean((expit(logits[rest] + shift) > 0.4) == labels[rest]))
    assert row["accuracy"]["mean"] == pytest.approx(np.mean(accuracies), abs=0.01)
    low, high = np.quantile(accuracies, (0.05, 0.95))
    assert row["accuracy"]["low"] == pytest.approx(low, abs=0.04)
    assert row["accuracy"]["high"] == pytest.approx(high, abs=0.04)


@pytest.mark.parametrize(
    ("n", "each", "left_out"),
    [(200, 1, []), (199, 1, [100]), (40, 1, [50, 100]), (39, 1, [20, 50, 100]), (204, 3, [])],
)
def test_a_number_is_left_out_if_less_than_half_would_remain(n, each, left_out):
    probs, labels, patients = simulate_source(n, each=each)
    result = measure_local_data(probs, labels, patients, 0.5, 0)
    assert result["left_out"] == left_out
    assert [row["k"] for row in result["with_local"]] == [k for k in SIZES if k not in left_out]


def test_no_patient_is_local_and_scored(monkeypatch):
    probs, labels, patients = simulate_source(240, each=4)
    seen = []

    def score(_, __, is_local, ___):
        seen.append(is_local)
        return 1.0, 0.0

    monkeypatch.setattr("cxr.local_data.score_with_local", score)
    measure_local_data(probs, labels, patients, 0.5, 0)
    assert len(seen) == len(SIZES) * DRAWS
    for is_local in seen:
        assert not set(patients[is_local]) & set(patients[~is_local])
    assert {mask.sum() for mask in seen} == {20, 52, 100}  # 13 patients have at least 50 images


def test_one_patient_with_many_images_leaves_no_number():
    probs, labels, _ = simulate_source(120)
    result = measure_local_data(probs, labels, np.zeros(120, int), 0.5, 0)
    assert result["with_local"] == [] and result["left_out"] == [*SIZES]
