"""cxr/films.py: the check and predict report lateral images, captures and images in colour."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import LEVELS, run_split, with_table, write_dicom
from matplotlib import colormaps
from phantoms import draw_folder
from PIL import Image, ImageDraw

from cxr.decode import decode
from cxr.files import read_json
from cxr.films import TAGS, is_lateral
from cxr.folders import CLASSES
from cxr.patients import Xray, read_tags

KEYS = "lateral", "captures", "coloured"


@pytest.fixture(scope="module")
def films_source(tmp_path_factory):
    """24 frontal images of each class in train/, 6 in test/; RGB with equal channels in both."""
    root = tmp_path_factory.mktemp("films")
    draw_folder(root, train=24, test=6)
    for path in sorted(root.glob("*/*/*"))[::4]:
        Image.open(path).convert("RGB").save(path, quality=75)
    return root


@pytest.fixture
def films(films_source, tmp_path):
    return Path(shutil.copytree(films_source, tmp_path / "films"))


@pytest.fixture
def check(tmp_path):
    """check(folder) runs the check. Returns ({key: files}, those warnings that name an image)."""

    def call(folder):
        assert run_split(folder, "--check", "--json", tmp_path / "check.json") in (0, 2)
        report = read_json(tmp_path / "check.json")
        words = ("lateral images", "captures", "images in colour")
        warnings = [text for text in report["warnings"] if text.startswith(words)]
        return {key: report[key] for key in KEYS}, warnings

    return call


def first_images(folder, split, name, count):
    return sorted((folder / split / name).iterdir())[:count]


def written_below(folder, paths):
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def test_frontal_grey_images_cause_no_message(films, check):
    assert check(films) == ({key: [] for key in KEYS}, [])


# name: (file name, columns of metadata.csv, ViewPosition of DICOM or None, whether it is lateral)
VIEWS = {
    "CheXpert, lateral": ("patient00001_study1_view2_lateral.jpg", {}, None, True),
    "CheXpert, frontal": ("patient00001_study1_view1_frontal.jpg", {}, None, False),
    "BIMCV": ("sub-S03044_ses-E06217_run-1_bp-chest_vp-ll_cr.png", {}, None, True),
    "short": ("0017-LAT.png", {}, None, True),
    "bilateral": ("bilateral_pneumonia_3.png", {}, None, False),
    "relation": ("platelet_latency.png", {}, None, False),
    "decubitus": ("17_left_lateral_decubitus.png", {}, None, False),
    "column view": ("1.png", {"view": "Lateral"}, None, True),
    "column ViewPosition": ("1.png", {"ViewPosition": "LL"}, None, True),
    "column View Position, PA": ("1.png", {"View Position": "PA"}, None, False),
    "column Frontal/Lateral": ("1.png", {"Frontal/Lateral": "Frontal"}, None, False),
    "PadChest": ("1.png", {"Projection": "L"}, None, True),
    "another column": ("1.png", {"side": "lateral"}, None, False),
    "DICOM, LL": ("1.dcm", {}, "LL", True),
    "DICOM, RL": ("1.dcm", {}, "RL", True),
    "DICOM, LATERAL": ("1.dcm", {}, "LATERAL", True),
    "DICOM, LLD": ("1.dcm", {}, "LLD", False),
    "DICOM, AP": ("1_lateral.dcm", {}, "AP", False),
    "DICOM without view": ("1_lateral.dcm", {}, "", True),
    "the column before DICOM": ("1.dcm", {"view": "PA"}, "LL", False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_view_comes_from_metadata_csv_then_from_dicom_then_from_the_name(name, tmp_path):
    file, columns, view, expected = VIEWS[name]
    if view is not None:
        write_dicom(tmp_path / file, LEVELS, ViewPosition=view)
    xray = Xray(tmp_path / file, 0, "", metadata=columns)
    assert is_lateral(xray, read_tags(xray.path, *TAGS)) == expected


def test_the_check_counts_lateral_images_by_class(films, check):
    lateral = []
    for path in first_images(films, "train", "PNEUMONIA", 7):
        lateral.append(path.rename(path.with_stem(f"{path.stem}_view2_lateral")))
    a = write_dicom(films / "test/NORMAL/a.dcm", LEVELS, ViewPosition="LL")
    b = first_images(films, "test", "PNEUMONIA", 1)[0]
    with_table(films, f"file_name,patient_id,view\n{b.name},P1,LATERAL\n")
    found, (warning,) = check(films)
    assert sorted(found["lateral"]) == written_below(films, [*lateral, a, b])
    assert "lateral images: NORMAL 1 of 31, PNEUMONIA 8 of 30" in warning
    assert found["lateral"][0] in warning and "Remove" in warning


def test_the_check_counts_captures_by_class(films, check):
    modalities, files = ("OT", "SC", "DX", "CR"), []
    for number, modality in enumerate(modalities):
        files.append(films / "train" / "NORMAL" / f"{number}.dcm")
        write_dicom(files[-1], LEVELS[: 200 + number], Modality=modality)
    burnt_in = films / "test" / "PNEUMONIA" / "4.dcm"
    write_dicom(burnt_in, LEVELS[:190], BurnedInAnnotation="YES")
    found, (warning,) = check(films)
    assert sorted(found["captures"]) == written_below(films, [*files[:2], burnt_in])
    assert "NORMAL 2 of 34, PNEUMONIA 1 of 31" in warning and "text" in warning


def save_in_false_colours(path):
    levels = np.asarray(Image.open(path).convert("L"))
    colours = (colormaps["jet"](levels)[..., :3] * 255).astype(np.uint8)
    Image.fromarray(colours).save(path, quality=90)


def test_the_check_counts_images_in_colour_by_class(films, check):
    coloured = []
    for name in CLASSES:
        for path in first_images(films, "train", name, 8):
            save_in_false_colours(path)
            coloured.append(path)
    found, (warning,) = check(films)
    assert sorted(found["coloured"]) == written_below(films, coloured)
    assert "NORMAL 8 of 30, PNEUMONIA 8 of 30" in warning


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB", "RGBA", "CMYK", "P", "YCbCr"])
def test_a_grey_picture_has_no_colours_in_any_mode(mode, phantom, tmp_path):
    if mode == "I;16":
        phantom = Image.fromarray(np.asarray(phantom).astype(np.uint16) * 16)
    elif mode == "CMYK":
        black = Image.new("L", phantom.size)
        inverted = phantom.point(lambda level: 255 - level)
        phantom = Image.merge("CMYK", (black, black, black, inverted))
    else:
        phantom = phantom.convert(mode)
    suffix = {"CMYK": "tiff", "YCbCr": "jpeg"}.get(mode, "png")
    phantom.save(tmp_path / f"a.{suffix}")
    assert not decode(tmp_path / f"a.{suffix}", 224).has_colours


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_a_small_mark_in_colour_is_detected(suffix, phantom, tmp_path):
    marked = phantom.convert("RGB")
    ImageDraw.Draw(marked).rectangle((20, 20, 40, 40), fill=(255, 0, 0))
    marked.save(tmp_path / f"a.{suffix}")
    assert decode(tmp_path / f"a.{suffix}", 224).has_colours


def test_predict_reports_the_lateral_images_among_new_ones(run_evaluate, phantom, tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    for name in ("1.png", "2_frontal.png", "3_lateral.png"):
        phantom.save(folder / name)
    write_dicom(folder / "4.dcm", LEVELS, ViewPosition="LATERAL")
    assert run_evaluate(folder) == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "lateral images" in text]
    assert "lateral images: 2 of 4" in line
    assert "3_lateral.png" in line and "4.dcm" in line and "2_frontal" not in line
    (folder / "4.dcm").unlink()
    (folder / "3_lateral.png").unlink()
    assert run_evaluate(folder) == 0
    assert "lateral" not in capsys.readouterr().err


def test_no_name_date_or_id_of_a_dicom_file_is_written(films, check, run_evaluate, capsys):
    secrets = {"PatientName": "Meier^Hans", "PatientID": "P-4711", "PatientBirthDate": "19520417"}
    secrets |= {"AccessionNumber": "AC-99-17", "StudyDate": "20240229", "StationName": "Station-7"}
    tags = secrets | {"Modality": "OT", "ViewPosition": "LL", "BurnedInAnnotation": "YES"}
    path = write_dicom(films / "train" / "NORMAL" / "1.dcm", LEVELS, **tags)
    bad = write_dicom(films / "train" / "NORMAL" / "2.dcm", LEVELS, **tags | {"Modality": "CT"})
    check(films)
    assert run_evaluate(path) == 0
    assert run_evaluate(bad) == 2
    written = "".join(capsys.readouterr())
    assert "1.dcm" in written and "modality CT" in written
    for file in films.parent.rglob("*"):
        if file.suffix in (".json", ".csv", ".html"):
            written += file.read_text()
    assert not [value for value in secrets.values() if value in written]
