"""Figures of similarity between layers, from the tables of `CKAMatrix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SIGNIFICANT = 0.05


def plot_cka(frame: pd.DataFrame, *, ax: Axes | None = None, intervals: bool = False, **style: Any) -> Axes:
    """Heat map of debiased CKA: layers of A upwards, layers of B to the right, both from input to output.

    One colour scale from 0 to 1, extended downwards only if a value is negative. Cells that are no more than
    chance after correction for the search are crossed out; each row's largest cell is framed; undefined cells
    are grey.

    Parameters
    ----------
    frame : as `CKAMatrix.to_frame()` gives it.
    ax : where to draw; a new figure of fitting size otherwise.
    intervals : write each value with the half-width of its 95 % interval into its cell.
    style : passed on to `imshow`, for example `cmap`.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    rows, columns = _layers(frame, ""), _layers(frame, "_y")
    values = _grid(frame, "value", rows, columns)
    if values.size == 0:
        raise UsageError("there is nothing to draw: the table holds no pairs of layers")
    if ax is None:
        ax = _axes(len(rows), len(columns), cell=(0.78, 0.52) if intervals else (0.42, 0.36))
    low = min(0.0, float(np.nanmin(values))) if np.isfinite(values).any() else 0.0
    options = {"cmap": "viridis", "norm": Normalize(low, 1.0), "aspect": "auto", **style}
    image = ax.imshow(values, origin="lower", **options)
    ax.set_facecolor("#d9d9d9")
    chance = _grid(frame, "pvalue_max", rows, columns) > SIGNIFICANT
    half = (_grid(frame, "high", rows, columns) - _grid(frame, "low", rows, columns)) / 2
    same = rows == columns and bool(np.all(np.abs(np.diag(values)[~np.isnan(np.diag(values))] - 1.0) < 1e-9))
    for i in range(len(rows)):
        candidates = np.where([same and rows[i] == column for column in columns], np.nan, values[i])
        best = int(np.nanargmax(candidates)) if np.isfinite(candidates).any() else -1
        for j in range(len(columns)):
            ink = _ink(image, values[i, j])
            if intervals and np.isfinite(values[i, j]):
                text = f"{values[i, j]:.2f}\n±{half[i, j]:.2f}".replace("-0.00", "0.00")
                text = f"({text})" if chance[i, j] else text
                ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=6.5, linespacing=1.0)
            elif chance[i, j]:
                for slope in (-0.22, 0.22):
                    ends = ([j - 0.22, j + 0.22], [i - slope, i + slope])
                    ax.plot(*ends, color=ink, linewidth=0.6, alpha=0.7)
            if j == best and not chance[i, j]:
                ax.add_patch(
                    Rectangle(
                        (j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.4
                    )
                )
    ax.set_xticks(range(len(columns)), [_label(*column) for column in columns])
    ax.set_yticks(range(len(rows)), [_label(*row) for row in rows])
    if any(len(label.get_text()) > 5 for label in ax.get_xticklabels()):
        ax.tick_params(axis="x", rotation=90)
    ax.set_xlabel(f"layer of {_only(frame, 'model_y', 'B')}")
    ax.set_ylabel(f"layer of {_only(frame, 'model', 'A')}")
    ax.set_title(_title(frame), fontsize=9)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("debiased linear CKA")
    notes = ["framed: closest layer of the row"]
    mark = "in brackets" if intervals else "crossed"
    if chance.any():
        notes.append(f"{mark}: no more than chance (corrected p > {SIGNIFICANT:g})")
    if intervals:
        notes.append("±: half-width of the 95 % interval")
    ax.annotate(
        "; ".join(notes),
        xy=(0, 0),
        xycoords="axes fraction",
        xytext=(0, -44 if not _rotated(ax) else -84),
        textcoords="offset points",
        fontsize=7,
        va="top",
    )
    return ax


def plot_cka_closest(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Largest CKA of each layer of A with any layer of B, with 95 % intervals and the name of that layer.

    `frame` is `CKAMatrix.closest()`. Hollow points are no more than chance after correction.
    """
    ax = ax if ax is not None else _axes(4, len(frame), cell=(0.5, 0.8))
    x = np.arange(len(frame))
    value = frame["value"].to_numpy(dtype=float)
    half = (frame["high"].to_numpy(dtype=float) - frame["low"].to_numpy(dtype=float)) / 2
    sure = frame["pvalue_max"].to_numpy(dtype=float) <= SIGNIFICANT
    options = {"color": "#0072B2", "linestyle": "none", "capsize": 2, "linewidth": 1.2, **style}
    ax.errorbar(x, value, yerr=half, label="value and 95 % interval", **options)
    for mask, face, name in (
        (sure, options["color"], "more than chance"),
        (~sure, "white", "no more than chance"),
    ):
        if mask.any():
            ax.plot(
                x[mask],
                value[mask],
                "o",
                color=options["color"],
                markerfacecolor=face,
                linestyle="none",
                label=name,
            )
    for position, (block, site, top) in enumerate(
        zip(frame["block_y"], frame["site_y"], value + half, strict=True)
    ):
        if np.isfinite(top):
            ax.annotate(
                _label(block, site),
                (position, top),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    ax.axhline(0, color="#666666", linestyle="--", linewidth=1)
    ax.set_xticks(x, [_label(b, s) for b, s in zip(frame["block"], frame["site"], strict=True)])
    if any(len(label.get_text()) > 5 for label in ax.get_xticklabels()):
        ax.tick_params(axis="x", rotation=90)
    ax.margins(y=0.15)
    ax.set_xlabel(f"layer of {_only(frame, 'model', 'A')}")
    ax.set_ylabel("debiased linear CKA")
    ax.set_title(f"closest layer of {_only(frame, 'model_y', 'B')} (named above each point)", fontsize=9)
    ax.legend(frameon=False, fontsize=7)
    return ax


def _axes(n_rows: int, n_columns: int, *, cell: tuple[float, float]) -> Axes:
    import matplotlib.pyplot as plt

    size = (max(4.6, 2.4 + cell[0] * n_columns), max(3.6, 1.8 + cell[1] * n_rows))
    return plt.subplots(figsize=size)[1]


def _layers(frame: pd.DataFrame, suffix: str) -> list[tuple[Any, Any]]:
    """Layers in the order in which the table first names them, which is input to output."""
    import pandas as pd

    pairs = zip(frame["block" + suffix], frame["site" + suffix], strict=True)
    return list(dict.fromkeys((None if pd.isna(b) else int(b), None if pd.isna(s) else s) for b, s in pairs))


def _grid(
    frame: pd.DataFrame, column: str, rows: list[tuple[Any, Any]], columns: list[tuple[Any, Any]]
) -> np.ndarray:
    import pandas as pd

    grid = np.full((len(rows), len(columns)), np.nan)
    at_row, at_column = {key: i for i, key in enumerate(rows)}, {key: j for j, key in enumerate(columns)}
    for block, site, block_y, site_y, value in zip(
        frame["block"], frame["site"], frame["block_y"], frame["site_y"], frame[column], strict=True
    ):
        row = (None if pd.isna(block) else int(block), None if pd.isna(site) else site)
        other = (None if pd.isna(block_y) else int(block_y), None if pd.isna(site_y) else site_y)
        grid[at_row[row], at_column[other]] = np.nan if value is None or pd.isna(value) else float(value)
    return grid


def _label(block: Any, site: Any) -> str:
    import pandas as pd

    if block is None or pd.isna(block):
        return str(site)
    return (
        str(int(block)) if site is None or pd.isna(site) or site == "resid_post" else f"{int(block)} {site}"
    )


def _only(frame: pd.DataFrame, column: str, otherwise: str) -> str:
    """The single value of a column, or `otherwise` when there is none or more than one."""
    names = [] if column not in frame else [str(name) for name in frame[column].dropna().unique()]
    if len(names) != 1:
        return otherwise
    # Of a local folder the last part says enough; a hub id such as owner/name stays whole.
    return names[0].rstrip("/").rsplit("/", 1)[-1] if names[0].startswith(("/", "./", "../")) else names[0]


def _ink(image: Any, value: float) -> str:
    """Black or white, whichever reads better on the cell's colour."""
    if not np.isfinite(value):
        return "black"
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _title(frame: pd.DataFrame) -> str:
    task, split = _only(frame, "task", ""), _only(frame, "split", "")
    counts = frame["n"].dropna()
    where = f"{task}/{split}, " if task else ""
    return f"{where}n = {int(counts.iloc[0]):,} images" if len(counts) else where.rstrip(", ")


def _rotated(ax: Axes) -> bool:
    return any(label.get_rotation() for label in ax.get_xticklabels())
