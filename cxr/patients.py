"""Which patient an image belongs to."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cxr.decode import is_dicom
from cxr.errors import Failure, is_system_error, warn
from cxr.files import hash_file, read_csv
from cxr.folders import CLASSES, SPLITS, check_split_is_complete, list_images, list_split

METADATA = "metadata.csv"  # in the data folder: file_name, patient_id and any other columns
# How the names of images tell their patients, the first that fits. Add your own above.
PATIENT_NAMES = (
    # the reference data; in personN_bacteria_M.jpeg N counts the patients of one etiology
    re.compile(r"(?P<patient>person\d+)_(?P<etiology>bacteria|virus)_\d+"),
    re.compile(r"(?P<patient>(NORMAL2-)?IM-\d+)-\d+"),
    # the same children in their other release: BACTERIA-1049278-0001.jpeg
    re.compile(r"(NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
    re.compile(r"(?P<patient>0\d{7})_\d{3}\b"),  # NIH ChestX-ray14: 00000013_005.png
    re.compile(r"(?P<patient>patient\d+)_study\d+"),  # CheXpert: patient00001_study1_view1.jpg
    re.compile(r"(?P<patient>sub-[A-Za-z0-9]+)_"),  # BIDS: sub-S03044_ses-E06217_run-1_cr.png
)


class Xray(NamedTuple):
    path: Path
    label: int | None  # index into CLASSES, None for a new image
    sha256: str  # of the file, in hex, "" where it cannot be read
    patient: str | None = None  # None where nothing tells it
    group: str = ""  # what stays together in a split: the patient, perhaps with others
    metadata: dict | None = None  # the other columns of its row in metadata.csv


def read_split(data_dir, *splits, rows=None):
    """{split: [Xray]}. An interrupted split, or one file in two of the folders, is a Failure.

    rows: of read_metadata, where it was called already.
    """
    check_split_is_complete(data_dir)
    found, first = {}, {}
    listed = {split: list_split(data_dir, split, others=True) for split in splits}
    rows = read_metadata(data_dir) if rows is None else rows
    for split in splits:
        found[split] = identify_all(listed[split], rows)
        for image in found[split]:
            twin = first.setdefault(image.sha256, image)
            if image.sha256 and twin.path.parent != image.path.parent:
                raise Failure(f"{image.path}: the same file as {twin.path}; remove one of them")
    if len(splits) > 1:
        sides = [{i.group if "val" in splits else i.patient for i in found[s]} for s in splits]
        if shared := set.intersection(*sides) - {None}:
            undo = "--undo, then split again" if "val" in splits else "--check lists them"
            where = " and ".join(f"{split}/" for split in splits)
            warn(f"patients in {where}: {len(shared)}, as {min(shared)}; split_val.py {undo}")
    return found


def read_metadata(data_dir):
    """{path: row} of DIR/metadata.csv for the images in train/, val/ and test/, {} without one.

    As in Hugging Face's ImageFolder: the column file_name is the image's own name, or its path
    below DIR where two images have one name (as train/... also after the split). patient_id tells
    the patient, what else there is makes subgroups. Tells how many rows and images have no partner.
    """
    path = Path(data_dir, METADATA)
    if not path.exists():
        if (odd := Path(data_dir, "train", METADATA)).exists():
            raise Failure(f"{odd}: expected it one level up, in {data_dir}; move it there")
        return {}
    columns, rows = read_csv(path, "file_name")
    if "patient_id" not in columns:
        warn(f"{path}: no column patient_id, so that the images' names tell the patients")
    folders = [Path(data_dir, split, name) for split in SPLITS for name in CLASSES]
    images = [image for each in folders if each.is_dir() for image in list_images(each)]
    places = {}
    for image in images:
        below = image.relative_to(data_dir).as_posix()
        for key in {image.name, below, re.sub("^val/", "train/", below)}:
            places.setdefault(key, []).append(image)
    found, absent = {}, []
    for number, row in rows:
        name = PurePosixPath(row["file_name"]).as_posix()
        here = places.get(name, [])
        if len(here) > 1:
            both = f"{here[0].parent} and {here[1].parent}"
            raise Failure(
                f"{path}, row {number}: {name} is in {both}; give the path below {data_dir}"
            )
        if here and here[0] in found:
            raise Failure(f"{path}, row {number}: {name} has an earlier row; keep one")
        found |= dict.fromkeys(here, row)
        absent += [] if here else [name]
    if absent:
        warn(f"{path}: {len(absent)} of {len(rows)} rows have no image here, as {absent[0]}")
    told = [image for image in images if found.get(image, {}).get("patient_id")]
    if "patient_id" in columns and len(told) < len(images):
        alone = next(image.name for image in images if image not in told)
        warn(
            f"{path}: tells no patient of {len(images) - len(told)} of {len(images)} images, as "
            f"{alone}; for these the names do, or nothing"
        )
    return found


def identify_all(listed, rows):
    """[Xray] of [(path, label)], their files hashed; rows: of read_metadata."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda each: identify(*each, rows), listed))


def identify(path, label, rows):
    """The Xray with its patient: by metadata.csv, by DICOM's PatientID, by its name."""
    digest = hash_file(path)
    row = {key: value for key, value in rows.get(path, {}).items() if key and value}
    row.pop("file_name", None)
    patient = row.pop("patient_id", None) or patient_from_dicom(path)
    group = (
        patient or patient_from_name(path.name, cautious=True) or f"{path.parent.name}/{path.name}"
    )
    return Xray(path, label, digest, patient or patient_from_name(path.name), group, row)


def patient_from_name(name, cautious=False):
    """The patient that an image's name tells, None where it tells none.

    cautious: without the etiology. That may merge two patients, but never separates one.
    """
    for pattern in PATIENT_NAMES:
        if match := pattern.match(name):
            found = match.groupdict()
            etiology = "" if cautious or "etiology" not in found else f"_{found['etiology']}"
            return found["patient"] + etiology
    return None


def patient_from_dicom(path):
    """The hash of a DICOM file's PatientID, which itself belongs in no report; else None."""
    try:
        with open(path, "rb") as file:
            if not is_dicom(file.read(132)):
                return None
        import pydicom

        told = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        patient = str(told.get("PatientID") or "").strip()
    except Exception as error:  # damaged; the pass, or the check, says so
        if is_system_error(error):
            raise
        return None
    return f"ID-{hashlib.sha256(patient.encode()).hexdigest()[:12]}" if patient else None
