"""The Makefile's targets, and the lines of README.md that a reader copies."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from faults import put
from helpers import ROOT
from PIL import Image

import evaluate
import train
from cxr.folders import CLASSES
from cxr.predictions import read_predictions


def make(*words):
    alone = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["make", "-n", *words]
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)


def test_make_passes_a_flag_only_where_its_variable_was_given_and_refuses_a_typo():
    assert make("train").stdout.splitlines()[-1].split() == [".venv/bin/python", "train.py"]
    line = make("train", "EPOCHS=3", "GPUS=4", "DATA=/scans/chest x").stdout.splitlines()[-1]
    launch = "torch.distributed.run --standalone --nproc-per-node 4 train.py"
    assert f".venv/bin/python -m {launch} " in line
    assert "--epochs '3'" in line and "--data-dir '/scans/chest x'" in line
    scripts = [line.split()[1] for line in make("all", "PER_CLASS=8").stdout.splitlines()[-3:]]
    assert scripts == ["split_val.py", "train.py", "evaluate.py"]
    typo = make("train", "EPOCH=3")
    assert typo.returncode == 2 and "unknown variable EPOCH" in typo.stderr


def test_run_keeps_the_files_of_two_experiments_apart():
    for line in make("all", "RUN=wide").stdout.splitlines()[-2:]:
        assert "--checkpoint 'runs/wide/model.pth'" in line
        assert "--results-dir 'runs/wide/results'" in line
    again = make("evaluate", "RUN=wide", "ARGS=--from runs/wide/results/predictions.csv").stdout
    assert "--results-dir" not in again  # which only prints
    line = make("train", "RUN=wide", "MODEL=x.pth").stdout.splitlines()[-1]
    assert "--checkpoint 'x.pth'" in line and "--results-dir 'runs/wide/results'" in line


@pytest.mark.parametrize("name", ["python3.9", "python3.12"])
def test_make_tells_an_old_python_and_makes_the_environment_anew_for_another(name, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for file in ("requirements.txt", ".venv/installed", ".venv/bin/python"):
        put(tmp_path / file, b"")
    (tmp_path / ".venv" / "python").write_text("python3\n")
    fake, log = tmp_path / "bin" / name, tmp_path / "log"
    old = name == "python3.9"
    put(fake, f"#!/bin/sh\necho $2 >> {log}\n".encode())
    if old:
        fake.write_text('#!/bin/sh\necho "Python 3.10 or newer needed, found 3.9" >&2; exit 1\n')
    fake.chmod(0o755)
    command = ["make", "-C", str(tmp_path), "install"]
    run = {"capture_output": True, "text": True, "env": os.environ | {"MAKEFLAGS": ""}}
    assert "Nothing to be done" in subprocess.run(command, **run).stdout
    found = subprocess.run([*command, f"PYTHON={fake}"], **run)
    assert found.returncode == 2
    assert ("3.10 or newer" in found.stderr) if old else ("venv" in log.read_text())
    assert (tmp_path / ".venv" / "python").read_text() == ("python3\n" if old else f"{fake}\n")


def test_the_readme_s_own_lines_give_the_probability_of_predictions_csv(data, tmp_path, flags):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(code.splitlines()) <= 12
    network = "--arch", "resnet50", "--weights", "random", "--views", 1
    for name in CLASSES:
        for split in ("train", "val", "test"):
            for path in sorted((data / split / name).iterdir())[3:]:
                path.unlink()
    image = sorted((data / "test" / "PNEUMONIA").iterdir())[0]
    Image.open(image).resize((300, 260)).save(image)
    assert train.main(flags(data, *network, "--window", 2)) == evaluate.main(flags(data)) == 0
    table = read_predictions(tmp_path / "results" / "predictions.csv")
    prob = table.probs[table.files.index(image.relative_to(data).as_posix())]
    shutil.copy(image, tmp_path / "scan.png")
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert float(found.stdout) == pytest.approx(prob, abs=1e-3), found.stderr
