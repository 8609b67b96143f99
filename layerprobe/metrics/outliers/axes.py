"""Rows and columns of a matrix whose spread stands out, and norm dimensions that stand out in many blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from layerprobe.metrics.outliers.codes import decoded

Z_OUTLIER = 4.0
"""Threshold of the z-score over the deviations of rows or columns."""

NORM_SIGMA = 3.0
"""A norm dimension stands out in one tensor beyond so many deviations of that tensor."""


@dataclass(frozen=True)
class AxisOutliers:
    """Lines (rows or columns) whose deviation stands out: how many, the greatest z and the lines, worst first."""

    n: int
    count: int
    max_z: float
    lines: list[int]


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
        self._row_sums = np.zeros((2, self.rows))
        self._column_sums = np.zeros((2, self.columns))

    def update(self, chunk: np.ndarray, start: int) -> None:
        """Take a raw chunk (codes or values) whose first entry has the flat index `start`."""
        values = decoded(chunk, self._dtype)
        if self._shift is None:
            # Sums of squares about a typical value lose nothing where all entries are offset.
            finite = values[np.isfinite(values)]
            self._shift = float(finite.mean()) if finite.size else 0.0
        values -= self._shift
        position = start
        done = 0
        while done < values.size:
            row, column = divmod(position, self.columns)
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
            position += length

    def outliers(self) -> dict[str, AxisOutliers | str]:
        """For "row" and "column": what stands out, or the reason why that is undefined."""
        return {
            "row": _standing_out(self._row_sums, self.columns),
            "column": _standing_out(self._column_sums, self.rows),
        }


def _standing_out(sums: np.ndarray, n: int) -> AxisOutliers | str:
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
    return AxisOutliers(len(z), count, float(z[order[0]]), order[: min(count, 10)].tolist())


def norm_dimension_votes(tensors: Mapping[str, np.ndarray]) -> tuple[list[tuple[int, int]], int]:
    """Dimensions that stand out in several norm tensors of equal length.

    A dimension stands out in a tensor when it lies more than 3 deviations from the tensor's mean (BERT Busters,
    Kovaleva et al. 2021, arXiv 2105.06990). Tensors of the most frequent length vote.

    Returns
    -------
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
