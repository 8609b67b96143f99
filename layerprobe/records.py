"""What every analysis returns: a small record that can be tabulated, drawn, saved, read back, and shown."""

from __future__ import annotations

import html
import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import read_json, write_json
from layerprobe.reading import Schema, check_fields, is_folder, is_there
from layerprobe.tables import cell_text, read_frame, render_table, strict_rows, strict_value, write_frame

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

FIGURES = {
    "outliers": "outliers.plot_outlier_depth",
    "compare": "outliers.plot_outlier_comparison",
    "features": "layer_scores.plot_features",
    "cka": "similarity.plot_cka",
    "probe": "probes.plot_probe_accuracy",
    "transfer": "layer_scores.plot_transfer",
    "attribute": "layer_scores.plot_attribution",
    "bridge": "bridge.plot_weight_drift",
    "evaluate": "bridge.plot_accuracy_against",
    "freeze-search": "search.plot_ranking",
    "plan-show": "search.plot_plan",
}
"""Command → `module.function` of `layerprobe.plotting` that draws the table of its record."""
SHOWN_ROWS = 40
SEARCH_SCHEMA = "layerprobe.search/v1"
"""Of search.json, which holds more than a record."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its uncertainty, in the unit of the quantity.

    Attributes
    ----------
    value : the number; None where it is undefined, then `reason` says why.
    low, high : ends of the interval; None where none could be estimated.
    stderr : standard error of `value`.
    n : how many values (seeds, batches, images) it rests on.
    freedom : degrees of freedom of `stderr`.
    pvalue : two-sided p-value against no effect, not corrected for several comparisons.
    probability : probability that the true value is above 0, under a flat prior.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int | None = None
    freedom: float | None = None
    pvalue: float | None = None
    probability: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Repeated(Estimate):
    """An estimate with what its error comes from: one value an image, a batch, or a half sample.

    Those of two layers are paired, so that the error of a difference is `scale` times the standard deviation of theirs.
    """

    repeats: NDArray[np.float64] = field(repr=False, compare=False)
    scale: float = 1.0


class Record(ABC):
    """Base of all results. A subclass is a dataclass with a `provenance` field and a `to_frame`.

    It is shown by its summary: `@dataclass(repr=False)`, since the fields hold whole tables and weights.

    `command` is the command (and schema) name: a record with command "cka" saves `cka.csv` and
    `cka.json` and says `layerprobe.cka/v1`.
    """

    command: ClassVar[str]

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

    def extra_tables(self) -> dict[str, pd.DataFrame]:
        """Name → table that `save` writes into a folder beside that of `to_frame`."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints: schema, provenance, rows; and summary and table, for a report."""
        return {
            "schema": f"layerprobe.{self.command}/v1",
            "provenance": strict_value(self.provenance),
            "rows": strict_rows(self.to_frame()),
            "summary": self.summary(),
            "table": strict_value(self.shown_rows()),
        }

    def shown_rows(self) -> list[dict[str, Any]]:
        """`table`, or nothing where that is just the rows of `to_frame`."""
        return [] if type(self).table is Record.table else self.table()

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
        for name, frame in {self.command: self.to_frame(), **self.extra_tables()}.items():
            write_frame(frame, target / f"{name}.csv")
        write_json(target / f"{self.command}.json", self.to_json())
        return target

    def plot(self, *, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the record's main figure into `ax`, or into a new one; UsageError where nothing is defined."""
        return figure_of(self.command)(self.to_frame(), ax=ax, **style)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """The answer, and one row a layer, block or arm; where a record knows no such table, its first rows."""
        rows = self.shown_rows() or strict_rows(self.to_frame().head(SHOWN_ROWS))
        columns = list(dict.fromkeys(key for row in rows for key in row))
        known = [name for name in columns if any(cell_text(row.get(name)) != "–" for row in rows)]
        table = render_table(rows[:SHOWN_ROWS], "html", columns=known)
        more = f"{len(rows) - SHOWN_ROWS} more rows; " if len(rows) > SHOWN_ROWS else ""
        where = f"<p>{more}everything is in <code>.to_frame()</code></p>"
        return f"<p>{html.escape(self.summary())}</p>{table}{where}"


def figure_of(command: str) -> Callable[..., Axes]:
    """The function of `layerprobe.plotting` that draws the table of a command's record."""
    if command not in FIGURES:
        raise UsageError(f"a '{command}' record has no figure; see layerprobe.plotting")
    module, function = FIGURES[command].split(".")
    draw: Callable[..., Axes] = getattr(importlib.import_module(f"layerprobe.plotting.{module}"), function)
    return draw


@dataclass(repr=False, kw_only=True)
class SavedRecord(Record):
    """A record read back from its file: its table, answer and provenance, and its figure.

    Features, fits and weights are not kept in that file. `command` is the command that made it.
    """

    command: str  # type: ignore[misc]
    frame: pd.DataFrame
    answer: str
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def summary(self) -> str:
        return self.answer

    def table(self) -> list[dict[str, Any]]:
        return self.rows or strict_rows(self.frame)


def load(path: str | os.PathLike[str]) -> Any:
    """Read back what a command or `.save` wrote.

    Parameters
    ----------
    path : str | os.PathLike[str]
        A record (`<command>.json`, or .csv and .parquet, which hold the rows alone), the folder of one, a plan,
        or the run folder of a search.

    Returns
    -------
    SavedRecord | SearchResult | FreezePlan

    Raises
    ------
    UsageError
        There is no such file, or the folder holds several records.
    BrokenFileError
        It is none of these.
    """
    source = Path(path)
    if is_folder(source):
        if is_there(source / "search.json"):
            return importlib.import_module("layerprobe.search.result").SearchResult.load(source)
        found = [one for one in sorted(source.glob("*.json")) if one.stem in FIGURES]
        if len(found) != 1:
            named = ", ".join(one.name for one in found) or "none"
            raise UsageError(f"{source} should hold one record, and holds {named}; name its file")
        source = found[0]
    if not is_there(source):
        raise UsageError(f"there is no file {source}")
    if source.suffix in (".csv", ".parquet"):
        frame = read_frame(source)
        facts: dict[str, Any] = {
            "answer": f"{len(frame):,} rows of {source.name}",
            "rows": [],
            "provenance": {},
        }
        return SavedRecord(command=source.stem, frame=frame, **facts)
    content = read_json(source, what="record")
    schema = str(content.get("schema", "")) if isinstance(content, dict) else ""
    if schema.startswith("freeze-plan/"):
        return importlib.import_module("layerprobe.plans").FreezePlan.load(source)
    if schema == SEARCH_SCHEMA:
        return importlib.import_module("layerprobe.search.result").SearchResult.load(source.parent)
    return saved_record(content, source)


RECORD_FIELDS: dict[str, Schema] = {
    "schema": str, "rows": [dict], "provenance?": (dict, type(None)), "summary?": str, "table?": [dict],
}  # fmt: skip


def saved_record(content: object, file: Path) -> SavedRecord:
    """The record in the JSON object of `file`; BrokenFileError where it is none."""
    import pandas as pd

    if not isinstance(content, dict):
        raise BrokenFileError(f"cannot read {file}: it is not one object")
    body = check_fields(content, RECORD_FIELDS, file)
    schema = body["schema"]
    if not schema.startswith("layerprobe."):
        raise BrokenFileError(f"{file} is not a record of layerprobe: its schema is '{schema}'")
    answer = body.get("summary") or (
        f"{len(body['rows']):,} rows, saved by a version that did not keep the answer beside them."
    )
    return SavedRecord(
        command=schema.removeprefix("layerprobe.").split("/")[0],
        frame=pd.DataFrame(body["rows"]),
        answer=answer,
        rows=body.get("table") or [],
        provenance=body.get("provenance") or {},
    )
