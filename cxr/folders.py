"""The classes, splits and images of a data folder."""

import os
from pathlib import Path

from cxr.errors import Failure, warn
from cxr.files import read_json

CLASSES = ("NORMAL", "PNEUMONIA")  # class 1, PNEUMONIA, is the positive one
# of NORMAL and PNEUMONIA; Okabe & Ito, told apart by the colour-blind
COLOURS = "#0072B2", "#D55E00"
JPEGS = ".jfif", ".jpe", ".jpeg", ".jpg"
SUFFIXES = {*JPEGS, ".bmp", ".dcm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
JUNK = "Thumbs.db", "desktop.ini"  # that operating systems leave in folders
SPLITS = "train", "val", "test"
SPLIT_FILE = "split_val.json"  # in the data folder: the files that split_val.py moves


def list_images(folder, others=False):
    """Paths of the images directly inside `folder`, sorted by name; hidden files do not count.

    others: warn of files that are no images by their suffix.
    """
    paths = [Path(folder, name) for name in sorted(os.listdir(folder)) if name[0] != "."]
    # a link to nothing counts, to be reported; a pipe or a device does not
    images = [p for p in paths if p.suffix.lower() in SUFFIXES and (p.is_file() or not p.exists())]
    rest = [p for p in paths if p.suffix.lower() not in SUFFIXES and p.is_file()]
    rest = [path.suffix or "no suffix" for path in rest if path.name not in JUNK]
    if others and images and rest:
        suffixes = ", ".join(sorted(set(rest)))
        warn(
            f"{folder}: {len(rest)} files are not read ({suffixes}), images are {image_suffixes()}"
        )
    for deeper in (path for path in paths if others and images and path.is_dir()):
        if list_images(deeper):
            warn(f"{deeper}: the images in it are not read, only those directly in {folder}")
    return images


def image_suffixes():
    return " ".join(sorted(SUFFIXES))


def list_split(data_dir, split, others=False):
    """[(path, label)] of data_dir/split. Anything but the two class folders is a Failure."""
    root = Path(data_dir, split)
    if not root.is_dir():
        hint = f"see --data-dir{suggest_data_dir(data_dir)}"
        if split == "val" and Path(data_dir, "train").is_dir():
            hint = "run split_val.py first"
        raise Failure(f"{root}: no such folder, expected {' and '.join(CLASSES)} in it ({hint})")
    if others and list_images(root):
        warn(f"{root}: the images directly in it are not read, only those in its class folders")
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if folder.name not in CLASSES:
            raise Failure(
                f"{folder}: expected only the folders {' and '.join(CLASSES)}, spelled so; "
                "rename or move it"
            )
    images = []
    for label, name in enumerate(CLASSES):
        folder = root / name
        if not folder.is_dir():
            raise Failure(f"{folder}: no such folder, expected the {name} images of {split} in it")
        if root.is_symlink() or folder.is_symlink():
            raise Failure(
                f"{folder}: found a link; link the whole data folder, or name it with --data-dir "
                "(a tree of links to images elsewhere: split_val.py --link-from)"
            )
        paths = list_images(folder, others)
        if not paths:
            names = sorted({p.suffix or p.name for p in folder.iterdir() if p.name[0] != "."})
            found = f"only {', '.join(names[:5])}" if names else "an empty folder"
            deeper = [each for each in sorted(folder.glob("*/")) if list_images(each)]
            move = f"; move the images in {deeper[0]} up into it" if deeper else ""
            raise Failure(f"{folder}: expected images ({image_suffixes()}), found {found}{move}")
        images += [(path, label) for path in paths]
    return images


def suggest_data_dir(data_dir):
    """Where the data folder may be instead, in words: one above, or one or two below."""
    data_dir = Path(data_dir)
    levels = [data_dir.parent, *sorted(data_dir.glob("*/")), *sorted(data_dir.glob("*/*/"))]
    for level in levels:
        if level.name != "__MACOSX" and all((level / "train" / name).is_dir() for name in CLASSES):
            return f" {level}"
    return ""


def check_split_is_complete(data_dir):
    """A Failure where split_val.py was interrupted."""
    record = read_json(Path(data_dir, SPLIT_FILE)) or {"moved": {}}
    for name, files in record["moved"].items():
        if left := [file for file in files if os.path.lexists(Path(data_dir, "train", name, file))]:
            raise Failure(
                f"{Path(data_dir, 'train', name, left[0])}: expected it in val/, as {SPLIT_FILE} "
                f"says ({len(left)} such images); run split_val.py again to complete the split"
            )


def list_val(data_dir):
    """{class: names of its images in val/}; a missing or an empty folder has none."""
    val, paths = data_dir / "val", []
    for path in val.iterdir() if val.is_dir() else ():
        if path.is_dir() and path.name not in CLASSES:
            raise Failure(
                f"{path}: expected only the folders {' and '.join(CLASSES)}; move it away"
            )
    for folder in (val, *(val / name for name in CLASSES)):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise Failure(f"{folder}: expected a folder, found a link or a file; move it away")
        paths += list_images(folder) if folder.exists() else []
    return names_by_class(paths)


def names_by_class(paths):
    """{class: sorted file names}."""
    return {name: sorted(p.name for p in paths if p.parent.name == name) for name in CLASSES}
