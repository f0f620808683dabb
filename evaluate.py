"""Scores the saved network on DIR/test, or classifies any images.

Reads model.pth and model.json. Writes predictions.csv, metrics.json and six pictures into results/; every number has
its 95 % interval. With --from it needs neither images nor network, only an earlier predictions.csv.

    python evaluate.py
    python evaluate.py scan.png folder/ --cam maps/
    python evaluate.py --from results/predictions.csv --threshold 0.7 --compare other/predictions.csv
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import common
from common import CLASSES, Failure, Image, replacing

PROPORTIONS = ("accuracy", "sensitivity", "specificity", "ppv", "npv")  # Wilson's interval; the others': bootstrap
COMPARED = ("accuracy", "f1", "auroc")
Z = 1.959963984540054  # of the normal distribution, 95 % lie between -Z and Z
DRAWS = 2000  # of the bootstrap
BINS = 15  # of the calibration error, as in common.score
INTERVALS = (
    "95 %. Of {proportions}: Wilson's, which takes every image for a patient of its own. Of the others: BCa "
    "percentiles of {draws} bootstrap samples of patients within each class, seed {seed}. Of ece: rather too wide."
)
N_WORST = 8  # images in worst.png
N_RULE = 2000  # training images that the one-number rules are fitted on, at most: decoding takes milliseconds each
SUBGROUPS = {"_bacteria": 1, "_virus": 1, "IM-": 0, "NORMAL2-IM-": 0}  # how a patient's name starts or ends: class
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "pillow", "matplotlib")
COLOURS = ("#0072B2", "#D55E00")  # of NORMAL and PNEUMONIA; Okabe & Ito's palette, told apart by the colour-blind
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}


class Model(NamedTuple):
    network: object  # images to features, frozen
    weight: object  # float32 (width,), of the one output neuron
    bias: object  # float32 ()
    info: dict  # what model.json says, as far as it can be trusted
    about: dict  # what metrics.json says about the model
    warnings: list
    device: object  # that the network runs on


class Table(NamedTuple):
    """Predictions, in the columns of predictions.csv."""

    files: list  # names, unique in a split
    labels: list  # index into CLASSES, None for a new image
    probs: object  # float32 (N,), P(PNEUMONIA), nan where the image could not be read
    errors: list  # why it could not be read, "" where it could

    def readable(self):
        """(files, labels int64 (n,), probs float32 (n,)) of the images that could be read."""
        import numpy as np

        rows = [row for row, error in enumerate(self.errors) if not error]
        return [self.files[row] for row in rows], np.array([self.labels[row] for row in rows]), self.probs[rows]

    def predictions(self, threshold):
        """Yields (file, label, probability, error, predicted class) of each image."""
        return zip(*self, (CLASSES[int(above)] for above in self.probs > threshold), strict=True)


# ---------------------------------------------------------------- the network and its predictions


def load_model(path, device):
    """The Model in a checkpoint: one of train.py, or any state dict of a torchvision network with one output."""
    state, digest, about_path = common.read_state(path), common.hash_file(path), path.with_suffix(".json")
    others = {"date": str, "temperature": float, "threshold_rule": str, "images": {str: {str: str}}}
    info = common.read_json(about_path, {"arch": str, "sha256": str, "threshold": float}, others)
    warnings = []
    if info is None:
        info = {"arch": "resnet50"}
        warnings.append(f"no {about_path} beside {path.name}: taken for a resnet50 with the threshold 0.5")
    elif info["sha256"] != digest:
        info, differs = {"arch": info["arch"]}, "(its SHA-256 differs): only its arch is used"
        warnings.append(f"{about_path} DOES NOT BELONG to this {path.name} {differs}")
    if info.get("classes", list(CLASSES)) != list(CLASSES):
        raise Failure(f"{about_path}: expected the classes {', '.join(CLASSES)}, found {info['classes']}")
    network, head, width, tensors = common.build_network(info["arch"], state, path)
    weight, bias = (tensors.get(f"{head}.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or weight.shape != (1, width) or bias.shape != (1,):
        found = "none" if weight is None else f"{len(weight)} of {tuple(weight.shape[1:])}"
        raise Failure(f"{path}: expected one output neuron of {width} inputs in {head}, found {found}")
    keys = ("weights", "date", "epoch", "seed", "val_loss", "val_accuracy", "temperature", "threshold_rule")
    about = {"file": str(path), "sha256": digest, "arch": info["arch"]} | {key: info.get(key) for key in keys}
    return Model(network, weight[0].float(), bias[0].float(), info, about, warnings, device)


def choose_threshold(args, stored, source):
    """The report's threshold and where it comes from: --threshold, or the one stored in `source`, or 0.5."""
    if args.threshold is not None:
        stored, source = args.threshold, "--threshold"
    elif stored is None:
        stored, source = 0.5, "the default"
    elif not 0 <= stored <= 1:
        raise Failure(f"{source}: expected a threshold from 0 to 1, found {stored}")
    return {"threshold": stored, "threshold_from": source}


def named_images(paths):
    """[Image] of the files, and of the image files directly inside the folders."""
    found = []
    for path in paths:
        inside = common.list_images(path) if path.is_dir() else [path]
        if not path.is_dir() and not path.is_file():
            raise Failure(f"{path}: expected an image or a folder, found no such file")
        if not inside:
            raise Failure(f"{path}: expected images ({' '.join(sorted(common.SUFFIXES))}) directly inside, found none")
        found += inside
    return [Image(path, None, common.hash_file(path)) for path in found]


