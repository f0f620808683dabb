"""cxr/patients.py: the patient of an image, from metadata.csv, DICOM or the file name."""

import random

import pytest
from faults import put
from helpers import LEVELS, TINY, draw_dicoms, run_split, split_refused, with_table, write_dicom

import evaluate
import split_val
import train
from cxr.files import read_json
from cxr.folders import CLASSES, SPLITS
from cxr.patients import patient_from_name, read_split


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person86_virus_1.jpeg", "person86_virus"),
        ("person447_virus_921_1.jpeg", "person447_virus"),
        ("IM-0001-0002.jpeg", "IM-0001"),
        ("NORMAL2-IM-0001-0001.jpeg", "NORMAL2-IM-0001"),
        ("NORMAL2-IM-0001-0001-0002.jpeg", "NORMAL2-IM-0001"),
        ("scan.png", None),
    ],
)
def test_a_file_name_contains_the_patient(name, patient):
    assert patient_from_name(name) == patient


@pytest.mark.parametrize("name", ["person86_virus_1.jpeg", "person86_bacteria_2.jpeg"])
def test_without_the_etiology_one_number_is_one_patient(name):
    assert patient_from_name(name, with_etiology=False) == "person86"


SCHEMES = {
    "NIH": lambda label, p, i: f"{p + 100 * label:08d}_{i:03d}.png",
    "CheXpert": lambda label, p, i: f"patient{p + 100 * label:05d}_study1_view{i}.jpg",
    "BIDS": lambda label, p, i: f"sub-S{p + 100 * label}_ses-E{i}_cr.png",
    "the other release": lambda label, p, i: (
        f"{('NORMAL', ('BACTERIA', 'VIRUS')[i % 2])[label]}-{p + 100 * label}-{i:04d}.jpeg"
    ),
    "metadata.csv": lambda label, p, i: f"{random.Random(f'{label}{p}{i}').randrange(10**9)}.png",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_four_images_of_a_patient_stay_in_one_split(scheme, tmp_path):
    patients = {}
    for label, name in enumerate(CLASSES):
        for i in range(40):
            file = SCHEMES[scheme](label, i // 4, i % 4)
            put(tmp_path / "train" / name / file, f"{label} {i}".encode())
            patients[file] = f"P{label}{i // 4}"
    if scheme == "metadata.csv":
        rows = [f"{file},{patient}" for file, patient in patients.items()]
        with_table(tmp_path, "\n".join(["file_name,patient_id", *rows]))
    assert run_split(tmp_path, "--per-class", 10) == 0
    in_train, in_val = (
        {patients[path.name] for path in tmp_path.glob(f"{split}/*/*")}
        for split in ("train", "val")
    )
    assert len(in_val) == 4 and not in_train & in_val


# ---------------------------------------------------------------- one file in two folders


def test_copies_in_both_classes_are_counted_and_the_label_is_in_question(tree, capsys):
    for i, path in enumerate(sorted(tree.glob("train/NORMAL/*"))[:10]):
        put(tree / "train/PNEUMONIA" / f"other_{i}.jpeg", path.read_bytes())
    line = split_refused(tree, capsys, "--per-class", 4)
    assert "images in both classes: 10 (train/PNEUMONIA/other_0.jpeg is the same file as" in line
    assert line.count("is the same file as") == 5 and "which label is right" in line
    assert "two splits" not in line and "--check --json check.json (make check" in line


def test_copies_in_two_splits_are_counted(tree, capsys):
    for i, path in enumerate(sorted(tree.glob("train/NORMAL/*"))[:3]):
        put(tree / "test/NORMAL" / f"other_{i}.jpeg", path.read_bytes())
    line = split_refused(tree, capsys, "--per-class", 4)
    assert "images in two splits: 3 (test/NORMAL/other_0.jpeg is the same file as" in line
    assert "Remove one file of each pair" in line and "label" not in line


# ---------------------------------------------------------------- metadata.csv


def test_what_the_table_lacks_is_a_warning_and_is_counted(data, capsys):
    split_val.main(with_table(data, "file_name,sex\nIM-0000-0001.jpeg,F\n"))
    error = capsys.readouterr().err
    assert "no column patient_id" in error and "add this column\n" in error
    images = sorted(path.name for path in data.glob("t*/NORMAL/*"))
    rows = [f"{name},P{(i + 1) // 2}" for i, name in enumerate(images)]
    text = "\n".join(["file_name,patient_id", *rows[:-1], f"{images[-1]},", "gone.png,P1"])
    split_val.main(with_table(data, text))
    screen = capsys.readouterr()
    absent = f"1 of {len(rows) + 1} rows have no image, for example gone.png. Correct these names"
    assert absent in screen.err and "fill in patient_id\n" in screen.err
    assert "no patient_id for 57 of 88 images, for example " in screen.err
    assert "patient P10 is in train and test" in screen.out


@pytest.fixture
def two_scans(data):
    """A data folder with an image scan.jpeg in both classes of train/."""
    for name in CLASSES:
        source = sorted((data / "train" / name).iterdir())[1]
        source.rename(source.with_name("scan.jpeg"))
    return data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scan,patient_id\n", "row 1, column file_name: expected a column of this name"),
        ("file_name\nIM-0000-0001.jpeg\nIM-0000-0001.jpeg\n", "row 3: IM-0000-0001.jpeg"),
        ("file_name,patient_id\nscan.jpeg,7\n", "row 2: scan.jpeg fits train/NORMAL/scan.jpeg and"),
        ("file_name,File Name\n", "'file_name' and 'File Name' may both be the file_name"),
        ("", "an empty file"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(text, expected, two_scans, capsys):
    assert (two_scans / "train/NORMAL/IM-0000-0001.jpeg").exists()
    assert split_val.main(with_table(two_scans, text)) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_path_in_the_table_is_still_valid_after_the_image_was_moved(split, two_scans):
    rows = [f"train/{name}/scan.jpeg,{name}7" for name in CLASSES]
    with_table(two_scans, "\n".join(["file_name,patient_id", *rows]))
    (two_scans / "train/NORMAL/scan.jpeg").rename(two_scans / split / "NORMAL/scan.jpeg")
    xrays = read_split(two_scans, *SPLITS, classes=CLASSES)
    patients = {(x.split, x.label): x.patient for x in xrays if x.path.name == "scan.jpeg"}
    assert patients == {(split, 0): "NORMAL7", ("train", 1): "PNEUMONIA7"}


def test_spaces_in_a_table_do_not_separate_a_patient(data):
    first, second = sorted(path.name for path in data.glob("train/NORMAL/*"))[:2]
    with_table(data, f"file_name, patient_id\n{first},P3\n{second},P3 \n")
    patients = {xray.path.name: xray.patient for xray in read_split(data, "train", classes=CLASSES)}
    assert patients[first] == patients[second] == "P3"


SPELLINGS = {  # of the id of patient number i
    "a spreadsheet's numbers": lambda i: (f"{i}", f"{i}.0", f"{i},00", f" {i} "),
    "words": lambda i: (f"Müller {i}", f"müller {i}", f"MÜLLER {i} ", f"Mu\u0308ller {i}"),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_all_spellings_of_an_id_are_one_patient(spell, tmp_path):
    rows = ["file_name;patient_id"]
    patients = {}
    for i in range(12):
        for image, spelling in enumerate(spell(i)):
            file = f"{i}-{image}.png"
            put(tmp_path / "train" / CLASSES[i % 2] / file, file.encode())
            rows.append(f"{file};{spelling}")
            patients[file] = i
    with_table(tmp_path, "\n".join(rows))
    assert run_split(tmp_path, "--per-class", 8) == 0
    in_train, in_val = (
        {patients[path.name] for path in tmp_path.glob(f"{split}/*/*")}
        for split in ("train", "val")
    )
    assert len(in_val) == 4 and not in_train & in_val
    xrays = read_split(tmp_path, "train", "val", classes=CLASSES)
    shown = {xray.patient for xray in xrays}
    # Of several spellings, the first one in alphabetical order is shown.
    assert shown == {sorted(spelling.strip() for spelling in spell(i))[0] for i in range(12)}


def test_ids_that_are_not_whole_numbers_stay_apart(tree):
    names = sorted(path.name for path in tree.glob("train/NORMAL/*"))
    ids = ["3.1", "3.10", "03", "3", "v3.0", "v3"]
    rows = [f"{name},{patient}" for name, patient in zip(names, ids, strict=False)]
    with_table(tree, "\n".join(["file_name,patient_id", *rows]))
    patients = [xray.patient for xray in read_split(tree, "train", classes=CLASSES)]
    assert patients[: len(ids)] == ids


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "NA", "N/A", "none", "None", "NULL", "unknown", "-", "?", "#N/A", "<NA>"]
)
def test_a_word_for_an_unknown_patient_counts_as_an_empty_cell(word, tree, capsys):
    for number, path in enumerate(sorted(tree.glob("*/NORMAL/*"))):
        path.rename(path.with_name(f"scan_{number}.jpeg"))  # a name without a patient
    names = sorted(path.name for path in tree.glob("train/NORMAL/*"))
    rows = [f"{name},P{i // 2}" for i, name in enumerate(names)]
    rows[3:8] = [f"{name},{word}" for name in names[3:6]] + [f"{name}," for name in names[6:8]]
    with_table(tree, "\n".join(["file_name,patient_id", *rows]))
    xrays = read_split(tree, "train", classes=CLASSES)
    assert [xray.patient for xray in xrays[3:8]] == [None] * 5
    assert len({xray.group for xray in xrays[3:8]}) == 5
    expected = "no patient_id for 25 of 32 images (3 of them say nan, NA or a word like these)"
    assert expected in capsys.readouterr().err


def test_a_table_inside_train_is_refused(data, run_train, capsys):
    with_table(data / "train", "file_name,patient_id\n")
    assert run_train(data=data) == 2
    assert f"expected it one level up, in {data}" in capsys.readouterr().err


# ---------------------------------------------------------------- DICOM


@pytest.mark.parametrize("table", [True, False])
def test_dicom_on_a_read_only_mount_gives_a_report_and_no_patient_is_in_two_splits(
    table, tmp_path, flags, quick, capsys
):
    mount, data = tmp_path / "mount", tmp_path / "data"
    patients = draw_dicoms(mount, 12, table)
    for folder in (mount, *mount.rglob("*/")):
        folder.chmod(0o555)
    try:
        before = {path: path.stat().st_mtime_ns for path in mount.rglob("*")}
        for _ in range(2):  # the second run links and moves nothing
            assert run_split(data, "--link-from", mount) == 0
        assert train.main(flags(data, *TINY)) == evaluate.main(flags(data)) == 0
        assert {path: path.stat().st_mtime_ns for path in mount.rglob("*")} == before
    finally:
        for folder in (mount, *mount.rglob("*/")):
            folder.chmod(0o755)
    in_split = {split: set() for split in SPLITS}
    for path in data.glob("*/*/*.dcm"):
        assert path.is_symlink() and path.resolve().parent.parent.parent == mount
        in_split[path.parts[-3]].add(patients[path.name])
    assert len(in_split["val"]) == 8 and not in_split["train"] & in_split["val"]
    report = read_json(tmp_path / "results" / "metrics.json")
    assert (report["n"], report["patients"], report["names_without_patient"]) == (24, 12, 0)
    text = (tmp_path / "results" / "predictions.csv").read_text() + capsys.readouterr().out
    assert "PACS" not in text  # PatientID stays private
    groups = {subgroup["group"] for subgroup in report["subgroups"].values()}
    assert groups == ({"sex F", "sex M"} if table else set())


def test_the_table_comes_before_dicom_and_dicom_before_the_file_name(tmp_path):
    for number, name in enumerate(CLASSES):
        path = tmp_path / "train" / name / f"IM-000{number}-0001.dcm"
        path.parent.mkdir(parents=True)
        write_dicom(path, LEVELS[: 200 + number], PatientID=f"PACS-{number}")
    for xray in read_split(tmp_path, "train", classes=CLASSES):
        assert xray.patient == xray.group and xray.patient.startswith("ID-")
    with_table(tmp_path, "file_name,patient_id\nIM-0000-0001.dcm,P7\n")
    first, second = read_split(tmp_path, "train", classes=CLASSES)
    assert first.patient == first.group == "P7" and second.patient.startswith("ID-")
