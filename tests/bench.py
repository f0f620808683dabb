"""The speed table: every line a ratio of two times of this run, on this machine.

    make bench
    make bench ARGS="--only a,d"

Draws phantoms into a temporary folder and uses a ResNet-50 with random weights, whose speed is that
of any weights. It is a benchmark: it prints, and asserts nothing.
"""

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
import torch
from phantoms import draw_folder, draw_phantom
from PIL import Image
from pydicom.pixels import apply_rescale, apply_voi_lut
from torch import nn
from torchvision.models import resnet50
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from helpers import write_dicom  # noqa: E402

import common  # noqa: E402
import cxr.decode  # noqa: E402
import cxr.patients  # noqa: E402
from cxr.folders import CLASSES  # noqa: E402
from cxr.loader import load_batches  # noqa: E402
from cxr.machine import count_cores  # noqa: E402

WINDOW = 2.0


def seconds(function, repeats=1):
    """The shortest of `repeats` times of function(), in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def report(name, base, base_value, ours, our_value, unit, ratio):
    print(
        f"{name:4}{base:32}{base_value:9.2f} {unit:9}{ours:36}{our_value:9.2f} {unit:9}"
        f"ratio {ratio:7.2f}",
        flush=True,
    )


def draw_data(folder, train=100, val=50):
    """A data folder of phantoms, so many a class."""
    draw_folder(folder / "drawn", train=train, test=val)
    (folder / "drawn" / "test").rename(folder / "drawn" / "val")
    return folder / "drawn"


def run(*command):
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)


def plain_epoch(data, batch_size=32):
    """Seconds of one epoch of the plain loop: decode, flip, forward in autocast, backward."""
    device, dtype = common.pick_device("auto")
    network = resnet50().requires_grad_(False)
    network.fc = nn.Linear(2048, 1)
    network.to(device)
    optimizer = torch.optim.Adam(network.fc.parameters(), lr=1e-3)
    criterion, xrays = (
        nn.BCEWithLogitsLoss(),
        cxr.patients.read_split(data, "train", "val", classes=CLASSES),
    )
    autocast = torch.autocast(device.type, dtype, dtype != torch.float32)
    start = time.perf_counter()
    for split in ("train", "val"):
        network.train(split == "train")
        of_split = [xray for xray in xrays if xray.split == split]
        order = torch.randperm(len(of_split)).tolist()
        for first in range(0, len(order), batch_size):
            images = [of_split[row] for row in order[first : first + batch_size]]
            views = [
                common.make_view(common.load_image(i.path, WINDOW), int(torch.rand(()) < 0.5), "")
                for i in images
            ]
            pixels = torch.stack([torch.from_numpy(np.array(view))[None] for view in views])
            labels = torch.tensor([float(image.label) for image in images], device=device)
            with autocast, torch.set_grad_enabled(split == "train"):
                logits = network(common.NORMALIZE(pixels.to(device))).flatten()
            loss = criterion(logits.float(), labels)
            if split == "train":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return time.perf_counter() - start


USUAL_WAY = """
import sys
import numpy as np, torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision import datasets, transforms
from torchvision.models import resnet50
from torchvision.transforms import v2
network = resnet50().eval()
network.fc = torch.nn.Identity()
steps = [transforms.Resize((224, 224)), transforms.ToTensor(),
         transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
x, y = {}, {}
for split in ("train", "val"):
    images = datasets.ImageFolder(f"{sys.argv[1]}/{split}", transforms.Compose(steps))
    with torch.inference_mode():
        loader = torch.utils.data.DataLoader(images, batch_size=32)
        x[split] = np.concatenate([network(pixels).numpy() for pixels, _ in loader])
    y[split] = images.targets
model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
print(model.fit(x["train"], y["train"]).score(x["val"], y["val"]))
"""


def bench_training(folder):
    """(a), (b), (c), (g): 200 + 100 images, 2 views, 50 epochs."""
    data = draw_data(folder)
    files = ("--checkpoint", folder / "model.pth", "--results-dir", folder / "results")
    flags = ("--weights", "random", "--views", 2, "--epochs", 50, "--patience", 0)
    command = ("train.py", "--data-dir", data, "--cache-dir", folder / "cache", *files, *flags)

    def empty():
        shutil.rmtree(folder / "cache", ignore_errors=True)
        run(*command)

    plain = 50 * min(plain_epoch(data) for _ in range(2))
    cold = seconds(empty, 2)
    warm = seconds(lambda: run(*command), 5)
    imports = seconds(lambda: run("-c", "import torch, torchvision"), 5)
    usual = seconds(lambda: run("-c", USUAL_WAY, data))
    loop = "plain loop, 50 epochs"
    report("(a)", loop, plain, "train.py, empty cache", cold, "s", plain / cold)
    report("(b)", loop, plain, "train.py, warm cache", warm, "s", plain / warm)
    name = "import torch, torchvision"
    report("(c)", name, imports, "train.py, warm cache", warm, "s", warm / imports)
    name = "features and scikit-learn"
    report("(g)", name, usual, "train.py, empty cache", cold, "s", usual / cold)


def forward(network, batch, n_batches):
    """n_batches times the network's forward pass."""
    with torch.inference_mode():
        for _ in range(n_batches):
            network(batch)
        if batch.is_cuda:
            torch.cuda.synchronize()


class NoTime(nn.Module):
    """A stand-in for a network on a GPU that takes no time: all features are 0."""

    def forward(self, pixels):
        return torch.zeros(len(pixels), 8)


def bench_pass(folder):
    """(d): the whole pass against the forward pass alone, and against the decoding alone."""
    device, dtype = common.pick_device("auto")
    n_images = 250 if device.type == "cpu" else 5000
    drawn = draw_data(folder, train=125, val=1)
    images = cxr.patients.read_split(drawn, "train", classes=CLASSES)
    images = (images * math.ceil(n_images / len(images)))[:n_images]
    args = argparse.Namespace(no_cache=True, cache_dir=None, workers=-1, skip_bad=False)
    args.feature_batch_size = size = common.BATCH_SIZES[device.type]
    backbone = common.build_backbone("resnet50")
    network = common.prepare_network(backbone.network, device, dtype, compiled=False)
    batch = torch.randn(size, 3, 224, 224).to(device, dtype, memory_format=torch.channels_last)
    options = {"n_views": 8, "window": WINDOW, "device": device, "dtype": dtype}
    forward(network, batch, 8)
    n_batches = max(16, 8 * n_images // size // 4)
    only, whole = [], []
    for _ in range(3):  # in turn, so that a slow minute of the machine hits both
        seconds_each = seconds(lambda: forward(network, batch, n_batches))
        only.append(seconds_each / (n_batches * size))
        passed = seconds(lambda: common.extract_features(backbone, images, args, **options))
        whole.append(passed / (8 * n_images))
    only, whole = min(only) * 1e3, min(whole) * 1e3
    report("(d)", "forward only", only, "the whole pass", whole, "ms/view", only / whole)
    bench_stand_in(images, args)


def bench_stand_in(images, args):
    """(d): decoding and the pass if the network takes no time, both with a worker for each core."""
    args.workers, args.feature_batch_size = count_cores(), 256
    images = (images * 8)[:2000]
    n_views, device = 8, torch.device("meta")  # copies to it take no time
    backbone = common.Backbone(NoTime(), "fc", 8, None, None, common.NORMALIZE)
    options = {"n_views": n_views, "window": WINDOW, "device": device, "dtype": torch.float32}

    def decode_all():
        views = common.Views(images, n_views, WINDOW)
        for _ in load_batches(views, 256 // n_views, args.workers, device):
            pass

    decoding, whole = [], []
    for _ in range(3):
        decoding.append(seconds(decode_all))
        whole.append(seconds(lambda: common.extract_features(backbone, images, args, **options)))
    per_view = 1e3 / (len(images) * n_views)
    decoding, whole = min(decoding) * per_view, min(whole) * per_view
    ours = "the pass, network without time"
    report("(d)", "decoding by workers", decoding, ours, whole, "ms/view", decoding / whole)


def draw_films(folder):
    """Writes a film in each usual format, as large as real ones. Returns {name: path}."""
    rng = np.random.default_rng(0)
    phantom = draw_phantom(rng, False, 500)
    jpeg, png8 = folder / "a.jpeg", folder / "8.png"
    phantom.resize((2000, 1600), Image.Resampling.BICUBIC).save(jpeg, quality=90)
    phantom.resize((1024, 1024), Image.Resampling.BICUBIC).save(png8)
    large = np.asarray(phantom.resize((3000, 2500), Image.Resampling.BICUBIC))
    noise = rng.normal(0, 12, large.shape)  # without noise, the PNG would be too small
    levels = (large * 15 + noise).clip(0, 4095).astype(np.uint16)
    Image.fromarray(levels).save(folder / "16.png")
    window = {"WindowCenter": 2048, "WindowWidth": 3000}
    window |= {"RescaleSlope": 1, "RescaleIntercept": 0}
    window |= {"PhotometricInterpretation": "MONOCHROME1"}  # white is 0
    dicom = write_dicom(folder / "a.dcm", 4095 - levels, **window)
    return {
        "JPEG 2000x1600": jpeg,
        "PNG 1024x1024": png8,
        "PNG of 16 bits 3000x2500": folder / "16.png",
        "DICOM 3000x2500": dicom,
    }


def load_without_shortcut(path):
    """Loads a film as load_image does, but decodes the whole of it, and computes every pixel."""
    if path.suffix == ".dcm":
        file = pydicom.dcmread(path)
        levels = apply_voi_lut(apply_rescale(file.pixel_array, file), file)
        picture = Image.fromarray(np.float32(4095 - levels))
    else:
        picture = Image.open(path)
        picture = picture.convert("L" if picture.mode == "L" else "F")
    return cxr.decode.apply_window(common.PREPARE(picture), WINDOW)


def bench_decoding(folder):
    """(e): films of real sizes, from the file to the picture that the network sees."""
    for name, path in draw_films(folder).items():
        plain = seconds(lambda path=path: load_without_shortcut(path), 5) * 1e3
        ours = seconds(lambda path=path: common.load_image(path, WINDOW), 5) * 1e3
        how = f"load_image, {path.stat().st_size / 1e6:.1f} MB"
        report("(e)", f"{name}, plainly", plain, how, ours, "ms/image", plain / ours)


def draw_different(folder, n_train, n_test):
    """Draws phantoms in strongly different poses: as they are, all would be similar images."""
    pose = v2.RandomAffine(degrees=25, translate=(0.1, 0.1), scale=(0.7, 1.3))
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                patient = 10**6 * (split == "test") + i
                names = f"IM-{patient:07d}-0001.jpeg", f"person{patient}_virus_1.jpeg"
                image = pose(draw_phantom(rng, bool(label)))
                image.save(folder / split / name / names[label], quality=75)
    return folder


def link_part(source, folder, n_train, n_test):
    """Makes a data folder of links to the first images of each class of another one."""
    for split, n in (("train", n_train), ("test", n_test)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for path in sorted((source / split / name).iterdir())[:n]:
                (folder / split / name / path.name).symlink_to(path)
    return folder


# Runs a command, and prints its largest memory. A process that is started by a large one seems to
# have the memory of that one, so a small Python starts it.
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(*command):
    """Runs a script. Returns its seconds and its largest memory in MB."""
    start = time.perf_counter()
    starter = [sys.executable, "-c", MEASURE, *map(str, command)]
    result = subprocess.run(starter, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    unit = 1e6 if sys.platform == "darwin" else 1e3  # macOS counts bytes, Linux kilobytes
    return time.perf_counter() - start, int(result.stdout) / unit


def bench_growth(folder):
    """(f): each step with 1x, 4x and 16x as many images, and how much its time grows."""
    n_train, n_test, factors = 100, 25, (1, 4, 16)  # images of each class
    source = draw_different(folder / "all", n_train * factors[-1], n_test * factors[-1])
    measured = {}
    for factor in factors:
        here = folder / f"{factor}x"
        data = link_part(source, here / "data", n_train * factor, n_test * factor)
        files = ("--data-dir", data)
        outputs = ("--checkpoint", here / "model.pth", "--results-dir", here / "results")
        outputs += ("--cache-dir", here / "cache")
        train = ("train.py", *files, *outputs, "--arch", "resnet18", "--weights", "random")
        steps = {
            "split_val.py --check": ("split_val.py", "--check", *files),
            "split_val.py": ("split_val.py", *files),
            "train.py, empty cache": train,
            "train.py, full cache": train,
            "evaluate.py, empty cache": ("evaluate.py", *files, *outputs),
            "evaluate.py, full cache": ("evaluate.py", *files, *outputs),
        }
        for name, command in steps.items():
            measured.setdefault(name, []).append(measure(*command))
    counts = [2 * (n_train + n_test) * factor for factor in factors]
    print(f"(f) {counts} images of 224x224 pixels, ResNet-18, 8 views")
    for name, values in measured.items():
        text = ", ".join(
            f"{seconds:.1f} s ({seconds / n * 1e3:.1f} ms/image) {megabytes:.0f} MB"
            for n, (seconds, megabytes) in zip(counts, values, strict=True)
        )
        small, middle, large = (seconds for seconds, _ in values)
        growth = f"time grows by {middle / small:.1f} and {large / middle:.1f}"
        print(f"(f) {name:25} {text}; {growth}", flush=True)


BENCHES = {"e": bench_decoding, "d": bench_pass, "a": bench_training, "f": bench_growth}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        default=",".join(BENCHES),
        help="lines: a (with b, c, g), d (the pass), e, f (default: all)",
    )
    only = parser.parse_args().only.split(",")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, torch {torch.__version__}, {gpu}")
    for name, bench in BENCHES.items():
        if name in only:
            with tempfile.TemporaryDirectory() as folder:
                bench(Path(folder))


if __name__ == "__main__":
    main()
