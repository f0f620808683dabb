"""Trains the one new output neuron of a frozen ImageNet network on data/chestxrays/{train,val}.

Reads DIR/{train,val}/{NORMAL,PNEUMONIA}/ (split_val.py makes val/ out of train/). Writes model.pth and model.json,
and into results/: history.csv, curves.png and samples.png.

    python train.py
    python train.py --epochs 100 --lr 3e-4 --seeds 10
    python train.py --folds 5 --repeats 5
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import http.client
import io
import math
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import common
from common import CLASSES, Failure, replacing, warn


class Head(NamedTuple):
    """What one head is trained on: rows of the features for training and validation, and its own numbers."""

    train: list
    val: list
    seed: int
    lr: float
    weight_decay: float


class Trained(NamedTuple):
    """A head's best epoch. weight: float32 (width,) and bias: float, for raw features; history: rows of history.csv."""

    weight: object
    bias: object
    epoch: int
    val_loss: float
    val_accuracy: float
    history: list


HISTORY = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")
EPOCH_LINE = "Epoch [{}/{epochs}], Train Loss: {:.4f}, Train Acc: {:.4f}, Val Loss: {:.4f}, Val Acc: {:.4f}, LR: {:.1e}"

# ---------------------------------------------------------------- weights

# SHA-256 of the cached file, where more than the 8 digits in its name is known
KNOWN_HASHES = {"resnet50-11ad3fa6.pth": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"}


def initial_state(args):
    """(state dict or None, where it is from) for --weights."""
    if args.weights == "random":
        warn("--weights random: nothing is pretrained, the result says nothing about this method")
        return None, "random weights"
    path = imagenet_file(args.arch) if args.weights == "imagenet" else Path(args.weights)
    return common.read_state(path), path


DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


def imagenet_file(arch):
    """Path of torchvision's ImageNet weights of `arch` in torch's cache, downloaded if absent, its hash checked."""
    import torch
    from torchvision.models import get_model_weights

    try:
        url = get_model_weights(arch).DEFAULT.url
    except (ValueError, AttributeError):
        raise Failure(f"--arch {arch}: torchvision knows no ImageNet weights for it; use --weights FILE") from None
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    expected = KNOWN_HASHES.get(path.name, path.stem.rpartition("-")[2])
    by_hand = f"or download {url} elsewhere, put it at {path}, or name it with --weights FILE"
    if not path.exists():
        common.require_space(path.parent, 150_000_000, "another folder with TORCH_HOME")
        print(f"Downloading {url} to {path}", flush=True)
        try:
            download(url, path, expected)
        except DOWNLOAD_ERRORS as error:
            status = 4 if isinstance(error, OSError) and error.errno in common.FULL else 2
            message = f"cannot download the ImageNet weights ({error}): try again, {by_hand}"
            raise Failure(message, status) from None
    if not common.hash_file(path).startswith(expected):
        raise Failure(f"{path}: not the file that torchvision published (its SHA-256 differs); delete it, {by_hand}")
    return path


def download(url, path, expected):
    """Puts the file at `url` at `path` if its SHA-256 begins with `expected`; the third failure is raised."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.name}.*.partial"):  # of a killed run: nothing writes to it
        if time.time() - old.stat().st_mtime > 600:
            old.unlink()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(12)  # seconds without a byte; without it a stalled server hangs for ever
    try:
        for attempt in range(3):
            try:
                return torch.hub.download_url_to_file(url, str(path), expected, progress=sys.stderr.isatty())
            except DOWNLOAD_ERRORS as error:
                if attempt == 2 or getattr(error, "code", 0) == 404:
                    raise
                time.sleep(1)
    finally:
        socket.setdefaulttimeout(timeout)


# ---------------------------------------------------------------- the head


def standardise(features, rows):
    """(mean, deviation) float32 (width,) of all views of these rows, in chunks that bound the memory.

    The deviation has a floor, a tenth of the deviations' root mean square: a feature that hardly moves in training
    must not be blown up when it moves in validation.
    """
    total = squares = 0
    for start in range(0, len(rows), 64):
        x = features[rows[start : start + 64]].flatten(0, 1).double()
        total, squares = total + x.sum(0), squares + x.square().sum(0)
    count = len(rows) * features.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = std.clamp(min=max(0.1 * std.square().mean().sqrt().item(), 1e-12))
    return mean.float(), std.float()


@contextlib.contextmanager
def one_thread():
    """One thread for torch: then a sum has one order on every machine and under torchrun, and a head the same bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Heads:
    """K heads of one output side by side: logits (K, B) of features (K, B, width), each head with its own Adam.

    What is trained are weights for standardised features; `folded` gives the same function of raw features, which
    is what the saved Linear holds. All of it runs on the CPU: the matrices are too small for a GPU to help.
    """

    def __init__(self, features, labels, heads):
        import torch
        from torch.optim.lr_scheduler import ReduceLROnPlateau

        self.features, self.labels = features, labels
        self.train = [torch.as_tensor(head.train) for head in heads]
        self.val = [torch.as_tensor(head.val) for head in heads]
        self.mean, self.std = map(torch.stack, zip(*(standardise(features, rows) for rows in self.train), strict=True))
        self.generators = [torch.Generator().manual_seed(head.seed) for head in heads]
        width = features.shape[2]
        bound = 1 / math.sqrt(width)  # as nn.Linear draws its weights
        self.weights = [torch.empty(width).uniform_(-bound, bound, generator=g) for g in self.generators]
        self.biases = [torch.empty(()).uniform_(-bound, bound, generator=g) for g in self.generators]
        positives = torch.stack([labels[rows].sum() for rows in self.train])
        self.pos_weight = ((torch.tensor([len(rows) for rows in self.train]) - positives) / positives)[:, None]
        self.optimizers = [
            torch.optim.Adam([w.requires_grad_(), b.requires_grad_()], lr=head.lr, weight_decay=head.weight_decay)
            for w, b, head in zip(self.weights, self.biases, heads, strict=True)
        ]
        self.schedulers = [ReduceLROnPlateau(optimizer, factor=0.5, patience=2) for optimizer in self.optimizers]

    def folded(self, active):
        """weight (K, width) and bias (K,) for raw features of the heads in `active`."""
        import torch

        weight = torch.stack([self.weights[k] for k in active]) / self.std[active]
        bias = torch.stack([self.biases[k] for k in active]) - (weight * self.mean[active]).sum(1)
        return weight, bias

    def batches(self, active, rows, views, size):
        """Batch by batch the summed loss and the number of images right at 0.5, (2, K), and the number of images, (K,).

        rows, views: int64 tensors, one a head. A head that has fewer than the others is filled up with images that
        the mask takes out of the sums.
        """
        import torch
        from torch.nn import functional as F
        from torch.nn.utils.rnn import pad_sequence

        parts = rows, views, [torch.ones(len(each)) for each in rows]
        padded = (pad_sequence(part, batch_first=True).split(size, 1) for part in parts)
        for batch, view, mask in zip(*padded, strict=True):
            weight, bias = self.folded(active)
            logits = torch.einsum("kbd,kd->kb", self.features[batch, view], weight) + bias[:, None]
            y, pos_weight = self.labels[batch], self.pos_weight[active]
            loss = F.binary_cross_entropy_with_logits(logits, y, pos_weight=pos_weight, reduction="none")
            correct = (logits > 0) == (y > 0.5)
            yield torch.stack([(loss * mask).sum(1), (correct * mask).sum(1)]), mask.sum(1)


def train_epoch(model, active, batch_size):
    """One epoch: every training image once, in one randomly drawn view. Mean loss and accuracy of each active head."""
    import torch

    order, views, total = [], [], 0
    for k in active:
        rows, generator = model.train[k], model.generators[k]
        order.append(rows[torch.randperm(len(rows), generator=generator)])
        views.append(torch.randint(model.features.shape[1], rows.shape, generator=generator))
    for sums, counts in model.batches(active, order, views, batch_size):
        for k in active:
            model.optimizers[k].zero_grad()
        (sums[0] / counts.clamp(min=1)).sum().backward()
        for k, count in zip(active, counts, strict=True):
            if count:
                model.optimizers[k].step()
        total += sums.detach()
    return total / torch.tensor([len(rows) for rows in order])


def validate(model, active):
    """Mean loss and accuracy of each active head on its validation images, view 0."""
    import torch

    rows = [model.val[k] for k in active]
    with torch.no_grad():
        total = sum(sums for sums, _ in model.batches(active, rows, [torch.zeros_like(part) for part in rows], 256))
    return total / torch.tensor([len(part) for part in rows])


@one_thread()
def train_heads(features, labels, heads, args, log=print):
    """Trains the heads side by side until each has stopped; ([Trained], whether Ctrl-C or SIGTERM cut it short).

    features: float32 (N, views, width); labels: float32 (N,). A loss that is not finite is a Failure (status 3).
    """
    model = Heads(features, labels, heads)
    best, history = [None] * len(heads), [[] for _ in heads]
    active, interrupted = list(range(len(heads))), None
    try:
        for epoch in range(1, args.epochs + 1):
            common.raise_if_stopped()
            train_loss, train_accuracy = train_epoch(model, active, args.batch_size).tolist()
            val_loss, val_accuracy = validate(model, active).tolist()
            weight, bias = model.folded(active)
            for i, k in enumerate(list(active)):
                lr = model.optimizers[k].param_groups[0]["lr"]
                row = (epoch, train_loss[i], train_accuracy[i], val_loss[i], val_accuracy[i], lr)
                if not all(map(math.isfinite, row)):
                    raise Failure(f"epoch {epoch}: the loss is not finite, nothing is saved; try a smaller --lr", 3)
                model.schedulers[k].step(val_loss[i])
                history[k].append(row)
                log(EPOCH_LINE.format(*row, epochs=args.epochs))
                improved = best[k] is None or val_loss[i] < best[k].val_loss
                if improved:
                    best[k] = Trained(weight[i].detach().clone(), bias[i].item(), epoch, *row[3:5], history[k])
                elif args.patience and epoch - best[k].epoch >= args.patience:
                    active.remove(k)
                    log("Early stopping triggered")
            if not active:
                break
    except KeyboardInterrupt as error:
        if None in best:
            raise
        interrupted = error
    return best, interrupted


@one_thread()
def logits_of(trained, features, rows):
    """Logits float32 (len(rows),) of a head for view 0 of these rows."""
    return features[rows, 0] @ trained.weight + trained.bias


def fit_temperature(logits, labels):
    """The factor on the logits that minimises the log loss (Guo et al. 2017).

    The targets are Platt's (1999), (n+ + 1)/(n+ + 2) and 1/(n- + 2): without them the factor has no finite optimum
    on a validation set that the head separates.
    """
    import torch
    from torch.nn import functional as F

    logits, positive = logits.double(), labels > 0.5
    n1, n0 = positive.sum().item(), (~positive).sum().item()
    targets = torch.where(positive, (n1 + 1) / (n1 + 2), 1 / (n0 + 2)).double()
    log_factor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_factor], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits * log_factor.exp(), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return min(max(log_factor.exp().item(), 0.01), 100.0)


