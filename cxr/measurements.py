"""Simple measurements of an image, and how well they separate the classes or the splits.

If a number such as the file size separates the classes, the network may have learned no more than
this number (a shortcut). If it separates the test images from the others of their class, they come
from another source (a shift). For split_val.py --check, and for the baselines of cxr/shortcuts.py.
"""

import math
import os
from collections import Counter

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr.decode import apply_window, decode
from cxr.errors import either

ALARM = 0.7  # AUROC from which a number matters: customary for "acceptable" discrimination
MANY = 5000  # images of a data folder above which shortcuts and shift are scored on a subset
SUBSET = 2000  # images of this subset

# The outer 3 of 32 pixels on each side, where there is no lung.
BORDER = np.pad(np.zeros((26, 26), bool), 3, constant_values=True).ravel()


def image_numbers(path, size):
    """Reads what can be known about an image without a network.

    size: see decode. Returns ({name: float}, grey PIL image of mode L, Decoded). Raises the errors
    of decode.
    """
    decoded = decode(path, size)
    window = 0 if decoded.grey.mode == "L" else 2  # 8-bit grey levels are used unchanged
    grey = apply_window(decoded.grey, window)
    pixels = np.asarray(grey, dtype=np.float32)
    sharpness = 0.0
    if len(pixels) > 1:
        # The mean difference of vertical neighbours.
        sharpness = float(np.abs(np.diff(pixels, axis=0)).mean())
    numbers = {
        "file size": float(os.path.getsize(path)),  # in bytes
        "width": float(decoded.size[0]),  # in pixels, as the height
        "height": float(decoded.size[1]),
        "bits a pixel": float(decoded.bits),  # 8 if grey, 24 if RGB
        "JPEG quality": float(decoded.quality),  # 0 for other formats
        "mean": float(pixels.mean()),  # of the grey levels, 0 to 255
        "deviation": float(pixels.std()),
        "sharpness": sharpness,
    }
    return numbers, grey, decoded


def is_alarming(auroc, labels, patients):
    """Returns True if an AUROC is above ALARM and 3 standard deviations above chance."""
    # Patients are counted, not images, because images of one patient are correlated.
    n0 = len(set(patients[labels == 0]))
    n1 = len(set(patients[labels == 1]))
    deviation = ((n0 + n1 + 1) / (12 * n0 * n1)) ** 0.5  # of the Mann-Whitney statistic
    return bool(auroc > max(ALARM, 0.5 + 3 * deviation))


def make_folds(labels, patients):
    """Divides images into at most 5 folds by patient, as (training rows, held-out rows) pairs."""
    n_folds = min(5, *(len(set(patients[labels == label])) for label in (0, 1)))
    if n_folds < 2:
        return []  # a class has too few patients
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    folds = splitter.split(labels, labels, patients)
    # If a patient has images of both labels, the training rows may have only one label.
    return [(train, held_out) for train, held_out in folds if len(set(labels[train])) == 2]


def fit_cut(values, labels):
    """Finds the cut-off with the highest accuracy.

    Returns (sign, cut): label 1 is predicted if sign * value > sign * cut.
    """
    candidates = []
    for sign in (1, -1):
        fpr, tpr, cuts = roc_curve(labels, sign * values, drop_intermediate=False)
        n_correct = tpr * labels.sum() + (1 - fpr) * (1 - labels).sum()
        best = 1 + np.argmax(n_correct[1:-1])  # the ends would predict one class for all images
        cut = sign * (cuts[best] + cuts[best + 1]) / 2
        candidates.append((n_correct[best], sign, cut))
    _, sign, cut = max(candidates)
    return sign, cut


def score_number(values, labels, folds):
    """Returns float (N,): above 0 if the cut-off predicts label 1. Fitted on the training rows."""
    scores = np.zeros(len(values))
    for train, held_out in folds:
        sign, cut = fit_cut(values[train], labels[train])
        scores[held_out] = sign * (values[held_out] - cut)
    return scores


