"""The six pictures of a report."""

import math
from pathlib import Path

import numpy as np
import torch
import torchmetrics.functional.classification as tm

from cxr.files import save_figure
from cxr.folders import CLASSES, COLOURS
from cxr.maps import read_overlays
from cxr.proportions import complement, format_interval, wilson_interval

STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}
N_WORST = 8  # images in worst.png


def mark(ax, x, y, label=None):
    """A point of two metrics, {value, low, high} each, with both intervals."""
    if None not in (x["value"], y["value"]):
        errors = ([[m["value"] - m["low"]], [m["high"] - m["value"]]] for m in (y, x))
        style = {"fmt": "o", "color": "black", "capsize": 3, "markersize": 4, "label": label}
        ax.errorbar(x["value"], y["value"], *errors, **style)


def draw_pictures(folder, table, report):
    """roc.png, precision_recall.png, confusion.png, reliability.png and scores.png."""
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    labels, probs, threshold = table.labels, table.probs, report["threshold"]
    patients = np.array(table.clusters())
    metrics, calibration = report["metrics"], report["calibration"]
    at, network = f"threshold {threshold:.3g}", {"color": COLOURS[1], "label": "network"}
    scored = torch.from_numpy(probs), torch.from_numpy(labels)
    chance = {"color": "grey", "ls": ":"}

    def draw_roc(ax):
        fpr, tpr, _ = tm.binary_roc(*scored)
        ax.plot(fpr, tpr, **network)
        ax.plot((0, 1), (0, 1), label="chance", **chance)
        specificity = metrics["specificity"]
        mark(ax, complement(specificity), metrics["sensitivity"], f"{at}, 95 % intervals")
        ax.set(xlabel="1 - specificity", ylabel="sensitivity")
        ax.set_title(f"ROC: AUROC {format_interval(metrics['auroc'])}")
        ax.legend(loc="lower right")

    def draw_precision_recall(ax):
        precision, recall, _ = tm.binary_precision_recall_curve(*scored)
        ax.plot(recall, precision, drawstyle="steps-post", **network)
        ax.axhline(labels.mean(), label="chance", **chance)
        mark(ax, metrics["sensitivity"], metrics["ppv"], f"{at}, 95 % intervals")
        ax.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.05))
        ax.set_title(f"Average precision {format_interval(metrics['average_precision'])}")
        ax.legend(loc="lower left")

    def draw_confusion(ax):
        found = {"display_labels": CLASSES, "cmap": "Blues", "colorbar": False}
        ConfusionMatrixDisplay.from_predictions(labels, probs > threshold, ax=ax, **found)
        ax.grid(False)
        ax.set_title(f"Accuracy {format_interval(metrics['accuracy'])} at {at}")

    def draw_reliability(ax):
        bins = np.minimum((probs * 10).astype(int), 9)
        ax.plot((0, 1), (0, 1), **chance)
        for inside in (bins == each for each in np.unique(bins)):
            mean, share = probs[inside].mean(), wilson_interval(labels[inside], patients[inside])
            mark(ax, {"value": mean, "low": mean, "high": mean}, share)
            ax.annotate(inside.sum(), (mean, share["value"]), (4, 3), textcoords="offset points")
        ax.set(xlabel="mean P(PNEUMONIA) in the bin", ylabel="share of PNEUMONIA, 95 % interval, n")
        slope, intercept = (
            format_interval(calibration["slope"]),
            format_interval(calibration["intercept"]),
        )
        ax.set_title(f"Calibration: intercept {intercept}\nslope {slope}")

    def draw_scores(ax):
        found = {"color": COLOURS, "label": CLASSES, "bins": 25, "range": (0, 1)}
        ax.hist([probs[labels == 0], probs[labels == 1]], **found)
        ax.axvline(threshold, color="black", ls="--", label=at)
        ax.set(xlabel="P(PNEUMONIA)", ylabel="images", title="Scores by class")
        ax.legend()

    draws = draw_roc, draw_precision_recall, draw_confusion, draw_reliability, draw_scores
    with matplotlib.rc_context(STYLE):
        for draw in draws:
            figure = Figure((5, 4.6), layout="constrained")
            draw(figure.add_subplot())
            save_with_caption(folder / f"{draw.__name__.removeprefix('draw_')}.png", figure, report)


def save_with_caption(path, figure, report, dpi=120):
    """With a caption: whose images and which network."""
    about = report["model"] or {}
    parts = (Path(about.get("file") or "unknown model").name, about.get("arch"), about.get("date"))
    images = f"{report['split']}: {report['n']} images of {report['patients']} patients"
    caption = f"{images}; {', '.join(part for part in parts if part)}\n"
    caption += f"threshold {report['threshold']:.3g} ({report['threshold_from']})"
    figure.supxlabel(caption, fontsize=7, color="dimgrey", parse_math=False)
    save_figure(path, figure, dpi)


def draw_worst(path, model, views, table, report):
    """The most wrong images, each beside its map; the least sure ones where nothing is wrong."""
    from matplotlib.figure import Figure

    probs, threshold, images = table.probs, report["threshold"], views.images
    wrong = [i for i, image in enumerate(images) if (probs[i] > threshold) != image.label]
    rows = sorted(wrong, key=lambda i: -abs(probs[i] - images[i].label))[:N_WORST]
    heading = f"The {len(rows)} most wrong of {len(wrong)} wrong images"
    if not wrong:
        rows = sorted(range(len(images)), key=lambda i: abs(probs[i] - threshold))[:N_WORST]
        heading = f"No image is wrong: the {len(rows)} least sure"
    shown = list(read_overlays(model, views, rows))
    without = "without maps: the network does not end in pooling and one Linear"
    beside = "beside each its class activation map: orange for PNEUMONIA, blue for NORMAL"
    figure = Figure((9.6, 0.6 + 2.8 * math.ceil(len(rows) / 2)), layout="constrained")
    figure.suptitle(f"{heading}\n{without if shown[0][1] is None else beside}", fontsize=10)
    axes = figure.subplots(math.ceil(len(rows) / 2), 4, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for (left, right), i, (view, picture) in zip(axes.reshape(-1, 2), rows, shown, strict=False):
        left.imshow(view, cmap="gray", vmin=0, vmax=255)
        if picture is not None:
            right.imshow(picture)
        about = (
            f"{images[i].path.name:.34}\n{CLASSES[images[i].label]}, P(PNEUMONIA) {probs[i]:.3f}"
        )
        left.set_title(about, fontsize=7, loc="left", parse_math=False)
    save_with_caption(path, figure, report, dpi=90)  # the page holds it
