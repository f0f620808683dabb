"""README.md and docs/: each link, flag, variable, command and file name exists."""

import contextlib
import io
import re
import subprocess

import pytest
from helpers import ROOT, SCRIPTS, read_report

from cxr.files import read_json

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
PIP = {"PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS"}
OTHER_FLAGS = {"--shm-size", "--only"}  # of docker, and of make bench


def text_of(page):
    """Returns the text of a page without blocks of Python code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def helps():
    """The --help of all scripts, in one text."""
    screen = io.StringIO()
    for script in SCRIPTS.values():
        with contextlib.redirect_stdout(screen), pytest.raises(SystemExit):
            script.main(["--help"])
    return screen.getvalue()


@pytest.fixture(scope="module")
def make_help():
    return subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)]+)\)", text_of(page))
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_is_a_flag_of_a_script(page, helps):
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text_of(page))) - OTHER_FLAGS
    assert not {flag for flag in flags if not re.search(rf"{flag}\b(?!-)", helps)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_and_variable_of_make_exists(page, make_help):
    # Commands stand in code, between backquotes or in indented lines.
    code = re.findall(r"`([^`]+)`|^    (.+)$", text_of(page), re.MULTILINE)
    commands = [" ".join(parts) for parts in code if re.search(r"\bmake [a-z]", " ".join(parts))]
    targets = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(commands)))
    assert targets <= set(re.findall(r"^  ([a-z-]+) ", make_help, re.MULTILINE))
    variables = set(re.findall(r"\b([A-Z][A-Z_]+)=", "\n".join(commands)))
    known = set(re.findall(r"\b[A-Z][A-Z_]+\b", make_help)) | PIP
    assert variables <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_code_exists(page):
    names = re.findall(r"\b((?:cxr|tests|docs)/[\w.-]+\.\w+)", text_of(page))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_files_md_names_every_file_and_every_key(scored, trained):
    page = text_of(ROOT / "docs" / "files.md")
    named = set(re.findall(r"`([^`]+)`", page))
    results, _ = scored
    files = {path.name for path in [*results.iterdir(), *trained.iterdir()] if path.is_file()}
    assert files <= named
    assert set(read_report(results)) <= named
    keys = set(read_json(trained / "model.json"))
    assert keys <= named
