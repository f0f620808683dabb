"""cxr/files.py: files are written whole or not at all, and records are checked."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from functools import partial
from pathlib import Path

import pytest
from faults import files, put
from helpers import TINY, linux, path_flags

import common
import evaluate
import split_val
import train
from cxr.errors import Failure
from cxr.files import atomic_write, read_csv, read_json, write_json

RECORD = {"threshold": 0.5, "images": {"a": "b"}}


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert read_json(tmp_path / "a.json") is None
    write_json(tmp_path / "a.json", RECORD)
    assert read_json(tmp_path / "a.json") == RECORD


@pytest.mark.parametrize("change", [("0.5", "0.6"), ("checksum", "sum"), ("{", "\0")])
def test_a_record_that_was_changed_is_refused_by_name(change, tmp_path):
    path = tmp_path / "a.json"
    write_json(path, RECORD)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(Failure, match=r"a\.json"):
        read_json(path)


@pytest.mark.parametrize("name", ["a.txt", "link.txt"])
def test_a_file_or_that_behind_a_link_is_replaced_as_a_whole_or_not_at_all(name, tmp_path):
    put(tmp_path / "a.txt", b"old")
    put(tmp_path / "link.txt", "a.txt")
    with contextlib.suppress(KeyError), atomic_write(tmp_path / name, "w") as file:
        file.write("half")
        raise KeyError
    assert files(tmp_path) == {"a.txt": b"old", "link.txt": b"old"}
    with atomic_write(tmp_path / name, "w") as file:
        file.write("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "link.txt").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "link.txt"]


def test_a_folder_that_cannot_be_synced_is_no_error(run_script, monkeypatch):
    fsync = os.fsync

    def fsync_files(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fsync_files)
    assert run_script("split_val", "--undo") == run_script("split_val", "--per-class", 4) == (0, [])
    assert run_script("train") == run_script("evaluate") == (0, [])


@pytest.mark.parametrize(
    ("script", "flag", "path", "named"),
    [
        ("train", "--results-dir", "file", "file"),
        ("train", "--checkpoint", "file/model.pth", "file"),
        ("train", "--checkpoint", "folder.pth", "folder.pth"),
        ("evaluate", "--results-dir", "file/results", "file/results"),
        ("evaluate", "--cam", "file", "file"),
    ],
)
def test_an_output_that_cannot_be_written_is_an_error_before_the_work(
    script, flag, path, named, refused, home, monkeypatch
):
    put(home / "file", b"")
    (home / "folder.pth").mkdir()
    monkeypatch.setattr(common, "extract_features", None)  # the work
    assert f"{home / named}: " in refused(2, script, flag, home / path)


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_an_output_folder_without_permission_is_an_error_before_the_work(
    script, refused, home, monkeypatch
):
    def denied(dir=None, **_):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/trial")

    monkeypatch.setattr(common, "extract_features", None)  # the work
    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    line = refused(2, script)
    assert str(home) in line and "trial" not in line and "Permission denied" in line


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls, true_replace = [], os.replace

    def replace(old, new):
        calls.append("replace")
        true_replace(old, new)

    def fsync(descriptor):
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", RECORD)
    assert calls == ["fsync file", "replace", "fsync folder"]


# ---------------------------------------------------------------- names that are not UTF-8


@linux
def test_a_name_that_is_not_utf8_is_shown_drawn_and_written_with_escapes(
    data, quick, pictures, tmp_path, capsys
):
    home = tmp_path / os.fsdecode(b"Z\xfcrich")
    data = Path(shutil.move(data, home / "data"))
    for number, path in enumerate(sorted(data.glob("*/*/*"))):  # as in an archive from Windows
        path.rename(path.with_name(os.fsdecode(b"R\xf6ntgen %d.jpeg" % number)))
    known = next((data / "train" / "NORMAL").iterdir())
    shutil.copy(known, data / "test" / "NORMAL" / os.fsdecode(b"\xff.jpeg"))  # for a warning
    flags = partial(path_flags, data, home, home / "cache")
    assert train.main(flags(*TINY, "--folds", 3, "--repeats", 1)) == train.main(flags(*TINY)) == 0
    assert evaluate.main(flags()) == 0
    warnings = capsys.readouterr().err
    assert evaluate.main(flags("--results-dir", home / "new", data / "test" / "NORMAL")) == 0
    assert evaluate.main(["--from", str(home / "results" / "predictions.csv")]) == 0
    assert split_val.main(["--data-dir", str(data), "--check"]) == 2
    assert "test/NORMAL/\\udcff.jpeg" in capsys.readouterr().out
    tables = ["results/predictions.csv", "results/doubtful_labels.csv", "new/new_predictions.csv"]
    for name in tables:
        text = (home / name).read_text("utf-8")
        assert "/R\\udcf6ntgen " in text, name
    page = (home / "results" / "report.html").read_text("utf-8")
    assert "ntgen" not in page and ".jpeg" not in page  # no file names of images
    assert ">model.pth, tinynet" in page and "rich" not in page
    assert "(test/NORMAL/\\udcff.jpeg)" in warnings


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # utf-16: with its mark
def test_a_table_is_read_with_any_usual_separator_and_encoding(separator, encoding, tmp_path):
    lines = ["name|age|note", 'Müller.png|7|"1,5; 2"', "b.png|8|", ""]
    text = "\r\n".join(lines).replace("|", separator)
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    columns, rows = read_csv(tmp_path / "a.csv", "name")
    assert columns == ["name", "age", "note"]
    assert rows[0] == (2, {"name": "Müller.png", "age": "7", "note": "1,5; 2"})
    assert rows[1] == (3, {"name": "b.png", "age": "8", "note": ""})


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le"])  # the second without its mark
def test_a_table_in_another_encoding_is_refused_with_the_way_to_save_it(encoding, tmp_path):
    (tmp_path / "a.csv").write_bytes("name,age\nMüller.png,7\n".encode(encoding))
    with pytest.raises(Failure, match=r"a\.csv: not a CSV file in UTF-8 .* save it as CSV UTF-8"):
        read_csv(tmp_path / "a.csv", "name")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,id,,id,\na.png,1,,2,\n")
    with pytest.raises(Failure, match="row 1: two columns are called id; rename one of them"):
        read_csv(tmp_path / "a.csv", "name")


def test_a_row_of_empty_cells_is_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("name;id;\na.png;1;\n;;\n\nb.png;2;\n")
    _, rows = read_csv(tmp_path / "a.csv", "name")
    assert [(line, row["name"]) for line, row in rows] == [(2, "a.png"), (5, "b.png")]
