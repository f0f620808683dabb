"""The modules that the scripts use. Each has one subject, and imports only from the lines above it.

errors       errors that the user can fix, warnings and progress lines
decode       decodes an image file into a grey picture
novelty      detects images unlike the training images
proportions  confidence intervals of proportions (accuracy, sensitivity, ...)

files        reads and writes files; each is complete, the old or the new version
bootstrap    confidence intervals of other scores (AUROC, F1, ...): a bootstrap of patients
calibration  Platt scaling and the threshold, fitted on val/; logistic regression

folders      the classes, splits and images of a data folder
cache        the features on disk
checkpoint   reads state dicts safely, finds pretrained weights, writes model.pth

cli          the command line flags that all scripts share, and exit codes
patients     which patient an image belongs to: metadata.csv, DICOM, file names
maps         class activation maps
curves       the pictures of a training
folds        folds and results of a cross-validation, doubtful labels

predictions  the table of predictions, a DataFrame and predictions.csv
scores       all scores of such a table, with intervals

leaks        images and patients that are in more than one split
compare      compares two models on the same images
plots        the pictures of a report
shortcuts    how well one number of an image predicts its class without a network

page         the report, on the screen and as a web page (page.html is its template)
duplicates   copies of an image, and negatives

check        the report of split_val.py --check

The blank lines separate levels. Outside of this package: common.py has the data augmentation, the
device, the frozen network and the pass from images to features. train.py has the training loop, the
head, the early stopping (patience) and the loop of the cross-validation.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

# If a package is missing or does not fit another one, one line says what to do.
NOW = ("numpy", "PIL", "torch", "torchvision", "tqdm")
# Only looked up, because each takes up to a second to import, and not every script needs it.
LATER = (
    "filelock", "jinja2", "matplotlib", "pandas", "pydicom", "scipy", "sklearn", "torchmetrics",
)  # fmt: skip
try:
    for name in NOW:
        importlib.import_module(name)
    for name in LATER:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"No module named {name!r}")
except Exception as error:
    script = Path(sys.argv[0]).name
    reason = " ".join(str(error).split())
    advice = f"make install, then .venv/bin/python {script}"
    print(f"{script}: {reason}; {advice}", file=sys.stderr)
    sys.exit(2)
