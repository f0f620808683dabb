"""cxr/novelty.py: images unlike the training images."""

import numpy as np
import pytest
import torch
from helpers import plain_pixels, read_report
from PIL import Image, ImageOps

import common
from cxr.files import read_json
from cxr.folders import CLASSES, list_split
from cxr.predictions import read_predictions


def test_novelty_is_the_distance_over_its_limit(scored, trained, split_phantoms):
    training = read_json(trained / "model.json")["features"]
    mean, std = (np.array(training[name].split(), float) for name in ("mean", "std"))
    network = common.build_backbone("tinynet").network
    pixels = torch.cat(
        [plain_pixels(path) for path, _ in list_split(split_phantoms, "test", CLASSES)]
    )
    with torch.no_grad():
        z = (network(pixels).numpy() - mean) / std
    distances = np.sqrt((z**2).mean(1)) / training["limit"]
    novelty = read_predictions(scored[0] / "predictions.csv", CLASSES)["unlike"]
    group = read_report(scored[0])["unlike"]
    assert novelty.to_numpy() == pytest.approx(distances, abs=2e-3)
    assert group["over"] == (novelty > 1).sum() and group["n"] == 24
    shift = np.sqrt(max((z.mean(0) ** 2).mean() - 1 / 24, 0))
    assert group["shift"] == pytest.approx(shift, abs=2e-3)
    assert not group["elsewhere"]


def test_negatives_are_detected_as_a_group_and_noise_alone(run_evaluate, data, tmp_path, capsys):
    for path in data.glob("test/*/*"):
        ImageOps.invert(Image.open(path).convert("L")).save(path)
    assert run_evaluate("--data-dir", data) == 0
    group, captured = read_report(tmp_path / "results")["unlike"], capsys.readouterr()
    assert group["elsewhere"] and "another source" in captured.err
    assert f"Images unlike the training images: {group['over']} of 24" in captured.out
    noise = np.random.default_rng(0).integers(0, 256, (224, 224), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert run_evaluate(tmp_path / "noise.png") == 0
    assert "unlike the training images (" in capsys.readouterr().out
