"""Linear probes: multinomial logistic regression, C chosen on validation, accuracy measured on test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import Interval, wilson_interval
from layerprobe.metrics.probing import Standardised
from layerprobe.metrics.probing.solver import LogisticFit, LogisticPath
from layerprobe.metrics.validation import C_GRID, check_features, check_grid, check_labels

REFITS = ("train+validation", "train")


@dataclass(frozen=True, kw_only=True)
class LogisticProbe:
    """A linear classifier for raw features: standardisation by the training split, then weights.

    Attributes
    ----------
    coef : np.ndarray
        K×d, for standardised features.
    intercept : np.ndarray
        K.
    mean, scale : np.ndarray
        d, of the training split.
    C : float
        Inverse regularisation strength.
    fit : LogisticFit
        How the solver ended.
    """

    coef: np.ndarray
    intercept: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    C: float
    fit: LogisticFit

    def logits(self, X: np.ndarray) -> np.ndarray:
        """n×K scores; their softmax is the predicted distribution."""
        folded = self.coef / self.scale
        return np.asarray(X, dtype=np.float64) @ folded.T + (self.intercept - folded @ self.mean)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The class with the highest score, int64 in 0 … K−1."""
        return self.logits(X).argmax(axis=1)

    def log_probabilities(self, X: np.ndarray) -> np.ndarray:
        """n×K natural logarithms of the predicted probabilities."""
        scores = self.logits(X)
        scores -= scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """A probe with its C chosen on validation and its accuracy measured once on test.

    Attributes
    ----------
    probe : LogisticProbe
        The classifier that was tested.
    Cs : np.ndarray
        The grid.
    fits : list[LogisticFit]
        One per C, on the training split.
    train_accuracy, val_accuracy : np.ndarray
        Per C, of the probes fitted on the training split alone.
    best_C : float
        The smallest C among those with the highest validation accuracy.
    refit : str
        On which rows the tested probe was fitted.
    correct : np.ndarray
        n_test bool, which test images the final probe classifies right.
    test_accuracy : float
        Share of them.
    interval : Interval
        Its 95 % Wilson interval.
    """

    probe: LogisticProbe
    Cs: np.ndarray
    fits: list[LogisticFit]
    train_accuracy: np.ndarray
    val_accuracy: np.ndarray
    best_C: float
    refit: str
    correct: np.ndarray
    test_accuracy: float
    interval: Interval


def check_refit(refit: str) -> None:
    """Raises UsageError for what is not in `REFITS`."""
    if refit not in REFITS:
        raise UsageError(f"refit is one of {', '.join(REFITS)}; got '{refit}'")


def fit_logistic_path(
    X: np.ndarray, y: np.ndarray, Cs: ArrayLike = C_GRID, *, tol: float = 1e-4, device: str = "cpu"
) -> list[LogisticProbe]:
    """L2-regularised multinomial logistic regression for every C, each within `tol` of its optimum.

    The objective is Σ_i −log p(y_i | x_i) + ‖W‖²/(2C) over features standardised by the statistics of `X`,
    the intercept free: scikit-learn's, divided by C. With two classes the softmax has two weight vectors, so
    C here corresponds to 2C in scikit-learn's one-vector form.

    Parameters
    ----------
    X : np.ndarray
        n×d features, any float dtype.
    y : np.ndarray
        n labels, int64 in 0 … K−1, each class present.
    Cs : ArrayLike
        Inverse regularisation strengths; fitted in ascending order, each from the solution before.
    tol : float
        Largest relative suboptimality (F − min F)/F of a converged fit.
    device : str
        A torch device with float64.

    Returns
    -------
    list[LogisticProbe]
        Of LogisticProbe, ascending in C; `.fit` holds objective, Newton decrement, duality gap, cost. Cost:
        one d×d eigendecomposition, then n·d·K per evaluation, of which a hard fit takes 100 to 200.

    Raises
    ------
    UsageError
        Non-finite features, one class only, labels outside 0 … K−1, an impossible C.
    """
    grid = check_grid(Cs)
    X = check_features(X, "X")
    y, k = check_labels(y, len(X), "y")
    missing = np.flatnonzero(np.bincount(y, minlength=k) == 0)
    if missing.size:
        raise UsageError(f"labels run from 0 to {k - 1}, but class {missing[0]} has no row")
    data = Standardised.of(X)
    path = LogisticPath(data, y, k, tol=tol, device=device)
    return [_as_probe(path.fit(C), data) for C in grid]


def select_probe(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    n_classes: int,
    *,
    Cs: ArrayLike = C_GRID,
    refit: str = "train+validation",
    tol: float = 1e-4,
    device: str = "cpu",
) -> ProbeResult:
    """Fit every C on train, choose by validation accuracy, refit, and measure once on test.

    The refit uses the validation images as well; features stay standardised by the training split, so that
    the chosen C means the same. `refit="train"` keeps the probe that was validated.

    Parameters
    ----------
    train, validation, test : tuple[np.ndarray, np.ndarray]
        (X, y), features n×d and int64 labels in 0 … n_classes−1. Each class needs a training row.
    n_classes : int
        K.

    Raises
    ------
    UsageError
        See `fit_logistic_path`; an unknown refit.
    """
    check_refit(refit)
    grid = check_grid(Cs)
    (X, y), (X_val, y_val), (X_test, y_test) = train, validation, test
    data = Standardised.of(X)
    path = LogisticPath(data, y, n_classes, tol=tol, device=device)
    probes = [_as_probe(path.fit(C), data) for C in grid]
    accuracy = np.array([np.mean(probe.predict(X_val) == y_val) for probe in probes])
    best = int(accuracy.argmax())
    chosen = probes[best]
    if refit == "train+validation":
        both = Standardised(np.concatenate([X, X_val]), data.mean, data.scale)
        path = LogisticPath(both, np.concatenate([y, y_val]), n_classes, tol=tol, device=device)
        path.start_from(chosen.coef, chosen.intercept)
        chosen = _as_probe(path.fit(chosen.C), both)
    correct = chosen.predict(X_test) == y_test
    return ProbeResult(
        probe=chosen,
        Cs=grid,
        fits=[probe.fit for probe in probes],
        train_accuracy=np.array([np.mean(probe.predict(X) == y) for probe in probes]),
        val_accuracy=accuracy,
        best_C=float(grid[best]),
        refit=refit,
        correct=correct,
        test_accuracy=float(correct.mean()),
        interval=wilson_interval(int(correct.sum()), len(correct)),
    )


def _as_probe(fit: LogisticFit, data: Standardised) -> LogisticProbe:
    return LogisticProbe(
        coef=fit.coef, intercept=fit.intercept, mean=data.mean, scale=data.scale, C=fit.C, fit=fit
    )
