"""`layerprobe report`: a run folder as one page to read, keep or send."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from layerprobe.cli import options
from layerprobe.cli.output import print_body


def report(
    run: Annotated[Path, Argument(metavar="RUN", help="A folder that a command was given with -o.")],
    output: Annotated[
        Path | None, Option("--output", "-o", help="The HTML file; default: report.html in RUN.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write one self-contained HTML page about a run: the answer first, then the evidence.

    Example: layerprobe report quickstart
    """
    from layerprobe.report import write_report

    path = write_report(run, output=output)
    if as_json:
        print_body("report", {"run": str(run)}, {"rows": [{"report": str(path)}]})
    else:
        sys.stdout.write(f"{path}\n")
