"""Draws phantom chest radiographs, in the layout of the real data, for the demo and the tests.

    python tests/phantoms.py demo/chestxrays

A phantom has a trunk, two lungs, ribs, a spine and a heart of random shape, noise and exposure;
PNEUMONIA adds blurred opacities inside the lungs. It is no radiograph, and a result on phantoms
says nothing about one on patients.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("NORMAL", "PNEUMONIA")


def draw_phantom(rng, pneumonia, size=224):
    """An 8-bit greyscale phantom, size x size pixels."""

    def near(value, spread):
        return value * size + rng.uniform(-spread, spread) * size

    def ellipse(draw, x, y, width, height, grey):
        draw.ellipse((x - width, y - height, x + width, y + height), fill=grey)

    image = Image.new("L", (size, size), 25)
    draw = ImageDraw.Draw(image)
    ellipse(draw, near(0.5, 0.02), near(0.6, 0.02), near(0.47, 0.02), near(0.62, 0.03), 165)
    lungs = [
        (near(x, 0.015), near(0.46, 0.02), near(0.145, 0.015), near(0.3, 0.02))
        for x in (0.29, 0.71)
    ]
    for lung in lungs:
        ellipse(draw, *lung, 70)
    inside = Image.new("L", (size, size), 0)
    for lung in lungs:
        ellipse(ImageDraw.Draw(inside), *lung, 255)
    opacities = Image.new("L", (size, size), 0)
    for _ in range(rng.integers(2, 5) if pneumonia else 0):
        x, y, width, height = lungs[rng.integers(2)]
        place = (x + rng.uniform(-0.5, 0.5) * width, y + rng.uniform(-0.3, 0.7) * height)
        ellipse(
            ImageDraw.Draw(opacities),
            *place,
            near(0.07, 0.025),
            near(0.07, 0.025),
            int(rng.integers(70, 120)),
        )
    opacities = (
        np.asarray(opacities.filter(ImageFilter.GaussianBlur(size * 0.03)), float)
        * np.asarray(inside)
        / 255
    )
    top, step = near(0.14, 0.02), near(0.082, 0.006)
    for i in range(8):
        box = (size * 0.1, top + i * step, size * 0.9, top + i * step + size * 0.3)
        draw.arc(box, 200, 340, fill=120, width=3)
    draw.rectangle((size * 0.47, 0, size * 0.53, size), fill=185)
    ellipse(draw, near(0.56, 0.02), near(0.62, 0.02), near(0.13, 0.02), near(0.14, 0.02), 190)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)), float) + opacities
    pixels = (pixels - 110) * rng.uniform(0.8, 1.2) + 110 + rng.uniform(-15, 15)
    return Image.fromarray(
        (pixels + rng.normal(0, rng.uniform(3, 7), pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def draw_folder(folder, train=50, test=25, size=224, seed=0, classes=CLASSES):
    """Makes folder/{train,test}/{NORMAL,PNEUMONIA}, so many phantoms a class, whole or not."""
    whole, folder = Path(folder), Path(f"{folder}.{os.getpid()}.tmp")
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, split == "test", label])
            for i in range(count):
                number = i + 1000 * (split == "test")
                file = (
                    f"person{number}_virus_{number}.jpeg" if label else f"IM-{number:04d}-0001.jpeg"
                )
                draw_phantom(rng, bool(label), size).save(target / file, quality=75)
    # evaluate.py looks for this file, so that no report on phantoms looks like a result.
    (folder / "drawn_images.txt").write_text("tests/phantoms.py drew these images.\n")
    os.replace(folder, whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="the data folder to make; one that exists is left alone"
    )
    parser.add_argument("--classes", nargs=2, default=CLASSES, help="names of the class folders")
    args = parser.parse_args()
    if args.folder.exists():
        print(f"{args.folder} exists, nothing drawn")
    else:
        draw_folder(args.folder, classes=args.classes)
        print(f"Drew 100 training and 50 test phantoms in {args.folder}")
