"""Moves whole patients of each class from train/ to val/, or checks the data.

Reads the images in DIR/train/{NORMAL,PNEUMONIA}/ and DIR/test/; no image may be in both. Writes
DIR/val/ and DIR/split_val.json, which holds the seed and every file that is moved. A second run
moves nothing. A run after an interruption completes the split. While it runs, DIR/split_val.lock
makes a second run wait. If it is killed, the lock blocks nobody, and the next run deletes the file.

    python split_val.py                # a third of the smaller class, at most 50 images per class
    python split_val.py --undo         # moves the images back into train/
    python split_val.py --check        # finds leaks, duplicates, shortcuts and shift; moves nothing
"""

import argparse
import contextlib
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

from common import SIZE
from cxr.cli import Parser, add_flags, number, run
from cxr.errors import UNDO, Failure, as_typed, warn
from cxr.files import check_writable, sync_folder, write_json
from cxr.folders import (
    SPLIT_FILE,
    check_split_classes,
    list_splits,
    list_val,
    names_by_class,
    read_split_record,
)
from cxr.moves import list_moves, lock, move
from cxr.patients import METADATA, read_split

MAX_DEFAULT = 50  # images per class in val/, as in the original project
FEW_IMAGES = 30  # of a class; with 30 + 30, a 95 % interval of the accuracy is 0.2 wide

# ---------------------------------------------------------------- the plan


