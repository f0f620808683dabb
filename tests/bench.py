"""The speed table of the README: every line a ratio of two times of this run, on this machine.

    make bench
    make bench ARGS="--only a,d"

Draws phantoms into a temporary folder and uses a ResNet-50 with random weights, whose speed is that of any weights.
It is a benchmark: it prints, and asserts nothing.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402


def seconds(function, repeats=1):
    """The shortest of `repeats` times of function(), in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def report(name, base, base_value, unit, ours, our_value, ratio):
    print(
        f"{name:4s}{base:32s}{base_value:8.2f} {unit:9s}{ours:52s}{our_value:8.2f} {unit:9s}ratio {ratio:7.2f}",
        flush=True,
    )


def draw_data(folder, train=100, val=50):
    """A data folder of phantoms, so many a class."""
    from phantoms import draw_folder

    draw_folder(folder / "drawn", train=train, test=val)
    (folder / "drawn" / "test").rename(folder / "drawn" / "val")
    return folder / "drawn"


def train_command(data, folder, *flags):
    fixed = ("--data-dir", data, "--checkpoint", folder / "model.pth", "--results-dir", folder / "results")
    return [sys.executable, "train.py", *fixed, "--cache-dir", folder / "cache", "--weights", "random", *flags]


def run(command, cwd=ROOT):
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, capture_output=True)


def plain_epoch(data, batch_size=32):
    """Seconds of one epoch as the plain loop runs it: decode, flip, forward through the backbone, in autocast."""
    import torch
    from torchvision.models import resnet50
    from torchvision.transforms import functional as F

    device, dtype = common.pick_device("auto")
    network = resnet50()
    network.requires_grad_(False)
    network.fc = torch.nn.Linear(2048, 1)
    network.to(device)
    optimizer = torch.optim.Adam(network.fc.parameters(), lr=1e-3)
    found = common.read_split(data, "train", "val")
    start = time.perf_counter()
    for split in ("train", "val"):
        network.train(split == "train")
        order = torch.randperm(len(found[split])).tolist()
        for first in range(0, len(order), batch_size):
            images = [found[split][row] for row in order[first : first + batch_size]]
            views = [common.make_view(common.load_image(i.path), int(torch.rand(()) < 0.5), i.digest) for i in images]
            pixels = torch.stack([F.normalize(F.to_tensor(v), common.MEAN, common.STD) for v in views]).to(device)
            labels = torch.tensor([float(image.label) for image in images], device=device)
            with torch.autocast(device.type, dtype, dtype != torch.float32), torch.set_grad_enabled(split == "train"):
                logits = network(pixels).flatten()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
            if split == "train":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return time.perf_counter() - start


def bench_training(folder):
    """(a), (b), (c): 200 + 100 images, 2 views, 50 epochs."""
    data = draw_data(folder)
    flags = ("--views", 2, "--epochs", 50, "--patience", 0)
    plain = 50 * min(plain_epoch(data) for _ in range(2))

    def empty():
        shutil.rmtree(folder / "cache", ignore_errors=True)
        run(train_command(data, folder, *flags))

    cold = seconds(empty, 2)
    warm = seconds(lambda: run(train_command(data, folder, *flags)), 5)
    imports = seconds(lambda: run([sys.executable, "-c", "import torch, torchvision"]), 5)
    report("(a)", "plain loop, 50 epochs", plain, "s", "train.py, empty store", cold, plain / cold)
    report("(b)", "plain loop, 50 epochs", plain, "s", "train.py, warm store", warm, plain / warm)
    report("(c)", "import torch, torchvision", imports, "s", "train.py, warm store", warm, warm / imports)


