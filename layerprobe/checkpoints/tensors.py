"""One stored tensor: where its bytes lie and how to stream them through a reused buffer."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.errors import BrokenFileError

RAW_DTYPES: dict[str, str] = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<u2",
    "bfloat16": "<u2",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2fnuz": "u1",
}
"""Weight dtypes that can be measured, and the numpy dtype of the raw array: codes below 32 bits, else values."""

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is torch's name ("bfloat16"), or the file's own where torch has none.

    `skip` says why the tensor cannot be measured (integers, packed codes); None for a weight.
    `alias_of` names the tensor whose storage this one shares, where the file itself says so. `columns` is
    (width of the stored rows, first, last + 1) for a part of a matrix that is some of its columns.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    skip: str | None = None
    alias_of: str | None = None
    columns: tuple[int, int, int] | None = None
    source: Any = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of entries."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def chunks(self, buffer: bytearray | memoryview | mmap.mmap) -> Iterator[np.ndarray]:
        """The entries in file order, as 1-D raw arrays that share `buffer`; copy what you keep.

        Raises
        ------
        BrokenFileError : the file ends early or cannot be read; names the file and the tensor.
        """
        dtype = np.dtype(RAW_DTYPES[self.dtype])
        view = memoryview(buffer)
        room = len(view) // dtype.itemsize * dtype.itemsize
        if self.source is not None:
            yield from _slices(self.source, room // dtype.itemsize)
            return
        try:
            descriptor = os.open(self.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from error
        try:
            if self.columns is None:
                yield from self._stretch(descriptor, view[:room], dtype, self.nbytes)
            else:
                width, start, stop = self.columns
                rows = max(1, room // (width * dtype.itemsize))
                view = (
                    view
                    if rows * width * dtype.itemsize <= room
                    else memoryview(bytearray(width * dtype.itemsize))
                )
                room = rows * width * dtype.itemsize
                for chunk in self._stretch(
                    descriptor, view[:room], dtype, self.shape[0] * width * dtype.itemsize
                ):
                    yield np.ascontiguousarray(chunk.reshape(-1, width)[:, start:stop]).reshape(-1)
        finally:
            os.close(descriptor)

    def _stretch(
        self, descriptor: int, view: memoryview, dtype: np.dtype[Any], nbytes: int
    ) -> Iterator[np.ndarray]:
        for done in range(0, nbytes, len(view) or 1):
            target = view[: min(len(view), nbytes - done)]
            self._fill(descriptor, target, self.offset + done)
            yield np.frombuffer(target, dtype=dtype)

    def _fill(self, descriptor: int, target: memoryview, position: int) -> None:
        done = 0
        while done < len(target):
            try:
                got = os.preadv(descriptor, [target[done:]], position + done)
            except OSError as error:
                raise self._broken(error.strerror or str(error)) from error
            if got == 0:
                raise self._broken(f"the file ends at byte {position + done:,}")
            done += got

    def _broken(self, reason: str) -> BrokenFileError:
        return BrokenFileError(f"cannot read tensor '{self.name}' from {self.file}: {reason}")


def _slices(flat: np.ndarray, step: int) -> Iterator[np.ndarray]:
    for start in range(0, flat.size, step):
        yield flat[start : start + step]
