"""split_val.py --test and --check-first: a test set of one's own, and the check before a split."""

import itertools
import os
import random
import shutil

import pytest
from faults import put
from helpers import make_tree, names_in, run_split, sizes, snapshot, split_refused

from cxr.errors import Failure
from cxr.files import read_json
from cxr.folders import CLASSES
from cxr.patients import read_split

SPLITS = ("train", "val", "test")


@pytest.fixture
def alone(tmp_path):
    """A data folder that contains only train/, with 24 files of each class."""
    return make_tree(tmp_path / "alone", 24)


def patients_in(folder):
    """Returns {split: the patients in it} of all three splits."""
    xrays = read_split(folder, *SPLITS, classes=CLASSES)
    return {split: {x.group for x in xrays if x.split == split} for split in SPLITS}


def test_a_test_set_and_a_val_come_from_train_alone_and_no_patient_is_in_two(alone, capsys):
    assert run_split(alone, "--test", 6, "--per-class", 4, "--seed", 3) == 0
    test, val = capsys.readouterr().out.splitlines()
    assert test.startswith("Moved 6 NORMAL and 6 PNEUMONIA images of ")
    assert test.endswith(f"from {alone / 'train'} to {alone / 'test'} (seed 3)")
    assert val.startswith("Moved 4 NORMAL and 4 PNEUMONIA images of ")
    assert [sizes(alone, split) for split in SPLITS] == [[14, 14], [4, 4], [6, 6]]
    record = read_json(alone / "split_test.json")
    moved = names_in(alone, "test")
    expected = {"classes": list(CLASSES), "seed": 3, "per_class": 6, "moved": moved}
    assert record == expected | {"patients": record["patients"]}
    for one, other in itertools.combinations(patients_in(alone).values(), 2):
        assert not one & other


@pytest.mark.parametrize("seed", range(10))
def test_splits_made_and_undone_in_any_order_never_share_a_patient(alone, seed):
    rng, before = random.Random(seed), snapshot(alone)
    number = rng.choice([3, 5, 0.2, 0.3])
    commands = [("--test", number), ("--per-class", 3), ("--undo",), ("--undo", "test")]
    for _ in range(8):
        assert run_split(alone, *rng.choice(commands), "--seed", seed) == 0
        splits = [split for split in SPLITS if (alone / split).exists()]
        xrays = read_split(alone, *splits, classes=CLASSES)
        assert len(xrays) == 48
        assert len({(x.split, x.group) for x in xrays}) == len({x.group for x in xrays})
    assert run_split(alone, "--undo", "test") == run_split(alone, "--undo") == 0
    assert snapshot(alone) == before


@pytest.mark.parametrize("order", [*itertools.permutations([("--undo",), ("--undo", "test")])])
def test_each_undo_takes_back_only_its_own_split(alone, capsys, order):
    before = snapshot(alone)
    assert run_split(alone, "--test", 6, "--per-class", 4) == 0
    kept, first = ("test", 8) if order[0] == ("--undo",) else ("val", 12)
    kept_names = names_in(alone, kept)
    capsys.readouterr()
    assert run_split(alone, *order[0]) == 0
    assert f"Moved {first} images back from" in capsys.readouterr().out
    assert names_in(alone, kept) == kept_names and (alone / f"split_{kept}.json").exists()
    assert run_split(alone, *order[1]) == 0
    assert snapshot(alone) == before
    assert run_split(alone, *order[1]) == 0
    assert "there is no split to undo" in capsys.readouterr().out


def test_the_same_command_again_moves_nothing_and_another_number_is_a_warning(alone, capsys):
    assert run_split(alone, "--test", 6) == 0
    assert sizes(alone, "test") == [6, 6] and sizes(alone) == [6, 6]  # the default: a third
    after = snapshot(alone)
    for flags in (("--test", 6), ()):
        capsys.readouterr()
        assert run_split(alone, *flags) == 0
        screen = capsys.readouterr()
        assert "already split, 6 NORMAL and 6 PNEUMONIA images in test/ (seed 0)" in screen.out
        assert screen.err == ""
    assert run_split(alone, "--test", 0.1) == 0
    error = capsys.readouterr().err
    assert "was split with --test 6 --seed 0; this split stays" in error
    assert "run split_val.py --undo test (make split ARGS='--undo test') first" in error
    assert snapshot(alone) == after


