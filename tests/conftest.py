"""What the tests share: phantoms, a tiny network, runs of the scripts, the reference data."""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import put
from helpers import ROOT, SCRIPTS, TINY_FAST, home_flags, make_tree
from phantoms import draw_folder, draw_phantom
from torch import nn
from torchvision.models._api import register_model  # as a package with models of its own does

import common
import cxr.bootstrap
import evaluate
import train
from cxr.files import hash_file, read_json, write_json
from cxr.patients import read_split


class TinyNet(nn.Module):
    """A classifier of 0.1 ms, with BatchNorm and global average pooling as the large ones have."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 9, stride=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@register_model()
def tinynet(*, weights=None, **kwargs):
    return TinyNet(**kwargs)


def pytest_addoption(parser):
    parser.addoption("--fuzz", action="store_true", help="the full campaigns of faults, minutes")
    parser.addoption(
        "--fuzz-seed", type=int, help="their seed (default: the time with --fuzz, else 0)"
    )


def pytest_configure(config):
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = int(time.time()) if config.option.fuzz else 0


@pytest.fixture
def say(request):
    """say(text): what a campaign tried and found, for the end of the page."""
    return lambda text: request.node.user_properties.append(("say", text))


def pytest_terminal_summary(terminalreporter, config):
    for report in terminalreporter.stats.get("passed", []):
        for _, text in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(text)
    what = "the full campaigns" if config.option.fuzz else "a slice of each campaign"
    terminalreporter.write_line(f"Faults: {what}, --fuzz-seed {config.option.fuzz_seed}")


@pytest.fixture(scope="session")
def split_phantoms(tmp_path_factory):
    """A data folder of 40 train, 24 val and 24 test phantoms, drawn once; not to be changed."""
    folder = tmp_path_factory.mktemp("phantoms") / "chestxrays"
    draw_folder(folder, train=32, test=12)
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / "val" / name).mkdir(parents=True)
        for path in sorted((folder / "train" / name).iterdir())[20:]:
            path.rename(folder / "val" / name / path.name)
    return folder


@pytest.fixture
def data(split_phantoms, tmp_path):
    """A fresh copy of that folder."""
    return Path(shutil.copytree(split_phantoms, tmp_path / "chestxrays"))


@pytest.fixture
def flags(tmp_path):
    """flags(data, ...): for train.py and evaluate.py, on a tiny random network."""

    def make(data, *more):
        paths = ["--data-dir", data, "--checkpoint", tmp_path / "model.pth"]
        paths += ["--results-dir", tmp_path / "results", "--cache-dir", tmp_path / "cache"]
        return [str(flag) for flag in (*paths, "--device", "cpu", *more)]

    return make


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The reference data, 300 train and 100 test images, extracted once; not to be changed."""
    path = Path(os.environ.get("CHESTXRAYS_ZIP", ROOT.parent / "shared" / "chestxrays.zip"))
    if not path.exists():
        pytest.skip(f"no {path}: CHESTXRAYS_ZIP names the zip file of the 400 real X-rays")
    folder = tmp_path_factory.mktemp("reference")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder / "chestxrays"


@pytest.fixture
def xrays(reference, tmp_path):
    """A fresh copy of the reference data's folder."""
    return Path(shutil.copytree(reference, tmp_path / "chestxrays"))


# ---------------------------------------------------------------- on phantoms


@pytest.fixture(scope="session")
def phantom():
    """A drawn radiograph; not to be changed."""
    return draw_phantom(np.random.default_rng(0), True)


@pytest.fixture(scope="session")
def backbone():
    return common.build_backbone("tinynet")


@pytest.fixture(scope="session")
def images(split_phantoms):
    """12 of the phantoms of val/."""
    return read_split(split_phantoms, "val")["val"][::2]


@pytest.fixture
def tree(tmp_path):
    """A data folder to split, of 12 train and 4 test files a class that need not be images."""
    return make_tree(tmp_path / "data", 12, 4)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache that the trainings share, so that features are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_train(split_phantoms, cache, tmp_path):
    """run_train(*flags): train.main's exit status on the phantoms, with a tiny random network."""

    def call(*flags, data=split_phantoms):
        paths = {"--checkpoint": tmp_path / "model.pth", "--results-dir": tmp_path / "results"}
        fixed = {"--arch": "tinynet", "--weights": "random", "--views": 4, "--device": "cpu"}
        given = paths | fixed | {"--data-dir": data, "--cache-dir": cache}
        words = [word for pair in given.items() for word in pair]
        return train.main([str(word) for word in (*words, *flags)])

    return call


@pytest.fixture
def pictures():
    """Asked for by the tests of pictures; the others draw none, which takes most of a small run."""


@pytest.fixture
def quick(request, monkeypatch):
    """Few draws of the bootstrap: 2000 take seconds, and only their number differs."""
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 40)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(evaluate, "draw_pictures", lambda *_: None)
        monkeypatch.setattr(evaluate, "draw_worst", lambda *_: None)
        monkeypatch.setattr(evaluate, "PICTURES", {})


