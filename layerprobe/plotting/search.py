"""Figures of plans and their search: frames come from a `SearchResult`, its CSV files, or `plan_frame`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from layerprobe.errors import UsageError
from layerprobe.plotting import style as look

OTHER_COLOUR = "#9AA5B1"
MOST_STRIPS = 10
STATE_COLOURS = {"frozen": "#D9DEE4", "partial": "#F0C571", "trainable": look.ORANGE}
"""One colour per state of a block; told apart by brightness as well as by hue."""


def plot_pareto(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw expected validation accuracy against trainable parameters, with the front that nothing beats.

    Parameters
    ----------
    frame : pd.DataFrame
        `SearchResult.plans` (plans.csv): `trainable_parameters`, `validation_accuracy` in [0, 1] with `low` and
        `high`, `on_front`, `chosen`.
    ax : Axes | None
        Where to draw; default a new figure.
    style
        Passed on to the scatter of plans.

    Returns
    -------
    Axes
        The Axes. Bars are 95 % intervals of the expected accuracy, given all trainings of the search.
    """
    if frame.empty:
        raise UsageError("no plan was trained, so there is no front to draw")
    ax = ax if ax is not None else look.new_axes(6.4, 4.2)
    rows = frame.sort_values("trainable_parameters")
    x = rows["trainable_parameters"].to_numpy(float) / 1e6
    y, low, high = (100 * rows[name].to_numpy(float) for name in ("validation_accuracy", "low", "high"))
    front, chosen = (rows[column].astype(bool).to_numpy() for column in ("on_front", "chosen"))
    ax.plot(x[front], y[front], color=look.BLUE, lw=1.2, drawstyle="steps-post", zorder=1)
    bars = np.clip([y - low, high - y], 0, None)
    ax.errorbar(x, y, bars, fmt="none", ecolor=OTHER_COLOUR, lw=1, zorder=2)
    colours = np.where(front, look.BLUE, OTHER_COLOUR)
    dots: dict[str, Any] = {"s": 34, "zorder": 3, **style}
    ax.scatter(x, y, c=colours, label="a plan, with its 95 % interval", **dots)
    if chosen.any():
        ax.plot(
            x[chosen],
            y[chosen],
            "o",
            ms=12,
            mfc="none",
            mec=look.ORANGE,
            mew=2,
            zorder=4,
            label="the verdict's",
        )
    ax.set(xlabel="trainable parameters in blocks, millions", ylabel="expected validation accuracy, %")
    ax.margins(x=0.06)
    ax.legend(frameon=False, fontsize="small")
    seaborn.despine(ax=ax)
    return ax


def plot_ranking(
    frame: pd.DataFrame, *, ax: Axes | None = None, chance: float | None = None, **style: Any
) -> Axes:
    """Draw test accuracy of the plan and the baselines, best on top, with 95 % intervals.

    Parameters
    ----------
    frame : pd.DataFrame
        `SearchResult.baselines` (baselines.csv): `arm`, `test_accuracy`, `low`, `high`, `n_seeds`,
        `trainable_parameters`. Arms without a value are left out.
    chance : float | None
        Accuracy of a guess, drawn as a line.
    style
        Passed on to the points.
    """
    known = frame[frame["test_accuracy"].notna()].sort_values("test_accuracy")
    if known.empty:
        raise UsageError("no arm has a test accuracy, so there is no ranking to draw")
    ax = ax if ax is not None else look.new_axes(6.4, 1.2 + 0.36 * len(known))
    colours = {"plan": look.ORANGE, "all": look.BLUE}
    estimates = 100 * known[["test_accuracy", "low", "high"]].to_numpy(float)
    for row, (arm, estimate) in enumerate(zip(known["arm"], estimates, strict=True)):
        mean, low, high = estimate[:, None]
        point = {"color": colours.get(arm, OTHER_COLOUR), "markersize": 6, **style}
        look.draw_line(ax, mean, [row], low, high, bars=True, orient="y", **point)
    sizes = known["trainable_parameters"].to_numpy(float) / 1e6
    labels = [f"{arm}  ({size:.2g} M)" for arm, size in zip(known["arm"], sizes, strict=True)]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title("arm (trained parameters of the backbone)", loc="left", fontsize="small")
    if chance is not None:
        look.reference_line(ax, 100 * chance, vertical=True, color="black", linewidth=0.8, linestyle=":")
        # Rounding may put a point on the axis outside it, and matplotlib would leave the text out.
        where = ("data", "axes fraction")
        note = ax.annotate("chance", (100 * chance, 0), (3, 3), where, "offset points", fontsize="small")
        note.set_annotation_clip(False)
    seeds = int(known["n_seeds"].max())
    ax.set(xlabel=f"test accuracy, % (mean and 95 % interval, {seeds} unseen seeds)", ylabel="")
    ax.tick_params(axis="y", length=0)
    seaborn.despine(ax=ax, left=True)
    return ax


