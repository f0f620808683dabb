"""cxr/sources.py: evaluate.py --also reads the data folders of other sources."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import LEVELS, TINY_FAST, read_report, read_rows, write_dicom
from PIL import Image, ImageEnhance

import evaluate
import train
from cxr.files import printable
from cxr.folders import CLASSES, list_images


@pytest.fixture
def hospital(second_hospital, tmp_path):
    """A copy of second_hospital that the test may change."""
    return Path(shutil.copytree(second_hospital, tmp_path / "nih"))


@pytest.fixture
def refused(run_evaluate, capsys, tmp_path):
    """refused(*flags) checks that nothing is computed or written, and returns the one line."""

    def call(*flags):
        capsys.readouterr()
        assert run_evaluate(*flags) == 2
        out, err = capsys.readouterr()
        assert "Features" not in out and err.count("\n") == 1, (out, err)
        assert not [*(tmp_path / "results").glob("*")]
        return err

    return call


def other_source(tmp_path):
    """Returns the entry of the second source in metrics.json."""
    return read_report(tmp_path / "results")["also"][1]


def test_a_folder_may_hold_test_or_the_class_folders(run_evaluate, hospital, tmp_path, capsys):
    direct = Path(shutil.copytree(hospital / "test", tmp_path / "direct"))
    given = ("--also", hospital, "--also", direct, "--also", hospital / "test")
    assert run_evaluate(*given) == 0
    _, *sources = read_report(tmp_path / "results")["also"]
    assert [source["name"] for source in sources] == ["nih", "direct", "nih-2"]
    assert sources[0]["scores"] == sources[1]["scores"] == sources[2]["scores"]
    names = [
        [row["file"] for row in read_rows(tmp_path / "results" / source["table"])]
        for source in sources
    ]
    assert names[0] == names[2] == [f"test/{name}" for name in names[1]]
    assert len(names[1]) == 30 and names[1][0].startswith("NORMAL/")
    screen, page = capsys.readouterr().out, (tmp_path / "results" / "report.html").read_text()
    assert f"  nih: {hospital}\n" in screen and f"  direct: {direct}\n" in screen
    note = "nih-2: folder 2 with the name nih, in the order of the command line"
    assert note in screen and note in page and str(tmp_path) not in page


def test_a_source_with_the_name_of_the_first_one_gets_another_name(
    run_evaluate, hospital, tmp_path
):
    twin = Path(shutil.copytree(hospital, tmp_path / "twin" / "Chestxrays"))
    assert run_evaluate("--also", twin) == 0
    first, second = read_report(tmp_path / "results")["also"]
    assert (first["name"], second["name"]) == ("chestxrays", "Chestxrays-2")
    assert (tmp_path / "results" / "predictions_Chestxrays-2.csv").exists()
    note = "Chestxrays-2: folder 2 with the name Chestxrays, in the order of the command line"
    assert note in (tmp_path / "results" / "report.html").read_text()


@pytest.mark.parametrize("direct", [False, True])
def test_its_metadata_csv_names_its_patients(direct, run_evaluate, hospital, tmp_path, capsys):
    paths = [path for name in CLASSES for path in list_images(hospital / "test" / name)]
    rows = [f"{path.name},P{i // 2},{'FM'[i % 2]}" for i, path in enumerate(paths)]
    folder = hospital
    if direct:
        folder = Path(shutil.copytree(hospital / "test", tmp_path / "direct"))
    (folder / "metadata.csv").write_text("\n".join(["file_name,patient_id,sex", *rows]))
    assert run_evaluate("--also", folder) == 0
    source = other_source(tmp_path)
    assert (source["n"], source["patients"], source["names_without_patient"]) == (30, 15, 0)
    table = read_rows(tmp_path / "results" / source["table"])
    assert [row["sex"] for row in table[:3]] == ["F", "M", "F"]
    assert capsys.readouterr().err == ""


def test_a_training_image_is_refused_before_the_feature_pass(refused, hospital, split_phantoms):
    for split in ("train", "val"):
        image = list_images(split_phantoms / split / "NORMAL")[0]
        shutil.copy(image, hospital / "test" / "NORMAL" / f"from {split}.jpeg")
    line = refused("--also", hospital)
    assert "2 of its 32 images are training or validation images" in line and "from" in line


def test_a_training_image_is_refused_even_if_the_folder_of_the_training_is_gone(
    refused, hospital, data
):
    shutil.copy(list_images(data / "train/NORMAL")[0], hospital / "test/NORMAL/copy.jpeg")
    shutil.rmtree(data / "train")
    shutil.rmtree(data / "val")
    assert "1 of its 31 images are" in refused("--data-dir", data, "--also", hospital)


def test_other_folders_are_one_line(refused, hospital, tmp_path):
    line = refused("--also", tmp_path / "nosuch")
    assert "nosuch: no such folder" in line
    assert "found none" in refused("--also", tmp_path / "nih/test/NORMAL")
    (hospital / "test/PNEUMONIA").rename(hospital / "test/pneumonia")
    line = refused("--also", hospital)
    assert "expected the class folders of the model (NORMAL and PNEUMONIA)" in line
    assert "found NORMAL, pneumonia" in line
    shutil.rmtree(hospital / "test/pneumonia")
    for path in list_images(hospital / "test/NORMAL"):
        path.unlink()
    assert "expected images" in refused("--also", hospital)


def test_one_file_in_both_classes_is_refused(refused, hospital):
    shutil.copy(list_images(hospital / "test/NORMAL")[0], hospital / "test/PNEUMONIA/a.jpeg")
    line = refused("--also", hospital)
    assert "images in both classes: 1" in line and str(hospital) in line


def test_near_copies_of_training_images_cause_a_warning(
    run_evaluate, hospital, split_phantoms, tmp_path, capsys
):
    for number, path in enumerate(list_images(split_phantoms / "train/PNEUMONIA")[:2]):
        darker = ImageEnhance.Brightness(Image.open(path)).enhance(0.8)
        darker.save(hospital / "test/PNEUMONIA" / f"{number}.png")
    assert run_evaluate("--also", hospital) == 0
    (warning,) = read_report(tmp_path / "results")["warnings"]
    assert warning.startswith(
        "source nih: 2 of 32 images are nearly the same as training or validation"
    )
    assert warning in capsys.readouterr().err


def test_images_of_the_first_source_cause_a_warning(run_evaluate, hospital, data, tmp_path):
    first = list_images(data / "test/NORMAL")[0]
    shutil.copy(first, hospital / "test/NORMAL/same.jpeg")
    assert run_evaluate("--also", hospital) == 0
    (warning,) = read_report(tmp_path / "results")["warnings"]
    assert warning.startswith("source nih: 1 of 31 images are also images of chestxrays")


def test_a_source_with_images_of_the_first_one_only_is_refused(refused, data, tmp_path):
    copy = Path(shutil.copytree(data / "test", tmp_path / "copy"))
    next(path for path in copy.glob("*/*")).unlink()
    line = refused("--also", copy)
    assert f"--also {copy}: all 23 images are also images of chestxrays" in line


def test_shared_images_and_dicom_patients_of_any_two_sources_cause_a_warning(
    run_evaluate, hospital, data, tmp_path
):
    rng = np.random.default_rng(0)
    third = tmp_path / "third"
    (third / "NORMAL").mkdir(parents=True)
    for folder in (data / "test/NORMAL", hospital / "test/NORMAL", third / "NORMAL"):
        noise = LEVELS + rng.integers(0, 300, LEVELS.shape, np.uint16)
        write_dicom(folder / "a.dcm", noise, PatientID="PACS-17")
    shutil.copy(list_images(hospital / "test/NORMAL")[1], third / "NORMAL")
    assert run_evaluate("--data-dir", data, "--also", hospital, "--also", third) == 0
    warnings = [w for w in read_report(tmp_path / "results")["warnings"] if " also " in w]
    expected = [
        "source nih: 1 patients are also patients of chestxrays (the same PatientID in DICOM)",
        "source third: 1 patients are also patients of chestxrays",
        "source third: 1 of 2 images are also images of nih",
        "source third: 1 patients are also patients of nih",
    ]
    assert len(warnings) == 4
    for text, start in zip(warnings, expected, strict=True):
        assert text.startswith(start)


def test_shared_patients_are_found_by_dicom_ids_only(
    data, hospital, tmp_path, flags, quick, capsys
):
    rng = np.random.default_rng(0)
    for folder, name in ((data / "train/NORMAL", "a.dcm"), (hospital / "test/NORMAL", "b.dcm")):
        noise = LEVELS + rng.integers(0, 300, LEVELS.shape, np.uint16)
        write_dicom(folder / name, noise, PatientID="PACS-17")
    ids = "file_name,patient_id\n"
    for folder in (data / "train/PNEUMONIA", hospital / "test/PNEUMONIA"):
        ids_of = "".join(f"{path.name},1\n" for path in list_images(folder)[:2])
        (folder.parent.parent / "metadata.csv").write_text(ids + ids_of)
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert evaluate.main(flags(data, "--also", hospital)) == 0
    warnings = [w for w in read_report(tmp_path / "results")["warnings"] if "patients" in w]
    (warning,) = [text for text in warnings if text.startswith("source nih")]
    assert warning.startswith("source nih: 1 patients are also in train/ or val/")
    assert "PACS" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--skip-bad",)])
def test_an_unreadable_image_is_treated_as_in_the_first_source(
    flags, run_evaluate, hospital, tmp_path, capsys
):
    damaged = list_images(hospital / "test/NORMAL")[0]
    damaged.write_bytes(b"<html>")
    assert run_evaluate("--also", hospital, *flags) == (0 if flags else 2)
    err = capsys.readouterr().err
    assert printable(damaged) in err
    if flags:
        source = other_source(tmp_path)
        assert (source["n"], source["unreadable"]) == (29, 1)
        table = read_rows(tmp_path / "results" / source["table"])
        assert [row["file"] for row in table if row["error"]] == [f"test/NORMAL/{damaged.name}"]
    else:
        assert "--skip-bad" in err and err.count("\n") == 1


def test_without_the_flag_no_copies_are_searched(run_evaluate, hospital, monkeypatch):
    def search(_):
        raise AssertionError

    monkeypatch.setattr("cxr.copies.find_near_duplicates", search)
    assert run_evaluate() == 0
    with pytest.raises(AssertionError):
        run_evaluate("--also", hospital)
