"""train.py as a user runs it: main([...]) on drawn phantoms, then the written files are read."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms
from torchvision.models import get_model

import common
import cxr.calibration
import cxr.folders
import cxr.folds
import cxr.patients
import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache that the tests share, so that features are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(split_phantoms, cache, tmp_path):
    """run(*flags): the exit status of train.main on the phantoms, with a tiny random network."""

    def call(*flags, data=split_phantoms):
        paths = {"--checkpoint": tmp_path / "model.pth", "--results-dir": tmp_path / "results"}
        fixed = {"--arch": "tinynet", "--weights": "random", "--views": 4, "--device": "cpu"}
        given = paths | fixed | {"--data-dir": data, "--cache-dir": cache}
        words = [word for pair in given.items() for word in pair]
        return train.main([str(word) for word in (*words, *flags)])

    return call


@pytest.fixture
def read_history(tmp_path):
    def read():
        with open(tmp_path / "results" / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{name: float(value) for name, value in row.items()} for row in rows]

    return read


def about(tmp_path):
    return json.loads((tmp_path / "model.json").read_text())


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
    run, read_history, tmp_path, capsys
):
    assert run("--epochs", 6) == 0
    out = capsys.readouterr().out
    history, model = read_history(), about(tmp_path)
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


def test_the_checkpoint_loads_strictly_into_torchvision_and_gives_the_validation_loss(
    run, split_phantoms, tmp_path
):
    assert run("--arch", "resnet18", "--views", 1, "--epochs", 5, "--no-calibrate") == 0
    network = get_model("resnet18")
    network.fc = nn.Linear(512, 1)
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    network.eval()
    images = cxr.patients.read_split(split_phantoms, "val")["val"]
    to_pixels = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)]
    )
    pictures = [common.load_image(image.path, 2).convert("RGB") for image in images]
    with torch.no_grad():
        logits = network(torch.stack([to_pixels(picture) for picture in pictures])).flatten()
    labels = torch.tensor([float(image.label) for image in images])
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    assert loss == pytest.approx(about(tmp_path)["val_loss"], abs=1e-4)
    assert (about(tmp_path)["slope"], about(tmp_path)["intercept"]) == (1, 0)


def test_no_tensor_of_the_backbone_changes(run, tmp_path):
    before = common.build_backbone("tinynet").network.state_dict()
    assert run("--epochs", 3) == 0
    after = torch.load(tmp_path / "model.pth")
    assert set(after) - set(before) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_seed_gives_one_model_and_another_seed_another(run, tmp_path):
    models = []
    for seed in (0, 0, 1):
        torch.rand(5)  # what was drawn before must not matter
        assert run("--epochs", 3, "--seed", seed) == 0
        models.append((tmp_path / "model.pth").read_bytes())
    assert models[0] == models[1] != models[2]


def test_the_model_from_the_cache_is_the_model_without_it(run, tmp_path):
    models = []
    for flags in ((), (), ("--no-cache",), ("--no-cache", "--workers", 2)):
        assert run("--epochs", 3, *flags) == 0
        models.append((tmp_path / "model.pth").read_bytes())
    assert models[0] == models[1] == models[2] == models[3]


def test_training_separates_what_is_separable_and_not_shuffled_labels(run, data, tmp_path, capsys):
    assert run("--epochs", 30, "--arch", "resnet18", "--views", 1, data=data) == 0
    learned = about(tmp_path)["val_accuracy"]
    halves = [
        path
        for split in ("train", "val")
        for name in cxr.folders.CLASSES
        for path in sorted((data / split / name).iterdir())[::2]
    ]
    for path in halves:  # half of each class change sides
        other = cxr.folders.CLASSES[1 - cxr.folders.CLASSES.index(path.parent.name)]
        path.rename(path.parent.parent / other / f"moved-{path.name}")
    assert run("--epochs", 30, "--arch", "resnet18", "--views", 1, data=data) == 0
    assert learned >= 0.9 > 0.8 > about(tmp_path)["val_accuracy"]


# ---------------------------------------------------------------- the loop


def test_the_feature_loop_is_the_plain_loop(split_phantoms):
    """The same draws of the same views, once from features and once through the whole network."""
    found = cxr.patients.read_split(split_phantoms, "train", "val")
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


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_loss_that_is_not_finite_stops_with_3_and_saves_nothing(
    run, tmp_path, monkeypatch, capsys, epoch
):
    losses = iter([0.5] * (epoch - 1) + [float("nan")])
    monkeypatch.setattr(train, "validate", lambda *_: (next(losses), 0.5))
    assert run() == 3
    assert f"epoch {epoch}: the loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "model.pth").exists()


def test_ctrl_c_keeps_and_saves_the_best_epoch_so_far(run, tmp_path, monkeypatch, capsys):
    calls, validate = [], train.validate

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(train, "validate", interrupt)
    assert run() == 130
    err = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after 3 epochs" in err and "kept the best so far" in err
    model = about(tmp_path)
    assert model["epoch"] <= 3 and (tmp_path / "model.pth").exists()


def test_ctrl_c_before_the_first_epoch_leaves_the_old_model(run, tmp_path, monkeypatch):
    (tmp_path / "model.pth").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "validate", interrupt)
    assert run() == 130 and (tmp_path / "model.pth").read_text() == "old"


# ---------------------------------------------------------------- calibration and threshold


def test_thresholds_follow_their_rule():
    probs = torch.tensor([0.1, 0.2, 0.6, 0.3, 0.7, 0.8, 0.9, 0.95])
    labels = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    assert cxr.calibration.fit_threshold(0.4, probs, labels) == 0.4
    assert cxr.calibration.fit_threshold("youden", probs, labels) == pytest.approx(0.65)
    assert cxr.calibration.fit_threshold("sensitivity=0.8", probs, labels) == pytest.approx(0.65)
    assert cxr.calibration.fit_threshold("sensitivity=1", probs, labels) == pytest.approx(0.25)


def test_a_fitted_threshold_and_its_rule_are_stored(run, tmp_path):
    assert run("--threshold", "youden", "--epochs", 3) == 0
    assert about(tmp_path)["threshold_rule"] == "youden" and 0 < about(tmp_path)["threshold"] < 1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_calibration_finds_the_slope_and_the_intercept(share):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 4000) + np.log(share / (1 - share))
    labels = rng.random(4000) < 1 / (1 + np.exp(-logits))
    told = torch.tensor((logits - 0.7) * 2.5, dtype=torch.float32)
    slope, intercept = cxr.calibration.calibrate(told, torch.tensor(labels, dtype=torch.float32))
    assert slope == pytest.approx(1 / 2.5, rel=0.1) and intercept == pytest.approx(0.7, abs=0.15)
    calibrated = torch.sigmoid(slope * told + intercept)
    assert calibrated.mean().item() == pytest.approx(labels.mean(), abs=0.005)


def test_calibration_is_finite_on_separated_data_and_never_turns_the_classes_round(capsys):
    logits, labels = torch.tensor([-3.0, -2, 2, 3]), torch.tensor([0.0, 0, 1, 1])
    slope, intercept = cxr.calibration.calibrate(logits, labels)
    assert 0 < slope < 5 and abs(intercept) < 1
    assert cxr.calibration.calibrate(logits, 1 - labels) == (1, 0)
    assert "not calibrated" in capsys.readouterr().err


def test_calibration_is_folded_into_the_saved_head(run, tmp_path):
    heads = []
    for flags in (("--no-calibrate",), ()):
        assert run("--epochs", 3, *flags) == 0
        state = torch.load(tmp_path / "model.pth")
        heads.append((state["fc.weight"], state["fc.bias"]))
    slope, intercept = about(tmp_path)["slope"], about(tmp_path)["intercept"]
    assert torch.allclose(slope * heads[0][0], heads[1][0], rtol=1e-5)
    assert torch.allclose(slope * heads[0][1] + intercept, heads[1][1], rtol=1e-5)


# ---------------------------------------------------------------- folds and seeds


def test_cross_validation_scores_held_out_images_and_writes_no_model(run, tmp_path, capsys):
    assert run("--folds", 4, "--repeats", 2) == 0
    found = json.loads((tmp_path / "results" / "cv.json").read_text())
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"]
    assert (found["folds"], found["repeats"], found["n"]) == (4, 2, 64)
    assert "the test images were not opened" in capsys.readouterr().out
    assert not (tmp_path / "model.pth").exists()


def test_cross_validation_does_not_leak_the_labels(run, data, tmp_path):
    """Where the features say nothing, held-out images are told no better than by chance."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in cxr.folders.CLASSES:
            for path in (data / split / name).iterdir():
                noise = rng.integers(0, 255, (32, 32), dtype=np.uint8)
                common.PIL.Image.fromarray(noise).save(path)
    assert run("--folds", 4, "--repeats", 3, data=data) == 0
    found = json.loads((tmp_path / "results" / "cv.json").read_text())
    assert 0.3 < found["metrics"]["auroc"]["value"] < 0.7


