"""The tables of a search: trainings, baselines, plans with their expected accuracy, and the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.records import Estimate
from layerprobe.search.baselines import ALL, JUDGED, NONE, PLAN, Report
from layerprobe.search.budget import TrialBudget
from layerprobe.search.probes import ProbeBaseline
from layerprobe.search.space import Mask, Space, strip
from layerprobe.search.trials import Finished


def trial_frame(records: Sequence[Finished], space: Space) -> pd.DataFrame:
    """One row a finished training, in the order in which the storage numbers them."""
    return pd.DataFrame(
        [
            {
                "number": record.number,
                "plan": trial.name,
                "blocks": space.describe(trial.mask),
                "trained_blocks": space.trained_blocks(trial.mask),
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


def baseline_frame(report: Report, space: Space, probes: Sequence[ProbeBaseline] = ()) -> pd.DataFrame:
    """One row a baseline: test accuracy with its t interval, and paired differences; then one a probe."""
    rows: list[dict[str, Any]] = []
    for line in report.lines:
        row: dict[str, Any] = {
            "arm": line.baseline.name,
            "plan": line.baseline.trial(line.lr).name,
            "trained_blocks": space.trained_blocks(line.baseline.mask),
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
        per_seed = " ".join("" if value is None else f"{value:.6f}" for value in line.test)
        row |= {**_differences(line.against), "random_label_recall": line.recall, "test_per_seed": per_seed}
        rows.append(row | {"reason": line.accuracy.reason})
    rows += [_probe_row(probe, report) for probe in probes]
    return pd.DataFrame(rows)


def _differences(against: Mapping[str, Estimate | None]) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for label in (ALL, PLAN, NONE):
        pair = against.get(label) or Estimate(value=None)
        row |= {
            f"minus_{label}": pair.value,
            f"minus_{label}_low": pair.low,
            f"minus_{label}_high": pair.high,
        }
        row[f"p_better_than_{label}"] = pair.probability
    return row


def _probe_row(probe: ProbeBaseline, report: Report) -> dict[str, Any]:
    judged = {line.baseline.name: line for line in report.lines if line.baseline.name in JUDGED}
    return {
        "arm": probe.name,
        "plan": strip((False,) * len(report.lines[0].baseline.mask)),
        "trained_blocks": 0,
        "trainable_parameters": 0,
        "test_accuracy": probe.accuracy,
        "low": probe.low,
        "high": probe.high,
        "n_seeds": 1,
        **_differences({name: probe.minus(line) for name, line in judged.items()}),
        "test_per_seed": f"{probe.accuracy:.6f}",
    }


def plan_frame(budget: TrialBudget, chosen: Mask) -> pd.DataFrame:
    """One row a plan of which a training came through, cheapest first: expected accuracy with its 95 % interval, cost,
    on the front or not."""
    posterior, space = budget.posterior(), budget.space
    masks = [mask for mask in budget.tried_masks() if mask not in posterior.failed]
    if chosen not in masks:
        masks.append(chosen)
    rates = posterior.best_rates(masks)
    mean, covariance = posterior.predict([budget.trial(mask, rates[mask]) for mask in masks])
    stderr = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
    rows = [
        {
            "plan": strip(mask),
            "blocks": space.describe(mask),
            "trained_blocks": space.trained_blocks(mask),
            "trainable_parameters": space.params(mask),
            "cost": space.cost(budget.trial(mask, rates[mask])),
            "lr": rates[mask],
            "validation_accuracy": expected,
            "low": max(0.0, expected - 1.96 * error),
            "high": min(1.0, expected + 1.96 * error),
            "n_trainings": len(list(budget.runs(mask))),
            "chosen": mask == chosen,
        }
        for mask, expected, error in zip(masks, mean.tolist(), stderr.tolist(), strict=True)
    ]
    frame = pd.DataFrame(rows).sort_values(["trainable_parameters", "plan"], ignore_index=True)
    frame["on_front"] = on_front(frame["validation_accuracy"], frame["trainable_parameters"])
    return frame


def on_front(accuracy: pd.Series, cost: pd.Series) -> pd.Series:
    """Whether no other row is better in accuracy (higher) and cost (lower); of equal rows, the first is."""
    points = pd.DataFrame({"cost": cost, "accuracy": accuracy})
    points = points.sort_values(["cost", "accuracy"], ascending=[True, False], kind="stable")
    return (points["accuracy"] > points["accuracy"].cummax().shift(fill_value=-np.inf)).sort_index()


def layer_frame(budget: TrialBudget, chosen: Mask, scores: pd.DataFrame) -> pd.DataFrame:
    """One row a unit: in the plan, parameters, measured gain of training it, transfer scores of its block."""
    space = budget.space
    gains = budget.posterior().unit_gains(np.random.default_rng(budget.settings.seed))
    frame = pd.DataFrame(
        {
            "block": [unit // space.n_parts for unit in range(space.n_units)],
            **({"part": list(space.parts) * space.n_blocks} if space.parts else {}),
            "in_plan": [int(flag) for flag in chosen],
            "parameters": space.unit_params,
            "train_gain": [gain.value for gain in gains],
            "train_gain_stderr": [gain.stderr for gain in gains],
            "train_gain_low": [gain.low for gain in gains],
            "train_gain_high": [gain.high for gain in gains],
        }
    )
    return frame.join(scores, on="block") if len(scores.columns) else frame
