"""The table of predictions."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr.errors import Failure
from cxr.files import atomic_write, read_csv
from cxr.folders import CLASSES
from cxr.patients import patient_from_name

COLUMNS = "file", "label", "probability", "prediction", "error", "unlike", "patient"


class Table(NamedTuple):
    """Predictions, in the columns of predictions.csv."""

    files: list  # names, unique in a split
    labels: list  # index into CLASSES, None for a new image
    probs: np.ndarray  # float32 (N,), P(PNEUMONIA), nan where the image could not be read
    errors: list  # why it could not be read, "" where it could
    unlike: np.ndarray  # float32 (N,), above 1 where unlike the training images, nan if not known
    patients: list  # None where nothing tells one
    about: list  # {column: value} of metadata.csv

    def readable(self):
        """The Table of the images that could be read."""
        return self.select([row for row, error in enumerate(self.errors) if not error])

    def select(self, rows):
        """The Table of these rows, labels as int64 (n,)."""
        lists = {
            name: [getattr(self, name)[row] for row in rows]
            for name in ("files", "errors", "patients", "about")
        }
        labels = np.array([self.labels[row] for row in rows])
        arrays = {"labels": labels, "probs": self.probs[rows], "unlike": self.unlike[rows]}
        return Table(**lists, **arrays)

    def clusters(self):
        """[patient, or the file itself where nothing tells one]."""
        return [patient or file for patient, file in zip(self.patients, self.files, strict=True)]


def write_predictions(path, table, threshold):
    columns = list(dict.fromkeys(column for about in table.about for column in about))
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, *columns))
        for name, label, prob, error, unlike, patient, about in zip(*table, strict=True):
            found = ("", "") if error else (f"{prob:.9g}", CLASSES[int(prob > threshold)])
            known = "" if math.isnan(unlike) else f"{unlike:.3f}"
            label = "" if label is None else CLASSES[label]
            others = (about.get(column, "") for column in columns)
            writer.writerow((name, label, *found, error, known, patient or "", *others))


def read_predictions(path):
    """The Table in a predictions.csv; anything malformed is a Failure that names row and column."""

    def wrong(row, column, expected, found):
        where = f"{path}, row {row}, column {column}"
        return Failure(f"{where}: expected {expected}, found {found!r:.60}")

    columns, rows = read_csv(path, *COLUMNS[:3])
    found = {}
    for line, row in rows:
        name, label, prob, _, error, unlike, patient = (row.get(key, "") for key in COLUMNS)
        if not name or name in found:
            raise wrong(line, "file", "a name that no other row has", name)
        if label not in CLASSES:
            raise wrong(line, "label", " or ".join(CLASSES), label)
        try:
            prob = math.nan if error else float(prob)
            if not (error or 0 <= prob <= 1):
                raise ValueError
        except ValueError:
            raise wrong(line, "probability", "a number from 0 to 1", prob) from None
        try:
            unlike = float(unlike or math.nan)
        except ValueError:
            raise wrong(line, "unlike", "a number", unlike) from None
        if "patient" not in columns:
            patient = patient_from_name(Path(name).name)
        about = {key: row[key] for key in columns if key not in COLUMNS and row[key]}
        found[name] = CLASSES.index(label), prob, error, unlike, patient or None, about
    if not found:
        raise wrong(2, "file", "a row for each image", "")
    labels, probs, errors, unlike, patients, about = map(list, zip(*found.values(), strict=True))
    probs, unlike = np.array(probs, np.float32), np.array(unlike, np.float32)
    return Table(list(found), labels, probs, errors, unlike, patients, about)


def count_patients(table):
    """{class: patients}."""
    pairs = set(zip(table.labels.tolist(), table.clusters(), strict=True))
    return {name: sum(label == y for y, _ in pairs) for label, name in enumerate(CLASSES)}


def count_left_out(table, model):
    """{split/class: unreadable images}, of training and of the images that are scored."""
    names = [name for name, error in zip(table.files, table.errors, strict=True) if error]
    names = dict.fromkeys([*model.get("skipped", []), *names])
    return Counter(Path(name).parent.as_posix() for name in names)
