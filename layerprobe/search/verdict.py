"""What a search may claim: the verdict on the plan, on all and on none, from trainings on unseen seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import optimize

from layerprobe.metrics.inference import PooledArms, detectable_difference, equivalence_pvalue, holm
from layerprobe.metrics.intervals import interval_in_words
from layerprobe.records import Estimate
from layerprobe.search.space import Mask, Space

TRAIN_THESE, TRAIN_ALL, TRAIN_NONE = "train these", "train all", "train none"
NO_DIFFERENCE, UNKNOWN = "no difference", "not judged"
LEVEL = 0.05
"""Claims are made at this level, corrected for their number (Holm)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to "which blocks should be trained?".

    Attributes
    ----------
    kind : str
        "train these", "train all", "train none", "no difference", or "not judged" where trainings failed.
    mask : Mask
        The plan that the verdict recommends.
    arms : Mapping[str, Mask]
        The plans that were compared: name → plan.
    margin : float | None
        For "no difference": the smallest margin, as a share in [0, 1], within which all differences lie by two
            one-sided tests at 5 %.
    differences : dict[tuple[str, str], Estimate]
        Of every pair of arms, with Holm's p-values.
    detectable : float | None
        Difference that these trainings find in 8 of 10 cases, as a share; image sampling left out.
    """

    kind: str
    mask: Mask
    arms: Mapping[str, Mask]
    margin: float | None
    differences: dict[tuple[str, str], Estimate]
    detectable: float | None


def decide(
    arms: Mapping[str, Mask],
    pooled: PooledArms | None,
    space: Space,
    *,
    tolerance: float,
) -> Verdict:
    """The verdict on `arms`, of which "plan" is the search's answer.

    Claims are differences that survive Holm's correction over all pairs. Without any, the verdict is "no
    difference". Else it is the smallest arm that no other arm beats, and whose mean is at most `tolerance` below the
    best.

    Parameters
    ----------
    arms : Mapping[str, Mask]
        Name → plan: "plan", "all" and "none", where equal plans stand once, under the last of these names.
    pooled : PooledArms | None
        Test accuracies of the arms on common unseen seeds; None where too few trainings came through.
    tolerance : float
        Accuracy that fewer trained parameters may cost, as a share.
    """
    wanted = arms.get("plan") or next(mask for mask in arms.values() if space.allows(mask))
    if pooled is None or any(name not in pooled.arms for name in arms):
        return Verdict(kind=UNKNOWN, mask=wanted, arms=arms, margin=None, differences={}, detectable=None)
    pairs = list(combinations(arms, 2))
    found = [pooled.difference(first, second) for first, second in pairs]
    corrected = holm([1.0 if e.pvalue is None else e.pvalue for e in found])
    differences = dict(zip(pairs, found, strict=True))
    beaten = {
        second if (e.value or 0.0) > 0 else first
        for (first, second), e, p in zip(pairs, found, corrected, strict=True)
        if p < LEVEL
    }
    n_seeds = min(len(pooled.values[name]) for name in arms)
    detectable = detectable_difference(pooled.noise, n_seeds, pooled.freedom)
    if not beaten:
        margin = max(equivalence_margin(e) for e in found)
        smallest = min((mask for mask in arms.values() if space.allows(mask)), key=space.params)
        return Verdict(
            kind=NO_DIFFERENCE,
            mask=smallest,
            arms=arms,
            margin=margin,
            differences=differences,
            detectable=detectable,
        )
    means = {name: float(np.mean(list(pooled.values[name].values()))) for name in arms}
    allowed = [name for name in arms if space.allows(arms[name])]
    standing = [name for name in allowed if name not in beaten] or allowed
    best = max(means[name] for name in standing)
    near = [name for name in standing if means[name] >= best - tolerance]
    name = min(near, key=lambda one: space.params(arms[one]))
    kind = {"all": TRAIN_ALL, "none": TRAIN_NONE}.get(name, TRAIN_THESE)
    return Verdict(
        kind=kind, mask=arms[name], arms=arms, margin=None, differences=differences, detectable=detectable
    )


def equivalence_margin(difference: Estimate) -> float:
    """The smallest margin within which a difference lies by two one-sided tests at 5 %; 1 where it is undefined."""
    if difference.value is None or not difference.stderr:
        return 1.0 if difference.value is None else abs(difference.value)

    def excess(margin: float) -> float:
        return equivalence_pvalue(difference, margin) - LEVEL

    least = abs(difference.value)
    return 1.0 if excess(1.0) > 0 else float(optimize.brentq(excess, least, 1.0))


def sentence(
    verdict: Verdict,
    space: Space,
    *,
    test: Estimate | None,
    seeds: Sequence[int],
    adapter_rank: int | None = None,
) -> str:
    """The verdict in plain words, with the accuracies and differences that carry it.

    Parameters
    ----------
    test : Estimate | None
        Test accuracy of the recommended plan.
    seeds : Sequence[int]
        Unseen seeds of the trainings.
    """
    what = recommendation(verdict.mask, space, adapter_rank=adapter_rank)
    accuracy = "" if test is None or test.value is None else f" Test accuracy {100 * test.value:.1f} %."
    if verdict.kind == UNKNOWN:
        return f"{what}{accuracy} Too few trainings on unseen seeds came through to compare it."
    if verdict.kind == NO_DIFFERENCE:
        assert verdict.margin is not None and verdict.detectable is not None
        others = [mask for mask in verdict.arms.values() if mask != verdict.mask]
        if not others:
            return f"{what}{accuracy} Nothing else was there to compare it with."
        return (
            f"{what}{accuracy} No difference larger than {points(verdict.margin)} points to training "
            f"{' or '.join(map(space.describe, others))} ({len(seeds)} unseen seeds; a difference of "
            f"{points(verdict.detectable)} points would be found in 8 of 10 cases)."
        )
    parts = []
    for (first, second), estimate in verdict.differences.items():
        for one, other, sign in ((first, second, 1), (second, first, -1)):
            if one == _name(verdict) and estimate.low is not None and estimate.high is not None:
                value, low, high = (sign * (x or 0.0) for x in (estimate.value, estimate.low, estimate.high))
                ends = interval_in_words(min(low, high), max(low, high), sign=True)
                parts.append(f"{100 * value:+.1f} points against {other} (95 % interval {ends})")
    return f"{what}{accuracy} {'; '.join(parts)}; {len(seeds)} unseen seeds."


def recommendation(mask: Mask, space: Space, *, adapter_rank: int | None = None) -> str:
    """The plan in words; `adapter_rank` is that of adapters, where these are placed instead of training weights.

    >>> recommendation((True, False), Space((1, 3)))
    "Train block 0, freeze the rest (25 % of the blocks' parameters train)."
    """
    if not any(mask):
        return "Train stem and head alone and freeze all blocks."
    share = space.params(mask) / max(1, sum(space.unit_params))
    if adapter_rank is not None:
        where = (
            "everywhere" if all(mask) else f"on {space.describe(mask)} ({100 * share:.0f} % of all of them)"
        )
        return f"Place adapters of rank {adapter_rank} {where}."
    if all(mask):
        return "Train all blocks."
    return f"Train {space.describe(mask)}, freeze the rest ({100 * share:.0f} % of the blocks' parameters train)."


def points(share: float) -> str:
    """A share as percentage points.

    >>> points(0.0123)
    '1.2'
    """
    return f"{100 * share:.1f}"


def _name(verdict: Verdict) -> str:
    return {TRAIN_ALL: "all", TRAIN_NONE: "none"}.get(verdict.kind, "plan")
