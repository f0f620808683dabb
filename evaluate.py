"""Scores the saved network on DIR/test, or classifies any images.

Reads model.pth and model.json. Writes report.html, predictions.csv, metrics.json and six pictures
into results/, with 95 % intervals. New images get new_predictions.csv. With --from it needs neither
images nor network, only an earlier predictions.csv, and prints.

    python evaluate.py
    python evaluate.py scan.png folder/ --cam maps/
    python evaluate.py --from results/predictions.csv --threshold 0.7 --compare other/results.csv
"""

import argparse
import base64
import copy
import html
import math
import sys
from pathlib import Path
from typing import NamedTuple

import common  # first: it says what to do where a package is missing

# isort: split
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torchmetrics.functional.classification as tm
from torch import nn

from cxr.bootstrap import DRAWS, INTERVALS
from cxr.checkpoint import read_checkpoint
from cxr.cli import FLAGS, RUN_FLAGS, Parser, add_flags, number, run
from cxr.compare import COMPARED, compare
from cxr.errors import SHOWN, Failure, warn
from cxr.files import (
    hash_file,
    read_json,
    replacing,
    require_writable,
    save_figure,
    versions,
    write_json,
)
from cxr.folders import CLASSES, COLOURS, image_suffixes, list_images
from cxr.leaks import find_leaks, training_images
from cxr.novelty import SHIFT, measure_unlike, warn_of_elsewhere
from cxr.patients import METADATA, Film, patient_of, read_metadata, read_split
from cxr.predictions import (
    COLUMNS,
    Table,
    count_left_out,
    count_patients,
    read_predictions,
    write_predictions,
)
from cxr.proportions import PREVALENCES, PROPORTIONS, at_prevalences, interval, opposite, proportion
from cxr.scores import below_chance, measure, measure_calibration, measure_subgroups
from cxr.shortcuts import numbers_instead

N_WORST = 8  # images in worst.png
NOT_ASSESSED = "age", "sex", "device"  # unless metadata.csv has a column of that name
PACKAGES = ("torch", "torchvision", "torchmetrics", "scipy", "scikit-learn", "numpy", "pillow")
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}

# ---------------------------------------------------------------- the network and its predictions


class Model(NamedTuple):
    backbone: common.Backbone
    device: torch.device
    head: nn.Linear  # the one output neuron
    info: dict  # what model.json says, as far as it can be trusted
    warnings: list


def load_model(path, device_name, arch=None):
    """The Model in a checkpoint of train.py, or in any state dict of a network with one output.

    arch: the network of such a state dict, None for what model.json says, or a resnet50.
    """
    state, about = read_checkpoint(path), path.with_suffix(".json")
    info, doubts = read_json(about), []
    if info is None:
        info = {"arch": arch or "resnet50"}
        taken = f"taken for a {info['arch']} (--arch), threshold 0.5, no window"
        doubts.append(f"no {about} beside {path.name}: {taken}")
    elif "arch" not in info:
        raise Failure(f"{about}: not about a model; restore or delete it")
    elif info.get("sha256") != hash_file(path):
        info = {key: info[key] for key in ("arch", "window") if key in info}
        differs = "(its SHA-256 differs): only its arch and window are used"
        doubts.append(f"{about} DOES NOT BELONG to this {path.name} {differs}")
    if arch not in (None, info["arch"]):
        raise Failure(f"--arch {arch}: {about} says {info['arch']}; leave --arch out")
    try:
        backbone = common.build_backbone(info["arch"], state, path)
    except Failure as error:
        raise Failure("; ".join([str(error), *doubts])) from None
    weight, bias = backbone.weight, backbone.bias
    if weight is None or bias is None or weight.shape != (1, backbone.width) or bias.shape != (1,):
        found = "none" if weight is None else f"{len(weight)} of {tuple(weight.shape[1:])}"
        expected = f"expected one output neuron of {backbone.width} inputs in {backbone.head_name}"
        remedy = f"train.py --weights {path} trains a new one on this network"
        raise Failure(f"{path}: {expected}, found {found}; {remedy}")
    head = nn.Linear(backbone.width, 1).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    here, there = [str(common.PREPARE), str(backbone.normalize)], info.get("transforms")
    if there and here != [there[0], there[-1]]:
        doubts.append(
            f"the transforms of common.py are not those that {path.name} was trained with "
            f"({', '.join({*here} - {*there})}): its probabilities do not hold"
        )
    device, _ = common.pick_device(device_name)
    return Model(backbone, device, head, info, doubts)


