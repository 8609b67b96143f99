"""The interface that every strategy has, and the finals that all of them share."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from layerprobe.errors import BudgetError
from layerprobe.search.budget import TrialBudget
from layerprobe.search.space import Mask, Trial
from layerprobe.search.verdict import Finalist, pooled_stderr

MOST_FINALISTS = 6
"""For so many at most a part of the budget is held back."""


class Strategy(Protocol):
    """Spends a budget on trials; what it learnt lies in the budget's history afterwards."""

    name: str

    def check(self, budget: TrialBudget) -> None:
        """UsageError where the strategy cannot run within the budget."""
        ...

    def explore(self, budget: TrialBudget) -> None:
        """Train trials until the budget has nothing left or the strategy is done."""
        ...

    def shortlist(self, budget: TrialBudget, n: int) -> list[Mask]:
        """The `n` plans worth repeating, most wanted first."""
        ...

    def rate(self, budget: TrialBudget, mask: Mask) -> float:
        """The learning rate at which the plan should run in the finals; not one that failed, if there is another."""
        ...


def run_strategy(strategy: Strategy, budget: TrialBudget) -> list[Finalist]:
    """Explore, then repeat the shortlist on common seeds; returns the finalists.

    About half of the budget is held back for the finals, and never less than one plan's repeats.

    Raises
    ------
    BudgetError : the budget does not pay for one plan.
    """
    hold_back(budget)
    strategy.explore(budget)
    budget.held_back = 0.0
    # More than that: what cheap plans and runs already paid for leave of the budget pays for some of the rest.
    return finals(budget, strategy, strategy.shortlist(budget, 2 * MOST_FINALISTS))


def hold_back(budget: TrialBudget) -> None:
    """Put the finals' part of the budget aside; BudgetError as `check_budget`."""
    short, dearest = check_budget(budget)
    count = finalist_count(budget.total, short, dearest)
    budget.held_back = min(count * dearest, budget.total - short)


def check_budget(budget: TrialBudget) -> tuple[float, float]:
    """Price of one plan's low-fidelity runs, and of its full-length seeds; BudgetError when both do not fit."""
    everything, lr = budget.space.all, budget.middle_lr
    short = len(budget.lrs) * budget.space.cost(budget.low_fidelity(everything)[0])
    seeds = budget.settings.seeds * budget.space.cost(Trial(mask=everything, lr=lr))
    if budget.total < short + seeds - 1e-9:
        raise BudgetError(
            f"budget {budget.total:g} is too small: one plan needs {short + seeds:.3g} full trainings "
            f"({len(budget.lrs)} learning rates at {budget.settings.fidelity:g} of the steps, then "
            f"{budget.settings.seeds} seeds)"
        )
    return short, seeds


def finalist_count(total: float, short: float, price: float) -> int:
    """How many finalists half of the budget pays for, at most `MOST_FINALISTS`; two where it allows, else one.

    Without a second finalist the one-standard-error rule has nothing to compare.
    """
    least = 2 if total >= short + 2 * price else 1
    return int(np.clip(0.5 * total / price, least, MOST_FINALISTS))


def finals(budget: TrialBudget, strategy: Strategy, masks: list[Mask]) -> list[Finalist]:
    """Train each plan at its own learning rate, full length, on common seeds, while the budget lasts.

    A plan that cannot be paid on all seeds is left out; one whose first run fails goes on at its next best rate.
    What is left then buys further common seeds, up to twice as many, for the plans within two standard errors of
    the best. The others are returned as well, after them, with the seeds that they had.
    """
    seeds = budget.settings.seeds
    rates = _first_runs(budget, strategy, masks)
    entered: list[Mask] = []
    for mask, lr in rates.items():
        if budget.pays_for(wanted := budget.on_seeds(mask, lr)):
            budget.train(wanted)
            entered.append(mask)
    finalists = _read(budget, entered, rates, seeds)
    retired: list[Finalist] = []
    for repeat in range(seeds, budget.max_repeats or 2 * seeds):
        retired += [finalist for finalist in finalists if not math.isfinite(finalist.mean)]
        finalists = [finalist for finalist in finalists if math.isfinite(finalist.mean)]
        near = near_best(finalists)
        wanted = [Trial(mask=finalist.mask, lr=finalist.lr, repeat=repeat) for finalist in near]
        if len(near) < 2 or not budget.pays_for(wanted):
            break
        budget.train(wanted)
        retired += [finalist for finalist in finalists if finalist not in near]
        finalists = _read(budget, [finalist.mask for finalist in near], rates, repeat + 1)
    return [*finalists, *retired]


