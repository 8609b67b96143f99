"""Trainings of a study by the library's chain: kept, never repeated, and valued by the rules of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import study
from study import Setup, digest

from layerprobe.backbones import Backbone
from layerprobe.progress import note
from layerprobe.search.replay import ExhaustiveTable
from layerprobe.search.settings import Settings, identify
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial
from layerprobe.search.study import Ledger
from layerprobe.search.valuing import ChainEvaluator
from layerprobe.tasks import Task


class Trainings:
    """Bridge and fine-tuning of one backbone on one task by the library's chain, kept and never repeated."""

    def __init__(self, setup: Setup, label: str, backbone: Backbone, task: Task, settings: Settings) -> None:
        self.settings, self.label, self.task = settings, label, task
        self.evaluator = ChainEvaluator(backbone, task, settings.chain, settings.seed)
        self.space = Space(self.evaluator.block_params(), settings.constraints)
        identity = {**identify(backbone, task, settings), "study": setup.name}
        path = study.WORK / setup.name / f"{label}-{digest(identity)}.db"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger.open(path, identity)

    def value(self, trials: Sequence[Trial]) -> dict[Trial, Any]:
        """Answers to `trials`, one after the other, with a line of progress every ten."""
        found = {}
        for count, trial in enumerate(dict.fromkeys(trials), start=1):
            found |= self.ledger.value([trial], self.evaluator)
            if count % 10 == 0:
                note(f"{self.label}: {count} of {len(trials)} trainings")
        return found

    def plans(self, masks: Sequence[Mask], *, unseen: int | None = None) -> ExhaustiveTable:
        """Plans valued by the search's rules: own rate on repeat 0, then selection and `unseen` repeats.

        As many unseen repeats as selection repeats unless said otherwise. The table holds these `masks` alone,
        whatever its space; read them by `validation` and `test`.
        """
        s = self.settings
        found = self.value([Trial(mask, lr) for mask in masks for lr in s.lrs])
        table = ExhaustiveTable(self.label, self.space, s.lrs, s.seeds, 1.0, found)
        rates = {mask: table.own_lr(mask) for mask in masks}
        judging = range(REPORT_REPEAT, REPORT_REPEAT + (unseen or s.seeds))
        repeats = [*range(1, s.seeds), *judging]
        found |= self.value([Trial(mask, rates[mask], r) for r in repeats for mask in masks])
        return table


def trial_rows(found: Mapping[Trial, Any], **constants: Any) -> list[dict[str, Any]]:
    """One row a training: validation accuracy, and test accuracy where it was judged."""
    rows = []
    for trial, outcome in found.items():
        plan = "".join("#" if flag else "." for flag in trial.mask)
        about = {"plan": plan, "lr": trial.lr, "seed": trial.repeat, "reason": outcome.reason, **constants}
        rows.append(
            {
                "metric": "validation_accuracy",
                "split": "validation",
                "value": outcome.accuracy,
                "n": outcome.facts.get("n_validation"),
                **about,
            }
        )
        if outcome.test is not None:
            judged = {"metric": "test_accuracy", "split": "test", "value": outcome.test}
            rows.append({**judged, "n": outcome.facts.get("n_test"), **about})
    return rows
