"""--classes: other names of the two class folders, in all scripts and in all that they write."""

import contextlib
import html
import io
import json
import shlex

import pytest
from helpers import TINY_FAST, home_flags, make_tree, path_flags, read_rows, run_split
from phantoms import draw_folder

import cxr.bootstrap
import evaluate
import split_val
import train
from cxr.files import read_json, write_json

NAMES = ("NORMAL", "TUBERCULOSIS")
UNUSUAL = ("no finding", '<b>A&B, $x$ 100 % "it\'s"')
STEPS = ("check", "split", "train", "folds", "evaluate", "from", "compare", "new", "undo")


class Chain:
    """Runs all scripts on drawn images whose class folders have these names.

    screens: {step: (exit code, all lines on the screen)}.
    """

    def __init__(self, folder, names):
        self.folder, self.names, self.data = folder, names, folder / "data"
        draw_folder(self.data, train=16, test=6, size=64, classes=names)
        self.screens = {}
        for step in STEPS:
            screen = io.StringIO()
            with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
                status = self.run(step)
            self.screens[step] = status, screen.getvalue()

    def run(self, step):
        """Runs one step and returns the exit code."""
        names = ("--classes", *self.names)
        table = self.folder / "results" / "predictions.csv"
        image = next((self.data / "test" / self.names[1]).iterdir())
        flags = {
            "check": ("--check", "--json", self.folder / "check.json"),
            "undo": ("--undo",),
            "folds": (*TINY_FAST, *names, "--epochs", 3, "--folds", 3),
            "train": (*TINY_FAST, *names, "--epochs", 3),
            "evaluate": ("--cam", "maps"),
            "from": ("--from", table, "--results-dir", self.folder / "from"),
            "compare": ("--compare", table),
            "new": (image, "--cam", "new_maps"),
        }
        if step in ("check", "split", "undo"):
            return run_split(self.data, *names, *flags.get(step, ()))
        script = train if step in ("train", "folds") else evaluate
        return script.main(path_flags(self.data, self.folder, self.folder / "cache", *flags[step]))


@pytest.fixture(scope="module", params=[NAMES, UNUSUAL], ids=["tuberculosis", "unusual"])
def chain(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cxr.bootstrap, "DRAWS", 40)
        return Chain(tmp_path_factory.mktemp("classes"), request.param)


only_tuberculosis = pytest.mark.parametrize("chain", [NAMES], indirect=True)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_works_and_its_screen_has_no_word_of_pneumonia(chain, step):
    status, screen = chain.screens[step]
    assert status == 0, screen
    assert screen and "pneumonia" not in screen.lower()


@only_tuberculosis
def test_no_file_of_a_run_contains_the_word_pneumonia(chain):
    files = [path for path in chain.folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"model.json", "metrics.json", "report.html", "cv.json", "check.json"} <= names
    for path in files:
        assert b"pneumonia" not in path.read_bytes().lower(), path
        assert "pneumonia" not in str(path.relative_to(chain.folder)).lower()


def test_everything_that_is_written_has_the_names(chain):
    names, results = chain.names, chain.folder / "results"
    for file in ("model.json", "results/metrics.json", "from/metrics.json"):
        assert read_json(chain.folder / file)["classes"] == list(names)
    for table in ("predictions.csv", "doubtful_labels.csv"):
        assert {row["label"] for row in read_rows(results / table)} == set(names)
    (new,) = read_rows(results / "new_predictions.csv")
    assert new["prediction"] in names and f"P({names[1]})" in chain.screens["new"][1]
    for name in names:
        assert len(list((results / "maps" / name).glob("*.png"))) == 6
        assert len(list((chain.data / "train" / name).iterdir())) == 16  # after --undo
    page = (results / "report.html").read_text()
    title = f"<title>{names[1]} on chest X-rays: "
    assert title in html.unescape(page) and "<b>" not in page


def rename(data, names):
    """Renames the class folders of all splits."""
    for split in ("train", "val", "test"):
        for old, new in zip(("NORMAL", "PNEUMONIA"), names, strict=True):
            if (data / split / old).exists():
                (data / split / old).rename(data / split / new)
    return data


