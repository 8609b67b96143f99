"""Statistics of comparisons: known answers, symmetries, coverage."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from layerprobe.errors import UsageError
from layerprobe.metrics.outliers.comparison import cliffs_delta, group_test, hedges_g, ratio_of_ratios


def blocks(*ratios: float, n: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    return np.round(np.array(ratios) * n), np.full(len(ratios), float(n))


def test_the_ratio_pools_entries_and_its_inverse_is_the_other_way_round() -> None:
    a = (np.array([10.0, 30.0, 60.0]), np.array([1000.0, 1000.0, 2000.0]))
    b = (np.array([5.0, 5.0, 10.0]), np.array([1000.0, 1000.0, 2000.0]))
    forward, backward = ratio_of_ratios(a, b), ratio_of_ratios(b, a)
    assert forward.value == pytest.approx((100 / 4000) / (20 / 4000))
    assert forward.value * backward.value == pytest.approx(1)
    assert forward.low < forward.value < forward.high


def test_no_outliers_on_one_side_is_said_and_the_interval_stays_finite() -> None:
    found = ratio_of_ratios(blocks(0.01, 0.02, 0.02), blocks(0.0, 0.0, 0.0))
    assert found.value is None
    assert found.reason == "the second model has no such outliers"
    assert np.isfinite([found.low, found.high]).all()
    assert ratio_of_ratios(blocks(0.01, 0.02), blocks(0.02, 0.03, 0.04)).low is None
    with pytest.raises(UsageError):
        ratio_of_ratios((np.array([2.0]), np.array([1.0])), blocks(0.1))


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        a, b = (np.exp(rng.normal(-5, 0.3, 12)) for _ in range(2))
        found = ratio_of_ratios(blocks(*a), blocks(*b), n_resamples=400, seed=trial)
        hits += found.low <= 1 <= found.high
    # Percentile intervals over 12 blocks are known to be a little short of 95 %.
    assert 0.86 <= hits / 200 <= 0.99


def test_hedges_g_against_the_textbook_formula() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 6.0])
    pooled = (3 * x.var(ddof=1) + 2 * y.var(ddof=1)) / 5
    assert hedges_g(x, y) == pytest.approx((2.5 - 4) / pooled**0.5 * (1 - 3 / (4 * 7 - 9)))
    assert hedges_g(x, y) == -hedges_g(y, x)
    assert hedges_g(x, x[:1]) is None
    assert hedges_g(np.ones(3), np.ones(3)) is None


def test_cliffs_delta_is_the_balance_of_pairs() -> None:
    assert cliffs_delta(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert cliffs_delta(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert cliffs_delta(np.array([1.0, 5.0]), np.array([2.0])) == 0
    assert cliffs_delta(np.array([]), np.array([2.0])) is None


def test_the_permutation_test_equals_all_orders_written_out() -> None:
    rng = np.random.default_rng(1)
    models = [blocks(*np.exp(rng.normal(-5 + 0.4 * i, 0.2, 4))) for i in range(5)]
    found = group_test(models[:2], models[2:])
    logs = [np.log((c.sum() + 0.5) / (n.sum() + 1)) for c, n in models]
    observed = abs(np.mean(logs[:2]) - np.mean(logs[2:]))
    orders = [[logs[i] for i in order] for order in permutations(range(5))]
    share = np.mean([abs(np.mean(o[:2]) - np.mean(o[2:])) >= observed - 1e-12 for o in orders])
    assert found.pvalue == pytest.approx(share)
    assert (found.n_permutations, found.exact, found.p_smallest) == (10, True, 0.1)


def test_groups_of_equal_size_cannot_get_below_two_in_all_splits() -> None:
    low, high = ([blocks(*([r + i * 1e-4] * 3)) for i in range(3)] for r in (0.001, 0.01))
    assert group_test(low, high).pvalue == group_test(low, high).p_smallest == pytest.approx(2 / 20)
    assert group_test(low[:1], high).ratio.reason is not None
    with pytest.raises(UsageError):
        group_test([], high)
