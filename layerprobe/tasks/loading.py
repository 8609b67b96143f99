"""From a name to a task: find the source, scan it, cut it, limit it, and report."""

from __future__ import annotations

import hashlib
import operator
import re
from pathlib import Path

import numpy as np

from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.tasks.catalog import TASKS, TaskEntry
from layerprobe.tasks.columns import ColumnChoice
from layerprobe.tasks.hub import read_hub
from layerprobe.tasks.images import ImageStore, JoinedImages, RememberedImages
from layerprobe.tasks.scan import KEEP_BYTES, scan
from layerprobe.tasks.sources import Source, read_digits, read_folder
from layerprobe.tasks.splits import (
    SPLITS,
    assign,
    duplicates,
    limited_sizes,
    repeated,
    sample_ids,
    stratified_order,
)
from layerprobe.tasks.task import ImageSplit, Task


def load_task(
    name: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    offline: bool = False,
    revision: str | None = None,
    label: str | None = None,
) -> Task:
    """Load an image-classification task, cut into train, validation and test.

    Parameters
    ----------
    name : alias (see `layerprobe ls tasks`), hub data set id, or local folder: parquet files in the
        hub's schema, IDX files as of MNIST, or class folders. An alias wins over a folder of the same
        name; write ./NAME for the folder. "NAME:COLUMN" chooses the label column.
    data_dir : folder that holds the task's files, instead of the hub.
    limit : at most this many training images, stratified; smaller limits give subsets of larger ones.
        The others shrink in proportion, see `layerprobe.tasks.splits.limited_sizes`.
    seed : of the cut and of the subset.
    offline : never ask the network (as with HF_HUB_OFFLINE=1); use the Hugging Face cache.
    revision : branch, tag or commit of the hub repository.
    label : label column, where there are several.

    Returns
    -------
    Task. Its `report` states the rule by which it was cut (see `layerprobe.tasks.splits.assign`),
    the counts, and the duplicates that were found.

    Notes
    -----
    All images are read, and decoded where that is affordable (`layerprobe.tasks.scan`), whatever the
    limit: only then are ids and cuts the same under every limit. Few images stay decoded in memory.

    Raises
    ------
    UnknownNameError : no such task, folder or label column.
    NotAvailableError : not cached while offline.
    UsageError : one class only, no image or label column, a limit below the number of classes.
    BrokenFileError : a file or an image that cannot be read.
    """
    seed = operator.index(seed)
    if limit is not None and operator.index(limit) < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    base, column = split_column(name, label)
    entry = TASKS.get(base)
    choice = ColumnChoice(entry.image if entry else (), entry.label if entry else (), column)
    source, task_id, commit = _find_source(base, entry, choice, data_dir, revision, offline)
    if commit is None and revision is not None:
        raise UsageError(f"revision '{revision}' means nothing here: {task_id} is not read from the hub")
    return _make_task(name, task_id, commit, source, limit, seed)


def split_column(name: str, label: str | None) -> tuple[str, str | None]:
    """Take "cifar100:coarse_label" apart; a folder of that very name comes first."""
    match = re.fullmatch(r"(.+):(\w+)", name)
    if match is None or Path(name).exists():
        return name, label
    return match[1], label or match[2]


def _find_source(
    base: str,
    entry: TaskEntry | None,
    choice: ColumnChoice,
    data_dir: str | Path | None,
    revision: str | None,
    offline: bool,
) -> tuple[Source, str, str | None]:
    if (folder := local_folder(base, data_dir)) is not None:
        return read_folder(folder, choice), base if data_dir is None else str(data_dir), None
    if entry is not None and entry.origin == "package":
        return read_digits(choice), entry.task_id, None
    source, commit = read_hub(
        base,
        entry.task_id if entry else base,
        choice,
        config=entry.config if entry else None,
        revision=revision,
        offline=offline,
    )
    return source, entry.task_id if entry else base, commit


