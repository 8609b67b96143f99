"""How far a number can be trusted: intervals for proportions, means over seeds, and paired differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from layerprobe.errors import UsageError
from layerprobe.records import Estimate


class Interval(NamedTuple):
    """Lower and upper end of an interval, in the unit of the quantity."""

    low: float
    high: float


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, for example of a test accuracy.

    Unlike p ± z·s it stays inside [0, 1] and keeps its coverage near 0 and 1.

    Parameters
    ----------
    successes : float
        Number of hits, 0 ≤ successes ≤ n.
    n : int
        Number of trials, ≥ 1.
    confidence : float
        In (0, 1).

    Returns
    -------
    Interval
        (low, high), both in [0, 1]; the observed share lies inside.

    Raises
    ------
    UsageError
        n < 1, successes outside 0 … n, or an impossible confidence.

    References
    ----------
    Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Examples
    --------
    >>> [round(end, 4) for end in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    z = _normal_quantile(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise UsageError(f"a proportion needs 0 ≤ successes ≤ n and n ≥ 1: got successes={successes}, n={n}")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the exact ends are 0 and 1; rounding would leave 1e-17 on the wrong side.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of a handful of runs with Student's t interval (n − 1 degrees of freedom).

    Parameters
    ----------
    values : ArrayLike
        One number per seed, at least two, finite.
    confidence : float
        In (0, 1).

    Returns
    -------
    Estimate
        With low, high, stderr and n. Equal values give an interval of width 0.

    Raises
    ------
    UsageError
        Fewer than two values (one run has no spread), or a value that is not finite.

    Examples
    --------
    >>> round(mean_interval([1.0, 2.0, 3.0]).high, 3)
    4.484
    """
    x = _finite_vector(values, "mean_interval")
    _normal_quantile(confidence)
    mean, stderr = float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))
    half = float(special.stdtrit(len(x) - 1, 0.5 + confidence / 2)) * stderr
    return Estimate(
        value=mean, low=mean - half, high=mean + half, stderr=stderr, n=len(x), freedom=len(x) - 1
    )


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of independent rows.

    Parameters
    ----------
    values : ArrayLike
        n rows (a vector, or an array whose first axis is resampled); n ≥ 2, finite.
    statistic : Callable[..., Any]
        Called as `statistic(resampled, axis=0)`, returns one number.
    n_resamples : int
        Number of resamples; more of them steady the ends.
    confidence : float
        In (0, 1).
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    Interval
        (low, high). The percentile form is short of coverage for n below about 20; for a mean of a few seeds
        use `mean_interval`.

    Raises
    ------
    UsageError
        Fewer than two rows, non-finite values, no resamples, or an impossible confidence.

    References
    ----------
    Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 0 or len(x) < 2 or not np.isfinite(x).all():
        raise UsageError(f"bootstrap_interval needs at least two finite rows, got shape {x.shape}")
    _normal_quantile(confidence)
    _check_resamples(n_resamples)
    rng = np.random.default_rng(seed)
    found = np.empty(n_resamples)
    for i in range(n_resamples):
        found[i] = statistic(x[rng.integers(0, len(x), len(x))], axis=0)
    return _percentiles(found, confidence)


def paired_bootstrap(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Difference of two accuracies (or of any per-sample scores) measured on the same samples.

    Samples are resampled in pairs, so that what is hard for both does not widen the interval.

    Parameters
    ----------
    correct_a, correct_b : ArrayLike
        n per-sample outcomes in the same order, 0/1 or real scores; n ≥ 2.
    n_resamples : int
        Number of resamples.
    confidence : float
        In (0, 1).
    seed : int
        The same seed gives the same answer.

    Returns
    -------
    Estimate
        mean(a − b), its percentile interval, n, and the two-sided bootstrap p-value 2·min(P(d* ≤ 0), P(d* ≥
        0)), at least 2/(n_resamples + 1). Not corrected for several comparisons.

    Raises
    ------
    UsageError
        Different or too small lengths, non-finite values.

    Examples
    --------
    >>> paired_bootstrap([1, 1, 1, 0], [1, 1, 1, 0]).pvalue
    1.0
    """
    difference = _paired(correct_a, correct_b, "paired_bootstrap")
    _normal_quantile(confidence)
    _check_resamples(n_resamples)
    rng = np.random.default_rng(seed)
    levels, counts = np.unique(difference, return_counts=True)
    n = len(difference)
    if len(levels) <= 64:
        # A resample is a multinomial draw over the distinct differences: for 0/1 outcomes just three.
        found = rng.multinomial(n, counts / n, size=n_resamples) @ levels / n
    else:
        found = np.array([difference[rng.integers(0, n, n)].mean() for _ in range(n_resamples)])
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    low, high = _percentiles(found, confidence)
    pvalue = min(1.0, 2 * (tail + 1) / (n_resamples + 1))
    return Estimate(value=float(difference.mean()), low=low, high=high, n=n, pvalue=pvalue)


def paired_seed_interval(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Difference of two arms that were run with the same seeds.

    Parameters
    ----------
    a, b : ArrayLike
        One value per seed, in the same order of seeds; at least two.
    confidence : float
        In (0, 1).

    Returns
    -------
    Estimate
        mean(a − b) with its t interval, and the probability that a's expected value exceeds b's (Student's t
        with n − 1 degrees of freedom, flat prior; one minus the one-sided p-value). Where all differences are
        equal, the interval has width 0 and the probability is 0, 0.5 or 1.

    Raises
    ------
    UsageError
        Different lengths, fewer than two seeds, non-finite values.

    Examples
    --------
    >>> round(paired_seed_interval([3.0, 4.0, 5.0], [2.0, 2.0, 2.0]).probability, 3)
    0.963
    """
    difference = _paired(a, b, "paired_seed_interval")
    mean = mean_interval(difference, confidence)
    assert mean.value is not None and mean.stderr is not None
    if mean.stderr > 0:
        probability = float(special.stdtr(len(difference) - 1, mean.value / mean.stderr))
    else:
        probability = 0.5 + 0.5 * float(np.sign(mean.value))
    return dataclasses.replace(mean, probability=probability)


def interval_in_words(low: float, high: float, *, sign: bool = False) -> str:
    """The ends of an interval of shares as text, in percent.

    >>> interval_in_words(-0.001, 0.007, sign=True)
    '-0.1 to +0.7'
    """
    form = f"{'+' if sign else ''}z.1f"  # z: no minus before a zero
    return f"{100 * low:{form}} to {100 * high:{form}}"


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence lies between 0 and 1, got {confidence}; 0.95 is usual")
    return float(special.ndtri(0.5 + confidence / 2))


def _check_resamples(n_resamples: int) -> None:
    if n_resamples < 1:
        raise UsageError(f"n_resamples must be at least 1, got {n_resamples}")


def _percentiles(found: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


def _finite_vector(values: ArrayLike, name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise UsageError(f"{name} needs a vector of at least 2 values, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise UsageError(f"{name} got {int((~np.isfinite(x)).sum())} non-finite of {len(x)} values")
    return x


def _paired(a: ArrayLike, b: ArrayLike, name: str) -> np.ndarray:
    x, y = _finite_vector(a, name), _finite_vector(b, name)
    if len(x) != len(y):
        raise UsageError(f"{name} pairs values one by one: a has {len(x)}, b has {len(y)}")
    return x - y
