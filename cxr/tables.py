"""Tables that other people made: their columns, their patients, and the images that rows name."""

import functools
import re
import unicodedata
from pathlib import PurePosixPath

from cxr.errors import Failure, progress
from cxr.files import missing_column, printable, read_csv

# What other tables call these columns, without spaces, underscores and capitals. The first name
# that a table has counts. NIH ChestX-ray14: Image Index, Patient ID. CheXpert: Path. MIMIC-CXR:
# dicom_id, subject_id. RSNA: patientId.
SYNONYMS = {
    "file_name": ("filename", "file", "path", "imageindex", "imageid", "dicomid", "image"),
    "patient_id": ("patientid", "subjectid", "patient", "subject", "participantid"),
}
RSNA = "patientId"  # in RSNA's tables, this is also the name of the image
SUFFIX = re.compile(r"\.(bmp|dcm|jpe?g|png|tiff?)$")  # of an image that may have been converted
# What programs and people write into the cell of an unknown patient.
UNKNOWN = ["-", "?", "#n/a", "<na>", "n/a", "na", "nan", "none", "null", "unknown"]


def fold(text):
    """Returns the same text for upper and lower case, and for both Unicode forms of a letter."""
    # A Mac writes ü as two characters (NFD), other systems as one (NFC).
    return unicodedata.normalize("NFC", text.strip().casefold())


# ---------------------------------------------------------------- columns


def read_table(path):
    """Reads a table of images, as read_csv does. Its columns become file_name and patient_id.

    Prints which columns these are if they have other names. Raises Failure without file names.
    """
    columns, rows = read_csv(path)
    headers = {name: find_column(path, columns, name) for name in SYNONYMS}
    if headers["file_name"] is None:
        if headers["patient_id"] != RSNA:
            raise missing_column(path, "file_name", columns)
        headers["file_name"] = RSNA
    used = {name: header for name, header in headers.items() if header}
    if any(name != header for name, header in used.items()):
        words = " and ".join(f"the column {used[name]!r} is the {name}" for name in used)
        progress(f"{path}: {words}")
    renamed = []
    for line, row in rows:
        others = {name: row[name] for name in columns if not is_name_or_id(name)}
        renamed.append((line, {name: row[header] for name, header in used.items()} | others))
    return list(used), renamed


def is_name_or_id(column):
    """Returns True if a column holds names of images or patients. It must not become a subgroup."""
    letters = re.sub(r"[\s_]", "", fold(column))
    return any(letters in names for names in SYNONYMS.values())


def find_column(path, columns, name):
    """Returns the column that holds file_name or patient_id, None if there is none."""
    for synonym in SYNONYMS[name]:
        found = [column for column in columns if re.sub(r"[\s_]", "", fold(column)) == synonym]
        if len(found) > 1:
            both = " and ".join(map(repr, found))
            raise Failure(f"{path}, row 1: {both} may both be the {name}; rename one of them")
        if found:
            return found[0]
    return None


# ---------------------------------------------------------------- patients


def normalise_id(text):
    """Returns the same text for all spellings of a patient's id, "" if the patient is unknown."""
    folded = fold(text)
    if folded in UNKNOWN:
        return ""
    # Excel and pandas write 17 as 17.0 or 17,0 if a cell of the column is empty.
    return re.sub(r"^(\d+)[.,]0+$", r"\1", folded)


def unify_ids(rows):
    """Gives all rows of a patient the same patient_id: the first spelling in alphabetical order.

    The id of an unknown patient becomes "". rows: list of {column: text}, which are changed.
    Returns how many rows have a word for an unknown patient.
    """
    spellings, n_words = {"": ""}, 0
    for row in sorted(rows, key=lambda row: row["patient_id"]):
        spellings.setdefault(normalise_id(row["patient_id"]), row["patient_id"])
    for row in rows:
        spelling = spellings[normalise_id(row["patient_id"])]
        n_words += bool(row["patient_id"]) and not spelling
        row["patient_id"] = spelling
    return n_words


# ---------------------------------------------------------------- images


def match_rows(path, rows, images, classes):
    """Finds the image of each row. Returns ({path of the image: row}, names without an image).

    rows: the result of read_table(path); images: paths that end in split/class/name. Raises Failure
    if a row fits two images, if two rows fit one image, or if no row has an image.
    """
    find = image_finder(images, classes)
    claims, absent = {}, []
    for line, row in rows:
        name = row["file_name"]
        n_left_out, found = find(name)
        if len(found) > 1:
            both = " and ".join(below_data(image) for image in found[:2])
            where = f"{path}, row {line}: {name}"
            raise Failure(f"{where} fits {both}; write the path below the data folder")
        if found:
            claims.setdefault(found[0], []).append((n_left_out, line, row))
        else:
            absent.append(name or f"row {line}")
    if rows and images and not claims:
        line, row = rows[0]
        raise Failure(
            f"{path}: no row has an image. Row {line} has the name {row['file_name']!r}, an image "
            f"has the name {below_data(images[0])!r}. Correct the names in the table"
        )
    matched = {}
    for image, claimants in claims.items():
        matched[image], others = choose_row(path, claimants)
        absent += others
    return matched, absent


def choose_row(path, claimants):
    """Returns (the row whose name fits an image best, the names in the other rows).

    A path that fits as a whole is better than one that fits without its first folders. claimants:
    list of (number of folders that were left out, line, row). Raises Failure if two are equal.
    """
    claimants.sort(key=lambda claim: claim[:2])
    (n_best, best_line, best_row), *others = claimants
    names = []
    for n_left_out, line, row in others:
        if n_left_out == n_best:
            where = f"{path}, row {line}: {row['file_name']}"
            raise Failure(f"{where} is the image of row {best_line} as well; keep one row")
        names.append(row["file_name"])
    return best_row, names


def image_finder(images, classes):
    """Returns a function that finds the images that a name in a table fits.

    It returns (how many folders of the name had to be left out, list of images). The longest part
    of the name that fits any image counts: a row may name another data folder, or the split from
    which the image was moved.
    """
    as_written = index_images(images)
    class_names = {fold(name) for name in classes}

    @functools.cache
    def folded():  # seldom needed, and slow for many images
        return index_images(images, loosely=True)

    def find(name):
        parts = PurePosixPath(name.replace("\\", "/")).parts
        # An image in the folder of the other class is another one.
        shortest = 2 if len(parts) > 1 and fold(parts[-2]) in class_names else 1
        for n_left_out in range(len(parts) - shortest + 1):
            # CheXpert's folders are often written into the names: patient1_study1_view1.jpg
            key = "_".join(parts[n_left_out:])
            found = as_written.get(key) or folded().get(fold(key))
            found = found or folded().get(SUFFIX.sub("", fold(key)))
            if found:
                return n_left_out, found
        return 0, []

    return find


def index_images(images, loosely=False):
    """Returns {name: images} for all names that a row may give an image: with and without folders.

    loosely: the names are folded (see fold), and the suffix may be missing.
    """
    index = {}
    for image in images:
        split, label, name = (printable(part).replace("\\", "_") for part in image.parts[-3:])
        names = {name, f"{label}_{name}", f"{split}_{label}_{name}"}
        if split == "val":
            names.add(f"train_{label}_{name}")  # the row may still say train/
        if loosely:
            names |= {text.removesuffix(image.suffix) for text in names}
            names = {fold(text) for text in names}
        for text in names:
            index.setdefault(text, []).append(image)
    return index


def below_data(image):
    """Returns the path of an image below the data folder, as text."""
    return printable("/".join(image.parts[-3:]))
