"""Which subjects of the guidelines CLAIM 2024 and TRIPOD+AI a report answers.

report: the content of metrics.json.
"""

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
    subjects = ["the number of images and patients, and whether the sets share patients"]
    if model.get("transforms"):
        subjects.append("how the images were prepared")
    if model.get("flags"):
        subjects.append(
            "the network, its initial weights, training, data augmentation, class imbalance, and "
            "how the final model was chosen"
        )
    subjects += [
        "calibration of the probabilities, and how the threshold was chosen",
        "measures of performance with their uncertainty, and how it was computed",
    ]
    if report["subgroups"]:
        subjects.append("performance in subgroups of patients")
    if report["shortcut"] or report["confounders"]:
        subjects.append("robustness: shortcuts, confounders, and images unlike the training images")
    subjects += ["the number of errors of each kind", "software and versions"]
    if report.get("also"):
        subjects.append("testing on external data")
    return subjects


def unanswered_subjects(report):
    """Returns the subjects of these guidelines that only the authors can answer."""
    subjects = list(AUTHORS_ONLY)
    if not report["subgroups"]:
        subjects.append("performance in subgroups of patients (add columns to metadata.csv)")
    if not report.get("also"):
        subjects.append("testing on external data, of another hospital")
    return subjects
