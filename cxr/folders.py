"""The classes, splits and images of a data folder.

    DIR/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg

The two classes may have other names (--classes). In this project, `classes` are always these two
names: of the negative class (label 0) and of the positive class (label 1), which is the disease.
Only files directly inside a class folder count. Other files and folders may cause an error or a
warning, which names them.
"""

import os
import shlex
from pathlib import Path

from cxr.errors import Failure, as_typed, warn
from cxr.files import read_json

CLASSES = ("NORMAL", "PNEUMONIA")  # the default of --classes
COLOURS = ("#0072B2", "#D55E00")  # of labels 0 and 1; Okabe & Ito, for colour-blind readers
SPLITS = ("train", "val", "test")
DRAWN = "drawn_images.txt"  # in a data folder whose images are drawn (written by tests/phantoms.py)
# Made by split_val.py from a part of train/, in this order. Each file lists the images moved.
SPLIT_FILES = {"test": "split_test.json", "val": "split_val.json"}

JPEGS = (".jfif", ".jpe", ".jpeg", ".jpg")
SUFFIXES = {*JPEGS, ".bmp", ".dcm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
JUNK = ("Thumbs.db", "desktop.ini")  # files that Windows adds to folders


def list_images(folder, warn_of_others=False):
    """Returns the paths of the images directly inside `folder`, sorted by name.

    Hidden files are ignored. A broken link counts as an image, so that it is reported later.
    warn_of_others: print a warning for files and folders that are not read.
    """
    paths = [Path(folder, name) for name in sorted(os.listdir(folder)) if name[0] != "."]
    images, others = [], []
    for path in paths:
        if path.suffix.lower() in SUFFIXES:
            if path.is_file() or not path.exists():  # a file or a broken link
                images.append(path)
        elif path.is_file() and path.name not in JUNK:
            others.append(path)
    if warn_of_others and images:
        if others:
            suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in others}))
            n = len(others)
            warn(
                f"{folder}: files that are not read: {n} ({suffixes}), expected {image_suffixes()}"
                ". Convert them if they are images"
            )
        for path in paths:
            if path.is_dir() and list_images(path):
                warn(
                    f"{path}: its images are not read. Move them up into {folder} if they belong "
                    "there"
                )
    return images


def image_suffixes():
    """Returns the suffixes of images in one line, for messages."""
    return " ".join(sorted(SUFFIXES))


def in_classes(counts):
    """Formats {class: n} as "50 NORMAL and 43 PNEUMONIA"."""
    return " and ".join(f"{n:,} {name}" for name, n in counts.items())


def in_words(classes):
    """Returns two names as "A and B", for messages. Names with spaces are quoted."""
    return " and ".join(shlex.quote(name) for name in classes)


def classes_flag(classes):
    """Returns the flag that names the classes, as a user types it, for messages."""
    names = shlex.join(classes)
    variable = f'"{names}"'
    if set(names) & set('"$`\\!'):
        variable = shlex.quote(names).replace("$", "$$")  # make replaces $$ by $
    return f"--classes {names} (make: CLASSES={variable})"


def is_class_name(text):
    """Returns True if a folder of this name can be a class: also a flag and a table can hold it."""
    is_folder_name = text == Path(text).name and text not in ("", "..")
    is_clean = text == text.strip() and text.isprintable() and not text.startswith("-")
    return is_folder_name and is_clean


def list_split(data_dir, split, classes, warn_of_others=False):
    """Lists the images of data_dir/split as (path, label) pairs.

    Raises Failure if a class folder is missing, empty or a link, or if a folder is not a class.
    """
    data_dir = Path(data_dir)
    root = data_dir / split
    if not root.is_dir():
        if split == "val" and (data_dir / "train").is_dir():
            advice = "first run split_val.py, or make split"
        else:
            advice = suggest_data_dir(data_dir, classes)
        expected = in_words(classes)
        raise Failure(f"{root}: no such folder, expected {expected} in it; {advice}")
    check_only_classes(root, classes)
    if warn_of_others and list_images(root):
        warn(f"{root}: images directly in it are not read. Move them into the class folders")
    images = []
    for label, name in enumerate(classes):
        folder = root / name
        if not folder.is_dir():
            raise Failure(f"{folder}: no such folder, expected the {name} images in it")
        if root.is_symlink() or folder.is_symlink():
            # Moving files through a link would change the folder that it points to.
            raise Failure(
                f"{folder}: found a link, expected a folder. Name the real data folder with "
                "--data-dir DIR (make: DATA=DIR), or make a folder of links to its images: "
                "split_val.py --data-dir NEW --link-from DIR (make split DATA=NEW LINK_FROM=DIR)"
            )
        paths = list_images(folder, warn_of_others)
        if not paths:
            raise no_images_failure(folder)
        images += [(path, label) for path in paths]
    return images


