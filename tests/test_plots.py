"""cxr/plots.py: the pictures of a report."""

import pytest
from helpers import PICTURES, TABLES, keep, read_report, write_rows


@pytest.mark.parametrize(
    ("labels", "probs"),
    [
        ([0, 1], [0.2, 0.3]),
        ([0, 1], [0.0, 1.0]),
        ([0, 0, 1], [0.5, 0.5, 0.5]),
        ([0, 1, 1], [1.0, 0.0, 0.0]),
        ([0, 0, 0, 1, 1, 1, 1], [0.1, 0.24, 0.3, 0.61, 0.7, 0.83, 0.9]),
        ([0] * 11 + [1] * 7, [0.1] * 11 + [0.9] * 7),
    ],
    ids=["nothing positive", "0 and 1", "all alike", "all wrong", "separated", "two values"],
)
def test_pictures_of_the_smallest_and_oddest_scores_are_drawn(
    labels, probs, pictures, tmp_path, rescore
):
    status, folder = rescore(write_rows(tmp_path / "predictions.csv", labels, probs))
    assert status == 0
    assert {path.name for path in folder.iterdir()} == TABLES | PICTURES - {"worst.png"}
    for name, each in read_report(folder)["metrics"].items():
        if each["low"] is not None:
            assert each["low"] <= each["value"] <= each["high"], name


def test_one_test_image_a_class_is_scored_with_pictures(run_evaluate, pictures, data, tmp_path):
    keep(data, 1)
    assert run_evaluate("--data-dir", data, "--cam", tmp_path / "maps") == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == TABLES | PICTURES
