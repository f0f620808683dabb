"""evaluate.py as a user runs it: main([...]) on phantoms, then what it wrote and printed."""

import contextlib
import csv
import io
import json
import math
import shutil
import socket
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import torch
import torchvision
from PIL import Image, ImageOps
from scipy.special import expit, logit
from torch import nn
from torchvision.models import get_model

import common
import cxr.bootstrap
import cxr.compare
import cxr.files
import cxr.folders
import cxr.leaks
import cxr.maps
import cxr.patients
import cxr.predictions
import cxr.scores
import cxr.shortcuts
import evaluate
import train
from cxr.folders import CLASSES

NAMES = ("roc", "precision_recall", "confusion", "reliability", "scores", "worst")
PICTURES = {f"{name}.png" for name in NAMES}
TABLES = {"metrics.json", "predictions.csv", "report.html"}
PROPORTIONS = ("accuracy", "sensitivity", "specificity", "ppv", "npv")

# ---------------------------------------------------------------- fixtures and helpers


@pytest.fixture
def pictures():
    """Asked for by the tests of pictures; the others draw none, which takes most of a small run."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Few draws of the bootstrap: 2000 take seconds, and only their number differs."""
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 40)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(evaluate, "draw_pictures", lambda *_: None)
        monkeypatch.setattr(evaluate, "draw_worst", lambda *_: None)
        monkeypatch.setattr(evaluate, "PICTURES", {})


@pytest.fixture(scope="session")
def trained(split_phantoms, tmp_path_factory):
    """The folder of model.pth and model.json, trained once, and of the cache; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data-dir", split_phantoms, "--checkpoint", folder / "model.pth"]
    flags += ["--results-dir", folder, "--cache-dir", folder / "cache", "--device", "cpu"]
    flags += ["--arch", "tinynet", "--weights", "random", "--views", 2, "--lr", 0.1]
    assert train.main([str(flag) for flag in flags]) == 0
    return folder


@pytest.fixture(scope="session")
def scored(split_phantoms, trained, tmp_path_factory):
    """(results folder, screen) of one whole run, pictures included; not to be changed."""
    folder, screen = tmp_path_factory.mktemp("scored") / "results", io.StringIO()
    flags = ["--data-dir", split_phantoms, "--checkpoint", trained / "model.pth"]
    flags += ["--results-dir", folder, "--cache-dir", trained / "cache", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.setattr(cxr.bootstrap, "DRAWS", 40)
        assert evaluate.main([str(flag) for flag in flags]) == 0
    return folder, screen.getvalue()


@pytest.fixture
def run(split_phantoms, trained, tmp_path):
    """run(*flags) calls evaluate.main on the phantoms, gives the status; a later flag wins."""

    def call(*flags):
        fixed = ["--data-dir", split_phantoms, "--checkpoint", trained / "model.pth"]
        fixed += ["--results-dir", tmp_path / "results", "--cache-dir", trained / "cache"]
        try:
            return evaluate.main([str(flag) for flag in (*fixed, "--device", "cpu", *flags)])
        except SystemExit as stop:  # argparse
            return stop.code

    return call


@pytest.fixture
def remake(trained, tmp_path):
    """remake(state, **about): the trained model with other tensors or another model.json."""

    def make(state=None, **about):
        path = tmp_path / "model.pth"
        torch.save(torch.load(trained / "model.pth") | (state or {}), path)
        known = read_json(trained / "model.json") | {"sha256": cxr.files.hash_file(path)} | about
        cxr.files.write_json(path.with_suffix(".json"), known)
        return path

    return make


def keep(data, count):
    """Removes all test images but `count` of each class."""
    for name in CLASSES:
        for path in cxr.folders.list_images(data / "test" / name)[count:]:
            path.unlink()


def rescore(source, *flags):
    """evaluate.main --from source, into the folder `again` beside it; (status, that folder)."""
    folder = source.parent / "again"
    flags = ["--from", source, "--results-dir", folder, *flags]
    return evaluate.main([str(flag) for flag in flags]), folder


def read_json(path):
    content = json.loads(path.read_text())
    assert content.pop("checksum")
    return content


def read_report(folder):
    return read_json(folder / "metrics.json")


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_probs(path):
    return {row["file"]: float(row["probability"]) for row in read_rows(path)}


def write_rows(path, labels, probs, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = names or [f"test/{i}.png" for i in range(len(labels))]
    rows = zip(names, labels, map(float, probs), strict=True)
    lines = [f"{name},{CLASSES[label]},{prob!r},,\n" for name, label, prob in rows]
    path.write_text("file,label,probability,prediction,error\n" + "".join(lines))
    return path


def table_of(files, labels, probs):
    probs = np.asarray(probs, np.float32)
    patients, unlike = [cxr.patients.patient_from_name(file) for file in files], np.ones_like(probs)
    about, errors = [{} for _ in files], [""] * len(labels)
    return cxr.predictions.Table(
        list(files), np.asarray(labels), probs, errors, unlike, patients, about
    )


def plain_network(path):
    """The checkpoint in plain torch: torchvision's network with one output, in eval mode."""
    network = get_model("tinynet")
    network.fc = nn.Linear(network.fc.in_features, 1)
    network.load_state_dict(torch.load(path), strict=True)
    return network.eval()


def plain_pixels(path):
    """What the network sees of an image file, written out: the window, then ImageNet's scale."""
    grey = Image.open(path).convert("L").resize((224, 224), Image.Resampling.BILINEAR)
    pixels = np.array(ImageOps.autocontrast(grey, cutoff=2).convert("RGB"))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (common.MEAN, common.STD))
    return ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]


# ---------------------------------------------------------------- a run


def test_a_run_prints_the_reference_s_lines_first_and_writes_every_file(scored):
    folder, screen = scored
    report = read_report(folder)
    lines = [line for line in screen.splitlines() if not line.startswith(("Device: ", "Features"))]
    assert lines[0] == f"Test accuracy: {report['metrics']['accuracy']['value']:.3f}"
    assert lines[1] == f"Test F1-score: {report['metrics']['f1']['value']:.3f}"
    assert {path.name for path in folder.iterdir()} == PICTURES | TABLES
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not empty


