"""What speaks against a result: the first and the fourth section of the page, and the next step.

report: the content of metrics.json.
"""

from cxr.leaks import NO_RESULT
from cxr.proportions import format_interval
from cxr.scores import below_chance
from cxr.sentences import (
    allows_conclusions,
    baseline_text,
    capitalised,
    confounder_text,
    novelty_line,
    number_label,
    only_a_look,
    rough_line,
    strata_text,
)
from cxr.source_sentences import has_few_patients, headline, worse_sources

ALL_NUMBERS = "all simple numbers of the images together"
NOT_BETTER = "the network is not clearly better than"
LEAKS_NOT_TESTED = (
    "It was not tested whether the network knows these images or patients, because the images of "
    "its training are unknown. If it knows them, the scores are too high."
)


def reasons_to_doubt(report):
    """Returns reasons to doubt the result, as a list of sentences."""
    random_weights = (report["model"] or {}).get("weights") == "random"
    kinds = []
    if report["drawn"]:
        kinds.append("drawn images")
    if random_weights:
        kinds.append("random weights")
    reasons = []
    if kinds:
        reasons.append(only_a_look(kinds, "a report looks like"))
    reasons += warnings_without_repetition(report)
    if not (report["leaks"] or {}).get("known"):
        reasons.append(LEAKS_NOT_TESTED)
    if allows_conclusions(report) and rough_line(report):  # of fewer patients, there is a warning
        reasons.append(f"There are {rough_line(report)}.")
    reasons += [f"{headline(source, report['also'][0])}." for source in worse_sources(report)]
    if allows_conclusions(report):
        reasons += [
            f"{capitalised(NOT_BETTER)} {name}, which has {text}. So these images do not show that "
            "the network recognises the disease."
            for name, text in equal_shortcuts(report)
        ]
    return reasons


def warnings_without_repetition(report):
    """Returns the warnings, without that of confounders if equal_shortcuts has them all."""
    rows = (report["confounders"] or {}).get("columns", [])
    alarms = [row["difference"] for row in rows if row["alarm"]]
    is_repeated = alarms and allows_conclusions(report) and not any(map(is_above_0, alarms))
    if not is_repeated:
        return report["warnings"]
    return [text for text in report["warnings"] if not text.startswith("confounder: ")]


def next_step(report):
    """Returns what to do next, as a sentence: the step that must come first."""
    leaks, weights = report["leaks"] or {}, (report["model"] or {}).get("weights")
    if report["drawn"] or weights == "random":
        return "Train a network with pretrained weights on your own images."
    if report["split"] != "test":
        return "Score a test set that played no part in the training."
    if leaks.get("images") or leaks.get("patients"):
        return "Separate the patients of the test set from those of the training, and train again."
    if below_chance(report["metrics"]["auroc"], report["patients_by_class"]):
        return "Check the class folders, and the order of --classes (make: CLASSES)."
    if not allows_conclusions(report):
        return "Collect images of more patients."
    if (report["unlike"] or {}).get("elsewhere"):
        return "Find out how these images differ from those of the training."
    worse = worse_sources(report)
    if worse:
        return (
            f"Check the calibration and the threshold at {worse[0]['name']} with local images. "
            "They do not change the AUROC: if it is lower there, train with such images too."
        )
    equal = equal_shortcuts(report)
    if equal:
        return (
            f"Collect images whose classes do not differ in {equal[0][0].removesuffix(' alone')}, "
            "and score them."
        )
    return next_step_elsewhere(report)


def next_step_elsewhere(report):
    """Returns the next step if nothing speaks against the result of the first source."""
    others = (report.get("also") or [])[1:]
    if not others:
        return "Score images of another hospital: this result may not hold there."
    few = [source["name"] for source in others if has_few_patients(source)]
    if few:
        return f"Collect images of more patients at {few[0]}."
    return "Quote the scores of all sources, and look at the images that were misclassified."


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


# ---------------------------------------------------------------- the table of shortcuts


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
