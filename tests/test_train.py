"""train.py as a user runs it: main([...]) on drawn phantoms, then the written files are read."""

import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from phantoms import draw_folder
from PIL import Image

import common
import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A split data folder of small phantoms: 16 train and 8 val images a class; not to be changed."""
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    draw_folder(folder, train=24, test=2, size=64)
    for name in common.CLASSES:
        target = folder / "val" / name
        target.mkdir(parents=True)
        for path in sorted((folder / "train" / name).iterdir())[:8]:
            path.rename(target / path.name)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A feature store that the tests share, so that the features are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(phantoms, cache, tmp_path):
    """run(*flags) calls train.main on the phantoms with a small random network; returns the exit status."""

    def call(*flags, data=phantoms):
        paths = {"--data-dir": data, "--checkpoint": tmp_path / "model.pth", "--results-dir": tmp_path / "results"}
        fixed = {"--cache-dir": cache, "--arch": "resnet18", "--weights": "random", "--views": 4, "--device": "cpu"}
        return train.main([str(part) for pair in (paths | fixed).items() for part in pair] + [str(f) for f in flags])

    return call


def read_history(tmp_path):
    with open(tmp_path / "results" / "history.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def about(tmp_path):
    return json.loads((tmp_path / "model.json").read_text())


def test_a_run_writes_every_file_and_the_reference_s_lines(run, tmp_path, capsys):
    assert run("--epochs", 6) == 0
    out = capsys.readouterr().out
    history, model = read_history(tmp_path), about(tmp_path)
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    first = history[0]
    assert (
        f"Epoch [1/6], Train Loss: {first['train_loss']:.4f}, Train Acc: {first['train_accuracy']:.4f}, "
        f"Val Loss: {first['val_loss']:.4f}, Val Acc: {first['val_accuracy']:.4f}"
    ) in out
    best = min(history, key=lambda row: row["val_loss"])
    assert f"Training complete. Best validation loss: {best['val_loss']:.4f}" in out
    assert model["epoch"] == best["epoch"] and model["val_loss"] == pytest.approx(best["val_loss"])
    assert model["sha256"] == hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    assert len(model["images"]["train"]) == 32 and len(model["images"]["val"]) == 16
    assert model["arch"] == "resnet18" and model["classes"] == ["NORMAL", "PNEUMONIA"]
    for name in ("curves.png", "samples.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.pth", "results"]


def test_the_checkpoint_loads_strictly_into_torchvision_and_gives_the_validation_numbers(run, phantoms, tmp_path):
    assert run("--epochs", 5, "--no-calibrate") == 0
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Linear(512, 1)
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    network.eval()
    images = common.read_split(phantoms, "val")["val"]
    mean, std = torch.tensor(common.MEAN).view(3, 1, 1), torch.tensor(common.STD).view(3, 1, 1)
    to_tensor = torchvision.transforms.functional.to_tensor
    pixels = [to_tensor(common.make_view(common.load_image(image.path), 0, image.digest)) for image in images]
    with torch.no_grad():
        logits = network((torch.stack(pixels) - mean) / std).flatten()
    labels = torch.tensor([float(image.label) for image in images])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    assert loss == pytest.approx(about(tmp_path)["val_loss"], abs=0.01)
    assert about(tmp_path)["temperature"] == 1.0


def test_no_tensor_of_the_backbone_changes(run, tmp_path):
    before, _, _, _ = common.build_network("resnet18")
    assert before.state_dict() and run("--epochs", 3) == 0
    after = torch.load(tmp_path / "model.pth")
    assert set(after) - set(before.state_dict()) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())
    assert not before.training and not any(p.requires_grad for p in before.parameters())


def test_the_feature_loop_equals_the_plain_loop(phantoms, monkeypatch):
    """Same draws of the same views, once from features and once forward through the network for every batch."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})  # float32, so that the two compare closely
    device, dtype = common.pick_device("cpu")
    found = common.read_split(phantoms, "train", "val")
    images = found["train"][8:24] + found["val"][4:12]
    labels = torch.tensor([float(image.label) for image in images])
    network, _, width, _ = common.build_network("resnet18")
    args = Namespace(no_cache=True, cache_dir=None, batch_size=6, workers=0, epochs=3, patience=0)
    features, bad = common.extract_features(network, width, images, [3] * len(images), args, device, dtype)
    assert not bad
    mean, std = torch.tensor(common.MEAN).view(3, 1, 1), torch.tensor(common.STD).view(3, 1, 1)

    class Forward:
        """Stands in for the features: what is asked for is computed there and then."""

        shape = features.shape

        def __getitem__(self, index):
            if not isinstance(index, tuple):
                return features[index]  # of the standardisation, the same for both
            rows, views = torch.broadcast_tensors(index[0], torch.as_tensor(index[1]))
            pairs = zip(rows.flatten().tolist(), views.flatten().tolist(), strict=True)
            pixels = [
                torchvision.transforms.functional.to_tensor(
                    common.make_view(common.load_image(images[row].path), view, images[row].digest)
                )
                for row, view in pairs
            ]
            with torch.no_grad():
                return network((torch.stack(pixels) - mean) / std).view(*rows.shape, width)

    head = train.Head(list(range(16)), list(range(16, 24)), seed=1, lr=1e-3, weight_decay=0.0)
    fast, _ = train.train_heads(features, labels, [head], args, log=lambda line: None)
    slow, _ = train.train_heads(Forward(), labels, [head], args, log=lambda line: None)
    for a, b in zip(fast[0].history, slow[0].history, strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    assert len({row[1] for row in fast[0].history}) == 3


def head_problem(n=90, width=12, views=3, seed=0):
    """Features of two overlapping classes, labels, and a head that trains on the first two thirds."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 2).float()
    features = torch.randn(n, views, width, generator=generator) + labels[:, None, None] * torch.linspace(0, 1, width)
    return 5 + 3 * features, labels, train.Head(list(range(60)), list(range(60, n)), 0, 1e-2, 0.0)


def test_heads_side_by_side_equal_heads_one_by_one():
    features, labels, head = head_problem()
    heads = [head, head._replace(seed=4, lr=3e-2), head._replace(train=list(range(20, 71)), val=list(range(71, 90)))]
    args = Namespace(epochs=12, patience=2, batch_size=16)
    together, _ = train.train_heads(features, labels, heads, args, log=lambda line: None)
    for head, trained in zip(heads, together, strict=True):
        (alone,), _ = train.train_heads(features, labels, [head], args, log=lambda line: None)
        assert len(alone.history) == len(trained.history) and alone.epoch == trained.epoch
        for a, b in zip(alone.history, trained.history, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        assert torch.allclose(alone.weight, trained.weight, atol=1e-4)


def test_a_head_has_the_same_bits_on_any_number_of_threads():
    features, labels, head = head_problem(n=159, width=2048)  # where torch's own product differs by the last bit
    args, found, before = Namespace(epochs=3, patience=0, batch_size=50), [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        (trained,), _ = train.train_heads(features, labels, [head], args, log=lambda line: None)
        found.append((trained.weight.tolist(), trained.history, train.logits_of(trained, features, head.val).tolist()))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_early_stopping_plateau_and_best_epoch_follow_the_validation_loss():
    features, labels, head = head_problem()
    labels = torch.cat([labels[:60], 1 - labels[60:]])  # validation gets worse from the start
    args = Namespace(epochs=50, patience=5, batch_size=32)
    lines = []
    (trained,), _ = train.train_heads(features, labels, [head], args, log=lines.append)
    losses = [row[3] for row in trained.history]
    assert trained.epoch == losses.index(min(losses)) + 1 and len(losses) == trained.epoch + 5
    assert lines[-1] == "Early stopping triggered"
    rates = [row[5] for row in trained.history]
    assert rates[0] == 1e-2 and rates[trained.epoch + 3] == pytest.approx(5e-3)
    (whole,), _ = train.train_heads(
        features, labels, [head], Namespace(epochs=20, patience=0, batch_size=32), lines.append
    )
    assert len(whole.history) == 20


@pytest.mark.parametrize("batch_size", [1, 7, 32, 59, 60, 500])
def test_every_image_counts_once_whatever_the_batch_size(batch_size):
    features, labels, head = head_problem()
    head = head._replace(lr=0.0)
    (trained,), _ = train.train_heads(
        features[:, :1], labels, [head], Namespace(epochs=1, patience=0, batch_size=batch_size), lambda line: None
    )
    logits = train.logits_of(trained, features, head.train)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[head.train]).item()
    assert trained.history[0][1] == pytest.approx(loss, rel=1e-5)
    assert trained.history[0][2] == pytest.approx(((logits > 0) == (labels[head.train] > 0.5)).float().mean().item())


def test_every_validation_image_counts_once_however_many_there_are():
    features, labels, head = head_problem(n=760)  # more than one batch of validation
    rows = list(range(60, 760))
    args = Namespace(epochs=1, patience=0, batch_size=32)
    (trained,), _ = train.train_heads(features, labels, [head._replace(val=rows)], args, lambda line: None)
    logits = train.logits_of(trained, features, rows)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).item()
    assert trained.val_loss == pytest.approx(loss, rel=1e-5)
    assert trained.val_accuracy == pytest.approx(((logits > 0) == (labels[rows] > 0.5)).float().mean().item())


def test_unbalanced_classes_are_weighted_by_their_ratio():
    features, labels, head = head_problem()
    rows = [row for row in head.train if row % 2 == 0 or row < 20]  # 30 negatives, 10 positives
    model = train.Heads(features, labels, [head._replace(train=rows)])
    assert model.pos_weight.item() == pytest.approx(3.0)
    assert train.Heads(features, labels, [head]).pos_weight.item() == pytest.approx(1.0)


def test_a_feature_that_is_constant_in_training_is_not_blown_up():
    features, _, head = head_problem()
    features[:60, :, 0] = 2.0
    features[60:, :, 0] = 2.1
    mean, std = train.standardise(features, head.train)
    assert mean[0] == pytest.approx(2.0) and std[0] > 0.05 * std[1:].mean()
    x = features[:60].flatten(0, 1)
    assert torch.allclose(mean, x.mean(0), atol=1e-4) and torch.allclose(std[1:], x[:, 1:].std(0, False), rtol=1e-4)


def test_one_seed_gives_one_model_and_another_seed_another(run, tmp_path):
    weights = []
    for seed in (3, 3, 4):
        assert run("--epochs", 3, "--seed", seed) == 0
        weights.append(torch.load(tmp_path / "model.pth")["fc.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_head_from_the_store_is_the_head_without_it(run, tmp_path):
    assert run("--epochs", 3) == 0
    stored = torch.load(tmp_path / "model.pth")
    assert run("--epochs", 3, "--no-cache") == 0
    assert all(torch.equal(tensor, stored[name]) for name, tensor in torch.load(tmp_path / "model.pth").items())


def test_training_separates_what_is_separable_and_not_shuffled_labels(run, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for grey, name in ((90, "NORMAL"), (140, "PNEUMONIA")):
            folder = tmp_path / "bright" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(grey + rng.uniform(-15, 15), 10, (32, 32)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    assert run("--views", 2, data=tmp_path / "bright") == 0
    assert about(tmp_path)["val_accuracy"] >= 0.95
    features, labels, head = head_problem(n=600)
    head = head._replace(train=list(range(400)), val=list(range(400, 600)), lr=1e-3)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    args = Namespace(epochs=30, patience=5, batch_size=32)
    (control,), _ = train.train_heads(features, shuffled, [head], args, log=lambda line: None)
    assert 0.4 < control.val_accuracy < 0.6


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_loss_that_is_not_finite_stops_with_3_and_saves_nothing(run, tmp_path, monkeypatch, capsys, epoch):
    true_epoch, calls = train.train_epoch, []

    def broken(*args):
        calls.append(1)
        return true_epoch(*args) * (math.nan if len(calls) == epoch else 1)

    monkeypatch.setattr(train, "train_epoch", broken)
    (tmp_path / "model.pth").write_text("last week's")
    assert run() == 3
    assert (tmp_path / "model.pth").read_text() == "last week's" and not (tmp_path / "model.json").exists()
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and "not finite" in error[1] and error[0].startswith("warning: --weights random")


def test_ctrl_c_keeps_and_saves_the_best_epoch_so_far(run, tmp_path, monkeypatch, capsys):
    true_epoch, calls = train.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert run() == 130
    best = min(read_history(tmp_path), key=lambda row: row["val_loss"])
    assert about(tmp_path)["epoch"] == best["epoch"] and len(read_history(tmp_path)) == 3
    assert "kept the best so far, epoch" in capsys.readouterr().err
    torch.load(tmp_path / "model.pth")


def test_ctrl_c_before_the_first_epoch_leaves_the_old_model(run, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupted)
    (tmp_path / "model.pth").write_text("last week's")
    assert run() == 130
    assert (tmp_path / "model.pth").read_text() == "last week's"


def test_thresholds_follow_their_rule():
    probs, labels = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.8]), torch.tensor([0.0, 0, 1, 0, 1, 1])
    assert train.fit_threshold(0.7, probs, labels) == 0.7
    cut = train.fit_threshold("youden", probs, labels)
    assert 0.2 < cut < 0.3 or 0.4 < cut < 0.6  # sensitivity 1, specificity 2/3, or 2/3 and 1
    assert 0.4 < train.fit_threshold("sensitivity=0.6", probs, labels) < 0.6
    assert 0.2 < train.fit_threshold("sensitivity=0.95", probs, labels) < 0.3
    assert train.fit_threshold("sensitivity=0", probs, labels) >= 0.6
    assert train.fit_threshold("sensitivity=1", probs, 1 - labels) < 0.1


def test_a_fitted_threshold_is_stored(run, tmp_path):
    assert run("--epochs", 3, "--threshold", "youden") == 0
    assert about(tmp_path)["threshold_rule"] == "youden" and 0 < about(tmp_path)["threshold"] < 1
    assert run("--epochs", 3, "--threshold", "0.3") == 0
    assert about(tmp_path)["threshold"] == 0.3 and about(tmp_path)["threshold_rule"] == "fixed"


def test_the_temperature_undoes_an_overconfident_scale_and_stays_finite_on_separated_data():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, generator=generator) * 2
    labels = (torch.rand(4000, generator=generator) < logits.sigmoid()).float()
    assert train.fit_temperature(3 * logits, labels) == pytest.approx(1 / 3, rel=0.1)
    assert train.fit_temperature(logits, labels) == pytest.approx(1, rel=0.1)
    separated = torch.linspace(-1, 1, 50)
    assert 1 < train.fit_temperature(separated, (separated > 0).float()) < 30


def test_calibration_is_folded_into_the_saved_head(run, tmp_path):
    assert run("--epochs", 4, "--no-calibrate") == 0
    plain = torch.load(tmp_path / "model.pth")
    assert run("--epochs", 4) == 0
    temperature = about(tmp_path)["temperature"]
    calibrated = torch.load(tmp_path / "model.pth")
    assert temperature != 1.0
    assert torch.allclose(calibrated["fc.weight"] * temperature, plain["fc.weight"], rtol=1e-4)
    assert torch.allclose(calibrated["fc.bias"] * temperature, plain["fc.bias"], rtol=1e-4)


def test_cross_validation_reports_the_spread_and_writes_no_model(run, tmp_path, capsys):
    assert run("--folds", 4, "--repeats", 2, "--epochs", 8) == 0
    result = json.loads((tmp_path / "results" / "cv.json").read_text())
    row = result["metrics"]["auroc"]
    assert row["min"] <= row["mean"] <= row["max"] and row["deviation"] >= 0
    assert 0 <= row["single_split"] <= 1 and result["epochs"]["max"] <= 8
    assert not (tmp_path / "model.pth").exists() and "auroc" in capsys.readouterr().out


def test_a_score_that_is_undefined_everywhere_is_a_dash(run, tmp_path, monkeypatch, capsys):
    true = common.score
    monkeypatch.setattr(common, "score", lambda *args: true(*args) | {"ppv": None})
    assert run("--folds", 3, "--epochs", 2) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ppv")]
    assert row == ["ppv", *"-----"]
    assert set(json.loads((tmp_path / "results" / "cv.json").read_text())["metrics"]["ppv"].values()) == {None}


def test_folds_never_separate_a_patient_and_spread_the_classes(xrays_source):
    images = [common.Image(path, label, path.name) for path, label in common.list_split(xrays_source, "train")]
    for seed in range(20):
        folds = train.grouped_folds(images, 5, seed)
        of_patient = {}
        for image, fold in zip(images, folds, strict=True):
            of_patient.setdefault(common.patient_of(image.path.name, cautious=True), set()).add(fold)
        assert all(len(found) == 1 for found in of_patient.values())
        counts = [
            [sum(i.label == c and f == n for i, f in zip(images, folds, strict=True)) for n in range(5)] for c in (0, 1)
        ]
        assert max(map(max, counts)) <= 32 and min(map(min, counts)) >= 28
    assert train.grouped_folds(images, 5, 0) != train.grouped_folds(images, 5, 1)


def test_folds_take_any_file_name_and_never_lack_a_class():
    names = [f"{i}.jpeg" for i in range(7)] + [os.fsdecode(b"x\xff\xfe.png"), "8.jpeg"]
    images = [common.Image(Path(name), i % 2, name) for i, name in enumerate(names)]
    folds = train.grouped_folds(images, 3, 0)
    assert all({i.label for i, f in zip(images, folds, strict=True) if f == fold} == {0, 1} for fold in range(3))
    with pytest.raises(common.Failure, match="both classes for each fold"):
        train.grouped_folds(images, 5, 0)


def test_many_seeds_save_the_median(run, tmp_path, capsys):
    assert run("--seeds", 5, "--epochs", 3) == 0
    out = capsys.readouterr().out
    assert "5 heads, seeds 0 to 4: saving the median by val loss" in out
    low, high = (float(out.split(f"{name} ")[1].split(",")[0].split("\n")[0]) for name in ("min", "max"))
    assert low <= about(tmp_path)["val_loss"] <= high


@pytest.mark.parametrize("arch", ["densenet121", "efficientnet_b0"])
def test_other_architectures_train_and_load_back(run, tmp_path, arch):
    assert run("--arch", arch, "--views", 1, "--epochs", 2) == 0
    state = common.read_state(tmp_path / "model.pth")
    _, head, width, tensors = common.build_network(arch, state, "model.pth")
    assert tensors[f"{head}.weight"].shape == (1, width)
    network = torchvision.models.get_model(arch)
    network.set_submodule(head, torch.nn.Linear(width, 1))
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)


def test_the_seed_changes_the_head_and_not_random_weights():
    torch.manual_seed(1)
    first = common.build_network("resnet18")[0].state_dict()
    torch.manual_seed(2)
    second = common.build_network("resnet18")[0].state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arch", "resnet5"], "perhaps resnet50"),
        (["--arch", "squeezenet1_0"], "ends in a Linear"),
        (["--arch", "r3d_18"], "no such classifier"),
        (["--repeats", "5"], "needs --folds"),
        (["--batch-size", "99999999999999999999"], "below 100000"),
        (["--epochs", "0"], "at least 1"),
        (["--epochs", "ten"], "invalid int value"),
        (["--lr", "nan"], "at least 0"),
        (["--seed", "100000000000000000000"], "below 4.29497e+09"),
        (["--views", "1000000000"], "below 1000"),
        (["--checkpoint", "model.json"], "a name like model.pth"),
        (["--lr", "1e38"], "below 1e+09"),
        (["--device", "cuda"], "no such device"),
        (["--device", "gpu"], "expected auto, cpu"),
        (["--weights", "nowhere.pth"], "no such file"),
        (["--threshold", "2"], "from 0 to 1"),
        (["--folds", "2"], "expected 3 or more"),
        (["--data-dir", "nowhere"], "no such folder"),
        (["--vews", "3"], "unrecognized arguments"),
    ],
)
def test_a_mistake_gets_one_line_and_2(run, tmp_path, capsys, flags, expected):
    try:
        status = run(*flags)
    except SystemExit as stop:
        status = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert status == 2 and len(error) == 1 and expected in error[0]
    assert list(tmp_path.iterdir()) == []


def test_debug_adds_the_traceback(run, capsys):
    assert run("--arch", "resnet5") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run("--arch", "resnet5", "--debug") == 2
    assert "Traceback" in (error := capsys.readouterr().err) and "train.py" in error


def test_make_passes_a_flag_only_where_its_variable_was_given_and_refuses_a_typo():
    def make(*words):
        alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(["make", "-n", *words], cwd=ROOT, env=alone, capture_output=True, text=True)

    assert make("train").stdout.splitlines()[-1].split() == [".venv/bin/python", "train.py"]
    line = make("train", "EPOCHS=3", "GPUS=4", "DATA=/scans/chest x").stdout.splitlines()[-1]
    assert line.startswith(".venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 4 train.py ")
    assert '--epochs "3"' in line and '--data-dir "/scans/chest x"' in line
    assert [line.split()[1] for line in make("all").stdout.splitlines()[-3:]] == [
        "split_val.py", "train.py", "evaluate.py"
    ]  # fmt: skip
    typo = make("train", "EPOCH=3")
    assert typo.returncode == 2 and "unknown variable EPOCH" in typo.stderr


def test_training_does_not_wait_for_torchmetrics(phantoms, tmp_path):
    flags = command(phantoms, tmp_path / "cache", tmp_path, "--views", "1", "--epochs", "1")[1:]
    code = "import sys, train\nassert train.main(sys.argv[1:]) == 0 and 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("(default: 50)", "(default: 0.001)", "(default: 8)", "0 = never", "(default: resnet50)"):
        assert text in out


def test_help_and_typos_do_not_wait_for_torch():
    code = "import sys, train\ntry: train.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def command(phantoms, cache, tmp_path, *flags):
    return [
        "train.py", "--data-dir", str(phantoms), "--cache-dir", str(cache), "--checkpoint", str(tmp_path / "model.pth"),
        "--results-dir", str(tmp_path / "results"), "--arch", "resnet18", "--weights", "random", *flags,
    ]  # fmt: skip


def test_two_processes_of_torchrun_give_the_model_of_one(phantoms, tmp_path):
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ("--views", "3", "--epochs", "3")
    two = subprocess.run(
        both + command(phantoms, tmp_path / "a", tmp_path, *flags), cwd=ROOT, capture_output=True, text=True
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Training complete") == 1
    files = list((tmp_path / "a").glob("*/*.features"))
    record = 36 + 4 * 512 + 4  # bytes: key, vector and CRC
    assert [path.stat().st_size // record for path in files] == [56, 56]  # 32 * 3 + 16 views, none of them twice
    model = (tmp_path / "model.pth").read_bytes()
    one = subprocess.run([sys.executable, *command(phantoms, tmp_path / "b", tmp_path, *flags)], cwd=ROOT)
    assert one.returncode == 0 and (tmp_path / "model.pth").read_bytes() == model


def test_a_rank_that_dies_ends_the_run_and_the_next_one_goes_on(phantoms, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, sys, common, train\n"
        "true = common.FeatureStore.append\n"
        "def append(self, keys, vectors):\n"
        "    true(self, keys, vectors)\n"
        "    if os.environ['RANK'] == '1': os._exit(9)\n"
        "common.FeatureStore.append = append\n"
        "sys.exit(train.main())\n"
    )
    cache = tmp_path / "cache"
    flags = command(phantoms, cache, tmp_path, "--epochs", "2", "--views", "2")
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run(both + flags[1:], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert died.returncode != 0 and "exitcode" in died.stderr and not (tmp_path / "model.pth").exists()
    again = subprocess.run([sys.executable, *flags], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "Features: 80 of 80" not in again.stdout
    kept = int(again.stdout.split("Features: ")[1].split()[0])
    assert 16 <= kept < 80


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts processes through /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_pass_ends_all_processes_with_one_line(phantoms, tmp_path, number, status):
    flags = command(phantoms, tmp_path / "cache", tmp_path, "--views", "8", "--workers", "2", "--arch", "resnet50")
    process = subprocess.Popen(
        [sys.executable, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 60
    while time.time() < deadline and not list((tmp_path / "cache").glob("*/*.features")):
        time.sleep(0.1)
    workers = children_of(process.pid)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    lines = [line for line in error.splitlines() if not line.startswith("warning") and line.strip()]
    assert len(lines) == 1 and "interrupted" in lines[0], error
    time.sleep(2)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)
