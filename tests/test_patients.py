"""cxr/patients.py: who is on an image, by names, metadata.csv and DICOM."""

import os
import random
import shutil

import pytest
from faults import put
from helpers import TINY, draw_dicoms, with_table

import evaluate
import split_val
import train
from cxr.files import read_json
from cxr.folders import CLASSES, SPLITS
from cxr.patients import patient_from_name, read_split


def test_names_tell_the_patient():
    assert patient_from_name("person86_virus_1.jpeg") == "person86_virus"
    assert patient_from_name("person86_virus_1.jpeg", cautious=True) == "person86"
    assert patient_from_name("person86_bacteria_2.jpeg", cautious=True) == "person86"
    assert patient_from_name("IM-0001-0002.jpeg") != patient_from_name("NORMAL2-IM-0001-0001.jpeg")
    assert patient_from_name("NORMAL2-IM-0001-0001-0002.jpeg") == "NORMAL2-IM-0001"
    assert patient_from_name("person447_virus_921_1.jpeg") == "person447_virus"
    assert patient_from_name("scan.png") is None


SCHEMES = {
    "NIH": lambda label, p, i: f"{p + 100 * label:08d}_{i:03d}.png",
    "CheXpert": lambda label, p, i: f"patient{p + 100 * label:05d}_study1_view{i}.jpg",
    "BIDS": lambda label, p, i: f"sub-S{p + 100 * label}_ses-E{i}_cr.png",
    "the other release": lambda label, p, i: (
        f"{('NORMAL', ('BACTERIA', 'VIRUS')[i % 2])[label]}-{p + 100 * label}-{i:04d}.jpeg"
    ),
    "a table": lambda label, p, i: f"{random.Random(f'{label}{p}{i}').randrange(10**9)}.png",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_patients_of_four_images_stay_on_one_side_however_they_are_told(scheme, tmp_path):
    patients, rows = {}, ["file_name,patient_id"]
    for label, name in enumerate(CLASSES):
        for patient in range(10):
            for i in range(4):
                file = SCHEMES[scheme](label, patient, i)
                put(tmp_path / "train" / name / file, f"{label} {patient} {i}".encode())
                patients[file] = label, patient
                rows.append(f"{file},P{label}{patient}")
    if scheme == "a table":
        (tmp_path / "metadata.csv").write_text("\n".join(rows))
    assert split_val.main(["--data-dir", str(tmp_path), "--per-class", "10"]) == 0
    sides = [{patients[p.name] for p in tmp_path.glob(f"{s}/*/*")} for s in ("train", "val")]
    assert len(sides[1]) == 4 and not sides[0] & sides[1]


def test_what_a_table_leaves_open_is_told_with_its_number(data, capsys):
    images = sorted(path.name for path in data.glob("t*/NORMAL/*"))
    rows = [f"{name},P{(i + 1) // 2}" for i, name in enumerate(images)]
    text = "\n".join(["file_name,patient_id", *rows[:-1], f"{images[-1]},", "gone.png,P1"])
    split_val.main(with_table(data, text))
    page = capsys.readouterr()
    assert f"1 of {len(rows) + 1} rows have no image here, as gone.png" in page.err
    assert "tells no patient of 57 of 88 images, as " in page.err
    assert "patient P" in page.out  # pairs of names lie in train/ and test/
    split_val.main(with_table(data, f"file_name,sex\n{images[0]},F\n"))
    assert "no column patient_id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "image,patient_id\n",
            "row 1, column file_name: expected its name, and commas between columns",
        ),
        ("file_name\nIM-0000-0001.jpeg\nIM-0000-0001.jpeg\n", "row 3"),
        ("", "an empty file"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(text, expected, data, capsys):
    assert (data / "train" / "NORMAL" / "IM-0000-0001.jpeg").exists()
    assert split_val.main(with_table(data, text)) == 2
    assert expected in capsys.readouterr().err


def test_two_files_of_one_name_need_their_path_which_holds_after_the_split(data, capsys):
    for i, name in enumerate(CLASSES):
        source = sorted((data / "train" / name).iterdir())[i]
        source.rename(source.with_name("scan.jpeg"))
    assert split_val.main(with_table(data, "file_name,patient_id\nscan.jpeg,7\n")) == 2
    assert "row 2: scan.jpeg is in" in capsys.readouterr().err
    rows = [f"train/{name}/scan.jpeg,{name}7" for name in CLASSES]
    with_table(data, "\n".join(["file_name,patient_id", *rows]))
    (data / "train" / "NORMAL" / "scan.jpeg").rename(data / "val" / "NORMAL" / "scan.jpeg")
    found = read_split(data, "train", "val")
    told = {image.patient for images in found.values() for image in images}
    assert {"NORMAL7", "PNEUMONIA7"} <= told


def test_spaces_in_a_table_separate_no_patient_and_odd_places_are_told(data, flags, capsys):
    images = sorted(path.name for path in data.glob("train/NORMAL/*"))
    with_table(data, f"file_name, patient_id\n{images[0]},P3\n{images[1]},P3 \n")
    found = {i.path.name: i.patient for i in read_split(data, "train")["train"]}
    assert found[images[0]] == found[images[1]] == "P3"
    (data / "metadata.csv").rename(data / "train" / "metadata.csv")
    assert train.main(flags(data, *TINY)) == 2
    assert f"expected it one level up, in {data}" in capsys.readouterr().err
    (data / "train" / "metadata.csv").unlink()
    (deeper := data / "train" / "NORMAL" / "more").mkdir()
    for target in (deeper, data / "train"):
        shutil.copy(data / "test" / "NORMAL" / os.listdir(data / "test" / "NORMAL")[0], target)
    assert train.main(flags(data, *TINY, "--epochs", 1)) == 0
    error = capsys.readouterr().err
    assert f"{deeper}: the images in it are not read" in error
    assert f"{data / 'train'}: the images directly in it are not read" in error


@pytest.mark.parametrize("table", [True, False])
def test_dicom_on_a_read_only_mount_comes_to_a_report_and_no_patient_is_on_two_sides(
    table, tmp_path, flags, capsys
):
    mount, data = tmp_path / "mount", tmp_path / "data"
    patients = draw_dicoms(mount, 12, table)
    for folder in (mount, *mount.rglob("*/")):
        folder.chmod(0o555)
    try:
        before = {path: path.stat().st_mtime_ns for path in mount.rglob("*")}
        for _ in range(2):  # the second run links and moves nothing
            assert split_val.main(["--data-dir", str(data), "--link-from", str(mount)]) == 0
        assert train.main(flags(data, *TINY)) == evaluate.main(flags(data)) == 0
        assert {path: path.stat().st_mtime_ns for path in mount.rglob("*")} == before
    finally:
        for folder in (mount, *mount.rglob("*/")):
            folder.chmod(0o755)
    sides = {split: set() for split in SPLITS}
    for path in data.glob("*/*/*.dcm"):
        assert path.is_symlink() and path.resolve().parent.parent.parent == mount
        sides[path.parts[-3]].add(patients[path.name])
    assert len(sides["val"]) == 8 and not sides["train"] & sides["val"]
    report = read_json(tmp_path / "results" / "metrics.json")
    assert (report["n"], report["patients"], report["names_without_patient"]) == (24, 12, 0)
    text = (tmp_path / "results" / "predictions.csv").read_text() + capsys.readouterr().out
    assert "PACS" not in text  # no PatientID in what is sent around
    groups = {each["group"] for each in report["subgroups"].values()}
    assert groups == ({"sex F", "sex M"} if table else set())
