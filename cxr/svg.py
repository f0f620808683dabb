"""The plots of the report page, as SVG elements inside the page.

Each function returns a markupsafe.Markup. Colours and fonts are in page.css, so that the plots
follow the dark version and the print style. Names of classes and groups are escaped.

The plots show the same as the PNG files of cxr/plots.py. A point on a plot has coordinates between
0 and 1, which are written as per cent of the plot area. So page.js can move a point without knowing
the size of the plot.
"""

import math

import numpy as np
import torch
import torchmetrics.functional.classification as tm
from markupsafe import Markup, escape

from cxr.predictions import as_arrays
from cxr.proportions import complement, format_interval
from cxr.scores import calibration_bins, is_measured

WIDTH, HEIGHT = 340, 350  # of a plot with its title and axis labels, in CSS pixels
VIEW = f"0 0 {WIDTH} {HEIGHT}"
LEFT, TOP = 58, 46  # the corner of the plot area
AREA_WIDTH, AREA_HEIGHT = 270, 260
TICKS = (0, 0.25, 0.5, 0.75, 1)
N_BINS = 20  # of a histogram of probabilities
TOLERANCE = 0.2  # pixels by which a curve with fewer points may differ from the full one
LONGEST_NAME = 18  # letters of a class name in a plot: half of its width
MOST_INTERVALS = 6  # between the ticks of a forest plot


# ---------------------------------------------------------------- the four plots of one table


def roc(predictions, report):
    """Draws the ROC curve, and the point of the threshold with its intervals.

    predictions: of readable images; report: the content of metrics.json. page.js moves the element
    with the id chosen-point to another threshold.
    """
    metrics = report["metrics"]
    x, y = complement(metrics["specificity"]), metrics["sensitivity"]
    marks = [line(0, 0, 1, 1, "chance"), roc_curve(predictions), point(x, y)]
    marks.append(circle(x["value"], y["value"], "chosen", r=7, id="chosen-point"))
    title = f"ROC: AUROC {format_interval(metrics['auroc'])}"
    note = f"{point_note(report)}; dotted: chance"
    return plot("roc", title, note, ("1 - specificity", "sensitivity"), marks)


def precision_recall(predictions, report):
    """Draws the precision-recall curve, and the point of the threshold with its intervals."""
    probs, labels, _ = as_arrays(predictions)
    tensors = torch.from_numpy(probs), torch.from_numpy(labels)
    precision, recall, _ = tm.binary_precision_recall_curve(*tensors)
    # From each point to the next one, the curve runs horizontally, then vertically.
    x, y = np.repeat(recall.numpy(), 2)[1:], np.repeat(precision.numpy(), 2)[:-1]
    share = labels.mean()
    metrics = report["metrics"]
    marks = [line(0, share, 1, share, "chance"), curve(x, y)]
    marks.append(point(metrics["sensitivity"], metrics["ppv"]))
    title = f"Average precision {format_interval(metrics['average_precision'])}"
    note = f"{point_note(report)}; dotted: chance"
    return plot("precision-recall", title, note, ("recall (sensitivity)", "precision (PPV)"), marks)


def calibration(predictions, report):
    """Draws the share of positive images against the mean probability, in ten bins."""
    marks = [line(0, 0, 1, 1, "chance")]
    for mean, share, n in calibration_bins(*as_arrays(predictions)):
        marks.append(point({"value": mean, "low": None, "high": None}, share))
        # To the left and above the point, but inside the plot.
        css_class, dx = ("tick end", -7) if mean > 0.15 else ("tick", 7)
        dy = 15 if share["value"] > 0.9 else -5
        marks.append(text(mean, share["value"], n, css_class, dx=dx, dy=dy))
    positive = shorten(report["classes"][1])
    intercept, slope = (format_interval(report["calibration"][k]) for k in ("intercept", "slope"))
    title = f"Calibration intercept {intercept}"
    note = f"slope {slope}; dotted: ideal; with n"
    if not is_measured(report["calibration"]):
        title, note = "Calibration: could not be measured", "dotted: ideal; with n"
    labels = (f"mean P({positive}) in the bin", f"share of {positive}")
    return plot("calibration", title, note, labels, marks)


