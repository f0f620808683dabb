"""The report of `--check`."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import PIL.Image

from cxr.decode import explain_unreadable
from cxr.duplicates import find_duplicates, find_negatives
from cxr.errors import Failure, is_system_error
from cxr.folders import CLASSES, check_split_is_complete, list_split, list_val
from cxr.leaks import find_shared_patients
from cxr.patients import identify_all, read_metadata
from cxr.shortcuts import find_properties, find_shortcuts, image_numbers


class ExaminedXray(NamedTuple):
    file: str  # split/class/name, below the data folder
    folder: str  # split/class
    split: str
    label: int  # index into CLASSES
    sha256: str  # of the file
    pixels: str  # SHA-256 of the grey levels as decoded
    patient: str  # not the group, which may merge patients; else the file itself
    numbers: dict  # of common.image_numbers
    properties: tuple  # size, mode and format as the report names them
    thumbnail: np.ndarray  # uint8 (96, 96), grey


def examine_image(image, size):
    """An ExaminedXray, or (file, reason) where the image cannot be read."""
    path = image.path
    split, name = path.parts[-3:-1]
    file = f"{split}/{name}/{path.name}"
    try:
        numbers, grey, scan = image_numbers(path, size)
        properties = "{}x{}".format(*scan.size), scan.mode, scan.format
    except Exception as error:  # damaged files make decoders raise nearly anything
        if is_system_error(error):
            raise
        return file, explain_unreadable(path, error)
    return ExaminedXray(
        file=file,
        folder=f"{split}/{name}",
        split=split,
        label=CLASSES.index(name),
        sha256=image.sha256,
        pixels=hashlib.sha256(f"{grey.size}".encode() + grey.tobytes()).hexdigest(),
        patient=image.patient or file,
        numbers=numbers,
        properties=properties,
        thumbnail=np.asarray(grey.resize((96, 96), PIL.Image.Resampling.BOX)),
    )


LINES = 25  # errors and warnings on the page


def examine(data_dir, size):
    """Everything the check finds: what --json holds."""
    check_split_is_complete(data_dir)
    splits = ["train"] + ["val"] * any(list_val(data_dir).values())
    splits += ["test"] * (data_dir / "test").exists()
    listed = [each for split in splits for each in list_split(data_dir, split, others=True)]
    images = identify_all(listed, read_metadata(data_dir))
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(lambda image: examine_image(image, size), images))
    xrays = [look for look in looks if isinstance(look, ExaminedXray)]
    unreadable = [look for look in looks if not isinstance(look, ExaminedXray)]
    images = Counter(xray.folder for xray in xrays)
    if len(images) < 2 * len(splits):
        raise Failure(f"{data_dir}: no image of a folder can be read ({': '.join(unreadable[0])})")
    report = {
        "images": images,
        "patients": Counter(folder for folder, _ in {(x.folder, x.patient) for x in xrays}),
        "unreadable": unreadable,
        "scored_on": splits[-1],
        "errors": [f"{file}: {reason}" for file, reason in unreadable],
        "warnings": [],
    }
    if "test" not in splits:
        none = "no test/: nothing to report a result on; move whole patients there out of train/"
        report["warnings"].append(f"{none} before the split")
    find_duplicates(report, xrays)
    find_negatives(report, xrays)
    find_shared_patients(report, xrays)
    find_properties(report, xrays)
    find_shortcuts(report, xrays)
    return report


def print_report(report, size):
    images, patients, scored = report["images"], report["patients"], report["scored_on"]
    print("images (patients)" + "".join(f"{name:>18}" for name in CLASSES))
    for split in report["same_patient_pairs"]:
        folders = [f"{split}/{name}" for name in CLASSES]
        cells = [f"{images[folder]} ({patients[folder]})" for folder in folders]
        print(f"  {split:<15}" + "".join(f"{cell:>18}" for cell in cells))
    for key in ("sizes", "modes", "formats"):
        properties = [f"{kind} ({sum(folders.values())})" for kind, folders in report[key].items()]
        more = f" and {len(properties) - 4} more" if properties[4:] else ""
        whole = f" (the whole film is resized to {size}x{size})" * (key == "sizes")
        print(f"{key:<17} {', '.join(properties[:4])}{more}{whole}")
    pairs = ", ".join(f"{n} in {split}" for split, n in report["same_patient_pairs"].items())
    print(f"pairs of images of one patient inside a split: {pairs}")
    fitted = "the other images" if report["shift"] else "other patients"
    print(
        f"\nShortcuts: how well one number, fitted on {fitted}, separates the classes of {scored}/"
    )
    for row in report["shortcuts"]:
        rule = f"  {row['number']:<15}{row['rule']:<12}"
        scores = f"accuracy {row['accuracy']:.3f} (n {row['n']})   AUROC {row['auroc']:.3f}"
        print(f"{rule} {scores}{' !' * row['alarm']}")
    if report["shift"]:
        what = f"tells {scored}/ from the other images of a class"
        print(f"\nShift: how well one number {what} (AUROC; 0.5: not at all)")
    for row in report["shift"]:
        cells = [f"{n} {row[n]['auroc']:.3f} {'!' if row[n]['alarm'] else ' '}" for n in CLASSES]
        print(f"  {row['number']:<15}", *cells, sep="   ")
    texts = [f"{level}: {text}" for level in ("error", "warning") for text in report[f"{level}s"]]
    colon = ":" if texts else ""
    print(f"\n{len(report['errors'])} errors, {len(report['warnings'])} warnings{colon}")
    if texts[LINES:]:
        texts[LINES:] = [f"and {len(texts) - LINES} more; --json FILE holds all"]
    for text in texts:
        print(f"  {text}")
