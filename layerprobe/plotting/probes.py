"""Figures of linear probes, from the table of `LinearProbes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = {
    "probed": "#0072B2",
    "random": "#D55E00",
    "pixels": "#009E73",
    "chance": "#666666",
    "labels": "#CC79A7",
}
"""One fixed, colour-blind-safe colour per kind of features (Okabe & Ito)."""


def plot_probe_accuracy(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Test accuracy by depth, with 95 % Wilson bands, and the controls as lines.

    Parameters
    ----------
    frame : as `LinearProbes.to_frame()` gives it. Layers without a value leave a gap.
    ax : where to draw; a new figure otherwise.
    style : passed on to the line of the layers probed.
    """
    tested = frame[(frame["metric"] == "probe_accuracy") & (frame["split"] == "test")]
    main = tested[tested["control"].isna()]
    if main.empty:
        raise UsageError("there is nothing to draw: the table holds no test accuracy of a layer")
    ax = ax if ax is not None else _axes(len(main))
    places = _places(main)
    _curve(ax, places, main, COLOURS["probed"], _one(main["model"]) or "layers probed", style)
    random = tested[tested["control"] == "random"]
    if len(random):
        _curve(ax, places, random, COLOURS["random"], "random init", {"linestyle": "--", "marker": "s"})
    for control, name in (("pixels", "raw pixels"), ("chance", "chance: most frequent class")):
        rows = tested[tested["control"] == control]
        for value, low, high in zip(rows["value"], rows["low"], rows["high"], strict=True):
            share = 100 * float(value)
            dashes = ":" if control == "chance" else "-."
            ax.axhline(share, color=COLOURS[control], linestyle=dashes, label=f"{name}, {share:.1f} %")
            if control == "pixels":
                ax.axhspan(100 * float(low), 100 * float(high), color=COLOURS[control], alpha=0.12, lw=0)
    memorised = frame[(frame["metric"] == "control_accuracy") & (frame["split"] == "train")]
    memorised = memorised[memorised["control"] == "labels"]
    memorised = memorised[memorised["model"].isna() | memorised["model"].isin(main["model"])]
    if len(memorised):
        x, y, _, _ = _points(places, memorised)
        ax.plot(
            x, y, color=COLOURS["labels"], linestyle="--", marker="x", label="random labels learnt by heart"
        )
    _label_layers(ax, places)
    task, n = _one(frame["task"]), main["n"].dropna()
    counted = f"{int(n.iloc[0]):,} test images" if len(n) else "no test images"
    ax.set_title(f"{task}, {counted}" if task else counted, fontsize=9)
    ax.set_ylabel("accuracy (%), band: 95 % Wilson interval")
    ax.set_ylim(bottom=0)
    # Outside, where no curve or chance line can run through it.
    ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


