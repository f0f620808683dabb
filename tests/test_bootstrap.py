"""cxr/bootstrap.py: intervals hold the truth as often as they say."""

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import read_report, write_rows
from simulated import quick_score, simulate

import cxr.bootstrap
import cxr.scores
from cxr.bootstrap import paired_differences
from cxr.scores import measure_scores, score

DESIGNS = [(40, 40, 1), (60, 15, 1), (30, 30, 3)]  # equal classes, 1 to 4, three images a patient


def test_the_intervals_of_the_scores_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 100)
    monkeypatch.setattr(cxr.scores, "score", quick_score)
    rng, runs = np.random.default_rng(0), 40
    pooled = dict.fromkeys(("auroc", "average_precision", "f1", "brier"), 0)
    for normal, pneumonia, each in DESIGNS:
        (whole,) = simulate(rng, 1000 * normal, 1000 * pneumonia)
        truth = score(torch.from_numpy(whole.probs), torch.from_numpy(whole.labels), 0.5)
        hits = dict.fromkeys(pooled, 0)
        for seed in range(runs):
            (table,) = simulate(rng, normal, pneumonia, each)
            metrics, _ = measure_scores(table, 0.5, seed)
            for name in hits:
                hits[name] += metrics[name]["low"] <= truth[name] <= metrics[name]["high"]
        for name, count in hits.items():
            assert count / runs >= 0.8, (name, normal, pneumonia, each)
            pooled[name] += count / runs / len(DESIGNS)
    assert all(share <= 0.99 for share in pooled.values()), pooled
    assert min(pooled["auroc"], pooled["average_precision"]) >= 0.91, pooled
    assert min(pooled["f1"], pooled["brier"]) >= 0.87, pooled  # BCa's, of few draws


def test_the_intervals_of_paired_differences_hold_the_truth(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 60)
    rng, runs, widths, held = np.random.default_rng(1), 40, [], []
    for design in DESIGNS:
        hits = 0
        for seed in range(runs):
            here, there = simulate(rng, *design, models=2)  # as good as each other: difference 0

            def differences(rows, pair=(here, there)):
                labels = pair[0].labels[rows] == 1
                ranks = scipy.stats.rankdata([table.probs[rows] for table in pair], axis=1)
                sums = ranks[:, labels].mean(1) / (~labels).sum()
                return sums[:1] - sums[1:]

            (found,) = paired_differences(here, differences, seed)
            hits += found["low"] <= 0 <= found["high"]
            widths.append(found["high"] - found["low"])
        held.append(hits / runs)
    assert min(held) >= 0.88 and 0.92 <= np.mean(held) < 1 and np.mean(widths) < 0.25


def test_the_same_seed_draws_the_same_interval_and_images_of_a_patient_widen_it(tmp_path, rescore):
    (table,) = simulate(np.random.default_rng(0), 15, 15, each=4)
    alone = [f"{i}.png" for i in range(len(table.files))]
    found = {}
    for key, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 0)):
        names = alone if key == "d" else table.files
        source = write_rows(tmp_path / key / "p.csv", table.labels, table.probs, names)
        _, folder = rescore(source, "--seed", seed)
        found[key] = read_report(folder)["metrics"]["auroc"]
    assert found["a"] == found["b"] and found["a"] != found["c"]
    width = {key: each["high"] - each["low"] for key, each in found.items()}
    assert width["a"] > 1.3 * width["d"]


def test_intervals_without_any_spread_are_named(tmp_path, capsys, rescore):
    (table,) = simulate(np.random.default_rng(0), 30, 7, apart=9)
    status, folder = rescore(write_rows(tmp_path / "p.csv", table.labels, table.probs, table.files))
    report = read_report(folder)
    assert status == 0 and report["metrics"]["auroc"]["value"] == pytest.approx(1)
    assert {"auroc", "average_precision"} <= set(report["without_spread"])
    assert "No interval of " in capsys.readouterr().out
