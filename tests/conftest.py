"""Fixtures: phantoms, a tiny network, runs of the scripts, the reference data."""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import put
from helpers import ROOT, SCRIPTS, TINY, TINY_FAST, home_flags, make_tree, path_flags
from phantoms import draw_folder, draw_phantom
from torch import nn
from torchvision.models._api import register_model

import common
import cxr.bootstrap
import evaluate
import train
from cxr.files import hash_file, read_json, write_json
from cxr.folders import CLASSES
from cxr.patients import read_split


@register_model()
def tinynet(*, weights=None, num_classes=1000):
    """A classifier that takes 0.1 ms; it has BatchNorm and global average pooling."""
    network = nn.Sequential()
    network.conv = nn.Conv2d(3, 8, 9, stride=8, bias=False)
    network.bn = nn.BatchNorm2d(8)
    network.relu = nn.ReLU()
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.flatten = nn.Flatten()
    network.fc = nn.Linear(8, num_classes)
    return network


def pytest_addoption(parser):
    parser.addoption("--fuzz", action="store_true", help="all cases of the fault tests")
    parser.addoption("--fuzz-seed", type=int, help="their seed (default: 0; with --fuzz the time)")


def pytest_configure(config):
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = int(time.time()) if config.option.fuzz else 0


@pytest.fixture
def say(request):
    """say(text) prints a line after the last test: what a fault test tried."""
    return lambda text: request.node.user_properties.append(("say", text))


def pytest_terminal_summary(terminalreporter, config):
    for report in terminalreporter.stats.get("passed", []):
        for _, text in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(text)
    cases = "all cases" if config.option.fuzz else "a sample of the cases"
    terminalreporter.write_line(f"Faults: {cases}, --fuzz-seed {config.option.fuzz_seed}")


@pytest.fixture(scope="session")
def split_phantoms(tmp_path_factory):
    """A data folder of 40 train, 24 val and 24 test phantoms. Tests must not change it."""
    folder = tmp_path_factory.mktemp("phantoms") / "chestxrays"
    draw_folder(folder, train=32, test=12)
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / "val" / name).mkdir(parents=True)
        for path in sorted((folder / "train" / name).iterdir())[20:]:
            path.rename(folder / "val" / name / path.name)
    return folder


@pytest.fixture(scope="session")
def second_hospital(tmp_path_factory):
    """A data folder of another source: 15 test phantoms of each class. Tests must not change it."""
    folder = tmp_path_factory.mktemp("second") / "nih"
    draw_folder(folder, train=0, test=15, seed=5)
    shutil.rmtree(folder / "train")
    return folder


@pytest.fixture
def data(split_phantoms, tmp_path):
    """A copy of split_phantoms that the test may change."""
    return Path(shutil.copytree(split_phantoms, tmp_path / "chestxrays"))


@pytest.fixture
def flags(tmp_path):
    """flags(data, *more): a command line of train.py or evaluate.py with all output in tmp_path."""
    return lambda data, *more: path_flags(data, tmp_path, tmp_path / "cache", *more)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The reference data, 300 train and 100 test images. Tests must not change it."""
    path = Path(os.environ.get("CHESTXRAYS_ZIP", ROOT.parent / "shared" / "chestxrays.zip"))
    if not path.exists():
        pytest.skip(f"no {path}: CHESTXRAYS_ZIP names the zip file of the 400 real X-rays")
    folder = tmp_path_factory.mktemp("reference")
    shutil.unpack_archive(path, folder, "zip")
    return folder / "chestxrays"


@pytest.fixture
def xrays(reference, tmp_path):
    """A copy of the reference data that the test may change."""
    return Path(shutil.copytree(reference, tmp_path / "chestxrays"))


@pytest.fixture(scope="session")
def phantom():
    """A drawn radiograph. Tests must not change it."""
    return draw_phantom(np.random.default_rng(0), True)


@pytest.fixture(scope="session")
def backbone():
    return common.build_backbone("tinynet")


@pytest.fixture(scope="session")
def images(split_phantoms):
    """The Xrays of 12 phantoms of val/."""
    return read_split(split_phantoms, "val", classes=CLASSES)[::2]


@pytest.fixture
def tree(tmp_path):
    """A data folder to split: 12 train and 4 test files of each class, which are not images."""
    return make_tree(tmp_path / "data", 12, 4)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache that all trainings share, so that features are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_train(split_phantoms, cache, tmp_path):
    """run_train(*flags) trains TinyNet on the phantoms and returns the exit code."""

    def call(*flags, data=split_phantoms):
        return train.main(path_flags(data, tmp_path, cache, *TINY, "--views", 4, *flags))

    return call


@pytest.fixture
def pictures():
    """A test with this fixture draws pictures in spite of `quick`."""


@pytest.fixture
def quick(request, monkeypatch):
    """evaluate.py with 40 bootstrap samples instead of 2000, and without pictures."""
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 40)
    if "pictures" not in request.fixturenames:
        draw_nothing(monkeypatch)


def draw_nothing(monkeypatch):
    """Lets evaluate.py draw no picture, which would take most of the time of a small run."""
    monkeypatch.setattr(evaluate, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(evaluate, "draw_worst", lambda *_: ())
    monkeypatch.setattr(evaluate, "draw_roc_of_sources", lambda *_: None)


@pytest.fixture(scope="session")
def trained(split_phantoms, tmp_path_factory):
    """The folder of all files of a training, with the cache. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--results-dir", folder, *TINY_FAST)
    assert train.main(path_flags(split_phantoms, folder, folder / "cache", *flags)) == 0
    return folder


