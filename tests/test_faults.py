"""Kills, full disks and damaged records: each file is complete, and nothing is misread.

The tests try a sample of the cases, or all of them with --fuzz. --fuzz-seed repeats a sample.
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
FAULTS = [(errno.ENOSPC, 4), (errno.EIO, 4), (errno.EACCES, 2), (signal.SIGKILL, -9)]


def is_dispensable(path, number):
    """Returns True if a run goes on without this file: hashes, and all of a read-only cache."""
    return "hashes.json" in path or (number == errno.EACCES and "/cache/" in path)


@linux
@pytest.mark.parametrize("part", PARTS)
def test_a_kill_or_an_error_at_any_step_of_writing_leaves_each_file_old_or_new(
    part, run_script, start, trained_home, home, tmp_path, fuzz, monkeypatch, say
):
    script, *flags = PARTS[part]
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
        assert run_script(script, *flags) == (0, [])
    new = files(home)
    assert new != old and steps.count > 12
    cases = [(k, *fault) for k in range(1, steps.count + 1) for fault in FAULTS]
    cases = fuzz.rng.sample(cases, min(fuzz.count(8, 60), len(cases)))
    for k, number, expected in cases:
        restore()
        if number == signal.SIGKILL:
            process = start(script, flags, faults.die_at_step, home, k)
            process.join(60)
            assert process.exitcode == expected, (tmp_path / "log").read_text()
        else:
            with monkeypatch.context() as patch:
                steps = faults.Steps(patch.setattr, home, k, number)
                status, lines = run_script(script, *flags)
            if is_dispensable(steps.path, number):
                assert (status, lines) == (0, []), (k, steps.path)
            else:
                assert status == expected and len(lines) == 1, (k, status, lines)
                assert os.strerror(number) in lines[0] and str(home) in lines[0], lines
            assert not [*home.rglob("*.tmp")]
        now = files(home)
        assert all(now.get(name) in (old.get(name), new.get(name)) for name in new | now), k
        if number == signal.SIGKILL:
            if part == "model":  # perhaps it was killed between model.pth and model.json
                assert run_script("evaluate") == (0, [])
            assert run_script(script, *flags) == (0, [])
            assert files(home)["model.pth"] == new["model.pth"]
    say(f"{part}: {len(cases)} of {4 * steps.count} kills and errors tried, each file complete")


@linux
def test_a_limit_on_the_size_of_files_is_one_line(start, home, tmp_path):
    before = files(home)
    process = start("train", ["--seed", 5], faults.limit_files, 6000)
    process.join(60)
    assert process.exitcode == 4 and files(home) == before
    line = (tmp_path / "log").read_text().splitlines()[-1]
    kept = home / "model.previous.pth"  # written first
    assert line.startswith(f"train.py: {kept}: File too large; free some disk space")


@pytest.mark.parametrize(
    "name", ["model.json", "data/split_val.json", "results/metrics.json", "results/predictions.csv"]
)
def test_a_damaged_record_is_refused_by_name_or_harmless(name, fuzz, run_script, home, say):
    assert run_script("split_val", "--undo")[0] == run_script("split_val", "--per-class", 4)[0] == 0
    script, path, flags, n_harmless = "evaluate", home / name, [], 0
    if "split" in name:
        script = "train"
    if "results" in name:
        flags = ["--from", home / "results" / "predictions.csv", "--results-dir", home / "again"]
    assert run_script(script, *flags)[0] == 0
    intact, expected = path.read_bytes(), files(home)
    odd = [b"", b"{}", b"[]", b"1", b"null", b'"x"', b"[" * 100_000, b'{"checksum": 1}', b"\xff"]
    cases = [(repr(content[:20]), content) for content in odd]
    cases += [damage(fuzz.rng, intact) for _ in range(fuzz.count(30, 300))]
    for how, content in cases:
        path.write_bytes(content)
        with within(20):
            status, lines = run_script(script, *flags)
        if status:
            assert status == 2 and len(lines) == 1, (how, lines)
            assert str(path) in lines[0] or "both classes" in lines[0], (how, lines)
            continue
        n_harmless += 1
        path.write_bytes(intact)
        # A CSV file has no checksum, because other programs may write it.
        assert "csv" in name or files(home) == expected, how
    say(f"{name}: {len(cases)} damaged ones tried, {n_harmless} harmless, the others refused")
