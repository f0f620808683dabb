"""evaluate.py as a user runs it: main([...]) on phantoms, then what it wrote and printed."""

import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    PICTURES,
    TABLES,
    TINY_FAST,
    plain_network,
    plain_pixels,
    read_probs,
    read_report,
    read_rows,
)
from PIL import Image

import common
import evaluate
import split_val
import train
from cxr.files import hash_file, read_json
from cxr.folders import CLASSES, list_images, list_split
from cxr.predictions import COLUMNS

# ---------------------------------------------------------------- a run


def test_a_run_prints_the_reference_s_lines_first_and_writes_every_file(scored):
    folder, screen = scored
    report = read_report(folder)
    lines = [line for line in screen.splitlines() if not line.startswith(("Device: ", "Features"))]
    assert lines[0] == f"Test accuracy: {report['metrics']['accuracy']['value']:.3f}"
    assert lines[1] == f"Test F1-score: {report['metrics']['f1']['value']:.3f}"
    assert {path.name for path in folder.iterdir()} == PICTURES | TABLES
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not empty


def test_the_report_says_what_was_scored_and_with_which_model(scored, trained):
    report, about = read_report(scored[0]), read_json(trained / "model.json")
    assert report["n"] == report["patients"] == 24 and report["unreadable"] == 0
    assert report["split"] == "test" and report["positive"] == "PNEUMONIA"
    assert report["threshold"] == 0.5 and "fixed" in report["threshold_from"]
    assert report["warnings"] == [] and report["comparison"] is None
    for key in ("arch", "weights", "epoch", "seed", "sha256", "window", "slope", "intercept"):
        assert report["model"][key] == about[key], key


def test_the_probabilities_are_those_of_plain_torch(run_evaluate, trained, data, tmp_path):
    paths = [path for path, _ in list_split(data, "test")]
    for path, size in zip(paths, [(300, 224), (224, 400), (150, 131)], strict=False):
        with Image.open(path) as image:  # not square: nothing may be cropped
            image.resize(size).save(path.with_suffix(".png"))
        path.unlink()
    assert run_evaluate("--data-dir", data, "--no-cache") == 0
    network, found = plain_network(trained / "model.pth"), []
    for name, prob in read_probs(tmp_path / "results" / "predictions.csv").items():
        with torch.no_grad():
            found.append(network(plain_pixels(data / name)).sigmoid().item())
        assert found[-1] == pytest.approx(prob, abs=1e-3), name
    assert len(found) == 24 and np.ptp(found) > 0.1  # else anything would be near


def test_an_image_scores_the_same_whatever_comes_with_it(run_evaluate, split_phantoms, tmp_path):
    paths, table = (list_images(split_phantoms / "test/NORMAL"), "results/new_predictions.csv")
    assert run_evaluate(*paths[:3], "--no-cache") == 0
    some = read_probs(tmp_path / table)
    assert run_evaluate(*reversed(paths), "--no-cache", "--batch-size", 5) == 0
    found = read_probs(tmp_path / table)
    assert {name: found[name] for name in some} == pytest.approx(some, abs=1e-6)


