"""cxr/folds.py: cross-validation, its folds, and doubtful labels."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from helpers import TINY_FAST
from PIL import Image

import common
import train
from cxr.files import read_json
from cxr.folders import CLASSES
from cxr.folds import patient_folds
from cxr.patients import identify


def test_cross_validation_scores_held_out_images_and_writes_no_model(run_train, tmp_path, capsys):
    assert run_train("--folds", 4, "--repeats", 2) == 0
    found = json.loads((tmp_path / "results" / "cv.json").read_text())
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"]
    assert (found["folds"], found["repeats"], found["n"]) == (4, 2, 64)
    assert "the test images were not opened" in capsys.readouterr().out
    assert not (tmp_path / "model.pth").exists()


def test_cross_validation_does_not_leak_the_labels(run_train, data, tmp_path):
    """Where the features say nothing, held-out images are told no better than by chance."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in CLASSES:
            for path in (data / split / name).iterdir():
                noise = rng.integers(0, 255, (32, 32), dtype=np.uint8)
                common.PIL.Image.fromarray(noise).save(path)
    assert run_train("--folds", 4, "--repeats", 3, data=data) == 0
    found = json.loads((tmp_path / "results" / "cv.json").read_text())
    assert 0.3 < found["metrics"]["auroc"]["value"] < 0.7


def test_folds_never_separate_a_patient_and_spread_the_classes():
    names = [f"person{i // 3}_{'bacteria' if i % 3 else 'virus'}_{i}.jpeg" for i in range(60)]
    names += [f"IM-{i // 2:04d}-{i:04d}.jpeg" for i in range(60)]
    labels = torch.tensor([1.0] * 60 + [0.0] * 60)
    pairs = zip(names, labels, strict=True)
    images = [identify(Path("train", name), int(y), {}) for name, y in pairs]
    folds = patient_folds(images, labels, 5, seed=0)
    assert sorted(torch.cat(folds).tolist()) == list(range(120))
    patients = [{images[row].group for row in rows} for rows in folds]
    assert not any(a & b for i, a in enumerate(patients) for b in patients[:i])
    assert all(0.35 < labels[rows].mean() < 0.65 for rows in folds)
    again = patient_folds(images, labels, 5, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(folds, again, strict=True))


def test_too_few_patients_for_the_folds_are_one_line_and_2(run_train, capsys):
    assert run_train("--folds", 60) == 2
    assert "--folds 60" in capsys.readouterr().err.splitlines()[-1]


def test_flipped_labels_lead_the_table_of_doubtful_ones_and_val_is_not_needed(
    data, tmp_path, flags, capsys
):
    shutil.rmtree(data / "val")
    flipped = {sorted((data / "train" / name).iterdir())[3] for name in CLASSES}
    for path in flipped:
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / path.name)
    folds = "--folds", 4, "--repeats", 3
    assert train.main(flags(data, *TINY_FAST, *folds)) == 0
    screen, results = capsys.readouterr(), tmp_path / "results"
    assert "\r" not in screen.out + screen.err
    with open(results / "doubtful_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and {row["repeats"] for row in rows} == {"3"}
    losses = [float(row["mean_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert {Path(row["file"]).name for row in rows[:12]} >= {path.name for path in flipped}
    for row in rows:
        missed = (float(row["mean_probability"]) > 0.5) != (row["label"] == "PNEUMONIA")
        assert not missed or int(row["missed"]) > 0
    with Image.open(results / "doubtful_labels.png") as sheet:
        assert min(sheet.size) > 800
    assert read_json(results / "cv.json")["metrics"]["auroc"]["single_split"] is None
