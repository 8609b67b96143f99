"""The learning rate of a bridge, chosen among candidates by the loss on its random labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from layerprobe.plans import FreezePlan
from layerprobe.progress import note
from layerprobe.training.classifier import Snapshot, autocast, in_batches
from layerprobe.training.config import BridgeConfig
from layerprobe.training.data import TaskTensors
from layerprobe.training.finetune import run_stage
from layerprobe.training.loop import DivergedError

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


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
    steps = config.lr_steps or max(20, config.n_steps(len(labels)) // 10)
    rows = np.arange(min(len(labels), 2048))
    plain, targets = tensors.pixels["train"].subset(rows), torch.from_numpy(labels[rows])
    losses: dict[float, float] = {}
    for lr in config.lrs:
        trial = config.replace(lr=lr, steps=steps, lrs=())
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