def predict(model, images, args, dtype):
    """The Table of the images."""
    network, width, views = model.network, len(model.weight), [1] * len(images)
    features, bad = common.extract_features(network, width, images, views, args, model.device, dtype)
    # not a matrix product: its rounding may depend on how many images there are
    probs = ((features[:, 0] * model.weight).sum(1) + model.bias).sigmoid()
    probs[list(bad)] = math.nan
    if probs.isfinite().sum() != len(images) - len(bad):
        raise Failure(f"{args.checkpoint}: gives scores that are not finite; train again, or restore the file", 3)
    if not args.images:
        common.without_bad(images, bad, args.skip_bad)
    files = [image.path if args.images else image.path.relative_to(args.data_dir) for image in images]
    files = [file.as_posix().encode(errors="backslashreplace").decode() for file in files]
    errors = [bad.get(row, "") for row in range(len(images))]
    return Table(files, [image.label for image in images], probs.numpy(), errors)


def write_predictions(path, table, threshold):
    with replacing(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "probability", "prediction", "error"))
        for name, label, prob, error, prediction in table.predictions(threshold):
            found = ("", "") if error else (f"{prob:.9g}", prediction)
            writer.writerow((name, "" if label is None else CLASSES[label], *found, error))


def read_predictions(path):
    """The Table in a predictions.csv with labels; anything malformed is a Failure that names row and column."""
    import numpy as np

    def wrong(row, column, expected, found):
        return Failure(f"{path}, row {row}, column {column}: expected {expected}, found {found!r:.60}")

    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise Failure(f"{path}: not a CSV file ({error})") from None
    for column in ("file", "label", "probability"):
        if column not in (reader.fieldnames or ()):
            raise wrong(1, column, "its name", ",".join(reader.fieldnames or ()))
    found = {}
    for number, row in rows:
        name, label, text, error = (row.get(key) or "" for key in ("file", "label", "probability", "error"))
        if not name or name in found:
            raise wrong(number, "file", "a name that no other row has", name)
        if label not in CLASSES:
            tables = ", ".join(str(table) for table in path.parent.glob("predictions-*.csv")) or "a table of a split"
            raise wrong(number, "label", f"{' or '.join(CLASSES)} ({tables} has them)", label)
        try:
            found[name] = CLASSES.index(label), math.nan if error else probability(text), error
        except (ValueError, argparse.ArgumentTypeError):
            raise wrong(number, "probability", "a number from 0 to 1", text) from None
    if not found:
        raise wrong(2, "file", "a row for each image", "")
    labels, probs, errors = zip(*found.values(), strict=True)
    return Table(list(found), labels, np.array(probs, np.float32), errors)


def report_beside(path):
    """The metrics.json beside a predictions.csv, {} where there is none. Where it describes another one: a Failure."""
    beside = path.with_name("metrics.json")
    kinds = {"split": str, "model": dict | None, "shortcut": dict | None, "warnings": [str], "threshold_from": str}
    report = common.read_json(beside, {"threshold": float}, kinds) or {}
    if report.get("predictions_sha256", common.hash_file(path)) != common.hash_file(path):
        raise Failure(f"{path}: not what {beside} describes; restore it, or move it elsewhere to score it all the same")
    return report


# ---------------------------------------------------------------- statistics


def patients_of(files):
    """[patient, None where the name tells none] of the files."""
    return [common.patient_of(Path(file).name) for file in files]


def wilson(count, n):
    """{value, low, high} of a proportion: Wilson's score interval, 95 %. None for each where n is 0."""
    if n == 0:
        return {"value": None, "low": None, "high": None}
    p, stretch = count / n, 1 + Z * Z / n
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = (middle - half) / stretch, (middle + half) / stretch
    return {"value": p, "low": low if count else 0.0, "high": high if count < n else 1.0}


def bootstrapped(name, value, draws):
    """{value, low, high}, 95 %, of a score or a difference of scores. draws: what bootstrap returned.

    Efron's BCa percentiles (1987): plain ones hold a high AUROC or average precision of 100 images too rarely.
    The calibration error, a sum of absolute values, is too large in every sample, and again in every bootstrap of it:
    its percentiles may all lie above the truth. So its upper end is reflected at the value, and its lower end allows
    for all the bins' errors at once: too wide rather than too narrow.
    """
    import numpy as np

    sample, left_out = draws[name][:DRAWS], draws[name][DRAWS:]
    if name == "ece":
        low = max(value - np.percentile(draws["ece_error"][:DRAWS], 97.5), 0)
        return {"value": value, "low": float(low), "high": float(2 * value - np.percentile(sample, 2.5))}
    normal, below = NormalDist(), ((sample < value).mean() + (sample <= value).mean()) / 2
    bias, skew = normal.inv_cdf(min(max(below, 0.1), 0.9)), left_out.mean() - left_out
    skew = (skew**3).sum() / max(6 * (skew**2).sum() ** 1.5, 1e-12)
    shares = [normal.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-Z, Z)]
    low, high = np.percentile(sample, [100 * share for share in shares])
    return {"value": value, "low": float(low), "high": float(high)}


def counts_above(probs, labels, weights):
    """(true positives, false positives), each (draws, scores), at every distinct score, from the highest down.

    weights: (draws, N), how often each image counts.
    """
    import numpy as np

    order = np.argsort(-probs, kind="stable")
    last = np.append(np.flatnonzero(np.diff(probs[order])), len(probs) - 1)  # equal scores are crossed together
    weights, labels = weights[:, order], labels[order]
    return np.cumsum(weights * labels, axis=1)[:, last], np.cumsum(weights * (1 - labels), axis=1)[:, last]


