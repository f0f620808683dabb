"""cxr/tables.py: columns, patients and file names as other programs and people write them."""

import random
import unicodedata

import pytest
from faults import damage, put
from helpers import run_split, split_refused
from random_tables import draw_table, write_data

from cxr.folders import CLASSES
from cxr.patients import read_split

NFC, NFD = (unicodedata.normalize(form, "Röntgen") for form in ("NFC", "NFD"))


def make_data(root, *paths, table):
    """Writes files, which are not images, and a metadata.csv of these lines."""
    for path in paths:
        put(root / path, path.encode())
    (root / "metadata.csv").write_text("\n".join(table))
    return root


def patients_in(root):
    """Returns {path below the data folder: patient} of the images in train/."""
    xrays = read_split(root, "train", classes=CLASSES)
    return {xray.path.relative_to(root).as_posix(): xray.patient for xray in xrays}


# ---------------------------------------------------------------- columns

HEADERS = {  # (column of the file names, header, row)
    "NIH": ("Image Index", "Image Index,Finding,Patient ID", "{name},None,{patient}"),
    "CheXpert": ("Path", "Path,Sex,Age", "{name},Male,60"),
    "MIMIC": ("dicom_id", "dicom_id,subject_id,study_id", "{name},{patient},50414267"),
    "RSNA": ("patientId", "patientId,x,y,width,height,Target", "{name},,,,,0"),
    "Kaggle": ("filename", "filename,patientid", "{name},{patient}"),
    "capitals and spaces": ("IMAGE_ID", " IMAGE_ID ;PatientID", "{name};{patient}"),
    "an index of pandas": ("file", ",file,PATIENT ID", "0,{name},{patient}"),
}


@pytest.mark.parametrize(("column", "header", "row"), HEADERS.values(), ids=HEADERS)
def test_the_headers_of_public_data_sets_are_known_and_printed(
    column, header, row, tmp_path, capsys
):
    paths = [f"train/{name}/{name[0]}{i}.png" for name in CLASSES for i in range(3)]
    names = [path[-6:-4] for path in paths]
    rows = [row.format(name=name, patient=f"P-{name}") for name in names]
    make_data(tmp_path, *paths, table=[header, *rows])
    patients = list(patients_in(tmp_path).values())
    assert f"the column {column!r} is the file_name" in capsys.readouterr().out
    if "{patient}" in row:
        assert patients == [f"P-{name}" for name in names]
    else:  # in RSNA's table one column is both, and CheXpert's table has no patients
        assert patients == (names if column == "patientId" else [None] * 6)


def test_the_usual_headers_are_not_printed(tmp_path, capsys):
    make_data(
        tmp_path,
        *(f"train/{name}/1.png" for name in CLASSES),
        table=["file_name,patient_id", *(f"{name}/1.png,{name}" for name in CLASSES)],
    )
    patients_in(tmp_path)
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- names

FORMS = {  # (name of the file, name in the table)
    "as it is": ("scan_1.png", "scan_1.png"),
    "without its suffix": ("scan_1.png", "scan_1"),
    "a DICOM UID without its suffix": ("1.2.840.7.dcm", "1.2.840.7"),
    "converted to another format": ("scan_1.png", "scan_1.dcm"),
    "in another case": ("Scan_1.PNG", "SCAN_1.png"),
    "the form of a Mac on the disk": (f"{NFD}.png", f"{NFC}.png"),
    "the form of a Mac in the table": (f"{NFC}.png", f"{NFD}.png"),
    "a Windows path": ("scan_1.png", "train\\NORMAL\\scan_1.png"),
    "a path with a drive": ("scan_1.png", "D:\\study\\train\\NORMAL\\scan_1.png"),
    "a path of another machine": ("scan_1.png", "/mnt/export/0017/scan_1.png"),
    "a path with a dot": ("scan_1.png", "./train/NORMAL/scan_1.png"),
    "a path below train/": ("scan_1.png", "NORMAL/scan_1.png"),
    "the folders in the name": ("patient1_study1_view1.jpg", "CheXpert/patient1/study1/view1.jpg"),
    "all of these": (f"{NFD}.PNG", f"data\\TRAIN\\normal\\{NFC.upper()}"),
    "a backslash in the name": ("scan\\1.png", "scan\\1.png"),
}


