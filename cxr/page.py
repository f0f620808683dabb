"""The report, on the screen and as a web page."""

import base64
import html

from cxr.compare import COMPARED
from cxr.errors import SHOWN
from cxr.files import atomic_write
from cxr.novelty import SHIFT
from cxr.patients import METADATA
from cxr.proportions import format_interval

PICTURES = {
    "roc": "Every threshold: sensitivity against false alarms",
    "precision_recall": "Every threshold: precision against sensitivity",
    "confusion": "What was called what",
    "reliability": "Probability against what came true",
    "scores": "The probabilities of each class",
    "worst": "Where there are maps, orange speaks for PNEUMONIA, blue for NORMAL",
}
NOT_ASSESSED = "age", "sex", "device"  # unless metadata.csv has a column of that name


def print_report(report):
    """The reference's two lines, then everything in metrics.json, for the eye."""
    metrics, word = report["metrics"], report["split"].capitalize()
    print(f"{word} accuracy: {metrics['accuracy']['value']:.3f}")
    print(f"{word} F1-score: {metrics['f1']['value']:.3f}\n")
    for name, text in summary_rows(report):
        print(f"{name:11} {text}")
    print(f"\n{'':18} {'value':>9}   95 % interval")
    for name, each in metrics.items():
        value, _, between = format_interval(each).partition(" ")
        print(f"{name:18} {value:>9}   {between.strip('()')}".rstrip())
    for each in report["subgroups"].values():
        group = f"{each['metric']}, {each['group']}"
        print(f"  {group:36} {format_interval(each)}, n = {each['n']}")
    counts = report["counts"]
    print(f"\n{'':22}{'predicted NORMAL':>18}{'predicted PNEUMONIA':>22}")
    print(f"{'truth NORMAL':22}{counts['tn']:>18}{counts['fp']:>22}")
    print(f"{'truth PNEUMONIA':22}{counts['fn']:>18}{counts['tp']:>22}\n")
    for title, lines in sections(report):
        print(f"{title}: {lines[0]}" if len(lines) == 1 else f"{title}:")
        for line in lines if len(lines) > 1 else ():
            print(f"  {line}")


def summary_rows(report):
    """[(name, text)]: which model, threshold and images, for the screen and the page."""
    model, left_out = report["model"] or {}, report["left_out"]
    known = [f"{key} {model[key]}" for key in ("weights", "epoch") if model.get(key) is not None]
    parts = (model.get("file") or "unknown", model.get("arch"), *known, model.get("date"))
    threshold = f"{report['threshold']:.4g} ({report['threshold_from']})"
    if " on val" in threshold and (scores := model.get("at_threshold")):
        there = [
            f"{name} {format_interval(scores[name])}" for name in ("sensitivity", "specificity")
        ]
        threshold += f"; there {', '.join(there)}"
    patients = [f"{n} {name}" for name, n in report["patients_by_class"].items()]
    images = f"{report['n']} of {report['patients']} patients ({', '.join(patients)})"
    if unknown := report["names_without_patient"]:
        images += f"; nothing tells the patient of {unknown}, each counts as one"
    rough = "; fewer than 30 patients in a class: intervals are rough"
    images += rough if min(report["patients_by_class"].values()) < 30 else ""
    counted = [f"{n} of {folder}" for folder, n in left_out.items()]
    learned = [f"{n} {split}" for split, n in (model.get("images") or {}).items()]
    return [
        ("Model", ", ".join(part for part in parts if part)),
        ("Trained on", f"{' and '.join(learned) or 'unknown'} images"),
        ("Threshold", threshold),
        ("Data", report["data"]),
        ("Images", images),
        ("Unreadable", f"{', '.join(counted)}: left out" if counted else "none"),
    ]


def sections(report):
    """Yields (title, lines): what stands beside the scores, for the screen and the page."""
    calibration, numbers, other = report["calibration"], report["shortcut"], report["comparison"]
    if alike := report["without_spread"]:
        none = "every bootstrap sample has the same, none can be given"
        yield f"No interval of {', '.join(alike)}", [none]
    slope, intercept = (
        format_interval(calibration["slope"]),
        format_interval(calibration["intercept"]),
    )
    before, after = (calibration[key]["brier"] for key in ("without", "with"))
    lines = [f"intercept {intercept}, 0 if right; slope {slope}, 1 if right"]
    if calibration["platt"] != {"slope": 1, "intercept": 0}:
        fitted = "the slope and intercept that were fitted on val and are part of every number here"
        lines.append(f"Brier {after:.3f} with {fitted}; {before:.3f} without")
    yield "Calibration", lines
    share = sum(report["counts"][key] for key in ("tp", "fn")) / report["n"]
    here = f"{100 * share:.0f} % of these images are PNEUMONIA. In a clinic where fewer are, a "
    lines = [f"{here}positive result means less. With the share taken as known:"]
    for each in report["elsewhere"]:
        values = f"PPV {format_interval(each['ppv'])}, NPV {format_interval(each['npv'])}"
        lines.append(f"{100 * each['prevalence']:4.3g} %: {values}")
    yield "What a result means elsewhere", lines
    if group := report["unlike"]:
        shift = f"; all are shifted by {group['shift'] or 0:.2f} deviations, {SHIFT} would be much"
        shift = "" if group["shift"] is None else shift
        names = ", ".join(group["files"][:SHOWN])
        more = ", ..." * (len(group["files"]) > SHOWN)
        counted = f"{group['over']} of {group['n']}, 1 in 100 expected{shift}"
        yield "Images unlike those of training", [f"{counted}{': ' * bool(names)}{names}{more}"]
    if numbers and "none" in numbers:
        none = f"none to compare with ({numbers['none']})"
        yield "One number instead of the network", [none]
    elif numbers:
        chosen = f"chosen on {numbers['fitted_on']} images of train/ and val/"
        lines = []
        for name in (numbers["number"], "all numbers"):
            each = numbers["numbers"][name]
            gain = f"network minus it {format_interval(each['difference'])}: {each['network_is']}"
            lines.append(f"{name:12} AUROC {each['auroc']:.3f}; {gain}")
        yield f"One number instead of the network, {chosen}", lines
    if other:
        lines = []
        for name in COMPARED:
            there = format_interval(other["other"][name])
            lines.append(f"{name:10} {format_interval(other['difference'][name])}; there {there}")
        only = f"{other['right_only_here']} images are right only here, {other['right_only_there']}"
        lines.append(f"{only} only there: p {other['p_value']:.3g} ({other['test']})")
        yield f"This model minus {other['with']} at threshold {other['threshold']:.4g}", lines
    if report["not_assessed"]:
        columns = f"no such column of 2 to 10 values in {METADATA}"
        yield "Not assessed", [f"{', '.join(report['not_assessed'])} ({columns})"]


