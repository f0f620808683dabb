"""split_val.py: the choice, the moves under every fault, and what --check finds."""

import errno
import hashlib
import io
import itertools
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from phantoms import draw_folder
from PIL import Image, ImageEnhance

import common
import split_val
from common import CLASSES, SPLIT_FILE

CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")  # every system call that changes the folder


def make_tree(root, train, test=0):
    """A data folder of files that need not be images: nothing but --check decodes them. Some patients have two."""
    for split, count in (("train", train), ("test", test))[: 1 + (test > 0)]:
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                patient = 2 * (i // 4) + min(i % 4, 1)  # of four images three are of one patient
                patient += 10000 * (split == "test")
                file = f"person{patient}_virus_{i}.jpeg" if label else f"IM-{patient:04d}-{i:04d}.jpeg"
                (folder / file).write_bytes(f"{split} {name} {i}".encode())
    return root


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "data", 12, 4)


def run(folder, *flags):
    return split_val.main(["--data-dir", str(folder), *map(str, flags)])


def snapshot(folder):
    """{relative path: content, None for a folder} of everything below `folder`."""
    paths = sorted(Path(folder).rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def names(folder, split):
    return {name: sorted(path.name for path in (folder / split / name).iterdir()) for name in CLASSES}


def refused(folder, capsys, *flags):
    """The one line on stderr of a run that exits 2 and leaves everything as it was."""
    before = snapshot(folder)
    capsys.readouterr()
    assert run(folder, *flags) == 2
    assert snapshot(folder) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------- the choice


def test_every_name_of_the_reference_data_tells_its_patient(xrays_source):
    counts = {}
    for path in sorted(xrays_source.rglob("*.jpeg")):
        strict, cautious = common.patient_of(path.name), common.patient_of(path.name, cautious=True)
        assert path.name.startswith(strict) and strict.startswith(cautious)
        counts.setdefault(f"{path.parts[-3]}/{path.parts[-2]}", set()).add(strict)
    assert {folder: len(patients) for folder, patients in counts.items()} == {
        "train/NORMAL": 148,
        "train/PNEUMONIA": 148,
        "test/NORMAL": 50,
        "test/PNEUMONIA": 43,
    }
    assert common.patient_of("person447_virus_921_1.jpeg") == "person447_virus"
    assert common.patient_of("scan.jpeg") is None


def test_the_choice_is_the_best_that_any_choice_could_be():
    rng = random.Random(0)
    exact = 0
    for _ in range(300):
        n = rng.randint(1, 6)
        shapes = [(1, 0), (0, 1), (2, 0), (0, 3), (1, 1), (2, 1), (n, n), (n + 1, 0), (0, 5)]
        sizes = [rng.choice(shapes) for _ in range(rng.randint(1, 8))]
        chosen, total = split_val.choose_groups(sizes, n)
        taken = {}  # every total that is possible: the choices that give it, as rows of taken (1) or not (0)
        for row in itertools.product((0, 1), repeat=len(sizes)):
            found = tuple(sum(size[label] for size, each in zip(sizes, row, strict=True) if each) for label in (0, 1))
            if max(found) <= n:
                taken.setdefault(found, []).append(row)
        assert total == max(taken, key=lambda found: (min(found) > 0, sum(found), min(found), found))
        assert total == (n, n) or (n, n) not in taken
        assert tuple(int(i in chosen) for i in range(len(sizes))) == max(taken[total])  # the earliest groups
        exact += total == (n, n)
    assert 50 < exact < 250


def test_no_patient_is_ever_on_both_sides_and_each_class_gets_what_was_asked(xrays_source):
    train = [path for path, _ in common.list_split(xrays_source, "train")]
    for seed in range(30):
        record = split_val.plan_split(xrays_source, 50, seed)
        assert [len(record["moved"][name]) for name in CLASSES] == [50, 50]
        moved = {(name, file) for name in CLASSES for file in record["moved"][name]}
        sides = [set(), set()]
        for path in train:
            side = (path.parent.name, path.name) in moved
            sides[side].add(common.patient_of(path.name, cautious=True))
        assert not sides[0] & sides[1]


def test_seed_0_moves_the_same_hundred_images_on_every_machine(xrays):
    assert run(xrays) == 0
    moved = names(xrays, "val")
    text = "\n".join(f"{name}/{file}" for name in CLASSES for file in moved[name])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a81d31ca607239991f79878c6dde527c677a8b8553a9dd2d47119f637d39d864"
    )
    record = common.read_json(xrays / SPLIT_FILE, {})
    assert (record["format"], record["state"], record["seed"], record["per_class"]) == (1, "done", 0, 50)
    assert record["moved"] == moved
    files = {path.relative_to(xrays).as_posix(): path for path in xrays.rglob("*.jpeg")}
    assert len(files) == 400
    assert record["sha256"] == {file: common.hash_file(path) for file, path in files.items()}
    assert len(common.read_split(xrays, "train", "val")["val"]) == 100


