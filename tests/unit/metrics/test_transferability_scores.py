"""Readable transfer scores against slow float64 transcriptions of the published formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf

from layerprobe.errors import UsageError
from layerprobe.metrics.transferability import class_spectrum, gcv_penalty
from layerprobe.metrics.transferability.scores import (
    HIGHER_IS_BETTER,
    gbc,
    h_score,
    half_sample,
    half_sample_errors,
    logme,
    loo_knn,
    loo_ridge,
    neural_collapse,
    readable_scores,
    transrate,
)

SPECTRAL = {
    "logme": logme,
    "h_score": h_score,
    "transrate": transrate,
    "gbc": gbc,
    "neural_collapse": neural_collapse,
    "loo_ridge": loo_ridge,
}


def clusters(n=120, d=10, k=4, spread=0.8, seed=0):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), np.arange(k), rng.integers(0, k, n - 2 * k)])
    X = spread * rng.normal(size=(k, d))[y] + rng.normal(size=(n, d)) @ np.diag(np.linspace(0.3, 2.0, d))
    return X + 2.0, y


def deficient(n=90, d=12, rank=5, k=3, seed=1):
    X, y = clusters(n, rank, k, seed=seed)
    return X @ np.random.default_rng(seed).normal(size=(rank, d)), y


CASES = {
    "n > d": clusters(),
    "n < d": clusters(n=30, d=50, k=3),
    "rank-deficient": deficient(),
    "rank-deficient, n < d": deficient(n=24, d=40, rank=6),
    "missing classes": (clusters()[0], clusters()[1] * 3 + 1),
    "offset columns": (clusters()[0] + 300.0 * (np.arange(10) == 2), clusters()[1]),
    "n = d": clusters(n=20, d=20, k=2),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    return CASES[request.param]


# --- slow transcriptions -------------------------------------------------------------------------------


def evidence_as_published(X, y, alpha, beta):
    """You et al. 2021 (arXiv 2102.11005), equation 2, written out with a dense d×d matrix A."""
    n, d = X.shape
    A = alpha * np.eye(d) + beta * X.T @ X
    m = beta * np.linalg.solve(A, X.T @ y)
    return (
        n / 2 * np.log(beta)
        + d / 2 * np.log(alpha)
        - n / 2 * np.log(2 * np.pi)
        - beta / 2 * np.sum((X @ m - y) ** 2)
        - alpha / 2 * m @ m
        - 0.5 * np.linalg.slogdet(A)[1]
    )


def logme_as_published(X, labels):
    """The maximum of equation 2 over α and β, from many starts, averaged over the classes that occur."""
    n = len(X)
    scale = np.log(np.linalg.norm(X) ** 2)
    totals = []
    for label in np.unique(labels):
        y = (labels == label).astype(float)
        starts = [(scale + ratio + noise, noise) for ratio in np.linspace(-16, 4, 11) for noise in (1.0, 4.0)]
        values = [(evidence_as_published(X, y, *np.exp(start)), start) for start in starts]
        best = max(values, key=lambda pair: pair[0])[1]
        found = minimize(
            lambda t, y=y: -evidence_as_published(X, y, *np.exp(t)),
            best,
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000},
        )
        totals.append(-found.fun / n)
    return np.mean(totals)


def h_score_as_published(X, labels):
    """Ibrahim et al. 2021 (arXiv 2110.06893): tr(Σ_α⁻¹ (1 − α) Σ_z), Σ_α by Ledoit and Wolf."""
    shrunk, alpha = ledoit_wolf(X)
    g = np.stack([X[labels == label].mean(axis=0) for label in labels])
    return np.trace(np.linalg.solve(shrunk, (1 - alpha) * np.cov(g.T, bias=True)))


def transrate_as_published(X, labels, epsilon=1e-4):
    """Huang et al. 2022 (arXiv 2106.09362), equation 5, on features of mean variance 1."""
    Z = X - X.mean(axis=0)
    Z = Z / np.sqrt(Z.var(axis=0).mean())

    def rate(rows):
        n, d = rows.shape
        return 0.5 * np.linalg.slogdet(np.eye(d) + rows.T @ rows / (n * epsilon))[1]

    return rate(Z) - sum(np.mean(labels == c) * rate(Z[labels == c]) for c in np.unique(labels))


def gbc_as_published(X, labels, n_components=64):
    """Pándy et al. 2022 (arXiv 2111.12780), equations 3 to 5, spherical, with the determinants written out."""
    Z = X - X.mean(axis=0)
    _, singular, axes = np.linalg.svd(Z, full_matrices=False)
    kept = min(n_components, int((singular > 1e-10 * singular[0]).sum()))
    P = Z @ axes[:kept].T
    total = 0.0
    for a in np.unique(labels):
        for b in np.unique(labels):
            if a == b:
                continue
            A, B = P[labels == a], P[labels == b]
            cov_a, cov_b = (np.mean(M.var(axis=0)) * np.eye(kept) for M in (A, B))
            cov = (cov_a + cov_b) / 2
            gap = A.mean(axis=0) - B.mean(axis=0)
            distance = gap @ np.linalg.solve(cov, gap) / 8 + 0.5 * (
                np.linalg.slogdet(cov)[1] - 0.5 * (np.linalg.slogdet(cov_a)[1] + np.linalg.slogdet(cov_b)[1])
            )
            total -= np.exp(-distance)
    return total


def neural_collapse_as_published(X, labels):
    """Papyan et al. 2020 (arXiv 2008.08186), NC1: tr(Σ_W Σ_B†)/k, classes weighted by their share."""
    classes = np.unique(labels)
    mean = X.mean(axis=0)
    within = between = 0.0
    for c in classes:
        rows = X[labels == c]
        within = within + (rows - rows.mean(axis=0)).T @ (rows - rows.mean(axis=0)) / len(X)
        between = between + len(rows) / len(X) * np.outer(rows.mean(axis=0) - mean, rows.mean(axis=0) - mean)
    return np.trace(within @ np.linalg.pinv(between, rcond=1e-11)) / len(classes)


def penalty_by_gcv(X, labels):
    """The penalty of least GCV error from the dense hat matrix, over the same 49 multiples of λ_max."""
    n = len(X)
    Y = (labels[:, None] == np.unique(labels)).astype(float)
    Z = X - X.mean(axis=0)
    top = np.linalg.eigvalsh(Z.T @ Z)[-1]
    errors = []
    for penalty in top * np.logspace(-10, 2, 49):
        hat = 1 / n + Z @ np.linalg.solve(Z.T @ Z + penalty * np.eye(Z.shape[1]), Z.T)
        errors.append((((Y - hat @ Y) ** 2).sum() / (n - np.trace(hat)) ** 2, penalty))
    return min(errors)[1]


def loo_ridge_by_refitting(X, labels, penalty):
    classes = np.unique(labels)
    Y = (labels[:, None] == classes).astype(float)
    hits = 0
    for i in range(len(X)):
        kept = np.arange(len(X)) != i
        mean, offset = X[kept].mean(axis=0), Y[kept].mean(axis=0)
        Z = X[kept] - mean
        weights = np.linalg.solve(Z.T @ Z + penalty * np.eye(X.shape[1]), Z.T @ (Y[kept] - offset))
        hits += classes[np.argmax((X[i] - mean) @ weights + offset)] == labels[i]
    return hits / len(X)


def knn_by_sorting(X, labels, k=5):
    hits = 0
    for i, x in enumerate(X):
        distance = np.linalg.norm(X - x, axis=1)
        distance[i] = np.inf
        nearest = labels[np.argsort(distance)[:k]]
        votes = {c: int((nearest == c).sum()) for c in nearest}
        winner = next(c for c in nearest if votes[c] == max(votes.values()))
        hits += winner == labels[i]
    return hits / len(X)


# --- equal to the formula ------------------------------------------------------------------------------


def test_logme_is_the_published_maximum(case):
    assert logme(*case) == pytest.approx(logme_as_published(*case), abs=2e-8)


def test_h_score_is_the_published_formula(case):
    assert h_score(*case) == pytest.approx(h_score_as_published(*case), rel=1e-9)


def test_transrate_is_the_published_formula(case):
    assert transrate(*case) == pytest.approx(transrate_as_published(*case), rel=1e-8)


def test_gbc_is_the_published_formula(case):
    assert gbc(*case) == pytest.approx(gbc_as_published(*case), rel=1e-9)
    assert gbc(*case, n_components=2) == pytest.approx(gbc_as_published(*case, n_components=2), rel=1e-9)


def test_neural_collapse_is_the_published_formula(case):
    assert neural_collapse(*case) == pytest.approx(neural_collapse_as_published(*case), rel=1e-7)


def test_loo_ridge_is_what_refitting_without_each_image_gives(case):
    X, y = case
    if len(X) <= X.shape[1]:
        pytest.skip("the dense reference needs more images than dimensions for its penalty")
    assert loo_ridge(X, y) == loo_ridge_by_refitting(X, y, penalty_by_gcv(X, y))


def test_loo_ridge_with_fewer_images_than_dimensions():
    X, y = CASES["n < d"]
    # The spectrum says which penalty was taken; the refits are independent of it.
    spectrum = class_spectrum(X, y)
    assert loo_ridge(X, y) == loo_ridge_by_refitting(X, y, gcv_penalty(spectrum))


def test_knn_is_what_sorting_all_distances_gives(case):
    for k in (1, 2, 5):
        assert loo_knn(*case, n_neighbours=k) == knn_by_sorting(*case, k)


# --- invariances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1e2, 1e4])
def test_scaling_the_features_changes_no_score(case, scale):
    X, y = case
    before, after = readable_scores(X, y), readable_scores(scale * X, y)
    for name in HIGHER_IS_BETTER:
        assert after[name].value == pytest.approx(before[name].value, rel=1e-6, abs=1e-9), name


def test_rotation_order_of_images_and_names_of_classes_change_no_score(case):
    X, y = case
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.normal(size=(X.shape[1], X.shape[1])))[0]
    rows = rng.permutation(len(X))
    names = rng.permutation(20)
    before, after = readable_scores(X, y), readable_scores((X @ rotation)[rows], names[y[rows]])
    for name in HIGHER_IS_BETTER:
        assert after[name].value == pytest.approx(before[name].value, rel=1e-7, abs=1e-9), name


def test_the_battery_equals_the_single_functions(case):
    X, y = case
    battery = readable_scores(X, y)
    assert set(battery) == set(HIGHER_IS_BETTER)
    for name, function in {**SPECTRAL, "knn": loo_knn}.items():
        assert battery[name].value == function(X, y), name


def test_appended_zero_columns_leave_what_is_not_counted_per_feature():
    X, y = CASES["n > d"]
    wider = np.hstack([X, np.zeros((len(X), 7))])
    for function in (logme, gbc, neural_collapse, loo_ridge, loo_knn):
        assert function(wider, y) == pytest.approx(function(X, y), rel=1e-9)


def test_float32_features_with_offsets_keep_six_digits():
    X, y = clusters(n=400, d=20, k=5)
    shifted = (X + 300.0 * (np.arange(20) < 3)).astype(np.float32)
    exact, got = readable_scores(shifted.astype(np.float64), y), readable_scores(shifted, y)
    assert exact == got


@pytest.mark.parametrize("name", list(HIGHER_IS_BETTER))
def test_each_score_tells_separated_classes_from_mixed_ones(name):
    X, y = clusters(n=300, d=10, k=4, spread=4.0)
    shuffled = np.random.default_rng(0).permutation(y)
    apart, mixed = (readable_scores(X, labels)[name].value for labels in (y, shuffled))
    assert (apart > mixed) == HIGHER_IS_BETTER[name]
    assert apart != mixed


def test_logme_never_falls_below_what_no_features_give():
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(60, 5)), rng.integers(0, 2, 60)
    # α → ∞ switches the features off: y ~ N(0, β⁻¹), maximal at β = n/Σy².
    shares = np.array([np.mean(y == c) for c in (0, 1)])
    floor = np.mean(-0.5 * np.log(2 * np.pi * shares) - 0.5)
    assert logme(X - X.mean(axis=0), y) >= floor - 1e-12


# --- undefined -----------------------------------------------------------------------------------------


def test_one_class_and_constant_features_say_so():
    X, y = CASES["n > d"]
    with pytest.raises(UsageError, match="all 120 images have label 7"):
        logme(X, np.full(120, 7))
    with pytest.raises(UsageError, match="all 120 rows of 120×10 are equal"):
        h_score(np.full_like(X, 1e6 / 3), y)
    for score in readable_scores(np.ones_like(X), y).values():
        assert score.value is None and "equal" in score.reason


def test_labels_that_are_linear_in_few_features_have_no_evidence():
    y = np.array([0, 1] * 10)
    X = np.stack([y, 1 - y], axis=1).astype(float)
    with pytest.raises(UsageError, match="exact linear function of features of rank 2 on 20 images"):
        logme(X, y)


def test_a_class_of_one_image_has_no_gaussian():
    X, y = CASES["n > d"]
    y = y.copy()
    y[y == 3] = 2
    y[0] = 3
    found = readable_scores(X, y)
    assert found["gbc"].value is None
    assert "class 3 has none (1 images)" in found["gbc"].reason
    assert all(found[name].value is not None for name in HIGHER_IS_BETTER if name != "gbc")


def test_equal_class_means_have_no_collapse():
    X = np.array([[1.0], [-1.0], [2.0], [-2.0]])
    with pytest.raises(UsageError, match="class means: they are all equal"):
        neural_collapse(X, np.array([0, 0, 1, 1]))


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.ones(3), np.zeros(3, int), "n×d"),
        (np.ones((3, 0)), np.zeros(3, int), "n×d"),
        (np.ones((3, 2)), np.zeros(2, int), "one label per row"),
        (np.ones((3, 2)), np.full(3, 0.5), "whole numbers"),
        (np.ones((3, 2)), np.array([0, -1, 1]), "found -1 to 1"),
        (
            np.array([[1.0], [np.nan], [np.inf]]),
            np.array([0, 1, 1]),
            r"2 non-finite values \(first: image 1\)",
        ),
    ],
)
def test_unusable_arrays_are_refused(X, y, message):
    with pytest.raises(UsageError, match=message):
        readable_scores(X, y)


def test_odd_requests_are_refused():
    X, y = CASES["n > d"]
    with pytest.raises(UsageError, match="unknown transfer scores"):
        readable_scores(X, y, scores=("logme", "leep"))
    with pytest.raises(UsageError, match="epsilon > 0"):
        transrate(X, y, epsilon=0.0)
    with pytest.raises(UsageError, match="principal axis"):
        gbc(X, y, n_components=0)
    with pytest.raises(UsageError, match="neighbour"):
        loo_knn(X, y, n_neighbours=0)
    with pytest.raises(UsageError, match="two replicates"):
        half_sample_errors(X, y, n_replicates=1)
    with pytest.raises(UsageError, match="labels are missing"):
        logme(X)


# --- spread --------------------------------------------------------------------------------------------


def test_half_samples_keep_half_of_each_class_once():
    y = np.array([0] * 10 + [1] * 7 + [2])
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(30):
        rows = half_sample(y, rng)
        assert len(np.unique(rows)) == len(rows)
        counts = np.bincount(y[rows], minlength=3)
        assert counts[0] == 5 and counts[1] in (3, 4) and counts[2] in (0, 1)
        sizes.add((counts[1], counts[2]))
    assert len(sizes) == 4


def test_half_sample_errors_match_the_spread_over_fresh_draws():
    """The promise of a standard error: fresh samples of the same task spread about that much."""
    draws = 150
    names = ("logme", "h_score", "transrate", "gbc", "neural_collapse", "loo_ridge")
    y = np.repeat(np.arange(4), 60)
    centres = np.random.default_rng(9).normal(size=(4, 6))
    samples = [centres[y] + np.random.default_rng(100 + i).normal(size=(len(y), 6)) for i in range(draws)]
    values = [readable_scores(X, y, scores=names) for X in samples]
    errors = [
        half_sample_errors(X, y, n_replicates=20, seed=i, scores=names) for i, X in enumerate(samples[:25])
    ]
    for name in names:
        truth = np.std([v[name].value for v in values], ddof=1)
        claimed = np.mean([e[name].value for e in errors])
        assert 0.75 < claimed / truth < 1.4, (name, claimed, truth)


def test_an_error_that_half_samples_cannot_give_has_a_reason():
    X, y = clusters(n=8, d=3, k=4)
    errors = half_sample_errors(X, y, n_replicates=3)
    assert errors["gbc"].value is None and errors["gbc"].reason.startswith("half samples need 10 images")
