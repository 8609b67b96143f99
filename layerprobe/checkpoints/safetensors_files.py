"""Reading the header of a safetensors file, with every claim of the header checked against the file.

The layout is the published one: 8 bytes little-endian header length, a JSON header, then the data.
The header is parsed here and not by the library, because a broken file must name its tensor.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from layerprobe.checkpoints.tensors import StoredTensor
from layerprobe.errors import BrokenFileError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own reference implementation."""

_FLOATS = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
}
_OTHERS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "C64": 64,
}  # fmt: skip


def read_safetensors(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises
    ------
    BrokenFileError : a header longer than the file or not JSON; an unknown dtype; a shape that does not
        fit its bytes; offsets that overlap or leave the file (also: a truncated file).
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
        size = file.stat().st_size
        with file.open("rb") as stream:
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


def _tensor(file: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise _broken(file, f"the header's entry for tensor '{name}' is malformed") from None
    if code not in _FLOATS and code not in _OTHERS:
        raise _broken(file, f"tensor '{name}' has the unknown dtype '{code}'")
    dtype, bits = _FLOATS.get(code) or (code, _OTHERS[code])
    count = 1
    for extent in shape:
        count *= extent
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
    skip = None if code in _FLOATS else _why_skipped(code)
    return StoredTensor(name, dtype, shape, file, start + begin, end - begin, skip=skip)


def _why_skipped(code: str) -> str:
    if code in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"):
        return f"packed block-scaled codes ({code}) are no weights before their scales are applied"
    return f"integer or packed tensor ({code}): quantised codes or indices, not floating-point weights"


def _broken(file: Path, reason: str) -> BrokenFileError:
    return BrokenFileError(f"cannot read {file}: {reason}")
