"""What a strategy sees of a search: trials for a price, a budget, and every answer so far.

Answers come from a store where they exist, so running a strategy again replays it: the same seed and the
same answers lead to the same trials, whoever trained them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from layerprobe.search.posterior import Posterior
from layerprobe.search.space import Mask, Space, Trial

if TYPE_CHECKING:
    from layerprobe.search.settings import Settings
    from layerprobe.training.outcome import Outcome

Scores = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Score name → (value, standard error) per block."""

TrainBatch = Callable[[Sequence[Trial]], "Mapping[Trial, Outcome]"]
"""Answers to a batch of trials, found in whatever order and by however many workers."""


@dataclass(kw_only=True)
class TrialBudget:
    """Trials within a budget.

    Attributes
    ----------
    space : Space
        The plans.
    settings : Settings
        Learning rates, seeds and objective.
    total : float
        What may be spent, in full trainings.
    spent : float
        Of it.
    length : float
        Of every training, as a share of the steps in `settings`; the pilot finds it.
    lrs : tuple[float, ...]
        The grid of learning rates; default that of `settings`.
    n_seeds : int
        Common seeds that there are.
    scores : Scores
        per-block proposals; may be empty.
    watch : Callable[[TrialBudget], None] | None
        Called after every batch that was trained.
    history : dict[Trial, Outcome]
        Every trial that was asked for, with its outcome.
    """

    space: Space
    train_batch: TrainBatch
    settings: Settings
    total: float
    length: float = 1.0
    lrs: tuple[float, ...] = ()
    n_seeds: int = 12
    scores: Scores = field(default_factory=dict)
    watch: Callable[[TrialBudget], None] | None = None
    spent: float = 0.0
    history: dict[Trial, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lrs = self.lrs or self.settings.lrs
        self.rng = np.random.default_rng(self.settings.seed)

    @property
    def left(self) -> float:
        """What may still be spent, in full trainings."""
        return self.total - self.spent

    @property
    def middle_lr(self) -> float:
        return self.lrs[len(self.lrs) // 2]

    def trial(self, mask: Mask, lr: float, repeat: int = 0) -> Trial:
        """A full-length training of a plan."""
        return Trial(mask=mask, lr=lr, repeat=repeat, fidelity=self.length)

    def at_every_rate(self, mask: Mask) -> list[Trial]:
        """Trainings of a plan at every learning rate, on the first seed."""
        return [self.trial(mask, lr) for lr in self.lrs]

    def posterior(self) -> Posterior:
        """What the history says about every plan; there is at least one training of a plan in it."""
        known = [trial for trial in self.history if trial.is_plan]
        accuracies = [self.accuracy(trial) for trial in known]
        return Posterior(space=self.space, lrs=self.lrs, trials=known, accuracies=accuracies)

    def tolerance(self, posterior: Posterior) -> float:
        """Accuracy that fewer trained parameters may cost: nothing where the objective is accuracy, else one standard
        error of a mean over the report's seeds, or half of the margin that ends the search, whichever is larger."""
        if self.settings.objective == "accuracy":
            return 0.0
        return max(posterior.noise / math.sqrt(self.settings.seeds), self.settings.margin / 2)

    def price(self, trials: Sequence[Trial]) -> float:
        """What `trials` would add to the bill; those with an answer are free."""
        return sum(self.space.cost(trial) for trial in dict.fromkeys(trials) if trial not in self.history)

    def pays_for(self, trials: Sequence[Trial]) -> bool:
        return self.price(trials) <= self.left + 1e-9

    def train(self, trials: Sequence[Trial]) -> dict[Trial, float]:
        """Validation accuracies of the leading trials that the budget still pays for.

        A failed run counts as −inf. An empty dict means that nothing more can be paid.
        """
        affordable: list[Trial] = []
        bill = 0.0
        for trial in dict.fromkeys(trials):
            cost = self.price([trial])
            if bill + cost > self.left + 1e-9:
                break
            bill += cost
            affordable.append(trial)
        fresh = [trial for trial in affordable if trial not in self.history]
        if fresh:
            answers = self.train_batch(fresh)
            self.history |= {trial: answers[trial] for trial in fresh}
            self.spent += bill
            if self.watch is not None:
                self.watch(self)
        return {trial: self.accuracy(trial) for trial in affordable}

    def accuracy(self, trial: Trial) -> float:
        """Validation accuracy of a trial in the history, −inf for a failed run."""
        return self.history[trial].ranked_accuracy

    def runs(self, mask: Mask) -> Iterator[Trial]:
        """Trials of a plan in the history."""
        return (trial for trial in self.history if trial.mask == mask and trial.is_plan)

    def by_rate(self, mask: Mask) -> dict[float, list[float]]:
        """Learning rate → accuracies of a plan, one per seed."""
        found: dict[float, list[float]] = {}
        for trial in self.runs(mask):
            found.setdefault(trial.lr, []).append(self.accuracy(trial))
        return found

    def best_lr(self, mask: Mask) -> float:
        """The rate of largest mean accuracy among those tried, ties to the smaller; the middle one if none was."""
        found = self.by_rate(mask)
        return max(sorted(found), key=lambda lr: np.mean(found[lr]), default=self.middle_lr)

    def tried_masks(self) -> list[Mask]:
        """Allowed plans with at least one trial, in the order in which they came."""
        seen = dict.fromkeys(trial.mask for trial in self.history if trial.is_plan)
        return [mask for mask in seen if self.space.allows(mask)]

    def estimate(self, mask: Mask) -> float:
        """The plan's mean accuracy over seeds at its best rate; −inf where it failed or was not trained."""
        found = self.by_rate(mask)
        return float(np.mean(found[self.best_lr(mask)])) if found else -math.inf
