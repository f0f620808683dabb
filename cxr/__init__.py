"""The modules that the scripts use, one subject each; each imports only from the lines above it.

errors, decode: errors that the user can mend; an image file becomes a grey picture
files: writes files whole or not at all
folders, cache, checkpoint: classes, splits and images; features on disk; state dicts
patients: which patient an image belongs to
cli: flags that all scripts share, and exit codes
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
