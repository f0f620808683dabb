"""Moves images of each class from train/ into val/, whole patients at a time; checks the data.

Reads DIR/train/{NORMAL,PNEUMONIA}/; writes DIR/val/ and DIR/split_val.json: the seed, and every
file that is moved. A second run moves nothing; a run that was interrupted is completed by the next.

    python split_val.py --data-dir data/chestxrays            # 50 images a class into val/
    python split_val.py --data-dir data/chestxrays --undo     # all of val/ back into train/
    python split_val.py --data-dir data/chestxrays --check    # leaks, duplicates, shortcuts, shift
"""

import argparse
import contextlib
import errno
import hashlib
import os
import shlex
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import common  # first: it says what to do where a package is missing

# isort: split
import numpy as np
import PIL.Image
from scipy import fft
from scipy.ndimage import gaussian_filter

try:
    import fcntl
except ImportError:  # Windows: no lock, run one split_val.py at a time
    fcntl = None
from cxr.cli import Parser, add_flags, number, run
from cxr.decode import explain_unreadable
from cxr.errors import Failure, is_no_fault_of_the_file, warn
from cxr.files import read_json, require_writable, sync_folder, write_json
from cxr.folders import CLASSES, SPLIT_FILE, by_class, list_split, list_val, require_whole_split
from cxr.patients import METADATA, identify_all, read_metadata, read_split

# ---------------------------------------------------------------- the choice of patients


def choose_patients(images, n, seed):
    """{class: sorted file names} of whole patients, at most n images a class.

    Patients come in the order of the SHA-256 of seed and name, the same on every machine and in
    every version of Python, and each is taken that does not push a class over n.
    """
    patients, counts, taken = {}, Counter(), []
    for image in images:
        patients.setdefault(image.group, []).append(image.path)

    def draw(patient):
        return hashlib.sha256(os.fsencode(f"{seed}/{patient}")).digest()

    for patient in sorted(patients, key=draw):
        more = Counter(path.parent.name for path in patients[patient])
        if all(counts[name] + more[name] <= n for name in CLASSES):
            counts += more
            taken += patients[patient]
    return by_class(taken)


def count(files):
    """How many files of each class, in words; files: {class: names}."""
    return " and ".join(f"{len(files[name])} {name}" for name in CLASSES)


# ---------------------------------------------------------------- the plan


