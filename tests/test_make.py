"""The Makefile's targets, and the Python code in docs/files.md."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from faults import put
from helpers import ROOT, keep, read_probs
from PIL import Image

import evaluate
import train
from cxr.folders import CLASSES

# The tests may run below make, and must not inherit its PYTHON and MAKEFLAGS.
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def make(*words):
    """Runs make -n, which prints the commands and runs none."""
    command = ["make", "-n", *words]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


RUN = "--checkpoint 'runs/wide/model.pth' --results-dir 'runs/wide/results'"
COMMANDS = {
    "train": ["train.py"],
    "train GPUS=4": ["-m torch.distributed.run --standalone --nproc-per-node 4 train.py"],
    "train UNFREEZE=layer4": ["train.py --unfreeze 'layer4'"],
    "curve SEED=2": ["train.py --folds 10 --repeats 5 --sizes 25,50,100,200 --seed '2'"],
    "train EPOCHS=3 DATA='/chest x'": ["train.py --data-dir '/chest x' --epochs '3'"],
    "all CLASSES='NORMAL TUBERCULOSIS'": [
        "split_val.py --classes NORMAL TUBERCULOSIS --check-first",
        "train.py --classes NORMAL TUBERCULOSIS",
        "evaluate.py --classes NORMAL TUBERCULOSIS",
    ],
    "check CLASSES=\"'no finding' TB\"": ["split_val.py --check --classes 'no finding' TB"],
    "all PER_CLASS=8 TEST=0.2": [
        "split_val.py --per-class '8' --test '0.2' --check-first",
        "train.py",
        "evaluate.py",
    ],
    "split TEST=50": ["split_val.py --test '50'"],
    "all RUN=wide ARGS='--seeds 5 --skip-bad'": [
        "split_val.py --check-first --args-of-all --seeds 5 --skip-bad",
        f"train.py {RUN} --args-of-all --seeds 5 --skip-bad",
        f"evaluate.py {RUN} --args-of-all --seeds 5 --skip-bad",
    ],
    "all RUN=wide": ["split_val.py --check-first", f"train.py {RUN}", f"evaluate.py {RUN}"],
    "train RUN=wide MODEL=x.pth": [f"train.py {RUN}".replace("runs/wide/model.pth", "x.pth")],
    "evaluate ALSO='nih /data/rsna' ARGS=--skip-bad": [
        "evaluate.py --also 'nih' --also '/data/rsna' --skip-bad"
    ],
    "all ALSO=nih": ["split_val.py --check-first", "train.py", "evaluate.py --also 'nih'"],
    "evaluate RUN=wide ARGS='--from x'": [
        "evaluate.py --checkpoint 'runs/wide/model.pth' --from x"
    ],
}


@pytest.mark.parametrize("words", COMMANDS)
def test_make_passes_a_flag_for_each_variable_that_is_given(words):
    expected = [f".venv/bin/python {command}" for command in COMMANDS[words]]
    lines = make(*shlex.split(words)).stdout.splitlines()
    assert lines[-len(expected) :] == expected  # also without double spaces


@pytest.mark.parametrize(
    "name", ["a.png", "film 1.png", "film (1).png", "Müller's [2].png", "a folder", "a  b.png"]
)
def test_an_image_that_exists_is_one_name_without_more_quotes(name, tmp_path):
    put(tmp_path / name, b"")
    path = shlex.quote(f"{tmp_path}/{name}")
    line = make("predict", f"IMAGES={tmp_path}/{name}").stdout.splitlines()[-1]
    assert shlex.split(line) == shlex.split(f".venv/bin/python evaluate.py {path}")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("a.png scans/", ["a.png", "scans/"]),
        ("a(1).png b(2).png", ["a(1).png", "b(2).png"]),
        ("'a (1).png' b.png", ["a (1).png", "b.png"]),
        ("nosuch.png", ["nosuch.png"]),
    ],
)
def test_other_images_are_several_names(images, words):
    line = make("predict", f"IMAGES={images}").stdout.splitlines()[-1]
    assert shlex.split(line)[2:] == words


def test_make_refuses_an_unknown_variable():
    typo = make("train", "EPOCH=3")
    assert typo.returncode == 2 and "unknown variable EPOCH" in typo.stderr


@pytest.fixture
def install(tmp_path):
    """install(*words) runs make install in a folder with an environment of python3."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for file in ("requirements.txt", ".venv/installed", ".venv/bin/python"):
        put(tmp_path / file, b"")
    (tmp_path / ".venv" / "python").write_text("python3\n")
    command = ["make", "-C", str(tmp_path), "install"]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT}
    return lambda *words: subprocess.run([*command, *words], **options)