def scores(predictions, report):
    """Draws a histogram of the probabilities of each class, the positive class upwards.

    page.js moves the element with the id chosen-threshold.
    """
    probs, labels, _ = as_arrays(predictions)
    negative, positive = (
        np.histogram(probs[labels == label], N_BINS, (0, 1))[0] for label in (0, 1)
    )
    most = max(negative.max(), positive.max())
    most += most % 2  # even, because half of it is a tick
    marks = [line(0, 0.5, 1, 0.5, "axis-line")]
    for i in range(N_BINS):
        marks.append(bar(i / N_BINS, 0.5, 1 / N_BINS, positive[i] / most / 2, "positive"))
        height = negative[i] / most / 2
        marks.append(bar(i / N_BINS, 0.5 - height, 1 / N_BINS, height, "negative"))
    threshold = report["threshold"]
    marks.append(line(threshold, 0, threshold, 1, "threshold"))
    marks.append(line(threshold, 0, threshold, 1, "chosen", id="chosen-threshold"))
    negative_name, positive_name = map(shorten, report["classes"])
    # Where the bars of the class are low.
    marks.append(text(0.03, 0.93, positive_name, "positive"))
    marks.append(text(0.97, 0.04, negative_name, "negative end"))
    title, note = "Probabilities by class", f"dashed: threshold {threshold:.3g}"
    y_ticks = {0: most, 0.25: most // 2, 0.5: 0, 0.75: most // 2, 1: most}
    return plot("scores", title, note, (f"P({positive_name})", "images"), marks, y_ticks)


# ---------------------------------------------------------------- several sources, many scores


def roc_of_sources(sources):
    """Draws the ROC curves of several tables of predictions, each with the point of its threshold.

    sources: [(name, predictions, metrics)], the predictions of readable images of both classes.
    Returns the plot and its legend.
    """
    marks, entries = [line(0, 0, 1, 1, "chance")], []
    for number, (name, predictions, metrics) in enumerate(sources):
        css_class = f"source source-{number % 4}"
        x, y = complement(metrics["specificity"]), metrics["sensitivity"]
        curve_and_point = roc_curve(predictions) + point(x, y)
        marks.append(element("g", curve_and_point, class_=css_class))
        sample = element("path", d="M0 6H28", class_="curve")
        key = element("svg", sample, class_=css_class, width=28, height=12, aria_hidden="true")
        entry = Markup("{} {}: AUROC {}").format(key, name, format_interval(metrics["auroc"]))
        entries.append(element("li", entry))
    title, note = "ROC of each source", "points: the threshold, 95 % intervals; dotted: chance"
    picture = plot("roc-of-sources", title, note, ("1 - specificity", "sensitivity"), marks)
    return picture + element("ul", Markup().join(entries), class_="legend")


def forest(rows, label):
    """Draws values with their intervals on a common axis, as a table: name, picture, text.

    rows: [(name, note, metric, text)]. The note is smaller than the name, or "". metric:
    {value, low, high}; without a value only the text is shown. label: the accessible name.
    """
    metrics = [metric for _, _, metric, _ in rows]
    numbers = [x for m in metrics for x in (m["value"], m["low"], m["high"]) if x is not None]
    ticks = choose_ticks(min(numbers, default=0), max(numbers, default=1))
    start, length = ticks[0], ticks[-1] - ticks[0]
    grid = Markup().join(
        line((x - start) / length, 0, (x - start) / length, 1, "grid") for x in ticks
    )
    table = []
    for name, note, metric, value_text in rows:
        keys = ("value", "low", "high")
        scaled = {k: None if metric[k] is None else (metric[k] - start) / length for k in keys}
        half = {"value": 0.5, "low": None, "high": None}
        picture = element("svg", grid + point(scaled, half), height=30, aria_hidden="true")
        value, _, interval = value_text.partition(" (")
        small = element("small", f" ({interval}") if interval else ""
        cells = element("th", Markup("{} <small>{}</small>").format(name, note), scope="row")
        cells += element("td", picture, class_="plot")
        cells += element("td", Markup("{}{}").format(value, small))
        table.append(element("tr", cells))
    marks = [text((x - start) / length, 0.3, f"{x:.3g}", "tick middle") for x in ticks]
    axis = element("svg", Markup().join(marks), height=20)
    cells = element("th") + element("td", axis, class_="plot") + element("td")
    table.append(element("tr", cells, aria_hidden="true"))
    return element("table", Markup().join(table), class_="forest", aria_label=label)


def choose_ticks(low, high):
    """Returns round numbers at equal distances, the first one <= low, the last one >= high."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 100, 1000):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= MOST_INTERVALS:
            break
    return [number * step for number in range(first, max(last, first + 1) + 1)]


# ---------------------------------------------------------------- elements


def plot(name, title, note, axis_labels, marks, y_ticks=None):
    """Returns an svg element: two lines of title, axes, and the marks in the plot area.

    name: the id of the element; axis_labels: of x and y; y_ticks: {position: label}, if they are
    not 0 to 1.
    """
    x_label, y_label = axis_labels
    grid = [line(x, 0, x, 1, "grid") + line(0, x, 1, x, "grid") for x in TICKS]
    grid += [text(x, 0, x, "tick middle", dy=18) for x in TICKS]
    y_ticks = y_ticks or {y: y for y in TICKS}
    grid += [text(0, y, label, "tick end", dx=-8, dy=4) for y, label in y_ticks.items()]
    area = element(
        "svg", Markup().join([*grid, *marks]), class_="area",
        x=LEFT, y=TOP, width=AREA_WIDTH, height=AREA_HEIGHT,
    )  # fmt: skip
    x_middle, y_middle = LEFT + AREA_WIDTH / 2, TOP + AREA_HEIGHT / 2
    turned = f"translate(13 {y_middle:g}) rotate(-90)"
    parts = [
        element("title", f"{title}; {note}; {y_label} against {x_label}"),
        element("text", title, x=6, y=16, class_="title"),
        element("text", note, x=6, y=34, class_="tick"),
        area,
        element("text", x_label, x=x_middle, y=HEIGHT - 8, class_="axis middle"),
        element("text", y_label, transform=turned, class_="axis middle"),
    ]
    return element("svg", Markup().join(parts), id=name, role="img", viewBox=VIEW)


def roc_curve(predictions):
    """Returns the ROC curve as a path."""
    probs, labels, _ = as_arrays(predictions)
    fpr, tpr, _ = tm.binary_roc(torch.from_numpy(probs), torch.from_numpy(labels))
    return curve(fpr.numpy(), tpr.numpy())


def curve(x, y):
    """Returns a path through points, without those that would make no visible difference.

    x, y: (n,), between 0 and 1. A curve of 20,000 images has up to 40,000 points.
    """
    from matplotlib.path import Path  # slow to import

    corners = np.column_stack([x * AREA_WIDTH, (1 - y) * AREA_HEIGHT])
    path = Path(corners)
    path.simplify_threshold = TOLERANCE
    path = path.cleaned(simplify=True)
    points = path.vertices[path.codes != Path.STOP]
    return element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_="curve")


def point(x, y):
    """Returns a point with the intervals of both coordinates, each a dict {value, low, high}.

    Without a value, for example the PPV if no image is predicted positive, there is no point.
    Without limits there is no line.
    """
    if x["value"] is None or y["value"] is None:
        return Markup()
    marks = Markup()
    if x["low"] is not None:
        marks += line(x["low"], y["value"], x["high"], y["value"], "interval")
    if y["low"] is not None:
        marks += line(x["value"], y["low"], x["value"], y["high"], "interval")
    return marks + circle(x["value"], y["value"], "dot", r=4.5)


def line(x1, y1, x2, y2, css_class, **attributes):
    ends = {"x1": percent(x1), "y1": percent(1 - y1), "x2": percent(x2), "y2": percent(1 - y2)}
    return element("line", **ends, class_=css_class, **attributes)


def circle(x, y, css_class, **attributes):
    return element("circle", cx=percent(x), cy=percent(1 - y), class_=css_class, **attributes)


def bar(x, y, width, height, css_class):
    """Returns a rectangle; (x, y) is its lower left corner."""
    if height == 0:
        return Markup()
    corner = {"x": percent(x), "y": percent(1 - y - height)}
    size = {"width": percent(width), "height": percent(height)}
    return element("rect", **corner, **size, class_=css_class)


def text(x, y, content, css_class, **attributes):
    place = {"x": percent(x), "y": percent(1 - y)}
    return element("text", content, **place, class_=css_class, **attributes)


def percent(share):
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def element(name, content="", **attributes):
    """Returns an element of SVG or HTML. Its content and the values of its attributes are escaped.

    The attribute class is written class_, because class is a word of Python, and aria-label as
    aria_label. Content that is Markup already stays as it is.
    """
    pairs = [f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items()]
    return Markup(f"<{name}{''.join(pairs)}>{escape(content)}</{name}>")


def shorten(name):
    """Returns the name of a class, with at most LONGEST_NAME letters."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def point_note(report):
    """Explains the point of the threshold."""
    return f"point: threshold {report['threshold']:.3g}, 95 % intervals"
