"""Rows of one layer's features, centred and scaled while they are read, a piece at a time.

The features may be any n×d array, a memory-mapped file among them, and are never copied whole. Centring
comes before any float32 product: the mean is exact to float32 rounding of the *deviations*, so columns that
carry an offset of hundreds of standard deviations lose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.errors import UsageError

SCAN_ROWS = 256
FILL_ROWS = 128
"""Rows per piece: pieces of a usual width stay in the second-level cache from one operation to the next."""
FLOAT64_UP_TO = 512
"""Up to this many images everything runs in float64: it costs nothing, and small samples cancel most."""


class CentredRows:
    """One layer, read as rows of (x − mean) · 2^k, where 2^k brings the mean squared row norm near 1.

    A power of two changes no digit, and CKA does not depend on it; it keeps products of tiny or huge
    features inside float32's range.

    Parameters
    ----------
    array : n×d, floating or integer; numpy, memory-mapped, or a torch tensor.
    name : what errors call it.
    rows : the order in which its rows count as 0, 1, …; None = as stored.

    Attributes
    ----------
    n, d : shape.
    constant : True when the rows differ by no more than rounding.

    Raises
    ------
    UsageError : not n×d, or non-finite values (their number and the first row are named).
    """

    def __init__(self, array: Any, *, name: str, rows: NDArray[np.intp] | None = None) -> None:
        self.name = name
        self.array = _as_numpy(array)
        if self.array.ndim != 2 or 0 in self.array.shape:
            raise UsageError(f"{name} must be images × features, got shape {tuple(self.array.shape)}")
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
        self._refuse_non_finite()
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

    def _refuse_non_finite(self) -> None:
        bad, first = 0, -1
        for start in range(0, self.n, SCAN_ROWS):
            wrong = ~np.isfinite(self.array[start : start + SCAN_ROWS])
            if wrong.any():
                bad += int(wrong.sum())
                if first < 0:
                    first = start + int(np.flatnonzero(wrong.any(axis=1))[0])
        if bad:
            raise UsageError(
                f"{self.name} holds {bad} non-finite values (first: image {first}); float16 overflow is likely, "
                "try --dtype bfloat16"
            )


def centred_layers(
    arrays: Sequence[Any], names: Sequence[str], rows: NDArray[np.intp] | None, *, minimum: int = 4
) -> list[CentredRows]:
    """`CentredRows` of every layer of one model; all must have the same number of rows, at least `minimum`."""
    layers = [CentredRows(array, name=name, rows=rows) for array, name in zip(arrays, names, strict=True)]
    if not layers:
        raise UsageError("there are no layers to compare")
    for layer in layers:
        if layer.n != layers[0].n:
            raise UsageError(
                f"similarity pairs rows image by image: {layers[0].name} is {layers[0].n}×{layers[0].d}, "
                f"{layer.name} is {layer.n}×{layer.d}"
            )
    if layers[0].n < minimum:
        raise UsageError(f"debiased CKA needs at least {minimum} images; got {layers[0].n}")
    return layers


def _as_numpy(array: Any) -> NDArray[Any]:
    if hasattr(array, "detach"):
        tensor = array.detach().cpu()
        array = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    array = array if isinstance(array, np.ndarray) else np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise UsageError(f"features must be numbers, not {array.dtype}")
    return array