def bin_of(probs):
    """The bin of the calibration error of each probability; 1.0 has one of its own, as in torchmetrics."""
    import torch

    return torch.linspace(0, 1, BINS + 1).numpy().searchsorted(probs, side="right") - 1


def weighted_scores(probs, labels, weights, threshold):
    """{name: (draws,)} as common.score's, of images that count weights (draws, N) times.

    ece_error: the bins' gaps against those of all images, how far a sample's calibration error can be off.
    """
    import numpy as np

    tp, fp = counts_above(probs, labels, weights)
    new_tp, new_fp = np.diff(tp, axis=1, prepend=0), np.diff(fp, axis=1, prepend=0)
    positives, negatives = tp[:, -1], fp[:, -1]
    precision, total = tp / np.maximum(tp + fp, 1), positives + negatives
    above, gap = probs > threshold, probs.astype(float) - labels
    gap_in_bin = gap[:, None] * (bin_of(probs)[:, None] == np.arange(BINS + 1))
    gaps = weights @ gap_in_bin / total[:, None]
    return {
        "accuracy": weights @ (above == labels) / total,
        "f1": 2 * (weights @ (above & (labels == 1))) / (weights @ above + positives),
        "auroc": (new_fp * (tp - new_tp / 2)).sum(1) / (positives * negatives),
        "average_precision": (precision * new_tp).sum(1) / positives,
        "brier": weights @ gap**2 / total,
        "ece": np.abs(gaps).sum(1),
        "ece_error": np.abs(gaps - gap_in_bin.mean(0)).sum(1),
    }


def resample(normal, units, seed):
    """Yields int (rows, units), how often each patient counts, for about 100 samples at a time: that bounds the memory.

    First DRAWS random samples, as many patients of each class as there are; then, for the skewness, all but one
    patient (all but one group of patients, where there are more than 400). Patients 0 to normal - 1 are NORMAL.
    """
    import numpy as np

    generator, classes = np.random.default_rng(seed), ((0, normal), (normal, units))
    for rows in [100] * (DRAWS // 100):
        drawn = np.concatenate([generator.integers(low, high, (rows, high - low)) for low, high in classes], axis=1)
        drawn += units * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
    groups = np.arange(min(units, 400))
    times = (np.arange(units) % len(groups) != groups[:, None]).astype(int)
    for low, high in classes:
        times[:, low:high] |= high - low == 1  # no class without a patient
    yield from np.array_split(times, len(groups) // 100 + 1)


def bootstrap(files, labels, probs, threshold, seed):
    """{name: (samples,)}: the scores of every sample that resample draws.

    The same files, labels and seed give the same samples: differences of two calls are paired. Patients, because
    images of one patient are alike; a patient with images of both classes counts once in each.
    """
    import numpy as np

    keys = [(label, patient or file) for label, patient, file in zip(labels, patients_of(files), files, strict=True)]
    index = {key: i for i, key in enumerate(sorted(set(keys)))}
    unit, normal = np.array([index[key] for key in keys]), sum(label == 0 for label, _ in index)
    samples = (times[:, unit].astype(float) for times in resample(normal, len(index), seed))
    parts = [weighted_scores(probs, labels, weights, threshold) for weights in samples]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure(files, labels, probs, threshold, seed):
    """(metrics with intervals, counts, the bootstrap's draws). A Failure unless both classes are there."""
    import torch
    from torchmetrics.functional.classification import binary_confusion_matrix

    for label, name in enumerate(CLASSES):
        if label not in labels:
            raise Failure(f"no readable {name} image: expected both classes, a score of one means nothing")
    scored = torch.from_numpy(probs), torch.from_numpy(labels), threshold
    values = common.score(*scored)
    if not all(math.isfinite(value) for value in values.values() if value is not None):
        raise Failure(f"a score is not finite: {values}", 3)
    tn, fp, fn, tp = binary_confusion_matrix(*scored).ravel().tolist()
    shares = (tp + tn, len(labels)), (tp, tp + fn), (tn, tn + fp), (tp, tp + fp), (tn, tn + fn)
    intervals = {name: wilson(*share) for name, share in zip(PROPORTIONS, shares, strict=True)}
    draws = bootstrap(files, labels, probs, threshold, seed)
    metrics = {
        name: intervals[name] | {"value": value} if name in PROPORTIONS else bootstrapped(name, value, draws)
        for name, value in values.items()
    }
    return metrics, {"tp": tp, "fp": fp, "tn": tn, "fn": fn}, draws


def measure_subgroups(files, labels, probs, threshold):
    """{name: {metric, n, value, low, high}} of the groups that the patients in the names tell."""
    found, patients = {}, [patient or "" for patient in patients_of(files)]
    for name, label in SUBGROUPS.items():
        inside = [patient.startswith(name) or patient.endswith(name) for patient in patients]
        right = (probs[inside & (labels == label)] > threshold) == label
        if len(right):
            about = {"metric": ("specificity", "sensitivity")[label], "n": len(right)}
            found[name.strip("_-")] = about | wilson(int(right.sum()), len(right))
    return found


def measure_calibration(labels, probs, temperature):
    """Brier score and calibration error with the temperature and, undone on the logits, without it."""
    import torch

    labels, after = torch.from_numpy(labels), torch.from_numpy(probs)
    logits = after.double().clamp(1e-12, 1 - 2.0**-25).logit()  # a float32 of 1.0 may have been 1 - 2**-25
    before = (temperature * logits).sigmoid().float() if temperature != 1 else after
    scores = {name: common.score(each, labels, 0.5) for name, each in (("with", after), ("without", before))}
    return {"temperature": temperature} | {k: {m: v[m] for m in ("ece", "brier")} for k, v in scores.items()}


def difference(name, mine, other):
    """{value, low, high} of mine - other, both from measure, of the same images with the same seed."""
    (metrics, _, draws), (other_metrics, _, other_draws) = mine, other
    value = metrics[name]["value"] - other_metrics[name]["value"]
    return bootstrapped(name, value, {name: draws[name] - other_draws[name]})


def mcnemar(only_mine, only_other):
    """McNemar's exact p, two-sided: whether that many against so many could be chance."""
    n = only_mine + only_other
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_mine, only_other) + 1)) / 2**n)


