"""What a probe refuses: arrays that are no features, labels that are no classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerprobe.errors import UsageError


def check_features(X: Any, name: str, ids: Sequence[Any] | np.ndarray | None = None) -> np.ndarray:
    """`X` as an n×d float array of finite numbers.

    `name` is how the message calls it (for example "block.12.mlp_out"); `ids` names its rows.

    Raises
    ------
    UsageError : another shape, or non-finite values, with their number and the first row that holds one.
    """
    array = np.asarray(X)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"{name} must be n×d features, one row per image; its shape is {array.shape}")
    if array.dtype.kind not in "fiub":
        raise UsageError(f"{name} must hold numbers; its dtype is {array.dtype}")
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        first = int(np.flatnonzero(~finite.all(axis=1))[0])
        image = first if ids is None else ids[first]
        hint = "; float16 overflow is likely, try --dtype bfloat16" if array.dtype == np.float16 else ""
        raise UsageError(
            f"{name} holds {int((~finite).sum())} non-finite values (first: image {image}){hint}"
        )
    return array


def check_labels(y: Any, n: int, name: str, n_classes: int | None = None) -> tuple[np.ndarray, int]:
    """Labels as int64 with their number of classes.

    Raises
    ------
    UsageError : not one label per row, not whole numbers, outside 0 … n_classes−1, or one class only.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) != n:
        raise UsageError(f"{name} needs one label per row: {n} rows, labels of shape {labels.shape}")
    if labels.dtype.kind not in "iub":
        whole = labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels))
        if not whole:
            raise UsageError(f"{name} must hold whole numbers; its dtype is {labels.dtype}")
    labels = labels.astype(np.int64)
    k = int(labels.max()) + 1 if n_classes is None else n_classes
    if labels.min() < 0 or labels.max() >= k:
        raise UsageError(f"{name} lies between 0 and {k - 1}; found {labels.min()} to {labels.max()}")
    if k < 2:
        raise UsageError(f"{name} holds one class only ({n} rows); a probe needs at least two")
    return labels, k
