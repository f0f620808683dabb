"""cxr/compare.py: two models on the same images."""

import math

import numpy as np
import pytest
import scipy.stats
from helpers import TINY_FAST, read_report, write_rows
from scipy.special import expit, logit
from simulated import by_scikit_learn, simulate

import evaluate
import train
from cxr.compare import paired_sign_test
from cxr.files import write_json


@pytest.mark.parametrize(
    ("n", "here", "there"),
    [(9, 0, 0), (9, 0, 1), (9, 1, 1), (9, 5, 0), (40, 3, 9), (900, 400, 480)],
)
def test_the_sign_test_is_mcnemar_s_at_one_image_a_patient(n, here, there):
    right = np.zeros((2, n), bool)
    right[0, :here] = right[1, here : here + there] = True
    found = paired_sign_test(*right, [f"{i}.png" for i in range(n)], 0)
    expected = scipy.stats.binomtest(here, here + there).pvalue if here + there else 1.0
    assert found["p_value"] == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_counts_patients_where_their_images_are_alike():
    rng, sets, rejected, by_image = np.random.default_rng(0), 150, 0, 0
    for seed in range(sets):
        here, there = (table.probs > 0.5 for table in simulate(rng, 40, 40, 1, models=2))
        right = [np.repeat(each == (np.arange(80) >= 40), 3) for each in (here, there)]
        odd = rng.random((2, 240)) < 0.02  # nearly alike
        right = [each ^ other for each, other in zip(right, odd, strict=True)]
        found = paired_sign_test(*right, np.repeat(np.arange(80), 3), seed)
        rejected += found["p_value"] < 0.05
        only = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
        by_image += scipy.stats.binomtest(int(only[0]), int(sum(only)) or 1).pvalue < 0.05
    assert 0.01 <= rejected / sets <= 0.08 and by_image / sets > 0.12


def test_compare_gives_the_paired_differences_whatever_the_order_of_the_rows(
    tmp_path, capsys, rescore
):
    rng = np.random.default_rng(5)
    (here,) = simulate(rng, 40, 40, each=2)
    logits = logit(here.probs.astype(float)) + rng.normal(0, 1.5, len(here.files))
    there = here._replace(probs=expit(logits).astype(np.float32))
    labels, order = here.labels, rng.permutation(len(here.files))
    a = write_rows(tmp_path / "a/predictions.csv", labels, here.probs, here.files)
    names = [here.files[i] for i in order]
    b = write_rows(tmp_path / "b/predictions.csv", labels[order], there.probs[order], names)
    write_json(tmp_path / "b/metrics.json", {"threshold": 0.3})
    status, folder = rescore(a, "--compare", b)
    report, screen = read_report(folder), capsys.readouterr().out
    found = report["comparison"]
    ours = by_scikit_learn(labels, here.probs, 0.5)
    theirs = by_scikit_learn(labels, there.probs, 0.3)
    assert status == 0 and found["threshold"] == 0.3
    for name in ("accuracy", "f1", "auroc"):
        difference = found["difference"][name]
        assert difference["value"] == pytest.approx(ours[name] - theirs[name], abs=1e-6)
        assert difference["low"] < difference["value"] < difference["high"]
        assert f"{difference['value']:.3f} ({difference['low']:.3f}" in screen
    alone = [m["auroc"]["high"] - m["auroc"]["low"] for m in (report["metrics"], found["other"])]
    width = found["difference"]["auroc"]["high"] - found["difference"]["auroc"]["low"]
    assert width < sum(alone) / math.sqrt(2)  # pairing narrows it
    right = [(here.probs > 0.5) == labels, (there.probs > np.float32(0.3)) == labels]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert [found["right_only_here"], found["right_only_there"]] == only
    assert found["p_value"] == paired_sign_test(*right, here.clusters(), 0)["p_value"]
    assert f"{only[0]} images are right only here, {only[1]} only there" in screen


def test_compare_works_with_a_fresh_run(run_evaluate, scored, tmp_path):
    assert run_evaluate("--compare", scored[0] / "predictions.csv") == 0
    found = read_report(tmp_path / "results")["comparison"]
    assert found["difference"]["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["p_value"] == 1 and found["model"]["arch"] == "tinynet"


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (["a", "b", "d"], [0, 1, 1], "2 are in one only, as c"),
        (["a", "b"], [0, 1], "1 are in one only, as c"),
        (["a", "b", "c"], [0, 1, 0], "c has another label"),
    ],
)
def test_compare_refuses_other_images_or_labels(names, labels, words, tmp_path, capsys, rescore):
    a = write_rows(tmp_path / "a.csv", [0, 1, 1], [0.1, 0.8, 0.9], ["a", "b", "c"])
    b = write_rows(tmp_path / "b.csv", labels, [0.5] * len(labels), names)
    status, folder = rescore(a, "--compare", b)
    assert status == 2 and words in capsys.readouterr().err and not [*folder.glob("*")]


def test_a_folder_of_results_can_be_compared_and_scored_again(data, tmp_path, flags, capsys):
    assert train.main(flags(data, *TINY_FAST)) == evaluate.main(flags(data)) == 0
    results = tmp_path / "results"
    assert evaluate.main(["--from", str(results), "--compare", str(results)]) == 0
    assert f"This model minus {results / 'predictions.csv'}" in capsys.readouterr().out
