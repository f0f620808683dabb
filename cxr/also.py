"""Compares sources, such as another hospital, with the first one: one model and one threshold.

The first source are the images that evaluate.py scores anyway, the others are those of --also.
"""

from typing import NamedTuple

import pandas as pd

from cxr.errors import Failure
from cxr.local_data import measure_local_data
from cxr.predictions import as_arrays, drop_unreadable, read_predictions
from cxr.proportions import difference_interval, wilson_interval
from cxr.scores import measure_auroc, measure_calibration, measure_proportions

SCORES = {  # as screen and page name them
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "intercept": "Calibration intercept (ideal 0)",
    "slope": "Calibration slope (ideal 1)",
}
SHARED = ("classes", "split", "model", "commands", "drawn", "threshold", "threshold_from")
UNKNOWN = {"value": None, "low": None, "high": None}


class Table(NamedTuple):
    """The predictions of a source, and where they come from."""

    name: str
    data: str  # the folder, for metrics.json
    predictions: pd.DataFrame  # see cxr/predictions.py
    novelty: dict | None  # of all images together, see measure_novelty

    @property
    def file(self):
        return f"predictions_{self.name}.csv"


def compare_sources(tables, report, seed):
    """Returns the entry `also` of metrics.json: a list of sources, the first one first.

    tables: the Tables of all sources; without others than the first one, the result is None.
    report: the content of metrics.json. Raises Failure if a source has no readable image.
    """
    if len(tables) < 2:
        return None
    threshold, classes = report["threshold"], report["classes"]
    first, *others = [describe_source(table, threshold, classes, seed) for table in tables]
    for table, source in zip(tables[1:], others, strict=True):
        source["table"] = table.file
        source["difference"] = {
            name: difference_interval(source["scores"][name], first["scores"][name])
            for name in SCORES
        }
        readable = drop_unreadable(table.predictions)
        source["local_data"] = None
        if readable["label"].nunique() == 2:
            arrays = as_arrays(readable)
            source["local_data"] = measure_local_data(*arrays, threshold, seed)
        else:  # the accuracy of one class cannot be compared with that of both
            source["difference"]["accuracy"] = UNKNOWN
    return [first, *others]


def describe_source(table, threshold, classes, seed):
    """Returns the part of an entry that all sources have: what they are, and their scores."""
    readable = drop_unreadable(table.predictions)
    if len(readable) == 0:
        raise Failure(f"{table.data}: no image can be read; repair the images, or leave --also out")
    _, labels, patients = as_arrays(readable)
    by_class = {name: len(set(patients[labels == i])) for i, name in enumerate(classes)}
    scores = score_source(readable, threshold, seed)
    novelty = table.novelty and {key: table.novelty[key] for key in ("n", "over", "p", "shift")}
    return {
        "name": table.name,
        "data": table.data,
        "n": len(readable),
        "unreadable": len(table.predictions) - len(readable),
        "patients": len(set(patients)),
        "patients_by_class": by_class,
        "names_without_patient": int((readable["patient"] == "").sum()),
        "positive_share": wilson_interval(labels == 1, patients),
        "scores": scores,
        "reasons": find_reasons(scores, by_class),
        "unlike": novelty,
    }


def score_source(predictions, threshold, seed):
    """Computes the SCORES of readable images, {name: {value, low, high}}.

    All three are None if a score needs images of a class that has none.
    """
    probs, labels, patients = as_arrays(predictions)
    scores = dict.fromkeys(SCORES, UNKNOWN)
    proportions = measure_proportions(probs, labels, patients, threshold)
    scores |= {name: proportions[name] for name in SCORES if name in proportions}
    if len(set(labels)) == 2:
        calibration = measure_calibration(predictions, {})
        scores["auroc"] = measure_auroc(probs, labels, patients, seed)
        scores |= {name: calibration[name] for name in ("intercept", "slope")}
    return scores


def find_reasons(scores, patients_by_class):
    """Returns {score: why it has no value}."""
    absent = [name for name, n in patients_by_class.items() if n == 0]
    reason = "the classes are separated, so that any slope fits"
    if absent:
        reason = f"there is no readable {absent[0]} image"
    return {name: reason for name, score in scores.items() if score["value"] is None}


def roc_curves(tables, report):
    """Returns (name, predictions of readable images, scores) of the sources with both classes."""
    curves = []
    for table, source in zip(tables, report["also"] or [], strict=False):
        if source["scores"]["auroc"]["value"] is not None:
            curves.append((table.name, drop_unreadable(table.predictions), source["scores"]))
    return curves


def read_tables(predictions, report, path, classes):
    """Reads the tables of the other sources, which metrics.json names, for --from.

    predictions: of the first source; report: the content of metrics.json, or {}; path: of the
    predictions.csv beside it. Returns the Tables of all sources.
    """
    first, *others = report.get("also") or [{"name": "", "data": "", "unlike": None}]
    tables = [Table(first["name"], first["data"], predictions, first["unlike"])]
    for source in others:
        file = path.with_name(source["table"])
        if not file.is_file():
            raise Failure(
                f"{file}: no such file, expected the predictions of {source['name']}, which the "
                "metrics.json beside it names. Restore it, or copy predictions.csv alone into "
                "another folder"
            )
        predictions = read_predictions(file, classes)
        tables.append(Table(source["name"], source["data"], predictions, source["unlike"]))
    return tables


def report_of_source(report, table):
    """Returns what a metrics.json says about the source with this table, like a metrics.json of it.

    table: the name of the file; the result is {} if the report does not name it.
    """
    for source in (report.get("also") or [])[1:]:
        if source["table"] == table:
            other = {"data": source["data"], "metrics": source["scores"]}
            return {key: report[key] for key in SHARED if key in report} | other
    return {}