STYLE_SHEET = """
:root { color-scheme: light dark; --line: #8886; --warn: #d55e0022 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left }
td { font-variant-numeric: tabular-nums }
figure { margin: 0; break-inside: avoid } figure img { width: 100%; background: white }
.pictures { display: grid; gap: 1rem; margin-top: 1.5rem }
.pictures { grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)) }
.lead { font-size: 1.2rem } .warning { background: var(--warn); padding: .6rem 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere } small, figcaption { opacity: .8 }
"""
LIMITS = (
    "Not a medical device. A test on images of the same source is an internal test: no claim for "
    "other machines, framings, ages or diseases follows. Predictive values at the share of "
    "PNEUMONIA among the test images do not hold where fewer have it: see the table by prevalence."
)
LEAD = "accuracy", "auroc", "sensitivity", "specificity"


def write_page(folder, report, pictures):
    """report.html: metrics.json for a reader, in one file with the pictures of these names."""
    text, metrics = html.escape, report["metrics"]

    def rows(cells, tag="td"):
        lines = ("".join(f"<{tag}>{text(str(cell))}</{tag}>" for cell in row) for row in cells)
        return "".join(f"<tr>{line}</tr>" for line in lines)

    def picture(name, caption):
        content = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{content}" alt="{text(caption)}">'
        return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"

    names = {"f1": "F1", "auroc": "AUROC", "ppv": "PPV", "npv": "NPV", "ece": "ECE"}
    names = {name: names.get(name, name.replace("_", " ").capitalize()) for name in metrics}
    scores = [(names[name], format_interval(each)) for name, each in metrics.items()]
    first = [scores[list(metrics).index(name)] for name in LEAD]
    lead = ", ".join(f"{name} {value}" for name, value in first)
    if numbers := (report["shortcut"] or {}).get("numbers"):
        best = report["shortcut"]["number"]
        lead += f". An image's {best} alone has AUROC {numbers[best]['auroc']:.3f}: "
        lead += f"the network is {numbers[best]['network_is']}"
    groups = rows([("group", "score", "images", "value (95 % interval)")], "th") + rows(
        (each["group"], names[each["metric"]], each["n"], format_interval(each))
        for each in report["subgroups"].values()
    )
    counts = report["counts"]
    matrix = rows(
        [("NORMAL", counts["tn"], counts["fp"]), ("PNEUMONIA", counts["fn"], counts["tp"])]
    )
    checks = "".join(
        f"<h3>{text(title)}</h3><pre>{text(chr(10).join(lines))}</pre>"
        for title, lines in sections(report)
    )
    warnings = "".join(f'<p class="warning">Warning: {text(w)}</p>' for w in report["warnings"])
    small = "".join(picture(name, PICTURES[name]) for name in pictures if name != "worst")
    worst = ""
    if "worst" in pictures:
        worst = (
            f"<h2>The most wrong, or least sure, images</h2>{picture('worst', PICTURES['worst'])}"
        )
    title = f"Pneumonia on chest X-rays: {report['split']} result"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE_SHEET}</style>
</head><body>
<h1>{text(title)}</h1>
<p class="lead">{text(lead)}</p>
{warnings}
<table>{rows(summary_rows(report))}</table>
<h2>Scores</h2>
<table>{rows([("score", "value (95 % interval)")], "th")}{rows(scores)}</table>
<h3>Counts at the threshold</h3>
<table>{rows([("truth", "predicted NORMAL", "predicted PNEUMONIA")], "th")}{matrix}</table>
<div class="pictures">{small}</div>
{"<h2>Subgroups</h2><table>" + groups + "</table>" if report["subgroups"] else ""}
<h2>What stands beside the scores</h2>
{checks}
{worst}
<h2>How it was computed</h2>
<p>PNEUMONIA is the positive class, above the threshold. Intervals: {text(report["intervals"])}</p>
<h2>Limits</h2><p>{text(LIMITS)}</p>
<p><small>{text(versions)}</small></p>
</body></html>
"""
    with atomic_write(folder / "report.html", "w") as file:
        file.write(page)
