"""split_val.py: the choice of patients, the moves under every fault, and what --check finds."""

import errno
import io
import itertools
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from phantoms import draw_folder, draw_phantom
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter

import cxr.duplicates
import cxr.errors
import cxr.files
import cxr.folders
import cxr.patients
import cxr.shortcuts
import split_val
from cxr.folders import CLASSES, SPLIT_FILE

# every system call that changes the folder
CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")


def make_tree(root, train, test=0):
    """A data folder of files that need not be images: nothing but --check decodes them."""
    for split, count in (("train", train), ("test", test))[: 1 + (test > 0)]:
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                patient = 3 * (i // 4) + min(i % 4, 2)  # of four images two are of one patient
                patient += 10000 * (split == "test")
                virus, normal = f"person{patient}_virus_{i}.jpeg", f"IM-{patient:04d}-{i:04d}.jpeg"
                (folder / (virus if label else normal)).write_bytes(f"{split} {name} {i}".encode())
    return root


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "data", 12, 4)


def run(folder, *flags):
    return split_val.main(["--data-dir", str(folder), *map(str, flags)])


def snapshot(folder):
    """{relative path: content, None for a folder} of everything below `folder`."""
    paths = sorted(Path(folder).rglob("*"))
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def files_of(folder):
    return {path: content for path, content in snapshot(folder).items() if content is not None}


def names(folder, split):
    return {name: sorted(p.name for p in (folder / split / name).iterdir()) for name in CLASSES}


def sizes(folder, split="val"):
    return [len(cxr.folders.list_images(folder / split / name)) for name in CLASSES]


def refused(folder, capsys, *flags):
    """The one line on stderr of a run that exits 2 and leaves everything as it was."""
    before = snapshot(folder)
    capsys.readouterr()
    assert run(folder, *flags) == 2
    assert snapshot(folder) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------- the choice of patients


def test_no_patient_is_ever_on_both_sides_and_each_class_gets_what_was_asked(tree):
    train = cxr.patients.read_split(tree, "train")["train"]
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
    assert run(tmp_path, "--per-class", 3) == 0
    error = capsys.readouterr().err
    assert "whole patients give 2 NORMAL and 3 PNEUMONIA images, not 3 of each" in error
    assert sizes(tmp_path) == [2, 3]


def test_images_of_one_patient_only_are_refused(tmp_path, capsys):
    make_patients(tmp_path, [1] * 5, range(5))
    assert "no choice is that small" in refused(tmp_path, capsys, "--per-class", 3)


