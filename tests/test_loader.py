"""cxr/loader.py: worker processes, also with little shared memory."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, extract, path_flags

from cxr import loader

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "cores", "n_images", "expected"),
    [
        (CUDA, 16, 200, 16),
        (CUDA, 16, 199, 0),
        (CPU, 2, 200, 0),
        (CPU, 3, 200, 3),
        (CUDA, 1, 200, 1),
    ],
)
def test_the_number_of_workers(monkeypatch, device, cores, n_images, expected):
    monkeypatch.setattr(loader, "count_cores", lambda: cores)
    assert loader.count_workers(-1, n_images, device) == expected
    assert loader.count_workers(5, n_images, device) == 5


class FakeViews(list):
    item_bytes = 1000


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10**9, (8, 4)), (27_000, (8, 3)), (19_000, (8, 2)), (11_000, (8, 1)), (8_000, (5, 1))],
)
def test_what_workers_decode_ahead_fits_into_the_shared_memory(monkeypatch, free, expected):
    monkeypatch.setattr(loader, "free_shared_memory", lambda: free)
    assert loader.plan_workers(FakeViews(), 1, 8, CPU) == expected


# Trainings in a mount namespace of their own, whose /dev/shm is small. If `blind`, the free shared
# memory seems to be large, as if another process filled it afterwards.
CASES = [  # megabytes, workers, blind, warning
    (1, 2, False, "/dev/shm has only 1 MB free, so images are decoded in one process"),
    (16, 8, False, ""),
    (64, 2, False, ""),
    (1, 2, True, "so images are decoded in one process"),
]
CODE = """
import subprocess, sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, train
import cxr.loader
free_shared_memory = cxr.loader.free_shared_memory
for i, (megabytes, workers, blind, _) in enumerate({cases!r}):
    size = f"remount,size={{megabytes}}m"
    subprocess.run(["mount", "-o", size, "/dev/shm"], check=True)
    cxr.loader.free_shared_memory = (lambda: 1e12) if blind else free_shared_memory
    print("case", i, file=sys.stderr)
    flags = ["--workers", str(workers), "--checkpoint", f"{{sys.argv[1]}}/{{i}}.pth"]
    assert train.main([*sys.argv[2:], *flags]) == 0
"""


def test_with_little_shared_memory_the_model_is_the_same(split_phantoms, run_train, tmp_path):
    flags = [*TINY, "--views", 4, "--no-cache", "--epochs", 3]
    flags = path_flags(split_phantoms, tmp_path, tmp_path / "cache", *flags)
    code = CODE.format(root=str(ROOT), tests=str(ROOT / "tests"), cases=CASES)
    mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    own_mounts = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    try:
        subprocess.run([*own_mounts, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"unshare cannot make a /dev/shm of another size here: {error}")
    command = [*own_mounts, sys.executable, "-c", code, tmp_path, *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert run_train("--no-cache", "--epochs", 3) == 0
    expected = (tmp_path / "model.pth").read_bytes()
    outputs = re.split(r"case \d\n", result.stderr)[1:]
    for i, (output, (*_, warning)) in enumerate(zip(outputs, CASES, strict=True)):
        assert (tmp_path / f"{i}.pth").read_bytes() == expected
        assert warning in output and ("/dev/shm" in output) == bool(warning)


def test_after_a_worker_without_shared_memory_the_rest_is_decoded_without_workers(
    backbone, images, monkeypatch, capsys
):
    expected, *_ = extract(backbone, images, 1)
    start_loader = loader.start_loader

    def one_batch(batches):
        yield next(batches)
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    def start(views, batch_size, n_workers, *more):
        batches = start_loader(views, batch_size, 0, None, CPU)
        return one_batch(batches) if n_workers else batches

    monkeypatch.setattr(loader, "start_loader", start)
    features, readable, _ = extract(backbone, images, 1, workers=2)
    assert torch.equal(features, expected) and readable == images
    assert "images are decoded in one process" in capsys.readouterr().err
