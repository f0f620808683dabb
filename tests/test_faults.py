"""Campaigns of kills, full disks and damaged records: no file is torn, nothing is misread.

A slice of each campaign, or all of it with --fuzz; --fuzz-seed repeats one.
"""

import errno
import os
import shutil
import signal

import faults
import pytest
from faults import damage, files, within
from helpers import linux

PARTS = {
    "model": ("train", "--seed", 5),
    "results": ("evaluate", "--threshold", 0.25),
    "cache": ("train",),
}


@linux
@pytest.mark.parametrize("part", PARTS)
def test_a_kill_or_an_error_at_any_step_of_writing_leaves_each_file_old_or_new(
    part, run_script, start, trained_home, home, tmp_path, fuzz, monkeypatch, say
):
    """At the k-th opening, writing, syncing, renaming: SIGKILL, or an error of the disk."""
    script, *more = PARTS[part]
    monkeypatch.undo()
    faults.plain(monkeypatch.setattr)  # with all pictures

    def restore():
        shutil.rmtree(home)
        shutil.copytree(trained_home, home)
        if part == "cache":
            shutil.rmtree(home / "cache")
        return files(home)

    old = restore()
    with monkeypatch.context() as patch:
        steps = faults.Steps(patch.setattr, home)
        assert run_script(script, *more) == (0, [])
    new = files(home)
    assert new != old and steps.count > 12
    kinds = [(errno.ENOSPC, 4), (errno.EIO, 4), (errno.EACCES, 2), (signal.SIGKILL, -9)]
    cases = [(k, *kind) for k in range(1, steps.count + 1) for kind in kinds]
    cases = fuzz.rng.sample(cases, min(fuzz.count(8, 60), len(cases)))
    for k, number, expected in cases:
        restore()
        if expected == -9:
            child = start(script, more, faults.die_at_step, home, k)
            child.join(60)
            assert child.exitcode == -9, (tmp_path / "log").read_text()
        else:
            with monkeypatch.context() as patch:
                faults.Steps(patch.setattr, home, k, number)
                status, lines = run_script(script, *more)
            assert status == expected and len(lines) == 1, (k, status, lines)
            assert os.strerror(number) in lines[0] and str(home) in lines[0], lines
            assert not [*home.rglob("*.tmp")]
        found = files(home)
        assert all(found.get(name) in (old.get(name), new.get(name)) for name in new | found), k
        if expected == -9:
            if part == "model":  # perhaps between model.pth and model.json
                assert run_script("evaluate") == (0, [])
            assert (
                run_script(script, *more) == (0, [])
                and files(home)["model.pth"] == new["model.pth"]
            )
    say(f"{part}: {len(cases)} of {4 * steps.count} kills and errors tried, no file torn")


@linux
def test_a_real_limit_on_the_size_of_files_is_one_line(start, home, tmp_path):
    old = files(home)
    child = start("train", ["--seed", 5], faults.limit_files, 6000)
    child.join(60)
    assert child.exitcode == 4 and files(home) == old
    line = f"train.py: {home / 'model.pth'}: File too large; free some space"
    assert line in (tmp_path / "log").read_text()


RECORDS = {
    "model.json": "evaluate",
    "data/split_val.json": "train",
    "results/metrics.json": "evaluate",
    "results/predictions.csv": "evaluate",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_refused_by_name_or_harmless(name, fuzz, run_script, home, say):
    assert run_script("split_val", "--undo")[0] == run_script("split_val", "--per-class", 4)[0] == 0
    script, path, more, harmless = RECORDS[name], home / name, [], 0
    if "results" in name:
        more = ["--from", home / "results" / "predictions.csv", "--results-dir", home / "again"]
    assert run_script(script, *more)[0] == 0
    intact, expected, count = path.read_bytes(), files(home), fuzz.count(30, 300)
    odd = [b"", b"{}", b"[]", b"1", b"null", b'"x"', b"[" * 100_000, b'{"checksum": 1}', b"\xff"]
    damaged = [damage(fuzz.rng, intact) for _ in range(count)]
    for how, content in [*((repr(content[:20]), content) for content in odd), *damaged]:
        path.write_bytes(content)
        with within(20):
            status, lines = run_script(script, *more)
        if status:
            assert status == 2 and len(lines) == 1, (how, lines)
            assert str(path) in lines[0] or "both classes" in lines[0], (how, lines)
            continue
        harmless += 1
        path.write_bytes(intact)
        # a CSV file has no checksum, as it may come from elsewhere
        assert "csv" in name or files(home) == expected, how
    say(f"{name}: {len(odd) + count} damaged ones tried, {harmless} harmless, the others refused")
