"""Features as files of other programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from layerprobe.errors import UsageError
from layerprobe.files import atomic_write
from layerprobe.hooks.store_records import check_export

if TYPE_CHECKING:
    from layerprobe.analyzers.features import Features


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
