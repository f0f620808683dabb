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
    report["also"], report["subgroups"] = [{}], {}
    assert "testing on external data" in answered_subjects(report)
    assert not any("external data" in text for text in unanswered_subjects(report))
    assert any("metadata.csv" in text for text in unanswered_subjects(report))
    assert not re.search(r"item \d", " ".join(answered + open_subjects))
