"""cxr/previous.py: a training keeps the earlier model, if it was another one."""

import shutil
import subprocess

import pytest
import torch
from helpers import ROOT, TINY_FAST, path_flags

import evaluate
import train
from cxr.files import hash_file, read_json


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the folder of a training."""
    return shutil.copytree(trained, tmp_path / "folder")


@pytest.fixture
def retrain(folder, split_phantoms, capsys):
    """retrain(*flags) trains again, as for `folder`. Returns the last line on the screen."""

    def call(*flags, data=split_phantoms):
        flags = ("--results-dir", folder, *TINY_FAST, *flags)  # argparse takes the last value
        assert train.main(path_flags(data, folder, folder / "cache", *flags)) == 0
        return capsys.readouterr().out.splitlines()[-1]

    return call


def previous(folder):
    """Returns the files that keep the earlier model of model.pth."""
    return folder / "model.previous.pth", folder / "model.previous.json"


def test_a_training_with_the_same_images_and_flags_keeps_no_copy(retrain, folder):
    flags = ["--workers", 0, "--feature-batch-size", 8, "--debug", "--skip-bad", "--no-cache"]
    for more in ([], flags, ["--classes", "NORMAL", "PNEUMONIA"]):
        assert "Saved epoch" in retrain(*more)
        assert not any(path.exists() for path in previous(folder))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--lr", 0.05], "--lr"),
        (["--threshold", "youden"], "--threshold"),
        (["--seed", 3], "--seed"),
    ],
)
def test_a_training_with_another_flag_keeps_the_earlier_model_and_says_so(
    flags, name, retrain, folder, trained, split_phantoms, tmp_path
):
    line = retrain(*flags)
    kept, kept_info = previous(folder)
    assert f"trained with another value of {name})" in line
    assert f"is kept as {kept} and {kept_info.name}" in line
    assert "in place of" not in line
    assert kept.read_bytes() == (trained / "model.pth").read_bytes()
    assert kept_info.read_bytes() == (trained / "model.json").read_bytes()
    assert read_json(folder / "model.json")["sha256"] == hash_file(folder / "model.pth")
    retrain(*flags)  # the same training again: the good model is still there
    assert kept.read_bytes() == (trained / "model.pth").read_bytes()
    assert "in place of an older one" in retrain("--lr", 0.02)
    assert kept_info.read_bytes() != (trained / "model.json").read_bytes()


def test_the_kept_model_can_be_used(retrain, folder, split_phantoms, scored, quick, capsys):
    retrain("--lr", 0.05)
    flags = path_flags(split_phantoms, folder, folder / "cache", "--results-dir", folder / "new")
    assert evaluate.main([*flags, "--checkpoint", str(previous(folder)[0])]) == 0
    probabilities = "file,label,probability"
    assert probabilities in (folder / "new" / "predictions.csv").read_text()
    assert (folder / "new/predictions.csv").read_bytes() == (
        scored[0] / "predictions.csv"
    ).read_bytes()


def test_other_images_and_other_labels_keep_the_earlier_model(retrain, folder, data):
    kept, _ = previous(folder)
    first, second = sorted((data / "train" / "NORMAL").iterdir())[:2]
    first.rename(first.with_name("renamed.jpeg"))  # the same images
    assert "Saved" in retrain(data=data) and not kept.exists()
    second.rename(data / "train" / "PNEUMONIA" / second.name)
    assert "trained on other images" in retrain(data=data) and kept.exists()
    kept.unlink()
    (data / "train" / "PNEUMONIA" / second.name).unlink()
    assert "trained on other images" in retrain(data=data) and kept.exists()


def test_other_transforms_keep_the_earlier_model(retrain, folder, monkeypatch):
    transform = train.common.v2.Compose([train.common.AUGMENT])
    monkeypatch.setattr(train.common, "AUGMENT", transform)
    assert "trained with other transforms" in retrain() and previous(folder)[0].exists()


@pytest.mark.parametrize(
    ("model", "info"),
    [(None, None), (None, b""), (None, b'{"checksum": 1}'), (b"", b"\xff"), (b"no model", b"[]")],
)
def test_a_damaged_or_foreign_model_is_kept_and_does_not_stop_a_training(
    model, info, retrain, folder
):
    path, info_file = folder / "model.pth", folder / "model.json"
    kept, kept_info = previous(folder)
    kept_info.write_bytes(b"of an older model")
    if info is None:
        info_file.unlink()
    else:
        info_file.write_bytes(info)
    if model is not None:
        path.write_bytes(model)
    content = path.read_bytes()
    line = retrain()
    assert "no model.json belongs to it" in line and str(kept) in line
    assert kept.read_bytes() == content
    assert (kept_info.read_bytes() if kept_info.exists() else None) == info
    torch.load(path)


def test_another_name_of_the_checkpoint_has_its_own_copy(retrain, folder):
    (folder / "run.1.pt").write_bytes(b"another model")
    line = retrain("--checkpoint", folder / "run.1.pt")
    assert "The earlier run.1.pt" in line and str(folder / "run.1.previous.pt") in line
    assert (folder / "run.1.previous.pt").read_bytes() == b"another model"
    assert not previous(folder)[0].exists()


def test_a_folder_in_the_place_of_the_copy_is_refused_before_the_work(
    folder, split_phantoms, capsys
):
    previous(folder)[0].mkdir()
    before = (folder / "model.pth").read_bytes()
    flags = path_flags(split_phantoms, folder, folder / "cache", *TINY_FAST, "--lr", 0.05)
    assert train.main(flags) == 2
    assert f"{previous(folder)[0]}: expected a file" in capsys.readouterr().err
    assert (folder / "model.pth").read_bytes() == before


def test_git_ignores_the_copies():
    names = ["model.previous.pth", "model.previous.json", "other.previous.json"]
    command = ["git", "check-ignore", *names]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.split() == names
