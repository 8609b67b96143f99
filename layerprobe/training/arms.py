"""Arms: the ways to a fine-tuned model that an evaluation compares, and the record of what they reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from layerprobe.choices import MODES, SCOPES
from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.metrics.inference import PooledArms, holm
from layerprobe.metrics.intervals import interval_in_words, wilson_interval
from layerprobe.records import Estimate, Record
from layerprobe.tables import count_text, percent, tidy
from layerprobe.training.outcome import Outcome

if TYPE_CHECKING:
    import pandas as pd

    from layerprobe.plans import FreezePlan

FEW_SHOTS = 5


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way from an initialisation to a fine-tuned model.

    `bridge` and `finetune` say what trains in the stage: the `plan`'s parameters, `all`, `none` (stem and
    head alone); `bridge` None leaves the stage out.
    """

    init: str
    bridge: str | None
    finetune: str
    meaning: str


ARMS = {
    name: Arm(init=init, bridge=bridge, finetune=finetune, meaning=meaning)
    for name, init, bridge, finetune, meaning in (
        ("language", "pretrained", None, "all", "published weights, fine-tuned as a whole"),
        ("bridge", "pretrained", "plan", "plan", "bridge and fine-tuning under the plan"),
        ("full-bridge", "pretrained", "all", "all", "bridge and fine-tuning of everything"),
        ("partial", "pretrained", None, "plan", "no bridge, fine-tuning under the plan"),
        ("none", "pretrained", "none", "none", "bridge and fine-tuning of stem and head alone"),
        ("random", "random", None, "all", "random weights, fine-tuned as a whole"),
        (
            "shuffled",
            "shuffled",
            None,
            "all",
            "published entries shuffled within each tensor, fine-tuned as a whole",
        ),
        ("matched", "matched", None, "all", "Gaussian weights of the published scale, fine-tuned as a whole"),
        ("random-bridge", "random", "all", "all", "random weights, bridge and fine-tuning of everything"),
    )
}
COMPARISONS = (
    ("language", "random", "does language pretraining help"),
    ("language", "shuffled", "does what language taught help beyond the entries themselves"),
    ("language", "matched", "does what language taught help beyond the scale of the weights"),
    ("full-bridge", "language", "does the random-label bridge help"),
    ("bridge", "full-bridge", "does training only the plan's blocks beat training all"),
    ("bridge", "language", "does the plan's bridge beat plain fine-tuning"),
    ("bridge", "partial", "does the bridge help where only the plan's blocks train"),
    ("bridge", "none", "does training the plan's blocks beat training none"),
    ("random-bridge", "random", "does the bridge help without pretraining"),
    ("full-bridge", "random-bridge", "does pretraining help where all are bridged"),
)
"""Pairs of arms that share seeds, and the question that their difference answers."""
LEVEL = 0.05
"""An answer is given at this level, corrected for the number of comparisons (Holm)."""
LEAST_RECALL = 0.9
"""A bridge that recalls fewer of its random labels has bridged little; nothing is claimed of it."""


def check_mode(mode: str) -> None:
    """UnknownNameError for what is not in `MODES`."""
    if mode not in MODES:
        raise UnknownNameError(f"unknown mode '{mode}'.{did_you_mean(mode, MODES)} Modes: {', '.join(MODES)}")


def check_scope(scope: str) -> None:
    """UnknownNameError for what is not in `SCOPES`."""
    if scope not in SCOPES:
        raise UnknownNameError(
            f"unknown fine-tuning scope '{scope}'.{did_you_mean(scope, SCOPES)} "
            f"Choose one of: {', '.join(SCOPES)}"
        )


def check_arms(arms: Sequence[str], scope: str, plan: FreezePlan | None) -> None:
    """UnknownNameError for an arm or scope that does not exist, UsageError for an arm that lacks its plan."""
    if wrong := [arm for arm in arms if arm not in ARMS]:
        raise UnknownNameError(
            f"unknown arm '{wrong[0]}'.{did_you_mean(wrong[0], ARMS)} Arms: {', '.join(ARMS)}"
        )
    check_scope(scope)
    if plan is None and (needs := planned_arms(arms, scope)):
        raise UsageError(f"the arm '{needs[0]}' trains a freeze plan; give one with --plan")


def planned_arms(arms: Sequence[str], scope: str) -> list[str]:
    """The arms of which a stage trains the freeze plan."""
    return [a for a in arms if "plan" in (ARMS[a].bridge, ARMS[a].finetune if scope == "arm" else scope)]


