"""The methods section of a paper, as far as a run can write it: results/methods.md and the page.

report: the content of metrics.json. Facts that the report does not have are left out.
"""

import re
import shlex
from pathlib import Path

from cxr.bootstrap import DRAWS
from cxr.files import atomic_write
from cxr.finetune import HEAD_LR, TAIL_LR, WEIGHT_DECAY
from cxr.folders import in_classes
from cxr.guidelines import GUIDELINES, answered_subjects, knows_all_sets, unanswered_subjects
from cxr.scores import is_measured
from cxr.sentences import SPLIT_NAMES, capitalised, list_versions
from cxr.source_sentences import other_sources_sentences

# What the text form of a transform says, in words. The groups of a pattern fill in its numbers.
CHANGES = {
    r"RandomHorizontalFlip\(p=([\d.]+)": "mirrored with probability {}",
    r"degrees=\[-[\d.]+, ([\d.]+)\]": "rotated by up to {} degrees",
    r"translate=\(([\d.]+), [\d.]+\)": "shifted by up to {} of the width and height",
    r"scale=\(([\d.]+), ([\d.]+)\)": "scaled by {} to {}",
    r"brightness=\(([\d.]+), ([\d.]+)\)": "brightness multiplied by {} to {}",
    r"contrast=\(([\d.]+), ([\d.]+)\)": "contrast multiplied by {} to {}",
}
REFERENCES = (
    "Wilson EB. Probable inference, the law of succession, and statistical inference. Journal of "
    "the American Statistical Association 1927; 22: 209-212.",
    "Rao JNK, Scott AJ. A simple method for the analysis of clustered binary data. Biometrics "
    "1992; 48: 577-585.",
    "Efron B. Better bootstrap confidence intervals. Journal of the American Statistical "
    "Association 1987; 82: 171-185.",
    "Donner A, Zou GY. Closed-form confidence intervals for functions of the normal mean and "
    "standard deviation. Statistical Methods in Medical Research 2012; 21: 347-359.",
    "Van Calster B, McLernon DJ, van Smeden M, Wynants L, Steyerberg EW. Calibration: the Achilles "
    "heel of predictive analytics. BMC Medicine 2019; 17: 230.",
)


def methods_paragraphs(report):
    """Returns the methods section in plain English, as a list of paragraphs."""
    model = report["model"] or {}
    parts = [
        [*image_sentences(report), *preparation_sentences(model)],
        [*network_sentences(model), *training_sentences(model), *fitted_sentences(report)],
        statistics_sentences(report),
    ]
    return [" ".join(sentences) for sentences in parts if sentences]


def image_sentences(report):
    """Describes the images, the patients and the split."""
    model, split = report["model"] or {}, SPLIT_NAMES[report["split"]]
    negative, positive = report["classes"]
    images = "Drawn images, which are no radiographs," if report["drawn"] else "Chest radiographs"
    sentences = [f"{images} of two classes were used: {negative} and {positive}."]
    sets = []
    for name, n in (model.get("images") or {}).items():
        patients = model.get(f"{name}_patients")
        images = f"{n:,} images"
        if patients:  # an earlier version did not write them
            images += f" of {in_classes(patients)} patients"
        sets.append(f"the {SPLIT_NAMES[name]} set had {images}")
    sets.append(
        f"the {split} set had {report['n']:,} images of {in_classes(report['patients_by_class'])} "
        "patients"
    )
    sentences.append(capitalised(f"{'; '.join(sets)}."))
    unknown = report["names_without_patient"]
    if unknown == report["n"]:
        sentences.append("The patients are unknown; each image counted as one patient.")
    elif unknown:
        sentences.append(
            f"Images of the {split} set without a known patient: {unknown:,}; each counts as one "
            "patient."
        )
    leaks = report["leaks"]
    if leaks and report["split"] == "test":
        shared = len(leaks["images"]), len(leaks["patients"])
        if any(shared):
            sentences.append(
                f"{shared[0]:,} test images were also training or validation images, and "
                f"{shared[1]:,} were of patients of these sets."
            )
        elif knows_all_sets(report):
            sentences.append(
                "No test image and no known patient of the test set was in the other sets."
            )
    n_left_out = sum(report["left_out"].values())
    if n_left_out:
        images = "1 image" if n_left_out == 1 else f"{n_left_out:,} images"
        sentences.append(f"Left out because they could not be read: {images}.")
    return sentences


