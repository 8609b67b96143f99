"""What a person sees on stdout: the answer, then a table that fits the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from layerprobe.errors import printable


def print_answer(answer: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the answer and the rows; in bold where stdout is a terminal, plain and unwrapped where it is none."""
    if sys.stdout.isatty():
        write(answer, style="bold", width=terminal_width())
    else:
        sys.stdout.write(f"{answer}\n")
    if rows:
        sys.stdout.write("\n")
        print_table(rows)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a table; on a terminal no line is wider than that, and columns that do not fit stand below."""
    from layerprobe.tables import render_table

    if not sys.stdout.isatty():
        sys.stdout.write(f"{render_table(rows)}\n")
        return
    for number, part in enumerate(render_table(rows, width=terminal_width()).split("\n\n")):
        head, _, body = part.partition("\n")
        write(f"\n{head}" if number else head, style="dim")
        write(body)


def write(text: str, *, style: str = "", width: int | None = None) -> None:
    """Write text in a style of rich, which obeys NO_COLOR; `width` wraps it between words.

    What is written is never read as markup: it may hold anything that stands in a model's or folder's name.
    """
    from rich.console import Console
    from rich.text import Text

    shown = "\n".join(map(printable, text.split("\n")))
    if os.environ.get("NO_COLOR"):  # for rich, bold is no colour
        style = ""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)
    console.print(Text(shown, style=style), soft_wrap=width is None)


def terminal_width() -> int:
    """Columns of the terminal; at least 40."""
    return max(40, shutil.get_terminal_size().columns)
