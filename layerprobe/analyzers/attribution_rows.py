"""Rows of an attribution's table: importance by block from values per image, and completeness errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyzers.leader import gaps_to_best
from layerprobe.layers import EMBED
from layerprobe.records import Repeated

COMPLETENESS = {
    "attribution_completeness_error": "the path",
    "attribution_integrated_gradients_completeness_error": "integrated gradients",
}
"""Metrics that say how far the attributions of a place miss f(x) − f(baseline), as a share of it: → of what."""
LARGE_ERROR = 0.05
"""A completeness error above it is told in a line."""


def per_image(values: Sequence[Tensor], n_places: int) -> np.ndarray:
    """Per-image values, place by place and batch after batch, as images × places."""
    columns = [torch.cat(list(values[place::n_places])) for place in range(n_places)]
    return torch.stack(columns, dim=1).double().cpu().numpy()


def block_rows(
    metric: str, values: np.ndarray, *, reason: str | None = None, n_steps: int | None = None
) -> list[dict[str, Any]]:
    """One row a block from per-image values B×L: mean, standard error, and how far it is behind the largest."""
    scale = 1 / math.sqrt(len(values))
    found = [
        Repeated(value=float(one.mean()), stderr=scale * float(one.std(ddof=1)), repeats=one, scale=scale)
        for one in values.T
    ]
    rows = []
    for block, (one, gap) in enumerate(zip(found, gaps_to_best(found), strict=True)):
        row = {"block": block, "site": "resid_post", "metric": metric, "n_steps": n_steps, "reason": reason}
        shown = {"value": one.value, "stderr": one.stderr, **gap}
        rows.append({**row, **(dict.fromkeys(shown) if reason else shown)})
    return rows


def completeness_rows(
    metric: str, missed: np.ndarray, moved: float, n_steps: int, *, first: int = 0
) -> list[dict[str, Any]]:
    """One row a place: |Σ attributions − change of the output| over |change|.

    `first` is the block of the first place, -1 for what enters block 0. `missed` and `moved` are sums over images, see
    `layerprobe.analyzers.attribution_path.completeness`.
    """
    errors = missed / moved if moved else np.full_like(missed, np.inf)
    rows = []
    for block, error in enumerate(errors.tolist(), start=first):
        where = {"block": None, "site": EMBED} if block < 0 else {"block": block, "site": "resid_post"}
        rows.append({**where, "metric": metric, "value": error, "n_steps": n_steps})
    return rows


def large_errors(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each kind of attribution whose completeness error is above `LARGE_ERROR` at some place."""
    for metric, what in COMPLETENESS.items():
        worst = max(
            (row for row in rows if row["metric"] == metric), key=lambda row: row["value"], default=None
        )
        if worst and worst["value"] > LARGE_ERROR:
            yield (
                f"completeness error of {what}: {100 * worst['value']:.2g} % of the change of the output at "
                f"{worst['n_steps']} steps, above {100 * LARGE_ERROR:g} %; lower the tolerance or raise max_steps"
            )
