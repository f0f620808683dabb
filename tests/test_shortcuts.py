"""cxr/shortcuts.py: how well one number of an image predicts its class without a network."""

import shutil

import numpy as np
import pytest
from helpers import read_report
from PIL import Image
from simulated import simulate

from cxr import shortcuts
from cxr.folders import CLASSES
from cxr.leaks import list_training_xrays
from cxr.patients import read_split


def draw_set(folder, counts, brightness=(128, 128), width=(16, 16), seed=0):
    """Draws PNG files of noise. counts: {split: (normal, pneumonia)}."""
    rng = np.random.default_rng(seed)
    for split, numbers in counts.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(numbers[label]):
                mean = brightness[label] + rng.integers(-9, 9)
                pixels = (mean + rng.integers(-9, 9, (16, width[label]))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name[0]}{i}.png")
    return folder


@pytest.mark.usefixtures("quick")
def test_a_good_network_is_rarely_called_no_better_than_random_numbers(tmp_path):
    folder = draw_set(tmp_path / "noise", {"train": (32, 8), "test": (48, 12)})
    xrays, training = (
        read_split(folder, "test", classes=CLASSES),
        list_training_xrays(folder, {}, CLASSES),
    )
    rng, verdicts = np.random.default_rng(0), []
    for seed in range(6):
        (table,) = simulate(rng, 48, 12, apart=1.81)  # AUROC 0.90
        baselines = shortcuts.single_number_baselines(table, xrays, *training, 224, seed)
        verdicts += [baselines["network_is"], baselines["numbers"]["all numbers"]["network_is"]]
    assert verdicts.count("NOT BETTER") <= 1 and verdicts.count("better") >= 6


def test_a_planted_number_is_reported_with_its_difference(run_evaluate, tmp_path, capsys):
    folder = draw_set(tmp_path / "set", {"train": (12, 12), "test": (10, 10)}, brightness=(90, 160))
    assert run_evaluate("--data-dir", folder) == 0
    report, screen = read_report(tmp_path / "results"), capsys.readouterr().out
    baselines, auroc = report["shortcut"], report["metrics"]["auroc"]["value"]
    assert baselines["number"] == "mean" and baselines["auroc"] == 1
    assert baselines["numbers"]["all numbers"]["auroc"] > 0.95
    for row in baselines["numbers"].values():
        difference = row["difference"]
        assert difference["value"] == pytest.approx(auroc - row["auroc"], abs=1e-6)
        assert difference["low"] <= difference["value"] <= difference["high"]
        better = "better" if difference["low"] > 0 else "better, but this may be chance"
        assert row["network_is"] == (better if difference["value"] > 0 else "NOT BETTER")
    assert "mean alone has AUROC 1.000" in screen and "NOT BETTER" in screen


def test_the_number_and_its_direction_are_chosen_without_the_test_images(run_evaluate, tmp_path):
    folder = draw_set(tmp_path / "set", {"train": (9, 9), "val": (3, 3)}, brightness=(90, 160))
    draw_set(folder, {"test": (8, 8)}, brightness=(160, 90), width=(16, 20), seed=1)
    assert run_evaluate("--data-dir", folder) == 0
    baselines = read_report(tmp_path / "results")["shortcut"]
    assert baselines["number"] == "mean" and baselines["auroc"] == 0
    assert baselines["fitted_on"] == 24
    assert baselines["numbers"]["width"]["auroc"] == 1  # better on test/, but not chosen


def test_without_training_images_the_report_says_why_there_is_no_baseline(
    run_evaluate, split_phantoms, tmp_path, capsys
):
    shutil.copytree(split_phantoms / "test", tmp_path / "data/test")
    assert run_evaluate("--data-dir", tmp_path / "data") == 0
    reason = read_report(tmp_path / "results")["shortcut"]["none"]
    assert "train" in reason and f"nothing to compare with ({reason})" in capsys.readouterr().out