def list_splits(data_dir, splits, classes, warn_of_others=False):
    """Lists the images of several splits as (path, label, split) triples."""
    images = []
    for split in splits:
        pairs = list_split(data_dir, split, classes, warn_of_others)
        images += [(path, label, split) for path, label in pairs]
    return images


def check_only_classes(root, classes):
    """Raises Failure if a folder in `root` is not a class."""
    expected = in_words(classes)
    other = find_other_classes(root, classes)
    if other:
        # With a wrong order, sensitivity and specificity would be swapped without a message.
        first, second = other
        raise Failure(
            f"{root}: found the folders {in_words(other)}, expected {expected}. Correct their "
            "names, or name them with --classes. The second name must be the disease: "
            f"{classes_flag([first, second])}, or {classes_flag([second, first])}"
        )
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name not in classes:
            only = f"expected only the folders {expected}, with exactly this spelling"
            raise Failure(f"{folder}: {only}; rename it or move it away")


def find_other_classes(root, classes):
    """Returns the names of the folders in `root` if they are two other classes, otherwise []."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    are_two_classes = len(names) == 2 and all(is_class_name(name) for name in names)
    return names if are_two_classes and set(names) != set(classes) else []


def no_images_failure(folder):
    """Returns the Failure for a class folder without images."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    names = sorted({path.suffix or path.name for path in visible})
    content = f"only {', '.join(names[:5])}" if names else "an empty folder"
    message = f"{folder}: expected images ({image_suffixes()}), found {content}"
    for subfolder in sorted(path for path in visible if path.is_dir()):
        if list_images(subfolder):
            return Failure(f"{message}; move the images of {subfolder} up into {folder}")
    return Failure(message)


def suggest_data_dir(data_dir, classes):
    """Returns advice that names a data folder one level above, or up to two below data_dir."""
    candidates = [data_dir.parent, *sorted(data_dir.glob("*/")), *sorted(data_dir.glob("*/*/"))]
    for folder in candidates:
        is_data_folder = all((folder / "train" / name).is_dir() for name in classes)
        if is_data_folder and folder.name != "__MACOSX":  # which macOS adds to zip files
            return f"use {as_typed('--data-dir', 'DATA', folder)}"
    return "put the images there, or name their folder with --data-dir DIR (make: DATA=DIR)"


def read_split_record(data_dir, split):
    """Returns the content of split_val.json or split_test.json, None if there is no such file."""
    record = read_json(Path(data_dir, SPLIT_FILES[split]))
    if record is not None:
        record.setdefault("classes", list(CLASSES))  # an earlier version did not write them
    return record


def check_split_classes(data_dir, classes):
    """Raises Failure if a split was made with other classes, or with the other order."""
    for split in SPLIT_FILES:
        record = read_split_record(data_dir, split)
        if record is not None and record["classes"] != list(classes):
            asked, made = shlex.join(classes), classes_flag(record["classes"])
            message = f"--classes {asked}: {data_dir} was split with {made}"
            raise Failure(f"{message}; use the same names")


def check_split_is_complete(data_dir):
    """Raises Failure if split_val.py was interrupted before it had moved all images."""
    for new, old in moved_images(data_dir).items():
        if os.path.lexists(old):
            split = new.parent.parent.name
            what = f"expected it in {split}/, as {SPLIT_FILES[split]} says"
            raise Failure(f"{old}: {what}; to complete it, run split_val.py (make split)")


def moved_images(data_dir):
    """Returns {path in val/ or test/: path in train/} of all images that split_val.py moves."""
    moved = {}
    for split in SPLIT_FILES:
        record = read_split_record(data_dir, split) or {"moved": {}}
        for name, files in record["moved"].items():
            for file in files:
                moved[Path(data_dir, split, name, file)] = Path(data_dir, "train", name, file)
    return moved


def list_names(data_dir, split, classes):
    """Returns {class: names of its images in this split}. A missing folder counts as empty."""
    root = data_dir / split
    if root.is_dir():
        check_only_classes(root, classes)
    paths = []
    for folder in (root, *(root / name for name in classes)):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise Failure(f"{folder}: expected a folder, found a link or a file; move it away")
        if folder.exists():
            paths += list_images(folder)
    return names_by_class(paths, classes)


def names_by_class(paths, classes):
    """Returns {class: sorted file names} of paths whose folders are named like the classes."""
    return {name: sorted(p.name for p in paths if p.parent.name == name) for name in classes}
