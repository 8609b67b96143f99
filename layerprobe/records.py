"""What every analysis returns: a small record that can be tabulated, saved, and shown in a notebook."""

from __future__ import annotations

import html
import importlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from layerprobe.errors import UsageError
from layerprobe.files import write_json
from layerprobe.tables import envelope, render_table, strict_rows, write_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its uncertainty, in the unit of the quantity.

    Attributes
    ----------
    value : the number; None where it is undefined, then `reason` says why.
    low, high : ends of the interval; None where none could be estimated.
    stderr : standard error of `value`.
    n : how many values (seeds, batches, images) it rests on.
    pvalue : two-sided p-value against no effect, not corrected for several comparisons.
    probability : probability that the true value is above 0, under a flat prior.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int | None = None
    pvalue: float | None = None
    probability: float | None = None
    reason: str | None = None


class Record(ABC):
    """Base of all results. A subclass is a dataclass with a `provenance` field and a `to_frame`.

    It is shown by its summary: `@dataclass(repr=False)`, since the fields hold whole tables and weights.

    `command` is the command (and schema) name: a record with command "cka" saves `cka.csv` and
    `cka.json` and says `layerprobe.cka/v1`.
    """

    command: ClassVar[str]
    figure: ClassVar[str | None] = None
    """`module.function` of `layerprobe.plotting` that `plot` uses; None where no single figure says it all."""

    provenance: dict[str, Any]

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The result as a long table (see `layerprobe.tables.COLUMNS`)."""

    @abstractmethod
    def summary(self) -> str:
        """The answer in one or two sentences, with its numbers."""

    def table(self) -> list[dict[str, Any]]:
        """The rows worth a look on a terminal; the whole of `to_frame` where a record knows no shorter ones."""
        return strict_rows(self.to_frame())

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints: schema, provenance, rows."""
        return envelope(self.command, self.to_frame(), self.provenance)

    def write_json(self, stream: TextIO) -> None:
        """Write what `to_json` returns, as strict JSON."""
        json.dump(self.to_json(), stream, allow_nan=False, indent=1, ensure_ascii=False)
        stream.write("\n")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a file (.csv, .parquet or .json) or, for any other path, as CSV and JSON into a folder.

        A single .csv or .parquet holds the rows alone, without the provenance.
        """
        target = Path(path)
        if target.suffix in (".csv", ".parquet"):
            return write_frame(self.to_frame(), target)
        if target.suffix == ".json":
            return write_json(target, self.to_json())
        write_frame(self.to_frame(), target / f"{self.command}.csv")
        write_json(target / f"{self.command}.json", self.to_json())
        return target

    def plot(self, *, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the record's main figure into `ax`, or into a new one; UsageError where it has none."""
        if self.figure is None:
            raise UsageError(f"a '{self.command}' record has no single figure; see layerprobe.plotting")
        module, function = self.figure.split(".")
        draw = getattr(importlib.import_module(f"layerprobe.plotting.{module}"), function)
        axes: Axes = draw(self.to_frame(), ax=ax, **style)
        return axes

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        shown = strict_rows(frame.dropna(axis=1, how="all").head(20))
        more = "" if len(frame) <= 20 else f"<p>… {len(frame) - 20} more rows in <code>.to_frame()</code></p>"
        return f"<p>{html.escape(self.summary())}</p>{render_table(shown, 'html')}{more}"
