"""The data of the two sliders on the report page: threshold and prevalence.

sliders.html is this part of the page, and page.js computes with the data. The results equal those
of evaluate.py --from results --threshold T --prevalence P.
"""

import numpy as np

from cxr.predictions import as_arrays
from cxr.proportions import Z

MOST_IMAGES = 20_000  # with more images, the page would be large, and the sliders slow
START = 19  # position of the prevalence slider: 10 % (see prevalenceAt in page.js)


def slider_data(report, predictions):
    """Returns what page.js needs, as a dict for JSON; None if there are too many images.

    predictions: of readable images. The data contain no names: patients are numbered from 0.
    """
    if len(predictions) > MOST_IMAGES:
        return None
    probs, labels, patients = as_arrays(predictions)
    _, numbers = np.unique(patients, return_inverse=True)
    return {
        # 9 digits give the same float32 again.
        "probabilities": [float(f"{prob:.9g}") for prob in probs],
        "labels": labels.tolist(),
        "patients": numbers.tolist(),
        "classes": report["classes"],
        "threshold": report["threshold"],
        "threshold_text": f"{report['threshold']:.4g}",
        "position": START,
        "z": Z,
    }
