"""Images that are not plain frontal radiographs: lateral ones, captures, and images in colour.

Of a DICOM file, only the tags that are named here are read, and none of them is written.
"""

import re
from collections import Counter

from cxr.decode import CAPTURES
from cxr.errors import SHOWN
from cxr.patients import read_tags

TAGS = ("ViewPosition", "Modality", "BurnedInAnnotation")  # of DICOM
# Columns of metadata.csv that name the view, as their letters in lower case: "View Position".
VIEW_COLUMNS = ("view", "viewposition", "frontallateral", "projection")
LATERAL = {"LATERAL", "LAT", "LL", "RL", "L"}  # words of a view; LL: left lateral
LATERAL_NAME = re.compile(r"(?<![a-z])(lateral|lat|vp-ll|vp-rl)(?![a-z])", re.IGNORECASE)

# What an image can be: (the beginning of the warning, its end)
KINDS = {
    "lateral": (
        "lateral images",
        "Remove them: the network learns from frontal images, and it can learn the view instead "
        "of the disease",
    ),
    "captures": (
        "captures of a film or screen",
        "Look for text in these pictures, which a network can learn instead of the disease, and "
        "export the original images if you can",
    ),
    "coloured": (
        "images in colour",
        "Look at them: false colours and photographs of a film give wrong grey levels. Export "
        "them in grey, or remove them",
    ),
}


def is_lateral(xray, tags):
    """Returns True if metadata.csv, a DICOM's ViewPosition or the file name says "lateral".

    The first of these three counts that names a view. tags: {name: text} of TAGS, {} without DICOM.
    """
    for column, text in (xray.metadata or {}).items():
        if re.sub("[^a-z]", "", column.lower()) in VIEW_COLUMNS:
            return names_lateral_view(text)
    if "ViewPosition" in tags:
        return names_lateral_view(tags["ViewPosition"])
    name = xray.path.stem
    # A decubitus image is frontal: the patient lies on one side.
    return bool(LATERAL_NAME.search(name)) and "decubitus" not in name.lower()


def names_lateral_view(text):
    """Returns True for a view such as LL or "left lateral", False for PA, LLD and others."""
    words = set(re.split("[^A-Z]+", text.upper()))
    return bool(words & LATERAL) and "DECUBITUS" not in words


def find_kinds(xray, has_colours):
    """Returns which of KINDS an image is. has_colours: see cxr.decode.Decoded."""
    tags = read_tags(xray.path, *TAGS)
    is_capture = tags.get("Modality", "").upper() in CAPTURES
    is_capture |= tags.get("BurnedInAnnotation") == "YES"
    found = {"lateral": is_lateral(xray, tags), "captures": is_capture, "coloured": has_colours}
    return [kind for kind in KINDS if found[kind]]


def find_unusual(examined):
    """Counts the images of each kind by class. Arguments and results are as in find_same."""
    n_images = Counter(x.xray.path.parent.name for x in examined)
    entries, warnings = {}, []
    for kind, (what, advice) in KINDS.items():
        found = [x for x in examined if kind in x.kinds]
        entries[kind] = [x.file for x in found]
        if found:
            counts = Counter(x.xray.path.parent.name for x in found)
            by_class = ", ".join(f"{name} {counts[name]} of {n}" for name, n in n_images.items())
            warnings.append(f"{what}: {by_class}, for example {found[0].file}. {advice}")
    return entries, [], warnings


def find_lateral(xrays):
    """Returns the numbers, from 1, of the lateral images among new ones."""
    numbered = enumerate(xrays, 1)
    return [number for number, xray in numbered if is_lateral(xray, read_tags(xray.path, *TAGS))]


def lateral_warnings(lateral, n_images, label):
    """Returns a warning if new images are lateral.

    lateral: their numbers; label: function that returns how a number is shown.
    """
    if not lateral:
        return []
    examples = ", ".join(label(number) for number in lateral[:SHOWN])
    if len(lateral) > SHOWN:
        examples += ", ..."
    what = f"lateral images: {len(lateral)} of {n_images} ({examples})"
    return [f"{what}. The network is made for frontal images: do not use these results"]