def describe_model(path, info):
    """What metrics.json says about the model; info: what model.json says."""
    keys = "weights date epoch seed val_loss val_accuracy slope intercept window threshold_rule"
    about = {"file": str(path), "sha256": hash_file(path), "arch": info["arch"]}
    about |= {key: info.get(key) for key in (*keys.split(), "at_threshold")}
    images = {split: len(found) for split, found in info.get("images", {}).items()}
    return about | {"images": images, "skipped": info.get("skipped", [])}


def choose_threshold(args, info, source):
    """{threshold, threshold_from}: --threshold, or the one of `info`, which is from `source`."""
    if args.threshold is not None:
        return {"threshold": args.threshold, "threshold_from": "--threshold"}
    if "threshold" not in info:
        return {"threshold": 0.5, "threshold_from": "the default"}
    rule = info.get("threshold_rule", "fixed")
    chosen = "fixed in advance" if rule == "fixed" else f"{rule} on val"
    return {
        "threshold": info["threshold"],
        "threshold_from": info.get("threshold_from", f"{source}, {chosen}"),
    }


def predict(model, images, names, args):
    """(the Table of the images, {row: reason} of unreadable ones, what metrics.json says on unlike
    images), in float32 on every device."""
    window = model.info.get("window", 0)
    data = images, 1, window, model.device, torch.float32, args
    features, bad = common.extract_features(model.backbone, *data)
    features = features[:, 0]
    probs = model.head(features).squeeze(1).sigmoid()
    probs[list(bad)] = math.nan
    if probs.isfinite().sum() != len(images) - len(bad):
        raise Failure(f"{args.checkpoint}: gives scores that are not finite; train again", 3)
    unlike, group = torch.full_like(probs, math.nan), None
    good = [row for row in range(len(images)) if row not in bad]
    files = [name.as_posix().encode(errors="backslashreplace").decode() for name in names]
    if good and "features" in model.info:
        unlike[good], group = measure_unlike(features[good], model.info["features"])
        far = [row for row in unlike.nan_to_num().argsort(descending=True) if unlike[row] > 1]
        group["files"] = [files[row] for row in far]
    table = Table(
        files=files,
        labels=[image.label for image in images],
        probs=probs.numpy(),
        errors=[bad.get(row, "") for row in range(len(images))],
        unlike=unlike.numpy(),
        patients=[image.patient for image in images],
        about=[{k: v for k, v in (i.about or {}).items() if k not in COLUMNS} for i in images],
    )
    return table, bad, group


# ---------------------------------------------------------------- scores with their intervals


# ---------------------------------------------------------------- doubts: leaks, one number instead


# ---------------------------------------------------------------- class activation maps


