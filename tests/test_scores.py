"""cxr/scores.py: every number against scikit-learn, and subgroups."""

import csv
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from helpers import TINY, read_report, read_rows, with_table, write_rows
from scipy.special import expit
from simulated import by_scikit_learn, quick_score, table_of

import cxr.bootstrap
import cxr.scores
import evaluate
import train
from cxr.files import read_json
from cxr.folders import CLASSES
from cxr.scores import measure_scores

PROPORTIONS = ("accuracy", "sensitivity", "specificity", "ppv", "npv")


def score_vectors():
    """100 (labels, float32 probs, threshold): with ties, at the ends, all equal, perfect, wrong."""
    rng = np.random.default_rng(0)
    for i in range(100):
        n = int(rng.choice((2, 3, 10, 30, 60)))
        labels = rng.permutation(np.append([0, 1], rng.integers(0, 2, n - 2)))
        probs = expit(rng.normal(labels - 0.5, rng.uniform(0.3, 3), n) * rng.uniform(0.5, 20))
        kind, threshold = i % 10, float(rng.choice((0.0, 0.2, 0.5, 0.5, 0.9, 1.0)))
        if kind in (1, 2):
            probs = probs.round(kind)  # many ties, some at the threshold
        elif kind == 3:
            probs = np.full(n, rng.choice((0.0, 0.5, 1.0)))
        elif kind in (4, 5):
            probs = np.abs(labels - (kind == 5) * 1.0)
        elif kind == 6:
            probs, threshold = probs.round(1), 0.7
        elif kind == 7:
            probs = 0.4 + 0.1 * probs  # nothing above 0.5
        yield labels, probs.astype(np.float32), threshold


