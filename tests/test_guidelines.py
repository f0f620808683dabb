"""cxr/guidelines.py: the page answers a subject of the guidelines, or leaves it to the authors."""

import re

import pytest
from helpers import read_report

from cxr.guidelines import answered_subjects, unanswered_subjects


@pytest.fixture
def report(scored):
    return read_report(scored[0])


def test_each_subject_is_answered_by_the_page_or_left_to_the_authors(report):
    answered, open_subjects = answered_subjects(report), unanswered_subjects(report)
    assert any("ethics" in text for text in open_subjects)
    assert any("reference standard" in text for text in open_subjects)
    assert any("external data" in text for text in open_subjects)
    assert answered[0].endswith("whether the sets share patients")
    assert "calibration of the probabilities" in answered
    assert "robustness: shortcuts, images unlike the training images" in answered
    report["also"], report["subgroups"] = [{}], {"a": {"column": "etiology"}}
    assert "testing on external data" in answered_subjects(report)
    assert not any("external data" in text for text in unanswered_subjects(report))
    assert any("metadata.csv" in text for text in unanswered_subjects(report))
    report["shortcut"], report["unlike"] = {"none": "there is no train/"}, None
    report["calibration"]["slope"]["value"] = None
    assert not re.search("calibration|robust|subgroup", " ".join(answered_subjects(report)))
    report["subgroups"]["b"], report["confounders"] = {"column": "sex"}, {"columns": [{}]}
    assert "performance in subgroups of patients" in answered_subjects(report)
    assert "robustness: confounders" in answered_subjects(report)
    assert not re.search(r"item \d", " ".join(answered + open_subjects))
