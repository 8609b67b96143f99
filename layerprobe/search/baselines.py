"""The baselines that stand beside the plan in every report, and their test accuracy on unseen seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from layerprobe.errors import UnknownNameError, did_you_mean
from layerprobe.metrics.intervals import mean_interval
from layerprobe.plans import standard_blocks
from layerprobe.records import Estimate
from layerprobe.search.budget import Scores, TrainBatch, TrialBudget
from layerprobe.search.settings import Settings
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, mask_of
from layerprobe.search.verdict import Difference, compare

if TYPE_CHECKING:
    from layerprobe.training.finetune import Outcome

PLAN = "plan"
ALL = "all"
AUTO_RGN = "auto-rgn"
GREEDY = "greedy"
FULL_LENGTH_RATES = 2
"""Rates at which training everything is compared at full length before the report's seeds."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One line of the report: a name and what it trains."""

    name: str
    mask: Mask
    norms: bool = False
    auto_rgn: bool = False

    @property
    def is_plan(self) -> bool:
        """Whether the mask alone says what is trained and how."""
        return not self.norms and not self.auto_rgn

    def trial(self, lr: float, repeat: int = 0, fidelity: float = 1.0) -> Trial:
        """One training of this baseline."""
        return Trial(
            mask=self.mask,
            lr=lr,
            repeat=repeat,
            fidelity=fidelity,
            norms=self.norms,
            auto_rgn=self.auto_rgn,
        )


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """A line of the report on its seeds.

    Attributes
    ----------
    test : tuple[float | None, ...]
        Test accuracy per seed, None where a run failed.
    accuracy : Estimate
        Their mean with a t interval over seeds.
    cost : float
        Of one training, in full trainings.
    seconds : float
        Mean of its steps.
    against_all, against_plan : Difference | None
        Paired difference to training everything and to the plan; None for that line itself or after failures.
    """

    baseline: Baseline
    lr: float
    params: int
    cost: float
    seconds: float
    test: tuple[float | None, ...]
    accuracy: Estimate
    against_all: Difference | None
    against_plan: Difference | None


def standard_baselines(space: Space, *, seed: int = 0, scores: Scores | None = None) -> list[Baseline]:
    """Baselines: all, none, norms only, first and last five, halves, a random plan, and the blocks that a
    relative-gradient-norm rule would train (where that score is known).

    The last one is a plan in the spirit of auto-RGN (Lee et al. 2023, arXiv 2210.11466), which scales
    learning rates by the gradient-to-weight ratio: here the blocks with at least half of the largest ratio.
    """
    n = space.n_blocks
    blocks = standard_blocks(n, random_seeds=(seed,))
    baselines = [Baseline(name=name, mask=mask_of(chosen, n)) for name, chosen in blocks.items()]
    baselines.insert(2, Baseline(name="norms", mask=space.none, norms=True))
    if scores and "rgn" in scores and np.isfinite(scores["rgn"][0]).all():
        ratio = scores["rgn"][0]
        mask = tuple(bool(flag) for flag in ratio >= 0.5 * ratio.max())
        baselines.append(Baseline(name="rgn-half", mask=mask))
    return baselines


def chosen_baselines(
    names: Sequence[str] | None, space: Space, *, seed: int = 0, scores: Scores | None = None
) -> list[Baseline]:
    """The baselines called `names`; None: those of `standard_baselines`.

    Two more exist on request. `auto-rgn` trains everything, each block at a rate in proportion to its relative
    gradient norm (`layerprobe.training.loop.BlockRates`). `greedy` is the plan that SubTuning's forward selection finds
    with the same budget as the search, which this doubles; trainings that both ask for are done once. Until then
    it has all blocks, the most that it may cost. A name that exists for other backbones (`first-5`) or with scores
    alone (`rgn-half`) is left out where it does not.

    Raises
    ------
    UnknownNameError
        There is no such baseline.
    """
    baselines = standard_baselines(space, seed=seed, scores=scores)
    if names is None:
        return baselines
    baselines.append(Baseline(name=AUTO_RGN, mask=space.all, auto_rgn=True))
    baselines.append(Baseline(name=GREEDY, mask=space.all))
    known = dict.fromkeys([*(one.name for one in baselines), "first-5", "last-5", "rgn-half"])
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"unknown baseline '{name}'.{did_you_mean(name, known)} Choose from: {', '.join(known)}"
            )
    return [one for one in baselines if one.name in names]


def baselines_cost(baselines: Sequence[Baseline], space: Space, settings: Settings) -> float:
    """What reporting on `baselines` costs at most, in full trainings."""
    runs = len(settings.lrs) * settings.fidelity + settings.seeds
    return sum(
        space.cost(one.trial(settings.lrs[0])) * (runs + (FULL_LENGTH_RATES if one.name == ALL else 0))
        for one in baselines
    )


