"""The one check of features and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerprobe.errors import UsageError
from layerprobe.metrics.validation import check_features, check_labels


def test_tensors_and_integers_become_float_arrays() -> None:
    assert check_features(torch.ones(2, 3, dtype=torch.bfloat16), "X").dtype == np.float32
    assert check_features(np.ones((2, 3), np.uint8), "X").dtype == np.float32
    assert check_features(np.ones((2, 3), np.int64), "X").dtype == np.float64
    half = np.ones((2, 3), np.float16)
    assert check_features(half, "X") is half


def test_non_finite_values_are_counted_and_the_first_row_is_named() -> None:
    X = np.zeros((3000, 2), np.float32)
    X[1500, 1], X[2999] = np.nan, np.inf
    with pytest.raises(UsageError, match=r"block\.1 holds 3 non-finite values \(first: image 1500\)"):
        check_features(X, "block.1")
    with pytest.raises(UsageError, match="first: image val/1500"):
        check_features(X, "block.1", [f"val/{i}" for i in range(3000)])
    assert check_features(np.full((2, 2), 1e308), "X").shape == (2, 2)


def test_labels_are_whole_numbers_of_a_known_range() -> None:
    labels, k = check_labels(np.array([0.0, 2.0, 1.0]), 3, "labels")
    assert labels.dtype == np.int64 and k == 3
    assert check_labels([0, 0], 2, "labels", least_classes=1)[1] == 1
    with pytest.raises(UsageError, match="one class only"):
        check_labels([0, 0], 2, "labels")
    with pytest.raises(UsageError, match="found 0 to 3"):
        check_labels([0, 3], 2, "labels", 3)
