"""The checks that metrics share, of features, labels and strengths of a penalty; loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import torch

Ids = Sequence[Any] | np.ndarray | None

C_GRID = tuple(10.0**power for power in range(-4, 4))
"""Inverse regularisation strengths tried by default: 8 values over 7 decades."""

_ROWS = 1024  # rows searched for non-finite values at a time


def as_features(X: ArrayLike | torch.Tensor, name: str) -> np.ndarray:
    """`X` (array, memory-mapped file or torch tensor) as an n×d array of numbers, its values not yet looked at.

    Raises
    ------
    UsageError
        Another shape, or a dtype that is no number.
    """
    if hasattr(X, "detach"):
        tensor = X.detach().cpu()
        X = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    array = np.asarray(X)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"{name} must be n×d features, one row per image, got shape {array.shape}")
    if array.dtype.kind not in "fiub":
        raise UsageError(f"{name} must hold numbers; its dtype is {array.dtype}")
    return array


def check_finite(array: np.ndarray, name: str, ids: Ids = None) -> None:
    """Raises UsageError with the number of non-finite values and the first row (or its id) that holds one."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite only if all its terms are, unless it overflows: the cheap test first.
        if np.isfinite(array.sum(dtype=np.float64)):
            return
    count, first = 0, -1
    for start in range(0, len(array), _ROWS):
        broken = ~np.isfinite(array[start : start + _ROWS])
        if first < 0 and broken.any():
            first = start + int(np.flatnonzero(broken.any(axis=1))[0])
        count += int(broken.sum())
    if count:
        image = first if ids is None else ids[first]
        raise UsageError(
            f"{name} holds {count} non-finite values (first: image {image}); "
            "a model that runs in float16 can overflow: use bfloat16 or float32"
        )


def check_features(X: ArrayLike | torch.Tensor, name: str, ids: Ids = None) -> np.ndarray:
    """`X` as an n×d float array of finite numbers.

    `name` is how the message calls it (for example "block.12.mlp_out"); `ids` names its rows.

    Raises
    ------
    UsageError
        Another shape, no numbers, or non-finite values.
    """
    array = as_features(X, name)
    if array.dtype.kind != "f":
        array = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    check_finite(array, name, ids)
    return array


def check_pair(X: ArrayLike, Y: ArrayLike, minimum: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Two sides with paired rows, in float64.

    Raises
    ------
    UsageError
        As `check_features`; row counts that differ, or fewer than `minimum` rows.
    """
    x, y = (np.asarray(check_features(side, name), np.float64) for side, name in ((X, "X"), (Y, "Y")))
    check_same_rows(("X", x.shape), ("Y", y.shape))
    if len(x) < minimum:
        raise UsageError(f"this similarity needs at least {minimum} images; got {len(x)}")
    return x, y


def check_same_rows(first: tuple[str, tuple[int, ...]], second: tuple[str, tuple[int, ...]]) -> None:
    """Raises UsageError where two features, given as (name, shape), differ in their number of rows."""
    if first[1][0] != second[1][0]:
        sides = ", ".join(f"{name} is {shape[0]}×{shape[1]}" for name, shape in (first, second))
        raise UsageError(f"similarity pairs rows image by image: {sides}")


def check_labels(
    y: ArrayLike, n: int, name: str, n_classes: int | None = None, *, least_classes: int = 2
) -> tuple[np.ndarray, int]:
    """Labels as int64 with their number of classes (the largest label plus 1 unless `n_classes` is given).

    Raises
    ------
    UsageError
        Not one label per row, not whole numbers, outside 0 … n_classes−1, or too few classes.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) != n:
        raise UsageError(f"{name} needs one label per row: {n} rows, labels of shape {labels.shape}")
    if labels.dtype.kind not in "iub" and not (
        labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels))
    ):
        raise UsageError(f"{name} must hold whole numbers; its dtype is {labels.dtype}")
    labels = labels.astype(np.int64, copy=False)
    k = int(labels.max()) + 1 if n_classes is None else n_classes
    if labels.min() < 0 or labels.max() >= k:
        raise UsageError(f"{name} lies between 0 and {k - 1}; found {labels.min()} to {labels.max()}")
    if k < least_classes:
        raise UsageError(f"{name} holds one class only ({n} rows); a probe needs at least two")
    return labels, k


def check_grid(Cs: ArrayLike) -> np.ndarray:
    """The C grid, ascending and positive; raises UsageError."""
    grid = np.unique(np.asarray(Cs, dtype=np.float64))
    if grid.size == 0 or not np.isfinite(grid).all() or grid[0] <= 0:
        raise UsageError(f"C values are positive numbers, such as 1e-4 to 1e3; got {Cs!r}")
    return grid