def compare(args, table, other, threshold, measured):
    """What metrics.json says about the difference to the Table `other`, read from args.compare, of the same images."""
    report = report_beside(args.compare)
    other_threshold = choose_threshold(args, report.get("threshold"), args.compare)["threshold"]
    (files, labels, probs), (other_files, other_labels, other_probs) = table.readable(), other.readable()
    if odd := sorted(set(files) ^ set(other_files)):
        raise Failure(f"{args.compare}: expected the same {len(files)} images, {len(odd)} are in one only, as {odd[0]}")
    row = {file: i for i, file in enumerate(other_files)}
    rows = [row[file] for file in files]
    other_labels, other_probs = other_labels[rows], other_probs[rows]
    if (labels != other_labels).any():
        raise Failure(f"{args.compare}: {files[(labels != other_labels).argmax()]} has another label there")
    other_measured = measure(files, labels, other_probs, other_threshold, args.seed)
    right, other_right = (probs > threshold) == labels, (other_probs > other_threshold) == labels
    only_here, only_there = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    return {
        "with": str(args.compare),
        "model": report.get("model"),
        "threshold": other_threshold,
        "other": {name: other_measured[0][name] for name in COMPARED},
        "difference": {name: difference(name, measured, other_measured) for name in COMPARED},
        "right_only_here": only_here,
        "right_only_there": only_there,
        "mcnemar_p": mcnemar(only_here, only_there),
    }


# ---------------------------------------------------------------- guards: leaks and shortcuts


def find_leaks(model, images, args):
    """Warnings about images that the model has seen while it was made, and about a model of other images."""
    warnings, seen = [], {digest for known in model.info.get("images", {}).values() for digest in known.values()}
    record = common.read_json(args.data_dir / common.SPLIT_FILE, {"sha256": {str: str}, "state": str})
    if record and (strange := seen.difference(record["sha256"].values())):
        which = f"{len(strange)} of the {len(seen)} images that the model learned from are not in {common.SPLIT_FILE}"
        warnings.append(f"{which}: it is an older model, or one of other data")
    if args.split != "test":
        return [*warnings, f"the network was made with the {args.split} images: these numbers are NO TEST RESULT"]
    if leaked := [image.path.name for image in images if image.digest in seen]:
        among = f"WERE AMONG THE TRAINING OR VALIDATION IMAGES, as {leaked[0]}"
        warnings.append(f"{len(leaked)} of {len(images)} test images {among}: these numbers are no test result")
    return warnings