def test_the_report_says_what_was_scored_and_with_which_model(scored, trained):
    report, about = read_report(scored[0]), read_json(trained / "model.json")
    assert report["n"] == report["patients"] == 24 and report["unreadable"] == 0
    assert report["split"] == "test" and report["positive"] == "PNEUMONIA"
    assert report["threshold"] == 0.5 and "fixed" in report["threshold_from"]
    assert report["warnings"] == [] and report["comparison"] is None
    for key in ("arch", "weights", "epoch", "seed", "sha256", "window", "slope", "intercept"):
        assert report["model"][key] == about[key], key


def test_predictions_csv_holds_every_image_and_agrees_with_the_report(scored, split_phantoms):
    rows, report = read_rows(scored[0] / "predictions.csv"), read_report(scored[0])
    paths = [path for path, _ in cxr.folders.list_split(split_phantoms, "test")]
    expected = [path.relative_to(split_phantoms).as_posix() for path in paths]
    assert [row["file"] for row in rows] == expected
    for row in rows:
        assert row["file"].split("/")[1] == row["label"] and row["error"] == ""
        assert row["prediction"] == CLASSES[float(row["probability"]) > 0.5]
        assert f"{np.float32(row['probability']):.9g}" == row["probability"]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(right / 24)


def test_the_probabilities_are_those_of_plain_torch(run, trained, data, tmp_path):
    paths = [path for path, _ in cxr.folders.list_split(data, "test")]
    for path, size in zip(paths, [(300, 224), (224, 400), (150, 131)], strict=False):
        with Image.open(path) as image:  # not square: nothing may be cropped
            image.resize(size).save(path.with_suffix(".png"))
        path.unlink()
    assert run("--data-dir", data, "--no-cache") == 0
    network, found = plain_network(trained / "model.pth"), []
    for name, prob in read_probs(tmp_path / "results" / "predictions.csv").items():
        with torch.no_grad():
            found.append(network(plain_pixels(data / name)).sigmoid().item())
        assert found[-1] == pytest.approx(prob, abs=1e-3), name
    assert len(found) == 24 and np.ptp(found) > 0.1  # else anything would be near


def test_an_image_scores_the_same_whatever_comes_with_it(run, split_phantoms, tmp_path):
    paths, table = (
        cxr.folders.list_images(split_phantoms / "test/NORMAL"),
        "results/new_predictions.csv",
    )
    assert run(*paths[:3], "--no-cache") == 0
    some = read_probs(tmp_path / table)
    assert run(*reversed(paths), "--no-cache", "--batch-size", 5) == 0
    found = read_probs(tmp_path / table)
    assert {name: found[name] for name in some} == pytest.approx(some, abs=1e-6)


def test_no_connection_is_opened_and_the_backbone_stays_as_it_was(run, trained, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    before = cxr.files.hash_file(trained / "model.pth")
    assert run("--no-cache") == 0
    assert cxr.files.hash_file(trained / "model.pth") == before
    state = torch.load(trained / "model.pth")
    for name, tensor in common.build_backbone("tinynet").network.state_dict().items():
        assert torch.equal(state[name], tensor), name  # BatchNorm's statistics are among them


# ---------------------------------------------------------------- the numbers


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


def calibration_error(labels, probs):
    edges, total = torch.linspace(0, 1, 16).numpy(), 0.0  # to the bit: some scores lie on an edge
    for low, high in zip(edges, np.append(edges[1:], np.inf), strict=True):
        inside = (probs >= low) & (probs < high)
        if inside.any():
            gap = labels[inside].mean() - probs[inside].astype(float).mean()
            total += inside.mean() * abs(gap)
    return total


def by_scikit_learn(labels, probs, threshold):
    found, m = probs > np.float32(threshold), sklearn.metrics
    return {
        "accuracy": m.accuracy_score(labels, found),
        "f1": m.f1_score(labels, found, zero_division=0),
        "auroc": m.roc_auc_score(labels, probs),
        "average_precision": m.average_precision_score(labels, probs),
        "sensitivity": m.recall_score(labels, found),
        "specificity": m.recall_score(labels, found, pos_label=0),
        "ppv": m.precision_score(labels, found) if found.any() else None,
        "npv": m.precision_score(labels, found, pos_label=0) if not found.all() else None,
        "brier": np.mean((probs.astype(float) - labels) ** 2),
        "ece": calibration_error(labels, probs),
    }


true_score = cxr.scores.score


def quick_score(probs, labels, threshold, names=cxr.scores.SCORES):
    """common.score of the bootstrap's draws in numpy: ten times as quick, for simulations."""
    if len(names) > 2:
        return true_score(probs, labels, threshold, names)
    order, found = np.argsort(-probs.numpy()), probs.numpy() > np.float32(threshold)
    p, y = probs.numpy()[order], labels.numpy()[order]
    last = np.append(p[1:] != p[:-1], True)  # of equal scores
    tp, n = np.cumsum(y)[last], np.arange(1, len(y) + 1)[last]
    fp, hits = n - tp, found[order] & (y == 1)
    area = (np.diff(fp, prepend=0) * (tp + np.append(0, tp[:-1]))).sum() / 2
    scores = {"f1": 2 * hits.sum() / max(1, found.sum() + tp[-1]), "auroc": area / tp[-1] / fp[-1]}
    scores["average_precision"] = (np.diff(tp, prepend=0) * tp / n).sum() / tp[-1]
    scores["brier"] = np.square(p - y).mean()
    return {name: float(scores[name]) for name in names}


def test_every_number_equals_scikit_learn_and_scipy_on_100_score_vectors(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 5)
    monkeypatch.setattr(cxr.scores, "score", quick_score)
    for case, (labels, probs, threshold) in enumerate(score_vectors()):
        files = [f"{i}.png" for i in range(len(labels))]
        metrics, counts = cxr.scores.measure_scores(table_of(files, labels, probs), threshold, 0)
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


def simulate(rng, normal, pneumonia, each=1, apart=2.09, models=1, odds=None):
    """Tables of so many patients a class with `each` images, correlation 0.75, AUROC 0.93.

    The probabilities are calibrated for these odds. Models see the same patients with other noise.
    """
    labels = np.repeat(np.repeat([0, 1], [normal, pneumonia]), each)
    person = np.repeat(rng.normal(0, 1, normal + pneumonia), each)
    shift = math.log(odds or pneumonia / normal)
    names = [f"{('IM-', 'person')[label]}{i // each:06d}-{i}.png" for i, label in enumerate(labels)]
    names = [name if name[0] == "I" else name.replace("-", "_virus_") for name in names]
    for _ in range(models):
        own = np.repeat(rng.normal(0, 1, normal + pneumonia), each)
        x = math.sqrt(0.5) * person + 0.5 * own + 0.5 * rng.normal(0, 1, len(labels))
        logits = apart * (x + apart * (labels - 0.5)) + shift
        yield table_of(names, labels, expit(logits))


DESIGNS = [(40, 40, 1), (60, 15, 1), (30, 30, 3)]  # equal classes, 1 to 4, three images a patient


def test_the_intervals_of_the_scores_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 100)
    monkeypatch.setattr(cxr.scores, "score", quick_score)
    rng, runs = np.random.default_rng(0), 40
    pooled = dict.fromkeys(("auroc", "average_precision", "f1", "brier"), 0)
    for normal, pneumonia, each in DESIGNS:
        (whole,) = simulate(rng, 1000 * normal, 1000 * pneumonia)
        truth = cxr.scores.score(torch.from_numpy(whole.probs), torch.from_numpy(whole.labels), 0.5)
        hits = dict.fromkeys(pooled, 0)
        for seed in range(runs):
            (table,) = simulate(rng, normal, pneumonia, each)
            metrics, _ = cxr.scores.measure_scores(table, 0.5, seed)
            for name in hits:
                hits[name] += metrics[name]["low"] <= truth[name] <= metrics[name]["high"]
        for name, count in hits.items():
            assert count / runs >= 0.8, (name, normal, pneumonia, each)
            pooled[name] += count / runs / len(DESIGNS)
    assert all(share <= 0.99 for share in pooled.values()), pooled
    assert min(pooled["auroc"], pooled["average_precision"]) >= 0.91, pooled
    assert min(pooled["f1"], pooled["brier"]) >= 0.87, pooled  # BCa's, of few draws


