"""common.py: images and views, the device, the pass with its cache, patients."""

import contextlib
import io
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import draw_phantom
from PIL import Image, ImageOps
from torchvision import transforms

import common
import cxr.decode
import cxr.errors
import cxr.files
import cxr.patients
import cxr.shortcuts

ROOT = Path(__file__).resolve().parent.parent
TO_TENSOR = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]
)


@pytest.fixture(scope="module")
def phantom():
    return draw_phantom(np.random.default_rng(0), True)


def grey(image):
    return np.asarray(image, dtype=np.int16)


# ---------------------------------------------------------------- images and views


def test_an_image_is_stretched_between_its_own_percentiles(phantom, tmp_path):
    phantom.save(tmp_path / "a.png")
    expected = ImageOps.autocontrast(phantom, cutoff=2)
    assert (grey(common.load_image(tmp_path / "a.png", 2)) == grey(expected)).all()
    assert (grey(common.load_image(tmp_path / "a.png", 0)) == grey(phantom)).all()
    dim = phantom.point([int(30 + level * 0.4) for level in range(256)])
    dim.save(tmp_path / "dim.png")
    assert np.abs(grey(common.load_image(tmp_path / "dim.png", 2)) - grey(expected)).max() <= 3


def test_sixteen_bits_give_the_picture_of_eight_and_one_bright_pixel_changes_nothing(
    phantom, tmp_path
):
    levels = np.asarray(phantom, np.uint16) * 16  # 12 bits, as detectors have them
    expected = grey(ImageOps.autocontrast(phantom, cutoff=2))
    for spoilt in (False, True):
        levels[5, 5] = 65535 if spoilt else levels[5, 5]
        for name in ("a.png", "a.tiff"):
            Image.fromarray(levels).save(tmp_path / name)
            found = grey(common.load_image(tmp_path / name, 2))
            assert np.abs(found - expected).max() <= 2 + 255 * spoilt  # at that pixel, or beside
            assert np.abs(found - expected).mean() < 1


def test_the_whole_film_is_resized_and_nothing_is_cropped(tmp_path):
    film = np.full((300, 600), 100, np.uint8)
    film[:, :20] = film[:, -20:] = 200  # what a centre crop would take off
    Image.fromarray(film).save(tmp_path / "wide.png")
    found = grey(common.load_image(tmp_path / "wide.png", 0))
    assert found.shape == (224, 224)
    assert (found[:, :5] > 190).all() and (found[:, -5:] > 190).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_other_modes_come_out_with_their_grey_levels(phantom, mode, tmp_path):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    phantom.convert(mode).save(path)
    difference = np.abs(grey(common.load_image(path, 0)) - grey(phantom))
    assert difference.max() <= 1


