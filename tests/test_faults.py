"""Faults: full disks, kills, damaged and hostile files, odd folders, signals. A slice of each, or all with --fuzz."""

import builtins
import contextlib
import errno
import http.server
import inspect
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
import torchvision
from faults import ROOT, Touch, damage, listing, within
from guards import GUARDS
from phantoms import draw_folder
from PIL import Image

import common
import evaluate
import split_val
import train

SCRIPTS = {"train": train, "evaluate": evaluate, "split_val": split_val}


# ---------------------------------------------------------------- fixtures


@pytest.fixture
def fuzz(request):
    """fuzz.count(slice, full), fuzz.rng: of the seed and the test's name."""
    on, seed = request.config.option.fuzz, request.config.option.fuzz_seed
    return Namespace(
        on=on, count=lambda small, full: full if on else small, rng=random.Random(f"{seed} {request.node.name}")
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A split data folder of phantoms, 8 train, 4 val and 6 test images a class; not to be changed."""
    folder = tmp_path_factory.mktemp("faults") / "data"
    draw_folder(folder, train=12, test=6, size=128)
    assert split_val.main(["--data-dir", str(folder), "--per-class", "4"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder with a trained tiny model, its results and the feature store; not to be changed."""
    home = tmp_path_factory.mktemp("trained")
    assert train.main(flags("train", data, home)) == 0
    assert evaluate.main(flags("evaluate", data, home)) == 0
    return home


@pytest.fixture
def home(trained, tmp_path):
    """A fresh copy of `trained`."""
    return Path(shutil.copytree(trained, tmp_path / "home"))


@pytest.fixture
def folder(data, tmp_path):
    """A fresh copy of `data`."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture(scope="module")
def zygote():
    process = faults.Zygote()
    yield process
    process.close()


def flags(script, data, home, *more):
    """The command line of a script on `data` with its outputs in `home`: small, and the same every time."""
    paths = ["--data-dir", data, "--checkpoint", home / "model.pth", "--results-dir", home / "results"]
    paths += ["--cache-dir", home / "cache", "--device", "cpu", "--workers", 0]
    own = {
        "train": [*paths, "--arch", "tiny_faults", "--weights", "random", "--views", 2, "--epochs", 3],
        "evaluate": paths,
        "split_val": ["--data-dir", data, "--check"],
    }
    return [str(part) for part in (*own[script], *more)]


@pytest.fixture
def run(capsys):
    """run(script, data, home, *flags): (exit status, lines of stderr that are no warnings); in process, as a user."""

    def call(script, data, home, *more):
        capsys.readouterr()
        try:
            status = SCRIPTS[script].main(flags(script, data, home, *more))
        except SystemExit as stop:
            status = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        return status, lines

    return call


@pytest.fixture
def plain(monkeypatch):
    """Scripts without pictures and long statistics, for the campaigns that call them hundreds of times."""
    monkeypatch.setattr(evaluate, "PICTURES", {})
    for script, name in ((evaluate, "draw_worst"), (train, "draw_curves"), (train, "draw_samples")):
        monkeypatch.setattr(script, name, lambda *_: None)
    monkeypatch.setattr(split_val, "find_shift", lambda *_: [])
    monkeypatch.setattr(evaluate, "DRAWS", 100)


def numbers(home):
    """What metrics.json says of the images and the model, without what differs between two same runs."""
    report = json.loads((home / "results" / "metrics.json").read_text())
    return {key: report[key] for key in ("n", "threshold", "counts", "metrics", "calibration", "model", "warnings")}


# ---------------------------------------------------------------- files written


def test_files_are_whole_after_a_kill_at_any_moment_of_saving(zygote, fuzz, tmp_path, say):
    """SIGKILL at random moments of a process that saves all the time; the next one finds and leaves no temporary."""
    results, pid = tmp_path / "results", None
    results.mkdir()
    torn = 0
    for kill in range(fuzz.count(8, 100)):
        before = (tmp_path / "model.json").read_bytes() if kill else b""
        pid = zygote.start("faults:save_for_ever", [tmp_path], tmp_path / "log")
        deadline = time.time() + 60
        while time.time() < deadline and not (results / "curves.png").exists():
            time.sleep(0.01)
        while (tmp_path / "model.json").read_bytes() == before:
            time.sleep(0.01)
        time.sleep(fuzz.rng.uniform(0, 0.6))
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) == -signal.SIGKILL
        assert not (tmp_path / "log").read_text()
        state = common.read_state(tmp_path / "model.pth")
        assert state["fc.weight"].unique().tolist() == state["fc.bias"].tolist()
        about = common.read_json(tmp_path / "model.json", {"epoch": int, "sha256": str})
        matches = about["sha256"] == common.hash_file(tmp_path / "model.pth")
        assert (state["fc.bias"].item() == about["epoch"]) == matches
        torn += not matches  # between the two files: evaluate.py says that the one does not belong to the other
        common.read_json(results / "metrics.json", {"n": int})
        assert len(evaluate.read_predictions(results / "predictions.csv").probs) == 200
        rows = (results / "history.csv").read_text().splitlines()
        assert len(rows) == 3 and rows[1] == rows[2]
        Image.open(results / "curves.png").load()
        left = [path.name.rsplit(".", 2)[0] for path in tmp_path.rglob("*.tmp")]
        assert len(left) == len(set(left))  # the next writing of a file removes what a kill left of the last one
    pid = zygote.start("faults:save_for_ever", [tmp_path], tmp_path / "log")
    time.sleep(0.1)
    stamps = [path.stat().st_ino for path in (tmp_path / "model.pth", results / "curves.png")]
    while [path.stat().st_ino for path in (tmp_path / "model.pth", results / "curves.png")][1] == stamps[1]:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    zygote.wait(pid)
    assert not [path for path in tmp_path.rglob("*.tmp") if str(pid) not in path.name]
    say(f"{kill + 1} kills, {torn} between model.pth and model.json, 0 files lost")


class Disk:
    """Fails the k-th of all opens, writes, fsyncs and replaces that common.py asks for; `lasting`: and all after it."""

    def __init__(self, monkeypatch, k, number, lasting=False):
        self.k, self.number, self.lasting, self.calls = k, number, lasting, 0
        disk = self

        class Raw(io.FileIO):
            def write(self, block):
                disk.step("write", lambda: super(Raw, self).write(bytes(block)[: len(block) // 2]))
                return super().write(block)

        def open_(path, mode="r", buffering=-1, **options):
            if not set(mode) & set("wax"):
                return builtins.open(path, mode, buffering, **options)
            disk.step(f"open {path}")
            raw = Raw(path, mode.replace("b", ""))
            if not buffering:
                return raw
            return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), **options)

        monkeypatch.setattr(common, "open", open_, raising=False)
        for name in ("fsync", "replace"):
            true = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *args, name=name, true=true: (disk.step(f"{name} {args}"), true(*args))[1]
            )

    def step(self, what, before=lambda: None):
        self.calls += 1
        if self.calls == self.k or (self.lasting and self.calls > self.k):
            before()
            raise OSError(self.number, os.strerror(self.number))


OUTPUTS = {
    "train": ("model.pth", "model.json", "results/history.csv", "results/curves.png", "results/samples.png"),
    "evaluate": ("results/predictions.csv", "results/metrics.json", "results/roc.png", "results/worst.png"),
}


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_an_error_at_any_step_of_writing_leaves_old_or_new_files(script, run, data, home, fuzz, monkeypatch, say):
    """ENOSPC, EIO and EACCES at each open, write, fsync and replace in turn, until a run passes without."""
    monkeypatch.setattr(evaluate, "PICTURES", {"roc": evaluate.draw_roc})
    monkeypatch.setattr(evaluate, "DRAWS", 100)
    old = {name: (home / name).read_bytes() for name in OUTPUTS[script]}
    more = ["--seed", 5] if script == "train" else ["--threshold", 0.25]
    with monkeypatch.context() as patch:
        disk = Disk(patch, 0, 0)
        assert run(script, data, home, *more)[0] == 0
    total, new = disk.calls, {name: (home / name).read_bytes() for name in OUTPUTS[script]}
    assert new["results/predictions.csv" if script == "evaluate" else "model.pth"] != next(iter(old.values()))
    kinds = [(errno.ENOSPC, True, 4), (errno.EIO, False, 4), (errno.EACCES, False, 2), (errno.ENOSPC, False, 4)]
    cases = [(k, kind) for k in range(1, total + 1) for kind in kinds]
    for k, (number, lasting, expected) in cases if fuzz.on else fuzz.rng.sample(cases, 8):
        for name, content in old.items():
            (home / name).write_bytes(content)
        with monkeypatch.context() as patch:
            disk = Disk(patch, k, number, lasting)
            status, lines = run(script, data, home, *more)
        assert disk.calls >= k and status == expected and len(lines) == 1, (k, lines)
        assert str(home) in lines[0] and os.strerror(number) in lines[0], lines
        assert not [*home.rglob("*.tmp")]
        for name, content in old.items():
            found = (home / name).read_bytes()
            if name.endswith("json") and found != content:  # the date in it is of this run
                found = new[name] if common.read_json(home / name, {}) else b""
            assert found in (content, new[name]), (k, name)
    assert run(script, data, home, *more)[0] == 0
    say(f"{script}: {total} steps, {len(cases) if fuzz.on else 8} errors injected")


def test_a_file_is_on_disk_before_it_takes_its_name_and_dead_leftovers_go(tmp_path, monkeypatch):
    steps, living = [], tmp_path / f".model.json.{os.getppid()}.tmp"
    for path in (living, tmp_path / ".model.json.4194305.tmp", tmp_path / ".model.pth.4194305.tmp"):
        path.write_text("half")
    for name in ("fsync", "replace"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (steps.append(name), true(*args)))
    common.write_json(tmp_path / "model.json", {"a": 1})
    assert steps == ["fsync", "replace", "fsync"]
    assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / ".model.pth.4194305.tmp", tmp_path / "model.json"])
    assert common.read_json(tmp_path / "model.json", {"a": int}) == {"a": 1}


def test_a_real_limit_on_the_size_of_files_is_one_line(zygote, data, home, tmp_path):
    pid = zygote.start("faults:small_files", flags("train", data, home), tmp_path / "log")
    assert zygote.wait(pid) == 4
    error = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("faults.py: ")]
    assert len(error) == 1 and f"{home / 'model.pth'}: File too large" in error[0]
    common.read_state(home / "model.pth")
    assert not [*home.rglob("*.tmp")]


def test_a_full_disk_is_told_before_the_work_with_path_and_bytes(run, data, home, monkeypatch):
    before = listing(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=1000))
    status, lines = run("train", data, home)
    assert status == 4 and len(lines) == 1 and re.search(rf"{home}: [\d,]+ bytes needed, 1,000 free", lines[0])
    assert listing(home) == before


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(script, run, data, home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    for flag, path, text in (
        ("--results-dir", tmp_path / "file", "file"),
        ("--results-dir", tmp_path / "file" / "results", "Not a directory"),
        ("--checkpoint", Path("/dev/null"), "expected a"),
        ("--checkpoint", data, "expected a"),
    ):
        monkeypatch.setattr(common, "extract_features", None)  # the work
        status, lines = run(script, data, home, flag, path)
        assert status == 2 and len(lines) == 1 and text in lines[0] and str(path.name) in lines[0], lines
    denied = PermissionError(errno.EACCES, "Permission denied", str(home / "results"))
    monkeypatch.setattr(common.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(denied))
    status, lines = run(script, data, home)
    place = home if script == "train" else home / "results"
    assert status == 2 and len(lines) == 1 and f"{place}: Permission denied; change" in lines[0], lines
    assert "--results-dir" in lines[0]


def test_maps_never_land_among_images(run, folder, home, tmp_path):
    scans = Path(shutil.copytree(folder / "test" / "NORMAL", tmp_path / "scans"))
    before = listing(folder) | listing(scans)
    for cam, images in ((folder / "test", ()), (folder / "train" / "NORMAL", ()), (scans, (scans,))):
        status, lines = run("evaluate", folder, home, "--cam", cam, *images)
        assert status == 2 and len(lines) == 1 and "choose another folder" in lines[0], lines
    assert listing(folder) | listing(scans) == before


@pytest.mark.parametrize(
    "name", ["model.json", "split_val.pth", "train/NORMAL/IM-0001-0001.jpeg", "run.1", "weights.pth"]
)
def test_a_checkpoint_never_takes_the_place_of_another_file(name, run, folder, home):
    shutil.copy(home / "model.pth", folder / "weights.pth")
    before = listing(folder)
    more = ("--weights", folder / "weights.pth") if name == "weights.pth" else ()
    status, lines = run("train", folder, home, "--checkpoint", folder / name, *more)
    assert status == 2 and len(lines) == 1 and "--checkpoint" in lines[0] and listing(folder) == before


def test_a_recorded_image_under_the_other_class_is_refused(run, folder, home):
    path = sorted((folder / "val" / "NORMAL").iterdir())[0]
    path.rename(folder / "val" / "PNEUMONIA" / "zz.jpeg")
    status, lines = run("train", folder, home)
    assert status == 2 and len(lines) == 1 and "zz.jpeg: split_val.json recorded this image as NORMAL" in lines[0]


def test_the_same_damage_recorded_in_both_classes_is_told_as_damage(run, folder, home):
    assert split_val.main(["--data-dir", str(folder), "--undo"]) == 0
    for name in common.CLASSES:
        (folder / "train" / name / "x.jpeg").write_bytes(b"")
    assert split_val.main(["--data-dir", str(folder), "--per-class", "4"]) == 0
    status, lines = run("train", folder, home)
    assert status == 2 and len(lines) == 2 and all("the file is empty" in line for line in lines), lines


def test_names_that_are_no_text_stay_apart(run, folder, home):
    for i, path in enumerate(sorted((folder / "test" / "NORMAL").iterdir())):
        path.rename(path.with_name(os.fsdecode(bytes([0x80 + i])) + ".jpeg"))
    assert run("evaluate", folder, home)[0] == 0
    assert json.loads((home / "results" / "metrics.json").read_text())["patients"] == 12
    assert run("evaluate", folder, home, "--from", home / "results" / "predictions.csv")[0] == 0


# ---------------------------------------------------------------- checkpoints


def read_checkpoint(path):
    """(network's tensors, head's tensors) as every script reads them."""
    network, _, _, tensors = common.build_network("tiny_faults", common.read_state(path), path)
    return network.state_dict() | tensors


def attempt(function, *args):
    """(what it returns, None) or (None, the Failure it raises)."""
    try:
        return function(*args), None
    except common.Failure as failure:
        return None, failure


def pickle_region(content):
    """Where data.pkl begins and ends in a checkpoint's archive."""
    start = content.index(b"archive/data.pkl") + 16
    return start, content.index(b"PK", start)


def test_a_damaged_checkpoint_is_refused_or_harmless(fuzz, run, data, home, tmp_path, say):
    """Flips, random bytes, zero blocks, truncations and splices; one in four inside the pickle."""
    intact = (home / "model.pth").read_bytes()
    expected = read_checkpoint(home / "model.pth")
    region, path, refused, memory = pickle_region(intact), tmp_path / "model.pth", 0, faults.Memory()
    count = fuzz.count(120, 2000)
    for i in range(count):
        if i < fuzz.count(20, 300):
            how, content = "truncation", intact[: fuzz.rng.randrange(len(intact))]
        else:
            how, content = damage(fuzz.rng, intact, *(region if i % 4 == 0 else ()))
        path.write_bytes(content)
        with within(10):
            tensors, failure = attempt(read_checkpoint, path)
        if failure:
            refused += 1
            assert str(path) in str(failure) and failure.status == 2 and len(str(failure)) < 400, how
        else:
            assert list(tensors) == list(expected), how
            assert all(torch.equal(tensors[name], expected[name]) for name in expected), how
        if i % (count // 4) == 0:
            (home / "model.pth").write_bytes(content)
            for script, more in (("evaluate", ()), ("train", ("--weights", path))):
                status, lines = run(script, data, home, *more)
                assert status == 2 and len(lines) == 1 and "model.pth: " in lines[0], (how, lines)
    assert refused > 0.9 * count and memory.more() < 1000
    say(f"{count} damaged checkpoints: {refused} refused, {count - refused} bit-equal, 0 silent")


def legacy(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def zipped(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def tarred(content):
    """The oldest format: a tar archive, its pickles unpickled one after the other."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def rezipped(content, level):
    """The same archive, compressed."""
    source, buffer = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", level) as archive:
        for info in source.infolist():
            archive.writestr(info.filename, source.read(info))
    return buffer.getvalue()


class Sneaky(dict):
    """A state dict by its looks, with a hook that runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return dict, ({"fc.weight": Touch(self.path)},)


def hostile(path):
    """{name: content} of files that run code, if anything unpickles them carelessly: each would make `path`."""
    touch, tensors = Touch(path), {"fc.weight": torch.zeros(1, 8)}
    code = b"cos\nsystem\n(S'touch %s'\ntR." % str(path).encode()
    return {
        "zip": zipped(touch),
        "zip, inside a state dict": zipped(tensors | {"fc.bias": touch}),
        "zip, as a key's value": zipped(Sneaky(path)),
        "zip, nested": zipped({"state_dict": {"a": [touch]}}),
        "zip, compressed": rezipped(zipped(touch), zipfile.ZIP_DEFLATED),
        "legacy": legacy(touch),
        "legacy, inside a state dict": legacy(tensors | {"fc.bias": touch}),
        "plain pickle": pickle.dumps(touch),
        "protocol 0": code,
        "tar": tarred(pickle.dumps(touch)),
        "tar, protocol 0": tarred(code),
        "pickled module": zipped(faults.TinyFaults(1)),
    }


ENVIRONMENTS = ({}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"})


@pytest.mark.parametrize("environment", [*ENVIRONMENTS, ENVIRONMENTS[1] | ENVIRONMENTS[2]], ids=len)
def test_no_checkpoint_is_ever_code(environment, run, data, home, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proof, path = tmp_path / "executed", tmp_path / "evil.pth"
    for i, (name, content) in enumerate(hostile(proof).items()):
        path.write_bytes(content)
        with pytest.raises(common.Failure) as caught:
            common.read_state(path)
        assert "readable checkpoint" in str(caught.value) or "bomb" in str(caught.value), name
        assert "weights_only" not in str(caught.value)  # torch's own text says how to run the code
        if i % 4 == 0:
            assert run("train", data, home, "--weights", path)[0] == 2
            assert run("evaluate", data, home, "--checkpoint", path)[0] == 2
        assert not proof.exists(), name
    with contextlib.suppress(Exception):  # the files are hostile indeed
        torch.load(io.BytesIO(hostile(proof)["zip"]), weights_only=False)
    assert proof.exists() or "TORCH_FORCE_WEIGHTS_ONLY_LOAD" in environment


def bomb():
    """An archive that unpacks to a thousand times its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        for i in range(3):
            archive.writestr(f"archive/data/{i}", bytes(10**8))
    return buffer.getvalue()


def states(state):
    """{name: (state, what the message says)} of files that are no checkpoint of the tiny network."""
    nan, inf, var = (dict(state) for _ in range(3))
    nan["fc.weight"] = torch.full_like(state["fc.weight"], float("nan"))
    inf["bn.weight"] = state["bn.weight"] / 0
    var["bn.running_var"] = state["bn.running_var"] - 100
    missing = {key: value for key, value in state.items() if key != "bn.bias"}
    huge = state | {"conv.weight": torch.zeros(1).expand(10**6, 10**6)}
    conv = state["conv.weight"]
    return {
        "nan": (nan, "impossible values"),
        "inf": (inf, "impossible values"),
        "inf in float32": (state | {"fc.bias": torch.full((1,), 1e300, dtype=torch.float64)}, "impossible values"),
        "negative variance": (var, "impossible values"),
        "missing key": (missing, "Missing key"),
        "extra key": (state | {"conv.bias": torch.zeros(8)}, "Unexpected key"),
        "extra key of the head": (state | {"fc.scale": torch.zeros(8)}, "Unexpected key"),
        "module. prefix": ({f"module.{key}": value for key, value in state.items()}, "Missing key"),
        "another shape": (state | {"conv.weight": torch.zeros(8, 3, 3, 3)}, "size mismatch"),
        "1000 outputs": (state | {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}, "one output"),
        "two outputs": (state | {"fc.weight": torch.zeros(2, 8), "fc.bias": torch.zeros(2)}, "one output"),
        "no head": ({key: value for key, value in state.items() if key[:2] != "fc"}, "one output"),
        "nested": ({"state_dict": state, "epoch": 3}, "not a readable checkpoint"),
        "a list": ([1, 2], "not a readable checkpoint"),
        "a tensor": (torch.zeros(3), "not a readable checkpoint"),
        "empty dict": ({}, ""),
        "numbers as keys": ({0: torch.zeros(1)}, "not a readable checkpoint"),
        "a string as value": (state | {"fc.bias": "0"}, "not a readable checkpoint"),
        "a tensor larger than its file": (huge, "larger than the file"),
        "complex numbers": (state | {"conv.weight": conv + 1j}, "conv.weight"),
        "whole numbers": (state | {"conv.weight": conv.int()}, ""),
        "a sparse tensor": (state | {"conv.weight": conv.to_sparse()}, ""),
        "a quantised tensor": (state | {"fc.bias": torch.quantize_per_tensor(torch.zeros(1), 1, 0, torch.qint8)}, ""),
        "a meta tensor": (state | {"conv.weight": conv.to("meta")}, ""),
        "an empty tensor": (state | {"bn.running_var": torch.zeros(0)}, ""),
    }


@pytest.mark.filterwarnings("ignore")
def test_an_absurd_checkpoint_is_one_line_and_2(run, data, home, tmp_path, plain):
    state = torch.load(home / "model.pth", weights_only=True)
    for name, (changed, text) in states(state).items():
        torch.save(changed, home / "model.pth")
        status, lines = run("evaluate", data, home)
        assert status == 2 and len(lines) == 1, (name, status, lines)
        assert "model.pth: " in lines[0] and text in lines[0] and len(lines[0]) < 450, (name, lines)
    for name, content in {"html": b"<!DOCTYPE html><p>404", "empty": b"", "text": b"weights\n", "bomb": bomb()}.items():
        (home / "model.pth").write_bytes(content)
        with within(10):
            status, lines = run("evaluate", data, home)
        text = "a bomb" if name == "bomb" else "not a readable checkpoint"
        assert status == 2 and len(lines) == 1 and text in lines[0], (name, lines)
    status, lines = run("train", data, home, "--weights", data)
    assert status == 2 and "no such file" in lines[0]
    for arch in ("resnet18", "resnet101", "wide_resnet50_2"):
        with torch.device("meta"):
            shapes = torchvision.models.get_model(arch).state_dict()
        state = {key: torch.zeros(1).expand(value.shape) if value.ndim else value for key, value in shapes.items()}
        with pytest.raises(common.Failure, match="not the weights of a resnet50") as caught:
            common.build_network("resnet50", state, "other.pth")
        assert len(str(caught.value)) < 250


def test_what_is_saved_loads_as_plain_tensors_whatever_the_device_it_was_saved_on(home, monkeypatch):
    seen = []
    true = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: (seen.append((args[1:], kwargs)), true(*args, **kwargs))[1]
    )
    state = common.read_state(home / "model.pth")
    assert all(type(value) is torch.Tensor and value.device.type == "cpu" for value in state.values())
    assert seen == [(("cpu",), {"weights_only": True})]


def test_the_version_of_torch_is_one_without_the_known_holes():
    required = re.search(r"^torch>=(\d+)\.(\d+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert tuple(map(int, required.groups())) >= (2, 10)  # CVE-2026-24747, CVE-2025-32434
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


# ---------------------------------------------------------------- the ImageNet weights


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A published weights file of the tiny network: .content, .path of the cached file, .publish(url)."""
    state = faults.TinyFaults().state_dict()
    content = zipped(state)
    import hashlib

    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def publish(url):
        weights = Namespace(DEFAULT=Namespace(url=f"{url}/{name}"))
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: weights)
        return weights.DEFAULT.url

    publish("http://127.0.0.1:9")
    path = tmp_path / "torch" / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    return Namespace(content=content, path=path, publish=publish)


def test_a_cached_weights_file_that_is_not_the_published_one_is_refused_by_name(run, data, home, imagenet, tmp_path):
    damaged = bytearray(imagenet.content)
    damaged[len(damaged) // 2] ^= 1
    bad = {"wrong": zipped({"a": torch.zeros(1)}), "truncated": imagenet.content[:-1], "empty": b"", "flipped": damaged}
    for name, content in (bad | hostile(tmp_path / "executed")).items():
        imagenet.path.write_bytes(content)
        status, lines = run("train", data, home, "--weights", "imagenet")
        assert status == 2 and len(lines) == 1, (name, lines)
        assert f"{imagenet.path}: not the file that torchvision published" in lines[0] and "--weights FILE" in lines[0]
        assert imagenet.path.read_bytes() == content and not (tmp_path / "executed").exists()
    imagenet.path.write_bytes(imagenet.content)
    assert run("train", data, home, "--weights", "imagenet") == (0, [])


def test_the_known_hash_of_resnet50_is_asked_for_in_full():
    from torchvision.models import ResNet50_Weights

    name = Path(ResNet50_Weights.DEFAULT.url).name
    digest = train.KNOWN_HASHES[name]
    assert len(digest) == 64 and digest.startswith(name.removesuffix(".pth").rpartition("-")[2])


@contextlib.contextmanager
def serving(answer):
    """The address of a server whose requests answer(handler) answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def no_pauses(monkeypatch):
    """The pauses that train.py asked for, in seconds; none of them is made."""
    pauses = []
    monkeypatch.setattr(train, "time", Namespace(**(vars(time) | {"sleep": pauses.append})))
    return pauses


def answer_with(content, length=None, status=200, stall=0):
    """A server's answer: `content` under the given Content-Length; stall: seconds before its second half."""

    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        time.sleep(stall)
        handler.wfile.write(content[len(content) // 2 :])

    return answer


def garbage(handler):
    handler.wfile.write(b"220 this is no web server\r\n")


@pytest.mark.parametrize("fault", ["404", "503", "cut", "stalled", "html", "garbage", "unreachable", "no name"])
def test_a_download_that_fails_names_the_address_the_file_and_the_flag(
    fault, run, data, home, imagenet, monkeypatch, tmp_path
):
    """Also: no hang, tried three times, nothing half-written, and what a killed run left is gone."""
    answers = {
        "404": answer_with(b"<html>", status=404),
        "503": answer_with(b"<html>", status=503),
        "cut": answer_with(imagenet.content[:5000], len(imagenet.content)),
        "stalled": answer_with(imagenet.content, stall=60),
        "html": answer_with(b"<html>Sign in to this network"),
        "garbage": garbage,
    }
    timeouts, true = [], socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: (timeouts.append(s), true(s and 0.2))[1])
    pauses = no_pauses(monkeypatch)
    old, fresh = (imagenet.path.with_name(f"{imagenet.path.name}.{name}.partial") for name in ("old", "fresh"))
    for path, age in ((old, 10000), (fresh, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    with serving(answers.get(fault)) as url:
        url = {"unreachable": "http://127.0.0.1:9", "no name": "http://weights.invalid"}.get(fault, url)
        url = imagenet.publish(url)
        with within(30):
            status, lines = run("train", data, home, "--weights", "imagenet")
    assert status == 2 and len(lines) == 1, lines
    assert all(text in lines[0] for text in (url, str(imagenet.path), "--weights FILE")), lines
    assert [*imagenet.path.parent.iterdir()] == [fresh]
    assert timeouts == [timeouts[0], None] and 3 * timeouts[0] + sum(pauses) < 60
    assert len(pauses) == (0 if fault == "404" else 2)


def test_a_download_is_tried_again_checked_and_used(run, data, home, imagenet):
    tries = []

    def answer(handler):
        tries.append(1)
        answer_with(imagenet.content, status=503 if len(tries) == 1 else 200)(handler)

    with serving(answer) as url:
        imagenet.publish(url)
        assert run("train", data, home, "--weights", "imagenet") == (0, [])
        assert run("train", data, home, "--weights", "imagenet") == (0, [])
    assert len(tries) == 2 and imagenet.path.read_bytes() == imagenet.content


def test_a_cache_folder_that_cannot_be_written_names_it(run, data, home, imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("a file")
    no_pauses(monkeypatch)
    status, lines = run("train", data, home, "--weights", "imagenet")
    assert status == 2 and len(lines) == 1 and str(tmp_path / "file") in lines[0] and "--weights FILE" in lines[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=1000))
    status, lines = run("train", data, home, "--weights", "imagenet")
    assert status == 4 and "TORCH_HOME" in lines[0]


def test_evaluate_never_asks_the_network(run, data, home, plain, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run("evaluate", data, home) == (0, [])


# ---------------------------------------------------------------- records


def structural(rng, content):
    """A JSON document with one value replaced, removed or doubled: it still is JSON."""
    document = json.loads(content)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(document)
    node, key = rng.choice(places)
    values = [None, True, -1, 0, 0.25, 10**400, "", "x", "../../x", [], {}, [[1]], {"a": 1}, "\0", "9" * 300]
    values = [value for value in values if value != node[key]]
    how = rng.choice(("replace", "replace", "remove"))
    if how == "remove":
        del node[key]
    else:
        node[key] = rng.choice(values)
    return f"{how} {key}", json.dumps(document, indent=1).encode()


def mutations(rng, content, count, parse=True):
    """`count` changed copies of a record, half of them still well-formed where it is JSON."""
    for i in range(count):
        yield structural(rng, content) if parse and i % 2 else damage(rng, content)


def test_a_damaged_model_json_is_refused_or_harmless(fuzz, run, data, home, plain, say):
    run("evaluate", data, home)
    expected, intact, refused = numbers(home), (home / "model.json").read_bytes(), 0
    count = fuzz.count(25, 300)
    for how, content in mutations(fuzz.rng, intact, count):
        (home / "model.json").write_bytes(content)
        with within(20):
            status, lines = run("evaluate", data, home)
        if status:
            refused += 1
            assert status == 2 and len(lines) == 1 and "model.json: " in lines[0], (how, lines)
        else:
            assert numbers(home) == expected, how
    say(f"{count} damaged model.json: {refused} refused, {count - refused} with the same result, 0 silent")


def test_a_model_json_from_elsewhere_is_never_a_traceback(fuzz, run, data, home, plain):
    """As someone would write it by hand, without a checksum: refused, or used."""
    written = json.loads((home / "model.json").read_text())
    intact = {key: written[key] for key in ("arch", "sha256", "threshold")}
    for _ in range(fuzz.count(15, 300)):
        how, content = structural(fuzz.rng, json.dumps(intact))
        (home / "model.json").write_bytes(content)
        status, lines = run("evaluate", data, home)
        assert status in (0, 2) and len(lines) == (status == 2), (how, lines)


@pytest.mark.parametrize(
    "odd",
    [
        {"date": 5},
        {"temperature": "x"},
        {"threshold_rule": []},
        {"images": [1]},
        {"images": {"train": [1]}},
        {"images": {"train": {"a": [1]}}},
        {"classes": 3},
    ],
)
def test_a_model_json_with_a_valid_checksum_and_odd_values_is_one_line_and_2(odd, run, data, home, plain):
    written = common.read_json(home / "model.json", {})
    common.write_json(home / "model.json", written | odd)
    status, lines = run("evaluate", data, home)
    assert status == 2 and len(lines) == 1 and "model.json: " in lines[0], lines


@pytest.mark.parametrize("record", [{"": "x"}, {"train/NORMAL/a.jpeg": ["x"]}, ["x"], {"val/NORMAL": None}])
def test_a_split_val_json_written_by_hand_is_never_a_traceback(record, run, folder, home, plain):
    (folder / "split_val.json").write_text(json.dumps({"sha256": record, "state": "done"}))
    for script in SCRIPTS:
        status, lines = run(script, folder, home)
        assert status in (0, 2) and len(lines) == (status == 2), (script, lines)


def test_a_model_of_other_images_is_told(run, folder, home, plain, capsys):
    changed = sorted((folder / "train" / "NORMAL").iterdir())[0]
    assert split_val.main(["--data-dir", str(folder), "--undo"]) == 0
    changed.write_bytes(picture(form="jpeg")(folder / "train"))
    assert split_val.main(["--data-dir", str(folder), "--per-class", "4"]) == 0
    capsys.readouterr()
    assert evaluate.main(flags("evaluate", folder, home)) == 0
    assert (
        "warning: 1 of the 24 images that the model learned from are not in split_val.json" in capsys.readouterr().err
    )
    assert any("not in split_val.json" in warning for warning in numbers(home)["warnings"])


def test_a_checkpoint_s_name_may_hold_what_matplotlib_takes_for_mathematics(run, data, home):
    for suffix in (".pth", ".json"):
        (home / f"model{suffix}").rename(home / f"$\\foo{{${suffix}")
    assert run("evaluate", data, home, "--checkpoint", home / "$\\foo{$.pth") == (0, [])


def test_a_damaged_split_val_json_is_refused_or_harmless(fuzz, folder, run, capsys, home, say):
    path = folder / "split_val.json"
    intact, refused, count = path.read_bytes(), 0, fuzz.count(25, 300)
    before, expected = listing(folder / "train") | listing(folder / "val"), common.read_split(folder, "train", "val")
    for how, content in mutations(fuzz.rng, intact, count):
        path.write_bytes(content)
        for more in ((), ("--per-class", "4"), ("--check",)):
            status = split_val.main(["--data-dir", str(folder), *more])
            lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
            assert status in (0, 2) and len(lines) == (status == 2), (how, lines)
        assert listing(folder / "train") | listing(folder / "val") == before, how
        refused += status == 2
        if status:
            assert "split_val.json: " in lines[0], (how, lines)
            assert run("train", folder, home)[0] == 2, how
        else:
            assert common.read_split(folder, "train", "val") == expected, how
        assert path.read_bytes() == content
    say(f"{count} damaged split_val.json: {refused} refused, {count - refused} with the same result, 0 silent")


def test_a_damaged_predictions_csv_is_refused_or_harmless(fuzz, run, data, home, plain, tmp_path, say):
    source = home / "results" / "predictions.csv"
    beside = (home / "results" / "metrics.json").read_bytes()
    out = tmp_path / "again"
    (out / "results").mkdir(parents=True)
    assert run("evaluate", data, out, "--from", source) == (0, [])
    expected, intact, refused, count = numbers(out), source.read_bytes(), 0, fuzz.count(25, 300)
    for how, content in mutations(fuzz.rng, intact, count, parse=False):
        source.write_bytes(content)
        with within(20):
            status, lines = run("evaluate", data, out, "--from", source)
        if status:
            refused += 1
            assert status == 2 and len(lines) == 1 and "predictions.csv" in lines[0], (how, lines)
        else:
            assert numbers(out) == expected, how
    source.write_bytes(intact)
    for how, content in mutations(fuzz.rng, beside, fuzz.count(10, 100)):
        (home / "results" / "metrics.json").write_bytes(content)
        status, lines = run("evaluate", data, out, "--from", source)
        assert (status == 2 and len(lines) == 1) or (status == 0 and numbers(out) == expected), (how, lines)
    say(f"{count} damaged predictions.csv: {refused} refused, {count - refused} with the same result, 0 silent")


def test_a_damaged_feature_store_is_computed_again_bit_for_bit(fuzz, run, data, home, capsys, say):
    path = max((home / "cache").glob("*/*.features"), key=lambda path: path.stat().st_size)
    intact, model = path.read_bytes(), common.read_state(home / "model.pth")
    device, dtype = common.pick_device("cpu")
    network, _, width, _ = common.build_network("tiny_faults")
    images = [image for found in common.read_split(data, "train", "val").values() for image in found]
    args = Namespace(cache_dir=home / "cache", no_cache=False, batch_size=32, workers=0)
    expected, _ = common.extract_features(network, width, images, [1] * len(images), args, device, dtype)
    size, said, count = len(intact) // 40, 0, fuzz.count(25, 300)
    for i in range(count):
        how, content = damage(fuzz.rng, intact)
        for other in (home / "cache").glob("*/*.features"):
            other.unlink()
        path.write_bytes(content)
        capsys.readouterr()
        features, bad = common.extract_features(network, width, images, [1] * len(images), args, device, dtype)
        assert torch.equal(features, expected) and not bad, how
        captured = capsys.readouterr()
        # a record that is torn off is not damaged: a kill leaves that
        if "damaged records, computed again" in captured.err:
            said += 1
        else:
            assert len(content) < len(intact) or "computed" not in captured.out, (how, captured)
        if i % (count // 3) == 0:
            assert run("train", data, home)[0] == 0
            again = common.read_state(home / "model.pth")
            assert all(torch.equal(again[name], model[name]) for name in model), how
    say(f"{count} damaged feature stores, {size} bytes a record: all bit-equal, {said} said so")


# ---------------------------------------------------------------- images


def test_every_changed_byte_of_a_recorded_image_is_refused_with_its_path(fuzz, folder, run, home, say):
    paths = [path for path, _ in common.list_split(folder, "train") + common.list_split(folder, "val")]
    count = fuzz.count(60, 1000)
    for _ in range(count):
        path = fuzz.rng.choice(paths)
        intact = path.read_bytes()
        how, content = damage(fuzz.rng, intact)
        path.write_bytes(content)
        with pytest.raises(common.Failure) as caught:
            common.read_split(folder, "train", "val")
        assert str(path) in str(caught.value) and "changed" in str(caught.value), how
        path.write_bytes(intact)
    for script, split in (("train", "val"), ("evaluate", "test")):
        path = sorted((folder / split / "NORMAL").iterdir())[1]
        intact = path.read_bytes()
        path.write_bytes(intact[:-2] + b"!!")
        status, lines = run(script, folder, home)
        assert status == 2 and len(lines) == 1 and str(path) in lines[0] and "changed" in lines[0]
        path.write_bytes(intact)
    say(f"{count} changed images, {count} refused")


def test_recorded_images_that_are_gone_are_told(run, folder, home, plain, capsys):
    gone = {split: sorted((folder / split / "NORMAL").iterdir())[:2] for split in ("train", "test")}
    for script, split in (("train", "train"), ("evaluate", "test")):
        for path in gone[split]:
            path.unlink()
        capsys.readouterr()
        assert SCRIPTS[script].main(flags(script, folder, home)) == 0
        assert f"{gone[split][0]}: gone since split_val.json recorded it (2 such images)" in capsys.readouterr().err


FORMATS = {
    "x.jpeg": {"quality": 75},
    "progressive.jpeg": {"progressive": True},
    "x.png": {},
    "sixteen.png": {},
    "x.tiff": {"compression": "tiff_lzw"},
    "x.webp": {"lossless": True},
    "x.bmp": {},
    "x.pgm": {},
}


def test_a_damaged_image_without_a_record_is_read_or_explained(fuzz, data, tmp_path, say):
    """All formats: a reason in one line or pixels; no traceback, no hang, no gigabyte."""
    image = Image.open(common.list_split(data, "train")[0][0])
    sources = {}
    for name, options in FORMATS.items():
        picture = Image.fromarray(np.asarray(image).astype(np.uint16) * 256) if "sixteen" in name else image
        picture.save(tmp_path / name, **options)
        sources[name] = (tmp_path / name).read_bytes()
    memory = faults.Memory()
    count, refused, slowest = fuzz.count(120, 1000), 0, 0.0
    for i in range(count):
        name = list(sources)[i % len(sources)] if i % 2 else "x.jpeg"
        how, content = damage(fuzz.rng, sources[name])
        (tmp_path / name).write_bytes(content)
        start = time.perf_counter()
        with within(10):
            _, result = common.Views([(tmp_path / name, common.hash_file(tmp_path / name), [0, 3])])[0]
        slowest = max(slowest, time.perf_counter() - start)
        if isinstance(result, str):
            refused += 1
            assert result and "\n" not in result and len(result) <= 200, (name, how, result)
        else:
            assert result.shape == (2, 224, 224, 3), (name, how)
    assert memory.more() < 1000 and 0 < refused < count
    how = f"{refused} explained, {count - refused} decoded, {slowest:.2f} s, {memory.more()} MB more"
    say(f"{count} damaged images: {how}")


@pytest.mark.parametrize("script", ["train", "evaluate", "split_val"])
def test_a_truncated_image_is_named_with_2_by_every_script(script, fuzz, run, folder, home):
    (folder / "split_val.json").unlink()
    paths = [path for path, _ in common.list_split(folder, "test" if script == "evaluate" else "train")]
    count = fuzz.count(6, 200)
    for _ in range(count):
        path = fuzz.rng.choice(paths)
        intact = path.read_bytes()
        path.write_bytes(intact[: fuzz.rng.choice((len(intact) - 1, fuzz.rng.randrange(len(intact))))])
        status, lines = run(script, folder, home)
        assert status == 2 and len(lines) == 1, lines
        if script != "split_val":  # its page lists the errors
            assert str(path) in lines[0] and "--skip-bad" in lines[0]
        path.write_bytes(intact)


def test_all_unreadable_images_are_reported_at_once_and_left_out_only_when_asked(run, folder, home, plain, capsys):
    (folder / "split_val.json").unlink()
    bad = {}
    for split in ("train", "test"):
        for i, name in enumerate(common.CLASSES):
            for path, content in zip(sorted((folder / split / name).iterdir())[:2], (b"", b"<html>"), strict=True):
                path.write_bytes(content + bytes([i]) * len(content))
                bad.setdefault(split, []).append(path)
    for script, split in (("train", "train"), ("evaluate", "test")):
        status, lines = run(script, folder, home)
        assert status == 2 and all(any(str(path) in line for line in lines) for path in bad[split])
        assert "and 3 more" in lines[-1] and len(lines) == 4
        status = SCRIPTS[script].main(flags(script, folder, home, "--skip-bad"))
        errors = capsys.readouterr().err
        assert status == 0 and all(f"left out: {path}: " in errors for path in bad[split])
    about = json.loads((home / "model.json").read_text())
    assert sorted(about["skipped"]) == sorted(str(path.relative_to(folder)) for path in bad["train"])
    assert not {str(path.relative_to(folder)) for path in bad["train"]} & about["images"]["train"].keys()


# ---------------------------------------------------------------- the folder zoo


def in_both(change):
    """A layout that is the same in train/, which two scripts read, and in test/, which the third reads."""

    def apply(folder):
        for split in ("train", "test"):
            change(folder / split)

    return apply


def put(name, content, where="NORMAL"):
    """A layout with one more file."""

    def change(split):
        path = Path(split / where / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(split) if callable(content) else content)

    return in_both(change)


def picture(mode="L", size=(90, 90), form="png", **options):
    """What a picture file of that mode holds; another one in each split."""

    def content(split):
        rng = np.random.default_rng(len(split.name))
        pixels = rng.integers(0, 256, (size[1], size[0]), np.uint8)
        image = Image.fromarray(pixels if mode != "I;16" else pixels.astype(np.uint16) * 200)
        buffer = io.BytesIO()
        (image if mode in ("L", "I;16") else image.convert(mode)).save(buffer, form, **options)
        return buffer.getvalue()

    return content


def rotated(split):
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(size=(90, 120), form="jpeg", exif=exif)(split)


def twin(split):
    return sorted((split / "PNEUMONIA").iterdir())[0].read_bytes()


def rename(old, new):
    return in_both(lambda split: (split / old).rename(split / new))


def link(name, target):
    def change(split):
        shutil.rmtree(split / name) if (split / name).is_dir() else None
        (split / name).symlink_to(target(split) if callable(target) else target)

    return in_both(change)


def junk(split):
    for place in (split, split / "NORMAL", split / "PNEUMONIA"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "x.jpeg.part", "._x.jpeg", ".x.png", "notes.txt"):
            (place / name).write_bytes(b"junk")


def outside(split):
    away = split.parent.parent / f"{split.name}-away"
    (split / "NORMAL").rename(away)
    (split / "NORMAL").symlink_to(away)


def linked_split(folder):
    for split in ("train", "test"):
        (folder / split).rename(folder.parent / f"{split}-away")
        (folder / split).symlink_to(folder.parent / f"{split}-away")


def file_for_split(split):
    shutil.rmtree(split)
    split.write_text("")


def file_for_class(split):
    file_for_split(split / "NORMAL")


def empty_class(split):
    shutil.rmtree(split / "NORMAL")
    (split / "NORMAL").mkdir()


def linked_pipe(split):
    os.mkfifo(split / "pipe")
    (split / "NORMAL" / "x.jpeg").symlink_to("../pipe")


def first(split):
    return sorted((split / "NORMAL").iterdir())[0]


def only_dicom(split):
    for path in (split / "NORMAL").iterdir():
        path.rename(path.with_suffix(".dcm"))


def bomb_png(split):
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "png")
    return buffer.getvalue()


def copy_across(folder):
    shutil.copy(sorted((folder / "train" / "NORMAL").iterdir())[0], folder / "test" / "NORMAL" / "copy.jpeg")


def copy_within(split):
    shutil.copy(sorted((split / "NORMAL").iterdir())[0], split / "NORMAL" / "copy.jpeg")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%d\nsize 5\n"

# name: (layout, exit status of every script, or of (train, evaluate, split_val --check), what the line says)
ZOO = {
    "as it should be": (lambda folder: None, 0, ""),
    "junk in every folder": (in_both(junk), 0, ""),
    "hidden copies inside a class": (put(".ipynb_checkpoints/x-checkpoint.jpeg", twin), 0, ""),
    "a nested folder": (put("more/x.jpeg", twin), 0, ""),
    "a folder named as an image": (put("x.jpeg/y.txt", b"y"), 0, ""),
    "a named pipe": (in_both(lambda split: os.mkfifo(split / "NORMAL" / "x.jpeg")), 0, ""),
    "a link to an image of the class": (link("NORMAL/l.jpeg", first), 0, ""),
    "an image twice in a class": (in_both(copy_within), 0, ""),
    "16 bit": (put("x.png", picture("I;16")), 0, ""),
    "palette": (put("x.png", picture("P")), 0, ""),
    "alpha": (put("x.png", picture("RGBA")), 0, ""),
    "grey and alpha": (put("x.png", picture("LA")), 0, ""),
    "CMYK": (put("x.tiff", picture("CMYK", form="tiff")), 0, ""),
    "WebP": (put("x.webp", picture("RGB", form="webp")), 0, ""),
    "turned by EXIF": (put("x.jpeg", rotated), 0, ""),
    "another size": (put("x.jpeg", picture(size=(700, 500), form="jpeg")), 0, ""),
    "one pixel": (put("x.png", picture(size=(1, 1))), 0, ""),
    "a strange name": (put("ä b\n'\".png", picture()), 0, ""),
    "a name that is no text": (put(os.fsdecode(b"x\xff\xfe.png"), picture()), 0, ""),
    "hidden folder of images": (put("x.jpeg", twin, ".ipynb_checkpoints"), 2, ".ipynb_checkpoints: expected only"),
    "an archive's leftovers": (put("._x.jpeg", b"", "__MACOSX/NORMAL"), 2, "__MACOSX: expected only"),
    "a third class": (put("x.jpeg", twin, "COVID"), 2, "COVID: expected only"),
    "lower case": (rename("NORMAL", "normal"), 2, "normal: expected only"),
    "capitalised": (rename("PNEUMONIA", "Pneumonia"), 2, "Pneumonia: expected only"),
    "another word": (rename("NORMAL", "ZNORMAL"), 2, "ZNORMAL: expected only"),
    "underscore": (rename("NORMAL", "NORMAL_"), 2, "NORMAL_: expected only"),
    "misspelled": (rename("PNEUMONIA", "PNEUMONA"), 2, "PNEUMONA: expected only"),
    "a space": (rename("PNEUMONIA", "PNEUMONIA "), 2, "PNEUMONIA : expected only"),
    "a class missing": (in_both(lambda split: shutil.rmtree(split / "NORMAL")), 2, "NORMAL: no such folder"),
    "a class that is a file": (in_both(file_for_class), 2, "NORMAL: no such folder"),
    "a class empty": (in_both(empty_class), 2, "an empty folder"),
    "only DICOM files": (in_both(only_dicom), 2, "only .dcm"),
    "one class linked to the other": (link("NORMAL", "PNEUMONIA"), 2, "found a link"),
    "a linked class": (in_both(outside), 2, "found a link"),
    "a linked split": (linked_split, 2, "found a link"),
    "a link to itself": (link("NORMAL", "NORMAL"), 2, "NORMAL"),
    "a split missing": (in_both(shutil.rmtree), 2, "no such folder"),
    "a split that is a file": (in_both(file_for_split), 2, "no such folder"),
    "a link to a pipe": (in_both(linked_pipe), 0, ""),
    "a link to a device": (link("NORMAL/x.jpeg", "/dev/zero"), 0, ""),
    "a dangling link": (link("NORMAL/l.jpeg", "nowhere"), 2, "l.jpeg"),
    "a web page": (put("x.jpeg", b"<!DOCTYPE html><p>Sign in"), 2, "a web page"),
    "a git-LFS pointer": (put("x.jpeg", lambda split: LFS % len(split.name)), 2, "git-LFS"),
    "an empty file": (put("x.jpeg", b""), 2, "the file is empty"),
    "empty files in both classes": (lambda f: (put("x.jpeg", b"")(f), put("y.jpeg", b"", "PNEUMONIA")(f)), 2, "empty"),
    "a text": (put("x.png", b"PNG it is not"), 2, "no image"),
    "two colours": (put("x.png", picture("1")), 2, "two colours"),
    "a bomb": (put("x.png", bomb_png), 2, "pixels"),
    "a thread": (put("x.png", picture(size=(3000, 1))), 2, "no radiograph's shape"),
    "half an image": (put("x.jpeg", lambda s: picture(form="jpeg")(s)[:1500]), 2, "truncated"),
    "the same image in both classes": (put("x.jpeg", twin), 2, "the same image"),
    "an image of train in test": (copy_across, (0, 0, 2), "the same image"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_a_folder_gets_its_exit_status_one_line_and_is_left_as_it_is(name, run, folder, home, plain, capsys):
    layout, statuses, text = ZOO[name]
    layout(folder)
    before = listing(folder)
    statuses, both = (
        (statuses,) * 3 if isinstance(statuses, int) else statuses,
        "both classes" in name and "empty" in text,
    )
    for script, expected in zip(SCRIPTS, statuses, strict=True):
        if script != "split_val" or not text:
            status, lines = run(script, folder, home)
            assert (status, len(lines)) == (expected, both + 1 if expected else 0), lines
            assert not expected or all(text in line and str(folder) in line for line in lines), lines
        else:
            status = split_val.main(flags(script, folder, home))
            captured = capsys.readouterr()
            lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
            assert (status, len(lines)) == (expected, 1), lines
            assert text.split(":")[0] in captured.out + captured.err, captured
        assert listing(folder) == before, script
    if not any(statuses):
        about = json.loads((home / "model.json").read_text())
        added = name in list(ZOO)[6:19]
        assert len(about["images"]["train"]) == 16 + added and numbers(home)["n"] == 12 + added


# the split does not decode: what cannot be read moves, and train.py tells
MOVED_ALL_THE_SAME = ("a web page", "a git-LFS pointer", "an empty file", "empty files in both classes", "a text",
                      "two colours", "a bomb", "a thread", "half an image")  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_a_split_of_any_folder_moves_everything_or_nothing(name, tmp_path, data, capsys):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    assert split_val.main(["--data-dir", str(folder), "--undo"]) == 0
    layout, statuses, _ = ZOO[name]
    layout(folder)
    before, expected = listing(folder), 2 if statuses and name not in MOVED_ALL_THE_SAME else 0
    capsys.readouterr()
    assert split_val.main(["--data-dir", str(folder), "--per-class", "4"]) == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == (expected == 2) and all(str(folder) in line for line in lines), lines
    if not expected:
        assert split_val.main(["--data-dir", str(folder), "--undo"]) == 0
    assert listing(folder) == before


def test_an_image_of_test_that_comes_into_train_after_the_split_is_refused(run, folder, home):
    shutil.copy(sorted((folder / "test" / "NORMAL").iterdir())[0], folder / "train" / "NORMAL" / "copy.jpeg")
    status, lines = run("train", folder, home)
    assert status == 2 and len(lines) == 1 and "the same image" in lines[0] and "copy.jpeg" in lines[0]
    assert run("split_val", folder, home)[0] == 2
    assert run("evaluate", folder, home)[0] == 0  # it warns where its own model has learned from an image


def test_a_file_that_cannot_be_opened_is_named(run, folder, home, monkeypatch):
    """As it is without the right to read it; root may read everything."""
    path, true = sorted((folder / "train" / "NORMAL").iterdir())[2], builtins.open

    def denied(name, *args, **kwargs):
        if Path(name) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return true(name, *args, **kwargs)

    monkeypatch.setattr(common, "open", denied, raising=False)
    status, lines = run("train", folder, home)
    assert status == 2 and len(lines) == 1 and f"{path}: the file cannot be opened" in lines[0]
    monkeypatch.undo()
    monkeypatch.setattr(
        os, "scandir", lambda folder: (_ for _ in ()).throw(PermissionError(13, "Permission denied", folder))
    )
    status, lines = run("train", folder, home)
    assert status == 2 and len(lines) == 1 and "Permission denied" in lines[0] and str(folder) in lines[0]


def test_no_data_folder_and_a_file_in_its_place(run, tmp_path, home):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        for script in SCRIPTS:
            status, lines = run(script, path, home)
            assert status == 2 and len(lines) == 1 and str(path) in lines[0], lines


# ---------------------------------------------------------------- running


def untouched(home, before):
    """Whether the model and its results are as they were; the feature store may have grown."""
    return {p: v for p, v in listing(home).items() if "/cache" not in p} == before


def signalled(zygote, script, argv, number, moment, log):
    """Sends a signal `moment` seconds after the script began to answer them. (exit status, its line)."""
    pid = zygote.start(script, argv, log)
    with contextlib.suppress(FileNotFoundError):  # it may have ended before
        faults.wait_ready(pid)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
    status = zygote.wait(pid)
    deadline = time.time() + 2
    while faults.session_of(pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not faults.session_of(pid)
    lines = [line for line in log.read_text().splitlines() if re.match(r"\w+\.py: ", line) or "Traceback" in line]
    log.unlink()
    return status, lines


def check_stop(script, status, lines, number, home, old):
    """What must hold after a signal: one line, and the old files or whole new ones."""
    if status in (0, -number):  # it was faster: its work was done, if not its exit
        assert not lines
        return 0
    assert status == 128 + number and len(lines) == 1 and "interrupted" in lines[0], (status, lines)
    state = common.read_state(home / "model.pth")
    assert not [*home.rglob("*.tmp")]
    same = {path: content for path, content in listing(home).items() if "/cache" not in path} == old
    if "every file is as it was" in lines[0]:
        assert same, lines
    elif script == "train":
        assert "kept the best so far" in lines[0] or "written before" in lines[0], lines
        about = common.read_json(home / "model.json", {})
        if "model.json" in lines[0] or "kept the best" in lines[0]:
            assert about["sha256"] == common.hash_file(home / "model.pth") and state
    return 1


@pytest.mark.parametrize("script", ["train", "evaluate", "split_val"])
def test_a_signal_at_any_moment_ends_a_script_in_one_line_and_keeps_what_was_there(
    script, zygote, fuzz, data, trained, tmp_path, say
):
    """Ctrl-C and SIGTERM at moments spread over a run, to the whole group, as a terminal sends it."""
    number_of_moments, stopped, log = fuzz.count(3, 10), 0, tmp_path / "log"
    more = {"train": ["--no-cache", "--epochs", 300, "--patience", 0], "evaluate": ["--no-cache"], "split_val": []}[
        script
    ]

    def fresh(name):
        return Path(shutil.copytree(trained, tmp_path / name))

    home = fresh("clean")
    for _ in range(2):  # the first one reads everything from the disk
        start = time.time()
        pid = zygote.start(script, flags(script, data, home, *more), log)
        assert zygote.wait(pid) == 0, log.read_text()
        duration = time.time() - start
    log.unlink()
    for i in range(number_of_moments):
        for number in (signal.SIGINT, signal.SIGTERM) if fuzz.on else ((signal.SIGINT, signal.SIGTERM)[i % 2],):
            home = fresh(f"{i}-{number}")
            old = {path: content for path, content in listing(home).items() if "/cache" not in path}
            moment = duration * (i + fuzz.rng.random()) / number_of_moments
            status, lines = signalled(zygote, script, flags(script, data, home, *more), number, moment, log)
            stopped += check_stop(script, status, lines, number, home, old)
            shutil.rmtree(home)
    assert stopped >= number_of_moments // 3
    say(f"{script}: {stopped} stopped")


def test_an_interrupted_split_is_completed_by_the_next_run(zygote, fuzz, tmp_path):
    draw_folder(tmp_path / "source", train=40, test=2, size=16)
    clean = shutil.copytree(tmp_path / "source", tmp_path / "clean")
    assert split_val.main(["--data-dir", str(clean), "--per-class", "15"]) == 0
    expected = {str(Path(path).relative_to(clean)) for path in listing(clean)}
    for i in range(fuzz.count(3, 10)):
        folder = Path(shutil.copytree(tmp_path / "source", tmp_path / f"{i}"))
        argv, log = ["--data-dir", str(folder), "--per-class", "15"], tmp_path / "log"
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        status, lines = signalled(zygote, "split_val", argv, number, fuzz.rng.uniform(0, 0.1), log)
        stopped = status == 128 + number and len(lines) == 1 and "interrupted" in lines[0]
        assert stopped or (status in (0, -number) and not lines), (status, lines)
        assert split_val.main(argv) == 0
        assert {str(Path(path).relative_to(folder)) for path in listing(folder)} == expected


def test_a_second_signal_does_not_cut_the_orderly_end_short(zygote, data, home, tmp_path, fuzz):
    """As make sends them: the terminal's to the group, and its own."""
    runs = [("faults:end_slowly", [], 0.2)]
    argv = flags("train", data, home, "--no-cache", "--epochs", 3000, "--patience", 0)
    runs += [("train", argv, fuzz.rng.uniform(0.1, 0.5)) for _ in range(fuzz.count(1, 40))]
    for script, argv, moment in runs:
        pid = zygote.start(script, argv, tmp_path / "log")
        faults.wait_ready(pid)
        time.sleep(moment)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.killpg(pid, number)
            time.sleep(0.1 if ":" in script else 0.002)
        assert zygote.wait(pid) in (130, 143)  # of two that are pending either may be the first
        text = (tmp_path / "log").read_text()
        assert text.count(".py: interrupted") == 1 and (script == "train" or "ended in order" in text), text
        assert "Traceback" not in text and "Exception ignored" not in text, text
        (tmp_path / "log").unlink()


def test_an_interrupt_that_a_library_swallows_can_be_repeated_and_is_one_line(zygote, tmp_path):
    pid = zygote.start("faults:swallow", [], tmp_path / "log")
    faults.wait_ready(pid)
    for pause in (0.2, 3.2):
        time.sleep(pause)
        os.kill(pid, signal.SIGTERM)
    assert zygote.wait(pid) == 143
    assert (tmp_path / "log").read_text() == "faults.py: interrupted; every file is as it was\n"


COMMANDS = {"train": "train", "evaluate": "evaluate", "split_val": "check"}


@pytest.mark.parametrize("script", ["train", "evaluate", "split_val"])
def test_a_signal_through_make_deletes_nothing(script, fuzz, data, trained, tmp_path):
    """The whole group of make, as Ctrl-C in a terminal does; make sends its own SIGTERM on top."""
    network, head, width, _ = common.build_network("resnet18")
    trained_head = train.Trained(torch.zeros(width), 0.0, 1, 0.1, 0.9, [])
    for i in range(fuzz.count(1, 4)):
        home = Path(shutil.copytree(trained, tmp_path / f"{i}"))
        about = {"arch": "resnet18", "threshold": 0.5}
        train.save_checkpoint(home / "model.pth", network, head, trained_head, about)
        old = {path: content for path, content in listing(home).items() if "/cache" not in path}
        number = (signal.SIGINT, signal.SIGTERM)[(i + len(script)) % 2]
        makefile = (ROOT / "Makefile").read_text().replace("install: .venv/installed ", "install: ")
        (tmp_path / "Makefile").write_text(re.sub(r"^RUN := .*", f"RUN := {sys.executable}", makefile, flags=re.M))
        variables = {"DATA": data, "MODEL": home / "model.pth", "RESULTS": home / "results", "DEVICE": "cpu"}
        more = f"--cache-dir {home / 'cache'} --no-cache"
        if script == "train":
            more += " --arch resnet50 --weights random --views 8"
            variables["WORKERS"] = 2
        elif script == "split_val":
            variables, more = {"DATA": data}, ""
        argv = ["make", "-f", str(tmp_path / "Makefile"), COMMANDS[script]]
        argv += [f"{name}={value}" for name, value in variables.items()] + [f"ARGS={more}"]
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        deadline, pids = time.time() + 60, []
        while time.time() < deadline and not pids:
            time.sleep(0.01)
            pids = [
                pid
                for pid in faults.session_of(process.pid)
                if command_of(pid).startswith(f"{sys.executable} {script}.py")
            ]
        faults.wait_ready(pids[0])
        time.sleep(fuzz.rng.uniform(0, 5 if fuzz.on else 1))
        os.killpg(process.pid, number)
        process.wait(30)
        with within(10):  # the script itself: a batch ends first, and so does Python
            while Path(f"/proc/{pids[0]}").exists():
                time.sleep(0.05)
        with within(2):  # its processes
            while faults.session_of(process.pid):
                time.sleep(0.05)
        text = (tmp_path / "log").read_text()
        lines = [line for line in text.splitlines() if line.startswith(f"{script}.py: ")]
        assert "Traceback" not in text and "Deleting" not in text, text
        assert process.returncode == 0 or not lines or (len(lines) == 1 and "interrupted" in lines[0]), text
        assert process.returncode == 0 or untouched(home, old) or "every file is as it was" not in lines[0]
        common.read_state(home / "model.pth")


def command_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


@pytest.mark.parametrize(
    ("stand_in", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "lower --batch-size (now 32)"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "lower --batch-size (now 32)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "--batch-size"),
        (MemoryError(), "lower --batch-size"),
    ],
    ids=["cuda", "mps", "cpu", "python"],
)
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_full_memory_names_the_flag_that_helps(script, stand_in, expected, run, data, home, monkeypatch):
    def full(*_, **__):
        raise stand_in

    monkeypatch.setattr(faults.TinyFaults, "forward", full)
    monkeypatch.setattr(torch.fx.experimental.optimization, "fuse", full)  # an untraceable network runs as it is
    before = {path: content for path, content in listing(home).items() if "/cache" not in path}
    if isinstance(stand_in, MemoryError):
        monkeypatch.setattr(common, "fast_copy", full)
    status, lines = run(script, data, home, "--no-cache")
    assert status == 4 and len(lines) == 1 and expected in lines[0], lines
    assert untouched(home, before)


@pytest.mark.parametrize("fault", ["killed", "hung", "died", "stopped"])
def test_a_decoding_process_that_dies_or_hangs_is_a_message(fault, run, data, home, monkeypatch):
    parent, true, image = os.getpid(), common.load_image, sorted((data / "train" / "NORMAL").iterdir())[2]

    def broken(file):
        if os.getpid() != parent and file.getvalue() == image.read_bytes():
            if fault == "hung":
                time.sleep(600)
            if fault == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL) if fault == "killed" else os._exit(1)
        return true(file)

    monkeypatch.setattr(common, "load_image", broken)
    monkeypatch.setattr(common.FeatureStore, "__init__", lambda *_: None)
    assert 0 < common.PATIENCE <= 110  # two minutes in all, with the start of the processes
    if fault in ("hung", "stopped"):
        monkeypatch.setattr(common, "PATIENCE", 3)
    with within(60):
        status, lines = run("train", data, home, "--workers", 2, "--no-cache")
    assert status == 4 and len(lines) == 1 and "--workers 0" in lines[0], lines


def test_a_killed_script_leaves_no_decoding_process(zygote, data, home, tmp_path):
    pid = zygote.start("faults:slow_images", flags("train", data, home, "--no-cache", "--workers", 2), tmp_path / "log")
    with within(60):
        while len(faults.session_of(pid)) < 3:
            time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    assert zygote.wait(pid) == -signal.SIGKILL
    with within(2):
        while faults.session_of(pid):
            time.sleep(0.05)


def test_nothing_that_runs_on_the_device_asks_for_float64():
    """MPS has none."""
    for function in (common.fast_copy, common.forward_views, evaluate.class_maps):
        assert not re.search(r"float64|double", inspect.getsource(function))


# ---------------------------------------------------------------- the tests themselves


def test_every_guard_is_there_and_so_is_its_test():
    assert len(GUARDS) >= 15 and len({guard.name for guard in GUARDS}) == len(GUARDS)
    for guard in GUARDS:
        assert (ROOT / guard.file).read_text().count(guard.old) == 1, guard.name
        file, _, test = guard.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), guard.name


def pytest_generate_tests(metafunc):
    if "guard" in metafunc.fixturenames:
        option = metafunc.config.option
        guards = GUARDS if option.fuzz else GUARDS[option.fuzz_seed % 12 :: 12]  # up to half a minute each
        metafunc.parametrize("guard", guards, ids=lambda guard: guard.name)


def test_without_its_guard_a_test_fails(guard, tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "requirements.txt", ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / guard.file).read_text()
    (tmp_path / guard.file).write_text(text.replace(guard.old, guard.new))
    zipped = os.environ.get("CHESTXRAYS_ZIP", ROOT.parent / "shared" / "chestxrays.zip")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{guard.test}"]
    environment = os.environ | {"CHESTXRAYS_ZIP": str(zipped)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "FAILED tests/" in result.stdout, result.stdout  # a test, not its set-up
