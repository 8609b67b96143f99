"""What the figures share: colours, new axes, lines with intervals, and the names of layers and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours, told apart by colour-blind readers; markers differ as well."""

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK, GREY = CYCLE
LINE_GREY, CELL_GREY = "#666666", "#D9D9D9"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BLOCKS = "block (input → output)"
INK = "#1B1F24"
PRINT_WIDTH = 6.3
"""Inches between the margins of a page of A4: at this width, text of size 10 is printed as such."""
MOST_DIRECT_LABELS = 4

TRAINING_COLOURS = {
    # arms of a search
    "plan": ORANGE,
    "all": BLUE,
    "none": GREY,
    "norms": YELLOW,
    # what reads features without training the backbone
    "probe": BLACK,
    "pixels": "#882255",
    # arms of an evaluation: the same kind of training, the same colour
    "language": BLUE,
    "partial": ORANGE,
    "bridge": GREEN,
    "full-bridge": SKY,
    "random": PINK,
    "random-bridge": YELLOW,
    "shuffled": "#AA4499",  # beyond Okabe and Ito's eight: Tol's purple, teal and, above, wine
    "matched": "#44AA99",
    "model": BLACK,
}
"""One colour a kind of training in every figure: blue trains everything, orange trains a plan."""
OTHER_COLOUR = "#7B8794"


def training_colour(arm: object) -> str:
    """The colour of an arm; one grey for those without a colour of their own."""
    return TRAINING_COLOURS.get(str(arm), OTHER_COLOUR)


def new_axes(width: float, height: float) -> Axes:
    """The axes of a new figure, sizes in inches; text of size 10, no frame but the two axes."""
    with seaborn.axes_style("ticks"), settings(STYLE):
        return plt.subplots(figsize=(width, height), layout="constrained")[1]


