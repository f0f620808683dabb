"""cxr/hashes.py: unchanged files are not read again, and a split reads all of them."""

import os
import time

import faults
import pytest
from faults import put
from helpers import TINY_FAST, run_split

import cxr.hashes
import train
from cxr.files import hash_file
from cxr.folders import CLASSES
from cxr.hashes import Hashes


@pytest.fixture
def count_read(monkeypatch):
    """count_read(): how many files were hashed since the last call."""
    read = []
    monkeypatch.setattr(
        cxr.hashes, "hash_file", lambda path: (read.append(path), hash_file(path))[1]
    )

    def count():
        n = len(read)
        read.clear()
        return n

    return count


def make_old(folder):
    """Sets the time of all files below `folder` to an hour ago."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def test_a_training_reads_only_new_and_changed_files_for_their_hash(
    data, flags, tmp_path, count_read
):
    make_old(data)
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert count_read() == 64
    model = (tmp_path / "model.pth").read_bytes()
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert count_read() == 0 and (tmp_path / "model.pth").read_bytes() == model
    first = faults.first(data / "train")
    os.utime(first)
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert count_read() == 1  # and it is not remembered, because it may change once more
    assert train.main(flags(data, *TINY_FAST, "--no-cache")) == 0
    assert count_read() == 64
    put(tmp_path / "cache" / "hashes.json", b"{damaged")
    assert train.main(flags(data, *TINY_FAST)) == 0
    assert count_read() == 64


def test_a_changed_file_of_the_same_size_has_another_hash(tmp_path):
    path = tmp_path / "a.png"
    put(path, b"one")
    make_old(tmp_path)
    hashes = Hashes(tmp_path)
    assert hashes.hash(path) == hash_file(path)
    hashes.save()
    put(path, b"two")
    assert Hashes(tmp_path).hash(path) == hash_file(path)


def test_two_files_of_one_size_and_time_may_exchange_their_names(tmp_path):
    a, b, between = (tmp_path / name for name in ("a.dcm", "b.dcm", "c.dcm"))
    put(a, b"one")
    put(b, b"two")
    for path in (a, b):
        os.utime(path, ns=(10**18, 10**18))
    hashes = Hashes(tmp_path)
    assert hashes.hash(a) != hashes.hash(b)
    hashes.save()
    for old, new in ((a, between), (b, a), (between, b)):
        old.rename(new)
    hashes = Hashes(tmp_path)
    assert (hashes.hash(a), hashes.hash(b)) == (hash_file(a), hash_file(b))


def test_a_check_does_not_trust_the_time_of_a_file(data, flags, capsys):
    normal, pneumonia = (next((data / "train" / name).iterdir()) for name in CLASSES)
    size = max(len(path.read_bytes()) for path in (normal, pneumonia))
    for path in (normal, pneumonia):
        put(path, path.read_bytes().ljust(size, b"\0"))
    make_old(data)
    assert train.main(flags(data, *TINY_FAST)) == 0
    before = normal.stat()
    put(normal, pneumonia.read_bytes())
    os.utime(normal, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_split(data, "--check") == 2
    assert "the same image is in both classes" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_has_an_empty_hash(tmp_path):
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "absent")
    assert Hashes(tmp_path).hash(link) == ""
