"""cxr/predictions.py: the table predictions.csv, and scoring it again with --from."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import PICTURES, TABLES, read_report, read_rows, snapshot, write_rows
from simulated import by_scikit_learn

import evaluate
from cxr.files import write_json
from cxr.folders import CLASSES, list_split


def test_predictions_csv_has_a_row_for_every_image(scored, split_phantoms):
    rows, report = read_rows(scored[0] / "predictions.csv"), read_report(scored[0])
    paths = [path for path, _ in list_split(split_phantoms, "test", CLASSES)]
    expected = [path.relative_to(split_phantoms).as_posix() for path in paths]
    assert [row["file"] for row in rows] == expected
    assert next(iter(rows[0])) == "number"
    assert [row["number"] for row in rows] == [*map(str, range(1, 25))]
    for row in rows:
        assert row["file"].split("/")[1] == row["label"] and row["error"] == ""
        assert row["prediction"] == CLASSES[float(row["probability"]) > 0.5]
        assert f"{np.float32(row['probability']):.9g}" == row["probability"]
    n_correct = sum(row["label"] == row["prediction"] for row in rows)
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(n_correct / 24)


def check_same_report(again, results):
    """Checks that --from gave the same report, except that it lists one more command line."""
    report, expected = read_report(again), read_report(results)
    first, second = report.pop("commands")
    assert [first] == expected.pop("commands") and second.startswith("evaluate.py --from ")
    assert report == expected


def test_from_needs_neither_images_nor_network(
    scored, pictures, tmp_path, monkeypatch, rescore, capsys
):
    results = Path(shutil.copytree(scored[0], tmp_path / "results"))
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)  # where neither data/ nor model.pth is
    assert evaluate.main(["--from", str(results / "predictions.csv")]) == 0
    assert snapshot(tmp_path) == before  # without --results-dir it only prints
    other = "Device: ", "Features", "Wrote ", "The report to read"
    expected = [line for line in scored[1].splitlines() if not line.startswith(other)]
    assert capsys.readouterr().out.splitlines() == expected
    status, again = rescore(results / "predictions.csv")
    assert status == 0
    check_same_report(again, results)
    assert {path.name for path in again.iterdir()} == TABLES | PICTURES - {"worst.png"}
    for name in {"predictions.csv"} | PICTURES - {"worst.png"}:
        assert (again / name).read_bytes() == (results / name).read_bytes(), name


def test_results_is_the_folder_if_none_is_named_and_with_from_only_if_it_is_named(
    quick, scored, trained, split_phantoms, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    image, _ = list_split(split_phantoms, "test", CLASSES)[0]
    flags = ["--checkpoint", trained / "model.pth", "--cache-dir", trained / "cache"]
    assert evaluate.main([str(flag) for flag in (image, *flags, "--device", "cpu")]) == 0
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {"new_predictions.csv", "new_predictions.html"}
    assert evaluate.main(["--from", str(scored[0]), "--results-dir", "results"]) == 0
    assert (tmp_path / "results" / "metrics.json").exists()


@pytest.mark.parametrize(("stored", "flags"), [(None, ()), (0.7, ()), (0.25, ("--threshold", 0.7))])
def test_from_takes_the_threshold_of_the_flag_or_of_metrics_json(stored, flags, tmp_path, rescore):
    labels, probs = np.array([0, 1, 1, 0, 1]), np.array([0.1, 0.7, 0.8, 0.75, 0.2], np.float32)
    source = write_rows(tmp_path / "predictions.csv", labels, [0.1, 0.7, 0.8, 0.75, 0.2])
    threshold, origin = 0.5, "the default"
    if stored:
        threshold, origin = 0.7, f"{tmp_path / 'metrics.json'}, fixed in advance"
        write_json(tmp_path / "metrics.json", {"threshold": stored})
    if flags:
        origin = "--threshold"
    status, folder = rescore(source, *flags)
    report = read_report(folder)
    assert status == 0
    assert report["threshold"] == threshold and report["threshold_from"] == origin
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert values == pytest.approx(by_scikit_learn(labels, probs, threshold), abs=1e-6)
    counts = {"tp": 1 + (threshold == 0.5), "fp": 1, "tn": 1, "fn": 2 - (threshold == 0.5)}
    assert report["counts"] == counts
    positive = [row["prediction"] == "PNEUMONIA" for row in read_rows(folder / "predictions.csv")]
    assert positive == [*(probs > np.float32(threshold))]  # at the threshold: normal


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1, column file"),
        ("file|label|probability\na|NORMAL|0.5\n", "commas, semicolons or tabs between"),
        ("file,label,probability\na,NORMAL,123456789\n", "as CSV UTF-8"),  # Excel lost the point
        ("file,label\na,NORMAL\n", "row 1, column probability"),
        ("file,label,probability\n", "row 2, column file"),
        ("file,label,probability\na,NORMAL,0.1\nb,pneumonia,0.9\n", "row 3, column label"),
        ("file,label,probability\na,,0.1\n", "row 2, column label"),  # of a new image
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
def test_an_error_in_a_table_names_row_and_column(text, words, compared, tmp_path, capsys, rescore):
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


def test_a_table_with_the_semicolons_and_decimal_commas_of_excel_gives_the_same_scores(
    scored, tmp_path, rescore
):
    results = Path(shutil.copytree(scored[0], tmp_path / "results"))
    table = results / "predictions.csv"
    text = table.read_text()
    assert ";" not in text and '"' not in text
    table.write_bytes(text.replace(",", ";").replace("0.", "0,").encode("utf-8-sig"))
    assert "NORMAL;0," in table.read_text()
    status, again = rescore(table)
    assert status == 0
    check_same_report(again, results)


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        (None, [1, 2, 3]),  # a table of an earlier version
        (["7", "2", "30"], [7, 2, 30]),
        (["7", "2", "7"], [1, 2, 3]),  # two tables in one
        (["A7", "", "2"], [1, 2, 3]),  # a column of metadata.csv, in an earlier version
    ],
)
def test_a_table_keeps_its_numbers_if_each_belongs_to_one_image(column, numbers, tmp_path, rescore):
    source = write_rows(tmp_path / "predictions.csv", [0, 1, 1], [0.1, 0.7, 0.8])
    if column:
        lines = source.read_text().splitlines()
        cells = zip(["number", *column], lines, strict=True)
        source.write_text("".join(f"{number},{line}\n" for number, line in cells))
    status, folder = rescore(source)
    assert status == 0
    assert [int(row["number"]) for row in read_rows(folder / "predictions.csv")] == numbers


@pytest.mark.parametrize("label", [0, 1])
def test_a_table_of_one_class_is_refused(label, tmp_path, capsys, rescore):
    status, folder = rescore(write_rows(tmp_path / "p.csv", [label] * 3, [0.1, 0.5, 0.9]))
    err = capsys.readouterr().err
    assert status == 2 and CLASSES[1 - label] in err and err.count("\n") == 1
    assert not [*folder.glob("*")]
