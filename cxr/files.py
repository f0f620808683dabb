"""Writes files whole or not at all."""

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import tempfile
import zlib
from importlib import metadata
from pathlib import Path

from cxr.errors import Failure, is_system_error


@contextlib.contextmanager
def atomic_write(path, mode="wb", sync=True):
    """A file that takes the place of `path` when it is whole; after an error path is as it was.

    sync: on disk first, so that a power cut cannot leave less.
    """
    path = Path(path).resolve()  # where path is a link, the file that it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Puts a folder's list of names on disk; that a network share cannot is no error."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def check_writable(*paths):
    """A Failure, before the work, unless files can be written at `paths`; makes their folders."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise Failure(f"{path}: expected a file to write, found a folder or a device")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            error.filename = str(path.parent)  # not that of the trial
            raise


def checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_json(path, content):
    """Writes a dict as JSON, with a checksum: a changed digit leaves JSON that looks right."""
    with atomic_write(path, "w") as file:
        json.dump({"checksum": checksum(content)} | content, file, indent=1, allow_nan=False)
        file.write("\n")


def read_json(path):
    """The dict that write_json wrote, None where there is no file; any other file is a Failure."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.pop("checksum") == checksum(content):
            return content
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise Failure(f"{path}: damaged, or not written by this project; restore or delete it")


def hash_file(path):
    """SHA-256 of a file's content in hex, "" where there is none, as behind a link to nothing."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        if is_system_error(error):
            raise
        return ""


def versions(*packages):
    """{name: version} of Python, of these installed packages and of the platform."""
    found = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found, "platform": platform.platform()}


def save_figure(path, figure, dpi):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def read_csv(path, *required):
    """(columns, [(number of the line, {column: text})]); a malformed file is a Failure."""
    try:
        reader = csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
        table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise Failure(f"{path}: not a CSV file in UTF-8 ({error})") from None
    columns = table[0][1] if table else []
    for name in required:
        if name not in columns:
            expected = f"row 1, column {name}: expected its name, and commas between columns"
            raise Failure(
                f"{path}, {expected}, found {', '.join(columns) or 'an empty file'!r:.60}"
            )
    rows = []
    for number, row in table[1:]:
        if len(row) > len(columns):
            raise Failure(f"{path}, row {number}: {len(row)} cells for {len(columns)} columns")
        rows.append((number, dict.fromkeys(columns, "") | dict(zip(columns, row, strict=False))))
    return columns, rows
