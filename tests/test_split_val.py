"""split_val.py: the choice of patients, and the moves under every fault."""

import errno
import fcntl
import itertools
import os
import random
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
from faults import damage, fail_at, files, fork, fresh_copy, put
from helpers import make_tree, names_in, run_split, sizes, snapshot, split_refused

import cxr.moves
import split_val
from cxr.errors import Failure, Terminated
from cxr.files import read_json
from cxr.folders import CLASSES
from cxr.moves import LOCK_FILE, lock
from cxr.patients import read_split


def add_files(folder, names):
    for name in names:
        put(folder / name, f"{folder} {name}".encode())


def moved_to_val(folder, n, seed=0):
    record, _ = split_val.plan_splits(folder, {"val": n}, seed, CLASSES)["val"]
    return record["moved"]


def test_no_patient_is_ever_on_both_sides_and_the_classes_get_what_was_asked(tree):
    xrays = read_split(tree, "train", classes=CLASSES)
    choices = set()
    for seed in range(50):
        chosen = split_val.choose_patients(xrays, dict.fromkeys(CLASSES, 5), seed, CLASSES)
        assert Counter(xray.label for xray in chosen) == {0: 5, 1: 5}
        patients = {xray.group for xray in chosen}
        assert [xray for xray in xrays if xray.group in patients] == sorted(chosen)
        choices.add(str(sorted(chosen)))
    assert len(choices) > 40


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_does_not_depend_on_the_order_of_the_folder(tree, monkeypatch, seed):
    expected = {
        "NORMAL": ["IM-0001-0001.jpeg", "IM-0003-0004.jpeg", "IM-0006-0008.jpeg"],
        "PNEUMONIA": ["person4_virus_5.jpeg", "person6_virus_8.jpeg", "person7_virus_9.jpeg"],
    }
    rng, true = random.Random(seed), os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(true(path), key=lambda _: rng.random()))
    assert moved_to_val(tree, 3) == expected


@pytest.mark.parametrize("seed", range(10))
def test_a_patient_in_both_classes_moves_with_all_images(tmp_path, seed):
    root = make_tree(tmp_path / "data", 6)
    for name in CLASSES:
        add_files(root / "train" / name, ["person77_virus_0.jpeg", "person77_virus_1.jpeg"])
    moved = moved_to_val(root, 5, seed)
    counts = [sum(file.startswith("person77_") for file in moved[name]) for name in CLASSES]
    assert counts in ([0, 0], [2, 2])


def test_whole_patients_that_do_not_fit_give_fewer_images_or_are_refused(tmp_path, capsys):
    add_files(tmp_path / "train/NORMAL", [f"IM-1-{i}.jpeg" for i in range(5)])
    add_files(tmp_path / "train/PNEUMONIA", [f"person{i}_virus_{i}.jpeg" for i in range(6)])
    message = split_refused(tmp_path, capsys, "--per-class", 3)
    assert "--per-class 3: " in message and "7 patients in train/" in message
    shutil.rmtree(tmp_path / "train/NORMAL")
    add_files(tmp_path / "train/NORMAL", [f"IM-{i // 2}-{i}.jpeg" for i in range(6)])
    assert run_split(tmp_path, "--per-class", 3) == 0
    error = capsys.readouterr().err
    assert "2 NORMAL and 3 PNEUMONIA" in error and "not 3" in error
    assert sizes(tmp_path) == [2, 3]


def test_images_of_unknown_patients_count_as_patients_and_are_counted(tmp_path, capsys):
    for name in CLASSES:
        add_files(tmp_path / "train" / name, [f"scan {i} \u00e9.png" for i in range(5)])
    assert run_split(tmp_path, "--per-class", 2) == 0
    error = capsys.readouterr().err
    assert "images in train/ without a known patient: 10" in error and "patient_id" in error
    assert sizes(tmp_path) == [2, 2]


@pytest.mark.parametrize("asked", [12, 13, 10**6])
def test_more_images_than_there_are_is_refused_with_a_number_that_works(tree, capsys, asked):
    message = split_refused(tree, capsys, "--per-class", asked)
    assert "has 12 NORMAL and 12 PNEUMONIA images" in message
    assert "--per-class 4 (make: PER_CLASS=4)" in message


