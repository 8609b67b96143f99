"""Which layer leads in a score, and whether its lead over the others is shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from layerprobe.records import Estimate, Repeated

GAP_COLUMNS = ("gap_to_best", "gap_low", "gap_high")


def gaps_to_best(found: Sequence[Estimate], *, higher: bool = True) -> list[dict[str, float | None]]:
    """How far each layer is behind the best, as the columns `GAP_COLUMNS`: ≥ 0, with a paired 95 % t interval.

    The interval stands where both layers have values that are paired, see `Repeated`; the best has none.
    """
    values = np.array([np.nan if e.value is None else e.value if higher else -e.value for e in found])
    values[~np.isfinite(values)] = np.nan
    rows: list[dict[str, float | None]] = [dict.fromkeys(GAP_COLUMNS) for _ in found]
    if np.isnan(values).all():
        return rows
    best = int(np.nanargmax(values))
    first = found[best]
    for value, other, row in zip(values, found, rows, strict=True):
        if np.isnan(value):
            continue
        gap = float(values[best] - value)
        row["gap_to_best"] = gap
        if other is not first and isinstance(first, Repeated) and isinstance(other, Repeated):
            differences = first.repeats - other.repeats
            error = first.scale * float(differences.std(ddof=1))
            if error > 0:
                half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
                row |= {"gap_low": gap - half, "gap_high": gap + half}
    return rows


def add_gaps(rows: Sequence[dict[str, Any]], *, lower_is_better: Collection[str] = ()) -> None:
    """Take the estimate `found` of each row of a long table for how far the row is behind the best of its metric."""
    for metric in dict.fromkeys(row["metric"] for row in rows):
        group = [row for row in rows if row["metric"] == metric]
        gaps = gaps_to_best([row.pop("found") for row in group], higher=metric not in lower_is_better)
        for row, gap in zip(group, gaps, strict=True):
            row |= gap


def best_row(rows: pd.DataFrame, *, lower_is_better: Collection[str] = ()) -> pd.Series:
    """The best row of one metric, each with a value; the highest unless the metric is one of `lower_is_better`."""
    values = rows["value"].astype(float)
    return rows.loc[values.idxmin() if rows["metric"].iloc[0] in lower_is_better else values.idxmax()]


def lead_in_words(rows: pd.DataFrame, top: pd.Series, name_of: Callable[[pd.Series], str]) -> str:
    """What to say behind "block 3 is highest" of the row `top` of one metric: by how much, or that it is not shown.

    A layer leads where its paired intervals over all others are above 0. That the highest of many was picked needs
    no wider ones (Gutmann and Maymin, Is the selected population the best?, Annals of Statistics 15, 1987).
    """
    others = rows.drop(index=top.name)
    if others.empty:
        return ""
    low = others["gap_low"].astype(float)
    if low.isna().any():
        reasons = others["reason"].dropna()
        why = "" if reasons.empty else f": {reasons.iloc[0]}"
        return f" here; whether it leads is not known{why}"
    level = others[low <= 0]
    second = (others if level.empty else level).sort_values("gap_to_best").iloc[0]
    gap = f"{second['gap_to_best']:.2g}"
    interval = f"95 % interval {second['gap_low']:.2g} to {second['gap_high']:.2g}"
    if level.empty:
        return f", {gap} ahead of {name_of(second)} ({interval})"
    more = f" and {len(level) - 1} more" if len(level) > 1 else ""
    return f" here, not told apart from {name_of(second)}{more} (lead {gap}, {interval})"
