"""Central moments that merge: of chunks into a tensor, of tensors into a block."""

from __future__ import annotations

import math
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


def chunk_moments(chunk: np.ndarray, all_finite: bool) -> tuple[Moments, float]:
    """Moments and Σ|w| of the finite entries of a float32 chunk, in pieces that stay in the cache."""
    moments, magnitude = Moments(), 0.0
    for start in range(0, chunk.size, 1 << 15):
        values = chunk[start : start + (1 << 15)].astype(np.float64)
        if not all_finite:
            values = values[np.isfinite(values)]
        magnitude += float(np.abs(values).sum())
        moments = moments.merge(Moments.of_values(values))
    return moments, magnitude
