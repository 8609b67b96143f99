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
from layerprobe.records import Record
from layerprobe.search.baselines import ArmResult
from layerprobe.search.bench import Bench, Outcome, accuracy_of
from layerprobe.search.space import Mask, Space, Trial, describe_mask, parse_strip, strip
from layerprobe.search.verdict import Finalist, pareto_front
from layerprobe.tables import strict_rows, strict_value, tidy, write_frame

SCHEMA = "layerprobe.search/v1"


@dataclass(repr=False, kw_only=True)
class SearchResult(Record):
    """What a freeze search found.

    Attributes
    ----------
    plan : the freeze plan, with its evidence in `plan.found`.
    answer : the sentence. kind : 'train everything', 'better', 'worse', 'no difference found', 'not compared'.
    table : one row a block: scores, measured gain of training it, in the plan or not (layers.csv).
    trials : one row a training (trials.csv). baselines : one row an arm, test accuracy (baselines.csv).
    pareto : one row a plan valued at full length: accuracy, parameters, cost, on the front or not.
    finalists : one row a finalist: validation accuracy per common seed, chosen or not.
    facts : cost, budget, seeds and everything else for the report; `lr_at_edge` names arms whose learning
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
        marks = "".join("■" if trained else "□" for trained in self.plan.blocks)
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


def trial_frame(history: Sequence[tuple[Trial, Outcome, dict[str, Any]]], space: Space) -> pd.DataFrame:
    """One row a finished training, in the order in which the storage numbers them."""
    rows = [
        {
            "number": where.get("number"),
            "plan": trial.name,
            "blocks": describe_mask(trial.mask),
            "trained_blocks": sum(trial.mask),
            "lr": trial.lr,
            "repeat": trial.repeat,
            "fidelity": trial.fidelity,
            "validation_accuracy": outcome.accuracy,
            "test_accuracy": outcome.test,
            "cost": space.cost(trial),
            "seconds": round(outcome.seconds, 3),
            "bridge_accuracy": outcome.facts.get("bridge_accuracy"),
            "train_flops": outcome.facts.get("train_flops"),
            "trainable_parameters": outcome.facts.get("trainable_parameters"),
            "reason": outcome.reason,
            "finished": where.get("finished"),
            "worker": where.get("worker"),
        }
        for trial, outcome, where in history
    ]
    return pd.DataFrame(rows)


def arm_frame(results: Sequence[ArmResult]) -> pd.DataFrame:
    """One row an arm: test accuracy with its t interval, and paired differences."""
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "arm": result.arm.name,
            "plan": result.arm.trial(result.lr).name,
            "trained_blocks": sum(result.arm.mask),
            "trainable_parameters": result.params,
            "lr": result.lr,
            "test_accuracy": result.mean,
            "low": result.low,
            "high": result.high,
            "stderr": result.stderr,
            "n_seeds": sum(value is not None for value in result.test),
            "cost": result.cost,
            "seconds": round(result.seconds, 3),
        }
        for label, pair in (("all", result.against_all), ("plan", result.against_plan)):
            row[f"minus_{label}"] = pair.difference if pair else None
            row[f"minus_{label}_low"] = pair.low if pair else None
            row[f"minus_{label}_high"] = pair.high if pair else None
            row[f"p_better_than_{label}"] = pair.probability if pair else None
        row["test_per_seed"] = " ".join("" if value is None else f"{value:.6f}" for value in result.test)
        row["reason"] = result.reason
        rows.append(row)
    return pd.DataFrame(rows)


def finalist_frame(finalists: Sequence[Finalist], chosen: Mask, space: Space) -> pd.DataFrame:
    """One row a finalist: validation accuracy over its common seeds, chosen or not."""
    return pd.DataFrame(
        [
            {
                "plan": strip(f.mask),
                "blocks": describe_mask(f.mask),
                "trained_blocks": sum(f.mask),
                "trainable_parameters": space.params(f.mask),
                "lr": f.lr,
                "validation_accuracy": f.mean if np.isfinite(f.mean) else None,
                "n_seeds": len(f.accuracies),
                "chosen": f.mask == chosen,
            }
            for f in finalists
        ]
    )


def pareto_frame(bench: Bench, chosen: Mask, finalists: Sequence[Finalist] = ()) -> pd.DataFrame:
    """One row a plan valued at full length, cheapest first: accuracy, parameters, cost, on the front or not.

    Finalists stand at the rate and with the seeds of the finals, other plans at the best rate that they were tried at.
    """
    rows = []
    final = {finalist.mask: finalist for finalist in finalists}
    for mask in bench.valued_masks():
        if not bench.full(mask):
            continue
        lr = final[mask].lr if mask in final else bench.best_lr(mask)
        seeds = final[mask].accuracies if mask in final else bench.full(mask).get(lr, {}).values()
        values = [value for value in seeds if np.isfinite(value)]
        if not values:
            continue
        rows.append(
            {
                "plan": strip(mask),
                "blocks": describe_mask(mask),
                "trained_blocks": sum(mask),
                "trainable_parameters": bench.space.params(mask),
                "cost": bench.space.cost(Trial(mask, lr)),
                "lr": lr,
                "validation_accuracy": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "n_seeds": len(values),
                "chosen": mask == chosen,
            }
        )
    frame = pd.DataFrame(rows).sort_values(["trainable_parameters", "plan"], ignore_index=True)
    points = {
        parse_strip(row["plan"]): (row["validation_accuracy"], row["trainable_parameters"])
        for row in frame.to_dict("records")
    }
    front = {strip(mask) for mask in pareto_front(points)}
    frame["on_front"] = frame["plan"].isin(front)
    return frame


def measured_gain(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy gained by training each block, other blocks equal: least squares over all valued trials.

    Model: accuracy = level of (learning rate, fidelity, repeat) + sum of gains of the trained blocks. With
    few trials a small ridge on the gains (1e-3 of their mean diagonal) keeps blocks that were always trained
    together apart from infinity; the standard error says how little is known then. The levels carry no penalty:
    what it would take from them would be given to the blocks.

    Returns
    -------
    gain, stderr : arrays of length n_blocks, shares in [0, 1]; NaN with fewer trials than unknowns.
    """
    known = [(t, accuracy_of(o)) for t, o in bench.history.items() if o.accuracy is not None and t.is_plan]
    n_blocks = bench.space.n_blocks
    levels = sorted({(t.lr, t.fidelity, t.repeat) for t, _ in known})
    if len(known) <= n_blocks + len(levels):
        return np.full(n_blocks, np.nan), np.full(n_blocks, np.nan)
    design = np.array(
        [
            [float(flag) for flag in trial.mask]
            + [float((trial.lr, trial.fidelity, trial.repeat) == level) for level in levels]
            for trial, _ in known
        ]
    )
    y = np.array([accuracy for _, accuracy in known])
    gram = design.T @ design
    gains = np.arange(len(gram)) < n_blocks
    gram[gains, gains] += 1e-3 * np.diag(gram)[gains].mean() + 1e-12
    inverse = np.linalg.inv(gram)
    weights = inverse @ design.T @ y
    residual = y - design @ weights
    variance = float(residual @ residual) / (len(y) - design.shape[1])
    stderr = np.sqrt(variance * np.diag(inverse))
    return weights[:n_blocks], stderr[:n_blocks]


def layer_frame(bench: Bench, chosen: Mask, scores: pd.DataFrame) -> pd.DataFrame:
    """One row a block: in the plan, parameters, measured gain of training it, transfer scores."""
    gain, stderr = measured_gain(bench)
    frame = pd.DataFrame(
        {
            "block": range(bench.space.n_blocks),
            "in_plan": [int(flag) for flag in chosen],
            "parameters": bench.space.block_params,
            "train_gain": gain,
            "train_gain_stderr": stderr,
        }
    )
    return frame.join(scores.reset_index(drop=True)) if len(scores.columns) else frame
