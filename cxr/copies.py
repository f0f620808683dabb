"""Finds copies of an image among many, also altered ones.

1. Each image is described by the magnitudes of its Fourier transform. They do not change if the
   image is moved or inverted. Pairs with similar descriptions are candidates for copies.
2. Each candidate is compared in detail: the details of both images are cross-correlated.

How the limits were chosen: with 5,840 different images and altered copies of 292 of them (moved by
up to 5 of 224 pixels, JPEG quality 40, 20 % brighter, other contrast, blurred, mirrored, inverted).

| similarity of               | descriptions                | details                           |
|-----------------------------|-----------------------------|-----------------------------------|
| an image and its copy       | at least 0.70               | at least 0.905; 0.85 if altered   |
|                             |                             | in all ways at once               |
| a copy cropped by 2 % at    | above 0.55 in 78 to 87 %    | 0.65 to 0.8                       |
| each edge                   |                             |                                   |
| a copy rotated by 2 degrees | above 0.55 in 70 to 90 %    | 0.65 to 0.8                       |
| two different images        | above 0.55 in one pair of   | at most 0.55 (0.47 if one is      |
|                             | 17 million                  | mirrored, 0.40 if inverted)       |

Computer-drawn X-rays have the same spine: two of 1,000 pairs have descriptions above 0.55, and two
of a million pairs have details above 0.9.
"""

from typing import NamedTuple

import numpy as np
import PIL.Image
from scipy import fft
from scipy.ndimage import gaussian_filter

from cxr.errors import show_progress

SIMILAR_LIMIT = 0.55  # similarity of the descriptions from which a pair is compared in detail
COPY_LIMIT = 0.9  # correlation of the details from which a pair counts as a copy
MAX_PAIRS = 100_000  # pairs compared in detail, the most similar ones: takes a minute
# Both bound the memory. A small matrix product is several times slower per number.
BLOCK = 2048  # images that are compared with as many others in one matrix product
BATCH = 256  # images that are described, or pairs that are compared in detail, at once

SIDE = 88  # pixels of a thumbnail without its outer 4 pixels: a moved copy may have black edges
SHIFTS = np.arange(-3, 4)  # shifts of a copy: 3 of 96 pixels are 7 of 224
RADIUS = 15  # highest frequency in a description, in periods per image
MARGIN = 8  # further frequencies, for the local mean

# ---------------------------------------------------------------- descriptions


def make_thumbnail(grey):
    """Returns the thumbnail of a grey PIL image (mode L), uint8 (96, 96)."""
    return np.asarray(grey.resize((96, 96), PIL.Image.Resampling.BOX))


def make_taper(width):
    """Returns float32 (SIDE, SIDE), which fades out the edges, where moved copies differ."""
    distance = np.minimum(np.arange(SIDE) + 0.5, SIDE - 0.5 - np.arange(SIDE))  # to the edge
    ramp = np.minimum(distance / width, 1)
    return np.outer(ramp, ramp).astype(np.float32)


WIDE_TAPER, TAPER = make_taper(16), make_taper(8)


def normalise(images):
    """Returns each image with mean 0 and length 1, so that dot products are correlations."""
    images = images - images.mean((-2, -1), keepdims=True)
    lengths = np.linalg.norm(images, axis=(-2, -1), keepdims=True)
    return images / np.maximum(lengths, 1e-3)  # a constant image becomes all 0


def cut_edges(thumbnails):
    """Returns the inner pixels of some thumbnails, float32 (N, SIDE, SIDE)."""
    return np.stack(thumbnails)[:, 4:-4, 4:-4].astype(np.float32)


def blur(images, sigma):
    """Blurs each image by a Gaussian. images: float32 (N, h, w); sigma: in pixels."""
    return gaussian_filter(images, (0, sigma, sigma))


