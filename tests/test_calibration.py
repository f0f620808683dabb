"""cxr/calibration.py: Platt scaling and the threshold, fitted on val/ and reported."""

import numpy as np
import pytest
import sklearn.linear_model
import statsmodels.api
import torch
from helpers import read_about, read_report, read_rows, write_rows
from scipy.special import expit, logit
from simulated import calibration_error, simulate

from cxr.calibration import calibrate, fit_logistic, fit_threshold, sandwich_errors
from cxr.folders import CLASSES
from cxr.predictions import as_arrays
from cxr.scores import measure_calibration


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [(0.4, 0.4), ("youden", 0.65), ("sensitivity=0.8", 0.65), ("sensitivity=1", 0.25)],
)
def test_the_threshold_follows_its_rule(rule, threshold):
    probs = torch.tensor([0.1, 0.2, 0.6, 0.3, 0.7, 0.8, 0.9, 0.95])
    labels = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    assert fit_threshold(rule, probs, labels) == pytest.approx(threshold)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_calibration_estimates_the_slope_and_the_intercept(share):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 4000) + np.log(share / (1 - share))
    labels = rng.random(4000) < expit(logits)
    scores = torch.tensor((logits - 0.7) * 2.5, dtype=torch.float32)
    slope, intercept = calibrate(scores, torch.tensor(labels, dtype=torch.float32))
    assert slope == pytest.approx(1 / 2.5, rel=0.1) and intercept == pytest.approx(0.7, abs=0.15)
    calibrated = torch.sigmoid(slope * scores + intercept)
    assert calibrated.mean().item() == pytest.approx(labels.mean(), abs=0.005)