def plan_split(data_dir, n, seed):
    """The record of a split, split_val.json, which is its plan; writes nothing."""
    splits = ["train"] + ["test"] * (data_dir / "test").exists()
    found = read_split(data_dir, *splits)
    train = found["train"]
    if unreadable := [image.path for split in splits for image in found[split] if not image.digest]:
        raise Failure(
            f"{unreadable[0]}: cannot be read ({len(unreadable)} such images); repair or remove it"
        )
    present = by_class([image.path for image in train])
    smaller = min(map(len, present.values()))
    third = max(1, min(smaller // 3, 50))  # what the reference takes, 50 of 150, and fits any set
    asked, n = n is not None, n or third
    if n >= smaller:
        has = f"{data_dir / 'train'} has {count(present)} images"
        less = f"ask less, as --per-class {third} (make: PER_CLASS={third})"
        raise Failure(f"--per-class {n}: {has}, and some of each must stay; {less}")
    moved = choose_patients(train, n, seed)
    if not all(moved.values()):
        together = f"a patient's images stay together, {count_patients(train)} patients in train/"
        others = f"see patient_id in {METADATA}, or ask for more: --per-class (make: PER_CLASS=)"
        raise Failure(f"--per-class {n}: {together}, and no choice is that small; {others}")
    if asked and any(len(files) < n for files in moved.values()):
        warn(f"whole patients give {count(moved)} images, not {n} of each")
    if unknown := sum(image.patient is None for image in train):
        tell = f"{data_dir / METADATA} with columns file_name and patient_id can tell them"
        warn(f"{unknown} names in train/ tell no patient, each counts as one of its own; {tell}")
    return {"seed": seed, "per_class": n, "moved": moved, "patients": count_patients(train, moved)}


def count_patients(images, moved=None):
    """How many patients the images have, or those of them that are moved, {class: names}."""
    return len({i.group for i in images if not moved or i.path.name in moved[CLASSES[i.label]]})


def list_folders(data_dir):
    """The folders in which a split changes something, or may."""
    places = (
        "train",
        "val",
        *(f"{split}/{name}" for split in ("train", "val") for name in CLASSES),
    )
    return [data_dir, *(data_dir / place for place in places)]


def list_moves(data_dir, moved, source, target):
    """[(from, to)] of the renames that remain to be done; a Failure where one could not be."""
    files = [Path(name, file) for name in CLASSES for file in moved[name]]
    pairs = [(data_dir / source / file, data_dir / target / file) for file in files]
    moves = [(old, new) for old, new in pairs if os.path.lexists(old)]
    for old, new in moves:
        if os.path.lexists(new):
            raise Failure(f"{new}: exists already, and so does {old}; remove one of them")
    for folder in list_folders(data_dir) if moves else ():
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            source = shlex.quote(str(data_dir))
            links = f"split_val.py --data-dir NEW --link-from {source}"
            links += f" (make: DATA=NEW LINK_FROM={source}) makes a tree of links"
            raise Failure(f"{folder}: not writable, images are to be moved; {links}")
    if gone := [old for old, new in pairs if not os.path.lexists(old) and not os.path.lexists(new)]:
        warn(f"{gone[0].name}: gone since the split ({len(gone)} such images)")
    return moves


# ---------------------------------------------------------------- move, undo, lock


def move(data_dir, moves):
    """Renames, never copies: at every moment each image is whole, in one place or in the other."""
    try:
        for folder in dict.fromkeys(new.parent for _, new in moves):
            folder.mkdir(parents=True, exist_ok=True)
        for old, new in moves:
            os.rename(old, new)
    except KeyboardInterrupt as stop:
        message = "interrupted; every image is whole, run the same command again to complete it"
        raise type(stop)(message) from None
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise Failure(f"{new}: on another file system than {old}; put both on one") from None
    for folder in list_folders(data_dir):
        sync_folder(folder)


@contextlib.contextmanager
def lock(data_dir):
    """Locks the data folder itself, so that a kill frees it and leaves no file behind."""
    if not data_dir.is_dir():
        hint = "unpack the images there, or name their folder with --data-dir"
        raise Failure(f"{data_dir}: no such folder; {hint}")
    if fcntl is None:
        yield
        return
    folder = os.open(data_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{data_dir}: another split_val.py is at work, waiting for it", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems cannot lock a folder
            warn(f"{data_dir}: no lock ({error.strerror}); run one split_val.py at a time")
        for path in data_dir.glob(f".{SPLIT_FILE}.*.tmp"):  # of a run that was killed
            path.unlink()
        yield
    finally:
        os.close(folder)


def link_images(data_dir, source):
    """Makes the tree of data_dir out of links to the images of `source`, which stays as it is."""
    source, made = source.resolve(), 0
    if source == data_dir.resolve():
        raise Failure(
            f"--link-from {source}: is --data-dir itself; name another folder for the links"
        )
    try:
        splits = ["train", *(each for each in ("val", "test") if (source / each).is_dir())]
        listed = [(split, *each) for split in splits for each in list_split(source, split)]
    except Failure as error:
        raise Failure(str(error).replace("--data-dir", "--link-from")) from None
    for split, path, label in listed:
        places = [data_dir / each / CLASSES[label] / path.name for each in (split, "val")]
        there = next(filter(os.path.lexists, places), None)  # linked already, perhaps moved since
        if there and there.resolve() != path.resolve():  # which may be a link, too
            raise Failure(
                f"{there}: is no link to {path}; name another --data-dir for these images"
            )
        if not there:
            places[0].parent.mkdir(parents=True, exist_ok=True)
            places[0].symlink_to(path)
            made += 1
    if (source / METADATA).exists() and not os.path.lexists(data_dir / METADATA):
        (data_dir / METADATA).symlink_to(source / METADATA)
    print(f"Linked {made} images of {source} into {data_dir}")


def split(args):
    """Writes the plan first and then renames what remains of it, so that any run completes it."""
    data_dir, path = args.data_dir, args.data_dir / SPLIT_FILE
    if args.link_from:
        link_images(data_dir, args.link_from)
    with lock(data_dir):
        record, val = read_json(path), list_val(data_dir)
        if record is None and any(val.values()):
            keep_foreign(data_dir, val)
            return
        plan = record or plan_split(data_dir, args.per_class, args.seed)
        if record:
            warn_of_flags(args, record)
        moves = list_moves(data_dir, plan["moved"], "train", "val")
        if not moves:
            seed = f"seed {plan['seed']}"
            print(f"{data_dir}: already split, {count(val)} images in val/ ({seed}); nothing moved")
            return
        if record is None:
            write_json(path, plan)
        move(data_dir, moves)
    what = f"{count(plan['moved'])} images of {plan['patients']} patients"
    print(f"Moved {what} from {data_dir / 'train'} to {data_dir / 'val'} (seed {plan['seed']})")


def keep_foreign(data_dir, val):
    print(f"{data_dir / 'val'} came with the data ({count(val)} images) and is left alone")
    if min(map(len, val.values())) < 30:  # 30 + 30: a 95 % interval of accuracy is 20 points wide
        remedy = "--undo takes them back into train/, then split again"
        warn(f"so few images make early stopping a lottery; {remedy}")


def warn_of_flags(args, record):
    """Says where the user asks for another split than the one that is there."""
    asked = (args.per_class or record["per_class"], args.seed or record["seed"])
    if asked != (record["per_class"], record["seed"]):
        there = f"--per-class {record['per_class']} --seed {record['seed']}"
        remedy = "for another split run split_val.py --undo first"
        warn(f"{args.data_dir}: split with {there}, which stays; {remedy}")


def undo(args):
    """Moves val/ back, removes the folders that this empties, and last of all the record."""
    data_dir, path = args.data_dir, args.data_dir / SPLIT_FILE
    with lock(data_dir):
        record, val = read_json(path), list_val(data_dir)
        if record is None and not any(val.values()):
            print(f"{data_dir}: nothing to undo")
            return
        moves = list_moves(data_dir, record["moved"] if record else val, "val", "train")
        move(data_dir, moves)
        for folder in (*(data_dir / "val" / name for name in CLASSES), data_dir / "val"):
            with contextlib.suppress(OSError):  # not there, or not empty: what else is in it stays
                folder.rmdir()
        path.unlink(missing_ok=True)
        sync_folder(data_dir)
        left = sum(map(len, list_val(data_dir).values()))
    print(f"Moved {len(moves)} images back from {data_dir / 'val'} to {data_dir / 'train'}")
    if left:
        warn(f"{left} images in {data_dir / 'val'} did not come from the split and stay there")


# ---------------------------------------------------------------- look at an image


class Xray(NamedTuple):
    file: str  # split/class/name, below the data folder
    folder: str  # split/class
    split: str
    label: int  # index into CLASSES
    digest: str  # SHA-256 of the file
    pixels: str  # SHA-256 of the grey levels as decoded
    patient: str  # not the group, which may merge patients; else the file itself
    numbers: dict  # of common.image_numbers
    properties: tuple  # size, mode and format as the report names them
    thumbnail: np.ndarray  # uint8 (96, 96), grey


def look_at(image):
    """An Xray, or (file, reason) where the image cannot be read."""
    path = image.path
    split, name = path.parts[-3:-1]
    file = f"{split}/{name}/{path.name}"
    try:
        numbers, grey, scan = common.image_numbers(path, common.SIZE)
        properties = "{}x{}".format(*scan.size), scan.mode, scan.format
    except Exception as error:  # damaged files make decoders raise nearly anything
        if is_no_fault_of_the_file(error):
            raise
        return file, explain_unreadable(path, error)
    return Xray(
        file=file,
        folder=f"{split}/{name}",
        split=split,
        label=CLASSES.index(name),
        digest=image.digest,
        pixels=hashlib.sha256(f"{grey.size}".encode() + grey.tobytes()).hexdigest(),
        patient=image.patient or file,
        numbers=numbers,
        properties=properties,
        thumbnail=np.asarray(grey.resize((96, 96), PIL.Image.Resampling.BOX)),
    )


# ---------------------------------------------------------------- duplicates

# Measured on the 400 reference images and copies of each, moved by up to 5 of 224 pixels, saved at
# JPEG quality 40, 20 % brighter, of other contrast, blurred: a copy correlates by 0.926 or more
# when blurred, and by 0.905 or more in its details (one image, changed in all ways, by 0.85). Of
# the pairs of different images 2 % are above CANDIDATE_LIMIT; in detail none is above 0.55 (if
# mirrored 0.47, as negative 0.40), of 750 phantoms, whose spines are alike, none above 0.89.
CANDIDATE_LIMIT, COPY_LIMIT = 0.92, 0.9
NEGATIVE_LIMIT = -0.2  # of the reference none correlates below 0.32 with what all have in common
MAX_CANDIDATES = 200_000  # pairs to look at closely, the most alike first: half a minute
SHIFTS = np.arange(-3, 4)  # pixels of a thumbnail: 7 of 224
RAMP = np.minimum(np.minimum(np.arange(88) + 0.5, 87.5 - np.arange(88)) / 8, 1)
TAPER = np.outer(RAMP, RAMP).astype(np.float32)  # fades out what a shift moves out of the picture


def unit(image):
    """Mean 0 and length 1, so that products are correlations; a constant image is all 0."""
    image = image - image.mean()
    return image / max(np.linalg.norm(image), 1e-3)


def find_candidates(images, others):
    """int (M, 2): the pairs i < j of a blurred image and another, the most alike first."""
    images, others = images.reshape(len(images), -1), others.reshape(len(others), -1)
    pairs, alike = [], []
    for start in range(0, len(images), 512):
        products = np.triu(np.abs(images[start : start + 512] @ others[start:].T), 1)
        found = np.argwhere(products > CANDIDATE_LIMIT)
        pairs.append(found + start)
        alike.append(products[tuple(found.T)])
    best = np.argsort(-np.concatenate(alike), kind="stable")[:MAX_CANDIDATES]
    return np.concatenate(pairs)[best]


def find_near_duplicates(thumbnails):
    """{(i, j): (correlation, change)}, i < j, of nearly the same images, whatever their exposure.

    thumbnails: uint8 (N, 96, 96); change: "", "mirrored", "negative" or "mirrored negative".
    Candidates are pairs whose blurred thumbnails correlate; what confirms them is the
    cross-correlation of their details, its largest value over all small shifts.
    """
    # a copy that was moved may have black edges: without the outer 4 pixels
    inner = thumbnails[:, 4:-4, 4:-4].astype(np.float32)
    # 10 x 10 samples, at places that a mirror maps onto each other
    blurred = np.stack([unit(gaussian_filter(x, 6)[3::9, 3::9]) for x in inner])
    details = np.stack(
        [unit((gaussian_filter(x, 1) - gaussian_filter(x, 2)) * TAPER) for x in inner]
    )
    spectra, copies = fft.rfft2(details), {}
    for mirrored, step in ((False, 1), (True, -1)):
        candidates = find_candidates(blurred, blurred[:, :, ::step])
        for start in range(0, len(candidates), 512):
            pairs = candidates[start : start + 512]
            i, j = pairs.T
            others = fft.rfft2(details[j][:, :, ::step], workers=-1)
            correlations = fft.irfft2(spectra[i] * others.conj(), workers=-1)
            shifted = correlations[:, SHIFTS[:, None], SHIFTS]
            low, high = shifted.min((1, 2)), shifted.max((1, 2))
            for negative, alike in ((False, high), (True, -low)):
                change = " ".join(["mirrored"] * mirrored + ["negative"] * negative)
                for row in np.flatnonzero(alike > COPY_LIMIT):
                    pair, value = tuple(pairs[row].tolist()), round(float(alike[row]), 3)
                    copies[pair] = max(copies.get(pair, (0, "")), (value, change))
    return copies


def report_duplicates(report, xrays):
    """Adds to the report the images that occur more than once, exactly or nearly."""
    report["same"], report["nearly_same"], first = [], [], {}
    for i, b in enumerate(xrays):
        a = xrays[min(first.setdefault(key, i) for key in (b.digest, b.pixels))]
        if a is not b:
            report["same"].append([a.file, b.file])
            # inside a folder it only weighs double; elsewhere train.py would refuse it
            level = "warnings" if a.folder == b.folder else "errors"
            report[level].append(f"{a.file} is the same image as {b.file}")
    copies = find_near_duplicates(np.stack([xray.thumbnail for xray in xrays]))
    for (i, j), (alike, change) in sorted(copies.items()):
        a, b = xrays[i], xrays[j]
        if a.pixels == b.pixels:
            continue
        report["nearly_same"].append([a.file, b.file, alike, change])
        level = "errors" if is_leak({a.split, b.split}) else "warnings"
        what = f"nearly the same image ({change})" if change else "nearly the same image"
        report[level].append(f"{a.file} is {what} as {b.file} (correlation {alike})")


def report_negatives(report, xrays):
    """Adds to the report the images that look like negatives of the others.

    What all have in common is the first principal component of their blurred thumbnails.
    """
    blurred = np.stack(
        [unit(gaussian_filter(np.float32(x.thumbnail), 6)[3::6, 3::6]) for x in xrays]
    )
    blurred = blurred.reshape(len(xrays), -1)
    common_part = np.linalg.eigh(blurred.T @ blurred)[1][:, -1]
    alike = blurred @ common_part
    alike *= np.sign(np.median(alike))
    found = report["negatives"] = [
        x.file for x, value in zip(xrays, alike, strict=True) if value < NEGATIVE_LIMIT
    ]
    if found:
        which = f"{len(found)} images look like negatives of the others, as {found[0]}"
        report["warnings"].append(f"{which}; invert them, or remove them")


def report_patients(report, xrays):
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


# ---------------------------------------------------------------- shortcuts and shift

ALARM = 0.7  # AUROC from which one number matters: the customary bound of a test that discriminates
BORDER = np.pad(np.zeros((26, 26), bool), 3, constant_values=True).ravel()  # no lung is so far out


def as_pixels(xrays):
    """float32 (N, 1024): the images at 32 x 32."""
    blocks = np.stack([xray.thumbnail for xray in xrays]).reshape(-1, 32, 3, 32, 3)
    return blocks.mean((2, 4), dtype=np.float32).reshape(-1, 1024)


def is_alarming(auroc, labels, patients):
    """Whether an AUROC is both large and no accident of few patients.

    3 standard deviations of the Mann-Whitney statistic, whose n are patients: images of one patient
    are alike and tell little more than one of them.
    """
    n0, n1 = (len(set(patients[labels == label])) for label in (0, 1))
    return bool(auroc > max(ALARM, 0.5 + 3 * ((n0 + n1 + 1) / (12 * n0 * n1)) ** 0.5))


def make_folds(labels, patients):
    """[(training rows, rows held out)], each patient on one side; none where there are too few."""
    from sklearn.model_selection import StratifiedGroupKFold

    k = min(5, *(len(set(patients[labels == label])) for label in (0, 1)))
    if k < 2:
        return []
    folds = StratifiedGroupKFold(k, shuffle=True, random_state=0).split(labels, labels, patients)
    # patients with both labels can leave one of them to no side: nothing is learned there
    return [(train, held) for train, held in folds if len(set(labels[train])) == 2]


def fit_cut(values, labels):
    """(sign, cut) such that sign * values > sign * cut tells the labels best."""
    from sklearn.metrics import roc_curve

    found = []
    for sign in (1, -1):
        false, true, cuts = roc_curve(labels, sign * values, drop_intermediate=False)
        right = true * labels.sum() + (1 - false) * (1 - labels).sum()
        best = 1 + np.argmax(right[1:-1])  # the ends would call every image the same
        found.append((right[best], sign, sign * (cuts[best] + cuts[best + 1]) / 2))
    return max(found)[1:]


def score_number(values, labels, folds):
    """float (N,): above 0 where the cut fitted on the other side of the fold says label 1."""
    scores = np.zeros(len(values))
    for train, held in folds:
        sign, cut = fit_cut(values[train], labels[train])
        scores[held] = sign * (values[held] - cut)
    return scores


def score_pixels(pixels, labels, folds):
    """float (N,): the logit of label 1, by a logistic regression fitted on the other side."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # C from 0.001 to 0.1 changes no AUROC on the reference data by more than 0.05
    regression = LogisticRegression(C=0.01, class_weight="balanced", solver="liblinear")
    model, scores = make_pipeline(StandardScaler(), regression), np.zeros(len(pixels))
    for train, held in folds:
        model.fit(pixels[train], labels[train])
        scores[held] = model.decision_function(pixels[held])
    return scores


def find_shortcuts(numbers, pixels, labels, patients, scored):
    """Rows of the page: how well one number separates the classes of the images `scored`.

    numbers: {name: float (N,)}; pixels: float (N, 1024); labels: int (N,); patients: str (N,);
    scored: bool (N,). Fitted on the other images, or on other patients where there are no others:
    never scored where it was fitted.
    """
    from sklearn.metrics import roc_auc_score

    others = scored if scored.all() else ~scored
    folds = make_folds(labels, patients) if scored.all() else [(others, scored)]
    found, rows = [], []
    for name, values in numbers.items():
        if folds and all(np.ptp(values[train]) > 0 for train, _ in folds):  # else it never splits
            sign, cut = fit_cut(values[others], labels[others])
            rule = f"{'>' if sign > 0 else '<='} {cut:.4g}"
            found.append((name, rule, score_number(values, labels, folds)))
    border = score_pixels(pixels[:, BORDER], labels, folds)
    for name, rule, scores in [*found, ("3-pixel border", "linear fit", border)]:
        right = ((scores > 0) == (labels == 1))[scored]
        auroc = float(roc_auc_score(labels[scored], scores[scored]))
        alarm = is_alarming(auroc, labels[scored], patients[scored])
        row = {"number": name, "rule": rule, "n": len(right), "accuracy": float(right.mean())}
        rows.append(row | {"auroc": auroc, "alarm": alarm})
    return sorted(rows, key=lambda row: -row["auroc"])


def find_shift(numbers, pixels, scored, patients):
    """{number: AUROC} how well one number tells the images `scored` from the others."""
    from sklearn.metrics import roc_auc_score

    split, found = scored.astype(int), {}
    for name, values in numbers.items():
        auroc = float(roc_auc_score(split, values))
        found[name] = max(auroc, 1 - auroc)
    folds = make_folds(split, patients)
    for name, columns in (("3-pixel border", BORDER), ("32x32 pixels", slice(None))):
        found[name] = float(roc_auc_score(split, score_pixels(pixels[:, columns], split, folds)))
    return found


def report_properties(report, xrays):
    """Adds the sizes, modes and formats, {kind: {folder: images}} each; warns of one class's."""
    for i, key in enumerate(("sizes", "modes", "formats")):
        counts = {}
        for xray in xrays:
            counts.setdefault(xray.properties[i], Counter())[xray.folder] += 1
        report[key] = dict(sorted(counts.items(), key=lambda row: -row[1].total()))
    for kind, folders in [*report["modes"].items(), *report["formats"].items()]:
        # that 8 images of a balanced set are all of one class happens by chance once in 128 times
        if len({folder.split("/")[1] for folder in folders}) == 1 and folders.total() >= 8:
            report["warnings"].append(
                f"shortcut: {folders.total()} {kind} images, all in {' and '.join(folders)}"
            )


def report_shortcuts(report, xrays):
    """Adds what a number tells about the classes, and about the split that is scored."""
    split, warnings, table = report["scored_on"], report["warnings"], {}
    names, pixels = xrays[0].numbers, as_pixels(xrays)
    numbers = {name: np.array([xray.numbers[name] for xray in xrays]) for name in names}
    labels = np.array([xray.label for xray in xrays])
    patients = np.array([xray.patient for xray in xrays])
    scored = np.array([xray.split == split for xray in xrays])
    rows = report["shortcuts"] = find_shortcuts(numbers, pixels, labels, patients, scored)
    if found := [row["number"] for row in rows if row["alarm"]]:
        what = "each alone separates the classes of"
        warnings.append(f"shortcut: {', '.join(found)}: {what} {split}/")
    for label, name in enumerate(CLASSES if not scored.all() else ()):
        here = labels == label
        of_class = {key: v[here] for key, v in numbers.items() if np.ptp(v) > 0}
        found = find_shift(of_class, pixels[here], scored[here], patients[here])
        for key, auroc in found.items():
            alarm = is_alarming(auroc, scored[here], patients[here])
            table.setdefault(key, {"number": key})[name] = {"auroc": auroc, "alarm": alarm}
    report["shift"] = sorted(
        table.values(), key=lambda row: -max(row[name]["auroc"] for name in CLASSES)
    )
    for name in CLASSES:
        if found := [row["number"] for row in report["shift"] if row[name]["alarm"]]:
            what = f"each alone tells {split}/{name} from the other {name} images"
            warnings.append(f"shift: {', '.join(found)}: {what}")


# ---------------------------------------------------------------- the page

LINES = 25  # errors and warnings on the page


def examine(data_dir):
    """Everything the check finds: what --json holds."""
    require_whole_split(data_dir)
    splits = ["train"] + ["val"] * any(list_val(data_dir).values())
    splits += ["test"] * (data_dir / "test").exists()
    listed = [each for split in splits for each in list_split(data_dir, split, others=True)]
    images = identify_all(listed, read_metadata(data_dir))
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(look_at, images))
    xrays = [look for look in looks if isinstance(look, Xray)]
    unreadable = [look for look in looks if not isinstance(look, Xray)]
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
    report_duplicates(report, xrays)
    report_negatives(report, xrays)
    report_patients(report, xrays)
    report_properties(report, xrays)
    report_shortcuts(report, xrays)
    return report


def print_report(report):
    images, patients, scored = report["images"], report["patients"], report["scored_on"]
    print("images (patients)" + "".join(f"{name:>18}" for name in CLASSES))
    for split in report["same_patient_pairs"]:
        folders = [f"{split}/{name}" for name in CLASSES]
        cells = [f"{images[folder]} ({patients[folder]})" for folder in folders]
        print(f"  {split:<15}" + "".join(f"{cell:>18}" for cell in cells))
    for key in ("sizes", "modes", "formats"):
        properties = [f"{kind} ({sum(folders.values())})" for kind, folders in report[key].items()]
        more = f" and {len(properties) - 4} more" if properties[4:] else ""
        whole = f" (the whole film is resized to {common.SIZE}x{common.SIZE})" * (key == "sizes")
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


def check(args):
    if args.json and args.json.name == SPLIT_FILE:
        raise Failure(f"--json {args.json}: this is the name of the split's record; choose another")
    if args.json:
        require_writable(args.json)
    with lock(args.data_dir):
        report = examine(args.data_dir)
    print_report(report)
    if args.json:
        write_json(args.json, report)
    if report["errors"]:
        raise Failure(f"{args.data_dir}: {len(report['errors'])} errors in the data, listed above")


# ---------------------------------------------------------------- arguments, main


def parse_args(argv=None):
    parser = Parser("split_val.py", __doc__)
    none = argparse.SUPPRESS  # no "default: None" in the help
    parser.set_defaults(per_class=None, link_from=None, json=None)
    add_flags(parser, "--data-dir", "--seed")
    verb = parser.add_mutually_exclusive_group()
    # fmt: off
    parser.add_argument("--per-class", type=number(int, 1), default=none, metavar="N",
        help="images of each class to move into val/ (default: a third of the smaller class, at "
             "most 50)")
    parser.add_argument("--link-from", type=Path, default=none, metavar="DIR",
        help="make --data-dir of links to the images in DIR, which is only read, and split that")
    verb.add_argument("--undo", action="store_true", help="move val/ back into train/")
    verb.add_argument("--check", action="store_true",
        help="report what is wrong with the data; move nothing")
    parser.add_argument("--json", type=Path, default=none, metavar="FILE",
        help="with --check: the report for machines")
    # fmt: on
    args = parser.parse_args(argv)
    if args.json and not args.check:
        parser.error("--json needs --check")
    if args.link_from and (args.check or args.undo):
        parser.error("--link-from goes with a split only")
    return args


def main(argv=None):
    args = parse_args(argv)
    return run(check if args.check else undo if args.undo else split, args, "split_val.py")


if __name__ == "__main__":
    sys.exit(main())
