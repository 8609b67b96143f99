"""How alike two sets of features of the same images are: one pair of layers at a time, in float64.

`X` and `Y` are samples × features, row i of both belonging to the same image; the widths may differ. What each
measure ignores differs, and that is the reason to have more than one:

===================  =====  =================  ========================================  =================
measure              equal  independent        does not change under                     needs
===================  =====  =================  ========================================  =================
debiased_linear_cka  1      0 on average       rotation, shift, scale                    n·d·min(n, d)
linear_cka           1      grows with d/n     rotation, shift, scale                    n·d·min(n, d)
debiased_rbf_cka     1      0 on average       rotation, shift, scale                    n²·d
procrustes_distance  0      up to √2           rotation, shift, scale                    n·d², a d×d SVD
svcca                1      grows with d/n     rotation, shift, scale                    n well above d
pwcca                1      grows with d/n     shift, scale; any linear map of Y         n well above d
mutual_knn           1      k/(n−1)            rotation, scale                           n²·d
rsa                  1      0 on average       scale; a shift of a whole row             n²·d, a sort of n²
===================  =====  =================  ========================================  =================
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerprobe.errors import UsageError
from layerprobe.metrics.validation import check_pair

Matrix = NDArray[np.float64]


class BiasedEstimateWarning(UserWarning):
    """A biased similarity was asked for where it is mostly bias: few images against many features."""


def debiased_hsic(K: ArrayLike, L: ArrayLike) -> float:
    """HSIC₁, the unbiased estimate of the Hilbert–Schmidt independence criterion, from two Gram matrices.

    The diagonals take no part, so the expectation is zero when X and Y are independent, and single estimates
    may be negative.

    Parameters
    ----------
    K, L : ArrayLike
        n×n, symmetric, n ≥ 4; centring is not needed.

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
    average, and small negative values are estimates of zero.

    Parameters
    ----------
    X : ArrayLike
        n×d₁, Y : n×d₂; n ≥ 4. Computed in float64 whatever dtype arrives.

    Returns
    -------
    float
        In [−1, 1]; 1 = equal up to rotation, shift and isotropic scale, 0 = independent. Symmetric.

    Raises
    ------
    UsageError
        Shapes that do not pair, non-finite values, or a constant X or Y (undefined).

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
    x, y = (_unit(part, name) for part, name in zip(_centred_pair(X, Y), ("X", "Y"), strict=True))
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
    x, y = (_unit(part, name) for part, name in zip(_centred_pair(X, Y), ("X", "Y"), strict=True))
    n, d = len(x), max(x.shape[1], y.shape[1])
    if n < 10 * d:
        warnings.warn(
            f"biased CKA with {n} images and {d} features is inflated (independent features would score about "
            f"{d / (n + d):.2f}); debiased_linear_cka is not",
            BiasedEstimateWarning,
            stacklevel=2,
        )
    return _cross_norm(x, y) / float(np.sqrt(_cross_norm(x, x) * _cross_norm(y, y)))


def debiased_rbf_cka(X: ArrayLike, Y: ArrayLike, *, bandwidth: float = 0.5) -> float:
    """CKA with Gaussian kernels exp(−‖a−b‖²/(2σ²)) and the debiased HSIC₁; σ = `bandwidth` × median distance.

    Small bandwidths look at near neighbours only; large ones approach linear CKA.

    Parameters
    ----------
    X : ArrayLike
        n×d₁, Y : n×d₂; n ≥ 4.
    bandwidth : float
        > 0, in medians of the pairwise distances of each side.

    Raises
    ------
    UsageError
        Shapes, non-finite values, a bandwidth ≤ 0, or images that mostly coincide (median 0).

    References
    ----------
    Kornblith, Norouzi, Lee, Hinton, ICML 2019, arXiv 1905.00414, section 3 (biased there).
    """
    if bandwidth <= 0.0:
        raise UsageError(f"the bandwidth must be positive, got {bandwidth}")
    x, y = _centred_pair(X, Y)
    k, m = _gaussian_kernel(x, bandwidth, "X"), _gaussian_kernel(y, bandwidth, "Y")
    own_x, own_y = debiased_hsic(k, k), debiased_hsic(m, m)
    if min(own_x, own_y) <= 0.0:
        raise UsageError("RBF CKA is undefined: all images are equally far apart; use more images")
    return debiased_hsic(k, m) / float(np.sqrt(own_x * own_y))


