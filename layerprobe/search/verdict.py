"""How a search ends: which finalist is chosen, how sure that is, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import interval_in_words, paired_seed_interval
from layerprobe.records import Estimate
from layerprobe.search.space import Mask, Space, describe_mask

MIN_SEEDS = 3
"""Fewer paired seeds claim nothing."""


@dataclass(frozen=True)
class Finalist:
    """A plan trained at full length on the common seeds.

    Attributes
    ----------
    mask : Mask
        The plan.
    lr : float
        Its learning rate.
    accuracies : tuple[float, ...]
        Validation accuracy per common seed, in seed order.
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
    """The finalists with the most common seeds; the means of the others are not comparable."""
    usable = [finalist for finalist in finalists if math.isfinite(finalist.mean)]
    most = max((len(finalist.accuracies) for finalist in usable), default=0)
    return [finalist for finalist in usable if len(finalist.accuracies) == most]


def choose(finalists: Sequence[Finalist], space: Space, *, objective: str = "frugal") -> Finalist:
    """The answer among the contenders: the one-standard-error rule, or the best alone.

    'frugal' takes, among plans whose mean over seeds is at most one standard error below the best, the one with the
    fewest trainable parameters; ties go to the better mean. 'accuracy' takes the best; ties go to fewer parameters.

    Parameters
    ----------
    finalists : Sequence[Finalist]
        Plans on common seeds; those with fewer seeds than others are left out.
    space : Space
        Says how many parameters a plan trains.

    Raises
    ------
    UsageError
        No finalist, or all their runs failed.

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


class Difference(NamedTuple):
    """Paired difference in test accuracy to another line of the report, over the report's seeds.

    Attributes
    ----------
    estimate : Estimate
        Difference in shares, with t interval and the probability that it is above 0; n counts seeds.
    failed : int
        Seeds on which one of the two has no value, because its run failed.
    """

    estimate: Estimate
    failed: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        """The form that result files hold."""
        e = self.estimate
        return {
            "difference": e.value,
            "low": e.low,
            "high": e.high,
            "probability": e.probability,
            "n": e.n,
            "failed": self.failed,
        }

    @property
    def missing(self) -> str:
        """Why nothing can be claimed, whatever the interval; empty where something can."""
        e = self.estimate
        assert e.n is not None and e.low is not None and e.high is not None
        if e.n < MIN_SEEDS:
            return f"{e.n} paired seeds are too few for a claim"
        if self.failed:
            runs = e.n + self.failed
            return f"on {self.failed} of {runs} unseen seeds a run failed, and those are not in it"
        # Differences of shares: equal ones may be apart by their rounding.
        if math.isclose(e.low, e.high, rel_tol=0.0, abs_tol=1e-9):
            return "all seeds differ by the same amount, which is no measure of their spread"
        return ""


def compare(plan: Sequence[float | None], other: Sequence[float | None] | None) -> Difference | None:
    """plan − other over the seeds on which both have a value; None with fewer than two."""
    both = [(a, b) for a, b in zip(plan, other or (), strict=False) if a is not None and b is not None]
    if len(both) < 2 or not all(math.isfinite(a) and math.isfinite(b) for a, b in both):
        return None
    estimate = paired_seed_interval([a for a, _ in both], [b for _, b in both])
    return Difference(estimate, failed=len(plan) - len(both))


def verdict_kind(mask: Mask, against_all: Difference | None) -> str:
    """One of 'train everything', 'better', 'worse', 'no difference found', 'not compared'."""
    if all(mask):
        return "train everything"
    if against_all is None:
        return "not compared"
    estimate = against_all.estimate
    if not against_all.missing and estimate.low is not None and estimate.low > 0:
        return "better"
    if not against_all.missing and estimate.high is not None and estimate.high < 0:
        return "worse"
    return "no difference found"


def verdict_sentence(
    mask: Mask,
    space: Space,
    against_all: Difference | None,
    *,
    objective: str = "frugal",
    test_mean: float | None = None,
    n_finalists: int = 2,
    adapter_rank: int | None = None,
) -> str:
    """The answer in plain words, also when it is "train everything" or "no difference found".

    `n_finalists` is the number of plans that the choice was among; with one, nothing could be compared. `adapter_rank`
    is that of adapters, where these are placed instead of training weights.
    """
    accuracy = "" if test_mean is None else f" Test accuracy {100 * test_mean:.1f} %."
    if all(mask):
        if n_finalists < 2:
            why = (
                "only one finalist finished on several seeds (budget, or failed runs), "
                "so nothing was compared with it"
            )
        elif objective == "frugal":
            why = "no smaller plan among the finalists came within one standard error of the best"
        else:
            why = "no smaller plan among the finalists reached a higher validation accuracy"
        everything = (
            "Train everything"
            if adapter_rank is None
            else f"Place adapters of rank {adapter_rank} everywhere"
        )
        return f"{everything}: {why}.{accuracy}"
    share = space.params(mask) / max(1, sum(space.block_params))
    what = (
        f"Train {describe_mask(mask)}, freeze the rest ({100 * share:.0f} % of the blocks' parameters train)."
    )
    if adapter_rank is not None:
        what = f"Place adapters of rank {adapter_rank} on {describe_mask(mask)} ({100 * share:.0f} % of all of them)."
    if not any(mask):
        what = "Train the stem and head alone and freeze all blocks."
    if against_all is None:
        return (
            f"{what}{accuracy} Too few runs on unseen seeds finished to compare it with training everything."
        )
    e = against_all.estimate
    assert e.value is not None and e.low is not None and e.high is not None
    ends = interval_in_words(e.low, e.high, sign=True)
    interval = f"{100 * e.value:+.1f} points (95 % interval {ends}, {e.n} unseen seeds)"
    sure = f"probability that the plan is better: {e.probability:.2f}"
    kind = verdict_kind(mask, against_all)
    if kind == "better":
        return f"{what}{accuracy} It beats training everything by {interval}; {sure}."
    if kind == "worse":
        return f"{what}{accuracy} On unseen seeds it loses to training everything: {interval}; {sure}."
    return f"{what}{accuracy} No difference found to training everything: {interval}; {against_all.missing or sure}."
