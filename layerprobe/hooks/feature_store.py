"""Features on disk: one .npy file a layer, filled batch by batch, found again by key.

A folder holds `key.json` (what the features are), `<layer>.npy` with an entry in `checksums.json` for finished
layers, and, while a run is under way, `<layer>.npy.part` with `progress.json` (how many rows are on disk, and their
checksums). A killed run continues at its last record. Rows that were never written cannot be read: a part gets its
name only when all its rows are on disk, and a file is read only where it fits its checksum. bfloat16 is stored as its
16-bit codes and read back as float32, which is exact.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError
from layerprobe.files import cache_root, cannot_write, read_json, sync, write_json
from layerprobe.hooks.store_records import (
    CHECKSUMS,
    PROGRESS,
    SCHEMA,
    FileSum,
    Progress,
    crc32_of,
    read_progress,
    read_sums,
)
from layerprobe.layers import LayerRef
from layerprobe.locks import open_lock
from layerprobe.reading import check_fields, check_plain

RECORD_SECONDS = 1.0
"""A kill loses no more than the batches of this time; each record waits for the disk."""
STRIPES = "stripes"
"""Folder of unfinished work that several processes share."""
FEATURE_DTYPES = ("float32", "float16", "bfloat16")
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def features_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where feature folders live: `cache_dir`, else `features/` in layerprobe's cache."""
    return Path(cache_dir) if cache_dir is not None else cache_root() / "features"


def check_store_dtype(dtype: str) -> None:
    """UsageError for what is not in `FEATURE_DTYPES`."""
    if dtype not in FEATURE_DTYPES:
        raise UsageError(f"features are stored as {', '.join(FEATURE_DTYPES)}; '{dtype}' is none of them")


class InUse(Exception):
    """Another process fills the store."""


class FeatureStore:
    """The features of one (model, task, split, pooling, dtype), layer by layer.

    Parameters
    ----------
    root : Path
        Folder of all stores.
    key : Mapping[str, Any]
        Plain values that decide the features; its hash names the folder.
    n_rows : int
        Images.
    dtype : str
        One of `FEATURE_DTYPES`.
    """

    def __init__(self, root: Path, key: Mapping[str, Any], *, n_rows: int, dtype: str) -> None:
        check_store_dtype(dtype)
        self.key = json.loads(json.dumps(dict(key), sort_keys=True, allow_nan=False))
        self.n_rows = n_rows
        self.dtype = dtype
        text = json.dumps([self.key, n_rows, dtype], sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:20]

    def has(self, layer: LayerRef) -> bool:
        """Whether the layer is there, whole."""
        return self._path(layer).is_file() and str(layer) in self.finished()

    def finished(self) -> dict[str, FileSum]:
        """What the finished files hold, by layer; a file without an entry here is not read."""
        return read_sums(self.folder)

    def read(self, layer: LayerRef) -> np.ndarray:
        """`stored`, with bfloat16 as float32 in memory."""
        array = self.stored(layer)
        if self.dtype == "bfloat16":
            return (np.asarray(array).astype(np.uint32) << 16).view(np.float32)
        return array

    def stored(self, layer: LayerRef) -> np.ndarray:
        """Rows × features (or rows × tokens × features) as they are on disk, memory-mapped.

        The whole file is held against its checksum first.

        Raises
        ------
        BrokenFileError
            The file is not what was written.
        """
        path = self._path(layer)
        noted = self.finished().get(str(layer))
        if noted is None:
            raise BrokenFileError(f"features {path} were never finished; run again")
        try:
            size = check_plain(path, what="features", inside=self.folder).st_size
            damaged = size != noted.size or crc32_of(path, size) != noted.crc32
            array = None if damaged else np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BrokenFileError(
                f"cannot read features {path}: {error}; delete that file and run again"
            ) from error
        if array is None:
            raise BrokenFileError(
                f"features {path} are damaged: {size:,} bytes that do not fit the checksum of the {noted.size:,} "
                "written; delete that file and run again"
            )
        if array.shape != (self.n_rows, *noted.row) or array.dtype != _STORED[self.dtype]:
            raise BrokenFileError(
                f"features {path} are {array.shape} {array.dtype}, expected {(self.n_rows, *noted.row)} "
                f"{self.dtype}; delete that file and run again"
            )
        return array

    @contextlib.contextmanager
    def writer(
        self, layers: Sequence[LayerRef], *, batch_size: int, wait: bool = True
    ) -> Iterator[StoreWriter]:
        """Append batches to `layers`, where an earlier run stopped.

        An earlier run that was stopped between its last batch and its end is brought to its end first. Where another
        process has the store, wait for it or, with False, raise `InUse`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(open_lock(self.folder / "lock"), "rb")
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            lock.close()
            raise InUse from error
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        with lock:
            write_json(self.folder / "key.json", {"key": self.key, "rows": self.n_rows, "dtype": self.dtype})
            self.finish()
            writer = StoreWriter(self, [layer for layer in layers if not self.has(layer)], batch_size)
            try:
                yield writer
            finally:
                writer.close()

    def finish(self) -> None:
        """Turn parts whose rows are all there into finished layers; may be stopped anywhere, and done again.

        The checksums are noted before the files get their names, and the record of progress goes last.
        """
        progress = self.progress()
        if progress is None or progress.rows != self.n_rows:
            return
        try:
            sums = {**self.finished(), **progress.sums}
            layers = {name: one._asdict() for name, one in sums.items()}
            write_json(self.folder / CHECKSUMS, {"schema": SCHEMA, "layers": layers})
            for name in progress.sums:
                part = self.folder / f"{name}.npy.part"
                if part.is_file():
                    part.replace(self.folder / f"{name}.npy")
            sync(self.folder)
            (self.folder / PROGRESS).unlink()
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def progress(self) -> Progress | None:
        """The unfinished work on disk; None where there is none, or where its record is none of this store's."""
        found = read_progress(self.folder)
        return (
            found
            if found is not None and all(self._fits(one, found.rows) for one in found.sums.values())
            else None
        )

    def _fits(self, one: FileSum, rows: int) -> bool:
        """Whether a part with that many rows of this shape has that size."""
        content = rows * math.prod(one.row) * _STORED[self.dtype].itemsize
        return 0 < content < one.size and one.size - content == len(self._header(one.row))

    def _header(self, row: tuple[int, ...]) -> bytes:
        """What a file of such rows begins with."""
        header = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(_STORED[self.dtype]),
            "fortran_order": False,
            "shape": (self.n_rows, *row),
        }
        np.lib.format.write_array_header_1_0(header, described)
        return header.getvalue()

    def _path(self, layer: LayerRef) -> Path:
        return self.folder / f"{layer}.npy"


