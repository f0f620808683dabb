"""Finds images and patients shared between splits."""

import contextlib
from collections import Counter

from cxr.errors import Failure
from cxr.folders import list_split
from cxr.patients import METADATA, identify_all


def leak_warnings(args, model, images, training):
    """Warnings about images that the model learned from, and about a model of other images.

    images: [Xray], which are scored; training: [Xray] of train/ and val/.
    """
    by_split = model.info.get("images", {}).values()
    learned = {digest for found in by_split for digest in found.values()}
    here = {image.sha256 for image in training}
    doubts = []
    if learned and here and (strange := learned - here):
        which = f"{len(strange)} of the {len(learned)} images that the model learned from"
        other = "it is an older model, or one of other data"
        doubts.append(f"{which} are not in train/ and val/: {other}")
    if args.split != "test":
        made = f"the network was made with the {args.split} images"
        return [*doubts, f"{made}: these numbers are NO TEST RESULT"]
    if leaked := [image.path.name for image in images if image.sha256 in learned | here]:
        which = f"{len(leaked)} of {len(images)} test images"
        among = f"WERE AMONG THE TRAINING OR VALIDATION IMAGES, as {leaked[0]}"
        doubts.append(f"{which} {among}: these numbers are no test result")
    patients = {image.patient for image in training} - {None}
    if both := [image for image in images if image.patient in patients]:
        which = f"{len(both)} of {len(images)} test images are of patients in train/ or val/"
        doubts.append(f"{which}, as {both[0].path.name}: these numbers are no test result")
    return doubts


def list_training_xrays(data_dir, rows):
    """([Xray] of train/ and val/, as far as they are there; why there are none)."""
    try:
        found = list_split(data_dir, "train")
        with contextlib.suppress(Failure):
            found += list_split(data_dir, "val")
    except Failure as reason:
        return [], str(reason)
    return identify_all(found, rows), ""


def find_shared_patients(report, xrays):
    """Adds to the report the patients in several splits, and those of several images in one."""
    unknown = report["no_patient"] = [xray.file for xray in xrays if xray.patient == xray.file]
    if unknown:
        which = f"{unknown[0]}: the name tells no patient ({len(unknown)} such images)"
        report["warnings"].append(f"{which}; {METADATA} with file_name and patient_id can tell it")
    patients, across = {}, {}
    pairs = dict.fromkeys([xray.split for xray in xrays], 0)
    for xray in xrays:
        patients.setdefault(xray.patient, []).append(xray)
    for patient, images in patients.items():
        splits = Counter(xray.split for xray in images)
        for name, n in splits.items():
            pairs[name] += n * (n - 1) // 2
        if len(splits) > 1:
            across[patient] = [xray.file for xray in images]
            level = "errors" if is_leak(splits) else "warnings"
            report[level].append(f"patient {patient} is in {' and '.join(splits)}")
    report |= {"patients_across": across, "same_patient_pairs": pairs}


def is_leak(splits):
    """Whether what these splits share makes the scores on the test images too good."""
    return "test" in splits and len(splits) > 1