def plot_strips(frame: pd.DataFrame, *, parts: int = 1, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw plans as strips of blocks, input on the left, with their accuracy beside them.

    Parameters
    ----------
    frame : pd.DataFrame
        Rows with `plan` ('#' trained, '.' frozen), `validation_accuracy` in [0, 1] and `chosen`, for example
        `SearchResult.plans`; the best `MOST_STRIPS` are drawn, and those chosen.
    parts : int
        Marks of `plan` that make one block; 2 draws attention left and the rest of the block right.
    style
        Passed on to every cell (a matplotlib Rectangle).
    """
    known = frame[frame["validation_accuracy"].notna()].sort_values("validation_accuracy", ascending=False)
    if known.empty:
        raise UsageError("no plan with a validation accuracy, so there are no strips to draw")
    known = pd.concat([known.head(MOST_STRIPS), known.iloc[MOST_STRIPS:][lambda f: f["chosen"]]])
    legend = {"trained": look.BLUE, "frozen": STATE_COLOURS["frozen"]}
    cells, notes = [], []
    rows = known[["plan", "validation_accuracy", "chosen"]].itertuples(index=False)
    for plan, accuracy, chosen in rows:
        trained = look.ORANGE if chosen else look.BLUE
        # A cell is centred on its place among the blocks.
        shift = (1 / parts - 1) / 2
        cells.append(
            {i / parts + shift: trained if mark == "#" else legend["frozen"] for i, mark in enumerate(plan)}
        )
        notes.append(f"{100 * accuracy:.1f} %" + ("  ← chosen" if chosen else ""))
    ax = _strips(ax, cells, notes, legend, style, width=1 / parts)
    ax.set(xlim=(-0.6, 1.25 * len(cells[0]) / parts + 1.2), yticks=[])
    halves = "" if parts == 1 else " (left: attention, right: MLP)"
    ax.set_xlabel(f"block{halves}, input to output; right: expected validation accuracy")
    return ax


def plot_plan(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw plans as strips of blocks from input to output, coloured by what is trained.

    Parameters
    ----------
    frame : pd.DataFrame
        Rows with `plan`, `block` (empty for what lies around the blocks), `state` (`frozen`, `partial`,
        `trainable`), `value` (trained parameters) and `n` (all of them), as `plan_frame` makes them; several
        frames may be concatenated. Plans stand in the order in which they come.
    ax : Axes | None
        Where to draw; by default a new figure sized for the strips.
    style
        Passed on to every cell (a matplotlib Rectangle).

    Returns
    -------
    Axes
        The Axes. Beside each strip stands the share of the backbone's parameters that is trained.
    """
    inside = frame[frame["block"].notna()]
    if inside.empty:
        raise UsageError("no block to draw: the frame has no row with a block index")
    names = list(dict.fromkeys(frame["plan"]))
    states = [inside[inside["plan"] == name].set_index("block")["state"] for name in names]
    cells = [of_plan.map(STATE_COLOURS).to_dict() for of_plan in states]
    sums = frame.groupby("plan")[["value", "n"]].sum().loc[names]
    notes = [f"{share:.1%}" for share in sums["value"] / sums["n"]]
    legend = {state: colour for state, colour in STATE_COLOURS.items() if (inside["state"] == state).any()}
    ax = _strips(ax, cells, notes, legend, style)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("block, input to output; right: share of parameters trained")
    return ax


def _strips(
    ax: Axes | None,
    cells: Sequence[Mapping[Any, str]],
    notes: Sequence[str],
    legend: Mapping[str, str],
    style: dict[str, Any],
    width: float = 1.0,
) -> Axes:
    """One row of cells (place → colour) a plan, from top to bottom, with a note on its right."""
    n_blocks = 1 + round(max(max(row) for row in cells if row) - (1 - width) / 2)
    ax = ax if ax is not None else look.new_axes(max(4.5, 2.2 + 0.36 * n_blocks), 1.3 + 0.42 * len(cells))
    for row, (colours, note) in enumerate(zip(cells, notes, strict=True)):
        for block, colour in colours.items():
            cell = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.0, **style}
            ax.add_patch(Rectangle((block - width / 2, row - 0.4), width, 0.8, **cell))
        ax.text(n_blocks - 0.3, row, note, va="center", ha="left", fontsize="small")
    ax.set(xlim=(-0.6, 1.06 * n_blocks + 0.9), ylim=(len(cells) - 0.4, -0.6))
    look.block_axis(ax, n_blocks)
    ax.tick_params(length=0)
    seaborn.despine(ax=ax, left=True, bottom=True)
    handles = [Patch(facecolor=colour, label=label) for label, colour in legend.items()]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False)
    return ax
