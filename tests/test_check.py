"""cxr/check.py: what --check finds in a folder, and nothing else."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import run_split, shifted, snapshot, split_refused
from phantoms import draw_folder, draw_phantom
from PIL import Image, ImageEnhance, ImageOps

from cxr.files import read_json
from cxr.folders import CLASSES, SPLIT_FILE
from cxr.patients import patient_from_name


def run_check(folder, capsys):
    """(exit status, the report, the page)."""
    capsys.readouterr()
    report = folder.parent / "check.json"
    status = run_split(folder, "--check", "--json", report)
    return status, read_json(report), capsys.readouterr().out


def alarms(report):
    """({numbers that tell the class}, {(class, number) that tells the split})."""
    shift = {(c, row["number"]) for row in report["shift"] for c in CLASSES if row[c]["alarm"]}
    return {row["number"] for row in report["shortcuts"] if row["alarm"]}, shift


@pytest.fixture(scope="session")
def fair_source(tmp_path_factory):
    """A folder without any finding: healthy phantoms in both classes, each a patient of its own."""
    folder, rng = tmp_path_factory.mktemp("fair"), np.random.default_rng(0)
    number = itertools.count(1)
    for split, count in (("train", 40), ("test", 20)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for _ in range(count):
                i = next(number)
                file = folder / split / name / f"person{i}_virus_{i}.jpeg"
                draw_phantom(rng, pneumonia=False).save(file, quality=75)
    return folder


@pytest.fixture
def fair(fair_source, tmp_path):
    return Path(shutil.copytree(fair_source, tmp_path / "fair"))


def test_the_check_finds_nothing_where_there_is_nothing_and_changes_nothing(fair, capsys):
    before = snapshot(fair)
    status, report, page = run_check(fair, capsys)
    assert status == 0
    assert report["errors"] == report["warnings"] == []
    assert report["images"] == report["patients"]
    assert report["scored_on"] == "test" and report["formats"]["JPEG"] == report["images"]
    assert "0 errors, 0 warnings" in page and "  train" in page
    assert "width" not in page  # the same for all: it never splits
    assert snapshot(fair) == before


def test_the_check_finds_every_planted_fault_and_nothing_else(fair, capsys):
    train, test = fair / "train", fair / "test"
    normal, sick = (sorted((train / name).iterdir()) for name in CLASSES)
    images = [Image.open(path).convert("L") for path in normal]
    same, similar = [], {}

    def pair(a, b):
        return tuple(sorted(path.relative_to(fair).as_posix() for path in (a, b)))

    for source, folder in (
        (normal[0], test / "NORMAL"),  # a leak
        (normal[1], train / "NORMAL"),  # weighs double
        (normal[2], train / "PNEUMONIA"),  # in two classes
    ):
        copied = shutil.copy(source, folder / f"person9{source.name[6:]}")
        same.append(pair(source, Path(copied)))
    images[3].save(test / "NORMAL" / "person903_virus_1.png")
    same.append(pair(normal[3], test / "NORMAL" / "person903_virus_1.png"))
    brighter = ImageEnhance.Brightness(shifted(images[7], -4, 3)).enhance(1.1)
    for source, folder, image, quality, kind in (
        (normal[4], test / "NORMAL", images[4], 40, ""),
        (normal[5], test / "PNEUMONIA", ImageOps.mirror(images[5]), 75, "mirrored"),
        (normal[6], train / "NORMAL", ImageOps.invert(images[6]), 75, "negative"),
        (normal[7], test / "NORMAL", brighter, 60, ""),
    ):
        target = folder / f"person9{source.name[6:]}"
        image.save(target, quality=quality)
        similar[pair(source, target)] = kind
    patient = patient_from_name(normal[8].name)
    child = sorted((test / "NORMAL").glob("person1??_virus_1*"))[0]
    child.rename(child.with_name(f"{patient}_999.jpeg"))  # a patient in train/ and test/
    sick[0].rename(sick[0].with_name("scan.jpeg"))
    sick[1].write_bytes(sick[1].read_bytes()[:3000])
    sick[2].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    status, report, page = run_check(fair, capsys)
    assert status == 2
    assert sorted(tuple(sorted(found)) for found in report["same"]) == sorted(same)
    assert {tuple(sorted((a, b))): kind for a, b, _, kind in report["nearly_same"]} == similar
    assert list(report["patients_across"]) == [patient]
    assert report["no_patient"] == ["train/PNEUMONIA/scan.jpeg"]
    unreadable = dict(report["unreadable"])
    assert set(unreadable) == {f"train/PNEUMONIA/{path.name}" for path in sick[1:3]}
    assert "git-LFS" in unreadable[f"train/PNEUMONIA/{sick[2].name}"]
    assert len(report["errors"]) == 2 + 3 + 3 + 1  # unreadable, same, nearly the same, the patient
    negative = f"train/NORMAL/person9{normal[6].name[6:]}"
    assert report["negatives"] == [negative]
    assert len(report["warnings"]) == 1 + 1 + 1 + 1  # same, nearly same in a folder, it, the name
    assert "nearly the same image (mirrored) as" in page
    assert alarms(report) == (set(), set())
    assert all(text in page for text in report["errors"] + report["warnings"])


def test_what_train_and_val_share_is_a_warning_and_what_test_shares_an_error(fair, capsys):
    assert run_split(fair, "--per-class", 10) == 0
    source = sorted((fair / "train" / "NORMAL").iterdir())[0]
    image, patient = Image.open(source), patient_from_name(source.name)
    for split, expected in (("val", "warnings"), ("test", "errors")):
        file = fair / split / "NORMAL" / f"{patient}_77.jpeg"
        image.save(file, quality=50)
        status, report, _ = run_check(fair, capsys)
        assert status == (2 if expected == "errors" else 0)
        assert [len(report[key]) for key in ("errors", "warnings")].count(2) == 1
        assert len(report[expected]) == 2
        assert list(report["patients_across"]) == [patient]
        file.unlink()


def test_the_check_finds_planted_shortcuts_and_shift_and_nothing_else(fair, capsys):
    for path in sorted(fair.rglob("*.jpeg")):
        image = Image.open(path).convert("L")
        if path.parent.name == "PNEUMONIA":  # a marker in the corner, as one ward might use it
            grey = 160 + int(path.name.split("_")[-1][:-5]) % 60
            image.paste(grey, (4, 4, 16, 16))
        image.save(path, quality=73 if path.parts[-3] == "test" else 75)
    status, report, page = run_check(fair, capsys)
    assert status == 0
    shortcuts, shift = alarms(report)
    assert shortcuts == {"3-pixel border"}
    assert shift == {(name, "JPEG quality") for name in CLASSES}
    assert len(report["warnings"]) == 3 and page.count(" !") == 1 + 2


def test_with_train_alone_a_shortcut_is_scored_on_other_patients(fair, capsys):
    shutil.rmtree(fair / "test")
    for i, path in enumerate(sorted((fair / "train" / "NORMAL").iterdir())):
        image = Image.open(path)
        image.save(path, quality=60 + i % 10)
    status, report, page = run_check(fair, capsys)
    assert status == 0
    assert "fitted on other patients, separates the classes of train/" in page
    assert report["shift"] == [] and "Shift" not in page
    rows = {row["number"]: row for row in report["shortcuts"]}
    assert rows["JPEG quality"]["auroc"] == 1 and rows["JPEG quality"]["alarm"]
    assert rows["JPEG quality"]["n"] == 80 and rows["JPEG quality"]["accuracy"] == 1
    assert not rows["3-pixel border"]["alarm"]


def test_a_mode_or_format_of_one_class_alone_is_a_shortcut(fair, capsys):
    for path in sorted((fair / "train" / "NORMAL").iterdir())[:9]:
        Image.open(path).convert("RGB").save(path.with_suffix(".png"))
        path.unlink()
    _, report, _ = run_check(fair, capsys)
    assert {text for text in report["warnings"] if "all in" in text} == {
        "shortcut: 9 RGB images, all in train/NORMAL",
        "shortcut: 9 PNG images, all in train/NORMAL",
    }


def test_the_smallest_folder_is_checked_and_one_without_readable_images_is_refused(
    tmp_path, capsys
):
    draw_folder(tmp_path / "drawn", train=1, test=1, size=64)
    status, report, _ = run_check(tmp_path / "drawn", capsys)
    assert status == 0 and sum(report["images"].values()) == 4
    shutil.rmtree(tmp_path / "drawn" / "test")
    assert run_split(tmp_path / "drawn", "--check") == 0
    (tmp_path / "drawn" / "train" / "NORMAL" / "IM-0000-0001.jpeg").write_bytes(b"")
    assert "no image of a folder can be read" in split_refused(
        tmp_path / "drawn", capsys, "--check"
    )
    (tmp_path / "drawn" / "train" / "normal").mkdir()
    assert "expected only the folders" in split_refused(tmp_path / "drawn", capsys, "--check")


def test_json_replaces_a_file_or_what_a_link_points_to_and_nothing_else(tree, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as devices are: neither file nor folder
    for name in ("folder", "pipe"):
        before = (tmp_path / name).lstat().st_mode
        found = split_refused(tree, capsys, "--check", "--json", tmp_path / name)
        assert "expected a file to write" in found
        assert (tmp_path / name).lstat().st_mode == before
    draw_folder(tmp_path / "drawn", train=4, test=2, size=64)
    assert run_split(tmp_path / "drawn", "--check", "--json", tmp_path / "link") in (0, 2)
    assert (tmp_path / "link").is_symlink() and b"shortcuts" in (tmp_path / "file").read_bytes()


def test_json_belongs_to_check_and_never_replaces_the_record(tree, capsys):
    assert run_split(tree, "--per-class", 5) == 0
    found = split_refused(tree, capsys, "--check", "--json", tree / SPLIT_FILE)
    assert "choose another" in found
    with pytest.raises(SystemExit) as stop:
        run_split(tree, "--json", "x.json")
    assert stop.value.code == 2
    assert "--json needs --check" in capsys.readouterr().err
