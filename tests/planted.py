"""Plants altered copies among images, and counts how many of them are found."""

import numpy as np
from helpers import reencoded, shifted
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cxr.copies import find_near_duplicates


def brighter(image):
    return ImageEnhance.Brightness(image).enhance(1.2)


def moved(image, rng):
    return shifted(image, rng.randint(-5, 5), rng.randint(-5, 5))


def cropped(image, _):
    """Cuts 2 % off at each edge, and enlarges the rest to the old size."""
    width, height = image.size
    x, y = round(0.02 * width), round(0.02 * height)
    inner = image.crop((x, y, width - x, height - y))
    return inner.resize(image.size, Image.Resampling.BILINEAR)


# Kinds of copies that are always found: {name: (the change that is reported, function)}.
PROMISED = {
    "re-encoded": ("", lambda image, rng: reencoded(image, 40)),
    "brighter": ("", lambda image, rng: brighter(image)),
    "other contrast": ("", lambda image, rng: ImageEnhance.Contrast(image).enhance(0.7)),
    "blurred": ("", lambda image, rng: image.filter(ImageFilter.GaussianBlur(1))),
    "moved": ("", moved),
    "moved by 5": ("", lambda image, rng: shifted(image, 5, -5)),
    "moved, brighter, re-encoded": (
        "",
        lambda image, rng: reencoded(brighter(shifted(image, 3, 4)), 40),
    ),
    "mirrored": ("mirrored", lambda image, rng: ImageOps.mirror(image)),
    "mirrored, re-encoded": ("mirrored", lambda image, rng: reencoded(ImageOps.mirror(image), 50)),
    "negative": ("negative", lambda image, rng: ImageOps.invert(image)),
    "moved negative": ("negative", lambda image, rng: shifted(ImageOps.invert(image), 2, 3)),
    "mirrored negative": (
        "mirrored negative",
        lambda image, rng: ImageOps.invert(ImageOps.mirror(image)),
    ),
}
# Kinds of copies that may be found, mostly as similar images.
OTHERS = {
    "cropped by 2 %": ("", cropped),
    "rotated by 2 degrees": ("", lambda image, rng: image.rotate(2, Image.Resampling.BILINEAR)),
}


def thumbnail(image):
    return np.asarray(image.resize((96, 96), Image.Resampling.BOX))


def count_found(images, n_of_each, rng):
    """Plants n_of_each copies of each kind among PIL images of 224x224 pixels.

    rng: random.Random. Returns ({kind: (share found as copies with the right change, share found as
    similar)}, [pairs of different images that are reported as copies], the result as Pairs).
    """
    thumbnails = [thumbnail(image) for image in images]
    sources, pairs_of = list(range(len(images))), {}
    for kind, (change, alter) in (PROMISED | OTHERS).items():
        for source in rng.sample(range(len(images)), n_of_each):
            pairs_of.setdefault(kind, []).append((source, len(thumbnails), change))
            thumbnails.append(thumbnail(alter(images[source], rng)))
            sources.append(source)
    found = find_near_duplicates(thumbnails)
    similar = {(i, j) for i, j, _ in found.similar}
    shares = {}
    for kind, pairs in pairs_of.items():
        n_copies = sum(found.copies.get((i, j), (0, None))[1] == change for i, j, change in pairs)
        n_similar = sum((i, j) in similar for i, j, _ in pairs)
        shares[kind] = n_copies / n_of_each, n_similar / n_of_each
    false = [(i, j) for i, j in found.copies if sources[i] != sources[j]]
    return shares, false, found


def in_words(shares):
    """Returns one line: how many copies of each kind were found."""
    texts = []
    for kind, (copies, similar) in shares.items():
        text = f"{kind} {copies:.0%}"
        texts.append(text if kind in PROMISED else f"{text} (similar: {similar:.0%})")
    return ", ".join(texts)
