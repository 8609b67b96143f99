"""From a run folder to one self-contained HTML page, beside the tables it was made from."""

from __future__ import annotations

import os
from pathlib import Path

from layerprobe.errors import UsageError
from layerprobe.files import write_text
from layerprobe.reading import is_folder, is_there
from layerprobe.report import page as html
from layerprobe.report.compare import comparison_sections
from layerprobe.report.freeze_search import search_sections
from layerprobe.report.runs import record_sections

__all__ = ["write_report"]


def write_report(
    folder: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Write `report.html` for a run folder, or a page that compares several; everything in it is embedded.

    Parameters
    ----------
    folder : str | os.PathLike[str]
        What a command was given with `-o`: a freeze search, or any folder of records.
    *others : str | os.PathLike[str]
        Further runs to compare it with.
    output : str | os.PathLike[str] | None
        The HTML file; default `report.html` in the folder, `comparison.html` where there are others.

    Raises
    ------
    UsageError
        There is no such folder.
    BrokenFileError
        It holds no run, or a damaged one.
    """
    sources = [Path(one) for one in (folder, *others)]
    for source in sources:
        if not is_folder(source):
            raise UsageError(f"there is no run folder {source}")
    first = sources[0]
    if others:
        title, sections = comparison_sections(sources)
    else:
        title, sections = (search_sections if is_there(first / "search.json") else record_sections)(first)
    target = output if output is not None else first / ("comparison.html" if others else "report.html")
    return write_text(target, html.page(f"layerprobe: {title}", sections))
