"""The counting loops compiled by numba. Imported only when that engine is chosen."""

from __future__ import annotations

import numba
import numpy as np

from layerprobe.metrics.outliers.codes import BLOCK


@numba.njit(nogil=True, cache=True)
def count(chunk, counts):
    for i in range(chunk.size):
        counts[chunk[i]] += 1


@numba.njit(nogil=True, cache=True)
def count_fours(words, counts):
    # Four codes come with one load.
    for i in range(words.size):
        word = words[i]
        counts[word & np.uint64(0xFFFF)] += 1
        counts[(word >> np.uint64(16)) & np.uint64(0xFFFF)] += 1
        counts[(word >> np.uint64(32)) & np.uint64(0xFFFF)] += 1
        counts[word >> np.uint64(48)] += 1


@numba.njit(nogil=True, cache=True)
def _largest(bits, mask):
    # Kept in the narrow type throughout: only then does the compiler use its widest vectors.
    largest = bits.dtype.type(0)
    for i in range(bits.size):
        magnitude = bits.dtype.type(bits[i] & mask)
        largest = magnitude if magnitude > largest else largest
    return largest


@numba.njit(nogil=True, cache=True)
def block_maxima(bits, mask, maxima):
    for block in range(maxima.size):
        maxima[block] = _largest(bits[block * BLOCK : (block + 1) * BLOCK], mask)


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
def _power_sums(values, shift):
    # About a shift near the mean the sums keep their digits, and one loop gives them all.
    s1 = s2 = s3 = s4 = magnitude = 0.0
    for i in range(values.size):
        x = np.float64(values[i])
        d = x - shift
        s = d * d
        s1 += d
        s2 += s
        s3 += s * d
        s4 += s * s
        magnitude += abs(x)
    return s1, s2, s3, s4, magnitude


@numba.njit(nogil=True, cache=True)
def count_upper(words, counts):
    # Two entries come with one load.
    for i in range(words.size):
        word = words[i]
        counts[(word >> np.uint64(16)) & np.uint64(0xFFFF)] += 1
        counts[word >> np.uint64(48)] += 1


@numba.njit(nogil=True, cache=True)
def sum_float32(chunk, bits, maxima):
    n = 0
    mean = m2 = m3 = m4 = magnitude = 0.0
    for start in range(0, chunk.size, BLOCK):
        stop = min(start + BLOCK, chunk.size)
        values = chunk[start:stop]
        top = _largest(bits[start:stop], np.uint32(0x7FFFFFFF))
        maxima[start // BLOCK] = top
        if top >= np.uint32(0x7F800000):
            values = values[np.isfinite(values)]
        b = values.size
        if b == 0:
            continue
        s1, s2, s3, s4, absolute = _power_sums(values, mean)
        magnitude += absolute
        off = s1 / b
        here = mean + off
        if b * off * off <= 0.5 * s2:
            s4 += -4 * off * s3 + 6 * off * off * s2 - 3 * b * off**4
            s3 += -3 * off * s2 + 2 * b * off**3
            s2 -= b * off * off
        else:
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
    return n, mean, m2, m3, m4, magnitude


@numba.njit(nogil=True, cache=True)
def collect_low(bits, slot, keys, n):
    fours = bits.size // 4 * 4
    for i in range(0, bits.size, 4):
        # Few entries lie in the bins in question: all four signs set means that none of these does.
        if (
            i < fours
            and (
                slot[bits[i] >> np.uint32(16)]
                & slot[bits[i + 1] >> np.uint32(16)]
                & slot[bits[i + 2] >> np.uint32(16)]
                & slot[bits[i + 3] >> np.uint32(16)]
            )
            < 0
        ):
            continue
        for j in range(i, min(i + 4, bits.size)):
            row = slot[bits[j] >> np.uint32(16)]
            if row >= 0:
                keys[n] = (np.uint32(row) << np.uint32(16)) | (bits[j] & np.uint32(0xFFFF))
                n += 1
    return n
