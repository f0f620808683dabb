"""cxr/cache.py: features on disk are those that would be computed."""

import errno
import shutil

import faults
import pytest
import torch
from faults import damage, listing, picture
from helpers import computed, extract, home_flags
from torchvision import transforms

import common
import cxr.cache
import train
from cxr.files import hash_file
from cxr.patients import Xray


def test_only_missing_features_are_computed_and_a_moved_image_has_them(
    backbone, images, tmp_path, capsys
):
    first, *_ = extract(backbone, images[:8], 2, tmp_path)
    assert computed(capsys) == 8
    all_images, *_ = extract(backbone, images, 2, tmp_path)
    assert computed(capsys) == 4 and torch.equal(all_images[:8], first)
    fewer, *_ = extract(backbone, images, 1, tmp_path)
    assert computed(capsys) == 0 and torch.equal(fewer, all_images[:, :1])
    more, *_ = extract(backbone, images, 3, tmp_path)
    assert computed(capsys) == 12 and torch.equal(more[:, :2], all_images)
    without_cache, *_ = extract(backbone, images, 3)
    assert computed(capsys) == 12 and torch.equal(without_cache, more)
    moved = tmp_path / "moved.jpeg"
    moved.write_bytes(images[3].path.read_bytes())
    extract(backbone, [Xray(moved, 1, images[3].sha256)], 1, tmp_path)
    assert computed(capsys) == 0


@pytest.fixture
def count_computed(backbone, images, tmp_path, capsys):
    """count_computed(backbone, **flags): how many of two images are computed again."""

    def count(network, **flags):
        extract(network, images[:2], 1, tmp_path, **flags)
        return computed(capsys)

    assert count(backbone) == 2 and count(backbone) == 0
    yield count
    assert count(backbone) == 0


@pytest.mark.parametrize("flags", [{"dtype": torch.bfloat16}, {"window": 1.0}])
def test_another_precision_or_window_computes_again(count_computed, backbone, flags):
    assert count_computed(backbone, **flags) == 2


def test_another_network_computes_again(count_computed):
    other_weights, other_settings = (common.build_backbone("tinynet") for _ in range(2))
    other_weights.network.conv.weight.data[0, 0, 0, 0] += 0.001
    other_settings.network.bn.eps = 0.1
    assert count_computed(other_weights) == count_computed(other_settings) == 2


@pytest.mark.parametrize("name", ["PREPARE", "AUGMENT", "NORMALIZE"])
def test_other_transforms_compute_again(count_computed, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(common, name, transforms.Compose([getattr(common, name)]))
        assert count_computed(common.build_backbone("tinynet")) == 2


def test_the_model_from_the_cache_is_the_model_without_it(run_train, tmp_path):
    models = set()
    for flags in ((), (), ("--no-cache",), ("--no-cache", "--workers", 2)):
        assert run_train("--epochs", 3, *flags) == 0
        models.add((tmp_path / "model.pth").read_bytes())
    assert len(models) == 1


def test_damaged_features_are_computed_again_to_the_same_bits(
    fuzz, backbone, images, tmp_path, capsys, say
):
    expected, *_ = extract(backbone, images[:1], 2, tmp_path)
    (path,) = tmp_path.glob("*/*.npz")
    intact, count, n_warnings = path.read_bytes(), fuzz.count(30, 2000), 0
    for _ in range(count):
        how, content = damage(fuzz.rng, intact)
        path.write_bytes(content)
        features, *_ = extract(backbone, images[:1], 2, tmp_path)
        assert torch.equal(features, expected), how
        error = capsys.readouterr().err
        n_warnings += f"warning: {path}: " in error and "computed again" in error
    assert n_warnings > count / 2
    say(f"cache: {count} damaged files tried, {n_warnings} warnings, all features bit-equal")


@pytest.mark.parametrize("length", [0, 100, None])
def test_a_training_replaces_a_damaged_file_of_the_cache(home, capsys, length):
    sha256 = hash_file(faults.first(home / "data" / "train"))
    (path,) = (home / "cache").glob(f"*/{sha256}.npz")
    intact, model = path.read_bytes(), (home / "model.pth").read_bytes()
    path.write_bytes(b"no zip" if length is None else intact[:length])
    assert train.main(home_flags("train", home)) == 0
    error = capsys.readouterr().err
    assert f"warning: {path}: cannot be read" in error and "computed again" in error
    assert path.read_bytes() == intact and (home / "model.pth").read_bytes() == model


def test_an_image_that_changes_during_the_run_is_not_cached(refused, home, monkeypatch):
    path, read_split = faults.first(home / "data" / "train"), train.read_split
    sha256 = hash_file(path)

    def change_after_hashing(*args, **options):
        xrays = read_split(*args, **options)
        path.write_bytes(picture(form="jpeg"))
        return xrays

    monkeypatch.setattr(train, "read_split", change_after_hashing)
    shutil.rmtree(home / "cache")
    assert f"{path}: its content changed" in refused(2, "train")
    others = {hash_file(other) for other in home.glob("data/train/*/*") if other != path}
    cached = {file.stem for file in (home / "cache").glob("*/*")}
    assert cached == others and sha256 not in cached


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_may_only_be_read_is_read_and_one_line_says_that_nothing_is_stored(
    backbone, images, tmp_path, capsys, monkeypatch, number
):
    expected, *_ = extract(backbone, images, 2)
    extract(backbone, images[:8], 2, tmp_path)
    before = listing(tmp_path)
    capsys.readouterr()

    def deny(path, **_):
        raise OSError(number, "not allowed", str(path))

    monkeypatch.setattr(cxr.cache, "atomic_write", deny)
    features, *_ = extract(backbone, images, 2, tmp_path)
    out, error = capsys.readouterr()
    assert torch.equal(features, expected) and listing(tmp_path) == before
    assert "8 of 12 images are in the cache" in out
    (line,) = error.splitlines()
    assert f"{tmp_path}: cannot be written" in line and "new features are not stored" in line


def test_another_batch_size_of_the_training_reads_the_cache(run_train, capsys):
    assert run_train() == 0
    capsys.readouterr()
    assert run_train("--batch-size", 7) == 0
    assert computed(capsys) == 0
    assert run_train("--feature-batch-size", 7) == 0
    assert computed(capsys) == 64
