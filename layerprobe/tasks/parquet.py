"""Images and labels in Arrow tables: parquet files, and what the `datasets` library has loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerprobe.errors import (
    BrokenFileError,
    LayerprobeError,
    UnknownNameError,
    UsageError,
    did_you_mean,
    first_line,
)
from layerprobe.reading import check_plain, check_unpacked
from layerprobe.tasks.images import ArrowImages, ChosenImages, ImageStore
from layerprobe.tasks.split import SPLIT_WORDS, split_word
from layerprobe.tasks.task import NO_LABEL, Source, SourceSplit, fingerprint, labelled

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS_AT_ONCE = 64
IN_MEMORY_BYTES = 512 << 20
"""Parquet files up to this size together are read into memory; larger ones are memory-mapped as Arrow."""


_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


@dataclass(frozen=True)
class ColumnChoice:
    """What the caller knows beforehand: names to try, and what the user insists on."""

    image: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    wanted_label: str | None = None
    wanted_image: str | None = None
    class_names: list[str] | None = None


@dataclass(frozen=True)
class Columns:
    """The columns found, and the class names noted with the label column (None: not noted)."""

    image: str
    label: str
    class_names: list[str] | None


def choose_columns(schema: pa.Schema, choice: ColumnChoice, place: str) -> Columns:
    """Find the image and the label column in an Arrow schema, helped by its Hugging Face metadata."""
    features = _hub_features(schema)
    image = _choose_image(schema, features, choice, place)
    label = _choose_label(schema, features, choice, image, place)
    return Columns(image, label, choice.class_names or _class_names(features.get(label)))


def _choose_image(schema: pa.Schema, features: Mapping[str, object], choice: ColumnChoice, place: str) -> str:
    fits = [name for name in schema.names if _is_image(schema, name, features.get(name))]
    if choice.wanted_image is not None:
        if choice.wanted_image not in fits:
            raise UnknownNameError(
                f"{place} has no image column '{choice.wanted_image}'.{did_you_mean(choice.wanted_image, fits)} "
                f"Image columns: {', '.join(fits) or 'none'}"
            )
        return choice.wanted_image
    for name in (*choice.image, *_IMAGE_NAMES):
        if name in fits:
            return name
    if len(fits) == 1:
        return fits[0]
    problem = f"several image columns ({', '.join(fits)})" if fits else "no image column"
    raise UsageError(f"{place} has {problem}; its columns are {', '.join(schema.names)}")


def _choose_label(
    schema: pa.Schema, features: Mapping[str, object], choice: ColumnChoice, image: str, place: str
) -> str:
    fits = [name for name in schema.names if name != image and _is_label(schema, name)]
    if choice.wanted_label is not None:
        if choice.wanted_label not in fits:
            raise UnknownNameError(
                f"{place} has no label column '{choice.wanted_label}'."
                f"{_why_not(schema, choice.wanted_label)}{did_you_mean(choice.wanted_label, fits)} "
                f"Label columns: {', '.join(fits) or 'none'}"
            )
        return choice.wanted_label
    for name in choice.label:
        if name in fits:
            return name
    declared = [name for name in fits if _class_names(features.get(name)) is not None]
    usual = [name for name in _LABEL_NAMES if name in fits]
    spoilt = [name for name in _LABEL_NAMES if name in schema.names and name not in [*fits, image]]
    # A column that is declared as classes and called so, or one of the two where the other is open.
    agreed = [name for name in declared if name in usual] if declared and usual else declared or usual
    if len(agreed) == 1 and not spoilt:
        return agreed[0]
    raise UsageError(_ask_for_label(schema, fits, spoilt, place))


def _ask_for_label(schema: pa.Schema, fits: list[str], spoilt: list[str], place: str) -> str:
    """Why no label column was chosen, and what to do."""
    if spoilt:
        why = _why_not(schema, spoilt[0]).strip()
        rest = f" To take another: TASK:COLUMN, of {', '.join(fits)}" if fits else ""
        return f"{place} has no label column that can be used. {why}{rest}"
    if not fits:
        return (
            f"{place} has no label column (one whole number or text per image); "
            f"its columns are {', '.join(schema.names)}"
        )
    if len(fits) == 1:
        return f"no column of {place} is declared as class label; if it is '{fits[0]}', say so with TASK:{fits[0]}"
    return f"{place} has several label columns ({', '.join(fits)}); choose one with TASK:COLUMN"


def _why_not(schema: pa.Schema, name: str) -> str:
    """A sentence on a column that is there and holds no labels; else empty."""
    import pyarrow.types as types

    if name not in schema.names:
        return ""
    kind = schema.field(name).type
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return f" Its column '{name}' holds {'lists' if listed else kind}, but an image needs one class."


def _is_image(schema: pa.Schema, name: str, feature: object) -> bool:
    import pyarrow.types as types

    if isinstance(feature, dict) and feature.get("_type") == "Image":
        return True
    kind = schema.field(name).type
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(schema: pa.Schema, name: str) -> bool:
    import pyarrow.types as types

    kind = schema.field(name).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (types.is_integer, types.is_string, types.is_large_string, types.is_boolean)
    )


def _hub_features(schema: pa.Schema) -> dict[str, object]:
    """The `features` that the `datasets` library writes into a schema's metadata; {} where it did not."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _class_names(feature: object) -> list[str] | None:
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) and names else None