def preparation_sentences(model):
    """Describes how an image becomes the input of the network."""
    transforms = model.get("transforms")
    if not transforms:
        return []
    size = re.search(r"size=\[(\d+), (\d+)\]", transforms[0])
    steps = ["Each image was converted to one grey channel"]
    if size:
        steps.append(f"resized to {size[1]} by {size[2]} pixels without cropping")
    window = model.get("window")
    if window:
        steps.append(
            f"stretched between its {ordinal(window)} and {ordinal(100 - window)} percentile of "
            "grey levels"
        )
    mean = "the mean and standard deviation of ImageNet" if "0.485" in transforms[-1] else ""
    steps.append(f"normalised with {mean or 'the values of its pretraining'}")
    return [f"{', '.join(steps[:-1])}, and {steps[-1]}."]


def ordinal(number):
    """Formats a percentile: 2nd, 98th, 2.5th."""
    text = f"{number:g}"
    endings = {"1": "st", "2": "nd", "3": "rd"}
    ending = endings.get(text[-1], "th") if text.isdecimal() and text[-2:-1] != "1" else "th"
    return text + ending


def network_sentences(model):
    """Describes the network, its weights, and which part of it was trained."""
    if not model.get("arch"):
        return []
    weights = model.get("weights")
    kinds = {
        None: "weights of unknown origin",
        "imagenet": "weights pretrained on ImageNet (the default weights of torchvision)",
        "random": "random weights, without pretraining",
    }
    origin = kinds.get(weights) or f"pretrained weights from the file {Path(weights).name}"
    sentences = [f"The network was {model['arch']} with {origin}."]
    if model.get("flags"):  # train.py made it
        sentences.append(
            "Its weights were frozen, and one output neuron (logistic regression) was trained on "
            "its features, which were standardised with mean and standard deviation of the "
            "training images."
        )
    return sentences


def training_sentences(model):
    """Describes loss, optimizer, data augmentation and model selection."""
    flags = model.get("flags")
    if not flags:
        return []
    decay = flags.get("weight_decay")
    optimizer = f"learning rate {flags['lr']:g}, batches of {flags['batch_size']} images"
    optimizer += f", weight decay {decay:g}" if decay else ""
    stop = f"training stopped after {flags['patience']} epochs without a lower validation loss"
    if not flags["patience"]:
        stop = "training did not stop early"
    sentences = [
        "Binary cross-entropy, in which both classes had the same total weight, was minimised "
        f"with Adam ({optimizer}) for at most {flags['epochs']} epochs. The learning rate was "
        f"halved when the validation loss no longer fell, and {stop}."
    ]
    n_views = flags["views"]
    if n_views > 1:
        views = "itself and its mirror image"
        if n_views > 2:
            views = f"itself, its mirror image and {n_views - 2} random changes of it"
            views += f" ({changes_in_words(model)})"
        sentences.append(f"Each epoch used one of {n_views} views of every image: {views}.")
    return [*sentences, *selection_sentences(model, flags)]


def selection_sentences(model, flags):
    """Says which epoch was kept, of which training, and describes fine-tuning."""
    tuning, n_seeds = model.get("fine_tuning") or {}, flags.get("seeds", 1)
    is_tuned = tuning.get("is_saved")
    loss = tuning["frozen_val_loss"] if is_tuned else model["val_loss"]
    selected = "The epoch with the lowest validation loss"
    if n_seeds > 1:
        selected += f" was kept in each of {n_seeds} trainings with other seeds, and the mean of "
        selected += "these output neurons was used"
    else:
        selected += f" ({loss:.3f}) was kept"
        selected += "" if is_tuned else f", which was epoch {model['epoch']}"
    if tuning and not is_tuned:
        return [
            f"{selected}.",
            f"Fine-tuning of the network was tried from {tuning['unfreeze']} on, and not used: its "
            f"validation loss was {tuning['val_loss']:.3f}, against "
            f"{tuning['frozen_val_loss']:.3f} without it.",
        ]
    if not is_tuned:
        return [f"{selected}."]
    best = f", in the best of {n_seeds} trainings with other seeds" if n_seeds > 1 else ""
    return [
        f"{selected}.",
        f"Then the network was fine-tuned from {tuning['unfreeze']} on, with a new output neuron, "
        f"the same views, loss and batches, and AdamW for {flags['finetune_epochs']} epochs "
        f"(weight decay {WEIGHT_DECAY:g}, one cycle of the learning rate up to {TAIL_LR:g}, for "
        f"the output neuron up to {HEAD_LR:g}, without dropout, and with the BatchNorm statistics "
        f"of the pretraining). Epoch {model['epoch']} was kept{best}: it had a validation loss of "
        f"{tuning['val_loss']:.3f}.",
    ]


