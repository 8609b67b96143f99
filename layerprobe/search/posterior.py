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
NOISE = "noise"
OF_PLANS = ("block", "pair", "plan", "size")
"""The amplitudes that are zero where all plans are alike."""
ALIKE = 1 / 3
"""Prior probability that all plans are alike and only the learning rate and the seed matter."""
TAIL = 1.0
"""Degrees of freedom of the t distribution of unit effects: few units may matter much, the others little."""
ROUNDS = 4
"""Updates of the units' scales; more change little."""
LEVEL = 4.0
"""Variance of the overall level, in the same unit: it is known only through the trainings."""
JITTER = 1e-6
N_DRAWS = 256
MOST_CANDIDATES = 400
"""Plans that are compared where there are too many to look at all."""


@dataclass
class Posterior:
    """A Gaussian process for the validation accuracy of (plan, learning rate, seed).

    Additive in the units, whose effects follow a t distribution, with pairs of units (larger between units of
    large effect), a smooth effect of the number of trained units (a square root: the first trained unit changes
    most), a residual of each plan, an effect of the learning rate that may depend on the share of trained units,
    an effect of the seed common to all plans, and noise of its own at every rate. The amplitudes are those of largest
    posterior density under `PRIOR`; `alike` weighs all this against a process without the effects of plans.

    Parameters
    ----------
    space : Space
        The plans.
    lrs : Sequence[float]
        The grid of learning rates.
    trials : Sequence[Trial]
        n trainings, n ≥ 1.
    accuracies : Sequence[float]
        Their validation accuracies; a failed one (−inf) counts as the worst of the others, and a plan of which all
        trainings failed is no answer (`failed`).
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
        seeds = np.array([trial.repeat for trial in self.trials])
        self._constant = {
            "seed": (seeds[:, None] == seeds[None, :]).astype(float),
        }
        for index in np.unique(self._known[1]):  # a rate that is too high makes trainings noisier, too
            self._constant[f"{NOISE} {index}"] = np.diag((self._known[1] == index).astype(float))
        self._scales = np.ones(self.space.n_units)
        self._condition()
        for _ in range(ROUNDS):
            self._rescale()
            self._condition()

    @cached_property
    def failed(self) -> set[Mask]:
        """Plans of which every training failed."""
        outcomes = list(zip(self.trials, self.accuracies, strict=True))
        finished = {trial.mask for trial, accuracy in outcomes if math.isfinite(accuracy)}
        return {trial.mask for trial, _ in outcomes} - finished

    @cached_property
    def alike(self) -> float:
        """Probability that all plans are alike: that only the seed and the learning rate matter, the latter perhaps
        more where more units train."""
        odds = (
            math.log(ALIKE / (1 - ALIKE)) + self._evidence(self._parts_if_alike) - self._evidence(self._parts)
        )
        return float(1 / (1 + math.exp(-np.clip(odds, -50, 50))))

    @cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        return self._kernels(self._known, self._known, np.ones(self.space.n_units)) | self._constant

    @cached_property
    def _parts_if_alike(self) -> dict[str, np.ndarray]:
        return {name: part for name, part in self._parts.items() if name not in OF_PLANS}

    def expected(self, masks: Sequence[Mask]) -> np.ndarray:
        """Expected accuracy of plans, each at its best rate, over whether plans are alike or not."""
        logs, _ = _largest_density(self._parts_if_alike, self._response)
        covariance = _covariance(logs, np.array(list(self._parts_if_alike.values())))
        weights = np.linalg.solve(covariance, self._response)
        trials = [Trial(mask=mask, lr=lr) for mask in masks for lr in self.lrs]
        cross = self._kernels(self._known, self._features(trials), self._scales)["rate"]
        rate = np.exp(2 * logs[list(self._parts_if_alike).index("rate")])
        alike = self._level + self._unit * ((LEVEL + rate * cross).T @ weights).reshape(len(masks), -1)
        return (1 - self.alike) * self.means(masks).max(1) + self.alike * alike.max(1)

    @property
    def noise(self) -> float:
        """Standard deviation of one training around its plan and seed at the best rate, as a share in [0, 1]."""
        tried = np.unique(self._known[1])
        best = self.means([trial.mask for trial in self.trials]).max(0)[tried].argmax()
        return self.amplitudes[f"{NOISE} {tried[best]}"] * self._unit

    def predict(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """Mean (n) and covariance (n×n) of the expected accuracies of `trials`, over seeds."""
        features = self._features(trials)
        cross = self._sum(self._kernels(self._known, features, self._scales))
        prior = self._sum(self._kernels(features, features, self._scales))
        mean = self._level + self._unit * (cross.T @ self._weights)
        covariance = self._unit**2 * (prior - cross.T @ cho_solve(self._factor, cross))
        return mean, covariance

    def means(self, masks: Sequence[Mask]) -> np.ndarray:
        """Expected accuracies of plans (rows) at every learning rate (columns)."""
        trials = [Trial(mask=mask, lr=lr) for mask in masks for lr in self.lrs]
        cross = self._sum(self._kernels(self._known, self._features(trials), self._scales))
        return (self._level + self._unit * (cross.T @ self._weights)).reshape(len(masks), -1)

    def best_rates(self, masks: Sequence[Mask]) -> dict[Mask, float]:
        """Plan → the learning rate of largest expected accuracy."""
        return {mask: self.lrs[int(row.argmax())] for mask, row in zip(masks, self.means(masks), strict=True)}

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
        self,
        left: tuple[np.ndarray, np.ndarray],
        right: tuple[np.ndarray, np.ndarray],
        scales: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Every part of the covariance at amplitude 1, each n×m; `scales` are the units' relative variances."""
        (masks, rates), (others, other_rates) = left, right
        n_units = masks.shape[1]
        signs, other_signs = 2 * masks - 1, 2 * others - 1
        agreement = signs @ other_signs.T
        weighted = (signs * scales) @ other_signs.T
        share, other_share = masks.mean(1), others.mean(1)
        root = np.sqrt(share)[:, None] - np.sqrt(other_share)[None, :]
        grid = np.log(np.asarray(self.lrs))
        near = np.exp(-0.5 * (np.subtract.outer(grid, grid) / math.log(3)) ** 2)
        # Without the mean over rates: what the number of units does at every rate is an effect of plans.
        centred = near - near.mean(0) - near.mean(1)[:, None] + near.mean()
        at = np.ix_(rates, other_rates)
        return {
            "block": weighted,
            "pair": (weighted**2 - scales @ scales) / 2,
            "plan": np.exp(-1.5 * (n_units - agreement) / n_units),
            "size": np.exp(-0.5 * (root / 0.5) ** 2),
            "rate": near[at] + centred[at] * 4 * np.outer(share - 0.5, other_share - 0.5),
        }

    def _sum(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        return LEVEL + np.add.reduce([self.amplitudes[name] ** 2 * part for name, part in parts.items()])

    def _condition(self) -> None:
        """Amplitudes for the present scales, and the process given the trainings."""
        parts = self._kernels(self._known, self._known, self._scales) | self._constant
        logs, _ = _largest_density(parts, self._response)
        self.amplitudes = dict(zip(parts, np.exp(logs), strict=True))
        self._factor = cho_factor(_covariance(logs, np.array(list(parts.values()))), lower=True)
        self._weights = cho_solve(self._factor, self._response)

    def _rescale(self) -> None:
        """One step of expectation and maximisation for the scale of each unit's effect, t distributed."""
        signs = 2 * self._known[0] - 1
        prior = self.amplitudes["block"] ** 2 * self._scales
        mean = prior * (signs.T @ self._weights)
        variance = prior - prior**2 * np.einsum("ib,ib->b", signs, cho_solve(self._factor, signs))
        square = (mean**2 + np.maximum(variance, 0.0)) / self.amplitudes["block"] ** 2
        self._scales = (TAIL + square) / (TAIL + 1)

    def _evidence(self, parts: Mapping[str, np.ndarray]) -> float:
        """Logarithm of the marginal density of the accuracies, amplitudes integrated by Laplace's method."""
        logs, loss = _largest_density(parts, self._response)
        width = np.array([_prior(name)[1] for name in parts])
        steps = 1e-3 * np.diag(width)
        slopes = [
            (_loss(logs + step, parts, self._response)[1] - _loss(logs - step, parts, self._response)[1])
            / 2e-3
            * width
            for step in steps
        ]
        curvature = np.linalg.eigvalsh((np.array(slopes) + np.array(slopes).T) / 2)
        return -loss - 0.5 * float(np.log(np.maximum(curvature, 1e-2)).sum())


def _prior(name: str) -> tuple[float, float]:
    """Median and logarithmic deviation of an amplitude; that of the noise is the same at every rate."""
    return PRIOR[NOISE if name.startswith(NOISE) else name]


def _covariance(logs: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Covariance of the trainings: the parts (p×n×n) at the exponentials of `logs` (p)."""
    total = LEVEL + np.tensordot(np.exp(2 * logs), parts, 1)
    total[np.diag_indices_from(total)] += JITTER
    return np.asarray(total)


def _loss(
    logs: np.ndarray, parts: Mapping[str, np.ndarray], response: np.ndarray
) -> tuple[float, np.ndarray]:
    """Negative logarithm of the posterior density of the amplitudes' logarithms, and its gradient."""
    stack = np.array(list(parts.values()))
    factor, _ = cho_factor(_covariance(logs, stack), lower=True)
    weights = cho_solve((factor, True), response)
    inverse, _ = lapack.dpotri(factor, lower=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    centre, width = (np.array([_prior(name)[index] for name in parts]) for index in (0, 1))
    distance = (logs - np.log(centre)) / width
    value = 0.5 * response @ weights + np.log(np.diag(factor)).sum() + 0.5 * (distance**2).sum()
    slope = np.tensordot(stack, inverse - np.outer(weights, weights), 2) * np.exp(2 * logs)
    return float(value), slope + distance / width


def _largest_density(parts: Mapping[str, np.ndarray], response: np.ndarray) -> tuple[np.ndarray, float]:
    """Logarithms of the amplitudes of largest posterior density, and `_loss` there."""
    centre = np.log([_prior(name)[0] for name in parts])
    width = np.array([_prior(name)[1] for name in parts])
    bounds = list(zip(centre - 4 * width, centre + 4 * width, strict=True))
    found = minimize(
        _loss,
        centre,
        args=(parts, response),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 60},
    )
    return found.x, float(found.fun)


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

    def contender(self) -> Trial:
        """One draw from the probability that a (plan, rate) is the best."""
        return self.trials[
            int((self.mean + self._root @ self.rng.standard_normal(len(self.trials))).argmax())
        ]

    def settled(self, margin: float) -> float:
        """Probability that no plan is better by `margin` or more than the one of largest expected accuracy."""
        top = int(self.mean.reshape(len(self.masks), -1).max(1).argmax())
        differ = float(np.mean(self.draws.max(0) - self.draws[top] < margin))
        alike = self.posterior.alike
        return alike + (1 - alike) * differ


def best_plan(posterior: Posterior, masks: Sequence[Mask], tolerance: float) -> Mask:
    """The smallest of `masks` whose expected accuracy is at most `tolerance` below the largest; none that failed."""
    masks = [mask for mask in masks if mask not in posterior.failed] or masks
    means = posterior.expected(masks)
    params = posterior.space.params
    near = np.flatnonzero(means >= means.max() - tolerance)
    return masks[min(map(int, near), key=lambda index: (params(masks[index]), -means[index]))]


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
        means = posterior.means(masks).max(1)
        best = [masks[index] for index in np.argsort(-means)[: MOST_CANDIDATES // 2]]
        flipped = dict.fromkeys(
            space.repair(tuple(flag ^ (index == unit) for index, flag in enumerate(mask)))
            for mask in best[:16]
            for unit in range(n)
        )
        fresh = [mask for mask in flipped if mask not in pool]
        pool = dict.fromkeys([*best, *fresh])
        if not fresh or posterior.means(fresh).max() <= means.max():
            break
    return list(pool)[:MOST_CANDIDATES]