def fit_threshold(rule, probs, labels):
    """The probability above which an image counts as PNEUMONIA, by a rule on the validation set.

    A number is itself. youden: the largest sensitivity + specificity - 1 (Youden 1950). sensitivity=S: the highest
    threshold that finds at least the share S of the PNEUMONIA images. Between two scores, the middle is taken.
    """
    import torch

    if isinstance(rule, float):
        return rule
    scores = probs.unique().double()
    cuts = torch.cat([scores[:1] / 2, (scores[1:] + scores[:-1]) / 2])
    above = probs.double()[None] > cuts[:, None]
    sensitivity = above[:, labels > 0.5].double().mean(1)
    if rule == "youden":
        return cuts[(sensitivity - above[:, labels < 0.5].double().mean(1)).argmax()].item()
    return cuts[sensitivity >= float(rule.partition("=")[2])].max().item()


def threshold_rule(text):
    """argparse type of --threshold: a float in [0, 1], "youden" or "sensitivity=S"."""
    if text == "youden":
        return text
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text.removeprefix("sensitivity="))) <= 1:
            return text if text.startswith("sensitivity=") else number
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, youden or sensitivity=0.95, found {text}")


# ---------------------------------------------------------------- several heads: folds and seeds


def grouped_folds(images, count, seed):
    """The fold, 0 to count-1, of each image: whole patients (cautious key), classes evenly spread, drawn from seed."""
    groups = {}
    for row, image in enumerate(images):
        groups.setdefault(common.patient_key(image.path), []).append(row)
    folds, sizes = [0] * len(images), [[0] * len(CLASSES) for _ in range(count)]
    for patient in sorted(groups, key=lambda patient: hashlib.sha256(os.fsencode(f"{seed} {patient}")).digest()):
        rows = groups[patient]
        fold = min(range(count), key=lambda f: (sizes[f][images[rows[0]].label], sum(sizes[f]), f))
        for row in rows:
            folds[row] = fold
            sizes[fold][images[row].label] += 1
    if any(0 in size for size in sizes):
        raise Failure(f"--folds {count}: expected patients of both classes for each fold; use fewer folds, or --seed")
    return folds