@pytest.mark.parametrize(("file", "name"), FORMS.values(), ids=FORMS)
def test_a_row_finds_its_image_if_exactly_one_fits(file, name, tmp_path, capsys):
    image, other = f"train/NORMAL/{file}", "train/PNEUMONIA/scan_2.png"
    make_data(tmp_path, image, other, table=["file_name,patient_id", f"{name},P1", "scan_2.png,P2"])
    assert patients_in(tmp_path) == {image: "P1", other: "P2"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["scan_1", "SCAN_1", "other/scan_1"])
def test_a_row_that_fits_two_images_is_refused(name, tmp_path, capsys):
    images = ["train/NORMAL/scan_1.png", "train/NORMAL/scan_1.jpeg", "train/PNEUMONIA/2.png"]
    make_data(tmp_path, *images, table=["file_name,patient_id", f"{name},P1"])
    line = split_refused(tmp_path, capsys)
    assert f"row 2: {name} fits train/NORMAL/scan_1.jpeg and train/NORMAL/scan_1.png; write" in line


def test_a_path_to_the_other_class_does_not_fit(tmp_path, capsys):
    images = ["train/NORMAL/1.png", "train/PNEUMONIA/2.png"]
    table = ["file_name,patient_id", "train/NORMAL/1.png,P1", "train/NORMAL/2.png,P2"]
    make_data(tmp_path, *images, table=table)
    assert patients_in(tmp_path) == {"train/NORMAL/1.png": "P1", "train/PNEUMONIA/2.png": None}
    assert "1 of 2 rows have no image, for example train/NORMAL/2.png" in capsys.readouterr().err


def test_a_row_without_a_name_is_counted(tmp_path, capsys):
    images = ["train/NORMAL/1.png", "train/PNEUMONIA/2.png"]
    table = ["file_name,patient_id", "1.png,P1", ",P2", "2.png,P2"]
    make_data(tmp_path, *images, table=table)
    assert list(patients_in(tmp_path).values()) == ["P1", "P2"]
    assert "1 of 3 rows have no image, for example row 3" in capsys.readouterr().err


def test_of_two_rows_for_one_image_the_whole_path_counts(tmp_path, capsys):
    images = ["train/NORMAL/2.png", "train/PNEUMONIA/3.png", "test/NORMAL/1.png"]
    table = ["file_name,patient_id", "train/NORMAL/1.png,P1", "test/NORMAL/1.png,P2"]
    make_data(tmp_path, *images, "test/PNEUMONIA/1.png", table=table)
    xrays = read_split(tmp_path, "test", classes=CLASSES)
    assert [xray.patient for xray in xrays] == ["P2", None]
    assert "1 of 2 rows have no image, for example train/NORMAL/1.png" in capsys.readouterr().err


def test_two_rows_that_fit_one_image_equally_well_are_refused(tmp_path, capsys):
    images = ["train/NORMAL/1.png", "train/PNEUMONIA/2.png"]
    table = ["file_name,patient_id", "a/1.png,P1", "b/1.png,P2"]
    line = split_refused(make_data(tmp_path, *images, table=table), capsys)
    assert "row 3: b/1.png is the image of row 2 as well; keep one row" in line


def test_if_no_row_has_an_image_the_error_shows_a_name_of_each(tmp_path, capsys):
    images = ["train/NORMAL/scan_1.png", "train/PNEUMONIA/scan_2.png"]
    table = ["file_name,patient_id", "17.png,P1", "18.png,P2"]
    line = split_refused(make_data(tmp_path, *images, table=table), capsys)
    assert "no row has an image. Row 2 has the name '17.png', an image has the name " in line
    assert "'train/NORMAL/scan_1.png'" in line