def test_a_second_run_moves_nothing_and_undo_restores_all(tree, capsys):
    before = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    assert capsys.readouterr().out.startswith("Moved 5 NORMAL and 5 PNEUMONIA images of ")
    record = read_json(tree / "split_val.json")
    moved = names_in(tree, "val")
    expected = {"classes": list(CLASSES), "seed": 0, "per_class": 5, "moved": moved}
    assert record == expected | {"patients": record["patients"]}
    splits = Counter(
        xray.split for xray in read_split(tree, "train", "val", "test", classes=CLASSES)
    )
    assert splits == {"train": 14, "val": 10, "test": 8}
    after = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    assert "already split, 5 NORMAL and 5 PNEUMONIA images in val/" in capsys.readouterr().out
    assert snapshot(tree) == after
    assert run_split(tree, "--undo") == 0
    assert "Moved 10 images back" in capsys.readouterr().out
    assert run_split(tree, "--undo") == 0
    assert "no split to undo" in capsys.readouterr().out
    assert snapshot(tree) == before


def test_the_default_moves_a_third_without_a_warning_also_when_it_runs_twice(tmp_path, capsys):
    root = make_tree(tmp_path / "data", 60, 4)
    for _ in range(2):
        assert run_split(root) == 0
        assert capsys.readouterr().err == ""
        assert sizes(root) == [20, 20]


def test_a_split_of_few_patients_says_what_a_perfect_result_would_be_worth(tmp_path, capsys):
    add_files(tmp_path / "train/NORMAL", [f"IM-{i}-{i}.jpeg" for i in range(60)])
    add_files(tmp_path / "train/PNEUMONIA", [f"person{i}_virus_{i}.jpeg" for i in range(20, 40)])
    assert run_split(tmp_path, "--test", 0.2, "--per-class", 10) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "few patients in test/ (12 NORMAL and 4 PNEUMONIA): with 4 patients, an acc" in warning
    assert "an accuracy of 1.00 has the interval 0.51 to 1.00. That allows no concl" in warning


@pytest.mark.parametrize("flags", [("--per-class", 4), ("--seed", 9)])
def test_flags_that_ask_for_another_split_are_named_and_defaults_are_not(tree, capsys, flags):
    assert run_split(tree, "--per-class", 5, "--seed", 3) == 0
    after = snapshot(tree)
    capsys.readouterr()
    assert run_split(tree) == 0
    assert capsys.readouterr().err == ""
    assert run_split(tree, *flags) == 0
    screen = capsys.readouterr()
    assert "already split" in screen.out
    assert "split with --per-class 5 --seed 3; this split stays" in screen.err
    assert "--undo" in screen.err
    assert snapshot(tree) == after


def test_a_val_that_came_with_the_data_is_left_alone_and_undo_takes_it_back(tree, capsys):
    for name in CLASSES:
        add_files(tree / "val" / name, [f"person{500 + i}_bacteria_{i}.jpeg" for i in range(8)])
    before = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    screen = capsys.readouterr()
    assert "came with the data (8 NORMAL and 8 PNEUMONIA images) and is not changed" in screen.out
    assert "few images" in screen.err and "--undo" in screen.err
    assert snapshot(tree) == before
    taken = tree / "train" / "NORMAL" / "person500_bacteria_0.jpeg"
    taken.write_bytes(b"another")
    assert "exists already" in split_refused(tree, capsys, "--undo")
    taken.unlink()
    assert run_split(tree, "--undo") == 0
    assert sizes(tree, "train") == [20, 20]
    assert not (tree / "val").exists() and not (tree / "split_val.json").exists()
    assert run_split(tree, "--per-class", 5) == 0
    assert sizes(tree) == [5, 5]


