"""IDX files, the format of MNIST and its relatives, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from layerprobe.errors import BrokenFileError

MAX_BYTES = 8 << 30
_UINT8 = 0x08
# Deflate cannot pack more than about 1032 bytes into one, which bounds what a gzip file may hold.
_MAX_DEFLATE_RATIO = 1040


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    The header's claim is held against the size of the file before anything is allocated.

    Parameters
    ----------
    path : file; gzipped when its first bytes say so, whatever its name.
    ndim : number of dimensions it must have: 3 for images, 1 for labels.

    Returns
    -------
    uint8 array with the shape in the header.

    Raises
    ------
    BrokenFileError : another format, or fewer or more bytes than the header announces.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            shape = _read_shape(stream.read(4 + 4 * ndim), path, ndim)
            expected = math.prod(shape)
            available = size * _MAX_DEFLATE_RATIO if zipped else size - 4 - 4 * ndim
            if expected > min(available, MAX_BYTES) or (not zipped and expected != available):
                raise BrokenFileError(
                    f"{path} announces {_times(shape)} = {expected:,} bytes, "
                    f"but the file has {size:,}; it is truncated or damaged"
                )
            content = stream.read(expected)
            surplus = stream.read(1)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BrokenFileError(f"cannot read {path}: {reason}") from error
    if len(content) != expected or surplus:
        found = f"{len(content):,}" if len(content) < expected else "more"
        raise BrokenFileError(
            f"{path} announces {_times(shape)} = {expected:,} bytes but holds {found}; it is truncated or damaged"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def idx_shape(path: Path, *, ndim: int) -> tuple[int, ...]:
    """The shape that the header of an IDX file announces; nothing else is read."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            return _read_shape(stream.read(4 + 4 * ndim), path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BrokenFileError(f"cannot read {path}: {reason}") from error


def _read_shape(header: bytes, path: Path, ndim: int) -> tuple[int, ...]:
    if len(header) < 4 + 4 * ndim or header[:2] != b"\0\0" or header[2] != _UINT8 or header[3] != ndim:
        raise BrokenFileError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} dimension{'s' * (ndim > 1)}"
            f" (it starts with {header[:4].hex(' ') or 'nothing'})"
        )
    return struct.unpack(f">{ndim}I", header[4:])


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(f"{extent:,}" for extent in shape)
