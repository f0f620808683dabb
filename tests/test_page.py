"""cxr/page.py: report.html says what metrics.json says."""

import html.parser

import pytest
from helpers import TINY_FAST

import evaluate
import train
from cxr.files import read_json
from cxr.page import sections
from cxr.proportions import format_interval


class Page(html.parser.HTMLParser):
    """The texts of a page's table rows and paragraphs, and the sources of its pictures."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.texts, self.sources, self.tags = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
            assert dict(attributes)["alt"]

    def handle_data(self, data):
        if self.tags[-1:] == ["td"] and data.strip():
            self.rows[-1].append(data)
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture
def odd_names(data):
    """Data whose table holds what HTML would take for its own."""
    images = sorted(path.name for path in data.glob("test/*/*"))
    rows = [f"{name},{i},{('<b>F&M</b>', '<script>')[i % 2]}" for i, name in enumerate(images)]
    (data / "metadata.csv").write_text("\n".join(["file_name,patient_id,ward", *rows]))
    return data


def test_every_number_on_the_page_is_that_of_metrics_json(odd_names, tmp_path, flags):
    assert train.main(flags(odd_names, *TINY_FAST)) == evaluate.main(flags(odd_names)) == 0
    path = tmp_path / "results" / "report.html"
    page, report = Page(path), read_json(path.with_name("metrics.json"))
    cells = {row[0].lower().replace(" ", "_"): row[1:] for row in page.rows if row}
    for name, each in report["metrics"].items():
        assert cells[name] == [format_interval(each)]
    groups = [row for row in page.rows if len(row) == 4]
    names = {name: name.capitalize() for name in ("sensitivity", "specificity")}
    assert groups == [
        [each["group"], names.get(each["metric"], "AUROC"), str(each["n"]), format_interval(each)]
        for each in report["subgroups"].values()
    ]
    assert len(groups) == 2 + 6 and groups[2][0] == "ward <b>F&M</b>"
    counts = report["counts"]
    assert cells["normal"] == [str(counts["tn"]), str(counts["fp"])]
    assert cells["pneumonia"] == [str(counts["fn"]), str(counts["tp"])]
    for each in report["elsewhere"]:
        ppv, npv = (format_interval(each[name]) for name in ("ppv", "npv"))
        values = f"PPV {ppv}, NPV {npv}"
        assert f"{100 * each['prevalence']:.3g} %: {values}" in page.text
    for title, lines in sections(report):
        assert title in page.text and all(line in page.text for line in lines)
    assert report["intervals"] in page.text and "50 % of these images are PNEUMONIA" in page.text
    assert all(warning in page.text for warning in report["warnings"])
    assert "fewer than 30 patients in a class: intervals are rough" in page.text


def test_the_page_is_one_small_file_without_script_or_link(odd_names, tmp_path, flags):
    assert train.main(flags(odd_names, *TINY_FAST)) == evaluate.main(flags(odd_names)) == 0
    page = Page(tmp_path / "results" / "report.html")
    assert not {"script", "link", "b", "iframe"} & set(page.tags)
    assert len(page.sources) == 6 and all(s.startswith("data:image/png") for s in page.sources)
    assert (tmp_path / "results" / "report.html").stat().st_size < 2_000_000


def test_what_is_missing_or_given_afterwards_stands_beside_the_result(
    data, tmp_path, flags, capsys
):
    for split, name in (("train", "NORMAL"), ("test", "PNEUMONIA")):
        sorted((data / split / name).iterdir())[0].write_bytes(b"<html>")
    rule = "--threshold", "sensitivity=0.9", "--skip-bad"
    assert train.main(flags(data, *TINY_FAST, *rule)) == 0
    assert "At threshold" in capsys.readouterr().out
    about = read_json(tmp_path / "model.json")
    assert evaluate.main(flags(data, "--skip-bad")) == 0
    screen, page = capsys.readouterr().out, Page(tmp_path / "results" / "report.html").text
    there = about["at_threshold"]
    assert there["sensitivity"]["value"] >= 0.9
    for shown in (screen, page):
        assert "1 of train/NORMAL, 1 of test/PNEUMONIA: left out" in shown
        sensitivity = format_interval(there["sensitivity"])
        told = f"there sensitivity {sensitivity}, specificity"
        assert "sensitivity=0.9 on val" in shown and told in shown
        assert "age, sex, device (no such column of 2 to 10 values in metadata.csv)" in shown
