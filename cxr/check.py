"""The report of `split_val.py --check`: what is wrong with a data folder."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr.confounders import find_confounders, print_confounders
from cxr.copies import make_thumbnail
from cxr.decode import explain_unreadable
from cxr.duplicates import find_nearly_same, find_negatives, find_same
from cxr.errors import LIST_ALL, Failure, is_system_error, show_progress
from cxr.files import read_csv
from cxr.films import find_kinds, find_unusual
from cxr.folders import check_split_is_complete, list_names, list_splits
from cxr.leaks import find_shared_patients
from cxr.measurements import find_properties, find_shortcuts, image_numbers
from cxr.patients import Xray, identify_all, read_metadata

REFERENCE = Path(__file__).parent.parent / "docs" / "reference-images.csv"
N_PROPERTIES = 4  # sizes, modes and formats that are printed
LINES = 25  # errors and warnings that are printed


class ExaminedXray(NamedTuple):
    """An image, and what the check computes from it."""

    xray: Xray
    file: str  # split/class/name, below the data folder
    folder: str  # split/class
    patient: str  # the patient's name, or the file if it is unknown
    pixels: str  # SHA-256 of the decoded grey levels
    numbers: dict  # of cxr.measurements.image_numbers
    properties: tuple  # size, mode and format, as text
    thumbnail: np.ndarray  # uint8 (96, 96), grey
    kinds: list  # of cxr.films.find_kinds


def examine_image(xray, size):
    """Decodes an image. Returns an ExaminedXray, or (file, reason) if it cannot be read."""
    folder = f"{xray.split}/{xray.path.parent.name}"
    file = f"{folder}/{xray.path.name}"
    try:
        numbers, grey, decoded = image_numbers(xray.path, size)
    except Exception as error:  # damaged files make decoders raise nearly anything
        if is_system_error(error):
            raise
        return file, explain_unreadable(xray.path, error)
    width, height = decoded.size
    return ExaminedXray(
        xray=xray,
        file=file,
        folder=folder,
        patient=xray.patient or file,
        pixels=hashlib.sha256(f"{grey.size}".encode() + grey.tobytes()).hexdigest(),
        numbers=numbers,
        properties=(f"{width}x{height}", decoded.mode, decoded.format),
        thumbnail=make_thumbnail(grey),
        kinds=find_kinds(xray, decoded.has_colours),
    )


def examine_images(xrays, size):
    """Decodes images, and shows the progress. Returns the result of examine_image for each."""
    results = []
    with ThreadPoolExecutor() as pool, show_progress("Reading", len(xrays), " images") as bar:
        for result in pool.map(partial(examine_image, size=size), xrays):
            results.append(result)
            bar.update()
    return results


def list_xrays(data_dir, classes):
    """Returns (splits that exist, their Xrays). Raises Failure as list_split does."""
    check_split_is_complete(data_dir)
    splits = ["train"]
    if any(list_names(data_dir, "val", classes).values()):
        splits.append("val")
    if any(list_names(data_dir, "test", classes).values()):
        splits.append("test")
    listed = list_splits(data_dir, splits, classes, warn_of_others=True)
    return splits, identify_all(listed, read_metadata(data_dir, classes))


def is_reference_data(xrays):
    """Returns True if these images are those of docs/reference-images.csv, in whatever split."""
    _, rows = read_csv(REFERENCE, "class", "sha256")
    listed = {(row["class"], row["sha256"]) for _, row in rows}
    return {(xray.path.parent.name, xray.sha256) for xray in xrays} == listed


def examine(data_dir, size, classes):
    """Examines a data folder. Returns the report as a dict, which is the content of --json.

    size: see cxr.decode.decode. Raises Failure if no image of a class folder can be read.
    """
    splits, xrays = list_xrays(data_dir, classes)
    results = examine_images(xrays, size)
    examined = [result for result in results if isinstance(result, ExaminedXray)]
    unreadable = [result for result in results if not isinstance(result, ExaminedXray)]
    n_images = Counter(x.folder for x in examined)
    patients = {(x.folder, x.patient) for x in examined}
    if len(n_images) < len(classes) * len(splits):  # a folder has no readable image
        for file, reason in unreadable:
            folder = file.rpartition("/")[0]
            if folder not in n_images:
                raise Failure(f"{data_dir / folder}: no image can be read ({file}: {reason})")

    report = {
        "classes": list(classes),
        "is_reference_data": is_reference_data(xrays),
        "images": n_images,
        "patients": Counter(folder for folder, _ in patients),
        "unreadable": unreadable,
        "scored_on": splits[-1],  # test/ if it exists
        "errors": [f"{file}: {reason}; repair it or remove it" for file, reason in unreadable],
        "warnings": [],
    }
    if "test" not in splits:
        message = (
            "there is no test/, so no result can be reported; to take whole patients from train/"
        )
        report["warnings"].append(f"{message}, run split_val.py --test 50 (make all TEST=50)")
    checks = (find_same, find_nearly_same, find_negatives, find_shared_patients, find_properties)
    options = {"scored_on": splits[-1], "classes": classes}
    separations = [partial(find, **options) for find in (find_shortcuts, find_confounders)]
    for find in (*checks, find_unusual, *separations):
        entries, errors, warnings = find(examined)
        report |= entries
        report["errors"] += errors
        report["warnings"] += warnings
    return report


def print_report(report, size):
    """Prints the report. size: pixels to which images are resized."""
    classes = report["classes"]
    print("images (patients)" + "".join(f"  {name:>16}" for name in classes))
    pairs = report["same_patient_pairs"]
    for split in pairs:
        line = f"  {split:<15}"
        for name in classes:
            folder = f"{split}/{name}"
            cell = f"{report['images'][folder]} ({report['patients'][folder]})"
            line += f"  {cell:>{max(16, len(name))}}"
        print(line)
    if report["is_reference_data"]:
        print("These are the 400 reference images.")
    text = ", ".join(f"{n} in {split}/" for split, n in pairs.items())
    print(f"pairs of images of one patient within a split: {text}")
    if report["similar"]:
        n_pairs = count_of(report["similar"], "pair")
        print(
            f"similar images: {n_pairs}, which may be crops or rotations of one film, or different"
        )
        print(f"films that happen to be similar; {LIST_ALL}")
    print_properties(report, size)
    print_single_numbers(report)
    print_confounders(report)

    print(f"\n{count_of(report['errors'], 'error')}, {count_of(report['warnings'], 'warning')}")
    messages = [f"error: {text}" for text in report["errors"]]
    messages += [f"warning: {text}" for text in report["warnings"]]
    for message in messages[:LINES]:
        print(f"  {message}")
    if len(messages) > LINES:
        print(f"  and {len(messages) - LINES} more; {LIST_ALL}")


def print_properties(report, size):
    """Prints sizes, modes and formats of the image files, the most frequent ones first."""
    for key in ("sizes", "modes", "formats"):
        texts = [f"{name} ({sum(counts.values())})" for name, counts in report[key].items()]
        line = ", ".join(texts[:N_PROPERTIES])
        if len(texts) > N_PROPERTIES:
            line += f" and {len(texts) - N_PROPERTIES} more"
        if key == "sizes":
            line += f"; the whole image is resized to {size}x{size}"
        print(f"{key:<17} {line}")


def print_single_numbers(report):
    """Prints how well the numbers separate the classes, and one split from the others."""
    split, classes = report["scored_on"], report["classes"]
    fitted_on = "the other images" if report["shift"] else "other patients"
    print(f"\nShortcuts: how well a simple measurement separates the classes of {split}/ without a")
    print(f"network, fitted on {fitted_on}. If the rule is true, {classes[1]} is predicted.")
    print("! marks an alarm.")
    n, n_all = report["shortcut_images"], sum(report["images"].values())
    if n < n_all:
        print(
            f"Shortcuts and shift are measured on {n:,} of the {n_all:,} images: on all images of"
        )
        print("patients who were drawn at random (the same patients in each run).")
    for row in report["shortcuts"]:
        scores = f"accuracy {row['accuracy']:.3f} (n {row['n']})   AUROC {row['auroc']:.3f}"
        mark = " !" if row["alarm"] else ""
        print(f"  {row['number']:<15}{row['rule']:<12} {scores}{mark}")

    if report["shift"]:  # empty if there is only one split
        print(f"\nShift: how well a simple measurement separates {split}/ from the other images of")
        print("the same class (AUROC; 0.5: not at all). ! marks an alarm.")
    for row in report["shift"]:
        line = f"  {row['number']:<15}"
        for name in classes:
            mark = "!" if row[name]["alarm"] else " "
            line += f"   {name} {row[name]['auroc']:.3f} {mark}"
        print(line)


def count_of(items, noun):
    """Returns "1 error" or "2 errors"."""
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"
