"""The headings of the page, and the rows of its plots of scores.

Each heading states a result, and claims only what the intervals allow. report: the content of
metrics.json.
"""

import itertools
from pathlib import Path

from cxr.proportions import FEW_PATIENTS, difference_interval, format_interval
from cxr.sentences import NAMES, SPLIT_NAMES, allows_conclusions, display_name

ALIKE = 0.1  # groups whose scores differ by less, also at the ends of the interval, are alike
TOO_FEW = "too\u00a0few\u00a0to\u00a0say"  # spaces at which no line breaks

# ---------------------------------------------------------------- the first lines


def page_title(report):
    """Returns the heading of the page: how many images were classified correctly."""
    right = report["counts"]["tp"] + report["counts"]["tn"]
    images = f"{SPLIT_NAMES[report['split']]} images"
    return f"{right:,} of {report['n']:,} {images} were classified correctly"


def origin_sentence(report):
    """Says which network was trained on how many images, and on how many it was scored."""
    model = report["model"] or {}
    name = model.get("arch") or Path(model.get("file") or "").name
    network = f"The network {name}" if name else "An unknown network"
    n = model.get("images") or {}
    if n:
        learned = " and ".join(f"{n[split]:,} {SPLIT_NAMES[split]} images" for split in n)
        network += f" was made with {learned}. It"
    return f"{network} was scored on {report['n']:,} images of {report['patients']:,} patients."


# ---------------------------------------------------------------- counts


def counts_heading(report):
    """Returns how many images of each class were classified correctly."""
    counts, (negative, positive) = report["counts"], report["classes"]
    found = f"{counts['tp']:,} of {counts['tp'] + counts['fn']:,}"
    recognised = f"{counts['tn']:,} of {counts['tn'] + counts['fp']:,}"
    return f"{positive} was found in {found} images, {negative} in {recognised}"


def counts_sentence(report):
    """Returns the result in counts of images, with the shares and their intervals."""
    counts, metrics = report["counts"], report["metrics"]
    negative, positive = report["classes"]
    right = counts["tp"] + counts["tn"]
    n_positive, n_negative = counts["tp"] + counts["fn"], counts["tn"] + counts["fp"]
    return (
        f"Of {report['n']:,} {SPLIT_NAMES[report['split']]} images ({report['patients']:,} "
        f"patients), {right:,} were classified correctly ({in_brackets(metrics, 'accuracy')}). "
        f"{positive} was found in {counts['tp']:,} of {n_positive:,} images "
        f"({in_brackets(metrics, 'sensitivity')}), and {negative} was recognised in "
        f"{counts['tn']:,} of {n_negative:,} ({in_brackets(metrics, 'specificity')})."
    )


def predicted_sentence(report):
    """Says how many of the images that were called positive, or negative, are so."""
    counts, metrics = report["counts"], report["metrics"]
    negative, positive = report["classes"]
    n_positive, n_negative = counts["tp"] + counts["fp"], counts["tn"] + counts["fn"]
    return (
        f"Called {positive}: {n_positive:,}, of these correct: {counts['tp']:,} "
        f"({in_brackets(metrics, 'ppv')}). Called {negative}: {n_negative:,}, of these correct: "
        f"{counts['tn']:,} ({in_brackets(metrics, 'npv')})."
    )


def in_brackets(metrics, name):
    """Formats a score for a text in brackets: "PPV 0.746, 95 % interval 0.621 to 0.840"."""
    value, _, interval = format_interval(metrics[name]).partition(" ")
    shown = NAMES.get(name, name)
    return (
        f"{shown} {value}, 95 % interval {interval.strip('()')}" if interval else f"{shown} {value}"
    )


def comparison_heading(comparison):
    """Says which of two models has the higher AUROC. comparison: report["comparison"]."""
    difference = comparison["difference"]["auroc"]
    if difference["low"] is not None and difference["low"] > 0:
        return "This model has a higher AUROC than the other one"
    if difference["high"] is not None and difference["high"] < 0:
        return "The other model has a higher AUROC than this one"
    return "Neither model has a clearly higher AUROC than the other one"


def threshold_heading(report):
    """Returns the interval of the PPV for a clinic in which one of ten patients has the disease.

    It names the threshold, because the sliders below do not change it.
    """
    _, positive = report["classes"]
    at_threshold = f"At threshold {report['threshold']:.4g}"
    row = next(row for row in report["elsewhere"] if row["prevalence"] == 0.1)
    ppv = row["ppv"]
    if ppv["value"] is None:
        return f"{at_threshold} no image is called {positive}, so no PPV can be computed"
    low, high = (f"{100 * ppv[key]:.0f}" for key in ("low", "high"))
    correct = f"{low} to {high} of 100 positive results are right"
    return f"{at_threshold}, if 10 % of the patients have {positive}, {correct}"


# ---------------------------------------------------------------- subgroups


