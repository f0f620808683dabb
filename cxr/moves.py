"""Moves images between the splits of a data folder, and locks the folder meanwhile."""

import contextlib
import errno
import os
import shlex

from filelock import FileLock, Timeout

from cxr.errors import Failure, warn
from cxr.files import sync_folder
from cxr.folders import SPLIT_FILES

LOCK_FILE = "split_val.lock"  # in the data folder, while a split_val.py works on it


def list_moves(data_dir, moved, source, target):
    """Lists the renames that remain to be done, as (old path, new path) pairs.

    moved: {class: file names}; source, target: the splits. Raises Failure if a rename is
    impossible. Warns if an image is in neither split.
    """
    moves, gone = [], []
    for name, files in moved.items():
        for file in files:
            old = data_dir / source / name / file
            new = data_dir / target / name / file
            if os.path.lexists(old) and os.path.lexists(new):  # lexists: also for broken links
                raise Failure(f"{new}: exists already, and so does {old}; remove one of them")
            if os.path.lexists(old):
                moves.append((old, new))
            elif not os.path.lexists(new):
                gone.append(file)
    if moves:
        check_folders_writable(data_dir, list_folders(data_dir, (source, target), moved))
    if gone:
        warn(
            f"{gone[0]}: it was part of the split and is gone ({len(gone)} such images). Put it "
            "back if you need it"
        )
    return moves


def check_folders_writable(data_dir, folders):
    """Raises Failure if a folder cannot be changed. Its message names the flags that help."""
    for folder in folders:
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            source = shlex.quote(str(data_dir))
            raise Failure(
                f"{folder}: not writable, so no image can be moved. Change its permissions, or "
                "split a folder of links: "
                f"--data-dir NEW --link-from {source} (make: DATA=NEW LINK_FROM={source})"
            )


def list_folders(data_dir, splits, classes):
    """Returns the folders that moves between these splits may change."""
    folders = [data_dir]
    for split in splits:
        folders += [data_dir / split, *(data_dir / split / name for name in classes)]
    return folders


def move(moves, folders):
    """Renames images, and never copies: at every moment each image is complete and in one place.

    moves: the result of list_moves; folders: the result of list_folders.
    """
    try:
        for folder in {new.parent for _, new in moves}:
            folder.mkdir(parents=True, exist_ok=True)
        for old, new in moves:
            os.rename(old, new)
    except KeyboardInterrupt as interrupt:
        message = "interrupted; every image is complete. Run the same command again to finish"
        raise type(interrupt)(message) from None  # keeps the type, for the exit code
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        message = f"{new}: is on another file system than {old}; put both on the same one"
        raise Failure(message) from None
    for folder in folders:
        sync_folder(folder)


@contextlib.contextmanager
def lock(data_dir):
    """Locks a data folder, so that one split_val.py works on it; removes leftover files."""
    if not data_dir.is_dir():
        raise Failure(f"{data_dir}: no such folder; name it with --data-dir DIR (make: DATA=DIR)")
    if not os.access(data_dir, os.W_OK | os.X_OK):  # then no run can move an image there
        yield
        return
    # mode: other users of the folder may lock it, too. No soft lock, as a kill would leave it.
    file_lock = FileLock(data_dir / LOCK_FILE, mode=0o666, fallback_to_soft=False)
    wait_for_lock(file_lock, data_dir)
    try:
        for file in SPLIT_FILES.values():
            for path in data_dir.glob(f".{file}.*.tmp"):  # left by a process that was killed
                path.unlink()
        yield
    finally:
        # Deleted before the release, so that nobody's new lock is deleted. A process that waited
        # for the deleted file cannot take it: filelock checks st_nlink and opens the new one.
        # On Windows an open file cannot be deleted; there, the release deletes it.
        with contextlib.suppress(OSError):
            os.unlink(data_dir / LOCK_FILE)
        file_lock.release()


def wait_for_lock(file_lock, data_dir):
    """Takes the lock of a folder. Waits while another process has it."""
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        print(f"{data_dir}: waiting for another split_val.py to finish", flush=True)
        file_lock.acquire()
    except OSError as error:  # some network file systems cannot lock a file
        warn(f"{data_dir}: cannot be locked ({error.strerror}); run one split_val.py at a time")
