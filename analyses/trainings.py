"""Trainings of a study: kept, never repeated, and scored by the rules of the search."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import study
from study import Answer, Setup, digest, short

from layerprobe.backbones import Backbone
from layerprobe.metrics.inference import PooledArms, holm
from layerprobe.progress import note
from layerprobe.search.run import prepare
from layerprobe.search.settings import Settings, identify
from layerprobe.search.space import REPORT_REPEAT, Mask, Trial, strip
from layerprobe.tasks import Task
from layerprobe.training import Outcome

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
# Tables of every plan are made and replayed by the benchmark of the search; studies read the same ones.
from agreement import permutation_agreement, score_agreement
from replay import ExhaustiveTable, Truth, frugal_plan

__all__ = [
    "ExhaustiveTable",
    "Trainings",
    "Truth",
    "frugal_plan",
    "mean_in_words",
    "noise_in_words",
    "outcome_rows",
    "own_rate",
    "permutation_agreement",
    "pooled_claims",
    "score_agreement",
    "trial_rows",
]


class Trainings:
    """Bridge and fine-tuning of one backbone on one task, kept and never repeated."""

    def __init__(self, setup: Setup, label: str, backbone: Backbone, task: Task, settings: Settings) -> None:
        self.settings, self.label, self.task = settings, label, task
        identity = {**identify(backbone, task, settings), "study": setup.name}
        path = study.WORK / setup.name / f"{label}-{digest(identity)}.db"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.runner = prepare(backbone, task, settings, path, study=setup.name)
        self.space = self.runner.space

    def outcomes(self, trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        """Outcomes of `trials`, one after the other, with a line of progress every ten."""
        found: dict[Trial, Outcome] = {}
        for count, trial in enumerate(dict.fromkeys(trials), start=1):
            found |= self.runner.outcomes([trial])
            if count % 10 == 0:
                note(f"{self.label}: {count} of {len(trials)} trainings")
        return found

    def plans(self, masks: Sequence[Mask], *, unseen: int | None = None) -> ExhaustiveTable:
        """Plans scored by the search's rules: own rate on repeat 0, then selection and `unseen` repeats.

        As many unseen repeats as selection repeats unless said otherwise. The table holds these `masks` alone,
        whatever its space; read them by `validation` and `test`.
        """
        s = self.settings
        found = self.outcomes([Trial(mask=mask, lr=lr) for mask in masks for lr in s.lrs])
        table = ExhaustiveTable(name=self.label, space=self.space, lrs=s.lrs, seeds=s.seeds, outcomes=found)
        rates = {mask: table.own_lr(mask) for mask in masks}
        judging = range(REPORT_REPEAT, REPORT_REPEAT + (unseen or s.seeds))
        repeats = [*range(1, s.seeds), *judging]
        found |= self.outcomes(
            [Trial(mask=mask, lr=rates[mask], repeat=r) for r in repeats for mask in masks]
        )
        return table


def trial_rows(found: Mapping[Trial, Outcome], **constants: Any) -> list[dict[str, Any]]:
    """One row a training: validation accuracy, and test accuracy where it was measured."""
    rows = []
    for trial, outcome in found.items():
        about = {
            "plan": strip(trial.mask),
            "lr": trial.lr,
            "seed": trial.repeat,
            "reason": outcome.reason,
            **constants,
        }
        rows.append(
            {
                "metric": "validation_accuracy",
                "split": "validation",
                "value": outcome.validation_accuracy,
                "n": outcome.n_validation,
                **about,
            }
        )
        if outcome.test_accuracy is not None:
            tested = {"metric": "test_accuracy", "split": "test", "value": outcome.test_accuracy}
            rows.append({**tested, "n": outcome.n_test, **about})
    return rows


def own_rate(
    one: Callable[[float, int], dict[str, Any]], lrs: Sequence[float], seeds: Sequence[int], *, most: int
) -> tuple[float, dict[tuple[float, int], dict[str, Any]]]:
    """The rate of an arm that is best on validation with the first seed, and every outcome by (rate, seed).

    The grid grows by factors of three while the best lies at an edge, to at most `most` rates; the other seeds
    are trained at the best rate alone. `one` trains at a rate and with a seed, and gives `Outcome.to_dict`.
    """
    first, *others = seeds
    tried = {lr: one(lr, first) for lr in lrs}
    while True:
        best = max(tried, key=lambda lr: tried[lr]["validation_accuracy"] or 0.0)
        beyond = {max(tried): 3 * best, min(tried): best / 3}.get(best)
        if beyond is None or len(tried) >= most:
            break
        beyond = float(f"{beyond:.1g}")
        tried[beyond] = one(beyond, first)
    runs = {(lr, first): outcome for lr, outcome in tried.items()}
    return best, runs | {(best, seed): one(best, seed) for seed in others}


def outcome_rows(
    runs: Mapping[tuple[float, int], Mapping[str, Any]], own: float, **about: Any
) -> list[dict[str, Any]]:
    """Two rows a training, its validation and test accuracy; `own` is the rate that the arm is judged at."""
    return [
        {
            "metric": f"{split}_accuracy",
            "split": split,
            "value": outcome[f"{split}_accuracy"],
            "n": outcome[f"n_{split}"],
            **about,
            "lr": lr,
            "seed": seed,
            "own": lr == own,
            "reason": outcome["reason"],
        }
        for (lr, seed), outcome in runs.items()
        for split in ("validation", "test")
    ]


def mean_in_words(pooled: PooledArms, arm: str) -> str:
    """Mean accuracy of an arm with its 95 % interval, in per cent.

    A cell of a table: `72.7 (70.3 to 75.1)`.
    """
    found = pooled.mean(arm)
    value, low, high = (100 * (end or 0.0) for end in (found.value, found.low, found.high))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def noise_in_words(pooled: PooledArms) -> str:
    """How far one training is from its arm and seed."""
    return (
        f"One training varies by {100 * pooled.noise:.2f} points around its arm and seed ({pooled.freedom} degrees of "
        "freedom, pooled over all arms)."
    )


def pooled_claims(
    pooled: PooledArms,
    pairs: Sequence[tuple[str, str, str]],
    *,
    key: Callable[[str], str],
    model: str,
    task: str,
    n: int,
) -> list[Answer]:
    """A claim for each (words, arm, other arm): noise pooled over arms, p-values corrected for their number (Holm)."""
    estimates = [pooled.difference(arm, other) for _, arm, other in pairs]
    corrected = holm([estimate.pvalue or 0.0 for estimate in estimates])
    nan = float("nan")
    return [
        Answer(
            key=key(words),
            claim=words,
            value=100 * (found.value or 0.0),
            low=nan if found.low is None else 100 * found.low,
            high=nan if found.high is None else 100 * found.high,
            interval="95 % interval, noise pooled over arms, images included",
            n=n,
            counted="test images",
            n_seeds=found.n or 0,
            model=short(model),
            task=short(task),
            pvalue=pvalue,
        )
        for (words, _, _), found, pvalue in zip(pairs, estimates, corrected, strict=True)
    ]
