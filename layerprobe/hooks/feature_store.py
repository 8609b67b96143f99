"""Features on disk: one memory-mapped .npy file a layer, filled batch by batch, found again by key.

A folder holds `key.json` (what the features are), `<layer>.npy` for finished layers, and, while a run is under
way, `<layer>.npy.part` with `progress.json` (how many rows are on disk). A killed run continues at its last
finished batch. bfloat16 is stored as its 16-bit codes and read back as float32, which is exact.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError
from layerprobe.files import cache_root, cannot_write, read_json, write_json
from layerprobe.layers import LayerRef

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
        return self._path(layer).is_file()

    def read(self, layer: LayerRef) -> np.ndarray:
        """Rows × features (or rows × tokens × features), memory-mapped; bfloat16 comes as float32 in memory.

        Raises
        ------
        BrokenFileError
            The file is not what the key says.
        """
        path = self._path(layer)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BrokenFileError(
                f"cannot read features {path}: {error}; delete that file and run again"
            ) from error
        if array.shape[0] != self.n_rows or array.dtype != _STORED[self.dtype]:
            raise BrokenFileError(
                f"features {path} are {array.shape} {array.dtype}, expected {self.n_rows} rows of {self.dtype}; "
                "delete that file and run again"
            )
        if self.dtype == "bfloat16":
            return (np.asarray(array).astype(np.uint32) << 16).view(np.float32)
        return array

    @contextlib.contextmanager
    def writer(self, layers: Sequence[LayerRef], *, batch_size: int) -> Iterator[StoreWriter]:
        """Append batches to `layers`, where an earlier run stopped; other processes that want the store wait."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(self.folder / "key.json", {"key": self.key, "rows": self.n_rows, "dtype": self.dtype})
            writer = StoreWriter(self, [layer for layer in layers if not self.has(layer)], batch_size)
            try:
                yield writer
            finally:
                writer.close()

    def _path(self, layer: LayerRef) -> Path:
        return self.folder / f"{layer}.npy"

    def _part(self, layer: LayerRef) -> Path:
        return self.folder / f"{layer}.npy.part"


class StoreWriter:
    """Appends batches of rows; made by `FeatureStore.writer`. `rows` says how many are on disk already."""

    def __init__(self, store: FeatureStore, layers: list[LayerRef], batch_size: int) -> None:
        self.store = store
        self.layers = layers
        self._request = {"layers": [str(layer) for layer in layers], "batch_size": batch_size}
        self._files: dict[LayerRef, Any] = {}
        self.rows = self._resume()

    def _resume(self) -> int:
        path = self.store.folder / "progress.json"
        if not path.is_file() or not self.layers:
            return 0
        try:
            progress = read_json(path, what="progress")
            rows = progress.pop("rows")
        except (BrokenFileError, AttributeError, KeyError, TypeError):
            return 0
        if progress != self._request or not isinstance(rows, int) or not 0 < rows <= self.store.n_rows:
            return 0
        parts = {layer: self.store._part(layer) for layer in self.layers}
        if not all(part.is_file() for part in parts.values()):
            return 0
        for layer, part in parts.items():
            self._files[layer] = np.lib.format.open_memmap(part, mode="r+")
        return rows

    def append(self, batch: Mapping[LayerRef, np.ndarray]) -> None:
        """Write the next rows of every layer, then record that they are there.

        Raises
        ------
        LayerprobeError
            The disk is full or cannot be written; finished batches stay.
        """
        count = len(next(iter(batch.values())))
        try:
            for layer in self.layers:
                rows = batch[layer]
                if layer not in self._files:
                    self._files[layer] = self._create(layer, rows.shape[1:])
                self._files[layer][self.rows : self.rows + count] = rows
            self.rows += count
            self._record()
            if self.rows == self.store.n_rows:
                self._finish()
        except OSError as error:
            raise cannot_write(self.store.folder, error) from error

    def _create(self, layer: LayerRef, shape: tuple[int, ...]) -> np.memmap:
        part = self.store._part(layer)
        dtype = _STORED[self.store.dtype]
        needed = int(np.prod((self.store.n_rows, *shape))) * dtype.itemsize
        # A memory map on a full disk dies by a signal; taking the space first makes it an error instead.
        with part.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, needed + 4096)
        made: np.memmap = np.lib.format.open_memmap(
            part, mode="w+", dtype=dtype, shape=(self.store.n_rows, *shape)
        )
        return made

    def _record(self) -> None:
        path = self.store.folder / "progress.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({**self._request, "rows": self.rows}), encoding="utf-8")
        aside.replace(path)

    def _finish(self) -> None:
        for layer, array in self._files.items():
            array.flush()
            self.store._part(layer).replace(self.store._path(layer))
        self._files.clear()
        (self.store.folder / "progress.json").unlink(missing_ok=True)

    def close(self) -> None:
        """Flush what is there; unfinished parts stay for the next run."""
        for array in self._files.values():
            array.flush()
        self._files.clear()


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
    rows = []
    for path in sorted(root.glob("*/key.json")):
        entry = read_json(path, what="feature key")
        key = entry.get("key", {}) if isinstance(entry, dict) else {}
        backbone = key.get("backbone", {})
        rows.append(
            {
                "folder": path.parent.name,
                "model": backbone.get("model"),
                "init": backbone.get("init"),
                "task": key.get("task"),
                "split": key.get("split"),
                "rows": entry.get("rows"),
                "dtype": entry.get("dtype"),
                "layers": len(list(path.parent.glob("*.npy"))),
                "bytes": sum(item.stat().st_size for item in path.parent.iterdir() if item.is_file()),
                "unfinished": (path.parent / "progress.json").is_file(),
            }
        )
    return rows


def prune_stores(root: Path, folders: Sequence[str]) -> int:
    """Delete the named store folders; returns the bytes freed.

    Raises
    ------
    UsageError
        a name that is no store in `root`.
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
