"""The record of a search, and the files of its run folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from layerprobe.errors import BrokenFileError
from layerprobe.files import read_json, write_json
from layerprobe.plans import FreezePlan
from layerprobe.provenance import versions
from layerprobe.reading import check_fields
from layerprobe.records import SEARCH_SCHEMA, Estimate, Record
from layerprobe.search.baselines import ALL, JUDGED, PLAN, BaselineResult, Report
from layerprobe.search.budget import TrialBudget
from layerprobe.search.evaluator import Evaluator, by_block
from layerprobe.search.frames import baseline_frame, layer_frame, plan_frame, trial_frame
from layerprobe.search.pilot import Pilot
from layerprobe.search.probes import ProbeBaseline, pixels_in_words, probes_in_words
from layerprobe.search.space import marks, parse_strip, parts_of, strip
from layerprobe.search.trials import Finished
from layerprobe.search.verdict import sentence
from layerprobe.tables import MARK, count_text, read_frame, strict_rows, strict_value, tidy
from layerprobe.training.arms import LEAST_RECALL

_TABLES = {"table": "layers", "trials": "trials", "baselines": "baselines", "plans": "plans"}
"""Field of a result → its file in the run folder."""


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
        The verdict: 'train these', 'train all', 'train none', 'no difference', 'not decided', 'not judged'.
    table : pd.DataFrame
        One row a unit: scores, measured gain of training it, in the plan or not (layers.csv).
    trials : pd.DataFrame
        One row a training (trials.csv).
    baselines : pd.DataFrame
        One row a baseline, test accuracy (baselines.csv).
    plans : pd.DataFrame
        One row a plan that was trained: expected accuracy, parameters, cost, on the front or not (plans.csv).
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
    plans: pd.DataFrame
    facts: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def summary(self) -> str:
        shown = marks(parse_strip(self.facts["plan"]["strip"]), self.n_parts)
        legend = "■ trained, □ frozen" + (", ◧ attention alone, ◨ MLP alone" if self.n_parts > 1 else "")
        return f"{self.answer}\nPlan: {shown}  (input to output; {legend})"

    @property
    def n_parts(self) -> int:
        """Units of one block in a plan."""
        return len(parts_of(self.facts.get("units", "block"))) or 1

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
                            "site": row.get("part"),
                            "metric": column,
                            "value": None if pd.isna(value) else float(value),
                            "stderr": row["train_gain_stderr"] if column == "train_gain" else None,
                            "reason": "not measured" if pd.isna(value) else None,
                        }
                    )
        return tidy(rows, **{name: self.facts[name] for name in ("model", "revision", "task", "seed")})

    def arm_rows(self) -> list[dict[str, Any]]:
        """The best plan found, the baselines and the probes for a terminal, in percent; the recommended one marked."""
        everything = {row["plan"] for row in self.baselines.to_dict("records") if row["arm"] == ALL}
        return [
            {
                "arm": (MARK if row["arm"] == self.facts.get("recommended") else "")
                + ("best found" if row["arm"] == PLAN else row["arm"]),
                "blocks": marks(parse_strip(row["plan"].split("+")[0]), self.n_parts),
                "trained": count_text(row["trainable_parameters"]),
                "lr": None if pd.isna(row["lr"]) else f"{row['lr']:g}",
                "test, %": None if pd.isna(row["test_accuracy"]) else f"{100 * row['test_accuracy']:.1f}",
                "95 % interval": None
                if pd.isna(row["low"])
                else f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                "− all, points": "same plan"
                if row["plan"] in everything and row["arm"] != ALL
                else None
                if pd.isna(row["minus_all"])
                else f"{round(100 * row['minus_all'], 1) + 0.0:+.1f}",  # no −0.0
                "seeds": row["n_seeds"],
            }
            for row in self.baselines.to_dict("records")
        ]

    def shown_rows(self) -> list[dict[str, Any]]:
        return self.arm_rows()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SearchResult:
        """Read back a run folder, see `layerprobe.load`; BrokenFileError where a file of it is missing or damaged."""
        source = Path(folder)
        file = source / "search.json"
        found = read_json(file, what="search", inside=source)
        if not isinstance(found, dict) or found.get("schema") != SEARCH_SCHEMA:
            raise BrokenFileError(f"{file} is not of the schema {SEARCH_SCHEMA}")
        check_fields(found, {"answer": str, "kind": str, "provenance?": (dict, type(None))}, file)
        frames = {key: read_frame(source / f"{name}.csv", inside=source) for key, name in _TABLES.items()}
        apart = ("schema", "answer", "kind", "provenance", "baselines", "plans")
        return cls(
            plan=FreezePlan.load(source / "plan.json"),
            answer=found["answer"],
            kind=found["kind"],
            facts={key: value for key, value in found.items() if key not in apart},
            provenance=found.get("provenance") or {},
            folder=source,
            **frames,
        )

    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {name: getattr(self, key) for key, name in _TABLES.items()}

    def save(self, path: str | os.PathLike[str]) -> Path:
        target = super().save(path)
        if target.suffix not in (".csv", ".parquet", ".json"):
            self.plan.save(target / "plan.json")
            content = {"schema": SEARCH_SCHEMA, "answer": self.answer, "kind": self.kind, **self.facts}
            rows = {"baselines": strict_rows(self.baselines), "plans": strict_rows(self.plans)}
            write_json(
                target / "search.json", strict_value({**content, **rows, "provenance": self.provenance})
            )
        return target


def make_result(
    evaluator: Evaluator,
    budget: TrialBudget,
    pilot: Pilot,
    report: Report,
    records: Sequence[Finished],
    scores: pd.DataFrame,
    probes: Sequence[ProbeBaseline] = (),
) -> SearchResult:
    """The record of a finished search, of whose trainings (pilot, search and report) are all `records`; the long table
    of transfer scores may be empty."""
    task, space, settings, verdict = evaluator.task, budget.space, budget.settings, report.verdict
    own = next(line for line in report.lines if line.baseline.mask == verdict.mask and line.baseline.is_plan)
    ahead = probes_in_words(probes, report)
    rank, n_seeds = settings.adapter_rank, len(report.seeds)
    answer = ahead + sentence(verdict, space, test=own.accuracy, n_seeds=n_seeds, adapter_rank=rank)
    answer += ("" if ahead else pixels_in_words(probes, own)) + rates_at_an_end(report, budget.lrs)
    if own.recall is not None:
        answer += f" The bridge recalls {100 * own.recall:.0f} % of its random labels"
        answer += (
            "." if own.recall >= LEAST_RECALL else ": it has bridged little, so nothing is claimed of it."
        )
    wide = by_block(scores, space.n_blocks)
    facts = _facts(evaluator, budget, pilot, report, own, records)
    facts["score_columns"] = sorted(scores["metric"].unique()) if len(scores) else []
    plan = evaluator.plan(verdict.mask).with_found(
        method="freeze-search",
        answer=answer,
        kind=verdict.kind,
        task=task.name,
        task_id=task.task_id,
        split_hash=task.split_hash,
        settings=strict_value(settings.to_dict()),
        budget=budget.total,
        spent=budget.spent,
        lr=own.lr,
        steps=facts["steps"],
        test_accuracy={
            "mean": own.accuracy.value,
            "low": own.accuracy.low,
            "high": own.accuracy.high,
            "interval": "95 %, noise between seeds pooled over plan, all and none, test images included",
            "n_seeds": own.accuracy.n,
        },
        against_all=facts["against_all"],
        scores=strict_rows(wide.reset_index(names="block")),
        versions=versions(),
    )
    return SearchResult(
        plan=plan,
        answer=answer,
        kind=verdict.kind,
        table=layer_frame(budget, verdict.mask, wide),
        trials=trial_frame(records, space),
        baselines=baseline_frame(report, space, probes),
        plans=plan_frame(budget, verdict.mask),
        facts=facts,
    )


def _facts(
    evaluator: Evaluator,
    budget: TrialBudget,
    pilot: Pilot,
    report: Report,
    own: BaselineResult,
    records: Sequence[Finished],
) -> dict[str, Any]:
    backbone, task, settings, space = evaluator.backbone, evaluator.task, budget.settings, budget.space
    verdict = report.verdict
    others = [record for record in records if record.trial not in budget.history]
    bridge_steps, steps = (max(1, round(pilot.length * n)) if n else 0 for n in settings.steps)
    return {
        "model": backbone.name,
        "revision": backbone.source.revision,
        "task": task.name,
        "split_hash": task.split_hash,
        "n_blocks": space.n_blocks,
        "units": settings.units,
        "chance": 1.0 / task.n_classes,
        "plan": {
            "strip": strip(verdict.mask),
            "blocks": space.names(verdict.mask) if space.parts else list(map(int, space.names(verdict.mask))),
            "words": space.describe(verdict.mask),
            "lr": own.lr,
            "test_accuracy": own.accuracy.value,
            "test_low": own.accuracy.low,
            "test_high": own.accuracy.high,
            "trainable_parameters": own.params,
        },
        "searched_plan": strip(report.line(PLAN).baseline.mask),
        "recommended": own.baseline.name,
        "against_all": None if (pair := own.against[ALL]) is None else estimate_row(pair),
        "differences": [
            {"arm": first, "versus": second, **estimate_row(found)}
            for (first, second), found in verdict.differences.items()
        ],
        "margin": verdict.margin,
        "detectable": verdict.detectable,
        "failed": dict(verdict.failed),
        "noise": report.noise,
        "image_stderr": report.image_stderr,
        "pilot": pilot.to_dict(),
        "bridge_steps": bridge_steps,
        "steps": steps,
        "lrs": list(budget.lrs),
        "lr_at_edge": [line.baseline.name for line in at_an_end(report, budget.lrs)],
        "head": settings.finetune.head,
        "stop_margin": settings.margin,
        "objective": settings.objective,
        "strategy": settings.strategy,
        "budget": budget.total,
        "spent": budget.spent,
        "report_cost": sum(space.cost(record.trial) for record in others),
        "trainings": len(records),
        "train_seconds": sum(record.outcome.train_seconds for record in records),
        "seeds": len(report.seeds),
        "seed": settings.seed,
    }


def at_an_end(report: Report, lrs: Sequence[float]) -> list[BaselineResult]:
    """Lines whose learning rate is the smallest or the largest of the grid: another might serve them better."""
    return [line for line in report.lines if len(lrs) > 1 and line.lr in (min(lrs), max(lrs))]


def rates_at_an_end(report: Report, lrs: Sequence[float]) -> str:
    """A clause for the answer that names the judged lines of `at_an_end`; empty without any, or a rate in between."""
    found = [line for line in at_an_end(report, lrs) if line.baseline.name in JUDGED]
    if not found or len(lrs) < 3:
        return ""
    names = " and ".join(f"{line.baseline.name} ({line.lr:g})" for line in found)
    return f" The learning rate is at an end of the grid for {names}: a wider --lrs may raise them."


def estimate_row(found: Estimate) -> dict[str, float | int | None]:
    """A difference as result files hold it: shares, with the 95 % interval."""
    return {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "probability": found.probability,
        "n": found.n,
    }