def local_folder(base: str, data_dir: str | Path | None) -> Path | None:
    """The folder that a task's name means, there or not; None for an alias and a data set of the hub.

    Raises
    ------
    UnknownNameError : none of the three.
    """
    if data_dir is not None:
        return Path(data_dir).expanduser()
    if base in TASKS:
        return None
    path = Path(base).expanduser()
    if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise UnknownNameError(f"unknown task '{base}'.{did_you_mean(base, TASKS)} See: layerprobe ls tasks")
    return None


def _make_task(
    name: str, task_id: str, commit: str | None, source: Source, limit: int | None, seed: int
) -> Task:
    remarks = list(source.remarks)
    parts = source.splits
    refuse_one_class(name, source)
    labels = np.concatenate([part.labels for part in parts])
    official = [part.name for part in parts for _ in range(len(part.labels))]
    images = JoinedImages([part.images for part in parts])
    found = scan(images, official, name=name, fingerprint=source.fingerprint)
    shared = {row: images.name(row) for row in _rows_with_shared_digest(found.digests)}
    ids = sample_ids(found.digests, official, labels, shared)
    side, rule = assign(official, labels, found.groups, ids, seed)

    rows, sizes, n_present = {}, {}, {}
    for split in SPLITS:
        inside = np.flatnonzero(side == split)
        rows[split] = inside[stratified_order(labels[inside], ids[inside], seed)]
        sizes[split], n_present[split] = len(inside), len(np.unique(labels[inside]))
        if not len(inside):
            raise UsageError(f"{name} has too few images ({len(labels):,}) to make a {split} split")
    for split in ("validation", "test"):
        if not np.isin(labels[rows[split]], labels[rows["train"]]).any():
            raise UsageError(f"none of the classes in the {split} images of {name} occurs in train")
    kept = limited_sizes(sizes, n_present, limit)
    rows = {split: order[: kept[split]] for split, order in rows.items()}

    store: ImageStore = RememberedImages(images) if found.decoded_bytes <= KEEP_BYTES else images
    chosen = np.concatenate([rows[split] for split in SPLITS])
    where = dict(rows)
    if found.pixels is not None:
        store = found.pixels
    if found.pixels is not None and len(chosen) < len(labels) // 2:
        store = found.pixels.take(chosen)
        ends = np.cumsum([len(rows[split]) for split in SPLITS])
        where = {
            split: np.arange(end - len(rows[split]), end) for split, end in zip(SPLITS, ends, strict=True)
        }
    splits = {
        split: ImageSplit(split, ids[order], labels[order], store, where[split], found.channels)
        for split, order in rows.items()
    }
    report = {
        "rule": rule,
        "seed": seed,
        "limit": limit,
        "label_column": source.label_column,
        "official": {part.name: len(part.labels) for part in parts},
        "counts_before_limit": sizes,
        "counts": kept,
        "equality": found.identity,
        "duplicates": duplicates(side, official, labels, found.groups),
        "missing_classes": {
            split: [source.classes[c] for c in np.setdiff1d(np.arange(len(source.classes)), part.labels)]
            for split, part in splits.items()
        },
        "remarks": remarks,
    }
    revision = commit or f"content-{_content_hash(ids, labels)}"
    return Task(name, task_id, revision, source.classes, splits, report, found.channels, found.image_size)


def refuse_one_class(name: str, source: Source) -> None:
    """UsageError for images that are all of one class."""
    labels = np.concatenate([part.labels for part in source.splits])
    present = np.unique(labels)
    if len(present) < 2:
        raise UsageError(
            f"all {len(labels):,} images of {name} are of one class ('{source.classes[present[0]]}'); "
            "a task needs at least two"
        )


def _rows_with_shared_digest(digests: list[str]) -> list[int]:
    return [row for rows in repeated(digests) for row in rows]


def _content_hash(ids: np.ndarray, labels: np.ndarray) -> str:
    """A hash of all samples of a source, whatever the order of its rows."""
    lines = sorted(f"{sample} {label}" for sample, label in zip(ids.tolist(), labels.tolist(), strict=True))
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
