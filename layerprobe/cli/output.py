"""Where results go: stdout gets the result, stderr everything else, a folder gets the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.cli.settings import SETTINGS_FILE
from layerprobe.files import atomic_write, output_folder
from layerprobe.locks import process_number
from layerprobe.progress import note, silence_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from layerprobe.cli.settings import Call
    from layerprobe.records import Record

Draw = Callable[[], "Axes | Figure"]


class Output:
    """One command's result, in every form it can take.

    Made at the start of a command, so that a folder that cannot be written is found before the work. With
    `one_file`, `output` may also be one table, told by its ending.
    """

    def __init__(
        self,
        command: str,
        *,
        as_json: bool = False,
        output: Path | None = None,
        dry_run: bool = False,
        quiet: bool = False,
        one_file: bool = False,
        config: Call | None = None,
    ) -> None:
        silence_notes(quiet)
        self.command = command
        self.as_json = as_json
        self.dry_run = dry_run
        self.quiet = quiet
        self.file = output if one_file and output and output.suffix in (".csv", ".parquet", ".json") else None
        self.folder = output_folder(output) if output is not None and self.file is None else None
        self._call = config

    def own_folder(self, model: str, task: str, *, may_differ: Collection[str] = ()) -> None:
        """Without -o: a folder below runs/ that is free, or holds this very run; made by `keep_settings`.

        `may_differ` are options that may be given otherwise when the run goes on.
        """
        if self.folder is None and self._call is not None:
            self.folder = self._call.free_folder(model, task, may_differ=may_differ)

    def start(self, what: str) -> None:
        """The first line: what will be done, and for commands that keep a run, where."""
        if not self.dry_run and process_number() == 0:
            where = ""
            if self.folder is not None:
                held = self._call is not None and (self.folder / SETTINGS_FILE).exists()
                where = f"; {'continues' if held else 'kept'} in {self.folder}"
            self.say(f"{self.command}: {what}{where}")

    def keep_settings(self, *, anew: bool = False) -> None:
        """Write the settings of this call into the folder, unless some lie there or `anew` is set."""
        if self.folder is None or self._call is None or process_number() > 0:
            return
        output_folder(self.folder)
        if not anew:
            self._call.keeps(self.folder)
        if anew or not (self.folder / SETTINGS_FILE).exists():
            self._call.write(self.folder)

    def show_facts(self, facts: Mapping[str, Any]) -> None:
        """What would be done: a two-column list, or a JSON object with "dry_run": true."""
        if self.as_json:
            from layerprobe.tables import strict_value

            schema = f"layerprobe.{self.command}/v1"
            print_json({"schema": schema, "dry_run": True, **strict_value(facts)})
            return
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            sys.stdout.write(f"{key:<{width}}  {value}\n")

    def finish(
        self,
        record: Record,
        *,
        figures: Callable[[], Mapping[str, Draw]] = dict,
    ) -> None:
        """Save the record and, in a folder, its `figures` (file stem → function that draws); print answer and table."""
        if self.file is not None:
            record.save(self.file)
        if self.folder is not None:
            record.save(self.folder)
            self.draw(figures())
            self.keep_settings(anew=True)
        if self.as_json:
            record.write_json(sys.stdout)
        else:
            from layerprobe.cli.terminal import print_answer

            print_answer(record.summary(), record.shown_rows() or record.table())
        if self.file is not None or self.folder is not None:
            sys.stdout.flush()
            self.say(f"saved: {self.file or self.folder}")

    def draw(self, figures: Mapping[str, Draw]) -> None:
        """Save figures (file stem → function that draws) where there is a folder."""
        if self.folder is not None:
            for name, draw in figures.items():
                save_figure(draw, self.folder / f"{name}.png")

    def say(self, message: str) -> None:
        """A remark on stderr, unless --quiet."""
        if not self.quiet:
            note(message)


def print_json(value: object) -> None:
    """Strict JSON on stdout."""
    json.dump(value, sys.stdout, allow_nan=False, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def print_body(command: str, arguments: Mapping[str, Any], body: Mapping[str, Any], **facts: object) -> None:
    """The JSON object of a command whose result is no record; `facts` go into its provenance."""
    from layerprobe.provenance import provenance

    schema = f"layerprobe.{command.replace(' ', '-')}/v1"
    print_json({"schema": schema, "provenance": provenance(command, arguments, **facts), **body})


def save_figure(draw: Draw, path: Path) -> None:
    """Draw without a display and save as PNG, written aside and renamed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Names of models and tasks may hold dollars, which are no formulas.
    with plt.rc_context({"text.parse_math": False}):
        drawn = draw()
        figure: Any = drawn if hasattr(drawn, "savefig") else drawn.get_figure()
        with atomic_write(path) as aside:
            figure.savefig(aside, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)
