"""Figures of transfer scores by depth, one scale a score, the two families apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from layerprobe.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILY_COLOURS = {"readable": "#0072B2", "trainable": "#D55E00"}
TITLES = {
    "transfer_logme": "LogME",
    "transfer_h_score": "H-score, shrunk",
    "transfer_transrate": "TransRate",
    "transfer_gbc": "GBC",
    "transfer_neural_collapse": "neural collapse, NC1",
    "transfer_loo_ridge": "leave-one-out ridge, accuracy",
    "transfer_knn": "leave-one-out kNN, accuracy",
    "transfer_rgn": "RGN, ‖g‖/‖θ‖",
    "transfer_gradient_snr": "gradient signal-to-noise",
    "transfer_taylor": "Taylor, mean |θ·g|",
    "transfer_fisher": "Fisher, mean",
}
_COLUMNS = 4


def plot_transfer(
    frame: pd.DataFrame, metric: str = "transfer_logme", *, ax: Axes | None = None, **style: Any
) -> Axes:
    """One transfer score from input to output, with its 95 % interval.

    Parameters
    ----------
    frame : `TransferScores.to_frame()`.
    metric : which score. Where lower is better, the title says so.
    """
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        known = ", ".join(str(name) for name in frame["metric"].unique())
        raise UnknownNameError(f"no score '{metric}' in this table; it has {known}")
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(5, 3.5)).subplots()
    family = str(rows["family"].iloc[0])
    # The embedding output stands one place before block 0.
    places = rows["block"].astype("float64").fillna(-1.0)
    values, low, high = (rows[name].astype("float64") for name in ("value", "low", "high"))
    look = {"color": FAMILY_COLOURS[family], "marker": "o", "markersize": 3.5, "linewidth": 1.4, **style}
    ax.plot(places, values, **look)
    if low.notna().any():
        ax.fill_between(places, low, high, color=look["color"], alpha=0.18, linewidth=0)
    step = max(1, math.ceil(len(rows) / 12))
    shown = list(places)[::step]
    ax.set_xticks(shown, ["emb" if place < 0 else f"{place:.0f}" for place in shown])
    lower = rows["higher_is_better"].iloc[0] is False or str(rows["higher_is_better"].iloc[0]) == "False"
    ax.set_title(TITLES.get(metric, metric) + (" (lower is better)" if lower else ""), fontsize=10)
    ax.set_xlabel("block (input → output)", fontsize=9)
    ax.tick_params(labelsize=8)
    if metric == "transfer_gradient_snr":
        ax.axhline(0.0, color="#666666", linestyle="--", linewidth=0.8)
    if values.isna().all():
        ax.text(0.5, 0.5, "undefined here", transform=ax.transAxes, ha="center", color="#666666")
    return ax


def transfer_figure(frame: pd.DataFrame) -> Figure:
    """All scores of a table as small panels, a band of rows per family; bands are 95 % intervals."""
    from matplotlib.figure import Figure

    groups = [(family, list(rows["metric"].unique())) for family, rows in frame.groupby("family", sort=False)]
    heights = [math.ceil(len(metrics) / _COLUMNS) for _, metrics in groups]
    figure = Figure(figsize=(3.1 * _COLUMNS, 2.5 * sum(heights) + 0.5 * len(groups)), layout="constrained")
    bands = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    meaning = {
        "readable": "Readable: what the layer's output says about the task",
        "trainable": "Trainable: gradients of a probe in the block's parameters",
    }
    for band, (family, metrics), rows in zip(bands, groups, heights, strict=True):
        band.suptitle(f"{meaning[str(family)]} (band: 95 %)", fontsize=11, x=0.01, ha="left")
        panels = band.subplots(rows, _COLUMNS, squeeze=False).ravel()
        for panel, metric in zip(panels, metrics, strict=False):
            plot_transfer(frame, metric, ax=panel)
        for panel in panels[len(metrics) :]:
            panel.set_axis_off()
    return figure
