"""cxr/svg.py: the plots of the page. tests/test_browser.py looks at them in a browser."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torchmetrics.functional.classification as tm
from helpers import EXTREME_TABLES
from torch import from_numpy

from cxr.predictions import as_arrays
from cxr.proportions import PREVALENCES, format_interval, predictive_values
from cxr.scores import measure_calibration, measure_scores
from cxr.svg import (
    AREA_HEIGHT,
    AREA_WIDTH,
    calibration,
    choose_ticks,
    forest,
    precision_recall,
    roc,
    roc_of_sources,
    scores,
)

PLOTS = roc, precision_recall, calibration, scores
NAMES = ["<b>healthy</b>", 'a "sick" & ill']


def make_report(labels, probs, threshold=0.5):
    """Returns (predictions, report) with the parts of a report that the plots show."""
    table = {"label": labels, "probability": np.array(probs, np.float32), "patient": ""}
    predictions = pd.DataFrame(table | {"file": [f"{i}.png" for i in range(len(labels))]})
    metrics = measure_scores(predictions, threshold, 0)
    report = {"classes": NAMES, "threshold": threshold, "metrics": metrics}
    report["calibration"] = measure_calibration(predictions, {})
    report["elsewhere"] = predictive_values(metrics, PREVALENCES)
    return predictions, report


def draw_labels(n, distance, seed=0):
    """Returns (labels, probabilities) of n images, normally distributed in each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    return labels, 1 / (1 + np.exp(-rng.normal(size=n) - distance * (labels - 0.5)))


def parse(markup):
    return ElementTree.fromstring(f"<div>{markup}</div>")


def find(markup, css_class):
    """Returns the elements of a class."""
    return [e for e in parse(markup).iter() if css_class in e.get("class", "").split()]


def read_curve(markup):
    """Returns the points of the curve, float (n, 2), between 0 and 1."""
    (path,) = find(markup, "curve")
    points = np.array([pair.split() for pair in path.get("d")[1:].split("L")], float)
    return points / [AREA_WIDTH, -AREA_HEIGHT] + [0, 1]


def shares(element, *names):
    """Returns attributes in per cent of the plot area as numbers between 0 and 1."""
    return [float(element.get(name).removesuffix("%")) / 100 for name in names]


def distance_to_curve(points, path):
    """Returns how far the farthest of the points is from a path, in pixels."""
    scale = np.array([AREA_WIDTH, AREA_HEIGHT])
    points, start, end = points[:, None] * scale, path[:-1] * scale, path[1:] * scale
    length = np.maximum(np.square(end - start).sum(1), 1e-12)
    along = np.clip(((points - start) * (end - start)).sum(2) / length, 0, 1)
    nearest = start + along[..., None] * (end - start)
    return np.sqrt(np.square(points - nearest).sum(2)).min(1).max()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("labels", "probs"), [*EXTREME_TABLES, draw_labels(200, 2)])
def test_plots_of_few_and_extreme_scores_have_titles_and_no_colours(labels, probs):
    predictions, report = make_report(np.array(labels), probs)
    for draw in PLOTS:
        markup = draw(predictions, report)
        (svg,) = parse(markup).findall("svg")
        assert svg.get("role") == "img" and svg[0].tag == "title" and len(svg[0].text) > 20
        assert "nan" not in markup and "inf" not in markup and "None" not in markup
        assert not re.search(r"#[0-9a-f]{3}|fill=|stroke=|style=", markup)
        assert NAMES[0] not in markup and NAMES[1] not in markup
    assert NAMES[1] in parse(scores(predictions, report))[0][0].text
    assert format_interval(report["metrics"]["auroc"]) in roc(predictions, report)


@pytest.mark.usefixtures("quick")
def test_the_points_are_at_the_threshold_with_their_intervals():
    predictions, report = make_report(*draw_labels(120, 1.5), threshold=0.6)
    metrics = report["metrics"]
    sensitivity, specificity, ppv = (metrics[k] for k in ("sensitivity", "specificity", "ppv"))
    for draw, x, y in (
        (roc, {k: 1 - v for k, v in specificity.items()}, sensitivity),
        (precision_recall, sensitivity, ppv),
    ):
        markup = draw(predictions, report)
        (dot,), (across, upright) = find(markup, "dot"), find(markup, "interval")
        assert shares(dot, "cx", "cy") == pytest.approx([x["value"], 1 - y["value"]], abs=1e-4)
        limits = sorted([x["low"], x["high"]])
        assert sorted(shares(across, "x1", "x2")) == pytest.approx(limits, abs=1e-4)
        limits = [1 - y["high"], 1 - y["low"]]
        assert sorted(shares(upright, "y1", "y2")) == pytest.approx(limits, abs=1e-4)
        point = np.array([[x["value"], y["value"]]])
        assert distance_to_curve(point, read_curve(markup)) < 0.5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("distance", [0, 2])
