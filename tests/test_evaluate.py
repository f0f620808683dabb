"""evaluate.py as a user runs it: main([...]) on phantoms, then its files and its output."""

import shutil
import socket
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from faults import listing
from helpers import (
    PICTURES,
    TABLES,
    plain_network,
    plain_pixels,
    read_probs,
    read_report,
    read_rows,
)
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

import common
import split_val
from cxr.files import hash_file, read_json
from cxr.folders import CLASSES, list_images
from cxr.predictions import COLUMNS


def test_a_run_prints_accuracy_first_and_writes_every_file(scored, trained):
    folder, screen = scored
    report, model = read_report(folder), read_json(trained / "model.json")
    lines = [line for line in screen.splitlines() if not line.startswith(("Device: ", "Features"))]
    assert lines[0] == f"Test accuracy: {report['metrics']['accuracy']['value']:.3f}"
    assert lines[1] == f"Test F1-score: {report['metrics']['f1']['value']:.3f}"
    assert {path.name for path in folder.iterdir()} == PICTURES | TABLES
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not empty
    assert report["n"] == report["patients"] == 24 and report["unreadable"] == 0
    assert report["split"] == "test" and report["positive"] == "PNEUMONIA"
    assert report["threshold"] == 0.5 and "fixed" in report["threshold_from"]
    assert report["warnings"] == [] and report["comparison"] is None
    for key in ("arch", "weights", "epoch", "seed", "sha256", "window", "slope", "intercept"):
        assert report["model"][key] == model[key], key


def test_an_offline_run_gives_the_probabilities_of_plain_torch(
    run_evaluate, trained, split_phantoms, tmp_path, monkeypatch, capsys
):
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, None)
    before = hash_file(trained / "model.pth")
    assert run_evaluate("--no-cache") == 0 and capsys.readouterr().err == ""
    assert hash_file(trained / "model.pth") == before
    network, expected = plain_network(trained / "model.pth"), {}
    probs = read_probs(tmp_path / "results" / "predictions.csv")
    for name in probs:
        with torch.no_grad():
            expected[name] = network(plain_pixels(split_phantoms / name)).sigmoid().item()
    assert probs == pytest.approx(expected, abs=1e-3)
    assert len(probs) == 24 and np.ptp([*probs.values()]) > 0.1  # not all nearly the same


@pytest.mark.parametrize("flags", [(), ("--threshold", 0.6)])
def test_the_flag_replaces_the_stored_threshold(flags, run_evaluate, remake, tmp_path):
    path = remake(threshold=0.3, threshold_rule="youden")
    threshold, origin = 0.3, f"{path.with_suffix('.json')}, youden on val"
    if flags:
        threshold, origin = 0.6, "--threshold"
    assert run_evaluate("--checkpoint", path, *flags) == 0
    report = read_report(tmp_path / "results")
    assert report["threshold"] == threshold and report["threshold_from"] == origin
    probs = [*read_probs(tmp_path / "results/predictions.csv").values()]
    n_positive = (np.array(probs, np.float32) > threshold).sum()
    assert report["counts"]["tp"] + report["counts"]["fp"] == n_positive


@pytest.mark.parametrize("split", ["train", "val"])
def test_scores_of_another_split_are_no_test_result(split, run_evaluate, tmp_path, capsys):
    assert run_evaluate("--split", split) == 0
    captured, report = capsys.readouterr(), read_report(tmp_path / "results")
    assert f"{split.capitalize()} accuracy: " in captured.out and "NO TEST RESULT" in captured.err
    assert "NO TEST RESULT" in report["warnings"][0] and report["shortcut"] is None


def test_transforms_edited_after_the_training_cause_a_warning(run_evaluate, monkeypatch, capsys):
    monkeypatch.setattr(common, "PREPARE", common.v2.Resize((224, 224), InterpolationMode.BICUBIC))
    assert run_evaluate("--no-cache") == 0
    warning = capsys.readouterr().err
    assert "other transforms than those in common.py" in warning and "bicubic" in warning.lower()


