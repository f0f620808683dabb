"""The features in memory, and their cache on disk. The cache can be deleted at any time."""

import errno
import math
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cxr.errors import progress, warn
from cxr.files import atomic_write
from cxr.machine import count_memory

# What np.load raises for damaged files. An .npz file is a zip file, so its CRCs are checked.
DAMAGED = (OSError, ValueError, RuntimeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)


READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def allocate(shape, dtype, folder):
    """Returns a tensor of zeros for features or activations.

    If it would take more than a quarter of the memory, it is a memory-mapped file in `folder`. This
    file has no name, so it is gone when the process ends.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes <= count_memory() / 4:
        return torch.zeros(shape, dtype=dtype)
    size = f"{n_bytes / 1e9:.1f} GB"
    progress(f"{size} are kept in a temporary file in {folder}, because the memory is too small")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(n_bytes)
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process later
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        array = np.memmap(file, np.uint8, "r+")
    return torch.from_numpy(array).view(dtype).view(shape)


class Cache:
    """Keeps the features of each image in <SHA-256 of the image>.npz, as bytes (n_views, -1).

    key: names the folder; it is a hash of everything else that the features depend on.
    """

    def __init__(self, cache_dir, key):
        self.folder = Path(cache_dir, key)
        self.is_read_only = False

    def path(self, xray):
        """Returns the file that holds the features of an image."""
        return self.folder / f"{xray.sha256}.npz"

    def load(self, features, xrays, rows):
        """Loads cached features into `features`. Returns the rows that are not in the cache.

        features: (N, n_views, width); xrays: the N images; rows: which of them to load.
        """
        n_views = features.shape[1]
        missing = []
        for row in rows:
            path = self.path(xrays[row])
            try:
                views = np.load(path)["views"]
                if len(views) >= n_views:  # otherwise from a run with a smaller --views
                    features[row] = torch.from_numpy(views[:n_views]).view(features.dtype)
                    continue
            except FileNotFoundError:
                pass
            except DAMAGED as error:
                warn(
                    f"{path}: cannot be read ({error}), so its features are computed again. You "
                    "need not do anything"
                )
            missing.append(row)
        if missing:
            n_cached = len(rows) - len(missing)
            progress(
                f"Features: {n_cached} of {len(rows)} images are in the cache {self.folder.parent}"
            )
        return missing

    def save(self, xray, views):
        """Saves the features of one image, (n_views, width), unless the folder is read-only."""
        if self.is_read_only:
            return
        try:
            with atomic_write(self.path(xray), sync=False) as file:  # losing a cache does no harm
                np.savez(file, views=views.view(torch.uint8).numpy())  # NumPy has no bfloat16
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            self.is_read_only = True
            folder, reason = self.folder.parent, error.strerror
            warn(
                f"{folder}: cannot be written ({reason}), so new features are not stored. To store "
                "them, use another --cache-dir"
            )
