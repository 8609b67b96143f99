"""Inference for trainings that were repeated over seeds: pooled noise, equivalence, power.

Accuracies of several arms (freeze plans, initialisations, learning rates) on common seeds follow
y[arm, seed] = arm + seed + noise. The noise is pooled over all arms, so that a few seeds give many degrees of
freedom; the seed effect cancels in differences. The sampling of the test images is a second source of error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from layerprobe.errors import UsageError
from layerprobe.records import Estimate

TAIL = 0.975
"""All intervals here are those of 95 %, two-sided."""
POWER = 0.8


@dataclass(frozen=True)
class PooledArms:
    """Least-squares fit of arm and seed effects with one noise variance for all arms.

    Parameters
    ----------
    values : Mapping[str, Mapping[int, float]]
        Arm → seed → accuracy in [0, 1]. Arms may miss seeds; a value that is not finite is left out.
    n_images : int | None
        Test images that each accuracy rests on; None leaves their sampling out of all intervals.
    correct : Mapping[str, ArrayLike] | None
        Arm → n_images means over seeds of "classified right", for the sampling error of differences. Without
        it the images of two arms are taken for independent, which is too cautious.

    Raises
    ------
    UsageError
        No arm has a value, or no arm has two: then there is nothing to estimate the noise from.
    """

    values: Mapping[str, Mapping[int, float]]
    n_images: int | None = None
    correct: Mapping[str, ArrayLike] | None = None

    def __post_init__(self) -> None:
        if self.freedom < 1:
            raise UsageError(
                "the noise between seeds needs two arms with two common seeds, or one arm with two"
            )

    @cached_property
    def _cells(self) -> list[tuple[str, int, float]]:
        return [
            (arm, seed, float(value))
            for arm, by_seed in self.values.items()
            for seed, value in by_seed.items()
            if value is not None and math.isfinite(value)
        ]

    @cached_property
    def arms(self) -> list[str]:
        """Arms that have a value."""
        return list(dict.fromkeys(arm for arm, _, _ in self._cells))

    @cached_property
    def _design(self) -> np.ndarray:
        """One column an arm, then one a seed but the first."""
        seeds = sorted({seed for _, seed, _ in self._cells})
        common = len(self.arms) > 1
        design = np.zeros((len(self._cells), len(self.arms) + (len(seeds) - 1 if common else 0)))
        for row, (arm, seed, _) in enumerate(self._cells):
            design[row, self.arms.index(arm)] = 1.0
            if common and seed != seeds[0]:
                design[row, len(self.arms) + seeds.index(seed) - 1] = 1.0
        return design

    @cached_property
    def _fit(self) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Coefficients, pseudo-inverse of the normal matrix, rank, residual sum of squares."""
        response = np.array([value for _, _, value in self._cells])
        inverse = np.linalg.pinv(self._design.T @ self._design)
        coefficients = inverse @ self._design.T @ response
        residual = response - self._design @ coefficients
        return coefficients, inverse, int(np.linalg.matrix_rank(self._design)), float(residual @ residual)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the pooled noise."""
        return len(self._cells) - self._fit[2] if self._cells else 0

    @property
    def noise(self) -> float:
        """Standard deviation of one training around its arm and seed effects."""
        return math.sqrt(self._fit[3] / self.freedom)

    def difference(self, arm: str, versus: str) -> Estimate:
        """Difference of two arms' expected accuracies, with pooled noise and the sampling of images.

        Returns
        -------
        Estimate
            In [−1, 1]; `pvalue` is two-sided, `probability` that `arm` is better. Undefined, with a reason,
            where an arm has no value.
        """
        for name in (arm, versus):
            if name not in self.arms:
                return Estimate(value=None, n=0, reason=f"no training of '{name}' finished")
        contrast = np.zeros(self._design.shape[1])
        contrast[self.arms.index(arm)] += 1.0
        contrast[self.arms.index(versus)] -= 1.0
        coefficients, inverse, _, _ = self._fit
        value = float(contrast @ coefficients)
        parts = [(self.noise**2 * float(contrast @ inverse @ contrast), float(self.freedom))]
        if self.n_images:
            parts.append((self._image_variance(arm, versus), self.n_images - 1.0))
        n = len(self.values[arm].keys() & self.values[versus].keys())
        return t_estimate(value, parts, n=n, bounds=(-1.0, 1.0))

    def mean(self, arm: str) -> Estimate:
        """Mean accuracy of an arm; the interval holds seeds and images, stays in [0, 1] and has a width.

        Wilson's interval, with the number of images that would give the total variance, and a t quantile.
        """
        found = [value for name, _, value in self._cells if name == arm]
        if not found:
            return Estimate(value=None, n=0, reason=f"no training of '{arm}' finished")
        value = float(np.mean(found))
        images = self.n_images or 10**9
        smooth = (value * images + 2.0) / (images + 4.0)
        spread = smooth * (1.0 - smooth)
        n_seeds = len({seed for _, seed, _ in self._cells})
        common = max(0.0, self._seed_variance - self.noise**2) / len(found)
        parts = [
            (self.noise**2 / len(found), self.freedom),
            (common, max(1, n_seeds - 1)),
            (spread / images, max(1, images - 1)),
        ]
        total = sum(variance for variance, _ in parts)
        freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
        quantile = float(stats.t.ppf(TAIL, freedom))
        size = spread / total
        centre = (value + quantile**2 / (2 * size)) / (1 + quantile**2 / size)
        half = quantile / (1 + quantile**2 / size)
        half *= math.sqrt(value * (1 - value) / size + quantile**2 / (4 * size**2))
        low, high = max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
        return Estimate(
            value=value, low=low, high=high, stderr=math.sqrt(total), n=len(found), freedom=freedom
        )

    @cached_property
    def _seed_variance(self) -> float:
        """Variance of one training around its arm, the effect of its seed included."""
        groups = [[v for name, _, v in self._cells if name == arm] for arm in self.arms]
        freedom = sum(len(group) - 1 for group in groups)
        return sum(float(np.var(group)) * len(group) for group in groups) / freedom if freedom else 0.0

    def _image_variance(self, arm: str, versus: str) -> float:
        assert self.n_images is not None
        if self.correct is not None and arm in self.correct and versus in self.correct:
            gap = np.asarray(self.correct[arm], float) - np.asarray(self.correct[versus], float)
            return max(float(gap.var(ddof=1)), 1.0 / len(gap)) / len(gap)
        shares = [np.mean([v for name, _, v in self._cells if name == side]) for side in (arm, versus)]
        return float(sum(share * (1 - share) for share in shares)) / self.n_images


def t_estimate(
    value: float,
    variances: Sequence[tuple[float, float]],
    *,
    n: int | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Estimate with a t interval from independent sources of error.

    Parameters
    ----------
    variances : Sequence[tuple[float, float]]
        (variance, degrees of freedom) of each source; combined by Satterthwaite's approximation.
    bounds : tuple[float, float]
        Range of the quantity; the interval is cut there.

    References
    ----------
    Satterthwaite, An approximate distribution of estimates of variance components, Biometrics 2 (1946).
    """
    total = sum(variance for variance, _ in variances)
    if total <= 1e-24:  # equal shares may differ by their rounding
        reason = "all repetitions agree to the last digit, which is no measure of their spread"
        return Estimate(value=value, stderr=0.0, n=n, reason=reason)
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances if variance > 0)
    stderr = math.sqrt(total)
    half = float(stats.t.ppf(TAIL, freedom)) * stderr
    above = float(stats.t.cdf(value / stderr, freedom))
    return Estimate(
        value=value,
        low=max(bounds[0], value - half),
        high=min(bounds[1], value + half),
        stderr=stderr,
        n=n,
        freedom=freedom,
        pvalue=2 * float(stats.t.sf(abs(value) / stderr, freedom)),
        probability=above,
    )


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values adjusted for several claims by Holm's step-down procedure, in the order given.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = largest
    return adjusted


