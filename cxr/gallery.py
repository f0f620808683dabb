"""The page of new images, new_predictions.html: thumbnails, probabilities and classes."""

import base64
from collections import Counter

import numpy as np
import pandas as pd
import PIL.Image

from cxr.errors import show_progress
from cxr.files import atomic_write
from cxr.loader import load_batches
from cxr.maps import legend
from cxr.page import encode_jpeg, template_environment, without_folders
from cxr.predictions import drop_unreadable, predicted_classes
from cxr.proportions import format_probability
from cxr.sentences import describe_model, only_a_look

LIMIT = 1000  # images on the page
SIDE = 128  # pixels, height and width of a thumbnail
QUALITY = 50  # of the JPEGs: 1,000 radiographs with their maps take 7 MB
BATCH = 16  # images


class Thumbnails:
    """Makes thumbnails of images while their pixels are in the memory. Each takes about 3 kB."""

    def __init__(self):
        self.images, self.maps = {}, {}  # {path: JPEG, as base64}

    def add(self, xray, image, overlay=None):
        """Adds an image, uint8 (SIZE, SIZE), and the overlay of its map, uint8 (SIZE, SIZE, 3)."""
        self.images[xray.path] = encode_thumbnail(image)
        if overlay is not None:
            self.maps[xray.path] = encode_thumbnail(overlay)

    def add_all(self, views, workers, device):
        """Decodes the images of common.Views, and adds them. workers: of --workers."""
        bar = show_progress("Thumbnails", len(views), " images")
        for indexes, pixels, reasons in load_batches(views, BATCH, workers, device):
            for i, image, reason in zip(indexes.tolist(), pixels, reasons, strict=True):
                if not reason:  # otherwise the file was changed or removed during this run
                    self.add(views.xrays[i], image[0, 0].numpy())
            bar.update(len(indexes))
        bar.close()


def encode_thumbnail(pixels):
    """Returns a small JPEG as base64 text. pixels: uint8 (SIZE, SIZE) or (SIZE, SIZE, 3)."""
    thumbnail = PIL.Image.fromarray(pixels).resize((SIDE, SIDE))
    return base64.b64encode(encode_jpeg(np.asarray(thumbnail), QUALITY)).decode()


def choose_images(predictions, threshold):
    """Returns the rows of the readable images that the page shows, at most LIMIT.

    Of more images, it chooses those that are the most unlike the training images, and as many that
    are the closest to the threshold.
    """
    readable = drop_unreadable(predictions)
    if len(readable) <= LIMIT:
        return readable
    distance = (readable["probability"] - threshold).abs()
    ranks = [
        distance.rank(method="first"),
        readable["unlike"].rank(method="first", ascending=False),
    ]
    best_rank = pd.concat(ranks, axis=1).min(axis=1)  # without novelty, the rank of the distance
    chosen = best_rank.sort_values(kind="stable").index[:LIMIT]
    return readable.loc[chosen].sort_values("number")


def write_gallery(path, report, predictions, xrays, thumbnails):
    """Writes new_predictions.html: one file that contains everything, but no file name.

    report: dict with classes, threshold, threshold_from, model and warnings; predictions: the table
    of all images; xrays: the images in the same order; thumbnails: those of choose_images.
    """
    report = without_folders(report)
    threshold, classes = report["threshold"], report["classes"]
    predicted = predicted_classes(predictions, threshold, classes)
    shown = choose_images(predictions, threshold)
    images = [
        {
            "number": row.number,
            "probability": row.probability,
            "novelty": row.unlike,
            "prediction": predicted[row.number - 1],
            "thumbnail": thumbnails.images.get(xrays[row.number - 1].path),
            "map": thumbnails.maps.get(xrays[row.number - 1].path),
        }
        for row in shown.itertuples()
    ]
    unreadable = predictions[predictions["error"] != ""]
    errors = dict(zip(unreadable["number"], unreadable["error"], strict=True))
    environment = template_environment()
    environment.filters["format_probability"] = format_probability
    text = environment.get_template("gallery.html").render(
        report=report,
        reasons=reasons_to_doubt(report),
        title=describe_counts(Counter(predicted), classes),
        negative=classes[0],
        positive=classes[1],
        model=describe_model(report["model"]),
        images=images,
        n_readable=len(predictions) - len(errors),
        n_unlike=int((predictions["unlike"] > 1).sum()),
        has_novelty=bool(predictions["unlike"].notna().any()),
        errors=list(errors.items())[:LIMIT],
        n_errors=len(errors),
        legend=legend(classes) if thumbnails.maps else None,
    )
    with atomic_write(path, "w") as file:
        file.write(text)


def reasons_to_doubt(report):
    """Returns reasons to doubt the results, as a list of sentences."""
    reasons = list(report["warnings"])
    if report["model"]["weights"] == "random":
        reasons.insert(0, only_a_look(["random weights"], "results look like"))
    return reasons


def describe_counts(counts, classes):
    """Returns the title of the page. counts: {class: number of images}; "" are the unreadable."""
    total = sum(counts.values())
    negative, positive = classes
    parts = [f"{counts[positive]:,} {positive}", f"{counts[negative]:,} {negative}"]
    if counts[""]:
        parts.append(f"{counts['']:,} could not be read")
    return f"{total:,} new image{'s' if total > 1 else ''}: {', '.join(parts)}"
