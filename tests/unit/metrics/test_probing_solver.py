"""The probe's solver against scikit-learn and against the conditions of optimality."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from layerprobe.errors import UsageError
from layerprobe.metrics import C_GRID
from layerprobe.metrics.probing import Standardised
from layerprobe.metrics.probing.logistic import fit_logistic_path, select_probe
from layerprobe.metrics.probing.solver import LogisticPath


def transformer_like(n: int = 600, d: int = 40, k: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features with a spectrum over many decades and columns with large offsets, as transformers have."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    scales = np.logspace(0, -4, d)
    centres = rng.normal(size=(k, d))
    X = (centres[y] + 1.5 * rng.normal(size=(n, d))) * scales @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (X + 300 * X.std(0) * (np.arange(d) % 9 == 0)).astype(np.float32), y


def objective(data: Standardised, y: np.ndarray, coef: np.ndarray, intercept: np.ndarray, C: float) -> float:
    loss = data.loss(torch.from_numpy(y), torch.from_numpy(coef), torch.from_numpy(intercept))
    return loss + float((coef * coef).sum()) / (2 * C)


def scikit_learn_objective(X: np.ndarray, y: np.ndarray, C: float) -> tuple[float, LogisticRegression]:
    data = Standardised.of(X)
    Z = (X.astype(float) - data.mean) / data.scale
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=C, tol=1e-7, max_iter=3000).fit(Z, y)
    if len(model.coef_) == 1:
        return float("nan"), model
    return objective(data, y, model.coef_, model.intercept_, C), model


@pytest.mark.parametrize("seed", [0, 1])
def test_every_objective_is_within_tolerance_of_the_best_any_solver_finds(seed: int) -> None:
    X, y = transformer_like(seed=seed)
    for probe in fit_logistic_path(X, y, C_GRID):
        reference, _ = scikit_learn_objective(X, y, probe.C)
        ours = objective(Standardised.of(X), y, probe.coef, probe.intercept, probe.C)
        assert ours == pytest.approx(probe.fit.objective, rel=1e-9)
        assert probe.fit.converged
        assert ours <= reference * (1 + 1e-4)


def test_a_tight_tolerance_gives_scikit_learns_weights() -> None:
    X, y = transformer_like(n=300, d=12, k=4)
    probe = fit_logistic_path(X, y, [0.1], tol=1e-9)[0]
    _, model = scikit_learn_objective(X, y, 0.1)
    assert np.abs(probe.coef - model.coef_).max() < 2e-3 * np.abs(model.coef_).max()
    assert np.allclose(
        probe.log_probabilities(X),
        np.log(model.predict_proba((X - Standardised.of(X).mean) / Standardised.of(X).scale)),
        atol=5e-3,
    )


def test_two_classes_agree_with_the_one_vector_form() -> None:
    X, y = transformer_like(n=300, d=10, k=2)
    probe = fit_logistic_path(X, y, [0.2], tol=1e-9)[0]
    _, model = scikit_learn_objective(X, y, 0.4)
    assert np.allclose(probe.coef[1] - probe.coef[0], model.coef_[0], atol=3e-3 * np.abs(model.coef_).max())


@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
def test_the_duality_gap_bounds_and_the_decrement_estimates_what_is_left(C: float) -> None:
    X, y = transformer_like()
    rough = LogisticPath(Standardised.of(X), y, 7)
    value, decrement, gap = rough._newton(C)
    best = fit_logistic_path(X, y, [C], tol=1e-9)[0].fit.objective
    start = objective(Standardised.of(X), y, np.zeros((7, 40)), np.log(np.bincount(y) / len(y)), C)
    assert gap >= (start - best) / start - 1e-9
    assert value < start
    assert decrement > 0
    # Near the optimum the estimate is the error itself.
    near = LogisticPath(Standardised.of(X), y, 7)
    near._lbfgs(C, 1e-4, 5000)
    before = objective(near.X, y, (near.W @ near.rotation.T).numpy(), near.b.numpy(), C)
    _, decrement, gap = near._newton(C)
    assert gap >= (before - best) / before - 1e-9
    assert decrement == pytest.approx((before - best) / before, rel=0.6, abs=2e-8)


def test_weights_sum_to_zero_over_classes_and_few_rows_span_few_axes() -> None:
    X, y = transformer_like(n=30, d=40, k=3)
    for probe in fit_logistic_path(X, y, [1e-2, 1.0]):
        assert np.abs(probe.coef.sum(0)).max() < 1e-4 * np.abs(probe.coef).max() + 1e-8
        reference, _ = scikit_learn_objective(X, y, probe.C)
        assert probe.fit.objective <= reference * (1 + 1e-4)


def test_scale_shift_and_rotation_of_columns_change_nothing_that_they_should_not() -> None:
    X, y = transformer_like(n=300, d=10, k=3)
    base = fit_logistic_path(X, y, [1.0], tol=1e-8)[0]
    moved = fit_logistic_path(X * 1e-3 + 7.0, y, [1.0], tol=1e-8)[0]
    assert moved.fit.objective == pytest.approx(base.fit.objective, rel=1e-3)
    constant = np.concatenate([X, np.full((300, 1), 5.0, np.float32)], 1)
    padded = fit_logistic_path(constant, y, [1.0], tol=1e-8)[0]
    assert padded.fit.objective == pytest.approx(base.fit.objective, rel=1e-7)
    assert np.allclose(padded.coef[:, -1], 0)


def test_confident_classes_and_a_class_of_one_row() -> None:
    rng = np.random.default_rng(0)
    y = np.r_[np.zeros(1, int), np.repeat([1, 2], 50)]
    X = np.eye(3)[y] * 50 + rng.normal(size=(101, 3))
    for probe in fit_logistic_path(X, y, C_GRID):
        assert probe.fit.converged
        assert np.isfinite(probe.coef).all()
        reference, _ = scikit_learn_objective(X, y, probe.C)
        assert probe.fit.objective <= reference * (1 + 1e-4)


def test_features_without_variation_leave_the_class_shares() -> None:
    y = np.repeat([0, 1], [30, 10])
    probe = fit_logistic_path(np.full((40, 3), 2.0), y, [1.0])[0]
    assert probe.fit.converged
    assert np.allclose(np.exp(probe.log_probabilities(np.full((1, 3), 2.0))), [[0.75, 0.25]])


def test_selection_uses_validation_and_reports_test_once() -> None:
    X, y = transformer_like(n=900)
    parts = [slice(0, 400), slice(400, 600), slice(600, 900)]
    data = [(X[part], y[part]) for part in parts]
    result = select_probe(data[0], data[1], data[2], 7, refit="train")
    validated = [np.mean(p.predict(data[1][0]) == data[1][1]) for p in fit_logistic_path(*data[0], C_GRID)]
    assert result.val_accuracy == pytest.approx(validated)
    assert result.best_C == C_GRID[int(np.argmax(validated))]
    assert result.test_accuracy == np.mean(result.probe.predict(data[2][0]) == data[2][1])
    low, high = result.interval
    assert low < result.test_accuracy < high
    both = select_probe(data[0], data[1], data[2], 7)
    assert both.best_C == result.best_C
    refitted = scikit_learn_refit(data, both.best_C)
    assert np.mean(both.probe.predict(data[2][0]) == refitted) > 0.98


def scikit_learn_refit(data: list[tuple[np.ndarray, np.ndarray]], C: float) -> np.ndarray:
    statistics = Standardised.of(data[0][0])
    rows = np.concatenate([data[0][0], data[1][0]])
    with threadpool_limits(1):
        model = LogisticRegression(C=C, tol=1e-6, max_iter=2000).fit(
            (rows - statistics.mean) / statistics.scale, np.concatenate([data[0][1], data[1][1]])
        )
    return model.predict((data[2][0] - statistics.mean) / statistics.scale)


@pytest.mark.parametrize(
    ("X", "y", "Cs", "message"),
    [
        (np.full((4, 2), np.nan), [0, 1, 0, 1], [1.0], "X holds 8 non-finite values .first: image 0."),
        (np.ones((4, 2, 3)), [0, 1, 0, 1], [1.0], "must be n×d features"),
        (np.eye(4), [0, 0, 0, 0], [1.0], "one class only"),
        (np.eye(4), [0, 2, 0, 2], [1.0], "class 1 has no row"),
        (np.eye(4), [0, 1, 0], [1.0], "one label per row"),
        (np.eye(4), [0.5, 1, 0, 1], [1.0], "whole numbers"),
        (np.eye(4), [0, 1, 0, -1], [1.0], "found -1 to 1"),
        (np.eye(4), [0, 1, 0, 1], [0.0], "C values are positive"),
        (np.array([["a", "b"]] * 4), [0, 1, 0, 1], [1.0], "must hold numbers"),
    ],
)
def test_bad_input_is_one_line(X, y, Cs, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fit_logistic_path(X, np.asarray(y), Cs)
    assert "\n" not in str(caught.value)


def test_a_dead_column_changes_nothing() -> None:
    """Columns that a trained norm switched off (MiniLM has one with weight 1e-33) must not blow up a probe."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    X = rng.normal(size=(120, 6)) + 2 * np.eye(6)[labels]
    dead = np.c_[X, 1e-33 * rng.normal(size=120)]
    for with_dead, without in zip(fit_logistic_path(dead, labels), fit_logistic_path(X, labels), strict=True):
        folded = with_dead.coef / with_dead.scale
        assert np.abs(folded).max() < 1e6
        assert np.abs(folded[:, 6]).max() < 1e-30
        assert np.allclose(with_dead.coef[:, :6], without.coef, atol=1e-3)
