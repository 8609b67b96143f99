"""Figures that several studies (`analyses/`) share: lines with bands, and claims with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes

from layerprobe.errors import UsageError
from layerprobe.plotting import style as look

VERDICTS = {
    "above": (look.BLUE, "o"),
    "below": (look.ORANGE, "s"),
    "not shown": ("#777777", "D"),
    "too few seeds": ("#AAAAAA", "d"),
}
"""Colour and marker of each verdict."""


def plot_lines(
    frame: pd.DataFrame,
    x: str,
    by: str,
    *,
    ax: Axes | None = None,
    colours: Mapping[str, Any] | None = None,
    scale: float = 100.0,
    shift: float = 0.0,
    bars: bool = False,
    **style: Any,
) -> Axes:
    """`value` against column `x`, one line per value of column `by`, with `low` to `high` as band or bars.

    Parameters
    ----------
    scale : float
        Factor of the values, 100 for shares in percent.
    shift : float
        Moves the lines apart along x by this much each, so that bars do not hide one another.
    style
        Passed on to every line.
    """
    if frame.empty:
        raise UsageError("there is nothing to draw: the table is empty")
    ax = ax if ax is not None else look.new_axes(5.2, 3.8)
    names = list(dict.fromkeys(frame[by]))
    for index, name in enumerate(names):
        rows = frame[frame[by] == name].sort_values(x)
        place = rows[x].to_numpy(float) + shift * (index - (len(names) - 1) / 2)
        known = [scale * rows[column].to_numpy(float) for column in ("value", "low", "high")]
        colour = (colours or {}).get(str(name), look.CYCLE[index % len(look.CYCLE)])
        line = {"color": colour, "marker": look.MARKERS[index % len(look.MARKERS)], "markersize": 5, **style}
        look.draw_line(ax, place, *known, bars=bars, label=str(name), **{"linewidth": 1.6, **line})
    return ax


def plot_claims(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Claims as points with their intervals; blue above the null value, orange below, grey: not shown.

    `frame` is `answers.csv` of a study: `claim`, `value`, `low`, `high`, `null`, `unit`, `verdict`. All rows
    have one unit; ratios ("times") get a logarithmic axis.
    """
    if frame.empty:
        raise UsageError("there is nothing to draw: no claim was made")
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 1.3 + 0.36 * len(frame))
    place = np.arange(len(frame))
    for verdict, (colour, marker) in VERDICTS.items():
        rows = (frame["verdict"] == verdict).to_numpy()
        if rows.any():
            value, low, high = (frame[column].to_numpy(float)[rows] for column in ("value", "low", "high"))
            line = {"color": colour, "marker": marker, "markersize": 6, "linestyle": "", **style}
            look.draw_line(ax, value, place[rows], low, high, bars=True, orient="y", label=verdict, **line)
    look.reference_line(ax, float(frame["null"].iloc[0]), vertical=True, color="#333333")
    ax.set(yticks=place, yticklabels=frame["claim"], ylim=(len(frame) - 0.4, -0.6))
    unit = str(frame["unit"].iloc[0])
    if unit == "times":
        look.ratio_axis(ax, (1, 1.5, 2, 3, 5, 7))
    kinds = list(dict.fromkeys(frame["interval"]))
    bars = kinds[0] if len(kinds) == 1 else "95 % intervals"
    ax.set(xlabel=f"{'accuracy points' if unit == 'points' else unit}\n(bars: {bars})", ylabel="")
    seaborn.despine(ax=ax)
    return ax


def draw_levels(ax: Axes, levels: Mapping[str, float]) -> Axes:
    """Horizontal reference lines such as chance or raw pixels: name → share, drawn in this order."""
    shapes: Sequence[Any] = (":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))
    for shape, (name, value) in zip(shapes, levels.items(), strict=False):
        look.reference_line(ax, 100 * value, color="#444444", linestyle=shape, linewidth=1.2, label=name)
    return ax
