"""Compares the transforms that a model was trained with, as text in model.json, with today's."""

import math
import re

from cxr.errors import Failure

PLACES = {  # of the numbers that must be those of the training: where they are set
    "size": "SIZE in cxr/decode.py",
    "mean": "MEAN or normalize_for() in common.py",
    "std": "STD or normalize_for() in common.py",
}


def compare_transforms(then, now, path):
    """Returns a warning if transforms differ only in their text, otherwise no warning.

    then, now: the text of the transforms of the training and of today, one str for each; path: of
    the model. Raises Failure if the size, mean or standard deviation differ.
    """
    for name, place in PLACES.items():
        trained, found = read_numbers(name, then), read_numbers(name, now)
        if trained and found and not are_close(trained, found):
            trained, found = as_text(name, trained), as_text(name, found)
            advice = f"restore {place}"
            if name == "size":
                advice = f"set SIZE = {trained} in cxr/decode.py"
            what = f"trained with the {name} {trained}, now the {name} is {found}"
            raise Failure(f"{path}: {what}; {advice}, or train again (make train)")
    changed = ", ".join(text for text in now if text not in then)
    if not changed:
        return []
    text = f"{path.name} was trained with other transforms than those in common.py (now {changed})"
    advice = "train again, unless only the version of torchvision changed"
    return [f"{text}: its probabilities may be wrong; {advice}"]


def read_numbers(name, texts):
    """Returns the numbers of "name=[0.5, 0.5]" in the text of transforms; [] if there are none."""
    match = re.search(rf"\b{name}=[\[(]([^\])]*)", " ".join(texts))
    return (
        [float(number) for number in re.findall(r"[-+.\de]*\d[.\de]*", match[1])] if match else []
    )


def are_close(numbers, others):
    """Returns True if two lists hold the same numbers, up to rounding."""
    pairs = zip(numbers, others, strict=False)
    return len(numbers) == len(others) and all(math.isclose(*pair, abs_tol=1e-6) for pair in pairs)


def as_text(name, numbers):
    """Returns numbers for a message: (0.5, 0.5, 0.5), or 224 for a square size."""
    if name == "size" and len(set(numbers)) == 1:
        return f"{numbers[0]:g}"
    return "(" + ", ".join(f"{number:g}" for number in numbers) + ")"
