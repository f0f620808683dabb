"""cxr/transforms.py: a model is used only with the size, mean and deviation of its training."""

from pathlib import Path

import pytest
from helpers import read_report
from torchvision.transforms import v2

import common
from cxr.errors import Failure
from cxr.files import read_json
from cxr.transforms import compare_transforms, read_numbers

RESIZE = str(v2.Resize((224, 224)))
NORMALIZE = str(common.NORMALIZE)


def normalize(mean=common.MEAN, std=common.STD):
    return v2.Compose([v2.Normalize(mean, std)])


@pytest.mark.parametrize(
    ("name", "transform", "words"),
    [
        (
            "PREPARE",
            v2.Resize((320, 320)),
            "trained with the size 224, now the size is 320; set SIZE = 224 in cxr/decode.py",
        ),
        (
            "NORMALIZE",
            normalize(mean=(0.5, 0.5, 0.5)),
            "with the mean (0.485, 0.456, 0.406), now the mean is (0.5, 0.5, 0.5); restore MEAN",
        ),
        ("NORMALIZE", normalize(std=(0.229, 0.224, 0.5)), "now the std is (0.229, 0.224, 0.5)"),
    ],
)
def test_another_size_mean_or_deviation_is_refused_and_the_report_stays(
    name, transform, words, refused, home, monkeypatch
):
    monkeypatch.setattr(common, name, transform)
    before = (home / "results" / "metrics.json").read_bytes()
    assert f"{home / 'model.pth'}: trained" in (line := refused(2, "evaluate")) and words in line
    assert line == refused(2, "evaluate", home / "data" / "test" / "NORMAL")
    assert (home / "results" / "metrics.json").read_bytes() == before


def test_a_model_of_another_size_names_the_size_to_set(remake, trained, run_evaluate, capsys):
    _, augment, normalize_text = read_json(trained / "model.json")["transforms"]
    texts = [str(v2.Resize((320, 320))), augment, normalize_text]
    assert run_evaluate("--checkpoint", remake(transforms=texts)) == 2
    error = capsys.readouterr().err
    assert "the size 320, now the size is 224; set SIZE = 320 in cxr/decode.py" in error


def test_another_text_with_the_same_numbers_is_one_warning(remake, trained, run_evaluate, tmp_path):
    _, augment, normalize_text = read_json(trained / "model.json")["transforms"]
    texts = ["Resize(size=(224, 224), antialias=True)", augment, normalize_text]
    assert run_evaluate("--checkpoint", remake(transforms=texts)) == 0
    warnings = read_report(tmp_path / "results")["warnings"]
    assert sum("other transforms" in text for text in warnings) == 1
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])",
        "Normalize(mean=(0.4850, 0.4560, 0.4060), std=(0.229, 0.224, 2.25e-1))",
    ],
)
def test_the_same_numbers_in_another_text_are_a_warning(text):
    (warning,) = compare_transforms([RESIZE, text], [RESIZE, NORMALIZE], Path("model.pth"))
    assert "other transforms" in warning


@pytest.mark.parametrize("mean", ["[0.485, 0.456]", "[0.485, 0.456, 0.407]"])
def test_other_numbers_are_refused(mean):
    text = f"Normalize(mean={mean}, std=[0.229, 0.224, 0.225])"
    with pytest.raises(Failure, match="now the mean is"):
        compare_transforms([RESIZE, text], [RESIZE, NORMALIZE], Path("model.pth"))


def test_the_same_transforms_and_texts_without_numbers_are_no_error():
    assert compare_transforms([RESIZE, NORMALIZE], [RESIZE, NORMALIZE], Path("model.pth")) == []
    assert read_numbers("size", ["ToTensor()"]) == read_numbers("size", ["Resize(size=x)"]) == []
