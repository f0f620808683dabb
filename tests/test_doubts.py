"""cxr/doubts.py: what speaks against a result, as far as the intervals say so."""

import numpy as np
import pytest
from helpers import interval, read_report, write_rows

from cxr import doubts
from cxr.confounders import confounder_warnings


@pytest.fixture
def report(scored):
    return read_report(scored[0])


@pytest.mark.parametrize(
    ("low", "is_better", "expected"),
    [
        (0.01, "better", "The network is better than each simple number that was tested"),
        (-0.01, "better, but this may be chance", "Better than a shortcut? The network is not cl"),
    ],
)
def test_a_baseline_as_good_as_the_network_is_a_reason_to_doubt(report, low, is_better, expected):
    row = {"auroc": 0.9, "difference": interval(0.03, low, 0.07), "network_is": is_better}
    report["shortcut"] = {"number": "file size", "numbers": {"file size": row, "all numbers": row}}
    assert doubts.shortcut_heading(report).startswith(expected)
    rows = {what: meaning for what, _, meaning in doubts.shortcut_rows(report)}
    reasons = [text for text in doubts.reasons_to_doubt(report) if "the file size alone" in text]
    if low > 0:
        assert rows["File size alone"] == "The network recognises more than this." and not reasons
    else:
        assert rows["File size alone"].startswith("The network is not clearly better.")
        assert "has AUROC 0.900. Network minus this: 0.030 (95 % interval -0.010" in reasons[0]


def test_a_leak_and_a_validation_set_are_no_test_result(report):
    report["leaks"]["images"] = [3, 4]
    assert doubts.shortcut_heading(report).startswith("No test result: the network knows")
    rows = {what: text for what, text, _ in doubts.shortcut_rows(report)}
    assert rows["Training or validation images among them"].startswith("2 of 24 images, for exampl")
    report["leaks"]["images"], report["split"] = [], "val"
    assert doubts.shortcut_heading(report).startswith("No test result: the model was made with")


def test_a_column_with_an_alarm_says_what_to_quote(report):
    within = interval(None, None, None) | {"n_used": 0, "n_strata": 2}
    row = {"column": "site", "auroc": interval(0.98, 0.9, 0.99), "alarm": True, "within": within}
    row["difference"] = interval(-0.2, -0.3, -0.1)
    weak = {"column": "age", "auroc": interval(0.5, 0.4, 0.6), "alarm": False}
    report["confounders"] = {"columns": [row, weak], "left_out": {"id": "one value"}}
    rows = {what: (text, meaning) for what, text, meaning in doubts.shortcut_rows(report)}
    text, meaning = rows["Column site alone"]
    assert "AUROC 0.980 (0.900 to 0.990)" in text and "no stratum of site has both classes" in text
    assert meaning.startswith("The network is not better than this.") and "ALARM" in meaning
    assert rows["Other columns"][0] == "AUROC age 0.500 (0.400 to 0.600)"
    assert rows["Columns that were left out"][0] == "id (one value)"
    report["warnings"] = [*confounder_warnings(report["confounders"]), "another one"]
    reasons = [text for text in doubts.reasons_to_doubt(report) if "site alone" in text]
    assert len(reasons) == 1 and "not clearly better than the column site alone" in reasons[0]
    assert "another one" in doubts.reasons_to_doubt(report)
    row["difference"] = interval(0.2, 0.1, 0.3)
    reasons = [text for text in doubts.reasons_to_doubt(report) if "site alone" in text]
    assert len(reasons) == 1 and reasons[0].startswith("confounder: site alone predicts the class")


def test_what_a_table_of_unknown_origin_cannot_show_is_a_reason_to_doubt(rescore, tmp_path):
    labels, rng = np.arange(40) % 2, np.random.default_rng(0)
    write_rows(tmp_path / "predictions.csv", labels, 0.3 * labels + 0.7 * rng.random(40))
    _, folder = rescore(tmp_path / "predictions.csv")
    reasons, page = (
        doubts.reasons_to_doubt(read_report(folder)),
        (folder / "report.html").read_text(),
    )
    assert reasons == [
        "It was not tested whether the network knows these images or patients, because the images "
        "of its training are unknown. If it knows them, the scores are too high.",
        "There are fewer than 30 patients in a class, so the intervals are rough.",
    ]
    assert all(text in page for text in reasons)
    assert "An unknown network was scored on 40 images of 40 patients." in page


def other_source(name, low, high):
    """Returns those parts of a source of report["also"] that the next step depends on."""
    same = interval(0, -0.1, 0.1)
    difference = {"auroc": same, "accuracy": interval((low + high) / 2, low, high)}
    patients = {"NORMAL": 30, "PNEUMONIA": 30}
    return {"name": name, "difference": difference, "patients_by_class": patients}


def test_the_next_step_is_the_one_that_must_come_first(report):
    assert doubts.next_step(report).startswith("Train a network with pretrained weights")
    report["drawn"], report["model"]["weights"] = False, "imagenet"
    report["shortcut"] = {"none": "no training images"}
    report["unlike"] = report["confounders"] = None
    assert doubts.next_step(report).startswith("Score images of another hospital")
    report["also"] = [{"name": "home"}, other_source("A", -0.1, 0.1), other_source("B", -0.1, 0.1)]
    assert doubts.next_step(report).startswith("Quote the scores of all sources")
    report["also"][1]["patients_by_class"]["NORMAL"] = 0
    assert doubts.next_step(report) == "Collect images of more patients at A."
    report["also"][2] = other_source("B", -0.2, -0.1)
    assert doubts.next_step(report).startswith("Check the calibration and the threshold at B")
    report["also"] = None
    row = {"auroc": 0.9, "difference": interval(0.03, -0.01, 0.07), "network_is": "NOT BETTER"}
    report["shortcut"] = {"number": "file size", "numbers": {"file size": row}}
    assert "whose classes do not differ in the file size, and score" in doubts.next_step(report)
    report["unlike"] = {"elsewhere": True}
    assert doubts.next_step(report).startswith("Find out how these images differ")
    report["patients_by_class"]["NORMAL"] = 9
    assert doubts.next_step(report) == "Collect images of more patients."
    report["leaks"]["patients"] = [3]
    assert doubts.next_step(report).startswith("Separate the patients of the test set")
    report["leaks"]["patients"], report["metrics"]["auroc"] = [], interval(0.2, 0.1, 0.3)
    assert doubts.next_step(report).startswith(
        "Check the class folders, and the order of --classes"
    )
    report["split"] = "val"
    assert doubts.next_step(report).startswith("Score a test set that played no part")
