"""Moves images of each class from train/ into val/, whole patients at a time; checks the data before any training.

Reads DIR/train/{NORMAL,PNEUMONIA}/; writes DIR/val/ and DIR/split_val.json: the seed, every file moved, and every
image's SHA-256. A second run moves nothing; a run that was interrupted is completed by the next.

    python split_val.py --data-dir data/chestxrays            # 50 images a class into val/
    python split_val.py --data-dir data/chestxrays --undo     # all of val/ back into train/
    python split_val.py --data-dir data/chestxrays --check    # leaks, duplicates, shortcuts and shift in the data
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
from common import CLASSES, SPLIT_FILE, Failure, patient_key, patient_of, warn

# ---------------------------------------------------------------- the choice


def grouped(items, key):
    """{key(item): items with that key}, in the order of their first."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def count(files):
    """How many files of each class, in words; files: {class: names}."""
    return " and ".join(f"{len(files[name])} {name}" for name in CLASSES)


def paths_of(files):
    """[Path(class, name)] of files: {class: names}."""
    return [Path(name, file) for name in CLASSES for file in files[name]]


def choose_groups(sizes, n):
    """(indexes of groups, their (NORMAL, PNEUMONIA) total): n images of both classes, or the most below that.

    sizes: [(NORMAL images, PNEUMONIA images)]; of all choices with that total, the one that prefers early groups.
    A subset sum over bit sets: bit a * width + b of reach[i] says that the groups from i on can give a and b images.
    """
    width = 2 * n + 1  # b <= n, and a group adds n at most: no sum runs over into the next a
    mask = sum(((1 << (n + 1)) - 1) << (a * width) for a in range(n + 1))
    reach = [1]
    for a, b in reversed(sizes):
        more = reach[-1] if max(a, b) > n else (reach[-1] | reach[-1] << (a * width + b)) & mask
        reach.append(reach[-1] if more == reach[-1] else more)  # equal sets share their memory
    reach.reverse()
    totals = [divmod(i, width) for i, bit in enumerate(bin(reach[0])[:1:-1]) if bit == "1"]
    a, b = total = max(totals, key=lambda total: (min(total) > 0, sum(total), min(total), total))
    chosen = []
    for i, (normal, pneumonia) in enumerate(sizes):
        if normal <= a and pneumonia <= b and reach[i + 1] >> ((a - normal) * width + b - pneumonia) & 1:
            chosen.append(i)
            a, b = a - normal, b - pneumonia
    return chosen, total


def plan_split(data_dir, n, seed):
    """The record of a split that is about to begin; writes nothing."""
    found = common.read_split(data_dir, "train", *["test"] * (data_dir / "test").exists())
    digests = {image.path: image.digest for images in found.values() for image in images}
    train = [image.path for image in found["train"]]
    by_class = grouped(train, lambda path: path.parent.name)
    if n >= min(map(len, by_class.values())):
        has = f"{data_dir / 'train'} has {count(by_class)} images"
        raise Failure(f"--per-class {n}: {has}, and some of each must stay; ask less")
    if unknown := sum(patient_of(path.name) is None for path in train):
        warn(f"{unknown} names in train/ tell no patient; each such image counts as a patient of its own")
    if unreadable := [path for path in digests if not digests[path]]:
        raise Failure(f"{unreadable[0]}: cannot be read ({len(unreadable)} such images); repair or remove it")

    # ordered by SHA-256, not shuffled: the same on every machine and in every version of Python
    patients = grouped(train, patient_key)
    order = sorted(patients, key=lambda patient: hashlib.sha256(os.fsencode(f"{seed}/{patient}")).digest())
    sizes = [tuple(sum(path.parent.name == name for path in patients[key]) for name in CLASSES) for key in order]
    chosen, total = choose_groups(sizes, n)
    if not all(total):
        raise Failure(f"--per-class {n}: a patient's images stay together, and no choice of patients is that small")
    if total != (n, n):
        warn(f"whole patients give {total[0]} {CLASSES[0]} and {total[1]} {CLASSES[1]} images, not {n} of each")
    taken = {path for i in chosen for path in patients[order[i]]}
    return {
        "format": 1,
        "state": "splitting",
        "seed": seed,
        "per_class": n,
        "grouping": "by patient: personN, IM-N or NORMAL2-IM-N in the file name, else the image itself",
        "moved": {name: sorted(path.name for path in taken if path.parent.name == name) for name in CLASSES},
        "sha256": {
            Path("val" if path in taken else path.parts[-3], *path.parts[-2:]).as_posix(): digest
            for path, digest in digests.items()
        },
    }


