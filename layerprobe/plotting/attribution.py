"""Figures of attribution: importance by depth, and patch-level maps over the pictures they explain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "attribution_skip": "skip the block: logits lost",
    "attribution_mean_ablation": "mean update instead: logits lost",
    "attribution_skip_accuracy": "skip the block: accuracy lost",
    "attribution_mean_ablation_accuracy": "mean update instead: accuracy lost",
    "attribution_conductance": "mean |conductance| per unit",
    "attribution_update": "through the block's update, logits",
    "attribution_gradient_x_activation": "mean |gradient × activation| per unit",
    "attribution_integrated_gradients": "mean |integrated gradients| per unit",
}
COLOUR = "#0072B2"


def plot_attribution(
    frame: pd.DataFrame, metric: str = "attribution_skip", *, ax: Axes | None = None, **style: Any
) -> Axes:
    """One importance by block, from input to output; bars are ± one standard error over images.

    `frame` is `LayerAttribution.to_frame()`.
    """
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        known = ", ".join(str(name) for name in frame["metric"].unique())
        raise UnknownNameError(f"no attribution '{metric}' in this table; it has {known}")
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(5, 3.5)).subplots()
    blocks = rows["block"].astype(int)
    values, errors = (rows[name].astype("float64") for name in ("value", "stderr"))
    ax.bar(blocks, values, yerr=errors, capsize=2.5, **{"color": COLOUR, **style})
    ax.axhline(0.0, color="#333333", linewidth=0.8)
    ax.set_xticks(list(blocks)[:: max(1, len(blocks) // 12)])
    ax.set_xlabel("block (input → output)", fontsize=9)
    ax.set_title(TITLES.get(metric, metric), fontsize=10)
    ax.tick_params(labelsize=8)
    if values.isna().all():
        ax.text(0.5, 0.5, "completeness not reached", transform=ax.transAxes, ha="center", color="#666666")
    return ax


def attribution_figure(frame: pd.DataFrame) -> Figure:
    """All importances of a table as small panels, ± one standard error over images."""
    from matplotlib.figure import Figure

    metrics = [name for name in TITLES if name in set(frame["metric"])]
    columns = min(3, max(1, len(metrics)))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, metric in zip(panels, metrics, strict=False):
        plot_attribution(frame, metric, ax=panel)
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    figure.supxlabel("bars: ± one standard error over images", fontsize=8, x=0.99, ha="right")
    return figure


def plot_patch_map(
    frame: pd.DataFrame, *, picture: np.ndarray | None = None, ax: Axes | None = None, **style: Any
) -> Axes:
    """One patch-level map: red speaks for the predicted class, blue against it, over the picture in grey.

    `frame` holds the rows of one image and one block of `LayerAttribution.maps`.
    """
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(3, 3)).subplots()
    grid = frame.pivot(index="row", columns="column", values="value").to_numpy()
    reach = float(np.abs(grid).max()) or 1.0
    extent = (0, grid.shape[1], grid.shape[0], 0)
    if picture is not None:
        grey = picture if picture.ndim == 2 else picture.mean(axis=2)
        ax.imshow(grey, cmap="gray", extent=extent, interpolation="nearest", vmin=0, vmax=255)
    look = {
        "cmap": "RdBu_r",
        "alpha": 0.65 if picture is not None else 1.0,
        "interpolation": "nearest",
        **style,
    }
    ax.imshow(grid, vmin=-reach, vmax=reach, extent=extent, **look)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def patch_maps_figure(
    maps: pd.DataFrame, pictures: Mapping[str, np.ndarray], *, classes: list[str] | None = None
) -> Figure:
    """One row an image: the picture, then the map of the embedding and of every block, each on its own scale."""
    from matplotlib.figure import Figure

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
        line[0].set_xticks([])
        line[0].set_yticks([])
        line[0].set_title(f"{words[0]}\npredicted: {words[1]}", fontsize=7)
        for panel, block in zip(line[1:], blocks, strict=True):
            rows = of_image[of_image["block"].isna() if block is None else of_image["block"] == block]
            plot_patch_map(rows, picture=picture, ax=panel)
    for panel, block in zip(panels[0][1:], blocks, strict=True):
        panel.set_title("embed" if block is None else f"block {block}", fontsize=8)
    return figure
