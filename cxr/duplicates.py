"""Finds copies of an image, and negatives."""

import numpy as np
from scipy import fft
from scipy.ndimage import gaussian_filter

from cxr.leaks import is_leak

# Measured on the 400 reference images and copies of each, moved by up to 5 of 224 pixels, saved at
# JPEG quality 40, 20 % brighter, of other contrast, blurred: a copy correlates by 0.926 or more
# when blurred, and by 0.905 or more in its details (one image, changed in all ways, by 0.85). Of
# the pairs of different images 2 % are above CANDIDATE_LIMIT; in detail none is above 0.55 (if
# mirrored 0.47, as negative 0.40), of 750 phantoms, whose spines are alike, none above 0.89.
CANDIDATE_LIMIT, COPY_LIMIT = 0.92, 0.9
NEGATIVE_LIMIT = -0.2  # of the reference none correlates below 0.32 with what all have in common
MAX_CANDIDATES = 200_000  # pairs to look at closely, the most alike first: half a minute
SHIFTS = np.arange(-3, 4)  # pixels of a thumbnail: 7 of 224
RAMP = np.minimum(np.minimum(np.arange(88) + 0.5, 87.5 - np.arange(88)) / 8, 1)
TAPER = np.outer(RAMP, RAMP).astype(np.float32)  # fades out what a shift moves out of the picture


def normalise(image):
    """Mean 0 and length 1, so that products are correlations; a constant image is all 0."""
    image = image - image.mean()
    return image / max(np.linalg.norm(image), 1e-3)


def find_candidates(images, others):
    """int (M, 2): the pairs i < j of a blurred image and another, the most alike first."""
    images, others = images.reshape(len(images), -1), others.reshape(len(others), -1)
    pairs, alike = [], []
    for start in range(0, len(images), 512):
        products = np.triu(np.abs(images[start : start + 512] @ others[start:].T), 1)
        found = np.argwhere(products > CANDIDATE_LIMIT)
        pairs.append(found + start)
        alike.append(products[tuple(found.T)])
    best = np.argsort(-np.concatenate(alike), kind="stable")[:MAX_CANDIDATES]
    return np.concatenate(pairs)[best]


def find_near_duplicates(thumbnails):
    """{(i, j): (correlation, change)}, i < j, of nearly the same images, whatever their exposure.

    thumbnails: uint8 (N, 96, 96); change: "", "mirrored", "negative" or "mirrored negative".
    Candidates are pairs whose blurred thumbnails correlate; what confirms them is the
    cross-correlation of their details, its largest value over all small shifts.
    """
    # a copy that was moved may have black edges: without the outer 4 pixels
    inner = thumbnails[:, 4:-4, 4:-4].astype(np.float32)
    # 10 x 10 samples, at places that a mirror maps onto each other
    blurred = np.stack([normalise(gaussian_filter(x, 6)[3::9, 3::9]) for x in inner])
    details = np.stack(
        [normalise((gaussian_filter(x, 1) - gaussian_filter(x, 2)) * TAPER) for x in inner]
    )
    spectra, copies = fft.rfft2(details), {}
    for mirrored, step in ((False, 1), (True, -1)):
        candidates = find_candidates(blurred, blurred[:, :, ::step])
        for start in range(0, len(candidates), 512):
            pairs = candidates[start : start + 512]
            i, j = pairs.T
            others = fft.rfft2(details[j][:, :, ::step], workers=-1)
            correlations = fft.irfft2(spectra[i] * others.conj(), workers=-1)
            shifted = correlations[:, SHIFTS[:, None], SHIFTS]
            low, high = shifted.min((1, 2)), shifted.max((1, 2))
            for negative, alike in ((False, high), (True, -low)):
                change = " ".join(["mirrored"] * mirrored + ["negative"] * negative)
                for row in np.flatnonzero(alike > COPY_LIMIT):
                    pair, value = tuple(pairs[row].tolist()), round(float(alike[row]), 3)
                    copies[pair] = max(copies.get(pair, (0, "")), (value, change))
    return copies


def find_duplicates(report, xrays):
    """Adds to the report the images that occur more than once, exactly or nearly."""
    report["same"], report["nearly_same"], first = [], [], {}
    for i, b in enumerate(xrays):
        a = xrays[min(first.setdefault(key, i) for key in (b.sha256, b.pixels))]
        if a is not b:
            report["same"].append([a.file, b.file])
            # inside a folder it only weighs double; elsewhere train.py would refuse it
            level = "warnings" if a.folder == b.folder else "errors"
            report[level].append(f"{a.file} is the same image as {b.file}")
    copies = find_near_duplicates(np.stack([xray.thumbnail for xray in xrays]))
    for (i, j), (alike, change) in sorted(copies.items()):
        a, b = xrays[i], xrays[j]
        if a.pixels == b.pixels:
            continue
        report["nearly_same"].append([a.file, b.file, alike, change])
        level = "errors" if is_leak({a.split, b.split}) else "warnings"
        what = f"nearly the same image ({change})" if change else "nearly the same image"
        report[level].append(f"{a.file} is {what} as {b.file} (correlation {alike})")


def find_negatives(report, xrays):
    """Adds to the report the images that look like negatives of the others.

    What all have in common is the first principal component of their blurred thumbnails.
    """
    blurred = np.stack(
        [normalise(gaussian_filter(np.float32(x.thumbnail), 6)[3::6, 3::6]) for x in xrays]
    )
    blurred = blurred.reshape(len(xrays), -1)
    common_part = np.linalg.eigh(blurred.T @ blurred)[1][:, -1]
    alike = blurred @ common_part
    alike *= np.sign(np.median(alike))
    found = report["negatives"] = [
        x.file for x, value in zip(xrays, alike, strict=True) if value < NEGATIVE_LIMIT
    ]
    if found:
        which = f"{len(found)} images look like negatives of the others, as {found[0]}"
        report["warnings"].append(f"{which}; invert them, or remove them")
