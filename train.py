"""Trains the one new output neuron of a frozen ImageNet network on data/chestxrays/{train,val}.

Reads DIR/{train,val}/{NORMAL,PNEUMONIA}/ (split_val.py makes val/ out of train/). Writes model.pth
and model.json, and into results/: history.csv, curves.png and samples.png; with --folds cv.json,
doubtful_labels.csv and doubtful_labels.png instead.

    python train.py
    python train.py --epochs 100 --lr 3e-4 --seeds 10
    python train.py --folds 5 --repeats 5
"""

import contextlib
import copy
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import common  # first: it says what to do where a package is missing

# isort: split
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from cxr.calibration import calibrate, fit_threshold, threshold_rule
from cxr.checkpoint import load_weights, save_checkpoint
from cxr.cli import RUN_FLAGS, Parser, add_flags, number, run
from cxr.curves import choose_samples, draw_curves, draw_samples, write_history
from cxr.errors import Failure
from cxr.files import check_writable, versions, write_json
from cxr.folders import CLASSES, SPLIT_FILE
from cxr.folds import draw_doubtful, patient_folds, print_cross_validation, spread, write_doubtful
from cxr.novelty import describe_features
from cxr.patients import read_split
from cxr.proportions import accuracy_intervals
from cxr.scores import SCORES, score

# ---------------------------------------------------------------- training


class Standardize(nn.Module):
    """Features (N, width) to mean 0 and deviation 1, of training features (N, n_views, width).

    The deviation has a floor, a tenth of the deviations' root mean square: a feature that hardly
    moves in training must not be blown up when it moves elsewhere.
    """

    def __init__(self, features):
        super().__init__()
        std, mean = torch.std_mean(features.flatten(0, 1), dim=0, correction=0)
        floor = 0.1 * std.square().mean().sqrt().item()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=max(floor, 1e-12)))

    def forward(self, x):
        return (x - self.mean) / self.std


def fold_standardization(model):
    """The nn.Linear on raw features that computes what model, Standardize and nn.Linear, does."""
    standardize, linear = model
    with torch.no_grad():
        head = copy.deepcopy(linear)
        head.weight /= standardize.std
        head.bias -= (head.weight * standardize.mean).sum(1)
    return head


def train_one_epoch(model, features, labels, criterion, optimizer, batch_size, rng):
    """Every image once, in one of its views, drawn at random. Returns mean loss and accuracy.

    features: float32 (N, n_views, width); labels: float32 (N,).
    """
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
def validate(model, features, labels, criterion):
    """Mean loss and accuracy on features float32 (N, width), labels float32 (N,)."""
    logits = model(features).squeeze(1)
    accuracy = ((logits > 0) == (labels > 0.5)).float().mean()
    return criterion(logits, labels).item(), accuracy.item()


class TrainedHead(NamedTuple):
    """A head at its best epoch."""

    head: nn.Linear  # on raw features
    epoch: int
    val_loss: float
    val_accuracy: float
    history: list  # rows of history.csv
    interrupted: KeyboardInterrupt | None = None  # what cut the training short


EPOCH_LINE = (
    "Epoch [{}/{}], Train Loss: {:.4f}, Train Acc: {:.4f}, Val Loss: {:.4f}, Val Acc: {:.4f}, "
    "LR: {:.1e}"
)


def balanced_criterion(labels):
    """BCE in which both classes weigh the same, however many images each has in training."""
    return nn.BCEWithLogitsLoss(pos_weight=(labels < 0.5).sum() / labels.sum())


