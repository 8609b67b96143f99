"""Figures of similarity between layers, from the tables of `CKAMatrix`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from layerprobe.errors import UsageError
from layerprobe.plotting import style as look

SIGNIFICANT = 0.05


def plot_cka(frame: pd.DataFrame, *, ax: Axes | None = None, intervals: bool = False, **style: Any) -> Axes:
    """Heat map of debiased CKA: layers of A upwards, layers of B to the right, both from input to output.

    One colour scale from 0 to 1, extended downwards only if a value is negative. Cells that are no more than
    chance after correction for the search are crossed out; each row's largest cell is framed; undefined cells
    are grey.

    Parameters
    ----------
    frame : pd.DataFrame
        As `CKAMatrix.to_frame()` gives it.
    ax : Axes | None
        Where to draw; a new figure of fitting size otherwise.
    intervals : bool
        Write each value with the half-width of its 95 % interval into its cell.
    style
        Passed on to `seaborn.heatmap`, for example `cmap`.
    """
    if frame.empty:
        raise UsageError("there is nothing to draw: the table holds no pairs of layers")
    values, low, high, pvalues = (_grid(frame, name) for name in ("value", "low", "high", "pvalue_max"))
    chance = (pvalues > SIGNIFICANT).to_numpy()
    n_rows, n_columns = values.shape
    if ax is None:
        width, height = (0.78, 0.52) if intervals else (0.34, 0.32)
        ax = look.new_axes(max(4.6, 2.4 + width * n_columns), max(3.6, 1.8 + height * n_rows))
    options = {
        "cmap": "viridis",
        "vmin": np.fmin(0.0, values.min(axis=None)),
        "vmax": 1.0,
        "annot": _cell_texts(values, (high - low) / 2, chance) if intervals else np.where(chance, "×", ""),
        "fmt": "",
        "annot_kws": {"fontsize": 6.5, "linespacing": 1.0} if intervals else {"fontsize": 11},
        "cbar_kws": {"label": "debiased linear CKA"},
        **style,
    }
    seaborn.heatmap(values, ax=ax, xticklabels=True, yticklabels=True, **options)
    ax.invert_yaxis()
    ax.set_facecolor(look.CELL_GREY)
    for row, column in _closest(values):
        if not chance[row, column]:
            corner = (column + 0.04, row + 0.04)
            ax.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, ec=look.ORANGE, lw=1.4))
    upright = any(len(name) > 5 for name in values.columns)
    ax.tick_params(axis="x", rotation=90 * upright)
    ax.tick_params(axis="y", rotation=0)
    model, other = look.only_name(frame, "model", "A"), look.only_name(frame, "model_y", "B")
    ax.set(xlabel=f"layer of {other}", ylabel=f"layer of {model}")
    ax.set_title(_title(frame), loc="left", fontsize=10)
    notes = ["framed: closest layer of the row"]
    if chance.any():
        mark = "in brackets" if intervals else "crossed"
        notes.append(f"{mark}: no more than chance (corrected p > {SIGNIFICANT:g})")
    if intervals:
        notes.append("±: half-width of the 95 % interval")
    below = (0, -84 if upright else -44)
    ax.annotate("\n".join(notes), (0, 0), below, "axes fraction", "offset points", fontsize=9, va="top")
    return ax


def _grid(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column as a table of layers of A × layers of B, in the order in which the frame first names them."""
    rows, columns = look.layer_names(frame), look.layer_names(frame, "_y")
    cells = frame.assign(row=rows, column=columns).pivot(index="row", columns="column", values=column)
    return cells.reindex(index=list(dict.fromkeys(rows)), columns=list(dict.fromkeys(columns))).astype(float)


def _cell_texts(values: pd.DataFrame, half: pd.DataFrame, chance: np.ndarray) -> np.ndarray:
    texts = values.map("{:.2f}".format) + "\n±" + half.map("{:.2f}".format)
    texts = texts.apply(lambda column: column.str.replace("-0.00", "0.00"))
    return np.where(chance, "(" + texts + ")", texts)


def _closest(values: pd.DataFrame) -> list[tuple[int, int]]:
    """The largest cell of each row; where layers are compared with themselves, the diagonal does not count."""
    cells = values.to_numpy(copy=True)
    own = np.diag(cells)[~np.isnan(np.diag(cells))]
    if list(values.index) == list(values.columns) and np.all(np.abs(own - 1.0) < 1e-9):
        np.fill_diagonal(cells, np.nan)
    return [(row, int(np.nanargmax(line))) for row, line in enumerate(cells) if np.isfinite(line).any()]


def plot_cka_closest(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Largest CKA of each layer of A with any layer of B, with 95 % intervals and the name of that layer.

    `frame` is `CKAMatrix.closest()`. Hollow points are no more than chance after correction.
    """
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 4.4)
    value, low, high, p = (frame[c].to_numpy(float) for c in ("value", "low", "high", "pvalue_max"))
    x, half = np.arange(len(frame)), (high - low) / 2
    options = {"color": look.BLUE, "linestyle": "", "markersize": 6, "linewidth": 1.2, **style}
    bars = options | {"marker": "|", "label": "value and 95 % interval"}
    look.draw_line(ax, x, value, value - half, value + half, bars=True, **bars)
    sure, colour = p <= SIGNIFICANT, options["color"]
    for mask, face, name in ((sure, colour, "more than chance"), (~sure, "white", "no more than chance")):
        if mask.any():
            ax.plot(x[mask], value[mask], "o", color=colour, markerfacecolor=face, label=name)
    for place, (name, top) in enumerate(zip(look.layer_names(frame, "_y"), value + half, strict=True)):
        if np.isfinite(top):
            ax.annotate(name, (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    look.reference_line(ax, 0)
    look.layer_axis(ax, look.layer_names(frame))
    ax.margins(y=0.15)
    model, other = look.only_name(frame, "model", "A"), look.only_name(frame, "model_y", "B")
    ax.set(xlabel=f"layer of {model}", ylabel="debiased linear CKA")
    ax.set_title(f"closest layer of {other} (named above each point)", loc="left", fontsize=10)
    ax.legend(frameon=False, loc="best", fontsize=9)
    return ax


def _title(frame: pd.DataFrame) -> str:
    task, split, counts = look.only_name(frame, "task"), look.only_name(frame, "split"), frame["n"].dropna()
    parts = [f"{task}/{split}"] if task else []
    parts += [f"n = {int(counts.iloc[0]):,} images"] if len(counts) else []
    return ", ".join(parts)
