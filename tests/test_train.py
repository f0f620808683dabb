"""train.py as a user runs it: main([...]) on drawn phantoms, then the written files are read."""

import csv
import hashlib
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from helpers import ROOT, TINY_FAST, read_about
from torch import nn

import common
import train
from cxr.folders import CLASSES
from cxr.patients import read_split


@pytest.fixture
def read_history(tmp_path):
    def read():
        with open(tmp_path / "results" / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{name: float(value) for name, value in row.items()} for row in rows]

    return read


def settings(**changes):
    flags = {"epochs": 50, "lr": 1e-3, "weight_decay": 0.0, "patience": 5, "batch_size": 32}
    return Namespace(**(flags | changes))


def drawn(n=60, width=8, n_views=3, seed=0):
    """(features float32 (n, n_views, width), labels float32 (n,)) that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 2).float()
    features = torch.randn(n, n_views, width, generator=generator)
    features[:, :, 0] += 2 * labels[:, None]
    return 3 * features + 5, labels


# ---------------------------------------------------------------- what is written


def test_a_run_prints_the_reference_s_lines_and_writes_every_file(
    run_train, read_history, tmp_path, capsys
):
    assert run_train("--epochs", 6) == 0
    out = capsys.readouterr().out
    history, model = read_history(), read_about(tmp_path)
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    first = history[0]
    train_part = f"Train Loss: {first['train_loss']:.4f}, Train Acc: {first['train_accuracy']:.4f}"
    val_part = f"Val Loss: {first['val_loss']:.4f}, Val Acc: {first['val_accuracy']:.4f}"
    assert f"Epoch [1/6], {train_part}, {val_part}" in out
    best = min(history, key=lambda row: row["val_loss"])
    assert f"Training complete. Best validation loss: {best['val_loss']:.4f}" in out
    assert model["epoch"] == best["epoch"]
    assert model["val_loss"] == pytest.approx(best["val_loss"])
    assert model["sha256"] == hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    assert len(model["images"]["train"]) == 40 and len(model["images"]["val"]) == 24
    assert model["arch"] == "tinynet" and model["classes"] == ["NORMAL", "PNEUMONIA"]
    assert model["window"] == 2 and "Resize" in model["transforms"][0]
    for name in ("curves.png", "samples.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.pth", "results"]


def test_no_tensor_of_the_backbone_changes(run_train, tmp_path):
    before = common.build_backbone("tinynet").network.state_dict()
    assert run_train("--epochs", 3) == 0
    after = torch.load(tmp_path / "model.pth")
    assert set(after) - set(before) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_seed_gives_one_model_and_another_seed_another(run_train, tmp_path):
    models = []
    for seed in (0, 0, 1):
        torch.rand(5)  # what was drawn before must not matter
        assert run_train("--epochs", 3, "--seed", seed) == 0
        models.append((tmp_path / "model.pth").read_bytes())
    assert models[0] == models[1] != models[2]


def test_training_separates_what_is_separable_and_not_shuffled_labels(
    run_train, data, tmp_path, capsys
):
    assert run_train("--epochs", 30, "--arch", "resnet18", "--views", 1, data=data) == 0
    learned = read_about(tmp_path)["val_accuracy"]
    halves = [
        path
        for split in ("train", "val")
        for name in CLASSES
        for path in sorted((data / split / name).iterdir())[::2]
    ]
    for path in halves:  # half of each class change sides
        other = CLASSES[1 - CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / f"moved-{path.name}")
    assert run_train("--epochs", 30, "--arch", "resnet18", "--views", 1, data=data) == 0
    assert learned >= 0.9 > 0.8 > read_about(tmp_path)["val_accuracy"]


def test_many_seeds_print_a_line_each_and_save_their_mean(run_train, tmp_path, capsys):
    heads = []
    for seed in (0, 1, 2):
        assert run_train("--seed", seed, "--no-calibrate") == 0
        heads.append(torch.load(tmp_path / "model.pth"))
    capsys.readouterr()
    assert run_train("--seeds", 3, "--no-calibrate") == 0
    out, mean = capsys.readouterr().out, torch.load(tmp_path / "model.pth")
    assert all(f"Seed {seed}: epoch" in out for seed in (0, 1, 2)) and "deviation" in out
    for name in ("fc.weight", "fc.bias"):
        expected = torch.stack([head[name] for head in heads]).mean(0)
        assert torch.allclose(mean[name], expected, rtol=1e-5)
    assert len(read_about(tmp_path)["seeds"]) == 3


def test_the_report_of_an_earlier_model_is_pointed_out(run_train, tmp_path, capsys):
    assert run_train("--epochs", 1) == 0 and "earlier model" not in capsys.readouterr().out
    (tmp_path / "results" / "metrics.json").write_text("{}")
    assert run_train("--epochs", 1) == 0
    assert "metrics.json is about an earlier model" in capsys.readouterr().out


def test_classes_of_other_sizes_are_weighted_and_that_is_said(data, flags, capsys):
    for path in sorted((data / "train" / "NORMAL").iterdir())[5:]:
        path.unlink()
    assert train.main(flags(data, *TINY_FAST)) == 0
    said = "Training on 5 NORMAL and 20 PNEUMONIA images: a PNEUMONIA image weighs 0.25 in the loss"
    assert said in capsys.readouterr().out


# ---------------------------------------------------------------- the loop


def test_the_feature_loop_is_the_plain_loop(split_phantoms):
    """The same draws of the same views, once from features and once through the whole network."""
    found = read_split(split_phantoms, "train", "val")
    images = found["train"][12:28] + found["val"][6:18]
    labels = torch.tensor([float(image.label) for image in images])
    backbone = common.build_backbone("tinynet")
    args = settings(no_cache=True, cache_dir=None, batch_size=6, workers=0, epochs=3, patience=0)
    device = torch.device("cpu")
    features, _ = common.extract_features(backbone, images, 3, 2.0, device, torch.float32, args)
    data = features[:16], labels[:16], features[16:, 0], labels[16:]
    found = train.train_head(*data, args, seed=7, log=lambda line: None)

    views = common.Views(images, 3, 2.0)
    pixels = torch.stack([common.NORMALIZE(views[i][1]) for i in range(len(images))])
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
        assert loss == pytest.approx(found.history[epoch][3], abs=1e-4)


def test_early_stopping_plateau_and_best_epoch_follow_the_validation_loss(monkeypatch):
    losses = iter([0.9, 0.5, 0.6, 0.6, 0.6, 0.4, 0.45, 0.45, 0.45, 0.45, 0.45, 0.1])
    monkeypatch.setattr(train, "validate", lambda *_: (next(losses), 0.5))
    lines, (x, y) = [], drawn()
    found = train.train_head(x, y, x[:, 0], y, settings(), 0, lines.append)
    assert (found.epoch, found.val_loss, len(found.history)) == (6, 0.4, 11)
    assert lines[-1] == "Early stopping triggered" and len(lines) == 12
    assert [row[5] for row in found.history] == [1e-3] * 5 + [5e-4] * 4 + [2.5e-4] * 2


def test_the_saved_head_is_that_of_the_best_epoch_and_takes_raw_features():
    x, y = drawn()
    found = train.train_head(x, y, x[:, 0], 1 - y, settings(), 0, lambda line: None)
    assert found.epoch < len(found.history)  # it soon gets worse on the swapped labels
    until_best = settings(epochs=found.epoch, patience=0)
    again = train.train_head(x, y, x[:, 0], 1 - y, until_best, 0, lambda line: None)
    assert torch.equal(found.head.weight, again.head.weight)
    criterion = train.balanced_criterion(y)
    loss, _ = train.validate(found.head, x[:, 0], 1 - y, criterion)
    assert loss == pytest.approx(found.val_loss, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 33, 1000])
def test_every_image_counts_once_whatever_the_batch_size(batch_size):
    x, y = drawn(33)
    args, model = settings(), nn.Linear(8, 1)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    criterion = train.balanced_criterion(y)
    generator = torch.Generator().manual_seed(0)
    data = x[:, :1], y, criterion, optimizer, batch_size, generator
    loss, accuracy = train.train_one_epoch(model, *data)
    assert sum(seen) == 33 and max(seen) == min(batch_size, 33)
    expected = train.validate(model, x[:, 0], y, criterion)
    assert (loss, accuracy) == pytest.approx(expected, abs=1e-5) and args.patience == 5


def test_unbalanced_classes_weigh_the_same_in_the_loss():
    labels = torch.tensor([0.0, 0, 0, 1])
    criterion = train.balanced_criterion(labels)
    logits = torch.full((4,), -2.0)
    each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    assert criterion(logits, labels).item() == pytest.approx(
        ((each[:3].sum() + 3 * each[3]) / 4).item()
    )


def test_a_feature_that_is_constant_in_training_is_not_blown_up():
    x, y = drawn()
    x[:, :, 3] = 7
    changed = x.clone()
    changed[:, :, 3] = 7.5
    head = train.train_head(x, y, x[:, 0], y, settings(), 0, lambda line: None).head
    assert (head(changed[:, 0]) - head(x[:, 0])).abs().max() < 1


def test_a_head_has_the_same_bits_on_any_number_of_threads():
    x, y = drawn(200, width=512)
    heads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with train.one_thread():
            heads.append(
                train.train_head(x, y, x[:, 0], y, settings(epochs=3), 0, lambda line: None)
            )
        assert torch.get_num_threads() == threads
    assert torch.equal(heads[0].head.weight, heads[1].head.weight)


# ---------------------------------------------------------------- what ends a run


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_loss_that_is_not_finite_stops_with_3_and_saves_nothing(
    run_train, tmp_path, monkeypatch, capsys, epoch
):
    losses = iter([0.5] * (epoch - 1) + [float("nan")])
    monkeypatch.setattr(train, "validate", lambda *_: (next(losses), 0.5))
    assert run_train() == 3
    assert f"epoch {epoch}: the loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "model.pth").exists()


def test_ctrl_c_keeps_and_saves_the_best_epoch_so_far(run_train, tmp_path, monkeypatch, capsys):
    calls, validate = [], train.validate

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(train, "validate", interrupt)
    assert run_train() == 130
    err = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after 3 epochs" in err and "kept the best so far" in err
    model = read_about(tmp_path)
    assert model["epoch"] <= 3 and (tmp_path / "model.pth").exists()


def test_ctrl_c_before_the_first_epoch_leaves_the_old_model(run_train, tmp_path, monkeypatch):
    (tmp_path / "model.pth").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "validate", interrupt)
    assert run_train() == 130 and (tmp_path / "model.pth").read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arch", "resnet5"], "perhaps resnet50"),
        (["--arch", "fasterrcnn_resnet50_fpn"], "no classifier"),
        (["--arch", "squeezenet1_0"], "expected a network that ends in a Linear"),
        (["--weights", "radnom"], "radnom: no such file"),
        (["--device", "gpu"], "expected auto, cpu, cuda"),
        (["--folds", "2"], "expected 3 or more"),
        (["--repeats", "2"], "--repeats needs --folds"),
        (["--views", "0"], "expected a number"),
        (["--lr", "-1"], "expected a number"),
        (["--window", "50"], "from 0 to 40"),
        (["--threshold", "sensitivity=2"], "expected a number from 0 to 1, youden"),
        (["--epoch", "x"], "--epoch"),
        (["--checkpoint", "model.txt"], "expected a name like model.pth"),
        (["--checkpoint", "split_val.pth"], "expected a name like model.pth"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_gets_one_line_and_2(run_train, tmp_path, capsys, flags, expected):
    try:
        status = run_train(*flags)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "model.pth").exists()


# ---------------------------------------------------------------- torchrun


def command(data, tmp_path, cache, *flags):
    paths = ("--data-dir", data, "--checkpoint", tmp_path / "model.pth")
    fixed = ("--results-dir", tmp_path / "results", "--cache-dir", cache, "--weights", "random")
    words = ("train.py", *paths, *fixed, "--arch", "mobilenet_v3_small", *flags)
    return [str(word) for word in words]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_of_torchrun_give_the_model_of_one(split_phantoms, tmp_path):
    flags = ("--views", "2", "--epochs", "3")
    two = TORCHRUN + command(split_phantoms, tmp_path, tmp_path / "a", *flags)
    two = subprocess.run(two, cwd=ROOT, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Training complete") == 1
    assert len(list((tmp_path / "a").glob("*/*.npz"))) == 64
    model = (tmp_path / "model.pth").read_bytes()
    one = [sys.executable, *command(split_phantoms, tmp_path, tmp_path / "b", *flags)]
    one = subprocess.run(one, cwd=ROOT, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "model.pth").read_bytes() == model


def test_an_image_that_no_rank_can_read_is_told_once_and_ends_all(data, tmp_path):
    (data / "train" / "NORMAL" / "IM-0003-0001.jpeg").write_bytes(b"")
    two = TORCHRUN + command(data, tmp_path, tmp_path / "a", "--views", "1")
    two = subprocess.run(two, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert two.returncode != 0 and not (tmp_path / "model.pth").exists()
    assert two.stderr.count("IM-0003-0001.jpeg: the file is empty") == 1
