"""cxr/bootstrap.py: it equals SciPy's; intervals contain the true value as often as they claim."""

import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import read_report, write_rows
from scipy.special import logit
from simulated import by_scikit_learn, simulate, table_of

import cxr.bootstrap
from cxr.bootstrap import draw_scores, t_intervals
from cxr.predictions import as_arrays
from cxr.scores import BCA_INTERVAL, T_INTERVAL, aurocs, measure_scores, score
from cxr.weighted import weighted_auroc, weighted_average_precision

DESIGNS = [(40, 40, 1), (60, 15, 1), (30, 30, 3)]  # patients of each class, images per patient


def by_scipy(table, method, batch=None):
    """Draws patients with scipy.stats.bootstrap and scores them with scikit-learn, seed 3."""
    probs, labels, patients = as_arrays(table)
    rows_of = [[], []]  # for each class, the rows of each patient
    for label in (0, 1):
        for patient in dict.fromkeys(patients[labels == label]):
            rows_of[label].append(np.flatnonzero((labels == label) & (patients == patient)))

    def statistic(*drawn):
        rows = []
        for numbers, rows_of_patient in zip(drawn, rows_of, strict=True):
            rows += [rows_of_patient[i] for i in numbers[: len(rows_of_patient)]]
        rows = np.concatenate(rows)
        scores = by_scikit_learn(labels[rows], probs[rows], 0.5)
        return [scores[name] for name in (*T_INTERVAL, *BCA_INTERVAL)]

    # SciPy needs two patients in each class: a single one is listed twice, but used once.
    numbers = [np.arange(max(2, len(rows))) % len(rows) for rows in rows_of]
    options = {"n_resamples": cxr.bootstrap.DRAWS, "method": method, "batch": batch, "rng": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about scores that are the same in all samples
        return scipy.stats.bootstrap(numbers, statistic, vectorized=False, **options)


def small_table(case):
    """Returns 40 predictions of 15 patients, some of them with images in both classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    probs = np.clip(0.3 * labels + 0.7 * rng.random(40), 0, 1)
    if case == "ties":
        probs = probs.round(1)
    if case == "all correct":
        probs = labels
    if case == "all equal":
        probs = np.full(40, 0.3)
    table = table_of([f"{i}.png" for i in range(40)], labels, probs)
    patients = rng.integers(0, 15, 40).astype(str)
    if case == "one positive patient":
        patients[labels == 1] = "16"
    return table.assign(patient=patients)


CASES = "several images", "ties", "one positive patient", "all correct", "all equal"


@pytest.mark.parametrize("case", CASES)
def test_the_intervals_are_those_of_scipy_and_scikit_learn(case, monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 40)
    table = small_table(case)
    metrics = measure_scores(table, 0.5, 3)
    standard_errors = by_scipy(table, "percentile").standard_error[: len(T_INTERVAL)]
    n = table.groupby("label")["patient"].nunique().min()
    for name, standard_error in zip(T_INTERVAL, standard_errors, strict=True):
        value, low, high = (metrics[name][key] for key in ("value", "low", "high"))
        if standard_error < 1e-6:
            assert low is high is None
            continue
        degrees = max(n - 1, 1)
        logit_error = standard_error / (value * (1 - value)) * np.sqrt(n / degrees)
        expected = logit(value) + scipy.stats.t.interval(0.95, degrees, scale=logit_error)
        assert logit([low, high]) == pytest.approx(expected, abs=1e-5)
    limits = np.transpose(by_scipy(table, "BCa").confidence_interval)[len(T_INTERVAL) :]
    for name, expected in zip(BCA_INTERVAL, limits, strict=True):
        if np.isfinite(expected).all() and np.ptp(expected) > 1e-9:
            interval = metrics[name]["low"], metrics[name]["high"]
            assert interval == pytest.approx(expected, abs=1e-7)
        else:
            assert metrics[name]["low"] is metrics[name]["high"] is None


@pytest.mark.parametrize("samples_per_block", [7, 1])
def test_blocks_that_are_smaller_than_the_data_give_the_same_standard_errors(
    samples_per_block, monkeypatch
):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 60)
    monkeypatch.setattr(cxr.bootstrap, "BLOCK", 40 * samples_per_block)
    table = small_table("ties")
    probs, labels, patients = as_arrays(table)

    def statistic(weights):
        assert weights.shape[0] <= samples_per_block
        functions = weighted_auroc, weighted_average_precision
        return np.column_stack([function(probs, labels, weights) for function in functions])

    samples = draw_scores(labels, patients, statistic, 3)
    expected = by_scipy(table, "percentile", samples_per_block).bootstrap_distribution
    assert np.abs(samples.T - expected[: len(T_INTERVAL)]).max() < 1e-12


def test_the_intervals_of_the_scores_contain_the_true_value(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 200)
    rng, shares = np.random.default_rng(0), []  # of the intervals with the true value
    names = "auroc", "average_precision", "f1", "brier"
    for normal, pneumonia, per_patient in DESIGNS:
        (population,) = simulate(rng, 1000 * normal, 1000 * pneumonia)
        probs, labels, _ = as_arrays(population)
        truth = score(torch.from_numpy(probs), torch.from_numpy(labels), 0.5)
        hits = np.zeros(4)
        for seed in range(100):
            (table,) = simulate(rng, normal, pneumonia, per_patient)
            metrics = measure_scores(table, 0.5, seed)
            hits += [metrics[x]["low"] <= truth[x] <= metrics[x]["high"] for x in names]
        shares.append(hits / 100)
    pooled = np.mean(shares, axis=0)
    assert np.min(shares) >= 0.86 and pooled.max() <= 0.99, shares
    assert pooled.min() >= 0.91, pooled


def interval_of_equal_models(rng, design, seed):
    (mine, labels, patients), (other, *_) = map(as_arrays, simulate(rng, *design, models=2))

    def auroc_difference(weights):
        aurocs_of_samples = (weighted_auroc(probs, labels, weights) for probs in (mine, other))
        return np.subtract(*aurocs_of_samples)[:, None]

    value = np.subtract(*aurocs(np.stack([mine, other]), labels))
    samples = draw_scores(labels, patients, auroc_difference, seed)
    return t_intervals([value], samples, labels, patients)[0]


def test_the_intervals_of_paired_differences_contain_the_true_difference(monkeypatch):
    monkeypatch.setattr(cxr.bootstrap, "DRAWS", 200)
    rng, runs, widths, shares = np.random.default_rng(1), 100, [], []
    for design in DESIGNS:
        intervals = [interval_of_equal_models(rng, design, seed) for seed in range(runs)]
        widths += [interval["high"] - interval["low"] for interval in intervals]
        shares.append(np.mean([interval["low"] <= 0 <= interval["high"] for interval in intervals]))
    assert min(shares) >= 0.9 and 0.93 <= np.mean(shares) < 1 and np.mean(widths) < 0.25


def test_the_interval_of_a_mean_difference_is_students_t_interval():
    # The standard error that the bootstrap has for the mean of one class is known.
    rng = np.random.default_rng(0)
    labels, patients = np.repeat([0, 1], [12, 40]), np.arange(52)
    x = rng.normal(size=12)  # of the smaller class
    bootstrap_error = x.std() / np.sqrt(12)  # divided by n, not by n - 1
    samples = bootstrap_error * np.array([[-1], [1]]) / np.sqrt(2)  # their deviation is the error
    (interval,) = t_intervals([x.mean()], samples, labels, patients)
    expected = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (interval["low"], interval["high"]) == pytest.approx(tuple(expected))


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