@pytest.fixture(scope="session")
def trained(split_phantoms, tmp_path_factory):
    """The folder of model.pth and model.json, trained once, and of the cache; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data-dir", split_phantoms, "--checkpoint", folder / "model.pth"]
    flags += ["--results-dir", folder, "--cache-dir", folder / "cache", "--device", "cpu"]
    assert train.main([str(flag) for flag in (*flags, *TINY_FAST)]) == 0
    return folder


@pytest.fixture(scope="session")
def scored(split_phantoms, trained, tmp_path_factory):
    """(results folder, screen) of one whole run, pictures included; not to be changed."""
    folder, screen = tmp_path_factory.mktemp("scored") / "results", io.StringIO()
    flags = ["--data-dir", split_phantoms, "--checkpoint", trained / "model.pth"]
    flags += ["--results-dir", folder, "--cache-dir", trained / "cache", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.setattr(cxr.bootstrap, "DRAWS", 40)
        assert evaluate.main([str(flag) for flag in flags]) == 0
    return folder, screen.getvalue()


@pytest.fixture
def run_evaluate(quick, split_phantoms, trained, tmp_path):
    """run_evaluate(*flags): evaluate.main's exit status on the phantoms; a later flag wins."""

    def call(*flags):
        fixed = ["--data-dir", split_phantoms, "--checkpoint", trained / "model.pth"]
        fixed += ["--results-dir", tmp_path / "results", "--cache-dir", trained / "cache"]
        try:
            return evaluate.main([str(flag) for flag in (*fixed, "--device", "cpu", *flags)])
        except SystemExit as stop:  # argparse
            return stop.code

    return call


@pytest.fixture
def rescore(quick):
    """rescore(source, *flags): evaluate.main --from source, into the folder `again` beside it.

    Gives (exit status, that folder).
    """

    def call(source, *flags):
        folder = source.parent / "again"
        flags = ["--from", source, "--results-dir", folder, *flags]
        return evaluate.main([str(flag) for flag in flags]), folder

    return call


@pytest.fixture
def remake(trained, tmp_path):
    """remake(state, **about): the trained model with other tensors or another model.json."""

    def make(state=None, **about):
        path = tmp_path / "model.pth"
        torch.save(torch.load(trained / "model.pth") | (state or {}), path)
        known = read_json(trained / "model.json") | {"sha256": hash_file(path)} | about
        write_json(path.with_suffix(".json"), known)
        return path

    return make


# ---------------------------------------------------------------- faults


@pytest.fixture
def fuzz(request):
    """fuzz.count(slice, full); fuzz.rng, of the seed and the test's name."""
    on, seed = request.config.option.fuzz, request.config.option.fuzz_seed
    rng = random.Random(f"{seed} {request.node.name}")
    return Namespace(count=lambda small, full: full if on else small, rng=rng)


@pytest.fixture
def plain(monkeypatch):
    """Neither pictures nor what differs between two runs: see faults.plain."""
    faults.plain(monkeypatch.setattr)
    for script, name in (
        (train, "draw_curves"),
        (train, "draw_samples"),
        (evaluate, "draw_pictures"),
        (evaluate, "draw_worst"),
    ):
        monkeypatch.setattr(script, name, lambda *_: None)
    monkeypatch.setattr(evaluate, "PICTURES", {})


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory):
    """A folder with data (8 train, 4 val, 6 test images a class), model, results and cache."""
    home = tmp_path_factory.mktemp("faults") / "home"
    draw_folder(home / "data", train=12, test=6, size=96)
    for path in sorted(home.glob("data/train/*/*")):
        if int(re.search(r"\d+", path.name)[0]) >= 8:
            put(home / "data" / "val" / path.parent.name / path.name, path.read_bytes())
            path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        faults.plain(patch.setattr)
        assert train.main(home_flags("train", home)) == 0
        assert evaluate.main(home_flags("evaluate", home)) == 0
    return home


@pytest.fixture
def home(plain, trained_home, tmp_path):
    """A fresh copy of it."""
    return Path(shutil.copytree(trained_home, tmp_path / "home"))


@pytest.fixture
def run_script(home, capsys):
    """run_script(script, *flags): (exit status, lines of stderr but for warnings), in `home`."""

    def call(script, *more):
        capsys.readouterr()
        try:
            status = SCRIPTS[script].main(home_flags(script, home, *more))
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if not line.startswith("warning: ")]

    return call


@pytest.fixture
def refused(run_script):
    """refused(status, script, *flags): the one line of stderr, after that exit status."""

    def call(expected, script, *more):
        status, lines = run_script(script, *more)
        assert status == expected and len(lines) == 1 and len(lines[0]) < 900, (status, lines)
        return lines[0]

    return call


@pytest.fixture(scope="session")
def server():
    """What faults.start() forks: it imports everything while the first test draws its data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        faults.start(os.devnull, "train", ["--help"])


@pytest.fixture
def start(server, home, tmp_path):
    """start(script, flags, prepare, *args): a process, see faults.start; its log is `log`."""
    children = []

    def call(script, more, prepare=None, *args):
        argv = home_flags(script, home, *more)
        children.append(faults.start(tmp_path / "log", script, argv, prepare, *args))
        return children[-1]

    yield call
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
