"""Figures of outlier parameters, from the tables of `OutlierReport` and `OutlierComparison`."""

from __future__ import annotations

from math import erfc, sqrt
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from layerprobe.errors import UsageError
from layerprobe.plotting import style as look

_KIND_COLOURS = {
    "q": look.BLUE, "k": look.SKY, "v": look.GREEN, "kv": look.SKY, "qkv": look.BLUE, "o": look.BLACK,
    "gate": look.PINK, "up": look.ORANGE, "gate_up": look.ORANGE, "fc": look.ORANGE, "down": look.YELLOW,
    "router": look.GREY, "mixer": look.PINK, "other": look.GREY,
}  # fmt: skip
_GROUP_COLOURS = {
    "blocks": look.BLUE,
    "norms_biases": look.YELLOW,
    "embeddings": look.GREEN,
    "head": look.PINK,
}
_COMPARED = (
    "all",
    "attention in",
    "attention out",
    "mlp in",
    "mlp out",
    "mixer",
    "norm",
    "bias",
    "embedding",
)
WIDEST = 24.0
"""Inches; beyond fifty blocks the cells become narrower instead."""

_DEPTHS = ("all", "early", "middle", "late")


def plot_outlier_depth(
    frame: pd.DataFrame, *, n_sigma: float = 3.0, ax: Axes | None = None, **style: Any
) -> Axes:
    """Outlier ratio of each module kind against the block, input to output, with the Gaussian's share dashed."""
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 3.9)
    table = _percent_by_kind(frame, n_sigma)
    for kind in table.columns:
        line = {"color": _KIND_COLOURS[kind], "markersize": 3.5, "label": kind, **style}
        look.draw_line(ax, table.index, table[kind], **line)
    look.reference_line(ax, 100 * erfc(n_sigma / sqrt(2)), label="Gaussian")
    if _spans_orders(table):
        look.log_axis(ax, "y")
    else:
        ax.set_ylim(bottom=0)
    look.whole_numbers(ax)
    beyond = f"entries beyond {n_sigma:g}σ of their tensor (%)"
    ax.set(xlabel=look.BLOCKS, ylabel=beyond)
    ax.set_title(_title(frame), loc="left", fontsize=10)
    look.name_lines(ax)
    return ax


def plot_outlier_heatmap(
    frame: pd.DataFrame, *, n_sigma: float = 3.0, ax: Axes | None = None, **style: Any
) -> Axes:
    """Outlier ratio, module kind × block; `style` is passed on to `seaborn.heatmap`."""
    table = _percent_by_kind(frame, n_sigma).T
    n_kinds, n_blocks = table.shape
    ax = (
        ax
        if ax is not None
        else look.new_axes(min(max(5.0, 2.5 + 0.45 * n_blocks), WIDEST), 1.6 + 0.42 * n_kinds)
    )
    largest = table.max(axis=None)
    spans = _spans_orders(table)
    options = {
        "norm": LogNorm(table[table > 0].min(axis=None), largest) if spans else Normalize(0, largest or 1),
        "cmap": mpl.colormaps["viridis"].with_extremes(bad=look.CELL_GREY),
        "annot": n_blocks <= 12,
        "fmt": ".2g",
        "annot_kws": {"fontsize": 8},
        "cbar_kws": {"label": f"beyond {n_sigma:g}σ (%)"},
        **style,
    }
    seaborn.heatmap(table, ax=ax, **options)
    ax.set_facecolor(look.CELL_GREY)
    ax.tick_params(axis="both", rotation=0)
    ax.set(xlabel=look.BLOCKS, ylabel="")
    ax.set_title(_title(frame), loc="left", fontsize=10)
    return ax


def plot_outlier_tails(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Share of entries beyond kσ against k, on a log axis, per group of weights, beside the Gaussian's."""
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 4.2)
    rows = frame[(frame["level"] == "group") & frame["metric"].str.fullmatch(r"outlier_ratio_[\d.]+sigma")]
    rows = rows.assign(k=rows["metric"].str.extract(r"_([\d.]+)sigma", expand=False).astype(float))
    if rows.empty:
        raise UsageError("this table has no outlier ratios of groups to draw")
    shown = rows[rows["value"] > 0].sort_values("k", kind="stable")
    models = list(dict.fromkeys(rows["model"]))
    one = len(models) == 1
    for (model, group), part in shown.groupby(["model", "group"], sort=False):
        cycled = look.CYCLE[models.index(model) % len(look.CYCLE)]
        colour = _GROUP_COLOURS.get(group, look.GREY) if one else cycled
        label = group if one else f"{look.short_name(model)}: {group}"
        line = {"color": colour, "label": label, "markersize": 4, **style}
        look.draw_line(ax, part["k"], part["value"], **line)
    k = np.linspace(rows["k"].min(), rows["k"].max(), 200)
    ax.plot(k, [erfc(x / sqrt(2)) for x in k], "--", color=look.LINE_GREY, linewidth=1, label="Gaussian")
    look.log_axis(ax, "y")
    ax.set_ylim(min([1.0, *shown["value"]]) / 3, 1)
    ax.set_title(_title(frame) if one else "", loc="left", fontsize=10)
    look.whole_numbers(ax)
    ax.set(xlabel="k (deviations of the tensor)", ylabel="share of entries beyond kσ")
    look.name_lines(ax)
    return ax


