"""Permutation null, standard errors and the minibatch form of debiased CKA."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity import permutation
from layerprobe.metrics.similarity.all_pairs import MinibatchCKA, pairwise_cka
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


# -- standard errors --------------------------------------------------------------------------------------


@functools.cache
def truth_of(share: float) -> float:
    """Debiased CKA of 40,000 images: ten times surer than any sample below."""
    x, y = mixed(np.random.default_rng(12345), 40_000, share)
    return float(pairwise_cka([x], [y], method="features").values[0, 0])


def coverage(share: float, n: int, method: str, repeats: int) -> tuple[float, float]:
    """Share of 95 % intervals that hold the truth, and mean standard error over the true deviation."""
    rng = np.random.default_rng(2)
    values, errors, held = [], [], 0
    for _ in range(repeats):
        x, y = mixed(rng, n, share)
        found = pairwise_cka([x], [y], method=method, seed=int(rng.integers(1 << 30)))
        half = found.quantile(0.95) * found.stderr[0, 0]
        held += abs(found.values[0, 0] - truth_of(share)) <= half
        values.append(found.values[0, 0])
        errors.append(found.stderr[0, 0])
    return held / repeats, float(np.mean(errors) / np.std(values))


@pytest.mark.parametrize("method", ["gram", "features"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_intervals_cover_the_truth_about_as_often_as_they_say(share: float, method: str) -> None:
    held, ratio = coverage(share, 300, method, repeats=200)
    assert 0.90 <= held <= 0.98
    assert 0.85 <= ratio <= 1.2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gram", "features"])
@pytest.mark.parametrize("n", [100, 300, 1000, 3000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_intervals_cover_the_truth_in_a_long_simulation(share: float, n: int, method: str) -> None:
    held, _ = coverage(share, n, method, repeats=600)
    assert 0.90 <= held <= 0.98


def test_the_error_of_a_difference_is_smaller_for_layers_that_move_together() -> None:
    rng = np.random.default_rng(0)
    x, y = mixed(rng, 800, 0.8)
    near = y + 0.05 * rng.normal(size=y.shape)
    found = pairwise_cka([x], [y, near])
    together = found.difference_stderr((0, 0), (0, 1))
    assert together < 0.3 * found.stderr.min()
    assert found.difference_stderr((0, 0), (0, 0)) == 0.0


def test_the_seed_deals_groups_and_leaves_values_alone() -> None:
    x, y = mixed(np.random.default_rng(0), 700, 0.5)
    one, other, again = (pairwise_cka([x], [y], seed=seed) for seed in (0, 1, 0))
    assert one.values[0, 0] == pytest.approx(other.values[0, 0], abs=1e-7)
    assert one.stderr[0, 0] != other.stderr[0, 0]
    assert one.stderr[0, 0] == again.stderr[0, 0]


def test_a_sorted_split_does_not_mislead_the_standard_error() -> None:
    """Groups are dealt at random, so the order in which the images are stored does not matter."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 80)
    centres = rng.normal(size=(10, 12))
    x, y = centres[labels] + rng.normal(size=(800, 12)), centres[labels] + rng.normal(size=(800, 12))
    shuffle = rng.permutation(800)
    by_class, mixed_up = pairwise_cka([x], [y]), pairwise_cka([x[shuffle]], [y[shuffle]])
    assert by_class.stderr[0, 0] == pytest.approx(mixed_up.stderr[0, 0], rel=0.35)


def test_quantiles_are_those_of_student() -> None:
    x, y = mixed(np.random.default_rng(0), 100, 0.5)
    found = pairwise_cka([x], [y])
    assert 1.96 < found.quantile(0.95) < 2.1
    with pytest.raises(UsageError, match="between 0 and 1"):
        found.quantile(95)


# -- minibatches ------------------------------------------------------------------------------------------


def test_one_batch_is_the_whole() -> None:
    x, y = mixed(np.random.default_rng(0), 700, 0.5)
    running = MinibatchCKA()
    running.update([x, 1e-3 * y], [y])
    found = running.result()
    np.testing.assert_allclose(found.values, pairwise_cka([x, y], [y]).values, atol=1e-6)
    assert np.isnan(found.stderr).all()


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_minibatches_agree_with_the_whole_within_their_standard_error(share: float) -> None:
    x, y = mixed(np.random.default_rng(1), 4000, share)
    running = MinibatchCKA()
    for start, stop in zip(
        [0, 40, 200, *range(400, 4000, 100)], [40, 200, *range(400, 4001, 100)], strict=True
    ):
        running.update([x[start:stop]], [y[start:stop] * 1e-3])
    found = running.result()
    assert found.n == 4000
    whole = pairwise_cka([x], [y])
    assert abs(found.values - whole.values)[0, 0] < 3 * found.stderr[0, 0]
    assert found.stderr[0, 0] >= 0.8 * whole.stderr[0, 0]


def test_minibatch_intervals_cover_the_truth() -> None:
    rng, held = np.random.default_rng(3), 0
    for _ in range(150):
        running = MinibatchCKA()
        for _ in range(20):
            x, y = mixed(rng, 32, 0.5)
            running.update([x], [y])
        found = running.result()
        held += abs(found.values[0, 0] - truth_of(0.5)) <= found.quantile() * found.stderr[0, 0]
    assert 0.88 <= held / 150 <= 1.0


def test_batches_that_do_not_fit_are_refused() -> None:
    x, y = mixed(np.random.default_rng(0), 20, 0.5)
    running = MinibatchCKA()
    with pytest.raises(UsageError, match="no batch was added"):
        running.result()
    running.update([x, np.ones((20, 2))], [y])
    with pytest.raises(UsageError, match="2 and 1 before, 1 and 1 now"):
        running.update([x], [y])
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        running.update([x[:3], x[:3]], [y[:3]])
    found = running.result()
    assert found.reasons == [[None], ["layer 1 of A is constant over the images of every batch"]]
    assert np.isnan(found.values[1, 0])
