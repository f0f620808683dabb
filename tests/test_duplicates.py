"""cxr/duplicates.py: a copy is found however it was changed."""

import numpy as np
from helpers import reencoded, shifted
from phantoms import draw_phantom
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cxr.duplicates import COPY_LIMIT, find_near_duplicates


def thumbnail(image):
    return np.asarray(image.resize((96, 96), Image.Resampling.BOX))


def test_a_copy_is_found_however_it_was_changed_and_a_different_image_never_is():
    rng = np.random.default_rng(5)
    images = [draw_phantom(rng, pneumonia=bool(i % 2)) for i in range(40)]
    changes = {
        "": [
            lambda image: reencoded(image, 40),
            lambda image: ImageEnhance.Brightness(image).enhance(1.2),
            lambda image: ImageEnhance.Contrast(image).enhance(0.7),
            lambda image: image.filter(ImageFilter.GaussianBlur(1)),
            lambda image: shifted(image, 5, -5),
            lambda image: shifted(image, -5, 0),
            lambda image: reencoded(ImageEnhance.Brightness(shifted(image, 3, 4)).enhance(1.2), 40),
        ],
        "mirrored": [ImageOps.mirror, lambda image: reencoded(ImageOps.mirror(image), 50)],
        "negative": [ImageOps.invert, lambda image: shifted(ImageOps.invert(image), 2, 3)],
        "mirrored negative": [lambda image: ImageOps.invert(ImageOps.mirror(image))],
    }
    expected, copies = {}, []
    for kind, functions in changes.items():
        for function in functions:
            for i in range(3):
                expected[i, len(images) + len(copies)] = kind
                copies.append(function(images[i]))
    found = find_near_duplicates(np.stack([thumbnail(image) for image in images + copies]))
    original = {pair: kind for pair, (_, kind) in found.items() if pair[0] < len(images)}
    assert original == expected
    assert all(COPY_LIMIT < alike <= 1 for alike, _ in found.values())


def test_constant_images_are_not_taken_for_copies():
    assert find_near_duplicates(np.full((3, 96, 96), 7, np.uint8)) == {}