def test_the_intervals_of_paired_differences_hold_the_truth(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 60)
    rng, runs, widths, held = np.random.default_rng(1), 40, [], []
    for design in DESIGNS:
        hits = 0
        for seed in range(runs):
            here, there = simulate(rng, *design, models=2)  # as good as each other: difference 0

            def differences(rows, pair=(here, there)):
                labels = pair[0].labels[rows] == 1
                ranks = scipy.stats.rankdata([table.probs[rows] for table in pair], axis=1)
                sums = ranks[:, labels].mean(1) / (~labels).sum()
                return sums[:1] - sums[1:]

            (found,) = cxr.bootstrap.paired_differences(here, differences, seed)
            hits += found["low"] <= 0 <= found["high"]
            widths.append(found["high"] - found["low"])
        held.append(hits / runs)
    assert min(held) >= 0.88 and 0.92 <= np.mean(held) < 1 and np.mean(widths) < 0.25


def test_the_same_seed_draws_the_same_interval_and_images_of_a_patient_widen_it(tmp_path):
    (table,) = simulate(np.random.default_rng(0), 15, 15, each=4)
    alone = [f"{i}.png" for i in range(len(table.files))]
    found = {}
    for key, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 0)):
        names = alone if key == "d" else table.files
        source = write_rows(tmp_path / key / "p.csv", table.labels, table.probs, names)
        _, folder = rescore(source, "--seed", seed)
        found[key] = read_report(folder)["metrics"]["auroc"]
    assert found["a"] == found["b"] and found["a"] != found["c"]
    width = {key: each["high"] - each["low"] for key, each in found.items()}
    assert width["a"] > 1.3 * width["d"]


def test_the_sign_test_is_mcnemar_s_at_one_image_a_patient():
    for n, here, there in [(9, 0, 0), (9, 0, 1), (9, 1, 1), (9, 5, 0), (40, 3, 9), (900, 400, 480)]:
        right = np.zeros((2, n), bool)
        right[0, :here] = right[1, here : here + there] = True
        found = cxr.compare.paired_sign_test(*right, [f"{i}.png" for i in range(n)], 0)
        expected = scipy.stats.binomtest(here, here + there).pvalue if here + there else 1.0
        assert found["p_value"] == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_counts_patients_where_their_images_are_alike():
    rng, sets, rejected, by_image = np.random.default_rng(0), 150, 0, 0
    for seed in range(sets):
        here, there = (table.probs > 0.5 for table in simulate(rng, 40, 40, 1, models=2))
        right = [np.repeat(each == (np.arange(80) >= 40), 3) for each in (here, there)]
        odd = rng.random((2, 240)) < 0.02  # nearly alike
        right = [each ^ other for each, other in zip(right, odd, strict=True)]
        found = cxr.compare.paired_sign_test(*right, np.repeat(np.arange(80), 3), seed)
        rejected += found["p_value"] < 0.05
        only = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
        by_image += scipy.stats.binomtest(int(only[0]), int(sum(only)) or 1).pvalue < 0.05
    assert 0.01 <= rejected / sets <= 0.08 and by_image / sets > 0.12


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize(("patients", "share", "each"), [(300, 0.2, 1), (150, 0.5, 3)])
def test_the_calibration_of_calibrated_scores_is_0_and_1(patients, share, each):
    rng, runs, hits = np.random.default_rng(0), 80, {"intercept": 0, "slope": 0}
    for _ in range(runs):
        n = int(rng.binomial(patients, share))
        (table,) = simulate(rng, patients - n, n, each, odds=share / (1 - share))
        found = cxr.scores.measure_calibration(table, {})
        for name, right in (("intercept", 0), ("slope", 1)):
            hits[name] += found[name]["low"] <= right <= found[name]["high"]
    for name, count in hits.items():
        assert count / runs >= 0.86, name