def fold_heads(images, args):
    """[(head, rows held out)]: a fold is held out, the next one stops the training early, the others train."""
    count, heads = args.folds, []
    for seed in range(args.seed, args.seed + args.repeats):
        folds = grouped_folds(images, count, seed)
        for held_out in range(count):
            test, val, train = [], [], []
            for row, fold in enumerate(folds):
                (test, val, train)[min((fold - held_out) % count, 2)].append(row)
            heads.append((Head(train, val, seed, args.lr, args.weight_decay), test))
    return heads


def summary(values):
    """mean, deviation, min and max of numbers (None left out), as a dict; None each where no number is left."""
    values = [value for value in values if value is not None]
    if not values:
        return dict.fromkeys(("mean", "deviation", "min", "max"))
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "min": min(values), "max": max(values)}


def cross_validate(features, labels, images, single, args):
    """--folds: trains folds x repeats heads and the single split's side by side; prints the spread, writes cv.json."""
    heads = fold_heads(images, args)
    trained, interrupted = train_heads(features, labels, [single, *(h for h, _ in heads)], args, log=lambda line: None)
    if interrupted:
        raise interrupted
    held_out = [single.val, *(rows for _, rows in heads)]
    scores = [
        common.score(logits_of(head, features, rows).sigmoid(), labels[rows].long(), 0.5)
        for head, rows in zip(trained, held_out, strict=True)
    ]
    metrics = {name: summary([s[name] for s in scores[1:]]) | {"single_split": scores[0][name]} for name in scores[0]}
    epochs = summary([head.epoch for head in trained[1:]]) | {"single_split": trained[0].epoch}
    print(f"Cross-validation: {args.folds} folds x {args.repeats} repeats, {len(images)} images, whole patients")
    print("Of each fold's training: the fold itself is held out, the next one stops it early, the others train it")
    line = "{:20s}{:>8s}{:>8s}{:>8s}{:>8s}{:>22s}"
    print(line.format("held-out fold", "mean", "dev", "min", "max", "single split (val)"))
    for name, row in (metrics | {"best epoch": epochs}).items():
        digits = 1 if name == "best epoch" else 3
        cells = ["-" if value is None else f"{value:.{digits}f}" for value in row.values()]
        print(line.format(name, *cells))
    path = args.results_dir / "cv.json"
    common.write_json(path, {"folds": args.folds, "repeats": args.repeats, "metrics": metrics, "epochs": epochs})
    print(f"Wrote {path}; the test images were not opened")


