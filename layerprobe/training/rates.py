"""The bridge's learning rate, chosen by random-label loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from layerprobe.plans import FreezePlan
from layerprobe.progress import note
from layerprobe.training.classifier import Classifier, Snapshot
from layerprobe.training.config import BridgeConfig
from layerprobe.training.data import Pixels, TaskTensors
from layerprobe.training.finetune import run_stage
from layerprobe.training.loop import DivergedError, autocast


def choose_rate(
    backbone: Any,
    tensors: TaskTensors,
    labels: np.ndarray,
    plan: FreezePlan,
    config: BridgeConfig,
    *,
    quiet: bool,
) -> float:
    """The candidate of `config.lrs` that is ahead after `config.lr_steps` steps, each annealed to its end.

    The backbone is handed back bit for bit as it was.

    Raises
    ------
    DivergedError : all of them diverged.
    """
    n_steps = config.n_steps(len(labels))
    steps = config.lr_steps or max(20, n_steps // 10)
    losses: dict[float, float] = {}
    for lr in config.lrs:
        trial = config.replace(lr=lr, steps=steps, lrs=())
        with Snapshot.restored(backbone):
            try:
                stage = run_stage(backbone, tensors, labels, config.random_classes, plan=plan, config=trial)
                losses[lr] = held_out_loss(stage.classifier, tensors.pixels["train"], labels, config)
            except DivergedError:
                losses[lr] = math.inf
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        raise DivergedError(f"all learning rates diverged: {', '.join(map(str, config.lrs))}; try lower ones")
    if not quiet:
        shown = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
        note(f"learning rate {best:g}, by random-label loss on plain views after {steps} steps ({shown})")
    return best


@torch.no_grad()
def held_out_loss(classifier: Classifier, pixels: Pixels, labels: np.ndarray, config: BridgeConfig) -> float:
    """Mean random-label loss on the plain, unshifted training images (at most 2,048), which training with
    weak augmentation shows one time in eighteen."""
    classifier.eval()
    rows = np.arange(min(len(pixels), 2048))
    total = 0.0
    device = next(classifier.parameters()).device
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        with autocast(device, config.precision):
            logits = classifier(pixels[part].to(device))
        targets = torch.from_numpy(labels[part]).to(device)
        total += float(cross_entropy(logits.float(), targets, reduction="sum"))
    return total / len(rows)
