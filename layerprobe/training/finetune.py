"""Bridge and fine-tuning under a freeze plan, and the accuracy that they reach."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from layerprobe.backbones.backbone import evaluating
from layerprobe.backbones.sharding import is_sharded
from layerprobe.errors import UsageError
from layerprobe.metrics.probing.logistic import fit_logistic_path
from layerprobe.progress import note
from layerprobe.training.classifier import (
    Classifier,
    Snapshot,
    autocast,
    gradient_checkpointing,
    in_batches,
    predict,
    shard,
    training_flops,
    without_layerdrop,
)
from layerprobe.training.config import BridgeConfig, FineTuneConfig
from layerprobe.training.data import ImageTensors, TaskTensors
from layerprobe.training.freeze_check import FrozenCheck, Phases
from layerprobe.training.loop import (
    BlockRates,
    DivergedError,
    Step,
    make_accelerator,
    make_optimizer,
    preserved_rng,
    training_steps,
)
from layerprobe.training.outcome import Outcome

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.plans import FreezePlan


PROBE_C = 0.1
"""Inverse strength of the penalty of the regression that a head starts from."""


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
    """Random-label bridge, then fine-tuning, under `plan`; the backbone is restored bit for bit afterwards.

    Each stage anneals its learning rate over its own steps. The seeds fix labels, head, order, augmentation and
    dropout: plans trained with the same seeds are paired.

    Parameters
    ----------
    backbone : Backbone
        Where the training starts; many plans can be trained on one loaded backbone.
    tensors : TaskTensors
        The task, preprocessed for this backbone (`TaskTensors.of`), shared between calls.
    plan : FreezePlan
        Stays frozen in both stages, and this is verified after each.
    bridge : BridgeConfig | None
        Settings of the bridge, its lr, steps and seed among them; None leaves the bridge out.
    finetune : FineTuneConfig
        The same for the fine-tuning.
    finetune_plan : FreezePlan | None
        Another plan for the second stage; None keeps `plan`.
    test : bool
        Also measure accuracy on the test split. Selection must not.
    auto_rgn : bool
        Every block learns at a rate of its own, see `layerprobe.training.loop.BlockRates`.

    Raises
    ------
    PlanError
        The plan does not fit this backbone, or a frozen tensor changed.
    """
    began = time.perf_counter()
    finetune_plan = finetune_plan or plan
    labels = tensors.labels["train"]
    steps = finetune.n_steps(len(few_shot_rows(labels, finetune)))
    steps += bridge.n_steps(len(labels)) if bridge is not None else 0
    seconds = flops = 0.0
    bridge_accuracy = validation = tested = reason = None
    frozen = set(plan.frozen).intersection(finetune_plan.frozen)
    with Snapshot(backbone, frozen=frozen), preserved_rng():
        try:
            if bridge is not None:
                stage = run_stage(backbone, tensors, bridge, plan=plan, auto_rgn=auto_rgn)
                seconds, flops, bridge_accuracy = stage.seconds, stage.flops, stage.train_accuracy
            stage = run_stage(backbone, tensors, finetune, plan=finetune_plan, auto_rgn=auto_rgn)
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
        trainable_parameters=finetune_plan.trained_parameters,
        n_validation=len(tensors.labels["validation"]),
        n_test=len(tensors.labels["test"]) if test else None,
        lr=finetune.lr,
        seed=finetune.seed,
        reason=reason,
        test_correct=tested,
    )


@dataclass(kw_only=True)
class Stage:
    """A finished training: the classifier as it ended, and what it took.

    `train_accuracy` is the mean over the last tenth of the steps.
    """

    classifier: Classifier
    train_accuracy: float
    seconds: float
    flops: float


def run_stage(
    backbone: Backbone,
    tensors: TaskTensors,
    config: BridgeConfig | FineTuneConfig,
    *,
    plan: FreezePlan,
    auto_rgn: bool = False,
) -> Stage:
    """Train `backbone` in place with a new head, on random labels or the task's own, and verify the plan."""
    pixels = tensors.pixels["train"]
    if isinstance(config, BridgeConfig):
        labels, n_classes = tensors.random_labels(config), config.random_classes
    else:
        labels, n_classes = tensors.labels["train"], tensors.n_classes
        if config.shots is not None:
            rows = few_shot_rows(labels, config)
            pixels, labels = pixels.subset(rows), labels[rows]
    classifier = Classifier(backbone, n_classes, seed=config.seed)
    if isinstance(config, FineTuneConfig) and config.head == "probe":
        start_from_probe(classifier, pixels, labels, precision=config.precision)
    check = FrozenCheck(plan, classifier)
    accelerator = make_accelerator(classifier.device)
    spread = is_sharded(backbone.model)
    if accelerator.num_processes > 1 and not spread:
        raise UsageError(
            f"fine-tuning and plan values run in one process, not {accelerator.num_processes}; only the bridge "
            "spreads over processes, and a model that --shard spread"
        )
    if spread:
        shard(classifier, accelerator.device)
        check.take_digests()
    optimizer = make_optimizer(classifier, config, by_block=auto_rgn)
    phases = Phases(plan, classifier, optimizer, pixels, config, accelerator.num_processes)
    n_steps = config.n_steps(len(pixels))
    model = cast(torch.nn.Module, torch.compile(classifier)) if config.compile else classifier
    taken: list[Step] = []
    flops, counted = 0.0, 0
    with (
        gradient_checkpointing(backbone.model, config.gradient_checkpointing),
        without_layerdrop(backbone.model),
    ):
        phases.enter(0)
        steps = training_steps(
            model,
            optimizer,
            pixels,
            labels,
            config,
            accelerator=accelerator,
            n_steps=n_steps,
            flip=tensors.flip,
            before_step=phases.enter,
            block_rates=BlockRates(optimizer) if auto_rgn else None,
        )
        for step in steps:
            taken.append(step)
            if len(taken) in (phases.stem_steps, n_steps):  # the last of its phase
                depth = phases.prefix.depth if phases.prefix else 0
                step_flops = training_flops(classifier, pixels.shape, config.batch_size, depth)
                flops, counted = flops + (len(taken) - counted) * step_flops, len(taken)
    optimizer.zero_grad()
    check.verify(after=f"{n_steps} steps")
    return Stage(
        classifier=classifier,
        train_accuracy=float(np.mean([step.accuracy for step in taken[-max(1, n_steps // 10) :]])),
        seconds=sum(step.seconds for step in taken),
        flops=flops,
    )


def start_from_probe(
    classifier: Classifier, pixels: ImageTensors, labels: np.ndarray, *, precision: str = "float32"
) -> None:
    """Set the head to a logistic regression on the pooled features of the training images, as they are now.

    Parameters
    ----------
    pixels : ImageTensors
        The n training images.
    labels : np.ndarray
        Their classes, int64 n. A class without an image gets no weights, and the smallest intercept.
    """
    backbone, head, device = classifier.backbone, classifier.head, classifier.device
    with evaluating(classifier), autocast(device, precision):
        pooled = in_batches(
            lambda x: backbone.pool(backbone(x)).float(), pixels, device=device, batch_size=64
        )
    seen, coded = np.unique(labels, return_inverse=True)
    if len(seen) < 2:
        return
    probe = fit_logistic_path(pooled.numpy(), coded, [PROBE_C], tol=1e-3)[0]
    # Columns that hardly vary now may vary once blocks train: no weight of theirs may be huge.
    weights = probe.coef / np.maximum(probe.scale, 0.01 * probe.scale.max())
    intercepts = probe.intercept - weights @ probe.mean
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(float(intercepts.min()))
        head.weight[seen] = torch.as_tensor(weights, dtype=head.weight.dtype, device=device)
        head.bias[seen] = torch.as_tensor(intercepts, dtype=head.bias.dtype, device=device)


def correct(classifier: Classifier, tensors: TaskTensors, split: str, precision: str) -> np.ndarray:
    """Which images of `split` are classified right: bool n."""
    return predict(classifier, tensors.pixels[split], precision=precision) == tensors.labels[split]


def few_shot_rows(labels: np.ndarray, config: FineTuneConfig) -> np.ndarray:
    """Positions of `shots` images per class, drawn by `seed`, or of all; small classes give what they have."""
    if config.shots is None:
        return np.arange(len(labels))
    draw = np.random.default_rng(config.seed)
    chosen = [draw.permutation(np.flatnonzero(labels == k))[: config.shots] for k in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def choose_rate(
    backbone: Backbone,
    tensors: TaskTensors,
    labels: np.ndarray,
    plan: FreezePlan,
    config: BridgeConfig,
    *,
    quiet: bool,
) -> float:
    """The rate of `config.lrs` with the lowest loss after `config.lr_steps` steps, each annealed to its end.

    The loss is that of the random labels on the plain, unshifted training images (at most 2,048), which
    training with weak augmentation shows one time in eighteen.
    """
    n_steps = config.n_steps(len(labels))
    steps = config.lr_steps or max(20, n_steps // 10)
    stem_steps = math.ceil(config.stem_steps * steps / n_steps)
    rows = np.arange(min(len(labels), 2048))
    plain, targets = tensors.pixels["train"].subset(rows), torch.from_numpy(labels[rows])
    losses: dict[float, float] = {}
    for lr in config.lrs:
        trial = config.replace(lr=lr, steps=steps, lrs=(), stem_steps=stem_steps)
        with Snapshot(backbone):
            try:
                stage = run_stage(backbone, tensors, trial, plan=plan)
                model = stage.classifier.eval()
                with autocast(model.device, config.precision):
                    logits = in_batches(model, plain, device=model.device)
                losses[lr] = float(cross_entropy(logits.float(), targets))
            except DivergedError:
                losses[lr] = math.inf
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        raise DivergedError(f"all learning rates diverged: {', '.join(map(str, config.lrs))}; try lower ones")
    if not quiet:
        shown = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
        note(f"learning rate {best:g}, by random-label loss on plain views after {steps} steps ({shown})")
    return best
