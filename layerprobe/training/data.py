"""Images as tensors, and the batches of a run, whose order and augmentation depend on seed and position alone.

Batch s of a run is a function of (seed, s): a resumed run or another number of processes sees the same images
in the same views.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.errors import UsageError
from layerprobe.tasks.random_labels import complementary_labels, random_labels
from layerprobe.training.config import BridgeConfig, TrainConfig, derive_seed

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.tasks import ImageSplit, Task

IN_MEMORY_BYTES = 4 << 30
"""Preprocessed splits up to this size are held in memory; larger ones are preprocessed batch by batch."""


class ImageTensors:
    """The preprocessed images of a split: float32, n×C×H×W, indexed by an array of positions."""

    def __init__(self, backbone: Backbone, split: ImageSplit) -> None:
        if len(split) == 0:
            raise UsageError("the split holds no images")
        self._backbone, self._split = backbone, split
        self.shape = (len(split), *self._load(np.arange(1)).shape[1:])
        self._all: Tensor | None = None
        if 4 * math.prod(self.shape) <= IN_MEMORY_BYTES:
            self._all = torch.empty(self.shape, dtype=torch.float32)
            done = 0
            for batch in split.resized_batches(backbone.recipe, 256):
                self._all[done : done + len(batch)] = backbone.recipe.scaled(batch)
                done += len(batch)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        if self._all is not None:
            return self._all[torch.from_numpy(np.ascontiguousarray(indices))]
        return self._load(indices)

    def subset(self, rows: np.ndarray) -> ImageTensors:
        """The images at `rows`, sharing what is in memory where possible."""
        part = copy.copy(self)
        part._split = self._split.subset(rows)
        part.shape = (len(rows), *self.shape[1:])
        part._all = None if self._all is None else self._all[torch.from_numpy(rows)]
        return part

    @torch.no_grad()
    def _load(self, indices: np.ndarray) -> Tensor:
        return self._backbone.preprocess_rows(self._split, indices)


def row_batches(n: int, size: int) -> Iterator[np.ndarray]:
    """The positions 0 … n−1 in arrays of at most `size`."""
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))


@dataclass(kw_only=True)
class TaskTensors:
    """A task's splits, preprocessed once for one backbone and shared by all runs on them.

    `labels[split]` is an int64 array in the order of `ids[split]`; `facts` identify the data of a run.
    """

    pixels: dict[str, ImageTensors]
    labels: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    n_classes: int
    flip: bool
    facts: dict[str, Any]

    @classmethod
    def of(
        cls, backbone: Backbone, task: Task, splits: Sequence[str] = ("train", "validation", "test")
    ) -> TaskTensors:
        """Preprocess `splits` of `task` the way `backbone` wants its images."""
        return cls(
            pixels={name: ImageTensors(backbone, task.splits[name]) for name in splits},
            labels={name: np.asarray(task.splits[name].labels, dtype=np.int64) for name in splits},
            ids={name: np.asarray(task.splits[name].ids) for name in splits},
            n_classes=task.n_classes,
            flip=task.channels == 3,
            facts=task_facts(task),
        )

    def random_labels(self, config: BridgeConfig) -> np.ndarray:
        """The bridge's label of every training image: int64 n."""
        seed = config.seed if config.label_seed is None else config.label_seed
        if config.random_labels == "complementary":
            if config.random_classes != self.n_classes:
                raise UsageError(
                    f"complementary labels have the task's {self.n_classes} classes, not {config.random_classes}"
                )
            return complementary_labels(self.ids["train"], self.labels["train"], config.random_classes, seed)
        return random_labels(self.ids["train"], config.random_classes, seed)


def task_facts(task: Task) -> dict[str, Any]:
    """What identifies the data of a run: names, hash of the splits, counts."""
    return {
        "task": task.name,
        "task_id": task.task_id,
        "task_revision": task.revision,
        "split_hash": task.split_hash,
        "n_classes": task.n_classes,
        "counts": {name: len(split) for name, split in task.splits.items()},
    }


@dataclass(frozen=True)
class Batch:
    """The images of one optimizer step and how each is augmented.

    `indices` int64 b, positions in the split; `shifts` int64 b×2, pixels down and right; `flips` bool b.
    """

    indices: np.ndarray
    shifts: np.ndarray
    flips: np.ndarray

    def part(self, start: int, stop: int) -> Batch:
        return Batch(self.indices[start:stop], self.shifts[start:stop], self.flips[start:stop])

    def pieces(self, size: int | None) -> Iterator[Batch]:
        """Micro-batches of at most `size` images, in order."""
        step = size or len(self.indices)
        for start in range(0, len(self.indices), step):
            yield self.part(start, start + step)


class BatchSampler:
    """The batches of a run: an endless row of permutations of the training set, cut into equal batches.

    Every image comes once per epoch and no batch is short, also where a batch spans two epochs.
    """

    def __init__(self, n_images: int, shape: tuple[int, ...], config: TrainConfig, *, flip: bool) -> None:
        self.n, self.config = n_images, config
        self.flip = flip if config.flip is None else config.flip
        self.reach = max(1, round(max(shape[-2:]) / 32)) if config.augment == "weak" else 0
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def batch(self, step: int) -> Batch:
        """The images of optimizer step `step`, over all processes."""
        size = self.config.batch_size
        places = np.arange(step * size, (step + 1) * size)
        parts = []
        for epoch in np.unique(places // self.n).tolist():
            order, shifts, flips = self._epoch(epoch)
            images = order[places[places // self.n == epoch] % self.n]
            parts.append((images, shifts[images], flips[images]))
        return Batch(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def begins_epoch(self, step: int) -> bool:
        """Whether the first image of an epoch is among those of `step`."""
        size = self.config.batch_size
        return -(-step * size // self.n) * self.n < (step + 1) * size

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            draw = np.random.default_rng(derive_seed(self.config.seed, "order", epoch))
            order = draw.permutation(self.n)
            shifts = draw.integers(-self.reach, self.reach + 1, size=(self.n, 2))
            flips = draw.random(self.n) < (0.5 if self.flip and self.config.augment == "weak" else 0.0)
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = (order, shifts, flips)
        return self._epochs[epoch]


def augmented(pixels: Tensor, batch: Batch) -> Tensor:
    """The images of `batch` (b×C×H×W), shifted with repeated edges and mirrored as it says."""
    if not batch.shifts.any() and not batch.flips.any():
        return pixels
    b, _, height, width = pixels.shape
    shifts = torch.from_numpy(batch.shifts)
    rows = (torch.arange(height) - shifts[:, :1]).clamp_(0, height - 1)  # b×H
    columns = (torch.arange(width) - shifts[:, 1:]).clamp_(0, width - 1)  # b×W
    columns = torch.where(torch.from_numpy(batch.flips)[:, None], width - 1 - columns, columns)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(b, 1, height * width)  # b×1×HW
    return pixels.flatten(2).gather(2, flat.expand(b, pixels.shape[1], -1)).view_as(pixels)
