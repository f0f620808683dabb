"""Scores the saved network on the test images, or classifies new images.

Reads model.pth and model.json. Writes report.html, methods.md, metrics.json, predictions.csv and
six pictures into results/; the scores have 95 % intervals. For new images it writes
new_predictions.csv and the page new_predictions.html. With --from, it scores an earlier
predictions.csv again, without images, and prints only.

    python evaluate.py
    python evaluate.py scan.png folder/ --cam maps/
    python evaluate.py --from results/predictions.csv --threshold 0.7
    python evaluate.py --compare other/predictions.csv
    python evaluate.py --also other_hospital/
"""

import argparse
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import common  # before torch: it imports cxr, which reports missing packages

# isort: split
import pandas as pd
import torch
from torch import nn

from cxr.also import Table, compare_sources, read_tables, report_of_source, roc_curves
from cxr.bootstrap import DRAWS, INTERVALS
from cxr.checkpoint import read_state_dict
from cxr.cli import Parser, add_flags, add_network_flags, call, class_name, number, run
from cxr.compare import compare, match_predictions
from cxr.errors import Failure, as_typed, warn
from cxr.files import check_writable, hash_file, printable, read_json, versions, write_json
from cxr.films import find_lateral, lateral_warnings
from cxr.folders import (
    CLASSES,
    DRAWN,
    SPLITS,
    find_other_classes,
    image_suffixes,
    in_words,
    list_images,
)
from cxr.gallery import LIMIT, Thumbnails, choose_images, write_gallery
from cxr.leaks import find_leaks, known_hashes, leak_warnings, list_training_xrays
from cxr.maps import class_maps, write_overlays
from cxr.model_info import (
    choose_classes,
    choose_threshold,
    classes_of,
    model_for_report,
    read_model_info,
)
from cxr.novelty import measure_novelty, novelty_warnings
from cxr.page import write_page
from cxr.patients import Xray, choose_hash_dir, read_metadata, read_split
from cxr.plots import draw_pictures, draw_roc_of_sources, draw_worst
from cxr.predictions import (
    COLUMNS,
    as_arrays,
    drop_unreadable,
    predicted_classes,
    read_predictions,
    with_etiology,
    write_predictions,
)
from cxr.proportions import PREVALENCES, PROPORTIONS, few_patients_warnings, predictive_values
from cxr.scores import (
    BCA_INTERVAL,
    T_INTERVAL,
    below_chance,
    check_both_classes,
    count_outcomes,
    measure_calibration,
    measure_scores,
    measure_subgroups,
    score,
)
from cxr.screen import name_label, print_predictions, print_report, print_warnings
from cxr.sentences import number_label
from cxr.sources import (
    Source,
    read_sources,
    refuse_first_source,
    refuse_training_images,
    source_name,
    source_warnings,
)
from cxr.transforms import compare_transforms

PACKAGES = ("torch", "torchvision", "torchmetrics", "scipy", "scikit-learn", "numpy", "pillow")
NOT_ASSESSED = ("age", "sex", "device")  # subgroups that a reader expects; see metadata.csv

# ---------------------------------------------------------------- the model


class Model(NamedTuple):
    """A trained network."""

    backbone: common.Backbone
    device: torch.device
    head: nn.Linear  # the one output neuron
    info: dict  # the content of model.json, as far as it belongs to the network
    warnings: list


def load_model(path, device_name, arch=None, classes=None):
    """Loads a checkpoint of train.py, or the state dict of any network with one output.

    arch, classes: for a state dict without model.json (None = resnet50, and the default of
    --classes). Raises Failure if they contradict model.json, or if the checkpoint does not fit.
    """
    state = read_state_dict(path)
    info, warnings = read_model_info(path, arch, classes)
    try:
        backbone = common.build_backbone(info["arch"], state, path)
    except Failure as error:
        # A missing or foreign model.json may be the cause.
        raise Failure("; ".join([str(error), *warnings])) from None
    head = build_head(backbone, path)
    warnings += transform_warnings(backbone, info, path)
    device, _ = common.pick_device(device_name)
    return Model(backbone, device, head, info, warnings)


