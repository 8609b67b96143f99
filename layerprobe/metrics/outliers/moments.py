"""Central moments that merge (of chunks into a tensor, of tensors into a block), and the deviations of lines."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from layerprobe.metrics.outliers.codes import decoded

Z_OUTLIER = 4.0
"""Threshold of the z-score over the deviations of rows or columns."""

NORM_SIGMA = 3.0
"""A norm dimension stands out in one tensor beyond so many deviations of that tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
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
            return cls(n=n, mean=float(values[0]))
        weights = counts.astype(np.float64)
        # An extended sum keeps the mean right where large entries of both signs cancel.
        mean = float((weights * values).sum(dtype=np.longdouble) / n)
        deviation = values - mean
        square = deviation * deviation
        weighted = weights * square
        return cls(
            n=n,
            mean=mean,
            m2=float(weighted.sum()),
            m3=float((weighted * deviation).sum()),
            m4=float((weighted * square).sum()),
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
            n=n,
            mean=mean,
            m2=float(square.sum()),
            m3=float(np.einsum("i,i->", square, values)),
            m4=float(np.einsum("i,i->", square, square)),
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
        return Moments(n=n, mean=self.mean + step * b, m2=m2, m3=m3, m4=m4)

    @property
    def std(self) -> float:
        """Population standard deviation (divided by n); 0 for no entries."""
        return math.sqrt(self.m2 / self.n) if self.n else 0.0

    @property
    def kurtosis(self) -> float:
        """m₄/m₂²: 3 for a Gaussian, not the excess; NaN for a constant sample."""
        return self.n * self.m4 / (self.m2 * self.m2) if self.m2 * self.m2 > 0 else math.nan


_PIECE = 1 << 15
# Rows short enough that a dot product stays on one thread whatever the linear algebra library would like.
_ROW = 1 << 12
_ONES = np.ones(_ROW)


class _Buffers(threading.local):
    """Two buffers of each thread: fresh ones for every piece would cost more than the sums."""

    def __init__(self) -> None:
        self.rows, self.square = np.empty(_PIECE), np.empty(_PIECE)


_buffers = _Buffers()


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
        rows, square = (b[: piece.size].reshape(-1, _ROW) for b in (_buffers.rows, _buffers.square))
        np.copyto(rows, piece.reshape(-1, _ROW))
        np.multiply(rows, rows, out=square)
        s1, s2 = float(np.vecdot(rows, _ONES).sum()), float(np.vecdot(rows, rows).sum())
        s3, s4 = float(np.vecdot(square, rows).sum()), float(np.vecdot(square, square).sum())
        if absolute:
            magnitude += float(np.vecdot(np.abs(rows, out=square), _ONES).sum())
        moments = moments.merge(_central(rows.reshape(-1), s1, s2, s3, s4))
    return moments, magnitude


def _central(values: np.ndarray, s1: float, s2: float, s3: float, s4: float) -> Moments:
    n = values.size
    mean = s1 / n
    if not n * mean * mean <= 0.5 * s2:
        # Power sums about zero would cancel; the slower way subtracts the mean first.
        return Moments.of_values(values)
    return Moments(
        n=n,
        mean=mean,
        m2=s2 - n * mean**2,
        m3=s3 - 3 * mean * s2 + 2 * n * mean**3,
        m4=s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * n * mean**4,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisOutliers:
    """Lines (rows or columns) whose deviation is an outlier: how many, the greatest z and the lines, worst first."""

    n: int
    count: int
    max_z: float
    lines: tuple[int, ...]


class AxisSpread:
    """Deviation of every row and column of a matrix, from chunks in row-major order.

    The z-score of a line is (its deviation − their mean) / (their deviation), all with n − 1, as in the outlier
    search of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339). More than two dimensions are flattened
    behind the first. Non-finite entries make their row and column count as undefined.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.rows = shape[0]
        self.columns = int(np.prod(shape[1:]))
        self._dtype = dtype
        self._shift: float | None = None
        self._seen = 0
        self._row_sums = np.zeros((2, self.rows))
        self._column_sums = np.zeros((2, self.columns))

    def update(self, chunk: np.ndarray) -> None:
        """Take the next raw chunk (codes or values)."""
        values = decoded(chunk, self._dtype)
        if self._shift is None:
            # Sums of squares about a typical value lose nothing where all entries are offset.
            finite = values[np.isfinite(values)]
            self._shift = float(finite.mean()) if finite.size else 0.0
        values -= self._shift
        done = 0
        while done < values.size:
            row, column = divmod(self._seen, self.columns)
            if column or values.size - done < self.columns:
                length, whole = min(self.columns - column, values.size - done), 1
            else:
                whole = (values.size - done) // self.columns
                length = whole * self.columns
            piece = values[done : done + length].reshape(whole, -1)
            square = piece * piece
            width = piece.shape[1]
            for into, part in ((0, piece), (1, square)):
                self._row_sums[into, row : row + whole] += part.sum(axis=1)
                self._column_sums[into, column : column + width] += part.sum(axis=0)
            done += length
            self._seen += length

    def outliers(self) -> dict[str, AxisOutliers | str]:
        """For "row" and "column": the outliers, or the reason why they are undefined."""
        return {
            "row": _line_outliers(self._row_sums, self.columns),
            "column": _line_outliers(self._column_sums, self.rows),
        }


def _line_outliers(sums: np.ndarray, n: int) -> AxisOutliers | str:
    if n < 2 or sums.shape[1] < 3:
        return f"{sums.shape[1]} lines of {n} entries are too few"
    with np.errstate(invalid="ignore", over="ignore"):
        variance = (sums[1] - sums[0] ** 2 / n) / (n - 1)
    if not np.isfinite(variance).all():
        return f"{int((~np.isfinite(variance)).sum())} lines hold non-finite entries"
    deviation = np.sqrt(np.maximum(variance, 0))
    spread = deviation.std(ddof=1)
    if spread <= 1e-12 * deviation.mean():
        return "all lines have the same deviation"
    z = (deviation - deviation.mean()) / spread
    order = np.argsort(-z, kind="stable")
    count = int((z > Z_OUTLIER).sum())
    return AxisOutliers(
        n=len(z), count=count, max_z=float(z[order[0]]), lines=tuple(order[: min(count, 10)].tolist())
    )


def norm_dimension_votes(tensors: Mapping[str, np.ndarray]) -> tuple[list[tuple[int, int]], int]:
    """Dimensions that stand out in several norm tensors of equal length.

    A dimension stands out in a tensor when it lies more than 3 deviations from the tensor's mean (BERT Busters,
    Kovaleva et al. 2021, arXiv 2105.06990). Tensors of the most frequent length vote.

    Returns
    -------
    tuple[list[tuple[int, int]], int]
        ([(dimension, votes), …] with at least two votes, most first; number of tensors that voted)
    """
    lengths = [len(values) for values in tensors.values()]
    if not lengths:
        return [], 0
    length = max(set(lengths), key=lambda n: (lengths.count(n), n))
    votes = np.zeros(length, np.int64)
    voters = 0
    for values in tensors.values():
        if len(values) != length:
            continue
        voters += 1
        finite = values[np.isfinite(values)]
        if finite.size and finite.std() > 0:
            with np.errstate(invalid="ignore"):
                votes += np.abs(values - finite.mean()) > NORM_SIGMA * finite.std()
    order = np.argsort(-votes, kind="stable")
    return [(int(i), int(votes[i])) for i in order if votes[i] >= 2], voters
