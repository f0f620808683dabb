"""cxr/curves.py: history.csv, curves.png and samples.png of a training."""

from pathlib import Path

import pytest
from helpers import read_about, read_rows
from PIL import Image

from cxr.curves import HISTORY, choose_samples
from cxr.patients import Xray


def test_history_has_a_row_for_each_epoch(trained):
    rows = read_rows(trained / "history.csv")
    assert tuple(rows[0]) == HISTORY
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == min(read_about(trained)["epoch"] + 5, 50)  # --patience and --epochs


# samples.png: 4 images with 2 views, each of 224 pixels with margins and text.
@pytest.mark.parametrize(
    ("name", "size"), [("curves.png", (700, 700)), ("samples.png", (464, 1056))]
)
def test_the_pictures_of_a_training_are_valid(trained, name, size):
    with Image.open(trained / name) as picture:
        assert picture.format == "PNG" and picture.size == size
        picture.load()
        low, high = picture.convert("L").getextrema()
    assert low < 50 and high > 200  # it is not blank


@pytest.mark.parametrize(("normal", "pneumonia"), [(1, 1), (2, 5), (30, 10)])
def test_the_samples_are_two_images_of_each_class(normal, pneumonia):
    labels = [0] * normal + [1] * pneumonia
    xrays = [Xray(Path(f"{i}.png"), label, "") for i, label in enumerate(labels)]
    samples = choose_samples(xrays)
    assert [xray.label for xray in samples] == [0, 0, 1, 1]
    assert len(set(samples[:2])) == min(normal, 2) and len(set(samples[2:])) == min(pneumonia, 2)