def score_pixels(pixels, labels, folds):
    """Returns float (N,): logits of a logistic regression. Fitted on the training rows."""
    # On the reference data, C from 0.001 to 0.1 changes no AUROC by more than 0.05.
    regression = LogisticRegression(C=0.01, class_weight="balanced", solver="liblinear")
    model = make_pipeline(StandardScaler(), regression)
    scores = np.zeros(len(pixels))
    for train, held_out in folds:
        model.fit(pixels[train], labels[train])
        scores[held_out] = model.decision_function(pixels[held_out])
    return scores


def score_shortcuts(numbers, pixels, labels, patients, is_scored):
    """Scores how well each number separates the classes of the images in `is_scored`.

    numbers: {name: float (N,)}; pixels: float (N, 1024); labels: int (N,); patients: str (N,);
    is_scored: bool (N,). Returns one dict for each number, the highest AUROC first.
    """
    # The cut-off is fitted on the other images; if there are none, by cross-validation.
    if is_scored.all():
        fitted_on = is_scored  # for the printed cut-off; the scores come from the folds
        folds = make_folds(labels, patients)
    else:
        fitted_on = ~is_scored
        folds = [(~is_scored, is_scored)]
    scored = []
    for name, values in numbers.items():
        is_constant = [np.ptp(values[train]) == 0 for train, _ in folds]
        if folds and not any(is_constant):
            sign, cut = fit_cut(values[fitted_on], labels[fitted_on])
            rule = f"{'>' if sign > 0 else '<'} {cut:.4g}"
            scored.append((name, rule, score_number(values, labels, folds)))
    border_scores = score_pixels(pixels[:, BORDER], labels, folds)
    scored.append(("3-pixel border", "linear fit", border_scores))

    rows = []
    truth = labels[is_scored]
    for name, rule, scores in scored:
        scores = scores[is_scored]
        accuracy = float(((scores > 0) == (truth == 1)).mean())
        auroc = float(roc_auc_score(truth, scores))
        row = {"number": name, "rule": rule, "n": len(truth), "accuracy": accuracy, "auroc": auroc}
        row["alarm"] = is_alarming(auroc, truth, patients[is_scored])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["auroc"])


def score_shift(numbers, pixels, is_scored, patients):
    """Scores how well each number separates the scored images from the others, {name: AUROC}."""
    in_split = is_scored.astype(int)
    result = {}
    for name, values in numbers.items():
        auroc = float(roc_auc_score(in_split, values))
        result[name] = max(auroc, 1 - auroc)
    folds = make_folds(in_split, patients)
    for name, columns in (("3-pixel border", BORDER), ("32x32 pixels", slice(None))):
        scores = score_pixels(pixels[:, columns], in_split, folds)
        result[name] = float(roc_auc_score(in_split, scores))
    return result


def find_properties(examined):
    """Counts sizes, modes and file formats. Warns of a mode or format of one class only.

    Returns (entries of the check's report, errors, warnings). An entry is {property: {folder:
    number of images}}, the most frequent property first.
    """
    entries, warnings = {}, []
    for i, key in enumerate(("sizes", "modes", "formats")):
        counts = {}
        for x in examined:
            counts.setdefault(x.properties[i], Counter())[x.folder] += 1
        entries[key] = dict(sorted(counts.items(), key=lambda item: -item[1].total()))
    for name, folders in [*entries["modes"].items(), *entries["formats"].items()]:
        classes = {folder.split("/")[1] for folder in folders}
        # By chance, 8 images of a balanced data set have one class once in 128 times.
        if len(classes) == 1 and folders.total() >= 8:
            images = f"all {folders.total()} {name} images are in {' and '.join(folders)}"
            advice = "The network could learn how files were made. Convert all to one kind"
            warnings.append(f"shortcut: {images}. {advice}")
    return entries, [], warnings


def thin_out(items):
    """Returns every n-th item of a list: as many as possible, but at most SUBSET."""
    return items[:: max(1, math.ceil(len(items) / SUBSET))]


