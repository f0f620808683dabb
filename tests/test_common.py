"""common.py: images, views, the device, the feature store and the one pass."""

import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torchvision
from phantoms import draw_folder, draw_phantom
from PIL import Image

import common

ROOT = Path(__file__).resolve().parent.parent


def save(path, pixels, mode=None, **options):
    Image.fromarray(np.asarray(pixels), mode).save(path, **options)
    return path


RAMP = np.tile(np.arange(256, dtype=np.uint8), (256, 1))


# ---------------------------------------------------------------- images


def test_sixteen_bit_greyscale_is_windowed_by_its_own_minimum_and_maximum(tmp_path):
    path = save(tmp_path / "pacs.png", (RAMP.astype(np.uint16) * 16 + 1000))
    assert (np.asarray(common.load_image(path)) == RAMP).all()
    path = save(tmp_path / "float.tiff", RAMP.astype(np.float32) / 255 - 0.5)
    assert (np.asarray(common.load_image(path)) == RAMP).all()


def test_alpha_palette_and_cmyk_come_out_with_their_grey_levels(tmp_path):
    grey = Image.fromarray(RAMP)
    files = {
        "rgba.png": Image.merge("RGBA", (grey, grey, grey, Image.new("L", grey.size, 255))),
        "la.png": Image.merge("LA", (grey, Image.new("L", grey.size, 255))),
        "palette.png": grey.convert("P"),
        "cmyk.tiff": grey.convert("RGB").convert("CMYK"),
        "grey.webp": grey.convert("RGB"),
        "grey.bmp": grey,
    }
    for name, image in files.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert (np.asarray(common.load_image(tmp_path / name).convert("RGB")) == RAMP[..., None]).all(), name


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    image = Image.fromarray(RAMP[:, :128])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(common.load_image(tmp_path / "turned.png"))
    assert upright.shape == (128, 256) and (upright == np.rot90(RAMP[:, :128], -1)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"GIF", "no image"),
    ],
)
def test_a_file_that_is_no_image_is_explained(tmp_path, content, reason):
    path = tmp_path / "x.jpeg"
    path.write_bytes(content)
    with pytest.raises(OSError) as caught:
        common.load_image(path)
    assert reason in common.explain_unreadable(path, caught.value)


def test_bombs_and_pictures_of_two_colours_are_refused(tmp_path):
    for size, message in ((9000, "9000x9000 pixels"), (14000, "196000000 pixels")):
        Image.new("1", (size, size)).save(tmp_path / "bomb.png")
        with pytest.raises((ValueError, Image.DecompressionBombError), match=message):
            common.load_image(tmp_path / "bomb.png")
    Image.new("1", (64, 64)).save(tmp_path / "two.png")
    with pytest.raises(ValueError, match="two colours"):
        common.load_image(tmp_path / "two.png")


def test_a_large_jpeg_is_decoded_small_but_never_below_what_the_resize_needs(tmp_path):
    picture = draw_phantom(np.random.default_rng(0), True, 1200).resize((1500, 1200))
    picture.save(tmp_path / "large.jpeg", quality=95)
    image = common.load_image(tmp_path / "large.jpeg")
    assert min(image.size) >= common.SIZE and max(image.size) < 750
    whole = Image.open(tmp_path / "large.jpeg")
    small, full = (np.asarray(common.make_view(i, 0, "")).astype(float) for i in (image, whole))
    assert np.abs(small - full).mean() < 2
    for size in (224, 225, 447, 448, 449, 1791, 1792):
        Image.new("L", (size, size + 9)).save(tmp_path / "x.jpeg")
        assert min(common.load_image(tmp_path / "x.jpeg").size) >= common.SIZE


def test_views_are_the_image_its_mirror_image_and_fixed_small_changes():
    image = draw_phantom(np.random.default_rng(0), True).convert("RGB")
    views = [np.asarray(common.make_view(image, number, "ab")).astype(int) for number in range(10)]
    assert (views[0] == np.asarray(image)).all() and (views[1] == views[0][:, ::-1]).all()
    again = [np.asarray(common.make_view(image, number, "ab")).astype(int) for number in range(10)]
    assert all((a == b).all() for a, b in zip(views, again, strict=True))
    for number, view in enumerate(views[2:], 2):
        assert view.shape == (224, 224, 3) and all((view != other).any() for other in views[:number])
        assert min(np.abs(view - views[0]).mean(), np.abs(view - views[1]).mean()) < 50
    assert (views[2] != np.asarray(common.make_view(image, 2, "cd"))).any()


