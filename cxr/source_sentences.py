"""Sentences and tables about several sources, for the screen, the page and the methods section.

A source is an entry of report["also"], which cxr/also.py makes; the first one is the first source.
"""

from cxr.also import SCORES
from cxr.errors import either
from cxr.folders import in_classes
from cxr.local_data import DRAWS
from cxr.proportions import FEW_PATIENTS, format_interval, format_number
from cxr.sources import source_name

LOCAL_TITLE = "How much local images would help"
LOCAL_METHOD = (
    "The intercept of the calibration is fitted again on local images, which are all images of "
    f"drawn patients, and the others are scored. Mean of {DRAWS} draws (5th to 95th percentile). "
    "The AUROC does not change."
)


def headline(source, first):
    """Says in one sentence how AUROC and accuracy differ from those of the first source."""
    name, reasons = source["name"], source["reasons"]
    if "auroc" in reasons:
        return f"At {name} the AUROC is unknown: {reasons['auroc']}"
    if has_few_patients(source):
        by_class = source["patients_by_class"].items()
        few = [f"{n} {label}" for label, n in by_class if n < FEW_PATIENTS]
        auroc = source["scores"]["auroc"]["value"]
        counts = " and ".join(few)
        return (
            f"At {name} there are too few patients for a conclusion ({counts}; AUROC {auroc:.2f})"
        )
    auroc, accuracy = (change_text(source["difference"][score]) for score in ("auroc", "accuracy"))
    return f"At {name} the AUROC {auroc} and the accuracy {accuracy}, compared with {first['name']}"


def has_few_patients(source):
    """Returns True if a class has so few patients that the source allows no conclusion."""
    return min(source["patients_by_class"].values()) < FEW_PATIENTS


def worse_sources(report):
    """Returns the sources where the AUROC or the accuracy is clearly lower than at the first."""
    worse = []
    for source in (report.get("also") or [])[1:]:
        limits = [source["difference"][name]["high"] for name in ("auroc", "accuracy")]
        is_lower = any(limit is not None and limit < 0 for limit in limits)
        if is_lower and not has_few_patients(source):
            worse.append(source)
    return worse


def lead_sentence(sources):
    """Says on which other images the network was scored, and with which accuracy."""
    scored = []
    for source in sources[1:]:
        accuracy = format_interval(source["scores"]["accuracy"])
        scored.append(f"{source['n']:,} images of {source['name']} (accuracy {accuracy})")
    return f"It was also scored on {'; '.join(scored)}."


def sources_heading(sources):
    """Returns a heading that states what the other sources show."""
    first, *others = sources
    if len(others) == 1:
        return headline(others[0], first)
    limits = [source["difference"]["auroc"]["high"] for source in others]
    n_lower = sum(limit is not None and limit < 0 for limit in limits)
    count = f"{n_lower or 'none'} of {len(others)}"
    return f"At {count} other sources the AUROC is clearly lower than at {first['name']}"


def change_text(difference):
    """Describes a difference with its interval: "is 0.12 lower (0.05 to 0.19)"."""
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if low is None:
        return f"is {abs(value):.2f} {'lower' if value < 0 else 'higher'} (no interval)"
    if low <= 0 <= high:
        return f"is not clearly higher or lower ({low:+.2f} to {high:+.2f})"
    nearest, farthest = sorted((abs(low), abs(high)))
    direction = "lower" if value < 0 else "higher"
    return f"is {abs(value):.2f} {direction} ({nearest:.2f} to {farthest:.2f})"


def other_sources_sentences(report):
    """Describes the other sources for a methods section. [4]: Donner and Zou in its REFERENCES."""
    if not report.get("also"):
        return []
    first, *others = report["also"]
    described = []
    for source in others:
        patients = in_classes(source["patients_by_class"])
        text = f"{source['name']}: {source['n']:,} images of {patients} patients"
        if source["names_without_patient"] == source["n"]:
            text += " (patients unknown; each image counted as one)"
        described.append(text)
    sentences = [
        f"The model was applied with the same threshold to {len(others)} more "
        f"{'source' if len(others) == 1 else 'sources'} of images ({'; '.join(described)}). "
        f"Differences to {first['name']} are those of different patients, with intervals by the "
        "method of variance estimates recovery [4]."
    ]
    used = {row["k"] for source in others for row in local_scores(source)}
    if used:
        sentences.append(
            "To estimate the use of local data, the intercept of the calibration was fitted again "
            f"on {either([str(k) for k in sorted(used)])} images of a source, which were drawn by "
            f"patient {DRAWS} times, and the other images were scored."
        )
    return sentences


