"""The strategy's view of a search: values trials, counts what they cost, and remembers every answer.

A strategy sees nothing else. Because answers come from a store when they exist, running a strategy again
replays it: the same seed and the same answers lead along the same way, whoever valued the trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.search.space import Mask, Space, Trial


@dataclass(frozen=True)
class Outcome:
    """What one trial gave.

    Attributes
    ----------
    accuracy : validation accuracy in [0, 1]; None where the run failed, then `reason` says why.
    test : test accuracy in [0, 1], measured only for the report's repeats.
    seconds : wall time of the training.
    facts : whatever else the trainer tells (train accuracy, steps, …), strict JSON.
    """

    accuracy: float | None
    test: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


ValueBatch = Callable[[Sequence[Trial]], Mapping[Trial, Outcome]]
"""Values a batch of trials, in whatever order and by however many workers, and returns all answers."""


@dataclass
class Bench:
    """Budgeted access to trials.

    Attributes
    ----------
    space : the plans.
    value_batch : see `ValueBatch`.
    lrs : the grid of learning rates, ascending.
    seeds : how many common seeds a finalist is repeated on (≥ 2 for a standard error).
    budget : what may be spent, in full trainings.
    scores : per-block proposals, name → (value, standard error) arrays of length n_blocks; may be empty.
    seed : seed of the strategy's own random choices.
    fidelity : the shortest rung, as a share of the full number of steps.
    objective : 'frugal' (fewest parameters within one standard error of the best) or 'accuracy'.
    max_repeats : how many common seeds there are at most; default twice `seeds`.
    """

    space: Space
    value_batch: ValueBatch
    lrs: tuple[float, ...]
    seeds: int
    budget: float
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    seed: int = 0
    fidelity: float = 0.25
    objective: str = "frugal"
    max_repeats: int | None = None
    watch: Callable[[Bench], None] | None = None
    spent: float = 0.0
    held_back: float = 0.0
    history: dict[Trial, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lrs or any(not lr > 0 for lr in self.lrs):
            raise UsageError(f"learning rates must be positive and at least one, got {list(self.lrs)}")
        if self.seeds < 2:
            raise UsageError(f"finalists need at least 2 common seeds for a standard error, got {self.seeds}")
        if not 0 < self.fidelity <= 1:
            raise UsageError(f"the shortest rung is a share of the steps in (0, 1], got {self.fidelity}")
        if self.objective not in ("frugal", "accuracy"):
            raise UsageError(f"unknown objective '{self.objective}'; objectives: frugal, accuracy")
        self.lrs = tuple(sorted(self.lrs))
        self.rng = np.random.default_rng(self.seed)

    @property
    def left(self) -> float:
        """Budget that may still be spent before the finals, in full trainings."""
        return self.budget - self.held_back - self.spent

    @property
    def middle_lr(self) -> float:
        return self.lrs[len(self.lrs) // 2]

    def price(self, trials: Sequence[Trial]) -> float:
        """What valuing `trials` would add to the bill; trials already valued are free."""
        return sum(self.space.cost(trial) for trial in dict.fromkeys(trials) if trial not in self.history)

    def value(self, trials: Sequence[Trial]) -> dict[Trial, float]:
        """Validation accuracies of the leading trials that the budget still pays for.

        A failed run counts as −inf. An empty dict means that nothing more can be paid.
        """
        affordable: list[Trial] = []
        bill = 0.0
        for trial in dict.fromkeys(trials):
            cost = 0.0 if trial in self.history else self.space.cost(trial)
            if bill + cost > self.left + 1e-9:
                break
            bill += cost
            affordable.append(trial)
        fresh = [trial for trial in affordable if trial not in self.history]
        if fresh:
            answers = self.value_batch(fresh)
            for trial in fresh:
                self.history[trial] = answers[trial]
            self.spent += bill
            if self.watch is not None:
                self.watch(self)
        return {trial: accuracy_of(self.history[trial]) for trial in affordable}

    def full(self, mask: Mask) -> dict[float, dict[int, float]]:
        """Full-length accuracies of a plan: learning rate → repeat → accuracy."""
        found: dict[float, dict[int, float]] = {}
        for trial, outcome in self.history.items():
            if trial.mask == mask and trial.fidelity == 1.0 and trial.is_plan:
                found.setdefault(trial.lr, {})[trial.repeat] = accuracy_of(outcome)
        return found

    def best_lr(self, mask: Mask) -> float:
        """The plan's rate: best on repeat 0 at the greatest length valued; the middle one if none was.

        A rate at which a run of the plan failed is taken only where all others failed too: trainings diverge at
        large rates, so the nearest smaller one comes first.
        """
        runs = [
            (trial.fidelity, accuracy_of(outcome), -trial.lr)
            for trial, outcome in self.history.items()
            if trial.mask == mask and trial.repeat == 0 and trial.is_plan
        ]
        if not runs:
            return self.middle_lr
        failed = self.failed_rates(mask)
        finite = [run for run in runs if -run[2] not in failed]
        untried = [lr for lr in self.lrs if lr not in failed]
        if not finite and untried:
            return max((lr for lr in untried if lr < min(failed)), default=min(untried))
        runs = finite or runs
        longest = max(fidelity for fidelity, _, _ in runs)
        return -max((accuracy, lr) for fidelity, accuracy, lr in runs if fidelity == longest)[1]

    def failed_rates(self, mask: Mask) -> set[float]:
        """Rates at which a run of the plan failed."""
        return {
            trial.lr
            for trial, outcome in self.history.items()
            if trial.mask == mask and trial.is_plan and not math.isfinite(accuracy_of(outcome))
        }

    def compared_lr(self, mask: Mask) -> float | None:
        """The plan's best rate on repeat 0 at the greatest length at which every rate was valued; else None."""
        lengths = {trial.fidelity for trial in self.history if trial.mask == mask and trial.is_plan}
        for length in sorted(lengths, reverse=True):
            trials = [Trial(mask, lr, 0, length) for lr in self.lrs]
            if all(trial in self.history for trial in trials):
                return max(trials, key=lambda t: (accuracy_of(self.history[t]), -t.lr)).lr
        return None

    def valued_masks(self) -> list[Mask]:
        """Allowed plans with at least one valued trial, in the order in which they came."""
        seen = dict.fromkeys(trial.mask for trial in self.history if trial.is_plan)
        return [mask for mask in seen if self.space.allows(mask)]

    def estimate(self, mask: Mask) -> float:
        """The plan's accuracy as far as known: mean over repeats at its best rate, longest runs."""
        lr = self.best_lr(mask)
        runs = [
            (trial.fidelity, accuracy_of(outcome))
            for trial, outcome in self.history.items()
            if trial.mask == mask and trial.lr == lr and trial.is_plan
        ]
        if not runs:
            return -math.inf
        longest = max(fidelity for fidelity, _ in runs)
        return float(np.mean([accuracy for fidelity, accuracy in runs if fidelity == longest]))


def accuracy_of(outcome: Outcome) -> float:
    """Validation accuracy, or −inf for a failed run."""
    return -math.inf if outcome.accuracy is None else outcome.accuracy
