"""Where results go: stdout gets the result, stderr everything else, a folder gets the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.files import atomic_write, output_folder, write_json
from layerprobe.progress import note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from layerprobe.records import Record

Draw = Callable[[], "Axes | Figure"]


class Output:
    """One command's result, in every form it can take.

    Made at the start of a command, so that a folder that cannot be written is found before the work.
    """

    def __init__(self, command: str, *, as_json: bool, folder: Path | None, quiet: bool = False) -> None:
        self.command = command
        self.as_json = as_json
        self.quiet = quiet
        self.folder = output_folder(folder) if folder is not None else None

    def dry_run(self, facts: Mapping[str, Any]) -> None:
        """Print what would be done: a two-column list, or a JSON object with "dry_run": true."""
        if self.as_json:
            from layerprobe.tables import strict_value

            body = {"schema": f"layerprobe.{self.command}/v1", "dry_run": True, **strict_value(facts)}
            print_json(body)
            return
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            sys.stdout.write(f"{key:<{width}}  {value}\n")

    def finish(
        self,
        record: Record,
        *,
        table: Sequence[Mapping[str, Any]] | None = None,
        figures: Mapping[str, Draw] | None = None,
    ) -> None:
        """Save the record and its figures, then print the answer.

        `table` holds the rows worth a look on a terminal, already formatted; the full long table is in
        the record. `figures` maps a file stem to a function that draws and returns Axes or a Figure.
        """
        if self.folder is not None:
            record.save(self.folder)
            for name, draw in (figures or {}).items():
                save_figure(draw, self.folder / f"{name}.png")
            self.say(f"saved: {self.folder}")
        if self.as_json:
            print_json(record.to_json())
            return
        if table:
            print_table(table)
        sys.stdout.write(record.summary() + "\n")

    def say(self, message: str) -> None:
        """A remark on stderr, unless --quiet."""
        if not self.quiet:
            note(message)


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    json.dump(value, sys.stdout, allow_nan=False, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A terminal table; numbers to the right, text to the left, as wide as its content."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    view = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        view.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        view.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console()
    # A table that is cut off hides numbers; better to let a narrow terminal wrap its lines.
    console.width = max(
        console.width, console.measure(view, options=console.options.update(width=1000)).maximum
    )
    console.print(view)


def save_figure(draw: Draw, path: Path) -> None:
    """Draw without a display and save as PNG, written aside and renamed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = draw()
    figure: Any = drawn if hasattr(drawn, "savefig") else drawn.get_figure()
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)


def save_json(folder: Path, name: str, value: Any) -> Path:
    """Save strict JSON into a run folder."""
    return write_json(folder / name, value)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    return str(value)
