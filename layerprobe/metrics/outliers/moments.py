"""Central moments that merge: of chunks into a tensor, of tensors into a block."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Count, mean and the sums Σ(x−μ)², Σ(x−μ)³, Σ(x−μ)⁴, in float64.

    References
    ----------
    P. Pébay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments", Sandia report SAND2008-6212, 2008, equations 2.1 to 2.4.
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    @classmethod
    def of_counts(cls, values: np.ndarray, counts: np.ndarray) -> Moments:
        """Moments of `values` (float64), each occurring `counts` times."""
        n = int(counts.sum())
        if n == 0:
            return cls()
        if len(values) == 1:
            return cls(n, float(values[0]))
        weights = counts.astype(np.float64)
        # An extended sum keeps the mean right where large entries of both signs cancel.
        mean = float((weights * values).sum(dtype=np.longdouble) / n)
        deviation = values - mean
        square = deviation * deviation
        weighted = weights * square
        return cls(
            n,
            mean,
            float(weighted.sum()),
            float((weighted * deviation).sum()),
            float((weighted * square).sum()),
        )

    @classmethod
    def of_values(cls, values: np.ndarray) -> Moments:
        """Moments of a float64 array of finite numbers; the array is overwritten."""
        n = values.size
        if n == 0:
            return cls()
        mean = float(values.mean())
        values -= mean
        square = values * values
        return cls(
            n,
            mean,
            float(square.sum()),
            float(np.einsum("i,i->", square, values)),
            float(np.einsum("i,i->", square, square)),
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of the two samples together."""
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        a, b = self.n, other.n
        n = a + b
        delta = other.mean - self.mean
        step = delta / n
        m2 = self.m2 + other.m2 + delta * step * a * b
        m3 = (
            self.m3
            + other.m3
            + delta * step * step * a * b * (a - b)
            + 3 * step * (a * other.m2 - b * self.m2)
        )
        m4 = (
            self.m4
            + other.m4
            + delta * step * step * step * a * b * (a * a - a * b + b * b)
            + 6 * step * step * (a * a * other.m2 + b * b * self.m2)
            + 4 * step * (a * other.m3 - b * self.m3)
        )
        return Moments(n, self.mean + step * b, m2, m3, m4)

    @property
    def std(self) -> float:
        """Population standard deviation (divided by n); 0 for no entries."""
        return math.sqrt(self.m2 / self.n) if self.n else 0.0

    @property
    def kurtosis(self) -> float:
        """m₄/m₂²: 3 for a Gaussian, not the excess; NaN for a constant sample."""
        return self.n * self.m4 / (self.m2 * self.m2) if self.m2 * self.m2 > 0 else math.nan


def chunk_moments(chunk: np.ndarray, all_finite: bool, *, absolute: bool = True) -> tuple[Moments, float]:
    """Moments and (with `absolute`) Σ|w| of the finite entries of a float32 chunk, in pieces that fit the cache."""
    moments, magnitude = Moments(), 0.0
    for start in range(0, chunk.size, _PIECE):
        piece = chunk[start : start + _PIECE]
        if not all_finite or piece.size % _ROW:
            values = piece[np.isfinite(piece)].astype(np.float64)
            magnitude += float(np.abs(values).sum()) if absolute else 0.0
            moments = moments.merge(Moments.of_values(values))
            continue
        rows, square = (buffer[: piece.size].reshape(-1, _ROW) for buffer in _buffers())
        np.copyto(rows, piece.reshape(-1, _ROW))
        np.multiply(rows, rows, out=square)
        s1, s2 = float(np.vecdot(rows, _ONES).sum()), float(np.vecdot(rows, rows).sum())
        s3, s4 = float(np.vecdot(square, rows).sum()), float(np.vecdot(square, square).sum())
        if absolute:
            magnitude += float(np.vecdot(np.abs(rows, out=square), _ONES).sum())
        moments = moments.merge(_central(rows.reshape(-1), s1, s2, s3, s4))
    return moments, magnitude


def _buffers() -> tuple[np.ndarray, np.ndarray]:
    """Two buffers of this thread: fresh ones for every piece would cost more than the sums."""
    if not hasattr(_own, "buffers"):
        _own.buffers = (np.empty(_PIECE), np.empty(_PIECE))
    return _own.buffers


_own = threading.local()
_PIECE = 1 << 15
# Rows short enough that a dot product stays on one thread whatever the linear algebra library would like.
_ROW = 1 << 12
_ONES = np.ones(_ROW)


def _central(values: np.ndarray, s1: float, s2: float, s3: float, s4: float) -> Moments:
    n = values.size
    mean = s1 / n
    if not n * mean * mean <= 0.5 * s2:
        # Power sums about zero would cancel; the slower way subtracts the mean first.
        return Moments.of_values(values)
    return Moments(
        n,
        mean,
        s2 - n * mean**2,
        s3 - 3 * mean * s2 + 2 * n * mean**3,
        s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * n * mean**4,
    )
