"""split_val.py: the choice of patients, and the moves under every fault."""

import errno
import itertools
import os
import random
import shutil
from pathlib import Path

import pytest
from faults import put
from helpers import draw_dicoms, make_tree, names_in, run_split, sizes, snapshot, split_refused

import common
import split_val
from cxr.errors import Failure, Terminated
from cxr.files import read_json
from cxr.folders import CLASSES, SPLIT_FILE
from cxr.patients import read_split

# every system call that changes the folder
CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")


def files_of(folder):
    return {path: content for path, content in snapshot(folder).items() if content is not None}


# ---------------------------------------------------------------- the choice of patients


def test_no_patient_is_ever_on_both_sides_and_each_class_gets_what_was_asked(tree):
    train = read_split(tree, "train")["train"]
    choices = set()
    for seed in range(50):
        moved = split_val.choose_patients(train, 5, seed)
        assert [len(moved[name]) for name in CLASSES] == [5, 5]
        sides = [set(), set()]
        for image in train:
            sides[image.path.name in moved[CLASSES[image.label]]].add(image.group)
        assert not sides[0] & sides[1]
        choices.add(str(moved))
    assert len(choices) > 40


def test_the_choice_does_not_depend_on_the_machine_or_the_order_of_the_folder(tree, monkeypatch):
    expected = {
        "NORMAL": ["IM-0001-0001.jpeg", "IM-0003-0004.jpeg", "IM-0006-0008.jpeg"],
        "PNEUMONIA": ["person4_virus_5.jpeg", "person6_virus_8.jpeg", "person7_virus_9.jpeg"],
    }
    listdir = os.listdir
    for seed in range(5):
        rng = random.Random(seed)

        def shuffled(path, rng=rng):
            found = listdir(path)
            return rng.sample(found, len(found))

        monkeypatch.setattr(os, "listdir", shuffled)
        assert split_val.plan_split(tree, 3, 0)["moved"] == expected


def test_a_patient_in_both_classes_moves_with_all_images(tmp_path):
    root = make_tree(tmp_path / "data", 6)
    for name in CLASSES:
        for i in range(2):
            file = root / "train" / name / f"person77_virus_{i}.jpeg"
            file.write_bytes(f"{name} {i}".encode())
    for seed in range(10):
        moved = split_val.plan_split(root, 5, seed)["moved"]
        together = {sum(f.startswith("person77_") for f in moved[name]) for name in CLASSES}
        assert len(together) == 1


def make_patients(root, normal, pneumonia):
    """Images 0, 1, ... of the patients named by the lists, one number an image."""
    for name, pattern, patients in (
        ("NORMAL", "IM-{}-{}.jpeg", normal),
        ("PNEUMONIA", "person{}_virus_{}.jpeg", pneumonia),
    ):
        (root / "train" / name).mkdir(parents=True)
        for i, patient in enumerate(patients):
            file = root / "train" / name / pattern.format(patient, i)
            file.write_bytes(f"{name} {i}".encode())


def test_patients_that_allow_no_exact_choice_give_less_and_a_warning(tmp_path, capsys):
    make_patients(tmp_path, [0, 0, 1, 1, 2, 2], range(6))
    assert run_split(tmp_path, "--per-class", 3) == 0
    error = capsys.readouterr().err
    assert "whole patients give 2 NORMAL and 3 PNEUMONIA images, not 3 of each" in error
    assert sizes(tmp_path) == [2, 3]


def test_images_of_one_patient_only_are_refused(tmp_path, capsys):
    make_patients(tmp_path, [1] * 5, range(5))
    assert "no choice is that small" in split_refused(tmp_path, capsys, "--per-class", 3)


