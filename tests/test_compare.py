"""cxr/compare.py: two models on the same images."""

import shutil

import numpy as np
import pytest
import scipy.stats
from helpers import read_report, write_rows
from scipy.special import expit, logit
from simulated import by_scikit_learn, simulate

import evaluate
from cxr.compare import COMPARED, paired_sign_test
from cxr.files import write_json
from cxr.predictions import as_arrays


@pytest.mark.parametrize(
    ("n", "only_mine", "only_theirs"),
    [(9, 0, 0), (9, 0, 1), (9, 1, 1), (9, 5, 0), (40, 3, 9), (900, 400, 480)],
)
def test_with_one_image_per_patient_the_sign_test_is_mcnemars_test(n, only_mine, only_theirs):
    n_different = only_mine + only_theirs
    correct = np.arange(n) < only_mine
    other_correct = (only_mine <= np.arange(n)) & (np.arange(n) < n_different)
    result = paired_sign_test(correct, other_correct, [f"{i}.png" for i in range(n)], 0)
    expected = scipy.stats.binomtest(only_mine, n_different).pvalue if n_different else 1.0
    assert result["p_value"] == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_rejects_equal_models_rarely_if_images_of_a_patient_are_correlated():
    rng, runs, rejected, rejected_by_image = np.random.default_rng(0), 150, 0, 0
    for seed in range(runs):
        tables = [as_arrays(table) for table in simulate(rng, 40, 40, 1, models=2)]
        correct = np.array([(probs > 0.5) == labels for probs, labels, _ in tables])
        # Three images per patient, which are nearly always all correct or all wrong.
        correct = np.repeat(correct, 3, axis=1) ^ (rng.random((2, 240)) < 0.02)
        result = paired_sign_test(*correct, np.repeat(np.arange(80), 3), seed)
        rejected += result["p_value"] < 0.05
        only_mine, only_theirs = (correct & ~correct[::-1]).sum(1).tolist()
        by_image = scipy.stats.binomtest(only_mine, only_mine + only_theirs or 1)
        rejected_by_image += by_image.pvalue < 0.05
    assert 0.01 <= rejected / runs <= 0.08 and rejected_by_image / runs > 0.12


def test_compare_computes_differences_and_counts_in_any_order_of_rows(tmp_path, rescore, capsys):
    rng = np.random.default_rng(5)
    (mine,) = simulate(rng, 40, 40, each=2)
    probs, labels, patients = as_arrays(mine)
    other_logits = logit(probs.astype(float)) + rng.normal(0, 1.5, len(probs))
    other_probs = expit(other_logits).astype(np.float32)
    files, order = mine["file"].tolist(), rng.permutation(len(probs))
    shuffled = [files[row] for row in order]
    a = write_rows(tmp_path / "a/predictions.csv", labels, probs, files)
    b = write_rows(tmp_path / "b/predictions.csv", labels[order], other_probs[order], shuffled)
    write_json(tmp_path / "b/metrics.json", {"threshold": 0.3})
    status, folder = rescore(a, "--compare", b)
    report, screen = read_report(folder), capsys.readouterr().out
    comparison = report["comparison"]
    mine = by_scikit_learn(labels, probs, 0.5)
    theirs = by_scikit_learn(labels, other_probs, 0.3)
    assert status == 0 and comparison["threshold"] == 0.3
    assert set(comparison["difference"]) == {*COMPARED} == {"accuracy", "f1", "auroc"}
    for name, interval in comparison["difference"].items():
        assert interval["value"] == pytest.approx(mine[name] - theirs[name], abs=1e-6)
        assert interval["low"] < interval["value"] < interval["high"]
        assert f"{interval['value']:.3f} ({interval['low']:.3f}" in screen
    tables = comparison["difference"], report["metrics"], comparison["other"]
    paired, mine, theirs = (table["auroc"]["high"] - table["auroc"]["low"] for table in tables)
    assert paired < (mine + theirs) / 2**0.5  # narrower than for independent images
    correct = (probs > 0.5) == labels
    other_correct = (other_probs > np.float32(0.3)) == labels
    only_mine, only_theirs = (correct & ~other_correct).sum(), (other_correct & ~correct).sum()
    assert comparison["right_only_here"] == only_mine
    assert comparison["right_only_there"] == only_theirs
    result = paired_sign_test(correct, other_correct, patients, 0)
    assert comparison["p_value"] == result["p_value"]
    assert f"{only_mine} images are correct only with this model, {only_theirs} only" in screen


def test_a_folder_of_results_does_not_differ_from_itself(run_evaluate, scored, tmp_path, capsys):
    folder = str(scored[0])
    assert run_evaluate("--compare", folder) == 0
    comparison = read_report(tmp_path / "results")["comparison"]
    assert comparison["difference"]["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert comparison["p_value"] == 1 and comparison["model"]["arch"] == "tinynet"
    capsys.readouterr()
    assert evaluate.main(["--from", folder, "--compare", folder]) == 0
    out = capsys.readouterr().out
    assert "This model minus" in out and f"{scored[0] / 'predictions.csv'}" in out


@pytest.mark.parametrize("flag", ["--from", "--compare"])
def test_the_folder_of_a_run_stands_for_the_table_in_its_results(flag, scored, tmp_path, capsys):
    shutil.copytree(scored[0], tmp_path / "runs" / "x" / "results")
    folders = {"--from": scored[0], "--compare": scored[0]} | {flag: tmp_path / "runs" / "x"}
    assert evaluate.main([str(word) for pair in folders.items() for word in pair]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "runs" / "x" / "results") in out or flag == "--from"


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (["a", "b", "d"], [0, 1, 1], ["the same 3 images", "example d"]),
        (["a", "b"], [0, 1], ["the same 3 images", "example c"]),
        (["a", "b", "c"], [0, 1, 0], ["c has another label"]),
    ],
)
def test_compare_refuses_other_images_or_labels(names, labels, words, tmp_path, capsys, rescore):
    a = write_rows(tmp_path / "a.csv", [0, 1, 1], [0.1, 0.8, 0.9], ["a", "b", "c"])
    b = write_rows(tmp_path / "b.csv", labels, [0.5] * len(labels), names)
    status, folder = rescore(a, "--compare", b)
    err = capsys.readouterr().err
    assert status == 2 and not [*folder.glob("*")]
    assert all(word in err for word in [str(b), *words])
