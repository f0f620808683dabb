"""cxr/novelty.py: images unlike those of training."""

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image, ImageOps

import common
import evaluate
import train
from cxr.files import read_json
from cxr.patients import read_split
from cxr.predictions import read_predictions


def test_pictures_from_elsewhere_are_told_one_by_one_and_as_a_group(data, tmp_path, flags, capsys):
    assert train.main(flags(data, *TINY)) == evaluate.main(flags(data)) == 0
    report = read_json(tmp_path / "results" / "metrics.json")
    table = read_predictions(tmp_path / "results" / "predictions.csv")
    info = read_json(tmp_path / "model.json")["features"]
    mean, std = (np.array(info[name].split(), float) for name in ("mean", "std"))
    images = read_split(data, "test")["test"]
    network = common.build_backbone("tinynet").network
    pixels = torch.stack([v for i in images for v in common.Views([i], 1, 2.0)[0][1]])
    with torch.no_grad():
        z = (network(common.NORMALIZE(pixels)).numpy() - mean) / std
    expected = np.sqrt((z**2).mean(1)) / info["limit"]
    assert table.unlike == pytest.approx(expected, abs=2e-3)
    assert report["unlike"]["over"] == (table.unlike > 1).sum() and report["unlike"]["n"] == 24
    square = np.sqrt(max((z.mean(0) ** 2).mean() - 1 / 24, 0))
    assert report["unlike"]["shift"] == pytest.approx(square, abs=2e-3)
    assert not any("elsewhere" in warning for warning in report["warnings"])
    capsys.readouterr()

    for path in data.glob("test/*/*"):  # negatives
        ImageOps.invert(Image.open(path).convert("L")).save(path)
    assert evaluate.main(flags(data)) == 0
    report, page = read_json(tmp_path / "results" / "metrics.json"), capsys.readouterr()
    assert report["unlike"]["elsewhere"] and "these images come from elsewhere" in page.err
    assert "Images unlike those of training: " in page.out
    noise = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224), np.uint8)).save(noise)
    assert evaluate.main(flags(data, noise)) == 0
    assert "unlike the training images (" in capsys.readouterr().out
