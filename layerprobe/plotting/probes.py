"""Figures of linear probes, from the table of `LinearProbes`."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from layerprobe.errors import UsageError
from layerprobe.plotting import style as look
from layerprobe.plotting.studies import plot_lines


def plot_probe_accuracy(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Test accuracy by depth, with 95 % Wilson bands, and the controls as lines.

    Parameters
    ----------
    frame : pd.DataFrame
        As `LinearProbes.to_frame()` gives it. Layers without a value leave a gap.
    ax : Axes | None
        Where to draw; a new figure otherwise.
    style
        Passed on to the line of the layers probed.
    """
    tested = _with_layers(frame[(frame["metric"] == "probe_accuracy") & (frame["split"] == "test")])
    main = tested[tested["control"].isna()]
    if main.empty:
        raise UsageError("there is nothing to draw: the table holds no test accuracy of a layer")
    ax = ax if ax is not None else look.new_axes(look.PRINT_WIDTH, 3.6)
    layers = list(dict.fromkeys(main["layer"]))
    name = look.only_name(main, "model", "layers probed")
    _curve(ax, layers, main, {"color": look.BLUE, "label": name, **style})
    random = tested[tested["control"] == "random"]
    if len(random):
        dashed = {
            "color": look.training_colour("random"),
            "label": "random init",
            "linestyle": "--",
            "marker": "s",
        }
        _curve(ax, layers, random, dashed)
    for control, name in (("pixels", "raw pixels"), ("chance", "chance")):
        colour = look.training_colour("pixels") if control == "pixels" else look.LINE_GREY
        dashes = "-." if control == "pixels" else ":"
        rows = tested[tested["control"] == control]
        for value, low, high in 100 * rows[["value", "low", "high"]].to_numpy(float):
            label = f"{name}, {value:.1f} %"
            look.reference_line(ax, value, color=colour, linestyle=dashes, linewidth=1.5, label=label)
            if control == "pixels":
                ax.axhspan(low, high, color=colour, alpha=0.12, lw=0)
    look.layer_axis(ax, layers)
    task, n = look.only_name(frame, "task"), main["n"].dropna()
    counted = f"{int(n.iloc[0]):,} test images" if len(n) else "no test images"
    ax.set_title(f"{task}, {counted}" if task else counted, loc="left", fontsize=10)
    ax.set(xlabel="layer (input → output)", ylim=(0, None))
    ax.set_ylabel("test accuracy (%)\nband: 95 % Wilson interval")
    look.name_lines(ax)
    return ax


def plot_probe_strength(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Validation accuracy against C, one line a layer from light (input) to dark (output); rings mark the C taken."""
    own = _with_layers(frame[(frame["metric"] == "probe_accuracy") & frame["control"].isna()])
    validated, tested = own[own["split"] == "validation"], own[own["split"] == "test"]
    if validated.empty:
        raise UsageError("there is nothing to draw: the table holds no validation accuracy")
    ax = ax if ax is not None else look.new_axes(5.2, 3.9)
    plain = validated.assign(low=np.nan, high=np.nan)
    colours = _one_line_a_layer(plain, "C", ax, {"linewidth": 1.4, **style})
    taken = validated.merge(tested[["layer", "C"]])
    for layer, C, value in zip(taken["layer"], taken["C"], taken["value"], strict=True):
        ax.plot([C], [100 * float(value)], "o", color=colours[layer], markersize=8, fillstyle="none")
    ax.set_xlabel("C, inverse regularisation strength (ring: chosen)")
    ax.set_ylabel("validation accuracy (%)")
    return ax


def plot_few_shot(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Test accuracy against training images per class, one line a layer; bars: 95 % t interval over draws."""
    rows = _with_layers(frame[(frame["metric"] == "few_shot_accuracy") & frame["control"].isna()])
    if rows.empty:
        raise UsageError("there is nothing to draw: the table holds no few-shot accuracy")
    ax = ax if ax is not None else look.new_axes(5.2, 3.9)
    # A small shift keeps the bars of neighbouring layers apart.
    layers = list(dict.fromkeys(rows["layer"]))
    shift = [1.03 ** (layers.index(layer) - len(layers) / 2) for layer in rows["layer"]]
    shifted = rows.assign(place=rows["shots"].astype(float) * shift)
    _one_line_a_layer(shifted, "place", ax, {"bars": True, "linewidth": 1.2, **style})
    shots = sorted(int(value) for value in rows["shots"].unique())
    ax.set(xticks=shots, xticklabels=shots, ylim=(0, None))
    ax.minorticks_off()
    ax.set(xlabel="training images per class", ylabel="test accuracy (%)\nbar: 95 % t interval")
    return ax


def _with_layers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(layer=look.layer_names(frame))


def _curve(ax: Axes, layers: list[str], rows: pd.DataFrame, style: dict[str, Any]) -> None:
    """A line with its band in per cent, of the rows whose layer is on the axis."""
    rows = rows[rows["layer"].isin(layers)]
    known = (100 * rows[column].to_numpy(float) for column in ("value", "low", "high"))
    look.draw_line(ax, [layers.index(layer) for layer in rows["layer"]], *known, **{"markersize": 4, **style})


def _one_line_a_layer(rows: pd.DataFrame, x: str, ax: Axes, style: dict[str, Any]) -> dict[str, Any]:
    """Lines from light (input) to dark (output) over a logarithmic axis; their colours by layer."""
    layers = list(dict.fromkeys(rows["layer"]))
    shades = map(tuple, mpl.colormaps["viridis_r"](np.linspace(0.08, 1, len(layers))))
    colours = dict(zip(layers, shades, strict=True))
    plot_lines(rows, x, "layer", ax=ax, colours=colours, **{"marker": ".", **style})
    look.log_axis(ax, "x")
    look.name_lines(ax, "layer", ncols=1 + len(layers) // 14)
    return colours