def build_head(backbone, path):
    """Returns the output neuron of a checkpoint. Raises Failure if there is not exactly one."""
    weight, bias, width = backbone.weight, backbone.bias, backbone.width
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (weight, bias)]
    if shapes != [(1, width), (1,)]:
        raise Failure(
            f"{path}: expected one output neuron with {width} inputs in {backbone.head_name}, "
            f"found weight and bias {shapes}; train.py {as_typed('--weights', 'WEIGHTS', path)} "
            "trains a new one on this network"
        )
    head = nn.Linear(width, 1).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


def transform_warnings(backbone, info, path):
    """Returns a warning if the transforms of common.py are not those of the training.

    Raises Failure if the size of the images, or the mean or standard deviation, differ.
    """
    if not info.get("transforms"):
        return []
    prepare, *_, normalize = info["transforms"]  # augmentation is for training only
    now = [str(common.PREPARE), str(backbone.normalize)]
    return compare_transforms([prepare, normalize], now, path)


# ---------------------------------------------------------------- predictions


def predict(model, xrays, names, args, on_image=None):
    """Predicts images, in float32 on every device.

    names: of the images in the table; on_image: as in common.extract_features. Unreadable images
    have a row with their error.
    Returns (predictions, a DataFrame as in cxr/predictions.py; novelty of all images together, or
    None).
    """
    options = {"n_views": 1, "window": model.info.get("window", 0), "device": model.device}
    features, _, unreadable = common.extract_features(
        model.backbone, xrays, args, dtype=torch.float32, on_image=on_image, **options
    )
    features = features[:, 0]  # of the only view, the image as it is
    probs = model.head(features).squeeze(1).sigmoid()
    if not probs.isfinite().all():
        raise Failure(f"{args.checkpoint}: gives probabilities that are not finite; train again", 3)
    columns = {
        "number": range(1, len(xrays) + 1),
        "file": names,
        "label": [xray.label for xray in xrays],
        "probability": math.nan,
        "error": [unreadable.get(xray.path, "") for xray in xrays],
        "unlike": math.nan,
        "patient": [xray.patient or "" for xray in xrays],
    }
    predictions = pd.DataFrame(columns).astype({"probability": "float32", "unlike": "float32"})
    is_readable = predictions["error"] == ""
    predictions.loc[is_readable, "probability"] = probs.numpy()
    novelty = None
    if is_readable.any() and "features" in model.info:
        values, novelty = measure_novelty(features, model.info["features"])
        predictions.loc[is_readable, "unlike"] = values.numpy()
        farthest_first = predictions.sort_values("unlike", ascending=False, kind="stable")
        novelty["files"] = farthest_first["file"][farthest_first["unlike"] > 1].tolist()
    metadata = pd.DataFrame([xray.metadata or {} for xray in xrays])
    metadata = metadata.drop(columns=list(COLUMNS), errors="ignore").fillna("")
    return predictions.join(metadata), novelty


def readable_views(model, xrays, predictions):
    """Returns the views of the images that could be read, one for each image."""
    pairs = zip(xrays, predictions["error"], strict=True)
    readable = [xray for xray, error in pairs if not error]
    return common.Views(readable, 1, model.info.get("window", 0))


def read_other(args, files, labels, classes):
    """Reads the table of --compare before the work, to find a wrong file at once; None without it.

    files, labels: of the images that will be scored; classes: of the model.
    """
    if not args.compare:
        return None
    report = report_beside(args.compare)
    if report and classes_of(report) != classes:
        expected, found = in_words(classes), in_words(classes_of(report))
        raise Failure(
            f"{args.compare}: expected the classes {expected}, in this order, found {found}"
        )
    other = drop_unreadable(read_predictions(args.compare, classes))
    unknown = sorted(set(other["file"]) - set(files))
    if unknown:
        raise Failure(
            f"{args.compare}: expected predictions for the same {len(files)} images; it also "
            f"has {len(unknown)} others, for example {unknown[0]}"
        )
    if not args.skip_bad:
        match_predictions(other, files, labels, args.compare)
    return other


