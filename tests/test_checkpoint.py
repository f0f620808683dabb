"""cxr/checkpoint.py: what is saved, what can be read, and the ImageNet weights."""

import contextlib
import errno
import hashlib
import http.client
import io
import re
import socket
import sys
import urllib.error
from argparse import Namespace
from functools import partial

import faults
import numpy as np
import pytest
import safetensors.torch
import torch
from faults import damage, put, within
from helpers import ROOT, plain_pixels, read_about, read_probs, read_report
from PIL import Image
from torch import nn
from torchvision.models import get_model

import common
import cxr.checkpoint
from cxr.files import hash_file, read_json, write_json
from cxr.folders import CLASSES, list_images
from cxr.patients import read_split


def test_a_checkpoint_in_torchvision_has_the_validation_loss(run_train, split_phantoms, tmp_path):
    assert run_train("--arch", "resnet18", "--views", 1, "--epochs", 5, "--no-calibrate") == 0
    network = get_model("resnet18")
    network.fc = nn.Linear(512, 1)
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    xrays = read_split(split_phantoms, "val", classes=CLASSES)
    with torch.no_grad():
        pixels = torch.cat([plain_pixels(xray.path) for xray in xrays])
        logits = network.eval()(pixels).flatten()
    labels = torch.tensor([float(xray.label) for xray in xrays])
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    model = read_about(tmp_path)
    assert loss == pytest.approx(model["val_loss"], abs=1e-4)
    assert (model["slope"], model["intercept"]) == (1, 0)


def test_of_a_model_json_of_another_model_only_arch_and_window_are_used(
    run_evaluate, remake, scored, tmp_path, capsys
):
    info = dict(sha256="0" * 64, threshold=0.9, slope=3.0, epoch=77, images={})
    assert run_evaluate("--checkpoint", remake(**info)) == 0
    report = read_report(tmp_path / "results")
    assert "DOES NOT BELONG" in report["warnings"][0] and "Copy the two" in report["warnings"][0]
    assert "DOES NOT BELONG" in capsys.readouterr().err
    assert report["threshold"] == 0.5 and report["calibration"]["platt"]["slope"] == 1
    assert report["model"]["epoch"] is None and report["model"]["arch"] == "tinynet"
    expected = read_probs(scored[0] / "predictions.csv")  # with the window of model.json
    assert read_probs(tmp_path / "results" / "predictions.csv") == expected


def test_a_model_json_that_does_not_fit_is_refused(run_evaluate, remake, tmp_path, capsys):
    path = remake(arch="resnet18")
    assert run_evaluate("--checkpoint", path) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    assert run_evaluate("--arch", "resnet18") == 2
    assert "model.json says tinynet" in capsys.readouterr().err
    write_json(path.with_suffix(".json"), {"images": 3})
    assert run_evaluate("--checkpoint", path) == 2
    assert "model.json: does not describe a model" in capsys.readouterr().err
    assert not [*(tmp_path / "results").glob("*")]