def plan_split(data_dir, n, seed, classes):
    """Plans which images move. Returns the content of split_val.json, and writes nothing.

    n: images per class, None for the default. Raises Failure if such a split is impossible.
    """
    train = read_train(data_dir, classes)
    present = names_by_class([xray.path for xray in train], classes)
    n_smaller = min(len(names) for names in present.values())
    default = max(1, min(n_smaller // 3, MAX_DEFAULT))
    per_class = default if n is None else n
    if per_class >= n_smaller:
        raise Failure(
            f"--per-class {per_class}: train/ has {counts_in_words(present)} images, and some must "
            f"stay. Use fewer, for example --per-class {default} (make: PER_CLASS={default})"
        )
    moved = choose_patients(train, per_class, seed, classes)
    if not all(moved.values()):
        n_patients = len({xray.group for xray in train})
        raise Failure(
            f"--per-class {per_class}: the {n_patients} patients in train/ have too many images "
            f"each. Check patient_id in {METADATA}, or use a larger --per-class (make: PER_CLASS=N)"
        )
    if n is not None and any(len(names) < n for names in moved.values()):
        what = f"{counts_in_words(moved)} images will be moved, not {n} of each class"
        warn(f"{what}, because the images of a patient stay together")
    n_unknown = sum(xray.patient is None for xray in train)
    if n_unknown:
        warn(
            f"images in train/ without a known patient: {n_unknown}. Each counts as one patient. "
            f"Name them in {data_dir / METADATA}, in the columns file_name and patient_id"
        )
    groups = set()
    for xray in train:
        if xray.path.name in moved[classes[xray.label]]:
            groups.add(xray.group)
    return {
        "classes": list(classes),
        "seed": seed,
        "per_class": per_class,
        "moved": moved,
        "patients": len(groups),
    }


def read_train(data_dir, classes):
    """Returns the Xrays of train/. Raises Failure if an image cannot be read."""
    # read_split finds images and patients that train/ shares with test/.
    splits = ["train", "test"] if (data_dir / "test").exists() else ["train"]
    xrays = read_split(data_dir, *splits, classes=classes)
    unreadable = [xray.path for xray in xrays if not xray.sha256]
    if unreadable:
        n = len(unreadable)
        raise Failure(f"{unreadable[0]}: cannot be read ({n} such images); repair or remove it")
    return [xray for xray in xrays if xray.split == "train"]


def choose_patients(xrays, n, seed, classes):
    """Chooses whole patients at random. Returns {class: sorted file names}, at most n per class."""
    paths_of = {}
    for xray in xrays:
        paths_of.setdefault(xray.group, []).append(xray.path)

    def random_key(group):
        # A hash gives the same order on every machine and in every version of Python.
        return hashlib.sha256(os.fsencode(f"{seed}/{group}")).digest()

    counts, chosen = Counter(), []
    for group in sorted(paths_of, key=random_key):
        paths = paths_of[group]
        new_counts = counts + Counter(path.parent.name for path in paths)
        if all(new_counts[name] <= n for name in classes):
            counts = new_counts
            chosen += paths
    return names_by_class(chosen, classes)


def counts_in_words(names):
    """Returns how many files each class has, as text. names: {class: file names}."""
    return " and ".join(f"{len(files)} {name}" for name, files in names.items())


# ---------------------------------------------------------------- split, undo, check


def split(args):
    """Moves images from train/ to val/, or completes a split that was interrupted."""
    data_dir, classes = args.data_dir, args.classes
    if args.link_from:
        link_images(data_dir, args.link_from, classes)
    with lock(data_dir):
        check_split_classes(data_dir, classes)
        record, val = read_split_record(data_dir), list_val(data_dir, classes)
        if record is None and any(val.values()):
            keep_existing_val(data_dir, val)
            return
        if record is None:
            plan = plan_split(data_dir, args.per_class, args.seed, classes)
        else:
            plan = record
            warn_if_flags_differ(args, record)
        moves = list_moves(data_dir, plan["moved"], "train", "val")
        if not moves:
            images = f"{counts_in_words(val)} images"
            seed = f"seed {plan['seed']}"
            print(f"{data_dir}: already split, {images} in val/ ({seed}); nothing was moved")
            return
        if record is None:
            # Written before the first move, so that a later run can finish the split.
            write_json(data_dir / SPLIT_FILE, plan)
        move(data_dir, moves, classes)
    print(
        f"Moved {counts_in_words(plan['moved'])} images of {plan['patients']} patients from "
        f"{data_dir / 'train'} to {data_dir / 'val'} (seed {plan['seed']})"
    )


def keep_existing_val(data_dir, val):
    """Prints that val/ came with the data and stays. val: {class: file names}."""
    counts = counts_in_words(val)
    print(f"{data_dir / 'val'} came with the data ({counts} images) and is not changed")
    if min(len(names) for names in val.values()) < FEW_IMAGES:
        what = "with so few images, chance decides when the training stops"
        warn(f"{what}. For a larger val/, run {UNDO}, then split again")


def warn_if_flags_differ(args, record):
    """Prints a warning if the flags ask for another split than the existing one."""
    n, seed = record["per_class"], record["seed"]
    # The default seed 0 asks for nothing.
    asked = args.per_class or n, args.seed or seed
    if asked != (n, seed):
        existing = f"was split with --per-class {n} --seed {seed}; this split stays"
        warn(f"{args.data_dir}: {existing}. For another split, run {UNDO} first")


def link_images(data_dir, source, classes):
    """Makes data_dir a folder of links to the images in `source`, which is only read."""
    source = source.resolve()
    if source == data_dir.resolve():
        asked = as_typed("--link-from", "LINK_FROM", source)
        raise Failure(f"{asked}: is the folder of --data-dir (make: DATA=) itself; name a new one")
    splits = ["train", *(name for name in ("val", "test") if (source / name).is_dir())]
    try:
        images = list_splits(source, splits, classes)
    except Failure as error:  # its message names the wrong flag
        message = str(error).replace("--data-dir", "--link-from")
        raise Failure(message.replace("make: DATA=", "make: LINK_FROM=")) from None
    n_linked = 0
    for path, label, split in images:
        # The image may have been linked before, and the split may have moved the link to val/.
        link = data_dir / split / classes[label] / path.name
        moved_link = data_dir / "val" / classes[label] / path.name
        existing = [candidate for candidate in (link, moved_link) if os.path.lexists(candidate)]
        if not existing:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
            n_linked += 1
        elif existing[0].resolve() != path.resolve():
            advice = "name another folder with --data-dir DIR (make: DATA=DIR)"
            raise Failure(f"{existing[0]}: is not a link to {path}; {advice}")
    if (source / METADATA).exists() and not os.path.lexists(data_dir / METADATA):
        (data_dir / METADATA).symlink_to(source / METADATA)
    print(f"Linked {n_linked} images of {source} into {data_dir}")


def undo(args):
    """Moves the split (without a record: all of val/) into train/, and removes the record last."""
    data_dir, val_dir = args.data_dir, args.data_dir / "val"
    with lock(data_dir):
        record = read_split_record(data_dir)
        classes = record["classes"] if record else args.classes
        val = list_val(data_dir, classes)
        if record is None and not any(val.values()):
            print(f"{data_dir}: there is no split to undo")
            return
        moves = list_moves(data_dir, record["moved"] if record else val, "val", "train")
        move(data_dir, moves, classes)
        for folder in (*(val_dir / name for name in classes), val_dir):
            with contextlib.suppress(OSError):  # missing, or not empty: other files stay
                folder.rmdir()
        Path(data_dir, SPLIT_FILE).unlink(missing_ok=True)
        sync_folder(data_dir)
        n_left = sum(len(names) for names in list_val(data_dir, classes).values())
    print(f"Moved {len(moves)} images back from {val_dir} to {data_dir / 'train'}")
    if n_left:
        warn(f"{n_left} images in {val_dir} were not part of the split, so they stay there")


def check(args):
    """Prints what is wrong with the data. Raises Failure if there are errors."""
    # Imported late: a split needs neither SciPy nor scikit-learn.
    from cxr.check import count_of, examine, print_report

    if args.json and args.json.name == SPLIT_FILE:
        raise Failure(f"--json {args.json}: the record of a split has this name; choose another")
    if args.json:
        check_writable(args.json)
    check_split_classes(args.data_dir, args.classes)
    with lock(args.data_dir):
        report = examine(args.data_dir, SIZE, args.classes)
    print_report(report, SIZE)
    if args.json:
        write_json(args.json, report)
    if report["errors"]:
        n_errors = count_of(report["errors"], "error")
        raise Failure(f"{args.data_dir}: {n_errors} in the data, see above")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = Parser("split_val.py", __doc__)
    data, output, machine = parser.groups("data", "output", "machine")
    none = argparse.SUPPRESS  # hides "(default: None)" in the help
    parser.set_defaults(per_class=None, link_from=None, json=None)
    add_flags(data, "--data-dir", "--classes", "--seed")
    verb = data.add_mutually_exclusive_group()
    # fmt: off
    verb.add_argument("--undo", action="store_true",
        help="move the images of val/ back into train/")
    verb.add_argument("--check", action="store_true",
        help="report what is wrong with the data, and move nothing")
    data.add_argument("--per-class", type=number(int, 1), default=none, metavar="N",
        help="images of each class for val/ (default: a third of the smaller class, at most "
             f"{MAX_DEFAULT})")
    data.add_argument("--link-from", type=Path, default=none, metavar="DIR",
        help="fill --data-dir with links to the images in DIR, and split it; DIR is only read")
    output.add_argument("--json", type=Path, default=none, metavar="FILE",
        help="with --check: also write the whole report to this file")
    # fmt: on
    add_flags(machine, "--debug")
    args = parser.parse_args(argv)
    if args.json and not args.check:
        parser.error("--json can only be used with --check")
    if args.link_from and (args.check or args.undo):
        parser.error("--link-from can only be used for a split, not with --check or --undo")
    return args


def main(argv=None):
    args = parse_args(argv)
    command = split
    if args.check:
        command = check
    elif args.undo:
        command = undo
    return run(command, args, "split_val.py")


if __name__ == "__main__":
    sys.exit(main())
