"""What attribution gives: a table of importance by block, patch-level maps, and the answer in words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from layerprobe.analyzers.features import rows_of_metric
from layerprobe.records import Record
from layerprobe.tables import table_by_layer, write_frame

MAP_COLUMNS = ["image", "label", "prediction", "block", "row", "column", "value"]


@dataclass(repr=False, kw_only=True)
class LayerAttribution(Record):
    """Importance of every block for the predicted class, and patch-level maps of a few images.

    `maps` is long: image, label, prediction, block (empty for `embed`), row, column, value. The map of `embed` splits
    f(x) − f(baseline) over the patches; the map of a block says where what it adds comes to matter.
    """

    command: ClassVar[str] = "attribute"

    frame: pd.DataFrame
    maps: pd.DataFrame
    pictures: dict[str, np.ndarray]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def metric(self, name: str) -> pd.DataFrame:
        """The rows of one metric ("skip" or "attribution_skip")."""
        return rows_of_metric(self.frame, name, prefix="attribution_", what="attribution")

    def table(self) -> list[dict[str, Any]]:
        """One row a block, one column a metric."""
        shown = self.frame["metric"] != "attribution_completeness_error"
        rows = self.frame[self.frame["block"].notna() & shown]
        return table_by_layer(rows, rows["block"].astype(int).tolist(), key="block", prefix="attribution_")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As every record; a folder gets the maps as `attribution_maps.csv`, too."""
        target = super().save(path)
        if target.suffix not in (".csv", ".parquet", ".json") and not self.maps.empty:
            write_frame(self.maps, target / "attribution_maps.csv")
        return target

    def summary(self) -> str:
        facts = self.provenance["prediction"]
        metrics = set(self.frame["metric"])
        parts = []
        for name, words in (("skip", "skipping it"), ("mean_ablation", "replacing its update by the mean")):
            if f"attribution_{name}" not in metrics:
                continue
            rows = self.metric(name)
            top = rows.loc[rows["value"].astype(float).idxmax()]
            lost = float(self.metric(f"{name}_accuracy_lost").set_index("block")["value"][top["block"]])
            parts.append(
                f"Block {int(top['block'])} matters most by {words}: the predicted class loses {top['value']:.3g} ± "
                f"{top['stderr']:.2g} logits, accuracy {100 * lost:.1f} points."
            )
        if "attribution_completeness_error" in metrics:
            worst = float(self.metric("completeness_error")["value"].astype(float).max())
            parts.append(
                f"Completeness error of the path: {100 * worst:.2g} % at {int(facts['n_steps'])} steps."
            )
        parts.append(
            f"{facts['n_images']} {facts['split']} images, accuracy {100 * facts['accuracy']:.1f} %, "
            f"head: {facts['head']}" + (f" (C = {facts['C']:g})" if facts.get("C") else "") + "."
        )
        return " ".join(parts)
