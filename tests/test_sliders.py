"""cxr/sliders.py: the data of the sliders. tests/test_browser.py moves them."""

import numpy as np
import pandas as pd

from cxr.sliders import MOST_IMAGES, slider_data

REPORT = {"classes": ["NORMAL", "PNEUMONIA"], "threshold": 0.123456}


def make_table(n):
    rng = np.random.default_rng(0)
    table = {"label": rng.integers(2, size=n), "probability": rng.random(n, np.float32)}
    names = [f"test/Meier {i}.png" for i in range(n)]
    patients = ["" if i % 5 == 0 else f"Meier {i // 2}" for i in range(n)]
    return pd.DataFrame(table | {"file": names, "patient": patients})


def test_the_data_are_exact_and_contain_no_names():
    predictions = make_table(200)
    data = slider_data(REPORT, predictions)
    assert "Meier" not in str(data) and data["threshold"] == 0.123456
    assert data["threshold_text"] == "0.1235"
    probs = np.array(data["probabilities"], np.float32)
    assert (probs == predictions["probability"]).all()
    assert data["labels"] == predictions["label"].tolist()
    # Equal numbers for images of one patient; an image without a patient has its own number.
    numbers, names = np.array(data["patients"]), predictions["patient"]
    for name in set(names) - {""}:
        assert len(set(numbers[names == name])) == 1
    assert len(set(numbers)) == len(set(names) - {""}) + (names == "").sum()


def test_more_images_than_the_page_can_hold_give_no_sliders():
    assert slider_data(REPORT, make_table(MOST_IMAGES + 1)) is None
    assert slider_data(REPORT, make_table(MOST_IMAGES))
