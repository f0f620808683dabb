"""cxr/checkpoint.py: what is saved and what is read, whoever wrote it; the ImageNet weights."""

import contextlib
import errno
import hashlib
import http.client
import io
import re
import socket
import struct
import urllib.error
from argparse import Namespace
from functools import partial

import faults
import numpy as np
import pytest
import torch
import torchvision
from faults import damage, put, within
from helpers import ROOT, TINY, read_about, read_probs, read_report
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models import get_model

import common
import cxr.checkpoint
import evaluate
import train
from cxr.files import write_json
from cxr.folders import list_images
from cxr.patients import read_split
from cxr.predictions import read_predictions

# ---------------------------------------------------------------- ours


def test_the_checkpoint_loads_strictly_into_torchvision_and_gives_the_validation_loss(
    run_train, split_phantoms, tmp_path
):
    assert run_train("--arch", "resnet18", "--views", 1, "--epochs", 5, "--no-calibrate") == 0
    network = get_model("resnet18")
    network.fc = nn.Linear(512, 1)
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    network.eval()
    images = read_split(split_phantoms, "val")["val"]
    to_pixels = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]
    )
    pictures = [common.load_image(image.path, 2).convert("RGB") for image in images]
    with torch.no_grad():
        logits = network(torch.stack([to_pixels(picture) for picture in pictures])).flatten()
    labels = torch.tensor([float(image.label) for image in images])
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    assert loss == pytest.approx(read_about(tmp_path)["val_loss"], abs=1e-4)
    assert (read_about(tmp_path)["slope"], read_about(tmp_path)["intercept"]) == (1, 0)


def test_a_model_json_of_another_model_is_not_believed(
    run_evaluate, remake, scored, tmp_path, capsys
):
    known = dict(sha256="0" * 64, threshold=0.9, slope=3.0, epoch=77, images={})
    assert run_evaluate("--checkpoint", remake(**known)) == 0
    report = read_report(tmp_path / "results")
    assert "DOES NOT BELONG" in report["warnings"][0]
    assert "DOES NOT BELONG" in capsys.readouterr().err
    assert report["threshold"] == 0.5 and report["calibration"]["platt"]["slope"] == 1
    assert report["model"]["epoch"] is None and report["model"]["arch"] == "tinynet"
    again, before = (read_probs(f / "predictions.csv") for f in (tmp_path / "results", scored[0]))
    assert again == before  # the window is taken from it


def test_a_record_of_something_else_is_told(data, tmp_path, flags, capsys):
    assert train.main(flags(data, *TINY)) == 0
    write_json(tmp_path / "model.json", {"images": 3})
    assert evaluate.main(flags(data)) == 2
    assert "model.json: not about a model" in capsys.readouterr().err


# ---------------------------------------------------------------- other people's


