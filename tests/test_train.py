"""train.py as a user runs it: main([...]) on drawn phantoms, then the written files are read."""

import subprocess
import sys
from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
from faults import listing
from helpers import ROOT, TINY_FAST, path_flags, read_about, read_rows
from torch import nn

import common
import train
from cxr.errors import INTERRUPTED, Terminated
from cxr.files import hash_file
from cxr.folders import CLASSES
from cxr.patients import read_split
from train import HeadData


def settings(**changes):
    flags = {"epochs": 50, "lr": 1e-3, "weight_decay": 0.0, "patience": 5, "batch_size": 32}
    return Namespace(**(flags | changes))


def learnable_data(n=60, width=8):
    """Three views of n images; the first feature depends on the label. Validates on view 0."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(n) % 2).float()
    features = torch.randn(n, 3, width, generator=generator)
    features[:, :, 0] += 2 * labels[:, None]
    features = 3 * features + 5
    return HeadData(features, labels, features[:, 0], labels)


def train_silently(data, seed=0, **changes):
    return train.train_head(data, settings(**changes), seed, log=lambda line: None)


def test_the_screen_and_the_files_of_a_training_agree(run_train, tmp_path, capsys):
    assert run_train("--epochs", 6) == 0
    out, model = capsys.readouterr().out, read_about(tmp_path)
    lines = [line for line in out.splitlines() if line.startswith("Epoch [")]
    rows = read_rows(tmp_path / "results" / "history.csv")
    rows = [{name: float(value) for name, value in row.items()} for row in rows]
    for epoch, (row, line) in enumerate(zip(rows, lines, strict=True), 1):
        train_part = f"Train Loss: {row['train_loss']:.4f}, Train Acc: {row['train_accuracy']:.4f}"
        val_part = f"Val Loss: {row['val_loss']:.4f}, Val Acc: {row['val_accuracy']:.4f}"
        assert f"Epoch [{epoch}/6], {train_part}, {val_part}" in line
    best = min(rows, key=lambda row: row["val_loss"])
    assert f"Training complete. Best validation loss: {best['val_loss']:.4f}" in out
    assert model["epoch"] == best["epoch"]
    assert model["val_loss"] == pytest.approx(best["val_loss"])
    written = {"model.json", "model.pth", "results", "history.csv", "curves.png", "samples.png"}
    assert {path.name for path in tmp_path.rglob("*")} == written
    assert model["sha256"] == hash_file(tmp_path / "model.pth")
    assert len(model["images"]["train"]) == 40 and len(model["images"]["val"]) == 24
    assert model["arch"] == "tinynet" and model["classes"] == ["NORMAL", "PNEUMONIA"]
    assert model["window"] == 2 and "Resize" in model["transforms"][0]
    assert "earlier model" not in out
    report = tmp_path / "results" / "metrics.json"
    report.write_text("{}")
    assert run_train("--epochs", 1) == 0
    assert f"{report} belongs to an earlier model" in capsys.readouterr().out


def test_no_tensor_of_the_backbone_changes(trained):
    before = common.build_backbone("tinynet").network.state_dict()
    after = torch.load(trained / "model.pth")
    assert set(after) - set(before) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_training_separates_the_phantoms_but_not_shuffled_labels(run_train, data, tmp_path):
    resnet18 = ("--epochs", 30, "--arch", "resnet18", "--views", 1)
    assert run_train(*resnet18) == 0
    assert read_about(tmp_path)["val_accuracy"] >= 0.9
    for path in [p for split in ("train", "val") for p in sorted((data / split).glob("*/*"))[::2]]:
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / f"moved-{path.name}")  # half of each class
    assert run_train(*resnet18, data=data) == 0
    assert read_about(tmp_path)["val_accuracy"] < 0.8


def test_a_seed_gives_one_model_and_several_seeds_give_their_mean(run_train, tmp_path, capsys):
    heads, contents = [], []
    for seed in (0, 0, 1, 2):
        torch.rand(5)  # numbers drawn before must not matter
        assert run_train("--seed", seed, "--no-calibrate") == 0
        heads.append(torch.load(tmp_path / "model.pth"))
        contents.append((tmp_path / "model.pth").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    capsys.readouterr()
    assert run_train("--seeds", 3, "--no-calibrate") == 0
    out, mean = capsys.readouterr().out, torch.load(tmp_path / "model.pth")
    assert all(f"Seed {seed}: epoch" in out for seed in (0, 1, 2)) and "deviation" in out
    for name in ("fc.weight", "fc.bias"):
        expected = torch.stack([head[name] for head in heads[1:]]).mean(0)
        assert torch.allclose(mean[name], expected, rtol=1e-5)
    assert len(read_about(tmp_path)["seeds"]) == 3


def test_classes_of_different_size_have_their_weight_printed(data, flags, capsys):
    for path in sorted((data / "train" / "NORMAL").iterdir())[5:]:
        path.unlink()
    assert train.main(flags(data, *TINY_FAST)) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("Training on")]
    assert "5 NORMAL and 20 PNEUMONIA images" in line
    assert "each PNEUMONIA image has the weight 0.25" in line


def test_the_loop_on_features_is_the_usual_loop_through_the_whole_network(split_phantoms):
    xrays = (
        read_split(split_phantoms, "train", classes=CLASSES)[12:28]
        + read_split(split_phantoms, "val", classes=CLASSES)[6:18]
    )
    labels = torch.tensor([float(xray.label) for xray in xrays])
    backbone = common.build_backbone("tinynet")
    args = settings(
        no_cache=True,
        cache_dir=None,
        skip_bad=False,
        batch_size=6,
        feature_batch_size=6,
        workers=0,
        epochs=3,
        patience=0,
    )
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    features, *_ = common.extract_features(backbone, xrays, args, n_views=3, window=2.0, **options)
    data = HeadData(features[:16], labels[:16], features[16:, 0], labels[16:])
    history = train.train_head(data, args, seed=7, log=lambda line: None).history
    views = common.Views(xrays, 3, 2.0)
    pixels = torch.stack([common.NORMALIZE(views[i][1]) for i in range(len(xrays))])
    torch.manual_seed(7)
    standardize, fc = train.Standardize(features[:16]), nn.Linear(8, 1)
    network = nn.Sequential(backbone.network, standardize, fc)
    optimizer = torch.optim.Adam(fc.parameters(), lr=args.lr)
    criterion, generator = nn.BCEWithLogitsLoss(), torch.Generator().manual_seed(7)
    for epoch in range(3):
        order = torch.randperm(16, generator=generator)
        view = torch.randint(3, (16,), generator=generator)
        for rows in order.split(6):
            loss = criterion(network(pixels[rows, view[rows]]).flatten(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = criterion(network(pixels[16:, 0]).flatten(), labels[16:]).item()
        assert loss == pytest.approx(history[epoch]["val_loss"], abs=1e-4)


def test_early_stopping_plateau_and_best_epoch_follow_the_validation_loss(monkeypatch):
    losses, lines = [0.9, 0.5, 0.6, 0.6, 0.6, 0.4, 0.45, 0.45, 0.45, 0.45, 0.45, 0.1], []
    monkeypatch.setattr(train, "validate", Mock(side_effect=[(loss, 0.5) for loss in losses]))
    best = train.train_head(learnable_data(), settings(), 0, lines.append)
    assert (best.epoch, best.val_loss, len(best.history)) == (6, 0.4, 11)
    assert lines[-1] == "Early stopping triggered" and len(lines) == 12
    assert [row["lr"] for row in best.history] == [1e-3] * 5 + [5e-4] * 4 + [2.5e-4] * 2


def test_the_saved_head_is_that_of_the_best_epoch_and_takes_raw_features():
    data = learnable_data()
    data = data._replace(val_labels=1 - data.val_labels)  # the val loss soon increases
    best = train_silently(data)
    assert best.epoch < len(best.history)
    again = train_silently(data, epochs=best.epoch, patience=0)
    assert torch.equal(best.head.weight, again.head.weight)
    loss, _ = train.validate(best.head, data, train.balanced_criterion(data.train_labels))
    assert loss == pytest.approx(best.val_loss, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 33, 1000])
def test_every_image_counts_once_with_every_batch_size(batch_size):
    data = learnable_data(33)
    data = data._replace(train_features=data.train_features[:, :1])
    model, batches = nn.Linear(8, 1), []
    model.register_forward_hook(lambda module, inputs, output: batches.append(inputs[0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    criterion, rng = train.balanced_criterion(data.train_labels), torch.Generator().manual_seed(0)
    result = train.train_one_epoch(model, data, criterion, optimizer, batch_size, rng)
    assert max(len(batch) for batch in batches) == min(batch_size, 33)
    assert sorted(torch.cat(batches).tolist()) == sorted(data.val_features.tolist())
    assert result == pytest.approx(train.validate(model, data, criterion), abs=1e-5)


def test_both_classes_have_the_same_weight_in_the_loss():
    labels, logits = torch.tensor([0.0, 0, 0, 1]), torch.full((4,), -2.0)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    expected = (losses[:3].sum() + 3 * losses[3]) / 4
    assert train.balanced_criterion(labels)(logits, labels).item() == pytest.approx(expected.item())


def test_a_feature_that_is_constant_in_training_does_not_become_huge():
    data = learnable_data()
    data.train_features[:, :, 3] = 7  # and that of val, the same memory
    changed = data.val_features.clone()
    changed[:, 3] = 7.5
    head = train_silently(data).head
    assert (head(changed) - head(data.val_features)).abs().max() < 1


def test_a_head_has_the_same_bits_on_any_number_of_threads():
    data, weights = learnable_data(200, width=512), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with common.one_thread():
            weights.append(train_silently(data, epochs=3).head.weight)
        assert torch.get_num_threads() == threads
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("scores", "status", "words"),
    [
        ([(float("nan"), 0.5)], 3, "epoch 1: the loss is not finite"),
        ([(0.5, 0.5), (0.5, 0.5), (float("nan"), 0.5)], 3, "epoch 3: the loss is not finite"),
        ([KeyboardInterrupt], 130, "interrupted"),
    ],
)
def test_a_loss_that_is_not_finite_or_ctrl_c_in_the_first_epoch_leaves_the_old_model(
    run_train, tmp_path, monkeypatch, capsys, scores, status, words
):
    (tmp_path / "model.pth").write_text("old")
    monkeypatch.setattr(train, "validate", Mock(side_effect=scores))
    assert run_train() == status and words in capsys.readouterr().err
    assert (tmp_path / "model.pth").read_text() == "old"


def test_ctrl_c_saves_the_best_epoch_so_far(run_train, tmp_path, monkeypatch, capsys):
    scores = [(0.6, 0.5), (0.4, 0.5), (0.5, 0.5), KeyboardInterrupt]
    monkeypatch.setattr(train, "validate", Mock(side_effect=scores))
    assert run_train() == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after 3 epochs" in line and "saved epoch 2" in line
    assert read_about(tmp_path)["epoch"] == 2 and (tmp_path / "model.pth").exists()


def test_ctrl_c_at_the_line_of_an_epoch_keeps_this_epoch(monkeypatch):
    monkeypatch.setattr(train, "validate", Mock(side_effect=[(0.6, 0.5), (0.4, 0.5)]))
    labels = torch.tensor([0.0, 1.0])
    data = train.HeadData(torch.eye(2)[:, None], labels, torch.eye(2), labels)
    log = Mock(side_effect=[None, KeyboardInterrupt])
    best = train.train_head(data, train.parse_args([]), 0, log)
    assert (best.epoch, best.val_loss, best.exit_code) == (2, 0.4, 130)


SEVERAL_HEADS = ("--seeds", 3), ("--folds", 3), ("--folds", 3, "--sizes", "8,16")


@pytest.mark.parametrize("flags", SEVERAL_HEADS)
@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
@pytest.mark.parametrize("n_epochs", [3, 7])  # in the first head, and in the second one
def test_an_interrupted_run_of_several_heads_saves_none_of_them(
    flags, stop, status, n_epochs, run_train, tmp_path, monkeypatch, capsys
):
    scores = [*[(0.5, 0.5)] * n_epochs, stop]
    monkeypatch.setattr(train, "validate", Mock(side_effect=scores))
    assert run_train("--epochs", 5, *flags) == status
    assert capsys.readouterr().err.splitlines()[-1] == f"train.py: {INTERRUPTED}"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arch", "resnet5"], "resnet50"),
        (["--arch", "fasterrcnn_resnet50_fpn"], "not a classifier"),
        (["--arch", "squeezenet1_0"], "must be a Linear layer"),
        (["--device", "gpu"], "expected auto, cpu, cuda"),
        (["--folds", "2"], "expected 3 or more"),
        (["--repeats", "2"], "--repeats needs --folds"),
        (["--views", "0"], "expected a whole number"),
        (["--lr", "-1"], "expected a number"),
        (["--window", "50"], "from 0 to 40"),
        (["--weights", "radnom"], "WEIGHTS=radnom): no such file; expected imagenet, random or"),
        (["--weights", "/"], "WEIGHTS=/): no such file"),
        (["--threshold", "sensitivity=2"], "expected a number from 0 to 1, youden"),
        (["--epoch", "x"], "--epoch"),
        (["--checkpoint", "model.txt"], "expected a name like model.pth"),
        (["--checkpoint", "split_val.pth"], "expected a name like model.pth"),
    ],
)
def test_a_mistake_gets_one_line_and_2_and_changes_nothing(refused, home, flags, expected):
    before = listing(home)
    assert expected in refused(2, "train", *flags)
    assert listing(home) == before


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def run_process(launcher, data, folder, cache="cache"):
    """Runs train.py in processes of its own, with all output in `folder`."""
    network = ("--weights", "random", "--arch", "mobilenet_v3_small")
    flags = path_flags(data, folder, folder / cache, *network, "--views", 2, "--epochs", 3)
    command = [sys.executable, *launcher, "train.py", *flags, "--device", "auto"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_two_processes_of_torchrun_give_the_model_of_one(split_phantoms, tmp_path):
    two = run_process(TORCHRUN, split_phantoms, tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Training complete") == 1
    assert len(list((tmp_path / "cache").glob("*/*.npz"))) == 64
    model = (tmp_path / "model.pth").read_bytes()
    one = run_process((), split_phantoms, tmp_path, "another cache")
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "model.pth").read_bytes() == model


def test_torchrun_names_an_unreadable_image_once_and_ends(data, tmp_path):
    (data / "train" / "NORMAL" / "IM-0003-0001.jpeg").write_bytes(b"")
    two = run_process(TORCHRUN, data, tmp_path)
    assert two.returncode != 0 and not (tmp_path / "model.pth").exists()
    assert two.stderr.count("IM-0003-0001.jpeg: the file is empty") == 1
