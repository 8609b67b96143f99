"""The exact maximum of the evidence that LogME is made of."""

from __future__ import annotations

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.transferability import Array, ClassSpectrum


def maximum_evidence(spectrum: ClassSpectrum) -> Array:
    """Maximum log evidence per image of each class's indicator (see `transferability.logme`).

    In the basis of the centred axes and the constant vector, XXᵀ is a diagonal plus one row and column, so
    the quadratic form and the determinant of I + XXᵀ/λ, λ = α/β, are sums of positive terms: the mean of the
    features costs no second decomposition and no digits.
    """
    n, values = spectrum.n_samples, spectrum.eigenvalues
    counts = spectrum.counts.astype(float)
    along = spectrum.class_sums / np.sqrt(values)
    power = along**2
    crossing = along * (np.sqrt(n * values) * spectrum.mean_inside)
    offset = n * spectrum.mean_inside**2
    outside_mean = n * spectrum.mean_outside
    constant = counts / np.sqrt(n)
    outside = counts - constant**2 - power.sum(axis=1)
    exact = outside <= 1e-10 * counts
    outside[exact | (len(values) >= n - 1)] = 0.0

    def evidence(lam: Array, *, one_each: bool) -> tuple[Array, Array]:
        """Profile over β and its residual: k×m for m shared values of λ, or k for one λ per class."""
        damped = 1.0 / (lam[:, None] + values)
        mean_term = 1.0 + damped @ offset + outside_mean / lam
        log_det = np.log1p(values / lam[:, None]).sum(axis=1) + np.log(mean_term)
        if one_each:
            fit, crossed = (power * damped).sum(axis=1), (crossing * damped).sum(axis=1)
            residual = outside + lam * fit + (constant - crossed) ** 2 / mean_term
        else:
            fit, crossed = power @ damped.T, crossing @ damped.T
            residual = outside[:, None] + lam * fit + (constant[:, None] - crossed) ** 2 / mean_term
        return -n / 2 * np.log(residual) - log_det / 2, residual

    step = 0.4
    top = np.log(max(values[0], n * float(spectrum.mean_inside @ spectrum.mean_inside) + outside_mean) * 1e8)
    grid = np.arange(np.log(values[-1] * 1e-14), top, step)
    on_grid, residual = evidence(np.exp(grid), one_each=False)
    best = on_grid.argmax(axis=1)
    rank = len(values) + (outside_mean > 0)
    unbounded = (best == 0) & (residual[:, 0] <= 1e-10 * counts) & (rank < n)
    if unbounded.any():
        label = spectrum.classes[int(np.argmax(unbounded))]
        raise UsageError(
            f"logme has no maximum: class {label} is an exact linear function of features of rank {rank} "
            f"on {n} images"
        )
    # Golden section on every class at once; 24 steps leave 1e-5 of a bracket where the curve is flat.
    shrink = (np.sqrt(5) - 1) / 2
    low, high = grid[best] - step, grid[best] + step
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    at_left, at_right = (evidence(np.exp(t), one_each=True)[0] for t in (left, right))
    for _ in range(24):
        go_left = at_left > at_right
        low, high = np.where(go_left, low, left), np.where(go_left, right, high)
        left, right = (
            np.where(go_left, high - shrink * (high - low), right),
            np.where(go_left, left, low + shrink * (high - low)),
        )
        fresh = evidence(np.exp(np.where(go_left, left, right)), one_each=True)[0]
        at_left, at_right = np.where(go_left, fresh, at_right), np.where(go_left, at_left, fresh)
    without_features = -n / 2 * np.log(counts)
    highest = np.max([on_grid.max(axis=1), at_left, at_right, without_features], axis=0)
    return highest / n + (np.log(n) - np.log(2 * np.pi) - 1) / 2
