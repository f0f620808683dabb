"""Reads and writes files. Each written file is complete: the old or the new version."""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import tempfile
import warnings
import zlib
from importlib import metadata
from pathlib import Path

from cxr import __version__
from cxr.errors import Failure, is_system_error

ESCAPES = "backslashreplace"  # for what UTF-8 cannot encode: names that are not UTF-8
SAVE_CSV = "save it as CSV UTF-8 (in Excel: Save As, CSV UTF-8)"


@contextlib.contextmanager
def atomic_write(path, mode="wb", sync=True):
    """Opens a temporary file that replaces `path` when the block ends without an error.

    sync: also wait until the file is on the disk, so that it survives a power cut.
    """
    path = Path(path).resolve()  # replaces the file that a link points to, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options = {"newline": "", "encoding": "utf-8", "errors": ESCAPES} if "b" not in mode else {}
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)  # the user does not know the temporary file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Waits until the list of files in a folder is on the disk."""
    with contextlib.suppress(OSError):  # some file systems do not support it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(*paths):
    """Creates the folders of `paths`, and raises an error if no file can be written there."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise Failure(f"{path}: expected a file to write, found a folder or a device")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            error.filename = str(path.parent)  # not the name of the temporary file
            raise


def printable(path):
    """Returns a path or a text; characters that UTF-8 cannot encode are written as escapes.

    A name that is shown, drawn or written goes through this function, or through a stream with the
    same rule: the screen (cxr.cli.run) and text files (atomic_write).
    """
    text = path.as_posix() if isinstance(path, Path) else path
    return text.encode(errors=ESCAPES).decode()


def hash_file(path):
    """Returns the SHA-256 of a file in hex, "" if it cannot be read (for example a broken link)."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        if is_system_error(error):
            raise
        return ""


def checksum(content):
    """Returns the CRC-32 of a dict, written as JSON."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_json(path, content):
    """Writes a dict as JSON, with its checksum."""
    content = {"checksum": checksum(content)} | content  # to notice a changed digit
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


def read_json(path):
    """Reads the dict that write_json wrote, None if there is no file.

    Raises Failure if the file is damaged, or if it has no checksum.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        expected = content.pop("checksum")
        if checksum(content) == expected:
            return content
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass  # what damaged JSON and JSON of another structure raise; see below
    raise Failure(f"{path}: damaged, or not written by this project; restore it or delete it")


def read_csv(path, *required_columns):
    """Reads a CSV file. Returns (columns, [(line number, {column: text})]).

    The separator is a comma, a semicolon or a tab. Rows of empty cells are left out. Raises Failure
    if it is not CSV, if a required column is missing, if a name occurs twice, or a row is too long.
    """
    text = decode_table(path)
    try:
        separator = find_separator(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise Failure(f"{path}: not a CSV file ({error}); {SAVE_CSV}") from None
    table = [(line, cells) for line, cells in table if any(cells)]
    columns = table[0][1] if table else []
    for name in required_columns:
        if name not in columns:
            raise missing_column(path, name, columns)
    for name in columns:
        if name and columns.count(name) > 1:
            raise Failure(f"{path}, row 1: two columns are called {name}; rename one of them")
    rows = []
    for line, cells in table[1:]:
        if len(cells) > len(columns):
            raise Failure(f"{path}, row {line}: {len(cells)} cells for {len(columns)} columns")
        cells += [""] * (len(columns) - len(cells))  # a short row ends in empty cells
        rows.append((line, dict(zip(columns, cells, strict=True))))
    return columns, rows


def decode_table(path):
    """Returns the text of a table in UTF-8, or in UTF-16 with its mark. Else raises Failure."""
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    problem = "it contains the byte 0"  # as UTF-16 without its mark does
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        if "\0" not in text:
            return text
    except UnicodeDecodeError as error:
        problem = error
    raise Failure(f"{path}: not a CSV file in UTF-8 ({problem}); {SAVE_CSV}")


def find_separator(text):
    """Returns the separator that divides the first row into the most columns."""

    def n_columns(separator):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        return len(next(filter(None, rows), []))

    return max(",;\t", key=n_columns)


def missing_column(path, name, columns):
    """Returns the Failure for a table without a column."""
    header = repr(", ".join(columns)) if columns else "an empty file"
    expected = "expected a column of this name, and commas, semicolons or tabs between the columns"
    return Failure(f"{path}, row 1, column {name}: {expected}, found {header:.60}")


def save_figure(path, figure, dpi):
    """Saves a matplotlib figure as a PNG file."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks a character of a name
        figure.savefig(file, format="png", dpi=dpi)


def versions(*packages):
    """Returns {name: version} of this project, Python, these packages, and the platform."""
    ours = {"cxr": __version__, "python": platform.python_version()}
    installed = {name: metadata.version(name) for name in packages}
    return {**ours, **installed, "platform": platform.platform()}
