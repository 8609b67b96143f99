"""Classifiers without iterations: nearest neighbours, and ridge regression onto one-hot labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import Interval, wilson_interval
from layerprobe.metrics.probing import Standardised, lower_gram
from layerprobe.metrics.validation import check_features, check_labels

K_GRID = (1, 5, 10, 20, 50)
"""Numbers of neighbours tried by default."""

_BLOCK = 2048  # rows compared with the whole training split at a time

ALPHA_GRID = tuple(10.0**power for power in range(-5, 3))
"""Ridge strengths per training row tried by default: 8 values over 7 decades."""


_ROWS = 512  # rows fitted at a time, for all strengths at once, so that the block stays in cache


@dataclass(frozen=True, kw_only=True)
class NeighbourResult:
    """k nearest neighbours with k chosen on validation, measured once on test."""

    k: int
    val_accuracy: np.ndarray
    test_accuracy: float
    interval: Interval


def knn_predict(
    train: tuple[np.ndarray, np.ndarray],
    X: np.ndarray,
    n_classes: int,
    ks: Sequence[int] = K_GRID,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """Classes by majority among the k most similar training rows, for several k.

    Similarity is the cosine between features standardised by the training split; of equally frequent
    classes the one with the larger sum of similarities wins.

    Parameters
    ----------
    train : tuple[np.ndarray, np.ndarray]
        (features n×d, labels).
    X : np.ndarray
        m×d.
    ks : Sequence[int]
        Neighbours, each at most n.

    Returns
    -------
    np.ndarray
        len(ks)×m int64. Cost m·n·d; memory 2048·n.

    Raises
    ------
    UsageError
        Non-finite features, unusable labels, a k outside 1 … n.
    """
    rows = check_features(train[0], "the training features")
    labels, _ = check_labels(train[1], len(rows), "labels", n_classes)
    queries = check_features(X, "X")
    if not ks or min(ks) < 1 or max(ks) > len(rows):
        raise UsageError(f"the number of neighbours lies between 1 and {len(rows)}; got {list(ks)}")
    place = torch.device(device)
    data = Standardised.of(rows)
    bank = torch.cat([_unit(block) for _, block in data.blocks(place)])
    classes = torch.from_numpy(labels).to(place)
    found = np.empty((len(ks), len(queries)), dtype=np.int64)
    parts = [_unit(block) for _, block in data.like(queries).blocks(place)]
    start = 0
    for part in torch.cat(parts).split(_BLOCK):
        near, index = (part @ bank.T).topk(max(ks), dim=1)
        # Similarities below 1e-3 of a vote only order equal counts; in float32 the sum of votes would swallow them.
        weight = 1 + 1e-3 * (near.double() + 1) / 2 / len(rows)
        for i, k in enumerate(ks):
            winners = majority(classes[index[:, :k]], weight[:, :k], n_classes)
            found[i, start : start + len(part)] = winners.cpu().numpy()
        start += len(part)
    return found


def majority(voters: torch.Tensor, weight: torch.Tensor, n_classes: int) -> torch.Tensor:
    """The class with the largest sum of weights in each row of `voters` (classes, m×k)."""
    votes = torch.zeros(len(voters), n_classes, dtype=weight.dtype, device=weight.device)
    return votes.scatter_add_(1, voters, weight).argmax(1)


def select_knn(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    n_classes: int,
    *,
    ks: Sequence[int] = K_GRID,
    device: str = "cpu",
) -> NeighbourResult:
    """Choose k by validation accuracy (the largest of equals), measure once on test. k above n is left out."""
    usable = [k for k in ks if k <= len(train[1])]
    scores = (knn_predict(train, validation[0], n_classes, usable, device=device) == validation[1]).mean(1)
    best = int(len(usable) - 1 - scores[::-1].argmax())
    hits = int((knn_predict(train, test[0], n_classes, [usable[best]], device=device)[0] == test[1]).sum())
    n = len(test[1])
    return NeighbourResult(
        k=usable[best], val_accuracy=scores, test_accuracy=hits / n, interval=wilson_interval(hits, n)
    )


def _unit(block: torch.Tensor) -> torch.Tensor:
    return (block / block.norm(dim=1, keepdim=True).clamp(min=1e-300)).float()


@dataclass(frozen=True, kw_only=True)
class RidgeSweep:
    """Ridge classifiers for several strengths.

    Attributes
    ----------
    alphas : np.ndarray
        Strengths per row; the penalty is n·alpha·‖W‖² beside the sum of squared residuals.
    loo_accuracy : np.ndarray
        Per alpha, share of rows classified right by the fit without that row; exact.
    loo_error : np.ndarray
        Per alpha, mean squared leave-one-out residual over rows and classes.
    coef : np.ndarray
        A×K×d, for standardised features.
    intercept : np.ndarray
        K, the class shares.
    mean, scale : np.ndarray
        d, of the standardisation.
    """

    alphas: np.ndarray
    loo_accuracy: np.ndarray
    loo_error: np.ndarray
    coef: np.ndarray
    intercept: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def predict(self, X: np.ndarray, index: int) -> np.ndarray:
        """Classes by the strength `alphas[index]`, int64."""
        Z = (np.asarray(X, dtype=np.float64) - self.mean) / self.scale
        return (Z @ self.coef[index].T + self.intercept).argmax(axis=1)


@dataclass(frozen=True, kw_only=True)
class RidgeResult:
    """A ridge classifier with its strength chosen by leave-one-out accuracy, measured once on test."""

    alpha: float
    loo_accuracy: float
    test_accuracy: float
    interval: Interval


def ridge_sweep(
    X: ArrayLike, y: ArrayLike, n_classes: int, alphas: ArrayLike = ALPHA_GRID, *, device: str = "cpu"
) -> RidgeSweep:
    """Least squares onto one-hot labels with an L2 penalty, for every strength at once.

    One eigendecomposition of the smaller Gram matrix serves all strengths; a strength then costs one
    n×d×K product. Leave-one-out residuals are exact, e_i / (1 − h_i), with the standardisation (which
    sees no label) kept as it is.

    Parameters
    ----------
    X : ArrayLike
        n×d features, standardised here by their own statistics.
    y : ArrayLike
        n labels in 0 … n_classes−1.
    alphas : ArrayLike
        Positive strengths per row.

    Returns
    -------
    RidgeSweep
        In the order of `alphas`.

    Raises
    ------
    UsageError
        Non-finite features, unusable labels, a strength that is not positive.

    References
    ----------
    Allen, The relationship between variable selection and data augmentation, Technometrics 16 (1974): PRESS.
    """
    rows = check_features(X, "X")
    labels, _ = check_labels(y, len(rows), "y", n_classes)
    strengths = np.asarray(alphas, dtype=np.float64)
    if strengths.size == 0 or not (strengths > 0).all() or not np.isfinite(strengths).all():
        raise UsageError(f"ridge strengths are positive numbers; got {alphas!r}")
    place = torch.device(device)
    data = Standardised.of(rows)
    n, d = rows.shape
    Z = torch.empty(n, d, dtype=torch.float64, device=place)
    for part, block in data.blocks(place):
        Z[part] = block
    target = torch.from_numpy(labels).to(place)
    shares = torch.bincount(target, minlength=n_classes).double() / n
    # Fitted values are of order 1, so float32 keeps enough of them, unless the fit comes near to interpolating
    # and residuals, like 1 − leverage, are small differences.
    working = torch.float32 if n >= 4 * d else torch.float64
    narrow = Z.to(working)
    if d <= n:
        values, axes = torch.linalg.eigh(lower_gram(Z))
        kept = values > values[-1].clamp(min=1e-300) * 1e-12
        values, axes = values[kept], axes[:, kept]
        squares = (narrow @ axes.to(working)).square_()
    else:
        values, left = torch.linalg.eigh(Z @ Z.T)
        kept = values > values[-1].clamp(min=1e-300) * 1e-12
        values, left = values[kept], left[:, kept]
        axes = Z.T @ (left / values.sqrt())
        squares = left.square() * values
    # (Y − shares)ᵀ Z without the n×K one-hot matrix: sums of rows by class.
    moments = torch.zeros(n_classes, d, dtype=torch.float64, device=place)
    moments.index_add_(0, target, Z)
    moments = (moments - shares[:, None] * Z.sum(0)) @ axes
    shrink = 1 / (values + n * torch.from_numpy(strengths).to(place)[:, None])  # A×r
    leverage = (squares @ shrink.T.to(squares.dtype)).double() + 1 / n
    weights = (moments * shrink[:, None, :]) @ axes.T  # A×K×d
    accuracy, error = leave_one_out(narrow, weights.to(working), shares, leverage, target)
    return RidgeSweep(
        alphas=strengths,
        loo_accuracy=accuracy.cpu().numpy(),
        loo_error=error.cpu().numpy(),
        coef=weights.cpu().numpy(),
        intercept=shares.cpu().numpy(),
        mean=data.mean,
        scale=data.scale,
    )


def leave_one_out(
    rows: torch.Tensor,
    weights: torch.Tensor,
    shares: torch.Tensor,
    leverage: torch.Tensor,
    target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy, and mean squared residual over rows and classes, of ridge fits without the row that is judged.

    Parameters
    ----------
    rows : torch.Tensor
        n×d.
    weights : torch.Tensor
        A×K×d for A strengths.
    shares : torch.Tensor
        K class shares, the intercepts.
    leverage : torch.Tensor
        n×A, the diagonal of each hat matrix.
    target : torch.Tensor
        n labels.
    """
    strengths, n_classes, d = weights.shape
    n, stacked, offsets = len(rows), weights.reshape(-1, d), shares.to(rows.dtype).repeat(strengths)
    hits = torch.zeros(strengths, dtype=torch.float64, device=rows.device)
    error = torch.zeros_like(hits)
    for begin in range(0, n, _ROWS):
        part = slice(begin, min(begin + _ROWS, n))
        fitted = torch.addmm(offsets, rows[part], stacked.T).reshape(-1, strengths, n_classes)
        label = target[part, None, None].expand(-1, strengths, 1)
        own = fitted.gather(2, label)[..., 0].double()
        free = (1 - leverage[part]).clamp(min=1e-12)
        error += ((fitted.square().sum(2).double() - 2 * own + 1) / free**2).sum(0)
        # The leave-one-out fit is (ŷ − h·y) / (1 − h); its largest entry does not depend on the divisor.
        fitted.scatter_(2, label, -torch.inf)
        hits += (own - leverage[part] > fitted.amax(2)).double().sum(0)
    return hits / n, error / (n * n_classes)


def select_ridge(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    n_classes: int,
    *,
    alphas: ArrayLike = ALPHA_GRID,
    device: str = "cpu",
) -> RidgeResult:
    """Choose the strength by leave-one-out accuracy on train (largest of equals), measure once on test.

    It needs no validation split: pass the validation images as training images.
    """
    sweep = ridge_sweep(*train, n_classes, alphas, device=device)
    order = np.lexsort((sweep.alphas, sweep.loo_accuracy))
    best = int(order[-1])
    hits = int((sweep.predict(test[0], best) == test[1]).sum())
    n = len(test[1])
    return RidgeResult(
        alpha=float(sweep.alphas[best]),
        loo_accuracy=float(sweep.loo_accuracy[best]),
        test_accuracy=hits / n,
        interval=wilson_interval(hits, n),
    )