# ---------------------------------------------------------------- the moves


@contextlib.contextmanager
def locked(data_dir):
    """Holds the lock of the data folder: on the folder itself, so that a kill frees it and leaves no file behind."""
    if not data_dir.is_dir():
        raise Failure(f"{data_dir}: no such folder; unpack the images there, or name their folder with --data-dir")
    folder = os.open(data_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{data_dir}: another split_val.py is at work, waiting for it", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems cannot lock a folder
            warn(f"{data_dir}: no lock ({error.strerror}); run one split_val.py at a time")
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def resumable():
    """Says what an error in the middle of the moves leaves: whole files, and a record that completes them."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)("interrupted; every image is whole, run the same command again to complete it") from None
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise Failure(f"{error.filename2}: on another file system than {error.filename}; put both on one") from None


def read_record(data_dir):
    """split_val.json, checked; None where there is none."""
    for temporary in data_dir.glob(f".{SPLIT_FILE}.*.tmp"):  # of a killed run: we hold the lock, so it is dead
        with contextlib.suppress(OSError):
            temporary.unlink()
    kinds = {"format": int, "state": str, "seed": int, "per_class": int, "moved": {str: [str]}, "sha256": {str: str}}
    record = common.read_json(data_dir / SPLIT_FILE, kinds)
    if record is not None:
        moved = [f"val/{name}/{file}" for name, files in record["moved"].items() for file in files]
        if (
            (record["format"], list(record["moved"])) != (1, list(CLASSES))
            or record["state"] not in ("splitting", "done", "undoing")
            or any(Path(file).name != file for files in record["moved"].values() for file in files)
            or sorted(moved) != sorted(file for file in record["sha256"] if file.startswith("val/"))
        ):
            raise Failure(f"{data_dir / SPLIT_FILE}: damaged; restore it, or delete it and take val/ back with --undo")
    return record


def list_val(data_dir):
    """{class: names of its images in val/}; a missing or an empty folder has none."""
    val, names = data_dir / "val", {name: [] for name in CLASSES}
    if val.is_symlink() or (val.exists() and not val.is_dir()):
        raise Failure(f"{val}: expected a folder, found a link or a file; move it away")
    for entry in os.scandir(val) if val.exists() else ():
        if entry.is_dir() != (entry.name in CLASSES) or (entry.is_dir() and entry.is_symlink()):
            raise Failure(f"{entry.path}: expected only the folders {' and '.join(CLASSES)}, no links; move it away")
        if entry.is_dir():
            names[entry.name] = [path.name for path in common.list_images(entry)]
    return names


def list_moves(data_dir, moved, source, target):
    """[(from, to)] of the renames that remain to be done; a Failure where one of them could not be."""
    folders, moves, gone = {data_dir}, [], []
    for file in paths_of(moved):
        old, new = data_dir / source / file, data_dir / target / file
        if os.path.lexists(old) and os.path.lexists(new):
            raise Failure(f"{new}: exists already, and so does {old}; remove one of them")
        if os.path.lexists(old):
            moves.append((old, new))
        elif not os.path.lexists(new):
            gone.append(old)
    for old, new in {old.parent: new.parent for old, new in moves}.items():
        home = next(folder for folder in (new, new.parent, data_dir) if folder.exists())
        folders |= {old, home}
        if old.stat().st_dev != home.stat().st_dev:
            raise Failure(f"{home}: on another file system than {old}; put both on one")
    for folder in sorted(folders):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise Failure(f"{folder}: not writable, and images are to be moved; change its permissions")
    if gone:
        warn(f"{gone[0]}: gone since the split ({len(gone)} such images)")
    return moves


def move(data_dir, moves):
    """Renames, never copies: at every moment each image is whole, in one place or in the other."""
    for folder in dict.fromkeys(new.parent for _, new in moves):
        folder.mkdir(parents=True, exist_ok=True)
    for old, new in moves:
        os.rename(old, new)
    common.sync(data_dir, *(data_dir / split / name for split in ("train", "val") for name in ("", *CLASSES)))


def split(args):
    data_dir, path = args.data_dir, args.data_dir / SPLIT_FILE
    with locked(data_dir), resumable():
        record = read_record(data_dir)
        if record and record["state"] == "undoing":
            print("An --undo was interrupted: completing it first")
            record = put_back(data_dir, record)
        val = list_val(data_dir)
        if record is None and any(val.values()):
            keep_foreign(data_dir, val)
            return
        if record and (record["per_class"], record["seed"]) != (args.per_class, args.seed):
            drawn = f"--per-class {record['per_class']} --seed {record['seed']}"
            warn(f"{data_dir}: split with {drawn}, which stays; for another split run split_val.py --undo first")
        if record and record["state"] == "done":
            confirm(data_dir, record, val)
            return
        record = record or plan_split(data_dir, args.per_class, args.seed)
        moves = list_moves(data_dir, record["moved"], "train", "val")
        common.write_json(path, record)
        move(data_dir, moves)
        common.write_json(path, record | {"state": "done"})
        moved = f"{count(record['moved'])} images of {len(set(map(patient_key, paths_of(record['moved']))))} patients"
        print(f"Moved {moved} from {data_dir / 'train'} to {data_dir / 'val'} (seed {record['seed']})")


def keep_foreign(data_dir, val):
    print(f"{data_dir / 'val'} came with the data ({count(val)} images) and is left alone")
    if min(map(len, val.values())) < 30:  # 30 + 30 images: the accuracy's 95 % interval is some 20 points wide
        warn("so few images make early stopping a lottery; --undo takes them back into train/, then split again")


def confirm(data_dir, record, val):
    """Says that the split is done; a Failure where an image is back in train/, a warning where one is gone."""
    gone = [file for file in paths_of(record["moved"]) if file.name not in val[file.parent.name]]
    for file in paths_of(record["moved"]):
        if os.path.lexists(data_dir / "train" / file):
            what = "restore it there and remove any copy in train/, or start over with --undo"
            raise Failure(
                f"{data_dir / 'val' / file}: expected there and no longer in train/, as {SPLIT_FILE} says; {what}"
            )
    if gone:
        warn(f"{data_dir / 'val' / gone[0]}: gone since the split ({len(gone)} such images)")
    print(f"{data_dir}: already split, {count(val)} images in val/ (seed {record['seed']}); nothing moved")


def undo(args):
    data_dir = args.data_dir
    with locked(data_dir), resumable():
        record, val = read_record(data_dir), list_val(data_dir)
        if record is None:
            if not any(val.values()):
                print(f"{data_dir}: nothing to undo")
                return
            hashes = {f"val/{file.as_posix()}": "" for file in paths_of(val)}
            record = dict(format=1, state="", seed=0, per_class=0, grouping="val/ as it came", moved=val, sha256=hashes)
        put_back(data_dir, record)


def put_back(data_dir, record):
    """Moves the record's images from val/ to train/, removes val/ where that leaves it empty, and then the record."""
    moves = list_moves(data_dir, record["moved"], "val", "train")
    if record["state"] != "undoing":
        common.write_json(data_dir / SPLIT_FILE, record | {"state": "undoing"})
    move(data_dir, moves)
    for folder in (*(data_dir / "val" / name for name in CLASSES), data_dir / "val"):
        with contextlib.suppress(OSError):  # not there, or not empty: what else is in it stays
            folder.rmdir()
    common.sync(data_dir)
    (data_dir / SPLIT_FILE).unlink()
    common.sync(data_dir)
    back = sum((data_dir / "train" / file).exists() for file in paths_of(record["moved"]))
    print(f"Moved {back} images back from {data_dir / 'val'} to {data_dir / 'train'}")
    if left := sum(map(len, list_val(data_dir).values())):
        warn(f"{left} images in {data_dir / 'val'} did not come from the split and stay there")


# ---------------------------------------------------------------- the check

# Both lie below every copy made of 400 radiographs: saved at JPEG quality 40, 20 % brighter, moved by up to 10 of 224
# pixels, and all three at once (hash 0.963 or more, correlation 0.937 or more). Of the 79,800 pairs of different ones
# 0.1 % have a hash above its limit, and none a correlation above 0.675. A copy that is turned or cropped may escape.
HASH_LIMIT, COPY_LIMIT = 0.95, 0.9
MAX_CANDIDATES = 50_000  # pairs to look at closely, the most alike first: about half a minute
ALARM = 0.7  # AUROC from which one number matters: the customary bound of a test that discriminates at all
LINES = 25  # errors and warnings on the page


class Seen(NamedTuple):
    file: str  # path below the data folder
    split: str
    label: int
    digest: str  # SHA-256 of the file
    patient: str | None  # by the strict key: the cautious one would report different patients across splits
    numbers: dict
    kinds: dict  # size, mode and format as the report names them
    pixels: str  # SHA-256 of the grey levels as decoded
    copy: np.ndarray  # uint8 (96, 96), the grey levels, small

    @property
    def folder(self):
        return f"{self.split}/{CLASSES[self.label]}"


def look_at(split, label, path):
    """A Seen, or (file, reason) where the image cannot be read."""
    from PIL import Image

    file = Path(*path.parts[-3:]).as_posix()
    if isinstance(found := common.read_or_explain(common.look_closely, path), str):
        return file, found
    numbers, grey, kinds = found
    pixels = hashlib.sha256(f"{grey.size}".encode() + grey.tobytes()).hexdigest()
    copy = np.asarray(grey.resize((96, 96), Image.Resampling.BOX))
    return Seen(file, split, label, common.hash_file(path), patient_of(path.name), numbers, kinds, pixels, copy)


def box_mean(copies, size):
    """float32 (N, 97 - size, 97 - size): the means over size x size pixels of uint8 (N, 96, 96)."""
    sums = np.pad(copies, ((0, 0), (1, 0), (1, 0))).cumsum(1, dtype=np.float32).cumsum(2)  # exact: below 2**24
    return (sums[:, size:, size:] - sums[:, :-size, size:] - sums[:, size:, :-size] + sums[:, :-size, :-size]) / size**2


def unit(windows):
    """(N, ...) as (N, D) vectors of mean 0 and length 1; a constant one is all 0. Their products are correlations."""
    vectors = windows.reshape(len(windows), -1)
    vectors = vectors - vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-3)


