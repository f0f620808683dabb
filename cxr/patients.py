"""Which patient an image belongs to. No patient may be in two splits."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cxr.decode import is_dicom
from cxr.errors import LIST_ALL, SHOWN, UNDO, Failure, is_system_error, warn
from cxr.files import hash_file
from cxr.folders import SPLITS, check_split_is_complete, list_images, list_splits
from cxr.hashes import Hashes
from cxr.tables import below_data, match_rows, read_table, unify_ids

METADATA = "metadata.csv"  # in the data folder: file_name, patient_id and any other columns

# How file names contain the patient; the first pattern that matches counts. Add your own on top.
PATIENT_NAMES = (
    # The reference data: personN_bacteria_M.jpeg. person1_bacteria and person1_virus may be two
    # patients.
    re.compile(r"(?P<patient>person\d+)_(?P<etiology>bacteria|virus)_\d+"),
    re.compile(r"(?P<patient>(NORMAL2-)?IM-\d+)-\d+"),
    # The same children in their other release: BACTERIA-1049278-0001.jpeg
    re.compile(r"(NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
    re.compile(r"(?P<patient>0\d{7})_\d{3}\b"),  # NIH ChestX-ray14: 00000013_005.png
    re.compile(r"(?P<patient>patient\d+)_study\d+"),  # CheXpert: patient00001_study1_view1.jpg
    re.compile(r"(?P<patient>sub-[A-Za-z0-9]+)_"),  # BIDS: sub-S03044_ses-E06217_run-1_cr.png
)
COPIES = {  # where a file occurs twice: what to do
    "in both classes": "Find out which label is right, and remove the other file",
    "in two splits": "Remove one file of each pair",
}


class Xray(NamedTuple):
    """An image file with its label and its patient."""

    path: Path
    label: int | None  # 0 negative class, 1 positive class, None for a new image
    sha256: str  # of the file, in hex; "" if it cannot be read
    split: str = ""  # train, val or test; "" for a new image
    patient: str | None = None  # None if unknown
    group: str = ""  # what stays together in one split: one patient or several
    metadata: dict | None = None  # the other columns of its row in metadata.csv


def read_split(data_dir, *splits, classes, rows=None, hash_dir=None):
    """Returns the Xrays of these splits in one list. Warns if splits share a patient.

    rows: the result of read_metadata, if it was called before; hash_dir: see identify_all. Raises
    Failure if the split was interrupted, or if one file is in two folders.
    """
    check_split_is_complete(data_dir)
    listed = list_splits(data_dir, splits, classes, warn_of_others=True)
    if rows is None:
        rows = read_metadata(data_dir, classes)
    xrays = identify_all(listed, rows, hash_dir)
    refuse_copies(xrays, data_dir)
    if len(splits) > 1:
        warn_if_patients_shared(xrays, splits)
    return xrays


def choose_hash_dir(args):
    """Returns the folder in which the hashes of images are remembered, None with --no-cache."""
    return None if args.no_cache else args.cache_dir


def refuse_copies(xrays, data_dir):
    """Raises Failure if a file is in two folders: in both classes, or in two splits."""
    pairs, first = {place: [] for place in COPIES}, {}
    for xray in xrays:
        earlier = first.setdefault(xray.sha256, xray)
        if xray.sha256 and earlier.path.parent != xray.path.parent:
            place = "in two splits" if earlier.label == xray.label else "in both classes"
            both = f"{below_data(xray.path)} is the same file as {below_data(earlier.path)}"
            pairs[place].append(both)
    found = [
        f"images {place}: {len(texts)} ({'; '.join(texts[:SHOWN])}). {COPIES[place]}"
        for place, texts in pairs.items()
        if texts
    ]
    if found:
        raise Failure(f"{data_dir}: {'. '.join(found)}. split_val.py {LIST_ALL}")


def warn_if_patients_shared(xrays, splits):
    """Prints a warning if a patient has images in all of these splits."""
    names_in = {split: set() for split in splits}
    for xray in xrays:
        # train/ and val/ must not share a group. With test/, they must not share a patient.
        names_in[xray.split].add(xray.group if "val" in splits else xray.patient)
    shared = set.intersection(*names_in.values()) - {None}
    if shared:
        advice = f"split_val.py {LIST_ALL}"
        if "val" in splits:
            advice = f"to separate them, run {UNDO}, then split again"
        folders = " and ".join(f"{split}/" for split in splits)
        warn(f"{folders} share patients ({len(shared)}, for example {min(shared)}); {advice}")


def count_patients(xrays, classes):
    """Returns {class: number of patients}. An image whose patient is unknown counts as one."""
    patients = {name: set() for name in classes}
    for xray in xrays:
        patients[classes[xray.label]].add(xray.patient or str(xray.path))
    return {name: len(members) for name, members in patients.items()}


def identify_all(listed, rows, hash_dir=None):
    """Returns the Xrays of (path, label, split) triples. rows: the result of read_metadata.

    hash_dir: the folder that remembers the hashes of files; None: all files are read.
    """
    hashes = Hashes(hash_dir)
    with ThreadPoolExecutor() as pool:
        xrays = list(pool.map(lambda entry: identify(*entry, rows, hashes.hash), listed))
    hashes.save()
    return xrays


def identify(path, label, split, rows, hash_image=hash_file):
    """Returns the Xray of a file, with its hash and its patient."""
    columns = dict(rows.get(path, {}))
    columns.pop("file_name", None)
    # The patient comes from metadata.csv, else from DICOM's PatientID, else from the file name.
    certain = columns.pop("patient_id", None) or patient_from_dicom(path)
    group = certain or patient_from_name(path.name, with_etiology=False)
    return Xray(
        path=path,
        label=label,
        sha256=hash_image(path),
        split=split,
        patient=certain or patient_from_name(path.name),
        group=group or f"{path.parent.name}/{path.name}",
        metadata={name: value for name, value in columns.items() if name and value},
    )


def patient_from_name(name, with_etiology=True):
    """Returns the patient that a file name contains, or None.

    with_etiology: True counts person1_bacteria and person1_virus of the reference data as two
    patients. False counts them as one, so that a split keeps them together.
    """
    parts = parse_name(name)
    if with_etiology and "etiology" in parts:
        return f"{parts['patient']}_{parts['etiology']}"
    return parts.get("patient")


def etiology_from_name(name):
    """Returns bacteria or virus for a file name of the reference data, "" for others."""
    return parse_name(name).get("etiology", "")


def parse_name(name):
    """Returns {patient, and etiology if known} of a file name, {} if no pattern matches it."""
    for pattern in PATIENT_NAMES:
        match = pattern.match(name)
        if match:
            return match.groupdict()
    return {}


def patient_from_dicom(path):
    """Returns a hash of a DICOM file's PatientID, or None. No output may contain the ID itself."""
    patient = read_tags(path, "PatientID").get("PatientID", "")
    return f"ID-{hashlib.sha256(patient.encode()).hexdigest()[:12]}" if patient else None