def plot_probe_strength(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Validation accuracy against C, one line a layer from light (input) to dark (output); rings mark the C taken."""
    import matplotlib as mpl

    own = frame[(frame["metric"] == "probe_accuracy") & frame["control"].isna()]
    validated, tested = own[own["split"] == "validation"], own[own["split"] == "test"]
    if validated.empty:
        raise UsageError("there is nothing to draw: the table holds no validation accuracy")
    ax = ax if ax is not None else _axes(8)
    places = _places(validated)
    shades = mpl.colormaps["viridis_r"](np.linspace(0.08, 1, len(places)))
    for place, shade in zip(places, shades, strict=True):
        rows = validated[[key == place for key in _keys(validated)]].sort_values("C")
        taken = tested[[key == place for key in _keys(tested)]]["C"]
        y = 100 * rows["value"].to_numpy(dtype=float)
        ax.plot(rows["C"], y, color=shade, marker=".", label=_name(place), **style)
        at = rows["C"].isin(taken).to_numpy()
        ax.plot(rows["C"][at], y[at], "o", color=shade, markersize=8, fillstyle="none")
    ax.set_xscale("log")
    ax.set_xlabel("C, inverse regularisation strength (ring: chosen)")
    ax.set_ylabel("validation accuracy (%)")
    ax.legend(title="layer", frameon=False, fontsize=7, title_fontsize=7, ncols=1 + len(places) // 14)
    return ax


def plot_few_shot(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Test accuracy against training images per class, one line a layer; bars: 95 % t interval over draws."""
    import matplotlib as mpl

    rows = frame[(frame["metric"] == "few_shot_accuracy") & frame["control"].isna()]
    if rows.empty:
        raise UsageError("there is nothing to draw: the table holds no few-shot accuracy")
    ax = ax if ax is not None else _axes(8)
    places = _places(rows)
    shades = mpl.colormaps["viridis_r"](np.linspace(0.08, 1, len(places)))
    for index, (place, shade) in enumerate(zip(places, shades, strict=True)):
        part = rows[[key == place for key in _keys(rows)]].sort_values("shots")
        # A small shift keeps the bars of neighbouring layers apart.
        x = part["shots"].to_numpy(dtype=float) * 1.03 ** (index - len(places) / 2)
        y, low, high = (100 * part[column].to_numpy(dtype=float) for column in ("value", "low", "high"))
        bars = np.abs([y - low, high - y])
        ax.errorbar(x, y, yerr=bars, color=shade, marker=".", lw=1.2, capsize=2, label=_name(place), **style)
    ax.set_xscale("log")
    shots = sorted(int(value) for value in rows["shots"].unique())
    ax.set_xticks(shots, [str(value) for value in shots])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training images per class")
    ax.set_ylabel("test accuracy (%), bar: 95 % t interval")
    ax.legend(title="layer", frameon=False, fontsize=7, title_fontsize=7, ncols=1 + len(places) // 14)
    return ax


def _curve(
    ax: Axes, places: list[Any], rows: pd.DataFrame, colour: str, name: str, style: dict[str, Any]
) -> None:
    x, y, low, high = _points(places, rows)
    ax.plot(x, y, **{"color": colour, "marker": "o", "markersize": 4, "label": name, **style})
    ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _points(places: list[Any], rows: pd.DataFrame) -> tuple[np.ndarray, ...]:
    """Positions and percentages of the rows whose layer is on the axis."""
    at = {place: i for i, place in enumerate(places)}
    keys = _keys(rows)
    kept = [i for i, key in enumerate(keys) if key in at]
    x = np.array([at[keys[i]] for i in kept], dtype=float)
    columns = [rows[c].to_numpy(dtype=float)[kept] for c in ("value", "low", "high")]
    return x, *(100 * column for column in columns)


def _keys(rows: pd.DataFrame) -> list[tuple[Any, Any]]:
    import pandas as pd

    return [
        (None if pd.isna(b) else int(b), None if pd.isna(s) else str(s))
        for b, s in zip(rows["block"], rows["site"], strict=True)
    ]


def _places(rows: pd.DataFrame) -> list[tuple[Any, Any]]:
    """Layers in the order in which the table first names them, which is input to output."""
    return list(dict.fromkeys(_keys(rows)))


def _name(place: tuple[Any, Any]) -> str:
    block, site = place
    if block is None:
        return str(site)
    return str(block) if site in (None, "resid_post") else f"{block} {site}"


def _label_layers(ax: Axes, places: list[Any]) -> None:
    names = [_name(place) for place in places]
    long = any(len(name) > 5 for name in names) or len(names) > 16
    ax.set_xticks(range(len(names)), names, rotation=90 if long else 0)
    ax.set_xlabel("layer (block, its output unless a site is named)")


def _one(column: pd.Series[Any]) -> str | None:
    names = column.dropna().unique()
    return str(names[0]) if len(names) == 1 else None


def _axes(n_layers: int) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(max(5.2, 2.2 + 0.36 * n_layers), 3.9))[1]