def choose_subset(examined, scored_on):
    """Chooses whole patients at random, with about SUBSET images. Returns their images, in order.

    The scored split and the other splits get the same share of the images, and so do the classes of
    each: shortcuts are fitted on the others, and a shift is scored for each class. What a group
    cannot fill is left to the larger ones.
    """
    patients = np.array([x.patient for x in examined])
    groups = np.array([2 * (x.xray.split == scored_on) + x.xray.label for x in examined])
    names, sizes = np.unique(groups, return_counts=True)
    rng, chosen, n_left = np.random.default_rng(0), [], SUBSET
    for i, k in enumerate(np.argsort(sizes)):
        of_group, counts = np.unique(patients[groups == names[k]], return_counts=True)
        order = rng.permutation(len(of_group))
        n_images = np.cumsum(counts[order])
        n_patients = np.searchsorted(n_images, n_left // (len(names) - i)) + 1
        chosen.append(of_group[order[:n_patients]])
        n_left -= n_images[:n_patients][-1]
    is_chosen = np.isin(patients, np.concatenate(chosen))
    return [examined[row] for row in np.flatnonzero(is_chosen)]


def find_shortcuts(examined, scored_on, classes):
    """Scores how well the numbers predict the class, and which split an image is in.

    examined: list of cxr.check.ExaminedXray; scored_on: the split that is scored. Of more than MANY
    images, only a subset is used. Returns (entries of the check's report, errors, warnings).
    """
    if len(examined) > MANY:
        examined = choose_subset(examined, scored_on)
    # Thumbnails have 96 x 96 pixels. The means of 3 x 3 give 32 x 32.
    blocks = np.stack([x.thumbnail for x in examined]).reshape(-1, 32, 3, 32, 3)
    pixels = blocks.mean((2, 4), dtype=np.float32).reshape(-1, 1024)
    numbers = {}
    for name in examined[0].numbers:
        numbers[name] = np.array([x.numbers[name] for x in examined])
    labels = np.array([x.xray.label for x in examined])
    patients = np.array([x.patient for x in examined])
    is_scored = np.array([x.xray.split == scored_on for x in examined])

    warnings, shift = [], []
    shortcuts = score_shortcuts(numbers, pixels, labels, patients, is_scored)
    alarms = [row["number"] for row in shortcuts if row["alarm"]]
    if alarms:
        warnings.append(
            f"shortcut: {describe_alarms(alarms)} the classes of {scored_on}/. A network can reach "
            "a high score in the same way, without seeing the disease. Make the images of both "
            "classes in the same way, or report these AUROCs beside the network's"
        )
    if not is_scored.all():
        shift = find_shift(numbers, pixels, labels, patients, is_scored, classes)
    for name in classes:
        alarms = [row["number"] for row in shift if row[name]["alarm"]]
        if alarms:
            warnings.append(
                f"shift: {scored_on}/{name} differs from the other {name} images: "
                f"{describe_alarms(alarms)} them. Report the cross-validated result as well "
                "(train.py --folds 5, make cv)"
            )
    entries = {"shortcuts": shortcuts, "shift": shift, "shortcut_images": len(examined)}
    return entries, [], warnings


def describe_alarms(numbers):
    """Returns a part of a sentence: "the border or the sharpness alone separates"."""
    return either([f"the {name}" for name in numbers]) + " alone separates"


def find_shift(numbers, pixels, labels, patients, is_scored, classes):
    """Scores how well each number separates the scored images from the others of their class.

    Returns [{number, name of a class: {auroc, alarm}, ...}], the highest AUROC first.
    """
    rows = {}
    for label, name in enumerate(classes):
        of_class = labels == label
        varying = {key: v[of_class] for key, v in numbers.items() if np.ptp(v) > 0}
        in_split, patients_of_class = is_scored[of_class], patients[of_class]
        scored = score_shift(varying, pixels[of_class], in_split, patients_of_class)
        for number, auroc in scored.items():
            row = rows.setdefault(number, {"number": number})
            row[name] = {"auroc": auroc, "alarm": is_alarming(auroc, in_split, patients_of_class)}
    return sorted(rows.values(), key=lambda row: -max(row[name]["auroc"] for name in classes))