def bench_pass(folder):
    """(d): the whole pass against forward-only, forward-only against OpenVINO's."""
    import torch

    data = draw_data(folder, train=250, val=1)
    images = common.read_split(data, "train")["train"]
    device, dtype = common.pick_device("auto")
    network, _, width, _ = common.build_network("resnet50")
    args = argparse.Namespace(no_cache=True, cache_dir=None, batch_size=32, workers=-1)
    size = min(args.batch_size, 16) if device.type == "cpu" else args.batch_size
    fast = common.fast_copy(network, device, dtype)
    batch = torch.randn(size, 3, 224, 224).to(device, dtype, memory_format=torch.channels_last)

    def forward(fast=fast, batches=16):
        with torch.inference_mode():
            for _ in range(batches):
                fast(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()

    forward()
    pairs = []
    for _ in range(3):  # in turn, so that a slow minute of the machine hits both
        only = seconds(forward) / (16 * size)
        whole = seconds(lambda: common.extract_features(network, width, images, [2] * len(images), args, device, dtype))
        pairs.append((only, whole / (2 * len(images)), seconds(forward) / (16 * size)))
    only, whole = min(min(p[0], p[2]) for p in pairs), min(p[1] for p in pairs)
    report("(d)", "forward only", only * 1e3, "ms/image", "the whole pass", whole * 1e3, only / whole)
    if device.type != "cpu":
        return
    try:
        import openvino
    except ImportError:
        print("    OpenVINO is not installed: pip install openvino compares with it")
        return
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32", "PERFORMANCE_HINT": "LATENCY"}
    pixels, many = batch.float().numpy(), 5000 // size

    def set_up():
        model = openvino.convert_model(network, example_input=torch.randn(size, 3, 224, 224))
        return openvino.Core().compile_model(model, "CPU", hints).create_infer_request()

    def infer(request, batches=16):
        for _ in range(batches):
            request.infer({0: pixels})

    request = set_up()
    pairs = [(seconds(forward), seconds(lambda: infer(request))) for _ in range(4)]
    ours, other = (min(times) / (16 * size) * 1e3 for times in zip(*pairs, strict=True))
    report("", "OpenVINO", other, "ms/image", "forward only", ours, ours / other)
    pairs = [
        (
            seconds(lambda: forward(common.fast_copy(network, device, dtype), many)),
            seconds(lambda: infer(set_up(), many)),
        )
        for _ in range(2)
    ]
    ours, other = map(min, zip(*pairs, strict=True))
    report("", "OpenVINO, 5,000 with set-up", other, "s", "forward only, 5,000 with set-up", ours, ours / other)


def bench_decoding(folder):
    """(e): 1500x1200 JPEGs from file to view, decoded whole and at the scale that suffices."""
    import numpy as np
    from phantoms import draw_phantom
    from PIL import Image

    for mode, quality in (("L", 75), ("L", 90), ("RGB", 90)):  # the reference data's originals are grey, others colour
        paths = [folder / f"{i}.jpeg" for i in range(12)]
        for i, path in enumerate(paths):
            phantom = draw_phantom(np.random.default_rng(i), bool(i % 2), 500)  # enlarged: files as big as real ones
            phantom.resize((1500, 1200), Image.Resampling.BICUBIC).convert(mode).save(path, quality=quality)
        whole = seconds(lambda paths=paths: [common.make_view(Image.open(p), 0, "") for p in paths], 5) / len(paths)
        small = seconds(lambda paths=paths: [common.make_view(common.load_image(p), 0, "") for p in paths], 5) / len(
            paths
        )
        name = f"1500x1200 JPEG {mode} q{quality}, whole"
        what = f"at the scale that suffices, {sum(p.stat().st_size for p in paths) / len(paths) / 1e3:.0f} kB"
        report("(e)", name, whole * 1e3, "ms/image", what, small * 1e3, whole / small)


def bench_growth(folder):
    """(f): seconds an image and peak memory of the pass over 1x, 4x and 16x as many images."""
    code = (
        "import resource, sys, time, common\n"
        "from argparse import Namespace\n"
        "from pathlib import Path\n"
        "device, dtype = common.pick_device('auto')\n"
        "network, _, width, _ = common.build_network('resnet18')\n"
        "images = common.read_split(sys.argv[1], 'train')['train'][: int(sys.argv[3])]\n"
        "args = Namespace(no_cache=False, cache_dir=Path(sys.argv[2]), batch_size=32, workers=2)\n"
        "start = time.perf_counter()\n"
        "features, _ = common.extract_features(network, width, images, [1] * len(images), args, device, dtype)\n"
        "taken, status = time.perf_counter() - start, Path('/proc/self/status')\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"  # on Linux that of this process's parent counts
        "peak = int(status.read_text().split('VmHWM:')[1].split()[0]) * 1024 if status.exists() else peak\n"
        "print(taken, peak, features.nbytes)\n"
    )
    data = draw_data(folder, train=1600, val=1)
    for factor in (1, 4, 16):
        command = [sys.executable, "-c", code, str(data), str(folder / f"cache{factor}"), str(200 * factor)]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        taken, peak, features = map(float, out.split())
        time_and_memory = f"{taken / factor * 5:6.2f} ms/image, {(peak - features) / 1e6:5.0f} MB beyond the features"
        print(f"(f) {200 * factor:5d} images through a ResNet-18: {time_and_memory}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="a,d,e,f", help="which lines: a (with b and c), d, e, f (default: all)")
    only = parser.parse_args().only.split(",")
    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")  # fmt: skip
    for name, bench in {"e": bench_decoding, "d": bench_pass, "a": bench_training, "f": bench_growth}.items():
        if name in only:
            with tempfile.TemporaryDirectory() as folder:
                bench(Path(folder))


if __name__ == "__main__":
    main()
