"""cxr/shortcuts.py: one number of the file instead of the network."""

import io
import shutil
from argparse import Namespace

import numpy as np
import pytest
from helpers import read_report
from PIL import Image
from scipy.ndimage import gaussian_filter
from simulated import simulate

from cxr.folders import CLASSES
from cxr.leaks import list_training_xrays
from cxr.patients import read_split
from cxr.shortcuts import (
    fit_cut,
    image_numbers,
    is_alarming,
    make_folds,
    score_shift,
    score_shortcuts,
    single_number_baselines,
)


def test_the_numbers_of_an_image_are_those_of_its_file(tmp_path):
    pixels = np.tile(np.arange(100, dtype=np.uint8)[:, None], (1, 60))
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.jpeg", quality=83, subsampling=0)
    numbers, picture, scan = image_numbers(tmp_path / "a.jpeg", 224)
    assert (numbers["width"], numbers["height"]) == scan.size == (60, 100)
    assert numbers["bits a pixel"] == 24 and scan.format == "JPEG" and numbers["JPEG quality"] == 83
    assert numbers["file size"] == (tmp_path / "a.jpeg").stat().st_size
    assert numbers["mean"] == pytest.approx(49.5, abs=0.2)
    assert numbers["sharpness"] == pytest.approx(1, abs=0.1) and picture.mode == "L"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    numbers, _, scan = image_numbers(tmp_path / "a.png", 224)
    assert (numbers["bits a pixel"], numbers["JPEG quality"], scan.format) == (8, 0, "PNG")


# ---------------------------------------------------------------- on arrays


def test_a_cut_is_as_accurate_as_any_that_splits_the_values():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, 6, rng.integers(4, 12)).astype(float)
        labels = np.arange(len(values)) % 2
        if np.ptp(values) == 0:
            continue
        sign, cut = fit_cut(values, labels)
        cuts = [c + 0.5 for c in range(5) if values.min() < c + 0.5 < values.max()]
        best = max(((s * values > s * c) == labels).mean() for c in cuts for s in (1, -1))
        assert ((sign * values > sign * cut) == labels).mean() == best
    assert fit_cut(np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1])) == (1, 3.0)
    assert fit_cut(np.array([1.0, 2.0, 4.0]), np.array([1, 0, 0])) == (-1, 1.5)


def test_folds_never_share_a_patient_and_always_have_both_labels():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n = int(rng.integers(2, 30))
        patients = np.array([f"p{i}" for i in rng.integers(0, n, n)])
        labels = rng.integers(0, 2, n)
        labels[:2] = 0, 1
        folds = make_folds(labels, patients)
        for fit, held in folds:
            assert not set(patients[fit]) & set(patients[held])
            assert set(labels[fit]) == {0, 1}
        rows = [row for _, held in folds for row in held]
        assert len(set(rows)) == len(rows)


def null_data(rng, n_patients):
    """Three images a patient, alike, and nothing in them that tells the label."""
    rows = np.repeat(np.arange(n_patients), 3)
    pixels = rng.normal(size=(n_patients, 32, 32))[rows] + rng.normal(0, 0.3, (len(rows), 32, 32))
    pixels = gaussian_filter(pixels, (0, 3, 3)).reshape(len(rows), 1024)
    values = rng.normal(size=(n_patients, 6))[rows] + rng.normal(0, 0.3, (len(rows), 6))
    labels = (rng.permutation(n_patients) % 2)[rows]
    return {f"number {i}": values[:, i] for i in range(6)}, pixels, labels, rows.astype(str)


def test_alike_images_of_one_patient_raise_no_false_alarms():
    shortcuts = border = shift = 0
    for seed in range(15):
        numbers, pixels, labels, patients = null_data(np.random.default_rng(seed), 33)
        alone = np.ones(len(labels), bool)
        rows = score_shortcuts(numbers, pixels, labels, patients, alone)
        shortcuts += any(row["alarm"] for row in rows)
        border += any(row["alarm"] for row in rows if row["number"] == "3-pixel border")
        found = score_shift(numbers, pixels, labels == 1, patients)
        shift += any(is_alarming(each, labels, patients) for each in found.values())
    # counting images raises some alarm in half of such sets, and scoring the border where it was
    # fitted in three of four
    assert max(shortcuts, border, shift) <= 2


def test_a_number_that_tells_the_label_is_found_and_scored_on_the_other_side():
    numbers, pixels, labels, patients = null_data(np.random.default_rng(0), 60)
    numbers["number 0"] = numbers["number 0"] - 4 * labels
    numbers["constant"] = np.ones(len(labels))
    scored = np.isin(patients, [str(i) for i in range(30)])
    numbers["constant"][scored] = labels[scored]  # never splits where it is fitted
    rows = score_shortcuts(numbers, pixels, labels, patients, scored)
    assert [row["number"] for row in rows if row["alarm"]] == ["number 0"]
    assert rows[0]["rule"].startswith("<=") and rows[0]["n"] == 90
    assert rows[0]["auroc"] > 0.95 and rows[0]["accuracy"] > 0.9
    assert "constant" not in [row["number"] for row in rows]
    assert [row["auroc"] for row in rows] == sorted((row["auroc"] for row in rows), reverse=True)


# ---------------------------------------------------------------- in the report of evaluate.py


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


@pytest.mark.usefixtures("quick")
def test_a_good_network_is_rarely_called_no_better_than_random_numbers(tmp_path):
    folder = draw_set(tmp_path / "noise", {"train": (32, 8), "test": (48, 12)})
    images = read_split(folder, "test")["test"]
    rng, verdicts = np.random.default_rng(0), []
    for seed in range(6):
        (table,) = simulate(rng, 48, 12, apart=1.81)  # AUROC 0.90
        args = Namespace(data_dir=folder, split="test", seed=seed)
        training = list_training_xrays(folder, {})
        found = single_number_baselines(args, images, table, *training, 224)
        verdicts += [found["network_is"], found["numbers"]["all numbers"]["network_is"]]
    assert verdicts.count("NO BETTER") <= 1 and verdicts.count("better") >= 6


def test_a_planted_number_is_told_with_its_difference(run_evaluate, tmp_path, capsys):
    folder = draw_set(tmp_path / "set", {"train": (12, 12), "test": (10, 10)}, brightness=(90, 160))
    assert run_evaluate("--data-dir", folder) == 0
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


def test_the_number_and_its_direction_are_chosen_without_the_test_images(run_evaluate, tmp_path):
    folder = draw_set(tmp_path / "set", {"train": (9, 9), "val": (3, 3)}, brightness=(90, 160))
    draw_set(folder, {"test": (8, 8)}, brightness=(160, 90), width=(16, 20), seed=1)
    assert run_evaluate("--data-dir", folder) == 0
    found = read_report(tmp_path / "results")["shortcut"]
    assert found["number"] == "mean" and found["auroc"] == 0 and found["fitted_on"] == 24
    assert found["numbers"]["width"]["auroc"] == 1  # better on test, and not chosen


def test_without_training_images_there_is_a_note_and_no_number(
    run_evaluate, split_phantoms, tmp_path, capsys
):
    shutil.copytree(split_phantoms / "test", tmp_path / "data/test")
    assert run_evaluate("--data-dir", tmp_path / "data") == 0
    assert "none to compare with" in capsys.readouterr().out
    assert "train" in read_report(tmp_path / "results")["shortcut"]["none"]