def train_head(train_features, train_labels, val_features, val_labels, args, seed, log=print):
    """Trains one output neuron on features; a loss that is not finite is a Failure (status 3).

    train_features: float32 (N, n_views, width); val_features: float32 (M, width); labels: float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(Standardize(train_features), nn.Linear(train_features.shape[2], 1))
    rng = torch.Generator().manual_seed(seed)
    criterion = balanced_criterion(train_labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    # the third epoch in a row without a better val loss halves the learning rate
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    best_val_loss, best, history = math.inf, None, []
    try:
        for epoch in range(1, args.epochs + 1):
            lr = optimizer.param_groups[0]["lr"]
            train_loss, train_accuracy = train_one_epoch(
                model, train_features, train_labels, criterion, optimizer, args.batch_size, rng
            )
            val_loss, val_accuracy = validate(model, val_features, val_labels, criterion)
            scheduler.step(val_loss)
            history.append((epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr))
            log(EPOCH_LINE.format(epoch, args.epochs, *history[-1][1:]))
            if not math.isfinite(train_loss + val_loss):
                raise Failure(f"epoch {epoch}: the loss is not finite; try a smaller --lr", 3)
            improved = val_loss < best_val_loss
            if improved:
                best_val_loss = val_loss
                best = TrainedHead(
                    fold_standardization(model), epoch, val_loss, val_accuracy, history
                )
            elif args.patience and epoch - best.epoch >= args.patience:
                log("Early stopping triggered")
                break
    except KeyboardInterrupt as stop:
        if best is None:
            raise
        best = best._replace(interrupted=stop)
    return best


def train_seeds(train_features, train_labels, val_features, val_labels, args):
    """(the mean of --seeds heads, the heads): a linear head again, steadier than any of them."""
    data, heads, interrupted = (train_features, train_labels, val_features, val_labels), [], None
    if args.seeds == 1:
        heads = [train_head(*data, args, args.seed)]
        return heads[0], heads
    try:
        for seed in range(args.seed, args.seed + args.seeds):
            trained = train_head(*data, args, seed, log=lambda line: None)
            if trained.interrupted:
                raise trained.interrupted
            heads.append(trained)
            scores = f"Val Loss: {trained.val_loss:.4f}, Val Acc: {trained.val_accuracy:.4f}"
            print(f"Seed {seed}: epoch {trained.epoch}, {scores}")
    except KeyboardInterrupt as stop:
        if not heads:
            raise
        interrupted = stop
    for name in ("val_loss", "val_accuracy"):
        values = [getattr(each, name) for each in heads]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        spread = f"deviation {deviation:.4f}, min {min(values):.4f}, max {max(values):.4f}"
        print(f"{name}: mean {statistics.fmean(values):.4f}, {spread}")
    print(f"Saving the mean of {len(heads)} heads; epoch and curves are those of the first")
    head = copy.deepcopy(heads[0].head)
    with torch.no_grad():
        head.weight.copy_(torch.stack([each.head.weight for each in heads]).mean(0))
        head.bias.copy_(torch.stack([each.head.bias for each in heads]).mean(0))
    loss, accuracy = validate(head, val_features, val_labels, balanced_criterion(train_labels))
    mean = heads[0]._replace(head=head, val_loss=loss, val_accuracy=accuracy)
    return mean._replace(interrupted=interrupted), heads


def print_class_weight(labels):
    """Says what balanced_criterion does where the classes are not equally frequent."""
    n_positive = int(labels.sum())
    if n_positive != len(labels) - n_positive:
        counts = f"{len(labels) - n_positive} NORMAL and {n_positive} PNEUMONIA images"
        weight = balanced_criterion(labels).pos_weight.item()
        print(f"Training on {counts}: a PNEUMONIA image weighs {weight:.3g} in the loss")


@contextlib.contextmanager
def one_thread():
    """One thread for torch: a sum then has one order, however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- data and outputs


def load_inputs(args, *outputs):
    """(device, fast dtype, {split: [Xray]}, Backbone); checks the outputs, before the work."""
    device, dtype = common.pick_device(args.device)
    splits = ["train", "val"]
    if args.folds and not (args.data_dir / "val").exists():
        splits.remove("val")  # cross-validation needs none
    found = {"val": []} | read_split(args.data_dir, *splits)
    backbone = common.build_backbone(args.arch, *load_weights(args))
    check_writable(*outputs)
    return device, dtype, found, backbone


