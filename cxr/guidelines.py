"""Which subjects of the guidelines CLAIM 2024 and TRIPOD+AI a report answers.

report: the content of metrics.json.
"""

from cxr.scores import is_measured

GUIDELINES = (
    "CLAIM 2024: Tejani AS et al. Checklist for Artificial Intelligence in Medical Imaging "
    "(CLAIM): 2024 update. Radiology: Artificial Intelligence 2024; 6: e240300.",
    "TRIPOD+AI: Collins GS et al. TRIPOD+AI statement: updated guidance for reporting clinical "
    "prediction models that use regression or machine learning methods. BMJ 2024; 385: e078378.",
)
# Subjects that both guidelines ask for, in our words.
AUTHORS_ONLY = (
    "the aim of the study, the intended use, and what the reader should do with the result",
    "where and when the images were made, and which patients were included and excluded",
    "the reference standard: who decided about the disease, from what, and how well readers agreed",
    "the devices, views and acquisition of the images",
    "age, sex and other characteristics of the patients in each set",
    "missing data, and how names and other personal data were removed",
    "why these numbers of patients are enough (sample size)",
    "ethics approval and consent; registration and protocol",
    "funding, competing interests, and where data and code can be found",
    "involvement of patients and the public",
    "limitations, fairness and consequences for practice",
)


def answered_subjects(report):
    """Returns the subjects of CLAIM 2024 and TRIPOD+AI that the page and the paragraph answer."""
    model = report["model"] or {}
    sets = ", and whether the sets share patients" if knows_all_sets(report) else ""
    subjects = [f"the number of images and patients{sets}"]
    if model.get("transforms"):
        subjects.append("how the images were prepared")
    if model.get("flags"):
        subjects.append(
            "the network, its initial weights, training, data augmentation, class imbalance, and "
            "how the final model was chosen"
        )
    if is_measured(report["calibration"]):
        subjects.append("calibration of the probabilities")
    subjects += [
        "how the threshold was chosen",
        "measures of performance with their uncertainty, and how it was computed",
    ]
    if has_patient_subgroups(report):
        subjects.append("performance in subgroups of patients")
    tests = {
        "shortcuts": "numbers" in (report["shortcut"] or {}),
        "confounders": (report["confounders"] or {}).get("columns"),
        "images unlike the training images": report["unlike"],
    }
    tested = [name for name, result in tests.items() if result]
    if tested:
        subjects.append(f"robustness: {', '.join(tested)}")
    subjects += ["the number of errors of each kind", "software and versions"]
    if report.get("also"):
        subjects.append("testing on external data")
    return subjects


def has_patient_subgroups(report):
    """Returns True if there are subgroups by another column than the kind of pneumonia."""
    return any(row["column"] != "etiology" for row in report["subgroups"].values())


def unanswered_subjects(report):
    """Returns the subjects of these guidelines that only the authors can answer."""
    subjects = list(AUTHORS_ONLY)
    if not has_patient_subgroups(report):
        subjects.append("performance in subgroups of patients (add columns to metadata.csv)")
    if not report.get("also"):
        subjects.append("testing on external data, of another hospital")
    return subjects


def knows_all_sets(report):
    """Returns True if the run had all images of the model, to compare their patients, too."""
    leaks = report["leaks"] or {}
    # An earlier version did not write "present".
    return bool(leaks.get("learned") and leaks.get("present") and not leaks["absent"])
