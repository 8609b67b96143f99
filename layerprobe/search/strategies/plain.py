"""Strategies without a model of the plans: every plan, simple families, random, greedy, optuna's samplers."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

from layerprobe.errors import BudgetError, UsageError
from layerprobe.search.budget import TrialBudget
from layerprobe.search.space import Mask, Trial, structured_masks
from layerprobe.search.strategies.base import MOST_FINALISTS, check_budget, coarse_to_fine, frontier

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

BATCH = 8
"""Trials that a sampler is asked for at once, so that several workers have something to do; part of the search's
definition."""

PATIENCE = 30
"""Batches in a row without anything new after which a sampler is taken to have converged."""


class WithoutModel:
    """Shortlist and rates of a strategy that does not model plans jointly."""

    def check(self, budget: TrialBudget) -> None:
        """Any budget that pays for the finals will do."""

    def shortlist(self, budget: TrialBudget, n: int) -> list[Mask]:
        """The frontier of accuracy against size (see `frontier`)."""
        return frontier(budget, n)

    def rate(self, budget: TrialBudget, mask: Mask) -> float:
        """The best of the rates that were tried."""
        return budget.best_lr(mask)


class Exhaustive(WithoutModel):
    """Every allowed plan at every learning rate, full length, one seed; then the finals.

    Raises BudgetError when the budget does not cover that.
    """

    name = "exhaustive"

    def explore(self, budget: TrialBudget) -> None:
        self.check(budget)
        budget.train(self._trials(budget))

    def _trials(self, budget: TrialBudget) -> list[Trial]:
        return [trial for mask in budget.space.masks() for trial in budget.full_length(mask)]

    def check(self, budget: TrialBudget) -> None:
        if budget.space.count_upper() > 1 << 16:
            raise UsageError(
                f"exhaustive search over 2^{len(budget.space.free)} plans is out of reach; "
                "use --strategy racing, or fix blocks with must-freeze and must-train"
            )
        trials = self._trials(budget)
        if not budget.pays_for(trials):
            _, finalist = check_budget(budget)
            raise BudgetError(
                f"exhaustive search needs {budget.price(trials) + MOST_FINALISTS * finalist:.4g} full trainings, "
                f"the budget is {budget.total:g}; use --strategy racing or a larger --budget"
            )


class Family(WithoutModel):
    """Plans of one simple family (prefix, suffix or contiguous), each at every learning rate.

    Its plans get low-fidelity runs where the budget does not pay for full length; on deep backbones a
    spread of its sizes, as far as the budget goes.
    """

    def __init__(self, family: str) -> None:
        self.name = family

    def explore(self, budget: TrialBudget) -> None:
        masks = structured_masks(budget.space, self.name)
        full = [trial for mask in masks for trial in budget.full_length(mask)]
        if budget.pays_for(full):
            budget.train(full)
            return
        sizes = {sum(mask): [other for other in masks if sum(other) == sum(mask)] for mask in masks}
        spread = [mask for size in coarse_to_fine(sorted(sizes)) for mask in sizes[size]]
        budget.train([trial for mask in spread for trial in budget.low_fidelity(mask)])


class RandomPlans(WithoutModel):
    """Random plans (uniform number of trained blocks), each at every learning rate, full length."""

    name = "random"

    def explore(self, budget: TrialBudget) -> None:
        idle = 0
        while idle < 50:
            mask = budget.space.random_mask(budget.rng)
            trials = budget.full_length(mask)
            if budget.price(trials) == 0:
                idle += 1
                continue
            idle = 0
            if len(budget.train(trials)) < len(trials):
                return


class Greedy(WithoutModel):
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
        start = budget.train(budget.full_length(mask))
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
            trials = [Trial(mask=step, lr=rate) for step in steps for rate in rates]
            found = budget.train(trials)
            if not found:
                return
            winner = max(found, key=lambda trial: found[trial])
            if found[winner] <= best or not math.isfinite(found[winner]):
                return
            mask, lr, best = winner.mask, winner.lr, found[winner]
            if len(found) < len(trials):
                return


class Sampler(WithoutModel):
    """An optuna sampler, asked and told in an in-memory study.

    The samplers repeat plans; a repeated plan is answered from the history and costs nothing.
    """

    directions: ClassVar[tuple[Literal["minimize", "maximize"], ...]]
    """Of accuracy, then of trainable parameters; what is left out is not told."""

    def sampler(self, seed: int) -> BaseSampler:
        """The optuna sampler that proposes."""
        raise NotImplementedError

    def explore(self, budget: TrialBudget) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                directions=self.directions, sampler=self.sampler(budget.settings.seed)
            )
        idle = 0
        while idle < PATIENCE:
            asked = []
            for _ in range(BATCH):
                proposal = study.ask()
                wanted = tuple(
                    bool(proposal.suggest_categorical(f"block_{index}", [False, True]))
                    for index in range(budget.space.n_blocks)
                )
                lr = proposal.suggest_categorical("lr", list(budget.lrs))
                if not budget.space.allows(wanted):
                    # In a random order: always from one end would keep plans of that end out.
                    order = budget.rng.permutation(budget.space.n_blocks).tolist()
                    wanted = budget.space.repair(wanted, order)
                asked.append((proposal, Trial(mask=wanted, lr=lr)))
            price = budget.price([trial for _, trial in asked])
            found = budget.train([trial for _, trial in asked])
            for proposal, trial in asked:
                if trial in found and math.isfinite(found[trial]):
                    values = (found[trial], float(budget.space.params(trial.mask)))
                    study.tell(proposal, values[: len(self.directions)])
                else:
                    study.tell(proposal, state=optuna.trial.TrialState.FAIL)
            if any(trial not in found for _, trial in asked):
                return
            idle = idle + 1 if price == 0 else 0


class TPE(Sampler):
    """Tree-structured Parzen estimator over blocks and learning rate (optuna)."""

    name = "tpe"
    directions = ("maximize",)

    def sampler(self, seed: int) -> BaseSampler:
        import optuna

        # The constant liar keeps a batch from asking for the same plan eight times.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=BATCH)


class NSGA2(Sampler):
    """NSGA-II on accuracy (up) and trainable parameters (down) (optuna)."""

    name = "nsga2"
    directions = ("maximize", "minimize")

    def sampler(self, seed: int) -> BaseSampler:
        import optuna

        return optuna.samplers.NSGAIISampler(seed=seed, population_size=2 * BATCH)
