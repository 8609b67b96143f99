"""Features of several splits as one record."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from layerprobe.analyzers.feature_export import export_features
from layerprobe.analyzers.features import Features
from layerprobe.hooks.store_records import check_export
from layerprobe.records import Record


@dataclass(eq=False, repr=False)
class FeatureTable(Record):
    """Several splits of one backbone as one record: what the `features` command returns."""

    command: ClassVar[str] = "features"

    splits: list[Features]

    def __post_init__(self) -> None:
        self.provenance = self.splits[0].provenance

    def to_frame(self) -> pd.DataFrame:
        return pd.concat([part.to_frame() for part in self.splits], ignore_index=True)

    def summary(self) -> str:
        first = self.splits[0]
        counts = ", ".join(f"{len(part.ids):,} {part.split}" for part in self.splits)
        return (
            f"{len(first)} layers of {first.model} on {first.task} ({counts} images, {first.pooling} pooling) "
            "are in the feature store."
        )

    def table(self) -> list[dict[str, Any]]:
        """One row a layer of the first split."""
        return self.splits[0].table()

    def export(self, path: str | os.PathLike[str]) -> list[Path]:
        """`export_features` of every split; of several, the split's name stands before the ending."""
        target = Path(path)
        if len(self.splits) == 1:
            return [export_features(self.splits[0], target)]
        check_export(target)
        return [
            export_features(part, target.with_suffix(f".{part.split}{target.suffix}")) for part in self.splits
        ]
