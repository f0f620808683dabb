"""Data folders of other sources, such as another hospital, for evaluate.py --also."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cxr.errors import Failure, is_system_error
from cxr.files import printable
from cxr.folders import SPLITS, image_suffixes, in_words, list_images
from cxr.patients import dicom_patients, identify_all, read_metadata, refuse_copies


class Source(NamedTuple):
    """The images of another source."""

    name: str  # of its folder; NAME-2 if two sources have this name
    folder: Path  # with metadata.csv, and with test/ or the class folders
    xrays: list
    files: list  # names of the images in the table of predictions


# ---------------------------------------------------------------- reading a source


def read_sources(folders, data_dir, classes, hash_dir):
    """Reads the folders of --also. Returns a list of Sources.

    data_dir: of the first source, whose name no other one gets; hash_dir: see identify_all. Raises
    Failure if a folder has no images of these classes, or an image in both classes.
    """
    taken, sources = {source_name(data_dir)}, []
    for given in folders:
        folder = data_folder(given)
        name = unique_name(source_name(folder), taken)
        taken.add(name)
        sources.append(read_source(name, folder, classes, hash_dir))
    return sources


def source_name(folder):
    """Returns the name of a folder as text, also for "." and for names that are not UTF-8."""
    return printable(os.path.basename(os.path.abspath(folder)))


def unique_name(name, taken):
    """Returns name, or name-2, name-3, ... if others have it. Upper and lower case are the same."""
    folded = {other.casefold() for other in taken}
    unique, number = name, 1
    while unique.casefold() in folded:
        number += 1
        unique = f"{name}-{number}"
    return unique


def data_folder(given):
    """Returns the folder of a source: for DIR/test also DIR, which has the metadata.csv."""
    path = Path(os.path.abspath(given))
    is_test_folder = path.name == "test" and not (path / "test").is_dir()
    return path.parent if is_test_folder else given


def read_source(name, folder, classes, hash_dir):
    """Returns the Source in a folder. Arguments and errors are those of read_sources."""
    listed = list_source(folder, classes)
    has_test = (folder / "test").is_dir()
    rows = read_metadata(folder, classes, SPLITS if has_test else [""])
    xrays = identify_all(listed, rows, hash_dir)
    refuse_copies(xrays, folder)
    files = [printable(xray.path.relative_to(folder)) for xray in xrays]
    return Source(name, folder, xrays, files)


def list_source(folder, classes):
    """Lists the images in folder/test, or in the class folders directly in `folder`.

    Returns (path, label, split) triples. One of the classes may be missing or empty. Raises Failure
    if there is no image, or a folder that is not a class.
    """
    root = folder / "test" if (folder / "test").is_dir() else folder
    if not root.is_dir():
        raise Failure(f"--also {folder}: no such folder (make: ALSO)")
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not names or set(names) - {*classes}:
        found = ", ".join(names) or "none"
        raise Failure(
            f"--also {root}: expected the class folders of the model ({in_words(classes)}), with "
            f"exactly this spelling, or test/ with them, and no other folder; found {found}. "
            "Rename the folders, or move the others away"
        )
    listed = []
    for label, name in enumerate(classes):
        if name in names:
            paths = list_images(root / name, warn_of_others=True)
            listed += [(path, label, "test") for path in paths]
    if not listed:
        suffixes = image_suffixes()
        raise Failure(
            f"--also {root}: expected images ({suffixes}) in the class folders, found none"
        )
    return listed


# ---------------------------------------------------------------- known images and patients


def refuse_training_images(sources, known):
    """Raises Failure if a source has images that the model knows. known: their SHA-256."""
    for source in sources:
        same = [x for x in source.xrays if x.sha256 and x.sha256 in known]
        if same:
            what = (
                f"{len(same)} of its {len(source.xrays)} images are training or validation images"
            )
            raise Failure(
                f"--also {source.folder}: {what} of this model, for example "
                f"{same[0].path.relative_to(source.folder)}, so its scores would be too good; "
                "remove them, or name the folder of another source"
            )


def refuse_first_source(sources, first):
    """Raises Failure if all images of a source are images of the first Source."""
    known = {xray.sha256 for xray in first.xrays}
    for source in sources:
        if all(xray.sha256 and xray.sha256 in known for xray in source.xrays):
            raise Failure(
                f"--also {source.folder}: all {len(source.xrays)} images are also images of "
                f"{first.name}, the first source, so there is nothing to compare; name the folder "
                "of another source (make: ALSO)"
            )


def source_warnings(sources, first, training, size):
    """Returns warnings about sources that share images or patients with other images.

    first: the first Source; training: Xrays of train/ and val/; size: see decode.
    """
    if not sources:
        return []
    n_copies = count_near_copies(sources, training, size)
    known_patients = dicom_patients(training)
    warnings = []
    for source, copies in zip(sources, n_copies, strict=True):
        n = len(source.xrays)
        # Ids of two tables are not compared: every hospital has a patient 1.
        shared = dicom_patients(source.xrays) & known_patients
        if copies:
            warnings.append(
                f"source {source.name}: {copies} of {n} images are nearly the same as training or "
                "validation images, so its scores may be too good. Find out where they come from, "
                "and remove them"
            )
        if shared:
            warnings.append(
                f"source {source.name}: {len(shared)} patients are also in train/ or val/ (the "
                "same PatientID in DICOM), so it may be the same hospital. Remove their images"
            )
    pairs = itertools.combinations([first, *sources], 2)
    return warnings + [text for pair in pairs for text in overlap_warnings(*pair)]


def overlap_warnings(earlier, later):
    """Returns warnings if two Sources share images, or patients by their id in DICOM."""
    known, n = {xray.sha256 for xray in earlier.xrays}, len(later.xrays)
    same = sum(bool(xray.sha256) and xray.sha256 in known for xray in later.xrays)
    shared = dicom_patients(later.xrays) & dicom_patients(earlier.xrays)
    found = []
    if same:
        found.append(f"{same} of {n} images are also images of {earlier.name}")
    if shared:
        what = f"{len(shared)} patients are also patients of {earlier.name}"
        found.append(f"{what} (the same PatientID in DICOM)")
    advice = "The intervals of the differences assume different patients. Remove these images"
    return [f"source {later.name}: {text}. {advice}" for text in found]


def count_near_copies(sources, training, size):
    """Counts the images of each source that are nearly the same as a training image."""
    from cxr.copies import find_near_duplicates

    groups = [training, *(source.xrays for source in sources)]
    thumbnails, origins = [], []  # origins: the number of the group
    for number, xrays in enumerate(groups):
        of_group = read_thumbnails(xrays, size)
        thumbnails += of_group
        origins += [number] * len(of_group)
    n_training = origins.count(0)
    copies = find_near_duplicates(thumbnails).copies if n_training else {}
    # The first image of a pair is the one with the lower number.
    found = {j for i, j in copies if i < n_training <= j}
    return [sum(origins[j] == number for j in found) for number in range(1, len(groups))]


def read_thumbnails(xrays, size):
    """Returns the thumbnails of the readable images, each uint8 (96, 96)."""
    # Slow to import: scikit-learn.
    from cxr.copies import make_thumbnail
    from cxr.measurements import image_numbers

    def thumbnail_or_none(xray):
        try:
            return make_thumbnail(image_numbers(xray.path, size)[1])
        except Exception as error:  # damaged files make decoders raise nearly anything
            if is_system_error(error):
                raise
            return None

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(thumbnail_or_none, xrays))
    return [thumbnail for thumbnail in results if thumbnail is not None]
