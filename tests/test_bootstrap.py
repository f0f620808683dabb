"""cxr/bootstrap.py: intervals contain the true value as often as they claim."""

import numpy as np
import pytest
import torch
from helpers import read_report, write_rows
from simulated import quick_score, simulate

import cxr.bootstrap
import cxr.scores
from cxr.bootstrap import paired_differences
from cxr.predictions import as_arrays
from cxr.scores import aurocs, measure_scores, score

DESIGNS = [(40, 40, 1), (60, 15, 1), (30, 30, 3)]  # patients of each class, images per patient


def test_the_intervals_of_the_scores_contain_the_true_value(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 100)
    monkeypatch.setattr(cxr.scores, "score", quick_score)
    rng, shares = np.random.default_rng(0), []  # of the intervals with the true value
    names = "auroc", "average_precision", "f1", "brier"
    for normal, pneumonia, per_patient in DESIGNS:
        (population,) = simulate(rng, 1000 * normal, 1000 * pneumonia)
        probs, labels, _ = as_arrays(population)
        truth = score(torch.from_numpy(probs), torch.from_numpy(labels), 0.5)
        hits = np.zeros(4)
        for seed in range(40):
            (table,) = simulate(rng, normal, pneumonia, per_patient)
            metrics = measure_scores(table, 0.5, seed)
            hits += [metrics[x]["low"] <= truth[x] <= metrics[x]["high"] for x in names]
        shares.append(hits / 40)
    pooled = np.mean(shares, axis=0)
    assert np.min(shares) >= 0.8 and pooled.max() <= 0.99, shares
    assert pooled[:2].min() >= 0.91, pooled
    assert pooled[2:].min() >= 0.87, pooled  # f1 and brier: BCa with few bootstrap samples


def interval_of_equal_models(rng, design, seed):
    (mine, labels, patients), (other, *_) = map(as_arrays, simulate(rng, *design, models=2))

    def auroc_difference(rows):
        return np.diff(aurocs(np.stack([other, mine])[:, rows], labels[rows]))

    return paired_differences(labels, patients, auroc_difference, seed)[0]


def test_the_intervals_of_paired_differences_contain_the_true_difference(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 60)
    rng, runs, widths, shares = np.random.default_rng(1), 40, [], []
    for design in DESIGNS:
        intervals = [interval_of_equal_models(rng, design, seed) for seed in range(runs)]
        widths += [interval["high"] - interval["low"] for interval in intervals]
        shares.append(np.mean([interval["low"] <= 0 <= interval["high"] for interval in intervals]))
    assert min(shares) >= 0.88 and 0.92 <= np.mean(shares) < 1 and np.mean(widths) < 0.25


def test_the_interval_follows_the_seed_and_is_wider_for_several_images_of_a_patient(
    tmp_path, rescore
):
    (table,) = simulate(np.random.default_rng(0), 15, 15, each=4)
    probs, labels, _ = as_arrays(table)

    def interval(names, seed=0):
        source = write_rows(tmp_path / "p.csv", labels, probs, names)
        auroc = read_report(rescore(source, "--seed", seed)[1])["metrics"]["auroc"]
        return auroc["low"], auroc["high"]

    clustered = interval(table["file"].tolist())
    assert interval(table["file"].tolist()) == clustered
    assert interval(table["file"].tolist(), seed=1) != clustered
    assert np.ptp(clustered) > 1.3 * np.ptp(interval(None))


def test_scores_without_an_interval_are_named(tmp_path, capsys, rescore):
    (table,) = simulate(np.random.default_rng(0), 30, 7, apart=9)
    probs, labels, _ = as_arrays(table)
    status, folder = rescore(write_rows(tmp_path / "p.csv", labels, probs, table["file"].tolist()))
    report = read_report(folder)
    assert status == 0 and report["metrics"]["auroc"]["value"] == pytest.approx(1)
    assert {"auroc", "average_precision"} <= set(report["without_spread"])
    assert f"No interval for {', '.join(report['without_spread'])}" in capsys.readouterr().out