def procrustes_distance(X: ArrayLike, Y: ArrayLike) -> float:
    """min over rotations Q of ‖X − YQ‖_F, with X and Y centred and scaled to unit Frobenius norm.

    A metric (the triangle inequality holds). In [0, √2], 0 = equal up to rotation, reflection, shift and
    isotropic scale. Some papers report its square, 2 − 2‖XᵀY‖_*.

    References
    ----------
    Williams, Kunz, Kornblith, Linderman, NeurIPS 2021, arXiv 2110.14739; Ding, Denain, Steinhardt,
    NeurIPS 2021, arXiv 2108.01661.
    """
    x, y = (_unit_norm(part, name) for part, name in zip(_centred_pair(X, Y, minimum=2), "XY", strict=True))
    nuclear = float(np.linalg.svd(x.T @ y, compute_uv=False).sum())
    return float(np.sqrt(max(0.0, 2.0 - 2.0 * nuclear)))


def svcca(X: ArrayLike, Y: ArrayLike, *, variance: float = 0.99) -> float:
    """Mean canonical correlation of the principal components that hold `variance` of each side.

    In [0, 1], 1 = equal up to an invertible linear map of the kept components. Upward biased: independent
    sides score about √(kept/n), so it needs many more images than components.

    Raises
    ------
    UsageError
        Shapes, non-finite or constant features, or kept components that fill the space of the images, where
        every canonical correlation would be 1 whatever the features.

    References
    ----------
    Raghu, Gilmer, Yosinski, Sohl-Dickstein, NeurIPS 2017, arXiv 1706.05806.
    """
    if not 0.0 < variance <= 1.0:
        raise UsageError(f"variance is a share in (0, 1], got {variance}")
    x, y = _centred_pair(X, Y, minimum=2)
    left, right = _directions(x, "X", variance), _directions(y, "Y", variance)
    return float(_canonical(left, right)[1].mean())


def pwcca(X: ArrayLike, Y: ArrayLike) -> float:
    """Canonical correlations averaged with weights: how much of X each canonical direction accounts for.

    In [0, 1]; not symmetric, the weights are those of X and depend on its axes. Biased upwards and refused
    like `svcca`.

    References
    ----------
    Morcos, Raghu, Bengio, NeurIPS 2018, arXiv 1806.05759, section 2.2.
    """
    x, y = _centred_pair(X, Y, minimum=2)
    basis, correlations = _canonical(_directions(x, "X", 1.0), _directions(y, "Y", 1.0))
    weights = np.abs(basis.T @ x).sum(axis=1)
    return float(weights @ correlations / weights.sum())


def mutual_knn(X: ArrayLike, Y: ArrayLike, *, k: int = 10) -> float:
    """Mean share of an image's `k` nearest neighbours (by cosine) that both sides agree on.

    In [0, 1]; independent sides share k/(n−1) on average. The features are not centred first.

    References
    ----------
    Huh, Cheung, Wang, Isola, "The Platonic representation hypothesis", ICML 2024, arXiv 2405.07987.
    """
    x, y = check_pair(X, Y, minimum=2)
    n = len(x)
    if not 1 <= k < n:
        raise UsageError(f"k must lie between 1 and {n - 1} for {n} images, got {k}")
    sides = [_unit_rows(x, "X"), _unit_rows(y, "Y")]
    shared = 0
    for start in range(0, n, 1024):
        rows = np.arange(start, min(start + 1024, n))
        chosen = []
        for side in sides:
            cosine = side[rows] @ side.T
            cosine[rows - start, rows] = -np.inf
            mask = np.zeros(cosine.shape, dtype=bool)
            np.put_along_axis(mask, np.argpartition(-cosine, k - 1, axis=1)[:, :k], True, axis=1)
            chosen.append(mask)
        shared += int((chosen[0] & chosen[1]).sum())
    return shared / (n * k)


