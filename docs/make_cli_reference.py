"""Write docs/cli.md, the reference of the command line, from the commands themselves.

python docs/make_cli_reference.py
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from layerprobe.cli import main as program

PAGE = Path(__file__).parent / "cli.md"
NETWORK = "<!-- needs a network -->"
HEADER = """# Commands

<!-- Made by docs/make_cli_reference.py from the commands themselves; a test compares the two. -->

`layerprobe COMMAND --help` says the same in a terminal. Exit codes: 0 done, 1 a known failure, 2 bad usage, 130
interrupted; finished work is kept.
"""


def reference() -> str:
    """The whole page."""
    if not program.app.registered_commands:
        program._register()
    parts = [HEADER]
    for command in by_name(program.app.registered_commands):
        parts.append(describe(f"layerprobe {command.name}", command.callback, level=2))
    for group in by_name(program.app.registered_groups):
        inner = group.typer_instance
        assert inner is not None
        parts.append(f"## layerprobe {group.name}\n\n{inner.info.help}\n")
        for command in by_name(inner.registered_commands):
            parts.append(describe(f"layerprobe {group.name} {command.name}", command.callback, level=3))
    return "\n".join(parts).rstrip() + "\n"


def by_name(entries: list[Any]) -> list[Any]:
    """Commands or groups, each once: a process that ran the program before has registered them before."""
    return list({entry.name: entry for entry in entries}.values())


def describe(path: str, function: Callable[..., Any] | None, *, level: int) -> str:
    """One command: what it does, an example that runs, its arguments and options by panel."""
    assert function is not None
    prose, examples = split_help(inspect.getdoc(function) or "")
    lines = [f"{'#' * level} {path}", "", prose, ""]
    if examples:
        if not all(offline(example) for example in examples):
            lines += [NETWORK, ""]
        lines += ["```console", *(f"$ {example}" for example in examples), "```", ""]
    panels: dict[str, list[str]] = {}
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        annotated = hints[parameter.name]
        if annotated is typer.Context:  # what typer knows of the call; nothing that a user gives
            continue
        kind, info = annotated.__origin__, annotated.__metadata__[0]
        if not info.hidden:
            panels.setdefault(panel_of(info), []).append(row(parameter, kind, info))
    for title, rows in panels.items():
        lines += [
            f"**{title}**",
            "",
            "| | type | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    return "\n".join(lines)


def split_help(text: str) -> tuple[str, list[str]]:
    """A help text without its `Example:` lines, and the commands in those."""
    examples = re.findall(r"^Example: (layerprobe .*)$", text, re.MULTILINE)
    prose = re.sub(r"^Example: layerprobe .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", prose).strip(), examples


def offline(command: str) -> bool:
    """Whether an example runs without a model hub: on MiniLM, or on a plan or run folder."""
    names = re.findall(r"--model(?:-b)? (\S+)", command)
    return all(name == "minilm" for name in names) and not command.startswith("layerprobe compare")


def panel_of(info: Any) -> str:
    if info.rich_help_panel:
        return str(info.rich_help_panel)
    return "Arguments" if isinstance(info, typer.models.ArgumentInfo) else "Options"


def row(parameter: inspect.Parameter, annotation: Any, info: Any) -> str:
    """One line of a table of options."""
    kind, optional, repeated = plain_type(annotation)
    if isinstance(info, typer.models.ArgumentInfo):
        names = f"`{info.metavar or parameter.name.upper()}`" + (" …" if repeated else "")
    else:
        # Inside Annotated, typer reads the first name from the place of the default.
        first = [info.default] if isinstance(info.default, str) and info.default.startswith("-") else []
        declared = [*first, *(info.param_decls or ())] or [f"--{parameter.name.replace('_', '-')}"]
        if kind is bool and optional and not any("/" in name for name in declared):
            declared = [f"{declared[0]}/--no-{declared[0].removeprefix('--')}", *declared[1:]]
        names = ", ".join(f"`{name}`" for name in " ".join(declared).replace("/", " ").split())
    default = parameter.default
    required = default is inspect.Parameter.empty or default is ...
    shown = (
        "**required**"
        if required
        else ""
        if default is None or default is False or default == ""
        else f"`{default}`"
    )
    kind_text = "flag" if kind is bool else kind_name(kind, info) + (", repeatable" if repeated else "")
    return f"| {names} | {kind_text} | {shown} | {cell(info.help or '')} |"


def plain_type(annotation: Any) -> tuple[Any, bool, bool]:
    """A type without `| None` and `list[…]`, whether None is allowed, and whether it may be repeated."""
    optional = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    if optional:
        (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    repeated = typing.get_origin(annotation) is list
    return (typing.get_args(annotation)[0] if repeated else annotation), optional, repeated


def kind_name(kind: Any, info: Any) -> str:
    """Type as a word, with its range where it has one."""
    name = {str: "text", Path: "path"}.get(kind, getattr(kind, "__name__", str(kind)))
    if info.min is not None and info.max is not None:
        return f"{name}, {info.min} to {info.max}"
    return f"{name} ≥ {info.min}" if info.min is not None else str(name)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
