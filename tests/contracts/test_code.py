"""Limits that keep the package readable; `ruff` holds complexity and style, these hold the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerprobe

PACKAGE = Path(layerprobe.__file__).parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_NESTING = 4
MAX_BARE_ANY = 80
MAX_POSITIONAL_FIELDS = 3

Tree = tuple[str, ast.Module, int]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)


def trees(root: Path) -> list[Tree]:
    """Relative path, syntax tree and number of lines of every file below `root`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append((path.relative_to(root).as_posix(), ast.parse(text), len(text.splitlines())))
    return found


def long_files(files: list[Tree]) -> list[str]:
    return [f"{name}: {lines} lines" for name, _, lines in files if lines > MAX_FILE_LINES]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(files: list[Tree]) -> list[str]:
    return [
        f"{name}: {function.name} has {length} lines"
        for name, tree, _ in files
        for function in functions(tree)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]


def depth(node: ast.AST, level: int = 0) -> int:
    """Blocks around the most deeply nested statement; an `elif` is no deeper than its `if`."""
    deepest = level
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            chained = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
            if isinstance(child, ast.AST):
                inside = isinstance(child, BLOCKS) and not (chained and len(node.orelse) == 1)
                deepest = max(deepest, depth(child, level + inside))
    return deepest


def nested_functions(files: list[Tree]) -> list[str]:
    return [
        f"{name}: {function.name} nests {deepest} blocks"
        for name, tree, _ in files
        for function in functions(tree)
        if (deepest := depth(function)) > MAX_NESTING
    ]


def bare_any(files: list[Tree]) -> list[str]:
    """Annotations that say nothing: `Any`, or `Any | None`."""
    found = []
    for name, tree, _ in files:
        for node in ast.walk(tree):
            if isinstance(node, ast.arg | ast.AnnAssign):
                annotation = node.annotation
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                annotation = node.returns
            else:
                continue
            if annotation is not None and ast.unparse(annotation).strip("'\"") in ("Any", "Any | None"):
                found.append(f"{name}:{annotation.lineno}")
    return found


def positional_records(files: list[Tree]) -> list[str]:
    """Calls that build a dataclass or named tuple of the package from more than three positional values."""
    records = {
        node.name
        for _, tree, _ in files
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and (
            any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            or any(ast.unparse(base) == "NamedTuple" for base in node.bases)
        )
    }
    return [
        f"{name}:{node.lineno}: {node.func.id}"
        for name, tree, _ in files
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in records
        and len(node.args) > MAX_POSITIONAL_FIELDS
    ]


CHECKS = (long_files, long_functions, nested_functions, positional_records)


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_keeps_to_its_limits(check):
    assert check(trees(PACKAGE)) == []


def test_few_annotations_are_any():
    assert len(bare_any(trees(PACKAGE))) <= MAX_BARE_ANY


def test_the_limits_can_be_broken(tmp_path: Path) -> None:
    deep = "\n".join(f"{'    ' * (level + 1)}if x:" for level in range(5)) + "\n" + " " * 24 + "pass\n"
    (tmp_path / "bad.py").write_text(
        "@dataclass\nclass R:\n    a: int\n\n\ndef nests(x: Any):\n"
        + deep
        + "def chains(x):\n    if x:\n        pass\n"
        + "    elif x > 1:\n        pass\n" * 6
        + "def long() -> 'Any | None':\n"
        + "    x = R(1, 2, 3, 4)\n" * 400
    )
    files = trees(tmp_path)
    assert [len(check(files)) for check in CHECKS] == [1, 1, 1, 400]
    assert len(bare_any(files)) == 2
