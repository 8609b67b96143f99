"""The record of an evaluation: test accuracy per arm and seed, with intervals and paired differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from layerprobe.metrics.intervals import mean_interval, paired_seed_interval, wilson_interval
from layerprobe.records import Record
from layerprobe.tables import tidy

COMPARISONS = (
    ("language", "random", "does language pretraining help"),
    ("full-bridge", "language", "does the random-label bridge help"),
    ("bridge", "full-bridge", "does training only the plan's blocks beat training all"),
    ("bridge", "language", "does the plan's bridge beat plain fine-tuning"),
    ("bridge", "partial", "does the bridge help where only the plan's blocks train"),
    ("bridge", "none", "does training the plan's blocks beat training none"),
    ("random-bridge", "random", "does the bridge help without pretraining"),
    ("full-bridge", "random-bridge", "does pretraining help where all are bridged"),
)
"""Pairs of arms that share seeds, and the question that their difference answers."""


@dataclass(frozen=True)
class Trial:
    """One training of one arm, judged. Accuracies are shares in [0, 1]; None where it diverged."""

    arm: str
    lr: float | None
    seed: int
    validation_accuracy: float | None
    test_accuracy: float | None
    n_validation: int
    n_test: int
    trainable_parameters: int
    train_flops: float
    train_seconds: float
    bridge_accuracy: float | None = None
    reason: str | None = None


@dataclass(repr=False)
class Evaluation(Record):
    """What arms reach on the test images.

    Attributes
    ----------
    trials : every training done, those of rejected learning rates included.
    chosen : arm → its learning rate, taken on validation; None where nothing is trained by gradient.
    mode : finetune, fewshot, probe or own-head.
    """

    command: ClassVar[str] = "evaluate"
    mode: str
    trials: list[Trial]
    chosen: dict[str, float | None]
    about: dict[str, Any]
    confidence: float = 0.95
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Arms in the order they were asked for."""
        return list(self.chosen)

    def of(self, arm: str) -> list[Trial]:
        """The trials of an arm at its chosen rate, by seed."""
        rate = self.chosen[arm]
        return sorted((t for t in self.trials if t.arm == arm and t.lr == rate), key=lambda t: t.seed)

    def accuracies(self, arm: str) -> dict[int, float]:
        """Seed → test accuracy at the chosen rate."""
        return {t.seed: t.test_accuracy for t in self.of(arm) if t.test_accuracy is not None}

    def interval(self, arm: str) -> tuple[Any, Any, Any, str] | None:
        """Mean, low, high and the interval's kind; None where no seed gave an accuracy."""
        found = self.accuracies(arm)
        percent = f"{self.confidence:.0%}"
        if not found:
            return None
        if len(found) == 1:
            value = next(iter(found.values()))
            n = next(t.n_test for t in self.of(arm) if t.test_accuracy is not None)
            low, high = wilson_interval(round(value * n), n, self.confidence)
            return value, low, high, f"Wilson {percent} over {n:,} images, 1 seed"
        spread = mean_interval(list(found.values()), self.confidence)
        return spread.value, spread.low, spread.high, f"t {percent} over {len(found)} seeds"

    def differences(self) -> list[dict[str, Any]]:
        """Paired differences in test accuracy over common seeds, for the pairs of `COMPARISONS` at hand."""
        rows: list[dict[str, Any]] = []
        for first, second, question in COMPARISONS:
            if first not in self.chosen or second not in self.chosen:
                continue
            a, b = self.accuracies(first), self.accuracies(second)
            common = sorted(a.keys() & b.keys())
            row = {"arm": first, "versus": second, "question": question, "n": len(common)}
            if len(common) < 2:
                row |= {"value": None, "reason": f"{len(common)} common seeds; an interval needs 2"}
            else:
                pair = paired_seed_interval([a[s] for s in common], [b[s] for s in common], self.confidence)
                row |= {
                    "value": pair.value,
                    "low": pair.low,
                    "high": pair.high,
                    "probability": pair.probability,
                    "interval": f"t {self.confidence:.0%} over {len(common)} paired seeds",
                }
            rows.append(row)
        return rows

    def to_frame(self) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for trial in self.trials:
            cost = {
                "arm": trial.arm,
                "lr": trial.lr,
                "seed": trial.seed,
                "chosen": trial.lr == self.chosen[trial.arm],
                "trainable_parameters": trial.trainable_parameters,
                "train_flops": trial.train_flops,
                "train_seconds": trial.train_seconds,
            }
            judged = [("validation_accuracy", "validation", trial.validation_accuracy, trial.n_validation)]
            if trial.lr == self.chosen[trial.arm]:
                judged.append(("test_accuracy", "test", trial.test_accuracy, trial.n_test))
            for metric, split, value, n in judged:
                reason = None if value is not None else trial.reason or "not judged"
                rows.append(
                    {"metric": metric, "split": split, "value": value, "n": n, "reason": reason, **cost}
                )
            if trial.bridge_accuracy is not None:
                rows.append(
                    {"metric": "random_label_accuracy", "split": "train", "value": trial.bridge_accuracy}
                    | cost
                )
        for arm in self.arms:
            found = self.interval(arm)
            row = {"metric": "test_accuracy_mean", "split": "test", "arm": arm, "lr": self.chosen[arm]}
            if found is None:
                reason = next((t.reason for t in self.of(arm) if t.reason), "no seed finished")
                rows.append({**row, "value": None, "reason": reason})
            else:
                mean, low, high, kind = found
                rows.append(
                    {
                        **row,
                        "value": mean,
                        "low": low,
                        "high": high,
                        "interval": kind,
                        "n": len(self.accuracies(arm)),
                    }
                )
        for difference in self.differences():
            rows.append({"metric": "test_accuracy_difference", "split": "test", **difference})
        return tidy(
            rows, model=self.about["model"], revision=self.about["revision"], task=self.about["task"]
        ).assign(mode=self.mode)

    def table(self) -> list[dict[str, Any]]:
        """One row per arm for a terminal, then one per paired difference."""
        rows: list[dict[str, Any]] = []
        for arm in self.arms:
            found = self.interval(arm)
            trials = self.of(arm)
            rows.append(
                {
                    "arm": arm,
                    "test accuracy": None if found is None else f"{found[0]:.2%}",
                    "low": None if found is None else f"{found[1]:.2%}",
                    "high": None if found is None else f"{found[2]:.2%}",
                    "interval": None if found is None else found[3],
                    "lr": self.chosen[arm],
                    "trained parameters": trials[0].trainable_parameters if trials else None,
                    "TFLOP": round(float(np.mean([t.train_flops for t in trials])) / 1e12, 3)
                    if trials
                    else None,
                }
            )
        for row in self.differences():
            shown = row.get("value") is not None
            rows.append(
                {
                    "arm": f"{row['arm']} − {row['versus']}",
                    "test accuracy": f"{100 * row['value']:+.2f} points" if shown else None,
                    "low": f"{100 * row['low']:+.2f}" if shown else None,
                    "high": f"{100 * row['high']:+.2f}" if shown else None,
                    "interval": row["interval"] if shown else row["reason"],
                }
            )
        return rows

    def summary(self) -> str:
        parts = []
        for arm in self.arms:
            found = self.interval(arm)
            parts.append(
                f"{arm} {found[0]:.2%} [{found[1]:.2%}, {found[2]:.2%}]" if found else f"{arm}: no result"
            )
        kinds = sorted({found[3] for arm in self.arms if (found := self.interval(arm)) is not None})
        text = f"Test accuracy on {self.about['task']} ({self.mode}): " + "; ".join(parts)
        text += f" ({'; '.join(kinds)})." if kinds else "."
        for row in self.differences():
            if row.get("value") is None:
                continue
            low, high = 100 * row["low"], 100 * row["high"]
            answer = "yes" if low > 0 else "no, it hurts" if high < 0 else "no difference found"
            text += (
                f"\n{row['question'].capitalize()}? {answer}: {row['arm']} − {row['versus']} = "
                f"{100 * row['value']:+.2f} points [{low:+.2f}, {high:+.2f}]."
            )
        return text
