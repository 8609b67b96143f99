"""Strategies without a model: every plan, simple families, random plans, greedy forward selection."""

from __future__ import annotations

import math

from layerprobe.errors import BudgetError, UsageError
from layerprobe.search.bench import Bench
from layerprobe.search.space import Mask, Trial, structured_masks
from layerprobe.search.strategies.base import MOST_FINALISTS, check_budget, coarse_to_fine, frontier


class WithoutModel:
    """Shortlist and rates of a strategy that does not model plans jointly."""

    def shortlist(self, bench: Bench, n: int) -> list[Mask]:
        """The frontier of accuracy against size (see `frontier`)."""
        return frontier(bench, n)

    def rate(self, bench: Bench, mask: Mask) -> float:
        """The best of the rates that were tried."""
        return bench.best_lr(mask)


class Exhaustive(WithoutModel):
    """Every allowed plan at every learning rate, full length, one seed; then the finals.

    Raises BudgetError when the budget does not cover that.
    """

    name = "exhaustive"

    def explore(self, bench: Bench) -> None:
        bench.value(self.trials(bench))

    @staticmethod
    def trials(bench: Bench) -> list[Trial]:
        """All that it trains before the finals; an error where that is out of reach or budget."""
        if bench.space.count_upper() > 1 << 16:
            raise UsageError(
                f"exhaustive search over 2^{len(bench.space.free)} plans is out of reach; "
                "use --strategy racing, or fix blocks with must-freeze and must-train"
            )
        trials = [Trial(mask, lr) for mask in bench.space.masks() for lr in bench.lrs]
        if bench.price(trials) > bench.left + 1e-9:
            _, finalist = check_budget(bench)
            raise BudgetError(
                f"exhaustive search needs {bench.price(trials) + MOST_FINALISTS * finalist:.4g} full trainings, "
                f"the budget is {bench.budget:g}; use --strategy racing or a larger --budget"
            )
        return trials


class Family(WithoutModel):
    """Plans of one simple family (prefix, suffix or contiguous), each at every learning rate.

    The family is valued on the short rung first where the budget does not pay for full length; on deep backbones a
    spread of its sizes, as far as the budget goes.
    """

    def __init__(self, family: str) -> None:
        self.name = family

    def explore(self, bench: Bench) -> None:
        masks = structured_masks(bench.space, self.name)
        full = [Trial(mask, lr) for mask in masks for lr in bench.lrs]
        if bench.price(full) <= bench.left + 1e-9:
            bench.value(full)
            return
        sizes = {sum(mask): [other for other in masks if sum(other) == sum(mask)] for mask in masks}
        spread = [mask for size in coarse_to_fine(sorted(sizes)) for mask in sizes[size]]
        bench.value([Trial(mask, lr, 0, bench.fidelity) for mask in spread for lr in bench.lrs])


class RandomPlans(WithoutModel):
    """Random plans (uniform number of trained blocks), each at every learning rate, full length."""

    name = "random"

    def explore(self, bench: Bench) -> None:
        idle = 0
        while idle < 50:
            mask = bench.space.random_mask(bench.rng)
            trials = [Trial(mask, lr) for lr in bench.lrs]
            if bench.price(trials) == 0:
                idle += 1
                continue
            idle = 0
            if len(bench.value(trials)) < len(trials):
                return


class Greedy(WithoutModel):
    """Greedy forward selection of blocks (SubTuning): from no block, add the block that helps most.

    The learning rate is chosen once, for the first step's plans; each later step values every remaining
    block at full length on one seed and stops when none helps.

    References
    ----------
    Kaplun, Gurevich, Swisa, David, Shalev-Shwartz, Malach, Less is More: Selective Layer Finetuning with
    SubTuning, 2023, arXiv 2302.06354, Algorithm 1.
    """

    name = "greedy"

    def explore(self, bench: Bench) -> None:
        mask = bench.space.repair(bench.space.none)
        start = bench.value([Trial(mask, lr) for lr in bench.lrs])
        if not start:
            return
        lr, best = bench.best_lr(mask), max(start.values())
        while True:
            steps = [
                bigger
                for index in bench.space.free
                if not mask[index] and bench.space.allows(bigger := (*mask[:index], True, *mask[index + 1 :]))
            ]
            if not steps:
                return
            rates = bench.lrs if not any(mask) else (lr,)
            trials = [Trial(step, rate) for step in steps for rate in rates]
            found = bench.value(trials)
            if not found:
                return
            winner = max(found, key=lambda trial: found[trial])
            if found[winner] <= best or not math.isfinite(found[winner]):
                return
            mask, lr, best = winner.mask, winner.lr, found[winner]
            if len(found) < len(trials):
                return
