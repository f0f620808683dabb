"""cxr/confounders.py: how well a column of metadata.csv or a DICOM value predicts the class."""

import re
import shutil

import numpy as np
import pytest
from helpers import read_report, read_rows, run_split, write_dicom
from phantoms import draw_phantom
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score

from cxr.confounders import score_columns, to_number
from cxr.files import read_json
from cxr.folders import CLASSES
from cxr.weighted import weighted_auroc


def write_columns(data, columns):
    """Writes metadata.csv. columns: {name: function of (i, label), i counts the images}."""
    lines = [",".join(["file_name", *columns])]
    for i, path in enumerate(sorted(data.glob("*/*/*.*"))):
        label = CLASSES.index(path.parent.name)
        cells = [str(function(i, label)) for function in columns.values()]
        lines.append(",".join([path.relative_to(data).as_posix(), *cells]))
    (data / "metadata.csv").write_text("\n".join(lines))


def run_check(data, capsys):
    """Returns (report, screen) of split_val.py --check."""
    capsys.readouterr()
    path = data.parent / "check.json"
    assert run_split(data, "--check", "--json", path) == 0
    return read_json(path), capsys.readouterr().out


def by_name(found):
    return {row["column"]: row for row in found["columns"]}


# ---------------------------------------------------------------- the check


def test_the_check_raises_an_alarm_for_columns_that_predict_the_class(data, capsys):
    rng = np.random.default_rng(0)
    columns = {
        "site": lambda i, label: "AB"[label],
        "age": lambda i, label: (60, 5)[label] + i % 4,
        "sex": lambda i, label: "FM"[rng.integers(2)],
        "filled": lambda i, label: ("", "yes")[label],  # an empty cell is a category
        "ward": lambda i, label: 2 if label else rng.choice([1, 3]),  # no trend
        "scan": lambda i, label: f"scan_{i}",
        "case": lambda i, label: rng.permutation(10**6)[0],  # numbers are never left out as ids
        "country": lambda i, label: "CH",
        "class": lambda i, label: CLASSES[label],
    }
    write_columns(data, columns)
    report, screen = run_check(data, capsys)
    found = report["confounders"]
    rows = by_name(found)
    predictive = {"site", "age", "filled", "ward"}
    assert {name for name, row in rows.items() if row["alarm"]} == predictive
    assert all(rows[name]["auroc"]["value"] == 1 for name in predictive)
    assert set(rows) == predictive | {"sex", "case"} and rows["sex"]["n"] == 24
    low, high = (rows["sex"]["auroc"][key] for key in ("low", "high"))
    assert low < rows["sex"]["auroc"]["value"] < high
    assert list(found["left_out"]) == ["scan", "country", "class"]
    (text,) = [text for text in report["warnings"] if text.startswith("confounder: ")]
    assert all(name in text for name in predictive) and "sex" not in text
    assert "classes of test/" in text and text in screen
    for name in ("scan", "country"):
        assert re.search(rf"{name} +left out: .*(id|one value)", screen)
    assert re.search(r"age +1.000 \(n 24\) !\n", screen)


def test_without_test_images_the_columns_are_scored_on_other_patients(data, capsys):
    shutil.rmtree(data / "test")
    shutil.rmtree(data / "val")
    columns = {
        "patient_id": lambda i, label: i // 2,
        "site": lambda i, label: "AB"[label if i % 20 else 1 - label],
        "record": lambda i, label: f"r{i // 2}",  # names the patient, so it predicts nothing
    }
    write_columns(data, columns)
    report, _ = run_check(data, capsys)
    rows = by_name(report["confounders"])
    assert rows["site"]["auroc"]["value"] == pytest.approx(0.95, abs=0.01)
    assert rows["record"]["auroc"]["value"] == 0.5 and not rows["record"]["alarm"]
    assert rows["site"]["n"] == 40 and rows["site"]["alarm"]


def test_images_without_columns_have_no_table(data, capsys):
    report, screen = run_check(data, capsys)
    assert report["confounders"] == {"columns": [], "left_out": {}}
    assert "Confounders" not in screen


# ---------------------------------------------------------------- DICOM

SECRETS = {
    "PatientName": "Meier^Hans",
    "PatientID": "PACS-4711",
    "PatientBirthDate": "19340117",
    "StudyDate": "20190823",
    "AccessionNumber": "ACC-998877",
    "DetectorID": "SERIAL-31337",
    "InstitutionName": "Hospital of Springfield",
}


@pytest.fixture
def dicoms(tmp_path):
    """A data folder of 20 train and 12 test DICOM files of each class, from two manufacturers."""
    root, rng = tmp_path / "dicoms", np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.asarray(draw_phantom(rng, bool(label), 100)).astype(np.uint16) * 16
                tags = {"Manufacturer": ("Xenon", "Argon")[label], "KVP": 120 + i % 3}
                tags |= {"PatientAge": f"{i % 12 + 1:03d}{'MY'[label]}", "PatientSex": "FM"[i % 2]}
                number = f"{split}{label}{i:02d}"
                tags |= SECRETS | {"PatientID": f"PACS-4711-{number}"}
                write_dicom(root / split / name / f"{number}.dcm", pixels, **tags)
    return root