def test_grey_and_colour_files_of_the_same_pixels_give_the_same_views():
    grey = draw_phantom(np.random.default_rng(0), True, 300)
    for number in range(6):
        views = [np.asarray(common.make_view(image, number, "ab")) for image in (grey, grey.convert("RGB"))]
        assert views[0].shape == (224, 224, 3) and (views[0] == views[1]).all()


def test_views_are_pinned_so_that_every_machine_draws_the_same():
    image = draw_phantom(np.random.default_rng(0), False).convert("RGB")
    found = [float(np.asarray(common.make_view(image, number, "00ff")).mean()) for number in (0, 2, 3, 4, 5)]
    assert found == pytest.approx([107.9, 123.08, 133.58, 99.92, 101.91], abs=0.5)


# ---------------------------------------------------------------- device


class Stand:
    """Stands in for hardware: the answers that torch would give."""

    def __init__(self, monkeypatch, cuda=0, bf16=True, mps=False, cpu=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True))


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
def test_the_device_and_its_precision(monkeypatch, name, machine, device, dtype):
    Stand(monkeypatch, **machine)
    assert common.pick_device(name) == (torch.device(device), dtype)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "cuda:x", ""])
def test_a_device_that_is_absent_is_refused(monkeypatch, name):
    Stand(monkeypatch)
    with pytest.raises(common.Failure, match="--device"):
        common.pick_device(name)


def test_the_last_gpu_exists_and_the_one_after_does_not(monkeypatch):
    Stand(monkeypatch, cuda=2)
    with pytest.raises(common.Failure, match="2 found"):
        common.pick_device("cuda:2")


