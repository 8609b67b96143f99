"""Figures of bridge training and of the arms it is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes

from layerprobe.plotting import style as look
from layerprobe.tables import percent

COSTS = {
    "train_flops": ("training cost (TFLOP in the blocks)", 1e12),
    "train_seconds": ("training time (s)", 1.0),
    "trainable_parameters": ("parameters trained in fine-tuning (millions)", 1e6),
}
"""What an axis is called, and its unit."""


def plot_bridge_curve(
    frame: pd.DataFrame, *, guess: float | None = None, ax: Axes | None = None, **style: Any
) -> Axes:
    """Random-label accuracy against optimizer steps, smoothed by a running mean; the guess is dashed.

    `frame` is `BridgeRun.history`; `guess` is 1/K.
    """
    ax = ax if ax is not None else look.new_axes(6, 4)
    window = max(1, len(frame) // 25)
    smooth = frame["accuracy"].rolling(window, min_periods=1).mean()
    options = {
        "color": look.training_colour("bridge"),
        "marker": "",
        "label": f"mean of {window} steps",
        **style,
    }
    ax.plot(frame["step"], frame["accuracy"], color=options["color"], alpha=0.25, linewidth=0.8)
    look.draw_line(ax, frame["step"], smooth, **options)
    if guess is not None:
        look.reference_line(ax, guess, label=f"guess, {percent(guess)}")
    ax.set(xlabel="optimizer step", ylabel="random labels recalled (share)", ylim=(0, None))
    look.whole_numbers(ax)
    look.name_lines(ax)
    return ax


def plot_weight_drift(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Relative change of each block's weights, input to output; frozen blocks stand at zero.

    `frame` is `BridgeRun.to_frame()`.
    """
    ax = ax if ax is not None else look.new_axes(6, 4)
    rows = frame[(frame["metric"] == "weight_change") & frame["block"].notna()]
    blocks, values = rows["block"].astype(int), rows["value"].astype(float)
    ax.bar(blocks, values, **{"color": look.training_colour("bridge"), **style})
    for block in blocks[values == 0]:
        ax.text(block, 0, "frozen", rotation=90, ha="center", va="bottom", color=look.LINE_GREY)
    look.block_axis(ax, int(blocks.max()) + 1)
    ax.set_ylabel("relative weight change, ‖W₁ − W₀‖ / ‖W₀‖")
    return ax


def plot_accuracy_against(
    frame: pd.DataFrame, x: str = "train_flops", *, ax: Axes | None = None, **style: Any
) -> Axes:
    """Test accuracy of each arm against what it cost, with its interval; seeds as small dots.

    An interval that leaves the scale of accuracies, as few seeds give it, is not drawn.

    Parameters
    ----------
    frame : pd.DataFrame
        `Evaluation.to_frame()`.
    x : str
        "train_flops", "train_seconds" or "trainable_parameters".
    """
    ax = ax if ax is not None else look.new_axes(6, 4)
    means = frame[(frame["metric"] == "test_accuracy_mean") & frame["value"].notna()]
    seeds = frame[(frame["metric"] == "test_accuracy") & frame["arm"].isin(means["arm"])]
    words, unit = COSTS[x]
    cost = seeds[x].astype(float).groupby(seeds["arm"]).transform("mean") / unit
    seeds = seeds.assign(cost=cost, percent=100 * seeds["value"].astype(float))
    dots = {"size": 3.2, "alpha": 0.5, "jitter": False, "native_scale": True, "legend": False}
    colours = {arm: look.training_colour(arm) for arm in means["arm"]}
    seaborn.stripplot(seeds, x="cost", y="percent", hue="arm", palette=colours, ax=ax, **dots)
    for arm, own in seeds.groupby("arm", sort=False):
        known = 100 * means.loc[means["arm"] == arm, ["value", "low", "high"]].astype(float)
        known.loc[(known["low"] < 0) | (known["high"] > 100), ["low", "high"]] = np.nan
        line = {"color": colours[arm], "linestyle": "", "markersize": 6, "label": str(arm), **style}
        look.draw_line(ax, own["cost"].iloc[:1], *known.T.to_numpy(), bars=True, **line)
    ax.set_xlabel(words)
    kinds = sorted({str(kind) for kind in means["interval"].dropna()})
    ax.set_ylabel("test accuracy (%)" + (f"\nbars: {'; '.join(kinds)}" if kinds else ""))
    look.name_lines(ax)
    return ax
