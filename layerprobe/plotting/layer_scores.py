"""Figures of scores by layer, one scale a score: transfer scores, attributions, and patch maps of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from layerprobe.errors import UnknownNameError
from layerprobe.plotting import style as look

FAMILY_COLOURS = {"readable": look.BLUE, "trainable": look.ORANGE}
FAMILY_TITLES = {
    "readable": "Readable: what the layer's output says about the task",
    "trainable": "Trainable: gradients of a probe in the block's parameters",
}
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
    "attribution_skip": "skip the block: logits lost",
    "attribution_mean_ablation": "mean update instead: logits lost",
    "attribution_skip_accuracy_lost": "skip the block: accuracy lost",
    "attribution_mean_ablation_accuracy_lost": "mean update instead: accuracy lost",
    "attribution_conductance": "mean |conductance| per unit",
    "attribution_update": "through the block's update, logits",
    "attribution_gradient_x_activation": "mean |gradient × activation| per unit",
    "attribution_integrated_gradients": "mean |integrated gradients| per unit",
}


FEATURE_TITLES = {
    "max_offset_sigma": "largest |mean| of a column,\nin standard deviations",
    "mean_norm": "mean norm of an image's features",
    "mean_column_std": "mean standard deviation of a column",
}


def plot_transfer(
    frame: pd.DataFrame, metric: str | None = None, *, ax: Axes | None = None, **style: Any
) -> Axes:
    """One transfer score from input to output, with its 95 % interval.

    Parameters
    ----------
    frame : pd.DataFrame
        `TransferScores.to_frame()`.
    metric : str | None
        Which score; default the first one that is defined. Where lower is better, the title says so.
    """
    rows = _of_metric(frame, metric, "score")
    metric = str(rows["metric"].iloc[0])
    ax = ax if ax is not None else look.new_axes(5, 3.5)
    # The embedding output stands one place before block 0.
    places = rows["block"].astype("float64").fillna(-1.0)
    known = [rows[name].astype("float64") for name in ("value", "low", "high")]
    line = {"color": FAMILY_COLOURS[str(rows["family"].iloc[0])], "markersize": 3.5, **style}
    look.draw_line(ax, places, *known, **line)
    lower = str(rows["higher_is_better"].iloc[0]) == "False"
    title = TITLES.get(metric, metric) + (" (lower is better)" if lower else "")
    if metric == "transfer_gradient_snr":
        look.reference_line(ax, 0.0, linewidth=0.8)
    _small_panel(ax, list(places), title, "undefined here" if known[0].isna().all() else "")
    return ax


def transfer_figure(frame: pd.DataFrame) -> Figure:
    """All scores of a table as small panels, a band of rows per family; bands are 95 % intervals."""
    columns = 4
    groups = [(name, rows["metric"].unique()) for name, rows in frame.groupby("family", sort=False)]
    heights = [-(-len(metrics) // columns) for _, metrics in groups]
    figure = Figure(figsize=(3.1 * columns, 2.5 * sum(heights) + 0.5 * len(groups)), layout="constrained")
    bands = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for band, (family, metrics) in zip(bands, groups, strict=True):
        band.suptitle(f"{FAMILY_TITLES[str(family)]} (band: 95 %)", fontsize=11, x=0.01, ha="left")
        for panel, metric in zip(_panels(band, len(metrics), columns), metrics, strict=True):
            plot_transfer(frame, metric, ax=panel)
    return figure


def plot_features(
    frame: pd.DataFrame, metric: str = "max_offset_sigma", *, ax: Axes | None = None, **style: Any
) -> Axes:
    """How features look from input to output: by default the largest offset of a column, in its deviations.

    `frame` is `Features.to_frame()`; `metric` may also be "mean_norm" or "mean_column_std".
    """
    rows = _of_metric(frame, metric, "statistic")
    rows = rows[rows["split"] == rows["split"].iloc[0]]
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 3.4)
    names = look.layer_names(rows)
    look.draw_line(ax, range(len(names)), rows["value"].astype(float), **{"color": look.BLUE, **style})
    look.layer_axis(ax, names)
    ax.set(xlabel="layer (input → output)", ylim=(0, None), ylabel=FEATURE_TITLES.get(metric, metric))
    ax.set_title(
        f"{look.only_name(rows, 'model')} on {look.only_name(rows, 'task')}", loc="left", fontsize=10
    )
    return ax


def plot_attribution(
    frame: pd.DataFrame, metric: str | None = None, *, ax: Axes | None = None, **style: Any
) -> Axes:
    """One importance by block, from input to output; bars are ± one standard error over images.

    `frame` is `LayerAttribution.to_frame()`, `metric` by default the first one that is defined.
    """
    rows = _of_metric(frame, metric, "attribution")
    metric = str(rows["metric"].iloc[0])
    ax = ax if ax is not None else look.new_axes(5, 3.5)
    blocks = rows["block"].astype(int)
    values, errors = (rows[name].astype("float64") for name in ("value", "stderr"))
    ax.bar(blocks, values, yerr=errors, capsize=2.5, **{"color": look.BLUE, **style})
    look.reference_line(ax, 0.0, color="#333333", linestyle="-", linewidth=0.8)
    title = TITLES.get(metric, metric)
    _small_panel(ax, list(blocks), title, "completeness not reached" if values.isna().all() else "")
    return ax


def attribution_figure(frame: pd.DataFrame) -> Figure:
    """All importances of a table as small panels, ± one standard error over images."""
    metrics = [name for name in TITLES if name in set(frame["metric"])]
    columns = min(3, max(1, len(metrics)))
    figure = Figure(figsize=(3.9 * columns, 2.7 * -(-len(metrics) // columns)), layout="constrained")
    for panel, metric in zip(_panels(figure, len(metrics), columns), metrics, strict=True):
        plot_attribution(frame, metric, ax=panel)
    figure.supxlabel("bars: ± one standard error over images", fontsize=8, x=0.99, ha="right")
    return figure


def plot_patch_map(
    frame: pd.DataFrame, *, picture: np.ndarray | None = None, ax: Axes | None = None, **style: Any
) -> Axes:
    """One patch-level map: red speaks for the predicted class, blue against it, over the picture in grey.

    `frame` holds the rows of one image and one block of `LayerAttribution.maps`.
    """
    ax = ax if ax is not None else look.new_axes(3, 3)
    grid = frame.pivot(index="row", columns="column", values="value").to_numpy()
    reach = float(np.abs(grid).max()) or 1.0
    extent = (0, grid.shape[1], grid.shape[0], 0)
    if picture is not None:
        grey = picture if picture.ndim == 2 else picture.mean(axis=2)
        ax.imshow(grey, cmap="gray", extent=extent, interpolation="nearest", vmin=0, vmax=255)
    options = {"cmap": "RdBu_r", "alpha": 1.0 if picture is None else 0.65, **style}
    ax.imshow(grid, vmin=-reach, vmax=reach, extent=extent, **{"interpolation": "nearest", **options})
    ax.set(xticks=[], yticks=[])
    return ax


def patch_maps_figure(
    maps: pd.DataFrame, pictures: Mapping[str, np.ndarray], *, classes: list[str] | None = None
) -> Figure:
    """One row an image: the picture, then the map of the embedding and of every block, each on its own scale.

    One colour key says what the two ends mean.
    """
    blocks = [None, *sorted(maps["block"].dropna().unique())]
    images = list(dict.fromkeys(maps["image"]))
    figure = Figure(figsize=(1.25 * (len(blocks) + 1) + 0.6, 1.45 * len(images) + 0.5), layout="constrained")
    panels = figure.subplots(len(images), len(blocks) + 1, squeeze=False)
    for line, image in zip(panels, images, strict=True):
        of_image = maps[maps["image"] == image]
        picture = pictures.get(str(image))
        label, guess = (int(of_image[name].iloc[0]) for name in ("label", "prediction"))
        words = [classes[index] if classes else str(index) for index in (label, guess)]
        if picture is not None:
            line[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
        line[0].set(xticks=[], yticks=[])
        line[0].set_title(f"{words[0]}\npredicted: {words[1]}", fontsize=7)
        for panel, block in zip(line[1:], blocks, strict=True):
            rows = of_image[of_image["block"].isna() if block is None else of_image["block"] == block]
            plot_patch_map(rows, picture=picture, ax=panel)
    for panel, block in zip(panels[0][1:], blocks, strict=True):
        panel.set_title("embed" if block is None else f"block {block:.0f}", fontsize=8)
    key = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    bar = figure.colorbar(key, ax=panels, orientation="horizontal", shrink=0.5, aspect=40, pad=0.02)
    bar.set_ticks([-1, 0, 1], labels=["against the prediction", "0", "for the prediction"])
    bar.set_label("each map on its own scale, from its largest value down to minus that", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _of_metric(frame: pd.DataFrame, metric: str | None, what: str) -> pd.DataFrame:
    if metric is None:
        defined = frame.loc[frame["value"].notna() & frame["block"].notna(), "metric"]
        metric = str((defined if len(defined) else frame["metric"]).iloc[0])
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        known = ", ".join(str(name) for name in frame["metric"].unique())
        raise UnknownNameError(f"no {what} '{metric}' in this table; it has {known}")
    return rows


def _small_panel(ax: Axes, places: Sequence[float], title: str, remark: str) -> None:
    """Small labels, blocks on the x axis, and a remark in the middle where there is nothing to see."""
    shown = places[:: -(-len(places) // 12)]
    ax.set(xticks=shown, xticklabels=["emb" if place < 0 else f"{place:.0f}" for place in shown], ylabel="")
    ax.set_xlabel(look.BLOCKS)
    ax.set_title(title, fontsize=10)
    ax.tick_params(labelsize=9)
    seaborn.despine(ax=ax)
    ax.text(0.5, 0.5, remark, transform=ax.transAxes, ha="center", color=look.LINE_GREY)


def _panels(figure: Figure | SubFigure, n: int, columns: int) -> list[Axes]:
    """`n` axes in rows of `columns`; what is left of the last row stays empty."""
    panels = figure.subplots(-(-n // columns), columns, squeeze=False).ravel()
    for panel in panels[n:]:
        panel.set_axis_off()
    return list(panels[:n])