def column_values(column: pa.ChunkedArray) -> np.ndarray:
    """An Arrow label column as int64 (null is `NO_LABEL`) or as an object array of str or int (null is None)."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_integer(column.type) or types.is_boolean(column.type):
        try:
            return column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy().astype(np.int64)
        except pa.ArrowInvalid:  # unsigned numbers of 64 bits, hashes say
            return np.array(column.to_pylist(), dtype=object)
    try:
        return np.array(column.to_pylist(), dtype=object)
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"a text label is not valid UTF-8: {error}") from error


def read_parquet(paths: Sequence[Path], root: Path, choice: ColumnChoice) -> Source:
    """Parquet files in the hub's schema; the file's name, else its folder, says which split it is of."""
    import pyarrow as pa

    by_split, remarks = _files_by_split(paths, root)
    used = [path for files in by_split.values() for path in files]
    columns = choose_columns(_read_schema(used[0]), choice, str(root))
    in_memory = sum(check_plain(path, what="table").st_size for path in used) <= IN_MEMORY_BYTES
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


def first_parquet_image(paths: Sequence[Path], root: Path, choice: ColumnChoice) -> np.ndarray | None:
    """The first image of parquet files, decoded; None where the first file holds no row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next(iter(_files_by_split(paths, root)[0].values()))[0]
    column = choose_columns(_read_schema(path), choice, str(root)).image
    try:
        head = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=[column]), None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _broken_parquet(path, error) from error
    if head is None or not len(head):
        return None
    return ArrowImages(pa.chunked_array([head.column(0)]), [(path.name, 1)]).pixels(0)


def _files_by_split(paths: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split by their names, and remarks on what was left out."""
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


def _read_schema(path: Path) -> pa.Schema:
    """The Arrow schema of a parquet file; BrokenFileError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_plain(path, what="table")
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _broken_parquet(path, error) from error


def _read_columns(path: Path, columns: Columns, *, in_memory: bool) -> pa.Table:
    """The image and the label column of one file, held in memory or mapped from the `datasets` cache."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [columns.image, columns.label]
    schema = _read_schema(path)
    if missing := set(wanted) - set(schema.names):
        raise BrokenFileError(
            f"{path} has no column {', '.join(sorted(missing))}, unlike the files beside it"
        )
    noted = _class_names(_hub_features(schema).get(columns.label))
    if None not in (noted, columns.class_names) and noted != columns.class_names:
        raise BrokenFileError(
            f"{path} names the classes of '{columns.label}' otherwise than the files beside it"
        )
    if not in_memory:
        return _map_columns(path, wanted)
    try:
        # One file at a time: the data-set reader would take folder names for columns. And in pieces: a page may unpack
        # to thousands of times its size, and one value may stand in many rows.
        batches, unpacked = [], 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
            batches.append(batch.select(wanted).replace_schema_metadata(None))
            unpacked += batch.nbytes
            check_unpacked(unpacked, path)
        if not batches:
            return pq.ParquetFile(path).read(columns=wanted).select(wanted).replace_schema_metadata(None)
        return pa.Table.from_batches(batches)
    except LayerprobeError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _broken_parquet(path, error) from error


def _map_columns(path: Path, wanted: list[str]) -> pa.Table:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        mapped = datasets.load_dataset("parquet", data_files=str(path), split="train", columns=wanted)
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _broken_parquet(path, cause) from error
    return mapped.data.table.select(wanted).replace_schema_metadata(None)


def _broken_parquet(path: Path, error: Exception) -> BrokenFileError:
    return BrokenFileError(f"cannot read {path}: {first_line(error)}")


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


def from_datasets(
    splits: Mapping[str, datasets.Dataset], choice: ColumnChoice, place: str, *, follow_paths: bool = False
) -> Source:
    """Take over what `datasets` loaded, with its selections; its Arrow tables stay memory-mapped where they are."""
    first = next(iter(splits.values()))
    columns = choose_columns(first.features.arrow_schema, choice, place)
    known = [name for name in splits if name.lower() in SPLIT_WORDS]
    remarks = [f"split {name} was left out" for name in splits if known and name not in known]
    parts, values = [], []
    for name in known or splits:
        table, chosen = splits[name].data.table, splits[name]._indices
        store: ImageStore = ArrowImages(
            table.column(columns.image), [(f"{place} {name}", table.num_rows)], follow_paths=follow_paths
        )
        labels = column_values(table.column(columns.label))
        if chosen is not None:  # of `select`, `shuffle` and `train_test_split`
            rows = chosen.column(0).to_numpy()
            store, labels = ChosenImages(store, rows), labels[rows]
        parts.append(SourceSplit(SPLIT_WORDS.get(name.lower(), "all"), store))
        values.append(labels)
    source = labelled(parts, values, columns.class_names, place)
    source.remarks += remarks
    source.label_column = columns.label
    files = {name: [Path(file["filename"]) for file in splits[name].cache_files] for name in known or splits}
    if all(files.values()):
        # The same files may be behind several selections of their rows.
        states = [splits[name]._fingerprint for name in files]
        source.fingerprint = fingerprint(files, " ".join([columns.image, *states]))
    return source
