"""What the bit patterns of the small float formats mean: code → float64 value, and bins of float32.

A code is the raw unsigned integer of 8 or 16 bits. Codes of 32-bit floats are grouped by their upper
16 bits, which gives 65,536 bins of at most 0.8 % relative width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

CODE_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@dataclass(frozen=True)
class CodeTable:
    """All codes of a format by ascending value: `codes[i]` covers the values `low[i]` to `high[i]`.

    Only finite codes are listed; `nan` and `inf` are masks over all codes. For the 8- and 16-bit formats
    `low` equals `high`; for float32 bins it does not.
    """

    n_codes: int
    codes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    nan: np.ndarray
    inf: np.ndarray


@cache
def code_table(dtype: str) -> CodeTable:
    """The table of one of `CODE_DTYPES`; KeyError for another name."""
    values = code_values(dtype)
    finite = np.isfinite(values)
    codes = np.flatnonzero(finite)
    codes = codes[np.argsort(values[codes], kind="stable")]
    sorted_values = values[codes]
    return CodeTable(len(values), codes, sorted_values, sorted_values, np.isnan(values), np.isinf(values))


@cache
def float32_bins() -> CodeTable:
    """The 65,536 bins of float32 by upper 16 bits. Bins that hold infinities and NaN are left out."""
    codes = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore"):
        near = codes.view(np.float32).astype(np.float64)
        far = (codes | np.uint32(0xFFFF)).view(np.float32).astype(np.float64)
    finite = np.isfinite(near) & np.isfinite(far)
    low, high = np.minimum(near, far), np.maximum(near, far)
    kept = np.flatnonzero(finite)
    # Ties exist only at zero (bins 0x0000 and 0x8000 touch there); negative first keeps `low` ascending.
    kept = kept[np.lexsort((high[kept], low[kept]))]
    nothing = np.zeros(1 << 16, dtype=bool)
    return CodeTable(1 << 16, kept, low[kept], high[kept], nothing, ~finite)


def decoded(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw codes (or float32 and float64 values) as a new float64 array; NaN and infinities stay."""
    if dtype not in CODE_DTYPES:
        return raw.astype(np.float64)
    return code_values(dtype)[raw]


@cache
def code_values(dtype: str) -> np.ndarray:
    """The float64 value of every code of one of `CODE_DTYPES`."""
    return _VALUES[dtype]()


def _float16() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


def _bfloat16() -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _float8(exponent_bits: int, bias: int) -> np.ndarray:
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    magnitude = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias))
    )
    return np.where(codes < 128, magnitude, -magnitude)


def _float8_e4m3fn() -> np.ndarray:
    values = _float8(4, 7)
    values[[0x7F, 0xFF]] = np.nan
    return values


def _float8_e5m2() -> np.ndarray:
    return (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16).astype(np.float64)


def _float8_e4m3fnuz() -> np.ndarray:
    values = _float8(4, 8)
    values[0x80] = np.nan
    return values


def _float8_e5m2fnuz() -> np.ndarray:
    values = _float8(5, 16)
    values[0x80] = np.nan
    return values


_VALUES = {
    "float16": _float16,
    "bfloat16": _bfloat16,
    "float8_e4m3fn": _float8_e4m3fn,
    "float8_e5m2": _float8_e5m2,
    "float8_e4m3fnuz": _float8_e4m3fnuz,
    "float8_e5m2fnuz": _float8_e5m2fnuz,
}
