"""`write_report`: one HTML file beside the tables it was made from, for a freeze search or any other run."""

from __future__ import annotations

import os
from pathlib import Path

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import read_json, write_text
from layerprobe.reading import check_fields, is_folder, is_there
from layerprobe.report.freeze_search import search_sections
from layerprobe.report.page import PROVENANCE_FIELDS, figure, page, repeat_section, text
from layerprobe.tables import render_table

SHOWN_ROWS = 200


def write_report(folder: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Path:
    """Write `report.html` for a run folder; everything in it is embedded.

    Parameters
    ----------
    folder : str | os.PathLike[str]
        What a command was given with `-o`: a freeze search, or any folder of records.
    output : str | os.PathLike[str] | None
        The HTML file; default `report.html` in the folder.

    Returns
    -------
    Path
        Path of the page.

    Raises
    ------
    UsageError
        There is no such folder.
    BrokenFileError
        It holds no run, or a damaged one.
    """
    source = Path(folder)
    if not is_folder(source):
        raise UsageError(f"there is no run folder {source}")
    make = search_sections if is_there(source / "search.json") else record_sections
    title, sections = make(source)
    return write_text(output if output is not None else source / "report.html", page(title, sections))


def record_sections(folder: Path) -> tuple[str, list[str]]:
    """Title and sections for a folder that holds saved records (`<command>.json`).

    Raises
    ------
    BrokenFileError
        No record is there.
    """
    found = sorted(folder.glob("*.json"))
    files = {path.stem: read_json(path, what="record", inside=folder) for path in found}
    records = {name: content for name, content in files.items() if _is_record(content)}
    if not records:
        raise BrokenFileError(
            f"{folder} holds no finished layerprobe run (no search.json, no <command>.json with rows); "
            "name the folder that a command was given with -o"
        )
    sections = [f"<h1>{text(folder.resolve().name)}</h1>"]
    for name, content in records.items():
        check_fields(content, {"provenance?": (PROVENANCE_FIELDS, type(None))}, folder / f"{name}.json")
        rows = [row for row in content["rows"] if isinstance(row, dict)]
        known = [c for c in (rows[0] if rows else {}) if any(row.get(c) is not None for row in rows)]
        more = f'<p class="soft">{len(rows) - SHOWN_ROWS:,} more rows in {text(name)}.csv</p>'
        sections += [f"<h2>{text(name)}</h2>", render_table(rows[:SHOWN_ROWS], "html", columns=known)]
        sections.append(more if len(rows) > SHOWN_ROWS else "")
    figures = [figure(path, folder, path.stem.replace("_", " ")) for path in sorted(folder.glob("*.png"))]
    sections += ["<h2>Figures</h2>", *figures] if figures else []
    sections.append(repeat_section(next(iter(records.values())).get("provenance") or {}))
    return f"layerprobe: {folder.resolve().name}", sections


def _is_record(content: object) -> bool:
    return (
        isinstance(content, dict)
        and str(content.get("schema", "")).startswith("layerprobe.")
        and isinstance(content.get("rows"), list)
    )
