"""cxr/calibration.py: Platt's line and the threshold, fitted on val/ and told with the scores."""

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
from helpers import read_about, read_report, read_rows, write_rows
from scipy.special import expit, logit
from simulated import calibration_error, simulate

from cxr.calibration import calibrate, fit_threshold
from cxr.folders import CLASSES
from cxr.scores import measure_calibration

# ---------------------------------------------------------------- fitted while training


def test_thresholds_follow_their_rule():
    probs = torch.tensor([0.1, 0.2, 0.6, 0.3, 0.7, 0.8, 0.9, 0.95])
    labels = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    assert fit_threshold(0.4, probs, labels) == 0.4
    assert fit_threshold("youden", probs, labels) == pytest.approx(0.65)
    assert fit_threshold("sensitivity=0.8", probs, labels) == pytest.approx(0.65)
    assert fit_threshold("sensitivity=1", probs, labels) == pytest.approx(0.25)


def test_a_fitted_threshold_and_its_rule_are_stored(run_train, tmp_path):
    assert run_train("--threshold", "youden", "--epochs", 3) == 0
    assert (
        read_about(tmp_path)["threshold_rule"] == "youden"
        and 0 < read_about(tmp_path)["threshold"] < 1
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_calibration_finds_the_slope_and_the_intercept(share):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 4000) + np.log(share / (1 - share))
    labels = rng.random(4000) < 1 / (1 + np.exp(-logits))
    told = torch.tensor((logits - 0.7) * 2.5, dtype=torch.float32)
    slope, intercept = calibrate(told, torch.tensor(labels, dtype=torch.float32))
    assert slope == pytest.approx(1 / 2.5, rel=0.1) and intercept == pytest.approx(0.7, abs=0.15)
    calibrated = torch.sigmoid(slope * told + intercept)
    assert calibrated.mean().item() == pytest.approx(labels.mean(), abs=0.005)


def test_calibration_is_finite_on_separated_data_and_never_turns_the_classes_round(capsys):
    logits, labels = torch.tensor([-3.0, -2, 2, 3]), torch.tensor([0.0, 0, 1, 1])
    slope, intercept = calibrate(logits, labels)
    assert 0 < slope < 5 and abs(intercept) < 1
    assert calibrate(logits, 1 - labels) == (1, 0)
    assert "not calibrated" in capsys.readouterr().err


def test_calibration_is_folded_into_the_saved_head(run_train, tmp_path):
    heads = []
    for flags in (("--no-calibrate",), ()):
        assert run_train("--epochs", 3, *flags) == 0
        state = torch.load(tmp_path / "model.pth")
        heads.append((state["fc.weight"], state["fc.bias"]))
    slope, intercept = read_about(tmp_path)["slope"], read_about(tmp_path)["intercept"]
    assert torch.allclose(slope * heads[0][0], heads[1][0], rtol=1e-5)
    assert torch.allclose(slope * heads[0][1] + intercept, heads[1][1], rtol=1e-5)


# ---------------------------------------------------------------- measured on the scores


@pytest.mark.parametrize(("patients", "share", "each"), [(300, 0.2, 1), (150, 0.5, 3)])
def test_the_calibration_of_calibrated_scores_is_0_and_1(patients, share, each):
    rng, runs, hits = np.random.default_rng(0), 80, {"intercept": 0, "slope": 0}
    for _ in range(runs):
        n = int(rng.binomial(patients, share))
        (table,) = simulate(rng, patients - n, n, each, odds=share / (1 - share))
        found = measure_calibration(table, {})
        for name, right in (("intercept", 0), ("slope", 1)):
            hits[name] += found[name]["low"] <= right <= found[name]["high"]
    for name, count in hits.items():
        assert count / runs >= 0.86, name


@pytest.mark.parametrize(("shift", "factor"), [(0, 1), (1, 1), (-1, 1), (0, 2), (0, 0.5)])
def test_the_slope_is_scikit_learn_s_and_shifted_or_extreme_scores_are_told(shift, factor):
    (table,) = simulate(np.random.default_rng(3), 400, 200)
    logits = factor * logit(table.probs.astype(float)) + shift
    table = table._replace(probs=expit(logits).astype(np.float32))
    found = measure_calibration(table, {})
    logits = logit(table.probs.astype(float))
    model = sklearn.linear_model.LogisticRegression(C=1e10, tol=1e-10)
    model.fit(logits[:, None], table.labels)
    assert found["slope"]["value"] == pytest.approx(model.coef_.item(), abs=2e-3)
    mean = expit(logits + found["intercept"]["value"]).mean()
    assert mean == pytest.approx(table.labels.mean(), abs=1e-4)
    assert (found["slope"]["low"] <= 1 <= found["slope"]["high"]) == (factor == 1)
    if shift:
        assert found["intercept"]["value"] == pytest.approx(-shift, abs=0.35)
        assert not found["intercept"]["low"] <= 0 <= found["intercept"]["high"]


@pytest.mark.parametrize(
    "probs",
    [[0.1, 0.2, 0.7, 0.8], [0.1, 0.5, 0.5, 0.8], [0.8, 0.7, 0.2, 0.1], [0.3] * 4],
    ids=["separated", "but for a tie", "inverted", "all alike"],
)
def test_scores_that_any_slope_or_none_fits_have_no_slope(probs, tmp_path, capsys, rescore):
    source = write_rows(tmp_path / "predictions.csv", [0, 0, 1, 1], probs)
    status, folder = rescore(source)
    assert status == 0 and "slope undefined" in capsys.readouterr().out
    slope = read_report(folder)["calibration"]["slope"]
    assert slope == {"value": None, "low": None, "high": None}


def test_the_report_shows_the_scores_with_and_without_platt_s_line(run_evaluate, remake, tmp_path):
    assert run_evaluate("--checkpoint", remake(slope=2.5, intercept=-0.4)) == 0
    rows = read_rows(tmp_path / "results/predictions.csv")
    probs = np.array([float(row["probability"]) for row in rows])
    labels = np.array([CLASSES.index(row["label"]) for row in rows])
    found = read_report(tmp_path / "results")["calibration"]
    before = expit((logit(probs) + 0.4) / 2.5)
    assert found["platt"] == {"slope": 2.5, "intercept": -0.4}
    for key, p in (("with", probs), ("without", before)):
        assert found[key]["brier"] == pytest.approx(((p - labels) ** 2).mean(), abs=1e-5)
        ece = calibration_error(labels, p.astype(np.float32))
        assert found[key]["ece"] == pytest.approx(ece, abs=1e-5)
