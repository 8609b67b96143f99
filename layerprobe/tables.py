"""Tidy tables: one row per measurement, the same column names everywhere; and how tables are shown and written."""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layerprobe.errors import BrokenFileError, UsageError, first_line, shortened
from layerprobe.files import atomic_write
from layerprobe.reading import open_file

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: dict[str, str] = {
    "model": "alias, hub id or folder of the backbone",
    "revision": "commit of the hub repository, or a hash of the local weights",
    "task": "alias, hub id or folder of the images",
    "split": "train, validation or test",
    "block": "transformer block, from 0; empty for what lies outside the blocks",
    "site": "place in the block: resid_pre, attn_out, mlp_out, resid_post; or embed",
    "metric": "name of the quantity; the definition is in the docstring of the function of that name",
    "value": "the number; empty when undefined, then `reason` says why",
    "stderr": "standard error of `value`, where one is estimated",
    "n": "how many entries (weights, images, runs) the value rests on",
    "seed": "seed of the run; empty when nothing was random",
    "reason": "why `value` is empty",
}
"""The columns every long table starts with, in this order; a study appends its own."""


def tidy(rows: Iterable[Mapping[str, Any]], **constants: Any) -> pd.DataFrame:
    """A frame with the columns of `COLUMNS` first, missing ones filled with None.

    `constants` (for example model="gpt2") fill rows that do not set that column themselves.

    >>> tidy([{"metric": "kurtosis", "value": 3.0}], model="gpt2")[["model", "metric", "value"]].values.tolist()
    [['gpt2', 'kurtosis', 3.0]]
    """
    import pandas as pd

    frame = pd.DataFrame([{**constants, **row} for row in rows])
    for column in COLUMNS:
        if column not in frame:
            frame[column] = None
    extra = [column for column in frame.columns if column not in COLUMNS]
    frame = frame[[*COLUMNS, *extra]]
    for column in ("block", "n", "seed"):
        if frame[column].map(_is_whole).all():
            frame[column] = frame[column].astype("Int64")
    return frame


def _is_whole(value: object) -> bool:
    number = strict_value(value)
    return number is None or (type(number) in (int, float) and float(number).is_integer())


def strict_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values that strict JSON can hold; NaN, NA and infinities become None."""
    columns = [str(column) for column in frame.columns]
    return [
        dict(zip(columns, map(strict_value, row), strict=True))
        for row in frame.itertuples(index=False, name=None)
    ]


def strict_value(value: Any) -> Any:
    """`value` with numpy scalars, arrays, paths and non-finite floats turned into strict JSON."""
    import pandas as pd

    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return [strict_value(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        return {str(key): strict_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def cell_text(value: object) -> str:
    """A value for people to read: four digits, thousands apart, a dash for what is undefined.

    >>> [cell_text(value) for value in (0.123456, 12345, 5000.0, None, float("nan"), True, "x")]
    ['0.1235', '12,345', '5,000', '–', '–', 'yes', 'x']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def count_text(count: int) -> str:
    """A number of parameters in three digits.

    >>> [count_text(n) for n in (0, 9984, 1774464, 124439808)]
    ['0', '9.98 k', '1.77 M', '124 M']
    """
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count}"


def percent(share: float, digits: int = 1) -> str:
    """
    >>> percent(0.1234), percent(0.95, 0)
    ('12.3 %', '95 %')
    """
    return f"{100 * share:.{digits}f} %"


def share_text(share: float) -> str:
    """The share of the blocks' parameters that train, the same wherever it is told.

    >>> share_text(0.502), share_text(0.00425)
    ('50 %', '0.42 %')
    """
    return percent(share, 0) if share >= 0.01 or not share else f"{100 * share:.2g} %"


def bytes_text(count: int) -> str:
    """
    >>> bytes_text(3 << 19), bytes_text(5 << 29)
    ('1.5 MiB', '2.50 GiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def render_table(
    rows: Sequence[Mapping[str, Any]],
    form: Literal["text", "html", "markdown"] = "text",
    *,
    columns: Sequence[str] | None = None,
    width: int | None = None,
) -> str:
    """Rows as a table; text to the left, numbers to the right.

    Parameters
    ----------
    columns : which, in order; default: all, as they come.
    width : in text, lines are no longer: what does not fit stands below, behind the first column once more.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    if width is not None:
        groups = _fitting(rows, names, width)
        most = width - 2 - max(len(cell_text(row.get(names[0]))) for row in rows)
        cut = [
            {
                name: f"{v[: most - 1]}…" if isinstance(v, str) and len(v) > most > 1 else v
                for name, v in row.items()
            }
            for row in rows
        ]
        return "\n\n".join(render_table(cut, columns=part) for part in groups)
    is_text = [any(_is_text(row.get(name)) for row in rows) for name in names]
    body = [[cell_text(row.get(name)) for name in names] for row in rows]
    if form == "html":
        return _html_table(names, body, is_text) if rows else '<p class="soft">none</p>'
    if form == "markdown":
        rule = ["---" if text else "---:" for text in is_text]
        return "\n".join("| " + " | ".join(line) + " |" for line in [names, rule, *body]) if rows else "–"
    widths = [max(map(len, column)) for column in zip(names, *body, strict=True)]
    layout = "  ".join(
        f"{{:{'<' if text else '>'}{width}}}" for text, width in zip(is_text, widths, strict=True)
    )
    return "\n".join(layout.format(*line).rstrip() for line in [names, *body])