def subgroup_heading(report):
    """Says whether a score differs between groups of patients."""
    rows = list(report["subgroups"].values())
    if not rows:
        return "It was not tested for which patients it works"
    large = [row for row in rows if not is_small(row)]
    differences = [compare_groups(*pair) for pair in comparable_pairs(large)]
    if not differences:
        return "The groups have too few patients to say for whom it works"
    clear = [d for d in differences if d["low"] > 0]
    if clear:
        most = max(clear, key=lambda d: d["value"])
        better, worse = most["better"], most["worse"]
        name = display_name(better["metric"])
        return (
            f"{name} is lower for {worse['group']} than for {better['group']}: "
            f"{worse['value']:.2f} against {better['value']:.2f}"
        )
    if all(d["low"] > -ALIKE and d["high"] < ALIKE for d in differences):
        return f"It works alike in all groups: no score differs by more than {ALIKE}"
    return "No clear difference between the groups, but they are too small to exclude one"


def is_small(row):
    """Returns True if a subgroup has too few patients to say anything about it."""
    return row["patients"] < FEW_PATIENTS


def comparable_pairs(rows):
    """Returns pairs of subgroups of the same column and score that have intervals."""
    rows = [row for row in rows if row["low"] is not None]
    pairs = itertools.combinations(rows, 2)
    return [(a, b) for a, b in pairs if (a["column"], a["metric"]) == (b["column"], b["metric"])]


def compare_groups(a, b):
    """Computes how much better one of two subgroups is. Returns {better, worse, value, low, high}.

    The interval assumes that no patient is in both groups.
    """
    better, worse = (a, b) if a["value"] >= b["value"] else (b, a)
    return {"better": better, "worse": worse} | difference_interval(better, worse)


def subgroup_rows(report):
    """Returns rows for the forest plot: (name, note, {value, low, high}, text)."""
    rows = []
    for row in report["subgroups"].values():
        metric = {key: row[key] for key in ("value", "low", "high")}
        text = format_interval(row)
        if is_small(row):
            metric, text = {"value": None, "low": None, "high": None}, TOO_FEW
        name = f"{display_name(row['metric'])}, {row['group']}"
        rows.append((name, f"n\u00a0=\u00a0{row['n']}", metric, text))
    return rows


# ---------------------------------------------------------------- scores and pictures


def score_rows(report):
    """Returns rows for the forest plot: (name, note, {value, low, high}, text)."""
    notes = {"brier": "lower is better", "ece": "lower is better"}
    return [
        (display_name(name), notes.get(name, ""), metric, format_interval(metric))
        for name, metric in report["metrics"].items()
    ]


def scores_heading(report):
    """Returns the most quoted scores and their threshold."""
    auroc, accuracy = (format_interval(report["metrics"][key]) for key in ("auroc", "accuracy"))
    return f"AUROC {auroc}; accuracy {accuracy} at threshold {report['threshold']:.3g}"


def pictures_heading(report):
    """Says how well the probabilities rank the images, and whether they are too high or low."""
    if not allows_conclusions(report):
        return "There are too few patients for the curves and the calibration to show anything"
    _, positive = report["classes"]
    auroc = report["metrics"]["auroc"]["value"]
    pairs = f"{100 * auroc:.0f}"
    if pairs == "100" and auroc < 1:
        pairs = "more than 99"
    ranking = f"In {pairs} of 100 pairs, the image of {positive} has the higher probability"
    return f"{ranking}; {calibration_in_words(report)}"


def calibration_in_words(report):
    """Says whether the probabilities are too high, too low, too extreme or too moderate."""
    intercept, slope = report["calibration"]["intercept"], report["calibration"]["slope"]
    if intercept["low"] is None or slope["low"] is None:
        return "the calibration could not be measured"
    if slope["high"] < 0:
        return "the probabilities point the wrong way"
    if intercept["low"] > 0:
        return "the probabilities are too low"
    if intercept["high"] < 0:
        return "the probabilities are too high"
    if slope["high"] < 1:
        return "the probabilities are too extreme, too close to 0 or 1"
    if slope["low"] > 1:
        return "the probabilities are too moderate, too far from 0 and 1"
    return "the probabilities show no clear error"


def worst_heading(report, n_shown):
    """Says how many images were misclassified, and which ones are shown."""
    wrong = report["counts"]["fp"] + report["counts"]["fn"]
    if not wrong:
        return f"No image was misclassified; these {n_shown} are nearest to the threshold"
    if wrong == 1:
        return "1 image was misclassified; it is shown"
    shown = f"these {n_shown} are the worst" if n_shown < wrong else "all are shown"
    return f"{wrong:,} images were misclassified; {shown}"


def made_heading(report):
    """Returns which network was trained when, as far as it is known."""
    model = report["model"] or {}
    date = (model.get("date") or "").partition(" ")[0]
    parts = [model.get("arch"), f"trained on {date}" if date else None]
    known = ", ".join(part for part in parts if part)
    return f"How it was made: {known or 'the model is unknown'}"
