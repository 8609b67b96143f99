"""What the readable transfer scores of a layer share: class-sorted features in their principal axes.

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


def check_labelled(features: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Features and whole, not negative labels that fit each other; any number of classes."""
    X = check_features(features, "features")
    return X, check_labels(labels, len(X), "labels", least_classes=1)[0]