def fake_python(path, commands):
    put(path, f"#!/bin/sh\n{commands}\n".encode())
    path.chmod(0o755)
    return path


def test_an_environment_is_kept_until_another_python_is_given_that_is_not_too_old(
    install, tmp_path
):
    made_by = tmp_path / ".venv" / "python"
    assert "Nothing to be done" in install().stdout
    old = 'echo "Python 3.10 or newer needed, found 3.9" >&2; exit 1'
    result = install(f"PYTHON={fake_python(tmp_path / 'python3.9', old)}")
    assert result.returncode == 2 and "3.10 or newer" in result.stderr
    assert made_by.read_text() == "python3\n"
    python = fake_python(tmp_path / "python3.12", f"echo $2 >> {tmp_path / 'log'}")
    assert install(f"PYTHON={python}").returncode == 2  # this python installs nothing
    assert "venv" in (tmp_path / "log").read_text()
    assert made_by.read_text() == f"{python}\n"


@pytest.fixture
def matrix(tmp_path):
    """matrix(commands) runs make matrix where python3.10 to python3.14 run these commands."""
    for name in ("Makefile", "requirements.txt", "tests/requirements.txt", "tests/matrix.sh"):
        put(tmp_path / name, (ROOT / name).read_bytes())
    (tmp_path / "tests/matrix.sh").chmod(0o755)
    fake_python(tmp_path / "bin/pyenv", f"echo {tmp_path}/pyenv")
    path = f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}"

    def call(commands):
        for minor in range(10, 15):
            name = f"python3.{minor}"
            fake_python(tmp_path / "bin" / name, commands.get(name, "exit 127"))
        options = {"capture_output": True, "text": True, "env": ENVIRONMENT | {"PATH": path}}
        return subprocess.run(["make", "-C", str(tmp_path), "matrix"], **options).stdout

    return call


WORKING = """case "$*" in
    --version) echo "called $0" ;;
    "-m venv"*) mkdir -p .matrix/bin && cp "$0" .matrix/bin/python ;;
    *"pip install"*) grep "torch[>=]" .matrix/requirements.txt ;;
    *pytest*) echo "$@" ;;
esac"""


def test_the_matrix_takes_the_oldest_python_that_runs_and_the_newest_one(matrix, tmp_path):
    fake_python(tmp_path / "pyenv/versions/3.10.1/bin/python", WORKING)  # its shim exits with 127
    out = matrix({"python3.12": WORKING, "python3.13": WORKING})
    lowest, newest = out.split("== ")[1:]
    assert "Python 3.11: not found\nPython 3.14: not found" in out
    assert f"{tmp_path}/pyenv/versions/3.10.1/bin/python\ntorch==" in lowest
    assert f"{tmp_path}/bin/python3.13\ntorch>=" in newest
    assert "pytest" in lowest and "pytest" in newest and not (tmp_path / ".matrix").exists()


def test_the_matrix_runs_with_one_python_only_what_differs_from_make_test(matrix):
    out = matrix({"python3.11": WORKING})
    assert "python3.11\ntorch==" in out and "newest versions are not tested" in out
    out = matrix({"python3.14": WORKING})
    assert "lowest versions are not tested" in out and "newest versions are not tested" in out


def test_the_code_in_the_docs_gives_the_probability_of_predictions_csv(
    data, tmp_path, flags, quick
):
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL
    )
    assert len(code.splitlines()) <= 17
    for split in ("train", "val", "test"):
        keep(data, 3, split)
    image = sorted((data / "test" / CLASSES[1]).iterdir())[0]
    Image.open(image).resize((1000, 900)).save(image)  # JPEGs of this size are decoded at a part
    network = "--arch", "resnet50", "--weights", "random", "--views", 1
    assert train.main(flags(data, *network, "--window", 2)) == evaluate.main(flags(data)) == 0
    prob = read_probs(tmp_path / "results" / "predictions.csv")[image.relative_to(data).as_posix()]
    shutil.copy(image, tmp_path / "scan.png")
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert float(process.stdout) == pytest.approx(prob, abs=1e-3), process.stderr
    Image.fromarray(np.full((300, 260), 40000, np.uint16)).save(tmp_path / "scan.png")
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1 and "only for 8 bits" in process.stderr