def plot_outlier_comparison(
    frame: pd.DataFrame, *, n_sigma: float = 3.0, ax: Axes | None = None, **style: Any
) -> Axes:
    """Ratio of outlier ratios with intervals, by part and depth, one colour per pair (or per pair of groups)."""
    rows = frame[(frame["metric"] == f"ratio_of_ratios_{n_sigma:g}sigma") & frame["value"].notna()]
    if (rows["level"] == "group").any():
        rows = rows[rows["level"] == "group"]
    chosen = rows["part"].isin(_COMPARED) & ((rows["depth"] == "all") | (rows["part"] == "all"))
    rows = rows[chosen & (rows["value"] > 0)]
    if rows.empty:
        raise UsageError("this table has no ratio of outlier ratios to draw")
    labels = list(dict.fromkeys(zip(rows["part"], rows["depth"], strict=True)))
    labels.sort(key=lambda label: (_COMPARED.index(label[0]), _DEPTHS.index(label[1])))
    pairs = list(dict.fromkeys(zip(rows["model"], rows["model_y"], strict=True)))
    ax = (
        ax
        if ax is not None
        else look.new_axes(look.PRINT_WIDTH, 1.5 + len(labels) * max(0.32, 0.13 * len(pairs)))
    )
    for index, (x, y) in enumerate(pairs):
        part = rows[(rows["model"] == x) & (rows["model_y"] == y)]
        offset = (index - (len(pairs) - 1) / 2) * 0.8 / len(pairs)
        height = [labels.index(label) + offset for label in zip(part["part"], part["depth"], strict=True)]
        line = {"color": look.CYCLE[index % len(look.CYCLE)], "linestyle": "", "markersize": 4.5, **style}
        name = f"{look.short_name(x)} : {look.short_name(y)}"
        known = part["value"], height, part["low"], part["high"]
        look.draw_line(ax, *known, bars=True, orient="y", label=name, **line)
    look.reference_line(ax, 1, vertical=True)
    look.ratio_axis(ax, (1, 2, 5))
    names = [part if depth == "all" else f"{depth} third" for part, depth in labels]
    ax.set(yticks=range(len(labels)), yticklabels=names, ylim=(len(labels) - 0.4, -0.6), ylabel="")
    ax.set_xlabel(f"outlier ratio beyond {n_sigma:g}σ, first : second\n(bars: 95 % bootstrap interval)")
    _name_pairs(ax, len(pairs))
    return ax


def _name_pairs(ax: Axes, n_pairs: int) -> None:
    """One pair is the title; several are a legend below, where long names have room."""
    if n_pairs == 1:
        ax.set_title(str(ax.get_legend_handles_labels()[1][0]), loc="left", fontsize=10)
    else:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, ncols=2)


def _percent_by_kind(frame: pd.DataFrame, n_sigma: float) -> pd.DataFrame:
    metric = f"outlier_ratio_{n_sigma:g}sigma"
    rows = frame[(frame["level"] == "kind") & (frame["metric"] == metric)]
    rows = rows[rows["block"].notna() & rows["kind"].isin(_KIND_COLOURS)]
    if rows.empty:
        raise UsageError(f"this table has no {metric} of matrices inside blocks to draw")
    # A model with several stacks (an encoder and a decoder) is drawn one stack at a time.
    rows = rows[rows["stack"] == rows["stack"].iloc[0]].astype({"block": int})
    table = rows.pivot_table(index="block", columns="kind", values="value", aggfunc="first")
    return 100 * table[[kind for kind in _KIND_COLOURS if kind in table.columns]].astype(float)


def _spans_orders(table: pd.DataFrame) -> bool:
    """Whether the positive values differ so much that only a log scale shows them."""
    positive = table[table > 0]
    return bool(positive.max(axis=None) > 20 * positive.min(axis=None))


def _title(frame: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(look.short_name(model) for model in frame["model"]))
