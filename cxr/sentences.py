"""The sentences about a report, which screen and page share.

report: the content of metrics.json. A sentence about an image takes a function `label`, which gets
the number of the image and returns how it is shown: with its name on the screen (cxr/screen.py),
and without it on the page (number_label).
"""

from cxr.compare import COMPARED
from cxr.errors import SHOWN, either
from cxr.leaks import leak_warnings
from cxr.novelty import SHIFT
from cxr.patients import METADATA
from cxr.proportions import FEW_PATIENTS, format_interval, format_number
from cxr.scores import is_measured

NAMES = {"f1": "F1", "auroc": "AUROC", "ppv": "PPV", "npv": "NPV", "ece": "ECE"}
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
ROUGH_BELOW = 30  # patients of a class; with fewer, the intervals are rough

NO_SPREAD = "the value is the same in every bootstrap sample"
NOT_CALIBRATED = (
    "could not be measured, because the probabilities separate the classes or are all equal, and "
    "any slope fits them"
)
TITLE_CONFOUNDERS = "Confounders: what a column of metadata.csv or a DICOM value alone predicts"


def summary_rows(report):
    """Returns (name, text) pairs: which model, threshold and images the scores belong to."""
    model = report["model"] or {}
    left_out = [f"{n} of {folder} (left out)" for folder, n in report["left_out"].items()]
    made_with = [f"{n} {split}" for split, n in (model.get("images") or {}).items()]
    return [
        ("Model", describe_model(model)),
        ("Made with", f"{' and '.join(made_with) or 'unknown'} images"),
        ("Threshold", describe_threshold(report)),
        ("Data", report["data"]),
        ("Images", describe_images(report)),
        ("Unreadable", ", ".join(left_out) or "none"),
    ]


def describe_model(model):
    """Describes the model: file, architecture, weights, epoch, date; leaves out what is unknown."""
    parts = [model.get("file") or "unknown", model.get("arch")]
    for key in ("weights", "epoch"):
        if model.get(key) is not None:
            parts.append(f"{key} {model[key]}")
    fine_tuning = model.get("fine_tuning")
    if fine_tuning and fine_tuning["is_saved"]:
        parts.append(f"fine-tuned from {fine_tuning['unfreeze']} on")
    parts.append(model.get("date"))
    return ", ".join(part for part in parts if part)


def describe_threshold(report):
    """Says which threshold is used, where it comes from, and what it gave on val/."""
    text = f"{report['threshold']:.4g} ({report['threshold_from']})"
    on_val = (report["model"] or {}).get("at_threshold")
    if " on val" in text and on_val:
        sensitivity = format_interval(on_val["sensitivity"])
        specificity = format_interval(on_val["specificity"])
        text += f"; on val: sensitivity {sensitivity}, specificity {specificity}"
    return text


def describe_images(report):
    """Says how many images of how many patients were scored."""
    by_class = report["patients_by_class"]
    counts = ", ".join(f"{n} {name}" for name, n in by_class.items())
    text = f"{report['n']}; patients: {report['patients']} ({counts})"
    unknown = report["names_without_patient"]
    if unknown:
        text += f"; images without a known patient: {unknown}, each counts as one patient"
    return "; ".join(filter(None, [text, rough_line(report)]))


def rough_line(report):
    """Says that the intervals are rough if a class has few patients; "" otherwise."""
    if min(report["patients_by_class"].values()) >= ROUGH_BELOW:
        return ""
    return f"fewer than {ROUGH_BELOW} patients in a class, so the intervals are rough"


def only_a_look(kinds, what):
    """Says that drawn images or random weights make no result. kinds: these, as a list of texts."""
    kinds = " and ".join(kinds).capitalize()
    return f"{kinds}: this page shows what {what}, not how good the method is."


def number_label(number):
    """Returns how the page and the files show the number of an image."""
    return f"no. {number}"


def warnings_of(report, label):
    """Returns report["warnings"], in which label(number) shows an image."""
    leaks, split = report["leaks"], report["split"]
    pairs = zip(
        leak_warnings(leaks, split, number_label), leak_warnings(leaks, split, label), strict=True
    )
    labelled = dict(pairs)
    return [labelled.get(text, text) for text in report["warnings"]]


