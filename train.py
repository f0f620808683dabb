"""Trains one output neuron on the features of a frozen network that was pretrained on ImageNet.

With --unfreeze, the last part of the network is trained as well.

Reads DIR/{train,val}/{NORMAL,PNEUMONIA}/ (split_val.py makes val/). Writes model.pth, model.json,
and into results/ history.csv, curves.png and samples.png. With --folds it cross-validates instead,
and writes cv.json, doubtful_labels.csv and doubtful_labels.png. With --sizes it writes curve.json
and curve.png instead: how the scores change with the number of training images.

    python train.py
    python train.py --epochs 100 --lr 3e-4 --seeds 10
    python train.py --folds 5 --repeats 5
    python train.py --unfreeze layer4
    python train.py --folds 10 --repeats 5 --sizes 25,50,100,200
"""

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import NamedTuple

import common  # before torch: it imports cxr, which reports missing packages

# isort: split
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from cxr import folds
from cxr.calibration import calibrate, fit_threshold, threshold_rule
from cxr.checkpoint import load_weights, save_checkpoint
from cxr.cli import Parser, add_flags, add_network_flags, call, number, run, sizes
from cxr.curves import choose_samples, draw_curves, draw_samples, write_history
from cxr.errors import (
    INTERRUPTED,
    Failure,
    as_typed,
    interrupt_exit_code,
    progress,
    rank_and_world,
    warn,
)
from cxr.files import check_writable, write_json
from cxr.finetune import FrozenPart, Tail, check_cut, copy_tail, join_parts, make_optimizer
from cxr.folders import SPLIT_FILES, check_split_classes
from cxr.model_info import images_info, training_info
from cxr.novelty import describe_features
from cxr.patients import choose_hash_dir, read_split
from cxr.previous import keep_previous, previous_files
from cxr.proportions import accuracy_intervals, few_patients_warnings, format_interval

# ---------------------------------------------------------------- the training loop


class HeadData(NamedTuple):
    """Features and labels to train a head. Label 1 is the positive class.

    To train a tail, the features are activations: instead of the width they have the shape at the
    cut, such as (channels, height, width).
    """

    train_features: torch.Tensor  # (N, n_views, width), float32 or the fast dtype of the device
    train_labels: torch.Tensor  # float32 (N,)
    val_features: torch.Tensor  # float32 (M, width)
    val_labels: torch.Tensor  # float32 (M,)


class TrainedHead(NamedTuple):
    """A head at its best epoch, or the mean of several heads."""

    # What comes before the head: the trained Tail; None if the network is frozen. From train_epochs
    # to train_head, it is Standardize.
    tail: nn.Module | None
    head: nn.Linear  # on features that are not standardised
    epoch: int
    val_loss: float
    val_accuracy: float
    history: list  # one dict for each epoch, also those after the best one: history.csv
    exit_code: int = 0  # 130 or 143 if Ctrl-C or SIGTERM ended the training


