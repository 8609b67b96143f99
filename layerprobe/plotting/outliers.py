"""Figures of outlier parameters: by depth and kind, block × kind, the fall of the tail, two models side by side.

Frames come from `OutlierReport.to_frame` and `OutlierComparison.to_frame`.
"""

from __future__ import annotations

from math import erfc, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_COLOURS = {
    "q": "#0072B2", "k": "#56B4E9", "v": "#009E73", "qkv": "#0072B2", "o": "#000000", "gate": "#CC79A7",
    "up": "#D55E00", "gate_up": "#D55E00", "fc": "#D55E00", "down": "#E69F00", "router": "#999999", "other": "#999999",
}  # fmt: skip
_MATRIX_KINDS = tuple(_COLOURS)


def plot_outlier_depth(
    frame: pd.DataFrame, *, n_sigma: float = 3.0, ax: Axes | None = None, **style: Any
) -> Axes:
    """Outlier ratio of each module kind against the block, input to output, with the Gaussian's share dashed."""
    ax = ax if ax is not None else _axes(figsize=(8, 4.5))
    table = _block_by_kind(frame, n_sigma)
    for kind in table.columns:
        style_of = {"color": _COLOURS.get(kind), "marker": "o", "markersize": 3.5, "linewidth": 1.4, **style}
        ax.plot(table.index, 100 * table[kind], label=kind, **style_of)
    gauss = 100 * _gaussian(n_sigma)
    ax.axhline(gauss, color="#666666", linestyle="--", linewidth=1, label="Gaussian")
    values = table.to_numpy(dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 20 * positive.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    _block_axis(ax, table.index)
    ax.set_ylabel(f"entries beyond {n_sigma:g}σ of their tensor (%)")
    ax.set_title(_title(frame))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return ax


def plot_outlier_heatmap(
    frame: pd.DataFrame, *, n_sigma: float = 3.0, ax: Axes | None = None, **style: Any
) -> Axes:
    """Outlier ratio, module kind × block."""
    from matplotlib.colors import LogNorm, Normalize

    table = _block_by_kind(frame, n_sigma)
    n_kinds, n_blocks = len(table.columns), len(table.index)
    ax = ax if ax is not None else _axes(figsize=(max(5.0, 2.5 + 0.45 * n_blocks), 1.6 + 0.42 * n_kinds))
    values = 100 * table.to_numpy(dtype=float).T
    positive = values[np.isfinite(values) & (values > 0)]
    wide = positive.size and positive.max() > 20 * positive.min()
    norm = (
        LogNorm(positive.min(), positive.max())
        if wide
        else Normalize(0, positive.max() if positive.size else 1)
    )
    image = ax.imshow(
        np.where(values > 0, values, np.nan), aspect="auto", norm=norm, **{"cmap": "viridis", **style}
    )
    ax.set_facecolor("#dddddd")
    ax.set_yticks(range(n_kinds), list(table.columns))
    step = max(1, n_blocks // 16)
    ax.set_xticks(range(0, n_blocks, step), [str(block) for block in table.index[::step]])
    ax.set_xlabel("block (input → output)")
    ax.set_title(_title(frame))
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(f"beyond {n_sigma:g}σ (%)")
    if n_blocks <= 12:
        for y, x in np.ndindex(values.shape):
            if np.isfinite(values[y, x]):
                dark = norm(values[y, x]) < 0.6 if values[y, x] > 0 else False
                ax.text(
                    x,
                    y,
                    f"{values[y, x]:.2g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="w" if dark else "k",
                )
    return ax


def plot_outlier_tails(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Share of entries beyond kσ against k, on a log axis, per group of weights, beside the Gaussian's."""
    ax = ax if ax is not None else _axes(figsize=(6.5, 4.5))
    rows = frame[(frame["level"] == "group") & frame["metric"].str.fullmatch(r"outlier_ratio_[\d.]+sigma")]
    rows = rows.assign(k=rows["metric"].str.extract(r"_([\d.]+)sigma", expand=False).astype(float))
    if rows.empty:
        raise UsageError("this table has no outlier ratios of groups to draw")
    colours = {"blocks": "#0072B2", "norms_biases": "#E69F00", "embeddings": "#009E73", "head": "#CC79A7"}
    floor = 1.0
    models = list(dict.fromkeys(rows["model"]))
    for (model, group), part in rows.groupby(["model", "group"], sort=False):
        part = part.sort_values("k")
        shown = part[part["value"] > 0]
        if shown.empty:
            continue
        floor = min(floor, float(shown["value"].min()))
        colour = (
            colours.get(group, "#999999") if len(models) == 1 else _CYCLE[models.index(model) % len(_CYCLE)]
        )
        label = group if len(models) == 1 else f"{_short(model)}: {group}"
        drawn = {"color": colour, "marker": "o", "markersize": 4, **style}
        ax.plot(shown["k"], shown["value"], label=label, **drawn)
    k = np.linspace(rows["k"].min(), rows["k"].max(), 200)
    ax.plot(k, [_gaussian(x) for x in k], "--", color="#666666", linewidth=1, label="Gaussian")
    ax.set_yscale("log")
    ax.set_ylim(floor / 3, 1)
    ax.set_xlabel("k (deviations of the tensor)")
    ax.set_ylabel("share of entries beyond kσ")
    if len(models) == 1:
        ax.set_title(_title(frame))
    ax.legend(frameon=False)
    return ax


def _block_by_kind(frame: pd.DataFrame, n_sigma: float) -> pd.DataFrame:
    metric = f"outlier_ratio_{n_sigma:g}sigma"
    rows = frame[
        (frame["level"] == "kind")
        & (frame["metric"] == metric)
        & frame["block"].notna()
        & frame["kind"].isin(_MATRIX_KINDS)
    ]
    if rows.empty:
        raise UsageError(f"this table has no {metric} of matrices inside blocks to draw")
    stack = rows["stack"].iloc[0]
    # A model with several stacks (an encoder and a decoder) is drawn one stack at a time.
    rows = rows[rows["stack"] == stack]
    table = rows.pivot_table(index="block", columns="kind", values="value", aggfunc="first")
    return table[[kind for kind in _MATRIX_KINDS if kind in table.columns]]


def _block_axis(ax: Axes, blocks: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("block (input → output)")


def _title(frame: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(str(model).rstrip("/").rsplit("/", 1)[-1] for model in frame["model"]))


def _gaussian(k: float) -> float:
    return erfc(k / sqrt(2))


def _axes(figsize: tuple[float, float]) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def plot_outlier_comparison(
    frame: pd.DataFrame, *, n_sigma: float = 3.0, ax: Axes | None = None, **style: Any
) -> Axes:
    """Ratio of outlier ratios with intervals, by part and depth, one colour per pair (or per pair of groups)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
    ax = ax if ax is not None else _axes(figsize=(8, 1.5 + len(labels) * max(0.32, 0.13 * len(pairs))))
    for index, (x, y) in enumerate(pairs):
        part = rows[(rows["model"] == x) & (rows["model_y"] == y)]
        offset = (index - (len(pairs) - 1) / 2) * 0.8 / max(len(pairs), 1)
        height = [labels.index(label) + offset for label in zip(part["part"], part["depth"], strict=True)]
        value = part["value"].to_numpy(float)
        low = part["low"].fillna(part["value"]).to_numpy(float)
        high = part["high"].fillna(part["value"]).to_numpy(float)
        colour = _CYCLE[index % len(_CYCLE)]
        ax.hlines(height, low, high, color=colour, linewidth=1.3)
        drawn = {"color": colour, "marker": "o", "linestyle": "none", "markersize": 4.5, **style}
        ax.plot(value, height, label=f"{_short(x)} : {_short(y)}", **drawn)
    ax.axvline(1, color="#666666", linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(
        range(len(labels)), [part if depth == "all" else f"{depth} third" for part, depth in labels]
    )
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel(f"outlier ratio beyond {n_sigma:g}σ, first : second (bars: 95 % bootstrap interval)")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    return ax


_COMPARED = ("all", "attention in", "attention out", "mlp in", "mlp out", "norm", "bias", "embedding")
_DEPTHS = ("all", "early", "middle", "late")
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def _short(model: str) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]
