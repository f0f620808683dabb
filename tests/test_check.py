"""cxr/check.py: --check reports what is wrong with a data folder, and nothing else."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import run_split, shifted, snapshot, split_refused
from phantoms import draw_folder, draw_phantom
from PIL import Image, ImageEnhance, ImageOps

import cxr.check
import cxr.measurements
from cxr.files import hash_file, read_json
from cxr.folders import CLASSES
from cxr.patients import patient_from_name


def run_check(folder, capsys, status=0):
    """Checks the exit code. Returns (report, screen)."""
    capsys.readouterr()
    path = folder.parent / "check.json"
    assert run_split(folder, "--check", "--json", path) == status
    return read_json(path), capsys.readouterr().out


def alarms(report):
    """Returns the numbers with an alarm: {shortcut}, {(class, shift)}."""
    shift = {(c, row["number"]) for row in report["shift"] for c in CLASSES if row[c]["alarm"]}
    return {row["number"] for row in report["shortcuts"] if row["alarm"]}, shift


@pytest.fixture(scope="session")
def fair_source(tmp_path_factory):
    """A folder without any fault: healthy phantoms in both classes, one image of each patient."""
    root, rng = tmp_path_factory.mktemp("fair"), np.random.default_rng(0)
    folders = [root / "train" / name for name in CLASSES for _ in range(40)]
    folders += [root / "test" / name for name in CLASSES for _ in range(20)]
    for i, folder in enumerate(folders, start=1):
        folder.mkdir(parents=True, exist_ok=True)
        draw_phantom(rng, pneumonia=False).save(folder / f"person{i}_virus_{i}.jpeg", quality=75)
    return root


@pytest.fixture
def fair(fair_source, tmp_path):
    return Path(shutil.copytree(fair_source, tmp_path / "fair"))


def test_a_folder_without_faults_has_no_errors_and_no_warnings(fair, capsys):
    before = snapshot(fair)
    report, screen = run_check(fair, capsys)
    assert report["errors"] == report["warnings"] == []
    assert report["images"] == report["patients"]
    assert report["scored_on"] == "test" and report["formats"]["JPEG"] == report["images"]
    assert "0 errors, 0 warnings" in screen and "  train" in screen
    assert "width" not in screen  # it is the same for all images
    assert snapshot(fair) == before


def test_the_images_of_the_published_list_are_recognised_in_any_split(
    fair, capsys, monkeypatch, tmp_path
):
    images = sorted(fair.glob("*/*/*.jpeg"))
    rows = [f"train,{path.parent.name},{path.name},{hash_file(path)}" for path in images]
    (tmp_path / "list.csv").write_text("\n".join(["split,class,file,sha256", *rows]))
    monkeypatch.setattr(cxr.check, "REFERENCE", tmp_path / "list.csv")
    assert "These are the 400 reference images." in run_check(fair, capsys)[1]
    images[0].unlink()
    assert "reference images" not in run_check(fair, capsys)[1]


def shifted_and_brighter(image):
    return ImageEnhance.Brightness(shifted(image, -4, 3)).enhance(1.1)


def plant(source, folder, change=None, quality=75, suffix=".jpeg"):
    """Writes a copy of an image into another folder. Returns the names of both."""
    target = folder / f"person9{source.stem[6:]}{suffix}"
    if change:
        change(Image.open(source).convert("L")).save(target, quality=quality)
    else:
        shutil.copy(source, target)
    return tuple(sorted("/".join(path.parts[-3:]) for path in (source, target)))


def assert_names(text, words, pairs):
    assert words in text and all(file in text for pair in pairs for file in pair), text


def test_the_check_reports_every_planted_fault_and_nothing_else(fair, capsys):
    train, test = fair / "train", fair / "test"
    normal, sick = (sorted((train / name).iterdir()) for name in CLASSES)
    same = [
        plant(normal[0], test / "NORMAL"),
        plant(normal[1], train / "NORMAL"),
        plant(normal[2], train / "PNEUMONIA"),
        plant(normal[3], test / "NORMAL", lambda image: image, suffix=".png"),
    ]
    similar = {
        plant(normal[4], test / "NORMAL", lambda image: image, quality=40): "",
        plant(normal[5], test / "PNEUMONIA", ImageOps.mirror): "mirrored",
        plant(normal[6], train / "NORMAL", ImageOps.invert): "negative",
        plant(normal[7], test / "NORMAL", shifted_and_brighter, quality=60): "",
    }
    patient = patient_from_name(normal[8].name)
    child = sorted((test / "NORMAL").glob("person1??_virus_1*"))[0]
    child.rename(child.with_name(f"{patient}_999.jpeg"))  # a patient in train/ and test/
    sick[0].rename(sick[0].with_name("scan.jpeg"))
    sick[1].write_bytes(sick[1].read_bytes()[:3000])
    sick[2].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    report, screen = run_check(fair, capsys, 2)
    assert sorted(tuple(sorted(files)) for files in report["same"]) == sorted(same)
    assert {tuple(sorted((a, b))): kind for a, b, _, kind in report["nearly_same"]} == similar
    assert list(report["patients_across"]) == [patient]
    assert report["no_patient"] == ["train/PNEUMONIA/scan.jpeg"]
    unreadable = dict(report["unreadable"])
    broken = [f"train/PNEUMONIA/{path.name}" for path in sick[1:3]]
    assert set(unreadable) == set(broken) and "git-LFS" in unreadable[broken[1]]
    negative = f"train/NORMAL/person9{normal[6].name[6:]}"
    assert report["negatives"] == [negative]
    assert alarms(report) == (set(), set())

    assert all(text in screen for text in report["errors"] + report["warnings"])
    errors, warnings = iter(report["errors"]), iter(report["warnings"])
    for file in broken:
        assert f"{file}: " in (text := next(errors)) and text.endswith("; repair it or remove it")
    assert_names(next(errors), "in both classes (1 pair", same[2:3])
    assert_names(next(errors), "in two splits (2 pairs", [same[0], same[3]])
    leaked = [pair for pair in similar if pair[0].startswith("test")]
    text = next(errors)
    assert_names(text, "nearly the same image is in test/ and in another split (3 pairs", leaked)
    assert text.count("mirrored") == 1
    assert f"patient {patient} is in train and test. Put all images of such" in next(errors)
    assert_names(next(warnings), "twice in one folder (1 pair", same[1:2])
    doubled = [pair for pair in similar if pair not in leaked]
    assert_names(next(warnings), "nearly the same image occurs twice (1 pair", doubled)
    assert_names(next(warnings), "look like negatives of the others: 1, for example", [[negative]])
    assert "train/PNEUMONIA/scan.jpeg" in next(warnings)
    assert list(errors) == list(warnings) == []


def test_a_crop_is_similar_and_neither_an_error_nor_a_warning(fair, capsys):
    source = sorted((fair / "train" / "NORMAL").iterdir())[0]

    def crop(image):
        return image.crop((3, 3, 221, 221)).resize(image.size)

    pair = plant(source, fair / "test" / "NORMAL", crop)
    report, screen = run_check(fair, capsys)
    similar = {tuple(sorted(files)): similarity for *files, similarity in report["similar"]}
    assert pair in similar and all(0.55 <= similarity < 1 for similarity in similar.values())
    assert report["errors"] == report["warnings"] == [] and report["not_compared"] == 0
    assert f"similar images: {len(similar)} pairs, which may be crops" in screen


@pytest.mark.parametrize(("split", "expected"), [("val", (0, 2)), ("test", (2, 0))])
def test_what_val_shares_is_a_warning_and_what_test_shares_an_error(fair, capsys, split, expected):
    assert run_split(fair, "--per-class", 10) == 0
    source = sorted((fair / "train" / "NORMAL").iterdir())[0]
    patient = patient_from_name(source.name)
    Image.open(source).save(fair / split / "NORMAL" / f"{patient}_77.jpeg", quality=50)
    report, _ = run_check(fair, capsys, 2 if split == "test" else 0)
    assert (len(report["errors"]), len(report["warnings"])) == expected
    assert list(report["patients_across"]) == [patient]


def test_the_check_reports_planted_shortcuts_and_shift_and_nothing_else(fair, capsys):
    for path in sorted(fair.rglob("*.jpeg")):
        image = Image.open(path).convert("L")
        if path.parent.name == "PNEUMONIA":  # a marker in the corner, as one ward might use it
            image.paste(160 + int(path.stem.split("_")[-1]) % 60, (4, 4, 16, 16))
        image.save(path, quality=73 if path.parts[-3] == "test" else 75)
    report, screen = run_check(fair, capsys)
    shortcuts, shift = alarms(report)
    assert shortcuts == {"3-pixel border"}
    assert shift == {(name, "JPEG quality") for name in CLASSES}
    assert len(report["warnings"]) == 3
    assert screen.replace("! marks an alarm", "").count(" !") == 3  # the same alarms


def test_of_many_images_a_subset_is_scored_and_the_report_says_so(fair, capsys, monkeypatch):
    report, screen = run_check(fair, capsys)
    assert report["shortcut_images"] == 120 and "drawn at random" not in screen
    for path in sorted(fair.glob("*/NORMAL/*")):
        Image.open(path).save(path, quality=60)
    monkeypatch.setattr(cxr.measurements, "MANY", 100)
    monkeypatch.setattr(cxr.measurements, "SUBSET", 60)
    report, screen = run_check(fair, capsys)
    assert report["shortcut_images"] == 60 and "measured on 60 of the 120 images" in screen
    row = next(row for row in report["shortcuts"] if row["number"] == "JPEG quality")
    assert row["auroc"] == 1 and row["n"] == 30 and row["alarm"]
    assert sum(report["images"].values()) == 120


def test_with_train_alone_a_shortcut_is_scored_on_other_patients(fair, capsys):
    shutil.rmtree(fair / "test")
    for i, path in enumerate(sorted((fair / "train" / "NORMAL").iterdir())):
        Image.open(path).save(path, quality=60 + i % 10)
    report, screen = run_check(fair, capsys)
    assert "the classes of train/" in screen and "fitted on other patients" in screen
    assert report["shift"] == [] and "Shift" not in screen
    row = next(row for row in report["shortcuts"] if row["number"] == "JPEG quality")
    assert row["auroc"] == row["accuracy"] == 1 and row["n"] == 80
    shortcuts, _ = alarms(report)
    assert "JPEG quality" in shortcuts and "3-pixel border" not in shortcuts


def test_a_mode_or_format_of_one_class_alone_is_a_shortcut(fair, capsys):
    for path in sorted((fair / "train" / "NORMAL").iterdir())[:9]:
        Image.open(path).convert("RGB").save(path.with_suffix(".png"))
        path.unlink()
    report, _ = run_check(fair, capsys)
    texts = [text for text in report["warnings"] if "images are in" in text]
    for text, kind in zip(texts, ("RGB", "PNG"), strict=True):
        assert text.startswith(f"shortcut: all 9 {kind} images are in train/NORMAL. ")


def test_a_terminal_shows_the_progress_and_a_log_file_of_a_short_check_does_not(
    fair, capsys, monkeypatch
):
    run_split(fair, "--check")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_split(fair, "--check")
    error = capsys.readouterr().err
    for title, total in (("Reading", 120), ("Describing", 120), ("Comparing", 1)):
        last = next(line for line in error.split("\r") if line.startswith(f"{title}: 100%"))
        assert f" {total}/{total} [00:" in last and "<00:00, " in last


@pytest.fixture
def smallest(tmp_path):
    """The smallest data folder: one image of each class in train/ and test/."""
    draw_folder(tmp_path / "drawn", train=1, test=1, size=64)
    return tmp_path / "drawn"


def test_the_smallest_folder_can_be_checked_into_a_linked_file(smallest, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "check.json").symlink_to("file")
    report, _ = run_check(smallest, capsys)
    assert sum(report["images"].values()) == 4
    assert (tmp_path / "check.json").is_symlink() and read_json(tmp_path / "file") == report
    shutil.rmtree(smallest / "test")
    report, _ = run_check(smallest, capsys)
    assert sum(report["images"].values()) == 2


def test_a_folder_without_readable_images_or_of_no_class_is_refused(smallest, capsys):
    (smallest / "train" / "normal").mkdir()
    assert "expected only the folders" in split_refused(smallest, capsys, "--check")
    (smallest / "train" / "normal").rmdir()
    (smallest / "train" / "NORMAL" / "IM-0000-0001.jpeg").write_bytes(b"")
    assert "train/NORMAL: no image can be read" in split_refused(smallest, capsys, "--check")


def test_json_needs_check_and_never_replaces_a_folder_a_pipe_or_the_record(tree, tmp_path, capsys):
    assert run_split(tree, "--json", "x.json") == 2
    error = capsys.readouterr().err
    assert "--json" in error and "--check" in error
    assert run_split(tree, "--per-class", 5) == 0
    assert "choose another" in split_refused(
        tree, capsys, "--check", "--json", tree / "split_val.json"
    )
    for make in (os.mkdir, os.mkfifo):
        make(path := tmp_path / make.__name__)
        before = path.lstat().st_mode
        message = split_refused(tree, capsys, "--check", "--json", path)
        assert f"{path}: expected a file" in message and path.lstat().st_mode == before
