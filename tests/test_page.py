"""cxr/page.py: report.html shows the content of metrics.json."""

import html.parser
import itertools
import shutil

import numpy as np
import pytest
from helpers import TINY_FAST, keep, read_about, read_report, read_rows, write_rows
from PIL import Image

import evaluate
import train
from cxr.doubts import reasons_to_doubt, shortcut_rows
from cxr.files import write_json
from cxr.folders import list_images
from cxr.headings import is_small, subgroup_rows
from cxr.page import MOST_DOTS, encode_worst, write_page
from cxr.predictions import drop_unreadable, read_predictions
from cxr.proportions import format_interval
from cxr.screen import print_scores
from cxr.sentences import calibration_lines, display_name


class Page(html.parser.HTMLParser):
    """The table rows, the headings, the text, the pictures and the tags of report.html."""

    def __init__(self, folder):
        super().__init__()
        self.rows, self.headings, self.texts, self.tags = [], [], [], []
        self.sources, self.dots, self.widths, self.open = [], [], [], []
        self.feed((folder / "report.html").read_text(encoding="utf-8"))
        assert not self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))
        if tag == "i":
            self.dots.append(attributes.get("class", "wrong"))
            self.widths.append(attributes.get("style"))
        if tag == "img":
            self.sources.append(attributes["src"])
            assert attributes["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = (self.open[-1], data)
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)


def read_table(folder, classes):
    """Returns the readable rows of predictions.csv, as write_page expects them."""
    return drop_unreadable(read_predictions(folder / "predictions.csv", classes))


def test_the_page_is_one_file_with_all_of_metrics_json(data, run_evaluate, pictures, tmp_path):
    images = sorted(path.name for path in data.glob("test/*/*"))
    wards = ["<b>F&M</b>" if i < 18 else "<script>" for i in range(24)]
    rows = [f"{name},{i},{wards[i]}" for i, name in enumerate(images)]
    (data / "metadata.csv").write_text("\n".join(["file_name,patient_id,<b>ward</b>", *rows]))
    list_images(data / "train/NORMAL")[0].unlink()  # this gives a warning
    assert run_evaluate("--data-dir", data) == 0
    page, report = Page(tmp_path / "results"), read_report(tmp_path / "results")
    forest = {row[0]: row[2] for row in page.rows if len(row) == 3 and row[2] and not row[1]}
    for name, metric in report["metrics"].items():
        note = " lower is better" if name in ("brier", "ece") else ""
        assert forest[display_name(name) + note] == format_interval(metric)
    subgroups = report["subgroups"].values()
    assert len(subgroups) == 4 and sum(map(is_small, subgroups)) == 2
    for row in subgroups:
        name = f"{display_name(row['metric'])}, {row['group']} n = {row['n']}"
        assert forest[name] == ("too few to say" if is_small(row) else format_interval(row))
    assert len(subgroup_rows(report)) == 4
    counts = report["counts"]
    assert page.dots.count("positive") == counts["tp"]
    assert page.dots.count("negative") == counts["tn"]
    assert page.dots.count("wrong") == counts["fp"] + counts["fn"]
    for row in report["elsewhere"]:
        share = f"{100 * row['prevalence']:.3g} %"
        assert [share, format_interval(row["ppv"]), format_interval(row["npv"])] in page.rows
    for row in shortcut_rows(report):
        assert [" ".join(cell.split()) for cell in row] in page.rows
    assert all(line in page.text for line in calibration_lines(report["calibration"]))
    assert report["intervals"] in page.text and "50 % of these images are PNEUMONIA" in page.text
    assert report["warnings"] and all(warning in page.text for warning in report["warnings"])
    assert "fewer than 30 patients in a class" in page.text
    assert not {"link", "b", "iframe"} & set(page.tags) and page.tags.count("script") == 2
    assert all(source.startswith("data:image/jpeg") for source in page.sources)
    assert 1 <= len(page.sources) <= 8 and sum(map(len, page.sources)) < 200_000
    assert (tmp_path / "results" / "report.html").stat().st_size < 1_200_000


def test_the_headings_are_in_order_and_the_methods_section_is_also_a_file(scored):
    page, report = Page(scored[0]), read_report(scored[0])
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) >= 8
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    methods = (scored[0] / "methods.md").read_text(encoding="utf-8")
    sentence = f"the test set had {report['n']} images of 12 NORMAL and 12 PNEUMONIA patients"
    assert sentence in methods and sentence in page.text