def class_maps(model, pixels):
    """Maps float32 (n, h, w) of uint8 (n, 1, SIZE, SIZE), or None where the network has none.

    A network that ends in global average pooling and one Linear gives the logit as the mean over
    positions of weight . last feature map + bias (Zhou et al. 2016): that sum is the map, positive
    where it speaks for PNEUMONIA. The last feature map is told by its mean, which is the features.
    """
    device, width = model.device, model.backbone.width
    network = copy.deepcopy(model.backbone.network).to(device)
    outputs = []

    def keep(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[1] == width:
            outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    with torch.inference_mode():
        features = network(model.backbone.normalize(pixels.to(device)))
    for hook in hooks:
        hook.remove()
    # compared only now: a DenseNet's last ReLU changes the map in place
    for output in reversed(outputs):
        tolerance = 1e-4 * features.abs().max().item()
        mean = output.mean((2, 3))
        if output[0, 0].numel() > 1 and torch.allclose(mean, features, rtol=1e-3, atol=tolerance):
            maps = torch.einsum("nchw,c->nhw", output.cpu(), model.head.weight[0])
            return maps + model.head.bias
    return None


def overlay(view, heat):
    """The picture uint8 (1, SIZE, SIZE) under its map: orange for PNEUMONIA, blue for NORMAL."""
    from matplotlib.colors import to_rgb

    view = view[0, :, :, None].float()
    heat = nn.functional.interpolate(heat[None, None], view.shape[:2], mode="bilinear")
    heat = heat[0, 0, :, :, None]
    orange, blue = (torch.tensor(to_rgb(COLOURS[label])) * 255 for label in (1, 0))
    strength = 0.7 * heat.abs() / heat.abs().max().clamp(min=1e-12)
    picture = view * (1 - strength) + torch.where(heat > 0, orange, blue) * strength
    return picture.round().byte().numpy()


def overlays(model, images):
    """Yields (picture, overlay or None), uint8 (SIZE, SIZE) and (SIZE, SIZE, 3), of each image."""
    views = common.Views(images, 1, model.info.get("window", 0))
    for start in range(0, len(images), 16):
        found = [views[i] for i in range(start, min(start + 16, len(images)))]
        for i, _, reason in found:
            if reason:
                raise Failure(f"{images[i].path}: {reason}; it could be read a moment ago")
        pixels = torch.cat([pictures for _, pictures, _ in found])
        maps = class_maps(model, pixels)
        for i, view in enumerate(pixels):
            yield view[0].numpy(), None if maps is None else overlay(view, maps[i])


def write_overlays(folder, model, images, table):
    """One PNG an image in `folder`, below the name of its class if it has one."""
    taken = set()
    for image, prob, (_, picture) in zip(images, table.probs, overlays(model, images), strict=True):
        group = folder if image.label is None else folder / CLASSES[image.label]
        path, number = group / f"{image.path.name}.png", 2
        while path in taken:  # a namesake from another folder
            path, number = group / f"{image.path.name}-{number}.png", number + 1
        taken.add(path)
        told = f"P(PNEUMONIA) {prob:.3f}"
        told += "" if image.label is None else f", labelled {CLASSES[image.label]}"
        page = PIL.Image.new("RGB", (448, 488), "white")
        page.paste(PIL.Image.fromarray(picture).resize((448, 448)), (0, 40))
        caption = f"{told}\norange speaks for PNEUMONIA, blue for NORMAL"
        PIL.ImageDraw.Draw(page).text((4, 2), caption, "black", PIL.ImageFont.load_default(14))
        with replacing(path) as file:
            page.save(file, format="png")
    print(f"Class activation maps of {len(images)} images in {folder}")


# ---------------------------------------------------------------- pictures


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
        mark(ax, opposite(specificity), metrics["sensitivity"], f"{at}, 95 % intervals")
        ax.set(xlabel="1 - specificity", ylabel="sensitivity")
        ax.set_title(f"ROC: AUROC {interval(metrics['auroc'])}")
        ax.legend(loc="lower right")

    def draw_precision_recall(ax):
        precision, recall, _ = tm.binary_precision_recall_curve(*scored)
        ax.plot(recall, precision, drawstyle="steps-post", **network)
        ax.axhline(labels.mean(), label="chance", **chance)
        mark(ax, metrics["sensitivity"], metrics["ppv"], f"{at}, 95 % intervals")
        ax.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", ylim=(0, 1.05))
        ax.set_title(f"Average precision {interval(metrics['average_precision'])}")
        ax.legend(loc="lower left")

    def draw_confusion(ax):
        found = {"display_labels": CLASSES, "cmap": "Blues", "colorbar": False}
        ConfusionMatrixDisplay.from_predictions(labels, probs > threshold, ax=ax, **found)
        ax.grid(False)
        ax.set_title(f"Accuracy {interval(metrics['accuracy'])} at {at}")

    def draw_reliability(ax):
        bins = np.minimum((probs * 10).astype(int), 9)
        ax.plot((0, 1), (0, 1), **chance)
        for inside in (bins == each for each in np.unique(bins)):
            mean, share = probs[inside].mean(), proportion(labels[inside], patients[inside])
            mark(ax, {"value": mean, "low": mean, "high": mean}, share)
            ax.annotate(inside.sum(), (mean, share["value"]), (4, 3), textcoords="offset points")
        ax.set(xlabel="mean P(PNEUMONIA) in the bin", ylabel="share of PNEUMONIA, 95 % interval, n")
        slope, intercept = interval(calibration["slope"]), interval(calibration["intercept"])
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


def draw_worst(path, model, images, table, report):
    """The most wrong images, each beside its map; the least sure ones where nothing is wrong."""
    from matplotlib.figure import Figure

    probs, threshold = table.probs, report["threshold"]
    wrong = [i for i, image in enumerate(images) if (probs[i] > threshold) != image.label]
    rows = sorted(wrong, key=lambda i: -abs(probs[i] - images[i].label))[:N_WORST]
    heading = f"The {len(rows)} most wrong of {len(wrong)} wrong images"
    if not wrong:
        rows = sorted(range(len(images)), key=lambda i: abs(probs[i] - threshold))[:N_WORST]
        heading = f"No image is wrong: the {len(rows)} least sure"
    shown = list(overlays(model, [images[i] for i in rows]))
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


# ---------------------------------------------------------------- the screen


def print_report(report):
    """The reference's two lines, then everything in metrics.json, for the eye."""
    metrics, word = report["metrics"], report["split"].capitalize()
    print(f"{word} accuracy: {metrics['accuracy']['value']:.3f}")
    print(f"{word} F1-score: {metrics['f1']['value']:.3f}\n")
    for name, text in particulars(report):
        print(f"{name:11} {text}")
    print(f"\n{'':18} {'value':>9}   95 % interval")
    for name, each in metrics.items():
        value, _, between = interval(each).partition(" ")
        print(f"{name:18} {value:>9}   {between.strip('()')}".rstrip())
    for each in report["subgroups"].values():
        group = f"{each['metric']}, {each['group']}"
        print(f"  {group:36} {interval(each)}, n = {each['n']}")
    counts = report["counts"]
    print(f"\n{'':22}{'predicted NORMAL':>18}{'predicted PNEUMONIA':>22}")
    print(f"{'truth NORMAL':22}{counts['tn']:>18}{counts['fp']:>22}")
    print(f"{'truth PNEUMONIA':22}{counts['fn']:>18}{counts['tp']:>22}\n")
    for title, lines in findings(report):
        print(f"{title}: {lines[0]}" if len(lines) == 1 else f"{title}:")
        for line in lines if len(lines) > 1 else ():
            print(f"  {line}")


def particulars(report):
    """[(name, text)]: which model, threshold and images, for the screen and the page."""
    model, left_out = report["model"] or {}, report["left_out"]
    known = [f"{key} {model[key]}" for key in ("weights", "epoch") if model.get(key) is not None]
    parts = (model.get("file") or "unknown", model.get("arch"), *known, model.get("date"))
    threshold = f"{report['threshold']:.4g} ({report['threshold_from']})"
    if " on val" in threshold and (scores := model.get("at_threshold")):
        there = [f"{name} {interval(scores[name])}" for name in ("sensitivity", "specificity")]
        threshold += f"; there {', '.join(there)}"
    patients = [f"{n} {name}" for name, n in report["patients_by_class"].items()]
    images = f"{report['n']} of {report['patients']} patients ({', '.join(patients)})"
    if unknown := report["names_without_patient"]:
        images += f"; nothing tells the patient of {unknown}, each counts as one"
    rough = "; fewer than 30 patients in a class: intervals are rough"
    images += rough if min(report["patients_by_class"].values()) < 30 else ""
    counted = [f"{n} of {folder}" for folder, n in left_out.items()]
    learned = [f"{n} {split}" for split, n in (model.get("images") or {}).items()]
    return [
        ("Model", ", ".join(part for part in parts if part)),
        ("Trained on", f"{' and '.join(learned) or 'unknown'} images"),
        ("Threshold", threshold),
        ("Data", report["data"]),
        ("Images", images),
        ("Unreadable", f"{', '.join(counted)}: left out" if counted else "none"),
    ]


def findings(report):
    """Yields (title, lines): what stands beside the scores, for the screen and the page."""
    calibration, numbers, other = report["calibration"], report["shortcut"], report["comparison"]
    if alike := report["without_spread"]:
        none = "every bootstrap sample has the same, none can be given"
        yield f"No interval of {', '.join(alike)}", [none]
    slope, intercept = interval(calibration["slope"]), interval(calibration["intercept"])
    before, after = (calibration[key]["brier"] for key in ("without", "with"))
    lines = [f"intercept {intercept}, 0 if right; slope {slope}, 1 if right"]
    if calibration["platt"] != {"slope": 1, "intercept": 0}:
        fitted = "the slope and intercept that were fitted on val and are part of every number here"
        lines.append(f"Brier {after:.3f} with {fitted}; {before:.3f} without")
    yield "Calibration", lines
    share = sum(report["counts"][key] for key in ("tp", "fn")) / report["n"]
    here = f"{100 * share:.0f} % of these images are PNEUMONIA. In a clinic where fewer are, a "
    lines = [f"{here}positive result means less. With the share taken as known:"]
    for each in report["elsewhere"]:
        values = f"PPV {interval(each['ppv'])}, NPV {interval(each['npv'])}"
        lines.append(f"{100 * each['prevalence']:4.3g} %: {values}")
    yield "What a result means elsewhere", lines
    if group := report["unlike"]:
        shift = f"; all are shifted by {group['shift'] or 0:.2f} deviations, {SHIFT} would be much"
        shift = "" if group["shift"] is None else shift
        names = ", ".join(group["files"][:SHOWN])
        more = ", ..." * (len(group["files"]) > SHOWN)
        counted = f"{group['over']} of {group['n']}, 1 in 100 expected{shift}"
        yield "Images unlike those of training", [f"{counted}{': ' * bool(names)}{names}{more}"]
    if numbers and "none" in numbers:
        none = f"none to compare with ({numbers['none']})"
        yield "One number instead of the network", [none]
    elif numbers:
        chosen = f"chosen on {numbers['fitted_on']} images of train/ and val/"
        lines = []
        for name in (numbers["number"], "all numbers"):
            each = numbers["numbers"][name]
            gain = f"network minus it {interval(each['difference'])}: {each['network_is']}"
            lines.append(f"{name:12} AUROC {each['auroc']:.3f}; {gain}")
        yield f"One number instead of the network, {chosen}", lines
    if other:
        lines = []
        for name in COMPARED:
            there = interval(other["other"][name])
            lines.append(f"{name:10} {interval(other['difference'][name])}; there {there}")
        only = f"{other['right_only_here']} images are right only here, {other['right_only_there']}"
        lines.append(f"{only} only there: p {other['p_value']:.3g} ({other['test']})")
        yield f"This model minus {other['with']} at threshold {other['threshold']:.4g}", lines
    if report["not_assessed"]:
        columns = f"no such column of 2 to 10 values in {METADATA}"
        yield "Not assessed", [f"{', '.join(report['not_assessed'])} ({columns})"]


# ---------------------------------------------------------------- the page

STYLE_SHEET = """
:root { color-scheme: light dark; --line: #8886; --warn: #d55e0022 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left }
td { font-variant-numeric: tabular-nums }
figure { margin: 0; break-inside: avoid } figure img { width: 100%; background: white }
.pictures { display: grid; gap: 1rem; margin-top: 1.5rem }
.pictures { grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)) }
.lead { font-size: 1.2rem } .warning { background: var(--warn); padding: .6rem 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere } small, figcaption { opacity: .8 }
"""
LIMITS = (
    "Not a medical device. A test on images of the same source is an internal test: no claim for "
    "other machines, framings, ages or diseases follows. Predictive values at the share of "
    "PNEUMONIA among the test images do not hold where fewer have it: see the table by prevalence."
)
LEAD = "accuracy", "auroc", "sensitivity", "specificity"
PICTURES = {
    "roc": "Every threshold: sensitivity against false alarms",
    "precision_recall": "Every threshold: precision against sensitivity",
    "confusion": "What was called what",
    "reliability": "Probability against what came true",
    "scores": "The probabilities of each class",
    "worst": "Where there are maps, orange speaks for PNEUMONIA, blue for NORMAL",
}


def write_page(folder, report, pictures):
    """report.html: metrics.json for a reader, in one file with the pictures of these names."""
    text, metrics = html.escape, report["metrics"]

    def rows(cells, tag="td"):
        lines = ("".join(f"<{tag}>{text(str(cell))}</{tag}>" for cell in row) for row in cells)
        return "".join(f"<tr>{line}</tr>" for line in lines)

    def picture(name, caption):
        content = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{content}" alt="{text(caption)}">'
        return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"

    names = {"f1": "F1", "auroc": "AUROC", "ppv": "PPV", "npv": "NPV", "ece": "ECE"}
    names = {name: names.get(name, name.replace("_", " ").capitalize()) for name in metrics}
    scores = [(names[name], interval(each)) for name, each in metrics.items()]
    first = [scores[list(metrics).index(name)] for name in LEAD]
    lead = ", ".join(f"{name} {value}" for name, value in first)
    if numbers := (report["shortcut"] or {}).get("numbers"):
        best = report["shortcut"]["number"]
        lead += f". An image's {best} alone has AUROC {numbers[best]['auroc']:.3f}: "
        lead += f"the network is {numbers[best]['network_is']}"
    groups = rows([("group", "score", "images", "value (95 % interval)")], "th") + rows(
        (each["group"], names[each["metric"]], each["n"], interval(each))
        for each in report["subgroups"].values()
    )
    counts = report["counts"]
    matrix = rows(
        [("NORMAL", counts["tn"], counts["fp"]), ("PNEUMONIA", counts["fn"], counts["tp"])]
    )
    checks = "".join(
        f"<h3>{text(title)}</h3><pre>{text(chr(10).join(lines))}</pre>"
        for title, lines in findings(report)
    )
    warnings = "".join(f'<p class="warning">Warning: {text(w)}</p>' for w in report["warnings"])
    small = "".join(picture(name, PICTURES[name]) for name in pictures if name != "worst")
    worst = ""
    if "worst" in pictures:
        worst = (
            f"<h2>The most wrong, or least sure, images</h2>{picture('worst', PICTURES['worst'])}"
        )
    title = f"Pneumonia on chest X-rays: {report['split']} result"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE_SHEET}</style>
