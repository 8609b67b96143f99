"""The largest entries of a tensor with their places, kept while the chunks go by."""

from __future__ import annotations

import numpy as np

from layerprobe.metrics.outlier_codes import CODE_DTYPES, code_table

_STRIPE = 1024
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class TopEntries:
    """The `k` finite entries of largest magnitude; of equal magnitudes the first in row-major order.

    Magnitudes are compared as bit patterns with the sign cleared, which rise with |w| in every format.
    """

    def __init__(self, k: int, dtype: str) -> None:
        self.k = k
        self._dtype = dtype
        if dtype in CODE_DTYPES:
            table = code_table(dtype)
            self._mask = table.n_codes // 2 - 1
            self._limit = int((table.codes & self._mask).max())
        else:
            self._mask = 0x7FFFFFFF if dtype == "float32" else 0x7FFFFFFFFFFFFFFF
            self._limit = 0x7F7FFFFF if dtype == "float32" else 0x7FEFFFFFFFFFFFFF
        self._worst = -1
        self._value = np.empty(0, np.float64)
        self._index = np.empty(0, np.int64)

    def update(self, chunk: np.ndarray, start: int, largest: int | None = None) -> None:
        """Take a raw chunk whose first entry has the flat index `start`.

        `largest` is the chunk's greatest bit pattern with the sign cleared, where it is known: a chunk that
        cannot contribute is then left at once.
        """
        if self.k == 0 or chunk.size == 0 or (largest is not None and largest <= self._worst):
            return
        bits = chunk.view(_UNSIGNED[chunk.itemsize])
        magnitude = bits & bits.dtype.type(self._mask)
        if largest is None or largest > self._limit:
            magnitude[magnitude > self._limit] = 0
        bound = self._worst + 1
        stripes = magnitude.size // _STRIPE
        if stripes >= 2 * self.k:
            # The k-th best stripe maximum bounds the k-th best entry from below and is cheap to have.
            best = magnitude[: stripes * _STRIPE].reshape(stripes, _STRIPE).max(axis=1)
            bound = max(bound, int(np.partition(best, stripes - self.k)[stripes - self.k]))
        picked = np.flatnonzero(magnitude >= bound)
        if picked.size > self.k:
            kth = np.partition(magnitude[picked], picked.size - self.k)[picked.size - self.k]
            above = picked[magnitude[picked] > kth]
            picked = np.concatenate([above, picked[magnitude[picked] == kth][: self.k]])
        value = self._decode(chunk[picked])
        finite = np.isfinite(value)
        value = np.concatenate([self._value, value[finite]])
        index = np.concatenate([self._index, picked[finite] + start])
        order = np.lexsort((index, -np.abs(value)))[: self.k]
        self._value, self._index = value[order], index[order]
        if order.size == self.k:
            at = int(self._index[-1]) - start
            # The last of the kept entries may come from an earlier chunk; its pattern is then unchanged.
            self._worst = int(magnitude[at]) if at >= 0 else self._worst

    def entries(self) -> list[tuple[float, int]]:
        """(value, flat index) by falling magnitude."""
        return list(zip(self._value.tolist(), self._index.tolist(), strict=True))

    def _decode(self, entries: np.ndarray) -> np.ndarray:
        if self._dtype not in CODE_DTYPES:
            return entries.astype(np.float64)
        table = code_table(self._dtype)
        values = np.full(table.n_codes, np.nan)
        values[table.codes] = table.low
        return values[entries]
