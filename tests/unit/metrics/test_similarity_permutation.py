"""Permutation null of debiased CKA."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity import permutation
from layerprobe.metrics.similarity.all_pairs import pairwise_cka
from layerprobe.metrics.similarity.measures import debiased_linear_cka
from layerprobe.metrics.similarity.permutation import PermutationNull, permutation_null


def mixed(
    rng: np.random.Generator, n: int, share: float, d: int = 12, e: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    mixing = np.random.default_rng(5)
    common = rng.normal(size=(n, 4))
    return (
        share * common @ mixing.normal(size=(4, d)) + rng.normal(size=(n, d)),
        share * common @ mixing.normal(size=(4, e)) + rng.normal(size=(n, e)),
    )


@pytest.mark.parametrize("n", [5, 8, 31, 100])
@pytest.mark.parametrize("alone", [False, True])
def test_the_null_holds_the_cka_of_really_shifted_images(n: int, alone: bool) -> None:
    rng = np.random.default_rng(n)
    xs = [rng.normal(size=(n, d)) * 10.0**d for d in (3, 6)]
    ys = xs if alone else [xs[0] + rng.normal(size=(n, 3)), rng.normal(size=(n, 2)), xs[1] - 5]
    null = permutation_null(xs, None if alone else ys, n_permutations=1, seed=7)
    assert null.n_permutations == n - 1
    order = np.random.default_rng(7).permutation(n)
    for shift in {1, n // 2, n - 1}:
        expected = [[debiased_linear_cka(x[order], y[np.roll(order, -shift)]) for y in ys] for x in xs]
        np.testing.assert_allclose(null.samples[shift - 1], expected, atol=2e-6)


def test_bands_of_diagonals_of_any_width_give_the_same(monkeypatch) -> None:
    xs = [np.random.default_rng(i).normal(size=(90, 5)) for i in range(2)]
    whole = permutation_null(xs, n_permutations=80)
    monkeypatch.setattr(permutation, "BAND_BYTES", 8 * 2 * 90 * 7)
    np.testing.assert_allclose(permutation_null(xs, n_permutations=80).samples, whole.samples, atol=2e-6)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (200, 300), (501, 40)])
def test_permuted_values_have_mean_zero_and_the_known_standard_deviation(n: int, d: int) -> None:
    x, y = mixed(np.random.default_rng(0), n, 1.0, d, d + 3)
    samples = permutation_null([x], [y], n_permutations=4000).samples[:, 0, 0]
    expected = np.sqrt(2 / (n * (n - 3)))
    assert samples.std() == pytest.approx(expected, rel=0.08)
    assert abs(samples.mean()) < 0.1 * expected


def test_a_subset_of_many_images_is_rescaled_to_the_right_standard_deviation(monkeypatch) -> None:
    monkeypatch.setattr(permutation, "MAX_IMAGES", 300)
    x, y = mixed(np.random.default_rng(0), 900, 0.0)
    null = permutation_null([x + 7], [y], n_permutations=3000)
    assert (null.n, null.n_used) == (900, 300)
    assert null.samples.std() == pytest.approx(np.sqrt(2 / (900 * 897)), rel=0.08)


def test_pvalues_are_uniform_under_independence() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        x, y = mixed(rng, 40, 0.0)
        null = permutation_null([x], [y], n_permutations=39, seed=int(rng.integers(1 << 30)))
        found.append(null.pvalue(pairwise_cka([x], [y]).values)[0, 0])
    found = np.array(found)
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs((found <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / len(found))


def test_the_corrected_pvalue_holds_its_level_over_the_search_and_the_plain_one_does_not() -> None:
    rng = np.random.default_rng(1)
    plain, corrected = [], []
    for _ in range(200):
        xs, ys = ([rng.normal(size=(40, 6)) for _ in range(5)] for _ in range(2))
        values = pairwise_cka(xs, ys).values
        null = permutation_null(xs, ys, n_permutations=39, seed=int(rng.integers(1 << 30)))
        plain.append(null.pvalue(values).min())
        corrected.append(null.pvalue_max(values).min())
    assert (np.array(corrected) <= 0.05).mean() < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 200)
    assert (np.array(plain) <= 0.05).mean() > 0.4


@pytest.mark.parametrize("n", [4, 5, 6])
@pytest.mark.parametrize("alone", [False, True])
def test_few_images_are_shuffled_in_every_way_once(n: int, alone: bool) -> None:
    """Ties included: among four images a debiased Gram matrix has the same entry for a pair and for the other two."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 3))
    y = x if alone else x + 0.4 * rng.normal(size=(n, 3))
    null = permutation_null([x], None if alone else [y], n_permutations=1000)
    assert null.n_permutations == math.factorial(n) - 1
    observed = pairwise_cka([x], None if alone else [y]).values
    every = [debiased_linear_cka(x, y[list(order)]) for order in itertools.permutations(range(n))]
    reached = sum(value >= observed[0, 0] - 1e-6 for value in every)
    for found in (null.pvalue(observed), null.pvalue_max(observed)):
        assert found[0, 0] == pytest.approx(reached / math.factorial(n))
    np.testing.assert_allclose(np.sort(np.append(null.samples, observed)), np.sort(every), atol=2e-6)
    if n == 6:
        fewer = permutation_null([x], [y], n_permutations=700)
        assert 700 <= fewer.n_permutations < 719


def test_permutations_that_leave_images_where_they_are_count() -> None:
    """Two images of eleven stand apart in both: one permutation of 55 keeps the pair, and no shift does."""
    pair = np.repeat([1.0, 0.0], [2, 9])[:, None]
    null = permutation_null([pair], [pair + 0.0], n_permutations=2000)
    assert null.pvalue(pairwise_cka([pair], [pair + 0.0]).values)[0, 0] == pytest.approx(1 / 55, rel=0.5)


def test_pvalues_count_the_observed_permutation_and_skip_undefined_cells() -> None:
    samples = np.array([[[0.1, np.nan]], [[0.2, np.nan]], [[0.3, np.nan]]], dtype=np.float32)
    null = PermutationNull(samples, 10, 10)
    values = np.array([[0.25, np.nan]])
    np.testing.assert_array_equal(null.pvalue(values), [[0.5, np.nan]])
    np.testing.assert_array_equal(null.pvalue_max(values), [[0.5, np.nan]])


def test_related_layers_get_the_smallest_pvalue_there_is() -> None:
    x, y = mixed(np.random.default_rng(3), 300, 0.7)
    null = permutation_null([x], [y], n_permutations=500)
    assert null.n_permutations >= 500
    assert null.pvalue(pairwise_cka([x], [y]).values)[0, 0] == pytest.approx(1 / (1 + null.n_permutations))


def test_constant_layers_are_undefined_in_the_null_too() -> None:
    x, y = mixed(np.random.default_rng(3), 60, 0.7)
    null = permutation_null([x, np.ones((60, 2))], [y], n_permutations=10)
    assert np.isfinite(null.samples[:, 0]).all() and np.isnan(null.samples[:, 1]).all()
    with pytest.raises(UsageError, match="at least 1"):
        permutation_null([x], [y], n_permutations=0)
