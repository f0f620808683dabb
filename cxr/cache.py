"""The cache of features on disk. It can be deleted at any time."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cxr.errors import progress, warn
from cxr.files import atomic_write

# What np.load raises for damaged files. An .npz file is a zip file, so its CRCs are checked.
DAMAGED = (OSError, ValueError, RuntimeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)


class Cache:
    """Keeps the features of each image in <SHA-256 of the image>.npz: float32 (n_views, width).

    key: names the folder; it is a hash of everything else that the features depend on.
    """

    def __init__(self, cache_dir, key):
        self.folder = Path(cache_dir, key)

    def path(self, xray):
        """Returns the file that holds the features of an image."""
        return self.folder / f"{xray.sha256}.npz"

    def load(self, features, xrays, rows):
        """Loads cached features into `features`. Returns the rows that are not in the cache.

        features: float32 (N, n_views, width); xrays: the N images; rows: which of them to load.
        """
        n_views = features.shape[1]
        missing = []
        for row in rows:
            path = self.path(xrays[row])
            try:
                views = np.load(path)["views"]
                if len(views) >= n_views:  # otherwise from a run with a smaller --views
                    features[row] = torch.from_numpy(views[:n_views])
                    continue
            except FileNotFoundError:
                pass
            except DAMAGED as error:
                warn(f"{path}: cannot be read ({error}), so its features are computed again")
            missing.append(row)
        if missing:
            n_cached = len(rows) - len(missing)
            progress(
                f"Features: {n_cached} of {len(rows)} images are in the cache {self.folder.parent}"
            )
        return missing

    def save(self, xray, views):
        """Saves the features of one image, float32 (n_views, width)."""
        with atomic_write(self.path(xray), sync=False) as file:  # losing a cache does no harm
            np.savez(file, views=views.numpy())
