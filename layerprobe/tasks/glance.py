"""What a task's name and the heads of its files tell, before its images are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerprobe.errors import BrokenFileError
from layerprobe.tasks.catalog import TASKS
from layerprobe.tasks.columns import ColumnChoice, choose_columns
from layerprobe.tasks.idx import idx_shape
from layerprobe.tasks.images import ArrowImages, ImageStore
from layerprobe.tasks.loading import local_folder, refuse_one_class, split_column
from layerprobe.tasks.sources import (
    labels_beside,
    list_folder,
    parquet_splits,
    read_class_folders,
    read_schema,
    refuse_column,
)


@dataclass(frozen=True)
class Glance:
    """The little that is known of a task's images.

    Attributes
    ----------
    image_size : pixels per side; None where that is unknown, or `mixed`.
    mixed : the images are not squares of one size.
    certain : False where only the first image was looked at, which the others may not resemble.
    """

    image_size: int | None = None
    mixed: bool = False
    certain: bool = True


def glance_at_task(name: str, *, data_dir: str | Path | None = None) -> Glance:
    """Refuse a task that `load_task` would refuse at once, and tell the size of its images where that is cheap.

    A data set of the hub is neither downloaded nor looked up: an alias is known from the catalog, and of
    another `owner/name` nothing is.

    Raises
    ------
    UnknownNameError : no such task, folder or label column.
    UsageError : a folder without images, or with images of one class.
    BrokenFileError : a file whose head cannot be read.
    """
    base, column = split_column(name, None)
    entry = TASKS.get(base)
    choice = ColumnChoice(entry.image if entry else (), entry.label if entry else (), column)
    if (folder := local_folder(base, data_dir)) is not None:
        return _glance_at_folder(name, folder, choice)
    if entry is None:
        return Glance()
    if entry.origin == "package":
        refuse_column(base, choice)
    return Glance(entry.image_size, mixed=entry.image_size is None)


def _glance_at_folder(name: str, folder: Path, choice: ColumnChoice) -> Glance:
    kind, files = list_folder(folder, choice)
    if kind == "parquet":
        return _glance_at_parquet(files, folder if folder.is_dir() else folder.parent, choice)
    if kind == "idx":
        sides = set()
        for path in files:
            idx_shape(labels_beside(path), ndim=1)
            sides |= set(idx_shape(path, ndim=3)[1:])
        return Glance(sides.pop()) if len(sides) == 1 else Glance(mixed=True)
    source = read_class_folders(folder)
    refuse_one_class(name, source)
    return _of_first(source.splits[0].images)


def _glance_at_parquet(files: list[Path], root: Path, choice: ColumnChoice) -> Glance:
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_split, _ = parquet_splits(files, root)
    path = next(iter(by_split.values()))[0]
    column = choose_columns(read_schema(path), choice, str(root)).image
    try:
        head = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=[column]), None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BrokenFileError(f"cannot read {path}: {error}") from error
    if head is None or not len(head):
        return Glance()
    return _of_first(ArrowImages(pa.chunked_array([head.column(0)]), [(path.name, 1)]))


def _of_first(images: ImageStore) -> Glance:
    """By one image alone, since reading the heads of all may take as long as reading them."""
    height, width = images.pixels(0).shape[:2]
    return Glance(height, certain=False) if height == width else Glance(mixed=True)