def test_a_state_dict_without_model_json_is_read_as_a_resnet50_without_window_with_a_warning(
    run_evaluate, split_phantoms, tmp_path, capsys
):
    torch.manual_seed(0)
    network = get_model("resnet50")
    network.fc = nn.Linear(2048, 1)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    paths = list_images(split_phantoms / "test/NORMAL")[:2]
    assert run_evaluate(*paths, "--checkpoint", tmp_path / "bare.pth", "--no-cache") == 0
    error = capsys.readouterr().err
    assert (
        "read as a resnet50 (for another: --arch NAME" in error and "grey levels unchanged" in error
    )
    probs = read_probs(tmp_path / "results/new_predictions.csv")
    mean, std = torch.tensor(common.MEAN), torch.tensor(common.STD)
    network.eval()
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))) / 255
        with torch.no_grad():
            logit = network(((pixels - mean) / std).permute(2, 0, 1)[None])
        assert probs[str(path)] == pytest.approx(logit.sigmoid().item(), abs=1e-3)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = get_model("tinynet")
    network.fc = nn.Linear(8, 1)
    return network


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
def test_a_wrapped_checkpoint_is_read_like_the_plain_one(
    kind, network, run_evaluate, run_train, split_phantoms, tmp_path
):
    path, images, probs, heads = tmp_path / "x.pth", split_phantoms / "test" / "NORMAL", [], []
    for wrap in (dict, WRAPPED[kind]):
        torch.save(wrap(network.state_dict()), path)
        assert run_evaluate(images, "--arch", "tinynet", "--checkpoint", path) == 0
        probs.append(read_probs(tmp_path / "results" / "new_predictions.csv"))
        assert run_train("--weights", path, "--epochs", 1) == 0
        heads.append(torch.load(tmp_path / "model.pth")["fc.weight"])
    assert len(probs[0]) == 12 and probs[0] == probs[1]
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (nn.Linear(8, 2), "[(2, 8), (2,)]"),
        (nn.Linear(8, 1000), "[(1000, 8), (1000,)]"),
        (nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)), "[None, None]"),
    ],
)
def test_another_head_is_ignored_in_weights_and_refused_in_a_checkpoint(
    head, shapes, network, run_train, run_evaluate, tmp_path, capsys
):
    network.fc, path = head, tmp_path / "other.pth"
    torch.save(network.state_dict(), path)
    assert run_train("--weights", path, "--epochs", 1) == 0
    assert run_evaluate("--arch", "tinynet", "--checkpoint", path) == 2
    error = capsys.readouterr().err
    assert f"found weight and bias {shapes}" in error
    assert f"train.py --weights {path} (make: WEIGHTS={path}) trains a new one" in error


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_safetensors_file_is_read_like_a_file_of_torch_whatever_its_suffix(
    name, trained, scored, run_evaluate, run_train, tmp_path, capsys
):
    state, path = torch.load(trained / "model.pth"), tmp_path / name
    safetensors.torch.save_file(state, path)
    info = read_json(trained / "model.json") | {"sha256": hash_file(path)}
    write_json(tmp_path / "x.json", info)
    assert run_evaluate("--checkpoint", path) == 0 and capsys.readouterr().err == ""
    probs = read_probs(tmp_path / "results" / "predictions.csv")
    assert probs == read_probs(scored[0] / "predictions.csv")
    heads = []
    for weights in (trained / "model.pth", path):
        assert run_train("--weights", weights, "--epochs", 1) == 0
        heads.append(torch.load(tmp_path / "model.pth")["fc.weight"])
    assert torch.equal(*heads)


