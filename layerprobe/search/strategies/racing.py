"""The default: learning rates compared at full length, then a model proposes (plan, rate), then finals decide.

The model is a Gaussian process over plans: two plans that train nearly the same blocks have nearly the same
accuracy, so every training informs the estimate of many plans. That beats the noise of single seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.linalg import solve_triangular

from layerprobe.search.budget import Scores, TrialBudget
from layerprobe.search.space import Mask, Space, Trial, mask_of, structured_masks
from layerprobe.search.strategies.base import coarse_to_fine, frontier

POOL = 256
"""Plans considered at all; every plan where there are no more than this many."""

SPREAD = 5
"""Sizes at which one full-length trial comes before the model chooses freely."""

BATCH = 4
"""Full-length trials between two looks at the model; part of the search's definition, not of the hardware."""


class Racing:
    """Score-guided racing.

    1. Pool: every allowed plan where there are at most `POOL`, else simple families plus plans that the scores and
       their uncertainty propose. In the first case the scores enter the model alone, as far as trainings bear them
       out; they are not shown to help there (results/freeze_search).
    2. Anchors: the largest and the smallest plan at every learning rate, at full length. How the best rate moves
       with the number of trained blocks shows there; short runs favour other rates, and other plans, and stand in
       only where the budget does not pay for full ones.
    3. Where the pool does not hold every plan, half of what is left to explore goes into short schedules that
       anneal fully, over a spread of sizes: they cover more blocks than a few long runs can.
    4. A model over plans and rates (`PlanModel`) reads all that and picks full-length trials, each at the rate that
       may suit the plan: one at each of a few sizes, then in small batches the plan that may be best, and for each
       size the plan that may be good enough.
    5. The model's shortlist goes into the finals on common seeds, at the model's rates, and the one-standard-error
       rule follows as for every strategy (`run_strategy`).
    """

    name = "racing"
    _fitted: tuple[dict[Trial, float], PlanModel] | None = None
    """The last model and what it was fitted to: finalists ask for it one by one."""

    def check(self, budget: TrialBudget) -> None:
        """Any budget that pays for the finals will do."""

    def explore(self, budget: TrialBudget) -> None:
        self._pool = pool = candidate_pool(budget.space, budget.scores, budget.rng)
        ends = list(dict.fromkeys([max(pool, key=sum), min(pool, key=sum)]))
        anchors = [trial for mask in ends for trial in budget.full_length(mask)]
        if not budget.pays_for(anchors):
            # Half of the grid at full length compares no rates; the whole of it in short runs does.
            anchors = [replace(trial, fidelity=budget.settings.fidelity) for trial in anchors]
        budget.train(anchors)
        if budget.space.count_upper() > len(pool):
            self._low_fidelity(budget)
        budget.train(self._proposals(budget, spread=True))
        while True:
            wanted = self._proposals(budget)
            if not wanted or len(budget.train(wanted)) < len(wanted):
                return

    def shortlist(self, budget: TrialBudget, n: int) -> list[Mask]:
        """The model's best plan, then the smallest that may be as good, then the rest of the frontier.

        Plans of the whole pool, tried or not: the finals try them.
        """
        model = self._model(budget)
        if model is None:
            return frontier(budget, n)
        mean, deviation, _ = self._at_best_lr(budget, model, self._pool)
        values = dict(zip(self._pool, mean.tolist(), strict=True))
        order = frontier(budget, len(self._pool), estimate=values)
        if budget.settings.objective == "accuracy":
            return order[:n]
        if not order:  # nothing that the model would train; what was tried may know better
            return frontier(budget, n)
        best = order[0]
        tolerance = model.noise / math.sqrt(budget.settings.seeds)
        sure = dict(zip(self._pool, deviation.tolist(), strict=True))
        plausible = [
            mask
            for _, mask in sorted(self._champions(self._pool, values).items())
            if sum(mask) < sum(best) and values[mask] + sure[mask] >= values[best] - tolerance
        ]
        return list(dict.fromkeys([best, *plausible, *order]))[:n]

    def rate(self, budget: TrialBudget, mask: Mask) -> float:
        """The plan's learning rate by the model, which knows what suits its relatives."""
        model = self._model(budget)
        if model is None:
            return budget.best_lr(mask)
        return self._at_best_lr(budget, model, [mask])[2][0]

    def _low_fidelity(self, budget: TrialBudget) -> None:
        price = budget.price([trial for mask in self._pool for trial in budget.low_fidelity(mask)])
        n_short = int(np.clip(0.5 * budget.left * len(self._pool) / price, 1, len(self._pool)))
        spread = spread_of_sizes(self._pool, n_short, budget.scores, budget.rng)
        budget.train([trial for mask in spread for trial in budget.low_fidelity(mask)])

    def _proposals(self, budget: TrialBudget, *, spread: bool = False) -> list[Trial]:
        """Untried full-length trials by what the model hopes of them: at a spread of sizes, or the next batch."""
        model = self._model(budget)
        if model is None:
            return []
        mean, deviation = self._predict(budget, model, self._pool)
        target = float(mean.max()) - model.noise / math.sqrt(budget.settings.seeds)
        upper = mean + deviation
        for row, mask in enumerate(self._pool):
            for column, lr in enumerate(budget.lrs):
                if Trial(mask=mask, lr=lr) in budget.history:
                    upper[row, column] = -math.inf
        hope = dict(zip(self._pool, upper.max(axis=1).tolist(), strict=True))
        rates = dict(zip(self._pool, upper.argmax(axis=1).tolist(), strict=True))
        open_masks = [mask for mask in self._pool if math.isfinite(hope[mask])]
        if not open_masks:
            return []
        champions = self._champions(open_masks, hope)
        if spread:
            chosen = [champions[size] for size in coarse_to_fine(sorted(champions))[:SPREAD]]
        elif budget.settings.objective == "accuracy":
            chosen = sorted(open_masks, key=lambda mask: -hope[mask])[:BATCH]
        else:
            hopeful = max(open_masks, key=lambda mask: (hope[mask], -sum(mask)))
            good_enough = [mask for _, mask in sorted(champions.items()) if hope[mask] >= target]
            chosen = list(dict.fromkeys([hopeful, *good_enough]))[:BATCH]
        return [Trial(mask=mask, lr=budget.lrs[rates[mask]]) for mask in chosen]

    def _model(self, budget: TrialBudget) -> PlanModel | None:
        known = {
            trial: outcome.ranked_accuracy
            for trial, outcome in budget.history.items()
            if outcome.validation_accuracy is not None and trial.is_plan
        }
        if len(known) < 2:
            return None
        if self._fitted is None or self._fitted[0] != known:
            model = PlanModel(budget.space.n_blocks, budget.lrs, budget.scores)
            self._fitted = known, model.fit(list(known), list(known.values()))
        return self._fitted[1]

    def _predict(
        self, budget: TrialBudget, model: PlanModel, masks: list[Mask]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation at full length, plan by rate; −inf where the plan cannot be trained.

        The model knows finite accuracies alone, and would go on hoping for a rate that fails; trainings diverge
        at large rates, so those above it fall with it, up to one that this plan was trained at.
        """
        mean, deviation = (
            values.reshape(len(masks), len(budget.lrs))
            for values in model.predict([trial for mask in masks for trial in budget.full_length(mask)])
        )
        for row, mask in enumerate(masks):
            if failed := budget.failed_rates(mask):
                trained = max((lr for lr in budget.full(mask) if lr not in failed), default=0.0)
                lost = [lr in failed or lr > max(min(failed), trained) for lr in budget.lrs]
                mean[row, lost] = -math.inf
        return mean, deviation

    def _at_best_lr(
        self, budget: TrialBudget, model: PlanModel, masks: list[Mask]
    ) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Mean, deviation and rate of each plan at the rate with the best mean."""
        mean, deviation = self._predict(budget, model, masks)
        chosen, rows = mean.argmax(axis=1), np.arange(len(masks))
        return mean[rows, chosen], deviation[rows, chosen], [budget.lrs[index] for index in chosen]

    @staticmethod
    def _champions(masks: list[Mask], value: dict[Mask, float]) -> dict[int, Mask]:
        champions: dict[int, Mask] = {}
        for mask in masks:
            size = sum(mask)
            if size not in champions or value[mask] > value[champions[size]]:
                champions[size] = mask
        return champions


class PlanModel:
    """Posterior over accuracy as a function of (mask, learning rate, fidelity).

    The prior is a sum of independent terms: number of trained blocks (saturating), single blocks, the given
    scores summed over trained blocks, learning rate and its interaction with size, the offset of low-fidelity runs
    by size, block and learning rate, and a residual per plan and rate that falls off with Hamming distance. The scales
    of blocks, scores, residual and noise are chosen by marginal likelihood on a small grid, so that scores
    count only as far as the trainings bear them out.

    Parameters
    ----------
    n_blocks : int
        Blocks of the backbone.
    lrs : Sequence[float]
        The grid.
    scores : Scores | None
        Name → (value, standard error) per block.

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
        # Low-fidelity runs are noisier.
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


def candidate_pool(space: Space, scores: Scores, rng: np.random.Generator) -> list[Mask]:
    """Every allowed plan when there are at most `POOL`; else families, score proposals and random plans."""
    if space.count_upper() <= POOL:
        return list(space.masks())
    pool = dict.fromkeys([*structured_masks(space, "prefix"), *structured_masks(space, "suffix")][:POOL])
    attempts = 0
    while len(pool) < POOL and attempts < 20 * POOL:
        attempts += 1
        if attempts % 3 == 0:
            pool.setdefault(space.random_mask(rng))
        else:
            size = int(rng.integers(1, space.n_blocks))
            order = order_by_scores(scores, space.n_blocks, rng)
            # With the order, so that constraints cost the blocks that the score wants least.
            pool.setdefault(space.repair(mask_of(order[:size], space.n_blocks), order))
    return list(pool)


def spread_of_sizes(pool: list[Mask], n: int, scores: Scores, rng: np.random.Generator) -> list[Mask]:
    """`n` plans of the pool: everything and nothing first, then sizes in turn, score proposals foremost."""
    by_size: dict[int, list[Mask]] = {}
    for mask in pool:
        by_size.setdefault(sum(mask), []).append(mask)
    n_blocks = len(pool[0])
    for size, masks in by_size.items():
        wished = [mask_of(order_by_scores(scores, n_blocks, rng)[:size], n_blocks) for _ in range(2)]
        rest = [masks[index] for index in rng.permutation(len(masks))]
        by_size[size] = [mask for mask in dict.fromkeys([*wished, *rest]) if mask in set(masks)]
    order = coarse_to_fine(sorted(by_size))
    chosen: list[Mask] = []
    depth = 0
    while len(chosen) < min(n, len(pool)):
        for size in order:
            if depth < len(by_size[size]):
                chosen.append(by_size[size][depth])
        depth += 1
    return chosen[:n]
