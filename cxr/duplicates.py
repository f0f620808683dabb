"""Reports copies of an image, and inverted images (negatives), for split_val.py --check."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from cxr.copies import MAX_PAIRS, find_near_duplicates, normalise
from cxr.errors import LIST_ALL
from cxr.leaks import is_leak

NEGATIVE_LIMIT = -0.2  # correlation with the principal component; reference data: at least 0.32
N_NAMED = 3  # pairs named in a message
ADVICE = {  # where an image occurs twice: what to do
    "in both classes": "Find out which label is right, and remove the other file",
    "in two splits": "Remove one file of each pair: copies make scores too good",
    "twice in one folder": "It counts twice. Remove one file of each pair",
}


def find_same(examined):
    """Finds files with the same content, or with the same pixels after decoding.

    examined: list of cxr.check.ExaminedXray. Returns (entries of the check's report, errors,
    warnings).
    """
    pairs, first = [], {}
    texts_of = {place: [] for place in ADVICE}
    for i, b in enumerate(examined):
        indices = [first.setdefault(key, i) for key in (b.xray.sha256, b.pixels)]
        a = examined[min(indices)]
        if a is b:
            continue
        pairs.append([a.file, b.file])
        if a.xray.label != b.xray.label:
            place = "in both classes"
        elif a.xray.split != b.xray.split:
            place = "in two splits"
        else:
            place = "twice in one folder"
        texts_of[place].append(f"{a.file} = {b.file}")
    errors, warnings = [], []
    for place, texts in texts_of.items():
        if texts:
            message = f"the same image is {place} ({list_pairs(texts)}). {ADVICE[place]}"
            if place == "twice in one folder":
                warnings.append(message)
            else:
                errors.append(message)
    return {"same": pairs}, errors, warnings


def find_nearly_same(examined):
    """Finds images with nearly the same pixels. Arguments and results are as in find_same."""
    copies, leaks, others = [], [], []
    errors, warnings = [], []
    found = find_near_duplicates([x.thumbnail for x in examined])
    for (i, j), (correlation, change) in sorted(found.copies.items()):
        a, b = examined[i], examined[j]
        if a.pixels == b.pixels:  # find_same reports it
            continue
        copies.append([a.file, b.file, correlation, change])
        how = f"{change}, " if change else ""
        texts = leaks if is_leak({a.xray.split, b.xray.split}) else others
        texts.append(f"{a.file} and {b.file}, {how}correlation {correlation}")
    if leaks:
        place = f"in test/ and in another split ({list_pairs(leaks)})"
        errors.append(f"nearly the same image is {place}. {ADVICE['in two splits']}")
    if others:
        what = f"nearly the same image occurs twice ({list_pairs(others)})"
        warnings.append(f"{what}. Look at both, and remove one if it is a copy")
    if found.n_not_compared:
        warnings.append(
            f"{found.n_not_compared:,} pairs of similar images were not compared in detail, so "
            f"copies may be missing: only the {MAX_PAIRS:,} most similar pairs are compared. "
            "Remove the copies above, and run the check again"
        )
    similar = [[examined[i].file, examined[j].file, value] for i, j, value in found.similar]
    entries = {"nearly_same": copies, "similar": similar, "not_compared": found.n_not_compared}
    return entries, errors, warnings


def list_pairs(texts):
    """Names the first pairs of images, for a message."""
    n = len(texts)
    text = f"{n} pairs: " if n > 1 else "1 pair: "
    text += "; ".join(texts[:N_NAMED])
    return f"{text}; {LIST_ALL}" if n > N_NAMED else text


def find_negatives(examined):
    """Finds inverted images (negatives). Arguments and results are as in find_same."""
    # Blurred, every sixth pixel: 16 x 16 weighted means, as two matrix products.
    weights = np.float32(gaussian_filter1d(np.eye(96), 6, axis=0)[3::6])
    samples = np.stack([weights @ x.thumbnail @ weights.T for x in examined])
    blurred = normalise(samples).reshape(len(samples), -1)
    # The first principal component is what all images have in common.
    _, components = np.linalg.eigh(blurred.T @ blurred)
    correlations = blurred @ components[:, -1]
    correlations *= np.sign(np.median(correlations))  # the sign of a component is arbitrary
    negatives = [examined[i].file for i in np.flatnonzero(correlations < NEGATIVE_LIMIT)]
    warnings = []
    if negatives:
        what = f"images that look like negatives of the others: {len(negatives)}"
        warnings.append(f"{what}, for example {negatives[0]}. Invert them or remove them")
    return {"negatives": negatives}, [], warnings