def test_dicom_values_are_measured_and_never_written(dicoms, run_evaluate, tmp_path, capsys):
    report, screen = run_check(dicoms, capsys)
    rows, left_out = by_name(report["confounders"]), report["confounders"]["left_out"]
    alarms = {name for name, row in rows.items() if row["alarm"]}
    assert alarms == {"manufacturer (DICOM)", "age (DICOM)"}
    assert set(rows) - alarms == {"kVp (DICOM)", "sex (DICOM)"}
    assert left_out == {"detector (DICOM)": "one value"}

    assert run_evaluate("--data-dir", dicoms) == 0
    captured = capsys.readouterr()
    text = screen + captured.out + captured.err + (tmp_path / "check.json").read_text()
    for name in ("metrics.json", "predictions.csv"):
        text += (tmp_path / "results" / name).read_text()
    assert "manufacturer (DICOM) alone" in text
    for secret in (*SECRETS.values(), "Xenon", "Argon", "005Y"):
        assert secret not in text
    assert "manufacturer" not in read_rows(tmp_path / "results" / "predictions.csv")[0]
    assert "Manufacturer" not in str(read_report(tmp_path / "results")["subgroups"])


def test_a_column_of_metadata_csv_replaces_the_dicom_value_of_the_same_name(dicoms, capsys):
    write_columns(dicoms, {"Manufacturer": lambda i, _: "XY"[i % 2], "k_vp": lambda i, _: i % 3})
    report, _ = run_check(dicoms, capsys)
    rows = by_name(report["confounders"])
    assert set(rows) == {"Manufacturer", "k_vp", "age (DICOM)", "sex (DICOM)"}
    assert not rows["Manufacturer"]["alarm"]


# ---------------------------------------------------------------- the report


def test_the_report_compares_the_network_with_the_strongest_column(
    data, run_evaluate, tmp_path, capsys
):
    rng = np.random.default_rng(1)
    write_columns(
        data,
        {
            "age": lambda i, label: 30 * (1 - label) + rng.integers(40),
            "sex": lambda i, label: "FM"[rng.integers(2)],
        },
    )
    assert run_evaluate("--data-dir", data) == 0
    report, screen = read_report(tmp_path / "results"), capsys.readouterr().out
    rows, auroc = report["confounders"]["columns"], report["metrics"]["auroc"]["value"]
    assert [row["column"] for row in rows] == ["age", "sex"] and "difference" not in rows[1]
    assert rows[0]["difference"]["value"] == pytest.approx(auroc - rows[0]["auroc"]["value"])
    assert rows[0]["difference"]["low"] < rows[0]["difference"]["high"]
    text, page = f"AUROC {rows[0]['auroc']['value']:.3f} (", tmp_path / "results" / "report.html"
    for content, name in ((screen, "age alone: "), (page.read_text(), "Column age alone<")):
        assert name in content and text in content
        assert f"the network {auroc:.3f}, difference " in content
        assert "within strata of age (" in content

    # The same from predictions.csv, pair by pair.
    table = read_rows(tmp_path / "results" / "predictions.csv")
    ages = np.array([float(row["age"]) for row in table])
    thirds = np.searchsorted(np.quantile(ages, [1 / 3, 2 / 3]), ages)
    probs = np.array([row["probability"] for row in table], np.float32)
    labels = np.array([row["label"] == CLASSES[1] for row in table])
    within = [
        (probs[p] > probs[n]) + (probs[p] == probs[n]) / 2
        for p in np.flatnonzero(labels)
        for n in np.flatnonzero(~labels)
        if thirds[p] == thirds[n]
    ]
    assert rows[0]["within"]["value"] == pytest.approx(np.mean(within))
    assert rows[0]["within"]["n_pairs"] == len(within) and rows[0]["within"]["n_strata"] == 3
    assert rows[0]["within"]["low"] <= np.mean(within) <= rows[0]["within"]["high"]


def test_a_site_for_each_class_leaves_no_stratum(data, run_evaluate, rescore, tmp_path, capsys):
    write_columns(data, {"site": lambda i, label: "AB"[label], "age": lambda i, _: i % 7})
    assert run_evaluate("--data-dir", data) == 0
    captured, before = capsys.readouterr(), read_report(tmp_path / "results")
    row = by_name(before["confounders"])["site"]
    assert row["alarm"] and row["auroc"]["value"] == 1
    assert row["within"]["value"] is None and row["within"]["n_used"] == 0
    assert "no stratum of site has both classes" in captured.out
    assert "warning: confounder: site alone predicts the class" in captured.err
    status, folder = rescore(tmp_path / "results" / "predictions.csv")
    assert status == 0 and read_report(folder)["confounders"] == before["confounders"]


