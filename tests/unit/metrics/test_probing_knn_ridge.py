"""Ridge and nearest neighbours against independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from layerprobe.errors import UsageError
from layerprobe.metrics.probing.knn_ridge import knn_predict, ridge_sweep, select_knn, select_ridge


def clusters(n: int, d: int, k: int, *, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(k, d))
    y = np.r_[np.arange(k), rng.integers(0, k, n - k)]
    return centres[y] + spread * rng.normal(size=(n, d)), y


@pytest.mark.parametrize(("n", "d"), [(60, 8), (25, 40)])
def test_ridge_leave_one_out_equals_leaving_one_out(n: int, d: int) -> None:
    X, y = clusters(n, d, 4)
    alphas = [1e-3, 0.1, 3.0]
    sweep = ridge_sweep(X, y, 4, alphas)
    Z, Y = (X - X.mean(0)) / X.std(0), np.eye(4)[y]
    for i, alpha in enumerate(alphas):
        left_out = np.empty_like(Y)
        for row in range(n):
            kept = np.arange(n) != row
            centre, share = Z[kept].mean(0), Y[kept].mean(0)
            A = Z[kept] - centre
            W = np.linalg.solve(A.T @ A + n * alpha * np.eye(d), A.T @ (Y[kept] - share))
            left_out[row] = (Z[row] - centre) @ W + share
        assert sweep.loo_error[i] == pytest.approx(((left_out - Y) ** 2).mean(), rel=1e-4)
        assert sweep.loo_accuracy[i] == pytest.approx((left_out.argmax(1) == y).mean(), abs=1e-9)
        centred = Z - Z.mean(0)
        direct = np.linalg.solve(centred.T @ centred + n * alpha * np.eye(d), centred.T @ (Y - Y.mean(0)))
        assert np.allclose(sweep.coef[i], direct.T, atol=1e-8)
        assert np.array_equal(sweep.predict(X, i), (centred @ direct + Y.mean(0)).argmax(1))


def test_ridge_selection_judges_test_once() -> None:
    train, test = clusters(200, 10, 5), clusters(300, 10, 5, seed=1)
    result = select_ridge(train, test, 5)
    assert 0.5 < result.test_accuracy <= 1
    assert result.interval.low < result.test_accuracy < result.interval.high
    assert result.loo_accuracy == pytest.approx(result.test_accuracy, abs=0.15)


def test_neighbours_agree_with_scikit_learn() -> None:
    (X, y), (queries, _) = clusters(150, 6, 3, spread=2), clusters(80, 6, 3, spread=2, seed=1)
    unit = [(part - X.mean(0)) / X.std(0) for part in (X, queries)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in unit]
    for k, found in zip((1, 3, 9), knn_predict((X, y), queries, 3, (1, 3, 9)), strict=True):
        model = KNeighborsClassifier(k).fit(unit[0], y)
        votes = model.predict_proba(unit[1])
        decided = (votes == votes.max(1, keepdims=True)).sum(1) == 1
        assert decided.mean() > 0.7
        assert np.array_equal(found[decided], votes.argmax(1)[decided])


def test_neighbours_are_chosen_on_validation() -> None:
    train, validation, test = (clusters(120, 6, 3, seed=seed) for seed in range(3))
    result = select_knn(train, validation, test, 3, ks=(1, 7, 500))
    assert len(result.val_accuracy) == 2
    assert result.k == (1, 7)[1 - int(result.val_accuracy[::-1].argmax())]
    predicted = knn_predict(train, test[0], 3, [result.k])[0]
    assert result.test_accuracy == pytest.approx((predicted == test[1]).mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ridge_sweep(np.eye(4), [0, 1, 0, 1], 2, [0.0]), "ridge strengths are positive"),
        (lambda: ridge_sweep(np.eye(4), [0, 1, 0, 2], 2), "found 0 to 2"),
        (lambda: knn_predict((np.eye(4), np.array([0, 1, 0, 1])), np.eye(4), 2, [5]), "between 1 and 4"),
    ],
)
def test_bad_input_is_one_line(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
