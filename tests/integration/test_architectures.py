"""Every architecture that transformers builds from a small configuration works or is refused in one sentence."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "make_architectures", DOCS / "make_architectures.py"
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["make_architectures"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published(sweep: ModuleType) -> str:
    text: str = sweep.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip(f"docs/what-runs.md was made with another transformers than {transformers.__version__}")
    return text


def test_the_page_says_that_nothing_breaks_and_150_work(sweep: ModuleType, published: str) -> None:
    rows = sweep.read_page(published)
    verdicts = [row.verdict for row in rows]
    assert verdicts.count(sweep.BROKEN) == 0
    assert verdicts.count(sweep.WORKS) >= 150
    assert sweep.page(rows) == published


@pytest.mark.parametrize("model_type", ["bert", "vit", "qwen2_moe", "xlm", "vit_mae"])
def test_a_few_rows_are_as_published(sweep: ModuleType, published: str, model_type: str) -> None:
    row = next(row for row in sweep.read_page(published) if row.model_type == model_type)
    assert list(sweep.run_all([model_type])) == [row]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_rows_are_as_published(sweep: ModuleType, published: str) -> None:
    assert sweep.page(sweep.run_all(sweep.candidates())) == published