@pytest.fixture(scope="session")
def scored(split_phantoms, trained, tmp_path_factory):
    """(results folder, screen) of evaluate.py with all pictures. Tests must not change it."""
    folder, screen = tmp_path_factory.mktemp("scored") / "results", io.StringIO()
    flags = path_flags(split_phantoms, trained, trained / "cache", "--results-dir", folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.setattr(cxr.bootstrap, "DRAWS", 40)
        assert evaluate.main(flags) == 0
    return folder, screen.getvalue()


@pytest.fixture
def run_evaluate(quick, split_phantoms, trained, tmp_path):
    """run_evaluate(*flags) scores the trained model on the phantoms and returns the exit code."""

    def call(*flags):
        flags = ("--results-dir", tmp_path / "results", *flags)  # argparse takes the last value
        return evaluate.main(path_flags(split_phantoms, trained, trained / "cache", *flags))

    return call


@pytest.fixture
def rescore(quick):
    """rescore(source, *flags) runs evaluate.py --from. Returns (exit code, results folder)."""

    def call(source, *flags):
        folder = source.parent / "again"
        flags = ["--from", source, "--results-dir", folder, *flags]
        return evaluate.main([str(flag) for flag in flags]), folder

    return call


@pytest.fixture
def remake(trained, tmp_path):
    """remake(state, **info) copies the trained model with other tensors or another model.json."""

    def make(state=None, **info):
        path = tmp_path / "model.pth"
        torch.save(torch.load(trained / "model.pth") | (state or {}), path)
        info = read_json(trained / "model.json") | {"sha256": hash_file(path)} | info
        write_json(path.with_suffix(".json"), info)
        return path

    return make


@pytest.fixture
def fuzz(request):
    """fuzz.count(few, many): the number of cases; fuzz.rng: seeded by --fuzz-seed and the test."""
    option = request.config.option
    rng = random.Random(f"{option.fuzz_seed} {request.node.name}")
    return Namespace(count=lambda few, many: many if option.fuzz else few, rng=rng)


@pytest.fixture
def plain(monkeypatch):
    """Scripts that write the same bytes in every run (see faults.plain), without pictures."""
    faults.plain(monkeypatch.setattr)
    draw_nothing(monkeypatch)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    monkeypatch.setattr(train, "draw_samples", lambda *_: None)


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory):
    """A folder with data (8 train, 4 val, 6 test images per class), model, results and cache."""
    home = tmp_path_factory.mktemp("faults") / "home"
    draw_folder(home / "data", train=12, test=6, size=96)
    for path in sorted(home.glob("data/train/*/*")):
        if int(re.search(r"\d+", path.name)[0]) >= 8:
            put(home / "data/val" / path.parent.name / path.name, path.read_bytes())
            path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        faults.plain(patch.setattr)
        assert train.main(home_flags("train", home)) == 0
        assert evaluate.main(home_flags("evaluate", home)) == 0
    return home


@pytest.fixture
def home(plain, trained_home, tmp_path):
    """A copy of trained_home that the test may change."""
    return Path(shutil.copytree(trained_home, tmp_path / "home"))


@pytest.fixture
def run_script(home, capsys):
    """run_script(script, *flags) returns the exit code and the lines of stderr, no warnings."""

    def call(script, *more):
        capsys.readouterr()
        status = SCRIPTS[script].main(home_flags(script, home, *more))
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if not line.startswith("warning: ")]

    return call


@pytest.fixture
def refused(run_script):
    """refused(status, script, *flags) checks the exit code and returns the one line of stderr."""

    def call(expected, script, *more):
        status, lines = run_script(script, *more)
        assert status == expected and len(lines) == 1 and len(lines[0]) < 900, (status, lines)
        return lines[0]

    return call


@pytest.fixture(scope="session")
def server():
    """Starts the server of faults.start, which imports everything during the first test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        faults.start(os.devnull, "train", ["--help"])


@pytest.fixture
def start(server, home, tmp_path):
    """start(script, flags, prepare, *args) starts a process that prints to tmp_path/log."""
    children = []

    def call(script, more, prepare=None, *args):
        argv = home_flags(script, home, *more)
        children.append(faults.start(tmp_path / "log", script, argv, prepare, *args))
        return children[-1]

    yield call
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
