"""The report of evaluate.py as a web page: report.html, from the template page.html."""

import base64
from pathlib import Path

import jinja2

from cxr import svg
from cxr.files import atomic_write
from cxr.proportions import format_interval
from cxr.sentences import display_name, lead_sentence, sections, summary_rows
from cxr.sliders import slider_data

PLOTS = (svg.roc, svg.precision_recall, svg.calibration, svg.scores)
PICTURES = {
    "roc": "ROC curve: sensitivity and false positive rate for every threshold",
    "precision_recall": "Precision-recall curve: precision and sensitivity for every threshold",
    "confusion": "Confusion matrix: the true and the predicted classes",
    "reliability": "Calibration: predicted probability and observed share",
    "scores": "Probabilities of the images of each class",
    "worst": "Misclassified images; if there are none, those nearest to the threshold. The numbers "
    "are those in predictions.csv",
}


def write_page(folder, report, predictions, pictures):
    """Writes report.html: one file that contains everything, also the pictures of these names.

    predictions: of readable images.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes, files and columns may contain "<"
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["display_name"] = display_name
    environment.filters["format_interval"] = format_interval
    negative, positive = report["classes"]
    page = environment.get_template("page.html").render(
        report=report,
        negative=negative,
        positive=positive,
        lead_sentence=lead_sentence(report),
        summary_rows=summary_rows(report),
        sections=sections(report),
        plots=[draw(predictions, report) for draw in PLOTS],
        plot_view=svg.VIEW,
        sliders=slider_data(report, predictions),
        pictures={name: read_as_base64(folder / f"{name}.png") for name in pictures},
        captions=PICTURES,
        versions=", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    )
    with atomic_write(folder / "report.html", "w") as file:
        file.write(page)


def read_as_base64(path):
    """Returns the content of a file as text, for a picture inside the page."""
    return base64.b64encode(path.read_bytes()).decode()
