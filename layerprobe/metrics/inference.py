"""Inference for trainings that were repeated over seeds: pooled noise, equivalence, power.

Accuracies of several arms (freeze plans, initialisations, learning rates) on common seeds follow
y[arm, seed] = arm + seed + noise. The noise is pooled over the arms, so that a few seeds give more degrees of
freedom; the seed effect cancels in differences. Where a pair of arms varies more than the pool, its own variance
counts: arms need not be equally noisy (a frozen network hardly varies). The sampling of the test images is a second
source of error.
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


@dataclass(frozen=True)
class PooledArms:
    """Least-squares fit of arm and seed effects with one noise variance for all arms.

    Parameters
    ----------
    values : Mapping[str, Mapping[int, float]]
        Arm → seed → accuracy in [0, 1]. Arms may miss seeds; a value that is not finite is left out.
    n_images : int | None
        Test images that each accuracy rests on, ≥ 2; None leaves their sampling out of all intervals.
    correct : Mapping[str, ArrayLike] | None
        Arm → n_images means over seeds of "classified right", for the sampling error of differences. Without
        it the images of two arms are taken for independent, which is too cautious.

    Raises
    ------
    UsageError
        No arm has a value, or no arm has two: then there is nothing to estimate the noise from. One test image.
    """

    values: Mapping[str, Mapping[int, float]]
    n_images: int | None = None
    correct: Mapping[str, ArrayLike] | None = None

    def __post_init__(self) -> None:
        if self.n_images == 1:
            raise UsageError("one test image says nothing about others; give two or more")
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
        """Difference of two arms' expected accuracies, from seeds and the sampling of images.

        The variance over seeds is the pooled one, or that of this pair's own differences where it is larger.

        Returns
        -------
        Estimate
            In [−1, 1]; `pvalue` is two-sided, `probability` that `arm` is better. Undefined, with a reason,
            where an arm has no value, or where no chain of common seeds joins the two.
        """
        for name in (arm, versus):
            if name not in self.arms:
                return Estimate(value=None, n=0, reason=f"no training of '{name}' finished")
        contrast = np.zeros(self._design.shape[1])
        contrast[self.arms.index(arm)] += 1.0
        contrast[self.arms.index(versus)] -= 1.0
        coefficients, inverse, _, _ = self._fit
        if not np.allclose(self._design.T @ self._design @ inverse @ contrast, contrast, atol=1e-8):
            return Estimate(value=None, n=0, reason=f"'{arm}' and '{versus}' have no seeds in common")
        value = float(contrast @ coefficients)
        gaps = self._gaps(arm, versus)
        n = len(gaps)
        own = float(np.var(gaps, ddof=1)) / n if n > 1 else 0.0
        pooled = self.noise**2 * float(contrast @ inverse @ contrast)
        parts = [(max(pooled, own), float(self.freedom))]
        if self.n_images:
            parts.append((self.image_variance(arm, versus), self.n_images - 1.0))
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
        parts = [*self._mean_over_seeds(arm), (spread / images, images - 1.0)]
        total = sum(variance for variance, _ in parts)
        freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts if variance > 0)
        quantile = float(stats.t.ppf(TAIL, freedom))
        size = spread / total
        centre = (value + quantile**2 / (2 * size)) / (1 + quantile**2 / size)
        half = quantile / (1 + quantile**2 / size)
        half *= math.sqrt(value * (1 - value) / size + quantile**2 / (4 * size**2))
        low, high = max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
        return Estimate(
            value=value, low=low, high=high, stderr=math.sqrt(total), n=len(found), freedom=freedom
        )

    def fixed_minus(self, accuracy: float, correct: ArrayLike, arm: str) -> Estimate:
        """Accuracy of a classifier without seeds minus the expected one of an arm, on the same test images.

        Parameters
        ----------
        correct : ArrayLike
            n_images: whether that classifier is right.
        """
        found = [value for name, _, value in self._cells if name == arm]
        if not found or self.correct is None or arm not in self.correct:
            return Estimate(value=None, n=0, reason=f"the right images of '{arm}' are not known")
        gaps = np.asarray(correct, float) - np.asarray(self.correct[arm], float)
        parts = [*self._mean_over_seeds(arm), (_variance_of_mean(gaps), len(gaps) - 1.0)]
        return t_estimate(accuracy - float(np.mean(found)), parts, n=len(found), bounds=(-1.0, 1.0))

    def image_variance(self, arm: str, versus: str) -> float:
        """Variance of a difference that comes from the sampling of the test images alone; no seeds lower it."""
        if not self.n_images:
            return 0.0
        if self.correct is not None and arm in self.correct and versus in self.correct:
            return _variance_of_mean(
                np.asarray(self.correct[arm], float) - np.asarray(self.correct[versus], float)
            )
        shares = [np.mean([v for name, _, v in self._cells if name == side]) for side in (arm, versus)]
        return float(sum(share * (1 - share) for share in shares)) / self.n_images

    def _gaps(self, arm: str, versus: str) -> list[float]:
        """Differences on common seeds."""
        first, second = (
            {seed: value for name, seed, value in self._cells if name == one} for one in (arm, versus)
        )
        return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]

    def _mean_over_seeds(self, arm: str) -> list[tuple[float, float]]:
        """Variance of an arm's mean over seeds and its degrees of freedom: noise, common seed effects, and what
        the arm's own spread exceeds both by."""
        found = [value for name, _, value in self._cells if name == arm]
        n_seeds = len({seed for _, seed, _ in self._cells})
        noise, common = self.noise**2, max(0.0, self._seed_variance - self.noise**2)
        own = float(np.var(found, ddof=1)) if len(found) > 1 else 0.0
        excess = max(0.0, own - noise - common)
        parts = [(noise, self.freedom), (common, n_seeds - 1), (excess, len(found) - 1)]
        return [(variance / len(found), max(1.0, degrees)) for variance, degrees in parts]

    @cached_property
    def _seed_variance(self) -> float:
        """Variance of one training around its arm, the effect of its seed included."""
        groups = [[v for name, _, v in self._cells if name == arm] for arm in self.arms]
        freedom = sum(len(group) - 1 for group in groups)
        return sum(float(np.var(group)) * len(group) for group in groups) / freedom if freedom else 0.0


