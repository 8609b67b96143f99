"""The arms that stand beside the plan in every report, and their test accuracy on unseen seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from layerprobe.errors import UnknownNameError, did_you_mean
from layerprobe.metrics.intervals import mean_interval
from layerprobe.plans import standard_blocks
from layerprobe.search.bench import Bench, Outcome, ValueBatch, accuracy_of
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, mask_of
from layerprobe.search.verdict import Comparison, compare

PLAN = "plan"
ALL = "all"
AUTO_RGN = "auto-rgn"
GREEDY = "greedy"
FULL_LENGTH_RATES = 2
"""Rates at which training everything is compared at full length before the report's seeds."""

ON_REQUEST = (AUTO_RGN, GREEDY)
"""Baselines that a report has when they are asked for by name. `auto-rgn` trains everything, each block at a
rate in proportion to its relative gradient norm (`layerprobe.training.loop.BlockRates`), at the price of any arm.
`greedy` is the plan that SubTuning's forward selection finds with the same budget as the search, which this
doubles; trainings that both ask for are done once."""


@dataclass(frozen=True)
class Arm:
    """One line of the report: a name and what it trains."""

    name: str
    mask: Mask
    norms: bool = False
    auto_rgn: bool = False

    def trial(self, lr: float, repeat: int = 0, fidelity: float = 1.0) -> Trial:
        """One training of this arm."""
        return Trial(self.mask, lr, repeat, fidelity, self.norms, self.auto_rgn)


@dataclass(frozen=True)
class ArmResult:
    """An arm on the report's seeds.

    Attributes
    ----------
    test : test accuracy per seed, None where a run failed. mean, low, high, stderr : t interval over seeds.
    against_all : paired difference to training everything, None for that arm itself or after failures.
    """

    arm: Arm
    lr: float
    params: int
    cost: float
    seconds: float
    test: tuple[float | None, ...]
    mean: float | None
    low: float | None
    high: float | None
    stderr: float | None
    against_all: Comparison | None
    against_plan: Comparison | None
    reason: str | None = None


def standard_arms(
    space: Space, *, seed: int = 0, scores: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None
) -> list[Arm]:
    """Baselines: all, none, norms only, first and last five, halves, a random plan, and the blocks that a
    relative-gradient-norm rule would train (where that score is known).

    The last one is a plan in the spirit of auto-RGN (Lee et al. 2023, arXiv 2210.11466), which scales
    learning rates by the gradient-to-weight ratio: here the blocks with at least half of the largest ratio.
    """
    n = space.n_blocks
    arms = [
        Arm(name, mask_of(blocks, n)) for name, blocks in standard_blocks(n, random_seeds=(seed,)).items()
    ]
    arms.insert(2, Arm("norms", space.none, norms=True))
    if scores and "rgn" in scores and np.isfinite(scores["rgn"][0]).all():
        ratio = scores["rgn"][0]
        arms.append(Arm("rgn-half", tuple(bool(flag) for flag in ratio >= 0.5 * ratio.max())))
    return arms


def chosen_arms(
    names: Sequence[str] | None,
    space: Space,
    *,
    seed: int = 0,
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> list[Arm]:
    """The baselines called `names`; None: those of `standard_arms`.

    `greedy` stands there with all blocks, the most that it may cost, until its search is done. A name that
    exists for other backbones (`first-5`) or with scores alone (`rgn-half`) is left out where it does not.

    Raises
    ------
    UnknownNameError : there is no such baseline.
    """
    arms = standard_arms(space, seed=seed, scores=scores)
    if names is None:
        return arms
    arms += [Arm(AUTO_RGN, space.all, auto_rgn=True), Arm(GREEDY, space.all)]
    known = dict.fromkeys([*(arm.name for arm in arms), "first-5", "last-5", "rgn-half"])
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"unknown baseline '{name}'.{did_you_mean(name, known)} Choose from: {', '.join(known)}"
            )
    return [arm for arm in arms if arm.name in names]


def arms_cost(arms: Sequence[Arm], space: Space, lrs: Sequence[float], seeds: int, fidelity: float) -> float:
    """What reporting on `arms` costs at most, in full trainings."""
    return sum(
        space.cost(arm.trial(lrs[0]))
        * (len(lrs) * fidelity + seeds + (FULL_LENGTH_RATES if arm.name == ALL else 0))
        for arm in arms
    )


