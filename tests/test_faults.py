"""Faults: full disks, kills, damaged and hostile files, odd folders, signals.

A slice of each campaign, or all of it with --fuzz; --fuzz-seed repeats one.
"""

import contextlib
import errno
import hashlib
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import urllib.error
from argparse import Namespace
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from faults import damage, files, listing, picture, put, within
from phantoms import draw_folder

import common
import cxr.checkpoint
import cxr.files
import cxr.patients
import evaluate
import split_val
import train

TESTS = Path(__file__).parent
SCRIPTS = {"train": train, "evaluate": evaluate, "split_val": split_val}
PICTURES = [(train, "draw_curves"), (train, "draw_samples")]
PICTURES += [(evaluate, "draw_pictures"), (evaluate, "draw_worst")]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# ---------------------------------------------------------------- fixtures


@pytest.fixture
def fuzz(request):
    """fuzz.count(slice, full); fuzz.rng, of the seed and the test's name."""
    on, seed = request.config.option.fuzz, request.config.option.fuzz_seed
    rng = random.Random(f"{seed} {request.node.name}")
    return Namespace(count=lambda small, full: full if on else small, rng=rng)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    faults.plain(monkeypatch.setattr)
    for script, name in PICTURES:
        monkeypatch.setattr(script, name, lambda *_: None)
    monkeypatch.setattr(evaluate, "PICTURES", {})


@pytest.fixture(scope="module", autouse=True)
def server():
    """What faults.start() forks: it imports everything while the first tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS.parent}:{TESTS}")
        faults.start(os.devnull, "train", ["--help"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data (8 train, 4 val, 6 test images a class), model, results and cache."""
    home = tmp_path_factory.mktemp("faults") / "home"
    draw_folder(home / "data", train=12, test=6, size=96)
    for path in sorted(home.glob("data/train/*/*")):
        if int(re.search(r"\d+", path.name)[0]) >= 8:
            put(home / "data" / "val" / path.parent.name / path.name, path.read_bytes())
            path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        faults.plain(patch.setattr)
        assert train.main(flags("train", home)) == evaluate.main(flags("evaluate", home)) == 0
    return home