def best_rule(args, images, files):
    """The one-number rule that classifies train and val best, and the `files` (of the `images`) that it gets wrong.

    {"none": reason} where there are no training images. Test images have no part in choosing the rule.
    """
    try:
        fit = common.list_split(args.data_dir, "train")
        with contextlib.suppress(Failure):
            fit += common.list_split(args.data_dir, "val")
    except Failure as reason:
        return {"none": str(reason)}
    fit = fit[:: -(-len(fit) // N_RULE)]
    with ThreadPoolExecutor() as pool:
        fitted = list(pool.map(partial(common.read_or_explain, common.image_numbers), [path for path, _ in fit]))
        tested = list(pool.map(common.image_numbers, [image.path for image in images]))
    known = [(found, label) for found, (_, label) in zip(fitted, fit, strict=True) if not isinstance(found, str)]
    if not known:
        return {"none": f"no image in {args.data_dir / 'train'} can be read"}
    fitted, labels = zip(*known, strict=True)
    rules = {}
    for name in fitted[0]:
        values = [numbers[name] for numbers in fitted]
        rule = common.fit_rule(values, labels)
        rules[name] = float((common.apply_rule(rule, values) == labels).mean()), rule
    name = max(rules, key=lambda name: rules[name][0])
    accuracy, (cut, sign) = rules[name]
    found = common.apply_rule((cut, sign), [numbers[name] for numbers in tested])
    wrong = [file for file, image, label in zip(files, images, found, strict=True) if label != image.label]
    about = {"number": name, "cut": cut, "sign": sign, "fitted_on": len(known), "fit_accuracy": accuracy}
    return about | {"wrong": wrong}


def judge_rule(rule, files, labels, measured, seed):
    """Adds to what best_rule found: the rule's accuracy, and the paired difference of the network's."""
    if "wrong" not in rule:
        return rule
    wrong = set(rule["wrong"])
    found = (labels != [file in wrong for file in files]).astype("float32")
    rule_measured = measure(files, labels, found, 0.5, seed)
    gain = difference("accuracy", measured, rule_measured)
    verdict = "better" if gain["low"] > 0 else "better, but within chance" if gain["value"] > 0 else "NO BETTER"
    return rule | {"accuracy": rule_measured[0]["accuracy"], "difference": gain, "network_is": verdict}


# ---------------------------------------------------------------- class activation maps


def class_maps(model, pixels):
    """Maps float32 (n, h, w) of images (n, 3, SIZE, SIZE), 0 to 255, or None where the network has none.

    A network that ends in global average pooling and one Linear gives the logit as the mean over positions of
    weight . last feature map + bias (Zhou et al. 2016): that sum is the map, positive where it speaks for PNEUMONIA.
    The last feature map is found by what it does: its mean over positions is the features.
    """
    import torch

    device, outputs = pixels.device, []
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (common.MEAN, common.STD))

    def keep(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[1] == len(model.weight):
            outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in model.network.modules()]
    with torch.inference_mode():
        features = model.network.to(device, memory_format=torch.channels_last)((pixels.float() - mean) / std)
    for hook in hooks:
        hook.remove()
    # compared only now: a DenseNet's last ReLU changes the map in place
    for output in reversed(outputs):
        tolerance = 1e-4 * features.abs().max().item()
        if output[0, 0].numel() > 1 and torch.allclose(output.mean((2, 3)), features, rtol=1e-3, atol=tolerance):
            return (torch.einsum("nchw,c->nhw", output, model.weight.to(device)) + model.bias.to(device)).cpu()
    return None


def overlay(view, heat):
    """The view (SIZE, SIZE, 3) under its map: orange where it speaks for PNEUMONIA, blue for NORMAL."""
    import torch
    from matplotlib.colors import to_rgb

    heat = torch.nn.functional.interpolate(heat[None, None], view.shape[:2], mode="bilinear")[0, 0, :, :, None]
    colour = torch.where(heat > 0, *(torch.tensor(to_rgb(COLOURS[label])) * 255 for label in (1, 0)))
    strength = 0.7 * heat.abs() / heat.abs().max().clamp(min=1e-12)
    return (view * (1 - strength) + colour * strength).round().byte()


def overlays(model, images):
    """Yields (view, overlay or None), uint8 (SIZE, SIZE, 3), of each image."""
    import torch

    for start in range(0, len(images), 16):
        views = common.Views([(image.path, image.digest, [0]) for image in images[start : start + 16]])
        for number, view in (pair for pair in views if isinstance(pair[1], str)):
            raise Failure(f"{images[start + number].path}: {view}; it could still be read a moment ago")
        pixels = torch.cat([torch.from_numpy(view) for _, view in views])
        maps = class_maps(model, pixels.permute(0, 3, 1, 2).to(model.device))
        for i, view in enumerate(pixels):
            yield view, None if maps is None else overlay(view, maps[i])


def write_overlays(folder, model, images):
    """One PNG an image in `folder`, in the folder of its class if it has one; its name stays legible."""
    from PIL import Image as Pillow

    taken = set()
    for image, (_, picture) in zip(images, overlays(model, images), strict=True):
        names = (f"{image.path.name}{number}.png" for number in ("", *(f"-{i}" for i in range(2, len(images) + 2))))
        group = "" if image.label is None else CLASSES[image.label]
        target = next(path for name in names if (path := folder / group / name) not in taken)
        taken.add(target)
        with replacing(target) as file:
            Pillow.fromarray(picture.numpy()).save(file, format="png")
    print(f"Class activation maps of {len(images)} images in {folder}")


# ---------------------------------------------------------------- pictures


def interval(metric):
    """A value with its interval, as text."""
    if metric["value"] is None:
        return "undefined"
    return "{value:.3f} ({low:.3f} to {high:.3f})".format(**metric)


def reach(metric):
    """How far the interval goes down and up from the value, as matplotlib's errorbar wants it."""
    return [[metric["value"] - metric["low"]], [metric["high"] - metric["value"]]]


def draw_curve(ax, x, y, across, up, report, **style):
    """The network's curve, and on it the operating point with the 95 % intervals of both coordinates."""
    ax.plot(x, y, color=COLOURS[1], label="network", **style)
    if up["value"] is not None:
        label = f"threshold {report['threshold']:.3g}, 95 % intervals"
        ax.errorbar(across["value"], up["value"], reach(up), reach(across), "o", color="black", capsize=3, label=label)


def draw_roc(ax, labels, probs, report):
    import numpy as np

    tp, fp = (np.append(0, each[0]) for each in counts_above(probs, labels, np.ones((1, len(probs)))))
    sensitivity, specificity, auroc = (report["metrics"][name] for name in ("sensitivity", "specificity", "auroc"))
    mirrored = {"value": "value", "low": "high", "high": "low"}
    false_alarms = {key: 1 - specificity[other] for key, other in mirrored.items()}
    ax.plot((0, 1), (0, 1), color="grey", linestyle=":", label="chance")
    draw_curve(ax, fp / fp[-1], tp / tp[-1], false_alarms, sensitivity, report)
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"ROC: AUROC {interval(auroc)}")
    ax.legend(loc="lower right")


def draw_precision_recall(ax, labels, probs, report):
    import numpy as np

    tp, fp = (each[0] for each in counts_above(probs, labels, np.ones((1, len(probs)))))
    metrics, precision = report["metrics"], tp / (tp + fp)
    ax.axhline(labels.mean(), color="grey", linestyle=":", label="chance")
    recall, precision = np.append(0, tp / tp[-1]), np.append(precision[0], precision)
    draw_curve(ax, recall, precision, metrics["sensitivity"], metrics["ppv"], report, drawstyle="steps-pre")
    title = f"Precision-recall: average precision {interval(metrics['average_precision'])}"
    ax.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.05), title=title)
    ax.legend(loc="lower left")


