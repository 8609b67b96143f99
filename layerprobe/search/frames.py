"""The tables of a search: trainings, baselines, finalists, the Pareto front and the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.search.baselines import BaselineResult
from layerprobe.search.budget import TrialBudget, measured_gain
from layerprobe.search.space import Mask, Space, Trial, describe_mask, strip
from layerprobe.search.trials import Finished
from layerprobe.search.verdict import (
    Finalist,
)


def trial_frame(records: Sequence[Finished], space: Space) -> pd.DataFrame:
    """One row a finished training, in the order in which the storage numbers them."""
    return pd.DataFrame(
        [
            {
                "number": record.number,
                "plan": trial.name,
                "blocks": describe_mask(trial.mask),
                "trained_blocks": sum(trial.mask),
                "lr": trial.lr,
                "repeat": trial.repeat,
                "fidelity": trial.fidelity,
                "validation_accuracy": outcome.validation_accuracy,
                "test_accuracy": outcome.test_accuracy,
                "cost": space.cost(trial),
                "seconds": round(outcome.train_seconds, 3),
                "bridge_accuracy": outcome.bridge_accuracy,
                "train_flops": outcome.train_flops,
                "trainable_parameters": outcome.trainable_parameters,
                "reason": outcome.reason,
                "finished": record.finished and record.finished.isoformat(timespec="seconds"),
                "worker": record.worker,
            }
            for record in records
            for trial, outcome in [(record.trial, record.outcome)]
        ]
    )


def baseline_frame(report: Sequence[BaselineResult]) -> pd.DataFrame:
    """One row a baseline: test accuracy with its t interval, and paired differences."""
    rows = []
    for line in report:
        row: dict[str, Any] = {
            "arm": line.baseline.name,
            "plan": line.baseline.trial(line.lr).name,
            "trained_blocks": sum(line.baseline.mask),
            "trainable_parameters": line.params,
            "lr": line.lr,
            "test_accuracy": line.accuracy.value,
            "low": line.accuracy.low,
            "high": line.accuracy.high,
            "stderr": line.accuracy.stderr,
            "n_seeds": line.accuracy.n,
            "cost": line.cost,
            "seconds": round(line.seconds, 3),
        }
        for label, pair in (("all", line.against_all), ("plan", line.against_plan)):
            row[f"minus_{label}"] = pair.estimate.value if pair else None
            row[f"minus_{label}_low"] = pair.estimate.low if pair else None
            row[f"minus_{label}_high"] = pair.estimate.high if pair else None
            row[f"p_better_than_{label}"] = pair.estimate.probability if pair else None
        row["test_per_seed"] = " ".join("" if value is None else f"{value:.6f}" for value in line.test)
        row["reason"] = line.accuracy.reason
        rows.append(row)
    return pd.DataFrame(rows)


def _about(mask: Mask, space: Space) -> dict[str, Any]:
    return {
        "plan": strip(mask),
        "blocks": describe_mask(mask),
        "trained_blocks": sum(mask),
        "trainable_parameters": space.params(mask),
    }


def finalist_frame(finalists: Sequence[Finalist], chosen: Mask, space: Space) -> pd.DataFrame:
    """One row a finalist: validation accuracy over its common seeds, chosen or not."""
    return pd.DataFrame(
        [
            {
                **_about(f.mask, space),
                "lr": f.lr,
                "validation_accuracy": f.mean if np.isfinite(f.mean) else None,
                "n_seeds": len(f.accuracies),
                "chosen": f.mask == chosen,
            }
            for f in finalists
        ]
    )


def pareto_frame(budget: TrialBudget, chosen: Mask, finalists: Sequence[Finalist] = ()) -> pd.DataFrame:
    """One row a plan trained at full length, cheapest first: accuracy, parameters, cost, on the front or not.

    Finalists stand at the rate and with the seeds of the finals, other plans at the best rate that they were tried at.
    """
    rows: list[dict[str, Any]] = []
    final = {finalist.mask: finalist for finalist in finalists}
    for mask in budget.tried_masks():
        if not budget.full(mask):
            continue
        lr = final[mask].lr if mask in final else budget.best_lr(mask)
        seeds = final[mask].accuracies if mask in final else budget.full(mask).get(lr, {}).values()
        values = [value for value in seeds if np.isfinite(value)]
        if not values:
            continue
        rows.append(
            {
                **_about(mask, budget.space),
                "cost": budget.space.cost(Trial(mask=mask, lr=lr)),
                "lr": lr,
                "validation_accuracy": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "n_seeds": len(values),
                "chosen": mask == chosen,
            }
        )
    frame = pd.DataFrame(rows).sort_values(["trainable_parameters", "plan"], ignore_index=True)
    frame["on_front"] = on_front(frame["validation_accuracy"], frame["trainable_parameters"])
    return frame


def on_front(accuracy: pd.Series, cost: pd.Series) -> pd.Series:
    """Whether no other row is better in accuracy (higher) and cost (lower); of equal rows, the first is."""
    points = pd.DataFrame({"cost": cost, "accuracy": accuracy})
    points = points.sort_values(["cost", "accuracy"], ascending=[True, False], kind="stable")
    return (points["accuracy"] > points["accuracy"].cummax().shift(fill_value=-np.inf)).sort_index()


def layer_frame(budget: TrialBudget, chosen: Mask, scores: pd.DataFrame) -> pd.DataFrame:
    """One row a block: in the plan, parameters, measured gain of training it, transfer scores."""
    gain, stderr = measured_gain(budget)
    frame = pd.DataFrame(
        {
            "block": range(budget.space.n_blocks),
            "in_plan": [int(flag) for flag in chosen],
            "parameters": budget.space.block_params,
            "train_gain": gain,
            "train_gain_stderr": stderr,
        }
    )
    return frame.join(scores.reset_index(drop=True)) if len(scores.columns) else frame