@pytest.fixture
def home(trained, tmp_path):
    """A fresh copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "home"))


def flags(script, home, *more):
    """A command line on home/data with every output in `home`."""
    argv = ["--data-dir", home / "data"]
    if script != "split_val":
        argv += ["--checkpoint", home / "model.pth", "--results-dir", home / "results"]
        argv += ["--cache-dir", home / "cache", "--device", "cpu", "--workers", 0]
    if script == "train":
        argv += ["--arch", "tinynet", "--weights", "random", "--views", 2, "--epochs", 3]
    return [str(part) for part in (*argv, *more)]


@pytest.fixture
def run(home, capsys):
    """run(script, *flags): (exit status, lines of stderr but for warnings)."""

    def call(script, *more):
        capsys.readouterr()
        try:
            status = SCRIPTS[script].main(flags(script, home, *more))
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if not line.startswith("warning: ")]

    return call


@pytest.fixture
def refused(run):
    """refused(status, script, *flags): the one line of stderr, after that exit status."""

    def call(expected, script, *more):
        status, lines = run(script, *more)
        assert status == expected and len(lines) == 1 and len(lines[0]) < 900, (status, lines)
        return lines[0]

    return call


@pytest.fixture
def start(home, tmp_path):
    """start(script, flags, prepare, *args): a process, see faults.start; its log is `log`."""
    children = []

    def call(script, more, prepare=None, *args):
        argv = flags(script, home, *more)
        children.append(faults.start(tmp_path / "log", script, argv, prepare, *args))
        return children[-1]

    yield call
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


# ---------------------------------------------------------------- files written


PARTS = {
    "model": ("train", "--seed", 5),
    "results": ("evaluate", "--threshold", 0.25),
    "cache": ("train",),
}


@linux
@pytest.mark.parametrize("part", PARTS)
def test_a_kill_or_an_error_at_any_step_of_writing_leaves_each_file_old_or_new(
    part, run, start, trained, home, tmp_path, fuzz, monkeypatch, say
):
    """At the k-th opening, writing, syncing, renaming: SIGKILL, or an error of the disk."""
    script, *more = PARTS[part]
    monkeypatch.undo()
    faults.plain(monkeypatch.setattr)  # with all pictures

    def restore():
        shutil.rmtree(home)
        shutil.copytree(trained, home)
        if part == "cache":
            shutil.rmtree(home / "cache")
        return files(home)

    old = restore()
    with monkeypatch.context() as patch:
        steps = faults.Steps(patch.setattr, home)
        assert run(script, *more) == (0, [])
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
                status, lines = run(script, *more)
            assert status == expected and len(lines) == 1, (k, status, lines)
            assert os.strerror(number) in lines[0] and str(home) in lines[0], lines
            assert not [*home.rglob("*.tmp")]
        found = files(home)
        assert all(found.get(name) in (old.get(name), new.get(name)) for name in new | found), k
        if expected == -9:
            if part == "model":  # perhaps between model.pth and model.json
                assert run("evaluate") == (0, [])
            assert run(script, *more) == (0, []) and files(home)["model.pth"] == new["model.pth"]
    say(f"{part}: {len(cases)} of {4 * steps.count} kills and errors tried, no file torn")


def test_a_folder_that_cannot_be_synced_is_no_error(run, monkeypatch):
    true = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        true(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run("train") == run("evaluate") == (0, [])


@linux
def test_a_real_limit_on_the_size_of_files_is_one_line(start, home, tmp_path):
    old = files(home)
    child = start("train", ["--seed", 5], faults.limit_files, 6000)
    child.join(60)
    assert child.exitcode == 4 and files(home) == old
    line = f"train.py: {home / 'model.pth'}: File too large; free some space"
    assert line in (tmp_path / "log").read_text()


def test_an_output_that_cannot_be_written_is_told_before_the_work(refused, home, monkeypatch):
    put(home / "file", b"")
    (home / "folder.pth").mkdir()
    monkeypatch.setattr(common, "extract_features", None)  # the work
    for script, flag, path in (
        ("train", "--results-dir", "file"),
        ("train", "--checkpoint", "file/model.pth"),
        ("train", "--checkpoint", "folder.pth"),
        ("evaluate", "--results-dir", "file/results"),
        ("evaluate", "--cam", "file"),
    ):
        line = refused(2, script, flag, home / path)
        assert f"{home / path}" in line or f"{home / path}".rpartition("/")[0] + ": " in line

    def denied(dir=None, **_):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/trial")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    for script in ("train", "evaluate"):
        line = refused(2, script)
        assert str(home) in line and "trial" not in line and "Permission denied" in line


# ---------------------------------------------------------------- checkpoints


def test_a_damaged_checkpoint_is_refused_or_harmless(fuzz, run, home, say):
    path, table, count, harmless = home / "model.pth", "predictions.csv", fuzz.count(100, 1000), 0
    intact, expected = path.read_bytes(), faults.columns((home / "results" / table).read_bytes())
    start = intact.index(b"data.pkl") + 8
    stop = intact.index(b"PK", start)
    for i in range(count):
        how, content = damage(fuzz.rng, intact)
        if i % 4 == 0:  # in the pickle, whatever else the file holds
            how, part = damage(fuzz.rng, intact[start:stop])
            content = intact[:start] + part + intact[stop:]
        path.write_bytes(content)
        (home / "results" / table).unlink(missing_ok=True)
        with within(20):
            status, lines = run("evaluate")
        if status:
            assert status == 2 and len(lines) == 1 and f"{path}: " in lines[0], (how, lines)
        else:
            found = faults.columns((home / "results" / table).read_bytes())
            assert found == expected, how
            harmless += 1
    assert harmless < count / 5
    say(f"checkpoints: {count} damaged ones tried, {harmless} bit-equal, the others refused")


@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_checkpoint_is_ever_code(variable, refused, home, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "1")
    proof, path = home / "executed", home / "hostile.pth"
    for name, content in faults.hostile(proof).items():
        path.write_bytes(content)
        for script, flag in (("train", "--weights"), ("evaluate", "--checkpoint")):
            line = refused(2, script, flag, path)
            assert f"{path}: not a readable checkpoint" in line and "weights_only" not in line
        assert not proof.exists(), name
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(faults.hostile(proof)["zip"]), weights_only=False)
    assert proof.exists()  # they are hostile indeed


@pytest.mark.filterwarnings("ignore")
def test_an_absurd_checkpoint_is_one_line_and_2(refused, home):
    path = home / "model.pth"
    contents = {"html": b"<!DOCTYPE html><p>404", "nothing": b"", "text": b"weights\n"}
    for name, content in faults.absurd(torch.load(path, weights_only=True)).items():
        contents[name] = faults.saved(content)
    for name, content in contents.items():
        path.write_bytes(content)
        with within(20):
            assert f"{path}: " in refused(2, "evaluate"), name
    for missing in (home, home / "nowhere.pth"):
        assert f"{missing}: no such file" in refused(2, "train", "--weights", missing)


def test_the_version_of_torch_is_one_without_known_holes():
    text = (TESTS.parent / "requirements.txt").read_text()
    found = re.search(r"^torch>=(\d+)\.(\d+)$", text, re.M)
    assert tuple(map(int, found.groups())) >= (2, 10)  # CVE-2025-32434, CVE-2026-24747


# ---------------------------------------------------------------- records and the cache


RECORDS = {
    "model.json": "evaluate",
    "data/split_val.json": "train",
    "results/metrics.json": "evaluate",
    "results/predictions.csv": "evaluate",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_refused_by_name_or_harmless(name, fuzz, run, home, say):
    assert run("split_val", "--undo")[0] == run("split_val", "--per-class", 4)[0] == 0
    script, path, more, harmless = RECORDS[name], home / name, [], 0
    if "results" in name:
        more = ["--from", home / "results" / "predictions.csv", "--results-dir", home / "again"]
    assert run(script, *more)[0] == 0
    intact, expected, count = path.read_bytes(), files(home), fuzz.count(30, 300)
    odd = [b"", b"{}", b"[]", b"1", b"null", b'"x"', b"[" * 100_000, b'{"checksum": 1}', b"\xff"]
    damaged = [damage(fuzz.rng, intact) for _ in range(count)]
    for how, content in [*((repr(content[:20]), content) for content in odd), *damaged]:
        path.write_bytes(content)
        with within(20):
            status, lines = run(script, *more)
        if status:
            assert status == 2 and len(lines) == 1, (how, lines)
            assert str(path) in lines[0] or "both classes" in lines[0], (how, lines)
            continue
        harmless += 1
        path.write_bytes(intact)
        # a CSV file has no checksum, as it may come from elsewhere
        assert "csv" in name or files(home) == expected, how
    say(f"{name}: {len(odd) + count} damaged ones tried, {harmless} harmless, the others refused")


def test_what_is_damaged_in_the_cache_is_computed_again_bit_for_bit(fuzz, home, capsys, say):
    digests = {cxr.files.hash_file(path) for path in home.glob("data/train/*/*")}
    paths = [path for path in (home / "cache").glob("*/*") if path.stem in digests]
    expected, count, said = (home / "model.pth").read_bytes(), fuzz.count(40, 400), 0
    for _ in range(count):
        path = fuzz.rng.choice(paths)
        intact = path.read_bytes()
        how, content = damage(fuzz.rng, intact)
        path.write_bytes(content)
        assert train.main(flags("train", home)) == 0, how
        assert (home / "model.pth").read_bytes() == expected, how
        said += f"warning: {path}: computed again" in capsys.readouterr().err
        path.write_bytes(intact)
    assert said > count / 2
    say(f"cache: {count} damaged files tried, {said} said, every model bit-equal")


# ---------------------------------------------------------------- the ImageNet weights


@pytest.fixture
def published(tmp_path, monkeypatch):
    """ImageNet weights of the tiny network: .source to download, .path in the cache, .url."""
    content = faults.saved(common.build_backbone("tinynet").network.state_dict())
    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    source, path = tmp_path / name, tmp_path / "torch" / "hub" / "checkpoints" / name
    put(source, content)
    weights = Namespace(DEFAULT=Namespace(url=source.as_uri()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(cxr.checkpoint, "get_model_weights", lambda arch: weights)
    return Namespace(source=source, path=path, url=source.as_uri())


def test_cached_weights_that_are_not_the_published_ones_are_refused(refused, run, home, published):
    content, path, imagenet = published.source.read_bytes(), published.path, "--weights=imagenet"
    assert run("train", imagenet) == (0, []) and path.read_bytes() == content
    for bad in (b"", content[:-1], b"x" + content[1:], faults.hostile(home / "x")["zip"]):
        path.write_bytes(bad)
        line = refused(2, "train", imagenet)
        assert f"{path}: " in line and "SHA-256" in line and "--weights FILE" in line
        assert path.read_bytes() == bad and not (home / "x").exists()


def test_a_cached_resnet50_of_other_weights_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    put(path, faults.saved({"fc.bias": torch.zeros(1000)}))
    line = refused(2, "train", "--weights", "imagenet", "--arch", "resnet50")
    assert f"{path}: " in line and "SHA-256" in line


HTTP = partial(urllib.error.HTTPError, "http://127.0.0.1:9", hdrs={}, fp=None)
DOWNLOADS = {
    "no such host": (urllib.error.URLError("Name or service not known"), 2),
    "404": (HTTP(code=404, msg="Not Found"), 2),
    "503": (HTTP(code=503, msg="Service Unavailable"), 2),
    "stalled": (TimeoutError("timed out"), 2),
    "cut": (http.client.IncompleteRead(b"half", 9), 2),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 4),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_that_fails_names_the_address_the_file_and_the_flag(
    name, refused, published, monkeypatch
):
    error, status = DOWNLOADS[name]

    def download(*_, **__):
        assert 0 < socket.getdefaulttimeout() <= 30  # a server that stalls would hang for ever
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    line = refused(status, "train", "--weights", "imagenet")
    assert all(part in line for part in (published.url, str(published.path), "--weights FILE"))
    assert socket.getdefaulttimeout() is None


def test_another_file_at_the_address_is_not_kept(refused, published):
    published.source.write_bytes(b"<html>Sign in to this network")
    assert published.url in refused(2, "train", "--weights", "imagenet")
    assert not [*published.path.parent.iterdir()]


def test_evaluate_never_asks_the_network(run, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert run("evaluate", "--no-cache") == (0, [])


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("name", faults.BAD_IMAGES)
def test_a_bad_image_is_told_with_its_path_by_every_script(name, refused, home):
    file, content, reason = faults.BAD_IMAGES[name]
    for script, split in (("train", "train"), ("evaluate", "test")):
        path = home / "data" / split / "NORMAL" / file
        put(path, content)
        before = listing(home / "data")
        with within(20):
            line = refused(2, script)
        assert f"{path}: " in line and reason in line and "--skip-bad" in line, line
        assert listing(home / "data") == before
    line, table = refused(2, "evaluate", path), home / "results" / "new_predictions.csv"
    assert f"{path}: " in line or reason in table.read_text()


def test_bad_images_are_all_named_and_left_out_only_when_asked(run, home, capsys):
    bad = {"train": [], "test": []}
    for i, (file, content, _) in enumerate(faults.BAD_IMAGES.values()):
        for split, paths in bad.items():
            paths.append(home / "data" / split / "NORMAL" / f"bad{i}{file}")
            put(paths[-1], content)
    for script, split in (("train", "train"), ("evaluate", "test")):
        status, lines = run(script)
        assert status == 2 and len(lines) == 5
        assert f"(and {len(bad[split]) - 1} more; split_val.py --check lists all)" in lines[-1]
        assert SCRIPTS[script].main(flags(script, home, "--skip-bad")) == 0
        errors = capsys.readouterr().err
        assert sum(f"left out: {path}: " in errors for path in bad[split]) == 5
        assert f"left out: {len(bad[split])} images in all" in errors
    names = sorted(str(path.relative_to(home / "data")) for path in bad["train"])
    assert sorted(json.loads((home / "model.json").read_text())["skipped"]) == names
    report = json.loads((home / "results" / "metrics.json").read_text())
    assert report["unreadable"] == len(names) and report["n"] == 12


def test_a_damaged_image_is_read_or_explained_whatever_its_format(fuzz, tmp_path, say):
    kinds = [{"form": form} for form in ("jpeg", "png", "tiff", "webp", "bmp", "ppm")]
    kinds += [{"form": "jpeg", "progressive": True}, {"form": "png", "mode": "I;16"}]
    kinds += [{"form": "tiff", "compression": "tiff_lzw"}, {"form": "webp", "lossless": True}]
    sources, count, explained = [picture(**kind) for kind in kinds], fuzz.count(200, 4000), 0
    path = tmp_path / "x.png"
    for i in range(count):
        how, content = damage(fuzz.rng, sources[i % len(sources)])
        path.write_bytes(content)
        with within(20):
            item = common.Views([cxr.patients.Xray(path, 0, cxr.files.hash_file(path))], 3, 2)[0]
        how = kinds[i % len(sources)], how, item[2]
        assert item[1].shape == (3, 1, 224, 224) and len(item[2]) <= 200, how
        assert "\n" not in item[2], how
        explained += bool(item[2])
    assert 0 < explained < count
    say(f"images: {count} damaged ones tried, {explained} explained, the others decoded")


def test_an_image_that_changes_during_the_run_is_never_kept_as_the_old_one(
    refused, home, monkeypatch
):
    path, true = faults.first(home / "data" / "train"), train.read_split
    digest = cxr.files.hash_file(path)

    def read_split(*args):
        found = true(*args)
        path.write_bytes(picture(form="jpeg"))
        return found

    monkeypatch.setattr(train, "read_split", read_split)
    shutil.rmtree(home / "cache")
    line = refused(2, "train")
    assert f"{path}: its content changed" in line and not [*home.rglob(f"{digest}*")]


# ---------------------------------------------------------------- folders


def test_all_that_may_be_in_a_folder_is_used_or_ignored(run, home):
    data = home / "data"
    added = faults.add_all_that_may_be(data / "test")
    assert run("evaluate") == (0, [])
    assert json.loads((home / "results" / "metrics.json").read_text())["n"] == 12 + added
    shutil.rmtree(data / "test")
    faults.add_all_that_may_be(data / "train")
    before = listing(data)
    assert run("split_val", "--check") == run("train") == (0, [])
    assert len(cxr.files.read_json(home / "model.json")["images"]["train"]) == 16 + added
    assert listing(data) == before
    shutil.rmtree(data / "val")
    before = sorted(files(data).values())
    assert run("split_val", "--per-class", 3) == (0, [])
    (data / "split_val.json").unlink()
    assert sorted(files(data).values()) == before


@pytest.mark.parametrize("name", faults.BAD_FOLDERS)
def test_an_odd_folder_is_refused_by_every_script_and_left_as_it_is(name, refused, home):
    change, text = faults.BAD_FOLDERS[name]
    data = home / "data"
    change(data / "test")
    change(data / "train")
    for script, *more in (("evaluate",), ("train",), ("split_val", "--check"), ("split_val",)):
        if (script, *more) == ("split_val",):
            shutil.rmtree(data / "val")
        before = listing(data)
        line = refused(2, script, *more)
        assert (text in line and str(data) in line) or more, line  # --check may print a page
        assert listing(data) == before, script


def test_one_file_in_two_places_is_refused_or_told(refused, home, capsys):
    image = faults.first(home / "data" / "train").read_bytes()
    put(home / "data" / "test" / "NORMAL" / "copy.jpeg", image)
    assert evaluate.main(flags("evaluate", home)) == 0
    assert "WERE AMONG THE TRAINING OR VALIDATION IMAGES" in capsys.readouterr().err
    refused(2, "split_val", "--check")
    for place in ("val/NORMAL", "val/PNEUMONIA", "train/PNEUMONIA"):
        path = home / "data" / place / "copy.jpeg"
        put(path, image)
        assert str(path.parent) in refused(2, "train")
        path.unlink()


def test_no_data_folder_and_a_file_in_its_place(refused, home):
    put(home / "file", b"")
    for path in (home / "nowhere", home / "file"):
        for script in SCRIPTS:
            assert str(path) in refused(2, script, "--data-dir", path)


# ---------------------------------------------------------------- signals, processes, memory


MOMENTS = [("train", "Epoch [20/"), ("train", "in the pass"), ("evaluate", "in the pass")]


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("script", "moment"), MOMENTS)
def test_a_signal_ends_a_script_in_one_line_and_keeps_what_was_there(
    script, moment, number, fuzz, start, home, tmp_path
):
    """To the whole group, as a terminal and a batch system send it."""
    log, old = tmp_path / "log", listing(home)
    more = ["--no-cache", "--workers", 2, "--batch-size", 1]
    more += ["--epochs", 10**6, "--patience", 0] if script == "train" else []
    for _ in range(fuzz.count(1, 5)):
        log.unlink(missing_ok=True)
        child = start(script, more, faults.slow_down if "pass" in moment else None)
        faults.wait_for(moment, log)
        time.sleep(fuzz.rng.uniform(0, 0.3))
        os.killpg(child.pid, number)
        child.join(20)
        faults.wait_for_end(child.pid)
        text = log.read_text()
        lines = [line for line in text.splitlines() if line.startswith(f"{script}.py: interrupted")]
        assert "Traceback" not in text, text
        if number == signal.SIGKILL or "pass" in moment:
            assert listing(home) == old and not [*home.rglob("*.tmp")]
        if number == signal.SIGKILL:
            continue
        assert child.exitcode == 128 + number and len(lines) == 1, text
        if "pass" not in moment:
            assert "kept the best so far" in lines[0] and f"{home / 'model.pth'}" in lines[0]
            about = cxr.files.read_json(home / "model.json")
            assert about["sha256"] == cxr.files.hash_file(home / "model.pth")
            history = (home / "results" / "history.csv").read_text().splitlines()[1:]
            losses = [float(line.split(",")[3]) for line in history]
            assert about["val_loss"] in (min(losses), min(losses[:-1]))  # the last was cut short


def test_a_decoding_process_that_dies_is_one_line(refused, home):
    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        children[0].kill()

    old = listing(home)
    threading.Thread(target=kill, daemon=True).start()
    with within(60):
        assert "--workers 0" in refused(4, "train", "--workers", 1, "--no-cache")
    assert listing(home) == old


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_full_memory_names_the_flag_that_helps(error, refused, home, monkeypatch):
    def forward(*_):
        raise error("out of memory")

    monkeypatch.setattr(type(common.get_model("tinynet")), "forward", forward)
    old = listing(home)
    for script in ("train", "evaluate"):
        assert "--batch-size" in refused(4, script, "--no-cache")
    assert listing(home) == old
