"""The learning curve of --sizes: how the scores change with the number of training images.

In each fold of a cross-validation, a head is trained on a part of the training side, for each size.
All sizes are scored on the same held-out images, so their scores are compared by patient.
"""

import random
from typing import NamedTuple

import numpy as np
import torch

from cxr.bootstrap import draw_scores, logit_t_intervals, t_intervals
from cxr.errors import Failure
from cxr.files import save_figure
from cxr.folders import COLOURS
from cxr.folds import draw_folds, spread
from cxr.proportions import format_number
from cxr.weighted import weighted_auroc

NAMES = {"auroc": "AUROC", "log_loss": "log loss"}

# ---------------------------------------------------------------- which images train


class Step(NamedTuple):
    """One fold of one repeat. Rows are int64 tensors."""

    repeat: int  # from 0
    subsets: list  # rows that train, for each size
    val: torch.Tensor  # rows that stop the training and calibrate
    held_out: torch.Tensor  # rows that are predicted


def plan_steps(xrays, labels, args):
    """Draws the folds of --folds and --repeats, and from each the training images of all --sizes.

    Returns (the sizes that are not left out, a list of Steps). Prints the sizes that are left out.
    Raises Failure if fewer than two sizes are left, or if one is too small for both classes.
    """
    folds = list(draw_folds(xrays, labels, args))
    available = min(len(train) for _, train, _, _ in folds)
    sizes = [size for size in args.sizes if size <= available]
    too_large = ", ".join(str(size) for size in args.sizes if size > available)
    reason = f"--folds {args.folds} leaves {available} images to train"
    if len(sizes) < 2:
        given = ",".join(map(str, args.sizes))
        example = f'make curve ARGS="--sizes {max(available // 2, 1)},{available}"'
        advice = f"use two or more sizes up to {available} ({example})"
        raise Failure(f"--sizes {given}: {reason}; {advice}")
    if too_large:
        print(f"Left out of --sizes: {too_large}, because {reason}")
    steps = []
    for number, (repeat, train, val, held_out) in enumerate(folds):
        subsets = draw_subsets(train, sizes, xrays, f"{args.seed} {number}")
        steps.append(Step(repeat, subsets, val, held_out))
    return sizes, steps


def draw_subsets(train, sizes, xrays, seed):
    """Draws whole patients from the training side of a fold, in the proportion of its classes.

    The larger subset contains the smaller one. A patient with more images than still fit is left
    out, so a subset has at most `size` images, and exactly `size` if each patient has one image.

    train: int64 (n,), rows; sizes: the smallest first; seed: text. Returns one int64 tensor of rows
    for each size. Raises Failure if a subset has no image of a class.
    """
    rows_of_patient = {}
    for row in train.tolist():
        rows_of_patient.setdefault(xrays[row].group, []).append(row)
    patients = list(rows_of_patient.values())
    random.Random(seed).shuffle(patients)
    share_positive = sum(xrays[row].label for row in train.tolist()) / len(train)

    taken, subsets = [], []
    for size in sizes:
        n_positive = round(size * share_positive)
        patients = take_patients(patients, taken, [size - n_positive, n_positive], xrays)
        if len({xrays[row].label for row in taken}) < 2:
            problem = f"--sizes {size}: too few images to train on whole patients of both classes"
            raise Failure(f"{problem}; use larger sizes")
        subsets.append(torch.tensor(taken))
    return subsets


def take_patients(patients, taken, wanted, xrays):
    """Moves patients to `taken`, in this order, while both classes have room. Returns the others.

    patients: lists of rows; taken: rows; wanted: the number of images of class 0 and of class 1.
    """
    n_positive = sum(xrays[row].label for row in taken)
    room_negative, room_positive = wanted[0] - len(taken) + n_positive, wanted[1] - n_positive
    others = []
    for rows in patients:
        n_positive = sum(xrays[row].label for row in rows)
        n_negative = len(rows) - n_positive
        if n_negative <= room_negative and n_positive <= room_positive:
            taken += rows
            room_negative -= n_negative
            room_positive -= n_positive
        else:
            others.append(rows)
    return others


# ---------------------------------------------------------------- scores


def measure_curve(probs, steps, sizes, xrays, seed):
    """Computes the content of curve.json, except the flags.

    probs: float32 (n_sizes, n_repeats, N), the held-out predictions.
    Returns {points: [{size, images, auroc, log_loss}], last_step: {from, to, auroc, log_loss}}.
    A score of a point is {value, low, high, mean, deviation, min, max}: the mean over the repeats
    with its interval, and the spread over the folds. One of last_step is {value, low, high}: the
    score of the largest size minus that of the second largest.
    """
    labels = np.array([xray.label for xray in xrays])
    patients = np.array([xray.patient or str(xray.path) for xray in xrays])
    probs = probs.double().numpy()
    intervals, differences = score_sizes(probs, labels, patients, seed)

    points = []
    for i, size in enumerate(sizes):
        point = {"size": size, "images": np.mean([len(step.subsets[i]) for step in steps])}
        of_folds = [
            score_fold(probs[i, step.repeat, step.held_out], labels[step.held_out])
            for step in steps
        ]
        for name in NAMES:
            point[name] = intervals[name][i] | spread([scores[name] for scores in of_folds])
        points.append(point)
    return {"points": points, "last_step": {"from": sizes[-2], "to": sizes[-1]} | differences}