@pytest.mark.parametrize("twin", ["test/NORMAL", "train/PNEUMONIA"])
def test_the_same_file_in_two_folders_is_refused_before_anything_moves(tree, capsys, twin):
    shutil.copy(tree / "train" / "NORMAL" / "IM-0000-0000.jpeg", tree / twin / "IM-77-0.jpeg")
    assert "the same file as" in split_refused(tree, capsys, "--per-class", 5)


def test_a_name_that_is_taken_is_refused_before_anything_moves(tree, capsys):
    file = moved_to_val(tree, 5)["PNEUMONIA"][-1]
    taken = tree / "val" / "PNEUMONIA" / file
    taken.mkdir(parents=True)  # no image, so val/ is empty
    assert "exists already" in split_refused(tree, capsys, "--per-class", 5)
    taken.rmdir()
    assert run_split(tree, "--per-class", 5) == 0
    (tree / "train" / "PNEUMONIA" / file).write_bytes(b"another")
    assert f"{file}: exists already" in split_refused(tree, capsys, "--undo")
    assert f"{file}: exists already" in split_refused(tree, capsys, "--per-class", 5)


def test_undo_names_what_is_gone_and_leaves_what_it_did_not_bring(tree, capsys):
    add_files(tree / "val", ["NORMAL/.DS_Store", "PNEUMONIA/.DS_Store"])  # as good as empty
    assert run_split(tree, "--per-class", 5) == 0
    assert sizes(tree) == [5, 5]
    capsys.readouterr()
    gone = tree / "val" / "NORMAL" / names_in(tree, "val")["NORMAL"][2]
    gone.unlink()
    (tree / "val" / "PNEUMONIA" / "mine.png").write_bytes(b"mine")
    assert run_split(tree, "--per-class", 5) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert gone.name in warning and "gone (1 " in warning
    assert run_split(tree, "--undo") == 0
    screen = capsys.readouterr()
    assert "Moved 9 images back" in screen.out and warning in screen.err
    assert "1 images in" in screen.err and "stay there" in screen.err
    assert (tree / "val" / "PNEUMONIA" / "mine.png").read_bytes() == b"mine"
    assert all((tree / "val" / name / ".DS_Store").exists() for name in CLASSES)


@pytest.mark.parametrize("folder", ["", "train/NORMAL", "train/PNEUMONIA"])
def test_a_read_only_folder_is_refused_with_the_flags_for_links(tree, capsys, monkeypatch, folder):
    with monkeypatch.context() as patch:  # a stand-in: root, as tests may run, can write everywhere
        patch.setattr(os, "access", lambda path, mode: Path(path) != tree / folder)
        message = split_refused(tree, capsys, "--per-class", 5)
    assert f"{tree / folder}: not writable" in message
    assert f"--link-from {tree}" in message and f"LINK_FROM={tree}" in message
    assert run_split(tree, "--per-class", 5) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run_split(tree, "--per-class", 5) == 0  # it is split already
    assert "not writable" in split_refused(tree, capsys, "--undo")


def test_a_rename_across_file_systems_loses_nothing_and_can_be_undone(tree, capsys, monkeypatch):
    before = snapshot(tree)

    def across(old, new):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(old), None, str(new))

    monkeypatch.setattr(os, "rename", across)
    assert run_split(tree, "--per-class", 5) == 2
    assert "on another file system" in capsys.readouterr().err
    assert run_split(tree, "--undo") == 0
    assert snapshot(tree) == before


def test_a_half_finished_split_is_no_training_data(tree, capsys):
    assert run_split(tree, "--per-class", 5) == 0
    file = names_in(tree, "val")["NORMAL"][0]
    (tree / "val" / "NORMAL" / file).rename(tree / "train" / "NORMAL" / file)
    with pytest.raises(Failure, match=r"to complete it, run split_val\.py"):
        read_split(tree, "train", "val", classes=CLASSES)
    assert "to complete it, run split_val.py" in split_refused(tree, capsys, "--check")
    assert run_split(tree) == 0
    assert sizes(tree) == [5, 5]