def load_features(backbone, images, n_views, args, device, dtype, compiled=False):
    """(features float32 (N, n_views, width), the N images that could be read, those left out)."""
    features, bad = common.extract_features(
        backbone, images, n_views, args.window, device, dtype, args, compiled
    )
    kept = common.drop_unreadable(images, bad, args.skip_bad)
    images, skipped = [images[row] for row in kept], [images[row] for row in sorted(bad)]
    for label, name in enumerate(CLASSES):
        if all(image.label != label for image in images):
            raise Failure(f"{args.data_dir}: no readable {name} image is left for training")
    return features[kept] if bad else features, images, skipped


def labels_of(images):
    return torch.tensor([float(image.label) for image in images])


def describe_training(args, backbone, best, heads, images, skipped):
    """What model.json says, but for what is fitted on val and the SHA-256 of the model."""

    def below(image):
        return image.path.relative_to(args.data_dir).as_posix()

    def plain(value):
        return value if isinstance(value, int | float) else str(value)

    transforms = common.PREPARE, common.AUGMENT, backbone.normalize
    scores = ("epoch", "val_loss", "val_accuracy")
    return {
        "arch": args.arch,
        "weights": args.weights,
        "classes": list(CLASSES),
        "transforms": [str(each) for each in transforms],
        "window": args.window,
        "threshold_rule": "fixed" if isinstance(args.threshold, float) else args.threshold,
        **{name: getattr(best, name) for name in scores},
        "seed": args.seed,
        "seeds": [{name: getattr(each, name) for name in scores} for each in heads],
        "flags": {name: plain(value) for name, value in vars(args).items()},
        "versions": versions("torch", "torchvision", "pillow"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "images": {name: {below(i): i.sha256 for i in found} for name, found in images.items()},
        "skipped": [below(image) for image in skipped],
    }


# ---------------------------------------------------------------- cross-validation


def predict_held_out(views, features, labels, train, val, held_out, args, seed):
    """(P(PNEUMONIA) of the held-out rows, best epoch) of a head trained on `train`."""
    data = views[train], labels[train], features[val], labels[val]
    trained = train_head(*data, args, seed, log=lambda line: None)
    if trained.interrupted:
        raise trained.interrupted
    with torch.no_grad():
        logits = trained.head(features).squeeze(1)
    slope, intercept = (1, 0) if args.no_calibrate else calibrate(logits[val], labels[val])
    return (slope * logits[held_out] + intercept).sigmoid(), trained.epoch


def cross_validate(args):
    """--folds: a fold is held out, the next one stops the training early, the others train it.

    Scores the held-out predictions of each repeat as one table. The folds' spread, and what the
    single split of train/ and val/ says, stand beside it.
    """
    names = "cv.json", "doubtful_labels.csv", "doubtful_labels.png"
    path, table, sheet = (args.results_dir / name for name in names)
    device, dtype, found, backbone = load_inputs(args, path, table, sheet)
    both = found["train"] + found["val"]
    views, images, _ = load_features(
        backbone, both, args.views, args, device=device, dtype=dtype, compiled=args.compile
    )
    features, _, _ = load_features(  # what is scored is float32
        backbone, images, 1, args, device=device, dtype=torch.float32
    )
    common.end_other_ranks()
    features, labels = features[:, 0], labels_of(images)
    data, n_train = (views, features, labels), sum(i.path.parts[-3] == "train" for i in images)

    by_repeat, by_fold, epochs, single = [], [], [], {}
    bar = tqdm(total=args.folds * args.repeats, unit=" heads", disable=None)
    with one_thread(), bar:
        for seed in range(args.seed, args.seed + args.repeats):
            folds, probs = patient_folds(images, labels, args.folds, seed), torch.zeros(len(labels))
            for i, held_out in enumerate(folds):
                val = folds[i - 1]
                train = torch.cat(
                    [rows for rows in folds if rows is not val and rows is not held_out]
                )
                probs[held_out], epoch = predict_held_out(*data, train, val, held_out, args, seed)
                by_fold.append(score(probs[held_out], labels[held_out].long(), args.threshold))
                epochs.append(epoch)
                bar.update()
            by_repeat.append(probs)
        if found["val"]:
            train, val = torch.arange(len(labels)).split([n_train, len(labels) - n_train])
            probs, single["epoch"] = predict_held_out(*data, train, val, val, args, args.seed)
            single |= score(probs, labels[val].long(), args.threshold)

    probs = torch.stack(by_repeat)
    shares = accuracy_intervals(probs > args.threshold, labels, images)
    pooled = [score(each, labels.long(), args.threshold) for each in probs]
    metrics = {
        name: {"value": spread([scores[name] for scores in pooled])["mean"]}
        | {"low": None, "high": None}
        | shares.get(name, {})
        | spread([scores[name] for scores in by_fold])
        | {"single_split": single.get(name)}
        for name in SCORES
    }
    epochs = spread(epochs) | {"single_split": single.get("epoch")}
    print_cross_validation(metrics, epochs, len(labels), args)
    about = {"folds": args.folds, "repeats": args.repeats, "n": len(labels)}
    write_json(path, about | {"metrics": metrics, "epochs": epochs})
    worst = write_doubtful(table, probs, labels, images, args)
    draw_doubtful(sheet, worst, [common.load_image(image.path, args.window) for image, _ in worst])
    print(f"Wrote {path}, {table.name} and {sheet.name}; the test images were not opened")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = Parser("train.py", __doc__)
    add_flags(parser, *RUN_FLAGS)
    add = parser.add_argument
    # fmt: off
    add("--arch", default="resnet50", metavar="NAME",
        help="a torchvision classifier that ends in a Linear")
    add("--weights", default="imagenet", metavar="WHAT",
        help="imagenet, a state dict FILE, or random (for demos)")
    add("--window", type=number(float, 0, 40), default=2.0, metavar="PERCENT",
        help="of an image's pixels turn black, and as many white (0 = grey levels as they are)")
    add("--views", type=number(int, 1, 999), default=8, metavar="N",
        help="variants of a training image (1 = itself, 2 = and its mirror image)")
    add("--compile", action="store_true",
        help="compile the network for the training views; pays from some 10,000")
    add("--epochs", type=number(int, 1), default=50, metavar="N", help="epochs at most")
    add("--lr", type=number(float, 0, 1e9), default=1e-3, metavar="X",
        help="Adam's learning rate at the start")
    add("--weight-decay", type=number(float, 0, 1e9), default=0.0, metavar="X",
        help="Adam's weight decay, an L2 penalty")
    add("--patience", type=number(int, 0), default=5, metavar="N",
        help="epochs without a better val loss before stopping (0 = never)")
    add("--threshold", type=threshold_rule, default=0.5, metavar="T",
        help="P(PNEUMONIA) above which an image is PNEUMONIA, or a rule fitted on val: "
             "youden, sensitivity=0.95")
    add("--no-calibrate", action="store_true",
        help="save the probabilities as trained, without Platt's slope and intercept")
    add("--seeds", type=number(int, 1), default=1, metavar="N",
        help="heads to train, whose mean is saved")
    add("--folds", type=number(int, 0), default=0, metavar="N",
        help="cross-validate train and val instead (0 = no, or 3 and more)")
    add("--repeats", type=number(int, 1), default=1, metavar="N", help="draws of the folds")
    # fmt: on
    args = parser.parse_args(argv)
    about = args.checkpoint.with_suffix(".json").name
    if args.folds in (1, 2):
        parser.error(f"--folds {args.folds}: expected 3 or more, to train, stop early and test")
    if args.folds and not isinstance(args.threshold, float):
        parser.error(f"--threshold {args.threshold}: cross-validation scores at a fixed threshold")
    if (args.seeds if args.folds else args.repeats) > 1:
        parser.error("--repeats needs --folds, and --seeds goes without them")
    if args.checkpoint.suffix not in (".pth", ".pt") or about == SPLIT_FILE:
        parser.error(f"--checkpoint {args.checkpoint}: expected a name like model.pth")
    if args.checkpoint.resolve() == Path(args.weights).resolve():
        parser.error(f"--checkpoint {args.checkpoint}: these are the --weights; choose another")
    return args


def sample_views(images, args):
    """Of each image the first views, 8 at most: PIL, mode L."""
    found = []
    for image in images:
        picture, numbers = common.load_image(image.path, args.window), range(min(args.views, 8))
        found.append([common.make_view(picture, number, image.sha256) for number in numbers])
    return found


def train(args):
    about, report = args.checkpoint.with_suffix(".json"), args.results_dir / "metrics.json"
    device, dtype, found, backbone = load_inputs(args, args.checkpoint, about, report)
    views, train_images, skipped = load_features(
        backbone,
        found["train"],
        args.views,
        args,
        device=device,
        dtype=dtype,
        compiled=args.compile,
    )
    features, val_images, val_skipped = load_features(  # what is scored is float32
        backbone, found["val"], 1, args, device=device, dtype=torch.float32
    )
    common.end_other_ranks()
    features, labels = features[:, 0], labels_of(val_images)
    print_class_weight(labels_of(train_images))

    with one_thread():
        best, heads = train_seeds(views, labels_of(train_images), features, labels, args)
        print(f"Training complete. Best validation loss: {best.val_loss:.4f}")
        logits = best.head(features).squeeze(1).detach()
        slope, intercept = (1.0, 0.0) if args.no_calibrate else calibrate(logits, labels)
        probs = (slope * logits + intercept).sigmoid()
        threshold = fit_threshold(args.threshold, probs, labels)
    with torch.no_grad():
        best.head.weight *= slope
        best.head.bias.mul_(slope).add_(intercept)

    fitted = {"threshold": threshold, "slope": slope, "intercept": intercept}
    fitted["at_threshold"] = accuracy_intervals(probs > threshold, labels, val_images)
    images = {"train": train_images, "val": val_images}
    described = (
        describe_training(args, backbone, best, heads, images, skipped + val_skipped) | fitted
    )
    standardize = Standardize(views[:, :1])
    described["features"] = describe_features(
        standardize.mean, standardize.std, standardize(features)
    )
    save_checkpoint(args.checkpoint, backbone, best.head, described)
    write_history(args.results_dir / "history.csv", best.history)
    scores = ", ".join(
        "{} {value:.3f} ({low:.3f} to {high:.3f})".format(name, **share)
        for name, share in fitted["at_threshold"].items()
    )
    print(f"At threshold {threshold:.3g} on val: {scores}")
    kept = f"epoch {best.epoch} in {args.checkpoint}, threshold {threshold:.3g}"
    if stop := best.interrupted:
        done = f"{len(heads)} heads" if args.seeds > 1 else f"{len(best.history)} epochs"
        raise type(stop)(f"interrupted after {done}; kept the best so far, {kept}")
    draw_curves(args.results_dir / "curves.png", best.history, best.epoch)
    samples = choose_samples(train_images)
    draw_samples(args.results_dir / "samples.png", samples, sample_views(samples, args))
    print(f"Saved {kept}; curves and samples in {args.results_dir}")
    if report.exists():
        print(f"{report} is about an earlier model: run evaluate.py")


def main(argv=None):
    args = parse_args(argv)
    return run(cross_validate if args.folds else train, args, "train.py")


if __name__ == "__main__":
    sys.exit(main())
