"""Statistics for comparing outlier ratios: ratio of ratios, effect sizes, groups of models.

A model (or a part of it) is a list of units, blocks as a rule, each with a count of outliers and of entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from layerprobe.errors import UsageError
from layerprobe.records import Estimate

MAX_EXACT_PERMUTATIONS = 20_000

LEAST_UNITS = 3
"""Fewer blocks give no bootstrap interval: two have only three different resamples."""

Blocks = tuple[np.ndarray, np.ndarray]
"""(outlier counts, entries), one item per unit."""


@dataclass(frozen=True, kw_only=True)
class GroupTest:
    """Two groups of models: ratio of the geometric means of their outlier ratios, and a permutation test.

    `p_smallest` is the least p-value that so few models can give.
    """

    ratio: Estimate
    pvalue: float
    p_smallest: float
    n_permutations: int
    exact: bool


def ratio_of_ratios(
    a: Blocks, b: Blocks, *, n_resamples: int = 5000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """(Σ counts / Σ entries of a) divided by the same of b, with a block-bootstrap interval.

    Units are drawn with replacement within each model; percentiles of log ratios, with half an outlier added
    on either side so that a resample without outliers stays finite. `stderr` is that of the log ratio. With few units
    percentile intervals are too narrow, so the percentiles are those of a t interval on the smaller number of units.

    Returns
    -------
    Estimate
        Value 1 = equal, above 1 = a has more. Undefined where b has no outliers.
    """
    _check(a)
    _check(b)
    if a[1].sum() == 0 or b[1].sum() == 0:
        return Estimate(value=None, reason="no entries on one side")
    below = b[0].sum() / b[1].sum()
    value = float(a[0].sum() / a[1].sum() / below) if below > 0 else None
    reason = None if value is not None else "the second model has no such outliers"
    if len(a[0]) < LEAST_UNITS or len(b[0]) < LEAST_UNITS:
        few = (
            f"{min(len(a[0]), len(b[0]))} units on a side give no interval; at least {LEAST_UNITS} are needed"
        )
        return Estimate(value=value, reason=reason or few)
    rng = np.random.default_rng(seed)
    logs = _resampled_log_ratio(a, rng, n_resamples) - _resampled_log_ratio(b, rng, n_resamples)
    return _with_interval(value, logs, _expanded(confidence, min(len(a[0]), len(b[0]))), reason)


def _expanded(confidence: float, n: int) -> float:
    """The confidence at which percentiles of a bootstrap of `n` units are as far apart as those of a t interval.

    References
    ----------
    Hesterberg, What teachers should know about the bootstrap, The American Statistician 69 (2015), section 5.
    """
    reach = math.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + confidence / 2, n - 1)
    return float(2 * stats.norm.cdf(reach) - 1)


def log_ratios(blocks: Blocks) -> np.ndarray:
    """ln((count + ½)/(entries + 1)) of each block, finite also where nothing was counted."""
    return np.log((blocks[0] + 0.5) / (blocks[1] + 1.0))


def hedges_g(x: np.ndarray, y: np.ndarray) -> float | None:
    """Standardised mean difference (x above y is positive) with Hedges' small-sample correction.

    None where a side has fewer than two values or both have no spread.

    References
    ----------
    L. V. Hedges, "Distribution theory for Glass's estimator of effect size", J. Educ. Stat. 6 (1981).
    """
    if len(x) < 2 or len(y) < 2:
        return None
    freedom = len(x) + len(y) - 2
    pooled = ((len(x) - 1) * np.var(x, ddof=1) + (len(y) - 1) * np.var(y, ddof=1)) / freedom
    if pooled <= 0:
        return None
    return float((np.mean(x) - np.mean(y)) / math.sqrt(pooled) * (1 - 3 / (4 * freedom - 1)))


def cliffs_delta(x: np.ndarray, y: np.ndarray) -> float | None:
    """P(x > y) − P(x < y) over all pairs, in [−1, 1]; None where a side is empty."""
    if not len(x) or not len(y):
        return None
    return float(np.sign(np.asarray(x)[:, None] - np.asarray(y)[None, :]).mean())


def group_test(
    first: Sequence[Blocks],
    second: Sequence[Blocks],
    *,
    n_resamples: int = 5000,
    confidence: float = 0.95,
    seed: int = 0,
) -> GroupTest:
    """Difference of the outlier ratio between two groups of models; each model counts once, whatever its size.

    The value is exp(mean ln ratio of the first − of the second). Its interval resamples models, and blocks
    within models. The p-value is two-sided on the difference of mean log ratios under all relabellings of the
    models (drawn at random where they are more than 20,000), the observed one included.

    Raises
    ------
    UsageError
        An empty group.
    """
    if not first or not second:
        raise UsageError("a group comparison needs at least one model in each group")
    everything = [*first, *second]
    for blocks in everything:
        _check(blocks)
    logs = np.array([math.log((c.sum() + 0.5) / (n.sum() + 1.0)) for c, n in everything])
    size, total = len(first), len(everything)
    observed = logs[:size].mean() - logs[size:].mean()
    splits = math.comb(total, size)
    exact = splits <= MAX_EXACT_PERMUTATIONS
    rng = np.random.default_rng(seed)
    if exact:
        chosen = np.array(list(combinations(range(total), size)))
    else:
        drawn = [rng.permutation(total)[:size] for _ in range(MAX_EXACT_PERMUTATIONS - 1)]
        chosen = np.array([np.arange(size), *drawn])
    sums = logs[chosen].sum(axis=1)
    differences = np.abs(sums / size - (logs.sum() - sums) / (total - size))
    pvalue = float((differences >= abs(observed) * (1 - 1e-12)).mean())
    # With groups of equal size every split has a mirror image with the same absolute difference.
    smallest = (2 if 2 * size == total else 1) / len(chosen)
    if size < 2 or total - size < 2:
        reason = "one model in a group gives no interval over models"
        ratio = Estimate(value=float(np.exp(observed)), reason=reason)
    else:
        draws = _group_draws(first, rng, n_resamples) - _group_draws(second, rng, n_resamples)
        ratio = _with_interval(float(np.exp(observed)), draws, confidence)
    return GroupTest(ratio=ratio, pvalue=pvalue, p_smallest=smallest, n_permutations=len(chosen), exact=exact)


def _with_interval(
    value: float | None, log_draws: np.ndarray, confidence: float, reason: str | None = None
) -> Estimate:
    low, high = np.exp(np.quantile(log_draws, [(1 - confidence) / 2, (1 + confidence) / 2]))
    stderr = float(log_draws.std(ddof=1))
    return Estimate(value=value, low=float(low), high=float(high), stderr=stderr, reason=reason)


def _group_draws(group: Sequence[Blocks], rng: np.random.Generator, n_resamples: int) -> np.ndarray:
    per_model = np.stack([_resampled_log_ratio(blocks, rng, n_resamples) for blocks in group])
    chosen = rng.integers(0, len(group), (len(group), n_resamples))
    return per_model[chosen, np.arange(n_resamples)].mean(axis=0)


def _resampled_log_ratio(blocks: Blocks, rng: np.random.Generator, n_resamples: int) -> np.ndarray:
    counts, entries = blocks
    drawn = rng.integers(0, len(counts), (n_resamples, len(counts)))
    return np.log((counts[drawn].sum(axis=1) + 0.5) / (entries[drawn].sum(axis=1) + 1.0))


def _check(blocks: Blocks) -> None:
    counts, entries = blocks
    if len(counts) != len(entries) or len(counts) == 0:
        raise UsageError(
            f"one count and one size per block: got {len(counts)} counts and {len(entries)} sizes"
        )
    if (counts < 0).any() or (counts > entries).any():
        raise UsageError("a count of outliers lies between 0 and the number of entries")
