"""Figures that several studies share: lines with bands, and claims with their intervals.

Frames are tables of the studies (`analyses/`): `value`, `low` and `high` with one more column that says
which line a row belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours, told apart by colour-blind readers; markers differ as well."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VERDICTS = {"above": "#0072B2", "below": "#D55E00", "not shown": "#777777", "too few seeds": "#AAAAAA"}


def plot_lines(
    frame: pd.DataFrame,
    x: str,
    by: str,
    *,
    ax: Axes | None = None,
    colours: Mapping[str, str] | None = None,
    scale: float = 100.0,
    shift: float = 0.0,
    bars: bool = False,
    **style: Any,
) -> Axes:
    """`value` against column `x`, one line per value of column `by`, with `low` to `high` as band or bars.

    Parameters
    ----------
    scale : factor of the values, 100 for shares in percent.
    shift : moves the lines apart along x by this much each, so that bars do not hide one another.
    style : passed on to every line.
    """
    if frame.empty:
        raise UsageError("there is nothing to draw: the table is empty")
    ax = ax if ax is not None else _axes((5.2, 3.8))
    names = list(dict.fromkeys(frame[by]))
    for index, name in enumerate(names):
        rows = frame[frame[by] == name].sort_values(x)
        place = rows[x].to_numpy(float) + shift * (index - (len(names) - 1) / 2)
        value, low, high = (scale * rows[column].to_numpy(float) for column in ("value", "low", "high"))
        colour = (colours or {}).get(str(name), CYCLE[index % len(CYCLE)])
        look = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "lw": 1.6, **style}
        if bars:
            reach = np.nan_to_num(np.abs([value - low, high - value]))
            ax.errorbar(place, value, yerr=reach, capsize=3, elinewidth=1.1, label=str(name), **look)
        else:
            ax.plot(place, value, label=str(name), **look)
            ax.fill_between(place, low, high, color=colour, alpha=0.15, linewidth=0)
    return ax


def plot_claims(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Claims as points with their intervals; blue above the null value, orange below, grey: not shown.

    `frame` is `answers.csv` of a study: `claim`, `value`, `low`, `high`, `null`, `unit`, `verdict`. All rows
    have one unit; ratios ("times") get a logarithmic axis.
    """
    if frame.empty:
        raise UsageError("there is nothing to draw: no claim was made")
    ax = ax if ax is not None else _axes((7.5, 1.1 + 0.36 * len(frame)))
    place = np.arange(len(frame))
    value, low, high = (frame[column].to_numpy(float) for column in ("value", "low", "high"))
    markers = {"above": "o", "below": "s", "not shown": "D", "too few seeds": "d"}
    for verdict, colour in VERDICTS.items():
        rows = (frame["verdict"] == verdict).to_numpy()
        if rows.any():
            reach = np.nan_to_num(np.abs([value - low, high - value]))[:, rows]
            look = {"color": colour, "fmt": markers[verdict], "capsize": 3, "ms": 6, "lw": 1.6, **style}
            ax.errorbar(value[rows], place[rows], xerr=reach, label=verdict, **look)
    ax.axvline(float(frame["null"].iloc[0]), color="#333333", linestyle="--", linewidth=1)
    ax.set_yticks(place, list(frame["claim"]))
    ax.set_ylim(len(frame) - 0.4, -0.6)
    unit = str(frame["unit"].iloc[0])
    if unit == "times":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    kinds = list(dict.fromkeys(frame["interval"]))
    ax.set_xlabel(
        {"points": "accuracy points", "times": "times"}.get(unit, unit)
        + (f" (bars: {kinds[0]})" if len(kinds) == 1 else " (bars: 95 % intervals)")
    )
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def draw_levels(ax: Axes, levels: Mapping[str, float], *, scale: float = 100.0) -> Axes:
    """Horizontal reference lines such as chance or raw pixels: name → value, drawn in this order."""
    shapes: Sequence[Any] = (":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))
    for shape, (name, value) in zip(shapes, levels.items(), strict=False):
        ax.axhline(scale * value, color="#444444", linestyle=shape, linewidth=1.2, label=name)
    return ax


def _axes(figsize: tuple[float, float]) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]
