"""Cross-validation: the folds, the spread of the scores, and doubtful labels."""

import contextlib
import csv
import statistics
import warnings

import torch
from torch import nn

from cxr.errors import Failure
from cxr.files import atomic_write, printable, save_figure

N_DRAWN = 12  # images in doubtful_labels.png


def spread(values):
    """Returns mean, standard deviation, minimum and maximum of numbers; None values are ignored."""
    values = [value for value in values if value is not None]
    if not values:
        return {"mean": None, "deviation": None, "min": None, "max": None}
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean, "deviation": deviation, "min": min(values), "max": max(values)}


def patient_folds(xrays, labels, n_folds, seed):
    """Divides images into folds. A patient is in one fold only, and each fold has both classes.

    Returns one int64 tensor of rows for each fold. Raises Failure if this is not possible.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = [xray.group for xray in xrays]
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    # If a class has fewer images than there are folds, scikit-learn warns or raises ValueError.
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folds = [torch.from_numpy(rows) for _, rows in splitter.split(labels, labels, groups)]
        if all(0 < labels[rows].sum() < len(rows) for rows in folds):
            return folds
    problem = f"--folds {n_folds}: a fold would have no image of a class"
    raise Failure(f"{problem}; use fewer folds, or another --seed N (make: SEED=N)")


def draw_folds(xrays, labels, args):
    """Draws the folds of --folds and --repeats: one is predicted, the previous one stops training.

    Yields (repeat, train, val, held_out) for each fold of each repeat. repeat: int, from 0; the
    others: int64 tensors of rows.
    """
    for repeat in range(args.repeats):
        folds = patient_folds(xrays, labels, args.folds, args.seed + repeat)
        for i, held_out in enumerate(folds):
            val = folds[i - 1]  # before the first fold: the last one
            train = [fold for fold in folds if fold is not val and fold is not held_out]
            yield repeat, torch.cat(train), val, held_out


def rank_doubtful(probs, labels, xrays, threshold, data_dir, classes):
    """Ranks images by how wrong their held-out predictions are, the worst first.

    probs: float32 (n_repeats, N), of heads that were not trained on the image; labels: float32
    (N,). Returns (rows in this order, the lines of doubtful_labels.csv as dicts).
    """
    # Ranks like self-confidence, the probability of the given label (Northcutt et al. 2021).
    losses = nn.functional.binary_cross_entropy(probs, labels.expand_as(probs), reduction="none")
    mean_loss, mean_prob = losses.mean(0), probs.mean(0)
    n_missed = ((probs > threshold) != (labels > 0.5)).sum(0)
    order = mean_loss.argsort(descending=True, stable=True).tolist()
    table = []
    for number, row in enumerate(order, 1):
        file = printable(xrays[row].path.relative_to(data_dir))
        line = {"number": number, "file": file, "label": classes[xrays[row].label]}
        line |= {"mean_probability": mean_prob[row].item(), "mean_loss": mean_loss[row].item()}
        line |= {"missed": n_missed[row].item(), "repeats": len(probs)}
        table.append(line)
    return order, table


def write_doubtful(path, table):
    """Writes doubtful_labels.csv."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        for row in table:
            rounded = {name: f"{row[name]:.4f}" for name in ("mean_probability", "mean_loss")}
            writer.writerow(row | rounded)


def draw_doubtful(path, table, pictures, positive):
    """Draws the images at the top of doubtful_labels.csv.

    pictures: PIL, mode L, at most 12; positive: the name of the positive class.
    """
    from matplotlib.figure import Figure

    figure = Figure((10, 8.4), layout="constrained")
    figure.suptitle(
        f"The labels that the held-out predictions contradict most: check them\n"
        f"(a doubtful label need not be wrong; P is the probability of {positive})",
        parse_math=False,  # a name may contain $, which begins a formula in Matplotlib
    )
    for ax in figure.subplots(3, 4).flat:  # N_DRAWN places
        ax.axis("off")
    for ax, row, picture in zip(figure.axes, table, pictures, strict=False):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        text = f"label {row['label']}, held-out P {row['mean_probability']:.2f}"
        ax.set_title(f"no. {row['number']}\n{text}", fontsize=7, parse_math=False)
    save_figure(path, figure, 110)


def print_cross_validation(metrics, epochs, n, args):
    """Prints the table of a cross-validation.

    metrics: {score: {value, low, high, deviation, min, max, single_split}}; epochs: {mean,
    deviation, min, max, single_split} of the best epoch; n: number of images.
    """
    draws = f"{args.folds} folds x {args.repeats} repeats"
    print(f"Cross-validation: {draws}, {n} images; a patient is in one fold only")
    print("Each fold is predicted once; the previous fold stops the training; the others train.")
    columns = "{:18}{:>8}  {:15} {:>8}{:>8}{:>8}{:>15}"
    print(columns.format("", "", "", "", "lowest", "highest", "trained on"))
    header = ("score", "value", "95 % interval", "SD", "fold", "fold", "train/ only")
    print(columns.format(*header))
    for name, row in metrics.items():
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        cells = [row[key] for key in ("value", "deviation", "min", "max", "single_split")]
        value, *cells = [format_cell(cell, 3) for cell in cells]
        print(columns.format(name, value, interval, *cells))
    cells = [epochs[key] for key in ("mean", "deviation", "min", "max", "single_split")]
    mean, *cells = [format_cell(cell, 1) for cell in cells]
    print(columns.format("best epoch", mean, "", *cells))


def format_cell(value, digits):
    """Formats a number for a table, "-" if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
