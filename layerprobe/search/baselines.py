"""The baselines that stand beside the plan in every report, and their test accuracy on unseen seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.metrics.inference import PooledArms
from layerprobe.plans import standard_blocks
from layerprobe.records import Estimate
from layerprobe.search.budget import Scores, TrainBatch, TrialBudget
from layerprobe.search.settings import DEFAULT_BASELINES, Settings
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, mask_of
from layerprobe.search.verdict import Verdict, decide

if TYPE_CHECKING:
    from layerprobe.training.finetune import Outcome

PLAN = "plan"
ALL = "all"
AUTO_RGN = "auto-rgn"
GREEDY = "greedy"
NONE = "none"
JUDGED = (PLAN, ALL, NONE)
"""The verdict is about these; they get more seeds than other baselines where it needs them."""


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
        Their mean; the interval holds seeds (noise pooled over all lines) and test images.
    cost : float
        Of one training, in full trainings.
    seconds : float
        Mean of its steps.
    recall : float | None
        Share of the random labels that the bridges recalled, None without a bridge.
    right : np.ndarray | None
        Per test image, the share of seeds that are right.
    against : dict[str, Estimate | None]
        Difference to the plan, to training everything and to training no block; None for that line itself, or
        without an estimate.
    """

    baseline: Baseline
    lr: float
    params: int
    cost: float
    seconds: float
    recall: float | None
    test: tuple[float | None, ...]
    accuracy: Estimate
    right: np.ndarray | None
    against: dict[str, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The plan and the baselines on unseen seeds, and what follows.

    Attributes
    ----------
    lines : list[BaselineResult]
        The plan first.
    verdict : Verdict
        About plan, all and none.
    seeds : list[int]
        Unseen seeds of these three, by their number.
    noise : float | None
        Standard deviation of one training around its arm and seed, as a share.
    freedom : int
        Its degrees of freedom.
    """

    lines: list[BaselineResult]
    verdict: Verdict
    seeds: list[int]
    noise: float | None
    freedom: int = 0

    def line(self, name: str) -> BaselineResult:
        """The line of a baseline."""
        return next(line for line in self.lines if line.baseline.name == name)


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
    """The baselines called `names`; None: those of `DEFAULT_BASELINES`, where the backbone has them.

    All and none are always among them: the verdict is about these. Two more exist on request. `auto-rgn` trains
    everything, each block at a rate in proportion to its relative gradient norm
    (`layerprobe.training.loop.BlockRates`). `greedy` is the plan that SubTuning's forward selection finds with the same
    budget as the search, which this doubles; trainings that both ask for are done once. Until then it has all blocks,
    the most that it may cost. A name that exists for other backbones (`first-5`) or with scores alone (`rgn-half`) is
    left out where it does not.

    Raises
    ------
    UnknownNameError
        There is no such baseline.
    """
    baselines = standard_baselines(space, seed=seed, scores=scores)
    names = DEFAULT_BASELINES if names is None else (ALL, NONE, *names)
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
    """What reporting on `baselines` costs with the fewest seeds, in full trainings."""
    rates = len(settings.lrs)
    return sum(
        space.cost(one.trial(settings.lrs[0])) * (settings.seeds + (0 if one.is_plan else rates))
        for one in baselines
    )


def report_baselines(
    plan: Mask,
    baselines: Sequence[Baseline],
    budget: TrialBudget,
    train_batch: TrainBatch,
    *,
    tolerance: float,
    rates: Mapping[str, float] | None = None,
) -> Report:
    """Test accuracy of the plan and the baselines at equal length on seeds that selected nothing, and the verdict.

    Every line has its own learning rate: the posterior's for plans, the best on validation for the others, or that
    of `rates`. Seeds are added for plan, all and none until the half-width of their differences is at most
    `settings.half_width`, or there are `settings.max_seeds`.
    """
    settings = budget.settings
    everyone = [Baseline(name=PLAN, mask=plan), *baselines]
    chosen = _rates(everyone, budget, train_batch) | dict(rates or {})
    found: dict[Trial, Outcome] = {}

    def trial(one: Baseline, seed: int) -> Trial:
        return one.trial(chosen[one.name], REPORT_REPEAT + seed, budget.length)

    def train(lines: Sequence[Baseline], seeds: Sequence[int]) -> None:
        # Seed by seed, so that an interrupted report has complete rows to compare.
        wanted = dict.fromkeys(trial(one, seed) for seed in seeds for one in lines)
        found.update(train_batch([one for one in wanted if one not in found]))

    n_seeds = settings.seeds
    train(everyone, range(n_seeds))
    judged = {one.name: one.mask for one in everyone if one.name in JUDGED}
    distinct = {mask: name for name, mask in judged.items()}  # of equal plans the last name
    arms = {name: mask for mask, name in distinct.items()}
    while True:
        outcomes = {one.name: _outcomes(found, [trial(one, s) for s in range(n_seeds)]) for one in everyone}
        pooled = _pooled(outcomes)
        verdict = decide(arms, pooled, budget.space, tolerance=tolerance)
        wide = [e for e in verdict.differences.values() if _half_width(e) > settings.half_width]
        if not wide or n_seeds >= settings.max_seeds:
            break
        train([one for one in everyone if one.name in arms], [n_seeds])
        n_seeds += 1
    lines = []
    for one in everyone:
        done = list(outcomes[one.name].values())
        accuracies = tuple(outcome.test_accuracy for outcome in done)
        params = [o.trainable_parameters for o in done if o.trainable_parameters is not None]
        recalls = [o.bridge_accuracy for o in done if o.bridge_accuracy is not None]
        compared = {
            name: None if pooled is None or one.name == name else pooled.difference(one.name, name)
            for name in JUDGED
        }
        lines.append(
            BaselineResult(
                baseline=one,
                lr=chosen[one.name],
                params=params[0] if params else budget.space.params(one.mask),
                cost=budget.space.cost(trial(one, 0)),
                seconds=float(np.mean([outcome.train_seconds for outcome in done])),
                recall=float(np.mean(recalls)) if recalls else None,
                test=accuracies,
                accuracy=_mean(one.name, pooled, done),
                right=_right(pooled, one.name),
                against=compared,
            )
        )
    noise, freedom = (None, 0) if pooled is None else (pooled.noise, pooled.freedom)
    return Report(lines=lines, verdict=verdict, seeds=list(range(n_seeds)), noise=noise, freedom=freedom)


def _rates(everyone: Sequence[Baseline], budget: TrialBudget, train_batch: TrainBatch) -> dict[str, float]:
    """A learning rate for every line of the report, chosen on validation."""
    plans = [one for one in everyone if one.is_plan]
    best = budget.posterior().best_rates([one.mask for one in plans])
    chosen = {one.name: best[one.mask] for one in plans}
    for one in everyone:
        if one.name not in chosen:
            trials = [one.trial(lr, 0, budget.length) for lr in budget.lrs]
            found = train_batch(trials)
            chosen[one.name] = max(trials, key=lambda trial: (found[trial].ranked_accuracy, -trial.lr)).lr
    return chosen


def _outcomes(found: Mapping[Trial, Outcome], trials: Sequence[Trial]) -> dict[int, Outcome]:
    return {trial.repeat - REPORT_REPEAT: found[trial] for trial in trials if trial in found}


def _pooled(outcomes: Mapping[str, Mapping[int, Outcome]]) -> PooledArms | None:
    """Test accuracies of all lines with pooled noise; None where too few trainings came through."""
    values = {
        name: {seed: o.test_accuracy for seed, o in by_seed.items() if o.test_accuracy is not None}
        for name, by_seed in outcomes.items()
    }
    values = {name: by_seed for name, by_seed in values.items() if by_seed}
    right = {
        name: np.mean([o.test_correct for o in outcomes[name].values() if o.test_correct is not None], axis=0)
        for name in values
        if any(o.test_correct is not None for o in outcomes[name].values())
    }
    n_images = max((o.n_test or 0 for by_seed in outcomes.values() for o in by_seed.values()), default=0)
    try:
        return PooledArms(values, n_images=n_images or None, correct=right)
    except UsageError:
        return None


def _right(pooled: PooledArms | None, name: str) -> np.ndarray | None:
    if pooled is None or pooled.correct is None or name not in pooled.correct:
        return None
    return np.asarray(pooled.correct[name], dtype=float)


def _half_width(difference: Estimate) -> float:
    if difference.low is None or difference.high is None:
        return 0.0  # nothing that more seeds would narrow
    return (difference.high - difference.low) / 2


def _mean(name: str, pooled: PooledArms | None, outcomes: Sequence[Outcome]) -> Estimate:
    reason = next((o.reason for o in outcomes if o.reason), None)
    if pooled is not None and name in pooled.arms:
        return replace(pooled.mean(name), reason=reason)
    values = [o.test_accuracy for o in outcomes if o.test_accuracy is not None]
    return Estimate(value=values[0] if values else None, n=len(values), reason=reason)
