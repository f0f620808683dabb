"""cxr/plots.py: the pictures of a report."""

import pytest
from helpers import EXTREME_TABLES, PICTURES, TABLES, read_report, write_rows


@pytest.mark.parametrize(("labels", "probs"), EXTREME_TABLES)
def test_pictures_of_few_and_extreme_scores_are_drawn(labels, probs, pictures, tmp_path, rescore):
    status, folder = rescore(write_rows(tmp_path / "predictions.csv", labels, probs))
    assert status == 0
    assert {path.name for path in folder.iterdir()} == TABLES | PICTURES - {"worst.png"}
    for name, metric in read_report(folder)["metrics"].items():
        if metric["low"] is not None:
            assert metric["low"] <= metric["value"] <= metric["high"], name
