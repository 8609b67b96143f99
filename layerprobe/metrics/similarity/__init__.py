"""How alike two sets of features of the same images are: what the all-pairs forms share, layers read row by row.

One pair of layers at a time, in float64: `similarity.measures`. All layers of one model against all layers of
another: `similarity.all_pairs`, from the sums of `similarity.hsic`; its permutation test: `similarity.permutation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from layerprobe.errors import UsageError
from layerprobe.metrics.validation import as_features, check_finite, check_same_rows

FloatArray = NDArray[np.float64]
Progress = Callable[[float], None]

SCAN_ROWS = 256
FILL_ROWS = 128
"""Rows per piece: pieces of a usual width stay in the second-level cache from one operation to the next."""
FLOAT64_UP_TO = 512
"""Up to this many images everything runs in float64: it costs nothing, and small samples cancel most."""


class CentredRows:
    """One layer, read as rows of (x − mean) · 2^k, where 2^k brings the mean squared row norm near 1.

    The features may be any n×d array, a memory-mapped file among them, and are never copied whole. Centring
    comes before any float32 product, so columns that carry an offset of hundreds of standard deviations lose
    nothing. A power of two changes no digit, and CKA does not depend on it; it keeps products of tiny or huge
    features inside float32's range.

    Parameters
    ----------
    array : ArrayLike | torch.Tensor
        n×d, floating or integer; numpy, memory-mapped, or a torch tensor.
    name : str
        What errors call it.
    rows : NDArray[np.intp] | None
        The order in which its rows count as 0, 1, …; None = as stored.

    Attributes
    ----------
    n, d
        Shape.
    constant
        True when the rows differ by no more than rounding.

    Raises
    ------
    UsageError
        Not n×d, or non-finite values (their number and the first row are named).
    """

    def __init__(
        self, array: ArrayLike | torch.Tensor, *, name: str, rows: NDArray[np.intp] | None = None
    ) -> None:
        self.name = name
        self.array = as_features(array, name)
        self.n, self.d = self.array.shape
        self.rows = rows
        self._wide = self.array.dtype.kind != "f" or self.array.dtype.itemsize > 4
        mean, squares = self._scan()
        size = float(np.linalg.norm(mean))
        # Rounding of the values themselves (float32) or of the mean over all of them (float64).
        rounding = 64 * np.finfo(np.float64).eps if self._wide else 4 * np.finfo(np.float32).eps
        spread = float(np.sqrt(squares / self.n))
        self.constant = spread <= float(rounding) * size or spread == 0.0
        exponent = 0 if self.constant else -round(float(np.log2(spread)))
        self.scale = float(2.0**exponent)
        self._mean = mean
        shift = (-mean * self.scale).astype(np.float32)
        rest = (-mean * self.scale - shift).astype(np.float32)
        self._shift = torch.from_numpy(shift)
        # What float32 loses of the mean matters only when the offset is thousands of deviations.
        self._rest = torch.from_numpy(rest) if float(np.linalg.norm(rest)) > 1e-5 else None

    def fill(self, index: NDArray[np.intp], out: NDArray[Any]) -> None:
        """Write the rows `index` (in the order of `rows`), centred and scaled, into `out` (float32 or 64)."""
        if self.rows is not None:
            index = self.rows[index]
        for start in range(0, len(index), FILL_ROWS):
            self._fill(index[start : start + FILL_ROWS], out[start : start + FILL_ROWS])

    def _fill(self, index: NDArray[np.intp], out: NDArray[Any]) -> None:
        if self._wide or out.dtype == np.float64:
            np.subtract(self.array[index], self._mean, out=out, casting="same_kind", dtype=np.float64)
            np.multiply(out, self.scale, out=out)
            return
        if self.array.dtype == out.dtype:
            np.take(self.array, index, axis=0, out=out, mode="clip")
        else:
            out[...] = self.array[index]
        rows = torch.from_numpy(out)
        torch.add(self._shift, rows, alpha=self.scale, out=rows)
        if self._rest is not None:
            rows += self._rest

    def _scan(self) -> tuple[NDArray[np.float64], float]:
        """Column means, and the sum of squared deviations from them, in one pass where float32 allows."""
        if not self._wide and self.n > FLOAT64_UP_TO:
            with np.errstate(over="ignore", invalid="ignore"):
                mean, squares = self._scan_with_pivot()
            if np.isfinite(mean).all() and np.isfinite(squares) and squares > 0.0:
                return mean, squares
        check_finite(self.array, self.name)
        total = np.zeros(self.d)
        for start in range(0, self.n, SCAN_ROWS):
            total += self.array[start : start + SCAN_ROWS].sum(axis=0, dtype=np.float64)
        mean = total / self.n
        squares = 0.0
        for start in range(0, self.n, SCAN_ROWS):
            squares += float(np.square(self.array[start : start + SCAN_ROWS] - mean).sum())
        return mean, squares

    def _scan_with_pivot(self) -> tuple[NDArray[np.float64], float]:
        """Deviations from the mean of the first rows are small numbers, and float32 sums of them exact enough.

        The squares are those of the first rows, scaled up: they only choose a power of two.
        """
        pivot = self.array[:SCAN_ROWS].mean(axis=0, dtype=np.float64).astype(np.float32)
        piece = np.empty((SCAN_ROWS, self.d), dtype=np.float32)
        total, squares = np.zeros(self.d), 0.0
        for start in range(0, self.n, SCAN_ROWS):
            rows = self.array[start : start + SCAN_ROWS]
            part = piece[: len(rows)]
            np.subtract(rows, pivot, out=part)
            total += part.sum(axis=0)
            if start == 0:
                flat = part.reshape(-1)
                squares = float(np.dot(flat, flat)) * self.n / len(rows)
        return pivot + total / self.n, squares


def matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """left · right. On a CPU by NumPy: its BLAS takes a seventh less time than torch's on AMD processors, and half
    of the time for xᵀ · x."""
    if left.device.type != "cpu":
        return torch.mm(left, right, out=out)
    into = None if out is None else out.numpy()
    return torch.from_numpy(np.matmul(left.numpy(), right.numpy(), out=into))


def paired_layers(
    layers_x: Sequence[Any],
    layers_y: Sequence[Any] | None,
    *,
    rows_x: NDArray[np.intp] | None = None,
    rows_y: NDArray[np.intp] | None = None,
    names_x: Sequence[str] | None = None,
    names_y: Sequence[str] | None = None,
) -> tuple[list[CentredRows], list[CentredRows] | None]:
    """Both models' layers, checked against one another; the second is None for a self-comparison."""
    xs = _centred_layers(layers_x, names_x or [f"layer {i} of A" for i in range(len(layers_x))], rows_x)
    if layers_y is None:
        return xs, None
    ys = _centred_layers(layers_y, names_y or [f"layer {i} of B" for i in range(len(layers_y))], rows_y)
    check_same_rows((xs[0].name, (xs[0].n, xs[0].d)), (ys[0].name, (ys[0].n, ys[0].d)))
    return xs, ys


def _centred_layers(
    arrays: Sequence[Any], names: Sequence[str], rows: NDArray[np.intp] | None
) -> list[CentredRows]:
    layers = [CentredRows(array, name=name, rows=rows) for array, name in zip(arrays, names, strict=True)]
    if not layers:
        raise UsageError("there are no layers to compare")
    for layer in layers:
        check_same_rows((layers[0].name, (layers[0].n, layers[0].d)), (layer.name, (layer.n, layer.d)))
    if layers[0].n < 4:
        raise UsageError(f"debiased CKA needs at least 4 images; got {layers[0].n}")
    return layers
