"""What the page says about the numbers of a report: its headings, doubts and rows of tables.

Each heading states a result, and claims only what the intervals allow. report: the content of
metrics.json.
"""

import itertools
import math
from pathlib import Path

from cxr.leaks import NO_RESULT
from cxr.proportions import FEW_PATIENTS, format_interval
from cxr.sentences import (
    NAMES,
    allows_conclusions,
    baseline_text,
    capitalised,
    confounder_text,
    display_name,
    novelty_line,
    number_label,
    strata_text,
)

SPLIT_NAMES = {"test": "test", "val": "validation", "train": "training"}
ALIKE = 0.1  # groups whose scores differ by less, also at the ends of the interval, are alike
ALL_NUMBERS = "all simple numbers of the images together"
TOO_FEW = "too\u00a0few\u00a0to\u00a0say"  # spaces at which no line breaks
NOT_BETTER = "the network is not clearly better than"

# ---------------------------------------------------------------- the first lines


def page_title(report):
    """Returns the heading of the page: how many images were classified correctly."""
    right = report["counts"]["tp"] + report["counts"]["tn"]
    images = f"{SPLIT_NAMES[report['split']]} images"
    return f"{right} of {report['n']:,} {images} were classified correctly"


def origin_sentence(report):
    """Says which network was trained on how many images, and on how many it was scored."""
    model = report["model"] or {}
    network = f"The network {model.get('arch') or Path(model.get('file') or 'unknown').name}"
    n = model.get("images") or {}
    if n:
        learned = " and ".join(f"{n[split]} {SPLIT_NAMES[split]} images" for split in n)
        network += f" was made with {learned}. It"
    return f"{network} was scored on {report['n']:,} images of {report['patients']:,} patients."


def doubts(report):
    """Returns reasons to doubt the result, as a list of sentences."""
    random_weights = (report["model"] or {}).get("weights") == "random"
    kinds = []
    if report["drawn"]:
        kinds.append("drawn images")
    if random_weights:
        kinds.append("random weights")
    reasons = []
    if kinds:
        only_look = "this page shows what a report looks like, not how good the method is."
        reasons.append(f"{' and '.join(kinds).capitalize()}: {only_look}")
    reasons += report["warnings"]
    if allows_conclusions(report):
        reasons += [
            f"{capitalised(NOT_BETTER)} {name}, which has {text}. So these images do not show that "
            "the network recognises the disease."
            for name, text in equal_shortcuts(report)
        ]
    return reasons


def equal_shortcuts(report):
    """Returns (name, result) of the baselines and columns that are about as good as the network."""
    found = []
    shortcut = report["shortcut"] or {}
    if "numbers" in shortcut:
        names = {shortcut["number"]: f"the {shortcut['number']} alone", "all numbers": ALL_NUMBERS}
        for key, name in names.items():
            row = shortcut["numbers"][key]
            if row["network_is"] != "better":
                found.append((name, baseline_text(row)))
                break  # one of them is enough
    for row in (report["confounders"] or {}).get("columns", []):
        if "difference" in row and not is_above_0(row["difference"]):
            name = f"the column {row['column']} alone"
            found.append((name, confounder_text(row, report)))
    return found


def is_above_0(interval):
    """Returns True if an interval {value, low, high} lies above 0."""
    return interval["low"] is not None and interval["low"] > 0


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


def threshold_heading(report):
    """Returns the interval of the PPV for a clinic in which one of ten patients has the disease."""
    _, positive = report["classes"]
    row = next(row for row in report["elsewhere"] if row["prevalence"] == 0.1)
    ppv = row["ppv"]
    if ppv["value"] is None:
        return f"At this threshold no image is called {positive}, so no PPV can be computed"
    low, high = (f"{100 * ppv[key]:.0f}" for key in ("low", "high"))
    correct = f"{low} to {high} of 100 positive results are right"
    return f"If 10 % of the patients have {positive}, {correct}"


# ---------------------------------------------------------------- shortcuts


def shortcut_heading(report):
    """Says whether the network is better than all shortcuts that were tested."""
    leaks = report["leaks"] or {}
    if leaks.get("images") or leaks.get("patients"):
        return "No test result: the network knows some of these images or patients"
    if report["split"] != "test":
        return "No test result: the model was made with these images"
    tested = "numbers" in (report["shortcut"] or {})
    columns = [r for r in (report["confounders"] or {}).get("columns", []) if "difference" in r]
    if not tested and not columns:
        return "It was not tested whether a shortcut does as well"
    if not allows_conclusions(report):
        return "There are too few patients to compare it with a shortcut"
    equal = equal_shortcuts(report)
    if equal:
        return f"Better than a shortcut? {capitalised(NOT_BETTER)} {equal[0][0]}"
    names = ["each simple number"] if tested else []
    names += ["each column"] if columns else []
    return f"The network is better than {' and '.join(names)} that was tested"


