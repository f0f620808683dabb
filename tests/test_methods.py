"""cxr/methods.py: the methods section says what this run did, and nothing that it does not know."""

import pytest
from helpers import read_report

from cxr.guidelines import answered_subjects
from cxr.methods import command_lines, methods_paragraphs, write_methods


@pytest.fixture
def report(scored):
    return read_report(scored[0])


def test_the_paragraphs_describe_images_network_training_and_statistics(report):
    images, training, statistics = methods_paragraphs(report)
    assert images.startswith("Drawn images, which are no radiographs, of two classes were used")
    report["drawn"] = False
    assert methods_paragraphs(report)[0].startswith("Chest radiographs of two classes were used: N")
    assert "The training set had 40 images of 20 NORMAL and 20 PNEUMONIA patients;" in images
    assert "the validation set had 24 images of 12 NORMAL and 12 PNEUMONIA patients" in images
    assert "No test image and no known patient of the test set was in the other sets." in images
    assert "resized to 224 by 224 pixels without cropping, stretched between its 2nd and" in images
    assert "98th percentile of grey levels, and normalised with the mean and standard" in images
    assert "The network was tinynet with random weights" in training
    assert "Adam (learning rate 0.1, batches of 32 images) for at most 50 epochs" in training
    assert "Each epoch used one of 2 views of every image: itself and its mirror image" in training
    assert f"which was epoch {report['model']['epoch']}." in training
    assert "calibrated on the validation set by Platt scaling" in training
    assert "was above 0.5; this threshold was fixed in advance." in training
    assert "Wilson's score interval [1]" in statistics and "torchmetrics" in statistics


def test_choices_of_the_training_change_the_paragraph(report):
    model = report["model"]
    model["flags"] |= {"views": 8, "seeds": 10, "patience": 0, "weight_decay": 0.01}
    model |= {"epoch": 7, "val_loss": 0.15}
    model |= {"window": 0, "slope": 1, "intercept": 0, "threshold_rule": "youden"}
    model["fine_tuning"] = {
        "is_saved": True, "unfreeze": "layer4", "frozen_val_loss": 0.2, "val_loss": 0.15
    }  # fmt: skip
    images, training, _ = methods_paragraphs(report)
    assert "percentile" not in images and "Platt" not in training
    assert "6 random changes of it (mirrored with probability 0.5, rotated by up to 10 " in training
    assert "brightness multiplied by 0.8 to 1.2, contrast multiplied by 0.65 to 1.35)" in training
    assert "in each of 10 trainings with other seeds, and the mean" in training
    assert "weight decay 0.01" in training and "training did not stop early" in training
    assert "maximised Youden's index on the validation set" in training
    assert "lowest validation loss was kept in each of 10 trainings" in training
    assert "fine-tuned from layer4 on, with a new output neuron" in training
    assert "learning rate up to 0.0001, for the output neuron up to 0.001" in training
    assert "Epoch 7 was kept, in the best of 10 trainings with other seeds: it had a v" in training
    report["threshold_from"] = "--threshold"
    assert "was set when the images were scored" in methods_paragraphs(report)[1]
    model["fine_tuning"]["is_saved"] = False
    model["fine_tuning"]["val_loss"] = 0.25
    training = methods_paragraphs(report)[1]
    assert "fine-tuned" not in training
    assert "lowest validation loss was kept in each of 10 trainings with other seeds" in training
    assert "Fine-tuning of the network was tried from layer4 on, and not used: its val" in training
    assert "validation loss was 0.250, against 0.200 without it." in training


def test_leaks_and_unknown_patients_are_told(report):
    report["leaks"]["images"], report["leaks"]["patients"] = [1, 2], [1, 2, 3]
    report["names_without_patient"], report["left_out"] = 5, {"train/NORMAL": 2}
    images = methods_paragraphs(report)[0]
    assert "2 test images were also training or validation images, and 3 were of patients" in images
    assert "No test image" not in images and "set without a known patient: 5; each c" in images
    assert "Left out because they could not be read: 2 images." in images
    report["names_without_patient"] = report["n"]
    images = methods_paragraphs(report)[0]
    assert "The patients are unknown; each image counted as one patient." in images


@pytest.mark.parametrize("unknown", [{"learned": 0}, {"present": 0}, {"absent": 3}])
def test_without_the_images_of_the_model_nothing_is_said_about_shared_patients(report, unknown):
    report["leaks"] |= unknown
    assert "was in the other sets" not in methods_paragraphs(report)[0]
    assert answered_subjects(report)[0] == "the number of images and patients"


def test_patients_of_another_source_that_are_unknown_are_told(report):
    first = {"name": "here"}
    other = {"name": "there", "n": 5, "names_without_patient": 5, "local_data": None}
    report["also"] = [first, other | {"patients_by_class": {"NORMAL": 2, "PNEUMONIA": 3}}]
    assert "(patients unknown; each image counted as one)" in methods_paragraphs(report)[2]
    other["names_without_patient"] = 4
    report["also"][1] |= other
    assert "patients unknown" not in methods_paragraphs(report)[2]


def test_a_table_without_a_model_has_a_methods_section_without_a_network(report, tmp_path):
    report["model"], report["leaks"], report["commands"] = None, None, []
    images, threshold, _ = methods_paragraphs(report)
    assert "The test set had 24 images" in images and "No test image" not in images
    assert threshold.startswith("An image counted as PNEUMONIA")
    assert command_lines(report) == []
    write_methods(tmp_path / "methods.md", report)
    assert "tinynet" not in (tmp_path / "methods.md").read_text()


def test_the_command_lines_have_no_folder_of_an_absolute_path(report):
    training, scoring = command_lines(report)
    assert training.startswith("python train.py ") and "--arch tinynet" in training
    assert "--patience 5" in training and "--lr 0.1" in training
    assert scoring.startswith("python evaluate.py --data-dir chestxrays --checkpoint model.pth")
    assert "/" not in training + scoring
