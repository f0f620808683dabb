"""cxr/folders.py: the classes, splits and images of a data folder, and what else may lie there."""

import json
import shutil
from pathlib import Path

import faults
import pytest
from faults import files, listing, put
from helpers import SCRIPTS, TINY, names_in, run_split, sizes, split_refused

import split_val
import train
from cxr.files import read_json
from cxr.folders import CLASSES

# ---------------------------------------------------------------- split_val.py


def test_junk_files_are_neither_counted_nor_moved(tree):
    junk = [".DS_Store", "Thumbs.db", "desktop.ini", "a.jpeg.part", "._IM-1-1.jpeg", "notes.txt"]
    for name in CLASSES:
        for file in junk:
            (tree / "train" / name / file).write_bytes(b"junk")
        (tree / "train" / name / ".ipynb_checkpoints").mkdir()
        (tree / "train" / name / ".ipynb_checkpoints" / "IM-9-9.jpeg").write_bytes(b"copy")
    assert run_split(tree, "--per-class", 11) == 0
    for name in CLASSES:
        assert not set(junk) & set(names_in(tree, "val")[name])
    assert sizes(tree) == [11, 11]


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert run_split(tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert "train: no such folder" in split_refused(tmp_path, capsys)


@pytest.mark.parametrize(
    "make", ["val/normal", "val/COVID", "test/normal", "train/.ipynb_checkpoints"]
)
def test_a_folder_that_is_no_class_is_refused_by_name(tree, capsys, make):
    (tree / make).mkdir(parents=True)
    assert f"{tree / make}: expected only the folders NORMAL" in split_refused(tree, capsys)


@pytest.mark.parametrize("place", ["val", "val/NORMAL"])
def test_links_and_files_in_the_place_of_folders_are_refused(place, tree, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tree / place).parent.mkdir(exist_ok=True)
    (tree / place).symlink_to(tmp_path / "elsewhere")
    for flags in ((), ("--undo",)):
        found = split_refused(tree, capsys, *flags)
        assert f"{tree / place}: expected a folder, found a link or a file" in found
    (tree / place).unlink()
    (tree / place).write_bytes(b"")
    assert "found a link or a file" in split_refused(tree, capsys)


def test_a_class_of_train_that_is_a_link_is_refused(tree, tmp_path, capsys):
    (tree / "train" / "NORMAL").rename(tmp_path / "moved")
    (tree / "train" / "NORMAL").symlink_to(tmp_path / "moved")
    assert "train/NORMAL: found a link" in split_refused(tree, capsys, "--per-class", 5)


def test_an_image_that_cannot_be_read_is_refused(tree, capsys):
    (tree / "train" / "NORMAL" / "IM-0099-0001.jpeg").symlink_to("nowhere.jpeg")
    assert "IM-0099-0001.jpeg: cannot be read" in split_refused(tree, capsys, "--per-class", 5)


# ---------------------------------------------------------------- all scripts


def test_files_of_other_kinds_are_counted_and_jpegs_of_all_names_read(data, flags, capsys):
    folder = data / "train" / "NORMAL"
    images = sorted(folder.iterdir())
    for image, suffix in zip(images[:4], (".jfif", ".jpe", ".jp2", ""), strict=True):
        image.rename(image.with_suffix(suffix))
    for junk in ("Thumbs.db", "desktop.ini", ".hidden.txt", "._x.jpeg"):
        (folder / junk).write_bytes(b"junk")
    assert train.main(flags(data, *TINY, "--epochs", 1)) == 0
    assert split_val.main(["--data-dir", str(data), "--check"]) == 0
    error = capsys.readouterr().err
    assert error.count(f"warning: {folder}: 2 files are not read (.jp2, no suffix)") == 2
    files = read_json(Path(flags(data)[3]).with_suffix(".json"))["images"]["train"]
    assert len(files) == 40 - 2


def test_the_level_that_would_be_right_is_named(data, tmp_path, flags, capsys):
    def told(*words):
        assert split_val.main(["--check", *map(str, words)]) == 2
        return capsys.readouterr().err

    (tmp_path / "__MACOSX").mkdir()
    assert f"see --data-dir {data}" in told("--data-dir", tmp_path)
    assert f"see --data-dir {data}" in told("--data-dir", data / "train")
    inside = shutil.copytree(data, tmp_path / "deep" / "deep")
    assert f"see --data-dir {inside}" in told("--data-dir", tmp_path / "deep")
    normal = inside / "train" / "NORMAL"
    normal.rename(inside / "images")
    normal.mkdir()
    (inside / "images").rename(normal / "images")
    assert f"move the images in {normal / 'images'} up" in told("--data-dir", inside)


def test_all_that_may_be_in_a_folder_is_used_or_ignored(run_script, home):
    data = home / "data"
    added = faults.add_all_that_may_be(data / "test")
    assert run_script("evaluate") == (0, [])
    assert json.loads((home / "results" / "metrics.json").read_text())["n"] == 12 + added
    shutil.rmtree(data / "test")
    faults.add_all_that_may_be(data / "train")
    before = listing(data)
    assert run_script("split_val", "--check") == run_script("train") == (0, [])
    assert len(read_json(home / "model.json")["images"]["train"]) == 16 + added
    assert listing(data) == before
    shutil.rmtree(data / "val")
    before = sorted(files(data).values())
    assert run_script("split_val", "--per-class", 3) == (0, [])
    (data / "split_val.json").unlink()
    assert sorted(files(data).values()) == before


@pytest.mark.parametrize("name", faults.BAD_FOLDERS)
def test_an_odd_folder_is_refused_by_every_script_and_left_as_it_is(name, refused, home):
    change, text = faults.BAD_FOLDERS[name]
    data = home / "data"
    change(data / "test")
    change(data / "train")
    for script, *more in (("evaluate",), ("train",), ("split_val", "--check"), ("split_val",)):
        if (script, *more) == ("split_val",):
            shutil.rmtree(data / "val")
        before = listing(data)
        line = refused(2, script, *more)
        assert (text in line and str(data) in line) or more, line  # --check may print a page
        assert listing(data) == before, script


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_data_folder_and_a_file_in_its_place(name, script, refused, home):
    put(home / "file", b"")
    assert str(home / name) in refused(2, script, "--data-dir", home / name)