# ---------------------------------------------------------------- the report


def summarise(predictions, origin, other, args):
    """Returns the whole content of metrics.json as a dict.

    predictions: all images, with the unreadable ones; origin: the part of the content that is known
    before the scores (see describe_origin); other: the table of --compare, or None.
    """
    readable = drop_unreadable(predictions)
    classes = origin["classes"]
    check_both_classes(readable, classes)
    _, labels, patients = as_arrays(readable)
    model, threshold = origin["model"] or {}, origin["threshold"]
    metrics = measure_scores(readable, threshold, args.seed)
    subgroups = measure_subgroups(with_etiology(readable), threshold, args.seed)
    assessed = {key.partition(" ")[0] for key in subgroups}  # a key is "column value, score"
    n_patients = {name: len(set(patients[labels == label])) for label, name in enumerate(classes)}
    warnings = origin["warnings"] + novelty_warnings(origin["unlike"])
    warnings += below_chance(metrics["auroc"], n_patients)
    warnings += few_patients_warnings(origin["split"], n_patients)
    return {
        **origin,
        "warnings": list(dict.fromkeys(warnings)),  # each once
        "unlike": with_numbers(origin["unlike"], predictions),
        "n": len(readable),
        "patients": len(set(patients)),
        "patients_by_class": n_patients,
        "names_without_patient": int((readable["patient"] == "").sum()),
        "unreadable": len(predictions) - len(readable),
        "positive": classes[1],
        "counts": count_outcomes(readable, threshold),
        "metrics": metrics,
        "intervals": INTERVALS.format(
            proportions=", ".join(PROPORTIONS),
            t_interval=" and ".join(T_INTERVAL),
            bca_interval=" and ".join(BCA_INTERVAL),
            draws=DRAWS,
            seed=args.seed,
        ),
        "without_spread": list_without_interval(metrics),
        "subgroups": subgroups,
        "elsewhere": predictive_values(metrics, (*PREVALENCES, *args.prevalence)),
        "left_out": count_left_out(predictions, model),
        "not_assessed": [name for name in NOT_ASSESSED if name not in assessed],
        "calibration": measure_calibration(readable, model),
        "comparison": compare_with_other(readable, threshold, other, args),
        "versions": versions(*PACKAGES),
    }


def with_numbers(novelty, predictions):
    """Adds the numbers of novelty["files"] to the result of measure_novelty, which may be None."""
    if novelty is None:
        return None
    numbers = dict(zip(predictions["file"], predictions["number"].tolist(), strict=True))
    return novelty | {"numbers": [numbers[f] for f in novelty["files"] if f in numbers]}


def list_without_interval(metrics):
    """Returns the scores that have no interval because all bootstrap samples are equal."""
    names = [name for name in metrics if name in (*T_INTERVAL, *BCA_INTERVAL)]
    return [name for name in names if metrics[name]["low"] is None]


def count_left_out(predictions, model):
    """Returns {split/class: number of unreadable images}, in training and among the scored ones."""
    unreadable = predictions.loc[predictions["error"] != "", "file"]
    files = dict.fromkeys([*model.get("skipped", []), *unreadable])
    return Counter(Path(file).parent.as_posix() for file in files)


def compare_with_other(readable, threshold, other, args):
    """Compares with the --compare table, at --threshold or its own one; None without a table."""
    if other is None:
        return None
    report = report_beside(args.compare)
    other_threshold, _ = choose_threshold(args, report, args.compare)
    _, labels, _ = as_arrays(readable)
    other = match_predictions(other, readable["file"].tolist(), labels, args.compare)
    result = {"with": str(args.compare), "model": report.get("model"), "threshold": other_threshold}
    return result | compare(readable, other, threshold, other_threshold, args.seed)


