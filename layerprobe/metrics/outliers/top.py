"""The largest entries of a tensor with their places, kept while the chunks go by."""

from __future__ import annotations

import math

import numpy as np

from layerprobe.metrics.outliers.codes import CODE_DTYPES, code_table, decoded

BLOCK = 4096
"""Engines report the greatest magnitude of every block of so many entries; only few blocks are then looked at."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def block_maxima(bits: np.ndarray, mask: int | None = None) -> np.ndarray:
    """The greatest of `bits & mask` in each block of `BLOCK` entries; the last block may be shorter."""
    magnitude = bits if mask is None else bits & bits.dtype.type(mask)
    whole = bits.size // BLOCK
    maxima = magnitude[: whole * BLOCK].reshape(whole, BLOCK).max(axis=1)
    return maxima if whole * BLOCK == bits.size else np.append(maxima, magnitude[whole * BLOCK :].max())


def add_keys(low: np.ndarray, keys: np.ndarray) -> None:
    """Count `keys` (slot in the upper, code in the lower 16 bits) into the table `low` (slots × 65,536)."""
    found, counts = np.unique(keys, return_counts=True)
    low.reshape(-1)[found] += counts.astype(low.dtype)


class TopEntries:
    """The `k` finite entries of largest magnitude; of equal magnitudes the first in row-major order.

    Magnitudes are compared as bit patterns with the sign cleared, which rise with |w| in every format.
    """

    def __init__(self, k: int, dtype: str) -> None:
        self.k = k
        self._dtype = dtype
        if dtype in CODE_DTYPES:
            table = code_table(dtype)
            self.mask = table.n_codes // 2 - 1
            self._limit = int((table.codes & self.mask).max())
        else:
            self.mask = 0x7FFFFFFF if dtype == "float32" else 0x7FFFFFFFFFFFFFFF
            self._limit = 0x7F7FFFFF if dtype == "float32" else 0x7FEFFFFFFFFFFFFF
        self._magnitude = np.empty(0, np.uint64)
        self._value = np.empty(0, np.float64)
        self._index = np.empty(0, np.int64)

    @property
    def worst(self) -> float:
        """The least magnitude kept, which an entry must exceed to enter; -1 while there is room, ∞ for k = 0."""
        if self._value.size < self.k:
            return -1.0
        return abs(float(self._value[-1])) if self.k else math.inf

    def update(self, chunk: np.ndarray, start: int, maxima: np.ndarray | None = None) -> None:
        """Take a raw chunk whose first entry has the flat index `start`; `maxima` as of `block_maxima`."""
        if self.k == 0 or chunk.size == 0:
            return
        bits = chunk.view(_UNSIGNED[chunk.itemsize])
        if maxima is None:
            maxima = block_maxima(bits, self.mask)
        worst = int(self._magnitude[-1]) if self._magnitude.size == self.k else -1
        blocks = np.flatnonzero(maxima > worst)
        if not blocks.size:
            return
        usable = maxima[blocks]
        if blocks.size > self.k and int(usable.max()) <= self._limit:
            # The k-th best of the maxima bounds the k-th best entry from below.
            bound = np.partition(usable, blocks.size - self.k)[blocks.size - self.k]
            blocks = blocks[usable >= bound]
        for block in blocks.tolist():
            first = block * BLOCK
            self._update_block(bits[first : first + BLOCK], chunk[first : first + BLOCK], start + first)

    def _update_block(self, bits: np.ndarray, entries: np.ndarray, start: int) -> None:
        worst = int(self._magnitude[-1]) if self._magnitude.size == self.k else -1
        magnitude = bits & bits.dtype.type(self.mask)
        picked = np.flatnonzero((magnitude > worst) & (magnitude <= self._limit))
        if not picked.size:
            return
        if picked.size > 4 * self.k:
            kth = np.partition(magnitude[picked], picked.size - self.k)[picked.size - self.k]
            picked = picked[magnitude[picked] >= kth]
        values = decoded(entries[picked], self._dtype)
        finite = np.isfinite(values)
        magnitudes = np.concatenate([self._magnitude, magnitude[picked][finite].astype(np.uint64)])
        values = np.concatenate([self._value, values[finite]])
        index = np.concatenate([self._index, picked[finite] + start])
        # By falling magnitude, then by place: the sort is stable and the kept entries come first.
        order = np.argsort(~magnitudes, kind="stable")[: self.k]
        self._magnitude, self._value, self._index = magnitudes[order], values[order], index[order]

    def entries(self) -> list[tuple[float, int]]:
        """(value, flat index) by falling magnitude."""
        return list(zip(self._value.tolist(), self._index.tolist(), strict=True))
