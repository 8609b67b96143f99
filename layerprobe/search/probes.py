"""What linear probes reach beside the plans: of the features as they are, and of the raw pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.analyzers.probes import PIXEL_SIZE, linear_probes, pixel_features
from layerprobe.backbones.backbone import evaluating
from layerprobe.choices import SPLITS
from layerprobe.errors import LayerprobeError
from layerprobe.metrics.intervals import interval_in_words
from layerprobe.progress import note
from layerprobe.reading import Schema, check_fields
from layerprobe.records import Estimate
from layerprobe.search.baselines import BaselineResult, Report
from layerprobe.search.evaluator import Evaluator
from layerprobe.search.space import REPORT_REPEAT, trial_seed
from layerprobe.training.classifier import autocast, in_batches
from layerprobe.training.finetune import few_shot_rows
from layerprobe.training.outcome import unpack_bits

PROBE_NAMES = {"probe": "a linear probe of the frozen features", "pixels": "a linear probe of the raw pixels"}
ARMS = {"plan": "the best plan found", "all": "all blocks trained", "none": "no block trained"}


PROBE_FIELDS: dict[str, Schema] = {
    "name": str, "C": float, "accuracy": float, "low": float, "high": float, "correct": str, "n": int,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProbeBaseline:
    """A converged logistic regression: nothing of the backbone is trained.

    Attributes
    ----------
    name : str
        "probe", of the pooled features that a head would get before any training, or "pixels".
    C : float
        Its inverse regularisation strength, chosen on validation.
    accuracy, low, high : float
        Share of the test images, with the 95 % Wilson interval.
    correct : np.ndarray
        Bool, one per test image.
    """

    name: str
    C: float
    accuracy: float
    low: float
    high: float
    correct: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        bits = np.packbits(self.correct).tobytes().hex()
        return {**vars(self), "correct": bits, "n": len(self.correct)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ProbeBaseline:
        """What `to_dict` gave; BrokenFileError for anything else."""
        check_fields(stored, PROBE_FIELDS, "a probe in the search's database")
        known = {name: stored[name] for name in PROBE_FIELDS if name != "n"}
        return cls(**{**known, "correct": unpack_bits(stored["correct"], stored["n"])})

    def minus(self, line: BaselineResult) -> Estimate:
        """Test accuracy of the probe minus that of a line of the report, on the same images."""
        if line.pooled is None:
            return Estimate(value=None, reason="not judged")
        return line.pooled.fixed_minus(self.accuracy, self.correct, line.arm)


def probe_baselines(evaluator: Evaluator, *, quiet: bool = True) -> list[ProbeBaseline]:
    """Both probes, on the training images of the report's first seed; those that cannot be fitted are left out.

    C is chosen on the validation images of the search; validation images are not fitted to, as in the plans.
    """
    tensors, backbone, settings = evaluator.tensors, evaluator.backbone, evaluator.settings
    finetune = settings.finetune.replace(seed=trial_seed(settings.seed, REPORT_REPEAT))
    rows = few_shot_rows(tensors.labels["train"], finetune)
    splits = {name: evaluator.splits[name] for name in SPLITS}
    splits["train"] = splits["train"].subset(rows)
    pixels = {**tensors.pixels, "train": tensors.pixels["train"].subset(rows)}
    size = min(evaluator.task.image_size or PIXEL_SIZE, PIXEL_SIZE)

    def pooled(split: str) -> np.ndarray:
        with evaluating(backbone), autocast(backbone.device, finetune.precision):
            found = in_batches(
                lambda x: backbone.pool(backbone(x)).float(),
                pixels[split],
                device=backbone.device,
                batch_size=64,
            )
        return found.numpy()

    made = {"probe": pooled, "pixels": lambda split: pixel_features(splits[split], size)}
    found = []
    for name, features in made.items():
        try:
            sides = [([features(split)], splits[split].labels) for split in SPLITS]
            probe = linear_probes(sides[0], sides[1], sides[2], refit="train", quiet=True).results[0]
        except LayerprobeError as error:
            if not quiet:
                note(f"no {name} among the baselines: {error}")
            continue
        if probe is not None:
            low, high = probe.interval
            fitted = ProbeBaseline(
                name=name,
                C=float(probe.best_C),
                accuracy=probe.test_accuracy,
                low=low,
                high=high,
                correct=probe.correct,
            )
            found.append(fitted)
    return found


def probes_in_words(probes: Sequence[ProbeBaseline], report: Report) -> str:
    """The first sentence of the answer where no trained plan is ahead of a probe; else nothing."""
    trained = [line for line in report.lines if line.accuracy.value is not None]
    if not trained or not probes:
        return ""
    probe = max(probes, key=lambda one: one.accuracy)
    best = max(trained, key=lambda line: line.accuracy.value or 0.0)
    if probe.accuracy <= (best.accuracy.value or 0.0):
        return ""
    gap = probe.minus(best)
    if gap.low is None or gap.high is None:
        return ""
    what, arm = PROBE_NAMES[probe.name], ARMS.get(best.baseline.name, best.baseline.name)
    lead = (
        f"{what[0].upper()}{what[1:]} beats every trained plan"
        if gap.low > 0
        else f"No trained plan is ahead of {what}"
    )
    return (
        f"{lead}: {100 * probe.accuracy:.1f} % of the test images against {100 * (best.accuracy.value or 0.0):.1f} % "
        f"({arm}; difference {100 * (gap.value or 0.0):+.1f} points, 95 % interval "
        f"{interval_in_words(gap.low, gap.high, sign=True)}). "
    )


def pixels_in_words(probes: Sequence[ProbeBaseline], recommended: BaselineResult) -> str:
    """A last sentence where the raw pixels are not shown to be behind the recommended line; or nothing."""
    probe = next((one for one in probes if one.name == "pixels"), None)
    if probe is None:
        return ""
    gap = probe.minus(recommended)
    if gap.low is None or gap.high is None or gap.high < 0:
        return ""
    return (
        f" A linear probe of the raw pixels is not shown to be behind it ({100 * probe.accuracy:.1f} %; difference "
        f"{interval_in_words(gap.low, gap.high, sign=True)} points): this task may not need the backbone."
    )
