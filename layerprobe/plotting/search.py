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
from layerprobe.tables import percent

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
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 4)
    rows = frame.sort_values("trainable_parameters")
    x = rows["trainable_parameters"].to_numpy(float) / 1e6
    y, low, high = (100 * rows[name].to_numpy(float) for name in ("validation_accuracy", "low", "high"))
    front, chosen = (rows[column].astype(bool).to_numpy() for column in ("on_front", "chosen"))
    ax.plot(x[front], y[front], color=look.BLUE, lw=1.2, drawstyle="steps-post", zorder=1)
    bars = np.clip([y - low, high - y], 0, None)
    ax.errorbar(x, y, bars, fmt="none", ecolor=look.OTHER_COLOUR, lw=1, zorder=2)
    colours = np.where(front, look.BLUE, look.OTHER_COLOUR)
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
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def plot_ranking(
    frame: pd.DataFrame, *, ax: Axes | None = None, chance: float | None = None, **style: Any
) -> Axes:
    """Draw test accuracy of the plan and the baselines, best on top, with 95 % intervals.

    Parameters
    ----------
    frame : pd.DataFrame
        `SearchResult.to_frame()`, or `SearchResult.baselines` (baselines.csv): `arm`, `test_accuracy`, `low`, `high`,
        `n_seeds`, `trainable_parameters`. Arms without a value are left out.
    chance : float | None
        Accuracy of a guess, drawn as a line.
    style
        Passed on to the points.
    """
    if "metric" in frame:
        rows = frame[frame["metric"] == "test_accuracy"]
        frame = rows.rename(columns={"value": "test_accuracy", "n": "n_seeds"})
    known = frame[frame["test_accuracy"].notna()].sort_values("test_accuracy")
    if known.empty:
        raise UsageError("no arm has a test accuracy, so there is no ranking to draw")
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 1.2 + 0.36 * len(known))
    estimates = 100 * known[["test_accuracy", "low", "high"]].to_numpy(float)
    _points(ax, known["arm"], estimates, style)
    sizes = known["trainable_parameters"].to_numpy(float) / 1e6
    labels = [f"{arm}  ({size:.2g} M)" for arm, size in zip(known["arm"], sizes, strict=True)]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title("arm (trained parameters of the backbone)", loc="left", fontsize=10)
    look.show_chance(ax, None if chance is None else 100 * chance, vertical=True)
    seeds = int(known["n_seeds"].max())
    ax.set(xlabel=f"test accuracy, % (mean and 95 % interval, {seeds} unseen seeds)", ylabel="")
    return ax


def plot_differences(
    frame: pd.DataFrame, versus: str, *, margin: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how far other ways of training are from one of them: points with 95 % intervals, and the zero line.

    Parameters
    ----------
    frame : pd.DataFrame
        Rows with `arm` (its kind, for the colour), `name`, `difference`, `low` and `high` as shares, and
        `test_accuracy`; drawn from top to bottom. A row without a difference keeps its place.
    versus : str
        What the zero line is called.
    margin : float | None
        A band of this half-width around zero, as a share: no difference reaches out of it.
    """
    if frame.empty:
        raise UsageError("there is nothing to compare, so there are no differences to draw")
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 1.3 + 0.36 * len(frame))
    if margin is not None:
        ax.axvspan(-100 * margin, 100 * margin, color=look.CELL_GREY, alpha=0.45, linewidth=0)
    look.reference_line(ax, 0.0, vertical=True, color=look.LINE_GREY, linestyle="-")
    rows = frame.iloc[::-1]
    _points(ax, rows["arm"], 100 * rows[["difference", "low", "high"]].to_numpy(float), {})
    ax.set_yticks(range(len(rows)), [str(name) for name in rows["name"]])
    for place, accuracy in enumerate(rows["test_accuracy"]):
        if pd.notna(accuracy):
            text = f"{100 * accuracy:.1f} %"
            ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center")
    ax.set_title("test\naccuracy", loc="right", fontsize=10)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    band = "" if margin is None else f"; grey: ±{100 * margin:.1f} points"
    ax.set(xlabel=f"points above {versus}\n(95 % intervals{band})", ylabel="")
    return ax


def plot_trials(frame: pd.DataFrame, *, chance: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw the validation accuracy of every training against what had been spent by then, and the best so far.

    Parameters
    ----------
    frame : pd.DataFrame
        `SearchResult.trials` (trials.csv): `number`, `cost` in full trainings, `validation_accuracy` in [0, 1],
        `trained_blocks`. Failed trainings cost and are not drawn.
    chance : float | None
        Accuracy of a guess.
    """
    rows = frame.sort_values("number").assign(spent=lambda f: f["cost"].astype(float).cumsum())
    rows = rows[rows["validation_accuracy"].notna()]
    if rows.empty:
        raise UsageError("no training has a validation accuracy, so there is nothing to draw")
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 3.4)
    spent, accuracy = rows["spent"].to_numpy(float), 100 * rows["validation_accuracy"].to_numpy(float)
    most = rows["trained_blocks"].max()
    groups = {
        "all": rows["trained_blocks"] == most,
        "plan": (rows["trained_blocks"] > 0) & (rows["trained_blocks"] < most),
        "none": rows["trained_blocks"] == 0,
    }
    names = {"all": "all blocks trained", "plan": "some blocks trained", "none": "no block trained"}
    for kind, chosen in groups.items():
        chosen = chosen.to_numpy()
        if chosen.any():
            shape = look.MARKERS[list(groups).index(kind)]
            dots: dict[str, Any] = {
                "s": 30,
                "color": look.training_colour(kind),
                "marker": shape,
                "zorder": 3,
            }
            ax.scatter(spent[chosen], accuracy[chosen], label=names[kind], **dots)
    best = np.maximum.accumulate(accuracy)
    ax.plot(spent, best, drawstyle="steps-post", color=look.LINE_GREY, lw=1.2, label="best so far", zorder=1)
    ax.set_xlim(0, None)
    look.show_chance(ax, None if chance is None else 100 * chance)
    ax.set(xlabel="cost so far, in full trainings", ylabel="validation accuracy, %")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.3)
    return ax


def _points(ax: Axes, arms: Sequence[object], estimates: np.ndarray, style: dict[str, Any]) -> None:
    """One estimate a row with its interval, from the bottom up, in the colour of its arm."""
    for row, (arm, estimate) in enumerate(zip(arms, estimates, strict=True)):
        mean, low, high = estimate[:, None]
        point = {"color": look.training_colour(arm), "markersize": 6, **style}
        look.draw_line(ax, mean, [row], low, high, bars=True, orient="y", **point)
    ax.tick_params(axis="y", length=0)
    seaborn.despine(ax=ax, left=True)


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
    ax.set(xlim=(-0.6, 1.3 * len(cells[0]) / parts + 1.4), yticks=[])
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
    notes = [f"{percent(share)}" for share in sums["value"] / sums["n"]]
    legend = {state: colour for state, colour in STATE_COLOURS.items() if (inside["state"] == state).any()}
    ax = _strips(ax, cells, notes, legend, style)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("block, input to output; right: share of the backbone's parameters that train")
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
        ax.text(n_blocks - 0.3, row, note, va="center", ha="left")
    ax.set(xlim=(-0.6, 1.06 * n_blocks + 0.9), ylim=(len(cells) - 0.4, -0.6))
    look.block_axis(ax, n_blocks)
    ax.tick_params(length=0)
    seaborn.despine(ax=ax, left=True, bottom=True)
    handles = [Patch(facecolor=colour, label=label) for label, colour in legend.items()]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False)
    return ax