# ---------------------------------------------------------------- files


def save_checkpoint(path, network, head_name, trained, about):
    """model.pth, a plain float32 state dict of the whole network with its one output, and model.json about it."""
    import torch

    state = network.state_dict()
    state[f"{head_name}.weight"] = trained.weight[None].clone()
    state[f"{head_name}.bias"] = torch.tensor([trained.bias])
    buffer = io.BytesIO()  # of an error while writing to a file torch makes an obscure one of its own
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())
    common.write_json(path.with_suffix(".json"), about | {"sha256": common.hash_file(path)})


def describe(args, trained, images, skipped, threshold, temperature):
    """What model.json says, but for the SHA-256 of the model."""
    import PIL
    import torch
    import torchvision

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    versions |= {"platform": platform.platform(), "threads": torch.get_num_threads()}  # other ones round differently

    def below(image):
        return image.path.relative_to(args.data_dir).as_posix()

    flags = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()}
    return {
        "arch": args.arch,
        "weights": args.weights,
        "classes": list(CLASSES),
        "transforms": {"size": common.SIZE, "mean": list(common.MEAN), "std": list(common.STD)},
        "threshold": threshold,
        "threshold_rule": "fixed" if isinstance(args.threshold, float) else args.threshold,
        "temperature": temperature,
        "epoch": trained.epoch,
        "val_loss": trained.val_loss,
        "val_accuracy": trained.val_accuracy,
        "seed": args.seed,
        "flags": flags,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "images": {split: {below(image): image.digest for image in found} for split, found in images.items()},
        "skipped": [below(image) for image in skipped],
    }