def rsa(X: ArrayLike, Y: ArrayLike) -> float:
    """Representational similarity analysis: Spearman correlation of two dissimilarity matrices.

    Dissimilarity of two images is 1 − Pearson correlation of their feature vectors. In [−1, 1]. Memory:
    8·n² bytes a side.

    Raises
    ------
    UsageError
        Shapes, fewer than 3 images or 2 features, an image with equal features throughout, or dissimilarities
        that are all equal.

    References
    ----------
    Kriegeskorte, Mur, Bandettini, Frontiers in Systems Neuroscience 2, 2008.
    """
    from scipy.stats import rankdata

    ranks = []
    for name, array in zip("XY", check_pair(X, Y, minimum=3), strict=True):
        rows = array - array.mean(axis=1, keepdims=True)
        if np.any(np.abs(rows).max(axis=1) <= 64 * np.finfo(np.float64).eps * np.abs(array).max(axis=1)):
            raise UsageError(f"RSA is undefined: an image of {name} has equal features throughout")
        unit = _unit_rows(rows, name)
        dissimilarity = 1.0 - (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        rank = rankdata(np.round(dissimilarity, 12))
        rank -= rank.mean()
        if not rank.any():
            raise UsageError(f"RSA is undefined: all images of {name} are equally dissimilar")
        ranks.append(rank)
    return float(ranks[0] @ ranks[1] / np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))


def _centred(x: Matrix) -> Matrix:
    """x without its column means; exactly zero where only rounding would be left."""
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


def _centred_pair(X: ArrayLike, Y: ArrayLike, *, minimum: int = 4) -> tuple[Matrix, Matrix]:
    x, y = check_pair(X, Y, minimum)
    return _centred(x), _centred(y)


def _unit(x: Matrix, name: str) -> Matrix:
    """x scaled to a mean squared row norm of 1: CKA does not change, and nothing under- or overflows."""
    largest = float(np.abs(x).max())
    if largest == 0.0:
        raise UsageError(f"CKA is undefined: {name} is constant over the images")
    x = x / largest
    return x / float(np.sqrt(np.square(x).sum() / len(x)))


def _gaussian_kernel(x: Matrix, bandwidth: float, name: str) -> Matrix:
    squared = np.square(x).sum(axis=1)
    distance = np.maximum(squared[:, None] + squared[None, :] - 2.0 * (x @ x.T), 0.0)
    median = float(np.median(distance[np.triu_indices(len(x), 1)]))
    if median <= 0.0:
        raise UsageError(f"RBF CKA is undefined: more than half of the pairs of images coincide in {name}")
    return np.exp(-distance / (2.0 * bandwidth**2 * median))


def _unit_norm(x: Matrix, name: str) -> Matrix:
    norm = float(np.linalg.norm(x))
    if norm == 0.0:
        raise UsageError(f"the similarity is undefined: {name} is constant over the images")
    return x / norm


def _unit_rows(x: Matrix, name: str) -> Matrix:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if np.any(norms == 0.0):
        raise UsageError(f"the similarity is undefined: an image of {name} has no features but zeros")
    return x / norms


def _directions(x: Matrix, name: str, variance: float) -> Matrix:
    """Orthonormal columns (n×kept) spanning the leading principal components of x."""
    left, values, _ = np.linalg.svd(_unit_norm(x, name), full_matrices=False)
    rank = int((values > values[0] * max(x.shape) * np.finfo(np.float64).eps).sum())
    share = np.cumsum(np.square(values[:rank]))
    kept = rank if variance == 1.0 else int(np.searchsorted(share, variance * share[-1]) + 1)
    return left[:, : min(kept, rank)]


def _canonical(left: Matrix, right: Matrix) -> tuple[Matrix, NDArray[np.float64]]:
    """Canonical directions on the left side (n×c) and their correlations, largest first."""
    n = len(left)
    if left.shape[1] + right.shape[1] >= n:
        raise UsageError(
            f"canonical correlations are 1 by construction: {left.shape[1]} and {right.shape[1]} components of "
            f"{n} images; use more images or keep less variance"
        )
    turn, correlations, _ = np.linalg.svd(left.T @ right, full_matrices=False)
    return left @ turn, np.clip(correlations, 0.0, 1.0)