def test_names_that_tell_no_patient_count_as_patients_and_are_counted(tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(5):
            file = tmp_path / "train" / name / f"scan {i} \u00e9.png"
            file.write_bytes(f"{name}{i}".encode())
    assert run(tmp_path, "--per-class", 2) == 0
    assert "10 names in train/ tell no patient" in capsys.readouterr().err
    assert sizes(tmp_path) == [2, 2]


@pytest.mark.parametrize("asked", [12, 13, 10**6])
def test_more_images_than_there_are_is_refused(tree, capsys, asked):
    found = refused(tree, capsys, "--per-class", asked)
    assert "has 12 NORMAL and 12 PNEUMONIA images" in found


# ---------------------------------------------------------------- runs


def test_a_second_run_moves_nothing_and_undo_restores_the_identical_tree(tree, capsys):
    before = snapshot(tree)
    assert run(tree, "--per-class", 5) == 0
    assert capsys.readouterr().out.startswith("Moved 5 NORMAL and 5 PNEUMONIA images of ")
    record = cxr.files.read_json(tree / SPLIT_FILE)
    moved = names(tree, "val")
    assert record == {"seed": 0, "per_class": 5, "moved": moved, "patients": record["patients"]}
    assert len(cxr.patients.read_split(tree, "train", "val", "test")["val"]) == 10
    after = snapshot(tree)
    assert run(tree, "--per-class", 5) == 0
    assert "already split, 5 NORMAL and 5 PNEUMONIA images in val/" in capsys.readouterr().out
    assert snapshot(tree) == after
    assert run(tree, "--undo") == 0
    assert "Moved 10 images back" in capsys.readouterr().out
    assert snapshot(tree) == before
    assert run(tree, "--undo") == 0
    assert "nothing to undo" in capsys.readouterr().out
    assert snapshot(tree) == before


def test_flags_that_ask_for_another_split_are_named_and_defaults_are_not(tree, capsys):
    assert run(tree, "--per-class", 5, "--seed", 3) == 0
    after = snapshot(tree)
    capsys.readouterr()
    assert run(tree) == 0
    assert capsys.readouterr().err == ""
    for flags in (("--per-class", 4), ("--seed", 9)):
        assert run(tree, *flags) == 0
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
    assert run(tree, "--per-class", 5) == 0
    said = capsys.readouterr()
    assert "came with the data (8 NORMAL and 8 PNEUMONIA images) and is left alone" in said.out
    assert "lottery" in said.err and "--undo" in said.err
    assert snapshot(tree) == before
    taken = tree / "train" / "NORMAL" / "person500_bacteria_0.jpeg"
    taken.write_bytes(b"another")
    assert "exists already" in refused(tree, capsys, "--undo")
    taken.unlink()
    assert run(tree, "--undo") == 0
    assert sizes(tree, "train") == [20, 20]
    assert not (tree / "val").exists() and not (tree / SPLIT_FILE).exists()
    assert run(tree, "--per-class", 5) == 0
    assert sizes(tree) == [5, 5]


def test_empty_val_folders_count_as_none_and_what_else_is_in_them_stays(tree):
    for name in CLASSES:
        (tree / "val" / name).mkdir(parents=True)
        (tree / "val" / name / ".DS_Store").write_bytes(b"junk")
    assert run(tree, "--per-class", 3) == 0
    assert sizes(tree) == [3, 3]
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
    assert sizes(tree) == [11, 11]


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert "train: no such folder" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    "make", ["val/normal", "val/COVID", "test/normal", "train/.ipynb_checkpoints"]
)
def test_a_folder_that_is_no_class_is_refused_by_name(tree, capsys, make):
    (tree / make).mkdir(parents=True)
    assert f"{tree / make}: expected only the folders NORMAL" in refused(tree, capsys)