def allows_conclusions(report):
    """Returns False if a class has so few patients that the report gives no verdict."""
    return min(report["patients_by_class"].values()) >= FEW_PATIENTS


def sections(report, label):
    """Yields (title, lines) of the findings beside the scores, for the screen.

    label: function that returns how the number of an image is shown.
    """
    if report["without_spread"]:
        names = ", ".join(report["without_spread"])
        yield f"No interval for {names}", [NO_SPREAD]
    yield from sensitivity_sections(report)
    yield "Calibration", calibration_lines(report["calibration"])
    yield "PPV and NPV at other prevalences", prevalence_lines(report)
    if report["unlike"]:
        yield "Images unlike the training images", [novelty_line(report["unlike"], label)]
    if report["shortcut"]:
        yield baseline_section(report["shortcut"], allows_conclusions(report))
    if report["confounders"] and any(report["confounders"].values()):
        yield TITLE_CONFOUNDERS, confounder_lines(report)
    if report["comparison"]:
        yield comparison_section(report["comparison"])
    if report["not_assessed"]:
        title, _, reason = not_assessed_line(report).partition(": ")
        yield title, [reason]


def not_assessed_line(report):
    """Says which subgroups a reader expects and does not find, and why."""
    reason = f"{METADATA} has no column of that name with 2 to 10 different values"
    return f"No subgroups by {either(report['not_assessed'])}: {reason}"