def test_folds_never_separate_a_patient_and_spread_the_classes():
    names = [f"person{i // 3}_{'bacteria' if i % 3 else 'virus'}_{i}.jpeg" for i in range(60)]
    names += [f"IM-{i // 2:04d}-{i:04d}.jpeg" for i in range(60)]
    labels = torch.tensor([1.0] * 60 + [0.0] * 60)
    pairs = zip(names, labels, strict=True)
    images = [cxr.patients.identify(Path("train", name), int(y), {}) for name, y in pairs]
    folds = cxr.folds.patient_folds(images, labels, 5, seed=0)
    assert sorted(torch.cat(folds).tolist()) == list(range(120))
    patients = [{images[row].group for row in rows} for rows in folds]
    assert not any(a & b for i, a in enumerate(patients) for b in patients[:i])
    assert all(0.35 < labels[rows].mean() < 0.65 for rows in folds)
    again = cxr.folds.patient_folds(images, labels, 5, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(folds, again, strict=True))


def test_too_few_patients_for_the_folds_are_one_line_and_2(run, capsys):
    assert run("--folds", 60) == 2
    assert "--folds 60" in capsys.readouterr().err.splitlines()[-1]


def test_many_seeds_print_a_line_each_and_save_their_mean(run, tmp_path, capsys):
    heads = []
    for seed in (0, 1, 2):
        assert run("--seed", seed, "--no-calibrate") == 0
        heads.append(torch.load(tmp_path / "model.pth"))
    capsys.readouterr()
    assert run("--seeds", 3, "--no-calibrate") == 0
    out, mean = capsys.readouterr().out, torch.load(tmp_path / "model.pth")
    assert all(f"Seed {seed}: epoch" in out for seed in (0, 1, 2)) and "deviation" in out
    for name in ("fc.weight", "fc.bias"):
        expected = torch.stack([head[name] for head in heads]).mean(0)
        assert torch.allclose(mean[name], expected, rtol=1e-5)
    assert len(about(tmp_path)["seeds"]) == 3


