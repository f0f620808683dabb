"""The six pictures of a report."""

import math
from pathlib import Path

import numpy as np
import torch
import torchmetrics.functional.classification as tm

from cxr.files import printable, save_figure
from cxr.folders import COLOURS
from cxr.maps import legend, read_overlays
from cxr.predictions import as_arrays
from cxr.proportions import complement, format_interval, format_probability
from cxr.scores import calibration_bins, is_measured

STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False}
STYLE |= {"text.parse_math": False}  # a name may contain $, which begins a formula
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}
CHANCE = {"color": "grey", "ls": ":"}
N_WORST = 8  # images in worst.png


def draw_pictures(folder, predictions, report):
    """Draws roc.png, precision_recall.png, confusion.png, reliability.png and scores.png.

    predictions: of readable images; report: the content of metrics.json.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = ("roc", "precision_recall", "confusion", "reliability", "scores")
    functions = (draw_roc, draw_precision_recall, draw_confusion, draw_reliability, draw_scores)
    with matplotlib.rc_context(STYLE):
        for name, draw in zip(names, functions, strict=True):
            figure = Figure((5, 4.6), layout="constrained")
            draw(figure.add_subplot(), predictions, report)
            save_with_caption(folder / f"{name}.png", figure, report)


def draw_roc(ax, predictions, report):
    """Draws the ROC curve, and the point of the threshold with its intervals."""
    probs, labels, _ = as_arrays(predictions)
    fpr, tpr, _ = tm.binary_roc(torch.from_numpy(probs), torch.from_numpy(labels))
    metrics = report["metrics"]
    ax.plot(fpr, tpr, color=COLOURS[1], label="network")
    ax.plot((0, 1), (0, 1), label="chance", **CHANCE)
    x, y = complement(metrics["specificity"]), metrics["sensitivity"]
    draw_point(ax, x, y, point_label(report))
    ax.set(xlabel="1 - specificity", ylabel="sensitivity")
    ax.set_title(f"ROC: AUROC {format_interval(metrics['auroc'])}")
    ax.legend(loc="lower right")


def draw_roc_of_sources(path, curves, report):
    """Draws the ROC curves of several sources. curves: the result of cxr.also.roc_curves."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure((5, 4.6), layout="constrained")
        ax = figure.add_subplot()
        for name, predictions, scores in curves:
            probs, labels, _ = as_arrays(predictions)
            fpr, tpr, _ = tm.binary_roc(torch.from_numpy(probs), torch.from_numpy(labels))
            ax.plot(fpr, tpr, label=f"{name}: {format_interval(scores['auroc'])}")
        ax.plot((0, 1), (0, 1), label="chance", **CHANCE)
        ax.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC of each source: AUROC")
        ax.legend(loc="lower right")
        save_with_caption(path, figure, report)


def draw_precision_recall(ax, predictions, report):
    """Draws the precision-recall curve, and the point of the threshold with its intervals."""
    probs, labels, _ = as_arrays(predictions)
    tensors = torch.from_numpy(probs), torch.from_numpy(labels)
    precision, recall, _ = tm.binary_precision_recall_curve(*tensors)
    metrics = report["metrics"]
    ax.plot(recall, precision, drawstyle="steps-post", color=COLOURS[1], label="network")
    ax.axhline(labels.mean(), label="chance", **CHANCE)
    draw_point(ax, metrics["sensitivity"], metrics["ppv"], point_label(report))
    ax.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.05))
    ax.set_title(f"Average precision {format_interval(metrics['average_precision'])}")
    ax.legend(loc="lower left")


def draw_confusion(ax, predictions, report):
    """Draws the confusion matrix at the threshold."""
    from sklearn.metrics import ConfusionMatrixDisplay

    probs, labels, _ = as_arrays(predictions)
    threshold, names = report["threshold"], report["classes"]
    ConfusionMatrixDisplay.from_predictions(
        labels, probs > threshold, ax=ax, display_labels=names, cmap="Blues", colorbar=False
    )
    ax.grid(False)  # its lines would cross the cells
    accuracy = format_interval(report["metrics"]["accuracy"])
    ax.set_title(f"Accuracy {accuracy} at threshold {threshold:.3g}")


def draw_reliability(ax, predictions, report):
    """Draws the share of positive images against the mean probability, in ten bins."""
    ax.plot((0, 1), (0, 1), **CHANCE)
    for mean, share, n in calibration_bins(*as_arrays(predictions)):
        draw_point(ax, {"value": mean, "low": mean, "high": mean}, share)
        ax.annotate(n, (mean, share["value"]), (4, 3), textcoords="offset points")
    positive = report["classes"][1]
    ax.set_xlabel(f"mean P({positive}) in the bin")
    ax.set_ylabel(f"share of {positive}, 95 % interval, n")
    calibration = report["calibration"]
    intercept, slope = (format_interval(calibration[key]) for key in ("intercept", "slope"))
    title = f"Calibration: intercept {intercept}\nslope {slope}"
    ax.set_title(title if is_measured(calibration) else "Calibration: could not be measured")