def report_beside(path):
    """Returns the metrics.json beside a predictions.csv, {} if there is none.

    For the table of a source of --also, it is the part that holds for this source.
    """
    if not path.name.startswith("predictions"):
        return {}
    report = read_json(path.with_name("metrics.json")) or {}
    return report if path.name == "predictions.csv" else report_of_source(report, path.name)


def write_report(folder, report, tables, worst=()):
    """Writes all files of a report except worst.png.

    tables: of all sources, the first one first; worst: the most wrongly classified images (see
    draw_worst), for the page.
    """
    first, *others = tables
    threshold, classes = report["threshold"], report["classes"]
    write_predictions(folder / "predictions.csv", first.predictions, threshold, classes)
    for table in others:
        write_predictions(folder / table.file, table.predictions, threshold, classes)
    write_json(folder / "metrics.json", report)
    readable, curves = drop_unreadable(first.predictions), roc_curves(tables, report)
    draw_pictures(folder, readable, report)
    if others:
        draw_roc_of_sources(folder / "roc_sources.png", curves, report)
    write_page(folder, report, readable, worst, curves)


# ---------------------------------------------------------------- a split, new images, a table


def score_split(args):
    """Scores the images of a split, which have labels. Returns the content of metrics.json."""
    check_test_exists(args)
    model = load_model(args.checkpoint, args.device, args.arch, args.classes)
    classes = model.info["classes"]
    check_folder_names(args, classes)
    rows = read_metadata(args.data_dir, classes)
    hash_dir = choose_hash_dir(args)
    xrays = read_split(args.data_dir, args.split, classes=classes, rows=rows, hash_dir=hash_dir)
    names = [printable(xray.path.relative_to(args.data_dir)) for xray in xrays]
    other = read_other(args, names, [xray.label for xray in xrays], classes)
    training, reason = list_training_xrays(args.data_dir, rows, classes, hash_dir)
    sources = read_sources(args.also, args.data_dir, classes, hash_dir)
    refuse_training_images(sources, set.union(*known_hashes(model.info, training)))
    first = Source(source_name(args.data_dir), args.data_dir, xrays, names)
    refuse_first_source(sources, first)
    check_outputs(args, model, "metrics.json", "predictions.csv")
    predictions, novelty = predict(model, xrays, names, args)
    views = readable_views(model, xrays, predictions)
    readable = drop_unreadable(predictions)
    origin = describe_origin(args, model, readable, views.xrays, training, reason, novelty)
    origin["warnings"] += source_warnings(sources, first, training, common.SIZE)
    tables = [Table(first.name, origin["data"], predictions, novelty)]
    for source in sources:
        scored = predict(model, source.xrays, source.files, args)
        tables.append(Table(source.name, str(source.folder), *scored))
        origin["warnings"] += [f"source {source.name}: {x}" for x in novelty_warnings(scored[1])]
    report = summarise(predictions, origin, other, args)
    report["also"] = compare_sources(tables, report, args.seed)
    worst = draw_worst(args.results_dir / "worst.png", model, views, readable, report)
    write_report(args.results_dir, report, tables, worst)
    if args.cam:
        write_overlays(args.cam, model, views, readable)
    print_report(report, predictions)
    print(f"Wrote report.html, metrics.json, predictions.csv and pictures to {args.results_dir}")
    print(f"The report to read (it shows X-rays): {args.results_dir / 'report.html'}")
    print_warnings(report, predictions)
    return report


