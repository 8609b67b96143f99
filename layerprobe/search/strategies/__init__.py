"""Strategies by name. To add one: a class like `Strategy`, a line here, its name in `settings.STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from layerprobe.errors import UsageError
from layerprobe.search.budget import TrialBudget
from layerprobe.search.posterior import best_plan, candidate_masks
from layerprobe.search.settings import check_strategy
from layerprobe.search.space import Mask
from layerprobe.search.strategies.bayes import Bayes
from layerprobe.search.strategies.plain import TPE, Exhaustive, Greedy, RandomPlans


class Strategy(Protocol):
    """Spends a budget on trials; what it learnt lies in the budget's history afterwards."""

    name: str

    def check(self, budget: TrialBudget) -> None:
        """BudgetError or UsageError where the strategy cannot run within the budget."""
        ...

    def explore(self, budget: TrialBudget) -> None:
        """Train trials until the budget has nothing left or the strategy is done."""
        ...


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "bayes": Bayes,
    "exhaustive": Exhaustive,
    "greedy": Greedy,
    "random": RandomPlans,
    "tpe": TPE,
}


def make_strategy(name: str) -> Strategy:
    """The strategy called `name`; UnknownNameError lists them."""
    check_strategy(name)
    return STRATEGIES[name]()


def run_strategy(strategy: Strategy, budget: TrialBudget) -> tuple[Mask, float]:
    """Let a strategy explore; the plan that the posterior then answers with, and its learning rate.

    The same rule answers for every strategy. Nothing is trained anew to decide: repeating a shortlist on common
    seeds costs as much as the search and decides no better than all trainings together.

    Raises
    ------
    BudgetError
        The budget is too small for the strategy.
    UsageError
        All trainings failed.
    """
    strategy.check(budget)
    strategy.explore(budget)
    if not any(outcome.validation_accuracy is not None for outcome in budget.history.values()):
        reasons = [outcome.reason for outcome in budget.history.values() if outcome.reason]
        why = f"; the first of {len(reasons)} failures: {reasons[0]}" if reasons else ""
        raise UsageError(f"no training came through; smaller --lrs may help{why}")
    posterior = budget.posterior()
    masks = candidate_masks(budget.space, posterior, budget.rng)
    mask = best_plan(posterior, masks, budget.tolerance(posterior))
    return mask, posterior.best_rates([mask])[mask]


__all__ = ["STRATEGIES", "Strategy", "make_strategy", "run_strategy"]
