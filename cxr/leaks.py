"""Finds images and patients that are in more than one split."""

import contextlib
from collections import Counter

from cxr.errors import UNDO, Failure
from cxr.folders import list_splits
from cxr.patients import METADATA, identify_all

NO_RESULT = "these scores are no test result"
ONE_SPLIT = "Put all images of such a patient into train/, or all into test/"


def is_leak(splits):
    """Returns True if the splits in which something occurs are test and at least one other."""
    return "test" in splits and len(splits) > 1


def list_training_xrays(data_dir, rows, classes, hash_dir=None):
    """Returns (Xrays of train/ and val/, the reason if there are none).

    rows: the result of read_metadata; hash_dir: see identify_all.
    """
    try:
        listed = list_splits(data_dir, ["train"], classes)
    except Failure:  # its message may name a file, and the page shows the reason
        return [], "there is no usable train/; split_val.py --check (make check) says why"
    with contextlib.suppress(Failure):  # there is no val/, or it cannot be used
        listed += list_splits(data_dir, ["val"], classes)
    return identify_all(listed, rows, hash_dir), ""


def known_hashes(model_info, training):
    """Returns the SHA-256 of training and validation images (in model.json, in the folders now).

    model_info: the content of model.json; training: the Xrays of train/ and val/.
    """
    learned = set()
    for images in model_info.get("images", {}).values():
        learned |= set(images.values())
    return learned, {xray.sha256 for xray in training}


def find_leaks(model_info, xrays, numbers, training):
    """Finds images and patients that the model knows. Returns a dict for metrics.json.

    model_info: the content of model.json; xrays: the images that are scored; numbers: theirs in
    predictions.csv; training: the Xrays of train/ and val/. Keys of the result: images (numbers of
    the scored images that are in train/ or val/), patients (of those whose patient is), n (how many
    images are scored), known (with how many others they were compared), learned (how many of these
    belong to the model), present (how many images are in the folders) and absent (how many of the
    model's images are not).
    """
    learned, present = known_hashes(model_info, training)
    used = learned | present  # the folders may have changed since the training
    patients = {xray.patient for xray in training} - {None}
    numbered = list(zip(xrays, map(int, numbers), strict=True))
    return {
        "images": [number for xray, number in numbered if xray.sha256 in used],
        "patients": [number for xray, number in numbered if xray.patient in patients],
        "n": len(xrays),
        "known": len(used),
        "present": len(present),
        "absent": len(learned - present) if present else 0,
        "learned": len(learned),
    }


def leak_warnings(leaks, split, label):
    """Returns warnings about images that the model knows, and about a model of other data.

    leaks: of find_leaks, or None; label: function that returns how a number is shown.
    """
    if leaks is None:
        return []
    warnings = []
    if leaks["absent"]:
        warnings.append(
            f"{leaks['absent']} of the {leaks['learned']} images that the model was made with are "
            "not in train/ or val/: the model is older than these folders, or belongs to other "
            "data. Train again (train.py, make train), or use the folders of the model"
        )
    if split != "test":
        reason = f"the model was made with the {split} images"
        advice = "For one, use --split test"
        return [*warnings, f"{reason}: these scores are NO TEST RESULT. {advice}"]
    kinds = {
        "images": (
            "test images ARE ALSO TRAINING OR VALIDATION IMAGES",
            "Remove them from test/, or keep them there and train again without them",
        ),
        "patients": (
            "test images are from patients who are also in train/ or val/",
            f"{ONE_SPLIT}, and train again",
        ),
    }
    for kind, (what, advice) in kinds.items():
        if leaks[kind]:
            count = f"{len(leaks[kind])} of {leaks['n']}"
            example = f"for example {label(leaks[kind][0])}"
            warnings.append(f"{count} {what}, {example}: {NO_RESULT}. {advice}")
    return warnings


def find_shared_patients(examined):
    """Finds patients who are in several splits, and images whose patient is unknown.

    examined: list of cxr.check.ExaminedXray, of all splits.
    Returns (entries of the check's report, errors, warnings).
    """
    errors, warnings = [], []
    unknown = [x.file for x in examined if x.xray.patient is None]
    if unknown:
        warnings.append(
            f"images without a known patient: {len(unknown)}, for example {unknown[0]}. Each "
            f"counts as one patient. Name them in {METADATA}, in the columns file_name and "
            "patient_id"
        )
    images_of = {}  # of each patient
    for x in examined:
        images_of.setdefault(x.patient, []).append(x)
    across = {}  # patients in several splits, with their files
    pairs = {x.xray.split: 0 for x in examined}
    for patient, images in images_of.items():
        splits = Counter(x.xray.split for x in images)
        for split, n in splits.items():
            pairs[split] += n * (n - 1) // 2  # ways to choose 2 of n images
        if len(splits) > 1:
            across[patient] = [x.file for x in images]
            message = f"patient {patient} is in {' and '.join(splits)}"
            if is_leak(splits):
                errors.append(f"{message}. {ONE_SPLIT}")
            else:
                warnings.append(f"{message}. To separate them, run {UNDO}, then split again")
    entries = {"no_patient": unknown, "patients_across": across, "same_patient_pairs": pairs}
    return entries, errors, warnings