def test_a_source_of_links_without_images_or_another_one_is_refused(tree, tmp_path, capsys):
    links = tmp_path / "links"
    message = split_refused(links, capsys, "--link-from", tree / "test" / "NORMAL")
    assert "--link-from DIR (make: LINK_FROM=DIR)" in message and not links.exists()
    assert run_split(links, "--link-from", tree) == 0
    other = shutil.copytree(tree, tmp_path / "other")
    assert f"is not a link to {other}" in split_refused(links, capsys, "--link-from", other)


def test_links_to_images_that_are_links_themselves_are_recognised_in_a_second_run(tree, tmp_path):
    store = tmp_path / "store"  # as git-annex and DVC keep files
    store.mkdir()
    for i, path in enumerate(sorted(tree.glob("*/*/*"))):
        path.rename(store / str(i))
        path.symlink_to(store / str(i))
    for _ in range(2):
        assert run_split(tmp_path / "links", "--link-from", tree) == 0
        assert sizes(tmp_path / "links") == [4, 4]


@pytest.fixture(params=["val", "test and val"])
def campaign(request, fuzz, tmp_path):
    """(folder, flags, the same folder split, all ways to undo it): few images.

    With --fuzz, it has as many images as the real data.
    """
    if request.param == "val":
        n, undos = fuzz.count(2, 50), [["--undo"]]
        start, flags = make_tree(tmp_path / "start", 3 * n, 2), ["--per-class", n]
    else:
        n, undos = fuzz.count(1, 50), [["--undo"], ["--undo", "test"]]
        start, flags = make_tree(tmp_path / "start", 3 * n), ["--per-class", n, "--test", n]
    done = fresh_copy(start, tmp_path / "done")
    assert run_split(done, *flags) == 0
    return start, flags, done, list(itertools.permutations(undos))


