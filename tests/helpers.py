"""Functions for tests of several modules: run a script, read its files, make data."""

import csv
import io
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import faults
import numpy as np
import pydicom
import pytest
import torch
from phantoms import draw_phantom
from PIL import Image, ImageOps
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from torch import nn
from torchvision.models import get_model

import common
import evaluate
import split_val
import train
from cxr.folders import CLASSES, list_images

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train": train, "evaluate": evaluate, "split_val": split_val}
CURVES = "roc", "precision_recall", "confusion", "reliability", "scores", "worst"
PICTURES = {f"{name}.png" for name in CURVES}
TABLES = {"metrics.json", "methods.md", "predictions.csv", "report.html"}
TINY = "--arch", "tinynet", "--weights", "random", "--views", "2"
TINY_FAST = *TINY, "--lr", "0.1"
EXTREME_TABLES = [  # (labels, probabilities) of few images, or of extreme values
    ([0, 1], [0.2, 0.3]),
    ([0, 1], [0.0, 1.0]),
    ([0, 0, 1], [0.5, 0.5, 0.5]),
    ([0, 1, 1], [1.0, 0.0, 0.0]),
    ([0, 0, 0, 1, 1, 1, 1], [0.1, 0.24, 0.3, 0.61, 0.7, 0.83, 0.9]),
    ([0] * 11 + [1] * 7, [0.1] * 11 + [0.9] * 7),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def path_flags(data, folder, cache, *more):
    """Returns a command line of train.py or evaluate.py; all files except the cache in `folder`."""
    flags = ["--data-dir", data, "--checkpoint", folder / "model.pth", "--cache-dir", cache]
    flags += ["--results-dir", folder / "results", "--device", "cpu"]
    return [str(flag) for flag in (*flags, *more)]


def home_flags(script, home, *more):
    """Returns a command line of a script with the data and all output in `home`."""
    if script == "split_val":
        return [str(flag) for flag in ("--data-dir", home / "data", *more)]
    if script == "train":
        more = (*TINY, "--epochs", 3, *more)
    return path_flags(home / "data", home, home / "cache", "--workers", 0, *more)


def read_report(folder):
    content = json.loads((folder / "metrics.json").read_text())
    assert content.pop("checksum")
    return content


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_probs(path):
    return {row["file"]: float(row["probability"]) for row in read_rows(path)}


def read_about(tmp_path):
    return json.loads((tmp_path / "model.json").read_text())


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def keep(data, count, split="test"):
    """Deletes all images of a split except the first `count` of each class."""
    for name in CLASSES:
        for path in list_images(data / split / name)[count:]:
            path.unlink()


def write_rows(path, labels, probs, names=None):
    """Writes a predictions.csv of these labels and probabilities, and returns its path."""
    names = names or [f"test/{i}.png" for i in range(len(labels))]
    rows = zip(names, labels, map(float, probs), strict=True)
    lines = [f"{name},{CLASSES[label]},{prob!r},,\n" for name, label, prob in rows]
    faults.put(path, "".join(["file,label,probability,prediction,error\n", *lines]).encode())
    return path


def plain_network(path):
    """Loads a checkpoint without our code: torchvision's network with one output."""
    network = get_model("tinynet")
    network.fc = nn.Linear(network.fc.in_features, 1)
    network.load_state_dict(torch.load(path), strict=True)
    return network.eval()


def plain_pixels(path):
    """Prepares an image file without our code: resize, window, ImageNet's mean and std."""
    grey = Image.open(path).convert("L").resize((224, 224), Image.Resampling.BILINEAR)
    pixels = np.array(ImageOps.autocontrast(grey, cutoff=2).convert("RGB"))
    mean, std = torch.tensor([common.MEAN, common.STD]).view(2, 3, 1, 1)
    return ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]


def extract(
    backbone,
    xrays,
    n_views,
    cache=None,
    dtype=torch.float32,
    window=2.0,
    device="cpu",
    on_image=None,
    **flags,
):
    """Returns what common.extract_features does. flags: other values than these."""
    args = {"cache_dir": cache, "no_cache": cache is None, "feature_batch_size": 4, "workers": 0}
    args = Namespace(**{"skip_bad": False, **args, **flags})
    options = {"n_views": n_views, "window": window, "device": torch.device(device), "dtype": dtype}
    return common.extract_features(backbone, xrays, args, on_image=on_image, **options)


def computed(capsys):
    """Returns how many images the network processed since the last call."""
    return sum(map(int, re.findall(r"computed (\d+) images", capsys.readouterr().out)))


def make_tree(root, train, test=0):
    """Makes a data folder of files that are not images; only --check would decode them."""
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            patient = 3 * (i // 4) + min(i % 4, 2)  # two of four images show one patient
            patient += 10000 * (split == "test")
            for name in (f"IM-{patient:04d}-{i:04d}.jpeg", f"person{patient}_virus_{i}.jpeg"):
                path = root / split / CLASSES[name[0] == "p"] / name
                faults.put(path, f"{split} {path.parent.name} {i}".encode())
    return root


def run_split(folder, *flags):
    return split_val.main(["--data-dir", str(folder), *map(str, flags)])


def snapshot(folder):
    """Returns {relative path: content, None for a folder} of everything below `folder`."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def names_in(folder, split):
    return {name: sorted(p.name for p in (folder / split / name).iterdir()) for name in CLASSES}


def sizes(folder, split="val"):
    return [len(list_images(folder / split / name)) for name in CLASSES]


def split_refused(folder, capsys, *flags):
    """Runs split_val.py, checks that it exits 2 and changes no file; returns its line on stderr."""
    before = snapshot(folder)
    capsys.readouterr()
    assert run_split(folder, *flags) == 2
    assert snapshot(folder) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def with_table(data, text):
    """Writes metadata.csv and returns the command line of split_val.py --check."""
    (data / "metadata.csv").write_text(text)
    return ["--data-dir", str(data), "--check"]


def grey(image):
    return np.asarray(image).astype(int)


def reencoded(image, quality):
    content = faults.encoded(image, "jpeg", quality=quality)
    return Image.open(io.BytesIO(content)).convert("L")


def shifted(image, x, y):
    pixels = np.pad(np.asarray(image), 8)  # with black edges
    return Image.fromarray(pixels[8 + y : 232 + y, 8 + x : 232 + x])


LEVELS = np.tile(np.arange(256, dtype=np.uint16) * 16, (256, 1))  # a 12-bit ramp


def write_dicom(path, pixels, syntax=ExplicitVRLittleEndian, encoded=None, **tags):
    """Writes a DICOM radiograph. pixels: uint8, uint16 or int16 (H, W); tags: other values."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    file = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    bits = 8 * pixels.dtype.itemsize
    size = dict(Rows=pixels.shape[-2], Columns=pixels.shape[-1], SamplesPerPixel=1)
    depth = dict(BitsAllocated=bits, BitsStored=min(bits, 12), HighBit=min(bits, 12) - 1)
    other = dict(Modality="DX", PatientID="", PhotometricInterpretation="MONOCHROME2")
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in (other | size | depth | tags).items():
        setattr(file, name, value)
    if "NumberOfFrames" in tags or encoded is not None or pixels.size:
        file.PixelData = pixels.tobytes() if encoded is None else encoded
    file.save_as(path, enforce_file_format=True)
    return path


def draw_dicoms(root, patients, table=False):
    """Draws two films of each of `patients` patients per class in train/, half as many in test/.

    table: metadata.csv names the patients, not the DICOM files. Returns {file name: patient}.
    """
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
