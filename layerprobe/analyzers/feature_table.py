"""Features of several splits as one record, and features as files of other programs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from layerprobe.analyzers.features import Features
from layerprobe.errors import UsageError
from layerprobe.files import atomic_write
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


def export_features(features: Features, path: str | os.PathLike[str]) -> Path:
    """Write features for other programs, and return the path.

    `.safetensors`: one tensor a layer ("block.3.resid_post"), `labels`, and ids, classes and origin as metadata.
    `.npy`: one array layers × n × d (for tokens layers × n × tokens × d), in the order of `features.layers`.

    Raises
    ------
    UsageError
        Another ending, or layers of different shapes for `.npy`.
    """
    target = Path(path)
    check_export(target)
    arrays = {str(layer): np.ascontiguousarray(array) for layer, array in features.arrays.items()}
    if target.suffix == ".safetensors":
        facts = {
            key: str(getattr(features, key)) for key in ("model", "revision", "task", "split", "pooling")
        }
        facts |= {"ids": json.dumps(features.ids.tolist()), "classes": json.dumps(features.classes)}
        with atomic_write(target) as aside:
            save_file({**arrays, "labels": np.ascontiguousarray(features.labels)}, aside, metadata=facts)
        return target
    if len({array.shape for array in arrays.values()}) > 1:
        raise UsageError("layers of different shapes do not fit into one .npy file; use .safetensors")
    with atomic_write(target) as aside, aside.open("wb") as stream:
        np.save(stream, np.stack(list(arrays.values())))
    return target
