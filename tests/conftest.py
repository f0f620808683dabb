"""What the tests share: phantoms, a tiny network, and the reference data where it is."""

import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from phantoms import draw_folder
from torch import nn
from torchvision.models._api import register_model  # as a package with models of its own does

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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
