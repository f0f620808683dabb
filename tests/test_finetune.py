"""Fine-tuning: the cut of a network, its tail, and train.py --unfreeze as a user runs it."""

import copy
import math
import os
import re
from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
from faults import listing
from helpers import path_flags, read_about, read_probs, read_rows
from torch import nn
from torchvision.models import get_model
from torchvision.models._api import register_model

import common
import evaluate
import train
from cxr import cache as cxr_cache
from cxr import finetune
from cxr.folders import CLASSES
from cxr.novelty import text_as_numbers
from cxr.patients import read_split
from train import HeadData

CPU = torch.device("cpu")


@register_model()
def two_layers(*, weights=None, num_classes=1000):
    """A tiny network of two layers. Dropout and an in-place operation are in the second one."""
    network = nn.Sequential()
    network.layer1 = nn.Sequential(nn.Conv2d(3, 6, 9, stride=8), nn.BatchNorm2d(6), nn.ReLU())
    conv = nn.Conv2d(6, 8, 3, stride=2)
    network.layer2 = nn.Sequential(nn.Hardswish(inplace=True), conv, nn.BatchNorm2d(8), nn.ReLU())
    network.dropout = nn.Dropout(0.5)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.flatten = nn.Flatten()
    network.fc = nn.Linear(8, num_classes)
    return network


@pytest.fixture
def fast(monkeypatch):
    """Learning rates with which a tiny network learns in some epochs."""
    monkeypatch.setattr(finetune, "TAIL_LR", 0.01)
    monkeypatch.setattr(finetune, "HEAD_LR", 0.1)


POOR_HEAD = "--lr", 100, "--epochs", 1  # so that fine-tuning is better


@pytest.fixture
def run_finetune(split_phantoms, cache, tmp_path):
    """run_finetune(*flags) trains the tiny network from layer2 on, and returns the exit code."""

    def call(*flags, unfreeze=("--unfreeze", "layer2", "--finetune-epochs", 4, "--batch-size", 4)):
        network = ("--arch", "two_layers", "--weights", "random", "--views", 3, "--workers", 0)
        return train.main(path_flags(split_phantoms, tmp_path, cache, *network, *unfreeze, *flags))

    return call


# ---------------------------------------------------------------- the cut


