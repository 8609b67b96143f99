"""Simple classifiers on frozen features; here: the features, standardised block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import blas

_ROWS = 4096  # rows of the features that are held in float64 at a time
_DEAD = 1e-9  # of the largest deviation; below that a column is switched off


class Standardised:
    """Features with the column means and deviations of a training split, read in float64 blocks of rows.

    Columns without variation are centred and left unscaled, so they are zero on the training split. So are dead
    ones, whose deviation is below a billionth of the largest: trained norms can have weights near 1e-30, and
    dividing by that would give the probe weights near 1e30.
    """

    def __init__(self, X: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> None:
        self.X, self.mean, self.scale = X, mean, scale

    @classmethod
    def of(cls, X: np.ndarray) -> Standardised:
        """Measure means and deviations (population form) of `X` in float64, two passes, memory flat in n."""
        n = len(X)
        mean = np.zeros(X.shape[1])
        for i in range(0, n, _ROWS):
            mean += X[i : i + _ROWS].sum(0, dtype=np.float64)
        mean /= n
        square = np.zeros(X.shape[1])
        for i in range(0, n, _ROWS):
            centred = np.subtract(X[i : i + _ROWS], mean, dtype=np.float64)
            square += np.einsum("ij,ij->j", centred, centred)
        deviation = np.sqrt(square / n)
        # A column of one repeated number has a deviation of rounding size, not of size 0.
        constant = deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-300) * math.sqrt(n)
        constant |= deviation <= _DEAD * deviation.max(initial=0.0)
        return cls(X, mean, np.where(constant, 1.0, deviation))

    def like(self, X: np.ndarray) -> Standardised:
        """Other rows, standardised by these statistics."""
        return Standardised(X, self.mean, self.scale)

    def __len__(self) -> int:
        return len(self.X)

    def blocks(self, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        inverse = 1 / self.scale
        for i in range(0, len(self.X), _ROWS):
            rows = slice(i, min(i + _ROWS, len(self.X)))
            block = np.subtract(self.X[rows], self.mean, dtype=np.float64)
            block *= inverse
            yield rows, torch.from_numpy(block).to(device)

    def loss(self, labels: torch.Tensor, coef: torch.Tensor, intercept: torch.Tensor) -> float:
        """Σ −log p of the labels in float64, for weights K×d."""
        total = 0.0
        for rows, block in self.blocks(coef.device):
            logits = torch.addmm(intercept, block, coef.T)
            total += float(torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum"))
        return total


def lower_gram(Z: torch.Tensor) -> torch.Tensor:
    """ZᵀZ of a float64 n×d tensor; only the lower triangle is sure to be filled, which `eigh` reads."""
    if Z.device.type != "cpu":
        return Z.T @ Z
    # The symmetric product does half the work of a general one; torch offers none.
    return torch.from_numpy(blas.dsyrk(1.0, Z.numpy().T, lower=1))
