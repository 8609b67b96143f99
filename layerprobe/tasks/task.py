"""What a task is: images with labels in three splits, and a report of how they came about."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from layerprobe.tasks.images import ImageStore, decode_all


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images of one split with their labels and ids, row by row.

    Rows stand in a fixed pseudo-random order in which every prefix holds the classes in proportion.

    Attributes
    ----------
    name : train, validation or test.
    ids : array of str. Unique within the task; an image keeps its id under any limit and seed.
    labels : int64 array, in [0, n_classes).
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray
    store: ImageStore = field(repr=False)
    rows: np.ndarray = field(repr=False)
    channels: int = 3

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, indices: Iterable[int] | None = None) -> list[np.ndarray]:
        """Decoded images: all, or those at `indices`.

        Returns
        -------
        list of read-only uint8 arrays: H×W where the whole task is grayscale, else H×W×3.

        Raises
        ------
        BrokenFileError : an image that cannot be decoded; the message says which.
        """
        chosen = self.rows if indices is None else self.rows[np.asarray(list(indices), dtype=np.int64)]
        images = decode_all(self.store, chosen)
        if self.channels == 1:
            return images
        return [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]

    def subset(self, indices: Iterable[int]) -> ImageSplit:
        """The rows at `indices`, in that order; images are shared, not copied."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        return ImageSplit(
            self.name, self.ids[chosen], self.labels[chosen], self.store, self.rows[chosen], self.channels
        )

    @cached_property
    def hash(self) -> str:
        """32 hexadecimal digits over ids and labels in order: equal hash, equal samples."""
        digest = hashlib.blake2b(digest_size=16)
        for sample, label in zip(self.ids.tolist(), self.labels.tolist(), strict=True):
            digest.update(f"{sample} {label}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Task:
    """An image-classification task: three splits, class names, and how they were made.

    Attributes
    ----------
    name : as the caller wrote it. task_id : hub id, package or folder behind it.
    revision : commit of the hub repository, else a hash of the content ("content-…").
    classes : class names; label i is called classes[i].
    splits : "train", "validation" and "test".
    report : rule, seed, counts, duplicates, what was dropped and why; strict JSON.
    channels : 1 where all images are grayscale, else 3. image_size : pixels per side, None where images
        differ or are not square.
    """

    name: str
    task_id: str
    revision: str
    classes: list[str]
    splits: dict[str, ImageSplit]
    report: dict[str, Any]
    channels: int
    image_size: int | None

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def train(self) -> ImageSplit:
        return self.splits["train"]

    @property
    def validation(self) -> ImageSplit:
        return self.splits["validation"]

    @property
    def test(self) -> ImageSplit:
        return self.splits["test"]

    @cached_property
    def split_hash(self) -> str:
        """32 hexadecimal digits over class names and all three splits."""
        parts = [repr(self.classes)] + [f"{name} {split.hash}" for name, split in sorted(self.splits.items())]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What identifies the task in provenance and cache keys."""
        return {
            "task": self.name,
            "task_id": self.task_id,
            "revision": self.revision,
            "split_hash": self.split_hash,
            "n_classes": self.n_classes,
            "counts": {name: len(split) for name, split in self.splits.items()},
            "report": self.report,
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        return f"Task({self.name!r}: {self.n_classes} classes; {counts} images)"