def test_the_etiology_is_never_a_confounder(data, run_evaluate, tmp_path, capsys):
    for path in sorted(data.glob("*/PNEUMONIA/*")):
        number = len(path.name) + int(re.search(r"\d+", path.stem)[0])
        path.rename(path.with_name(f"person{number}_{('virus', 'bacteria')[number % 2]}_1.png"))
    write_columns(data, {"etiology": lambda i, label: ("", "virus")[label]})
    report, _ = run_check(data, capsys)
    assert report["confounders"]["columns"] == []
    assert report["confounders"]["left_out"] == {"etiology": "it describes the disease"}
    (data / "metadata.csv").unlink()
    assert run_evaluate("--data-dir", data) == 0
    assert read_report(tmp_path / "results")["confounders"] == {"columns": [], "left_out": {}}


# ---------------------------------------------------------------- statistics


def test_the_auroc_in_strata_is_that_of_scikit_learn_in_each_stratum():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(9, size=60) / 8, rng.integers(2, size=60)
    strata, weights = rng.integers(3, size=60), rng.integers(4, size=(5, 60))
    found = weighted_auroc(scores, labels, weights, strata)
    for sample, auroc in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(60), sample)
        wins = n_pairs = 0
        for stratum in range(3):
            inside = rows[strata[rows] == stratum]
            n = labels[inside].sum() * (1 - labels[inside]).sum()
            wins += n * roc_auc_score(labels[inside], scores[inside])
            n_pairs += n
        assert auroc == pytest.approx(wins / n_pairs)
    assert np.isnan(weighted_auroc(scores, labels, weights, labels)).all()


def test_numbers_count_with_their_rank_and_dicom_ages_in_years():
    numbers = np.random.default_rng(0).permutation(60)
    labels, patients = (numbers >= 30).astype(int), np.arange(60).astype(str)
    columns = {"number": [str(x) for x in numbers], "age": [f"{x:03d}M" for x in numbers]}
    found, _ = score_columns(columns, labels, patients, labels >= 0, CLASSES)
    assert all(row["auroc"]["value"] > 0.99 for row in found["columns"])  # thirds: 0.9
    assert [to_number(text) for text in ("018M", "072Y", "-1.5")] == [1.5, 72, -1.5]
    assert all(np.isnan(to_number(text)) for text in ("", "3M", "nan", "inf", "AP"))


def test_with_too_few_patients_no_column_is_scored():
    columns = {"age": ["1", "2", "3"]}
    labels, patients = np.array([0, 1, 1]), np.array(["a", "b", "c"])
    found, _ = score_columns(columns, labels, patients, labels >= 0, CLASSES)
    assert found == {"columns": [], "left_out": {"age": "a class has too few patients"}}


def share_of_alarms(n_sets, draw, n_patients, each):
    """Returns in which share of simulated sets a column raises an alarm.

    draw: function of the labels of the patients that returns one cell for each.
    """
    n_alarms = 0
    for _ in range(n_sets):
        label_of = np.repeat([0, 1], n_patients)
        labels, patients = np.repeat(label_of, each), np.repeat(np.arange(2 * n_patients), each)
        patients, everything = patients.astype(str), np.full(len(labels), True)
        cells = np.repeat([str(cell) for cell in draw(label_of)], each)
        found, _ = score_columns({"column": cells}, labels, patients, everything, CLASSES)
        n_alarms += found["columns"][0]["alarm"]
    return n_alarms / n_sets


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("each", [1, 3])
def test_a_column_that_is_independent_of_the_class_rarely_raises_an_alarm(each, fuzz, say):
    rng = np.random.default_rng(fuzz.rng.randrange(2**32))
    kinds = {
        "numbers": lambda labels: rng.normal(50, 20, len(labels)).round(1),
        "two words": lambda labels: rng.choice(["A", "B"], len(labels)),
        "ten words, or empty": lambda labels: rng.choice(["", *"ABCDEFGHIJ"], len(labels)),
    }
    for kind, draw in kinds.items():
        n_sets = fuzz.count(6, 200)
        share = share_of_alarms(n_sets, draw, 30, each)
        say(f"{kind}, independent, {each} each: alarms in {share:.1%} of {n_sets} sets")
        assert share <= (0.05 if n_sets == 200 else 0.17), kind


@pytest.mark.usefixtures("quick")
def test_a_column_with_an_auroc_of_0_8_raises_an_alarm(fuzz, say):
    rng = np.random.default_rng(fuzz.rng.randrange(2**32))
    apart = 2**0.5 * ndtri(0.8)  # standard deviations between two classes with AUROC 0.8
    kinds = {
        "numbers": lambda labels: rng.normal(apart * labels),
        "two words": lambda labels: np.where(rng.random(len(labels)) < 0.8, labels, 1 - labels),
    }
    kinds["two words"] = lambda labels, draw=kinds["two words"]: np.array(["A", "B"])[draw(labels)]
    for kind, draw in kinds.items():
        n_sets = fuzz.count(6, 200)
        share = share_of_alarms(n_sets, draw, 50, 1)
        say(f"{kind}, AUROC 0.8: alarms in {share:.1%} of {n_sets} sets")
        assert share >= (0.9 if n_sets == 200 else 0.75), kind