@pytest.mark.parametrize(("shift", "factor"), [(0, 1), (1, 1), (-1, 1), (0, 2), (0, 0.5)])
def test_the_slope_is_scikit_learn_s_and_shifted_or_extreme_scores_are_told(shift, factor):
    (table,) = simulate(np.random.default_rng(3), 400, 200)
    logits = factor * logit(table.probs.astype(float)) + shift
    table = table._replace(probs=expit(logits).astype(np.float32))
    found = cxr.scores.measure_calibration(table, {})
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
def test_scores_that_any_slope_or_none_fits_have_no_slope(probs, tmp_path, capsys):
    source = write_rows(tmp_path / "predictions.csv", [0, 0, 1, 1], probs)
    status, folder = rescore(source)
    assert status == 0 and "slope undefined" in capsys.readouterr().out
    slope = read_report(folder)["calibration"]["slope"]
    assert slope == {"value": None, "low": None, "high": None}


def test_the_report_shows_the_scores_with_and_without_platt_s_line(run, remake, tmp_path):
    assert run("--checkpoint", remake(slope=2.5, intercept=-0.4)) == 0
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


# ---------------------------------------------------------------- one number instead of the network


def draw_set(folder, counts, brightness=(128, 128), width=(16, 16), seed=0):
    """{split: (normal, pneumonia)} PNG files of noise; brightness and width may tell the class."""
    rng = np.random.default_rng(seed)
    for split, numbers in counts.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(numbers[label]):
                mean = brightness[label] + rng.integers(-9, 9)
                pixels = mean + rng.integers(-9, 9, (16, width[label]))
                path = folder / split / name / f"{name[0]}{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def test_a_good_network_is_rarely_called_no_better_than_random_numbers(tmp_path):
    folder = draw_set(tmp_path / "noise", {"train": (32, 8), "test": (48, 12)})
    images = cxr.patients.read_split(folder, "test")["test"]
    rng, verdicts = np.random.default_rng(0), []
    for seed in range(6):
        (table,) = simulate(rng, 48, 12, apart=1.81)  # AUROC 0.90
        args = Namespace(data_dir=folder, split="test", seed=seed)
        training = cxr.leaks.list_training_xrays(folder, {})
        found = cxr.shortcuts.single_number_baselines(args, images, table, *training, 224)
        verdicts += [found["network_is"], found["numbers"]["all numbers"]["network_is"]]
    assert verdicts.count("NO BETTER") <= 1 and verdicts.count("better") >= 6


def test_a_planted_number_is_told_with_its_difference(run, tmp_path, capsys):
    folder = draw_set(tmp_path / "set", {"train": (12, 12), "test": (10, 10)}, brightness=(90, 160))
    assert run("--data-dir", folder) == 0
    report, screen = read_report(tmp_path / "results"), capsys.readouterr().out
    found, auroc = report["shortcut"], report["metrics"]["auroc"]["value"]
    assert found["number"] == "mean" and found["auroc"] == 1 and found["fitted_on"] == 24
    assert found["numbers"]["all numbers"]["auroc"] > 0.95
    for each in found["numbers"].values():
        difference = each["difference"]
        assert difference["value"] == pytest.approx(auroc - each["auroc"], abs=1e-6)
        assert difference["low"] <= difference["value"] <= difference["high"]
        chance = "better" if difference["low"] > 0 else "better, but within chance"
        assert each["network_is"] == (chance if difference["value"] > 0 else "NO BETTER")
    assert "mean         AUROC 1.000" in screen and "NO BETTER" in screen


def test_the_number_and_its_direction_are_chosen_without_the_test_images(run, tmp_path):
    folder = draw_set(tmp_path / "set", {"train": (9, 9), "val": (3, 3)}, brightness=(90, 160))
    draw_set(folder, {"test": (8, 8)}, brightness=(160, 90), width=(16, 20), seed=1)
    assert run("--data-dir", folder) == 0
    found = read_report(tmp_path / "results")["shortcut"]
    assert found["number"] == "mean" and found["auroc"] == 0 and found["fitted_on"] == 24
    assert found["numbers"]["width"]["auroc"] == 1  # better on test, and not chosen


def test_without_training_images_there_is_a_note_and_no_number(
    run, split_phantoms, tmp_path, capsys
):
    shutil.copytree(split_phantoms / "test", tmp_path / "data/test")
    assert run("--data-dir", tmp_path / "data") == 0
    assert "none to compare with" in capsys.readouterr().out
    assert "train" in read_report(tmp_path / "results")["shortcut"]["none"]


# ---------------------------------------------------------------- threshold, subgroups, odd scores


def test_an_image_at_the_threshold_is_normal(tmp_path):
    source = write_rows(tmp_path / "predictions.csv", [0, 1, 1], [0.1, 0.7, 0.8])
    status, folder = rescore(source, "--threshold", 0.7)
    assert status == 0 and read_report(folder)["counts"] == {"tp": 1, "fp": 0, "tn": 1, "fn": 1}
    found = [row["prediction"] for row in read_rows(folder / "predictions.csv")]
    assert found == ["NORMAL", "NORMAL", "PNEUMONIA"]


def test_logits_between_0_and_1_are_not_taken_for_probabilities(run, remake, tmp_path, capsys):
    head = {"fc.weight": torch.full((1, 8), 1e-9), "fc.bias": torch.tensor([0.3])}
    assert run("--checkpoint", remake(head)) == 0
    report = read_report(tmp_path / "results")  # sigmoid(0.3) is 0.574, above 0.5
    assert report["counts"] == {"tp": 12, "fp": 12, "tn": 0, "fn": 0}
    brier = (0.5744425**2 + 0.4255575**2) / 2
    assert report["metrics"]["brier"]["value"] == pytest.approx(brier, abs=1e-6)
    assert report["metrics"]["npv"] == {"value": None, "low": None, "high": None}
    assert f"{'npv':18} undefined" in capsys.readouterr().out


def test_subgroups_and_patients_are_told_by_the_names(tmp_path):
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


