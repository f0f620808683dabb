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
from pathlib import Path

from common import SIZE
from cxr.cli import Parser, add_flags, number, run
from cxr.errors import Failure, warn
from cxr.files import check_writable, read_json, sync_folder, write_json
from cxr.folders import CLASSES, SPLIT_FILE, list_split, list_val, names_by_class
from cxr.patients import METADATA, read_split

try:
    import fcntl
except ImportError:  # Windows: no lock, run one split_val.py at a time
    fcntl = None

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
    return names_by_class(taken)


def counts_in_words(files):
    """How many files of each class, in words; files: {class: names}."""
    return " and ".join(f"{len(files[name])} {name}" for name in CLASSES)


# ---------------------------------------------------------------- the plan


def plan_split(data_dir, n, seed):
    """The record of a split, split_val.json, which is its plan; writes nothing."""
    splits = ["train"] + ["test"] * (data_dir / "test").exists()
    found = read_split(data_dir, *splits)
    train = found["train"]
    if unreadable := [image.path for split in splits for image in found[split] if not image.sha256]:
        raise Failure(
            f"{unreadable[0]}: cannot be read ({len(unreadable)} such images); repair or remove it"
        )
    present = names_by_class([image.path for image in train])
    smaller = min(map(len, present.values()))
    third = max(1, min(smaller // 3, 50))  # what the reference takes, 50 of 150, and fits any set
    asked, n = n is not None, n or third
    if n >= smaller:
        has = f"{data_dir / 'train'} has {counts_in_words(present)} images"
        less = f"ask less, as --per-class {third} (make: PER_CLASS={third})"
        raise Failure(f"--per-class {n}: {has}, and some of each must stay; {less}")
    moved = choose_patients(train, n, seed)
    if not all(moved.values()):
        together = f"a patient's images stay together, {count_patients(train)} patients in train/"
        others = f"see patient_id in {METADATA}, or ask for more: --per-class (make: PER_CLASS=)"
        raise Failure(f"--per-class {n}: {together}, and no choice is that small; {others}")
    if asked and any(len(files) < n for files in moved.values()):
        warn(f"whole patients give {counts_in_words(moved)} images, not {n} of each")
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
            keep_existing_val(data_dir, val)
            return
        plan = record or plan_split(data_dir, args.per_class, args.seed)
        if record:
            warn_if_flags_differ(args, record)
        moves = list_moves(data_dir, plan["moved"], "train", "val")
        if not moves:
            seed = f"seed {plan['seed']}"
            print(
                f"{data_dir}: already split, {counts_in_words(val)} images in val/ ({seed}); "
                "nothing moved"
            )
            return
        if record is None:
            write_json(path, plan)
        move(data_dir, moves)
    what = f"{counts_in_words(plan['moved'])} images of {plan['patients']} patients"
    print(f"Moved {what} from {data_dir / 'train'} to {data_dir / 'val'} (seed {plan['seed']})")


def keep_existing_val(data_dir, val):
    print(
        f"{data_dir / 'val'} came with the data ({counts_in_words(val)} images) and is left alone"
    )
    if min(map(len, val.values())) < 30:  # 30 + 30: a 95 % interval of accuracy is 20 points wide
        remedy = "--undo takes them back into train/, then split again"
        warn(f"so few images make early stopping a lottery; {remedy}")


def warn_if_flags_differ(args, record):
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


# ---------------------------------------------------------------- the page


def check(args):
    from cxr.check import examine, print_report  # with scipy, which a split does not need

    if args.json and args.json.name == SPLIT_FILE:
        raise Failure(f"--json {args.json}: this is the name of the split's record; choose another")
    if args.json:
        check_writable(args.json)
    with lock(args.data_dir):
        report = examine(args.data_dir, SIZE)
    print_report(report, SIZE)
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
