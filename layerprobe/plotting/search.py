"""Figures of a freeze search: the front of accuracy against size, the ranking of arms, plans as strips.

Frames come from a `SearchResult` or from the CSV files of its run folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PLAN_COLOUR = "#D55E00"
FRONT_COLOUR = "#0072B2"
OTHER_COLOUR = "#9AA5B1"
FROZEN_COLOUR = "#D9DEE4"


def plot_pareto(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw validation accuracy against trainable parameters, with the front that nothing beats.

    Parameters
    ----------
    frame : `SearchResult.pareto` (pareto.csv): `trainable_parameters`, `validation_accuracy` in [0, 1], `sd`
        over seeds (may be empty), `n_seeds`, `on_front`, `chosen`.
    ax : where to draw; default a new figure. style : passed on to the scatter of plans.

    Returns
    -------
    The Axes. Bars are one standard error where a plan has several seeds; single runs are hollow.
    """
    import matplotlib.pyplot as plt

    if frame.empty:
        raise UsageError("no plan was valued at full length, so there is no front to draw")
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    x, y = (
        frame["trainable_parameters"].to_numpy(float) / 1e6,
        100 * frame["validation_accuracy"].to_numpy(float),
    )
    repeated = frame["n_seeds"].to_numpy() > 1
    error = 100 * frame["sd"].to_numpy(float) / np.sqrt(frame["n_seeds"].to_numpy(float))
    front = frame["on_front"].astype(bool).to_numpy()
    order = np.argsort(x[front])
    ax.plot(x[front][order], y[front][order], color=FRONT_COLOUR, lw=1.2, drawstyle="steps-post", zorder=1)
    ax.errorbar(x[repeated], y[repeated], error[repeated], fmt="none", ecolor=OTHER_COLOUR, lw=1, zorder=2)
    colours = np.where(front, FRONT_COLOUR, OTHER_COLOUR)
    look = {"s": 34, "zorder": 3, **style}
    ax.scatter(
        x[repeated], y[repeated], c=colours[repeated], label="several seeds, ± 1 standard error", **look
    )
    ax.scatter(
        x[~repeated],
        y[~repeated],
        facecolors="white",
        edgecolors=colours[~repeated],
        label="one seed",
        **look,
    )
    chosen = frame["chosen"].astype(bool).to_numpy()
    if chosen.any():
        ax.scatter(
            x[chosen],
            y[chosen],
            s=150,
            facecolors="none",
            edgecolors=PLAN_COLOUR,
            linewidths=2,
            zorder=4,
            label="the plan",
        )
    ax.set_xlabel("trainable parameters in blocks, millions")
    ax.set_ylabel("validation accuracy, %")
    ax.margins(x=0.06)
    ax.legend(frameon=False, fontsize="small")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def plot_ranking(
    frame: pd.DataFrame, *, ax: Axes | None = None, chance: float | None = None, **style: Any
) -> Axes:
    """Draw test accuracy of the plan and the baselines, best on top, with 95 % t intervals over seeds.

    Parameters
    ----------
    frame : `SearchResult.baselines` (baselines.csv): `arm`, `test_accuracy`, `low`, `high`, `n_seeds`,
        `trainable_parameters`. Arms without a value are left out.
    chance : accuracy of a guess, drawn as a line. style : passed on to the error bars.

    Returns
    -------
    The Axes.
    """
    import matplotlib.pyplot as plt

    known = frame[frame["test_accuracy"].notna()].sort_values("test_accuracy")
    if known.empty:
        raise UsageError("no arm has a test accuracy, so there is no ranking to draw")
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 1.2 + 0.36 * len(known)), layout="constrained")[1]
    rows = np.arange(len(known))
    mean = 100 * known["test_accuracy"].to_numpy(float)
    low, high = 100 * known["low"].to_numpy(float), 100 * known["high"].to_numpy(float)
    spread = np.vstack([np.nan_to_num(mean - low), np.nan_to_num(high - mean)])
    for row, arm in zip(rows, known["arm"], strict=True):
        colour = PLAN_COLOUR if arm == "plan" else FRONT_COLOUR if arm == "all" else OTHER_COLOUR
        look = {"color": colour, "marker": "o", "ms": 6, "lw": 1.6, "capsize": 3, **style}
        ax.errorbar(mean[row], row, xerr=spread[:, row : row + 1], **look)
    sizes = known["trainable_parameters"].to_numpy(float) / 1e6
    labels = [f"{arm}  ({size:.2g} M)" for arm, size in zip(known["arm"], sizes, strict=True)]
    ax.set_yticks(rows, labels)
    ax.set_title("arm (trained parameters of the backbone)", loc="left", fontsize="small")
    if chance is not None:
        ax.axvline(100 * chance, color="black", lw=0.8, ls=":")
        ax.annotate(
            "chance",
            (100 * chance, 0),
            (3, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize="small",
        )
    seeds = int(known["n_seeds"].max())
    ax.set_xlabel(f"test accuracy, % (mean and 95 % t interval, {seeds} unseen seeds)")
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    return ax


def plot_strips(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw plans as strips of blocks, input on the left, with their accuracy beside them.

    Parameters
    ----------
    frame : rows with `plan` ('#' trained, '.' frozen), `validation_accuracy` in [0, 1] and `chosen`, for
        example `SearchResult.finalists`; drawn from best to worst.
    style : passed on to every cell (a matplotlib Rectangle).

    Returns
    -------
    The Axes.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    known = frame[frame["validation_accuracy"].notna()].sort_values("validation_accuracy", ascending=False)
    if known.empty:
        raise UsageError("no plan with a validation accuracy, so there are no strips to draw")
    n_blocks = len(known["plan"].iloc[0])
    if ax is None:
        size = (max(4.5, 2.2 + 0.36 * n_blocks), 1.3 + 0.4 * len(known))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    for row, (plan, accuracy, chosen) in enumerate(
        known[["plan", "validation_accuracy", "chosen"]].itertuples(index=False)
    ):
        for block, mark in enumerate(plan):
            colour = FROZEN_COLOUR if mark != "#" else PLAN_COLOUR if chosen else FRONT_COLOUR
            look = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.0, **style}
            ax.add_patch(Rectangle((block - 0.5, row - 0.4), 1.0, 0.8, **look))
        text = f"{100 * accuracy:.1f} %" + ("  ← the plan" if chosen else "")
        ax.text(n_blocks - 0.3, row, text, va="center", ha="left", fontsize="small")
    ax.set_xlim(-0.6, n_blocks + 0.25 * n_blocks + 1.2)
    ax.set_ylim(len(known) - 0.4, -0.6)
    ax.set_xticks(range(0, n_blocks, max(1, -(-n_blocks // 16))))
    ax.set_yticks([])
    ax.set_xlabel("block, input to output; right: validation accuracy")
    for side in ax.spines.values():
        side.set_visible(False)
    handles = [Patch(facecolor=FRONT_COLOUR, label="trained"), Patch(facecolor=FROZEN_COLOUR, label="frozen")]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, frameon=False)
    return ax
