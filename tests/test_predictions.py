"""cxr/predictions.py: the table predictions.csv, read strictly, and what --from makes of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import PICTURES, TABLES, read_report, read_rows, write_rows
from simulated import by_scikit_learn

import evaluate
from cxr.files import write_json
from cxr.folders import CLASSES, list_split


def test_predictions_csv_holds_every_image_and_agrees_with_the_report(scored, split_phantoms):
    rows, report = read_rows(scored[0] / "predictions.csv"), read_report(scored[0])
    paths = [path for path, _ in list_split(split_phantoms, "test")]
    expected = [path.relative_to(split_phantoms).as_posix() for path in paths]
    assert [row["file"] for row in rows] == expected
    for row in rows:
        assert row["file"].split("/")[1] == row["label"] and row["error"] == ""
        assert row["prediction"] == CLASSES[float(row["probability"]) > 0.5]
        assert f"{np.float32(row['probability']):.9g}" == row["probability"]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(right / 24)


def test_from_equals_the_original_run_and_needs_neither_images_nor_network(
    scored, pictures, tmp_path, monkeypatch, rescore
):
    results = Path(shutil.copytree(scored[0], tmp_path / "results"))
    monkeypatch.chdir(tmp_path)  # where neither data/ nor model.pth is
    status, again = rescore(results / "predictions.csv")
    assert status == 0
    assert read_report(again) == read_report(results)
    assert {path.name for path in again.iterdir()} == TABLES | PICTURES - {"worst.png"}
    for name in {"predictions.csv"} | PICTURES - {"worst.png"}:
        assert (again / name).read_bytes() == (results / name).read_bytes(), name


@pytest.mark.usefixtures("quick")
def test_from_without_a_results_folder_prints_the_same_and_writes_nothing(
    scored, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--from", str(scored[0] / "predictions.csv")]) == 0
    other = "Device: ", "Features", "Written: ", "The page "
    expected = [line for line in scored[1].splitlines() if not line.startswith(other)]
    assert capsys.readouterr().out.splitlines() == expected
    assert not [*tmp_path.iterdir()]
    assert {path.name for path in scored[0].iterdir()} == TABLES | PICTURES


def test_from_with_another_threshold_computes_every_number_again(scored, tmp_path, rescore):
    results = Path(shutil.copytree(scored[0], tmp_path / "results"))
    rows = read_rows(results / "predictions.csv")
    probs = np.array([row["probability"] for row in rows], np.float32)
    labels = np.array([CLASSES.index(row["label"]) for row in rows])
    cut = float(np.sort(probs)[-6])
    status, folder = rescore(results / "predictions.csv", "--threshold", cut)
    report, expected = read_report(folder), by_scikit_learn(labels, probs, cut)
    assert status == 0 and report["threshold"] == cut and report["threshold_from"] == "--threshold"
    for name, value in expected.items():
        assert report["metrics"][name]["value"] == pytest.approx(value, abs=1e-6), name
    assert report["counts"]["tp"] + report["counts"]["fp"] == 5
    found = [row["prediction"] for row in read_rows(folder / "predictions.csv")]
    assert found.count("PNEUMONIA") == 5


def test_from_takes_the_threshold_of_the_report_beside_it(tmp_path, rescore):
    source = write_rows(tmp_path / "predictions.csv", [0, 1, 0, 1], [0.2, 0.9, 0.3, 0.4])
    _, folder = rescore(source)
    assert read_report(folder)["threshold"] == 0.5
    write_json(tmp_path / "metrics.json", {"threshold": 0.25})
    _, folder = rescore(source)
    assert read_report(folder)["threshold"] == 0.25
    assert read_report(folder)["threshold_from"] == f"{tmp_path / 'metrics.json'}, fixed in advance"


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1, column file"),
        ("file;label;probability\na;NORMAL;0,5\n", "row 1, column file"),
        ("file,label\na,NORMAL\n", "row 1, column probability"),
        ("file,label,probability\n", "row 2, column file"),
        ("file,label,probability\na,NORMAL,0.1\nb,pneumonia,0.9\n", "row 3, column label"),
        ("file,label,probability\na,NORMAL,0.1\nb,PNEUMONIA,1.5\n", "row 3, column probability"),
        ("file,label,probability\na,NORMAL,0.1\nb,PNEUMONIA,nan\n", "row 3, column probability"),
        ("file,label,probability\na,NORMAL,\nb,PNEUMONIA,0.1\n", "row 2, column probability"),
        ("file,label,probability\na,NORMAL\n", "row 2, column probability"),
        ("file,label,probability\na,NORMAL,0.1\na,PNEUMONIA,0.4\n", "row 3, column file"),
        ("file,label,probability\n,NORMAL,0.1\n", "row 2, column file"),
        ("file,label,probability\na,NORMAL,'0.1\n\"b", "not a CSV file"),
        (b"\xff\xfe\x00", "not a CSV file"),
    ],
)
def test_a_malformed_csv_is_one_line_that_names_row_and_column(
    text, words, compared, tmp_path, capsys, rescore
):
    bad = tmp_path / "p.csv"
    bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    source, flags = bad, ()
    if compared:
        source = write_rows(tmp_path / "good.csv", [0, 1], [0.1, 0.8], ["a", "b"])
        flags = "--compare", bad
    status, folder = rescore(source, *flags)
    err = capsys.readouterr().err
    assert status == 2 and words in err and str(bad) in err and err.count("\n") == 1
    assert not [*folder.glob("*")]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(label, tmp_path, capsys, rescore):
    status, folder = rescore(write_rows(tmp_path / "p.csv", [label] * 3, [0.1, 0.5, 0.9]))
    err = capsys.readouterr().err
    assert status == 2 and CLASSES[1 - label] in err and err.count("\n") == 1
    assert not [*folder.glob("*")]