def test_the_stored_threshold_holds_unless_another_is_given(run, remake, tmp_path):
    path = remake(threshold=0.3, threshold_rule="youden")
    assert run("--checkpoint", path) == 0
    report = read_report(tmp_path / "results")
    assert report["threshold"] == 0.3 and "youden on val" in report["threshold_from"]
    assert run("--checkpoint", path, "--threshold", 0.6) == 0
    again = read_report(tmp_path / "results")
    assert again["threshold"] == 0.6 and again["threshold_from"] == "--threshold"
    for each in (report, again):
        probs = np.array([*read_probs(tmp_path / "results/predictions.csv").values()], np.float32)
        assert each["counts"]["tp"] + each["counts"]["fp"] == (probs > each["threshold"]).sum()


@pytest.mark.parametrize(
    ("labels", "probs"),
    [
        ([0, 1], [0.2, 0.3]),
        ([0, 1], [0.0, 1.0]),
        ([0, 0, 1], [0.5, 0.5, 0.5]),
        ([0, 1, 1], [1.0, 0.0, 0.0]),
        ([0, 0, 0, 1, 1, 1, 1], [0.1, 0.24, 0.3, 0.61, 0.7, 0.83, 0.9]),
        ([0] * 11 + [1] * 7, [0.1] * 11 + [0.9] * 7),
    ],
    ids=["nothing positive", "0 and 1", "all alike", "all wrong", "separated", "two values"],
)
def test_pictures_of_the_smallest_and_oddest_scores_are_drawn(labels, probs, pictures, tmp_path):
    status, folder = rescore(write_rows(tmp_path / "predictions.csv", labels, probs))
    assert status == 0
    assert {path.name for path in folder.iterdir()} == TABLES | PICTURES - {"worst.png"}
    for name, each in read_report(folder)["metrics"].items():
        if each["low"] is not None:
            assert each["low"] <= each["value"] <= each["high"], name


def test_intervals_without_any_spread_are_named(tmp_path, capsys):
    (table,) = simulate(np.random.default_rng(0), 30, 7, apart=9)
    status, folder = rescore(write_rows(tmp_path / "p.csv", table.labels, table.probs, table.files))
    report = read_report(folder)
    assert status == 0 and report["metrics"]["auroc"]["value"] == pytest.approx(1)
    assert {"auroc", "average_precision"} <= set(report["without_spread"])
    assert "No interval of " in capsys.readouterr().out


def test_one_test_image_a_class_is_scored_with_pictures(run, pictures, data, tmp_path):
    keep(data, 1)
    assert run("--data-dir", data, "--cam", tmp_path / "maps") == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == TABLES | PICTURES


# ---------------------------------------------------------------- doubts about model and data


def test_training_images_among_the_test_images_are_warned_of(run, data, tmp_path, capsys):
    for name in CLASSES:
        first = cxr.folders.list_images(data / "train" / name)[0]
        shutil.copy(first, data / "test" / name / f"copy{first.suffix}")
    for _ in ("told by train/ and by model.json", "by model.json alone"):
        assert run("--data-dir", data) == 0
        warnings = [w for w in read_report(tmp_path / "results")["warnings"] if "AMONG" in w]
        assert warnings[0].startswith("2 of 26 test images WERE AMONG THE TRAINING")
        assert f"warning: {warnings[0]}" in capsys.readouterr().err
        shutil.rmtree(data / "train", ignore_errors=True)


def test_a_model_of_images_that_are_not_in_train_is_told(run, data, tmp_path):
    cxr.folders.list_images(data / "train/NORMAL")[0].unlink()
    assert run("--data-dir", data) == 0
    (warning,) = read_report(tmp_path / "results")["warnings"]
    assert warning.startswith("1 of the 64 images that the model learned from are not in train/")


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_split_is_no_test_result(split, run, tmp_path, capsys):
    assert run("--split", split) == 0
    captured, report = capsys.readouterr(), read_report(tmp_path / "results")
    assert f"{split.capitalize()} accuracy: " in captured.out and "NO TEST RESULT" in captured.err
    assert "NO TEST RESULT" in report["warnings"][0] and report["shortcut"] is None


def test_a_model_json_of_another_model_is_not_believed(run, remake, scored, tmp_path, capsys):
    known = dict(sha256="0" * 64, threshold=0.9, slope=3.0, epoch=77, images={})
    assert run("--checkpoint", remake(**known)) == 0
    report = read_report(tmp_path / "results")
    assert "DOES NOT BELONG" in report["warnings"][0]
    assert "DOES NOT BELONG" in capsys.readouterr().err
    assert report["threshold"] == 0.5 and report["calibration"]["platt"]["slope"] == 1
    assert report["model"]["epoch"] is None and report["model"]["arch"] == "tinynet"
    again, before = (read_probs(f / "predictions.csv") for f in (tmp_path / "results", scored[0]))
    assert again == before  # the window is taken from it


def test_a_bare_state_dict_is_a_resnet50_without_a_window_with_a_note(run, data, tmp_path, capsys):
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    network.fc = nn.Linear(2048, 1)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    paths = cxr.folders.list_images(data / "test/NORMAL")[:2]
    assert run(*paths, "--checkpoint", tmp_path / "bare.pth", "--no-cache") == 0
    assert "taken for a resnet50" in (err := capsys.readouterr().err) and "no window" in err
    probs = read_probs(tmp_path / "results/new_predictions.csv")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (common.MEAN, common.STD))
    network.eval()
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            expected = network((pixels[None] / 255 - mean) / std).sigmoid().item()
        assert probs[str(path)] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(label, tmp_path, capsys):
    status, folder = rescore(write_rows(tmp_path / "p.csv", [label] * 3, [0.1, 0.5, 0.9]))
    err = capsys.readouterr().err
    assert status == 2 and CLASSES[1 - label] in err and err.count("\n") == 1
    assert not [*folder.glob("*")]


