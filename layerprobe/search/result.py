"""The record of a search, and the files of its run folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from layerprobe.files import write_json
from layerprobe.plans import FreezePlan
from layerprobe.provenance import versions
from layerprobe.records import Record
from layerprobe.search.baselines import PLAN, BaselineResult
from layerprobe.search.budget import TrialBudget
from layerprobe.search.evaluator import Evaluator, by_block
from layerprobe.search.frames import (
    baseline_frame,
    finalist_frame,
    layer_frame,
    pareto_frame,
    trial_frame,
)
from layerprobe.search.space import blocks_of, describe_mask, strip
from layerprobe.search.trials import Finished
from layerprobe.search.verdict import (
    Finalist,
    contenders,
    pooled_stderr,
    verdict_kind,
    verdict_sentence,
)
from layerprobe.tables import strict_rows, strict_value, tidy, write_frame

SCHEMA = "layerprobe.search/v1"


@dataclass(repr=False, kw_only=True)
class SearchResult(Record):
    """What a freeze search found.

    Attributes
    ----------
    plan : FreezePlan
        The freeze plan, with its evidence in `plan.found`.
    answer : str
        The sentence.
    kind : str
        'train everything', 'better', 'worse', 'no difference found', 'not compared'.
    table : pd.DataFrame
        One row a block: scores, measured gain of training it, in the plan or not (layers.csv).
    trials : pd.DataFrame
        One row a training (trials.csv).
    baselines : pd.DataFrame
        One row a baseline, test accuracy (baselines.csv).
    pareto : pd.DataFrame
        One row a plan trained at full length: accuracy, parameters, cost, on the front or not.
    finalists : pd.DataFrame
        One row a finalist: validation accuracy per common seed, chosen or not.
    facts : dict[str, Any]
        Cost, budget, seeds and everything else for the report; `lr_at_edge` names baselines whose learning
        rate is the smallest or largest of the grid, so that a wider one might serve them better.
    """

    command: ClassVar[str] = "freeze-search"

    plan: FreezePlan
    answer: str
    kind: str
    table: pd.DataFrame = field()  # a name that users rely on; `arm_rows` is what a terminal shows
    trials: pd.DataFrame
    baselines: pd.DataFrame
    pareto: pd.DataFrame
    finalists: pd.DataFrame
    facts: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def summary(self) -> str:
        marks = "".join("■" if trained else "□" for trained in self.plan.chosen_blocks)
        return f"{self.answer}\nPlan: {marks}  (input to output; ■ trained, □ frozen)"

    def to_frame(self) -> pd.DataFrame:
        rows: list[dict[str, Any]] = [
            {
                "split": "test",
                "metric": "test_accuracy",
                "value": row.test_accuracy,
                "stderr": row.stderr,
                "n": row.n_seeds,
                "reason": row.reason,
                "arm": row.arm,
                "low": row.low,
                "high": row.high,
                "trainable_parameters": row.trainable_parameters,
            }
            for row in self.baselines.itertuples()
        ]
        for row in self.table.to_dict("records"):
            for column, value in row.items():
                if column in ("train_gain", "in_plan") or str(column).startswith("transfer_"):
                    rows.append(
                        {
                            "split": "train" if str(column).startswith("transfer_") else "validation",
                            "block": int(row["block"]),
                            "metric": column,
                            "value": None if pd.isna(value) else float(value),
                            "stderr": row["train_gain_stderr"] if column == "train_gain" else None,
                            "reason": "not measured" if pd.isna(value) else None,
                        }
                    )
        return tidy(
            rows,
            model=self.facts["model"],
            revision=self.facts["revision"],
            task=self.facts["task"],
            seed=self.facts["seed"],
        )

    def arm_rows(self) -> list[dict[str, Any]]:
        """The plan and the baselines for a terminal, in percent."""
        return [
            {
                "arm": row["arm"],
                "blocks": "".join("■" if mark == "#" else "□" for mark in row["plan"].split("+")[0]),
                "trained parameters": f"{row['trainable_parameters']:,}",
                "lr": f"{row['lr']:g}",
                "test %": None if row["test_accuracy"] is None else round(100 * row["test_accuracy"], 1),
                "95 % interval": None
                if pd.isna(row["low"])
                else f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                "against all": None if pd.isna(row["minus_all"]) else f"{100 * row['minus_all']:+.1f}",
                "seeds": row["n_seeds"],
            }
            for row in self.baselines.to_dict("records")
        ]

    def save(self, path: str | os.PathLike[str]) -> Path:
        target = super().save(path)
        if target.suffix not in (".csv", ".parquet", ".json"):
            self.plan.save(target / "plan.json")
            for name, frame in (
                ("layers", self.table),
                ("trials", self.trials),
                ("baselines", self.baselines),
                ("pareto", self.pareto),
                ("finalists", self.finalists),
            ):
                write_frame(frame, target / f"{name}.csv")
            write_json(target / "search.json", self.to_search_json())
        return target

    def to_search_json(self) -> dict[str, Any]:
        """Everything that a report of the run needs, as strict JSON."""
        return strict_value(
            {
                "schema": SCHEMA,
                "answer": self.answer,
                "kind": self.kind,
                **self.facts,
                "baselines": strict_rows(self.baselines),
                "pareto": strict_rows(self.pareto[self.pareto["on_front"]]),
                "finalists": strict_rows(self.finalists),
                "provenance": self.provenance,
            }
        )


def make_result(
    evaluator: Evaluator,
    budget: TrialBudget,
    finalists: Sequence[Finalist],
    winner: Finalist,
    report: Sequence[BaselineResult],
    records: Sequence[Finished],
    scores: pd.DataFrame,
) -> SearchResult:
    """The record of a finished search.

    Parameters
    ----------
    budget : TrialBudget
        After the search.
    winner : Finalist
        Of the finalists.
    report : Sequence[BaselineResult]
        The plan and the baselines on unseen seeds.
    records : Sequence[Finished]
        Every training of search and report.
    scores : pd.DataFrame
        Long table of transfer scores; may be empty.
    """
    task, space, settings = evaluator.task, budget.space, budget.settings
    own = next(line for line in report if line.baseline.name == PLAN)
    answer = verdict_sentence(
        winner.mask,
        space,
        own.against_all,
        objective=settings.objective,
        test_mean=own.accuracy.value,
        n_finalists=sum(bool(np.isfinite(f.mean)) for f in finalists),
        adapter_rank=settings.adapter_rank,
    )
    kind = verdict_kind(winner.mask, own.against_all)
    facts = _facts(evaluator, budget, finalists, winner, own, records)
    grid = (min(settings.lrs), max(settings.lrs))
    facts["lr_at_edge"] = [line.baseline.name for line in report if len(settings.lrs) > 1 and line.lr in grid]
    facts["chance"] = 1.0 / task.n_classes
    facts["score_columns"] = sorted(scores["metric"].unique()) if len(scores) else []
    finals = finalist_frame(finalists, winner.mask, space)
    wide = by_block(scores, space.n_blocks)
    plan = evaluator.plan(winner.mask).with_found(
        method="freeze-search",
        answer=answer,
        kind=kind,
        task=task.name,
        task_id=task.task_id,
        split_hash=task.split_hash,
        settings=strict_value(settings.to_dict()),
        budget=budget.total,
        spent=budget.spent,
        lr=winner.lr,
        validation_accuracy=winner.mean,
        test_accuracy={
            "mean": own.accuracy.value,
            "low": own.accuracy.low,
            "high": own.accuracy.high,
            "interval": "95 % t over unseen seeds",
            "n_seeds": own.accuracy.n,
        },
        against_all=facts["against_all"],
        runners_up=strict_rows(finals[~finals["chosen"]]),
        scores=strict_rows(wide.reset_index(names="block")),
        versions=versions(),
    )
    return SearchResult(
        plan=plan,
        answer=answer,
        kind=kind,
        table=layer_frame(budget, winner.mask, wide),
        trials=trial_frame(records, space),
        baselines=baseline_frame(report),
        pareto=pareto_frame(budget, winner.mask, finalists),
        finalists=finals,
        facts=facts,
    )


def _facts(
    evaluator: Evaluator,
    budget: TrialBudget,
    finalists: Sequence[Finalist],
    winner: Finalist,
    own: BaselineResult,
    records: Sequence[Finished],
) -> dict[str, Any]:
    backbone, task, settings, space = evaluator.backbone, evaluator.task, budget.settings, budget.space
    reported = {r.trial.key: space.cost(r.trial) for r in records if r.trial not in budget.history}
    return {
        "model": backbone.name,
        "revision": backbone.source.revision,
        "task": task.name,
        "split_hash": task.split_hash,
        "n_blocks": space.n_blocks,
        "plan": {
            "strip": strip(winner.mask),
            "blocks": blocks_of(winner.mask),
            "words": describe_mask(winner.mask),
            "lr": winner.lr,
            "validation_accuracy": winner.mean,
            "validation_per_seed": list(winner.accuracies),
            "test_accuracy": own.accuracy.value,
            "test_low": own.accuracy.low,
            "test_high": own.accuracy.high,
            "trainable_parameters": own.params,
        },
        "against_all": own.against_all.to_dict() if own.against_all else None,
        "standard_error": pooled_stderr(contenders(finalists)),
        "objective": settings.objective,
        "strategy": settings.strategy,
        "budget": budget.total,
        "spent": budget.spent,
        "report_cost": sum(reported.values()),
        "trainings": len(records),
        "train_seconds": sum(record.outcome.train_seconds for record in records),
        "seeds": settings.seeds,
        "seed": settings.seed,
    }
