"""What the figures share: colours, new axes, lines with intervals, and the names of layers and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike

CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours, told apart by colour-blind readers; markers differ as well."""

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK, GREY = CYCLE
LINE_GREY, CELL_GREY = "#666666", "#D9D9D9"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BLOCKS = "block (input → output)"


def new_axes(width: float, height: float) -> Axes:
    """The axes of a new figure, sizes in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def draw_line(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    *,
    bars: bool = False,
    orient: str = "x",
    **style: Any,
) -> None:
    """One line along `orient`; where `low` and `high` are given, its interval as a band or as bars.

    seaborn computes intervals from observations. Here they are known: each place gets three observations,
    value, low and high, of which the first is the estimate and the range is the interval.
    """
    places, values = (np.asarray(known, dtype=float) for known in ((y, x) if orient == "y" else (x, y)))
    # seaborn leaves out NaN and would join its neighbours; a finite stand-in that is estimated as NaN leaves a gap.
    missing = np.tile(np.isnan(values), 3)
    bounds = [values if bound is None else np.asarray(bound, dtype=float) for bound in (low, high)]
    observed = np.where(missing, 1.0, np.concatenate([values, *bounds]))
    axes = {orient: np.tile(places, 3), "xy".replace(orient, ""): observed}

    def estimate(known: pd.Series[float]) -> float:
        return np.nan if missing[known.index[0]] else float(known.iloc[0])

    def interval(known: pd.Series[float]) -> tuple[float, float]:
        return (np.nan, np.nan) if missing[known.index[0]] else (float(known.min()), float(known.max()))

    seaborn.lineplot(
        **axes,
        orient=orient,
        sort=False,
        estimator=estimate,
        errorbar=None if low is None else interval,
        err_style="bars" if bars else "band",
        err_kws={"capsize": 3, "elinewidth": 1.1} if bars else {"linewidth": 0, "alpha": 0.17},
        legend=False,
        ax=ax,
        **{"marker": "o", "markeredgecolor": style.get("color", "w"), "linewidth": 1.4, **style},
    )


def reference_line(ax: Axes, value: float, *, vertical: bool = False, **style: Any) -> None:
    """A thin dashed line across the axes, such as chance or zero."""
    draw = ax.axvline if vertical else ax.axhline
    draw(value, **{"color": LINE_GREY, "linestyle": "--", "linewidth": 1, **style})


def legend_outside(ax: Axes, fontsize: float | None = None) -> None:
    """The legend beside the axes, where no curve can run through it."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=fontsize)


def ratio_axis(ax: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic x axis for ratios, with plain numbers at `ticks` times the powers of ten."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def block_axis(ax: Axes, n_blocks: int) -> None:
    """Block indices on the x axis, thinned where there are many."""
    ax.set(xticks=range(0, n_blocks, -(-n_blocks // 16)), xlabel=BLOCKS)


def layer_names(frame: pd.DataFrame, suffix: str = "") -> list[str]:
    """The layer of each row: its block, with the site where that is not the block's output."""
    blocks, sites = frame["block" + suffix], frame["site" + suffix].replace("resid_post", None)
    named = blocks.map(lambda block: f"{block:.0f}", na_action="ignore"), sites
    return [" ".join(str(part) for part in parts if pd.notna(part)) for parts in zip(*named, strict=True)]


def layer_axis(ax: Axes, names: Sequence[str]) -> None:
    """Layers at 0, 1, … on the x axis, upright where names are long or many."""
    upright = any(len(name) > 5 for name in names) or len(names) > 16
    ax.set_xticks(range(len(names)), names, rotation=90 if upright else 0)


def short_name(model: object) -> str:
    """The last part of a model's name or folder."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def only_name(frame: pd.DataFrame, column: str, otherwise: str = "") -> str:
    """The one value of a column, shortened, or `otherwise` where there is none or more than one."""
    names = set(frame[column].dropna()) if column in frame else set()
    return short_name(names.pop()) if len(names) == 1 else otherwise
