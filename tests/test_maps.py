"""cxr/maps.py: class activation maps and their overlays."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import keep, plain_network, plain_pixels, read_rows, snapshot
from PIL import Image
from torch import nn
from torchvision.models import get_model

import common
import evaluate
from cxr.files import hash_file, write_json
from cxr.folders import list_images
from cxr.maps import class_maps


@pytest.mark.parametrize("arch", ["tinynet", "resnet18", "densenet121"])
def test_the_mean_of_a_map_over_its_positions_is_the_logit(arch):
    backbone = common.build_backbone(arch)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(backbone.width, 1).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    head.bias.fill_(0.7)
    model = evaluate.Model(backbone, torch.device("cpu"), head, {}, [])
    pixels = torch.randint(256, (2, 1, 96, 96), dtype=torch.uint8, generator=generator)
    maps = class_maps(model, pixels)
    with torch.no_grad():
        logits = head(backbone.network(common.NORMALIZE(pixels))).squeeze(1)
    scale = maps.abs().max().item()
    assert maps.ndim == 3 and maps.shape[1] > 1 and maps.std() > 1e-3 * scale
    assert torch.allclose(maps.mean((1, 2)), logits, rtol=1e-3, atol=1e-3 * scale)


def test_cam_draws_orange_for_pneumonia_and_blue_for_normal(run_evaluate, trained, data, tmp_path):
    keep(data, 3)
    assert run_evaluate("--data-dir", data, "--cam", tmp_path / "maps") == 0
    rows = read_rows(tmp_path / "results/predictions.csv")
    maps = {data / r["file"]: Path(r["label"], f"map_{r['number']}.png") for r in rows}
    written = {path.relative_to(tmp_path / "maps") for path in (tmp_path / "maps").rglob("*.*")}
    assert written == {*maps.values()} and len(written) == 6
    network, n_pixels = plain_network(trained / "model.pth"), {1: 0, -1: 0}
    for path in maps:
        with torch.no_grad():  # the map without our code
            last = network.relu(network.bn(network.conv(plain_pixels(path))))
            heat = (last * network.fc.weight.view(1, -1, 1, 1)).sum(1, keepdim=True)
            heat = nn.functional.interpolate(heat + network.fc.bias, (224, 224), mode="bilinear")
        with Image.open(tmp_path / "maps" / maps[path]) as picture:
            assert picture.size == (448, 488) and picture.mode == "RGB"
            assert np.asarray(picture)[:40].min() < 100  # the caption
            map_ = picture.crop((0, 40, 448, 488)).resize((224, 224), Image.Resampling.BOX)
            red, _, blue = np.asarray(map_).astype(int).transpose(2, 0, 1)
        for sign in n_pixels:
            strong = (sign * heat > 0.4 * heat.abs().max())[0, 0].numpy()
            assert (sign * (red - blue)[strong] > 20).all()
            n_pixels[sign] += strong.sum()
    assert min(n_pixels.values()) > 100  # both colours occur


def test_overlays_of_images_with_one_name_are_all_kept(run_evaluate, split_phantoms, tmp_path):
    for i, path in enumerate(list_images(split_phantoms / "test/NORMAL")[:3]):
        (folder := tmp_path / str(i)).mkdir()
        shutil.copy(path, folder / "scan.jpeg")
    assert run_evaluate(*sorted(tmp_path.glob("?")), "--cam", tmp_path / "maps") == 0
    contents = {path.name: path.read_bytes() for path in (tmp_path / "maps").iterdir()}
    assert contents.keys() == {"map_1.png", "map_2.png", "map_3.png"}
    assert len(set(contents.values())) == 3


def test_maps_of_an_earlier_run_are_removed_and_other_files_stay(
    run_evaluate, split_phantoms, tmp_path
):
    images, maps = list_images(split_phantoms / "test/NORMAL")[:3], tmp_path / "maps"
    assert run_evaluate(*images, "--cam", maps) == 0
    (maps / "notes.txt").write_text("mine")
    assert run_evaluate(images[2], "--cam", maps) == 0
    assert {path.name for path in maps.iterdir()} == {"map_1.png", "notes.txt"}


@pytest.mark.parametrize("folder", ["test/NORMAL", "test", "train", "new"])
def test_a_folder_of_images_is_refused_for_overlays(folder, run_evaluate, data, tmp_path, capsys):
    shutil.copytree(data / "test/NORMAL", data / "new")
    before, images = snapshot(data), [data / "new"] * (folder == "new")
    assert run_evaluate(*images, "--data-dir", data, "--cam", data / folder) == 2
    err = capsys.readouterr().err
    assert f"--cam {data / folder}" in err and err.count("\n") == 1
    assert snapshot(data) == before
    assert not [*(tmp_path / "results").glob("*")]


def test_a_network_without_maps_has_no_overlays_and_a_grey_picture_of_the_worst_images(
    run_evaluate, pictures, data, tmp_path, capsys
):
    torch.manual_seed(0)
    network = get_model("mobilenet_v3_small", num_classes=1)  # ends in pooling and two layers
    torch.save(network.state_dict(), path := tmp_path / "model.pth")
    info = {"arch": "mobilenet_v3_small", "window": 2.0, "sha256": hash_file(path)}
    write_json(path.with_suffix(".json"), info)
    keep(data, 1)  # one image of each class is enough
    flags = "--data-dir", data, "--checkpoint", path
    assert run_evaluate(*flags, "--cam", tmp_path / "maps") == 2
    err = capsys.readouterr().err
    assert "mobilenet_v3_small has no class activation maps" in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]
    assert run_evaluate(*flags) == 0
    with Image.open(tmp_path / "results/worst.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**20)}
    assert len(colours) > 50 and all(max(colour) - min(colour) < 3 for colour in colours)
