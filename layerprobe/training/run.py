"""The record of a bridge training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from layerprobe.plans import FreezePlan
from layerprobe.records import Record
from layerprobe.tables import tidy
from layerprobe.training.config import BridgeConfig


@dataclass(repr=False)
class BridgeRun(Record):
    """A finished bridge training.

    Attributes
    ----------
    backbone : the trained backbone, in memory.
    plan, config : what was trained, and how.
    labels : random label of every training image, in the order of the split.
    history : one row per optimizer step: step, epoch, loss, accuracy, lr, grad_norm, images_per_second.
    rows : final figures and, per block, how far the weights moved (`layerprobe.training.drift`).
    folder : where checkpoints and the final model are, or None.
    is_main : False on all but one of several processes; those have nothing to print or save.
    """

    command: ClassVar[str] = "bridge"
    backbone: Any
    plan: FreezePlan
    config: BridgeConfig
    labels: np.ndarray
    history: pd.DataFrame
    rows: list[dict[str, Any]]
    about: dict[str, Any]
    folder: Path | None = None
    is_main: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        return tidy(
            self.rows,
            model=self.about["model"],
            revision=self.about["revision"],
            task=self.about["task"],
            seed=self.config.seed,
        )

    def value(self, metric: str) -> float:
        """A figure of the whole run, such as `random_label_accuracy`."""
        return next(row["value"] for row in self.rows if row["metric"] == metric and row["block"] is None)

    def table(self) -> list[dict[str, Any]]:
        """One row per block for a terminal."""
        frame = self.to_frame()
        wide = frame[frame["block"].notna()].pivot(index="block", columns="metric", values="value")
        states = self.plan.block_states
        return [
            {
                "block": int(block),
                "plan": states[int(block)],
                "weight change": row["weight_change"],
                "update rank": row["update_rank"],
                "σ₁ after/before": row["spectral_norm_ratio"],
                "outliers > 6σ before": row["outlier_ratio_6sigma_before"],
                "after": row["outlier_ratio_6sigma_after"],
            }
            for block, row in wide.iterrows()
        ]

    def summary(self) -> str:
        k = self.config.random_classes
        text = (
            f"After {len(self.history):,} steps {self.value('random_label_accuracy'):.1%} of the random labels "
            f"are recalled (a guess: {1 / k:.1%} of {k}); {self.plan.summary()}."
        )
        return text + (f" Model: {self.folder}" if self.folder is not None else "")
