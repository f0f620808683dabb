"""common.py: views, the device, networks, and the pass that computes features."""

import multiprocessing
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import faults
import numpy as np
import pytest
import torch
import torchvision
from faults import listing, put, within
from helpers import SCRIPTS, TINY, computed, extract, grey, home_flags, read_about
from torch import nn
from tqdm import std as tqdm_module

import common
import train
from cxr.errors import Failure


def test_views_are_the_image_its_mirror_image_and_small_changes_equal_everywhere(phantom):
    views = [common.make_view(phantom, number, "ab" * 32) for number in range(6)]
    assert views[0] is phantom
    assert (grey(views[1]) == grey(phantom)[:, ::-1]).all()
    for number, view in enumerate(views):
        torch.rand(3)  # numbers drawn before must not matter
        state = torch.get_rng_state()
        assert (grey(view) == grey(common.make_view(phantom, number, "ab" * 32))).all()
        assert torch.equal(torch.get_rng_state(), state)
    differences = [np.abs(grey(a) - grey(b)).mean() for a in views for b in views if a is not b]
    assert min(differences) > 2
    assert grey(common.make_view(phantom, 2, "cd" * 32)).mean() != grey(views[2]).mean()
    means = [grey(common.make_view(phantom, number, "00ff" * 16)).mean() for number in (0, 2, 3, 4)]
    assert means == pytest.approx([106.62, 93.47, 87.58, 96.50], abs=0.5)


@pytest.fixture
def simulate_machine(monkeypatch):
    """simulate_machine(cuda=2): torch answers as if the machine had two GPUs."""

    def simulate(cuda=0, bf16=True, mps=False, cpu=(), broken=""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        monkeypatch.setattr(common, "try_device", lambda name: broken if name != "cpu" else "")

    return simulate


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
def test_the_device_and_its_fast_dtype(simulate_machine, name, machine, device, dtype):
    simulate_machine(**machine)
    assert common.pick_device(name) == (torch.device(device), dtype)
    if "cuda" in device:
        assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "cuda:x", "", "cuda:2"])
def test_a_missing_device_is_refused(simulate_machine, name):
    simulate_machine(cuda=2 if name == "cuda:2" else 0)
    with pytest.raises(Failure, match="2 found" if name == "cuda:2" else f"--device {name}"):
        common.pick_device(name)


