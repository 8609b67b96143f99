"""Figures of bridge training and of the arms it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ARM_COLOURS = {
    "language": "#0072B2",
    "bridge": "#009E73",
    "full-bridge": "#56B4E9",
    "partial": "#CC79A7",
    "none": "#999999",
    "random": "#D55E00",
    "random-bridge": "#E69F00",
    "model": "#000000",
}
"""One fixed, colour-blind-safe colour per training kind (Okabe & Ito)."""


def plot_bridge_curve(
    frame: pd.DataFrame, *, guess: float | None = None, ax: Axes | None = None, **style: Any
) -> Axes:
    """Random-label accuracy against optimizer steps, smoothed by a running mean; the guess is dashed.

    `frame` is `BridgeRun.history`; `guess` is 1/K.
    """
    ax = ax if ax is not None else _axes()
    window = max(1, len(frame) // 25)
    smooth = frame["accuracy"].rolling(window, min_periods=1).mean()
    colour = style.pop("color", ARM_COLOURS["bridge"])
    ax.plot(frame["step"], frame["accuracy"], color=colour, alpha=0.25, linewidth=0.8)
    ax.plot(frame["step"], smooth, color=colour, label=f"mean of {window} steps", **style)
    if guess is not None:
        ax.axhline(guess, color="#666666", linestyle="--", linewidth=1, label=f"guess, {guess:.1%}")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("random labels recalled (share)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def plot_weight_drift(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Relative change of each block's weights, input to output; frozen blocks stand at zero.

    `frame` is `BridgeRun.to_frame()`.
    """
    ax = ax if ax is not None else _axes()
    rows = frame[(frame["metric"] == "weight_change") & frame["block"].notna()]
    blocks, values = rows["block"].astype(int), rows["value"].astype(float)
    ax.bar(blocks, values, **{"color": ARM_COLOURS["bridge"], **style})
    for block, value in zip(blocks, values, strict=True):
        if value == 0:
            ax.text(block, 0, "frozen", rotation=90, ha="center", va="bottom", color="#666666", fontsize=8)
    ax.set_xticks(list(blocks))
    ax.set_xlabel("block (input → output)")
    ax.set_ylabel("‖W₁ − W₀‖ / ‖W₀‖")
    return ax


def plot_accuracy_against(
    frame: pd.DataFrame, x: str = "train_flops", *, ax: Axes | None = None, **style: Any
) -> Axes:
    """Test accuracy of each arm against what it cost, with its interval; seeds as small dots.

    Parameters
    ----------
    frame : `Evaluation.to_frame()`.
    x : "train_flops", "train_seconds" or "trainable_parameters".
    """
    ax = ax if ax is not None else _axes()
    seeds = frame[frame["metric"] == "test_accuracy"]
    means = frame[frame["metric"] == "test_accuracy_mean"].set_index("arm")
    for arm, trials in seeds.groupby("arm", sort=False):
        row = means.loc[arm]
        if row["value"] is None or row["value"] != row["value"]:
            continue
        colour = ARM_COLOURS.get(str(arm), "#000000")
        place = float(trials[x].astype(float).mean())
        ax.scatter([place] * len(trials), 100 * trials["value"].astype(float), s=10, color=colour, alpha=0.5)
        centre = 100 * float(row["value"])
        reach = [[centre - 100 * float(row["low"])], [100 * float(row["high"]) - centre]]
        look = {"fmt": "o", "capsize": 3, "color": colour, **style}
        ax.errorbar([place], [centre], yerr=reach, label=str(arm), **look)
    names = {
        "train_flops": "training cost (FLOP in the blocks)",
        "train_seconds": "training time (s)",
        "trainable_parameters": "parameters trained in fine-tuning",
    }
    ax.set_xlabel(names[x])
    kinds = sorted({str(kind) for kind in means["interval"].dropna()})
    ax.set_ylabel("test accuracy (%)" + (f"\nbars: {'; '.join(kinds)}" if kinds else ""))
    ax.legend(frameon=False)
    return ax


def _axes() -> Axes:
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4)).subplots()