def draw_confusion(ax, labels, probs, report):
    counts = report["counts"]
    table = [[counts["tn"], counts["fp"]], [counts["fn"], counts["tp"]]]
    shares = [[n / sum(row) for n in row] for row in table]
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        text, colour = f"{table[i][j]}\n{shares[i][j]:.1%} of {CLASSES[i]}", "white" if shares[i][j] > 0.65 else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize=11, color=colour)
    title = f"Accuracy {interval(report['metrics']['accuracy'])} at threshold {report['threshold']:.3g}"
    ax.set(xticks=(0, 1), yticks=(0, 1), xticklabels=CLASSES, xlabel="predicted", ylabel="truth", title=title)
    ax.set_yticklabels(CLASSES, rotation=90, va="center")
    ax.grid(False)


def draw_reliability(ax, labels, probs, report):
    bins, metrics = bin_of(probs), report["metrics"]
    ax.plot((0, 1), (0, 1), color="grey", linestyle=":", label="calibrated")
    for each in sorted(set(bins)):
        inside = bins == each
        x, share = probs[inside].mean(), wilson(int(labels[inside].sum()), int(inside.sum()))
        ax.errorbar(x, share["value"], reach(share), fmt="o", color=COLOURS[1], capsize=2, markersize=4)
        ax.annotate(inside.sum(), (x, share["value"]), (4, 3), textcoords="offset points", fontsize=7)
    title = f"Calibration: ECE {interval(metrics['ece'])}\nBrier score {interval(metrics['brier'])}"
    ax.set(xlabel="mean P(PNEUMONIA) in the bin", ylabel="share of PNEUMONIA, 95 % interval, n", title=title)


