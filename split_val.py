"""Moves whole patients of each class from train/ to val/ and test/, or checks the data.

Reads the images in DIR/train/{NORMAL,PNEUMONIA}/ and DIR/test/; no image may be in both. Writes
DIR/val/ and DIR/split_val.json, which holds the seed and every file that is moved. With --test, it
first writes DIR/test/ and DIR/split_test.json in the same way. A val/ or test/ that exists is never
changed. A second run moves nothing. A run after an interruption completes the split. While it runs,
DIR/split_val.lock makes a second run wait. If it is killed, the lock blocks nobody, and the next
run deletes the file.

    python split_val.py                # a third of the smaller class, at most 50 images per class
    python split_val.py --test 50      # before that, 50 images per class to test/, if there is none
    python split_val.py --undo         # moves the images of val/ back into train/
    python split_val.py --undo test    # moves the images of test/ back into train/
    python split_val.py --check        # finds leaks, duplicates, shortcuts and shift; moves nothing
"""

import argparse
import contextlib
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

from cxr.cli import Parser, add_flags, call, number, run
from cxr.decode import SIZE
from cxr.errors import UNDO, UNDO_TEST, Failure, as_typed, number_meant, warn
from cxr.files import check_writable, sync_folder, write_json
from cxr.folders import (
    SPLIT_FILES,
    check_split_classes,
    list_names,
    list_split,
    names_by_class,
    read_split_record,
)
from cxr.links import link_images
from cxr.moves import list_folders, list_moves, lock, move
from cxr.patients import METADATA, read_split
from cxr.proportions import few_patients_warnings

MAX_DEFAULT = 50  # images per class in val/, as in the original project
FEW_IMAGES = 30  # of a class; with 30 + 30, a 95 % interval of the accuracy is 0.2 wide
UNDO_OF = {"test": UNDO_TEST, "val": UNDO}
NUMBER_OF = {"test": ("--test", "TEST"), "val": ("--per-class", "PER_CLASS")}  # flag, variable

# ---------------------------------------------------------------- the plan


def plan_splits(data_dir, numbers, seed, classes, skip_bad=False):
    """Plans which images move from train/ to other splits. Writes nothing.

    numbers: {split: images per class, a share of each class, or None for the default}; skip_bad:
    images that cannot be read are no error.
    Returns {split: (content of its record, the Xrays that move)}. Raises Failure if such splits
    are impossible.
    """
    train, others = read_images(data_dir, numbers, classes, skip_bad)
    n_unknown = sum(xray.patient is None for xray in train)
    plans = {}
    for split, n in numbers.items():
        n_stay = 1
        if split == "test" and "val" in numbers:
            n_stay += numbers["val"] or 1
        record, chosen = plan_split(train, split, n, seed, classes, n_stay)
        check_patients_are_new(train, chosen, split, others, data_dir)
        plans[split] = record, chosen
        groups = {xray.group for xray in chosen}
        train = [xray for xray in train if xray.group not in groups]
    if n_unknown:
        warn(
            f"images in train/ without a known patient: {n_unknown}. Each counts as one patient. "
            f"Name them in {data_dir / METADATA}, in the columns file_name and patient_id"
        )
    return plans


def read_images(data_dir, planned, classes, skip_bad):
    """Returns the Xrays of train/, and those of the splits that exist and are not planned.

    Without skip_bad, raises Failure if an image cannot be read.
    """
    # read_split finds images and patients that train/ shares with another split.
    others = [name for name in SPLIT_FILES if name not in planned and (data_dir / name).exists()]
    xrays = read_split(data_dir, "train", *others, classes=classes)
    unreadable = [xray.path for xray in xrays if not xray.sha256]
    if unreadable and not skip_bad:
        n = len(unreadable)
        raise Failure(f"{unreadable[0]}: cannot be read ({n} such images); repair or remove it")
    train = [xray for xray in xrays if xray.split == "train"]
    return train, [xray for xray in xrays if xray.split != "train"]


