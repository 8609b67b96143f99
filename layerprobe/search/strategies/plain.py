"""Strategies that explore without a model of the plans: every plan, random plans, greedy, optuna's TPE."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from layerprobe.errors import BudgetError, UsageError
from layerprobe.search.budget import TrialBudget
from layerprobe.search.space import Trial

if TYPE_CHECKING:
    import optuna

BATCH = 8
"""Trials that TPE is asked for at once, so that several workers have something to do; part of the search's
definition."""

PATIENCE = 30
"""Batches in a row without anything new after which TPE is taken to have converged."""


class Exhaustive:
    """Every allowed plan at every learning rate, on one seed.

    Raises BudgetError when the budget does not cover that.
    """

    name = "exhaustive"

    def explore(self, budget: TrialBudget) -> None:
        budget.train(self._trials(budget))

    def _trials(self, budget: TrialBudget) -> list[Trial]:
        return [trial for mask in budget.space.masks() for trial in budget.at_every_rate(mask)]

    def check(self, budget: TrialBudget) -> None:
        if budget.space.count_upper() > 1 << 16:
            raise UsageError(
                f"exhaustive search over 2^{len(budget.space.free)} plans is out of reach; "
                "use --strategy bayes, or fix blocks with must-freeze and must-train"
            )
        trials = self._trials(budget)
        if not budget.pays_for(trials):
            raise BudgetError(
                f"exhaustive search needs {budget.price(trials):.4g} full trainings, "
                f"the budget is {budget.total:g}; use --strategy bayes or a larger --budget"
            )


class OnePlan:
    """What any budget must pay for: one plan at every rate."""

    def check(self, budget: TrialBudget) -> None:
        """BudgetError where it does not."""
        least = budget.price(budget.at_every_rate(budget.space.repair(budget.space.none)))
        if budget.total < least - 1e-9:
            raise BudgetError(
                f"budget {budget.total:g} is too small: one plan at {len(budget.lrs)} learning rates takes "
                f"{least:.3g} full trainings"
            )


class RandomPlans(OnePlan):
    """Random plans (uniform number of trained blocks), each at every learning rate, full length."""

    name = "random"

    def explore(self, budget: TrialBudget) -> None:
        idle = 0
        while idle < 50:
            mask = budget.space.random_mask(budget.rng)
            trials = budget.at_every_rate(mask)
            if budget.price(trials) == 0:
                idle += 1
                continue
            idle = 0
            if len(budget.train(trials)) < len(trials):
                return


class Greedy(OnePlan):
    """Greedy forward selection of blocks (SubTuning): from no block, add the block that helps most.

    The learning rate is chosen once, for the first step's plans; each later step trains every remaining
    block at full length on one seed and stops when none helps.

    References
    ----------
    Kaplun, Gurevich, Swisa, David, Shalev-Shwartz, Malach, Less is More: Selective Layer Finetuning with
    SubTuning, 2023, arXiv 2302.06354, Algorithm 1.
    """

    name = "greedy"

    def explore(self, budget: TrialBudget) -> None:
        mask = budget.space.repair(budget.space.none)
        start = budget.train(budget.at_every_rate(mask))
        if not start:
            return
        lr, best = budget.best_lr(mask), max(start.values())
        while True:
            steps = [
                bigger
                for index in budget.space.free
                if not mask[index]
                and budget.space.allows(bigger := (*mask[:index], True, *mask[index + 1 :]))
            ]
            if not steps:
                return
            rates = budget.lrs if not any(mask) else (lr,)
            trials = [budget.trial(step, rate) for step in steps for rate in rates]
            found = budget.train(trials)
            if not found:
                return
            winner = max(found, key=lambda trial: found[trial])
            if found[winner] <= best or not math.isfinite(found[winner]):
                return
            mask, lr, best = winner.mask, winner.lr, found[winner]
            if len(found) < len(trials):
                return


class TPE(OnePlan):
    """Tree-structured Parzen estimator over units and learning rate (optuna), asked and told in memory.

    It repeats plans; a repeated plan is answered from the history and costs nothing.
    """

    name = "tpe"

    def explore(self, budget: TrialBudget) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # The constant liar keeps a batch from asking for the same plan eight times.
            sampler = optuna.samplers.TPESampler(
                seed=budget.settings.seed, constant_liar=True, n_startup_trials=BATCH
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
        idle = 0
        while idle < PATIENCE:
            asked = [(proposal, self._trial(proposal, budget)) for proposal in map(study.ask, [None] * BATCH)]
            price = budget.price([trial for _, trial in asked])
            found = budget.train([trial for _, trial in asked])
            for proposal, trial in asked:
                if trial in found and math.isfinite(found[trial]):
                    study.tell(proposal, found[trial])
                else:
                    study.tell(proposal, state=optuna.trial.TrialState.FAIL)
            if any(trial not in found for _, trial in asked):
                return
            idle = idle + 1 if price == 0 else 0

    def _trial(self, proposal: optuna.Trial, budget: TrialBudget) -> Trial:
        wanted = tuple(
            bool(proposal.suggest_categorical(f"unit_{index}", [False, True]))
            for index in range(budget.space.n_units)
        )
        lr = proposal.suggest_categorical("lr", list(budget.lrs))
        if not budget.space.allows(wanted):
            # In a random order: always from one end would keep plans of that end out.
            order = budget.rng.permutation(budget.space.n_units).tolist()
            wanted = budget.space.repair(wanted, order)
        return budget.trial(wanted, lr)
