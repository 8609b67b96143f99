"""Counting the entries of a tensor by bit pattern, chunk by chunk, with torch or (extra `fast`) numba.

Both engines count the same; sums of float32 entries may differ in the last bits of float64.
An engine holds scratch buffers and belongs to one thread.
"""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np

from layerprobe.errors import NotAvailableError, UnknownNameError, did_you_mean
from layerprobe.metrics.outliers.codes import BLOCK, CODE_DTYPES, code_table, decoded
from layerprobe.metrics.outliers.moments import Moments, chunk_moments

ENGINES = ("auto", "numba", "torch")
_UPPER = 1 if sys.byteorder == "little" else 0

_KEPT = 1 << 20  # keys of `low_halves` kept back until they are counted
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def make_engine(name: str = "auto") -> Engine:
    """A fresh engine; "auto" is numba where it is installed and works, else torch.

    Raises
    ------
    UnknownNameError
        No such engine.
    NotAvailableError
        Numba was asked for and is not installed.
    """
    if name not in ENGINES:
        raise UnknownNameError(
            f"unknown engine '{name}'.{did_you_mean(name, ENGINES)} Engines: {', '.join(ENGINES)}"
        )
    if name == "torch":
        return TorchEngine()
    if importlib.util.find_spec("numba") is None:
        if name == "auto":
            return TorchEngine()
        raise NotAvailableError("the engine 'numba' is not installed; pip install 'layerprobe[fast]'")
    return NumbaEngine()


