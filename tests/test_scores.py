"""cxr/scores.py: every score against scikit-learn, and subgroups."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from helpers import read_report, read_rows, with_table, write_rows
from scipy.special import expit
from simulated import by_scikit_learn, table_of

import cxr.bootstrap
from cxr.folders import CLASSES
from cxr.scores import (
    aurocs,
    below_chance,
    count_outcomes,
    measure_scores,
    score,
    scores_of_sums,
    summed_columns,
)
from cxr.weighted import weighted_auroc, weighted_average_precision


def score_vectors():
    """100 (labels, float32 probs, threshold): with ties, at the ends, all equal, perfect, wrong."""
    rng = np.random.default_rng(0)
    for i in range(100):
        n = int(rng.choice((2, 3, 10, 30, 60)))
        labels = rng.permutation(np.append([0, 1], rng.integers(0, 2, n - 2)))
        probs = expit(rng.normal(labels - 0.5, rng.uniform(0.3, 3), n) * rng.uniform(0.5, 20))
        kinds = [probs, labels, 1 - labels, np.full(n, rng.choice((0.0, 0.5, 1.0)))]
        kinds += [0.4 + 0.1 * probs]  # nothing above 0.5
        kinds += [probs.round(2), probs.round(1), probs.round(1)]  # ties, some at the threshold
        threshold = 0.7 if i % 8 == 7 else float(rng.choice((0.0, 0.2, 0.5, 0.5, 0.9, 1.0)))
        yield labels, kinds[i % 8].astype(np.float32), threshold


@pytest.mark.parametrize(("labels", "probs", "threshold"), [*score_vectors()])
def test_scores_and_intervals_equal_scikit_learn_and_scipy(labels, probs, threshold, monkeypatch):
    tensors = torch.from_numpy(probs), torch.from_numpy(labels)
    expected = by_scikit_learn(labels, probs, threshold)
    assert score(*tensors, threshold) == pytest.approx(expected, abs=1e-6)
    assert aurocs(probs[None], labels)[0] == pytest.approx(expected["auroc"], abs=1e-9)
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 5)
    table = table_of([f"{i}.png" for i in range(len(labels))], labels, probs)
    metrics = measure_scores(table, threshold, 0)
    values = {name: metric["value"] for name, metric in metrics.items()}
    assert values == pytest.approx(expected, abs=1e-6)
    is_positive = probs > np.float32(threshold)
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(labels, is_positive, labels=[0, 1]).ravel()
    assert count_outcomes(table, threshold) == {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
    shares = {"accuracy": (tp + tn, len(labels)), "sensitivity": (tp, tp + fn)}
    shares |= {"specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
    for name, (k, n) in shares.items():
        limits = None, None
        if n:
            limits = scipy.stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
        assert (metrics[name]["low"], metrics[name]["high"]) == pytest.approx(limits, abs=1e-9)


@pytest.mark.parametrize(("labels", "probs", "threshold"), [*score_vectors()])
def test_scores_with_weights_equal_scikit_learn(labels, probs, threshold):
    weights = np.random.default_rng(1).integers(0, 4, (5, len(labels))).astype(float)
    weights[:, [labels.argmin(), labels.argmax()]] += 1  # both classes are in each sample
    found = scores_of_sums(weights @ summed_columns(probs, labels, threshold))
    found["auroc"] = weighted_auroc(probs, labels, weights)
    found["average_precision"] = weighted_average_precision(probs, labels, weights)
    for row, counts in enumerate(weights.astype(int)):
        repeated = np.repeat(np.arange(len(labels)), counts)
        expected = by_scikit_learn(labels[repeated], probs[repeated], threshold)
        for name, values in found.items():
            assert values[row] == pytest.approx(expected[name], abs=1e-9), name


def test_logits_are_never_taken_for_probs(run_evaluate, remake, tmp_path, capsys):
    head = {"fc.weight": torch.full((1, 8), 1e-9), "fc.bias": torch.tensor([0.3])}
    assert run_evaluate("--checkpoint", remake(head)) == 0
    report = read_report(tmp_path / "results")  # sigmoid(0.3) is 0.574, above 0.5
    assert report["counts"] == {"tp": 12, "fp": 12, "tn": 0, "fn": 0}
    brier = (0.5744425**2 + 0.4255575**2) / 2
    assert report["metrics"]["brier"]["value"] == pytest.approx(brier, abs=1e-6)
    assert report["metrics"]["npv"] == {"value": None, "low": None, "high": None}
    assert f"{'npv':18} undefined" in capsys.readouterr().out


def test_file_names_of_the_reference_data_give_etiologies_and_patients(tmp_path, rescore):
    names = ["person1_bacteria_1.jpeg", "person2_virus_3.jpeg", "person3_virus_4.jpeg", "x.jpeg"]
    names += ["IM-0001-0001.jpeg", "NORMAL2-IM-0002-0001.jpeg"]
    names += ["NORMAL2-IM-0003-0001.jpeg", "NORMAL2-IM-0003-0001-0002.jpeg"]
    labels, probs = [1, 1, 1, 0, 0, 0, 0, 0], [0.9, 0.9, 0.1, 0.9, 0.2, 0.8, 0.1, 0.1]
    status, folder = rescore(write_rows(tmp_path / "predictions.csv", labels, probs, names))
    report = read_report(folder)
    subgroups = {
        name: (row["metric"], row["n"], round(row["value"], 3))
        for name, row in report["subgroups"].items()
    }
    assert status == 0 and subgroups == {
        "etiology bacteria, sensitivity": ("sensitivity", 1, 1.0),
        "etiology virus, sensitivity": ("sensitivity", 2, 0.5),
    }
    assert "etiology" not in read_rows(folder / "predictions.csv")[0]
    assert report["patients"] == 7 and report["names_without_patient"] == 1


def test_columns_of_metadata_csv_give_subgroups(run_evaluate, rescore, data, tmp_path):
    images = sorted(path.name for path in data.glob("test/*/*"))
    rows = [f"{n},P{i // 2},{'FM'[i % 2]},{i},x" for i, n in enumerate(images)]
    with_table(data, "\n".join(["file_name,patient_id,sex,age,site", *rows]))
    assert run_evaluate("--data-dir", data) == 0
    source = tmp_path / "results" / "predictions.csv"
    report = read_report(source.parent)
    by_sex = {k: v for k, v in report["subgroups"].items() if v["group"].startswith("sex")}
    metrics = ("sensitivity", "specificity", "auroc")
    assert set(by_sex) == {f"sex {sex}, {metric}" for sex in "FM" for metric in metrics}
    women = [row for row in read_rows(source) if row["sex"] == "F"]
    correct = [row["prediction"] == row["label"] for row in women if row["label"] == CLASSES[1]]
    n, value, low = (by_sex["sex F, sensitivity"][key] for key in ("n", "value", "low"))
    assert n == len(correct) and value == pytest.approx(np.mean(correct))
    assert low < value + 1e-9
    assert by_sex["sex M, auroc"]["n"] == report["patients"] == 12
    status, folder = rescore(source)
    again = read_report(folder)
    assert status == 0 and again["subgroups"] == report["subgroups"] and again["patients"] == 12


@pytest.mark.parametrize(("n", "is_below"), [(1, False), (4, False), (9, False), (10, True)])
def test_few_patients_below_chance_are_no_sign_of_swapped_classes(
    n, is_below, tmp_path, capsys, rescore
):
    probs = [0.6 + i / 100 for i in range(n)] + [0.4 - i / 100 for i in range(n)]
    status, _ = rescore(write_rows(tmp_path / "a.csv", [0] * n + [1] * n, probs))
    err = capsys.readouterr().err
    assert status == 0 and ("below chance" in err) == is_below == ("few patients" not in err)


def test_an_interval_below_chance_is_reported_also_for_few_patients():
    auroc, n_patients = {"value": 0.1, "low": 0.01, "high": 0.4}, {"NORMAL": 9, "PNEUMONIA": 9}
    (warning,) = below_chance(auroc, n_patients)
    assert "the AUROC is 0.100 (0.010 to 0.400), below chance (0.5)" in warning
    assert below_chance(auroc | {"high": 0.51}, n_patients) == []


def test_an_auroc_far_below_chance_causes_a_warning_of_swapped_classes(tmp_path, capsys, rescore):
    labels = np.arange(40) % 2
    status, _ = rescore(write_rows(tmp_path / "a.csv", labels, 0.8 - labels / 2))
    err = capsys.readouterr().err
    assert status == 0 and "below chance (0.5). Look at images of each class" in err
    assert "are swapped" in err
