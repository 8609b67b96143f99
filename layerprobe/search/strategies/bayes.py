"""Bayesian optimisation of the plan: a screening design, then pairs of likely winners, until the answer is settled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from layerprobe.errors import BudgetError
from layerprobe.search.budget import TrialBudget
from layerprobe.search.posterior import Comparison, candidate_masks
from layerprobe.search.space import Mask, Trial

REFERENCE_SEEDS = 3
"""Common seeds on which all and none are trained first: their spread is the first estimate of the noise."""
PAIRS = 2
"""Pairs of contenders that are trained at once, so that several workers have something to do."""
SETTLED = 0.9
"""The search stops when, with this probability, no plan is better than the best by the margin."""
REDRAWS = 50


class Bayes:
    """A fold-over design, then top-two Thompson sampling on a Gaussian process over plans.

    The design trains all blocks and none, then random halves of the blocks, each with its complement on one seed,
    with the learning rates in turn. From then on pairs of contenders, each drawn from the probability of being
    best, are trained on common seeds. It stops when no plan is likely to be better than the best by
    `settings.margin`, or when the budget is spent; the posterior gives the answer.

    References
    ----------
    Russo, Simple Bayesian algorithms for best-arm identification, Operations Research 68 (2020).
    """

    name = "bayes"

    def check(self, budget: TrialBudget) -> None:
        """BudgetError where all and none cannot be trained at every rate."""
        least = budget.price([budget.trial(*one) for one in _ends(budget)][: 2 * len(budget.lrs)])
        if budget.total < least - 1e-9:
            raise BudgetError(
                f"budget {budget.total:g} is too small: training all blocks and none at {len(budget.lrs)} learning "
                f"rates takes {least:.3g} full trainings"
            )

    def explore(self, budget: TrialBudget) -> None:
        """Train until the answer is settled or nothing more can be paid."""
        wanted = [budget.trial(*one) for one in (*_ends(budget), *_halves(budget))]
        if len(budget.train(wanted)) < len(wanted):
            return
        idle = 0
        while idle < REDRAWS:
            posterior = budget.posterior()
            masks = candidate_masks(budget.space, posterior, budget.rng)
            comparison = Comparison(posterior, masks, budget.rng)
            if len(masks) < 2 or comparison.settled(budget.settings.margin) > SETTLED:
                return
            batch = list(dict.fromkeys(trial for _ in range(PAIRS) for trial in _pair(comparison, budget)))
            if budget.price(batch) == 0:
                idle += 1
                continue
            if len(budget.train(batch)) < len(batch):
                return


def _ends(budget: TrialBudget) -> list[tuple[Mask, float, int]]:
    """(plan, rate, seed) of the references: all and none at every rate, and at the middle one on more seeds."""
    rates = [(lr, 0) for lr in budget.lrs]
    seeds = [(budget.middle_lr, seed) for seed in range(1, min(REFERENCE_SEEDS, budget.n_seeds))]
    return [
        (mask, lr, seed) for lr, seed in (*rates, *seeds) for mask in (budget.space.all, budget.space.none)
    ]


def _halves(budget: TrialBudget) -> Iterator[tuple[Mask, float, int]]:
    """Random halves of the blocks, each with its complement on one seed, chosen to tell the blocks apart.

    As many plans as there are blocks, within half of the budget.
    """
    space, rng = budget.space, budget.rng
    n = space.n_blocks
    rates = itertools.cycle(rng.permutation(len(budget.lrs)))
    seen = {space.all, space.none}
    rows = [np.ones(n + 1), np.r_[1.0, -np.ones(n)]]
    n_pairs = min((n + 1) // 2, int(budget.total / 4))
    for seed in range(n_pairs):
        best: tuple[float, Mask] | None = None
        for _ in range(40):
            half = np.zeros(n, dtype=bool)
            half[rng.permutation(n)[: n // 2 + (n % 2) * int(rng.integers(2))]] = True
            mask = space.repair(tuple(map(bool, half)))
            if mask in seen:
                continue
            design = np.array([*rows, np.r_[1.0, np.where(mask, 1.0, -1.0)]])
            spread = float(np.linalg.slogdet(design.T @ design + 0.1 * np.eye(n + 1))[1])
            if best is None or spread > best[0]:
                best = spread, mask
        if best is None:
            return
        other = space.repair(tuple(not trained for trained in best[1]))
        for mask in (best[1], other):
            if mask not in seen:
                seen.add(mask)
                rows.append(np.r_[1.0, np.where(mask, 1.0, -1.0)])
                yield mask, budget.lrs[int(next(rates))], seed % min(REFERENCE_SEEDS, budget.n_seeds)


def _pair(comparison: Comparison, budget: TrialBudget) -> list[Trial]:
    """Two draws from the probability of being the best plan, on the first common seed that is new for either."""
    first = comparison.contender()
    for _ in range(REDRAWS):
        second = comparison.contender()
        if second.mask != first.mask:
            break
    seeds = budget.rng.permutation(budget.n_seeds).tolist()
    for seed in seeds:
        pair = [budget.trial(one.mask, one.lr, seed) for one in (first, second)]
        fresh = [trial for trial in pair if trial not in budget.history]
        if fresh:
            return fresh
    return []
