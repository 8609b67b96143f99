"""A task, images with labels in three splits, and how it is made of what a source holds."""

from __future__ import annotations

import hashlib
import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.choices import SPLITS
from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.reading import check_plain
from layerprobe.tables import render_table
from layerprobe.tasks.decoding import Decoding, Resizer
from layerprobe.tasks.duplicates import (
    KEEP_BYTES,
    Scan,
    count_duplicates,
    repeated,
    sample_ids,
    scan_images,
)
from layerprobe.tasks.images import ArrayImages, ImageStore, JoinedImages
from layerprobe.tasks.split import assign, limited_sizes, stratified_order

if TYPE_CHECKING:
    from torch import Tensor

FINGERPRINT_VERSION = 2
"""Raised whenever ids or the comparison of images change their meaning."""

NO_LABEL = int(np.iinfo(np.int64).min)
"""Where a table of whole numbers has no value."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSplit:
    """Images of one split with their labels and ids, row by row.

    Rows stand in a fixed pseudo-random order in which every prefix holds the classes in proportion.

    Attributes
    ----------
    name : str
        Train, validation or test.
    ids : np.ndarray
        Array of str. Unique within the task; an image keeps its id under any limit and seed.
    labels : np.ndarray
        int64 array, in [0, n_classes).
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray
    decoding: Decoding = field(repr=False)
    rows: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, indices: Iterable[int] | None = None) -> list[np.ndarray]:
        """Decoded images: all, or those at `indices`.

        Returns
        -------
        list[np.ndarray]
            Of read-only uint8 arrays: H×W where the whole task is grayscale, else H×W×3.

        Raises
        ------
        BrokenFileError
            An image that cannot be decoded; the message says which.
        """
        return [self.decoding.image(row) for row in self._chosen(indices).tolist()]

    def resized(self, resizer: Resizer, indices: Iterable[int]) -> Tensor:
        """The images at `indices` as `resizer` makes them, B×C×H×W, decoded unless they are kept on disk."""
        rows = self._chosen(indices).tolist()
        return resizer.stacked([self.decoding.resized(row, resizer) for row in rows])

    def resized_batches(
        self, resizer: Resizer, batch_size: int, *, start: int = 0, pin: bool = False
    ) -> Iterator[Tensor]:
        """`resized` of all images from `start`, batch by batch; the task's workers decode ahead."""
        if start < len(self):
            yield from self.decoding.batches(self.rows[start:], batch_size, resizer, pin=pin)

    def _chosen(self, indices: Iterable[int] | None) -> np.ndarray:
        return self.rows if indices is None else self.rows[np.asarray(list(indices), dtype=np.int64)]

    def subset(self, indices: Iterable[int]) -> ImageSplit:
        """The rows at `indices`, in that order; images are shared, not copied."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        return replace(self, ids=self.ids[chosen], labels=self.labels[chosen], rows=self.rows[chosen])

    @cached_property
    def hash(self) -> str:
        """32 hexadecimal digits over ids and labels in order: equal hash, equal samples."""
        digest = hashlib.blake2b(digest_size=16)
        for sample, label in zip(self.ids.tolist(), self.labels.tolist(), strict=True):
            digest.update(f"{sample} {label}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """An image-classification task: three splits, class names, and how they were made.

    Attributes
    ----------
    name : str
        As the caller wrote it. task_id : hub id, package or folder behind it.
    revision : str
        Commit of the hub repository, else a hash of the content ("content-…").
    classes : list[str]
        Class names; label i is called classes[i].
    splits : dict[str, ImageSplit]
        "train", "validation" and "test".
    report : dict[str, Any]
        Rule, seed, counts, duplicates, what was dropped and why; strict JSON.
    channels : int
        1 where all images are grayscale, else 3. image_size : pixels per side, None where images differ or
        are not square.
    loaded_with : dict[str, Any] | None
        Arguments by which `load_task` made it.
    """

    name: str
    task_id: str
    revision: str
    classes: list[str]
    splits: dict[str, ImageSplit]
    report: dict[str, Any]
    channels: int
    image_size: int | None
    loaded_with: dict[str, Any] | None = None

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

    def _repr_html_(self) -> str:
        counts = [np.bincount(split.labels, minlength=self.n_classes) for split in self.splits.values()]
        rows = [
            {"split": name, "images": len(split), "fewest of a class": int(n.min()), "most": int(n.max())}
            for (name, split), n in zip(self.splits.items(), counts, strict=True)
        ]
        names = ", ".join(self.classes[:10]) + (", …" if self.n_classes > 10 else "")
        size = f"{self.image_size}×{self.image_size}" if self.image_size else "several sizes"
        about = f"{self.name}: {self.n_classes} classes ({names}); {size}, {self.channels} channel"
        about += "s" if self.channels > 1 else ""
        return f"<p>{html.escape(about)}</p>{render_table(rows, 'html')}"


@dataclass
class SourceSplit:
    """One split as the source has it; `name` is "all" where the source knows no splits."""

    name: str
    images: ImageStore
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(kw_only=True)
class Source:
    """Everything one data set offers, before layerprobe decides what is trained on.

    `classes` are the names of the labels 0, 1, …; `remarks` end up in the task's report; `fingerprint`
    changes whenever the images or their order may have changed (None: cannot tell).
    """

    splits: list[SourceSplit]
    classes: list[str]
    remarks: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    label_column: str | None = None
    ids: np.ndarray | None = None
    """Ids that the caller has for the images, in their order; None: hashes of their content."""


def fingerprint(parts: Mapping[str, Sequence[Path]], what: str = "") -> str:
    """Of files in their order, by path, size and times; `what` is read from them (a column, say)."""
    digest = hashlib.blake2b(f"{FINGERPRINT_VERSION} {what}".encode(), digest_size=16)
    for name, paths in parts.items():
        for path in paths:
            facts = check_plain(path)
            stamp = f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
            digest.update(os.fsencode(f"{name} {path.resolve()} {stamp}\n"))
    return digest.hexdigest()


def _number_labels(
    values: Sequence[np.ndarray], names: list[str] | None, place: str
) -> tuple[list[np.ndarray], list[str]]:
    """Labels 0, 1, … and their names, the same for all splits.

    `values` are int64 (`NO_LABEL`: none) or objects, str or int (None: no label). With noted names the
    numbers stay as they are. Otherwise the classes are the sorted distinct values over all splits, so that
    labels 1 to 26, or texts, become 0 to 25. −1 stands for no label, as in the hub's data sets, except beside
    +1 alone or other negative labels, unless a whole split is −1.
    """
    if names is not None:
        numbered = [
            split if split.dtype == object else np.where(split == NO_LABEL, -1, split) for split in values
        ]
        for split in numbered:
            if split.dtype == object or (len(split) and not -1 <= split.min() <= split.max() < len(names)):
                raise BrokenFileError(f"{place}: a label lies outside its {len(names)} class names")
        return numbered, names
    present = {value for split in values for value in set(split.tolist())} - {None, NO_LABEL}
    if len({isinstance(value, str) for value in present}) > 1:
        raise BrokenFileError(
            f"{place}: labels are text in one split and numbers in another, so they do not match"
        )
    negative = present == {-1, 1} or any(value < -1 for value in present if not isinstance(value, str))
    if not negative or any(set(split.tolist()) == {-1} for split in values):
        present -= {-1}
    ordered = sorted(present)
    number = {value: index for index, value in enumerate(ordered)}
    numbered = [
        np.array([number.get(value, -1) for value in split.tolist()], dtype=np.int64) for split in values
    ]
    return numbered, [str(value) for value in ordered]


def labelled(
    splits: list[SourceSplit], values: list[np.ndarray], names: list[str] | None, place: str
) -> Source:
    """Number the labels, and leave out splits whose labels are withheld (as in ImageNet's test set)."""
    numbered, classes = _number_labels(values, names, place)
    kept, remarks = [], []
    for split, labels in zip(splits, numbered, strict=True):
        n_without = int((labels < 0).sum())
        if len(labels) and n_without == len(labels):
            remarks.append(f"split {split.name} has no labels and was left out ({len(labels):,} images)")
        elif n_without:
            row = int(np.flatnonzero(labels < 0)[0])
            raise BrokenFileError(
                f"{n_without:,} of {len(labels):,} images have no label; the first is {split.images.place(row)}"
            )
        elif len(labels):
            split.labels = labels
            kept.append(split)
    if not kept:
        raise UsageError(f"{place} holds no labelled images")
    return Source(splits=kept, classes=classes, remarks=remarks)


def cut_task(
    name: str,
    source: Source,
    *,
    task_id: str,
    commit: str | None,
    limit: int | None,
    seed: int,
    decode_workers: int | None = None,
    keep_decoded: bool = True,
) -> Task:
    """Scan the images of a source, cut them into splits, apply the limit, and report."""
    refuse_one_class(name, source)
    labels = np.concatenate([part.labels for part in source.splits])
    official = [part.name for part in source.splits for _ in range(len(part.labels))]
    images = JoinedImages([part.images for part in source.splits])
    scan = scan_images(images, official, name=name, fingerprint=source.fingerprint)
    shared = {row: images.name(row) for rows in repeated(scan.digests) for row in rows}
    content = sample_ids(scan.digests, official, labels, shared)
    ids = content if source.ids is None else source.ids
    side, rule = assign(official, labels, scan.groups, ids, seed)
    rows = _rows_in_order(name, side, labels, ids, seed)
    sizes = {split: len(order) for split, order in rows.items()}
    kept = limited_sizes(sizes, {split: len(np.unique(labels[rows[split]])) for split in SPLITS}, limit)
    rows = {split: order[: kept[split]] for split, order in rows.items()}
    images.remember = scan.decoded_bytes <= KEEP_BYTES
    images.recall(scan.pixels, np.concatenate(list(rows.values())))
    decoding = Decoding(
        images,
        channels=scan.channels,
        content=_images_hash(scan) if keep_decoded and _are_files(source) else None,
        workers=decode_workers,
    )
    splits = {
        split: ImageSplit(name=split, ids=ids[order], labels=labels[order], decoding=decoding, rows=order)
        for split, order in rows.items()
    }
    report = {
        "rule": rule,
        "seed": seed,
        "limit": limit,
        "label_column": source.label_column,
        "official": {part.name: len(part.labels) for part in source.splits},
        "counts_before_limit": sizes,
        "counts": kept,
        "equality": scan.identity,
        "duplicates": count_duplicates(side, official, labels, scan.groups),
        "missing_classes": {
            split: [source.classes[c] for c in np.setdiff1d(np.arange(len(source.classes)), part.labels)]
            for split, part in splits.items()
        },
        "remarks": list(source.remarks),
    }
    return Task(
        name=name,
        task_id=task_id,
        revision=commit or f"content-{_content_hash(content, labels)}",
        classes=source.classes,
        splits=splits,
        report=report,
        channels=scan.channels,
        image_size=scan.image_size,
    )


def refuse_one_class(name: str, source: Source) -> None:
    """UsageError for images that are all of one class."""
    labels = np.concatenate([part.labels for part in source.splits])
    present = np.unique(labels)
    if len(present) < 2:
        raise UsageError(
            f"all {len(labels):,} images of {name} are of one class ('{source.classes[present[0]]}'); "
            "a task needs at least two"
        )


def _rows_in_order(
    name: str, side: np.ndarray, labels: np.ndarray, ids: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    rows = {}
    for split in SPLITS:
        inside = np.flatnonzero(side == split)
        if not len(inside):
            raise UsageError(f"{name} has too few images ({len(labels):,}) to make a {split} split")
        rows[split] = inside[stratified_order(labels[inside], ids[inside], seed)]
    for split in ("validation", "test"):
        if not np.isin(labels[rows[split]], labels[rows["train"]]).any():
            raise UsageError(f"none of the classes in the {split} images of {name} occurs in train")
    return rows


def _are_files(source: Source) -> bool:
    """Whether the images must be decoded; arrays are pixels already."""
    return not all(isinstance(part.images, ArrayImages) for part in source.splits)


def _images_hash(scan: Scan) -> str | None:
    """A hash of what is stored, row by row; None where it was not read."""
    if scan.identity == "names":
        return None
    return hashlib.blake2b("\n".join(scan.digests).encode(), digest_size=16).hexdigest()


def _content_hash(ids: np.ndarray, labels: np.ndarray) -> str:
    """A hash of all samples of a source, whatever the order of its rows."""
    lines = sorted(f"{sample} {label}" for sample, label in zip(ids.tolist(), labels.tolist(), strict=True))
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
