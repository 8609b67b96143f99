"""What does each layer of a backbone hold for each image? Pooled activations, kept on disk."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from layerprobe.analyzers.extraction import TOKENS, fill_store
from layerprobe.backbones.backbone import Backbone
from layerprobe.backbones.sharding import is_sharded
from layerprobe.choices import POOLINGS
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.files import atomic_write
from layerprobe.hooks.capture import all_layers, check_layers
from layerprobe.hooks.feature_store import FeatureStore, features_root
from layerprobe.hooks.store_records import check_export
from layerprobe.layers import LayerRef
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import SHOWN_AS, tidy
from layerprobe.tasks import Task

PIECE_BYTES = 4 << 20

Layer = LayerRef | int
"""A place in a backbone, or the position in a plain list of arrays."""


FeatureSet = Mapping[Any, np.ndarray] | Sequence[Any] | np.ndarray
"""What comparisons and probes take: `Features`, another mapping from layer to array, or a list of arrays."""


@dataclass(eq=False, repr=False, kw_only=True)
class Features(Record, Mapping[LayerRef, np.ndarray]):
    """Features of one split: a mapping from layer to an n×d array, rows in the order of `ids`.

    Look up by `LayerRef`, by its text ("block.3.mlp_out", "embed") or by block index (its resid_post).
    """

    command: ClassVar[str] = "features"

    arrays: dict[LayerRef, np.ndarray]
    ids: np.ndarray
    labels: np.ndarray
    classes: list[str]
    model: str
    revision: str
    task: str
    split: str
    pooling: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[LayerRef]:
        """The layers held, from input to output."""
        return list(self.arrays)

    def __getitem__(self, layer: LayerRef | int | str) -> np.ndarray:
        if isinstance(layer, (int, np.integer)):
            layer = LayerRef(int(layer))
        elif isinstance(layer, str):
            layer = LayerRef.parse(layer)
        return self.arrays[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self.arrays

    def __iter__(self) -> Iterator[LayerRef]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        shape = "×".join(map(str, next(iter(self.arrays.values())).shape))
        return f"Features({self.model} on {self.task}/{self.split}: {len(self)} layers of {shape})"

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the arrays for other programs, see `export_features`."""
        return export_features(self, path)

    def summary(self) -> str:
        first = next(iter(self.arrays.values()))
        return (
            f"{len(self)} layers of {self.model} on {len(self.ids):,} {self.split} images of {self.task}, "
            f"{first.shape[-1]} features each ({self.pooling} pooling)."
        )

    def to_frame(self) -> pd.DataFrame:
        """Per layer: mean Euclidean norm of a row, and the spread and largest offset of its columns.

        `max_offset_sigma` is max over columns of |mean| / standard deviation: language models carry a few columns
        with huge offsets, which is where careless similarity estimates break.
        """
        rows = []
        for layer, array in self.arrays.items():
            for metric, value in _column_statistics(array).items():
                reason = "every column is constant" if value is None else None
                rows.append({**place(layer), "metric": metric, "value": value, "reason": reason})
        facts = {"model": self.model, "revision": self.revision, "task": self.task, "split": self.split}
        return tidy(rows, **facts, n=len(self.ids))

    def table(self) -> list[dict[str, Any]]:
        """One row a layer, for a terminal."""
        return [
            {
                "layer": str(layer),
                "features": array.shape[-1],
                **{
                    SHOWN_AS[name]: None if value is None else float(f"{value:.3g}")
                    for name, value in _column_statistics(array).items()
                },
            }
            for layer, array in self.arrays.items()
        ]


def _column_statistics(array: np.ndarray) -> dict[str, float | None]:
    """In two passes over pieces, so that no more than a piece is in memory."""
    width, n = math.prod(array.shape[1:]), len(array)
    sums, norms = np.zeros(width), 0.0
    for piece in _row_pieces(array):
        sums += piece.sum(axis=0)
        norms += float(np.linalg.norm(piece, axis=1).sum())
    mean, squares = sums / n, np.zeros(width)
    for piece in _row_pieces(array):
        squares += np.square(piece - mean).sum(axis=0)
    deviation = np.sqrt(squares / n)
    varies = deviation > 0
    offset = np.abs(mean[varies]) / deviation[varies]
    return {
        "mean_norm": norms / n,
        "mean_column_std": float(deviation.mean()),
        "max_offset_sigma": float(offset.max()) if varies.any() else None,
    }


