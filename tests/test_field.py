"""Other people's data, checkpoints and machines: DICOM, odd images, tables of patients."""

import csv
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
import torchvision
from faults import put
from phantoms import draw_phantom
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
)
from torch import nn

import common
import cxr.decode
import cxr.errors
import cxr.files
import cxr.folders
import cxr.patients
import cxr.predictions
import evaluate
import split_val
import train
from cxr.folders import CLASSES

ROOT = Path(__file__).resolve().parent.parent
LEVELS = np.tile(np.arange(256, dtype=np.uint16) * 16, (256, 1))  # a ramp of 12 bits


def write_dicom(path, pixels, syntax=ExplicitVRLittleEndian, encoded=None, **tags):
    """A radiograph in DICOM; pixels: uint8, uint16 or int16 (H, W); tags: what differs."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    file = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    bits = 8 * pixels.dtype.itemsize
    standard = dict(
        Modality="DX",
        PatientID="",
        PhotometricInterpretation="MONOCHROME2",
        SamplesPerPixel=1,
        Rows=pixels.shape[-2],
        Columns=pixels.shape[-1],
        BitsAllocated=bits,
        BitsStored=8 if bits == 8 else 12,
        HighBit=7 if bits == 8 else 11,
        PixelRepresentation=int(pixels.dtype.kind == "i"),
    )
    for name, value in (standard | tags).items():
        setattr(file, name, value)
    if "NumberOfFrames" in tags or encoded is not None or pixels.size:
        file.PixelData = pixels.tobytes() if encoded is None else encoded
    file.save_as(path, enforce_file_format=True)
    return path


def grey(image):
    return np.asarray(image).astype(int)


@pytest.fixture
def phantom():
    return draw_phantom(np.random.default_rng(3), True, 300)


TINY = "--arch", "tinynet", "--weights", "random", "--views", "2"


# ---------------------------------------------------------------- DICOM


@pytest.mark.parametrize("window", [0, 2])
def test_dicom_gives_the_picture_of_the_same_pixels_as_png(phantom, tmp_path, window):
    eight = np.asarray(phantom)
    twelve = eight.astype(np.uint16) * 16
    Image.fromarray(eight).save(tmp_path / "8.png")
    Image.fromarray(twelve).save(tmp_path / "12.png")
    jpeg = tmp_path / "a.jpeg"
    phantom.save(jpeg, quality=75)
    turned = {"PhotometricInterpretation": "MONOCHROME1"}
    signed = (twelve.astype(np.int16) - 2000, {"RescaleSlope": 1, "RescaleIntercept": 2000})
    whole = {"WindowCenter": 2048, "WindowWidth": 4096}
    encoded = {"syntax": JPEGBaseline8Bit, "encoded": encapsulate([jpeg.read_bytes()])}
    for name, pixels, tags, like in (
        ("8 bits", eight, {}, "8.png"),
        ("8 bits, rescaled", eight, {"RescaleSlope": 1, "RescaleIntercept": 0}, "8.png"),
        ("8 bits, MONOCHROME1", 255 - eight, turned, "8.png"),
        ("12 bits", twelve, {}, "12.png"),
        ("12 bits, MONOCHROME1", 4095 - twelve, turned, "12.png"),
        ("12 bits, in the window of all", twelve, whole, "12.png"),
        ("12 bits, in a window that makes no sense", twelve, whole | {"WindowWidth": 0}, "12.png"),
        ("16 bits", twelve, {"BitsStored": 16, "HighBit": 15}, "12.png"),
        ("signed", *signed, "12.png"),
        ("JPEG", eight, encoded, "a.jpeg"),
    ):
        write_dicom(tmp_path / "a.dcm", pixels, **tags)
        found = grey(common.load_image(tmp_path / "a.dcm", window))
        expected = grey(common.load_image(tmp_path / like, window))
        assert np.abs(found - expected).max() <= (1 if "12" in like else 0), name
    shutil.copy(write_dicom(tmp_path / "a.dcm", eight), tmp_path / "b.png")
    assert (
        grey(common.load_image(tmp_path / "b.png", 0)) == grey(phantom.resize((224, 224), 2))
    ).all()


def test_the_voi_window_and_the_padding_of_dicom_are_kept(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", LEVELS, WindowCenter=1024, WindowWidth=512)
    found = grey(common.load_image(path, 0))
    black, white = 760 * 224 // 4096, 1300 * 224 // 4096
    assert (found[:, :black] == 0).all() and (found[:, white:] >= 254).all()
    padded = LEVELS.copy()
    padded[:40] = 4095
    path = write_dicom(tmp_path / "b.dcm", padded, PixelPaddingValue=4095)
    assert (grey(common.load_image(path, 2))[:30] == 0).all()


REFUSED = {
    "modality CT": {"Modality": "CT"},
    "3 pictures in one file": {"NumberOfFrames": 3},
    "in RGB": {"PhotometricInterpretation": "RGB"},
    "pip install pylibjpeg": {"syntax": JPEGLosslessSV1, "encoded": encapsulate([b"\xff\xd8"])},
    "without a picture": {"pixels": np.zeros((0, 0), np.uint8)},
    "no radiograph's shape": {"Rows": 5000, "Columns": 2},
    "pixels, more than": {"Rows": 60000, "Columns": 60000},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_dicom_that_is_no_single_radiograph_is_refused_with_the_reason(reason, tmp_path):
    tags = {"pixels": LEVELS} | REFUSED[reason]
    if "NumberOfFrames" in tags:
        tags["pixels"] = np.stack([LEVELS] * 3)
    path = write_dicom(tmp_path / "a.dcm", **tags)
    item = common.Views([cxr.patients.Xray(path, 0, cxr.files.hash_file(path))], 1, 2)[0]
    assert reason in item[2]


def draw_dicoms(root, patients, table=False):
    """train/ and test/ of so many patients a class, two films each, their names telling nothing."""
    rng, rows = np.random.default_rng(0), []
    for split, start, count in (("train", 0, patients), ("test", 500, patients // 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for film in range(2 * count):
                patient = f"{name[0]}{start + film // 2}"
                pixels = np.asarray(draw_phantom(rng, bool(label), 100)).astype(np.uint16) * 16
                path = root / split / name / f"{label}{start + film:06d}.dcm"
                write_dicom(path, pixels, PatientID="" if table else f"PACS-{patient}")
                rows.append((path.name, patient, "FM"[film // 2 % 2], start + film))
    if table:
        with open(root / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "patient_id", "sex", "number"), *rows])
    return {row[0]: row[1] for row in rows}


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
    sides = {split: set() for split in cxr.folders.SPLITS}
    for path in data.glob("*/*/*.dcm"):
        assert path.is_symlink() and path.resolve().parent.parent.parent == mount
        sides[path.parts[-3]].add(patients[path.name])
    assert len(sides["val"]) == 8 and not sides["train"] & sides["val"]
    report = cxr.files.read_json(tmp_path / "results" / "metrics.json")
    assert (report["n"], report["patients"], report["names_without_patient"]) == (24, 12, 0)
    text = (tmp_path / "results" / "predictions.csv").read_text() + capsys.readouterr().out
    assert "PACS" not in text  # no PatientID in what is sent around
    groups = {each["group"] for each in report["subgroups"].values()}
    assert groups == ({"sex F", "sex M"} if table else set())


def test_a_folder_that_cannot_be_written_names_the_way_of_links(tmp_path, capsys, monkeypatch):
    draw_dicoms(tmp_path / "data", 4)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert split_val.main(["--data-dir", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert f"--link-from {tmp_path / 'data'}" in error and "LINK_FROM=" in error


# ---------------------------------------------------------------- odd images


def patched_tiff(path, photometric, big=False):
    """LEVELS as a 16-bit TIFF whose tag 262 says `photometric`; big: big-endian, by hand."""
    if not big:
        Image.fromarray(LEVELS).save(path)
        tag = struct.Struct("<HHIHH")
        content, new = path.read_bytes(), tag.pack(262, 3, 1, photometric, 0)
        path.write_bytes(content.replace(tag.pack(262, 3, 1, 1, 0), new))
        return path
    tags = {256: 256, 257: 256, 258: 16, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 256}
    tags[279] = LEVELS.size * 2
    start = 8 + LEVELS.size * 2
    entries = [struct.pack(">HHII", key, 4, 1, value) for key, value in tags.items()]
    directory = struct.pack(">H", len(tags)) + b"".join(entries) + bytes(4)
    path.write_bytes(
        b"MM\0*" + struct.pack(">I", start) + LEVELS.astype(">u2").tobytes() + directory
    )
    return path


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_16_bits_is_read_in_both_orders_and_white_may_be_0(big, tmp_path):
    plain = grey(common.load_image(patched_tiff(tmp_path / "a.tiff", 1, big), 2))
    negative = grey(common.load_image(patched_tiff(tmp_path / "b.tiff", 0, big), 2))
    expected = grey(
        cxr.decode.apply_window(common.PREPARE(Image.fromarray(LEVELS / np.float32(16))), 2)
    )
    assert np.abs(plain - expected).max() <= 1 and plain[0, 0] == 0
    assert np.abs(negative - (255 - plain)).max() <= 1


def test_no_metadata_makes_a_picture_unreadable(phantom, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9204] = IFDRational(-1, 2)  # an exposure bias that becomes -1/0
    phantom.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpeg", exif=exif, quality=95)
    content = (tmp_path / "a.jpeg").read_bytes()
    bias = next(b for b in (struct.pack(o + "ii", -1, 2) for o in "<>") if b in content)
    (tmp_path / "a.jpeg").write_bytes(content.replace(bias, bias.replace(b"\x02", b"\0")))
    text = PngInfo()
    text.add_text("Comment", "x" * 3_000_000, zip=True)
    phantom.save(tmp_path / "b.png", pnginfo=text)
    phantom.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.tiff", exif=exif)
    upright = grey(common.PREPARE(phantom))
    for name in ("a.jpeg", "b.png", "c.tiff"):
        assert np.abs(grey(common.load_image(tmp_path / name, 0)) - upright).mean() < 3, name


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
    files = cxr.files.read_json(Path(flags(data)[3]).with_suffix(".json"))["images"]["train"]
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


# ---------------------------------------------------------------- patients


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


def with_table(data, text):
    (data / "metadata.csv").write_text(text)
    return ["--data-dir", str(data), "--check"]


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
    for text, expected in (
        (
            "image,patient_id\n",
            "row 1, column file_name: expected its name, and commas between columns",
        ),
        (f"file_name\n{images[0]}\n{images[0]}\n", "row 3"),
        ("", "an empty file"),
    ):
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
    found = cxr.patients.read_split(data, "train", "val")
    told = {image.patient for images in found.values() for image in images}
    assert {"NORMAL7", "PNEUMONIA7"} <= told


def test_subgroups_of_a_table_are_scored_and_survive_in_predictions_csv(data, tmp_path, flags):
    images = sorted(path.name for path in data.glob("test/*/*"))
    rows = [f"{n},P{i // 2},{'FM'[i % 2]},{i},x" for i, n in enumerate(images)]
    with_table(data, "\n".join(["file_name,patient_id,sex,age,site", *rows]))
    assert train.main(flags(data, *TINY, "--lr", "0.1")) == evaluate.main(flags(data)) == 0
    results = tmp_path / "results"
    report = cxr.files.read_json(results / "metrics.json")
    assert report["patients"] == 12
    groups = {k: v for k, v in report["subgroups"].items() if v["group"].startswith("sex")}
    names = ("sensitivity", "specificity", "auroc")
    assert set(groups) == {f"sex {sex}, {name}" for sex in "FM" for name in names}
    with open(results / "predictions.csv", newline="") as file:
        women = [row for row in csv.DictReader(file) if row["sex"] == "F"]
    right = [row["prediction"] == row["label"] for row in women if row["label"] == CLASSES[1]]
    found = groups["sex F, sensitivity"]
    assert found["n"] == len(right) and found["value"] == pytest.approx(np.mean(right))
    assert found["low"] < found["value"] + 1e-9 and groups["sex M, auroc"]["n"] == 12
    source, again = str(results / "predictions.csv"), str(tmp_path / "again")
    assert evaluate.main(["--from", source, "--results-dir", again]) == 0
    rescored = cxr.files.read_json(Path(again, "metrics.json"))
    assert rescored["subgroups"] == report["subgroups"] and rescored["patients"] == 12


# ---------------------------------------------------------------- networks and checkpoints


def test_a_network_gets_the_normalisation_of_its_own_weights():
    halves = common.build_backbone("efficientnet_v2_l").normalize.transforms[-1]
    assert halves.mean == halves.std == [0.5, 0.5, 0.5]
    assert common.build_backbone("resnet18").normalize is common.NORMALIZE
    torch.manual_seed(0)
    true = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True)
    backbone = common.build_backbone("googlenet", true.state_dict(), "x")
    true.fc, pixels = (
        nn.Identity(),
        common.NORMALIZE(torch.zeros(1, 1, 224, 224, dtype=torch.uint8)),
    )
    with torch.no_grad():
        assert torch.allclose(backbone.network(pixels), true.eval()(pixels), atol=1e-5)


WRAPPED = {
    "DataParallel": lambda s: {f"module.{key}": value for key, value in s.items()},
    "compiled": lambda s: {"model": {f"_orig_mod.{key}": value for key, value in s.items()}},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "with an optimizer": lambda s: {
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{}]},
    },
    "backbone and head": lambda s: {
        key if key.startswith("fc") else f"backbone.{key}": value for key, value in s.items()
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_checkpoint_in_a_known_wrapping_is_taken_as_the_plain_one(kind, data, tmp_path, flags):
    network = torchvision.models.get_model("tinynet")
    network.fc = nn.Linear(8, 1)
    probs = []
    for name, state in (
        ("plain", network.state_dict()),
        (kind, WRAPPED[kind](network.state_dict())),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
        more = "--checkpoint", tmp_path / f"{name}.pth", "--arch", "tinynet"
        assert evaluate.main(flags(data, *more, "--results-dir", tmp_path / name)) == 0
        table = cxr.predictions.read_predictions(tmp_path / name / "predictions.csv")
        probs.append(table.probs)
        weights = "--weights", tmp_path / f"{name}.pth", "--epochs", 1
        assert train.main(flags(data, *TINY, *weights)) == 0
        probs.append(torch.load(tmp_path / "model.pth")["fc.weight"].numpy())
    assert (probs[0] == probs[2]).all() and (probs[1] == probs[3]).all()


def test_any_head_is_left_out_of_weights_and_named_where_it_should_score(
    data, tmp_path, flags, capsys
):
    network = torchvision.models.get_model("tinynet")
    for head in (nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))):
        network.fc = head
        torch.save(network.state_dict(), tmp_path / "other.pth")
        assert train.main(flags(data, *TINY, "--weights", tmp_path / "other.pth")) == 0
        more = "--arch", "tinynet", "--checkpoint", tmp_path / "other.pth"
        assert evaluate.main(flags(data, *more)) == 2
        assert f"--weights {tmp_path / 'other.pth'} trains a new one" in capsys.readouterr().err


def test_what_is_no_state_dict_is_refused_with_the_remedy(data, tmp_path, flags, capsys):
    def told(path, *more):
        assert evaluate.main(flags(data, "--checkpoint", path, *more)) == 2
        return capsys.readouterr().err

    network = torchvision.models.get_model("tinynet")
    network.fc = nn.Linear(8, 1)
    torch.save(network, tmp_path / "whole.pth")
    assert "torch.save(model.state_dict(), FILE)" in told(tmp_path / "whole.pth")
    header = b'{"__metadata__":{}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "safetensors.torch.load_file('a.safetensors')" in told(tmp_path / "a.safetensors")
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert "taken for a resnet50 (--arch)" in told(tmp_path / "bare.pth")
    assert train.main(flags(data, *TINY)) == 0
    assert "model.json says tinynet" in told(tmp_path / "model.pth", "--arch", "resnet18")


# ---------------------------------------------------------------- machines


def script(code, *words, **environment):
    """A process that runs a few lines of Python with the scripts at hand."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n{code}"
    command = [sys.executable, "-c", code, *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return found.returncode, found.stdout, found.stderr.strip()


@pytest.mark.parametrize("name", ["torch", "torchmetrics", "sklearn", "matplotlib", "pydicom"])
def test_a_missing_package_is_one_line_at_once(name):
    hide = f"sys.modules[{name!r}] = None\nimport importlib.util as u; t = u.find_spec\n"
    hide += f"u.find_spec = lambda n, *a: None if n == {name!r} else t(n, *a)\nimport train"
    status, _, error = script(hide)
    assert status == 2 and len(error.splitlines()) == 1 and name in error
    assert "make install, then .venv/bin/python train.py" in error


def test_without_fcntl_and_what_only_posix_has_the_scripts_run(tmp_path):
    for i, name in enumerate(CLASSES):
        for j in range(6):
            put(tmp_path / "train" / name / f"IM-{i}{j}-1.jpeg", f"{i}{j}".encode())
    code = "sys.modules['fcntl'] = None\nimport os, signal, split_val, train, evaluate\n"
    code += "for name in ('sched_getaffinity', 'uname', 'fork'): delattr(os, name)\n"
    code += "for name in ('SIGALRM', 'SIGCHLD', 'alarm'): delattr(signal, name)\n"
    code += "sys.exit(split_val.main(sys.argv[1:]))"
    status, out, error = script(code, "--data-dir", tmp_path)
    assert status == 0 and "Moved 2 NORMAL and 2 PNEUMONIA" in out, error


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(common.os, "fsync", lambda file: refuse(file) if is_folder(file) else None)
    is_folder = lambda file: os.path.isdir(f"/proc/self/fd/{file}")  # noqa: E731
    for i, name in enumerate(CLASSES):
        for j in range(6):
            put(tmp_path / "train" / name / f"IM-{i}{j}-1.jpeg", f"{i}{j}".encode())
    for more in ([], ["--undo"]):
        assert split_val.main(["--data-dir", str(tmp_path), *more]) == 0


def test_a_gpu_that_cannot_be_used_is_said_and_the_cpu_taken(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(nn.functional, "conv2d", broken)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
    with pytest.raises(cxr.errors.Failure, match="no kernel image") as failure:
        common.pick_device("cuda")
    assert failure.value.status == 4
    monkeypatch.setattr(nn.functional, "conv2d", lambda x, w: x if calls.pop() else broken())
    calls = [True, False]
    assert common.pick_device("auto")[0].type == "cpu"
    assert "cuda cannot be used (CUDA error: no kernel image" in capsys.readouterr().err


def test_a_machine_without_semaphores_or_a_file_without_permission_is_no_bad_image(
    data, flags, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(
            torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__", refuse
        )
        assert train.main(flags(data, *TINY, "--workers", 2)) == 4
    assert "cannot start" in (error := capsys.readouterr().err) and "--workers 0" in error
    path, true = sorted((data / "train" / "NORMAL").iterdir())[3], Path.read_bytes

    def read_bytes(self):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return true(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert train.main(flags(data, *TINY, "--skip-bad")) == 2
    assert f"train.py: {path}: Permission denied" in capsys.readouterr().err


def test_in_a_notebook_lines_begin_with_the_script(tmp_path, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert train.main(flags(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err.startswith("train.py: ")
    with pytest.raises(SystemExit):
        train.main(["--epoch", "x"])
    assert capsys.readouterr().err.startswith("train.py: ")


@pytest.mark.parametrize("name", ["python3.9", "python3.12"])
def test_make_tells_an_old_python_and_makes_the_environment_anew_for_another(name, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for file in ("requirements.txt", ".venv/installed", ".venv/bin/python"):
        put(tmp_path / file, b"")
    (tmp_path / ".venv" / "python").write_text("python3\n")
    fake, log = tmp_path / "bin" / name, tmp_path / "log"
    old = name == "python3.9"
    put(fake, f"#!/bin/sh\necho $2 >> {log}\n".encode())
    if old:
        fake.write_text('#!/bin/sh\necho "Python 3.10 or newer needed, found 3.9" >&2; exit 1\n')
    fake.chmod(0o755)
    command = ["make", "-C", str(tmp_path), "install"]
    run = {"capture_output": True, "text": True, "env": os.environ | {"MAKEFLAGS": ""}}
    assert "Nothing to be done" in subprocess.run(command, **run).stdout
    found = subprocess.run([*command, f"PYTHON={fake}"], **run)
    assert found.returncode == 2
    assert ("3.10 or newer" in found.stderr) if old else ("venv" in log.read_text())
    assert (tmp_path / ".venv" / "python").read_text() == ("python3\n" if old else f"{fake}\n")


# ---------------------------------------------------------------- unlike the training images


def test_pictures_from_elsewhere_are_told_one_by_one_and_as_a_group(data, tmp_path, flags, capsys):
    assert train.main(flags(data, *TINY)) == evaluate.main(flags(data)) == 0
    report = cxr.files.read_json(tmp_path / "results" / "metrics.json")
    table = cxr.predictions.read_predictions(tmp_path / "results" / "predictions.csv")
    info = cxr.files.read_json(tmp_path / "model.json")["features"]
    mean, std = (np.array(info[name].split(), float) for name in ("mean", "std"))
    images = cxr.patients.read_split(data, "test")["test"]
    network = common.build_backbone("tinynet").network
    pixels = torch.stack([v for i in images for v in common.Views([i], 1, 2.0)[0][1]])
    with torch.no_grad():
        z = (network(common.NORMALIZE(pixels)).numpy() - mean) / std
    expected = np.sqrt((z**2).mean(1)) / info["limit"]
    assert table.unlike == pytest.approx(expected, abs=2e-3)
    assert report["unlike"]["over"] == (table.unlike > 1).sum() and report["unlike"]["n"] == 24
    square = np.sqrt(max((z.mean(0) ** 2).mean() - 1 / 24, 0))
    assert report["unlike"]["shift"] == pytest.approx(square, abs=2e-3)
    assert not any("elsewhere" in warning for warning in report["warnings"])
    capsys.readouterr()

    for path in data.glob("test/*/*"):  # negatives
        ImageOps.invert(Image.open(path).convert("L")).save(path)
    assert evaluate.main(flags(data)) == 0
    report, page = cxr.files.read_json(tmp_path / "results" / "metrics.json"), capsys.readouterr()
    assert report["unlike"]["elsewhere"] and "these images come from elsewhere" in page.err
    assert "Images unlike those of training: " in page.out
    noise = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224), np.uint8)).save(noise)
    assert evaluate.main(flags(data, noise)) == 0
    assert "unlike the training images (" in capsys.readouterr().out


def test_classes_that_are_swapped_are_suspected(tmp_path, capsys):
    rows = [f"{i},{CLASSES[i % 2]},{(0.8, 0.3)[i % 2] + i / 1000}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["file,label,probability", *rows]))
    assert evaluate.main(["--from", str(tmp_path / "a.csv")]) == 0
    assert "far below chance: are the class folders swapped?" in capsys.readouterr().err


# ---------------------------------------------------------------- what is easily overlooked


def test_a_patient_of_the_test_images_in_train_or_val_is_warned_of_in_the_report(
    data, tmp_path, flags, capsys
):
    child = sorted((data / "train" / "NORMAL").iterdir())[0]
    test = sorted((data / "test" / "NORMAL").iterdir())[0]
    test.rename(test.with_name(f"{cxr.patients.patient_from_name(child.name)}-0099.jpeg"))
    other = sorted((data / "train" / "PNEUMONIA").iterdir())[0]
    val = sorted((data / "val" / "PNEUMONIA").iterdir())[0]
    val.rename(val.with_name(f"{cxr.patients.patient_from_name(other.name)}_99.jpeg"))
    assert train.main(flags(data, *TINY)) == 0
    assert "patients in train/ and val/: 1, as person" in capsys.readouterr().err
    assert evaluate.main(flags(data)) == 0
    error = capsys.readouterr().err
    assert "1 of 24 test images are of patients in train/ or val/" in error


def test_links_into_another_source_are_not_taken_for_those_asked_for(data, tmp_path, capsys):
    shutil.rmtree(data / "val")
    shutil.copytree(data, other := tmp_path / "other")
    links = tmp_path / "links"
    assert split_val.main(["--data-dir", str(links), "--link-from", str(data)]) == 0
    assert split_val.main(["--data-dir", str(links), "--link-from", str(other)]) == 2
    assert f"is no link to {other}" in capsys.readouterr().err
    again = "--data-dir", str(tmp_path / "again")
    assert split_val.main([*again, "--link-from", str(tmp_path)]) == 2
    assert "see --link-from" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_colour_of_16_bits_is_refused_in_every_format(tmp_path):
    pixels = np.repeat(LEVELS[..., None], 3, 2).astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6\n256 256\n65535\n" + pixels)
    planes = np.repeat(LEVELS[None], 3, 0).astype("<u2").tobytes()
    tags = {256: 256, 257: 256, 258: (16, 16, 16), 259: 1, 262: 2, 273: 0, 277: 3, 278: 256}
    tags |= {279: 0, 284: 2}
    extra = {258: (16,) * 3, 273: [8 + i * 131072 for i in range(3)], 279: [131072] * 3}
    at, data, entries = 8 + len(planes), b"", []
    for key in sorted(tags):
        if key in extra:
            kind, code = ("H", 3) if key == 258 else ("I", 4)
            entries.append(struct.pack("<HHII", key, code, 3, at + len(data)))
            data += struct.pack(f"<3{kind}", *extra[key]).ljust(12, b"\0")
        else:
            entries.append(struct.pack("<HHII", key, 4, 1, tags[key]))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    start = struct.pack("<I", at + len(data))
    (tmp_path / "b.tiff").write_bytes(b"II*\0" + start + planes + data + directory)
    for name in ("a.ppm", "b.tiff"):
        with pytest.raises(ValueError, match="16 bits a channel"):
            cxr.decode.decode(tmp_path / name, 224)


def test_dicom_windows_that_miss_the_film_and_ranges_of_padding(tmp_path):
    plain = grey(common.load_image(write_dicom(tmp_path / "a.dcm", LEVELS), 2))
    for window in (
        {"WindowCenter": 40, "WindowWidth": 4},
        {"WindowCenter": -600, "WindowWidth": 100},
    ):
        found = grey(common.load_image(write_dicom(tmp_path / "b.dcm", LEVELS, **window), 2))
        assert (found == plain).all(), window
    film = LEVELS // 2
    padded = film.copy()
    padded[:60] = 4000 + np.arange(256) % 90
    tags = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}
    found = grey(common.load_image(write_dicom(tmp_path / "c.dcm", padded, **tags), 2))
    assert (found[:50] == 0).all() and np.abs(found[60:] - plain[60:]).max() < 25
    header = tmp_path / "d.dcm"
    header.write_bytes(write_dicom(tmp_path / "c.dcm", LEVELS).read_bytes()[128 + 4 :])
    assert "DICM at byte 128" in cxr.decode.explain_unreadable(header, _unidentified(header))


def _unidentified(path):
    with pytest.raises(OSError) as caught:
        cxr.decode.decode(path, 224)
    return caught.value


def test_spaces_in_a_table_separate_no_patient_and_odd_places_are_told(data, flags, capsys):
    images = sorted(path.name for path in data.glob("train/NORMAL/*"))
    with_table(data, f"file_name, patient_id\n{images[0]},P3\n{images[1]},P3 \n")
    found = {i.path.name: i.patient for i in cxr.patients.read_split(data, "train")["train"]}
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


def test_a_record_of_something_else_and_a_stray_rank_are_told(
    data, tmp_path, flags, monkeypatch, capsys
):
    assert train.main(flags(data, *TINY)) == 0
    cxr.files.write_json(tmp_path / "model.json", {"images": 3})
    assert evaluate.main(flags(data)) == 2
    assert "model.json: not about a model" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(common, "try_device", lambda name: "")
    monkeypatch.setenv("LOCAL_RANK", "3")  # of a scheduler, without torchrun
    assert common.pick_device("auto")[0] == torch.device("cuda:0")


def test_links_to_images_that_are_links_themselves_are_known_again(data, tmp_path):
    shutil.rmtree(data / "val")
    store = tmp_path / "store"  # as git-annex and DVC keep files
    store.mkdir()
    for i, path in enumerate(sorted(data.glob("*/*/*"))):
        shutil.move(path, store / str(i))
        path.symlink_to(store / str(i))
    for _ in range(2):
        words = ["--data-dir", tmp_path / "links", "--link-from", data]
        assert split_val.main([str(word) for word in words]) == 0


def test_where_a_picture_stands_in_its_file_does_not_matter(tmp_path):
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, 2)
    tags = {256: 256, 257: 256, 258: 8, 259: 1, 262: 2, 273: 65535, 277: 3, 278: 256}
    tags[279] = pixels.size
    entries = [struct.pack("<HHII", key, 4, 1, value) for key, value in tags.items()]
    entries[2] = struct.pack("<HHII", 258, 3, 3, 8)  # 8, 8, 8 at byte 8
    content = b"II*\0" + struct.pack("<I3H", 65535 + pixels.size, 8, 8, 8)
    content = content.ljust(65535, b"\0") + pixels.tobytes() + struct.pack("<H", len(tags))
    (tmp_path / "a.tiff").write_bytes(content + b"".join(entries) + bytes(4))
    assert (np.asarray(cxr.decode.decode(tmp_path / "a.tiff", 224).grey) == pixels[..., 0]).all()
