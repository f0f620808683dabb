"""How well a simple measurement of an image, such as the file size, predicts its class.

If such a number is as good as the network, the network may have learned no more than this number.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr.bootstrap import draw_scores, t_intervals
from cxr.measurements import image_numbers, thin_out
from cxr.predictions import as_arrays
from cxr.scores import aurocs
from cxr.weighted import weighted_auroc


def read_image_numbers(xrays, size):
    """Reads the numbers of the readable images, as (names, float (n, k), labels int (n,))."""

    def numbers_or_none(xray):
        try:
            return image_numbers(xray.path, size)[0]
        except Exception:  # damaged files make decoders raise nearly anything
            return None

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(numbers_or_none, xrays))
    names, rows, labels = [], [], []
    for numbers, xray in zip(results, xrays, strict=True):
        if numbers is not None:
            names = list(numbers)
            rows.append(list(numbers.values()))
            labels.append(xray.label)
    return names, np.array(rows), np.array(labels)


def single_number_baselines(predictions, xrays, training, reason, size, seed):
    """Compares the network's AUROC with that of single numbers, for metrics.json.

    predictions: the table of `xrays`; training: Xrays of train/ and val/; reason: why `training`
    is empty. Returns {"none": reason} if there is nothing to compare with.
    """
    names, train_numbers, train_labels = read_image_numbers(thin_out(training), size)
    _, test_numbers, test_labels = read_image_numbers(xrays, size)
    if len(set(train_labels)) < 2 or len(test_labels) < len(xrays):
        return {"none": reason or "an image cannot be read any more"}
    names.append("all numbers")  # a logistic regression on all of them
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit(train_numbers, train_labels)
    # From now on, one row for each number and one column for each image.
    train_numbers = np.vstack([train_numbers.T, model.decision_function(train_numbers)])
    test_numbers = np.vstack([test_numbers.T, model.decision_function(test_numbers)])

    # The best number and all directions are chosen on train/ and val/.
    train_aurocs = aurocs(train_numbers, train_labels)
    best = names[int(np.argmax(np.abs(train_aurocs[:-1] - 0.5)))]
    signs = np.where(train_aurocs >= 0.5, 1, -1)
    probs, labels, patients = as_arrays(predictions)
    scores = np.vstack([probs, signs[:, None] * test_numbers])  # row 0: the network

    # The accuracy would be unfair: the number's cut-off is fitted to it, the network's is not.
    def differences(weights):
        sampled = [weighted_auroc(row, labels, weights) for row in scores]
        return sampled[0][:, None] - np.column_stack(sampled[1:])

    network_auroc, *test_aurocs = aurocs(scores, labels)
    values = np.subtract(network_auroc, test_aurocs)
    samples = draw_scores(labels, patients, differences, seed)
    gains = t_intervals(values, samples, labels, patients)
    numbers = {}
    for name, sign, auroc, gain in zip(names, signs, test_aurocs, gains, strict=True):
        numbers[name] = {"sign": int(sign), "auroc": float(auroc), "difference": gain}
        numbers[name]["network_is"] = compare_in_words(gain)
    return {"number": best, "fitted_on": len(train_labels), "numbers": numbers} | numbers[best]


def compare_in_words(gain):
    """Says whether the network is better. gain: its AUROC minus that of a number, with interval."""
    if gain["value"] <= 0:
        return "NOT BETTER"
    if gain["low"] is not None and gain["low"] > 0:
        return "better"
    return "better, but this may be chance"
