"""The value of a freeze plan: what the real chain, bridge and then fine-tuning, reaches under it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Outcome:
    """What one chain under one plan reached.

    `validation_accuracy` and `test_accuracy` are shares in [0, 1] or None: not asked for, or diverged
    (then `reason` says how).
    """

    validation_accuracy: float | None
    test_accuracy: float | None
    bridge_accuracy: float | None
    """Random-label train accuracy over the last tenth of the bridge; against 1/K."""
    train_seconds: float
    """Wall time of the steps alone, bridge and fine-tuning."""
    train_flops: float
    """Matrix-product operations of the steps, see `layerprobe.training.cost.training_flops`."""
    steps: int
    trainable_parameters: int
    """Of the backbone, by the plan; stem and head are trained besides."""
    n_validation: int
    n_test: int | None
    lr: float
    seed: int
    reason: str | None = None
    validation_correct: np.ndarray | None = None
    """bool, one per validation image, for paired comparisons."""
    test_correct: np.ndarray | None = None


def value_plan(
    backbone: Any,
    tensors: TaskTensors,
    plan: Any,
    *,
    lr: float,
    seed: int,
    bridge_steps: int = 200,
    finetune_steps: int = 200,
    bridge: BridgeConfig | None = None,
    finetune: FineTuneConfig | None = None,
    finetune_plan: Any = None,
    test: bool = False,
    auto_rgn: bool = False,
) -> Outcome:
    """Random-label bridge, then fine-tuning, under `plan`; the backbone is handed back bit for bit as it was.

    Both stages take exactly the steps stated, with a learning-rate schedule annealed over them, so values
    at different budgets are each a finished training. Seed fixes labels, head, order, views and dropout:
    plans valued with one seed are paired.

    Parameters
    ----------
    backbone : where the chain starts; many plans can be valued on one loaded backbone.
    tensors : the task, preprocessed for this backbone (`TaskTensors.of`), shared between calls.
    plan : stays frozen in both stages, and this is verified after each.
    lr : peak learning rate of both stages.
    bridge_steps : 0 leaves the bridge out.
    bridge, finetune : all other settings; their lr, steps and seed are replaced.
    finetune_plan : another plan for the second stage; None keeps `plan`.
    test : also judge on the test split. Selection must not.
    auto_rgn : every block learns at a rate of its own, see `layerprobe.training.relative.RelativeRates`.

    Raises
    ------
    PlanError : the plan does not fit this backbone, or a frozen tensor changed.
    """
    bridge = bridge or BridgeConfig(batch_size=64)
    finetune = finetune or FineTuneConfig(batch_size=64)
    seconds = flops = 0.0
    bridge_accuracy = validation = judged = None
    reason = None
    with Snapshot.restored(backbone), own_random_state():
        try:
            if bridge_steps:
                settings = bridge.replace(lr=lr, steps=bridge_steps, seed=seed)
                label_seed = seed if settings.label_seed is None else settings.label_seed
                labels = random_labels(tensors.ids["train"], settings.random_classes, label_seed)
                stage = run_stage(
                    backbone,
                    tensors,
                    labels,
                    settings.random_classes,
                    plan=plan,
                    config=settings,
                    auto_rgn=auto_rgn,
                )
                seconds, flops, bridge_accuracy = stage.seconds, stage.flops, stage.train_accuracy
            settings = finetune.replace(lr=lr, steps=finetune_steps, seed=seed)
            stage = run_stage(
                backbone,
                tensors,
                tensors.labels["train"],
                tensors.n_classes,
                plan=finetune_plan or plan,
                config=settings,
                rows=few_shot_rows(tensors.labels["train"], settings.shots, seed),
                auto_rgn=auto_rgn,
            )
            seconds, flops = seconds + stage.seconds, flops + stage.flops
            validation = judge(stage.classifier, tensors, "validation", settings.precision)
            judged = judge(stage.classifier, tensors, "test", settings.precision) if test else None
        except DivergedError as error:
            reason = f"diverged: {error}"
    return Outcome(
        validation_accuracy=None if validation is None else float(validation.mean()),
        test_accuracy=None if judged is None else float(judged.mean()),
        bridge_accuracy=bridge_accuracy,
        train_seconds=seconds,
        train_flops=flops,
        steps=bridge_steps + finetune_steps,
        trainable_parameters=plan.counts["trainable_parameters"],
        n_validation=len(tensors.labels["validation"]),
        n_test=len(tensors.labels["test"]) if test else None,
        lr=lr,
        seed=seed,
        reason=reason,
        validation_correct=validation,
        test_correct=judged,
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
    backbone: Any,
    tensors: TaskTensors,
    labels: np.ndarray,
    n_classes: int,
    *,
    plan: Any,
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


def judge(classifier: Classifier, tensors: TaskTensors, split: str, precision: str) -> np.ndarray:
    """Which images of `split` are classified right: bool n."""
    found = predict(classifier, tensors.pixels[split], precision=precision)
    return found == tensors.labels[split]


def few_shot_rows(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray | None:
    """Positions of `shots` images per class, drawn by `seed`, or None for all; small classes give what they have."""
    if shots is None:
        return None
    draw = np.random.default_rng(seed)
    chosen = [draw.permutation(np.flatnonzero(labels == k))[:shots] for k in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