class StoreWriter:
    """Appends batches of rows; made by `FeatureStore.writer`. `rows` says how many are on disk already."""

    def __init__(self, store: FeatureStore, layers: list[LayerRef], batch_size: int) -> None:
        self.store = store
        self.layers = layers
        self.rows = 0
        self._batch_size = batch_size
        self._files: dict[LayerRef, IO[bytes]] = {}
        self._sums: dict[LayerRef, FileSum] = {}
        self._recorded = 0, time.monotonic()
        try:
            self._resume()
        except OSError as error:
            raise cannot_write(store.folder, error) from error

    def _resume(self) -> None:
        """Open the parts of an earlier run behind their last recorded row, or clear them away."""
        found = self.store.progress()
        same = found is not None and (found.batch_size, [*found.sums]) == (
            self._batch_size,
            [str(layer) for layer in self.layers],
        )
        if self.layers and found is not None and same and 0 < found.rows < self.store.n_rows:
            self._sums = {layer: found.sums[str(layer)] for layer in self.layers}
            parts = {layer: self._part(layer) for layer in self.layers}
            # Whatever came between, a kill or a loss of power: these are the bytes that were written, or none.
            if all(
                part.is_file() and crc32_of(part, self._sums[layer].size) == self._sums[layer].crc32
                for layer, part in parts.items()
            ):
                self.rows = found.rows
                self._recorded = self.rows, time.monotonic()
                for layer, part in parts.items():
                    self._files[layer] = part.open("rb+", buffering=0)
                    self._files[layer].seek(self._sums[layer].size)
                return
            self._sums = {}
        # The record goes before the parts that it speaks of.
        (self.store.folder / PROGRESS).unlink(missing_ok=True)
        for part in self.store.folder.glob("*.npy.part"):
            part.unlink()

    def append(self, batch: Mapping[LayerRef, np.ndarray]) -> None:
        """Write the next rows of every layer; that they are there is recorded at least once a second.

        Raises
        ------
        LayerprobeError
            The disk is full or cannot be written; recorded batches stay.
        """
        count = len(next(iter(batch.values())))
        sums = dict(self._sums)
        try:
            for layer in self.layers:
                rows = np.ascontiguousarray(batch[layer], dtype=_STORED[self.store.dtype])
                if layer not in sums:
                    sums[layer] = self._create(layer, rows.shape[1:])
                if rows.shape != (count, *sums[layer].row):
                    raise ValueError(f"{layer}: {rows.shape} does not continue rows of {sums[layer].row}")
                sums[layer] = self._write(layer, rows.reshape(-1).view(np.uint8).data, sums[layer])
            self._sums = sums
            self.rows += count
            if self.rows == self.store.n_rows or time.monotonic() - self._recorded[1] >= RECORD_SECONDS:
                self._record()
            if self.rows == self.store.n_rows:
                self._close_files()
                self.store.finish()
        except OSError as error:
            raise cannot_write(self.store.folder, error) from error

    def _create(self, layer: LayerRef, row: tuple[int, ...]) -> FileSum:
        """Begin a part with its header; what it holds then."""
        header = self.store._header(row)
        stream = self._files[layer] = self._part(layer).open("wb", buffering=0)
        if hasattr(
            os, "posix_fallocate"
        ):  # a disk too small for all rows is found before the first is computed
            row_bytes = math.prod(row) * _STORED[self.store.dtype].itemsize
            needed = len(header) + self.store.n_rows * row_bytes
            try:
                os.posix_fallocate(stream.fileno(), 0, needed)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        return self._write(layer, memoryview(header), FileSum(row, 0, 0))

    def _write(self, layer: LayerRef, content: memoryview, before: FileSum) -> FileSum:
        done = 0
        while done < len(content):
            done += self._files[layer].write(content[done:])
        return FileSum(before.row, before.size + len(content), zlib.crc32(content, before.crc32))

    def _record(self) -> None:
        for stream in self._files.values():
            os.fsync(stream.fileno())
        layers = {str(layer): one._asdict() for layer, one in self._sums.items()}
        record = {"batch_size": self._batch_size, "rows": self.rows, "layers": layers}
        write_json(self.store.folder / PROGRESS, record, indent=None)
        self._recorded = self.rows, time.monotonic()

    def _part(self, layer: LayerRef) -> Path:
        return self.store.folder / f"{layer}.npy.part"

    def _close_files(self) -> None:
        for stream in self._files.values():
            stream.close()
        self._files.clear()

    def close(self) -> None:
        """Record what is there, where that can be written; unfinished parts stay for the next run."""
        if self._files and self.rows > self._recorded[0]:
            with contextlib.suppress(OSError, LayerprobeError):
                self._record()
        self._close_files()


