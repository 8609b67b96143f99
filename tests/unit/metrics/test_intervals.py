"""Intervals: independent formulas, coverage in simulation, and one-line errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import (
    bootstrap_interval,
    mean_interval,
    paired_bootstrap,
    paired_seed_interval,
    wilson_interval,
)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy_and_contains_the_share(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    reference = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert low == pytest.approx(reference.low, abs=1e-12)
    assert high == pytest.approx(reference.high, abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_is_symmetric_and_widens_with_confidence() -> None:
    low, high = wilson_interval(7, 50)
    other_low, other_high = wilson_interval(43, 50)
    assert low == pytest.approx(1 - other_high)
    assert high == pytest.approx(1 - other_low)
    assert wilson_interval(7, 50, 0.99).low < low
    assert wilson_interval(7, 50, 0.99).high > high


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_wilson_covers(share: float) -> None:
    n = 300
    hits = np.random.default_rng(0).binomial(n, share, 4000)
    inside = [low <= share <= high for low, high in (wilson_interval(int(h), n) for h in hits)]
    assert 0.93 <= np.mean(inside) <= 0.98


def test_mean_interval_agrees_with_scipy() -> None:
    values = [0.41, 0.43, 0.40, 0.47]
    found = mean_interval(values)
    reference = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(reference)
    assert found.stderr == pytest.approx(stats.sem(values))


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values, n_resamples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.012)
    assert high == pytest.approx(values.mean() + half, abs=0.012)
    assert (low, high) == bootstrap_interval(values, n_resamples=4000)


def test_bootstrap_interval_takes_rows_and_any_statistic() -> None:
    rows = np.random.default_rng(2).normal(size=(200, 3))
    low, high = bootstrap_interval(rows, lambda x, axis: np.linalg.norm(x.mean(axis)), n_resamples=300)
    assert 0 < low < high


@pytest.mark.parametrize("scores", ["outcomes", "real"])
def test_paired_bootstrap_covers_and_its_p_is_uniform_under_no_difference(scores: str) -> None:
    rng = np.random.default_rng(3)
    covered, p_values = [], []
    for trial in range(200):
        if scores == "outcomes":
            hard = rng.random(200)
            a, b = (hard + 0.3 * rng.random((2, 200)) < 0.7).astype(int)
        else:
            a, b = rng.normal(size=(2, 200)) + rng.normal(size=200)
        found = paired_bootstrap(a, b, n_resamples=400, seed=trial)
        covered.append(found.low <= 0 <= found.high)
        p_values.append(found.pvalue)
    assert 0.90 <= np.mean(covered) <= 0.99
    assert np.mean(np.asarray(p_values) < 0.05) <= 0.11
    assert 0.4 <= np.mean(p_values) <= 0.7


def test_paired_bootstrap_uses_the_pairing() -> None:
    rng = np.random.default_rng(4)
    shared = rng.random(2000) < 0.5
    a = shared.copy()
    a[:40] = True
    paired = paired_bootstrap(a, shared)
    shuffled = paired_bootstrap(a, rng.permutation(shared))
    assert paired.value == pytest.approx(a.mean() - shared.mean())
    assert paired.high - paired.low < 0.3 * (shuffled.high - shuffled.low)
    assert paired.pvalue < 0.001
    assert paired_bootstrap(shared, a).value == -paired.value


def test_paired_seeds_agree_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 6))
    found = paired_seed_interval(a, b)
    reference = stats.ttest_rel(a, b, alternative="greater")
    interval = stats.ttest_rel(a, b).confidence_interval()
    assert found.probability == pytest.approx(1 - reference.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert paired_seed_interval(b, a).probability == pytest.approx(1 - found.probability)


@pytest.mark.parametrize(("shift", "probability"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_paired_seeds_without_spread(shift: float, probability: float) -> None:
    b = np.array([1.0, 2.0, 4.0])
    found = paired_seed_interval(b + shift, b)
    assert (found.value, found.low, found.high, found.probability) == (shift, shift, shift, probability)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 0), "n=0"),
        (lambda: wilson_interval(5, 4), "successes=5, n=4"),
        (lambda: wilson_interval(1, 4, 95), "confidence lies between 0 and 1, got 95"),
        (lambda: mean_interval([0.5]), "at least 2 values"),
        (lambda: mean_interval([0.5, float("nan")]), "1 non-finite of 2"),
        (lambda: bootstrap_interval([1.0]), "at least two finite rows"),
        (lambda: bootstrap_interval([1.0, 2.0], n_resamples=0), "n_resamples must be at least 1"),
        (lambda: paired_bootstrap([1, 0, 1], [1, 0]), "a has 3, b has 2"),
        (lambda: paired_seed_interval([1.0], [2.0]), "at least 2 values"),
    ],
)
def test_bad_input_is_one_line(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