def similar_pairs(copies):
    """[(i, j, correlation)], i < j, of images that are nearly the same. copies: uint8 (N, 96, 96).

    Candidates come from a perceptual hash, 12 x 12 samples of the blurred middle, compared at 5 x 5 shifts of up to 14
    of 224 pixels, all pairs at once as matrix products. What confirms them is the correlation of the middle's details,
    without the slow changes (exposure, the shape of a thorax), at up to 25 finer shifts around the hash's best.
    """
    blurred, shifts = box_mean(copies, 6), [(y, x) for y in range(-6, 7, 3) for x in range(-6, 7, 3)]
    hashes = [unit(blurred[:, 12 + y : 79 + y : 6, 12 + x : 79 + x : 6]) for y, x in shifts]
    middle, candidates = hashes[len(shifts) // 2], []
    for start in range(0, len(copies), 512):
        rows = middle[start : start + 512]
        best = np.full((len(rows), len(copies) - start), -1, np.float32)
        where = np.zeros(best.shape, np.int8)
        for number, moved in enumerate(hashes):
            alike = rows @ moved[start:].T
            where[alike > best] = number
            np.maximum(best, alike, out=best)
        for i, j in np.argwhere(np.triu(best, 1) > HASH_LIMIT):
            candidates.append((-best[i, j], start + i, start + j, where[i, j]))

    pairs = []
    for _, i, j, number in sorted(candidates)[:MAX_CANDIDATES]:
        pair = copies[[i, j]]
        a, b = box_mean(pair, 3)[:, 5:-5, 5:-5] - box_mean(pair, 13)  # (84, 84)
        y, x = (slice(max(0, 6 + s), min(16, 10 + s) + 1) for s in shifts[number])
        windows = np.lib.stride_tricks.sliding_window_view(b, (68, 68))[y, x]
        alike = float((unit(windows.reshape(-1, 68, 68)) @ unit(a[None, 8:76, 8:76])[0]).max())
        if alike > COPY_LIMIT:
            pairs.append((int(i), int(j), round(alike, 3)))
    return pairs


def find_copies(seen):
    """({(i, j)} of images that are the same, {(i, j): correlation} of others that are nearly the same), i < j."""
    first, same = {}, set()
    for i, image in enumerate(seen):
        twin = min(first.setdefault(key, i) for key in (image.digest, image.pixels))
        same |= {(twin, i)} - {(i, i)}
    pairs = similar_pairs(np.stack([image.copy for image in seen]))
    return same, {(i, j): alike for i, j, alike in pairs if seen[i].pixels != seen[j].pixels}


def auroc(values, labels):
    """P(a value of label 1 is above one of label 0), ties counted half; 0.5 where a label is missing."""
    low, high = np.sort(values[labels == 0]), values[labels == 1]
    if not len(low) or not len(high):
        return 0.5
    return float((np.searchsorted(low, high) + np.searchsorted(low, high, "right")).mean() / 2 / len(low))


def alarming(value, labels):
    """Whether an AUROC is both large and, at 3 standard deviations (Mann-Whitney), no accident of few images."""
    low, high = int((labels == 0).sum()), int((labels == 1).sum())
    return bool(value > max(ALARM, 0.5 + 3 * ((low + high + 1) / (12 * max(low * high, 1))) ** 0.5))


def fit_pixels(train, labels, other):
    """Scores float (M,) of `other` (M, D), above 0 for label 1, by ridge regression on `train` (N, D), labels (N,).

    Both labels weigh the same. The penalty is D, the squared length of one standardised image: from 1/3 to 10 of it
    give the same answers within 0.02.
    """
    mean, std = train.mean(0), train.std(0)
    std = np.maximum(std, 0.1 * np.sqrt(np.mean(std**2)) + 1e-6)  # a pixel that never changes must not decide
    weight = np.where(labels == 1, 1 / max(labels.sum(), 1), 1 / max((1 - labels).sum(), 1)) * len(labels) / 2
    x = (train - mean) / std * np.sqrt(weight)[:, None]
    y = (2 * labels - 1) * np.sqrt(weight)
    return (other - mean) / std @ np.linalg.solve(x.T @ x + x.shape[1] * np.eye(x.shape[1]), x.T @ y)


BORDER = np.pad(np.zeros((26, 26), bool), 3, constant_values=True).ravel()  # of 32 x 32 pixels the outer 3: no lung


def as_rows(images):
    """float64 (N, 1024): the images' copies at 32 x 32."""
    return np.stack([image.copy for image in images]).reshape(-1, 32, 3, 32, 3).mean((2, 4)).reshape(-1, 1024)


def find_shortcuts(seen, scored):
    """How well one number, fitted on the other images, separates the classes of the split `scored`; best first."""
    labels, held = np.array([image.label for image in seen]), np.array([image.split == scored for image in seen])
    fit = ~held if not held.all() else held  # with train/ alone the rules are scored where they were fitted
    found = []

    def add(name, rule, right, values):
        value = auroc(values[held], labels[held])
        accuracy = float((right[held] == labels[held]).mean())
        alarm = alarming(value, labels[held])
        found.append(dict(number=name, rule=rule, n=int(held.sum()), accuracy=accuracy, auroc=value, alarm=alarm))

    for name in seen[0].numbers:
        values = np.array([image.numbers[name] for image in seen])
        cut, sign = common.fit_rule(values[fit], labels[fit])
        add(name, f"{'>' if sign > 0 else '<='} {cut:.4g}", common.apply_rule((cut, sign), values), sign * values)
    border = as_rows(seen)[:, BORDER]
    values = fit_pixels(border[fit], labels[fit], border)
    add("3-pixel border", "linear fit", values > 0, values)
    return sorted(found, key=lambda row: -row["auroc"])


def find_shift(seen, scored):
    """How well one number tells the split `scored` from the other images, inside each class; largest first."""
    table = {}
    for label, name in enumerate(CLASSES):
        images = [image for image in seen if image.label == label]
        held, pixels = np.array([image.split == scored for image in images], dtype=int), as_rows(images)
        found = {key: auroc(np.array([image.numbers[key] for image in images]), held) for key in images[0].numbers}
        found = {key: max(value, 1 - value) for key, value in found.items()}
        # fitted and scored on different patients; by a checksum, so that other files do not change an image's fold
        folds = np.array([zlib.crc32(os.fsencode(image.patient or image.file)) % 5 for image in images])
        for key, x in (("3-pixel border", pixels[:, BORDER]), ("32x32 pixels", pixels)):
            values = np.zeros(len(images))
            for fold in np.unique(folds):
                values[folds == fold] = fit_pixels(x[folds != fold], held[folds != fold], x[folds == fold])
            found[key] = auroc(values, held)
        for key, value in found.items():
            row = table.setdefault(key, {"number": key})
            row[name] = {"auroc": value, "alarm": alarming(value, held)}
    return sorted(table.values(), key=lambda row: -max(row[name]["auroc"] for name in CLASSES))


def find_leaks(seen, errors, warnings):
    """What occurs more than once, for the report; adds a sentence for each to errors or warnings."""
    report = {"same": [], "nearly_same": [], "patients_across": {}}
    same, similar = find_copies(seen)
    for i, j in sorted(same):
        a, b = seen[i], seen[j]
        report["same"].append([a.file, b.file])
        # within a folder it only weighs double; elsewhere train.py would refuse it
        (warnings if a.folder == b.folder else errors).append(f"{a.file} is the same image as {b.file}")
    for (i, j), alike in similar.items():
        a, b = seen[i], seen[j]
        report["nearly_same"].append([a.file, b.file, alike])
        leak = a.split != b.split and "test" in (a.split, b.split)
        (errors if leak else warnings).append(f"{a.file} is nearly the same image as {b.file} (correlation {alike})")
    patients = grouped(seen, lambda image: image.patient)
    files = report["no_patient"] = [image.file for image in patients.pop(None, [])]
    if files:
        warnings.append(f"{files[0]}: the name tells no patient ({len(files)} such images)")
    pairs = report["same_patient_pairs"] = dict.fromkeys([image.split for image in seen], 0)
    for patient, images in patients.items():
        splits = Counter(image.split for image in images)
        for name, number in splits.items():
            pairs[name] += number * (number - 1) // 2
        if len(splits) > 1:
            report["patients_across"][patient] = [image.file for image in images]
            (errors if "test" in splits else warnings).append(f"patient {patient} is in {' and '.join(splits)}")
    return report


def find_kinds(seen, warnings):
    """Sizes, modes and formats, {kind: {folder: images}} each; adds a warning for what tells the class."""
    report = {}
    for name in seen[0].kinds:
        counts = {}
        for image in seen:
            counts.setdefault(image.kinds[name], Counter())[image.folder] += 1
        report[name] = dict(sorted(counts.items(), key=lambda row: -row[1].total()))
    for kind, folders in [*report["modes"].items(), *report["formats"].items()]:
        # that 8 images of a balanced set are all of one class happens by chance once in 128 times
        if len({folder.split("/")[1] for folder in folders}) == 1 and folders.total() >= 8:
            warnings.append(f"shortcut: {folders.total()} {kind} images, all in {' and '.join(folders)}")
    return report


def find_alarms(shortcuts, shift, scored):
    """The sentences on the numbers that alone tell the classes, or the split `scored`."""
    rows = [row["number"] for row in shortcuts if row["alarm"]]
    texts = [f"shortcut: {', '.join(rows)}: each alone separates the classes of {scored}/"] if rows else []
    for name in CLASSES:
        if rows := [row["number"] for row in shift if row[name]["alarm"]]:
            texts.append(f"shift: {', '.join(rows)}: each alone tells {scored}/{name} from the other {name} images")
    return texts


def examine(data_dir):
    """Everything the check finds: what --json holds."""
    record = read_record(data_dir) or {"state": "done", "sha256": {}}
    if record["state"] != "done":
        raise Failure(f"{data_dir}: a split was interrupted; run split_val.py again, which completes it")
    splits = ["train"] + ["val"] * any(list_val(data_dir).values()) + ["test"] * (data_dir / "test").exists()
    listed = [(split, label, path) for split in splits for path, label in common.list_split(data_dir, split)]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(look_at, *zip(*listed, strict=True)))
    seen = [result for result in results if isinstance(result, Seen)]
    unreadable = [result for result in results if not isinstance(result, Seen)]
    if len({image.folder for image in seen}) < 2 * len(splits):
        raise Failure(f"{data_dir}: no image of a folder can be read ({': '.join(unreadable[0])})")
    changed = [image.file for image in seen if record["sha256"].get(image.file, image.digest) != image.digest]
    errors, warnings = [f"{file}: {reason}" for file, reason in unreadable], []
    leaks, kinds = find_leaks(seen, errors, warnings), find_kinds(seen, warnings)
    errors += [f"{file} changed since {SPLIT_FILE} recorded it" for file in changed]
    shortcuts = find_shortcuts(seen, splits[-1])
    shift = find_shift(seen, splits[-1]) if splits[1:] else []
    return {
        "format": 1,
        "images": Counter(image.folder for image in seen),
        "patients": Counter(
            folder for folder, _ in dict.fromkeys((image.folder, image.patient or image.file) for image in seen)
        ),
        "unreadable": unreadable,
        "changed": changed,
        **kinds,
        **leaks,
        "scored_on": splits[-1],
        "shortcuts": shortcuts,
        "shift": shift,
        "errors": errors,
        "warnings": warnings + find_alarms(shortcuts, shift, splits[-1]),
    }


