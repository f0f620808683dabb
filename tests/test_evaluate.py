"""evaluate.py as a user runs it: main([...]) on reference images, then the written files are read."""

import csv
import json
import math
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

import common
import evaluate

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {"roc.png", "precision_recall.png", "confusion.png", "reliability.png", "scores.png", "worst.png"}
PROPORTIONS = ("accuracy", "sensitivity", "specificity", "ppv", "npv")


# ---------------------------------------------------------------- fixtures


@pytest.fixture
def pictures():
    """Asked for by the tests that look at pictures; the others draw none, which takes most of a small run's time."""


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(evaluate, "PICTURES", {})
        monkeypatch.setattr(evaluate, "draw_worst", lambda *_: None)


@pytest.fixture(scope="session")
def data(xrays_source, tmp_path_factory):
    """A data folder of 12 train and 10 test images a class; not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "data"
    for split, count in (("train", 12), ("test", 10)):
        for name in common.CLASSES:
            paths = sorted((xrays_source / split / name).iterdir())
            (folder / split / name).mkdir(parents=True)
            for path in paths[:: len(paths) // count][:count]:
                shutil.copy(path, folder / split / name)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def save_checkpoint(path, network, head, weight, bias, **about):
    """model.pth and, with about, model.json as train.py writes them."""
    state = network.state_dict()
    state[f"{head}.weight"], state[f"{head}.bias"] = torch.as_tensor(weight).float()[None], torch.tensor([float(bias)])
    torch.save(state, path)
    if about:
        known = {"classes": list(common.CLASSES), "weights": "random", "epoch": 7, "seed": 0, "date": "2025-01-31"}
        fixed = {"threshold": 0.5, "threshold_rule": "fixed", "temperature": 1.0, "images": {"train": {}, "val": {}}}
        about = known | fixed | {"sha256": common.hash_file(path)} | about
        common.write_json(path.with_suffix(".json"), about)
    return path


@pytest.fixture(scope="session")
def trained(data, cache):
    """(network, head's name, weight, bias): a small random network, with a head that tells the classes apart."""
    network, head, width, _ = common.build_network("resnet18")
    images = common.read_split(data, "train")["train"]
    args = Namespace(cache_dir=cache, no_cache=False, workers=0, batch_size=32)
    device, dtype = common.pick_device("cpu")
    features, _ = common.extract_features(network, width, images, [1] * len(images), args, device, dtype)
    features, labels = features[:, 0], torch.tensor([image.label for image in images])
    gap = features[labels == 1].mean(0) - features[labels == 0].mean(0)
    weight = gap / features.var(0).clamp(min=1e-6)
    scores = features @ weight
    weight, scores = 1.2 * weight / scores.std(), 1.2 * scores / scores.std()
    return network, head, weight, -scores.mean()


@pytest.fixture
def checkpoint(trained, tmp_path):
    return save_checkpoint(tmp_path / "model.pth", *trained, arch="resnet18")


@pytest.fixture
def run(data, cache, checkpoint, tmp_path):
    """run(*flags) calls evaluate.main on the small folder; returns the exit status. A later flag overrides."""

    def call(*flags):
        fixed = ("--data-dir", data, "--checkpoint", checkpoint, "--results-dir", tmp_path / "results")
        fixed += ("--cache-dir", cache, "--device", "cpu")
        return evaluate.main([str(flag) for flag in (*fixed, *flags)])

    return call


def read_report(folder):
    return json.loads((folder / "metrics.json").read_text())


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, labels, probs, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = names or [f"test/{i}.png" for i in range(len(labels))]
    lines = [
        f"{name},{common.CLASSES[y]},{p!r},,\n" for name, y, p in zip(names, labels, map(float, probs), strict=True)
    ]
    path.write_text("file,label,probability,prediction,error\n" + "".join(lines))
    return path


# ---------------------------------------------------------------- a run


def test_a_run_prints_the_reference_s_lines_first_and_writes_every_file(run, pictures, data, tmp_path, capsys):
    assert run() == 0
    report, out = read_report(tmp_path / "results"), capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith(("Device: ", "Features: "))]
    assert lines[0] == f"Test accuracy: {report['metrics']['accuracy']['value']:.3f}"
    assert lines[1] == f"Test F1-score: {report['metrics']['f1']['value']:.3f}"
    assert {path.name for path in (tmp_path / "results").iterdir()} == PICTURES | {"metrics.json", "predictions.csv"}
    for name in PICTURES:
        with Image.open(tmp_path / "results" / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not an empty sheet
    assert report["n"] == 20 and report["split"] == "test" and report["positive"] == "PNEUMONIA"
    assert report["threshold"] == 0.5 and "fixed" in report["threshold_from"] and report["warnings"] == []
    assert report["model"]["arch"] == "resnet18" and report["model"]["epoch"] == 7
    assert report["model"]["sha256"] == common.hash_file(tmp_path / "model.pth")
    rows = read_rows(tmp_path / "results" / "predictions.csv")
    assert [row["file"] for row in rows] == [p.relative_to(data).as_posix() for p, _ in common.list_split(data, "test")]
    for row in rows:
        assert row["file"].split("/")[1] == row["label"] and row["error"] == ""
        assert row["prediction"] == common.CLASSES[float(row["probability"]) > 0.5]
        assert f"{np.float32(row['probability']):.9g}" == row["probability"]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(right / 20)


def test_the_probabilities_are_those_of_the_plain_network(run, trained, data, tmp_path):
    import torchvision

    assert run("--no-cache") == 0
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Linear(512, 1)
    network.load_state_dict(torch.load(tmp_path / "model.pth"))
    network.eval()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (common.MEAN, common.STD))
    for row in read_rows(tmp_path / "results" / "predictions.csv")[::5]:
        pixels = np.array(Image.open(data / row["file"]).convert("RGB"))
        x = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            assert network(x[None]).sigmoid().item() == pytest.approx(float(row["probability"]), abs=0.02)


