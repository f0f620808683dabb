"""report.html in a real browser: its sliders, the keyboard, a phone, and no JavaScript."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import read_report, write_rows

import cxr.bootstrap
import cxr.page
import cxr.sliders
import evaluate
from cxr.page import write_page
from cxr.predictions import read_predictions
from cxr.proportions import format_interval, format_number, predictive_values, wilson_interval

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
THRESHOLDS = 0, 0.25, 0.438, 0.999, 1
PREVALENCES = 0.001, 0.009, 0.01, 0.1, 0.37, 0.99


@pytest.fixture(scope="module")
def browser():
    reason = "no playwright: make page-test installs it"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        found = [path for path in map(shutil.which, BROWSERS) if path]
        path = found[0] if found else driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(
                "no browser: install Chromium or Chrome, or run playwright install chromium"
            )
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(folder, width, **options) opens report.html, and at the end checks its errors."""
    pages, errors = [], []

    def call(folder, width=1280, **options):
        address = (folder / "report.html").as_uri()
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url == address or errors.append(request.url))
        page.goto(address)
        pages.append(page)
        return page

    yield call
    for page in pages:
        page.close()
    assert not errors


def draw_table(folder, separated):
    """Writes a predictions.csv: 90 images of 40 patients, 3 images of some of them.

    separated: no image of one class has a higher probability than one of the other class.
    """
    rng = np.random.default_rng(3)
    patients = rng.integers(40, size=90)
    labels = patients % 2
    noise = rng.normal(size=40)[patients] + rng.normal(size=90) / 2
    probs = 1 / (1 + np.exp(-noise - 2 * labels + 1))
    probs[:3] = 0.25, 0.438, 0.999  # thresholds of the test, as float32
    if separated:
        probs = np.where(labels, 0.5 + probs / 2, probs / 2)
    names = [f"test/IM-{patient:04d}-{i:04d}.png" for i, patient in enumerate(patients)]
    return write_rows(folder / "predictions.csv", labels, probs.astype(np.float32), names)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """The results folder of a report whose threshold is not a step of the slider."""
    folder = tmp_path_factory.mktemp("results")
    source = draw_table(folder, getattr(request, "param", "") == "separated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cxr.bootstrap, "DRAWS", 40)
        patch.setattr(evaluate, "draw_pictures", lambda *_: None)
        flags = ["--results-dir", folder / "results", "--threshold", 0.43712]
        evaluate.evaluate(["--from", source, *flags])
    return folder / "results"


def move(page, name, value):
    """Moves a slider, as a mouse does."""
    script = "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }"
    page.locator(f"#{name}").evaluate(script, value)


def position(prevalence):
    return round(1000 * prevalence if prevalence < 0.01 else 9 + 100 * prevalence)


def shown(page, *names):
    return [page.locator(f"#{name}").inner_text() for name in names]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("results", ["overlapping", "separated"], indirect=True)
def test_the_sliders_show_what_evaluate_computes(results, open_page):
    page = open_page(results)
    for threshold in (0.43712, *THRESHOLDS):
        flags = ["--from", results, "--threshold", threshold]
        for prevalence in PREVALENCES:
            flags += ["--prevalence", prevalence]
        report = evaluate.evaluate(flags)
        counts, metrics = report["counts"], report["metrics"]
        if threshold in THRESHOLDS:
            move(page, "threshold", threshold)
            assert shown(page, "threshold-text") == [f"{threshold:.3f}"]
        rows = {row["prevalence"]: row for row in report["elsewhere"]}
        for prevalence in PREVALENCES:
            move(page, "prevalence", position(prevalence))
            assert shown(page, "prevalence-text") == [f"{100 * prevalence:g} %"]
            row = metrics | rows[prevalence]
            names = ("sensitivity", "specificity", "ppv", "npv")
            assert shown(page, *names) == [format_interval(row[name]) for name in names]
        tp, tn = counts["tp"], counts["tn"]
        assert shown(page, "sensitivity-counts", "specificity-counts") == [
            f"{tp} of {tp + counts['fn']} PNEUMONIA images correct, {counts['fn']} wrong",
            f"{tn} of {tn + counts['fp']} NORMAL images correct, {counts['fp']} wrong",
        ]
        point = page.locator("#chosen-point")
        x, y = (float(point.get_attribute(name).rstrip("%")) / 100 for name in ("cx", "cy"))
        expected = [metrics["specificity"]["value"], metrics["sensitivity"]["value"]]
        assert [1 - x, 1 - y] == pytest.approx(expected, abs=1e-4)


def test_the_intervals_of_the_page_are_those_of_python(results, open_page):
    rng, cases = np.random.default_rng(0), []
    for n in rng.integers(1, 80, 300):
        share, n_patients = rng.choice([0, 1, rng.random()]), rng.integers(1, n + 1)
        correct, patients = rng.random(n) < share, rng.integers(n_patients, size=n)
        cases.append([correct.astype(int).tolist(), patients.tolist()])
    page = open_page(results)
    script = "cases => cases.map(([correct, patients]) => wilsonInterval(correct, patients))"
    intervals = page.evaluate(script, cases)
    expected = [wilson_interval(*case) for case in cases]
    for interval, wanted in zip(intervals, expected, strict=True):
        assert interval == pytest.approx(wanted, abs=1e-12)

    pairs = [[*pair, rng.uniform(0.001, 0.999)] for pair in pairwise(expected)]
    script = "pairs => pairs.map(([a, b, prevalence]) => predictiveValues(a, b, prevalence))"
    script = f"pairs => ({script})(pairs).map(row => [row.ppv, row.npv].map(formatInterval))"
    texts = page.evaluate(script, pairs)
    for text, (sensitivity, specificity, prevalence) in zip(texts, pairs, strict=True):
        metrics = {"sensitivity": sensitivity, "specificity": specificity}
        (row,) = predictive_values(metrics, [prevalence])
        assert text == [format_interval(row["ppv"]), format_interval(row["npv"])]

    numbers = [k / n for n in range(1, 101) for k in range(n + 1)]
    numbers += [k / 2000 for k in range(2001)] + [1e-9, 0.0004999, 0.0005, -1e-17]
    assert page.evaluate("xs => xs.map(formatNumber)", numbers) == [*map(format_number, numbers)]


def test_the_sliders_work_with_the_keyboard(results, open_page):
    page = open_page(results)
    names = "sensitivity", "specificity", "ppv", "npv"
    at_start = shown(page, *names, "threshold-text", "prevalence-text")
    assert at_start[-2:] == ["0.4371", "10 %"]
    for _ in range(20):  # links and the like may come before the slider
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "threshold":
            break
    focus = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(focus) == "solid"
    page.keyboard.press("ArrowRight")
    assert shown(page, "threshold-text") == ["0.438"]
    page.keyboard.press("End")
    assert shown(page, "threshold-text") == ["1.000"] and shown(page, *names) != at_start[:4]
    assert page.locator("#threshold").get_attribute("aria-valuetext") == "1.000"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert shown(page, "prevalence-text") == ["11 %"]
    page.keyboard.press("Home")
    assert shown(page, "prevalence-text") == ["0.1 %"]
    assert page.locator("#prevalence").get_attribute("aria-valuetext") == "0.1 %"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "reset"
    assert page.evaluate(focus) == "solid"
    page.keyboard.press("Enter")
    assert shown(page, *names, "threshold-text", "prevalence-text") == at_start
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    move(page, "threshold", 1)
    assert shown(page, "npv-counts") == ["1,000 of 1,000 patients negative, 999 correctly"]


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen(width, results, open_page, tmp_path):
    page = open_page(results, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    report = read_report(results)
    predictions = read_predictions(results / "predictions.csv", report["classes"])
    report["classes"] = [
        "no_tuberculosis_of_any_kind_whatsoever",
        "bacterial or viral tuberculosis",
    ]
    worst = [(number, "P 0.123", np.zeros((224, 448, 3), np.uint8)) for number in range(8)]
    write_page(tmp_path, report, predictions, worst)
    page = open_page(tmp_path, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_table_replaces_the_sliders_without_javascript_and_on_paper(results, open_page):
    report = read_report(results)
    page = open_page(results, java_script_enabled=False)
    sliders, table = page.locator("#sliders"), page.locator(".without-sliders")
    assert table.is_visible() and not sliders.is_visible()
    for row in report["elsewhere"]:
        name = f"{100 * row['prevalence']:.3g} %"
        cells = table.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))
        texts = [format_interval(row[key]) for key in ("ppv", "npv")]
        assert cells.first.get_by_role("cell").all_inner_texts() == texts
    page = open_page(results)
    sliders, table = page.locator("#sliders"), page.locator(".without-sliders")
    assert sliders.is_visible() and not table.is_visible()
    page.emulate_media(media="print")
    assert table.is_visible() and not sliders.is_visible()


def test_the_table_replaces_the_sliders_if_there_are_too_many_images(
    results, open_page, tmp_path, monkeypatch
):
    monkeypatch.setattr(cxr.sliders, "MOST_IMAGES", 89)
    report = read_report(results)
    predictions = read_predictions(results / "predictions.csv", report["classes"])
    write_page(tmp_path, report, predictions, [])
    page = open_page(tmp_path)
    assert page.locator(".without-sliders").is_visible()
    assert page.locator("#sliders").count() == page.locator("script").count() == 0


def test_names_that_contain_tags_do_not_end_the_script(results, open_page, tmp_path):
    report = read_report(results)
    predictions = read_predictions(results / "predictions.csv", report["classes"])
    report["classes"] = ["</script><script>alert(1)</script>", "<!--<script>{{ill}}"]
    write_page(tmp_path, report, predictions, [])
    page = open_page(tmp_path)
    assert page.evaluate("data.classes") == report["classes"]
    assert report["classes"][1] in page.locator("#sensitivity-counts").inner_text()
