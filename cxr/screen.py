"""The report of evaluate.py on the screen.

To add a score: add it to SCORES and to score() in cxr/scores.py; for an interval, also to
T_INTERVAL or BCA_INTERVAL there. Screen (print_scores) and page (page.html) list all of
report["metrics"].
"""

from cxr.predictions import with_names
from cxr.proportions import format_interval
from cxr.sentences import sections, summary_rows


def print_report(report, predictions):
    """Prints the report. The first two lines keep their form, so that runs can be compared.

    predictions: the table, for the names of the images.
    """
    split = report["split"].capitalize()
    print(f"{split} accuracy: {report['metrics']['accuracy']['value']:.3f}")
    print(f"{split} F1-score: {report['metrics']['f1']['value']:.3f}\n")
    for name, text in summary_rows(report):
        print(f"{name:11} {text}")
    print_scores(report)
    for title, lines in sections(report):
        separator = " " if len(lines) == 1 else "\n  "
        print(with_names(separator.join([f"{title}:", *lines]), predictions))


def print_scores(report):
    """Prints each score with its interval, the subgroups, and the confusion matrix."""
    print(f"\n{'':18} {'value':>9}   95 % interval")
    for name, metric in report["metrics"].items():
        value, _, interval = format_interval(metric).partition(" ")
        print(f"{name:18} {value:>9}   {interval.strip('()')}".rstrip())
    for subgroup in report["subgroups"].values():
        name = f"{subgroup['metric']}, {subgroup['group']}"
        print(f"  {name:36} {format_interval(subgroup)}, n = {subgroup['n']}")
    counts = report["counts"]
    negative, positive = report["classes"]
    width = max(len(negative), len(positive)) + 13  # of a column: "predicted NAME" and a gap
    print(f"\n{'':{width}}{f'predicted {negative}':>{width}}{f'predicted {positive}':>{width}}")
    print(f"{f'true {negative}':{width}}{counts['tn']:>{width}}{counts['fp']:>{width}}")
    print(f"{f'true {positive}':{width}}{counts['fn']:>{width}}{counts['tp']:>{width}}\n")