def test_a_safetensors_file_without_its_package_names_the_command(refused, home, monkeypatch):
    path = home / "x.safetensors"
    safetensors.torch.save_file(torch.load(home / "model.pth"), path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for script, flag in (("train", "--weights"), ("evaluate", "--checkpoint")):
        line = refused(2, script, flag, path)
        assert f"{path}: " in line and ".venv/bin/pip install safetensors" in line


@pytest.mark.parametrize("name", ["nan", "negative variance", "missing key", "no head"])
def test_an_absurd_safetensors_file_is_refused(name, refused, home):
    path = home / "x.safetensors"
    absurd = faults.absurd(torch.load(home / "model.pth"))[name]
    safetensors.torch.save_file(absurd, path)
    assert f"{path}: " in refused(2, "evaluate", "--checkpoint", path, "--arch", "tinynet")


def test_a_damaged_safetensors_file_is_refused_or_read(fuzz, network, run_script, home, say):
    path, count, n_read = home / "x.safetensors", fuzz.count(15, 400), 0
    intact = safetensors.torch.save(network.state_dict())
    contents = {"html": b"<!DOCTYPE html><p>404", "nothing": b"", "text": b"weights\n"}
    contents |= {"one byte short": intact[:-1], "of torch": faults.saved(network.state_dict())}
    contents |= dict(damage(fuzz.rng, intact) for _ in range(count))
    for how, content in contents.items():
        path.write_bytes(content)
        with within(20):
            status, lines = run_script("evaluate", "--checkpoint", path, "--arch", "tinynet")
        if status:
            assert len(lines) == 1, (how, lines)
            # The format has no checksum, so very large numbers may be read.
            assert f"{path}: " in lines[0] if status == 2 else status == 3, (how, lines)
        n_read += status == 0
    assert n_read < count
    say(f"safetensors: {len(contents)} damaged files tried, {n_read} read, the others refused")


@pytest.mark.parametrize(
    ("name", "save", "remedy"),
    [
        ("whole.pth", faults.saved, "torch.save(model.state_dict(), FILE)"),
        ("tiny.pth", lambda x: faults.saved(x.state_dict()), "read as a resnet50 (for another"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_a_remedy(
    name, save, remedy, network, run_evaluate, tmp_path, capsys
):
    put(tmp_path / name, save(network))
    assert run_evaluate("--checkpoint", tmp_path / name) == 2
    assert remedy in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_or_harmless(fuzz, run_script, home, say):
    path, table, count, harmless = home / "model.pth", "predictions.csv", fuzz.count(50, 1000), 0
    intact, expected = path.read_bytes(), faults.columns((home / "results" / table).read_bytes())
    start = intact.index(b"data.pkl") + 8
    stop = intact.index(b"PK", start)
    for i in range(count):
        how, content = damage(fuzz.rng, intact)
        if i % 4 == 0:  # in the pickle, a small part of the file
            how, part = damage(fuzz.rng, intact[start:stop])
            content = intact[:start] + part + intact[stop:]
        path.write_bytes(content)
        (home / "results" / table).unlink(missing_ok=True)
        with within(20):
            status, lines = run_script("evaluate")
        if status:
            assert status == 2 and len(lines) == 1 and f"{path}: " in lines[0], (how, lines)
        else:
            assert faults.columns((home / "results" / table).read_bytes()) == expected, how
            harmless += 1
    assert harmless < count / 5
    say(f"checkpoints: {count} damaged ones tried, {harmless} bit-equal, the others refused")


@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_code_in_a_checkpoint_is_never_executed(variable, refused, home, monkeypatch):
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
    assert proof.exists()  # so the file is really hostile


@pytest.mark.filterwarnings("ignore")
def test_an_absurd_checkpoint_is_refused(refused, home):
    path = home / "model.pth"
    absurd = faults.absurd(torch.load(path, weights_only=True))
    contents = {name: faults.saved(value) for name, value in absurd.items()}
    contents |= {"html": b"<!DOCTYPE html><p>404", "nothing": b"", "text": b"weights\n"}
    for name, content in contents.items():
        path.write_bytes(content)
        with within(20):
            assert f"{path}: " in refused(2, "evaluate"), name


def test_the_required_torch_has_no_known_security_holes():
    text = (ROOT / "requirements.txt").read_text()
    version = re.search(r"^torch>=(\d+)\.(\d+)", text, re.M).groups()
    assert tuple(map(int, version)) >= (2, 10)  # CVE-2025-32434, CVE-2026-24747


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


def test_missing_weights_are_downloaded_but_no_other_file_is_kept(run_script, refused, published):
    assert run_script("train", "--weights", "imagenet") == (0, [])
    assert published.path.read_bytes() == published.source.read_bytes()
    published.path.unlink()
    published.source.write_bytes(b"<html>Sign in to this network")
    assert published.url in refused(2, "train", "--weights", "imagenet")
    assert not [*published.path.parent.iterdir()]


WRONG_WEIGHTS = {
    "empty": lambda content, proof: b"",
    "cut off": lambda content, proof: content[:-1],
    "changed": lambda content, proof: b"x" + content[1:],
    "hostile": lambda content, proof: faults.hostile(proof)["zip"],
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_weights_in_the_cache_that_were_not_published_are_refused(kind, refused, home, published):
    proof, path = home / "executed", published.path
    wrong = WRONG_WEIGHTS[kind](published.source.read_bytes(), proof)
    put(path, wrong)
    line = refused(2, "train", "--weights", "imagenet")
    assert f"{path}: " in line and "SHA-256" in line and "--weights FILE" in line
    assert path.read_bytes() == wrong and not proof.exists()


def test_a_resnet50_with_other_weights_in_the_cache_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    put(path, faults.saved({"fc.bias": torch.zeros(1000)}))
    line = refused(2, "train", "--weights", "imagenet", "--arch", "resnet50")
    assert f"{path}: " in line and "SHA-256" in line


HTTP = partial(urllib.error.HTTPError, "http://127.0.0.1:9", hdrs={}, fp=None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (urllib.error.URLError("Name or service not known"), 2),
        (HTTP(code=404, msg="Not Found"), 2),
        (HTTP(code=503, msg="Service Unavailable"), 2),
        (TimeoutError("timed out"), 2),
        (http.client.IncompleteRead(b"half", 9), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
    ],
)
def test_a_download_that_fails_names_the_address_the_file_and_the_flag(
    error, status, refused, published, monkeypatch
):
    def download(*_, **__):
        assert 0 < socket.getdefaulttimeout() <= 30  # otherwise a stalled server hangs
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    line = refused(status, "train", "--weights", "imagenet")
    assert all(part in line for part in (published.url, str(published.path), "--weights FILE"))
    assert socket.getdefaulttimeout() is None
