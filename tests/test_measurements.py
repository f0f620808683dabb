"""cxr/measurements.py: how well simple numbers separate the classes or the splits."""

import random
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr import measurements


def test_the_numbers_of_an_image_are_those_of_its_file(tmp_path):
    pixels = np.tile(np.arange(100, dtype=np.uint8)[:, None], (1, 60))
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.jpeg", quality=83, subsampling=0)
    numbers, picture, scan = measurements.image_numbers(tmp_path / "a.jpeg", 224)
    assert (numbers["width"], numbers["height"]) == scan.size == (60, 100)
    assert numbers["bits a pixel"] == 24 and scan.format == "JPEG" and numbers["JPEG quality"] == 83
    assert numbers["file size"] == (tmp_path / "a.jpeg").stat().st_size
    assert numbers["mean"] == pytest.approx(49.5, abs=0.2)
    assert numbers["sharpness"] == pytest.approx(1, abs=0.1) and picture.mode == "L"
    Image.fromarray(pixels).save(tmp_path / "a.png")
    numbers, _, scan = measurements.image_numbers(tmp_path / "a.png", 224)
    assert (numbers["bits a pixel"], numbers["JPEG quality"], scan.format) == (8, 0, "PNG")


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_is_as_accurate_as_any_and_in_the_middle_between_two_values(seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        values = rng.integers(0, 6, rng.integers(4, 12))
        values[:2] = rng.choice(6, 2, replace=False)  # not all equal
        labels = np.arange(len(values)) % 2
        sign, cut = measurements.fit_cut(values, labels)
        cuts = np.arange(values.min(), values.max()) + 0.5
        best = max(((s * values > s * c) == labels).mean() for c in cuts for s in (1, -1))
        assert ((sign * values > sign * cut) == labels).mean() == best
        steps = np.unique(values)
        assert abs(sign) == 1 and cut in (steps[1:] + steps[:-1]) / 2


@pytest.mark.parametrize("seed", range(20))
def test_folds_never_share_a_patient_and_always_have_both_labels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
        n = int(rng.integers(2, 30))
        patients = np.array([f"p{i}" for i in rng.integers(0, n, n)])
        labels = rng.integers(0, 2, n)
        labels[:2] = 0, 1
        folds = measurements.make_folds(labels, patients)
        for fit, held_out in folds:
            assert not set(patients[fit]) & set(patients[held_out])
            assert set(labels[fit]) == {0, 1}
        rows = [row for _, held_out in folds for row in held_out]
        assert len(set(rows)) == len(rows)


def null_data(rng, n_patients):
    """Draws three correlated images of each patient, which are independent of the label."""
    rows = np.repeat(np.arange(n_patients), 3)
    pixels = rng.normal(size=(n_patients, 32, 32))[rows] + rng.normal(0, 0.3, (len(rows), 32, 32))
    pixels = gaussian_filter(pixels, (0, 3, 3)).reshape(len(rows), 1024)
    values = rng.normal(size=(n_patients, 6))[rows] + rng.normal(0, 0.3, (len(rows), 6))
    labels = (rng.permutation(n_patients) % 2)[rows]
    return {f"number {i}": values[:, i] for i in range(6)}, pixels, labels, rows.astype(str)


def test_correlated_images_of_a_patient_raise_no_false_alarms():
    anything = border = shift = 0
    for seed in range(15):
        numbers, pixels, labels, patients = null_data(np.random.default_rng(seed), 33)
        is_scored = np.full(len(labels), True)
        rows = measurements.score_shortcuts(numbers, pixels, labels, patients, is_scored)
        alarms = {row["number"] for row in rows if row["alarm"]}
        anything += len(alarms) > 0
        border += "3-pixel border" in alarms
        aurocs = measurements.score_shift(numbers, pixels, labels == 1, patients).values()
        shift += any(measurements.is_alarming(auroc, labels, patients) for auroc in aurocs)
    # If images were counted, half of these sets would raise an alarm. If the border were scored on
    # the images that it is fitted on, three of four would.
    assert max(anything, border, shift) <= 2


def test_a_number_that_separates_the_classes_is_scored_on_the_other_images():
    numbers, pixels, labels, patients = null_data(np.random.default_rng(0), 60)
    numbers["number 0"] = numbers["number 0"] - 4 * labels
    is_scored = np.isin(patients, [str(i) for i in range(30)])
    # It is constant on the images on which the cut-off is fitted.
    numbers["constant"] = np.where(is_scored, labels, 1.0)
    rows = measurements.score_shortcuts(numbers, pixels, labels, patients, is_scored)
    assert [row["number"] for row in rows if row["alarm"]] == ["number 0"]
    assert rows[0]["rule"].startswith("< ") and rows[0]["n"] == 90
    assert rows[0]["auroc"] > 0.95 and rows[0]["accuracy"] > 0.9
    assert "constant" not in [row["number"] for row in rows]
    assert [row["auroc"] for row in rows] == sorted((row["auroc"] for row in rows), reverse=True)


def list_examined(counts, per_patient):
    """Returns what choose_subset needs. counts: {(split, label): number of images}."""
    images = []
    for (split, label), n in counts.items():
        for i in range(n):
            patient = f"{split}{i // per_patient}"  # has images of both classes
            xray = Namespace(split=split, label=label)
            images.append(Namespace(patient=patient, xray=xray, file=f"{split}/{label}/{i}"))
    return images


@pytest.mark.parametrize("per_patient", [1, 7])
def test_a_subset_has_whole_patients_and_equal_parts_of_each_class_and_split(per_patient):
    sizes = {("train", 0): 9000, ("train", 1): 2000, ("val", 0): 700, ("test", 0): 4000}
    images = list_examined(sizes | {("test", 1): 50}, per_patient)
    random.Random(0).shuffle(images)
    subset = measurements.choose_subset(images, "test")
    patients = {x.patient for x in subset}
    assert subset == [x for x in images if x.patient in patients]
    assert subset == measurements.choose_subset(images, "test")
    groups = Counter((x.xray.split == "test", x.xray.label) for x in subset)
    assert groups[True, 1] == 50  # all
    assert all(groups[group] >= 640 for group in [(True, 0), (False, 0), (False, 1)])
    assert any(x.xray.split == "val" for x in subset)
    assert len(subset) >= 2000  # more, because a patient has images in several groups


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_subset_of_one_split_or_of_one_huge_patient_has_all_groups(split):
    images = list_examined({("train", 0): 6000, ("train", 1): 6000}, 1)
    subset = measurements.choose_subset(images, split)
    assert {x.xray.label for x in subset} == {0, 1} and 1000 <= len(subset) <= 4000
    images += list_examined({("test", 0): 3000, ("test", 1): 30}, 3000)
    subset = measurements.choose_subset(images, split)
    assert len({(x.xray.split, x.xray.label) for x in subset}) == 4
