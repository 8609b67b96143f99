"""What a search may claim: the verdict on the plan, on all and on none, from trainings on unseen seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from scipy import optimize

from layerprobe.metrics.inference import PooledArms, detectable_difference, equivalence_pvalue, holm
from layerprobe.metrics.intervals import interval_in_words
from layerprobe.records import Estimate
from layerprobe.search.space import Mask, Space
from layerprobe.tables import share_text

TRAIN_THESE, TRAIN_ALL, TRAIN_NONE = "train these", "train all", "train none"
NO_DIFFERENCE, UNDECIDED, UNKNOWN = "no difference", "not decided", "not judged"
LEVEL = 0.05
"""Claims are made at this level, corrected for their number (Holm)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to "which blocks should be trained?".

    Attributes
    ----------
    kind : str
        "train these", "train all", "train none"; "no difference", where all differences lie within a margin that was
        stated before; "not decided", where they may be larger and none is shown; "not judged" where trainings failed.
    mask : Mask
        The plan that the verdict recommends.
    arms : Mapping[str, Mask]
        The plans that were compared: name → plan.
    margin : float | None
        Where no difference is shown: the smallest margin, as a share in [0, 1], within which all differences lie by
        two one-sided tests at 5 %.
    differences : dict[tuple[str, str], Estimate]
        Of every pair of arms; `pvalue` is corrected for their number (Holm), the interval is not.
    detectable : float | None
        Difference of any pair that trainings as noisy, on these images, turn into a claim in 8 of 10 cases, as a
        share.
    failed : Mapping[str, int]
        Name → trainings that failed, of arms with any. An arm with failures is recommended only where all have some.
    """

    kind: str
    mask: Mask
    arms: Mapping[str, Mask]
    margin: float | None
    differences: dict[tuple[str, str], Estimate]
    detectable: float | None
    failed: Mapping[str, int] = field(default_factory=dict)


def decide(
    arms: Mapping[str, Mask],
    pooled: PooledArms | None,
    space: Space,
    *,
    tolerance: float,
    margin: float,
    n_seeds: int,
) -> Verdict:
    """The verdict on `arms`, of which "plan" is the search's answer.

    Claims are differences that survive Holm's correction over all pairs. What is recommended is the smallest arm
    that no other arm beats, and whose mean is at most `tolerance` below the best of these.

    Parameters
    ----------
    arms : Mapping[str, Mask]
        Name → plan: "plan", "all" and "none", where equal plans stand once, under the last of these names.
    pooled : PooledArms | None
        Test accuracies of the arms on common unseen seeds; None where too few trainings came through.
    tolerance : float
        Accuracy that fewer trained parameters may cost, as a share; 0 recommends the best mean.
    margin : float
        The largest difference, as a share, of which "no difference" may be said.
    n_seeds : int
        Trainings of each arm, those that failed included.
    """
    wanted = arms.get("plan") or next(mask for mask in arms.values() if space.allows(mask))
    if pooled is None or any(name not in pooled.arms for name in arms):
        return Verdict(kind=UNKNOWN, mask=wanted, arms=arms, margin=None, differences={}, detectable=None)
    pairs = list(combinations(arms, 2))
    found = [pooled.difference(first, second) for first, second in pairs]
    corrected = holm([1.0 if e.pvalue is None else e.pvalue for e in found])
    found = [e if e.pvalue is None else replace(e, pvalue=p) for e, p in zip(found, corrected, strict=True)]
    beaten = {
        second if (e.value or 0.0) > 0 else first
        for (first, second), e, p in zip(pairs, found, corrected, strict=True)
        if p < LEVEL
    }
    failed = {name: missing for name in arms if (missing := n_seeds - len(pooled.values[name]))}
    means = {name: float(np.mean(list(pooled.values[name].values()))) for name in arms}
    allowed = [name for name in arms if space.allows(arms[name])]
    steady = [name for name in allowed if name not in failed] or allowed
    standing = [name for name in steady if name not in beaten] or steady
    best = max(means[name] for name in standing)
    near = [name for name in standing if means[name] >= best - tolerance]
    name = min(near, key=lambda one: space.params(arms[one]))
    kind = {"all": TRAIN_ALL, "none": TRAIN_NONE}.get(name, TRAIN_THESE)
    reached = None
    if not beaten:
        reached = max((equivalence_margin(e) for e in found), default=0.0)
        kind = NO_DIFFERENCE if reached <= margin else UNDECIDED
    return Verdict(
        kind=kind,
        mask=arms[name],
        arms=arms,
        margin=reached,
        differences=dict(zip(pairs, found, strict=True)),
        detectable=max((_detectable(e, len(pairs)) for e in found), default=None),
        failed=failed,
    )


def _detectable(difference: Estimate, claims: int) -> float:
    if difference.stderr is None or difference.freedom is None:
        return 1.0
    return min(1.0, detectable_difference(difference.stderr, difference.freedom, claims=claims))


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
    n_seeds: int,
    adapter_rank: int | None = None,
) -> str:
    """The verdict in plain words, with the accuracies and differences that carry it.

    Parameters
    ----------
    test : Estimate | None
        Test accuracy of the recommended plan.
    n_seeds : int
        Unseen seeds of the trainings.
    """
    what = recommendation(verdict.mask, space, adapter_rank=adapter_rank)
    accuracy = "" if test is None or test.value is None else f" Test accuracy {100 * test.value:.1f} %."
    if verdict.kind == UNKNOWN:
        return f"{what}{accuracy} Too few trainings on unseen seeds came through to compare it."
    name = next(name for name, mask in verdict.arms.items() if mask == verdict.mask)
    others = [mask for mask in verdict.arms.values() if mask != verdict.mask]
    seeds = f"{n_seeds} unseen seeds" + "".join(
        f"; {count} of {n_seeds} trainings of {'the plan' if one == 'plan' else one} failed"
        for one, count in verdict.failed.items()
    )
    if not others:
        return f"{what}{accuracy} Nothing else was there to compare it with."
    if verdict.margin is not None:
        against = " or ".join(map(space.describe, others))
        size = points(verdict.margin)
        claim = (
            f"No difference is shown to training {against}, and one larger than {size} points is excluded"
            if verdict.kind == NO_DIFFERENCE
            else f"Not decided: a difference of up to {size} points to training {against} is neither shown nor excluded"
        )
        return f"{what}{accuracy} {claim} (at 95 %; {seeds})."
    parts = []
    for (first, second), estimate in verdict.differences.items():
        for one, other, sign in ((first, second, 1), (second, first, -1)):
            if one == name and estimate.low is not None and estimate.high is not None:
                value, low, high = (sign * (x or 0.0) for x in (estimate.value, estimate.low, estimate.high))
                ends = interval_in_words(min(low, high), max(low, high), sign=True)
                parts.append(f"{100 * value:+.1f} points against {other} (95 % interval {ends})")
    return f"{what}{accuracy} {'; '.join(parts)}; {seeds}."


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
            "everywhere" if all(mask) else f"on {space.describe(mask)} ({share_text(share)} of all of them)"
        )
        return f"Place adapters of rank {adapter_rank} {where}."
    if all(mask):
        return "Train all blocks."
    return f"Train {space.describe(mask)}, freeze the rest ({share_text(share)} of the blocks' parameters train)."


def points(share: float) -> str:
    """A share as percentage points.

    >>> points(0.0123)
    '1.2'
    """
    return f"{100 * share:.1f}"