def draw_scores(ax, predictions, report):
    """Draws a histogram of the probabilities of each class."""
    probs, labels, _ = as_arrays(predictions)
    by_class = [probs[labels == 0], probs[labels == 1]]
    ax.hist(by_class, color=list(COLOURS), label=report["classes"], bins=25, range=(0, 1))
    label = f"threshold {report['threshold']:.3g}"
    ax.axvline(report["threshold"], color="black", ls="--", label=label)
    ax.set(xlabel=f"P({report['classes'][1]})", ylabel="images", title="Probabilities by class")
    ax.legend()


def point_label(report):
    """Returns the legend of the point of the threshold."""
    return f"threshold {report['threshold']:.3g}, 95 % intervals"


def draw_point(ax, x, y, label=None):
    """Draws a point with the intervals of both coordinates, each a dict {value, low, high}."""
    if x["value"] is None or y["value"] is None:
        return  # undefined, for example the PPV if no image is predicted positive
    x_error = [[x["value"] - x["low"]], [x["high"] - x["value"]]]
    y_error = [[y["value"] - y["low"]], [y["high"] - y["value"]]]
    style = {"fmt": "o", "color": "black", "capsize": 3, "markersize": 4, "label": label}
    ax.errorbar(x["value"], y["value"], y_error, x_error, **style)


def save_with_caption(path, figure, report, dpi=120):
    """Saves a figure with a caption that names the images, the model and the threshold."""
    model = report["model"] or {}
    model_file = Path(model.get("file") or "unknown model").name
    parts = [part for part in (model_file, model.get("arch"), model.get("date")) if part]
    images = f"{report['split']}: {report['n']} images of {report['patients']} patients"
    threshold = f"threshold {report['threshold']:.3g} ({report['threshold_from']})"
    caption = printable(f"{images}; {', '.join(parts)}\n{threshold}")
    figure.supxlabel(caption, fontsize=7, color="dimgrey", parse_math=False)
    save_figure(path, figure, dpi)


def draw_worst(path, model, views, predictions, report):
    """Draws the most wrongly classified images, each next to its class activation map.

    views: common.Views of the images in `predictions`. Returns, for the page, a list of (number,
    its class and its probability as text, uint8 (SIZE, width, 3): the image and its map).
    """
    from matplotlib.figure import Figure

    probs, labels, _ = as_arrays(predictions)
    threshold = report["threshold"]
    wrong = np.flatnonzero((probs > threshold) != labels)
    if len(wrong) > 0:
        order = np.argsort(-np.abs(probs[wrong] - labels[wrong]), kind="stable")
        rows = wrong[order[:N_WORST]].tolist()
        heading = f"The {len(rows)} worst of {len(wrong)} misclassified images"
    else:
        order = np.argsort(np.abs(probs - threshold), kind="stable")
        rows = order[:N_WORST].tolist()
        heading = "No image is misclassified. The images nearest to the threshold"
    overlays = list(read_overlays(model, views, rows))
    explanation = legend(report["classes"])
    if overlays[0][1] is None:
        explanation = "no class activation maps: the network does not end in pooling and one Linear"
    n_lines = math.ceil(len(rows) / 2)
    figure = Figure((9.6, 0.6 + 2.8 * n_lines), layout="constrained")
    figure.suptitle(f"{heading}\n{explanation}", fontsize=10, parse_math=False)
    # Without ticks, which Matplotlib would measure although nobody sees them.
    empty = {"xticks": (), "yticks": (), "frame_on": False}
    axes = figure.subplots(n_lines, 4, squeeze=False, subplot_kw=empty)
    # The last pair of axes may stay empty.
    pairs = axes.reshape(-1, 2)
    classes, worst = report["classes"], []
    for (left, right), row, (view, picture) in zip(pairs, rows, overlays, strict=False):
        left.imshow(view, cmap="gray", vmin=0, vmax=255)
        if picture is not None:
            right.imshow(picture)
        text = f"{classes[labels[row]]}, P({classes[1]}) {format_probability(probs[row])}"
        number = int(predictions["number"][row])
        left.set_title(f"no. {number}\n{text}", fontsize=7, loc="left", parse_math=False)
        grey = np.repeat(view[:, :, None], 3, axis=2)
        worst.append((number, text, grey if picture is None else np.hstack([grey, picture])))
    save_with_caption(path, figure, report, dpi=90)
    return worst