def report_baselines(
    plan: Mask,
    plan_lr: float,
    baselines: Sequence[Baseline],
    budget: TrialBudget,
    train_batch: TrainBatch,
    *,
    rates: Mapping[str, float] | None = None,
) -> list[BaselineResult]:
    """Test accuracy of the plan and the baselines at equal length, on seeds that selected nothing.

    The plan has the rate that the search gave it, which a strategy may have inferred from other plans; `rates`
    are those of baselines that a search of their own has chosen one for. For the others see `choose_rates`.
    """
    everyone = [Baseline(name=PLAN, mask=plan), *baselines]
    chosen = choose_rates(everyone, {PLAN: plan_lr, **(rates or {})}, budget, train_batch)
    seeds = range(budget.settings.seeds)
    runs = {
        one.name: [one.trial(chosen[one.name], REPORT_REPEAT + seed) for seed in seeds] for one in everyone
    }
    # Seed by seed, so that an interrupted report has complete rows to compare.
    order = [runs[one.name][seed] for seed in seeds for one in everyone]
    found = train_batch(list(dict.fromkeys(order)))
    test = {name: tuple(found[trial].test_accuracy for trial in trials) for name, trials in runs.items()}
    results = []
    for one in everyone:
        trials = runs[one.name]
        outcomes = [found[trial] for trial in trials]
        params = [o.trainable_parameters for o in outcomes if o.trainable_parameters is not None]
        results.append(
            BaselineResult(
                baseline=one,
                lr=chosen[one.name],
                params=params[0] if params else budget.space.params(one.mask),
                cost=budget.space.cost(trials[0]),
                seconds=float(np.mean([outcome.train_seconds for outcome in outcomes])),
                test=test[one.name],
                accuracy=_mean(test[one.name], next((o.reason for o in outcomes if o.reason), None)),
                against_all=None if one.name == ALL else compare(test[one.name], test.get(ALL)),
                against_plan=None if one.name == PLAN else compare(test[one.name], test[PLAN]),
            )
        )
    return results


def choose_rates(
    everyone: Sequence[Baseline], known: Mapping[str, float], budget: TrialBudget, train_batch: TrainBatch
) -> dict[str, float]:
    """A learning rate for every line of the report, chosen on validation with the search's first seed.

    All rates are compared at one length: by what the search already trained where that is the whole grid, else
    by low-fidelity runs. For training everything, which the verdict is about, rates are compared at full length,
    all of them where the search did so, else the two best: short runs favour other rates than long ones.

    Parameters
    ----------
    everyone : Sequence[Baseline]
        The plan first.
    known : Mapping[str, float]
        Rates of those that need no choice, the plan's among them.
    """
    plan, *baselines = everyone
    chosen = dict(known)
    for one in baselines:
        if one.name not in chosen and one.is_plan:
            compared = chosen[PLAN] if one.mask == plan.mask else budget.compared_lr(one.mask)
            if compared is not None:
                chosen[one.name] = compared
    short = {
        one.name: [one.trial(lr, 0, budget.settings.fidelity) for lr in budget.lrs]
        for one in baselines
        if one.name not in chosen
    }
    found = train_batch([trial for trials in short.values() for trial in trials])
    chosen |= {name: _ranked(trials, found)[0].lr for name, trials in short.items()}
    everything = next((one for one in baselines if one.name == ALL and one.mask != plan.mask), None)
    if everything is not None:
        rate = _rate_at_full_length(everything, budget, train_batch)
        # Another rule may have named the same plan; one plan has one rate.
        chosen |= {one.name: rate for one in baselines if one.mask == everything.mask and one.is_plan}
    return chosen


def _rate_at_full_length(baseline: Baseline, budget: TrialBudget, train_batch: TrainBatch) -> float:
    """The best rate at full length: of all where the search tried all, else of the two best low-fidelity runs."""
    full = [baseline.trial(lr) for lr in budget.lrs]
    if all(trial in budget.history for trial in full):
        return _ranked(full, budget.history)[0].lr
    short = [baseline.trial(lr, 0, budget.settings.fidelity) for lr in budget.lrs]
    best = _ranked(short, train_batch(short))[:FULL_LENGTH_RATES]
    longer = [baseline.trial(trial.lr) for trial in best]
    return _ranked(longer, train_batch(longer))[0].lr


def _ranked(trials: Sequence[Trial], found: Mapping[Trial, Outcome]) -> list[Trial]:
    """Best validation accuracy first; ties go to the smaller rate."""
    return sorted(trials, key=lambda trial: (-found[trial].ranked_accuracy, trial.lr))


def _mean(values: Sequence[float | None], reason: str | None) -> Estimate:
    finite = [value for value in values if value is not None]
    if len(finite) > 1:
        return replace(mean_interval(finite), reason=reason)
    return Estimate(value=finite[0] if finite else None, n=len(finite), reason=reason)
