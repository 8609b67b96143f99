"""Resized images on disk, so that commands on the same task and size decode each image once.

A folder holds `key.json` (of which images, resized how, and the shape of one), `pixels.bin` with one image a row, and
`rows.bin` with one whole number a row: 2³² plus the CRC-32 of the row's bytes, 0 where the row was never written. The
number is written after the bytes, and bytes that do not fit it are not read but decoded again. So processes may fill a
folder side by side, and a kill or a full disk at any moment costs no more than decoding.

Rows are read by position, not through a memory map: a file that was cut short or a failing disk is then an error of
one read instead of a signal, and pages that were read do not count as memory of this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np

from layerprobe.errors import LayerprobeError
from layerprobe.files import cache_root, read_json, write_json

LIMIT_GB = 20.0
"""Bytes of all folders together, unless $LAYERPROBE_PIXELS_GB says otherwise; 0 keeps nothing."""

MAX_SIDE = 4096
_WRITTEN = 1 << 32
_ROW = struct.Struct("<Q")


def limit_bytes() -> int:
    """How much the folders may take together."""
    try:
        return int(float(os.environ.get("LAYERPROBE_PIXELS_GB", LIMIT_GB)) * 1e9)
    except (ValueError, OverflowError):
        return 0


def pixels_root() -> Path:
    """Where the folders live."""
    return cache_root() / "pixels"


class PixelStore:
    """Resized images of one source, uint8 C×H×W, all of one shape.

    Parameters
    ----------
    key : str
        What decides the pixels: the content of the source and the way of resizing. Its hash names the folder.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.key = key
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:20]
        self._files: tuple[int, int] | None = None
        self.shape: tuple[int, ...] | None = None
        """Of one image; None where none was written yet."""
        self.full = False
        """Whether nothing more is written: the limit is reached, or the disk cannot be written."""
        self._open()

    def _open(self) -> None:
        try:
            noted = read_json(self.folder / "key.json", what="key of resized images")
            shape = tuple(int(extent) for extent in noted["shape"])
        except (LayerprobeError, KeyError, TypeError, ValueError):
            return
        if noted.get("key") != self.key or len(shape) != 3 or not all(0 < n <= MAX_SIDE for n in shape):
            return
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._files = (
                os.open(self.folder / "pixels.bin", flags, 0o644),
                os.open(self.folder / "rows.bin", flags, 0o644),
            )
            self.shape = shape
            os.utime(self.folder)  # which folders were used last decides which are deleted first

    def read(self, row: int) -> np.ndarray | None:
        """The image of a row; None where it is not there, whole."""
        if self._files is None or self.shape is None or not (noted := self._noted(row)):
            return None
        size = math.prod(self.shape)
        try:
            content = os.pread(self._files[0], size, row * size)
        except OSError:
            return None
        if len(content) != size or zlib.crc32(content) != noted - _WRITTEN:
            return None
        return np.frombuffer(content, np.uint8).reshape(self.shape)

    def has(self, row: int) -> bool:
        """Whether the row was written; `read` finds out whether it is whole."""
        return bool(self._noted(row))

    def _noted(self, row: int) -> int:
        try:
            noted = b"" if self._files is None else os.pread(self._files[1], _ROW.size, row * _ROW.size)
        except OSError:
            return 0
        return int(_ROW.unpack(noted)[0]) if len(noted) == _ROW.size else 0

    def write(self, row: int, image: np.ndarray) -> None:
        """Keep a row, where there is room; an image of another shape or type is not kept."""
        if self.full or image.dtype != np.uint8:
            return
        try:
            if self._files is None:
                write_json(self.folder / "key.json", {"key": self.key, "shape": list(image.shape)})
                self._open()
            if self._files is None or image.shape != self.shape:
                return
            content = np.ascontiguousarray(image).data.cast("B")
            _write_all(self._files[0], content, row * len(content))
            _write_all(self._files[1], _ROW.pack(_WRITTEN + zlib.crc32(content)), row * _ROW.size)
        except (OSError, LayerprobeError):  # a cache that cannot be written costs time, and nothing else
            self.full = True

    def make_room(self, n_rows: int, row_bytes: int) -> None:
        """Delete the folders used longest ago until `n_rows` more fit; `full` where they do not."""
        root, needed, limit = self.folder.parent, n_rows * row_bytes, limit_bytes()
        sizes = {folder: _bytes_of(folder) for folder in root.glob("*/") if folder.is_dir()}
        others = sorted((f for f in sizes if f != self.folder), key=lambda folder: folder.stat().st_mtime)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(root).free // 2
        except OSError:
            self.full = True
            return
        if sizes.get(self.folder, 0) + needed > limit:
            others = []  # deleting them would not help
        total = sum(sizes.values())
        while total + needed > limit and others:
            total -= sizes[others[0]]
            # Who reads them at this moment has the files open, and keeps them.
            shutil.rmtree(others.pop(0), ignore_errors=True)
        self.full = total + needed > limit or needed > room


def _write_all(file: int, content: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], offset + done)


def _bytes_of(folder: Path) -> int:
    """What the files take on the disk; rows never written take nothing."""
    with contextlib.suppress(OSError):
        return sum(512 * item.stat().st_blocks for item in folder.iterdir())
    return 0


def pixel_key(content: str, channels: int, resizing: str) -> str:
    """The key of the images of one source at one size."""
    return json.dumps({"images": content, "channels": channels, "resizing": resizing}, sort_keys=True)