def test_a_bare_state_dict_is_a_resnet50_without_a_window_with_a_note(
    run_evaluate, data, tmp_path, capsys
):
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    network.fc = nn.Linear(2048, 1)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    paths = list_images(data / "test/NORMAL")[:2]
    assert run_evaluate(*paths, "--checkpoint", tmp_path / "bare.pth", "--no-cache") == 0
    assert "taken for a resnet50" in (err := capsys.readouterr().err) and "no window" in err
    probs = read_probs(tmp_path / "results/new_predictions.csv")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (common.MEAN, common.STD))
    network.eval()
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            expected = network((pixels[None] / 255 - mean) / std).sigmoid().item()
        assert probs[str(path)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("1000 outputs", "found 1000 of (8,)"), ("another network", ""), ("text", "checkpoint")],
)
def test_a_file_that_is_no_such_checkpoint_is_refused(
    kind, words, run_evaluate, remake, tmp_path, capsys
):
    path = remake(arch="resnet18") if kind == "another network" else remake()
    if kind == "1000 outputs":
        outputs = {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
        torch.save(torch.load(path) | outputs, path)
    elif kind == "text":
        path.write_text("no checkpoint")
    assert run_evaluate("--checkpoint", path) == 2
    err = capsys.readouterr().err
    assert words in err and str(path) in err and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


WRAPPED = {
    "DataParallel": lambda s: {f"module.{key}": value for key, value in s.items()},
    "compiled": lambda s: {"model": {f"_orig_mod.{key}": value for key, value in s.items()}},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "with an optimizer": lambda s: {
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{}]},
    },
    "backbone and head": lambda s: {
        key if key.startswith("fc") else f"backbone.{key}": value for key, value in s.items()
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_checkpoint_in_a_known_wrapping_is_taken_as_the_plain_one(kind, data, tmp_path, flags):
    network = torchvision.models.get_model("tinynet")
    network.fc = nn.Linear(8, 1)
    probs = []
    for name, state in (
        ("plain", network.state_dict()),
        (kind, WRAPPED[kind](network.state_dict())),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
        more = "--checkpoint", tmp_path / f"{name}.pth", "--arch", "tinynet"
        assert evaluate.main(flags(data, *more, "--results-dir", tmp_path / name)) == 0
        table = read_predictions(tmp_path / name / "predictions.csv")
        probs.append(table.probs)
        weights = "--weights", tmp_path / f"{name}.pth", "--epochs", 1
        assert train.main(flags(data, *TINY, *weights)) == 0
        probs.append(torch.load(tmp_path / "model.pth")["fc.weight"].numpy())
    assert (probs[0] == probs[2]).all() and (probs[1] == probs[3]).all()


@pytest.mark.parametrize(
    "head",
    [nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))],
    ids=["two outputs", "two layers"],
)
def test_any_head_is_left_out_of_weights_and_named_where_it_should_score(
    head, data, tmp_path, flags, capsys
):
    network = get_model("tinynet")
    network.fc = head
    torch.save(network.state_dict(), tmp_path / "other.pth")
    assert train.main(flags(data, *TINY, "--weights", tmp_path / "other.pth")) == 0
    more = "--arch", "tinynet", "--checkpoint", tmp_path / "other.pth"
    assert evaluate.main(flags(data, *more)) == 2
    assert f"--weights {tmp_path / 'other.pth'} trains a new one" in capsys.readouterr().err


def test_what_is_no_state_dict_is_refused_with_the_remedy(data, tmp_path, flags, capsys):
    def told(path, *more):
        assert evaluate.main(flags(data, "--checkpoint", path, *more)) == 2
        return capsys.readouterr().err

    network = torchvision.models.get_model("tinynet")
    network.fc = nn.Linear(8, 1)
    torch.save(network, tmp_path / "whole.pth")
    assert "torch.save(model.state_dict(), FILE)" in told(tmp_path / "whole.pth")
    header = b'{"__metadata__":{}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "safetensors.torch.load_file('a.safetensors')" in told(tmp_path / "a.safetensors")
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert "taken for a resnet50 (--arch)" in told(tmp_path / "bare.pth")
    assert train.main(flags(data, *TINY)) == 0
    assert "model.json says tinynet" in told(tmp_path / "model.pth", "--arch", "resnet18")


# ---------------------------------------------------------------- damaged and hostile


def test_a_damaged_checkpoint_is_refused_or_harmless(fuzz, run_script, home, say):
    path, table, count, harmless = home / "model.pth", "predictions.csv", fuzz.count(100, 1000), 0
    intact, expected = path.read_bytes(), faults.columns((home / "results" / table).read_bytes())
    start = intact.index(b"data.pkl") + 8
    stop = intact.index(b"PK", start)
    for i in range(count):
        how, content = damage(fuzz.rng, intact)
        if i % 4 == 0:  # in the pickle, whatever else the file holds
            how, part = damage(fuzz.rng, intact[start:stop])
            content = intact[:start] + part + intact[stop:]
        path.write_bytes(content)
        (home / "results" / table).unlink(missing_ok=True)
        with within(20):
            status, lines = run_script("evaluate")
        if status:
            assert status == 2 and len(lines) == 1 and f"{path}: " in lines[0], (how, lines)
        else:
            found = faults.columns((home / "results" / table).read_bytes())
            assert found == expected, how
            harmless += 1
    assert harmless < count / 5
    say(f"checkpoints: {count} damaged ones tried, {harmless} bit-equal, the others refused")


