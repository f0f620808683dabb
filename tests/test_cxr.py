"""The package as a whole: what an import loads, and in which direction the imports go."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cxr
from cxr.files import read_json

ROOT = Path(__file__).parent.parent
SCRIPTS = ("split_val", "train", "evaluate")


def modules_after(statement, folder):
    """Returns the names of all modules that are loaded after a statement in a new process."""
    code = f"{statement}; import sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.check_output(command, cwd=folder, text=True).split())


def test_a_training_does_not_load_the_packages_that_take_a_second(pytestconfig):
    loaded = modules_after("import train", pytestconfig.rootpath)
    assert "torch" in loaded
    assert not loaded & {"scipy", "sklearn", "torchmetrics", "pandas", "matplotlib", "pydicom"}


def test_a_split_loads_neither_torch_nor_scipy_nor_the_check(pytestconfig):
    loaded = modules_after("import split_val", pytestconfig.rootpath)
    assert not loaded & {"torch", "torchvision", "scipy", "sklearn", "pandas", "cxr.check"}


def test_a_check_loads_neither_torch_nor_matplotlib(pytestconfig):
    loaded = modules_after("import split_val, cxr.check", pytestconfig.rootpath)
    assert "sklearn" in loaded
    assert not loaded & {"torch", "torchvision", "torchmetrics", "matplotlib"}


def test_the_garbage_collector_runs_but_leaves_the_imported_packages_alone():
    assert gc.isenabled() and gc.get_freeze_count() > 100_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another_one(script, pytestconfig):
    loaded = modules_after(f"import {script}", pytestconfig.rootpath)
    assert loaded & set(SCRIPTS) == {script}


def test_no_module_of_cxr_imports_common_or_a_script(pytestconfig):
    names = [path.stem for path in (pytestconfig.rootpath / "cxr").glob("[a-z]*.py")]
    assert len(names) > 20
    imports = "import " + ", ".join(f"cxr.{name}" for name in names)
    assert not modules_after(imports, pytestconfig.rootpath) & {"common", *SCRIPTS}


def test_the_version_is_one_in_all_files(trained, scored):
    assert re.fullmatch(r"\d+\.\d+\.\d+", cxr.__version__)
    results, _ = scored
    for path in (trained / "model.json", results / "metrics.json"):
        assert read_json(path)["versions"]["cxr"] == cxr.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {cxr.__version__}\n" in citation
    newest = re.search(
        r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest[1] == cxr.__version__
