"""What a reader gets: the page, results elsewhere, doubtful labels; what newcomers met."""

import csv
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import common
import cxr.files
import cxr.page
import cxr.predictions
import cxr.proportions
import evaluate
import split_val
import train
from cxr.folders import CLASSES

ROOT = Path(__file__).resolve().parent.parent
TINY = "--arch", "tinynet", "--weights", "random", "--views", "2", "--lr", "0.1"


class Page(html.parser.HTMLParser):
    """The texts of a page's table rows and paragraphs, and the sources of its pictures."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.texts, self.sources, self.tags = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
            assert dict(attributes)["alt"]

    def handle_data(self, data):
        if self.tags[-1:] == ["td"] and data.strip():
            self.rows[-1].append(data)
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


# ---------------------------------------------------------------- the page


@pytest.fixture
def odd_names(data):
    """Data whose table holds what HTML would take for its own."""
    images = sorted(path.name for path in data.glob("test/*/*"))
    rows = [f"{name},{i},{('<b>F&M</b>', '<script>')[i % 2]}" for i, name in enumerate(images)]
    (data / "metadata.csv").write_text("\n".join(["file_name,patient_id,ward", *rows]))
    return data


def test_every_number_on_the_page_is_that_of_metrics_json(odd_names, tmp_path, flags):
    assert train.main(flags(odd_names, *TINY)) == evaluate.main(flags(odd_names)) == 0
    path = tmp_path / "results" / "report.html"
    page, report = Page(path), cxr.files.read_json(path.with_name("metrics.json"))
    cells = {row[0].lower().replace(" ", "_"): row[1:] for row in page.rows if row}
    for name, each in report["metrics"].items():
        assert cells[name] == [cxr.proportions.format_interval(each)]
    groups = [row for row in page.rows if len(row) == 4]
    names = {name: name.capitalize() for name in ("sensitivity", "specificity")}
    assert groups == [
        [
            each["group"],
            names.get(each["metric"], "AUROC"),
            str(each["n"]),
            cxr.proportions.format_interval(each),
        ]
        for each in report["subgroups"].values()
    ]
    assert len(groups) == 2 + 6 and groups[2][0] == "ward <b>F&M</b>"
    counts = report["counts"]
    assert cells["normal"] == [str(counts["tn"]), str(counts["fp"])]
    assert cells["pneumonia"] == [str(counts["fn"]), str(counts["tp"])]
    for each in report["elsewhere"]:
        ppv, npv = (cxr.proportions.format_interval(each[name]) for name in ("ppv", "npv"))
        values = f"PPV {ppv}, NPV {npv}"
        assert f"{100 * each['prevalence']:.3g} %: {values}" in page.text
    for title, lines in cxr.page.sections(report):
        assert title in page.text and all(line in page.text for line in lines)
    assert report["intervals"] in page.text and "50 % of these images are PNEUMONIA" in page.text
    assert all(warning in page.text for warning in report["warnings"])
    assert "fewer than 30 patients in a class: intervals are rough" in page.text


def test_the_page_is_one_small_file_without_script_or_link(odd_names, tmp_path, flags):
    assert train.main(flags(odd_names, *TINY)) == evaluate.main(flags(odd_names)) == 0
    page = Page(tmp_path / "results" / "report.html")
    assert not {"script", "link", "b", "iframe"} & set(page.tags)
    assert len(page.sources) == 6 and all(s.startswith("data:image/png") for s in page.sources)
    assert (tmp_path / "results" / "report.html").stat().st_size < 2_000_000


def test_what_is_missing_or_given_afterwards_stands_beside_the_result(
    data, tmp_path, flags, capsys
):
    for split, name in (("train", "NORMAL"), ("test", "PNEUMONIA")):
        sorted((data / split / name).iterdir())[0].write_bytes(b"<html>")
    rule = "--threshold", "sensitivity=0.9", "--skip-bad"
    assert train.main(flags(data, *TINY, *rule)) == 0
    assert "At threshold" in capsys.readouterr().out
    about = cxr.files.read_json(tmp_path / "model.json")
    assert evaluate.main(flags(data, "--skip-bad")) == 0
    screen, page = capsys.readouterr().out, Page(tmp_path / "results" / "report.html").text
    there = about["at_threshold"]
    assert there["sensitivity"]["value"] >= 0.9
    for shown in (screen, page):
        assert "1 of train/NORMAL, 1 of test/PNEUMONIA: left out" in shown
        sensitivity = cxr.proportions.format_interval(there["sensitivity"])
        told = f"there sensitivity {sensitivity}, specificity"
        assert "sensitivity=0.9 on val" in shown and told in shown
        assert "age, sex, device (no such column of 2 to 10 values in metadata.csv)" in shown


# ---------------------------------------------------------------- results elsewhere


def share(k, n):
    return cxr.proportions.wilson_interval(np.arange(n) < k, range(n))


def test_a_result_elsewhere_is_that_of_the_literature():
    sensitivity, specificity = share(46, 50), share(37, 50)
    positive = cxr.proportions.ratio_interval(sensitivity, cxr.proportions.complement(specificity))
    assert [positive[key] for key in ("value", "low", "high")] == pytest.approx(
        [3.54, 2.20, 5.69], abs=0.25
    )
    metrics = {"sensitivity": sensitivity, "specificity": specificity}
    found = {
        each["prevalence"]: each for each in cxr.proportions.predictive_values(metrics, (0.1, 0.5))
    }
    assert found[0.5]["ppv"]["value"] == pytest.approx(46 / 59)
    assert found[0.5]["npv"]["value"] == pytest.approx(37 / 41)
    ppv = found[0.1]["ppv"]
    assert [ppv[key] for key in ("value", "low", "high")] == pytest.approx(
        [0.282, 0.197, 0.387], abs=0.02
    )


def test_intervals_elsewhere_hold_the_truth_also_where_nothing_is_wrong():
    rng, n, prevalence = np.random.default_rng(0), 60, 0.05
    for sensitivity, specificity in ((0.9, 0.7), (0.98, 0.95), (0.7, 0.99)):
        odds = prevalence / (1 - prevalence)
        ppv = 1 / (1 + (1 - specificity) / sensitivity / odds)
        npv = 1 / (1 + odds * (1 - sensitivity) / specificity)
        hits = np.zeros(2)
        for _ in range(600):
            shares = (share(rng.binomial(n, p), n) for p in (sensitivity, specificity))
            metrics = dict(zip(("sensitivity", "specificity"), shares, strict=True))
            (found,) = cxr.proportions.predictive_values(metrics, [prevalence])
            for i, (name, truth) in enumerate((("ppv", ppv), ("npv", npv))):
                hits[i] += found[name]["low"] <= truth <= found[name]["high"]
        assert (hits / 600 > 0.9).all(), (sensitivity, specificity, hits)


@pytest.mark.parametrize(("right", "wrong"), [(50, 50), (0, 0), (0, 50), (50, 0)])
def test_shares_of_0_and_1_give_limits_or_are_undefined(right, wrong):
    metrics = {"sensitivity": share(right, 50), "specificity": share(wrong, 50)}
    for each in cxr.proportions.predictive_values(metrics, cxr.proportions.PREVALENCES):
        for name in ("ppv", "npv"):
            low, value, high = (each[name][key] for key in ("low", "value", "high"))
            if value is not None:
                assert -1e-9 <= low <= value <= high <= 1 + 1e-9
    json.dumps(cxr.proportions.predictive_values(metrics, [0.1]), allow_nan=False)


def test_wilson_s_interval_counts_patients_where_their_images_are_alike():
    rng, hits, plain, runs = np.random.default_rng(0), 0, 0, 600
    for p in (0.8, 0.95):
        hits = plain = 0
        for _ in range(runs):
            own = rng.normal(size=(50, 1)) * 0.75**0.5
            z = own + rng.normal(size=(50, 3)) * 0.25**0.5  # three images a patient, alike
            right = (z < scipy.stats.norm.ppf(p)).ravel()
            found = cxr.proportions.wilson_interval(right, np.repeat(np.arange(50), 3))
            hits += found["low"] <= p <= found["high"]
            found = cxr.proportions.wilson_interval(right, np.arange(150))
            plain += found["low"] <= p <= found["high"]
        assert 0.91 < hits / runs < 0.985 and plain / runs < hits / runs
    for k, n in ((0, 7), (5, 7), (50, 60), (60, 60)):
        expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        found = share(k, n)
        assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=1e-9)
    whole = cxr.proportions.wilson_interval(np.ones(60), np.repeat(np.arange(20), 3))
    assert whole["low"] == pytest.approx(share(20, 20)["low"])


# ---------------------------------------------------------------- doubtful labels


def test_flipped_labels_lead_the_table_of_doubtful_ones_and_val_is_not_needed(
    data, tmp_path, flags, capsys
):
    shutil.rmtree(data / "val")
    flipped = {sorted((data / "train" / name).iterdir())[3] for name in CLASSES}
    for path in flipped:
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / path.name)
    folds = "--folds", 4, "--repeats", 3
    assert train.main(flags(data, *TINY, *folds)) == 0
    screen, results = capsys.readouterr(), tmp_path / "results"
    assert "\r" not in screen.out + screen.err
    with open(results / "doubtful_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and {row["repeats"] for row in rows} == {"3"}
    losses = [float(row["mean_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert {Path(row["file"]).name for row in rows[:12]} >= {path.name for path in flipped}
    for row in rows:
        missed = (float(row["mean_probability"]) > 0.5) != (row["label"] == "PNEUMONIA")
        assert not missed or int(row["missed"]) > 0
    with Image.open(results / "doubtful_labels.png") as sheet:
        assert min(sheet.size) > 800
    assert cxr.files.read_json(results / "cv.json")["metrics"]["auroc"]["single_split"] is None


# ---------------------------------------------------------------- what newcomers stumbled over


def test_the_readme_s_own_lines_give_the_probability_of_predictions_csv(data, tmp_path, flags):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(code.splitlines()) <= 12
    network = "--arch", "resnet50", "--weights", "random", "--views", 1
    for name in CLASSES:
        for split in ("train", "val", "test"):
            for path in sorted((data / split / name).iterdir())[3:]:
                path.unlink()
    image = sorted((data / "test" / "PNEUMONIA").iterdir())[0]
    Image.open(image).resize((300, 260)).save(image)
    assert train.main(flags(data, *network, "--window", 2)) == evaluate.main(flags(data)) == 0
    table = cxr.predictions.read_predictions(tmp_path / "results" / "predictions.csv")
    prob = table.probs[table.files.index(image.relative_to(data).as_posix())]
    shutil.copy(image, tmp_path / "scan.png")
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert float(found.stdout) == pytest.approx(prob, abs=1e-3), found.stderr


def test_without_test_images_each_step_says_what_to_do(data, tmp_path, flags, capsys):
    shutil.rmtree(data / "test")
    assert split_val.main(["--data-dir", str(data), "--check"]) == 0
    assert "no test/: nothing to report a result on; move whole patients" in capsys.readouterr().out
    assert train.main(flags(data, *TINY)) == 0 and evaluate.main(flags(data)) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'model.pth'} is saved" in error and "--split val" in error


def test_own_data_are_split_without_a_warning_and_too_much_names_what_works(data, capsys):
    shutil.rmtree(data / "val")
    assert split_val.main(["--data-dir", str(data), "--per-class", "40"]) == 2
    assert "as --per-class 6 (make: PER_CLASS=6)" in capsys.readouterr().err
    for _ in range(2):
        assert split_val.main(["--data-dir", str(data)]) == 0
        page = capsys.readouterr()
        assert not page.err
    assert "already split, 6 NORMAL and 6 PNEUMONIA images in val/" in page.out


def test_rules_unknown_weights_and_class_folders_are_told(data, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--threshold", "sensitivity=0.95"])
    assert "fitted on val while training" in capsys.readouterr().err
    assert train.main(flags(data, "--weights", "radnom")) == 2
    assert "expected imagenet, random or a state dict" in capsys.readouterr().err
    assert train.main(flags(data, *TINY)) == 0
    assert evaluate.main(flags(data, data / "test")) == 2
    error = capsys.readouterr().err
    assert f"name these: {data / 'test' / 'NORMAL'} {data / 'test' / 'PNEUMONIA'}" in error


def test_classes_of_other_sizes_are_weighted_and_that_is_said(data, flags, capsys):
    for path in sorted((data / "train" / "NORMAL").iterdir())[5:]:
        path.unlink()
    assert train.main(flags(data, *TINY)) == 0
    said = "Training on 5 NORMAL and 20 PNEUMONIA images: a PNEUMONIA image weighs 0.25 in the loss"
    assert said in capsys.readouterr().out


def test_transforms_edited_after_training_are_warned_of(data, flags, monkeypatch, capsys):
    assert train.main(flags(data, *TINY)) == evaluate.main(flags(data)) == 0
    assert "transforms" not in capsys.readouterr().err
    monkeypatch.setattr(common, "PREPARE", common.v2.Resize((224, 224), antialias=False))
    assert evaluate.main(flags(data)) == 0
    assert "the transforms of common.py are not those" in capsys.readouterr().err


def test_a_folder_of_results_can_be_compared_and_scored_again(data, tmp_path, flags, capsys):
    assert train.main(flags(data, *TINY)) == evaluate.main(flags(data)) == 0
    results = tmp_path / "results"
    assert evaluate.main(["--from", str(results), "--compare", str(results)]) == 0
    assert f"This model minus {results / 'predictions.csv'}" in capsys.readouterr().out


def test_a_reader_that_leaves_finds_the_files_written(data, tmp_path, flags):
    assert train.main(flags(data, *TINY)) == 0
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


def test_a_log_file_hears_of_a_slow_pass(data, flags, monkeypatch, capsys):
    monkeypatch.setattr(common, "LOG_EVERY", 0)
    assert train.main(flags(data, *TINY)) == 0
    assert re.search(r"Features: \d+ of 80 views, \d+ s left", capsys.readouterr().out)
