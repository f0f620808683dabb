"""cxr/cli.py and cxr/errors.py: flags, one-line errors, exit codes, signals."""

import os
import subprocess
import sys
import time
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import faults
import pytest
import torch
from faults import listing
from helpers import ROOT, linux, path_flags, read_about, read_rows

import common
import train
from cxr.files import hash_file


def run_python(code, *argv, cwd=None):
    """Runs Python code that can import the scripts. Returns (exit code, stdout, stderr)."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n{code}"
    command = [sys.executable, "-c", code, *map(str, argv)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return process.returncode, process.stdout, process.stderr.strip()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ("sys.version_info = (3, 9, 18)", "Python 3.10 or newer needed, found "),
        ("sys.path = [path for path in sys.path if 'site-packages' not in path]", "found none"),
        ("sys.modules['torchvision'] = None", "torchvision"),
    ],
)
def test_an_old_python_and_a_missing_or_broken_package_are_one_line(environment, reason):
    status, _, error = run_python(f"{environment}\nimport train")
    assert status == 2 and len(error.splitlines()) == 1 and reason in error
    assert error.endswith("; make install, then .venv/bin/python train.py")


@pytest.mark.parametrize("name", ["torch", "torchmetrics", "scikit-learn", "pydicom"])
def test_a_package_that_is_too_old_is_one_line_at_once(name, tmp_path):
    about = f"Name: {name}\nVersion: 1.4.9\n"
    faults.put(tmp_path / f"{name.replace('-', '_')}-1.4.9.dist-info/METADATA", about.encode())
    status, _, error = run_python(f"sys.path.insert(0, {str(tmp_path)!r})\nimport train")
    assert status == 2 and len(error.splitlines()) == 1
    assert f"{name} " in error and "or newer needed, found 1.4.9; make install" in error


def test_a_split_needs_nothing_that_windows_lacks(tree):
    code = "sys.modules['fcntl'] = None\nimport os, signal, split_val, train, evaluate\n"
    code += "os.process_cpu_count = os.cpu_count\n"  # else Python 3.13 calls sched_getaffinity
    code += "for name in ('sched_getaffinity', 'uname', 'fork'): delattr(os, name)\n"
    code += "for name in ('SIGALRM', 'SIGCHLD', 'alarm'): delattr(signal, name)\n"
    code += "sys.exit(split_val.main(sys.argv[1:]))"
    status, out, error = run_python(code, "--data-dir", tree)
    assert status == 0 and "Moved 4 NORMAL and 4 PNEUMONIA" in out, error


def test_importing_the_scripts_prints_and_writes_nothing(tmp_path):
    assert run_python("import split_val, train, evaluate", cwd=tmp_path) == (0, "", "")
    assert not os.listdir(tmp_path)


def test_all_files_are_written_after_the_reader_of_stdout_left(split_phantoms, trained, tmp_path):
    code = "import sys, conftest, cxr.bootstrap, evaluate; cxr.bootstrap.DRAWS = 40\n"
    code += "sys.exit(evaluate.main())"
    flags = path_flags(split_phantoms, trained, tmp_path, "--results-dir", tmp_path / "results")
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/bin:/usr/bin"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, *flags], env=env, **pipes)
    while b"Features" not in process.stdout.readline():
        pass
    process.stdout.close()  # as `| head` does
    assert "Traceback" not in process.stderr.read().decode()
    assert process.wait() == 4
    assert (tmp_path / "results" / "report.html").exists()


def test_the_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("default: 50", "default: 0.001", "default: 8", "0 = never", "default: resnet50"):
        assert text in out


def test_debug_adds_the_traceback(run_train, capsys):
    assert run_train("--arch", "resnet5", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--data-dir", "nowhere"], ["--epoch", "x"]])
def test_in_a_notebook_an_error_begins_with_the_name_of_the_script(flags, refused, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert refused(2, "train", *flags).startswith("train.py: ")


@pytest.mark.parametrize(
    ("script", "flag", "text", "meant"),
    [
        ("train", "--lr", "0,001", "0.001"),
        ("train", "--lr", "1,5e-4", "0.00015"),
        ("train", "--window", "2%", "2"),
        ("train", "--epochs", "1,000", "1000"),
        ("train", "--epochs", "50,0", "50"),
        ("train", "--seed", "1,234,567", "1234567"),
        ("train", "--threshold", "0,5", "0.5"),
        ("train", "--threshold", "sensitivity=95%", "sensitivity=0.95"),
        ("evaluate", "--prevalence", "3%", "0.03"),
        ("evaluate", "--prevalence", "0,5 %", "0.005"),
        ("evaluate", "--threshold", "70%", "0.7"),
        ("split_val", "--test", "0,2", "0.2"),
        ("split_val", "--test", "20%", "0.2"),
    ],
)
def test_a_number_with_a_comma_or_per_cent_is_answered_with_the_number_that_was_meant(
    script, flag, text, meant, refused
):
    line = refused(2, script, flag, text)
    assert f"argument {flag}: expected" in line
    assert f"found {text}; did you mean {meant}? (see" in line


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--lr", "fast"), ("--lr", "1e"), ("--lr", "-0,1"), ("--epochs", "1,5"), ("--epochs", "5%")],
)
def test_nothing_is_recommended_that_would_be_refused(flag, text, refused):
    assert "did you mean" not in refused(2, "train", f"{flag}={text}")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_full_memory_names_the_flag_that_helps(script, error, refused, home, monkeypatch):
    def forward(*_):
        raise error("out of memory")

    monkeypatch.setattr(type(common.get_model("tinynet")), "forward", forward)
    before = listing(home)
    assert "--feature-batch-size" in refused(4, script, "--no-cache")
    assert listing(home) == before


@pytest.fixture
def send_signal(start, home, tmp_path, fuzz):
    """send_signal(number, script, moment): (exit code, lines "interrupted") of its processes."""

    def call(number, script, moment):
        flags = ["--no-cache", "--workers", 2, "--feature-batch-size", 1]
        flags += ["--epochs", 10**6, "--patience", 0] if script == "train" else []
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = start(script, flags, faults.slow_down if "pass" in moment else None)
        faults.wait_for(moment, log)
        time.sleep(fuzz.rng.uniform(0, 0.3))
        os.killpg(process.pid, number)  # as from a terminal
        process.join(20)
        faults.wait_for_end(process.pid)
        assert "Traceback" not in log.read_text(), log.read_text()
        lines = log.read_text().splitlines()
        return process.exitcode, [x for x in lines if x.startswith(f"{script}.py: interrupted")]

    return call


@linux
def test_a_worker_that_ends_at_the_same_time_as_the_run_adds_no_line():
    """SIGTERM ends the workers too, so that SIGCHLD and SIGTERM can arrive together."""
    code = "import argparse, signal\nfrom cxr import cli\n"
    code += "def command(_):\n"
    code += "    signal.signal(signal.SIGCHLD, lambda *_: None)\n"  # as torch does
    code += "    both = [signal.SIGTERM, signal.SIGCHLD]\n"
    code += "    signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
    code += "    for number in both: signal.raise_signal(number)\n"
    code += "    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\n"
    code += "args = argparse.Namespace(debug=False)\n"
    code += "sys.exit(cli.run(command, lambda _: args, [], 'train.py'))"
    status, _, error = run_python(code)
    assert (status, len(error.splitlines())) == (143, 1), error


SIGNALS = SIGINT, SIGTERM, SIGHUP
CODES = {SIGKILL: -9, SIGINT: 130, SIGTERM: 143, SIGHUP: 143}
STOPS = [(name, "in the pass", n) for name in ("train", "evaluate") for n in (*SIGNALS, SIGKILL)]


@linux
@pytest.mark.parametrize(("script", "moment", "number"), [*STOPS, ("train", "Epoch [20/", SIGKILL)])
def test_a_signal_is_one_line_and_changes_no_file(script, moment, number, fuzz, send_signal, home):
    before = listing(home)
    for _ in range(fuzz.count(1, 5)):
        status, lines = send_signal(number, script, moment)
        assert (status, len(lines)) == (CODES[number], number != SIGKILL), lines
        assert listing(home) == before


@linux
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_epochs_saves_the_best_one(number, fuzz, send_signal, home):
    for _ in range(fuzz.count(1, 5)):
        status, (line,) = send_signal(number, "train", "Epoch [20/")
        assert status == CODES[number]
        assert "; saved epoch " in line and f"{home / 'model.pth'}" in line
        model = read_about(home)
        assert model["sha256"] == hash_file(home / "model.pth")
        losses = [float(row["val_loss"]) for row in read_rows(home / "results" / "history.csv")]
        assert model["val_loss"] in (min(losses), min(losses[:-1]))  # the last one was interrupted


@linux
def test_a_closed_terminal_ends_a_training_and_the_best_epoch_is_saved(start, home, tmp_path):
    terminal, screen = os.openpty()
    process = start(
        "train", ["--epochs", 10**6, "--patience", 0], faults.use_terminal, os.ttyname(screen)
    )
    shown = b""
    with faults.within(60):
        while b"Epoch [20/" not in shown:
            shown += os.read(terminal, 1000)
    model = (home / "model.pth").read_bytes()
    os.close(terminal)
    os.close(screen)
    process.join(20)
    assert process.exitcode == 143
    assert (home / "model.pth").read_bytes() != model
    assert read_about(home)["sha256"] == hash_file(home / "model.pth")


@linux
def test_under_nohup_a_training_goes_on_after_a_lost_connection(start, tmp_path):
    process = start("train", ["--epochs", 50, "--patience", 0], faults.ignore_hangup)
    faults.wait_for("Epoch [20/", tmp_path / "log")
    os.kill(process.pid, SIGHUP)
    process.join(30)
    assert process.exitcode == 0 and "Epoch [50/50]" in (tmp_path / "log").read_text()
