"""What does each layer of a backbone hold for each image? Pooled activations, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from layerprobe.backbones.backbone import POOLINGS, Backbone, pool
from layerprobe.errors import LayerprobeError, UnknownNameError, UsageError
from layerprobe.hooks.capture import all_layers, capture, check_layers
from layerprobe.hooks.store import FeatureStore, encode, features_root
from layerprobe.layers import LayerRef
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy
from layerprobe.tasks import Task

TOKENS = "tokens"
"""Pooling that pools nothing: n × tokens × d, asked for by name because of its size."""


@dataclass(eq=False, repr=False)
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

    @property
    def n_classes(self) -> int:
        return len(self.classes)

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

    def block(self, index: int, site: str = "resid_post") -> np.ndarray:
        """The n×d array of a block's site."""
        return self.arrays[LayerRef(index, site)]

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
            values = np.asarray(array, dtype=np.float64).reshape(len(array), -1)
            deviation = values.std(axis=0)
            alive = deviation > 0
            offset = np.abs(values.mean(axis=0))[alive] / deviation[alive]
            measured = {
                "mean_norm": float(np.linalg.norm(values, axis=1).mean()),
                "mean_column_std": float(deviation.mean()),
                "max_offset_sigma": float(offset.max()) if alive.any() else None,
            }
            for metric, value in measured.items():
                reason = "every column is constant" if value is None else None
                rows.append(
                    {
                        "block": layer.block,
                        "site": layer.site,
                        "metric": metric,
                        "value": value,
                        "reason": reason,
                    }
                )
        return tidy(
            rows,
            model=self.model,
            revision=self.revision,
            task=self.task,
            split=self.split,
            n=len(self.ids),
        )


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
        """One row a layer of the first split, for a terminal."""
        wide = self.splits[0].to_frame().pivot(index=["block", "site"], columns="metric", values="value")
        return [
            {
                "layer": str(layer),
                "features": self.splits[0][layer].shape[-1],
                **{
                    metric: float(
                        wide.loc[(layer.block if layer.block is not None else pd.NA, layer.site), metric]
                    )
                    for metric in wide.columns
                },
            }
            for layer in self.splits[0].layers
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
    also after a kill; only layers that are not there yet are computed.

    Parameters
    ----------
    layers : places to read; default `embed` and every block's `resid_post`.
    pooling : "mean", "last", "cls", or "tokens" for n × tokens × d; default the backbone's.
    dtype : how features are stored: "float32", "float16" or "bfloat16".
    batch_size : images per forward pass. cache_dir : folder of the store; default layerprobe's cache.

    Raises
    ------
    UnknownNameError, UsageError : a split, layer or pooling that does not exist.
    LayerprobeError : non-finite activations, naming layer and image; a full disk.
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
        raise UnknownNameError(
            f"unknown pooling '{pooling}'; choose one of: {', '.join((*POOLINGS, TOKENS))}"
        )
    described = {**backbone.describe(), "pooling": pooling}
    key = {
        "schema": "layerprobe.features/v1",
        "backbone": described,
        "task": task.task_id,
        "task_revision": task.revision,
        "split": split,
        "split_hash": images.hash,
    }
    store = FeatureStore(features_root(cache_dir), key, n_rows=len(images), dtype=dtype)
    if not all(store.has(layer) for layer in wanted):
        _fill(store, backbone, images, wanted, pooling, dtype, batch_size, quiet)
    return Features(
        arrays={layer: store.read(layer) for layer in wanted},
        ids=images.ids,
        labels=images.labels,
        classes=list(task.classes),
        model=backbone.name if backbone.init == "pretrained" else f"{backbone.name} (random init)",
        revision=backbone.source.revision,
        task=task.name,
        split=split,
        pooling=pooling,
        provenance=provenance(
            "features",
            {"layers": [str(layer) for layer in wanted], "split": split, "dtype": dtype},
            backbone=described,
            task=task.report,
        ),
    )


def _fill(
    store: FeatureStore,
    backbone: Backbone,
    images: Any,
    wanted: Sequence[LayerRef],
    pooling: str,
    dtype: str,
    batch_size: int,
    quiet: bool,
) -> None:
    def pooled(hidden: torch.Tensor) -> torch.Tensor:
        if pooling == TOKENS:
            return hidden
        return pool(hidden, pooling, n_prefix=backbone.n_prefix(hidden.shape[1]))

    was_training = backbone.training
    backbone.eval()
    try:
        with (
            store.writer(wanted, batch_size=batch_size) as writer,
            progress_bar(
                total=len(images), initial=writer.rows, unit="image", desc=backbone.name, quiet=quiet
            ) as bar,
            torch.inference_mode(),
        ):
            while writer.layers and writer.rows < len(images):
                rows = np.arange(writer.rows, min(writer.rows + batch_size, len(images)))
                pixels = backbone.preprocess(images.images(rows))
                with capture(backbone, writer.layers, pool=pooled, stop_early=True) as seen:
                    backbone(pixels)
                for layer, values in seen.items():
                    _check_finite(layer, values, images.ids[rows])
                writer.append({layer: encode(values, dtype) for layer, values in seen.items()})
                bar.update(len(rows))
    finally:
        backbone.train(was_training)


def _check_finite(layer: LayerRef, values: torch.Tensor, ids: np.ndarray) -> None:
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    bad = (~finite).flatten(1).any(dim=1).nonzero().flatten()
    hint = (
        "float16 overflow is likely, try --dtype bfloat16"
        if values.dtype == torch.float16
        else ("the weights may be damaged; see: layerprobe outliers")
    )
    raise LayerprobeError(
        f"{layer} holds {int((~finite).sum())} non-finite values (first: image {ids[int(bad[0])]}); {hint}"
    )
