"""What the trainings so far say about every plan: a Gaussian process over plans, learning rates and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lapack
from scipy.optimize import minimize

from layerprobe.records import Estimate
from layerprobe.search.space import Mask, Space, Trial

PRIOR = {
    "block": (0.30, 0.8),
    "pair": (0.08, 0.8),
    "plan": (0.15, 0.8),
    "size": (0.60, 0.8),
    "rate": (0.30, 0.8),
    "seed": (0.20, 0.8),
    "noise": (0.30, 1.0),
}
"""Amplitude → (median, standard deviation of its logarithm), in standard deviations of the accuracies at hand."""
LEVEL = 4.0
"""Variance of the overall level, in the same unit: it is known only through the trainings."""
JITTER = 1e-6
N_DRAWS = 256
MOST_CANDIDATES = 400
"""Plans that are compared where there are too many to look at all."""


@dataclass
class Posterior:
    """A Gaussian process for the validation accuracy of (plan, learning rate, seed).

    Additive in the units, with pairs of units, a smooth effect of the number of trained units (a square root:
    the first trained unit changes most), a residual of each plan, an effect of the learning rate that may depend
    on the share of trained units, an effect of the seed common to all plans, and noise. The amplitudes are those
    of largest posterior density under `PRIOR`.

    Parameters
    ----------
    space : Space
        The plans.
    lrs : Sequence[float]
        The grid of learning rates.
    trials : Sequence[Trial]
        n trainings, n ≥ 1.
    accuracies : Sequence[float]
        Their validation accuracies; a failed one (−inf) counts as the worst of the others.
    """

    space: Space
    lrs: Sequence[float]
    trials: Sequence[Trial]
    accuracies: Sequence[float]

    def __post_init__(self) -> None:
        values = np.asarray(self.accuracies, dtype=float)
        finite = values[np.isfinite(values)]
        worst = finite.min() if len(finite) else 0.0
        values = np.where(np.isfinite(values), values, worst)
        self._level = float(values.mean())
        self._unit = max(float(values.std()), 1e-3)
        self._response = (values - self._level) / self._unit
        self._known = self._features(self.trials)
        self._parts = self._kernels(self._known, self._known)
        seeds = np.array([trial.repeat for trial in self.trials])
        self._parts["seed"] = (seeds[:, None] == seeds[None, :]).astype(float)
        self._parts["noise"] = np.eye(len(values))
        self.amplitudes = self._fit()
        self._factor = cho_factor(self._covariance(self.amplitudes), lower=True)
        self._weights = cho_solve(self._factor, self._response)

    @property
    def noise(self) -> float:
        """Standard deviation of one training around its plan, rate and seed, as a share in [0, 1]."""
        return self.amplitudes["noise"] * self._unit

    def predict(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """Mean (n) and covariance (n×n) of the expected accuracies of `trials`, over seeds."""
        features = self._features(trials)
        cross = self._sum(self._kernels(self._known, features))
        prior = self._sum(self._kernels(features, features))
        mean = self._level + self._unit * (cross.T @ self._weights)
        covariance = self._unit**2 * (prior - cross.T @ cho_solve(self._factor, cross))
        return mean, covariance

    def best_rates(self, masks: Sequence[Mask]) -> dict[Mask, float]:
        """Plan → the learning rate of largest expected accuracy."""
        trials = [Trial(mask=mask, lr=lr) for mask in masks for lr in self.lrs]
        means = self.predict(trials)[0].reshape(len(masks), len(self.lrs))
        return {mask: self.lrs[int(row.argmax())] for mask, row in zip(masks, means, strict=True)}

    def unit_gains(self, rng: np.random.Generator) -> list[Estimate]:
        """What training each unit adds to the accuracy, averaged over plans of the others; 95 % intervals."""
        n = self.space.n_units
        drawn = rng.random((64, n)) < 0.5
        middle = list(self.lrs)[len(self.lrs) // 2]
        found = []
        for unit in range(n):
            sides = []
            for trained in (True, False):
                masks = drawn.copy()
                masks[:, unit] = trained
                sides += [Trial(mask=tuple(map(bool, mask)), lr=middle) for mask in masks]
            mean, covariance = self.predict(sides)
            weight = np.repeat([1.0, -1.0], len(drawn)) / len(drawn)
            stderr = math.sqrt(max(0.0, float(weight @ covariance @ weight)))
            value = float(weight @ mean)
            found.append(
                Estimate(
                    value=value,
                    low=value - 1.96 * stderr,
                    high=value + 1.96 * stderr,
                    stderr=stderr,
                    n=len(self.trials),
                )
            )
        return found

    def _features(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """Masks n×L as 0 and 1, and indices n of the rates."""
        masks = np.array([trial.mask for trial in trials], dtype=float)
        rates = np.array([list(self.lrs).index(trial.lr) for trial in trials])
        return masks, rates

    def _kernels(
        self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Every part of the covariance at amplitude 1, each n×m."""
        (masks, rates), (others, other_rates) = left, right
        n_units = masks.shape[1]
        agreement = (2 * masks - 1) @ (2 * others - 1).T
        share, other_share = masks.mean(1), others.mean(1)
        root = np.sqrt(share)[:, None] - np.sqrt(other_share)[None, :]
        distance = np.log(np.asarray(self.lrs))
        spread = distance[rates][:, None] - distance[other_rates][None, :]
        same = np.exp(-0.5 * (spread / math.log(3)) ** 2)
        return {
            "block": agreement,
            "pair": (agreement**2 - n_units) / 2,
            "plan": np.exp(-1.5 * (n_units - agreement) / n_units),
            "size": np.exp(-0.5 * (root / 0.5) ** 2),
            "rate": same * (1 + 4 * np.outer(share - 0.5, other_share - 0.5)),
        }

    def _sum(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return LEVEL + np.add.reduce([self.amplitudes[name] ** 2 * part for name, part in parts.items()])

    def _covariance(self, amplitudes: Mapping[str, float]) -> np.ndarray:
        total = np.add.reduce([amplitudes[name] ** 2 * part for name, part in self._parts.items()])
        total += LEVEL
        total[np.diag_indices_from(total)] += JITTER
        return np.asarray(total)

    def _fit(self) -> dict[str, float]:
        """Amplitudes of largest posterior density, by gradient descent from the prior's medians."""
        names = list(PRIOR)
        centre = np.log([PRIOR[name][0] for name in names])
        width = np.array([PRIOR[name][1] for name in names])
        parts = np.array([self._parts[name] for name in names])

        def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
            covariance = self._covariance(dict(zip(names, np.exp(logs), strict=True)))
            factor, _ = cho_factor(covariance, lower=True)
            weights = cho_solve((factor, True), self._response)
            inverse, _ = lapack.dpotri(factor, lower=1)
            inverse = np.tril(inverse) + np.tril(inverse, -1).T
            value = 0.5 * self._response @ weights + np.log(np.diag(factor)).sum()
            value += 0.5 * (((logs - centre) / width) ** 2).sum()
            slope = np.tensordot(parts, inverse - np.outer(weights, weights), 2) * np.exp(2 * logs)
            return float(value), slope + (logs - centre) / width**2

        bounds = list(zip(centre - 4 * width, centre + 4 * width, strict=True))
        found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        return dict(zip(names, np.exp(found.x), strict=True))


@dataclass
class Comparison:
    """Joint draws of the expected accuracy of candidate plans, each at each learning rate.

    Parameters
    ----------
    posterior : Posterior
        What is known.
    masks : Sequence[Mask]
        m candidates.
    rng : np.random.Generator
        For the draws.
    """

    posterior: Posterior
    masks: Sequence[Mask]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        lrs = self.posterior.lrs
        self.trials = [Trial(mask=mask, lr=lr) for mask in self.masks for lr in lrs]
        self.mean, covariance = self.posterior.predict(self.trials)
        # Cholesky, not eigenvectors: those of equal eigenvalues are arbitrary, and would differ between machines.
        jitter = 1e-9 * float(np.trace(covariance)) / len(covariance) + 1e-15
        self._root = np.linalg.cholesky(covariance + jitter * np.eye(len(covariance)))

    @cached_property
    def draws(self) -> np.ndarray:
        """m×N_DRAWS accuracies of the plans, each at the rate that is best for it in the draw."""
        drawn = self.mean[:, None] + self._root @ self.rng.standard_normal((len(self.trials), N_DRAWS))
        return drawn.reshape(len(self.masks), -1, N_DRAWS).max(1)

    @property
    def means(self) -> np.ndarray:
        """Expected accuracy of every plan at its best rate: m."""
        return self.mean.reshape(len(self.masks), -1).max(1)

    def contender(self) -> Trial:
        """One draw from the probability that a (plan, rate) is the best."""
        return self.trials[
            int((self.mean + self._root @ self.rng.standard_normal(len(self.trials))).argmax())
        ]

    def settled(self, margin: float) -> float:
        """Probability that no plan is better by `margin` or more than the one of largest expected accuracy."""
        top = int(self.means.argmax())
        return float(np.mean(self.draws.max(0) - self.draws[top] < margin))

    def answer(self, tolerance: float) -> Mask:
        """The smallest plan whose expected accuracy is at most `tolerance` below the largest."""
        means, params = self.means, self.posterior.space.params
        near = np.flatnonzero(means >= means.max() - tolerance)
        return self.masks[min(map(int, near), key=lambda index: (params(self.masks[index]), -means[index]))]


def candidate_masks(space: Space, posterior: Posterior | None, rng: np.random.Generator) -> list[Mask]:
    """Every allowed plan, or, of very many, those around the best: neighbours of promising ones and random others."""
    if space.count_upper() <= MOST_CANDIDATES:
        return list(space.masks())
    n = space.n_units
    spans = [(0, k) for k in range(n + 1)] + [(k, n) for k in range(n)] + [(k, k + 1) for k in range(n)]
    pool = dict.fromkeys(
        space.repair(tuple(start <= index < stop for index in range(n))) for start, stop in spans
    )
    if posterior is None:
        return list(pool)
    pool |= dict.fromkeys(trial.mask for trial in posterior.trials if space.allows(trial.mask))
    for _ in range(MOST_CANDIDATES // 4):
        pool.setdefault(space.random_mask(rng))
    for _ in range(2 * n):  # hill climbing of the whole pool: each round flips one unit of the best
        masks = list(pool)
        means = Comparison(posterior, masks, rng).means
        best = [masks[index] for index in np.argsort(-means)[: MOST_CANDIDATES // 2]]
        flipped = dict.fromkeys(
            space.repair(tuple(flag ^ (index == unit) for index, flag in enumerate(mask)))
            for mask in best[:16]
            for unit in range(n)
        )
        fresh = [mask for mask in flipped if mask not in pool]
        pool = dict.fromkeys([*best, *fresh])
        if not fresh or (len(fresh) and Comparison(posterior, fresh, rng).means.max() <= means.max()):
            break
    return list(pool)[:MOST_CANDIDATES]
