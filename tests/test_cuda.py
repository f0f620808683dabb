"""The pass and the training on a GPU with CUDA: the same results as on the CPU."""

import re

import pytest
import torch
from helpers import TINY_FAST, computed, extract, read_probs

import common
import evaluate
import train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU with CUDA here"),
]
CUDA = torch.device("cuda:0")


def test_features_are_those_of_the_cpu_whatever_the_workers_and_the_batch(images, monkeypatch):
    common.pick_device("cuda")  # switches TF32 off
    backbone = common.build_backbone("resnet18")
    expected, *_ = extract(backbone, images, 3)
    for workers, batch_size in ((0, 256), (2, 4), (2, 5)):
        flags = {"workers": workers, "feature_batch_size": batch_size, "device": CUDA}
        features, *_ = extract(backbone, images, 3, **flags)
        assert torch.allclose(features, expected, rtol=1e-4, atol=1e-4)
        alone, *_ = extract(backbone, images[5:6], 3, **flags)
        assert torch.equal(alone[0], features[5])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_training_and_its_scores_are_those_of_the_cpu(data, flags, tmp_path, device):
    assert train.main(flags(data, *TINY_FAST, "--device", device)) == 0
    probs = {}
    for name in ("cpu", "cuda"):
        assert evaluate.main(flags(data, "--device", name, "--no-cache")) == 0
        probs[name] = read_probs(tmp_path / "predictions.csv")
    assert probs["cuda"] == pytest.approx(probs["cpu"], abs=1e-5)


def test_a_training_uses_the_cache_of_the_gpu(data, flags, tmp_path, capsys):
    models = set()
    for n_computed in (64, 0):
        assert train.main(flags(data, *TINY_FAST, "--device", "cuda")) == 0
        assert computed(capsys) == n_computed
        models.add((tmp_path / "model.pth").read_bytes())
    assert len(models) == 1


def test_a_full_gpu_memory_is_one_line_that_names_the_flag(data, flags, capsys):
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        more = ("--device", "cuda", "--feature-batch-size", 5000, "--no-cache")
        assert train.main(flags(data, *TINY_FAST, *more)) == 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search("out of memory.*--feature-batch-size", line)
