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

from layerprobe.errors import UsageError
from layerprobe.search.space import Mask, Space, Trial

if TYPE_CHECKING:
    from layerprobe.search.settings import Settings
    from layerprobe.training.finetune import Outcome

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
        Learning rates, common seeds, lengths and objective.
    total : float
        What may be spent, in full trainings.
    spent, held_back : float
        Of it; the latter is kept for the finals.
    scores : Scores
        per-block proposals; may be empty.
    max_repeats : int | None
        How many common seeds there are at most; default twice `settings.seeds`.
    watch : Callable[[TrialBudget], None] | None
        Called after every batch that was trained.
    history : dict[Trial, Outcome]
        Every trial that was asked for, with its outcome.
    """

    space: Space
    train_batch: TrainBatch
    settings: Settings
    total: float
    scores: Scores = field(default_factory=dict)
    max_repeats: int | None = None
    watch: Callable[[TrialBudget], None] | None = None
    spent: float = 0.0
    held_back: float = 0.0
    history: dict[Trial, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seeds = self.settings.seeds
        if seeds < 2:
            raise UsageError(f"finalists need at least 2 common seeds for a standard error, got {seeds}")
        self.lrs = self.settings.lrs
        self.rng = np.random.default_rng(self.settings.seed)

    @property
    def left(self) -> float:
        """What may still be spent before the finals, in full trainings."""
        return self.total - self.held_back - self.spent

    @property
    def middle_lr(self) -> float:
        return self.lrs[len(self.lrs) // 2]

    def low_fidelity(self, mask: Mask) -> list[Trial]:
        """Short runs of a plan at every learning rate."""
        return [Trial(mask=mask, lr=lr, fidelity=self.settings.fidelity) for lr in self.lrs]

    def full_length(self, mask: Mask) -> list[Trial]:
        """Full-length runs of a plan at every learning rate, on the first seed."""
        return [Trial(mask=mask, lr=lr) for lr in self.lrs]

    def on_seeds(self, mask: Mask, lr: float) -> list[Trial]:
        """Full-length runs of a plan at one learning rate on the common seeds."""
        return [Trial(mask=mask, lr=lr, repeat=repeat) for repeat in range(self.settings.seeds)]

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

    def best(self, trials: Sequence[Trial]) -> Trial:
        """The best of the longest of `trials`, all in the history; ties go to the smaller rate."""
        return max(trials, key=lambda trial: (trial.fidelity, self.accuracy(trial), -trial.lr))

    def runs(self, mask: Mask) -> Iterator[Trial]:
        """Trials of a plan in the history."""
        return (trial for trial in self.history if trial.mask == mask and trial.is_plan)

    def full(self, mask: Mask) -> dict[float, dict[int, float]]:
        """Full-length accuracies of a plan: learning rate → repeat → accuracy."""
        found: dict[float, dict[int, float]] = {}
        for trial in self.runs(mask):
            if trial.fidelity == 1.0:
                found.setdefault(trial.lr, {})[trial.repeat] = self.accuracy(trial)
        return found

    def best_lr(self, mask: Mask) -> float:
        """The plan's rate: best on repeat 0 at the greatest length trained; the middle one if none was.

        A rate at which a run of the plan failed is taken only where all others failed too: trainings diverge at
        large rates, so the nearest smaller one comes first.
        """
        runs = [trial for trial in self.runs(mask) if trial.repeat == 0]
        if not runs:
            return self.middle_lr
        failed = self.failed_rates(mask)
        finite = [trial for trial in runs if trial.lr not in failed]
        untried = [lr for lr in self.lrs if lr not in failed]
        if not finite and untried:
            return max((lr for lr in untried if lr < min(failed)), default=min(untried))
        return self.best(finite or runs).lr

    def failed_rates(self, mask: Mask) -> set[float]:
        """Rates at which a run of the plan failed."""
        return {trial.lr for trial in self.runs(mask) if not math.isfinite(self.accuracy(trial))}

    def compared_lr(self, mask: Mask) -> float | None:
        """The plan's best rate on repeat 0 at the greatest length at which every rate was tried; else None."""
        for length in sorted({trial.fidelity for trial in self.runs(mask)}, reverse=True):
            trials = [Trial(mask=mask, lr=lr, fidelity=length) for lr in self.lrs]
            if all(trial in self.history for trial in trials):
                return self.best(trials).lr
        return None

    def tried_masks(self) -> list[Mask]:
        """Allowed plans with at least one trial, in the order in which they came."""
        seen = dict.fromkeys(trial.mask for trial in self.history if trial.is_plan)
        return [mask for mask in seen if self.space.allows(mask)]

    def estimate(self, mask: Mask) -> float:
        """The plan's accuracy as far as known: mean over repeats at its best rate, longest runs."""
        lr = self.best_lr(mask)
        runs = [trial for trial in self.runs(mask) if trial.lr == lr]
        longest = max((trial.fidelity for trial in runs), default=0.0)
        values = [self.accuracy(trial) for trial in runs if trial.fidelity == longest]
        return float(np.mean(values)) if values else -math.inf


def measured_gain(budget: TrialBudget) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy gained by training each block, other blocks equal: least squares over all trials.

    Model: accuracy = level of (learning rate, fidelity, repeat) + sum of gains of the trained blocks. With
    few trials a small ridge on the gains (1e-3 of their mean diagonal) keeps blocks that were always trained
    together apart from infinity; the standard error says how little is known then. The levels carry no penalty:
    what it would take from them would be given to the blocks.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Arrays of length n_blocks, shares in [0, 1]; NaN with fewer trials than unknowns.
    """
    known = [
        (trial, outcome.validation_accuracy)
        for trial, outcome in budget.history.items()
        if outcome.validation_accuracy is not None and trial.is_plan
    ]
    n_blocks = budget.space.n_blocks
    levels = sorted({(t.lr, t.fidelity, t.repeat) for t, _ in known})
    if len(known) <= n_blocks + len(levels):
        return np.full(n_blocks, np.nan), np.full(n_blocks, np.nan)
    design = np.array(
        [
            [float(flag) for flag in trial.mask]
            + [float((trial.lr, trial.fidelity, trial.repeat) == level) for level in levels]
            for trial, _ in known
        ]
    )
    y = np.array([accuracy for _, accuracy in known])
    gram = design.T @ design
    gains = np.arange(len(gram)) < n_blocks
    gram[gains, gains] += 1e-3 * np.diag(gram)[gains].mean() + 1e-12
    inverse = np.linalg.inv(gram)
    weights = inverse @ design.T @ y
    residual = y - design @ weights
    variance = float(residual @ residual) / (len(y) - design.shape[1])
    stderr = np.sqrt(variance * np.diag(inverse))
    return weights[:n_blocks], stderr[:n_blocks]
