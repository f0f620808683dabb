"""How well a column of metadata.csv, or a DICOM value, predicts the class by itself (a confounder).

If all NORMAL images are of children, a network can learn the age instead of the disease. Of DICOM
values, only scores are written, never a value itself. For split_val.py --check and evaluate.py.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from cxr.bootstrap import draw_scores, logit_t_intervals, t_intervals
from cxr.errors import either
from cxr.measurements import MANY, choose_subset, is_alarming, make_folds, thin_out
from cxr.patients import read_tags
from cxr.predictions import as_arrays, as_number
from cxr.proportions import format_interval
from cxr.weighted import weighted_auroc

DICOM_COLUMNS = {  # name of the column: DICOM tags
    "manufacturer": ("Manufacturer",),
    "view position": ("ViewPosition",),
    "kVp": ("KVP",),
    "detector": ("DetectorType", "DetectorManufacturerModelName", "DetectorID"),
    "age": ("PatientAge",),
    "sex": ("PatientSex",),
}
TAGS = [tag for tags in DICOM_COLUMNS.values() for tag in tags]
AGE = re.compile(r"(\d{3})([DWMY])")  # of DICOM: 018M is 18 months
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1}
FEW_VALUES = 10  # numbers with more different values are divided into thirds

# ---------------------------------------------------------------- columns


def read_columns(xrays):
    """Reads the columns of these images, as {name: list of texts}; "" is an empty cell.

    A DICOM value is left out if metadata.csv has a column of the same name.
    """
    rows = [xray.metadata or {} for xray in xrays]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name, "") for row in rows] for name in names}
    known = {letters_of(name) for name in names}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda xray: read_tags(xray.path, *TAGS), xrays))
    for name, tags in DICOM_COLUMNS.items():
        values = [" ".join(texts[tag] for tag in tags if tag in texts) for texts in found]
        if any(values) and letters_of(name) not in known:
            columns[f"{name} (DICOM)"] = values
    return columns


def letters_of(name):
    """Returns the letters of a name, to compare "View Position" with "view_position"."""
    return re.sub(r"[\W_]", "", name.casefold())


def to_number(text):
    """Returns the number in a cell, nan for a word or an empty cell. A DICOM age is in years."""
    age = AGE.fullmatch(text)
    number = int(age[1]) * YEARS[age[2]] if age else as_number(text)
    return number if number is not None and math.isfinite(number) else math.nan


def to_groups(cells, numbers, known):
    """Returns the group of each cell, str (N,): the word, or the group of the number.

    numbers: float (N,), nan for words. With at most FEW_VALUES different numbers in `known`, each
    is a group; otherwise the groups are the thirds of `known`.
    """
    edges = np.unique(known)
    if len(edges) > FEW_VALUES:
        edges = np.quantile(known, [1 / 3, 2 / 3])
    number_groups = [f"number group {i}" for i in np.searchsorted(edges, numbers)]
    return np.where(np.isnan(numbers), cells, number_groups)


def why_left_out(name, cells, labels, is_scored, classes):
    """Returns why a column is not measured, "" if it is."""
    if letters_of(name) == "etiology":
        return "it describes the disease"
    if len(set(cells[is_scored])) == 1:
        return "one value"
    if all(cell.casefold() == classes[i].casefold() for cell, i in zip(cells, labels, strict=True)):
        return "it names the class"
    has_numbers = any(not math.isnan(to_number(cell)) for cell in cells)
    if len(set(cells)) == len(cells) and not has_numbers:
        return "a different word in each row, like an id"
    return ""


# ---------------------------------------------------------------- scores


def find_folds(labels, patients, is_scored):
    """Divides the scored images into folds by patient, as (other rows, rows of the fold) pairs.

    The other rows are all images of other patients, also those that are not scored. Each fold has
    both classes; there is none if a class has too few patients.
    """
    scored = np.flatnonzero(is_scored)
    folds = []
    for _, held_out in make_folds(labels[scored], patients[scored]):
        rows = scored[held_out]
        if len(set(labels[rows])) == 2:
            folds.append((np.flatnonzero(~np.isin(patients, patients[rows])), rows))
    return folds


def score_column(cells, labels, folds):
    """Predicts the class from one column. Returns logits, float (N,), fitted on other patients.

    cells: str (N,). A logistic regression gets the groups of the cells and the ranks of the
    numbers. So it finds a trend, and also a class that has both low and high numbers.
    """
    numbers = np.array([to_number(cell) for cell in cells])
    is_word = np.isnan(numbers)
    scores = np.zeros(len(cells))
    for others, held_out in folds:
        known = np.sort(numbers[others][~is_word[others]])
        groups = to_groups(cells, numbers, known)[:, None]
        ranks = np.searchsorted(known, numbers) / max(1, len(known))  # 0 to 1
        ranks[is_word] = 0.5
        encoder = OneHotEncoder(handle_unknown="ignore").fit(groups[others])
        # The penalty of the regression is smaller for large inputs. For numbers, the trend is the
        # simpler explanation. Measured: with these factors, more columns of AUROC 0.8 are found.
        inputs = encoder.transform(groups).multiply(np.where(is_word, 1, 0.5)[:, None])
        inputs = scipy.sparse.hstack([inputs, 4 * ranks[:, None]], format="csr")
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        model.fit(inputs[others], labels[others])
        scores[held_out] = model.decision_function(inputs[held_out])
    return scores


def values_and_samples(statistic, labels, patients, seed):
    """Returns the k values of a statistic for the data (k,), and those of all bootstrap samples."""
    once = np.ones((1, len(labels)))
    return statistic(once)[0], draw_scores(labels, patients, statistic, seed)


def score_columns(columns, labels, patients, is_scored, classes, seed=0):
    """Scores how well each column alone predicts the class of the images in `is_scored`.

    columns: {name: N texts}; labels: int (N,); patients: str (N,); is_scored: bool (N,).
    Returns ({"columns": one dict for each, the highest AUROC first, "left_out": {name: reason}},
    {name: function that takes weights of the scored images and returns the column's AUROCs}).
    """
    folds, statistics, left_out = find_folds(labels, patients, is_scored), {}, {}
    truth, scored_patients = labels[is_scored], patients[is_scored]
    fold_of = -1 - np.arange(len(labels))  # an image in no fold is compared with no other
    for i, (_, held_out) in enumerate(folds):
        fold_of[held_out] = i
    for name, cells in columns.items():
        cells = np.array(cells)
        reason = why_left_out(name, cells, labels, is_scored, classes)
        if not folds:
            reason = reason or "a class has too few patients"
        if reason:
            left_out[name] = reason
            continue
        scores = score_column(cells, labels, folds)[is_scored]
        # Only pairs of the same fold count: each fold has its own regression, and its images would
        # lie too low or too high among those of the others (Airola et al. 2011).
        statistics[name] = partial(weighted_auroc, scores, truth, strata=fold_of[is_scored])
    rows = []
    if statistics:

        def column_aurocs(weights):
            return np.column_stack([auroc(weights) for auroc in statistics.values()])

        both = values_and_samples(column_aurocs, truth, scored_patients, seed)
        intervals = logit_t_intervals(*both, truth, scored_patients)
        for name, auroc in zip(statistics, intervals, strict=True):
            alarm = is_alarming(auroc["value"], truth, scored_patients)
            rows.append({"column": name, "n": len(truth), "auroc": auroc, "alarm": alarm})
    rows.sort(key=lambda row: -row["auroc"]["value"])
    return {"columns": rows, "left_out": left_out}, statistics


# ---------------------------------------------------------------- --check


def find_confounders(examined, scored_on, classes):
    """Scores how well each column predicts the class. Arguments and results: see find_shortcuts."""
    if len(examined) > MANY:
        examined = choose_subset(examined, scored_on)
    columns = read_columns([x.xray for x in examined])
    labels = np.array([x.xray.label for x in examined])
    patients = np.array([x.patient for x in examined])
    is_scored = np.array([x.xray.split == scored_on for x in examined])
    found, _ = score_columns(columns, labels, patients, is_scored, classes)
    warnings = []
    alarms = [row["column"] for row in found["columns"] if row["alarm"]]
    if alarms:
        warnings.append(
            f"confounder: {either(alarms)} alone predicts the classes of {scored_on}/. A network "
            "can learn this instead of the disease. Add images, so that both classes have the "
            "same values, or report the AUROC within strata (evaluate.py, make evaluate)"
        )
    return {"confounders": found}, [], warnings


def print_confounders(report):
    """Prints how well each column predicts the class. report: of cxr.check.examine."""
    found, split = report["confounders"], report["scored_on"]
    if not found["columns"] and not found["left_out"]:
        return
    print("\nConfounders: how well a column of metadata.csv or a DICOM value alone predicts the")
    print(
        f"classes of {split}/, fitted on other patients (AUROC, 95 % interval). ! marks an alarm."
    )
    for row in found["columns"]:
        mark = " !" if row["alarm"] else ""
        print(f"  {row['column']:<26} {format_interval(row['auroc'])} (n {row['n']}){mark}")
    for name, reason in found["left_out"].items():
        print(f"  {name:<26} left out: {reason}")


# ---------------------------------------------------------------- the report


def compare_with_columns(predictions, xrays, training, classes, seed):
    """Compares the network with the columns, for metrics.json.

    predictions: the table of `xrays`; training: Xrays of train/ and val/, or [].
    Returns the first result of score_columns. The strongest column, and each with an alarm, also
    has `difference` (the network's AUROC minus that of the column) and `within` (the network's
    AUROC within strata of equal values).
    """
    others = thin_out(training)
    columns = read_columns([*xrays, *others])
    probs, truth, scored_patients = as_arrays(predictions)
    labels = np.array([*truth, *(xray.label for xray in others)])
    patients = np.array([*scored_patients, *(xray.patient or str(xray.path) for xray in others)])
    is_scored = np.arange(len(labels)) < len(xrays)
    found, statistics = score_columns(columns, labels, patients, is_scored, classes, seed)
    network = partial(weighted_auroc, probs, truth)
    shown = [row for i, row in enumerate(found["columns"]) if i == 0 or row["alarm"]]
    for row in shown:
        auroc, cells = statistics[row["column"]], np.array(columns[row["column"]])[is_scored]

        def difference(weights, auroc=auroc):
            return (network(weights) - auroc(weights))[:, None]

        both = values_and_samples(difference, truth, scored_patients, seed)
        row["difference"] = t_intervals(*both, truth, scored_patients)[0]
        row["within"] = score_within_strata(probs, truth, scored_patients, cells, seed)
    return found


def score_within_strata(probs, labels, patients, cells, seed):
    """Computes the AUROC from those pairs of images that have the same value, or third of numbers.

    Returns {value, low, high, n_strata, n_used, n_pairs, n_all_pairs}. n_used: strata with both
    classes; without any, the value is None. Source: Janes and Pepe 2008, with discrete strata.
    """
    numbers = np.array([to_number(cell) for cell in cells])
    strata = to_groups(cells, numbers, numbers[~np.isnan(numbers)])
    names, codes = np.unique(strata, return_inverse=True)
    counts = np.array(
        [np.bincount(codes[labels == label], minlength=len(names)) for label in (0, 1)]
    )
    n_pairs = counts.prod(0)
    result = {"value": None, "low": None, "high": None}
    rows = n_pairs[codes] > 0
    if rows.any():
        probs, labels, patients, codes = probs[rows], labels[rows], patients[rows], codes[rows]

        def auroc(weights):
            return weighted_auroc(probs, labels, weights, codes)[:, None]

        both = values_and_samples(auroc, labels, patients, seed)
        result = logit_t_intervals(*both, labels, patients)[0]
    return result | {
        "n_strata": len(names),
        "n_used": int((n_pairs > 0).sum()),
        "n_pairs": int(n_pairs.sum()),
        "n_all_pairs": int(counts.sum(1).prod()),
    }


def confounder_warnings(found):
    """Returns a warning if columns have an alarm. found: of compare_with_columns, or None."""
    alarms = [row for row in (found or {}).get("columns", []) if row["alarm"]]
    if not alarms:
        return []
    names = either([row["column"] for row in alarms])
    auroc = format_interval(alarms[0]["auroc"])
    return [
        f"confounder: {names} alone predicts the class (AUROC {auroc}). The network may have "
        "learned this instead of the disease: quote also its AUROC within strata of equal values"
    ]
