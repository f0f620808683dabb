"""The table of predictions, a pandas DataFrame with one row for each image.

| column      | in the DataFrame                           | in predictions.csv        |
|-------------|--------------------------------------------|---------------------------|
| number      | int, from 1: of the image on the page      | the same                  |
| file        | path below the data folder, or as given    | the same                  |
| label       | 0 or 1; None for a new image               | name of the class, or ""  |
| probability | float32, P(positive); nan if unreadable    | 9 digits, or ""           |
| prediction  | absent: it depends on the threshold        | name of the class, or ""  |
| error       | why the image could not be read, or ""     | the same                  |
| unlike      | float32, novelty (cxr/novelty.py), or nan  | 3 decimals, or ""         |
| patient     | "" if unknown                              | the same                  |

The other columns are those of metadata.csv, as text.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from cxr.errors import Failure
from cxr.files import atomic_write, read_csv
from cxr.patients import etiology_from_name, patient_from_name

COLUMNS = ("number", "file", "label", "probability", "prediction", "error", "unlike", "patient")


def metadata_columns(predictions):
    """Returns the names of the columns of metadata.csv."""
    return [column for column in predictions.columns if column not in COLUMNS]


def with_etiology(predictions):
    """Adds a column etiology, read from the file names, unless metadata.csv has one."""
    if "etiology" in predictions:
        return predictions
    names = [Path(file).name for file in predictions["file"]]
    return predictions.assign(etiology=[etiology_from_name(name) for name in names])


def drop_unreadable(predictions):
    """Returns the rows of the images that could be read."""
    return predictions[predictions["error"] == ""].reset_index(drop=True)


def as_arrays(predictions):
    """Returns (probs float32 (N,), labels int64 (N,), patients str (N,)) of readable images."""
    probs = predictions["probability"].to_numpy(np.float32, copy=True)
    labels = predictions["label"].to_numpy(np.int64, copy=True)
    # An image whose patient is unknown counts as a patient of its own.
    patients = predictions["patient"].where(predictions["patient"] != "", predictions["file"])
    return probs, labels, patients.to_numpy(str)


def predicted_classes(predictions, threshold, classes):
    """Returns the predicted class of each image as text, "" if the image is unreadable."""
    is_positive = predictions["probability"].to_numpy() > threshold  # in float32, as cxr/scores.py
    negative, positive = classes
    names = pd.Series(np.where(is_positive, positive, negative), predictions.index)
    return names.where(predictions["error"] == "", "")


def write_predictions(path, predictions, threshold, classes):
    """Writes predictions.csv."""
    probability, novelty = predictions["probability"], predictions["unlike"]
    table = predictions.assign(
        label=["" if label is None else classes[label] for label in predictions["label"]],
        # 9 digits give the same float32 again.
        probability=probability.map("{:.9g}".format).where(predictions["error"] == "", ""),
        prediction=predicted_classes(predictions, threshold, classes),
        unlike=novelty.map("{:.3f}".format).where(novelty.notna(), ""),
    )
    columns = [*COLUMNS, *metadata_columns(predictions)]
    with atomic_write(path, "w") as file:
        table.to_csv(file, columns=columns, index=False, lineterminator="\r\n")


def read_predictions(path, classes):
    """Reads a predictions.csv. Raises Failure, with row and column, if a cell is wrong."""
    # A table of another program may have these three columns only.
    columns, rows = read_csv(path, "file", "label", "probability")
    records = {}
    for line, row in rows:
        name = row["file"]
        record = read_row(path, line, row, classes)
        if name in records:
            raise wrong_cell(path, line, "file", "a name that no other row has", name)
        if "patient" not in columns:
            record["patient"] = patient_from_name(Path(name).name) or ""
        records[name] = record
    if not records:
        raise wrong_cell(path, 2, "file", "a row for each image", "")
    # The classes are computed again, at the threshold of this run.
    predictions = pd.DataFrame(list(records.values())).drop(columns="prediction", errors="ignore")
    predictions = predictions.assign(number=number_rows(predictions))
    return predictions.astype({"probability": np.float32, "unlike": np.float32})


def number_rows(predictions):
    """Returns the numbers of the images, those of the table if they are different whole numbers.

    Otherwise 1, 2, ...: an earlier version wrote no numbers, and two tables in one have some twice.
    """
    texts = predictions.get("number", pd.Series(dtype=str))
    numbers = [int(text) for text in texts if text.isdecimal()]
    if len(set(numbers)) < len(predictions):
        return range(1, len(predictions) + 1)
    return numbers


def read_row(path, line, row, classes):
    """Checks one row, {column: text}, and returns it with numbers in place of text."""
    if not row["file"]:
        raise wrong_cell(path, line, "file", "a name that no other row has", "")
    if row["label"] not in classes:
        expected = f"{' or '.join(classes)} (the names of --classes)"
        raise wrong_cell(path, line, "label", expected, row["label"])
    error = row.get("error", "")
    probability = math.nan  # of an unreadable image
    if not error:
        probability = as_number(row["probability"])
        if probability is None or not 0 <= probability <= 1:
            expected = "a number from 0 to 1 (a spreadsheet may have changed it: import the column "
            expected += "as text, and save it as CSV UTF-8)"
            raise wrong_cell(path, line, "probability", expected, row["probability"])
    novelty = as_number(row.get("unlike") or "nan")
    if novelty is None:
        raise wrong_cell(path, line, "unlike", "a number", row["unlike"])
    label = classes.index(row["label"])
    return row | dict(label=label, error=error, probability=probability, unlike=novelty)


def as_number(text):
    """Returns the text as a float, None if it is no number. Excel may write 0,5 for 0.5."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


def wrong_cell(path, line, column, expected, text):
    """Returns the Failure for a cell that is not what it should be."""
    return Failure(f"{path}, row {line}, column {column}: expected {expected}, found {text!r:.60}")
