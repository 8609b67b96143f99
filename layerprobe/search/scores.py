"""Transfer scores as proposals for the search: per block, computed once, kept with the search."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

PROPOSING = ("rgn", "gradient_snr", "taylor")
"""Trainable scores that propose plans. Readable scores stand in the layer table and propose nothing:
what a layer already says about the task is not what training it would gain."""

MAX_IMAGES = 2000


def layer_scores(backbone: Any, task: Any, *, seed: int, quiet: bool) -> pd.DataFrame:
    """All transfer scores by layer (long table), on at most `MAX_IMAGES` training images."""
    from layerprobe.analyzers.transfer import transfer_scores

    train = task.splits["train"]
    if len(train) > MAX_IMAGES:
        # Rows stand in a fixed order in which every prefix holds the classes in proportion.
        part = train.subset(range(MAX_IMAGES))
        task = dataclasses.replace(task, splits={**task.splits, "train": part})
    # Four batches are one more than the spread between batches needs.
    batch_size = max(1, min(32, len(train) // 4))
    return transfer_scores(
        backbone, task, n_replicates=10, batch_size=batch_size, seed=seed, quiet=quiet
    ).to_frame()


def proposals(frame: pd.DataFrame, n_blocks: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score name → (value, standard error) per block, for the scores that are defined on every block."""
    found = {}
    for name in PROPOSING:
        rows = frame[(frame["metric"] == f"transfer_{name}") & frame["block"].notna()]
        rows = rows.drop_duplicates("block").sort_values("block")
        value = rows["value"].astype(float).to_numpy()
        if len(value) == n_blocks and np.isfinite(value).all():
            found[name] = (value, rows["stderr"].astype(float).to_numpy())
    return found


def by_block(frame: pd.DataFrame, n_blocks: int) -> pd.DataFrame:
    """One row a block, one column a score (`resid_post` for the readable ones)."""
    inside = frame[frame["block"].notna()]
    if inside.empty:
        return pd.DataFrame(index=range(n_blocks))
    wide = inside.pivot_table(index="block", columns="metric", values="value", aggfunc="first", sort=False)
    return wide.reindex(range(n_blocks))