@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_checkpoint_is_ever_code(variable, refused, home, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "1")
    proof, path = home / "executed", home / "hostile.pth"
    for name, content in faults.hostile(proof).items():
        path.write_bytes(content)
        for script, flag in (("train", "--weights"), ("evaluate", "--checkpoint")):
            line = refused(2, script, flag, path)
            assert f"{path}: not a readable checkpoint" in line and "weights_only" not in line
        assert not proof.exists(), name
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(faults.hostile(proof)["zip"]), weights_only=False)
    assert proof.exists()  # they are hostile indeed


@pytest.mark.filterwarnings("ignore")
def test_an_absurd_checkpoint_is_one_line_and_2(refused, home):
    path = home / "model.pth"
    contents = {"html": b"<!DOCTYPE html><p>404", "nothing": b"", "text": b"weights\n"}
    for name, content in faults.absurd(torch.load(path, weights_only=True)).items():
        contents[name] = faults.saved(content)
    for name, content in contents.items():
        path.write_bytes(content)
        with within(20):
            assert f"{path}: " in refused(2, "evaluate"), name
    for missing in (home, home / "nowhere.pth"):
        assert f"{missing}: no such file" in refused(2, "train", "--weights", missing)


def test_the_version_of_torch_is_one_without_known_holes():
    text = (ROOT / "requirements.txt").read_text()
    found = re.search(r"^torch>=(\d+)\.(\d+)$", text, re.M)
    assert tuple(map(int, found.groups())) >= (2, 10)  # CVE-2025-32434, CVE-2026-24747


# ---------------------------------------------------------------- the ImageNet weights


@pytest.fixture
def published(tmp_path, monkeypatch):
    """ImageNet weights of the tiny network: .source to download, .path in the cache, .url."""
    content = faults.saved(common.build_backbone("tinynet").network.state_dict())
    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    source, path = tmp_path / name, tmp_path / "torch" / "hub" / "checkpoints" / name
    put(source, content)
    weights = Namespace(DEFAULT=Namespace(url=source.as_uri()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(cxr.checkpoint, "get_model_weights", lambda arch: weights)
    return Namespace(source=source, path=path, url=source.as_uri())


def test_cached_weights_that_are_not_the_published_ones_are_refused(
    refused, run_script, home, published
):
    content, path, imagenet = published.source.read_bytes(), published.path, "--weights=imagenet"
    assert run_script("train", imagenet) == (0, []) and path.read_bytes() == content
    for bad in (b"", content[:-1], b"x" + content[1:], faults.hostile(home / "x")["zip"]):
        path.write_bytes(bad)
        line = refused(2, "train", imagenet)
        assert f"{path}: " in line and "SHA-256" in line and "--weights FILE" in line
        assert path.read_bytes() == bad and not (home / "x").exists()


def test_a_cached_resnet50_of_other_weights_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    put(path, faults.saved({"fc.bias": torch.zeros(1000)}))
    line = refused(2, "train", "--weights", "imagenet", "--arch", "resnet50")
    assert f"{path}: " in line and "SHA-256" in line


HTTP = partial(urllib.error.HTTPError, "http://127.0.0.1:9", hdrs={}, fp=None)


DOWNLOADS = {
    "no such host": (urllib.error.URLError("Name or service not known"), 2),
    "404": (HTTP(code=404, msg="Not Found"), 2),
    "503": (HTTP(code=503, msg="Service Unavailable"), 2),
    "stalled": (TimeoutError("timed out"), 2),
    "cut": (http.client.IncompleteRead(b"half", 9), 2),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 4),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_that_fails_names_the_address_the_file_and_the_flag(
    name, refused, published, monkeypatch
):
    error, status = DOWNLOADS[name]

    def download(*_, **__):
        assert 0 < socket.getdefaulttimeout() <= 30  # a server that stalls would hang for ever
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    line = refused(status, "train", "--weights", "imagenet")
    assert all(part in line for part in (published.url, str(published.path), "--weights FILE"))
    assert socket.getdefaulttimeout() is None


def test_another_file_at_the_address_is_not_kept(refused, published):
    published.source.write_bytes(b"<html>Sign in to this network")
    assert published.url in refused(2, "train", "--weights", "imagenet")
    assert not [*published.path.parent.iterdir()]