def check_seeds(seeds: Sequence[int]) -> None:
    """UsageError for no seed, or one that is there twice."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds must be one or more different numbers, not {list(seeds)}")


@dataclass(frozen=True, kw_only=True)
class ArmRun(Outcome):
    """One training of one arm."""

    arm: str


@dataclass(repr=False, kw_only=True)
class Evaluation(Record):
    """What arms reach on the test images.

    Attributes
    ----------
    mode : str
        Finetune, fewshot, probe or own-head.
    trials : list[ArmRun]
        Every training done, those of rejected learning rates included.
    chosen : dict[str, float | None]
        Arm → its learning rate, taken on validation; None where nothing is trained by gradient.
    about : dict[str, Any]
        The backbone and the task.
    """

    command: ClassVar[str] = "evaluate"
    mode: str
    trials: list[ArmRun]
    chosen: dict[str, float | None]
    about: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Arms in the order they were asked for."""
        return list(self.chosen)

    def of(self, arm: str) -> list[ArmRun]:
        """The trials of an arm at its chosen rate, by seed."""
        rate = self.chosen[arm]
        return sorted((t for t in self.trials if t.arm == arm and t.lr == rate), key=lambda t: t.seed or 0)

    def accuracies(self, arm: str) -> dict[int, float]:
        """Seed → test accuracy at the chosen rate."""
        return {t.seed or 0: t.test_accuracy for t in self.of(arm) if t.test_accuracy is not None}

    def interval(self, arm: str) -> Estimate:
        """Mean test accuracy over the seeds (`n`), with its 95 % interval over seeds and images; of one seed, Wilson's
        over the images."""
        found = list(self.accuracies(arm).values())
        if not found:
            reason = next((t.reason for t in self.of(arm) if t.reason), "no seed finished")
            return Estimate(value=None, reason=reason)
        if len(found) > 1:
            return self._pooled(arm).mean(arm)
        n = self._n_test(arm)
        low, high = wilson_interval(round(found[0] * n), n)
        return Estimate(value=found[0], low=low, high=high, n=1)

    def interval_kind(self, arm: str) -> str | None:
        """How `interval` was made; None where there is none."""
        n_seeds = len(self.accuracies(arm))
        if n_seeds > 1:
            return f"95 % over {n_seeds} seeds and {self._n_test(arm):,} images"
        return f"Wilson 95 % over {self._n_test(arm):,} images, 1 seed" if n_seeds else None

    def _pooled(self, *arms: str) -> PooledArms:
        """Test accuracies of arms on the seeds that they share."""
        common = set.intersection(*(set(self.accuracies(arm)) for arm in arms))
        trials = {arm: [t for t in self.of(arm) if (t.seed or 0) in common] for arm in arms}
        correct = {
            arm: np.mean([t.test_correct for t in own if t.test_correct is not None], axis=0)
            for arm, own in trials.items()
            if all(t.test_correct is not None for t in own)
        }
        values = {arm: {t.seed or 0: t.test_accuracy or 0.0 for t in own} for arm, own in trials.items()}
        return PooledArms(values, n_images=self._n_test(arms[0]), correct=correct)

    def _n_test(self, arm: str) -> int:
        return next(t.n_test or 0 for t in self.of(arm) if t.test_accuracy is not None)

    def differences(self) -> list[dict[str, Any]]:
        """Paired differences in test accuracy over common seeds, for the pairs of `COMPARISONS` at hand.

        The intervals hold seeds and test images; `pvalue` is corrected for the number of differences (Holm).
        """
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
                pair = self._pooled(first, second).difference(first, second)
                row |= {key: getattr(pair, key) for key in ("value", "low", "high", "probability", "pvalue")}
                row["interval"] = f"t 95 % over {len(common)} paired seeds and {self._n_test(first):,} images"
            rows.append(row)
        known = [row for row in rows if row["value"] is not None]
        for row, corrected in zip(known, holm([row["pvalue"] for row in known]), strict=True):
            row["pvalue"] = corrected
        return rows

    def forgetful(self, *arms: str) -> str:
        """Which of `arms` has a bridge that recalls less than `LEAST_RECALL` of its labels; empty if none."""
        for arm in arms:
            recalls = [t.bridge_accuracy for t in self.of(arm) if t.bridge_accuracy is not None]
            if recalls and np.mean(recalls) < LEAST_RECALL:
                recalled, least = percent(float(np.mean(recalls)), 0), percent(LEAST_RECALL, 0)
                return f"{arm} recalls {recalled} of its random labels, below {least}"
        return ""

    def to_frame(self) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for trial in self.trials:
            chosen = trial.lr == self.chosen[trial.arm]
            facts = {"arm": trial.arm, "lr": trial.lr, "seed": trial.seed, "chosen": chosen}
            for cost in ("trainable_parameters", "train_flops", "train_seconds"):
                facts[cost] = getattr(trial, cost)
            scored = [("validation_accuracy", "validation", trial.validation_accuracy, trial.n_validation)]
            if chosen:
                scored.append(("test_accuracy", "test", trial.test_accuracy, trial.n_test))
            for metric, split, value, n in scored:
                reason = None if value is not None else trial.reason or "not judged"
                row = {"metric": metric, "split": split, "value": value, "n": n, "reason": reason}
                rows.append(row | facts)
            if (value := trial.bridge_accuracy) is not None:
                rows.append({"metric": "random_label_accuracy", "split": "train", "value": value} | facts)
        for arm in self.arms:
            found = self.interval(arm)
            row = {"metric": "test_accuracy_mean", "split": "test", "arm": arm, "lr": self.chosen[arm]}
            row |= {key: getattr(found, key) for key in ("value", "low", "high")}
            rows.append(row | {"interval": self.interval_kind(arm), "n": found.n, "reason": found.reason})
        rows += [{"metric": "test_accuracy_difference", "split": "test", **row} for row in self.differences()]
        about = {key: self.about[key] for key in ("model", "revision", "task")}
        return tidy(rows, **about).assign(mode=self.mode)

    def table(self) -> list[dict[str, Any]]:
        """One row per arm for a terminal, then one per paired difference."""
        rows: list[dict[str, Any]] = []
        for arm in self.arms:
            found, trials = self.interval(arm), self.of(arm)
            flops = float(np.mean([t.train_flops for t in trials])) if trials else None
            rows.append(
                {
                    "arm": arm,
                    "test accuracy": None if found.value is None else percent(found.value),
                    "95 % interval": _ends(found.low, found.high),
                    "lr": None if self.chosen[arm] is None else f"{self.chosen[arm]:g}",
                    "trained": count_text(trials[0].trainable_parameters or 0) if trials else None,
                    "TFLOP": None if flops is None else f"{flops / 1e12:.3g}",
                    "interval of": self.interval_kind(arm),
                }
            )
        for row in self.differences():
            shown = row["value"] is not None
            rows.append(
                {
                    "arm": f"{row['arm']} − {row['versus']}",
                    "test accuracy": f"{100 * row['value']:+.1f} points" if shown else None,
                    "95 % interval": _ends(row["low"], row["high"], sign=True) if shown else None,
                    "interval of": row["interval"] if shown else row["reason"],
                }
            )
        return rows

    def summary(self) -> str:
        found = {arm: self.interval(arm) for arm in self.arms}
        parts = [
            f"{arm}: no result" if e.value is None else f"{arm} {percent(e.value)} ({_ends(e.low, e.high)})"
            for arm, e in found.items()
        ]
        kinds = sorted({kind for arm in self.arms if (kind := self.interval_kind(arm)) is not None})
        text = f"Test accuracy on {self.about['task']} ({self.mode}): " + "; ".join(parts)
        text += f" ({'; '.join(kinds)})." if kinds else "."
        for row in self.differences():
            if row["value"] is None:
                continue
            answer = "no difference found"
            if row["pvalue"] < LEVEL:
                answer = "yes" if row["value"] > 0 else "no, it hurts"
            if forgetful := self.forgetful(row["arm"], row["versus"]):
                answer = f"no claim, since the bridge of {forgetful}"
            ends = _ends(row["low"], row["high"], sign=True)
            text += (
                f"\n{row['question'].capitalize()}? {answer}: {row['arm']} − {row['versus']} = "
                f"{100 * row['value']:+.1f} points ({ends})."
            )
        return text


def _ends(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """The ends of an interval in per cent; one that leaves the scale of the quantity says nothing."""
    if low is None or high is None:
        return "–"
    if low < (-1.0 if sign else 0.0) or high > 1.0 or high - low > 1.0:
        return "not estimable"
    return interval_in_words(low, high, sign=sign)