def test_no_connection_is_opened_and_the_backbone_stays_as_it_was(
    run_evaluate, trained, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    before = hash_file(trained / "model.pth")
    assert run_evaluate("--no-cache") == 0
    assert hash_file(trained / "model.pth") == before
    state = torch.load(trained / "model.pth")
    for name, tensor in common.build_backbone("tinynet").network.state_dict().items():
        assert torch.equal(state[name], tensor), name  # BatchNorm's statistics are among them


def test_evaluate_never_asks_the_network(run_script, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert run_script("evaluate", "--no-cache") == (0, [])


def test_the_stored_threshold_holds_unless_another_is_given(run_evaluate, remake, tmp_path):
    path = remake(threshold=0.3, threshold_rule="youden")
    assert run_evaluate("--checkpoint", path) == 0
    report = read_report(tmp_path / "results")
    assert report["threshold"] == 0.3 and "youden on val" in report["threshold_from"]
    assert run_evaluate("--checkpoint", path, "--threshold", 0.6) == 0
    again = read_report(tmp_path / "results")
    assert again["threshold"] == 0.6 and again["threshold_from"] == "--threshold"
    for each in (report, again):
        probs = np.array([*read_probs(tmp_path / "results/predictions.csv").values()], np.float32)
        assert each["counts"]["tp"] + each["counts"]["fp"] == (probs > each["threshold"]).sum()


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_split_is_no_test_result(split, run_evaluate, tmp_path, capsys):
    assert run_evaluate("--split", split) == 0
    captured, report = capsys.readouterr(), read_report(tmp_path / "results")
    assert f"{split.capitalize()} accuracy: " in captured.out and "NO TEST RESULT" in captured.err
    assert "NO TEST RESULT" in report["warnings"][0] and report["shortcut"] is None


def test_transforms_edited_after_training_are_warned_of(data, flags, monkeypatch, capsys):
    assert train.main(flags(data, *TINY_FAST)) == evaluate.main(flags(data)) == 0
    assert "transforms" not in capsys.readouterr().err
    monkeypatch.setattr(common, "PREPARE", common.v2.Resize((224, 224), antialias=False))
    assert evaluate.main(flags(data)) == 0
    assert "the transforms of common.py are not those" in capsys.readouterr().err


# ---------------------------------------------------------------- refusals


def test_scores_that_are_not_finite_stop_with_status_3(run_evaluate, remake, tmp_path, capsys):
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
        (["--split", "tets"], "invalid choice"),
        (["--thresold", "0.5"], "--thresold"),
        (["--from", "nosuch.csv"], "nosuch.csv"),
        (["--compare", "nosuch.csv"], "nosuch.csv"),
        (["--checkpoint", "nosuch.pth"], "nosuch.pth"),
        (["--data-dir", "nosuch"], "nosuch"),
        (["--device", "cuda:99"], "cuda:99"),
        (["x.png", "--from", "y.csv"], "need labels"),
        (["x.png", "--compare", "y.csv"], "need labels"),
        (["--from", "y.csv", "--cam", "z"], "--cam"),
        (["--results-dir", __file__], "test_evaluate.py"),
        ([Path(__file__).parent.parent], "directly inside"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, words, run_evaluate, tmp_path, capsys):
    assert run_evaluate(*flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not [*(tmp_path / "results").glob("*")]


def test_unreadable_test_images_stop_and_with_skip_bad_have_rows_of_their_own(
    run_evaluate, data, tmp_path, capsys, rescore
):
    bad = [list_images(data / "test" / name)[0] for name in CLASSES]
    bad[0].write_bytes(bad[0].read_bytes()[:2000])
    bad[1].write_bytes(b"")
    assert run_evaluate("--data-dir", data) == 2
    err = capsys.readouterr().err
    assert all(str(path) in err for path in bad) and not [*(tmp_path / "results").glob("*")]
    assert run_evaluate("--data-dir", data, "--skip-bad") == 0
    report = read_report(tmp_path / "results")
    rows = read_rows(tmp_path / "results/predictions.csv")
    assert report["n"] == 22 and report["unreadable"] == 2 and len(rows) == 24
    empty = [row for row in rows if row["error"]]
    assert [Path(row["file"]).name for row in empty] == [path.name for path in bad]
    assert all(row["probability"] == row["prediction"] == "" and row["label"] for row in empty)
    status, folder = rescore(tmp_path / "results/predictions.csv")
    assert status == 0 and read_report(folder)["metrics"] == report["metrics"]


def test_without_test_images_each_step_says_what_to_do(data, tmp_path, flags, capsys):
    shutil.rmtree(data / "test")
    assert split_val.main(["--data-dir", str(data), "--check"]) == 0
    assert "no test/: nothing to report a result on; move whole patients" in capsys.readouterr().out
    assert train.main(flags(data, *TINY_FAST)) == 0 and evaluate.main(flags(data)) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'model.pth'} is saved" in error and "--split val" in error


# ---------------------------------------------------------------- new images


def test_new_images_get_a_table_and_an_unreadable_one_its_error(
    run_evaluate, data, tmp_path, capsys
):
    (folder := tmp_path / "new").mkdir()
    good = list_images(data / "test/PNEUMONIA")[0]
    with Image.open(good) as image:
        image.resize((500, 300)).save(folder / "large.png")
        image.resize((40, 60)).save(folder / "small.bmp")
    (folder / "bad.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("no image")
    path = tmp_path / "results/new_predictions.csv"
    assert run_evaluate(good) == 0
    earlier = path.read_bytes()
    assert run_evaluate(folder, good) == 2
    warning, failure = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {folder}: 1 files are not read (.txt)")
    assert failure.startswith(f"evaluate.py: {folder / 'bad.jpg'}: a web page")
    assert path.read_bytes() == earlier  # a run that fails leaves it alone
    assert run_evaluate(folder, good, "--skip-bad", "--cam", "maps") == 0
    captured, rows = capsys.readouterr(), read_rows(path)
    assert list(rows[0]) == list(COLUMNS)
    names = [str(folder / name) for name in ("bad.jpg", "large.png", "small.bmp")]
    assert [row["file"] for row in rows] == [*names, str(good)]
    assert rows[0]["error"] == "a web page, not an image"
    assert rows[0]["probability"] == rows[0]["prediction"] == ""
    for row in rows[1:]:
        assert row["prediction"] == CLASSES[float(row["probability"]) > 0.5]
        assert row["label"] == row["error"] == "" and f"{row['file']} " in captured.out
    found = {path.name for path in (tmp_path / "results" / "maps").iterdir()}
    assert found == {"large.png.png", "small.bmp.png", f"{good.name}.png"}


def test_new_images_leave_the_report_alone_and_say_what_they_replace(
    run_evaluate, data, tmp_path, capsys
):
    results = tmp_path / "results"
    assert run_evaluate() == 0
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    assert run_evaluate(data / "test/NORMAL") == 0
    assert "in place of an earlier one" not in capsys.readouterr().out
    assert run_evaluate(data / "test/PNEUMONIA") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Written: {results / 'new_predictions.csv'}, in place of an earlier one"
    assert {name: (results / name).read_bytes() for name in before} == before
    assert len(read_rows(results / "new_predictions.csv")) == 12
    assert run_evaluate("--from", results / "new_predictions.csv") == 2  # new images have no labels
    assert "row 2, column label" in capsys.readouterr().err
