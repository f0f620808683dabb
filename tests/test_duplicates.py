"""cxr/duplicates.py: copies of an image, also altered ones, and similar images."""

import itertools
from argparse import Namespace

import numpy as np
import pytest
from phantoms import draw_phantom
from planted import PROMISED, count_found, in_words, thumbnail

from cxr import duplicates
from cxr.duplicates import COPY_LIMIT, SIMILAR_LIMIT, find_near_duplicates, find_same


def draw_phantoms(n, seed):
    rng = np.random.default_rng(seed)
    return [draw_phantom(rng, pneumonia=bool(i % 2)) for i in range(n)]


def test_altered_copies_are_recognised_and_different_images_are_not(fuzz, say):
    images = draw_phantoms(fuzz.count(40, 750), seed=2)
    shares, false, found = count_found(images, fuzz.count(3, 25), fuzz.rng)
    say(f"copies of {len(images)} phantoms, found: {in_words(shares)}")
    assert {kind: shares[kind][0] for kind in PROMISED} == dict.fromkeys(PROMISED, 1)
    assert not [pair for pair in false if max(pair) < len(images)]
    assert len(false) <= fuzz.count(0, 10)  # the drawn spine is the same in all phantoms
    assert all(COPY_LIMIT <= correlation <= 1 for correlation, _ in found.copies.values())
    assert all(SIMILAR_LIMIT <= similarity <= 1 for _, _, similarity in found.similar)
    assert found.n_not_compared == 0


def test_constant_images_are_not_similar_to_each_other():
    assert find_near_duplicates(np.full((3, 96, 96), 7, np.uint8)) == ({}, [], 0)


def photographs(n):
    """Draws n thumbnails that have nothing in common."""
    rng = np.random.default_rng(0)
    noise = duplicates.blur(rng.normal(size=(n, 96, 96)), 1.5)
    return [(128 + 120 * image / np.abs(image).max()).astype(np.uint8) for image in noise]


def test_a_crop_is_similar_and_a_copy_is_not_similar_but_a_copy(phantom):
    others = draw_phantoms(10, seed=2)
    crop = phantom.crop((3, 3, 221, 221)).resize((224, 224))
    images = [*others, phantom, crop, phantom]
    found = find_near_duplicates([thumbnail(image) for image in images])
    assert found.copies == {(10, 12): (1, "")}
    assert {(10, 11), (11, 12)} <= {(i, j) for i, j, _ in found.similar}


@pytest.mark.parametrize("block", [1, 7, 16])
def test_the_size_of_a_block_changes_nothing(block, monkeypatch):
    drawn = [thumbnail(image) for image in draw_phantoms(12, seed=2)]
    thumbnails = [*drawn, *(image[:, ::-1] for image in drawn[:3]), *drawn[2:5]]
    expected = find_near_duplicates(thumbnails)
    assert len(expected.copies) == 7  # image 2 has both copies
    monkeypatch.setattr(duplicates, "BLOCK", block)
    monkeypatch.setattr(duplicates, "BATCH", 3)
    found = find_near_duplicates(thumbnails)
    assert found.copies.keys() == expected.copies.keys()
    for pair, (correlation, change) in found.copies.items():
        assert (pytest.approx(correlation, abs=2e-3), change) == expected.copies[pair]
    assert {pair[:2] for pair in found.similar} == {pair[:2] for pair in expected.similar}


@pytest.mark.parametrize("block", [4, 2048])
def test_beyond_the_limit_the_most_similar_pairs_are_compared_and_the_others_counted(
    block, monkeypatch
):
    (image, *others) = photographs(6)
    rng = np.random.default_rng(0)
    noisy = [image + rng.normal(0, 8, image.shape) for _ in range(10)]
    noisy = [copy.clip(0, 255).astype(np.uint8) for copy in noisy]
    thumbnails = [*noisy, *others, image, image]
    n_pairs = 12 * 11 // 2
    assert len(find_near_duplicates(thumbnails).copies) == n_pairs
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 5)
    monkeypatch.setattr(duplicates, "BLOCK", block)
    found = find_near_duplicates(thumbnails)
    assert len(found.copies) == 5 and found.copies[15, 16] == (1, "")
    assert found.n_not_compared == n_pairs - 5


def examined(n, **same):
    """Returns what find_same and find_nearly_same need of n examined images."""
    xray = Namespace(sha256="same", label=0, split="train")
    return [Namespace(xray=xray, file=f"{i}.png", **same) for i in range(n)]


def test_many_copies_share_one_message_and_all_are_in_the_report():
    entries, errors, (warning,) = find_same(examined(11, pixels="same"))
    assert entries["same"] == [["0.png", f"{i}.png"] for i in range(1, 11)]
    assert errors == [] and "10 pairs" in warning
    assert warning.count("0.png = ") == 3 and "--json" in warning


def test_a_warning_says_how_many_pairs_were_not_compared(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 10)
    images = examined(6, thumbnail=photographs(1)[0])
    for i, image in enumerate(images):
        image.pixels = i
    entries, errors, warnings = duplicates.find_nearly_same(images)
    pairs = list(itertools.combinations([image.file for image in images], 2))
    assert len(entries["nearly_same"]) == 10 and entries["not_compared"] == len(pairs) - 10
    assert errors == [] and len(warnings) == 2
    assert warnings[1].startswith("5 pairs of similar images were not compared in detail")
