"""Draws data folders of 60 images, each with a random metadata.csv of which the truth is known."""

import csv
import io
import ntpath
import unicodedata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

FOLDERS = {"train/NORMAL": 20, "train/PNEUMONIA": 20, "test/NORMAL": 10, "test/PNEUMONIA": 10}
STEMS = ("scan_{}", "Scan {}", "Röntgen-{}", "1.2.840.{}", "{:05d}", "Meier, Hans {}", 'a"b;c {}')
SUFFIXES = (".png", ".PNG", ".jpeg", ".dcm")
FILE_HEADERS = ("file_name", "Image Index", "Path", "dicom_id", "image_id", "FILENAME", " File ")
PATIENT_HEADERS = ("patient_id", "Patient ID", "subject_id", "patientId", "PATIENT_ID")
OTHER_COLUMNS = {"sex": "FM", "Age": ("5", "60", "1,5", ""), "site (city)": ("Zürich", "Ulm; DE")}
OTHER_COLUMNS |= {"Finding Labels": ("Effusion|Mass", 'a "b"', "two\nlines"), "": ("0", "1")}
UNKNOWN = ("", "nan", "NaN", "NA", "n/a", "None", "NULL", "unknown", "-", "?")
# name: (probability, words of the message by which the table must be refused)
FLAWS = {
    "no column of file names": (0.03, "column file_name: expected"),
    "two columns of one name": (0.03, "two columns are called"),
    "other names": (0.03, "no row has an image"),
    "a row twice": (0.03, "keep one row"),
    "a wrong encoding": (0.05, "save it as CSV UTF-8"),
}


class RandomTable(NamedTuple):
    """A data folder and its metadata.csv."""

    patients: dict  # {path below the data folder: number of the patient, None if not known}
    content: bytes  # of metadata.csv
    refused: str  # words of the message by which it must be refused; "" if it must be read
    has_patients: bool  # there is a column of patients
    n_rows: int
    n_absent: int  # rows without an image
    n_words: int  # rows with a word for an unknown patient


def draw_table(rng):
    """Draws a RandomTable."""
    flaws = [name for name, (probability, _) in FLAWS.items() if rng.random() < probability]
    flaw = flaws[0] if flaws else None
    unique_names = rng.random() < 0.8  # otherwise each folder has an image of each name
    paths = draw_paths(rng, unique_names)
    numbers = draw_patients(rng, paths)
    spell = rng.choice((spell_number, spell_word, spell_either))
    forms = rng.sample(NAMES, 3) if unique_names else rng.sample(PATHS, 2)
    refused = FLAWS[flaw][1] if flaw else ""
    if not unique_names and not flaw and rng.random() < 0.2:
        forms, refused = [str_name], "write the path below"
    has_patients = rng.random() < 0.95
    share_of_rows, share_unknown = rng.choice((1, 0.8)), rng.choice((0, 0.2))

    rows, known = [], dict.fromkeys(paths)
    n_words = 0
    for path in paths:
        if rng.random() < share_of_rows:
            identity = spell(rng, numbers[path])
            if rng.random() < share_unknown:
                identity = rng.choice(UNKNOWN)
                n_words += bool(identity)
            elif has_patients:
                known[path] = numbers[path]
            rows.append((rng.choice(forms)(rng, path), identity))
    n_absent = rng.choice((0, 3))
    rows += [(f"gone {i}.png", spell(rng, i)) for i in range(n_absent)]
    if flaw == "other names":
        rows = [(f"other {i}", identity) for i, (_, identity) in enumerate(rows)]
    if flaw == "a row twice":
        rows.append(rows[0])
    rng.shuffle(rows)
    content = write_table(rng, rows, has_patients, flaw)
    return RandomTable(known, content, refused, has_patients, len(rows), n_absent, n_words)


def draw_paths(rng, unique_names):
    """Returns the paths of 60 images below the data folder. Names are NFC or NFD."""
    stem, paths, number = rng.choice(STEMS), [], 0
    for folder, n in FOLDERS.items():
        for i in range(n):
            number += 1
            name = stem.format(number if unique_names else i) + rng.choice(SUFFIXES)
            paths.append(f"{folder}/{unicodedata.normalize(rng.choice(('NFC', 'NFD')), name)}")
    return paths


def draw_patients(rng, paths):
    """Returns {path: number of the patient}. A patient has 1 to 4 images, all in one split."""
    numbers, number = {}, 0
    for split in ("train", "test"):
        images = [path for path in paths if path.startswith(split)]
        rng.shuffle(images)
        while images:
            number += 1
            for path in images[: rng.randint(1, 4)]:
                numbers[path] = number
                images.remove(path)
    return numbers


# ---------------------------------------------------------------- spellings of an id


def spell_number(rng, number):
    return rng.choice((f"{number}", f"{number}.0", f" {number} "))


def spell_word(rng, number):
    word = unicodedata.normalize(rng.choice(("NFC", "NFD")), f"Müller {number}")
    return rng.choice((word, word.upper(), word.lower(), f"{word} "))


def spell_either(rng, number):
    return (spell_number, spell_word)[number % 2](rng, number)


# ---------------------------------------------------------------- forms of a name


def str_name(rng, path):
    return PurePosixPath(path).name


def without_suffix(rng, path):
    return PurePosixPath(path).stem


def in_capitals(rng, path):
    return PurePosixPath(path).name.upper()


def in_another_form(rng, path):
    form = rng.choice(("NFC", "NFD"))
    return unicodedata.normalize(form, PurePosixPath(path).name)


def on_windows(rng, path):
    return ntpath.normpath(f"C:/study/{path}")


def without_split(rng, path):
    return path.partition("/")[2]


def on_another_machine(rng, path):
    return f"/mnt/{rng.randrange(9)}/{path}"


def as_path(rng, path):
    return path


def path_without_suffix(rng, path):
    return str(PurePosixPath(path).with_suffix("")).upper()


PATHS = (on_windows, on_another_machine, as_path, path_without_suffix)
NAMES = (str_name, without_suffix, in_capitals, in_another_form, without_split, *PATHS)

# ---------------------------------------------------------------- the file


def write_table(rng, rows, has_patients, flaw):
    """Returns the content of metadata.csv. rows: list of (name of the image, id of the patient)."""
    names, ids = zip(*rows, strict=True)
    columns = [(rng.choice(FILE_HEADERS), names)]
    if flaw == "no column of file names":
        columns = [("Bild", names)]
    if has_patients:
        columns.append((rng.choice(PATIENT_HEADERS[: 3 if flaw else None]), ids))
    for name, values in rng.sample(sorted(OTHER_COLUMNS.items()), rng.randint(0, 4)):
        columns.append((name, [rng.choice(values) for _ in rows]))
    if flaw == "two columns of one name":
        columns.append(columns[0])
    rng.shuffle(columns)
    text = io.StringIO()
    options = {"delimiter": rng.choice(",;\t"), "lineterminator": rng.choice(("\n", "\r\n"))}
    writer = csv.writer(text, **options)
    writer.writerow([name for name, _ in columns])
    writer.writerows(zip(*(values for _, values in columns), strict=True))
    encoding = rng.choice(("utf-8", "utf-8-sig", "utf-16"))
    if flaw == "a wrong encoding":
        encoding = "utf-16-le"  # without its mark
    return text.getvalue().encode(encoding)


def write_data(root, table):
    """Writes the data folder of a RandomTable."""
    for path in table.patients:
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    Path(root, "metadata.csv").write_bytes(table.content)
