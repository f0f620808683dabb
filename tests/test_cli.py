"""cxr/cli.py and cxr/errors.py: flags, one-line errors, exit codes, signals."""

import os
import signal
import subprocess
import sys
import time

import faults
import pytest
import torch
from faults import listing, put
from helpers import ROOT, TINY_FAST, linux

import common
import evaluate
import train
from cxr.files import hash_file, read_json
from cxr.folders import CLASSES

# ---------------------------------------------------------------- a process of its own


def run_python(code, *words, **environment):
    """A process that runs a few lines of Python with the scripts at hand."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n{code}"
    command = [sys.executable, "-c", code, *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return found.returncode, found.stdout, found.stderr.strip()


@pytest.mark.parametrize("name", ["torch", "torchmetrics", "sklearn", "matplotlib", "pydicom"])
def test_a_missing_package_is_one_line_at_once(name):
    hide = f"sys.modules[{name!r}] = None\nimport importlib.util as u; t = u.find_spec\n"
    hide += f"u.find_spec = lambda n, *a: None if n == {name!r} else t(n, *a)\nimport train"
    status, _, error = run_python(hide)
    assert status == 2 and len(error.splitlines()) == 1 and name in error
    assert "make install, then .venv/bin/python train.py" in error


def test_without_fcntl_and_what_only_posix_has_the_scripts_run(tmp_path):
    for i, name in enumerate(CLASSES):
        for j in range(6):
            put(tmp_path / "train" / name / f"IM-{i}{j}-1.jpeg", f"{i}{j}".encode())
    code = "sys.modules['fcntl'] = None\nimport os, signal, split_val, train, evaluate\n"
    code += "for name in ('sched_getaffinity', 'uname', 'fork'): delattr(os, name)\n"
    code += "for name in ('SIGALRM', 'SIGCHLD', 'alarm'): delattr(signal, name)\n"
    code += "sys.exit(split_val.main(sys.argv[1:]))"
    status, out, error = run_python(code, "--data-dir", tmp_path)
    assert status == 0 and "Moved 2 NORMAL and 2 PNEUMONIA" in out, error


def test_importing_the_scripts_prints_and_writes_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import split_val, train, evaluate"
    command = [sys.executable, "-c", code, str(ROOT)]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not out.stdout and not out.stderr and not os.listdir(tmp_path)


def test_a_reader_that_leaves_finds_the_files_written(data, tmp_path, flags):
    assert train.main(flags(data, *TINY_FAST)) == 0
    words = [sys.executable, "-c", "import conftest, evaluate, sys; sys.exit(evaluate.main())"]
    script = subprocess.Popen(
        [*words, *flags(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/bin:/usr/bin"},
    )
    while b"Features" not in script.stdout.readline():
        pass
    script.stdout.close()  # as `| head` does
    assert "Traceback" not in script.stderr.read().decode()
    assert script.wait() == 4
    assert (tmp_path / "results" / "report.html").exists()


# ---------------------------------------------------------------- flags and messages


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("default: 50", "default: 0.001", "default: 8", "0 = never", "default: resnet50"):
        assert text in out


def test_debug_adds_the_traceback(run_train, capsys):
    assert run_train("--arch", "resnet5", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_in_a_notebook_lines_begin_with_the_script(tmp_path, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert train.main(flags(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err.startswith("train.py: ")
    with pytest.raises(SystemExit):
        train.main(["--epoch", "x"])
    assert capsys.readouterr().err.startswith("train.py: ")


def test_rules_unknown_weights_and_class_folders_are_told(data, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--threshold", "sensitivity=0.95"])
    assert "fitted on val while training" in capsys.readouterr().err
    assert train.main(flags(data, "--weights", "radnom")) == 2
    assert "expected imagenet, random or a state dict" in capsys.readouterr().err
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert evaluate.main(flags(data, data / "test")) == 2
    error = capsys.readouterr().err
    assert f"name these: {data / 'test' / 'NORMAL'} {data / 'test' / 'PNEUMONIA'}" in error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_full_memory_names_the_flag_that_helps(script, error, refused, home, monkeypatch):
    def forward(*_):
        raise error("out of memory")

    monkeypatch.setattr(type(common.get_model("tinynet")), "forward", forward)
    old = listing(home)
    assert "--batch-size" in refused(4, script, "--no-cache")
    assert listing(home) == old


# ---------------------------------------------------------------- signals


MOMENTS = [("train", "Epoch [20/"), ("train", "in the pass"), ("evaluate", "in the pass")]


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("script", "moment"), MOMENTS)
def test_a_signal_ends_a_script_in_one_line_and_keeps_what_was_there(
    script, moment, number, fuzz, start, home, tmp_path
):
    """To the whole group, as a terminal and a batch system send it."""
    log, old = tmp_path / "log", listing(home)
    more = ["--no-cache", "--workers", 2, "--batch-size", 1]
    more += ["--epochs", 10**6, "--patience", 0] if script == "train" else []
    for _ in range(fuzz.count(1, 5)):
        log.unlink(missing_ok=True)
        child = start(script, more, faults.slow_down if "pass" in moment else None)
        faults.wait_for(moment, log)
        time.sleep(fuzz.rng.uniform(0, 0.3))
        os.killpg(child.pid, number)
        child.join(20)
        faults.wait_for_end(child.pid)
        text = log.read_text()
        lines = [line for line in text.splitlines() if line.startswith(f"{script}.py: interrupted")]
        assert "Traceback" not in text, text
        if number == signal.SIGKILL or "pass" in moment:
            assert listing(home) == old and not [*home.rglob("*.tmp")]
        if number == signal.SIGKILL:
            continue
        assert child.exitcode == 128 + number and len(lines) == 1, text
        if "pass" not in moment:
            assert "kept the best so far" in lines[0] and f"{home / 'model.pth'}" in lines[0]
            about = read_json(home / "model.json")
            assert about["sha256"] == hash_file(home / "model.pth")
            history = (home / "results" / "history.csv").read_text().splitlines()[1:]
            losses = [float(line.split(",")[3]) for line in history]
            assert about["val_loss"] in (min(losses), min(losses[:-1]))  # the last was cut short