def test_scores_that_are_not_finite_stop_with_status_3(run, remake, tmp_path, capsys):
    large = {"bn.weight": torch.full((8,), 1e30), "fc.weight": torch.tensor([[1e30, -1e30] * 4])}
    assert run("--checkpoint", remake(large)) == 3
    assert "not finite" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("1000 outputs", "found 1000 of (8,)"), ("another network", ""), ("text", "checkpoint")],
)
def test_a_file_that_is_no_such_checkpoint_is_refused(kind, words, run, remake, tmp_path, capsys):
    path = remake(arch="resnet18") if kind == "another network" else remake()
    if kind == "1000 outputs":
        outputs = {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
        torch.save(torch.load(path) | outputs, path)
    elif kind == "text":
        path.write_text("no checkpoint")
    assert run("--checkpoint", path) == 2
    err = capsys.readouterr().err
    assert words in err and str(path) in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nosuch.png"], "nosuch.png"),
        (["--threshold", "1.5"], "from 0 to 1"),
        (["--threshold", "nan"], "from 0 to 1"),
        (["--split", "tets"], "invalid choice"),
        (["--thresold", "0.5"], "--thresold"),
        (["--from", "nosuch.csv"], "nosuch.csv"),
        (["--compare", "nosuch.csv"], "nosuch.csv"),
        (["--checkpoint", "nosuch.pth"], "nosuch.pth"),
        (["--data-dir", "nosuch"], "nosuch"),
        (["--device", "cuda:99"], "cuda:99"),
        (["x.png", "--from", "y.csv"], "need labels"),
        (["x.png", "--compare", "y.csv"], "need labels"),
        (["--from", "y.csv", "--cam", "z"], "--cam"),
        (["--results-dir", __file__], "test_evaluate.py"),
        ([Path(__file__).parent.parent], "directly inside"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, words, run, tmp_path, capsys):
    assert run(*flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not [*(tmp_path / "results").glob("*")]


def test_unreadable_test_images_stop_and_with_skip_bad_have_rows_of_their_own(
    run, data, tmp_path, capsys
):
    bad = [cxr.folders.list_images(data / "test" / name)[0] for name in CLASSES]
    bad[0].write_bytes(bad[0].read_bytes()[:2000])
    bad[1].write_bytes(b"")
    assert run("--data-dir", data) == 2
    err = capsys.readouterr().err
    assert all(str(path) in err for path in bad) and not [*(tmp_path / "results").glob("*")]
    assert run("--data-dir", data, "--skip-bad") == 0
    report = read_report(tmp_path / "results")
    rows = read_rows(tmp_path / "results/predictions.csv")
    assert report["n"] == 22 and report["unreadable"] == 2 and len(rows) == 24
    empty = [row for row in rows if row["error"]]
    assert [Path(row["file"]).name for row in empty] == [path.name for path in bad]
    assert all(row["probability"] == row["prediction"] == "" and row["label"] for row in empty)
    status, folder = rescore(tmp_path / "results/predictions.csv")
    assert status == 0 and read_report(folder)["metrics"] == report["metrics"]


# ---------------------------------------------------------------- new images


def test_new_images_get_a_table_and_an_unreadable_one_its_error(run, data, tmp_path, capsys):
    (folder := tmp_path / "new").mkdir()
    good = cxr.folders.list_images(data / "test/PNEUMONIA")[0]
    with Image.open(good) as image:
        image.resize((500, 300)).save(folder / "large.png")
        image.resize((40, 60)).save(folder / "small.bmp")
    (folder / "bad.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("no image")
    path = tmp_path / "results/new_predictions.csv"
    assert run(good) == 0
    earlier = path.read_bytes()
    assert run(folder, good) == 2
    warning, failure = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {folder}: 1 files are not read (.txt)")
    assert failure.startswith(f"evaluate.py: {folder / 'bad.jpg'}: a web page")
    assert path.read_bytes() == earlier  # a run that fails leaves it alone
    assert run(folder, good, "--skip-bad", "--cam", "maps") == 0
    captured, rows = capsys.readouterr(), read_rows(path)
    assert list(rows[0]) == list(cxr.predictions.COLUMNS)
    names = [str(folder / name) for name in ("bad.jpg", "large.png", "small.bmp")]
    assert [row["file"] for row in rows] == [*names, str(good)]
    assert rows[0]["error"] == "a web page, not an image"
    assert rows[0]["probability"] == rows[0]["prediction"] == ""
    for row in rows[1:]:
        assert row["prediction"] == CLASSES[float(row["probability"]) > 0.5]
        assert row["label"] == row["error"] == "" and f"{row['file']} " in captured.out
    found = {path.name for path in (tmp_path / "results" / "maps").iterdir()}
    assert found == {"large.png.png", "small.bmp.png", f"{good.name}.png"}


def test_new_images_leave_the_report_alone_and_say_what_they_replace(run, data, tmp_path, capsys):
    results = tmp_path / "results"
    assert run() == 0
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    assert run(data / "test/NORMAL") == 0
    assert "in place of an earlier one" not in capsys.readouterr().out
    assert run(data / "test/PNEUMONIA") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Written: {results / 'new_predictions.csv'}, in place of an earlier one"
    assert {name: (results / name).read_bytes() for name in before} == before
    assert len(read_rows(results / "new_predictions.csv")) == 12
    assert run("--from", results / "new_predictions.csv") == 2  # new images have no labels
    assert "row 2, column label" in capsys.readouterr().err


def test_every_kind_of_file_scores_as_the_grey_picture_in_it(run, data, tmp_path):
    with Image.open(cxr.folders.list_images(data / "test/PNEUMONIA")[1]) as image:
        plain = image.convert("L")
    (folder := tmp_path / "kinds").mkdir()
    grey, exif = np.asarray(plain).astype(np.uint16), Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    Image.fromarray(grey * 100 + 5000).save(folder / "16.png")
    Image.fromarray(grey * 257).save(folder / "16.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tif")
    plain.convert("RGB").save(folder / "rgb.jpg", quality=100, subsampling=0)
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    for name in ("8.png", "8.bmp", "8.pgm"):
        plain.save(folder / name)
    for mode, name in (("RGB", "rgb.ppm"), ("RGBA", "a.png"), ("P", "p.png"), ("LA", "la.png")):
        plain.convert(mode).save(folder / name)
    assert run(folder) == 0
    probs = read_probs(tmp_path / "results/new_predictions.csv")
    assert len(probs) == 12
    for name, prob in probs.items():
        assert prob == pytest.approx(probs[str(folder / "8.png")], abs=2e-3), name


# ---------------------------------------------------------------- afterwards: --from, --compare


def test_from_equals_the_original_run_and_needs_neither_images_nor_network(
    scored, pictures, tmp_path, monkeypatch
):
    results = Path(shutil.copytree(scored[0], tmp_path / "results"))
    monkeypatch.chdir(tmp_path)  # where neither data/ nor model.pth is
    status, again = rescore(results / "predictions.csv")
    assert status == 0
    assert read_report(again) == read_report(results)
    assert {path.name for path in again.iterdir()} == TABLES | PICTURES - {"worst.png"}
    for name in {"predictions.csv"} | PICTURES - {"worst.png"}:
        assert (again / name).read_bytes() == (results / name).read_bytes(), name


def test_from_without_a_results_folder_prints_the_same_and_writes_nothing(
    scored, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--from", str(scored[0] / "predictions.csv")]) == 0
    other = "Device: ", "Features", "Written: ", "The page "
    expected = [line for line in scored[1].splitlines() if not line.startswith(other)]
    assert capsys.readouterr().out.splitlines() == expected
    assert not [*tmp_path.iterdir()]
    assert {path.name for path in scored[0].iterdir()} == TABLES | PICTURES


def test_from_with_another_threshold_computes_every_number_again(scored, tmp_path):
    results = Path(shutil.copytree(scored[0], tmp_path / "results"))
    rows = read_rows(results / "predictions.csv")
    probs = np.array([row["probability"] for row in rows], np.float32)
    labels = np.array([CLASSES.index(row["label"]) for row in rows])
    cut = float(np.sort(probs)[-6])
    status, folder = rescore(results / "predictions.csv", "--threshold", cut)
    report, expected = read_report(folder), by_scikit_learn(labels, probs, cut)
    assert status == 0 and report["threshold"] == cut and report["threshold_from"] == "--threshold"
    for name, value in expected.items():
        assert report["metrics"][name]["value"] == pytest.approx(value, abs=1e-6), name
    assert report["counts"]["tp"] + report["counts"]["fp"] == 5
    found = [row["prediction"] for row in read_rows(folder / "predictions.csv")]
    assert found.count("PNEUMONIA") == 5


def test_from_takes_the_threshold_of_the_report_beside_it(tmp_path):
    source = write_rows(tmp_path / "predictions.csv", [0, 1, 0, 1], [0.2, 0.9, 0.3, 0.4])
    _, folder = rescore(source)
    assert read_report(folder)["threshold"] == 0.5
    cxr.files.write_json(tmp_path / "metrics.json", {"threshold": 0.25})
    _, folder = rescore(source)
    assert read_report(folder)["threshold"] == 0.25
    assert read_report(folder)["threshold_from"] == f"{tmp_path / 'metrics.json'}, fixed in advance"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1, column file"),
        ("file;label;probability\na;NORMAL;0,5\n", "row 1, column file"),
        ("file,label\na,NORMAL\n", "row 1, column probability"),
        ("file,label,probability\n", "row 2, column file"),
        ("file,label,probability\na,NORMAL,0.1\nb,pneumonia,0.9\n", "row 3, column label"),
        ("file,label,probability\na,NORMAL,0.1\nb,PNEUMONIA,1.5\n", "row 3, column probability"),
        ("file,label,probability\na,NORMAL,0.1\nb,PNEUMONIA,nan\n", "row 3, column probability"),
        ("file,label,probability\na,NORMAL,\nb,PNEUMONIA,0.1\n", "row 2, column probability"),
        ("file,label,probability\na,NORMAL\n", "row 2, column probability"),
        ("file,label,probability\na,NORMAL,0.1\na,PNEUMONIA,0.4\n", "row 3, column file"),
        ("file,label,probability\n,NORMAL,0.1\n", "row 2, column file"),
        ("file,label,probability\na,NORMAL,'0.1\n\"b", "not a CSV file"),
        (b"\xff\xfe\x00", "not a CSV file"),
    ],
)
def test_a_malformed_csv_is_one_line_that_names_row_and_column(text, words, tmp_path, capsys):
    good = write_rows(tmp_path / "good.csv", [0, 1], [0.1, 0.8], ["a", "b"])
    bad = tmp_path / "p.csv"
    bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    for source, *flags in ((bad,), (good, "--compare", bad)):
        status, folder = rescore(source, *flags)
        err = capsys.readouterr().err
        assert status == 2 and words in err and str(bad) in err and err.count("\n") == 1
        assert not [*folder.glob("*")]


def test_compare_gives_the_paired_differences_whatever_the_order_of_the_rows(tmp_path, capsys):
    rng = np.random.default_rng(5)
    (here,) = simulate(rng, 40, 40, each=2)
    logits = logit(here.probs.astype(float)) + rng.normal(0, 1.5, len(here.files))
    there = here._replace(probs=expit(logits).astype(np.float32))
    labels, order = here.labels, rng.permutation(len(here.files))
    a = write_rows(tmp_path / "a/predictions.csv", labels, here.probs, here.files)
    names = [here.files[i] for i in order]
    b = write_rows(tmp_path / "b/predictions.csv", labels[order], there.probs[order], names)
    cxr.files.write_json(tmp_path / "b/metrics.json", {"threshold": 0.3})
    status, folder = rescore(a, "--compare", b)
    report, screen = read_report(folder), capsys.readouterr().out
    found = report["comparison"]
    ours = by_scikit_learn(labels, here.probs, 0.5)
    theirs = by_scikit_learn(labels, there.probs, 0.3)
    assert status == 0 and found["threshold"] == 0.3
    for name in ("accuracy", "f1", "auroc"):
        difference = found["difference"][name]
        assert difference["value"] == pytest.approx(ours[name] - theirs[name], abs=1e-6)
        assert difference["low"] < difference["value"] < difference["high"]
        assert f"{difference['value']:.3f} ({difference['low']:.3f}" in screen
    alone = [m["auroc"]["high"] - m["auroc"]["low"] for m in (report["metrics"], found["other"])]
    width = found["difference"]["auroc"]["high"] - found["difference"]["auroc"]["low"]
    assert width < sum(alone) / math.sqrt(2)  # pairing narrows it
    right = [(here.probs > 0.5) == labels, (there.probs > np.float32(0.3)) == labels]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert [found["right_only_here"], found["right_only_there"]] == only
    assert found["p_value"] == cxr.compare.paired_sign_test(*right, here.clusters(), 0)["p_value"]
    assert f"{only[0]} images are right only here, {only[1]} only there" in screen


def test_compare_works_with_a_fresh_run(run, scored, tmp_path):
    assert run("--compare", scored[0] / "predictions.csv") == 0
    found = read_report(tmp_path / "results")["comparison"]
    assert found["difference"]["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["p_value"] == 1 and found["model"]["arch"] == "tinynet"


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (["a", "b", "d"], [0, 1, 1], "2 are in one only, as c"),
        (["a", "b"], [0, 1], "1 are in one only, as c"),
        (["a", "b", "c"], [0, 1, 0], "c has another label"),
    ],
)
def test_compare_refuses_other_images_or_labels(names, labels, words, tmp_path, capsys):
    a = write_rows(tmp_path / "a.csv", [0, 1, 1], [0.1, 0.8, 0.9], ["a", "b", "c"])
    b = write_rows(tmp_path / "b.csv", labels, [0.5] * len(labels), names)
    status, folder = rescore(a, "--compare", b)
    assert status == 2 and words in capsys.readouterr().err and not [*folder.glob("*")]


# ---------------------------------------------------------------- class activation maps


@pytest.mark.parametrize("arch", ["tinynet", "resnet18", "densenet121"])
def test_a_map_s_mean_over_the_positions_is_the_logit(arch):
    backbone = common.build_backbone(arch)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(backbone.width, 1).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    head.bias.fill_(0.7)
    model = evaluate.Model(backbone, torch.device("cpu"), head, {}, [])
    pixels = torch.randint(256, (2, 1, 96, 96), dtype=torch.uint8, generator=generator)
    maps = cxr.maps.class_maps(model, pixels)
    with torch.no_grad():
        features = backbone.network(common.NORMALIZE(pixels))
        logits = head(features).squeeze(1)
    scale = maps.abs().max().item()
    assert maps.ndim == 3 and maps.shape[1] > 1 and maps.std() > 1e-3 * scale
    assert torch.allclose(maps.mean((1, 2)), logits, rtol=1e-3, atol=1e-3 * scale)


def test_cam_writes_an_overlay_of_every_image_orange_for_pneumonia_and_blue_for_normal(
    run, trained, data, tmp_path
):
    keep(data, 3)
    assert run("--data-dir", data, "--cam", tmp_path / "maps") == 0
    paths = [path for path, _ in cxr.folders.list_split(data, "test")]
    found = {path.relative_to(tmp_path / "maps") for path in (tmp_path / "maps").rglob("*.*")}
    assert found == {Path(path.parent.name, f"{path.name}.png") for path in paths}
    network, seen = plain_network(trained / "model.pth"), {1: 0, -1: 0}
    for path in paths:
        with torch.no_grad():  # the map, written out
            last = network.relu(network.bn(network.conv(plain_pixels(path))))
            heat = (last * network.fc.weight.view(1, -1, 1, 1)).sum(1, keepdim=True)
            heat = nn.functional.interpolate(heat + network.fc.bias, (224, 224), mode="bilinear")
        with Image.open(tmp_path / "maps" / path.parent.name / f"{path.name}.png") as picture:
            assert picture.size == (448, 488) and picture.mode == "RGB"
            assert np.asarray(picture)[:40].min() < 100  # the caption
            map_ = picture.crop((0, 40, 448, 488)).resize((224, 224), Image.Resampling.BOX)
            red, _, blue = np.asarray(map_).astype(int).transpose(2, 0, 1)
        for sign in seen:
            strong = (sign * heat > 0.4 * heat.abs().max())[0, 0].numpy()
            assert (sign * (red - blue)[strong] > 20).all()
            seen[sign] += strong.sum()
    assert min(seen.values()) > 100  # both colours were there


def test_overlays_of_namesakes_do_not_overwrite_each_other(run, split_phantoms, tmp_path):
    for i, path in enumerate(cxr.folders.list_images(split_phantoms / "test/NORMAL")[:3]):
        (tmp_path / str(i)).mkdir()
        shutil.copy(path, tmp_path / str(i) / "scan.jpeg")
    assert run(*(tmp_path / str(i) for i in range(3)), "--cam", tmp_path / "maps") == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "maps").iterdir()}
    assert found.keys() == {f"scan.jpeg{number}.png" for number in ("", "-2", "-3")}
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("place", ["test/NORMAL", "test", "train", "new"])
def test_overlays_are_refused_among_images(place, run, data, tmp_path, capsys):
    keep(data, 2)
    shutil.copytree(data / "test/NORMAL", data / "new")
    before = sorted(path for path in data.rglob("*"))
    images = [data / "new"] if place == "new" else []
    assert run(*images, "--data-dir", data, "--cam", data / place) == 2
    err = capsys.readouterr().err
    assert f"--cam {data / place}" in err and err.count("\n") == 1
    assert sorted(path for path in data.rglob("*")) == before
    assert not [*(tmp_path / "results").glob("*")]


def test_a_network_without_maps_is_refused_by_name_with_cam_and_draws_worst_without_them(
    run, pictures, data, tmp_path, capsys
):
    keep(data, 3)
    torch.manual_seed(0)
    network = get_model("mobilenet_v3_small", num_classes=1)  # pooling, Linear, Linear
    torch.save(network.state_dict(), path := tmp_path / "model.pth")
    about = {"arch": "mobilenet_v3_small", "window": 2.0, "sha256": cxr.files.hash_file(path)}
    cxr.files.write_json(path.with_suffix(".json"), about)
    assert run("--checkpoint", path, "--cam", tmp_path / "maps") == 2
    err = capsys.readouterr().err
    assert "mobilenet_v3_small" in err and "no maps" in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]
    assert run("--data-dir", data, "--checkpoint", path) == 0
    with Image.open(tmp_path / "results/worst.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**20)}
    assert len(colours) > 50 and all(max(each) - min(each) < 3 for each in colours)  # grey alone
