"""One regular expression for any other tool: `re.fullmatch(pattern, name)` holds for what is trained."""

from __future__ import annotations

import re

from layerprobe.plans.export.names import ExportNames

TARGET = "regex"


def write(names: ExportNames) -> str:
    """The pattern on a line; matches nothing where nothing is trained."""
    starts: dict[str, list[str]] = {}
    for block in names.free_blocks:
        container, _, index = block.rpartition(".")
        starts.setdefault(container, []).append(index)
    parts = [
        (re.escape(container) + r"\." if container else "") + f"(?:{'|'.join(indices)})" + r"\..+"
        for container, indices in starts.items()
    ]
    parts += [re.escape(name) for name in names.others]
    pattern = "|".join(parts) if parts else r"(?!)"
    names.require_exact((name for name in names.all if re.fullmatch(pattern, name)), TARGET)
    return pattern + "\n"