def report_arms(
    plan: Mask,
    plan_lr: float,
    arms: Sequence[Arm],
    bench: Bench,
    value_batch: ValueBatch,
    *,
    rates: Mapping[str, float] | None = None,
) -> list[ArmResult]:
    """Test accuracy of the plan and the baselines at equal length, on seeds that selected nothing.

    Each baseline has its own learning rate, chosen on validation with the search's first seed among all rates at
    one length: what the search already valued where that is the whole grid, else the short rung. For training
    everything, which the verdict is about, rates are compared at full length, all of them where the search did
    so, else the two best: short runs favour other rates than long ones. The plan has the rate that the search
    gave it, which a strategy may have inferred from other plans. `rates` are those of arms that a search of their
    own has chosen one for.
    """
    everyone = [Arm(PLAN, plan), *arms]
    chosen = {PLAN: plan_lr, **(rates or {})}
    for arm in arms:
        if arm.name not in chosen and arm.trial(1.0).is_plan:
            compared = plan_lr if arm.mask == plan else bench.compared_lr(arm.mask)
            if compared is not None:
                chosen[arm.name] = compared
    unknown = [arm for arm in arms if arm.name not in chosen]
    short = {arm.name: [arm.trial(lr, 0, bench.fidelity) for lr in bench.lrs] for arm in unknown}
    known = dict(value_batch([trial for trials in short.values() for trial in trials]))
    for name, trials in short.items():
        chosen[name] = max(trials, key=lambda trial: (accuracy_of(known[trial]), -trial.lr)).lr
    everything = next((arm for arm in arms if arm.name == ALL and arm.mask != plan), None)
    if everything is not None:
        rate = _rate_at_full_length(everything, bench, value_batch)
        # Another rule may have named the same plan; one plan has one rate.
        chosen |= {arm.name: rate for arm in arms if arm.mask == everything.mask and arm.trial(1.0).is_plan}
    # Seed by seed, so that an interrupted report has complete rows to compare.
    runs = {
        arm.name: [arm.trial(chosen[arm.name], REPORT_REPEAT + seed) for seed in range(bench.seeds)]
        for arm in everyone
    }
    order = [runs[arm.name][seed] for seed in range(bench.seeds) for arm in everyone]
    found = value_batch(list(dict.fromkeys(order)))
    test = {arm.name: tuple(found[trial].test for trial in runs[arm.name]) for arm in everyone}
    return [_result(arm, chosen[arm.name], runs[arm.name], found, test, bench.space) for arm in everyone]


def _rate_at_full_length(arm: Arm, bench: Bench, value_batch: ValueBatch) -> float:
    """The best rate at full length: of all where the search valued all, else of the two best on the short rung."""
    full = [arm.trial(lr) for lr in bench.lrs]
    if all(trial in bench.history for trial in full):
        return max(full, key=lambda trial: (accuracy_of(bench.history[trial]), -trial.lr)).lr
    candidates = bench.lrs
    for length, kept in ((bench.fidelity, FULL_LENGTH_RATES), (1.0, 1)):
        trials = [arm.trial(lr, 0, length) for lr in candidates]
        found = value_batch(trials)
        best = sorted(trials, key=lambda trial: (-accuracy_of(found[trial]), trial.lr))
        candidates = tuple(trial.lr for trial in best[:kept])
    return candidates[0]


def _result(
    arm: Arm,
    lr: float,
    trials: Sequence[Trial],
    found: Mapping[Trial, Outcome],
    test: Mapping[str, tuple[float | None, ...]],
    space: Space,
) -> ArmResult:
    values = test[arm.name]
    finite = [value for value in values if value is not None]
    interval = mean_interval(finite) if len(finite) > 1 else None
    reasons = [found[trial].reason for trial in trials if found[trial].reason]
    params = next(
        (
            int(found[trial].facts["trainable_parameters"])
            for trial in trials
            if "trainable_parameters" in found[trial].facts
        ),
        space.params(arm.mask),
    )
    return ArmResult(
        arm=arm,
        lr=lr,
        params=params,
        cost=space.cost(trials[0]),
        seconds=float(np.mean([found[trial].seconds for trial in trials])),
        test=values,
        mean=float(np.mean(finite)) if finite else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        stderr=interval.stderr if interval else None,
        against_all=None if arm.name == ALL else paired(values, test.get(ALL)),
        against_plan=None if arm.name == PLAN else paired(values, test.get(PLAN)),
        reason=reasons[0] if reasons else None,
    )


def paired(a: Sequence[float | None], b: Sequence[float | None] | None) -> Comparison | None:
    """Paired comparison over the seeds on which both arms have a value; None with fewer than two."""
    both = [(x, y) for x, y in zip(a, b or (), strict=False) if x is not None and y is not None]
    if len(both) < 2 or not all(math.isfinite(x) and math.isfinite(y) for x, y in both):
        return None
    found = compare([x for x, _ in both], [y for _, y in both])
    return replace(found, failed=len(a) - len(both))