def draw_curves(path, history, best_epoch):
    """Loss, accuracy and learning rate by epoch, the best epoch marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = dict(zip(HISTORY, zip(*history, strict=True), strict=True))
    epochs, lr = columns["epoch"], columns["lr"]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    for ax, name in zip(axes, ("loss", "accuracy"), strict=False):
        for split, color in (("train", "#0072B2"), ("val", "#D55E00")):
            ax.plot(epochs, columns[f"{split}_{name}"], ".-", color=color, label=split)
        ax.set_ylabel(name)
    axes[2].step(epochs, lr, where="mid", color="black")
    axes[2].set(ylabel="learning rate", yscale="log", xlabel="epoch", ylim=(min(lr) / 2, max(lr) * 2))
    axes[2].set_yticks(steps := sorted(set(lr)), [f"{step:.1e}" for step in steps], minor=False)
    axes[2].set_yticks([], minor=True)
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.axvline(best_epoch, color="grey", linestyle=":", label=f"best epoch, {best_epoch}")
        ax.grid(alpha=0.3)
    axes[0].legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def draw_samples(path, images, views):
    """A grid of two training images of each class, in the views that the network sees."""
    from PIL import Image, ImageDraw

    columns = min(views, 8)
    right, down = common.SIZE + 8, common.SIZE + 40  # pixels from one picture to the next
    by_class = [[image for image in images if image.label == label] for label in range(len(CLASSES))]
    rows = [found[third * len(found) // 3] for found in by_class for third in (1, 2)]
    sheet = Image.new("RGB", (columns * right, len(rows) * down), "white")
    text = ImageDraw.Draw(sheet)
    for i, image in enumerate(rows):
        picture = common.load_image(image.path)
        text.text((4, i * down + 3), f"{CLASSES[image.label]}   {image.path.name}", fill="black", font_size=13)
        for view in range(columns):
            name = {0: "view 0: the image", 1: "view 1: mirrored"}.get(view, f"view {view}")
            text.text((view * right + 4, i * down + 20), name, fill="dimgrey", font_size=12)
            sheet.paste(common.make_view(picture, view, image.digest), (view * right, i * down + 38))
    with replacing(path) as file:
        sheet.save(file, format="png")


def write_history(path, history):
    with replacing(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(HISTORY)
        writer.writerows(history)


# ---------------------------------------------------------------- main


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    shared = ("--data-dir", "--checkpoint", "--results-dir", "--device", "--batch-size", "--workers", "--seed")
    common.add_flags(parser, *shared, "--cache-dir", "--no-cache", "--skip-bad")
    add = parser.add_argument
    positive, count, amount = common.at_least(int, 1), common.at_least(int, 0), common.at_least(float, 0, below=1e9)
    add("--arch", default="resnet50", metavar="NAME", help="a torchvision classifier that ends in a Linear")
    add("--weights", default="imagenet", metavar="WHAT", help="imagenet, a state dict FILE, or random (for demos)")
    add(
        "--views",
        type=common.at_least(int, 1, below=1000),
        default=8,
        metavar="N",
        help="variants of a training image, 2 = flip",
    )
    add("--epochs", type=positive, default=50, metavar="N", help="epochs at most")
    add("--lr", type=amount, default=1e-3, metavar="X", help="Adam's learning rate at the start")
    add("--weight-decay", type=amount, default=0.0, metavar="X", help="Adam's weight decay, an L2 penalty")
    add("--patience", type=count, default=5, metavar="N", help="epochs without a better val loss to stop (0 = never)")
    rules = "P(PNEUMONIA) above which an image is PNEUMONIA, or a rule fitted on val: youden, sensitivity=0.95"
    add("--threshold", type=threshold_rule, default=0.5, metavar="T", help=rules)
    add("--no-calibrate", action="store_true", help="save the probabilities as trained, without the temperature")
    add("--seeds", type=positive, default=1, metavar="N", help="heads to train, the median one is saved")
    folds = "cross-validate train and val instead (0 = no, or 3 and up)"
    add("--folds", type=count, default=0, metavar="N", help=folds)
    add("--repeats", type=positive, default=1, metavar="N", help="draws of the folds")
    args = parser.parse_args(argv)
    if args.folds in (1, 2):
        parser.error(f"--folds {args.folds}: expected 3 or more, for training, early stopping and testing")
    if (args.seeds if args.folds else args.repeats) > 1:
        parser.error("--repeats needs --folds, and --seeds goes without them")
    if args.checkpoint.suffix not in (".pth", ".pt") or args.checkpoint.with_suffix(".json").name == common.SPLIT_FILE:
        parser.error(
            f"--checkpoint {args.checkpoint}: expected a name like model.pth; model.json beside it tells about it"
        )
    if args.checkpoint.resolve() == Path(args.weights).resolve():
        parser.error(f"--checkpoint {args.checkpoint}: these are the --weights; save the trained network elsewhere")
    return args


def load_features(args):
    """({split: images}, features, skipped images, network, its head's name), all input and output checked first."""
    device, dtype = common.pick_device(args.device)
    found = common.read_split(args.data_dir, "train", "val")
    network, head_name, width, _ = common.build_network(args.arch, *initial_state(args))
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    common.require_space(args.checkpoint.parent, size + 1_000_000, "another folder with --checkpoint")
    about = args.checkpoint.with_suffix(".json")
    common.require_writable(args.checkpoint, about, args.results_dir / "history.csv")

    images, n_train = found["train"] + found["val"], len(found["train"])
    views = [args.views if args.folds or row < n_train else 1 for row in range(len(images))]
    features, bad = common.extract_features(network, width, images, views, args, device, dtype)
    kept = common.without_bad(images, bad, args.skip_bad)
    splits = {
        "train": [images[row] for row in kept if row < n_train],
        "val": [images[row] for row in kept if row >= n_train],
    }
    for split, left in splits.items():
        for label, name in enumerate(CLASSES):
            if not any(image.label == label for image in left):
                raise Failure(f"{args.data_dir / split / name}: no readable image is left")
    return splits, features[kept] if bad else features, [images[row] for row in sorted(bad)], network, head_name


def train(args):
    import torch

    splits, features, skipped, network, head_name = load_features(args)
    images = splits["train"] + splits["val"]
    labels = torch.tensor([float(image.label) for image in images])
    rows, n_train = list(range(len(images))), len(splits["train"])
    single = Head(rows[:n_train], rows[n_train:], args.seed, args.lr, args.weight_decay)
    if args.folds:
        cross_validate(features, labels, images, single, args)
        return

    heads = [single._replace(seed=args.seed + i) for i in range(args.seeds)]
    trained, interrupted = train_heads(features, labels, heads, args, print if args.seeds == 1 else lambda line: None)
    best = choose_median(trained, args)
    print(f"Training complete. Best validation loss: {best.val_loss:.4f}")

    logits, val_labels = logits_of(best, features, single.val), labels[single.val]
    factor = 1.0 if args.no_calibrate else fit_temperature(logits, val_labels)
    threshold = fit_threshold(args.threshold, (factor * logits).sigmoid(), val_labels)
    best = best._replace(weight=factor * best.weight, bias=factor * best.bias)
    about = describe(args, best, splits, skipped, threshold, 1 / factor)
    save_checkpoint(args.checkpoint, network, head_name, best, about)
    write_history(args.results_dir / "history.csv", best.history)
    kept = f"epoch {best.epoch} (val accuracy {best.val_accuracy:.3f}) in {args.checkpoint}, threshold {threshold:.3g}"
    if interrupted:
        raise type(interrupted)(f"interrupted after {len(best.history)} epochs; kept the best so far, {kept}")
    draw_curves(args.results_dir / "curves.png", best.history, best.epoch)
    draw_samples(args.results_dir / "samples.png", splits["train"], args.views)
    print(f"Saved {kept}; curves and samples in {args.results_dir}")


def choose_median(trained, args):
    """The head of median validation loss; with --seeds also prints the spread."""
    trained = sorted(trained, key=lambda head: head.val_loss)
    median = trained[(len(trained) - 1) // 2]
    if len(trained) > 1:
        for name in ("val_loss", "val_accuracy"):
            row = summary([getattr(head, name) for head in trained])
            print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))
        seeds = f"{args.seed} to {args.seed + len(trained) - 1}"
        print(f"{len(trained)} heads, seeds {seeds}: saving the median by val loss")
    return median


def main(argv=None):
    args = parse_args(argv)
    return common.run(train, args)


if __name__ == "__main__":
    sys.exit(main())