def dicom_patients(xrays):
    """Returns those patients of some Xrays whose id comes from DICOM."""
    return {x.patient for x in xrays if re.fullmatch("ID-[0-9a-f]{12}", x.patient or "")}


def read_tags(path, *names):
    """Returns {name: text} of those tags that a DICOM file has; {} for any other file."""
    try:
        with open(path, "rb") as file:
            if not is_dicom(file.read(132)):
                return {}
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=names, force=True)
        values = {name: str(header.get(name) or "").strip() for name in names}
    except Exception as error:  # a damaged file; decoding it will report that
        if is_system_error(error):
            raise
        return {}
    return {name: value for name, value in values.items() if value}


def read_metadata(data_dir, classes, splits=SPLITS):
    """Reads DIR/metadata.csv. Returns {path: {column: text}} of the images in all splits.

    file_name is the name of the image, or its path below DIR (as in Hugging Face's ImageFolder).
    patient_id is the patient. All other columns can define subgroups. Returns {} without such a
    file. Warns of rows without an image, and of images without a patient. splits: [""] if the class
    folders are directly in DIR.
    """
    path = Path(data_dir, METADATA)
    if not path.exists():
        misplaced = Path(data_dir, "train", METADATA)
        if misplaced.exists():
            raise Failure(f"{misplaced}: expected it one level up, in {data_dir}; move it there")
        return {}
    columns, rows = read_table(path)
    images = []
    for split in splits:
        for name in classes:
            folder = Path(data_dir, split, name)
            if folder.is_dir():
                images += list_images(folder)
    matched, absent = match_rows(path, rows, images, classes)
    if absent:
        warn(
            f"{path}: {len(absent)} of {len(rows)} rows have no image, for example {absent[0]}. "
            "Correct these names, or add the images"
        )
    if "patient_id" in columns:
        n_words = unify_ids(matched.values())
        warn_of_unknown_patients(path, images, matched, n_words)
    else:
        warn(
            f"{path}: no column patient_id, so only DICOM or the file names can name the patients. "
            "If they do not, add this column"
        )
    return matched


def warn_of_unknown_patients(path, images, rows, n_words):
    """Prints a warning if images have no patient_id. n_words: how many have a word like NA."""
    unknown = [image for image in images if not rows.get(image, {}).get("patient_id")]
    if unknown:
        words = f" ({n_words} of them say nan, NA or a word like these)" if n_words else ""
        warn(
            f"{path}: no patient_id for {len(unknown)} of {len(images)} images{words}, for example "
            f"{unknown[0].name}; only DICOM or the file name can name their patient. If "
            "they do not, fill in patient_id"
        )