def test_every_number_equals_scikit_learn_and_scipy_on_100_score_vectors(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 5)
    monkeypatch.setattr(cxr.scores, "score", quick_score)
    for case, (labels, probs, threshold) in enumerate(score_vectors()):
        files = [f"{i}.png" for i in range(len(labels))]
        metrics, counts = measure_scores(table_of(files, labels, probs), threshold, 0)
        expected = by_scikit_learn(labels, probs, threshold)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            near = None if value is None else pytest.approx(value, abs=1e-6)
            assert metrics[name]["value"] == near, (case, name)
        tensors = torch.from_numpy(probs), torch.from_numpy(labels)
        for names in (("f1", "auroc"), ("average_precision", "brier")):  # of the bootstrap
            drawn = quick_score(*tensors, threshold, names)
            assert drawn == pytest.approx({name: expected[name] for name in names}, abs=1e-6), case
        found = probs > np.float32(threshold)
        tn, fp, fn, tp = sklearn.metrics.confusion_matrix(labels, found, labels=[0, 1]).ravel()
        assert counts == {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
        shares = (tp + tn, len(labels)), (tp, tp + fn), (tn, tn + fp), (tp, tp + fp), (tn, tn + fn)
        for name, (k, n) in zip(PROPORTIONS, shares, strict=True):
            limits = (None, None)
            if n:
                limits = scipy.stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
                limits = pytest.approx(tuple(limits), abs=1e-9)
            assert (metrics[name]["low"], metrics[name]["high"]) == limits, (case, name)


def test_an_image_at_the_threshold_is_normal(tmp_path, rescore):
    source = write_rows(tmp_path / "predictions.csv", [0, 1, 1], [0.1, 0.7, 0.8])
    status, folder = rescore(source, "--threshold", 0.7)
    assert status == 0 and read_report(folder)["counts"] == {"tp": 1, "fp": 0, "tn": 1, "fn": 1}
    found = [row["prediction"] for row in read_rows(folder / "predictions.csv")]
    assert found == ["NORMAL", "NORMAL", "PNEUMONIA"]


def test_logits_between_0_and_1_are_not_taken_for_probabilities(
    run_evaluate, remake, tmp_path, capsys
):
    head = {"fc.weight": torch.full((1, 8), 1e-9), "fc.bias": torch.tensor([0.3])}
    assert run_evaluate("--checkpoint", remake(head)) == 0
    report = read_report(tmp_path / "results")  # sigmoid(0.3) is 0.574, above 0.5
    assert report["counts"] == {"tp": 12, "fp": 12, "tn": 0, "fn": 0}
    brier = (0.5744425**2 + 0.4255575**2) / 2
    assert report["metrics"]["brier"]["value"] == pytest.approx(brier, abs=1e-6)
    assert report["metrics"]["npv"] == {"value": None, "low": None, "high": None}
    assert f"{'npv':18} undefined" in capsys.readouterr().out


def test_subgroups_and_patients_are_told_by_the_names(tmp_path, rescore):
    names = ["person1_bacteria_1.jpeg", "person2_virus_3.jpeg", "person3_virus_4.jpeg", "x.jpeg"]
    names += ["IM-0001-0001.jpeg", "NORMAL2-IM-0002-0001.jpeg"]
    names += ["NORMAL2-IM-0003-0001.jpeg", "NORMAL2-IM-0003-0001-0002.jpeg"]
    labels, probs = [1, 1, 1, 0, 0, 0, 0, 0], [0.9, 0.9, 0.1, 0.9, 0.2, 0.8, 0.1, 0.1]
    status, folder = rescore(write_rows(tmp_path / "predictions.csv", labels, probs, names))
    report = read_report(folder)
    groups = report["subgroups"].items()
    found = {name: (each["metric"], each["n"], round(each["value"], 3)) for name, each in groups}
    expected = {"bacteria": ("sensitivity", 1, 1.0), "virus": ("sensitivity", 2, 0.5)}
    expected |= {"IM": ("specificity", 1, 1.0), "NORMAL2-IM": ("specificity", 3, 0.667)}
    assert status == 0 and found == expected
    assert report["patients"] == 7 and report["names_without_patient"] == 1


def test_subgroups_of_a_table_are_scored_and_survive_in_predictions_csv(data, tmp_path, flags):
    images = sorted(path.name for path in data.glob("test/*/*"))
    rows = [f"{n},P{i // 2},{'FM'[i % 2]},{i},x" for i, n in enumerate(images)]
    with_table(data, "\n".join(["file_name,patient_id,sex,age,site", *rows]))
    assert train.main(flags(data, *TINY, "--lr", "0.1")) == evaluate.main(flags(data)) == 0
    results = tmp_path / "results"
    report = read_json(results / "metrics.json")
    assert report["patients"] == 12
    groups = {k: v for k, v in report["subgroups"].items() if v["group"].startswith("sex")}
    names = ("sensitivity", "specificity", "auroc")
    assert set(groups) == {f"sex {sex}, {name}" for sex in "FM" for name in names}
    with open(results / "predictions.csv", newline="") as file:
        women = [row for row in csv.DictReader(file) if row["sex"] == "F"]
    right = [row["prediction"] == row["label"] for row in women if row["label"] == CLASSES[1]]
    found = groups["sex F, sensitivity"]
    assert found["n"] == len(right) and found["value"] == pytest.approx(np.mean(right))
    assert found["low"] < found["value"] + 1e-9 and groups["sex M, auroc"]["n"] == 12
    source, again = str(results / "predictions.csv"), str(tmp_path / "again")
    assert evaluate.main(["--from", source, "--results-dir", again]) == 0
    rescored = read_json(Path(again, "metrics.json"))
    assert rescored["subgroups"] == report["subgroups"] and rescored["patients"] == 12


def test_classes_that_are_swapped_are_suspected(tmp_path, capsys):
    rows = [f"{i},{CLASSES[i % 2]},{(0.8, 0.3)[i % 2] + i / 1000}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["file,label,probability", *rows]))
    assert evaluate.main(["--from", str(tmp_path / "a.csv")]) == 0
    assert "far below chance: are the class folders swapped?" in capsys.readouterr().err