def test_a_rank_chooses_the_gpu_only_under_torchrun(simulate_machine, monkeypatch):
    simulate_machine(cuda=4)
    for name, value in (("LOCAL_RANK", "3"), ("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)  # a scheduler sets them, too
    assert common.pick_device("auto")[0] == torch.device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert common.pick_device("auto")[0] == torch.device("cuda:3")


def test_a_broken_gpu_is_refused_by_name_and_left_out_by_auto(simulate_machine, capsys):
    simulate_machine(cuda=1, broken="no kernel image")
    with pytest.raises(Failure, match=r"--device cuda:0 .*no kernel image") as failure:
        common.pick_device("cuda")
    assert failure.value.status == 4
    assert common.pick_device("auto")[0].type == "cpu"
    assert "cuda:0 cannot be used (no kernel image)" in capsys.readouterr().err


def test_a_device_is_tried_with_a_convolution(monkeypatch):
    assert common.try_device("cpu") == ""
    error = RuntimeError("CUDA error: no kernel image is available for execution")
    monkeypatch.setattr(nn.functional, "conv2d", Mock(side_effect=error))
    assert "CUDA error: no kernel image" in common.try_device("cpu")


def test_a_frozen_network_keeps_its_values_and_its_fast_copy_without_batchnorm_computes_the_same():
    network = common.build_backbone("resnet18").network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    fast = common.prepare_network(network, torch.device("cpu"), torch.float32, compiled=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(fast(x), network(x), rtol=1e-3, atol=1e-3)
    again = common.build_backbone("resnet18").network.state_dict()
    assert all(torch.equal(again[k], v) for k, v in network.state_dict().items())


def test_a_network_gets_its_input_as_its_published_weights_need():
    normalize = common.build_backbone("efficientnet_v2_l").normalize.transforms[-1]
    assert normalize.mean == normalize.std == [0.5, 0.5, 0.5]
    assert common.build_backbone("resnet18").normalize is common.NORMALIZE
    torch.manual_seed(0)
    network = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True)
    backbone = common.build_backbone("googlenet", network.state_dict(), "x")
    network.fc = nn.Identity()
    pixels = common.NORMALIZE(torch.zeros(1, 1, 224, 224, dtype=torch.uint8))
    with torch.no_grad():
        assert torch.allclose(backbone.network(pixels), network.eval()(pixels), atol=1e-5)


@pytest.mark.parametrize("arch", ["densenet121", "mobilenet_v3_small", "vgg11", "vit_b_32"])
def test_a_state_dict_of_another_architecture_can_be_loaded(arch):
    backbone = common.build_backbone(arch)
    head = {"weight": torch.zeros(1, backbone.width), "bias": torch.zeros(1)}
    head = {f"{backbone.head_name}.{name}": tensor for name, tensor in head.items()}
    again = common.build_backbone(arch, backbone.network.state_dict() | head)
    assert again.weight.shape == (1, backbone.width)
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        features = backbone.network(pixels)
        assert torch.equal(again.network(pixels), features)
    assert features.shape == (2, backbone.width)


@pytest.fixture(scope="module")
def features(backbone, images):
    features, readable, unreadable = extract(backbone, images, 3)
    assert readable == images and not unreadable
    return features


@pytest.mark.parametrize("row", [0, 7])
def test_features_are_the_output_of_the_plain_network(backbone, images, features, row):
    assert features.shape == (12, 3, 8) and features.dtype == torch.float32
    picture = common.load_image(images[row].path, 2)
    view = common.make_view(picture, 2, images[row].sha256).convert("RGB")
    pixels = torchvision.transforms.functional.to_tensor(view)
    pixels = torchvision.transforms.functional.normalize(pixels, common.MEAN, common.STD)
    plain = backbone.network(pixels[None])[0]
    assert torch.allclose(features[row, 2], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_do_not_depend_on_order_workers_and_the_rank_of_a_scheduler(
    backbone, images, features, workers, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    backwards, *_ = extract(backbone, images[::-1], 3, workers=workers)
    assert torch.equal(backwards.flip(0), features)


@pytest.mark.parametrize("n_views", [1, 2, 3, 5, 9])
def test_features_do_not_depend_on_the_other_images_of_the_batch(backbone, images, n_views):
    together, *_ = extract(backbone, images, n_views)
    alone, *_ = extract(backbone, images[5:6], n_views)
    assert torch.equal(alone[0], together[5])
    first, *_ = extract(backbone, images, 1)
    assert torch.equal(first[:, 0], together[:, 0])


@pytest.mark.parametrize("watched", [False, True])
def test_the_pass_uses_the_fast_copy_without_batchnorm(backbone, images, monkeypatch, watched):
    fuse = Mock(side_effect=common.fuse)
    monkeypatch.setattr(common, "fuse", fuse)
    extract(backbone, images[:2], 1, on_image=Mock() if watched else None)
    fuse.assert_called_once()


def test_the_pass_shows_each_image_that_it_decodes(backbone, images, tmp_path):
    on_image = Mock()
    extract(backbone, images[:2], 3, cache=tmp_path, on_image=on_image)
    (first, _), (second, pixels) = (call.args for call in on_image.call_args_list)
    assert [first, second] == images[:2]
    view, *_ = common.Views(images[:2], 3, 2.0)[1][1]
    assert np.array_equal(pixels, view[0])
    on_image.reset_mock()
    extract(backbone, images[:3], 3, cache=tmp_path, on_image=on_image)
    assert on_image.call_args.args[0] == images[2]
    on_image.assert_called_once()  # the first two images came from the cache


@pytest.mark.parametrize("n_views", [1, 3, 9])
def test_all_batches_have_the_same_shape(backbone, images, monkeypatch, n_views):
    shapes, prepare_network = set(), common.prepare_network

    def prepare_recording_network(*args):
        network = prepare_network(*args)

        def forward(x):
            shapes.add(tuple(x.shape))
            return network(x)

        return forward

    monkeypatch.setattr(common, "prepare_network", prepare_recording_network)
    extract(backbone, images[:5], n_views)
    assert shapes == {(4, 3, 224, 224)}


def test_features_in_bfloat16_are_close_to_float32(images):
    backbone = common.build_backbone("resnet18")
    exact, *_ = extract(backbone, images[:4], 2)
    fast, *_ = extract(backbone, images[:4], 2, dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    fast = fast.float()
    assert not torch.equal(fast, exact)
    assert (fast - exact).abs().max() < 0.05 * exact.abs().max()
    assert nn.functional.cosine_similarity(fast, exact, dim=2).min() > 0.999


@pytest.fixture
def slow_pass(backbone, images, monkeypatch, capsys):
    """slow_pass(seconds) computes 48 views in 12 batches that take so long; returns stderr."""

    def call(seconds, **options):
        clock = [0.0]

        def normalize(pixels):
            clock[0] += seconds
            return backbone.normalize(pixels)

        monkeypatch.setattr(tqdm_module, "time", lambda: clock[0])
        extract(backbone._replace(normalize=normalize), images, 4, **options)
        return capsys.readouterr().err

    return call


def test_a_log_file_gets_one_line_of_progress_every_30_seconds(slow_pass):
    log = slow_pass(20)
    assert log.isascii() and log.endswith("\n")
    first, *_, last = lines = log.split("\r")[1:]  # tqdm begins a line with \r
    assert len(lines) == 7  # 6 times 40 s, and the end
    assert first.startswith("Features:   8%|") and "| 4/48 [00:40<07:20, " in first
    assert last.startswith("Features: 100%|") and "| 48/48 [04:00<00:00, " in last


def test_a_pass_of_less_than_30_seconds_prints_no_progress_into_a_log_file(slow_pass):
    assert slow_pass(2) == ""


def test_a_terminal_shows_the_progress_at_once_and_under_torchrun_only_that_of_rank_0(
    slow_pass, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert slow_pass(2).startswith("\rFeatures:   0%|")
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(common, "wait_for_all_ranks", lambda: None)
    assert slow_pass(2, cache=tmp_path) == ""


def test_an_output_that_is_not_finite_is_refused_with_3(images):
    backbone = common.build_backbone("tinynet")
    backbone.network.conv.weight.data.fill_(float("inf"))
    with pytest.raises(Failure, match="not finite") as caught:
        extract(backbone, images, 1)
    assert caught.value.status == 3


def test_after_a_device_fails_in_the_middle_the_next_run_computes_only_the_rest(
    backbone, images, tmp_path, monkeypatch, capsys
):
    expected, *_ = extract(backbone, images, 1)
    prepare_network, calls = common.prepare_network, []

    def prepare_failing_network(*args):
        network = prepare_network(*args)

        def forward(x):
            calls.append(x)
            if len(calls) == 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return network(x)

        return forward

    with monkeypatch.context() as patch:
        patch.setattr(common, "prepare_network", prepare_failing_network)
        with pytest.raises(Failure, match=r"illegal memory access.*--device cpu") as failure:
            extract(backbone, images, 1, tmp_path)
    assert failure.value.status == 4
    capsys.readouterr()
    features, *_ = extract(backbone, images, 1, tmp_path)
    assert torch.equal(features, expected) and computed(capsys) == 8  # 4 of 12 were stored


def test_workers_that_cannot_start_end_the_run_with_4(run_train, monkeypatch, capsys):
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    error = FileNotFoundError(2, "No such file or directory")
    monkeypatch.setattr(loader, "__init__", Mock(side_effect=error))
    assert run_train("--no-cache", "--workers", 2) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot start" in line and "--workers 0" in line


def test_a_file_without_permission_is_not_an_unreadable_image(data, flags, monkeypatch, capsys):
    denied, read_bytes = faults.first(data / "train"), Path.read_bytes

    def deny(path):
        if path == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert train.main(flags(data, *TINY, "--skip-bad")) == 2
    assert f"train.py: {denied}: Permission denied" in capsys.readouterr().err


def test_a_worker_that_dies_ends_the_run_with_one_line(refused, home):
    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        children[0].kill()

    before = listing(home)
    threading.Thread(target=kill, daemon=True).start()
    with within(60):
        assert "--workers 0" in refused(4, "train", "--workers", 1, "--no-cache")
    assert listing(home) == before


@pytest.mark.parametrize(("script", "split"), [("train", "train"), ("evaluate", "test")])
def test_unreadable_images_end_the_run_or_are_skipped(run_script, home, capsys, script, split):
    images = {f"bad{i}{image[0]}": image[1] for i, image in enumerate(faults.BAD_IMAGES.values())}
    for name, content in images.items():
        put(home / "data/train/NORMAL" / name, content)
        put(home / "data/test/NORMAL" / name, content)
    paths = [home / "data" / split / "NORMAL" / name for name in images]
    results = listing(home / "results")
    status, lines = run_script(script)
    assert status == 2 and len(lines) == 5
    assert listing(home / "results") == results
    for line in lines:
        assert sum(f"{path}: " in line for path in paths) == 1
    assert f"(and {len(paths) - 1} more; split_val.py --check --json check.json" in lines[-1]
    assert SCRIPTS[script].main(home_flags(script, home, "--skip-bad")) == 0
    errors = capsys.readouterr().err
    assert sum(f"left out: {path}: " in errors for path in paths) == 5
    assert errors.count("; repair it or remove it\n") == 5
    assert f"left out: {len(paths)} images in all" in errors
    if script == "train":
        names = [str(path.relative_to(home / "data")) for path in paths]
        assert sorted(read_about(home)["skipped"]) == sorted(names)