def plan_split(train, split, n, seed, classes, n_stay=1):
    """Plans which images move to one split. Returns (content of its record, the chosen Xrays).

    train: the Xrays of train/; n: images per class, a share of each class, None for the default;
    n_stay: images of each class that must stay. Raises Failure if such a split is impossible.
    """
    present = names_by_class([xray.path for xray in train], classes)
    default = default_number(present)
    if n is None:
        n = default
    limits = dict.fromkeys(classes, n)
    if n < 1:
        limits = {name: max(1, round(n * len(files))) for name, files in present.items()}
    flag, variable = NUMBER_OF[split]
    if any(limits[name] + n_stay > len(files) for name, files in present.items()):
        advice = "Add images, or move fewer"
        most = min(len(files) for files in present.values()) - n_stay
        if most >= 1:
            fewer = as_typed(flag, variable, min(default, most))
            advice = f"Use fewer, for example {fewer}"
        raise Failure(
            f"{flag} {n}: train/ has {counts_in_words(present)} images, and at least {n_stay} of "
            f"each class must stay. {advice}"
        )
    chosen = choose_patients(train, limits, seed, classes)
    moved = names_by_class([xray.path for xray in chosen], classes)
    if not all(moved.values()):
        n_patients = len({xray.group for xray in train})
        raise Failure(
            f"{flag} {n}: the {n_patients} patients in train/ have too many images each. Check "
            f"patient_id in {METADATA}, or use a larger {flag} (make: {variable}=N)"
        )
    record = {
        "classes": list(classes),
        "seed": seed,
        "per_class": n,
        "moved": moved,
        "patients": len({xray.group for xray in chosen}),
    }
    return record, chosen