def test_a_score_that_is_not_finite_ends_with_exit_code_3(run_evaluate, remake, tmp_path, capsys):
    large = {"bn.weight": torch.full((8,), 1e30), "fc.weight": torch.tensor([[1e30, -1e30] * 4])}
    assert run_evaluate("--checkpoint", remake(large)) == 3
    assert "not finite" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert not [*(tmp_path / "results").glob("*")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nosuch.png"], "nosuch.png"),
        (["--threshold", "1.5"], "from 0 to 1"),
        (["--threshold", "nan"], "from 0 to 1"),
        (
            ["--threshold", "sensitivity=0.95"],
            "fitted on val/ in the training: use it with train.py",
        ),
        (["--split", "tets"], "invalid choice"),
        (["--thresold", "0.5"], "--thresold"),
        (["--from", "nosuch.csv"], "--from nosuch.csv: no such file, expected a predictions.csv"),
        (["--compare", "nosuch.csv"], "--compare nosuch.csv: no such file, expected a"),
        (["--checkpoint", "nosuch.pth"], "nosuch.pth"),
        (["x.png", "--from", "y.csv"], "no labels"),
        (["x.png", "--compare", "y.csv"], "no labels"),
        (["--from", "y.csv", "--cam", "z"], "--cam"),
        ([Path(__file__).parent.parent], "directly inside"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, words, run_evaluate, tmp_path, capsys):
    assert run_evaluate(*flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not [*(tmp_path / "results").glob("*")]


WRONG_TABLES = {  # what is wrong: (how the right table is changed, words of the message)
    "another split": (lambda text: text.replace("test/", "val/"), "val/NORMAL"),
    "an image too few": (lambda text: text[: text.rindex("24,test/")], "the same 24 images"),
    "another label": (lambda text: text.replace(",NORMAL,", ",PNEUMONIA,", 1), "another label"),
    "no column": (lambda text: text.replace("label", "class", 1), "column label"),
}


@pytest.mark.parametrize("mistake", WRONG_TABLES)
def test_compare_refuses_a_wrong_table_before_the_features(
    mistake, run_evaluate, scored, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(common, "extract_features", None)
    change, words = WRONG_TABLES[mistake]
    table = tmp_path / "p.csv"
    table.write_text(change((scored[0] / "predictions.csv").read_text()))
    assert run_evaluate("--compare", table) == 2
    err = capsys.readouterr().err
    assert str(table) in err and words in err and err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_images_that_are_left_out_are_empty_rows(run_evaluate, data, tmp_path, rescore):
    unreadable = [list_images(data / "test" / name)[0] for name in CLASSES]
    unreadable[0].write_bytes(unreadable[0].read_bytes()[:2000])
    unreadable[1].write_bytes(b"")
    assert run_evaluate("--data-dir", data, "--skip-bad") == 0
    report = read_report(tmp_path / "results")
    rows = read_rows(tmp_path / "results/predictions.csv")
    assert report["n"] == 22 and report["unreadable"] == 2 and len(rows) == 24
    empty = [row for row in rows if row["error"]]
    assert [Path(row["file"]).name for row in empty] == [path.name for path in unreadable]
    assert all(row["probability"] == row["prediction"] == "" and row["label"] for row in empty)
    status, folder = rescore(tmp_path / "results/predictions.csv")
    assert status == 0 and read_report(folder)["metrics"] == report["metrics"]


def test_without_test_images_there_is_advice(data, run_train, run_evaluate, tmp_path, capsys):
    shutil.rmtree(data / "test")
    assert split_val.main(["--data-dir", str(data), "--check"]) == 0
    out = capsys.readouterr().out
    assert "there is no test/" in out and "run split_val.py --test 50 (make all TEST=50)" in out
    assert run_train(data=data) == 0
    assert run_evaluate("--data-dir", data, "--checkpoint", tmp_path / "model.pth") == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'model.pth'} is saved" in err and "--split val" in err
    assert "make all TEST=0.2 (split_val.py --test 0.2)" in err


def test_an_unreadable_new_image_is_a_row_of_the_table_and_exit_code_2(
    run_evaluate, split_phantoms, tmp_path, capsys
):
    new, table = tmp_path / "new", tmp_path / "results" / "new_predictions.csv"
    shutil.copytree(split_phantoms / "test" / "NORMAL", new)
    (new / "bad.jpg").write_text("<html>")
    (new / "empty.png").write_bytes(b"")
    assert run_evaluate(new) == 2
    screen, rows = capsys.readouterr(), read_rows(table)
    names = sorted(str(path) for path in new.iterdir())
    assert [row["file"] for row in rows] == names and len(names) == 14
    errors = {Path(row["file"]).name: row["error"] for row in rows if row["error"]}
    assert errors == {"bad.jpg": "a web page, not an image", "empty.png": "the file is empty"}
    assert all((row["probability"] == "") == (row["error"] != "") for row in rows)
    assert screen.out.splitlines()[-2] == f"Wrote {table}"
    assert "bad.jpg" in screen.out and "empty.png" in screen.out
    (line,) = screen.err.splitlines()
    assert line.startswith("evaluate.py: 2 of 14 images could not be read (")
    assert f"bad.jpg: a web page, not an image); {table} lists all" in line
    before = table.read_bytes()
    assert run_evaluate(new, "--skip-bad") == 0
    assert table.read_bytes() == before and capsys.readouterr().err == ""


def test_a_table_is_written_also_if_no_new_image_can_be_read(run_evaluate, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("<html>")
    assert run_evaluate(tmp_path / "bad.jpg", "--cam", "maps") == 2
    assert "1 of 1 images could not be read" in capsys.readouterr().err
    (row,) = read_rows(tmp_path / "results" / "new_predictions.csv")
    assert row["error"] == "a web page, not an image" and row["probability"] == ""


def test_the_earlier_table_stays_if_the_new_one_is_not_complete(
    run_evaluate, split_phantoms, tmp_path, monkeypatch
):
    images, table = list_images(split_phantoms / "test/NORMAL"), tmp_path / "results"
    table /= "new_predictions.csv"
    assert run_evaluate(images[0]) == 0
    before = table.read_bytes()
    monkeypatch.setattr(common, "extract_features", Mock(side_effect=KeyboardInterrupt))
    assert run_evaluate(*images) == 130
    assert table.read_bytes() == before


def test_new_images_have_a_table_of_their_own(run_evaluate, data, tmp_path, capsys):
    folder, new, results = data / "test", tmp_path / "new", tmp_path / "results"
    good, table = list_images(folder / "PNEUMONIA")[0], results / "new_predictions.csv"
    new.mkdir()
    with Image.open(good) as image:
        image.resize((500, 300)).save(new / "large.png")
        image.resize((40, 60)).save(new / "small.bmp")
    (new / "bad.jpg").write_text("<html>")
    (new / "notes.txt").write_text("no image")
    assert run_evaluate() == 0
    files_of_test = listing(results)
    assert run_evaluate(new / "large.png") == 0
    assert f"Wrote {table}\n" in capsys.readouterr().out
    before = listing(results)
    assert run_evaluate(folder) == 2
    assert f"{folder / 'NORMAL'} {folder / 'PNEUMONIA'}" in capsys.readouterr().err
    assert listing(results) == before
    assert run_evaluate(new, good, "--skip-bad", "--cam", "maps") == 0
    out, rows = capsys.readouterr().out, read_rows(table)
    assert f"{table}" in out.splitlines()[-2] and "replaced an earlier one" in out.splitlines()[-2]
    assert list(rows[0]) == list(COLUMNS)
    names = [str(new / name) for name in ("bad.jpg", "large.png", "small.bmp")]
    assert [row["file"] for row in rows] == [*names, str(good)]
    assert rows[0]["error"] == "a web page, not an image"
    assert rows[0]["probability"] == rows[0]["prediction"] == ""
    for row in rows[1:]:
        assert row["prediction"] == CLASSES[float(row["probability"]) > 0.5]
        assert row["label"] == row["error"] == "" and f"{row['file']} " in out
    maps = {path.name for path in (results / "maps").iterdir()}
    assert maps == {"map_2.png", "map_3.png", "map_4.png"}  # no. 1 is unreadable
    shutil.rmtree(results / "maps")
    table.unlink()
    table.with_suffix(".html").unlink()
    assert listing(results) == files_of_test
