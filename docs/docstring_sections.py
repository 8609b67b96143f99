"""Docstring sections of this project as Markdown, for the API pages.

The docstrings follow numpydoc's sections, but write `name : meaning` (types stand in the signature) and put several
names on one line where they share a meaning. numpydoc parsers would take the meaning for a type; this extension of
griffe turns each section into a list instead.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = (
    "Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns", "Notes", "Examples", "References", "See Also",
)  # fmt: skip
LISTS = ("Parameters", "Attributes", "Raises", "Warns")
ENTRY = re.compile(r"^(?P<names>[\w.*`]+(?:, [\w.*`]+)*) : (?P<meaning>.*)$")


class HouseDocstrings(griffe.Extension):
    """Rewrites every docstring once, when it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Sections become bold titles; entries of lists become list items; doctests become code blocks."""
    lines = text.splitlines()
    out: list[str] = []
    section = ""
    index = 0
    while index < len(lines):
        line = lines[index]
        underlined = index + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[index + 1])
        if underlined and line in SECTIONS:
            section = line
            out += ["", f"**{section}**", ""]
            index += 2
            continue
        entry = ENTRY.match(line) if section in LISTS else None
        if entry:
            names = ", ".join(f"`{name.strip('`')}`" for name in entry["names"].split(", "))
            out.append(f"- {names}: {entry['meaning']}")
        elif line.startswith(">>> "):
            out += ["", "```pycon"]
            while index < len(lines) and lines[index].strip():
                out.append(lines[index])
                index += 1
            out += ["```", ""]
            continue
        elif line.rstrip().endswith("::"):
            out.append(line.rstrip()[:-1])
        else:
            out.append(line)
        index += 1
    return "\n".join(out).replace('"*', '"\\*').replace('*"', '\\*"')  # shell patterns are no emphasis
