"""cxr/maps.py: class activation maps and their overlays."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import keep, plain_network, plain_pixels
from PIL import Image
from torch import nn
from torchvision.models import get_model

import common
import evaluate
from cxr.files import hash_file, write_json
from cxr.folders import list_images, list_split
from cxr.maps import class_maps


@pytest.mark.parametrize("arch", ["tinynet", "resnet18", "densenet121"])
def test_a_map_s_mean_over_the_positions_is_the_logit(arch):
    backbone = common.build_backbone(arch)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(backbone.width, 1).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    head.bias.fill_(0.7)
    model = evaluate.Model(backbone, torch.device("cpu"), head, {}, [])
    pixels = torch.randint(256, (2, 1, 96, 96), dtype=torch.uint8, generator=generator)
    maps = class_maps(model, pixels)
    with torch.no_grad():
        features = backbone.network(common.NORMALIZE(pixels))
        logits = head(features).squeeze(1)
    scale = maps.abs().max().item()
    assert maps.ndim == 3 and maps.shape[1] > 1 and maps.std() > 1e-3 * scale
    assert torch.allclose(maps.mean((1, 2)), logits, rtol=1e-3, atol=1e-3 * scale)


def test_cam_writes_an_overlay_of_every_image_orange_for_pneumonia_and_blue_for_normal(
    run_evaluate, trained, data, tmp_path
):
    keep(data, 3)
    assert run_evaluate("--data-dir", data, "--cam", tmp_path / "maps") == 0
    paths = [path for path, _ in list_split(data, "test")]
    found = {path.relative_to(tmp_path / "maps") for path in (tmp_path / "maps").rglob("*.*")}
    assert found == {Path(path.parent.name, f"{path.name}.png") for path in paths}
    network, seen = plain_network(trained / "model.pth"), {1: 0, -1: 0}
    for path in paths:
        with torch.no_grad():  # the map, written out
            last = network.relu(network.bn(network.conv(plain_pixels(path))))
            heat = (last * network.fc.weight.view(1, -1, 1, 1)).sum(1, keepdim=True)
            heat = nn.functional.interpolate(heat + network.fc.bias, (224, 224), mode="bilinear")
        with Image.open(tmp_path / "maps" / path.parent.name / f"{path.name}.png") as picture:
            assert picture.size == (448, 488) and picture.mode == "RGB"
            assert np.asarray(picture)[:40].min() < 100  # the caption
            map_ = picture.crop((0, 40, 448, 488)).resize((224, 224), Image.Resampling.BOX)
            red, _, blue = np.asarray(map_).astype(int).transpose(2, 0, 1)
        for sign in seen:
            strong = (sign * heat > 0.4 * heat.abs().max())[0, 0].numpy()
            assert (sign * (red - blue)[strong] > 20).all()
            seen[sign] += strong.sum()
    assert min(seen.values()) > 100  # both colours were there


def test_overlays_of_namesakes_do_not_overwrite_each_other(run_evaluate, split_phantoms, tmp_path):
    for i, path in enumerate(list_images(split_phantoms / "test/NORMAL")[:3]):
        (tmp_path / str(i)).mkdir()
        shutil.copy(path, tmp_path / str(i) / "scan.jpeg")
    assert run_evaluate(*(tmp_path / str(i) for i in range(3)), "--cam", tmp_path / "maps") == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "maps").iterdir()}
    assert found.keys() == {f"scan.jpeg{number}.png" for number in ("", "-2", "-3")}
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("place", ["test/NORMAL", "test", "train", "new"])
def test_overlays_are_refused_among_images(place, run_evaluate, data, tmp_path, capsys):
    keep(data, 2)
    shutil.copytree(data / "test/NORMAL", data / "new")
    before = sorted(path for path in data.rglob("*"))
    images = [data / "new"] if place == "new" else []
    assert run_evaluate(*images, "--data-dir", data, "--cam", data / place) == 2
    err = capsys.readouterr().err
    assert f"--cam {data / place}" in err and err.count("\n") == 1
    assert sorted(path for path in data.rglob("*")) == before
    assert not [*(tmp_path / "results").glob("*")]


def test_a_network_without_maps_is_refused_by_name_with_cam_and_draws_worst_without_them(
    run_evaluate, pictures, data, tmp_path, capsys
):
    keep(data, 3)
    torch.manual_seed(0)
    network = get_model("mobilenet_v3_small", num_classes=1)  # pooling, Linear, Linear
    torch.save(network.state_dict(), path := tmp_path / "model.pth")
    about = {"arch": "mobilenet_v3_small", "window": 2.0, "sha256": hash_file(path)}
    write_json(path.with_suffix(".json"), about)
    assert run_evaluate("--checkpoint", path, "--cam", tmp_path / "maps") == 2
    err = capsys.readouterr().err
    assert "mobilenet_v3_small" in err and "no maps" in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]
    assert run_evaluate("--data-dir", data, "--checkpoint", path) == 0
    with Image.open(tmp_path / "results/worst.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**20)}
    assert len(colours) > 50 and all(max(each) - min(each) < 3 for each in colours)  # grey alone
