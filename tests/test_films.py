"""cxr/films.py: lateral images, captures and images in colour are reported."""

import numpy as np
import pytest
from helpers import LEVELS, write_dicom
from PIL import Image, ImageDraw

from cxr.decode import decode
from cxr.films import TAGS, is_lateral
from cxr.patients import Xray, read_tags

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