def describe_origin(args, model, predictions, xrays, training, reason, novelty):
    """Returns the part of metrics.json that is known before the scores.

    predictions, xrays: the readable images; training, reason: the result of list_training_xrays.
    """
    # Slow to import: scikit-learn.
    from cxr.confounders import compare_with_columns, confounder_warnings
    from cxr.shortcuts import single_number_baselines

    classes = model.info["classes"]
    info_file = args.checkpoint.with_suffix(".json")
    threshold, threshold_from = choose_threshold(args, model.info, info_file)
    warnings = list(model.warnings)
    if "val_patients" in model.info:  # an earlier version did not write them
        warnings += few_patients_warnings("val", model.info["val_patients"])
    leaks = find_leaks(model.info, xrays, predictions["number"], training)
    warnings += leak_warnings(leaks, args.split, number_label)
    baselines = confounders = None
    if args.split == "test":
        baselines = single_number_baselines(
            predictions, xrays, training, reason, common.SIZE, args.seed
        )
        confounders = compare_with_columns(predictions, xrays, training, classes, args.seed)
    return {
        "classes": classes,
        "split": args.split,
        "data": str(args.data_dir / args.split),
        "model": model_for_report(args.checkpoint, model.info),
        "commands": [args.command],
        "drawn": (args.data_dir / DRAWN).exists(),
        "warnings": warnings + confounder_warnings(confounders),
        "leaks": leaks,
        "unlike": novelty,
        "threshold": threshold,
        "threshold_from": threshold_from,
        "shortcut": baselines,
        "confounders": confounders,
    }


def classify_new(args):
    """Classifies new images: files, and the images directly inside folders.

    Writes the table, which has a row for each image, and the page. Returns the table, a DataFrame
    with the columns of new_predictions.csv. Without --skip-bad, raises Failure at the end, whose
    result is the table, if an image could not be read.
    """
    model = load_model(args.checkpoint, args.device, args.arch, args.classes)
    classes = model.info["classes"]
    xrays = list_named_images(args.images, classes)
    path, page = (args.results_dir / f"new_predictions.{suffix}" for suffix in ("csv", "html"))
    check_outputs(args, model, path.name, page.name)
    names = [printable(xray.path) for xray in xrays]
    thumbnails = Thumbnails()
    # Of very many images, the page shows few: it decodes these again.
    on_image = thumbnails.add if len(xrays) <= 10 * LIMIT else None
    predictions, novelty = predict(model, xrays, names, args, on_image)
    info_file = args.checkpoint.with_suffix(".json")
    threshold, threshold_from = choose_threshold(args, model.info, info_file)
    replaced = "; it replaced an earlier one" if path.exists() else ""
    write_predictions(path, predictions, threshold, classes)
    print(f"Model {args.checkpoint}, threshold {threshold:.4g} ({threshold_from})\n")
    print_predictions(predictions, threshold, classes)
    warnings, lateral = model.warnings + novelty_warnings(novelty), find_lateral(xrays)
    for text in warnings + lateral_warnings(lateral, len(xrays), name_label(predictions)):
        warn(text)
    if args.cam:
        views = readable_views(model, xrays, predictions)
        readable = drop_unreadable(predictions)
        write_overlays(args.cam, model, views, readable, thumbnails.add)
    report = {
        "classes": classes,
        "model": model_for_report(args.checkpoint, model.info),
        "threshold": threshold,
        "threshold_from": threshold_from,
        "warnings": warnings + lateral_warnings(lateral, len(xrays), number_label),
    }
    add_missing_thumbnails(thumbnails, model, xrays, predictions, threshold, args)
    write_gallery(page, report, predictions, xrays, thumbnails)
    print(f"\nWrote {path}{replaced}")
    print(f"The page to look at (it shows X-rays): {page}")
    table = predictions.assign(prediction=predicted_classes(predictions, threshold, classes))
    bad = predictions[predictions["error"] != ""]
    if len(bad) and not args.skip_bad:
        first = f"{bad['file'].iloc[0]}: {bad['error'].iloc[0]}"
        what = f"{len(bad)} of {len(predictions)} images could not be read ({first})"
        advice = "accept this with --skip-bad (make: ARGS=--skip-bad)"
        message = f"{what}; {path} lists all. Repair or remove them, or {advice}"
        raise Failure(message, result=table)
    return table


