"""common.py: views, the device, networks, and the pass that computes features."""

import json
import multiprocessing
import re
import threading
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
import torchvision
from faults import listing, put, within
from helpers import SCRIPTS, TINY, TINY_FAST, extract, grey, home_flags
from torch import nn
from torchvision import transforms

import common
import train
from cxr.errors import Failure

TO_TENSOR = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]
)


# ---------------------------------------------------------------- views


def test_views_are_the_image_its_mirror_image_and_fixed_small_changes(phantom):
    views = [common.make_view(phantom, number, "ab" * 32) for number in range(6)]
    assert views[0] is phantom
    assert (grey(views[1]) == grey(phantom)[:, ::-1]).all()
    for number, view in enumerate(views):
        torch.rand(3)  # what was drawn before must not matter
        assert (grey(view) == grey(common.make_view(phantom, number, "ab" * 32))).all()
    differences = [np.abs(grey(a) - grey(b)).mean() for a in views for b in views if a is not b]
    assert min(differences) > 2
    assert grey(common.make_view(phantom, 2, "cd" * 32)).mean() != grey(views[2]).mean()


def test_drawing_a_view_leaves_the_random_state_alone(phantom):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    common.make_view(phantom, 5, "ef" * 32)
    assert torch.equal(torch.rand(2), expected)


def test_views_are_pinned_so_that_every_machine_draws_the_same(phantom):
    means = [grey(common.make_view(phantom, number, "00ff" * 16)).mean() for number in (0, 2, 3, 4)]
    assert means == pytest.approx([106.62, 93.47, 87.58, 96.50], abs=0.5)


# ---------------------------------------------------------------- device


class Machine:
    """Stands in for hardware: the answers that torch would give."""

    def __init__(self, monkeypatch, cuda=0, bf16=True, mps=False, cpu=(), broken=""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        monkeypatch.setattr(common, "try_device", lambda name: broken if name != "cpu" else "")


@pytest.mark.parametrize(
    ("name", "machine", "device", "dtype"),
    [
        ("auto", {"cuda": 1, "mps": True}, "cuda:0", torch.bfloat16),
        ("auto", {"cuda": 1, "bf16": False}, "cuda:0", torch.float16),
        ("auto", {"mps": True}, "mps", torch.float32),
        ("auto", {}, "cpu", torch.float32),
        ("auto", {"cpu": ["avx512_bf16"]}, "cpu", torch.bfloat16),
        ("cpu", {"cuda": 2, "cpu": ["bf16"]}, "cpu", torch.bfloat16),
        ("cuda:1", {"cuda": 2}, "cuda:1", torch.bfloat16),
    ],
)
def test_the_device_and_its_fast_precision(monkeypatch, name, machine, device, dtype):
    Machine(monkeypatch, **machine)
    assert common.pick_device(name) == (torch.device(device), dtype)


def test_on_cuda_what_is_scored_is_not_rounded_to_tf32(monkeypatch):
    Machine(monkeypatch, cuda=1)
    common.pick_device("auto")
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "cuda:x", ""])
def test_a_device_that_is_absent_is_refused(monkeypatch, name):
    Machine(monkeypatch)
    with pytest.raises(Failure, match="--device"):
        common.pick_device(name)


def test_the_last_gpu_exists_and_the_one_after_does_not(monkeypatch):
    Machine(monkeypatch, cuda=2)
    assert common.pick_device("cuda:1")[0].index == 1
    with pytest.raises(Failure, match="2 found"):
        common.pick_device("cuda:2")


