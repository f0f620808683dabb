"""cxr/make_all.py: in make all, each flag in ARGS goes to the scripts that know it."""

import contextlib
import io
import re

import pytest
from helpers import SCRIPTS, read_report, split_refused

from cxr.files import read_json
from cxr.make_all import FLAGS, MARK, own_part

FROM_MODEL_JSON = {"evaluate": {"--arch", "--threshold"}}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_table_of_flags_is_that_of_the_help(name):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), pytest.raises(SystemExit):
        SCRIPTS[name].main(["--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", screen.getvalue(), re.MULTILINE))
    assert set(FLAGS[f"{name}.py"].split()) == flags - FROM_MODEL_JSON.get(name, set())


@pytest.mark.parametrize(
    ("args", "split", "training", "evaluation"),
    [
        ("--seed 3 --debug", "--seed 3 --debug", "--seed 3 --debug", "--seed 3 --debug"),
        ("--skip-bad --seeds 5", "--skip-bad", "--skip-bad --seeds 5", "--skip-bad"),
        ("--threshold sensitivity=0.95", "", "--threshold sensitivity=0.95", ""),
        ("--lr=-1 --cam maps", "", "--lr=-1", "--cam maps"),
        ("--also nih --also rsna", "", "", "--also nih --also rsna"),
        (
            "--test 50 --prevalence .1 --prevalence .2",
            "--test 50",
            "",
            "--prevalence .1 --prevalence .2",
        ),
        (
            "--classes a b --window -1",
            "--classes a b",
            "--classes a b --window -1",
            "--classes a b",
        ),
        ("x.png", "x.png", "x.png", "x.png"),
    ],
)
def test_each_script_gets_the_flags_that_it_knows_with_their_values(
    args, split, training, evaluation
):
    for script, expected in zip(FLAGS, (split, training, evaluation), strict=True):
        words = own_part(["--data-dir", "x y", MARK, *args.split()], script)
        assert words == ["--data-dir", "x y", *expected.split()]


def test_without_the_mark_a_command_line_is_not_changed():
    assert own_part(["--seeds", "5"], "split_val.py") == ["--seeds", "5"]


def test_a_flag_that_no_script_knows_is_an_error_before_the_first_step(tree, capsys):
    line = split_refused(tree, capsys, "--check-first", MARK, "--seed", 1, "--epoch", 3)
    assert "no script knows the flag --epoch" in line


@pytest.mark.parametrize(
    ("flag", "command"),
    [
        ("--folds=3", "make cv"),
        ("--sizes", "make curve"),
        ("--undo", "make split"),
        ("--from", "make eval"),
    ],
)
def test_a_flag_for_another_command_is_an_error_before_the_first_step(tree, capsys, flag, command):
    line = split_refused(tree, capsys, "--check-first", MARK, flag)
    assert f"{flag.partition('=')[0]} is not for make all; run {command}" in line


def test_the_three_steps_of_make_all_run_with_one_list_of_flags(run_script, home):
    args = [MARK, "--seeds", 2, "--threshold", "youden", "--prevalence", 0.3, "--skip-bad"]
    assert run_script("split_val", "--check-first", *args) == (0, [])
    assert run_script("train", *args) == run_script("evaluate", *args) == (0, [])
    model, report = read_json(home / "model.json"), read_report(home / "results")
    assert len(model["seeds"]) == 2 and model["threshold_rule"] == "youden"
    assert report["threshold"] == model["threshold"]
    assert 0.3 in [row["prevalence"] for row in report["elsewhere"]]
