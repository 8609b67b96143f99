"""How alike two sets of features of the same images are: one pair of layers at a time, in float64.

`X` and `Y` are samples × features, row i of both belonging to the same image; the widths may differ.
These are the definitions, in their plainest form. All layers against all layers, fast and in flat memory:
`layerprobe.metrics.similarity.all_pairs`.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerprobe.errors import UsageError

Matrix = NDArray[np.float64]


class BiasedEstimateWarning(UserWarning):
    """A biased similarity was asked for where it is mostly bias: few images against many features."""


def centred_pair(X: ArrayLike, Y: ArrayLike, *, minimum: int = 4) -> tuple[Matrix, Matrix]:
    """Both feature matrices in float64 with column means removed; shapes, counts and values checked.

    Raises
    ------
    UsageError : not n×d, row counts that differ, fewer than `minimum` rows, or non-finite values.
    """
    checked = []
    for name, value in (("X", X), ("Y", Y)):
        array = np.asarray(value, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] == 0:
            raise UsageError(f"{name} must be images × features, got shape {array.shape}")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise UsageError(
                f"{name} holds {int((~np.isfinite(array)).sum())} non-finite values (first: row {row})"
            )
        checked.append(array)
    x, y = checked
    if len(x) != len(y):
        raise UsageError(f"similarity pairs rows image by image: X is {_shape(x)}, Y is {_shape(y)}")
    if len(x) < minimum:
        raise UsageError(f"this similarity needs at least {minimum} images; got {len(x)}")
    return _centred(x), _centred(y)


def debiased_hsic(K: ArrayLike, L: ArrayLike) -> float:
    """HSIC₁, the unbiased estimate of the Hilbert–Schmidt independence criterion, from two Gram matrices.

    Unlike the biased HSIC₀ = tr(KHLH)/(n−1)², the diagonals take no part, so the expectation is zero when
    X and Y are independent, and single estimates may be negative.

    Parameters
    ----------
    K, L : n×n, symmetric, n ≥ 4; centring is not needed.

    References
    ----------
    Song, Smola, Gretton, Borgwardt, Bedo, "Supervised feature selection via dependence estimation", ICML 2007.
    """
    k = np.array(K, dtype=np.float64)
    m = np.array(L, dtype=np.float64)
    n = len(k)
    if k.shape != (n, n) or m.shape != (n, n) or n < 4:
        raise UsageError(f"HSIC₁ takes two n×n Gram matrices with n ≥ 4, got {k.shape} and {m.shape}")
    np.fill_diagonal(k, 0.0)
    np.fill_diagonal(m, 0.0)
    trace = float(np.sum(k * m))
    sums = float(k.sum() * m.sum()) / ((n - 1) * (n - 2))
    rows = 2.0 / (n - 2) * float(k.sum(axis=0) @ m.sum(axis=0))
    return (trace + sums - rows) / (n * (n - 3))


def debiased_linear_cka(X: ArrayLike, Y: ArrayLike) -> float:
    """Debiased linear centred kernel alignment: HSIC₁(XXᵀ, YYᵀ) / √(HSIC₁(XXᵀ, XXᵀ) · HSIC₁(YYᵀ, YYᵀ)).

    The biased form (`linear_cka`) is near 1 for independent features as soon as d ≳ n; this one is 0 on
    average, and small negative values are estimates of zero, not errors. Cost: 3·n·d² or 3·n²·d
    multiplications, whichever is fewer.

    Parameters
    ----------
    X : n×d₁, Y : n×d₂; n ≥ 4. Computed in float64 whatever dtype arrives.

    Returns
    -------
    float in [−1, 1]; 1 = equal up to rotation, shift and isotropic scale, 0 = independent. Symmetric.

    Raises
    ------
    UsageError : shapes that do not pair, non-finite values, or a constant X or Y (undefined).

    References
    ----------
    Kornblith, Norouzi, Lee, Hinton, "Similarity of neural network representations revisited", ICML 2019,
    arXiv 1905.00414; the debiased form: Nguyen, Raghu, Kornblith, ICLR 2021, arXiv 2010.15327, equation 3.

    Examples
    --------
    >>> X = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(debiased_linear_cka(X, 3 * X + 1), 12)
    1.0
    """
    x, y = (_unit(part, name) for part, name in zip(centred_pair(X, Y), ("X", "Y"), strict=True))
    numerator = _debiased_numerator(x, y)
    self_x, self_y = _debiased_numerator(x, x), _debiased_numerator(y, y)
    for name, value in (("X", self_x), ("Y", self_y)):
        if value <= 0.0:
            raise UsageError(
                f"debiased CKA is undefined: all {len(x)} images are equally far apart in {name}; use more images"
            )
    return numerator / float(np.sqrt(self_x * self_y))


def linear_cka(X: ArrayLike, Y: ArrayLike) -> float:
    """Biased linear CKA, ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred X and Y: in [0, 1], and too high.

    Kept for comparison with published numbers. Independent Gaussians with n=256, d=768 score 0.75, so a
    `BiasedEstimateWarning` is given where n < 10·max(d₁, d₂); prefer `debiased_linear_cka`.

    References
    ----------
    Kornblith, Norouzi, Lee, Hinton, ICML 2019, arXiv 1905.00414, section 3.
    """
    x, y = (_unit(part, name) for part, name in zip(centred_pair(X, Y), ("X", "Y"), strict=True))
    n, d = len(x), max(x.shape[1], y.shape[1])
    if n < 10 * d:
        warnings.warn(
            f"biased CKA with {n} images and {d} features is inflated (independent features would score about "
            f"{d / (n + d):.2f}); debiased_linear_cka is not",
            BiasedEstimateWarning,
            stacklevel=2,
        )
    return _cross_norm(x, y) / float(np.sqrt(_cross_norm(x, x) * _cross_norm(y, y)))


def _centred(x: Matrix) -> Matrix:
    """x without its column means; exactly zero where only the rounding of the mean would be left."""
    centred = x - x.mean(axis=0)
    if np.abs(centred).max() <= 64 * np.finfo(np.float64).eps * np.abs(x).max():
        centred[:] = 0.0
    return centred


def _debiased_numerator(x: Matrix, y: Matrix) -> float:
    """n(n−3)·HSIC₁ of centred features, without ever forming what the diagonal would bias."""
    n = len(x)
    k, m = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
    return _cross_norm(x, y) - n / (n - 2) * float(k @ m) + float(k.sum() * m.sum()) / ((n - 1) * (n - 2))


def _cross_norm(x: Matrix, y: Matrix) -> float:
    """‖xᵀy‖²_F, through features or through Gram matrices, whichever is cheaper."""
    n = len(x)
    if x.shape[1] * y.shape[1] <= n * (x.shape[1] + y.shape[1]):
        return float(np.square(x.T @ y).sum())
    return float(np.sum((x @ x.T) * (y @ y.T)))


def _unit(x: Matrix, name: str) -> Matrix:
    """x scaled to a mean squared row norm of 1: CKA does not change, and nothing under- or overflows."""
    largest = float(np.abs(x).max())
    if largest == 0.0:
        raise UsageError(f"CKA is undefined: {name} is constant over the images")
    x = x / largest
    return x / float(np.sqrt(np.square(x).sum() / len(x)))


def _shape(x: Matrix) -> str:
    return f"{x.shape[0]}×{x.shape[1]}"
