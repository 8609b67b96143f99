"""RBF CKA, Procrustes, SVCCA, PWCCA, mutual neighbours and RSA: theorems and independent formulas."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from sklearn.cross_decomposition import CCA
from sklearn.neighbors import NearestNeighbors

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity.measures import (
    BiasedEstimateWarning,
    debiased_hsic,
    debiased_linear_cka,
    debiased_rbf_cka,
    linear_cka,
    mutual_knn,
    procrustes_distance,
    pwcca,
    rsa,
    svcca,
)

SEEDS = st.integers(0, 9999)
ALL = [debiased_rbf_cka, procrustes_distance, svcca, pwcca, mutual_knn, rsa]


def pair(n: int, d: int, e: int, seed: int, share: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 3))
    return (
        share * common @ rng.normal(size=(3, d)) + rng.normal(size=(n, d)),
        share * common @ rng.normal(size=(3, e)) + rng.normal(size=(n, e)),
    )


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


@given(SEEDS)
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("measure", [debiased_rbf_cka, procrustes_distance, svcca])
def test_rotation_scale_and_shift_change_nothing(measure, seed: int) -> None:
    x, y = pair(60, 5, 4, seed)
    moved = 1e3 * x @ rotation(5, seed) - 7
    assert measure(moved, y) == pytest.approx(measure(x, y), abs=1e-8)
    assert measure(y, moved) == pytest.approx(measure(y, x), abs=1e-8)


@pytest.mark.parametrize("measure", [debiased_rbf_cka, svcca, pwcca, mutual_knn, rsa])
def test_a_copy_scores_one(measure) -> None:
    x, _ = pair(60, 5, 4, 0)
    assert measure(x, 3 * x) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("measure", [debiased_rbf_cka, procrustes_distance, svcca, mutual_knn, rsa])
def test_it_is_symmetric(measure) -> None:
    x, y = pair(60, 5, 4, 1)
    assert measure(x, y) == pytest.approx(measure(y, x), abs=1e-10)


@pytest.mark.parametrize("measure", [debiased_rbf_cka, rsa])
def test_independent_features_score_zero_on_average(measure) -> None:
    values = np.array([measure(*pair(40, 5, 6, seed, share=0.0)) for seed in range(300)])
    assert abs(values.mean()) <= 3 * values.std(ddof=1) / np.sqrt(len(values))


def test_rbf_cka_equals_its_definition_and_nears_linear_cka_for_wide_kernels() -> None:
    x, y = pair(50, 5, 6, 2)

    def kernel(z: np.ndarray, bandwidth: float) -> np.ndarray:
        distance = pdist(z)
        return np.exp(-(squareform(distance) ** 2) / (2 * (bandwidth * np.median(distance)) ** 2))

    k, m = kernel(x, 0.8), kernel(y, 0.8)
    expected = debiased_hsic(k, m) / np.sqrt(debiased_hsic(k, k) * debiased_hsic(m, m))
    assert debiased_rbf_cka(x, y, bandwidth=0.8) == pytest.approx(expected, rel=1e-9)
    assert debiased_rbf_cka(x, y, bandwidth=300.0) == pytest.approx(debiased_linear_cka(x, y), abs=1e-3)
    assert debiased_rbf_cka(x, y, bandwidth=0.2) != pytest.approx(debiased_linear_cka(x, y), abs=1e-2)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_procrustes_obeys_the_triangle_inequality_and_is_beaten_by_no_rotation(seed: int) -> None:
    x, y = pair(30, 4, 4, seed)
    z, _ = pair(30, 6, 4, seed + 1)
    assert procrustes_distance(x, z) <= procrustes_distance(x, y) + procrustes_distance(y, z) + 1e-9
    assert procrustes_distance(x, 2 * x @ rotation(4, seed)) == pytest.approx(0.0, abs=1e-7)
    unit_x, unit_y = ((part - part.mean(0)) / np.linalg.norm(part - part.mean(0)) for part in (x, y))
    for turn in range(5):
        assert procrustes_distance(x, y) <= np.linalg.norm(unit_x - unit_y @ rotation(4, seed + turn)) + 1e-9


def test_svcca_is_the_mean_canonical_correlation_that_scikit_learn_finds() -> None:
    x, y = pair(400, 4, 3, 3)
    u, v = CCA(n_components=3, max_iter=5000, tol=1e-12).fit_transform(x, y)
    expected = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(3)]
    assert svcca(x, y, variance=1.0) == pytest.approx(np.mean(expected), abs=1e-4)


def test_svcca_forgets_directions_of_little_variance_and_pwcca_weighs_them_down() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3)) * [10, 10, 1e-2]
    y = x + rng.normal(size=(500, 3)) * [1e-3, 1e-3, 1]
    assert svcca(x, y, variance=0.99) > 0.999 > 0.8 > svcca(x, y, variance=1.0)
    assert pwcca(x, y) > 0.99


def test_pwcca_is_blind_to_any_linear_map_of_the_second_side() -> None:
    x, y = pair(200, 5, 4, 4)
    mixing = np.random.default_rng(0).normal(size=(4, 4))
    assert pwcca(x, y @ mixing) == pytest.approx(pwcca(x, y), abs=1e-9)
    assert pwcca(3 * x + 1, y) == pytest.approx(pwcca(x, y), abs=1e-9)
    assert abs(pwcca(x @ rotation(5, 0), y) - pwcca(x, y)) > 1e-4


def test_mutual_knn_counts_what_scikit_learn_finds() -> None:
    x, y = pair(1100, 5, 6, 5)
    sets = [
        NearestNeighbors(n_neighbors=7, metric="cosine").fit(part).kneighbors(return_distance=False)
        for part in (x, y)
    ]
    expected = np.mean([len(set(a) & set(b)) / 7 for a, b in zip(*sets, strict=True)])
    assert mutual_knn(x, y, k=7) == pytest.approx(expected, abs=1e-12)


def test_independent_sides_share_the_neighbours_that_chance_gives_them() -> None:
    x, y = pair(600, 8, 8, 6, share=0.0)
    assert mutual_knn(x, y, k=30) == pytest.approx(30 / 599, abs=0.01)


def test_rsa_is_the_spearman_correlation_of_correlation_distances() -> None:
    x, y = pair(40, 6, 9, 7)
    expected = spearmanr(pdist(x, "correlation"), pdist(y, "correlation")).statistic
    assert rsa(x, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("measure", ALL)
def test_bad_input_is_refused_in_one_line(measure) -> None:
    x, y = pair(30, 3, 3, 8)
    with pytest.raises(UsageError, match=r"X is 30×3, Y is 29×3"):
        measure(x, y[1:])
    with pytest.raises(UsageError, match="non-finite"):
        measure(x, np.where(np.arange(3) == 1, np.nan, y))
    with pytest.raises(UsageError, match=r"undefined"):
        measure(x, np.zeros_like(y))


def test_options_out_of_range_are_refused() -> None:
    x, y = pair(30, 3, 3, 9)
    with pytest.raises(UsageError, match="bandwidth"):
        debiased_rbf_cka(x, y, bandwidth=0.0)
    with pytest.raises(UsageError, match="variance"):
        svcca(x, y, variance=1.5)
    with pytest.raises(UsageError, match="between 1 and 29"):
        mutual_knn(x, y, k=30)
    with pytest.raises(UsageError, match="1 by construction: 20 and 10 components of 30 images"):
        pwcca(*pair(30, 20, 10, 0))


# -- linear CKA ------------------------------------------------------------------------------------------


def related(n: int, d: int, e: int, *, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two feature sets that have `share` of their spread from eight common directions."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 8))
    x = share * common @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))
    y = share * common @ rng.normal(size=(8, e)) + rng.normal(size=(n, e))
    return x, y


def hsic_by_enumeration(K: np.ndarray, L: np.ndarray) -> float:
    """HSIC's unbiased estimate straight from its definition: a mean over all ordered quadruples."""
    quadruples = list(itertools.permutations(range(len(K)), 4))
    total = 0.0
    for i, j, q, r in quadruples:
        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
    return total / len(quadruples)