def score_fold(probs, labels):
    """Computes {auroc, log_loss} of one fold. probs: float64 (n,); labels: int (n,)."""
    auroc = weighted_auroc(probs, labels, np.ones((1, len(labels))))
    return {"auroc": float(auroc[0]), "log_loss": float(log_losses(probs, labels).mean())}


def log_losses(probs, labels):
    """Computes the log loss of each prediction. probs: float64 (..., N); labels: int (N,)."""
    prob_of_label = np.where(labels == 1, probs, 1 - probs)
    return -np.log(prob_of_label.clip(np.finfo(np.float32).eps))  # as scikit-learn's log_loss


def score_sizes(probs, labels, patients, seed):
    """Computes the intervals of each size, and those of the last size minus the second last.

    The intervals are for the trained heads: they say how much the scores depend on the patients who
    are scored. The difference is paired, because a bootstrap sample has the same patients for both.

    probs: float64 (n_sizes, n_repeats, N); labels: int (N,), 0 or 1; patients: (N,), any names.
    Returns ({name: [{value, low, high}]}, {name: {value, low, high}}); name: auroc or log_loss.
    """
    mean_losses = log_losses(probs, labels).mean(1)

    def statistic(weights):
        """Returns the AUROC of each size, then the log loss of each size: (samples, 2 n_sizes)."""
        aurocs = [[weighted_auroc(p, labels, weights) for p in of_size] for of_size in probs]
        losses = weights @ mean_losses.T / weights.sum(1, keepdims=True)
        return np.hstack([np.mean(aurocs, axis=1).T, losses])

    values = statistic(np.ones((1, len(labels))))
    samples = draw_scores(labels, patients, statistic, seed)
    intervals, differences = {}, {}
    methods = {"auroc": logit_t_intervals, "log_loss": t_intervals}
    for i, (name, method) in enumerate(methods.items()):
        columns = slice(i * len(probs), (i + 1) * len(probs))
        value, sample = values[0, columns], samples[:, columns]
        intervals[name] = method(value, sample, labels, patients)
        last_step = value[-1:] - value[-2:-1], sample[:, -1:] - sample[:, -2:-1]
        differences[name] = t_intervals(*last_step, labels, patients)[0]
    return intervals, differences


# ---------------------------------------------------------------- output


def print_curve(curve, n, args):
    """Prints the table and the sentence about the last step. n: number of images."""
    draws = f"{args.folds} folds x {args.repeats} repeats"
    print(f"Learning curve: {draws}, {n} images; a patient is in one fold only")
    print("In each repeat, each fold is predicted once, and the fold before it stops the training.")
    print("The scores for each number of images that train the head, taken from the other folds:")
    header = "".join(f"{name:>10}  {'95 % interval':14}{'SD fold':>8}" for name in NAMES.values())
    print(f"{'images':>8}{header}")
    for point in curve["points"]:
        cells = f"{point['images']:8.0f}"
        for name in NAMES:
            score = point[name]
            interval = ""
            if score["low"] is not None:
                interval = f"{score['low']:.3f} to {score['high']:.3f}"
            cells += f"{score['value']:10.3f}  {interval:14}{score['deviation']:8.3f}"
        print(cells)
    print(describe_last_step(curve["last_step"]))


def describe_last_step(step):
    """Returns the sentence that says how much the last step to more images improved the scores."""
    clauses = [describe_change(name, step[name]) for name in NAMES]
    return f"From {step['from']} to {step['to']} images: {'; '.join(clauses)}"


def describe_change(name, change):
    """Returns a clause about one score. change: the larger size's score minus the other's."""
    value, low, high = change["value"], change["low"], change["high"]
    if low is None:
        size = format_number(abs(value))
        return f"the {NAMES[name]} changed by {size} (no interval: all bootstrap samples are equal)"
    if name == "log_loss":  # a lower loss is an improvement
        value, low, high = -value, -high, -low
    verdict = "shows no improvement that can be distinguished from chance,"
    if low > 0:
        verdict = "improved by"
    elif high < 0:
        verdict, value, low, high = "became worse, by", -value, -high, -low
    interval = f"95 % interval {format_number(low)} to {format_number(high)}"
    return f"the {NAMES[name]} {verdict} {format_number(value)} ({interval})"


def draw_curve(path, curve):
    """Draws AUROC and log loss against the number of training images, with spread and interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    points = curve["points"]
    images = [point["images"] for point in points]
    figure = Figure((6, 6.6), layout="constrained")
    for ax, name in zip(figure.subplots(2, sharex=True), NAMES, strict=True):
        draw_score(ax, images, [point[name] for point in points], name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(images, [f"{n:.0f}" for n in images])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("images that train the head")
    save_figure(path, figure, 100)


def draw_score(ax, images, scores, name):
    """Draws one score, its 95 % intervals as bars, and the spread of the folds as an area."""
    values = np.array([score["value"] for score in scores])
    deviations = np.array([score["deviation"] for score in scores])
    highest = 1 if name == "auroc" else np.inf
    low, high = (values - deviations).clip(0), (values + deviations).clip(max=highest)
    label = "± 1 standard deviation of the folds"
    ax.fill_between(images, low, high, color=COLOURS[0], alpha=0.15, lw=0, label=label)
    ax.plot(images, values, "o-", color=COLOURS[0], label="mean of the repeats")
    for n, score in zip(images, scores, strict=True):
        if score["low"] is not None:
            ax.plot([n, n], [score["low"], score["high"]], color="black", lw=1)
    ax.plot([], [], color="black", lw=1, label="95 % interval")
    ax.set_ylabel(NAMES[name])
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right" if name == "auroc" else "upper right", frameon=False)