def test_a_run_killed_at_any_system_call_is_completed_or_taken_back(campaign, tmp_path):
    start, flags, done, orders = campaign
    folder, half = tmp_path / "data", tmp_path / "half"

    def die(points, command):
        fail_at(setattr, points // 2, None, after=points % 2)
        return run_split(folder, *command)

    for command in (flags, *orders[0]):
        for points in itertools.count():
            fresh_copy(start if command is flags else done, folder)
            child = fork(die, points, command)
            child.join()
            if child.exitcode == 0:
                break
            assert child.exitcode == 9
            names = sorted(path.name for path in folder.rglob("*.jpeg"))
            assert names == sorted(path.name for path in start.rglob("*.jpeg"))  # all, and once
            for order in orders:
                fresh_copy(folder, half)
                assert [run_split(half, *undo) for undo in order] == [0] * len(order)
                assert snapshot(half) == snapshot(start)
            assert run_split(folder, *flags) == 0
            assert snapshot(folder) == snapshot(done)
        assert points >= 2 * (2 * flags[1] + 8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_of_any_system_call_is_one_line_and_the_next_run_completes(
    campaign, tmp_path, capsys, monkeypatch, number
):
    start, flags, done, orders = campaign
    for command in (flags, *orders[0]):
        source = start if command is flags else done
        expected = fresh_copy(source, tmp_path / "expected")
        assert run_split(expected, *command) == 0
        for failing in itertools.count():
            folder = fresh_copy(source, tmp_path / "data")
            fault = OSError(number, os.strerror(number), str(folder))
            capsys.readouterr()
            with monkeypatch.context() as patch:
                counter = fail_at(patch.setattr, failing, fault)
                status = run_split(folder, *command)
            lines = capsys.readouterr().err.splitlines()
            errors = [line for line in lines if not line.startswith("warning: ")]
            assert status in (0, 2, 4) and len(errors) == (status > 0)
            assert run_split(folder, *command) == 0
            assert files(folder) == files(expected)
            assert not [*folder.rglob("*.tmp")]
            if next(counter) <= failing:
                break


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ctrl_c_between_two_files_says_how_to_go_on(campaign, capsys, monkeypatch, stop, status):
    start, flags, done, _ = campaign
    with monkeypatch.context() as patch:
        fail_at(patch.setattr, 3, stop, calls=("rename",))
        assert run_split(start, *flags) == status
    assert "every image is complete. Run the same command again" in capsys.readouterr().err
    assert run_split(start, *flags) == 0
    assert snapshot(start) == snapshot(done)


def test_four_at_once_split_once(campaign, tmp_path, fuzz):
    start, flags, done, _ = campaign
    folder = tmp_path / "race"

    def race(gate, end):
        os.close(end)
        os.read(gate, 1)  # returns when the parent closes its end: all start together
        return run_split(folder, *flags)

    for _ in range(fuzz.count(10, 200)):
        fresh_copy(start, folder)
        gate, end = os.pipe()
        children = [fork(race, gate, end) for _ in range(4)]
        os.close(end)
        for child in children:
            child.join()
            assert child.exitcode == 0
        os.close(gate)
        assert snapshot(folder) == snapshot(done)


def test_two_processes_never_hold_the_lock_at_once_although_its_file_is_deleted(tree, fuzz):
    counts, before = fuzz.count(50, 5000), snapshot(tree)

    def hold():
        for _ in range(counts):
            with lock(tree):
                os.close(os.open(tree / "held", os.O_CREAT | os.O_EXCL))  # fails if it exists
                os.unlink(tree / "held")
        return 0

    children = [fork(hold) for _ in range(8)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert snapshot(tree) == before


def test_a_run_waits_for_another_one_and_says_so_at_once(tree, capsys):
    ready, locked = os.pipe()
    gate, end = os.pipe()

    def hold():
        os.close(end)
        with lock(tree):
            os.write(locked, b"x")
            os.read(gate, 1)  # returns when the parent closes its end
        return 0

    child = fork(hold)
    os.read(ready, 1)
    out = []

    def release():
        out.append(capsys.readouterr().out)
        os.close(end)

    threading.Timer(0.3, release).start()
    assert run_split(tree) == 0
    assert out == [f"{tree}: waiting for another split_val.py to finish\n"]
    child.join()
    assert sizes(tree) == [4, 4] and not (tree / LOCK_FILE).exists()
    for descriptor in (ready, locked, gate):
        os.close(descriptor)


def test_the_lock_file_of_a_killed_run_blocks_nobody_and_the_next_run_deletes_it(tree, capsys):
    def die():
        fail_at(setattr, 2, None, calls=("rename",))
        return run_split(tree)

    child = fork(die)
    child.join()
    assert child.exitcode == 9 and (tree / LOCK_FILE).exists()
    assert run_split(tree) == 0
    assert "waiting" not in capsys.readouterr().out
    assert sizes(tree) == [4, 4] and not (tree / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_locked_is_split_with_a_warning(tree, capsys, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run_split(tree) == 0
    warning, _ = capsys.readouterr().err.splitlines()  # the other one: few patients
    assert f"{tree}: cannot be locked ({os.strerror(number)}); run one split_val.py" in warning
    assert sizes(tree) == [4, 4] and not (tree / LOCK_FILE).exists()


def test_the_check_of_a_folder_that_may_only_be_read_takes_no_lock(data, capsys, monkeypatch):
    before = snapshot(data)
    # A stand-in: root, as tests may run, can write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    monkeypatch.setattr(cxr.moves, "FileLock", None)
    assert run_split(data, "--check") == 0
    assert capsys.readouterr().err == "" and snapshot(data) == before


def test_a_damaged_record_is_refused_or_changes_nothing(tree, tmp_path, fuzz, capsys):
    start = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    record = (tree / "split_val.json").read_bytes()
    refusals, rounds = 0, fuzz.count(30, 300)
    for _ in range(rounds):
        folder = fresh_copy(tree, tmp_path / "damaged")
        what, content = damage(fuzz.rng, record)
        (folder / "split_val.json").write_bytes(content)
        before = snapshot(folder)
        capsys.readouterr()
        statuses = run_split(folder, "--per-class", 5), run_split(folder, "--undo")
        assert statuses in ((0, 0), (2, 2)), what
        assert snapshot(folder) == (start if statuses[1] == 0 else before)
        refusals += statuses[0] == 2
        assert all(len(line) < 500 for line in capsys.readouterr().err.splitlines())
    assert refusals > 0.8 * rounds
