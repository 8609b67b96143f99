"""The baselines that stand beside the plan in every report, and their test accuracy on unseen seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.metrics.inference import PooledArms
from layerprobe.plans import standard_blocks
from layerprobe.records import Estimate
from layerprobe.search.budget import Scores, TrainBatch, TrialBudget
from layerprobe.search.settings import DEFAULT_BASELINES, Settings
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, mask_of
from layerprobe.search.verdict import LEVEL, Verdict, decide

if TYPE_CHECKING:
    from layerprobe.training.outcome import Outcome

PLAN = "plan"
ALL = "all"
AUTO_RGN = "auto-rgn"
GREEDY = "greedy"
NONE = "none"
EQUAL = ("first-equal", "last-equal", "random-equal")
"""Units from the input, from the output, or at random, until about as many parameters train as under the plan."""
EVERYWHERE = "everywhere-equal"
"""Adapters everywhere, of the rank at which about as many parameters train as under the plan."""
JUDGED = (PLAN, ALL, NONE)
"""The verdict is about these; they get more seeds than other baselines where it needs them."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One line of the report: a name and what it trains."""

    name: str
    mask: Mask
    norms: bool = False
    auto_rgn: bool = False
    rank: int = 0

    @property
    def is_plan(self) -> bool:
        """Whether the mask alone says what is trained and how."""
        return self.trial(1.0).is_plan

    def trial(self, lr: float, repeat: int = 0, fidelity: float = 1.0) -> Trial:
        """One training of this baseline."""
        own = {name: value for name, value in vars(self).items() if name != "name"}
        return Trial(lr=lr, repeat=repeat, fidelity=fidelity, **own)


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """A line of the report on its seeds.

    Attributes
    ----------
    test : tuple[float | None, ...]
        Test accuracy per seed, None where a run failed.
    accuracy : Estimate
        Their mean; the interval holds seeds (noise pooled with the plan, all and none) and test images.
    cost : float
        Of one training, in full trainings.
    seconds : float
        Mean of its steps.
    recall : float | None
        Share of the random labels that the bridges recalled, None without a bridge.
    pooled : PooledArms | None
        The line with the three of the verdict, where it is called `arm`: of equal plans, one stands for all. None
        where too few trainings came through.
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
    pooled: PooledArms | None
    arm: str
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
    pooled : PooledArms | None
        These three on their seeds; None where too few trainings came through.
    """

    lines: list[BaselineResult]
    verdict: Verdict
    seeds: list[int]
    pooled: PooledArms | None

    @property
    def noise(self) -> float | None:
        """Standard deviation of one training of the three around its arm and seed, as a share."""
        return None if self.pooled is None else self.pooled.noise

    @property
    def image_stderr(self) -> float:
        """The largest standard error of a difference of the three that comes from the test images alone."""
        if self.pooled is None:
            return 0.0
        pairs = combinations(self.pooled.arms, 2)
        return math.sqrt(max((self.pooled.image_variance(*pair) for pair in pairs), default=0.0))

    def line(self, name: str) -> BaselineResult:
        """The line of a baseline."""
        return next(line for line in self.lines if line.baseline.name == name)


def standard_baselines(space: Space, *, seed: int = 0, scores: Scores | None = None) -> list[Baseline]:
    """Baselines: all, none, norms only, first and last five, halves, a random plan, and the blocks that a
    relative-gradient-norm rule would train (where that score is known); attention alone and MLPs alone where masks
    tell them apart.

    The last one is a plan in the spirit of auto-RGN (Lee et al. 2023, arXiv 2210.11466), which scales
    learning rates by the gradient-to-weight ratio: here the blocks with at least half of the largest ratio.
    """
    n = space.n_blocks
    units = {
        name: space.units_of(chosen) for name, chosen in standard_blocks(n, random_seeds=(seed,)).items()
    }
    units |= {part: space.units_of(range(n), part) for part in space.parts}
    baselines = [Baseline(name=name, mask=mask_of(chosen, space.n_units)) for name, chosen in units.items()]
    baselines.insert(2, Baseline(name="norms", mask=space.none, norms=True))
    if scores and "rgn" in scores and np.isfinite(scores["rgn"][0]).all():
        ratio = scores["rgn"][0]
        mask = mask_of(space.units_of(np.flatnonzero(ratio >= 0.5 * ratio.max()).tolist()), space.n_units)
        baselines.append(Baseline(name="rgn-half", mask=mask))
    return baselines


