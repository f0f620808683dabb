"""cxr/files.py: files are written whole or not at all, and records are checked."""

import contextlib
import errno
import os
import stat
import tempfile

import pytest
from faults import put

import common
from cxr.errors import Failure
from cxr.files import atomic_write, read_json, write_json


def test_json_that_was_changed_or_comes_from_elsewhere_is_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"threshold": 0.5, "images": {"a": "b"}})
    assert read_json(path) == {"threshold": 0.5, "images": {"a": "b"}}
    for text in (path.read_text().replace("0.5", "0.6"), '{"threshold": 0.5}', "[]", "", "\0"):
        path.write_text(text)
        with pytest.raises(Failure, match=r"a\.json"):
            read_json(path)


def test_a_written_file_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with contextlib.suppress(KeyError), atomic_write(path, "w") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "link.txt").symlink_to(path)
    with atomic_write(tmp_path / "link.txt", "w") as file:
        file.write("new")
    assert path.read_text() == "new" and (tmp_path / "link.txt").is_symlink()


def test_a_folder_that_cannot_be_synced_is_no_error(run_script, monkeypatch):
    true = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        true(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run_script("train") == run_script("evaluate") == (0, [])


@pytest.mark.parametrize(
    ("script", "flag", "path"),
    [
        ("train", "--results-dir", "file"),
        ("train", "--checkpoint", "file/model.pth"),
        ("train", "--checkpoint", "folder.pth"),
        ("evaluate", "--results-dir", "file/results"),
        ("evaluate", "--cam", "file"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    script, flag, path, refused, home, monkeypatch
):
    put(home / "file", b"")
    (home / "folder.pth").mkdir()
    monkeypatch.setattr(common, "extract_features", None)  # the work
    line = refused(2, script, flag, home / path)
    assert f"{home / path}" in line or f"{home / path}".rpartition("/")[0] + ": " in line


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_an_output_folder_without_permission_is_told_before_the_work(
    script, refused, home, monkeypatch
):
    def denied(dir=None, **_):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/trial")

    monkeypatch.setattr(common, "extract_features", None)  # the work
    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    line = refused(2, script)
    assert str(home) in line and "trial" not in line and "Permission denied" in line