def _variance_of_mean(gaps: np.ndarray) -> float:
    """Of per-image differences, with at least the variance of one image that differs."""
    return max(float(gaps.var(ddof=1)), 1.0 / len(gaps)) / len(gaps)


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


def detectable_difference(stderr: float, freedom: float, *, claims: int = 1, power: float = 0.8) -> float:
    """The difference that a two-sided test at 5 % finds with probability `power`.

    Parameters
    ----------
    stderr : float
        Standard error of the difference, of every source that the test counts.
    freedom : float
        Its degrees of freedom.
    claims : int
        Differences that are tested together: the level is divided by their number, as Holm's first step does.

    Returns
    -------
    float
        In the unit of `stderr`; inf where there are no degrees of freedom.

    Examples
    --------
    >>> noise = 1.0  # of one training, in points; three paired seeds, and five pooled over eight arms
    >>> round(detectable_difference(noise * (2 / 3) ** 0.5, 2), 1)
    4.6
    >>> round(detectable_difference(noise * (2 / 5) ** 0.5, 28), 1)
    1.8
    """
    if freedom < 1:
        return math.inf
    critical = float(stats.t.ppf(1 - 0.025 / claims, freedom))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(critical, freedom, shift)) - power

    return stderr * float(optimize.brentq(lacking, 0.0, 10 * critical + 10))


def detectable_with(n_seeds: int, *, noise: float, image_stderr: float = 0.0, arms: int = 3) -> float:
    """The difference between two of `arms` that a report over `n_seeds` common seeds finds in 8 of 10 cases.

    Parameters
    ----------
    noise : float
        Standard deviation of one training around its arm and seed.
    image_stderr : float
        Standard error of a difference that comes from the test images alone.
    arms : int
        Number of arms, ≥ 2: all their differences are tested together.

    Returns
    -------
    float
        In the unit of `noise`; inf for one seed.

    Examples
    --------
    >>> round(detectable_with(5, noise=1.0), 1), round(detectable_with(5, noise=1.0, image_stderr=1.0), 1)
    (2.5, 3.9)
    """
    if n_seeds < 2:
        return math.inf
    seeds = 2 * noise**2 / n_seeds
    total = seeds + image_stderr**2
    freedom = (arms - 1) * (n_seeds - 1) * (total / seeds if seeds else math.inf) ** 2
    return detectable_difference(math.sqrt(total), min(freedom, 1e6), claims=arms * (arms - 1) // 2)
