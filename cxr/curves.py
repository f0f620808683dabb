"""The pictures and the table of a training: history.csv, curves.png and samples.png."""

import csv

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from cxr.files import atomic_write, save_figure
from cxr.folders import COLOURS

VIEW_NAMES = {0: "view 0: the image", 1: "view 1: mirrored"}
HISTORY = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")


def write_history(path, history):
    """Writes history.csv. history: one dict for each epoch, with the keys in HISTORY."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, HISTORY)
        writer.writeheader()
        writer.writerows(history)


def draw_curves(path, history, best_epoch):
    """Draws loss, accuracy and learning rate of each epoch, and marks the best epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = {name: [row[name] for row in history] for name in HISTORY}
    epochs = columns["epoch"]
    figure = Figure(figsize=(7, 7))
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.07, top=0.98, hspace=0.08)
    loss_ax, accuracy_ax, lr_ax = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    for ax, name in ((loss_ax, "loss"), (accuracy_ax, "accuracy")):
        ax.plot(epochs, columns[f"train_{name}"], ".-", color=COLOURS[0], label="train")
        ax.plot(epochs, columns[f"val_{name}"], ".-", color=COLOURS[1], label="val")
        ax.set_ylabel(name)
    lr_ax.step(epochs, columns["lr"], where="mid", color="black")
    lr_ax.set(xlabel="epoch", ylabel="lr", yscale="log")
    lr_ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # no half epochs
    for ax in (loss_ax, accuracy_ax, lr_ax):
        ax.axvline(best_epoch, color="grey", ls=":", label=f"best epoch, {best_epoch}")
        ax.grid(alpha=0.3)
    loss_ax.legend()
    save_figure(path, figure, 100)


def choose_samples(xrays):
    """Returns two images of each class, at one third and two thirds of the list."""
    samples = []
    for label in (0, 1):
        of_class = [xray for xray in xrays if xray.label == label]
        samples.append(of_class[len(of_class) // 3])
        samples.append(of_class[2 * len(of_class) // 3])
    return samples


def draw_samples(path, xrays, views, classes):
    """Draws images as the network sees them: one row for each image, one column for each view.

    views: for each image a list of PIL images, mode L, all of the same size.
    """
    margin, text_height, font_size = 4, 32, 12  # pixels
    width = views[0][0].width + 2 * margin
    height = views[0][0].height + text_height + 2 * margin
    sheet = PIL.Image.new("L", (len(views[0]) * width, len(xrays) * height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    font = PIL.ImageFont.load_default(font_size)
    for row, xray in enumerate(xrays):
        for column, view in enumerate(views[row]):
            x, y = column * width + margin, row * height + margin
            title = classes[xray.label] if column == 0 else ""
            name = VIEW_NAMES.get(column, f"view {column}")
            draw.text((x, y), f"{title}\n{name}", "black", font)
            sheet.paste(view, (x, y + text_height))
    with atomic_write(path) as file:
        sheet.save(file, format="png", compress_level=1)  # fast
