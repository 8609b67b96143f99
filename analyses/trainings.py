"""Plans that a study trains, kept and scored by the rules of the search; and stored tables of every plan."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import study
from study import Setup, digest

from layerprobe.backbones import Backbone
from layerprobe.errors import NotAvailableError
from layerprobe.progress import note
from layerprobe.search.run import prepare
from layerprobe.search.settings import identify, make_settings
from layerprobe.search.space import REPORT_REPEAT, Mask, Trial, strip
from layerprobe.tasks import Task
from layerprobe.training import Outcome

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
# Tables of every plan are made and replayed by the benchmark of the search; studies read the same ones.
from agreement import permutation_agreement, score_agreement
from replay import ExhaustiveTable, Truth, frugal_plan

__all__ = [
    "TABLES",
    "ExhaustiveTable",
    "Trainings",
    "Truth",
    "frugal_plan",
    "permutation_agreement",
    "score_agreement",
    "table_folders",
    "trial_rows",
]


TABLES = Path("results/freeze_search/tables")


def table_folders(s: Setup) -> list[Path]:
    """The tables of every plan that `--tables` names, or all that there are."""
    if s.arguments.tables:
        return [Path(folder) for folder in s.arguments.tables.split(",")]
    found = sorted(path.parent for path in TABLES.glob("*/table.json"))
    if not found:
        raise NotAvailableError(
            f"no table of every plan in {TABLES}; name some with --tables, or make one: "
            "python benchmarks/freeze_search.py make-table"
        )
    return found


class Trainings:
    """Bridge and fine-tuning of one backbone on one task, kept and never repeated."""

    def __init__(self, setup: Setup, label: str, backbone: Backbone, task: Task, **settings: Any) -> None:
        self.label = label
        self.settings = settings = make_settings(budget=1.0, strategy="exhaustive", **settings)
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
        about = {"plan": strip(trial.mask), "lr": trial.lr, "seed": trial.repeat, "reason": outcome.reason}
        for split in ("validation", "test"):
            value, n = getattr(outcome, f"{split}_accuracy"), getattr(outcome, f"n_{split}")
            if split == "validation" or value is not None:
                row = {"metric": f"{split}_accuracy", "split": split, "value": value, "n": n}
                rows.append({**row, **about, **constants})
    return rows
