"""Where images and labels come from on this machine: a folder, or a package. Nothing is cut here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError
from layerprobe.tasks.columns import (
    ColumnChoice,
    Columns,
    choose_columns,
    class_names,
    column_values,
    number_labels,
)
from layerprobe.tasks.idx import read_idx
from layerprobe.tasks.images import SUFFIXES, ArrayImages, ArrowImages, FileImages, ImageStore

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "t10k": "test",
}
"""How files and folders call their splits, and how layerprobe does."""

FINGERPRINT_VERSION = 1
"""Raised whenever ids or the comparison of images change their meaning."""

IN_MEMORY_BYTES = 1 << 30
"""Parquet files up to this size together are read into memory; larger ones are memory-mapped as Arrow."""


@dataclass
class SourceSplit:
    """One split as the source has it; `name` is "all" where the source knows no splits."""

    name: str
    images: ImageStore
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass
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


def fingerprint(parts: Mapping[str, Sequence[Path]], what: str = "") -> str:
    """Of files in their order, by path, size and times; `what` is read from them (a column, say)."""
    digest = hashlib.blake2b(f"{FINGERPRINT_VERSION} {what}".encode(), digest_size=16)
    for name, paths in parts.items():
        for path in paths:
            facts = path.stat()
            stamp = f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
            digest.update(f"{name} {path.resolve()} {stamp}\n".encode())
    return digest.hexdigest()


def read_digits(choice: ColumnChoice) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, 8×8, their 0 to 16 scaled to 0 to 255."""
    refuse_column("digits", choice)
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    split = SourceSplit("all", ArrayImages(pixels, "digits"), data.target.astype(np.int64))
    return Source([split], [str(name) for name in data.target_names])


def read_folder(folder: Path, choice: ColumnChoice) -> Source:
    """Read a folder of parquet files, of IDX files, or of class folders; whichever it holds.

    Raises
    ------
    UnknownNameError : no such folder.
    UsageError : nothing in it that is known, or a column that does not exist.
    BrokenFileError : a file that cannot be read.
    """
    kind, files = list_folder(folder, choice)
    if kind == "parquet":
        return read_parquet(files, folder if folder.is_dir() else folder.parent, choice)
    return read_idx_folder(files) if kind == "idx" else read_class_folders(folder)


def list_folder(folder: Path, choice: ColumnChoice) -> tuple[str, list[Path]]:
    """What a folder seems to hold, "parquet", "idx" or "classes", and the files of the first two.

    Raises
    ------
    UnknownNameError : no such folder.
    UsageError : a label column was chosen where there are no columns.
    """
    if folder.is_file() and folder.suffix == ".parquet":
        return "parquet", [folder]
    if not folder.is_dir():
        raise UnknownNameError(f"no folder {folder}; check the path, or see: layerprobe ls tasks")
    if parquet := sorted(path for path in folder.rglob("*.parquet") if path.is_file()):
        return "parquet", parquet
    refuse_column(str(folder), choice)
    idx = sorted(path for path in folder.iterdir() if re.search(r"images[-.]idx3-ubyte", path.name))
    return ("idx", idx) if idx else ("classes", [])


def refuse_column(place: str, choice: ColumnChoice) -> None:
    """UsageError for a label column chosen where labels come without columns."""
    if choice.wanted_label is not None:
        raise UsageError(f"{place} has no label columns, so '{choice.wanted_label}' cannot be chosen")


def split_word(name: str) -> str | None:
    """The split that a file or folder name speaks of, if it does."""
    for word in re.split(r"[^a-z0-9]+", name.lower()):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None


def read_parquet(paths: Sequence[Path], root: Path, choice: ColumnChoice) -> Source:
    """Parquet files in the hub's schema; the file's name, else its folder, says which split it is of."""
    import pyarrow as pa

    by_split, remarks = parquet_splits(paths, root)
    used = [path for files in by_split.values() for path in files]
    columns = choose_columns(read_schema(used[0]), choice, str(root))
    in_memory = sum(path.stat().st_size for path in used) <= IN_MEMORY_BYTES
    splits, values = [], []
    for word, files in by_split.items():
        tables = [_read_columns(path, columns, in_memory=in_memory) for path in files]
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowException as error:
            raise BrokenFileError(f"the files of split {word} in {root} differ in schema") from error
        pieces = [(path.name, part.num_rows) for path, part in zip(files, tables, strict=True)]
        splits.append(SourceSplit(word, ArrowImages(table.column(columns.image), pieces)))
        values.append(column_values(table.column(columns.label)))
    source = labelled(splits, values, columns.class_names, str(root))
    source.fingerprint = fingerprint(by_split, columns.image)
    source.label_column = columns.label
    source.remarks += remarks
    return source