</head><body>
<h1>{text(title)}</h1>
<p class="lead">{text(lead)}</p>
{warnings}
<table>{rows(particulars(report))}</table>
<h2>Scores</h2>
<table>{rows([("score", "value (95 % interval)")], "th")}{rows(scores)}</table>
<h3>Counts at the threshold</h3>
<table>{rows([("truth", "predicted NORMAL", "predicted PNEUMONIA")], "th")}{matrix}</table>
<div class="pictures">{small}</div>
{"<h2>Subgroups</h2><table>" + groups + "</table>" if report["subgroups"] else ""}
<h2>What stands beside the scores</h2>
{checks}
{worst}
<h2>How it was computed</h2>
<p>PNEUMONIA is the positive class, above the threshold. Intervals: {text(report["intervals"])}</p>
<h2>Limits</h2><p>{text(LIMITS)}</p>
<p><small>{text(versions)}</small></p>
</body></html>
"""
    with replacing(folder / "report.html", "w") as file:
        file.write(page)


# ---------------------------------------------------------------- a split, new images, a table


def summarise(report, table, args):
    """The report with every number of a table of predictions."""
    readable, threshold = table.readable(), report["threshold"]
    metrics, counts = measure(readable, threshold, args.seed)
    names = [patient_of(Path(file).name) or "" for file in readable.files]
    groups = measure_subgroups(readable, names, threshold, args.seed)
    drawn = {name: each for name, each in metrics.items() if name not in PROPORTIONS}
    about = {"proportions": ", ".join(PROPORTIONS), "draws": DRAWS, "seed": args.seed}
    return report | {
        "n": len(readable.files),
        "patients": len(set(readable.clusters())),
        "patients_by_class": count_patients(readable),
        "names_without_patient": readable.patients.count(None),
        "unreadable": len(table.files) - len(readable.files),
        "positive": CLASSES[1],
        "counts": counts,
        "metrics": metrics,
        "intervals": INTERVALS.format(**about),
        "without_spread": [k for k, v in drawn.items() if k != "ece" and v["low"] is None],
        "subgroups": groups,
        "elsewhere": at_prevalences(metrics, (*PREVALENCES, *args.prevalence)),
        "left_out": count_left_out(table, report["model"] or {}),
        "not_assessed": [n for n in NOT_ASSESSED if not any(g.startswith(f"{n} ") for g in groups)],
        "calibration": measure_calibration(readable, report["model"] or {}),
        "warnings": list(dict.fromkeys(report["warnings"] + below_chance(metrics["auroc"]))),
        "comparison": compare_with(args, readable, threshold) if args.compare else None,
        "versions": versions(*PACKAGES),
    }


def compare_with(args, table, threshold):
    """What metrics.json says about the difference to args.compare, of the same images."""
    other, report = read_predictions(args.compare).readable(), report_beside(args.compare)
    other_threshold = choose_threshold(args, report, args.compare)["threshold"]
    about = {"with": str(args.compare), "model": report.get("model"), "threshold": other_threshold}
    return about | compare(table, other, threshold, other_threshold, args.compare, args.seed)


def write_report(folder, report, table, pictures):
    write_predictions(folder / "predictions.csv", table, report["threshold"])
    write_json(folder / "metrics.json", report)
    draw_pictures(folder, table.readable(), report)
    write_page(folder, report, pictures)


def score_split(args):
    """DIR/test, or another split, with its labels."""
    if args.split == "test" and (args.data_dir / "train").is_dir():
        require_test(args)
    rows = read_metadata(args.data_dir)
    images = read_split(args.data_dir, args.split, rows=rows)[args.split]
    model = load_model(args.checkpoint, args.device, args.arch)
    require_outputs(args, model, "metrics.json", "predictions.csv")
    names = [image.path.relative_to(args.data_dir) for image in images]
    table, bad, unlike = predict(model, images, names, args)
    images = [images[row] for row in common.without_bad(images, bad, args.skip_bad)]

    training, reason = training_images(args.data_dir, rows)
    report = {"split": args.split, "data": str(args.data_dir / args.split)}
    report["model"] = describe_model(args.checkpoint, model.info)
    doubts = model.warnings + find_leaks(args, model, images, training) + warn_of_elsewhere(unlike)
    report |= {"warnings": doubts, "unlike": unlike}
    report |= choose_threshold(args, model.info, args.checkpoint.with_suffix(".json"))
    report = summarise(report, table, args)
    report["shortcut"] = None
    if args.split == "test":
        report["shortcut"] = numbers_instead(
            args, images, table.readable(), training, reason, common.SIZE
        )
    draw_worst(args.results_dir / "worst.png", model, images, table.readable(), report)
    write_report(args.results_dir, report, table, PICTURES)
    if args.cam:
        write_overlays(args.cam, model, images, table.readable())
    print_report(report)
    print(f"Written: report.html, metrics.json, predictions.csv and pictures in {args.results_dir}")
    print(f"The page to read and to send on: {args.results_dir / 'report.html'}")
    for warning in report["warnings"]:
        warn(warning)


def require_test(args):
    """A Failure where there is no test/: what to do, and that the model is not lost."""
    folder = args.data_dir / "test"
    if not folder.is_dir():
        saved = f"{args.checkpoint} is saved; " if args.checkpoint.exists() else ""
        make = "move whole patients there out of train/ before the split"
        val = "--split val scores the images that stopped the training, which is no test result"
        raise Failure(
            f"{folder}: no such folder, expected images to test on; {saved}{make} ({val})"
        )


def classify(args):
    """New images: files, and the images directly inside folders."""
    images, path = named_images(args.images), args.results_dir / "new_predictions.csv"
    model = load_model(args.checkpoint, args.device, args.arch)
    require_outputs(args, model, path.name)
    table, bad, unlike = predict(model, images, [image.path for image in images], args)
    chosen = choose_threshold(args, model.info, args.checkpoint.with_suffix(".json"))
    threshold, replaced = chosen["threshold"], path.exists()
    common.without_bad(images, bad, args.skip_bad)
    write_predictions(path, table, threshold)
    print(f"Model {args.checkpoint}, threshold {threshold:.4g} ({chosen['threshold_from']})\n")
    width = max(map(len, table.files))
    print(f"{'file':{width}}  P(PNEUMONIA)  prediction")
    for name, _, prob, error, far, *_ in zip(*table, strict=True):
        shown = "-" if error else f"{prob:.3f}"
        odd = f", unlike the training images ({far:.2g})" if far > 1 else ""
        print(f"{name:{width}}  {shown:>12}  {error or CLASSES[int(prob > threshold)]}{odd}")
    for warning in model.warnings + warn_of_elsewhere(unlike):
        warn(warning)
    if args.cam:
        readable = [image for row, image in enumerate(images) if row not in bad]
        write_overlays(args.cam, model, readable, table.readable())
    print(f"\nWritten: {path}{', in place of an earlier one' if replaced else ''}")


def named_images(paths):
    """[Film] of the files, and of the image files directly inside the folders."""
    found = []
    for path in paths:
        if not path.is_dir() and not path.is_file():
            raise Failure(f"{path}: expected an image or a folder, found no such file")
        inside = list_images(path, others=True) if path.is_dir() else [path]
        if not inside:
            expected = f"expected images ({image_suffixes()}) directly inside"
            if classes := [str(path / name) for name in CLASSES if (path / name).is_dir()]:
                expected = f"holds class folders, name these: {' '.join(classes)}; {expected}"
            raise Failure(f"{path}: {expected}, found none")
        found += inside
    return [Film(path, None, hash_file(path)) for path in found]


def report_beside(path):
    """The metrics.json beside a predictions.csv, {} where there is none or the name is another."""
    if path.name != "predictions.csv":
        return {}
    return read_json(path.with_name("metrics.json")) or {}


def score_again(args):
    """--from: an earlier predictions.csv, without images and network."""
    table, before = read_predictions(args.source), report_beside(args.source)
    if args.results_dir:
        require_outputs(args, None, "metrics.json", "predictions.csv")
    report = {"split": args.split, "data": str(args.source), "model": None, "shortcut": None}
    report |= {"warnings": [], "unlike": None}
    report |= {key: before[key] for key in report if key in before}
    report |= choose_threshold(args, before, args.source.with_name("metrics.json"))
    report = summarise(report, table, args)
    there = before.get("metrics", {}).get("auroc", {}).get("value", math.nan)
    here = report["metrics"]["auroc"]["value"]
    # then what is known of the numbers was held against other probabilities
    if abs(there - here) > 1e-6:
        differs = f"AUROC {here:.3f}, there {there:.3f}"
        about = f"{args.source} is not the table that metrics.json beside it describes ({differs})"
        report |= {"shortcut": None, "warnings": [*report["warnings"], about]}
    if args.results_dir:
        drawn = [name for name in PICTURES if name != "worst"]  # for want of the images
        write_report(args.results_dir, report, table, drawn)
    print_report(report)
    if args.results_dir:
        print(f"Written: all but worst.png, for want of the images, in {args.results_dir}")
    for warning in report["warnings"]:
        warn(warning)


def require_outputs(args, model, *names):
    """A Failure, before the work, where what is to be written cannot be."""
    require_writable(*(args.results_dir / name for name in names))
    if not args.cam:
        return
    splits = [args.data_dir / split for split in ("train", "val", "test")]
    folders = [split / name for split in splits for name in CLASSES]
    folders += [path if path.is_dir() else path.parent for path in args.images]
    ours = {args.cam.resolve(), *((args.cam / name).resolve() for name in CLASSES)}
    if ours & {path.resolve() for path in folders}:
        raise Failure(f"--cam {args.cam}: images lie there, and maps would count as images")
    noise = torch.randint(256, (1, 1, common.SIZE, common.SIZE), dtype=torch.uint8)
    if class_maps(model, noise) is None:
        ending = f"{model.info['arch']} does not end in global average pooling and one Linear"
        raise Failure(f"--cam: {ending}, so that it has no maps; leave --cam out")
    require_writable(args.cam / "map.png")


# ---------------------------------------------------------------- command line


def probability(text):
    if text == "youden" or text.startswith("sensitivity="):
        raise argparse.ArgumentTypeError(f"{text} is fitted on val while training: train.py")
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text}")
    return value


def parse_args(argv=None):
    parser = Parser("evaluate.py", __doc__)
    add, none = parser.add_argument, argparse.SUPPRESS  # SUPPRESS: no "default: None" in the help
    parser.set_defaults(images=[], threshold=None, cam=None, source=None, compare=None, arch=None)
    parser.set_defaults(split=None, prevalence=[])
    add_flags(parser, *RUN_FLAGS)
    # fmt: off
    add("images", nargs="*", type=Path, default=none, metavar="FILE_OR_FOLDER",
        help="classify these, not a split")
    add("--arch", default=none, metavar="NAME",
        help="the network of a --checkpoint without model.json (default: resnet50)")
    add("--split", choices=("test", "val", "train"), default=none,
        help="the images to score (default: test)")
    add("--threshold", type=probability, default=none, metavar="T",
        help="P(PNEUMONIA) above which an image is PNEUMONIA, 0 to 1 (default: the one stored "
             "with the model)")
    add("--prevalence", type=number(float, 1e-6, 1 - 1e-6), action="append", default=none,
        metavar="P",
        help="share of PNEUMONIA elsewhere, between 0 and 1, may be repeated: what a result means "
             "there, beside the usual shares")
    add("--cam", type=Path, default=none, metavar="DIR",
        help="also write a class activation map of each image there, below --results-dir")
    add("--from", type=Path, default=none, dest="source", metavar="CSV",
        help="score this predictions.csv, or the one in this folder, again, without images and "
             "network; prints, and writes only where --results-dir is given")
    add("--compare", type=Path, default=none, metavar="CSV",
        help="predictions.csv, or its folder, of another model for the same images: this one minus "
             "that one (--threshold then holds for both)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.images and (args.source or args.compare):
        parser.error("FILE_OR_FOLDER: --from and --compare need labels, and work on a split only")
    if args.source and args.split:
        parser.error("--split: the table of --from has its split")
    args.split = args.split or "test"
    if args.source and args.cam:
        parser.error("--cam: needs the images, --from has none")
    if args.cam:
        args.cam = args.results_dir / args.cam
    for name in ("source", "compare"):
        if (path := getattr(args, name)) and path.is_dir():
            setattr(args, name, path / "predictions.csv")
    if args.source and args.results_dir is FLAGS["--results-dir"]["default"]:
        args.results_dir = None  # not given: --from only prints
    return args


def main(argv=None):
    args = parse_args(argv)
    command = score_again if args.source else classify if args.images else score_split
    return run(command, args, "evaluate.py")


if __name__ == "__main__":
    sys.exit(main())