def list_versions(versions):
    """Lists the versions of the packages in one line. versions: {name: version}."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def sensitivity_sections(report):
    """Yields a section if the threshold was chosen for a sensitivity: what the images reached."""
    rule = (report["model"] or {}).get("threshold_rule") or ""
    wanted = rule.removeprefix("sensitivity=")
    if wanted == rule or not report["threshold_from"].endswith(f"{rule} on val"):
        return
    reached = report["metrics"]["sensitivity"]
    includes = "includes" if reached["low"] <= float(wanted) <= reached["high"] else "excludes"
    text = f"reached in {report['split']}/: {format_interval(reached)}; the interval {includes}"
    text += f" {wanted}"
    if reached["high"] < float(wanted) and allows_conclusions(report):
        text += ". Train again with more images in val/; do not choose a threshold by these images"
    yield f"Sensitivity of {wanted}, asked for with --threshold", [text]


def calibration_lines(calibration):
    """Describes how well the probabilities are calibrated."""
    intercept = format_interval(calibration["intercept"])
    slope = format_interval(calibration["slope"])
    lines = [f"intercept {intercept}, ideal 0; slope {slope}, ideal 1"]
    if not is_measured(calibration):
        lines = [NOT_CALIBRATED]
    if calibration["platt"] != {"slope": 1, "intercept": 0}:
        before, after = calibration["without"]["brier"], calibration["with"]["brier"]
        platt = "with Platt scaling (fitted on val/; part of all scores)"
        lines.append(f"Brier score {after:.3f} {platt}; {before:.3f} without it")
    return lines


def prevalence_lines(report):
    """Lists PPV and NPV for several prevalences."""
    counts = report["counts"]
    share = (counts["tp"] + counts["fn"]) / report["n"]
    _, positive = report["classes"]
    lines = [
        f"{100 * share:.0f} % of these images are {positive}. If the disease is rarer, a "
        "positive result is less often correct. The intervals assume a known prevalence:"
    ]
    for row in report["elsewhere"]:
        ppv, npv = format_interval(row["ppv"]), format_interval(row["npv"])
        lines.append(f"{100 * row['prevalence']:4.3g} %: PPV {ppv}, NPV {npv}")
    return lines


def novelty_line(group, label):
    """Says how many images are unlike the training images, and which ones are the first."""
    text = f"{group['over']} of {group['n']} (expected: 1 in 100)"
    if group["shift"] is not None:
        shift = f"{group['shift']:.2f} standard deviations (a warning is given from {SHIFT})"
        text += f"; all together are shifted by {shift}"
    numbers = group["numbers"]
    if numbers:
        text += f": {', '.join(map(label, numbers[:SHOWN]))}"
    if len(numbers) > SHOWN:
        text += ", ..."
    return text


def baseline_section(shortcut, with_verdict):
    """Returns (title, lines): the network compared with single numbers of the images.

    with_verdict: also say whether the network is better.
    """
    title = "Baselines without a network"
    if "none" in shortcut:
        return title, [f"nothing to compare with ({shortcut['none']})"]
    best, numbers = shortcut["number"], shortcut["numbers"]
    rows = {f"{best} alone has": numbers[best], "all numbers together have": numbers["all numbers"]}
    lines = []
    for subject, row in rows.items():
        verdict = f": the network is {row['network_is']}" if with_verdict else ""
        lines.append(f"{subject} {baseline_text(row)}{verdict}")
    return f"{title}, chosen on {shortcut['fitted_on']} images of train/ and val/", lines


def baseline_text(row):
    """Returns the AUROC of a baseline, and its difference to the network with its interval."""
    return f"AUROC {row['auroc']:.3f}. Network minus this: {format_difference(row['difference'])}"


def confounder_lines(report):
    """Compares the network with the strongest column and each with an alarm; lists the others."""
    found, lines, others = report["confounders"], [], []
    for row in found["columns"]:
        if "difference" not in row:
            others.append(f"{row['column']} {format_interval(row['auroc'])}")
            continue
        alarm = "ALARM: " if row["alarm"] else ""
        lines.append(f"{alarm}{row['column']} alone: {confounder_text(row, report)}")
        lines.append(f"  {strata_text(row)}")
    if others:
        lines.append(f"AUROC of other columns: {', '.join(others)}")
    left_out = [f"{name} ({reason})" for name, reason in found["left_out"].items()]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    return lines


def confounder_text(row, report):
    """Returns the AUROC of a column, and its difference to the network with its interval."""
    network = format_number(report["metrics"]["auroc"]["value"])
    difference = format_difference(row["difference"])
    return f"AUROC {format_interval(row['auroc'])}; the network {network}, difference {difference}"


def strata_text(row):
    """Says which AUROC the network has if the column is held constant."""
    within, name = row["within"], row["column"]
    if within["value"] is None:
        return (
            f"no stratum of {name} has both classes, so no score can show whether the network "
            f"recognises the disease or the {name}: collect other images"
        )
    counts = (
        f"{within['n_used']} of {within['n_strata']} strata have both classes, "
        f"{within['n_pairs']} of {within['n_all_pairs']} pairs of images"
    )
    return f"within strata of {name} ({counts}), the network has AUROC {format_interval(within)}"


def format_difference(gain):
    """Formats a difference with its interval, and says if the interval includes 0."""
    value = format_interval({"value": gain["value"], "low": None})
    if gain["low"] is None:
        return value
    includes_0 = ", includes 0" if gain["low"] <= 0 <= gain["high"] else ""
    return f"{value} (95 % interval {gain['low']:.3f} to {gain['high']:.3f}{includes_0})"


def comparison_section(other):
    """Returns (title, lines): this model compared with another one on the same images."""
    lines = []
    for name in COMPARED:
        difference = format_interval(other["difference"][name])
        score = format_interval(other["other"][name])
        lines.append(f"{name:10} {difference}; the other model has {score}")
    n_mine, n_theirs = other["right_only_here"], other["right_only_there"]
    text = f"{n_mine} images are correct only with this model, {n_theirs} only with the other one"
    lines.append(f"{text}: p {other['p_value']:.3g} ({other['test']})")
    title = f"This model minus that of {other['with']} (its threshold {other['threshold']:.4g})"
    return title, lines


def display_name(name):
    """Returns the name of a score as the page shows it."""
    return NAMES.get(name, name.replace("_", " ").capitalize())


def capitalised(text):
    """Returns the text with a capital first letter; the other letters stay as they are."""
    return text[:1].upper() + text[1:]