@pytest.mark.parametrize("names", [("A", "B"), ("no finding", "A$B")])
def test_two_other_folders_are_named_with_the_command_for_both_orders(tmp_path, capsys, names):
    data = rename(make_tree(tmp_path / "data", 12, 4), names)
    assert split_val.main(["--data-dir", str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "The second name must be the disease" in line
    for order in (names, names[::-1]):
        assert f"--classes {shlex.join(order)} (make: CLASSES=" in line


def test_a_wrong_name_among_three_folders_is_named(tree, capsys):
    (tree / "train" / "Normal").mkdir()
    assert split_val.main(["--data-dir", str(tree)]) == 2
    assert "train/Normal: expected only the folders NORMAL and PNEUMONIA" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names", [("A", "A"), ("A", "b/c"), ("A", ".."), ("A", ""), ("A", "a\nb"), ("A", " b")]
)
@pytest.mark.parametrize("script", [split_val, train, evaluate])
def test_names_that_cannot_be_two_folders_are_refused(script, names, capsys):
    assert script.main(["--classes", *names]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--classes" in line and "expected" in line


def test_a_training_in_the_other_order_than_the_split_is_refused(refused, home):
    names = ("--classes", "PNEUMONIA", "NORMAL")
    write_json(home / "data" / "split_val.json", {"moved": {}, "seed": 0, "per_class": 1})
    line = refused(2, "train", *names)
    assert 'was split with --classes NORMAL PNEUMONIA (make: CLASSES="NORMAL PNEUMONIA")' in line
    for verb in ((), ("--check",)):
        assert "split with" in refused(2, "split_val", *names, *verb)


def test_other_classes_than_those_of_the_model_are_refused(refused, home):
    line = refused(2, "evaluate", "--classes", "PNEUMONIA", "NORMAL")
    assert "model.json has the classes NORMAL and PNEUMONIA (positive: PNEUMONIA)" in line
    rename(home / "data", ("A", "B"))
    line = refused(2, "evaluate")
    assert "found the folders A and B" in line and "knows the classes NORMAL and PNEUMONIA" in line


def test_a_table_of_other_classes_is_refused(refused, scored, tmp_path):
    table = str(scored[0])
    line = refused(2, "evaluate", "--from", table, "--classes", "A", "B")
    assert "metrics.json has the classes NORMAL and PNEUMONIA" in line
    bare = tmp_path / "bare.csv"
    bare.write_bytes((scored[0] / "predictions.csv").read_bytes())
    line = refused(2, "evaluate", "--from", bare, "--classes", "A", "B")
    assert "column label: expected A or B (the names of --classes)" in line


def test_a_comparison_with_a_model_of_the_other_order_is_refused(refused, scored, tmp_path):
    for name in ("predictions.csv", "metrics.json"):
        (tmp_path / name).write_bytes((scored[0] / name).read_bytes())
    report = read_json(tmp_path / "metrics.json")
    write_json(tmp_path / "metrics.json", report | {"classes": report["classes"][::-1]})
    line = refused(2, "evaluate", "--from", scored[0], "--compare", tmp_path)
    assert "expected the classes NORMAL and PNEUMONIA, in this order" in line


def forget_classes(path):
    """Rewrites a JSON file as an earlier version wrote it, without the names of the classes."""
    content = read_json(path)
    assert content.pop("classes") == ["NORMAL", "PNEUMONIA"]
    write_json(path, content)


@pytest.mark.usefixtures("quick")
def test_a_model_and_a_split_of_an_earlier_version_still_work(data, tmp_path, flags, capsys):
    for path in data.glob("val/*/*"):
        path.rename(data / "train" / path.parent.name / path.name)
    assert split_val.main(["--data-dir", str(data)]) == 0
    forget_classes(data / "split_val.json")
    assert train.main(flags(data, *TINY_FAST)) == 0
    forget_classes(tmp_path / "model.json")
    assert evaluate.main(flags(data)) == 0
    forget_classes(tmp_path / "results" / "metrics.json")
    results = tmp_path / "results"
    assert evaluate.main(["--from", str(results), "--compare", str(results)]) == 0
    assert split_val.main(["--data-dir", str(data), "--undo"]) == 0
    assert not (data / "val").exists()


@pytest.mark.usefixtures("quick")
def test_a_state_dict_without_model_json_takes_the_names_of_the_flag(home, capsys):
    rename(home / "data", ("A", "B"))
    (home / "model.json").unlink()
    flags = ("--arch", "tinynet", "--classes", "A", "B")
    assert evaluate.main(home_flags("evaluate", home, *flags)) == 0
    assert json.loads((home / "results" / "metrics.json").read_text())["classes"] == ["A", "B"]