def add_missing_thumbnails(thumbnails, model, xrays, predictions, threshold, args):
    """Decodes the images of the page whose features come from the cache, for their thumbnails."""
    shown = [xrays[number - 1] for number in choose_images(predictions, threshold)["number"]]
    missing = [xray for xray in shown if xray.path not in thumbnails.images]
    if missing:
        views = common.Views(missing, 1, model.info.get("window", 0))
        with common.one_thread():  # 0.9 ms of CPU time for a small image; 13 ms with two threads
            thumbnails.add_all(views, args.workers, model.device)


def rescore(args):
    """Scores an earlier predictions.csv again (--from), without images and network.

    Returns the content of metrics.json, also if it is not written.
    """
    before = report_beside(args.source)
    classes = choose_classes(args.classes, before, args.source.with_name("metrics.json"))
    predictions = read_predictions(args.source, classes)
    readable = drop_unreadable(predictions)
    files, labels = readable["file"].tolist(), readable["label"].tolist()
    other = read_other(args, files, labels, classes)
    tables = read_tables(predictions, before, args.source, classes)
    if args.results_dir:
        check_outputs(args, None, "metrics.json", "predictions.csv")
    origin = earlier_origin(args, predictions, before, classes)
    report = summarise(predictions, origin, other, args)
    report["also"] = compare_sources(tables, report, args.seed)
    if args.results_dir:
        write_report(args.results_dir, report, tables)
    print_report(report, predictions)
    if args.results_dir:
        print(f"Wrote all files except worst.png, which needs the images, to {args.results_dir}")
    print_warnings(report, predictions)
    return report


def earlier_origin(args, predictions, before, classes):
    """Returns a dict like that of describe_origin. before: the earlier metrics.json, or {}."""
    metrics_file = args.source.with_name("metrics.json")
    threshold, threshold_from = choose_threshold(args, before, metrics_file)
    mismatch = table_warnings(predictions, before, args.source)
    return {
        "classes": classes,
        "split": before.get("split", args.split),
        "data": before.get("data", str(args.source)),
        "model": before.get("model"),
        "commands": list(dict.fromkeys([*before.get("commands", []), args.command])),
        "drawn": before.get("drawn", False),
        "warnings": [*before.get("warnings", []), *mismatch],
        "leaks": before.get("leaks"),
        "unlike": before.get("unlike"),
        "threshold": threshold,
        "threshold_from": threshold_from,
        # If the tables differ, the baselines belong to other probabilities.
        "shortcut": None if mismatch else before.get("shortcut"),
        "confounders": None if mismatch else before.get("confounders"),
    }


def table_warnings(predictions, before, path):
    """Returns a warning if the AUROC of a table is not that in the metrics.json beside it."""
    probs, labels, _ = as_arrays(drop_unreadable(predictions))
    if len(set(labels)) < 2:
        return []  # summarise says so
    auroc = score(torch.from_numpy(probs), torch.from_numpy(labels), 0.5, ("auroc",))["auroc"]
    auroc_before = before.get("metrics", {}).get("auroc", {}).get("value", math.nan)
    if not abs(auroc - auroc_before) > 1e-6:
        return []
    values = f"AUROC {auroc:.3f}, in metrics.json {auroc_before:.3f}"
    advice = "Put the table into a folder without metrics.json, or restore the one of this run"
    what = f"{path.name} is not the table that the metrics.json beside it describes ({values})"
    return [f"{what}. {advice}"]


def check_test_exists(args):
    """Raises Failure if there is train/ but no test/. The message says that the model is saved."""
    folder = args.data_dir / "test"
    if args.split != "test" or folder.is_dir() or not (args.data_dir / "train").is_dir():
        return
    saved = f"{args.checkpoint} is saved. " if args.checkpoint.exists() else ""
    raise Failure(
        f"{folder}: no such folder, expected images to test on. {saved}To take whole patients "
        "from train/ and to train again, run make all TEST=0.2 (split_val.py --test 0.2). To score "
        "val/ instead, which is no test result, use --split val (make evaluate ARGS='--split val')"
    )


