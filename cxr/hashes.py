"""The SHA-256 of image files, remembered so that not every run reads a large data set."""

import contextlib
import os
import time
from pathlib import Path

from cxr.errors import Failure
from cxr.files import hash_file, read_json, write_json

RECENT = 2_000_000_000  # nanoseconds; some file systems do not see two changes within two seconds


class Hashes:
    """Computes the SHA-256 of files, and remembers it in `folder`/hashes.json.

    A file with the same path, size, time of its content and time of its entry (ctime) counts as
    unchanged. Exchanging the names of two files changes their ctime. If folder is None, nothing is
    remembered: a split must not trust the times of files.
    """

    def __init__(self, folder):
        self.path = folder and Path(folder, "hashes.json").absolute()
        self.known, self.new = {}, {}  # {path: "size times hash"}
        with contextlib.suppress(Failure, OSError):  # a damaged file is written again
            self.known = (folder and read_json(self.path)) or {}

    def hash(self, path):
        """Returns the SHA-256 of a file in hex, "" if it cannot be read. Threads may call this."""
        try:
            status = os.stat(path)
        except OSError:
            return hash_file(path)
        name = os.fsdecode(os.path.abspath(path))
        unchanged = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        size_and_times, _, sha256 = self.known.get(name, "").rpartition(" ")
        if size_and_times == unchanged:
            return sha256
        sha256 = hash_file(path)
        if sha256 and time.time_ns() - status.st_mtime_ns > RECENT:
            self.new[name] = f"{unchanged} {sha256}"
        return sha256

    def save(self):
        """Writes hashes.json if there are new hashes and the folder is writable."""
        if self.path and self.new:
            with contextlib.suppress(OSError):  # the next run then reads the files again
                write_json(self.path, self.known | self.new)