def shortcut_rows(report):
    """Returns the rows (what was tested, result, meaning) of the table of shortcuts."""
    rows = [*baseline_rows(report), *confounder_rows(report)]
    novelty = report["unlike"]
    if novelty:
        meaning = "There is no sign that the images come from another source than the training."
        if novelty["elsewhere"]:
            meaning = "The images seem to come from another source, so the threshold may not hold."
        elif novelty["over"]:
            meaning = "Look at these images first; their probabilities may be wrong."
        rows.append(("Unlike the training images", novelty_line(novelty, number_label), meaning))
    return rows + leak_rows(report)


def baseline_rows(report):
    """Returns the rows about simple numbers of the images, such as the file size."""
    shortcut = report["shortcut"]
    what = "Simple numbers of the images, such as the file size"
    if not shortcut:
        return []
    if "none" in shortcut:
        return [(what, f"not tested: {shortcut['none']}", "A shortcut may do as well.")]
    best = shortcut["number"]
    names = {best: f"{capitalised(best)} alone", "all numbers": capitalised(ALL_NUMBERS)}
    rows = []
    for key, name in names.items():
        row = shortcut["numbers"][key]
        rows.append((name, baseline_text(row), verdict(row["difference"], report)))
    return rows


def verdict(difference, report):
    """Says in a sentence what the difference of the network to a shortcut means."""
    if not allows_conclusions(report):
        return "Too few patients to say which is better."
    if is_above_0(difference):
        return "The network recognises more than this."
    if difference["value"] > 0:
        return (
            "The network is not clearly better. The classes differ in this, and the network may "
            "have learned no more."
        )
    return "The network is not better than this. It may have learned no more."


def confounder_rows(report):
    """Returns the rows about columns of metadata.csv and DICOM values."""
    found = report["confounders"]
    if found is None:
        return []
    rows, others = [], []
    for row in found["columns"]:
        if "difference" not in row:
            others.append(f"{row['column']} {format_interval(row['auroc'])}")
            continue
        meaning = verdict(row["difference"], report)
        if row["alarm"]:
            meaning += f" ALARM: quote also the AUROC within strata of {row['column']}."
        text = f"{confounder_text(row, report)}; {strata_text(row)}"
        rows.append((f"Column {row['column']} alone", text, meaning))
    if others:
        meaning = "They predict the class less well than the column above."
        rows.append(("Other columns", f"AUROC {', '.join(others)}", meaning))
    if found["left_out"]:
        text = "; ".join(f"{name} ({reason})" for name, reason in found["left_out"].items())
        rows.append(("Columns that were left out", text, "Nothing is known about them."))
    if not rows:
        meaning = "Whether age, sex, device or hospital predict the class was not tested."
        rows.append(("Columns of metadata.csv and DICOM values", "none", meaning))
    return rows


def leak_rows(report):
    """Returns the rows about images and patients that the network knows."""
    leaks = report["leaks"]
    if not leaks or not leaks["known"]:
        text = "not tested: the images of the training are unknown"
        return [("Images or patients that the network knows", text, "The scores may be too high.")]
    rows = []
    names = {
        "images": "Training or validation images among them",
        "patients": "Images of patients of the training or validation",
    }
    for kind, name in names.items():
        numbers = leaks[kind]
        text = f"none of {leaks['n']:,} images"
        meaning = "The result is not inflated by this."
        if kind == "patients" and report["names_without_patient"]:
            meaning = f"Unknown for {report['names_without_patient']:,} images without a patient."
        if numbers:
            example = number_label(numbers[0])
            text = f"{len(numbers):,} of {leaks['n']:,} images, for example {example}"
            meaning = f"{capitalised(NO_RESULT)}."
        rows.append((name, text, meaning))
    return rows


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

    The interval combines those of both groups with MOVER (Donner and Zou 2012), as if no patient
    were in both.
    """
    better, worse = (a, b) if a["value"] >= b["value"] else (b, a)
    value = better["value"] - worse["value"]
    down = math.hypot(better["value"] - better["low"], worse["high"] - worse["value"])
    up = math.hypot(better["high"] - better["value"], worse["value"] - worse["low"])
    return dict(better=better, worse=worse, value=value, low=value - down, high=value + up)


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
    """Says whether the probabilities are too high or too low on average."""
    intercept = report["calibration"]["intercept"]
    if intercept["low"] is None:
        return "whether the probabilities are too high or too low could not be measured"
    if intercept["low"] > 0:
        return "the probabilities are too low"
    if intercept["high"] < 0:
        return "the probabilities are too high"
    return "the probabilities are not clearly too high or too low"


def worst_heading(report, n_shown):
    """Says how many images were misclassified, and which ones are shown."""
    wrong = report["counts"]["fp"] + report["counts"]["fn"]
    if not wrong:
        return f"No image was misclassified; these {n_shown} are nearest to the threshold"
    shown = f"these {n_shown} are the worst" if n_shown < wrong else "all are shown"
    return f"{wrong:,} images were misclassified; {shown}"