def test_a_name_as_predictions_csv_shows_it_fits(tmp_path):
    image, other = "train/NORMAL/R\udcf6ntgen.png", "train/PNEUMONIA/2.png"  # not UTF-8
    table = ["file_name,patient_id", f"{image.encode(errors='backslashreplace').decode()},P1"]
    make_data(tmp_path, other, table=table)
    (tmp_path / "train/NORMAL").mkdir()
    (tmp_path / image).write_bytes(b"1")
    assert patients_in(tmp_path) == {image: "P1", other: None}


# ---------------------------------------------------------------- random tables


def test_random_tables_are_read_right_or_refused_with_the_reason(tmp_path, fuzz, say, capsys):
    seeds = [fuzz.rng.randrange(10**9) for _ in range(fuzz.count(20, 200))]
    n_refused = 0
    for seed in seeds:
        root, table = tmp_path / str(seed), draw_table(random.Random(seed))
        write_data(root, table)
        capsys.readouterr()
        print(f"seed {seed}")  # pytest shows it if an error ends the test
        status = run_split(root, "--per-class", 6)
        err = capsys.readouterr().err
        if table.refused:
            n_refused += 1
            assert status == 2 and table.refused in err, (seed, err)
            continue
        assert status == 0, (seed, err)
        check_warnings(table, err, seed)
        check_patients(root, table, seed)
    say(f"tables: {len(seeds)} tried, {n_refused} refused, the others read right")


def check_warnings(table, err, seed):
    """Checks that the numbers of rows without image and of images without patient are shown."""
    n_unknown = sum(patient is None for patient in table.patients.values())
    expected = {f"{table.n_absent} of {table.n_rows} rows have no image": table.n_absent > 0}
    expected["no column patient_id"] = not table.has_patients
    if table.has_patients:
        expected[f"no patient_id for {n_unknown} of 60 images"] = n_unknown > 0
        expected[f"({table.n_words} of them say nan"] = table.n_words > 0
    for text, is_expected in expected.items():
        assert (text in err) == is_expected, (seed, text, err)


def check_patients(root, table, seed):
    """Checks that the patients are the true ones, and that each is in one split only."""
    xrays = read_split(root, "train", "val", "test", classes=CLASSES)
    pairs, splits = set(), {}
    for xray in xrays:
        path = xray.path.relative_to(root).as_posix().replace("val/", "train/")
        number = table.patients[path]
        assert (number is None) == (xray.patient is None), (seed, path)
        if number is not None:
            pairs.add((number, xray.patient))
            splits.setdefault(number, set()).add(xray.split)
    assert len(xrays) == 60 and {xray.split for xray in xrays} == {"train", "val", "test"}, seed
    # Each true patient has one name, and each name has one true patient.
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), (seed, pairs)
    assert all(len(found) == 1 for found in splits.values()), (seed, splits)


def test_a_damaged_table_is_read_or_refused_in_one_line(tmp_path, fuzz, say, capsys):
    tables = (draw_table(fuzz.rng) for _ in range(50))
    intact = next(table for table in tables if not table.refused)
    write_data(tmp_path, intact)
    n_refused, n_cases = 0, fuzz.count(20, 300)
    for _ in range(n_cases):
        how, content = damage(fuzz.rng, intact.content)
        (tmp_path / "metadata.csv").write_bytes(content)
        status = run_split(tmp_path, "--per-class", 6)
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if not line.startswith("warning: ")]
        assert (status, len(lines)) in ((0, 0), (2, 1)), (how, lines)
        assert not lines or str(tmp_path / "metadata.csv") in lines[0], (how, lines)
        n_refused += status == 2
        if status == 0:
            assert run_split(tmp_path, "--undo") == 0
    say(f"metadata.csv: {n_cases} damaged ones tried, {n_refused} refused")
