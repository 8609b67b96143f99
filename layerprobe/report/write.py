"""`write_report`: one HTML file beside the tables it was made from."""

from __future__ import annotations

import os
from pathlib import Path

from layerprobe.errors import UsageError
from layerprobe.files import write_text
from layerprobe.report.freeze_search import search_sections
from layerprobe.report.page import page
from layerprobe.report.records import record_sections


def write_report(folder: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Path:
    """Write `report.html` for a run folder; everything in it is embedded.

    Parameters
    ----------
    folder : what a command was given with `-o`: a freeze search, or any folder of records.
    output : the HTML file; default `report.html` in the folder.

    Returns
    -------
    path of the page.

    Raises
    ------
    UsageError : there is no such folder. BrokenFileError : it holds no run, or a damaged one.
    """
    source = Path(folder)
    if not source.is_dir():
        raise UsageError(f"there is no run folder {source}")
    make = search_sections if (source / "search.json").is_file() else record_sections
    title, sections = make(source)
    return write_text(output if output is not None else source / "report.html", page(title, sections))
