"""cxr/learning_curve.py: which images train, the intervals of the scores, and the last step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from faults import listing
from PIL import Image
from scipy.special import expit, log_expit, logit
from scipy.stats import norm
from simulated import by_scikit_learn
from sklearn.metrics import log_loss

import cxr.bootstrap
import train
from cxr.files import read_json
from cxr.learning_curve import describe_last_step, draw_subsets, score_sizes
from cxr.patients import Xray

# ---------------------------------------------------------------- the intervals, by simulation


def draw_design(rng):
    """Draws patients per class, images per patient, AUROCs of two sizes, and their correlation."""
    counts = np.exp(rng.uniform(np.log(30), np.log(200), 2)).astype(int)
    auroc = rng.uniform(0.8, 0.96)
    aurocs = auroc, rng.uniform(auroc, min(auroc + 0.05, 0.98))
    return *counts, rng.choice([1, 3]), aurocs, rng.uniform(0.3, 0.9)


def simulate_sizes(rng, normal, pneumonia, each, aurocs, correlation, n_repeats=2):
    """Returns (probs float64 (2, n_repeats, N), labels, patients) of calibrated models."""
    labels = np.repeat(np.repeat([0, 1], [normal, pneumonia]), each)
    patients = np.repeat(np.arange(normal + pneumonia), each)
    shared = rng.normal(size=(2, 1, normal + pneumonia))[..., patients]  # by the images of a person
    of_image = rng.normal(size=(2, 1, len(labels)))
    own = rng.normal(size=(2, n_repeats, len(labels)))
    noise = np.sqrt(0.5) * (shared[0] + of_image[0])
    noise = np.sqrt(correlation) * noise + np.sqrt(1 - correlation) * own
    apart = np.sqrt(2) * norm.ppf(aurocs)[:, None, None]  # of the two classes
    logits = apart * (noise + apart * (labels - 0.5)) + np.log(pneumonia / normal)
    return expit(logits), labels, patients


def true_differences(normal, pneumonia, aurocs):
    """Returns the exact differences of the two models on the whole population."""
    z, weight = np.polynomial.hermite_e.hermegauss(150)
    share, losses = pneumonia / (normal + pneumonia), []
    for apart in np.sqrt(2) * norm.ppf(aurocs):
        logits = apart * (z + apart / 2)
        mean = share * log_expit(logits + logit(share))
        mean += (1 - share) * log_expit(logits - logit(share))
        losses.append(-(weight * mean).sum() / weight.sum())
    return {"auroc": aurocs[1] - aurocs[0], "log_loss": losses[1] - losses[0]}


def test_the_interval_of_the_last_step_contains_the_true_difference(fuzz, say, monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", fuzz.count(200, 1000))
    rng, runs, hits = np.random.default_rng(0), fuzz.count(100, 1000), []
    for seed in range(runs):
        design = draw_design(rng)
        truth = true_differences(*design[:2], design[3])
        _, found = score_sizes(*simulate_sizes(rng, *design), seed)
        hits.append([found[name]["low"] <= truth[name] <= found[name]["high"] for name in truth])
    shares = np.mean(hits, axis=0)
    say(f"Intervals of the last step with the true difference (AUROC, log loss): {shares}")
    assert shares.min() >= 0.92 and shares.max() <= 0.98, shares


def equal_sizes(rng, normal, pneumonia, each, **options):
    return simulate_sizes(rng, normal, pneumonia, each, (0.9, 0.93), 0.7, **options)


def test_the_scores_of_a_size_are_the_means_over_the_repeats(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 40)
    probs, labels, patients = equal_sizes(np.random.default_rng(0), 30, 20, 2, n_repeats=3)
    intervals, changes = score_sizes(probs, labels, patients, seed=0)
    aurocs, losses = [], []
    for of_size in probs:
        aurocs.append(np.mean([by_scikit_learn(labels, p, 0.5)["auroc"] for p in of_size]))
        losses.append(np.mean([log_loss(labels, p) for p in of_size]))
    assert [x["value"] for x in intervals["auroc"]] == pytest.approx(aurocs)
    assert [x["value"] for x in intervals["log_loss"]] == pytest.approx(losses)
    assert changes["auroc"]["value"] == pytest.approx(aurocs[1] - aurocs[0])
    assert changes["log_loss"]["value"] == pytest.approx(losses[1] - losses[0])
    for score in (*intervals["auroc"], *intervals["log_loss"], *changes.values()):
        assert score["low"] < score["value"] < score["high"]


def test_the_difference_is_paired_and_its_patients_are_drawn_as_a_whole(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 400)

    def width(interval):
        return interval["high"] - interval["low"]

    probs, labels, patients = equal_sizes(np.random.default_rng(0), 60, 60, 1)
    intervals, changes = score_sizes(probs, labels, patients, seed=0)
    assert width(changes["auroc"]) < min(map(width, intervals["auroc"]))
    assert width(changes["log_loss"]) < min(map(width, intervals["log_loss"]))
    # Four copies of each image of the same patient carry no more information than one image.
    four_times = [np.repeat(x, 4, axis=-1) for x in (probs, labels, patients)]
    _, of_copies = score_sizes(*four_times, seed=0)
    for name, change in changes.items():
        assert width(of_copies[name]) == pytest.approx(width(change))


# ---------------------------------------------------------------- which images train


def make_xrays(images_of_patients):
    """Returns Xrays of patients, for each of whom the labels of the images are given."""
    return [
        Xray(Path(f"{patient}-{i}.png"), label, "", group=str(patient))
        for patient, labels in enumerate(images_of_patients)
        for i, label in enumerate(labels)
    ]


def test_a_subset_has_the_size_that_is_asked_for_and_the_larger_one_contains_it():
    xrays = make_xrays([[0]] * 60 + [[1]] * 20)
    small, large, other = (
        draw_subsets(torch.arange(80), sizes, xrays, seed)
        for sizes, seed in (([20], "0"), ([20, 40, 80], "0"), ([20], "1"))
    )
    assert [len(rows) for rows in large] == [20, 40, 80]
    n_positive = [sum(xrays[row].label for row in rows.tolist()) for rows in large]
    assert n_positive == [5, 10, 20]  # a quarter, as in all images
    assert set(large[0].tolist()) < set(large[1].tolist()) < set(large[2].tolist())
    assert torch.equal(small[0], large[0]) and not torch.equal(small[0], other[0])


@pytest.mark.parametrize("seed", "0123")
def test_a_subset_has_whole_patients_and_is_never_larger_than_asked_for(seed):
    xrays = make_xrays([[0, 0, 0], [1, 1], [0, 1, 1], [0]] * 10)
    train_rows = torch.arange(18, len(xrays))  # without the first eight patients
    sizes, smaller = (9, 30, 60), set()
    for size, subset in zip(sizes, draw_subsets(train_rows, sizes, xrays, seed), strict=True):
        rows = set(subset.tolist())
        assert size - 3 <= len(rows) == len(subset) <= size
        assert smaller < rows <= set(train_rows.tolist())
        patients = {xrays[row].group for row in rows}
        assert len(rows) == sum(xray.group in patients for xray in xrays)
        smaller = rows


# ---------------------------------------------------------------- the command


def change(value, low, high):
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("auroc", "loss", "expected"),
    [
        (
            change(0.02, 0.0001, 0.04),
            change(-0.05, -0.08, -0.02),
            "the AUROC improved by 0.020 (95 % interval <0.001 to 0.040); "
            "the log loss improved by 0.050 (95 % interval 0.020 to 0.080)",
        ),
        (
            change(0.02, -0.01, 0.05),
            change(0.05, 0.02, 0.08),
            "the AUROC shows no improvement that can be distinguished from chance, 0.020 (95 % "
            "interval -0.010 to 0.050); "
            "the log loss became worse, by 0.050 (95 % interval 0.020 to 0.080)",
        ),
        (
            change(-0.03, -0.05, -0.01),
            change(0.1, None, None),
            "the AUROC became worse, by 0.030 (95 % interval 0.010 to 0.050); "
            "the log loss changed by 0.100 (no interval: all bootstrap samples are equal)",
        ),
    ],
)
def test_the_sentence_says_whether_the_last_step_improved_the_scores(auroc, loss, expected):
    step = {"from": 100, "to": 200, "auroc": auroc, "log_loss": loss}
    assert describe_last_step(step) == f"From 100 to 200 images: {expected}"


@pytest.mark.usefixtures("quick")
def test_a_learning_curve_is_written_printed_and_drawn(run_train, tmp_path, capsys):
    assert run_train("--folds", 4, "--repeats", 2, "--sizes", "24,8,99,8", "--lr", 0.1) == 0
    screen = capsys.readouterr().out.splitlines()
    assert "Left out of --sizes: 99, because --folds 4 leaves 32 images to train" in screen
    assert any(line.startswith("From 8 to 24 images: the AUROC ") for line in screen)
    curve = read_json(tmp_path / "results" / "curve.json")
    assert (curve["folds"], curve["repeats"], curve["n"]) == (4, 2, 64)
    assert [(point["size"], point["images"]) for point in curve["points"]] == [(8, 8), (24, 24)]
    small, large = curve["points"]
    for name in ("auroc", "log_loss"):
        assert small[name]["min"] <= small[name]["mean"] <= small[name]["max"]
        difference = large[name]["value"] - small[name]["value"]
        assert curve["last_step"][name]["value"] == pytest.approx(difference)
    assert (curve["last_step"]["from"], curve["last_step"]["to"]) == (8, 24)
    with Image.open(tmp_path / "results" / "curve.png") as picture:
        assert picture.size == (600, 660)
        low, high = picture.convert("L").getextrema()
    assert low < 50 and high > 200  # it is not blank
    assert not (tmp_path / "model.pth").exists()


@pytest.mark.usefixtures("quick")
def test_a_notebook_gets_the_content_of_curve_json_and_a_seed_gives_the_same(
    split_phantoms, flags, tmp_path
):
    few = ["--folds", 4, "--sizes", "8,24", "--epochs", 3]
    command = flags(split_phantoms, "--arch", "tinynet", "--weights", "random", "--views", 2, *few)
    curve = train.train(command)
    assert curve == read_json(tmp_path / "results" / "curve.json") == train.train(command)
    assert train.train([*command, "--seed", 1]) != curve


@pytest.mark.usefixtures("quick")
def test_the_size_of_all_that_a_fold_leaves_gives_the_scores_of_the_cross_validation(
    run_train, tmp_path
):
    # A subset of all images is in another order, so that the last digits may differ.
    flags = "--folds", 4, "--lr", 0.01, "--epochs", 40, "--patience", 0, "--batch-size", 64
    flags += "--views", 1
    assert run_train(*flags, "--sizes", "8,32") == run_train(*flags) == 0
    results = tmp_path / "results"
    curve, cv = read_json(results / "curve.json"), read_json(results / "cv.json")
    expected = cv["metrics"]["auroc"]
    found = curve["points"][-1]["auroc"]
    for key in ("value", "mean", "deviation", "min", "max"):
        assert found[key] == pytest.approx(expected[key], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sizes", "8,16"], "--sizes needs --folds: add --folds 10 --repeats 5, or run make cur"),
        (["--sizes", "8,16", "--folds", "4", "--seeds", "2"], "--seeds and --folds cannot be used"),
        (["--folds", "4", "--sizes", "8,many"], "expected two or more different numbers of images"),
        (["--folds", "4", "--sizes", "8,8"], "expected two or more different numbers of images"),
        (["--folds", "4", "--sizes", "0,8"], "expected two or more different numbers of images"),
        (
            ["--folds", "4", "--sizes", "6,200,400"],
            'use two or more sizes up to 12 (make curve ARGS="--sizes 6,12")',
        ),
        (
            ["--folds", "4", "--sizes", "1,6"],
            "--sizes 1: too few images to train on whole patients",
        ),
    ],
)
def test_a_wrong_size_gets_one_line_and_nothing_is_written(refused, home, flags, expected):
    before = listing(home / "results")
    assert expected in refused(2, "train", *flags)
    assert listing(home / "results") == before  # the cache may have grown