def parquet_splits(paths: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split by their names, and remarks on what was left out.

    Raises
    ------
    UsageError : several data sets. BrokenFileError : a shard that is named and missing.
    """
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        word = split_word(path.stem) or split_word(path.relative_to(root).parent.as_posix()) or "all"
        by_split.setdefault(word, []).append(path)
    remarks = []
    if "all" in by_split and len(by_split) > 1:
        unnamed = by_split.pop("all")
        which = f"{unnamed[0].name}{' and others' if len(unnamed) > 1 else ''}, of no named split,"
        if "train" in by_split:
            remarks.append(f"{which} left out")
        else:
            by_split["train"] = unnamed
            remarks.append(f"{which} taken as train")
    for files in by_split.values():
        _check_one_data_set(files, root)
        _check_shards(files)
    return by_split, remarks


def read_schema(path: Path) -> Any:
    """The Arrow schema of a parquet file; BrokenFileError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _broken_parquet(path, error) from error


def _read_columns(path: Path, columns: Columns, *, in_memory: bool) -> Any:
    """The image and the label column of one file, held in memory or mapped from the `datasets` cache."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [columns.image, columns.label]
    schema = read_schema(path)
    if missing := set(wanted) - set(schema.names):
        raise BrokenFileError(
            f"{path} has no column {', '.join(sorted(missing))}, unlike the files beside it"
        )
    noted = class_names(schema, columns.label)
    if None not in (noted, columns.class_names) and noted != columns.class_names:
        raise BrokenFileError(
            f"{path} names the classes of '{columns.label}' otherwise than the files beside it"
        )
    if not in_memory:
        return _map_columns(path, wanted)
    try:
        # One file at a time: the data-set reader would take folder names for columns.
        return pq.ParquetFile(path).read(columns=wanted).select(wanted).replace_schema_metadata(None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _broken_parquet(path, error) from error


def _map_columns(path: Path, wanted: list[str]) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        mapped = datasets.load_dataset("parquet", data_files=str(path), split="train", columns=wanted)
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _broken_parquet(path, cause) from error
    return mapped.data.table.select(wanted).replace_schema_metadata(None)


def _broken_parquet(path: Path, error: Exception) -> BrokenFileError:
    return BrokenFileError(f"cannot read {path}: {str(error).splitlines()[0] if str(error) else error!r}")


def _check_one_data_set(files: Sequence[Path], root: Path) -> None:
    folders = sorted({path.relative_to(root).parent.as_posix() for path in files})
    if len(folders) > 1:
        raise UsageError(
            f"{root} holds several data sets ({', '.join(folders)}); name one of these folders instead"
        )


def _check_shards(files: Sequence[Path]) -> None:
    """A name that says 00000-of-00002 promises its siblings; half a data set is not a data set."""
    for path in files:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(.*)", path.name):
            stem, _, total, tail = match.groups()
            for number in range(int(total)):
                sibling = path.with_name(f"{stem}{number:0{len(total)}d}-of-{total}{tail}")
                if sibling not in files:
                    raise BrokenFileError(
                        f"{path.name} is here, but {sibling} is not; the data set is incomplete"
                    )


def read_idx_folder(images: Sequence[Path]) -> Source:
    """IDX files named as in MNIST: …-images-idx3-ubyte beside …-labels-idx1-ubyte, gzipped or not."""
    splits: dict[str, SourceSplit] = {}
    values = []
    for path in images:
        word = split_word(path.name) or "all"
        if word in splits:
            if path.with_suffix("") in images or path.with_name(path.name + ".gz") in images:
                continue  # the same file, packed and unpacked
            raise UsageError(
                f"{path.parent} holds several IDX files of split {word}; keep one data set a folder"
            )
        pixels = read_idx(path, ndim=3)
        labels_path = labels_beside(path)
        labels = read_idx(labels_path, ndim=1)
        if len(labels) != len(pixels):
            raise BrokenFileError(
                f"{path} holds {len(pixels):,} images, {labels_path.name} {len(labels):,} labels"
            )
        splits[word] = SourceSplit(word, ArrayImages(pixels, path.name))
        values.append(labels.astype(np.int64))
    return labelled(list(splits.values()), values, None, str(images[0].parent))


def labels_beside(path: Path) -> Path:
    """The labels of an IDX file of images; UsageError where there are none."""
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", path.name)
    plain = name.removesuffix(".gz")
    for candidate in (name, plain, f"{plain}.gz"):
        if (found := path.with_name(candidate)).is_file():
            return found
    raise UsageError(f"{path} has no labels beside it; {name} was looked for")


def read_class_folders(root: Path) -> Source:
    """Images in train/CLASS/…, test/CLASS/… or simply CLASS/…; classes are numbered by name."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_split = {path: SPLIT_WORDS.get(path.name.lower()) for path in folders}
    if any(by_split.values()):
        parts = [(word, path) for path, word in by_split.items() if word]
    else:
        parts = [("all", root)]
    remarks = [f"{path.name}/ is no split and was left out" for path, word in by_split.items() if not word]
    splits, values, files = [], [], {}
    for word, part in parts:
        paths: list[Path] = []
        classes: list[str] = []
        for folder in sorted(
            path for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")
        ):
            inside = sorted(
                Path(parent, name)
                for parent, _, names in os.walk(folder)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            )
            if not inside:
                remarks.append(f"{folder.relative_to(root).as_posix()}/ holds no images and was left out")
            paths += inside
            classes += [folder.name] * len(inside)
        if paths:
            names = [path.relative_to(part).as_posix() for path in paths]
            splits.append(SourceSplit(word, FileImages(paths, names)))
            files[word] = paths
            values.append(np.array(classes, dtype=object))
    if not splits:
        raise UsageError(
            f"no images in {root}: looked for parquet files, IDX files (…-images-idx3-ubyte, also .gz) "
            "and class folders (train/CLASS/x.png or CLASS/x.png)"
        )
    source = labelled(splits, values, None, str(root))
    source.fingerprint = fingerprint(files)
    source.remarks += remarks if any(by_split.values()) else [r for r in remarks if "is no split" not in r]
    return source


def labelled(
    splits: list[SourceSplit], values: list[np.ndarray], names: list[str] | None, place: str
) -> Source:
    """Number the labels, and leave out splits whose labels are withheld (as in ImageNet's test set)."""
    numbered, classes = number_labels(values, names, place)
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
    return Source(kept, classes, remarks)
