"""The pilot of a search: how long a training must be to learn, at which rates, and how long that takes here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.reading import Schema, check_fields
from layerprobe.search.budget import TrainBatch
from layerprobe.search.settings import Settings
from layerprobe.search.space import Space, Trial

SHORTEST_STEPS = 200
"""Rates are compared at this length: shorter trainings favour other rates than long ones."""
PLATEAU_SHARE = 0.95
"""A training is long enough when it reaches this share of the plateau."""
RATE_STEP = 3.0
MOST_MOVES = 3
"""How often the grid of learning rates may move."""


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What the pilot found.

    Attributes
    ----------
    length : float
        Full length of a training, as a share of the settings' steps.
    lrs : tuple[float, ...]
        The grid of learning rates.
    accuracies : dict[int, float]
        Steps → validation accuracy of training all blocks.
    plateau : float | None
        To which that tends, extrapolated; None where it was not asked for.
    reached : bool
        Whether full length reaches `PLATEAU_SHARE` of the plateau; else the limit of steps was met.
    seconds : float
        Of one full-length training of all blocks, its evaluation included.
    """

    length: float
    lrs: tuple[float, ...]
    accuracies: dict[int, float]
    plateau: float | None
    reached: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return asdict(self) | {"accuracies": {str(n): a for n, a in self.accuracies.items()}}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Pilot:
        """What `to_dict` gave; BrokenFileError for anything else."""
        check_fields(stored, PILOT_FIELDS, "the pilot in the search's database")
        accuracies = {int(n): a for n, a in stored["accuracies"].items()}
        known = {name: stored[name] for name in PILOT_FIELDS}
        return cls(**{**known, "lrs": tuple(stored["lrs"]), "accuracies": accuracies})


PILOT_FIELDS: dict[str, Schema] = {
    "length": float, "lrs": [float], "accuracies": {}, "plateau": (float, type(None)), "reached": bool,
    "seconds": float,
}  # fmt: skip


def run_pilot(train_batch: TrainBatch, space: Space, settings: Settings) -> Pilot:
    """Train all blocks: at every rate of the grid, moved until the best is inside; then for twice as long, again
    and again, until the accuracy that is reached is 95 % of the plateau.

    The plateau is extrapolated from the gains of the last two doublings, taken for a geometric series. UsageError where
    every training fails.
    """
    limit = settings.steps[1]
    shortest = min(1.0, SHORTEST_STEPS / limit) if settings.find_length else 1.0
    lrs = tuple(settings.lrs)
    found: dict[Trial, float] = {}
    seconds: dict[float, float] = {}

    def train(rates: tuple[float, ...], length: float) -> None:
        wanted = [Trial(mask=space.all, lr=lr, fidelity=length) for lr in rates]
        for trial, outcome in train_batch(wanted).items():
            found[trial] = outcome.ranked_accuracy
            seconds[length] = max(outcome.call_seconds, outcome.train_seconds)

    def best() -> float:
        at = {trial.lr: accuracy for trial, accuracy in found.items() if trial.fidelity == shortest}
        return max(sorted(at), key=lambda lr: at[lr])

    train(lrs, shortest)
    for _ in range(MOST_MOVES if settings.find_lrs else 0):
        lowest, highest = min(lrs), max(lrs)
        if best() == highest:
            lrs = (*lrs, _rounded(highest * RATE_STEP))
        elif best() == lowest:
            lrs = (_rounded(lowest / RATE_STEP), *lrs)
        else:
            break
        train(lrs, shortest)
    lr = best()
    if not any(math.isfinite(accuracy) for accuracy in found.values()):
        raise UsageError(
            f"training all blocks fails at the learning rates {', '.join(f'{lr:g}' for lr in lrs)}; give smaller --lrs"
        )
    if settings.find_lrs:  # the best rate and its neighbours
        centre = min(max(lrs.index(lr), 1), len(lrs) - 2)
        lrs = lrs[centre - 1 : centre + 2]
    lengths = [shortest]
    plateau: float | None = None
    while settings.find_length:
        accuracies = [found[Trial(mask=space.all, lr=lr, fidelity=length)] for length in lengths]
        if not math.isfinite(accuracies[-1]):  # longer ones at this rate would fail, too
            lengths.pop()
            break
        if len(lengths) >= 3:
            plateau = extrapolated(accuracies)
            if accuracies[-1] >= PLATEAU_SHARE * plateau:
                break
        if lengths[-1] >= 1.0:
            break
        lengths.append(min(1.0, 2 * lengths[-1]))
        train((lr,), lengths[-1])
    reached = {length: found[Trial(mask=space.all, lr=lr, fidelity=length)] for length in lengths}
    enough = [n for n in lengths if plateau is not None and reached[n] >= PLATEAU_SHARE * plateau]
    length = min(enough, default=lengths[-1])
    return Pilot(
        length=length,
        lrs=lrs,
        accuracies={round(length * limit): accuracy for length, accuracy in reached.items()},
        plateau=plateau,
        reached=bool(enough) or not settings.find_length,
        seconds=seconds[length],
    )


def extrapolated(accuracies: list[float]) -> float:
    """The limit of accuracies at doubling lengths, from their last two gains as a geometric series; at most 1.

    >>> round(extrapolated([0.7, 0.8, 0.85]), 3)
    0.9
    """
    before, middle, last = accuracies[-3:]
    first_gain, gain = middle - before, last - middle
    if gain <= 0 or first_gain <= 0:
        return min(1.0, max(accuracies))
    ratio = float(np.clip(gain / first_gain, 0.0, 0.8))
    return min(1.0, last + gain * ratio / (1 - ratio))


def _rounded(lr: float) -> float:
    """The rate with two digits: 0.009 rather than 0.0090000001."""
    return float(f"{lr:.2g}")
