"""Counting the entries of a tensor by bit pattern, chunk by chunk, with torch or (extra `fast`) numba.

Both engines count the same; sums of float32 entries may differ in the last bits of float64.
An engine holds scratch buffers and belongs to one thread.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Protocol

import numpy as np

from layerprobe.errors import NotAvailableError, UnknownNameError, did_you_mean
from layerprobe.metrics.outliers.moments import Moments, chunk_moments
from layerprobe.metrics.outliers.top import add_keys, block_maxima

ENGINES = ("auto", "numba", "torch")
_UPPER = 1 if sys.byteorder == "little" else 0


class Engine(Protocol):
    """What counts. `name` is "numba" or "torch"."""

    name: str

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Add the histogram of a uint8 or uint16 chunk; return the `block_maxima` of its codes, sign cleared.

        `counts` (int64, one per code) is in the engine's own order until `in_code_order`.
        """
        ...

    def in_code_order(self, counts: np.ndarray) -> np.ndarray:
        """The finished counts, indexed by code."""
        ...

    def float32(self, chunk: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, Moments, float]:
        """Add the histogram of a float32 chunk by upper 16 bits.

        Returns the `block_maxima` of the bit patterns with the sign cleared, the moments of the finite entries, and the
        sum of their magnitudes.
        """
        ...

    def low_halves(self, chunk: np.ndarray, slot: np.ndarray, low: np.ndarray) -> None:
        """Count the lower 16 bits of the entries whose upper 16 bits have a slot ≥ 0: `low[slot, lower] += 1`."""
        ...

    def flush(self, low: np.ndarray) -> None:
        """Bring what `low_halves` has put aside into `low`."""
        ...


def make_engine(name: str = "auto") -> Engine:
    """A fresh engine; "auto" is numba where it is installed and works, else torch.

    Raises
    ------
    UnknownNameError : no such engine. NotAvailableError : numba was asked for and is not installed.
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
    from layerprobe.metrics.outliers.counting_numba import NumbaEngine

    return NumbaEngine()


class TorchEngine:
    """Counts with `torch.bincount`, the quickest counting loop that a plain installation has."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._folded = np.empty(0, np.int16)
        self._folded_counts = np.zeros(1 << 15, np.int64)
        self._aside: list[np.ndarray] = []
        self._aside_size = 0

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> np.ndarray:
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
        # The upper halves are codes like those of bfloat16, and are counted like them.
        self.codes(np.ascontiguousarray(chunk.view(np.uint16)[_UPPER::2]), counts)
        maxima = block_maxima(chunk.view(np.uint32), 0x7FFFFFFF)
        return maxima, *chunk_moments(chunk, bool(maxima.max() < 0x7F800000))

    def low_halves(self, chunk: np.ndarray, slot: np.ndarray, low: np.ndarray) -> None:
        bits = chunk.view(np.uint32)
        chosen = slot[bits >> np.uint32(16)]
        hit = np.flatnonzero(chosen >= 0)
        keys = (chosen[hit].astype(np.uint32) << np.uint32(16)) | (bits[hit] & np.uint32(0xFFFF))
        self._aside.append(keys)
        self._aside_size += keys.size
        if self._aside_size >= 1 << 20:
            self.flush(low)

    def flush(self, low: np.ndarray) -> None:
        if self._aside:
            add_keys(low, np.concatenate(self._aside))
        self._aside, self._aside_size = [], 0