def test_links_and_files_in_the_place_of_folders_are_refused(tree, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    for place in ("val", "val/NORMAL"):
        (tree / place).parent.mkdir(exist_ok=True)
        (tree / place).symlink_to(tmp_path / "elsewhere")
        for flags in ((), ("--undo",)):
            found = refused(tree, capsys, *flags)
            assert f"{tree / place}: expected a folder, found a link or a file" in found
        (tree / place).unlink()
        (tree / place).write_bytes(b"")
        assert "found a link or a file" in refused(tree, capsys)
        (tree / place).unlink()
    (tree / "train" / "NORMAL").rename(tmp_path / "moved")
    (tree / "train" / "NORMAL").symlink_to(tmp_path / "moved")
    assert "train/NORMAL: found a link" in refused(tree, capsys, "--per-class", 5)


def test_an_image_that_cannot_be_read_is_refused(tree, capsys):
    (tree / "train" / "NORMAL" / "IM-0099-0001.jpeg").symlink_to("nowhere.jpeg")
    assert "IM-0099-0001.jpeg: cannot be read" in refused(tree, capsys, "--per-class", 5)


@pytest.mark.parametrize("twin", ["test/NORMAL", "train/PNEUMONIA"])
def test_the_same_file_in_two_folders_is_refused_before_anything_moves(tree, capsys, twin):
    shutil.copy(tree / "train" / "NORMAL" / "IM-0000-0000.jpeg", tree / twin / "IM-77-0.jpeg")
    assert "the same file as" in refused(tree, capsys, "--per-class", 5)


def test_a_file_at_the_destination_is_refused_before_anything_moves(tree, capsys):
    file = split_val.plan_split(tree, 5, 0)["moved"]["PNEUMONIA"][-1]
    (tree / "val" / "PNEUMONIA" / file).mkdir(parents=True)  # no image, so val/ is empty
    assert "exists already" in refused(tree, capsys, "--per-class", 5)


def test_a_name_that_is_taken_again_is_refused(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    file = names(tree, "val")["NORMAL"][2]
    (tree / "train" / "NORMAL" / file).write_bytes(b"another")
    assert f"{file}: exists already" in refused(tree, capsys, "--undo")
    assert f"{file}: exists already" in refused(tree, capsys, "--per-class", 5)


def test_undo_names_what_is_gone_and_leaves_what_it_did_not_bring(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    gone = tree / "val" / "NORMAL" / names(tree, "val")["NORMAL"][2]
    gone.unlink()
    (tree / "val" / "PNEUMONIA" / "mine.png").write_bytes(b"mine")
    assert run(tree, "--per-class", 5) == 0
    assert f"{gone.name}: gone since the split (1 such images)" in capsys.readouterr().err
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


def test_a_finished_split_in_a_read_only_folder_is_still_a_split(tree, capsys, monkeypatch):
    assert run(tree, "--per-class", 5) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(tree, "--per-class", 5) == 0
    assert "not writable" in refused(tree, capsys, "--undo")


def test_a_rename_across_file_systems_loses_nothing_and_can_be_undone(tree, capsys, monkeypatch):
    before = snapshot(tree)

    def across(old, new):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(old), None, str(new))

    monkeypatch.setattr(os, "rename", across)
    assert run(tree, "--per-class", 5) == 2
    assert "on another file system" in capsys.readouterr().err
    assert run(tree, "--undo") == 0
    assert snapshot(tree) == before


def test_a_half_finished_split_is_no_training_data(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    file = names(tree, "val")["NORMAL"][0]
    (tree / "val" / "NORMAL" / file).rename(tree / "train" / "NORMAL" / file)
    with pytest.raises(cxr.errors.Failure, match=r"run split_val\.py again"):
        cxr.patients.read_split(tree, "train", "val")
    assert "run split_val.py again" in refused(tree, capsys, "--check")
    assert run(tree) == 0
    assert sizes(tree) == [5, 5]


def test_where_the_system_has_no_flock_the_split_works_without(tree, monkeypatch):
    monkeypatch.setattr(split_val, "fcntl", None)
    assert run(tree, "--per-class", 5) == 0
    assert run(tree, "--undo") == 0


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
            status = run(folder, *flags)
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
    assert run(done, *flags) == 0
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
        assert run(folder, *flags) == 0
        assert snapshot(folder) == finished
        assert run(half, "--undo") == 0
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
            status = run(folder, *flags)
        error = capsys.readouterr().err
        assert status in (0, 2, 4) and len(error.splitlines()) == (status > 0)
        assert run(folder, *flags) == 0
        assert files_of(folder) == files_of(expected)
        if next(counter) <= failing:
            break


@pytest.mark.parametrize(
    ("stop", "status"), [(KeyboardInterrupt, 130), (cxr.errors.Terminated, 143)]
)
def test_ctrl_c_between_two_files_says_how_to_go_on(campaign, capsys, monkeypatch, stop, status):
    start, flags, done = campaign
    rename, counter = os.rename, itertools.count()

    def interrupted(old, new):
        if next(counter) == 3:
            raise stop
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        assert run(start, *flags) == status
    error = capsys.readouterr().err
    assert "every image is whole, run the same command again to complete it" in error
    assert run(start, *flags) == 0
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
                    status = run(folder, *flags)
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
    assert run(tree, "--per-class", 5) == 0
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
        statuses = run(folder, "--per-class", 5), run(folder, "--undo")
        assert statuses in ((0, 0), (2, 2)), bytes(data)
        assert snapshot(folder) == (start if statuses[1] == 0 else before)
        refusals += statuses[0] == 2
        assert all(len(line) < 500 for line in capsys.readouterr().err.splitlines())
    assert refusals > 0.8 * rounds


# ---------------------------------------------------------------- the check of a folder


def check(folder, capsys):
    """(exit status, the report, the page)."""
    capsys.readouterr()
    report = folder.parent / "check.json"
    status = run(folder, "--check", "--json", report)
    return status, cxr.files.read_json(report), capsys.readouterr().out


def alarms(report):
    """({numbers that tell the class}, {(class, number) that tells the split})."""
    shift = {(c, row["number"]) for row in report["shift"] for c in CLASSES if row[c]["alarm"]}
    return {row["number"] for row in report["shortcuts"] if row["alarm"]}, shift


def reencoded(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("L")


def shifted(image, x, y):
    pixels = np.pad(np.asarray(image), 8)  # with black edges
    return Image.fromarray(pixels[8 + y : 232 + y, 8 + x : 232 + x])


@pytest.fixture(scope="session")
def fair_source(tmp_path_factory):
    """A folder without any finding: healthy phantoms in both classes, each a patient of its own."""
    folder, rng = tmp_path_factory.mktemp("fair"), np.random.default_rng(0)
    number = itertools.count(1)
    for split, count in (("train", 40), ("test", 20)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for _ in range(count):
                i = next(number)
                file = folder / split / name / f"person{i}_virus_{i}.jpeg"
                draw_phantom(rng, pneumonia=False).save(file, quality=75)
    return folder


@pytest.fixture
def fair(fair_source, tmp_path):
    return Path(shutil.copytree(fair_source, tmp_path / "fair"))


def test_the_check_finds_nothing_where_there_is_nothing_and_changes_nothing(fair, capsys):
    before = snapshot(fair)
    status, report, page = check(fair, capsys)
    assert status == 0
    assert report["errors"] == report["warnings"] == []
    assert report["images"] == report["patients"]
    assert report["scored_on"] == "test" and report["formats"]["JPEG"] == report["images"]
    assert "0 errors, 0 warnings" in page and "  train" in page
    assert "width" not in page  # the same for all: it never splits
    assert snapshot(fair) == before


def test_the_check_finds_every_planted_fault_and_nothing_else(fair, capsys):
    train, test = fair / "train", fair / "test"
    normal, sick = (sorted((train / name).iterdir()) for name in CLASSES)
    images = [Image.open(path).convert("L") for path in normal]
    same, similar = [], {}

    def pair(a, b):
        return tuple(sorted(path.relative_to(fair).as_posix() for path in (a, b)))

    for source, folder in (
        (normal[0], test / "NORMAL"),  # a leak
        (normal[1], train / "NORMAL"),  # weighs double
        (normal[2], train / "PNEUMONIA"),  # in two classes
    ):
        copied = shutil.copy(source, folder / f"person9{source.name[6:]}")
        same.append(pair(source, Path(copied)))
    images[3].save(test / "NORMAL" / "person903_virus_1.png")
    same.append(pair(normal[3], test / "NORMAL" / "person903_virus_1.png"))
    brighter = ImageEnhance.Brightness(shifted(images[7], -4, 3)).enhance(1.1)
    for source, folder, image, quality, kind in (
        (normal[4], test / "NORMAL", images[4], 40, ""),
        (normal[5], test / "PNEUMONIA", ImageOps.mirror(images[5]), 75, "mirrored"),
        (normal[6], train / "NORMAL", ImageOps.invert(images[6]), 75, "negative"),
        (normal[7], test / "NORMAL", brighter, 60, ""),
    ):
        target = folder / f"person9{source.name[6:]}"
        image.save(target, quality=quality)
        similar[pair(source, target)] = kind
    patient = cxr.patients.patient_from_name(normal[8].name)
    child = sorted((test / "NORMAL").glob("person1??_virus_1*"))[0]
    child.rename(child.with_name(f"{patient}_999.jpeg"))  # a patient in train/ and test/
    sick[0].rename(sick[0].with_name("scan.jpeg"))
    sick[1].write_bytes(sick[1].read_bytes()[:3000])
    sick[2].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    status, report, page = check(fair, capsys)
    assert status == 2
    assert sorted(tuple(sorted(found)) for found in report["same"]) == sorted(same)
    assert {tuple(sorted((a, b))): kind for a, b, _, kind in report["nearly_same"]} == similar
    assert list(report["patients_across"]) == [patient]
    assert report["no_patient"] == ["train/PNEUMONIA/scan.jpeg"]
    unreadable = dict(report["unreadable"])
    assert set(unreadable) == {f"train/PNEUMONIA/{path.name}" for path in sick[1:3]}
    assert "git-LFS" in unreadable[f"train/PNEUMONIA/{sick[2].name}"]
    assert len(report["errors"]) == 2 + 3 + 3 + 1  # unreadable, same, nearly the same, the patient
    negative = f"train/NORMAL/person9{normal[6].name[6:]}"
    assert report["negatives"] == [negative]
    assert len(report["warnings"]) == 1 + 1 + 1 + 1  # same, nearly same in a folder, it, the name
    assert "nearly the same image (mirrored) as" in page
    assert alarms(report) == (set(), set())
    assert all(text in page for text in report["errors"] + report["warnings"])


def test_what_train_and_val_share_is_a_warning_and_what_test_shares_an_error(fair, capsys):
    assert run(fair, "--per-class", 10) == 0
    source = sorted((fair / "train" / "NORMAL").iterdir())[0]
    image, patient = Image.open(source), cxr.patients.patient_from_name(source.name)
    for split, expected in (("val", "warnings"), ("test", "errors")):
        file = fair / split / "NORMAL" / f"{patient}_77.jpeg"
        image.save(file, quality=50)
        status, report, _ = check(fair, capsys)
        assert status == (2 if expected == "errors" else 0)
        assert [len(report[key]) for key in ("errors", "warnings")].count(2) == 1
        assert len(report[expected]) == 2
        assert list(report["patients_across"]) == [patient]
        file.unlink()


def test_the_check_finds_planted_shortcuts_and_shift_and_nothing_else(fair, capsys):
    for path in sorted(fair.rglob("*.jpeg")):
        image = Image.open(path).convert("L")
        if path.parent.name == "PNEUMONIA":  # a marker in the corner, as one ward might use it
            grey = 160 + int(path.name.split("_")[-1][:-5]) % 60
            image.paste(grey, (4, 4, 16, 16))
        image.save(path, quality=73 if path.parts[-3] == "test" else 75)
    status, report, page = check(fair, capsys)
    assert status == 0
    shortcuts, shift = alarms(report)
    assert shortcuts == {"3-pixel border"}
    assert shift == {(name, "JPEG quality") for name in CLASSES}
    assert len(report["warnings"]) == 3 and page.count(" !") == 1 + 2


def test_with_train_alone_a_shortcut_is_scored_on_other_patients(fair, capsys):
    shutil.rmtree(fair / "test")
    for i, path in enumerate(sorted((fair / "train" / "NORMAL").iterdir())):
        image = Image.open(path)
        image.save(path, quality=60 + i % 10)
    status, report, page = check(fair, capsys)
    assert status == 0
    assert "fitted on other patients, separates the classes of train/" in page
    assert report["shift"] == [] and "Shift" not in page
    rows = {row["number"]: row for row in report["shortcuts"]}
    assert rows["JPEG quality"]["auroc"] == 1 and rows["JPEG quality"]["alarm"]
    assert rows["JPEG quality"]["n"] == 80 and rows["JPEG quality"]["accuracy"] == 1
    assert not rows["3-pixel border"]["alarm"]


def test_a_mode_or_format_of_one_class_alone_is_a_shortcut(fair, capsys):
    for path in sorted((fair / "train" / "NORMAL").iterdir())[:9]:
        Image.open(path).convert("RGB").save(path.with_suffix(".png"))
        path.unlink()
    _, report, _ = check(fair, capsys)
    assert {text for text in report["warnings"] if "all in" in text} == {
        "shortcut: 9 RGB images, all in train/NORMAL",
        "shortcut: 9 PNG images, all in train/NORMAL",
    }


def test_the_smallest_folder_is_checked_and_one_without_readable_images_is_refused(
    tmp_path, capsys
):
    draw_folder(tmp_path / "drawn", train=1, test=1, size=64)
    status, report, _ = check(tmp_path / "drawn", capsys)
    assert status == 0 and sum(report["images"].values()) == 4
    shutil.rmtree(tmp_path / "drawn" / "test")
    assert run(tmp_path / "drawn", "--check") == 0
    (tmp_path / "drawn" / "train" / "NORMAL" / "IM-0000-0001.jpeg").write_bytes(b"")
    assert "no image of a folder can be read" in refused(tmp_path / "drawn", capsys, "--check")
    (tmp_path / "drawn" / "train" / "normal").mkdir()
    assert "expected only the folders" in refused(tmp_path / "drawn", capsys, "--check")


def test_json_replaces_a_file_or_what_a_link_points_to_and_nothing_else(tree, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as devices are: neither file nor folder
    for name in ("folder", "pipe"):
        before = (tmp_path / name).lstat().st_mode
        found = refused(tree, capsys, "--check", "--json", tmp_path / name)
        assert "expected a file to write" in found
        assert (tmp_path / name).lstat().st_mode == before
    draw_folder(tmp_path / "drawn", train=4, test=2, size=64)
    assert run(tmp_path / "drawn", "--check", "--json", tmp_path / "link") in (0, 2)
    assert (tmp_path / "link").is_symlink() and b"shortcuts" in (tmp_path / "file").read_bytes()


def test_json_belongs_to_check_and_never_replaces_the_record(tree, capsys):
    assert run(tree, "--per-class", 5) == 0
    found = refused(tree, capsys, "--check", "--json", tree / SPLIT_FILE)
    assert "choose another" in found
    with pytest.raises(SystemExit) as stop:
        run(tree, "--json", "x.json")
    assert stop.value.code == 2
    assert "--json needs --check" in capsys.readouterr().err


# ---------------------------------------------------------------- the check on arrays


def thumbnail(image):
    return np.asarray(image.resize((96, 96), Image.Resampling.BOX))


def test_a_copy_is_found_however_it_was_changed_and_a_different_image_never_is():
    rng = np.random.default_rng(5)
    images = [draw_phantom(rng, pneumonia=bool(i % 2)) for i in range(40)]
    changes = {
        "": [
            lambda image: reencoded(image, 40),
            lambda image: ImageEnhance.Brightness(image).enhance(1.2),
            lambda image: ImageEnhance.Contrast(image).enhance(0.7),
            lambda image: image.filter(ImageFilter.GaussianBlur(1)),
            lambda image: shifted(image, 5, -5),
            lambda image: shifted(image, -5, 0),
            lambda image: reencoded(ImageEnhance.Brightness(shifted(image, 3, 4)).enhance(1.2), 40),
        ],
        "mirrored": [ImageOps.mirror, lambda image: reencoded(ImageOps.mirror(image), 50)],
        "negative": [ImageOps.invert, lambda image: shifted(ImageOps.invert(image), 2, 3)],
        "mirrored negative": [lambda image: ImageOps.invert(ImageOps.mirror(image))],
    }
    expected, copies = {}, []
    for kind, functions in changes.items():
        for function in functions:
            for i in range(3):
                expected[i, len(images) + len(copies)] = kind
                copies.append(function(images[i]))
    found = cxr.duplicates.find_near_duplicates(
        np.stack([thumbnail(image) for image in images + copies])
    )
    original = {pair: kind for pair, (_, kind) in found.items() if pair[0] < len(images)}
    assert original == expected
    assert all(cxr.duplicates.COPY_LIMIT < alike <= 1 for alike, _ in found.values())


def test_constant_images_are_not_taken_for_copies():
    assert cxr.duplicates.find_near_duplicates(np.full((3, 96, 96), 7, np.uint8)) == {}


def test_a_cut_is_as_accurate_as_any_that_splits_the_values():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, 6, rng.integers(4, 12)).astype(float)
        labels = np.arange(len(values)) % 2
        if np.ptp(values) == 0:
            continue
        sign, cut = cxr.shortcuts.fit_cut(values, labels)
        cuts = [c + 0.5 for c in range(5) if values.min() < c + 0.5 < values.max()]
        best = max(((s * values > s * c) == labels).mean() for c in cuts for s in (1, -1))
        assert ((sign * values > sign * cut) == labels).mean() == best
    assert cxr.shortcuts.fit_cut(np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1])) == (1, 3.0)
    assert cxr.shortcuts.fit_cut(np.array([1.0, 2.0, 4.0]), np.array([1, 0, 0])) == (-1, 1.5)


def test_folds_never_share_a_patient_and_always_have_both_labels():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n = int(rng.integers(2, 30))
        patients = np.array([f"p{i}" for i in rng.integers(0, n, n)])
        labels = rng.integers(0, 2, n)
        labels[:2] = 0, 1
        folds = cxr.shortcuts.make_folds(labels, patients)
        for fit, held in folds:
            assert not set(patients[fit]) & set(patients[held])
            assert set(labels[fit]) == {0, 1}
        rows = [row for _, held in folds for row in held]
        assert len(set(rows)) == len(rows)


def null_data(rng, n_patients):
    """Three images a patient, alike, and nothing in them that tells the label."""
    rows = np.repeat(np.arange(n_patients), 3)
    pixels = rng.normal(size=(n_patients, 32, 32))[rows] + rng.normal(0, 0.3, (len(rows), 32, 32))
    pixels = gaussian_filter(pixels, (0, 3, 3)).reshape(len(rows), 1024)
    values = rng.normal(size=(n_patients, 6))[rows] + rng.normal(0, 0.3, (len(rows), 6))
    labels = (rng.permutation(n_patients) % 2)[rows]
    return {f"number {i}": values[:, i] for i in range(6)}, pixels, labels, rows.astype(str)


def test_alike_images_of_one_patient_raise_no_false_alarms():
    shortcuts = border = shift = 0
    for seed in range(15):
        numbers, pixels, labels, patients = null_data(np.random.default_rng(seed), 33)
        alone = np.ones(len(labels), bool)
        rows = cxr.shortcuts.score_shortcuts(numbers, pixels, labels, patients, alone)
        shortcuts += any(row["alarm"] for row in rows)
        border += any(row["alarm"] for row in rows if row["number"] == "3-pixel border")
        found = cxr.shortcuts.score_shift(numbers, pixels, labels == 1, patients)
        shift += any(cxr.shortcuts.is_alarming(each, labels, patients) for each in found.values())
    # counting images raises some alarm in half of such sets, and scoring the border where it was
    # fitted in three of four
    assert max(shortcuts, border, shift) <= 2


def test_a_number_that_tells_the_label_is_found_and_scored_on_the_other_side():
    numbers, pixels, labels, patients = null_data(np.random.default_rng(0), 60)
    numbers["number 0"] = numbers["number 0"] - 4 * labels
    numbers["constant"] = np.ones(len(labels))
    scored = np.isin(patients, [str(i) for i in range(30)])
    numbers["constant"][scored] = labels[scored]  # never splits where it is fitted
    rows = cxr.shortcuts.score_shortcuts(numbers, pixels, labels, patients, scored)
    assert [row["number"] for row in rows if row["alarm"]] == ["number 0"]
    assert rows[0]["rule"].startswith("<=") and rows[0]["n"] == 90
    assert rows[0]["auroc"] > 0.95 and rows[0]["accuracy"] > 0.9
    assert "constant" not in [row["number"] for row in rows]
    assert [row["auroc"] for row in rows] == sorted((row["auroc"] for row in rows), reverse=True)
