"""What an attribution gives: importance of every block, and patch-level maps of a few images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from layerprobe.errors import UnknownNameError
from layerprobe.records import Record
from layerprobe.tables import write_frame


@dataclass(repr=False)
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
        full = name if name.startswith("attribution_") else f"attribution_{name}"
        rows = self.frame[self.frame["metric"] == full]
        if rows.empty:
            known = ", ".join(str(found) for found in self.frame["metric"].unique())
            raise UnknownNameError(f"no attribution '{name}' in this record; it has {known}")
        return rows

    def table(self) -> list[dict[str, Any]]:
        """One row a block, one column a method."""
        rows = self.frame[self.frame["block"].notna()]
        rows = rows[rows["metric"] != "attribution_completeness_error"]
        rows = rows.assign(metric=rows["metric"].str.removeprefix("attribution_"))
        wide = rows.pivot(index="block", columns="metric", values="value")[rows["metric"].unique()]
        return wide.reset_index().to_dict("records")

    def save(self, path: str | os.PathLike[str]) -> Path:
        target = super().save(path)
        if target.suffix not in (".csv", ".parquet", ".json") and not self.maps.empty:
            write_frame(self.maps, target / "attribution_maps.csv")
        return target

    def summary(self) -> str:
        facts = self.provenance["prediction"]
        parts = []
        for name, words in (("skip", "skipping it"), ("mean_ablation", "replacing its update by the mean")):
            rows = self.frame[self.frame["metric"] == f"attribution_{name}"]
            if rows.empty:
                continue
            top = rows.loc[rows["value"].astype(float).idxmax()]
            lost = self.metric(f"{name}_accuracy").set_index("block")["value"].astype(float)[top["block"]]
            parts.append(
                f"Block {int(top['block'])} matters most by {words}: the predicted class loses {top['value']:.3g} ± "
                f"{top['stderr']:.2g} logits, accuracy {100 * lost:.1f} points."
            )
        errors = self.frame[self.frame["metric"] == "attribution_completeness_error"]
        if not errors.empty:
            worst = float(errors["value"].astype(float).max())
            parts.append(
                f"Completeness error of the path: {100 * worst:.2g} % at {int(facts['n_steps'])} steps."
            )
        parts.append(
            f"{facts['n_images']} {facts['split']} images, accuracy {100 * facts['accuracy']:.1f} %, "
            f"head: {facts['head']}" + (f" (C = {facts['C']:g})" if facts.get("C") else "") + "."
        )
        return " ".join(parts)


def no_maps() -> pd.DataFrame:
    """The table of maps where there are none."""
    return pd.DataFrame(columns=["image", "label", "prediction", "block", "row", "column", "value"])