def check_folder_names(args, classes):
    """Raises Failure if the two folders of the images have other names than the model's classes."""
    folder = args.data_dir / args.split
    other = find_other_classes(folder, classes) if folder.is_dir() else []
    if other and args.checkpoint.with_suffix(".json").exists():
        raise Failure(
            f"{folder}: found the folders {in_words(other)}, but {args.checkpoint} knows the "
            f"classes {in_words(classes)}; rename the folders, or use a model of these classes"
        )


def list_named_images(paths, classes):
    """Returns the Xrays of these files, and of the images directly inside these folders."""
    files = []
    for path in paths:
        if not path.is_file() and not path.is_dir():
            raise Failure(f"{path}: no such file, expected an image or a folder")
        files += list_folder(path, classes) if path.is_dir() else [path]
    return [Xray(file, None, hash_file(file)) for file in files]


def list_folder(folder, classes):
    """Returns the images directly inside a folder. Raises Failure if there are none."""
    images = list_images(folder, warn_of_others=True)
    if images:
        return images
    paths = [str(folder / name) for name in classes if (folder / name).is_dir()]
    advice = f"; name its class folders instead: {shlex.join(paths)}" if paths else ""
    suffixes = image_suffixes()
    raise Failure(f"{folder}: expected images ({suffixes}) directly inside, found none{advice}")


def check_outputs(args, model, *names):
    """Raises Failure, before the work, if a file of these names or a map cannot be written."""
    check_writable(*(args.results_dir / name for name in names))
    if not args.cam:
        return
    check_maps_apart(args, model.info["classes"])
    noise = torch.randint(256, (1, 1, common.SIZE, common.SIZE), dtype=torch.uint8)
    if class_maps(model, noise) is None:
        raise Failure(
            f"--cam: {model.info['arch']} has no class activation maps, because it does not end in "
            "global average pooling and one Linear layer; leave --cam out"
        )
    check_writable(args.cam / "map.png")


def check_maps_apart(args, classes):
    """Raises Failure if --cam would write maps into a folder with images."""
    image_folders = [path if path.is_dir() else path.parent for path in args.images]
    for split in SPLITS:
        image_folders += [args.data_dir / split / name for name in classes]
    map_folders = [args.cam, *(args.cam / name for name in classes)]
    # The next run would read the maps as images.
    if {path.resolve() for path in map_folders} & {path.resolve() for path in image_folders}:
        raise Failure(f"--cam {args.cam}: this folder contains images; choose another folder")


# ---------------------------------------------------------------- command line


def probability(text):
    """The argparse type of --threshold."""
    if text == "youden" or text.startswith("sensitivity="):
        raise argparse.ArgumentTypeError(
            f"{text} is a rule, which is fitted on val/ in the training: use it with train.py "
            f"(make train ARGS='--threshold {text}')"
        )
    return number(float, 0, 1)(text)


def as_command(argv):
    """Returns a command line for the report, in which absolute paths have only their last part."""
    words = [re.sub("(?<![^=])/.*/(?=.)", "", word) for word in argv]
    return shlex.join(["evaluate.py", *words])


def find_table(path):
    """Returns the predictions.csv in a folder or in its results/, as in runs/x; a file as it is."""
    if not path.is_dir():
        return path
    in_results = path / "results" / "predictions.csv"
    return in_results if in_results.exists() else path / "predictions.csv"


