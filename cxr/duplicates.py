"""Finds copies of an image, also altered ones, and inverted images (negatives).

How the limits were chosen: with 400 reference images and altered copies of each (moved by up to 5
of 224 pixels, JPEG quality 40, 20 % brighter, other contrast, blurred).

| correlation of         | blurred thumbnails        | details                              |
|------------------------|---------------------------|--------------------------------------|
| an image and its copy  | at least 0.926            | at least 0.905; 0.85 if altered in   |
|                        |                           | all ways at once                     |
| two different images   | 2 % of the pairs above    | at most 0.55 (0.47 if one is         |
|                        | 0.92                      | mirrored, 0.40 if inverted)          |

The details of 750 computer-drawn X-rays with the same spine correlate by at most 0.89.
"""

import numpy as np
from scipy import fft
from scipy.ndimage import gaussian_filter

from cxr.errors import LIST_ALL
from cxr.leaks import is_leak

CANDIDATE_LIMIT = 0.92  # correlation of blurred thumbnails from which a pair is compared in detail
COPY_LIMIT = 0.9  # correlation of the details from which a pair counts as a copy
NEGATIVE_LIMIT = -0.2  # correlation with the principal component; reference data: at least 0.32
MAX_CANDIDATES = 200_000  # pairs compared in detail, the most similar ones: takes half a minute
N_NAMED = 3  # pairs named in a message
BATCH = 512  # images, or pairs, that are compared at once
ADVICE = {  # where an image occurs twice: what to do
    "in both classes": "Find out which label is right, and remove the other file",
    "in two splits": "Remove one file of each pair: copies make scores too good",
    "twice in one folder": "It counts twice. Remove one file of each pair",
}

SIDE = 88  # pixels of a thumbnail without its outer 4 pixels: a moved copy may have black edges
SHIFTS = np.arange(-3, 4)  # shifts of a copy: 3 of 96 pixels are 7 of 224
EDGE = np.minimum(np.arange(SIDE) + 0.5, SIDE - 0.5 - np.arange(SIDE))  # distance to the edge
RAMP = np.minimum(EDGE / 8, 1)
TAPER = np.outer(RAMP, RAMP).astype(np.float32)  # fades out the edges, where moved copies differ


def normalise(image):
    """Returns the image with mean 0 and length 1, so that dot products are correlations."""
    image = image - image.mean()
    return image / max(np.linalg.norm(image), 1e-3)  # a constant image becomes all 0


def blur(thumbnail, step):
    """Returns every `step`-th pixel of a blurred thumbnail, normalised."""
    return normalise(gaussian_filter(np.float32(thumbnail), 6)[3::step, 3::step])


def extract_details(thumbnail):
    """Returns the fine structure of a thumbnail (difference of Gaussians), normalised."""
    return normalise((gaussian_filter(thumbnail, 1) - gaussian_filter(thumbnail, 2)) * TAPER)


def find_candidates(images, others):
    """Finds pairs whose blurred thumbnails correlate, positively or negatively.

    images: float32 (N, h, w), normalised; others: the same images, as they are or mirrored.
    Returns int (M, 2): pairs i < j of images[i] and others[j], the most similar ones first.
    """
    images = images.reshape(len(images), -1)
    others = others.reshape(len(others), -1)
    pairs, similarities = [], []
    for start in range(0, len(images), BATCH):
        correlations = np.abs(images[start : start + BATCH] @ others[start:].T)
        correlations = np.triu(correlations, 1)  # each pair once
        candidates = np.argwhere(correlations > CANDIDATE_LIMIT)
        pairs.append(candidates + start)
        similarities.append(correlations[tuple(candidates.T)])
    order = np.argsort(-np.concatenate(similarities), kind="stable")
    return np.concatenate(pairs)[order[:MAX_CANDIDATES]]


def find_near_duplicates(thumbnails):
    """Finds pairs of nearly the same image, whatever their exposure. thumbnails: uint8 (N, 96, 96).

    Returns {(i, j): (correlation, change)} with i < j; change is "", "mirrored", "negative" or
    "mirrored negative".
    """
    inner = thumbnails[:, 4:-4, 4:-4].astype(np.float32)
    # Every ninth pixel: 10 x 10 samples, at places that are symmetric for the mirror image.
    blurred = np.stack([blur(thumbnail, 9) for thumbnail in inner])
    details = np.stack([extract_details(thumbnail) for thumbnail in inner])
    spectra = fft.rfft2(details)

    copies = {}
    for mirrored, step in (("", 1), ("mirrored", -1)):
        candidates = find_candidates(blurred, blurred[:, :, ::step])
        for start in range(0, len(candidates), BATCH):
            pairs = candidates[start : start + BATCH]
            i, j = pairs.T
            # The cross-correlation holds one correlation for each shift.
            other_spectra = fft.rfft2(details[j][:, :, ::step], workers=-1)
            correlations = fft.irfft2(spectra[i] * other_spectra.conj(), workers=-1)
            shifted = correlations[:, SHIFTS[:, None], SHIFTS]
            positive = confirm_copies(pairs, shifted.max((1, 2)), mirrored)
            negative = confirm_copies(pairs, -shifted.min((1, 2)), f"{mirrored} negative".strip())
            for pair, copy in [*positive, *negative]:
                copies[pair] = max(copies.get(pair, copy), copy)
    return copies


def confirm_copies(pairs, correlations, change):
    """Returns [(pair, (correlation, change))] of the pairs whose details correlate."""
    confirmed = []
    for row in np.flatnonzero(correlations > COPY_LIMIT):
        correlation = round(float(correlations[row]), 3)
        confirmed.append((tuple(pairs[row].tolist()), (correlation, change)))
    return confirmed


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
    pairs, leaks, others = [], [], []
    errors, warnings = [], []
    copies = find_near_duplicates(np.stack([x.thumbnail for x in examined]))
    for (i, j), (correlation, change) in sorted(copies.items()):
        a, b = examined[i], examined[j]
        if a.pixels == b.pixels:  # find_same reports it
            continue
        pairs.append([a.file, b.file, correlation, change])
        how = f"{change}, " if change else ""
        texts = leaks if is_leak({a.xray.split, b.xray.split}) else others
        texts.append(f"{a.file} and {b.file}, {how}correlation {correlation}")
    if leaks:
        place = f"in test/ and in another split ({list_pairs(leaks)})"
        errors.append(f"nearly the same image is {place}. {ADVICE['in two splits']}")
    if others:
        what = f"nearly the same image occurs twice ({list_pairs(others)})"
        warnings.append(f"{what}. Look at both, and remove one if it is a copy")
    return {"nearly_same": pairs}, errors, warnings


def list_pairs(texts):
    """Names the first pairs of images, for a message."""
    n = len(texts)
    text = f"{n} pairs: " if n > 1 else "1 pair: "
    text += "; ".join(texts[:N_NAMED])
    return f"{text}; {LIST_ALL}" if n > N_NAMED else text


def find_negatives(examined):
    """Finds inverted images (negatives). Arguments and results are as in find_same."""
    blurred = np.stack([blur(x.thumbnail, 6) for x in examined]).reshape(len(examined), -1)
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