def test_the_choice_depends_on_the_seed_but_not_on_the_order_of_the_folder(tree, monkeypatch):
    plain, other = (split_val.plan_split(tree, 5, seed)["moved"] for seed in (0, 1))
    assert plain != other
    scandir = os.scandir
    for seed in range(5):
        rng = random.Random(seed)
        monkeypatch.setattr(os, "scandir", lambda path, rng=rng: rng.sample(found := list(scandir(path)), len(found)))
        assert split_val.plan_split(tree, 5, 0)["moved"] == plain


def test_a_patient_in_both_classes_moves_with_all_images(tmp_path):
    root = make_tree(tmp_path / "data", 6)
    for name in CLASSES:
        for i in range(2):
            (root / "train" / name / f"person77_virus_{i}.jpeg").write_bytes(f"{name} {i}".encode())
    for seed in range(10):
        moved = split_val.plan_split(root, 5, seed)["moved"]
        assert [len(moved[name]) for name in CLASSES] == [5, 5]
        assert len({sum(file.startswith("person77_") for file in moved[name]) for name in CLASSES}) == 1


def test_groups_that_allow_no_exact_choice_give_the_most_below_it_and_a_warning(tmp_path, capsys):
    root = make_tree(tmp_path / "data", 0)
    for i in range(6):
        (root / "train" / "NORMAL" / f"IM-{i // 2}-{i}.jpeg").write_bytes(b"%d" % i)
        (root / "train" / "PNEUMONIA" / f"person{i}_virus_{i}.jpeg").write_bytes(b"p%d" % i)
    assert run(root, "--per-class", 3) == 0
    assert "give 2 NORMAL and 3 PNEUMONIA images, not 3 of each" in capsys.readouterr().err
    assert [len(files) for files in names(root, "val").values()] == [2, 3]


def test_names_that_tell_no_patient_are_patients_of_their_own_and_are_counted(tmp_path, capsys):
    for name in CLASSES:
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(5):
            (folder / f"scan {i} \u00e9.png").write_bytes(f"{name}{i}".encode())
    assert run(tmp_path, "--per-class", 2) == 0
    assert "10 names in train/ tell no patient" in capsys.readouterr().err
    assert [len(files) for files in names(tmp_path, "val").values()] == [2, 2]


# ---------------------------------------------------------------- runs


def test_a_second_run_moves_nothing_and_undo_restores_the_identical_tree(tree, capsys):
    before = snapshot(tree)
    assert run(tree, "--per-class", 5) == 0
    assert capsys.readouterr().out.startswith("Moved 5 NORMAL and 5 PNEUMONIA images of ")
    after = snapshot(tree)
    assert sorted(map(str, after.values())) != sorted(map(str, before.values()))
    assert run(tree, "--per-class", 5) == 0
    assert "already split" in capsys.readouterr().out
    assert run(tree, "--per-class", 4, "--seed", 9) == 0
    said = capsys.readouterr()
    assert "already split" in said.out
    assert "split with --per-class 5 --seed 0, which stays" in said.err
    assert snapshot(tree) == after
    assert run(tree, "--undo") == 0
    assert snapshot(tree) == before
    assert run(tree, "--undo") == 0
    assert "nothing to undo" in capsys.readouterr().out
    assert snapshot(tree) == before