def source_texts(source, positive):
    """Returns {label: text} of a source, for its column in the table of all sources."""
    texts = {
        "Images": str(source["n"]),
        "Patients": str(source["patients"]),
        f"Share of {positive}": format_interval(source["positive_share"]),
    }
    texts |= {label: format_interval(source["scores"][name]) for name, label in SCORES.items()}
    novelty = source["unlike"]
    if novelty:
        shift = "-" if novelty["shift"] is None else f"{novelty['shift']:.2f} SD"
        texts["Unlike the training images"] = f"{novelty['over']} of {novelty['n']}"
        texts["Shift of all images together"] = shift
    return texts


def difference_texts(source):
    """Returns {label: text} of the differences to the first source; {} for the first one itself."""
    if "difference" not in source:
        return {}
    differences = {SCORES[name]: value for name, value in source["difference"].items()}
    return {k: format_interval(v) for k, v in differences.items() if v["value"] is not None}


def table_rows(sources, positive):
    """Returns (label, [(name of the source, text, difference or "")]) rows for all sources."""
    columns = [(source_texts(s, positive), difference_texts(s), s["name"]) for s in sources]
    rows = []
    for label in columns[0][0]:
        cells = [
            (name, texts.get(label, "-"), changes.get(label, ""))
            for texts, changes, name in columns
        ]
        rows.append((label, cells))
    return rows


def order_notes(sources):
    """Returns lines that say which folder a source is that has the name of an earlier one."""
    names = [sources[0]["name"], *(source_name(source["data"]) for source in sources[1:])]
    folded, lines = [name.casefold() for name in names], []
    for i, source in enumerate(sources):
        if source["name"].rpartition("-")[0] == names[i]:
            which = f"folder {folded[: i + 1].count(folded[i])} with the name {names[i]}"
            lines.append(f"{source['name']}: {which}, in the order of the command line")
    return lines


def notes(sources):
    """Returns lines about the names of the sources, and about what is missing in their table."""
    lines = order_notes(sources)
    for source in sources:
        name, unknown = source["name"], source["names_without_patient"]
        if source["unreadable"]:
            more = source["unreadable"]
            images = "1 more image" if more == 1 else f"{more:,} more images"
            lines.append(f"{name}: {images} could not be read")
        if unknown:
            lines.append(f"{name}: {unknown} images without a known patient, each counts as one")
        if "difference" in source and source["difference"]["accuracy"]["value"] is None:
            why = "because that of one class cannot be compared with that of both"
            lines.append(f"{name}: no difference of the accuracy, {why}")
        scores_of = {}  # the scores that are missing for each reason
        for score, reason in source["reasons"].items():
            scores_of.setdefault(reason, []).append(SCORES[score].partition(" (")[0])
        lines += [f"{name}: no {', '.join(names)}; {why}" for why, names in scores_of.items()]
    return lines


def local_scores(source):
    """Returns the scores with local images of a source, [] if none were measured."""
    return source["local_data"]["with_local"] if source["local_data"] else []


def local_rows(local):
    """Returns rows of text (local images, accuracy, Brier score) of measure_local_data."""
    unchanged = [format_number(local["unchanged"][name]) for name in ("accuracy", "brier")]
    rows = [("no local images", *unchanged)]
    for row in local["with_local"]:
        scores = [
            format_interval({**row[x], "value": row[x]["mean"]}) for x in ("accuracy", "brier")
        ]
        rows.append((f"{row['k']} local images", *scores))
    return rows


def local_heading(sources):
    """Returns a heading that states how much the most local images would change."""
    changes = []
    for source in sources[1:]:
        if local_scores(source):
            most = local_scores(source)[-1]
            before = source["local_data"]["unchanged"]["accuracy"]
            after = f"{most['accuracy']['mean']:.2f} with {most['k']} local images"
            changes.append(f"{source['name']} has accuracy {before:.2f}, and {after}")
    return "; ".join(changes) or f"{LOCAL_TITLE}: not measured"


def local_notes(source):
    """Returns lines that say which numbers of local images were not measured, and why."""
    local, name = source["local_data"], source["name"]
    if local is None:
        return [f"{name}: not computed, because one class has no readable image"]
    if not local["left_out"]:
        return []
    sizes = either([str(k) for k in local["left_out"]])
    reason = f"less than half of the {source['n']} images could remain"
    return [f"{name}: not measured with {sizes} local images, because {reason}"]
