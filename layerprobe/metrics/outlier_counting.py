"""Counting the entries of a tensor by bit pattern, chunk by chunk, with torch or (extra `fast`) numba.

Both engines count the same; sums of float32 entries may differ in the last bits of float64.
An engine holds scratch buffers and belongs to one thread.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import numpy as np

from layerprobe.errors import NotAvailableError, UnknownNameError, did_you_mean
from layerprobe.metrics.outlier_moments import Moments

ENGINES = ("auto", "numba", "torch")


class Engine(Protocol):
    """What counts. `name` is "numba" or "torch"."""

    name: str

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> int:
        """Add the histogram of a uint8 or uint16 chunk; return its largest code with the sign bit cleared.

        `counts` (int64, one per code) is in the engine's own order until `in_code_order`.
        """
        ...

    def in_code_order(self, counts: np.ndarray) -> np.ndarray:
        """The finished counts, indexed by code."""
        ...

    def float32(self, chunk: np.ndarray, counts: np.ndarray) -> tuple[int, Moments, float]:
        """Add the histogram of a float32 chunk by upper 16 bits.

        Returns the largest bit pattern with the sign cleared, the moments of the finite entries, and the
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
    from layerprobe.metrics.outlier_numba import NumbaEngine

    return NumbaEngine()


class TorchEngine:
    """Counts with `torch.bincount`, the quickest counting loop that a plain installation has."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._rotated = np.empty(0, np.uint16)
        self._sign = np.empty(0, np.uint16)
        self._aside: list[np.ndarray] = []
        self._aside_size = 0

    def codes(self, chunk: np.ndarray, counts: np.ndarray) -> int:
        if chunk.dtype == np.uint8:
            return self._bytes(chunk, counts)
        if self._rotated.size < chunk.size:
            self._rotated, self._sign = np.empty(chunk.size, np.uint16), np.empty(chunk.size, np.uint16)
        # Codes are rotated left by one bit: the sign comes last. The top bit is then set only where
        # |w| >= 2, and without it the codes are non-negative int16, which bincount takes as they are.
        rotated, sign = self._rotated[: chunk.size], self._sign[: chunk.size]
        np.left_shift(chunk, 1, out=rotated)
        np.right_shift(chunk, 15, out=sign)
        np.bitwise_or(rotated, sign, out=rotated)
        largest = int(rotated.max())
        if largest < 0x8000:
            codes = rotated.view(np.int16)
        else:
            codes = rotated.astype(np.int32)
        found = self._torch.bincount(self._torch.from_numpy(codes)).numpy()
        counts[: found.size] += found
        return largest >> 1

    def in_code_order(self, counts: np.ndarray) -> np.ndarray:
        # Even rotated codes are the positive half, odd ones the negative half.
        return counts if counts.size == 256 else np.concatenate([counts[0::2], counts[1::2]])

    def _bytes(self, chunk: np.ndarray, counts: np.ndarray) -> int:
        even = chunk[: chunk.size & ~1].view(np.uint16).astype(np.int32)
        pairs = (
            self._torch.bincount(self._torch.from_numpy(even), minlength=1 << 16).numpy().reshape(256, 256)
        )
        found = pairs.sum(axis=0) + pairs.sum(axis=1)
        if chunk.size & 1:
            found[chunk[-1]] += 1
        counts += found
        return int((np.flatnonzero(found) & 0x7F).max())

    def float32(self, chunk: np.ndarray, counts: np.ndarray) -> tuple[int, Moments, float]:
        largest, moments, magnitude = 0, Moments(), 0.0
        for start in range(0, chunk.size, 1 << 16):
            piece = chunk[start : start + (1 << 16)]
            bits = piece.view(np.int32)
            upper = (bits >> 16) & 0xFFFF
            found = self._torch.bincount(self._torch.from_numpy(upper)).numpy()
            counts[: found.size] += found
            top = int((bits & 0x7FFFFFFF).max())
            largest = max(largest, top)
            values = piece.astype(np.float64)
            if top >= 0x7F800000:
                values = values[np.isfinite(values)]
            magnitude += float(np.abs(values).sum())
            moments = moments.merge(Moments.of_values(values))
        return largest, moments, magnitude

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
        if self._aside_size:
            keys, counts = np.unique(np.concatenate(self._aside), return_counts=True)
            low.reshape(-1)[keys] += counts.astype(low.dtype)
        self._aside, self._aside_size = [], 0