def test_each_process_of_torchrun_gets_its_own_gpu(monkeypatch):
    Stand(monkeypatch, cuda=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert common.pick_device("auto")[0] == torch.device("cuda:3")


# ---------------------------------------------------------------- the pass and its store


@pytest.fixture(scope="module")
def network():
    return common.build_network("resnet18")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "data"
    draw_folder(folder, train=6, test=1, size=64)
    return common.read_split(folder, "train")["train"]


def extract(network, images, views, cache, **changes):
    values = {"cache_dir": cache, "no_cache": cache is None, "batch_size": 4, "workers": 0}
    device, dtype = common.pick_device("cpu")
    args = Namespace(**(values | changes))
    return common.extract_features(network[0], network[2], images, views, args, device, dtype)


def computed(capsys):
    """The number of features that the runs since the last call computed."""
    return sum(int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if "computed in" in line)


def test_features_are_those_of_the_plain_network_whatever_the_batch_order_and_workers(network, images, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    features, bad = extract(network, images, [2] * 12, None)
    assert not bad and features.shape == (12, 2, 512) and features.dtype == torch.float32
    mean, std = torch.tensor(common.MEAN).view(3, 1, 1), torch.tensor(common.STD).view(3, 1, 1)
    for row in (0, 7):
        pixels = np.asarray(common.make_view(common.load_image(images[row].path), 1, images[row].digest))
        with torch.no_grad():
            plain = network[0](((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)[None])[0]
        assert torch.allclose(features[row, 1], plain, rtol=1e-3, atol=1e-3)
    backwards, _ = extract(network, images[::-1], [2] * 12, None)
    assert torch.equal(backwards.flip(0), features)
    workers, _ = extract(network, images, [2] * 12, None, workers=2)
    assert torch.equal(workers, features)


def test_a_vector_does_not_depend_on_its_companions_in_the_batch(network, images):
    together, _ = extract(network, images, [3] * 12, None)
    alone, _ = extract(network, images[5:6], [3], None)
    assert torch.equal(alone[0], together[5])


def test_the_store_gives_back_what_was_computed_and_only_the_missing_is_computed(network, images, tmp_path, capsys):
    first, _ = extract(network, images[:8], [2] * 8, tmp_path)
    assert computed(capsys) == 16
    again, _ = extract(network, images[:8], [2] * 8, tmp_path)
    assert computed(capsys) == 0 and torch.equal(again, first)
    more, _ = extract(network, images, [3] * 8 + [1] * 4, tmp_path)
    assert computed(capsys) == 8 + 4 and torch.equal(more[:8, :2], first)
    fresh, _ = extract(network, images, [3] * 12, None)
    assert torch.equal(more[:8], fresh[:8]) and torch.equal(more[8:, 0], fresh[8:, 0])


def test_a_moved_image_costs_nothing_and_a_copy_is_computed_once(network, images, tmp_path, capsys):
    twin = tmp_path / "elsewhere.jpeg"
    twin.write_bytes(images[0].path.read_bytes())
    both = [images[0], common.Image(twin, 1, common.hash_file(twin))]
    features, _ = extract(network, both, [2, 2], tmp_path / "cache")
    assert computed(capsys) == 2 and torch.equal(features[0], features[1])


def test_other_weights_precision_or_preprocessing_never_reuse_a_vector(network, images, tmp_path, monkeypatch, capsys):
    extract(network, images, [2] * 12, tmp_path)
    assert computed(capsys) == 24
    other = common.build_network("resnet18")
    other[0].conv1.weight.data[0, 0, 0, 0] += 1e-3
    extract(other, images, [2] * 12, tmp_path)
    assert computed(capsys) == 24
    other = common.build_network("resnet18")
    other[0].relu = torch.nn.Hardtanh(0, 0.5)  # the same weights in another network
    extract(other, images, [2] * 12, tmp_path)
    assert computed(capsys) == 24

    def make_view(image, number, digest, true=common.make_view):
        return true(image, number + 2, digest)

    def load_image(path, true=common.load_image):
        return true(path).rotate(180)

    changes = {"MEAN": (0.5, 0.5, 0.5), "STD": (0.5, 0.5, 0.5), "make_view": make_view, "load_image": load_image}
    changes = [(common, name, value) for name, value in (changes | {"SIZE": 192}).items()]
    for place, name, value in [*changes, (PIL, "__version__", "0.1"), (torchvision, "__version__", "0.1")]:
        monkeypatch.setattr(place, name, value)
        extract(network, images, [2] * 12, tmp_path)
        assert computed(capsys) == 24, name
        monkeypatch.undo()
    native = torch.cpu.get_capabilities()
    other_precision = {} if native.get("avx512_bf16") or native.get("amx_bf16") else {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: other_precision)
    extract(network, images, [2] * 12, tmp_path)
    assert computed(capsys) == 24
    monkeypatch.undo()
    extract(network, images, [2] * 12, tmp_path)
    assert computed(capsys) == 0


def test_a_flipped_bit_is_computed_again_and_said(network, images, tmp_path, capsys):
    first, _ = extract(network, images, [1] * 12, tmp_path)
    (path,) = tmp_path.glob("*/*.features")
    content = path.read_bytes()
    for position in (3, 50, len(content) // 2, len(content) - 2):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        for extra in tmp_path.glob("*/*.features"):
            extra.unlink() if extra != path else None
        capsys.readouterr()
        again, _ = extract(network, images, [1] * 12, tmp_path)
        captured = capsys.readouterr()
        assert torch.equal(again, first) and "1 damaged records" in captured.err and "Features: 1 comp" in captured.out


def test_a_record_torn_by_a_kill_is_computed_again(network, images, tmp_path, capsys):
    first, _ = extract(network, images, [1] * 12, tmp_path)
    (path,) = tmp_path.glob("*/*.features")
    content = path.read_bytes()
    size = len(content) // 12
    for length in (0, 1, size - 1, size, 5 * size + 7, 12 * size - 1):
        for file in tmp_path.glob("*/*.features"):
            file.unlink()
        path.write_bytes(content[:length])
        capsys.readouterr()
        again, _ = extract(network, images, [1] * 12, tmp_path)
        assert torch.equal(again, first) and computed(capsys) == 12 - length // size


def test_an_image_is_decoded_once_for_all_its_views(network, images, monkeypatch):
    true, decoded = common.load_image, []
    monkeypatch.setattr(common, "load_image", lambda path: (decoded.append(path), true(path))[1])
    extract(network, images, [5] * 12, None)
    assert len(decoded) == len(images)


def test_an_image_that_changes_between_its_hash_and_the_pass_is_never_stored(network, images, tmp_path, monkeypatch):
    path = tmp_path / "x.jpeg"
    path.write_bytes(images[0].path.read_bytes())
    image = common.Image(path, 0, common.hash_file(path))
    path.write_bytes(images[1].path.read_bytes())  # a copy that still runs, say
    features, bad = extract(network, [image], [2], tmp_path / "cache")
    assert bad == {0: "its content changed during this run"} and not list(tmp_path.glob("cache/*/*.features"))
    path.write_bytes(images[0].path.read_bytes())
    features, bad = extract(network, [image], [2], tmp_path / "cache")
    assert not bad and torch.equal(features, extract(network, images[:1], [2], None)[0])


def test_a_rank_that_is_not_torchrun_s_is_ignored(network, images, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    features, _ = extract(network, images, [1] * 12, None)
    assert features.abs().sum((1, 2)).min() > 0


def test_no_format_is_tried_that_pillow_hands_to_another_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n%%EndComments\nshowpage\n")
    assert common.read_or_explain(common.load_image, tmp_path / "x.png") == "no image, or of an unknown format"
    assert not (tmp_path / "ran").exists()


def test_a_killed_run_loses_at_most_the_batch_in_flight(network, images, tmp_path, capsys):
    """SIGKILL when the third batch enters the network: two batches are in the store."""
    code = (
        "import os, signal, sys, common\n"
        "from argparse import Namespace\n"
        "from pathlib import Path\n"
        "true, calls = common.fast_copy, []\n"
        "def fast_copy(*args):\n"
        "    fast = true(*args)\n"
        "    def forward(batch):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return fast(batch)\n"
        "    return forward\n"
        "common.fast_copy = fast_copy\n"
        "network, _, width, _ = common.build_network('resnet18')\n"
        "images = common.read_split(sys.argv[1], 'train')['train']\n"
        "args = Namespace(cache_dir=Path(sys.argv[2]), no_cache=False, batch_size=4, workers=0)\n"
        "device, dtype = common.pick_device('cpu')\n"
        "common.extract_features(network, width, images, [2] * len(images), args, device, dtype)\n"
    )
    data = images[0].path.parents[2]
    killed = subprocess.run([sys.executable, "-c", code, str(data), str(tmp_path)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    extract(network, images, [2] * 12, tmp_path)
    assert computed(capsys) == 24 - 8


def test_several_processes_fill_one_store_at_the_same_time(network, images, tmp_path, capsys):
    code = (
        "import sys, common\n"
        "from argparse import Namespace\n"
        "from pathlib import Path\n"
        "network, _, width, _ = common.build_network('resnet18')\n"
        "images = common.read_split(sys.argv[1], 'train')['train']\n"
        "args = Namespace(cache_dir=Path(sys.argv[2]), no_cache=False, batch_size=4, workers=0)\n"
        "device, dtype = common.pick_device('cpu')\n"
        "common.extract_features(network, width, images, [2] * len(images), args, device, dtype)\n"
    )
    data = images[0].path.parents[2]
    racers = [subprocess.Popen([sys.executable, "-c", code, str(data), str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [racer.wait(120) for racer in racers] == [0, 0, 0]
    stored, _ = extract(network, images, [2] * 12, tmp_path)
    assert computed(capsys) == 0
    assert torch.equal(stored, extract(network, images, [2] * 12, None)[0])


def test_a_rank_that_starts_late_computes_its_own_share_and_no_more(network, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "share_reasons", lambda store, reasons: reasons)
    monkeypatch.setattr(common, "rank_and_world", lambda: (0, 2))
    with pytest.raises(common.Failure, match="12 are missing"):
        extract(network, images, [2] * 12, tmp_path)
    monkeypatch.setattr(common, "rank_and_world", lambda: (1, 2))  # it finds in the store what the other has done
    features, _ = extract(network, images, [2] * 12, tmp_path)
    assert computed(capsys) == 24
    monkeypatch.undo()
    assert torch.equal(features, extract(network, images, [2] * 12, None)[0])


def test_what_is_no_file_in_the_store_is_passed_over(network, images, tmp_path, capsys):
    first, _ = extract(network, images, [1] * 12, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "a.features").mkdir()
    (folder / "b.features").symlink_to("nowhere")
    again, _ = extract(network, images, [1] * 12, tmp_path)
    assert torch.equal(again, first) and capsys.readouterr().err.count("passed over") == 2


def test_a_full_disk_is_told_before_the_pass(network, images, tmp_path, monkeypatch):
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: Namespace(free=1000))
    with pytest.raises(common.Failure, match=r"bytes needed, 1,000 free.*--no-cache") as caught:
        extract(network, images, [1] * 12, tmp_path)
    assert caught.value.status == 4 and not list(tmp_path.iterdir())


def test_batchnorm_is_folded_where_the_network_can_be_traced(network):
    device = torch.device("cpu")
    fast = common.fast_copy(network[0], device, torch.float32)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in network[0].modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(fast(x), network[0](x), rtol=1e-3, atol=1e-3)

    class Untraceable(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    untraced = common.fast_copy(Untraceable(), device, torch.float32)
    assert torch.equal(untraced(torch.ones(2)), 2 * torch.ones(2))


def nasty_network():
    """Convolutions whose sums may not be written into either of them, one called twice, one not for oneDNN."""

    class Nasty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
            self.same = torch.nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect")
            self.act = torch.nn.ReLU(inplace=True)

        def forward(self, x):
            a = self.a(x)
            b = self.act(self.b(a) + a)  # a is needed again
            c = self.act(self.c(b))
            b += self.act(self.c(c) + c)  # c is called twice
            d = self.act(a + self.d(b))
            e = self.act(self.same(d) + self.act(d) + self.b(d[:, :, ::2]).mean())
            return self.act(e + self.d(e)) + self.act(x) + a

    return Nasty()


@pytest.mark.parametrize("arch", ["resnet50", "regnet_y_400mf", "densenet121", "mobilenet_v3_small", "nasty"])
def test_fused_convolutions_compute_what_the_network_computes(arch):
    torch.manual_seed(0)
    network = nasty_network().eval() if arch == "nasty" else common.build_network(arch)[0]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # fresh ones do nothing
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    fast = common.fast_copy(network, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        for size in (96, 96, 64):
            x = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
            expected, given = network(x.clone()), x.clone(memory_format=torch.preserve_format)
            assert torch.allclose(fast(given), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
            assert arch == "nasty" or torch.equal(given, x)


def test_all_convolutions_of_a_resnet_are_fused_on_a_cpu_of_intel_or_amd(monkeypatch):
    network, device = common.build_network("resnet18")[0], torch.device("cpu")
    monkeypatch.setattr(common.platform, "machine", lambda: "x86_64")
    nodes = common.fast_copy(network, device, torch.float32).graph.nodes
    assert sum("relu" in node.kwargs for node in nodes) == 17 - 2  # two additions are of a pooling's output
    assert sum(len(node.args) == 2 for node in nodes if node.op == "call_module") == 6
    monkeypatch.setattr(common.platform, "machine", lambda: "arm64")
    assert any(isinstance(m, torch.nn.ReLU) for m in common.fast_copy(network, device, torch.float32).modules())


@pytest.mark.parametrize("fault", ["absent", "wrong"])
def test_operators_that_are_absent_or_compute_something_else_are_not_used(fault, network, images, monkeypatch):
    def fuse(fused):
        if fault == "absent":
            raise AttributeError("no such operator")
        fused.get_submodule("layer4.1.conv2").bias += 1
        return fused

    expected, _ = extract(network, images, [1] * 12, None)
    monkeypatch.setattr(common, "fuse_convolutions", fuse)
    found, _ = extract(network, images, [1] * 12, None)
    assert torch.allclose(found, expected, rtol=0, atol=0.02 * expected.abs().max())


def test_an_output_that_is_not_finite_is_refused(images):
    network = common.build_network("resnet18")
    network[0].conv1.weight.data.fill_(float("inf"))
    with pytest.raises(common.Failure, match="not finite") as caught:
        extract(network, images, [1] * 12, None)
    assert caught.value.status == 3


# ---------------------------------------------------------------- lists and records


def test_a_whole_split_is_listed_by_class_and_name(xrays_source):
    listed = common.list_split(xrays_source, "test")
    assert len(listed) == 100 and [label for _, label in listed] == [0] * 50 + [1] * 50
    assert [path for path, _ in listed] == sorted((path for path, _ in listed), key=lambda p: (p.parent.name, p.name))


def test_patients_of_the_reference_data(xrays_source):
    counts = {}
    for split in ("train", "test"):
        for path, label in common.list_split(xrays_source, split):
            counts.setdefault((split, label), set()).add(common.patient_of(path.name))
    assert {key: len(found) for key, found in counts.items()} == {
        ("train", 0): 148, ("train", 1): 148, ("test", 0): 50, ("test", 1): 43,
    }  # fmt: skip
    assert None not in set.union(*counts.values())
    assert common.patient_of("person86_virus_1.jpeg") != common.patient_of("person86_bacteria_2.jpeg")
    assert common.patient_of("person86_virus_1.jpeg", True) == common.patient_of("person86_bacteria_2.jpeg", True)
    assert common.patient_of("IM-0001-0002.jpeg") != common.patient_of("NORMAL2-IM-0001-0001.jpeg")
    assert common.patient_of("person447_virus_921_1.jpeg") and common.patient_of("scan.png") is None


def test_importing_the_scripts_does_nothing_and_starts_fast():
    code = (
        "import sys, common, split_val, train, evaluate; assert not {'torch', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert not out.stdout and not out.stderr and time.perf_counter() - start < 30
