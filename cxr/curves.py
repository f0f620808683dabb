"""The pictures of a training."""

import csv

import PIL.ImageFont

from cxr.files import atomic_write, save_figure
from cxr.folders import CLASSES, COLOURS

HISTORY = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")


def write_history(path, history):
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(HISTORY)
        writer.writerows(history)


def draw_curves(path, history, best_epoch):
    """Loss, accuracy and learning rate by epoch, the best epoch marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr = zip(*history, strict=True)
    figure = Figure(figsize=(7, 7))
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.07, top=0.98, hspace=0.08)
    axes = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    lines = ("loss", train_loss, val_loss), ("accuracy", train_accuracy, val_accuracy)
    for ax, (name, train, val) in zip(axes, lines, strict=False):
        ax.plot(epoch, train, ".-", color=COLOURS[0], label="train")
        ax.plot(epoch, val, ".-", color=COLOURS[1], label="val")
        ax.set_ylabel(name)
    axes[2].step(epoch, lr, where="mid", color="black")
    axes[2].set(xlabel="epoch", ylabel="lr", yscale="log")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.axvline(best_epoch, color="grey", ls=":", label=f"best epoch, {best_epoch}")
        ax.grid(alpha=0.3)
    axes[0].legend()
    save_figure(path, figure, 100)


def choose_samples(images):
    """Two training images of each class."""
    names_by_class = [[image for image in images if image.label == label] for label in (0, 1)]
    return [found[third * len(found) // 3] for found in names_by_class for third in (1, 2)]


def draw_samples(path, images, views):
    """A grid of these images; views: of each its views as the network sees them, PIL, mode L."""
    columns, width, height = len(views[0]), views[0][0].width + 8, views[0][0].height + 40
    sheet = PIL.Image.new("L", (columns * width, len(images) * height), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)
    for y, image in enumerate(images):
        for x in range(columns):
            name = {0: "view 0: the image", 1: "view 1: mirrored"}.get(x, f"view {x}")
            title = f"{CLASSES[image.label]} {image.path.name:.20}\n" if x == 0 else "\n"
            draw.text((x * width + 4, y * height + 4), title + name, "black", font)
            sheet.paste(views[y][x], (x * width + 4, y * height + 36))
    with atomic_write(path) as file:
        sheet.save(file, format="png", compress_level=1)
