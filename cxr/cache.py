"""The cache of features on disk."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cxr.errors import progress, warn
from cxr.files import atomic_write

ZIP_ERRORS = zipfile.BadZipFile, zlib.error, NotImplementedError


class Cache:
    """Features on disk: <SHA-256 of the image>.npz with `views`, float32 (n_views, width).

    key: names the folder, and holds what else they depend on.
    A zip has CRCs, and np.load checks them.
    """

    def __init__(self, cache_dir, key):
        self.folder = Path(cache_dir, key)

    def path(self, image):
        return self.folder / f"{image.sha256}.npz"

    def fill(self, features, images, rows):
        """Fills features[row], (n_views, width), for the rows that are kept; returns the others."""
        n_views, missing = features.shape[1], []
        for row in rows:
            path = self.path(images[row])
            try:
                views = np.load(path)["views"]
                if len(views) < n_views:
                    missing.append(row)
                else:
                    features[row] = torch.from_numpy(views[:n_views])
            except FileNotFoundError:
                missing.append(row)
            except (OSError, ValueError, RuntimeError, LookupError, EOFError, *ZIP_ERRORS) as error:
                warn(f"{path}: computed again, it cannot be read ({error})")
                missing.append(row)
        if missing:
            kept = f"{len(rows) - len(missing)} of {len(rows)} images"
            progress(f"Features: {kept} are in {self.folder.parent}")
        return missing

    def save(self, image, views):
        with atomic_write(self.path(image), sync=False) as file:  # a cache may be lost
            np.savez(file, views=views.numpy())