def test_a_val_that_came_with_the_data_is_left_alone_and_undo_takes_it_back(tree, capsys):
    for name in CLASSES:
        (tree / "val" / name).mkdir(parents=True)
        for i in range(8):
            (tree / "val" / name / f"person{500 + i}_bacteria_{i}.jpeg").write_bytes(f"val {name} {i}".encode())
    before = snapshot(tree)
    assert run(tree, "--per-class", 5) == 0
    said = capsys.readouterr()
    assert "came with the data (8 NORMAL and 8 PNEUMONIA images) and is left alone" in said.out
    assert "lottery" in said.err and "--undo" in said.err
    assert snapshot(tree) == before
    (tree / "train" / "NORMAL" / "person500_bacteria_0.jpeg").write_bytes(b"another")
    assert "exists already" in refused(tree, capsys, "--undo")
    (tree / "train" / "NORMAL" / "person500_bacteria_0.jpeg").unlink()
    assert run(tree, "--undo") == 0
    assert [len(files) for files in names(tree, "train").values()] == [20, 20]
    assert not (tree / "val").exists() and not (tree / SPLIT_FILE).exists()
    assert run(tree, "--per-class", 5) == 0
    assert [len(files) for files in names(tree, "val").values()] == [5, 5]


def test_empty_val_folders_count_as_none(tree):
    for name in CLASSES:
        (tree / "val" / name).mkdir(parents=True)
        (tree / "val" / name / ".DS_Store").write_bytes(b"junk")
    assert run(tree, "--per-class", 3) == 0
    assert [len(common.list_images(tree / "val" / name)) for name in CLASSES] == [3, 3]
    assert run(tree, "--undo") == 0
    assert (tree / "val" / "NORMAL" / ".DS_Store").exists()


def test_junk_files_are_neither_counted_nor_moved(tree):
    junk = [".DS_Store", "Thumbs.db", "desktop.ini", "a.jpeg.part", "._IM-1-1.jpeg", "notes.txt"]
    for name in CLASSES:
        for file in junk:
            (tree / "train" / name / file).write_bytes(b"junk")
        (tree / "train" / name / ".ipynb_checkpoints").mkdir()
        (tree / "train" / name / ".ipynb_checkpoints" / "IM-9-9.jpeg").write_bytes(b"copy")
    assert run(tree, "--per-class", 11) == 0
    for name in CLASSES:
        assert not set(junk) & set(names(tree, "val")[name])
        assert len(names(tree, "val")[name]) == 11


@pytest.mark.parametrize("asked", [12, 13, 10**6])
def test_more_images_than_there_are_is_refused_before_anything_moves(tree, capsys, asked):
    assert "has 12 NORMAL and 12 PNEUMONIA images" in refused(tree, capsys, "--per-class", asked)


def test_images_of_one_patient_only_are_refused(tmp_path, capsys):
    root = make_tree(tmp_path / "data", 0)
    for i in range(5):
        (root / "train" / "NORMAL" / f"IM-1-{i}.jpeg").write_bytes(b"%d" % i)
        (root / "train" / "PNEUMONIA" / f"person{i}_virus_{i}.jpeg").write_bytes(b"p%d" % i)
    assert "no choice of patients is that small" in refused(root, capsys, "--per-class", 3)


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert "train: no such folder" in refused(tmp_path, capsys)


@pytest.mark.parametrize("make", ["val/normal", "val/COVID", "test/normal", "train/.ipynb_checkpoints"])
def test_a_folder_that_is_no_class_is_refused_by_name(tree, capsys, make):
    (tree / make).mkdir(parents=True)
    assert f"{tree / make}: expected only the folders NORMAL and PNEUMONIA" in refused(tree, capsys)


def test_links_and_files_in_the_place_of_folders_are_refused(tree, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tree / "val").symlink_to(tmp_path / "elsewhere")
    assert "found a link or a file" in refused(tree, capsys)
    (tree / "val").unlink()
    (tree / "val").write_bytes(b"")
    assert "found a link or a file" in refused(tree, capsys)
    (tree / "val").unlink()
    (tree / "val").mkdir()
    (tree / "val" / "NORMAL").symlink_to(tmp_path / "elsewhere")
    assert "no links" in refused(tree, capsys)
    (tree / "val" / "NORMAL").unlink()
    (tree / "val" / "NORMAL").write_bytes(b"")
    assert "expected only the folders" in refused(tree, capsys)
    assert "expected only the folders" in refused(tree, capsys, "--undo")


def test_an_image_that_cannot_be_read_is_refused(tree, capsys):
    (tree / "train" / "NORMAL" / "IM-0099-0001.jpeg").symlink_to("nowhere.jpeg")
    assert "IM-0099-0001.jpeg: cannot be read" in refused(tree, capsys, "--per-class", 5)