def near_best(finalists: list[Finalist]) -> list[Finalist]:
    """The finalists within two standard errors of the best."""
    best = max((finalist.mean for finalist in finalists), default=-math.inf)
    bar = best - 2 * pooled_stderr(finalists)
    return [finalist for finalist in finalists if finalist.mean >= bar]


def _first_runs(budget: TrialBudget, strategy: Strategy, masks: list[Mask]) -> dict[Mask, float]:
    """The finalists that can be paid, at rates at which their first full-length run is finite where there is one."""
    rates: dict[Mask, float] = {}
    bill = 0.0
    for mask in dict.fromkeys(masks):
        lr = strategy.rate(budget, mask)
        price = budget.price(budget.on_seeds(mask, lr))
        if bill + price <= budget.left + 1e-9:
            bill += price
            rates[mask] = lr
    waiting = dict(rates)
    for _ in budget.lrs:
        found = budget.train([Trial(mask=mask, lr=lr) for mask, lr in waiting.items()])
        failed = [trial.mask for trial, accuracy in found.items() if not math.isfinite(accuracy)]
        waiting = {mask: lr for mask in failed if (lr := strategy.rate(budget, mask)) != rates[mask]}
        rates |= waiting
        if not waiting:
            break
    return rates


def _read(budget: TrialBudget, masks: list[Mask], rates: dict[Mask, float], seeds: int) -> list[Finalist]:
    return [
        Finalist(
            mask,
            rates[mask],
            tuple(
                budget.accuracy(Trial(mask=mask, lr=rates[mask], repeat=repeat)) for repeat in range(seeds)
            ),
        )
        for mask in masks
    ]


def frontier(budget: TrialBudget, n: int, *, estimate: dict[Mask, float] | None = None) -> list[Mask]:
    """Shortlist for the finals.

    For 'accuracy': the best plans. For 'frugal': the best plan first, then for each smaller number of
    trained blocks the best plan of that size, nearest to the best accuracy first; plans that train more
    than the best one cannot be the frugal answer and come last.
    """
    values = estimate
    if values is None:
        values = {mask: budget.estimate(mask) for mask in budget.tried_masks()}
    params = budget.space.params
    ranked = sorted(
        (mask for mask in values if math.isfinite(values[mask])),
        key=lambda mask: (-values[mask], params(mask), mask),
    )
    if not ranked or budget.settings.objective == "accuracy":
        return ranked[:n]
    best = ranked[0]
    champions: dict[int, Mask] = {}
    for mask in ranked:
        if params(mask) < params(best):
            champions.setdefault(sum(mask), mask)
    smaller = sorted(champions.values(), key=lambda mask: (-values[mask], params(mask)))
    rest = [mask for mask in ranked if mask != best and mask not in smaller]
    return [best, *smaller, *rest][:n]


def coarse_to_fine(sizes: list[int]) -> list[int]:
    """The ends first, then middles of ever smaller gaps, so that any leading part is spread out.

    >>> coarse_to_fine([0, 1, 2, 3, 4])
    [4, 0, 2, 1, 3]
    """
    order = [sizes[-1], sizes[0]]
    gaps = [(0, len(sizes) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(sizes[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))
