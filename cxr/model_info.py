"""What model.json says about a model, and what evaluate.py takes from it.

info: the content of a model.json, a dict. docs/files.md lists its keys.
"""

import shlex
import time
from collections import Counter
from pathlib import Path

from cxr.errors import Failure
from cxr.files import hash_file, read_json, versions
from cxr.folders import CLASSES, in_words
from cxr.patients import count_patients
from cxr.previous import OTHER_FLAGS

# ---------------------------------------------------------------- written by train.py


def training_info(args, transforms, best, seeds, fine_tuning):
    """Returns the content of model.json, except the images and what is fitted on val/.

    transforms: PREPARE and AUGMENT of common.py, and the normalisation of the network; best:
    {epoch, val_loss, val_accuracy} of what is saved; seeds: a list of the same for each seed.
    """
    flags = {}
    for name, value in vars(args).items():
        flags[name] = value if isinstance(value, int | float) else str(value)
    return {
        "arch": args.arch,
        "weights": args.weights,
        "classes": list(args.classes),
        "transforms": [str(transform) for transform in transforms],
        "window": args.window,
        "threshold_rule": "fixed" if isinstance(args.threshold, float) else args.threshold,
        **best,
        "seed": args.seed,
        "seeds": seeds,
        "fine_tuning": fine_tuning,
        "flags": flags,
        "versions": versions("torch", "torchvision", "pillow"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def images_info(args, xrays, unreadable):
    """Returns what model.json says about the images, with paths relative to the data folder.

    xrays: the readable images of train/ and val/; unreadable: the paths of the others.
    """
    images = {"train": {}, "val": {}}
    for xray in xrays:
        path = xray.path.relative_to(args.data_dir).as_posix()
        images[xray.split][path] = xray.sha256
    skipped = [path.relative_to(args.data_dir).as_posix() for path in unreadable]
    description = {"images": images, "skipped": skipped}
    for split in images:
        of_split = [xray for xray in xrays if xray.split == split]
        description[f"{split}_patients"] = count_patients(of_split, args.classes)
    return description


# ---------------------------------------------------------------- read by evaluate.py


def read_model_info(path, arch, classes):
    """Reads the model.json beside a checkpoint. Returns (its content, warnings).

    The content always has arch, classes, and the SHA-256 of the checkpoint.
    """
    info_file, sha256 = path.with_suffix(".json"), hash_file(path)
    info, warnings = read_json(info_file), []
    classes = choose_classes(classes, info, info_file)
    if info is None:
        info = {"arch": arch or "resnet50"}
        warnings.append(
            f"there is no {info_file} beside {path.name}: the network is read as a {info['arch']} "
            f"(for another: --arch NAME, make: ARGS='--arch NAME'), with the classes "
            f"{in_words(classes)}, threshold 0.5 and grey levels unchanged. If train.py made it, "
            "copy its .json here, too"
        )
    elif "arch" not in info:
        raise Failure(f"{info_file}: does not describe a model; restore it or delete it")
    elif info.get("sha256") != sha256:
        # The threshold and the novelty limit of another checkpoint would be wrong.
        info = {key: info[key] for key in ("arch", "window") if key in info}
        warnings.append(
            f"{info_file} DOES NOT BELONG to {path.name} (the SHA-256 in it is that of another "
            "file): only arch, classes and window are taken from it, and the threshold is 0.5. "
            "Copy the two files of one training here, or train again (train.py, make train)"
        )
    if arch not in (None, info["arch"]):
        raise Failure(f"--arch {arch}: {info_file} says {info['arch']}; leave --arch out")
    return info | {"classes": classes, "sha256": sha256}, warnings


def choose_classes(asked, info, source):
    """Returns the names of the two classes that a model or a table knows.

    asked: --classes, or None; info: the content of the file `source`, which is a model.json or a
    metrics.json, or None if there is no such file. Raises Failure if they contradict each other.
    """
    if not info:
        return list(asked or CLASSES)
    known = classes_of(info)
    if asked and list(asked) != known:
        what = f"{source} has the classes {in_words(known)} (positive: {known[1]})"
        raise Failure(f"--classes {shlex.join(asked)}: {what}; leave --classes (make: CLASSES) out")
    return known


def classes_of(info):
    """Returns the class names in the content of a model.json or metrics.json."""
    return info.get("classes", list(CLASSES))  # an earlier version did not write them


def choose_threshold(args, info, source):
    """Chooses the threshold: --threshold, else that of `info`, else 0.5.

    info: the content of the file `source`. Returns (threshold, where it comes from, in words).
    """
    if args.threshold is not None:
        return args.threshold, "--threshold"
    if "threshold" not in info:
        return 0.5, "the default"
    if "threshold_from" in info:  # source is a metrics.json
        return info["threshold"], info["threshold_from"]
    rule = info.get("threshold_rule", "fixed")
    how = "fixed in advance" if rule == "fixed" else f"{rule} on val"
    return info["threshold"], f"{source}, {how}"


def model_for_report(path, info):
    """Returns what metrics.json says about the model. path: of the checkpoint."""
    keys = ("weights", "date", "epoch", "seed", "val_loss", "val_accuracy", "slope", "intercept")
    keys += ("window", "threshold_rule", "at_threshold", "fine_tuning", "transforms", "versions")
    keys += ("train_patients", "val_patients")
    result = {"file": str(path), "sha256": info["sha256"], "arch": info["arch"]}
    result |= {key: info.get(key) for key in keys}
    images = info.get("images", {})
    result["images"] = {split: len(files) for split, files in images.items()}
    result["images_by_class"] = {
        split: dict(Counter(Path(file).parent.name for file in files))
        for split, files in images.items()
    }
    flags = info.get("flags", {})
    result["flags"] = {name: flags[name] for name in flags if name not in OTHER_FLAGS}
    return result | {"skipped": info.get("skipped", [])}
