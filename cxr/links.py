"""Makes a data folder of links to images elsewhere, so that only the links are moved."""

import os

from cxr.errors import Failure, as_typed
from cxr.folders import list_splits, moved_images
from cxr.patients import METADATA


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
    moved_to = {old: new for new, old in moved_images(data_dir).items()}
    for path, label, split in images:
        # The image may have been linked before, and a split may have moved the link.
        link = data_dir / split / classes[label] / path.name
        candidates = (link, moved_to.get(link, link))
        existing = [candidate for candidate in candidates if os.path.lexists(candidate)]
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
