"""cxr/also.py, cxr/source_sentences.py: evaluate.py --also compares sources with the first one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import path_flags, read_report, read_rows, write_rows
from markupsafe import escape
from PIL import Image
from simulated import simulate

import cxr.bootstrap
import evaluate
from common import one_thread
from cxr.also import SCORES, score_source
from cxr.doubts import next_step
from cxr.files import write_json
from cxr.predictions import as_arrays
from cxr.proportions import difference_interval, format_interval, wilson_interval
from cxr.scores import measure_calibration, score
from cxr.source_sentences import (
    change_text,
    difference_texts,
    headline,
    local_notes,
    local_rows,
    source_texts,
)


@pytest.fixture
def hospital(second_hospital, tmp_path):
    """A copy of second_hospital that the test may change."""
    return Path(shutil.copytree(second_hospital, tmp_path / "nih"))


@pytest.fixture
def scored_alone(second_hospital, trained, tmp_path):
    """The folder of the results of second_hospital as the only source."""
    more = ("--results-dir", tmp_path / "alone")
    assert evaluate.main(path_flags(second_hospital, trained, trained / "cache", *more)) == 0
    return tmp_path / "alone"


def test_a_source_has_the_scores_that_it_has_alone(
    run_evaluate, second_hospital, scored_alone, tmp_path, capsys
):
    assert run_evaluate("--also", second_hospital) == 0
    screen, report = capsys.readouterr().out, read_report(tmp_path / "results")
    first, second = report["also"]
    for source, alone in ((first, report), (second, read_report(scored_alone))):
        assert (source["n"], source["patients"]) == (alone["n"], alone["patients"])
        expected = alone["metrics"] | alone["calibration"]
        for name, value in source["scores"].items():
            assert value == pytest.approx(expected[name], abs=1e-6), name
            assert format_interval(value) in screen
        assert source["unlike"]["over"] == alone["unlike"]["over"]
        assert source["unlike"]["shift"] == alone["unlike"]["shift"]
    assert set(second["difference"]) == set(first["scores"]) == set(SCORES)
    for name, difference in second["difference"].items():
        expected = difference_interval(second["scores"][name], first["scores"][name])
        assert difference == expected and format_interval(difference) in screen
    _, labels, patients = np.repeat([0, 1], 15), np.repeat([0, 1], 15), np.arange(30)
    assert second["positive_share"] == wilson_interval(labels == 1, patients)
    tables = [tmp_path / "results/predictions_nih.csv", scored_alone / "predictions.csv"]
    assert read_rows(tables[0]) == read_rows(tables[1])
    assert headline(second, first) in screen
    assert "nih: not measured with 20, 50 or 100 local images, because less than half" in screen


def test_without_the_flag_there_is_no_entry(scored):
    folder, screen = scored
    assert read_report(folder)["also"] is None and "Sources" not in screen


@pytest.mark.usefixtures("pictures")
def test_one_picture_has_the_roc_curves_of_all_sources(run_evaluate, second_hospital, tmp_path):
    assert run_evaluate("--also", second_hospital) == 0
    with Image.open(tmp_path / "results" / "roc_sources.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 10  # not empty
    assert "nih" in (tmp_path / "results" / "report.html").read_text()


def test_from_shows_the_sources_again_from_their_tables(
    run_evaluate, rescore, second_hospital, tmp_path, capsys
):
    assert run_evaluate("--also", second_hospital) == 0
    results = tmp_path / "results"
    before, screen = read_report(results)["also"], capsys.readouterr().out
    status, again = rescore(results / "predictions.csv")
    assert status == 0 and read_report(again)["also"] == before
    table = screen[screen.index("Sources, with") : screen.index("Wrote")]
    assert table in capsys.readouterr().out
    assert "nih" in (again / "report.html").read_text()
    names = (results / "predictions_nih.csv").read_text()
    assert (again / "predictions_nih.csv").read_text() == names
    status, again = rescore(results / "predictions.csv", "--threshold", 0.9)
    after = read_report(again)["also"][1]
    assert after["scores"]["auroc"] == before[1]["scores"]["auroc"]
    assert after["scores"]["sensitivity"]["value"] < before[1]["scores"]["sensitivity"]["value"]


def test_from_scores_the_table_of_a_source_like_any_table(
    run_evaluate, rescore, second_hospital, remake, tmp_path, capsys
):
    path = remake(threshold=0.3, threshold_rule="youden")
    assert run_evaluate("--checkpoint", path, "--also", second_hospital) == 0
    source = read_report(tmp_path / "results")["also"][1]
    capsys.readouterr()
    status, again = rescore(tmp_path / "results" / "predictions_nih.csv")
    report = read_report(again)
    assert status == 0 and capsys.readouterr().err == ""
    assert report["threshold"] == 0.3 and "youden on val" in report["threshold_from"]
    assert report["data"] == str(second_hospital) and report["also"] is None
    for name in ("accuracy", "sensitivity", "specificity"):
        assert report["metrics"][name] == source["scores"][name]


def test_from_refuses_to_lose_a_source(run_evaluate, rescore, second_hospital, tmp_path, capsys):
    assert run_evaluate("--also", second_hospital) == 0
    (tmp_path / "results" / "predictions_nih.csv").unlink()
    capsys.readouterr()
    status, again = rescore(tmp_path / "results" / "predictions.csv")
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1 and not again.exists()
    assert "predictions_nih.csv: no such file, expected the predictions of nih" in line


@pytest.mark.parametrize("absent", ["NORMAL", "PNEUMONIA"])
def test_a_source_of_one_class_has_the_scores_that_can_be_computed(
    absent, run_evaluate, rescore, hospital, tmp_path, capsys
):
    shutil.rmtree(hospital / "test" / absent)
    assert run_evaluate("--also", hospital) == 0
    screen, source = capsys.readouterr().out, read_report(tmp_path / "results")["also"][1]
    present = {"NORMAL": "sensitivity", "PNEUMONIA": "specificity"}[absent]
    known = {name for name, value in source["scores"].items() if value["value"] is not None}
    assert known == {"accuracy", present} and source["local_data"] is None
    values = {name: difference["value"] for name, difference in source["difference"].items()}
    assert [name for name, value in values.items() if value is not None] == [present]
    assert source["reasons"] == dict.fromkeys(
        set(SCORES) - known, f"there is no readable {absent} image"
    )
    assert f"no AUROC, {'Specificity' if absent == 'NORMAL' else 'Sensitivity'}" in screen
    why = "nih: no difference of the accuracy, because that of one class cannot be compared"
    assert why in screen and why in (tmp_path / "results" / "report.html").read_text()
    assert f"At nih the AUROC is unknown: there is no readable {absent} image" in screen
    assert rescore(tmp_path / "results" / "predictions.csv")[0] == 0


def test_a_source_without_a_readable_image_is_one_line(run_evaluate, hospital, capsys):
    for number, path in enumerate(hospital.glob("test/*/*")):
        path.write_bytes(bytes(number))
    assert run_evaluate("--also", hospital, "--skip-bad") == 2
    assert f"{hospital}: no image can be read" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", [["scan.png"], ["--from", "results"]])
def test_new_images_and_old_tables_have_no_second_source(flags, run_evaluate, capsys):
    assert run_evaluate(*flags, "--also", "nih") == 2
    assert "--also: needs the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ((-0.12, -0.19, -0.05), "is 0.12 lower (0.05 to 0.19)"),
        ((0.12, 0.05, 0.19), "is 0.12 higher (0.05 to 0.19)"),
        ((-0.02, -0.1, 0.06), "is not clearly higher or lower (-0.10 to +0.06)"),
        ((-0.02, None, None), "is 0.02 lower (no interval)"),
    ],
)
def test_the_headline_states_the_difference(difference, text):
    interval = dict(zip(("value", "low", "high"), difference, strict=True))
    assert change_text(interval) == text
    first = {"name": "home", "scores": {"auroc": {"value": 0.9}}}
    source = {"name": "nih", "reasons": {}, "scores": {"auroc": {"value": 0.78}}}
    source |= {"difference": {"auroc": interval, "accuracy": interval}}
    source["patients_by_class"] = {"NORMAL": 30, "PNEUMONIA": 10}
    sentence = f"At nih the AUROC {text} and the accuracy {text}, compared with home"
    assert headline(source, first) == sentence
    source["patients_by_class"] = {"NORMAL": 30, "PNEUMONIA": 9}
    assert "too few patients for a conclusion (9 PNEUMONIA; AUROC 0.78)" in headline(source, first)


def test_the_page_shows_all_sources_and_escapes_their_names(
    run_evaluate, second_hospital, tmp_path
):
    tagged = Path(shutil.copytree(second_hospital, tmp_path / "<b>A&E"))
    assert run_evaluate("--also", second_hospital, "--also", tagged) == 0
    page = (tmp_path / "results" / "report.html").read_text()
    sources = read_report(tmp_path / "results")["also"]
    assert [source["name"] for source in sources] == ["chestxrays", "nih", "<b>A&E"]
    assert "<b>A" not in page and page.count("&lt;b&gt;A&amp;E") > 10
    for source in sources:
        texts = [*source_texts(source, "PNEUMONIA").values(), *difference_texts(source).values()]
        assert len(texts) >= 11 and all(text in page for text in texts)
    for source in sources[1:]:
        for line in [headline(source, sources[0]), *local_notes(source)]:
            assert escape(line) in page
    assert "At none of 2 other sources the AUROC is clearly lower than at chestxrays" in page


def test_the_page_shows_how_much_local_images_would_help(rescore, tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_rows(tmp_path / "predictions.csv", np.arange(40) % 2, rng.random(40))
    (table,) = simulate(rng, 90, 30, odds=9)
    columns = table["label"], table["probability"], table["file"].tolist()
    write_rows(tmp_path / "predictions_nih.csv", *columns)
    source = {"name": "nih", "data": "nih", "table": "predictions_nih.csv", "unlike": None}
    first = {"name": "home", "data": "home", "unlike": None}
    before = {"threshold": 0.5, "model": {"sha256": ""}, "also": [first, source]}
    write_json(tmp_path / "metrics.json", before)
    status, folder = rescore(tmp_path / "predictions.csv")
    local = read_report(folder)["also"][1]["local_data"]
    assert status == 0 and [row["k"] for row in local["with_local"]] == [20, 50]
    screen, page = capsys.readouterr().out, (folder / "report.html").read_text()
    for row in local_rows(local):
        assert all(text in page and text in screen for text in row)
    # On a phone, page.css hides the head of each table.
    assert "<h4>nih</h4>" in page[: page.index('<td data-label="Brier score">')]
    note = "nih: not measured with 100 local images, because less than half of the 120 images"
    before, after = local["unchanged"]["accuracy"], local["with_local"][1]["accuracy"]["mean"]
    assert note in page and note in screen
    assert f"nih has accuracy {before:.2f}, and {after:.2f} with 50 local images" in page
    methods = (folder / "methods.md").read_text()
    assert "to 1 more source of images (nih: 120 images of 90 NORMAL and 30 PNEUMONIA" in " ".join(
        methods.split()
    )
    assert "fitted again on 20 or 50 images of a source" in " ".join(methods.split())


def test_a_source_unlike_the_training_images_causes_a_warning(
    run_evaluate, hospital, tmp_path, capsys
):
    rng = np.random.default_rng(0)
    for path in hospital.glob("test/*/*"):
        Image.fromarray(rng.integers(0, 256, (300, 300), np.uint8)).save(path)
    assert run_evaluate("--also", hospital) == 0
    (warning,) = read_report(tmp_path / "results")["warnings"]
    assert warning.startswith(
        "source nih: 30 of 30 images differ strongly from the training images"
    )
    assert warning in capsys.readouterr().err
    assert escape(warning) in (tmp_path / "results" / "report.html").read_text()


def test_a_source_where_the_model_fails_is_in_the_first_lines_of_the_page(rescore, tmp_path):
    labels, rng = np.arange(80) % 2, np.random.default_rng(0)
    write_rows(tmp_path / "predictions.csv", labels, 0.3 * labels + 0.7 * rng.random(80))
    write_rows(tmp_path / "predictions_nih.csv", labels, rng.random(80))
    source = {"name": "nih", "data": "nih", "table": "predictions_nih.csv", "unlike": None}
    before = {"threshold": 0.5, "model": {"sha256": ""}}
    before["also"] = [{"name": "home", "data": "home", "unlike": None}, source]
    write_json(tmp_path / "metrics.json", before)
    _, folder = rescore(tmp_path / "predictions.csv")
    report, page = read_report(folder), (folder / "report.html").read_text()
    first, source = report["also"]
    accuracy = format_interval(source["scores"]["accuracy"])
    lead, banner = page[: page.index('class="banner"')], page[: page.index("Next step:")]
    assert f"also scored on 80 images of nih (accuracy {accuracy})" in lead
    assert headline(source, first) in banner and "is 0." in headline(source, first)
    assert next_step(report).startswith("Check the calibration and the threshold at nih")


# ---------------------------------------------------------------- simulations

# (normal, pneumonia: expected patients of each class; apart; odds: see simulate) of two sources
HOSPITALS = (50, 50, 2.09, 1), (60, 30, 1.2, 1)


def draw_source(rng, hospital, each, seed):
    """Returns the scores of a source. The class of each patient is drawn."""
    normal, pneumonia, apart, odds = hospital
    n_positive = rng.binomial(normal + pneumonia, pneumonia / (normal + pneumonia))
    n_negative = normal + pneumonia - n_positive
    (table,) = simulate(rng, n_negative, n_positive, each, apart, odds=odds)
    return score_source(table, 0.5, seed)


def true_scores(rng, hospital):
    """Returns {score: its value in a large population}."""
    normal, pneumonia, apart, odds = hospital
    (table,) = simulate(rng, 500 * normal, 500 * pneumonia, apart=apart, odds=odds)
    probs, labels, _ = as_arrays(table)
    values = score(torch.from_numpy(probs), torch.from_numpy(labels), 0.5)
    calibration = measure_calibration(table, {})
    values |= {name: calibration[name]["value"] for name in ("intercept", "slope")}
    return {name: values[name] for name in SCORES}


@pytest.mark.parametrize("each", [1, 3])
def test_the_intervals_of_unpaired_differences_contain_the_true_difference(
    each, fuzz, say, monkeypatch
):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 200)
    rng, runs = np.random.default_rng(each), fuzz.count(100, 1000)
    first, second = (true_scores(rng, hospital) for hospital in HOSPITALS)
    hits = dict.fromkeys(SCORES, 0)
    with one_thread():  # fast for small tensors
        for seed in range(runs):
            of_first, of_second = (draw_source(rng, hospital, each, seed) for hospital in HOSPITALS)
            for name in SCORES:
                interval = difference_interval(of_second[name], of_first[name])
                hits[name] += interval["low"] <= second[name] - first[name] <= interval["high"]
    shares = {name: n / runs for name, n in hits.items()}
    say(f"Differences of sources, {each} images per patient, {runs} sets: {shares}")
    low, high = (0.92, 0.98) if runs == 1000 else (0.87, 1)
    assert min(shares.values()) >= low and max(shares.values()) <= high, shares
    assert 0.92 <= np.mean([*shares.values()]) <= 0.98, shares