def test_a_rotated_photograph_is_turned_upright(phantom, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    phantom.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert (grey(common.load_image(tmp_path / "a.png", 0)) == grey(phantom)).all()


def test_a_large_jpeg_is_decoded_small_but_never_below_what_the_network_sees(tmp_path):
    large = draw_phantom(np.random.default_rng(1), False, 1000)
    large.save(tmp_path / "a.jpeg", quality=90)
    assert cxr.decode.decode(tmp_path / "a.jpeg", 224).grey.size == (250, 250)
    plain = large.resize((224, 224), Image.Resampling.BILINEAR)
    assert np.abs(grey(common.load_image(tmp_path / "a.jpeg", 0)) - grey(plain)).mean() < 2


def test_no_format_is_tried_that_pillow_hands_to_another_program(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(OSError, match="cannot identify"):
        cxr.decode.decode(tmp_path / "a.png", 224)


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
    with pytest.raises(cxr.errors.Failure, match="--device"):
        common.pick_device(name)


def test_the_last_gpu_exists_and_the_one_after_does_not(monkeypatch):
    Machine(monkeypatch, cuda=2)
    assert common.pick_device("cuda:1")[0].index == 1
    with pytest.raises(cxr.errors.Failure, match="2 found"):
        common.pick_device("cuda:2")


def test_each_process_of_torchrun_gets_its_own_gpu(monkeypatch):
    Machine(monkeypatch, cuda=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert common.pick_device("auto")[0] == torch.device("cuda:3")


# ---------------------------------------------------------------- the pass and its cache


@pytest.fixture(scope="module")
def backbone():
    return common.build_backbone("tinynet")


@pytest.fixture(scope="module")
def images(split_phantoms):
    return cxr.patients.read_split(split_phantoms, "val")["val"][::2]


def extract(backbone, images, n_views, cache=None, dtype=torch.float32, window=2.0, **flags):
    args = {"cache_dir": cache, "no_cache": cache is None, "batch_size": 4, "workers": 0}
    device = torch.device("cpu")
    args = Namespace(**(args | flags))
    return common.extract_features(backbone, images, n_views, window, device, dtype, args)


def computed(capsys):
    """The number of images that the passes since the last call computed."""
    lines = capsys.readouterr().out.splitlines()
    return sum(int(line.split()[1]) for line in lines if "images computed" in line)


def test_features_are_those_of_the_plain_network_whatever_the_order_and_the_workers(
    backbone, images
):
    features, bad = extract(backbone, images, 3)
    assert not bad and features.shape == (12, 3, 8) and features.dtype == torch.float32
    for row in (0, 7):
        picture = common.load_image(images[row].path, 2)
        view = common.make_view(picture, 2, images[row].digest).convert("RGB")
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


def test_batchnorm_is_folded_and_the_copy_computes_the_same(images):
    network = common.build_backbone("resnet18").network
    fast = common.prepare_network(network, torch.device("cpu"), torch.float32, compiled=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(fast(x), network(x), rtol=1e-3, atol=1e-3)


def test_the_cache_gives_back_what_was_computed_and_only_the_missing_is_computed(
    backbone, images, tmp_path, capsys
):
    first, _ = extract(backbone, images[:8], 2, tmp_path)
    assert computed(capsys) == 8
    again, _ = extract(backbone, images, 2, tmp_path)
    assert computed(capsys) == 4 and torch.equal(again[:8], first)
    fewer, _ = extract(backbone, images, 1, tmp_path)
    assert computed(capsys) == 0 and torch.equal(fewer, again[:, :1])
    more, _ = extract(backbone, images, 3, tmp_path)
    assert computed(capsys) == 12 and torch.equal(more[:, :2], again)
    without, _ = extract(backbone, images, 3)
    assert torch.equal(without, more)


def test_a_moved_image_costs_nothing(backbone, images, tmp_path, capsys):
    extract(backbone, images, 1, tmp_path / "cache")
    computed(capsys)
    moved = tmp_path / "elsewhere.jpeg"
    moved.write_bytes(images[3].path.read_bytes())
    extract(backbone, [cxr.patients.Xray(moved, 1, images[3].digest)], 1, tmp_path / "cache")
    assert computed(capsys) == 0


def test_other_weights_precision_window_or_transforms_never_reuse_a_vector(
    backbone, images, tmp_path, monkeypatch, capsys
):
    changed = common.build_backbone("tinynet")
    changed.network.conv.weight.data[0, 0, 0, 0] += 0.001
    settings = common.build_backbone("tinynet")
    settings.network.bn.eps = 0.1
    extract(backbone, images[:2], 1, tmp_path)
    computed(capsys)
    for other, flags in (
        (changed, {}),
        (settings, {}),
        (backbone, {"dtype": torch.bfloat16}),
        (backbone, {"window": 1.0}),
    ):
        extract(other, images[:2], 1, tmp_path, **flags)
        assert computed(capsys) == 2
    for name in ("PREPARE", "AUGMENT", "NORMALIZE"):
        with monkeypatch.context() as patch:
            patch.setattr(common, name, transforms.Compose([getattr(common, name)]))
            extract(common.build_backbone("tinynet"), images[:2], 1, tmp_path)
            assert computed(capsys) == 2
    extract(backbone, images[:2], 1, tmp_path)
    assert computed(capsys) == 0


def test_a_damaged_file_of_the_cache_is_computed_again_and_said(
    backbone, images, tmp_path, capsys, request
):
    first, _ = extract(backbone, images[:1], 2, tmp_path)
    (path,) = tmp_path.glob("*/*.npz")
    whole = path.read_bytes()
    rng = np.random.default_rng(request.config.option.fuzz_seed)
    count = len(whole) if request.config.option.fuzz else 40
    for at in rng.choice(len(whole), count, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        capsys.readouterr()
        again, _ = extract(backbone, images[:1], 2, tmp_path)
        assert torch.equal(again, first)
    for content in (b"", whole[:100], b"no zip"):
        path.write_bytes(content)
        again, _ = extract(backbone, images[:1], 2, tmp_path)
        assert torch.equal(again, first) and "computed again" in capsys.readouterr().err
        assert path.read_bytes() == whole


def test_an_image_that_changes_after_it_was_hashed_is_never_kept(backbone, images, tmp_path):
    path = tmp_path / "a.jpeg"
    path.write_bytes(images[0].path.read_bytes())
    image = cxr.patients.Xray(path, 0, images[1].digest)
    _, bad = extract(backbone, [image, images[2]], 1, tmp_path / "cache")
    assert list(bad) == [0] and "changed" in bad[0]
    assert [p.stem for p in (tmp_path / "cache").glob("*/*.npz")] == [images[2].digest]


def test_a_rank_that_is_not_torchrun_s_is_ignored(backbone, images, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    features, _ = extract(backbone, images, 1)
    assert (features.abs().sum((1, 2)) > 0).all()


def test_an_output_that_is_not_finite_is_refused_with_3(images):
    backbone = common.build_backbone("tinynet")
    backbone.network.conv.weight.data.fill_(float("inf"))
    with pytest.raises(cxr.errors.Failure, match="not finite") as caught:
        extract(backbone, images, 1)
    assert caught.value.status == 3


def test_frozen_means_no_gradient_and_eval_mode_for_good(backbone):
    modules = list(backbone.network.modules())
    assert not any(module.training for module in modules)
    assert not any(p.requires_grad for p in backbone.network.parameters())
    again = common.build_backbone("tinynet").network.state_dict()
    assert all(torch.equal(again[k], v) for k, v in backbone.network.state_dict().items())


# ---------------------------------------------------------------- names, files


def test_names_tell_the_patient():
    assert cxr.patients.patient_from_name("person86_virus_1.jpeg") == "person86_virus"
    assert cxr.patients.patient_from_name("person86_virus_1.jpeg", cautious=True) == "person86"
    assert cxr.patients.patient_from_name("person86_bacteria_2.jpeg", cautious=True) == "person86"
    assert cxr.patients.patient_from_name("IM-0001-0002.jpeg") != cxr.patients.patient_from_name(
        "NORMAL2-IM-0001-0001.jpeg"
    )
    assert cxr.patients.patient_from_name("NORMAL2-IM-0001-0001-0002.jpeg") == "NORMAL2-IM-0001"
    assert cxr.patients.patient_from_name("person447_virus_921_1.jpeg") == "person447_virus"
    assert cxr.patients.patient_from_name("scan.png") is None


def test_json_that_was_changed_or_comes_from_elsewhere_is_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    assert cxr.files.read_json(path) is None
    cxr.files.write_json(path, {"threshold": 0.5, "images": {"a": "b"}})
    assert cxr.files.read_json(path) == {"threshold": 0.5, "images": {"a": "b"}}
    for text in (path.read_text().replace("0.5", "0.6"), '{"threshold": 0.5}', "[]", "", "\0"):
        path.write_text(text)
        with pytest.raises(cxr.errors.Failure, match=r"a\.json"):
            cxr.files.read_json(path)


def test_a_written_file_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with contextlib.suppress(KeyError), cxr.files.atomic_write(path, "w") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "link.txt").symlink_to(path)
    with cxr.files.atomic_write(tmp_path / "link.txt", "w") as file:
        file.write("new")
    assert path.read_text() == "new" and (tmp_path / "link.txt").is_symlink()


def test_the_numbers_of_an_image_are_those_of_its_file(tmp_path):
    pixels = np.tile(np.arange(100, dtype=np.uint8)[:, None], (1, 60))
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.jpeg", quality=83, subsampling=0)
    numbers, picture, scan = cxr.shortcuts.image_numbers(tmp_path / "a.jpeg", 224)
    assert (numbers["width"], numbers["height"]) == scan.size == (60, 100)
    assert numbers["bits a pixel"] == 24 and scan.format == "JPEG" and numbers["JPEG quality"] == 83
    assert numbers["file size"] == (tmp_path / "a.jpeg").stat().st_size
    assert numbers["mean"] == pytest.approx(49.5, abs=0.2)
    assert numbers["sharpness"] == pytest.approx(1, abs=0.1) and picture.mode == "L"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    numbers, _, scan = cxr.shortcuts.image_numbers(tmp_path / "a.png", 224)
    assert (numbers["bits a pixel"], numbers["JPEG quality"], scan.format) == (8, 0, "PNG")


def test_importing_the_scripts_prints_and_writes_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import split_val, train, evaluate"
    command = [sys.executable, "-c", code, str(ROOT)]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not out.stdout and not out.stderr and not os.listdir(tmp_path)
