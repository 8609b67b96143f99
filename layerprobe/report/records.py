"""The page of any other run folder: what its records say, their tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError
from layerprobe.files import read_json
from layerprobe.report.page import figure, folded, table, text

SHOWN_ROWS = 200


def record_sections(folder: Path) -> tuple[str, list[str]]:
    """Title and sections for a folder that holds saved records (`<command>.json`).

    Raises
    ------
    BrokenFileError : no record is there.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, what="record")
        if isinstance(content, dict) and str(content.get("schema", "")).startswith("layerprobe."):
            records.append((path.stem, content))
    with_rows = [(name, content) for name, content in records if isinstance(content.get("rows"), list)]
    if not with_rows:
        raise BrokenFileError(
            f"{folder} holds no finished layerprobe run (no search.json, no <command>.json with rows); "
            "name the folder that a command was given with -o"
        )
    sections = [f"<h1>{text(folder.resolve().name)}</h1>"]
    for name, content in with_rows:
        rows = [row for row in content["rows"] if isinstance(row, dict)]
        kept = [
            column for column in (rows[0] if rows else {}) if any(row.get(column) is not None for row in rows)
        ]
        more = f'<p class="soft">{len(rows) - SHOWN_ROWS:,} more rows in {text(name)}.csv</p>'
        sections += [
            f"<h2>{text(name)}</h2>",
            table(rows[:SHOWN_ROWS], columns=kept),
            more if len(rows) > SHOWN_ROWS else "",
        ]
    figures = [figure(path, path.stem.replace("_", " ")) for path in sorted(folder.glob("*.png"))]
    if figures:
        sections += ["<h2>Figures</h2>", *figures]
    sections.append(repeat_section(with_rows[0][1].get("provenance") or {}))
    return f"layerprobe: {folder.resolve().name}", sections


def repeat_section(provenance: Mapping[str, Any]) -> str:
    """The command that repeats a result, and the versions and machine it was made with."""
    line = provenance.get("command_line")
    arguments = provenance.get("arguments") or {}
    shown = line or f"# from Python: {provenance.get('command')} with\n" + "\n".join(
        f"#   {key} = {value}" for key, value in arguments.items()
    )
    flat = [
        {"entry": f"{section}.{key}" if isinstance(values, Mapping) else section, "value": str(value)}
        for section, values in provenance.items()
        if section not in ("command_line",)
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
        if value is not None
    ]
    return f"<h2>How to repeat this</h2><pre>{text(shown)}</pre>" + folded(
        "arguments, versions, machine", table(flat)
    )
