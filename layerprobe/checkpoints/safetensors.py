"""One stored tensor, and the header of a safetensors file with every claim checked against the file.

The layout is the published one: 8 bytes little-endian header length, a JSON header, then the data.
The header is parsed here and not by the library, because a broken file must name its tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from layerprobe.checkpoints.view import View
from layerprobe.errors import BrokenFileError
from layerprobe.reading import open_file

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

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own reference implementation."""

_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_BLOCK_SCALED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
_OTHERS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64,
    **_BLOCK_SCALED,
}  # fmt: skip


class FlatEntries(Protocol):
    """Entries in row-major order that are made when a slice of them is taken."""

    size: int

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a file. `dtype` is torch's name ("bfloat16"), or the file's own where torch has none.

    `skip` says why the tensor cannot be measured (integers, packed codes); None for a weight.
    `alias_of` names the tensor whose storage this one shares, where the file itself says so. `view` says which
    entries of the stored tensor a part keeps; `offset` and `source` stay those of the whole. `source` is the flat
    array where the tensor is in memory (or mapped into it) already, or what stands for one. `stored_as` is the dtype
    of the codes where the entries are decoded from them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    skip: str | None = None
    alias_of: str | None = None
    stored_as: str | None = None
    view: View | None = None
    source: np.ndarray | FlatEntries | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def chunks(self, buffer: bytearray | memoryview | mmap.mmap) -> Iterator[np.ndarray]:
        """The entries in file order, as 1-D raw arrays that share `buffer`; copy what you keep.

        BrokenFileError names the file and the tensor where the file ends early or cannot be read.
        """
        dtype = np.dtype(RAW_DTYPES[self.dtype])
        view = memoryview(buffer)
        entries = len(view) // dtype.itemsize
        if self.source is not None:
            for first, count, kept in self._view().spans(entries):
                yield kept.take(self.source[first : first + count])
            return
        try:
            # Unbuffered, so that the bytes go straight into `buffer`.
            with self.file.open("rb", buffering=0) as stream:
                for first, count, kept in self._view().spans(entries):
                    yield kept.take(self._read(stream, view[: count * dtype.itemsize], first, dtype))
        except OSError as error:
            raise self.broken(error.strerror or str(error)) from error

    def _view(self) -> View:
        return self.view or View((self.size,), ((0, self.size),))

    def _read(self, stream: FileIO, target: memoryview, first: int, dtype: np.dtype[Any]) -> np.ndarray:
        begin = self.offset + first * dtype.itemsize
        stream.seek(begin)
        done = 0
        while done < len(target):
            got = stream.readinto(target[done:])
            if not got:
                raise self.broken(f"the file ends at byte {begin + done:,}")
            done += got
        return np.frombuffer(target, dtype=dtype)

    def part(self, label: str, view: View, shape: tuple[int, ...]) -> StoredTensor:
        """What `view` keeps, as a tensor of this shape that is named like the whole with `label` in brackets."""
        nbytes = view.size * np.dtype(RAW_DTYPES[self.dtype]).itemsize
        return replace(self, name=f"{self.name}[{label}]", shape=shape, nbytes=nbytes, view=view)

    def broken(self, reason: str) -> BrokenFileError:
        """The error for a tensor whose bytes cannot be read."""
        return BrokenFileError(f"cannot read tensor '{self.name}' from {self.file}: {reason}")


def read_safetensors(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises
    ------
    BrokenFileError
        A header longer than the file or not JSON; an unknown dtype; a shape that does not fit its bytes;
        offsets that overlap or leave the file (also: a truncated file).
    """
    header, start, size = _header(file)
    tensors = [
        _tensor(file, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end, before = start, ""
    for tensor in tensors:
        if tensor.offset < end:
            raise _broken(file, f"tensor '{tensor.name}' overlaps the bytes of tensor '{before}'")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    return tensors


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    try:
        with open_file(file, what="weights") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _broken(file, f"it has {size} bytes, not even a header length")
            (length,) = struct.unpack("<Q", prefix)
            if length > size - 8:
                raise _broken(file, f"its header claims {length:,} bytes, the file has {size:,}")
            if length > MAX_HEADER_BYTES:
                raise _broken(
                    file, f"its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
                )
            text = stream.read(length)
    except OSError as error:
        raise _broken(file, error.strerror or str(error)) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(file, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    return header, 8 + length, size


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _broken(file, f"its header names '{twice}' twice")
    return found


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int, size: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(code, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise _broken(file, f"the header's entry for tensor '{name}' is malformed") from None
    if code not in _FLOATS and code not in _OTHERS:
        raise _broken(file, f"tensor '{name}' has the unknown dtype '{code}'")
    dtype = _FLOATS.get(code, code)
    bits = _OTHERS[code] if code in _OTHERS else 8 * np.dtype(RAW_DTYPES[dtype]).itemsize
    count = math.prod(shape)
    if end < begin or (end - begin) * 8 != count * bits:
        raise _broken(
            file,
            f"tensor '{name}' of shape {list(shape)} and dtype {code} needs {count * bits // 8:,} bytes, "
            f"its offsets {begin:,} to {end:,} hold {end - begin:,}",
        )
    if start + end > size:
        raise _broken(
            file,
            f"tensor '{name}' ends at byte {start + end:,}, the file has {size:,}; it is truncated, "
            "download it again",
        )
    skip = None
    if code in _BLOCK_SCALED:
        skip = f"packed block-scaled codes ({code}) are no weights before their scales are applied"
    elif code in _OTHERS:
        skip = f"integer or packed tensor ({code}): quantised codes or indices, not floating-point weights"
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=_one(shape),
        file=file,
        offset=start + begin,
        nbytes=end - begin,
        skip=skip,
    )


@cache
def _one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One object for all tensors of a shape: a checkpoint may have hundreds of thousands."""
    return shape


def _broken(file: Path, reason: str) -> BrokenFileError:
    return BrokenFileError(f"cannot read {file}: {reason}")
