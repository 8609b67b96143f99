"""What a feature store writes down beside its arrays: checksums of finished files, and how far a run has come."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from layerprobe.errors import LayerprobeError, UsageError
from layerprobe.files import read_json
from layerprobe.layers import LayerRef
from layerprobe.reading import open_file

PROGRESS = "progress.json"
CHECKSUMS = "checksums.json"
SCHEMA = "layerprobe.feature-checksums/v1"
_PIECE = 1 << 20


class FileSum(NamedTuple):
    """What a file must be: the shape of a row, bytes, and CRC-32 of these bytes."""

    row: tuple[int, ...]
    size: int
    crc32: int

    @classmethod
    def of(cls, entry: Mapping[str, object]) -> FileSum:
        """ValueError, TypeError or KeyError for anything that `_asdict` did not make."""
        row, size, crc32 = entry["row"], entry["size"], entry["crc32"]
        if not (isinstance(row, list) and isinstance(size, int) and isinstance(crc32, int)):
            raise ValueError("no checksum of a file")
        return cls(tuple(int(extent) for extent in row), size, crc32)


class Progress(NamedTuple):
    """How many rows are on disk, in batches of which size, and what each part holds up to there."""

    rows: int
    batch_size: int
    sums: dict[str, FileSum]


def read_sums(folder: Path) -> dict[str, FileSum]:
    """Entries that cannot be read are none: their features are computed again."""
    try:
        layers = read_json(folder / CHECKSUMS, what="checksums")["layers"]
        return {str(LayerRef.parse(name)): FileSum.of(entry) for name, entry in layers.items()}
    except (LayerprobeError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def crc32_of(path: Path, size: int) -> int:
    """Of the first `size` bytes, read in pieces: pages of a memory map would count as memory of this process."""
    crc = 0
    with open_file(path, what="features") as stream:
        while size > 0 and (piece := stream.read(min(size, _PIECE))):
            crc = zlib.crc32(piece, crc)
            size -= len(piece)
    return crc


def read_progress(folder: Path) -> Progress | None:
    """The unfinished work in a store; None where there is none, or where its record cannot be read."""
    try:
        content = read_json(folder / PROGRESS, what="progress")
        rows, batch_size = int(content["rows"]), int(content["batch_size"])
        sums = {str(LayerRef.parse(name)): FileSum.of(entry) for name, entry in content["layers"].items()}
    except (LayerprobeError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return Progress(rows, batch_size, sums)


EXPORTED = (".safetensors", ".npy")


def check_export(path: Path) -> None:
    """UsageError for a format that features are not exported to."""
    if path.suffix not in EXPORTED:
        raise UsageError(f"cannot tell the format of {path}: end it with {' or '.join(EXPORTED)}")
