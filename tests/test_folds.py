"""cxr/folds.py: cross-validation, its folds, and doubtful labels."""

import shutil
from pathlib import Path

import numpy as np
import torch
from helpers import TINY_FAST, read_rows
from PIL import Image

import train
from cxr.files import read_json
from cxr.folders import CLASSES
from cxr.folds import patient_folds
from cxr.patients import identify


def test_cross_validation_scores_held_out_images_and_writes_no_model(run_train, tmp_path, capsys):
    assert run_train("--folds", 4, "--repeats", 2) == 0
    report = read_json(tmp_path / "results" / "cv.json")
    accuracy = report["metrics"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"]
    assert (report["folds"], report["repeats"], report["n"]) == (4, 2, 64)
    assert "the test images were not used" in capsys.readouterr().out
    assert not (tmp_path / "model.pth").exists()


def test_cross_validation_scores_noise_no_better_than_chance(run_train, data, tmp_path):
    rng = np.random.default_rng(1)
    for path in [*data.glob("train/*/*"), *data.glob("val/*/*")]:
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(path)
    assert run_train("--folds", 4, "--repeats", 3, data=data) == 0
    auroc = read_json(tmp_path / "results" / "cv.json")["metrics"]["auroc"]
    assert 0.3 < auroc["value"] < 0.7


def test_folds_depend_on_the_seed_keep_patients_together_and_have_both_classes():
    # 60 images of each class; a patient has three with PNEUMONIA or two without.
    names = [f"person{i // 3}_{'bacteria' if i % 3 else 'virus'}_{i}.jpeg" for i in range(60)]
    normal = [f"IM-{i // 2:04d}-{i:04d}.jpeg" for i in range(60)]
    pairs = [(name, 1) for name in names] + [(name, 0) for name in normal]
    xrays = [identify(Path("train", name), label, "train", {}) for name, label in pairs]
    labels = torch.tensor([float(xray.label) for xray in xrays])
    folds = patient_folds(xrays, labels, 5, seed=0)
    assert sorted(torch.cat(folds).tolist()) == list(range(120))
    patients = [{xrays[row].group for row in rows} for rows in folds]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 50
    assert all(0.35 < labels[rows].mean() < 0.65 for rows in folds)
    pairs = zip(folds, patient_folds(xrays, labels, 5, seed=1), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_more_folds_than_patients_are_refused(run_train, capsys):
    assert run_train("--folds", 60) == 2
    assert "--folds 60" in capsys.readouterr().err.splitlines()[-1]


def test_flipped_labels_are_at_the_top_of_doubtful_labels_without_val(
    data, tmp_path, flags, capsys
):
    shutil.rmtree(data / "val")
    flipped = {sorted((data / "train" / name).iterdir())[3] for name in CLASSES}
    for path in flipped:
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / path.name)
    assert train.main(flags(data, *TINY_FAST, "--folds", 4, "--repeats", 3)) == 0
    screen, results = capsys.readouterr(), tmp_path / "results"
    assert "\r" not in screen.out + screen.err
    rows = read_rows(results / "doubtful_labels.csv")
    assert len(rows) == 40 and {row["repeats"] for row in rows} == {"3"}
    numbers = [next(iter(row.values())) for row in rows]  # of the first column
    assert numbers == [row["number"] for row in rows] == [*map(str, range(1, 41))]
    losses = [float(row["mean_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert {Path(row["file"]).name for row in rows[:12]} >= {path.name for path in flipped}
    for row in rows:
        missed = (float(row["mean_probability"]) > 0.5) != (row["label"] == "PNEUMONIA")
        assert not missed or int(row["missed"]) > 0
    with Image.open(results / "doubtful_labels.png") as sheet:
        assert min(sheet.size) > 800
    assert read_json(results / "cv.json")["metrics"]["auroc"]["single_split"] is None