def test_drawn_images_and_random_weights_are_the_first_reason_to_doubt(
    scored, data, run_evaluate, tmp_path
):
    words = "Drawn images and random weights: this page shows what a report looks like, not how"
    assert (
        reasons_to_doubt(read_report(scored[0]))[0].startswith(words)
        and words in Page(scored[0]).text
    )
    (data / "drawn_images.txt").unlink()  # then they may be real
    assert run_evaluate("--data-dir", data) == 0
    page = Page(tmp_path / "results")
    assert "Random weights: this page shows" in page.text and "Drawn" not in page.text


def test_names_and_warnings_that_contain_tags_are_shown_as_text(scored, tmp_path):
    report = read_report(scored[0])
    table = read_table(scored[0], report["classes"])
    report["warnings"] = ["a warning"]
    write_page(tmp_path, report, table)
    tags = Page(tmp_path).tags
    report["classes"] = ["<b>healthy</b>", "</script><script>ill</script>"]
    report["unlike"] |= {"files": ["test/<script>.png", "test/x.png"], "numbers": [4, 17]}
    report["warnings"] = ["<script>alert('leak')</script>"]
    write_page(tmp_path, report, table)
    page = Page(tmp_path)
    assert page.tags == tags
    for text in (*report["classes"], "no. 4, no. 17", *report["warnings"]):
        assert text in page.text
    assert f"{report['classes'][1]} found" in page.texts  # a whole element
    assert "</script><script>" not in (tmp_path / "report.html").read_text()


def test_the_page_shows_only_the_last_part_of_each_path(scored, tmp_path):
    report = read_report(scored[0])
    table = read_table(scored[0], report["classes"])
    home = "/home/dr smith/Mueller"
    report["model"] |= {"file": f"{home}/heart.pth", "weights": f"{home}/rad.pth"}
    report |= {"data": f"{home}/images/test", "threshold_from": f"{home}/heart.json, fixed"}
    report["warnings"] = [f"there is no {home}/heart.json beside heart.pth"]
    write_page(tmp_path, report, table)
    page = Page(tmp_path)
    assert "smith" not in (tmp_path / "report.html").read_text()
    assert "smith" not in (tmp_path / "methods.md").read_text()
    assert ["Data", "test"] in page.rows and "heart.pth, tinynet, weights rad.pth" in page.text
    assert "(heart.json, fixed)" in page.text and "there is no heart.json beside" in page.text


def test_many_images_are_shown_as_a_bar_in_place_of_dots(scored, tmp_path):
    report = read_report(scored[0])
    table = read_table(scored[0], report["classes"])
    report["counts"] = {"tp": MOST_DOTS - 1, "fn": 1, "tn": MOST_DOTS, "fp": MOST_DOTS}
    write_page(tmp_path, report, table)
    page = Page(tmp_path)
    assert page.dots == ["positive"] * (MOST_DOTS - 1) + ["wrong", "negative"]
    assert page.widths[-1] == "width: 50.0%" and f"{MOST_DOTS} of {2 * MOST_DOTS}" in page.text


def test_the_pictures_of_the_worst_images_are_small_even_if_they_are_noise():
    noise = np.random.default_rng(0).integers(0, 256, (8, 224, 448, 3), np.uint8)
    encoded = encode_worst([(i, "NORMAL", pixels) for i, pixels in enumerate(noise)])
    assert sum(len(text) for _, _, text in encoded) < 200_000
    assert encode_worst([]) == []


def test_the_confusion_matrix_on_the_screen_has_room_for_long_class_names(scored, capsys):
    names = ["no tuberculosis", "bacterial or viral tuberculosis"]
    print_scores(read_report(scored[0]) | {"classes": names})
    assert f" predicted {names[0]}   predicted {names[1]}\n" in capsys.readouterr().out


def test_few_patients_are_a_number_and_no_verdict_in_training_and_report(
    data, tmp_path, flags, quick, capsys
):
    keep(data, 11, "val")
    for path in list_images(data / "val/PNEUMONIA")[4:]:
        path.unlink()
    assert train.main(flags(data, *TINY_FAST)) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "patients" in line)
    val = warning.removeprefix("warning: ")
    assert val.startswith("few patients in val/ (11 NORMAL and 4 PNEUMONIA): with 4 patients, an")
    assert read_about(tmp_path)["val_patients"] == {"NORMAL": 11, "PNEUMONIA": 4}
    for n, has_verdict in ((12, True), (1, False)):
        keep(data, n)
        assert evaluate.main(flags(data)) == 0
        screen, report = capsys.readouterr(), read_report(tmp_path / "results")
        page = Page(tmp_path / "results").text
        few = [text for text in report["warnings"] if text.startswith("few patients")]
        assert few[0] == val and len(few) == 2 - has_verdict
        assert all(text in page and f"warning: {text}" in screen.err for text in few)
        assert "alone has AUROC" in screen.out and ("the network is " in screen.out) == has_verdict
        assert ("Too few patients to say which is better" in page) != has_verdict
        assert ("There are too few patients for the curves" in page) != has_verdict
        assert "below chance" not in screen.err
    assert "in test/ (1 NORMAL and 1 PNEUMONIA): with 1 patient, an accuracy of 1.00" in few[1]