def equivalence_pvalue(difference: Estimate, margin: float) -> float:
    """p-value of two one-sided tests: small where the difference surely lies within ±`margin`.

    References
    ----------
    Schuirmann, A comparison of the two one-sided tests procedure, J. Pharmacokinet. Biopharm. 15 (1987).
    """
    if difference.value is None or not difference.stderr or difference.freedom is None:
        return 1.0
    below = float(stats.t.sf((difference.value + margin) / difference.stderr, difference.freedom))
    above = float(stats.t.cdf((difference.value - margin) / difference.stderr, difference.freedom))
    return max(below, above)


def detectable_difference(noise: float, n_seeds: int, freedom: float) -> float:
    """The difference of two arms that a comparison over `n_seeds` common seeds finds in 80 % of all cases.

    Parameters
    ----------
    noise : float
        Standard deviation of one training around its arm and seed effects.
    freedom : float
        Degrees of freedom of the pooled noise at the end.

    Returns
    -------
    float
        In the unit of `noise`; inf where there are no degrees of freedom.

    Examples
    --------
    >>> round(detectable_difference(1.0, 3, 2), 1), round(detectable_difference(1.0, 5, 28), 1)
    (4.6, 1.8)
    """
    if freedom < 1 or n_seeds < 1:
        return math.inf
    critical = float(stats.t.ppf(TAIL, freedom))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(critical, freedom, shift)) - POWER

    shift = float(optimize.brentq(lacking, 0.0, 10 * critical + 10))
    return shift * noise * math.sqrt(2.0 / n_seeds)