def test_a_share_is_taken_of_each_class_and_at_least_one_image(tmp_path, capsys):
    root = make_tree(tmp_path / "data", 40)
    for path in sorted((root / "train/PNEUMONIA").iterdir())[10:]:
        path.unlink()
    assert run_split(root, "--test", 0.2) == 0
    assert sizes(root, "test") == [8, 2]
    assert read_json(root / "split_test.json")["per_class"] == 0.2
    assert run_split(root, "--undo", "test") == run_split(root, "--undo") == 0
    assert run_split(root, "--test", 0.001) == 0
    assert sizes(root, "test") == [1, 1]


def test_a_test_set_that_came_with_the_data_is_never_changed(tree, capsys):
    before = snapshot(tree / "test")
    assert run_split(tree, "--test", 3) == 0
    screen = capsys.readouterr().out
    assert "came with the data (4 NORMAL and 4 PNEUMONIA images) and is not changed" in screen
    assert sizes(tree) == [4, 4]
    assert "split_test.json" in split_refused(tree, capsys, "--undo", "test")
    assert run_split(tree, "--undo") == 0
    assert snapshot(tree / "test") == before


def test_empty_folders_of_a_test_set_are_filled(alone):
    for name in CLASSES:
        put(alone / "test" / name / "Thumbs.db", b"")
    assert run_split(alone, "--test", 5) == 0
    assert sizes(alone, "test") == [5, 5]


@pytest.mark.parametrize("number", ["0", "-3", "1.0", "1.5", "0,2", "20%", "nan", "five", ""])
def test_a_number_that_makes_no_sense_is_refused_with_two_that_do(alone, capsys, number):
    before = snapshot(alone)
    assert run_split(alone, f"--test={number}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "such as 50" in line and "such as 0.2" in line and f"found {number}" in line
    assert snapshot(alone) == before


@pytest.mark.parametrize("flags", [("--undo",), ("--check",), ("--undo", "test")])
def test_a_number_with_another_verb_and_another_split_are_refused(alone, capsys, flags):
    for wrong in (("--test", 5, *flags), ("--undo", "train")):
        assert run_split(alone, *wrong) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("flags", [("--test", 24), ("--test", 0.99), ("--test", 20)])
def test_too_many_images_are_refused_before_anything_moves(alone, capsys, flags):
    line = split_refused(alone, capsys, *flags, "--per-class", 4)
    assert f"{flags[0]} {flags[1]}: train/ has 24 NORMAL and 24 PNEUMONIA images" in line
    assert "at least 5 of each class must stay" in line
    assert "Use fewer, for example --test 8 (make: TEST=8)" in line
    assert run_split(alone, "--test", 8, "--per-class", 4) == 0


def test_two_images_of_a_class_are_too_few_for_three_splits(tmp_path, capsys):
    root = make_tree(tmp_path / "data", 2)
    assert "Add images, or move fewer" in split_refused(root, capsys, "--test", 1)


def test_a_folder_without_train_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty/train'}: no such" in split_refused(
        tmp_path / "empty", capsys, "--test", 5
    )


def test_a_half_moved_test_set_is_no_data_until_it_is_completed(alone, capsys):
    assert run_split(alone, "--test", 6, "--per-class", 4) == 0
    after = snapshot(alone)
    file = names_in(alone, "test")["NORMAL"][0]
    (alone / "test/NORMAL" / file).rename(alone / "train/NORMAL" / file)
    for splits in (("train", "val"), ("test",)):
        with pytest.raises(Failure, match=r"expected it in test/, .* run split_val\.py"):
            read_split(alone, *splits, classes=CLASSES)
    assert "to complete it, run split_val.py" in split_refused(alone, capsys, "--check")
    assert run_split(alone) == 0
    assert snapshot(alone) == after


def test_a_val_that_was_interrupted_is_completed_before_a_test_set_is_chosen(alone):
    assert run_split(alone, "--per-class", 4) == 0
    val = names_in(alone, "val")
    for file in val["PNEUMONIA"]:
        (alone / "val/PNEUMONIA" / file).rename(alone / "train/PNEUMONIA" / file)
    assert run_split(alone, "--test", 6) == 0
    assert names_in(alone, "val") == val and sizes(alone, "test") == [6, 6]
    assert sum(map(len, patients_in(alone).values())) == len(
        set().union(*patients_in(alone).values())
    )