# ---------------------------------------------------------------- networks and flags


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
def test_a_mistake_gets_one_line_and_2(run, tmp_path, capsys, flags, expected):
    try:
        status = run(*flags)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "model.pth").exists()


def test_debug_adds_the_traceback(run, capsys):
    assert run("--arch", "resnet5", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("default: 50", "default: 0.001", "default: 8", "0 = never", "default: resnet50"):
        assert text in out


def test_the_report_of_an_earlier_model_is_pointed_out(run, tmp_path, capsys):
    assert run("--epochs", 1) == 0 and "earlier model" not in capsys.readouterr().out
    (tmp_path / "results" / "metrics.json").write_text("{}")
    assert run("--epochs", 1) == 0
    assert "metrics.json is about an earlier model" in capsys.readouterr().out


def make(*words):
    alone = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["make", "-n", *words]
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)


def test_make_passes_a_flag_only_where_its_variable_was_given_and_refuses_a_typo():
    assert make("train").stdout.splitlines()[-1].split() == [".venv/bin/python", "train.py"]
    line = make("train", "EPOCHS=3", "GPUS=4", "DATA=/scans/chest x").stdout.splitlines()[-1]
    launch = "torch.distributed.run --standalone --nproc-per-node 4 train.py"
    assert f".venv/bin/python -m {launch} " in line
    assert "--epochs '3'" in line and "--data-dir '/scans/chest x'" in line
    scripts = [line.split()[1] for line in make("all", "PER_CLASS=8").stdout.splitlines()[-3:]]
    assert scripts == ["split_val.py", "train.py", "evaluate.py"]
    typo = make("train", "EPOCH=3")
    assert typo.returncode == 2 and "unknown variable EPOCH" in typo.stderr


def test_run_keeps_the_files_of_two_experiments_apart():
    for line in make("all", "RUN=wide").stdout.splitlines()[-2:]:
        assert "--checkpoint 'runs/wide/model.pth'" in line
        assert "--results-dir 'runs/wide/results'" in line
    again = make("evaluate", "RUN=wide", "ARGS=--from runs/wide/results/predictions.csv").stdout
    assert "--results-dir" not in again  # which only prints
    line = make("train", "RUN=wide", "MODEL=x.pth").stdout.splitlines()[-1]
    assert "--checkpoint 'x.pth'" in line and "--results-dir 'runs/wide/results'" in line


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
