"""Transfer scores of frozen features; here: what they share, class-sorted features in their principal axes.

One Gram matrix and one eigendecomposition per layer. Every score here is invariant to a
rotation of the features, so all of them are computed from `ClassSpectrum.scores` and the sums over classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerprobe.errors import UsageError
from layerprobe.metrics.validation import check_features, check_labels

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ClassSpectrum:
    """Centred features in their principal axes, rows sorted by class.

    With X the n×d features, μ their mean and V the r principal axes of non-zero variance:

    Attributes
    ----------
    scores : n×r, (X − μ)V; rows sorted by class, columns by falling variance.
    eigenvalues : r, positive, falling: the sums of squares of the columns of `scores`.
    mean_inside : r, Vᵀμ.
    mean_outside : squared length of the part of μ that lies outside the r axes.
    classes : the k labels that occur, rising.
    counts : k, images per class.
    n_features : d, the dimensions before axes of zero variance were left out.
    order : n, the row of X that each row of `scores` comes from.
    """

    scores: Array
    eigenvalues: Array
    mean_inside: Array
    mean_outside: float
    classes: NDArray[np.int64]
    counts: NDArray[np.int64]
    n_features: int
    order: NDArray[np.int64]

    @property
    def n_samples(self) -> int:
        return len(self.scores)

    @property
    def starts(self) -> NDArray[np.int64]:
        """First row of each class in `scores`."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    @cached_property
    def class_sums(self) -> Array:
        """k×r, the sum of `scores` over each class."""
        return np.add.reduceat(self.scores, self.starts, axis=0)

    @cached_property
    def class_means(self) -> Array:
        """k×r, relative to the overall mean."""
        return self.class_sums / self.counts[:, None]


def class_spectrum(features: ArrayLike, labels: ArrayLike) -> ClassSpectrum:
    """Centre, sort by class, and rotate to principal axes: cost n·min(n, d)·max(n, d) + min(n, d)³.

    Float64 throughout, and centred before the product, so that columns with offsets of hundreds of
    deviations (language models have them) lose nothing. Axes whose variance is rounding error are left out.

    Parameters
    ----------
    features : n×d, any float type, finite.
    labels : n integers ≥ 0. Classes that do not occur are simply absent.

    Raises
    ------
    UsageError : shapes that do not fit, non-finite features, one class only, or constant features.
    """
    X, y = check_labelled(features, labels)
    order = np.argsort(y, kind="stable")
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise UsageError(f"transfer scores compare classes: all {len(y)} images have label {classes[0]}")
    n, d = X.shape
    X = X[order].astype(np.float64)
    mean = X.mean(axis=0)
    X -= mean
    gram = X.T @ X if d <= n else X @ X.T
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    # Constant columns leave rounding of the size of the mean, hence the second term.
    floor = max(n, d) * np.finfo(float).eps * max(values[0], np.finfo(float).eps * n * float(mean @ mean))
    rank = int(np.count_nonzero(values > floor))
    if rank == 0:
        raise UsageError(f"transfer scores need features that differ: all {n} rows of {n}×{d} are equal")
    values, vectors = values[:rank], np.ascontiguousarray(vectors[:, :rank])
    if d <= n:
        scores = X @ vectors
        inside = mean @ vectors
        outside = mean - vectors @ inside
    else:
        scores = vectors * np.sqrt(values)
        axes = vectors / np.sqrt(values)
        inside = (X @ mean) @ axes
        outside = mean - X.T @ (axes @ inside)
    left_over = float(outside @ outside)
    if left_over <= d * np.finfo(float).eps * float(mean @ mean):
        left_over = 0.0
    return ClassSpectrum(
        scores=scores,
        eigenvalues=values,
        mean_inside=inside,
        mean_outside=left_over,
        classes=classes,
        counts=counts,
        n_features=d,
        order=order,
    )


def maximum_evidence(spectrum: ClassSpectrum) -> Array:
    """Maximum log evidence per image of each class's indicator (see `scores.logme`).

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


def ledoit_wolf(spectrum: ClassSpectrum) -> tuple[float, float]:
    """Shrinkage in [0, 1] and the variance shrunk towards, in d dimensions."""
    n, d = spectrum.n_samples, spectrum.n_features
    variances = spectrum.eigenvalues / n
    target = float(variances.sum()) / d
    squared = float((variances**2).sum())
    distance = squared / d - target**2
    lengths = np.einsum("ij,ij->i", spectrum.scores, spectrum.scores)
    noise = (float((lengths**2).sum()) / n - squared) / (n * d)
    if distance <= 0:
        return 0.0, target
    return min(noise, distance) / distance, target


def gcv_penalty(spectrum: ClassSpectrum) -> float:
    """The ridge penalty with the least generalised cross-validation error, summed over classes."""
    n, values = spectrum.n_samples, spectrum.eigenvalues
    power = (spectrum.class_sums**2).sum(axis=0) / values
    counts = spectrum.counts
    outside = float((counts - counts**2 / n).sum() - power.sum())
    if len(values) >= n - 1 or outside < 0:
        outside = 0.0
    penalties = values[0] * np.logspace(-10, 2, 49)
    left = penalties[:, None] / (penalties[:, None] + values)
    residual = outside + left**2 @ power
    # n minus the degrees of freedom: what the penalty holds back, and the axes without variance.
    freedom = (n - 1 - len(values)) + left.sum(axis=1)
    return float(penalties[np.argmin(residual / freedom**2)])


def check_labelled(features: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Features and whole, not negative labels that fit each other; any number of classes."""
    X = check_features(features, "features")
    return X, check_labels(labels, len(X), "labels", least_classes=1)[0]
