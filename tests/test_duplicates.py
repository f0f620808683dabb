"""cxr/duplicates.py: copies of an image, also altered ones."""

from argparse import Namespace

import numpy as np
from helpers import reencoded, shifted
from phantoms import draw_phantom
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cxr.duplicates import COPY_LIMIT, find_near_duplicates, find_same


def test_altered_copies_are_recognised_and_different_images_are_not():
    rng = np.random.default_rng(5)
    images = [draw_phantom(rng, pneumonia=bool(i % 2)) for i in range(40)]
    changes = [
        ("", lambda image: reencoded(image, 40)),
        ("", lambda image: ImageEnhance.Brightness(image).enhance(1.2)),
        ("", lambda image: ImageEnhance.Contrast(image).enhance(0.7)),
        ("", lambda image: image.filter(ImageFilter.GaussianBlur(1))),
        ("", lambda image: shifted(image, 5, -5)),
        ("", lambda image: shifted(image, -5, 0)),
        ("", lambda i: reencoded(ImageEnhance.Brightness(shifted(i, 3, 4)).enhance(1.2), 40)),
        ("mirrored", ImageOps.mirror),
        ("mirrored", lambda image: reencoded(ImageOps.mirror(image), 50)),
        ("negative", ImageOps.invert),
        ("negative", lambda image: shifted(ImageOps.invert(image), 2, 3)),
        ("mirrored negative", lambda image: ImageOps.invert(ImageOps.mirror(image))),
    ]
    all_images, expected = [*images], {}
    for kind, change in changes:
        for i in range(3):
            expected[i, len(all_images)] = kind
            all_images.append(change(images[i]))
    small = [image.resize((96, 96), Image.Resampling.BOX) for image in all_images]
    pairs = find_near_duplicates(np.stack(small))
    assert {pair: kind for pair, (_, kind) in pairs.items() if pair[0] < 40} == expected
    assert all(COPY_LIMIT < correlation <= 1 for correlation, _ in pairs.values())


def test_constant_images_are_not_copies_of_each_other():
    assert find_near_duplicates(np.full((3, 96, 96), 7, np.uint8)) == {}


def test_many_copies_share_one_message_and_all_are_in_the_report():
    xray = Namespace(sha256="same", label=0, split="train")
    examined = [Namespace(xray=xray, file=f"{i}.png", pixels="same") for i in range(11)]
    entries, errors, (warning,) = find_same(examined)
    assert entries["same"] == [["0.png", f"{i}.png"] for i in range(1, 11)]
    assert errors == [] and "10 pairs" in warning
    assert warning.count("0.png = ") == 3 and "--json" in warning
