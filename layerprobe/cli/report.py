"""`layerprobe report`: a run folder as one page to read, keep or send."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that a command was given with -o.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file; default: report.html in RUN.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write one self-contained HTML page about a run: the answer first, then the evidence.

    Example: layerprobe report quickstart
    """
    from layerprobe.report import write_report

    path = write_report(run, output=output)
    if as_json:
        from layerprobe.cli.output import print_json
        from layerprobe.provenance import provenance

        facts = provenance("report", {"run": str(run)})
        print_json({"schema": "layerprobe.report/v1", "provenance": facts, "rows": [{"report": str(path)}]})
    else:
        sys.stdout.write(f"{path}\n")
