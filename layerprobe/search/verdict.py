"""How a search ends: which finalist is chosen, how sure that is, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import paired_seed_interval
from layerprobe.search.space import Mask, Space, describe_mask


@dataclass(frozen=True)
class Finalist:
    """A plan valued at full length on the common seeds.

    Attributes
    ----------
    mask : the plan. lr : its learning rate. accuracies : validation accuracy per common seed, in seed order.
    """

    mask: Mask
    lr: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


def pooled_stderr(finalists: Sequence[Finalist]) -> float:
    """Standard error of one finalist's mean, with the spread over seeds pooled over all finalists.

    A handful of seeds says little about the spread of one plan; the plans together say more. Failed runs
    (−inf) are left out of the pool. Zero when nothing could be pooled.
    """
    groups = [np.asarray(f.accuracies) for f in finalists if len(f.accuracies) > 1 and math.isfinite(f.mean)]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return 0.0
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
    return math.sqrt(variance / min(len(group) for group in groups))


def contenders(finalists: Sequence[Finalist]) -> list[Finalist]:
    """The finalists with the most common seeds; the finals go on without the others, whose means are not comparable."""
    usable = [finalist for finalist in finalists if math.isfinite(finalist.mean)]
    most = max((len(finalist.accuracies) for finalist in usable), default=0)
    return [finalist for finalist in usable if len(finalist.accuracies) == most]


def choose(finalists: Sequence[Finalist], space: Space, *, objective: str = "frugal") -> Finalist:
    """The answer among the contenders: the one-standard-error rule, or the best alone.

    'frugal' takes, among plans whose mean over seeds is at most one standard error below the best, the one with the
    fewest trainable parameters; ties go to the better mean. 'accuracy' takes the best; ties go to fewer parameters.

    Parameters
    ----------
    finalists : plans on common seeds; those with fewer seeds than others are out of the race.
    space : tells parameters per plan.

    Raises
    ------
    UsageError : no finalist, or all their runs failed.

    References
    ----------
    Breiman, Friedman, Olshen, Stone, Classification and Regression Trees, 1984, section 3.4.3.
    """
    usable = contenders(finalists)
    if not usable:
        raise UsageError(
            "no plan came through the finals: of each at least one run on the common seeds failed; "
            "smaller --lrs may help"
        )
    best = max(usable, key=lambda f: (f.mean, -space.params(f.mask)))
    if objective == "accuracy":
        return best
    bar = best.mean - pooled_stderr(usable)
    near = [f for f in usable if f.mean >= bar - 1e-12]
    return min(near, key=lambda f: (space.params(f.mask), -f.mean))


@dataclass(frozen=True)
class Comparison:
    """A plan against another arm on the report's seeds, in test accuracy (share of images, in [0, 1])."""

    difference: float
    low: float
    high: float
    probability: float
    n: int
    failed: int = 0
    """Seeds on which one of the two has no value, because its run failed."""


def compare(plan: Sequence[float], other: Sequence[float]) -> Comparison:
    """Paired difference plan − other over common seeds, with t interval and P(plan is better)."""
    paired = paired_seed_interval(plan, other)
    return Comparison(paired.value, paired.low, paired.high, paired.probability, len(plan))  # type: ignore[arg-type]


MIN_SEEDS = 3
"""Fewer paired seeds claim nothing (PROTOCOL.md, section 8)."""


def too_little(against_all: Comparison) -> str:
    """Why a comparison can claim nothing, whatever its interval; empty where it can."""
    if against_all.n < MIN_SEEDS:
        return f"{against_all.n} paired seeds are too few for a claim"
    if against_all.failed:
        runs = against_all.n + against_all.failed
        return f"on {against_all.failed} of {runs} unseen seeds a run failed, and those are not in it"
    # Differences of shares: equal ones may be apart by their rounding.
    if math.isclose(against_all.low, against_all.high, rel_tol=0.0, abs_tol=1e-9):
        return "all seeds differ by the same amount, which is no measure of their spread"
    return ""


def verdict_kind(mask: Mask, against_all: Comparison | None) -> str:
    """One of 'train everything', 'better', 'worse', 'no difference found', 'not compared'."""
    if all(mask):
        return "train everything"
    if against_all is None:
        return "not compared"
    if too_little(against_all):
        return "no difference found"
    if against_all.low > 0:
        return "better"
    if against_all.high < 0:
        return "worse"
    return "no difference found"


def verdict_sentence(
    mask: Mask,
    space: Space,
    against_all: Comparison | None,
    *,
    objective: str = "frugal",
    test_mean: float | None = None,
    n_finalists: int = 2,
) -> str:
    """The answer in plain words, also when it is "train everything" or "no difference found".

    `n_finalists` is the number of plans that the choice was among; with one, nothing could be compared.
    """
    share = space.params(mask) / max(1, sum(space.block_params))
    kind = verdict_kind(mask, against_all)
    accuracy = "" if test_mean is None else f" Test accuracy {100 * test_mean:.1f} %."
    if kind == "train everything":
        why = (
            "only one finalist finished on several seeds (budget, or failed runs), so nothing was compared with it"
            if n_finalists < 2
            else "no smaller plan among the finalists came within one standard error of the best"
            if objective == "frugal"
            else "no smaller plan among the finalists reached a higher validation accuracy"
        )
        return f"Train everything: {why}.{accuracy}"
    what = (
        f"Train {describe_mask(mask)}, freeze the rest ({100 * share:.0f} % of the blocks' parameters train)."
    )
    if not any(mask):
        what = "Train the stem and head alone and freeze all blocks."
    if against_all is None:
        return (
            f"{what}{accuracy} Too few runs on unseen seeds finished to compare it with training everything."
        )
    low, high = 100 * against_all.low, 100 * against_all.high
    difference = 100 * against_all.difference
    interval = (
        f"{difference:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, {against_all.n} unseen seeds)"
    )
    sure = f"probability that the plan is better: {against_all.probability:.2f}"
    if kind == "better":
        return f"{what}{accuracy} It beats training everything by {interval}; {sure}."
    if kind == "worse":
        return f"{what}{accuracy} On unseen seeds it loses to training everything: {interval}; {sure}."
    if reason := too_little(against_all):
        return f"{what}{accuracy} No difference found to training everything: {interval}; {reason}."
    return f"{what}{accuracy} No difference found to training everything: {interval}; {sure}."


def pareto_front(points: Mapping[Mask, tuple[float, float]]) -> list[Mask]:
    """Plans that no other plan beats in both accuracy (higher) and cost (lower).

    Parameters
    ----------
    points : plan → (accuracy, cost).

    Returns
    -------
    list of plans, cheapest first. Among equal points the first one stays.
    """
    front: list[Mask] = []
    best = -math.inf
    for mask, (accuracy, _) in sorted(points.items(), key=lambda item: (item[1][1], -item[1][0])):
        if accuracy > best:
            front.append(mask)
            best = accuracy
    return front