def test_an_image_scores_the_same_whatever_comes_with_it(run, data, tmp_path):
    paths = [path for path, _ in common.list_split(data, "test")]
    assert run(*paths[:7]) == 0
    some = [row["probability"] for row in read_rows(tmp_path / "results" / "predictions.csv")]
    assert run(*reversed(paths)) == 0
    assert [row["probability"] for row in read_rows(tmp_path / "results" / "predictions.csv")][::-1][:7] == some


def test_nothing_opens_a_network_connection(run, pictures, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert run("--no-cache") == 0


def test_help_and_typos_import_neither_torch_nor_numpy():
    code = "import sys, evaluate; evaluate.parse_args([]); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- the numbers


def score_vectors():
    """100 (labels, probs float32, threshold): random, with ties, at the ends, all equal, perfect, inverted."""
    rng = np.random.default_rng(0)
    for i in range(100):
        n = int(rng.choice((2, 3, 10, 100, 300)))
        labels = rng.permutation(np.append([0, 1], rng.integers(0, 2, n - 2)))
        probs = 1 / (1 + np.exp(-rng.normal(labels - 0.5, rng.uniform(0.3, 3), n) * rng.uniform(0.5, 20)))
        kind, threshold = i % 10, float(rng.choice((0.0, 0.2, 0.5, 0.5, 0.9, 1.0)))
        if kind in (1, 2):
            probs = probs.round(kind)  # many ties, some at the threshold
        elif kind == 3:
            probs = np.full(n, rng.choice((0.0, 0.5, 1.0)))
        elif kind == 4:
            probs = labels + 0.0
        elif kind == 5:
            probs = 1.0 - labels
        elif kind == 6:
            probs, threshold = probs.round(1), 0.7
        elif kind == 7:
            probs = 0.4 + 0.1 * probs  # nothing above 0.5
        yield labels, probs.astype(np.float32), threshold


def calibration_error(labels, probs):
    edges, total = torch.linspace(0, 1, 16).numpy(), 0.0  # to the last bit: some scores lie on an edge
    for low, high in zip(edges, np.append(edges[1:], np.inf), strict=True):
        inside = (probs >= low) & (probs < high)
        if inside.any():
            total += inside.mean() * abs(labels[inside].mean() - probs[inside].astype(float).mean())
    return total


def by_scikit_learn(labels, probs, threshold, weight=None):
    found, m = probs > np.float32(threshold), sklearn.metrics
    settings = dict(zero_division=0, sample_weight=weight)
    expected = {
        "accuracy": m.accuracy_score(labels, found, sample_weight=weight),
        "f1": m.f1_score(labels, found, **settings),
        "auroc": m.roc_auc_score(labels, probs, sample_weight=weight),
        "average_precision": m.average_precision_score(labels, probs, sample_weight=weight),
        "sensitivity": m.recall_score(labels, found, **settings),
        "specificity": m.recall_score(labels, found, pos_label=0, **settings),
        "ppv": m.precision_score(labels, found, **settings) if found.any() else None,
        "npv": m.precision_score(labels, found, pos_label=0, **settings) if not found.all() else None,
        "brier": np.average((probs.astype(float) - labels) ** 2, weights=weight),
    }
    return expected if weight is not None else expected | {"ece": calibration_error(labels, probs)}


def test_every_number_equals_scikit_learn_and_scipy_on_100_score_vectors(monkeypatch):
    monkeypatch.setattr(evaluate, "DRAWS", 100)
    for case, (labels, probs, threshold) in enumerate(score_vectors()):
        files = [f"{i}.png" for i in range(len(labels))]
        metrics, counts, _ = evaluate.measure(files, labels, probs, threshold, 0)
        expected = by_scikit_learn(labels, probs, threshold)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name]["value"] == (None if value is None else pytest.approx(value, abs=1e-6)), (case, name)
        found = probs > np.float32(threshold)
        tn, fp, fn, tp = sklearn.metrics.confusion_matrix(labels, found, labels=[0, 1]).ravel()
        assert counts == {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
        shares = ((tp + tn, len(labels)), (tp, tp + fn), (tn, tn + fp), (tp, tp + fp), (tn, tn + fn))
        for name, (k, n) in zip(PROPORTIONS, shares, strict=True):
            if n:
                low, high = scipy.stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
                assert (metrics[name]["low"], metrics[name]["high"]) == pytest.approx((low, high), abs=1e-9)
            else:
                assert metrics[name] == {"value": None, "low": None, "high": None}


def test_the_bootstrap_s_scores_are_scikit_learn_s_of_weighted_images():
    rng = np.random.default_rng(1)
    for labels, probs, threshold in list(score_vectors())[::4]:
        weights = rng.integers(0, 4, (3, len(labels))) + 0.0
        weights[:, [labels.argmin(), labels.argmax()]] = 1  # both classes stay
        scores = evaluate.weighted_scores(probs, labels, weights, threshold)
        for i, weight in enumerate(weights):
            expected = by_scikit_learn(labels, probs, threshold, weight)
            for name in ("accuracy", "f1", "auroc", "average_precision", "brier"):
                assert scores[name][i] == pytest.approx(expected[name], abs=1e-6), name
            repeated = np.repeat(np.arange(len(labels)), weight.astype(int))
            assert scores["ece"][i] == pytest.approx(calibration_error(labels[repeated], probs[repeated]), abs=1e-6)


def draw_scores(rng, patients, each, slope, apart=0.7):
    """(files, labels, probs) of so many patients a class, with `each` images that resemble each other."""
    labels = np.repeat([0, 1], patients * each)
    person = np.repeat(rng.normal(0, 1, 2 * patients), each)
    x = (person + rng.normal(0, 0.3, len(person)) * (each > 1)) + (2 * labels - 1) * apart
    files = [f"person{i // each}_virus_{i}.jpeg" for i in range(len(labels))]
    return files, labels, (1 / (1 + np.exp(-slope * x))).astype(np.float32)


@pytest.mark.parametrize(("each", "slope"), [(1, 1.4), (3, 2.5)])
def test_the_intervals_hold_the_truth_as_often_as_they_say(each, slope, monkeypatch):
    monkeypatch.setattr(evaluate, "DRAWS", 400)
    rng, runs = np.random.default_rng(each), 200
    _, labels, probs = draw_scores(rng, 100_000, each, slope)
    truth = {
        name: values[0]
        for name, values in evaluate.weighted_scores(probs, labels, np.ones((1, len(probs))), 0.5).items()
    }
    hits = dict.fromkeys(("accuracy", "f1", "auroc", "average_precision", "brier", "ece"), 0)
    with threadpool_limits(1):  # threads only wait for each other in so small products
        for i in range(runs):
            metrics, _, _ = evaluate.measure(*draw_scores(rng, 50, each, slope), 0.5, i)
            for name in hits:
                hits[name] += metrics[name]["low"] <= truth[name] <= metrics[name]["high"]
    for name, count in hits.items():
        if name == "ece":
            assert count / runs >= 0.92  # wider than it must be, see evaluate.bootstrapped
        elif each == 1 or name != "accuracy":  # Wilson's interval knows no patients
            assert 0.92 <= count / runs <= 0.98, name


def test_patients_are_resampled_and_not_their_images():
    rng = np.random.default_rng(0)
    files, labels, probs = draw_scores(rng, 40, 5, 2.0)
    alone = [f"{i}.png" for i in range(len(files))]
    spread = [
        np.ptp(np.percentile(evaluate.bootstrap(f, labels, probs, 0.5, 0)["auroc"], (2.5, 97.5)))
        for f in (files, alone)
    ]
    assert spread[0] > 1.5 * spread[1]


def test_the_bootstrap_draws_within_each_class_and_is_the_same_every_time():
    files, labels, probs = draw_scores(np.random.default_rng(0), 20, 2, 1.0)
    labels[:2] = 1  # one patient with images of both classes
    constant = evaluate.bootstrap(files, labels, (labels == 1).astype(np.float32), 0.5, 3)
    assert (constant["accuracy"] == 1).all() and (constant["auroc"] == 1).all()
    one, same, other = (evaluate.bootstrap(files, labels, probs, 0.5, seed)["f1"] for seed in (3, 3, 4))
    assert (one == same).all() and (one != other).any()


def test_5000_images_are_bootstrapped_in_seconds():
    import time

    files, labels, probs = draw_scores(np.random.default_rng(0), 2500, 1, 1.0)
    start = time.process_time()
    evaluate.bootstrap(files, labels, probs, 0.5, 0)
    assert time.process_time() - start < 10


def test_logits_between_0_and_1_are_not_taken_for_probabilities(run, trained, tmp_path):
    network, head, weight, _ = trained
    save_checkpoint(tmp_path / "model.pth", network, head, 1e-9 * weight, 0.3, arch="resnet18")
    assert run() == 0
    report = read_report(tmp_path / "results")
    assert report["counts"] == {"tp": 10, "fp": 10, "tn": 0, "fn": 0}  # sigmoid(0.3) is 0.574, above 0.5
    assert report["metrics"]["npv"]["value"] is None
    assert report["metrics"]["brier"]["value"] == pytest.approx((0.5744425**2 + 0.4255575**2) / 2, abs=1e-6)


def test_an_image_at_the_threshold_is_normal(tmp_path):
    source = write_rows(tmp_path / "predictions.csv", [0, 1, 1], [0.1, 0.7, 0.8])
    assert evaluate.main(["--from", str(source), "--threshold", "0.7", "--results-dir", str(tmp_path)]) == 0
    assert read_report(tmp_path)["counts"] == {"tp": 1, "fp": 0, "tn": 1, "fn": 1}
    assert [row["prediction"] for row in read_rows(source)] == ["NORMAL", "NORMAL", "PNEUMONIA"]


def test_subgroups_are_told_by_the_names(tmp_path):
    names = ["person1_bacteria_1.jpeg", "person2_virus_3.jpeg", "person3_virus_4.jpeg", "IM-0001-0001.jpeg"]
    names += ["NORMAL2-IM-0002-0001.jpeg", "NORMAL2-IM-0003-0001.jpeg", "NORMAL2-IM-0003-0001-0002.jpeg", "x.jpeg"]
    labels, probs = [1, 1, 1, 0, 0, 0, 0, 0], [0.9, 0.9, 0.1, 0.2, 0.8, 0.1, 0.1, 0.9]
    source = write_rows(tmp_path / "predictions.csv", labels, probs, names)
    assert evaluate.main(["--from", str(source), "--results-dir", str(tmp_path)]) == 0
    report = read_report(tmp_path)
    found = {k: (v["metric"], v["n"], round(v["value"], 3)) for k, v in report["subgroups"].items()}
    expected = {"bacteria": ("sensitivity", 1, 1.0), "virus": ("sensitivity", 2, 0.5)}
    assert found == expected | {"IM": ("specificity", 1, 1.0), "NORMAL2-IM": ("specificity", 3, 0.667)}
    assert report["patients"] == 7 and report["names_without_patient"] == 1


def test_the_report_shows_the_calibration_with_and_without_the_temperature(run, trained, tmp_path):
    network, head, weight, bias = trained
    save_checkpoint(tmp_path / "model.pth", network, head, weight, bias, arch="resnet18", temperature=2.5)
    assert run() == 0
    rows = read_rows(tmp_path / "results" / "predictions.csv")
    p = np.array([float(row["probability"]) for row in rows])
    labels = np.array([common.CLASSES.index(row["label"]) for row in rows])
    before = 1 / (1 + np.exp(-2.5 * np.log(p / (1 - p))))
    calibration = read_report(tmp_path / "results")["calibration"]
    assert calibration["temperature"] == 2.5
    for key, probs in (("with", p), ("without", before)):
        assert calibration[key]["brier"] == pytest.approx(((probs - labels) ** 2).mean(), abs=1e-6)
        assert calibration[key]["ece"] == pytest.approx(calibration_error(labels, probs.astype(np.float32)), abs=1e-5)


def test_intervals_without_any_spread_are_named(tmp_path, capsys):
    source = write_rows(tmp_path / "predictions.csv", [0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert evaluate.main(["--from", str(source), "--results-dir", str(tmp_path)]) == 0
    assert read_report(tmp_path)["without_spread"] == ["f1", "auroc", "average_precision"]
    assert "too narrow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "probs"),
    [([0, 1], [0.2, 0.3]), ([0, 1], [0.0, 1.0]), ([0, 0, 1], [0.5, 0.5, 0.5]), ([0, 1, 1], [1.0, 0.0, 0.0])],
    ids=["nothing positive", "perfect", "all alike", "all wrong"],
)
def test_pictures_of_the_smallest_and_oddest_scores_are_drawn(labels, probs, pictures, tmp_path):
    source = write_rows(tmp_path / "predictions.csv", labels, probs)
    assert evaluate.main(["--from", str(source), "--results-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES - {"worst.png"}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(label, tmp_path, capsys):
    source = write_rows(tmp_path / "predictions.csv", [label] * 3, [0.1, 0.5, 0.9])
    assert evaluate.main(["--from", str(source), "--results-dir", str(tmp_path / "results")]) == 2
    err = capsys.readouterr().err
    assert common.CLASSES[1 - label] in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


def test_scores_that_are_not_finite_stop_with_status_3(run, trained, tmp_path, capsys):
    network, head, weight, bias = trained
    save_checkpoint(tmp_path / "model.pth", network, head, weight.sign() * 3e38, bias, arch="resnet18")
    assert run() == 3
    assert "not finite" in capsys.readouterr().err and not [*(tmp_path / "results").glob("*")]


def test_a_network_of_1000_classes_is_refused(run, trained, tmp_path, capsys):
    network, head, _, _ = trained
    state = network.state_dict() | {f"{head}.weight": torch.zeros(1000, 512), f"{head}.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "model.pth")
    about = {"arch": "resnet18", "threshold": 0.5, "sha256": common.hash_file(tmp_path / "model.pth")}
    (tmp_path / "model.json").write_text(json.dumps(about))
    assert run() == 2
    assert "expected one output neuron" in (err := capsys.readouterr().err) and "found 1000" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nosuch.png"], "nosuch.png"),
        (["--threshold", "1.5"], "from 0 to 1"),
        (["--threshold", "nan"], "from 0 to 1"),
        (["--split", "tets"], "invalid choice"),
        (["--from", "nosuch.csv"], "nosuch.csv"),
        (["--compare", "nosuch.csv"], "nosuch.csv"),
        (["--checkpoint", "nosuch.pth"], "nosuch.pth"),
        (["--data-dir", "nosuch"], "nosuch"),
        (["--device", "cuda:99"], "cuda:99"),
        (["x.png", "--from", "y.csv"], "need labels"),
        (["--from", "y.csv", "--cam", "z"], "--cam"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_before_any_work(flags, words, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "extract_features", None)
    try:
        status = run(*flags)
    except SystemExit as stop:  # argparse
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and words in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


def test_a_folder_without_images_is_refused(run, data, capsys):
    assert run(data) == 2
    assert "directly inside" in capsys.readouterr().err


def test_an_unreadable_test_image_stops_and_with_skip_bad_has_a_row_of_its_own(run, data, tmp_path, capsys):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    victim = sorted((copy / "test" / "NORMAL").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:2000])
    assert run("--data-dir", copy) == 2
    assert str(victim) in capsys.readouterr().err and not [*(tmp_path / "results").glob("*")]
    assert run("--data-dir", copy, "--skip-bad") == 0
    report, row = read_report(tmp_path / "results"), read_rows(tmp_path / "results" / "predictions.csv")[0]
    assert report["n"] == 19 and report["unreadable"] == 1
    assert row["label"] == "NORMAL" and row["error"] and row["probability"] == row["prediction"] == ""
    assert run("--from", tmp_path / "results" / "predictions.csv", "--results-dir", tmp_path / "again") == 0
    assert read_report(tmp_path / "again")["metrics"] == report["metrics"]


# ---------------------------------------------------------------- the threshold and the guards


def test_the_stored_threshold_holds_unless_another_is_given(run, trained, tmp_path):
    stored = dict(arch="resnet18", threshold=0.3, threshold_rule="youden")
    save_checkpoint(tmp_path / "model.pth", *trained, **stored)
    assert run() == 0
    report = read_report(tmp_path / "results")
    assert report["threshold"] == 0.3 and "youden on val" in report["threshold_from"]
    assert run("--threshold", 0.6) == 0
    again = read_report(tmp_path / "results")
    assert again["threshold"] == 0.6 and again["threshold_from"] == "--threshold"
    assert sum(again["counts"].values()) == 20 and again["counts"]["tp"] <= report["counts"]["tp"]


def test_training_images_in_test_are_warned_of(run, trained, data, tmp_path, capsys):
    paths = [path for path, _ in common.list_split(data, "test")]
    known = {"train": {"train/NORMAL/a.jpeg": common.hash_file(paths[0])}, "val": {"b": common.hash_file(paths[-1])}}
    save_checkpoint(tmp_path / "model.pth", *trained, arch="resnet18", images=known)
    assert run() == 0
    warnings = read_report(tmp_path / "results")["warnings"]
    assert len(warnings) == 1 and warnings[0].startswith("2 of 20 test images WERE AMONG")
    assert f"warning: {warnings[0]}" in capsys.readouterr().err


def test_another_split_is_no_test_result(run, tmp_path, capsys):
    assert run("--split", "train") == 0
    captured = capsys.readouterr()
    assert "Train accuracy: " in captured.out and "NO TEST RESULT" in captured.err
    assert "NO TEST RESULT" in read_report(tmp_path / "results")["warnings"][0]


def test_a_model_json_of_another_model_is_not_believed(run, trained, tmp_path, capsys):
    save_checkpoint(tmp_path / "model.pth", *trained, arch="resnet18", sha256="0" * 64, threshold=0.9, temperature=3.0)
    assert run() == 0
    report = read_report(tmp_path / "results")
    assert "DOES NOT BELONG" in report["warnings"][0] and "DOES NOT BELONG" in capsys.readouterr().err
    assert report["threshold"] == 0.5 and report["calibration"]["temperature"] == 1 and report["model"]["epoch"] is None


def test_a_bare_state_dict_is_a_resnet50_with_a_note(data, cache, tmp_path, capsys):
    network, head, width, _ = common.build_network("resnet50")
    path = save_checkpoint(tmp_path / "bare.pth", network, head, torch.zeros(width), -1.0)
    image = sorted((data / "test" / "NORMAL").iterdir())[0]
    flags = ["--checkpoint", path, "--results-dir", tmp_path / "results", "--no-cache", "--device", "cpu"]
    assert evaluate.main([str(flag) for flag in (image, *flags)]) == 0
    assert "no " in (err := capsys.readouterr().err) and "resnet50" in err
    row = read_rows(tmp_path / "results" / "predictions.csv")[0]
    assert float(row["probability"]) == pytest.approx(1 / (1 + math.e))


# ---------------------------------------------------------------- the best one-number rule


def test_the_rule_of_the_reference_data_is_the_file_size(xrays_source):
    images = common.read_split(xrays_source, "test")["test"]
    files = [image.path.name for image in images]
    rule = evaluate.best_rule(Namespace(data_dir=xrays_source), images, files)
    assert rule["number"] == "file size" and rule["sign"] == -1 and 6000 <= rule["cut"] <= 6010
    assert rule["fitted_on"] == 300 and rule["fit_accuracy"] == pytest.approx(0.88, abs=0.005)
    assert len(rule["wrong"]) == 21
    sizes = {image.path.name: (image.path.stat().st_size, image.label) for image in images}
    assert set(rule["wrong"]) == {name for name, (size, label) in sizes.items() if (size <= rule["cut"]) != label}


def test_the_rule_is_reported_beside_the_network_with_the_paired_difference(run, data, tmp_path, capsys):
    assert run() == 0
    report = read_report(tmp_path / "results")
    rule, accuracy = report["shortcut"], report["metrics"]["accuracy"]["value"]
    assert rule["accuracy"]["value"] == pytest.approx(1 - len(rule["wrong"]) / 20)
    difference = rule["difference"]
    assert difference["value"] == pytest.approx(accuracy - rule["accuracy"]["value"], abs=1e-6)
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert f"one-number rule, {rule['number']}" in capsys.readouterr().out
    expected = (
        "better" if difference["low"] > 0 else "better, but within chance" if difference["value"] > 0 else "NO BETTER"
    )
    assert rule["network_is"] == expected


def test_the_features_come_from_the_store(run, tmp_path, capsys):
    for flags, computed in (((), True), ((), False), (("--no-cache",), True)):
        assert run("--cache-dir", tmp_path / "cache", *flags) == 0
        assert ("20 computed in" in capsys.readouterr().out) == computed


def test_a_full_memory_while_the_rule_is_fitted_is_one_line_and_4(run, monkeypatch, capsys):
    def full(path):
        raise MemoryError

    monkeypatch.setattr(common, "image_numbers", full)
    assert run() == 4 and "memory is full" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_an_image_that_vanishes_after_the_pass_is_one_line_and_2(run, data, tmp_path, monkeypatch, capsys):
    image = shutil.copy(sorted((data / "test" / "PNEUMONIA").iterdir())[0], tmp_path / "x.jpeg")
    true = evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *args: (true(*args), Path(image).unlink())[0])
    assert run(image, "--cam", tmp_path / "maps") == 2
    assert f"{image}: No such file" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_test_image_that_vanishes_before_the_rule_is_one_line_and_2(run, data, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    image = sorted((folder / "test" / "PNEUMONIA").iterdir())[0]
    true = evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *args: (true(*args), image.unlink())[0])
    assert run("--data-dir", folder) == 2
    assert f"{image}: No such file" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_without_training_images_the_rule_is_left_out_with_a_note(run, data, tmp_path, capsys):
    shutil.copytree(data / "test", tmp_path / "data" / "test")
    assert run("--data-dir", tmp_path / "data") == 0
    assert "none to compare with" in capsys.readouterr().out
    assert "none" in read_report(tmp_path / "results")["shortcut"]


# ---------------------------------------------------------------- class activation maps


def last_map(arch, network, x):
    """The last feature map, written out by hand."""
    if arch == "resnet18":
        x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        return network.layer4(network.layer3(network.layer2(network.layer1(x))))
    features = network.features(x)
    return features.relu() if arch == "densenet121" else features


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "efficientnet_b0"])
def test_the_map_is_the_head_s_weights_times_the_last_feature_map(arch, data):
    network, _, width, _ = common.build_network(arch)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(width, generator=generator), torch.tensor(0.7)
    model = evaluate.Model(network, weight, bias, {}, {}, [], torch.device("cpu"))
    paths = [path for path, _ in common.list_split(data, "test")][::15]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]).permute(
        0, 3, 1, 2
    )
    maps = evaluate.class_maps(model, pixels)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (common.MEAN, common.STD))
    with torch.no_grad():
        x = (pixels / 255 - mean) / std
        expected = (last_map(arch, network, x) * weight.view(-1, 1, 1)).sum(1) + bias
        logits = network(x) @ weight + bias
    scale = expected.abs().max().item()
    assert maps.shape == (len(paths), 7, 7)
    assert torch.allclose(maps, expected, rtol=1e-3, atol=1e-4 * scale)
    assert torch.allclose(maps.mean((1, 2)), logits, rtol=1e-3, atol=1e-4 * scale)


