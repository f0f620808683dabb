"""The modules that the scripts use, one subject each. Each imports only from the lines above it.

errors, decode, novelty, proportions
files, bootstrap, calibration
folders, cache, checkpoint
cli, patients, scores, maps, curves, folds
predictions, leaks, compare, plots, shortcuts
page, duplicates
check
"""

import importlib
import importlib.util
import sys
from pathlib import Path

try:
    for name in ("numpy", "PIL", "torch", "torchvision", "tqdm"):
        importlib.import_module(name)

    # imported where they are needed: a second of which most runs wait for nothing
    for later in ("matplotlib", "pydicom", "scipy", "sklearn", "torchmetrics"):
        if importlib.util.find_spec(later) is None:
            raise ImportError(f"No module named {later!r}")
except Exception as error:  # a package is missing, or is not for the version of another
    script = Path(sys.argv[0]).name
    remedy = f"make install, then .venv/bin/python {script}"
    print(f"{script}: {' '.join(str(error).split())}; {remedy}", file=sys.stderr)
    sys.exit(2)
