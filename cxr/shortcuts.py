"""How well one number per image predicts the class."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cxr.bootstrap import paired_differences
from cxr.decode import apply_window, decode
from cxr.folders import CLASSES
from cxr.scores import aurocs


def image_numbers(path, size):
    """({name: float} of what one could go by without a network, grey PIL image mode L, Decoded).

    file size: bytes; width, height: pixels of the file; bits a pixel: 8 if grey, 24 if RGB; JPEG
    quality: 0 for other formats. Of the grey levels, 0 to 255: mean, (standard) deviation, and
    sharpness, the mean absolute difference of vertical neighbours.
    Raises what decode raises.
    """
    scan = decode(path, size)
    grey = apply_window(scan.grey, 0 if scan.grey.mode == "L" else 2)
    pixels = np.asarray(grey, dtype=np.float32)
    numbers = {
        "file size": float(os.path.getsize(path)),
        "width": float(scan.size[0]),
        "height": float(scan.size[1]),
        "bits a pixel": float(scan.bits),
        "JPEG quality": float(scan.quality),
        "mean": float(pixels.mean()),
        "deviation": float(pixels.std()),
        "sharpness": float(np.abs(np.diff(pixels, axis=0)).mean()) if len(pixels) > 1 else 0.0,
    }
    return numbers, grey, scan


N_NUMBERS = 2000  # training images whose numbers are compared, at most: milliseconds each


def single_number_baselines(args, images, table, training, reason, size):
    """What metrics.json says about one number of an image in place of the network, by AUROC.

    By accuracy the comparison would be unfair: a number's cut is chosen for accuracy, the network's
    threshold is not. Which number is best, and in which direction, is decided on train/ and val/;
    `all numbers` is a logistic regression on all of them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, fitted, fit_labels = read_image_numbers(
        training[:: -(-len(training) // N_NUMBERS) or 1], size
    )
    _, tested, test_labels = read_image_numbers(images, size)
    if len(set(fit_labels)) < 2 or len(test_labels) < len(images):
        return {"none": reason or "an image cannot be read any more"}
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit(fitted, fit_labels)
    names = [*names, "all numbers"]
    fitted = np.column_stack([fitted, model.decision_function(fitted)]).T
    tested = np.column_stack([tested, model.decision_function(tested)]).T

    fit_auroc = aurocs(fitted, np.array(fit_labels))
    signs = np.where(fit_auroc >= 0.5, 1, -1)
    scores = np.vstack([table.probs, signs[:, None] * tested])

    def differences(rows):
        network, *others = aurocs(scores[:, rows], table.labels[rows])
        return np.subtract(network, others)

    gains = paired_differences(table, differences, args.seed)
    columns = zip(names, signs, aurocs(scores, table.labels)[1:], gains, strict=True)
    numbers = {
        name: {
            "sign": int(sign),
            "auroc": float(auroc),
            "difference": gain,
            "network_is": compare_in_words(gain),
        }
        for name, sign, auroc, gain in columns
    }
    best = names[int(np.argmax(np.abs(fit_auroc[:-1] - 0.5)))]
    about = {"number": best, "fitted_on": fitted.shape[1], "numbers": numbers}
    return about | numbers[best]


def compare_in_words(gain):
    """Whether the network is better, in words."""
    if gain["value"] <= 0:
        return "NO BETTER"
    known = gain["low"] is not None
    return "better" if known and gain["low"] > 0 else "better, but within chance"


def read_image_numbers(images, size):
    """(names, float (n, k), labels [int]) of the images that can be read."""

    def numbers_or_none(path):
        try:
            return image_numbers(path, size)[0]
        except Exception:  # damaged files make decoders raise nearly anything
            return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(numbers_or_none, (image.path for image in images)))
    rows = [(each, image.label) for each, image in zip(found, images, strict=True) if each]
    names = list(rows[0][0]) if rows else []
    return names, np.array([list(each.values()) for each, _ in rows]), [label for _, label in rows]


ALARM = 0.7  # AUROC from which one number matters: the customary bound of a test that discriminates
BORDER = np.pad(np.zeros((26, 26), bool), 3, constant_values=True).ravel()  # no lung is so far out


def as_pixels(xrays):
    """float32 (N, 1024): the images at 32 x 32."""
    blocks = np.stack([xray.thumbnail for xray in xrays]).reshape(-1, 32, 3, 32, 3)
    return blocks.mean((2, 4), dtype=np.float32).reshape(-1, 1024)


def is_alarming(auroc, labels, patients):
    """Whether an AUROC is both large and no accident of few patients.

    3 standard deviations of the Mann-Whitney statistic, whose n are patients: images of one patient
    are alike and tell little more than one of them.
    """
    n0, n1 = (len(set(patients[labels == label])) for label in (0, 1))
    return bool(auroc > max(ALARM, 0.5 + 3 * ((n0 + n1 + 1) / (12 * n0 * n1)) ** 0.5))


def make_folds(labels, patients):
    """[(training rows, rows held out)], each patient on one side; none where there are too few."""
    from sklearn.model_selection import StratifiedGroupKFold

    k = min(5, *(len(set(patients[labels == label])) for label in (0, 1)))
    if k < 2:
        return []
    folds = StratifiedGroupKFold(k, shuffle=True, random_state=0).split(labels, labels, patients)
    # patients with both labels can leave one of them to no side: nothing is learned there
    return [(train, held) for train, held in folds if len(set(labels[train])) == 2]


def fit_cut(values, labels):
    """(sign, cut) such that sign * values > sign * cut tells the labels best."""
    from sklearn.metrics import roc_curve

    found = []
    for sign in (1, -1):
        false, true, cuts = roc_curve(labels, sign * values, drop_intermediate=False)
        right = true * labels.sum() + (1 - false) * (1 - labels).sum()
        best = 1 + np.argmax(right[1:-1])  # the ends would call every image the same
        found.append((right[best], sign, sign * (cuts[best] + cuts[best + 1]) / 2))
    return max(found)[1:]


def score_number(values, labels, folds):
    """float (N,): above 0 where the cut fitted on the other side of the fold says label 1."""
    scores = np.zeros(len(values))
    for train, held in folds:
        sign, cut = fit_cut(values[train], labels[train])
        scores[held] = sign * (values[held] - cut)
    return scores


def score_pixels(pixels, labels, folds):
    """float (N,): the logit of label 1, by a logistic regression fitted on the other side."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # C from 0.001 to 0.1 changes no AUROC on the reference data by more than 0.05
    regression = LogisticRegression(C=0.01, class_weight="balanced", solver="liblinear")
    model, scores = make_pipeline(StandardScaler(), regression), np.zeros(len(pixels))
    for train, held in folds:
        model.fit(pixels[train], labels[train])
        scores[held] = model.decision_function(pixels[held])
    return scores


def score_shortcuts(numbers, pixels, labels, patients, scored):
    """Rows of the page: how well one number separates the classes of the images `scored`.

    numbers: {name: float (N,)}; pixels: float (N, 1024); labels: int (N,); patients: str (N,);
    scored: bool (N,). Fitted on the other images, or on other patients where there are no others:
    never scored where it was fitted.
    """
    from sklearn.metrics import roc_auc_score

    others = scored if scored.all() else ~scored
    folds = make_folds(labels, patients) if scored.all() else [(others, scored)]
    found, rows = [], []
    for name, values in numbers.items():
        if folds and all(np.ptp(values[train]) > 0 for train, _ in folds):  # else it never splits
            sign, cut = fit_cut(values[others], labels[others])
            rule = f"{'>' if sign > 0 else '<='} {cut:.4g}"
            found.append((name, rule, score_number(values, labels, folds)))
    border = score_pixels(pixels[:, BORDER], labels, folds)
    for name, rule, scores in [*found, ("3-pixel border", "linear fit", border)]:
        right = ((scores > 0) == (labels == 1))[scored]
        auroc = float(roc_auc_score(labels[scored], scores[scored]))
        alarm = is_alarming(auroc, labels[scored], patients[scored])
        row = {"number": name, "rule": rule, "n": len(right), "accuracy": float(right.mean())}
        rows.append(row | {"auroc": auroc, "alarm": alarm})
    return sorted(rows, key=lambda row: -row["auroc"])


def score_shift(numbers, pixels, scored, patients):
    """{number: AUROC} how well one number tells the images `scored` from the others."""
    from sklearn.metrics import roc_auc_score

    split, found = scored.astype(int), {}
    for name, values in numbers.items():
        auroc = float(roc_auc_score(split, values))
        found[name] = max(auroc, 1 - auroc)
    folds = make_folds(split, patients)
    for name, columns in (("3-pixel border", BORDER), ("32x32 pixels", slice(None))):
        found[name] = float(roc_auc_score(split, score_pixels(pixels[:, columns], split, folds)))
    return found


def find_properties(report, xrays):
    """Adds the sizes, modes and formats, {kind: {folder: images}} each; warns of one class's."""
    for i, key in enumerate(("sizes", "modes", "formats")):
        counts = {}
        for xray in xrays:
            counts.setdefault(xray.properties[i], Counter())[xray.folder] += 1
        report[key] = dict(sorted(counts.items(), key=lambda row: -row[1].total()))
    for kind, folders in [*report["modes"].items(), *report["formats"].items()]:
        # that 8 images of a balanced set are all of one class happens by chance once in 128 times
        if len({folder.split("/")[1] for folder in folders}) == 1 and folders.total() >= 8:
            report["warnings"].append(
                f"shortcut: {folders.total()} {kind} images, all in {' and '.join(folders)}"
            )


def find_shortcuts(report, xrays):
    """Adds what a number tells about the classes, and about the split that is scored."""
    split, warnings, table = report["scored_on"], report["warnings"], {}
    names, pixels = xrays[0].numbers, as_pixels(xrays)
    numbers = {name: np.array([xray.numbers[name] for xray in xrays]) for name in names}
    labels = np.array([xray.label for xray in xrays])
    patients = np.array([xray.patient for xray in xrays])
    scored = np.array([xray.split == split for xray in xrays])
    rows = report["shortcuts"] = score_shortcuts(numbers, pixels, labels, patients, scored)
    if found := [row["number"] for row in rows if row["alarm"]]:
        what = "each alone separates the classes of"
        warnings.append(f"shortcut: {', '.join(found)}: {what} {split}/")
    for label, name in enumerate(CLASSES if not scored.all() else ()):
        here = labels == label
        of_class = {key: v[here] for key, v in numbers.items() if np.ptp(v) > 0}
        found = score_shift(of_class, pixels[here], scored[here], patients[here])
        for key, auroc in found.items():
            alarm = is_alarming(auroc, scored[here], patients[here])
            table.setdefault(key, {"number": key})[name] = {"auroc": auroc, "alarm": alarm}
    report["shift"] = sorted(
        table.values(), key=lambda row: -max(row[name]["auroc"] for name in CLASSES)
    )
    for name in CLASSES:
        if found := [row["number"] for row in report["shift"] if row[name]["alarm"]]:
            what = f"each alone tells {split}/{name} from the other {name} images"
            warnings.append(f"shift: {', '.join(found)}: {what}")