def encode(values: Any, dtype: str) -> np.ndarray:
    """A torch tensor on any device as the array that is stored: one copy out."""
    import torch

    if dtype == "bfloat16":
        codes: np.ndarray = values.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        return codes.view(np.uint16)
    array: np.ndarray = values.to(getattr(torch, dtype)).cpu().numpy()
    return array


def list_stores(root: Path) -> list[dict[str, Any]]:
    """One row a store: folder, model, task, split, finished layers, bytes, whether unfinished work is there."""
    return [_store_row(path.parent) for path in sorted(root.glob("*/key.json"))]


def _store_row(folder: Path) -> dict[str, Any]:
    entry = check_fields(
        read_json(folder / "key.json", what="feature key"),
        {"key": dict, "rows": int, "dtype": str},
        folder / "key.json",
    )
    key = entry["key"]
    backbone = key.get("backbone")
    described = backbone if isinstance(backbone, dict) else {}
    sums = read_sums(folder)
    return {
        "folder": folder.name,
        "model": described.get("model"),
        "init": described.get("init"),
        "task": key.get("task"),
        "split": key.get("split"),
        "rows": entry["rows"],
        "dtype": entry["dtype"],
        "layers": sum((folder / f"{name}.npy").is_file() for name in sums),
        "bytes": sum(item.stat().st_size for item in folder.rglob("*") if item.is_file()),
        "unfinished": (folder / PROGRESS).is_file() or (folder / STRIPES).is_dir(),
    }


def prune_stores(root: Path, folders: Sequence[str]) -> int:
    """Delete the named store folders; returns the bytes freed.

    Raises
    ------
    UsageError
        A name that is no store in `root`.
    """
    known = {row["folder"]: row["bytes"] for row in list_stores(root)}
    freed = 0
    for name in folders:
        if name not in known:
            raise UsageError(f"no feature store '{name}' in {root}; see: layerprobe ls features")
        try:
            shutil.rmtree(root / name)
        except OSError as error:
            raise LayerprobeError(f"cannot delete {root / name}: {error.strerror}") from error
        freed += known[name]
    return freed