def parse_args(argv=None):
    parser = Parser("evaluate.py", __doc__)
    data, scores, output, machine = parser.groups("data", "scores", "output", "machine")
    add_network_flags(data, output, machine)
    none = argparse.SUPPRESS  # hides "(default: None)" in the help
    parser.set_defaults(images=[], prevalence=[], also=[], classes=None)
    parser.set_defaults(arch=None, split=None, source=None, compare=None, threshold=None, cam=None)
    # fmt: off
    data.add_argument("images", nargs="*", type=Path, default=none, metavar="FILE_OR_FOLDER",
        help="new images to classify, instead of scoring a split")
    data.add_argument("--classes", nargs=2, type=class_name, default=none,
        metavar=("NEGATIVE", "POSITIVE"), help="names of the two classes, for a model or a table "
             f"that does not hold them (default: those it holds, else {' '.join(CLASSES)})")
    data.add_argument("--split", choices=("test", "val", "train"), default=none,
        help="the images to score (default: test)")
    data.add_argument("--from", type=Path, default=none, dest="source", metavar="CSV",
        help="score an earlier predictions.csv (or that of a folder) again, without images and "
             "network; prints only, unless --results-dir is given")
    data.add_argument("--arch", default=none, metavar="NAME",
        help="network of a --checkpoint that has no model.json (default: resnet50)")
    scores.add_argument("--threshold", type=probability, default=none, metavar="T",
        help="probability above which an image is positive, 0 to 1 (default: the threshold that "
             "is stored with the model)")
    scores.add_argument("--prevalence", type=number(float, 1e-6, 1 - 1e-6), action="append",
        default=none, metavar="P",
        help="share of positive images in another place, between 0 and 1: also compute PPV and "
             "NPV for it (may be given several times)")
    scores.add_argument("--compare", type=Path, default=none, metavar="CSV",
        help="predictions.csv (or its folder) of another model for the same images: compute the "
             "differences, this model minus the other (--threshold then holds for both)")
    scores.add_argument("--also", type=Path, action="append", default=none, metavar="DIR",
        help="data folder of another source, such as another hospital, with test/ or the class "
             "folders: compare its scores, at the same threshold (may be given several times)")
    add_flags(scores, "--seed")
    output.add_argument("--cam", type=Path, default=none, metavar="DIR",
        help="also write a class activation map of each image into this folder, which is created "
             "in --results-dir")
    # fmt: on
    args = parser.parse_args(argv, argparse.Namespace(results_dir=None))  # None: not given
    args.command = as_command(sys.argv[1:] if argv is None else argv)
    if not args.source:  # --from without --results-dir only prints
        args.results_dir = args.results_dir or parser.get_default("results_dir")
    if args.images and (args.source or args.compare):
        parser.error("FILE_OR_FOLDER: new images have no labels, which --from and --compare need")
    if args.also and (args.images or args.source):
        parser.error(
            "--also: needs the images of two sources, and not FILE_OR_FOLDER or --from, "
            "which shows the sources of its metrics.json again"
        )
    if args.source and args.split:
        parser.error("--split: the table of --from belongs to one split already")
    if args.source and args.cam:
        parser.error("--cam: the maps need the images, and --from has none")
    args.split = args.split or "test"
    if args.cam:
        args.cam = args.results_dir / args.cam
    args.source = args.source and find_table(args.source)
    args.compare = args.compare and find_table(args.compare)
    for flag, path in (("--from", args.source), ("--compare", args.compare)):
        if path and not path.is_file():
            parser.error(f"{flag} {path}: no such file, expected a predictions.csv or its folder")
    return args


def score_or_classify(args):
    """Does what the flags ask for. Returns the content of metrics.json, or predictions."""
    if args.source:
        return rescore(args)
    if args.images:
        return classify_new(args)
    return score_split(args)


def evaluate(flags=()):
    """Evaluates as the script does, for a notebook. Returns the content of metrics.json as a dict.

    flags: a list such as ["--split", "val"]. For new images, for example ["scan.png"], it returns
    their predictions as a DataFrame, also if some of them could not be read. Raises Failure with
    the line that the script would print.
    """
    return call(score_or_classify, parse_args, flags)


def main(argv=None):
    return run(score_or_classify, parse_args, argv, "evaluate.py")


if __name__ == "__main__":
    sys.exit(main())
