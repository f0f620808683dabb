"""Fixtures: the reference data, read where it is and copied only into temporary folders."""

import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--fuzz", action="store_true", help="the full campaigns of faults, minutes instead of seconds")
    parser.addoption("--fuzz-seed", type=int, help="their seed (default: of the time with --fuzz, else 0)")


def pytest_configure(config):
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = int(time.time()) if config.option.fuzz else 0


FIGURES = pytest.StashKey()


@pytest.fixture
def say(request):
    """say(text): what a campaign tried and found, for the end of the page."""
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter, config):
    for text in config.stash.get(FIGURES, []):
        terminalreporter.write_line(text)
    what = "the full campaigns" if config.option.fuzz else "a slice of each campaign"
    terminalreporter.write_line(f"Faults: {what}, --fuzz-seed {config.option.fuzz_seed}")


@pytest.fixture(scope="session")
def xrays_source(tmp_path_factory):
    """The reference data, 300 train and 100 test images, extracted once; not to be changed."""
    path = Path(os.environ.get("CHESTXRAYS_ZIP", ROOT.parent / "shared" / "chestxrays.zip"))
    if not path.exists():
        pytest.fail(f"{path} not found: point CHESTXRAYS_ZIP at the reference data's zip file")
    folder = tmp_path_factory.mktemp("reference")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder / "chestxrays"


@pytest.fixture
def xrays(xrays_source, tmp_path):
    """A fresh copy of the reference data's folder."""
    return Path(shutil.copytree(xrays_source, tmp_path / "chestxrays"))
