"""Scores the saved network on DIR/test, or classifies any images.

Reads model.pth and model.json. Writes report.html, predictions.csv, metrics.json and six pictures
into results/, with 95 % intervals. New images get new_predictions.csv. With --from it needs neither
images nor network, only an earlier predictions.csv, and prints.

    python evaluate.py
    python evaluate.py scan.png folder/ --cam maps/
    python evaluate.py --from results/predictions.csv --threshold 0.7 --compare other/results.csv
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import common  # first: it says what to do where a package is missing

# isort: split
import torch
from torch import nn

from cxr.bootstrap import DRAWS, INTERVALS
from cxr.checkpoint import read_state_dict
from cxr.cli import FLAGS, RUN_FLAGS, Parser, add_flags, number, run
from cxr.compare import compare
from cxr.errors import Failure, warn
from cxr.files import check_writable, hash_file, read_json, versions, write_json
from cxr.folders import CLASSES, image_suffixes, list_images
from cxr.leaks import leak_warnings, list_training_xrays
from cxr.maps import class_maps, write_overlays
from cxr.novelty import measure_novelty, novelty_warnings
from cxr.page import NOT_ASSESSED, PICTURES, print_report, write_page
from cxr.patients import Xray, patient_from_name, read_metadata, read_split
from cxr.plots import draw_pictures, draw_worst
from cxr.predictions import (
    COLUMNS,
    Table,
    count_left_out,
    count_patients,
    read_predictions,
    write_predictions,
)
from cxr.proportions import PREVALENCES, PROPORTIONS, predictive_values
from cxr.scores import below_chance, measure_calibration, measure_scores, measure_subgroups
from cxr.shortcuts import single_number_baselines

PACKAGES = ("torch", "torchvision", "torchmetrics", "scipy", "scikit-learn", "numpy", "pillow")

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
    state, about = read_state_dict(path), path.with_suffix(".json")
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
        unlike[good], group = measure_novelty(features[good], model.info["features"])
        far = [row for row in unlike.nan_to_num().argsort(descending=True) if unlike[row] > 1]
        group["files"] = [files[row] for row in far]
    table = Table(
        files=files,
        labels=[image.label for image in images],
        probs=probs.numpy(),
        errors=[bad.get(row, "") for row in range(len(images))],
        unlike=unlike.numpy(),
        patients=[image.patient for image in images],
        about=[{k: v for k, v in (i.metadata or {}).items() if k not in COLUMNS} for i in images],
    )
    return table, bad, group


# ---------------------------------------------------------------- a split, new images, a table


def summarise(report, table, args):
    """The report with every number of a table of predictions."""
    readable, threshold = table.readable(), report["threshold"]
    metrics, counts = measure_scores(readable, threshold, args.seed)
    names = [patient_from_name(Path(file).name) or "" for file in readable.files]
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
        "elsewhere": predictive_values(metrics, (*PREVALENCES, *args.prevalence)),
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
        check_test_exists(args)
    rows = read_metadata(args.data_dir)
    images = read_split(args.data_dir, args.split, rows=rows)[args.split]
    model = load_model(args.checkpoint, args.device, args.arch)
    check_outputs(args, model, "metrics.json", "predictions.csv")
    names = [image.path.relative_to(args.data_dir) for image in images]
    table, bad, unlike = predict(model, images, names, args)
    images = [images[row] for row in common.drop_unreadable(images, bad, args.skip_bad)]

    training, reason = list_training_xrays(args.data_dir, rows)
    report = {"split": args.split, "data": str(args.data_dir / args.split)}
    report["model"] = describe_model(args.checkpoint, model.info)
    doubts = (
        model.warnings + leak_warnings(args, model, images, training) + novelty_warnings(unlike)
    )
    report |= {"warnings": doubts, "unlike": unlike}
    report |= choose_threshold(args, model.info, args.checkpoint.with_suffix(".json"))
    report = summarise(report, table, args)
    report["shortcut"] = None
    if args.split == "test":
        report["shortcut"] = single_number_baselines(
            args, images, table.readable(), training, reason, common.SIZE
        )
    views = common.Views(images, 1, model.info.get("window", 0))
    draw_worst(args.results_dir / "worst.png", model, views, table.readable(), report)
    write_report(args.results_dir, report, table, PICTURES)
    if args.cam:
        write_overlays(args.cam, model, views, table.readable())
    print_report(report)
    print(f"Written: report.html, metrics.json, predictions.csv and pictures in {args.results_dir}")
    print(f"The page to read and to send on: {args.results_dir / 'report.html'}")
    for warning in report["warnings"]:
        warn(warning)


def check_test_exists(args):
    """A Failure where there is no test/: what to do, and that the model is not lost."""
    folder = args.data_dir / "test"
    if not folder.is_dir():
        saved = f"{args.checkpoint} is saved; " if args.checkpoint.exists() else ""
        make = "move whole patients there out of train/ before the split"
        val = "--split val scores the images that stopped the training, which is no test result"
        raise Failure(
            f"{folder}: no such folder, expected images to test on; {saved}{make} ({val})"
        )


def classify_new(args):
    """New images: files, and the images directly inside folders."""
    images, path = list_named_images(args.images), args.results_dir / "new_predictions.csv"
    model = load_model(args.checkpoint, args.device, args.arch)
    check_outputs(args, model, path.name)
    table, bad, unlike = predict(model, images, [image.path for image in images], args)
    chosen = choose_threshold(args, model.info, args.checkpoint.with_suffix(".json"))
    threshold, replaced = chosen["threshold"], path.exists()
    common.drop_unreadable(images, bad, args.skip_bad)
    write_predictions(path, table, threshold)
    print(f"Model {args.checkpoint}, threshold {threshold:.4g} ({chosen['threshold_from']})\n")
    width = max(map(len, table.files))
    print(f"{'file':{width}}  P(PNEUMONIA)  prediction")
    for name, _, prob, error, far, *_ in zip(*table, strict=True):
        shown = "-" if error else f"{prob:.3f}"
        odd = f", unlike the training images ({far:.2g})" if far > 1 else ""
        print(f"{name:{width}}  {shown:>12}  {error or CLASSES[int(prob > threshold)]}{odd}")
    for warning in model.warnings + novelty_warnings(unlike):
        warn(warning)
    if args.cam:
        readable = [image for row, image in enumerate(images) if row not in bad]
        views = common.Views(readable, 1, model.info.get("window", 0))
        write_overlays(args.cam, model, views, table.readable())
    print(f"\nWritten: {path}{', in place of an earlier one' if replaced else ''}")


def list_named_images(paths):
    """[Xray] of the files, and of the image files directly inside the folders."""
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
    return [Xray(path, None, hash_file(path)) for path in found]


def report_beside(path):
    """The metrics.json beside a predictions.csv, {} where there is none or the name is another."""
    if path.name != "predictions.csv":
        return {}
    return read_json(path.with_name("metrics.json")) or {}


def rescore(args):
    """--from: an earlier predictions.csv, without images and network."""
    table, before = read_predictions(args.source), report_beside(args.source)
    if args.results_dir:
        check_outputs(args, None, "metrics.json", "predictions.csv")
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


def check_outputs(args, model, *names):
    """A Failure, before the work, where what is to be written cannot be."""
    check_writable(*(args.results_dir / name for name in names))
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
    check_writable(args.cam / "map.png")


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
    command = rescore if args.source else classify_new if args.images else score_split
    return run(command, args, "evaluate.py")


if __name__ == "__main__":
    sys.exit(main())