def test_a_file_at_the_destination_is_refused_before_anything_moves(tree, capsys):
    file = split_val.plan_split(tree, 5, 0)["moved"]["PNEUMONIA"][-1]
    (tree / "val" / "PNEUMONIA" / file).mkdir(parents=True)  # a folder of that name: no image, so val/ is empty
    assert "exists already" in refused(tree, capsys, "--per-class", 5)


def test_undo_refuses_a_name_that_is_taken_again(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    file = names(tree, "val")["NORMAL"][2]
    (tree / "train" / "NORMAL" / file).write_bytes(b"another")
    assert "exists already" in refused(tree, capsys, "--undo")
    assert f"{file}: expected there and no longer in train/" in refused(tree, capsys, "--per-class", 5)


def test_undo_names_what_is_gone_and_leaves_what_it_did_not_bring(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    gone = tree / "val" / "NORMAL" / names(tree, "val")["NORMAL"][2]
    gone.unlink()
    (tree / "val" / "PNEUMONIA" / "mine.png").write_bytes(b"mine")
    assert run(tree, "--per-class", 5) == 0
    assert f"{gone}: gone since the split (1 such images)" in capsys.readouterr().err
    assert run(tree, "--undo") == 0
    said = capsys.readouterr()
    assert "Moved 9 images back" in said.out
    assert f"{gone.name}: gone since the split" in said.err
    assert "1 images in" in said.err and "stay there" in said.err
    assert (tree / "val" / "PNEUMONIA" / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize("folder", ["", "train/NORMAL", "train/PNEUMONIA"])
def test_a_read_only_folder_is_refused_before_anything_moves(tree, capsys, monkeypatch, folder):
    # a stand-in: root, which the tests may run as, can write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tree / folder)
    assert f"{tree / folder}: not writable" in refused(tree, capsys, "--per-class", 5)


def test_a_finished_split_in_a_read_only_folder_is_still_a_finished_split(tree, capsys, monkeypatch):
    assert run(tree, "--per-class", 5) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(tree, "--per-class", 5) == 0
    assert "not writable" in refused(tree, capsys, "--undo")


def test_another_file_system_is_refused_before_anything_moves(tree, capsys, monkeypatch):
    (tree / "val" / "NORMAL").mkdir(parents=True)
    stat = Path.stat

    def two_systems(path, **options):
        state = stat(path, **options)
        moved = list(state)
        moved[2] += "val" in path.parts  # st_dev
        return os.stat_result(moved)

    monkeypatch.setattr(Path, "stat", two_systems)
    assert "on another file system" in refused(tree, capsys, "--per-class", 5)


def test_a_rename_across_file_systems_loses_nothing_and_can_be_undone(tree, capsys, monkeypatch):
    before = snapshot(tree)

    def across(old, new):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(old), None, str(new))

    monkeypatch.setattr(os, "rename", across)
    assert run(tree, "--per-class", 5) == 2
    assert "on another file system" in capsys.readouterr().err
    assert run(tree, "--undo") == 0
    assert snapshot(tree) == before


def test_a_half_finished_split_is_no_training_data(tree):
    assert run(tree, "--per-class", 5) == 0
    record = common.read_json(tree / SPLIT_FILE, {})
    common.write_json(tree / SPLIT_FILE, record | {"state": "splitting"})
    with pytest.raises(common.Failure, match=r"a split was interrupted; run split_val\.py again"):
        common.read_split(tree, "train", "val")


# ---------------------------------------------------------------- faults


def die_at(number, after, folder, *flags):
    """Runs split_val in a child that is killed before or after its system call `number`; True where it was."""
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
            status = run(folder, *flags)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.fixture
def campaign(request, tmp_path):
    """(folder, images to move of each class): a few images, with --fuzz as many as in the reference data."""
    train, count = (150, 50) if request.config.option.fuzz else (6, 2)
    return make_tree(tmp_path / "start", train, 2), count


def restore(source, folder):
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


def test_a_split_killed_at_any_system_call_is_completed_or_undone_by_the_next_run(campaign, tmp_path, say):
    start, count = campaign
    untouched, flags = snapshot(start), ("--per-class", count)
    done = restore(start, tmp_path / "done")
    assert run(done, *flags) == 0
    finished = snapshot(done)
    for points in itertools.count():
        folder = restore(start, tmp_path / "data")
        if not die_at(*divmod(points, 2), folder, *flags):
            break
        half = restore(folder, tmp_path / "half")
        assert run(folder, *flags) == 0
        assert snapshot(folder) == finished
        assert run(half, "--undo") == 0
        assert snapshot(half) == untouched
    say(f"split: {points} points of death, all converge")
    assert points >= 2 * (2 * count + 12)


def test_an_undo_killed_at_any_system_call_is_completed_by_the_next_run(campaign, tmp_path, say):
    start, count = campaign
    untouched, flags = snapshot(start), ("--per-class", count)
    done = restore(start, tmp_path / "done")
    assert run(done, *flags) == 0
    finished = snapshot(done)
    for points in itertools.count():
        folder = restore(done, tmp_path / "data")
        if not die_at(*divmod(points, 2), folder, "--undo"):
            break
        half = restore(folder, tmp_path / "half")
        assert run(folder, "--undo") == 0
        assert snapshot(folder) == untouched
        assert run(half, *flags) == 0  # completes the undo, then splits
        assert snapshot(half) == finished
    say(f"undo: {points} points of death, all converge")
    assert points >= 2 * (2 * count + 12)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_of_any_system_call_is_one_line_and_the_next_run_completes(
    number, campaign, tmp_path, capsys, monkeypatch
):
    start, count = campaign
    flags = ("--per-class", count)
    done = restore(start, tmp_path / "done")
    assert run(done, *flags) == 0
    states = {"split": (start, flags, snapshot(done)), "undo": (done, ("--undo",), snapshot(start))}
    for source, flags, expected in states.values():
        for failing in itertools.count():
            folder, counter = restore(source, tmp_path / "data"), itertools.count()

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
                status = run(folder, *flags)
            error = capsys.readouterr().err
            assert status in (0, 2, 4) and len(error.splitlines()) == (status > 0)
            assert run(folder, *flags) == 0
            files = {path: content for path, content in snapshot(folder).items() if content is not None}
            assert files == {path: content for path, content in expected.items() if content is not None}
            if next(counter) <= failing:
                break


@pytest.mark.parametrize("stop", [KeyboardInterrupt, common.Terminated])
def test_ctrl_c_between_two_files_says_how_to_go_on(tree, capsys, monkeypatch, stop):
    done = restore(tree, tree.parent / "done")
    assert run(done, "--per-class", 5) == 0
    rename, counter = os.rename, itertools.count()

    def interrupted(old, new):
        if next(counter) == 3:
            raise stop
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        assert run(tree, "--per-class", 5) == (130 if stop is KeyboardInterrupt else 143)
    assert "run the same command again to complete it" in capsys.readouterr().err
    assert run(tree, "--per-class", 5) == 0
    assert snapshot(tree) == snapshot(done)


def test_four_at_once_split_once(tree, tmp_path, request, say):
    done = restore(tree, tmp_path / "done")
    assert run(done, "--per-class", 5) == 0
    finished = snapshot(done)
    rounds = 200 if request.config.option.fuzz else 20
    for _ in range(rounds):
        folder = restore(tree, tmp_path / "race")
        gate, start = os.pipe()
        children = []
        for _ in range(4):
            if (child := os.fork()) == 0:
                os.close(start)
                os.read(gate, 1)  # returns when the parent closes its end: all four start together
                status = 1
                try:
                    status = run(folder, "--per-class", 5)
                finally:
                    os._exit(status)
            children.append(child)
        os.close(start)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
        os.close(gate)
        assert snapshot(folder) == finished
    say(f"four splits at once, {rounds} times: each time exactly one split")


def test_a_damaged_record_is_refused_or_changes_nothing(tree, tmp_path, request, capsys):
    start = snapshot(tree)
    assert run(tree, "--per-class", 5) == 0
    rng, whole = random.Random(request.config.option.fuzz_seed), (tree / SPLIT_FILE).read_bytes()
    refusals = 0
    for number in range(300 if request.config.option.fuzz else 40):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        if number % 3 == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif number % 3 == 1:
            data[at : at + 16] = rng.randbytes(16)
        else:
            del data[at:]
        folder = restore(tree, tmp_path / "copy")
        (folder / SPLIT_FILE).write_bytes(data)
        before = snapshot(folder)
        capsys.readouterr()
        statuses = run(folder, "--per-class", 5), run(folder, "--undo")
        assert statuses in ((0, 0), (2, 2)), bytes(data)
        assert snapshot(folder) == (start if statuses[1] == 0 else before)
        refusals += statuses[0] == 2
        assert all(len(line) < 500 for line in capsys.readouterr().err.splitlines())
    assert refusals > number * 0.9


@pytest.mark.parametrize(
    "moved",
    [
        {"NORMAL": 5, "PNEUMONIA": []},
        {"NORMAL": ["../../secret"], "PNEUMONIA": []},
        {"NORMAL": ["/etc/passwd"], "PNEUMONIA": []},
        {"NORMAL": [["a"]], "PNEUMONIA": []},
        {"NORMAL": []},
        {"NORMAL": [], "PNEUMONIA": [], "COVID": []},
    ],
)
def test_a_record_written_by_somebody_else_moves_nothing_outside_the_folder(tree, capsys, moved):
    files = [f"val/{name}/{file}" for name, found in moved.items() if isinstance(found, list) for file in found]
    kinds = dict(format=1, seed=0, per_class=5, moved=moved, sha256=dict.fromkeys(files, ""))
    for state in ("done", "splitting", "undoing"):
        common.write_json(tree / SPLIT_FILE, kinds | {"state": state})
        assert f"{tree / SPLIT_FILE}: " in refused(tree, capsys)
        assert f"{tree / SPLIT_FILE}: " in refused(tree, capsys, "--undo")


# ---------------------------------------------------------------- the check


def checked(folder, tmp_path, capsys):
    """(exit status, the report, the page)."""
    capsys.readouterr()
    status = run(folder, "--check", "--json", tmp_path / "check.json")
    return status, common.read_json(tmp_path / "check.json", {}), capsys.readouterr().out


def marked(report):
    shift = {(name, row["number"]) for row in report["shift"] for name in CLASSES if row[name]["alarm"]}
    return {row["number"] for row in report["shortcuts"] if row["alarm"]}, shift


@pytest.mark.parametrize("layout", ["before", "after", "without test", "train alone"])
def test_the_check_finds_what_is_known_of_the_reference_data(xrays, tmp_path, capsys, layout):
    if layout in ("after", "without test"):
        assert run(xrays) == 0
    if layout in ("without test", "train alone"):
        shutil.rmtree(xrays / "test")
    status, report, page = checked(xrays, tmp_path, capsys)
    assert status == 0 and report["errors"] == []
    folder = "train/PNEUMONIA"
    assert sum(report["modes"]["RGB"].values()) == 14
    assert {name.split("/")[1] for name in report["modes"]["RGB"]} == {"PNEUMONIA"}
    assert [report[key] for key in ("same", "nearly_same", "no_patient", "unreadable", "changed")] == [[]] * 5
    assert report["patients_across"] == {}
    shortcuts, shift = marked(report)
    rows = {row["number"]: row for row in report["shortcuts"]}
    assert {"file size", "sharpness"} <= shortcuts and "3-pixel border" in rows
    assert [row["auroc"] for row in report["shortcuts"]] == sorted((r["auroc"] for r in rows.values()), reverse=True)
    pairs = report["same_patient_pairs"]
    assert pairs["train"] + pairs.get("val", 0) == 4
    if layout in ("before", "after"):
        assert pairs["test"] == 7 and report["scored_on"] == "test"
        assert {name for name, _ in shift} == {"NORMAL"} and ("NORMAL", "32x32 pixels") in shift
        assert rows["file size"]["accuracy"] == 0.79 and rows["file size"]["n"] == 100
        assert rows["file size"]["auroc"] == pytest.approx(0.914, abs=0.001)
        assert rows["sharpness"]["accuracy"] == 0.84
        assert "shift: " in page and "file size      <= 6002" in page
    if layout == "before":
        assert report["modes"]["RGB"] == {folder: 14}
        assert f"14 RGB images, all in {folder}" in page
        assert report["patients"] == {folder: 148, "train/NORMAL": 148, "test/NORMAL": 50, "test/PNEUMONIA": 43}


def reencoded(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def save(image, path, quality=75):
    path.write_bytes(reencoded(image, quality))


def shifted(image, x, y):
    pixels = np.pad(np.asarray(image), 8, mode="edge")
    return Image.fromarray(pixels[8 + y : 232 + y, 8 + x : 232 + x])


@pytest.fixture
def fair(xrays_source, tmp_path):
    """A folder without any finding: radiographs of healthy children, dealt out at random, each a patient of its own."""
    source = sorted((xrays_source / "train" / "NORMAL").iterdir())
    random.Random(1).shuffle(source)
    number = itertools.count(1)
    for split, count in (("train", 50), ("test", 25)):
        for name in CLASSES:
            folder = tmp_path / "fair" / split / name
            folder.mkdir(parents=True)
            for _ in range(count):
                i = next(number)
                shutil.copy(source[i - 1], folder / f"person{i}_virus_{i}.jpeg")
    return tmp_path / "fair"


def test_the_check_finds_nothing_where_there_is_nothing(fair, tmp_path, capsys):
    status, report, page = checked(fair, tmp_path, capsys)
    assert status == 0
    assert report["errors"] == report["warnings"] == []
    assert "0 errors, 0 warnings" in page


def test_the_check_finds_every_planted_fault_and_nothing_else(fair, tmp_path, capsys):
    train, test = fair / "train", fair / "test"
    normal, sick = sorted((train / "NORMAL").iterdir()), sorted((train / "PNEUMONIA").iterdir())
    same, similar = [], []

    def plant(kind, source, file, image=None, quality=75):
        if image is None:
            shutil.copy(source, file)
        else:
            save(image, file, quality)
        kind.append(tuple(sorted(path.relative_to(fair).as_posix() for path in (source, file))))

    images = [common.load_image(path).convert("L") for path in normal]
    plant(same, normal[0], test / "NORMAL" / "person900_virus_1.jpeg")  # a leak
    plant(same, normal[1], train / "NORMAL" / "person901_virus_1.jpeg")  # weighs double
    plant(same, normal[2], train / "PNEUMONIA" / "person902_virus_1.jpeg")  # in two classes
    lossless = test / "NORMAL" / "person903_virus_1.png"
    images[3].save(lossless)
    same.append(tuple(sorted(path.relative_to(fair).as_posix() for path in (normal[3], lossless))))
    plant(similar, normal[4], test / "NORMAL" / "person904_virus_1.jpeg", images[4], 40)
    brighter = ImageEnhance.Brightness(images[5]).enhance(1.2)
    plant(similar, normal[5], test / "PNEUMONIA" / "person905_virus_1.jpeg", brighter)
    plant(similar, normal[6], train / "NORMAL" / "person906_virus_1.jpeg", shifted(images[6], 6, -6))
    both = ImageEnhance.Brightness(shifted(images[7], -4, 3)).enhance(1.1)
    plant(similar, normal[7], test / "NORMAL" / "person907_virus_1.jpeg", both, 60)
    patient = common.patient_of(normal[8].name)
    child = sorted((test / "NORMAL").glob("person1??_virus_1*"))[0]
    child.rename(child.with_name(f"{patient}_999.jpeg"))  # a patient in train/ and test/
    sick[0].rename(sick[0].with_name("scan.jpeg"))
    sick[1].write_bytes(sick[1].read_bytes()[:3000])
    sick[2].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    status, report, page = checked(fair, tmp_path, capsys)
    assert status == 2
    assert sorted(tuple(sorted(pair)) for pair in report["same"]) == sorted(same)
    assert sorted(tuple(sorted(pair[:2])) for pair in report["nearly_same"]) == sorted(similar)
    assert list(report["patients_across"]) == [patient]
    assert report["no_patient"] == ["train/PNEUMONIA/scan.jpeg"]
    assert {file for file, _ in report["unreadable"]} == {f"train/PNEUMONIA/{path.name}" for path in sick[1:3]}
    assert "git-LFS" in str(report["unreadable"])
    assert len(report["errors"]) == 2 + 3 + 3 + 1  # unreadable, same, nearly the same, the patient
    assert len(report["warnings"]) == 1 + 1 + 1  # the same and nearly the same inside a folder, the name
    assert marked(report) == (set(), set())
    assert all(text in page for text in report["errors"] + report["warnings"])


def test_the_check_finds_planted_shortcuts_and_shift_and_nothing_else(fair, tmp_path, capsys):
    for path in sorted(fair.rglob("*.jpeg")):
        image = common.load_image(path).convert("L")
        if path.parent.name == "PNEUMONIA":
            image.paste(255, (4, 4, 16, 16))  # a marker in the corner, as one ward might use it
        save(image, path, 73 if path.parts[-3] == "test" else 75)
    status, report, _ = checked(fair, tmp_path, capsys)
    assert status == 0
    shortcuts, shift = marked(report)
    assert shortcuts == {"3-pixel border"}
    assert shift == {(name, number) for name in CLASSES for number in ["JPEG quality"]}
    assert len(report["warnings"]) == 3


def test_a_size_mode_or_format_of_one_class_alone_is_a_shortcut(fair, tmp_path, capsys):
    for path in sorted((fair / "train" / "NORMAL").iterdir())[:9]:
        Image.open(path).convert("RGB").save(path.with_suffix(".png"))
        path.unlink()
    _, report, _ = checked(fair, tmp_path, capsys)
    assert {text for text in report["warnings"] if "all in" in text} == {
        "shortcut: 9 RGB images, all in train/NORMAL",
        "shortcut: 9 PNG images, all in train/NORMAL",
    }


def test_the_check_sees_bytes_that_changed_since_the_split(xrays, tmp_path, capsys):
    assert run(xrays) == 0
    path = sorted((xrays / "val" / "NORMAL").iterdir())[0]
    path.write_bytes(path.read_bytes() + b"x")
    status, report, _ = checked(xrays, tmp_path, capsys)
    assert status == 2
    assert report["changed"] == [path.relative_to(xrays).as_posix()]


def test_the_check_changes_nothing_and_refuses_a_wrong_layout(xrays, capsys):
    before = snapshot(xrays)
    assert run(xrays, "--check") == 0
    assert snapshot(xrays) == before
    (xrays / "test" / "NORMAL").rename(xrays / "test" / "normal")
    assert "expected only the folders" in refused(xrays, capsys, "--check")


def test_json_replaces_a_file_or_what_a_link_points_to_and_nothing_else(tree, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as devices are: neither file nor folder
    for name in ("folder", "pipe"):
        before = (tmp_path / name).lstat().st_mode
        assert "expected a file to write" in refused(tree, capsys, "--check", "--json", tmp_path / name)
        assert (tmp_path / name).lstat().st_mode == before
    draw_folder(tmp_path / "drawn", train=4, test=2, size=64)
    split_val.main(["--data-dir", str(tmp_path / "drawn"), "--check", "--json", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink() and b"shortcuts" in (tmp_path / "file").read_bytes()


def test_json_never_takes_the_place_of_the_split_s_record(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    before = snapshot(tree)
    assert run(tree, "--check", "--json", tree / SPLIT_FILE) == 2
    assert "choose another" in capsys.readouterr().err and snapshot(tree) == before


def test_json_belongs_to_check(tree, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tree, "--json", "x.json")
    assert stop.value.code == 2
    assert "--json needs --check" in capsys.readouterr().err


# ---------------------------------------------------------------- rules of one number


def test_a_rule_is_as_accurate_as_any_threshold_in_any_direction():
    rng = np.random.default_rng(0)
    for _ in range(500):
        values = rng.integers(0, 6, rng.integers(1, 12)).astype(float)
        labels = rng.integers(0, 2, len(values))
        rule = common.fit_rule(values, labels)
        best = max(((values > cut) == up).__eq__(labels == 1).mean() for cut in range(-1, 7) for up in (True, False))
        assert (common.apply_rule(rule, values) == labels).mean() == best
        assert rule == common.fit_rule(values[::-1], labels[::-1])
    assert common.fit_rule(np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1])) == (3.0, 1)
    assert common.fit_rule(np.array([1.0, 2.0, 4.0]), np.array([1, 0, 0])) == (1.5, -1)


def test_the_numbers_of_an_image_are_those_of_its_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for quality in range(20, 100):
        save(image, tmp_path / "a.jpeg", quality)
        assert common.image_numbers(tmp_path / "a.jpeg")["JPEG quality"] == quality
    image.convert("RGB").save(tmp_path / "a.png")
    numbers = common.image_numbers(tmp_path / "a.png")
    assert [numbers[key] for key in ("width", "height", "mode", "JPEG quality")] == [60, 40, 24, 0]
    assert numbers["file size"] == (tmp_path / "a.png").stat().st_size
    assert numbers["mean"] == pytest.approx(pixels.mean(), abs=1e-3)
    assert numbers["deviation"] == pytest.approx(pixels.std(), abs=1e-3)
    assert numbers["sharpness"] == pytest.approx(np.abs(np.diff(pixels.astype(int), axis=0)).mean(), abs=1e-3)
