"""cxr/headings.py: each heading claims only what the intervals allow."""

import pytest
from helpers import interval, read_report

from cxr import headings


def group(name, value, low, high, patients=100):
    row = {"column": "sex", "group": f"sex {name}", "metric": "sensitivity", "n": patients}
    return row | {"patients": patients} | interval(value, low, high)


@pytest.fixture
def report(scored):
    return read_report(scored[0])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], "It was not tested for which patients it works"),
        (
            [group("F", 0.9, 0.85, 0.93), group("M", 0.91, 0.86, 0.94)],
            "It works alike in all groups: no score differs by more than 0.1",
        ),
        (
            [group("F", 0.9, 0.7, 0.97), group("M", 0.91, 0.72, 0.97)],
            "No clear difference between the groups, but they are too small to exclude one",
        ),
        (
            [group("F", 0.7, 0.62, 0.77), group("M", 0.94, 0.88, 0.97)],
            "Sensitivity is lower for sex F than for sex M: 0.70 against 0.94",
        ),
        (
            [group("F", 0.2, 0.1, 0.3, patients=9), group("M", 0.94, 0.88, 0.97)],
            "The groups have too few patients to say for whom it works",
        ),
    ],
)
def test_groups_are_alike_or_different_only_if_the_interval_says_so(report, groups, expected):
    report["subgroups"] = {row["group"]: row for row in groups}
    assert headings.subgroup_heading(report) == expected


@pytest.mark.parametrize(
    ("intercept", "slope", "expected"),
    [
        ((-1.6, -0.6), (0.8, 1.7), "the probabilities are too high"),
        ((0.6, 1.6), (0.8, 1.7), "the probabilities are too low"),
        ((0.6, 1.6), (-1.7, -0.8), "the probabilities point the wrong way"),
        ((-0.6, 0.6), (0.4, 0.9), "the probabilities are too extreme, too close to 0 or 1"),
        ((-0.6, 0.6), (1.1, 2.9), "the probabilities are too moderate, too far from 0 and 1"),
        ((-0.6, 0.6), (0.8, 1.7), "the probabilities show no clear error"),
        ((-0.6, 0.6), (None, None), "the calibration could not be measured"),
    ],
)
def test_the_probabilities_are_wrong_only_if_the_interval_says_so(
    report, intercept, slope, expected
):
    report["calibration"]["intercept"] = interval(0, *intercept)
    report["calibration"]["slope"] = interval(1, *slope)
    report["metrics"]["auroc"]["value"] = 0.998
    heading = headings.pictures_heading(report)
    assert heading.startswith("In more than 99 of 100 pairs, the image of PNEUMONIA has the higher")
    assert heading.endswith(f"; {expected}")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((0.01, 0.2), "This model has a higher AUROC than the other one"),
        ((-0.2, -0.01), "The other model has a higher AUROC than this one"),
        ((-0.1, 0.1), "Neither model has a clearly higher AUROC than the other one"),
        ((None, None), "Neither model has a clearly higher AUROC than the other one"),
    ],
)
def test_a_model_is_better_only_if_the_interval_says_so(limits, expected):
    comparison = {"difference": {"auroc": interval(0, *limits)}}
    assert headings.comparison_heading(comparison) == expected


def test_without_a_positive_prediction_there_is_no_ppv(report):
    for row in report["elsewhere"]:
        row["ppv"] = interval(None, None, None)
    assert "At threshold 0.5 no image is called PNEUMONIA" in headings.threshold_heading(report)
    report["metrics"]["ppv"] = interval(None, None, None)
    report["counts"] = {"tp": 0, "fp": 0, "tn": 12, "fn": 12}
    assert "Called PNEUMONIA: 0, of these correct: 0 (PPV undefined)" in (
        headings.predicted_sentence(report)
    )


def test_headings_write_one_image_and_a_thousand_images(report):
    report["counts"], report["n"] = {"tp": 600, "fp": 0, "tn": 400, "fn": 0}, 1000
    assert headings.page_title(report).startswith("1,000 of 1,000 test images")
    assert headings.threshold_heading(report).startswith("At threshold 0.5, if 10 % of the pat")
    report["counts"]["fn"] = 1
    assert headings.worst_heading(report, 1) == "1 image was misclassified; it is shown"