class TorchEngine:
    """Counts with `torch.bincount`, the quickest counting loop that a plain installation has.

    What every engine does is documented here.
    """

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._folded = np.empty(0, np.int16)
        self._folded_counts = np.zeros(1 << 15, np.int64)
        self._kept: list[np.ndarray] = []
        self._n_kept = 0

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Add the histogram of a uint8 or uint16 chunk; return the `block_maxima` of its codes, sign cleared.

        `counts` (int64, one per code) is in the engine's own order until `in_code_order`.
        """
        if chunk.dtype == np.uint8:
            return self._bytes(chunk, counts)
        signed = chunk.view(np.int16)
        # As unsigned the greatest negative entry comes first, as signed the greatest positive one.
        maxima = np.maximum(
            block_maxima(chunk) & np.uint16(0x7FFF), np.maximum(block_maxima(signed), 0).view(np.uint16)
        )
        if maxima.max() < 0x4000:
            # All |w| < 2, so that the absolute value of the signed code tells all codes apart: positive ones
            # stay below 0x4000, negative ones come to lie above. bincount takes int16 as it is.
            if self._folded.size < chunk.size:
                self._folded = np.empty(chunk.size, np.int16)
            folded = np.abs(signed, out=self._folded[: chunk.size])
            try:
                found = self._torch.bincount(self._torch.from_numpy(folded)).numpy()
            except RuntimeError:
                # Minus zero has no absolute value in int16; bincount refuses it as negative.
                pass
            else:
                self._folded_counts[: found.size] += found
                return maxima
        counts += self._torch.bincount(
            self._torch.from_numpy(chunk.astype(np.int32)), minlength=1 << 16
        ).numpy()
        return maxima

    def in_code_order(self, counts: np.ndarray) -> np.ndarray:
        """The finished counts, indexed by code."""
        if counts.size == 1 << 16:
            counts[:0x4000] += self._folded_counts[:0x4000]
            counts[0x8001:0xC000] += self._folded_counts[:0x4000:-1]
            self._folded_counts[:] = 0
        return counts

    def _bytes(self, chunk: np.ndarray, counts: np.ndarray) -> np.ndarray:
        even = chunk[: chunk.size & ~1].view(np.uint16).astype(np.int32)
        pairs = (
            self._torch.bincount(self._torch.from_numpy(even), minlength=1 << 16).numpy().reshape(256, 256)
        )
        found = pairs.sum(axis=0) + pairs.sum(axis=1)
        if chunk.size & 1:
            found[chunk[-1]] += 1
        counts += found
        return block_maxima(chunk, 0x7F)

    def float32(self, chunk: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, Moments, float]:
        """Add the histogram of a float32 chunk by upper 16 bits; return block maxima, moments and Σ|w|."""
        # The upper halves are codes like those of bfloat16, and are counted like them.
        self.codes(np.ascontiguousarray(chunk.view(np.uint16)[_UPPER::2]), counts)
        maxima = block_maxima(chunk.view(np.uint32), 0x7FFFFFFF)
        return maxima, *chunk_moments(chunk, bool(maxima.max() < 0x7F800000))

    def low_halves(self, chunk: np.ndarray, slot: np.ndarray, low: np.ndarray) -> None:
        """Count the lower 16 bits of the entries whose upper 16 bits have a slot ≥ 0: `low[slot, lower] += 1`."""
        bits = chunk.view(np.uint32)
        chosen = slot[bits >> np.uint32(16)]
        hit = np.flatnonzero(chosen >= 0)
        keys = (chosen[hit].astype(np.uint32) << np.uint32(16)) | (bits[hit] & np.uint32(0xFFFF))
        self._kept.append(keys)
        self._n_kept += keys.size
        if self._n_kept >= _KEPT:
            self.flush(low)

    def flush(self, low: np.ndarray) -> None:
        """Add what `low_halves` has kept back to `low`."""
        if self._kept:
            _add_keys(low, np.concatenate(self._kept))
        self._kept, self._n_kept = [], 0


class NumbaEngine:
    """Counts with compiled loops that release the interpreter lock."""

    name = "numba"

    def __init__(self) -> None:
        from layerprobe.metrics.outliers import counting_numba

        self._compiled = counting_numba
        self._keys = np.empty(0, np.uint32)
        self._n_keys = 0

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> np.ndarray:
        maxima = np.empty(-(-chunk.size // BLOCK), chunk.dtype)
        if chunk.dtype == np.uint8:
            self._compiled.count(chunk, counts)
            self._compiled.block_maxima(chunk, np.uint8(0x7F), maxima)
            return maxima
        fours = chunk.size // 4 * 4 if chunk.__array_interface__["data"][0] % 8 == 0 else 0
        if fours:
            self._compiled.count_fours(chunk[:fours].view(np.uint64), counts)
        if fours < chunk.size:
            self._compiled.count(chunk[fours:], counts)
        self._compiled.block_maxima(chunk, np.uint16(0x7FFF), maxima)
        return maxima

    def in_code_order(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def float32(self, chunk: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, Moments, float]:
        maxima = np.empty(-(-chunk.size // BLOCK), np.uint32)
        bits = chunk.view(np.uint32)
        pairs = chunk.size // 2 * 2 if chunk.__array_interface__["data"][0] % 8 == 0 else 0
        self._compiled.count_upper(bits[:pairs].view(np.uint64), counts)
        if pairs < chunk.size:
            self._compiled.count(bits[pairs:] >> np.uint32(16), counts)
        n, mean, m2, m3, m4, magnitude = self._compiled.sum_float32(chunk, bits, maxima)
        return maxima, Moments(n=int(n), mean=mean, m2=m2, m3=m3, m4=m4), magnitude

    def low_halves(self, chunk: np.ndarray, slot: np.ndarray, low: np.ndarray) -> None:
        # Hits are kept in order and counted later: adding each to its distant cell would wait for memory.
        if self._n_keys + chunk.size > self._keys.size:
            self.flush(low)
            self._keys = np.empty(max(_KEPT, chunk.size), np.uint32)
        self._n_keys = self._compiled.collect_low(chunk.view(np.uint32), slot, self._keys, self._n_keys)

    def flush(self, low: np.ndarray) -> None:
        _add_keys(low, self._keys[: self._n_keys])
        self._n_keys = 0


def block_maxima(bits: np.ndarray, mask: int | None = None) -> np.ndarray:
    """The greatest of `bits & mask` in each block of `BLOCK` entries; the last block may be shorter."""
    magnitude = bits if mask is None else bits & bits.dtype.type(mask)
    whole = bits.size // BLOCK
    maxima = magnitude[: whole * BLOCK].reshape(whole, BLOCK).max(axis=1)
    return maxima if whole * BLOCK == bits.size else np.append(maxima, magnitude[whole * BLOCK :].max())


def _add_keys(low: np.ndarray, keys: np.ndarray) -> None:
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
        self._seen = 0

    def _least_kept(self) -> float:
        """The magnitude that an entry must exceed to enter; -1 while there is room."""
        return abs(float(self._value[-1])) if self._value.size == self.k else -1.0

    def update(
        self, chunk: np.ndarray, maxima: np.ndarray | None = None, *, greatest: float = math.inf
    ) -> None:
        """Take the next raw chunk; `maxima` as of `block_maxima`, `greatest` a bound on its magnitudes."""
        start = self._seen
        self._seen += chunk.size
        if self.k == 0 or chunk.size == 0 or greatest <= self._least_kept():
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


Engine = TorchEngine | NumbaEngine