def test_each_process_of_torchrun_gets_its_own_gpu(monkeypatch):
    Machine(monkeypatch, cuda=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert common.pick_device("auto")[0] == torch.device("cuda:3")


def test_a_rank_without_torchrun_takes_the_first_gpu(monkeypatch):
    Machine(monkeypatch, cuda=1)
    monkeypatch.setenv("LOCAL_RANK", "3")  # of a scheduler
    assert common.pick_device("auto")[0] == torch.device("cuda:0")


def test_a_gpu_that_cannot_be_used_is_said_and_the_cpu_taken(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(nn.functional, "conv2d", broken)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
    with pytest.raises(Failure, match="no kernel image") as failure:
        common.pick_device("cuda")
    assert failure.value.status == 4
    monkeypatch.setattr(nn.functional, "conv2d", lambda x, w: x if calls.pop() else broken())
    calls = [True, False]
    assert common.pick_device("auto")[0].type == "cpu"
    assert "cuda cannot be used (CUDA error: no kernel image" in capsys.readouterr().err


# ---------------------------------------------------------------- networks


def test_frozen_means_no_gradient_and_eval_mode_for_good(backbone):
    modules = list(backbone.network.modules())
    assert not any(module.training for module in modules)
    assert not any(p.requires_grad for p in backbone.network.parameters())
    again = common.build_backbone("tinynet").network.state_dict()
    assert all(torch.equal(again[k], v) for k, v in backbone.network.state_dict().items())


def test_batchnorm_is_folded_and_the_copy_computes_the_same(images):
    network = common.build_backbone("resnet18").network
    fast = common.prepare_network(network, torch.device("cpu"), torch.float32, compiled=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(fast(x), network(x), rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize("arch", ["densenet121", "mobilenet_v3_small", "vgg11", "vit_b_32"])
def test_other_architectures_load_back(arch):
    backbone = common.build_backbone(arch)
    state = backbone.network.state_dict()
    state[f"{backbone.head_name}.weight"] = torch.zeros(1, backbone.width)
    state[f"{backbone.head_name}.bias"] = torch.zeros(1)
    again = common.build_backbone(arch, state)
    assert again.weight.shape == (1, backbone.width)
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again.network(pixels), backbone.network(pixels))
        assert backbone.network(pixels).shape == (2, backbone.width)


# ---------------------------------------------------------------- the pass


def test_features_are_those_of_the_plain_network_whatever_the_order_and_the_workers(
    backbone, images
):
    features, bad = extract(backbone, images, 3)
    assert not bad and features.shape == (12, 3, 8) and features.dtype == torch.float32
    for row in (0, 7):
        picture = common.load_image(images[row].path, 2)
        view = common.make_view(picture, 2, images[row].sha256).convert("RGB")
        plain = backbone.network(TO_TENSOR(view)[None])[0]
        assert torch.allclose(features[row, 2], plain, rtol=1e-4, atol=1e-5)
    backwards, _ = extract(backbone, images[::-1], 3)
    assert torch.equal(backwards.flip(0), features)
    by_workers, _ = extract(backbone, images, 3, workers=2)
    assert torch.equal(by_workers, features)


@pytest.mark.parametrize("n_views", [1, 2, 3, 5, 9])
def test_a_vector_does_not_depend_on_its_companions_in_the_batch(backbone, images, n_views):
    together, _ = extract(backbone, images, n_views)
    alone, _ = extract(backbone, images[5:6], n_views)
    assert torch.equal(alone[0], together[5])
    first, _ = extract(backbone, images, 1)
    assert torch.equal(first[:, 0], together[:, 0])


def test_training_views_in_bfloat16_are_close_to_float32(images):
    backbone = common.build_backbone("resnet18")
    exact, _ = extract(backbone, images[:4], 2)
    fast, _ = extract(backbone, images[:4], 2, dtype=torch.bfloat16)
    assert fast.dtype == torch.float32 and not torch.equal(fast, exact)
    assert (fast - exact).abs().max() < 0.05 * exact.abs().max()
    similar = torch.nn.functional.cosine_similarity(fast, exact, dim=2)
    assert similar.min() > 0.999


def test_a_rank_that_is_not_torchrun_s_is_ignored(backbone, images, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    features, _ = extract(backbone, images, 1)
    assert (features.abs().sum((1, 2)) > 0).all()


def test_an_output_that_is_not_finite_is_refused_with_3(images):
    backbone = common.build_backbone("tinynet")
    backbone.network.conv.weight.data.fill_(float("inf"))
    with pytest.raises(Failure, match="not finite") as caught:
        extract(backbone, images, 1)
    assert caught.value.status == 3


def test_a_log_file_hears_of_a_slow_pass(data, flags, monkeypatch, capsys):
    monkeypatch.setattr(common, "LOG_EVERY", 0)
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert re.search(r"Features: \d+ of 80 views, \d+ s left", capsys.readouterr().out)


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


def test_a_decoding_process_that_dies_is_one_line(refused, home):
    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        children[0].kill()

    old = listing(home)
    threading.Thread(target=kill, daemon=True).start()
    with within(60):
        assert "--workers 0" in refused(4, "train", "--workers", 1, "--no-cache")
    assert listing(home) == old


def test_bad_images_are_all_named_and_left_out_only_when_asked(run_script, home, capsys):
    bad = {"train": [], "test": []}
    for i, (file, content, _) in enumerate(faults.BAD_IMAGES.values()):
        for split, paths in bad.items():
            paths.append(home / "data" / split / "NORMAL" / f"bad{i}{file}")
            put(paths[-1], content)
    for script, split in (("train", "train"), ("evaluate", "test")):
        status, lines = run_script(script)
        assert status == 2 and len(lines) == 5
        assert f"(and {len(bad[split]) - 1} more; split_val.py --check lists all)" in lines[-1]
        assert SCRIPTS[script].main(home_flags(script, home, "--skip-bad")) == 0
        errors = capsys.readouterr().err
        assert sum(f"left out: {path}: " in errors for path in bad[split]) == 5
        assert f"left out: {len(bad[split])} images in all" in errors
    names = sorted(str(path.relative_to(home / "data")) for path in bad["train"])
    assert sorted(json.loads((home / "model.json").read_text())["skipped"]) == names
    report = json.loads((home / "results" / "metrics.json").read_text())
    assert report["unreadable"] == len(names) and report["n"] == 12
