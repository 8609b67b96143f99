"""Bridge and fine-tuning under a freeze plan, and the accuracy that they reach."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.tasks.random_labels import random_labels
from layerprobe.training.classifier import Classifier, Snapshot, set_training
from layerprobe.training.config import BridgeConfig, FineTuneConfig, TrainConfig
from layerprobe.training.cost import training_flops
from layerprobe.training.data import Pixels, TaskTensors
from layerprobe.training.guard import Guard
from layerprobe.training.loop import (
    DivergedError,
    make_accelerator,
    make_optimizer,
    make_prefix,
    own_random_state,
    predict,
    training_steps,
)
from layerprobe.training.relative import RelativeRates

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.plans import FreezePlan


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training under one plan gave; also the form in which a search stores it.

    Attributes
    ----------
    validation_accuracy, test_accuracy : shares in [0, 1]; None: not asked for, or the run failed (`reason`).
    bridge_accuracy : random-label train accuracy over the last tenth of the bridge; chance is 1/K.
    train_seconds : wall time of the steps alone. call_seconds : of the whole call, evaluation included.
    train_flops : matrix-product operations of the steps, see `layerprobe.training.cost.training_flops`.
    trainable_parameters : of the backbone, in fine-tuning; stem and head are trained besides.
    validation_correct, test_correct : bool, one per image, for paired comparisons; not stored.
    """

    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    bridge_accuracy: float | None = None
    train_seconds: float = 0.0
    call_seconds: float = 0.0
    train_flops: float = 0.0
    steps: int = 0
    trainable_parameters: int | None = None
    n_validation: int | None = None
    n_test: int | None = None
    lr: float | None = None
    seed: int | None = None
    reason: str | None = None
    validation_correct: np.ndarray | None = field(default=None, compare=False, repr=False)
    test_correct: np.ndarray | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: every field but the arrays."""
        return {name: getattr(self, name) for name in _STORED}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Outcome:
        """What `to_dict` gave, or the form of version 0.1: accuracy, test, seconds, reason, facts."""
        if "accuracy" in stored:
            stored = {
                "call_seconds": stored["seconds"],
                **stored["facts"],
                "validation_accuracy": stored["accuracy"],
                "test_accuracy": stored["test"],
                "train_seconds": stored["seconds"],
                "reason": stored["reason"],
            }
        return cls(**{name: stored[name] for name in _STORED if name in stored})


_STORED = tuple(item.name for item in fields(Outcome) if item.compare)


def train_and_score(
    backbone: Backbone,
    tensors: TaskTensors,
    plan: FreezePlan,
    *,
    bridge: BridgeConfig | None,
    finetune: FineTuneConfig,
    finetune_plan: FreezePlan | None = None,
    test: bool = False,
    auto_rgn: bool = False,
) -> Outcome:
    """Random-label bridge, then fine-tuning, under `plan`; the backbone is handed back bit for bit as it was.

    Each stage anneals its learning rate over its own steps, so accuracies at different lengths are each those
    of a finished training. The seeds fix labels, head, order, augmentation and dropout: plans trained with
    the same seeds are paired.

    Parameters
    ----------
    backbone : where the training starts; many plans can be trained on one loaded backbone.
    tensors : the task, preprocessed for this backbone (`TaskTensors.of`), shared between calls.
    plan : stays frozen in both stages, and this is verified after each.
    bridge : settings of the bridge, its lr, steps and seed among them; None leaves the bridge out.
    finetune : the same for the fine-tuning.
    finetune_plan : another plan for the second stage; None keeps `plan`.
    test : also measure accuracy on the test split. Selection must not.
    auto_rgn : every block learns at a rate of its own, see `layerprobe.training.relative.RelativeRates`.

    Raises
    ------
    PlanError : the plan does not fit this backbone, or a frozen tensor changed.
    """
    began = time.perf_counter()
    finetune_plan = finetune_plan or plan
    rows = few_shot_rows(tensors.labels["train"], finetune.shots, finetune.seed)
    steps = finetune.n_steps(len(tensors.labels["train"]) if rows is None else len(rows))
    if bridge is not None:
        steps += bridge.n_steps(len(tensors.labels["train"]))
    seconds = flops = 0.0
    bridge_accuracy = validation = tested = reason = None
    with Snapshot.restored(backbone), own_random_state():
        try:
            if bridge is not None:
                label_seed = bridge.seed if bridge.label_seed is None else bridge.label_seed
                labels = random_labels(tensors.ids["train"], bridge.random_classes, label_seed)
                stage = run_stage(
                    backbone,
                    tensors,
                    labels,
                    bridge.random_classes,
                    plan=plan,
                    config=bridge,
                    auto_rgn=auto_rgn,
                )
                seconds, flops, bridge_accuracy = stage.seconds, stage.flops, stage.train_accuracy
            stage = run_stage(
                backbone,
                tensors,
                tensors.labels["train"],
                tensors.n_classes,
                plan=finetune_plan,
                config=finetune,
                rows=rows,
                auto_rgn=auto_rgn,
            )
            seconds, flops = seconds + stage.seconds, flops + stage.flops
            validation = correct(stage.classifier, tensors, "validation", finetune.precision)
            tested = correct(stage.classifier, tensors, "test", finetune.precision) if test else None
        except DivergedError as error:
            reason = f"diverged: {error}"
    return Outcome(
        validation_accuracy=None if validation is None else float(validation.mean()),
        test_accuracy=None if tested is None else float(tested.mean()),
        bridge_accuracy=bridge_accuracy,
        train_seconds=seconds,
        call_seconds=time.perf_counter() - began,
        train_flops=flops,
        steps=steps,
        trainable_parameters=finetune_plan.counts["trainable_parameters"],
        n_validation=len(tensors.labels["validation"]),
        n_test=len(tensors.labels["test"]) if test else None,
        lr=finetune.lr,
        seed=finetune.seed,
        reason=reason,
        validation_correct=validation,
        test_correct=tested,
    )


@dataclass
class Stage:
    """A finished training: the classifier as it ended, and what it took."""

    classifier: Classifier
    train_accuracy: float
    """Mean over the last tenth of the steps."""
    seconds: float
    flops: float


def run_stage(
    backbone: Backbone,
    tensors: TaskTensors,
    labels: np.ndarray,
    n_classes: int,
    *,
    plan: FreezePlan,
    config: TrainConfig,
    rows: np.ndarray | None = None,
    auto_rgn: bool = False,
) -> Stage:
    """Train `backbone` in place with a new head, on the training images (or its `rows`), verified."""
    classifier = Classifier(backbone, n_classes, seed=config.seed)
    guard = Guard(plan, classifier)
    set_training(classifier)
    pixels: Pixels = tensors.pixels["train"]
    if rows is not None:
        pixels, labels = pixels.subset(rows), labels[rows]
    device = next(classifier.parameters()).device
    accelerator = make_accelerator(device)
    if accelerator.num_processes > 1:
        raise UsageError(
            f"fine-tuning and plan values run in one process, not {accelerator.num_processes}; only the bridge "
            "spreads over processes"
        )
    optimizer = make_optimizer(classifier, config, by_block=auto_rgn)
    prefix = make_prefix(classifier, pixels, config, device=device)
    n_steps = config.n_steps(len(pixels))
    began = time.perf_counter()
    history = list(
        training_steps(
            classifier,
            optimizer,
            pixels,
            labels,
            config,
            accelerator=accelerator,
            n_steps=n_steps,
            flip=tensors.flip,
            prefix=prefix,
            relative=RelativeRates(optimizer) if auto_rgn else None,
        )
    )
    seconds = time.perf_counter() - began
    optimizer.zero_grad()
    guard.verify(after=f"{n_steps} steps")
    last = history[-max(1, n_steps // 10) :]
    return Stage(
        classifier,
        float(np.mean([step.accuracy for step in last])),
        seconds,
        n_steps * training_flops(classifier, pixels.shape, config.batch_size, prefix.depth if prefix else 0),
    )


def correct(classifier: Classifier, tensors: TaskTensors, split: str, precision: str) -> np.ndarray:
    """Which images of `split` are classified right: bool n."""
    return predict(classifier, tensors.pixels[split], precision=precision) == tensors.labels[split]


def few_shot_rows(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray | None:
    """Positions of `shots` images per class, drawn by `seed`, or None for all; small classes give what they have."""
    if shots is None:
        return None
    draw = np.random.default_rng(seed)
    chosen = [draw.permutation(np.flatnonzero(labels == k))[:shots] for k in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