def _is_text(value: object) -> bool:
    """Whether a value is text, and not a number that was written out, perhaps with a unit or a mark behind it."""
    number = rf"({MARK})?[+−-]?[\d.,]+(e[+-]?\d+)?( \S+)?"
    return isinstance(value, str) and re.fullmatch(number, value) is None


def _fitting(rows: Sequence[Mapping[str, Any]], names: list[str], width: int) -> list[list[str]]:
    """Columns in groups that fit `width`, each behind the first one; those without any value are left out."""
    first, *others = names
    sizes = {n: max(len(n), *(len(cell_text(row.get(n))) for row in rows)) for n in names}
    groups: list[list[str]] = [[first]]
    for name in others:
        if all(cell_text(row.get(name)) == "–" for row in rows):
            continue
        if len(groups[-1]) > 1 and sum(sizes[n] + 2 for n in groups[-1]) + sizes[name] > width:
            groups.append([first])
        groups[-1].append(name)
    return groups


def _html_table(names: list[str], body: list[list[str]], is_text: list[bool]) -> str:
    def row(tag: str, line: list[str]) -> str:
        opening = [f'<{tag} class="t">' if text else f"<{tag}>" for text in is_text]
        cells = "".join(f"{o}{html.escape(c)}</{tag}>" for o, c in zip(opening, line, strict=True))
        return f"<tr>{cells}</tr>"

    lines = row("th", names) + "".join(row("td", line) for line in body)
    return f'<div class="wide"><table>{lines}</table></div>'


MARK = "▸ "
"""Stands before the best number of a column."""
SHOWN_AS = {
    "mean_norm": "mean norm",
    "mean_column_std": "mean std of a feature",
    "max_offset_sigma": "largest |mean|/std",
    "random": "random init, %",
    "control_accuracy": "control task, %",
    "selectivity": "selectivity, points",
    "skip": "skip, logits",
    "skip_accuracy_lost": "accuracy lost, points",
    "mean_ablation": "mean instead, logits",
    "mean_ablation_accuracy_lost": "accuracy lost so, points",
}
"""Metric → its column at a terminal, with the unit."""


def ranks(frame: pd.DataFrame, *, lower_is_better: Collection[str]) -> pd.Series:
    """The rank of each row within its metric as text, the first one marked; None where the value is undefined."""
    import pandas as pd

    values = frame["value"].astype(float)
    signed = values.where(~frame["metric"].isin(list(lower_is_better)), -values)
    found = signed.groupby(frame["metric"]).rank(ascending=False, method="min")
    texts = [None if math.isnan(rank) else f"{MARK if rank == 1 else ''}{rank:.0f}" for rank in found]
    return pd.Series(texts, index=frame.index, dtype=object)


def table_by_layer(
    frame: pd.DataFrame, layers: Sequence[int | str], *, key: str, prefix: str
) -> list[dict[str, Any]]:
    """Long rows as one row a layer (the column `key`) with one column a metric, in their order, numbers in 3 digits.

    Columns are called as `SHOWN_AS` says; one that ends on "points" holds a share and shows it times 100.
    """
    names = [SHOWN_AS.get(name := full.removeprefix(prefix), name) for full in frame["metric"]]
    rows = {layer: {key: layer, **dict.fromkeys(names)} for layer in layers}
    for layer, name, value in zip(layers, names, frame["value"], strict=True):
        if isinstance(value, float):
            value = float(f"{100 * value:.3g}" if name.endswith("points") else f"{value:.3g}")
        rows[layer][name] = value
    return list(rows.values())


def write_frame(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a frame as .csv or .parquet, by the ending."""
    target = Path(path)
    if target.suffix not in (".csv", ".parquet"):
        raise UsageError(f"cannot tell the table format of {target}: end it with .csv or .parquet")
    with atomic_write(target) as aside:
        if target.suffix == ".csv":
            frame.to_csv(aside, index=False)
        else:
            frame.to_parquet(aside, index=False)
    return target


MAX_TABLE_BYTES = 256 << 20


def read_frame(path: str | os.PathLike[str], *, inside: Path | None = None) -> pd.DataFrame:
    """Read a table that `write_frame` wrote; BrokenFileError for anything else, see `layerprobe.reading.open_file`."""
    import pandas as pd

    source = Path(path)
    with open_file(source, what="table", inside=inside, max_bytes=MAX_TABLE_BYTES) as stream:
        try:
            if source.suffix == ".parquet":
                return pd.read_parquet(stream)
            return pd.read_csv(stream, float_precision="round_trip")
        except Exception as error:  # whatever pandas and pyarrow stumble over
            raise BrokenFileError(
                f"cannot read table {source}: {shortened(first_line(error), 120)}"
            ) from error
