"""The counting loops compiled by numba. Imported only when that engine is chosen."""

from __future__ import annotations

import numba
import numpy as np

from layerprobe.metrics.outlier_moments import Moments

_BLOCK = 4096


class NumbaEngine:
    """Counts with compiled loops that release the interpreter lock."""

    name = "numba"

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> int:
        mask = 0x7F if chunk.dtype == np.uint8 else 0x7FFF
        return int(_count_codes(chunk, counts, chunk.dtype.type(mask)))

    def in_code_order(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def float32(self, chunk: np.ndarray, counts: np.ndarray) -> tuple[int, Moments, float]:
        largest, n, mean, m2, m3, m4, magnitude = _count_float32(chunk, chunk.view(np.uint32), counts)
        return int(largest), Moments(int(n), mean, m2, m3, m4), magnitude

    def low_halves(self, chunk: np.ndarray, slot: np.ndarray, low: np.ndarray) -> None:
        _count_low(chunk.view(np.uint32), slot, low)

    def flush(self, low: np.ndarray) -> None:
        pass


@numba.njit(nogil=True, cache=True)
def _count_codes(chunk, counts, mask):
    largest = mask & chunk[0]
    for start in range(0, chunk.size, _BLOCK):
        stop = min(start + _BLOCK, chunk.size)
        # A loop of its own, because the compiler turns it into vector instructions.
        for i in range(start, stop):
            largest = max(largest, chunk[i] & mask)
        for i in range(start, stop):
            counts[chunk[i]] += 1
    return largest


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _central_sums(values, mean):
    m2 = m3 = m4 = 0.0
    for i in range(values.size):
        d = np.float64(values[i]) - mean
        s = d * d
        m2 += s
        m3 += s * d
        m4 += s * s
    return m2, m3, m4


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _plain_sums(values):
    total = magnitude = 0.0
    for i in range(values.size):
        total += np.float64(values[i])
        magnitude += np.float64(abs(values[i]))
    return total, magnitude


@numba.njit(nogil=True, cache=True)
def _largest_bits(bits):
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return largest


@numba.njit(nogil=True, cache=True)
def _count_float32(chunk, bits, counts):
    largest = np.uint32(0)
    n = 0
    mean = m2 = m3 = m4 = magnitude = 0.0
    for start in range(0, chunk.size, _BLOCK):
        stop = min(start + _BLOCK, chunk.size)
        values = chunk[start:stop]
        top = _largest_bits(bits[start:stop])
        largest = max(largest, top)
        if top >= np.uint32(0x7F800000):
            values = values[np.isfinite(values)]
        for i in range(start, stop):
            counts[bits[i] >> np.uint32(16)] += 1
        b = values.size
        if b == 0:
            continue
        total, absolute = _plain_sums(values)
        magnitude += absolute
        here = total / b
        s2, s3, s4 = _central_sums(values, here)
        # The merging of `Moments.merge`, here for one block of entries.
        a = n
        n = a + b
        fa, fb, fn = float(a), float(b), float(n)
        delta = here - mean
        step = delta / fn
        m4 += (
            s4
            + delta * step * step * step * fa * fb * (fa * fa - fa * fb + fb * fb)
            + 6 * step * step * (fa * fa * s2 + fb * fb * m2)
            + 4 * step * (fa * s3 - fb * m3)
        )
        m3 += s3 + delta * step * step * fa * fb * (fa - fb) + 3 * step * (fa * s2 - fb * m2)
        m2 += s2 + delta * step * fa * fb
        mean += step * fb
    return largest, n, mean, m2, m3, m4, magnitude


@numba.njit(nogil=True, cache=True)
def _count_low(bits, slot, low):
    for i in range(bits.size):
        row = slot[bits[i] >> np.uint32(16)]
        if row >= 0:
            low[row, bits[i] & np.uint32(0xFFFF)] += 1
