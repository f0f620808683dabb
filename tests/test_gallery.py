"""cxr/gallery.py: new_predictions.html shows new images with their predictions."""

import base64
import html.parser
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import read_rows, write_dicom
from PIL import Image

import cxr.gallery
from cxr.folders import list_images
from cxr.proportions import format_probability


class Page(html.parser.HTMLParser):
    """The text, the cards, the buttons and the pictures of new_predictions.html."""

    def __init__(self, results):
        super().__init__()
        self.path = results / "new_predictions.html"
        self.source = self.path.read_text(encoding="utf-8")
        self.texts, self.cards, self.buttons, self.tags, self.pictures = [], [], {}, [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if "data-number" in attributes:
            self.cards.append(attributes | {"pictures": [], "text": ""})
        if tag == "button":
            self.buttons[attributes.get("id") or attributes["aria-label"]] = attributes
        if tag == "img":
            kind, _, content = attributes["src"].partition(",")
            assert kind == "data:image/jpeg;base64" and "alt" in attributes
            picture = Image.open(io.BytesIO(base64.b64decode(content)))
            picture.load()
            self.cards[-1]["pictures"].append(picture)

    def handle_endtag(self, tag):
        if tag == "ul" and self.cards:
            self.tags.append("/ul")

    def handle_data(self, data):
        if not self.tags or self.tags[-1] in ("style", "script"):
            return
        self.texts.append(data)
        if self.cards and "/ul" not in self.tags:
            self.cards[-1]["text"] = f"{self.cards[-1]['text']} {data.strip()}".strip()


@pytest.fixture
def new(split_phantoms, tmp_path):
    """A folder of 6 new images of each class, with names that must not be on the page."""
    folder = tmp_path / "Meier"
    folder.mkdir()
    for name in ("NORMAL", "PNEUMONIA"):
        for path in list_images(split_phantoms / "test" / name)[:6]:
            shutil.copy(path, folder / f"<b>Meier {name[0]} & {path.name}")
    return folder


def noise(path):
    """Writes an image of noise, which is unlike every radiograph."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224), np.uint8)
    Image.fromarray(pixels).save(path)


def test_the_page_shows_each_image_with_the_values_of_the_table(
    new, run_evaluate, tmp_path, capsys
):
    noise(new / "Meier, noise.png")
    assert run_evaluate(new) == 0
    lines = capsys.readouterr().out.splitlines()
    page, rows = Page(tmp_path / "results"), read_rows(tmp_path / "results/new_predictions.csv")
    table = tmp_path / "results" / "new_predictions.csv"
    assert lines[-2] == f"Wrote {table}"
    assert lines[-1] == f"The page to look at (it shows X-rays): {page.path}"
    assert [card["data-number"] for card in page.cards] == [row["number"] for row in rows]
    for card, row in zip(page.cards, rows, strict=True):
        assert card["data-probability"] == row["probability"]
        assert card["data-novelty"] == row["unlike"]
        text = (
            f"no. {row['number']} {row['prediction']} probability "
            f"{format_probability(float(row['probability']))}"
        )
        assert card["text"].startswith(text)
        assert ("▲ unlike" in card["text"]) == (float(row["unlike"]) > 1)
        (thumbnail,) = card["pictures"]
        assert thumbnail.size == (128, 128) and thumbnail.format == "JPEG"
    n_positive = sum(row["prediction"] == "PNEUMONIA" for row in rows)
    assert f"13 new images: {n_positive} PNEUMONIA, {13 - n_positive} NORMAL" in page.text
    assert "▲ unlike" in page.cards[-1]["text"]  # the image of noise
    assert "more than 99 % of the validation images do" in page.text
    assert "depends on the prevalence" in page.text and "as common as among" in page.text


def test_the_thumbnail_shows_the_pixels_that_the_network_sees(run_evaluate, tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 16, (256, 1))
    write_dicom(tmp_path / "a.dcm", ramp, PhotometricInterpretation="MONOCHROME1")
    Image.fromarray((ramp[:, ::-1] // 16).astype(np.uint8)).save(tmp_path / "b.png")
    for _ in range(2):  # the second time, the features come from the cache
        assert run_evaluate(tmp_path / "a.dcm", tmp_path / "b.png") == 0
        page = Page(tmp_path / "results")
        dicom, png = (np.asarray(card["pictures"][0], int) for card in page.cards)
        assert dicom[:, 5].mean() > 200 > 50 > dicom[:, -5].mean()  # MONOCHROME1: 0 is white
        assert np.abs(dicom - png).max() < 20


def test_no_file_name_is_on_the_page_and_it_makes_no_request(new, run_evaluate, tmp_path, capsys):
    shutil.copy(list_images(new)[0], new / "Meier_lateral.png")
    (new / "Meier, broken.jpg").write_text("<html>")
    assert run_evaluate(new, "--skip-bad") == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "lateral" in line]
    page, rows = Page(tmp_path / "results"), read_rows(tmp_path / "results/new_predictions.csv")
    (lateral,) = [row["number"] for row in rows if "lateral" in row["file"]]
    assert f"no. {lateral} ({new / 'Meier_lateral.png'})" in warning
    assert f"ateral images: 1 of 14 (no. {lateral}). The network is made for frontal" in page.text
    assert "Meier" not in page.source and str(new) not in page.source
    assert not re.findall(r"https?:|//|@import|url\(|<link|<iframe|fetch\(", without_data(page))
    assert not set(re.findall(r'src="([^"]{5})', page.source)) - {"data:"}
    assert not re.findall(r' on\w+="', page.source)


def without_data(page):
    """Returns the source without pictures and without comments of the script."""
    source = re.sub(r"base64,[^\"]+", "", page.source)
    return re.sub(r" // .*", "", source)


def test_an_image_that_cannot_be_read_is_on_the_page_with_its_error(new, run_evaluate, tmp_path):
    (new / "0 broken.jpg").write_text("<html>")
    (new / "z empty.png").write_bytes(b"")
    assert run_evaluate(new) == 2
    page = Page(tmp_path / "results")
    assert len(page.cards) == 12 and page.cards[0]["data-number"] == "2"
    assert page.text.startswith("14 new images: ") and "NORMAL, 2 could not be read" in page.text
    assert "no. 1: a web page, not an image" in page.text
    assert "no. 14: the file is empty" in page.text


def test_a_page_without_a_readable_image_says_why(run_evaluate, tmp_path):
    (tmp_path / "bad.jpg").write_text("<html>")
    assert run_evaluate(tmp_path / "bad.jpg", "--cam", "maps") == 2
    page = Page(tmp_path / "results")
    assert page.text.startswith("1 new image: 0 PNEUMONIA, 0 NORMAL, 1 could not be read")
    assert "no. 1: a web page, not an image" in page.text and not page.buttons


def test_with_cam_each_picture_is_a_button_that_shows_its_map(new, run_evaluate, tmp_path):
    assert run_evaluate(new) == 0
    page = Page(tmp_path / "results")
    assert set(page.buttons) == {"sort-number", "sort-probability", "sort-novelty"}
    for _ in range(2):
        assert run_evaluate(new, "--cam", "maps") == 0
        page = Page(tmp_path / "results")
        for card in page.cards:
            number = card["data-number"]
            button = page.buttons[f"Class activation map of no. {number}"]
            assert button["aria-pressed"] == "false"
            image, heat = card["pictures"]
            assert image.mode == "L" and heat.mode == "RGB" and heat.size == (128, 128)
            with Image.open(tmp_path / "results" / "maps" / f"map_{number}.png") as sheet:
                expected = sheet.crop((0, 40, 448, 488)).resize((128, 128))
            assert np.abs(np.asarray(heat, int) - np.asarray(expected, int)).mean() < 10
        assert "orange: evidence for PNEUMONIA" in page.text and "all-maps" in page.buttons


@pytest.mark.parametrize("weights", ["random", "imagenet"])
def test_the_page_says_if_the_network_has_random_weights(
    weights, new, run_evaluate, remake, tmp_path
):
    assert run_evaluate(new, "--checkpoint", remake(weights=weights)) == 0
    text = Page(tmp_path / "results").text
    assert ("Random weights: this page shows what results look like" in text) == (
        weights == "random"
    )


def test_the_page_shows_only_the_last_part_of_a_path_and_the_next_step(
    new, run_evaluate, trained, tmp_path
):
    folder = tmp_path / "dr smith"
    folder.mkdir()
    shutil.copy(trained / "model.pth", folder)
    assert run_evaluate(new, "--checkpoint", folder / "model.pth", "--arch", "tinynet") == 0
    page = Page(tmp_path / "results")
    assert "dr smith" not in page.source and "Model: model.pth, tinynet" in page.text
    assert "there is no model.json beside model.pth" in page.text
    assert "A radiologist must read these images" in page.text and "in report.html" in page.text


def test_the_buttons_say_by_what_the_images_are_sorted(new, run_evaluate, remake, tmp_path):
    assert run_evaluate(new) == 0
    buttons = Page(tmp_path / "results").buttons
    assert [buttons[f"sort-{key}"]["data-key"] for key in ("number", "probability", "novelty")] == [
        "number",
        "probability",
        "novelty",
    ]
    assert [button["aria-pressed"] for button in buttons.values()] == ["true", "false", "false"]
    assert all(button["type"] == "button" for button in buttons.values())


def test_without_novelty_the_page_cannot_be_sorted_by_it(new, run_evaluate, trained, tmp_path):
    shutil.copy(trained / "model.pth", tmp_path / "model.pth")
    flags = "--checkpoint", tmp_path / "model.pth", "--arch", "tinynet"
    assert run_evaluate(new, *flags) == 0
    page = Page(tmp_path / "results")
    assert set(page.buttons) == {"sort-number", "sort-probability"}
    assert all("data-novelty" not in card and "novelty" not in card["text"] for card in page.cards)
    assert "there is no" in page.text  # the warning of a missing model.json
    assert "is unknown, because the model file does not describe them" in page.text


@pytest.mark.parametrize("known", [True, False])
def test_of_many_images_the_page_shows_the_most_novel_and_the_closest_to_the_threshold(
    known, new, run_evaluate, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(cxr.gallery, "LIMIT", 4)
    flags = ["--threshold", 0.3, "--skip-bad"]
    if not known:  # no model.json, hence no novelty
        shutil.copy(trained / "model.pth", tmp_path / "model.pth")
        flags += ["--checkpoint", tmp_path / "model.pth", "--arch", "tinynet"]
    for i in range(5):
        (new / f"broken {i}.jpg").write_bytes(b"")
    assert run_evaluate(new, *flags) == 0
    page, rows = Page(tmp_path / "results"), read_rows(tmp_path / "results/new_predictions.csv")
    rows = [row for row in rows if not row["error"]]
    closest = sorted(rows, key=lambda row: abs(float(row["probability"]) - 0.3))
    expected = [row["number"] for row in closest[:4]]
    if known:
        novel = sorted(rows, key=lambda row: -float(row["unlike"]))
        assert {row["number"] for row in novel[:2] + closest[:2]} <= {
            card["data-number"] for card in page.cards
        }
        expected = {row["number"] for row in novel[:4] + closest[:4]}
    numbers = [card["data-number"] for card in page.cards]
    assert len(numbers) == 4 and set(numbers) <= set(expected)
    assert numbers == sorted(numbers, key=int)
    assert "This page shows 4 of 12 images" in page.text
    assert ("the most unlike the training images, and" in page.text) == known
    assert "the first 4 of them" in page.text and page.text.count("the file is empty") == 4


def test_all_images_are_on_the_page_if_they_are_not_too_many(
    new, run_evaluate, tmp_path, monkeypatch
):
    monkeypatch.setattr(cxr.gallery, "LIMIT", 12)
    assert run_evaluate(new) == 0
    page = Page(tmp_path / "results")
    assert len(page.cards) == 12 and "This page shows" not in page.text


def test_names_of_classes_are_escaped(new, run_evaluate, remake, tmp_path):
    path = remake(classes=["<i>no", 'a"b & c'])
    assert run_evaluate(new, "--checkpoint", path, "--cam", "maps") == 0
    page = Page(tmp_path / "results")
    assert "i" not in page.tags and "<i>no" in page.text and 'a"b & c' in page.text


def test_a_thousand_images_with_maps_take_less_than_8_mb(new, run_evaluate, tmp_path):
    for size, flags in ((4.5e6, ()), (8e6, ("--cam", "maps"))):
        assert run_evaluate(new, *flags) == 0
        page = Page(tmp_path / "results")
        length = page.path.stat().st_size
        one = len(page.source.partition('<li class="card"')[2].partition("<li")[0])
        assert length + 1000 * one < size


def test_a_second_run_replaces_table_and_page(new, run_evaluate, tmp_path, capsys):
    results = tmp_path / "results"
    assert run_evaluate(new) == 0
    before = Page(results)
    assert run_evaluate(list_images(new)[0]) == 0
    after = Page(results)
    assert len(before.cards) == 12 and len(after.cards) == 1
    assert "replaced an earlier one" in capsys.readouterr().out
    assert {path.name for path in results.iterdir()} == {
        "new_predictions.csv",
        "new_predictions.html",
    }


def test_a_page_that_cannot_be_written_is_an_error_before_the_work(
    new, run_evaluate, tmp_path, capsys
):
    page = tmp_path / "results" / "new_predictions.html"
    page.mkdir(parents=True)
    assert run_evaluate(new) == 2
    assert f"{page}: expected a file to write" in capsys.readouterr().err
    assert [path.name for path in Path(tmp_path / "results").iterdir()] == [page.name]