def default_number(names):
    """Returns how many images of each class move by default. names: {class: file names}."""
    n_smaller = min(len(files) for files in names.values())
    return max(1, min(n_smaller // 3, MAX_DEFAULT))


def choose_patients(xrays, limits, seed, classes):
    """Chooses whole patients at random. Returns their Xrays.

    limits: {class: images to choose at most}.
    """
    images_of = {}
    for xray in xrays:
        images_of.setdefault(xray.group, []).append(xray)

    def random_key(group):
        # A hash gives the same order on every machine and in every version of Python.
        return hashlib.sha256(os.fsencode(f"{seed}/{group}")).digest()

    counts, chosen = Counter(), []
    for group in sorted(images_of, key=random_key):
        images = images_of[group]
        new_counts = counts + Counter(classes[xray.label] for xray in images)
        if all(new_counts[name] <= limits[name] for name in classes):
            counts = new_counts
            chosen += images
    return chosen


def check_patients_are_new(train, chosen, split, others, data_dir):
    """Raises Failure if a patient of train/ or `split` has images in a split made from train/.

    A split that came with the data may share patients with train/, but not with `split`.
    train: the Xrays of train/; chosen: those that move to `split`;
    others: the Xrays of the splits that exist.
    """
    groups = {xray.group for xray in train}
    patients = {xray.patient for xray in chosen}
    made_here = [name for name in SPLIT_FILES if read_split_record(data_dir, name)]
    for xray in others:
        # What a data set calls test/ may share a group of patients with its train/.
        is_shared = xray.group in groups if xray.split in made_here else xray.patient in patients
        if xray.patient and is_shared:
            advice = f"put all images of this patient into train/, or all into {xray.split}/"
            if xray.split in made_here:
                advice = f"was {METADATA} changed? Correct it, or run {UNDO_OF[xray.split]}"
            what = f"is in {xray.split}/ ({xray.path}), and would also be in train/ or {split}/"
            raise Failure(f"patient {xray.patient}: {what}; {advice}")


def warn_if_small(chosen, split, n, classes):
    """Prints a warning if a split gets fewer images than were asked for, or few patients.

    chosen: its Xrays; n: images per class, a share of each class, None for the default.
    """
    moved = names_by_class([xray.path for xray in chosen], classes)
    if n is not None and any(len(files) < n for files in moved.values()):
        what = f"{counts_in_words(moved)} images will be moved to {split}/, not {n} of each class"
        warn(f"{what}, because the images of a patient stay together")
    patients = {name: {x.group for x in chosen if classes[x.label] == name} for name in classes}
    for text in few_patients_warnings(split, {name: len(g) for name, g in patients.items()}):
        warn(text)


def counts_in_words(names):
    """Returns how many items each class has, as text. names: {class: file names or patients}."""
    return " and ".join(f"{len(items)} {name}" for name, items in names.items())


# ---------------------------------------------------------------- split, undo, check


def make_splits(args):
    """Makes val/ (with --test before that test/) from train/, or completes an interrupted split."""
    data_dir, classes = args.data_dir, args.classes
    if args.link_from:
        link_images(data_dir, args.link_from, classes)
    with lock(data_dir):
        check_split_classes(data_dir, classes)
        numbers = {"test": args.test, "val": args.per_class}
        if args.test is None and read_split_record(data_dir, "test") is None:
            del numbers["test"]
        missing = {name: n for name, n in numbers.items() if not complete_split(args, name, n)}
        if args.check_first:
            check_before_split(args)
        if not missing:
            return
        plans = plan_splits(data_dir, missing, args.seed, classes, args.skip_bad)
        moves = {}
        for name, (record, _) in plans.items():
            moves[name] = list_moves(data_dir, record["moved"], "train", name)
        for name, (record, chosen) in plans.items():
            warn_if_small(chosen, name, missing[name], classes)
            # Written before the first move, so that a later run can finish the split.
            write_json(data_dir / SPLIT_FILES[name], record)
            carry_out(data_dir, name, record, moves[name])


def complete_split(args, name, n):
    """Completes the split `name` if it was interrupted. Returns False if there is no such split.

    n: images per class or share of each class that the flags ask for, None for the default.
    """
    data_dir = args.data_dir
    record, images = read_split_record(data_dir, name), list_names(data_dir, name, args.classes)
    if record is None:
        if any(images.values()):
            keep_existing(data_dir, name, images)
        return any(images.values())
    warn_if_flags_differ(args, name, n, record)
    moves = list_moves(data_dir, record["moved"], "train", name)
    if moves:
        carry_out(data_dir, name, record, moves)
    else:
        what = f"{counts_in_words(images)} images in {name}/ (seed {record['seed']})"
        print(f"{data_dir}: already split, {what}; nothing was moved")
    return True


def carry_out(data_dir, name, record, moves):
    """Moves the images that remain to be moved, the result of list_moves, to the split `name`."""
    move(moves, list_folders(data_dir, ("train", name), record["moved"]))
    print(
        f"Moved {counts_in_words(record['moved'])} images of {record['patients']} patients from "
        f"{data_dir / 'train'} to {data_dir / name} (seed {record['seed']})"
    )


def keep_existing(data_dir, name, images):
    """Prints that val/ or test/ came with the data and stays. images: {class: file names}."""
    counts = counts_in_words(images)
    print(f"{data_dir / name} came with the data ({counts} images) and is not changed")
    if name == "val" and min(len(files) for files in images.values()) < FEW_IMAGES:
        what = "with so few images, chance decides when the training stops"
        warn(f"{what}. For a larger val/, run {UNDO}, then split again")


def warn_if_flags_differ(args, name, n, record):
    """Prints a warning if the flags ask for another split than the existing one."""
    made = record["per_class"], record["seed"]
    # The default seed 0 asks for nothing.
    if (n or record["per_class"], args.seed or record["seed"]) != made:
        flag, _ = NUMBER_OF[name]
        existing = f"was split with {flag} {made[0]} --seed {made[1]}; this split stays"
        warn(f"{args.data_dir}: {existing}. For another split, run {UNDO_OF[name]} first")


def undo(args):
    """Moves a split (of val/ without a record: all of it) into train/; removes the record last."""
    data_dir, name = args.data_dir, args.undo
    folder = data_dir / name
    with lock(data_dir):
        record = read_split_record(data_dir, name)
        classes = record["classes"] if record else args.classes
        images = list_names(data_dir, name, classes)
        if record is None and not any(images.values()):
            print(f"{data_dir}: there is no split to undo in {name}/")
            return
        if record is None and name == "test":
            what = f"expected {SPLIT_FILES[name]} beside it, which lists the images of a split"
            raise Failure(f"{folder}: {what}; this test/ came with the data and is not changed")
        moves = list_moves(data_dir, record["moved"] if record else images, name, "train")
        move(moves, list_folders(data_dir, (name, "train"), classes))
        for path in (*(folder / name for name in classes), folder):
            with contextlib.suppress(OSError):  # missing, or not empty: other files stay
                path.rmdir()
        Path(data_dir, SPLIT_FILES[name]).unlink(missing_ok=True)
        sync_folder(data_dir)
        n_left = sum(len(files) for files in list_names(data_dir, name, classes).values())
    print(f"Moved {len(moves)} images back from {folder} to {data_dir / 'train'}")
    if n_left:
        warn(f"{n_left} images in {folder} were not part of the split, so they stay there")


def examine_data(args):
    """Examines the data, prints the report and returns it."""
    # Imported late: a split needs neither SciPy nor scikit-learn.
    from cxr.check import examine, print_report

    report = examine(args.data_dir, SIZE, args.classes)
    if args.skip_bad:
        n = len(report["unreadable"])  # they are the first errors
        report["warnings"] = report["errors"][:n] + report["warnings"]
        report["errors"] = report["errors"][n:]
    print_report(report, SIZE)
    return report


def check(args):
    """Prints what is wrong with the data. Returns the report.

    Raises Failure, whose result is the report, if there are errors.
    """
    from cxr.check import count_of  # imported late, as above

    if args.json and args.json.name in SPLIT_FILES.values():
        raise Failure(f"--json {args.json}: the record of a split has this name; choose another")
    if args.json:
        check_writable(args.json)
    check_split_classes(args.data_dir, args.classes)
    with lock(args.data_dir):
        report = examine_data(args)
    if args.json:
        write_json(args.json, report)
    if report["errors"]:
        n_errors = count_of(report["errors"], "error")
        raise Failure(f"{args.data_dir}: {n_errors} in the data, see above", result=report)
    return report


def check_before_split(args):
    """Raises Failure if there are no test images. Before the first split, also checks the data."""
    data_dir, classes = args.data_dir, args.classes
    if args.test is None and not any(list_names(data_dir, "test", classes).values()):
        images = list_split(data_dir, "train", classes)
        n = default_number(names_by_class([path for path, _ in images], classes))
        what = "expected images to test on, found none"
        advice = f"run split_val.py --test {n} (make all TEST={n})"
        raise Failure(f"{data_dir / 'test'}: {what}. To take whole patients from train/, {advice}")
    if read_split_record(data_dir, "val") is None and examine_data(args)["errors"]:
        raise Failure(
            f"{data_dir}: errors in the data, see above; no image was moved. To go on without "
            "this check, run make split, make train and make evaluate, with the same variables"
        )


# ---------------------------------------------------------------- command line


def number_or_share(text):
    """The argparse type of --test: a whole number of at least 1, or a share between 0 and 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    expected = "images per class, such as 50, or a share of each class below 1, such as 0.2"
    raise argparse.ArgumentTypeError(f"expected {expected}, found {text}{number_meant(text)}")


def parse_args(argv=None):
    parser = Parser("split_val.py", __doc__)
    data, output, machine = parser.groups("data", "output", "machine")
    none = argparse.SUPPRESS  # hides "(default: None)" in the help
    parser.set_defaults(per_class=None, test=None, undo=None, link_from=None, json=None)
    add_flags(data, "--data-dir", "--classes", "--seed")
    verb = data.add_mutually_exclusive_group()
    # fmt: off
    verb.add_argument("--undo", nargs="?", const="val", choices=("val", "test"), default=none,
        help="move the images of val/ back into train/; --undo test: those of test/")
    verb.add_argument("--check", action="store_true",
        help="report what is wrong with the data, and move nothing")
    verb.add_argument("--check-first", action="store_true",
        help="before the first split, do the same, and stop if there are errors or no test images")
    data.add_argument("--per-class", type=number(int, 1), default=none, metavar="N",
        help="images of each class for val/ (default: a third of the smaller class, at most "
             f"{MAX_DEFAULT})")
    data.add_argument("--test", type=number_or_share, default=none, metavar="N",
        help="if there is no test/, first move N images of each class from train/ to test/; below "
             "1: this share of each class, for example 0.2")
    data.add_argument("--link-from", type=Path, default=none, metavar="DIR",
        help="fill --data-dir with links to the images in DIR, and split it; DIR is only read")
    output.add_argument("--json", type=Path, default=none, metavar="FILE",
        help="with --check: also write the whole report to this file")
    # fmt: on
    add_flags(data, "--skip-bad")
    add_flags(machine, "--debug")
    args = parser.parse_args(argv)
    if args.json and not args.check:
        parser.error("--json can only be used with --check")
    for flag, value in (("--link-from", args.link_from), ("--test", args.test)):
        if value and (args.check or args.undo):
            parser.error(f"{flag} can only be used for a split, not with --check or --undo")
    return args


def split_or_check(args):
    """Does what the flags ask for. Returns the report of --check, or the records of the splits."""
    if args.check:
        return check(args)
    if args.undo:
        undo(args)
    else:
        make_splits(args)
    records = {name: read_split_record(args.data_dir, name) for name in SPLIT_FILES}
    return {name: record for name, record in records.items() if record}


def split(flags=()):
    """Splits, checks or undoes as the script does, for a notebook.

    flags: a list such as ["--test", 50]. Returns {"val": content of split_val.json, "test": content
    of split_test.json}, without a split that has no such file. With --check, returns the findings,
    also if there are errors, as a dict (see docs/files.md). Raises Failure with the line that the
    script would print.
    """
    return call(split_or_check, parse_args, flags)


def main(argv=None):
    return run(split_or_check, parse_args, argv, "split_val.py")


if __name__ == "__main__":
    sys.exit(main())
