"""The report of evaluate.py as a web page: report.html, from the template page.html."""

import base64
import io
from pathlib import Path

import jinja2
import PIL.Image

from cxr import doubts, guidelines, headings, methods, sentences, source_sentences, svg
from cxr.files import atomic_write
from cxr.maps import legend
from cxr.proportions import format_interval
from cxr.sliders import slider_data

PLOTS = (svg.roc, svg.precision_recall, svg.calibration, svg.scores)
MOST_DOTS = 300  # of a class; for more images, a bar takes the place of the dots
WORST_BYTES = 140_000  # of all pictures of the worst images together; as text a third more


def template_environment():
    """Returns the jinja2 environment of the templates in this folder."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes, files and columns may contain "<"
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(folder, report, predictions, worst=(), curves=()):
    """Writes report.html, one file that contains everything, and methods.md.

    predictions: of readable images; worst: the result of draw_worst in cxr/plots.py; curves: of the
    sources of --also (see cxr.also.roc_curves).
    """
    report = without_folders(report)
    environment = template_environment()
    environment.filters["display_name"] = sentences.display_name
    environment.filters["format_interval"] = format_interval
    negative, positive = report["classes"]
    page = environment.get_template("page.html").render(
        report=report,
        negative=negative,
        positive=positive,
        roc_of_sources=svg.roc_of_sources(curves) if curves else "",
        doubts=doubts,
        guidelines=guidelines,
        headings=headings,
        methods=methods,
        sentences=sentences,
        source_sentences=source_sentences,
        forest=svg.forest,
        plots=[draw(predictions, report) for draw in PLOTS],
        plot_view=svg.VIEW,
        sliders=slider_data(report, predictions),
        most_dots=MOST_DOTS,
        worst=encode_worst(worst),
        map_legend=legend(report["classes"]),
    )
    with atomic_write(folder / "report.html", "w") as file:
        file.write(page)
    methods.write_methods(folder / "methods.md", report)


def without_folders(report):
    """Returns a report in which all texts have only the last part of each path.

    A page is sent to others, and folders have names of people, studies and hospitals.
    """
    model = report["model"] or {}
    paths = [model.get("file"), model.get("weights"), report.get("data")]
    paths.append((report.get("comparison") or {}).get("with"))
    paths += [source.get("data") for source in report.get("also") or []]
    if model.get("file"):
        paths.append(Path(model["file"]).with_suffix(".json"))
    names = {str(path): Path(path).name for path in paths if path and "/" in str(path)}

    def shorten(value):
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str):
            for path in sorted(names, key=len, reverse=True):
                value = value.replace(path, names[path])
        return value

    return shorten(report)


def encode_worst(worst):
    """Returns (number, text, JPEG as text) of pictures that have at most WORST_BYTES together."""
    for quality in (80, 65, 50, 35, 20):
        files = [encode_jpeg(pixels, quality) for _, _, pixels in worst]
        if sum(map(len, files)) <= WORST_BYTES:
            break
    texts = [base64.b64encode(content).decode() for content in files]
    return [(number, words, text) for (number, words, _), text in zip(worst, texts, strict=True)]


def encode_jpeg(pixels, quality):
    """Returns a JPEG file of uint8 pixels (height, width, 3), as bytes."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "jpeg", quality=quality, optimize=True)
    return file.getvalue()
