"""cxr/cache.py: features on disk are those that would be computed."""

import shutil

import faults
import numpy as np
import torch
from faults import damage, picture
from helpers import computed, extract, home_flags
from torchvision import transforms

import common
import train
from cxr.files import hash_file
from cxr.patients import Xray


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
    extract(backbone, [Xray(moved, 1, images[3].sha256)], 1, tmp_path / "cache")
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
    image = Xray(path, 0, images[1].sha256)
    _, bad = extract(backbone, [image, images[2]], 1, tmp_path / "cache")
    assert list(bad) == [0] and "changed" in bad[0]
    assert [p.stem for p in (tmp_path / "cache").glob("*/*.npz")] == [images[2].sha256]


def test_the_model_from_the_cache_is_the_model_without_it(run_train, tmp_path):
    models = []
    for flags in ((), (), ("--no-cache",), ("--no-cache", "--workers", 2)):
        assert run_train("--epochs", 3, *flags) == 0
        models.append((tmp_path / "model.pth").read_bytes())
    assert models[0] == models[1] == models[2] == models[3]


def test_what_is_damaged_in_the_cache_is_computed_again_bit_for_bit(fuzz, home, capsys, say):
    digests = {hash_file(path) for path in home.glob("data/train/*/*")}
    paths = [path for path in (home / "cache").glob("*/*") if path.stem in digests]
    expected, count, said = (home / "model.pth").read_bytes(), fuzz.count(40, 400), 0
    for _ in range(count):
        path = fuzz.rng.choice(paths)
        intact = path.read_bytes()
        how, content = damage(fuzz.rng, intact)
        path.write_bytes(content)
        assert train.main(home_flags("train", home)) == 0, how
        assert (home / "model.pth").read_bytes() == expected, how
        said += f"warning: {path}: computed again" in capsys.readouterr().err
        path.write_bytes(intact)
    assert said > count / 2
    say(f"cache: {count} damaged files tried, {said} said, every model bit-equal")


def test_an_image_that_changes_during_the_run_is_never_kept_as_the_old_one(
    refused, home, monkeypatch
):
    path, true = faults.first(home / "data" / "train"), train.read_split
    digest = hash_file(path)

    def read_split(*args):
        found = true(*args)
        path.write_bytes(picture(form="jpeg"))
        return found

    monkeypatch.setattr(train, "read_split", read_split)
    shutil.rmtree(home / "cache")
    line = refused(2, "train")
    assert f"{path}: its content changed" in line and not [*home.rglob(f"{digest}*")]
