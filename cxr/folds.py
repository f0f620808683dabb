"""Cross-validation: folds, spread, doubtful labels."""

import contextlib
import csv
import statistics
import warnings

import torch
from torch import nn

from cxr.errors import Failure
from cxr.files import atomic_write, save_figure
from cxr.folders import CLASSES


def spread(values):
    """mean, deviation, min and max of numbers, as a dict."""
    values = [value for value in values if value is not None]
    if not values:
        return dict.fromkeys(("mean", "deviation", "min", "max"))
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    spread = {"deviation": deviation, "min": min(values), "max": max(values)}
    return {"mean": statistics.fmean(values)} | spread


def patient_folds(images, labels, n_folds, seed):
    """[rows of a fold], whole patients, the classes evenly spread, drawn from the seed."""
    from sklearn.model_selection import StratifiedGroupKFold

    patients = [image.group for image in images]
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    # a class with fewer images than folds is warned of, or refused
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folds = [torch.from_numpy(rows) for _, rows in splitter.split(labels, labels, patients)]
        if all(0 < labels[rows].sum() < len(rows) for rows in folds):
            return folds
    raise Failure(f"--folds {n_folds}: a fold has no patient of a class; use fewer, or --seed")


def write_doubtful(table, probs, labels, images, args):
    """The images by how badly the heads that had not seen them fit their labels, the worst first.

    probs: float32 (n_repeats, N), held out. A doubtful label is a reason to look, not an error.
    Returns the worst 12 as (image, mean probability).
    """
    losses = nn.functional.binary_cross_entropy(probs, labels.expand_as(probs), reduction="none")
    mean, loss = probs.mean(0), losses.mean(0)
    missed = ((probs > args.threshold) != (labels > 0.5)).sum(0)
    order = loss.argsort(descending=True, stable=True).tolist()
    files = [image.path.relative_to(args.data_dir).as_posix() for image in images]
    with atomic_write(table, "w") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "mean_probability", "mean_loss", "missed", "repeats"))
        for row in order:
            told = files[row], CLASSES[images[row].label], f"{mean[row]:.4f}", f"{loss[row]:.4f}"
            writer.writerow((*told, missed[row].item(), len(probs)))
    return [(images[row], mean[row].item()) for row in order[:12]]


def draw_doubtful(path, worst, pictures):
    """The images that write_doubtful returned; pictures: of them, PIL, mode L."""
    from matplotlib.figure import Figure

    figure = Figure((10, 8.4), layout="constrained")
    figure.suptitle("The most doubtful labels: a reason to look, not an error (P: of PNEUMONIA)")
    for ax in figure.subplots(3, 4).flat:
        ax.axis("off")
    for ax, (image, mean), picture in zip(figure.axes, worst, pictures, strict=False):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        told = f"label {CLASSES[image.label]}, held out P {mean:.2f}"
        ax.set_title(f"{image.path.name:.34}\n{told}", fontsize=7, parse_math=False)
    save_figure(path, figure, 110)


def print_cross_validation(metrics, epochs, n, args):
    draws = f"{args.folds} folds x {args.repeats} repeats"
    print(f"Cross-validation: {draws}, {n} images, whole patients")
    print("A fold is held out, the next one stops the training early, the others train")
    line = "{:18}{:>8}  {:15} {:>8}{:>8}{:>8}{:>15}"
    print(line.format("", "", "", "spread", "of the", "folds", "single split"))
    print(line.format("held out", "value", "95 % interval", "dev", "min", "max", "(val)"))
    for name, row in metrics.items():
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        cells = (row[key] for key in ("deviation", "min", "max", "single_split"))
        value, *cells = ("-" if x is None else f"{x:.3f}" for x in (row["value"], *cells))
        print(line.format(name, value, interval, *cells))
    cells = (epochs[key] for key in ("mean", "deviation", "min", "max", "single_split"))
    mean, *cells = ("-" if x is None else f"{x:.1f}" for x in cells)
    print(line.format("best epoch", mean, "", *cells))