def chosen_baselines(settings: Settings, space: Space, *, scores: Scores | None = None) -> list[Baseline]:
    """The baselines of `settings`; where it names none, those of `DEFAULT_BASELINES` that the backbone has.

    All and none are always among them: the verdict is about these. More exist on request. Those of `EQUAL`, and
    `EVERYWHERE` where plans place adapters, are made when the plan is known (`equal_baselines`). `auto-rgn` trains
    everything, each block at a rate in proportion to its relative gradient norm
    (`layerprobe.training.loop.BlockRates`). `greedy` is the plan that SubTuning's forward selection finds with the
    same budget as the search, which this doubles; trainings that both ask for are done once. What waits for a plan
    has all blocks until then, the most that it may cost. A name that exists for other backbones (`first-5`), other
    settings (`attention`) or with scores alone (`rgn-half`) is left out where it does not; any other raises
    UnknownNameError.
    """
    names = DEFAULT_BASELINES if settings.baselines is None else (ALL, NONE, *settings.baselines)
    baselines = [
        *standard_baselines(space, seed=settings.seed, scores=scores),
        Baseline(name=AUTO_RGN, mask=space.all, auto_rgn=True),
        *(Baseline(name=name, mask=space.all) for name in (GREEDY, *EQUAL)),
    ]
    if rank := settings.adapter_rank:
        baselines.append(Baseline(name=EVERYWHERE, mask=space.all, rank=rank))
    elsewhere = ("first-5", "last-5", "rgn-half", "attention", "mlp", EVERYWHERE)
    known = dict.fromkeys([*(one.name for one in baselines), *elsewhere])
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"unknown baseline '{name}'.{did_you_mean(name, known)} Choose from: {', '.join(known)}"
            )
    return [one for one in baselines if one.name in names]


def equal_baselines(
    baselines: Sequence[Baseline], plan: Mask, space: Space, settings: Settings
) -> list[Baseline]:
    """`baselines` with those of `EQUAL` and `EVERYWHERE` made as large as `plan`, as nearly as units and ranks allow.

    One that would be the plan itself, all or none is left out: it stands in the report already.
    """
    wanted, rank = space.params(plan), settings.adapter_rank
    units = list(range(space.n_units))
    drawn = np.random.default_rng(settings.seed).permutation(space.n_units).tolist()
    orders = dict(zip(EQUAL, (units, units[::-1], drawn), strict=True))

    def made(one: Baseline) -> Baseline | None:
        if one.name == EVERYWHERE and rank:
            thin = max(1, round(rank * wanted / sum(space.unit_params)))
            return replace(one, rank=thin) if wanted and thin < rank else None
        if one.name not in orders:
            return one
        sizes = [mask_of(orders[one.name][:k], space.n_units) for k in range(space.n_units + 1)]
        mask = min(sizes, key=lambda mask: abs(space.params(mask) - wanted))
        return None if mask in (plan, space.all, space.none) else replace(one, mask=mask)

    return [found for one in baselines if (found := made(one)) is not None]


