"""The modules that the scripts use. Each has one subject, and imports only from levels above it.

errors       errors that the user can fix, warnings, progress lines and bars
decode       decodes an image file into a grey picture
machine      cores, memory and shared memory that this process may use
needs_torch  imports torch and torchvision, or says what to do; a split and a check need neither
novelty      detects images unlike the training images
proportions  confidence intervals of proportions (accuracy, sensitivity, ...)

files        reads and writes files; each is complete, the old or the new version
make_all     gives each script its part of the ARGS of `make all`
bootstrap    confidence intervals of other scores (AUROC, F1, ...): a bootstrap of patients
weighted     AUROC and average precision of bootstrap samples
loader       worker processes that decode images
calibration  Platt scaling and the threshold, fitted on val/; logistic regression
copies       finds altered copies of an image among many
transforms   compares the transforms of a model with those of today
finetune     cuts a network before a module, so that the part behind the cut can be trained

folders      the classes, splits and images of a data folder
hashes       the SHA-256 of images, remembered in the cache
cache        the features, in memory and on disk
checkpoint   reads state dicts safely, finds pretrained weights, writes model.pth
local_data   how much a few images of another hospital would help
previous     keeps the earlier model when a training replaces it
tables       tables of other people: names of columns, spellings of ids and of file names

cli          the command line flags that all scripts share, and exit codes
patients     which patient an image belongs to: metadata.csv, DICOM, file names
maps         class activation maps
curves       the pictures of a training
folds        folds and results of a cross-validation, doubtful labels
moves        moves images between the splits, and locks the folder meanwhile
measurements simple numbers of an image, and how well they separate classes or splits

predictions  the table of predictions, a DataFrame and predictions.csv
links        a data folder of links to images elsewhere
model_info   what model.json says about a model, and what evaluate.py takes from it
scores       all scores of such a table, with intervals

leaks        images and patients that are in more than one split
compare      compares two models on the same images
plots        the pictures of a report, as files
svg          the plots of a report, inside the page
sliders      the data of the page's sliders, threshold and prevalence
films        lateral images, captures and images in colour
learning_curve  how the scores change with the number of training images
shortcuts    how well one number of an image predicts its class without a network
sources      the data folders of other sources, such as another hospital
also         compares such sources with the first one
confounders  how well a column of metadata.csv or a DICOM value predicts the class

sentences    what screen and page say about a report
source_sentences  what they say about several sources
guidelines   which subjects of CLAIM 2024 and TRIPOD+AI a report answers

headings     the headings of the page, and the rows of its plots of scores
doubts       what speaks against a result, and whether the network is better than a shortcut
methods      a methods section for a paper, written from a report

page         the report as a web page (page.html, page.css, banner.html)
screen       what evaluate.py prints: the report, the predictions of new images
duplicates   reports copies of an image, and negatives

check        the report of split_val.py --check
gallery      the page of new images (gallery.html is its template)

The blank lines separate levels. Outside of this package: common.py has the data augmentation, the
device, the frozen network and the pass from images to features. train.py has the training loop, the
head, the early stopping (patience) and the loop of the cross-validation.
"""

import contextlib
import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

__version__ = "1.1.0"  # also in CITATION.cff and CHANGELOG.md

# If Python or a package is missing, too old, or does not fit another one, one line says what to do.
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


def numbers(version):
    """Returns the numbers of a version, to compare it: [2, 11, 0] for "2.11.0"."""
    return [int(number) for number in re.findall(r"\d+", version)]


def check_versions():
    """Raises ImportError if Python or a package is missing or older than expected."""
    if sys.version_info < (3, 10):  # noqa: UP036  the Makefile checks it, but only for .venv
        raise ImportError(f"Python 3.10 or newer needed, found {sys.version.split()[0]}")
    requirements = REQUIREMENTS.read_text(encoding="utf-8")
    for name, lowest in re.findall(r"^([\w-]+)>=([\d.]+)", requirements, re.MULTILINE):
        found = "none"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(name)
        if numbers(found) < numbers(lowest):
            raise ImportError(f"{name} {lowest} or newer needed, found {found}")


def import_or_exit(*packages):
    """Imports packages. If that fails, ends the script with one line that says what to do."""
    try:
        check_versions()
        for name in packages:
            importlib.import_module(name)
    except Exception as error:
        script = Path(sys.argv[0]).name
        reason = " ".join(str(error).split())
        advice = f"make install, then .venv/bin/python {script}"
        print(f"{script}: {reason}; {advice}", file=sys.stderr)
        sys.exit(2)


import_or_exit("numpy", "PIL", "tqdm")  # torch: cxr/needs_torch.py; others: when they are used