def relative_error(features, expected):
    """Returns the largest error of features, as a share of the largest feature."""
    return ((features - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("resnet18", "layer4"),
        ("resnet18", "layer4.1"),
        ("densenet121", "features.denseblock4"),
        ("efficientnet_b0", "features.7"),
        ("convnext_tiny", "features.7"),
        ("vgg11", "features.16"),
        ("vit_b_32", "encoder.layers.encoder_layer_11"),
        ("googlenet", "inception5b"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_tail_of_a_network_computes_its_features_and_its_weights_fit_back(arch, name):
    network = common.build_backbone(arch).network
    size = 224 if arch.startswith("vit") else 64  # a vision transformer has a fixed size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    tail = finetune.Tail(finetune.copy_tail(network, name), CPU)
    with torch.no_grad():
        activations = finetune.FrozenPart(network, name)(images)
        expected = network(images)
        assert relative_error(tail(activations), expected) < 1e-4
        for parameter in tail.parameters():
            parameter.mul_(1.1)
        changed = tail(activations)
        joined = finetune.join_parts(network, tail)
        assert relative_error(joined(images), changed) < 1e-4
        assert relative_error(changed, expected) > 0.001
    assert joined.state_dict().keys() == network.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in joined.parameters())


def test_a_part_of_the_network_that_cannot_be_trained_alone_is_refused(monkeypatch):
    monkeypatch.setattr(finetune, "SIZE", 64)
    network = common.build_backbone("resnet18").network
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name in ("layer4.1.conv2", "avgpool", "nosuch", "", "layer4."):
        assert not finetune.can_cut(network, name, images)
    with pytest.raises(finetune.Failure, match="layer4, layer3, layer2, layer1, bn1"):
        finetune.check_cut(network, "layer4.1.conv2")


def test_a_wrong_name_is_one_line_with_names_that_work_and_changes_nothing(refused, home):
    before = listing(home)
    assert "; expected for example bn" in refused(2, "train", "--unfreeze", "")
    assert "needs --unfreeze" in refused(2, "train", "--finetune-epochs", 3)
    line = refused(2, "train", "--unfreeze", "layer9")
    assert "--unfreeze layer9 (make: UNFREEZE=layer9)" in line and "for example bn, conv" in line
    assert listing(home) == before


def test_folds_and_several_processes_are_refused(refused, monkeypatch):
    folds = "--folds", 3
    assert "cannot be used together" in refused(2, "train", "--unfreeze", "bn", *folds)
    assert "cannot be used together" in refused(
        2, "train", "--unfreeze", "bn", *folds, "--sizes", "2,4"
    )
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setitem(os.environ, name, value)
    assert "cannot be used with torchrun (make: GPUS=)" in refused(2, "train", "--unfreeze", "bn")


# ---------------------------------------------------------------- the training


def test_the_loop_on_activations_is_the_usual_loop_through_the_whole_network(split_phantoms):
    xrays = read_split(split_phantoms, "train", classes=CLASSES)[10:30]
    labels = torch.tensor([float(xray.label) for xray in xrays])
    backbone = common.build_backbone("two_layers")
    before = copy.deepcopy(backbone.network.state_dict())
    flags = dict(unfreeze="layer2", finetune_epochs=3, batch_size=6, window=2.0, views=3)
    args = Namespace(**flags, feature_batch_size=4, workers=0, cache_dir=None)
    part = finetune.FrozenPart(backbone.network, "layer2")
    activations = common.extract_activations(
        backbone, part, xrays, args, n_views=3, device=CPU, dtype=torch.float32
    )
    data = HeadData(activations[:14], labels[:14], activations[14:, 0], labels[14:])
    best = train.fine_tune(backbone, data, args, 7, CPU)

    views = common.Views(xrays, 3, 2.0)
    pixels = torch.stack([common.NORMALIZE(views[i][1]) for i in range(len(xrays))])
    network = copy.deepcopy(backbone.network)
    head = nn.Linear(8, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model, tail = nn.Sequential(network, head), network.layer2.requires_grad_(True)
    groups = [{"params": tail.parameters()}, {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-4, 1e-3], epochs=3, steps_per_epoch=3
    )
    criterion = train.balanced_criterion(data.train_labels)
    generator = torch.Generator().manual_seed(7)
    for epoch in range(3):
        order = torch.randperm(14, generator=generator)
        view = torch.randint(3, (14,), generator=generator)
        for rows in order.split(6):
            loss = criterion(model(pixels[rows, view[rows]]).flatten(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
        with torch.no_grad():
            loss = criterion(model(pixels[14:, 0]).flatten(), labels[14:]).item()
        assert loss == pytest.approx(best.history[epoch]["val_loss"], abs=2e-6)
    assert all(torch.equal(backbone.network.state_dict()[k], v) for k, v in before.items())


def test_only_the_tail_changes_and_both_losses_are_on_the_screen_and_in_model_json(
    fast, run_finetune, tmp_path, capsys
):
    assert run_finetune(*POOR_HEAD) == 0
    out, about = capsys.readouterr().out, read_about(tmp_path)
    assert "Activations: 120 views of 6x27x27: " in out and "24 views of 6x27x27: 0 MB" in out
    result = about["fine_tuning"]
    assert result["unfreeze"] == "layer2" and result["is_saved"]
    assert about["val_loss"] == result["val_loss"] < result["frozen_val_loss"]
    assert f"layer2 on helps: its validation loss is {result['val_loss']:.4f}, that of" in out
    assert f"frozen network is {result['frozen_val_loss']:.4f}. The fine-tuned network is s" in out
    assert f"Training complete. Best validation loss: {result['val_loss']:.4f}" in out
    assert len(re.findall(r"^Epoch \[\d/4\]", out, re.MULTILINE)) == 4
    assert len(read_rows(tmp_path / "results" / "history.csv")) == 4

    before = common.build_backbone("two_layers").network.state_dict()
    after = torch.load(tmp_path / "model.pth")
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    trained = {"1.weight", "1.bias", "2.weight", "2.bias"}  # not the statistics of BatchNorm
    assert changed == {f"layer2.{name}" for name in trained}
    assert after.keys() - before.keys() == {"fc.weight", "fc.bias"}


def test_the_model_is_a_plain_network_that_evaluate_uses_without_a_flag(
    fast, quick, run_finetune, split_phantoms, cache, tmp_path
):
    assert run_finetune(*POOR_HEAD) == 0
    flags = path_flags(split_phantoms, tmp_path, cache, "--workers", 0)
    assert evaluate.main([*flags, "--cam", str(tmp_path / "maps")]) == 0
    assert len([*tmp_path.glob("maps/*/*.png")]) == 24
    probs = read_probs(tmp_path / "results" / "predictions.csv")
    network = get_model("two_layers", num_classes=1)
    network.load_state_dict(torch.load(tmp_path / "model.pth"))
    network.eval()
    xrays = read_split(split_phantoms, "test", classes=CLASSES)
    views = common.Views(xrays, 1, 2.0)
    for i, xray in enumerate(xrays):
        name = xray.path.relative_to(split_phantoms).as_posix()
        logit = network(common.NORMALIZE(views[i][1]))
        assert logit.sigmoid().item() == pytest.approx(probs[name], abs=1e-3)
    table = tmp_path / "results" / "predictions.csv"
    other = table.rename(tmp_path / "predictions.csv")
    assert evaluate.main([*flags, "--compare", str(other)]) == 0


def test_the_training_features_in_model_json_are_those_of_the_fine_tuned_network(
    fast, run_finetune, split_phantoms, tmp_path
):
    assert run_finetune(*POOR_HEAD) == 0
    state = torch.load(tmp_path / "model.pth")
    tuned = common.build_backbone("two_layers", state, "model.pth").network
    frozen = common.build_backbone("two_layers").network
    views = common.Views(read_split(split_phantoms, "train", classes=CLASSES), 1, 2.0)
    pixels = torch.cat([common.NORMALIZE(views[i][1]) for i in range(len(views))])
    mean = text_as_numbers(read_about(tmp_path)["features"]["mean"])
    error = (mean - tuned(pixels).mean(0)).norm()  # of bfloat16
    assert error < 0.1 * (mean - frozen(pixels).mean(0)).norm()


def test_if_fine_tuning_does_not_help_the_model_is_the_one_without_the_flag(
    run_finetune, tmp_path, capsys
):
    models = []
    for unfreeze in ((), ("--unfreeze", "layer2", "--finetune-epochs", 1)):
        assert run_finetune("--lr", 0.1, unfreeze=unfreeze) == 0
        models.append((tmp_path / "model.pth").read_bytes())
    assert models[0] == models[1]
    out = capsys.readouterr().out
    assert "layer2 on does not help: its val" in out and "The frozen network is saved" in out
    about = read_about(tmp_path)
    assert not about["fine_tuning"]["is_saved"]
    assert about["val_loss"] == about["fine_tuning"]["frozen_val_loss"]


def test_the_best_of_several_seeds_is_saved(fast, run_finetune, tmp_path, capsys):
    assert run_finetune(*POOR_HEAD, "--seeds", 2) == 0
    out, about = capsys.readouterr().out, read_about(tmp_path)
    assert "The best of the 2 networks counts, because their mean is not a network" in out
    losses = [scores["val_loss"] for scores in about["seeds"]]
    assert len(losses) == 2 and about["val_loss"] == min(losses) < max(losses)
    best = losses.index(min(losses))
    assert run_finetune(*POOR_HEAD, "--seed", best) == 0
    assert read_about(tmp_path)["val_loss"] == pytest.approx(min(losses))


def test_activations_that_do_not_fit_into_the_memory_give_the_same_model(
    fast, run_finetune, monkeypatch, tmp_path, capsys
):
    models = set()
    for n_bytes in (10**12, 1000):
        monkeypatch.setattr(cxr_cache, "count_memory", lambda n_bytes=n_bytes: n_bytes)
        assert run_finetune(*POOR_HEAD) == 0
        models.add((tmp_path / "model.pth").read_bytes())
    assert "in a temporary file" in capsys.readouterr().out and len(models) == 1


def test_ctrl_c_keeps_the_best_epoch_of_the_fine_tuning(
    run_finetune, tmp_path, monkeypatch, capsys
):
    scores = [(0.6, 0.5), (0.5, 0.5), (0.4, 0.5), KeyboardInterrupt]  # the first one is frozen
    monkeypatch.setattr(train, "validate", Mock(side_effect=scores))
    assert run_finetune("--epochs", 1) == 130
    assert "interrupted after 2 epochs; saved epoch 2" in capsys.readouterr().err
    assert read_about(tmp_path)["val_loss"] == 0.4


def test_ctrl_c_before_the_first_epoch_of_the_fine_tuning_keeps_the_frozen_network(
    run_finetune, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "validate", Mock(side_effect=[(0.6, 0.5), KeyboardInterrupt]))
    assert run_finetune("--epochs", 1) == 130
    error = capsys.readouterr().err
    assert "interrupted before the first epoch of fine-tuning; saved epoch 1 of the froz" in error
    assert read_about(tmp_path)["val_loss"] == 0.6
    assert read_about(tmp_path)["fine_tuning"] is None


def test_ctrl_c_in_a_later_seed_keeps_the_best_network_so_far(
    run_finetune, tmp_path, monkeypatch, capsys
):
    frozen = [(0.6, 0.5)] * 3  # two seeds, and their mean
    scores = [*frozen, (0.3, 0.5), (0.4, 0.5), KeyboardInterrupt]
    monkeypatch.setattr(train, "validate", Mock(side_effect=scores))
    assert run_finetune("--epochs", 1, "--seeds", 2, "--finetune-epochs", 2) == 130
    assert "; saved epoch 1 in " in capsys.readouterr().err
    assert read_about(tmp_path)["val_loss"] == 0.3


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RuntimeError("out of memory"), 4, r"fine-tuning failed \(out of memory\); .*--batch-size"),
        ((math.nan, 0.5), 3, r"epoch 1: the loss is not finite; .*UNFREEZE="),
    ],
)
def test_a_failure_is_one_line_with_advice_and_writes_nothing(
    run_finetune, tmp_path, monkeypatch, capsys, error, status, words
):
    monkeypatch.setattr(train, "validate", Mock(side_effect=[(0.6, 0.5), error]))
    assert run_finetune("--epochs", 1) == status
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "model.pth").exists()
