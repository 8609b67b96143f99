"""Pooled intervals, Holm, equivalence, power: against theory and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from layerprobe.errors import UsageError
from layerprobe.metrics.inference import (
    PooledArms,
    detectable_difference,
    detectable_with,
    equivalence_pvalue,
    holm,
    t_estimate,
)

ARMS = "abcdef"


def accuracies(rng, n_seeds=3, noise=0.01, seed_effect=0.02, slope=0.01):
    effects = rng.normal(0, seed_effect, n_seeds)
    return {
        arm: {seed: 0.6 + slope * k + effects[seed] + rng.normal(0, noise) for seed in range(n_seeds)}
        for k, arm in enumerate(ARMS)
    }


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    difference, mean = [], []
    for _ in range(800):
        pooled = PooledArms(accuracies(rng))
        found = pooled.difference("c", "a")
        difference.append(found.low <= 0.02 <= found.high)
        own = pooled.mean("a")
        mean.append(own.low <= 0.6 <= own.high)
    assert 0.93 <= np.mean(difference) <= 0.97
    assert 0.92 <= np.mean(mean) <= 0.99


def test_pooling_finds_what_three_paired_seeds_do_not():
    rng = np.random.default_rng(1)
    found = {"pooled": 0, "paired": 0}
    for _ in range(300):
        values = accuracies(rng, slope=0.024 / 5)  # f is 2.4 noise deviations above a
        found["pooled"] += PooledArms(values).difference("f", "a").low > 0
        a, f = (list(values[arm].values()) for arm in "af")
        found["paired"] += stats.ttest_rel(f, a).pvalue < 0.05
    assert found["pooled"] / 300 > 0.7 > 0.55 > found["paired"] / 300


def test_a_missing_seed_is_no_obstacle_and_a_failed_run_is_left_out():
    values = accuracies(np.random.default_rng(2))
    whole = PooledArms(values).difference("b", "a")
    del values["b"][2]
    values["c"][0] = float("nan")
    part = PooledArms(values)
    assert part.difference("b", "a").n == 2
    assert part.freedom == 8
    assert part.difference("b", "a").value == pytest.approx(whole.value, abs=0.02)
    assert part.difference("b", "z").reason == "no training of 'z' finished"


def test_equal_seeds_have_no_interval_of_width_zero_and_shares_stay_in_their_range():
    pooled = PooledArms({"a": {0: 0.3, 1: 0.3}, "b": {0: 0.31, 1: 0.31}}, n_images=100)
    mean = pooled.mean("a")
    assert mean.low < 0.25 and mean.high > 0.35
    wide = PooledArms({"a": {0: 0.05, 1: 0.6}, "b": {0: 0.0, 1: 0.02}}, n_images=50)
    assert all(0 <= wide.mean(arm).low < wide.mean(arm).high <= 1 for arm in "ab")
    assert -1 <= wide.difference("a", "b").low < wide.difference("a", "b").high <= 1
    assert (
        "no measure"
        in PooledArms({"a": {0: 0.3, 1: 0.3}, "b": {0: 0.31, 1: 0.31}}).difference("a", "b").reason
    )


def test_the_sampling_of_images_widens_a_difference_less_where_the_same_images_are_right():
    rng = np.random.default_rng(3)
    values = accuracies(rng, noise=0.002)
    bare = PooledArms(values).difference("f", "a")
    unpaired = PooledArms(values, n_images=1000).difference("f", "a")
    easy = rng.random(1000)
    correct = {"a": (easy < 0.6).astype(float), "f": (easy < 0.65).astype(float)}
    paired = PooledArms(values, n_images=1000, correct=correct).difference("f", "a")
    assert bare.stderr < paired.stderr < unpaired.stderr


def test_nothing_to_pool_is_refused():
    with pytest.raises(UsageError, match="two common seeds"):
        PooledArms({"a": {0: 0.5}, "b": {0: 0.6}})


def test_one_test_image_and_arms_without_common_seeds_are_refused():
    with pytest.raises(UsageError, match="one test image"):
        PooledArms({"a": {0: 0.5, 1: 1.0}}, n_images=1)
    values = {"a": {0: 0.2, 1: 0.3}, "c": {0: 0.2, 1: 0.4}, "b": {2: 0.9, 3: 0.8}}
    apart = PooledArms(values).difference("a", "b")
    assert apart.value is None and "no seeds in common" in apart.reason


@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize(
    ("noise", "shared"),
    [((1, 1, 0.05), (1, 1, 0)), ((0.3, 0.3, 0.3), (1, 1, 0)), ((0.3, 1.5, 0.3), (1, 1, 1))],
)
def test_intervals_cover_where_arms_are_not_equally_noisy(n_seeds, noise, shared):
    """A frozen network hardly varies, or does not share the seed effect of trained ones."""
    rng = np.random.default_rng(7)
    covered = []
    for _ in range(1000):
        effects = rng.standard_normal(n_seeds)
        values = {
            arm: dict(enumerate((common * effects + level * rng.standard_normal(n_seeds)).tolist()))
            for arm, level, common in zip("abc", noise, shared, strict=True)
        }
        pooled = PooledArms(values)
        pairs = [pooled.difference(*pair) for pair in ("ab", "ac", "bc")]
        covered.append([e.low <= 0 <= e.high for e in pairs])
    assert np.mean(covered, axis=0).min() > 0.89


def test_a_classifier_without_seeds_is_compared_with_the_whole_spread_of_an_arm():
    rng = np.random.default_rng(8)
    covered = []
    for _ in range(500):
        effects = 0.03 * rng.standard_normal(5)  # common to the arms, and no part of the pooled noise
        values = {
            arm: dict(enumerate((0.6 + effects + 0.005 * rng.standard_normal(5)).tolist())) for arm in "ab"
        }
        pooled = PooledArms(values, n_images=10**6, correct={"a": np.full(1000, 0.6)})
        found = pooled.fixed_minus(0.6, np.full(1000, 0.6), "a")
        covered.append(found.low <= 0 <= found.high)
    assert 0.92 < np.mean(covered) <= 0.99
    assert pooled.fixed_minus(0.6, np.ones(3), "b").value is None


def test_holm_controls_the_family():
    rng = np.random.default_rng(5)
    hits = [min(holm(rng.random(10).tolist())) < 0.05 for _ in range(2000)]
    assert 0.03 < np.mean(hits) < 0.07
    assert holm([0.5, 0.001]) == [0.5, 0.002]


def test_equivalence_is_shown_for_small_and_refused_for_large_differences():
    small = t_estimate(0.001, [(0.005**2, 10)])
    assert equivalence_pvalue(small, 0.02) < 0.01
    assert equivalence_pvalue(small, 0.002) > 0.05
    assert equivalence_pvalue(t_estimate(0.05, [(0.005**2, 10)]), 0.02) > 0.99


def test_stated_power_is_the_power_reached():
    rng = np.random.default_rng(6)
    shift = detectable_difference(0.01 * math.sqrt(2 / 3), 10)
    found = [
        PooledArms(accuracies(rng, slope=shift / 5)).difference("f", "a").pvalue < 0.05 for _ in range(600)
    ]
    assert np.mean(found) == pytest.approx(0.74, abs=0.08)  # the wider of two variances costs some
    assert detectable_difference(0.01, 0) == math.inf == detectable_with(1, noise=0.01)
    assert (
        detectable_with(4, noise=0.01)
        < detectable_with(3, noise=0.01)
        < detectable_with(3, noise=0.01, arms=4) * 1.2
    )
    assert detectable_with(50, noise=0.01, image_stderr=0.01) > 0.028