@pytest.mark.parametrize("first", ["test", "val"])
def test_a_patient_who_would_be_in_val_and_in_test_is_named(alone, capsys, first):
    flags = {"test": ("--test", 8, "--per-class", 1), "val": ("--per-class", 8)}
    assert run_split(alone, *flags[first]) == 0
    if first == "test":
        assert run_split(alone, "--undo") == 0
    # Now the table gives one image of each folder to the same patient.
    present = names_in(alone, "train")["NORMAL"]
    rows = [f"{file},{file}" for file in present[1:]]
    rows += [f"{file},Meier" for file in (present[0], names_in(alone, first)["NORMAL"][0])]
    (alone / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    before = snapshot(alone)
    capsys.readouterr()
    assert run_split(alone, *{"test": ("--per-class", 15), "val": ("--test", 15)}[first]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"patient Meier: is in {first}/ ({alone / first / 'NORMAL'}" in error
    assert "was metadata.csv changed? Correct it, or run split_val.py --undo" in error
    assert snapshot(alone) == before


@pytest.mark.parametrize("seed", range(3))
def test_a_patient_of_a_test_set_that_came_with_the_data_is_not_moved_to_val(tree, capsys, seed):
    put(tree / "test/NORMAL/IM-0000-0099.jpeg", b"another image of a patient in train/")
    assert run_split(tree, "--per-class", 11, "--seed", seed) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "patient IM-0000: is in test/" in error
    assert "put all images of this patient into train/, or all into test/" in error


def test_a_path_in_the_table_is_still_valid_after_both_splits(tmp_path):
    for name in CLASSES:  # the same names in both classes, so that only a path is unique
        for i in range(24):
            put(tmp_path / "train" / name / f"{i}.png", f"{name} {i}".encode())
    rows = [f"train/{name}/{i}.png,{name}{i // 2}" for name in CLASSES for i in range(24)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    assert run_split(tmp_path, "--test", 6, "--per-class", 4) == 0
    xrays = read_split(tmp_path, *SPLITS, classes=CLASSES)
    assert {x.patient for x in xrays} == {f"{name}{i}" for name in CLASSES for i in range(12)}
    assert len({(x.split, x.patient) for x in xrays}) == 24


def test_a_row_of_train_is_not_taken_for_an_image_of_a_test_set_with_the_same_name(tree, capsys):
    for split in ("train", "test"):
        for name in CLASSES:
            put(tree / split / name / "1.png", f"{split} {name}".encode())
    rows = [
        f"{split}/{name}/1.png,{split}{name}" for split in ("train", "test") for name in CLASSES
    ]
    (tree / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    assert run_split(tree, "--per-class", 4) == 0
    xrays = read_split(tree, *SPLITS, classes=CLASSES)
    named = {(x.path.parent.name, x.patient) for x in xrays if x.path.name == "1.png"}
    assert named == {(name, f"{split}{name}") for split in ("train", "test") for name in CLASSES}


def test_links_of_a_test_set_are_recognised_in_a_second_run(alone, tmp_path, capsys):
    links, before = tmp_path / "links", snapshot(alone)
    for _ in range(2):
        assert run_split(links, "--link-from", alone, "--test", 5, "--per-class", 4) == 0
        assert [sizes(links, split) for split in SPLITS] == [[15, 15], [4, 4], [5, 5]]
    assert "Linked 0 images" in capsys.readouterr().out
    assert all(path.is_symlink() for path in links.glob("*/*/*.jpeg"))
    assert run_split(links, "--undo") == run_split(links, "--undo", "test") == 0
    assert sizes(links, "train") == [24, 24] and snapshot(alone) == before


def test_other_classes_than_those_of_the_test_set_are_refused(alone, capsys):
    assert run_split(alone, "--test", 5) == run_split(alone, "--undo") == 0
    line = split_refused(alone, capsys, "--classes", "PNEUMONIA", "NORMAL")
    assert "was split with --classes NORMAL PNEUMONIA" in line
    assert run_split(alone, "--undo", "test", "--classes", "A", "B") == 0  # the record knows them
    assert os.listdir(alone) == ["train"]


def test_without_a_test_set_the_check_first_names_the_command_that_makes_one(alone, capsys):
    line = split_refused(alone, capsys, "--check-first")
    assert f"{alone / 'test'}: expected images to test on, found none" in line
    assert "split_val.py --test 8 (make all TEST=8)" in line
    assert run_split(alone, "--per-class", 4) == 0
    for name in CLASSES:
        (alone / "test" / name).mkdir(parents=True)  # as in the README, but empty
    line = split_refused(alone, capsys, "--check-first")
    assert "split_val.py --test 6 (make all TEST=6)" in line
    assert run_split(alone, "--test", 6, "--check-first") == 0


def test_the_check_first_names_a_missing_train_and_not_a_command_that_cannot_help(tmp_path, capsys):
    (tmp_path / "val").mkdir()
    assert f"{tmp_path / 'train'}: no such folder" in split_refused(
        tmp_path, capsys, "--check-first"
    )


@pytest.fixture
def phantoms(data):
    """A copy of split_phantoms with only train/, 32 images of each class."""
    shutil.rmtree(data / "test")
    assert run_split(data, "--undo") == 0
    return data


def test_the_check_first_stops_before_the_first_move_and_says_how_to_go_on(phantoms, capsys):
    put(phantoms / "train/NORMAL/bad.jpeg", b"not an image")
    line = split_refused(phantoms, capsys, "--check-first", "--test", 5)
    assert "no image was moved" in line and "run make split, make train and make evaluate" in line
    assert run_split(phantoms, "--check-first", "--test", 5, "--skip-bad") == 0
    out = capsys.readouterr().out
    assert "warning: train/NORMAL/bad.jpeg: not an image" in out and "0 errors" in out
    assert sizes(phantoms, "test") == [5, 5] and (phantoms / "split_val.json").exists()
    assert run_split(phantoms, "--check-first") == 0  # there is a split: the check does not run
    assert "0 errors" not in capsys.readouterr().out


def test_the_check_first_runs_after_the_links_are_made(phantoms, tmp_path, capsys):
    put(phantoms / "train/NORMAL/bad.jpeg", b"not an image")
    links = tmp_path / "links"
    assert run_split(links, "--link-from", phantoms, "--test", 5, "--check-first") == 2
    assert "no image was moved" in capsys.readouterr().err
    assert sizes(links, "train") == [33, 32]
    assert not list(links.glob("split_*")) and not (links / "test").exists()
    assert run_split(links, "--test", 5) == 0


def test_with_skip_bad_a_broken_link_stays_with_the_other_images_of_its_patient(alone, capsys):
    for patient in range(12):  # each has images in make_tree, too
        put(alone / f"train/NORMAL/IM-{patient:04d}-9999.jpeg", "nowhere.jpeg")
    assert "-9999.jpeg: cannot be read (12 such" in split_refused(alone, capsys, "--test", 9)
    assert run_split(alone, "--test", 9, "--skip-bad") == 0
    patients = patients_in(alone)
    assert not patients["train"] & patients["test"]
    assert len(list(alone.glob("*/NORMAL/*-9999.jpeg"))) == 12


@pytest.mark.parametrize("seed", range(4))
def test_a_patient_who_stays_in_train_and_is_in_test_is_named_with_every_seed(alone, capsys, seed):
    assert run_split(alone, "--test", 8, "--per-class", 3) == 0 == run_split(alone, "--undo")
    files = names_in(alone, "train")["NORMAL"][:1] + names_in(alone, "test")["NORMAL"][:1]
    rows = [f"{file},Meier" for file in files]
    (alone / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    before = snapshot(alone)
    assert run_split(alone, "--per-class", 3, "--seed", seed) == 2
    assert "patient Meier: is in test/" in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(alone) == before


def test_the_check_takes_empty_folders_of_test_for_no_test(data, capsys):
    shutil.rmtree(data / "test")
    for name in CLASSES:
        (data / "test" / name).mkdir(parents=True)
    assert run_split(data, "--check") == 0
    assert "there is no test/" in capsys.readouterr().out