SETS = st.tuples(
    st.integers(5, 60), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 1.0), st.integers(0, 999)
)


def test_hsic_equals_its_definition_over_quadruples() -> None:
    x, y = related(7, 3, 4, share=0.5)
    assert debiased_hsic(x @ x.T, y @ y.T) == pytest.approx(hsic_by_enumeration(x @ x.T, y @ y.T), rel=1e-12)


@given(SETS)
@settings(max_examples=40, deadline=None)
def test_debiased_cka_is_the_ratio_of_hsics(case) -> None:
    n, d, e, share, seed = case
    x, y = related(n, d, e, share=share, seed=seed)
    k, m = x @ x.T, y @ y.T
    expected = debiased_hsic(k, m) / np.sqrt(debiased_hsic(k, k) * debiased_hsic(m, m))
    assert debiased_linear_cka(x, y) == pytest.approx(expected, abs=1e-9)
    assert debiased_linear_cka(y, x) == pytest.approx(expected, abs=1e-9)
    assert abs(expected) <= 1 + 1e-9


@given(SETS)
@settings(max_examples=40, deadline=None)
def test_rotation_scale_and_shift_change_nothing_and_a_copy_scores_one(case) -> None:
    n, d, e, share, seed = case
    x, y = related(n, d, e, share=share, seed=seed)
    moved = 1e-4 * x @ rotation(d, seed) + np.linspace(-50, 50, d)
    assert debiased_linear_cka(moved, y) == pytest.approx(debiased_linear_cka(x, y), abs=1e-7)
    assert debiased_linear_cka(moved, x) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("transform", [lambda x: x * np.linspace(0.2, 5, x.shape[1]), np.tanh])
def test_other_transforms_do_change_it(transform) -> None:
    x, _ = related(200, 6, 6, share=1.0)
    assert debiased_linear_cka(x, transform(3 * x)) < 0.99


def test_independent_features_score_zero_on_average_where_the_biased_form_scores_three_quarters() -> None:
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=(256, 768)), rng.normal(size=(256, 768))) for _ in range(12)]
    values = np.array([debiased_linear_cka(x, y) for x, y in draws])
    assert abs(values.mean()) <= 3 * values.std(ddof=1) / np.sqrt(len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedEstimateWarning)
        assert linear_cka(*draws[0]) == pytest.approx(0.75, abs=0.01)


def test_the_debiased_mean_over_many_small_draws_is_within_three_standard_errors_of_zero() -> None:
    rng = np.random.default_rng(1)
    values = np.array(
        [debiased_linear_cka(rng.normal(size=(20, 5)), rng.normal(size=(20, 30))) for _ in range(2000)]
    )
    assert abs(values.mean()) <= 3 * values.std(ddof=1) / np.sqrt(len(values))
    assert values.min() < 0


def test_the_biased_form_warns_exactly_where_images_are_few() -> None:
    x, y = related(300, 5, 29, share=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_cka(x, y)
        with pytest.raises(BiasedEstimateWarning, match=r"299 images and 30 features"):
            linear_cka(x[:299], np.c_[y, y[:, :1]][:299])


def test_biased_cka_is_the_normalised_inner_product_of_centred_grams() -> None:
    x, y = related(50, 4, 5, share=1.0)
    centre = np.eye(50) - 1 / 50
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx(np.sum(k * m) / np.linalg.norm(k) / np.linalg.norm(m), rel=1e-12)