def new_panels(
    lines: int, columns: int, width: float, height: float, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of several axes, row by row, in the style of `new_axes`."""
    with seaborn.axes_style("ticks"), settings(STYLE):
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, height), squeeze=False, layout="constrained", **shared
        )
    return figure, list(axes.ravel())


def stacked_axes(width: float, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Axes below one another, each with margins of its own, in the style of `new_axes`."""
    with seaborn.axes_style("ticks"), settings(STYLE):
        figure = plt.figure(figsize=(width, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
        return figure, [part.subplots() for part in np.ravel(parts)]


def loose_axes(width: float, height: float) -> Axes:
    """`new_axes` of a figure that pyplot does not know: nothing to close, and no backend is chosen."""
    with seaborn.axes_style("ticks"), settings(STYLE):
        return Figure(figsize=(width, height), layout="constrained").subplots()


def settings(chosen: Mapping[str, object]) -> AbstractContextManager[None]:
    """Settings of matplotlib by name, for as long as the context is open."""
    context: AbstractContextManager[None] = plt.rc_context({**chosen})  # type: ignore[dict-item]
    return context


def figure_of(ax: Axes) -> Figure:
    """The figure that axes lie in."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that are drawn lie in a figure"
    return figure


STYLE: dict[str, object] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE_GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""What every new axes has; seaborn's "ticks" is the rest."""


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


def name_lines(ax: Axes, title: str | None = None, *, ncols: int = 1) -> None:
    """Names of the lines drawn with a label: beside their right ends up to four, else as a legend outside.

    To be called last, when the limits of the axes are final. With a title there is always a legend.
    """
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    if title is not None or len(lines) > MOST_DIRECT_LABELS:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, title=title, ncols=ncols)
        return
    ends = []
    for line in lines:
        places = np.asarray(line.get_transform().transform(np.column_stack(line.get_data())), dtype=float)
        known = places[np.isfinite(places).all(axis=1)]
        if len(known):  # a line may leave the axes
            ends.append((float(np.clip(ax.transAxes.inverted().transform(known[-1])[1], 0, 1)), line))
    ends.sort(key=lambda end: end[0])
    # A line of text needs 13 points; what would overlap is moved up, then the stack down into the axes.
    step = 13 / max(1.0, ax.bbox.height * 72 / figure_of(ax).dpi)
    heights: list[float] = []
    for height, _ in ends:
        heights.append(max(height, heights[-1] + step) if heights else height)
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, (_, line) in zip(heights, ends, strict=True):
        at = height - over
        ax.text(1.025, at, f"{line.get_label()}", transform=ax.transAxes, va="center")
        mark: dict[str, Any] = {"color": line.get_color(), "linestyle": line.get_linestyle(), "linewidth": 2}
        if str(line.get_linestyle()) == "None":
            mark |= {"marker": line.get_marker(), "markersize": 5, "markevery": [1]}
        ax.add_line(Line2D([1.0, 1.012], [at, at], transform=ax.transAxes, clip_on=False, **mark))


def name_panels(figure: Figure, axes: Sequence[Axes], *, title: str | None = None, ncols: int = 3) -> None:
    """One legend above for what the panels have in common, each name once."""
    known: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        known |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    handles, labels = list(known.values()), list(known)
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=ncols, title=title)


def log_axis(ax: Axes, which: str) -> None:
    """A logarithmic axis, "x" or "y", with plain numbers at the powers of ten: figures are drawn without formulas."""
    ax.set(**{f"{which}scale": "log"})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(ax: Axes) -> None:
    """Ticks of the x axis at whole numbers alone: blocks and steps have no halves."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def show_chance(ax: Axes, chance: float | None, *, vertical: bool = False) -> None:
    """A dotted line at `chance`, named; where it would squeeze what is shown to less than a third of the axis,
    words at that end of the axis instead."""
    if chance is None:
        return
    low, high = ax.get_xlim() if vertical else ax.get_ylim()
    text = f"chance {chance:.3g} %"
    if low <= chance or high - low >= (high - chance) / 3:
        reference_line(ax, chance, vertical=vertical, color=LINE_GREY, linestyle=":")
        at = (chance, 1.0) if vertical else (0.0, chance)
        where = ("data", "axes fraction") if vertical else ("axes fraction", "data")
        shift = (3, -2) if vertical else (3, 2)
        note = ax.annotate(text, at, shift, where, "offset points", va="top" if vertical else "bottom")
    else:
        text, corner, top = (f"← {text}", (0, 1), True) if vertical else (f"↓ {text}", (0, 0), False)
        shift = (3, -2 if top else 3)
        note = ax.annotate(
            text, corner, shift, "axes fraction", "offset points", va="top" if top else "bottom"
        )
    # Rounding may put a point on the axis outside it, and matplotlib would leave the text out.
    note.set_annotation_clip(False)


def ratio_axis(ax: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic x axis for ratios, with plain numbers at `ticks` times the powers of ten."""
    log_axis(ax, "x")
    ax.xaxis.set_major_locator(LogLocator(subs=ticks))


def block_axis(ax: Axes, n_blocks: int) -> None:
    """Block indices on the x axis, thinned where there are many."""
    ax.set(xticks=range(0, n_blocks, -(-n_blocks // 16)), xlabel=BLOCKS)


def layer_names(frame: pd.DataFrame, suffix: str = "") -> list[str]:
    """The layer of each row: its block, with the site where that is not the block's output."""
    blocks, sites = frame["block" + suffix], frame["site" + suffix].replace("resid_post", None)
    named = blocks.map(lambda block: f"{block:.0f}", na_action="ignore"), sites
    return [" ".join(str(part) for part in parts if pd.notna(part)) for parts in zip(*named, strict=True)]


def layer_axis(ax: Axes, names: Sequence[str]) -> None:
    """Layers at 0, 1, … on the x axis, upright where they would run into each other."""
    # Inches: a character takes 0.1, what stands beside the axes about 1.6.
    room = figure_of(ax).get_figwidth() - 1.6
    upright = 0.1 * len(names) * (1 + max(map(len, names), default=0)) > room
    ax.set_xticks(range(len(names)), names, rotation=90 if upright else 0)


def short_name(model: object) -> str:
    """The last part of a model's name or folder."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def only_name(frame: pd.DataFrame, column: str, otherwise: str = "") -> str:
    """The one value of a column, shortened, or `otherwise` where there is none or more than one."""
    names = set(frame[column].dropna()) if column in frame else set()
    return short_name(names.pop()) if len(names) == 1 else otherwise