def describe(thumbnails):
    """Describes each image by its spectrum: float32 (N, 31, 16), each of length 1.

    Moving or inverting an image does not change its description; mirroring an image turns the
    description upside down. thumbnails: N times uint8 (96, 96).
    """
    inner = cut_edges(thumbnails)
    details = (blur(inner, 1) - blur(inner, 4)) * WIDE_TAPER
    spectra = fft.fftshift(fft.fft2(details, workers=-1), axes=(1, 2))  # zero is in the centre
    wide = slice(SIDE // 2 - RADIUS - MARGIN, SIDE // 2 + RADIUS + MARGIN + 1)
    magnitudes = np.sqrt(np.abs(spectra[:, wide, wide]))
    # Relative to the local mean, because the mean spectrum is similar in all chest X-rays.
    local_mean = blur(magnitudes, 1.5)
    relative = (magnitudes - local_mean) / np.maximum(local_mean, 0.1)  # 0.1: rounding errors
    # The left half is the right half, rotated by 180 degrees.
    half = relative[:, MARGIN:-MARGIN, MARGIN + RADIUS : -MARGIN]
    lengths = np.linalg.norm(half, axis=(1, 2), keepdims=True)
    return half / np.maximum(lengths, 1e-6)


def split_by_symmetry(descriptions):
    """Splits descriptions into the parts that mirroring an image keeps, and that it negates.

    Returns two float32 arrays, (N, 256) and (N, 240). With the parts (a, b) of one image and (c, d)
    of another, their similarity is ac + bd. If one image is mirrored, their similarity is ac - bd.
    """
    upper, middle, lower = np.split(descriptions, [RADIUS, RADIUS + 1], axis=1)
    lower = lower[:, ::-1]
    kept = np.concatenate([(upper + lower) / 2**0.5, middle], axis=1)
    negated = (upper - lower) / 2**0.5
    return kept.reshape(len(kept), -1), negated.reshape(len(kept), -1)


def describe_all(thumbnails):
    """Describes all images, and shows the progress. Returns the results of split_by_symmetry."""
    described = []
    with show_progress("Describing", len(thumbnails), " images") as bar:
        for start in range(0, len(thumbnails), BATCH):
            described.append(describe(thumbnails[start : start + BATCH]))
            bar.update(len(described[-1]))
    return split_by_symmetry(np.concatenate(described))


# ---------------------------------------------------------------- pairs of images


class Pairs(NamedTuple):
    """The result of find_near_duplicates."""

    copies: dict  # {(i, j): (correlation, change)}, i < j; change: see compare_details
    similar: list  # [(i, j, similarity)], i < j: candidates that are no copies, the highest first
    n_not_compared: int  # candidates beyond MAX_PAIRS


def find_near_duplicates(thumbnails):
    """Finds pairs of nearly the same image, whatever their exposure, and pairs of similar images.

    thumbnails: N times uint8 (96, 96). Returns Pairs.
    """
    candidates, similarities, n_not_compared = find_candidates(thumbnails)
    copies, similar = {}, []
    for start in range(0, len(candidates), BATCH):
        pairs = candidates[start : start + BATCH]
        correlations, changes = compare_details(thumbnails, pairs)
        for row, (i, j) in enumerate(pairs.tolist()):
            if correlations[row] > COPY_LIMIT:
                copies[i, j] = round(float(correlations[row]), 3), changes[row]
            else:
                similar.append((i, j, round(float(similarities[start + row]), 3)))
    similar.sort(key=lambda pair: -pair[2])
    return Pairs(copies, similar, n_not_compared)


def find_similar_in_blocks(kept, negated):
    """Compares all images with all, and shows the progress. kept, negated: see split_by_symmetry.

    Yields (int (M, 2): pairs i < j; float32 (M,): their similarities) for each block of images.
    """
    starts = range(0, len(kept), BLOCK)
    blocks = [(row, column) for row in starts for column in starts if row <= column]
    with show_progress("Comparing", len(blocks), " blocks") as bar:
        for row, column in blocks:
            rows, columns = slice(row, row + BLOCK), slice(column, column + BLOCK)
            # The higher one of the similarities as they are and if one image is mirrored.
            block = kept[rows] @ kept[columns].T + np.abs(negated[rows] @ negated[columns].T)
            places = np.flatnonzero(block > SIMILAR_LIMIT)
            i, j = np.divmod(places, block.shape[1])
            pairs = np.stack([i + row, j + column], axis=1)
            is_first = pairs[:, 0] < pairs[:, 1]  # each pair once
            yield pairs[is_first], block.ravel()[places[is_first]]
            bar.update()


def find_candidates(thumbnails):
    """Finds pairs of images whose descriptions are similar, as they are or if one is mirrored.

    Returns (int (M, 2): sorted pairs i < j, the most similar ones and at most MAX_PAIRS; float32
    (M,): their similarities; number of similar pairs that were left out).
    """
    kept, negated = describe_all(thumbnails)
    pairs, similarities, n_similar = np.zeros((0, 2), int), np.zeros(0, np.float32), 0
    for found, values in find_similar_in_blocks(kept, negated):
        n_similar += len(found)
        pairs = np.concatenate([pairs, found])
        similarities = np.concatenate([similarities, values])
        if len(pairs) > MAX_PAIRS:
            best = np.argpartition(-similarities, MAX_PAIRS)[:MAX_PAIRS]
            pairs, similarities = pairs[best], similarities[best]
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], similarities[order], n_similar - len(pairs)


def extract_details(thumbnails):
    """Returns the fine structure (difference of Gaussians), float32 (N, SIDE, SIDE), normalised."""
    inner = cut_edges(thumbnails)
    return normalise((blur(inner, 1) - blur(inner, 2)) * TAPER)


def compare_details(thumbnails, pairs):
    """Correlates the details of pairs of images, also moved, mirrored and inverted.

    pairs: int (M, 2). Returns (float32 (M,): the highest correlations; M changes of the second
    image that give them: "", "mirrored", "negative" or "mirrored negative").
    """
    images, rows = np.unique(pairs, return_inverse=True)  # an image may be in many pairs
    i, j = rows.reshape(pairs.shape).T
    details = extract_details([thumbnails[image] for image in images])
    spectra = fft.rfft2(details, workers=-1)
    by_change = {}
    for mirrored, step in (("", 1), ("mirrored", -1)):
        # The cross-correlation holds one correlation for each shift.
        others = fft.rfft2(details[:, :, ::step], workers=-1)
        correlations = fft.irfft2(spectra[i] * others[j].conj(), workers=-1)
        shifted = correlations[:, SHIFTS[:, None], SHIFTS]
        by_change[mirrored] = shifted.max((1, 2))
        by_change[f"{mirrored} negative".strip()] = -shifted.min((1, 2))
    correlations, changes = np.stack(list(by_change.values())), list(by_change)
    return correlations.max(axis=0), [changes[k] for k in correlations.argmax(axis=0)]