def print_report(report):
    images, patients, scored = report["images"], report["patients"], report["scored_on"]
    print("images (patients)" + "".join(f"{name:>18}" for name in CLASSES))
    for name in report["same_patient_pairs"]:
        cells = [f"{images[f'{name}/{label}']} ({patients[f'{name}/{label}']})" for label in CLASSES]
        print(f"  {name:<15}" + "".join(f"{cell:>18}" for cell in cells))
    for key in ("sizes", "modes", "formats"):
        kinds = [f"{kind} ({sum(folders.values())})" for kind, folders in report[key].items()]
        print(f"{key:<17} {', '.join(kinds[:4])}" + (f" and {len(kinds) - 4} more" if kinds[4:] else ""))
    pairs = ", ".join(f"{count} in {name}" for name, count in report["same_patient_pairs"].items())
    print(f"pairs of images of one patient inside a split: {pairs}")
    fitted = "the other images" if report["shift"] else "the same images"
    print(f"\nShortcuts: how well one number, fitted on {fitted}, separates the classes of {scored}/")
    for row in report["shortcuts"]:
        rule = f"  {row['number']:<15}{row['rule']:<12}"
        print(f"{rule} accuracy {row['accuracy']:.3f} (n {row['n']})   AUROC {row['auroc']:.3f}{' !' * row['alarm']}")
    if report["shift"]:
        print(f"\nShift: how well one number tells {scored}/ from the other images of a class (AUROC; 0.5: not at all)")
    for row in report["shift"]:
        cells = [f"{name} {row[name]['auroc']:.3f} {'!' if row[name]['alarm'] else ' '}" for name in CLASSES]
        print(f"  {row['number']:<15}", *cells, sep="   ")
    problems = [f"{kind}: {text}" for kind in ("error", "warning") for text in report[f"{kind}s"]]
    print(f"\n{len(report['errors'])} errors, {len(report['warnings'])} warnings" + (":" if problems else ""))
    if problems[LINES:]:
        problems[LINES:] = [f"and {len(problems) - LINES} more; --json FILE holds all"]
    for text in problems:
        print(f"  {text}")


def check(args):
    if args.json and args.json.name == SPLIT_FILE:
        raise Failure(f"--json {args.json}: this name is that of the split's record; choose another")
    if args.json:
        common.require_writable(args.json)
    with locked(args.data_dir):
        report = examine(args.data_dir)
    print_report(report)
    if args.json:
        common.write_json(args.json, report)
    if report["errors"]:
        raise Failure(f"{args.data_dir}: {len(report['errors'])} errors in the data, listed above")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_flags(parser, "--data-dir", "--seed")
    add, add_verb = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add(
        "--per-class",
        type=common.at_least(int, 1),
        default=50,
        metavar="N",
        help="images of each class to move into val/",
    )
    add_verb("--undo", action="store_true", help="move the images of val/ back into train/")
    add_verb("--check", action="store_true", help="report leaks, duplicates, shortcuts and shift; move nothing")
    add("--json", type=Path, metavar="FILE", help="with --check: the report for machines")
    args = parser.parse_args(argv)
    if args.json and not args.check:
        parser.error("--json needs --check")
    return args


def main(argv=None):
    args = parse_args(argv)
    return common.run(check if args.check else undo if args.undo else split, args)


if __name__ == "__main__":
    sys.exit(main())
