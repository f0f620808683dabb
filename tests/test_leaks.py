"""cxr/leaks.py: images and patients that are in more than one split."""

import shutil

import faults
import pytest
from faults import put
from helpers import TINY, read_report

import evaluate
import train
from cxr.folders import CLASSES, list_images
from cxr.patients import patient_from_name


@pytest.mark.parametrize("train_exists", [True, False])
def test_training_images_among_the_test_images_cause_a_warning(
    run_evaluate, data, tmp_path, capsys, train_exists
):
    for name in CLASSES:
        first = list_images(data / "train" / name)[0]
        shutil.copy(first, data / "test" / name / f"copy{first.suffix}")
    if not train_exists:  # model.json has the hashes, too
        shutil.rmtree(data / "train")
    assert run_evaluate("--data-dir", data) == 0
    warnings = read_report(tmp_path / "results")["warnings"]
    (warning,) = [text for text in warnings if "TRAINING OR VALIDATION IMAGES" in text]
    assert warning.startswith("2 of 26 test images ARE ALSO") and "no test result" in warning
    assert "for example no. 13:" in warning and "Remove them from test/, or keep" in warning
    named = warning.replace("no. 13", "no. 13 (test/NORMAL/copy.jpeg)")
    assert f"warning: {named}" in capsys.readouterr().err  # the screen shows the name, too


def test_a_model_of_images_that_are_not_in_train_causes_a_warning(run_evaluate, data, tmp_path):
    list_images(data / "train/NORMAL")[0].unlink()
    assert run_evaluate("--data-dir", data) == 0
    (warning,) = read_report(tmp_path / "results")["warnings"]
    assert warning.startswith("1 of the 64 images") and "are not in train/" in warning
    assert warning.endswith("Train again (train.py, make train), or use the folders of the model")


@pytest.mark.usefixtures("quick")
def test_patients_in_two_splits_cause_a_warning(data, tmp_path, flags, capsys):
    for folder, split, rest in (("NORMAL", "test", "-0099"), ("PNEUMONIA", "val", "_99")):
        patient = patient_from_name(list_images(data / "train" / folder)[0].name)
        image = list_images(data / split / folder)[0]
        image.rename(image.with_name(f"{patient}{rest}.jpeg"))
    assert train.main(flags(data, *TINY)) == 0
    assert "train/ and val/ share patients (1, for example person" in capsys.readouterr().err
    assert evaluate.main(flags(data)) == 0
    warnings = read_report(tmp_path / "results")["warnings"]
    (warning,) = [text for text in warnings if "patients" in text]
    assert warning.startswith("1 of 24 test images are from patients who are also in train/")
    assert "in train/ or val/" in warning
    assert warning.endswith("into train/, or all into test/, and train again")
    assert warning.partition(", for example")[0] in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["val/NORMAL", "val/PNEUMONIA", "train/PNEUMONIA"])
def test_a_training_image_in_a_second_folder_is_refused(refused, home, folder):
    put(home / "data" / folder / "copy.jpeg", faults.first(home / "data" / "train").read_bytes())
    line = refused(2, "train")
    assert str(home / "data") in line and f"{folder}/copy.jpeg is the same file as train/" in line
