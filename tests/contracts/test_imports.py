"""The rooms of the package import one way; DESIGN in CONTRIBUTING.md draws the arrow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import layerprobe

PACKAGE = Path(layerprobe.__file__).parent

GROUND = {
    "errors", "layers", "files", "locks", "network", "model_config", "reading", "progress", "records", "tables",
    "provenance", "lazy", "choices", "shared_work",
}  # fmt: skip
SIBLINGS = {"metrics", "checkpoints", "backbones", "hooks", "tasks", "plans"}
LEVELS: dict[str, int] = {
    **dict.fromkeys(GROUND, 0),
    **dict.fromkeys(SIBLINGS, 1),
    "analyzers": 2,
    "training": 2,
    "search": 3,
    "report": 4,
    "cli": 5,
}
HEAVY_AT_HELP = (
    "torch",
    "transformers",
    "pandas",
    "sklearn",
    "scipy",
    "matplotlib",
    "numpy",
    "datasets",
    "optuna",
)


def broken_arrows(root: Path) -> list[str]:
    """Every import in `root` that goes against the arrow, as `file: room -> room`."""
    broken = []
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).parts[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for there in _rooms(node):
                if there != here and not _allowed(here, there):
                    broken.append(f"{path.relative_to(root)}: {here} -> {there}")
    return broken


def _rooms(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("layerprobe."):
        return [node.module.split(".")[1]]
    if isinstance(node, ast.ImportFrom) and node.module == "layerprobe":
        return [alias.name for alias in node.names if alias.name in {*LEVELS, "plotting"}]
    if isinstance(node, ast.Import):
        return [a.name.split(".")[1] for a in node.names if a.name.startswith("layerprobe.")]
    return []


def _allowed(here: str, there: str) -> bool:
    if here == "plotting":
        return there in GROUND
    if there == "plotting":
        return here in ("report", "cli", "records")
    if here not in LEVELS or there not in LEVELS:
        return False
    if LEVELS[here] == 0:
        return LEVELS[there] == 0
    return LEVELS[there] < LEVELS[here]


def file_imports(root: Path) -> dict[str, set[str]]:
    """For each module below `root`, the modules that it imports anywhere, those for type checking left out."""
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        found[module] = set()
        for node in ast.walk(tree):
            if id(node) in typing_only or not isinstance(node, ast.ImportFrom | ast.Import):
                continue
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:  # a module of a package, or else a name in the module itself
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [
                    t if t.removeprefix("layerprobe.") in modules else node.module or "" for t in inner
                ]
            names = {
                target.removeprefix("layerprobe.") for target in targets if target.startswith("layerprobe.")
            }
            found[module] |= (names & modules.keys()) - {module}
    return found


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import one another, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in imports[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    reach = {module: reachable(module) for module in imports}
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in imports
        if module in reach[module]
    }
    return sorted(list(group) for group in groups)


def test_no_file_imports_itself_through_others() -> None:
    assert circles(file_imports(PACKAGE)) == []


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from layerprobe import b\n")
    (tmp_path / "b.py").write_text("from layerprobe.a import f\n")
    (tmp_path / "c.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from layerprobe.d import x\n"
    )
    (tmp_path / "d.py").write_text("import layerprobe.c\n")
    assert circles(file_imports(tmp_path)) == [["a", "b"]]


def test_imports_run_one_way() -> None:
    assert broken_arrows(PACKAGE) == []


def test_the_contract_can_fail(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "bad.py").write_text("from layerprobe.backbones import load_backbone\n")
    (tmp_path / "plotting").mkdir()
    (tmp_path / "plotting" / "bad.py").write_text("def f():\n    import layerprobe.analyzers.features\n")
    (tmp_path / "tables.py").write_text("from layerprobe import plotting\n")
    assert broken_arrows(tmp_path) == [
        "metrics/bad.py: metrics -> backbones",
        "plotting/bad.py: plotting -> analyzers",
        "tables.py: tables -> plotting",
    ]


def test_captum_is_imported_in_one_file() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "captum")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "captum" for a in node.names))
    }
    assert importers == {"analyzers/attribution.py"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    probe = f"{code}\nimport sys\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HELP = """
import sys, contextlib, io
sys.argv = ["layerprobe", "--help"]
from layerprobe.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""


@pytest.mark.parametrize("code", ["import layerprobe", HELP], ids=["import layerprobe", "layerprobe --help"])
def test_nothing_heavy_is_loaded_at_the_start(code: str) -> None:
    assert loaded_by(code).isdisjoint(HEAVY_AT_HELP)


def test_the_heavy_import_check_can_fail() -> None:
    assert "numpy" in loaded_by("import layerprobe; layerprobe.metrics; import numpy")


def test_public_names_exist_and_are_bound_lazily() -> None:
    for name in layerprobe.__all__:
        assert getattr(layerprobe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'load_backbon'"):
        layerprobe.load_backbon  # noqa: B018