def draw_scores(ax, labels, probs, report):
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    edges = np.linspace(0, 1, 26)
    for label, side in ((1, 1), (0, -1)):
        heights = side * np.histogram(probs[labels == label], edges)[0]
        ax.bar(edges[:-1], heights, 0.04, align="edge", color=COLOURS[label], edgecolor="white", label=CLASSES[label])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(report["threshold"], color="black", linestyle="--", label=f"threshold {report['threshold']:.3g}")
    ax.yaxis.set_major_formatter(lambda y, _: f"{abs(y):.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="P(PNEUMONIA)", ylabel="images", xlim=(0, 1), title="Scores by class")
    ax.legend()


DRAWN = (draw_roc, draw_precision_recall, draw_confusion, draw_reliability, draw_scores)
PICTURES = {draw.__name__.removeprefix("draw_"): draw for draw in DRAWN}  # by the name of the file


def draw_worst(path, model, images, probs, threshold, caption):
    """The most wrong images, each beside its map; the least sure ones where nothing is wrong."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    wrong = [i for i, image in enumerate(images) if (probs[i] > threshold) != image.label]
    rows = sorted(wrong, key=lambda i: -abs(probs[i] - images[i].label))[:N_WORST]
    heading = f"The {len(rows)} most wrong of {len(wrong)} wrong images"
    if not wrong:
        rows = sorted(range(len(images)), key=lambda i: abs(probs[i] - threshold))[:N_WORST]
        heading = f"No image is wrong: the {len(rows)} least sure"
    shown = list(overlays(model, [images[i] for i in rows]))
    without = "without class activation maps: the network does not end in pooling and one Linear"
    beside = "beside each its class activation map: orange for PNEUMONIA, blue for NORMAL"
    size, right, down = common.SIZE, 2 * common.SIZE + 16, common.SIZE + 44  # pixels from one to the next
    sheet = Pillow.new("RGB", (2 * right, 60 + (len(rows) + 1) // 2 * down + 20), "white")
    text = ImageDraw.Draw(sheet)
    text.text((4, 4), heading, "black", font_size=18)
    text.text((4, 30), without if shown[0][1] is None else beside, "black", font_size=14)
    text.text((4, sheet.height - 18), caption, "dimgrey", font_size=12)
    for place, (i, pair) in enumerate(zip(rows, shown, strict=True)):
        x, y, name = place % 2 * right + 4, place // 2 * down + 60, images[i].path.name
        name = name if len(name) < 56 else f"{name[:26]}...{name[-26:]}"
        text.text((x, y), name, "black", font_size=13)
        text.text((x, y + 17), f"{CLASSES[images[i].label]}, P(PNEUMONIA) {probs[i]:.3f}", "black", font_size=13)
        for side, pixels in enumerate(part for part in pair if part is not None):
            sheet.paste(Pillow.fromarray(pixels.numpy()), (x + side * size, y + 36))
    with replacing(path) as file:
        sheet.save(file, format="png")


# ---------------------------------------------------------------- the report


def print_report(report):
    """The reference's two lines, then everything in metrics.json, for the eye."""
    model, metrics, word = report["model"] or {}, report["metrics"], report["split"].capitalize()
    print(f"{word} accuracy: {metrics['accuracy']['value']:.3f}")
    print(f"{word} F1-score: {metrics['f1']['value']:.3f}\n")
    known = [f"{key} {model[key]}" for key in ("weights", "epoch") if model.get(key)]
    parts = (model.get("file") or "unknown", model.get("arch"), *known, model.get("date"))
    print("Model      ", ", ".join(part for part in parts if part))
    print(f"Threshold   {report['threshold']:.4g} ({report['threshold_from']})")
    unknown = report["names_without_patient"]
    counted = f" (names that tell none: {unknown}, each counts as one patient)" if unknown else ""
    print(f"Images      {report['n']} of {report['patients']} patients{counted}\n")
    print(f"{'':18} {'value':>9}   95 % interval")
    for name, each in metrics.items():
        value, _, between = interval(each).partition(" ")
        print(f"{name:18} {value:>9}   {between.strip('()')}")
    for name, each in report["subgroups"].items():
        print(f"  {each['metric'] + ', ' + name:24} {interval(each)}, n = {each['n']}")
    if report["without_spread"]:
        print(f"Every bootstrap sample has the same {', '.join(report['without_spread'])}: that interval is too narrow")
    if report["n"] > 1.2 * report["patients"]:
        print(f"Patients have several images each, so that the intervals of {', '.join(PROPORTIONS)} are too narrow")
    counts = report["counts"]
    print(f"\n{'':22}{'predicted NORMAL':>18}{'predicted PNEUMONIA':>22}")
    print(f"{'truth NORMAL':22}{counts['tn']:>18}{counts['fp']:>22}")
    print(f"{'truth PNEUMONIA':22}{counts['fn']:>18}{counts['tp']:>22}\n")


def print_checks(report):
    """Calibration, the best one-number rule and the other model, each where there is one."""
    calibration, rule, other = report["calibration"], report["shortcut"], report["comparison"]
    if calibration["temperature"] != 1:
        before, after = calibration["without"], calibration["with"]
        ece, brier = (f"from {before[name]:.3f} to {after[name]:.3f}" for name in ("ece", "brier"))
        temperature = f"the temperature {calibration['temperature']:.3g}"
        print(f"Calibration: {temperature} changes the calibration error {ece}, Brier {brier}")
    if rule and "wrong" in rule:
        found = f"{rule['number']} {'>' if rule['sign'] > 0 else '<='} {rule['cut']:.5g}"
        print(f"Best one-number rule, {found}: accuracy {interval(rule['accuracy'])}")
        print(f"  The network is {rule['network_is']}: difference {interval(rule['difference'])}")
    elif rule:
        print(f"Best one-number rule: none to compare with ({rule['none']})")
    if other:
        print(f"Compared with {other['with']} at threshold {other['threshold']:.4g}:")
        for name in COMPARED:
            print(f"  {name:10} {other['other'][name]['value']:.3f}, difference {interval(other['difference'][name])}")
        right = f"{other['right_only_here']} images are right only here, {other['right_only_there']} only there"
        print(f"  {right}: McNemar's exact p {other['mcnemar_p']:.3g}")


def keep_evaluated(path):
    """Copies the predictions.csv that metrics.json describes, before new images' predictions take its place."""
    report = common.read_json(path.with_name("metrics.json"), {}) or {}
    if path.is_file() and report.get("predictions_sha256") == common.hash_file(path):
        kept = path.with_name(f"predictions-{report['split']}.csv")
        with replacing(kept) as file:
            file.write(path.read_bytes())
        print(f"The predictions of {report['split']} that were in {path} are now in {kept}")


def classify(args, model, images, table, report):
    """The table of named images, on the screen and in predictions.csv. Returns the exit status."""
    path, threshold = args.results_dir / "predictions.csv", report["threshold"]
    keep_evaluated(path)
    write_predictions(path, table, threshold)
    print(f"Model {args.checkpoint}, threshold {threshold:.4g} ({report['threshold_from']})\n")
    width = max(map(len, table.files))
    print(f"{'file':{width}}  P(PNEUMONIA)  prediction")
    for name, _, prob, error, prediction in table.predictions(threshold):
        print(f"{name:{width}}  {f'{prob:.3f}' if not error else '-':>12}  {error or prediction}")
    print(f"\nWritten: {path}")
    for warning in model.warnings:
        common.warn(warning)
    if args.cam:
        write_overlays(args.cam, model, images)
    if unreadable := len(table.files) - len(images):
        print(f"{unreadable} of {len(table.files)} images could not be read, see {path}", file=sys.stderr)
    return 2 if unreadable else 0


def summarise(args, report, table, other):
    """Adds every number to the report."""
    files, labels, probs = table.readable()
    threshold, rule, patients = report["threshold"], report.get("shortcut"), patients_of(files)
    metrics, counts, draws = measured = measure(files, labels, probs, threshold, args.seed)
    return report | {
        "n": len(files),
        "patients": len({patient or file for patient, file in zip(patients, files, strict=True)}),
        "names_without_patient": patients.count(None),
        "unreadable": len(table.files) - len(files),
        "positive": CLASSES[1],
        "counts": counts,
        "metrics": metrics,
        "intervals": INTERVALS.format(proportions=", ".join(PROPORTIONS), draws=DRAWS, seed=args.seed),
        "without_spread": [k for k in metrics if k not in PROPORTIONS and len(set(draws[k][:DRAWS])) == 1],
        "subgroups": measure_subgroups(files, labels, probs, threshold),
        "calibration": measure_calibration(labels, probs, (report["model"] or {}).get("temperature") or 1.0),
        "shortcut": rule and judge_rule(rule, files, labels, measured, args.seed),
        "comparison": other and compare(args, table, other, threshold, measured),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def write_report(args, report, table, model, images):
    """predictions.csv, metrics.json and the pictures: worst.png only where there are images."""
    import matplotlib
    from matplotlib.figure import Figure

    folder, about, (_, labels, probs) = args.results_dir, report["model"] or {}, table.readable()
    write_predictions(folder / "predictions.csv", table, report["threshold"])
    digest = common.hash_file(folder / "predictions.csv")
    common.write_json(folder / "metrics.json", report | {"predictions_sha256": digest})
    parts = (Path(about.get("file") or "unknown model").name, about.get("arch"), about.get("date"))
    caption = f"{report['split']}: {report['n']} images of {report['patients']} patients; "
    caption += ", ".join(part for part in parts if part)
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = Figure((5, 4.6), layout="constrained")
            draw(figure.add_subplot(), labels, probs, report)
            figure.supxlabel(caption, fontsize=7, color="dimgrey", parse_math=False)
            with replacing(folder / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=120)
    if images:
        draw_worst(folder / "worst.png", model, images, probs, report["threshold"], caption)


# ---------------------------------------------------------------- main


def probability(text):
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text}")
    return number


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.set_defaults(images=[], threshold=None, cam=None, source=None, compare=None)
    shared = ("--data-dir", "--checkpoint", "--results-dir", "--device", "--batch-size", "--workers", "--cache-dir")
    common.add_flags(parser, *shared, "--no-cache", "--skip-bad", "--seed")
    add, none = parser.add_argument, argparse.SUPPRESS  # SUPPRESS: no "default: None" in the help
    add("images", nargs="*", type=Path, default=none, metavar="FILE_OR_FOLDER", help="classify these, not a split")
    add("--split", choices=("test", "val", "train"), default="test", help="the images to score")
    above = "P(PNEUMONIA) above which an image is PNEUMONIA, 0 to 1 (default: the one stored with the model)"
    add("--threshold", type=probability, default=none, metavar="T", help=above)
    add("--cam", type=Path, default=none, metavar="DIR", help="also write a class activation map of each image there")
    again = "score this predictions.csv again, without images and network"
    add("--from", type=Path, default=none, dest="source", metavar="CSV", help=again)
    versus = "predictions.csv of another model for the same images: the difference (--threshold then holds for both)"
    add("--compare", type=Path, default=none, metavar="CSV", help=versus)
    args = parser.parse_args(argv)
    if args.images and (args.source or args.compare):
        parser.error("FILE_OR_FOLDER: --from and --compare need labels, and work on a split only")
    if args.source and args.cam:
        parser.error("--cam: needs the images, --from has none")
    return args


def require_outputs(args):
    """A Failure, before the work, where what is to be written cannot be."""
    common.require_writable(*(args.results_dir / name for name in ("metrics.json", "predictions.csv", "roc.png")))
    if args.cam:
        splits = [args.data_dir / split / name for split in ("train", "val", "test") for name in ("", *CLASSES)]
        sources = splits + [path if path.is_dir() else path.parent for path in args.images]
        if args.cam.resolve() in map(Path.resolve, sources):
            raise Failure(f"--cam {args.cam}: images lie there, and maps would count as images; choose another folder")
        common.require_writable(args.cam / "map.png")


def run_network(args):
    """(model, its readable images, Table of all, what the report says so far) for a split or the named images."""
    images = named_images(args.images) or common.read_split(args.data_dir, args.split)[args.split]
    device, dtype = common.pick_device(args.device)
    model = load_model(args.checkpoint, device)
    rule = model.info.get("threshold_rule", "fixed")
    source = f"{args.checkpoint.with_suffix('.json')}, {'fixed in advance' if rule == 'fixed' else f'{rule} on val'}"
    report = {"split": args.split, "model": model.about, "warnings": [*model.warnings]}
    report |= choose_threshold(args, model.info.get("threshold"), source)
    noise = model.weight.new_empty(1, 3, common.SIZE, common.SIZE).random_(256)
    if args.cam and class_maps(model, noise) is None:
        reason = "does not end in global average pooling and one Linear, so that it has no class activation map"
        raise Failure(f"--cam: {model.info['arch']} {reason}; leave --cam out")
    require_outputs(args)
    table = predict(model, images, args, dtype)
    return model, [image for image, error in zip(images, table.errors, strict=True) if not error], table, report


def evaluate(args):
    other = read_predictions(args.compare) if args.compare else None
    if args.source:
        table, seen, model, images = read_predictions(args.source), report_beside(args.source), None, []
        report = {"model": None, "shortcut": None, "split": args.split, "warnings": []}
        report |= {key: seen[key] for key in report if key in seen}
        source = seen.get("threshold_from") or args.source.with_name("metrics.json")
        report |= choose_threshold(args, seen.get("threshold"), str(source))
        require_outputs(args)
    else:
        model, images, table, report = run_network(args)
        if args.images:
            return classify(args, model, images, table, report)
        report["warnings"] += find_leaks(model, images, args)
        if args.split == "test":
            report["shortcut"] = best_rule(args, images, table.readable()[0])

    report = summarise(args, report, table, other)
    print_report(report)
    print_checks(report)
    write_report(args, report, table, model, images)
    if args.cam:
        write_overlays(args.cam, model, images)
    print(f"Written: metrics.json, predictions.csv and pictures in {args.results_dir}")
    if args.source:
        print("Not drawn again, for want of the images: worst.png")
    for warning in report["warnings"]:
        common.warn(warning)
    return 0


def main(argv=None):
    args = parse_args(argv)
    return common.run(evaluate, args)


if __name__ == "__main__":
    sys.exit(main())