def test_a_network_without_that_ending_is_refused_with_cam_and_draws_worst_without_maps(
    data, pictures, cache, tmp_path, capsys
):
    network, head, width, _ = common.build_network("mobilenet_v3_small")  # pooling, Linear, Linear
    path = save_checkpoint(tmp_path / "model.pth", network, head, torch.zeros(width), 1.0, arch="mobilenet_v3_small")
    flags = ["--data-dir", data, "--checkpoint", path, "--results-dir", tmp_path / "results", "--cache-dir", cache]
    flags = [str(flag) for flag in (*flags, "--device", "cpu")]
    assert evaluate.main([*flags, "--cam", str(tmp_path / "maps")]) == 2
    err = capsys.readouterr().err
    assert "global average pooling" in err and err.count("\n") == 1 and not [*(tmp_path / "results").glob("*")]
    assert evaluate.main(flags) == 0
    assert (tmp_path / "results" / "worst.png").exists()


def test_cam_writes_an_overlay_of_every_image_of_a_split(run, data, tmp_path):
    assert run("--cam", tmp_path / "maps") == 0
    found = {path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.png")}
    paths = [path for path, _ in common.list_split(data, "test")]
    assert found == {f"{path.parent.name}/{path.name}.png" for path in paths}
    with Image.open(tmp_path / "maps" / next(iter(found))) as overlay:
        assert overlay.size == (224, 224) and overlay.mode == "RGB"


def test_overlays_of_namesakes_do_not_overwrite_each_other(run, data, tmp_path):
    paths = [path for path, _ in common.list_split(data, "test")][:3]
    for i, path in enumerate(paths):
        (tmp_path / str(i)).mkdir()
        shutil.copy(path, tmp_path / str(i) / "scan.jpeg")
    assert run(*(tmp_path / str(i) for i in range(3)), "--cam", tmp_path / "maps") == 0
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {f"scan.jpeg{n}.png" for n in ("", "-2", "-3")}
    assert len({path.read_bytes() for path in (tmp_path / "maps").iterdir()}) == 3


def test_an_overlay_is_orange_where_the_map_is_positive_and_blue_where_it_is_negative():
    heat = torch.full((7, 7), -2.0)
    heat[:, 4:] = 2.0
    red, _, blue = evaluate.overlay(torch.full((224, 224, 3), 128, dtype=torch.uint8), heat)[100].float().unbind(1)
    assert (red - blue)[-40:].min() > 50 and (blue - red)[:40].min() > 50
    view = torch.full((224, 224, 3), 128, dtype=torch.uint8)
    assert (evaluate.overlay(view, torch.zeros(7, 7)) == view).all()


# ---------------------------------------------------------------- new images


def test_new_images_get_a_table_and_an_unreadable_one_its_error_and_status_2(run, data, tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    good = sorted((data / "test" / "PNEUMONIA").iterdir())[0]
    with Image.open(good) as image:
        image.resize((500, 300)).save(folder / "large.png")
        image.resize((40, 60)).save(folder / "small.bmp")
    (folder / "bad.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("no image")
    assert run(folder, good) == 2
    captured = capsys.readouterr()
    where = tmp_path / "results" / "predictions.csv"
    assert captured.err == f"1 of 4 images could not be read, see {where}\n"
    rows = read_rows(where)
    assert list(rows[0]) == ["file", "label", "probability", "prediction", "error"]
    assert [row["file"] for row in rows] == [
        *(str(folder / n) for n in ("bad.jpg", "large.png", "small.bmp")),
        str(good),
    ]
    assert rows[0]["error"] == "a web page, not an image" and rows[0]["probability"] == rows[0]["prediction"] == ""
    for row in rows[1:]:
        assert 0 < float(row["probability"]) < 1 and row["prediction"] in common.CLASSES
        assert row["label"] == row["error"] == "" and f"{row['file']} " in captured.out
    assert run(good) == 0


def test_new_images_do_not_overwrite_the_predictions_that_metrics_json_describes(run, data, tmp_path, capsys):
    results = tmp_path / "results"
    assert run() == 0
    before, report = (results / "predictions.csv").read_bytes(), read_report(results)
    assert run(data / "test" / "NORMAL") == 0
    assert (results / "predictions-test.csv").read_bytes() == before
    assert len(read_rows(results / "predictions.csv")) == 10
    assert run("--from", results / "predictions-test.csv", "--results-dir", tmp_path / "again") == 0
    assert read_report(tmp_path / "again")["metrics"] == report["metrics"]
    assert run("--from", results / "predictions.csv") == 2  # new images have no labels
    assert "row 2, column label" in capsys.readouterr().err


def test_every_kind_of_file_scores_as_the_grey_pixels_in_it(run, data, tmp_path):
    path = sorted((data / "test" / "PNEUMONIA").iterdir())[1]
    grey = np.asarray(Image.open(path).convert("L")).astype(int)
    grey = ((grey - grey.min()) * 255 / np.ptp(grey)).round().astype(np.uint8)  # 16-bit files are windowed to this
    plain, folder = Image.fromarray(grey), tmp_path / "kinds"
    folder.mkdir()
    plain.save(folder / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 100 + 5000).save(folder / "16bit.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(folder / "16bit.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tiff")
    plain.convert("RGB").save(folder / "rgb.png")
    plain.convert("RGBA").save(folder / "rgba.png")
    plain.convert("P").save(folder / "palette.png")
    plain.convert("LA").save(folder / "grey_alpha.png")
    plain.convert("RGB").convert("CMYK").save(folder / "cmyk.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    assert run(folder) == 0
    probs = {
        Path(row["file"]).name: float(row["probability"]) for row in read_rows(tmp_path / "results" / "predictions.csv")
    }
    assert len(probs) == 10
    for name, prob in probs.items():
        assert prob == pytest.approx(probs["0.png"], abs=1e-5), name
    views = common.Views([(folder / name, common.hash_file(folder / name), [0]) for name in probs])
    for i in range(len(views)):
        assert (views[i][1][0, :, :, 1] == grey).all()


# ---------------------------------------------------------------- afterwards


def test_from_equals_the_original_run_and_needs_neither_images_nor_network(
    run, pictures, trained, tmp_path, monkeypatch
):
    stored = dict(arch="resnet18", threshold=0.4, threshold_rule="sensitivity=0.95", temperature=1.7)
    save_checkpoint(tmp_path / "model.pth", *trained, **stored)
    assert run() == 0
    results, again = tmp_path / "results", tmp_path / "again"
    for name in ("build_network", "read_state", "read_split", "load_image", "extract_features"):
        monkeypatch.setattr(common, name, None)
    flags = [
        "--from",
        results / "predictions.csv",
        "--results-dir",
        again,
        "--data-dir",
        "nosuch",
        "--checkpoint",
        "nosuch",
    ]
    assert evaluate.main(list(map(str, flags))) == 0
    assert read_report(again) == read_report(results)
    assert (again / "predictions.csv").read_bytes() == (results / "predictions.csv").read_bytes()
    assert {path.name for path in again.iterdir()} == (PICTURES - {"worst.png"}) | {"metrics.json", "predictions.csv"}
    for name in PICTURES - {"worst.png"}:
        assert (again / name).read_bytes() == (results / name).read_bytes()


def test_from_with_another_threshold_recomputes_every_number(run, tmp_path):
    assert run() == 0
    results = tmp_path / "results"
    rows = read_rows(results / "predictions.csv")
    assert run("--from", results / "predictions.csv", "--threshold", 0.7) == 0
    report = read_report(results)
    labels = np.array([row["label"] == "PNEUMONIA" for row in rows]).astype(int)
    expected = by_scikit_learn(labels, np.array([row["probability"] for row in rows], np.float32), 0.7)
    assert report["threshold"] == 0.7 and report["threshold_from"] == "--threshold"
    for name, value in expected.items():
        assert report["metrics"][name]["value"] == (None if value is None else pytest.approx(value, abs=1e-6))
    difference = report["shortcut"]["difference"]["value"]
    assert difference == pytest.approx(expected["accuracy"] - report["shortcut"]["accuracy"]["value"], abs=1e-6)


def test_from_takes_the_threshold_beside_it_and_refuses_a_file_that_it_does_not_describe(tmp_path, capsys):
    source = write_rows(tmp_path / "a" / "predictions.csv", [0, 1, 0, 1], [0.2, 0.9, 0.3, 0.4])
    flags = ["--from", str(source), "--results-dir", str(tmp_path / "b")]
    assert evaluate.main(flags) == 0 and read_report(tmp_path / "b")["threshold"] == 0.5
    (tmp_path / "a" / "metrics.json").write_text(json.dumps({"threshold": 0.25}))
    assert evaluate.main(flags) == 0 and read_report(tmp_path / "b")["threshold"] == 0.25
    assert read_report(tmp_path / "b")["threshold_from"] == str(tmp_path / "a" / "metrics.json")
    common.write_json(tmp_path / "a" / "metrics.json", {"threshold": 0.25, "predictions_sha256": "0" * 64})
    for more in ([], ["--compare", str(source)]):
        assert evaluate.main([*flags, *more]) == 2
        assert "predictions.csv: not what" in (err := capsys.readouterr().err) and err.count("\n") == 1


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
    (tmp_path / "p.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    for flags in (["--from"], ["--compare"]):
        assert evaluate.main([*flags, str(tmp_path / "p.csv"), "--results-dir", str(tmp_path / "results")]) == 2
        err = capsys.readouterr().err
        assert words in err and str(tmp_path / "p.csv") in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


def test_compare_gives_the_paired_differences_and_mcnemar_s_exact_p(tmp_path, capsys):
    rng = np.random.default_rng(5)
    names, labels, mine = draw_scores(rng, 60, 2, 2.0, apart=1.0)
    other = np.clip(mine + rng.normal(0, 0.3, len(mine)), 0, 1).astype(np.float32)
    a = write_rows(tmp_path / "a" / "predictions.csv", labels, mine, names)
    order = rng.permutation(len(labels))  # another order of the rows
    b = write_rows(tmp_path / "b" / "predictions.csv", labels[order], other[order], [names[i] for i in order])
    flags = ["--from", str(a), "--compare", str(b), "--results-dir", str(tmp_path / "r")]
    assert evaluate.main(flags) == 0
    report = read_report(tmp_path / "r")
    found = report["comparison"]
    ours, theirs = by_scikit_learn(labels, mine, 0.5), by_scikit_learn(labels, other, 0.5)
    for name in ("accuracy", "f1", "auroc"):
        difference = found["difference"][name]
        assert difference["value"] == pytest.approx(ours[name] - theirs[name], abs=1e-6)
        assert difference["low"] < difference["value"] < difference["high"]
        alone = [m[name]["high"] - m[name]["low"] for m in (report["metrics"], found["other"])]
        assert difference["high"] - difference["low"] < sum(alone) / math.sqrt(2)  # pairing narrows it
    right, right_there = (mine > 0.5) == labels, (other > 0.5) == labels
    here, there = int((right & ~right_there).sum()), int((right_there & ~right).sum())
    assert (found["right_only_here"], found["right_only_there"]) == (here, there)
    assert found["mcnemar_p"] == pytest.approx(scipy.stats.binomtest(here, here + there).pvalue, rel=1e-9)
    assert "McNemar" in capsys.readouterr().out


def test_mcnemar_equals_scipy():
    for here, there in [(0, 0), (0, 1), (1, 1), (5, 0), (3, 9), (50, 50), (700, 800), (2500, 2400)]:
        expected = scipy.stats.binomtest(here, here + there).pvalue if here + there else 1.0
        assert evaluate.mcnemar(here, there) == pytest.approx(expected, rel=1e-9)


def test_compare_works_with_a_fresh_evaluation(run, tmp_path):
    assert run() == 0
    assert run("--compare", tmp_path / "results" / "predictions.csv") == 0
    found = read_report(tmp_path / "results")["comparison"]
    assert found["difference"]["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["mcnemar_p"] == 1.0 and found["model"]["arch"] == "resnet18"


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [(["a", "b", "d"], [0, 1, 1], "as c"), (["a", "b"], [0, 1], "as c"), (["a", "b", "c"], [0, 1, 0], "another label")],
)
def test_compare_refuses_other_images_or_labels(names, labels, words, tmp_path, capsys):
    a = write_rows(tmp_path / "a.csv", [0, 1, 1], [0.1, 0.8, 0.9], ["a", "b", "c"])
    b = write_rows(tmp_path / "b.csv", labels, [0.5] * len(labels), names)
    assert evaluate.main(["--from", str(a), "--compare", str(b), "--results-dir", str(tmp_path / "r")]) == 2
    assert words in capsys.readouterr().err and not [*(tmp_path / "r").glob("*")]
