"""The small interface that every strategy has, and the finals that all of them share."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from layerprobe.errors import BudgetError
from layerprobe.search.bench import Bench, accuracy_of
from layerprobe.search.space import Mask, Trial
from layerprobe.search.verdict import Finalist, pooled_stderr

MOST_FINALISTS = 6
"""For so many at most a part of the budget is held back."""


class Strategy(Protocol):
    """Spends the bench's budget on trials; what it learnt lies in the bench afterwards."""

    name: str

    def explore(self, bench: Bench) -> None:
        """Value trials until the bench has nothing left or the strategy is done."""
        ...

    def shortlist(self, bench: Bench, n: int) -> list[Mask]:
        """The `n` plans worth repeating, most wanted first."""
        ...

    def rate(self, bench: Bench, mask: Mask) -> float:
        """The learning rate at which the plan should run in the finals; not one that failed, if there is another."""
        ...


def run_strategy(strategy: Strategy, bench: Bench) -> list[Finalist]:
    """Explore, then repeat the shortlist on common seeds; returns the finalists.

    About half of the budget is held back for the finals, and never less than one plan's repeats.

    Raises
    ------
    BudgetError : the budget does not pay for one plan.
    """
    hold_back(bench)
    strategy.explore(bench)
    bench.held_back = 0.0
    # More than that: what cheap plans and runs already paid for leave of the budget pays for some of the rest.
    return finals(bench, strategy, strategy.shortlist(bench, 2 * MOST_FINALISTS))


def hold_back(bench: Bench) -> None:
    """Put the finals' part of the budget aside; BudgetError as `check_budget`."""
    rung, dearest = check_budget(bench)
    count = finalist_count(bench.budget, rung, dearest)
    bench.held_back = min(count * dearest, bench.budget - rung)


def check_budget(bench: Bench) -> tuple[float, float]:
    """Price of one plan's short rung, and of its full-length seeds; BudgetError when both do not fit."""
    rung = len(bench.lrs) * bench.space.cost(Trial(bench.space.all, bench.middle_lr, 0, bench.fidelity))
    seeds = bench.seeds * bench.space.cost(Trial(bench.space.all, bench.middle_lr))
    if bench.budget < rung + seeds - 1e-9:
        raise BudgetError(
            f"budget {bench.budget:g} is too small: one plan needs {rung + seeds:.3g} full trainings "
            f"({len(bench.lrs)} learning rates at {bench.fidelity:g} of the steps, then {bench.seeds} seeds)"
        )
    return rung, seeds


def finalist_count(budget: float, rung: float, price: float) -> int:
    """How many finalists half of the budget pays for, at most `MOST_FINALISTS`; two where it allows, else one.

    Without a second finalist the one-standard-error rule has nothing to compare.
    """
    least = 2 if budget >= rung + 2 * price else 1
    return int(np.clip(0.5 * budget / price, least, MOST_FINALISTS))


def finals(bench: Bench, strategy: Strategy, masks: list[Mask]) -> list[Finalist]:
    """Value each plan at its own learning rate, full length, on common seeds, while the budget lasts.

    A plan that cannot be paid on all seeds is left out; one whose first run fails goes on at its next best rate.
    What is left then buys further common seeds, up to twice as many, for the contenders: the plans within two
    standard errors of the best. The others are returned as well, after them, with the seeds that they had.
    """
    rates = _opened(bench, strategy, masks)
    entered: list[Mask] = []
    for mask, lr in rates.items():
        wanted = [Trial(mask, lr, repeat) for repeat in range(bench.seeds)]
        if bench.price(wanted) <= bench.left + 1e-9:
            bench.value(wanted)
            entered.append(mask)
    finalists = _read(bench, entered, rates, bench.seeds)
    retired: list[Finalist] = []
    for repeat in range(bench.seeds, bench.max_repeats or 2 * bench.seeds):
        retired += [finalist for finalist in finalists if not math.isfinite(finalist.mean)]
        finalists = [finalist for finalist in finalists if math.isfinite(finalist.mean)]
        best = max((finalist.mean for finalist in finalists), default=-math.inf)
        bar = best - 2 * pooled_stderr(finalists)
        entered = [finalist.mask for finalist in finalists if finalist.mean >= bar]
        wanted = [Trial(mask, rates[mask], repeat) for mask in entered]
        if len(entered) < 2 or bench.price(wanted) > bench.left + 1e-9:
            break
        bench.value(wanted)
        retired += [finalist for finalist in finalists if finalist.mask not in entered]
        finalists = _read(bench, entered, rates, repeat + 1)
    return [*finalists, *retired]


def _opened(bench: Bench, strategy: Strategy, masks: list[Mask]) -> dict[Mask, float]:
    """The finalists that can be paid, at rates at which their first full-length run is finite where there is one."""
    rates: dict[Mask, float] = {}
    bill = 0.0
    for mask in dict.fromkeys(masks):
        lr = strategy.rate(bench, mask)
        price = bench.price([Trial(mask, lr, repeat) for repeat in range(bench.seeds)])
        if bill + price <= bench.left + 1e-9:
            bill += price
            rates[mask] = lr
    waiting = dict(rates)
    for _ in bench.lrs:
        found = bench.value([Trial(mask, lr) for mask, lr in waiting.items()])
        failed = [trial.mask for trial, accuracy in found.items() if not math.isfinite(accuracy)]
        waiting = {mask: lr for mask in failed if (lr := strategy.rate(bench, mask)) != rates[mask]}
        rates |= waiting
        if not waiting:
            break
    return rates


def _read(bench: Bench, masks: list[Mask], rates: dict[Mask, float], seeds: int) -> list[Finalist]:
    return [
        Finalist(
            mask,
            rates[mask],
            tuple(accuracy_of(bench.history[Trial(mask, rates[mask], repeat)]) for repeat in range(seeds)),
        )
        for mask in masks
    ]


def frontier(bench: Bench, n: int, *, estimate: dict[Mask, float] | None = None) -> list[Mask]:
    """Shortlist for the finals.

    For 'accuracy': the best plans. For 'frugal': the best plan first, then for each smaller number of
    trained blocks the best plan of that size, nearest to the best accuracy first; plans that train more
    than the best one cannot be the frugal answer and come last.
    """
    values = (
        estimate if estimate is not None else {mask: bench.estimate(mask) for mask in bench.valued_masks()}
    )
    ranked = sorted(
        (mask for mask in values if math.isfinite(values[mask])),
        key=lambda mask: (-values[mask], bench.space.params(mask), mask),
    )
    if not ranked:
        return []
    if bench.objective == "accuracy":
        return ranked[:n]
    best = ranked[0]
    champions: dict[int, Mask] = {}
    for mask in ranked:
        if bench.space.params(mask) < bench.space.params(best):
            champions.setdefault(sum(mask), mask)
    smaller = sorted(champions.values(), key=lambda mask: (-values[mask], bench.space.params(mask)))
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