def test_calibration_is_finite_on_separated_data_and_never_swaps_the_classes(capsys):
    logits, labels = torch.tensor([-3.0, -2, 2, 3]), torch.tensor([0.0, 0, 1, 1])
    slope, intercept = calibrate(logits, labels)
    assert 0 < slope < 5 and abs(intercept) < 1
    assert calibrate(logits, 1 - labels) == (1, 0)
    err = capsys.readouterr().err
    assert "not calibrated" in err and err.endswith(
        "Look at the images in val/ and at their labels\n"
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_logistic_regression_and_its_errors_agree_with_statsmodels(seed):
    rng = np.random.default_rng(seed)
    n, n_patients = int(rng.integers(60, 400)), 30
    x = np.column_stack([rng.normal(0, 2, n), np.ones(n)])
    offset = rng.normal(size=n) if seed % 2 else np.zeros(n)
    labels = (rng.random(n) < expit(x @ [0.8, -0.3] + offset)).astype(float)
    if seed % 4 > 1:  # as calibrate does
        labels = np.where(labels > 0.5, 0.97, 0.02)
    patients = rng.permutation(np.arange(n) % n_patients)
    model = statsmodels.api.GLM(labels, x, statsmodels.api.families.Binomial(), offset=offset)
    by_patient = {"groups": patients, "use_correction": False}
    fit = model.fit(tol=1e-14, cov_type="cluster", cov_kwds=by_patient)
    expected_errors = fit.bse * np.sqrt(n_patients / (n_patients - 1))
    # L-BFGS stops when the loss changes by less than 1e-12. The loss is flat at its minimum, so the
    # coefficients are less exact than the loss.
    coefficients, errors = fit_logistic(x, labels, offset, patients)
    assert model.loglike(coefficients) == pytest.approx(fit.llf, abs=1e-8)
    assert coefficients == pytest.approx(fit.params, abs=1e-6)
    assert errors == pytest.approx(expected_errors, abs=1e-6)
    errors = sandwich_errors(x, labels, fit.fittedvalues, patients)
    assert errors == pytest.approx(expected_errors, abs=1e-8)


def test_the_fitted_calibration_and_threshold_are_saved(run_train, tmp_path):
    heads = []
    for flags in (("--no-calibrate",), ("--threshold", "youden")):
        assert run_train("--epochs", 3, *flags) == 0
        heads.append(torch.load(tmp_path / "model.pth"))
    before, after, model = *heads, read_about(tmp_path)
    slope, intercept = model["slope"], model["intercept"]
    assert torch.allclose(slope * before["fc.weight"], after["fc.weight"], rtol=1e-5)
    assert torch.allclose(slope * before["fc.bias"] + intercept, after["fc.bias"], rtol=1e-5)
    assert model["threshold_rule"] == "youden" and 0 < model["threshold"] < 1


@pytest.mark.parametrize(("patients", "share", "n_images"), [(300, 0.2, 1), (150, 0.5, 3)])
def test_the_intervals_of_calibrated_scores_contain_intercept_0_and_slope_1(
    patients, share, n_images
):
    rng, runs, hits = np.random.default_rng(0), 80, {"intercept": 0, "slope": 0}
    for _ in range(runs):
        n = int(rng.binomial(patients, share))
        (predictions,) = simulate(rng, patients - n, n, n_images, odds=share / (1 - share))
        calibration = measure_calibration(predictions, {})
        for name, ideal in (("intercept", 0), ("slope", 1)):
            hits[name] += calibration[name]["low"] <= ideal <= calibration[name]["high"]
    for name, count in hits.items():
        assert count / runs >= 0.86, name


@pytest.mark.parametrize(("shift", "factor"), [(0, 1), (1, 1), (-1, 1), (0, 2), (0, 0.5)])
def test_slope_and_intercept_detect_extreme_and_shifted_scores(shift, factor):
    (predictions,) = simulate(np.random.default_rng(3), 400, 200)
    logits = factor * logit(predictions["probability"].astype(float)) + shift
    predictions = predictions.assign(probability=expit(logits).astype(np.float32))
    probs, labels, _ = as_arrays(predictions)
    logits = logit(probs.astype(float))
    calibration = measure_calibration(predictions, {})
    slope, intercept = calibration["slope"], calibration["intercept"]
    model = sklearn.linear_model.LogisticRegression(C=1e10, tol=1e-10)
    model.fit(logits[:, None], labels)
    assert slope["value"] == pytest.approx(model.coef_.item(), abs=2e-3)
    assert expit(logits + intercept["value"]).mean() == pytest.approx(labels.mean(), abs=1e-4)
    assert (slope["low"] <= 1 <= slope["high"]) == (factor == 1)
    if shift:
        assert intercept["value"] == pytest.approx(-shift, abs=0.35)
        assert not intercept["low"] <= 0 <= intercept["high"]


@pytest.mark.parametrize(
    "probs", [[0.1, 0.2, 0.7, 0.8], [0.1, 0.5, 0.5, 0.8], [0.8, 0.7, 0.2, 0.1], [0.3] * 4]
)
def test_separated_or_equal_scores_have_no_slope(probs, tmp_path, capsys, rescore):
    source = write_rows(tmp_path / "predictions.csv", [0, 0, 1, 1], probs)
    status, folder = rescore(source)
    reason = (
        "could not be measured, because the probabilities separate the classes or are all equal"
    )
    screen, page = capsys.readouterr().out, (folder / "report.html").read_text()
    assert status == 0 and f"Calibration: {reason}" in screen and f"Calibration: {reason}" in page
    assert "intercept" not in screen and "Calibration intercept" not in page
    slope = read_report(folder)["calibration"]["slope"]
    assert slope == {"value": None, "low": None, "high": None}


def test_the_report_has_the_scores_with_and_without_platt_scaling(run_evaluate, remake, tmp_path):
    assert run_evaluate("--checkpoint", remake(slope=2.5, intercept=-0.4)) == 0
    rows = read_rows(tmp_path / "results/predictions.csv")
    probs = np.array([float(row["probability"]) for row in rows])
    labels = np.array([CLASSES.index(row["label"]) for row in rows])
    calibration = read_report(tmp_path / "results")["calibration"]
    assert calibration["platt"] == {"slope": 2.5, "intercept": -0.4}
    for key, values in (("with", probs), ("without", expit((logit(probs) + 0.4) / 2.5))):
        brier, ece = calibration[key]["brier"], calibration[key]["ece"]
        assert brier == pytest.approx(((values - labels) ** 2).mean(), abs=1e-5)
        expected = calibration_error(labels, values.astype(np.float32))
        assert ece == pytest.approx(expected, abs=1e-5)
