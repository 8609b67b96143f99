"""A Gaussian process over plans: what one plan's training says about its relatives.

Two plans that train nearly the same blocks have nearly the same accuracy, so every training informs the
estimate of many plans. That, not a cleverer sampler, is what beats the noise of single seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.linalg import solve_triangular

from layerprobe.search.space import Trial

Scores = Mapping[str, tuple[np.ndarray, np.ndarray]]


class PlanModel:
    """Posterior over accuracy as a function of (mask, learning rate, fidelity).

    The prior is a sum of independent terms: number of trained blocks (saturating), single blocks, the given
    scores summed over trained blocks, learning rate and its interaction with size, the short rung's offset
    by size, block and learning rate, and a residual per plan and rate that falls off with Hamming distance. The scales
    of blocks, scores, residual and noise are chosen by marginal likelihood on a small grid, so that scores
    count only as far as the trainings bear them out.

    Parameters
    ----------
    n_blocks : blocks of the backbone. lrs : the grid. scores : name → (value, standard error) per block.

    References
    ----------
    Rasmussen, Williams, Gaussian Processes for Machine Learning, 2006, algorithm 2.1 and section 5.4.
    """

    def __init__(self, n_blocks: int, lrs: Sequence[float], scores: Scores | None = None) -> None:
        self.n_blocks = n_blocks
        self.lrs = tuple(lrs)
        self.directions = standard_scores(scores or {})

    def fit(self, trials: Sequence[Trial], accuracies: Sequence[float]) -> PlanModel:
        """Fit to trials with finite accuracies (at least two)."""
        y = np.asarray(accuracies, dtype=np.float64)
        self._trials = list(trials)
        self._mean = float(y.mean())
        self._scale = float(y.std()) or 1.0
        z = (y - self._mean) / self._scale
        parts = self._kernels(self._trials, self._trials)
        # Short rungs are noisier.
        rough = np.array([1.0 / trial.fidelity for trial in self._trials]) ** 0.5
        best = -math.inf
        for blocks, scored, residual, noise in itertools.product(
            (0.4, 1.2), (0.0, 0.6) if len(self.directions) else (0.0,), (0.15, 0.4), (0.05, 0.15, 0.4, 0.8)
        ):
            scales = (1.0, blocks, scored, residual)
            gram = _combine(parts, scales)
            factor = np.linalg.cholesky(gram + np.diag(noise**2 * rough + 1e-8))
            half = solve_triangular(factor, z, lower=True)
            evidence = -0.5 * float(half @ half) - float(np.log(np.diag(factor)).sum())
            if evidence > best:
                best = evidence
                self._scales, self._factor, self._half, self._noise = scales, factor, half, noise
        return self

    def predict(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of the accuracy of each trial, without its own noise."""
        cross = _combine(self._kernels(self._trials, trials), self._scales)
        cross = solve_triangular(self._factor, cross, lower=True)
        mean = cross.T @ self._half
        parts = [(design**2).sum(axis=1) for design in self._designs(trials)] + [np.ones(len(trials))]
        variance = np.maximum(_combine(parts, self._scales) - (cross**2).sum(axis=0), 1e-12)
        return self._mean + self._scale * mean, self._scale * np.sqrt(variance)

    @property
    def noise(self) -> float:
        """Fitted standard deviation of one full-length training, in accuracy."""
        return self._noise * self._scale

    def _designs(self, trials: Sequence[Trial]) -> list[np.ndarray]:
        """Columns with the prior's scale in them: what is always there, single blocks, scores."""
        masks = np.array([trial.mask for trial in trials], dtype=np.float64)
        share = masks.mean(axis=1, keepdims=True)
        rates = np.array([[lr == trial.lr for lr in self.lrs] for trial in trials], dtype=np.float64)
        short = np.array([[1.0 - trial.fidelity] for trial in trials])
        per_block = masks / math.sqrt(self.n_blocks)
        always = [
            np.ones_like(share),
            np.sqrt(share),
            share,
            0.7 * rates,
            0.7 * rates * share,
            short,
            0.7 * short * share,
            0.5 * short * rates,
            0.3 * short * rates * share,
        ]
        scored = masks @ self.directions.T if len(self.directions) else np.zeros((len(trials), 1))
        return [
            np.hstack(always),
            np.hstack([per_block, 0.15 * short * per_block]),
            scored / math.sqrt(self.n_blocks),
        ]

    def _kernels(self, left: Sequence[Trial], right: Sequence[Trial]) -> list[np.ndarray]:
        a = np.array([trial.mask for trial in left], dtype=np.float64)
        b = np.array([trial.mask for trial in right], dtype=np.float64)
        hamming = a.sum(1)[:, None] + b.sum(1)[None, :] - 2.0 * a @ b.T
        linear = [x @ y.T for x, y in zip(self._designs(left), self._designs(right), strict=True)]
        # Half of what makes a plan special belongs to its rate: one that fails there may do well at another.
        same_rate = np.equal.outer([trial.lr for trial in left], [trial.lr for trial in right])
        return [*linear, 0.5 * (1.0 + same_rate) * np.exp(-3.0 * hamming / self.n_blocks)]


def _combine(parts: Sequence[np.ndarray], scales: Sequence[float]) -> np.ndarray:
    total = scales[0] ** 2 * parts[0]
    for part, scale in zip(parts[1:], scales[1:], strict=True):
        total = total + scale**2 * part
    return total


def standard_scores(scores: Scores) -> np.ndarray:
    """Scores as rows with mean 0 and deviation 1 over blocks; constant or undefined ones drop out."""
    rows = []
    for value, _ in scores.values():
        centred = np.asarray(value, dtype=np.float64) - np.mean(value)
        if np.isfinite(centred).all() and centred.std() > 0:
            rows.append(centred / centred.std())
    return np.array(rows)


def order_by_scores(scores: Scores, n_blocks: int, rng: np.random.Generator) -> list[int]:
    """All blocks, best first by one score, drawn at random, after noise of its standard error (Thompson)."""
    names = [name for name, (value, _) in scores.items() if np.isfinite(value).all() and np.std(value) > 0]
    if not names:
        return rng.permutation(n_blocks).tolist()
    value, stderr = scores[names[int(rng.integers(len(names)))]]
    spread = np.where(np.isfinite(stderr), stderr, np.std(value))
    return np.argsort(-(value + spread * rng.standard_normal(n_blocks)), kind="stable").tolist()