@pytest.mark.parametrize(
    ("n_found", "rule", "flags", "expected"),
    [
        (20, "sensitivity=0.95", (), "1.000 (0.839 to 1.000); the interval includes 0.95"),
        (15, "sensitivity=0.95", (), "0.750 (0.531 to 0.888); the interval excludes 0.95. Train"),
        (20, "sensitivity=0.5", (), "1.000 (0.839 to 1.000); the interval excludes 0.5"),
        (15, "sensitivity=0.95", ("--threshold", 0.4), None),
        (15, "youden", (), None),
    ],
)
def test_the_report_says_which_sensitivity_was_reached(
    n_found, rule, flags, expected, tmp_path, rescore, capsys
):
    labels, probs = [0] * 20 + [1] * 20, [0.1] * 20 + [0.9] * n_found + [0.2] * (20 - n_found)
    source = write_rows(tmp_path / "predictions.csv", labels, probs)
    model = {"threshold_rule": rule}
    origin = {"threshold": 0.5, "threshold_from": f"model.json, {rule} on val", "model": model}
    write_json(tmp_path / "metrics.json", origin)
    status, folder = rescore(source, *flags)
    screen, page = capsys.readouterr().out, Page(folder).text
    assert status == 0
    for text in (screen, page):
        assert ("asked for with --threshold" in text) == bool(expected)
        if expected:
            wanted = rule.removeprefix("sensitivity=")
            assert f"Sensitivity of {wanted}, asked" in text and f"in test/: {expected}" in text


def test_a_name_in_a_file_name_is_in_the_tables_and_not_on_the_page(
    data, tmp_path, flags, quick, capsys
):
    for path in sorted(data.glob("*/*/*")):
        path.rename(path.with_name(f"Meier, {path.name}"))
    noise = np.random.default_rng(0).integers(0, 256, (224, 224), np.uint8)
    Image.fromarray(noise).save(data / "test/NORMAL/Meier, Hans.png")  # unlike the others
    known, damaged = list_images(data / "train/NORMAL")[:2]
    shutil.copy(known, data / "test/NORMAL/Meier, copy.jpeg")  # for a warning
    damaged.write_bytes(b"")
    list_images(data / "test/NORMAL")[3].write_bytes(b"")
    assert train.main(flags(data, *TINY_FAST, "--skip-bad")) == 0
    capsys.readouterr()
    assert evaluate.main(flags(data, "--skip-bad")) == 0
    screen, rows = capsys.readouterr(), read_rows(tmp_path / "results/predictions.csv")
    assert [row["number"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    (noise,) = [f"no. {row['number']}" for row in rows if row["file"].endswith("Hans.png")]
    assert f"{noise} (test/NORMAL/Meier, Hans.png)" in screen.out
    assert "(test/NORMAL/Meier, copy.jpeg)" in screen.err
    assert "Meier" not in (tmp_path / "results/report.html").read_text()
    assert noise in Page(tmp_path / "results").text
    assert evaluate.main(["--from", str(tmp_path / "results"), "--results-dir", str(tmp_path)]) == 0
    assert "Meier" not in (tmp_path / "report.html").read_text()
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    (data / "train" / "Meier").mkdir()
    assert evaluate.main(flags(data, "--skip-bad")) == 0
    assert "Meier" not in (tmp_path / "results/report.html").read_text()


@pytest.mark.usefixtures("quick")
def test_screen_and_page_show_what_is_missing_or_fitted(data, tmp_path, flags, capsys):
    for split, name in (("train", "NORMAL"), ("test", "PNEUMONIA")):
        list_images(data / split / name)[0].write_bytes(b"<html>")
    rule = "--threshold", "sensitivity=0.9", "--skip-bad"
    assert train.main(flags(data, *TINY_FAST, *rule)) == 0
    assert "At threshold" in capsys.readouterr().out
    on_val = read_about(tmp_path)["at_threshold"]
    assert on_val["sensitivity"]["value"] >= 0.9
    assert evaluate.main(flags(data, "--skip-bad")) == 0
    for text in (capsys.readouterr().out, Page(tmp_path / "results").text):
        assert "1 of train/NORMAL (left out), 1 of test/PNEUMONIA (left out)" in text
        sensitivity = format_interval(on_val["sensitivity"])
        specificity = format_interval(on_val["specificity"])
        assert f"sensitivity {sensitivity}, specificity {specificity}" in text
        assert "sensitivity=0.9 on val" in text
        assert "age, sex or device" in text and "metadata.csv has no column" in text
