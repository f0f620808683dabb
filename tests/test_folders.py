"""cxr/folders.py: the classes, splits and images of a data folder, and other files in it."""

import shutil

import faults
import pytest
from faults import files, listing, put
from helpers import SCRIPTS, make_tree, read_about, sizes, split_refused

import split_val
from cxr.files import read_json


@pytest.mark.parametrize("folder", ["val/normal", "val/COVID", "test/normal"])
def test_a_folder_that_is_not_a_class_is_refused_by_name(folder, tree, capsys):
    (tree / folder).mkdir(parents=True)
    assert f"{tree / folder}: expected only the folders NORMAL" in split_refused(tree, capsys)


@pytest.mark.parametrize("flags", [[], ["--undo"]])
@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("place", ["val", "val/NORMAL"])
def test_a_link_or_a_file_in_the_place_of_a_folder_is_refused(
    place, is_link, flags, tree, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    put(tree / place, str(tmp_path / "empty") if is_link else b"")
    line = split_refused(tree, capsys, *flags)
    assert f"{tree / place}: expected a folder, found a link or a file" in line


def test_an_image_that_cannot_be_read_is_refused(tree, capsys):
    put(tree / "train/NORMAL/IM-0099-0001.jpeg", "nowhere.jpeg")
    assert "IM-0099-0001.jpeg: cannot be read" in split_refused(tree, capsys, "--per-class", 5)


@pytest.mark.parametrize(
    ("place", "given"), [("data", "."), ("deep/data", "."), ("data", "data/train")]
)
def test_a_data_folder_at_another_level_is_named(place, given, tmp_path, capsys):
    make_tree(tmp_path / "__MACOSX", 1)
    data = make_tree(tmp_path / place, 1)
    line = split_refused(tmp_path / given, capsys, "--check")
    assert f"use --data-dir {data}" in line


def test_a_folder_between_a_class_and_its_images_is_named(tree, capsys):
    normal = tree / "train/NORMAL"
    normal.rename(tree / "images")
    normal.mkdir()
    (tree / "images").rename(normal / "images")
    line = split_refused(tree, capsys, "--check")
    assert f"move the images of {normal / 'images'} up" in line


def test_files_that_are_not_read_are_a_warning_and_all_names_of_jpegs_are_read(
    data, run_train, tmp_path, capsys
):
    folder, content = data / "train/NORMAL", faults.first(data / "test").read_bytes()
    suffixes = (".jfif", ".jpe", ".jp2", "")
    for image, suffix in zip(sorted(folder.iterdir())[:4], suffixes, strict=True):
        image.rename(image.with_suffix(suffix))
    for junk in ("Thumbs.db", "desktop.ini", ".hidden.txt", "._x.jpeg"):
        put(folder / junk, b"junk")
    put(folder / "more/x.jpeg", content)
    put(data / "train/x.jpeg", content)
    assert run_train("--epochs", 1, data=data) == 0
    assert split_val.main(["--data-dir", str(data), "--check"]) == 0
    error = capsys.readouterr().err
    assert error.count(f"warning: {folder}: files that are not read: 2 (.jp2, no suffix)") == 2
    assert error.count(". Convert them if they are images\n") == 2
    assert error.count(f"warning: {folder / 'more'}: its images are not read. Move them up") == 2
    assert error.count(f"warning: {data / 'train'}: images directly in it are not read. Move") == 2
    assert len(read_about(tmp_path)["images"]["train"]) == 40 - 2


def test_evaluate_uses_or_ignores_all_that_may_be_in_a_folder(run_script, home):
    added = faults.add_all_that_may_be(home / "data/test")
    assert run_script("evaluate") == (0, [])
    assert read_json(home / "results/metrics.json")["n"] == 12 + added


def test_check_train_and_split_use_or_ignore_all_that_may_be_in_a_folder(run_script, home):
    data = home / "data"
    added = faults.add_all_that_may_be(data / "train")
    before = listing(data)
    assert run_script("split_val", "--check") == run_script("train") == (0, [])
    assert len(read_json(home / "model.json")["images"]["train"]) == 16 + added
    assert listing(data) == before
    shutil.rmtree(data / "val")
    before = sorted(files(data).values())
    assert run_script("split_val", "--per-class", 7) == (0, [])
    assert sizes(data) == [7, 7] and b"junk" not in files(data / "val").values()
    (data / "split_val.json").unlink()
    assert sorted(files(data).values()) == before


@pytest.mark.parametrize("name", faults.BAD_FOLDERS)
def test_an_odd_folder_is_refused_by_every_script_and_not_changed(name, refused, home):
    change, text = faults.BAD_FOLDERS[name]
    data = home / "data"
    change(data / "test")
    change(data / "train")
    for script, *flags in (("evaluate",), ("train",), ("split_val", "--check"), ("split_val",)):
        if script == "split_val" and not flags:
            shutil.rmtree(data / "val")
        before = listing(data)
        line = refused(2, script, *flags)
        # --check may list the errors in its report, which is on stdout.
        assert flags or (text in line and str(data) in line), line
        assert listing(data) == before, script


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_data_folder_that_is_missing_or_a_file_is_named(name, script, refused, home):
    put(home / "file", b"")
    assert str(home / name) in refused(2, script, "--data-dir", home / name)