def _row_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Rows as float64 matrices of about 4 MiB; pages of a memory map are given back."""
    step = max(1, PIECE_BYTES // max(1, 8 * math.prod(array.shape[1:])))
    mapped = getattr(array, "_mmap", None)
    for start in range(0, len(array), step):
        yield np.asarray(array[start : start + step], dtype=np.float64).reshape(
            -1, math.prod(array.shape[1:])
        )
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


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


def extract_features(
    backbone: Backbone,
    task: Task,
    split: str = "train",
    *,
    layers: Sequence[LayerRef] | None = None,
    pooling: str | None = None,
    dtype: str = "float32",
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Features:
    """Run the images of a split through a backbone and keep pooled activations of its layers.

    All layers come from one forward pass per batch, pooled on the device. Finished work is found again on disk,
    also after a kill; only what is not there yet is computed. Processes of one launch share it and end with the same
    bytes (`layerprobe.hooks.stripes`).

    Parameters
    ----------
    layers : Sequence[LayerRef] | None
        Places to read; default `embed` and every block's `resid_post`.
    pooling : str | None
        "mean", "last", "cls", or "tokens" for n × tokens × d; default the backbone's.
    dtype : str
        How features are stored: "float32", "float16" or "bfloat16".
    batch_size : int
        Images per forward pass.
    cache_dir : str | os.PathLike[str] | None
        Folder of the store; default layerprobe's cache.

    Raises
    ------
    UnknownNameError, UsageError
        a split, layer or pooling that does not exist.
    LayerprobeError
        Non-finite activations, naming layer and image; a full disk.
    """
    if split not in task.splits:
        raise UnknownNameError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}")
    images = task.splits[split]
    if len(images) == 0:
        raise UsageError(f"the {split} split of {task.name} is empty")
    backbone.prepare(task)
    wanted = list(layers) if layers is not None else all_layers(backbone.n_blocks, ("resid_post",))
    check_layers(wanted, backbone)
    pooling = pooling or backbone.pooling
    if pooling not in (*POOLINGS, TOKENS):
        known = ", ".join((*POOLINGS, TOKENS))
        raise UnknownNameError(f"unknown pooling '{pooling}'; choose one of: {known}")
    described = {**backbone.describe(), "pooling": pooling}
    key = {
        "schema": "layerprobe.features/v2",
        "backbone": described,
        "task": task.task_id,
        "task_revision": task.revision,
        "split": split,
        "split_hash": images.hash,
    }
    store = FeatureStore(features_root(cache_dir), key, n_rows=len(images), dtype=dtype)
    if is_sharded(backbone.model) or not all(store.has(layer) for layer in wanted):
        fill_store(store, backbone, images, wanted, pooling, batch_size, quiet)
    arguments = {"layers": [str(layer) for layer in wanted], "split": split, "dtype": dtype}
    shown = {**backbone.provenance(), "pooling": pooling}
    return Features(
        arrays={layer: store.read(layer) for layer in wanted},
        ids=images.ids,
        labels=images.labels,
        classes=list(task.classes),
        **columns_of(backbone, task),
        split=split,
        pooling=pooling,
        provenance=provenance("features", arguments, backbone=shown, task=task.report),
    )


def columns_of(backbone: Backbone, task: Task) -> dict[str, str]:
    """The table columns `model`, `revision` and `task`."""
    name = backbone.name if backbone.init == "pretrained" else f"{backbone.name} ({backbone.init} init)"
    return {"model": name, "revision": backbone.source.revision, "task": task.name}


def place(layer: Layer) -> dict[str, Any]:
    """The table columns `block` and `site`."""
    if isinstance(layer, LayerRef):
        return {"block": layer.block, "site": layer.site}
    return {"block": layer, "site": None}


def layer_name(layer: Layer) -> str:
    """What messages call a layer."""
    return str(layer) if isinstance(layer, LayerRef) else f"layer {layer}"


def row_name(block: object, site: object) -> str:
    """What terminal tables call the layer of a table row: "embed", "block 3" or "block 3 mlp_out"."""
    if pd.isna(block):
        return str(site)
    return f"block {block:.0f}" + ("" if pd.isna(site) or site == "resid_post" else f" {site}")


def rows_of_metric(frame: pd.DataFrame, name: str, *, prefix: str, what: str) -> pd.DataFrame:
    """The rows of a metric, named with or without its prefix; UnknownNameError where there are none."""
    rows = frame[frame["metric"] == prefix + name.removeprefix(prefix)]
    if rows.empty:
        known = ", ".join(frame["metric"].unique())
        raise UnknownNameError(f"no {what} '{name}' in this record; it has {known}")
    return rows


def arrays_by_layer(features: object) -> dict[Layer, Any] | None:
    """Features, a mapping or a list of arrays (or one array) as a dict; None for anything else."""
    if isinstance(features, Mapping):
        return {LayerRef.parse(key) if isinstance(key, str) else key: features[key] for key in features}
    if getattr(features, "ndim", 0) == 2:
        return {0: features}
    if isinstance(features, Iterable) and (
        isinstance(features, Sequence) or getattr(features, "ndim", 0) == 3
    ):
        return dict(enumerate(features))
    return None


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
