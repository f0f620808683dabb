"""train(), evaluate() and split(): the scripts as functions, for notebooks and other programs."""

import errno
import re
import shutil
import signal
import subprocess
import sys

import pytest
from faults import put
from helpers import ROOT, home_flags, keep, names_in, read_rows, run_split

import common
import evaluate
import split_val
import train
from cxr.errors import Failure
from cxr.files import read_json


def test_train_returns_the_content_of_model_json_and_of_cv_json(home):
    flags = home_flags("train", home)
    assert train.train([*flags, "--lr", 0.01]) == read_json(home / "model.json")
    assert train.train([*flags, "--folds", 3]) == read_json(home / "results" / "cv.json")


def test_evaluate_returns_the_content_of_metrics_json(home):
    report = evaluate.evaluate([*home_flags("evaluate", home), "--prevalence", 0.1])
    assert report == read_json(home / "results" / "metrics.json")
    again = evaluate.evaluate(["--from", home / "results" / "predictions.csv"])
    assert again["metrics"]["auroc"] == report["metrics"]["auroc"]


def test_evaluate_returns_the_predictions_of_new_images_also_of_unreadable_ones(home):
    images = [*sorted((home / "data/test/NORMAL").iterdir())[:2], home / "bad.png"]
    put(images[-1], b"")
    table = evaluate.evaluate([*images, *home_flags("evaluate", home)])
    rows = read_rows(home / "results" / "new_predictions.csv")
    assert table["file"].tolist() == [row["file"] for row in rows] == [str(x) for x in images]
    assert table["prediction"].tolist() == [row["prediction"] for row in rows]
    written = [float(row["probability"] or "nan") for row in rows]
    assert table["probability"].tolist() == pytest.approx(written, nan_ok=True)
    assert table["error"][2] == rows[2]["error"] != ""


def test_split_returns_the_records_of_all_splits(tree):
    folder = ["--data-dir", tree]
    assert split_val.split([*folder, "--per-class", 3]) == {
        "val": read_json(tree / "split_val.json")
    }
    assert split_val.split(folder)["val"]["moved"] == names_in(tree, "val")
    assert split_val.split([*folder, "--undo"]) == {}


def test_split_returns_the_findings_of_a_check_and_only_main_makes_an_exit_code_of_them(home):
    put(home / "data/train/NORMAL/bad.png", b"")
    findings = split_val.split(["--data-dir", home / "data", "--check"])
    assert "train/NORMAL/bad.png" in findings["errors"][0] and findings["images"]
    assert run_split(home / "data", "--check") == 2


@pytest.mark.parametrize(
    ("script", "function", "flags"),
    [
        ("train", train.train, ["--epoch", "x"]),
        ("train", train.train, ["--lr", 0, "--folds", 2]),
        ("train", train.train, ["--data-dir", "nowhere"]),
        ("evaluate", evaluate.evaluate, ["nosuch.png"]),
        ("evaluate", evaluate.evaluate, ["--threshold", 2]),
        ("split_val", split_val.split, ["--json", "x.json"]),
        ("split_val", split_val.split, ["--link-from", "nowhere"]),
    ],
)
def test_an_error_raises_failure_with_the_line_that_main_prints(
    script, function, flags, refused, home
):
    with pytest.raises(Failure) as error:
        function(home_flags(script, home, *flags))
    assert refused(2, script, *flags) == f"{script}.py: {error.value}"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(MemoryError(), 4, "--workers 0"), (OSError(errno.ENOSPC, "No space left"), 4, "disk space")],
)
def test_an_error_of_the_system_raises_failure_too(error, status, words, home, monkeypatch):
    def run_out(*_, **__):
        raise error

    monkeypatch.setattr(common, "extract_features", run_out)
    with pytest.raises(Failure, match=words) as failure:
        train.train(home_flags("train", home))
    assert failure.value.status == status and failure.value.__cause__ is error


def test_without_flags_the_command_line_of_the_notebook_is_not_read(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.chdir(tmp_path)
    for function in (train.train, split_val.split):
        with pytest.raises(Failure, match="data/chestxrays"):
            function()
    with pytest.raises(Failure, match=r"model\.pth: no such file"):
        evaluate.evaluate()


def test_the_functions_change_neither_stdout_nor_the_handlers_of_signals(home, monkeypatch, capsys):
    def set_handler(*_):
        raise AssertionError("a notebook has its own handlers")

    monkeypatch.setattr(signal, "signal", set_handler)
    stdout, errors = sys.stdout, sys.stdout.errors
    train.train(home_flags("train", home))
    evaluate.evaluate(home_flags("evaluate", home))
    split_val.split(home_flags("split_val", home))
    assert sys.stdout is stdout and sys.stdout.errors == errors


def test_the_notebook_in_the_docs_runs(data, tmp_path):
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 8
    for split in ("train", "val", "test"):
        keep(data, 3, split)
    for image in sorted((data / "val").glob("*/*")):
        shutil.move(image, data / "train" / image.parent.name)
    shutil.rmtree(data / "val")
    shutil.copy(sorted((data / "test").glob("*/*"))[0], tmp_path / "scan.png")
    (tmp_path / "data").mkdir()
    shutil.move(data, tmp_path / "data" / "chestxrays")
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"  # where Jupyter is started
    command = [sys.executable, "-c", path + code]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    metrics = read_json(tmp_path / "results" / "metrics.json")
    probability = read_rows(tmp_path / "results" / "new_predictions.csv")[0]["probability"]
    assert str(metrics["metrics"]["auroc"]) in process.stdout
    assert str(round(float(probability), 3)) in process.stdout