def baselines_cost(baselines: Sequence[Baseline], space: Space, settings: Settings) -> float:
    """What reporting on `baselines` costs with the fewest seeds, in full trainings."""
    rates = len(settings.lrs)
    return sum(
        space.cost(one.trial(settings.lrs[0])) * (settings.seeds + (0 if one.is_plan or one.rank else rates))
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

    Every line has its own learning rate: the posterior's for plans and for the places of adapters, the best on
    validation for the others, or that of `rates`. Seeds are added for plan, all and none until every difference of
    theirs is a claim, or known to `settings.half_width`, or no seeds can narrow it so far, for its test images are too
    few; at most `settings.max_seeds`.
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
        outcomes = {
            one.name: {s: found[trial(one, s)] for s in range(n_seeds) if trial(one, s) in found}
            for one in everyone
        }
        pooled = _pooled({name: outcomes[name] for name in arms})
        margin = 2 * settings.half_width
        verdict = decide(arms, pooled, budget.space, tolerance=tolerance, margin=margin, n_seeds=n_seeds)
        if n_seeds >= settings.max_seeds or not _more_seeds_help(verdict, pooled, settings.half_width):
            break
        train([one for one in everyone if one.name in arms], [n_seeds])
        n_seeds += 1
    lines = []
    for one in everyone:
        done = list(outcomes[one.name].values())
        params = [o.trainable_parameters for o in done if o.trainable_parameters is not None]
        recalls = [o.bridge_accuracy for o in done if o.bridge_accuracy is not None]
        # Equal plans are one arm. Other baselines may be less noisy, so each is pooled with the three alone.
        own = distinct.get(one.mask, one.name) if one.is_plan else one.name
        with_this = _pooled({name: outcomes[name] for name in {**arms, own: one.mask}})
        compared = {
            name: None
            if with_this is None or own == distinct[mask]
            else with_this.difference(own, distinct[mask])
            for name, mask in judged.items()
        }
        lines.append(
            BaselineResult(
                baseline=one,
                lr=chosen[one.name],
                params=params[0] if params else budget.space.params(one.mask),
                cost=budget.space.cost(trial(one, 0)),
                seconds=float(np.mean([outcome.train_seconds for outcome in done])),
                recall=float(np.mean(recalls)) if recalls else None,
                test=tuple(outcome.test_accuracy for outcome in done),
                accuracy=_mean(own, with_this, done),
                pooled=with_this,
                arm=own,
                against=compared,
            )
        )
    return Report(lines=lines, verdict=verdict, seeds=list(range(n_seeds)), pooled=pooled)


def _rates(everyone: Sequence[Baseline], budget: TrialBudget, train_batch: TrainBatch) -> dict[str, float]:
    """A learning rate for every line of the report, chosen on validation."""
    # Adapters of another rank at the same places: what many trainings say beats one training at each rate.
    plans = [one for one in everyone if one.is_plan or one.rank]
    best = budget.posterior().best_rates([one.mask for one in plans])
    chosen = {one.name: best[one.mask] for one in plans}
    for one in everyone:
        if one.name not in chosen:
            trials = [one.trial(lr, 0, budget.length) for lr in budget.lrs]
            found = train_batch(trials)
            chosen[one.name] = max(trials, key=lambda trial: (found[trial].ranked_accuracy, -trial.lr)).lr
    return chosen


def _pooled(outcomes: Mapping[str, Mapping[int, Outcome]]) -> PooledArms | None:
    """Test accuracies of some lines with pooled noise; None where too few trainings came through."""
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


def _more_seeds_help(verdict: Verdict, pooled: PooledArms | None, half_width: float) -> bool:
    """Whether a difference is no claim yet, wider than asked for, and not so for its images alone."""
    if pooled is None:
        return False
    for (first, second), e in verdict.differences.items():
        if e.low is None or e.high is None or (e.pvalue or 0.0) < LEVEL:
            continue
        images = 1.96 * math.sqrt(pooled.image_variance(first, second))
        if (e.high - e.low) / 2 > half_width > images:
            return True
    return False


def _mean(name: str, pooled: PooledArms | None, outcomes: Sequence[Outcome]) -> Estimate:
    reason = next((o.reason for o in outcomes if o.reason), None)
    if pooled is not None and name in pooled.arms:
        return replace(pooled.mean(name), reason=reason)
    values = [o.test_accuracy for o in outcomes if o.test_accuracy is not None]
    return Estimate(value=values[0] if values else None, n=len(values), reason=reason)