def test_names_that_tell_no_patient_count_as_patients_and_are_counted(tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(5):
            file = tmp_path / "train" / name / f"scan {i} \u00e9.png"
            file.write_bytes(f"{name}{i}".encode())
    assert run_split(tmp_path, "--per-class", 2) == 0
    assert "10 names in train/ tell no patient" in capsys.readouterr().err
    assert sizes(tmp_path) == [2, 2]


@pytest.mark.parametrize("asked", [12, 13, 10**6])
def test_more_images_than_there_are_is_refused(tree, capsys, asked):
    found = split_refused(tree, capsys, "--per-class", asked)
    assert "has 12 NORMAL and 12 PNEUMONIA images" in found


def test_own_data_are_split_without_a_warning_and_too_much_names_what_works(data, capsys):
    shutil.rmtree(data / "val")
    assert split_val.main(["--data-dir", str(data), "--per-class", "40"]) == 2
    assert "as --per-class 6 (make: PER_CLASS=6)" in capsys.readouterr().err
    for _ in range(2):
        assert split_val.main(["--data-dir", str(data)]) == 0
        page = capsys.readouterr()
        assert not page.err
    assert "already split, 6 NORMAL and 6 PNEUMONIA images in val/" in page.out


# ---------------------------------------------------------------- runs


def test_a_second_run_moves_nothing_and_undo_restores_the_identical_tree(tree, capsys):
    before = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    assert capsys.readouterr().out.startswith("Moved 5 NORMAL and 5 PNEUMONIA images of ")
    record = read_json(tree / SPLIT_FILE)
    moved = names_in(tree, "val")
    assert record == {"seed": 0, "per_class": 5, "moved": moved, "patients": record["patients"]}
    assert len(read_split(tree, "train", "val", "test")["val"]) == 10
    after = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    assert "already split, 5 NORMAL and 5 PNEUMONIA images in val/" in capsys.readouterr().out
    assert snapshot(tree) == after
    assert run_split(tree, "--undo") == 0
    assert "Moved 10 images back" in capsys.readouterr().out
    assert snapshot(tree) == before
    assert run_split(tree, "--undo") == 0
    assert "nothing to undo" in capsys.readouterr().out
    assert snapshot(tree) == before


def test_flags_that_ask_for_another_split_are_named_and_defaults_are_not(tree, capsys):
    assert run_split(tree, "--per-class", 5, "--seed", 3) == 0
    after = snapshot(tree)
    capsys.readouterr()
    assert run_split(tree) == 0
    assert capsys.readouterr().err == ""
    for flags in (("--per-class", 4), ("--seed", 9)):
        assert run_split(tree, *flags) == 0
        said = capsys.readouterr()
        assert "already split" in said.out
        assert "split with --per-class 5 --seed 3, which stays" in said.err and "--undo" in said.err
    assert snapshot(tree) == after


def test_a_val_that_came_with_the_data_is_left_alone_and_undo_takes_it_back(tree, capsys):
    for name in CLASSES:
        (tree / "val" / name).mkdir(parents=True)
        for i in range(8):
            file = tree / "val" / name / f"person{500 + i}_bacteria_{i}.jpeg"
            file.write_bytes(f"val {name} {i}".encode())
    before = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    said = capsys.readouterr()
    assert "came with the data (8 NORMAL and 8 PNEUMONIA images) and is left alone" in said.out
    assert "lottery" in said.err and "--undo" in said.err
    assert snapshot(tree) == before
    taken = tree / "train" / "NORMAL" / "person500_bacteria_0.jpeg"
    taken.write_bytes(b"another")
    assert "exists already" in split_refused(tree, capsys, "--undo")
    taken.unlink()
    assert run_split(tree, "--undo") == 0
    assert sizes(tree, "train") == [20, 20]
    assert not (tree / "val").exists() and not (tree / SPLIT_FILE).exists()
    assert run_split(tree, "--per-class", 5) == 0
    assert sizes(tree) == [5, 5]


def test_empty_val_folders_count_as_none_and_what_else_is_in_them_stays(tree):
    for name in CLASSES:
        (tree / "val" / name).mkdir(parents=True)
        (tree / "val" / name / ".DS_Store").write_bytes(b"junk")
    assert run_split(tree, "--per-class", 3) == 0
    assert sizes(tree) == [3, 3]
    assert run_split(tree, "--undo") == 0
    assert (tree / "val" / "NORMAL" / ".DS_Store").exists()


@pytest.mark.parametrize("twin", ["test/NORMAL", "train/PNEUMONIA"])
def test_the_same_file_in_two_folders_is_refused_before_anything_moves(tree, capsys, twin):
    shutil.copy(tree / "train" / "NORMAL" / "IM-0000-0000.jpeg", tree / twin / "IM-77-0.jpeg")
    assert "the same file as" in split_refused(tree, capsys, "--per-class", 5)


def test_a_file_at_the_destination_is_refused_before_anything_moves(tree, capsys):
    file = split_val.plan_split(tree, 5, 0)["moved"]["PNEUMONIA"][-1]
    (tree / "val" / "PNEUMONIA" / file).mkdir(parents=True)  # no image, so val/ is empty
    assert "exists already" in split_refused(tree, capsys, "--per-class", 5)


def test_a_name_that_is_taken_again_is_refused(tree, capsys):
    assert run_split(tree, "--per-class", 5) == 0
    file = names_in(tree, "val")["NORMAL"][2]
    (tree / "train" / "NORMAL" / file).write_bytes(b"another")
    assert f"{file}: exists already" in split_refused(tree, capsys, "--undo")
    assert f"{file}: exists already" in split_refused(tree, capsys, "--per-class", 5)


def test_undo_names_what_is_gone_and_leaves_what_it_did_not_bring(tree, capsys):
    assert run_split(tree, "--per-class", 5) == 0
    gone = tree / "val" / "NORMAL" / names_in(tree, "val")["NORMAL"][2]
    gone.unlink()
    (tree / "val" / "PNEUMONIA" / "mine.png").write_bytes(b"mine")
    assert run_split(tree, "--per-class", 5) == 0
    assert f"{gone.name}: gone since the split (1 such images)" in capsys.readouterr().err
    assert run_split(tree, "--undo") == 0
    said = capsys.readouterr()
    assert "Moved 9 images back" in said.out
    assert f"{gone.name}: gone since the split" in said.err
    assert "1 images in" in said.err and "stay there" in said.err
    assert (tree / "val" / "PNEUMONIA" / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize("folder", ["", "train/NORMAL", "train/PNEUMONIA"])
def test_a_read_only_folder_is_refused_before_anything_moves(tree, capsys, monkeypatch, folder):
    # a stand-in: root, which the tests may run as, can write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tree / folder)
    assert f"{tree / folder}: not writable" in split_refused(tree, capsys, "--per-class", 5)


def test_a_finished_split_in_a_read_only_folder_is_still_a_split(tree, capsys, monkeypatch):
    assert run_split(tree, "--per-class", 5) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run_split(tree, "--per-class", 5) == 0
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
    with pytest.raises(Failure, match=r"run split_val\.py again"):
        read_split(tree, "train", "val")
    assert "run split_val.py again" in split_refused(tree, capsys, "--check")
    assert run_split(tree) == 0
    assert sizes(tree) == [5, 5]


def test_where_the_system_has_no_flock_the_split_works_without(tree, monkeypatch):
    monkeypatch.setattr(split_val, "fcntl", None)
    assert run_split(tree, "--per-class", 5) == 0
    assert run_split(tree, "--undo") == 0


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(common.os, "fsync", lambda file: refuse(file) if is_folder(file) else None)
    is_folder = lambda file: os.path.isdir(f"/proc/self/fd/{file}")  # noqa: E731
    for i, name in enumerate(CLASSES):
        for j in range(6):
            put(tmp_path / "train" / name / f"IM-{i}{j}-1.jpeg", f"{i}{j}".encode())
    for more in ([], ["--undo"]):
        assert split_val.main(["--data-dir", str(tmp_path), *more]) == 0


# ---------------------------------------------------------------- links


def test_a_folder_that_cannot_be_written_names_the_way_of_links(tmp_path, capsys, monkeypatch):
    draw_dicoms(tmp_path / "data", 4)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert split_val.main(["--data-dir", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert f"--link-from {tmp_path / 'data'}" in error and "LINK_FROM=" in error


def test_links_into_another_source_are_not_taken_for_those_asked_for(data, tmp_path, capsys):
    shutil.rmtree(data / "val")
    shutil.copytree(data, other := tmp_path / "other")
    links = tmp_path / "links"
    assert split_val.main(["--data-dir", str(links), "--link-from", str(data)]) == 0
    assert split_val.main(["--data-dir", str(links), "--link-from", str(other)]) == 2
    assert f"is no link to {other}" in capsys.readouterr().err
    again = "--data-dir", str(tmp_path / "again")
    assert split_val.main([*again, "--link-from", str(tmp_path)]) == 2
    assert "see --link-from" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_links_to_images_that_are_links_themselves_are_known_again(data, tmp_path):
    shutil.rmtree(data / "val")
    store = tmp_path / "store"  # as git-annex and DVC keep files
    store.mkdir()
    for i, path in enumerate(sorted(data.glob("*/*/*"))):
        shutil.move(path, store / str(i))
        path.symlink_to(store / str(i))
    for _ in range(2):
        words = ["--data-dir", tmp_path / "links", "--link-from", data]
        assert split_val.main([str(word) for word in words]) == 0


# ---------------------------------------------------------------- faults


def die_at(number, after, folder, *flags):
    """Runs split_val in a child, killed before or after system call `number`; True if it was."""
    child = os.fork()
    if child == 0:
        counter = itertools.count()

        def mortal(call):
            def wrapper(*args, **options):
                mine = next(counter) == number
                if mine and not after:
                    os._exit(9)
                try:
                    return call(*args, **options)
                finally:
                    if mine:
                        os._exit(9)

            return wrapper

        status = 1
        try:
            for name in CALLS:
                setattr(os, name, mortal(getattr(os, name)))
            status = run_split(folder, *flags)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.fixture
def campaign(request, tmp_path):
    """(folder, its flags, that folder split): few images, with --fuzz as many as the real data."""
    train, count = (150, 50) if request.config.option.fuzz else (6, 2)
    start, flags = make_tree(tmp_path / "start", train, 2), ("--per-class", count)
    done = fresh_copy(start, tmp_path / "done")
    assert run_split(done, *flags) == 0
    return start, flags, done


def fresh_copy(source, folder):
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


@pytest.mark.parametrize("verb", ["split", "undo"])
def test_a_run_killed_at_any_system_call_is_completed_or_taken_back(campaign, tmp_path, verb):
    start, flags, done = campaign
    untouched, finished = snapshot(start), snapshot(done)
    source, killed = (start, flags) if verb == "split" else (done, ("--undo",))
    for points in itertools.count():
        folder = fresh_copy(source, tmp_path / "data")
        if not die_at(*divmod(points, 2), folder, *killed):
            break
        half = fresh_copy(folder, tmp_path / "half")
        files = sorted(path.name for path in half.rglob("*.jpeg"))
        assert files == sorted(path.name for path in start.rglob("*.jpeg"))  # each is there, once
        assert run_split(folder, *flags) == 0
        assert snapshot(folder) == finished
        assert run_split(half, "--undo") == 0
        assert snapshot(half) == untouched
    assert points >= 2 * (2 * flags[1] + 8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("verb", ["split", "undo"])
def test_an_error_of_any_system_call_is_one_line_and_the_next_run_completes(
    campaign, tmp_path, capsys, monkeypatch, verb, number
):
    start, flags, done = campaign
    source, expected = (start, done) if verb == "split" else (done, start)
    flags = flags if verb == "split" else ("--undo",)
    for failing in itertools.count():
        folder, counter = fresh_copy(source, tmp_path / "data"), itertools.count()

        def failing_at(call, counter=counter, failing=failing):
            def wrapper(*args, **options):
                if next(counter) == failing:
                    raise OSError(number, os.strerror(number), str(args[0]))
                return call(*args, **options)

            return wrapper

        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing_at(getattr(os, name)))
            status = run_split(folder, *flags)
        error = capsys.readouterr().err
        assert status in (0, 2, 4) and len(error.splitlines()) == (status > 0)
        assert run_split(folder, *flags) == 0
        assert files_of(folder) == files_of(expected)
        if next(counter) <= failing:
            break


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ctrl_c_between_two_files_says_how_to_go_on(campaign, capsys, monkeypatch, stop, status):
    start, flags, done = campaign
    rename, counter = os.rename, itertools.count()

    def interrupted(old, new):
        if next(counter) == 3:
            raise stop
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        assert run_split(start, *flags) == status
    error = capsys.readouterr().err
    assert "every image is whole, run the same command again to complete it" in error
    assert run_split(start, *flags) == 0
    assert snapshot(start) == snapshot(done)


def test_four_at_once_split_once(campaign, tmp_path, request):
    start, flags, done = campaign
    finished = snapshot(done)
    for _ in range(200 if request.config.option.fuzz else 10):
        folder = fresh_copy(start, tmp_path / "race")
        gate, end = os.pipe()
        children = []
        for _ in range(4):
            if (child := os.fork()) == 0:
                os.close(end)
                os.read(gate, 1)  # returns when the parent closes its end: all start together
                status = 1
                try:
                    status = run_split(folder, *flags)
                finally:
                    os._exit(status)
            children.append(child)
        os.close(end)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(gate)
        assert statuses == [0] * 4
        assert snapshot(folder) == finished


def test_a_damaged_record_is_refused_or_changes_nothing(tree, tmp_path, request, capsys):
    start = snapshot(tree)
    assert run_split(tree, "--per-class", 5) == 0
    rng, whole = random.Random(request.config.option.fuzz_seed), (tree / SPLIT_FILE).read_bytes()
    refusals, rounds = 0, 300 if request.config.option.fuzz else 30
    for number in range(rounds):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        if number % 3 == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif number % 3 == 1:
            data[at : at + 16] = rng.randbytes(16)
        else:
            del data[at:]
        folder = fresh_copy(tree, tmp_path / "damaged")
        (folder / SPLIT_FILE).write_bytes(data)
        before = snapshot(folder)
        capsys.readouterr()
        statuses = run_split(folder, "--per-class", 5), run_split(folder, "--undo")
        assert statuses in ((0, 0), (2, 2)), bytes(data)
        assert snapshot(folder) == (start if statuses[1] == 0 else before)
        refusals += statuses[0] == 2
        assert all(len(line) < 500 for line in capsys.readouterr().err.splitlines())
    assert refusals > 0.8 * rounds
