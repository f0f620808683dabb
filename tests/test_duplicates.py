"""cxr/duplicates.py: what the check says about copies and negatives."""

import itertools
from argparse import Namespace

from planted import thumbnail

from cxr import copies, duplicates
from cxr.duplicates import find_same


def examined(n, **same):
    """Returns what find_same and find_nearly_same need of n examined images."""
    xray = Namespace(sha256="same", label=0, split="train")
    return [Namespace(xray=xray, file=f"{i}.png", **same) for i in range(n)]


def test_many_copies_share_one_message_and_all_are_in_the_report():
    entries, errors, (warning,) = find_same(examined(11, pixels="same"))
    assert entries["same"] == [["0.png", f"{i}.png"] for i in range(1, 11)]
    assert errors == [] and "10 pairs" in warning
    assert warning.count("0.png = ") == 3 and "--json" in warning


def test_a_warning_says_how_many_pairs_were_not_compared(phantom, monkeypatch):
    monkeypatch.setattr(copies, "MAX_PAIRS", 10)
    images = examined(6, thumbnail=thumbnail(phantom))
    for i, image in enumerate(images):
        image.pixels = i
    entries, errors, warnings = duplicates.find_nearly_same(images)
    pairs = list(itertools.combinations([image.file for image in images], 2))
    assert len(entries["nearly_same"]) == 10 and entries["not_compared"] == len(pairs) - 10
    assert errors == [] and len(warnings) == 2
    assert warnings[1].startswith("5 pairs of similar images were not compared in detail")