def test_a_curve_of_20000_images_has_few_points_and_looks_the_same(distance):
    _, report = make_report(*draw_labels(200, distance))
    labels, probs = draw_labels(20_000, distance)
    table = {"label": labels, "probability": probs.astype(np.float32), "patient": ""}
    many = pd.DataFrame(table | {"file": [f"{i}.png" for i in range(len(labels))]})
    assert all(len(draw(many, report).encode()) < 60_000 for draw in PLOTS)
    probs, labels, _ = as_arrays(many)
    fpr, tpr, _ = tm.binary_roc(from_numpy(probs), from_numpy(labels))
    full = np.column_stack([fpr.numpy(), tpr.numpy()])[::10]
    curve = read_curve(roc(many, report))
    assert curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]
    assert distance_to_curve(full, curve) < 0.5 and distance_to_curve(curve, full) < 1


@pytest.mark.usefixtures("quick")
def test_the_bars_are_the_images_of_each_class():
    labels, probs = draw_labels(300, 1)
    predictions, report = make_report(labels, probs)
    markup = scores(predictions, report)
    for label, name in enumerate(("negative", "positive")):
        bars = [element for element in find(markup, name) if element.tag == "rect"]
        heights = sum(shares(bar, "height")[0] for bar in bars)
        most = int(find(markup, "end")[0].text)  # the highest tick
        assert heights * 2 * most == pytest.approx((labels == label).sum(), abs=1)


@pytest.mark.usefixtures("quick")
def test_numbers_and_long_names_stay_inside_the_plot():
    predictions, report = make_report(*draw_labels(200, 5))
    numbers = [
        e for e in find(calibration(predictions, report), "tick") if e.get("dx") in ("7", "-7")
    ]
    assert len(numbers) > 2
    for number in numbers:
        x, y = shares(number, "x", "y")
        assert (number.get("dx") == "-7") == (x > 0.15)
        assert (number.get("dy") == "15") == (y < 0.1)
    report["classes"] = ["no tuberculosis of any kind", "bacterial or viral tuberculosis"]
    names = [
        *find(scores(predictions, report), "positive"),
        *find(scores(predictions, report), "negative"),
    ]
    assert [e.text for e in names if e.tag == "text"] == [
        "bacterial or vira…",
        "no tuberculosis o…",
    ]
    assert "viral t" not in scores(predictions, report)


def test_a_forest_plot_shows_values_on_a_common_axis():
    rows = [
        ("AUROC", "", {"value": 0.9, "low": 0.85, "high": 0.97}, "0.900 (0.850 to 0.970)"),
        ("<i>", "n = 3", {"value": 0.5, "low": None, "high": None}, "0.500"),
        ("PPV", "", {"value": None, "low": None, "high": None}, "undefined"),
    ]
    markup = forest(rows, "All <scores>")
    (table,) = parse(markup)
    assert table.get("aria-label") == "All <scores>" and "<i>" not in markup
    texts = [["".join(cell.itertext()).strip() for cell in row] for row in table]
    assert texts[:3] == [
        ["AUROC", "", "0.900 (0.850 to 0.970)"],
        ["<i> n = 3", "", "0.500"],
        ["PPV", "", "undefined"],
    ]
    dots = [shares(dot, "cx")[0] for dot in find(markup, "dot")]
    assert dots == [0.8, 0] and len(find(markup, "interval")) == 1  # an axis from 0.5 to 1
    assert shares(find(markup, "interval")[0], "x1", "x2") == [0.7, 0.94]


def test_ticks_are_round_numbers_around_all_values():
    assert choose_ticks(0.542, 0.98) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert choose_ticks(0.3, 0.9) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert choose_ticks(-1.64, 1.78) == [-2, -1, 0, 1, 2]
    assert len(choose_ticks(1, 1)) == 2
    rng = np.random.default_rng(0)
    for low, high in np.sort(rng.normal(size=(200, 2)) * 10 ** rng.uniform(-2, 3, (200, 1))):
        ticks = choose_ticks(low, high)
        assert ticks[0] <= low + 1e-6 and ticks[-1] >= high - 1e-6 and 2 <= len(ticks) <= 7


@pytest.mark.usefixtures("quick")
def test_the_curves_of_several_sources_have_a_legend():
    tables = [make_report(*draw_labels(100, distance)) for distance in (3, 1)]
    names = ["here", "<hospital>"]
    sources = [(name, table, r["metrics"]) for name, (table, r) in zip(names, tables, strict=True)]
    markup = roc_of_sources(sources)
    svg, legend = parse(markup)
    assert len(find(markup, "source")) == 4 and svg.get("role") == "img"
    expected = [
        f"{name}: AUROC {format_interval(metrics['auroc'])}" for name, _, metrics in sources
    ]
    assert ["".join(item.itertext()).strip() for item in legend] == expected