def changes_in_words(model):
    """Describes the random changes of the data augmentation."""
    augmentation = (model.get("transforms") or ["", ""])[1]
    found = []
    for pattern, words in CHANGES.items():
        match = re.search(pattern, augmentation)
        if match:
            found.append(words.format(*(f"{float(number):g}" for number in match.groups())))
    return ", ".join(found) or augmentation


def fitted_sentences(report):
    """Describes calibration and threshold."""
    model, sentences = report["model"] or {}, []
    slope, intercept = model.get("slope"), model.get("intercept")
    if slope is not None and (slope, intercept) != (1, 0):
        sentences.append(
            "The probabilities were calibrated on the validation set by Platt scaling (slope "
            f"{slope:.3f}, intercept {intercept:.3f})."
        )
    rule = model.get("threshold_rule") or ""
    origin = "was set when the images were scored"
    if report["threshold_from"] != "--threshold":
        origin = {
            "fixed": "was fixed in advance",
            "youden": "maximised Youden's index on the validation set",
            "": "was the default",
        }.get(rule) or f"reached {rule.replace('=', ' ')} on the validation set"
    threshold = f"{report['threshold']:.4g}"
    sentences.append(
        f"An image counted as {report['classes'][1]} if its probability was above {threshold}; "
        f"this threshold {origin}."
    )
    return sentences


def statistics_sentences(report):
    """Describes the intervals, with the numbers of REFERENCES, and the versions of the packages."""
    packages = {name: number for name, number in report["versions"].items() if name != "platform"}
    sentences = [
        "All intervals are 95 % confidence intervals that allow for several images of one patient. "
        "Accuracy, sensitivity, specificity, PPV and NPV have Wilson's score interval [1] with the "
        "effective sample size of clustered data [2].",
        "AUROC and average precision have a Student's t interval on the logit scale; its standard "
        f"error comes from {DRAWS:,} bootstrap samples of patients, drawn within each class. F1 "
        "and Brier score have the BCa interval [3] of the same samples.",
        "PPV and NPV at other prevalences come from the likelihood ratios, with intervals by the "
        "method of variance estimates recovery [4].",
    ]
    if is_measured(report["calibration"]):
        sentences.append(
            "Calibration intercept and slope [5] have Wald intervals clustered by patient."
        )
    if "numbers" in (report["shortcut"] or {}):
        sentences.append(
            "As a baseline, simple numbers of the images, such as the file size, predicted the "
            "class; the AUROC of the network was compared with theirs in the same samples."
        )
    if report["comparison"]:
        test = report["comparison"]["test"]
        sentences.append(
            "Two models were compared on the same images, by the differences of their scores in "
            f"the same bootstrap samples and by the test of equal accuracy ({test})."
        )
    sentences += other_sources_sentences(report)
    return [*sentences, f"Software: {list_versions(packages)}."]


def write_methods(path, report):
    """Writes methods.md: the paragraphs, their references, and the subjects of the guidelines."""
    lines = ["# For your methods section", ""]
    for paragraph in methods_paragraphs(report):
        lines += [paragraph, ""]
    lines += [f"{i}. {text}" for i, text in enumerate(REFERENCES, 1)]
    lists = {
        "What this answers of CLAIM 2024 and TRIPOD+AI": answered_subjects(report),
        "What only you can answer": unanswered_subjects(report),
        "The guidelines": GUIDELINES,
    }
    for heading, texts in lists.items():
        lines += ["", f"## {heading}", "", *(f"- {text}" for text in texts)]
    with atomic_write(path, "w") as file:
        file.write("\n".join([*lines, ""]))


def command_lines(report):
    """Returns the command lines of the training, without paths, and of the scoring."""
    words = ["train.py"]
    for name, value in ((report["model"] or {}).get("flags") or {}).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value != "None":
            words += [flag, Path(str(value)).name]
    training = [shlex.join(words)] if len(words) > 1 else []
    return [f"python {line}" for line in (*training, *report["commands"])]