def train_head(data, args, seed, log=progress):
    """Trains one output neuron on features. Returns the TrainedHead of the best epoch.

    log: called with each line of output. Raises as train_epochs does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = data.train_features.shape[2]
        model = nn.Sequential(Standardize(data.train_features), nn.Linear(width, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    # Halves the learning rate if the val loss has not improved by 0.01 % for three epochs.
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    advice = f"use a smaller --lr (make: LR={args.lr / 10:g})"
    limits = {"n_epochs": args.epochs, "patience": args.patience, "batch_size": args.batch_size}
    best = train_epochs(model, data, optimizer, scheduler, seed, log, advice, **limits)
    head = fold_standardization(best.tail, best.head)
    return best._replace(tail=None, head=head)


def train_epochs(
    model, data, optimizer, scheduler, seed, log, advice, *, n_epochs, patience, batch_size
):
    """Trains a model. Returns a TrainedHead with a copy of the two parts of the best epoch.

    model: nn.Sequential of two parts, Standardize or a Tail, then the head; scheduler: steps after
    each epoch, or None. After Ctrl-C or SIGTERM, the best epoch so far counts. Raises Failure (exit
    code 3) with the advice if the loss is not finite.
    """
    rng = torch.Generator().manual_seed(seed)
    criterion = balanced_criterion(data.train_labels)
    best_val_loss, best, history = math.inf, None, []
    try:
        for epoch in range(1, n_epochs + 1):
            lr = optimizer.param_groups[0]["lr"]
            train_loss, train_accuracy = train_one_epoch(
                model, data, criterion, optimizer, batch_size, rng
            )
            val_loss, val_accuracy = validate(model, data, criterion)
            if scheduler:
                scheduler.step(val_loss)

            history.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "train_accuracy": train_accuracy,
                    "val_loss": val_loss,
                    "val_accuracy": val_accuracy,
                    "lr": lr,
                }
            )
            improved = val_loss < best_val_loss
            if improved:  # before the line, because some readers press Ctrl-C when they see it
                best_val_loss = val_loss
                best = TrainedHead(*copy.deepcopy(model), epoch, val_loss, val_accuracy, history)
            log(
                f"Epoch [{epoch}/{n_epochs}], "
                f"Train Loss: {train_loss:.4f}, Train Acc: {train_accuracy:.4f}, "
                f"Val Loss: {val_loss:.4f}, Val Acc: {val_accuracy:.4f}, LR: {lr:.1e}"
            )
            if not math.isfinite(train_loss + val_loss):
                raise Failure(f"epoch {epoch}: the loss is not finite; {advice}", 3)
            if not improved and patience and epoch - best.epoch >= patience:
                log("Early stopping triggered")
                break
    except KeyboardInterrupt as interrupt:
        if best is None:
            raise
        best = best._replace(exit_code=interrupt_exit_code(interrupt))
    return best


def train_one_epoch(model, data, criterion, optimizer, batch_size, rng):
    """Trains on every image once, in one randomly drawn view. Returns mean loss and accuracy."""
    features, labels = data.train_features, data.train_labels
    order = torch.randperm(len(labels), generator=rng)
    view = torch.randint(features.shape[1], labels.shape, generator=rng)
    total_loss = correct = 0
    for rows in order.split(batch_size):
        logits = model(features[rows, view[rows]]).squeeze(1)
        loss = criterion(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(rows)
        correct += ((logits > 0) == (labels[rows] > 0.5)).sum().item()
    return total_loss / len(labels), correct / len(labels)


@torch.no_grad()
def validate(model, data, criterion):
    """Returns loss and accuracy on the validation images."""
    logits = model(data.val_features).squeeze(1)
    accuracy = ((logits > 0) == (data.val_labels > 0.5)).float().mean()
    return criterion(logits, data.val_labels).item(), accuracy.item()


def balanced_criterion(labels):
    """Returns the binary cross-entropy in which both classes have the same total weight."""
    n_negative, n_positive = (labels < 0.5).sum(), labels.sum()
    return nn.BCEWithLogitsLoss(pos_weight=n_negative / n_positive)


class Standardize(nn.Module):
    """Standardises features with the mean and standard deviation of the training features.

    The standard deviation is at least a tenth of the root mean square of all standard deviations:
    otherwise a feature that is nearly constant in training could become huge in other images.
    """

    def __init__(self, features):
        """features: float, also of 16 bits (N, n_views, width), of the training images."""
        super().__init__()
        # Some columns at a time: in float32, all of them might be too large for the memory.
        columns = features.flatten(0, 1).split(16, dim=1)
        parts = [torch.std_mean(part.float(), dim=0, correction=0) for part in columns]
        std, mean = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        smallest = 0.1 * std.square().mean().sqrt().item()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=max(smallest, 1e-12)))

    def forward(self, x):
        return (x.float() - self.mean) / self.std


def fold_standardization(standardize, linear):
    """Returns one nn.Linear that computes the same as Standardize and then an nn.Linear."""
    with torch.no_grad():
        head = copy.deepcopy(linear)
        head.weight /= standardize.std
        head.bias -= (head.weight * standardize.mean).sum(1)  # with the new weight
    return head


# ---------------------------------------------------------------- several heads


def train_seeds(data, args):
    """Trains --seeds heads. Returns (the TrainedHead to save, the TrainedHeads of all seeds)."""
    if args.seeds == 1:
        trained = train_head(data, args, args.seed)
        return trained, [trained]
    heads = []
    for seed in range(args.seed, args.seed + args.seeds):
        trained = train_one_of_several(data, args, seed)
        heads.append(trained)
        scores = f"Val Loss: {trained.val_loss:.4f}, Val Acc: {trained.val_accuracy:.4f}"
        print(f"Seed {seed}: epoch {trained.epoch}, {scores}")  # instead of a line per epoch
    for name in ("val_loss", "val_accuracy"):
        values = folds.spread([getattr(trained, name) for trained in heads])
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
    print(f"The mean of {len(heads)} heads counts; epoch and curves are those of the first head")
    # The mean of linear heads is again one linear head, and it varies less between trainings.
    return mean_head(heads, data), heads


def train_one_of_several(data, args, seed):
    """Trains a head without a line per epoch. Ctrl-C and SIGTERM end the run, nothing is saved."""
    trained = train_head(data, args, seed, log=lambda line: None)
    if trained.exit_code:
        raise Failure(INTERRUPTED, trained.exit_code)
    return trained


def mean_head(heads, data):
    """Returns the mean of several TrainedHeads, with epoch and history of the first one."""
    mean = copy.deepcopy(heads[0].head)
    with torch.no_grad():
        mean.weight.copy_(torch.stack([trained.head.weight for trained in heads]).mean(0))
        mean.bias.copy_(torch.stack([trained.head.bias for trained in heads]).mean(0))
    val_loss, val_accuracy = validate(mean, data, balanced_criterion(data.train_labels))
    return heads[0]._replace(head=mean, val_loss=val_loss, val_accuracy=val_accuracy)


# ---------------------------------------------------------------- fine-tuning


class Result(NamedTuple):
    """A network with a trained head: what is saved."""

    backbone: common.Backbone
    data: HeadData  # the features of this network; after fine-tuning, of view 0 only
    best: TrainedHead
    scores: list  # the val_scores of each seed


def fine_tune_if_better(frozen, train_xrays, val_xrays, args, device, dtype):
    """Fine-tunes a network. Returns the Result with the lower validation loss.

    frozen: the Result of the frozen network. Also returns what model.json says about it.
    """
    print(f"Frozen network: best validation loss {frozen.best.val_loss:.4f}")
    try:
        data = load_activations(frozen, train_xrays, val_xrays, args, device, dtype)
        best, scores = fine_tune_seeds(frozen.backbone, data, args, device)
    except KeyboardInterrupt as interrupt:  # before the end of the first epoch
        best = frozen.best._replace(exit_code=interrupt_exit_code(interrupt))
        return frozen._replace(best=best), None

    is_better = best.val_loss < frozen.best.val_loss
    helps = "helps" if is_better else "does not help"
    saved = "fine-tuned" if is_better else "frozen"
    frozen_loss = f"that of the frozen network is {frozen.best.val_loss:.4f}"
    losses = f"its validation loss is {best.val_loss:.4f}, {frozen_loss}"
    print(f"Fine-tuning from {args.unfreeze} on {helps}: {losses}. The {saved} network is saved")
    description = {
        "unfreeze": args.unfreeze,
        "val_loss": best.val_loss,
        "frozen_val_loss": frozen.best.val_loss,
        "is_saved": is_better,
    }
    if not is_better:
        best = frozen.best._replace(exit_code=best.exit_code)
        return frozen._replace(best=best), description
    network = join_parts(frozen.backbone.network, best.tail)
    backbone = frozen.backbone._replace(network=network)
    return Result(backbone, compute_features(best.tail, data), best, scores), description


def load_activations(frozen, train_xrays, val_xrays, args, device, dtype):
    """Returns the HeadData of a Result with activations instead of the features."""
    part = FrozenPart(frozen.backbone.network, args.unfreeze)
    options = {"args": args, "device": device}
    train_activations = common.extract_activations(
        frozen.backbone, part, train_xrays, n_views=args.views, dtype=dtype, **options
    )
    val_activations = common.extract_activations(
        frozen.backbone, part, val_xrays, n_views=1, dtype=torch.float32, **options
    )
    return frozen.data._replace(
        train_features=train_activations, val_features=val_activations[:, 0]
    )


def fine_tune_seeds(backbone, data, args, device):
    """Fine-tunes with --seeds seeds. Returns (the best TrainedHead, the val_scores of each seed).

    data: activations and labels. After Ctrl-C or SIGTERM, the best epoch so far counts.
    """
    best, scores = None, []
    for seed in range(args.seed, args.seed + args.seeds):
        if args.seeds > 1:
            print(f"Fine-tuning with seed {seed}")
        try:
            trained = fine_tune(backbone, data, args, seed, device)
        except KeyboardInterrupt as interrupt:  # before the end of the first epoch
            if best is None:
                raise
            return best._replace(exit_code=interrupt_exit_code(interrupt)), scores
        scores.append(val_scores(trained))
        if best is None or trained.val_loss < best.val_loss:
            best = trained
        if trained.exit_code:
            return best._replace(exit_code=trained.exit_code), scores
    if args.seeds > 1:
        print(f"The best of the {args.seeds} networks counts, because their mean is not a network")
    return best, scores


def fine_tune(backbone, data, args, seed, device):
    """Trains a copy of the network from --unfreeze on, and a new head. Returns a TrainedHead.

    data: activations and labels. Raises Failure if the device fails, and as train_epochs does.
    """
    tail = Tail(copy_tail(backbone.network, args.unfreeze), device)
    # The trained head fits the training images too well. A head that starts at zero reaches a lower
    # validation loss than a random one, and its seeds differ less.
    head = nn.Linear(backbone.width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    n_batches = math.ceil(len(data.train_labels) / args.batch_size)
    optimizer = make_optimizer(tail, head, args.finetune_epochs * n_batches)
    limits = {"n_epochs": args.finetune_epochs, "patience": 0, "batch_size": args.batch_size}
    advice = "choose a later module for --unfreeze (make: UNFREEZE=), or leave it out"
    try:
        model = nn.Sequential(tail, head)
        return train_epochs(model, data, optimizer, None, seed, progress, advice, **limits)
    except RuntimeError as error:  # the memory is full, or the device lacks an operator
        reason = " ".join(str(error).split())[:200]
        other = "use a smaller --batch-size (make: BATCH_SIZE=8) or --device cpu (make: DEVICE=cpu)"
        raise Failure(f"fine-tuning failed ({reason}); {other}, or {advice}", 4) from error


@torch.no_grad()
def compute_features(tail, data):
    """Returns `data` with the features of a trained tail instead of the activations.

    The training features are those of view 0 only: (N, 1, width).
    """
    return data._replace(
        train_features=tail(data.train_features[:, 0])[:, None],
        val_features=tail(data.val_features),
    )


# ---------------------------------------------------------------- images and features


def load_inputs(args, *outputs):
    """Returns (Xrays of train/ and val/, Backbone, device, fast dtype for training views).

    Raises an error if one of the files `outputs` cannot be written.
    """
    device, dtype = common.pick_device(args.device)
    splits = ["train", "val"]
    if args.folds and not (args.data_dir / "val").exists():
        splits = ["train"]  # cross-validation does not need val/
    check_split_classes(args.data_dir, args.classes)
    hash_dir = choose_hash_dir(args)
    xrays = read_split(args.data_dir, *splits, classes=args.classes, hash_dir=hash_dir)
    state, source = load_weights(args)
    backbone = common.build_backbone(args.arch, state, source)
    if args.unfreeze is not None:
        check_cut(backbone.network, args.unfreeze)
    check_writable(*outputs)
    return xrays, backbone, device, dtype


def load_features(backbone, xrays, args, device, dtype, for_training):
    """Returns (features (N, n_views, width), readable Xrays, {path: reason} of others).

    for_training: all views, computed in `dtype`; otherwise only view 0, computed in float32.
    Raises Failure if no readable image of a class is left.
    """
    features, readable, unreadable = common.extract_features(
        backbone,
        xrays,
        args,
        n_views=args.views if for_training else 1,
        window=args.window,
        device=device,
        dtype=dtype if for_training else torch.float32,
        compiled=args.compile and for_training,
    )
    labels = {xray.label for xray in readable}
    for label, name in enumerate(args.classes):
        if label not in labels:
            raise Failure(f"{args.data_dir}: no readable {name} image is left")
    return features, readable, unreadable


def labels_of(xrays):
    """Returns the labels as float32 (N,)."""
    return torch.tensor([float(xray.label) for xray in xrays])


def print_class_weight(labels, classes):
    """Prints the weight of a positive image in the loss, if the classes differ in size."""
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    if n_positive != n_negative:
        negative, positive = classes
        weight = balanced_criterion(labels).pos_weight.item()
        counts = f"{n_negative} {negative} and {n_positive} {positive} images"
        weighting = f"in the loss, each {positive} image has the weight {weight:.3g}"
        print(f"Training on {counts}: {weighting}")


# ---------------------------------------------------------------- train


def train_model(args):
    """Trains, calibrates and saves a head, with --unfreeze also the last part of the network.

    Returns the content of model.json.
    """
    info_file = args.checkpoint.with_suffix(".json")
    report_file = args.results_dir / "metrics.json"
    outputs = [args.checkpoint, info_file, report_file, *previous_files(args.checkpoint)]
    xrays, backbone, device, dtype = load_inputs(args, *outputs)
    train_xrays = [xray for xray in xrays if xray.split == "train"]
    val_xrays = [xray for xray in xrays if xray.split == "val"]
    train_features, train_xrays, unreadable_train = load_features(
        backbone, train_xrays, args, device, dtype, for_training=True
    )
    val_features, val_xrays, unreadable_val = load_features(
        backbone, val_xrays, args, device, dtype, for_training=False
    )
    common.end_other_ranks()
    val_features = val_features[:, 0]
    data = HeadData(train_features, labels_of(train_xrays), val_features, labels_of(val_xrays))
    print_class_weight(data.train_labels, args.classes)

    # With one thread, sums have the same order on every number of cores.
    with common.one_thread():
        best, heads = train_seeds(data, args)
    result = Result(backbone, data, best, [val_scores(trained) for trained in heads])
    fine_tuning = None
    if args.unfreeze and not best.exit_code:
        result, fine_tuning = fine_tune_if_better(
            result, train_xrays, val_xrays, args, device, dtype
        )
    backbone, data, best, scores = result
    print(f"Training complete. Best validation loss: {best.val_loss:.4f}")
    with common.one_thread():
        head, fitted = fit_on_val(best.head, data, val_xrays, args)

    transforms = common.PREPARE, common.AUGMENT, backbone.normalize
    description = training_info(args, transforms, val_scores(best), scores, fine_tuning)
    description |= images_info(args, train_xrays + val_xrays, unreadable_train | unreadable_val)
    standardize = Standardize(data.train_features[:, :1])  # of view 0, the images as they are
    mean, std = standardize.mean, standardize.std
    description["features"] = describe_features(mean, std, standardize(data.val_features))
    kept = keep_previous(args.checkpoint, description)
    content = save_checkpoint(args.checkpoint, backbone, head, description | fitted)
    write_history(args.results_dir / "history.csv", best.history)
    threshold = f"threshold {fitted['threshold']:.4g}"
    at_threshold = [f"{name} {format_interval(v)}" for name, v in fitted["at_threshold"].items()]
    print(f"At {threshold} on val: {', '.join(at_threshold)}")
    for text in few_patients_warnings("val", description["val_patients"]):
        warn(text)

    source = f"epoch {best.epoch}"
    if args.seeds > 1 and not best.tail:
        source = f"the mean of {len(scores)} heads"
    if args.unfreeze and not best.tail:
        source += " of the frozen network"
    saved = f"{source} in {args.checkpoint}, {threshold}"
    if best.exit_code:
        message = f"interrupted after {len(best.history)} epochs; saved {saved}"
        if args.unfreeze and not fine_tuning:
            message = f"interrupted before the first epoch of fine-tuning; saved {saved}"
        raise Failure("; ".join(filter(None, [message, kept])), best.exit_code)
    draw_training(args, best, train_xrays)
    print(f"Saved {saved}; curves and samples are in {args.results_dir}")
    if report_file.exists():
        what = f"{report_file} belongs to an earlier model"
        print(f"{what}; for the new one, run evaluate.py (make evaluate)")
    if kept:
        print(kept)
    return content


def fit_on_val(head, data, val_xrays, args):
    """Calibrates a head, and chooses the threshold, on the validation images.

    Returns (the calibrated nn.Linear, what model.json says about it).
    """
    logits = head(data.val_features).squeeze(1).detach()
    slope, intercept = 1.0, 0.0
    if not args.no_calibrate:
        slope, intercept = calibrate(logits, data.val_labels)
    probs = (slope * logits + intercept).sigmoid()
    threshold = fit_threshold(args.threshold, probs, data.val_labels)
    calibrated = copy.deepcopy(head)
    with torch.no_grad():
        calibrated.weight.mul_(slope)
        calibrated.bias.mul_(slope).add_(intercept)
    return calibrated, {
        "threshold": threshold,
        "slope": slope,
        "intercept": intercept,
        "at_threshold": accuracy_intervals(probs > threshold, data.val_labels, val_xrays),
    }


def val_scores(trained):
    """Returns {epoch, val_loss, val_accuracy} of a TrainedHead."""
    return {name: getattr(trained, name) for name in ("epoch", "val_loss", "val_accuracy")}


def draw_training(args, best, xrays):
    """Draws the curves of the training, and at most 8 views of each sample image."""
    draw_curves(args.results_dir / "curves.png", best.history, best.epoch)
    samples, views = choose_samples(xrays), []
    for xray in samples:
        image = common.load_image(xray.path, args.window)
        numbers = range(min(args.views, 8))
        views.append([common.make_view(image, number, xray.sha256) for number in numbers])
    draw_samples(args.results_dir / "samples.png", samples, views, args.classes)


# ---------------------------------------------------------------- cross-validation


class FoldData(NamedTuple):
    """Features and labels of all images of train/ and val/."""

    views: torch.Tensor  # (N, n_views, width), for training, as in HeadData
    features: torch.Tensor  # float32 (N, width), for validation and prediction
    labels: torch.Tensor  # float32 (N,)


def cross_validate(args):
    """Cross-validates: one fold is predicted, the previous one stops the training, others train.

    The predictions of each repeat are scored together. cv.json also holds the spread of the folds,
    and the scores on val/ of one head that was trained on train/. Returns the content of cv.json.
    """
    json_file = args.results_dir / "cv.json"
    table_file = args.results_dir / "doubtful_labels.csv"
    sheet_file = table_file.with_suffix(".png")
    data, xrays = load_fold_data(args, json_file, table_file, sheet_file)

    # With one thread, sums have the same order on every number of cores.
    with common.one_thread():
        probs, fold_scores, epochs = predict_all_folds(data, xrays, args)
        single_split = score_single_split(data, xrays, args)
    metrics = summarise_folds(probs, fold_scores, single_split, data.labels, xrays, args)
    epochs = folds.spread(epochs) | {"single_split": single_split.get("epoch")}
    folds.print_cross_validation(metrics, epochs, len(xrays), args)
    content = {"folds": args.folds, "repeats": args.repeats, "n": len(xrays)}
    content |= {"metrics": metrics, "epochs": epochs}
    write_json(json_file, content)
    order, table = folds.rank_doubtful(
        probs, data.labels, xrays, args.threshold, args.data_dir, args.classes
    )
    folds.write_doubtful(table_file, table)
    pictures = [common.load_image(xrays[row].path, args.window) for row in order[: folds.N_DRAWN]]
    folds.draw_doubtful(sheet_file, table, pictures, args.classes[1])
    names = f"{json_file}, {table_file.name} and {sheet_file.name}"
    print(f"Wrote {names}; the test images were not used")
    return content


def load_fold_data(args, *outputs):
    """Returns (FoldData, readable Xrays) of train/ and val/.

    Raises an error if one of the files `outputs` cannot be written.
    """
    xrays, backbone, device, dtype = load_inputs(args, *outputs)
    views, xrays, _ = load_features(backbone, xrays, args, device, dtype, for_training=True)
    features, _, _ = load_features(backbone, xrays, args, device, dtype, for_training=False)
    common.end_other_ranks()
    return FoldData(views, features[:, 0], labels_of(xrays)), xrays


def predict_all_folds(data, xrays, args):
    """Predicts each image with heads that were not trained on it.

    Returns (probabilities float32 (n_repeats, N), scores of each fold, best epoch of each head).
    """
    from cxr.scores import score  # slow to import: torchmetrics

    probs, fold_scores, epochs = torch.zeros(args.repeats, len(xrays)), [], []
    with tqdm(total=args.folds * args.repeats, unit=" heads", disable=None) as bar:
        for repeat, train, val, held_out in folds.draw_folds(xrays, data.labels, args):
            predicted, epoch = predict_rows(data, train, val, held_out, args, args.seed + repeat)
            fold_scores.append(score(predicted, data.labels[held_out].long(), args.threshold))
            probs[repeat, held_out] = predicted
            epochs.append(epoch)
            bar.update()
    return probs, fold_scores, epochs


def predict_rows(data, train, val, rows, args, seed):
    """Trains a head on the rows `train`, stops and calibrates it by `val`, and predicts `rows`.

    Returns (probabilities float32, best epoch).
    """
    labels = data.labels
    head_data = HeadData(data.views[train], labels[train], data.features[val], labels[val])
    trained = train_one_of_several(head_data, args, seed)
    with torch.no_grad():
        logits = trained.head(data.features).squeeze(1)
    slope, intercept = 1, 0
    if not args.no_calibrate:
        slope, intercept = calibrate(logits[val], labels[val])
    return (slope * logits[rows] + intercept).sigmoid(), trained.epoch


def score_single_split(data, xrays, args):
    """Returns the scores on val/ of a head trained on train/; {} if there is no val/.

    They are too good, because val/ stopped and calibrated this head.
    """
    from cxr.scores import score

    train = torch.tensor([row for row, xray in enumerate(xrays) if xray.split == "train"])
    val = torch.tensor([row for row, xray in enumerate(xrays) if xray.split == "val"])
    if len(val) == 0:
        return {}
    probs, epoch = predict_rows(data, train, val, val, args, args.seed)
    return {"epoch": epoch} | score(probs, data.labels[val].long(), args.threshold)


def summarise_folds(probs, fold_scores, single_split, labels, xrays, args):
    """Returns {score: {value, low, high, mean, deviation, min, max, single_split}} for cv.json.

    value, low, high: the mean over the repeats, with its interval. The keys mean, deviation, min
    and max: over the folds. single_split: of score_single_split.
    """
    from cxr.scores import SCORES, score

    pooled = [score(repeat, labels.long(), args.threshold) for repeat in probs]
    intervals = accuracy_intervals(probs > args.threshold, labels, xrays)
    metrics = {}
    for name in SCORES:
        mean = folds.spread([scores[name] for scores in pooled])["mean"]
        value = intervals.get(name, {"value": mean, "low": None, "high": None})
        over_folds = folds.spread([scores[name] for scores in fold_scores])
        metrics[name] = value | over_folds | {"single_split": single_split.get(name)}
    return metrics


# ---------------------------------------------------------------- learning curve


def learn_curve(args):
    """Cross-validates heads that are trained on fewer images, for each of --sizes.

    Returns the content of curve.json.
    """
    from cxr import learning_curve  # slow to import: pandas

    json_file, picture = args.results_dir / "curve.json", args.results_dir / "curve.png"
    data, xrays = load_fold_data(args, json_file, picture)
    numbers, steps = learning_curve.plan_steps(xrays, data.labels, args)
    with common.one_thread():
        probs = predict_all_sizes(data, steps, args)
    curve = learning_curve.measure_curve(probs, steps, numbers, xrays, args.seed)
    learning_curve.print_curve(curve, len(xrays), args)
    content = {"folds": args.folds, "repeats": args.repeats, "n": len(xrays)} | curve
    write_json(json_file, content)
    learning_curve.draw_curve(picture, curve)
    print(f"Wrote {json_file} and {picture.name}; the test images were not used")
    return content


def predict_all_sizes(data, steps, args):
    """Predicts each image with heads of each size that were not trained on it.

    steps: of learning_curve.plan_steps. Returns probabilities float32 (n_sizes, n_repeats, N).
    """
    n_sizes = len(steps[0].subsets)
    probs = torch.zeros(n_sizes, args.repeats, len(data.labels))
    with tqdm(total=len(steps) * n_sizes, unit=" heads", disable=None) as bar:
        for repeat, subsets, val, held_out in steps:
            for i, train in enumerate(subsets):
                predicted, _ = predict_rows(data, train, val, held_out, args, args.seed + repeat)
                probs[i, repeat, held_out] = predicted
                bar.update()
    return probs


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = Parser("train.py", __doc__)
    data, training, output, machine = parser.groups("data", "training", "output", "machine")
    add_network_flags(data, output, machine)
    add_flags(data, "--classes")
    parser.set_defaults(unfreeze=None, sizes=None)
    # fmt: off
    data.add_argument("--window", type=number(float, 0, 40, percent=1), default=2.0,
        metavar="PERCENT", help="the darkest PERCENT of an image's pixels become black, and the "
             "brightest white (0 = 8-bit images stay unchanged)")
    training.add_argument("--arch", default="resnet50", metavar="NAME",
        help="a classifier of torchvision that ends in a Linear layer")
    training.add_argument("--weights", default="imagenet", metavar="WHAT",
        help="imagenet, the FILE of a state dict (of torch.save or safetensors), or random (for a "
             "demo)")
    training.add_argument("--views", type=number(int, 1, 999), default=8, metavar="N",
        help="variants of each training image (1 = only the image, 2 = also its mirror image, "
             "more = also random changes of pose and exposure)")
    training.add_argument("--epochs", type=number(int, 1), default=50, metavar="N",
        help="largest number of epochs")
    training.add_argument("--batch-size", type=number(int, 1, 100_000), default=32, metavar="N",
        help="images per batch")
    training.add_argument("--lr", type=number(float, 0, 1e9), default=1e-3, metavar="X",
        help="learning rate of Adam in the first epoch")
    training.add_argument("--weight-decay", type=number(float, 0, 1e9), default=0.0, metavar="X",
        help="weight decay of Adam, an L2 penalty (0 = none)")
    training.add_argument("--patience", type=number(int, 0), default=5, metavar="N",
        help="epochs without a better val loss before stopping (0 = never stop early)")
    training.add_argument("--threshold", type=threshold_rule, default=0.5, metavar="T",
        help="probability above which an image is positive: a number from 0 to 1, or a rule that "
             "is fitted on val/ (youden, or sensitivity=0.95)")
    training.add_argument("--no-calibrate", action="store_true",
        help="leave the probabilities uncalibrated (no Platt scaling)")
    training.add_argument("--seeds", type=number(int, 1), default=1, metavar="N",
        help="number of heads to train; their mean is saved (with --unfreeze, the best network)")
    training.add_argument("--unfreeze", default=argparse.SUPPRESS, metavar="NAME",
        help="fine-tune: also train this module of the network and all that follow it, for "
             "example layer4")
    training.add_argument("--finetune-epochs", type=number(int, 1), default=12, metavar="N",
        help="number of epochs, for --unfreeze")
    training.add_argument("--folds", type=number(int, 0), default=0, metavar="N",
        help="cross-validate train/ and val/ with N folds instead of training (0 = train; "
             "otherwise 3 or more)")
    training.add_argument("--repeats", type=number(int, 1), default=1, metavar="N",
        help="how often the folds are drawn, for --folds")
    training.add_argument("--sizes", type=sizes, default=argparse.SUPPRESS, metavar="N,N,...",
        help="a learning curve: cross-validate with so many training images, for example "
             "25,50,100,200 (needs --folds)")
    add_flags(training, "--seed")
    machine.add_argument("--compile", action="store_true",
        help="compile the network for the training views (faster only above about 10,000 views)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.folds in (1, 2):
        parser.error(f"--folds {args.folds}: expected 3 or more, to train, stop early and test")
    if args.folds and not isinstance(args.threshold, float):
        parser.error(f"--threshold {args.threshold}: cross-validation needs a number, not a rule")
    if args.folds and args.seeds > 1:
        parser.error("--seeds and --folds cannot be used together")
    if args.finetune_epochs != parser.get_default("finetune_epochs") and not args.unfreeze:
        parser.error("--finetune-epochs needs --unfreeze (make: UNFREEZE)")
    if args.folds and args.unfreeze:
        other = "--folds (make cv, make curve)"
        parser.error(f"--unfreeze and {other} cannot be used together; leave one out")
    if args.unfreeze and rank_and_world()[1] > 1:
        parser.error("--unfreeze cannot be used with torchrun (make: GPUS=); leave one out")
    if args.repeats > 1 and not args.folds:
        parser.error("--repeats needs --folds (make cv)")
    if args.sizes and not args.folds:
        parser.error("--sizes needs --folds: add --folds 10 --repeats 5, or run make curve")
    description_file = args.checkpoint.with_suffix(".json").name
    asked = as_typed("--checkpoint", "MODEL", args.checkpoint)
    if args.checkpoint.suffix not in (".pth", ".pt") or description_file in SPLIT_FILES.values():
        parser.error(f"{asked}: expected a name like model.pth")
    if args.checkpoint.resolve() == Path(args.weights).resolve():
        parser.error(f"{asked}: is the file of --weights (make: WEIGHTS=); use another name")
    return args


def train_or_cross_validate(args):
    """Does what the flags ask for. Returns the content of model.json, cv.json or curve.json."""
    if args.sizes:
        return learn_curve(args)
    return cross_validate(args) if args.folds else train_model(args)


def train(flags=()):
    """Trains as the script does, for a notebook. Returns the content of model.json as a dict.

    flags: a list such as ["--lr", 3e-4]; with --folds, it returns the content of cv.json, with
    --sizes that of curve.json. Raises Failure with the line that the script would print.
    """
    return call(train_or_cross_validate, parse_args, flags)


def main(argv=None):
    return run(train_or_cross_validate, parse_args, argv, "train.py")


if __name__ == "__main__":
    sys.exit(main())
