"""Keeps the earlier model when a training replaces it with another one."""

import os
from pathlib import Path

from cxr.errors import Failure
from cxr.files import atomic_write, hash_file, read_json

# Flags of train.py that do not change what a model learns. --classes: see list_differences.
OTHER_FLAGS = {"data_dir", "checkpoint", "results_dir", "cache_dir", "no_cache", "classes"}
OTHER_FLAGS |= {"device", "workers", "feature_batch_size", "compile", "skip_bad", "debug"}


def previous_files(path):
    """Returns the files that keep an earlier model.pth: model.previous.pth, model.previous.json."""
    return [path.with_name(f"{path.stem}.previous{suffix}") for suffix in (path.suffix, ".json")]


def keep_previous(path, description):
    """Copies the model at `path` to previous_files(path), if the new one was trained otherwise.

    description: the content of the new model.json. It may lack the SHA-256. Returns a sentence that
    says what was kept and why, "" if nothing was kept.
    """
    if not path.exists():
        return ""
    reason = compare_with_file(path, description)
    if not reason:
        return ""
    kept, kept_info = previous_files(path)
    replaced = ", in place of an older one" if kept.exists() else ""
    names = str(kept)
    copy_file(path, kept)
    if path.with_suffix(".json").is_file():
        copy_file(path.with_suffix(".json"), kept_info)
        names += f" and {kept_info.name}"
    else:
        kept_info.unlink(missing_ok=True)  # it describes another model
    return f"The earlier {path.name} ({reason}) is kept as {names}{replaced}"


def compare_with_file(path, description):
    """Returns in words how the model at `path` differs from a new one; "" if it does not."""
    info_file = path.with_suffix(".json")
    try:
        info, sha256 = read_json(info_file), hash_file(path)
    except (Failure, OSError):
        info, sha256 = None, ""
    if not info or info.get("sha256") != sha256:
        return f"no {info_file.name} belongs to it, so it may be another model"
    return list_differences(info, description)


def list_differences(old, new):
    """Returns in words what differs between two contents of model.json; "" if nothing does."""
    if images_of(old) != images_of(new):
        return "trained on other images"
    old_flags, flags = old.get("flags", {}), new["flags"]  # an earlier version wrote no flags
    names = (old_flags.keys() | flags.keys()) - OTHER_FLAGS
    changed = [name for name in names if old_flags.get(name) != flags.get(name)]
    if old.get("classes") != new["classes"]:
        changed.append("classes")
    if changed:
        changed = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(changed))
        return f"trained with another value of {changed}"
    return "" if old.get("transforms") == new["transforms"] else "trained with other transforms"


def images_of(info):
    """Returns [(split, class, SHA-256)] of the images of a training, sorted."""
    images = []
    for split, files in info.get("images", {}).items():
        images += [(split, Path(file).parent.name, sha256) for file, sha256 in files.items()]
    return sorted(images)


def copy_file(source, target):
    """Copies a file. The target is complete, the old or the new version."""
    try:
        content = source.read_bytes()
    except PermissionError:  # a file that cannot be read can be moved
        os.replace(source, target)
        return
    with atomic_write(target) as file:
        file.write(content)
