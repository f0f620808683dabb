"""cxr/copies.py: copies of an image, also altered ones, and similar images."""

import numpy as np
import pytest
from phantoms import draw_phantom
from planted import PROMISED, count_found, in_words, thumbnail

from cxr import copies
from cxr.copies import COPY_LIMIT, SIMILAR_LIMIT, find_near_duplicates


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
    noise = copies.blur(rng.normal(size=(n, 96, 96)), 1.5)
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
    monkeypatch.setattr(copies, "BLOCK", block)
    monkeypatch.setattr(copies, "BATCH", 3)
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
    monkeypatch.setattr(copies, "MAX_PAIRS", 5)
    monkeypatch.setattr(copies, "BLOCK", block)
    found = find_near_duplicates(thumbnails)
    assert len(found.copies) == 5 and found.copies[15, 16] == (1, "")
    assert found.n_not_compared == n_pairs - 5
