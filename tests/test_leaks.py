"""cxr/leaks.py: images and patients on two sides."""

import shutil

import faults
from faults import put
from helpers import TINY, home_flags, read_report

import evaluate
import train
from cxr.folders import CLASSES, list_images
from cxr.patients import patient_from_name


def test_training_images_among_the_test_images_are_warned_of(run_evaluate, data, tmp_path, capsys):
    for name in CLASSES:
        first = list_images(data / "train" / name)[0]
        shutil.copy(first, data / "test" / name / f"copy{first.suffix}")
    for _ in ("told by train/ and by model.json", "by model.json alone"):
        assert run_evaluate("--data-dir", data) == 0
        warnings = [w for w in read_report(tmp_path / "results")["warnings"] if "AMONG" in w]
        assert warnings[0].startswith("2 of 26 test images WERE AMONG THE TRAINING")
        assert f"warning: {warnings[0]}" in capsys.readouterr().err
        shutil.rmtree(data / "train", ignore_errors=True)


def test_a_model_of_images_that_are_not_in_train_is_told(run_evaluate, data, tmp_path):
    list_images(data / "train/NORMAL")[0].unlink()
    assert run_evaluate("--data-dir", data) == 0
    (warning,) = read_report(tmp_path / "results")["warnings"]
    assert warning.startswith("1 of the 64 images that the model learned from are not in train/")


def test_a_patient_of_the_test_images_in_train_or_val_is_warned_of_in_the_report(
    data, tmp_path, flags, capsys
):
    child = sorted((data / "train" / "NORMAL").iterdir())[0]
    test = sorted((data / "test" / "NORMAL").iterdir())[0]
    test.rename(test.with_name(f"{patient_from_name(child.name)}-0099.jpeg"))
    other = sorted((data / "train" / "PNEUMONIA").iterdir())[0]
    val = sorted((data / "val" / "PNEUMONIA").iterdir())[0]
    val.rename(val.with_name(f"{patient_from_name(other.name)}_99.jpeg"))
    assert train.main(flags(data, *TINY)) == 0
    assert "patients in train/ and val/: 1, as person" in capsys.readouterr().err
    assert evaluate.main(flags(data)) == 0
    error = capsys.readouterr().err
    assert "1 of 24 test images are of patients in train/ or val/" in error


def test_one_file_in_two_places_is_refused_or_told(refused, home, capsys):
    image = faults.first(home / "data" / "train").read_bytes()
    put(home / "data" / "test" / "NORMAL" / "copy.jpeg", image)
    assert evaluate.main(home_flags("evaluate", home)) == 0
    assert "WERE AMONG THE TRAINING OR VALIDATION IMAGES" in capsys.readouterr().err
    refused(2, "split_val", "--check")
    for place in ("val/NORMAL", "val/PNEUMONIA", "train/PNEUMONIA"):
        path = home / "data" / place / "copy.jpeg"
        put(path, image)
        assert str(path.parent) in refused(2, "train")
        path.unlink()
